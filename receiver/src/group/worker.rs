//! The thread of a group: alone writes its journal and its superblock.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockdev::steps::{Step, reach};
use proto::control::STAGED_EVERY_BYTES;
use proto::fencing::GroupRole;
use proto::frame::FRAME_HEADER_BYTES;
use proto::{EpochId, FrameKind, Generation, Point, Seal};
use tokio::sync::{mpsc, watch};

use super::stage::Stage;
use super::{
    Claimed, Command, Drained, GroupError, GroupEvent, Peer, PointEntry, Promoted, SessionId, Shared, Snapshot, Usage,
    next_frame, number_frame,
};
use crate::batch::Batch;
use crate::core::{Arrived, Cause};
use crate::fork::ACTIVE_PREFIX;
use crate::journal::{Journal, JournalError, PLACED_SEAL_BYTES};
use crate::superblock::{ForkInUse, Superblock, SuperblockFile};

#[derive(Debug)]
pub(super) struct ActiveSession {
    id: SessionId,
    events: mpsc::Sender<GroupEvent>,
    staged: watch::Sender<(EpochId, u64)>,
}

/// The thread's own state.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) journal: Journal,
    pub(super) superblock: SuperblockFile,
    /// The epoch that is arriving; nobody else sees it.
    pub(super) stage: Stage,
    /// What of it is in the journal.
    pub(super) arrived: Arrived,
    /// Bytes of its frames that the session was told of.
    pub(super) told_bytes: u64,
    pub(super) next_committed: u32,
    pub(super) session: Option<ActiveSession>,
    pub(super) usage: Arc<Usage>,
    /// Journal bytes that are in `usage`.
    pub(super) counted: u64,
}

impl Worker {
    pub(super) fn run(&mut self, mut inbox: mpsc::Receiver<Command>) {
        while let Some(command) = inbox.blocking_recv() {
            if self.handle(command).is_break() {
                break;
            }
        }
        self.stop();
    }

    /// Performs a command; breaks when it is to stop.
    pub(super) fn handle(&mut self, command: Command) -> ControlFlow<()> {
        match command {
            Command::Claim { session, peer, generation, events, reply } => {
                let _ = reply.send(self.claim(session, peer, generation, events));
            }
            Command::Append { session, batch } if self.has(session) => {
                let done = self.append(&batch);
                self.end_on_error(done);
            }
            Command::Commit { session, seal } if self.has(session) => {
                let done = self.commit(&seal);
                self.end_on_error(done);
            }
            Command::Abandon { session } if self.has(session) => {
                let done = self.abandon();
                self.end_on_error(done);
            }
            Command::Release { session, reason } if self.has(session) => {
                // What has arrived stays: the next session may go on behind it.
                self.session = None;
                self.end_waiting();
                let mut state = self.shared.state.write();
                state.peer = None;
                state.last_error = Some(reason);
                state.journal_bytes = self.journal.bytes();
            }
            Command::Snapshot { session, reply } if self.has(session) => {
                let index = self.shared.newest();
                let point = self.shared.state.read().points.last().map(|p| p.point);
                let _ = reply.send(Snapshot { point, index });
            }
            Command::ClaimHandback { session, peer, stands, events, reply } => {
                let _ = reply.send(self.claim_handback(session, peer, stands, events));
            }
            Command::Hand { session, seal, reply } if self.has(session) => {
                let _ = reply.send(self.hand(&seal).map(Some));
            }
            Command::Hand { reply, .. } => {
                let _ = reply.send(Ok(None));
            }
            Command::Drain { reply } => {
                let following = self.superblock.get().role == GroupRole::Replica && self.session.is_some();
                if following {
                    self.shared.drained.send_replace(Drained::Waiting);
                    self.tell(GroupEvent::Drain);
                }
                let _ = reply.send(following);
            }
            Command::GiveUpDrain => {
                self.shared.drained.send_replace(Drained::No);
                self.end_session(GroupEvent::Superseded);
            }
            // Of a session that lost the group.
            Command::Append { .. }
            | Command::Commit { .. }
            | Command::Abandon { .. }
            | Command::Snapshot { .. }
            | Command::Release { .. } => {}
            Command::Promote { point, drained, reply } => {
                let _ = reply.send(self.promote(point, drained));
            }
            Command::BeginFold { point, reply } => {
                let _ = reply.send(self.begin_fold(point));
            }
            Command::EndFold { point, reply } => {
                let _ = reply.send(self.end_fold(point));
            }
            Command::EndThin { thinned, reply } => {
                let _ = reply.send(self.end_thin(&thinned));
            }
            Command::Stop => return ControlFlow::Break(()),
        }
        ControlFlow::Continue(())
    }

