//! A receiver without a network and without threads.
//!
//! Calls do everything that can be done before they return, commits included; what a primary would get is in
//! [`outputs`](Replica::outputs). Dropping it is `kill -9`: nothing is written any more.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use blockdev::BlockDevice;
use proto::fencing::GroupRole;
use proto::{Fingerprint, Generation, Name, Point, SessionToken};

use super::handback::{KeptFork, in_use};
use super::session::{Session, drive};
use crate::config::{ClientConfig, Limits};
use crate::core::{ClientPolicy, Core, Event};
use crate::disk::Disk;
use crate::group::{Drained, Group, GroupError, Promoted};
use crate::journal::GroupId;
use crate::node::{Means, Node, SelectError, Slot};
#[cfg(test)]
use crate::retention::thin::{self, Plan};
use crate::status::QueueStatus;
use crate::store::{Store, StoreError};
use crate::view::View;

/// Number of a session of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SessionNo(pub u64);

/// Number of a unidirectional stream of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamNo(pub u64);

/// What a session's primary gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Bytes of the control stream: one whole message.
    Control(Vec<u8>),
    /// It opens the next stream to its primary.
    PassOpen,
    /// Bytes of the stream that was opened last.
    PassData(Vec<u8>),
    /// That stream is complete.
    PassEnd,
    /// Nobody writes to the active copy now, and what it holds, or the earlier point that was asked for, is about to become this point.
    Sealing {
        /// The point.
        point: Point,
        /// The token of the handback.
        session: SessionToken,
    },
    /// The connection is closed once what came before has arrived. The session is over.
    Closed {
        /// Close code.
        code: u16,
        /// Reason.
        reason: String,
    },
}

/// A group that is the running server.
pub struct ActiveCopy {
    /// Its generation.
    pub generation: Generation,
    /// The point that it began from.
    pub point: Point,
    /// Its disks, for its guests.
    pub devices: Vec<Arc<dyn BlockDevice>>,
}

impl std::fmt::Debug for ActiveCopy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ActiveCopy({} in generation {})", self.point, self.generation)
    }
}

