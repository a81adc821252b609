//! A disk for simulations: a real folder, and beside it the knowledge of what of it is durable.
//!
//! What it injects: power loss (see `model`), a process killed at a chosen change, a full disk, one failing sync, a flipped bit.
//! What must survive: every commit that was acknowledged, and the newest generation that was answered.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::model::{Change, Fate, Model, Unit, write_content, write_image};
use crate::disk::{Disk, Op, Watch};

/// A disk that can lose its power.
#[derive(Debug)]
pub struct SimDisk {
    root: PathBuf,
    state: Arc<Watcher>,
}

#[derive(Debug)]
struct Watcher {
    root: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    model: Model,
    trace: Option<Vec<Change>>,
    /// Changes still made before the process dies.
    changes_left: Option<u64>,
    changes: u64,
    /// Bytes that still fit.
    room: Option<u64>,
    fail_sync: bool,
}

impl Watch for Watcher {
    fn in_one_thread(&self) -> bool {
        true
    }

    fn before(&self, op: &Op<'_>) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.changes_left == Some(0) {
            return Err(io::Error::other("the process is dead"));
        }
        match op {
            Op::Sync(path) if std::mem::take(&mut state.fail_sync) => {
                state.model.fail_sync(path.strip_prefix(&self.root).unwrap_or(path));
                return Err(io::Error::other("the disk failed to sync"));
            }
            Op::Write { file, offset, bytes } => {
                let Some(room) = state.room else { return Ok(()) };
                state.room = Some(room.saturating_sub(bytes.len() as u64));
                if let Some(fits) = usize::try_from(room).ok().filter(|r| *r < bytes.len()).and_then(|r| bytes.get(..r)) {
                    // As a full disk does: what fits is there, and then the write fails.
                    std::fs::OpenOptions::new().write(true).open(file)?.write_all_at(fits, *offset)?;
                    let op = Op::Write { file, offset: *offset, bytes: fits };
                    state.model.apply(&Change::new(&op, &self.root));
                    return Err(io::ErrorKind::StorageFull.into());
                }
            }
            Op::CreateFile(_) | Op::CreateFolder(_) if state.room == Some(0) => return Err(io::ErrorKind::StorageFull.into()),
            _ => {}
        }
        Ok(())
    }

    fn done(&self, op: &Op<'_>) {
        let mut state = self.state.lock();
        let change = Change::new(op, &self.root);
        let lost = if let Change::Forget(path) = &change { state.model.doomed(path) } else { false };
        state.model.apply(&change);
        if lost
            && let (Op::Forget(path), Change::Forget(inside)) = (op, &change)
            && let Some(content) = state.model.content(inside)
            && let Err(error) = write_content(path, &content)
        {
            panic!("{}: cannot simulate the loss of a failed sync: {error}", path.display());
        }
        state.changes += 1;
        if let Some(left) = &mut state.changes_left {
            *left -= 1;
        }
        if let Some(trace) = &mut state.trace {
            trace.push(change);
        }
    }
}

impl SimDisk {
    /// A disk whose root is `root`: an existing, empty folder, better one in memory.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        let state = State { model: Model::new(), trace: None, changes_left: None, changes: 0, room: None, fail_sync: false };
        let watcher = Watcher { root: root.to_owned(), state: Mutex::new(state) };
        Self { root: root.to_owned(), state: Arc::new(watcher) }
    }

    /// The disk as a store takes it.
    #[must_use]
    pub fn disk(&self) -> Disk {
        Disk::watched(Arc::clone(&self.state) as Arc<dyn Watch>)
    }

    /// Its root folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Changes that were made so far; a crash can be set at any later one.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.state.state.lock().changes
    }

    /// The process dies after so many more changes: every one after them fails. Whatever it said since then, nobody heard:
    /// once [`is_dead`](Self::is_dead), outputs of the call that it died in are to be dropped.
    pub fn die_after(&self, changes: u64) {
        self.state.state.lock().changes_left = Some(changes);
    }

    /// Whether the process died.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.state.state.lock().changes_left == Some(0)
    }

    /// From now on so many bytes can still be written, and after them nothing is created either; `None`: there is room again.
    /// The write that does not fit is there in part.
    pub fn set_room(&self, bytes: Option<u64>) {
        self.state.state.lock().room = bytes;
    }

    /// The next sync of a file fails. What it was to cover stays readable and is not durable, whatever is synced later.
    pub fn fail_next_sync(&self) {
        self.state.state.lock().fail_sync = true;
    }

    /// A bit of a file rots. `path` is relative to the root.
    ///
    /// # Errors
    /// The file is not there, or shorter.
    pub fn flip(&self, path: &Path, offset: u64, bit: u8) -> io::Result<()> {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(self.root.join(path))?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset)?;
        file.write_all_at(&[byte[0] ^ (1 << (bit % 8))], offset)?;
        self.state.state.lock().model.flip(path, offset, bit);
        Ok(())
    }

    /// The process was killed and its [`Replica`](super::Replica) dropped: what it wrote is there, durable or not, and a new
    /// process can begin.
    pub fn restart(&self) {
        self.state.state.lock().changes_left = None;
    }

    /// The power fails. The replica must have been dropped. `choose(n)` gives a number below `n`; it decides what becomes of
    /// every change that was not durable: kept, lost, or, for a write, some of its sectors. Always 0 keeps everything.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn crash(&self, mut choose: impl FnMut(u32) -> u32) -> io::Result<()> {
        let mut state = self.state.state.lock();
        let fates: std::collections::BTreeMap<u64, Fate> =
            state.model.units().iter().map(|unit| (unit.at, chosen(unit, &mut choose))).collect();
        let image = state.model.image(&mut |at| fates.get(&at).cloned().unwrap_or(Fate::Lost));
        write_image(&self.root, &image)?;
        state.model = Model::of(&image);
        state.changes_left = None;
        state.fail_sync = false;
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn traced(root: &Path) -> Self {
        let this = Self::new(root);
        this.state.state.lock().trace = Some(Vec::new());
        this
    }

    /// As [`traced`](Self::traced), over what a crash left in the folder.
    #[cfg(test)]
    pub(super) fn traced_from(root: &Path, image: &super::model::Image) -> Self {
        let this = Self::traced(root);
        this.state.state.lock().model = Model::of(image);
        this
    }

    #[cfg(test)]
    pub(super) fn trace(&self) -> Vec<Change> {
        self.state.state.lock().trace.clone().unwrap_or_default()
    }
}

/// A fate for a unit: half kept, a quarter lost, a quarter torn if it can be.
pub(super) fn chosen(unit: &Unit, choose: &mut impl FnMut(u32) -> u32) -> Fate {
    match choose(4) {
        0 | 1 => Fate::Kept,
        2 => Fate::Lost,
        _ if unit.sectors == 0 => Fate::Lost,
        _ => Fate::Torn {
            kept: (0..unit.sectors).map(|_| choose(2) == 0).collect(),
            grown: choose(2) == 0,
            garbage: choose(2) == 1,
        },
    }
}
