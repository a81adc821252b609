//! Locks on ranges of blocks, first come, first served.
//!
//! A copy-up replaces a whole block to change a part of it, so it must not run beside anything else that writes the
//! block; whole-block writes do not mind each other.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::Range;
use std::task::{Poll, Waker};

use parking_lot::Mutex;

#[derive(Debug, Default)]
pub(super) struct RangeLocks {
    state: Mutex<State>,
}

/// Bounded by the requests in flight, which the exports bound.
#[derive(Debug, Default)]
struct State {
    next: u64,
    entries: BTreeMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    range: Range<u64>,
    exclusive: bool,
    waker: Option<Waker>,
}

impl Entry {
    fn conflicts(&self, other: &Self) -> bool {
        (self.exclusive || other.exclusive) && self.range.start < other.range.end && other.range.start < self.range.end
    }
}

/// Held until dropped.
#[derive(Debug)]
pub(super) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    id: u64,
}

impl RangeLocks {
    /// Waits for `range`.
    pub(super) async fn lock(&self, range: Range<u64>, exclusive: bool) -> RangeGuard<'_> {
        let guard = self.enter(range, exclusive);
        poll_fn(|cx| {
            let mut state = self.state.lock();
            if state.granted(guard.id) {
                return Poll::Ready(());
            }
            if let Some(entry) = state.entries.get_mut(&guard.id) {
                entry.waker = Some(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
        guard
    }

    /// `range`, if nothing stands in the way.
    pub(super) fn try_lock(&self, range: Range<u64>, exclusive: bool) -> Option<RangeGuard<'_>> {
        let guard = self.enter(range, exclusive);
        let granted = self.state.lock().granted(guard.id);
        granted.then_some(guard)
    }

    fn enter(&self, range: Range<u64>, exclusive: bool) -> RangeGuard<'_> {
        let mut state = self.state.lock();
        let id = state.next;
        state.next += 1;
        state.entries.insert(id, Entry { range, exclusive, waker: None });
        RangeGuard { locks: self, id }
    }
}

impl State {
    fn granted(&self, id: u64) -> bool {
        let Some(own) = self.entries.get(&id) else { return true };
        !self.entries.range(..id).any(|(_, earlier)| earlier.conflicts(own))
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let wakers: Vec<Waker> = {
            let mut state = self.locks.state.lock();
            let Some(gone) = state.entries.remove(&self.id) else { return };
            let later = state.entries.range_mut(self.id..);
            later.filter(|(_, e)| e.conflicts(&gone)).filter_map(|(_, e)| e.waker.take()).collect()
        };
        for waker in wakers {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exclusive_stands_alone_and_shared_does_not() {
        let locks = RangeLocks::default();
        let shared = locks.try_lock(0..4, false).expect("free");
        assert!(locks.try_lock(2..3, false).is_some());
        assert!(locks.try_lock(3..5, true).is_none());
        assert!(locks.try_lock(4..5, true).is_some());
        drop(shared);
        assert!(locks.try_lock(3..5, true).is_some());
        assert!(locks.state.lock().entries.is_empty());
    }
}
