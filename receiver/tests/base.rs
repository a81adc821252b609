//! A bit that flips in the base of a running receiver, or in its checksums: a primary that compares hears of it, no view and no fork shows it, and what
//! is sent again is good again.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockdev::{BlockDevice, Buf, IoThreads};
use common::*;
use proto::hashes::{HashQuery, UNREADABLE, hash};
use proto::{BlockIndex, EpochId, Message, Scrub, ScrubOutcome, ScrubRun, Scrubbed, VolumeIndex};
use receiver::adopt::{AdoptProgress, Adoption};
use receiver::{Receiver, check};

const BLOCKS: u64 = 64;
/// The last block is partial.
const VOLUMES: [(&str, u64); 1] = [("root", BLOCKS * BLOCK as u64 - 100)];
/// Blocks of the image that are zeroes.
const HOLE: std::ops::Range<u64> = 20..40;

struct Scene {
    site: Site,
    receiver: Receiver,
    primary: Primary,
    io: IoThreads,
}

/// A group whose base is an adopted image, with an epoch of a few blocks after it.
async fn scene() -> Scene {
    let site = Site::new(&["a"]);
    let mut image: Vec<u8> =
        (0..BLOCKS).flat_map(|block| if HOLE.contains(&block) { vec![0; BLOCK] } else { fill(6, block) }).collect();
    image.truncate(VOLUMES[0].1 as usize);
    let path = site.dir.path().join("image.raw");
    std::fs::write(&path, &image).unwrap();
    let receiver = site.start().await;
    let (client, owner) = (name("a"), site.clients[0].1.fingerprint());
    let adoption = Adoption { client, owner, group: name("db"), images: vec![(name("root"), path)] };
    receiver.adopt(adoption, Arc::new(AdoptProgress::default())).await.unwrap();
    let mut hello = hello("db", &VOLUMES);
    hello.generation = proto::Generation(1);
    let mut primary = Primary::open(site.connect(&receiver, 0).await, hello).await;
    primary.disks[0] = image;
    primary.commit(vec![data(4, 2, 3), zero(10, 1)]).await;
    Scene { site, receiver, primary, io: IoThreads::new(1).unwrap() }
}

impl Scene {
    fn base(&self) -> PathBuf {
        self.site.store().join("a/db/base/root.raw")
    }

    async fn read(&self, offset: u64, length: usize) -> std::io::Result<Vec<u8>> {
        let (_, mut views) = self.receiver.view("db", None).await.unwrap();
        let view = Arc::new(views.pop().unwrap().1);
        read(&self.io, view, offset, length).await
    }

    fn run(&self, start: u64, blocks: u32) -> ScrubRun {
        let mut disk = self.primary.disks[0].clone();
        disk.resize(BLOCKS as usize * BLOCK, 0);
        let content = &disk[start as usize * BLOCK..(start as usize + blocks as usize) * BLOCK];
        ScrubRun { extent: extent(start, blocks), hash: hash(content) }
    }

    async fn scrubbed(&mut self, id: u32, epoch: u64, of: &[(u64, u32)]) -> Vec<u16> {
        let runs = of.iter().map(|(start, blocks)| self.run(*start, *blocks)).collect();
        self.primary.control.say(&Message::Scrub(Scrub { id, epoch: EpochId(epoch), volume: VolumeIndex(0), runs })).await;
        match self.primary.control.hear().await {
            Message::Scrubbed(Scrubbed { id: answered, outcome: ScrubOutcome::Compared { differing } }) if answered == id => {
                differing
            }
            other => panic!("not an answer to scrub {id}: {other:?}"),
        }
    }
}

/// Both ways in which an export reads, which must not contradict each other.
async fn read(io: &IoThreads, device: Arc<dyn BlockDevice>, offset: u64, length: usize) -> std::io::Result<Vec<u8>> {
    let both = io.call(move || async move {
        let mut buf = vec![0; length];
        let tried = device.try_read(offset, &mut buf).map(|done| done.map(|()| buf));
        (tried, device.read(offset, Buf::zeroed(length)).await.map(|buf| buf.to_vec()))
    });
    let (tried, read) = both.await.unwrap();
    if let Some(Ok(tried)) = tried {
        assert!(read.as_ref().is_ok_and(|read| *read == tried), "read at once, and otherwise not: {read:?}");
    }
    read
}

fn flip(path: &Path, byte: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut content = [0];
    file.read_exact_at(&mut content, byte).unwrap();
    file.write_all_at(&[content[0] ^ 4], byte).unwrap();
}

/// An adopted base has its checksums from the beginning, holes included.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adopted_base_is_checked_from_the_beginning() {
    let scene = scene().await;
    let images = BTreeMap::from([(point(1, 1), scene.primary.disks.clone())]);
    check_images(&scene.io, &scene.receiver, "db", &images).await;
    let Scene { site, receiver, .. } = scene;
    receiver.shutdown().await;
    let report = check::check(&site.store(), &mut |_| ()).unwrap().groups.remove(0);
    assert!(report.findings.is_empty() && report.unchecked.is_empty(), "{report:?}");
    assert!(report.base_bytes >= 44 * BLOCK as u64 - 100, "{report:?}");
}

