//! The copies this node keeps, in the words of the control socket: the only place, beside `onward`, that knows the receiver's own types.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use blockdev::BlockDevice;
use proto::units::BLOCK_BYTES;
use proto::{DirtyMap, Fingerprint, Generation, Identity, Name, Point};
use receiver::adopt::{AdoptProgress, Adoption};
use receiver::{GroupStatus, Limits, Receiver, ReceiverError, Role, SelectError};
use replicator::QueueStatus;
use tokio::sync::{RwLock, watch};

use super::adopt::AdoptRefused;
use super::drills::DrillRefused;
use super::exports::Offered;
use super::failover::RequestError;
use crate::api::{
    ActiveStatus, CopyState, CopyStatus, CopyVolume, DrillResult, DrillStatus, ForkList, ForkRemoval, ListedFork, NameRequest,
    Named, PointInfo, Points,
};
use crate::config::{ClientConfig, ReceiverConfig};

/// A group at the receiver: names are unique for each client only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GroupRef {
    pub(crate) client: Name,
    pub(crate) group: Name,
}

impl fmt::Display for GroupRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.client, self.group)
    }
}

/// An active copy.
pub(crate) struct Activated {
    pub(crate) group: GroupRef,
    pub(crate) point: Point,
    pub(crate) generation: Generation,
    pub(crate) volumes: Vec<(Name, Arc<dyn BlockDevice>)>,
    fork: receiver::Activated,
}

impl Activated {
    /// The blocks that were written since the point, by volume.
    pub(crate) fn written(&self) -> Vec<DirtyMap> {
        self.fork.written()
    }
}

impl From<receiver::Activated> for Activated {
    fn from(fork: receiver::Activated) -> Self {
        let group = GroupRef { client: fork.client.clone(), group: fork.group.clone() };
        Self { group, point: fork.point, generation: fork.generation, volumes: fork.volumes.clone(), fork }
    }
}

/// The receiver; `None` once it is shut down.
pub(crate) struct Copies {
    receiver: RwLock<Option<Receiver>>,
    space_max_bytes: Vec<(Name, u64)>,
    clients: Vec<ClientConfig>,
}

impl Copies {
    pub(crate) async fn start(config: &ReceiverConfig, identity: Identity) -> Result<Self, ReceiverError> {
        let clients = config.clients.iter().map(|c| receiver::ClientConfig {
            name: c.name.clone(),
            key: c.key,
            groups: c.groups.clone(),
            space_max_bytes: c.space_max_bytes,
            group_space_max_bytes: c.group_space_max_bytes.clone(),
            handback: c.handback,
            retention: c.retention.clone(),
        });
        let started = receiver::ReceiverConfig {
            listen: config.listen,
            store: config.store.clone(),
            clients: clients.collect(),
            flatten: config.flatten,
            limits: Limits::default(),
        };
        let receiver = Receiver::start(started, identity).await?;
        let space_max_bytes = config.clients.iter().filter_map(|c| Some((c.name.clone(), c.space_max_bytes?))).collect();
        Ok(Self { receiver: RwLock::new(Some(receiver)), space_max_bytes, clients: config.clients.clone() })
    }

    pub(crate) async fn status(&self, offered: &Offered, drills: &[DrillStatus]) -> Vec<CopyStatus> {
        let groups = self.receiver.read().await.as_ref().map(Receiver::status).unwrap_or_default();
        groups.into_iter().map(|group| self.translated(group, offered, drills)).collect()
    }

