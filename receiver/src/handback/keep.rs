//! Keeps what a primary wrote after the sites had parted, as a fork of the newest point that both knew.
//!
//! The fork is built under a name that nobody looks for, and gets its own when all of it is durable; never that of another one, so a primary
//! cannot take away what was kept before.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockdev::{ArrivedFrame, BlockDevice, FrameReader, FrameStreamError, IoThreads};
use proto::seal::Tally;
use proto::{Generation, Name, Point};
use quinn::RecvStream;
use tokio::sync::watch;

use super::HandbackError;
use super::core::ANSWER_DEADLINE;
use crate::core::SessionError;
use crate::fork::{ForkDevice, ForkError, KEPT_PREFIX, OpenFork};
use crate::group::{GroupError, Shared, Usage};
use crate::pins::Pin;
use crate::session::one_line;
use crate::store::at;
use crate::superblock::ForkInUse;

/// Forks of this kind that a group keeps at most.
pub(crate) const KEPT_FORKS_MAX: usize = 16;

/// Names of those that are still arriving.
const ARRIVING_PREFIX: &str = "arriving-";

/// Bytes of a client's space that are given back when this is dropped: what did not arrive whole, or was never named, is removed by the next try.
struct Counted {
    usage: Arc<Usage>,
    bytes: u64,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.usage.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A fork whose blocks arrive, each once.
pub(crate) struct Arriving {
    name: Name,
    fork: OpenFork,
    client: Name,
    counted: Counted,
    tally: Tally,
    blocks_left: u64,
    /// The point under it stays.
    pin: Pin,
}

/// A fork whose blocks have arrived, durably.
pub(crate) struct Kept {
    arriving: Name,
    tally: Tally,
    counted: Counted,
    pin: Pin,
}

impl Arriving {
    /// Makes the fork of `point`, for what a primary of `generation` wrote. Changes files.
    pub(crate) fn begin(shared: &Arc<Shared>, generation: Generation, point: Point) -> Result<Self, HandbackError> {
        let name = parsed(&format!("{ARRIVING_PREFIX}{generation}"), &shared.folder.group)?;
        let folder = shared.folder.fork(&name);
        if folder.exists() {
            shared.disk.remove_folder(&folder).map_err(at(&folder, "remove what did not arrive")).map_err(ForkError::from)?;
        }
        let fork = ForkInUse { name: name.clone(), point };
        crate::fork::create(&shared.disk, shared, &fork)?;
        let fork = crate::fork::assemble(shared, generation, &fork)?;
        Ok(Self {
            name,
            client: shared.folder.client.clone(),
            counted: Counted { usage: Arc::clone(&shared.usage), bytes: 0 },
            tally: Tally::default(),
            blocks_left: shared.volume_blocks.iter().sum(),
            // The fork's own views pin it until then.
            pin: shared.pins.pin(point),
            fork,
        })
    }

    /// Counts a frame. Returns the device of its volume.
    pub(crate) fn admit(&mut self, frame: &ArrivedFrame) -> Result<Arc<ForkDevice>, HandbackError> {
        let (volume, volumes) = (frame.volume(), self.fork.volumes.len());
        let device = self.fork.volumes.get(volume).map(|(_, device)| Arc::clone(device));
        let device = device.ok_or(FrameStreamError::Volume { volume: frame.header().volume.0, volumes })?;
        let (data, zero) = frame.blocks();
        // Else a primary could keep this going for ever.
        self.blocks_left = self.blocks_left.checked_sub(data + zero).ok_or(HandbackError::Endless)?;
        let (bytes, usage) = (u64::from(frame.header().content_bytes), &self.counted.usage);
        if let Some(max) = usage.max
            && usage.used.load(Ordering::Relaxed).saturating_add(bytes) > max
        {
            return Err(HandbackError::Space { client: self.client.clone(), bytes });
        }
        usage.used.fetch_add(bytes, Ordering::Relaxed);
        self.counted.bytes += bytes;
        self.tally.add(frame.head(), frame.header().frame_bytes(), data, zero);
        Ok(device)
    }

    /// Its devices, to be flushed at the end.
    pub(crate) fn devices(&self) -> Vec<Arc<ForkDevice>> {
        self.fork.volumes.iter().map(|(_, device)| Arc::clone(device)).collect()
    }

    /// All of it has arrived and is durable.
    pub(crate) fn arrived(self) -> Kept {
        Kept { arriving: self.name, tally: self.tally, counted: self.counted, pin: self.pin }
    }

    /// Takes what comes on a stream; each frame within a deadline.
    pub(super) async fn take(
        mut self,
        stream: &mut RecvStream,
        io: &IoThreads,
        stop: &mut watch::Receiver<bool>,
    ) -> Result<Kept, HandbackError> {
        let group = self.fork.volumes.iter().map(|(_, device)| proto::units::blocks_of(device.size()));
        let mut reader = FrameReader::new(group);
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
            applied.await.flatten().map_err(HandbackError::Kept)?;
        }
        for device in self.devices() {
            let flushed = io.call(move || async move { device.flush().await });
            flushed.await.flatten().map_err(HandbackError::Kept)?;
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
    pub(crate) fn name(mut self, shared: &Shared, generation: Generation) -> Result<Name, HandbackError> {
        let group = || shared.folder.group.clone();
        for number in 1..=KEPT_FORKS_MAX {
            let tail = if number == 1 { String::new() } else { format!("-{number}") };
            let name = parsed(&format!("{KEPT_PREFIX}{generation}{tail}"), &group())?;
            let (from, to) = (shared.folder.fork(&self.arriving), shared.folder.fork(&name));
            if to.exists() {
                continue;
            }
            let parent = shared.folder.path.join("forks");
            shared.disk.rename(&from, &to).map_err(at(&to, "name the fork's folder")).map_err(ForkError::from)?;
            shared.disk.sync_folder(&parent).map_err(at(&parent, "sync the folder")).map_err(ForkError::from)?;
            shared.kept.lock().push(self.pin);
            self.counted.bytes = 0;
            let client = &shared.folder.client;
            tracing::warn!("{client}/{}: what its primary wrote of its own is kept as fork {name}", group());
            return Ok(name);
        }
        Err(HandbackError::Forks { group: group(), count: KEPT_FORKS_MAX })
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

fn parsed(name: &str, group: &Name) -> Result<Name, HandbackError> {
    // A generation has at most 15 digits.
    name.parse().map_err(|_| GroupError::Changed { group: group.clone() }.into())
}
