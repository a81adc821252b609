//! All groups of a store: who may see which, creation by the first admitted hello, selection by name.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use blockdev::steps::{Step, reach};
use parking_lot::Mutex;
use proto::fencing::GroupRole;
use proto::{Fingerprint, Generation, Name, Point};
use tokio::sync::watch;

use crate::adopt::AdoptError;
use crate::config::{ClientConfig, Limits, SEGMENT_BYTES_MAX};
use crate::core::{Cause, Stored, total};
use crate::disk::Disk;
use crate::fork::OpenFork;
use crate::group::{Group, GroupError, Promoted, SessionId, Usage};
use crate::hashing::Hasher;
use crate::journal::{FIRST_SEGMENT, GroupId, JournalOptions};
use crate::store::{GroupFolder, Store, StoreError};
use crate::superblock::{Superblock, Volume};

/// So many full segments fill a client's space, or a group's.
const SEGMENTS_IN_SPACE: u64 = 32;
/// And none is shorter for that than this.
const SEGMENT_BYTES_MIN: u64 = 1 << 20;

/// Why a group is not found.
#[derive(Debug, thiserror::Error)]
pub enum SelectError {
    /// Nothing of that name.
    #[error("no group '{given}' in this store: see `twinsite status`")]
    Unknown {
        /// As given.
        given: String,
    },
    /// Several clients have a group of that name.
    #[error("group '{given}' is ambiguous: write {}", choices.join(" or "))]
    Ambiguous {
        /// As given.
        given: String,
        /// What to write instead.
        choices: Vec<String>,
    },
    /// It cannot be used.
    #[error("group '{given}' cannot be used: {cause}")]
    Broken {
        /// As given.
        given: String,
        /// Why.
        cause: Cause,
    },
}

/// A group in the store.
#[derive(Clone, Debug)]
pub(crate) enum Slot {
    Open(Arc<Group>),
    /// The others go on.
    Broken(Cause),
}

type Key = (Name, Name);

type OpenGroup = fn(GroupFolder, Arc<Usage>, JournalOptions) -> Result<Arc<Group>, GroupError>;

/// What a node does in one way and a simulation in another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Means {
    /// Opens a group, with its own thread or without.
    pub(crate) open: OpenGroup,
    /// The identity of a new group of a client, which nobody can guess.
    pub(crate) group_id: fn(&Name, &Name) -> GroupId,
}

impl Means {
    /// Those of a running receiver.
    pub(crate) const NODE: Self = Self { open: Group::open, group_id: |_, _| rand::random() };
}

/// The store and its groups.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) store: Store,
    means: Means,
    pub(crate) limits: Limits,
    /// Started when the first primary compares.
    hasher: OnceLock<Hasher>,
    usages: BTreeMap<Name, Arc<Usage>>,
    groups: Mutex<BTreeMap<Key, Slot>>,
    /// Held while a group comes to be.
    creating: Mutex<()>,
    sessions: AtomicU64,
    /// Counts the groups that were handed back to their primaries.
    handed: watch::Sender<u64>,
}

impl Node {
    /// Opens every group; one that cannot be opened is kept as broken and said so.
    pub(crate) fn open(store: Store, clients: &[ClientConfig], limits: Limits, means: Means) -> Result<Self, StoreError> {
        let usage = |c: &ClientConfig| {
            let group_max = c.group_space_max_bytes.clone();
            let usage = Usage { used: AtomicU64::new(0), max: c.space_max_bytes, group_max, ladder: c.retention.clone() };
            (c.name.clone(), Arc::new(usage))
        };
        let mut usages: BTreeMap<_, _> = clients.iter().map(usage).collect();
        let mut groups = BTreeMap::new();
        let folders = store.groups()?;
        store.settle(&folders)?;
        if let Err(error) = store.sweep_adoptions() {
            tracing::warn!("{error}");
        }
        for folder in folders {
            crate::drill::sweep(store.disk(), &folder);
            let usage = Arc::clone(usages.entry(folder.client.clone()).or_default());
            let key = (folder.client.clone(), folder.group.clone());
            let options = options(&limits, &usage, &key.1, store.disk());
            let slot = match (means.open)(folder, usage, options) {
                Ok(group) => Slot::Open(group),
                Err(error) => {
                    tracing::error!("group {}/{} is not used: {error}", key.0, key.1);
                    Slot::Broken(Arc::new(error))
                }
            };
            groups.insert(key, slot);
        }
        Ok(Self {
            store,
            means,
            limits,
            hasher: OnceLock::new(),
            usages,
            groups: Mutex::new(groups),
            creating: Mutex::new(()),
            sessions: AtomicU64::new(1),
            handed: watch::Sender::new(0),
        })
    }

