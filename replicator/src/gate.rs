//! Whether guests may change a group's disks.
//!
//! What must always hold: once the gate is closed and no admitted write is in flight any more, nothing changes until it is opened. A write
//! therefore asks after it was admitted: one that was admitted before the gate was closed is waited for, a later one finds it closed.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// Why it is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Closed {
    /// The other site may write.
    Fenced = 1,
    /// The other site is about to take over.
    Drained = 2,
    /// The disks are being given back, or rolled back.
    Handback = 3,
    /// The node stops, and saves what it knows: a change that is made behind that would be forgotten. See [`Gate::stop`].
    Stopping = 4,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    why: AtomicU8,
    /// For good.
    stopping: AtomicBool,
}

impl Gate {
    pub(crate) fn close(&self, why: Closed) {
        self.why.store(why as u8, Ordering::SeqCst);
    }

    /// Closes it for good: the node stops.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    pub(crate) fn open(&self) {
        self.why.store(0, Ordering::SeqCst);
    }

    pub(crate) fn closed(&self) -> Option<Closed> {
        match self.why.load(Ordering::SeqCst) {
            _ if self.is_stopping() => Some(Closed::Stopping),
            0 => None,
            1 => Some(Closed::Fenced),
            2 => Some(Closed::Drained),
            _ => Some(Closed::Handback),
        }
    }

    /// As [`check`](Self::check); whoever comes while the node stops gets no answer. Its client connects again once the node is back, and repeats what was not answered.
    pub(crate) async fn pass(&self) -> io::Result<()> {
        if self.is_stopping() {
            std::future::pending::<()>().await;
        }
        self.check()
    }

    /// # Errors
    /// What a guest is told whose write may not be made.
    pub(crate) fn check(&self) -> io::Result<()> {
        let why = match self.closed() {
            None => return Ok(()),
            Some(Closed::Fenced) => "the group was failed over: only the other site may write",
            Some(Closed::Drained) => "the group is being switched over to the other site",
            Some(Closed::Handback) => "the disk is being given back by the other site",
            Some(Closed::Stopping) => "the node is stopping",
        };
        Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, why))
    }
}
