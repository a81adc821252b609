//! What is given back: which blocks are to be sent, where they are read, and what of them is staged in the journal.
//!
//! Passes over the live fork first, then, with its guests held up, a last small one; or one pass of an earlier point.

use std::sync::Arc;

use blockdev::BlockDevice;
use proto::fencing::GroupRole;
use proto::frame::FRAME_HEADER_BYTES;
use proto::handback::{Ask, Ready, Want};
use proto::pack::{GroupPacker, Packed};
use proto::pass::{PassHeader, PassKind};
use proto::seal::Tally;
use proto::{DirtyMap, FrameKind, Generation, Name, Point, Seal, VolumeIndex};
use tokio::sync::{OwnedRwLockWriteGuard, mpsc};

use super::HandbackError;
use super::core::Looked;
use crate::batch::{BATCH_BYTES, Batch, FrameRef};
use crate::fork::{Follower, ForkError, Gate, OpenFork};
use crate::group::{Group, GroupError, GroupEvent, Peer, SessionId};
use crate::pins::Pin;
use crate::store::at;
use crate::view::View;

/// See the module.
pub(crate) struct Gift {
    pub(crate) group: Arc<Group>,
    pub(crate) ask: Ask,
    pub(crate) ready: Ready,
    id: SessionId,
    /// What is given back; without it an earlier point is.
    fork: Option<Followed>,
    /// Where the blocks are read, by volume.
    sources: Vec<Arc<dyn BlockDevice>>,
    /// What is given stays until it is there.
    _pin: Option<Pin>,
    /// Views of the newest point, for the primary's comparison.
    pub(crate) newest: Arc<Vec<View>>,
    /// Blocks of the next pass, by volume.
    sets: Vec<DirtyMap>,
    /// The frames of all passes.
    tally: Tally,
    /// Those that are not staged yet.
    batch: Batch,
    /// Of the devices whose guests are held up.
    gates: Vec<OwnedRwLockWriteGuard<Gate>>,
    cut_unix_us: u64,
    pub(crate) events: mpsc::Receiver<GroupEvent>,
}

/// A fork whose changes are followed, for as long as this lives and nobody else begins to.
pub(super) struct Followed {
    fork: Arc<OpenFork>,
    followers: Vec<Follower>,
}

impl Followed {
    /// Adds to `sets`, by volume, the blocks that are the fork's own by now.
    pub(super) fn new(fork: Arc<OpenFork>, sets: &mut [DirtyMap]) -> Self {
        let followed = fork.volumes.iter().zip(sets).map(|((_, device), set)| {
            let (follower, own) = Follower::of(device);
            set.merge(&own);
            follower
        });
        Self { followers: followed.collect(), fork }
    }

    /// The blocks that were changed since the last call, by volume.
    fn take_changed(&self) -> Result<Vec<DirtyMap>, HandbackError> {
        self.followers.iter().map(|follower| follower.take_changed().ok_or(HandbackError::Superseded)).collect()
    }
}

type Source = (Option<Followed>, Vec<Arc<dyn BlockDevice>>, Option<Pin>);

impl Gift {
    #[expect(clippy::too_many_arguments, reason = "one caller hands over what it found")]
    pub(super) fn new(
        group: Arc<Group>,
        id: SessionId,
        ask: Ask,
        ready: Ready,
        (fork, sources, pin): Source,
        newest: Arc<Vec<View>>,
        sets: Vec<DirtyMap>,
        events: mpsc::Receiver<GroupEvent>,
    ) -> Self {
        Self {
            group,
            ask,
            ready,
            id,
            fork,
            sources,
            _pin: pin,
            newest,
            sets,
            tally: Tally::default(),
            batch: Batch::default(),
            gates: Vec::new(),
            cut_unix_us: crate::clock::unix_us(),
            events,
        }
    }