    fn translated(&self, group: GroupStatus, offered: &Offered, drills: &[DrillStatus]) -> CopyStatus {
        let name = GroupRef { client: group.client.clone(), group: group.group.clone() };
        let state = match (group.role, &group.peer) {
            (Role::Broken, _) => CopyState::Failed,
            (Role::Active, _) => CopyState::Active,
            (Role::Replica, Some(_)) => CopyState::Following,
            (Role::Replica, None) => CopyState::Waiting,
        };
        let queue = |q: receiver::QueueStatus| QueueStatus {
            unit: if q.name.ends_with("bytes") { "bytes" } else { "entries" }.to_owned(),
            name: q.name.replace(' ', "-"),
            used: q.used,
            limit: q.limit,
        };
        let export = offered.addresses.get(&name.to_string()).cloned();
        let error = match (&group.active, &export) {
            (Some(_), None) => Some(match offered.failed.get(&name.to_string()) {
                Some(error) => format!("not exported: {error}"),
                None => format!("not exported: run twinsite failover {name} --export ADDRESS"),
            }),
            _ => group.last_error,
        };
        CopyStatus {
            state,
            error,
            generation: group.generation,
            committed: group.committed.map(|p| p.point),
            cut_unix_us: group.committed.map(|p| p.cut_unix_us),
            committed_age_ms: group.committed_age_s.map(|s| (s * 1000.0) as u64),
            interval_ms: group.peer.as_ref().map(|p| u64::from(p.interval_ms)),
            points: group.points,
            stored_bytes: group.journal_bytes,
            received_bytes: group.bytes_received,
            index_bytes: group.index_bytes,
            space_max_bytes: self.space_max_bytes.iter().find(|(n, _)| *n == name.client).map(|(_, max)| *max),
            group_space_max_bytes: group.space_max_bytes,
            peer: group.peer.map(|p| p.address.to_string()),
            heard_age_ms: group.heard_age_s.map(|s| (s * 1000.0) as u64),
            primary_alive: group.primary_alive,
            volumes: group.volumes.into_iter().map(|v| CopyVolume { name: v.name, size_bytes: v.size_bytes }).collect(),
            queues: group.queues.into_iter().map(queue).collect(),
            scrubbed_bytes: group.scrub.compared_bytes,
            differing_bytes: group.scrub.differing_bytes,
            damaged_frames: group.scrub.damaged_frames,
            damaged_base_blocks: group.scrub.damaged_base_blocks,
            last_damage: group.scrub.last_damage,
            retention: group.retention,
            active: group.active.map(|a| ActiveStatus { point: a.point, export, flatten: a.flatten }),
            forks: group.kept,
            drills: drills.iter().filter(|d| d.client == name.client && d.group == name.group).cloned().collect(),
            verified: group.drills.verified,
            last_drill: group.drills.last,
            drill_error: group.drills.error,
            client: name.client,
            group: name.group,
        }
    }

    /// The group that `selector` (`group` or `client/group`) names.
    pub(crate) async fn find(&self, selector: &str) -> Result<GroupRef, RequestError> {
        let groups = self.receiver.read().await.as_ref().map(Receiver::status).unwrap_or_default();
        let all = || groups.iter().map(|g| GroupRef { client: g.client.clone(), group: g.group.clone() });
        let mut matching = all().filter(|g| g.group.as_str() == selector || g.to_string() == selector);
        let named = |mut of: Vec<String>| {
            of.sort();
            of
        };
        match (matching.next(), matching.next()) {
            (Some(one), None) => Ok(one),
            (None, _) => {
                let known = named(all().map(|g| g.to_string()).collect());
                Err(RequestError::UnknownGroup { given: selector.to_owned(), known })
            }
            (Some(_), Some(_)) => {
                let known = named(all().filter(|g| g.group.as_str() == selector).map(|g| g.to_string()).collect());
                Err(RequestError::AmbiguousGroup { given: selector.to_owned(), known })
            }
        }
    }

    pub(crate) async fn points(&self, group: &GroupRef) -> Result<Points, RequestError> {
        let receiver = self.receiver.read().await;
        let receiver = running(receiver.as_ref())?;
        let points = receiver.points(&group.to_string()).map_err(failed)?;
        // What is wrong with the results is said by `status`; the points are there all the same.
        let results = receiver.drill_results(&group.to_string()).unwrap_or_default();
        let results: BTreeMap<Point, _> = results.iter().map(|result| (result.point, result)).collect();
        let mut names: BTreeMap<Point, Vec<Name>> = BTreeMap::new();
        for (name, point) in receiver.names(&group.to_string()).map_err(failed)? {
            names.entry(point).or_default().push(name);
        }
        let mut one = |p: receiver::PointInfo| PointInfo {
            drill: results.get(&p.point).map(|result| DrillResult::clone(result)),
            point: p.point,
            cut_unix_us: p.cut_unix_us,
            changed_bytes: (p.data_blocks + p.zero_blocks) * BLOCK_BYTES,
            stored_bytes: p.frame_bytes,
            names: names.remove(&p.point).unwrap_or_default(),
        };
        Ok(Points {
            client: group.client.clone(),
            group: group.group.clone(),
            points: points.into_iter().map(&mut one).collect(),
        })
    }

    /// The point that a text means: a point, or the name of one. Whoever takes a point takes a name.
    pub(crate) async fn resolve(&self, group: &GroupRef, text: &str) -> Result<Point, RequestError> {
        if let Ok(point) = text.parse() {
            return Ok(point);
        }
        let receiver = self.receiver.read().await;
        let names = running(receiver.as_ref())?.names(&group.to_string()).map_err(failed)?;
        let named = text.parse::<Name>().ok().and_then(|name| names.get(&name).copied());
        named.ok_or_else(|| RequestError::UnknownName { group: group.to_string(), given: text.to_owned() })
    }

