//! Both sites in one thread, with a virtual clock and one seed: the real cores, ledger, tap, dirty log, capture, comparison, journal and
//! superblock, on disks and a network that fail as is declared here.
//!
//! What is injected:
//! - guest (`guest`): writes, zeroes, flushes and reads that overlap and straddle, and rests; every order of their steps and of capture's;
//! - network (`link`): bytes that arrive in pieces of any size; delay, a rate, partitions that a connection outlives or not, connections that
//!   break at any time or after so many bytes, and connections that only the primary knows to be gone, whose bytes still arrive;
//! - processes: either killed, or its power lost with every unsynced sector kept or lost; a receiver killed at any change of its disk; clean
//!   stops; a promotion;
//! - in one seed of four (`world::life`) the whole life: promotions from any point, also while the primary lives, and with it writes at both sites;
//!   switchovers, failbacks and rollbacks, again and again, with all of the faults in between; a guest of the active copy, whose data a power loss
//!   takes as it takes the rest of the receiver's disk;
//! - the primary's disks (`disk`, `CrashDevice`, `FaultDevice`): reads that fail; writes that fail after a part of their data; a sync that
//!   fails, and with it all until the disk is opened again, with what it was to cover lost unless it is written again; for dirty logs
//!   also writes that fail, with and without their data; a spill file without space, or one that cannot be read back;
//! - the receiver's disk (`SimDisk`): a full disk, a failing sync;
//! - flipped bits (`world::rot`), in named places: at the primary a dirty log (header, bits, maps) and the newer sector of the record while it
//!   is down; at the receiver a journal's payload while it runs, and segment header, frame header, extent table, payload, seal and
//!   superblock slot while it is down.
//!
//! What is not: a byte that changes on its way (QUIC checks them); a receiver's disk that rots for good while it goes on (the bit flips back
//! before the next start; what a start makes of it is tried on a copy of the store); a guest's disk that, after a failed sync, goes on to
//! show what it lost across a restart of the primary. Nothing can know that one; `twinsite verify` finds it.
//!
//! What must survive: see `check`. An error for the guest is right only where an injected fault explains it. A failure names the seed
//! that replays it.

#![forbid(unsafe_code)]

mod active;
mod check;
mod disk;
mod guest;
mod link;
mod places;
mod plan;
mod world;

pub use plan::has_life;
pub use world::{Outcome, Violation, run, run_flapping, run_traced};

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
    /// What an old primary had written of its own is overwritten before it is kept.
    OverwriteBeforeKept,
    /// Guests of a primary that takes its disks back are let in before it was handed them.
    OpenGateEarly,
}

/// Breaks a rule in all simulations of this thread, or none.
pub fn break_rule(rule: Option<Broken>) {
    primary::sabotage(match rule {
        Some(Broken::ClearOnSend) => Some(primary::Sabotage::ClearOnSend),
        Some(Broken::SkipCopyBeforeWrite) => Some(primary::Sabotage::SkipCopyBeforeWrite),
        Some(Broken::SkipDirtyLog) => Some(primary::Sabotage::SkipDirtyLog),
        Some(Broken::AnswerFlushEarly) => Some(primary::Sabotage::AnswerFlushEarly),
        Some(Broken::OverwriteBeforeKept) => Some(primary::Sabotage::OverwriteBeforeKept),
        Some(Broken::OpenGateEarly) => Some(primary::Sabotage::OpenGateEarly),
        _ => None,
    });
    recovery::sabotage(match rule {
        Some(Broken::AcknowledgeBeforeSync) => Some(recovery::Sabotage::SkipSync),
        Some(Broken::AcceptOldGeneration) => Some(recovery::Sabotage::AcceptOldGeneration),
        _ => None,
    });
}