    /// As the core is told.
    pub(crate) fn looked(&self) -> Looked {
        let volume_blocks = self.group.shared.volume_blocks.to_vec();
        Looked::Begun { ready: self.ready, volume_blocks, is_failback: self.fork.is_some() }
    }

    /// What is given, for people.
    pub(crate) fn what(&self) -> String {
        self.fork.as_ref().map_or_else(|| format!("point {}", self.ready.from), |_| "its active copy".to_owned())
    }

    /// Adds blocks to the first pass; they lie within their volume.
    pub(crate) fn want(&mut self, want: &Want) {
        if let Some(map) = self.sets.get_mut(usize::from(want.volume.0)) {
            want.extents.iter().for_each(|extent| map.mark(extent.start.0, extent.blocks.into()));
        }
    }

    /// Takes the group over. Returns its newest point.
    pub(crate) async fn claim(&mut self, peer: Peer) -> Result<Point, HandbackError> {
        let role = if self.fork.is_some() { GroupRole::Active } else { GroupRole::Replica };
        let (events, inbox) = mpsc::channel(crate::group::SESSION_EVENTS_MAX);
        self.events = inbox;
        let stands = self.group.claim_handback(self.id, peer, (role, self.ready.generation), events).await?;
        // The point that ends this carries the primary's token, so there is always something in it.
        if let Some(first) = self.sets.first_mut() {
            first.mark(0, 1);
        }
        Ok(stands)
    }

    /// Gives the group up again.
    pub(crate) async fn release(&self, reason: String) {
        self.group.release(self.id, reason).await;
    }

    /// What a pass begins with.
    pub(crate) fn header(&self, pass: u16, kind: PassKind) -> PassHeader {
        PassHeader { epoch: self.ready.newest.epoch.next(), pass, kind, continued: false }
    }

    /// The frames of the next pass, and the bytes of its blocks.
    pub(crate) fn packer(&mut self, header: PassHeader) -> (GroupPacker, u64) {
        let sets = std::mem::take(&mut self.sets);
        let bytes = sets.iter().map(DirtyMap::bytes).sum();
        (GroupPacker::new(sets, header.epoch, header.pass), bytes)
    }

    /// Where a volume's blocks are read.
    pub(crate) fn source(&self, volume: VolumeIndex) -> std::io::Result<Arc<dyn BlockDevice>> {
        self.sources.get(usize::from(volume.0)).cloned().ok_or_else(|| std::io::ErrorKind::NotFound.into())
    }

    /// Counts a frame that was sent, for the journal. Whether it is time to [`stage`](Self::stage).
    pub(crate) fn add(&mut self, pass: u16, volume: VolumeIndex, packed: Packed) -> bool {
        let Packed { bytes, extents, data_blocks, zero_blocks } = packed;
        if let Some(head) = bytes.first_chunk::<FRAME_HEADER_BYTES>() {
            self.tally.add(head, bytes.len(), data_blocks, zero_blocks);
        }
        self.batch.frames.push(FrameRef {
            bytes: bytes.len() as u32,
            volume,
            kind: if data_blocks > 0 { FrameKind::Data } else { FrameKind::Zero },
            pass,
            extents: extents.len() as u16,
        });
        self.batch.extents.extend(extents);
        self.batch.bytes.extend(bytes);
        self.batch.bytes.len() >= BATCH_BYTES
    }

    /// Hands what was sent to the journal.
    pub(crate) async fn stage(&mut self) -> Result<(), HandbackError> {
        if !self.batch.frames.is_empty() {
            self.group.append(self.id, std::mem::take(&mut self.batch)).await;
        }
        self.events.try_recv().map_or(Ok(()), heard)
    }

    /// Takes what the active copy's guests changed since the last time. Returns its bytes.
    pub(crate) fn changed(&mut self) -> Result<u64, HandbackError> {
        let Some(fork) = &self.fork else { return Ok(0) };
        let changed = fork.take_changed()?;
        if self.sets.is_empty() {
            self.sets = changed;
        } else {
            self.sets.iter_mut().zip(&changed).for_each(|(set, changed)| set.merge(changed));
        }
        Ok(self.sets.iter().map(DirtyMap::bytes).sum())
    }

