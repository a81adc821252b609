//! The promises of the log, with a disk that loses power after every single operation.

use std::sync::Arc;

use blockdev::CrashDevice;
use futures_util::FutureExt;
use proto::region::REGION_BYTES;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

/// More than one sector of bits, and a partial last region.
const VOLUME_BYTES: u64 = 4040 * REGION_BYTES + 5000;

fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("a disk in memory never waits")
}

fn disk() -> Arc<CrashDevice> {
    Arc::new(CrashDevice::new(vec![0; log_bytes(VOLUME_BYTES) as usize]))
}

fn open(disk: &Arc<CrashDevice>) -> (DirtyLog, Known) {
    let file = LogFile { name: "test".to_owned(), device: disk.clone(), volume_bytes: VOLUME_BYTES };
    let (log, mut known) = now(DirtyLog::open(vec![file])).unwrap();
    (log, known.remove(0))
}

fn region(number: u64) -> Range {
    Range { volume: 0, first: number * REGION_BLOCKS, count: 1 }
}

fn forget(log: &DirtyLog, regions: &[u64]) {
    regions.iter().for_each(|r| log.unset(0, *r));
    now(log.write_unset(&[regions.to_vec()])).unwrap();
}

fn all() -> Vec<u64> {
    (0..VOLUME_BYTES.div_ceil(REGION_BYTES)).collect()
}

#[test]
fn a_new_log_suspects_everything_and_a_covered_region_after_a_crash() {
    let disk = disk();
    let (log, known) = open(&disk);
    assert_eq!(known.suspect.bytes(), DirtyMap::full(VOLUME_BYTES).bytes());
    assert!(log.covers(&region(4040)), "everything is marked");
    forget(&log, &all());
    assert!(!log.covers(&region(0)));
    now(disk.flush()).unwrap();
    now(log.cover(&region(4035))).unwrap();
    assert!(log.covers(&region(4035)) && log.covers(&region(4033)), "its neighbours too");
    disk.crash(|| false);
    let (log, known) = open(&disk);
    assert_eq!(known.suspect.bytes(), REGIONS_TOGETHER * REGION_BYTES);
    assert!(known.suspect.contains(4035 * REGION_BLOCKS) && known.dirty.is_empty());
    assert!(log.covers(&region(4035)) && !log.covers(&region(0)));
}

#[test]
fn a_clean_stop_leaves_the_exact_map_once() {
    let disk = disk();
    let (log, _) = open(&disk);
    forget(&log, &all());
    let mut map = DirtyMap::new(VOLUME_BYTES);
    for (first, count) in [(5, 3), (4035 * REGION_BLOCKS + 7, 2000)] {
        map.mark(first, count);
        now(log.cover(&Range { volume: 0, first, count })).unwrap();
    }
    now(log.save(&[map.clone()])).unwrap();
    disk.crash(|| false);
    let (log, known) = open(&disk);
    assert_eq!((known.suspect.count(), known.dirty.count()), (0, map.count()));
    assert!(known.dirty.contains(6) && known.dirty.contains(4035 * REGION_BLOCKS + 7));
    drop(log);
    // It was opened, so it may have been written since.
    let (_, known) = open(&disk);
    assert!(known.dirty.is_empty() && known.suspect.contains(6));
}

/// Every flipped bit of the sectors is noticed, and costs a comparison at most; a flipped bit of a map likewise.
#[test]
fn damage_makes_suspect_and_never_clean() {
    let disk = disk();
    let (log, _) = open(&disk);
    forget(&log, &all());
    now(log.cover(&region(100))).unwrap();
    let mut map = DirtyMap::new(VOLUME_BYTES);
    map.mark(100 * REGION_BLOCKS + 1, 1);
    now(log.save(&[map])).unwrap();
    drop(log);
    let whole = disk.snapshot();
    let offsets = (0..3 * SECTOR_BYTES as u64).step_by(37).chain([map_offset(VOLUME_BYTES, 100)]);
    for offset in offsets {
        let disk = Arc::new(CrashDevice::new(whole.clone()));
        disk.flip(offset, 0x10);
        let (_, known) = open(&disk);
        assert!(known.suspect.contains(100 * REGION_BLOCKS + 1), "flipped at {offset}");
    }
}

