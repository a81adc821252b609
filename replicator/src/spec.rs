//! What a group at the primary is made of.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use blockdev::BlockDevice;
use proto::{Codec, Fingerprint, Name};
use serde::{Deserialize, Serialize};

use crate::rate::RateSchedule;

/// Shortest epoch interval.
pub const INTERVAL_MIN: Duration = Duration::from_millis(10);
/// Longest epoch interval: a day.
pub const INTERVAL_MAX: Duration = Duration::from_secs(86_400);

/// Shortest `max_lag`.
pub const MAX_LAG_MIN: Duration = Duration::from_millis(100);
/// Longest `max_lag`.
pub const MAX_LAG_MAX: Duration = Duration::from_secs(86_400);

/// Shortest `scrub_interval`.
pub const SCRUB_INTERVAL_MIN: Duration = Duration::from_secs(1);
/// Longest `scrub_interval`: a year.
pub const SCRUB_INTERVAL_MAX: Duration = Duration::from_secs(365 * 86_400);
/// `scrub_interval` unless another is given: a week.
pub const SCRUB_INTERVAL_DEFAULT: Duration = Duration::from_secs(7 * 86_400);

/// A disk to be replicated.
pub struct VolumeSpec {
    /// Its name.
    pub name: Name,
    /// The disk underneath the tap.
    pub device: Arc<dyn BlockDevice>,
}

/// The receiver of a group.
#[derive(Clone, Debug)]
pub struct PeerSpec {
    /// `host:port`.
    pub address: String,
    /// Its pinned key.
    pub key: Fingerprint,
}

/// When a guest's flush is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durability {
    /// When the local disk has flushed.
    #[default]
    Async,
    /// When, besides, the receiver has committed all that was acknowledged before the flush: what a database was told is durable
    /// survives the site.
    FlushSync,
}

/// What an administrator may tune. Every limit is shown in `status`.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Time from one cut to the next, 10 ms to a day.
    pub interval: Duration,
    /// An epoch with more dirty bytes than this is sent in passes; only its last, small pass is frozen. Also the memory that
    /// captured frames may take before they are sent; when it is full, the next cut waits and the current epoch grows.
    pub freeze_budget_bytes: u64,
    /// Bytes of blocks that a guest overwrites while their epoch is captured and that do not fit `freeze_budget_bytes`; they go
    /// to an unnamed file in `state_dir`. When it is full, the epoch is given up and merged into the next.
    pub spill_limit_bytes: u64,
    /// Epochs that may be sealed and not yet committed; when reached, the current epoch grows.
    pub epochs_in_flight: u16,
    /// How payloads are packed.
    pub codec: Codec,
    /// When a guest's flush is answered.
    pub durability: Durability,
    /// The guest's writes are slowed so that the oldest one that is not committed is not much older. Cuts are then at most a quarter of it
    /// apart.
    pub max_lag: Option<Duration>,
    /// How much may be sent, by the time of day. The sender waits, so the current epoch grows.
    pub rate: RateSchedule,
    /// Time in which all blocks are compared with the copy once; `None`: they are not, unless a `verify` is asked for.
    pub scrub_interval: Option<Duration>,
    /// Guests go on writing when the other site was made the server: nothing of that is replicated, and it is kept as a fork of its own when
    /// the disks are given back.
    pub writes_when_fenced: bool,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(1),
            freeze_budget_bytes: 64 << 20,
            spill_limit_bytes: 4 << 30,
            epochs_in_flight: 8,
            codec: Codec::Lz4,
            durability: Durability::Async,
            max_lag: None,
            rate: RateSchedule::default(),
            scrub_interval: Some(SCRUB_INTERVAL_DEFAULT),
            writes_when_fenced: false,
        }
    }
}

/// A group at its primary.
pub struct GroupSpec {
    /// Its name.
    pub group: Name,
    /// Its disks; cut together.
    pub volumes: Vec<VolumeSpec>,
    /// Where it goes.
    pub peer: PeerSpec,
    /// Folder of this group's own durable state (its generation); created with mode 0700.
    pub state_dir: PathBuf,
    /// What may be tuned.
    pub tuning: Tuning,
    /// The disks may hold anything, whatever the dirty log says: all of them is compared with the copy.
    pub all_suspect: bool,
}
