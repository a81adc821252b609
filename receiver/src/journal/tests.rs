//! Crash points and damage, swept: a small journal is cut and flipped at every byte, and a simulated disk loses any subset of
//! what was not synced. What must hold: every acknowledged epoch is there, nothing else is, or the journal is refused.

mod check;

use std::path::PathBuf;
use std::sync::Arc;

use proptest::prelude::*;
use proto::frame::{FRAME_HEADER_BYTES, encode_data, encode_zero};
use proto::seal::Tally;
use proto::{BlockExtent, BlockIndex, Codec, Frame, FrameHeader, FrameKind, Generation, VolumeIndex};

use super::*;
use crate::disk::{Disk, Op};

const BLOCKS: u64 = 64;

/// What recovery found: epochs, and how many frames are in each.
#[derive(Debug, Default, PartialEq, Eq, Clone)]
struct Found {
    epochs: Vec<(u64, usize)>,
    open: usize,
}

impl Sink for Found {
    fn frame(&mut self, _: u32, _: u64, _: &FrameHeader, _: &[BlockExtent]) {
        self.open += 1;
    }

    fn sealed(&mut self, seal: &Seal, _: Mark) {
        self.epochs.push((seal.epoch.0, std::mem::take(&mut self.open)));
    }

    fn dropped(&mut self) {
        self.open = 0;
    }
}

fn expected() -> Expected {
    Expected { group_id: [5; 16], first_segment: FIRST_SEGMENT, base: None, volume_blocks: Arc::from([BLOCKS]) }
}

fn options(segment_bytes_max: u64) -> JournalOptions {
    JournalOptions { segment_bytes_max, disk: Disk::default() }
}

fn open_at(folder: &Path, options: JournalOptions, synced: Option<Point>) -> Result<(Journal, Found), JournalError> {
    let mut found = Found::default();
    let mut journal = open(folder, &expected(), synced, options, &mut found)?;
    journal.expect(EpochId(found.epochs.last().map_or(1, |e| e.0 + 1)));
    Ok((journal, found))
}

fn frames(epoch: u64, count: usize) -> Vec<Vec<u8>> {
    let one = |i: usize| {
        let extents = [BlockExtent { start: BlockIndex((epoch * 7 + i as u64) % BLOCKS), blocks: 1 }];
        if i % 3 == 2 {
            return encode_zero(VolumeIndex(0), EpochId(epoch), 0, &extents);
        }
        let mut content = vec![epoch as u8; 4096];
        content[..8].copy_from_slice(&(i as u64).to_le_bytes());
        encode_data(VolumeIndex(0), EpochId(epoch), 0, &extents, &content, Codec::Lz4)
    };
    (0..count).map(one).collect()
}

fn seal(epoch: u64, frames: &[Vec<u8>]) -> Seal {
    let mut tally = Tally::default();
    for bytes in frames {
        let frame = Frame::decode(bytes, BLOCKS).unwrap();
        let (data, zero) = if frame.header.kind == FrameKind::Data { (1, 0) } else { (0, 1) };
        tally.add(bytes.first_chunk::<FRAME_HEADER_BYTES>().unwrap(), bytes.len(), data, zero);
    }
    Seal {
        passes: 1,
        epoch: EpochId(epoch),
        generation: Generation(1),
        cut_unix_us: epoch,
        frames: tally.frames,
        frame_bytes: tally.frame_bytes,
        data_blocks: tally.data_blocks,
        zero_blocks: tally.zero_blocks,
        first_write_unix_us: 0,
        session: proto::SessionToken::default(),
        digest: tally.digest(),
    }
}

fn write_epoch(journal: &mut Journal, epoch: u64, count: usize) -> Result<Mark, JournalError> {
    let frames = frames(epoch, count);
    for frame in &frames {
        journal.append(frame)?;
    }
    journal.commit(&seal(epoch, &frames))
}

