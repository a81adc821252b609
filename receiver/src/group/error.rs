//! What can go wrong with a group, each with what to do about it.

use proto::{Name, Point};

use crate::journal::JournalError;
use crate::names::NameError;
use crate::superblock::SuperblockError;

/// Why a group cannot be opened, read or changed.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// Its superblock.
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    /// Its journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Its thread.
    #[error("cannot start the thread of group '{group}': {source}")]
    Thread {
        /// The group.
        group: Name,
        /// Why.
        source: std::io::Error,
    },
    /// Its thread is gone.
    #[error("group '{group}' is closed: the node is stopping")]
    Closed {
        /// The group.
        group: Name,
    },
    /// No such point.
    #[error("group '{group}' has no point {point}: see `twinsite points {group}` at the receiver")]
    NoPoint {
        /// The group.
        group: Name,
        /// The point.
        point: Point,
    },
    /// No point at all.
    #[error("group '{group}' has no committed point yet: its first sync is not done")]
    Empty {
        /// The group.
        group: Name,
    },
    /// Promoted already, from another point.
    #[error("group '{group}' is active already, from point {active}: it cannot be activated from point {wanted} too")]
    ActiveElsewhere {
        /// The group.
        group: Name,
        /// The point in use.
        active: Point,
        /// The point asked for.
        wanted: Point,
    },
    /// The client's space is used up.
    #[error("client '{client}' has used its {max} bytes of space: raise `space_max`")]
    Space {
        /// The client.
        client: Name,
        /// The limit.
        max: u64,
    },
    /// The group's space is used up.
    #[error("group '{client}/{group}' has used its {max} bytes of space: raise its `space_max` in [[receiver.client.group]]")]
    GroupSpace {
        /// The client.
        client: Name,
        /// The group.
        group: Name,
        /// The limit.
        max: u64,
    },
    /// Role or generation changed meanwhile.
    #[error("group '{group}' changed hands meanwhile: see `twinsite status`, then try again")]
    Changed {
        /// The group.
        group: Name,
    },
    /// Its primary is not there.
    #[error("the primary of group '{group}' is not connected: a switchover needs both sites (without it, `twinsite failover`)")]
    NotConnected {
        /// The group.
        group: Name,
    },
    /// Its primary did not come to an end in time.
    #[error(
        "the primary of group '{group}' did not commit all of its writes within {seconds} s: it takes writes again, nothing was changed"
    )]
    NotDrained {
        /// The group.
        group: Name,
        /// How long it had.
        seconds: u64,
    },
    /// Its primary was lost meanwhile; once it is back it takes writes again.
    #[error(
        "the connection to the primary of group '{group}' was lost after it was asked to take no more writes: once it is back it takes them \
         again; nothing was changed, try again"
    )]
    DrainLost {
        /// The group.
        group: Name,
    },
    /// A fold would take away what somebody looks at, or what must stay.
    #[error("group '{group}' cannot be folded up to point {point}: {why}")]
    Kept {
        /// The group.
        group: Name,
        /// The point.
        point: Point,
        /// What is in the way.
        why: &'static str,
    },
    /// The base cannot be written.
    #[error("{}: cannot {what} the base: {source}", path.display())]
    Base {
        /// The file.
        path: std::path::PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A frame that is to be folded.
    #[error(transparent)]
    Frame(#[from] crate::frames::FrameError),
    /// Its named points.
    #[error(transparent)]
    Names(#[from] NameError),
    /// Its fork.
    #[error(transparent)]
    Fork(#[from] crate::fork::ForkError),
}
