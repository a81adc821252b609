//! A small journal, written by the real code, then damaged in ways that the input chooses, then opened and checked.
//!
//! What must hold, with D the first byte that differs from what was written:
//! - nothing is presented that was not committed: epochs are a prefix of those written, and a payload is the one written or fails its
//!   checksum;
//! - nothing that was committed is lost silently: epochs before D are there, and so are those before a seal that is whole in
//!   its place, and those the superblock knows; else the journal is refused, with file and offset, and left as it is;
//! - nothing is refused that was not damaged, and no record before D is blamed;
//! - what is refused, and what cannot be read later, `check` names too, by file and offset; what was not damaged, it finds good;
//! - an opened journal goes on.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use proto::VolumeIndex;
use proto::codec::check_crc;
use proto::fencing::GroupRole;
use proto::frame::{FRAME_HEADER_BYTES, FRAME_MAGIC, encode_data, encode_zero};
use proto::fuzzing::Choices;
use proto::seal::Tally;
use proto::{BLOCK_BYTES, BlockExtent, BlockIndex, Codec, EpochId, Frame, FrameHeader, FrameKind, Generation, Point, Seal};

use super::{CHANGES_MAX, damage, mend};
use crate::check::{self, GroupReport};
use crate::disk::Disk;
use crate::journal::{
    Expected, GroupId, Journal, JournalError, JournalOptions, Mark, PLACED_SEAL_BYTES, SEGMENT_HEADER_BYTES, SegmentHeader, Sink,
    encode_placed_seal, list_segments, open, segment_path,
};
use crate::store::{GroupFolder, Store};
use crate::superblock::{Superblock, Volume};

const GROUP_ID: GroupId = [5; 16];
const VOLUME_BLOCKS: [u64; 2] = [64, 16];

/// Segments by number.
type Image = BTreeMap<u32, Vec<u8>>;

/// How a journal was written.
struct Shape {
    segment_bytes_max: u64,
    first_segment: u32,
    base: Option<Point>,
    /// Frames of each epoch.
    epochs: &'static [usize],
    /// Frames after the last seal.
    open: usize,
    /// Each two epochs are a segment, the first two of which are thinned to one: every other point is left out. The second one is left over.
    thinned: bool,
}

/// The number of the last shape.
const THINNED: usize = 5;

const SHAPES: [Shape; THINNED + 1] = [
    Shape { segment_bytes_max: 1 << 20, first_segment: 1, base: None, epochs: &[2, 0, 3, 1], open: 0, thinned: false },
    Shape { segment_bytes_max: 1 << 20, first_segment: 1, base: None, epochs: &[1, 4], open: 3, thinned: false },
    Shape { segment_bytes_max: 600, first_segment: 1, base: None, epochs: &[3, 2, 5], open: 0, thinned: false },
    Shape {
        segment_bytes_max: 4_500,
        first_segment: 7,
        base: Some(point(1, 41)),
        epochs: &[1, 2, 0, 4],
        open: 2,
        thinned: false,
    },
    Shape { segment_bytes_max: 1 << 20, first_segment: 2, base: Some(point(1, 9)), epochs: &[], open: 1, thinned: false },
    Shape {
        segment_bytes_max: 1 << 20,
        first_segment: 3,
        base: Some(point(1, 4)),
        epochs: &[2, 1, 3, 2, 1, 2],
        open: 2,
        thinned: true,
    },
];

const fn point(generation: u64, epoch: u64) -> Point {
    Point { generation: Generation(generation), epoch: EpochId(epoch) }
}

/// A frame and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Placed {
    segment: u32,
    offset: u64,
    header: FrameHeader,
    extents: Vec<BlockExtent>,
}

