//! One handback of the simulation: what `handback` is to QUIC, for bytes that somebody hands over.
//!
//! What has no end of its own is done in steps, one each time that [`Handing::step`] is called: a read of a pass, a look at the gates of the
//! active copy. All else is done at once. There is no clock: a silent primary is a connection that somebody breaks.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use blockdev::{BlockDevice, FrameReader, read_blocks};
use proto::handback::Ask;
use proto::pack::{GroupPacker, Wanted};
use proto::pass::PassHeader;
use proto::{BLOCK_BYTES, Fingerprint, Message, Name, Point};

use super::replica::Output;
use super::session::{answer, drive};
use crate::config::ClientConfig;
use crate::core::SessionError;
use crate::fork::{ForkError, MapFile, OpenFork};
use crate::group::{Group, GroupError, Peer, SessionId, Shared};
use crate::handback::HandbackError;
use crate::handback::core::{Action, Core, Event, Looked};
use crate::handback::give::{self, Gift, heard};
use crate::handback::keep::{Keeping, Kept};
use crate::handback::look::{self, Permitted};
use crate::kept::KEPT_PREFIX;
use crate::node::Node;
use crate::store::at;

/// Polls a future whose files answer after a bounded number of polls.
pub(super) fn finish<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    for _ in 0..1000 {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return value;
        }
    }
    panic!("a file never answers");
}

/// The fork of an active group, opened.
pub(super) fn in_use(group: &Group) -> Result<Arc<OpenFork>, GroupError> {
    let promised = group.shared.promised()?;
    let mut active = group.active.try_lock().expect("nobody else is in this thread");
    if let Some(fork) = active.as_ref().filter(|fork| fork.name == promised.fork.name) {
        return Ok(Arc::clone(fork));
    }
    let fork = Arc::new(crate::fork::open(&group.shared, promised.generation, &promised.fork)?);
    *active = Some(Arc::clone(&fork));
    Ok(fork)
}

/// A fork that keeps what a primary had written of its own.
#[derive(Clone, Debug)]
pub struct KeptFork {
    /// Its name.
    pub name: Name,
    /// The point under it.
    pub point: Point,
    /// By volume the blocks that it keeps, with their content; the last one of a volume may be short.
    pub volumes: Vec<BTreeMap<u64, Vec<u8>>>,
}

/// The forks that a group keeps.
pub(super) fn kept(shared: &Shared) -> Result<Vec<KeptFork>, ForkError> {
    let parent = shared.folder.path.join("forks");
    let mut forks = Vec::new();
    for entry in std::fs::read_dir(&parent).map_err(at(&parent, "list the folder"))? {
        let path = entry.map_err(at(&parent, "list the folder"))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).filter(|name| name.starts_with(KEPT_PREFIX));
        let Some(name) = name.and_then(|name| name.parse::<Name>().ok()) else { continue };
        let (mut point, mut volumes) = (None, Vec::new());
        for volume in &shared.volumes {
            let (of, set) = MapFile::read(&path.join(format!("{}.map", volume.name)), volume.size_bytes)?;
            let raw = path.join(format!("{}.raw", volume.name));
            let content = std::fs::read(&raw).map_err(at(&raw, "read the fork's data"))?;
            let blocks = content.chunks(BLOCK_BYTES as usize).enumerate().map(|(block, content)| (block as u64, content));
            volumes.push(blocks.filter(|(block, _)| set.contains(*block)).map(|(b, content)| (b, content.to_vec())).collect());
            point = Some(of);
        }
        forks.extend(point.map(|point| KeptFork { name, point, volumes }));
    }
    Ok(forks)
}

/// A pass that is being sent.
struct Sending {
    header: PassHeader,
    packer: GroupPacker,
    bytes: u64,
}

/// See the module.
pub(super) struct Handing {
    core: Core,
    client: ClientConfig,
    key: Fingerprint,
    id: SessionId,
    ask: Ask,
    gift: Option<Gift>,
    keeping: Option<(Keeping, FrameReader)>,
    kept: Option<Kept>,
    sending: Option<Sending>,
    holding: bool,
    now: Instant,
    outputs: Vec<Output>,
}

impl std::fmt::Debug for Handing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Handing({:?})", self.core)
    }
}

