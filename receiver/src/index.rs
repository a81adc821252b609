//! Where each block of each volume is, at one point.
//!
//! Per region of 4 MiB a sorted list of runs of 8 bytes. Regions are shared copy on write, so a
//! snapshot is a clone and the index of the epoch that is arriving is a clone that nobody sees until it is committed.
//! A block that no run covers is in the base. While nothing was folded into the base it is all zeroes, and zeroes over an
//! untouched region are no entry: a peer that zeroes petabytes costs no memory.

use proto::region::{REGION_BLOCKS, RegionMap};
use proto::units::VolumeIndex;
use proto::{BlockExtent, FrameKind};

/// Number of a data frame in the order of the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FrameId(pub(crate) u32);

impl FrameId {
    /// Stands for "zeroes" in a run.
    pub(crate) const ZERO: Self = Self(u32::MAX);
    /// Highest number a frame can have.
    pub(crate) const MAX: Self = Self(u32::MAX - 1);
}

/// Blocks `start..start + len` of a region are in `frame`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    start: u16,
    len: u16,
    frame: FrameId,
}

const _: () = assert!(std::mem::size_of::<Run>() == 8 && REGION_BLOCKS <= u16::MAX as u64);

impl Run {
    fn end(self) -> u16 {
        self.start + self.len
    }
}

/// The runs of a region in rising order; they do not overlap.
#[derive(Clone, Debug, Default)]
struct Region {
    runs: Vec<Run>,
}

impl Region {
    /// Makes `new` what holds for its blocks. Returns the change in number of runs.
    fn put(&mut self, new: Run) -> i64 {
        let before = self.runs.len() as i64;
        let first = self.runs.partition_point(|r| r.end() <= new.start);
        let last = first + self.runs[first..].partition_point(|r| r.start < new.end());
        // What is left of the runs that `new` cuts.
        let head = self.runs[first..last].first().filter(|r| r.start < new.start);
        let head = head.map(|r| Run { len: new.start - r.start, ..*r });
        let tail = self.runs[first..last].last().filter(|r| r.end() > new.end());
        let tail = tail.map(|r| Run { start: new.end(), len: r.end() - new.end(), ..*r });
        let (mut new, mut first, mut last) = (new, first, last);
        let mut tail = tail;
        if new.frame == FrameId::ZERO {
            // Zeroes need no position within a frame, so neighbours join: a trimmed region is one run.
            let near = |r: &Run| r.frame == FrameId::ZERO;
            if let Some(h) = head.filter(near) {
                new = Run { start: h.start, len: h.len + new.len, ..new };
            } else if head.is_none()
                && let Some(r) = first.checked_sub(1).map(|i| self.runs[i]).filter(|r| near(r) && r.end() == new.start)
            {
                new = Run { start: r.start, len: r.len + new.len, ..new };
                first -= 1;
            }
            if let Some(t) = tail.filter(near) {
                new.len += t.len;
                tail = None;
            } else if tail.is_none()
                && let Some(r) = self.runs.get(last).copied().filter(|r| near(r) && r.start == new.end())
            {
                new.len += r.len;
                last += 1;
            }
        }
        let head = head.filter(|h| h.end() <= new.start);
        // Small lists stay exact: most regions of a random load hold a handful of runs.
        let spare = self.runs.capacity() - self.runs.len();
        if spare < 2 && last - first < 2 {
            self.runs.reserve_exact(4 + self.runs.len() / 8);
        }
        self.runs.splice(first..last, head.into_iter().chain([new]).chain(tail));
        self.runs.len() as i64 - before
    }
}

/// What an index says about a run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the base.
    Base,
    /// Zeroes.
    Zero,
    /// In this frame.
    Frame(FrameId),
}

/// The index of one volume.
#[derive(Clone, Debug)]
pub(crate) struct VolumeIndexMap {
    regions: RegionMap<Region>,
    blocks: u64,
    /// Nothing was folded into the base: an untouched region reads as zeroes anyway.
    base_is_zero: bool,
    runs: u64,
    regions_used: u64,
}

impl VolumeIndexMap {
    pub(crate) fn new(size_bytes: u64, base_is_zero: bool) -> Self {
        let (regions, blocks) = (RegionMap::new(size_bytes), proto::units::blocks_of(size_bytes));
        Self { regions, blocks, base_is_zero, runs: 0, regions_used: 0 }
    }

    /// Makes `place` what holds for `extent`, which lies within the volume.
    pub(crate) fn put(&mut self, extent: BlockExtent, frame: FrameId) {
        let (mut at, end) = (extent.start.0, extent.end().min(self.blocks));
        while at < end {
            let number = at / REGION_BLOCKS;
            if self.base_is_zero && frame == FrameId::ZERO && self.regions.get(number).is_none() {
                let Some((next, _)) = self.regions.iter_from(number).next() else { break };
                at = next * REGION_BLOCKS;
                continue;
            }
            let stop = ((number + 1) * REGION_BLOCKS).min(end);
            let run = Run { start: (at % REGION_BLOCKS) as u16, len: (stop - at) as u16, frame };
            let region = self.regions.get_or_default(number);
            self.regions_used += u64::from(region.runs.is_empty());
            let change = region.put(run);
            self.runs = self.runs.saturating_add_signed(change);
            at = stop;
        }
    }

