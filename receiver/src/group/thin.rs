//! Thinning: segments of the journal become one, in which points are left out and every block is there once for each point that stays.
//!
//! In this order: the new segment is built in a file of its own and synced (`write_thinned`, on the thread of whoever thins); it takes the name of
//! the first of those that it stands for, and the points are taken off the list (`end_thin`, on the group's thread); the folder is synced, then the
//! others are removed (`remove_thinned`).
//!
//! What must hold: each point that stays shows the same at every instant. A frame keeps its number and every block that it is the last word
//! about at the next point that stays, so an index from before finds there what it looks for. Stopped anywhere, the folder has the old segments or
//! the new one, which says which of the others are dead.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use blockdev::steps::{Step, reach};
use proto::codec::DecodeError;
use proto::frame::{FRAME_HEADER_BYTES, FrameHeader, encode_data};
use proto::seal::Tally;
use proto::units::BLOCK_BYTES;
use proto::{BlockExtent, EpochId, Frame, FrameKind, Point, Seal};
use tokio::sync::oneshot;

use super::fold::{Progress, surviving};
use super::stage::Stage;
use super::worker::Worker;
use super::{Command, Group, GroupError, PointEntry, Shared};
use crate::disk::{DiskFile, read_up_to};
use crate::frames::FrameError;
use crate::index::{FrameId, Index, Place};
use crate::journal::{
    Expected, Item, JournalError, Mark, Payloads, SEGMENT_HEADER_BYTES, Segment, SegmentHeader, Walker, building_path,
    encode_placed_seal, segment_path,
};
use crate::retention::thin::Plan;

/// Bytes of the new segment that are collected before they are written.
const WRITE_BYTES: usize = 1 << 20;
/// What gives back less than this part of its bytes is left as it is,
const WORTH_PART: u64 = 16;
/// unless so many points can be left out.
const WORTH_POINTS: usize = 1000;

/// A segment that was built, durably, and has not its name yet.
#[derive(Debug)]
pub(crate) struct Thinned {
    segment: Segment,
    /// Bytes of the segments that it stands for.
    bytes_before: u64,
    dropped: BTreeSet<Point>,
    points: Vec<PointEntry>,
    /// Its data frames, by number, with their places.
    frames: Vec<(FrameId, u32)>,
}

impl Thinned {
    /// Points that are left out.
    pub(crate) fn points(&self) -> u64 {
        self.dropped.len() as u64
    }

    /// Bytes of the new segment.
    pub(crate) fn written_bytes(&self) -> u64 {
        self.segment.bytes
    }

    /// Bytes that are given back.
    pub(crate) fn freed_bytes(&self) -> u64 {
        self.bytes_before.saturating_sub(self.segment.bytes)
    }
}

impl Worker {
    /// Gives what was built its name. Before it the journal is what it was, after it the points are left out.
    pub(super) fn end_thin(&mut self, thinned: &Thinned) -> Result<(), GroupError> {
        let shared = Arc::clone(&self.shared);
        let last = thinned.dropped.last().copied();
        let kept = |why| {
            let point = last.unwrap_or_else(|| Point { generation: self.superblock.get().generation, epoch: EpochId(0) });
            GroupError::Kept { group: shared.folder.group.clone(), point, why }
        };
        let Some(_no_walk) = shared.walks.try_write() else { return Err(kept("somebody walks the journal")) };
        self.journal.check()?;
        let segments = thinned.segment.number..=thinned.segment.last;
        let folder = shared.folder.journal();
        {
            // Nobody pins or names a point between the look and the removal.
            let mut state = shared.state.write();
            let stay = shared.points_that_stay(state.fork.as_ref().map(|fork| fork.point));
            if state.folding.is_some() || !self.journal.can_replace(&thinned.segment, thinned.bytes_before) {
                return Err(kept("its segments are no longer what they were"));
            }
            if thinned.dropped.iter().any(|point| stay.contains(point)) {
                return Err(kept("somebody needs it now"));
            }
            // Who reads a frame takes its place and its file under this lock.
            let mut table = shared.frames.table.write();
            let (from, to) = (building_path(&folder, *segments.start()), segment_path(&folder, *segments.start()));
            shared.disk.rename(&from, &to).map_err(|source| JournalError::Io {
                path: to,
                what: "replace a segment of",
                source,
            })?;
            table.replace(segments.clone(), &thinned.frames);
            shared.frames.close(&segments);
            drop(table);
            let from = state.points.partition_point(|p| p.end.segment < *segments.start());
            let to = state.points.partition_point(|p| p.end.segment <= *segments.end());
            state.points.splice(from..to, thinned.points.iter().copied());
            self.journal.replace(thinned.segment);
            state.journal_bytes = self.journal.bytes();
        }
        reach(Step::ThinNamed);
        self.count();
        shared.disk.sync_folder(&folder).map_err(|source| JournalError::Io { path: folder, what: "sync", source })?;
        reach(Step::ThinSynced);
        Ok(())
    }
}