    /// The thread that hashes.
    pub(crate) fn hasher(&self) -> std::io::Result<&Hasher> {
        if let Some(hasher) = self.hasher.get() {
            return Ok(hasher);
        }
        // Two at once: one of them is dropped.
        let _ = self.hasher.set(Hasher::new()?);
        self.hasher.get().ok_or_else(|| std::io::ErrorKind::NotFound.into())
    }

    /// A group is no longer active: its primary has it back.
    pub(crate) fn handed(&self) {
        self.handed.send_modify(|count| *count += 1);
    }

    pub(crate) fn watch_handed(&self) -> watch::Receiver<u64> {
        self.handed.subscribe()
    }

    pub(crate) fn next_session(&self) -> SessionId {
        SessionId(self.sessions.fetch_add(1, Ordering::Relaxed))
    }

    /// What `client` has under that name, as its key sees it.
    pub(crate) fn lookup(&self, client: &Name, group: &Name, key: Fingerprint) -> Stored {
        let groups = self.groups.lock();
        match groups.get(&(client.clone(), group.clone())) {
            Some(Slot::Open(group)) => Stored::Present(group.stored(key)),
            Some(Slot::Broken(cause)) => Stored::Broken(Arc::clone(cause)),
            None => held(&groups, client),
        }
    }

    /// The group of that name, if it is open.
    pub(crate) fn get(&self, client: &Name, group: &Name) -> Option<Arc<Group>> {
        match self.groups.lock().get(&(client.clone(), group.clone())) {
            Some(Slot::Open(group)) => Some(Arc::clone(group)),
            _ => None,
        }
    }

    /// Creates a group; if it was created meanwhile, that one. `None` when another one took what was left of the client's
    /// limits meanwhile: look up again. Blocks on file I/O.
    pub(crate) fn create(
        &self,
        client: &Name,
        group: &Name,
        owner: Fingerprint,
        generation: Generation,
        volumes: Vec<Volume>,
    ) -> Result<Option<Arc<Group>>, Cause> {
        // Creations are rare, and one at a time: a second hello must find the group or nothing. The others look at the list meanwhile.
        let _alone = self.creating.lock();
        let key = (client.clone(), group.clone());
        {
            let groups = self.groups.lock();
            match groups.get(&key) {
                Some(Slot::Open(group)) => return Ok(Some(Arc::clone(group))),
                Some(Slot::Broken(cause)) => return Err(Arc::clone(cause)),
                None => {}
            }
            if let Stored::Absent { groups, volume_bytes } = held(&groups, client)
                && (groups >= self.limits.groups_per_client
                    || total(volume_bytes, &volumes) > self.limits.volume_bytes_per_client)
            {
                return Ok(None);
            }
        }
        let block = Superblock {
            group_id: (self.means.group_id)(client, group),
            owner,
            generation,
            role: GroupRole::Replica,
            base: None,
            base_seal: Default::default(),
            folding: None,
            synced: None,
            fork: None,
            first_segment: FIRST_SEGMENT,
            created_unix_us: crate::clock::unix_us(),
            volumes,
        };
        let usage = self.usages.get(client).cloned().unwrap_or_default();
        let folder = self.store.create_group(client, group, block).map_err(|e| Arc::new(e) as Cause)?;
        let options = options(&self.limits, &usage, group, self.store.disk());
        let group = (self.means.open)(folder, usage, options).map_err(|e| Arc::new(e) as Cause)?;
        self.groups.lock().insert(key, Slot::Open(Arc::clone(&group)));
        Ok(Some(group))
    }

    /// Whether the client has a group of that name, usable or not.
    pub(crate) fn has(&self, client: &Name, group: &Name) -> bool {
        self.groups.lock().contains_key(&(client.clone(), group.clone()))
    }

    /// Opens a group that was built aside, under its name. Blocks on file I/O.
    pub(crate) fn take_in(&self, client: &Name, group: &Name, building: &Path) -> Result<(), AdoptError> {
        let _alone = self.creating.lock();
        let key = (client.clone(), group.clone());
        {
            let groups = self.groups.lock();
            if groups.contains_key(&key) {
                return Err(AdoptError::Exists { client: client.clone(), group: group.clone() });
            }
            if let Stored::Absent { groups: count, .. } = held(&groups, client)
                && count >= self.limits.groups_per_client
            {
                return Err(AdoptError::Limit { client: client.clone() });
            }
        }
        let folder = self.store.name_group(building, client, group)?;
        let usage = self.usages.get(client).cloned().unwrap_or_default();
        let options = options(&self.limits, &usage, group, self.store.disk());
        let opened = (self.means.open)(folder, usage, options);
        let group = opened.map_err(|e| AdoptError::Open(Arc::new(e)))?;
        self.groups.lock().insert(key, Slot::Open(group));
        Ok(())
    }

