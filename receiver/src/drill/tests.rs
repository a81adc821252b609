//! Drills on a base that is not empty: what they may change, what they may take, and what a start leaves of them.

use std::path::PathBuf;

use blockdev::{Buf, IoThreads, ZeroMode};
use proto::units::BLOCK_BYTES;
use proto::{EpochId, Generation};

use super::*;
use crate::group::{PointEntry, Usage};
use crate::journal::{JournalOptions, Mark};
use crate::store::Store;
use crate::superblock::{Superblock, Volume};

const BLOCKS: u64 = 64;
const SIZE: u64 = BLOCKS * BLOCK_BYTES;

struct Scene {
    _dir: tempfile::TempDir,
    group: Arc<Group>,
    image: Vec<u8>,
    io: IoThreads,
}

fn scene() -> Scene {
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
    let options = JournalOptions { segment_bytes_max: 1 << 20, disk: Default::default() };
    let group = Group::open(folder, Arc::new(Usage::default()), options).unwrap();
    group.shared.state.write().points.push(PointEntry {
        point,
        cut_unix_us: 77,
        first_write_unix_us: 0,
        frame_bytes: 0,
        data_blocks: 0,
        zero_blocks: 0,
        session: Default::default(),
        end: Mark { segment: 1, bytes: 0 },
        next_frame: 0,
    });
    Scene { _dir: dir, group, image, io: IoThreads::new(1).unwrap() }
}

fn wish(name: &str, blocks_max: u64) -> DrillWish {
    DrillWish { name: name.parse().unwrap(), point: None, space_max_bytes: blocks_max * BLOCK_BYTES }
}

impl Scene {
    fn forks(&self) -> PathBuf {
        self.group.shared.folder.path.join("forks")
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.forks()).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn write(&self, drill: &Drill, block: u64, blocks: u64, fill: u8) -> std::io::Result<()> {
        let device = Arc::clone(&drill.volumes[0].1);
        let data = vec![fill; (blocks * BLOCK_BYTES) as usize];
        let offset = block * BLOCK_BYTES;
        self.io
            .block_on(move || async move {
                match device.try_write(offset, &data) {
                    Some(done) => done,
                    None => device.write(offset, Buf::copy_of(&data)).await.map(drop),
                }
            })
            .unwrap()
    }

    fn trim(&self, drill: &Drill, offset: u64, length: u64) -> std::io::Result<()> {
        let device = Arc::clone(&drill.volumes[0].1);
        self.io.block_on(move || async move { device.trim(offset, length).await }).unwrap()
    }

    fn read(&self, drill: &Drill) -> Vec<u8> {
        let device = Arc::clone(&drill.volumes[0].1);
        self.io.block_on(move || async move { device.read(0, Buf::zeroed(SIZE as usize)).await }).unwrap().unwrap().to_vec()
    }
}

/// Would catch a drill that writes through to the base or to another drill, or that takes the reserve of a failover.
#[test]
fn two_drills_see_their_own_writes_only() {
    let scene = scene();
    let (a, b) = (make(&scene.group, &wish("drill-1", 64)).unwrap(), make(&scene.group, &wish("drill-2", 64)).unwrap());
    assert_eq!((a.point.to_string(), a.cut_unix_us), ("1.1".to_owned(), 77));
    scene.write(&a, 3, 2, 0xaa).unwrap();
    scene.write(&b, 4, 2, 0xbb).unwrap();
    let mut wanted = scene.image.clone();
    wanted[3 * 4096..5 * 4096].fill(0xaa);
    assert!(scene.read(&a) == wanted);
    wanted = scene.image.clone();
    wanted[4 * 4096..6 * 4096].fill(0xbb);
    assert!(scene.read(&b) == wanted);
    let folder = &scene.group.shared.folder;
    assert!(std::fs::read(folder.base(&"root".parse().unwrap())).unwrap() == scene.image);
    assert!(folder.path.join("reserve").exists(), "the reserve is a failover's");
    let taken = make(&scene.group, &wish("drill-1", 64)).unwrap_err().to_string();
    assert!(taken.contains("has a drill 'drill-1' already"), "{taken}");
    end(&a).unwrap();
    assert_eq!(scene.names(), ["drill-2"]);
    assert!(scene.read(&b) == wanted);
}

