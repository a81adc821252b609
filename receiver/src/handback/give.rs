//! Sends blocks to the primary and stages the same frames in the journal: passes over the live fork first, then, with its guests held up, a
//! last small one; or one pass of an earlier point.

use std::sync::Arc;

use blockdev::steps::{Step, reach};
use blockdev::{BlockDevice, IoThreads, read_blocks};
use futures_util::stream::{FuturesOrdered, StreamExt};
use proto::control::{PassHeader, PassKind};
use proto::frame::FRAME_HEADER_BYTES;
use proto::handback::HANDBACK_PASSES_MAX;
use proto::pack::{FRAME_BLOCKS, Packed, Packer};
use proto::seal::Tally;
use proto::units::BLOCK_BYTES;
use proto::{DirtyMap, FrameKind, Generation, Message, Point, Seal, VolumeIndex};
use quinn::SendStream;

use super::{HANDOVER_DEADLINE, Handback, HandbackError};
use crate::batch::{BATCH_BYTES, Batch, FrameRef};
use crate::fork::Gate;
use crate::group::{GroupError, GroupEvent};
use crate::session::one_line;

/// No more than this is left for the pass that holds guests up.
const FREEZE_BYTES: u64 = 8 << 20;
/// A pass that leaves more than this share of its own size changed has stopped converging.
const CONVERGENCE_PERCENT: u64 = 75;
/// Frames whose blocks are being read at once.
const READ_AHEAD: usize = 8;

/// The frames of all passes.
#[derive(Default)]
struct Sent {
    tally: Tally,
    batch: Batch,
}

impl Handback {
    /// Returns the point that both sides hold, and the generation from here on.
    pub(super) async fn give(&mut self) -> Result<(Point, Generation), HandbackError> {
        let sources = self.sources().await?;
        let mut sent = Sent::default();
        let mut sets = std::mem::take(&mut self.give);
        let mut pass = 0;
        if let Some(fork) = self.fork.clone() {
            loop {
                let bytes: u64 = sets.iter().map(DirtyMap::bytes).sum();
                self.pass(&sources, &sets, (pass, PassKind::Fuzzy), &mut sent).await?;
                self.applied(pass).await?;
                pass += 1;
                sets = self.take_changed()?;
                let left: u64 = sets.iter().map(DirtyMap::bytes).sum();
                let converging = left * 100 <= bytes * CONVERGENCE_PERCENT;
                if left <= FREEZE_BYTES || !converging || pass + 1 >= HANDBACK_PASSES_MAX {
                    break;
                }
            }
            let last = async {
                let mut gates = Vec::new();
                for (_, device) in &fork.volumes {
                    gates.push(device.hold().await);
                }
                reach(Step::GiveHeld);
                let cut_unix_us = crate::clock::unix_us();
                for (set, changed) in sets.iter_mut().zip(self.take_changed()?) {
                    set.merge(&changed);
                }
                self.pass(&sources, &sets, (pass, PassKind::Frozen), &mut sent).await?;
                self.applied(pass).await?;
                Ok::<_, HandbackError>((gates, cut_unix_us))
            };
            let (mut gates, cut_unix_us) =
                tokio::time::timeout(HANDOVER_DEADLINE, last).await.map_err(|_| HandbackError::Slow)??;
            // From here on there is no giving up: guests wait until it is known who may write.
            let handed = self.seal(&sent.tally, pass, cut_unix_us).await;
            // Also if nobody knows what is on the disk: a write that is taken now might be taken at the other site too.
            if handed.is_ok() || matches!(handed, Err(HandbackError::Group(GroupError::Superblock(_)))) {
                gates.iter_mut().for_each(|gate| **gate = Gate::GivenBack);
            }
            return handed;
        }
        let cut_unix_us = crate::clock::unix_us();
        self.pass(&sources, &sets, (pass, PassKind::Frozen), &mut sent).await?;
        self.applied(pass).await?;
        self.seal(&sent.tally, pass, cut_unix_us).await
    }

    /// What changed in the fork since it was last asked, by volume.
    fn take_changed(&self) -> Result<Vec<DirtyMap>, HandbackError> {
        self.followers.iter().map(|follower| follower.take_changed().ok_or(HandbackError::Superseded)).collect()
    }

    /// Where the blocks come from, by volume.
    async fn sources(&self) -> Result<Vec<Arc<dyn BlockDevice>>, HandbackError> {
        if let Some(fork) = &self.fork {
            return Ok(fork.devices().into_iter().map(|(_, device)| device).collect());
        }
        let (shared, from) = (Arc::clone(&self.group.shared), self.ready.from);
        let views = tokio::task::spawn_blocking(move || crate::view::views(&shared, shared.index_at(from)?));
        let closed = || GroupError::Closed { group: self.ask.group.clone() };
        let views = views.await.map_err(|_| closed())??;
        Ok(views.into_iter().map(|view| Arc::new(view) as Arc<dyn BlockDevice>).collect())
    }

