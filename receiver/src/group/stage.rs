//! The epoch that is arriving, invisible until it is sealed.
//!
//! What arrives is kept as a list, which is entered at the seal, in place and region by region: regions are copied only if
//! somebody looks at a snapshot. A list that is full (a first sync, an epoch of a bad hour) is entered into an index of its
//! own, which the seal merges: memory is bounded by the regions that the epoch touches and not by its frames, and
//! nothing of the committed index is held twice.

use proto::region::REGION_BLOCKS;
use proto::units::VolumeIndex;
use proto::{BlockExtent, BlockIndex, DirtyMap, FrameKind};

use crate::index::{FrameId, Index, Placed, VolumeIndexMap};

/// Entries kept as a list: 3 MiB of them.
const STAGED_ENTRIES_MAX: usize = 256 << 10;
/// Zeroes over more regions than this are looked at region by region, so that nothing is kept for those over nothing.
const ZERO_REGIONS_MAX: u64 = 64;

#[derive(Debug, Default)]
pub(crate) struct Stage {
    volumes: Vec<StagedVolume>,
    listed: usize,
}

#[derive(Debug, Default)]
struct StagedVolume {
    list: Vec<Placed>,
    /// What did not fit into the list.
    entered: Option<VolumeIndexMap>,
}

impl StagedVolume {
    fn spill(&mut self, committed: &VolumeIndexMap) -> &mut VolumeIndexMap {
        let entered = self.entered.get_or_insert_with(|| committed.blank());
        entered.enter(&mut self.list);
        entered
    }

    /// Zeroes without end over a base of zeroes: only regions that hold something have to know of them.
    fn add_zeroes(&mut self, committed: &VolumeIndexMap, extent: BlockExtent) {
        let entered = self.spill(committed);
        let (mut at, end, mut placed) = (extent.start.0, extent.end(), Vec::new());
        while at < end {
            let number = at / REGION_BLOCKS;
            let next = [committed.next_region(number), entered.next_region(number)].into_iter().flatten().min();
            let Some(next) = next else { break };
            at = at.max(next * REGION_BLOCKS);
            let stop = ((next + 1) * REGION_BLOCKS).min(end);
            if at < stop {
                let blocks = u32::try_from(stop - at).unwrap_or(u32::MAX);
                placed.extend(entered.cut(BlockExtent { start: BlockIndex(at), blocks }, FrameId::ZERO));
                entered.enter(&mut placed);
            }
            at = at.max(stop);
        }
    }
}

impl Stage {
    /// Adds a frame. `frame` is ignored for zero frames.
    pub(crate) fn add(
        &mut self,
        committed: &Index,
        (volume, kind, frame): (VolumeIndex, FrameKind, FrameId),
        extents: &[BlockExtent],
    ) {
        let number = usize::from(volume.0);
        let Some(map) = committed.volume(number) else { return };
        if self.volumes.len() <= number {
            self.volumes.resize_with(number + 1, StagedVolume::default);
        }
        let Some(staged) = self.volumes.get_mut(number) else { return };
        let frame = if kind == FrameKind::Zero { FrameId::ZERO } else { frame };
        for extent in extents {
            if kind == FrameKind::Zero && map.base_is_zero() && u64::from(extent.blocks) > ZERO_REGIONS_MAX * REGION_BLOCKS {
                self.listed -= staged.list.len();
                staged.add_zeroes(map, *extent);
                continue;
            }
            for placed in map.cut(*extent, frame) {
                if self.listed >= STAGED_ENTRIES_MAX {
                    self.listed -= staged.list.len();
                    staged.spill(map);
                }
                self.listed += 1;
                staged.list.push(placed);
            }
        }
    }

    /// Marks the blocks that the epoch changes, by volume. Zeroes over what is zeroes anyway are no change.
    pub(crate) fn mark(&self, changed: &mut [DirtyMap]) {
        for (staged, map) in self.volumes.iter().zip(changed) {
            if let Some(entered) = &staged.entered {
                entered.mark(map);
            }
            staged.list.iter().for_each(|placed| placed.mark(map));
        }
    }

    /// The epoch is committed.
    pub(crate) fn seal(&mut self, committed: &mut Index) {
        for (map, mut staged) in committed.volumes_mut().iter_mut().zip(self.volumes.drain(..)) {
            match staged.entered.take() {
                Some(mut entered) => {
                    entered.enter(&mut staged.list);
                    map.merge(entered);
                }
                None => map.enter(&mut staged.list),
            }
        }
        self.listed = 0;
    }

    /// The epoch never happened.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Place;

