//! One connection of the simulation: what `session` is to QUIC, for bytes that somebody hands over.
//!
//! Follows the driver's order: group events before anything else, a pass stream is begun only when the core wants one,
//! streams in the order in which they were opened, a reset throws away what was not read.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use blockdev::BlockDevice;
use proto::fencing::GroupRole;
use proto::handback::Ask;
use proto::hashes::{HashQuery, Hashes, UNREADABLE, hash};
use proto::{BLOCK_BYTES, CloseCode, EpochId, Fingerprint, Message, Name, Scrub, ScrubOutcome, Scrubbed};
use tokio::sync::{mpsc, watch};

use super::handback::Handing;
use super::replica::{Output, StreamNo};
use super::{Sabotage, is_sabotaged};
use crate::batch::Assembler;
use crate::config::ClientConfig;
use crate::core::{Action, Cause, Core, Event, SessionError, Stored};
use crate::group::{Claimed, Group, GroupEvent, Peer, SessionId};
use crate::handback::HandbackError;
use crate::input::{ControlInput, PassInput};
use crate::node::Node;
use crate::scrub::{compare_now, is_damage};
use crate::view::View;

/// A batch is handed to the journal when it has this many bytes: small, as the disks are.
const SIM_BATCH_BYTES: usize = 16 << 10;

/// Polls a future of the group's handle, and does the work of the group's thread while it waits.
pub(super) fn drive<T>(group: &Group, future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        assert!(group.turn(), "the group has nothing to do and somebody waits for it");
    }
}

/// Answers a query from a view of its volume.
pub(super) fn answer(view: &View, query: &HashQuery) -> Result<Hashes, Cause> {
    let (mut hashes, mut at) = (Vec::new(), query.start.0);
    while at < query.end() {
        let blocks = u64::from(query.chunk_blocks).min(query.end() - at);
        let mut content = vec![0; (blocks * BLOCK_BYTES) as usize];
        let offset = at * BLOCK_BYTES;
        let inside = (blocks * BLOCK_BYTES).min(view.size().saturating_sub(offset)) as usize;
        match view.read_now(offset, content.get_mut(..inside).unwrap_or_default()) {
            Ok(()) => hashes.push(hash(&content)),
            Err(error) if is_damage(&error) => hashes.push(UNREADABLE),
            Err(error) => return Err(Arc::new(error)),
        }
        at += blocks;
    }
    Ok(Hashes { id: query.id, hashes })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Finished,
    Reset,
}

#[derive(Debug)]
struct PassStream {
    number: StreamNo,
    input: PassInput,
    unread: VecDeque<Vec<u8>>,
    end: Option<End>,
}

#[derive(Debug)]
pub(super) struct Session {
    id: SessionId,
    config: ClientConfig,
    client: Name,
    key: Fingerprint,
    core: Core,
    /// Of a primary that asked for its disks, in place of a hello.
    handing: Option<Box<Handing>>,
    control: ControlInput,
    assembler: Assembler,
    /// Opened streams; the first is being read if `reading`.
    passes: VecDeque<PassStream>,
    reading: bool,
    streams: u64,
    group: Option<(Arc<Group>, mpsc::Receiver<GroupEvent>)>,
    staged: Option<watch::Receiver<(EpochId, u64)>>,
    outputs: Vec<Output>,
    ended: Option<String>,
}

impl Session {
    pub(super) fn new(id: SessionId, config: ClientConfig, key: Fingerprint, core: Core) -> Self {
        Self {
            id,
            client: config.name.clone(),
            config,
            key,
            core,
            handing: None,
            control: ControlInput::default(),
            assembler: Assembler::default(),
            passes: VecDeque::new(),
            reading: false,
            streams: 0,
            group: None,
            staged: None,
            outputs: Vec::new(),
            ended: None,
        }
    }