impl Placed {
    fn payload<'a>(&self, image: &'a Image) -> Option<&'a [u8]> {
        let from = self.offset as usize + FRAME_HEADER_BYTES + self.header.table_bytes();
        image.get(&self.segment)?.get(from..from + self.header.payload_bytes as usize)
    }

    fn is_whole(&self, payload: &[u8]) -> bool {
        check_crc("frame payload", self.header.payload_crc32, payload).is_ok()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Epoch {
    seal: Seal,
    end: Mark,
    frames: Vec<Placed>,
}

impl Epoch {
    /// Segment and offset of its end.
    fn end_at(&self) -> (u32, u64) {
        (self.end.segment, self.end.bytes)
    }
}

/// A journal as it was written.
struct Original {
    image: Image,
    epochs: Vec<Epoch>,
    /// Where records begin, segment headers among them.
    records: Vec<Mark>,
}

/// What recovery found.
#[derive(Default)]
struct Found {
    epochs: Vec<Epoch>,
    open: Vec<Placed>,
    dropped: bool,
}

impl Sink for Found {
    fn frame(&mut self, segment: u32, offset: u64, header: &FrameHeader, extents: &[BlockExtent]) {
        self.open.push(Placed { segment, offset, header: *header, extents: extents.to_vec() });
    }

    fn sealed(&mut self, seal: &Seal, end: Mark) {
        self.epochs.push(Epoch { seal: *seal, end, frames: std::mem::take(&mut self.open) });
    }

    fn dropped(&mut self) {
        self.open.clear();
        self.dropped = true;
    }
}

/// Damage to a journal.
pub fn journal(scratch: &Path, data: &[u8]) {
    let mut choices = Choices::new(data);
    let shape = match usize::from(choices.u8()) {
        // So that inputs from before it was there go on to mean what they meant.
        byte if byte % 16 == 12 => THINNED,
        byte => byte % THINNED,
    };
    let original = original(shape, scratch);
    let known = choices.below(2 * original.epochs.len() + 1).checked_sub(original.epochs.len() + 1);
    let synced = known.and_then(|n| original.epochs.get(n)).map(|epoch| epoch.seal.point());
    let mut image = original.image.clone();
    for _ in 0..CHANGES_MAX {
        if choices.is_empty() {
            break;
        }
        change(&mut image, original, &mut choices);
    }
    let case = Case { shape: &SHAPES[shape], original, image, synced };
    case.run(&group_folder(scratch, shape, synced));
}

/// One journal as an input left it.
struct Case<'a> {
    shape: &'a Shape,
    original: &'a Original,
    image: Image,
    synced: Option<Point>,
}

