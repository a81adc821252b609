//! A fork: a writable overlay on the views of one point. The activated copy is one.
//!
//! Per volume `forks/<name>/<volume>.raw`, sparse, and `<volume>.map`, which says which blocks were written; `<volume>.recent` says it of those that
//! were not flushed, until the machine is started again. Creating one
//! costs the same for any size of disk. Flattening (`flatten`) adds `<volume>.flat`, `<volume>.touched` and, when nothing is missing
//! any more, the file `flat`: from then on the fork is plain raw files and pins neither journal nor base.

mod data;
mod device;
mod flatten;
#[cfg(test)]
mod flatten_tests;
mod follow;
mod map;
mod own;
mod recent;
#[cfg(test)]
mod tests;
mod under;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockdev::steps::{Step, reach};
use blockdev::{BlockDevice, FileError};
use proto::units::BLOCK_BYTES;
use proto::{DirtyMap, Generation, Name, Point};

use data::Data;
pub use device::ForkDevice;
pub(crate) use device::Gate;
pub(crate) use flatten::Flattening;
pub use flatten::{FlattenState, FlattenStatus};
pub(crate) use follow::Follower;
pub use map::{MAP_HEADER_BYTES, MAP_MAGIC, MAP_PAGE_BYTES, MapError, layout};
pub(crate) use map::{MapFile, MapHeader};
use own::Own;
pub use recent::RECENT_MAGIC;
use recent::{Boot, Recent};
pub(crate) use under::Under;

use crate::disk::{Disk, is_out_of_space};
use crate::group::{GroupError, Shared};
use crate::store::{GroupFolder, at};
use crate::superblock::{ForkInUse, Superblock, Volume};

/// In a fork's folder: its data files are the whole disks.
pub(crate) const FLAT_FILE: &str = "flat";

/// Why a fork cannot be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// Its map.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Its data.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its folder.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
    /// A part of it is gone.
    #[error("{}: the fork's file is missing: restore it from a backup", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
}

/// An open fork.
#[derive(Debug)]
pub(crate) struct OpenFork {
    pub(crate) generation: Generation,
    pub(crate) point: Point,
    pub(crate) name: Name,
    pub(crate) volumes: Vec<(Name, Arc<ForkDevice>)>,
}

impl OpenFork {
    pub(crate) fn devices(&self) -> Vec<(Name, Arc<dyn BlockDevice>)> {
        self.volumes.iter().map(|(name, device)| (name.clone(), Arc::clone(device) as Arc<dyn BlockDevice>)).collect()
    }
}

/// Opens the fork that the superblock promises, creating it if no earlier try got that far.
///
/// The folder is built aside and appears under its name when all of it is durable; it was handed to nobody before.
pub(crate) fn open(shared: &Arc<Shared>, generation: Generation, fork: &ForkInUse) -> Result<OpenFork, GroupError> {
    let folder = shared.folder.fork(&fork.name);
    if !folder.exists() {
        // A full disk must not keep the copy from becoming the server.
        shared.folder.release_reserve(&shared.disk).map_err(ForkError::from)?;
        create(&shared.disk, shared, fork)?;
        reach(Step::FailoverForkNamed);
    }
    // Also if it was there: a process that was killed may not have lived to sync its name.
    let parent = shared.folder.path.join("forks");
    shared.disk.sync_folder(&parent).map_err(at(&parent, "sync the folder")).map_err(ForkError::from)?;
    assemble(shared, generation, fork)
}

/// Opens a fork whose folder is there.
pub(crate) fn assemble(shared: &Arc<Shared>, generation: Generation, fork: &ForkInUse) -> Result<OpenFork, GroupError> {
    let is_flat = !pins(shared, fork);
    let views = if is_flat { Vec::new() } else { crate::view::views(shared, shared.index_at(fork.point)?)? };
    let under = views.into_iter().map(|view| Under::View(Arc::new(view.for_fork()))).collect();
    assemble_over(shared, generation, fork, under, Access::Write)
}

/// Who opens a fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// One who may write, alone.
    Write,
    /// Any number of readers.
    Read,
}

/// Opens a fork whose folder is there over `under`, one for each volume; none if the fork is flat.
pub(crate) fn assemble_over(
    shared: &Arc<Shared>,
    generation: Generation,
    fork: &ForkInUse,
    under: Vec<Under>,
    access: Access,
) -> Result<OpenFork, GroupError> {
    let mut under = under.into_iter();
    let mut volumes = Vec::new();
    for spec in &shared.volumes {
        let device = open_volume(shared, fork, spec, under.next(), access)?;
        volumes.push((spec.name.clone(), Arc::new(device)));
    }
    Ok(OpenFork { generation, point: fork.point, name: fork.name.clone(), volumes })
}

/// Names of active copies begin so; the generation that they were made in follows.
pub(crate) const ACTIVE_PREFIX: &str = "active-";

/// Removes what a node that was killed in a handback did not live to remove: active copies that were given back, all of each in the point
/// that ended its handback. An active copy of a later generation than the group's is of nobody knows what, and is left alone.
pub(crate) fn sweep(disk: &Disk, folder: &GroupFolder, block: &Superblock) {
    let parent = folder.path.join("forks");
    let entries = match std::fs::read_dir(&parent) {
        Ok(entries) => entries,
        Err(error) => return tracing::warn!("{}", at(&parent, "list the folder")(error)),
    };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let in_use = block.fork.as_ref().is_some_and(|fork| fork.name.as_str() == name);
        let made_in = name.strip_prefix(ACTIVE_PREFIX).and_then(|generation| generation.parse::<u64>().ok());
        let given_back = !in_use && made_in.is_some_and(|generation| generation <= block.generation.0);
        if !given_back {
            continue;
        }
        match disk.remove_folder(&path) {
            Ok(()) => tracing::info!("{}: left by a handback that was killed, removed", path.display()),
            Err(error) => tracing::warn!("{}", at(&path, "remove what a handback left")(error)),
        }
    }
}

