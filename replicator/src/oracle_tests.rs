//! Tap, ledger and capture together against a plain oracle that keeps the image of every cut.
//!
//! Many writers with overlapping, unaligned and straddling writes, zeroes and trims run interleaved with passes on one thread;
//! every device operation yields a random number of times, so that any await may be overtaken by any other. What is caught:
//! a lost mark, a block read after a later write, a torn copy-before-write, a straddling write in the wrong epoch, a merge that
//! forgets; and a scrub that says of a block what it did not hold at the cut, or overlooks one.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockdev::{BlockDevice, Buf, Extent, ExtentKind, IoFuture, MemoryDevice, ZeroMode};
use parking_lot::Mutex;
use proptest::prelude::*;
use proto::pass::{PassHeader, PassKind};
use proto::seal::Tally;
use proto::units::BLOCK_BYTES;
use proto::{Codec, DirtyMap, EpochId, Frame, FrameHeader, FrameKind, Generation, Name, Point, ScrubOutcome, Scrubbed};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::capture::{CaptureCounters, CaptureError, Pass};
use crate::compress::Compressor;
use crate::dirtylog::{DirtyLog, Known, LogFile, log_bytes};
use crate::ledger::{CopyLimits, Ledger};
use crate::outbox::{Item, Outbox};
use crate::scrub::{Board, Scrub};
use crate::tap::Tap;

const VOLUMES: usize = 2;
/// Not a multiple of a block; more than one frame, small enough that everything collides.
const SIZE: u64 = 50 * BLOCK_BYTES + 700;

thread_local! {
    /// The number of frozen cuts at the start of the operation that is being polled.
    static TAG: Cell<u64> = const { Cell::new(0) };
}

/// One change as it reached a disk.
struct Applied {
    tag: u64,
    volume: usize,
    offset: usize,
    data: Vec<u8>,
}

#[derive(Default)]
struct Log(Mutex<Vec<Applied>>);

/// A disk in memory that dawdles.
struct SlowDisk {
    volume: usize,
    bytes: Mutex<Vec<u8>>,
    log: Arc<Log>,
    random: Mutex<SmallRng>,
}

impl SlowDisk {
    async fn dawdle(&self) {
        let times = self.random.lock().random_range(0..6);
        for _ in 0..times {
            tokio::task::yield_now().await;
        }
    }

    fn apply(&self, tag: u64, offset: u64, data: &[u8]) {
        let offset = offset as usize;
        self.bytes.lock()[offset..offset + data.len()].copy_from_slice(data);
        self.log.0.lock().push(Applied { tag, volume: self.volume, offset, data: data.to_vec() });
    }
}