fn image(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let numbers = list_segments(folder).unwrap();
    numbers.into_iter().map(|n| segment_path(folder, n)).map(|p| (p.clone(), std::fs::read(&p).unwrap())).collect()
}

fn restore(folder: &Path, image: &[(PathBuf, Vec<u8>)]) {
    for number in list_segments(folder).unwrap() {
        std::fs::remove_file(segment_path(folder, number)).unwrap();
    }
    for (path, bytes) in image {
        std::fs::write(path, bytes).unwrap();
    }
}

/// Killed after any byte: exactly the epochs whose seal is whole are there, and the journal goes on from there.
#[test]
fn cut_at_every_byte_of_the_tail() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open_at(dir.path(), options(1 << 20), None).unwrap();
    let mut ends = Vec::new();
    for (epoch, count) in [(1, 2), (2, 0), (3, 3), (4, 1)] {
        ends.push((write_epoch(&mut journal, epoch, count).unwrap().bytes, (epoch, count)));
    }
    journal.append(&frames(5, 3).concat()).unwrap();
    drop(journal);
    let whole = image(dir.path());
    let (path, bytes) = &whole[0];
    for cut in 0..=bytes.len() {
        std::fs::write(path, &bytes[..cut]).unwrap();
        let (mut journal, found) = open_at(dir.path(), options(1 << 20), None).unwrap();
        let due: Vec<_> = ends.iter().filter(|(end, _)| *end <= cut as u64).map(|(_, e)| *e).collect();
        assert_eq!(found.epochs, due, "cut at {cut}");
        assert_eq!(found.open, 0);
        if cut % 97 == 0 {
            let next = due.last().map_or(1, |e| e.0 + 1);
            write_epoch(&mut journal, next, 1).unwrap();
            drop(journal);
            let (_, found) = open_at(dir.path(), options(1 << 20), None).unwrap();
            assert_eq!(found.epochs.len(), due.len() + 1);
        }
        restore(dir.path(), &whole);
    }
}

/// A flipped bit anywhere: before a later seal it is refused with file and offset at or before the flip; in the last
/// commit, which no record follows, that commit counts as torn. Nothing else is ever lost, and nothing wrong is believed.
#[test]
fn a_flipped_bit_at_every_byte_is_refused_or_is_the_torn_end() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open_at(dir.path(), options(1 << 20), None).unwrap();
    for (epoch, count) in [(1, 2), (2, 3), (3, 2)] {
        write_epoch(&mut journal, epoch, count).unwrap();
    }
    let second_end = {
        let (_, found) = open_at(dir.path(), options(1 << 20), None).unwrap();
        assert_eq!(found.epochs.len(), 3);
        // The last commit begins after the second seal.
        let third: usize = frames(3, 2).iter().map(Vec::len).sum();
        image(dir.path())[0].1.len() - third - PLACED_SEAL_BYTES
    };
    drop(journal);
    let whole = image(dir.path());
    let (path, bytes) = &whole[0];
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 1 << (at % 8);
        std::fs::write(path, &bad).unwrap();
        match open_at(dir.path(), options(1 << 20), None) {
            Ok((_, found)) => {
                assert!(at >= second_end, "byte {at} of a synced epoch was changed and not noticed");
                assert_eq!(found.epochs, [(1, 2), (2, 3)], "byte {at}");
            }
            Err(error) => {
                assert!(at < second_end, "byte {at}: {error}");
                let text = error.to_string();
                assert!(text.starts_with(&format!("{}: at offset ", path.display())), "{text}");
                assert_eq!(std::fs::read(path).unwrap(), bad, "a refused journal is left as it is");
            }
        }
        // Known to be synced (a clean stop, a promotion): refused wherever it is.
        std::fs::write(path, &bad).unwrap();
        let synced = Point { generation: Generation(1), epoch: EpochId(3) };
        assert!(open_at(dir.path(), options(1 << 20), Some(synced)).is_err(), "byte {at}");
        restore(dir.path(), &whole);
    }
}