impl Case<'_> {
    fn run(&self, folder: &GroupFolder) {
        let journal = folder.journal();
        store_image(&journal, &self.image);
        let report = check_group(folder);
        match self.shape.open(&journal, self.synced) {
            Ok((opened, found)) => {
                self.goes_on(&journal, opened, &found);
                self.opened(&found, &report);
            }
            Err(error) => {
                assert_eq!(load_image(&journal), self.image, "a refused journal is left as it is");
                self.refused(&journal, &error, &report);
            }
        }
    }

    /// The first byte that is not as it was written; `None` if all are.
    fn first_difference(&self) -> Option<Mark> {
        let first = self.shape.first_segment;
        let (before, after) = (&self.original.image, &self.image);
        let numbers = before.keys().chain(after.keys()).filter(|n| **n >= first);
        numbers
            .filter_map(|number| {
                let (was, is) = (before.get(number), after.get(number));
                let (was, is) = (was.map_or(&[][..], Vec::as_slice), is.map_or(&[][..], Vec::as_slice));
                let gone = before.contains_key(number) != after.contains_key(number);
                (gone || was != is).then(|| Mark { segment: *number, bytes: common_prefix(was, is) as u64 })
            })
            .min_by_key(|mark| (mark.segment, mark.bytes))
    }

    /// The epochs whose seals are whole in their places.
    fn whole_seals(&self) -> impl DoubleEndedIterator<Item = usize> {
        let whole = |n: &usize| {
            let end = self.original.epochs[*n].end;
            let range = end.bytes as usize - PLACED_SEAL_BYTES..end.bytes as usize;
            let is = self.image.get(&end.segment).and_then(|bytes| bytes.get(range.clone()));
            is == self.original.image.get(&end.segment).and_then(|bytes| bytes.get(range))
        };
        (0..self.original.epochs.len()).filter(whole)
    }

    fn opened(&self, found: &Found, report: &GroupReport) {
        let (due, is) = (&self.original.epochs, &found.epochs);
        assert_eq!(due.get(..is.len()), Some(is.as_slice()), "only what was committed");
        assert!(found.open.is_empty());
        if self.first_difference().is_none() {
            assert!(report.findings.is_empty(), "found in what is good: {:?}", report.findings);
        }
        let before_damage = match self.first_difference() {
            None => due.len(),
            Some(d) => due.iter().take_while(|e| e.end_at() <= (d.segment, d.bytes)).count(),
        };
        assert!(is.len() >= before_damage, "{} epochs of {before_damage} before any damage", is.len());
        let sealed = self.whole_seals().next_back().map_or(0, |n| n + 1);
        assert!(is.len() + 1 >= sealed, "{} epochs, and the seal of number {sealed} is whole", is.len());
        if let Some(torn) = due.get(is.len()).filter(|_| is.len() < sealed) {
            let last = self.image.last_key_value().map(|(n, bytes)| (*n, bytes.len() as u64));
            assert!(last == Some(torn.end_at()), "only a commit that nothing follows can be torn");
        }
        assert!(self.synced.is_none_or(|s| is.iter().any(|e| e.seal.point() == s)), "{:?} was known to be synced", self.synced);
        let last = is.last().map(|e| e.end.segment);
        for frame in is.iter().flat_map(|e| &e.frames) {
            self.served(frame, last, report);
        }
        for (number, bytes) in self.image.range(self.shape.first_segment..) {
            let header = bytes.get(..SEGMENT_HEADER_BYTES).and_then(|head| SegmentHeader::decode(head).ok());
            let fits = header.is_none_or(|h| h.number == *number && h.group_id == GROUP_ID);
            assert!(fits, "segment {number} belongs elsewhere, and is not refused");
        }
    }

    /// A payload is what was written, or it is refused when it is read and `check` knows it. In `last`, the last segment that is kept,
    /// nothing bad is let through: the next start, which finds nothing after it, would take it for a torn commit.
    fn served(&self, frame: &Placed, last: Option<u32>, report: &GroupReport) {
        let is = frame.payload(&self.image).expect("headers are whole, so is the file");
        if frame.is_whole(is) {
            assert_eq!(Some(is), frame.payload(&self.original.image));
        } else {
            assert!(Some(frame.segment) < last, "payloads of the last segment are looked at");
            assert!(
                is_named(report, (frame.segment, frame.offset)),
                "check does not name {}.seg:{}",
                frame.segment,
                frame.offset
            );
        }
    }

    fn refused(&self, journal: &Path, error: &JournalError, report: &GroupReport) {
        let said = error.to_string();
        assert!(said.starts_with(&journal.display().to_string()) && !said.contains('\n'), "{said}");
        let damage = self.first_difference().unwrap_or_else(|| panic!("refused without a reason: {said}"));
        match error {
            JournalError::Damaged { seal, offset, .. } => {
                let is_it =
                    |e: &Epoch| segment_path(journal, e.end.segment) == *seal && e.end.bytes == offset + PLACED_SEAL_BYTES as u64;
                assert!(self.whole_seals().any(|n| is_it(&self.original.epochs[n])), "no seal of ours: {said}");
            }
            JournalError::DamagedSegment { .. } | JournalError::DamagedEpoch { .. } => {}
            // No place of its own: the journal is as good as a shorter one.
            JournalError::Lost { .. } => {
                assert!(!report.findings.is_empty(), "check finds nothing: {said}");
                return;
            }
            JournalError::Io { .. }
            | JournalError::Unreadable { .. }
            | JournalError::Poisoned { .. }
            | JournalError::Full { .. } => panic!("{said}"),
        }
        let named = named_place(&said).unwrap_or_else(|| panic!("no file and offset: {said}"));
        assert!(is_named(report, named), "check does not name it: {said}");
        let record = self.original.records.iter().rev().find(|r| (r.segment, r.bytes) <= (damage.segment, damage.bytes));
        let record = record.map_or((self.shape.first_segment, 0), |r| (r.segment, r.bytes));
        assert!(named >= record, "{said}: blamed before the damage at {damage:?}");
    }

    /// Another epoch is appended, and the next start finds it after the others.
    fn goes_on(&self, folder: &Path, mut journal: Journal, found: &Found) {
        let next = found.epochs.last().map(|e| e.seal.point()).or(self.shape.base).map_or(EpochId(1), |p| p.epoch.next());
        assert_eq!(
            journal.bytes(),
            load_image(folder).range(self.shape.first_segment..).map(|(_, b)| b.len() as u64).sum::<u64>()
        );
        journal.expect(next);
        let written = write_epoch(&mut journal, next, 2).unwrap_or_else(|error| panic!("cannot go on: {error}"));
        drop(journal);
        let (_, again) = self.shape.open(folder, self.synced).unwrap_or_else(|error| panic!("refused after going on: {error}"));
        assert!(!again.dropped);
        let (last, others) = again.epochs.split_last().expect("what was just committed");
        assert!(others == found.epochs && last.seal == written && last.frames.len() == 2);
    }
}

