//! How fast a disk all of which is suspect is compared with its copy, against how fast it can be read: by one sequential reader, and by several
//! past the page cache, which is the most that it has to give.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;
use serde_json::json;

use crate::chart::{Bar, Chart, Panel};
use crate::child::Daemon;
use crate::context::Bench;
use crate::nbd_client::NbdClient;
use crate::node::{self, DISK, Primary};
use crate::report::{Check, Report, Table, whole};
use crate::stats::{median, range, ratio};
use crate::{disk, page_cache};

const REGION_BYTES: u64 = 4 << 20;
const BLOCK: usize = 4096;
const BOUND: f64 = 0.8;
const INTERVAL: &str = "1s";
const SYNC_MAX: Duration = Duration::from_secs(600);
/// How often status is asked while it compares: it shares the cores.
const LOOK: Duration = Duration::from_millis(10);

/// Readers at once for the most that a disk has to give.
const READERS: usize = 4;
/// What both sites hash at once, see `proto::hashes`.
const GRANULE: usize = 64 << 10;
const HASH_TIME: Duration = Duration::from_millis(500);

/// What this machine can do at all, for the arithmetic in `docs/bench.md`.
#[derive(Clone, Copy, Debug, Serialize)]
struct Machine {
    processors: usize,
    /// BLAKE3 of what is in the processor's cache, on one core.
    hash_mb_per_s: f64,
}

impl Machine {
    fn look() -> Self {
        let processors = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { processors, hash_mb_per_s: hash_bytes_per_s() / 1e6 }
    }

    /// What two sites that share all processors, and do nothing but copy out of the page cache and hash, can compare at most.
    fn ceiling_mb_per_s(&self, reader_mb_per_s: f64) -> f64 {
        self.processors as f64 / (2.0 * (1.0 / self.hash_mb_per_s + 1.0 / reader_mb_per_s))
    }
}

fn hash_bytes_per_s() -> f64 {
    let content: Vec<u8> = (0..16 * GRANULE).map(|i| (i % 251) as u8).collect();
    let (start, mut bytes) = (Instant::now(), 0_usize);
    while start.elapsed() < HASH_TIME {
        for granule in content.chunks(GRANULE) {
            std::hint::black_box(blake3::hash(granule));
        }
        bytes += content.len();
    }
    bytes as f64 / start.elapsed().as_secs_f64()
}

/// What is in the page cache when it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cache {
    /// Disk and store.
    Warm,
    /// The store only: as if its disk were another one, as it is at a second site.
    DiskCold,
    /// Nothing. Both sides read one and the same device here, so the reader has one beside it that reads the store.
    AllCold,
}

const CACHES: [Cache; 3] = [Cache::Warm, Cache::DiskCold, Cache::AllCold];

