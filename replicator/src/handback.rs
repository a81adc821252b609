//! Takes a group's disks back from its receiver: after a failover, or to an earlier point. `proto::handback` has the conversation.
//!
//! What must always hold: what was written here after the sites had parted is on stable storage at the receiver before the first block is
//! overwritten; every block that is overwritten is marked and in the dirty log first, so that a handback that breaks can be begun again from
//! whatever the disks hold then; guests write only after the receiver has said that they may.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use blockdev::steps::{Step, reach};
use blockdev::{BlockDevice, FrameReader, IoThreads, read_blocks};
use futures_util::stream::{FuturesUnordered, StreamExt};
use parking_lot::Mutex;
use proto::control::VolumeHello;
use proto::frame::FRAME_HEADER_BYTES;
use proto::pack::{GroupPacker, Packed, Wanted};
use proto::seal::Tally;
use proto::units::blocks_of;
use proto::{DirtyMap, Name, Point, SessionToken, VolumeIndex};
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::mpsc;

use crate::link::Link;
use crate::record::{Record, Stopped};
use crate::session::Order;
use crate::shared::Shared;
use crate::status::LinkState;

mod conversation;
pub(crate) mod core;
mod report;
mod talk;

use self::core::{Core, DRAIN_DEADLINE, READY_DEADLINE, Wish};
use conversation::Conversation;
pub use report::{HandbackError, HandbackPlan, HandbackStatus, HandbackTarget};
pub(crate) use talk::Broken;

/// Frames that are being written at once.
const WRITES_AT_ONCE: usize = 8;

/// What takes disks back needs of its group.
pub(crate) struct Handback {
    pub(crate) shared: Arc<Shared>,
    pub(crate) link: Arc<Link>,
    pub(crate) record: Arc<Record>,
    pub(crate) capture: IoThreads,
    pub(crate) volumes: Vec<VolumeHello>,
    /// Where the disks are read for the comparison.
    pub(crate) scanners: Arc<[Arc<dyn BlockDevice>]>,
    /// The disks themselves, to be flushed.
    pub(crate) devices: Arc<[Arc<dyn BlockDevice>]>,
    /// Where what comes is written: every change is marked, and no gate holds it up.
    pub(crate) taps: Vec<Arc<dyn BlockDevice>>,
    pub(crate) orders: mpsc::Sender<Order>,
    pub(crate) state: Mutex<(HandbackStatus, Option<Instant>)>,
    /// One at a time.
    pub(crate) busy: Arc<tokio::sync::Mutex<()>>,
}

impl Handback {
    /// Finds out what it would do; changes nothing.
    ///
    /// # Errors
    /// [`HandbackError`].
    pub(crate) async fn plan(&self, target: HandbackTarget) -> Result<HandbackPlan, HandbackError> {
        let group = self.shared.group.clone();
        let _one = self.busy.clone().try_lock_owned().map_err(|_| HandbackError::Busy { group: group.clone() })?;
        self.permitted(target)?;
        let mut core = Core::new(self.wish(target, true));
        Conversation::new(self, &mut core).run().await.map_err(|error| self.failed(&error))?;
        if let Some((point, generation)) = core.handed() {
            return Ok(HandbackPlan::done(group, target, point, generation));
        }
        let ready = core.ready().copied().ok_or_else(|| HandbackError::Stopping { group: group.clone() })?;
        let is_failback = target == HandbackTarget::Failback;
        let own_bytes = if is_failback { core.own_bytes() } else { 0 };
        Ok(HandbackPlan {
            group,
            generation: ready.generation,
            from: ready.from,
            newest: ready.newest,
            receive_bytes: ready.give_bytes + own_bytes,
            own_bytes: if self.is_kept() { 0 } else { own_bytes },
        })
    }

    /// The point that has a name, which the receiver knows; changes nothing.
    ///
    /// # Errors
    /// [`HandbackError`].
    pub(crate) async fn resolve(&self, name: Name) -> Result<Point, HandbackError> {
        let group = self.shared.group.clone();
        let _one = self.busy.clone().try_lock_owned().map_err(|_| HandbackError::Busy { group: group.clone() })?;
        let mut wish = Wish { named: Some(name), ..self.wish(HandbackTarget::Failback, true) };
        let mut core = Core::new(wish.clone());
        Conversation::new(self, &mut core).run().await.map_err(|error| self.failed(&error))?;
        if let Some((_, generation)) = core.handed() {
            // Told that an earlier try had come to its end, it has not learned where the name is: it asks as one who never tried, and stands where that one ended.
            (wish.token, wish.generation) = (SessionToken(rand::random()), generation);
            core = Core::new(wish);
            Conversation::new(self, &mut core).run().await.map_err(|error| self.failed(&error))?;
        }
        core.ready().map(|ready| ready.from).ok_or(HandbackError::Stopping { group })
    }

