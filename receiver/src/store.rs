//! The store's layout: `STORE/<client>/<group>/{superblock, base/, journal/, forks/}`, and the lock that keeps a second
//! process away.
//!
//! Names are `proto::Name` only, so a peer's text never leaves its folder. Folders are 0700 and files 0600: they hold disks.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use proto::Name;
use proto::fencing::GroupRole;
use rustix::fs::{FlockOperation, flock};

use crate::base::{SumsFile, sums_path};
use crate::disk::Disk;
use crate::superblock::{Superblock, SuperblockError, SuperblockFile, Volume};

/// The lock file. A leading dot is no name, so no client can be called like it.
const LOCK_FILE: &str = ".lock";
/// Width of the pid in the lock file: the next holder's is written over it, which takes no space.
const PID_WIDTH: usize = 20;
/// Prefix of a group's folder while it is being created.
const UNFINISHED_PREFIX: &str = ".new-";
/// Prefix of a group's folder while its base is copied.
const ADOPTING_PREFIX: &str = ".adopt-";
/// Space that a group keeps for its failover: a store is often full exactly when it is needed.
const RESERVE_FILE: &str = "reserve";
/// Enough for the folder and the maps of a fork of 64 volumes.
const RESERVE_BYTES: u64 = 1 << 20;

/// Why a store is refused.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has it.
    #[error("store {} belongs to a running node (pid {pid}): stop it, or ask it through its control socket", path.display())]
    InUse {
        /// The store.
        path: PathBuf,
        /// Who, as far as the lock file says.
        pid: String,
    },
    /// No store is there.
    #[error("{}: no store is there: name the folder that `store` in [receiver] names", path.display())]
    Missing {
        /// The folder.
        path: PathBuf,
    },
    /// A file or folder operation failed.
    #[error("{}: cannot {what}: {source}", path.display())]
    Io {
        /// What it was about.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The new group's superblock.
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
}

/// Adds path and action to an I/O error.
pub(crate) fn at<'a>(path: &'a Path, what: &'static str) -> impl FnOnce(io::Error) -> StoreError + 'a {
    move |source| StoreError::Io { path: path.to_owned(), what, source }
}

/// A store this process holds.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    disk: Disk,
    /// Dropping it gives the store up; the kernel does so after SIGKILL.
    _lock: File,
}

/// A group's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupFolder {
    /// The client it belongs to.
    pub client: Name,
    /// The group.
    pub group: Name,
    /// The folder.
    pub path: PathBuf,
}

impl GroupFolder {
    pub(crate) fn journal(&self) -> PathBuf {
        self.path.join("journal")
    }

    pub(crate) fn base(&self, volume: &Name) -> PathBuf {
        self.path.join("base").join(format!("{volume}.raw"))
    }

    /// Gives the space kept for a failover to the fork that is about to be made.
    pub(crate) fn release_reserve(&self, disk: &Disk) -> Result<(), StoreError> {
        let path = self.path.join(RESERVE_FILE);
        match disk.remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(at(&path, "release the reserve")(error)),
            _ => Ok(()),
        }
    }

    pub(crate) fn fork(&self, fork: &Name) -> PathBuf {
        self.path.join("forks").join(fork.as_str())
    }
}

