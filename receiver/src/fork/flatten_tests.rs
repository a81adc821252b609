//! Flattening against a plain byte vector and a plain set of written blocks: in pieces, between writes, across restarts and kills.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockdev::{BlockDevice, Buf, IoThreads, ZeroMode};
use parking_lot::Mutex;
use proptest::prelude::*;
use proto::units::BLOCK_BYTES;
use tokio::sync::Semaphore;

use super::map::MapFile;
use super::own::regions_bytes;
use super::tests::{Op, SIZE, Scene, another_boot, op, read_all, scene, scene_on};
use super::*;
use crate::disk::Op as DiskOp;

const BLOCKS: u64 = SIZE.div_ceil(BLOCK_BYTES);

/// A scene whose view has holes, a block of written zeroes and data.
fn holey() -> Scene {
    let mut scene = scene();
    let base = scene.group.shared.folder.base(&"root".parse().unwrap());
    for blocks in [5..9, 20..31] {
        scene.image[(blocks.start * BLOCK_BYTES) as usize..(blocks.end * BLOCK_BYTES) as usize].fill(0);
    }
    let file = std::fs::File::create(&base).unwrap();
    file.set_len(SIZE).unwrap();
    for block in (0..BLOCKS).filter(|b| !(5..8).contains(b) && !(20..31).contains(b)) {
        let (from, to) = ((block * BLOCK_BYTES) as usize, SIZE.min((block + 1) * BLOCK_BYTES) as usize);
        file.write_all_at(&scene.image[from..to], from as u64).unwrap();
    }
    crate::base::write_sums(&base);
    scene
}

impl Scene {
    fn folder(&self) -> PathBuf {
        self.group.shared.folder.fork(&self.fork.name)
    }

    fn maps(&self) -> (MapFile, MapFile) {
        let open = |kind: &str, bytes| {
            let path = self.folder().join(format!("root.{kind}"));
            MapFile::open_or_create(&self.group.shared.disk, &path, &header(&self.group.shared, self.fork.point, bytes))
                .unwrap()
                .0
        };
        (open("touched", regions_bytes(SIZE)), open("flat", SIZE))
    }
}

fn written(device: &ForkDevice) -> BTreeSet<u64> {
    let own = device.own.read();
    (0..BLOCKS).filter(|block| own.written.blocks.contains(*block)).collect()
}

/// Copies `blocks`, with their bits on disk if `synced`.
async fn copy(scene: &Scene, device: &ForkDevice, blocks: std::ops::Range<u64>, synced: bool) {
    let (touched, flat) = scene.maps();
    device.begin_copies(touched).await;
    if let Some(view) = device.view() {
        device.take_over(&view.for_copying().unwrap(), blocks).await.unwrap();
    }
    if synced {
        device.sync_copies(&flat).await.unwrap();
        device.notice_flat();
    }
}

#[derive(Clone, Debug)]
enum Step {
    Guest(Op),
    Copy(u64, u64, bool),
    /// Nothing is flushed, nothing settled: what a process leaves that is killed.
    Kill,
    /// The machine starts again, with the data that the disk happened to have: here all.
    PowerLoss,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => op().prop_map(Step::Guest),
        5 => (0..BLOCKS, 1..12_u64, any::<bool>()).prop_map(|(first, n, synced)| Step::Copy(first, (first + n).min(BLOCKS), synced)),
        1 => Just(Step::Kill),
        1 => Just(Step::PowerLoss),
    ]
}

