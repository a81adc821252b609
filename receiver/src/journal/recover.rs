//! Opens a journal after whatever stopped it: keeps every sealed epoch, drops what was not sealed, refuses damage.
//!
//! A commit is frames, seal, one fdatasync. A crash in between leaves any subset of the bytes since the last sync:
//!
//! | what is found | why | what is done |
//! | --- | --- | --- |
//! | frames without a seal at the end | killed while an epoch arrived | truncated to the last seal, or kept: see [`Sink::unsealed`] |
//! | a bad record, no seal after it | power lost while an epoch arrived | truncated to the last seal, or to the record |
//! | the last seal, nothing after it, a record or payload of its epoch in the same segment bad | power lost during the fdatasync: never acknowledged | truncated to the seal before |
//! | a bad record, a seal or a segment after it | damage: it was synced before that was begun | refused |
//! | a segment that is missing, or whose header is whole and does not fit | damage | refused |
//! | the last seal, more after it, a payload of its epoch bad | damage | refused; in earlier segments when it is read |
//!
//! A segment that was thinned got its name after all of it was synced, so whatever is bad in one is damage, too.
//!
//! Frames of the last epoch in earlier segments were synced before its seal was written, so they are never torn. That holds for
//! the segment that is the last one when those after it are removed, too: its payloads are looked at before they are.
//!
//! What is found is decided by [`examine`], which changes nothing: `check` asks it too, so that it finds what a start refuses.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use proto::seal::Tally;
use proto::{BlockExtent, FrameHeader, Point, Seal};

use super::record::{Payloads, Record, SegmentReader};
use super::segment::{Listing, PLACED_SEAL_BYTES, decode_placed_seal, list_journal, list_segments, segment_path};
use super::walk::{Bad, Expected, Item, Mark, Walker};
use super::{Journal, JournalError, JournalOptions};
use crate::disk::{Disk, DiskFile};

/// Takes what recovery finds, in order.
pub(crate) trait Sink {
    /// A frame of the epoch that the next seal ends.
    fn frame(&mut self, segment: u32, offset: u64, header: &FrameHeader, extents: &[BlockExtent]);
    /// The frames since the last call are a committed epoch.
    fn sealed(&mut self, seal: &Seal, end: Mark);
    /// After the newest seal are whole frames of the epoch that was arriving, and all of them were told with `frame`: whether they stay. Those in
    /// earlier segments were synced, of those in the last one the payloads were looked at.
    fn unsealed(&mut self, unsealed: &Unsealed) -> bool {
        let _ = unsealed;
        false
    }
    /// The frames since the last call to `sealed` never happened.
    fn dropped(&mut self);
}

/// The whole frames after the newest seal.
#[derive(Clone, Debug)]
pub(crate) struct Unsealed {
    /// The pass of the last one.
    pub(crate) pass: u16,
    pub(crate) tally: Tally,
    end: Mark,
}

/// The newest seal, not yet believed.
struct Held {
    seal: Seal,
    end: Mark,
    /// A payload of its epoch, in the segment of the seal, that does not fit its checksum.
    torn: Option<Bad>,
}

/// What is not sealed, and is cut off.
#[derive(Debug)]
enum Cut {
    /// A commit during whose sync power was lost.
    Torn(Bad),
    /// The end of an epoch that was arriving.
    Unfinished(Bad),
}

impl Cut {
    fn log(&self) {
        match self {
            Self::Torn(bad) => {
                tracing::warn!("{bad}: the last commit was cut short by a crash and never acknowledged; dropped");
            }
            Self::Unfinished(bad) => tracing::info!("{bad}: the unfinished end of the journal; dropped"),
        }
    }
}

/// What a journal holds that is not refused.
#[derive(Debug)]
struct Examined {
    /// The end of the last seal.
    sealed: Option<Mark>,
    /// The end of what stays of the epoch after it.
    kept: Option<Mark>,
    /// Why what is after that is cut off, if it is more than whole frames.
    cut: Option<Cut>,
}