impl Handing {
    /// Begins.
    ///
    /// # Errors
    /// Why it ended at once, here and below.
    pub(super) fn begin(
        node: &Node,
        client: ClientConfig,
        (key, id): (Fingerprint, SessionId),
        ask: Ask,
    ) -> Result<Self, Box<(Vec<Output>, HandbackError)>> {
        let mut actions = Vec::new();
        let core = Core::begin(&mut actions);
        let (gift, keeping, kept, sending) = (None, None, None, None);
        let (holding, now, outputs) = (false, Instant::now(), Vec::new());
        let mut this = Self { core, client, key, id, ask, gift, keeping, kept, sending, holding, now, outputs };
        match this.perform(node, actions) {
            Ok(()) => Ok(this),
            Err(error) => Err(Box::new((this.end(&error), error))),
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.core.is_over()
    }

    pub(super) fn take_outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.outputs)
    }

    /// The group is free again, and the active copy goes on. Returns what the primary is told.
    pub(super) fn end(&mut self, error: &HandbackError) -> Vec<Output> {
        if let Some(gift) = self.gift.take() {
            drive(&gift.group, gift.release(format!("handback: {error}")));
            gift.group.turn();
        }
        let last = match error {
            HandbackError::Session(SessionError::Fenced { generation, .. }) => Message::Fenced { generation: *generation },
            _ => Message::close(error.code(), &error.to_string()),
        };
        let mut outputs = self.take_outputs();
        outputs.push(Output::Control(last.encode()));
        outputs.push(Output::Closed { code: error.code() as u16, reason: error.to_string() });
        outputs
    }

    pub(super) fn message(&mut self, node: &Node, message: Message) -> Result<(), HandbackError> {
        self.handle(node, Event::Message(message))
    }

    /// Whether a stream of the primary's is to be read.
    pub(super) fn reads(&mut self, node: &Node) -> Result<bool, HandbackError> {
        if self.core.wants_upload() {
            self.handle(node, Event::Upload)?;
        }
        Ok(self.keeping.is_some())
    }

    /// Bytes of that stream.
    pub(super) fn data(&mut self, mut bytes: &[u8]) -> Result<(), HandbackError> {
        let Some((keeping, reader)) = &mut self.keeping else { return Ok(()) };
        while let Some(frame) = reader.take(&mut bytes)? {
            let device = keeping.admit(&frame)?;
            finish(frame.apply(&*device)).map_err(HandbackError::Keeping)?;
        }
        Ok(())
    }

    /// That stream has ended.
    pub(super) fn data_end(&mut self, node: &Node) -> Result<(), HandbackError> {
        let Some((keeping, reader)) = self.keeping.take() else { return Ok(()) };
        reader.end()?;
        for device in keeping.devices() {
            finish(device.flush()).map_err(HandbackError::Keeping)?;
        }
        let kept = keeping.arrived();
        let (frames, digest) = kept.told();
        self.kept = Some(kept);
        self.handle(node, Event::Arrived { frames, digest })
    }

    /// Looks whether the group has said something.
    pub(super) fn listen(&mut self) -> Result<(), HandbackError> {
        let Some(gift) = &mut self.gift else { return Ok(()) };
        gift.group.turn();
        gift.events.try_recv().map_or(Ok(()), heard)
    }

    /// Does a part of what takes time, if there is something.
    pub(super) fn step(&mut self, node: &Node) -> Result<(), HandbackError> {
        if self.holding {
            if self.gift()?.try_hold()? {
                self.holding = false;
                self.handle(node, Event::Held)?;
            }
            return Ok(());
        }
        let Some(mut sending) = self.sending.take() else { return Ok(()) };
        let mut frames = Vec::new();
        let is_last = match sending.packer.wanted() {
            Some(Wanted { volume, runs }) => {
                let io = |source| HandbackError::Io { group: self.ask.group.clone(), source };
                let source = self.gift.as_ref().map(|gift| gift.source(volume)).transpose().map_err(io)?;
                for run in runs {
                    let Some(source) = &source else { break };
                    let content = finish(read_blocks(&**source, run)).map_err(io)?;
                    sending.packer.put(volume, run, &content, &mut frames);
                }
                false
            }
            None => {
                sending.packer.finish(&mut frames);
                true
            }
        };
        for (volume, packed) in frames {
            self.outputs.push(Output::PassData(packed.bytes.clone()));
            self.gift()?.add(sending.header.pass, volume, packed);
        }
        let gift = self.gift()?;
        let group = Arc::clone(&gift.group);
        drive(&group, gift.stage())?;
        if is_last {
            self.outputs.push(Output::PassEnd);
            return self.handle(node, Event::Sent { bytes: sending.bytes });
        }
        self.sending = Some(sending);
        Ok(())
    }

    fn handle(&mut self, node: &Node, event: Event) -> Result<(), HandbackError> {
        let mut actions = Vec::new();
        self.core.handle(self.now, event, &mut actions)?;
        self.perform(node, actions)
    }

    fn perform(&mut self, node: &Node, actions: Vec<Action>) -> Result<(), HandbackError> {
        for action in actions {
            if let Some(event) = self.act(node, action)? {
                self.handle(node, event)?;
            }
        }
        Ok(())
    }

    fn act(&mut self, node: &Node, action: Action) -> Result<Option<Event>, HandbackError> {
        Ok(match action {
            Action::Send(message) => {
                self.outputs.push(Output::Control(message.encode()));
                None
            }
            Action::Look => Some(Event::Looked(self.look(node)?)),
            Action::Hash(query) => {
                let view = self.gift()?.newest.get(usize::from(query.volume.0)).map(|view| answer(view, &query));
                let hashes = view.transpose().map_err(HandbackError::Storage)?;
                hashes.map(Event::Hashed)
            }
            Action::Keep => {
                let (id, generation) = (self.id, self.ask.generation);
                let gift = self.gift()?;
                let reader = FrameReader::new(gift.group.shared.volume_blocks.iter().copied());
                let keeping = Keeping::begin(&gift.group.shared, id, generation, gift.ready.newest)?;
                self.keeping = Some((keeping, reader));
                None
            }
            Action::Name => {
                let generation = self.ask.generation;
                let kept = self.kept.take().map(|kept| kept.name(generation)).transpose()?;
                kept.map(Event::Named)
            }
            Action::Want(want) => {
                self.gift()?.want(&want);
                None
            }
            Action::Claim => {
                let peer = Peer { address: ([127, 0, 0, 1], 1).into(), since_unix_us: 0, interval_ms: 0 };
                let gift = self.gift()?;
                let group = Arc::clone(&gift.group);
                Some(Event::Claimed(drive(&group, gift.claim(peer))?))
            }
            Action::Pass { pass, kind } => {
                let gift = self.gift()?;
                let header = gift.header(pass, kind);
                let (packer, bytes) = gift.packer(header);
                self.outputs.extend([Output::PassOpen, Output::PassData(header.encode().to_vec())]);
                self.sending = Some(Sending { header, packer, bytes });
                None
            }
            Action::Changed => Some(Event::Changed { bytes: self.gift()?.changed()? }),
            Action::Hold => {
                self.holding = true;
                None
            }
            Action::Seal { passes } => {
                let gift = self.gift()?;
                let (group, seal) = (Arc::clone(&gift.group), gift.seal(passes));
                self.outputs.push(Output::Sealing { point: seal.point(), session: seal.session });
                let gift = self.gift()?;
                Some(Event::Handed(drive(&group, gift.hand(passes))?))
            }
            Action::CleanUp => {
                let gift = self.gift()?;
                let group = Arc::clone(&gift.group);
                if let Some(fork) = drive(&group, gift.retire())
                    && let Err(error) = give::forget(&group, &fork)
                {
                    tracing::warn!("{error}; it is of no use any more");
                }
                None
            }
        })
    }

    fn gift(&mut self) -> Result<&mut Gift, HandbackError> {
        self.gift.as_mut().ok_or_else(|| GroupError::Changed { group: self.ask.group.clone() }.into())
    }

    fn look(&mut self, node: &Node) -> Result<Looked, HandbackError> {
        let (standing, fork, to) = match look::permitted(node, &self.client, self.key, &self.ask)? {
            Permitted::Done { point, generation } => return Ok(Looked::Done { point, generation }),
            Permitted::Failback(standing) => {
                let fork = in_use(&standing.group)?;
                (standing, Some(fork), None)
            }
            Permitted::Rollback(standing, point) => (standing, None, Some(point)),
        };
        let gift = look::look(standing, self.id, self.ask.clone(), (fork, to))?;
        let looked = gift.looked();
        self.gift = Some(gift);
        Ok(looked)
    }
}
