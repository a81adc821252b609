//! What the receiver writes to its disk: for each byte that it receives, for each block that it folds, and for each byte that survives on a rung of its ladder.

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;

use crate::chart::{Bar, Chart, Panel};
use crate::context::Bench;
use crate::fio::{self, Load, Span};
use crate::node::{self, DISK};
use crate::report::{Check, Report, Table};
use crate::{disk, procfs, tools};

const DISK_BYTES: u64 = 1 << 30;
/// Segments are a part of the space, so that some are full after a short load.
const SPACE_BYTES: u64 = 2 << 30;
/// At a rate, so that the journal stays within its space while the load runs. 40 MiB/s are some 10,000 writes a second.
const LOAD: Load = Load {
    title: "4 KiB random write at 40 MiB/s",
    rw: "randwrite",
    bs: "4k",
    iodepth: 32,
    bandwidth: false,
    more: &["--rate=40m", "--norandommap", "--random_generator=tausworthe64"],
};
const SETTLE_MAX: Duration = Duration::from_secs(300);
const FOLD_MAX: Duration = Duration::from_secs(300);
/// A disk that the load has written over in less than two seconds.
const SMALL_BYTES: u64 = 64 << 20;
/// The keeper looks every 5 s, and folds or thins several times in one look.
const KEPT_AFTER: Duration = Duration::from_secs(15);
/// Most bytes that may be written for one that is received, for one that is folded, and on a rung for one that survives.
const BOUND: f64 = 1.1;

pub(crate) fn run(bench: &Bench) -> Result<Report> {
    let needed = vec![tools::FIO];
    tools::require(&needed)?;
    let seconds = bench.seconds(8, 30);
    let file = bench.path("disk.raw");
    disk::sparse(&file, DISK_BYTES)?;
    let (mut receiver, primary) = node::pair_of_one(bench, "k", &file, "1s")?;
    receiver.limit_space(SPACE_BYTES)?;
    let receiving = receiver.start(bench)?;
    let mut sending = primary.start(bench)?;
    primary.settle(&mut sending, SETTLE_MAX)?;
    eprintln!("retention: {seconds} s of random writes");
    let before = (procfs::written(receiving.pid())?, receiver.copy()?);
    fio::run(bench, &primary.socket(), &LOAD, Span { seconds, seed: 1 })?;
    primary.settle(&mut sending, SETTLE_MAX)?;
    let after = (procfs::written(receiving.pid())?, receiver.copy()?);
    let received = after.1.received_bytes - before.1.received_bytes;
    let at_commit = (after.0 - before.0) as f64 / received as f64;
    sending.kill()?;
    receiving.stop()?;
    // Of no use any more but for its newest points. With too little space instead, points would be thinned out first.
    receiver.keep("[\"all for 1s\"]")?;
    eprintln!("retention: folding of {} MB at most", after.1.stored_bytes / 1_000_000);
    let mut receiving = receiver.start(bench)?;
    let idle = procfs::written(receiving.pid())?;
    let (mut folded, mut folds, mut since) = (receiver.copy()?, 0, Instant::now());
    receiving.wait_until("has folded", FOLD_MAX, || {
        folded = receiver.copy()?;
        if folded.retention.folds != folds || folded.retention.folding.is_some() {
            (folds, since) = (folded.retention.folds, Instant::now());
        }
        Ok(folds > 0 && since.elapsed() > KEPT_AFTER)
    })?;
    anyhow::ensure!(folded.retention.thins == 0, "points were thinned out while only folding was to be measured");
    let written = procfs::written(receiving.pid())? - idle;
    let base = primary.base_in(&receiver);
    let base = std::fs::metadata(&base).with_context(|| format!("{}: the base is not there", base.display()))?;
    let surviving = base.blocks() * 512;
    let by_folding = written as f64 / surviving as f64;
    receiving.stop()?;
    let thinned = thinning(bench, seconds)?;
    let head = ["", "written MB", "for MB", "written for each"];
    let mut table = Table::new(format!("what the receiver writes, {seconds} s of {}", LOAD.title), &head);
    let mb = |bytes: u64| format!("{:.1}", bytes as f64 / 1e6);
    let row = |what: &str, written: u64, of: u64, each: f64| vec![what.to_owned(), mb(written), mb(of), format!("{each:.3}")];
    table.row(row("commit, of what is received", after.0 - before.0, received, at_commit));
    table.row(row("folding, of surviving blocks", written, surviving, by_folding));
    for Thinned { rung, written, surviving, .. } in &thinned {
        table.row(row(
            &format!("thinning to one point in {rung}, of what survives"),
            *written,
            *surviving,
            times(*written, *surviving),
        ));
    }
    let mut checks = vec![
        Check::at_most("bytes written for each received at commit".to_owned(), at_commit, BOUND, "times"),
        Check::at_most(format!("bytes written for each that survives in the base of disk {DISK}"), by_folding, BOUND, "times"),
    ];
    let of_rung = |t: &Thinned| {
        let what = format!("bytes written for each that survives when thinned to one point in {}", t.rung);
        Check::at_most(what, times(t.written, t.surviving), BOUND, "times")
    };
    checks.extend(thinned.iter().map(of_rung));
    let bar = |label: &str, value| Bar { label: label.to_owned(), value, ours: true };
    Ok(Report {
        name: "retention",
        title: "bytes that the receiver writes, by /proc/PID/io".to_owned(),
        parameters: json!({ "seconds": seconds, "disk_bytes": DISK_BYTES, "interval": "1s", "space_bytes": SPACE_BYTES }),
        results: json!({
            "commit": { "written_bytes": after.0 - before.0, "received_bytes": received, "times": at_commit },
            "fold": {
                "written_bytes": written,
                "surviving_bytes": surviving,
                "times": by_folding,
                "folds": folded.retention.folds,
                "freed_bytes": folded.retention.freed_bytes,
                "told_bytes": folded.retention.folded_bytes,
            },
            "thin": thinned.iter().map(Thinned::json).collect::<Vec<_>>(),
        }),
        tables: vec![table],
        checks,
        chart: Chart {
            title: "Bytes that the receiver writes".to_owned(),
            panels: vec![Panel {
                title: "At commit for each byte received, by folding and on each rung for each byte that survives".to_owned(),
                axis: "times".to_owned(),
                bars: [bar("commit", at_commit), bar("folding", by_folding)]
                    .into_iter()
                    .chain(thinned.iter().map(|t| bar(t.rung, times(t.written, t.surviving))))
                    .collect(),
                bound: Some(BOUND),
            }],
        },
        tools: needed,
    })
}

