//! Tells a thread that waited in the kernel from one that was merely preempted, which a clock alone cannot.
//!
//! The kernel counts a thread's voluntary switches: it gave the processor up because it had to wait. An io thread notes the count
//! when it wakes; whoever finds a call slow asks whether the count has moved since.

use std::cell::Cell;

thread_local! {
    static NOTED: Cell<i64> = const { Cell::new(0) };
}

/// Notes where this thread stands. Called each time an io thread has slept.
pub(crate) fn note() {
    NOTED.set(voluntary_switches());
}

/// Whether this thread has waited since it was last noted, or asked. On a thread that was never noted: yes, if it ever did.
pub(crate) fn waited() -> bool {
    let now = voluntary_switches();
    NOTED.replace(now) != now
}

/// Voluntary context switches of this thread since it began (getrusage(2), `RUSAGE_THREAD`).
fn voluntary_switches() -> i64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the pointer is to memory of the right size and alignment, which the call fills; all-zero is a valid value too.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init()
    };
    usage.ru_nvcsw
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn sleeping_is_waiting_and_working_is_not() {
        std::thread::spawn(|| {
            note();
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(20) {
                std::hint::spin_loop();
            }
            assert!(!waited(), "kept busy, and preempted at most");
            std::thread::sleep(Duration::from_millis(1));
            assert!(waited());
            assert!(!waited(), "told once");
        })
        .join()
        .unwrap();
    }
}