    fn extent(start: u64, blocks: u32) -> BlockExtent {
        BlockExtent { start: BlockIndex(start), blocks }
    }

    fn find(index: &Index, at: u64) -> Option<Place> {
        index.volume(0).map(|v| v.find(at, 1).0)
    }

    /// Small and large epochs end the same, and neither is seen before its seal.
    #[test]
    fn a_list_and_an_index_of_its_own_give_the_same_index() {
        let size = 4_u64 << 30;
        let mut committed = Index::new([size], false);
        for blocks in [10_u64, STAGED_ENTRIES_MAX as u64 + 100] {
            let mut stage = Stage::default();
            for i in 0..blocks {
                stage.add(&committed, (VolumeIndex(0), FrameKind::Data, FrameId(i as u32)), &[extent(i * 2, 1)]);
            }
            let last = (blocks - 1) * 2;
            assert_eq!(find(&committed, last), Some(Place::Base));
            stage.seal(&mut committed);
            for i in [0, 5, blocks - 1] {
                assert_eq!(find(&committed, i * 2), Some(Place::Frame(FrameId(i as u32))));
                assert_eq!(find(&committed, i * 2 + 1), Some(Place::Base));
            }
        }
    }

    /// Would catch a list that grows with the epoch, or that is spilled for a volume that has none of it.
    #[test]
    fn the_list_stays_within_its_limit() {
        let (mut committed, mut stage) = (Index::new([1 << 30; 2], true), Stage::default());
        for i in 0..3 * STAGED_ENTRIES_MAX as u64 {
            let volume = VolumeIndex(u16::from(i % 5 == 0));
            stage.add(&committed, (volume, FrameKind::Data, FrameId(i as u32)), &[extent(i * 7919 % (1 << 18), 1)]);
            assert!(stage.volumes.iter().map(|v| v.list.len()).sum::<usize>() == stage.listed);
            assert!(stage.listed <= STAGED_ENTRIES_MAX + 1);
        }
        stage.seal(&mut committed);
        assert_eq!(stage.listed, 0);
    }

    /// Would catch a peer that fills memory with zeroes over nothing (16 TiB are 4 million regions), and zeroes that are lost.
    #[test]
    fn zeroes_over_an_empty_base_cost_nothing() {
        let (mut committed, mut stage) = (Index::new([1 << 44], true), Stage::default());
        let zero = |from, blocks| ((VolumeIndex(0), FrameKind::Zero, FrameId(7)), [extent(from, blocks)]);
        let add =
            |stage: &mut Stage, committed: &Index, (what, extents): (_, [BlockExtent; 1])| stage.add(committed, what, &extents);
        add(&mut stage, &committed, zero(0, u32::MAX));
        add(&mut stage, &committed, zero(5_000_000, 10));
        stage.seal(&mut committed);
        assert_eq!(committed.memory_bytes(), 0);
        let data = (VolumeIndex(0), FrameKind::Data, FrameId(1));
        stage.add(&committed, data, &[extent(1_000_000, 2)]);
        add(&mut stage, &committed, zero(1_000_001, u32::MAX - 2_000_000));
        stage.add(&committed, data, &[extent(3_000_000, 1)]);
        stage.seal(&mut committed);
        assert_eq!(find(&committed, 1_000_000), Some(Place::Frame(FrameId(1))));
        assert_eq!(find(&committed, 1_000_001), Some(Place::Zero));
        assert_eq!(find(&committed, 3_000_000), Some(Place::Frame(FrameId(1))));
        add(&mut stage, &committed, zero(0, u32::MAX));
        stage.seal(&mut committed);
        for at in [1_000_000, 1_000_001, 3_000_000] {
            assert_eq!(find(&committed, at), Some(Place::Zero));
        }
        assert_eq!(find(&committed, 2_000_000), Some(Place::Base));
        assert!(committed.memory_bytes() < 200);
    }

    /// Whole regions of zeroes over a base that holds something share one entry.
    #[test]
    fn zeroes_over_a_full_base_are_all_known() {
        let (mut committed, mut stage) = (Index::new([1 << 34], false), Stage::default());
        stage.add(&committed, (VolumeIndex(0), FrameKind::Zero, FrameId::ZERO), &[extent(5, (1 << 22) - 10)]);
        stage.seal(&mut committed);
        for at in [5, 1023, 1024, 2_000_000, (1 << 22) - 6] {
            assert_eq!(find(&committed, at), Some(Place::Zero));
        }
        assert_eq!((find(&committed, 4), find(&committed, (1 << 22) - 5)), (Some(Place::Base), Some(Place::Base)));
    }
}
