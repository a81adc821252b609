//! Where each block of each volume is, at one point.
//!
//! Per region of 4 MiB a sorted list of runs of 8 bytes, exactly as long as it must be. Regions are shared copy on write, so a
//! snapshot is a clone.
//! A block that no run covers is in the base. While nothing was folded into the base it is all zeroes, and zeroes over an
//! untouched region are no entry: a peer that zeroes petabytes costs no memory.

use std::sync::Arc;

use proto::region::{REGION_BLOCKS, REGION_BYTES, RegionSlots};
use proto::units::{BLOCK_BYTES, VOLUME_BYTES_MAX};
use proto::{BlockExtent, DirtyMap};

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

/// Makes `new` what holds for its blocks. `runs` are in rising order and do not overlap.
fn put(runs: &mut Vec<Run>, new: Run) {
    let first = runs.partition_point(|r| r.end() <= new.start);
    let last = first + runs[first..].partition_point(|r| r.start < new.end());
    // What is left of the runs that `new` cuts.
    let head = runs[first..last].first().filter(|r| r.start < new.start);
    let head = head.map(|r| Run { len: new.start - r.start, ..*r });
    let tail = runs[first..last].last().filter(|r| r.end() > new.end());
    let tail = tail.map(|r| Run { start: new.end(), len: r.end() - new.end(), ..*r });
    let (mut new, mut first, mut last) = (new, first, last);
    let mut tail = tail;
    if new.frame == FrameId::ZERO {
        // Zeroes need no position within a frame, so neighbours join: a trimmed region is one run.
        let near = |r: &Run| r.frame == FrameId::ZERO;
        if let Some(h) = head.filter(near) {
            new = Run { start: h.start, len: h.len + new.len, ..new };
        } else if head.is_none()
            && let Some(r) = first.checked_sub(1).map(|i| runs[i]).filter(|r| near(r) && r.end() == new.start)
        {
            new = Run { start: r.start, len: r.len + new.len, ..new };
            first -= 1;
        }
        if let Some(t) = tail.filter(near) {
            new.len += t.len;
            tail = None;
        } else if tail.is_none()
            && let Some(r) = runs.get(last).copied().filter(|r| near(r) && r.start == new.end())
        {
            new.len += r.len;
            last += 1;
        }
    }
    let head = head.filter(|h| h.end() <= new.start);
    runs.splice(first..last, head.into_iter().chain([new]).chain(tail));
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

/// Blocks of one region of a volume.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed {
    region: u32,
    run: Run,
}

impl Placed {
    pub(crate) fn mark(self, map: &mut DirtyMap) {
        map.mark(u64::from(self.region) * REGION_BLOCKS + u64::from(self.run.start), self.run.len.into());
    }
}

const _: () = assert!(std::mem::size_of::<Placed>() == 12 && VOLUME_BYTES_MAX / REGION_BYTES <= u32::MAX as u64);

/// The index of one volume.
#[derive(Clone, Debug)]
pub(crate) struct VolumeIndexMap {
    regions: RegionSlots<Arc<[Run]>>,
    blocks: u64,
    /// Nothing was folded into the base: an untouched region reads as zeroes anyway.
    base_is_zero: bool,
    runs: u64,
    regions_used: u64,
    /// What a region holds that is zeroes as a whole: one for all of them.
    zeroes: Arc<[Run]>,
}

impl VolumeIndexMap {
    pub(crate) fn new(size_bytes: u64, base_is_zero: bool) -> Self {
        let (regions, blocks) = (RegionSlots::new(size_bytes), proto::units::blocks_of(size_bytes));
        let zeroes = Arc::new([Run { start: 0, len: REGION_BLOCKS as u16, frame: FrameId::ZERO }]);
        Self { regions, blocks, base_is_zero, runs: 0, regions_used: 0, zeroes }
    }

    /// Cuts `extent` of `frame`, which lies within the volume, at the regions' borders.
    pub(crate) fn cut(&self, extent: BlockExtent, frame: FrameId) -> impl Iterator<Item = Placed> + use<> {
        let (mut at, end) = (extent.start.0, extent.end().min(self.blocks));
        std::iter::from_fn(move || {
            let number = at / REGION_BLOCKS;
            let stop = ((number + 1) * REGION_BLOCKS).min(end);
            let len = stop.checked_sub(at).filter(|len| *len > 0)?;
            let run = Run { start: (at % REGION_BLOCKS) as u16, len: len as u16, frame };
            at = stop;
            Some(Placed { region: u32::try_from(number).unwrap_or(u32::MAX), run })
        })
    }

