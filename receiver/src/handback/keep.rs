//! Keeps what a primary wrote after the sites had parted, as a fork of the newest point that both knew.
//!
//! The fork is built under a name that nobody looks for, and gets its own when all of it is durable; never that of another one, so a primary
//! cannot take away what was kept before.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockdev::{ArrivedFrame, FrameReader, FrameStreamError};
use proto::Name;
use proto::seal::Tally;
use quinn::RecvStream;

use super::{ANSWER_DEADLINE, Handback, HandbackError};
use crate::core::SessionError;
use crate::fork::{ForkDevice, ForkError, KEPT_PREFIX, OpenFork};
use crate::group::{GroupError, Usage};
use crate::pins::Pin;
use crate::session::one_line;
use crate::store::at;
use crate::superblock::ForkInUse;

/// Forks of this kind that a group keeps at most.
pub(crate) const KEPT_FORKS_MAX: usize = 16;

/// Names of those that are still arriving.
const ARRIVING_PREFIX: &str = "arriving-";

/// A fork whose blocks have arrived, durably.
pub(super) struct Kept {
    arriving: Name,
    tally: Tally,
    /// The point under it stays.
    pin: Pin,
}

impl Handback {
    /// Takes the primary's own blocks from a stream.
    pub(super) async fn keep(&mut self, mut stream: RecvStream) -> Result<Kept, HandbackError> {
        let (name, fork) = self.new_fork().await?;
        // The fork's own views pin it until then.
        let pin = self.group.shared.pins.pin(self.ready.newest);
        let mut arriving = Arriving {
            fork,
            client: self.client.config.name.clone(),
            usage: Arc::clone(&self.group.shared.usage),
            tally: Tally::default(),
            counted: 0,
            blocks_left: self.group.shared.volume_blocks.iter().sum(),
        };
        if let Err(error) = self.take(&mut stream, &mut arriving).await {
            // What did not arrive whole is removed by the next try.
            arriving.usage.used.fetch_sub(arriving.counted, Ordering::Relaxed);
            return Err(error);
        }
        Ok(Kept { arriving: name, tally: arriving.tally, pin })
    }

    /// Gives what arrived its name, if it is what was sent.
    pub(super) async fn name(&mut self, kept: Kept, frames: u64, digest: [u8; 32]) -> Result<Name, HandbackError> {
        if (kept.tally.frames, kept.tally.digest()) != (frames, digest) {
            return Err(HandbackError::Diverged);
        }
        let (shared, generation) = (Arc::clone(&self.group.shared), self.ask.generation);
        let named = self.blocking(move || {
            let group = || shared.folder.group.clone();
            for number in 1..=KEPT_FORKS_MAX {
                let tail = if number == 1 { String::new() } else { format!("-{number}") };
                let name = parsed(&format!("{KEPT_PREFIX}{generation}{tail}"), &group())?;
                let (from, to) = (shared.folder.fork(&kept.arriving), shared.folder.fork(&name));
                if to.exists() {
                    continue;
                }
                let parent = shared.folder.path.join("forks");
                shared.disk.rename(&from, &to).map_err(at(&to, "name the fork's folder")).map_err(ForkError::from)?;
                shared.disk.sync_folder(&parent).map_err(at(&parent, "sync the folder")).map_err(ForkError::from)?;
                shared.kept.lock().push(kept.pin);
                return Ok(name);
            }
            Err(HandbackError::Forks { group: group(), count: KEPT_FORKS_MAX })
        });
        let name = named.await?;
        tracing::warn!(
            "{}/{}: what its primary wrote of its own is kept as fork {name}",
            self.client.config.name,
            self.ask.group
        );
        Ok(name)
    }

    async fn new_fork(&self) -> Result<(Name, OpenFork), HandbackError> {
        let (shared, generation, point) = (Arc::clone(&self.group.shared), self.ask.generation, self.ready.newest);
        let made = self.blocking(move || {
            let name = parsed(&format!("{ARRIVING_PREFIX}{generation}"), &shared.folder.group)?;
            let folder = shared.folder.fork(&name);
            if folder.exists() {
                shared.disk.remove_folder(&folder).map_err(at(&folder, "remove what did not arrive")).map_err(ForkError::from)?;
            }
            let fork = ForkInUse { name: name.clone(), point };
            crate::fork::create(&shared.disk, &shared, &fork)?;
            Ok((name, crate::fork::assemble(&shared, generation, &fork)?))
        });
        made.await
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

    async fn take(&self, stream: &mut RecvStream, arriving: &mut Arriving) -> Result<(), HandbackError> {
        let io = self.node.hasher().map_err(self.io())?.io().clone();
        let mut stop = self.line.stop.clone();
        let mut reader = FrameReader::new(self.group.shared.volume_blocks.iter().copied());
        loop {
            let frame = tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => return Err(HandbackError::Stopping),
                frame = reader.next(stream) => frame?,
                () = tokio::time::sleep(ANSWER_DEADLINE) => return Err(HandbackError::Silent),
            };
            let Some(frame) = frame else { break };
            let device = arriving.admit(&frame)?;
            let applied = io.call(move || async move { frame.apply(&*device).await });
            applied.await.flatten().map_err(self.io())?;
        }
        for (_, device) in &arriving.fork.volumes {
            let device = Arc::clone(device);
            let flushed = io.call(move || async move { blockdev::BlockDevice::flush(&*device).await });
            flushed.await.flatten().map_err(self.io())?;
        }
        Ok(())
    }
}

/// A fork whose blocks arrive, each once.
struct Arriving {
    fork: OpenFork,
    client: Name,
    usage: Arc<Usage>,
    tally: Tally,
    /// Bytes of it that are in `usage`.
    counted: u64,
    blocks_left: u64,
}

impl Arriving {
    /// Counts a frame. Returns the device of its volume.
    fn admit(&mut self, frame: &ArrivedFrame) -> Result<Arc<ForkDevice>, HandbackError> {
        let (volume, volumes) = (frame.volume(), self.fork.volumes.len());
        let device = self.fork.volumes.get(volume).map(|(_, device)| Arc::clone(device));
        let device = device.ok_or(FrameStreamError::Volume { volume: frame.header().volume.0, volumes })?;
        let (data, zero) = frame.blocks();
        // Else a primary could keep this going for ever.
        self.blocks_left = self.blocks_left.checked_sub(data + zero).ok_or(HandbackError::Endless)?;
        let bytes = u64::from(frame.header().content_bytes);
        if let Some(max) = self.usage.max
            && self.usage.used.load(Ordering::Relaxed).saturating_add(bytes) > max
        {
            return Err(HandbackError::Space { client: self.client.clone(), bytes });
        }
        self.tally.add(frame.head(), frame.header().frame_bytes(), data, zero);
        self.usage.used.fetch_add(bytes, Ordering::Relaxed);
        self.counted += bytes;
        Ok(device)
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
