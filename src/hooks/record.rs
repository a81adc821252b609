//! The newest runs of hooks, kept across restarts: a small JSON file in the state folder, replaced whole.
//!
//! A file that cannot be read or written never keeps a hook, and with it a failover, from running: it is said, and the runs are known
//! until the node ends.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};

use crate::api::{HookOutcome, HookRun};
use crate::files;

/// Name of the file in the state folder.
const FILE: &str = "hooks.json";
/// Runs that are kept; beyond, the oldest goes.
pub(crate) const RUNS_MAX: usize = 32;
/// Most characters of a run's output in `status`.
const STATUS_OUTPUT_CHARS: usize = 400;

#[derive(Debug)]
pub(super) struct HookRecord {
    /// `None`: what is there is damaged, and stays as it is.
    path: Option<PathBuf>,
    runs: VecDeque<HookRun>,
}

impl HookRecord {
    pub(super) fn open(state_dir: &Path) -> Self {
        let path = state_dir.join(FILE);
        let mut record = match files::read_json(&path) {
            Ok(runs) => Self { path: Some(path), runs },
            Err(error) => {
                tracing::error!("{}: {error}: remove it; until then runs of hooks are not recorded", path.display());
                Self { path: None, runs: VecDeque::new() }
            }
        };
        record.runs.iter_mut().filter(|run| run.outcome == HookOutcome::Running).for_each(|run| {
            run.outcome = HookOutcome::Interrupted;
        });
        record
    }

    pub(super) fn begun(&mut self, run: HookRun) -> HookRun {
        let number = self.runs.back().map_or(1, |last| last.number + 1);
        let run = HookRun { number, ..run };
        self.runs.push_back(run.clone());
        while self.runs.len() > RUNS_MAX {
            self.runs.pop_front();
        }
        self.keep();
        run
    }

    pub(super) fn ended(&mut self, run: &HookRun) {
        if let Some(known) = self.runs.iter_mut().find(|known| known.number == run.number) {
            *known = run.clone();
        }
        self.keep();
    }

    pub(super) fn runs(&self) -> Vec<HookRun> {
        self.runs.iter().cloned().collect()
    }

    pub(super) fn newest(&self) -> Vec<HookRun> {
        let mut newest: Vec<HookRun> = Vec::new();
        for run in self.runs.iter().rev() {
            if !newest.iter().any(|n| n.hook == run.hook && n.client == run.client && n.group == run.group) {
                let skip = run.output.chars().count().saturating_sub(STATUS_OUTPUT_CHARS);
                newest.push(HookRun { output: run.output.chars().skip(skip).collect(), ..run.clone() });
            }
        }
        newest.reverse();
        newest
    }

    fn keep(&self) {
        let Some(path) = &self.path else { return };
        let kept = serde_json::to_vec(&self.runs).map_err(io::Error::from).and_then(|text| files::replace(path, &text));
        if let Err(error) = kept {
            tracing::error!("{}: cannot record a hook: {error}", path.display());
        }
    }
}
