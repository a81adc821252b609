//! The drills of a node: which there are, where they are exported, who holds them, how they end.
//!
//! Always holds: a drill that is in the list ends at the latest with the node; one at a private socket ends with the connection of whoever holds
//! it; none of them changes anything that replication or a failover has. Must not know what a fork is made of.

mod schedule;
mod start;
mod unfinished;

use std::collections::btree_map::Entry as Slot;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use proto::{Name, Point};
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub(crate) use self::schedule::{environment, report, run as run_schedule};
use self::unfinished::Unfinished;
use super::copies::GroupRef;
use super::{Node, RequestError};
use crate::api::{DrillEnd, DrillEnded, DrillHold, DrillReport, DrillResult, DrillResults, DrillStatus};
use crate::cli::human::unix_us_now;
use crate::hooks::{Facts, Phase, Transition};

/// Drills at once, with points that are being read. One more is refused.
pub(crate) const DRILLS_MAX: usize = 16;
/// Whoever wants a drill at a private socket has so long to hold it.
const HOLD_WITHIN: Duration = Duration::from_secs(10);

/// Why a drill is refused. One line each.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DrillRefused {
    #[error("no drill '{given}' runs here: {}", known_drills(known))]
    Unknown { given: String, known: Vec<String> },
    #[error("drill {name} runs already: choose another --name, or end that one: twinsite drill end {name}")]
    Taken { name: String },
    #[error("drill {name} is still being made: try again")]
    Unready { name: String },
    #[error("drill {name} is still being thrown away: try again")]
    Leaving { name: String },
    #[error("{DRILLS_MAX} drills run here, and no more may: end one, see twinsite drill list")]
    TooMany,
    #[error("name '{given}' makes no name of a drill: write 1 to 58 of a-z A-Z 0-9 . _ -")]
    Name { given: String },
    #[error("{}: cannot make the folder of the drill's private socket: {source}: free space or set another state_dir", path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("user '{user}' of the drill is not in /etc/passwd: name one that is")]
    NoUser { user: String },
    #[error("drill {name} has no script: nothing to report")]
    NoScript { name: String },
    #[error("{0}")]
    NoPoint(String),
    #[error("a point and a fork were given: a drill is of one of them")]
    PointAndFork,
}

fn known_drills(known: &[String]) -> String {
    if known.is_empty() { "there is none".to_owned() } else { format!("there are {}", known.join(", ")) }
}

/// What runs.
enum Running {
    Making,
    Drill(receiver::Drill),
    /// A point, or a kept fork, that is only read.
    Whole {
        point: Point,
        /// Keeps the fork from being removed.
        _reading: Option<receiver::kept::Reading>,
    },
}

struct Entry {
    /// Never used twice: a name may be.
    serial: u64,
    group: GroupRef,
    running: Running,
    began_unix_us: u64,
    /// Where it is offered.
    export: Option<String>,
    /// Of the private socket.
    folder: Option<PathBuf>,
    script: Option<String>,
    /// The kept fork that it is of.
    fork: Option<Name>,
    /// What the hook after it is told; `None` if none is to be run.
    facts: Option<Facts>,
    scheduled: bool,
    held: bool,
    /// Turns true at the end.
    ended: watch::Sender<bool>,
}

/// All of them.
pub(crate) struct Drills {
    /// Folders of private sockets; below the state folder.
    folder: PathBuf,
    space_max_bytes: u64,
    serial: AtomicU64,
    names: Mutex<Names>,
    unfinished: Unfinished,
}

#[derive(Default)]
struct Names {
    running: BTreeMap<String, Entry>,
    /// Being thrown away: folder, server and fork go by the name, so another drill gets it afterwards only.
    leaving: BTreeSet<String>,
}

impl Names {
    fn taken(&self) -> usize {
        self.running.len() + self.leaving.len()
    }

    fn is_free(&self, name: &str) -> bool {
        !self.running.contains_key(name) && !self.leaving.contains(name)
    }

    /// The drill of this name, if it is of this serial.
    fn find(&self, name: &str, serial: Option<u64>) -> Option<&Entry> {
        self.running.get(name).filter(|entry| serial.is_none_or(|serial| entry.serial == serial))
    }
}

/// A drill that is not in the list any more; its name is free when this is dropped.
struct Leaving<'a> {
    drills: &'a Drills,
    name: String,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.drills.names.lock().leaving.remove(&self.name);
    }
}

