//! What the control socket speaks: plain data, the same for the daemon, the command line and scripts that use `--json`.
//!
//! Field names are an interface: they are added to, not changed.

mod adopt;
mod drill;
mod forks;
mod hooks;
mod onward;

use proto::{Fingerprint, Generation, Name, Point};
use receiver::FlattenStatus;
use replicator::{GroupStatus, HandbackPlan, HandbackStatus, LinkState, QueueStatus, VerifyStatus};
use serde::{Deserialize, Serialize};

pub use adopt::{AdoptDisk, AdoptRequest, AdoptStatus};
pub use drill::{
    DrillEnd, DrillEnded, DrillHold, DrillList, DrillOutcome, DrillReport, DrillRequest, DrillResult, DrillResults, DrillStarted,
    DrillStatus,
};
pub use forks::{ForkList, ForkRemoval, KeptFork, ListedFork};
pub use hooks::{HookOutcome, HookRun, HookRuns, PlannedHook};
pub use onward::{OnwardState, OnwardStatus};

/// `GET /v1/id`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeId {
    /// What the node calls itself.
    pub name: String,
    /// Fingerprint of its public key.
    pub key: Fingerprint,
}

/// `GET /v1/status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Who answers.
    pub node: NodeId,
    /// Version of the program.
    pub version: String,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// Groups this node is the primary of.
    pub primary: Vec<PrimaryStatus>,
    /// The copies this node keeps, if it is a receiver.
    pub receiver: Option<ReceiverStatus>,
    /// NBD servers of both roles.
    pub exports: Vec<ExportStatus>,
    /// The newest run of each hook and group, with the end of its output.
    #[serde(default)]
    pub hooks: Vec<HookRun>,
    /// Which of the groups replicate a copy of this node onward.
    #[serde(default)]
    pub onward: Vec<OnwardStatus>,
}

/// A configured group, running or not.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "run")]
pub enum PrimaryStatus {
    /// Running; `state` tells how it fares.
    Running(Box<GroupStatus>),
    /// Could not be started; the others go on.
    Failed {
        /// The group.
        group: Name,
        /// One line.
        error: String,
    },
    /// Its disks do not answer, or are those of a copy that is not there yet.
    Waiting {
        /// The group.
        group: Name,
        /// One line.
        reason: String,
    },
}

impl PrimaryStatus {
    /// The group.
    #[must_use]
    pub fn group(&self) -> &Name {
        match self {
            Self::Running(status) => &status.group,
            Self::Failed { group, .. } | Self::Waiting { group, .. } => group,
        }
    }
}

/// The receiving role.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReceiverStatus {
    /// Where it listens.
    pub listen: String,
    /// Why it is not running, one line; `None`: it runs.
    pub error: Option<String>,
    /// Every group it holds.
    pub groups: Vec<CopyStatus>,
}

/// What a copy is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyState {
    /// Its primary is connected.
    Following,
    /// Its primary is not connected.
    Waiting,
    /// It was activated here.
    Active,
    /// It cannot be used; see `error`.
    Failed,
}

/// One group at the receiver.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CopyStatus {
    /// Whose.
    pub client: Name,
    /// The group.
    pub group: Name,
    /// What it is doing.
    pub state: CopyState,
    /// The last error, one line.
    pub error: Option<String>,
    /// Its generation.
    pub generation: Generation,
    /// Newest point, activatable.
    pub committed: Option<Point>,
    /// Cut of that point, microseconds since 1970 on the primary's clock.
    pub cut_unix_us: Option<u64>,
    /// Age of that cut in ms, by this machine's clock against the primary's.
    pub committed_age_ms: Option<u64>,
    /// The primary's epoch interval in ms, while it is connected.
    pub interval_ms: Option<u64>,
    /// Points that can be activated.
    pub points: u64,
    /// Bytes its journal takes in the store.
    pub stored_bytes: u64,
    /// Bytes of frames received since the node started.
    pub received_bytes: u64,
    /// Memory that its index takes, in bytes.
    pub index_bytes: u64,
    /// The client's limit on all its groups.
    pub space_max_bytes: Option<u64>,
    /// The group's own limit.
    #[serde(default)]
    pub group_space_max_bytes: Option<u64>,
    /// Address of the primary while connected.
    pub peer: Option<String>,
    /// Time since the last sign of life of the primary in ms; `None` if there was none since the node started, or it was stopped in order.
    #[serde(default)]
    pub heard_age_ms: Option<u64>,
    /// Whether the primary counts as alive: then a failover needs `force`.
    #[serde(default)]
    pub primary_alive: bool,
    /// Its disks.
    pub volumes: Vec<CopyVolume>,
    /// Every queue and its limit.
    pub queues: Vec<QueueStatus>,
    /// The activated fork, if it is active.
    pub active: Option<ActiveStatus>,
    /// Forks that keep what its primary had written of its own, by name.
    #[serde(default)]
    pub forks: Vec<KeptFork>,
    /// Bytes compared with the primary since the node started, while following it.
    #[serde(default)]
    pub scrubbed_bytes: u64,
    /// Bytes of them that differed or could not be read; the primary sent them again.
    #[serde(default)]
    pub differing_bytes: u64,
    /// Frames of the journal that were found to be damaged or not to be read since the node started.
    #[serde(default)]
    pub damaged_frames: u64,
    /// Blocks of a base that were read and found to be damaged since the node started.
    #[serde(default)]
    pub damaged_base_blocks: u64,
    /// The last of both: file, offset and what does not fit.
    #[serde(default)]
    pub last_damage: Option<String>,
    /// Its drills that run.
    #[serde(default)]
    pub drills: Vec<DrillStatus>,
    /// The drill that passed, of the newest point of which one did.
    #[serde(default)]
    pub verified: Option<DrillResult>,
    /// The last drill with a script, passed or not.
    #[serde(default)]
    pub last_drill: Option<DrillResult>,
    /// Why results of drills are not known or kept, one line.
    #[serde(default)]
    pub drill_error: Option<String>,
    /// What was given up of its points, and what holds it back.
    #[serde(default)]
    pub retention: receiver::RetentionStatus,
}