    pub(super) fn take_outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.outputs)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    /// The connection is gone or was closed: the group is free again.
    pub(super) fn release(&mut self, reason: &str) {
        if self.ended.is_none() {
            self.flush();
        }
        self.ended.get_or_insert_with(|| reason.to_owned());
        if let Some(mut handing) = self.handing.take() {
            // The primary is gone: nobody hears it.
            handing.end(&HandbackError::Lost(reason.to_owned()));
        }
        if let Some((group, _)) = self.group.take() {
            drive(&group, group.release(self.id, reason.to_owned()));
            group.turn();
        }
    }

    pub(super) fn control(&mut self, node: &Node, bytes: &[u8]) {
        self.control.push(bytes);
        while self.ended.is_none() {
            match self.control.next() {
                Ok(Some(message)) if self.handing.is_some() => self.hand(|handing| handing.message(node, message)),
                Ok(Some(Message::Handback(ask))) if self.core.is_opening() => self.begin_handback(node, ask),
                Ok(Some(message)) => self.handle(node, Event::Message(message)),
                Err(error) if self.handing.is_some() => self.hand(|_| Err(error.into())),
                Ok(None) => break,
                Err(error) => self.fail(node, error.into()),
            }
            self.pump(node);
        }
    }

    pub(super) fn pass_open(&mut self) -> StreamNo {
        self.streams += 1;
        let number = StreamNo(self.streams);
        self.passes.push_back(PassStream { number, input: PassInput::default(), unread: VecDeque::new(), end: None });
        number
    }

    pub(super) fn pass_data(&mut self, node: &Node, stream: StreamNo, bytes: &[u8]) {
        if let Some(pass) = self.passes.iter_mut().find(|p| p.number == stream && p.end.is_none()) {
            pass.unread.push_back(bytes.to_owned());
        }
        self.pump(node);
    }

    pub(super) fn pass_end(&mut self, node: &Node, stream: StreamNo) {
        if let Some(pass) = self.passes.iter_mut().find(|p| p.number == stream) {
            pass.end.get_or_insert(End::Finished);
        }
        self.pump(node);
    }

    pub(super) fn pass_reset(&mut self, node: &Node, stream: StreamNo) {
        if let Some(pass) = self.passes.iter_mut().find(|p| p.number == stream) {
            pass.end = Some(End::Reset);
            pass.unread.clear();
        }
        self.pump(node);
    }

    /// Does what can be done until nothing is left to do.
    pub(super) fn pump(&mut self, node: &Node) {
        while self.ended.is_none() && self.step(node) {}
    }

    fn begin_handback(&mut self, node: &Node, ask: Ask) {
        match Handing::begin(node, self.config.clone(), (self.key, self.id), ask) {
            Ok(handing) => {
                self.handing = Some(Box::new(handing));
                self.hand(|_| Ok(()));
            }
            Err(refused) => {
                let (outputs, error) = *refused;
                self.outputs.extend(outputs);
                self.ended = Some(error.to_string());
            }
        }
    }

    /// Does something in the handback. It may end with that.
    fn hand(&mut self, act: impl FnOnce(&mut Handing) -> Result<(), HandbackError>) {
        let Some(handing) = &mut self.handing else { return };
        let outputs = match act(handing) {
            Ok(()) if handing.is_over() => {
                let mut outputs = handing.take_outputs();
                outputs.push(Output::Closed { code: CloseCode::Stopping as u16, reason: "handed back".to_owned() });
                self.ended = Some("handed back".to_owned());
                outputs
            }
            Ok(()) => handing.take_outputs(),
            Err(error) => {
                self.ended = Some(error.to_string());
                handing.end(&error)
            }
        };
        self.outputs.extend(outputs);
        if self.ended.is_some() {
            self.handing = None;
        }
    }

    /// Does a part of what takes time in a handback.
    pub(super) fn work(&mut self, node: &Node) {
        self.hand(|handing| handing.step(node));
    }

    /// What a handback does by itself; returns whether there was anything.
    fn step_handback(&mut self, node: &Node) -> bool {
        self.hand(Handing::listen);
        let (mut reads, is_open) = (false, !self.passes.is_empty());
        self.hand(|handing| {
            // A stream that nobody waits for stays in its window.
            reads = is_open && handing.reads(node)?;
            Ok(())
        });
        let (Some(pass), true) = (self.passes.front_mut(), reads && self.ended.is_none()) else { return false };
        if let Some(bytes) = pass.unread.pop_front() {
            self.hand(|handing| handing.data(&bytes));
            return true;
        }
        let Some(end) = pass.end else { return false };
        self.passes.pop_front();
        self.hand(|handing| match end {
            End::Finished => handing.data_end(node),
            End::Reset => Err(HandbackError::Lost("the stream was reset".to_owned())),
        });
        true
    }

    fn step(&mut self, node: &Node) -> bool {
        if self.handing.is_some() {
            return self.step_handback(node);
        }
        if let Some((group, events)) = &mut self.group {
            group.turn();
            if let Ok(event) = events.try_recv() {
                self.handle(
                    node,
                    match event {
                        GroupEvent::Committed(point) => Event::Committed(point),
                        GroupEvent::Drain => Event::Drain,
                        GroupEvent::Superseded => Event::Superseded,
                        GroupEvent::Fenced(generation) => Event::Fenced(generation),
                        GroupEvent::Storage(cause) => Event::Storage(cause),
                    },
                );
                return true;
            }
        }
        if let Some(staged) = self.staged.as_mut().filter(|s| s.has_changed().unwrap_or(false)) {
            let (epoch, frames) = *staged.borrow_and_update();
            self.handle(node, Event::Staged { epoch, frames });
            return true;
        }
        if !self.reading {
            self.reading = !self.passes.is_empty() && self.core.wants_pass();
            return self.reading;
        }
        self.read(node)
    }

    /// Reads on in the current pass. Returns whether there was anything.
    fn read(&mut self, node: &Node) -> bool {
        let Some(pass) = self.passes.front_mut() else { return false };
        let mut actions = Vec::new();
        if let Some(bytes) = pass.unread.pop_front() {
            let mut rest = bytes.as_slice();
            let ended = pass.input.take(&mut rest, &mut self.core, &mut self.assembler, &mut actions);
            if !rest.is_empty() {
                pass.unread.push_front(rest.to_owned());
            }
            if ended.is_none() && self.assembler.holds(SIM_BATCH_BYTES) {
                self.flush();
            }
            self.perform(node, actions, ended);
            return true;
        }
        let Some(end) = pass.end else { return false };
        let whole = pass.input.end(&self.assembler);
        self.passes.pop_front();
        self.reading = false;
        match (end, whole) {
            (End::Reset, _) => self.handle(node, Event::PassReset),
            (End::Finished, Err(error)) => self.fail(node, error.into()),
            (End::Finished, Ok(())) => {
                self.flush();
                self.handle(node, Event::PassEnd);
            }
        }
        true
    }

    fn flush(&mut self) {
        if let Some(batch) = self.assembler.take()
            && let Some((group, _)) = &self.group
        {
            drive(group, group.append(self.id, batch));
        }
    }

    pub(super) fn handle(&mut self, node: &Node, event: Event) {
        let mut actions = Vec::new();
        let ended = self.core.handle(event, &mut actions);
        self.perform(node, actions, ended);
    }

    fn fail(&mut self, node: &Node, error: SessionError) {
        let mut actions = Vec::new();
        let error = self.core.fail(error, &mut actions);
        self.perform(node, actions, Some(error));
    }

    fn perform(&mut self, node: &Node, actions: Vec<Action>, ended: Option<SessionError>) {
        let mut ended = ended;
        let mut queue = VecDeque::from(actions);
        while let Some(action) = queue.pop_front() {
            let mut more = Vec::new();
            match action {
                Action::Send(message) => self.send(&message),
                Action::Lookup { group } => {
                    let mut stored = node.lookup(&self.client, &group, self.key);
                    if is_sabotaged(Sabotage::AcceptOldGeneration)
                        && let Stored::Present(group) = &mut stored
                    {
                        (group.role, group.generation) = (GroupRole::Replica, proto::Generation(1));
                    }
                    ended = self.core.handle(Event::Stored(stored), &mut more).or(ended);
                }
                Action::Claim { group, generation, create, volumes } => {
                    let event = self.claim(node, &group, generation, create, volumes);
                    ended = self.core.handle(event, &mut more).or(ended);
                }
                Action::Hash(query) => {
                    let event = self.hash(&query).unwrap_or_else(Event::Storage);
                    ended = self.core.handle(event, &mut more).or(ended);
                }
                Action::Scrub(scrub) => {
                    if let Some(event) = self.scrub(&scrub) {
                        let event = event.unwrap_or_else(Event::Storage);
                        ended = self.core.handle(event, &mut more).or(ended);
                    }
                }
                Action::Drained(point) => {
                    if let Some((group, _)) = &self.group {
                        group.drained(point);
                    }
                }
                Action::Commit(seal) => {
                    if let Some((group, _)) = &self.group {
                        drive(group, group.commit(self.id, seal));
                    }
                }
                Action::Abandon => {
                    self.assembler.clear();
                    if let Some((group, _)) = &self.group {
                        drive(group, group.abandon(self.id));
                    }
                }
                Action::Close { code, reason } => self.outputs.push(Output::Closed { code, reason }),
            }
            queue.extend(more);
        }
        if let Some(error) = ended {
            self.release(&error.to_string());
        }
    }

    /// Answers a query at once, from a view of the newest point.
    fn hash(&self, query: &HashQuery) -> Result<Event, Cause> {
        let cause = |error: std::io::Error| Arc::new(error) as Cause;
        let Some((group, _)) = &self.group else { return Err(cause(std::io::ErrorKind::NotConnected.into())) };
        let index = group.shared.newest();
        let view =
            crate::view::fresh(&group.shared, index, usize::from(query.volume.0)).map_err(|error| Arc::new(error) as Cause)?;
        let view = view.ok_or_else(|| cause(std::io::ErrorKind::NotFound.into()))?;
        answer(&view, query).map(Event::Hashed)
    }

    /// Compares at once: the group has nothing else to do meanwhile. `None` if the session lost the group.
    fn scrub(&self, scrub: &Scrub) -> Option<Result<Event, Cause>> {
        let (group, _) = self.group.as_ref()?;
        let snapshot = drive(group, async { group.snapshot(self.id).await.await.ok() })?;
        let Some(point) = snapshot.point.filter(|point| point.epoch == scrub.epoch) else {
            return Some(Ok(Event::Scrubbed(Scrubbed { id: scrub.id, outcome: ScrubOutcome::Stale })));
        };
        let view = crate::view::fresh(&group.shared, snapshot.index, usize::from(scrub.volume.0));
        let compared = view.map(|view| view.map(|view| Event::Scrubbed(compare_now(&view, scrub, point))));
        compared.map_err(|error| Arc::new(error) as Cause).transpose()
    }

    fn send(&mut self, message: &Message) {
        self.outputs.push(Output::Control(message.encode()));
    }

    fn claim(
        &mut self,
        node: &Node,
        group: &Name,
        generation: proto::Generation,
        create: bool,
        volumes: Vec<crate::superblock::Volume>,
    ) -> Event {
        let handle = if create {
            match node.create(&self.client, group, self.key, generation, volumes) {
                Ok(handle) => handle,
                Err(cause) => return Event::Storage(cause),
            }
        } else {
            node.get(&self.client, group)
        };
        let stored = || Event::Stored(node.lookup(&self.client, group, self.key));
        let Some(handle) = handle.filter(|h| !create || h.stored(self.key).owned) else { return stored() };
        let peer = Peer { address: ([127, 0, 0, 1], 1).into(), since_unix_us: 0, interval_ms: 0 };
        match drive(&handle, handle.claim(self.id, peer, generation)) {
            (Claimed::Yes { committed, writer, arrived, staged }, events) => {
                (self.group, self.staged) = (Some((handle, events)), Some(staged));
                Event::Claimed { committed, writer, arrived }
            }
            (Claimed::Changed, _) => stored(),
            (Claimed::No(cause), _) => Event::Storage(cause),
        }
    }
}