/// A segment that is gone, or of another journal, is refused.
#[test]
fn missing_foreign_and_shortened_segments_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open_at(dir.path(), options(200), None).unwrap();
    for epoch in 1..=4 {
        write_epoch(&mut journal, epoch, 3).unwrap();
    }
    let whole = image(dir.path());
    assert!(whole.len() > 4, "{} segments", whole.len());
    let (_, found) = open_at(dir.path(), options(200), None).unwrap();
    assert_eq!(found.epochs.len(), 4);
    for gone in 0..whole.len() - 1 {
        std::fs::remove_file(&whole[gone].0).unwrap();
        let error = open_at(dir.path(), options(200), None).unwrap_err().to_string();
        assert!(error.contains("this one is missing"), "{error}");
        restore(dir.path(), &whole);
    }
    let mut other = Found::default();
    let foreign = Expected { group_id: [6; 16], ..expected() };
    let error = open(dir.path(), &foreign, None, options(200), &mut other).unwrap_err().to_string();
    assert!(error.contains("the group's own identity"), "{error}");
    assert_eq!(image(dir.path()), whole, "a refused journal is left as it is");
    for (path, bytes) in &whole[..whole.len() - 1] {
        std::fs::write(path, &bytes[..bytes.len() - 30]).unwrap();
        assert!(open_at(dir.path(), options(200), None).is_err());
        restore(dir.path(), &whole);
    }
}

/// A journal that ends before what the superblock knows of is refused, also when it is empty.
#[test]
fn a_journal_that_lost_a_known_point_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let synced = Some(Point { generation: Generation(1), epoch: EpochId(2) });
    let error = open_at(dir.path(), options(1 << 20), synced).unwrap_err().to_string();
    assert!(error.ends_with("it ends at nothing, and point 1.2 was committed: run `twinsite check`"), "{error}");
}

