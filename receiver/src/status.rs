//! What a receiver tells about itself.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;

use proto::fencing::GroupRole;
use proto::{Generation, Name, Point};
use serde::{Deserialize, Serialize};

use crate::drill::DrillResult;
use crate::fork::FlattenStatus;
use crate::group::Group;
use crate::kept::KeptFork;
use crate::retention::RetentionStatus;

/// Role of a group, as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Following a primary.
    Replica,
    /// A fork of it is the running server.
    Active,
    /// It cannot be used; `last_error` says why.
    Broken,
}

/// State of one group.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupStatus {
    /// The client.
    pub client: Name,
    /// The group.
    pub group: Name,
    /// What it does.
    pub role: Role,
    /// Its generation.
    pub generation: Generation,
    /// Its volumes.
    pub volumes: Vec<VolumeStatus>,
    /// The primary that is connected.
    pub peer: Option<PeerStatus>,
    /// Seconds since the last sign of life of the primary; `None` if there was none since the node was started, or it took leave.
    pub heard_age_s: Option<f64>,
    /// Whether the primary counts as alive.
    pub primary_alive: bool,
    /// Newest committed point.
    pub committed: Option<PointInfo>,
    /// Age of that point's cut in seconds, by this machine's clock against the primary's; not negative.
    pub committed_age_s: Option<f64>,
    /// Kept points.
    pub points: u64,
    /// Bytes of the journal.
    pub journal_bytes: u64,
    /// Most bytes that it may take; `None`: the group has no limit of its own.
    #[serde(default)]
    pub space_max_bytes: Option<u64>,
    /// Bytes of frames received since the node was started.
    pub bytes_received: u64,
    /// Estimated resident bytes of index and frame table.
    pub index_bytes: u64,
    /// The fork in use.
    pub active: Option<ActiveStatus>,
    /// Forks that keep what its primary had written of its own, by name.
    pub kept: Vec<KeptFork>,
    /// Queues and their limits.
    pub queues: Vec<QueueStatus>,
    /// Why the last session ended or what failed.
    pub last_error: Option<String>,
    /// What was compared with the primary.
    pub scrub: ScrubStatus,
    /// What drills found.
    pub drills: DrillsStatus,
    /// What was given up, and what holds it back.
    pub retention: RetentionStatus,
}

/// What drills of a group found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillsStatus {
    /// The drill that passed, of the newest point of which one did.
    pub verified: Option<DrillResult>,
    /// The last one, passed or not.
    pub last: Option<DrillResult>,
    /// Why results cannot be read.
    pub error: Option<String>,
}

impl From<crate::drill::Summary> for DrillsStatus {
    fn from(s: crate::drill::Summary) -> Self {
        let owned = |result: Option<std::sync::Arc<DrillResult>>| result.map(|r| r.as_ref().clone());
        Self { verified: owned(s.verified), last: owned(s.last), error: s.error }
    }
}

/// What was compared with the primary since the node was started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// Bytes compared while following.
    pub compared_bytes: u64,
    /// Bytes of them that differed or could not be read.
    pub differing_bytes: u64,
    /// Frames of the journal that were met and found to be damaged or not to be read.
    pub damaged_frames: u64,
    /// Blocks of a base that were read by anybody and found to be damaged.
    pub damaged_base_blocks: u64,
    /// The last of both: file, offset and what does not fit.
    pub last_damage: Option<String>,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: Name,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// A connected primary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its address.
    pub address: SocketAddr,
    /// When the session began, microseconds since 1970.
    pub since_unix_us: u64,
    /// Its epoch interval in milliseconds.
    pub interval_ms: u32,
}

/// The fork that is the running server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActiveStatus {
    /// Name of the fork.
    pub fork: Name,
    /// The point it started from.
    pub point: Point,
    /// How far its data files are the whole disks; `None` if nobody makes them so.
    #[serde(default)]
    pub flatten: Option<FlattenStatus>,
}

/// A queue: what is in it, and its limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStatus {
    /// Its name.
    pub name: String,
    /// Entries or bytes, as the name says.
    pub used: u64,
    /// The limit.
    pub limit: u64,
}

/// A committed point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointInfo {
    /// The point.
    pub point: Point,
    /// Its cut, microseconds since 1970 on the primary's clock.
    pub cut_unix_us: u64,
    /// The oldest write in it, microseconds since 1970 on the primary's clock; 0 if it has none.
    pub first_write_unix_us: u64,
    /// Bytes of its frames.
    pub frame_bytes: u64,
    /// Blocks of data in it.
    pub data_blocks: u64,
    /// Zeroed blocks in it.
    pub zero_blocks: u64,
}