async fn guest(device: &ForkDevice, op: &Op) {
    let bytes = |seed: u8, length: u64| vec![seed; length as usize];
    match op {
        Op::Write(at, length, seed) => drop(device.write(*at, Buf::copy_of(&bytes(*seed, *length))).await.unwrap()),
        Op::TryWrite(at, length, seed) => match device.try_write(*at, &bytes(*seed, *length)) {
            Some(done) => done.unwrap(),
            None => drop(device.write(*at, Buf::copy_of(&bytes(*seed, *length))).await.unwrap()),
        },
        Op::Zero(at, length, may_unmap) => {
            device.write_zeroes(*at, *length, ZeroMode { may_unmap: *may_unmap, fast_only: false }).await.unwrap();
        }
        Op::Trim(at, length) => device.trim(*at, *length).await.unwrap(),
        Op::Flush => device.flush().await.unwrap(),
        // In order.
        Op::Reopen => {
            device.flush().await.unwrap();
            device.settle(None).await.unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Would catch a copy that undoes a write, a copied block that counts as written or a written one that does not, also after a kill;
    /// and a data file that is not the disk at the end.
    #[test]
    fn behaves_like_bytes_and_a_set(steps in prop::collection::vec(step(), 1..40)) {
        let scene = Arc::new(holey());
        let (mut oracle, mut model) = (scene.image.clone(), BTreeSet::new());
        // Whether a kill may have made blocks count as written that were only copied.
        let mut is_exact = true;
        // What a loss of power may lose: blocks changed since the last flush read as they are now or as before, which the page cache decides. Here
        // written data stays, unwritten bits do not. A kill loses nothing.
        let mut flushed = (oracle.clone(), model.clone());
        let mut copied_bits: BTreeSet<u64> = BTreeSet::new();
        let io = IoThreads::new(1).unwrap();
        let mut device = scene.open();
        for step in steps {
            let (mut reopen, power_lost) = (false, matches!(step, Step::PowerLoss));
            match &step {
                Step::Guest(op) => {
                    let range = match op {
                        Op::Write(a, l, s) | Op::TryWrite(a, l, s) => Some((*a, *l, *s)),
                        Op::Zero(a, l, _) | Op::Trim(a, l) => Some((*a, *l, 0)),
                        Op::Flush => None,
                        Op::Reopen => { reopen = true; None }
                    };
                    if let Some((at, length, seed)) = range {
                        oracle[at as usize..(at + length) as usize].fill(seed);
                        model.extend(at / BLOCK_BYTES..(at + length).div_ceil(BLOCK_BYTES));
                    } else {
                        flushed = (oracle.clone(), model.clone());
                    }
                }
                Step::Copy(..) => {}
                Step::Kill => {
                    reopen = true;
                    is_exact &= device.own.read().touched.is_empty();
                }
                Step::PowerLoss => {
                    reopen = true;
                    // Of blocks whose bit is not on disk the view is seen again, unless a copied bit is.
                    for block in model.clone() {
                        let range = (block * BLOCK_BYTES) as usize..SIZE.min((block + 1) * BLOCK_BYTES) as usize;
                        if flushed.1.contains(&block) {
                            continue;
                        }
                        if copied_bits.contains(&block) {
                            is_exact = false;
                        } else {
                            model.remove(&block);
                            oracle[range.clone()].copy_from_slice(&scene.image[range]);
                        }
                    }
                    is_exact &= device.own.read().touched.is_empty();
                    flushed = (oracle.clone(), model.clone());
                }
            }
            let (shared, this, step) = (Arc::clone(&device), Arc::clone(&scene), step.clone());
            io.block_on(move || async move {
                match &step {
                    Step::Guest(op) => guest(&shared, op).await,
                    Step::Copy(first, end, synced) => copy(&this, &shared, *first..*end, *synced).await,
                    Step::Kill | Step::PowerLoss => {}
                }
            }).unwrap();
            if reopen {
                drop(device);
                if power_lost {
                    another_boot(&scene.raw());
                }
                device = scene.open();
            }
            // Bits on disk: everything copied by the last synced copy, as the file says.
            let path = scene.folder().join("root.flat");
            if path.exists() {
                let bits = MapFile::open(&scene.group.shared.disk, &path, &header(&scene.group.shared, scene.fork.point, SIZE)).unwrap().1;
                copied_bits = (0..BLOCKS).filter(|block| bits.contains(*block)).collect();
            }
            let found = written(&device);
            if is_exact {
                prop_assert_eq!(&found, &model);
            } else {
                prop_assert!(found.is_superset(&model), "{:?} lacks some of {:?}", found, model);
                // From here on as the device has it: the region was suspect once.
                model = found.clone();
                if reopen {
                    flushed.1 = found;
                    is_exact = true;
                }
            }
        }
        let (shared, this) = (Arc::clone(&device), Arc::clone(&scene));
        let found = io.block_on(move || async move {
            let found = read_all(&shared).await;
            copy(&this, &shared, 0..BLOCKS, true).await;
            assert!(shared.is_flat() && shared.view().is_none(), "all of it was copied");
            assert!(read_all(&shared).await == found, "flattening changes nothing");
            shared.flush().await.unwrap();
            shared.settle(None).await.unwrap();
            found
        }).unwrap();
        prop_assert!(found == oracle);
        prop_assert!(std::fs::read(scene.raw()).unwrap() == oracle, "the data file is the disk");
        let before = written(&device);
        drop(device);
        prop_assert_eq!(written(&scene.open()), before);
    }
}

/// Would catch a hole of the view that shows what a killed process had written there.
#[test]
fn a_hole_is_zeroes_whatever_a_lost_write_left() {
    let scene = Arc::new(holey());
    let device = scene.open();
    let raw = std::fs::OpenOptions::new().write(true).open(scene.raw()).unwrap();
    raw.write_all_at(&[7; 3 * 4096], 21 * BLOCK_BYTES).unwrap();
    let io = IoThreads::new(1).unwrap();
    let (shared, this) = (Arc::clone(&device), Arc::clone(&scene));
    io.block_on(move || async move { copy(&this, &shared, 0..BLOCKS, true).await }).unwrap();
    assert!(device.is_flat());
    assert!(std::fs::read(scene.raw()).unwrap() == scene.image);
    // Holes stay holes: eleven blocks of one, three of the other, and one that was zeroes on the disk.
    use std::os::unix::fs::MetadataExt;
    let allocated = raw.metadata().unwrap().blocks() * 512;
    assert!(allocated <= (BLOCKS - 15) * BLOCK_BYTES, "{allocated} bytes are allocated");
}

/// The thread itself, from start to the marker, with a guest that writes all the while; then the journal and base may go.
#[test]
fn a_fork_becomes_flat_behind_its_guest_and_needs_its_view_no_more() {
    let scene = Arc::new(holey());
    let fork = Arc::new(super::open(&scene.group.shared, proto::Generation(2), &scene.fork).unwrap());
    assert!(super::pins(&scene.group.shared, &scene.fork));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let io = IoThreads::new(1).unwrap();
    let flattening = Flattening::start(Arc::clone(&scene.group.shared), Arc::clone(&fork), Arc::new(Semaphore::new(1))).unwrap();
    let device = Arc::clone(&fork.volumes[0].1);
    let mut oracle = scene.image.clone();
    let until = std::time::Instant::now() + std::time::Duration::from_secs(30);
    let mut n = 0_u64;
    while flattening.status().state != FlattenState::Flat {
        assert!(std::time::Instant::now() < until, "{:?}", flattening.status());
        let at = (n * 7919) % (SIZE - 300);
        oracle[at as usize..at as usize + 300].fill(n as u8);
        let writer = Arc::clone(&device);
        io.block_on(move || async move { writer.write(at, Buf::copy_of(&[n as u8; 300])).await.map(drop) }).unwrap().unwrap();
        n += 1;
    }
    let status = flattening.status();
    assert_eq!((status.done_bytes, status.total_bytes, status.error), (SIZE, SIZE, None));
    runtime.block_on(flattening.stop());
    drop((device, fork));
    assert!(std::fs::read(scene.raw()).unwrap() == oracle);
    // Nothing of the view is asked for any more.
    assert!(!super::pins(&scene.group.shared, &scene.fork));
    std::fs::write(scene.group.shared.folder.base(&"root".parse().unwrap()), vec![9; SIZE as usize]).unwrap();
    let device = scene.open();
    let reader = Arc::clone(&device);
    assert!(io.block_on(move || async move { read_all(&reader).await }).unwrap() == oracle);
}

/// Would catch a write that a flat copy shows after a loss of power and that its map does not know of: going back would leave it out.
#[test]
fn what_was_written_before_it_was_flat_counts_as_written_after_a_power_loss() {
    let scene = Arc::new(holey());
    let fork = Arc::new(super::open(&scene.group.shared, proto::Generation(2), &scene.fork).unwrap());
    let io = IoThreads::new(1).unwrap();
    let writer = Arc::clone(&fork.volumes[0].1);
    // Never flushed by its guest.
    io.block_on(move || async move { writer.write(0, Buf::copy_of(&[7; 4096])).await.map(drop) }).unwrap().unwrap();
    let flattening = Flattening::start(Arc::clone(&scene.group.shared), Arc::clone(&fork), Arc::new(Semaphore::new(1))).unwrap();
    let until = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while flattening.status().state != FlattenState::Flat {
        assert!(std::time::Instant::now() < until, "{:?}", flattening.status());
        std::thread::yield_now();
    }
    // Not stopped in order: nothing is settled.
    drop((flattening, fork));
    another_boot(&scene.raw());
    assert!(std::fs::read(scene.raw()).unwrap()[..4096] == [7; 4096], "the copy shows it");
    assert_eq!(written(&scene.open()), BTreeSet::from([0]));
}

/// Would catch a write to a flat copy that is lost, or not known of, by a kill, though the file of what is not flushed does not have it.
#[test]
fn what_is_written_to_a_flat_fork_survives_a_kill_without_the_file_of_what_is_not_flushed() {
    let scene = Arc::new(holey());
    let io = IoThreads::new(1).unwrap();
    let recent = scene.raw().with_extension("recent");
    let mut image = scene.image.clone();
    let write = |device: &Arc<ForkDevice>, image: &mut Vec<u8>, at: u64, fill: u8| {
        image[at as usize..at as usize + 5000].fill(fill);
        let writer = Arc::clone(device);
        io.block_on(move || async move { writer.write(at, Buf::copy_of(&[fill; 5000])).await.map(drop) }).unwrap().unwrap();
    };
    let device = scene.open();
    write(&device, &mut image, 30 * BLOCK_BYTES, 1);
    let (shared, this) = (Arc::clone(&device), Arc::clone(&scene));
    io.block_on(move || async move { copy(&this, &shared, 0..BLOCKS, true).await }).unwrap();
    assert!(device.is_flat());
    let noted = std::fs::read(&recent).unwrap();
    write(&device, &mut image, 3 * BLOCK_BYTES, 2);
    assert!(std::fs::read(&recent).unwrap() == noted, "a flat fork notes nothing");
    drop(device);
    for (round, at) in [8, 12].into_iter().enumerate() {
        // Killed before and after the marker was made, which is when all bits are durable.
        if round == 1 {
            let device = scene.open();
            io.block_on(move || async move { device.flush().await.unwrap() }).unwrap();
            std::fs::write(scene.folder().join(FLAT_FILE), "").unwrap();
            std::fs::remove_file(&recent).unwrap();
        }
        let device = scene.open();
        assert!(written(&device).is_superset(&BTreeSet::from([3, 4, 30, 31])), "{round}");
        let reader = Arc::clone(&device);
        assert!(io.block_on(move || async move { read_all(&reader).await }).unwrap() == image, "{round}");
        write(&device, &mut image, at * BLOCK_BYTES, 3);
        drop(device);
        let device = scene.open();
        assert!(written(&device).is_superset(&BTreeSet::from([at, at + 1])), "{round}");
        assert!(io.block_on(move || async move { read_all(&device).await }).unwrap() == image, "{round}");
    }
    assert!(!recent.exists(), "nor does it begin the file");
}

/// Would catch a sync of a map on the thread that serves the guests of other disks.
#[test]
fn a_map_whose_sync_hangs_holds_up_no_other_disk() {
    for held in ["root.map", "root.touched", "root.flat"] {
        let (go_on, waits) = std::sync::mpsc::channel::<()>();
        let (waits, armed, begun) = (Mutex::new(waits), Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (arm, begin) = (Arc::clone(&armed), Arc::clone(&begun));
        let disk = Disk::faulty(move |op| match op {
            DiskOp::Sync(path) if path.ends_with(held) && arm.load(Ordering::SeqCst) => {
                begin.store(true, Ordering::SeqCst);
                waits.lock().recv_timeout(Duration::from_secs(30)).map_err(std::io::Error::other)
            }
            _ => Ok(()),
        });
        let scene = scene_on(disk);
        let io = IoThreads::new(1).unwrap();
        let device = scene.open();
        io.block_on(move || async move {
            // A block that is only copied, so that the next write has to touch its region.
            let (touched, flat) = scene.maps();
            device.begin_copies(touched).await;
            device.take_over(&device.view().unwrap().for_copying().unwrap(), 0..1).await.unwrap();
            device.sync_copies(&flat).await.unwrap();
            device.take_over(&device.view().unwrap().for_copying().unwrap(), 1..2).await.unwrap();
            armed.store(true, Ordering::SeqCst);
            let guest = async {
                device.write(0, Buf::zeroed(BLOCK_BYTES as usize)).await?;
                device.flush().await?;
                device.sync_copies(&flat).await
            };
            // As another disk's guest on this thread would be.
            let other = async {
                while !begun.load(Ordering::SeqCst) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                go_on.send(()).unwrap();
            };
            let (done, ()) = futures_util::future::join(guest, other).await;
            done.unwrap_or_else(|error| panic!("{held}: {error}"));
        })
        .unwrap();
    }
}