/// Would catch a resized disk whose old marks are taken for new ones.
#[test]
fn a_log_of_a_disk_of_another_size_is_begun_anew() {
    let disk = disk();
    let (log, _) = open(&disk);
    forget(&log, &all());
    let file = LogFile { name: "test".to_owned(), device: disk, volume_bytes: VOLUME_BYTES - 4096 };
    let (_, known) = now(DirtyLog::open(vec![file])).unwrap();
    assert_eq!(known[0].suspect.count(), DirtyMap::full(VOLUME_BYTES - 4096).count());
}

#[test]
fn a_log_that_cannot_be_written_refuses_new_regions_and_no_others() {
    let disk = disk();
    let faults = Arc::new(blockdev::FaultDevice::new(disk));
    let file = LogFile { name: "test".to_owned(), device: faults.clone(), volume_bytes: VOLUME_BYTES };
    let (log, _) = now(DirtyLog::open(vec![file])).unwrap();
    forget(&log, &all());
    now(log.cover(&region(8))).unwrap();
    faults.inject(blockdev::Fault::nth(blockdev::Operation::Flush, 0, 5));
    let error = now(log.cover(&region(64))).unwrap_err().to_string();
    assert!(
        error.starts_with("dirty log test: cannot sync at offset 0: ") && error.ends_with("check the disk of state_dir"),
        "{error}"
    );
    assert!(now(log.cover(&region(64))).is_err(), "a failed sync is not tried again");
    now(log.cover(&region(9))).unwrap();
    // Upkeep, which may have begun before the failure: its regions are durable, and the file is not touched any more.
    forget(&log, &[8, 9]);
    now(log.cover(&region(8))).unwrap();
    now(log.cover(&region(9))).unwrap();
    assert_eq!(log.failure(), Some(error));
}

/// Would catch a start that believes what it reads: after a failed sync the system's cache has bits that the disk will never get.
#[test]
fn a_bit_that_a_failed_sync_left_in_the_cache_is_made_durable_by_the_next_start() {
    let disk = disk();
    let (log, _) = open(&disk);
    forget(&log, &all());
    now(disk.flush()).unwrap();
    disk.fail_next_flush();
    now(log.cover(&region(4035))).unwrap_err();
    disk.reopen(false);
    let (log, _) = open(&disk);
    assert!(log.covers(&region(4035)), "it is read as set, so a write is let through");
    disk.crash(|| false);
    let (_, known) = open(&disk);
    assert!(known.suspect.contains(4035 * REGION_BLOCKS), "and forgotten");
}

/// Two writers of different regions share the syncs of the one that came first.
#[test]
fn waiting_writes_share_a_sync() {
    let disk = disk();
    let slow = Arc::new(blockdev::DelayDevice::new(disk.clone(), std::time::Duration::ZERO));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let file = LogFile { name: "test".to_owned(), device: slow.clone(), volume_bytes: VOLUME_BYTES };
        let (log, _) = DirtyLog::open(vec![file]).await.unwrap();
        let everything = all();
        everything.iter().for_each(|r| log.unset(0, *r));
        log.write_unset(&[everything]).await.unwrap();
        let before = disk.operations().1;
        slow.hold(blockdev::Operation::Flush);
        let covers = futures_util::future::join_all((0..50).map(|i| {
            let log = &log;
            async move { log.cover(&region(i * 16)).await.unwrap() }
        }));
        tokio::join!(covers, async {
            slow.until_held(1).await;
            slow.release();
        });
        assert_eq!(disk.operations().1 - before, 2, "one for the first, one for all that came meanwhile");
    });
}

/// What the log may be believed about: regions that a write was let through to, and have not been clean at a recorded point since.
#[derive(Default)]
struct Guest {
    written: std::collections::BTreeSet<u64>,
}

impl Guest {
    fn write(&mut self, log: &DirtyLog, number: u64) -> io::Result<()> {
        now(log.cover(&region(number)))?;
        self.written.insert(number);
        Ok(())
    }

    /// One step of a life, chosen by `kind`. Fails when the power is gone.
    fn step(&mut self, log: &DirtyLog, kind: u32, number: u64) -> io::Result<()> {
        match kind {
            0..=4 => self.write(log, number),
            // It is clean, and the point that made it so is recorded.
            5..=6 if self.written.remove(&number) => {
                log.unset(0, number);
                now(log.write_unset(&[vec![number]])).map_err(io::Error::other)
            }
            // Forgotten in memory only, then written again before the file is changed.
            7 => {
                log.unset(0, number);
                self.write(log, number)?;
                now(log.write_unset(&[vec![number]])).map_err(io::Error::other)
            }
            _ => Ok(()),
        }
    }

