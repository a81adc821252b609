//! Walks a journal from its first segment: headers, records, and the rules that tie them into sealed epochs.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proto::codec::DecodeError;
use proto::seal::Tally;
use proto::{BlockExtent, EpochId, FrameHeader, FrameKind, Generation, Point, Seal};

use super::record::{Payloads, Record, RecordError, SegmentReader};
use super::segment::{
    FIRST_SEGMENT, GroupId, SEGMENT_HEADER_BYTES, SegmentHeader, list_journal, list_segments, read_header, segment_path,
};

/// A place in the journal: the first `bytes` of segment `segment`, and all of those before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) segment: u32,
    pub(crate) bytes: u64,
}

/// What a journal must fit.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    pub(crate) group_id: GroupId,
    pub(crate) first_segment: u32,
    pub(crate) base: Option<Point>,
    pub(crate) volume_blocks: Arc<[u64]>,
}

impl Expected {
    /// Whether the base has what this epoch says.
    pub(crate) fn is_folded(&self, epoch: EpochId) -> bool {
        self.base.is_some_and(|base| epoch <= base.epoch)
    }
}

/// One step of a walk.
#[derive(Debug)]
pub(crate) enum Item {
    Frame { segment: u32, offset: u64, header: FrameHeader, extents: Vec<BlockExtent>, payload: Result<(), DecodeError> },
    Seal { seal: Seal, end: Mark },
}

/// Where and why a walk cannot go on.
#[derive(Debug, thiserror::Error)]
#[error("{}: at offset {offset}: {error}", path.display())]
pub(crate) struct Bad {
    pub(crate) path: PathBuf,
    pub(crate) segment: u32,
    pub(crate) offset: u64,
    /// The header of the segment is whole and says that it does not belong here; no torn write leaves that.
    pub(crate) foreign: bool,
    #[source]
    pub(crate) error: RecordError,
}

impl Bad {
    /// Whether the disk did not give the bytes, so that nothing is known about them.
    pub(crate) fn is_io(&self) -> bool {
        matches!(self.error, RecordError::Io(_))
    }
}

/// A seal found by searching.
#[derive(Debug)]
pub(crate) struct LaterSeal {
    pub(crate) segment: u32,
    pub(crate) offset: u64,
    pub(crate) seal: Seal,
    /// Nothing is after it.
    pub(crate) is_end: bool,
}

impl LaterSeal {
    pub(crate) fn end(&self) -> Mark {
        Mark { segment: self.segment, bytes: self.offset + super::segment::PLACED_SEAL_BYTES as u64 }
    }
}

/// What a record was.
enum Step {
    Item(Item),
    /// Of an epoch that is in the base.
    Folded,
    EndOfSegment,
}

/// What holds within the epoch being read; in a thinned segment, within the epochs that became one.
#[derive(Debug)]
struct EpochState {
    /// The first epoch after the last seal.
    next: EpochId,
    /// That of the last frame.
    at: EpochId,
    generation: Generation,
    pass: u16,
    tally: Tally,
}

impl EpochState {
    fn frame(
        &mut self,
        header: &FrameHeader,
        head: &[u8; 40],
        extents: &[BlockExtent],
        is_thinned: bool,
    ) -> Result<(), DecodeError> {
        let rule = |rule| DecodeError::Rule { what: "journal", rule };
        if header.epoch != self.next && !is_thinned {
            return Err(rule("frames are of the epoch after the last seal"));
        }
        if header.epoch < self.at {
            return Err(rule("epochs follow each other"));
        }
        if header.pass < self.pass && header.epoch == self.at {
            return Err(rule("passes of an epoch follow each other"));
        }
        (self.at, self.pass) = (header.epoch, header.pass);
        let blocks: u64 = extents.iter().map(|e| u64::from(e.blocks)).sum();
        let (data, zero) = match header.kind {
            FrameKind::Data => (blocks, 0),
            FrameKind::Zero => (0, blocks),
        };
        self.tally.add(head, header.frame_bytes(), data, zero);
        Ok(())
    }

    fn seal(&mut self, seal: &Seal, is_thinned: bool) -> Result<(), DecodeError> {
        let rule = |rule| DecodeError::Rule { what: "seal in the journal", rule };
        let follows = if is_thinned { seal.epoch >= self.at } else { seal.epoch == self.next };
        if !follows || seal.generation < self.generation {
            return Err(rule("seals follow each other"));
        }
        if !self.tally.matches(seal) {
            return Err(rule("counts and digest are those of its frames"));
        }
        *self = Self::after(seal.point());
        Ok(())
    }

    fn after(point: Point) -> Self {
        let next = point.epoch.next();
        Self { next, at: next, generation: point.generation, pass: 0, tally: Tally::default() }
    }
}

/// The segment before the open one.
#[derive(Clone, Copy, Debug)]
struct Closed {
    last: u32,
    /// `None`: it was thinned, and the next one knows how long it was before.
    bytes: Option<u64>,
}

