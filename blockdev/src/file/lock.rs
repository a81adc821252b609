//! Keeps two processes from using one image.
//!
//! An open-file-description lock on the whole file, exclusive for writing and shared for reading. It conflicts with the locks that
//! QEMU and libvirt take on images, so a guest cannot be started on an image that is exported, nor the other
//! way round. The kernel drops it when the descriptor is closed, also after SIGKILL.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Takes the lock without waiting. `Ok(false)` when somebody else holds a conflicting one.
pub(super) fn try_lock(file: &File, exclusive: bool) -> io::Result<bool> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    let lock =
        libc::flock { l_type: kind as libc::c_short, l_whence: libc::SEEK_SET as libc::c_short, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the descriptor is open for the duration of the call and `lock` is a valid `struct flock`.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}