impl BlockDevice for SlowDisk {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read<'a>(&'a self, offset: u64, mut buf: Buf) -> IoFuture<'a, Buf> {
        Box::pin(async move {
            self.dawdle().await;
            // A read is not atomic either: its halves may see different instants.
            let half = buf.len() / 2;
            let at = offset as usize;
            buf[..half].copy_from_slice(&self.bytes.lock()[at..at + half]);
            self.dawdle().await;
            let length = buf.len();
            buf[half..].copy_from_slice(&self.bytes.lock()[at + half..at + length]);
            self.dawdle().await;
            Ok(buf)
        })
    }

    fn write<'a>(&'a self, offset: u64, data: Buf) -> IoFuture<'a, Buf> {
        let tag = TAG.get();
        Box::pin(async move {
            self.dawdle().await;
            self.apply(tag, offset, &data);
            self.dawdle().await;
            Ok(data)
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn write_zeroes<'a>(&'a self, offset: u64, length: u64, _mode: ZeroMode) -> IoFuture<'a, ()> {
        let tag = TAG.get();
        Box::pin(async move {
            self.dawdle().await;
            self.apply(tag, offset, &vec![0; length as usize]);
            self.dawdle().await;
            Ok(())
        })
    }

    fn trim<'a>(&'a self, _offset: u64, _length: u64) -> IoFuture<'a, ()> {
        unreachable!("the tap turns trims into zeroes")
    }

    /// Reports whole zero blocks at the start as a hole, as a sparse file would.
    fn extents<'a>(&'a self, offset: u64, length: u64, _extents_max: usize) -> IoFuture<'a, Vec<Extent>> {
        Box::pin(async move {
            self.dawdle().await;
            let bytes = self.bytes.lock();
            let range = &bytes[offset as usize..(offset + length) as usize];
            let zeroes = range.iter().take_while(|b| **b == 0).count() as u64 / BLOCK_BYTES * BLOCK_BYTES;
            let (length, kind) = if zeroes > 0 { (zeroes, ExtentKind::Hole) } else { (length, ExtentKind::Data) };
            Ok(vec![Extent { length, kind }])
        })
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        if self.random.lock().random_bool(0.5) {
            return None;
        }
        let at = offset as usize;
        buf.copy_from_slice(&self.bytes.lock()[at..at + buf.len()]);
        Some(Ok(()))
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Option<io::Result<()>> {
        if self.random.lock().random_bool(0.5) {
            return None;
        }
        self.apply(TAG.get(), offset, data);
        Some(Ok(()))
    }
}

/// Polls `operation` with its tag in place. Its first poll follows at once, so it is admitted under that tag.
async fn tagged<T>(tag: u64, operation: impl Future<Output = T>) -> T {
    let mut operation = pin!(operation);
    poll_fn(|cx| {
        TAG.set(tag);
        operation.as_mut().poll(cx)
    })
    .await
}

struct World {
    taps: Vec<Arc<Tap>>,
    devices: Vec<Arc<dyn BlockDevice>>,
    spill: Arc<dyn BlockDevice>,
    ledger: Arc<Ledger>,
    log: Arc<Log>,
    cuts: Cell<u64>,
    dirty_log: Arc<DirtyLog>,
    board: Board,
    /// What the receiver shows at each epoch that it has.
    images: RefCell<BTreeMap<EpochId, Vec<Vec<u8>>>>,
    over: Cell<bool>,
}

async fn guest(world: Rc<World>, seed: u64, operations: usize) {
    let mut random = SmallRng::seed_from_u64(seed);
    for _ in 0..operations {
        let tap = &world.taps[random.random_range(0..VOLUMES)];
        let offset = random.random_range(0..SIZE);
        let longest = if random.random_bool(0.1) { 40_000 } else { 6_000 };
        let length = random.random_range(1..=(SIZE - offset).min(longest));
        let tag = world.cuts.get();
        match random.random_range(0..10) {
            0 => tagged(tag, tap.trim(offset, length)).await.unwrap(),
            1 => tagged(tag, tap.write_zeroes(offset, length, ZeroMode::default())).await.unwrap(),
            _ => {
                let data = vec![random.random_range(1..=255); length as usize];
                TAG.set(tag);
                if tap.try_write(offset, &data).is_none() {
                    tagged(tag, tap.write(offset, Buf::copy_of(&data))).await.unwrap();
                }
            }
        }
        if random.random_bool(0.3) {
            tokio::task::yield_now().await;
        }
    }
}

/// What a receiver answers to a scrub.
fn compare(images: &BTreeMap<EpochId, Vec<Vec<u8>>>, scrub: &proto::Scrub) -> ScrubOutcome {
    let Some(image) = images.get(&scrub.epoch) else { return ScrubOutcome::Stale };
    let mut volume = image[usize::from(scrub.volume.0)].clone();
    volume.resize(SIZE.next_multiple_of(BLOCK_BYTES) as usize, 0);
    let differs = |run: &proto::ScrubRun| {
        let range = (run.extent.start.0 * BLOCK_BYTES) as usize..(run.extent.end() * BLOCK_BYTES) as usize;
        proto::hashes::hash(&volume[range]) != run.hash
    };
    let differing = (0..).zip(&scrub.runs).filter(|(_, run)| differs(run)).map(|(number, _)| number);
    ScrubOutcome::Compared { differing: differing.collect() }
}