    /// The exact map of a clean stop, and the next start after it.
    fn stop(&self, log: &DirtyLog) -> io::Result<()> {
        let mut map = DirtyMap::new(VOLUME_BYTES);
        self.written.iter().for_each(|r| map.mark(r * REGION_BLOCKS, 1));
        now(log.save(&[map])).map_err(io::Error::other)
    }

    fn check(&self, known: &Known, what: &str) {
        for region in &self.written {
            let block = region * REGION_BLOCKS;
            assert!(known.suspect.contains(block) || known.dirty.contains(block), "{what}: region {region} is forgotten");
        }
    }
}

/// A life from the start to a clean stop, in which the power goes at some time.
fn live(disk: &Arc<CrashDevice>, seed: u64) -> Guest {
    let (mut random, mut guest) = (SmallRng::seed_from_u64(seed), Guest::default());
    let file = || LogFile { name: "test".to_owned(), device: disk.clone(), volume_bytes: VOLUME_BYTES };
    let Ok((mut log, _)) = now(DirtyLog::open(vec![file()])) else { return guest };
    for step in 0..24 {
        let number = *[3, 60, 100, 4031, 4032, 4040].get(random.random_range(0..6)).unwrap();
        if guest.step(&log, random.random_range(0..8), number).is_err() {
            break;
        }
        if step % 8 == 7 {
            if guest.stop(&log).is_err() {
                break;
            }
            match now(DirtyLog::open(vec![file()])) {
                Ok((again, known)) => {
                    guest.check(&known[0], "after a clean stop");
                    assert!(known[0].suspect.is_empty(), "a clean stop leaves nothing to compare");
                    log = again;
                }
                Err(_) => break,
            }
        }
    }
    guest
}

/// The power goes after every single write and flush of a life, with the sectors that were not flushed all kept, all lost, each one alone kept
/// or lost, and in random mixtures. What must hold: no region is forgotten that a write was let through to.
#[test]
fn no_crash_point_forgets_a_region_that_was_written() {
    let (mut points, mut images) = (0_u64, 0_u64);
    for seed in 0..4 {
        let begun = disk();
        let (log, _) = open(&begun);
        forget(&log, &all());
        drop(log);
        now(begun.flush()).unwrap();
        let start = begun.snapshot();
        let fresh = || Arc::new(CrashDevice::new(start.clone()));
        let disk = fresh();
        live(&disk, seed);
        let (writes, flushes) = disk.operations();
        for point in 0..=writes + flushes {
            points += 1;
            let mut random = SmallRng::seed_from_u64(seed * 10_000 + point);
            // 0: all lost, 1: all kept, then each of the last sectors alone, then mixtures.
            for pattern in 0..14_u64 {
                let disk = fresh();
                disk.power_off_after(point);
                let guest = live(&disk, seed);
                let mut sector = 0;
                disk.crash(|| {
                    sector += 1;
                    match pattern {
                        0 => false,
                        1 => true,
                        2..=5 => sector == pattern - 1,
                        6..=9 => sector != pattern - 5,
                        _ => random.random_bool(0.5),
                    }
                });
                images += 1;
                let (_, known) = open(&disk);
                guest.check(&known, &format!("seed {seed}, crash point {point}, pattern {pattern}"));
            }
        }
    }
    println!("dirty log: {points} crash points, {images} images");
    assert!(points > 200);
}

/// A small log, and what was written to the disk that it speaks of.
const FLIPPED_VOLUME_BYTES: u64 = 70 * REGION_BYTES + 5000;
/// Blocks that differ from the copy, in three regions.
const FLIPPED_DIRTY: [u64; 3] = [3 * REGION_BLOCKS + 5, 40 * REGION_BLOCKS, 70 * REGION_BLOCKS + 1];

fn flipped_open(disk: &Arc<CrashDevice>) -> (DirtyLog, Known) {
    let file = LogFile { name: FLIPPED_NAME.to_owned(), device: disk.clone(), volume_bytes: FLIPPED_VOLUME_BYTES };
    let (log, mut known) = now(DirtyLog::open(vec![file])).unwrap();
    (log, known.remove(0))
}

