//! Forks that keep what a primary had written of its own after the sites had parted: which there are, what they take, who reads them, how they go.
//!
//! Always holds: a kept fork is never written to and stays until a person removes it; while it is there its point stays, and what its files take
//! counts for its client's space. One that is damaged is told, holds all points, and can be removed like the others. A removal takes the name away first, durably, so a crash leaves a
//! whole fork or none.

mod arriving;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::UNIX_EPOCH;

use parking_lot::Mutex;
use proto::{Generation, Name, Point};
use serde::{Deserialize, Serialize};

pub(crate) use arriving::Arriving;

use crate::disk::Disk;
use crate::fork::{self, Access, ForkError, MapFile, OpenFork, Under};
use crate::group::{GroupError, Shared};
use crate::journal::GroupId;
use crate::pins::{Pin, Pins};
use crate::store::{GroupFolder, StoreError, at};
use crate::superblock::{ForkInUse, Volume};

/// What the name of every kept fork begins with, and of no other fork.
pub const KEPT_PREFIX: &str = "diverged-";
/// Kept forks that a group has at most; one more is not taken.
pub const KEPT_FORKS_MAX: usize = 16;
/// Names of forks whose blocks are on their way.
const ARRIVING_PREFIX: &str = "arriving-";
/// What is left of a removed fork is called so until it is gone. No name of a fork begins with a dot.
const GONE_PREFIX: &str = ".gone-";
/// Bytes of a block as `stat` counts them.
const STAT_BLOCK_BYTES: u64 = 512;

/// Why a kept fork is not kept, opened or removed.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// No such fork.
    #[error("group '{group}' keeps no fork '{given}': {}", known_forks(known, group))]
    Unknown {
        /// The group.
        group: Name,
        /// As given.
        given: Name,
        /// What it keeps.
        known: Vec<Name>,
    },
    /// Somebody reads it.
    #[error("fork '{fork}' of group '{group}' is being read: end its drills and exports first, see `twinsite drill list`")]
    InUse {
        /// The group.
        group: Name,
        /// The fork.
        fork: Name,
    },
    /// It cannot be trusted.
    #[error("fork '{fork}' of group '{group}' cannot be used: {error}")]
    Damaged {
        /// The group.
        group: Name,
        /// The fork.
        fork: Name,
        /// What is wrong, one line.
        error: String,
    },
    /// No further one is taken.
    #[error(
        "group '{group}' keeps {KEPT_FORKS_MAX} forks of its primary's own writes already: remove some at the receiver with `twinsite forks {group} --remove NAME`"
    )]
    Full {
        /// The group.
        group: Name,
    },
    /// Its client has no space.
    #[error("client '{client}' has no space left for what its primary wrote of its own ({bytes} bytes more): raise `space_max`")]
    Space {
        /// The client.
        client: Name,
        /// What does not fit.
        bytes: u64,
    },
    /// Its folder.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its files.
    #[error(transparent)]
    Fork(#[from] ForkError),
    /// Its point.
    #[error(transparent)]
    Group(#[from] GroupError),
}

fn known_forks(known: &[Name], group: &Name) -> String {
    match known {
        [] => "it keeps none".to_owned(),
        known => {
            let known: Vec<&str> = known.iter().map(Name::as_str).collect();
            format!("it keeps {}; see `twinsite forks {group}`", known.join(", "))
        }
    }
}

/// A kept fork, as it is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptFork {
    /// Its name.
    pub name: Name,
    /// The point that its blocks lie over: the newest that both sites knew.
    pub point: Option<Point>,
    /// The generation in which its primary wrote them.
    pub generation: Option<Generation>,
    /// When it was made, microseconds since 1970.
    pub made_unix_us: u64,
    /// Bytes of blocks that are its own.
    pub own_bytes: u64,
    /// Bytes that its files take.
    pub space_bytes: u64,
    /// Why it cannot be used, one line.
    pub error: Option<String>,
}

#[derive(Debug)]
struct Entry {
    told: KeptFork,
    /// Clones are with those who read it.
    readers: Arc<()>,
    _pin: Option<Pin>,
}

