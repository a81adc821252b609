//! The append-only log of committed epochs.
//!
//! Owns the segment files of one group. Always holds: everything up to the last seal is durable and never changes; what is
//! after it belongs to the one epoch that is arriving and can be cut off at any time. Knows nothing of sessions, and does
//! not look into payloads.

mod record;
mod recover;
mod segment;
#[cfg(test)]
mod tests;
mod walk;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proto::{EpochId, Point, Seal};

use crate::disk::{Disk, DiskFile, is_out_of_space};

pub(crate) use record::Payloads;
pub(crate) use recover::{Sink, Unsealed, open, refusal};
use segment::Listing;
pub use segment::{
    FIRST_SEGMENT, GroupId, PLACED_SEAL_BYTES, SEGMENT_HEADER_BYTES, SEGMENT_MAGIC, SegmentHeader, layout, segment_path,
};
pub(crate) use segment::{Segment, building_path, encode_placed_seal, list_journal, list_segments};
pub(crate) use walk::{Bad, Expected, Item, Mark, Walker};

/// A record that does not fit: file, offset, reason.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct BadRecord(#[from] Box<Bad>);

impl From<Bad> for BadRecord {
    fn from(bad: Bad) -> Self {
        Self(Box::new(bad))
    }
}

/// Why a journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A file operation failed.
    #[error("{}: cannot {what} the journal: {source}{}", path.display(), remedy(source))]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// An fdatasync failed now or earlier: what is on disk is unknown until it is read again.
    #[error("{}: a sync of the journal failed, nothing more is written: check the disk, then restart the node", path.display())]
    Poisoned {
        /// The journal's folder.
        path: PathBuf,
    },
    /// A bad record with a valid seal after it.
    #[error(
        "{bad}; the journal is damaged, since a valid seal follows in {} at offset {offset}: run `twinsite check`", seal.display()
    )]
    Damaged {
        /// The record.
        bad: BadRecord,
        /// File of the seal.
        seal: PathBuf,
        /// Offset of the seal.
        offset: u64,
    },
    /// A bad record in what was synced, or a segment that does not belong here.
    #[error("{bad}; the journal is damaged: run `twinsite check`")]
    DamagedSegment {
        /// The record.
        bad: BadRecord,
    },
    /// A bad payload in an epoch that was synced.
    #[error("{bad}; the journal is damaged, since point {point} was committed: run `twinsite check`")]
    DamagedEpoch {
        /// The record.
        bad: BadRecord,
        /// The point.
        point: Point,
    },
    /// A record that the disk does not give.
    #[error("{bad}: nothing is dropped for that: check the disk")]
    Unreadable {
        /// The record.
        bad: BadRecord,
    },
    /// A point that the superblock knows of is not there.
    #[error(
        "{}: the journal is damaged: it ends at {}, and point {synced} was committed: run `twinsite check`", path.display(), end.map_or_else(|| "nothing".to_owned(), |p| format!("point {p}"))
    )]
    Lost {
        /// The journal's folder.
        path: PathBuf,
        /// Its newest point.
        end: Option<Point>,
        /// The point.
        synced: Point,
    },
    /// All numbers of data frames are used up.
    #[error("{}: the journal holds 4 billion frames: fold or begin the group anew", path.display())]
    Full {
        /// The journal's folder.
        path: PathBuf,
    },
}

impl JournalError {
    /// The record that it is about, if it is about one.
    pub(crate) fn bad(&self) -> Option<&Bad> {
        match self {
            Self::Damaged { bad, .. }
            | Self::DamagedSegment { bad }
            | Self::DamagedEpoch { bad, .. }
            | Self::Unreadable { bad } => Some(&bad.0),
            Self::Io { .. } | Self::Poisoned { .. } | Self::Lost { .. } | Self::Full { .. } => None,
        }
    }
}

/// What to do about a failed operation, where that is known.
fn remedy(source: &io::Error) -> &'static str {
    if is_out_of_space(source) { ": free space in the store; replication goes on by itself" } else { "" }
}

/// A segment that is older ends with the next epoch.
const SEGMENT_AGE_MAX: Duration = Duration::from_secs(3600);

/// What can be set for a journal.
#[derive(Clone, Debug)]
pub(crate) struct JournalOptions {
    /// A segment that would grow beyond this is ended and the next one begun.
    pub(crate) segment_bytes_max: u64,
    /// Where it is written.
    pub(crate) disk: Disk,
}