impl Drills {
    /// Removes what a run that was killed left of private sockets.
    pub(crate) fn new(state_dir: &Path, space_max_bytes: u64) -> Self {
        let folder = state_dir.join("drills");
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("{}: cannot remove what a former run left: {error}", folder.display());
            }
            _ => {}
        }
        // Not those of a former run either, if somebody remembers them.
        let (serial, unfinished) = (AtomicU64::new(unix_us_now()), Unfinished::open(state_dir));
        Self { folder, space_max_bytes, serial, names: Mutex::default(), unfinished }
    }

    /// What runs, by name.
    pub(crate) fn status(&self) -> Vec<DrillStatus> {
        let names = self.names.lock();
        names.running.iter().map(|(name, entry)| entry.status(name, self.space_max_bytes)).collect()
    }

    /// Takes a drill from the list, to be thrown away.
    fn take(&self, name: &str, serial: Option<u64>) -> Result<(Entry, Leaving<'_>), DrillRefused> {
        let mut names = self.names.lock();
        let entry = match names.running.entry(name.to_owned()) {
            Slot::Occupied(found) if serial.is_none_or(|serial| found.get().serial == serial) => {
                if matches!(found.get().running, Running::Making) {
                    return Err(DrillRefused::Unready { name: name.to_owned() });
                }
                found.remove()
            }
            _ => {
                drop(names);
                return Err(self.unknown(name));
            }
        };
        names.leaving.insert(name.to_owned());
        Ok((entry, Leaving { drills: self, name: name.to_owned() }))
    }

    fn unknown(&self, given: &str) -> DrillRefused {
        DrillRefused::Unknown { given: given.to_owned(), known: self.names.lock().running.keys().cloned().collect() }
    }

    /// The name as it is in the list.
    fn full_name(given: &str) -> String {
        let plain = given.starts_with(receiver::drill::DRILL_PREFIX) || given.starts_with("export-");
        if plain { given.to_owned() } else { format!("{}{given}", receiver::drill::DRILL_PREFIX) }
    }
}

impl Entry {
    fn status(&self, name: &str, space_max_bytes: u64) -> DrillStatus {
        let (point, space) = match &self.running {
            Running::Making => (None, None),
            Running::Drill(drill) => (Some(drill.point), Some(&drill.space)),
            Running::Whole { point, .. } => (Some(*point), None),
        };
        DrillStatus {
            name: name.to_owned(),
            client: self.group.client.clone(),
            group: self.group.group.clone(),
            point,
            fork: self.fork.clone(),
            export: self.export.clone(),
            began_unix_us: self.began_unix_us,
            script: self.script.clone(),
            scheduled: self.scheduled,
            read_only: matches!(self.running, Running::Whole { .. }),
            space_used_bytes: space.map_or(0, |s| s.used_bytes()),
            space_max_bytes: space.map_or(space_max_bytes, |s| s.max_bytes()),
            refused_writes: space.map_or(0, |s| s.refused_writes()),
        }
    }
}

/// Ends a drill when whoever holds it is gone.
struct Holder {
    node: Arc<Node>,
    name: String,
    serial: u64,
}

impl Drop for Holder {
    fn drop(&mut self) {
        let (node, name, serial) = (Arc::clone(&self.node), self.name.clone(), self.serial);
        // Outside of a runtime everything ends anyway.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { node.end_abandoned(&name, serial).await });
        }
    }
}

impl Node {
    /// Waits for the end of a drill; ends it if this is given up.
    pub(crate) async fn hold_drill(self: &Arc<Self>, hold: &DrillHold) -> Result<DrillEnded, RequestError> {
        let name = Drills::full_name(&hold.name);
        let held = self.drills.names.lock().running.get_mut(&name).filter(|entry| entry.serial == hold.serial).map(|entry| {
            entry.held = true;
            entry.ended.subscribe()
        });
        let mut ended = held.ok_or_else(|| self.drills.unknown(&hold.name))?;
        let _holder = Holder { node: Arc::clone(self), name: name.clone(), serial: hold.serial };
        // An error is the end, too.
        let _ = ended.wait_for(|ended| *ended).await;
        Ok(DrillEnded { name, result: None, recorded: false })
    }

    /// Ends a drill, and keeps what its script found.
    pub(crate) async fn end_drill(&self, end: DrillEnd) -> Result<DrillEnded, RequestError> {
        let name = Drills::full_name(&end.name);
        let result = match end.report {
            None => None,
            Some(report) => Some(self.reported(&name, end.serial, report)?),
        };
        let (entry, leaving) = self.drills.take(&name, end.serial)?;
        let group = entry.group.to_string();
        // On the point it would say what is true of the kept fork only.
        let recorded = result.is_some() && entry.fork.is_none();
        // The drill's fork goes whatever becomes of the record.
        let kept = match &result {
            Some(result) if recorded => self.keep(&group, result.clone()).await,
            _ => Ok(()),
        };
        self.throw_away(leaving, entry).await;
        kept?;
        Ok(DrillEnded { name, result, recorded })
    }