    /// What is wished for, from what is recorded.
    fn wish(&self, target: HandbackTarget, plans: bool) -> Wish {
        let recorded = self.token();
        // With the token of one that broke the receiver knows whether that one came to its end.
        let (token, kept) = recorded.unwrap_or_else(|| (SessionToken(rand::random()), false));
        Wish {
            target,
            plans,
            named: None,
            group: self.shared.group.clone(),
            generation: self.record.get().generation,
            volumes: self.volumes.clone(),
            token,
            repeats: recorded.is_some(),
            kept,
            gate: self.shared.gate.closed(),
            cleared: self.record.get().cleared.max(self.shared.ledger.summary().committed),
        }
    }

    /// Begins. [`Self::status`] tells how it fares.
    ///
    /// # Errors
    /// [`HandbackError`] if it cannot begin.
    pub(crate) fn begin(self: &Arc<Self>, target: HandbackTarget) -> Result<(), HandbackError> {
        let busy = self.busy.clone().try_lock_owned();
        let busy = busy.map_err(|_| HandbackError::Busy { group: self.shared.group.clone() })?;
        self.permitted(target)?;
        {
            let mut state = self.state.lock();
            let number = state.0.number + 1;
            *state = (HandbackStatus { number, running: true, ..HandbackStatus::default() }, Some(Instant::now()));
        }
        let this = self.clone();
        tokio::spawn(async move {
            let ended = this.run(target).await;
            let mut state = this.state.lock();
            let (status, since) = &mut *state;
            status.elapsed_ms = since.take().map_or(0, |since| since.elapsed().as_millis() as u64);
            status.running = false;
            match ended {
                Ok(point) => {
                    status.point = Some(point);
                    tracing::warn!(group = %this.shared.group, %point, "the disks are given back; guests may write here");
                }
                Err(error) => {
                    tracing::error!(group = %this.shared.group, "{error}");
                    status.error = Some(error.to_string());
                }
            }
            drop(busy);
        });
        Ok(())
    }

    /// The one that runs, or the last one.
    pub(crate) fn status(&self) -> Option<HandbackStatus> {
        let state = self.state.lock();
        let (status, since) = &*state;
        let elapsed_ms = since.map_or(status.elapsed_ms, |since| since.elapsed().as_millis() as u64);
        (status.number > 0).then(|| HandbackStatus { elapsed_ms, ..status.clone() })
    }

    fn step(&self, step: &str) {
        self.state.lock().0.step = step.to_owned();
    }

    fn permitted(&self, target: HandbackTarget) -> Result<(), HandbackError> {
        let group = self.shared.group.clone();
        match (target, self.shared.state()) {
            // One that broke half way leaves the driver parked, whatever it knows of its peer.
            _ if self.token().is_some() => Ok(()),
            (HandbackTarget::Failback, LinkState::Fenced) | (HandbackTarget::Rollback(_), LinkState::Streaming) => Ok(()),
            (HandbackTarget::Failback, _) => Err(HandbackError::NotFenced { group }),
            (HandbackTarget::Rollback(_), _) => Err(HandbackError::NotStreaming { group }),
        }
    }

    fn failed(&self, error: &Broken) -> HandbackError {
        match error {
            Broken::Refused(reason) => HandbackError::Refused(reason.clone()),
            Broken::NotDrained => HandbackError::NotDrained { group: self.shared.group.clone() },
            Broken::Stopping => HandbackError::Stopping { group: self.shared.group.clone() },
            error => HandbackError::Failed { group: self.shared.group.clone(), reason: error.to_string() },
        }
    }

    fn token(&self) -> Option<(SessionToken, bool)> {
        match self.record.get().stopped {
            Some(Stopped::Handback { token, kept, .. }) => Some((token, kept)),
            _ => None,
        }
    }

    /// Where one that broke was to bring the disks, if there is one.
    fn broken(&self) -> Option<Option<Point>> {
        match self.record.get().stopped {
            Some(Stopped::Handback { to, .. }) => Some(to),
            _ => None,
        }
    }

    fn is_kept(&self) -> bool {
        self.token().is_some_and(|(_, kept)| kept)
    }

