//! What a group at the primary tells its user. Plain data: the control socket serialises it, the command line prints it.

use proto::{Fingerprint, Generation, Name, Point};
use serde::{Deserialize, Serialize};

use crate::handback::HandbackStatus;
use crate::spec::Durability;

/// A queue, how full it is, and its limit.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct QueueStatus {
    /// Name, as in the documentation.
    pub name: String,
    /// Unit of the two figures: `bytes`, `epochs`, `requests`.
    pub unit: String,
    /// Entries or bytes in it now.
    pub used: u64,
    /// Its limit.
    pub limit: u64,
}

/// Where the session with the receiver stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkState {
    /// Trying to reach the receiver.
    Connecting,
    /// The first full copy is under way.
    FirstSync,
    /// A copy exists; what may differ from it is compared by hash. Nothing is committed meanwhile, and the copy stays activatable.
    Comparing,
    /// Following, epoch by epoch.
    Streaming,
    /// Another side may write now; nothing is replicated.
    Fenced,
    /// The receiver refused in a way that trying again unchanged cannot mend.
    Refused,
    /// Shut down.
    Stopped,
}

/// Progress of the pass that is being sent.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct PassProgress {
    /// Its epoch.
    pub epoch: u64,
    /// Its number within the epoch.
    pub pass: u16,
    /// Bytes of the disks it has dealt with (holes included).
    pub done_bytes: u64,
    /// Bytes of the disks it has to deal with.
    pub total_bytes: u64,
    /// Bytes of the disks per second since it began.
    pub rate_bytes_per_s: u64,
    /// Seconds left at that rate; `None` before there is a rate.
    pub left_s: Option<u64>,
}

/// Quantiles of the lag, sampled every 10 ms since the first commit of this run.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct LagSummary {
    /// Samples taken.
    pub samples: u64,
    /// Median in ms.
    pub p50_ms: u64,
    /// 99th percentile in ms.
    pub p99_ms: u64,
    /// Largest in ms.
    pub max_ms: u64,
}

/// The comparison of whole disks with the copy, since the node was started.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// Seconds that a whole pass in the background is to take; `None`: there is none.
    pub interval_s: Option<u64>,
    /// Bytes of the disks that the pass under way is done with: compared, or on their way anyway.
    pub done_bytes: u64,
    /// Bytes of the disks.
    pub total_bytes: u64,
    /// Milliseconds since the last whole pass ended, in the background or by `verify`.
    pub last_pass_age_ms: Option<u64>,
    /// Whether a `verify` runs; the background waits for it.
    pub verifying: bool,
    /// Bytes compared.
    pub compared_bytes: u64,
    /// Bytes of them that differed, and were sent again.
    pub differing_bytes: u64,
    /// Bytes that the disk here did not give, which were not compared.
    pub unreadable_bytes: u64,
    /// Milliseconds since a difference was found last.
    pub last_difference_age_ms: Option<u64>,
}

/// One `verify`: a whole pass at full speed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VerifyStatus {
    /// Tells one from the next.
    pub number: u64,
    /// Whether it still runs.
    pub running: bool,
    /// Bytes of the disks.
    pub total_bytes: u64,
    /// Bytes of them that are done with: compared, or on their way anyway.
    pub done_bytes: u64,
    /// Bytes compared.
    pub compared_bytes: u64,
    /// Bytes of them that differed, and are sent again.
    pub differing_bytes: u64,
    /// Bytes that the disk here did not give, which were not compared.
    pub unreadable_bytes: u64,
    /// Milliseconds since it began, until it ended.
    pub elapsed_ms: u64,
    /// Bytes of the disks per second since it began.
    pub rate_bytes_per_s: u64,
    /// Seconds left at that rate; `None` before there is a rate.
    pub left_s: Option<u64>,
}

/// One volume of the group.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: Name,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Bytes changed and not yet in any epoch.
    pub dirty_bytes: u64,
}

