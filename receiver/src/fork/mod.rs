//! A fork: a writable overlay on the views of one point. The activated copy is one.
//!
//! Per volume `forks/<name>/<volume>.raw`, sparse, and `<volume>.map`, which says which blocks are the fork's own. Creating one
//! costs the same for any size of disk.

mod device;
mod map;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;

use blockdev::{BlockDevice, FileDevice, FileError, OpenOptions};
use proto::{Generation, Name, Point};

pub use device::ForkDevice;
pub use map::{MAP_HEADER_BYTES, MAP_MAGIC, MAP_PAGE_BYTES, MapError, layout};
pub(crate) use map::{MapFile, MapHeader};

use crate::disk::Disk;
use crate::group::{GroupError, Shared};
use crate::store::at;
use crate::superblock::ForkInUse;

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
        create(&shared.disk, shared, fork)?;
    }
    // Also if it was there: a process that was killed may not have lived to sync its name.
    let parent = shared.folder.path.join("forks");
    shared.disk.sync_folder(&parent).map_err(at(&parent, "sync the folder")).map_err(ForkError::from)?;
    let index = shared.index_at(fork.point)?;
    let mut volumes = Vec::new();
    for (view, spec) in crate::view::views(shared, index)?.into_iter().zip(&shared.volumes) {
        let header = header(shared, fork.point, spec.size_bytes);
        let data = folder.join(format!("{}.raw", spec.name));
        if !data.exists() {
            return Err(ForkError::Missing { path: data }.into());
        }
        let (map, set) =
            MapFile::open(&shared.disk, &folder.join(format!("{}.map", spec.name)), &header).map_err(ForkError::from)?;
        let data = FileDevice::open(&data, OpenOptions { create_size: Some(spec.size_bytes), ..OpenOptions::default() })
            .map_err(ForkError::from)?;
        volumes.push((spec.name.clone(), Arc::new(ForkDevice::new(view, data, map, set))));
    }
    Ok(OpenFork { generation, point: fork.point, name: fork.name.clone(), volumes })
}

fn header(shared: &Shared, point: Point, size_bytes: u64) -> MapHeader {
    MapHeader { group_id: shared.group_id, point, size_bytes }
}

fn create(disk: &Disk, shared: &Shared, fork: &ForkInUse) -> Result<(), ForkError> {
    let folder = shared.folder.fork(&fork.name);
    let parent = shared.folder.path.join("forks");
    let building = parent.join(format!(".new-{}", fork.name));
    if building.exists() {
        disk.remove_folder(&building).map_err(at(&building, "remove what a failed creation left"))?;
    }
    shared.folder.release_reserve(disk)?;
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
    disk.rename(&building, &folder).map_err(at(&folder, "name the fork's folder"))?;
    Ok(())
}
