//! Keeps what a primary wrote after the sites had parted, as a fork of the newest point that both knew.

use std::sync::Arc;

use proto::frame::{FRAME_HEADER_BYTES, Frame, FrameHeader};
use proto::seal::Tally;
use proto::units::blocks_of;
use proto::{FrameKind, Name};
use quinn::RecvStream;

use super::{Handback, HandbackError};
use crate::fork::ForkError;
use crate::group::GroupError;
use crate::kept::Arriving;
use crate::session::one_line;
use crate::store::at;

/// A fork whose blocks have arrived, durably.
pub(super) struct Kept {
    arriving: Arriving,
    tally: Tally,
}

impl Handback {
    /// Takes the primary's own blocks from a stream.
    pub(super) async fn keep(&mut self, mut stream: RecvStream) -> Result<Kept, HandbackError> {
        let (shared, serial) = (Arc::clone(&self.group.shared), self.node.next_session().0);
        let (generation, point) = (self.ask.generation, self.ready.newest);
        let begun = self.blocking(move || Ok(Arriving::begin(&shared, serial, generation, point)?));
        let mut arriving = begun.await?;
        let tally = self.take(&mut stream, &mut arriving).await?;
        Ok(Kept { arriving, tally })
    }

    /// Gives what arrived its name, if it is what was sent.
    pub(super) async fn name(&mut self, kept: Kept, frames: u64, digest: [u8; 32]) -> Result<Name, HandbackError> {
        if (kept.tally.frames, kept.tally.digest()) != (frames, digest) {
            return Err(HandbackError::Diverged);
        }
        let generation = self.ask.generation;
        let name = self.blocking(move || Ok(kept.arriving.keep(generation)?)).await?;
        tracing::warn!(
            "{}/{}: what its primary wrote of its own is kept as fork {name}",
            self.client.config.name,
            self.ask.group
        );
        Ok(name)
    }

    /// Removes the fork that was given back: all of it is in the point that both sites hold.
    pub(super) async fn forget(&self, fork: &Name) {
        let (shared, fork) = (Arc::clone(&self.group.shared), fork.clone());
        let removed = self.blocking(move || {
            let folder = shared.folder.fork(&fork);
            Ok(shared
                .disk
                .remove_folder(&folder)
                .map_err(at(&folder, "remove the fork that was given back"))
                .map_err(ForkError::from)?)
        });
        if let Err(error) = removed.await {
            tracing::warn!("{}/{}: {error}; it is of no use any more", self.client.config.name, self.ask.group);
        }
    }

    /// Work on files, where it holds nobody up.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, HandbackError> + Send + 'static,
    ) -> Result<T, HandbackError> {
        let closed = || GroupError::Closed { group: self.ask.group.clone() };
        tokio::task::spawn_blocking(work).await.map_err(|_| closed())?
    }

    async fn take(&self, stream: &mut RecvStream, arriving: &mut Arriving) -> Result<Tally, HandbackError> {
        let io = self.node.hasher().map_err(self.io())?.io().clone();
        let lost = |error: quinn::ReadExactError| HandbackError::Lost(one_line(&error));
        let mut tally = Tally::default();
        let mut head = [0; FRAME_HEADER_BYTES];
        loop {
            match stream.read_exact(&mut head).await {
                Ok(()) => {}
                Err(quinn::ReadExactError::FinishedEarly(0)) => break,
                Err(error) => return Err(lost(error)),
            }
            let header = FrameHeader::decode(&head)?;
            let volume = usize::from(header.volume.0);
            let volumes = arriving.volumes();
            let device = volumes.get(volume).map(|(_, device)| Arc::clone(device));
            let device = device.ok_or(SessionErrorVolume(header.volume.0, volumes.len()))?;
            let blocks = self.group.shared.volumes.get(volume).map_or(0, |v| blocks_of(v.size_bytes));
            let mut body = vec![0; header.body_bytes()];
            stream.read_exact(&mut body).await.map_err(lost)?;
            let frame = Frame::decode_body(header, &body, blocks)?;
            let in_it = frame.extents.iter().map(|e| u64::from(e.blocks)).sum();
            let (data, zero) = if header.kind == FrameKind::Data { (in_it, 0) } else { (0, in_it) };
            tally.add(&head, header.frame_bytes(), data, zero);
            arriving.take(u64::from(header.content_bytes))?;
            let applied = io.call(move || async move {
                let frame = Frame::decode_body(header, &body, blocks).map_err(std::io::Error::other)?;
                blockdev::apply_frame(&*device, &frame).await
            });
            applied.await.flatten().map_err(self.io())?;
        }
        for (_, device) in arriving.volumes() {
            let device = Arc::clone(device);
            let flushed = io.call(move || async move { blockdev::BlockDevice::flush(&*device).await });
            flushed.await.flatten().map_err(self.io())?;
        }
        Ok(tally)
    }
}

/// A frame of a volume that the group does not have: number, volumes.
struct SessionErrorVolume(u16, usize);

impl From<SessionErrorVolume> for HandbackError {
    fn from(SessionErrorVolume(volume, volumes): SessionErrorVolume) -> Self {
        crate::core::SessionError::FrameVolume { volume, volumes }.into()
    }
}

impl From<ForkError> for HandbackError {
    fn from(error: ForkError) -> Self {
        Self::Group(error.into())
    }
}
