//! From `twinsite failover` to the first block read from, and the first one written to, the copy of a 1 TiB disk.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde::Serialize;
use serde_json::json;

use crate::chart::{Bar, Chart, Panel};
use crate::child::Daemon;
use crate::context::Bench;
use crate::fio::{self, Load, Span};
use crate::nbd_client::NbdClient;
use crate::node::{self, DISK};
use crate::report::{Check, Report, Table, whole};
use crate::stats::{median, range};
use crate::{disk, os, tools};

pub(crate) const DISK_BYTES: u64 = 1 << 40;
/// 4 KiB writes anywhere on the disk. Without a map of the blocks done: fio would need a bit for each of 2^28 blocks.
pub(crate) const SCATTERED: Load = Load {
    title: "4 KiB random write over 1 TiB, depth 32",
    rw: "randwrite",
    bs: "4k",
    iodepth: 32,
    bandwidth: false,
    more: &["--norandommap", "--random_generator=tausworthe64"],
};
const SETTLE_MAX: Duration = Duration::from_secs(300);
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// Where the block is that proves that the copy is the copy: not at either end.
const MARK_AT: u64 = DISK_BYTES / 3 / 4096 * 4096;
const BLOCK: usize = 4096;

#[derive(Debug, Serialize)]
struct Sample {
    restarted: bool,
    /// From the start of the command to the first block read.
    first_read_ms: f64,
    /// From the start of the command to the first write acknowledged; the read is before it.
    first_write_ms: f64,
    /// From the start of the command to its end.
    command_ms: f64,
    /// From the start of the receiver's process to its control socket answering; only if it was restarted.
    receiver_start_ms: Option<f64>,
}

pub(crate) fn run(bench: &Bench) -> Result<Report> {
    let needed = vec![tools::FIO];
    tools::require(&needed)?;
    let (rounds, seconds) = (bench.rounds(2, 5), bench.seconds(1, 2));
    let mut samples = Vec::new();
    for round in 0..rounds {
        for restarted in [false, true] {
            let how = if restarted { ", receiver restarted" } else { "" };
            eprintln!("failover: round {} of {rounds}{how}", round + 1);
            samples.push(once(bench, restarted, seconds)?);
        }
    }
    Ok(report(&samples, rounds, seconds, needed))
}

fn once(bench: &Bench, restarted: bool, seconds: u32) -> Result<Sample> {
    let name = bench.fresh("f");
    let file = bench.path(&format!("{name}.raw"));
    disk::sparse(&file, DISK_BYTES)?;
    let (receiver, primary) = node::pair_of_one(bench, &name, &file, "1s")?;
    let mut receiving = receiver.start(bench)?;
    let mut daemon = primary.start(bench)?;
    primary.settle(&mut daemon, SETTLE_MAX)?;
    fio::run(bench, &primary.socket(), &SCATTERED, Span { seconds, seed: 1 })?;
    let mark: Vec<u8> = name.bytes().cycle().take(BLOCK).collect();
    let mut client = NbdClient::connect(&primary.socket(), DISK)?;
    client.write(MARK_AT, &mark)?;
    primary.settle(&mut daemon, SETTLE_MAX)?;
    daemon.kill()?;
    let receiver_start_ms = if restarted {
        receiving.stop()?;
        let start = Instant::now();
        receiving = receiver.start(bench)?;
        Some(ms(start))
    } else {
        None
    };
    let socket = bench.path(&format!("{name}.sock"));
    let start = Instant::now();
    let command = Daemon::spawn(bench, "failover", receiver.failover(&primary, &socket))?;
    let mut block = vec![0; BLOCK];
    let mut copy = loop {
        let read = NbdClient::connect(&socket, DISK).and_then(|mut c| c.read(MARK_AT, &mut block).map(|()| c));
        match read {
            Ok(connected) => break connected,
            Err(_) if start.elapsed() < ANSWER_MAX => {}
            Err(error) => return Err(error.context(format!("no answer from the copy: {}", command.last_line()))),
        }
        os::check_stop()?;
        receiving.check_alive()?;
        thread::sleep(Duration::from_millis(1));
    };
    let first_read_ms = ms(start);
    copy.write(MARK_AT + BLOCK as u64, &mark)?;
    let first_write_ms = ms(start);
    if block != mark {
        bail!("the copy answers with other data than was written and committed at offset {MARK_AT}");
    }
    command.finish(ANSWER_MAX)?;
    let command_ms = ms(start);
    receiving.stop()?;
    // Scattered blocks take space.
    let _ = std::fs::remove_file(&file);
    let _ = std::fs::remove_dir_all(receiver.store());
    Ok(Sample { restarted, first_read_ms, first_write_ms, command_ms, receiver_start_ms })
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn report(samples: &[Sample], rounds: u32, seconds: u32, tools: Vec<tools::Tool>) -> Report {
    let head = ["receiver", "first read ms", "lowest..highest", "first write ms", "command ms", "receiver's start ms"];
    let mut table = Table::new("from the command to the first block read (median)", &head);
    let (mut bars, mut checks) = (Vec::new(), Vec::new());
    for (restarted, title) in [(false, "running"), (true, "restarted")] {
        let of = |pick: fn(&Sample) -> f64| samples.iter().filter(|s| s.restarted == restarted).map(pick).collect::<Vec<_>>();
        let first = of(|s| s.first_read_ms);
        let (low, high) = range(&first);
        let started = if restarted { whole(median(&of(|s| s.receiver_start_ms.unwrap_or_default()))) } else { "-".to_owned() };
        table.row(vec![
            title.to_owned(),
            whole(median(&first)),
            format!("{}..{}", whole(low), whole(high)),
            whole(median(&of(|s| s.first_write_ms))),
            whole(median(&of(|s| s.command_ms))),
            started,
        ]);
        let worst = if first.is_empty() { f64::NAN } else { high };
        checks.push(Check::at_most(format!("first read of a 1 TiB disk, receiver {title}, slowest round"), worst, 1000.0, "ms"));
        let written = of(|s| s.first_write_ms);
        let worst = if written.is_empty() { f64::NAN } else { range(&written).1 };
        checks.push(Check::at_most(format!("first write to a 1 TiB disk, receiver {title}, slowest round"), worst, 500.0, "ms"));
        bars.push(Bar { label: format!("receiver {title}"), value: median(&first), ours: true });
    }
    Report {
        name: "failover",
        title: "a 1 TiB disk activated from its copy after the primary was killed".to_owned(),
        parameters: json!({ "rounds": rounds, "seconds_of_writes": seconds, "disk_bytes": DISK_BYTES }),
        results: json!(samples),
        tables: vec![table],
        checks,
        chart: Chart {
            title: "Failover of a 1 TiB disk".to_owned(),
            panels: vec![Panel {
                title: "From the command to the first block read".to_owned(),
                axis: format!("ms (median of {rounds} rounds)"),
                bars,
                bound: Some(1000.0),
            }],
        },
        tools,
    }
}
