//! What the dirty log costs: random writes over a disk none of whose regions is marked, so that the first write to each has to wait for
//! its mark to be durable, against the same with all marked, and against the export alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;

use crate::chart::{Bar, Chart, Panel};
use crate::child::Daemon;
use crate::context::{Bench, NBD_EXPORT};
use crate::dirty_log::{self, Marks};
use crate::fio::{self, Load, Request, Span};
use crate::node::{self, Primary, PrimarySpec};
use crate::peers::Server;
use crate::report::{Report, Table, whole};
use crate::stats::{median, percentile, range, ratio};
use crate::{disk, tools};

const DISK_BYTES: u64 = 100 << 30;
const LOAD: Load = Load {
    title: "4 KiB random write, depth 32",
    rw: "randwrite",
    bs: "4k",
    iodepth: 32,
    bandwidth: false,
    more: &["--norandommap", "--random_generator=tausworthe64"],
};
/// Long enough that no epoch ends while it is measured: the tap and its log are in the path, nothing is replicated.
const NEVER: &str = "1d";
const SYNC_MAX: Duration = Duration::from_secs(300);
/// The log forgets clean regions after one to two minutes.
const COLD_MAX: Duration = Duration::from_secs(180);
/// A load that is shorter has no warm part.
const SECONDS_MIN: u32 = 3;
/// How often the log is looked at during the load.
const LOOK: Duration = Duration::from_millis(20);
const EXPORT: &str = "twinsite export, no tap";

/// Parts of a run, from so many ms after its first answer on; the last goes to its end.
const PARTS: [(&str, u64); 3] = [("first 250 ms", 0), ("rest of the first second", 250), ("from the second second on", 1000)];

/// What the log says before the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Log {
    /// Every region is marked, as it is after the first copy.
    Marked,
    /// None is.
    Cold,
}

impl Log {
    fn title(self) -> &'static str {
        match self {
            Self::Marked => "twinsite group, all marked",
            Self::Cold => "twinsite group, none marked",
        }
    }
}

/// One part of one run.
#[derive(Clone, Copy, Debug, Serialize)]
struct Part {
    iops: f64,
    p99_us: f64,
    largest_us: f64,
}

