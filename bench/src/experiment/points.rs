//! From `twinsite failover` to the first write acknowledged by the copy of a 1 TiB disk whose journal has 200,000 points: the newest, and
//! older ones.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::json;

use super::failover::DISK_BYTES;
use crate::chart::{Bar, Chart, Panel};
use crate::child::Daemon;
use crate::context::Bench;
use crate::nbd_client::NbdClient;
use crate::node::{self, DISK, Primary, Receiver};
use crate::report::{Check, Report, Table, whole};
use crate::stats::{median, range};
use crate::{disk, journal, os};

const POINTS: u64 = 200_000;
const BLOCK: usize = 4096;
const BLOCKS: u64 = DISK_BYTES / BLOCK as u64;
const SETTLE_MAX: Duration = Duration::from_secs(300);
const ANSWER_MAX: Duration = Duration::from_secs(120);
/// Where the first write goes: not at either end.
const WRITE_AT: u64 = DISK_BYTES / 3 / BLOCK as u64 * BLOCK as u64;

/// Which point: its title, how much of the journal lies before it, and the bound.
const CHOICES: [(&str, f64, f64); 3] = [("the newest", 1.0, 500.0), ("a late one", 0.98, 2000.0), ("a middle one", 0.5, 2000.0)];

#[derive(Debug, Serialize)]
struct Sample {
    point: &'static str,
    /// From the start of the command to the first write acknowledged.
    first_write_ms: f64,
    /// From the start of the receiver's process to its control socket answering.
    receiver_start_ms: f64,
}

pub(crate) fn run(bench: &Bench) -> Result<Report> {
    let rounds = bench.rounds(1, 3);
    let name = bench.fresh("n");
    let file = bench.path(&format!("{name}.raw"));
    disk::sparse(&file, DISK_BYTES)?;
    let (mut receiver, primary) = node::pair_of_one(bench, &name, &file, "1s")?;
    // All points are to be there.
    receiver.keep("[\"all for 365d\"]")?;
    let receiving = receiver.start(bench)?;
    let mut daemon = primary.start(bench)?;
    primary.settle(&mut daemon, SETTLE_MAX)?;
    let newest = primary.newest_epoch()?;
    daemon.stop()?;
    receiving.stop()?;
    eprintln!("failover-points: {POINTS} points are made");
    let folder = receiver.group_folder(&primary);
    journal::extend(&folder.join("journal"), newest, POINTS, BLOCKS)?;
    let mut samples = Vec::new();
    for round in 0..rounds {
        for (title, share, _) in CHOICES {
            eprintln!("failover-points: round {} of {rounds}, {title}", round + 1);
            let epoch = newest + (POINTS as f64 * share) as u64;
            samples.push(once(bench, &receiver, &primary, (title, epoch, newest + POINTS))?);
        }
    }
    Ok(report(&samples, rounds))
}

fn once(
    bench: &Bench,
    receiver: &Receiver,
    primary: &Primary,
    (point, epoch, newest): (&'static str, u64, u64),
) -> Result<Sample> {
    let name = bench.fresh("t");
    let twin = receiver.twin(bench, &name)?;
    bench.sync()?;
    let start = Instant::now();
    let mut daemon = twin.start(bench)?;
    let receiver_start_ms = ms(start);
    let socket = bench.path(&format!("{name}.sock"));
    let wanted = (epoch != newest).then(|| format!("1.{epoch}"));
    let start = Instant::now();
    let command = Daemon::spawn(bench, "failover", twin.failover_to(primary, &socket, wanted.as_deref()))?;
    loop {
        let written = NbdClient::connect(&socket, DISK).and_then(|mut c| c.write(WRITE_AT, &[5; BLOCK]));
        match written {
            Ok(()) => break,
            Err(_) if start.elapsed() < ANSWER_MAX => {}
            Err(error) => return Err(error.context(format!("no answer from the copy: {}", command.last_line()))),
        }
        os::check_stop()?;
        daemon.check_alive()?;
        thread::sleep(Duration::from_millis(1));
    }
    let first_write_ms = ms(start);
    command.finish(ANSWER_MAX)?;
    check(&socket, epoch, newest)?;
    daemon.stop()?;
    let _ = std::fs::remove_dir_all(twin.store());
    Ok(Sample { point, first_write_ms, receiver_start_ms })
}

/// The copy has what its point's epoch wrote, and nothing of the next one.
fn check(socket: &Path, epoch: u64, newest: u64) -> Result<()> {
    let mut client = NbdClient::connect(socket, DISK)?;
    let mut found = vec![0; BLOCK];
    for (of, is_there) in [(epoch, true), (epoch + 1, false)] {
        let block = *journal::blocks_of(of, BLOCKS).first().context("an epoch without blocks")?;
        client.read(block * BLOCK as u64, &mut found)?;
        if (of <= newest) && (found == journal::content_of(of, block)) != is_there {
            bail!("point 1.{epoch}: block {block} of epoch {of} is not as it should be");
        }
    }
    Ok(())
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn report(samples: &[Sample], rounds: u32) -> Report {
    let head = ["point", "first write ms", "lowest..highest", "receiver's start ms"];
    let mut table = Table::new("from the command to the first write acknowledged (median)", &head);
    let (mut bars, mut checks) = (Vec::new(), Vec::new());
    for (title, share, bound) in CHOICES {
        let of = |pick: fn(&Sample) -> f64| samples.iter().filter(|s| s.point == title).map(pick).collect::<Vec<_>>();
        let first = of(|s| s.first_write_ms);
        let (low, high) = range(&first);
        let label = format!("{title} ({:.0} %)", share * 100.0);
        table.row(vec![
            label.clone(),
            whole(median(&first)),
            format!("{}..{}", whole(low), whole(high)),
            whole(median(&of(|s| s.receiver_start_ms))),
        ]);
        let worst = if first.is_empty() { f64::NAN } else { high };
        checks.push(Check::at_most(format!("first write, {title} of {POINTS} points, slowest round"), worst, bound, "ms"));
        bars.push(Bar { label, value: median(&first), ours: true });
    }
    Report {
        name: "failover-points",
        title: format!("a 1 TiB disk with {POINTS} points activated from its copy"),
        parameters: json!({ "rounds": rounds, "points": POINTS, "blocks_an_epoch": journal::EPOCH_BLOCKS, "disk_bytes": DISK_BYTES }),
        results: json!(samples),
        tables: vec![table],
        checks,
        chart: Chart {
            title: format!("Failover with {POINTS} points"),
            panels: vec![Panel {
                title: "From the command to the first write acknowledged".to_owned(),
                axis: format!("ms (median of {rounds} rounds)"),
                bars,
                bound: Some(2000.0),
            }],
        },
        tools: Vec::new(),
    }
}