/// One group at its primary.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupStatus {
    /// The group.
    pub group: Name,
    /// Address of the receiver as configured.
    pub peer: String,
    /// The receiver's pinned key.
    pub peer_key: Fingerprint,
    /// Where the session stands.
    pub state: LinkState,
    /// The last error, one line; `None` while all is well.
    pub error: Option<String>,
    /// Generation of the session.
    pub generation: Generation,
    /// Newest committed point.
    pub committed: Option<Point>,
    /// Milliseconds since it was committed.
    pub committed_age_ms: Option<u64>,
    /// Age of the oldest acknowledged write that is not committed remotely, in ms; 0 if there is none.
    pub lag_ms: u64,
    /// The lag over time.
    pub lag: LagSummary,
    /// Bytes changed and not yet committed remotely, all maps together.
    pub dirty_bytes: u64,
    /// Bytes that may differ from the copy and have yet to be compared: what was being written before an unclean stop.
    #[serde(default)]
    pub suspect_bytes: u64,
    /// Bytes compared with the copy since start.
    #[serde(default)]
    pub compared_bytes: u64,
    /// Bytes of these that differed, and were sent.
    #[serde(default)]
    pub differing_bytes: u64,
    /// Bytes of dirty blocks captured since start.
    pub captured_bytes: u64,
    /// Bytes of zero blocks and holes captured since start; they travel as extents.
    pub zero_bytes: u64,
    /// Bytes of frames handed to the network since start.
    pub sent_bytes: u64,
    /// UDP payload bytes sent since start, with QUIC's overhead and retransmissions.
    pub wire_bytes: u64,
    /// 1 - sent / captured, in percent; 0 before anything was captured.
    pub saved_percent: f64,
    /// Blocks copied before a guest write overtook the capture, since start.
    pub copied_before_write: u64,
    /// Epochs committed since start.
    pub epochs_committed: u64,
    /// Epochs given up and merged since start (session ended, memory limit).
    pub epochs_merged: u64,
    /// Sealed and not yet committed.
    pub epochs_in_flight: u64,
    /// Epoch interval in ms.
    pub interval_ms: u64,
    /// Why guests may not write, in a word: `fenced`, `drained`, `handback`, `stopping`.
    #[serde(default)]
    pub writes_refused: Option<String>,
    /// The handback that runs.
    #[serde(default)]
    pub handback: Option<HandbackStatus>,
    /// When a guest's flush is answered.
    #[serde(default)]
    pub durability: Durability,
    /// Flushes that wait for the receiver; always 0 unless `durability` is `flush-sync`.
    #[serde(default)]
    pub flushes_waiting: u64,
    /// Milliseconds since the oldest of them came.
    #[serde(default)]
    pub flush_wait_ms: Option<u64>,
    /// Flushes answered since start because the receiver had committed what they cover.
    #[serde(default)]
    pub flushes_committed: u64,
    /// Whether there is a `rate_limit` at any time of the day.
    #[serde(default)]
    pub rate_limited: bool,
    /// Bits a second that may be sent now; `None`: without a limit.
    #[serde(default)]
    pub rate_limit_bits_per_s: Option<u64>,
    /// The lag that the guest's writes are held to, in ms, if any.
    #[serde(default)]
    pub max_lag_ms: Option<u64>,
    /// Bytes a second that writes get because of it; `None` while they are not slowed.
    #[serde(default)]
    pub write_rate_bytes_per_s: Option<u64>,
    /// How long a write would wait that came now, in ms.
    #[serde(default)]
    pub write_pause_ms: f64,
    /// What writes have waited since start, all together, in ms.
    #[serde(default)]
    pub write_paused_ms: u64,
    /// How the comparison of whole disks with the copy fares.
    #[serde(default)]
    pub scrub: ScrubStatus,
    /// Smoothed round trip in ms, while connected.
    pub round_trip_ms: Option<f64>,
    /// The pass being sent.
    pub pass: Option<PassProgress>,
    /// The group's volumes.
    pub volumes: Vec<VolumeStatus>,
    /// Every queue and its limit.
    pub queues: Vec<QueueStatus>,
}