/// The segments of a journal that have ended, in order: all but the one that is appended to.
pub(crate) type Ended = Arc<Mutex<Vec<Segment>>>;

/// The journal of a group, open for appending.
#[derive(Debug)]
pub(crate) struct Journal {
    folder: PathBuf,
    group_id: GroupId,
    first_segment: u32,
    options: JournalOptions,
    tail: Option<Tail>,
    ended: Ended,
    sealed: Option<Mark>,
    next_epoch: EpochId,
    poisoned: bool,
    /// The tail is ended before anything else is appended.
    ending: bool,
    /// Bytes of all segments.
    bytes: u64,
    sealed_bytes: u64,
}

#[derive(Debug)]
struct Tail {
    number: u32,
    /// The last number that it stands for.
    last: u32,
    thinned: u8,
    file: DiskFile,
    bytes: u64,
    /// When it was begun, or opened again.
    since: Instant,
}

impl Tail {
    fn new(number: u32, file: DiskFile, bytes: u64) -> Self {
        Self { number, last: number, thinned: 0, file, bytes, since: Instant::now() }
    }

    /// The segment `of`, cut to `bytes`, open again.
    fn again(of: Segment, file: DiskFile, bytes: u64) -> Self {
        Self { last: of.last, thinned: of.thinned, ..Self::new(of.number, file, bytes) }
    }

    fn ended(&self) -> Segment {
        Segment { number: self.number, last: self.last, bytes: self.bytes, thinned: self.thinned }
    }
}

impl Journal {
    /// Cuts off what is after the last seal, or after what is kept of the epoch behind it, and goes on from there.
    fn resume(
        folder: &Path,
        expected: &Expected,
        (sealed, kept): (Option<Mark>, Option<Mark>),
        options: JournalOptions,
    ) -> Result<Self, JournalError> {
        let io = |source| JournalError::Io { path: folder.to_owned(), what: "truncate", source };
        let end = kept.or(sealed);
        let tail = recover::truncate_to(&options.disk, folder, expected.first_segment, end).map_err(io)?;
        let mut ended = list_journal(folder, expected.first_segment).and_then(Listing::whole).map_err(io)?.live;
        let (mut bytes, mut sealed_bytes) = (0, 0);
        for segment in &ended {
            bytes += segment.bytes;
            sealed_bytes += match sealed {
                Some(mark) if segment.number < mark.segment => segment.bytes,
                Some(mark) if segment.number == mark.segment => mark.bytes,
                _ => 0,
            };
        }
        let tail = tail.and_then(|file| ended.pop().map(|last| Tail::again(last, file, last.bytes)));
        Ok(Self {
            folder: folder.to_owned(),
            group_id: expected.group_id,
            first_segment: expected.first_segment,
            options,
            ending: tail.as_ref().is_some_and(|tail| tail.thinned > 0),
            tail,
            ended: Arc::new(Mutex::new(ended)),
            sealed,
            next_epoch: EpochId(0),
            poisoned: false,
            bytes,
            sealed_bytes,
        })
    }

    /// The segments that have ended.
    pub(crate) fn ended(&self) -> Ended {
        Arc::clone(&self.ended)
    }

    /// The first segment that is needed when the base has everything up to `end`, the end of a seal; the tail is always needed.
    pub(crate) fn first_needed(&self, end: Mark) -> u32 {
        let ended = self.ended.lock();
        let done = ended.iter().find(|segment| segment.number == end.segment && segment.bytes == end.bytes);
        done.map_or(end.segment, |segment| segment.last + 1)
    }

    /// Bytes of the segments before `first`.
    pub(crate) fn bytes_before(&self, first: u32) -> u64 {
        self.ended.lock().iter().filter(|segment| segment.number < first).map(|segment| segment.bytes).sum()
    }

    /// The journal begins with segment `first` from now on; those before it are no longer its own.
    pub(crate) fn begin_at(&mut self, first: u32) {
        let bytes_before = self.bytes_before(first);
        self.first_segment = first;
        self.ended.lock().retain(|segment| segment.number >= first);
        self.bytes = self.bytes.saturating_sub(bytes_before);
        self.sealed_bytes = self.sealed_bytes.saturating_sub(bytes_before);
    }