/// Would catch a flipped bit that is served, that a comparison does not find although nobody has read it, that names another place or is counted twice, that
/// ends the session, and a repair that does not hold.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_in_the_base_is_found_named_and_repaired() {
    let mut scene = scene().await;
    let base = scene.base();
    // In a block with content, in one of the hole by its sum, and in the partial last one.
    flip(&base, 8 * BLOCK as u64 + 1000);
    flip(&base.with_extension("sums"), 30 * 4 + 1);
    flip(&base, VOLUMES[0].1 - 1);
    let all = [(0, 8), (8, 1), (9, 3), (20, 10), (30, 10), (50, 13), (63, 1)];
    assert_eq!(scene.scrubbed(1, 1, &all).await, [1, 4, 6]);
    assert_eq!(scene.scrubbed(2, 1, &all).await, [1, 4, 6]);
    let status = scene.receiver.status().remove(0).scrub;
    assert_eq!((status.damaged_base_blocks, status.damaged_frames), (3, 0), "each once, however often it is met");
    let told = status.last_damage.unwrap();
    assert!(told.starts_with(&format!("{}: the block at offset {} is damaged", base.display(), 63 * BLOCK)), "{told}");
    // Whatever part of the block is wanted, and nothing else.
    for (offset, length, bad) in
        [(8 * BLOCK, BLOCK, 8), (8 * BLOCK + 7, 1, 8), (7 * BLOCK + 1, BLOCK + 9, 8), (30 * BLOCK, 512, 30)]
    {
        let error = scene.read(offset as u64, length).await.unwrap_err().to_string();
        let place = format!("{}: the block at offset {} is damaged", base.display(), bad * BLOCK);
        assert!(error.starts_with(&place) && !error.contains('\n'), "{error}");
    }
    let disk = &scene.primary.disks[0];
    for (offset, length) in [(7 * BLOCK, BLOCK), (9 * BLOCK + 3, 2 * BLOCK), (0, 8 * BLOCK), (29 * BLOCK + 5, BLOCK - 5)] {
        assert!(scene.read(offset as u64, length).await.unwrap() == disk[offset..offset + length], "{length} bytes at {offset}");
    }
    // What the primary sends again is right from then on; the point before it keeps the damage.
    scene.primary.commit(vec![data(8, 1, 7), zero(30, 1), data(63, 1, 6)]).await;
    assert_eq!(scene.scrubbed(3, 2, &all).await, Vec::<u16>::new());
    let images = BTreeMap::from([(point(1, 2), scene.primary.disks.clone())]);
    check_images(&scene.io, &scene.receiver, "db", &images).await;
    let (_, mut views) = scene.receiver.view("db", Some(point(1, 1))).await.unwrap();
    let old: Arc<dyn BlockDevice> = Arc::new(views.pop().unwrap().1);
    assert!(read(&scene.io, old, 8 * BLOCK as u64, 10).await.is_err());
    let Scene { site, receiver, .. } = scene;
    receiver.shutdown().await;
    let report = check::check(&site.store(), &mut |_| ()).unwrap().groups.remove(0);
    let found: Vec<_> = report.findings.iter().map(|f| (f.path.clone(), f.offset)).collect();
    assert_eq!(found, [8, 30, 63].map(|block| (base.clone(), block * BLOCK as u64)));
}

/// The comparison at the start: what is damaged has no hash, everything else has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_block_has_no_hash() {
    let mut scene = scene().await;
    flip(&scene.base(), 50 * BLOCK as u64);
    let query = HashQuery { id: 1, volume: VolumeIndex(0), start: BlockIndex(0), blocks: BLOCKS as u32, chunk_blocks: 1 };
    scene.primary.control.say(&Message::HashQuery(query)).await;
    let Message::Hashes(answer) = scene.primary.control.hear().await else { panic!("no hashes") };
    for (block, found) in answer.hashes.iter().enumerate() {
        let wanted = if block == 50 { UNREADABLE } else { scene.run(block as u64, 1).hash };
        assert!(*found == wanted, "block {block}");
    }
}

/// An activated copy: its guest gets errors for the damaged block, cannot make a good one of it by writing a part, and can by writing the whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fork_never_makes_a_damaged_block_its_own() {
    let scene = scene().await;
    flip(&scene.base(), 12 * BLOCK as u64 + 5);
    let active = scene.receiver.failover("db", None).await.unwrap();
    let device = Arc::clone(&active.volumes[0].1);
    let at = 12 * BLOCK as u64;
    let place = format!("{}: the block at offset {at} is damaged", scene.base().display());
    let error = read(&scene.io, Arc::clone(&device), at, BLOCK).await.unwrap_err().to_string();
    assert!(error.starts_with(&place), "{error}");
    let writer = Arc::clone(&device);
    let written = scene.io.call(move || async move {
        let part = writer.write(at, Buf::copy_of(&[1; 10])).await.map(drop);
        let after_part = writer.read(at, Buf::zeroed(1)).await.map(drop);
        let whole = writer.write(at, Buf::copy_of(&[9; BLOCK])).await.map(drop);
        (part, after_part, whole)
    });
    let (part, after_part, whole) = written.await.unwrap();
    for error in [part.unwrap_err(), after_part.unwrap_err()] {
        assert!(error.to_string().starts_with(&place), "{error}");
    }
    whole.unwrap();
    assert!(read(&scene.io, device, at, BLOCK).await.unwrap() == [9; BLOCK]);
}
