//! What two drills cost the replication that goes on beside them, and how fast a fresh one is read.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::json;

use crate::chart::{Bar, Chart, Panel};
use crate::child::{self, Daemon};
use crate::context::Bench;
use crate::fio::{self, Load, Span};
use crate::node::{self, Primary, Receiver};
use crate::report::{Check, Report, Table, whole};
use crate::stats::{median, percentile, range, ratio};
use crate::{disk, tools};

/// The guest's: a rate that epochs keep up with, so that a lag that grows is the drills'.
const GUEST: Load = Load {
    title: "4 KiB random write, depth 8, 2,000 a second",
    rw: "randwrite",
    bs: "4k",
    iodepth: 8,
    bandwidth: false,
    more: &["--rate_iops=2000", "--refill_buffers"],
};
/// Each drill's: half reads, half writes, at a rate of its own.
const DRILLED: Load = Load {
    title: "4 KiB random read and write, depth 8, 1,000 a second of each",
    rw: "randrw",
    bs: "4k",
    iodepth: 8,
    bandwidth: false,
    more: &["--rate_iops=1000,1000", "--refill_buffers"],
};
const READS: [Load; 2] = [
    Load { title: "4 KiB random read, depth 32", rw: "randread", bs: "4k", iodepth: 32, bandwidth: false, more: &[] },
    Load { title: "1 MiB sequential read, depth 4", rw: "read", bs: "1M", iodepth: 4, bandwidth: true, more: &[] },
];
const INTERVALS: [&str; 2] = ["1s", "100ms"];
const SYNC_MAX: Duration = Duration::from_secs(600);
const COMMAND_MAX: Duration = Duration::from_secs(60);
const SAMPLE: Duration = Duration::from_millis(10);

#[derive(Clone, Copy, Debug, Serialize)]
struct Lag {
    interval: &'static str,
    drills: usize,
    p99_ms: f64,
    max_ms: f64,
    guest_iops: f64,
    guest_p99_us: f64,
    epochs: u64,
}

#[derive(Clone, Debug, Serialize)]
struct Reading {
    load: &'static str,
    source: &'static str,
    figure: f64,
    rounds: Vec<f64>,
}

const RAW: &str = "raw file, exported";
const FRESH: &str = "fresh drill, all of it in the journal";
/// As it is once the first copy was folded into the base: only what the guest wrote since is in the journal.
const FRESH_OF_BASE: &str = "fresh drill, first copy in the base";

pub(crate) fn run(bench: &Bench) -> Result<Report> {
    let needed = vec![tools::FIO];
    tools::require(&needed)?;
    let (rounds, seconds) = (bench.rounds(2, 5), bench.seconds(4, 15));
    let size = bench.bytes(256 << 20, 1 << 30);
    let file = bench.path("disk.raw");
    disk::fill(&file, size, disk::Content::Half)?;
    let (receiver, primary) = node::pair_of_one(bench, "d", &file, INTERVALS[0])?;
    let receiving = receiver.start(bench)?;
    let mut lags = Vec::new();
    for interval in INTERVALS {
        primary.configure(interval)?;
        let mut daemon = primary.start(bench)?;
        for round in 0..rounds as usize {
            // In turns, beginning with another each round: neither has the quieter half of the time.
            for turn in 0..2 {
                let drills = if (turn + round) % 2 == 0 { 0 } else { 2 };
                eprintln!("drill: {interval} epochs, round {} of {rounds}, {drills} drills", round + 1);
                let span = Span { seconds, seed: round + 1 };
                lags.push(Lag { interval, ..lag(bench, (&receiver, &primary), &mut daemon, drills, span)? });
            }
        }
        daemon.stop()?;
    }
    let mut daemon = primary.start(bench)?;
    primary.settle(&mut daemon, SYNC_MAX)?;
    let mut readings = Vec::new();
    for load in &READS {
        readings.extend(read(bench, (&receiver, &primary), (load, FRESH), rounds, seconds)?);
    }
    daemon.stop()?;
    drop(receiving);
    let (receiver, primary) = node::pair_of_one(bench, "b", &file, INTERVALS[0])?;
    let _receiving = receiver.start(bench)?;
    child::run(bench, "adopt", receiver.adopt(&primary, &file), SYNC_MAX)?;
    let mut daemon = primary.start(bench)?;
    primary.settle(&mut daemon, SYNC_MAX)?;
    fio::run(bench, &primary.socket(), &GUEST, Span { seconds, seed: 1 })?;
    primary.settle(&mut daemon, SYNC_MAX)?;
    for load in &READS {
        let [_, fresh] = read(bench, (&receiver, &primary), (load, FRESH_OF_BASE), rounds, seconds)?;
        readings.push(fresh);
    }
    daemon.stop()?;
    let parameters = json!({ "rounds": rounds, "seconds": seconds, "disk_bytes": size, "content": disk::Content::Half.title(),
        "guest": GUEST.title, "each_drill": DRILLED.title });
    Ok(report(&lags, &readings, rounds, parameters, needed))
}

