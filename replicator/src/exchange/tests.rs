//! Exchanges beside captures, against the images themselves: every epoch must be exactly one of them.
//!
//! Every read yields a random number of times, so that an exchange may fall anywhere into a pass. What is caught: a cut within an exchange, a
//! block that a frozen epoch takes from the image after its cut, a difference that is not marked.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use blockdev::{Buf, Extent, ExtentKind, IoFuture, MemoryDevice, SwitchDevice, ZeroMode};
use parking_lot::Mutex;
use proto::frame::FRAME_HEADER_BYTES;
use proto::pass::{PassHeader, PassKind};
use proto::seal::Tally;
use proto::units::BLOCK_BYTES;
use proto::{BlockExtent, BlockIndex, Codec, EpochId, Frame, FrameHeader, FrameKind, Generation, Point};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::capture::{CaptureCounters, Pass};
use crate::compress::Compressor;
use crate::dirtylog::{Known, LogFile, log_bytes};
use crate::ledger::{CopiedRun, Copy, CopyLimits, Range, Step};
use crate::outbox::{Item, Outbox};

const VOLUMES: usize = 2;
/// Not a multiple of a block.
const SIZE: u64 = 70 * BLOCK_BYTES + 300;
const BLOCKS: u64 = 71;
const EXCHANGES: u64 = 25;
const EPOCHS: u64 = 20;
const SEEDS: u64 = 60;

/// A volume at one point: it never changes, and dawdles.
struct Frozen {
    bytes: Vec<u8>,
    random: Mutex<SmallRng>,
}

impl Frozen {
    async fn dawdle(&self) {
        let times = self.random.lock().random_range(0..6);
        for _ in 0..times {
            tokio::task::yield_now().await;
        }
    }
}

fn never<'a, T: 'a>() -> IoFuture<'a, T> {
    Box::pin(std::future::ready(Err(io::ErrorKind::ReadOnlyFilesystem.into())))
}

impl BlockDevice for Frozen {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read<'a>(&'a self, offset: u64, mut buf: Buf) -> IoFuture<'a, Buf> {
        Box::pin(async move {
            self.dawdle().await;
            let length = buf.len();
            buf.copy_from_slice(&self.bytes[offset as usize..offset as usize + length]);
            self.dawdle().await;
            Ok(buf)
        })
    }

    fn write<'a>(&'a self, _offset: u64, _data: Buf) -> IoFuture<'a, Buf> {
        never()
    }

    fn flush<'a>(&'a self) -> IoFuture<'a, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn write_zeroes<'a>(&'a self, _offset: u64, _length: u64, _mode: ZeroMode) -> IoFuture<'a, ()> {
        never()
    }

    fn trim<'a>(&'a self, _offset: u64, _length: u64) -> IoFuture<'a, ()> {
        never()
    }

    fn extents<'a>(&'a self, _offset: u64, length: u64, _extents_max: usize) -> IoFuture<'a, Vec<Extent>> {
        Box::pin(std::future::ready(Ok(vec![Extent { length, kind: ExtentKind::Data }])))
    }
}

type Image = Vec<Vec<u8>>;

struct World {
    ledger: Ledger,
    log: DirtyLog,
    gate: Gate,
    as_of: AtomicU64,
    switches: Vec<Arc<SwitchDevice>>,
    scanners: Vec<Arc<dyn BlockDevice>>,
    spill: MemoryDevice,
    /// All that were shown, the newest last; what is being exchanged is there already.
    images: RefCell<Vec<Image>>,
    over: Cell<bool>,
}

fn device(bytes: &[u8], random: &mut SmallRng) -> Arc<dyn BlockDevice> {
    Arc::new(Frozen { bytes: bytes.to_vec(), random: Mutex::new(SmallRng::seed_from_u64(random.random())) })
}

