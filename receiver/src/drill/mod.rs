//! Drills: writable forks of kept points that are thrown away.
//!
//! A drill lives in `forks/drill-…/`, whose name says that nothing in it is worth keeping: a start removes what a node that was killed left
//! behind, and no other fork. It cannot change the base, the journal or the active copy: it writes to files of its own, within a limit of its
//! own. Its flushes reach no disk: a drill does not outlive its node, so there is nothing to make durable, and replication has the disk.

mod device;
mod results;
mod space;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use blockdev::BlockDevice;
use proto::{Name, Point};

pub use results::{
    DrillOutcome, DrillResult, OUTPUT_BYTES_MAX, REMARK_BYTES_MAX, RESULTS_MAGIC, RESULTS_MAX, ResultsError, SCRIPT_BYTES_MAX,
    layout,
};
pub(crate) use results::{RESULTS_FILE, Results, Summary, check};
pub(crate) use space::has_room;
pub use space::{FREE_BYTES_MAX, FREE_FRACTION, Space};

use crate::disk::Disk;
use crate::fork::{self, ForkError};
use crate::group::{Group, GroupError, Shared};
use crate::store::{GroupFolder, StoreError, at};
use crate::superblock::ForkInUse;
use device::DrillDevice;

/// What the name of every drill begins with, and of no other fork.
pub const DRILL_PREFIX: &str = "drill-";
/// What a creation that was not finished is called.
const UNFINISHED_PREFIX: &str = ".new-drill-";

/// Why a drill is not made.
#[derive(Debug, thiserror::Error)]
pub enum DrillError {
    /// Not the name of a drill.
    #[error("'{name}' is not the name of a drill: it begins with {DRILL_PREFIX}")]
    NotADrill {
        /// As given.
        name: Name,
    },
    /// There is one of that name.
    #[error("group '{group}' has a drill '{name}' already: choose another name, or end that one")]
    Exists {
        /// The group.
        group: Name,
        /// The drill.
        name: Name,
    },
    /// The group.
    #[error(transparent)]
    Group(#[from] GroupError),
}

/// What to make.
#[derive(Clone, Debug)]
pub struct DrillWish {
    /// Begins with [`DRILL_PREFIX`]; unique within the group.
    pub name: Name,
    /// A kept point; the newest by default.
    pub point: Option<Point>,
    /// Bytes that blocks written to it may take, all its disks together.
    pub space_max_bytes: u64,
}

/// A drill: disks that can be written, and are gone when it ends. [`Receiver::end_drill`](crate::Receiver::end_drill) ends it.
pub struct Drill {
    /// The client its group is replicated from.
    pub client: Name,
    /// The group.
    pub group: Name,
    /// Its name.
    pub name: Name,
    /// The point it began from.
    pub point: Point,
    /// That point's cut, microseconds since 1970 on the primary's clock.
    pub cut_unix_us: u64,
    /// Its disks.
    pub volumes: Vec<(Name, Arc<dyn BlockDevice>)>,
    /// What it takes, and its limit.
    pub space: Arc<Space>,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Drill {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Drill({} of {}/{} at {})", self.name, self.client, self.group, self.point)
    }
}

/// Makes the fork of a drill; costs the same for any size of disk. Blocks on file I/O.
pub(crate) fn make(group: &Group, wish: &DrillWish) -> Result<Drill, DrillError> {
    let DrillWish { name, point, space_max_bytes } = wish;
    let shared = &group.shared;
    let name = name.clone();
    if !name.as_str().starts_with(DRILL_PREFIX) {
        return Err(DrillError::NotADrill { name });
    }
    let (point, cut_unix_us, generation) = chosen(shared, *point)?;
    let folder = shared.folder.fork(&name);
    if folder.exists() {
        return Err(DrillError::Exists { group: shared.folder.group.clone(), name });
    }
    let made = || -> Result<_, GroupError> {
        let in_use = ForkInUse { name: name.clone(), point };
        fork::create(&shared.disk, shared, &in_use)?;
        fork::assemble(shared, generation, &in_use)
    };
    let open = made().inspect_err(|_| {
        if let Err(error) = remove(shared, &name) {
            tracing::warn!("{error}");
        }
    })?;
    let space = Arc::new(Space::new(*space_max_bytes, &folder));
    let volumes = open.volumes.into_iter().map(|(name, fork)| {
        let device: Arc<dyn BlockDevice> = Arc::new(DrillDevice::new(fork, Arc::clone(&space)));
        (name, device)
    });
    Ok(Drill {
        client: shared.folder.client.clone(),
        group: shared.folder.group.clone(),
        name: name.clone(),
        point,
        cut_unix_us,
        volumes: volumes.collect(),
        space,
        shared: Arc::clone(shared),
    })
}

/// A point for a reader of all of it.
pub struct Whole {
    /// The client its group is replicated from.
    pub client: Name,
    /// The group.
    pub group: Name,
    /// The point.
    pub point: Point,
    /// Its cut, microseconds since 1970 on the primary's clock.
    pub cut_unix_us: u64,
    /// Its disks, read-only.
    pub volumes: Vec<(Name, Arc<dyn BlockDevice>)>,
}

impl std::fmt::Debug for Whole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Whole({}/{} at {})", self.client, self.group, self.point)
    }
}