struct Recovery<'a> {
    sink: &'a mut dyn Sink,
    sealed: Option<Mark>,
    newest: Option<Point>,
    held: Option<Held>,
    /// Whether there are frames after the newest seal.
    open: bool,
    bad_payload: Option<Bad>,
    /// The frames after the newest seal, up to the first whose payload is bad.
    unsealed: Option<Unsealed>,
    cut: Option<Cut>,
}

impl Recovery<'_> {
    /// More was written after the held seal, or it is known to be synced: it stands, and damage in it is damage.
    fn settle(&mut self) -> Result<(), JournalError> {
        let Some(held) = self.held.take() else { return Ok(()) };
        if let Some(bad) = held.torn {
            return Err(JournalError::DamagedEpoch { bad: bad.into(), point: held.seal.point() });
        }
        self.sealed = Some(held.end);
        self.newest = Some(held.seal.point());
        self.sink.sealed(&held.seal, held.end);
        Ok(())
    }

    /// Nothing is after the held seal: a bad frame of its epoch is a torn commit, unless it is known to have been synced.
    fn settle_at_end(&mut self, synced: Option<Point>) -> Result<(), JournalError> {
        let torn = |h: &mut Held| synced.is_none_or(|s| s < h.seal.point()).then(|| h.torn.take())?;
        let Some(bad) = self.held.as_mut().and_then(torn) else { return self.settle() };
        self.cut = Some(Cut::Torn(bad));
        self.held = None;
        self.open = true;
        Ok(())
    }

    /// The walk stopped at `bad`, and no seal is after it.
    fn end_at(&mut self, bad: Bad) -> Result<(), JournalError> {
        // A seal that is whole in its place but does not fit its frames is a commit torn before its end; whatever
        // else follows the held seal was begun after that seal's sync.
        self.settle()?;
        self.cut = Some(Cut::Unfinished(bad));
        self.open = true;
        Ok(())
    }

    fn walk(&mut self, walker: &mut Walker, folder: &Path) -> Result<Option<Bad>, JournalError> {
        loop {
            match walker.next() {
                Ok(Some(Item::Frame { segment, offset, header, extents, payload })) => {
                    self.settle()?;
                    if let Err(error) = payload {
                        let path = segment_path(folder, segment);
                        self.bad_payload.get_or_insert(Bad { path, segment, offset, foreign: false, error: error.into() });
                    }
                    // An epoch with a bad payload is never sealed here: what follows it is told to nobody.
                    if self.bad_payload.is_none() {
                        self.sink.frame(segment, offset, &header, &extents);
                        let end = Mark { segment, bytes: offset + header.frame_bytes() as u64 };
                        self.unsealed = Some(Unsealed { pass: header.pass, tally: walker.tally().clone(), end });
                    }
                    self.open = true;
                }
                Ok(Some(Item::Seal { seal, end })) => {
                    self.settle()?;
                    let held = Held { seal, end, torn: self.bad_payload.take() };
                    self.held = Some(held);
                    if walker.is_in_thinned() {
                        self.settle()?;
                    }
                    (self.open, self.unsealed) = (false, None);
                }
                Ok(None) => return Ok(None),
                Err(bad) => return Ok(Some(bad)),
            }
        }
    }
}

