//! Which blocks of a range hold what they held at the newest cut.
//!
//! A scrub reads blocks of the live disk and says that this is what the newest sealed epoch has. That is so of a block which no open or
//! unsealed epoch had changed when the reading began, and which nobody marked until it ended: sealed epochs have no write in flight.
//! Nobody waits for a watch; a write that comes across one leaves its mark there too.

use proto::region::REGION_BLOCKS;
use proto::{BlockExtent, BlockIndex, DirtyMap, EpochId, Generation, Point};

use super::{Ledger, Range, State};

/// A range, and what was marked of it since it is watched.
pub(super) struct Watched {
    id: u64,
    range: Range,
    marked: Vec<u64>,
}

#[derive(Default)]
pub(super) struct Watches {
    all: Vec<Watched>,
    next_id: u64,
    generation: Generation,
    /// The newest sealed epoch of this session, or the newest committed one.
    newest: Option<EpochId>,
}

impl Watches {
    /// Notes a mark. Costs an admission one comparison while nothing is watched.
    pub(super) fn mark(&mut self, range: &Range) {
        for watched in &mut self.all {
            if watched.range.overlaps(range) {
                let first = range.first.max(watched.range.first);
                let end = (range.first + range.count).min(watched.range.first + watched.range.count);
                for bit in first - watched.range.first..end - watched.range.first {
                    watched.marked[(bit / 64) as usize] |= 1 << (bit % 64);
                }
            }
        }
    }

    /// Notes marks of all blocks of `map`, of one volume.
    pub(super) fn mark_all(&mut self, volume: usize, map: &DirtyMap) {
        for watched in self.all.iter_mut().filter(|watched| watched.range.volume == volume) {
            let (first, end) = (watched.range.first, watched.range.first + watched.range.count);
            let mut at = first;
            while let Some(run) = map.next_run(at, u32::MAX).filter(|run| run.start.0 < end) {
                for bit in run.start.0 - first..run.end().min(end) - first {
                    watched.marked[(bit / 64) as usize] |= 1 << (bit % 64);
                }
                at = run.end();
            }
        }
    }

    pub(super) fn sealed(&mut self, epoch: EpochId) {
        self.newest = Some(epoch);
    }

    /// What was sealed is not known to be committed any more.
    pub(super) fn forget(&mut self) {
        self.newest = None;
    }
}

/// A set of blocks of a range.
pub(crate) struct Blocks {
    first: u64,
    count: u64,
    bits: Vec<u64>,
}

impl Blocks {
    fn has(&self, block: u64) -> bool {
        let bit = block - self.first;
        self.bits.get((bit / 64) as usize).is_some_and(|word| word & (1 << (bit % 64)) != 0)
    }

    /// Whether any block of the run is in the set.
    pub(crate) fn touches(&self, run: BlockExtent) -> bool {
        self.bits.iter().any(|word| *word != 0) && (run.start.0..run.end()).any(|block| self.has(block))
    }

    /// The blocks of `within` that are not in the set, as runs of at most `blocks_max`.
    pub(crate) fn gaps(&self, within: BlockExtent, blocks_max: u32) -> Vec<BlockExtent> {
        let mut runs: Vec<BlockExtent> = Vec::new();
        let end = within.end().min(self.first + self.count);
        for block in (within.start.0..end).filter(|block| !self.has(*block)) {
            match runs.last_mut() {
                Some(run) if run.end() == block && run.blocks < blocks_max => run.blocks += 1,
                _ => runs.push(BlockExtent { start: BlockIndex(block), blocks: 1 }),
            }
        }
        runs
    }
}

/// A range that is watched; dropping it ends that.
pub(crate) struct Watch<'a> {
    ledger: &'a Ledger,
    id: u64,
}

impl Watch<'_> {
    /// Ends the watch. Returns the blocks that were marked, and the point that has what the others held meanwhile; `None` if there is none.
    pub(crate) fn end(self) -> (Option<Point>, Blocks) {
        let watches = &mut self.ledger.state.lock().watches;
        let point = watches.newest.map(|epoch| Point { generation: watches.generation, epoch });
        let at = watches.all.iter().position(|w| w.id == self.id).expect("a watch ends once");
        let Watched { range, marked, .. } = watches.all.swap_remove(at);
        (point, Blocks { first: range.first, count: range.count, bits: marked })
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.ledger.state.lock().watches.all.retain(|w| w.id != self.id);
    }
}

impl State {
    /// Blocks of the range whose content no sealed epoch has, or is not known to have.
    fn unsettled(&self, range: &Range) -> Blocks {
        let mut blocks = Blocks { first: range.first, count: range.count, bits: vec![0; range.count.div_ceil(64) as usize] };
        let end = range.first + range.count;
        let maps = [&self.open, &self.suspect].into_iter().chain(self.building.as_ref().map(|b| &b.maps));
        for map in maps.filter_map(|maps| maps.get(range.volume)) {
            for region in range.first / REGION_BLOCKS..end.div_ceil(REGION_BLOCKS) {
                if !map.touches_region(region) {
                    continue;
                }
                let base = region * REGION_BLOCKS;
                for (i, byte) in map.region_bits(region).into_iter().enumerate().filter(|(_, byte)| *byte != 0) {
                    for block in (0..8).filter(|bit| byte & (1 << bit) != 0).map(|bit| base + i as u64 * 8 + bit) {
                        if (range.first..end).contains(&block) {
                            let bit = block - range.first;
                            blocks.bits[(bit / 64) as usize] |= 1 << (bit % 64);
                        }
                    }
                }
            }
        }
        blocks
    }
}