    /// Makes each of `placed` what holds for its blocks, in their order. Leaves them empty.
    pub(crate) fn enter(&mut self, placed: &mut Vec<Placed>) {
        let mut runs = Vec::new();
        placed.sort_by_key(|p| p.region);
        for of_region in placed.chunk_by(|a, b| a.region == b.region) {
            let Some(number) = of_region.first().map(|p| u64::from(p.region)) else { continue };
            runs.extend_from_slice(self.regions.get(number).map_or(&[], |runs| &**runs));
            for placed in of_region {
                put(&mut runs, placed.run);
            }
            self.set(number, &runs);
            runs.clear();
        }
        placed.clear();
    }

    /// Enters what `later` says, an index of what was written after this one.
    pub(crate) fn merge(&mut self, later: Self) {
        let mut runs = Vec::new();
        for (number, theirs) in later.regions.into_values() {
            match self.regions.get(number) {
                Some(ours) => {
                    runs.extend_from_slice(ours);
                    for run in theirs.iter() {
                        put(&mut runs, *run);
                    }
                    self.set(number, &runs);
                    runs.clear();
                }
                None => self.place(number, theirs),
            }
        }
    }

    fn set(&mut self, number: u64, runs: &[Run]) {
        let runs = if *runs == *self.zeroes { Arc::clone(&self.zeroes) } else { Arc::from(runs) };
        self.place(number, runs);
    }

    fn place(&mut self, number: u64, runs: Arc<[Run]>) {
        let before = self.regions.get(number).map(|runs| runs.len() as u64);
        if before.is_none() && self.base_is_zero && runs.iter().all(|r| r.frame == FrameId::ZERO) {
            return;
        }
        self.regions_used += u64::from(before.is_none());
        self.runs = (self.runs + runs.len() as u64).saturating_sub(before.unwrap_or(0));
        *self.regions.slot(number) = Some(runs);
    }

    /// Forgets what the base has meanwhile, in up to `regions_max` regions from `number` on: runs of frames before `first`, and zeroes that
    /// `folded`, the index of the base's point, has as zeroes too. Returns where to go on.
    pub(crate) fn forget_folded(&mut self, number: u64, regions_max: usize, first: FrameId, folded: &Self) -> Option<u64> {
        self.base_is_zero = false;
        let touched: Vec<u64> = self.regions.iter_from(number).take(regions_max).map(|(number, _)| number).collect();
        for number in &touched {
            let Some(runs) = self.regions.get(*number) else { continue };
            let mut kept = Vec::with_capacity(runs.len());
            for run in runs.iter() {
                match run.frame {
                    FrameId::ZERO => folded.zeroes_left(*number, *run, &mut kept),
                    frame if frame >= first => kept.push(*run),
                    _ => {}
                }
            }
            if kept.len() == runs.len() && kept[..] == runs[..] {
                continue;
            }
            self.runs = (self.runs + kept.len() as u64).saturating_sub(runs.len() as u64);
            if kept.is_empty() {
                self.regions_used -= 1;
                self.regions.remove(*number);
            } else {
                *self.regions.slot(*number) = Some(Arc::from(kept));
            }
        }
        touched.last().filter(|_| touched.len() == regions_max).map(|last| last + 1)
    }

    /// The pieces of a run of zeroes that are something else here.
    fn zeroes_left(&self, region: u64, run: Run, out: &mut Vec<Run>) {
        let (mut at, end) = (run.start, run.end());
        while at < end {
            let (place, blocks) = self.find(region * REGION_BLOCKS + u64::from(at), u64::from(end - at));
            let len = blocks as u16;
            if place != Place::Zero {
                match out.last_mut().filter(|last| last.frame == FrameId::ZERO && last.end() == at) {
                    Some(last) => last.len += len,
                    None => out.push(Run { start: at, len, frame: FrameId::ZERO }),
                }
            }
            at += len;
        }
    }

    /// The first region from `number` on that has an entry.
    pub(crate) fn next_region(&self, number: u64) -> Option<u64> {
        self.regions.iter_from(number).next().map(|(number, _)| number)
    }

    /// Whether zeroes over an untouched region are no entry.
    pub(crate) fn base_is_zero(&self) -> bool {
        self.base_is_zero
    }

    /// The same volume, with no entry at all: what comes into it is kept whatever the base holds.
    pub(crate) fn blank(&self) -> Self {
        Self::new(self.blocks * BLOCK_BYTES, false)
    }