impl Group {
    /// Puts what [`Shared::write_thinned`] has built in the place of what it stands for.
    pub(crate) async fn end_thin(&self, thinned: &Arc<Thinned>) -> Result<(), GroupError> {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::EndThin { thinned: Arc::clone(thinned), reply }).await;
        answer.await.unwrap_or_else(|_| Err(GroupError::Closed { group: self.shared.folder.group.clone() }))
    }
}

impl Shared {
    /// Points that are not thinned away whatever their age: those that somebody looks at, that have a name, that a fork is over, and the newest one that a drill
    /// verified.
    pub(crate) fn points_that_stay(&self, fork: Option<Point>) -> BTreeSet<Point> {
        let verified = self.drills.summary().verified.map(|result| result.point);
        self.pins.all().into_iter().chain(fork).chain(verified).chain(self.names.points()).collect()
    }

    /// Builds the segment that `plan` asks for, and makes it durable. `None`: it would give back too little to be worth it. One at a time of a
    /// group, and no fold meanwhile.
    pub(crate) fn write_thinned(&self, plan: &Plan, progress: Progress<'_>) -> Result<Option<Thinned>, GroupError> {
        let range = Range::new(self, plan)?;
        if plan.drop.len() < WORTH_POINTS && !range.is_worth_it(&mut *progress)? {
            return Ok(None);
        }
        self.write_range(&range, progress).map(Some)
    }

    /// As [`write_thinned`](Self::write_thinned), worth it or not.
    #[cfg(test)]
    pub(crate) fn write_thinned_anyway(&self, plan: &Plan, progress: Progress<'_>) -> Result<Thinned, GroupError> {
        self.write_range(&Range::new(self, plan)?, progress)
    }

    fn write_range(&self, range: &Range<'_>, progress: Progress<'_>) -> Result<Thinned, GroupError> {
        let path = building_path(&self.folder.journal(), range.plan.first);
        let built = range.write(&path, progress).inspect(|_| reach(Step::ThinBuilt));
        if built.is_err()
            && path.exists()
            && let Err(error) = self.disk.remove_file(&path)
        {
            tracing::warn!("{}: cannot be removed: {error}; the next start does", path.display());
        }
        built
    }

    /// Whether somebody walks the journal now.
    pub(crate) fn is_walked(&self) -> bool {
        self.walks.try_write().is_none()
    }

    /// Removes what was built and is of no use.
    pub(crate) fn forget_thinned(&self, thinned: &Thinned) -> Result<(), GroupError> {
        self.remove(&building_path(&self.folder.journal(), thinned.segment.number))
    }

    /// Removes the segments that another one stands for now. What is left of them by a crash, the next start removes.
    pub(crate) fn remove_thinned(&self, thinned: &Thinned) -> Result<(), GroupError> {
        let folder = self.folder.journal();
        let paths = (thinned.segment.number + 1..=thinned.segment.last).map(|number| segment_path(&folder, number));
        let mut any = false;
        for path in paths.filter(|path| path.exists()) {
            self.remove(&path)?;
            reach(Step::ThinSegmentRemoved);
            any = true;
        }
        if any {
            self.disk.sync_folder(&folder).map_err(|source| JournalError::Io { path: folder, what: "sync", source })?;
        }
        Ok(())
    }