impl Cache {
    fn title(self) -> &'static str {
        match self {
            Self::Warm => "all in the page cache",
            Self::DiskCold => "disk not in the page cache",
            Self::AllCold => "disk and store not in the page cache",
        }
    }

    fn prepare(self, disk: &Path, store: &Path) -> Result<()> {
        let (cold_disk, cold_store) = (self != Self::Warm, self == Self::AllCold);
        if cold_disk {
            page_cache::drop_file(disk)?
        } else {
            page_cache::load_file(disk)?
        };
        for file in page_cache::files_below(store)? {
            if cold_store {
                page_cache::drop_file(&file)?
            } else {
                page_cache::load_file(&file)?
            };
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Sample {
    cache: &'static str,
    /// One sequential reader.
    reader_mb_per_s: f64,
    /// Several past the page cache.
    direct_mb_per_s: f64,
    compare_mb_per_s: f64,
    compared_bytes: u64,
    differing_bytes: u64,
    /// From the start of the process until nothing was suspect.
    start_to_end_s: f64,
    primary_cpu_s_per_gib: f64,
    receiver_cpu_s_per_gib: f64,
    udp_bytes: u64,
}

pub(crate) fn run(bench: &Bench) -> Result<Report> {
    let rounds = bench.rounds(1, 3);
    let size = bench.bytes(1 << 30, 4 << 30);
    let file = bench.path("disk.raw");
    disk::filled(&file, size)?;
    let (receiver, primary) = node::pair_of_one(bench, "c", &file, INTERVAL)?;
    let receiving = receiver.start(bench)?;
    eprintln!("compare: first copy of {} MiB", size >> 20);
    let mut daemon = primary.start(bench)?;
    primary.settle(&mut daemon, SYNC_MAX)?;
    let machine = Machine::look();
    let (mut samples, mut turns) = (Vec::new(), 0_u8);
    for round in 0..rounds as usize {
        for turn in 0..CACHES.len() {
            let Some(cache) = CACHES.get((turn + round) % CACHES.len()).copied() else { continue };
            eprintln!("compare: round {} of {rounds}: {}", round + 1, cache.title());
            turns = turns.wrapping_add(1);
            touch(&primary, size, turns)?;
            primary.settle(&mut daemon, SYNC_MAX)?;
            daemon.kill()?;
            bench.sync()?;
            // Who goes first changes from round to round.
            let mut readers = [0.0; 2];
            if round.is_multiple_of(2) {
                readers = both_readers(cache, &file, &receiver.store())?;
            }
            cache.prepare(&file, &receiver.store())?;
            let (started, mut sample) = ours(bench, cache, &primary, &receiving, size)?;
            daemon = started;
            if !round.is_multiple_of(2) {
                // The primary is idle, and its disk is not written.
                readers = both_readers(cache, &file, &receiver.store())?;
            }
            [sample.reader_mb_per_s, sample.direct_mb_per_s] = readers.map(|bytes_per_s| bytes_per_s / 1e6);
            samples.push(sample);
        }
    }
    daemon.stop()?;
    receiving.stop()?;
    Ok(report(&samples, machine, rounds, size))
}

/// Writes a block of every region, each time others.
fn touch(primary: &Primary, size: u64, turn: u8) -> Result<()> {
    let mut client = NbdClient::connect(&primary.socket(), DISK)?;
    let block = vec![turn; BLOCK];
    for at in (0..size).step_by(REGION_BYTES as usize) {
        client.write(at, &block)?;
    }
    Ok(())
}

/// Bytes a second of one sequential reader of the disk, and of several past the page cache.
fn both_readers(cache: Cache, disk: &Path, store: &Path) -> Result<[f64; 2]> {
    let one = reader(cache, disk, store, page_cache::read_through)?;
    Ok([one, reader(cache, disk, store, |file| page_cache::read_past(file, READERS))?])
}

/// Bytes a second of the disk as `read` reads it.
fn reader(cache: Cache, disk: &Path, store: &Path, read: impl Fn(&Path) -> Result<f64> + Sync) -> Result<f64> {
    cache.prepare(disk, store)?;
    if cache != Cache::AllCold {
        return read(disk);
    }
    let files = page_cache::files_below(store)?;
    thread::scope(|scope| {
        let beside = scope.spawn(|| files.iter().try_for_each(|file| read(file).map(drop)));
        let rate = read(disk)?;
        beside.join().map_err(|_| anyhow!("the second reader failed"))??;
        Ok(rate)
    })
}

/// Starts the primary and lets it compare. The rate is from the first look at which it compares to the first at which nothing is suspect.
fn ours(bench: &Bench, cache: Cache, primary: &Primary, receiving: &Daemon, size: u64) -> Result<(Daemon, Sample)> {
    let start = Instant::now();
    let mut daemon = primary.start(bench)?;
    let pids = [daemon.pid(), receiving.pid()];
    let cpu = || -> Result<[Duration; 2]> { Ok([crate::procfs::cpu(pids[0])?, crate::procfs::cpu(pids[1])?]) };
    let (mut first, mut last, mut told) = (None, None, Ok(()));
    primary.settle_watched(&mut daemon, SYNC_MAX, LOOK, &mut |status| {
        let now = || -> Result<_> { Ok((Instant::now(), status.compared_bytes, cpu()?)) };
        let to = match status.state.as_str() {
            "comparing" if first.is_none() => &mut first,
            "streaming" if last.is_none() => &mut last,
            _ => return,
        };
        match now() {
            Ok(seen) => *to = Some(seen),
            Err(error) => told = Err(error),
        }
    })?;
    told?;
    let status = primary.status()?;
    let (from, bytes_before, cpu_before) =
        first.context("it was never seen comparing: the disk is too small for this machine")?;
    let (to, bytes_after, cpu_after) = last.context("it was never seen streaming")?;
    ensure!(
        status.compared_bytes >= size,
        "{} of {size} bytes were compared: not all of the disk was suspect",
        status.compared_bytes
    );
    let bytes = bytes_after.saturating_sub(bytes_before) as f64;
    let cpu = |at: usize| {
        let used = cpu_after.get(at).zip(cpu_before.get(at)).map(|(after, before)| after.saturating_sub(*before));
        ratio(used.unwrap_or_default().as_secs_f64(), bytes / f64::from(1 << 30))
    };
    let sample = Sample {
        cache: cache.title(),
        reader_mb_per_s: f64::NAN,
        direct_mb_per_s: f64::NAN,
        compare_mb_per_s: ratio(bytes / 1e6, to.duration_since(from).as_secs_f64()),
        compared_bytes: status.compared_bytes,
        differing_bytes: status.differing_bytes,
        start_to_end_s: to.duration_since(start).as_secs_f64(),
        primary_cpu_s_per_gib: cpu(0),
        receiver_cpu_s_per_gib: cpu(1),
        udp_bytes: status.wire_bytes,
    };
    Ok((daemon, sample))
}

fn report(samples: &[Sample], machine: Machine, rounds: u32, size: u64) -> Report {
    let head = [
        "state",
        "reader MB/s",
        "past the cache MB/s",
        "compared MB/s",
        "compared / reader",
        "lowest..highest",
        "compared / past the cache",
        "lowest..highest",
        "from the start s",
        "primary CPU s/GiB",
        "receiver CPU s/GiB",
        "UDP KiB",
    ];
    let mut table = Table::new("medians; the ratio of each round, and their median", &head);
    let (mut checks, mut panels) = (Vec::new(), Vec::new());
    for cache in CACHES {
        let of_cache: Vec<&Sample> = samples.iter().filter(|s| s.cache == cache.title()).collect();
        let all = |pick: fn(&Sample) -> f64| of_cache.iter().map(|s| pick(s)).collect::<Vec<_>>();
        let of = |pick: fn(&Sample) -> f64| median(&all(pick));
        let to_one = all(|s| s.compare_mb_per_s / s.reader_mb_per_s);
        let to_direct = all(|s| s.compare_mb_per_s / s.direct_mb_per_s);
        let spread = |ratios: &[f64]| {
            let (low, high) = range(ratios);
            format!("{low:.2}..{high:.2}")
        };
        let (reader, direct, compared) = (of(|s| s.reader_mb_per_s), of(|s| s.direct_mb_per_s), of(|s| s.compare_mb_per_s));
        table.row(vec![
            cache.title().to_owned(),
            whole(reader),
            whole(direct),
            whole(compared),
            format!("{:.2}", median(&to_one)),
            spread(&to_one),
            format!("{:.2}", median(&to_direct)),
            spread(&to_direct),
            format!("{:.2}", of(|s| s.start_to_end_s)),
            format!("{:.2}", of(|s| s.primary_cpu_s_per_gib)),
            format!("{:.2}", of(|s| s.receiver_cpu_s_per_gib)),
            whole(of(|s| s.udp_bytes as f64) / 1024.0),
        ]);
        for (reference, ratios) in [("one sequential reader", &to_one), ("several readers past the page cache", &to_direct)] {
            let figure = if ratios.is_empty() { f64::NAN } else { median(ratios) };
            checks.push(Check::at_least(format!("{}: compared / {reference}", cache.title()), figure, BOUND, "times"));
        }
        let bars =
            [("one sequential reader", reader, false), ("past the page cache", direct, false), ("compared", compared, true)];
        panels.push(Panel {
            title: cache.title().to_owned(),
            axis: format!("MB/s of the disk (median of {rounds} rounds)"),
            bars: bars.into_iter().map(|(label, value, ours)| Bar { label: label.to_owned(), value, ours }).collect(),
            bound: Some(BOUND * reader.max(direct)),
        });
    }
    let head = ["", "MB/s"];
    let mut limits = Table::new("what the machine can do", &head);
    let readers = samples.iter().filter(|s| s.cache == Cache::Warm.title()).map(|s| s.reader_mb_per_s).collect::<Vec<_>>();
    let ceiling = machine.ceiling_mb_per_s(median(&readers));
    for (what, mb_per_s) in [
        (format!("BLAKE3 of {} KiB in the processor's cache, one core", GRANULE >> 10), machine.hash_mb_per_s),
        (format!("copying out of the page cache and hashing, both sites on {} cores", machine.processors), ceiling),
    ] {
        limits.row(vec![what, whole(mb_per_s)]);
    }
    Report {
        name: "compare",
        title: format!("{} MiB, all suspect, compared with the copy on the same machine", size >> 20),
        parameters: json!({ "rounds": rounds, "disk_bytes": size, "interval": INTERVAL }),
        results: json!({ "machine": machine, "samples": samples }),
        tables: vec![table, limits],
        checks,
        chart: Chart { title: "Comparing after an unclean stop".to_owned(), panels },
        tools: Vec::new(),
    }
}
