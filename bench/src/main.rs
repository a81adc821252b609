//! `bench`: experiments that drive real processes (the `twinsite` binary, its peers, fio, PostgreSQL) and hold the figures against
//! the bounds of the project. One experiment a file in `experiment/`; `docs/bench.md` explains each.
//!
//! Must hold: every process, mount and loop device that is started here is ended here, also after an error or ctrl-c.
//! Must not know: anything of the product but its binary, its configuration file, its control socket, and of its files what `docs/` says.

#![deny(unsafe_code)]

mod block;
mod chart;
mod child;
mod context;
mod dirty_log;
mod disk;
mod experiment;
mod fio;
mod http;
mod journal;
mod nbd_client;
mod node;
mod os;
mod page_cache;
mod peers;
mod postgres;
mod procfs;
mod qemu_mirror;
mod qmp;
mod report;
mod stats;
mod tools;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, Parser, Subcommand};

use context::Bench;
use report::Report;

/// Measures Twinsite beside its peers.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
struct Cli {
    #[command(subcommand)]
    experiment: Experiment,
    #[command(flatten)]
    options: Options,
}

/// Options of every experiment.
#[derive(Debug, Args)]
struct Options {
    /// Short runs, for a look; the figures that count come without it.
    #[arg(long, global = true)]
    quick: bool,
    /// Folder on the disk to measure; a temporary folder is made in it and removed at the end. Not a tmpfs.
    #[arg(long, global = true, default_value = "/var/tmp", value_name = "FOLDER")]
    dir: PathBuf,
    /// Where the JSON and SVG files go [default: bench/results of this workspace].
    #[arg(long, global = true, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Rounds instead of the experiment's own number.
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: Option<u32>,
    /// Seconds a measurement instead of the experiment's own number.
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: Option<u32>,
    /// Use the release binaries as they are, do not build them first.
    #[arg(long, global = true)]
    no_build: bool,
    /// Keep the temporary folder, with the logs of all processes.
    #[arg(long, global = true)]
    keep: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
enum Experiment {
    /// NBD export against qemu-nbd, qemu-storage-daemon and nbdkit.
    Nbd,
    /// Random writes while replicating, against qemu-storage-daemon's blockdev-mirror.
    Mirror,
    /// The first full copy, against blockdev-mirror.
    FirstSync,
    /// pgbench at a fixed rate: dirty bytes against bytes sent, and the lag. Needs root.
    Wire,
    /// From the failover command to the first read and write of a 1 TiB disk, also with 200,000 points.
    Failover,
    /// Reads of an activated copy, fresh and flattened, against the raw file.
    ForkReads,
    /// Peak resident memory while a 1 TiB disk is written at random.
    Memory,
    /// First writes to the regions of a disk whose dirty log is clean, against the export without a tap.
    DirtyLog,
    /// What is sent again after a kill, against what really differed.
    Restart,
    /// Comparing a disk by hash after a kill, against one sequential reader.
    Compare,
    /// Bytes that the receiver writes for each that it receives, and for each that it folds.
    Retention,
    /// The guest's writes while the link is cut, restored and throttled.
    Link,
    /// The lag with two drills under load against that without, and reads of a fresh drill against the raw file.
    Drill,
    /// All of them.
    All,
}

type Run = fn(&Bench) -> Result<Report>;

impl Experiment {
    fn list(self) -> Vec<Run> {
        match self {
            Self::Nbd => vec![experiment::nbd::run],
            Self::Mirror => vec![experiment::mirror::run],
            Self::FirstSync => vec![experiment::first_sync::run],
            Self::Wire => vec![experiment::wire::run],
            Self::Failover => vec![experiment::failover::run, experiment::points::run],
            Self::ForkReads => vec![experiment::fork_reads::run],
            Self::Memory => vec![experiment::memory::run],
            Self::DirtyLog => vec![experiment::dirty_log::run],
            Self::Restart => vec![experiment::restart::run],
            Self::Compare => vec![experiment::compare::run],
            Self::Retention => vec![experiment::retention::run],
            Self::Link => vec![experiment::link::run],
            Self::Drill => vec![experiment::drill::run],
            Self::All => [
                Self::Nbd,
                Self::Mirror,
                Self::FirstSync,
                Self::Wire,
                Self::Failover,
                Self::ForkReads,
                Self::Memory,
                Self::DirtyLog,
                Self::Restart,
                Self::Compare,
                Self::Retention,
                Self::Link,
                Self::Drill,
            ]
            .into_iter()
            .flat_map(Self::list)
            .collect(),
        }
    }
}

/// Whether every bound was kept. An experiment that cannot be run does not keep the others from running, but is an error.
fn run(cli: Cli) -> Result<bool> {
    os::install_stop_handler()?;
    let runs = cli.experiment.list();
    let (mut passed, mut failed) = (true, 0);
    for run in &runs {
        match one(*run, &cli.options) {
            Ok(kept) => passed &= kept,
            Err(error) if runs.len() == 1 => return Err(error),
            Err(error) => {
                os::check_stop()?;
                eprintln!("bench: {error:#}");
                failed += 1;
            }
        }
    }
    if failed > 0 {
        bail!("{failed} of {} experiments gave no figures, see above", runs.len());
    }
    if runs.len() > 1 {
        println!("\n{}", if passed { "PASS: every bound is kept" } else { "FAIL: not every bound is kept, see above" });
    }
    Ok(passed)
}

fn one(run: Run, options: &Options) -> Result<bool> {
    let bench = Bench::new(options)?;
    run(&bench)?.finish(&bench)
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::from(2)
        }
    }
}
