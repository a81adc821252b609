//! The start of a drill: a name, a fork of the point, an address.
//!
//! Whatever fails on the way leaves nothing behind, and whatever is asked for meanwhile finds the name taken.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use blockdev::BlockDevice;
use blockdev::nbd::ListenAddr;
use receiver::drill::Of;
use tokio::sync::watch;

use super::*;
use crate::api::{CopyVolume, DrillRequest, DrillStarted, nbd_uri};
use crate::config::export_address;
use crate::hooks::DrillFacts;
use crate::script::User;

/// Who asks.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Asked {
    pub(super) scheduled: bool,
    /// Who may connect to the private socket; our own user by default.
    pub(super) user: Option<User>,
}

/// The disks of a drill.
struct Made {
    running: Running,
    point: Point,
    cut_unix_us: u64,
    disks: Vec<(Name, Arc<dyn BlockDevice>)>,
    /// What its hooks are told, but for where it is.
    facts: Option<Facts>,
}

/// Where they are served.
struct Place {
    address: ListenAddr,
    /// Of the private socket.
    folder: Option<PathBuf>,
    facts: Option<Facts>,
}

/// Gives a name back if the drill does not come about.
struct Claim<'a> {
    drills: &'a Drills,
    name: String,
    serial: u64,
    kept: bool,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if !self.kept {
            let mut names = self.drills.names.lock();
            if names.find(&self.name, Some(self.serial)).is_some() {
                names.running.remove(&self.name);
            }
        }
    }
}

impl Drills {
    /// Takes a name.
    fn claim(&self, request: &DrillRequest, group: &GroupRef, asked: Asked) -> Result<Claim<'_>, DrillRefused> {
        let mut names = self.names.lock();
        if names.taken() >= DRILLS_MAX {
            return Err(DrillRefused::TooMany);
        }
        let prefix = if request.read_only { "export-" } else { receiver::drill::DRILL_PREFIX };
        let name = match &request.name {
            Some(given) => {
                let name = Self::full_name(given);
                let legal = name.parse::<Name>().is_ok() && name.starts_with(prefix);
                (if legal { Some(name) } else { None }).ok_or_else(|| DrillRefused::Name { given: given.clone() })?
            }
            None => {
                let free = (1..=DRILLS_MAX).map(|n| format!("{prefix}{n}")).find(|name| names.is_free(name));
                free.ok_or(DrillRefused::TooMany)?
            }
        };
        if !names.is_free(&name) {
            let leaving = names.leaving.contains(&name);
            return Err(if leaving { DrillRefused::Leaving { name } } else { DrillRefused::Taken { name } });
        }
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let entry = Entry {
            serial,
            group: group.clone(),
            running: Running::Making,
            began_unix_us: unix_us_now(),
            export: None,
            folder: None,
            script: request.script.clone(),
            fork: request.fork.clone(),
            facts: None,
            scheduled: asked.scheduled,
            held: false,
            ended: watch::Sender::new(false),
        };
        names.running.insert(name.clone(), entry);
        Ok(Claim { drills: self, name, serial, kept: false })
    }
}

impl Node {
    pub(crate) async fn start_drill(self: &Arc<Self>, request: &DrillRequest) -> Result<DrillStarted, RequestError> {
        self.start_drill_as(request, Asked::default()).await
    }

