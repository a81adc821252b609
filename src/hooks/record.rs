//! The newest runs of hooks, kept across restarts: a small JSON file in the state folder, replaced whole.
//!
//! A file that cannot be read or written never keeps a hook, and with it a failover, from running: it is said, and the runs are known
//! until the node ends.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

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
    runs: Mutex<VecDeque<HookRun>>,
    /// Held while the file is written; the runs are looked at meanwhile.
    writing: Mutex<()>,
}

impl HookRecord {
    pub(super) fn open(state_dir: &Path) -> Self {
        let path = state_dir.join(FILE);
        let (path, mut runs) = match files::read_json::<VecDeque<HookRun>>(&path) {
            Ok(runs) => (Some(path), runs),
            Err(error) => {
                tracing::error!("{}: {error}: remove it; until then runs of hooks are not recorded", path.display());
                (None, VecDeque::new())
            }
        };
        runs.iter_mut().filter(|run| run.outcome == HookOutcome::Running).for_each(|run| {
            run.outcome = HookOutcome::Interrupted;
        });
        Self { path, runs: Mutex::new(runs), writing: Mutex::new(()) }
    }

    pub(super) fn begun(&self, run: HookRun) -> HookRun {
        let run = {
            let mut runs = self.runs.lock();
            let run = HookRun { number: runs.back().map_or(1, |last| last.number + 1), ..run };
            runs.push_back(run.clone());
            while runs.len() > RUNS_MAX {
                runs.pop_front();
            }
            run
        };
        self.keep();
        run
    }

    pub(super) fn ended(&self, run: &HookRun) {
        if let Some(known) = self.runs.lock().iter_mut().find(|known| known.number == run.number) {
            *known = run.clone();
        }
        self.keep();
    }

    pub(super) fn runs(&self) -> Vec<HookRun> {
        self.runs.lock().iter().cloned().collect()
    }

    pub(super) fn newest(&self) -> Vec<HookRun> {
        let mut newest: Vec<HookRun> = Vec::new();
        for run in self.runs.lock().iter().rev() {
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
        let kept = blockdev::blocking(|| {
            // Whoever writes last writes the newest.
            let _alone = self.writing.lock();
            let text = serde_json::to_vec(&*self.runs.lock())?;
            files::replace(path, &text)
        });
        if let Err(error) = kept {
            tracing::error!("{}: cannot record a hook: {error}", path.display());
        }
    }
}
