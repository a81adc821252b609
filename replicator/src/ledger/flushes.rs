//! Flushes of a guest that are answered only when the receiver has what they cover (`durability = "flush-sync"`).
//!
//! What must always hold: a flush is answered well only if every change acknowledged before it is in an epoch that the receiver has
//! committed. A flush takes the tag of its group after those changes were acknowledged, so theirs are at most its own. Of a committed
//! epoch whose cut ended tag `c`, every change with a tag up to `c` is committed, whatever way its mark took there: an epoch that was
//! given up returned its marks to the open map, and the cut that took them from there ended a later tag.
//!
//! Who waits here is bounded by the requests that the export takes at once.

use std::collections::VecDeque;
use std::time::Instant;

use proto::DirtyMap;
use tokio::sync::Notify;

use super::{Ledger, State};

/// Why a flush cannot be kept; the guest sees an I/O error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FlushRefused {
    /// The node stops, and the receiver did not commit in time.
    #[error("the node stops before the receiver has committed what the guest flushed")]
    Stopping,
    /// Nothing is committed from here any more.
    #[error("another side may write now: what the guest flushed cannot be committed at the receiver")]
    Fenced,
}

impl From<FlushRefused> for std::io::Error {
    fn from(refused: FlushRefused) -> Self {
        Self::other(refused)
    }
}

struct Waiting {
    id: u64,
    tag: u64,
    since: Instant,
}

/// The flushes of a group, under its ledger's lock.
#[derive(Default)]
pub(super) struct Flushes {
    /// In order of arrival; their tags never fall.
    waiting: VecDeque<Waiting>,
    next_id: u64,
    /// Every change with this tag or a lower one is committed.
    covered: u64,
    /// The receiver told what it has: a block in no map is as it is there.
    copy_known: bool,
    refused: Option<FlushRefused>,
    answered: u64,
}

impl Flushes {
    /// An epoch that ended with `tag` is committed.
    pub(super) fn covers(&mut self, tag: u64) {
        self.covered = self.covered.max(tag);
    }

    /// From here on the maps say all that differs from the copy.
    pub(super) fn copy_is_known(&mut self) {
        self.copy_known = true;
    }
}

/// Signals of waiting flushes.
#[derive(Default)]
pub(super) struct Signals {
    /// A flush waits for a cut. The driver is the only one to wait for it.
    wanted: Notify,
    /// What a flush waits for may have happened.
    changed: Notify,
}

/// How many flushes wait, and for how long.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FlushSummary {
    pub(crate) waiting: u64,
    pub(crate) oldest: Option<Instant>,
    pub(crate) answered: u64,
}

/// A flush that waits; dropping it ends that.
pub(crate) struct FlushTicket<'a> {
    ledger: &'a Ledger,
    id: u64,
    tag: u64,
}

impl Drop for FlushTicket<'_> {
    fn drop(&mut self) {
        self.ledger.state.lock().flushes.waiting.retain(|w| w.id != self.id);
    }
}

impl FlushTicket<'_> {
    /// Waits until all that was acknowledged before the flush began is committed at the receiver.
    ///
    /// # Errors
    /// [`FlushRefused`]: that may never be.
    pub(crate) async fn committed(&self) -> Result<(), FlushRefused> {
        let changed = &self.ledger.signals.changed;
        let notified = changed.notified();
        tokio::pin!(notified);
        loop {
            notified.as_mut().enable();
            {
                let mut state = self.ledger.state.lock();
                if state.flushes.covered >= self.tag || state.all_is_committed() {
                    state.flushes.answered += 1;
                    return Ok(());
                }
                if let Some(refused) = state.flushes.refused {
                    return Err(refused);
                }
            }
            notified.as_mut().await;
            notified.set(changed.notified());
        }
    }
}

impl State {
    /// Whether the receiver has every block as it is here.
    fn all_is_committed(&self) -> bool {
        let empty = |maps: &[DirtyMap]| maps.iter().all(DirtyMap::is_empty);
        self.flushes.copy_known && self.building.is_none() && self.sealed.is_empty() && empty(&self.open) && empty(&self.suspect)
    }
}