/// Opens the journal in `folder`. `synced` is the newest point that is known to have been synced.
pub(crate) fn open(
    folder: &Path,
    expected: &Expected,
    synced: Option<Point>,
    options: JournalOptions,
    sink: &mut dyn Sink,
) -> Result<Journal, JournalError> {
    let io = |what| move |source| JournalError::Io { path: folder.to_owned(), what, source };
    // Removals that a killed process did not live to sync, before any other is made: see `truncate_to`.
    options.disk.sync_folder(folder).map_err(io("sync"))?;
    // What is found is answered with, so it must be on the disk; earlier segments were synced before this one was begun.
    if let Some(last) = list_journal(folder, expected.first_segment).map_err(io("list"))?.live.last() {
        options.disk.open_settled(&segment_path(folder, last.number)).map_err(io("sync"))?;
    }
    let Examined { sealed, kept, cut } = examine(folder, expected, synced, sink)?;
    if let Some(cut) = cut {
        cut.log();
    }
    // What a fold had no time to remove; a journal that is refused is left as it is.
    for number in list_segments(folder).map_err(io("list"))?.into_iter().filter(|n| *n < expected.first_segment) {
        options.disk.remove_file(&segment_path(folder, number)).map_err(io("remove a folded segment of"))?;
    }
    // What thinning had no time to remove, or to bring to its end: the name of what it made is durable by now.
    for path in list_journal(folder, expected.first_segment).and_then(Listing::whole).map_err(io("list"))?.dead {
        options.disk.remove_file(&path).map_err(io("remove what was thinned of"))?;
    }
    Journal::resume(folder, expected, (sealed, kept), options)
}

/// Why a start would refuse the journal in `folder`, if it would. Changes nothing.
pub(crate) fn refusal(folder: &Path, expected: &Expected, synced: Option<Point>) -> Option<JournalError> {
    struct Unused;
    impl Sink for Unused {
        fn frame(&mut self, _: u32, _: u64, _: &FrameHeader, _: &[BlockExtent]) {}
        fn sealed(&mut self, _: &Seal, _: Mark) {}
        fn dropped(&mut self) {}
    }
    examine(folder, expected, synced, &mut Unused).err()
}

/// Finds what is sealed in the journal in `folder`, or why it is refused, and changes nothing.
fn examine(folder: &Path, expected: &Expected, synced: Option<Point>, sink: &mut dyn Sink) -> Result<Examined, JournalError> {
    let io = |what| move |source| JournalError::Io { path: folder.to_owned(), what, source };
    // Payloads are looked at in the last segment only, where a torn commit can be.
    let last = list_journal(folder, expected.first_segment).map_err(io("list"))?.live.last().map_or(0, |segment| segment.number);
    let mut walker = Walker::new(folder, expected.clone(), None, (Payloads::Checksum, last)).map_err(io("list"))?;
    let mut recovery = Recovery {
        sink,
        sealed: None,
        newest: expected.base,
        held: None,
        open: false,
        bad_payload: None,
        unsealed: None,
        cut: None,
    };
    match recovery.walk(&mut walker, folder)? {
        None if recovery.open => recovery.settle()?,
        None => recovery.settle_at_end(synced)?,
        // What cannot be read is not what cannot be true: an I/O error drops nothing, whatever is after it.
        Some(bad) if bad.is_io() => return Err(JournalError::Unreadable { bad: bad.into() }),
        // Nothing is dropped in a segment that was synced when the next one was begun, nor in one that is not ours.
        Some(bad) if bad.foreign || bad.segment < last || walker.is_in_thinned() => {
            return Err(JournalError::DamagedSegment { bad: bad.into() });
        }
        Some(bad) if is_seal_with_more(&bad, expected).map_err(io("read"))? => {
            return Err(JournalError::DamagedSegment { bad: bad.into() });
        }
        Some(bad) => {
            if let Some(later) = walker.find_later_seal(&bad).map_err(io("read"))? {
                // A seal that is the very last thing, of the epoch that was arriving, in the segment of the bad record: power
                // went during the sync of that commit, and the seal reached the disk before its frames did.
                let torn = later.is_end
                    && later.segment == bad.segment
                    && later.seal.epoch == walker.next_epoch()
                    && synced.is_none_or(|s| s < later.seal.point());
                if !torn {
                    let (seal, offset) = (segment_path(folder, later.segment), later.offset);
                    return Err(JournalError::Damaged { bad: bad.into(), seal, offset });
                }
            }
            recovery.end_at(bad)?;
        }
    }
    if let Some(synced) = synced
        && recovery.newest.is_none_or(|p| p < synced)
    {
        return Err(JournalError::Lost { path: folder.to_owned(), end: recovery.newest, synced });
    }
    if let Some(sealed) = recovery.sealed.filter(|sealed| sealed.segment < last) {
        look_at_new_end(folder, expected, sealed)?;
    }
    let mut kept = None;
    if recovery.open {
        let unsealed = recovery.unsealed.filter(|_| !matches!(recovery.cut, Some(Cut::Torn(_))));
        kept = unsealed.filter(|unsealed| recovery.sink.unsealed(unsealed)).map(|unsealed| unsealed.end);
        if kept.is_none() {
            recovery.sink.dropped();
        }
    }
    Ok(Examined { sealed: recovery.sealed, kept, cut: recovery.cut })
}