/// A kept fork is not removed while this lives.
#[derive(Clone, Debug)]
pub struct Reading(#[allow(dead_code, reason = "it is counted")] Arc<()>);

/// The kept forks of a group.
#[derive(Debug, Default)]
pub(crate) struct KeptForks {
    forks: Mutex<BTreeMap<Name, Entry>>,
    /// One comes or goes at a time.
    changing: Mutex<()>,
    /// Of folders that cannot be listed, or whose name is none.
    _strays: Vec<Pin>,
}

impl KeptForks {
    /// Finds the forks of a group, and removes what a killed node left of one that arrived or went. Needs `oldest`, the oldest point, to be held
    /// on account of what cannot be read.
    pub(crate) fn open(
        disk: &Disk,
        folder: &GroupFolder,
        (group_id, volumes): (GroupId, &[Volume]),
        pins: &Arc<Pins>,
        oldest: Option<Point>,
    ) -> Self {
        let mut kept = Self::default();
        let parent = folder.path.join("forks");
        let names = match sweep(disk, &parent) {
            Ok(names) => names,
            Err(error) => {
                tracing::error!("{}: {error}; nothing is folded until that is mended", folder.path.display());
                kept._strays.extend(oldest.map(|point| pins.pin(point)));
                return kept;
            }
        };
        for name in names {
            let path = parent.join(&name);
            let Ok(name) = name.parse::<Name>() else {
                tracing::error!("{path:?} has no name of a fork: rename it; nothing is folded until that is mended");
                kept._strays.extend(oldest.map(|point| pins.pin(point)));
                continue;
            };
            let made_unix_us = volumes.first().and_then(|v| modified_unix_us(&path.join(format!("{}.map", v.name)))).unwrap_or(0);
            let (point, own_bytes, error) = match look(disk, &path, group_id, volumes) {
                Ok((point, own_bytes)) => (Some(point), own_bytes, None),
                Err(error) => {
                    tracing::error!("{}: {error}; nothing is folded until that is mended, or the fork removed", path.display());
                    (None, 0, Some(error.to_string()))
                }
            };
            let space_bytes = space(&path).unwrap_or_else(|error| {
                tracing::error!("{}", at(&path, "find out what it takes")(error));
                0
            });
            let told = KeptFork {
                generation: generation(&name),
                name: name.clone(),
                point,
                made_unix_us,
                own_bytes,
                space_bytes,
                error,
            };
            let pin = point.or(oldest).map(|point| pins.pin(point));
            kept.forks.get_mut().insert(name, Entry { told, readers: Arc::default(), _pin: pin });
        }
        kept
    }

    /// By name.
    pub(crate) fn all(&self) -> Vec<KeptFork> {
        self.forks.lock().values().map(|entry| entry.told.clone()).collect()
    }

    /// Bytes that all of them take.
    pub(crate) fn space_bytes(&self) -> u64 {
        self.forks.lock().values().map(|entry| entry.told.space_bytes).sum()
    }

    fn unknown(&self, group: &Name, given: &Name) -> KeptError {
        KeptError::Unknown { group: group.clone(), given: given.clone(), known: self.forks.lock().keys().cloned().collect() }
    }

    /// The point of a fork that stays as long as the second one lives.
    fn read(&self, group: &Name, name: &Name) -> Result<(Point, Reading), KeptError> {
        let found = self.forks.lock().get(name).map(|entry| (entry.told.clone(), Reading(Arc::clone(&entry.readers))));
        let (told, reading) = found.ok_or_else(|| self.unknown(group, name))?;
        let damaged = || KeptError::Damaged {
            group: group.clone(),
            fork: name.clone(),
            error: told.error.clone().unwrap_or_else(|| "it has no point".to_owned()),
        };
        Ok((told.point.ok_or_else(damaged)?, reading))
    }

    /// Removes a fork, whose point is held no longer. Blocks on file I/O.
    pub(crate) fn remove(&self, shared: &Shared, name: &Name) -> Result<KeptFork, KeptError> {
        let _one = self.changing.lock();
        let group = &shared.folder.group;
        let entry = {
            let mut forks = self.forks.lock();
            let in_use = forks.get(name).is_some_and(|entry| Arc::strong_count(&entry.readers) > 1);
            if in_use {
                return Err(KeptError::InUse { group: group.clone(), fork: name.clone() });
            }
            forks.remove(name)
        };
        let entry = entry.ok_or_else(|| self.unknown(group, name))?;
        let (path, parent) = (shared.folder.fork(name), shared.folder.path.join("forks"));
        let gone = parent.join(format!("{GONE_PREFIX}{name}"));
        let left = if gone.exists() { shared.disk.remove_folder(&gone) } else { Ok(()) };
        let named = left.and_then(|()| shared.disk.rename(&path, &gone)).and_then(|()| {
            shared.disk.sync_folder(&parent).inspect_err(|_| {
                if let Err(error) = shared.disk.rename(&gone, &path) {
                    tracing::error!("{}", at(&gone, "give the kept fork its name again")(error));
                }
            })
        });
        if let Err(error) = named {
            self.forks.lock().insert(name.clone(), entry);
            return Err(at(&path, "remove the kept fork")(error).into());
        }
        // It is no fork any more; what of its files stays does so until the next start.
        shared.disk.remove_folder(&gone).map_err(at(&gone, "remove what was the kept fork"))?;
        shared.usage.used.fetch_sub(entry.told.space_bytes, Ordering::Relaxed);
        Ok(entry.told)
    }
}

/// Opens a kept fork for reading; with `bulk`, for a reader of all of it. Blocks on file I/O.
pub(crate) fn open(shared: &Arc<Shared>, name: &Name, bulk: bool) -> Result<(OpenFork, Reading), KeptError> {
    let (point, reading) = shared.kept.read(&shared.folder.group, name)?;
    let generation = shared.state.read().generation;
    let mut under = Vec::new();
    for (view, spec) in crate::view::views(shared, shared.index_at(point)?)?.into_iter().zip(&shared.volumes) {
        let base = shared.folder.base(&spec.name);
        let view = if bulk { view.in_bulk().map_err(at(&base, "open the base"))? } else { view };
        under.push(Under::View(Arc::new(view)));
    }
    let fork = ForkInUse { name: name.clone(), point };
    Ok((fork::assemble_over(shared, generation, &fork, under, Access::Read)?, reading))
}

/// Removes what is left of forks that were arriving or being removed. Returns the names of the others that are kept.
fn sweep(disk: &Disk, parent: &Path) -> Result<Vec<String>, StoreError> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(parent).map_err(at(parent, "list the folder"))? {
        let path = entry.map_err(at(parent, "list the folder"))?.path();
        let Some(name) = path.file_name().map(|name| name.to_string_lossy().into_owned()) else { continue };
        let unfinished = name.strip_prefix(".new-").unwrap_or(&name);
        if unfinished.starts_with(ARRIVING_PREFIX) || name.starts_with(GONE_PREFIX) {
            match disk.remove_folder(&path) {
                Ok(()) => tracing::info!("{}: of no use any more, removed", path.display()),
                Err(error) => tracing::warn!("{}", at(&path, "remove what is of no use any more")(error)),
            }
        } else if name.starts_with(KEPT_PREFIX) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// The point of the fork in a folder, and the bytes of its own blocks.
fn look(disk: &Disk, path: &Path, group_id: GroupId, volumes: &[Volume]) -> Result<(Point, u64), ForkError> {
    let (mut point, mut own_bytes) = (None, 0);
    for volume in volumes {
        let (raw, map) = (path.join(format!("{}.raw", volume.name)), path.join(format!("{}.map", volume.name)));
        if !raw.exists() {
            return Err(ForkError::Missing { path: raw });
        }
        let mut expected = MapFile::header(&map)?;
        let of_fork = *point.get_or_insert(expected.point);
        expected.group_id = group_id;
        (expected.point, expected.size_bytes) = (of_fork, volume.size_bytes);
        own_bytes += MapFile::open(disk, &map, &expected)?.1.bytes();
    }
    let missing = || ForkError::Missing { path: path.to_owned() };
    Ok((point.ok_or_else(missing)?, own_bytes))
}

/// Bytes that the files in a folder take.
fn space(folder: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        bytes += entry?.metadata()?.blocks() * STAT_BLOCK_BYTES;
    }
    Ok(bytes)
}

fn modified_unix_us(path: &Path) -> Option<u64> {
    let since = std::fs::metadata(path).ok()?.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    u64::try_from(since.as_micros()).ok()
}

/// The generation in a name, which is `diverged-GENERATION` or `diverged-GENERATION-NUMBER`.
fn generation(name: &Name) -> Option<Generation> {
    let rest = name.as_str().strip_prefix(KEPT_PREFIX)?;
    rest.split('-').next()?.parse().ok().map(Generation)
}