impl Ledger {
    /// A session begins: its generation, and its newest epoch that is sealed or committed.
    pub(crate) fn follow(&self, generation: Generation, newest: Option<EpochId>) {
        let watches = &mut self.state.lock().watches;
        (watches.generation, watches.newest) = (generation, newest);
    }

    /// Begins to watch a range. Returns the blocks of it that are left out: what they hold is on its way anyway.
    pub(crate) fn watch(&self, range: Range) -> (Watch<'_>, Blocks) {
        let mut state = self.state.lock();
        let unsettled = state.unsettled(&range);
        let id = state.watches.next_id;
        state.watches.next_id += 1;
        state.watches.all.push(Watched { id, range, marked: vec![0; range.count.div_ceil(64) as usize] });
        (Watch { ledger: self, id }, unsettled)
    }

    /// The copy does not hold what these blocks hold: they are sent with the next epoch. No write of the guest, so the lag does not count it.
    pub(crate) fn mark_differing(&self, range: &Range) {
        let mut state = self.state.lock();
        state.open[range.volume].mark(range.first, range.count);
        state.watches.mark(range);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proto::BLOCK_BYTES;

    use super::*;
    use crate::dirtylog::Known;
    use crate::ledger::CopyLimits;

    const BLOCKS: u64 = 3000;

    fn ledger() -> Ledger {
        let none = || DirtyMap::new(BLOCKS * BLOCK_BYTES);
        let limits = CopyLimits { memory_bytes: 1 << 20, spill_bytes: 0 };
        let known = (0..2).map(|_| Known { suspect: none(), dirty: none() }).collect();
        let ledger = Ledger::new(vec![BLOCKS * BLOCK_BYTES; 2], limits, known);
        ledger.follow(Generation(2), Some(EpochId(4)));
        ledger
    }

    fn range(volume: usize, first: u64, count: u64) -> Range {
        Range { volume, first, count }
    }

    fn write(ledger: &Ledger, range: Range) {
        drop(ledger.admit(range, Instant::now));
    }

    fn extent(start: u64, blocks: u32) -> BlockExtent {
        BlockExtent { start: BlockIndex(start), blocks }
    }

    fn capture(ledger: &Ledger, epoch: u64) {
        ledger.freeze(EpochId(epoch));
        for volume in 0..2 {
            ledger.claim_captured(volume, &[extent(0, BLOCKS as u32)], |_| ());
        }
        assert!(futures_util::FutureExt::now_or_never(ledger.thaw()).is_some_and(|thawed| thawed.is_ok()));
    }

    /// Would catch a block that is compared while its newest content is in no sealed epoch: an alarm about nothing.
    #[test]
    fn only_what_is_sealed_is_taken() {
        let ledger = ledger();
        write(&ledger, range(0, 1000, 50));
        capture(&ledger, 5);
        write(&ledger, range(0, 1030, 2));
        write(&ledger, range(1, 0, 9));
        let taken = |first, count| ledger.watch(range(0, first, count)).1.gaps(extent(first, count as u32), 1024);
        assert_eq!(taken(990, 100), [extent(990, 10), extent(1050, 40)], "in the epoch being built, and in the open one");
        ledger.seal(EpochId(5));
        assert_eq!(taken(990, 100), [extent(990, 40), extent(1032, 58)], "the sealed epoch has it");
        assert_eq!(taken(1030, 2), []);
        ledger.suspect_all();
        assert_eq!(taken(0, BLOCKS), []);
    }

    /// Would catch a write that is overlooked because it came and went between the two looks at the maps.
    #[test]
    fn what_is_marked_meanwhile_is_told() {
        let ledger = ledger();
        let (watch, _) = ledger.watch(range(0, 100, 200));
        let (other, _) = ledger.watch(range(0, 250, 200));
        write(&ledger, range(0, 90, 20));
        write(&ledger, range(1, 150, 20));
        capture(&ledger, 5);
        ledger.seal(EpochId(5));
        ledger.mark_differing(&range(0, 260, 1));
        write(&ledger, range(0, 299, 5));
        let (point, marked) = watch.end();
        assert_eq!(point, Some(Point { generation: Generation(2), epoch: EpochId(5) }));
        assert_eq!(marked.gaps(extent(100, 200), 1024), [extent(110, 150), extent(261, 38)]);
        assert!(marked.touches(extent(105, 10)) && !marked.touches(extent(110, 150)));
        assert_eq!(
            other.end().1.gaps(extent(250, 200), 100),
            [extent(250, 10), extent(261, 38), extent(304, 100), extent(404, 46)]
        );
        assert!(ledger.state.lock().watches.all.is_empty());
    }

    /// Would catch hashes that are sent as of an epoch which was given up with its session.
    #[test]
    fn after_a_merge_there_is_no_point() {
        let ledger = ledger();
        write(&ledger, range(0, 0, 1));
        capture(&ledger, 5);
        ledger.seal(EpochId(5));
        let (watch, _) = ledger.watch(range(0, 0, 10));
        ledger.merge_sealed();
        assert_eq!(watch.end().0, None);
        drop(ledger.watch(range(0, 0, 10)));
        assert!(ledger.state.lock().watches.all.is_empty());
    }

    /// The lag is that of the guest's writes alone.
    #[test]
    fn a_repair_is_no_write_of_the_guest() {
        let ledger = ledger();
        ledger.mark_differing(&range(1, 7, 3));
        assert_eq!((ledger.open_bytes(), ledger.oldest_write()), (3 * BLOCK_BYTES, None));
    }
}
