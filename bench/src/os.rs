//! The three things the standard library has no safe words for: a flag set by a signal, children that do not outlive us, and which
//! pages of a file are in memory.
//! The only file of this crate with `unsafe`.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_: libc::c_int) {
    STOP.store(true, Ordering::Relaxed);
}

/// Ctrl-c and SIGTERM set a flag that every wait looks at, so that everything is taken down in order.
pub(crate) fn install_stop_handler() -> Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let handler = on_signal as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        if unsafe { libc::signal(signal, handler) } == libc::SIG_ERR {
            bail!("cannot handle signal {signal}: {}", io::Error::last_os_error());
        }
    }
    Ok(())
}

/// An error once the user asked to stop.
pub(crate) fn check_stop() -> Result<()> {
    if STOP.load(Ordering::Relaxed) {
        bail!("stopped by a signal; processes and temporary files were removed");
    }
    Ok(())
}

/// Puts the child into a process group of its own (ctrl-c reaches only us, we end it in order) and has the kernel end it if we are
/// killed. A child that changes its user loses the latter.
pub(crate) fn bind_to_us(command: &mut Command) {
    command.process_group(0);
    // SAFETY: prctl is async-signal-safe and touches nothing of the parent's memory.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
}

/// Pages of the first `bytes` of `file` that are in the page cache, and pages in all. `bytes` is not 0. The kernel tells only who may
/// write the file or owns it.
pub(crate) fn resident_pages(file: &File, bytes: u64) -> io::Result<(u64, u64)> {
    let length = usize::try_from(bytes).map_err(io::Error::other)?;
    let mut pages = vec![0_u8; length.div_ceil(rustix::param::page_size())];
    // SAFETY: a new mapping at an address of the kernel's choice; nothing reads through it, so a file that shrinks does no harm.
    let at = unsafe { libc::mmap(ptr::null_mut(), length, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the range is the mapping just made, and `pages` has a byte for each of its pages.
    let told = match unsafe { libc::mincore(at, length, pages.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: the mapping made above; nobody else knows it.
    if unsafe { libc::munmap(at, length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    told?;
    let resident = pages.iter().filter(|page| **page & 1 != 0).count();
    Ok((resident as u64, pages.len() as u64))
}
