//! The guest's random writes while the disk is being replicated, ours against qemu's `blockdev-mirror`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::json;

use crate::chart::{Bar, Chart, Panel};
use crate::child::Daemon;
use crate::context::Bench;
use crate::fio::{self, Load, Span};
use crate::node::{self, Primary, PrimarySpec};
use crate::peers::Server;
use crate::qemu_mirror::{QemuMirror, Target};
use crate::report::{Check, Report, Table, whole};
use crate::stats::{median, percentile, range, ratio};
use crate::{disk, tools};

/// Without it fio writes a buffer again and again with a few bytes changed, which compresses a little.
const MORE: &[&str] = &["--refill_buffers"];
const LOADS: [Load; 2] = [
    Load { title: "4 KiB random write, depth 32", rw: "randwrite", bs: "4k", iodepth: 32, bandwidth: false, more: MORE },
    Load { title: "4 KiB random write, depth 1", rw: "randwrite", bs: "4k", iodepth: 1, bandwidth: false, more: MORE },
];
/// Long enough that no epoch ends while it is measured: the tap is in the path, nothing is replicated.
const NEVER: &str = "1d";
const SYNC_MAX: Duration = Duration::from_secs(600);
const SAMPLE: Duration = Duration::from_millis(50);
const OURS_UNMIRRORED: &str = "twinsite unmirrored";
const OURS_MIRRORED: &str = "twinsite, 1 s epochs";
const QEMU_UNMIRRORED: &str = "qemu unmirrored";

/// A server under load.
#[derive(Debug)]
enum Contender {
    Ours { title: &'static str, primary: Primary, daemon: Daemon },
    Qemu { daemon: Daemon, socket: std::path::PathBuf },
    QemuMirror { target: Target, mirror: Box<QemuMirror> },
}

/// One measurement. What a contender does not have is 0.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Sample {
    iops: f64,
    p99_us: f64,
    server_cpu_s: f64,
    lag_p99_ms: f64,
    wire_mb_per_s: f64,
    epochs_committed: u64,
    /// Written and not at the copy when the load ended.
    behind_mib: f64,
    /// From the end of the load until nothing was left.
    catch_up_s: f64,
}

#[derive(Debug, Serialize)]
struct Series {
    load: &'static str,
    server: &'static str,
    ours: bool,
    iops: f64,
    rounds: Vec<Sample>,
}

impl Contender {
    fn title(&self) -> &'static str {
        match self {
            Self::Ours { title, .. } => title,
            Self::Qemu { .. } => QEMU_UNMIRRORED,
            Self::QemuMirror { target, .. } => target.title(),
        }
    }

    fn replicates(&self) -> bool {
        match self {
            Self::Ours { title, .. } => *title == OURS_MIRRORED,
            Self::Qemu { .. } => false,
            Self::QemuMirror { .. } => true,
        }
    }

    fn settle(&mut self) -> Result<()> {
        match self {
            _ if !self.replicates() => Ok(()),
            Self::Ours { primary, daemon, .. } => primary.settle(daemon, SYNC_MAX),
            Self::QemuMirror { mirror, .. } => mirror.settle(SYNC_MAX),
            Self::Qemu { .. } => Ok(()),
        }
    }

    fn measure(&mut self, bench: &Bench, load: &Load, span: Span) -> Result<Sample> {
        self.settle()?;
        bench.sync()?;
        let mut sample = match self {
            Self::Ours { primary, daemon, .. } => ours(bench, primary, daemon, load, span)?,
            Self::Qemu { daemon, socket } => {
                fio::warm_up(bench, socket, load, span)?;
                let before = daemon.cpu()?;
                let outcome = fio::run(bench, socket, load, span)?;
                let server_cpu_s = (daemon.cpu()?.saturating_sub(before)).as_secs_f64();
                Sample { iops: outcome.iops, p99_us: outcome.p99_us, server_cpu_s, ..Sample::default() }
            }
            Self::QemuMirror { mirror, .. } => {
                fio::warm_up(bench, &mirror.socket, load, span)?;
                let before = mirror.source.cpu()?;
                let outcome = fio::run(bench, &mirror.socket, load, span)?;
                let behind_mib = mirror.progress()?.left as f64 / f64::from(1 << 20);
                let server_cpu_s = (mirror.source.cpu()?.saturating_sub(before)).as_secs_f64();
                Sample { iops: outcome.iops, p99_us: outcome.p99_us, server_cpu_s, behind_mib, ..Sample::default() }
            }
        };
        let ended = Instant::now();
        self.settle()?;
        if self.replicates() {
            sample.catch_up_s = ended.elapsed().as_secs_f64();
        }
        Ok(sample)
    }
}

