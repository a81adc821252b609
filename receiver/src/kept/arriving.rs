//! A fork whose blocks are on their way: it gets the name of a kept one when all of them are durable, and leaves nothing behind otherwise.
//!
//! Its name until then is of this process alone, so that two conversations about one group cannot mistake each other's blocks for their own; that of
//! a kept fork is one that is free, so a primary cannot take away what was kept before.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use proto::{Generation, Name, Point};

use super::{ARRIVING_PREFIX, Entry, KEPT_FORKS_MAX, KEPT_PREFIX, KeptError, KeptFork, space};
use crate::fork::{self, ForkDevice, OpenFork};
use crate::group::{GroupError, Shared};
use crate::pins::Pin;
use crate::store::at;
use crate::superblock::ForkInUse;

/// A fork that is written to, and the space that it has.
#[derive(Debug)]
pub(crate) struct Arriving {
    shared: Arc<Shared>,
    /// `None` once it is closed.
    fork: Option<OpenFork>,
    name: Name,
    point: Point,
    /// Bytes that it has of its client's space.
    counted: u64,
    /// The point under it; `None` once it is kept.
    pin: Option<Pin>,
}

impl Arriving {
    /// Makes one over `point`. `serial` is used once in the life of the process. Blocks on file I/O.
    pub(crate) fn begin(shared: &Arc<Shared>, serial: u64, generation: Generation, point: Point) -> Result<Self, KeptError> {
        check_room(shared)?;
        let name = parsed(&format!("{ARRIVING_PREFIX}{serial}"), shared)?;
        let fork = ForkInUse { name: name.clone(), point };
        let pin = Some(shared.pins.pin(point));
        let mut arriving = Self { shared: Arc::clone(shared), fork: None, name, point, counted: 0, pin };
        fork::create(&shared.disk, shared, &fork)?;
        arriving.fork = Some(fork::assemble(shared, generation, &fork)?);
        Ok(arriving)
    }

    /// Its disks.
    pub(crate) fn volumes(&self) -> &[(Name, Arc<ForkDevice>)] {
        self.fork.as_ref().map_or(&[], |fork| &fork.volumes)
    }

    /// Takes space for what is about to be written.
    pub(crate) fn take(&mut self, bytes: u64) -> Result<(), KeptError> {
        let usage = &self.shared.usage;
        let add = |used: u64| used.checked_add(bytes).filter(|sum| usage.max.is_none_or(|max| *sum <= max));
        let taken = usage.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        taken.map_err(|_| KeptError::Space { client: self.shared.folder.client.clone(), bytes })?;
        self.counted += bytes;
        Ok(())
    }

    /// Gives it its name; all that was written to it must be durable. Blocks on file I/O.
    pub(crate) fn keep(mut self, generation: Generation) -> Result<Name, KeptError> {
        let shared = Arc::clone(&self.shared);
        let own_bytes = self.volumes().iter().map(|(_, device)| device.own_bytes()).sum();
        // Readers find nobody who may write.
        self.fork = None;
        let _one = shared.kept.changing.lock();
        check_room(&shared)?;
        let (from, parent) = (shared.folder.fork(&self.name), shared.folder.path.join("forks"));
        let name = free_name(&shared, generation)?;
        let to = shared.folder.fork(&name);
        let space_bytes = space(&from).map_err(at(&from, "find out what it takes"))?;
        shared.disk.rename(&from, &to).map_err(at(&to, "name the fork's folder"))?;
        // From here on it is kept, whatever comes of the sync: the primary is told by its answer.
        shared.usage.used.fetch_add(space_bytes, Ordering::Relaxed);
        shared.usage.used.fetch_sub(self.counted, Ordering::Relaxed);
        let told = KeptFork {
            name: name.clone(),
            point: Some(self.point),
            generation: Some(generation),
            made_unix_us: crate::clock::unix_us(),
            own_bytes,
            space_bytes,
            error: None,
        };
        let entry = Entry { told, readers: Arc::default(), _pin: self.pin.take() };
        shared.kept.forks.lock().insert(name.clone(), entry);
        shared.disk.sync_folder(&parent).map_err(at(&parent, "sync the folder"))?;
        Ok(name)
    }
}

impl Drop for Arriving {
    /// What was not kept is removed, and its space given back; if that fails, at the next start.
    fn drop(&mut self) {
        if self.pin.is_none() {
            return;
        }
        self.fork = None;
        let (shared, path, counted) = (Arc::clone(&self.shared), self.shared.folder.fork(&self.name), self.counted);
        let remove = move || {
            let removed = if path.exists() { shared.disk.remove_folder(&path) } else { Ok(()) };
            match removed {
                Ok(()) => {
                    shared.usage.used.fetch_sub(counted, Ordering::Relaxed);
                }
                Err(error) => tracing::warn!("{}", at(&path, "remove what did not arrive")(error)),
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(remove)),
            Err(_) => remove(),
        }
    }
}

fn check_room(shared: &Shared) -> Result<(), KeptError> {
    match shared.kept.forks.lock().len() {
        KEPT_FORKS_MAX.. => Err(KeptError::Full { group: shared.folder.group.clone() }),
        _ => Ok(()),
    }
}

/// A name that no fork has.
fn free_name(shared: &Shared, generation: Generation) -> Result<Name, KeptError> {
    // There are fewer forks than that, and a name may be that of a folder which is none.
    for number in 1..=2 * KEPT_FORKS_MAX {
        let tail = if number == 1 { String::new() } else { format!("-{number}") };
        let name = parsed(&format!("{KEPT_PREFIX}{generation}{tail}"), shared)?;
        if !shared.folder.fork(&name).exists() {
            return Ok(name);
        }
    }
    Err(KeptError::Full { group: shared.folder.group.clone() })
}

fn parsed(name: &str, shared: &Shared) -> Result<Name, KeptError> {
    // A generation has at most 15 digits, a serial 20.
    name.parse().map_err(|_| GroupError::Changed { group: shared.folder.group.clone() }.into())
}
