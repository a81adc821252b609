//! Our NBD export against the peers' on one raw file, in one run, in rounds whose order rotates.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use serde_json::json;

use crate::chart::{Bar, Chart, Panel};
use crate::child::Daemon;
use crate::context::{Bench, NBD_EXPORT};
use crate::fio::{self, Load, Outcome, Span};
use crate::node::{self, Primary};
use crate::peers::Server;
use crate::report::{Check, Report, Table, whole};
use crate::stats::{median, range, ratio};
use crate::{disk, tools};

/// The five jobs of the project's bound.
pub(crate) const LOADS: [Load; 5] = [
    Load { title: "4 KiB random write, depth 1", rw: "randwrite", bs: "4k", iodepth: 1, bandwidth: false, more: &[] },
    Load { title: "4 KiB random write, depth 32", rw: "randwrite", bs: "4k", iodepth: 32, bandwidth: false, more: &[] },
    Load { title: "4 KiB random read, depth 32", rw: "randread", bs: "4k", iodepth: 32, bandwidth: false, more: &[] },
    Load { title: "1 MiB sequential write, depth 8", rw: "write", bs: "1m", iodepth: 8, bandwidth: true, more: &[] },
    Load { title: "1 MiB sequential read, depth 8", rw: "read", bs: "1m", iodepth: 8, bandwidth: true, more: &[] },
];

const SYNC_MAX: Duration = Duration::from_secs(600);

/// One measurement.
#[derive(Clone, Copy, Debug, Serialize)]
struct Sample {
    figure: f64,
    p99_us: f64,
    cpu_s_per_gib: f64,
}

/// All measurements of one server under one load.
#[derive(Debug, Serialize)]
struct Series {
    load: &'static str,
    unit: &'static str,
    server: &'static str,
    ours: bool,
    median: f64,
    p99_us: f64,
    cpu_s_per_gib: f64,
    rounds: Vec<Sample>,
}

impl Series {
    fn new(load: &Load, contender: &Contender, rounds: Vec<Sample>) -> Self {
        let of = |pick: fn(&Sample) -> f64| median(&rounds.iter().map(pick).collect::<Vec<_>>());
        Self {
            load: load.title,
            unit: load.unit(),
            server: contender.title(),
            ours: contender.is_ours(),
            median: of(|s| s.figure),
            p99_us: of(|s| s.p99_us),
            cpu_s_per_gib: of(|s| s.cpu_s_per_gib),
            rounds,
        }
    }
}

/// A server in the comparison.
enum Contender {
    /// Started for each measurement, on the one file: an image has one user at a time.
    OnFile(Server),
    /// The product: a group that follows, whose next epoch ends long after the experiment. The tap is in the path and nothing is
    /// replicated. It has a file of its own, made alike, because a node that stops and starts would have to sync again.
    Group { primary: Primary, daemon: Daemon },
}

impl Contender {
    fn title(&self) -> &'static str {
        match self {
            Self::OnFile(server) => server.title(),
            Self::Group { .. } => "twinsite group (tap)",
        }
    }

    fn is_ours(&self) -> bool {
        match self {
            Self::OnFile(server) => server.is_ours(),
            Self::Group { .. } => true,
        }
    }

    fn measure(&self, bench: &Bench, file: &Path, load: &Load, span: Span) -> Result<Sample> {
        bench.sync()?;
        match self {
            Self::OnFile(server) => {
                let socket = bench.path("nbd.sock");
                let daemon = server.start(bench, file, &socket)?;
                let sample = loaded(bench, &daemon, &socket, load, span)?;
                daemon.stop()?;
                Ok(sample)
            }
            Self::Group { primary, daemon } => loaded(bench, daemon, &primary.socket(), load, span),
        }
    }
}

