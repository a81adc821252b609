//! Why a session ends: one line for both ends, and the close code it maps to.

use proto::control::{VERSION_MAX, VERSION_MIN};
use proto::units::BLOCK_BYTES;
use proto::{CloseCode, DecodeError, EpochId, Generation, Name};

use super::{Cause, EPOCHS_IN_FLIGHT_MAX};

/// Why a session ends.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No common version.
    #[error(
        "no common protocol version: the primary speaks {theirs_min} to {theirs_max}, this receiver {VERSION_MIN} to {VERSION_MAX}: update the older side"
    )]
    Version {
        /// Oldest the primary speaks.
        theirs_min: u16,
        /// Newest.
        theirs_max: u16,
    },
    /// The client may not have that group.
    #[error("group '{group}' is not among the groups of client '{client}': add it to its `groups` at the receiver")]
    UnknownGroup {
        /// The group.
        group: Name,
        /// The client.
        client: Name,
    },
    /// Another key created the group.
    #[error("group '{group}' of client '{client}' was created with another key: use that key, or another group name")]
    Owner {
        /// The group.
        group: Name,
        /// The client.
        client: Name,
    },
    /// Block size.
    #[error("block size {theirs} bytes, this receiver has {BLOCK_BYTES}: update the older side")]
    BlockSize {
        /// What the primary says.
        theirs: u32,
    },
    /// Volumes differ from the stored group.
    #[error("group '{group}' has {stored} volumes here and {given} at the primary: use another group name for another set")]
    VolumeCount {
        /// The group.
        group: Name,
        /// Volumes here.
        stored: usize,
        /// Volumes there.
        given: usize,
    },
    /// A volume has another name.
    #[error("volume {number} of group '{group}' is '{stored}' here and '{given}' at the primary: volumes keep names and order")]
    VolumeName {
        /// The group.
        group: Name,
        /// Its position from 1.
        number: usize,
        /// Name here.
        stored: Name,
        /// Name there.
        given: Name,
    },
    /// A volume has another size.
    #[error(
        "volume '{volume}' of group '{group}' has {stored} bytes here and {given} at the primary: use another group name for another disk"
    )]
    VolumeSize {
        /// The group.
        group: Name,
        /// The volume.
        volume: Name,
        /// Bytes here.
        stored: u64,
        /// Bytes there.
        given: u64,
    },
    /// The primary is ahead.
    #[error(
        "the primary claims generation {theirs}, group '{group}' stands at {ours} here: this store is older than the primary, or a copy of another"
    )]
    Ahead {
        /// The group.
        group: Name,
        /// Generation here.
        ours: Generation,
        /// The claim.
        theirs: Generation,
    },
    /// Hashes were asked for while the newest point is about to change.
    #[error("the primary asked for hashes while an epoch arrives: update the older side")]
    HashOrder,
    /// Too many queries at once.
    #[error("the primary has {} unanswered hash queries: update the older side", proto::hashes::QUERIES_IN_FLIGHT_MAX)]
    HashQueries,
    /// Hashes of what is not there.
    #[error("the primary asked for hashes up to block {end} of volume {volume}, which has {blocks}: update the older side")]
    HashRange {
        /// The volume.
        volume: u16,
        /// One past the last block asked for.
        end: u64,
        /// Blocks it has; 0 if there is no such volume.
        blocks: u64,
    },
    /// Too many scrubs at once.
    #[error("the primary has {} unanswered scrubs: update the older side", proto::scrub::SCRUBS_IN_FLIGHT_MAX)]
    Scrubs,
    /// Scrub of what is not there.
    #[error("the primary scrubs up to block {end} of volume {volume}, which has {blocks}: update the older side")]
    ScrubRange {
        /// The volume.
        volume: u16,
        /// One past the last block of the message.
        end: u64,
        /// Blocks it has; 0 if there is no such volume.
        blocks: u64,
    },
    /// Too many groups.
    #[error("client '{client}' has {max} groups, which is its limit: raise it at the receiver, or remove a group")]
    Groups {
        /// The client.
        client: Name,
        /// The limit.
        max: usize,
    },
    /// Too many bytes of volumes.
    #[error(
        "with group '{group}' the volumes of client '{client}' would have {given} bytes, its limit is {max}: raise it at the receiver, or remove a group"
    )]
    VolumeBytes {
        /// The group.
        group: Name,
        /// The client.
        client: Name,
        /// Bytes with the new group.
        given: u64,
        /// The limit.
        max: u64,
    },
    /// Too many volumes.
    #[error("group '{group}' has {given} volumes, the limit is {max}: raise it at the receiver, or split the group")]
    Volumes {
        /// The group.
        group: Name,
        /// Volumes given.
        given: usize,
        /// The limit.
        max: usize,
    },
    /// A message that does not fit the state.
    #[error("{message} message while {state}")]
    Unexpected {
        /// What the session was doing.
        state: &'static str,
        /// What came.
        message: &'static str,
    },
    /// A pass out of order.
    #[error("pass {pass} of epoch {epoch} came, pass {due_pass} of epoch {due_epoch} was due")]
    Order {
        /// What came.
        epoch: EpochId,
        /// What came.
        pass: u16,
        /// What was due.
        due_epoch: EpochId,
        /// What was due.
        due_pass: u32,
    },
    /// A pass that goes on where nothing was left.
    #[error("a pass of epoch {epoch} goes on behind staged frames, and there are none, or it was begun already")]
    NotSuspended {
        /// The epoch.
        epoch: EpochId,
    },
    /// A frame in the wrong stream.
    #[error("a frame of pass {pass} of epoch {epoch} in the stream of pass {due_pass} of epoch {due_epoch}")]
    FrameOrder {
        /// What came.
        epoch: EpochId,
        /// What came.
        pass: u16,
        /// The stream's.
        due_epoch: EpochId,
        /// The stream's.
        due_pass: u16,
    },
    /// A frame of a volume that the group does not have.
    #[error("a frame of volume {volume}, the group has {volumes}")]
    FrameVolume {
        /// What came.
        volume: u16,
        /// Volumes of the group.
        volumes: usize,
    },
    /// Bytes that do not decode.
    #[error("{0}")]
    Decode(#[from] DecodeError),
    /// A seal of another generation.
    #[error("seal of generation {theirs} in a session of generation {ours}")]
    SealGeneration {
        /// The session's.
        ours: Generation,
        /// The seal's.
        theirs: Generation,
    },
    /// A seal out of order.
    #[error("seal of epoch {epoch} came, the one of epoch {due} was due")]
    SealOrder {
        /// What came.
        epoch: EpochId,
        /// What was due.
        due: EpochId,
    },
    /// A seal that does not fit the frames that came.
    #[error("seal of epoch {epoch} does not fit its frames: {what} differ")]
    SealMismatch {
        /// The epoch.
        epoch: EpochId,
        /// What differs.
        what: &'static str,
    },
    /// An epoch in which nothing changed.
    #[error("seal of epoch {epoch} has no frames")]
    EmptyEpoch {
        /// The epoch.
        epoch: EpochId,
    },
    /// It does not take what it is told.
    #[error("the primary does not read its control stream")]
    Deaf,
    /// Too many epochs in flight.
    #[error("more than {EPOCHS_IN_FLIGHT_MAX} epochs in flight")]
    InFlight,
    /// A newer session has the group.
    #[error("another session of group '{group}' took over")]
    Superseded {
        /// The group.
        group: Name,
    },
    /// The group was promoted, or the primary is of an older generation.
    #[error("fenced: group '{group}' stands at generation {generation}, this primary must not write")]
    Fenced {
        /// The group.
        group: Name,
        /// What holds.
        generation: Generation,
    },
    /// The store failed.
    #[error("{0}")]
    Storage(Cause),
    /// The node stops.
    #[error("the receiver is stopping")]
    Stopping,
    /// The primary ended it.
    #[error("the primary ended the session: {reason} (code {code})")]
    PeerClosed {
        /// Its close code.
        code: u16,
        /// Its reason.
        reason: String,
    },
}