/// A drill of the newest point, served at a socket.
struct Drill<'a> {
    bench: &'a Bench,
    receiver: &'a Receiver,
    name: String,
    socket: PathBuf,
}

impl<'a> Drill<'a> {
    fn begin(bench: &'a Bench, receiver: &'a Receiver, primary: &Primary) -> Result<Self> {
        let name = bench.fresh("drill-");
        let socket = bench.path(&format!("{name}.sock"));
        child::run(bench, "drill", receiver.drill(primary, &name, &socket), COMMAND_MAX)?;
        Ok(Self { bench, receiver, name, socket })
    }

    fn end(self) -> Result<()> {
        child::run(self.bench, "drill-end", self.receiver.end_drill(&self.name), COMMAND_MAX).map(drop)
    }
}

/// The lag under the guest's load, with so many drills under theirs.
fn lag(bench: &Bench, (receiver, primary): (&Receiver, &Primary), daemon: &mut Daemon, drills: usize, span: Span) -> Result<Lag> {
    primary.settle(daemon, SYNC_MAX)?;
    bench.sync()?;
    let drills = (0..drills).map(|_| Drill::begin(bench, receiver, primary)).collect::<Result<Vec<_>>>()?;
    let longer = Span { seconds: span.seconds + 2 * fio::WARM_UP_S + 2, seed: span.seed + 100 };
    let mut loads = drills.iter().map(|drill| fio::start(bench, &drill.socket, &DRILLED, longer)).collect::<Result<Vec<_>>>()?;
    fio::warm_up(bench, &primary.socket(), &GUEST, span)?;
    let before = primary.status()?.epochs_committed;
    let (mut lags, mut next) = (Vec::new(), Instant::now());
    let outcome = fio::run_watched(bench, &primary.socket(), &GUEST, span, &mut || {
        if Instant::now() >= next {
            lags.push(primary.status()?.lag_ms as f64);
            next = Instant::now() + SAMPLE;
        }
        Ok(())
    })?;
    let epochs = primary.status()?.epochs_committed.saturating_sub(before);
    for load in &mut loads {
        load.check_alive().context("a drill's load did not last as long as the guest's")?;
    }
    for load in loads {
        load.kill()?;
    }
    let count = drills.len();
    drills.into_iter().try_for_each(Drill::end)?;
    let (_, max_ms) = range(&lags);
    Ok(Lag {
        interval: "",
        drills: count,
        p99_ms: percentile(&lags, 99.0),
        max_ms,
        guest_iops: outcome.iops,
        guest_p99_us: outcome.p99_us,
        epochs,
    })
}

