//! An exchange of all disks at once, as one write of all blocks in which they differ.
//!
//! To every epoch it is a single write: it carries one tag, so no cut falls within it. The blocks that a frozen epoch still needs are not read
//! before it: the disks that go do not change any more, so they are kept until capture has read those blocks there.

use std::sync::Arc;
use std::time::Instant;

use blockdev::BlockDevice;
use proto::{BlockExtent, BlockIndex, DirtyMap};

use super::{COPY_STEP_BLOCKS, CopiedRun, Copy, Ledger, Ticket};

impl Ledger {
    /// Counts one change of all blocks of `maps`, by volume, in flight, and marks them. Holds admission up for as long as merging takes:
    /// while disks are exchanged nobody writes to them.
    pub(crate) fn admit_all(&self, maps: &[DirtyMap], now: impl FnOnce() -> Instant) -> Ticket<'_> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let tag = state.count_in_flight(None);
        for (volume, (open, map)) in state.open.iter_mut().zip(maps).enumerate() {
            open.merge(map);
            state.watches.mark_all(volume, map);
        }
        if maps.iter().any(|map| !map.is_empty()) {
            state.open_first_write.get_or_insert_with(now);
        }
        Ticket { ledger: self, volume: None, tag }
    }

    /// Sees to it that a frozen epoch loses nothing by an exchange that was admitted: what it still needs of `maps` it will read from `before`,
    /// the disks as they are now, which do not change any more. Returns whether the exchange may be made; if not, [`Ledger::changed`] tells
    /// when to ask again.
    pub(crate) fn leave_behind(&self, ticket: &Ticket<'_>, maps: &[DirtyMap], before: &[Arc<dyn BlockDevice>]) -> bool {
        let state = &mut *self.state.lock();
        let Some(frozen) = state.frozen.as_mut().filter(|f| f.tag < ticket.tag && f.failed.is_none()) else { return true };
        // A guest's write reads the old content through the very disk that is to be exchanged.
        if !frozen.copying.is_empty() {
            return false;
        }
        for (volume, ((left, map), before)) in frozen.left.iter_mut().zip(maps).zip(before).enumerate() {
            let mut at = 0;
            while let Some(needed) = left.next_run(at, u32::MAX)
                && let Some(changed) = map.next_run(needed.start.0, u32::MAX)
            {
                let (start, end) = (needed.start.0.max(changed.start.0), needed.end().min(changed.end()));
                if start >= end {
                    at = changed.start.0;
                    continue;
                }
                let blocks = (end - start).min(COPY_STEP_BLOCKS);
                left.clear(start, blocks);
                let extent = BlockExtent { start: BlockIndex(start), blocks: blocks as u32 };
                frozen.copied.push(CopiedRun { volume, extent, content: Copy::Before(before.clone()) });
                state.copied_before_write += blocks;
                at = start + blocks;
            }
        }
        true
    }
}