    /// Names a point, or takes a name away.
    pub(crate) async fn name(&self, group: &GroupRef, request: &NameRequest) -> Result<Named, RequestError> {
        let point = match &request.point {
            // Whoever takes a point takes a name, and must not be in doubt.
            Some(_) if request.name.as_str().parse::<Point>().is_ok() => {
                return Err(RequestError::Name(format!("name '{}' reads like a point: choose another", request.name)));
            }
            Some(text) => Some(self.resolve(group, text).await?),
            None => None,
        };
        let receiver = self.receiver.read().await;
        let (receiver, selector) = (running(receiver.as_ref())?, group.to_string());
        let point = match point {
            Some(point) => receiver.name_point(&selector, point, &request.name).await.map(|()| point),
            None => receiver.unname_point(&selector, &request.name).await,
        };
        let point = point.map_err(|error| RequestError::Name(error.to_string()))?;
        Ok(Named { client: group.client.clone(), group: group.group.clone(), name: request.name.clone(), point })
    }

    /// Activates `point`, or the newest; an active group gives the fork it has.
    pub(crate) async fn failover(&self, group: &GroupRef, point: Option<Point>) -> Result<Activated, RequestError> {
        let receiver = self.receiver.read().await;
        Ok(running(receiver.as_ref())?.failover(&group.to_string(), point).await.map_err(failed)?.into())
    }

    /// Activates the point that [`drain`](Self::drain) gave, if it is the last one still.
    pub(crate) async fn switchover(&self, group: &GroupRef, point: Point) -> Result<Activated, RequestError> {
        let receiver = self.receiver.read().await;
        Ok(running(receiver.as_ref())?.switchover(&group.to_string(), point).await.map_err(failed)?.into())
    }

    /// Has the primary take no more writes and commit what it has. Returns the point that holds all of it.
    pub(crate) async fn drain(&self, group: &GroupRef, within: Duration) -> Result<Point, RequestError> {
        let receiver = self.receiver.read().await;
        running(receiver.as_ref())?.drain(&group.to_string(), within).await.map_err(failed)
    }

    /// Lets the primary take writes again, unless the copy is active.
    pub(crate) async fn give_up_drain(&self, group: &GroupRef) -> Result<(), RequestError> {
        let receiver = self.receiver.read().await;
        running(receiver.as_ref())?.give_up_drain(&group.to_string()).await.map_err(failed)
    }

