//! Takes a group's disks back from its receiver: after a failover, or to an earlier point. `proto::handback` has the conversation.
//!
//! What must always hold: what was written here after the sites had parted is on stable storage at the receiver before the first block is
//! overwritten; every block that is overwritten is marked and in the dirty log first, so that a handback that breaks can be begun again from
//! whatever the disks hold then; guests write only after the receiver has said that they may.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use blockdev::{BlockDevice, FrameReader, IoThreads, read_blocks};
use futures_util::stream::{FuturesUnordered, StreamExt};
use parking_lot::Mutex;
use proto::control::{PassHeader, PassKind, VERSION_MAX, VERSION_MIN, VolumeHello};
use proto::frame::FRAME_HEADER_BYTES;
use proto::handback::{Ask, HANDBACK_PASSES_MAX, Ready, WANT_EXTENTS_MAX, Want};
use proto::pack::{FRAME_BLOCKS, Packed, Packer};
use proto::seal::Tally;
use proto::units::{BLOCK_BYTES, blocks_of};
use proto::{DirtyMap, Generation, Message, Name, Point, SessionToken, VolumeIndex};
use quinn::{RecvStream, SendStream};
use tokio::sync::{mpsc, oneshot};

use crate::capture::CaptureError;
use crate::compare::Compare;
use crate::gate::Closed;
use crate::link::{Link, read_message};
use crate::outbox::{Item, Outbox};
use crate::record::{Record, Stopped};
use crate::session::Order;
use crate::shared::Shared;
use crate::status::LinkState;

mod report;
mod talk;

pub use report::{HandbackError, HandbackPlan, HandbackStatus, HandbackTarget};
use talk::{Broken, Talk};

/// How long the receiver may take to find out what it would give: it may have to walk its journal.
const READY_DEADLINE: Duration = Duration::from_secs(120);
/// How long everything written so far may take to be committed, before a rollback.
const DRAIN_DEADLINE: Duration = Duration::from_secs(60);
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

