//! Time in which the machine itself did not run.
//!
//! A bound on what one of our processes takes is about what it does, not about a virtual machine that gets no processor for a second. On
//! each processor a thread does nothing but sleep for a few milliseconds; when it wakes far later than that, nothing there could do anything.
//! Who measures takes these times out, and keeps the bound. A process that is busy hides nothing with it: it lets a thread that has slept run
//! within two ticks of the scheduler, and these are no stall (tests/relay/src/tests.rs holds that against busy processors).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::thread::CpuSet;

const SLEEP: Duration = Duration::from_millis(2);
/// What may be late on a machine that runs: two ticks of 4 ms, and what a timer needs.
const LATE: Duration = Duration::from_millis(10);

type Intervals = Arc<Mutex<Vec<(Instant, Instant)>>>;

/// Watches from [`start`](Self::start) until it is dropped.
#[derive(Debug)]
pub(crate) struct Stalls {
    seen: Intervals,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Stalls {
    pub(crate) fn start() -> Self {
        let (seen, stop) = (Intervals::default(), Arc::new(AtomicBool::new(false)));
        let ours = rustix::thread::sched_getaffinity(None).expect("the processors of this process");
        let processors = (0..CpuSet::MAX_CPU).filter(|processor| ours.is_set(*processor));
        let threads = processors.map(|processor| {
            let (seen, stop) = (Arc::clone(&seen), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut only = CpuSet::new();
                only.set(processor);
                rustix::thread::sched_setaffinity(None, &only).expect("a processor of this process");
                // Before all others, where this is root's; without it the scheduler is fair to it, too.
                let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), -20);
                while !stop.load(Ordering::SeqCst) {
                    let due = Instant::now() + SLEEP;
                    std::thread::sleep(SLEEP);
                    let now = Instant::now();
                    if now > due + LATE {
                        seen.lock().expect("no panic").push((due, now));
                    }
                }
            })
        });
        let threads = threads.collect();
        Self { seen, stop, threads }
    }

    /// Of stalls that are given, from when to when.
    pub(crate) fn of(seen: Vec<(Instant, Instant)>) -> Self {
        Self { seen: Arc::new(Mutex::new(seen)), stop: Arc::default(), threads: Vec::new() }
    }

    /// How long the machine, or one of its processors, did not run between the two.
    pub(crate) fn between(&self, from: Instant, to: Instant) -> Duration {
        // One that is under way is known when it is over.
        std::thread::sleep(SLEEP + LATE);
        let mut within: Vec<_> = self.seen.lock().expect("no panic").clone();
        within.sort_unstable();
        let (mut total, mut counted) = (Duration::ZERO, from);
        for (begun, ended) in within {
            let (begun, ended) = (begun.max(counted), ended.min(to));
            total += ended.saturating_duration_since(begun);
            counted = counted.max(ended);
        }
        total
    }

    /// Time since then in which the machine ran.
    pub(crate) fn ran_since(&self, from: Instant) -> Duration {
        let now = Instant::now();
        (now - from).saturating_sub(self.between(from, now))
    }

    /// [`super::eventually`], with the time in which the machine ran.
    #[track_caller]
    pub(crate) fn eventually<T>(&self, what: &str, within: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
        let from = Instant::now();
        loop {
            if let Some(answer) = ask() {
                return answer;
            }
            let over = from.elapsed() >= within && self.ran_since(from) >= within;
            assert!(!over, "{what}: not within {within:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Stalls {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            // It does not panic.
            let _ = thread.join();
        }
    }
}