/// Why a replica does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The group is not found, or was refused when the store was opened.
    #[error(transparent)]
    Select(#[from] SelectError),
    /// The group failed.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// A view could not be read.
    #[error("cannot read the view: {0}")]
    Read(#[from] std::io::Error),
    /// No such volume.
    #[error("the group has no volume {volume}")]
    NoVolume {
        /// Its number.
        volume: usize,
    },
}

/// Identities that are the same in every run and differ between groups.
fn group_id(client: &Name, group: &Name) -> GroupId {
    let mut id = [0x51_u8; 16];
    for (i, byte) in client.as_str().bytes().chain([0]).chain(group.as_str().bytes()).enumerate() {
        if let Some(to) = id.get_mut(i % 16) {
            *to = to.rotate_left(3) ^ byte;
        }
    }
    id
}

/// A receiver, stepped by hand.
#[derive(Debug)]
pub struct Replica {
    node: Node,
    clients: Vec<ClientConfig>,
    sessions: BTreeMap<SessionNo, Session>,
}

impl Replica {
    /// Opens the store at `store`, creating it if it is not there, and every group with recovery, as a start does. A group that
    /// is refused answers with its error; the others go on.
    ///
    /// # Errors
    /// [`ReplicaError::Store`].
    pub fn open(store: &Path, disk: Disk, clients: Vec<ClientConfig>, limits: Limits) -> Result<Self, ReplicaError> {
        let store = Store::open_on(disk, store)?;
        let node = Node::open(store, &clients, limits, Means { open: Group::parked, group_id })?;
        Ok(Self { node, clients, sessions: BTreeMap::new() })
    }

    /// A connection with a verified key; `None` if the key is no client's.
    pub fn connect(&mut self, key: Fingerprint) -> Option<SessionNo> {
        let client = self.clients.iter().find(|c| c.key == key)?;
        let policy = ClientPolicy {
            client: client.name.clone(),
            groups: client.groups.clone(),
            groups_max: self.node.limits.groups_per_client,
            volumes_max: self.node.limits.volumes_per_group,
            volume_bytes_max: self.node.limits.volume_bytes_per_client,
        };
        let id = self.node.next_session();
        let number = SessionNo(id.0);
        self.sessions.insert(number, Session::new(id, client.clone(), key, Core::new(policy)));
        Some(number)
    }

    fn with(&mut self, session: SessionNo, act: impl FnOnce(&mut Session, &Node)) {
        if let Some(session) = self.sessions.get_mut(&session).filter(|s| !s.has_ended()) {
            act(session, &self.node);
        }
        // A claim, a commit or an end may have told the others something.
        for other in self.sessions.values_mut() {
            other.pump(&self.node);
        }
    }

    /// Bytes of the control stream, in pieces of any size. Of a session that ended they are dropped, here and below.
    pub fn control(&mut self, session: SessionNo, bytes: &[u8]) {
        self.with(session, |s, node| s.control(node, bytes));
    }

    /// The next unidirectional stream, in the order in which the primary opened them.
    pub fn pass_open(&mut self, session: SessionNo) -> StreamNo {
        let mut number = StreamNo(0);
        self.with(session, |s, _| number = s.pass_open());
        number
    }

    /// Bytes of a stream, in pieces of any size. Those of a stream whose turn has not come wait.
    pub fn pass_data(&mut self, session: SessionNo, stream: StreamNo, bytes: &[u8]) {
        self.with(session, |s, node| s.pass_data(node, stream, bytes));
    }

    /// The stream is finished.
    pub fn pass_end(&mut self, session: SessionNo, stream: StreamNo) {
        self.with(session, |s, node| s.pass_end(node, stream));
    }

    /// The stream is reset: what was not read yet is gone.
    pub fn pass_reset(&mut self, session: SessionNo, stream: StreamNo) {
        self.with(session, |s, node| s.pass_reset(node, stream));
    }

    /// The connection is lost, or was closed by the primary.
    pub fn lost(&mut self, session: SessionNo) {
        self.with(session, |s, _| s.release("connection lost"));
        self.sessions.remove(&session);
    }

    /// What primaries get, in order for each session; sessions that ended are forgotten.
    pub fn outputs(&mut self) -> Vec<(SessionNo, Output)> {
        let mut outputs = Vec::new();
        for (number, session) in &mut self.sessions {
            outputs.extend(session.take_outputs().into_iter().map(|o| (*number, o)));
        }
        self.sessions.retain(|_, s| !s.has_ended());
        outputs
    }

    /// Raises the generation durably and promises the fork of `point` (the newest by default). Its primary is told. The
    /// fork itself is not made: its data is not on the simulated disk. Returns the generation and the point.
    ///
    /// # Errors
    /// [`ReplicaError`].
    pub fn promote(&mut self, group: &str, point: Option<Point>) -> Result<(Generation, Point), ReplicaError> {
        let group = self.node.select(group)?;
        let promoted = drive(&group, group.promote(point));
        self.promoted(promoted)
    }

    fn promoted(&mut self, promoted: Result<Promoted, GroupError>) -> Result<(Generation, Point), ReplicaError> {
        for session in self.sessions.values_mut() {
            session.pump(&self.node);
        }
        let promoted = promoted?;
        Ok((promoted.generation, promoted.fork.point))
    }

    /// The disks of a group that is active, opened if they are not.
    ///
    /// # Errors
    /// [`ReplicaError::Group`] if it is not active, or cannot be opened.
    pub fn active(&self, group: &str) -> Result<ActiveCopy, ReplicaError> {
        let fork = in_use(&*self.node.select(group)?)?;
        let devices = fork.devices().into_iter().map(|(_, device)| device).collect();
        Ok(ActiveCopy { generation: fork.generation, point: fork.point, devices })
    }

    /// A session that gives disks back does a part of what takes time.
    pub fn work(&mut self, session: SessionNo) {
        self.with(session, |s, node| s.work(node));
    }

    /// Asks the primary that follows to take no more writes. Whether there is one.
    ///
    /// # Errors
    /// [`ReplicaError::Select`].
    pub fn drain(&mut self, group: &str) -> Result<bool, ReplicaError> {
        let group = self.node.select(group)?;
        let asked = drive(&group, group.ask_to_drain())?;
        self.sessions.values_mut().for_each(|session| session.pump(&self.node));
        Ok(asked)
    }

    /// The point up to which a primary that was asked has committed all; `None` as long as it has not said so.
    ///
    /// # Errors
    /// [`ReplicaError::Select`]; [`GroupError::DrainLost`] if it takes writes again.
    pub fn drained(&self, group: &str) -> Result<Option<Point>, ReplicaError> {
        let group = self.node.select(group)?;
        match *group.shared.drained.borrow() {
            Drained::Waiting => Ok(None),
            Drained::All(point) => Ok(Some(point)),
            Drained::No | Drained::Lost => Err(GroupError::DrainLost { group: group.shared.folder.group.clone() }.into()),
        }
    }

    /// As [`promote`](Self::promote), at the point that [`drained`](Self::drained) gave.
    ///
    /// # Errors
    /// [`ReplicaError`]; [`GroupError::DrainLost`] if its primary takes writes again: nothing was changed then.
    pub fn switch_over(&mut self, group: &str, point: Point) -> Result<(Generation, Point), ReplicaError> {
        let group = self.node.select(group)?;
        let promoted = drive(&group, group.promote_drained(point));
        self.promoted(promoted)
    }

    /// Lets a primary that was asked take writes again.
    ///
    /// # Errors
    /// [`ReplicaError::Select`].
    pub fn give_up_drain(&mut self, group: &str) -> Result<(), ReplicaError> {
        let group = self.node.select(group)?;
        drive(&group, group.give_up_drain());
        group.turn();
        self.sessions.values_mut().for_each(|session| session.pump(&self.node));
        Ok(())
    }

    /// The forks that a group keeps of what its primary had written of its own. Looks only.
    ///
    /// # Errors
    /// [`ReplicaError`].
    pub fn kept(&self, group: &str) -> Result<Vec<KeptFork>, ReplicaError> {
        let group = self.node.select(group)?;
        Ok(super::handback::kept(&group.shared).map_err(GroupError::from)?)
    }

    /// Folds everything up to `point` into the base.
    ///
    /// # Errors
    /// [`ReplicaError`]. After an error it can be asked again.
    pub fn fold(&mut self, group: &str, point: Point) -> Result<(), ReplicaError> {
        let group = self.node.select(group)?;
        let entry = drive(&group, group.begin_fold(point))?;
        let (_, at_base) = group.shared.write_base(&entry, &mut |_, _| Ok(()))?;
        let switched = drive(&group, group.end_fold(point))?;
        group.shared.clean_up(switched, &at_base)?;
        Ok(())
    }

    /// What can be thinned if one point of each interval `every` of the primary's clock is to be left.
    #[cfg(test)]
    pub(super) fn plan(&self, group: &str, every: std::time::Duration) -> Result<Option<Plan>, ReplicaError> {
        let shared = Arc::clone(&self.node.select(group)?.shared);
        let rung = crate::Rung { every: Some(every), reach: std::time::Duration::from_secs(1 << 40) };
        let state = shared.state.read();
        let stay = shared.points_that_stay(state.fork.as_ref().map(|fork| fork.point));
        let ended = shared.ended.lock().clone();
        let situation = thin::Situation {
            points: &state.points,
            stay: &stay,
            ended: &ended,
            segment_bytes_max: shared.segment_bytes_max,
            now_unix_us: u64::MAX,
            patient: false,
        };
        let ladder = crate::Ladder::new(vec![rung]).ok();
        Ok(ladder.filter(|_| state.folding.is_none()).and_then(|ladder| thin::plan(&ladder, &situation, 0)))
    }

    /// Thins. `between` is called when the new segment is built and has not its name yet.
    ///
    /// # Errors
    /// [`ReplicaError`]. After an error it can be planned again.
    #[cfg(test)]
    pub(super) fn thin(&mut self, group: &str, plan: &Plan, between: impl FnOnce(&Self)) -> Result<(), ReplicaError> {
        let open = self.node.select(group)?;
        // Whether it is worth it is not asked: there is little in a test.
        let built = open.shared.write_thinned_anyway(plan, &mut |_, _| Ok(()))?;
        between(self);
        let built = Arc::new(built);
        if let Err(error) = drive(&open, open.end_thin(&built)) {
            if matches!(error, GroupError::Kept { .. }) {
                open.shared.forget_thinned(&built)?;
            }
            return Err(error.into());
        }
        Ok(open.shared.remove_thinned(&built)?)
    }

    /// Has the keeper look at a group at this time of day, and do what is due.
    #[cfg(test)]
    pub(super) fn tend(&mut self, group: &str, now_unix_us: u64) -> Result<crate::RetentionStatus, ReplicaError> {
        use crate::retention::keeper::{self, Drive};
        let group = self.node.select(group)?;
        keeper::tend(&group, now_unix_us, &mut Drive { ask: &|asked| drive(&group, asked), is_stopped: &|| false });
        Ok(keeper::status(&group.shared))
    }

    /// Names a point.
    ///
    /// # Errors
    /// [`ReplicaError`].
    pub fn name(&mut self, group: &str, point: Point, name: &Name) -> Result<(), ReplicaError> {
        Ok(self.node.select(group)?.shared.name_point(point, name)?)
    }

    #[cfg(test)]
    pub(super) fn node(&self) -> &Node {
        &self.node
    }

    /// Estimated memory of the newest point's index.
    #[cfg(test)]
    pub(super) fn index_bytes(&self, group: &str) -> Result<u64, ReplicaError> {
        Ok(self.node.select(group)?.shared.state.read().index.memory_bytes())
    }

    /// The point up to which a fold has begun that is not done.
    ///
    /// # Errors
    /// [`ReplicaError::Select`].
    pub fn folding(&self, group: &str) -> Result<Option<Point>, ReplicaError> {
        Ok(self.node.select(group)?.shared.state.read().folding)
    }

    /// As [`promote`](Self::promote), and makes the fork.
    #[cfg(test)]
    pub(super) fn activate(&mut self, group: &str, point: Option<Point>) -> Result<(Generation, Point), ReplicaError> {
        let promoted = self.promote(group, point)?;
        let group = self.node.select(group)?;
        let fork = group.shared.state.read().fork.clone();
        if let Some(fork) = fork {
            crate::fork::open(&group.shared, promoted.0, &fork)?;
        }
        Ok(promoted)
    }

    /// The groups, as `client/group`; those that were refused with their error.
    #[must_use]
    pub fn groups(&self) -> Vec<(String, Option<String>)> {
        let entry = |(client, group, slot): (Name, Name, Slot)| {
            let broken = match slot {
                Slot::Open(_) => None,
                Slot::Broken(cause) => Some(cause.to_string()),
            };
            (format!("{client}/{group}"), broken)
        };
        self.node.all().into_iter().map(entry).collect()
    }

    /// The committed points of a group, oldest first.
    ///
    /// # Errors
    /// [`ReplicaError::Select`].
    pub fn points(&self, group: &str) -> Result<Vec<Point>, ReplicaError> {
        let group = self.node.select(group)?;
        let state = group.shared.state.read();
        Ok(state.points.iter().map(|p| p.point).collect())
    }

    /// The committed points of a group, oldest first, with the sessions that cut them.
    ///
    /// # Errors
    /// [`ReplicaError::Select`].
    pub fn writers(&self, group: &str) -> Result<Vec<(Point, SessionToken)>, ReplicaError> {
        let group = self.node.select(group)?;
        let state = group.shared.state.read();
        Ok(state.points.iter().map(|p| (p.point, p.session)).collect())
    }

    /// Generation, role, and the point of the fork in use.
    ///
    /// # Errors
    /// [`ReplicaError::Select`].
    pub fn generation(&self, group: &str) -> Result<(Generation, GroupRole, Option<Point>), ReplicaError> {
        let group = self.node.select(group)?;
        let state = group.shared.state.read();
        Ok((state.generation, state.role, state.fork.as_ref().map(|f| f.point)))
    }

    /// The queues of a group and their limits; none if it is not there.
    #[must_use]
    pub fn queues(&self, group: &str) -> Vec<QueueStatus> {
        self.node.select(group).map_or_else(|_| Vec::new(), |group| crate::status::queues(&group))
    }

    /// The volumes of a group at a point; read them with [`View::read_now`].
    ///
    /// # Errors
    /// [`ReplicaError`].
    pub fn views(&self, group: &str, point: Point) -> Result<Vec<View>, ReplicaError> {
        let group = self.node.select(group)?;
        Ok(crate::view::views(&group.shared, group.shared.index_at(point)?)?)
    }

    /// Bytes of a volume at a point. Builds the index of the point each time; see [`views`](Self::views) for more than one read.
    ///
    /// # Errors
    /// [`ReplicaError`].
    pub fn read_view(
        &self,
        group: &str,
        point: Point,
        volume: usize,
        offset: u64,
        length: usize,
    ) -> Result<Vec<u8>, ReplicaError> {
        let views = self.views(group, point)?;
        let mut bytes = vec![0; length];
        views.get(volume).ok_or(ReplicaError::NoVolume { volume })?.read_now(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// The clean stop of a node: sessions are told, superblocks remember how far their journals go. Returns the last outputs.
    pub fn stop(mut self) -> Vec<(SessionNo, Output)> {
        for session in self.sessions.values_mut() {
            session.handle(&self.node, Event::Stopping);
        }
        let outputs = self.outputs();
        for group in self.node.open_groups() {
            drive(&group, group.stop());
        }
        outputs
    }
}