fn ours(bench: &Bench, primary: &Primary, daemon: &Daemon, load: &Load, span: Span) -> Result<Sample> {
    let socket = primary.socket();
    fio::warm_up(bench, &socket, load, span)?;
    let (before, cpu_before, start) = (primary.status()?, daemon.cpu()?, Instant::now());
    let (mut lags, mut next) = (Vec::new(), Instant::now());
    let outcome = fio::run_watched(bench, &socket, load, span, &mut || {
        if Instant::now() >= next {
            lags.push(primary.status()?.lag_ms as f64);
            next = Instant::now() + SAMPLE;
        }
        Ok(())
    })?;
    let after = primary.status()?;
    let elapsed = start.elapsed().as_secs_f64();
    Ok(Sample {
        iops: outcome.iops,
        p99_us: outcome.p99_us,
        server_cpu_s: daemon.cpu()?.saturating_sub(cpu_before).as_secs_f64(),
        lag_p99_ms: percentile(&lags, 99.0),
        wire_mb_per_s: ratio(after.wire_bytes.saturating_sub(before.wire_bytes) as f64 / 1e6, elapsed),
        epochs_committed: after.epochs_committed.saturating_sub(before.epochs_committed),
        behind_mib: after.dirty_bytes as f64 / f64::from(1 << 20),
        catch_up_s: 0.0,
    })
}

pub(crate) fn run(bench: &Bench) -> Result<Report> {
    let needed = vec![tools::FIO, tools::QEMU_STORAGE_DAEMON];
    tools::require(&needed)?;
    let (rounds, seconds) = (bench.rounds(2, 5), bench.seconds(3, 8));
    let size = bench.bytes(512 << 20, 1 << 30);
    let disks: Vec<_> = ["a", "b", "c", "d", "e"].iter().map(|n| bench.path(&format!("{n}.raw"))).collect();
    eprintln!("mirror: preparing {} disks of {} MiB and their first copies", disks.len(), size >> 20);
    for path in &disks {
        disk::filled(path, size)?;
    }
    let [a, b, c, d, e] = disks.as_slice() else { anyhow::bail!("five disks are needed") };
    let specs = [PrimarySpec { name: "idle", disk: a, interval: NEVER }, PrimarySpec { name: "epochs", disk: b, interval: "1s" }];
    let (receiver, primaries) = node::pair(bench, "receiver", &specs)?;
    let _receiver = receiver.start(bench)?;
    let mut contenders = Vec::new();
    for (primary, title) in primaries.into_iter().zip([OURS_UNMIRRORED, OURS_MIRRORED]) {
        let mut daemon = primary.start(bench)?;
        primary.settle(&mut daemon, SYNC_MAX)?;
        contenders.push(Contender::Ours { title, primary, daemon });
    }
    let socket = bench.path("qemu.sock");
    contenders.push(Contender::Qemu { daemon: Server::QemuStorageDaemon.start(bench, c, &socket)?, socket });
    for (target, name, source) in [(Target::Nbd, "qemu-nbd", d), (Target::Raw, "qemu-raw", e)] {
        let mut mirror = QemuMirror::start(bench, name, source, &bench.path(&format!("{name}.copy")), target)?;
        mirror.mirror()?;
        mirror.settle(SYNC_MAX)?;
        contenders.push(Contender::QemuMirror { target, mirror: Box::new(mirror) });
    }
    let mut series: Vec<Series> = Vec::new();
    for load in &LOADS {
        let mut samples = vec![Vec::new(); contenders.len()];
        for round in 0..rounds as usize {
            eprintln!("mirror: {}, round {} of {rounds}", load.title, round + 1);
            for turn in 0..contenders.len() {
                let at = (turn + round) % contenders.len();
                if let (Some(contender), Some(samples)) = (contenders.get_mut(at), samples.get_mut(at)) {
                    let sample = contender
                        .measure(bench, load, Span { seconds, seed: round + 1 })
                        .with_context(|| contender.title().to_owned())?;
                    samples.push(sample);
                }
            }
        }
        for (contender, rounds) in contenders.iter().zip(samples) {
            series.push(Series {
                load: load.title,
                server: contender.title(),
                ours: matches!(contender, Contender::Ours { .. }),
                iops: median(&rounds.iter().map(|s: &Sample| s.iops).collect::<Vec<_>>()),
                rounds,
            });
        }
    }
    let parameters = json!({
        "rounds": rounds, "seconds": seconds, "warm_up_seconds": fio::WARM_UP_S, "disk_bytes": size,
        "interval": "1s", "interval_unmirrored": NEVER, "copy_mode": "background",
    });
    Ok(report(&series, rounds, parameters, needed))
}

