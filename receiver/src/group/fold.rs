//! Folding: the oldest points of a journal go into the base, and the segments that only they needed go away.
//!
//! In this order: the superblock says up to which point F is folded, and points before F are not offered any more (`begin_fold`, on the
//! group's thread); each block that the index of F has is written into the base once, with its checksum, and both files are synced (`write_base`, on the thread of
//! whoever folds); the superblock says that the base is at F and which segment is the first (`end_fold`, on the group's thread); segments before it are
//! removed and the index of the newest point loses what the base has (`clean_up`).
//!
//! What must hold: F and later points are right at every instant. Before the switch their indexes cover every block that is written here; after
//! it, an index from before reads in the base what it would have read in a folded frame. Stopped anywhere, the fold is done again from its beginning.

use std::collections::VecDeque;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockdev::steps::{Step, reach};
use proto::codec::DecodeError;
use proto::units::BLOCK_BYTES;
use proto::{BlockExtent, Frame, FrameHeader, FrameKind, Point};
use rustix::fs::{SeekFrom, seek};
use tokio::sync::oneshot;

use super::points::Walked;
use super::worker::Worker;
use super::{Command, Group, GroupError, PointEntry, Shared};
use crate::base::{SumsFile, sums_of};
use crate::disk::{DiskFile, read_up_to};
use crate::frames::FrameError;
use crate::index::{FrameId, Place};
use crate::journal::{JournalError, list_segments, segment_path};
use crate::pins::Pinned;
use crate::superblock::{BaseSeal, Superblock};

/// Blocks are collected up to so many bytes and then written in the order of the disk, neighbours together.
pub(crate) const FOLD_BUFFER_BYTES: usize = 8 << 20;
/// Regions whose entries are looked through while the group's state is held.
const FORGET_REGIONS_MAX: usize = 512;

/// What a fold did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Folded {
    /// Bytes written into the base.
    pub(crate) written_bytes: u64,
    /// Bytes of holes made in it.
    pub(crate) punched_bytes: u64,
    /// Bytes of the segments that were removed.
    pub(crate) freed_bytes: u64,
}

/// Told as blocks go into the base: bytes of the journal that were looked through, of how many. An error puts the fold down.
pub(crate) type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> Result<(), GroupError>;

/// The base is at its new point.
#[derive(Debug)]
pub(crate) struct Switched {
    first_frame: u32,
    segments: VecDeque<PathBuf>,
    bytes: u64,
}

impl Worker {
    fn kept(&self, point: Point, why: &'static str) -> GroupError {
        GroupError::Kept { group: self.shared.folder.group.clone(), point, why }
    }

    /// Points before `point` are given up. A fold that has begun may go further than it was to, never less far.
    pub(super) fn begin_fold(&mut self, point: Point) -> Result<PointEntry, GroupError> {
        self.superblock.check()?;
        let block = self.superblock.get().clone();
        if block.fork.as_ref().is_some_and(|fork| fork.point < point) {
            return Err(self.kept(point, "the active fork needs an earlier one"));
        }
        let entry = {
            // Nobody pins a point between the look and the removal.
            let mut state = self.shared.state.write();
            let place = state.points.binary_search_by_key(&point, |p| p.point);
            let entry = place.ok().and_then(|i| state.points.get(i)).copied();
            let no_point = || GroupError::NoPoint { group: self.shared.folder.group.clone(), point };
            let entry = entry.ok_or_else(no_point)?;
            if state.points.last().is_none_or(|newest| newest.point == point) {
                return Err(self.kept(point, "the newest point stays in the journal"));
            }
            if self.shared.pins.oldest().is_some_and(|pinned| pinned < point) {
                return Err(self.kept(point, "somebody looks at an earlier one"));
            }
            if shared_names(&self.shared).any(|named| named < point && state.points.iter().any(|p| p.point == named)) {
                return Err(self.kept(point, "an earlier one has a name"));
            }
            if block.base == Some(point) {
                return Err(self.kept(point, "the base is there already"));
            }
            state.points.retain(|p| p.point >= point);
            state.folding = Some(point);
            entry
        };
        if block.folding != Some(point) && !is_silent() {
            self.superblock.write(Superblock { folding: Some(point), ..block })?;
            reach(Step::FoldBegun);
        }
        Ok(entry)
    }