    /// Where block `at` is, and for how many blocks from there that holds (at most `max`, at least 1).
    pub(crate) fn find(&self, at: u64, max: u64) -> (Place, u64) {
        let number = at / REGION_BLOCKS;
        let in_region = (REGION_BLOCKS - at % REGION_BLOCKS).min(max).max(1);
        let Some(runs) = self.regions.get(number) else {
            return (Place::Base, self.base_run(number, in_region, max));
        };
        let block = (at % REGION_BLOCKS) as u16;
        let i = runs.partition_point(|r| r.end() <= block);
        match runs.get(i) {
            Some(run) if run.start <= block => {
                let place = if run.frame == FrameId::ZERO { Place::Zero } else { Place::Frame(run.frame) };
                (place, u64::from(run.end() - block).min(in_region))
            }
            Some(run) => (Place::Base, u64::from(run.start - block).min(in_region)),
            None => (Place::Base, in_region),
        }
    }

    /// The blocks that may hold something else than in `other`, an index of the same volume: those that another frame is about.
    pub(crate) fn differing(&self, other: &Self) -> DirtyMap {
        let mut differing = DirtyMap::new(self.blocks * BLOCK_BYTES);
        let known = |place| if place == Place::Base && self.base_is_zero { Place::Zero } else { place };
        let mut at = 0;
        while at < self.blocks {
            let (ours, our_run) = self.find(at, self.blocks - at);
            let (theirs, their_run) = other.find(at, self.blocks - at);
            let run = our_run.min(their_run);
            if known(ours) != known(theirs) {
                differing.mark(at, run);
            }
            at += run;
        }
        differing
    }

    /// The blocks that may have changed since `earlier`, an index of the same volume at an earlier point that is pinned. What `is_folded` is in the
    /// base, which is no newer than that point: what is in the base at both points is the same. Zeroes that the base has too may have become no
    /// entry meanwhile.
    pub(crate) fn changed_since(&self, earlier: &Self, is_folded: impl Fn(FrameId) -> bool) -> DirtyMap {
        let mut changed = DirtyMap::new(self.blocks * BLOCK_BYTES);
        let settled = |place| match place {
            Place::Frame(frame) if is_folded(frame) => Place::Base,
            place => place,
        };
        let mut at = 0;
        while at < self.blocks {
            let (ours, our_run) = self.find(at, self.blocks - at);
            let (theirs, their_run) = earlier.find(at, self.blocks - at);
            let run = our_run.min(their_run);
            match (settled(ours), settled(theirs)) {
                (Place::Base, Place::Zero) => {}
                (ours, theirs) if ours == theirs => {}
                _ => changed.mark(at, run),
            }
            at += run;
        }
        changed
    }

    /// Marks the blocks that have an entry.
    pub(crate) fn mark(&self, map: &mut DirtyMap) {
        for (number, runs) in self.regions.iter_from(0) {
            runs.iter().for_each(|run| map.mark(number * REGION_BLOCKS + u64::from(run.start), run.len.into()));
        }
    }

    /// Extends a run of the base over the untouched regions that follow, so that a scan of an empty TiB takes no time.
    fn base_run(&self, number: u64, in_region: u64, max: u64) -> u64 {
        if in_region >= max {
            return in_region;
        }
        let next = self.next_region(number).map_or(self.blocks, |n| n * REGION_BLOCKS);
        let from = (number + 1) * REGION_BLOCKS;
        (in_region + next.saturating_sub(from)).min(max)
    }

    /// Blocks that are in frames.
    pub(crate) fn blocks_in_frames(&self) -> u64 {
        let runs = self.regions.iter_from(0).flat_map(|(_, runs)| runs.iter());
        runs.filter(|run| run.frame != FrameId::ZERO).map(|run| u64::from(run.len)).sum()
    }

    /// Resident bytes, estimated: runs, and what a region costs in its page and in an allocation.
    fn memory_bytes(&self) -> u64 {
        self.runs * 8 + self.regions_used * 40
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

    pub(crate) fn volume(&self, volume: usize) -> Option<&VolumeIndexMap> {
        self.volumes.get(volume)
    }

    /// Something was folded into the base: zeroes are an entry from now on.
    pub(crate) fn base_is_written(&mut self) {
        for volume in &mut self.volumes {
            volume.base_is_zero = false;
        }
    }

    pub(crate) fn volumes_mut(&mut self) -> &mut [VolumeIndexMap] {
        &mut self.volumes
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.volumes.iter().map(VolumeIndexMap::memory_bytes).sum()
    }
}

/// Where each data frame of a journal is: 4 bytes a frame, 8 in what was thinned since the start.
#[derive(Debug, Default)]
pub(crate) struct FrameTable {
    segments: Vec<SegmentFrames>,
    next: u32,
}

#[derive(Debug)]
struct SegmentFrames {
    segment: u32,
    first: u32,
    /// Rising.
    offsets: Vec<u32>,
    /// The numbers of its frames, if they do not follow each other: some were thinned away.
    numbers: Option<Vec<u32>>,
}

impl SegmentFrames {
    /// The number after those of its frames.
    fn end(&self) -> u32 {
        match &self.numbers {
            Some(numbers) => numbers.last().map_or(self.first, |last| last + 1),
            None => self.first + self.offsets.len() as u32,
        }
    }

