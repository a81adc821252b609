//! Decides whether a buffered write may be made on the io thread itself.
//!
//! ext4 refuses `RWF_NOWAIT` for buffered writes, so the kernel cannot be asked for "only if it needs no waiting", and io_uring
//! hands every buffered write to a worker thread: two context switches that cost more than the write.
//! A plain `pwrite` of a few pages into the page cache takes microseconds, except when the kernel makes the writer wait:
//! dirty throttling (`balance_dirty_pages`, up to 200 ms at a time), a journal commit, a full disk queue.
//!
//! So the write is made inline and timed. One that took longer than [`STALL`] closes the gate for [`BACKOFF_FACTOR`]
//! times as long as it took: in that time writes go through io_uring, whose workers wait instead of the io thread.
//! The io thread thus loses at most one part in `BACKOFF_FACTOR` of its time to stalls of up to 100 ms. In a longer one a write that a worker makes
//! meanwhile waits too, and as long as one of them has not ended the gate stays closed: the disk of one guest must not stop all that share
//! its io thread. A write that was long because others had the processor did not wait for the disk: the way through a worker would only cost it
//! more.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::waits;

/// An inline write slower than this waited for something.
const STALL: Duration = Duration::from_millis(2);
/// How much longer than the stall the gate stays closed.
const BACKOFF_FACTOR: u32 = 20;
/// The longest time that the gate stays closed behind the end of a stall.
const BACKOFF_MAX: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct InlineGate {
    epoch: Instant,
    /// Nanoseconds since `epoch` until which writes are not made inline; zero when open.
    closed_until_ns: AtomicU64,
    /// Writes under way that began in such a time.
    beside: AtomicU32,
}

/// A write that is not made inline.
#[derive(Debug)]
pub(super) struct Beside<'a>(Option<&'a InlineGate>);

impl Drop for Beside<'_> {
    fn drop(&mut self) {
        if let Some(gate) = self.0 {
            gate.beside.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl InlineGate {
    pub(super) fn new() -> Self {
        Self { epoch: Instant::now(), closed_until_ns: AtomicU64::new(0), beside: AtomicU32::new(0) }
    }

    pub(super) fn is_open(&self) -> bool {
        let until = self.closed_until_ns.load(Ordering::Relaxed);
        if until == 0 {
            return true;
        }
        let open = self.now_ns() >= until && self.beside.load(Ordering::Relaxed) == 0;
        if open {
            self.closed_until_ns.store(0, Ordering::Relaxed);
        }
        open
    }

    /// A write begins that is not made inline. Only those of the closed time keep the gate closed: under a load that never pauses it would not open
    /// again otherwise.
    pub(super) fn beside(&self) -> Beside<'_> {
        let is_stall = self.now_ns() < self.closed_until_ns.load(Ordering::Relaxed);
        if is_stall {
            self.beside.fetch_add(1, Ordering::Relaxed);
        }
        Beside(is_stall.then_some(self))
    }

    /// Runs `write` and closes the gate if it stalled.
    pub(super) fn timed<T>(&self, write: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = write();
        let took = start.elapsed();
        if took > STALL && waits::waited() {
            self.close(took);
        }
        result
    }

    fn close(&self, took: Duration) {
        let closed = (took * BACKOFF_FACTOR).min(BACKOFF_MAX);
        let until = self.now_ns().saturating_add(nanoseconds(closed));
        self.closed_until_ns.fetch_max(until, Ordering::Relaxed);
    }

    fn now_ns(&self) -> u64 {
        nanoseconds(self.epoch.elapsed())
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_closes_the_gate_and_a_quick_write_does_not() {
        let gate = InlineGate::new();
        crate::waits::note();
        gate.timed(|| ());
        assert!(gate.is_open());
        let begun = Instant::now();
        gate.timed(|| while begun.elapsed() < STALL * 2 {});
        assert!(gate.is_open(), "slow, but it waited for nothing");
        gate.timed(|| std::thread::sleep(STALL * 2));
        assert!(!gate.is_open(), "closed after a stall");
        gate.close(Duration::from_secs(3600));
        assert!(!gate.is_open(), "closed after a stall");
        let until = gate.closed_until_ns.load(Ordering::Relaxed);
        assert!(until <= gate.now_ns() + nanoseconds(BACKOFF_MAX), "and never for longer than the bound");
        let beside = gate.beside();
        gate.closed_until_ns.store(1, Ordering::Relaxed);
        let later = gate.beside();
        assert!(!gate.is_open(), "a write of the closed time has not ended: the stall goes on");
        drop(beside);
        assert!(gate.is_open(), "opens when the time is over");
        drop(later);
        assert_eq!(gate.beside.load(Ordering::Relaxed), 0);
    }
}