    /// A copy, for the group that replicates it onward; `None` while there is none of that name.
    pub(crate) async fn onward(&self, group: &GroupRef) -> Result<Option<receiver::Onward>, RequestError> {
        let receiver = self.receiver.read().await;
        match running(receiver.as_ref())?.onward(&group.to_string()) {
            Ok(copy) => Ok(Some(copy)),
            Err(ReceiverError::Select(SelectError::Unknown { .. })) => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }

    /// Changes whenever a group was given back to its primary.
    pub(crate) async fn handed_back(&self) -> Option<watch::Receiver<u64>> {
        self.receiver.read().await.as_ref().map(Receiver::handed_back)
    }

    /// Every active group, opened again after a start; for one that cannot be opened, why.
    pub(crate) async fn all_activated(&self) -> Vec<Result<Activated, String>> {
        let receiver = self.receiver.read().await;
        let Some(receiver) = receiver.as_ref() else { return Vec::new() };
        receiver.activated().await.into_iter().map(|a| a.map(Into::into).map_err(|error| error.to_string())).collect()
    }

    /// A group that a client may send, there or not, and the client's key.
    pub(crate) fn expected(&self, selector: &str) -> Result<(GroupRef, Fingerprint), RequestError> {
        let known = || self.clients.iter().map(|c| c.name.to_string()).collect();
        let unknown = || AdoptRefused::Client { given: selector.to_owned(), known: known() };
        let (client, group) = match (selector.split_once('/'), self.clients.as_slice()) {
            (Some((client, group)), all) => (all.iter().find(|c| c.name.as_str() == client).ok_or_else(unknown)?, group),
            (None, [one]) => (one, selector),
            (None, _) => return Err(unknown().into()),
        };
        let group = group.parse::<Name>().map_err(|_| unknown())?;
        if client.groups.as_ref().is_some_and(|groups| !groups.contains(&group)) {
            return Err(AdoptRefused::NotAllowed { client: client.name.clone(), group }.into());
        }
        Ok((GroupRef { client: client.name.clone(), group }, client.key))
    }

    /// Makes images the base of a new group. Does not hold the receiver: a stop tells it to end first.
    pub(crate) async fn adopt(&self, adoption: Adoption, progress: Arc<AdoptProgress>) -> Result<(), RequestError> {
        let adopting = {
            let receiver = self.receiver.read().await;
            running(receiver.as_ref())?.adopt(adoption, progress)
        };
        adopting.await.map_err(failed)
    }

    /// Makes a drill; nothing of the group changes.
    pub(crate) async fn drill(&self, group: &str, wish: receiver::drill::DrillWish) -> Result<receiver::Drill, RequestError> {
        let receiver = self.receiver.read().await;
        running(receiver.as_ref())?.drill(group, wish).await.map_err(no_point)
    }

    /// The disks of a point or of a kept fork, read-only.
    pub(crate) async fn whole(&self, group: &str, of: receiver::drill::Of) -> Result<receiver::Whole, RequestError> {
        let receiver = self.receiver.read().await;
        running(receiver.as_ref())?.whole(group, of).await.map_err(no_point)
    }

    /// The kept forks of one group, or of all.
    pub(crate) async fn forks(&self, selector: Option<&str>) -> Result<ForkList, RequestError> {
        let only = match selector {
            Some(selector) => Some(self.find(selector).await?),
            None => None,
        };
        let groups = self.receiver.read().await.as_ref().map(Receiver::status).unwrap_or_default();
        let wanted = |g: &GroupStatus| only.as_ref().is_none_or(|only| only.client == g.client && only.group == g.group);
        let listed = |g: GroupStatus| {
            let (client, group) = (g.client, g.group);
            g.kept.into_iter().map(move |fork| ListedFork { client: client.clone(), group: group.clone(), fork })
        };
        Ok(ForkList { forks: groups.into_iter().filter(wanted).flat_map(listed).collect() })
    }

    /// Removes a kept fork.
    pub(crate) async fn remove_fork(&self, removal: &ForkRemoval) -> Result<ListedFork, RequestError> {
        let group = self.find(&removal.group).await?;
        let receiver = self.receiver.read().await;
        let removed = running(receiver.as_ref())?.remove_fork(&group.to_string(), &removal.fork).await;
        let fork = removed.map_err(|error| match error {
            ReceiverError::Kept(error) => RequestError::Fork(error.to_string()),
            error => failed(error),
        })?;
        tracing::warn!(%group, fork = %fork.name, own_bytes = fork.own_bytes, "the kept fork was removed, as somebody asked for");
        Ok(ListedFork { client: group.client, group: group.group, fork })
    }

    /// Throws a drill away.
    pub(crate) async fn end_drill(&self, drill: receiver::Drill) -> Result<(), RequestError> {
        let receiver = self.receiver.read().await;
        running(receiver.as_ref())?.end_drill(drill).await.map_err(failed)
    }

    /// Keeps what a drill found.
    pub(crate) async fn record_drill(&self, group: &str, result: DrillResult) -> Result<(), RequestError> {
        let receiver = self.receiver.read().await;
        running(receiver.as_ref())?.record_drill(group, result).await.map_err(failed)
    }

    /// What drills of a group found, oldest first.
    pub(crate) async fn drill_results(&self, group: &str) -> Result<Vec<DrillResult>, RequestError> {
        let receiver = self.receiver.read().await;
        let results = running(receiver.as_ref())?.drill_results(group).map_err(failed)?;
        Ok(results.iter().map(|result| result.as_ref().clone()).collect())
    }

    pub(crate) async fn shutdown(&self) {
        if let Some(receiver) = self.receiver.write().await.take() {
            receiver.shutdown().await;
        }
    }
}

fn running(receiver: Option<&Receiver>) -> Result<&Receiver, RequestError> {
    receiver.ok_or_else(|| failed(ReceiverError::Stopping))
}

/// A group or point that is not there is no failure.
fn no_point(error: ReceiverError) -> RequestError {
    use receiver::GroupError::{Empty, NoPoint};
    use receiver::KeptError::{Damaged, Unknown};
    use receiver::drill::DrillError::{Group, Kept};
    match &error {
        ReceiverError::Drill(Kept(Unknown { .. } | Damaged { .. })) => DrillRefused::NoPoint(error.to_string()).into(),
        ReceiverError::Group(Empty { .. } | NoPoint { .. }) | ReceiverError::Drill(Group(Empty { .. } | NoPoint { .. })) => {
            DrillRefused::NoPoint(error.to_string()).into()
        }
        _ => failed(error),
    }
}

fn failed(error: ReceiverError) -> RequestError {
    RequestError::Receiver(error.to_string())
}
