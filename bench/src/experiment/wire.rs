//! PostgreSQL under pgbench at a fixed rate on a replicated disk: bytes on the wire against dirty bytes, what the receiver writes for them, and the lag.

use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::json;

use crate::block::Disk;
use crate::chart::{Bar, Chart, Panel};
use crate::child::Daemon;
use crate::context::Bench;
use crate::node::{self, Primary, Receiver};
use crate::postgres::Cluster;
use crate::report::{Check, Report, Table};
use crate::stats::{percentile, ratio};
use crate::{procfs, tools};

const SETTLE_MAX: Duration = Duration::from_secs(600);
/// Transactions a second.
const RATE: u32 = 400;
/// Less of the rate than this and the load was not the one promised.
const RATE_REACHED_PERCENT: f64 = 95.0;
/// Most bytes that the receiver may write to its disk for one that it receives.
const WRITTEN_MAX: f64 = 1.1;
/// PostgreSQL's own time between two checkpoints; no longer, so that a long run does not wait for half of its time.
const CYCLE_MAX_S: u32 = 300;

/// What is measured at one interval.
struct Phase {
    interval: &'static str,
    seconds: u32,
    lag_p99_max_ms: f64,
    /// Whether the saving is judged here: short epochs merge fewer writes.
    judge_saving: bool,
}

#[derive(Debug, Serialize)]
struct Figures {
    interval: &'static str,
    seconds: f64,
    tps: f64,
    dirty_bytes: u64,
    zero_bytes: u64,
    frame_bytes: u64,
    udp_bytes: u64,
    epochs: u64,
    epochs_merged: u64,
    copied_before_write: u64,
    received_bytes: u64,
    /// By the receiver's process, to its disk.
    written_bytes: u64,
    lag_samples: usize,
    lag_p50_ms: f64,
    lag_p99_ms: f64,
    lag_max_ms: f64,
}

impl Figures {
    /// Percent less than the dirty bytes.
    fn saved(&self, bytes: u64) -> f64 {
        100.0 * (1.0 - bytes as f64 / self.dirty_bytes as f64)
    }

    /// Bytes written at the receiver for each that it received.
    fn written(&self) -> f64 {
        ratio(self.written_bytes as f64, self.received_bytes as f64)
    }

    fn mbit_per_s(&self, bytes: u64) -> f64 {
        ratio(bytes as f64 * 8.0 / 1e6, self.seconds)
    }
}

impl Phase {
    /// Seconds of a checkpoint cycle: the window holds at least two whole ones, because a page that the load dirties is written twice, to
    /// the log at once and to its table by a checkpoint later, and a window without checkpoints would see the first half only.
    /// PostgreSQL takes no less than 30 s.
    fn cycle_s(&self) -> u32 {
        (self.seconds / 2).clamp(30, CYCLE_MAX_S)
    }
}

