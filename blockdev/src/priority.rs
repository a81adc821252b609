//! How long a thread is kept waiting for a processor, and which disk requests wait: guests come before what nobody waits for.

use std::io;

/// Niceness of such a thread.
const NICE: libc::c_int = 10;
/// `IOPRIO_WHO_PROCESS` and `IOPRIO_CLASS_IDLE << IOPRIO_CLASS_SHIFT` of `include/uapi/linux/ioprio.h`.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
const IOPRIO_IDLE: libc::c_int = 3 << 13;

/// Makes the calling thread nice, and its requests those that a disk serves when it has no others, as far as its scheduler
/// knows of such.
///
/// # Errors
/// The system's. The thread works as well, and less politely.
pub fn yield_to_others() -> io::Result<()> {
    // SAFETY: no memory is involved; 0 is the calling thread.
    let set = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_IDLE) };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What a thread that moves much asks of the scheduler: long turns, so that a thread which is woken comes before it. The kernel's most.
const LONG_SLICE_NS: u64 = 100_000_000;
/// What a thread that guests wait for asks of the scheduler: to be run soon after it is woken, for a short while. The kernel's least.
const SLICE_NS: u64 = 100_000;

/// `struct sched_attr` of `include/uapi/linux/sched/types.h`, in its first version.
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Makes the calling thread one that is run soon after it is woken, also while others take all processors: its slice of time becomes short,
/// its share stays what it is. Linux does so from 6.12 on; before, nothing changes. Needs no privilege.
///
/// # Errors
/// The system's. The thread works as well, and waits longer for a processor that is busy.
pub fn prefer_latency() -> io::Result<()> {
    set_slice(SLICE_NS)
}

/// Makes the calling thread one that whoever is woken comes before: its slice of time becomes long, its share stays what it is. See
/// [`prefer_latency`].
///
/// # Errors
/// The system's. The thread works as well, and others wait longer for its processor.
pub fn prefer_throughput() -> io::Result<()> {
    set_slice(LONG_SLICE_NS)
}

fn set_slice(slice_ns: u64) -> io::Result<()> {
    let size = size_of::<SchedAttr>() as u32;
    let mut attr = SchedAttr::default();
    // SAFETY: the kernel writes at most `size` bytes, which `attr` has; 0 is the calling thread.
    if unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    (attr.size, attr.runtime) = (size, slice_ns);
    // SAFETY: the kernel reads `attr.size` bytes, which `attr` has, and writes to that field at most.
    if unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw mut attr, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice_ns() -> (u64, i32) {
        let (size, mut attr) = (size_of::<SchedAttr>() as u32, SchedAttr::default());
        // SAFETY: as above.
        assert_eq!(unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) }, 0);
        (attr.runtime, attr.nice)
    }

    /// Would catch a structure that the kernel reads otherwise, and a niceness that is lost.
    #[test]
    fn a_thread_that_prefers_latency_keeps_its_niceness() {
        std::thread::spawn(|| {
            yield_to_others().unwrap();
            prefer_latency().unwrap();
            let (slice, nice) = slice_ns();
            // 0 where the kernel knows of no slices.
            assert!(slice == SLICE_NS || slice == 0, "{slice}");
            assert_eq!(nice, NICE);
            prefer_throughput().unwrap();
            let (slice, nice) = slice_ns();
            assert!(slice == LONG_SLICE_NS || slice == 0, "{slice}");
            assert_eq!(nice, NICE);
        })
        .join()
        .unwrap();
    }
}