fn report(series: &[Series], rounds: u32, parameters: serde_json::Value, tools: Vec<tools::Tool>) -> Report {
    let (mut tables, mut checks, mut panels) = (Vec::new(), Vec::new(), Vec::new());
    for load in &LOADS {
        let of_load: Vec<&Series> = series.iter().filter(|s| s.load == load.title).collect();
        let find = |title: &str| of_load.iter().find(|s| s.server == title).map_or(f64::NAN, |s| s.iops);
        let qemu = find(Target::Nbd.title());
        let (mirrored, alone) = (find(OURS_MIRRORED), find(OURS_UNMIRRORED));
        let head = [
            "server",
            "IOPS",
            "of own unmirrored",
            "twinsite mirrored / this",
            "lowest..highest",
            "p99 µs",
            "server CPU s",
            "lag p99 ms",
            "wire MB/s",
            "epochs",
            "behind MiB",
            "catch-up s",
        ];
        let mut table = Table::new(load.title, &head);
        for s in &of_load {
            let of = |pick: fn(&Sample) -> f64| median(&s.rounds.iter().map(pick).collect::<Vec<_>>());
            let (low, high) = range(&s.rounds.iter().map(|r| r.iops).collect::<Vec<_>>());
            let replicates = s.server == OURS_MIRRORED;
            let told = |has: bool, text: String| if has { text } else { "-".to_owned() };
            let mirrors = s.server != OURS_UNMIRRORED && s.server != QEMU_UNMIRRORED;
            let own = if s.ours { alone } else { find(QEMU_UNMIRRORED) };
            table.row(vec![
                s.server.to_owned(),
                whole(s.iops),
                format!("{:.2}", ratio(s.iops, own)),
                format!("{:.2}", ratio(mirrored, s.iops)),
                format!("{}..{}", whole(low), whole(high)),
                whole(of(|r| r.p99_us)),
                format!("{:.1}", of(|r| r.server_cpu_s)),
                told(replicates, whole(of(|r| r.lag_p99_ms))),
                told(replicates, whole(of(|r| r.wire_mb_per_s))),
                told(replicates, whole(of(|r| r.epochs_committed as f64))),
                told(mirrors, whole(of(|r| r.behind_mib))),
                told(mirrors, format!("{:.1}", of(|r| r.catch_up_s))),
            ]);
        }
        tables.push(table);
        if load.iodepth == 32 {
            checks.push(Check::at_least(
                format!("{}, mirrored: twinsite / qemu mirror to NBD", load.title),
                mirrored / qemu,
                3.0,
                "times",
            ));
            checks.push(Check::at_least(format!("{}: mirrored / unmirrored", load.title), mirrored / alone, 0.5, "times"));
        }
        let epochs =
            of_load.iter().filter(|s| s.server == OURS_MIRRORED).flat_map(|s| &s.rounds).map(|r| r.epochs_committed).min();
        let what = format!("{}: epochs committed in every mirrored run", load.title);
        checks.push(Check::at_least(what, epochs.map_or(f64::NAN, |e| e as f64), 1.0, "epochs"));
        panels.push(Panel {
            title: load.title.to_owned(),
            axis: format!("IOPS (median of {rounds} rounds)"),
            bars: of_load.iter().map(|s| Bar { label: s.server.to_owned(), value: s.iops, ours: s.ours }).collect(),
            bound: (load.iodepth == 32).then_some((3.0 * qemu).max(0.5 * alone)),
        });
    }
    Report {
        name: "mirror",
        title: "random writes of the guest while the disk is replicated on the same machine".to_owned(),
        parameters,
        results: json!(series),
        tables,
        checks,
        chart: Chart { title: "Random writes while mirroring".to_owned(), panels },
        tools,
    }
}
