//! Who may have which disks back, and what would be given.

use std::sync::Arc;

use proto::control::{VERSION_MAX, VERSION_MIN};
use proto::fencing::GroupRole;
use proto::handback::{Ask, Ready};
use proto::units::BLOCK_BYTES;
use proto::{DirtyMap, Fingerprint, Generation, Name, Point};
use tokio::sync::mpsc;

use super::HandbackError;
use super::give::{Followed, Gift};
use crate::config::ClientConfig;
use crate::core::{SessionError, same_volumes};
use crate::fork::OpenFork;
use crate::group::{Group, GroupError, SessionId};
use crate::node::Node;
use crate::pins::Pinned;
use crate::superblock::Volume;
use crate::view::views;

/// What a group may be asked for.
pub(crate) enum Permitted {
    /// An earlier conversation came to its end, and the primary did not hear it.
    Done { point: Point, generation: Generation },
    /// What its active copy has become.
    Failback(Standing),
    /// This earlier point.
    Rollback(Standing, Point),
}

/// Where a group stands.
pub(crate) struct Standing {
    pub(crate) group: Arc<Group>,
    newest: Point,
    generation: Generation,
}

/// Checks what is asked.
pub(crate) fn permitted(node: &Node, client: &ClientConfig, key: Fingerprint, ask: &Ask) -> Result<Permitted, HandbackError> {
    let (name, group) = (client.name.clone(), ask.group.clone());
    if ask.version_min > VERSION_MAX || ask.version_max < VERSION_MIN {
        return Err(SessionError::Version { theirs_min: ask.version_min, theirs_max: ask.version_max }.into());
    }
    if u64::from(ask.block_bytes) != BLOCK_BYTES {
        return Err(SessionError::BlockSize { theirs: ask.block_bytes }.into());
    }
    let allowed = client.groups.as_ref().is_none_or(|groups| groups.contains(&group));
    let found = node.get(&name, &group).filter(|_| allowed);
    let found = found.ok_or_else(|| SessionError::UnknownGroup { group: group.clone(), client: name.clone() })?;
    let stored = found.stored(key);
    if !stored.owned {
        return Err(SessionError::Owner { group, client: name }.into());
    }
    if !client.handback {
        return Err(HandbackError::Forbidden { client: name });
    }
    let given = ask.volumes.iter().map(|v| Volume { name: v.name.clone(), size_bytes: v.size_bytes });
    same_volumes(&group, &stored.volumes, &given.collect::<Vec<_>>())?;
    let (newest, role, generation) = {
        let state = found.shared.state.read();
        (state.points.last().map(|p| (p.point, p.session)), state.role, state.generation)
    };
    let (newest, writer) = newest.ok_or_else(|| GroupError::Empty { group: group.clone() })?;
    if role == GroupRole::Replica && writer == ask.token {
        return Ok(Permitted::Done { point: newest, generation });
    }
    let named = |name: &Name| {
        let unknown = || HandbackError::NoName { group: group.clone(), name: name.clone() };
        found.shared.names.all().get(name).copied().ok_or_else(unknown)
    };
    let to = ask.named.as_ref().map(named).transpose()?.or(ask.to);
    let standing = Standing { group: found, newest, generation };
    match (role, to) {
        (GroupRole::Active, None) => Ok(Permitted::Failback(standing)),
        (GroupRole::Active, Some(_)) => Err(HandbackError::Active { group }),
        (GroupRole::Replica, None) if ask.generation < generation => Err(SessionError::Fenced { group, generation }.into()),
        (GroupRole::Replica, None) => Err(HandbackError::NotActive { group }),
        (GroupRole::Replica, Some(_)) if ask.generation != generation => Err(SessionError::Fenced { group, generation }.into()),
        (GroupRole::Replica, Some(point)) => Ok(Permitted::Rollback(standing, point)),
    }
}

/// Finds out what would be given of `fork`, or of the point `to`. Reads the journal.
pub(crate) fn look(
    standing: Standing,
    id: SessionId,
    ask: Ask,
    (fork, to): (Option<Arc<OpenFork>>, Option<Point>),
) -> Result<Gift, HandbackError> {
    let Standing { group, newest, generation } = standing;
    let shared = &group.shared;
    let from = fork.as_ref().map(|fork| fork.point).or(to).unwrap_or(newest);
    let (then, now) = (shared.index_at(from)?, shared.index_at(newest)?);
    let volumes = (0..shared.volumes.len()).filter_map(|v| Some((now.index.volume(v)?, then.index.volume(v)?)));
    let mut sets = volumes.map(|(now, then)| now.differing(then)).collect::<Vec<_>>();
    let newest_views = views(shared, now)?;
    let (sources, pin) = match &fork {
        Some(fork) => {
            let Pinned { _pin, .. } = then;
            // The point under the fork stays while it is given.
            (fork.devices().into_iter().map(|(_, device)| device).collect(), _pin)
        }
        None => (views(shared, then)?.into_iter().map(|view| Arc::new(view) as _).collect(), None),
    };
    let followed = fork.map(|fork| Followed::new(fork, &mut sets));
    let give_bytes = sets.iter().map(DirtyMap::bytes).sum();
    let version = ask.version_max.min(VERSION_MAX);
    let ready = Ready { version, generation, newest, from, give_bytes };
    // Nobody tells it anything before it has the group.
    let (_, events) = mpsc::channel(1);
    Ok(Gift::new(group, id, ask, ready, (followed, sources, pin), Arc::new(newest_views), sets, events))
}