    /// Where block `at` is, and for how many blocks from there that holds (at most `max`, at least 1).
    pub(crate) fn find(&self, at: u64, max: u64) -> (Place, u64) {
        let number = at / REGION_BLOCKS;
        let in_region = (REGION_BLOCKS - at % REGION_BLOCKS).min(max).max(1);
        let Some(region) = self.regions.get(number) else {
            return (Place::Base, self.base_run(number, in_region, max));
        };
        let block = (at % REGION_BLOCKS) as u16;
        let i = region.runs.partition_point(|r| r.end() <= block);
        match region.runs.get(i) {
            Some(run) if run.start <= block => {
                let place = if run.frame == FrameId::ZERO { Place::Zero } else { Place::Frame(run.frame) };
                (place, u64::from(run.end() - block).min(in_region))
            }
            Some(run) => (Place::Base, u64::from(run.start - block).min(in_region)),
            None => (Place::Base, in_region),
        }
    }

    /// Extends a run of the base over the untouched regions that follow, so that a scan of an empty TiB takes no time.
    fn base_run(&self, number: u64, in_region: u64, max: u64) -> u64 {
        if in_region >= max {
            return in_region;
        }
        let next = self.regions.iter_from(number).next().map_or(self.blocks, |(n, _)| n * REGION_BLOCKS);
        let from = (number + 1) * REGION_BLOCKS;
        (in_region + next.saturating_sub(from)).min(max)
    }

    /// Resident bytes, estimated: runs with their spare room, and what a region costs in allocations.
    fn memory_bytes(&self) -> u64 {
        self.runs * 9 + self.regions_used * 96
    }
}

/// The index of a group at one point.
#[derive(Clone, Debug)]
pub(crate) struct Index {
    volumes: Vec<VolumeIndexMap>,
}

impl Index {
    /// `base_is_zero`: nothing was folded into the base yet.
    pub(crate) fn new(sizes: impl IntoIterator<Item = u64>, base_is_zero: bool) -> Self {
        Self { volumes: sizes.into_iter().map(|size| VolumeIndexMap::new(size, base_is_zero)).collect() }
    }

    /// Applies a frame. `frame` is ignored for zero frames.
    pub(crate) fn apply(&mut self, volume: VolumeIndex, kind: FrameKind, extents: &[BlockExtent], frame: FrameId) {
        let Some(map) = self.volumes.get_mut(usize::from(volume.0)) else { return };
        let frame = if kind == FrameKind::Zero { FrameId::ZERO } else { frame };
        for extent in extents {
            map.put(*extent, frame);
        }
    }

    pub(crate) fn volume(&self, volume: usize) -> Option<&VolumeIndexMap> {
        self.volumes.get(volume)
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.volumes.iter().map(VolumeIndexMap::memory_bytes).sum()
    }
}

/// Where each data frame of a journal is: 4 bytes a frame.
#[derive(Debug, Default)]
pub(crate) struct FrameTable {
    segments: Vec<SegmentFrames>,
    next: u32,
}

#[derive(Debug)]
struct SegmentFrames {
    segment: u32,
    first: u32,
    offsets: Vec<u32>,
}

/// Where a frame starts and how far to read at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FramePlace {
    pub(crate) segment: u32,
    pub(crate) offset: u64,
    pub(crate) bytes_max: usize,
}

impl FrameTable {
    /// Number the next data frame gets; `None` when the numbers are used up.
    pub(crate) fn next(&self) -> Option<FrameId> {
        (self.next <= FrameId::MAX.0).then_some(FrameId(self.next))
    }

    /// Adds the next data frame.
    pub(crate) fn push(&mut self, segment: u32, offset: u32) {
        if self.segments.last().is_none_or(|s| s.segment != segment) {
            self.segments.push(SegmentFrames { segment, first: self.next, offsets: Vec::new() });
        }
        if let Some(last) = self.segments.last_mut() {
            last.offsets.push(offset);
            self.next += 1;
        }
    }

    /// Forgets the frames from `next` on: those of an epoch that was abandoned.
    pub(crate) fn truncate(&mut self, next: u32) {
        while let Some(last) = self.segments.last_mut() {
            if last.first < next {
                last.offsets.truncate((next - last.first) as usize);
                break;
            }
            self.segments.pop();
        }
        self.next = self.next.min(next);
    }

    pub(crate) fn get(&self, frame: FrameId) -> Option<FramePlace> {
        let i = self.segments.partition_point(|s| s.first <= frame.0).checked_sub(1)?;
        let segment = self.segments.get(i)?;
        let at = (frame.0 - segment.first) as usize;
        let offset = *segment.offsets.get(at)?;
        let max = proto::frame::FRAME_BYTES_MAX;
        let bytes_max = segment.offsets.get(at + 1).map_or(max, |next| max.min((next - offset) as usize));
        Some(FramePlace { segment: segment.segment, offset: offset.into(), bytes_max })
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.segments.iter().map(|s| s.offsets.capacity() as u64 * 4 + 40).sum()
    }
}

#[cfg(test)]
mod tests;