/// Bytes in which both begin, found by halving: a loop over bytes is slow under the fuzzer.
fn common_prefix(a: &[u8], b: &[u8]) -> usize {
    let (mut same, mut differs) = (0, a.len().min(b.len()) + 1);
    while differs - same > 1 {
        let middle = same + (differs - same) / 2;
        if a[same..middle] == b[same..middle] { same = middle } else { differs = middle }
    }
    same
}

/// Whether a finding is at this segment and offset.
fn is_named(report: &GroupReport, (segment, offset): (u32, u64)) -> bool {
    report.findings.iter().any(|f| f.offset == offset && f.path.ends_with(format!("{segment:010}.seg")))
}

/// Segment and offset that a message begins with.
fn named_place(said: &str) -> Option<(u32, u64)> {
    let (path, rest) = said.split_once(".seg: at offset ")?;
    let (offset, _) = rest.split_once(':')?;
    Some((path.rsplit_once('/')?.1.parse().ok()?, offset.parse().ok()?))
}

/// One change of one segment, or of the set of segments.
fn change(image: &mut Image, original: &Original, choices: &mut Choices<'_>) {
    let mark = original.records[choices.below(original.records.len())];
    let into = choices.u8();
    // Near the beginning of a record or anywhere behind it.
    let at = mark.bytes as usize + usize::from(into) * if choices.u8().is_multiple_of(4) { 64 } else { 1 };
    match choices.below(16) {
        0 => drop(image.remove(&mark.segment)),
        1 => {
            let to = mark.segment.wrapping_sub(4).wrapping_add(choices.u8() as u32 % 9);
            if let Some(bytes) = image.get(&mark.segment).cloned() {
                image.insert(to, bytes);
            }
        }
        2 => drop(image.insert(mark.segment.wrapping_add(choices.u8() as u32 % 3), Vec::new())),
        3 => {
            let Some(bytes) = image.get_mut(&mark.segment) else { return };
            mend_record(bytes, mark.bytes as usize);
        }
        _ => {
            let Some(bytes) = image.get_mut(&mark.segment) else { return };
            damage(bytes, at, choices);
            if choices.u8() % 4 == 3 {
                mend_record(bytes, mark.bytes as usize);
            }
        }
    }
}

/// Gives a changed segment header or frame header a good checksum: what was in the wrong place is no better for it.
fn mend_record(bytes: &mut [u8], at: usize) {
    if at == 0
        && let Some(head) = bytes.get_mut(..SEGMENT_HEADER_BYTES)
    {
        mend(head);
    } else if let Some(head) = bytes.get_mut(at..at + FRAME_HEADER_BYTES)
        && head.starts_with(&FRAME_MAGIC)
    {
        mend(head);
    }
}

impl Shape {
    fn expected(&self) -> Expected {
        let volume_blocks = Arc::from(VOLUME_BLOCKS);
        Expected { group_id: GROUP_ID, first_segment: self.first_segment, base: self.base, volume_blocks }
    }

    fn open(&self, folder: &Path, synced: Option<Point>) -> Result<(Journal, Found), JournalError> {
        let mut found = Found::default();
        let options = JournalOptions { segment_bytes_max: self.segment_bytes_max, disk: Disk::default() };
        let journal = open(folder, &self.expected(), synced, options, &mut found)?;
        Ok((journal, found))
    }

