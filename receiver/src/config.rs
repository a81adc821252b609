//! What a receiver is told at start.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use proto::{Fingerprint, Name};

use crate::retention::Ladder;

/// A receiver's configuration.
#[derive(Clone, Debug)]
pub struct ReceiverConfig {
    /// UDP address to listen on.
    pub listen: SocketAddr,
    /// Folder of the store; created if it is not there.
    pub store: PathBuf,
    /// Who may replicate to here. Keys and names are unique.
    pub clients: Vec<ClientConfig>,
    /// Whether activated copies are turned into plain raw files while they run.
    pub flatten: bool,
    /// Limits.
    pub limits: Limits,
}

/// A client: a primary, known by its key.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Its name: the folder of its groups.
    pub name: Name,
    /// Its key.
    pub key: Fingerprint,
    /// The groups it may have; `None`: any, up to the limit.
    pub groups: Option<Vec<Name>>,
    /// Bytes its journals may take; `None`: what the disk has. Before it is reached, points are given up earlier than
    /// the ladder says; when it is reached all the same, its sessions are closed.
    pub space_max_bytes: Option<u64>,
    /// Bytes that the journals of single groups may take, in the same way; of groups that are there and of those to come.
    pub group_space_max_bytes: BTreeMap<Name, u64>,
    /// Whether it may have its disks back. Who does not trust a primary any more (a break-in is a disaster too) says no before it can ask.
    pub handback: bool,
    /// Which points of its groups are kept.
    pub retention: Ladder,
}

/// Limits of a receiver, with defaults that suit most.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Groups a client may have.
    pub groups_per_client: usize,
    /// Volumes a group may have.
    pub volumes_per_group: usize,
    /// Bytes that the volumes of all groups of a client may have together, as it declares them.
    pub volume_bytes_per_client: u64,
    /// Connections at once, of all clients. One more is refused in the handshake.
    pub connections: usize,
    /// Bytes of a journal segment before the next one is begun; at most 2 GiB.
    pub segment_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            groups_per_client: 64,
            volumes_per_group: proto::units::GROUP_VOLUMES_MAX,
            volume_bytes_per_client: 64 << 40,
            connections: 1024,
            segment_bytes: 256 << 20,
        }
    }
}

/// Largest value of [`Limits::segment_bytes`]: offsets of frames are kept in 32 bits, and a batch may go beyond.
pub(crate) const SEGMENT_BYTES_MAX: u64 = 2 << 30;
