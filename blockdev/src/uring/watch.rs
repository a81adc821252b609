//! Registers descriptors with the io thread's runtime.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

use super::ring::RingFd;

/// Watches a descriptor that the result owns.
pub(crate) fn watch_owned(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: `AsyncFd` owns the descriptor and deregisters it before it closes it; users keep the `AsyncFd` private and never
    // put another descriptor in its place.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// Watches this thread's ring.
pub(super) fn watch_ring(fd: RingFd) -> io::Result<AsyncFd<RingFd>> {
    // SAFETY: the ring is closed by `ring::uninstall`, which the thread calls after its tasks, and with them the
    // `AsyncFd`, are gone.
    Ok(unsafe { AsyncFd::register(fd) }?)
}