/// Blocks on file I/O.
pub(crate) fn whole(group: &Group, point: Option<Point>) -> Result<Whole, GroupError> {
    let shared = &group.shared;
    let (point, cut_unix_us, _) = chosen(shared, point)?;
    let mut volumes: Vec<(Name, Arc<dyn BlockDevice>)> = Vec::new();
    for (view, spec) in crate::view::views(shared, shared.index_at(point)?)?.into_iter().zip(&shared.volumes) {
        let base = shared.folder.base(&spec.name);
        let view = view.in_bulk().map_err(at(&base, "open the base")).map_err(ForkError::from)?;
        volumes.push((spec.name.clone(), Arc::new(view)));
    }
    let folder = &shared.folder;
    Ok(Whole { client: folder.client.clone(), group: folder.group.clone(), point, cut_unix_us, volumes })
}

/// The point that was asked for, or the newest; its cut; the group's generation.
fn chosen(shared: &Shared, wanted: Option<Point>) -> Result<(Point, u64, proto::Generation), GroupError> {
    let state = shared.state.read();
    let group = || shared.folder.group.clone();
    let entry = match wanted {
        None => state.points.last().ok_or_else(|| GroupError::Empty { group: group() })?,
        Some(point) => {
            let found = state.points.binary_search_by_key(&point, |p| p.point).ok().and_then(|i| state.points.get(i));
            found.ok_or_else(|| GroupError::NoPoint { group: group(), point })?
        }
    };
    Ok((entry.point, entry.cut_unix_us, state.generation))
}

/// Throws a drill away. Whoever still has one of its devices keeps it, without a name. Blocks on file I/O.
pub(crate) fn end(drill: &Drill) -> Result<(), ForkError> {
    Ok(remove(&drill.shared, &drill.name)?)
}

fn remove(shared: &Shared, name: &Name) -> Result<(), StoreError> {
    let path = shared.folder.fork(name);
    if !path.exists() {
        return Ok(());
    }
    shared.disk.remove_folder(&path).map_err(at(&path, "remove the drill"))
}

/// Removes the drills of a group that a node which was killed left behind. What cannot be removed is said, and keeps nobody from anything.
pub(crate) fn sweep(disk: &Disk, folder: &GroupFolder) {
    let forks = folder.path.join("forks");
    let entries = match std::fs::read_dir(&forks) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
        Err(error) => return tracing::warn!("{}", at(&forks, "list the folder")(error)),
    };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let text = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if !text.starts_with(DRILL_PREFIX) && !text.starts_with(UNFINISHED_PREFIX) {
            continue;
        }
        match disk.remove_folder(&path) {
            Ok(()) => tracing::info!("{}: a drill of the former run of this node, removed", path.display()),
            Err(error) => tracing::warn!("{}", at(&path, "remove a drill of the former run")(error)),
        }
    }
}
