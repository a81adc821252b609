//! What the control socket says of hooks.

use std::path::PathBuf;

use proto::{Generation, Name, Point};
use serde::{Deserialize, Serialize};

/// `GET /v1/hooks`: the newest runs, oldest first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HookRuns {
    /// Those that run now included.
    pub runs: Vec<HookRun>,
}

/// One run of a hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookRun {
    /// Counts up for the life of the node's state folder.
    pub number: u64,
    /// `pre-failover` and so on.
    pub hook: String,
    /// Whose group; `None` at its primary.
    pub client: Option<Name>,
    /// The group.
    pub group: Name,
    /// The point, as the hook was told.
    pub point: Option<Point>,
    /// The generation, as the hook was told.
    pub generation: Generation,
    /// What was run.
    pub path: PathBuf,
    /// When, microseconds since 1970.
    pub started_unix_us: u64,
    /// How long it took in ms; `None` while it runs, or if the node ended meanwhile.
    pub duration_ms: Option<u64>,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: HookOutcome,
    /// The end of what it printed on both outputs, at most 64 KiB; in `status`, its last lines only.
    pub output: String,
    /// Bytes that it printed before that.
    pub output_bytes_left_out: u64,
}

/// What came of a hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum HookOutcome {
    /// It runs.
    Running,
    /// Exit code 0.
    Succeeded,
    /// Another exit code.
    Failed {
        /// The code.
        exit_code: i32,
    },
    /// A signal that was not ours ended it.
    Killed {
        /// The signal's number.
        signal: i32,
    },
    /// It did not end in time and was killed.
    TimedOut {
        /// The limit in ms.
        limit_ms: u64,
    },
    /// It could not be run.
    Refused {
        /// Why, one line.
        error: String,
    },
    /// The node ended while it ran: nobody knows what came of it.
    Interrupted,
}

impl std::fmt::Display for HookOutcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Running => f.write_str("runs"),
            Self::Succeeded => f.write_str("succeeded"),
            Self::Failed { exit_code } => write!(f, "failed with exit code {exit_code}"),
            Self::Killed { signal } => write!(f, "was killed by signal {signal}"),
            Self::TimedOut { limit_ms } => write!(f, "did not end within {limit_ms} ms and was killed"),
            Self::Refused { error } => write!(f, "was not run: {error}"),
            Self::Interrupted => f.write_str("ran when the node ended; what came of it is unknown"),
        }
    }
}

/// A hook that a transition would run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PlannedHook {
    /// `pre-failover` and so on.
    pub hook: String,
    /// What would be run.
    pub path: PathBuf,
    /// How long it may take in ms, before it is killed.
    pub limit_ms: u64,
    /// Why it would not be run, one line.
    pub problem: Option<String>,
}
