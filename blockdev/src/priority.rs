//! Puts a thread behind all others: for work that nobody waits for.

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