/// A walk in progress.
#[derive(Debug)]
pub(crate) struct Walker {
    folder: PathBuf,
    expected: Expected,
    segments: VecDeque<u32>,
    end: Option<Mark>,
    reader: Option<SegmentReader>,
    /// The last number that the open segment stands for, and whether it was thinned.
    open: (u32, bool),
    /// Files of numbers that it stands for.
    dead: Vec<u32>,
    last_closed: Option<Closed>,
    state: EpochState,
    payloads: (Payloads, u32),
    /// Within the first segment, before the seal of the base's point: records of epochs that were folded, whose beginning may be gone.
    folded: bool,
}

impl Walker {
    /// Starts at the first segment and goes on to `end`, or to the end of the last segment. Looks at payloads as told, from
    /// the given segment on.
    pub(crate) fn new(folder: &Path, expected: Expected, end: Option<Mark>, payloads: (Payloads, u32)) -> std::io::Result<Self> {
        let mut segments: VecDeque<u32> = list_segments(folder)?.into();
        segments.retain(|n| *n >= expected.first_segment && end.is_none_or(|e| *n <= e.segment));
        let none = Point { generation: Generation(0), epoch: EpochId(0) };
        let state = EpochState::after(expected.base.unwrap_or(none));
        Ok(Self {
            folder: folder.to_owned(),
            expected,
            segments,
            end,
            reader: None,
            open: (0, false),
            dead: Vec::new(),
            last_closed: None,
            state,
            payloads,
            folded: false,
        })
    }

    /// The next record that fits, `None` at the end. After `Bad` the walk stays where it is.
    pub(crate) fn next(&mut self) -> Result<Option<Item>, Bad> {
        loop {
            let Some(mut reader) = self.reader.take() else {
                let Some(number) = self.segments.front().copied() else { return Ok(None) };
                let (reader, header, folded) = self.open(number)?;
                (self.reader, self.folded) = (Some(reader), folded);
                self.open = (header.last(), header.thinned > 0);
                // What is left over of before it was thinned goes with it.
                let dead = self.segments.partition_point(|next| *next <= header.last());
                self.dead = self.segments.drain(..dead).skip_while(|own| *own <= number).collect();
                continue;
            };
            let (segment, offset) = (reader.number(), reader.offset());
            let step = self.step(&mut reader);
            match step {
                Ok(Step::EndOfSegment) => {
                    self.bury()?;
                    let (last, is_thinned) = std::mem::take(&mut self.open);
                    self.last_closed = Some(Closed { last, bytes: (!is_thinned).then_some(reader.bytes()) });
                }
                Ok(Step::Folded) => self.reader = Some(reader),
                Ok(Step::Item(item)) => {
                    self.reader = Some(reader);
                    return Ok(Some(item));
                }
                Err(error) => {
                    reader.seek(offset);
                    self.reader = Some(reader);
                    return Err(self.bad(segment, offset, error));
                }
            }
        }
    }

    /// The epoch that the next seal is of.
    pub(crate) fn next_epoch(&self) -> EpochId {
        self.state.next
    }

    /// Whether the walk is in a segment that was thinned: that was synced as a whole before it got its name.
    pub(crate) fn is_in_thinned(&self) -> bool {
        self.open.1
    }

    /// The frames since the last seal.
    pub(crate) fn tally(&self) -> &Tally {
        &self.state.tally
    }

    fn step(&mut self, reader: &mut SegmentReader) -> Result<Step, RecordError> {
        let (segment, offset) = (reader.number(), reader.offset());
        let payloads = if segment >= self.payloads.1 { self.payloads.0 } else { Payloads::Skip };
        let is_thinned = self.is_in_thinned();
        Ok(match reader.next(payloads)? {
            None if is_thinned && self.state.tally.frames > 0 => {
                return Err(DecodeError::Rule { what: "journal", rule: "a thinned segment ends with a seal" }.into());
            }
            None => Step::EndOfSegment,
            Some(Record::Frame { header, .. }) if self.folded && self.expected.is_folded(header.epoch) => Step::Folded,
            Some(Record::Seal(seal)) if self.folded && self.expected.is_folded(seal.epoch) => {
                self.folded = self.expected.base != Some(seal.point());
                Step::Folded
            }
            Some(Record::Frame { header, head, extents, payload }) => {
                self.state.frame(&header, &head, &extents, is_thinned)?;
                Step::Item(Item::Frame { segment, offset, header, extents, payload })
            }
            Some(Record::Seal(seal)) => {
                self.state.seal(&seal, is_thinned)?;
                Step::Item(Item::Seal { seal, end: Mark { segment, bytes: reader.offset() } })
            }
        })
    }

