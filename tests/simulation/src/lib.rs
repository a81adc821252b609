//! Both sites in one thread, with a virtual clock and one seed: the real cores, ledger, tap, dirty log, capture, comparison, journal and
//! superblock, on disks that lose what was not synced and a network that breaks.
//!
//! What is injected: guest writes, zeroes and flushes that overlap and straddle; every order of their steps and of capture's; bytes that
//! arrive in pieces of any size; connections that break; either process killed, or its power lost with every unsynced sector kept or lost;
//! a receiver killed at any change of its disk, a full disk, a failing sync; clean stops; a promotion.
//! What must survive: see `check`. A failure names the seed that replays it.

#![forbid(unsafe_code)]

mod check;
mod guest;
mod link;
mod world;

pub use world::{Outcome, Violation, run, run_traced};

use receiver::sim as recovery;
use replicator::sim as primary;

/// A rule that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// An epoch is acknowledged before it is synced.
    AcknowledgeBeforeSync,
    /// Marks are forgotten when an epoch is sent.
    ClearOnSend,
    /// A guest write overtakes the capture of what it overwrites.
    SkipCopyBeforeWrite,
    /// A write is issued although its region is not in the dirty log.
    SkipDirtyLog,
    /// A flush that is to wait for the receiver is answered by the local disk alone.
    AnswerFlushEarly,
    /// A primary of an old generation is let in.
    AcceptOldGeneration,
}

/// Breaks a rule in all simulations of this thread, or none.
pub fn break_rule(rule: Option<Broken>) {
    primary::sabotage(match rule {
        Some(Broken::ClearOnSend) => Some(primary::Sabotage::ClearOnSend),
        Some(Broken::SkipCopyBeforeWrite) => Some(primary::Sabotage::SkipCopyBeforeWrite),
        Some(Broken::SkipDirtyLog) => Some(primary::Sabotage::SkipDirtyLog),
        Some(Broken::AnswerFlushEarly) => Some(primary::Sabotage::AnswerFlushEarly),
        _ => None,
    });
    recovery::sabotage(match rule {
        Some(Broken::AcknowledgeBeforeSync) => Some(recovery::Sabotage::SkipSync),
        Some(Broken::AcceptOldGeneration) => Some(recovery::Sabotage::AcceptOldGeneration),
        _ => None,
    });
}