/// A disk of a copy.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CopyVolume {
    /// Its name.
    pub name: Name,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// A copy that runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ActiveStatus {
    /// The point it started from.
    pub point: Point,
    /// Where it is exported; `None`: nowhere, see the copy's `error`.
    pub export: Option<String>,
    /// How far its disks are plain raw files; `None`: that is not done here.
    #[serde(default)]
    pub flatten: Option<FlattenStatus>,
}

/// One NBD server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExportStatus {
    /// `unix:…` or `tcp:…`.
    pub address: String,
    /// Whether its clients have to use TLS.
    #[serde(default)]
    pub tls: bool,
    /// What it offers.
    pub disks: Vec<ExportedDisk>,
    /// Clients now.
    pub connections: Vec<ConnectionStatus>,
    /// Clients at most.
    pub connections_max: u64,
}

impl ExportStatus {
    /// What NBD clients call its disk `disk`.
    #[must_use]
    pub fn uri(&self, disk: &str) -> String {
        let uri = nbd_uri(&self.address, disk);
        if self.tls { uri.replacen("nbd://", "nbds://", 1) } else { uri }
    }
}

/// A disk on an NBD server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExportedDisk {
    /// Name of the export, which is the disk's.
    pub name: String,
    /// The group it belongs to.
    pub group: String,
}

/// An NBD client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConnectionStatus {
    /// Name of the export.
    pub export: String,
    /// Its address, or process id on a unix socket.
    pub peer: String,
    /// Whether it is encrypted.
    pub tls: bool,
    /// Requests answered.
    pub requests: u64,
    /// Bytes read by the client.
    pub read_bytes: u64,
    /// Bytes written by the client.
    pub written_bytes: u64,
    /// Requests and bytes in flight and their limits.
    pub queues: Vec<QueueStatus>,
}

/// `GET /v1/points?group=`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Points {
    /// Whose.
    pub client: Name,
    /// The group.
    pub group: Name,
    /// Oldest first.
    pub points: Vec<PointInfo>,
}

/// A point that can be activated.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PointInfo {
    /// Its name.
    pub point: Point,
    /// Its cut, microseconds since 1970 on the primary's clock.
    pub cut_unix_us: u64,
    /// Bytes of disk that its epoch changed.
    pub changed_bytes: u64,
    /// Bytes its epoch takes in the journal.
    pub stored_bytes: u64,
    /// What the last drill with a script found on it.
    #[serde(default)]
    pub drill: Option<DrillResult>,
    /// Its names; with one, it is never given up.
    #[serde(default)]
    pub names: Vec<Name>,
}

/// `POST /v1/names`: names a point, or takes a name away.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NameRequest {
    /// `GROUP` or `CLIENT/GROUP`.
    pub group: String,
    /// The name.
    pub name: Name,
    /// The point, or another name of it; `None`: the name is taken away.
    pub point: Option<String>,
}

/// The answer to a [`NameRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Named {
    /// Whose.
    pub client: Name,
    /// The group.
    pub group: Name,
    /// The name.
    pub name: Name,
    /// The point that has it, or had it.
    pub point: Point,
}

/// `GET /v1/failover?group=&point=&switchover=`: what it would do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FailoverPlan {
    /// Whose.
    pub client: Name,
    /// The group.
    pub group: Name,
    /// The point that would be activated.
    pub point: Point,
    /// The newest there is.
    pub newest: Point,
    /// Its cut, microseconds since 1970 on the primary's clock.
    pub cut_unix_us: u64,
    /// Cut of the newest.
    pub newest_cut_unix_us: u64,
    /// Points after the chosen one: committed here, and not in what would be activated. They are kept.
    pub points_after: u64,
    /// Bytes of disk that those changed, each epoch's blocks counted once.
    pub changed_bytes_after: u64,
    /// Generation now.
    pub generation: Generation,
    /// Generation afterwards.
    pub generation_after: Generation,
    /// Address of the primary if it is connected right now, which a failover would cut off.
    pub connected: Option<String>,
    /// Time since the last sign of life of the primary in ms; `None` if there was none since the node started, or it was stopped in order.
    pub heard_age_ms: Option<u64>,
    /// Whether the primary counts as alive.
    pub primary_alive: bool,
    /// Why it would be refused without `force`, one line.
    pub refusal: Option<String>,
    /// Set if the group is active already.
    pub active: Option<ActiveStatus>,
    /// Its disks.
    pub volumes: Vec<CopyVolume>,
    /// Hooks that it would run.
    #[serde(default)]
    pub hooks: Vec<PlannedHook>,
    /// Bytes that are moved: none, whatever the size of the disks.
    pub bytes_to_move: u64,
}

