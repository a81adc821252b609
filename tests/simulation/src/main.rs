//! `simulate`: many seeds, or one with its trace.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use parking_lot::Mutex;
use simulation::{Outcome, Violation, run, run_traced};

/// Simulates both sites under faults, and checks the promises after every step.
#[derive(Debug, Parser)]
#[command(name = "simulate", version)]
struct Cli {
    /// How many seeds.
    #[arg(long, default_value_t = 1000, value_name = "N")]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    first: u64,
    /// One seed only, with every step on standard error.
    #[arg(long, value_name = "SEED", conflicts_with_all = ["seeds", "first"])]
    seed: Option<u64>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(seed) = cli.seed {
        return match run_traced(seed) {
            Ok(outcome) => {
                println!("seed {seed}: no violation; {outcome:?}");
                ExitCode::SUCCESS
            }
            Err(violation) => {
                println!("{violation}");
                ExitCode::FAILURE
            }
        };
    }
    let started = Instant::now();
    let (next, end) = (AtomicU64::new(cli.first), cli.first.saturating_add(cli.seeds));
    let (total, found) = (Mutex::new(Outcome::default()), Mutex::new(None::<Violation>));
    let promotions = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while found.lock().is_none() {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    match run(seed) {
                        Ok(outcome) => {
                            let mut total = total.lock();
                            total.points += outcome.points;
                            total.crashes += outcome.crashes;
                            total.broken += outcome.broken;
                            total.flushes += outcome.flushes;
                            total.disk_faults += outcome.disk_faults;
                            total.partitions += outcome.partitions;
                            total.flips += outcome.flips;
                            total.compared_bytes += outcome.compared_bytes;
                            total.scrubbed_bytes += outcome.scrubbed_bytes;
                            total.switched += outcome.switched;
                            total.handed += outcome.handed;
                            total.own_blocks += outcome.own_blocks;
                            total.measured += outcome.measured;
                            promotions.fetch_add(outcome.promoted.into(), Ordering::Relaxed);
                        }
                        Err(violation) => {
                            found.lock().get_or_insert(violation);
                        }
                    }
                    let done = seed - cli.first + 1;
                    if done.is_multiple_of(500) {
                        eprintln!("{done} of {} seeds, {:.0} s", cli.seeds, started.elapsed().as_secs_f64());
                    }
                }
            });
        }
    });
    if let Some(violation) = found.into_inner() {
        println!("{violation}");
        return ExitCode::FAILURE;
    }
    let total = total.into_inner();
    println!(
        "{} seeds without a violation in {:.0} s: {} points, {} crashes, {} broken connections, {} partitions, {} faults of the primary's \
         disks, {} flipped bits, {} MiB compared, {} MiB scrubbed, {} flushes that waited for the receiver; {} seeds with promotions, {} \
         switchovers, {} times disks given back or rolled back ({} measured), {} own blocks kept",
        cli.seeds,
        started.elapsed().as_secs_f64(),
        total.points,
        total.crashes,
        total.broken,
        total.partitions,
        total.disk_faults,
        total.flips,
        total.compared_bytes >> 20,
        total.scrubbed_bytes >> 20,
        total.flushes,
        promotions.into_inner(),
        total.switched,
        total.handed,
        total.measured,
        total.own_blocks
    );
    ExitCode::SUCCESS
}