    /// How many of its frames are before `frame`.
    fn before(&self, frame: u32) -> usize {
        match &self.numbers {
            Some(numbers) => numbers.partition_point(|number| *number < frame),
            None => (frame.saturating_sub(self.first) as usize).min(self.offsets.len()),
        }
    }

    fn number(&self, at: usize) -> Option<u32> {
        match &self.numbers {
            Some(numbers) => numbers.get(at).copied(),
            None => (at < self.offsets.len()).then(|| self.first + at as u32),
        }
    }
}

/// Where a frame starts and how far to read at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FramePlace {
    pub(crate) segment: u32,
    pub(crate) offset: u64,
    pub(crate) bytes_max: usize,
}

impl FrameTable {
    /// Forgets the frames before `first`: those that were folded.
    pub(crate) fn forget_before(&mut self, first: u32) {
        let whole = self.segments.partition_point(|s| s.end() <= first);
        self.segments.drain(..whole);
        if let Some(segment) = self.segments.first_mut().filter(|s| s.first < first) {
            let gone = segment.before(first);
            segment.offsets.drain(..gone);
            if let Some(numbers) = &mut segment.numbers {
                numbers.drain(..gone);
            }
            segment.first = first;
        }
    }

    /// The frames of these segments are now in the first of them: those that are left, by number, with their places.
    pub(crate) fn replace(&mut self, segments: std::ops::RangeInclusive<u32>, left: &[(FrameId, u32)]) {
        let from = self.segments.partition_point(|s| s.segment < *segments.start());
        let to = self.segments.partition_point(|s| s.segment <= *segments.end());
        let new = left.first().map(|(first, _)| SegmentFrames {
            segment: *segments.start(),
            first: first.0,
            offsets: left.iter().map(|(_, offset)| *offset).collect(),
            numbers: Some(left.iter().map(|(number, _)| number.0).collect()),
        });
        self.segments.splice(from..to, new);
    }

    /// The number of the data frame at this place.
    pub(crate) fn find(&self, segment: u32, offset: u64) -> Option<FrameId> {
        let i = self.segments.binary_search_by_key(&segment, |s| s.segment).ok()?;
        let segment = self.segments.get(i)?;
        let at = segment.offsets.binary_search(&u32::try_from(offset).ok()?).ok()?;
        segment.number(at).map(FrameId)
    }

    /// Number the next data frame gets; `None` when the numbers are used up.
    pub(crate) fn next(&self) -> Option<FrameId> {
        (self.next <= FrameId::MAX.0).then_some(FrameId(self.next))
    }

    /// Adds the next data frame.
    pub(crate) fn push(&mut self, segment: u32, offset: u32) {
        if self.segments.last().is_none_or(|s| s.segment != segment) {
            self.segments.push(SegmentFrames { segment, first: self.next, offsets: Vec::new(), numbers: None });
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
                let left = last.before(next);
                last.offsets.truncate(left);
                if let Some(numbers) = &mut last.numbers {
                    numbers.truncate(left);
                }
                break;
            }
            self.segments.pop();
        }
        self.next = self.next.min(next);
    }

    pub(crate) fn get(&self, frame: FrameId) -> Option<FramePlace> {
        let i = self.segments.partition_point(|s| s.first <= frame.0).checked_sub(1)?;
        let segment = self.segments.get(i)?;
        let at = segment.before(frame.0);
        segment.number(at).filter(|number| *number == frame.0)?;
        let offset = *segment.offsets.get(at)?;
        let max = proto::frame::FRAME_BYTES_MAX;
        let bytes_max = segment.offsets.get(at + 1).map_or(max, |next| max.min((next - offset) as usize));
        Some(FramePlace { segment: segment.segment, offset: offset.into(), bytes_max })
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        let of = |s: &SegmentFrames| s.offsets.capacity() + s.numbers.as_ref().map_or(0, Vec::capacity);
        self.segments.iter().map(|s| of(s) as u64 * 4 + 64).sum()
    }
}

#[cfg(test)]
mod tests;
