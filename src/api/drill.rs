//! Drills, their results, and points that are read as a whole.

use proto::{Name, Point};
use serde::{Deserialize, Serialize};

use super::CopyVolume;
pub use receiver::drill::{DrillOutcome, DrillResult};

/// `POST /v1/drill`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrillRequest {
    /// `GROUP` or `CLIENT/GROUP`.
    pub group: String,
    /// The point, or a name of it; the newest by default.
    pub point: Option<String>,
    /// A kept fork, in place of a point.
    #[serde(default)]
    pub fork: Option<Name>,
    /// Its name; `drill-N` by default. `drill-` is put before a name that does not begin so.
    pub name: Option<String>,
    /// `unix:PATH` or `tcp:IP:PORT`; `None`: a private socket, for a drill that somebody holds with `POST /v1/drill/hold`.
    pub export: Option<String>,
    /// Bytes that it may take; the node's `drill_space_max` by default.
    pub space_max_bytes: Option<u64>,
    /// The script that is going to be run.
    pub script: Option<String>,
    /// Go on if the hook before it fails.
    #[serde(default)]
    pub ignore_hooks: bool,
    /// No drill: the point or fork itself, read-only, at a private socket. What `twinsite export` reads from.
    #[serde(default)]
    pub read_only: bool,
}

/// The answer to a [`DrillRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DrillStarted {
    /// Its name. Free again when it has ended.
    pub name: String,
    /// Of this drill alone.
    pub serial: u64,
    /// Whose.
    pub client: Name,
    /// The group.
    pub group: Name,
    /// The point, or that under the kept fork.
    pub point: Point,
    /// The kept fork that it is of.
    #[serde(default)]
    pub fork: Option<Name>,
    /// The point's cut, microseconds since 1970 on the primary's clock.
    pub cut_unix_us: u64,
    /// Where its disks are.
    pub export: String,
    /// Its disks, each an export of its name.
    pub volumes: Vec<CopyVolume>,
    /// Bytes that it may take.
    pub space_max_bytes: u64,
    /// Milliseconds from the request to the disks being served.
    pub took_ms: u64,
}

/// `POST /v1/drill/hold`, answered when the drill has ended. A drill that is held ends when this connection does.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrillHold {
    /// The drill.
    pub name: String,
    /// That of [`DrillStarted`]: a request that comes late must not hold another drill of this name.
    pub serial: u64,
}

/// `POST /v1/drill/end`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrillEnd {
    /// The drill.
    pub name: String,
    /// That of [`DrillStarted`], if only that one is meant.
    #[serde(default)]
    pub serial: Option<u64>,
    /// What its script found, to be kept.
    pub report: Option<DrillReport>,
}

/// What a script found.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrillReport {
    /// How it ended.
    pub outcome: DrillOutcome,
    /// How long it ran, in ms.
    pub took_ms: u64,
    /// The last line that it printed.
    pub remark: String,
    /// The end of what it printed.
    pub output: String,
}

/// The answer to a [`DrillEnd`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DrillEnded {
    /// The drill.
    pub name: String,
    /// What its script found.
    pub result: Option<DrillResult>,
    /// Whether that is kept on the point; that of a kept fork is not, which is another disk than the point.
    #[serde(default)]
    pub recorded: bool,
}

/// A drill that runs, or a point that is being read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DrillStatus {
    /// Its name.
    pub name: String,
    /// Whose.
    pub client: Name,
    /// The group.
    pub group: Name,
    /// Its point, once it is made.
    pub point: Option<Point>,
    /// The kept fork that it is of.
    #[serde(default)]
    pub fork: Option<Name>,
    /// Where its disks are, once they are.
    pub export: Option<String>,
    /// When it began, microseconds since 1970.
    pub began_unix_us: u64,
    /// The script that is run.
    pub script: Option<String>,
    /// Whether the schedule began it.
    pub scheduled: bool,
    /// A point that is only read.
    pub read_only: bool,
    /// Bytes of blocks written to it.
    pub space_used_bytes: u64,
    /// Bytes that it may take.
    pub space_max_bytes: u64,
    /// Writes that failed because there was no space.
    pub refused_writes: u64,
}

/// `GET /v1/drills`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DrillList {
    /// By name.
    pub drills: Vec<DrillStatus>,
    /// Drills at once at most.
    pub drills_max: u64,
}

/// `GET /v1/drill/results?group=`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DrillResults {
    /// Whose.
    pub client: Name,
    /// The group.
    pub group: Name,
    /// Oldest first.
    pub results: Vec<DrillResult>,
}
