//! The group's thread without a network: full disks, failing syncs, promotions that a crash cuts short.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use proto::frame::{FRAME_HEADER_BYTES, encode_data};
use proto::seal::Tally;
use proto::{BlockExtent, BlockIndex, Codec};

use super::*;
use crate::batch::Assembler;
use crate::disk::{Disk, Op};
use crate::journal::JournalOptions;
use crate::store::Store;
use crate::superblock::Superblock;

const BLOCKS: u64 = 64;
/// What the disk does next.
const FINE: u8 = 0;
const FULL: u8 = 1;
const NO_SYNC: u8 = 2;

struct Scene {
    _dir: tempfile::TempDir,
    folder: GroupFolder,
    disk: Arc<AtomicU8>,
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let block = Superblock {
            group_id: [2; 16],
            owner: "SHA256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".parse().unwrap(),
            generation: Generation(1),
            role: GroupRole::Replica,
            base: None,
            base_seal: Default::default(),
            folding: None,
            synced: None,
            fork: None,
            first_segment: 1,
            created_unix_us: 0,
            volumes: vec![Volume { name: "root".parse().unwrap(), size_bytes: BLOCKS * 4096 }],
        };
        let store = Store::open(dir.path()).unwrap();
        let folder = store.create_group(&"a".parse().unwrap(), &"db".parse().unwrap(), block).unwrap();
        Self { _dir: dir, folder, disk: Arc::default() }
    }

    fn open(&self) -> Arc<Group> {
        let disk = Arc::clone(&self.disk);
        let disk = Disk::faulty(move |op| match (disk.load(Ordering::SeqCst), op) {
            (FULL, Op::Write { .. }) => Err(io::ErrorKind::StorageFull.into()),
            (NO_SYNC, Op::Sync(_)) => Err(io::Error::other("bad disk")),
            _ => Ok(()),
        });
        Group::open(self.folder.clone(), Arc::default(), JournalOptions { segment_bytes_max: 1 << 20, disk }).unwrap()
    }
}

async fn claim(group: &Group, session: u64) -> (Claimed, mpsc::Receiver<GroupEvent>) {
    let peer = Peer { address: "127.0.0.1:1".parse().unwrap(), since_unix_us: 0, interval_ms: 1 };
    group.claim(SessionId(session), peer, Generation(1)).await
}

/// Sends an epoch of one frame and gives the group's answer.
async fn epoch(group: &Group, session: u64, events: &mut mpsc::Receiver<GroupEvent>, epoch: u64) -> GroupEvent {
    let extents = [BlockExtent { start: BlockIndex(epoch), blocks: 1 }];
    let frame = encode_data(proto::VolumeIndex(0), EpochId(epoch), 0, &extents, &[epoch as u8; 4096], Codec::Lz4);
    let (mut assembler, mut tally) = (Assembler::default(), Tally::default());
    assembler.push::<proto::DecodeError>(&frame, &mut |_| Ok(BLOCKS), &mut |_| ()).unwrap();
    tally.add(frame.first_chunk::<FRAME_HEADER_BYTES>().unwrap(), frame.len(), 1, 0);
    let seal = Seal {
        passes: 1,
        epoch: EpochId(epoch),
        generation: Generation(1),
        cut_unix_us: 0,
        frames: 1,
        frame_bytes: frame.len() as u64,
        data_blocks: 1,
        zero_blocks: 0,
        first_write_unix_us: 0,
        session: proto::SessionToken::default(),
        digest: tally.digest(),
    };
    group.append(SessionId(session), assembler.take().unwrap()).await;
    group.commit(SessionId(session), seal).await;
    events.recv().await.unwrap()
}