    /// As [`end_drill`](Self::end_drill), if it is still that one.
    async fn end_abandoned(&self, name: &str, serial: u64) {
        if let Ok((entry, leaving)) = self.drills.take(name, Some(serial)) {
            tracing::info!(drill = name, "whoever held it is gone");
            self.throw_away(leaving, entry).await;
        }
    }

    /// The result that a report makes.
    fn reported(&self, name: &str, serial: Option<u64>, report: DrillReport) -> Result<DrillResult, RequestError> {
        let names = self.drills.names.lock();
        let no_script = || DrillRefused::NoScript { name: name.to_owned() };
        let Some(entry) = names.find(name, serial) else {
            drop(names);
            return Err(self.drills.unknown(name).into());
        };
        let Running::Drill(drill) = &entry.running else { return Err(no_script().into()) };
        Ok(DrillResult {
            point: drill.point,
            cut_unix_us: drill.cut_unix_us,
            began_unix_us: entry.began_unix_us,
            took_ms: report.took_ms,
            outcome: report.outcome,
            scheduled: entry.scheduled,
            script: entry.script.clone().ok_or_else(no_script)?,
            remark: report.remark,
            output: report.output,
        })
    }

    async fn keep(&self, group: &str, result: DrillResult) -> Result<(), RequestError> {
        let (point, remark) = (result.point, result.remark.clone());
        if result.passed() {
            tracing::info!(group, %point, remark, took_ms = result.took_ms, "drill passed");
        } else {
            tracing::error!(group, %point, remark, took_ms = result.took_ms, outcome = ?result.outcome, "drill FAILED");
        }
        self.receiving()?.record_drill(group, result).await
    }

    /// Returns the run of the hook after it, if there is one.
    async fn throw_away(&self, leaving: Leaving<'_>, entry: Entry) -> Option<JoinHandle<()>> {
        let name = leaving.name.as_str();
        self.exports.withdraw(&selector(&entry.group, name)).await;
        {
            // A failover binds its address before it offers anything there: it must not lose it in between.
            let _record = self.record.lock().await;
            self.exports.prune().await;
        }
        if let Running::Drill(drill) = entry.running
            && let Ok(copies) = self.receiving()
            && let Err(error) = copies.end_drill(drill).await
        {
            tracing::error!(drill = name, "{error}; the next start of this node removes it");
        }
        if let Some(folder) = entry.folder
            && let Err(error) = std::fs::remove_dir_all(&folder)
        {
            tracing::warn!("{}: cannot be removed: {error}", folder.display());
        }
        tracing::info!(drill = name, group = %entry.group, "drill ended");
        let hook = entry.facts.and_then(|facts| self.hooks.begin_awaited(Transition::Drill, Phase::Post, facts));
        self.drills.unfinished.ended(name);
        drop(leaving);
        entry.ended.send_replace(true);
        hook
    }

    /// Runs the hooks after drills that a former run of this node, which was killed, had begun. Their forks are gone.
    pub(crate) fn finish_drills(&self) {
        for (name, facts) in self.drills.unfinished.all() {
            tracing::warn!(drill = name, group = %facts.group, "ended with the node, which was killed; its hook runs now");
            self.hooks.begin(Transition::Drill, Phase::Post, facts);
            self.drills.unfinished.ended(&name);
        }
    }

    /// Ends all of them, when the node stops. Returns the runs of the hooks after them.
    pub(crate) async fn end_drills(&self) -> Vec<JoinHandle<()>> {
        let all: Vec<String> = self.drills.names.lock().running.keys().cloned().collect();
        let mut hooks = Vec::new();
        for name in all {
            // Unready or gone: nothing to throw away.
            if let Ok((entry, leaving)) = self.drills.take(&name, None) {
                hooks.extend(self.throw_away(leaving, entry).await);
            }
        }
        hooks
    }

    pub(crate) async fn drill_results(&self, selector: &str) -> Result<DrillResults, RequestError> {
        let copies = self.receiving()?;
        let group = copies.find(selector).await?;
        let results = copies.drill_results(&group.to_string()).await?;
        Ok(DrillResults { client: group.client, group: group.group, results })
    }
}

/// What the NBD servers know a drill's disks by.
fn selector(group: &GroupRef, name: &str) -> String {
    format!("{group} {name}")
}