/// Scrubs until told to stop. Answers come late, and some are stale.
async fn scrubber(world: Rc<World>, seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed);
    let queue = Outbox::new(1 << 30);
    let scrub =
        Scrub { ledger: &world.ledger, log: &world.dirty_log, devices: &world.devices, queue: &queue, board: &world.board };
    let mut asked = Vec::new();
    while !world.over.get() {
        scrub.step(Instant::now()).await.unwrap();
        while let Some(Item::Scrub(scrub)) = queue.try_next() {
            asked.push(scrub);
        }
        while asked.len() > random.random_range(0..4) {
            let message = asked.swap_remove(random.random_range(0..asked.len()));
            let stale = random.random_bool(0.1);
            let outcome = if stale { ScrubOutcome::Stale } else { compare(&world.images.borrow(), &message) };
            if let ScrubOutcome::Compared { differing } = &outcome {
                assert!(
                    differing.is_empty(),
                    "a false difference at epoch {}: {differing:?} of {:?}",
                    message.epoch,
                    message.runs
                );
            }
            scrub.answered(Scrubbed { id: message.id, outcome }, Instant::now()).await.unwrap();
        }
        for _ in 0..random.random_range(1..10) {
            tokio::task::yield_now().await;
        }
    }
    world.board.session_over();
}

/// The disks are quiet and committed: one whole pass compares every block, and finds the one that was changed behind the tap's back.
async fn find_a_change_behind_the_tap(world: &World, disks: &[Arc<SlowDisk>], seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed);
    let (volume, at) = (random.random_range(0..VOLUMES), random.random_range(0..SIZE as usize));
    disks[volume].bytes.lock()[at] ^= 1;
    let queue = Outbox::new(1 << 30);
    let scrub =
        Scrub { ledger: &world.ledger, log: &world.dirty_log, devices: &world.devices, queue: &queue, board: &world.board };
    world.board.verify(Instant::now());
    let mut found = 0;
    while world.board.is_verifying() {
        scrub.step(Instant::now()).await.unwrap();
        while let Some(Item::Scrub(message)) = queue.try_next() {
            let outcome = compare(&world.images.borrow(), &message);
            if let ScrubOutcome::Compared { differing } = &outcome {
                found += differing.len();
                for run in differing {
                    let extent = message.runs[usize::from(*run)].extent;
                    assert_eq!(usize::from(message.volume.0), volume);
                    assert!((extent.start.0..extent.end()).contains(&(at as u64 / BLOCK_BYTES)));
                }
            }
            scrub.answered(Scrubbed { id: message.id, outcome }, Instant::now()).await.unwrap();
        }
    }
    let verified = world.board.verify_status(Instant::now()).unwrap();
    assert_eq!((found, verified.done_bytes, verified.compared_bytes), (1, verified.total_bytes, verified.total_bytes));
    assert!(verified.differing_bytes > 0);
    assert_eq!(world.ledger.open_bytes(), verified.differing_bytes, "it is sent with the next epoch");
}

fn apply_frames(image: &mut [Vec<u8>], queue: &Outbox) {
    while let Some(item) = queue.try_next() {
        let Item::Frame(bytes) = item else { continue };
        let header = FrameHeader::decode(bytes[..40].try_into().unwrap()).unwrap();
        let frame = Frame::decode(&bytes, proto::units::blocks_of(SIZE)).unwrap();
        let content = frame.content().unwrap();
        let volume = &mut image[header.volume.0 as usize];
        let mut at = 0;
        for extent in &frame.extents {
            let start = (extent.start.0 * BLOCK_BYTES) as usize;
            let end = ((extent.end() * BLOCK_BYTES) as usize).min(volume.len());
            if frame.header.kind == FrameKind::Zero {
                volume[start..end].fill(0);
            } else {
                volume[start..end].copy_from_slice(&content[at..at + end - start]);
                at += extent.blocks as usize * BLOCK_BYTES as usize;
            }
        }
    }
}

