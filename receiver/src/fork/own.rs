//! Which blocks of a fork's volume are in its data file, and why.
//!
//! Two sets are kept apart, in memory and on disk: blocks **written** since the fork, which is what changed, and blocks merely
//! **copied** from the view by flattening. A block is *resident*, read from the data file, if it is in either. Always holds: nothing but
//! a guest's change enters a block into the written set (after a crash, a suspect region does, see `touched`).
//!
//! A copied block's bit is on disk before a guest changes the block, so after a crash its content may be new without a bit that says so.
//! Hence the *touched* regions: a region's bit is durable before the first change to a block of it that is resident and not written, and
//! goes when the written bits of the region are durable. What is still touched when a fork is opened counts as written, region by region.

use std::collections::BTreeSet;
use std::ops::Range;

use proto::DirtyMap;
use proto::units::{BLOCK_BYTES, blocks_of};

use super::follow::Changes;
use super::map::{MAP_PAGE_BYTES, PAGE_BLOCKS, page_of};

/// Blocks of a region: 4 MiB.
pub(super) const REGION_BLOCKS: u64 = 1024;

const _: () = assert!(PAGE_BLOCKS.is_multiple_of(REGION_BLOCKS));

/// Pages of a map, by number.
pub(super) type Pages = Vec<(u64, Box<[u8; MAP_PAGE_BYTES]>)>;

/// A set of blocks, and the regions of it that have bits which are not on disk yet.
#[derive(Debug)]
pub(super) struct Marked {
    pub(super) blocks: DirtyMap,
    pending: BTreeSet<u64>,
}

impl Marked {
    pub(super) fn new(blocks: DirtyMap) -> Self {
        Self { blocks, pending: BTreeSet::new() }
    }

    pub(super) fn mark(&mut self, blocks: Range<u64>) {
        let before = self.blocks.count();
        self.blocks.mark(blocks.start, blocks.end - blocks.start);
        if self.blocks.count() != before {
            self.pending.extend(blocks.start / REGION_BLOCKS..=(blocks.end - 1) / REGION_BLOCKS);
        }
    }

    /// The pages that have to be written; they count as written from here on.
    pub(super) fn take_pages(&mut self) -> Pages {
        let pending = std::mem::take(&mut self.pending);
        let numbers: BTreeSet<u64> = pending.into_iter().map(|region| region / (PAGE_BLOCKS / REGION_BLOCKS)).collect();
        numbers.into_iter().map(|n| (n, page_of(&self.blocks, n))).collect()
    }
}

/// What was copied.
#[derive(Debug)]
pub(super) enum Copies {
    /// Nothing: the fork was never flattened.
    None,
    /// A part.
    Some {
        copied: Marked,
        /// Written or copied.
        resident: DirtyMap,
    },
    /// All that was not written.
    All,
}

#[derive(Debug)]
pub(super) struct Own {
    size_bytes: u64,
    pub(super) written: Marked,
    pub(super) copies: Copies,
    /// Regions as blocks of a volume of their own, durable.
    pub(super) touched: DirtyMap,
    /// What changed since somebody began to follow; nobody does if there is none.
    pub(super) changed: Option<Changes>,
    /// How many have followed so far.
    pub(super) followers: u64,
}

/// Size of a volume that has a block for each region of one of `size_bytes`: what the map of touched regions is of.
pub(super) fn regions_bytes(size_bytes: u64) -> u64 {
    blocks_of(size_bytes).div_ceil(REGION_BLOCKS) * BLOCK_BYTES
}

impl Own {
    pub(super) fn new(size_bytes: u64, written: DirtyMap) -> Self {
        let touched = DirtyMap::new(regions_bytes(size_bytes));
        Self { size_bytes, written: Marked::new(written), copies: Copies::None, touched, changed: None, followers: 0 }
    }

    /// As [`new`](Self::new), with what flattening left; `None`: all is copied.
    pub(super) fn flattened(size_bytes: u64, written: DirtyMap, copied: Option<DirtyMap>, touched: &DirtyMap) -> Self {
        let mut own = Self::new(size_bytes, written);
        own.copies = match copied {
            None => Copies::All,
            Some(copied) => Copies::of(copied, &own.written.blocks),
        };
        own.suspect(touched);
        own.notice_whole();
        own
    }

    /// Blocks of touched regions may have changed without a bit that says so.
    fn suspect(&mut self, touched: &DirtyMap) {
        let mut at = 0;
        while let Some(run) = touched.next_run(at, u32::MAX) {
            at = run.end();
            let end = (run.end() * REGION_BLOCKS).min(self.blocks());
            for block in run.start.0 * REGION_BLOCKS..end {
                if self.is_only_copied(block) {
                    self.written.mark(block..block + 1);
                }
            }
        }
    }

    pub(super) fn blocks(&self) -> u64 {
        blocks_of(self.size_bytes)
    }

    /// Flattening begins, or goes on.
    pub(super) fn begin_copies(&mut self) {
        if matches!(self.copies, Copies::None) {
            self.copies = Copies::of(DirtyMap::new(self.size_bytes), &self.written.blocks);
        }
    }

