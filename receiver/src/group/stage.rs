//! The epoch that is arriving, invisible until it is sealed.
//!
//! A small epoch is kept as a list and entered into the index at its seal, in place: regions are copied only if
//! somebody looks at a snapshot. A large one (a first sync) goes into a copy on write of the index as it comes, so
//! memory is bounded by the regions it touches and not by its frames.

use proto::units::VolumeIndex;
use proto::{BlockExtent, FrameKind};

use crate::index::{FrameId, Index};

/// Extents kept as a list: 1 MiB of them. An epoch with more goes into a copy of the index.
const STAGED_EXTENTS_MAX: usize = 64 << 10;

#[derive(Debug, Default)]
pub(super) struct Stage {
    frames: Vec<Frame>,
    extents: Vec<BlockExtent>,
    copy: Option<Index>,
}

#[derive(Debug)]
struct Frame {
    volume: VolumeIndex,
    kind: FrameKind,
    id: FrameId,
    extents: u16,
}

impl Stage {
    /// Adds a frame; `committed` gives the index to copy when the list is full.
    pub(super) fn add(
        &mut self,
        committed: impl FnOnce() -> Index,
        (volume, kind, id): (VolumeIndex, FrameKind, FrameId),
        extents: &[BlockExtent],
    ) {
        if self.copy.is_none() && self.extents.len() + extents.len() <= STAGED_EXTENTS_MAX {
            self.frames.push(Frame { volume, kind, id, extents: extents.len() as u16 });
            self.extents.extend_from_slice(extents);
            return;
        }
        let mut copy = self.copy.take().unwrap_or_else(committed);
        self.enter(&mut copy);
        copy.apply(volume, kind, extents, id);
        self.copy = Some(copy);
    }

    /// The epoch is committed.
    pub(super) fn seal(&mut self, committed: &mut Index) {
        match self.copy.take() {
            Some(copy) => *committed = copy,
            None => self.enter(committed),
        }
    }

    /// The epoch never happened.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    fn enter(&mut self, index: &mut Index) {
        let mut extents = self.extents.as_slice();
        for frame in &self.frames {
            let (now, later) = extents.split_at(usize::from(frame.extents));
            index.apply(frame.volume, frame.kind, now, frame.id);
            extents = later;
        }
        self.frames.clear();
        self.extents.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::BlockIndex;

    /// Small and large epochs end the same, and neither is seen before its seal.
    #[test]
    fn a_list_and_a_copy_give_the_same_index() {
        let size = 1_u64 << 30;
        let mut committed = Index::new([size], false);
        for blocks in [10_u64, STAGED_EXTENTS_MAX as u64 + 100] {
            let mut stage = Stage::default();
            for i in 0..blocks {
                let extent = BlockExtent { start: BlockIndex(i * 2), blocks: 1 };
                let base = committed.clone();
                stage.add(|| base, (VolumeIndex(0), FrameKind::Data, FrameId(i as u32)), &[extent]);
            }
            let find = |index: &Index, at| index.volume(0).map(|v| v.find(at, 1).0);
            let last = (blocks - 1) * 2;
            assert_eq!(find(&committed, last), Some(crate::index::Place::Base));
            stage.seal(&mut committed);
            for i in [0, 5, blocks - 1] {
                assert_eq!(find(&committed, i * 2), Some(crate::index::Place::Frame(FrameId(i as u32))));
                assert_eq!(find(&committed, i * 2 + 1), Some(crate::index::Place::Base));
            }
        }
    }
}
