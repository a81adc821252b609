//! What a simulated primary is made of, what it does to the world, and what of it outlives the process.

use std::sync::Arc;
use std::time::Duration;

use blockdev::BlockDevice;
use proto::{Generation, Name, Point, SessionToken};

use super::HandbackEnd;
use crate::record::Recorded;
use crate::spec::Durability;

/// What survives the process besides disks and logs: `group.record`, with its two sectors.
#[derive(Clone, Debug, Default)]
pub struct DurableRecord {
    pub(super) newest: Recorded,
    older: Recorded,
}

impl DurableRecord {
    pub(super) fn change(&mut self, change: impl FnOnce(&mut Recorded)) {
        let mut changed = self.newest.clone();
        change(&mut changed);
        if !changed.agrees_with(&self.newest) {
            (self.newest, self.older) = (changed.clone(), changed);
        } else if changed != self.newest {
            self.older = std::mem::replace(&mut self.newest, changed);
        }
    }

    /// Whether guests may not write here, as far as is recorded.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.newest.stopped.is_some()
    }

    /// The generation that is recorded.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.newest.generation
    }

    /// A bit of the newer sector rots: what the next start reads is the older one.
    pub fn rot(&mut self) {
        self.newest = self.older.clone();
    }
}

/// A group.
#[derive(Clone, Debug)]
pub struct PrimaryConfig {
    /// Its name.
    pub group: Name,
    /// Names of its volumes, in the order of the disks.
    pub volumes: Vec<Name>,
    /// Time between cuts.
    pub interval: Duration,
    /// See `Tuning`.
    pub freeze_budget_bytes: u64,
    /// See `Tuning`.
    pub spill_limit_bytes: u64,
    /// See `Tuning`.
    pub epochs_in_flight: u16,
    /// See `Tuning`.
    pub durability: Durability,
}

/// The disks of a group.
#[derive(Clone)]
pub struct Disks {
    /// Guest disks.
    pub volumes: Vec<Arc<dyn BlockDevice>>,
    /// Their dirty logs, [`dirty_log_bytes`] long.
    pub logs: Vec<Arc<dyn BlockDevice>>,
    /// The spill file, at least `spill_limit_bytes` long.
    pub spill: Arc<dyn BlockDevice>,
}

/// What a primary does to the world.
#[derive(Debug)]
pub enum Output {
    /// It wants a connection.
    Connect,
    /// Bytes of its control stream.
    Control(Vec<u8>),
    /// It opens the next pass stream.
    PassOpen,
    /// Bytes of the pass stream that was opened last.
    PassData(Vec<u8>),
    /// That stream is complete.
    PassEnd,
    /// It drops the connection.
    Disconnect,
    /// It sealed an epoch: the image of writes that were admitted with `tag` or a lower one.
    Sealed {
        /// The point that the epoch would make.
        point: Point,
        /// The session.
        session: SessionToken,
        /// See [`Primary::tag`].
        tag: u64,
    },
    /// It heard that this is committed.
    Committed(Point),
    /// From here on the disks are in between: their blocks are overwritten once what differs from this point is `kept`.
    InBetween {
        /// The receiver's newest point.
        newest: Point,
        /// What was written here of its own is kept there, or there is nothing.
        kept: bool,
    },
    /// Both sites hold this point, and guests may write here, in this generation: that is recorded.
    Handed {
        /// The point.
        point: Point,
        /// The generation.
        generation: Generation,
    },
    /// A handback is over.
    HandedBack(HandbackEnd),
    /// It ended the session by itself, because of this; for a trace.
    Trouble(String),
}