    /// Writes the journal, and reads it once to know where things are.
    fn write(&self, folder: &Path) -> Original {
        store_image(folder, &Image::new());
        let (mut journal, _) = self.open(folder, None).unwrap();
        let mut next = self.base.map_or(EpochId(1), |p| p.epoch.next());
        journal.expect(next);
        for (i, count) in self.epochs.iter().enumerate() {
            if self.thinned && i.is_multiple_of(2) {
                journal.end_segment();
            }
            write_epoch(&mut journal, next, *count).unwrap();
            next = next.next();
        }
        if self.thinned {
            drop(journal);
            let (_, found) = self.open(folder, None).unwrap();
            let thinned = thin(&load_image(folder), &found.epochs);
            std::fs::write(segment_path(folder, self.first_segment), thinned).unwrap();
            let left_over = std::fs::read(segment_path(folder, self.first_segment + 1)).unwrap();
            (journal, _) = self.open(folder, None).unwrap();
            journal.expect(next);
            std::fs::write(segment_path(folder, self.first_segment + 1), left_over).unwrap();
        }
        let sealed = load_image(folder);
        for frame in frames(next, self.open) {
            journal.append(&frame).unwrap();
        }
        drop(journal);
        let mut image = load_image(folder);
        image.values_mut().for_each(|bytes| without_time(bytes));
        let (_, found) = self.open(folder, None).unwrap();
        let mut records: Vec<Mark> = image.keys().map(|segment| Mark { segment: *segment, bytes: 0 }).collect();
        for epoch in &found.epochs {
            records.extend(epoch.frames.iter().map(|f| Mark { segment: f.segment, bytes: f.offset }));
            records.push(Mark { segment: epoch.end.segment, bytes: epoch.end.bytes - PLACED_SEAL_BYTES as u64 });
        }
        // The open frames, all of them as one.
        records.extend(sealed.iter().map(|(n, bytes)| Mark { segment: *n, bytes: bytes.len() as u64 }));
        records.sort_by_key(|mark| (mark.segment, mark.bytes));
        Original { image, epochs: found.epochs, records }
    }
}

/// The first two segments of a journal as one, without the points of the first and third epoch.
fn thin(image: &Image, epochs: &[Epoch]) -> Vec<u8> {
    let (number, first) = image.first_key_value().unwrap();
    let header = SegmentHeader::decode(&first[..SEGMENT_HEADER_BYTES]).unwrap();
    let mut out = SegmentHeader { further: 1, thinned: 9, ..header }.encode().to_vec();
    let mut tally = Tally::default();
    for (i, epoch) in epochs[..4].iter().enumerate() {
        for frame in &epoch.frames {
            let bytes = &image[&frame.segment][frame.offset as usize..][..frame.header.frame_bytes()];
            let (data, zero) = if frame.header.kind == FrameKind::Data { (1, 0) } else { (0, 2) };
            tally.add(bytes.first_chunk().unwrap(), bytes.len(), data, zero);
            out.extend_from_slice(bytes);
        }
        if i % 2 == 1 {
            let seal = seal(epoch.seal.epoch, &std::mem::take(&mut tally));
            let placed = encode_placed_seal(&GROUP_ID, *number, out.len() as u64, &seal);
            out.extend_from_slice(&placed);
        }
    }
    out
}

/// The same image at every run, so that an input means the same.
fn without_time(segment: &mut [u8]) {
    let header = SegmentHeader::decode(&segment[..SEGMENT_HEADER_BYTES]).unwrap();
    segment[..SEGMENT_HEADER_BYTES].copy_from_slice(&SegmentHeader { created_unix_us: 0, ..header }.encode());
}

fn original(shape: usize, scratch: &Path) -> &'static Original {
    static ORIGINALS: [OnceLock<Original>; SHAPES.len()] = [const { OnceLock::new() }; SHAPES.len()];
    ORIGINALS[shape].get_or_init(|| {
        let folder = scratch.join("original");
        std::fs::create_dir_all(&folder).unwrap();
        SHAPES[shape].write(&folder)
    })
}

fn write_epoch(journal: &mut Journal, epoch: EpochId, count: usize) -> Result<Seal, JournalError> {
    let frames = frames(epoch, count);
    let mut tally = Tally::default();
    for bytes in &frames {
        journal.append(bytes)?;
        let volume = usize::from(bytes[6]);
        let frame = Frame::decode(bytes, VOLUME_BLOCKS[volume]).unwrap();
        let (data, zero) = if frame.header.kind == FrameKind::Data { (1, 0) } else { (0, 2) };
        tally.add(bytes.first_chunk::<FRAME_HEADER_BYTES>().unwrap(), bytes.len(), data, zero);
    }
    let seal = seal(epoch, &tally);
    journal.commit(&seal)?;
    Ok(seal)
}