    /// One change of the superblock; before it the fold can only be done again, after it it is done.
    pub(super) fn end_fold(&mut self, point: Point) -> Result<Switched, GroupError> {
        let shared = Arc::clone(&self.shared);
        let Some(_no_walk) = shared.walks.try_write() else {
            return Err(self.kept(point, "somebody walks the journal"));
        };
        let block = self.superblock.get().clone();
        let (entry, newest) = {
            let state = shared.state.read();
            (state.points.first().copied(), state.points.last().map(|p| p.point))
        };
        let Some(entry) = entry.filter(|e| e.point == point && (block.folding == Some(point) || is_silent())) else {
            return Err(self.kept(point, "that fold has not begun"));
        };
        let folder = shared.folder.journal();
        let first_segment = self.journal.first_needed(entry.end);
        let bytes = self.journal.bytes_before(first_segment);
        let (cut_unix_us, first_write_unix_us) = (entry.cut_unix_us, entry.first_write_unix_us);
        let after = Superblock {
            base: Some(point),
            base_seal: BaseSeal { cut_unix_us, first_write_unix_us, session: entry.session },
            folding: None,
            first_segment,
            // All points up to here were synced when they were committed.
            synced: newest.or(block.synced),
            ..block
        };
        let of_base = PointEntry::of_base(&after);
        self.superblock.write(after)?;
        reach(Step::FoldEnded);
        self.journal.begin_at(first_segment);
        self.count();
        {
            let mut state = shared.state.write();
            state.index.base_is_written();
            state.beginning = super::Beginning { base: Some(point), first_segment };
            state.folding = None;
            state.journal_bytes = self.journal.bytes();
            if let (Some(first), Some(of_base)) = (state.points.first_mut(), of_base) {
                *first = PointEntry { frame_bytes: entry.frame_bytes, data_blocks: entry.data_blocks, ..of_base };
            }
        }
        shared.frames.fold_before(entry.next_frame, first_segment);
        let before = list_segments(&folder).map_err(|source| JournalError::Io { path: folder.clone(), what: "list", source })?;
        let before = before.into_iter().filter(|number| *number < first_segment);
        let segments = before.map(|number| segment_path(&folder, number)).collect();
        Ok(Switched { first_frame: entry.next_frame, segments, bytes })
    }
}

impl Group {
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<Result<T, GroupError>>) -> Command) -> Result<T, GroupError> {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(command(reply)).await;
        answer.await.unwrap_or_else(|_| Err(GroupError::Closed { group: self.shared.folder.group.clone() }))
    }

    /// Gives up the points before `point`.
    pub(crate) async fn begin_fold(&self, point: Point) -> Result<PointEntry, GroupError> {
        self.ask(|reply| Command::BeginFold { point, reply }).await
    }

    /// Makes the base, which [`Shared::write_base`] has written, the beginning.
    pub(crate) async fn end_fold(&self, point: Point) -> Result<Switched, GroupError> {
        self.ask(|reply| Command::EndFold { point, reply }).await
    }
}

impl Shared {
    /// Writes what the journal says up to a point into the base and makes it durable. One fold of a group at a time.
    pub(crate) fn write_base(&self, to: &PointEntry, progress: Progress<'_>) -> Result<(Folded, Pinned), GroupError> {
        let index = self.index_at(to.point)?;
        let mut base = Base::open(self)?;
        let beginning = self.state.read().beginning;
        let mut reader = FrameReader { shared: self, open: None };
        let (mut before, mut in_segment, total) = (0, (beginning.first_segment, 0), self.state.read().journal_bytes);
        self.walk(to, beginning, &mut |frame| {
            if frame.segment != in_segment.0 {
                before += in_segment.1;
            }
            in_segment = (frame.segment, frame.offset + frame.header.frame_bytes() as u64);
            progress(before + in_segment.1, total)?;
            self.fold_waiting.store(base.bytes.len(), Ordering::Relaxed);
            if frame.header.kind == FrameKind::Zero {
                return Ok(());
            }
            let survives = |block: u64, max: u64| {
                let (place, run) =
                    index.index.volume(frame.header.volume.0.into()).map_or((Place::Base, max), |v| v.find(block, max));
                (place == Place::Frame(frame.id), run.min(max))
            };
            if frame.extents.iter().any(|extent| surviving(*extent, &survives).next().is_some()) {
                let content = reader.read(&frame)?;
                let mut at = 0;
                for extent in frame.extents {
                    for (start, blocks) in surviving(*extent, &survives) {
                        let from = (at + start - extent.start.0) as usize * BLOCK_BYTES as usize;
                        let bytes = content.get(from..from + (blocks * BLOCK_BYTES) as usize).unwrap_or_default();
                        base.put(frame.header.volume.0.into(), start, bytes)?;
                    }
                    at += u64::from(extent.blocks);
                }
            }
            Ok(())
        })?;
        base.flush()?;
        self.fold_waiting.store(0, Ordering::Relaxed);
        base.punch(&index)?;
        reach(Step::FoldWritten);
        base.sync()?;
        reach(Step::FoldSynced);
        Ok((base.done, index))
    }