    /// The reader of a segment, its header, and whether it begins with what was folded.
    fn open(&self, number: u32) -> Result<(SegmentReader, SegmentHeader, bool), Bad> {
        let bad = |offset, error| self.bad(number, offset, error);
        let foreign = |number, rule| {
            let error = RecordError::Bad(DecodeError::Rule { what: "segment header", rule });
            Bad { foreign: true, ..self.bad(number, 0, error) }
        };
        let due = self.last_closed.map_or(self.expected.first_segment, |closed| closed.last + 1);
        if number != due {
            return Err(foreign(due, "segments are numbered without a gap; this one is missing"));
        }
        let file = File::open(segment_path(&self.folder, number)).map_err(|e| bad(0, e.into()))?;
        let bytes = file.metadata().map_err(|e| bad(0, e.into()))?.len();
        let mut head = [0; SEGMENT_HEADER_BYTES];
        let n = crate::disk::read_up_to(&file, &mut head, 0).map_err(|e| bad(0, e.into()))?;
        let header = SegmentHeader::decode(head.get(..n).unwrap_or_default()).map_err(|e| bad(0, e.into()))?;
        if header.group_id != self.expected.group_id || header.number != number {
            return Err(foreign(number, "the group's own identity and the number of the file's name"));
        }
        let folded = number == self.expected.first_segment && self.expected.is_folded(header.first_epoch);
        if header.first_epoch != self.state.next && !folded {
            return Err(foreign(number, "begins with the epoch after the last seal"));
        }
        // What came before the first kept segment is gone with it.
        let first = (number == FIRST_SEGMENT).then_some(0);
        let previous = self.last_closed.map_or(first, |closed| closed.bytes);
        if previous.is_some_and(|p| p != header.previous_bytes) {
            return Err(foreign(number, "the segment before it is as long as it was when this one was begun"));
        }
        let bytes = self.end.filter(|e| e.segment == number).map_or(bytes, |e| e.bytes.min(bytes));
        let blocks = Arc::clone(&self.expected.volume_blocks);
        Ok((SegmentReader::new(file, bytes, number, self.expected.group_id, blocks), header, folded))
    }

    /// Looks whether the files that the segment which was just read stands for may be left out: it has what they begin with.
    fn bury(&mut self) -> Result<(), Bad> {
        for number in std::mem::take(&mut self.dead) {
            let header = match File::open(segment_path(&self.folder, number)) {
                Ok(file) => read_header(&file).map_err(|error| self.bad(number, 0, error.into()))?,
                // Removed meanwhile.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
                Err(error) => return Err(self.bad(number, 0, error.into())),
            };
            let is_ours = |h: &SegmentHeader| h.number == number && h.group_id == self.expected.group_id;
            if header.is_some_and(|h| !is_ours(&h) || h.first_epoch >= self.state.next) {
                let rule = "the segment before it has all of it, as it says";
                let error = RecordError::Bad(DecodeError::Rule { what: "segment header", rule });
                return Err(Bad { foreign: true, ..self.bad(number, 0, error) });
            }
        }
        Ok(())
    }

    fn bad(&self, segment: u32, offset: u64, error: RecordError) -> Bad {
        Bad { path: segment_path(&self.folder, segment), segment, offset, foreign: false, error }
    }

    /// The place and content of the first seal of this journal after a bad record, in whatever segment: its existence
    /// means that the bad record is damage and not a torn end.
    pub(crate) fn find_later_seal(&self, bad: &Bad) -> std::io::Result<Option<LaterSeal>> {
        let live = list_journal(&self.folder, bad.segment)?.live;
        let last = live.last().map(|segment| segment.number);
        for number in live.into_iter().map(|segment| segment.number) {
            let file = match File::open(segment_path(&self.folder, number)) {
                Ok(file) => file,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let bytes = file.metadata()?.len();
            let blocks = Arc::clone(&self.expected.volume_blocks);
            let reader = SegmentReader::new(file, bytes, number, self.expected.group_id, blocks);
            // Not the bad record itself: a seal whose frames do not fit is found bad, not missing.
            let from = if number == bad.segment { bad.offset + 1 } else { 0 };
            if let Some((offset, seal)) = reader.find_seal(from)? {
                let end = offset + super::segment::PLACED_SEAL_BYTES as u64;
                let is_end = Some(number) == last && reader.bytes() == end;
                return Ok(Some(LaterSeal { segment: number, offset, seal, is_end }));
            }
        }
        Ok(None)
    }

    /// Goes on after the seal that [`find_later_seal`](Self::find_later_seal) found. Only `check` does so, to name more
    /// than the first damage.
    pub(crate) fn resume_after(&mut self, later: &LaterSeal) -> std::io::Result<()> {
        let Mark { segment: number, bytes: end } = later.end();
        let file = File::open(segment_path(&self.folder, number))?;
        let bytes = file.metadata()?.len();
        self.open = read_header(&file)?.map_or((number, false), |header| (header.last(), header.thinned > 0));
        let blocks = Arc::clone(&self.expected.volume_blocks);
        let mut reader = SegmentReader::new(file, bytes, number, self.expected.group_id, blocks);
        reader.seek(end);
        self.reader = Some(reader);
        let last = self.open.0;
        self.segments = list_segments(&self.folder)?.into_iter().filter(|n| *n > last).collect();
        self.state = EpochState::after(later.seal.point());
        self.folded = self.expected.base.is_some_and(|base| later.seal.point() < base);
        Ok(())
    }
}