    fn has(&self, session: SessionId) -> bool {
        self.session.as_ref().is_some_and(|s| s.id == session)
    }

    fn claim(&mut self, id: SessionId, peer: Peer, generation: Generation, events: mpsc::Sender<GroupEvent>) -> Claimed {
        let (role, ours) = (self.superblock.get().role, self.superblock.get().generation);
        if (role != GroupRole::Replica || ours != generation) && !accepts_any_generation() {
            return Claimed::Changed;
        }
        self.end_session(GroupEvent::Superseded);
        // After a failed promotion nobody knows which generation is on disk: nothing is written in the old one.
        let usable = self.superblock.check().map_err(GroupError::from);
        let keeps = self.arrived.tally.frames > 0 && !self.journal.is_poisoned();
        if let Err(error) = usable.and_then(|()| if keeps { Ok(()) } else { self.abandon() }) {
            let cause: Cause = Arc::new(error);
            self.note(&cause);
            return Claimed::No(cause);
        }
        let (sender, staged) = watch::channel((self.arrived.epoch, self.arrived.tally.frames));
        // From here on its primary takes writes again.
        self.shared.drained.send_replace(Drained::Lost);
        self.session = Some(ActiveSession { id, events, staged: sender });
        let mut state = self.shared.state.write();
        state.peer = Some(peer);
        state.last_error = None;
        state.journal_bytes = self.journal.bytes();
        let newest = state.points.last();
        Claimed::Yes {
            committed: newest.map(|p| p.point).or(self.superblock.get().base),
            writer: newest.map(|p| p.session).unwrap_or_default(),
            arrived: keeps.then(|| Box::new(self.arrived.clone())),
            staged,
        }
    }

    /// Returns the newest point; `None` if role or generation are others. What has arrived of an epoch is dropped: what is given back is
    /// staged in its place.
    fn claim_handback(
        &mut self,
        id: SessionId,
        peer: Peer,
        (role, generation): (GroupRole, Generation),
        events: mpsc::Sender<GroupEvent>,
    ) -> Result<Option<Point>, GroupError> {
        let block = self.superblock.get();
        if (block.role, block.generation) != (role, generation) {
            return Ok(None);
        }
        self.superblock.check()?;
        self.end_session(GroupEvent::Superseded);
        self.abandon()?;
        let (staged, _) = watch::channel((self.arrived.epoch, 0));
        // In the end its primary takes writes.
        self.shared.drained.send_replace(Drained::Lost);
        self.session = Some(ActiveSession { id, events, staged });
        let mut state = self.shared.state.write();
        state.peer = Some(peer);
        state.last_error = None;
        Ok(state.points.last().map(|p| p.point))
    }

    /// Two durable steps: the seal, which makes a point of what was staged, and the superblock, which lets the primary write. In between,
    /// and if the second one fails, the group is what it was, with one point more.
    fn hand(&mut self, seal: &Seal) -> Result<Generation, GroupError> {
        self.commit(seal).inspect_err(|error| {
            let cause: Cause = Arc::from(Box::<dyn std::error::Error + Send + Sync>::from(error.to_string()));
            self.note(&cause);
        })?;
        reach(Step::GiveSealed);
        let block = self.superblock.get().clone();
        let group = || self.shared.folder.group.clone();
        let generation = block.generation.0.checked_add(1).filter(|g| *g <= proto::control::GENERATION_MAX);
        let generation = Generation(generation.ok_or_else(|| GroupError::Changed { group: group() })?);
        let handed = Superblock { generation, role: GroupRole::Replica, fork: None, synced: Some(seal.point()), ..block };
        if let Err(error) = self.superblock.write(handed) {
            let cause: Cause = Arc::from(Box::<dyn std::error::Error + Send + Sync>::from(error.to_string()));
            self.note(&cause);
            return Err(error.into());
        }
        reach(Step::GiveHanded);
        {
            let mut state = self.shared.state.write();
            state.generation = generation;
            state.role = GroupRole::Replica;
            state.fork = None;
            state.peer = None;
            state.last_error = None;
        }
        self.session = None;
        self.shared.onward.turned();
        Ok(generation)
    }

