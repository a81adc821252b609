//! The two things the standard library has no safe words for: a flag set by a signal, and children that do not outlive us.
//! The only file of this crate with `unsafe`.

#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
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