    /// Whether `new` can stand for segments of `bytes`: they have ended, before the segment of the newest seal, and are what they were.
    pub(crate) fn can_replace(&self, new: &Segment, bytes: u64) -> bool {
        let ended = self.ended.lock();
        let replaced = || ended.iter().filter(|segment| (new.number..=new.last).contains(&segment.number));
        replaced().next().is_some_and(|segment| segment.number == new.number)
            && replaced().next_back().is_some_and(|segment| segment.last == new.last)
            && replaced().map(|segment| segment.bytes).sum::<u64>() == bytes
            && self.sealed.is_some_and(|sealed| new.last < sealed.segment)
    }

    /// `new` stands for segments that have ended. It has its name by now.
    pub(crate) fn replace(&mut self, new: Segment) {
        let mut ended = self.ended.lock();
        let from = ended.partition_point(|segment| segment.number < new.number);
        let to = ended.partition_point(|segment| segment.number <= new.last);
        let before: u64 = ended.splice(from..to, [new]).map(|segment| segment.bytes).sum();
        self.bytes = self.bytes.saturating_sub(before) + new.bytes;
        self.sealed_bytes = self.sealed_bytes.saturating_sub(before) + new.bytes;
    }

    /// Tells which epoch arrives next; stands in the header of a new segment.
    pub(crate) fn expect(&mut self, epoch: EpochId) {
        self.next_epoch = epoch;
    }

