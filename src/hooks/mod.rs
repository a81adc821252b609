//! Hooks: programs of the administrator that are run before and after a transition, for addresses, licences, queues, names.
//!
//! Owns which hook there is for a group, its run, and the record of the newest runs. Always holds: a hook gets nothing of the node's
//! environment beyond PATH, HOME and LANG, and no descriptor; none runs longer than its limit and the grace after it; what it prints is bounded; a
//! file that others may change is never run. Must not know what a transition does: whoever makes one calls [`Hooks::run`] before, and
//! [`Hooks::begin`] after, and decides what a failure means.

mod file;
mod process;
mod record;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proto::{Generation, Name, Point};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

pub(crate) use file::check;
use process::Spawner;
use record::HookRecord;

use crate::api::{HookOutcome, HookRun, PlannedHook};
use crate::config::HooksConfig;
pub(crate) use crate::config::{Hook, Phase, Transition};

/// What a hook is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Facts {
    /// Whose group; `None` at its primary.
    pub(crate) client: Option<Name>,
    pub(crate) group: Name,
    pub(crate) point: Option<Point>,
    /// The generation that holds after the transition.
    pub(crate) generation: Generation,
    /// Where the disks are, or will be.
    pub(crate) export: Option<String>,
    /// Name, size in bytes, and what an NBD client calls it.
    pub(crate) disks: Vec<(Name, u64, Option<String>)>,
    /// The transition was made before, and is asked for again.
    pub(crate) repeated: bool,
    /// Which drill it is, if it is one.
    pub(crate) drill: Option<DrillFacts>,
}

/// What a hook is told of a drill.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct DrillFacts {
    pub(crate) name: String,
    /// The kept fork that it is of.
    pub(crate) fork: Option<Name>,
}

impl Facts {
    /// `group`, or `client/group` at a receiver.
    fn selector(&self) -> String {
        self.client.as_ref().map_or_else(|| self.group.to_string(), |client| format!("{client}/{}", self.group))
    }
}

/// Why a transition should not go on, or what its hook did not do. One line.
#[derive(Debug, thiserror::Error)]
#[error("hook {hook} ({}) {outcome}{}", path.display(), last_words(output))]
pub(crate) struct HookError {
    pub(crate) hook: &'static str,
    pub(crate) path: PathBuf,
    pub(crate) outcome: HookOutcome,
    output: String,
}

/// Longest part of a hook's output in a message, in characters.
const LAST_WORDS_CHARS: usize = 200;

