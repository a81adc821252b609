//! Our NBD export against the peers' on one raw file, in one run, in rounds whose order rotates.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;
use serde_json::json;

use crate::chart::{Bar, Chart, Panel};
use crate::context::{Bench, NBD_EXPORT};
use crate::fio::{self, Load, Outcome};
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
/// Seconds of load before each measurement that are not counted.
const WARM_UP_S: u32 = 1;

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
    fn new(load: &Load, server: &Server, rounds: Vec<Sample>) -> Self {
        let of = |pick: fn(&Sample) -> f64| median(&rounds.iter().map(pick).collect::<Vec<_>>());
        Self {
            load: load.title,
            unit: load.unit(),
            server: server.title(),
            ours: server.is_ours(),
            median: of(|s| s.figure),
            p99_us: of(|s| s.p99_us),
            cpu_s_per_gib: of(|s| s.cpu_s_per_gib),
            rounds,
        }
    }
}

pub(crate) fn run(bench: &Bench) -> Result<Report> {
    let servers = [
        Server::Ours(bench.binary(&NBD_EXPORT)?),
        Server::QemuStorageDaemon,
        Server::QemuStorageDaemonUring,
        Server::QemuNbd,
        Server::Nbdkit,
    ];
    let mut needed: Vec<_> = servers.iter().filter_map(Server::tool).collect();
    needed.push(tools::FIO);
    tools::require(&needed)?;
    let (rounds, seconds) = (bench.rounds(2, 5), bench.seconds(2, 4));
    let size = bench.bytes(512 << 20, 1 << 30);
    let file = bench.path("disk.raw");
    eprintln!("nbd: {} measurements of {seconds} s", LOADS.len() * servers.len() * rounds as usize);
    disk::filled(&file, size)?;
    let mut samples: Vec<Vec<Vec<Sample>>> = vec![vec![Vec::new(); servers.len()]; LOADS.len()];
    for round in 0..rounds as usize {
        for (load, of_load) in LOADS.iter().zip(&mut samples) {
            eprintln!("nbd: round {} of {rounds}: {}", round + 1, load.title);
            for turn in 0..servers.len() {
                let at = (turn + round) % servers.len();
                if let (Some(server), Some(of_server)) = (servers.get(at), of_load.get_mut(at)) {
                    of_server.push(measure(bench, server, &file, load, seconds)?);
                }
            }
        }
    }
    let series: Vec<Vec<Series>> = LOADS
        .iter()
        .zip(samples)
        .map(|(load, of_load)| servers.iter().zip(of_load).map(|(server, rounds)| Series::new(load, server, rounds)).collect())
        .collect();
    Ok(report(&series, rounds, seconds, size, needed))
}

/// Starts the server afresh (an image has one user at a time), warms up, measures, stops it.
fn measure(bench: &Bench, server: &Server, file: &Path, load: &Load, seconds: u32) -> Result<Sample> {
    bench.sync()?;
    let socket = bench.path("nbd.sock");
    let daemon = server.start(bench, file, &socket)?;
    fio::run(bench, &socket, load, WARM_UP_S)?;
    let before = daemon.cpu()?;
    let outcome = fio::run(bench, &socket, load, seconds)?;
    let cpu = daemon.cpu()?.saturating_sub(before);
    daemon.stop()?;
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
        title: "NBD servers on one raw file, page cache on".to_owned(),
        parameters: json!({
            "rounds": rounds, "seconds": seconds, "warm_up_seconds": WARM_UP_S, "disk_bytes": size,
            "client": "fio, one connection over a unix socket",
        }),
        results: json!(series.iter().flatten().collect::<Vec<_>>()),
        tables,
        checks,
        chart: Chart { title: "NBD export of a raw file".to_owned(), panels },
        tools,
    }
}