pub(crate) fn run(bench: &Bench) -> Result<Report> {
    let needed = vec![tools::NBDFUSE, tools::LOSETUP, tools::MKFS_EXT4, tools::POSTGRES, tools::PGBENCH];
    tools::require(&needed)?;
    let scale = if bench.quick { 10 } else { 50 };
    let seconds = bench.seconds(30, 120);
    let phases = [
        Phase { interval: "1s", seconds, lag_p99_max_ms: 1300.0, judge_saving: true },
        Phase { interval: "100ms", seconds: seconds.div_ceil(2), lag_p99_max_ms: 250.0, judge_saving: false },
    ];
    let size = 4_u64 << 30;
    let disk = bench.path("disk.raw");
    File::create(&disk).and_then(|f| f.set_len(size)).with_context(|| format!("{}: cannot be made", disk.display()))?;
    let (mut receiver, primary) = node::pair_of_one(bench, "w", &disk, "1s")?;
    // What is written is to be of commits alone.
    receiver.keep("[\"all for 365d\"]")?;
    let receiving = receiver.start(bench)?;
    let mount = bench.path("mnt");
    let cluster = Cluster::new(bench, &mount)?;
    let mut all = Vec::new();
    for (at, phase) in phases.iter().enumerate() {
        primary.configure(phase.interval)?;
        let mut daemon = primary.start(bench)?;
        primary.settle(&mut daemon, SETTLE_MAX)?;
        let mut attached = Disk::attach(bench, &primary.socket())?;
        if at == 0 {
            eprintln!("wire: file system, cluster and tables of scale {scale}");
            attached.make_ext4(bench)?;
        }
        attached.mount(bench, &mount)?;
        let site = (&receiver, receiving.pid());
        all.push(measure(bench, &cluster, (&primary, &mut daemon), site, phase, (at == 0).then_some(scale))?);
        drop(attached);
        daemon.stop()?;
    }
    let parameters = json!({ "scale": scale, "rate_tps": RATE, "clients": 8, "disk_bytes": size, "codec": "lz4", "checkpoint_timeout_s": phases.each_ref().map(Phase::cycle_s) });
    Ok(report(&phases, &all, parameters, needed))
}

fn measure(
    bench: &Bench,
    cluster: &Cluster,
    (primary, daemon): (&Primary, &mut Daemon),
    (receiver, pid): (&Receiver, u32),
    phase: &Phase,
    fill: Option<u32>,
) -> Result<Figures> {
    if fill.is_some() {
        cluster.create(bench)?;
    }
    let cycle = phase.cycle_s();
    let server = cluster.start(bench, cycle)?;
    if let Some(scale) = fill {
        cluster.fill(bench, scale)?;
    }
    cluster.sql(bench, "checkpoint")?;
    bench.sync()?;
    primary.settle(daemon, SETTLE_MAX)?;
    eprintln!("wire: pgbench at {RATE} tps for {cycle} s and then {} s, {} epochs", phase.seconds, phase.interval);
    let stored = || Ok::<_, anyhow::Error>((procfs::written(pid)?, receiver.copy()?.received_bytes));
    let (mut before, mut start, mut lags, mut stored_before) = (primary.status()?, Instant::now(), Vec::new(), stored()?);
    let (lead_in, mut measuring) = (Duration::from_secs(cycle.into()), false);
    let tps = cluster.load(bench, RATE, cycle + phase.seconds, &mut || {
        let status = primary.status()?;
        lags.push(status.lag_ms as f64);
        // The first cycle has no write-back of the one before: what counts begins with the second.
        if !measuring && start.elapsed() >= lead_in {
            (before, start, measuring) = (status, Instant::now(), true);
            stored_before = stored()?;
        }
        Ok(())
    })?;
    anyhow::ensure!(measuring, "the load ended within its first checkpoint cycle");
    let seconds = start.elapsed().as_secs_f64();
    // What was dirty at the end belongs to the load too.
    primary.settle(daemon, SETTLE_MAX)?;
    let (after, stored_after) = (primary.status()?, stored()?);
    server.stop()?;
    Ok(Figures {
        interval: phase.interval,
        seconds,
        tps,
        dirty_bytes: after.captured_bytes.saturating_sub(before.captured_bytes),
        zero_bytes: after.zero_bytes.saturating_sub(before.zero_bytes),
        frame_bytes: after.sent_bytes.saturating_sub(before.sent_bytes),
        udp_bytes: after.wire_bytes.saturating_sub(before.wire_bytes),
        epochs: after.epochs_committed.saturating_sub(before.epochs_committed),
        epochs_merged: after.epochs_merged.saturating_sub(before.epochs_merged),
        copied_before_write: after.copied_before_write.saturating_sub(before.copied_before_write),
        received_bytes: stored_after.1.saturating_sub(stored_before.1),
        written_bytes: stored_after.0.saturating_sub(stored_before.0),
        lag_samples: lags.len(),
        lag_p50_ms: percentile(&lags, 50.0),
        lag_p99_ms: percentile(&lags, 99.0),
        lag_max_ms: percentile(&lags, 100.0),
    })
}