    async fn run(&self, target: HandbackTarget) -> Result<Point, HandbackError> {
        let mut core = Core::new(self.wish(target, false));
        let broken = self.broken();
        self.shared.handing.store(true, Ordering::SeqCst);
        let done = Conversation::new(self, &mut core).run().await;
        self.shared.handing.store(false, Ordering::SeqCst);
        let stopping = || HandbackError::Stopping { group: self.shared.group.clone() };
        match (done, broken) {
            (Ok(()), Some(at)) if core.found_ended() && at != target.point() => {
                Err(HandbackError::Elsewhere { group: self.shared.group.clone(), at })
            }
            (Ok(()), _) => core.handed().map(|(point, _)| point).ok_or_else(stopping),
            (Err(error), _) => {
                let mut actions = Vec::new();
                core.fail(self.token().is_some(), &mut actions);
                for action in actions {
                    if let Err(error) = Conversation::new(self, &mut core).perform(action).await {
                        tracing::error!(group = %self.shared.group, %error, "cannot end a handback cleanly");
                    }
                }
                Err(self.failed(&error))
            }
        }
    }

    /// Writes what comes to the disks; returns when nothing of it is being written any more.
    async fn apply(&self, stream: &mut RecvStream) -> Result<(), Broken> {
        let mut writing = FuturesUnordered::new();
        let mut reader = FrameReader::new(self.taps.iter().map(|tap| blocks_of(tap.size())));
        let mut ended = loop {
            let frame = match reader.next(stream).await {
                Ok(Some(frame)) => frame,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error.into()),
            };
            let (volume, volumes) = (frame.header().volume.0, self.taps.len());
            let Some(tap) = self.taps.get(frame.volume()).cloned() else { break Err(Broken::Volume { volume, volumes }) };
            if writing.len() >= WRITES_AT_ONCE
                && let Some(Err(error)) = writing.next().await.map(|done| self.count(done))
            {
                break Err(error);
            }
            let written = self.capture.call(move || async move {
                frame.apply(&*tap).await?;
                reach(Step::TakeFrame);
                Ok::<_, std::io::Error>((frame.block_bytes(), frame.frame_bytes()))
            });
            writing.push(async move { written.await.flatten() });
        };
        // Also of a conversation that broke: the next one must not be overtaken by a write of this one.
        while let Some(done) = writing.next().await {
            ended = self.count(done).and(ended);
        }
        ended
    }

    fn count(&self, written: std::io::Result<(u64, u64)>) -> Result<(), Broken> {
        let (bytes, length) = written?;
        let status = &mut self.state.lock().0;
        status.done_bytes += bytes;
        status.received_bytes += length;
        // What the active copy wrote meanwhile comes on top.
        status.total_bytes = status.total_bytes.max(status.done_bytes);
        Ok(())
    }

    async fn flush(&self) -> Result<(), Broken> {
        for device in self.devices.iter() {
            let device = device.clone();
            self.capture.call(move || async move { device.flush().await }).await.flatten()?;
        }
        Ok(())
    }

    /// Sends blocks of the disks as they are, to be kept.
    async fn send_own(&self, connection: &Connection, own: Vec<DirtyMap>, newest: Point) -> Result<Tally, Broken> {
        let mut stream = connection.open_uni().await?;
        let (mut tally, mut packer, mut frames) = (Tally::default(), GroupPacker::new(own, newest.epoch, 0), Vec::new());
        while let Some(Wanted { volume, runs }) = packer.wanted() {
            let device = self.scanners.get(usize::from(volume.0)).cloned();
            let device = device.ok_or(Broken::Volume { volume: volume.0, volumes: self.scanners.len() })?;
            let read = self.capture.call(move || async move {
                let mut done = Vec::with_capacity(runs.len());
                for run in runs {
                    done.push((run, read_blocks(&*device, run).await?));
                }
                Ok::<_, std::io::Error>(done)
            });
            for (run, content) in read.await.flatten()? {
                packer.put(volume, run, &content, &mut frames);
            }
            self.send(&mut stream, &mut frames, &mut tally).await?;
        }
        packer.finish(&mut frames);
        self.send(&mut stream, &mut frames, &mut tally).await?;
        stream.finish().map_err(|error| Broken::Lost(error.to_string()))?;
        Ok(tally)
    }

    async fn send(
        &self,
        stream: &mut SendStream,
        frames: &mut Vec<(VolumeIndex, Packed)>,
        tally: &mut Tally,
    ) -> Result<(), Broken> {
        for (_, Packed { bytes, data_blocks, zero_blocks, .. }) in frames.drain(..) {
            if let Some(head) = bytes.first_chunk::<FRAME_HEADER_BYTES>() {
                tally.add(head, bytes.len(), data_blocks, zero_blocks);
            }
            stream.write_all(&bytes).await?;
            self.state.lock().0.sent_bytes += bytes.len() as u64;
        }
        Ok(())
    }
}