const FLIPPED_NAME: &str = "flipped";

/// What a clean stop leaves, or a crash.
fn flipped_log(clean: bool) -> Vec<u8> {
    let disk = Arc::new(CrashDevice::new(vec![0; log_bytes(FLIPPED_VOLUME_BYTES) as usize]));
    let (log, _) = flipped_open(&disk);
    forget(&log, &(0..71).collect::<Vec<_>>());
    let mut map = DirtyMap::new(FLIPPED_VOLUME_BYTES);
    for block in FLIPPED_DIRTY {
        map.mark(block, 1);
        now(log.cover(&Range { volume: 0, first: block, count: 1 })).unwrap();
    }
    if clean {
        now(log.save(&[map])).unwrap();
    }
    disk.crash(|| true);
    disk.snapshot()
}

/// Every warning of this thread.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::WARN
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Line<'a>(&'a Warnings);
        impl tracing::field::Visit for Line<'_> {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                if field.name() == "message" {
                    self.0.0.lock().push(format!("{value:?}"));
                }
            }
        }
        event.record(&mut Line(self));
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

/// Every bit of every byte of header, bits and maps, after a clean stop and after a crash. What must hold: no block is forgotten; what the
/// start relies on is named with its offset and costs a comparison; what it does not rely on changes nothing.
#[test]
fn no_flipped_bit_of_a_log_forgets_a_block() {
    let mut counts = [0_usize; 2];
    for clean in [true, false] {
        let whole = flipped_log(clean);
        let (_, known) = flipped_open(&Arc::new(CrashDevice::new(whole.clone())));
        let (blocks, suspects) = (known.dirty.count(), known.suspect.count());
        assert_eq!((blocks, suspects > 0), if clean { (3, false) } else { (0, true) });
        let maps = map_offset(FLIPPED_VOLUME_BYTES, 0);
        let region_map = |region| maps + region * proto::dirty::REGION_BITMAP_BYTES as u64;
        // Regions are marked in eights. Bits beyond the end of the disk are never cleared.
        let is_marked =
            |offset: u64| [0..8, 40..48, 64..128].iter().any(|r| (region_map(r.start)..region_map(r.end)).contains(&offset));
        for bit in 0..whole.len() as u64 * 8 {
            let offset = bit / 8;
            let what = format!("bit {bit}, offset {offset}, {}", if clean { "clean stop" } else { "crash" });
            let disk = Arc::new(CrashDevice::new(whole.clone()));
            disk.flip(offset, 1 << (bit % 8));
            let warnings = Warnings::default();
            let (log, known) = tracing::subscriber::with_default(warnings.clone(), || flipped_open(&disk));
            for block in FLIPPED_DIRTY {
                assert!(known.suspect.contains(block) || known.dirty.contains(block), "{what}: block {block} is forgotten");
                assert!(log.covers(&Range { volume: 0, first: block, count: 1 }), "{what}: the region of {block} is not marked");
            }
            let named = match offset {
                0..512 => Some("at offset 0"),
                512..1024 => Some("at offset 512"),
                _ if clean && is_marked(offset) => Some("from offset 4096 on"),
                _ => None,
            };
            let said = warnings.0.lock().join("\n");
            match named {
                Some(named) => {
                    assert!(said.starts_with(&format!("dirty log {FLIPPED_NAME}: ")) && said.contains(named), "{what}: {said}");
                    assert!(
                        known.suspect.count() > suspects || (named != "at offset 0" && !known.suspect.is_empty()),
                        "{what}: nothing is compared"
                    );
                }
                None => {
                    assert!(said.is_empty(), "{what}: {said}");
                    assert_eq!((known.dirty.count(), known.suspect.count()), (blocks, suspects), "{what}");
                }
            }
            counts[usize::from(named.is_some())] += 1;
            // The next start trusts what this one wrote.
            drop(log);
            let (_, again) = flipped_open(&disk);
            assert!(FLIPPED_DIRTY.iter().all(|block| again.suspect.contains(*block)), "{what}: forgotten by the start after");
        }
    }
    println!("dirty log: {} bits flipped that are named, {} that nothing relies on", counts[1], counts[0]);
    assert!(counts[1] > 2 * 1024 * 8, "{counts:?}");
}