/// Whether a fork needs the journal up to its point, and the base, of its group: not once it is flat.
pub(crate) fn pins(shared: &Shared, fork: &ForkInUse) -> bool {
    !shared.folder.fork(&fork.name).join(FLAT_FILE).exists()
}

fn open_volume(
    shared: &Arc<Shared>,
    fork: &ForkInUse,
    spec: &Volume,
    under: Option<Under>,
    access: Access,
) -> Result<ForkDevice, ForkError> {
    let folder = shared.folder.fork(&fork.name);
    let file = |kind: &str| folder.join(format!("{}.{kind}", spec.name));
    let path = file("raw");
    if !path.exists() {
        return Err(ForkError::Missing { path });
    }
    let of_volume = header(shared, fork.point, spec.size_bytes);
    let (map, written) = MapFile::open(&shared.disk, &file("map"), &of_volume)?;
    // All of a flat fork's bits were made durable before it was marked as such.
    let (recent, recently) = match under {
        Some(_) => open_recent(&shared.disk, &file("recent"), &of_volume, access)?,
        None => (None, DirtyMap::new(spec.size_bytes)),
    };
    let data = Data::open(&shared.disk, &path, spec.size_bytes, access)?;
    let copied = match (&under, file("flat").exists()) {
        (None, _) => None,
        (Some(_), true) => Some(MapFile::open(&shared.disk, &file("flat"), &of_volume)?.1),
        (Some(_), false) => {
            let mut own = Own::new(spec.size_bytes, written);
            own.recover(&recently);
            return Ok(ForkDevice::with(under, data, (map, recent), own, None));
        }
    };
    let regions = header(shared, fork.point, own::regions_bytes(spec.size_bytes));
    let (touched_map, touched) = MapFile::open(&shared.disk, &file("touched"), &regions)?;
    let mut own = Own::flattened(spec.size_bytes, written, copied, &touched);
    own.recover(&recently);
    if !touched.is_empty() {
        // What a killed process wrote is made durable before a bit says that it is there.
        shared.disk.open_file(&path).and_then(|raw| raw.sync_data()).map_err(at(&path, "sync the fork's data"))?;
        let mut clear = || {
            map.keep_waiting(&own.written.take_pages())?;
            touched_map.clear(&touched)
        };
        let suspect_bytes = touched.count() * own::REGION_BLOCKS * BLOCK_BYTES;
        tracing::warn!("{}: not stopped in order: {suspect_bytes} bytes at most count as written since the fork", path.display());
        clear().map_err(at(&path, "settle what may have been written to"))?;
    }
    Ok(ForkDevice::with(under, data, (map, recent), own, Some(touched_map)))
}

/// What a process that was killed left of blocks that were not flushed, and where this one notes its own.
fn open_recent(disk: &Disk, path: &Path, of: &MapHeader, access: Access) -> Result<(Option<Recent>, DirtyMap), ForkError> {
    let none = || Ok((None, DirtyMap::new(of.size_bytes)));
    // Who watches a disk means a loss of power by a crash.
    if disk.is_watched() {
        return none();
    }
    let boot = match Boot::current() {
        Ok(boot) => boot,
        Err(error) => {
            tracing::warn!("{}: what is not flushed is lost if the node is killed: no boot id: {error}", path.display());
            return none();
        }
    };
    let found = match access {
        Access::Write => Recent::open(path, of, boot).map(|(recent, set)| (Some(recent), set)),
        Access::Read => Recent::read(path, of, boot).map(|set| (None, set)),
    };
    match found {
        // Only a file that is begun anew needs space: there was nothing in it.
        Err(error) if is_out_of_space(&error) => {
            tracing::warn!(
                "{}: what is not flushed is lost if the node is killed: {error}: free space in the store",
                path.display()
            );
            none()
        }
        found => found.map_err(|source| at(path, "open what was written and not flushed")(source).into()),
    }
}

fn header(shared: &Shared, point: Point, size_bytes: u64) -> MapHeader {
    MapHeader { group_id: shared.group_id, point, size_bytes }
}

/// Makes the folder of a fork with nothing in it; appears under its name when it is whole.
pub(crate) fn create(disk: &Disk, shared: &Shared, fork: &ForkInUse) -> Result<(), ForkError> {
    let folder = shared.folder.fork(&fork.name);
    let parent = shared.folder.path.join("forks");
    let building = parent.join(format!(".new-{}", fork.name));
    if building.exists() {
        disk.remove_folder(&building).map_err(at(&building, "remove what a failed creation left"))?;
    }
    disk.create_folders(&building).map_err(at(&building, "create the folder"))?;
    for volume in &shared.volumes {
        let data = building.join(format!("{}.raw", volume.name));
        disk.create_file(&data)
            .and_then(|file| file.set_len(volume.size_bytes).and_then(|()| file.sync_all()))
            .map_err(at(&data, "create the fork's data"))?;
        let map = building.join(format!("{}.map", volume.name));
        MapFile::create(disk, &map, &header(shared, fork.point, volume.size_bytes))?;
    }
    disk.sync_folder(&building).map_err(at(&building, "sync the folder"))?;
    reach(Step::FailoverForkBuilt);
    disk.rename(&building, &folder).map_err(at(&folder, "name the fork's folder"))?;
    Ok(())
}