    pub(super) fn is_flat(&self) -> bool {
        matches!(self.copies, Copies::All)
    }

    pub(super) fn resident_blocks(&self) -> u64 {
        match &self.copies {
            Copies::None => self.written.blocks.count(),
            Copies::Some { resident, .. } => resident.count(),
            Copies::All => self.blocks(),
        }
    }

    pub(super) fn is_resident(&self, block: u64) -> bool {
        self.resident().is_none_or(|set| set.contains(block))
    }

    /// The resident blocks; `None`: all.
    fn resident(&self) -> Option<&DirtyMap> {
        match &self.copies {
            Copies::None => Some(&self.written.blocks),
            Copies::Some { resident, .. } => Some(resident),
            Copies::All => None,
        }
    }

    fn is_only_copied(&self, block: u64) -> bool {
        if matches!(self.copies, Copies::None) {
            return false;
        }
        self.is_resident(block) && !self.written.blocks.contains(block)
    }

    /// Whether `block` is resident, and where the run of such blocks ends: at most at `end`, if `end` is not before.
    pub(super) fn run(&self, block: u64, end: u64) -> (bool, u64) {
        let Some(set) = self.resident() else { return (true, end) };
        if !set.contains(block) {
            return (false, set.next_run(block, 1).map_or(u64::MAX, |r| r.start.0).min(end));
        }
        let mut stop = block;
        while stop < end
            && let Some(run) = set.next_run(stop, u32::MAX).filter(|r| r.start.0 == stop)
        {
            stop = run.end();
        }
        (true, stop.min(end))
    }

    /// The first run of blocks of a range that are not resident.
    pub(super) fn missing(&self, mut at: u64, end: u64) -> Option<Range<u64>> {
        while at < end {
            let (resident, stop) = self.run(at, end);
            if !resident {
                return Some(at..stop);
            }
            at = stop;
        }
        None
    }

    /// Blocks that were changed, or may have been.
    pub(super) fn note_changed(&mut self, blocks: &Range<u64>) {
        if let Some(changed) = &mut self.changed {
            changed.blocks.mark(blocks.start, blocks.end - blocks.start);
        }
    }

    /// Whether all of a range is written already.
    pub(super) fn is_written(&self, blocks: &Range<u64>) -> bool {
        let mut at = blocks.start;
        while at < blocks.end
            && let Some(run) = self.written.blocks.next_run(at, u32::MAX).filter(|r| r.start.0 == at)
        {
            at = run.end();
        }
        at >= blocks.end
    }

    /// Blocks that a guest changed before the process was killed that had the fork open.
    pub(super) fn recover(&mut self, recent: &DirtyMap) {
        let mut at = 0;
        while let Some(run) = recent.next_run(at, u32::MAX) {
            at = run.end();
            if !self.is_written(&(run.start.0..run.end())) {
                self.mark_written(run.start.0..run.end());
            }
        }
    }

    /// Blocks that a guest changed.
    pub(super) fn mark_written(&mut self, blocks: Range<u64>) {
        if let Copies::Some { resident, .. } = &mut self.copies {
            resident.mark(blocks.start, blocks.end - blocks.start);
        }
        self.note_changed(&blocks);
        self.written.mark(blocks);
    }

    /// Blocks that were not resident and hold now what the view holds.
    pub(super) fn mark_copied(&mut self, blocks: Range<u64>) {
        if let Copies::Some { copied, resident } = &mut self.copies {
            resident.mark(blocks.start, blocks.end - blocks.start);
            copied.mark(blocks);
        }
    }

    /// The pages of the map of copies that have to be written.
    pub(super) fn take_copied_pages(&mut self) -> Pages {
        match &mut self.copies {
            Copies::Some { copied, .. } => copied.take_pages(),
            Copies::None | Copies::All => Vec::new(),
        }
    }

    /// Whether nothing is missing any more. Call it when what was copied is durable.
    pub(super) fn notice_whole(&mut self) -> bool {
        if self.resident_blocks() == self.blocks() && matches!(self.copies, Copies::Some { .. }) {
            self.copies = Copies::All;
        }
        self.is_flat()
    }

    /// Regions of a range that have to be touched before it is changed.
    pub(super) fn untouched(&self, blocks: &Range<u64>) -> Vec<u64> {
        if matches!(self.copies, Copies::None) {
            return Vec::new();
        }
        let regions = blocks.start / REGION_BLOCKS..=(blocks.end - 1) / REGION_BLOCKS;
        let within = |region: u64| blocks.start.max(region * REGION_BLOCKS)..blocks.end.min((region + 1) * REGION_BLOCKS);
        regions
            .filter(|region| !self.touched.contains(*region) && within(*region).any(|block| self.is_only_copied(block)))
            .collect()
    }

    /// Whether all bits of a region are durable in the written set, if no flush is under way.
    pub(super) fn is_settled(&self, region: u64) -> bool {
        !self.written.pending.contains(&region)
    }
}

impl Copies {
    fn of(copied: DirtyMap, written: &DirtyMap) -> Self {
        let mut resident = written.clone();
        resident.merge(&copied);
        Self::Some { copied: Marked::new(copied), resident }
    }
}