/// `POST /v1/failover`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailoverRequest {
    /// `GROUP` or `CLIENT/GROUP`.
    pub group: String,
    /// The point, or a name of it; the newest by default.
    pub point: Option<String>,
    /// `unix:PATH` or `tcp:IP:PORT`.
    pub export: String,
    /// Also if the primary is alive.
    #[serde(default)]
    pub force: bool,
    /// Also if the hook before it fails.
    #[serde(default)]
    pub ignore_hooks: bool,
}

/// The answer to a [`FailoverRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FailoverDone {
    /// Whose.
    pub client: Name,
    /// The group.
    pub group: Name,
    /// What was activated.
    pub point: Point,
    /// The generation that holds now.
    pub generation: Generation,
    /// Where the disks are.
    pub export: String,
    /// Its disks, each an export of its name.
    pub volumes: Vec<CopyVolume>,
    /// Milliseconds from the request to the disks being served, that of the hook before it included.
    pub took_ms: u64,
    /// Hooks that ended so far.
    #[serde(default)]
    pub hooks: Vec<HookRun>,
    /// Number of the run of the hook that follows.
    #[serde(default)]
    pub post_hook: Option<u64>,
}

/// `POST /v1/verify`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifyRequest {
    /// The group, at its primary.
    pub group: String,
}

/// The answer to a [`VerifyRequest`], and to `GET /v1/verify?group=`: how the comparison that runs fares, or the last one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Verification {
    /// The group.
    pub group: Name,
    /// Where the session with the receiver stands: without one it waits.
    pub state: LinkState,
    /// How far it is.
    #[serde(flatten)]
    pub verify: VerifyStatus,
}

/// Any answer that is not 200.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ApiError {
    /// One line.
    pub error: String,
    /// Set if nothing failed, but doing it would be dangerous as things are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
}

/// What makes it dangerous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Refused {
    /// The primary is alive; `force` does it nevertheless.
    PrimaryAlive,
    /// What went onward was failed over at the third site; `force` does it nevertheless.
    ThirdSite,
}

/// What NBD clients call the disk `disk` at `address` (`unix:…` or `tcp:…`) without TLS.
#[must_use]
pub fn nbd_uri(address: &str, disk: &str) -> String {
    match address.split_once(':') {
        Some(("unix", path)) => format!("nbd+unix:///{disk}?socket={path}"),
        Some((_, address)) => format!("nbd://{address}/{disk}"),
        None => address.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_is_named_as_clients_name_it() {
        assert_eq!(nbd_uri("unix:/run/a.sock", "root"), "nbd+unix:///root?socket=/run/a.sock");
        assert_eq!(nbd_uri("tcp:127.0.0.1:10809", "root"), "nbd://127.0.0.1:10809/root");
        let at = |address: &str| ExportStatus {
            address: address.to_owned(),
            tls: true,
            disks: Vec::new(),
            connections: Vec::new(),
            connections_max: 64,
        };
        assert_eq!(at("tcp:127.0.0.1:10809").uri("root"), "nbds://127.0.0.1:10809/root");
    }
}

/// `POST /v1/handback` and `POST /v1/handback/plan`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandbackRequest {
    /// The group; this node has its disks.
    pub group: String,
    /// The point to go back to, or the name that it has at the receiver (rollback); `None`: what the activated copy has become (failback).
    pub point: Option<String>,
    /// Go on if the hook before it fails.
    #[serde(default)]
    pub ignore_hooks: bool,
}

/// The answer to `POST /v1/handback/plan`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PlannedHandback {
    /// What it would do.
    #[serde(flatten)]
    pub plan: HandbackPlan,
    /// The hooks that it would run at this node.
    #[serde(default)]
    pub hooks: Vec<PlannedHook>,
}

/// `GET /v1/handback`, and the answer to its `POST`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HandbackProgress {
    /// The group.
    pub group: Name,
    /// The handback that runs, or the last one.
    pub handback: HandbackStatus,
}

/// `POST /v1/switchover`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwitchoverRequest {
    /// `group` or `client/group`.
    pub group: String,
    /// Where the disks are served.
    pub export: String,
    /// How long the primary may take to commit what it has; a minute by default.
    pub within_ms: Option<u64>,
    /// Go on if the hook before it fails.
    #[serde(default)]
    pub ignore_hooks: bool,
}