impl Store {
    /// Opens the store at `root`, creating the folder if it is not there, and locks it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        Self::open_on(Disk::default(), root)
    }

    /// As [`open`](Self::open), on a disk of the caller.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open_on(disk: Disk, root: &Path) -> Result<Self, StoreError> {
        create_durably(&disk, root).map_err(at(root, "create the store"))?;
        Self::lock(disk, root)
    }

    /// Locks a store that must exist; a folder that never was one is left as it is.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn lock_existing(root: &Path) -> Result<Self, StoreError> {
        let lock = root.join(LOCK_FILE);
        match std::fs::metadata(&lock) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(StoreError::Missing { path: root.to_owned() }),
            found => found.map_err(at(&lock, "look at the store's lock"))?,
        };
        Self::lock(Disk::default(), root)
    }

    fn lock(disk: Disk, root: &Path) -> Result<Self, StoreError> {
        let path = root.join(LOCK_FILE);
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(at(&path, "open the lock file"))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                let _ = (&lock).take(PID_WIDTH as u64).read_to_string(&mut pid);
                let pid = pid.trim();
                let known = !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit());
                return Err(StoreError::InUse { path: root.to_owned(), pid: if known { pid } else { "unknown" }.to_owned() });
            }
            Err(error) => return Err(at(&path, "lock it")(error.into())),
        }
        // Never shorter in between: what a truncation gives back on a full disk, somebody else may take.
        let pid = format!("{:<PID_WIDTH$}\n", std::process::id());
        lock.write_all_at(pid.as_bytes(), 0)
            .and_then(|()| lock.set_len(pid.len() as u64))
            .map_err(at(&path, "write the lock file"))?;
        Ok(Self { root: root.to_owned(), disk, _lock: lock })
    }

    pub(crate) fn disk(&self) -> &Disk {
        &self.disk
    }

    /// The store's folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Every group of every client, in order. What a creation left unfinished is no group; what is none of ours is said so in
    /// the log and left alone.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn groups(&self) -> Result<Vec<GroupFolder>, StoreError> {
        let mut groups = Vec::new();
        for (client, path) in named_folders(&self.root, "client")? {
            for (group, path) in named_folders(&path, "group")? {
                groups.push(GroupFolder { client: client.clone(), group, path });
            }
        }
        groups.sort_by(|a, b| (&a.client, &a.group).cmp(&(&b.client, &b.group)));
        Ok(groups)
    }

    /// Makes the names of these groups durable: a process that was killed may have left one that only the page cache knows, and
    /// what is answered from here on is built on it.
    pub(crate) fn settle(&self, groups: &[GroupFolder]) -> Result<(), StoreError> {
        let clients: BTreeSet<&Path> = groups.iter().filter_map(|g| g.path.parent()).collect();
        if groups.is_empty() {
            return Ok(());
        }
        for folder in clients.into_iter().chain([self.root.as_path()]) {
            self.disk.sync_folder(folder).map_err(at(folder, "sync the folder"))?;
        }
        Ok(())
    }

    /// Creates a group's folder with an empty base, an empty journal and its first superblock. The folder appears
    /// under its name when all of it is durable.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn create_group(&self, client: &Name, group: &Name, block: Superblock) -> Result<GroupFolder, StoreError> {
        debug_assert!(block.role == GroupRole::Replica);
        let building = self.root.join(client.as_str()).join(format!("{UNFINISHED_PREFIX}{group}"));
        self.build(&building, block, &mut |path, volume| {
            let create = || {
                let file = self.disk.create_file(path)?;
                file.set_len(volume.size_bytes)?;
                file.sync_all()?;
                SumsFile::create(&self.disk, &sums_path(path), volume.size_bytes)?.sync()
            };
            create().map_err(at(path, "create the base"))
        })?;
        self.name_group(&building, client, group)
    }

    /// Where a group is built whose base is copied first; a start removes it.
    pub(crate) fn adopting(&self, client: &Name, group: &Name) -> PathBuf {
        self.root.join(client.as_str()).join(format!("{ADOPTING_PREFIX}{group}"))
    }

    /// Removes what was being adopted when the node was killed.
    pub(crate) fn sweep_adoptions(&self) -> Result<(), StoreError> {
        for (_, client) in named_folders(&self.root, "client")? {
            for entry in std::fs::read_dir(&client).map_err(at(&client, "list the folder"))? {
                let path = entry.map_err(at(&client, "list the folder"))?.path();
                if path.file_name().and_then(|n| n.to_str()).is_some_and(|name| name.starts_with(ADOPTING_PREFIX)) {
                    self.disk.remove_folder(&path).map_err(at(&path, "remove what an interrupted adopt left"))?;
                }
            }
        }
        Ok(())
    }

    /// Builds all of a group in a folder that is not its name yet; `base` makes the base of each volume and its checksums, durably, in
    /// their order.
    pub(crate) fn build<E: From<StoreError>>(
        &self,
        building: &Path,
        block: Superblock,
        base: &mut dyn FnMut(&Path, &Volume) -> Result<(), E>,
    ) -> Result<(), E> {
        let disk = &self.disk;
        if building.exists() {
            disk.remove_folder(building).map_err(at(building, "remove what a failed creation left"))?;
        }
        for sub in ["base", "journal", "forks"] {
            let path = building.join(sub);
            disk.create_folders(&path).map_err(at(&path, "create the folder"))?;
        }
        for volume in &block.volumes {
            base(&building.join("base").join(format!("{}.raw", volume.name)), volume)?;
        }
        let path = building.join(RESERVE_FILE);
        disk.create_file(&path)
            .and_then(|file| file.allocate(RESERVE_BYTES).and_then(|()| file.sync_all()))
            .map_err(at(&path, "reserve space for a failover"))?;
        SuperblockFile::create(disk, building, block).map_err(StoreError::from)?;
        for folder in [&building.join("base"), building] {
            disk.sync_folder(folder).map_err(at(folder, "sync the folder"))?;
        }
        Ok(())
    }

    /// Gives a group that was built its name.
    pub(crate) fn name_group(&self, building: &Path, client: &Name, group: &Name) -> Result<GroupFolder, StoreError> {
        let parent = self.root.join(client.as_str());
        let path = parent.join(group.as_str());
        self.disk.rename(building, &path).map_err(at(&path, "name the group's folder"))?;
        for folder in [&parent, &self.root] {
            self.disk.sync_folder(folder).map_err(at(folder, "sync the folder"))?;
        }
        Ok(GroupFolder { client: client.clone(), group: group.clone(), path })
    }
}