impl SessionError {
    /// The close code it maps to.
    #[must_use]
    pub fn code(&self) -> CloseCode {
        match self {
            Self::Version { .. } => CloseCode::Version,
            Self::UnknownGroup { .. } | Self::Owner { .. } => CloseCode::UnknownGroup,
            Self::BlockSize { .. } | Self::VolumeCount { .. } | Self::VolumeName { .. } | Self::VolumeSize { .. } => {
                CloseCode::Mismatch
            }
            Self::Ahead { .. } => CloseCode::Ahead,
            Self::Groups { .. } | Self::VolumeBytes { .. } | Self::Volumes { .. } => CloseCode::Limit,
            Self::Superseded { .. } | Self::Fenced { .. } => CloseCode::Superseded,
            Self::Storage(_) => CloseCode::Storage,
            Self::Stopping | Self::PeerClosed { .. } => CloseCode::Stopping,
            Self::Unexpected { .. }
            | Self::Order { .. }
            | Self::NotSuspended { .. }
            | Self::FrameOrder { .. }
            | Self::FrameVolume { .. }
            | Self::Decode(_)
            | Self::SealGeneration { .. }
            | Self::SealOrder { .. }
            | Self::SealMismatch { .. }
            | Self::EmptyEpoch { .. }
            | Self::Deaf
            | Self::HashOrder
            | Self::HashQueries
            | Self::HashRange { .. }
            | Self::Scrubs
            | Self::ScrubRange { .. }
            | Self::InFlight => CloseCode::Misbehaved,
        }
    }
}