#[derive(Clone, Debug, Serialize)]
struct Sample {
    parts: Vec<Part>,
    marked_before: u64,
    marked_after: u64,
    /// Groups of regions marked during the load: so many syncs at most.
    groups_marked: u64,
    /// From the start of the load until half, and 99 %, of all regions were marked. Only of a cold log.
    half_marked_s: Option<f64>,
    almost_marked_s: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Series {
    server: &'static str,
    rounds: Vec<Sample>,
}

/// A group that runs, and its disk.
struct Group {
    primary: Primary,
    daemon: Daemon,
    disk: PathBuf,
}

pub(crate) fn run(bench: &Bench) -> Result<Report> {
    let needed = vec![tools::FIO];
    tools::require(&needed)?;
    let (rounds, seconds) = (bench.rounds(1, 3), bench.seconds(5, 8).max(SECONDS_MIN));
    let count = rounds as usize;
    let names: Vec<String> = (0..2 * count).map(|n| format!("g{n}")).collect();
    let disks: Vec<PathBuf> = names.iter().map(|n| bench.path(&format!("{n}.raw"))).collect();
    let specs: Vec<_> = names.iter().zip(&disks).map(|(name, disk)| PrimarySpec { name, disk, interval: NEVER }).collect();
    let (receiver, primaries) = node::pair(bench, "receiver", &specs)?;
    let _receiver = receiver.start(bench)?;
    let mut idle = primaries.into_iter().zip(disks);
    let mut cold = Vec::new();
    for (primary, disk) in idle.by_ref().take(count) {
        cold.push(start(bench, primary, disk)?);
    }
    eprintln!("dirty-log: {count} groups in sync; waiting a minute until their logs have forgotten that");
    for group in &mut cold {
        let log = group.primary.dirty_log();
        group.daemon.wait_until("forgets clean regions", COLD_MAX, || Ok(dirty_log::read(&log)?.marked == 0))?;
    }
    let mut cold = cold.into_iter();
    let export = Server::Ours(bench.binary(&NBD_EXPORT)?);
    let contenders = [None, Some(Log::Marked), Some(Log::Cold)];
    let mut samples = vec![Vec::new(); contenders.len()];
    for round in 0..count {
        eprintln!("dirty-log: round {} of {rounds}", round + 1);
        for turn in 0..contenders.len() {
            let at = (turn + round) % contenders.len();
            let (Some(contender), Some(samples)) = (contenders.get(at).copied(), samples.get_mut(at)) else { continue };
            let span = Span { seconds, seed: round + 1 };
            let sample = match contender {
                None => of_export(bench, &export, span)?,
                // Started here: later its log would forget.
                Some(Log::Marked) => {
                    let (primary, disk) = idle.next().context("no group is left")?;
                    of_group(bench, Log::Marked, start(bench, primary, disk)?, span)?
                }
                Some(Log::Cold) => of_group(bench, Log::Cold, cold.next().context("no group is left")?, span)?,
            };
            samples.push(sample);
        }
    }
    let series: Vec<Series> = contenders
        .iter()
        .zip(samples)
        .map(|(contender, rounds)| Series { server: contender.map_or(EXPORT, Log::title), rounds })
        .collect();
    Ok(report(&series, rounds, seconds, needed))
}

fn start(bench: &Bench, primary: Primary, disk: PathBuf) -> Result<Group> {
    disk::sparse(&disk, DISK_BYTES)?;
    let mut daemon = primary.start(bench)?;
    primary.settle(&mut daemon, SYNC_MAX)?;
    Ok(Group { primary, daemon, disk })
}

fn of_export(bench: &Bench, export: &Server, span: Span) -> Result<Sample> {
    let (disk, socket) = (bench.path("export.raw"), bench.path("export.sock"));
    disk::sparse(&disk, DISK_BYTES)?;
    bench.sync()?;
    let daemon = export.start(bench, &disk, &socket)?;
    let (_, requests) = fio::run_logged(bench, &socket, &LOAD, span, &mut || Ok(()))?;
    daemon.stop()?;
    remove(&disk)?;
    Ok(Sample {
        parts: parts(&requests),
        marked_before: 0,
        marked_after: 0,
        groups_marked: 0,
        half_marked_s: None,
        almost_marked_s: None,
    })
}

fn of_group(bench: &Bench, log: Log, group: Group, span: Span) -> Result<Sample> {
    let Group { primary, mut daemon, disk } = group;
    bench.sync()?;
    let file = primary.dirty_log();
    let before = dirty_log::read(&file)?;
    let expected = if log == Log::Cold { 0 } else { before.regions };
    ensure!(before.marked == expected, "{}: {} of {} regions are marked", log.title(), before.marked, before.regions);
    let (start, mut seen, mut looked): (_, Vec<(f64, Marks)>, _) = (Instant::now(), Vec::new(), Instant::now());
    let (_, requests) = fio::run_logged(bench, &primary.socket(), &LOAD, span, &mut || {
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            seen.push((start.elapsed().as_secs_f64(), dirty_log::read(&file)?));
        }
        Ok(())
    })?;
    daemon.check_alive()?;
    let after = dirty_log::read(&file)?;
    // Killed: an orderly stop would replicate all that was written.
    daemon.kill()?;
    remove(&disk)?;
    // fio needs a moment to start and to connect: the first mark is the start.
    let begun = seen.iter().find(|(_, marks)| marks.marked > before.marked).map(|(at, _)| *at);
    let reached = |share: f64| {
        let at = seen.iter().find(|(_, marks)| marks.marked as f64 >= share * marks.regions as f64).map(|(at, _)| *at)?;
        Some(at - begun?)
    };
    Ok(Sample {
        parts: parts(&requests),
        marked_before: before.marked,
        marked_after: after.marked,
        groups_marked: after.groups - before.groups,
        half_marked_s: reached(0.5),
        almost_marked_s: reached(0.99),
    })
}

fn remove(disk: &Path) -> Result<()> {
    // Scattered blocks take space.
    Ok(fs::remove_file(disk)?)
}