impl Ledger {
    /// Begins a flush: all that was acknowledged by now is what it covers. A cut that it needs is asked for at once.
    pub(crate) fn begin_flush(&self, now: Instant) -> FlushTicket<'_> {
        let mut state = self.state.lock();
        // Without a mark that is in no epoch yet, the newest cut has it all.
        let cut = state.open.iter().chain(&state.suspect).all(DirtyMap::is_empty);
        let tag = if cut { state.tag - 1 } else { state.tag };
        let flushes = &mut state.flushes;
        let tag = flushes.waiting.back().map_or(tag, |last| tag.max(last.tag));
        let id = flushes.next_id;
        flushes.next_id += 1;
        flushes.waiting.push_back(Waiting { id, tag, since: now });
        drop(state);
        self.signals.wanted.notify_one();
        FlushTicket { ledger: self, id, tag }
    }

    /// Resolves when a flush has begun since the last time.
    pub(crate) async fn flush_wanted(&self) {
        self.signals.wanted.notified().await;
    }

    /// Whether a flush waits that no epoch under way will answer.
    pub(crate) fn flush_wants_cut(&self) -> bool {
        let state = self.state.lock();
        let Some(last) = state.flushes.waiting.back() else { return false };
        let cut = state.building.iter().chain(state.sealed.back()).map(|changes| changes.tag).max();
        last.tag > state.flushes.covered.max(cut.unwrap_or(0))
    }

    /// What a flush waits for may have happened.
    pub(super) fn flushes_changed(&self) {
        self.signals.changed.notify_waiters();
    }

    /// Refuses all flushes that wait, and all that come, unless what they cover is committed.
    pub(crate) fn refuse_flushes(&self, why: FlushRefused) {
        self.state.lock().flushes.refused.get_or_insert(why);
        self.flushes_changed();
    }

    /// Flushes may wait for the receiver again.
    pub(crate) fn accept_flushes(&self) {
        self.state.lock().flushes.refused = None;
    }

    /// Figures for `status`.
    pub(crate) fn flushes(&self) -> FlushSummary {
        let state = self.state.lock();
        let flushes = &state.flushes;
        FlushSummary {
            waiting: flushes.waiting.len() as u64,
            oldest: flushes.waiting.iter().map(|w| w.since).min(),
            answered: flushes.answered,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use proto::{BLOCK_BYTES, BlockExtent, BlockIndex, EpochId, Generation, Point};

    use super::*;
    use crate::dirtylog::Known;
    use crate::ledger::{CopyLimits, Range};

    const SIZE: u64 = 100 * BLOCK_BYTES;

    fn ledger(known: Known) -> Ledger {
        let limits = CopyLimits { memory_bytes: 1 << 20, spill_bytes: 1 << 20 };
        Ledger::new(vec![SIZE], limits, vec![known])
    }

    fn clean() -> Ledger {
        let ledger = ledger(Known { suspect: DirtyMap::new(SIZE), dirty: DirtyMap::new(SIZE) });
        committed(&ledger, 1);
        ledger
    }

    fn write(ledger: &Ledger, block: u64) {
        drop(ledger.admit(Range { volume: 0, first: block, count: 1 }, Instant::now));
    }

    fn committed(ledger: &Ledger, epoch: u64) {
        ledger.committed(Point { generation: Generation(1), epoch: EpochId(epoch) });
    }

    /// Cuts and captures an epoch; it waits for its commit.
    fn epoch(ledger: &Ledger, epoch: u64) {
        ledger.freeze(EpochId(epoch));
        ledger.claim_captured(0, &[BlockExtent { start: BlockIndex(0), blocks: 100 }], |_| {});
        assert!(matches!(poll(ledger.thaw()), Poll::Ready(Ok(_))));
        ledger.seal(EpochId(epoch));
    }

    fn poll<T>(future: impl Future<Output = T>) -> Poll<T> {
        pin!(future).poll(&mut Context::from_waker(Waker::noop()))
    }

    fn answered(ticket: &FlushTicket<'_>) -> bool {
        poll(ticket.committed()) == Poll::Ready(Ok(()))
    }

    #[test]
    fn a_flush_waits_for_the_epoch_that_holds_what_it_covers() {
        let ledger = clean();
        write(&ledger, 1);
        epoch(&ledger, 2);
        write(&ledger, 2);
        let flush = ledger.begin_flush(Instant::now());
        assert!(ledger.flush_wants_cut() && !answered(&flush));
        committed(&ledger, 2);
        assert!(!answered(&flush), "the epoch before has an older cut");
        epoch(&ledger, 3);
        assert!(!ledger.flush_wants_cut(), "its epoch is under way");
        assert!(!answered(&flush), "sent is not committed");
        write(&ledger, 3);
        committed(&ledger, 3);
        assert!(answered(&flush), "later writes are not waited for");
        drop(flush);
        assert_eq!(ledger.flushes().waiting, 0);
    }

    #[test]
    fn without_a_change_a_flush_asks_for_no_cut() {
        let ledger = clean();
        assert!(answered(&ledger.begin_flush(Instant::now())));
        write(&ledger, 1);
        epoch(&ledger, 2);
        let flush = ledger.begin_flush(Instant::now());
        assert!(!ledger.flush_wants_cut() && !answered(&flush), "it waits for the epoch in flight");
        committed(&ledger, 2);
        assert!(answered(&flush));
    }

    /// Catches a flush that is answered by the number of an epoch whose content went into another.
    #[test]
    fn a_merged_epoch_hands_its_flushes_on() {
        let ledger = clean();
        write(&ledger, 1);
        epoch(&ledger, 2);
        write(&ledger, 2);
        epoch(&ledger, 3);
        let flush = ledger.begin_flush(Instant::now());
        // The session ends; the receiver has epoch 2 and not 3.
        committed(&ledger, 2);
        assert_eq!(ledger.merge_sealed(), 1);
        assert!(!answered(&flush) && ledger.flush_wants_cut());
        // A freeze that is given up is no cut either.
        ledger.freeze(EpochId(3));
        assert!(ledger.give_up_building());
        assert!(ledger.flush_wants_cut());
        epoch(&ledger, 3);
        assert!(!answered(&flush));
        committed(&ledger, 3);
        assert!(answered(&flush));
    }

    #[test]
    fn what_is_suspect_must_be_compared_and_committed_first() {
        let mut suspect = DirtyMap::new(SIZE);
        suspect.mark(3, 2);
        let ledger = ledger(Known { suspect, dirty: DirtyMap::new(SIZE) });
        let flush = ledger.begin_flush(Instant::now());
        assert!(!answered(&flush), "nobody has talked to the receiver yet");
        committed(&ledger, 7);
        assert!(!answered(&flush), "the copy may differ");
        ledger.settle(0, &[BlockExtent { start: BlockIndex(3), blocks: 1 }], false);
        assert!(!answered(&flush), "one block is left");
        ledger.settle(0, &[BlockExtent { start: BlockIndex(4), blocks: 1 }], true);
        assert!(!answered(&flush) && ledger.flush_wants_cut(), "it differs");
        epoch(&ledger, 8);
        committed(&ledger, 8);
        assert!(answered(&flush));
        ledger.suspect_all();
        let flush = ledger.begin_flush(Instant::now());
        assert!(!answered(&flush), "what the old history had, this one need not have");
        ledger.settle(0, &[BlockExtent { start: BlockIndex(0), blocks: 100 }], false);
        assert!(answered(&flush), "compared, and nothing differs");
    }

    #[test]
    fn a_node_that_stops_refuses_what_is_not_committed() {
        let ledger = clean();
        write(&ledger, 1);
        let flush = ledger.begin_flush(Instant::now());
        ledger.refuse_flushes(FlushRefused::Stopping);
        ledger.refuse_flushes(FlushRefused::Fenced);
        assert_eq!(poll(flush.committed()), Poll::Ready(Err(FlushRefused::Stopping)));
        epoch(&ledger, 2);
        committed(&ledger, 2);
        assert!(answered(&flush), "what is committed after all is no lie");
    }
}