    /// Bytes of all segments, with what is not sealed yet.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn segment_bytes_max(&self) -> u64 {
        self.options.segment_bytes_max
    }

    pub(crate) fn is_poisoned(&self) -> bool {
        self.poisoned
    }

    /// The segment that is appended to.
    pub(crate) fn tail_path(&self) -> Option<PathBuf> {
        self.tail.as_ref().map(|tail| segment_path(&self.folder, tail.number))
    }

    /// Begins a new segment before anything else is appended: a start reads the payloads of the last one, and refuses what is damaged there.
    pub(crate) fn end_segment(&mut self) {
        self.ending = true;
    }

    /// Appends whole frames. Returns segment and offset of the first.
    ///
    /// After an error the caller must [`abandon`](Self::abandon).
    pub(crate) fn append(&mut self, frames: &[u8]) -> Result<(u32, u64), JournalError> {
        self.check()?;
        self.make_room(frames.len() as u64)?;
        let Some(tail) = self.tail.as_mut() else { return Err(Self::poisoned(&self.folder)) };
        let offset = tail.bytes;
        let written = tail.file.append_at(frames, offset);
        written.map_err(|source| JournalError::Io { path: segment_path(&self.folder, tail.number), what: "write", source })?;
        tail.bytes += frames.len() as u64;
        self.bytes += frames.len() as u64;
        Ok((tail.number, offset))
    }

    /// Ends the epoch: its seal, then one fdatasync. Everything up to here is durable when this returns.
    ///
    /// After an error the caller must [`abandon`](Self::abandon).
    pub(crate) fn commit(&mut self, seal: &Seal) -> Result<Mark, JournalError> {
        self.check()?;
        if self.tail.is_none() {
            self.begin_segment()?;
        }
        let Some(tail) = self.tail.as_mut() else { return Err(Self::poisoned(&self.folder)) };
        let record = encode_placed_seal(&self.group_id, tail.number, tail.bytes, seal);
        let written = tail.file.write_all_at(&record, tail.bytes);
        written.map_err(|source| JournalError::Io { path: segment_path(&self.folder, tail.number), what: "write", source })?;
        tail.bytes += record.len() as u64;
        self.bytes += record.len() as u64;
        self.sync()?;
        let mark = self.tail.as_ref().map(|t| Mark { segment: t.number, bytes: t.bytes });
        let Some(mark) = mark else { return Err(Self::poisoned(&self.folder)) };
        self.sealed = Some(mark);
        self.sealed_bytes = self.bytes;
        self.next_epoch = seal.epoch.next();
        Ok(mark)
    }

    /// Cuts the journal back to the last seal. A failure poisons it: nothing may follow what could not be cut off.
    pub(crate) fn abandon(&mut self) -> Result<(), JournalError> {
        self.check()?;
        if self.bytes == self.sealed_bytes
            && self.tail.as_ref().map(|t| (t.number, t.bytes)) == self.sealed.map(|m| (m.segment, m.bytes))
        {
            // Something beyond the counted bytes may have been written before it failed; below it is cut off too.
            if let Some(tail) = &self.tail
                && tail.file.bytes().is_ok_and(|bytes| bytes == tail.bytes)
            {
                return Ok(());
            }
        }
        let was = self.tail.take().map(|tail| tail.ended());
        match recover::truncate_to(&self.options.disk, &self.folder, self.first_segment, self.sealed) {
            Ok(tail) => {
                let mut ended = self.ended.lock();
                let sealed = self.sealed;
                let again = ended.iter().copied().chain(was).find(|segment| sealed.is_some_and(|m| m.segment == segment.number));
                ended.retain(|segment| sealed.is_some_and(|m| segment.number < m.segment));
                self.tail = tail.zip(sealed).zip(again).map(|((file, m), again)| Tail::again(again, file, m.bytes));
                self.bytes = self.sealed_bytes;
                Ok(())
            }
            Err(source) => {
                self.poisoned = true;
                Err(JournalError::Io { path: self.folder.clone(), what: "truncate", source })
            }
        }
    }

    /// Ends the tail and begins the next segment if `bytes` more would make the tail too long.
    fn make_room(&mut self, bytes: u64) -> Result<(), JournalError> {
        match &self.tail {
            None => self.begin_segment(),
            Some(tail)
                if (self.ending || tail.bytes + bytes > self.options.segment_bytes_max || self.is_done(tail))
                    && tail.bytes > SEGMENT_HEADER_BYTES as u64 =>
            {
                // Synced before any seal that covers it is written: recovery relies on it.
                self.sync()?;
                self.begin_segment()
            }
            Some(_) => Ok(()),
        }
    }

    /// Whether an epoch ends here, and the tail is nearly full: what begins and ends with an epoch can be thinned by itself. Or was begun long
    /// ago: what a quiet group gives up must be in segments that have ended, too.
    fn is_done(&self, tail: &Tail) -> bool {
        let full = self.options.segment_bytes_max / 8 * 7;
        self.sealed == Some(Mark { segment: tail.number, bytes: tail.bytes })
            && (tail.bytes >= full || tail.since.elapsed() >= SEGMENT_AGE_MAX)
    }

    fn begin_segment(&mut self) -> Result<(), JournalError> {
        let (number, previous_bytes) = self.tail.as_ref().map_or((self.first_segment, 0), |t| (t.last + 1, t.bytes));
        let path = segment_path(&self.folder, number);
        let header = SegmentHeader {
            number,
            group_id: self.group_id,
            first_epoch: self.next_epoch,
            previous_bytes,
            created_unix_us: crate::clock::unix_us(),
            further: 0,
            thinned: 0,
        };
        let disk = &self.options.disk;
        let create = || -> io::Result<DiskFile> {
            let file = disk.create_file(&path)?;
            file.write_all_at(&header.encode(), 0)?;
            disk.sync_folder(&self.folder)?;
            Ok(file)
        };
        let file = create().map_err(|source| {
            // A half-made file would be in the way when there is room again. One that was there before is not ours.
            if source.kind() != io::ErrorKind::AlreadyExists {
                let _ = disk.remove_file(&path);
            }
            JournalError::Io { path: path.clone(), what: "begin a segment of", source }
        })?;
        self.bytes += SEGMENT_HEADER_BYTES as u64;
        self.ended
            .lock()
            .extend(self.tail.replace(Tail::new(number, file, SEGMENT_HEADER_BYTES as u64)).map(|tail| tail.ended()));
        self.ending = false;
        Ok(())
    }

    /// Never tried again after a failure: the kernel may have dropped the pages and would report success.
    fn sync(&mut self) -> Result<(), JournalError> {
        let Some(tail) = &self.tail else { return Ok(()) };
        #[cfg(any(test, feature = "simulation"))]
        if crate::sim::is_sabotaged(crate::sim::Sabotage::SkipSync) {
            return Ok(());
        }
        tail.file.sync_data().map_err(|source| {
            self.poisoned = true;
            JournalError::Io { path: segment_path(&self.folder, tail.number), what: "sync", source }
        })
    }

    pub(crate) fn check(&self) -> Result<(), JournalError> {
        if self.poisoned { Err(Self::poisoned(&self.folder)) } else { Ok(()) }
    }

    fn poisoned(folder: &Path) -> JournalError {
        JournalError::Poisoned { path: folder.to_owned() }
    }
}
