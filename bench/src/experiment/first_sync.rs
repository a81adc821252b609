//! The first full copy of a disk, ours against qemu's `blockdev-mirror`.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;
use serde_json::json;

use crate::chart::{Bar, Chart, Panel};
use crate::context::Bench;
use crate::disk::Content;
use crate::node;
use crate::qemu_mirror::{QemuMirror, Target};
use crate::report::{Report, Table, whole};
use crate::stats::{median, range, ratio};
use crate::{disk, tools};

const SYNC_MAX: Duration = Duration::from_secs(900);
const OURS: &str = "twinsite";

#[derive(Debug, Serialize)]
struct Series {
    content: &'static str,
    copier: &'static str,
    ours: bool,
    mb_per_s: Vec<f64>,
    /// Bytes on the wire over bytes of the disk; 0 where the copier does not tell.
    wire_share: f64,
}

pub(crate) fn run(bench: &Bench) -> Result<Report> {
    let needed = vec![tools::QEMU_STORAGE_DAEMON];
    tools::require(&needed)?;
    let rounds = bench.rounds(1, 3);
    let size = bench.bytes(512 << 20, 2 << 30);
    let file = bench.path("disk.raw");
    let copiers = [None, Some(Target::Nbd), Some(Target::Raw)];
    let mut series = Vec::new();
    for content in [Content::Random, Content::Half] {
        disk::fill(&file, size, content)?;
        let (mut rates, mut wire_share) = (vec![Vec::new(); copiers.len()], 0.0);
        for round in 0..rounds as usize {
            eprintln!("first-sync: {}, round {} of {rounds}", content.title(), round + 1);
            for turn in 0..copiers.len() {
                let at = (turn + round) % copiers.len();
                bench.sync()?;
                let seconds = match copiers.get(at).copied().flatten() {
                    None => {
                        let (seconds, wire) = ours(bench, &file)?;
                        wire_share = ratio(wire, size as f64);
                        seconds
                    }
                    Some(target) => qemu(bench, &file, target)?,
                };
                if let Some(rates) = rates.get_mut(at) {
                    rates.push(ratio(size as f64 / 1e6, seconds));
                }
            }
        }
        for (copier, mb_per_s) in copiers.iter().zip(rates) {
            series.push(Series {
                content: content.title(),
                copier: copier.map_or(OURS, Target::title),
                ours: copier.is_none(),
                mb_per_s,
                wire_share: if copier.is_none() { wire_share } else { 0.0 },
            });
        }
    }
    Ok(report(&series, rounds, size, needed))
}

/// Seconds from the start of the primary's process until the first point is committed, and bytes on the wire.
fn ours(bench: &Bench, file: &Path) -> Result<(f64, f64)> {
    let name = bench.fresh("sync");
    let (receiver, primary) = node::pair_of_one(bench, &name, file, "1s")?;
    let receiving = receiver.start(bench)?;
    let start = Instant::now();
    let mut daemon = primary.start(bench)?;
    primary.wait_first_copy(&mut daemon, SYNC_MAX)?;
    let seconds = start.elapsed().as_secs_f64();
    let wire = primary.status()?.wire_bytes as f64;
    daemon.stop()?;
    receiving.stop()?;
    // The next round should find as much free space as this one.
    let _ = fs::remove_dir_all(receiver.store());
    Ok((seconds, wire))
}

/// Seconds from the command until the job is ready, which it is after a flush of the target, as our commit is.
fn qemu(bench: &Bench, file: &Path, target: Target) -> Result<f64> {
    let name = bench.fresh("qemu");
    let copy = bench.path("copy.raw");
    let mut mirror = QemuMirror::start(bench, &name, file, &copy, target)?;
    let start = Instant::now();
    mirror.mirror()?;
    mirror.settle(SYNC_MAX)?;
    let seconds = start.elapsed().as_secs_f64();
    drop(mirror);
    let _ = fs::remove_file(&copy);
    Ok(seconds)
}

fn report(series: &[Series], rounds: u32, size: u64, tools: Vec<tools::Tool>) -> Report {
    let (mut tables, mut panels) = (Vec::new(), Vec::new());
    for content in [Content::Random, Content::Half] {
        let of_content: Vec<&Series> = series.iter().filter(|s| s.content == content.title()).collect();
        let best = of_content.iter().filter(|s| !s.ours).map(|s| median(&s.mb_per_s)).fold(0.0, f64::max);
        let mut table = Table::new(content.title(), &["copier", "MB/s", "of best peer", "lowest..highest", "on the wire"]);
        for s in &of_content {
            let (low, high) = range(&s.mb_per_s);
            table.row(vec![
                s.copier.to_owned(),
                whole(median(&s.mb_per_s)),
                format!("{:.2}", ratio(median(&s.mb_per_s), best)),
                format!("{}..{}", whole(low), whole(high)),
                if s.ours { format!("{:.0} %", 100.0 * s.wire_share) } else { "-".to_owned() },
            ]);
        }
        tables.push(table);
        panels.push(Panel {
            title: content.title().to_owned(),
            axis: format!("MB/s of the disk (median of {rounds} rounds)"),
            bars: of_content
                .iter()
                .map(|s| Bar { label: s.copier.to_owned(), value: median(&s.mb_per_s), ours: s.ours })
                .collect(),
            bound: None,
        });
    }
    Report {
        name: "first-sync",
        title: format!("first full copy of {} MiB on the same machine", size >> 20),
        parameters: json!({ "rounds": rounds, "disk_bytes": size }),
        results: json!(series),
        tables,
        checks: Vec::new(),
        chart: Chart { title: "First full copy".to_owned(), panels },
        tools,
    }
}
