//! What a receiver answers to hashes of its copy, when the copy is good, when it differs, and when what it stored is damaged.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::*;
use proto::frame::{FRAME_HEADER_BYTES, FRAME_MAGIC};
use proto::hashes::{HashQuery, UNREADABLE, hash};
use proto::{BlockIndex, EpochId, Message, Scrub, ScrubOutcome, ScrubRun, Scrubbed, VolumeIndex};
use receiver::journal::{SEGMENT_HEADER_BYTES, segment_path};

const BLOCKS: u64 = 64;
/// The last block is partial.
const VOLUMES: [(&str, u64); 1] = [("root", BLOCKS * BLOCK as u64 - 100)];

/// What the primary's disk holds, as it travels.
fn content(primary: &Primary, start: u64, blocks: u32) -> Vec<u8> {
    let mut disk = primary.disks[0].clone();
    disk.resize(BLOCKS as usize * BLOCK, 0);
    disk[start as usize * BLOCK..(start as usize + blocks as usize) * BLOCK].to_vec()
}

fn runs(primary: &Primary, of: &[(u64, u32)]) -> Vec<ScrubRun> {
    let run = |(start, blocks): &(u64, u32)| ScrubRun {
        extent: extent(*start, *blocks),
        hash: hash(&content(primary, *start, *blocks)),
    };
    of.iter().map(run).collect()
}

async fn scrubbed(primary: &mut Primary, id: u32, epoch: u64, runs: Vec<ScrubRun>) -> ScrubOutcome {
    primary.control.say(&Message::Scrub(Scrub { id, epoch: EpochId(epoch), volume: VolumeIndex(0), runs })).await;
    match primary.control.hear().await {
        Message::Scrubbed(Scrubbed { id: answered, outcome }) if answered == id => outcome,
        other => panic!("not an answer to scrub {id}: {other:?}"),
    }
}

fn compared(differing: &[u16]) -> ScrubOutcome {
    ScrubOutcome::Compared { differing: differing.to_vec() }
}

/// Flips a bit in the payload of the frame that holds `block` in the first segment. Returns where the frame begins.
fn damage(site: &Site, block: u64) -> u64 {
    let path = segment_path(&site.store().join("a/db/journal"), 1);
    let mut bytes = std::fs::read(&path).unwrap();
    let mut at = SEGMENT_HEADER_BYTES;
    while bytes[at..].starts_with(&FRAME_MAGIC) {
        let header = proto::FrameHeader::decode(bytes[at..].first_chunk().unwrap()).unwrap();
        let frame = proto::Frame::decode(&bytes[at..at + header.frame_bytes()], BLOCKS).unwrap();
        if frame.extents.iter().any(|e| (e.start.0..e.end()).contains(&block)) {
            bytes[at + FRAME_HEADER_BYTES + header.table_bytes() + 5] ^= 4;
            std::fs::write(&path, bytes).unwrap();
            return at as u64;
        }
        at += header.frame_bytes();
    }
    panic!("no frame of the first epoch has block {block}");
}

/// Data, zeroes, blocks that were never written, and the partial last block: what the primary has is what the copy shows, and what it has
/// not is named by its run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_difference_is_named_by_its_run() {
    let site = Site::new(&["a"]);
    let receiver = site.start().await;
    let mut primary = Primary::open(site.connect(&receiver, 0).await, hello("db", &VOLUMES)).await;
    primary.commit(vec![data(0, 8, 2), data(40, 4, 1), zero(44, 2)]).await;
    primary.commit(vec![data(4, 2, 3), zero(41, 1), data(63, 1, 8)]).await;
    let of = [(0, 5), (5, 3), (10, 20), (40, 2), (42, 6), (60, 4)];
    let good = runs(&primary, &of);
    assert_eq!(scrubbed(&mut primary, 1, 2, good.clone()).await, compared(&[]));
    assert_eq!(scrubbed(&mut primary, 2, 1, good.clone()).await, ScrubOutcome::Stale, "the copy is at 1.2");

    let mut bad = good;
    for number in [1, 2, 5] {
        bad[number].hash[7] ^= 1;
    }
    assert_eq!(scrubbed(&mut primary, 3, 2, bad).await, compared(&[1, 2, 5]));
    let status = receiver.status().remove(0).scrub;
    assert_eq!((status.compared_bytes, status.differing_bytes), (2 * 40 * BLOCK as u64, 27 * BLOCK as u64));
    assert_eq!((status.damaged_frames, status.last_damage), (0, None));
    primary.commit(vec![data(1, 1, 5)]).await;
}