    fn remove(&self, path: &std::path::Path) -> Result<(), GroupError> {
        let removed = self.disk.remove_file(path);
        Ok(removed.map_err(|source| JournalError::Io { path: path.to_owned(), what: "remove what was thinned of", source })?)
    }
}

/// The segments that become one.
struct Range<'a> {
    shared: &'a Shared,
    plan: &'a Plan,
    expected: Expected,
    end: Mark,
    points: Vec<PointEntry>,
}

/// What becomes one epoch.
struct Merged {
    index: Index,
    seal: Seal,
    first_write_unix_us: u64,
    /// Blocks in its data frames, and bytes of them.
    data_blocks: u64,
    data_bytes: u64,
}

impl<'a> Range<'a> {
    fn new(shared: &'a Shared, plan: &'a Plan) -> Result<Self, GroupError> {
        let state = shared.state.read();
        let from = state.points.partition_point(|p| p.end.segment < plan.first);
        let to = state.points.partition_point(|p| p.end.segment <= plan.last);
        let points = state.points.get(from..to).unwrap_or_default().to_vec();
        let before = from.checked_sub(1).and_then(|i| state.points.get(i)).map(|p| p.point);
        let expected = Expected { first_segment: plan.first, ..shared.expected(state.beginning) };
        let expected = Expected { base: before.or(expected.base), ..expected };
        let Some(end) = points.last().map(|p| p.end) else {
            let point = plan.drop.first().copied().or(before);
            let point = point.unwrap_or(Point { generation: state.generation, epoch: EpochId(0) });
            return Err(GroupError::NoPoint { group: shared.folder.group.clone(), point });
        };
        Ok(Self { shared, plan, expected, end, points })
    }

    fn walker(&self) -> Result<Walker, GroupError> {
        let folder = self.shared.folder.journal();
        let walker = Walker::new(&folder, self.expected.clone(), Some(self.end), (Payloads::Skip, 0));
        Ok(walker.map_err(|source| JournalError::Io { path: folder, what: "list", source })?)
    }