/// Exchanges image after image; some differ in nearly all blocks, and some blocks are named that do not differ.
async fn exchanges(world: Rc<World>, seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed);
    let group = "db".parse().unwrap();
    for _ in 0..EXCHANGES {
        let mut image = world.images.borrow().last().unwrap().clone();
        let mut differing: Vec<DirtyMap> = (0..VOLUMES).map(|_| DirtyMap::new(SIZE)).collect();
        let many = random.random_range(1..60);
        for _ in 0..many {
            let (volume, block) = (random.random_range(0..VOLUMES), random.random_range(0..BLOCKS));
            let range = (block * BLOCK_BYTES) as usize..((block + 1) * BLOCK_BYTES).min(SIZE) as usize;
            // Zeroes travel another way.
            let value = if random.random_bool(0.2) { 0 } else { random.random() };
            image[volume][range].fill(value);
            differing[volume].mark(block, random.random_range(1..3));
        }
        // No two images are the same.
        let number = world.images.borrow().len() as u64;
        image[0][..8].copy_from_slice(&number.to_le_bytes());
        differing[0].mark(0, 1);
        let disks: Vec<_> = image.iter().map(|bytes| device(bytes, &mut random)).collect();
        world.images.borrow_mut().push(image);
        let switches = world.switches.clone();
        let exchange = Exchange {
            differing,
            before: world.switches.iter().map(|switch| switch.inner()).collect(),
            as_of_unix_us: Some(world.images.borrow().len() as u64),
            in_any_case: false,
            make: Box::new(move || switches.iter().zip(disks).try_for_each(|(switch, disk)| switch.exchange(disk))),
        };
        let World { ledger, log, gate, as_of, .. } = &*world;
        Parts { group: &group, ledger, log, gate, as_of_unix_us: as_of }.make(exchange).await.unwrap();
        for _ in 0..random.random_range(0..400) {
            tokio::task::yield_now().await;
        }
    }
    world.over.set(true);
}