    /// Holds the active copy's guests up, once their changes under way are done.
    pub(crate) async fn hold(&mut self) -> Result<(), HandbackError> {
        for (_, device) in self.fork.iter().flat_map(|of| &of.fork.volumes) {
            self.gates.push(device.hold().await);
        }
        self.held()
    }

    /// As [`hold`](Self::hold), as far as nobody has to be waited for. Whether all are held up.
    #[cfg(any(test, feature = "simulation"))]
    pub(crate) fn try_hold(&mut self) -> Result<bool, HandbackError> {
        let devices: Vec<_> = self.fork.iter().flat_map(|of| &of.fork.volumes).skip(self.gates.len()).cloned().collect();
        for (_, device) in devices {
            let Some(gate) = device.try_hold() else { return Ok(false) };
            self.gates.push(gate);
        }
        self.held()?;
        Ok(true)
    }

    fn held(&mut self) -> Result<(), HandbackError> {
        self.cut_unix_us = crate::clock::unix_us();
        self.changed().map(drop)
    }

    /// The seal of what was staged.
    pub(crate) fn seal(&self, passes: u16) -> Seal {
        Seal {
            passes: u32::from(passes),
            epoch: self.ready.newest.epoch.next(),
            generation: self.ready.generation,
            cut_unix_us: self.cut_unix_us,
            frames: self.tally.frames,
            frame_bytes: self.tally.frame_bytes,
            data_blocks: self.tally.data_blocks,
            zero_blocks: self.tally.zero_blocks,
            first_write_unix_us: 0,
            session: self.ask.token,
            digest: self.tally.digest(),
        }
    }

    /// The step that counts: the point is sealed, and the group follows its primary again. Returns the point and the generation from here on;
    /// `None` if another session has the group.
    pub(crate) async fn hand(&mut self, passes: u16) -> Result<Option<(Point, Generation)>, HandbackError> {
        let seal = self.seal(passes);
        let handed = self.group.hand(self.id, seal).await;
        // Also if nobody knows what is on the disk: a write that is taken now might be taken at the other site too.
        if matches!(handed, Ok(Some(_)) | Err(GroupError::Superblock(_))) {
            self.gates.iter_mut().for_each(|gate| **gate = Gate::GivenBack);
        }
        self.gates.clear();
        Ok(handed?.map(|generation| (seal.point(), generation)))
    }

    /// The fork that was given back, which nobody serves any more.
    pub(crate) async fn retire(&self) -> Option<Name> {
        let Followed { fork, .. } = self.fork.as_ref()?;
        // Whoever still has it open finds its gate closed; nobody opens it again.
        let mut active = self.group.active.lock().await;
        if active.as_ref().is_some_and(|open| open.name == fork.name) {
            *active = None;
        }
        drop(active);
        let flattening = self.group.flattening.lock().take();
        if let Some(flattening) = flattening {
            flattening.stop().await;
        }
        Some(fork.name.clone())
    }
}

/// What a group tells the conversation that has it; most of that is its end.
pub(crate) fn heard(event: GroupEvent) -> Result<(), HandbackError> {
    match event {
        GroupEvent::Storage(cause) => Err(HandbackError::Storage(cause)),
        GroupEvent::Superseded | GroupEvent::Fenced(_) => Err(HandbackError::Superseded),
        GroupEvent::Committed(_) | GroupEvent::Drain => Ok(()),
    }
}

/// Removes a fork that was given back: all of it is in the point that both sites hold.
pub(crate) fn forget(group: &Group, fork: &Name) -> Result<(), HandbackError> {
    let folder = group.shared.folder.fork(fork);
    let removed = group.shared.disk.remove_folder(&folder).map_err(at(&folder, "remove the fork that was given back"));
    Ok(removed.map_err(ForkError::from)?)
}