/// Creates a folder and its parents and makes their names durable.
///
/// An earlier start may have been killed after it created one and before it synced: the name of the deepest one that is there
/// is synced too, as far as its parent, which may be of another user, lets us.
fn create_durably(disk: &Disk, root: &Path) -> io::Result<()> {
    let missing = root.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists()).count();
    disk.create_folders(root)?;
    for (i, folder) in root.ancestors().take(missing + 1).enumerate() {
        let synced = match folder.parent() {
            Some(parent) if parent.as_os_str().is_empty() => disk.sync_folder(Path::new(".")),
            Some(parent) => disk.sync_folder(parent),
            None => Ok(()),
        };
        if i < missing {
            synced?;
        }
    }
    Ok(())
}

fn foreign(path: &Path, kind: &str) -> String {
    format!("{:?} is no folder of a {kind} and is left alone: move it out of the store", path)
}

fn named_folders(root: &Path, kind: &'static str) -> Result<Vec<(Name, PathBuf)>, StoreError> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root).map_err(at(root, "list the folder"))? {
        let path = entry.map_err(at(root, "list the folder"))?.path();
        let text = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if text.starts_with('.') || text == "lost+found" {
            continue;
        }
        match text.parse::<Name>() {
            Ok(name) if path.is_dir() => found.push((name, path)),
            // Of somebody's hand: no reason to keep the groups from their primaries.
            _ => tracing::warn!("{}", foreign(&path, kind)),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_told_who_has_the_store() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let error = Store::open(store.root()).unwrap_err().to_string();
        let wanted = format!("belongs to a running node (pid {})", std::process::id());
        assert!(error.contains(&wanted), "{error}");
        let root = store.root().to_owned();
        drop(store);
        Store::open(&root).unwrap();
    }

    /// Would catch a pid that is a mixture of two holders'.
    #[test]
    fn the_pid_is_written_over_the_former_one() {
        let dir = tempfile::tempdir().unwrap();
        let lock = dir.path().join(LOCK_FILE);
        for former in [String::new(), "7\n".to_owned(), "9".repeat(40)] {
            std::fs::write(&lock, former).unwrap();
            let store = Store::open(dir.path()).unwrap();
            let written = std::fs::read_to_string(&lock).unwrap();
            assert_eq!((written.trim(), written.len()), (std::process::id().to_string().as_str(), PID_WIDTH + 1));
            let error = Store::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains(&format!("(pid {})", std::process::id())), "{error}");
            drop(store);
        }
    }

    #[test]
    fn a_foreign_entry_is_named_and_the_groups_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        std::fs::create_dir_all(dir.path().join("a/db")).unwrap();
        std::fs::create_dir(dir.path().join("No Name\n")).unwrap();
        for file in ["notes", "a/notes"] {
            std::fs::write(dir.path().join(file), "x").unwrap();
        }
        let log = Log::default();
        let groups = tracing::subscriber::with_default(Collector(Log::clone(&log)), || store.groups()).unwrap();
        assert_eq!(groups.iter().map(|g| (g.client.as_str(), g.group.as_str())).collect::<Vec<_>>(), [("a", "db")]);
        let mut lines = log.lock().clone();
        lines.sort();
        let line = |entry: &str, kind| foreign(&dir.path().join(entry), kind);
        let mut wanted = [line("No Name\n", "client"), line("notes", "client"), line("a/notes", "group")];
        wanted.sort();
        assert_eq!(lines, wanted);
        assert!(wanted.iter().all(|l| !l.contains('\n')));
    }

    type Log = std::sync::Arc<parking_lot::Mutex<Vec<String>>>;

    /// Keeps the messages of warnings.
    struct Collector(Log);

    impl tracing::Subscriber for Collector {
        fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
            *metadata.level() == tracing::Level::WARN
        }
        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }
        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn event(&self, event: &tracing::Event<'_>) {
            struct Message<'a>(&'a Log);
            impl tracing::field::Visit for Message<'_> {
                fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                    if field.name() == "message" {
                        self.0.lock().push(format!("{value:?}"));
                    }
                }
            }
            event.record(&mut Message(&self.0));
        }
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}
    }
}