    /// Sends and stages one pass.
    async fn pass(
        &mut self,
        sources: &[Arc<dyn BlockDevice>],
        sets: &[DirtyMap],
        (pass, kind): (u16, PassKind),
        sent: &mut Sent,
    ) -> Result<(), HandbackError> {
        let header = PassHeader { epoch: self.ready.newest.epoch.next(), pass, kind, continued: false };
        let lost = |error: &dyn ToString| HandbackError::Lost(one_line(&error.to_string()));
        let mut stream = self.line.connection.open_uni().await.map_err(|e| lost(&e))?;
        stream.write_all(&header.encode()).await.map_err(|e| lost(&e))?;
        let io = self.node.hasher().map_err(self.io())?.io().clone();
        for (volume, (source, set)) in sources.iter().zip(sets).enumerate() {
            let mut packer = Packer::new(VolumeIndex(volume as u16));
            let (mut reads, mut at) = (FuturesOrdered::new(), Some(0));
            loop {
                while let Some(from) = at
                    && reads.len() < READ_AHEAD
                {
                    let runs = set.pick(from, FRAME_BLOCKS);
                    at = runs.last().map(|run| run.end());
                    if !runs.is_empty() {
                        reads.push_back(read(&io, Arc::clone(source), runs));
                    }
                }
                let Some(read) = reads.next().await else { break };
                for (run, content) in read.map_err(self.io())? {
                    for (block, bytes) in (run.start.0..run.end()).zip(content.chunks_exact(BLOCK_BYTES as usize)) {
                        packer.block(block, bytes);
                        if packer.is_full() {
                            let packed = packer.take_data(header.epoch, pass, compress);
                            self.send(&mut stream, packed, (header, volume), sent).await?;
                        }
                    }
                }
                if packer.has_zeroes() {
                    self.send(&mut stream, packer.take_zeroes(header.epoch, pass), (header, volume), sent).await?;
                }
            }
            let packed = packer.take_data(header.epoch, pass, compress);
            self.send(&mut stream, packed, (header, volume), sent).await?;
            self.send(&mut stream, packer.take_zeroes(header.epoch, pass), (header, volume), sent).await?;
        }
        self.stage(sent).await?;
        stream.finish().map_err(|e| lost(&e))?;
        reach(Step::GivePass);
        Ok(())
    }

    async fn send(
        &mut self,
        stream: &mut SendStream,
        packed: impl IntoIterator<Item = Packed>,
        (header, volume): (PassHeader, usize),
        sent: &mut Sent,
    ) -> Result<(), HandbackError> {
        for Packed { bytes, extents, data_blocks, zero_blocks } in packed {
            if let Some(head) = bytes.first_chunk::<FRAME_HEADER_BYTES>() {
                sent.tally.add(head, bytes.len(), data_blocks, zero_blocks);
            }
            stream.write_all(&bytes).await.map_err(|error| HandbackError::Lost(one_line(&error)))?;
            sent.batch.frames.push(FrameRef {
                bytes: bytes.len() as u32,
                volume: VolumeIndex(volume as u16),
                kind: if data_blocks > 0 { FrameKind::Data } else { FrameKind::Zero },
                pass: header.pass,
                extents: extents.len() as u16,
            });
            sent.batch.extents.extend(extents);
            sent.batch.bytes.extend(bytes);
            if sent.batch.bytes.len() >= BATCH_BYTES {
                self.stage(sent).await?;
            }
        }
        Ok(())
    }

    /// Hands what was packed to the journal.
    async fn stage(&mut self, sent: &mut Sent) -> Result<(), HandbackError> {
        if !sent.batch.frames.is_empty() {
            self.group.append(self.id, std::mem::take(&mut sent.batch)).await;
        }
        match self.events.try_recv() {
            Ok(GroupEvent::Storage(cause)) => Err(HandbackError::Storage(cause)),
            Ok(GroupEvent::Superseded | GroupEvent::Fenced(_)) => Err(HandbackError::Superseded),
            Ok(GroupEvent::Committed(_) | GroupEvent::Drain) | Err(_) => Ok(()),
        }
    }

    /// Waits until the primary has a pass on its disks.
    async fn applied(&mut self, pass: u16) -> Result<(), HandbackError> {
        match self.line.next().await? {
            Message::Applied { pass: theirs } if theirs == pass => Ok(()),
            Message::Close { reason, .. } => Err(HandbackError::Lost(format!("the primary gave up: {reason}"))),
            other => Err(HandbackError::Unexpected { message: other.kind(), state: "waiting for a pass to be applied" }),
        }
    }

    /// The step that counts: the point is sealed, and the group follows its primary again.
    async fn seal(&mut self, tally: &Tally, pass: u16, cut_unix_us: u64) -> Result<(Point, Generation), HandbackError> {
        reach(Step::GiveApplied);
        let seal = Seal {
            passes: u32::from(pass) + 1,
            epoch: self.ready.newest.epoch.next(),
            generation: self.ready.generation,
            cut_unix_us,
            frames: tally.frames,
            frame_bytes: tally.frame_bytes,
            data_blocks: tally.data_blocks,
            zero_blocks: tally.zero_blocks,
            first_write_unix_us: 0,
            session: self.ask.token,
            digest: tally.digest(),
        };
        let handed = self.group.hand(self.id, seal).await?;
        let generation = handed.ok_or(HandbackError::Superseded)?;
        Ok((seal.point(), generation))
    }
}

fn compress(content: &[u8], room: &mut [u8]) -> Option<usize> {
    lz4_flex::block::compress_into(content, room).ok()
}

type Runs = Vec<(proto::BlockExtent, blockdev::Buf)>;

fn read(
    io: &IoThreads,
    source: Arc<dyn BlockDevice>,
    runs: Vec<proto::BlockExtent>,
) -> impl Future<Output = std::io::Result<Runs>> + use<> {
    let read = io.call(move || async move {
        let mut done = Vec::with_capacity(runs.len());
        for run in runs {
            done.push((run, read_blocks(&*source, run).await?));
        }
        Ok(done)
    });
    async move { read.await.flatten() }
}