/// Scrubs that overtake the frames of their epoch are answered at that epoch, also while later ones follow at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scrub_is_of_its_own_point_while_epochs_follow() {
    let site = Site::new(&["a"]);
    let receiver = site.start().await;
    let mut primary = Primary::open(site.connect(&receiver, 0).await, hello("db", &VOLUMES)).await;
    let mut asked = std::collections::BTreeMap::new();
    let (mut answered, mut committed) = (0, 0);
    for id in 0..200_u32 {
        let point = primary.send(&[vec![data(u64::from(id) % 32, 3, id as u8), data(33, 1, (id + 1) as u8)]]).await;
        let runs = runs(&primary, &[(0, 20), (20, 20)]);
        let scrub = Scrub { id, epoch: point.epoch, volume: VolumeIndex(0), runs };
        primary.control.say(&Message::Scrub(scrub)).await;
        asked.insert(id, point);
        // As many under way as may be.
        while u64::from(id) + 1 - answered >= 8
            || u64::from(id) + 1 - committed >= 16
            || (id == 199 && answered + committed < 400)
        {
            match primary.control.hear().await {
                Message::Committed { .. } => committed += 1,
                Message::Scrubbed(Scrubbed { id, outcome }) => {
                    assert_eq!(outcome, compared(&[]), "scrub {id} of {}", asked[&id]);
                    answered += 1;
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

/// A flipped bit is found although the frame was read and is in memory, named with file and offset, ends nothing, and what is sent again
/// is good again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_is_found_named_and_repaired() {
    let site = Site::new(&["a"]);
    let receiver = site.start().await;
    let mut primary = Primary::open(site.connect(&receiver, 0).await, hello("db", &VOLUMES)).await;
    primary.commit(vec![data(0, 8, 2), data(40, 4, 4)]).await;
    let io = blockdev::IoThreads::new(1).unwrap();
    // Now every frame is decoded in memory.
    check_images(&io, &receiver, "db", &primary.images).await;
    let offset = damage(&site, 40);
    let all = [(0, 8), (30, 11), (41, 1), (43, 1), (44, 4)];
    let good = runs(&primary, &all);
    assert_eq!(scrubbed(&mut primary, 1, 1, good.clone()).await, compared(&[1, 2, 3]));
    assert_eq!(scrubbed(&mut primary, 2, 1, good).await, compared(&[1, 2, 3]));
    let status = receiver.status().remove(0).scrub;
    let told = status.last_damage.unwrap();
    let path = segment_path(&site.store().join("a/db/journal"), 1);
    assert!(told.starts_with(&format!("{}: the frame at offset {offset} is damaged", path.display())), "{told}");
    assert_eq!(status.damaged_frames, 1, "one frame, however often it is met");

    primary.commit(vec![data(40, 4, 4)]).await;
    let good = runs(&primary, &all);
    assert_eq!(scrubbed(&mut primary, 3, 2, good.clone()).await, compared(&[]));

    // A start reads the payloads of the last segment and refuses damage there: the repair went to a new one.
    receiver.shutdown().await;
    let receiver = site.start().await;
    let status = receiver.status().remove(0);
    assert_eq!((status.role, status.last_error), (receiver::Role::Replica, None));
    let newest = *primary.images.last_key_value().unwrap().0;
    check_images(&io, &receiver, "db", &std::collections::BTreeMap::from([(newest, primary.disks.clone())])).await;
    let mut again = Primary::open(site.connect(&receiver, 0).await, hello("db", &VOLUMES)).await;
    again.disks = primary.disks;
    assert_eq!(scrubbed(&mut again, 4, 2, good).await, compared(&[]));
    again.commit(vec![data(1, 1, 4)]).await;
}

/// The comparison at the start: what is damaged has no hash, everything else has, and the session goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hash_query_over_damage_is_answered() {
    let site = Site::new(&["a"]);
    let receiver = site.start().await;
    let mut primary = Primary::open(site.connect(&receiver, 0).await, hello("db", &VOLUMES)).await;
    primary.commit(vec![data(0, 8, 2), data(18, 4, 4)]).await;
    damage(&site, 18);
    for (chunk_blocks, unreadable) in [(16, vec![1]), (1, vec![18, 19, 20, 21])] {
        let query = HashQuery { id: 1, volume: VolumeIndex(0), start: BlockIndex(0), blocks: BLOCKS as u32, chunk_blocks };
        primary.control.say(&Message::HashQuery(query)).await;
        let Message::Hashes(answer) = primary.control.hear().await else { panic!("no hashes") };
        for (number, found) in (0..).zip(answer.hashes) {
            let expected = match unreadable.contains(&number) {
                true => UNREADABLE,
                false => hash(&content(&primary, number * u64::from(chunk_blocks), chunk_blocks)),
            };
            assert_eq!(found, expected, "granule {number} of {chunk_blocks} blocks");
        }
    }
    assert_eq!(receiver.status().remove(0).scrub.damaged_frames, 1);
    primary.commit(vec![data(18, 4, 4)]).await;
}