fn point(epoch: u64) -> Point {
    Point { generation: Generation(1), epoch: EpochId(epoch) }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// A full disk ends the session and costs its epoch; when there is room the next session goes on.
#[test]
fn a_full_disk_ends_the_session_and_the_next_one_goes_on() {
    let scene = Scene::new();
    runtime().block_on(async {
        let group = scene.open();
        let (_, mut events) = claim(&group, 1).await;
        assert!(matches!(epoch(&group, 1, &mut events, 1).await, GroupEvent::Committed(p) if p == point(1)));
        scene.disk.store(FULL, Ordering::SeqCst);
        let GroupEvent::Storage(cause) = epoch(&group, 1, &mut events, 2).await else { panic!("the disk is full") };
        assert!(cause.to_string().ends_with("0000000001.seg: cannot write the journal: no storage space: free space in the store; replication goes on by itself"), "{cause}");
        assert_eq!(group.shared.state.read().last_error, Some(cause.to_string()));
        scene.disk.store(FINE, Ordering::SeqCst);
        let (claimed, mut events) = claim(&group, 2).await;
        assert!(matches!(claimed, Claimed::Yes { committed: Some(p), .. } if p == point(1)));
        assert!(matches!(epoch(&group, 2, &mut events, 2).await, GroupEvent::Committed(p) if p == point(2)));
        group.stop().await;
        assert_eq!(scene.open().shared.state.read().points.len(), 2);
    });
}

/// After a failed sync nothing is written until the node is restarted; committed points can still be promoted.
#[test]
fn a_failed_sync_closes_the_journal_and_not_the_copy() {
    let scene = Scene::new();
    runtime().block_on(async {
        let group = scene.open();
        let (_, mut events) = claim(&group, 1).await;
        epoch(&group, 1, &mut events, 1).await;
        scene.disk.store(NO_SYNC, Ordering::SeqCst);
        let GroupEvent::Storage(_) = epoch(&group, 1, &mut events, 2).await else { panic!("the sync failed") };
        scene.disk.store(FINE, Ordering::SeqCst);
        let (Claimed::No(cause), _) = claim(&group, 2).await else { panic!("the journal is closed") };
        assert!(cause.to_string().contains("a sync of the journal failed"), "{cause}");
        let promoted = group.promote(None).await.unwrap();
        assert_eq!((promoted.generation, promoted.fork.point), (Generation(2), point(1)));
        group.stop().await;
    });
}

/// A session that lost the group writes nothing, whatever it still sends.
#[test]
fn a_superseded_session_writes_nothing() {
    let scene = Scene::new();
    runtime().block_on(async {
        let group = scene.open();
        let (_, mut first) = claim(&group, 1).await;
        epoch(&group, 1, &mut first, 1).await;
        let (_, mut second) = claim(&group, 2).await;
        assert!(matches!(epoch(&group, 1, &mut first, 2).await, GroupEvent::Superseded));
        assert!(matches!(epoch(&group, 2, &mut second, 2).await, GroupEvent::Committed(p) if p == point(2)));
        assert_eq!(group.shared.state.read().points.len(), 2);
        group.stop().await;
    });
}

/// A crash after the promise of the fork, before or in the middle of its creation: the next start finishes it, at the same
/// point and in the same generation; asking again changes nothing.
#[test]
fn a_promotion_cut_short_is_finished_later() {
    let scene = Scene::new();
    runtime().block_on(async {
        let group = scene.open();
        let (_, mut events) = claim(&group, 1).await;
        epoch(&group, 1, &mut events, 1).await;
        epoch(&group, 1, &mut events, 2).await;
        let promoted = group.promote(Some(point(1))).await.unwrap();
        assert!(matches!(events.recv().await, Some(GroupEvent::Fenced(Generation(2)))));
        group.stop().await;
        let forks = scene.folder.path.join("forks");
        assert!(std::fs::read_dir(&forks).unwrap().next().is_none(), "only the promise is there");
        let half = forks.join(format!(".new-{}", promoted.fork.name));
        std::fs::create_dir(&half).unwrap();
        std::fs::write(half.join("root.raw"), "half").unwrap();

        let group = scene.open();
        let (claimed, _) = claim(&group, 2).await;
        assert!(matches!(claimed, Claimed::Changed), "fenced from the start");
        let fork = crate::node::activate(&group, None).await.unwrap();
        assert_eq!((fork.generation, fork.point), (Generation(2), point(1)));
        let again = crate::node::activate(&group, Some(point(1))).await.unwrap();
        assert!(Arc::ptr_eq(&fork, &again));
        let error = crate::node::activate(&group, Some(point(2))).await.unwrap_err();
        assert!(matches!(error, GroupError::ActiveElsewhere { .. }), "{error}");
        group.stop().await;
    });
}

/// Nobody knows which generation is on disk after a promotion whose write failed: its primary is ended and no other one is let
/// in, or both sides could write.
#[test]
fn a_promotion_that_cannot_be_written_ends_the_session() {
    let scene = Scene::new();
    runtime().block_on(async {
        let group = scene.open();
        let (_, mut events) = claim(&group, 1).await;
        epoch(&group, 1, &mut events, 1).await;
        scene.disk.store(FULL, Ordering::SeqCst);
        let error = group.promote(None).await.unwrap_err().to_string();
        assert!(error.ends_with("cannot write the superblock: no storage space"), "{error}");
        let Some(GroupEvent::Storage(cause)) = events.recv().await else { panic!("the session ends") };
        assert_eq!(cause.to_string(), error);
        assert_eq!(group.shared.state.read().last_error, Some(error));
        assert!(!scene.folder.path.join("reserve").exists(), "the reserve is given up before the write");
        scene.disk.store(FINE, Ordering::SeqCst);
        let (Claimed::No(cause), _) = claim(&group, 2).await else { panic!("the superblock is poisoned") };
        assert!(cause.to_string().ends_with("an earlier write of the superblock failed: restart the node"), "{cause}");
        group.stop().await;
        let promoted = scene.open().promote(None).await.unwrap();
        assert_eq!((promoted.generation, promoted.fork.point), (Generation(2), point(1)));
    });
}

fn blocks(maps: &[proto::DirtyMap]) -> Vec<u64> {
    (0..BLOCKS).filter(|block| maps[0].contains(*block)).collect()
}

/// Would catch a commit whose blocks are not noted for who shows the copy onward, and one that is noted twice or for nobody.
#[test]
fn who_shows_a_copy_onward_is_told_what_changed() {
    use crate::onward::Onward;
    let scene = Scene::new();
    runtime().block_on(async {
        let group = scene.open();
        let (_, mut events) = claim(&group, 1).await;
        let onward = Onward::new(Arc::clone(&group));
        assert!(onward.stands().newest.is_none() && onward.newest().await.unwrap().is_none());
        let turns = onward.turns();
        for n in 1..4 {
            epoch(&group, 1, &mut events, n).await;
        }
        assert!(turns.has_changed().unwrap());
        let image = onward.newest().await.unwrap().unwrap();
        assert_eq!((image.point, blocks(&image.changed)), (point(3), vec![1, 2, 3]));
        epoch(&group, 1, &mut events, 4).await;
        let image = onward.newest().await.unwrap().unwrap();
        assert_eq!((image.point, blocks(&image.changed)), (point(4), vec![4]));
        assert!(blocks(&onward.newest().await.unwrap().unwrap().changed).is_empty());

        let differing = onward.differing(point(4), point(1)).await.unwrap().unwrap();
        assert_eq!(blocks(&differing), [2, 3, 4]);
        assert!(blocks(&onward.differing(point(2), point(2)).await.unwrap().unwrap()).is_empty());
        assert!(onward.differing(point(1), point(9)).await.unwrap().is_none(), "there is no such point");
        assert_eq!(onward.at(point(2)).await.unwrap().unwrap().point, point(2));
        assert!(onward.at(point(9)).await.unwrap().is_none());
        assert_eq!((onward.given_back(Generation(1)), onward.given_back(Generation(2))), (Some(point(4)), None));

        drop(onward);
        epoch(&group, 1, &mut events, 5).await;
        let again = Onward::new(Arc::clone(&group));
        assert!(blocks(&again.newest().await.unwrap().unwrap().changed).is_empty(), "nobody asked");
        group.promote(None).await.unwrap();
        assert!(again.stands().is_active);
        group.stop().await;
    });
}

/// Would catch a status that takes the state's lock twice: once the group's thread waits in between to change the state, both wait for ever.
#[test]
fn the_status_is_told_while_the_state_changes() {
    let scene = Scene::new();
    let group = scene.open();
    let (ended, watched) = std::sync::mpsc::channel();
    let asking = {
        let (group, ended) = (group.clone(), ended.clone());
        std::thread::spawn(move || {
            for _ in 0..5000 {
                crate::status::of(&group);
            }
            ended.send(()).unwrap();
        })
    };
    std::thread::spawn(move || {
        while !asking.is_finished() {
            group.shared.state.write().journal_bytes += 1;
        }
        ended.send(()).unwrap();
    });
    for _ in 0..2 {
        watched.recv_timeout(std::time::Duration::from_secs(60)).expect("nobody waits for ever");
    }
}