/// Would catch a limit that is not kept, that counts a block twice, that a trim does not give back, or that a trim of the whole disk uses up.
#[test]
fn blocks_beyond_the_limit_are_refused_and_a_trim_gives_them_back() {
    let scene = scene();
    let drill = make(&scene.group, &wish("drill-1", 4)).unwrap();
    let full = |done: std::io::Result<()>| assert_eq!(done.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    scene.trim(&drill, 0, SIZE).unwrap();
    assert_eq!(drill.space.used_bytes(), 0);
    scene.write(&drill, 0, 3, 1).unwrap();
    scene.write(&drill, 1, 2, 2).unwrap();
    assert_eq!(drill.space.used_bytes(), 3 * BLOCK_BYTES);
    full(scene.write(&drill, 10, 2, 3));
    assert_eq!((drill.space.used_bytes(), drill.space.refused_writes()), (3 * BLOCK_BYTES, 1));
    scene.write(&drill, 10, 1, 3).unwrap();
    full(scene.write(&drill, 11, 1, 3));
    // A part of a block that was not written yet takes a block.
    full(scene.trim(&drill, 20 * BLOCK_BYTES + 100, 200));
    scene.trim(&drill, 0, 2 * BLOCK_BYTES + 1).unwrap();
    assert_eq!(drill.space.used_bytes(), 2 * BLOCK_BYTES);
    scene.write(&drill, 30, 2, 4).unwrap();
    full(scene.write(&drill, 40, 1, 4));
    let mut wanted = vec![0; SIZE as usize];
    wanted[2 * 4096 + 1..3 * 4096].fill(2);
    wanted[10 * 4096..11 * 4096].fill(3);
    wanted[30 * 4096..32 * 4096].fill(4);
    assert!(scene.read(&drill) == wanted);
}

/// Zeroes that must keep their space are counted as what they are.
#[test]
fn zeroes_without_holes_take_space() {
    let scene = scene();
    let drill = make(&scene.group, &wish("drill-1", 4)).unwrap();
    let device = Arc::clone(&drill.volumes[0].1);
    let mode = ZeroMode { may_unmap: false, fast_only: false };
    let zeroed = scene.io.block_on(move || async move { device.write_zeroes(0, 3 * BLOCK_BYTES, mode).await });
    zeroed.unwrap().unwrap();
    assert_eq!(drill.space.used_bytes(), 3 * BLOCK_BYTES);
}

/// Would catch a start that keeps what a killed node left of drills, or that throws away anything else.
#[test]
fn a_start_removes_drills_and_nothing_else() {
    let scene = scene();
    let drill = make(&scene.group, &wish("drill-1", 4)).unwrap();
    scene.write(&drill, 0, 1, 1).unwrap();
    drop(drill);
    for kept in ["active-2", "diverged-2", "mine"] {
        std::fs::create_dir(scene.forks().join(kept)).unwrap();
        std::fs::write(scene.forks().join(kept).join("root.raw"), "kept").unwrap();
    }
    std::fs::create_dir(scene.forks().join(".new-drill-7")).unwrap();
    sweep(&Disk::default(), &scene.group.shared.folder);
    assert_eq!(scene.names(), ["active-2", "diverged-2", "mine"]);
}

/// Would catch half a drill that is left behind by a creation that failed.
#[test]
fn a_name_that_is_none_and_a_point_that_is_none_leave_nothing() {
    let scene = scene();
    let error = make(&scene.group, &wish("active-3", 4)).unwrap_err().to_string();
    assert!(error.contains("begins with drill-"), "{error}");
    let nowhere = DrillWish { point: Some("1.9".parse().unwrap()), ..wish("drill-1", 4) };
    assert!(make(&scene.group, &nowhere).unwrap_err().to_string().contains("has no point 1.9"));
    // A second try of the name succeeds where the first one failed half-way: the base is away for a moment.
    let base = scene.group.shared.folder.base(&"root".parse().unwrap());
    std::fs::rename(&base, base.with_extension("away")).unwrap();
    assert!(make(&scene.group, &wish("drill-1", 4)).is_err());
    std::fs::rename(base.with_extension("away"), &base).unwrap();
    assert_eq!(scene.names(), Vec::<String>::new());
    make(&scene.group, &wish("drill-1", 4)).unwrap();
}