pub(crate) fn run(bench: &Bench) -> Result<Report> {
    let peers = [Server::QemuStorageDaemon, Server::QemuStorageDaemonUring, Server::QemuNbd, Server::Nbdkit];
    let mut needed: Vec<_> = peers.iter().filter_map(Server::tool).collect();
    needed.push(tools::FIO);
    tools::require(&needed)?;
    let (rounds, seconds) = (bench.rounds(2, 5), bench.seconds(2, 4));
    let size = bench.bytes(512 << 20, 1 << 30);
    let (file, twin) = (bench.path("disk.raw"), bench.path("twin.raw"));
    disk::filled(&file, size)?;
    disk::filled(&twin, size)?;
    let (receiver, primary) = node::pair_of_one(bench, "n", &twin, "1d")?;
    let _receiver = receiver.start(bench)?;
    let mut daemon = primary.start(bench)?;
    primary.settle(&mut daemon, SYNC_MAX)?;
    let mut contenders = vec![Contender::OnFile(Server::Ours(bench.binary(&NBD_EXPORT)?)), Contender::Group { primary, daemon }];
    contenders.extend(peers.map(Contender::OnFile));
    eprintln!("nbd: {} measurements of {seconds} s", LOADS.len() * contenders.len() * rounds as usize);
    let mut samples: Vec<Vec<Vec<Sample>>> = vec![vec![Vec::new(); contenders.len()]; LOADS.len()];
    for round in 0..rounds as usize {
        for (load, of_load) in LOADS.iter().zip(&mut samples) {
            eprintln!("nbd: round {} of {rounds}: {}", round + 1, load.title);
            for turn in 0..contenders.len() {
                let at = (turn + round) % contenders.len();
                if let (Some(contender), Some(samples)) = (contenders.get(at), of_load.get_mut(at)) {
                    samples.push(contender.measure(bench, &file, load, Span { seconds, seed: round + 1 })?);
                }
            }
        }
    }
    let series: Vec<Vec<Series>> = LOADS
        .iter()
        .zip(samples)
        .map(|(load, of_load)| {
            contenders.iter().zip(of_load).map(|(contender, rounds)| Series::new(load, contender, rounds)).collect()
        })
        .collect();
    Ok(report(&series, rounds, seconds, size, needed))
}

/// Warms up, then measures.
fn loaded(bench: &Bench, daemon: &Daemon, socket: &Path, load: &Load, span: Span) -> Result<Sample> {
    fio::warm_up(bench, socket, load, span)?;
    let before = daemon.cpu()?;
    let outcome = fio::run(bench, socket, load, span)?;
    let cpu = daemon.cpu()?.saturating_sub(before);
    Ok(sample(load, &outcome, cpu.as_secs_f64()))
}

fn sample(load: &Load, outcome: &Outcome, cpu_s: f64) -> Sample {
    let gib = outcome.bytes / f64::from(1 << 30);
    Sample { figure: outcome.figure(load), p99_us: outcome.p99_us, cpu_s_per_gib: ratio(cpu_s, gib) }
}

fn report(series: &[Vec<Series>], rounds: u32, seconds: u32, size: u64, tools: Vec<tools::Tool>) -> Report {
    let (mut tables, mut checks, mut panels) = (Vec::new(), Vec::new(), Vec::new());
    for (load, of_load) in LOADS.iter().zip(series) {
        let best = of_load.iter().filter(|s| !s.ours).max_by(|a, b| a.median.total_cmp(&b.median));
        let best = best.map_or(f64::NAN, |s| s.median);
        let head = ["server", load.unit(), "of best peer", "lowest..highest", "p99 µs", "server CPU s/GiB"];
        let mut table = Table::new(load.title, &head);
        for s in of_load {
            let (low, high) = range(&s.rounds.iter().map(|r| r.figure).collect::<Vec<_>>());
            table.row(vec![
                s.server.to_owned(),
                whole(s.median),
                format!("{:.2}", ratio(s.median, best)),
                format!("{}..{}", whole(low), whole(high)),
                whole(s.p99_us),
                format!("{:.2}", s.cpu_s_per_gib),
            ]);
            if s.ours {
                checks.push(Check::at_least(format!("{}, {} / best peer", load.title, s.server), s.median / best, 1.0, "times"));
            }
        }
        tables.push(table);
        panels.push(Panel {
            title: load.title.to_owned(),
            axis: format!("{} (median of {rounds} rounds)", load.unit()),
            bars: of_load.iter().map(|s| Bar { label: s.server.to_owned(), value: s.median, ours: s.ours }).collect(),
            bound: Some(best),
        });
    }
    Report {
        name: "nbd",
        title: "NBD servers on a raw file, page cache on".to_owned(),
        parameters: json!({
            "rounds": rounds, "seconds": seconds, "warm_up_seconds": fio::WARM_UP_S, "disk_bytes": size,
            "client": "fio, one connection over a unix socket",
        }),
        results: json!(series.iter().flatten().collect::<Vec<_>>()),
        tables,
        checks,
        chart: Chart { title: "NBD export of a raw file".to_owned(), panels },
        tools,
    }
}