    /// Removes what the base made needless. What is left of it by a crash, the next start removes.
    pub(crate) fn clean_up(&self, switched: Switched, at_base: &Pinned) -> Result<u64, GroupError> {
        let Switched { first_frame, segments, bytes } = switched;
        for path in &segments {
            let removed = self.disk.remove_file(path);
            removed.map_err(|source| JournalError::Io { path: path.clone(), what: "remove a folded segment of", source })?;
            reach(Step::FoldSegmentRemoved);
        }
        let folder = self.folder.journal();
        if !segments.is_empty() {
            self.disk.sync_folder(&folder).map_err(|source| JournalError::Io { path: folder.clone(), what: "sync", source })?;
        }
        for volume in 0..self.volumes.len() {
            let Some(folded) = at_base.index.volume(volume) else { continue };
            let mut next = Some(0);
            // Epochs are committed in between.
            while let Some(number) = next {
                let mut state = self.state.write();
                let map = state.index.volumes_mut().get_mut(volume);
                next = map.and_then(|map| map.forget_folded(number, FORGET_REGIONS_MAX, FrameId(first_frame), folded));
            }
        }
        Ok(bytes)
    }
}

fn shared_names(shared: &Shared) -> impl Iterator<Item = Point> + use<> {
    shared.names.points().into_iter()
}

/// Whether the sweep wants to see that it notices when a fold does not say that it begins.
fn is_silent() -> bool {
    #[cfg(any(test, feature = "simulation"))]
    return crate::sim::is_sabotaged(crate::sim::Sabotage::SilentFold);
    #[cfg(not(any(test, feature = "simulation")))]
    false
}

/// The runs of an extent that survive, as start and length in blocks.
pub(super) fn surviving<'a>(
    extent: BlockExtent,
    survives: &'a dyn Fn(u64, u64) -> (bool, u64),
) -> impl Iterator<Item = (u64, u64)> + 'a {
    let (mut at, end) = (extent.start.0, extent.end());
    std::iter::from_fn(move || {
        while at < end {
            let (start, (kept, run)) = (at, survives(at, end - at));
            at += run.max(1);
            if kept {
                return Some((start, run.max(1)));
            }
        }
        None
    })
}

/// Reads the frames of a walk, which come in the order of the files.
struct FrameReader<'a> {
    shared: &'a Shared,
    open: Option<(u32, File)>,
}

impl FrameReader<'_> {
    fn read(&mut self, walked: &Walked<'_>) -> Result<Vec<u8>, FrameError> {
        let path = || segment_path(&self.shared.folder.journal(), walked.segment);
        let io = |source| FrameError::Io { path: path(), offset: walked.offset, source };
        if self.open.as_ref().is_none_or(|(segment, _)| *segment != walked.segment) {
            self.open = Some((walked.segment, File::open(path()).map_err(io)?));
        }
        let mut bytes = vec![0; walked.header.frame_bytes()];
        if let Some((_, file)) = &self.open {
            let n = read_up_to(file, &mut bytes, walked.offset).map_err(io)?;
            bytes.truncate(n);
        }
        let volume = usize::from(walked.header.volume.0);
        let blocks = self.shared.volume_blocks.get(volume).copied().unwrap_or(0);
        let damaged = |source| FrameError::Damaged { path: path(), offset: walked.offset, source };
        content(&bytes, blocks, walked.header).map_err(damaged)
    }
}

fn content(bytes: &[u8], volume_blocks: u64, walked: &FrameHeader) -> Result<Vec<u8>, DecodeError> {
    let frame = Frame::decode(bytes, volume_blocks)?;
    if frame.header != *walked {
        return Err(DecodeError::Rule { what: "frame", rule: "is the one that was met a moment ago" });
    }
    frame.content()
}

/// The base of one volume. A base that an older node has made may have no checksums yet.
struct BaseFile {
    file: DiskFile,
    path: PathBuf,
    size: u64,
    sums: Option<SumsFile>,
}

impl BaseFile {
    /// Adds what was tried, and the file, to an error.
    fn failed(&self, what: &'static str) -> impl FnOnce(std::io::Error) -> GroupError + use<> {
        let path = self.path.clone();
        move |source| GroupError::Base { path, what, source }
    }

    /// The same of its checksums.
    fn sums_failed(sums: &SumsFile, what: &'static str) -> impl FnOnce(std::io::Error) -> GroupError + use<> {
        let path = sums.path().to_owned();
        move |source| GroupError::Base { path, what, source }
    }
}

