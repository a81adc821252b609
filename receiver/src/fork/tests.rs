//! Forks against a plain byte vector, across restarts and power loss.

use std::sync::Arc;

use blockdev::{BlockDevice, Buf, IoThreads, ZeroMode};
use proptest::prelude::*;
use proto::units::BLOCK_BYTES;
use proto::{EpochId, Generation, Point};

use super::*;
use crate::group::{Group, Usage};
use crate::journal::JournalOptions;
use crate::store::Store;
use crate::superblock::{Superblock, Volume};

pub(super) const SIZE: u64 = 40 * BLOCK_BYTES + 100;

pub(super) struct Scene {
    _dir: tempfile::TempDir,
    pub(super) group: Arc<Group>,
    pub(super) fork: ForkInUse,
    pub(super) image: Vec<u8>,
}

/// A group whose base is not empty, so that the view has something to show; no journal is needed for that.
pub(super) fn scene() -> Scene {
    scene_on(Disk::default())
}

/// As [`scene`], on a disk of the caller.
pub(super) fn scene_on(disk: Disk) -> Scene {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let point = Point { generation: Generation(1), epoch: EpochId(1) };
    let block = Superblock {
        group_id: [1; 16],
        owner: "SHA256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".parse().unwrap(),
        generation: Generation(1),
        role: proto::fencing::GroupRole::Replica,
        base: Some(point),
        base_seal: Default::default(),
        folding: None,
        synced: None,
        fork: None,
        first_segment: 1,
        created_unix_us: 0,
        volumes: vec![Volume { name: "root".parse().unwrap(), size_bytes: SIZE }],
    };
    let folder = store.create_group(&"a".parse().unwrap(), &"db".parse().unwrap(), block).unwrap();
    let image: Vec<u8> = (0..SIZE).map(|i| (i / 7) as u8).collect();
    std::fs::write(folder.base(&"root".parse().unwrap()), &image).unwrap();
    crate::base::write_sums(&folder.base(&"root".parse().unwrap()));
    let options = JournalOptions { segment_bytes_max: 1 << 20, disk };
    let group = Group::open(folder, Arc::new(Usage::default()), options).unwrap();
    let fork = ForkInUse { name: "active-2".parse().unwrap(), point };
    Scene { _dir: dir, group, fork, image }
}

impl Scene {
    pub(super) fn open(&self) -> Arc<ForkDevice> {
        let fork = super::open(&self.group.shared, Generation(2), &self.fork).unwrap();
        Arc::clone(&fork.volumes[0].1)
    }

    pub(super) fn raw(&self) -> PathBuf {
        self.group.shared.folder.fork(&self.fork.name).join("root.raw")
    }
}

/// As if the machine had been started again since.
pub(super) fn another_boot(raw: &Path) {
    let recent = raw.with_extension("recent");
    let mut content = std::fs::read(&recent).unwrap();
    content[RECENT_MAGIC.len()] ^= 1;
    std::fs::write(&recent, content).unwrap();
}

#[derive(Clone, Debug)]
pub(super) enum Op {
    Write(u64, u64, u8),
    TryWrite(u64, u64, u8),
    Zero(u64, u64, bool),
    Trim(u64, u64),
    Flush,
    Reopen,
}

pub(super) fn op() -> impl Strategy<Value = Op> {
    let range = || {
        prop_oneof![(0..SIZE, 1..20_000_u64), (0..41_u64, 1..5_u64).prop_map(|(a, n)| (a * BLOCK_BYTES, n * BLOCK_BYTES))]
            .prop_map(|(at, len)| (at.min(SIZE - 1), len.min(SIZE - at.min(SIZE - 1))))
    };
    prop_oneof![
        4 => (range(), any::<u8>()).prop_map(|((a, l), s)| Op::Write(a, l, s)),
        2 => (range(), any::<u8>()).prop_map(|((a, l), s)| Op::TryWrite(a, l, s)),
        2 => (range(), any::<bool>()).prop_map(|((a, l), u)| Op::Zero(a, l, u)),
        1 => range().prop_map(|(a, l)| Op::Trim(a, l)),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
    ]
}

pub(super) async fn read_all(device: &ForkDevice) -> Vec<u8> {
    device.read(0, Buf::zeroed(SIZE as usize)).await.unwrap().to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Reads give what was written, zeroed or trimmed, and the view elsewhere; extents never call data a hole; a clean
    /// restart changes nothing.
    #[test]
    fn behaves_like_bytes(ops in prop::collection::vec(op(), 1..30)) {
        let scene = scene();
        let mut oracle = scene.image.clone();
        let io = IoThreads::new(1).unwrap();
        let mut device = scene.open();
        for op in ops {
            let fill = |o: &mut Vec<u8>, a: u64, l: u64, b: u8| o[a as usize..(a + l) as usize].fill(b);
            match &op {
                Op::Write(a, l, s) | Op::TryWrite(a, l, s) => fill(&mut oracle, *a, *l, *s),
                Op::Zero(a, l, _) | Op::Trim(a, l) => fill(&mut oracle, *a, *l, 0),
                Op::Flush | Op::Reopen => {}
            }
            let reopen = matches!(op, Op::Reopen);
            let shared = Arc::clone(&device);
            io.block_on(move || async move {
                match op {
                    Op::Write(a, l, s) => drop(shared.write(a, Buf::copy_of(&vec![s; l as usize])).await.unwrap()),
                    Op::TryWrite(a, l, s) => match shared.try_write(a, &vec![s; l as usize]) {
                        Some(done) => done.unwrap(),
                        None => drop(shared.write(a, Buf::copy_of(&vec![s; l as usize])).await.unwrap()),
                    },
                    Op::Zero(a, l, may_unmap) => {
                        shared.write_zeroes(a, l, ZeroMode { may_unmap, fast_only: false }).await.unwrap();
                    }
                    Op::Trim(a, l) => shared.trim(a, l).await.unwrap(),
                    Op::Flush | Op::Reopen => shared.flush().await.unwrap(),
                }
            }).unwrap();
            if reopen {
                drop(device);
                device = scene.open();
            }
        }
        let shared = Arc::clone(&device);
        let (found, extents) = io.block_on(move || async move {
            (read_all(&shared).await, shared.extents(0, SIZE, 1000).await.unwrap())
        }).unwrap();
        prop_assert!(found == oracle);
        let mut at = 0;
        for extent in extents {
            let part = &oracle[at as usize..(at + extent.length) as usize];
            prop_assert!(extent.kind == blockdev::ExtentKind::Data || part.iter().all(|b| *b == 0));
            at += extent.length;
        }
        prop_assert_eq!(at, SIZE);
    }
}