fn last_words(output: &str) -> String {
    let last = output.lines().rev().find(|line| !line.trim().is_empty());
    last.map_or_else(String::new, |line| {
        let shown: String = line.trim().chars().take(LAST_WORDS_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect();
        format!("; it said: {shown}")
    })
}

/// The hooks of a node.
pub(crate) struct Hooks {
    config: HooksConfig,
    node: String,
    spawner: Spawner,
    record: HookRecord,
}

impl Hooks {
    /// Call it on a thread of normal priority: what hooks start has that of this one, and may be the server.
    pub(crate) fn open(config: HooksConfig, node: &str, state_dir: &Path) -> std::io::Result<Arc<Self>> {
        for (hook, path) in config.all() {
            if let Err(problem) = check(path) {
                tracing::error!(hook = hook.name(), "{} {problem}; until then what it belongs to is refused", path.display());
            }
        }
        let record = HookRecord::open(state_dir);
        Ok(Arc::new(Self { config, node: node.to_owned(), spawner: Spawner::start()?, record }))
    }

    /// What `transition` of a group would run.
    pub(crate) fn planned(&self, transition: Transition, client: Option<&Name>, group: &Name) -> Vec<PlannedHook> {
        let one = |phase| {
            let hook = Hook::Of(transition, phase);
            let path = self.config.find(hook, client, group)?;
            let problem = check(path).err().map(|problem| format!("{} {problem}", path.display()));
            let limit_ms = millis(self.config.timeout + process::GRACE);
            Some(PlannedHook { hook: hook.name().to_owned(), path: path.to_owned(), limit_ms, problem })
        };
        [Phase::Pre, Phase::Post].into_iter().filter_map(one).collect()
    }

    /// Runs the hook of a transition to its end, if there is one. Nothing is done about a failure but to log and record it.
    pub(crate) async fn run(&self, transition: Transition, phase: Phase, facts: &Facts) -> Result<Option<HookRun>, HookError> {
        let hook = Hook::Of(transition, phase);
        match self.enter(hook, facts) {
            Some(run) => self.perform(hook, facts, run).await.map(Some),
            None => Ok(None),
        }
    }

    /// Starts the hook of a transition and does not wait for it. Returns the number of its run, if there is one.
    pub(crate) fn begin(self: &Arc<Self>, transition: Transition, phase: Phase, facts: Facts) -> Option<u64> {
        self.begin_hook(Hook::Of(transition, phase), facts).map(|(number, _)| number)
    }

    /// As [`Self::begin`], for one that may wait for its end.
    pub(crate) fn begin_awaited(self: &Arc<Self>, transition: Transition, phase: Phase, facts: Facts) -> Option<JoinHandle<()>> {
        self.begin_hook(Hook::Of(transition, phase), facts).map(|(_, running)| running)
    }

    /// Starts the hook of a node that learned that its group is fenced.
    pub(crate) fn fenced(self: &Arc<Self>, facts: Facts) {
        self.begin_hook(Hook::Fenced, facts);
    }

    fn begin_hook(self: &Arc<Self>, hook: Hook, facts: Facts) -> Option<(u64, JoinHandle<()>)> {
        let run = self.enter(hook, &facts)?;
        let number = run.number;
        let this = Arc::clone(self);
        let running = tokio::spawn(async move {
            // The log and the record have it.
            let _ = this.perform(hook, &facts, run).await;
        });
        Some((number, running))
    }

    /// Whether there is a hook after drills of this group.
    pub(crate) fn follows_drill(&self, facts: &Facts) -> bool {
        self.config.find(Hook::Of(Transition::Drill, Phase::Post), facts.client.as_ref(), &facts.group).is_some()
    }

    /// The newest runs, oldest first.
    pub(crate) fn runs(&self) -> Vec<HookRun> {
        self.record.runs()
    }

    /// The newest run of each hook and group, with the end of its output only.
    pub(crate) fn newest(&self) -> Vec<HookRun> {
        self.record.newest()
    }

    fn enter(&self, hook: Hook, facts: &Facts) -> Option<HookRun> {
        let path = self.config.find(hook, facts.client.as_ref(), &facts.group)?;
        let run = HookRun {
            number: 0,
            hook: hook.name().to_owned(),
            client: facts.client.clone(),
            group: facts.group.clone(),
            point: facts.point,
            generation: facts.generation,
            path: path.to_owned(),
            started_unix_us: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, micros),
            duration_ms: None,
            outcome: HookOutcome::Running,
            output: String::new(),
            output_bytes_left_out: 0,
        };
        Some(self.record.begun(run))
    }

    async fn perform(&self, hook: Hook, facts: &Facts, mut run: HookRun) -> Result<HookRun, HookError> {
        let group = facts.selector();
        tracing::info!(group, hook = hook.name(), path = %run.path.display(), "hook runs");
        let environment = self.environment(hook, facts);
        let ended = process::run(&self.spawner, &run.path, environment, self.config.timeout).await;
        run.duration_ms = Some(millis(ended.took));
        run.outcome = ended.outcome;
        (run.output, run.output_bytes_left_out) = ended.output.into_text();
        self.record.ended(&run);
        let (took_ms, output_bytes) = (run.duration_ms.unwrap_or_default(), run.output.len() as u64 + run.output_bytes_left_out);
        if run.outcome == HookOutcome::Succeeded {
            tracing::info!(group, hook = hook.name(), took_ms, output_bytes, "hook succeeded");
            return Ok(run);
        }
        tracing::error!(group, hook = hook.name(), took_ms, output_bytes, "hook {} {}", run.path.display(), run.outcome);
        Err(HookError { hook: hook.name(), path: run.path, outcome: run.outcome, output: run.output })
    }

    fn environment(&self, hook: Hook, facts: &Facts) -> Vec<(&'static str, OsString)> {
        let inherited = |name: &'static str, otherwise: &str| (name, std::env::var_os(name).unwrap_or_else(|| otherwise.into()));
        let mut all = vec![inherited("PATH", process::PATH_DEFAULT), inherited("HOME", "/"), inherited("LANG", "C.UTF-8")];
        let text = |value: Option<String>| OsString::from(value.unwrap_or_default());
        let disks: Vec<String> =
            facts.disks.iter().map(|(name, bytes, uri)| format!("{name} {bytes} {}", uri.as_deref().unwrap_or("-"))).collect();
        all.extend([
            ("TWINSITE_HOOK", OsString::from(hook.name())),
            ("TWINSITE_NODE", OsString::from(&self.node)),
            ("TWINSITE_CLIENT", text(facts.client.as_ref().map(ToString::to_string))),
            ("TWINSITE_GROUP", OsString::from(facts.group.as_str())),
            ("TWINSITE_POINT", text(facts.point.map(|p| p.to_string()))),
            ("TWINSITE_GENERATION", OsString::from(facts.generation.to_string())),
            ("TWINSITE_EXPORT", text(facts.export.clone())),
            ("TWINSITE_DISKS", OsString::from(disks.join("\n"))),
            ("TWINSITE_REPEATED", OsString::from(if facts.repeated { "yes" } else { "no" })),
            ("TWINSITE_DRILL", text(facts.drill.as_ref().map(|drill| drill.name.clone()))),
            ("TWINSITE_FORK", text(facts.drill.as_ref().and_then(|drill| drill.fork.as_ref()).map(ToString::to_string))),
        ]);
        all
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
