//! Exchanges all disks of a group below its taps at once: for who shows another image in their place.
//!
//! What must always hold: to every epoch an exchange is one write of all blocks in which the images differ. So each epoch has the whole image of
//! before or the whole image of after, blocks that an epoch under way needs are taken from the image of before, and a crash at any
//! moment leaves the regions that differ in the dirty log.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use blockdev::{BlockDevice, IoThreads};
use proto::{DirtyMap, Name};

use crate::dirtylog::DirtyLog;
use crate::gate::{Closed, Gate};
use crate::ledger::Ledger;
use crate::shared::Shared;

#[cfg(test)]
mod tests;

/// Why disks are not exchanged. One line each.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The other site is about to take over, or disks are being given back.
    #[error("group {group} holds still: {why}")]
    Held {
        /// The group.
        group: Name,
        /// What for.
        why: &'static str,
    },
    /// The regions that differ are not in the dirty log.
    #[error("{source}")]
    DirtyLog {
        /// Which file, and why.
        source: io::Error,
    },
    /// Whoever asked could not make it.
    #[error("{source}")]
    Make {
        /// Its reason.
        source: io::Error,
    },
    /// The group is being stopped.
    #[error("group {group} is being stopped")]
    Stopping {
        /// The group.
        group: Name,
    },
}

/// What is to be exchanged.
pub struct Exchange {
    /// The blocks in which the images may differ, by volume.
    pub differing: Vec<DirtyMap>,
    /// The disks as they are, by volume. They do not change from here on, and stay readable.
    pub before: Vec<Arc<dyn BlockDevice>>,
    /// The instant of the new image, microseconds since 1970; `None`: it is being written, so that of each cut.
    pub as_of_unix_us: Option<u64>,
    /// Also if the group holds still. Its guests stay held up.
    pub in_any_case: bool,
    /// Makes the exchange, and whatever has to be durable before it. May wait for a small file's sync.
    pub make: Box<dyn FnOnce() -> io::Result<()> + Send>,
}

/// Exchanges the disks of one group. One exchange at a time.
#[derive(Clone)]
pub struct Exchanger {
    pub(crate) shared: Arc<Shared>,
    pub(crate) capture: IoThreads,
    pub(crate) one: Arc<tokio::sync::Mutex<()>>,
}

impl Exchanger {
    /// Says of which instant the disks are, as in [`Exchange::as_of_unix_us`]; for the start, before there was an exchange.
    pub fn as_of(&self, unix_us: Option<u64>) {
        self.shared.as_of_unix_us.store(unix_us.unwrap_or(0), Ordering::SeqCst);
    }

    /// Whether an exchange would be refused now.
    #[must_use]
    pub fn holds_still(&self) -> bool {
        Parts::of(&self.shared).check(false).is_err()
    }

    /// Makes an exchange; when this returns, everybody sees the new image.
    ///
    /// # Errors
    /// [`ExchangeError`]; then everybody sees the old one, and what differs counts as changed.
    pub async fn exchange(&self, exchange: Exchange) -> Result<(), ExchangeError> {
        let _one = self.one.lock().await;
        let shared = self.shared.clone();
        let made = self.capture.call(move || async move { Parts::of(&shared).make(exchange).await });
        made.await.unwrap_or_else(|_| Err(ExchangeError::Stopping { group: self.shared.group.clone() }))
    }
}

/// What an exchange needs of its group.
struct Parts<'a> {
    group: &'a Name,
    ledger: &'a Ledger,
    log: &'a DirtyLog,
    gate: &'a Gate,
    as_of_unix_us: &'a AtomicU64,
}

impl<'a> Parts<'a> {
    fn of(shared: &'a Shared) -> Self {
        let Shared { group, ledger, log, gate, as_of_unix_us, .. } = shared;
        Self { group, ledger, log, gate, as_of_unix_us }
    }

    /// The order is that of a guest's write: marks, dirty log, what an epoch still needs, and then the change itself.
    async fn make(&self, exchange: Exchange) -> Result<(), ExchangeError> {
        let Exchange { differing, before, as_of_unix_us, in_any_case, make } = exchange;
        self.check(in_any_case)?;
        let ticket = self.ledger.admit_all(&differing, Instant::now);
        self.log.cover_maps(&differing).await.map_err(|source| ExchangeError::DirtyLog { source })?;
        loop {
            let changed = self.ledger.changed().notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.ledger.leave_behind(&ticket, &differing, &before) {
                break;
            }
            changed.await;
        }
        // Once it is admitted, as for a write: who closes the gate waits for those that were admitted before.
        self.check(in_any_case)?;
        make().map_err(|source| ExchangeError::Make { source })?;
        // After the exchange and before the ticket is gone: a cut in between says that its epoch is older than it is.
        self.as_of_unix_us.store(as_of_unix_us.unwrap_or(0), Ordering::SeqCst);
        drop(ticket);
        Ok(())
    }

    /// A fenced group goes on: nothing is replicated from here, and what differs is only marked.
    fn check(&self, in_any_case: bool) -> Result<(), ExchangeError> {
        let why = match self.gate.closed() {
            Some(Closed::Drained) => "the other site is about to take over",
            Some(Closed::Handback) => "its disks are being given back",
            Some(Closed::Stopping) => "the node is stopping",
            None | Some(Closed::Fenced) => return Ok(()),
        };
        if in_any_case { Ok(()) } else { Err(ExchangeError::Held { group: self.group.clone(), why }) }
    }
}