/// What the receiver answered.
enum Answer {
    Ready(Ready),
    /// It has given the disks back already, and this node did not hear it.
    Handed(Point, Generation),
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
        let planned = async {
            let (mut talk, answer) = self.ask(target, SessionToken(rand::random())).await?;
            let ready = match answer {
                Answer::Ready(ready) => ready,
                Answer::Handed(..) => return Err(Broken::Unexpected { message: "handed", state: "asking" }),
            };
            // A guest that may write makes marks of its own, which an epoch may hold: those are of no concern here.
            let own_bytes = if target == HandbackTarget::Failback {
                self.compare(&mut talk).await?;
                self.shared.ledger.marked().iter().map(DirtyMap::bytes).sum()
            } else {
                0
            };
            talk.end();
            Ok(HandbackPlan {
                group: self.shared.group.clone(),
                generation: ready.generation,
                from: ready.from,
                newest: ready.newest,
                receive_bytes: ready.give_bytes + own_bytes,
                own_bytes: if self.is_kept() { 0 } else { own_bytes },
            })
        };
        planned.await.map_err(|error: Broken| self.failed(&error))
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
            error => HandbackError::Failed { group: self.shared.group.clone(), reason: error.to_string() },
        }
    }

    fn token(&self) -> Option<(SessionToken, bool)> {
        match self.record.get().stopped {
            Some(Stopped::Handback { token, kept }) => Some((token, kept)),
            _ => None,
        }
    }

    fn is_kept(&self) -> bool {
        self.token().is_some_and(|(_, kept)| kept)
    }

    async fn run(&self, target: HandbackTarget) -> Result<Point, HandbackError> {
        let began_anew = self.token().is_none();
        let stopped = self.record.get().stopped;
        self.shared.handing.store(true, Ordering::SeqCst);
        let held_up = self.shared.gate.closed();
        self.shared.gate.close(Closed::Handback);
        let done = async {
            if let HandbackTarget::Rollback(_) = target
                && began_anew
            {
                self.drain().await?;
            }
            self.take(target).await.map_err(|error| self.failed(&error))
        };
        let done = done.await;
        self.shared.handing.store(false, Ordering::SeqCst);
        match &done {
            Ok((_, generation, sessions)) => {
                // Guests may write from here on: both sides have said so durably.
                self.shared.gate.open();
                self.order(Order::Begin { generation: *generation, sessions: *sessions }).await?;
            }
            // Nothing was overwritten: all is as it was.
            Err(_) if self.token().is_none() => {
                match (held_up, stopped) {
                    (Some(why), _) => self.shared.gate.close(why),
                    (None, _) => self.shared.gate.open(),
                }
                if let HandbackTarget::Rollback(_) = target {
                    let recorded = self.record.get();
                    self.order(Order::Begin { generation: recorded.generation, sessions: recorded.sessions }).await?;
                }
            }
            Err(_) => {}
        }
        done.map(|(point, ..)| point)
    }

    async fn order(&self, order: Order) -> Result<(), HandbackError> {
        let stopping = || HandbackError::Stopping { group: self.shared.group.clone() };
        self.orders.send(order).await.map_err(|_| stopping())
    }

    /// Commits what guests have written, who may not write any more, and ends the session.
    async fn drain(&self) -> Result<(), HandbackError> {
        self.step("committing what was written last");
        let group = || self.shared.group.clone();
        self.shared.hurry.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + DRAIN_DEADLINE;
        let drained = loop {
            let quiet = self.shared.ledger.is_quiet();
            if quiet && self.shared.ledger.summary().uncommitted_bytes == 0 && self.shared.state() == LinkState::Streaming {
                break Ok(());
            }
            if Instant::now() > deadline {
                break Err(HandbackError::NotDrained { group: group() });
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        self.shared.hurry.store(false, Ordering::SeqCst);
        drained?;
        let (done, parked) = oneshot::channel();
        self.order(Order::Park(done)).await?;
        parked.await.map_err(|_| HandbackError::Stopping { group: group() })
    }

    async fn ask(&self, target: HandbackTarget, token: SessionToken) -> Result<(Talk, Answer), Broken> {
        let (endpoint, connection) = self.link.connect_for_handback().await?;
        let (control, mut incoming) = connection.open_bi().await?;
        let (sender, messages) = mpsc::channel(64);
        tokio::spawn(async move {
            loop {
                let message = read_message(&mut incoming).await;
                let ended = message.is_err();
                if sender.send(message).await.is_err() || ended {
                    return;
                }
            }
        });
        let mut talk = Talk { connection, _endpoint: endpoint, control, messages };
        let ask = Ask {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            block_bytes: BLOCK_BYTES as u32,
            group: self.shared.group.clone(),
            generation: self.record.get().generation,
            token,
            to: if let HandbackTarget::Rollback(point) = target { Some(point) } else { None },
            volumes: self.volumes.clone(),
        };
        talk.say(&Message::Handback(ask)).await?;
        let answer = tokio::time::timeout(READY_DEADLINE, talk.hear()).await.map_err(|_| Broken::Silent)??;
        let answer = match answer {
            Message::Ready(ready) => Answer::Ready(ready),
            Message::Handed { point, generation } => Answer::Handed(point, generation),
            other => return Err(Broken::Unexpected { message: other.kind(), state: "asking" }),
        };
        Ok((talk, answer))
    }

    /// Finds out exactly which of the marked blocks differ from the receiver's newest point; they stay marked.
    async fn compare(&self, talk: &mut Talk) -> Result<(), Broken> {
        let queue = Outbox::new(0);
        let number = queue.attach();
        let (done, mut ended) = oneshot::channel();
        let (sender, answers) = mpsc::channel(proto::hashes::QUERIES_IN_FLIGHT_MAX);
        let (shared, devices, asked) = (self.shared.clone(), self.scanners.clone(), queue.clone());
        shared.ledger.suspect_marks();
        self.capture.spawn(move || async move {
            let compare =
                Compare { ledger: &shared.ledger, devices: &devices, queue: &asked, answers, counters: &shared.compared };
            // Whoever waits may be gone: then nobody needs the result.
            let _ = done.send(compare.run().await);
        });
        let compared = loop {
            tokio::select! {
                biased;
                compared = &mut ended => break compared.map_err(|_| CaptureError::Stopped.into()).and_then(|c| Ok(c?)),
                item = queue.next(number) => match item {
                    Some(Item::Query(query)) => {
                        if let Err(error) = talk.say(&Message::HashQuery(query)).await {
                            break Err(error);
                        }
                    }
                    _ => break Err(CaptureError::Stopped.into()),
                },
                message = talk.hear() => match message {
                    Ok(Message::Hashes(hashes)) => {
                        if sender.try_send(hashes).is_err() {
                            break Err(CaptureError::Stopped.into());
                        }
                    }
                    Ok(other) => break Err(Broken::Unexpected { message: other.kind(), state: "comparing" }),
                    Err(error) => break Err(error),
                }
            }
        };
        queue.close();
        drop(sender);
        if compared.is_err() {
            // It notices that nobody answers; what it has not compared stays suspect.
            let _ = ended.await;
        }
        compared
    }

    /// The conversation. Returns the point that both sites hold, the generation from here on, and the sessions to be recorded.
    async fn take(&self, target: HandbackTarget) -> Result<(Point, Generation, [SessionToken; 2]), Broken> {
        let (token, kept) = self.token().unwrap_or_else(|| (SessionToken(rand::random()), false));
        self.step("asking the receiver");
        let (mut talk, answer) = self.ask(target, token).await?;
        let ready = match answer {
            Answer::Ready(ready) => ready,
            Answer::Handed(point, generation) => return self.handed(&talk, point, generation, token),
        };
        self.step("comparing what was marked here");
        self.compare(&mut talk).await?;
        let own = self.shared.ledger.marked();
        self.state.lock().0.total_bytes = ready.give_bytes + own.iter().map(DirtyMap::bytes).sum::<u64>();
        // From here on the disks are in between, and a node that starts must know so.
        self.record.update(|record| record.stopped = Some(Stopped::Handback { token, kept }))?;
        if !kept {
            // Before a rollback all was committed. What differs all the same is what a power loss took from these disks; the receiver has it.
            let has_own = matches!(target, HandbackTarget::Failback) && own.iter().any(|map| !map.is_empty());
            if has_own {
                self.step("sending what was written here, to be kept");
                let name = self.send_own(&mut talk, &own, ready.newest).await?;
                self.state.lock().0.kept = Some(name);
            }
            self.record.update(|record| record.stopped = Some(Stopped::Handback { token, kept: true }))?;
        }
        for (volume, map) in own.iter().enumerate() {
            let mut at = 0;
            loop {
                let mut extents = Vec::new();
                while extents.len() < WANT_EXTENTS_MAX
                    && let Some(run) = map.next_run(at, u32::MAX)
                {
                    at = run.end();
                    extents.push(run);
                }
                if extents.is_empty() {
                    break;
                }
                talk.say(&Message::Want(Want { volume: VolumeIndex(volume as u16), extents })).await?;
            }
        }
        talk.say(&Message::Give).await?;
        self.step("taking what the other site has");
        for expected in 0..HANDBACK_PASSES_MAX {
            let (header, mut stream) = self.next_pass(&mut talk).await?;
            if header.pass != expected {
                return Err(Broken::Order { got: header.pass, expected });
            }
            self.apply(&mut stream).await?;
            if header.kind == PassKind::Frozen {
                self.step("handing over");
                self.flush().await?;
            }
            talk.say(&Message::Applied { pass: header.pass }).await?;
            if header.kind == PassKind::Frozen {
                return match talk.hear().await? {
                    Message::Handed { point, generation } => self.handed(&talk, point, generation, token),
                    other => Err(Broken::Unexpected { message: other.kind(), state: "waiting to be handed the disks" }),
                };
            }
        }
        Err(Broken::Order { got: HANDBACK_PASSES_MAX, expected: HANDBACK_PASSES_MAX - 1 })
    }

    /// Both sites hold `point`: this one is the writer, durably.
    fn handed(
        &self,
        talk: &Talk,
        point: Point,
        generation: Generation,
        token: SessionToken,
    ) -> Result<(Point, Generation, [SessionToken; 2]), Broken> {
        let sessions = [token, token];
        self.record.update(|record| {
            (record.generation, record.sessions, record.cleared, record.stopped) = (generation, sessions, None, None);
        })?;
        self.shared.ledger.handed(point);
        talk.end();
        Ok((point, generation, sessions))
    }

    async fn next_pass(&self, talk: &mut Talk) -> Result<(PassHeader, RecvStream), Broken> {
        let connection = talk.connection.clone();
        let mut stream = tokio::select! {
            biased;
            stream = connection.accept_uni() => stream?,
            message = talk.hear() => {
                return Err(Broken::Unexpected { message: message?.kind(), state: "waiting for a pass" });
            }
        };
        let mut header = [0; proto::control::PASS_HEADER_BYTES];
        stream.read_exact(&mut header).await.map_err(|error| Broken::Lost(error.to_string()))?;
        Ok((PassHeader::decode(&header)?, stream))
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

    /// Sends blocks of the disks as they are, to be kept. Returns the fork that has them.
    async fn send_own(&self, talk: &mut Talk, own: &[DirtyMap], newest: Point) -> Result<Name, Broken> {
        let mut stream = talk.connection.open_uni().await?;
        let mut tally = Tally::default();
        for (volume, (map, device)) in own.iter().zip(self.scanners.iter()).enumerate() {
            let mut packer = Packer::new(VolumeIndex(volume as u16));
            let mut at = 0;
            loop {
                let runs = map.pick(at, FRAME_BLOCKS);
                let Some(last) = runs.last() else { break };
                at = last.end();
                let device = device.clone();
                let read = self.capture.call(move || async move {
                    let mut done = Vec::with_capacity(runs.len());
                    for run in runs {
                        done.push((run, read_blocks(&*device, run).await?));
                    }
                    Ok::<_, std::io::Error>(done)
                });
                for (run, content) in read.await.flatten()? {
                    for (block, bytes) in (run.start.0..run.end()).zip(content.chunks_exact(BLOCK_BYTES as usize)) {
                        packer.block(block, bytes);
                        if packer.is_full() {
                            self.send(&mut stream, packer.take_data(newest.epoch, 0, compress), &mut tally).await?;
                        }
                    }
                }
                if packer.has_zeroes() {
                    self.send(&mut stream, packer.take_zeroes(newest.epoch, 0), &mut tally).await?;
                }
            }
            self.send(&mut stream, packer.take_data(newest.epoch, 0, compress), &mut tally).await?;
            self.send(&mut stream, packer.take_zeroes(newest.epoch, 0), &mut tally).await?;
        }
        stream.finish().map_err(|error| Broken::Lost(error.to_string()))?;
        talk.say(&Message::Diverged { frames: tally.frames, digest: tally.digest() }).await?;
        match talk.hear().await? {
            Message::Kept { name } => Ok(name),
            other => Err(Broken::Unexpected { message: other.kind(), state: "waiting for its own blocks to be kept" }),
        }
    }

    async fn send(
        &self,
        stream: &mut SendStream,
        packed: impl IntoIterator<Item = Packed>,
        tally: &mut Tally,
    ) -> Result<(), Broken> {
        for Packed { bytes, data_blocks, zero_blocks, .. } in packed {
            if let Some(head) = bytes.first_chunk::<FRAME_HEADER_BYTES>() {
                tally.add(head, bytes.len(), data_blocks, zero_blocks);
            }
            stream.write_all(&bytes).await?;
            self.state.lock().0.sent_bytes += bytes.len() as u64;
        }
        Ok(())
    }
}

fn compress(content: &[u8], room: &mut [u8]) -> Option<usize> {
    lz4_flex::block::compress_into(content, room).ok()
}
