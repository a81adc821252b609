//! What a handback tells its user: what it would do, how far it is, why it does not go on.

use proto::{Generation, Name, Point};
use serde::{Deserialize, Serialize};

use super::DRAIN_DEADLINE;

/// What is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandbackTarget {
    /// What the activated copy has become.
    Failback,
    /// An earlier point.
    Rollback(Point),
}

impl HandbackTarget {
    /// The earlier point.
    pub(crate) fn point(self) -> Option<Point> {
        match self {
            Self::Failback => None,
            Self::Rollback(point) => Some(point),
        }
    }

    fn of(to: Option<Point>) -> String {
        to.map_or_else(|| "what the active copy had become".to_owned(), |point| format!("point {point}"))
    }
}

/// Why disks are not given back.
#[derive(Debug, thiserror::Error)]
pub enum HandbackError {
    /// The group has not been failed over, as far as is known here.
    #[error("group {group} is not fenced: nothing was failed over, and there is nothing to give back")]
    NotFenced {
        /// The group.
        group: Name,
    },
    /// It cannot be rolled back now.
    #[error(
        "group {group}: a rollback needs a copy that follows: wait until `twinsite status` says streaming; a group that is fenced has `twinsite failback` instead"
    )]
    NotStreaming {
        /// The group.
        group: Name,
    },
    /// One is under way.
    #[error("group {group} is being given back already: see `twinsite status {group}`")]
    Busy {
        /// The group.
        group: Name,
    },
    /// What was written last cannot be committed.
    #[error("group {group}: what was written last was not done, or not committed, within {} s: nothing was changed, try again", DRAIN_DEADLINE.as_secs())]
    NotDrained {
        /// The group.
        group: Name,
    },
    /// One that broke had come to its end, and went elsewhere.
    #[error("group {group}: the disks are at {}, where an earlier try had brought them: `twinsite status {group}`, then ask again", HandbackTarget::of(*at))]
    Elsewhere {
        /// The group.
        group: Name,
        /// The point that they went back to; `None`: what the active copy had become.
        at: Option<Point>,
    },
    /// The driver is gone.
    #[error("group {group}: the node is stopping")]
    Stopping {
        /// The group.
        group: Name,
    },
    /// What the receiver said.
    #[error("receiver: {0}")]
    Refused(String),
    /// Something went wrong on the way.
    #[error("group {group}: {reason}")]
    Failed {
        /// The group.
        group: Name,
        /// What, where, what to do.
        reason: String,
    },
}

/// What a handback would do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HandbackPlan {
    /// The group.
    pub group: Name,
    /// Generation that holds at the receiver; it is raised by one.
    pub generation: Generation,
    /// The point that the activated copy began from, or the one to go back to.
    pub from: Point,
    /// The receiver's newest point.
    pub newest: Point,
    /// Bytes of blocks that change here, known so far: what the active copy writes until the end comes on top.
    pub receive_bytes: u64,
    /// Bytes of blocks that were written here after the sites had parted. They are kept at the receiver as a fork before they are overwritten.
    pub own_bytes: u64,
}

impl HandbackPlan {
    /// Of one that the receiver has brought to its end already: nothing moves, and the generation is raised.
    pub(super) fn done(group: Name, target: HandbackTarget, point: Point, generation: Generation) -> Self {
        let before = Generation(generation.0.saturating_sub(1));
        Self { group, generation: before, from: target.point().unwrap_or(point), newest: point, receive_bytes: 0, own_bytes: 0 }
    }
}

/// How far a handback is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct HandbackStatus {
    /// Tells one from the next.
    pub number: u64,
    /// Whether it still runs.
    pub running: bool,
    /// What it is doing, in words.
    pub step: String,
    /// Bytes of blocks that are on the disks here.
    pub done_bytes: u64,
    /// Bytes of blocks that are known to come.
    pub total_bytes: u64,
    /// Bytes of frames that came over the line.
    pub received_bytes: u64,
    /// Bytes of frames of own blocks that were sent to be kept.
    pub sent_bytes: u64,
    /// The fork that keeps them.
    pub kept: Option<Name>,
    /// The point that both sites hold in the end.
    pub point: Option<Point>,
    /// Why it failed; one line.
    pub error: Option<String>,
    /// Milliseconds since it began, until it ended.
    pub elapsed_ms: u64,
}