fn oracle(log: &Log, cut: u64) -> Vec<Vec<u8>> {
    let mut image = vec![vec![0; SIZE as usize]; VOLUMES];
    for change in log.0.lock().iter().filter(|c| c.tag <= cut) {
        image[change.volume][change.offset..change.offset + change.data.len()].copy_from_slice(&change.data);
    }
    image
}

/// Runs epochs of random passes beside the guests. Returns how many were sealed.
async fn epochs(world: Rc<World>, seed: u64, count: u64) -> u64 {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut image = vec![vec![0; SIZE as usize]; VOLUMES];
    let (mut epoch, mut sealed, mut unacknowledged) = (EpochId(1), 0, Vec::new());
    for _ in 0..count {
        let queue = Outbox::new(1 << 30);
        let counters = CaptureCounters::default();
        let mut tally = Tally::default();
        let fuzzy = random.random_range(0..3);
        let mut result = Ok(0);
        for pass in 0..=fuzzy {
            let kind = if pass == fuzzy { PassKind::Frozen } else { PassKind::Fuzzy };
            if kind == PassKind::Fuzzy && random.random_bool(0.05) {
                result = Err(CaptureError::Stopped);
                break;
            }
            let job = Pass {
                ledger: &world.ledger,
                devices: &world.devices,
                spill: &*world.spill,
                queue: &queue,
                counters: &counters,
                header: PassHeader { epoch, pass, kind, continued: false },
                compressor: Compressor::new(Codec::Lz4),
                // So small a disk is always compressed thoroughly.
                interval: Duration::from_secs(1),
                tally: &mut tally,
            };
            // Called in the same poll as the cut itself: what has started by now belongs to the epoch.
            let cut = || {
                if kind == PassKind::Frozen {
                    world.cuts.set(world.cuts.get() + 1);
                }
                0
            };
            result = job.run(cut).await;
            if result.is_err() {
                break;
            }
        }
        match result {
            Ok(_) => {
                world.ledger.seal(epoch);
                sealed += 1;
                if random.random_bool(0.1) {
                    // The session breaks before this epoch and those before it are committed.
                    world.ledger.merge_sealed();
                    unacknowledged.clear();
                    world.ledger.follow(Generation(1), world.images.borrow().keys().next_back().copied());
                    continue;
                }
                apply_frames(&mut image, &queue);
                let expected = oracle(&world.log, world.cuts.get() - 1);
                for volume in 0..VOLUMES {
                    let differs = (0..SIZE as usize).find(|i| image[volume][*i] != expected[volume][*i]);
                    assert_eq!(differs, None, "volume {volume}, cut {}, epoch {epoch}", world.cuts.get());
                }
                world.images.borrow_mut().insert(epoch, image.clone());
                unacknowledged.push(epoch);
                if random.random_bool(0.5) {
                    world.ledger.committed(Point { generation: Generation(1), epoch });
                    unacknowledged.clear();
                }
                epoch = epoch.next();
            }
            Err(_) => {
                world.ledger.give_up_building();
            }
        }
        for _ in 0..random.random_range(0..20) {
            tokio::task::yield_now().await;
        }
    }
    sealed
}