    pub(super) async fn start_drill_as(
        self: &Arc<Self>,
        request: &DrillRequest,
        asked: Asked,
    ) -> Result<DrillStarted, RequestError> {
        let began = Instant::now();
        let copies = self.receiving()?;
        let group = copies.find(&request.group).await?;
        let named = request.export.as_deref().map(|given| {
            let refused = |problem| RequestError::Export { given: given.to_owned(), problem };
            export_address(Path::new("/"), given).map_err(refused)
        });
        let named = named.transpose()?;
        let of = match (&request.fork, &request.point) {
            (Some(_), Some(_)) => return Err(DrillRefused::PointAndFork.into()),
            (Some(fork), None) => Of::Fork(fork.clone()),
            (None, Some(text)) => Of::Point(copies.resolve(&group, text).await?),
            (None, None) => Of::Newest,
        };
        let mut claim = self.drills.claim(request, &group, asked)?;
        let name = claim.name.clone();
        let Made { running, point, cut_unix_us, disks, facts } = self.make(&group, &name, of, request).await?;
        let volumes: Vec<_> =
            disks.iter().map(|(name, device)| CopyVolume { name: name.clone(), size_bytes: device.size() }).collect();
        let space_max_bytes = match &running {
            Running::Drill(drill) => drill.space.max_bytes(),
            _ => 0,
        };
        let offered = self.offer((&group, name.as_str()), named, disks, facts, (request.ignore_hooks, asked.user)).await;
        let Place { address, folder, facts } = match offered {
            Ok(offered) => offered,
            Err(error) => {
                if let Running::Drill(drill) = running
                    && let Err(error) = copies.end_drill(drill).await
                {
                    tracing::error!(drill = name, "{error}; the next start of this node removes it");
                }
                return Err(error);
            }
        };
        {
            let mut names = self.drills.names.lock();
            if let Some(entry) = names.running.get_mut(&name) {
                entry.running = running;
                entry.export = Some(address.to_string());
                entry.folder = folder;
                entry.facts = facts;
            }
        }
        claim.kept = true;
        if request.export.is_none() && !asked.scheduled {
            self.end_unless_held(name.clone(), claim.serial);
        }
        let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(drill = name, group = %group, %point, %address, took_ms, "drill begun");
        let (export, fork, serial) = (address.to_string(), request.fork.clone(), claim.serial);
        let GroupRef { client, group } = group;
        Ok(DrillStarted { name, serial, client, group, point, fork, cut_unix_us, export, volumes, space_max_bytes, took_ms })
    }

    /// Makes the disks of a drill, or finds those that are only read.
    async fn make(&self, group: &GroupRef, name: &str, of: Of, request: &DrillRequest) -> Result<Made, RequestError> {
        let copies = self.receiving()?;
        if request.read_only {
            let whole = copies.whole(&group.to_string(), of).await?;
            let running = Running::Whole { point: whole.point, _reading: whole.reading };
            return Ok(Made { running, point: whole.point, cut_unix_us: whole.cut_unix_us, disks: whole.volumes, facts: None });
        }
        let drill_name = name.parse::<Name>().map_err(|_| DrillRefused::Name { given: name.to_owned() })?;
        let space_max_bytes = request.space_max_bytes.unwrap_or(self.drills.space_max_bytes);
        let wish = receiver::drill::DrillWish { name: drill_name, of, space_max_bytes };
        let drill = copies.drill(&group.to_string(), wish).await?;
        let (point, cut_unix_us, disks) = (drill.point, drill.cut_unix_us, drill.volumes.clone());
        let facts = Facts {
            client: Some(group.client.clone()),
            group: group.group.clone(),
            point: Some(point),
            generation: drill.generation,
            export: None,
            disks: Vec::new(),
            repeated: false,
            drill: Some(DrillFacts { name: name.to_owned(), fork: drill.fork.clone() }),
        };
        Ok(Made { running: Running::Drill(drill), point, cut_unix_us, disks, facts: Some(facts) })
    }