fn report(phases: &[Phase], all: &[Figures], parameters: serde_json::Value, tools: Vec<tools::Tool>) -> Report {
    let head = [
        "epochs of",
        "tps",
        "dirty MiB",
        "zero MiB",
        "frames MiB",
        "saved %",
        "UDP MiB",
        "saved %",
        "UDP Mbit/s",
        "epochs",
        "written for each received",
    ];
    let mut bytes = Table::new("bytes, from the load alone", &head);
    let mut lag =
        Table::new("lag, sampled every 10 ms or so during the load", &["epochs of", "p50 ms", "p99 ms", "largest ms", "samples"]);
    let (mut checks, mut bars, mut lag_panels) = (Vec::new(), Vec::new(), Vec::new());
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    for (phase, f) in phases.iter().zip(all) {
        bytes.row(vec![
            f.interval.to_owned(),
            format!("{:.0}", f.tps),
            mib(f.dirty_bytes),
            mib(f.zero_bytes),
            mib(f.frame_bytes),
            format!("{:.1}", f.saved(f.frame_bytes)),
            mib(f.udp_bytes),
            format!("{:.1}", f.saved(f.udp_bytes)),
            format!("{:.1}", f.mbit_per_s(f.udp_bytes)),
            f.epochs.to_string(),
            format!("{:.3}", f.written()),
        ]);
        lag.row(vec![
            f.interval.to_owned(),
            format!("{:.0}", f.lag_p50_ms),
            format!("{:.0}", f.lag_p99_ms),
            format!("{:.0}", f.lag_max_ms),
            f.lag_samples.to_string(),
        ]);
        let name = format!("{} epochs", f.interval);
        if phase.judge_saving {
            checks.push(Check::at_least(format!("{name}: frames less than dirty bytes"), f.saved(f.frame_bytes), 80.0, "%"));
            checks.push(Check::at_least(format!("{name}: UDP payload less than dirty bytes"), f.saved(f.udp_bytes), 80.0, "%"));
        }
        checks.push(Check::at_most(format!("{name}: lag p99"), f.lag_p99_ms, phase.lag_p99_max_ms, "ms"));
        checks.push(Check::at_most(
            format!("{name}: bytes that the receiver writes for each received"),
            f.written(),
            WRITTEN_MAX,
            "times",
        ));
        let reached = 100.0 * f.tps / f64::from(RATE);
        checks.push(Check::at_least(format!("{name}: of the rate of {RATE} tps reached"), reached, RATE_REACHED_PERCENT, "%"));
        for (title, bytes) in [("dirty", f.dirty_bytes), ("frames", f.frame_bytes), ("UDP", f.udp_bytes)] {
            bars.push(Bar { label: format!("{name}: {title}"), value: f.mbit_per_s(bytes), ours: title != "dirty" });
        }
        let lag_bars = [("p50", f.lag_p50_ms), ("p99", f.lag_p99_ms), ("largest", f.lag_max_ms)];
        lag_panels.push(Panel {
            title: format!("Lag with {name}"),
            axis: "ms".to_owned(),
            bars: lag_bars.into_iter().map(|(l, value)| Bar { label: l.to_owned(), value, ours: true }).collect(),
            bound: Some(phase.lag_p99_max_ms),
        });
    }
    let mut panels =
        vec![Panel { title: "Dirty bytes and what was sent".to_owned(), axis: "Mbit/s".to_owned(), bars, bound: None }];
    panels.extend(lag_panels);
    Report {
        name: "wire",
        title: format!("PostgreSQL on a replicated disk, pgbench at {RATE} transactions a second"),
        parameters,
        results: json!(all),
        tables: vec![bytes, lag],
        checks,
        chart: Chart { title: format!("pgbench at {RATE} transactions a second, LZ4"), panels },
        tools,
    }
}
