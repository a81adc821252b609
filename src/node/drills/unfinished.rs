//! Drills after which a hook is to be run: a small JSON file in the state folder, replaced whole, so that a node that is killed runs it when it
//! starts again.
//!
//! A file that cannot be read or written keeps no drill from running: it is said.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use crate::files;
use crate::hooks::Facts;

/// Name of the file in the state folder.
const FILE: &str = "drills.json";

/// What their hooks are told, by name of the drill.
pub(super) struct Unfinished {
    path: PathBuf,
    drills: Mutex<BTreeMap<String, Facts>>,
    /// Held while the file is written.
    writing: Mutex<()>,
}

impl Unfinished {
    pub(super) fn open(state_dir: &Path) -> Self {
        let path = state_dir.join(FILE);
        let drills = files::read_json(&path).unwrap_or_else(|error| {
            tracing::error!("{}: {error}: hooks after drills of a former run are not run; it is begun anew", path.display());
            BTreeMap::new()
        });
        Self { path, drills: Mutex::new(drills), writing: Mutex::new(()) }
    }

    /// Those of a former run.
    pub(super) fn all(&self) -> Vec<(String, Facts)> {
        self.drills.lock().iter().map(|(name, facts)| (name.clone(), facts.clone())).collect()
    }

    pub(super) fn begun(&self, name: &str, facts: &Facts) {
        self.drills.lock().insert(name.to_owned(), facts.clone());
        self.keep();
    }

    /// To be called once the hook after it is on record.
    pub(super) fn ended(&self, name: &str) {
        let was_there = self.drills.lock().remove(name).is_some();
        if was_there {
            self.keep();
        }
    }

    fn keep(&self) {
        let kept = blockdev::blocking(|| {
            // Whoever writes last writes the newest.
            let _alone = self.writing.lock();
            let text = serde_json::to_vec(&*self.drills.lock())?;
            files::replace(&self.path, &text)
        });
        if let Err(error) = kept {
            tracing::error!(
                "{}: cannot record a drill: {error}: free space; if the node is killed, check what its hook prepared",
                self.path.display()
            );
        }
    }
}