fn run(seed: u64) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async move {
        let log = Arc::new(Log::default());
        let disks: Vec<Arc<SlowDisk>> = (0..VOLUMES)
            .map(|volume| {
                let random = Mutex::new(SmallRng::seed_from_u64(seed ^ (volume as u64 + 77)));
                Arc::new(SlowDisk { volume, bytes: Mutex::new(vec![0; SIZE as usize]), log: log.clone(), random })
            })
            .collect();
        let devices: Vec<Arc<dyn BlockDevice>> = disks.iter().map(|d| d.clone() as Arc<dyn BlockDevice>).collect();
        let file =
            || LogFile { name: "memory".to_owned(), device: Arc::new(MemoryDevice::new(log_bytes(SIZE))), volume_bytes: SIZE };
        let (dirty_log, _) = DirtyLog::open((0..VOLUMES).map(|_| file()).collect()).await.unwrap();
        let dirty_log = Arc::new(dirty_log);
        let known = || Known { suspect: DirtyMap::new(SIZE), dirty: DirtyMap::full(SIZE) };
        let limits = CopyLimits { memory_bytes: 8 * BLOCK_BYTES, spill_bytes: SIZE * 2 };
        let ledger = Arc::new(Ledger::new(vec![SIZE; VOLUMES], limits, (0..VOLUMES).map(|_| known()).collect()));
        let spill: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(SIZE * 2));
        let taps = devices
            .iter()
            .enumerate()
            .map(|(i, d)| Arc::new(Tap::new(d.clone(), ledger.clone(), dirty_log.clone(), spill.clone(), i)))
            .collect();
        let names: Vec<(Name, u64)> = (0..VOLUMES).map(|i| (format!("disk{i}").parse().unwrap(), SIZE)).collect();
        let board = Board::new("db".parse().unwrap(), &names, None, seed, Instant::now());
        ledger.follow(Generation(1), None);
        let (cuts, images, over) = (Cell::new(0), RefCell::default(), Cell::new(false));
        let world = Rc::new(World { taps, devices, spill, ledger, log, cuts, dirty_log, board, images, over });
        let scrubber = tokio::task::spawn_local(scrubber(world.clone(), seed ^ 0x5c2b));
        let guests: Vec<_> =
            (0..6).map(|g| tokio::task::spawn_local(guest(world.clone(), seed.wrapping_mul(31) + g, 60))).collect();
        let sealed = epochs(world.clone(), seed, 12).await;
        for guest in guests {
            guest.await.unwrap();
        }
        assert!(sealed > 0);
        world.over.set(true);
        scrubber.await.unwrap();
        // Everything is quiet: one more epoch leaves nothing dirty, and the image is the disk.
        world.ledger.merge_sealed();
        let last = RefCell::new(0);
        epochs_quiet(&world, &last).await;
        assert_eq!(world.ledger.summary().uncommitted_bytes, 0);
        assert!(world.ledger.summary().oldest_write.is_none());
        find_a_change_behind_the_tap(&world, &disks, seed).await;
    });
}

async fn epochs_quiet(world: &World, last: &RefCell<u64>) {
    let queue = Outbox::new(1 << 30);
    let counters = CaptureCounters::default();
    world.ledger.mark_all();
    let header = PassHeader { epoch: EpochId(1_000_000), pass: 0, kind: PassKind::Frozen, continued: false };
    let job = Pass {
        ledger: &world.ledger,
        devices: &world.devices,
        spill: &*world.spill,
        queue: &queue,
        counters: &counters,
        header,
        compressor: Compressor::new(Codec::Raw),
        interval: Duration::ZERO,
        tally: &mut Tally::default(),
    };
    job.run(|| {
        *last.borrow_mut() = world.cuts.get();
        0
    })
    .await
    .unwrap();
    world.ledger.seal(header.epoch);
    world.ledger.committed(Point { generation: Generation(1), epoch: header.epoch });
    let mut image = vec![vec![0xEE; SIZE as usize]; VOLUMES];
    apply_frames(&mut image, &queue);
    assert!(image == oracle(&world.log, u64::MAX), "a full pass over a quiet disk is the disk");
    world.images.borrow_mut().insert(header.epoch, image);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, max_shrink_iters: 0, ..ProptestConfig::default() })]
    #[test]
    fn every_cut_is_the_oracles_image(seed in any::<u64>()) {
        run(seed);
    }
}