impl From<&crate::group::PointEntry> for PointInfo {
    fn from(p: &crate::group::PointEntry) -> Self {
        Self {
            point: p.point,
            cut_unix_us: p.cut_unix_us,
            first_write_unix_us: p.first_write_unix_us,
            frame_bytes: p.frame_bytes,
            data_blocks: p.data_blocks,
            zero_blocks: p.zero_blocks,
        }
    }
}

/// The queues of an open group.
pub(crate) fn queues(group: &Group) -> Vec<QueueStatus> {
    let queue =
        |name: &str, used: usize, limit: usize| QueueStatus { name: name.to_owned(), used: used as u64, limit: limit as u64 };
    let mut queues = vec![
        queue("journal commands", group.queue_used(), crate::group::GROUP_QUEUE_MAX),
        queue("decoded frame bytes", group.shared.frames.cache_bytes(), crate::frames::FRAME_CACHE_BYTES),
    ];
    if let Some(spill) = group.shared.frames.spilled() {
        let used = usize::try_from(spill.bytes()).unwrap_or(usize::MAX);
        queues.push(queue("kept frame bytes", used, crate::spill::SPILL_BYTES_MAX as usize));
    }
    if group.shared.state.read().folding.is_some() {
        let waiting = group.shared.fold_waiting.load(Ordering::Relaxed);
        queues.push(queue("fold bytes", waiting, crate::group::fold::FOLD_BUFFER_BYTES));
    }
    queues
}

/// The state of an open group.
pub(crate) fn of(group: &Group) -> GroupStatus {
    let shared = &group.shared;
    let retention = crate::retention::keeper::status(shared);
    // Before the lock is taken: who takes it twice waits for ever once somebody waits in between to change the state.
    let (queues, flatten) = (queues(group), group.flattened());
    let state = shared.state.read();
    let committed = state.points.last().map(PointInfo::from);
    let now = crate::clock::unix_us();
    let heard = shared.heard.age();
    GroupStatus {
        client: shared.folder.client.clone(),
        group: shared.folder.group.clone(),
        role: match state.role {
            GroupRole::Replica => Role::Replica,
            GroupRole::Active => Role::Active,
        },
        generation: state.generation,
        volumes: shared.volumes.iter().map(|v| VolumeStatus { name: v.name.clone(), size_bytes: v.size_bytes }).collect(),
        peer: state.peer.map(|p| PeerStatus { address: p.address, since_unix_us: p.since_unix_us, interval_ms: p.interval_ms }),
        heard_age_s: heard.map(|age| age.as_secs_f64()),
        primary_alive: heard.is_some_and(|age| age < crate::liveness::ALIVE_WITHIN),
        committed,
        committed_age_s: committed.map(|p| now.saturating_sub(p.cut_unix_us) as f64 / 1e6),
        points: state.points.len() as u64,
        journal_bytes: state.journal_bytes,
        space_max_bytes: shared.space_max,
        bytes_received: shared.bytes_received.load(Ordering::Relaxed),
        index_bytes: state.index.memory_bytes() + shared.frames.table.read().memory_bytes(),
        active: state.fork.as_ref().map(|f| ActiveStatus { fork: f.name.clone(), point: f.point, flatten: flatten.clone() }),
        kept: shared.kept.all(),
        queues,
        last_error: state.last_error.clone(),
        scrub: ScrubStatus {
            compared_bytes: shared.findings.compared_bytes.load(Ordering::Relaxed),
            differing_bytes: shared.findings.differing_bytes.load(Ordering::Relaxed),
            damaged_frames: shared.findings.damaged_frames.load(Ordering::Relaxed),
            damaged_base_blocks: shared.findings.damaged_base_blocks.load(Ordering::Relaxed),
            last_damage: shared.findings.last_damage(),
        },
        drills: shared.drills.summary().into(),
        retention,
    }
}

/// The state of a group that could not be opened.
pub(crate) fn broken(client: Name, group: Name, error: String) -> GroupStatus {
    GroupStatus {
        client,
        group,
        role: Role::Broken,
        generation: Generation(0),
        volumes: Vec::new(),
        peer: None,
        heard_age_s: None,
        primary_alive: false,
        committed: None,
        committed_age_s: None,
        points: 0,
        journal_bytes: 0,
        space_max_bytes: None,
        bytes_received: 0,
        index_bytes: 0,
        active: None,
        kept: Vec::new(),
        queues: Vec::new(),
        last_error: Some(error),
        scrub: ScrubStatus::default(),
        drills: DrillsStatus::default(),
        retention: RetentionStatus::default(),
    }
}