    fn append(&mut self, batch: &Batch) -> Result<(), GroupError> {
        let bytes = batch.bytes.len() as u64;
        self.check_space(bytes)?;
        let mut table = self.shared.frames.table.write();
        if u64::from(next_of(&table)) + batch.frames.len() as u64 > u64::from(crate::index::FrameId::MAX.0) {
            return Err(JournalError::Full { path: self.shared.folder.journal() }.into());
        }
        drop(table);
        if self.journal.tail_path().is_some_and(|tail| self.shared.findings.is_damaged(&tail)) {
            self.journal.end_segment();
        }
        let (segment, mut offset) = self.journal.append(&batch.bytes)?;
        self.count();
        self.shared.bytes_received.fetch_add(bytes, Ordering::Relaxed);
        let mut extents = batch.extents.as_slice();
        let mut rest = batch.bytes.as_slice();
        // In the order in which readers take them: the state, then the table.
        let state = self.shared.state.read();
        table = self.shared.frames.table.write();
        for frame in &batch.frames {
            let (now, later) = extents.split_at(usize::from(frame.extents));
            let blocks = now.iter().map(|e| u64::from(e.blocks)).sum();
            let (data, zero) = if frame.kind == FrameKind::Data { (blocks, 0) } else { (0, blocks) };
            if let Some(head) = rest.first_chunk::<FRAME_HEADER_BYTES>() {
                self.arrived.tally.add(head, frame.bytes as usize, data, zero);
            }
            self.arrived.pass = frame.pass;
            rest = rest.get(frame.bytes as usize..).unwrap_or_default();
            let id = number_frame(&mut table, segment, offset, frame.kind);
            self.stage.add(&state.index, (frame.volume, frame.kind, id), now);
            extents = later;
            offset += u64::from(frame.bytes);
        }
        drop((table, state));
        // Segments are shorter than that in tests only.
        let every_bytes = STAGED_EVERY_BYTES.min(self.journal.segment_bytes_max());
        if self.arrived.tally.frame_bytes - self.told_bytes >= every_bytes {
            self.told_bytes = self.arrived.tally.frame_bytes;
            if let Some(session) = &self.session {
                session.staged.send_replace((self.arrived.epoch, self.arrived.tally.frames));
            }
        }
        Ok(())
    }

    /// The next epoch begins from nothing.
    fn await_epoch(&mut self, epoch: EpochId) {
        (self.arrived, self.told_bytes) = (Arrived::new(epoch), 0);
    }

    fn check_space(&self, bytes: u64) -> Result<(), GroupError> {
        if let Some(max) = self.shared.space_max.filter(|max| self.journal.bytes().saturating_add(bytes) > *max) {
            let (client, group) = (self.shared.folder.client.clone(), self.shared.folder.group.clone());
            return Err(GroupError::GroupSpace { client, group, max });
        }
        match self.usage.max {
            Some(max) if self.usage.used.load(Ordering::Relaxed).saturating_add(bytes) > max => {
                Err(GroupError::Space { client: self.shared.folder.client.clone(), max })
            }
            _ => Ok(()),
        }
    }

    fn commit(&mut self, seal: &Seal) -> Result<(), GroupError> {
        self.superblock.check()?;
        self.check_space(PLACED_SEAL_BYTES as u64)?;
        let end = self.journal.commit(seal)?;
        self.count();
        self.next_committed = next_frame(&self.shared.frames);
        self.await_epoch(seal.epoch.next());
        {
            let mut state = self.shared.state.write();
            self.shared.onward.commits(&self.stage);
            self.stage.seal(&mut state.index);
            state.points.push(PointEntry::new(seal, end, self.next_committed));
            state.journal_bytes = self.journal.bytes();
        }
        self.shared.onward.turned();
        self.tell(GroupEvent::Committed(seal.point()));
        Ok(())
    }

    fn abandon(&mut self) -> Result<(), GroupError> {
        self.stage.clear();
        self.await_epoch(self.arrived.epoch);
        self.shared.frames.table.write().truncate(self.next_committed);
        self.shared.frames.forget_from(self.next_committed);
        let keep = self.shared.state.read().points.last().map_or(0, |p| p.end.segment + 1);
        self.shared.frames.close_from(keep);
        let done = self.journal.abandon();
        self.count();
        self.shared.state.write().journal_bytes = self.journal.bytes();
        Ok(done?)
    }