/// The requests of each of [`PARTS`].
fn parts(requests: &[Request]) -> Vec<Part> {
    let first = requests.iter().map(|r| r.at_ms).min().unwrap_or_default();
    let end = requests.iter().map(|r| r.at_ms - first).max().unwrap_or_default();
    let ends = PARTS.iter().skip(1).map(|(_, from)| *from).chain([end]);
    PARTS
        .iter()
        .zip(ends)
        .map(|((_, from), to)| {
            let of_part = requests.iter().filter(|r| (*from..to).contains(&(r.at_ms - first)));
            let latencies: Vec<f64> = of_part.map(|r| r.latency_ns as f64 / 1e3).collect();
            Part {
                iops: ratio(latencies.len() as f64, to.saturating_sub(*from) as f64 / 1e3),
                p99_us: percentile(&latencies, 99.0),
                largest_us: percentile(&latencies, 100.0),
            }
        })
        .collect()
}

fn report(series: &[Series], rounds: u32, seconds: u32, tools: Vec<tools::Tool>) -> Report {
    let (mut tables, mut panels) = (Vec::new(), Vec::new());
    for (at, (title, _)) in PARTS.iter().enumerate() {
        let of =
            |s: &Series, pick: fn(&Part) -> f64| s.rounds.iter().filter_map(|r| r.parts.get(at)).map(pick).collect::<Vec<_>>();
        let iops = |s: &Series| median(&of(s, |p| p.iops));
        let export = series.iter().find(|s| s.server == EXPORT).map_or(0.0, iops);
        let marked = series.iter().find(|s| s.server == Log::Marked.title()).map_or(0.0, iops);
        let head = ["server", "IOPS", "of export", "of all marked", "lowest..highest", "p99 µs", "largest µs"];
        let mut table = Table::new(*title, &head);
        for s in series {
            let (low, high) = range(&of(s, |p| p.iops));
            table.row(vec![
                s.server.to_owned(),
                whole(iops(s)),
                format!("{:.2}", ratio(iops(s), export)),
                format!("{:.2}", ratio(iops(s), marked)),
                format!("{}..{}", whole(low), whole(high)),
                whole(median(&of(s, |p| p.p99_us))),
                whole(range(&of(s, |p| p.largest_us)).1),
            ]);
        }
        tables.push(table);
        panels.push(Panel {
            title: format!("{}, {title}", LOAD.title),
            axis: format!("IOPS (median of {rounds} rounds)"),
            bars: series.iter().map(|s| Bar { label: s.server.to_owned(), value: iops(s), ours: s.server != EXPORT }).collect(),
            bound: None,
        });
    }
    let head = ["round", "marked before", "after", "syncs at most", "half marked after s", "99 % after s"];
    let mut marks = Table::new("the cold log: regions marked", &head);
    let cold = series.iter().filter(|s| s.server == Log::Cold.title()).flat_map(|s| &s.rounds);
    for (sample, round) in cold.zip(1..) {
        let seconds = |s: Option<f64>| s.map_or_else(|| "not".to_owned(), |s| format!("{s:.2}"));
        marks.row(vec![
            i32::to_string(&round),
            sample.marked_before.to_string(),
            sample.marked_after.to_string(),
            sample.groups_marked.to_string(),
            seconds(sample.half_marked_s),
            seconds(sample.almost_marked_s),
        ]);
    }
    tables.push(marks);
    Report {
        name: "dirty-log",
        title: format!("first writes to the regions of a sparse disk of {} GiB", DISK_BYTES >> 30),
        parameters: json!({ "rounds": rounds, "seconds": seconds, "disk_bytes": DISK_BYTES, "interval": NEVER, "load": LOAD.title }),
        results: json!(series),
        tables,
        checks: Vec::new(),
        chart: Chart { title: "Random writes with a cold dirty log".to_owned(), panels },
        tools,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart_by_their_time() {
        let request = |ms: u64, us: u64| Request { at_ms: 5_000 + ms, latency_ns: us * 1000 };
        let requests = [request(0, 900), request(249, 10), request(250, 20), request(1500, 30), request(3000, 40)];
        let parts = parts(&requests);
        assert_eq!(parts.iter().map(|p| p.iops).collect::<Vec<_>>(), [8.0, 1.0 / 0.75, 0.5]);
        assert_eq!(parts.iter().map(|p| p.largest_us).collect::<Vec<_>>(), [900.0, 20.0, 30.0]);
    }
}
