//! Locks on ranges of blocks, for read-modify-write.
//!
//! A lock is granted when no earlier request that conflicts is still there, waiting or granted: first come, first
//! served, so nobody starves. Shared locks do not conflict with each other (two aligned writes may land in
//! either order); an exclusive lock conflicts with everything that overlaps.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::Range;
use std::task::{Poll, Waker};

use parking_lot::Mutex;

#[derive(Debug, Default)]
pub struct RangeLocks {
    state: Mutex<State>,
}

// Bounded by the requests in flight, which the exports bound.
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
pub struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    id: u64,
}

impl RangeLocks {
    /// Waits for `range`.
    pub async fn lock(&self, range: Range<u64>, exclusive: bool) -> RangeGuard<'_> {
        // A guard from the start, so that a dropped future gives its place up.
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
    #[must_use]
    pub fn try_lock(&self, range: Range<u64>, exclusive: bool) -> Option<RangeGuard<'_>> {
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
            state
                .entries
                .range_mut(self.id..)
                .filter(|(_, later)| later.conflicts(&gone))
                .filter_map(|(_, later)| later.waker.take())
                .collect()
        };
        for waker in wakers {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::Context;

    fn ready<F: Future>(future: std::pin::Pin<&mut F>) -> Option<F::Output> {
        match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }

    #[test]
    fn exclusive_waits_for_overlap_only_and_in_order() {
        let locks = RangeLocks::default();
        let shared = ready(pin!(locks.lock(0..4, false))).expect("free");
        let mut writer = pin!(locks.lock(3..5, true));
        assert!(ready(writer.as_mut()).is_none(), "overlaps a shared lock");
        let mut late = pin!(locks.lock(4..6, false));
        assert!(ready(late.as_mut()).is_none(), "does not overtake the waiting exclusive lock");
        assert!(ready(pin!(locks.lock(6..9, true))).is_some(), "elsewhere nothing waits");
        drop(shared);
        let granted = ready(writer.as_mut()).expect("granted after release");
        assert!(ready(late.as_mut()).is_none());
        drop(granted);
        assert!(ready(late.as_mut()).is_some());
    }

    #[test]
    fn a_dropped_waiter_gives_its_place_up() {
        let locks = RangeLocks::default();
        let first = ready(pin!(locks.lock(0..1, true))).expect("free");
        {
            let mut second = pin!(locks.lock(0..1, true));
            assert!(ready(second.as_mut()).is_none());
        }
        drop(first);
        assert!(ready(pin!(locks.lock(0..1, true))).is_some());
        assert!(locks.state.lock().entries.is_empty());
    }

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