    /// Generation, role and the promise of the fork are one write of the superblock: before it nothing has happened, after it
    /// everything that is left can be done again.
    fn promote(&mut self, point: Option<Point>, drained: bool) -> Result<Promoted, GroupError> {
        let block = self.superblock.get().clone();
        let group = || self.shared.folder.group.clone();
        if let (GroupRole::Active, Some(fork)) = (block.role, &block.fork) {
            return match point {
                Some(wanted) if wanted != fork.point => {
                    Err(GroupError::ActiveElsewhere { group: group(), active: fork.point, wanted })
                }
                _ => Ok(Promoted { generation: block.generation, fork: fork.clone() }),
            };
        }
        let (newest, known) = {
            let state = self.shared.state.read();
            let known = |p: &Point| state.points.binary_search_by_key(p, |e| e.point).is_ok();
            (state.points.last().map(|p| p.point), point.as_ref().is_none_or(known))
        };
        let Some(newest) = newest else { return Err(GroupError::Empty { group: group() }) };
        let point = point.unwrap_or(newest);
        if !known {
            return Err(GroupError::NoPoint { group: group(), point });
        }
        if drained && *self.shared.drained.borrow() != Drained::All(point) {
            return Err(GroupError::DrainLost { group: group() });
        }
        let no_number = || GroupError::NoPoint { group: group(), point };
        let generation = Generation(block.generation.0.checked_add(1).ok_or_else(no_number)?);
        let name = format!("{ACTIVE_PREFIX}{generation}").parse().map_err(|_| no_number())?;
        let fork = ForkInUse { name, point };
        // A full disk must not keep the copy from becoming the server; without the reserve the write may still succeed.
        if let Err(error) = self.shared.folder.release_reserve(&self.shared.disk) {
            tracing::warn!("{error}");
        }
        // All points up to here were synced when they were committed.
        let written = self.superblock.write(Superblock {
            generation,
            role: GroupRole::Active,
            fork: Some(fork.clone()),
            synced: Some(newest),
            ..block
        });
        if let Err(error) = written {
            // The new generation may be on disk or not: whoever writes now might write after the failover.
            let cause: Cause = Arc::from(Box::<dyn std::error::Error + Send + Sync>::from(error.to_string()));
            self.note(&cause);
            self.end_session(GroupEvent::Storage(cause));
            if let Err(error) = self.abandon() {
                tracing::warn!("{error}");
            }
            return Err(error.into());
        }
        reach(Step::FailoverRaised);
        {
            let mut state = self.shared.state.write();
            state.generation = generation;
            state.role = GroupRole::Active;
            state.fork = Some(fork.clone());
            // Whatever ended the last session, the copy no longer follows anybody.
            state.last_error = None;
        }
        self.end_session(GroupEvent::Fenced(generation));
        if let Err(error) = self.abandon() {
            // The unsealed end is dropped at the next start then; no point is touched by it.
            tracing::warn!("{error}");
        }
        Ok(Promoted { generation, fork })
    }

    /// The clean stop: the superblock remembers how far the journal goes. What has arrived of an epoch stays behind that for its primary.
    pub(super) fn stop(&mut self) {
        let newest = self.shared.state.read().points.last().map(|p| p.point);
        if newest != self.superblock.get().synced && !self.journal.is_poisoned() {
            let block = Superblock { synced: newest, ..self.superblock.get().clone() };
            if let Err(error) = self.superblock.write(block) {
                tracing::warn!("{error}");
            }
        }
    }

    fn end_on_error(&mut self, done: Result<(), GroupError>) {
        let Err(error) = done else { return };
        let cause: Cause = Arc::new(error);
        self.note(&cause);
        self.end_session(GroupEvent::Storage(Arc::clone(&cause)));
        if let Err(error) = self.abandon() {
            let cause: Cause = Arc::new(error);
            self.note(&cause);
        }
    }

    fn note(&self, cause: &Cause) {
        tracing::error!("{}/{}: {cause}", self.shared.folder.client, self.shared.folder.group);
        self.shared.state.write().last_error = Some(cause.to_string());
    }

    fn tell(&self, event: GroupEvent) {
        if let Some(session) = &self.session {
            // Full or gone: the session is on its way out, and its primary learns the commit from the next welcome.
            let _ = session.events.try_send(event);
        }
    }

    fn end_session(&mut self, event: GroupEvent) {
        self.tell(event);
        self.session = None;
        self.end_waiting();
        self.shared.state.write().peer = None;
    }

    /// Without its session a primary that has not said that all is committed cannot say so.
    fn end_waiting(&self) {
        self.shared.drained.send_if_modified(|drained| {
            let before = *drained;
            *drained = before.without_session();
            *drained != before
        });
    }

    pub(super) fn count(&mut self) {
        let now = self.journal.bytes();
        if now >= self.counted {
            self.usage.used.fetch_add(now - self.counted, Ordering::Relaxed);
        } else {
            self.usage.used.fetch_sub(self.counted - now, Ordering::Relaxed);
        }
        self.counted = now;
    }
}

/// Whether the simulator wants to see that it notices when a primary of an old generation is let in.
fn accepts_any_generation() -> bool {
    #[cfg(any(test, feature = "simulation"))]
    return crate::sim::is_sabotaged(crate::sim::Sabotage::AcceptOldGeneration);
    #[cfg(not(any(test, feature = "simulation")))]
    false
}

fn next_of(table: &crate::index::FrameTable) -> u32 {
    table.next().map_or(u32::MAX, |f| f.0)
}
