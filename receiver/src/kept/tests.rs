//! Kept forks on a base that is not empty: what they hold, what they take, what a start finds of them, and that only a person removes them.

use std::path::PathBuf;

use blockdev::{BlockDevice, Buf, IoThreads};
use proto::EpochId;
use proto::units::BLOCK_BYTES;

use super::*;
use crate::drill::{self, DrillWish, Of};
use crate::group::{Group, Usage};
use crate::journal::JournalOptions;
use crate::store::Store;
use crate::superblock::Superblock;

/// The last block is a part of one.
const SIZE: u64 = 40 * BLOCK_BYTES + 100;

struct Scene {
    dir: tempfile::TempDir,
    group: Arc<Group>,
    usage: Arc<Usage>,
    image: Vec<u8>,
    io: IoThreads,
}

fn point() -> Point {
    Point { generation: Generation(1), epoch: EpochId(1) }
}

fn scene(space_max_bytes: Option<u64>) -> Scene {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let block = Superblock {
        group_id: [1; 16],
        owner: "SHA256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".parse().unwrap(),
        generation: Generation(1),
        role: proto::fencing::GroupRole::Replica,
        base: Some(point()),
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
    let base = folder.base(&"root".parse().unwrap());
    std::fs::write(&base, &image).unwrap();
    crate::base::write_sums(&base);
    let (group, usage) = opened(folder, space_max_bytes);
    Scene { dir, group, usage, image, io: IoThreads::new(1).unwrap() }
}

fn opened(folder: GroupFolder, space_max_bytes: Option<u64>) -> (Arc<Group>, Arc<Usage>) {
    let usage = Arc::new(Usage { max: space_max_bytes, ..Usage::default() });
    let options = JournalOptions { segment_bytes_max: 1 << 20, disk: Default::default() };
    (Group::parked(folder, Arc::clone(&usage), options).unwrap(), usage)
}

impl Scene {
    fn shared(&self) -> &Arc<Shared> {
        &self.group.shared
    }

    fn used(&self) -> u64 {
        self.usage.used.load(Ordering::Relaxed)
    }

    fn forks(&self) -> PathBuf {
        self.dir.path().join("a/db/forks")
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.forks()).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// A fork on its way, with `blocks` of `fill` from `block` on, durable.
    fn arriving(&self, serial: u64, block: u64, blocks: u64, fill: u8) -> Arriving {
        let mut arriving = Arriving::begin(self.shared(), serial, Generation(1), point()).unwrap();
        let length = (blocks * BLOCK_BYTES).min(SIZE - block * BLOCK_BYTES);
        arriving.take(length).unwrap();
        let device = Arc::clone(&arriving.volumes()[0].1);
        let done = self.io.block_on(move || async move {
            device.write(block * BLOCK_BYTES, Buf::copy_of(&vec![fill; length as usize])).await?;
            device.flush().await
        });
        done.unwrap().unwrap();
        arriving
    }

    fn read(&self, device: &Arc<dyn BlockDevice>) -> Vec<u8> {
        let device = Arc::clone(device);
        self.io.block_on(move || async move { device.read(0, Buf::zeroed(SIZE as usize)).await }).unwrap().unwrap().to_vec()
    }

    fn write(&self, device: &Arc<dyn BlockDevice>, fill: u8) -> io::Result<()> {
        let device = Arc::clone(device);
        self.io.block_on(move || async move { device.write(0, Buf::copy_of(&[fill; 8192])).await.map(drop) }).unwrap()
    }

    /// The whole disk that a kept fork is.
    fn whole(&self, fork: &Name) -> Vec<u8> {
        let whole = drill::whole(&self.group, &Of::Fork(fork.clone())).unwrap();
        assert_eq!(whole.point, point());
        assert!(whole.volumes[0].1.read_only());
        assert!(self.write(&whole.volumes[0].1, 9).is_err(), "it is kept as it is");
        self.read(&whole.volumes[0].1)
    }
}

fn wish(of: Of) -> DrillWish {
    DrillWish { name: "drill-1".parse().unwrap(), of, space_max_bytes: 1 << 20 }
}

/// Would catch a fork that is not whole, that a drill of it changes, that is removed under its readers, or whose space and point are held for ever.
#[test]
fn a_kept_fork_is_read_whole_and_never_changed_until_it_is_removed() {
    let scene = scene(None);
    let before = scene.used();
    let name = scene.arriving(7, 38, 3, 0xaa).keep(Generation(1)).unwrap();
    assert_eq!((name.as_str(), scene.names()), ("diverged-1", vec!["diverged-1".to_owned()]));
    let mut wanted = scene.image.clone();
    wanted[38 * 4096..].fill(0xaa);
    let told = scene.shared().kept.all().pop().unwrap();
    assert_eq!((told.point, told.generation, told.own_bytes), (Some(point()), Some(Generation(1)), 3 * BLOCK_BYTES));
    assert!(told.made_unix_us > 0 && told.space_bytes >= told.own_bytes && told.error.is_none(), "{told:?}");
    assert_eq!(scene.used() - before, told.space_bytes);
    assert!(scene.whole(&name) == wanted);
    assert_eq!(scene.shared().pins.oldest(), Some(point()));

    let drill = drill::make(&scene.group, &wish(Of::Fork(name.clone()))).unwrap();
    assert_eq!((drill.point, drill.fork.as_ref()), (point(), Some(&name)));
    assert!(scene.read(&drill.volumes[0].1) == wanted);
    scene.write(&drill.volumes[0].1, 0xbb).unwrap();
    let mut drilled = wanted.clone();
    drilled[..8192].fill(0xbb);
    assert!(scene.read(&drill.volumes[0].1) == drilled, "a drill is its own writes over the fork");
    assert!(scene.whole(&name) == wanted, "and changes nothing of it");
    let in_use = scene.shared().kept.remove(scene.shared(), &name).unwrap_err().to_string();
    assert!(in_use.contains("is being read"), "{in_use}");
    drill::end(&drill).unwrap();
    drop(drill);

    let unknown = scene.shared().kept.remove(scene.shared(), &"active-2".parse().unwrap()).unwrap_err().to_string();
    assert!(unknown.contains("keeps no fork 'active-2': it keeps diverged-1"), "{unknown}");
    scene.shared().kept.remove(scene.shared(), &name).unwrap();
    assert_eq!((scene.names(), scene.used(), scene.shared().pins.oldest()), (Vec::new(), before, None));
    let gone = drill::make(&scene.group, &wish(Of::Fork(name))).unwrap_err().to_string();
    assert!(gone.contains("it keeps none"), "{gone}");
}

/// Would catch a start that forgets a fork, its space or its point, or that keeps what a killed node left of others.
#[test]
fn a_start_finds_what_is_kept_and_removes_what_is_not() {
    let scene = scene(None);
    let first = scene.arriving(7, 3, 2, 0xaa).keep(Generation(1)).unwrap();
    let second = scene.arriving(8, 0, 1, 0xbb).keep(Generation(1)).unwrap();
    assert_eq!((first.as_str(), second.as_str()), ("diverged-1", "diverged-1-2"));
    let (told, used) = (scene.shared().kept.all(), scene.used());
    let mut wanted = scene.image.clone();
    wanted[3 * 4096..5 * 4096].fill(0xaa);
    for left in ["arriving-9", ".new-arriving-10", ".gone-diverged-4"] {
        std::fs::create_dir(scene.forks().join(left)).unwrap();
        std::fs::write(scene.forks().join(left).join("root.raw"), "left").unwrap();
    }
    let folder = scene.shared().folder.clone();
    let Scene { dir, group, image, io, .. } = scene;
    drop(group);
    let (group, usage) = opened(folder.clone(), None);
    let scene = Scene { dir, group, usage, image, io };
    assert_eq!(scene.names(), ["diverged-1", "diverged-1-2"]);
    let again = scene.shared().kept.all();
    // When it was made is the time of a file.
    let plain = |forks: &[KeptFork]| forks.iter().map(|f| KeptFork { made_unix_us: 0, ..f.clone() }).collect::<Vec<_>>();
    assert_eq!((plain(&again), scene.used()), (plain(&told), used));
    assert!(again.iter().zip(&told).all(|(a, b)| a.made_unix_us.abs_diff(b.made_unix_us) < 60_000_000));
    assert_eq!(scene.shared().pins.oldest(), Some(point()));
    assert!(scene.whole(&first) == wanted);

    // A damaged one is told, holds its point, and can be removed; the other one is as it was.
    let map = scene.forks().join("diverged-1-2/root.map");
    let mut bytes = std::fs::read(&map).unwrap();
    bytes[40] ^= 1;
    std::fs::write(&map, bytes).unwrap();
    let Scene { dir, group, image, io, .. } = scene;
    drop(group);
    let (group, usage) = opened(folder, None);
    let scene = Scene { dir, group, usage, image, io };
    let damaged = scene.shared().kept.all().pop().unwrap();
    assert!(damaged.error.as_ref().unwrap().contains("the header at offset 0 is damaged"), "{damaged:?}");
    let refused = drill::whole(&scene.group, &Of::Fork(second.clone())).unwrap_err().to_string();
    assert!(refused.contains("cannot be used"), "{refused}");
    assert!(scene.whole(&first) == wanted);
    scene.shared().kept.remove(scene.shared(), &second).unwrap();
    scene.shared().kept.remove(scene.shared(), &first).unwrap();
    assert_eq!((scene.names(), scene.used(), scene.shared().pins.oldest()), (Vec::new(), 0, None));
}

/// Would catch a primary that takes space or names without limit, or that leaves blocks behind which nobody counts.
#[test]
fn what_does_not_arrive_leaves_nothing_and_there_is_a_limit() {
    let scene = scene(Some(1 << 20));
    let mut arriving = scene.arriving(1, 0, 4, 1);
    assert_eq!((scene.names(), scene.used()), (vec!["arriving-1".to_owned()], 4 * BLOCK_BYTES));
    let full = arriving.take(1 << 20).unwrap_err().to_string();
    assert!(full.contains("has no space left") && full.contains("raise `space_max`"), "{full}");
    // Another conversation about the same group does not touch it.
    let other = scene.arriving(2, 0, 1, 2);
    drop(arriving);
    assert_eq!((scene.names(), scene.used()), (vec!["arriving-2".to_owned()], BLOCK_BYTES));
    drop(other);
    assert_eq!((scene.names(), scene.used(), scene.shared().pins.oldest()), (Vec::new(), 0, None));

    // Its generation is the primary's word: the limit is on all forks.
    for n in 0..KEPT_FORKS_MAX as u64 {
        scene.arriving(10 + n, n, 1, 3).keep(Generation(n)).unwrap();
    }
    let used = scene.used();
    let refused = Arriving::begin(scene.shared(), 99, Generation(77), point()).unwrap_err().to_string();
    assert!(refused.contains("keeps 16 forks") && refused.contains("twinsite forks db --remove"), "{refused}");
    assert_eq!((scene.names().len(), scene.used()), (KEPT_FORKS_MAX, used));
}

/// Would catch a removal that is half done when the disk fails: a fork without its point, or one that nobody can name.
#[test]
fn a_removal_that_fails_leaves_the_fork_as_it_was() {
    let scene = scene(None);
    let name = scene.arriving(1, 0, 1, 5).keep(Generation(1)).unwrap();
    let mut wanted = scene.image.clone();
    wanted[..4096].fill(5);
    // A file in the way of the name that it gets meanwhile.
    std::fs::write(scene.forks().join(format!("{GONE_PREFIX}{name}")), "in the way").unwrap();
    scene.shared().kept.remove(scene.shared(), &name).unwrap_err();
    assert!(scene.whole(&name) == wanted);
    assert_eq!(scene.shared().pins.oldest(), Some(point()));
    std::fs::remove_file(scene.forks().join(format!("{GONE_PREFIX}{name}"))).unwrap();
    scene.shared().kept.remove(scene.shared(), &name).unwrap();
    assert_eq!(scene.names(), Vec::<String>::new());
}