    /// `group` or `client/group`.
    pub(crate) fn select(&self, given: &str) -> Result<Arc<Group>, SelectError> {
        let groups = self.groups.lock();
        let matches = |(c, g): &Key| match given.split_once('/') {
            Some((client, group)) => c.as_str() == client && g.as_str() == group,
            None => g.as_str() == given,
        };
        let mut found = groups.iter().filter(|(key, _)| matches(key));
        let given = || given.chars().take(130).collect::<String>();
        match (found.next(), found.next()) {
            (None, _) => Err(SelectError::Unknown { given: given() }),
            (Some((_, Slot::Open(group))), None) => Ok(Arc::clone(group)),
            (Some((_, Slot::Broken(cause))), None) => Err(SelectError::Broken { given: given(), cause: Arc::clone(cause) }),
            (Some(_), Some(_)) => {
                let choices = groups.keys().filter(|k| matches(k)).map(|(c, g)| format!("{c}/{g}")).collect();
                Err(SelectError::Ambiguous { given: given(), choices })
            }
        }
    }

    pub(crate) fn all(&self) -> Vec<(Name, Name, Slot)> {
        self.groups.lock().iter().map(|((c, g), slot)| (c.clone(), g.clone(), slot.clone())).collect()
    }

    pub(crate) fn open_groups(&self) -> Vec<Arc<Group>> {
        let open = |slot: &Slot| match slot {
            Slot::Open(group) => Some(Arc::clone(group)),
            Slot::Broken(_) => None,
        };
        self.groups.lock().values().filter_map(open).collect()
    }
}

/// What a client has, against its limits.
fn held(groups: &BTreeMap<Key, Slot>, client: &Name) -> Stored {
    let (mut count, mut volume_bytes) = (0, 0);
    for ((_, _), slot) in groups.iter().filter(|((c, _), _)| c == client) {
        count += 1;
        if let Slot::Open(group) = slot {
            volume_bytes = total(volume_bytes, &group.shared.volumes);
        }
    }
    Stored::Absent { groups: count, volume_bytes }
}

/// Space comes back by the segment, so whoever has little of it has short ones.
fn options(limits: &Limits, usage: &Usage, group: &Name, disk: &Disk) -> JournalOptions {
    let space_max = usage.group_max.get(group).copied().into_iter().chain(usage.max).min();
    let by_space = space_max.map_or(u64::MAX, |max| (max / SEGMENTS_IN_SPACE).max(SEGMENT_BYTES_MIN));
    JournalOptions { segment_bytes_max: limits.segment_bytes.min(SEGMENT_BYTES_MAX).min(by_space), disk: disk.clone() }
}

/// Promotes a group and opens its fork; asked again, it gives the same.
pub(crate) async fn activate(group: &Arc<Group>, point: Option<Point>) -> Result<Arc<OpenFork>, GroupError> {
    let mut active = group.active.lock().await;
    let promoted = group.promote(point).await?;
    opened(group, &mut active, promoted).await
}

/// Opens the fork of a group that is active; nothing is promoted.
pub(crate) async fn in_use(group: &Arc<Group>) -> Result<Arc<OpenFork>, GroupError> {
    let mut active = group.active.lock().await;
    let promised = group.shared.promised()?;
    opened(group, &mut active, promised).await
}

async fn opened(group: &Arc<Group>, active: &mut Option<Arc<OpenFork>>, promoted: Promoted) -> Result<Arc<OpenFork>, GroupError> {
    // One that was given back a moment ago may still be there.
    if let Some(fork) = active.as_ref().filter(|fork| fork.name == promoted.fork.name) {
        return Ok(Arc::clone(fork));
    }
    let shared = Arc::clone(&group.shared);
    let opened = tokio::task::spawn_blocking(move || crate::fork::open(&shared, promoted.generation, &promoted.fork)).await;
    let closed = || GroupError::Closed { group: group.shared.folder.group.clone() };
    let fork = Arc::new(opened.map_err(|_| closed())??);
    reach(Step::FailoverForkOpen);
    *active = Some(Arc::clone(&fork));
    Ok(fork)
}