fn seal(epoch: EpochId, tally: &Tally) -> Seal {
    Seal {
        passes: 2,
        epoch,
        // Raised now and then, as by failovers.
        generation: Generation(1 + epoch.0 / 3),
        cut_unix_us: epoch.0,
        frames: tally.frames,
        frame_bytes: tally.frame_bytes,
        data_blocks: tally.data_blocks,
        zero_blocks: tally.zero_blocks,
        first_write_unix_us: 0,
        session: proto::SessionToken::default(),
        digest: tally.digest(),
    }
}

fn frames(epoch: EpochId, count: usize) -> Vec<Vec<u8>> {
    let one = |i: usize| {
        let start = BlockIndex((epoch.0 * 7 + i as u64) % 14);
        let (volume, pass) = (VolumeIndex((i % 2) as u16), (i / 2) as u16);
        if i % 3 == 2 {
            return encode_zero(volume, epoch, pass, &[BlockExtent { start, blocks: 2 }]);
        }
        let codec = if i % 3 == 1 { Codec::Raw } else { Codec::Lz4 };
        encode_data(volume, epoch, pass, &[BlockExtent { start, blocks: 1 }], &content(epoch), codec)
    };
    (0..count).map(one).collect()
}

/// A block by a guest that knows the journal's format, but not the group's identity.
fn content(epoch: EpochId) -> Vec<u8> {
    let forged = seal(epoch, &Tally::default());
    let mut block = vec![epoch.0 as u8; BLOCK_BYTES as usize];
    for (i, place) in block.chunks_exact_mut(512).enumerate() {
        place[..PLACED_SEAL_BYTES].copy_from_slice(&encode_placed_seal(&[0x80 + i as u8; 16], 1, i as u64 * 512, &forged));
    }
    block
}

fn load_image(folder: &Path) -> Image {
    list_segments(folder).unwrap().into_iter().map(|n| (n, std::fs::read(segment_path(folder, n)).unwrap())).collect()
}

fn store_image(folder: &Path, image: &Image) {
    for number in list_segments(folder).unwrap() {
        std::fs::remove_file(segment_path(folder, number)).unwrap();
    }
    for (number, bytes) in image {
        std::fs::write(segment_path(folder, *number), bytes).unwrap();
    }
}

/// A store with one group of this shape, made once.
fn group_folder(scratch: &Path, shape: usize, synced: Option<Point>) -> GroupFolder {
    let root = scratch.join(format!("{shape}-{}", synced.map_or(0, |s| s.epoch.0)));
    if !root.exists() {
        let volumes = VOLUME_BLOCKS.iter().enumerate();
        let block = Superblock {
            group_id: GROUP_ID,
            owner: "SHA256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".parse().unwrap(),
            generation: Generation(1),
            role: GroupRole::Replica,
            base: SHAPES[shape].base,
            base_seal: Default::default(),
            folding: None,
            synced,
            fork: None,
            first_segment: SHAPES[shape].first_segment,
            created_unix_us: 0,
            volumes: volumes
                .map(|(i, blocks)| Volume { name: format!("v{i}").parse().unwrap(), size_bytes: blocks * BLOCK_BYTES })
                .collect(),
        };
        let store = Store::open(&root).unwrap();
        let folder = store.create_group(&"c".parse().unwrap(), &"g".parse().unwrap(), block).unwrap();
        folder.release_reserve(&Disk::default()).unwrap();
    }
    GroupFolder { client: "c".parse().unwrap(), group: "g".parse().unwrap(), path: root.join("c").join("g") }
}

fn check_group(folder: &GroupFolder) -> GroupReport {
    let root = folder.path.ancestors().nth(2).expect("STORE/client/group");
    let mut report = check::check(root, &mut |_| ()).unwrap();
    assert!(report.groups.iter().flat_map(|g| &g.findings).all(|f| f.path.starts_with(root)));
    report.groups.pop().expect("one group")
}