/// Power lost before a flush: the map claims only blocks whose data was synced, so a block reads as the view or as what was
/// flushed, never as a hole.
#[test]
fn what_was_not_flushed_is_not_claimed() {
    let scene = scene();
    let io = IoThreads::new(1).unwrap();
    let device = scene.open();
    let shared = Arc::clone(&device);
    io.block_on(move || async move {
        shared.write(0, Buf::copy_of(&[1; 5000])).await.unwrap();
        shared.flush().await.unwrap();
        shared.write(10 * BLOCK_BYTES, Buf::copy_of(&[2; 4096])).await.unwrap();
    })
    .unwrap();
    assert_eq!(device.own_bytes(), 3 * BLOCK_BYTES);
    drop(device);
    another_boot(&scene.raw());
    // The data that was not synced is lost: a hole. The map on disk does not claim it.
    let mut raw = std::fs::read(scene.raw()).unwrap();
    raw[10 * 4096..11 * 4096].fill(0);
    std::fs::write(scene.raw(), raw).unwrap();
    let device = scene.open();
    assert_eq!(device.own_bytes(), 2 * BLOCK_BYTES);
    let found = io.block_on(move || async move { read_all(&device).await }).unwrap();
    let mut image = scene.image.clone();
    image[..5000].fill(1);
    assert!(found == image);
}

/// The process is killed before a flush: the guest has its answers, connects again and flushes, and all of it must be there; also when it is killed again.
#[test]
fn what_was_not_flushed_survives_a_kill() {
    let scene = scene();
    let io = IoThreads::new(1).unwrap();
    let mut image = scene.image.clone();
    for round in 0..3_u8 {
        let device = scene.open();
        for n in 0..8_u64 {
            let (at, fill) = ((n * 5 + u64::from(round)) * BLOCK_BYTES + n * 100, round * 16 + n as u8 + 1);
            let length = (BLOCK_BYTES * (n % 3) + 50).min(SIZE - at);
            image[at as usize..(at + length) as usize].fill(if n == 7 { 0 } else { fill });
            let device = Arc::clone(&device);
            io.block_on(move || async move {
                if n == 7 {
                    device.trim(at, length).await.unwrap();
                } else if n % 2 == 0 || device.try_write(at, &vec![fill; length as usize]).is_none() {
                    device.write(at, Buf::copy_of(&vec![fill; length as usize])).await.unwrap();
                }
            })
            .unwrap();
        }
        // Nothing is flushed when a device is dropped, and nothing else knows what was written.
        drop(device);
        let again = scene.open();
        let reader = Arc::clone(&again);
        assert!(io.block_on(move || async move { read_all(&reader).await }).unwrap() == image, "killed {round} times");
    }
    // What was recovered is in the map after a flush, whatever becomes of the machine.
    let device = scene.open();
    io.block_on(move || async move { device.flush().await.unwrap() }).unwrap();
    std::fs::remove_file(scene.raw().with_extension("recent")).unwrap();
    let device = scene.open();
    assert!(io.block_on(move || async move { read_all(&device).await }).unwrap() == image);
}

/// Many unaligned writers to the same blocks at once: no byte outside a write is ever lost.
#[test]
fn unaligned_writers_of_one_block_do_not_undo_each_other() {
    let scene = scene();
    let io = IoThreads::new(2).unwrap();
    for round in 0..20_u64 {
        let device = scene.open();
        let base = (round % 30) * BLOCK_BYTES;
        let mut tasks = Vec::new();
        for i in 0..32_u64 {
            let device = Arc::clone(&device);
            tasks.push(
                io.call(move || async move { device.write(base + i * 256, Buf::copy_of(&[i as u8 + 100; 256])).await.map(drop) }),
            );
        }
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            for task in tasks {
                task.await.unwrap().unwrap();
            }
        });
        let reader = Arc::clone(&device);
        let found = io.block_on(move || async move { read_all(&reader).await }).unwrap();
        for i in 0..32_usize {
            let at = base as usize + i * 256;
            assert!(found[at..at + 256].iter().all(|b| *b == i as u8 + 100), "round {round} piece {i}");
        }
        drop(device);
        std::fs::remove_dir_all(scene.group.shared.folder.fork(&scene.fork.name)).unwrap();
    }
}

/// A fork's file that is gone, or of another point, is refused by name; nothing is made up in its place.
#[test]
fn a_fork_with_a_missing_part_is_refused() {
    let scene = scene();
    drop(scene.open());
    let again = |fork: &ForkInUse| super::open(&scene.group.shared, Generation(2), fork).unwrap_err().to_string();
    std::fs::remove_file(scene.raw()).unwrap();
    assert!(again(&scene.fork).contains("root.raw: the fork's file is missing"));
}