    /// Reads what becomes the next epoch; `None` at the end.
    fn merged(&self, walker: &mut Walker) -> Result<Option<Merged>, GroupError> {
        let mut index = Index::new(self.shared.volumes.iter().map(|v| v.size_bytes), false);
        let (mut stage, mut number) = (Stage::default(), 0);
        let (mut first_write_unix_us, mut data_blocks, mut data_bytes) = (0, 0, 0);
        while let Some(item) = next(walker)? {
            match item {
                Item::Frame { header, extents, .. } => {
                    stage.add(&index, (header.volume, header.kind, FrameId(number)), &extents);
                    if header.kind == FrameKind::Data {
                        number += 1;
                        data_blocks += extents.iter().map(|e| u64::from(e.blocks)).sum::<u64>();
                        data_bytes += header.frame_bytes() as u64;
                    }
                }
                Item::Seal { seal, .. } => {
                    first_write_unix_us = oldest(first_write_unix_us, seal.first_write_unix_us);
                    if !self.plan.drop.contains(&seal.point()) {
                        stage.seal(&mut index);
                        return Ok(Some(Merged { index, seal, first_write_unix_us, data_blocks, data_bytes }));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Whether enough is given back: estimated from the blocks that survive.
    fn is_worth_it(&self, progress: Progress<'_>) -> Result<bool, GroupError> {
        let (mut walker, mut kept) = (self.walker()?, SEGMENT_HEADER_BYTES as u64);
        let total = self.plan.bytes;
        while let Some(merged) = self.merged(&mut walker)? {
            progress(0, total)?;
            let surviving: u64 =
                (0..self.shared.volumes.len()).filter_map(|v| merged.index.volume(v)).map(|v| v.blocks_in_frames()).sum();
            let part = u128::from(merged.data_bytes) * u128::from(surviving) / u128::from(merged.data_blocks.max(1));
            kept += u64::try_from(part).unwrap_or(u64::MAX);
        }
        Ok(total.saturating_sub(kept) >= total / WORTH_PART)
    }

    /// Two walks side by side: one finds what survives of an epoch to be, the other one copies it.
    fn write(&self, path: &std::path::Path, progress: Progress<'_>) -> Result<Thinned, GroupError> {
        let (mut ahead, mut walker) = (self.walker()?, self.walker()?);
        let mut writer = Writer::create(self, path)?;
        let mut source = Source { shared: self.shared, open: None };
        let mut done = 0;
        while let Some(merged) = self.merged(&mut ahead)? {
            let mut number = 0;
            while let Some(item) = next(&mut walker)? {
                match item {
                    Item::Frame { segment, offset, header, extents, .. } => {
                        done += header.frame_bytes() as u64;
                        progress(done.min(self.plan.bytes), self.plan.bytes)?;
                        let bytes = left_of(&merged.index, &mut source, (segment, offset, &header, extents.as_slice()), number)?;
                        number += u32::from(header.kind == FrameKind::Data);
                        if let Some(bytes) = bytes {
                            let id = self.shared.number_of(segment, offset, header.kind)?;
                            writer.frame(&bytes, id, (segment, offset))?;
                        }
                    }
                    Item::Seal { seal, .. } if seal == merged.seal => {
                        writer.seal(&seal, merged.first_write_unix_us)?;
                        break;
                    }
                    Item::Seal { .. } => {}
                }
            }
        }
        writer.finish(self)
    }
}

/// The older of two times, of which 0 is none.
fn oldest(a: u64, b: u64) -> u64 {
    if a == 0 || (b > 0 && b < a) { b } else { a }
}

fn next(walker: &mut Walker) -> Result<Option<Item>, GroupError> {
    walker.next().map_err(|bad| {
        if bad.is_io() {
            JournalError::Unreadable { bad: bad.into() }.into()
        } else {
            JournalError::DamagedSegment { bad: bad.into() }.into()
        }
    })
}

/// The frame as it is from now on, `None` if nothing of it survives. `number` is that of the data frame in `index`.
///
/// What cannot be decoded stays as it is: it is found to be damaged by whoever reads it, as before.
fn left_of(
    index: &Index,
    source: &mut Source<'_>,
    (segment, offset, header, extents): (u32, u64, &FrameHeader, &[BlockExtent]),
    number: u32,
) -> Result<Option<Vec<u8>>, GroupError> {
    let wanted = if header.kind == FrameKind::Data { Place::Frame(FrameId(number)) } else { Place::Zero };
    let survives = |block: u64, max: u64| {
        let map = index.volume(header.volume.0.into());
        let (place, run) = map.map_or((Place::Base, max), |map| map.find(block, max));
        (place == wanted, run.min(max))
    };
    let runs = || extents.iter().flat_map(|extent| surviving(*extent, &survives));
    if runs().next().is_none() {
        return Ok(None);
    }
    let bytes = source.read(segment, offset, header)?;
    let all: u64 = extents.iter().map(|extent| u64::from(extent.blocks)).sum();
    if header.kind == FrameKind::Zero || runs().map(|(_, blocks)| blocks).sum::<u64>() == all {
        return Ok(Some(bytes));
    }
    let repacked = repack(&bytes, source.blocks(header), &survives);
    Ok(Some(repacked.ok().filter(|repacked| repacked.len() < bytes.len()).unwrap_or(bytes)))
}

/// A data frame with those blocks only that survive.
fn repack(bytes: &[u8], volume_blocks: u64, survives: &dyn Fn(u64, u64) -> (bool, u64)) -> Result<Vec<u8>, DecodeError> {
    let frame = Frame::decode(bytes, volume_blocks)?;
    let content = frame.content()?;
    let (mut extents, mut left, mut at) = (Vec::<BlockExtent>::new(), Vec::new(), 0);
    for extent in &frame.extents {
        for (start, blocks) in surviving(*extent, survives) {
            let from = (at + start - extent.start.0) as usize * BLOCK_BYTES as usize;
            left.extend_from_slice(content.get(from..from + (blocks * BLOCK_BYTES) as usize).unwrap_or_default());
            match extents.last_mut().filter(|last| last.end() == start) {
                Some(last) => last.blocks += blocks as u32,
                None => extents.push(BlockExtent { start: proto::BlockIndex(start), blocks: blocks as u32 }),
            }
        }
        at += u64::from(extent.blocks);
    }
    let FrameHeader { volume, epoch, pass, codec, .. } = frame.header;
    Ok(encode_data(volume, epoch, pass, &extents, &left, codec))
}

/// Reads the frames of a walk, which come in the order of the files, as they are.
struct Source<'a> {
    shared: &'a Shared,
    open: Option<(u32, File)>,
}

impl Source<'_> {
    fn blocks(&self, header: &FrameHeader) -> u64 {
        self.shared.volume_blocks.get(usize::from(header.volume.0)).copied().unwrap_or(0)
    }

    fn read(&mut self, segment: u32, offset: u64, header: &FrameHeader) -> Result<Vec<u8>, FrameError> {
        let path = || segment_path(&self.shared.folder.journal(), segment);
        let io = |source| FrameError::Io { path: path(), offset, source };
        if self.open.as_ref().is_none_or(|(open, _)| *open != segment) {
            self.open = Some((segment, File::open(path()).map_err(io)?));
        }
        let mut bytes = vec![0; header.frame_bytes()];
        if let Some((_, file)) = &self.open {
            let n = read_up_to(file, &mut bytes, offset).map_err(io)?;
            bytes.truncate(n);
        }
        // Header and table hold up the walk of every later start; the payload has its own checksum.
        let damaged = |source| FrameError::Damaged { path: path(), offset, source };
        let rule = DecodeError::Rule { what: "frame", rule: "is the one that was met a moment ago" };
        let head = bytes.first_chunk::<FRAME_HEADER_BYTES>().filter(|_| bytes.len() == header.frame_bytes());
        let again = FrameHeader::decode(head.ok_or(rule.clone()).map_err(damaged)?).map_err(damaged)?;
        if again != *header {
            return Err(damaged(rule));
        }
        let table = bytes.get(FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + header.table_bytes()).unwrap_or_default();
        header.decode_extents(table, self.blocks(header)).map_err(damaged)?;
        Ok(bytes)
    }
}

/// The new segment as it grows.
struct Writer<'a> {
    shared: &'a Shared,
    path: PathBuf,
    file: DiskFile,
    number: u32,
    /// Points that stay, and of those before them that are left out.
    of: std::collections::BTreeMap<Point, PointEntry>,
    waiting: Vec<u8>,
    written: u64,
    tally: Tally,
    points: Vec<PointEntry>,
    frames: Vec<(FrameId, u32)>,
}

impl<'a> Writer<'a> {
    fn create(range: &Range<'a>, path: &std::path::Path) -> Result<Self, GroupError> {
        let (shared, plan) = (range.shared, range.plan);
        let io = |what| move |source| JournalError::Io { path: path.to_owned(), what, source };
        if path.exists() {
            shared.disk.remove_file(path).map_err(io("remove what was left of"))?;
        }
        let first = segment_path(&shared.folder.journal(), plan.first);
        let file = File::open(&first).map_err(io("read"))?;
        let mut head = [0; SEGMENT_HEADER_BYTES];
        read_up_to(&file, &mut head, 0).map_err(io("read"))?;
        let damaged = |source| FrameError::Damaged { path: first.clone(), offset: 0, source };
        let header = SegmentHeader::decode(&head).map_err(damaged)?;
        let header = SegmentHeader {
            // What was folded of its first epochs is left out.
            first_epoch: range.expected.base.map_or(EpochId(1), |point| point.epoch.next()),
            further: plan.last - plan.first,
            thinned: plan.spacing,
            ..header
        };
        Ok(Self {
            shared,
            file: shared.disk.create_file(path).map_err(io("begin a segment of"))?,
            path: path.to_owned(),
            number: plan.first,
            of: range.points.iter().map(|entry| (entry.point, *entry)).collect(),
            waiting: header.encode().to_vec(),
            written: 0,
            tally: Tally::default(),
            points: Vec::new(),
            frames: Vec::new(),
        })
    }

    fn at(&self) -> u64 {
        self.written + self.waiting.len() as u64
    }

    fn io(&self, what: &'static str) -> impl Fn(std::io::Error) -> JournalError {
        let path = self.path.clone();
        move |source| JournalError::Io { path: path.clone(), what, source }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), GroupError> {
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() >= WRITE_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), GroupError> {
        if !self.waiting.is_empty() {
            self.file.append_at(&self.waiting, self.written).map_err(self.io("write"))?;
            self.written = self.at();
            self.waiting.clear();
        }
        Ok(())
    }

    fn frame(&mut self, bytes: &[u8], id: FrameId, from: (u32, u64)) -> Result<(), GroupError> {
        let damaged = |source| {
            let path = segment_path(&self.shared.folder.journal(), from.0);
            FrameError::Damaged { path, offset: from.1, source }
        };
        let short = DecodeError::Truncated { what: "frame", needed: FRAME_HEADER_BYTES, left: bytes.len() };
        let head = bytes.first_chunk::<FRAME_HEADER_BYTES>().ok_or(short).map_err(damaged)?;
        let header = FrameHeader::decode(head).map_err(damaged)?;
        let volume_blocks = self.shared.volume_blocks.get(usize::from(header.volume.0)).copied().unwrap_or(0);
        let table = bytes.get(FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + header.table_bytes()).unwrap_or_default();
        let extents = header.decode_extents(table, volume_blocks).map_err(damaged)?;
        let blocks: u64 = extents.iter().map(|e| u64::from(e.blocks)).sum();
        let is_data = header.kind == FrameKind::Data;
        self.tally.add(head, bytes.len(), if is_data { blocks } else { 0 }, if is_data { 0 } else { blocks });
        if is_data {
            let full = || JournalError::Full { path: self.path.clone() };
            self.frames.push((id, u32::try_from(self.at()).map_err(|_| full())?));
        }
        self.put(bytes)
    }

    /// Ends what became one epoch.
    fn seal(&mut self, last: &Seal, first_write_unix_us: u64) -> Result<(), GroupError> {
        let tally = std::mem::take(&mut self.tally);
        let seal = Seal {
            frames: tally.frames,
            frame_bytes: tally.frame_bytes,
            data_blocks: tally.data_blocks,
            zero_blocks: tally.zero_blocks,
            first_write_unix_us,
            digest: tally.digest(),
            ..*last
        };
        let record = encode_placed_seal(&self.shared.group_id, self.number, self.at(), &seal);
        self.put(&record)?;
        let no_point = || GroupError::NoPoint { group: self.shared.folder.group.clone(), point: seal.point() };
        let entry = self.of.get(&seal.point()).ok_or_else(no_point)?;
        self.points.push(PointEntry::new(&seal, Mark { segment: self.number, bytes: self.at() }, entry.next_frame));
        Ok(())
    }

    fn finish(mut self, range: &Range<'_>) -> Result<Thinned, GroupError> {
        self.flush()?;
        self.file.sync_data().map_err(self.io("sync"))?;
        let Plan { first, last, bytes, drop, spacing } = range.plan.clone();
        // All points are there that are to stay, in their order: only then the old segments may go.
        let stay = range.points.iter().map(|p| p.point).filter(|point| !drop.contains(point));
        if let Some(point) = range.points.first().map(|p| p.point)
            && (!stay.eq(self.points.iter().map(|p| p.point)) || self.tally.frames > 0)
        {
            return Err(GroupError::NoPoint { group: self.shared.folder.group.clone(), point });
        }
        Ok(Thinned {
            segment: Segment { number: first, last, bytes: self.written, thinned: spacing },
            bytes_before: bytes,
            dropped: drop,
            points: self.points,
            frames: self.frames,
        })
    }
}