/// The raw file behind the primary's export, and a drill that nobody has read before, in turns.
fn read(
    bench: &Bench,
    (receiver, primary): (&Receiver, &Primary),
    (load, source): (&Load, &'static str),
    rounds: u32,
    seconds: u32,
) -> Result<[Reading; 2]> {
    let (mut raw, mut fresh) = (Vec::new(), Vec::new());
    for round in 0..rounds as usize {
        eprintln!("drill: {}, round {} of {rounds}", load.title, round + 1);
        let span = Span { seconds, seed: round + 1 };
        let of = |socket: &Path| Ok::<_, anyhow::Error>(fio::run(bench, socket, load, span)?.figure(load));
        raw.push(of(&primary.socket())?);
        let drill = Drill::begin(bench, receiver, primary)?;
        fresh.push(of(&drill.socket)?);
        drill.end()?;
    }
    let reading = |source, rounds: Vec<f64>| Reading { load: load.title, source, figure: median(&rounds), rounds };
    if raw.is_empty() {
        bail!("no rounds");
    }
    Ok([reading(RAW, raw), reading(source, fresh)])
}

fn report(lags: &[Lag], readings: &[Reading], rounds: u32, parameters: serde_json::Value, tools: Vec<tools::Tool>) -> Report {
    let (mut checks, mut panels) = (Vec::new(), Vec::new());
    let head = ["epochs of", "drills", "lag p99 ms", "lowest..highest", "largest ms", "guest IOPS", "guest p99 µs", "epochs"];
    let mut lag_table = Table::new(format!("lag of the guest: {}; each drill: {}", GUEST.title, DRILLED.title), &head);
    for interval in INTERVALS {
        let mut p99 = Vec::new();
        let mut bars = Vec::new();
        for drills in [0, 2] {
            let of: Vec<&Lag> = lags.iter().filter(|l| l.interval == interval && l.drills == drills).collect();
            let all = |pick: fn(&Lag) -> f64| of.iter().map(|l| pick(l)).collect::<Vec<f64>>();
            let lag = median(&all(|l| l.p99_ms));
            let (low, high) = range(&all(|l| l.p99_ms));
            lag_table.row(vec![
                interval.to_owned(),
                drills.to_string(),
                whole(lag),
                format!("{}..{}", whole(low), whole(high)),
                whole(range(&all(|l| l.max_ms)).1),
                whole(median(&all(|l| l.guest_iops))),
                whole(median(&all(|l| l.guest_p99_us))),
                whole(median(&all(|l| l.epochs as f64))),
            ]);
            p99.push(lag);
            bars.push(Bar { label: format!("{drills} drills"), value: lag, ours: true });
        }
        let (without, with) = (p99.first().copied().unwrap_or(f64::NAN), p99.last().copied().unwrap_or(f64::NAN));
        checks.push(Check::at_most(
            format!("lag p99 with two drills / without, {interval} epochs"),
            with / without,
            1.2,
            "times",
        ));
        panels.push(Panel {
            title: format!("Lag, 99th percentile, {interval} epochs"),
            axis: format!("ms (median of {rounds} rounds)"),
            bars,
            bound: Some(1.2 * without),
        });
    }
    let mut tables = vec![lag_table];
    for load in &READS {
        let of: Vec<&Reading> = readings.iter().filter(|r| r.load == load.title).collect();
        let find = |source: &str| of.iter().find(|r| r.source == source).map_or(f64::NAN, |r| r.figure);
        let raw = find(RAW);
        let mut table = Table::new(load.title, &["source", load.unit(), "of the raw file", "lowest..highest"]);
        for r in &of {
            let (low, high) = range(&r.rounds);
            table.row(vec![
                r.source.to_owned(),
                whole(r.figure),
                format!("{:.2}", ratio(r.figure, raw)),
                format!("{}..{}", whole(low), whole(high)),
            ]);
        }
        tables.push(table);
        for source in [FRESH, FRESH_OF_BASE] {
            checks.push(Check::at_least(format!("{}: {source} / raw file", load.title), find(source) / raw, 0.6, "times"));
        }
        panels.push(Panel {
            title: load.title.to_owned(),
            axis: format!("{} (median of {rounds} rounds)", load.unit()),
            bars: of.iter().map(|r| Bar { label: r.source.to_owned(), value: r.figure, ours: r.source != RAW }).collect(),
            bound: Some(0.6 * raw),
        });
    }
    Report {
        name: "drill",
        title: "two drills beside replication, and reads of a fresh one".to_owned(),
        parameters,
        results: json!({ "lag": lags, "reads": readings }),
        tables,
        checks,
        chart: Chart { title: "Drills".to_owned(), panels },
        tools,
    }
}