fn apply(image: &mut Image, queue: &Outbox) {
    while let Some(item) = queue.try_next() {
        let Item::Frame(bytes) = item else { continue };
        let header = FrameHeader::decode(bytes[..FRAME_HEADER_BYTES].try_into().unwrap()).unwrap();
        let frame = Frame::decode(&bytes, BLOCKS).unwrap();
        let content = frame.content().unwrap();
        let (volume, mut at) = (&mut image[usize::from(header.volume.0)], 0);
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

async fn pass(world: &World, queue: &Outbox, (epoch, pass, kind): (EpochId, u16, PassKind), tally: &mut Tally) -> u64 {
    let job = Pass {
        ledger: &world.ledger,
        devices: &world.scanners,
        spill: &world.spill,
        queue,
        counters: &CaptureCounters::default(),
        header: PassHeader { epoch, pass, kind, continued: false },
        compressor: Compressor::new(Codec::Raw),
        interval: Duration::from_secs(1),
        tally,
    };
    job.run(|| world.as_of.load(Ordering::SeqCst)).await.unwrap()
}

/// Epoch after epoch, and a last one when all is over. Returns which of the images they were.
async fn epochs(world: Rc<World>, seed: u64) -> BTreeSet<usize> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut image = vec![vec![0xEE; SIZE as usize]; VOLUMES];
    let (mut epoch, mut newest, mut seen, mut last) = (EpochId(1), 0, BTreeSet::new(), false);
    while !last {
        last = world.over.get() && epoch.0 > EPOCHS;
        let (queue, mut tally) = (Outbox::new(1 << 30), Tally::default());
        let fuzzy = random.random_range(0..3);
        let mut cut = 0;
        for number in 0..=fuzzy {
            let kind = if number == fuzzy { PassKind::Frozen } else { PassKind::Fuzzy };
            cut = pass(&world, &queue, (epoch, number, kind), &mut tally).await;
        }
        world.ledger.seal(epoch);
        if random.random_bool(0.1) && !last {
            // The connection breaks: nothing of it arrives.
            world.ledger.merge_sealed();
            continue;
        }
        apply(&mut image, &queue);
        let found = {
            let images = world.images.borrow();
            (newest..images.len()).find(|at| images[*at] == image)
        };
        let found = found.unwrap_or_else(|| panic!("epoch {epoch} is none of the images from {newest} on"));
        // The cut says of which instant it is, and never of a later one.
        assert!(cut as usize <= found + 1, "epoch {epoch} is image {found} and says {cut}");
        newest = found;
        seen.insert(found);
        world.ledger.committed(Point { generation: Generation(1), epoch });
        epoch = epoch.next();
        for _ in 0..random.random_range(0..30) {
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(newest + 1, world.images.borrow().len(), "the last image arrived");
    assert_eq!(world.ledger.summary().uncommitted_bytes, 0);
    seen
}

fn run(seed: u64) -> usize {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async move {
        let mut random = SmallRng::seed_from_u64(seed);
        let first: Image = (0..VOLUMES).map(|_| (0..SIZE).map(|at| (at / BLOCK_BYTES) as u8).collect()).collect();
        let switch = |bytes: &Vec<u8>| Arc::new(SwitchDevice::new(device(bytes, &mut random)));
        let switches: Vec<_> = first.iter().map(switch).collect();
        let file =
            || LogFile { name: "memory".to_owned(), device: Arc::new(MemoryDevice::new(log_bytes(SIZE))), volume_bytes: SIZE };
        let (log, _) = DirtyLog::open((0..VOLUMES).map(|_| file()).collect()).await.unwrap();
        let known = || Known { suspect: DirtyMap::new(SIZE), dirty: DirtyMap::full(SIZE) };
        let limits = CopyLimits { memory_bytes: 0, spill_bytes: 0 };
        let world = Rc::new(World {
            ledger: Ledger::new(vec![SIZE; VOLUMES], limits, (0..VOLUMES).map(|_| known()).collect()),
            log,
            gate: Gate::default(),
            as_of: AtomicU64::new(1),
            scanners: switches.iter().map(|switch| switch.clone() as Arc<dyn BlockDevice>).collect(),
            switches,
            spill: MemoryDevice::new(4096),
            images: RefCell::new(vec![first]),
            over: Cell::new(false),
        });
        let exchanging = tokio::task::spawn_local(exchanges(world.clone(), seed ^ 1));
        let seen = epochs(world.clone(), seed ^ 2).await;
        exchanging.await.unwrap();
        seen.len()
    })
}

/// Of random seeds; a failure prints its own.
#[test]
fn every_epoch_is_one_of_the_images() {
    let (first, mut seen) = (rand::random::<u64>(), 0);
    for seed in (0..SEEDS).map(|n| first.wrapping_add(n)) {
        println!("seed {seed}");
        seen += run(seed);
    }
    println!("{seen} images in epochs, of {}", SEEDS * EXCHANGES);
    assert!(seen as u64 > SEEDS * 4, "epochs fell among the exchanges");
}

fn ledger() -> Ledger {
    let known = Known { suspect: DirtyMap::new(SIZE), dirty: DirtyMap::new(SIZE) };
    Ledger::new(vec![SIZE], CopyLimits { memory_bytes: 1 << 20, spill_bytes: 0 }, vec![known])
}

/// Would catch an exchange under a guest's copy before its write, which would then copy the new content.
#[test]
fn an_exchange_waits_for_copies_under_way() {
    let ledger = ledger();
    let range = Range { volume: 0, first: 3, count: 1 };
    drop(ledger.admit(range, Instant::now));
    ledger.freeze(EpochId(1));
    let ticket = ledger.admit(range, Instant::now);
    let Step::Copy { claim, .. } = ledger.step(&ticket, &range) else { panic!("the block is needed") };
    let mut differing = DirtyMap::new(SIZE);
    differing.mark(0, 10);
    let (differing, before) = (vec![differing], vec![Arc::new(MemoryDevice::new(SIZE)) as Arc<dyn BlockDevice>]);
    let exchange = ledger.admit_all(&differing, Instant::now);
    assert!(!ledger.leave_behind(&exchange, &differing, &before));
    let extent = BlockExtent { start: BlockIndex(3), blocks: 1 };
    let content = Copy::Memory(Buf::zeroed(BLOCK_BYTES as usize));
    ledger.copied(claim, Some(vec![CopiedRun { volume: 0, extent, content }]));
    assert!(ledger.leave_behind(&exchange, &differing, &before));
}

/// Would catch an exchange after the word that nothing changes any more.
#[test]
fn nothing_is_exchanged_while_the_group_holds_still() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let (ledger, gate, group) = (ledger(), Gate::default(), "db".parse().unwrap());
        let file =
            LogFile { name: "memory".to_owned(), device: Arc::new(MemoryDevice::new(log_bytes(SIZE))), volume_bytes: SIZE };
        let (log, _) = DirtyLog::open(vec![file]).await.unwrap();
        let as_of = AtomicU64::new(0);
        let parts = Parts { group: &group, ledger: &ledger, log: &log, gate: &gate, as_of_unix_us: &as_of };
        let made = Arc::new(AtomicU64::new(0));
        let exchange = |in_any_case| {
            let made = made.clone();
            let make = Box::new(move || {
                made.fetch_add(1, Ordering::SeqCst);
                Ok(())
            });
            Exchange { differing: vec![DirtyMap::full(SIZE)], before: Vec::new(), as_of_unix_us: None, in_any_case, make }
        };
        for closed in [Closed::Drained, Closed::Handback] {
            gate.close(closed);
            assert!(matches!(parts.make(exchange(false)).await, Err(ExchangeError::Held { .. })));
            assert_eq!(made.swap(0, Ordering::SeqCst), 0);
            parts.make(exchange(true)).await.unwrap();
            assert_eq!(made.swap(0, Ordering::SeqCst), 1);
        }
        gate.close(Closed::Fenced);
        parts.make(exchange(false)).await.unwrap();
        assert_eq!(made.load(Ordering::SeqCst), 1);
        assert!(ledger.is_quiet());
    });
}