/// What thinning did on one rung.
struct Thinned {
    rung: &'static str,
    /// By the process, to the disk.
    written: u64,
    /// Of what was looked through, what the journal still has.
    surviving: u64,
    read: u64,
    points: u64,
    told: u64,
}

impl Thinned {
    fn json(&self) -> serde_json::Value {
        json!({
            "rung": self.rung,
            "written_bytes": self.written,
            "surviving_bytes": self.surviving,
            "times": times(self.written, self.surviving),
            "read_bytes": self.read,
            "points": self.points,
            "told_bytes": self.told,
        })
    }
}

fn times(written: u64, of: u64) -> f64 {
    written as f64 / of.max(1) as f64
}

/// A small disk that is written over and over; then nothing but thinning, to one rung after the other. A rung is reached with a start, so what is written on each
/// can be told apart.
fn thinning(bench: &Bench, seconds: u32) -> Result<Vec<Thinned>> {
    let file = bench.path("small.raw");
    disk::sparse(&file, SMALL_BYTES)?;
    let (mut receiver, primary) = node::pair_of_one(bench, "t", &file, "200ms")?;
    receiver.limit_space(SPACE_BYTES)?;
    let receiving = receiver.start(bench)?;
    let mut sending = primary.start(bench)?;
    primary.settle(&mut sending, SETTLE_MAX)?;
    fio::run(bench, &primary.socket(), &LOAD, Span { seconds: 2 * seconds, seed: 2 })?;
    primary.settle(&mut sending, SETTLE_MAX)?;
    sending.kill()?;
    receiving.stop()?;
    let mut all = Vec::new();
    for (rung, ladder) in [("2 s", "[\"all for 1s\", \"2s for 365d\"]"), ("8 s", "[\"all for 1s\", \"8s for 365d\"]")] {
        eprintln!("retention: thinning to one point in {rung}");
        receiver.keep(ladder)?;
        let mut receiving = receiver.start(bench)?;
        let (idle, before) = (procfs::written(receiving.pid())?, receiver.copy()?);
        let (mut thins, mut since) = (0, Instant::now());
        let mut now = receiver.copy()?;
        receiving.wait_until("has thinned", FOLD_MAX, || {
            now = receiver.copy()?;
            if now.retention.thins != thins {
                (thins, since) = (now.retention.thins, Instant::now());
            }
            Ok(thins > 0 && since.elapsed() > KEPT_AFTER)
        })?;
        let written = procfs::written(receiving.pid())? - idle;
        // It began before it was first asked, so what it says of itself counts from the start.
        let read = now.retention.thinned_freed_bytes + now.retention.thinned_written_bytes;
        let untouched = (before.stored_bytes + before.retention.thinned_freed_bytes).saturating_sub(read);
        all.push(Thinned {
            rung,
            written,
            surviving: now.stored_bytes.saturating_sub(untouched),
            read,
            points: now.retention.thinned_points,
            told: now.retention.thinned_written_bytes,
        });
        receiving.stop()?;
    }
    Ok(all)
}