/// The base files, with blocks that wait to be written.
struct Base {
    files: Vec<BaseFile>,
    /// Volume, block, place in `bytes`.
    waiting: Vec<(usize, u64, usize)>,
    bytes: Vec<u8>,
    done: Folded,
}

impl Base {
    fn open(shared: &Shared) -> Result<Self, GroupError> {
        let open = |volume: &crate::superblock::Volume| {
            let path = shared.folder.base(&volume.name);
            // What a fold that was stopped or whose sync failed has left in the page cache is not believed.
            let opened =
                shared.disk.open_settled(&path).and_then(|file| Ok((file, SumsFile::open_settled(&shared.disk, &path)?)));
            match opened {
                Ok((file, sums)) => Ok(BaseFile { file, path, size: volume.size_bytes, sums }),
                Err(source) => Err(GroupError::Base { path, what: "open", source }),
            }
        };
        let files = shared.volumes.iter().map(open).collect::<Result<_, _>>()?;
        Ok(Self { files, waiting: Vec::new(), bytes: Vec::new(), done: Folded::default() })
    }

    /// Takes whole blocks.
    fn put(&mut self, volume: usize, start: u64, content: &[u8]) -> Result<(), GroupError> {
        for (i, block) in content.chunks(BLOCK_BYTES as usize).enumerate() {
            self.waiting.push((volume, start + i as u64, self.bytes.len()));
            self.bytes.extend_from_slice(block);
        }
        if self.bytes.len() >= FOLD_BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), GroupError> {
        self.waiting.sort_unstable();
        let (mut run, mut sums) = (Vec::new(), Vec::new());
        for neighbours in self.waiting.chunk_by(|a, b| a.0 == b.0 && a.1 + 1 == b.1) {
            let Some((volume, block, _)) = neighbours.first().copied() else { continue };
            let Some(base) = self.files.get(volume) else { continue };
            run.clear();
            for (_, _, at) in neighbours {
                run.extend_from_slice(self.bytes.get(*at..at + BLOCK_BYTES as usize).unwrap_or_default());
            }
            // The last block of a volume may be less than a block.
            let offset = block * BLOCK_BYTES;
            run.truncate(usize::try_from(base.size.saturating_sub(offset)).unwrap_or(usize::MAX).min(run.len()));
            base.file.append_at(&run, offset).map_err(base.failed("write"))?;
            self.done.written_bytes += run.len() as u64;
            reach(Step::FoldRun);
            sums.extend(sums_of(block, &run).map(|(block, sum)| (volume, block, sum)));
        }
        for of_volume in sums.chunk_by(|a, b| a.0 == b.0) {
            let Some(base) = of_volume.first().and_then(|(volume, ..)| self.files.get(*volume)) else { continue };
            let Some(file) = &base.sums else { continue };
            let of_blocks: Vec<_> = of_volume.iter().map(|(_, block, sum)| (*block, *sum)).collect();
            file.put(&of_blocks).map_err(BaseFile::sums_failed(file, "write the checksums of"))?;
        }
        self.waiting.clear();
        self.bytes.clear();
        Ok(())
    }

    /// Makes holes where the point has zeroes and the base has something.
    fn punch(&mut self, index: &Pinned) -> Result<(), GroupError> {
        for (volume, base) in self.files.iter().enumerate() {
            let Some(map) = index.index.volume(volume) else { continue };
            let (mut at, end) = (0, proto::units::blocks_of(base.size));
            while at < end {
                let (place, run) = map.find(at, end - at);
                let blocks = at..at + run.max(1);
                let (from, to) = (at * BLOCK_BYTES, (blocks.end * BLOCK_BYTES).min(base.size));
                at = blocks.end;
                if place != Place::Zero {
                    continue;
                }
                let data = match seek(base.file.file(), SeekFrom::Data(from)) {
                    Ok(data) => data,
                    Err(rustix::io::Errno::NXIO) => u64::MAX,
                    Err(error) => return Err(base.failed("look for data in")(error.into())),
                };
                if data < to {
                    base.file.punch(from, to - from).map_err(base.failed("make holes in"))?;
                    self.done.punched_bytes += to - from;
                }
                // Also where the base has a hole already: a fold that was stopped may have come as far as that.
                if let Some(sums) = &base.sums {
                    sums.clear(blocks).map_err(BaseFile::sums_failed(sums, "clear the checksums of"))?;
                }
            }
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), GroupError> {
        for base in &self.files {
            base.file.sync_data().map_err(base.failed("sync"))?;
            if let Some(sums) = &base.sums {
                sums.sync().map_err(BaseFile::sums_failed(sums, "sync the checksums of"))?;
            }
        }
        Ok(())
    }
}