/// Guest data that looks like a seal does not make a torn end look like damage.
#[test]
fn a_seal_in_guest_data_is_not_a_seal() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open_at(dir.path(), options(1 << 20), None).unwrap();
    write_epoch(&mut journal, 1, 1).unwrap();
    let mut content = vec![0; 4096];
    content[100..100 + proto::seal::SEAL_BYTES].copy_from_slice(&seal(2, &[]).encode());
    let extents = [BlockExtent { start: BlockIndex(0), blocks: 1 }];
    let frame = encode_data(VolumeIndex(0), EpochId(2), 0, &extents, &content, Codec::Raw);
    journal.append(&frame).unwrap();
    drop(journal);
    let (path, mut bytes) = image(dir.path()).remove(0);
    let at = bytes.len() - frame.len();
    bytes[at] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let (_, found) = open_at(dir.path(), options(1 << 20), None).unwrap();
    assert_eq!(found.epochs, [(1, 1)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Power loss: of what was written since the last sync, any 512-byte sectors reach the disk and the others keep what they
    /// had. Every epoch whose commit returned is there afterwards; the one in flight is there whole or not at all.
    #[test]
    fn power_loss_loses_no_acknowledged_epoch(
        counts in prop::collection::vec(0..5usize, 1..6),
        limit in prop_oneof![Just(700_u64), Just(1 << 20)],
        abandoned in 0..4usize,
        kept in any::<u64>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = open_at(dir.path(), options(limit), None).unwrap();
        let mut last = 0;
        for (i, count) in counts.iter().enumerate() {
            if i == abandoned {
                journal.append(&frames(i as u64 + 1, 2).concat()).unwrap();
                journal.abandon().unwrap();
            }
            write_epoch(&mut journal, i as u64 + 1, *count).unwrap();
            last = i as u64 + 1;
        }
        let synced = image(dir.path());
        // The commit in flight: everything is written, its fdatasync never returns.
        write_epoch(&mut journal, last + 1, 4).unwrap();
        drop(journal);
        let mut torn = image(dir.path());
        let tail = torn.len() - 1;
        let had = synced.get(tail).map_or(0, |(_, b)| b.len());
        let mut bits = kept;
        for sector in (had / 512 * 512..torn[tail].1.len()).step_by(512) {
            bits = bits.rotate_left(1);
            if bits & 1 == 0 {
                let end = (sector + 512).min(torn[tail].1.len());
                // A new segment's header went with the folder's sync, or it did not; its data is zero if it is lost.
                torn[tail].1[sector.max(had)..end].fill(0);
            }
        }
        restore(dir.path(), &torn);
        let (_, found) = open_at(dir.path(), options(limit), None).unwrap();
        let due: Vec<_> = counts.iter().enumerate().map(|(i, c)| (i as u64 + 1, *c)).collect();
        prop_assert_eq!(found.epochs.get(..due.len()), Some(due.as_slice()));
        prop_assert!(found.epochs.get(due.len()..).unwrap().iter().all(|e| *e == (last + 1, 4)));
    }
}

/// A full disk in the middle of an epoch, or when its first frame begins a segment: cut back to the last seal, and on again when there is room.
#[test]
fn a_full_disk_costs_the_epoch_only() {
    for after in 0..8_usize {
        let dir = tempfile::tempdir().unwrap();
        let left = Arc::new(parking_lot::Mutex::new(usize::MAX));
        let budget = Arc::clone(&left);
        let disk = Disk::faulty(move |op| match op {
            Op::Write { .. } => {
                let mut left = budget.lock();
                *left = left.checked_sub(1).ok_or(io::Error::from(io::ErrorKind::StorageFull))?;
                Ok(())
            }
            _ => Ok(()),
        });
        let (mut journal, _) = open_at(dir.path(), JournalOptions { segment_bytes_max: 300, disk }, None).unwrap();
        write_epoch(&mut journal, 1, 2).unwrap();
        *left.lock() = after;
        let error = write_epoch(&mut journal, 2, 5).unwrap_err().to_string();
        assert!(error.contains(".seg: cannot ") && error.contains("no storage space"), "{error}");
        journal.abandon().unwrap();
        *left.lock() = usize::MAX;
        write_epoch(&mut journal, 2, 3).unwrap();
        drop(journal);
        let (_, found) = open_at(dir.path(), options(300), None).unwrap();
        assert_eq!(found.epochs, [(1, 2), (2, 3)]);
    }
}

/// A failed sync is never tried again: the journal refuses everything until it is opened anew.
#[test]
fn a_failed_sync_poisons_the_journal() {
    let dir = tempfile::tempdir().unwrap();
    let bad = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flag = Arc::clone(&bad);
    let disk = Disk::faulty(move |op| match op {
        Op::Sync(_) if flag.load(std::sync::atomic::Ordering::Relaxed) => Err(io::Error::other("bad disk")),
        _ => Ok(()),
    });
    let (mut journal, _) = open_at(dir.path(), JournalOptions { segment_bytes_max: 1 << 20, disk }, None).unwrap();
    write_epoch(&mut journal, 1, 2).unwrap();
    bad.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(write_epoch(&mut journal, 2, 2).unwrap_err().to_string().contains("cannot sync the journal: bad disk"));
    bad.store(false, std::sync::atomic::Ordering::Relaxed);
    for error in [journal.append(&[1]).unwrap_err(), journal.abandon().unwrap_err(), write_epoch(&mut journal, 2, 0).unwrap_err()]
    {
        assert!(matches!(error, JournalError::Poisoned { .. }), "{error}");
    }
    let (mut journal, found) = open_at(dir.path(), options(1 << 20), None).unwrap();
    let next = found.epochs.len() as u64 + 1;
    write_epoch(&mut journal, next, 1).unwrap();
}
