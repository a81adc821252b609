//! Keeps what a primary wrote after the sites had parted, as a fork of the newest point that both knew.

use std::sync::Arc;

use blockdev::{ArrivedFrame, BlockDevice, FrameReader, FrameStreamError, IoThreads};
use proto::seal::Tally;
use proto::{Generation, Name, Point};
use quinn::RecvStream;
use tokio::sync::watch;

use super::HandbackError;
use super::core::ANSWER_DEADLINE;
use crate::core::SessionError;
use crate::fork::{ForkDevice, ForkError};
use crate::group::{SessionId, Shared};
use crate::kept::Arriving;
use crate::session::one_line;

/// A fork whose blocks arrive, each once.
pub(crate) struct Keeping {
    arriving: Arriving,
    tally: Tally,
    blocks_left: u64,
}

/// A fork whose blocks have arrived, durably.
pub(crate) struct Kept {
    arriving: Arriving,
    tally: Tally,
}

impl Keeping {
    /// Makes the fork of `point`, for what a primary of `generation` wrote. Changes files.
    pub(crate) fn begin(
        shared: &Arc<Shared>,
        id: SessionId,
        generation: Generation,
        point: Point,
    ) -> Result<Self, HandbackError> {
        let arriving = Arriving::begin(shared, id.0, generation, point)?;
        Ok(Self { arriving, tally: Tally::default(), blocks_left: shared.volume_blocks.iter().sum() })
    }

    /// Counts a frame. Returns the device of its volume.
    pub(crate) fn admit(&mut self, frame: &ArrivedFrame) -> Result<Arc<ForkDevice>, HandbackError> {
        let (volume, disks) = (frame.volume(), self.arriving.volumes());
        let (device, volumes) = (disks.get(volume).map(|(_, device)| Arc::clone(device)), disks.len());
        let device = device.ok_or(FrameStreamError::Volume { volume: frame.header().volume.0, volumes })?;
        let (data, zero) = frame.blocks();
        // Else a primary could keep this going for ever.
        self.blocks_left = self.blocks_left.checked_sub(data + zero).ok_or(HandbackError::Endless)?;
        self.arriving.take(frame.header().content_bytes.into())?;
        self.tally.add(frame.head(), frame.header().frame_bytes(), data, zero);
        Ok(device)
    }

    /// Its devices, to be flushed at the end.
    pub(crate) fn devices(&self) -> Vec<Arc<ForkDevice>> {
        self.arriving.volumes().iter().map(|(_, device)| Arc::clone(device)).collect()
    }

    /// All of it has arrived and is durable.
    pub(crate) fn arrived(self) -> Kept {
        Kept { arriving: self.arriving, tally: self.tally }
    }

    /// Takes what comes on a stream; each frame within a deadline.
    pub(super) async fn take(
        mut self,
        stream: &mut RecvStream,
        io: &IoThreads,
        stop: &mut watch::Receiver<bool>,
    ) -> Result<Kept, HandbackError> {
        let blocks = self.arriving.volumes().iter().map(|(_, device)| proto::units::blocks_of(device.size()));
        let mut reader = FrameReader::new(blocks);
        loop {
            let frame = tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => return Err(HandbackError::Stopping),
                frame = reader.next(stream) => frame?,
                () = tokio::time::sleep(ANSWER_DEADLINE) => return Err(HandbackError::Silent),
            };
            let Some(frame) = frame else { break };
            let device = self.admit(&frame)?;
            let applied = io.call(move || async move { frame.apply(&*device).await });
            applied.await.flatten().map_err(HandbackError::Keeping)?;
        }
        for device in self.devices() {
            let flushed = io.call(move || async move { device.flush().await });
            flushed.await.flatten().map_err(HandbackError::Keeping)?;
        }
        Ok(self.arrived())
    }
}

impl Kept {
    /// Frames and their digest, as the primary tells them.
    pub(crate) fn told(&self) -> (u64, [u8; 32]) {
        (self.tally.frames, self.tally.digest())
    }

    /// Gives it its name, durably. Changes files.
    pub(crate) fn name(self, generation: Generation) -> Result<Name, HandbackError> {
        Ok(self.arriving.keep(generation)?)
    }
}

impl From<FrameStreamError> for HandbackError {
    fn from(error: FrameStreamError) -> Self {
        match error {
            FrameStreamError::Decode(error) => error.into(),
            FrameStreamError::Volume { volume, volumes } => SessionError::FrameVolume { volume, volumes }.into(),
            FrameStreamError::Read(error) => Self::Lost(one_line(&error)),
        }
    }
}

impl From<ForkError> for HandbackError {
    fn from(error: ForkError) -> Self {
        Self::Group(error.into())
    }
}