/// Looks at the payloads of the segment that is the last one when those after it are removed. It was synced before the next one was
/// begun, so a bad one is damage; once nothing is after it, the next start would take it for a torn commit and drop it.
fn look_at_new_end(folder: &Path, expected: &Expected, sealed: Mark) -> Result<(), JournalError> {
    let path = segment_path(folder, sealed.segment);
    let bad = |offset, error| Bad { path: path.clone(), segment: sealed.segment, offset, foreign: false, error };
    let file = File::open(&path).map_err(|error| JournalError::Unreadable { bad: bad(0, error.into()).into() })?;
    let blocks = Arc::clone(&expected.volume_blocks);
    let mut reader = SegmentReader::new(file, sealed.bytes, sealed.segment, expected.group_id, blocks);
    let mut first_bad = None;
    loop {
        let offset = reader.offset();
        match reader.next(Payloads::Checksum) {
            Ok(Some(Record::Frame { header, payload, .. })) => {
                if let Err(error) = payload
                    && !expected.is_folded(header.epoch)
                {
                    first_bad.get_or_insert_with(|| bad(offset, error.into()));
                }
            }
            Ok(Some(Record::Seal(seal))) => {
                if let Some(bad) = first_bad.take() {
                    return Err(JournalError::DamagedEpoch { bad: bad.into(), point: seal.point() });
                }
            }
            Ok(None) => return Ok(()),
            // The walk read it a moment ago.
            Err(error) => return Err(JournalError::Unreadable { bad: bad(offset, error).into() }),
        }
    }
}

/// Whether the bad record is a seal that is whole, in its place, and followed by something. Nothing is written after a seal before its
/// sync, so this is no torn commit: it was acknowledged, and its frames are damaged.
fn is_seal_with_more(bad: &Bad, expected: &Expected) -> io::Result<bool> {
    let file = File::open(&bad.path)?;
    let mut record = [0; PLACED_SEAL_BYTES];
    let n = crate::disk::read_up_to(&file, &mut record, bad.offset)?;
    let whole = n == record.len() && decode_placed_seal(&expected.group_id, bad.segment, bad.offset, &record).is_ok();
    Ok(whole && file.metadata()?.len() > bad.offset + PLACED_SEAL_BYTES as u64)
}

/// Cuts the journal back to `sealed`: later segments first, then the tail, so that a crash in between leaves an unsealed
/// end and no gap.
pub(super) fn truncate_to(disk: &Disk, folder: &Path, first_segment: u32, sealed: Option<Mark>) -> io::Result<Option<DiskFile>> {
    let keep_below = sealed.map_or(first_segment, |m| m.segment + 1);
    let later: Vec<u32> = list_segments(folder)?.into_iter().filter(|n| *n >= keep_below).collect();
    for number in later.iter().rev() {
        disk.remove_file(&segment_path(folder, *number))?;
        // One by one: a removal that is durable before that of a later segment would leave a gap.
        disk.sync_folder(folder)?;
    }
    let Some(mark) = sealed else { return Ok(None) };
    let file = disk.open_file(&segment_path(folder, mark.segment))?;
    if file.bytes()? != mark.bytes {
        file.set_len(mark.bytes)?;
        file.sync_data()?;
    }
    Ok(Some(file))
}