    /// Runs the hook before a drill and serves its disks at the address, or at a private socket in a folder of its own.
    async fn offer(
        &self,
        (group, name): (&GroupRef, &str),
        named: Option<ListenAddr>,
        disks: Vec<(Name, Arc<dyn BlockDevice>)>,
        facts: Option<Facts>,
        (ignore_hooks, user): (bool, Option<User>),
    ) -> Result<Place, RequestError> {
        let (address, folder) = match named {
            Some(address) => (address, None),
            None => {
                let failed = |source| DrillRefused::Folder { path: self.drills.folder.clone(), source };
                let folder = private_folder(&self.drills.folder, name, user).map_err(failed)?;
                let given = format!("unix:{}", folder.join("nbd.sock").display());
                let refused = |problem| RequestError::Export { given: given.clone(), problem };
                (export_address(Path::new("/"), &given).map_err(refused)?, Some(folder))
            }
        };
        let facts = facts.map(|facts| {
            let at = address.to_string();
            let disk =
                |(name, device): &(Name, Arc<dyn BlockDevice>)| (name.clone(), device.size(), Some(nbd_uri(&at, name.as_str())));
            Facts { disks: disks.iter().map(disk).collect(), export: Some(at.clone()), ..facts }
        });
        let offered = async {
            // An address in use runs no hook for nothing.
            self.exports.check_free(&address, &selector(group, name), disks.iter().map(|(name, _)| name)).await?;
            // Before the address is bound: that is done under a lock which a failover needs.
            if let Some(facts) = &facts {
                match self.hooks.run(Transition::Drill, Phase::Pre, facts).await {
                    Ok(_) => {}
                    Err(error) if ignore_hooks => tracing::warn!(drill = name, "goes on without its hook: {error}"),
                    Err(error) => return Err(RequestError::Hook(error)),
                }
                if self.hooks.follows_drill(facts) {
                    self.drills.unfinished.begun(name, facts);
                }
            }
            let served = self.serve(&selector(group, name), &address, disks, user).await;
            if let (Err(_), Some(facts)) = (&served, &facts) {
                self.hooks.begin(Transition::Drill, Phase::Post, facts.clone());
                self.drills.unfinished.ended(name);
            }
            served
        };
        match offered.await {
            Ok(address) => Ok(Place { address, folder, facts }),
            Err(error) => {
                if let Some(folder) = folder
                    && let Err(error) = std::fs::remove_dir_all(&folder)
                {
                    tracing::warn!("{}: cannot be removed: {error}", folder.display());
                }
                Err(error)
            }
        }
    }

    /// Returns the address with the port that the system chose.
    async fn serve(
        &self,
        selector: &str,
        address: &ListenAddr,
        disks: Vec<(Name, Arc<dyn BlockDevice>)>,
        user: Option<User>,
    ) -> Result<ListenAddr, RequestError> {
        // Until the disks are there a failover's end would stop the server that offers nothing.
        let _record = self.record.lock().await;
        self.exports.check_free(address, selector, disks.iter().map(|(name, _)| name)).await?;
        let address = self.exports.listen_yielding(address).await?;
        let added = async {
            if let (ListenAddr::Unix(path), Some(User { uid, gid })) = (&address, user) {
                let source = |source| DrillRefused::Folder { path: path.clone(), source };
                std::os::unix::fs::chown(path, Some(uid), Some(gid)).map_err(source)?;
            }
            Ok::<_, RequestError>(self.exports.add(&address, selector, disks).await?)
        };
        if let Err(error) = added.await {
            self.exports.prune().await;
            return Err(error);
        }
        Ok(address)
    }

    /// Whoever wanted it may have gone before it was made.
    fn end_unless_held(self: &Arc<Self>, name: String, serial: u64) {
        let node = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(HOLD_WITHIN).await;
            let held = node.drills.names.lock().find(&name, Some(serial)).is_none_or(|entry| entry.held);
            if !held {
                node.end_abandoned(&name, serial).await;
            }
        });
    }
}

/// A folder that only its owner may enter. Nobody else may enter the state folder, so another user's is in the system's temporary one.
fn private_folder(above: &Path, name: &str, user: Option<User>) -> io::Result<PathBuf> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    let Some(User { uid, gid }) = user else {
        let folder = above.join(name);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        return Ok(folder);
    };
    let only_owner = std::fs::Permissions::from_mode(0o700);
    let folder = tempfile::Builder::new().prefix("twinsite-").permissions(only_owner).tempdir()?;
    std::os::unix::fs::chown(folder.path(), Some(uid), Some(gid))?;
    Ok(folder.keep())
}
