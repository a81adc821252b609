//! The recovery site in one thread, on a disk that loses what was not synced.
//!
//! For tests and for the simulator of both sites: [`Replica`] drives the real core, assembler, worker, journal and superblock
//! through bytes as on the wire; [`SimDisk`] is the disk under it, whose fault model is in `model`. No runtime, no threads, and no
//! clock that anything depends on: the same calls and choices give the same files, up to times of day in headers.
//! Not part of the daemon: behind the feature `simulation`, which is off.

#[cfg(test)]
mod base;
mod disk;
#[cfg(test)]
mod folding;
mod handback;
#[cfg(test)]
mod lives;
mod model;
#[cfg(test)]
mod primary;
mod replica;
mod session;
#[cfg(test)]
mod sweep;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod thinning;

pub use disk::SimDisk;
pub use handback::KeptFork;
pub use replica::{ActiveCopy, Output, Replica, ReplicaError, SessionNo, StreamNo};

use std::cell::Cell;

/// A rule that the simulator breaks on purpose, to see that it notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// An epoch is acknowledged before it is synced.
    SkipSync,
    /// A primary of an old generation is let in.
    AcceptOldGeneration,
    /// A fold overwrites the base before it says so.
    SilentFold,
}

thread_local! {
    static SABOTAGE: Cell<Option<Sabotage>> = const { Cell::new(None) };
}

/// Breaks a rule in all replicas of this thread, or none.
pub fn sabotage(rule: Option<Sabotage>) {
    SABOTAGE.set(rule);
}

pub(crate) fn is_sabotaged(rule: Sabotage) -> bool {
    SABOTAGE.get() == Some(rule)
}
