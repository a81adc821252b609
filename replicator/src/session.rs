//! The driver of one group: performs what the core decides, and tells the core what came of it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use blockdev::steps::{Step, reach};
use blockdev::{BlockDevice, IoThreads};
use proto::control::{CloseCode, Message};
use proto::pass::{PassHeader, PassKind};
use proto::seal::Tally;
use proto::{EpochId, Generation, Hashes, Scrubbed, Seal, SessionToken};
use quinn::{Connection, Endpoint, SendStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::capture::{CaptureError, Pass};
use crate::compare::Compare;
use crate::compress::Compressor;
use crate::core::{Action, Core, Event, Load, Ours, SessionError};
use crate::gate::Closed;
use crate::ledger::FlushRefused;
use crate::link::{self, ControlError, Link, LinkError, read_message};
use crate::outbox::{Item, Outbox, StagedError};
use crate::rate::Bucket;
use crate::record::{Record, RecordError, Stopped};
use crate::scrub::Scrub;
use crate::shared::{Shared, now_unix_us};
use crate::upkeep::Upkeep;

/// Why a session ended, for the log and for `status`.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EndError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Capture(#[from] CaptureError),
    #[error(transparent)]
    Staged(#[from] StagedError),
    #[error(transparent)]
    DirtyLog(#[from] std::io::Error),
}

impl EndError {
    fn is_refusal(&self) -> bool {
        match self {
            Self::Link(e) => e.is_refusal(),
            Self::Session(e) => e.is_refusal(),
            _ => false,
        }
    }

    /// Whether the next connection may go on where this one broke: nothing is wrong at either side but that they are apart.
    fn resumes(&self) -> bool {
        match self {
            Self::Link(e) => !e.is_refusal(),
            Self::Session(e) => e.resumes(),
            Self::Control(e) => matches!(e, ControlError::Ended),
            Self::Record(_) | Self::Capture(_) | Self::Staged(_) | Self::DirtyLog(_) => false,
        }
    }
}

/// A pass under way on the capture thread.
struct Capturing {
    done: oneshot::Receiver<(Result<u64, CaptureError>, Box<Tally>)>,
    kind: PassKind,
}

/// A comparison under way on the capture thread.
struct Comparing {
    done: oneshot::Receiver<Result<(), CaptureError>>,
    /// Never full: as many answers as questions may be asked at once.
    answers: mpsc::Sender<Hashes>,
}

/// The scrub of a session, on the capture thread.
struct Scrubbing {
    done: oneshot::Receiver<Result<(), CaptureError>>,
    /// Never full: as many answers as messages may be unanswered. Without it the scrub ends.
    answers: mpsc::Sender<Scrubbed>,
}

/// One connection and what belongs to it.
struct Live {
    _endpoint: Endpoint,
    connection: Connection,
    control: Option<SendStream>,
    messages: mpsc::Receiver<Result<Message, ControlError>>,
    sender: Option<JoinHandle<()>>,
}

impl Drop for Live {
    /// Whatever ends the driver ends what works for it: the connection, and with it the task that reads.
    fn drop(&mut self) {
        if let Some(sender) = &self.sender {
            sender.abort();
        }
        link::close(&self.connection, CloseCode::Stopping, "the session is over");
    }
}

/// The task of one group.
pub(crate) struct Driver {
    pub(crate) shared: Arc<Shared>,
    pub(crate) core: Core,
    pub(crate) link: Arc<Link>,
    pub(crate) record: Arc<Record>,
    pub(crate) capture: IoThreads,
    /// Where capture and comparison read the disks; they never write or flush there.
    pub(crate) scanners: Arc<[Arc<dyn BlockDevice>]>,
    pub(crate) spill: Arc<dyn BlockDevice>,
    pub(crate) stop: watch::Receiver<Option<Instant>>,
    live: Option<Live>,
    /// Outlives connections; a new one begins when nothing of the last can be sent any more.
    outbox: Outbox,
    connecting: Option<JoinHandle<Result<(Endpoint, Connection), LinkError>>>,
    capturing: Option<Capturing>,
    comparing: Option<Comparing>,
    scrubbing: Option<Scrubbing>,
    upkeep: Upkeep,
    tally: Option<Box<Tally>>,
    cut_unix_us: u64,
    pass: Option<PassHeader>,
    orders: mpsc::Receiver<Order>,
    /// The receiver waits for the word that all is committed.
    draining: bool,
}

/// What a handback has the driver do.
pub(crate) enum Order {
    /// End what is under way and do nothing more; answer when that is done.
    Park(oneshot::Sender<()>),
    /// Begin again.
    Begin { generation: Generation, ours: Ours },
}

impl Driver {
    #[expect(clippy::too_many_arguments, reason = "one caller hands over the parts that the driver owns from then on")]
    pub(crate) fn new(
        shared: Arc<Shared>,
        core: Core,
        link: Arc<Link>,
        record: Arc<Record>,
        capture: IoThreads,
        upkeep: Upkeep,
        scanners: Arc<[Arc<dyn BlockDevice>]>,
        spill: Arc<dyn BlockDevice>,
        stop: watch::Receiver<Option<Instant>>,
        orders: mpsc::Receiver<Order>,
    ) -> Self {
        let outbox = new_outbox(&shared);
        Self {
            shared,
            core,
            link,
            record,
            capture,
            scanners,
            spill,
            stop,
            live: None,
            outbox,
            connecting: None,
            capturing: None,
            comparing: None,
            scrubbing: None,
            upkeep,
            tally: None,
            cut_unix_us: 0,
            pass: None,
            orders,
            draining: false,
        }
    }

    /// Runs until told to stop.
    pub(crate) async fn run(mut self) {
        // A parked driver waits for an order, maybe for days: until then the status is to say so.
        self.shared.publish(&self.core, None, &self.outbox, None);
        loop {
            let event = self.next_event().await;
            let event = match event {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(error) => self.lost(error).await,
            };
            let mut actions = Vec::new();
            let handled = self.core.handle(Instant::now(), event, &mut actions);
            let mut failed = handled.err().map(EndError::from);
            for action in actions {
                if let Err(error) = self.perform(action).await {
                    failed.get_or_insert(error);
                    // What follows relies on it: a copy of another history is not recorded as known before all is suspect durably.
                    break;
                }
            }
            if let Some(error) = failed {
                if let EndError::Session(SessionError::Fenced { generation }) = &error {
                    self.fenced(*generation);
                }
                let event = self.lost(error).await;
                let mut actions = Vec::new();
                if let Err(error) = self.core.handle(Instant::now(), event, &mut actions) {
                    tracing::error!(%error, "unexpected after the end of a session");
                }
                for action in actions {
                    if let Err(error) = self.perform(action).await {
                        tracing::error!(%error, "cannot end a session cleanly");
                    }
                }
            }
            if self.core.follows() && self.scrubbing.is_none() {
                self.begin_scrub();
            }
            self.tell_drained();
            self.shared.publish(&self.core, self.live.as_ref().map(|l| &l.connection), &self.outbox, self.pass);
        }
        self.disconnect(proto::control::LEAVE_REASON).await;
        self.give_up().await;
        self.shared.ledger.merge_sealed();
        self.shared.ledger.refuse_flushes(FlushRefused::Stopping);
        self.upkeep.finish(&self.capture).await;
        self.shared.stopped();
    }

    /// The other site may write: guests here may not, unless the user wants it so. A disk that was being given back stays what it is.
    fn fenced(&mut self, generation: Generation) {
        let stopped = |record: &mut crate::record::Recorded| {
            let given = matches!(record.stopped, Some(Stopped::Handback { .. }));
            record.stopped = record.stopped.filter(|_| given).or(Some(Stopped::Fenced(generation)));
        };
        if let Err(error) = self.record.update(stopped) {
            tracing::error!(group = %self.shared.group, %error, "that the group is fenced is not recorded; a restart asks the receiver again");
        }
        if self.shared.tuning.writes_when_fenced {
            tracing::error!(group = %self.shared.group, "fenced, and guests go on writing, as configured: nothing of that is replicated");
        } else {
            self.shared.gate.close(Closed::Fenced);
        }
    }

    /// The receiver has let us in: guests may write, unless a handback holds them up.
    fn admitted(&mut self) -> Result<(), RecordError> {
        if !self.shared.handing.load(Ordering::SeqCst) {
            self.record.update(|record| record.stopped = None)?;
            self.shared.gate.open();
        }
        Ok(())
    }

    /// Says that all is committed, if the receiver waits for that and it is so.
    fn tell_drained(&mut self) {
        let Some(point) = self.core.committed().filter(|_| self.draining && self.core.follows()) else { return };
        if self.shared.ledger.is_quiet() && self.shared.ledger.summary().uncommitted_bytes == 0 {
            self.draining = false;
            reach(Step::SwitchoverCommitted);
            if let Err(error) = self.outbox.mark(Item::Drained(point)) {
                tracing::warn!(group = %self.shared.group, %error, "the receiver is not told that all is committed");
            }
        }
    }

    async fn obey(&mut self, order: Order) {
        match order {
            Order::Park(done) => {
                self.disconnect("a handback begins").await;
                self.give_up().await;
                self.shared.ledger.merge_sealed();
                self.core.park();
                self.draining = false;
                // Whoever asked may be gone.
                let _ = done.send(());
            }
            Order::Begin { generation, ours } => {
                self.shared.ledger.accept_flushes();
                self.core.begin(Instant::now(), generation, ours);
                self.outbox.close();
                self.outbox = new_outbox(&self.shared);
            }
        }
    }

    async fn next_event(&mut self) -> Result<Option<Event>, EndError> {
        let now = Instant::now();
        let load = self.load();
        let mut deadline = self.core.deadline(now, load.flush_waits);
        let stop_at = *self.stop.borrow();
        if let Some(stop_at) = stop_at {
            let left = self.shared.ledger.summary();
            let idle = left.uncommitted_bytes == 0 && left.suspect_bytes == 0;
            if idle || now >= stop_at || self.live.is_none() {
                return Ok(None);
            }
            deadline = deadline.min(now + STOP_LOOK);
        }
        let hurry = self.draining || self.shared.hurry.load(Ordering::SeqCst);
        if hurry {
            deadline = deadline.min(now + STOP_LOOK);
        }
        // A timer would round up to the next millisecond. The core moves its deadline on with every tick, so this is no loop.
        if load.flush_waits && deadline <= now {
            return Ok(Some(Event::Tick(load)));
        }
        let (messages, connection) = match &mut self.live {
            Some(live) => (Some(&mut live.messages), Some(live.connection.clone())),
            None => (None, None),
        };
        tokio::select! {
            biased;
            message = async { messages.expect("guarded").recv().await }, if messages.is_some() => match message {
                Some(Ok(message)) => Ok(Some(self.said(message))),
                Some(Err(error)) => Err(self.why_ended(error)),
                None => Err(self.why_ended(ControlError::Ended)),
            },
            done = async { (&mut self.capturing.as_mut().expect("guarded").done).await }, if self.capturing.is_some() => {
                let kind = self.capturing.take().map(|c| c.kind);
                self.pass_ended(done, kind)
            }
            done = async { (&mut self.comparing.as_mut().expect("guarded").done).await }, if self.comparing.is_some() => {
                self.comparing = None;
                match done {
                    Ok(Ok(())) => Ok(Some(Event::Compared)),
                    Ok(Err(error)) => Err(error.into()),
                    Err(_) => Err(CaptureError::Stopped.into()),
                }
            }
            done = async { (&mut self.scrubbing.as_mut().expect("guarded").done).await }, if self.scrubbing.is_some() => {
                self.scrubbing = None;
                // It ends by itself only when it fails.
                Err(done.ok().and_then(Result::err).unwrap_or(CaptureError::Stopped).into())
            }
            () = self.upkeep.due() => {
                self.upkeep.begin(&self.capture);
                Ok(Some(Event::Tick(load)))
            }
            connected = async { self.connecting.as_mut().expect("guarded").await }, if self.connecting.is_some() => {
                self.connecting = None;
                match connected {
                    Ok(Ok((endpoint, connection))) => { self.open(endpoint, connection).await?; Ok(Some(self.connected())) }
                    Ok(Err(error)) => Err(error.into()),
                    Err(_) => Err(ControlError::Ended.into()),
                }
            }
            error = async { connection.as_ref().expect("guarded").closed().await }, if connection.is_some() => {
                // What the receiver said last counts more than that it hung up.
                if let Some(live) = &mut self.live
                    && let Some(Ok(message)) = live.messages.recv().await
                {
                    return Ok(Some(self.said(message)));
                }
                Err(self.link.explain(error).into())
            }
            changed = self.stop.changed(), if stop_at.is_none() => {
                if changed.is_err() { return Ok(None) }
                Ok(Some(Event::Tick(load)))
            }
            Some(order) = self.orders.recv() => {
                self.obey(order).await;
                Ok(Some(Event::Tick(load)))
            }
            // The next turn sees that a flush waits.
            () = self.shared.ledger.flush_wanted() => Ok(Some(Event::Tick(load))),
            () = tokio::time::sleep_until(deadline.into()) => {
                let load = self.load();
                Ok(Some(if stop_at.is_some() || hurry { Event::Hurry(load) } else { Event::Tick(load) }))
            }
        }
    }

    fn said(&self, message: Message) -> Event {
        Event::said(message, |next, staged| self.outbox.continues(next, staged))
    }

    fn why_ended(&self, error: ControlError) -> EndError {
        match (&self.live, error) {
            (Some(live), ControlError::Ended) => match live.connection.close_reason() {
                Some(reason) => self.link.explain(reason).into(),
                None => ControlError::Ended.into(),
            },
            (_, error) => error.into(),
        }
    }

    fn pass_ended(
        &mut self,
        done: Result<(Result<u64, CaptureError>, Box<Tally>), oneshot::error::RecvError>,
        kind: Option<PassKind>,
    ) -> Result<Option<Event>, EndError> {
        match done {
            Ok((Ok(cut_unix_us), tally)) => {
                self.tally = Some(tally);
                if kind == Some(PassKind::Frozen) {
                    self.cut_unix_us = cut_unix_us;
                }
                Ok(Some(Event::PassDone(self.load())))
            }
            Ok((Err(error), _)) => Err(error.into()),
            Err(_) => Err(CaptureError::Stopped.into()),
        }
    }

    fn load(&self) -> Load {
        Load {
            open_bytes: self.shared.ledger.open_bytes(),
            queued_bytes: self.outbox.unsent_bytes(),
            flush_waits: self.shared.ledger.flush_wants_cut(),
        }
    }

    async fn perform(&mut self, action: Action) -> Result<(), EndError> {
        match action {
            Action::Connect => {
                let link = self.link.clone();
                self.connecting = Some(tokio::spawn(async move { link.connect().await }));
            }
            Action::Send(message) => self.send(&message).await?,
            Action::Record { generation, ours, forget_cleared } => {
                self.record.update(|record| {
                    record.generation = generation;
                    record.set_ours(ours);
                    record.cleared = record.cleared.filter(|_| !forget_cleared);
                })?;
                self.core.recorded(ours);
                self.admitted()?;
            }
            Action::Committed(point) => {
                self.outbox.committed(point.epoch);
                self.shared.committed_now();
                self.shared.ledger.committed(point);
            }
            Action::Staged { epoch, frames } => self.outbox.staged(epoch, frames)?,
            Action::Resume { epoch, frames } => {
                self.admitted()?;
                tracing::info!(group = %self.shared.group, %epoch, frames, "going on where the last connection broke");
                self.outbox.resume(epoch, frames);
                self.shared.ledger.follow(self.core.generation(), self.core.newest_sealed());
                self.start_sender();
            }
            Action::GiveUp => self.give_up().await,
            Action::Merge => {
                self.give_up().await;
                let merged = self.shared.ledger.merge_sealed() as u64;
                self.shared.epochs_merged.fetch_add(merged, Ordering::Relaxed);
            }
            Action::MarkAll => {
                tracing::info!(group = %self.shared.group, "the receiver has no copy; everything is sent");
                self.shared.ledger.mark_all();
            }
            Action::MarkFirst => self.shared.ledger.mark_first(),
            Action::SuspectAll => {
                tracing::warn!(group = %self.shared.group, "the copy is not the one this node knew; everything is compared");
                self.shared.ledger.suspect_all();
                let log = self.shared.log.clone();
                self.capture.call(move || async move { log.cover_all().await }).await.flatten()?;
            }
            Action::Compare => {
                self.shared.ledger.follow(self.core.generation(), self.core.newest_sealed());
                self.begin_comparison();
            }
            Action::Answer(hashes) => {
                let taken = self.comparing.as_ref().map(|c| c.answers.try_send(hashes));
                if taken.is_none_or(|taken| taken.is_err()) {
                    return Err(CaptureError::Stopped.into());
                }
            }
            Action::Scrubbed(answer) => {
                let taken = self.scrubbing.as_ref().map(|s| s.answers.try_send(answer));
                if taken.is_none_or(|taken| taken.is_err()) {
                    return Err(CaptureError::Stopped.into());
                }
            }
            Action::BeginPass { epoch, pass, kind } => {
                self.begin_pass(PassHeader { epoch, pass, kind, continued: false });
            }
            Action::Seal { epoch, generation, passes } => self.seal(epoch, generation, passes)?,
            Action::Drain => {
                tracing::warn!(group = %self.shared.group, "the other site takes over: no more writes are taken here");
                reach(Step::SwitchoverAsked);
                self.record.update(|record| record.stopped = Some(Stopped::Drained))?;
                reach(Step::SwitchoverRecorded);
                self.shared.gate.close(Closed::Drained);
                self.draining = true;
            }
            Action::RefuseFlushes => self.shared.ledger.refuse_flushes(FlushRefused::Fenced),
            Action::Disconnect => self.disconnect("the session is over").await,
        }
        Ok(())
    }

    async fn send(&mut self, message: &Message) -> Result<(), EndError> {
        let Some(live) = &mut self.live else { return Ok(()) };
        if let Some(control) = &mut live.control
            && control.write_all(&message.encode()).await.is_err()
        {
            return Err(self.why_ended(ControlError::Ended));
        }
        Ok(())
    }

    /// The hello was the last message that this task sends itself; from here on the sender owns the stream.
    fn start_sender(&mut self) {
        if let Some(live) = &mut self.live
            && let Some(control) = live.control.take()
        {
            let outbox = (self.outbox.clone(), self.outbox.attach());
            let sending = send_items(live.connection.clone(), control, outbox, self.shared.clone());
            live.sender = Some(tokio::spawn(sending));
        }
    }

    /// Opens the control stream of a new connection.
    async fn open(&mut self, endpoint: Endpoint, connection: Connection) -> Result<(), EndError> {
        let (control, mut incoming) = connection.open_bi().await.map_err(|e| self.link.explain(e))?;
        // As many commits as epochs can be in flight; a receiver that sends more than it was asked for waits.
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
        self.live = Some(Live { _endpoint: endpoint, connection, control: Some(control), messages, sender: None });
        Ok(())
    }

    fn begin_pass(&mut self, header: PassHeader) {
        let mut tally = match self.tally.take() {
            Some(tally) if header.pass > 0 => tally,
            _ => Box::default(),
        };
        let (done, receiver) = oneshot::channel();
        let (shared, queue) = (self.shared.clone(), self.outbox.clone());
        let (devices, spill) = (self.scanners.clone(), self.spill.clone());
        self.pass = Some(header);
        self.shared.pass_begins();
        self.capture.spawn(move || async move {
            let pass = Pass {
                ledger: &shared.ledger,
                devices: &devices,
                spill: &*spill,
                queue: &queue,
                counters: &shared.counters,
                header,
                compressor: Compressor::new(shared.tuning.codec),
                interval: shared.tuning.interval,
                tally: &mut tally,
            };
            let result = pass.run(|| shared.cut_unix_us()).await;
            // The driver may be gone: then nobody needs the result.
            let _ = done.send((result, tally));
        });
        self.capturing = Some(Capturing { done: receiver, kind: header.kind });
    }

    fn connected(&self) -> Event {
        Event::Connected { session: SessionToken(rand::random()), cleared: self.record.get().cleared }
    }

    fn begin_comparison(&mut self) {
        self.start_sender();
        let (done, receiver) = oneshot::channel();
        let (sender, answers) = mpsc::channel(proto::hashes::QUERIES_IN_FLIGHT_MAX);
        let (shared, queue, devices) = (self.shared.clone(), self.outbox.clone(), self.scanners.clone());
        let suspect = shared.ledger.suspect_bytes();
        if suspect > 0 {
            tracing::info!(group = %shared.group, bytes = suspect, "comparing what may differ from the copy");
        }
        self.capture.spawn(move || async move {
            let compare =
                Compare { ledger: &shared.ledger, devices: &devices, queue: &queue, answers, counters: &shared.compared };
            // The driver may be gone: then nobody needs the result.
            let _ = done.send(compare.run().await);
        });
        self.comparing = Some(Comparing { done: receiver, answers: sender });
    }

    fn begin_scrub(&mut self) {
        let (done, receiver) = oneshot::channel();
        let (sender, answers) = mpsc::channel(proto::scrub::SCRUBS_IN_FLIGHT_MAX);
        let (shared, queue, devices) = (self.shared.clone(), self.outbox.clone(), self.scanners.clone());
        self.capture.spawn(move || async move {
            let scrub =
                Scrub { ledger: &shared.ledger, log: &shared.log, devices: &devices, queue: &queue, board: &shared.scrub };
            // The driver may be gone: then nobody needs the result.
            let _ = done.send(scrub.run(answers).await);
        });
        self.scrubbing = Some(Scrubbing { done: receiver, answers: sender });
    }

    fn seal(&mut self, epoch: EpochId, generation: Generation, passes: u32) -> Result<(), EndError> {
        let Some(tally) = self.tally.take() else { return Ok(()) };
        let first_write_unix_us = self
            .shared
            .ledger
            .building_first_write()
            .map_or(0, |first| now_unix_us().saturating_sub(u64::try_from(first.elapsed().as_micros()).unwrap_or(u64::MAX)));
        self.shared.ledger.seal(epoch);
        self.pass = None;
        let seal = Seal {
            passes,
            epoch,
            generation,
            cut_unix_us: self.cut_unix_us,
            frames: tally.frames,
            frame_bytes: tally.frame_bytes,
            data_blocks: tally.data_blocks,
            zero_blocks: tally.zero_blocks,
            first_write_unix_us,
            session: self.core.session(),
            digest: tally.digest(),
        };
        Ok(self.outbox.mark(Item::Seal(Box::new(seal)))?)
    }

    /// Reports the end of a session and returns what the core is to hear.
    async fn lost(&mut self, error: EndError) -> Event {
        self.draining = false;
        self.shared.report(&error.to_string());
        self.disconnect("the session failed").await;
        Event::Lost { jitter: rand::random::<f64>(), refused: error.is_refusal(), resumes: error.resumes() }
    }

    /// Ends the connection, and the scrub with it, whose questions are of this connection. Capture goes on.
    async fn disconnect(&mut self, reason: &str) {
        if let Some(Scrubbing { done, answers }) = self.scrubbing.take() {
            drop(answers);
            // However it ended: what is not answered is asked again.
            let _ = done.await;
        }
        if let Some(connecting) = self.connecting.take() {
            connecting.abort();
        }
        if let Some(live) = self.live.take() {
            link::close(&live.connection, CloseCode::Stopping, reason);
        }
    }

    /// Waits for a pass or a comparison whose outbox is closed to notice, then gives the epoch up.
    async fn give_up(&mut self) {
        self.outbox.close();
        self.outbox = new_outbox(&self.shared);
        if let Some(Comparing { done, answers }) = self.comparing.take() {
            drop(answers);
            // As below.
            let _ = done.await;
        }
        if let Some(capturing) = self.capturing.take() {
            // An error means that the capture thread is gone, and the pass with it.
            let _ = capturing.done.await;
        }
        self.tally = None;
        self.pass = None;
        if self.shared.ledger.give_up_building() {
            self.shared.epochs_merged.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn new_outbox(shared: &Shared) -> Outbox {
    Outbox::new(usize::try_from(shared.tuning.freeze_budget_bytes).unwrap_or(usize::MAX))
}

/// Sends what the outbox has, in order: passes on streams of their own, seals on the control stream. Ends with the connection,
/// which the driver notices by itself, or with the outbox.
async fn send_items(connection: Connection, mut control: SendStream, (outbox, number): (Outbox, u64), shared: Arc<Shared>) {
    let mut stream: Option<SendStream> = None;
    let mut bucket = Bucket::new(Instant::now());
    while let Some(item) = outbox.next(number).await {
        let sent = match item {
            Item::Begin(header) => match connection.open_uni().await {
                Ok(mut opened) => {
                    let written = opened.write_all(&header.encode()).await.is_ok();
                    stream = Some(opened);
                    written
                }
                Err(_) => false,
            },
            Item::Frame(bytes) => {
                let Some(stream) = &mut stream else { return };
                let length = bytes.len() as u64;
                while let Err(wait) = bucket.take(Instant::now(), bytes.len(), shared.tuning.rate.limit_now()) {
                    tokio::time::sleep(wait).await;
                }
                let written = stream.write_chunk(bytes).await.is_ok();
                shared.sent_bytes.fetch_add(length, Ordering::Relaxed);
                written
            }
            Item::End => stream.take().is_some_and(|mut s| s.finish().is_ok()),
            Item::Query(query) => control.write_all(&Message::HashQuery(query).encode()).await.is_ok(),
            Item::Scrub(scrub) => control.write_all(&Message::Scrub(*scrub).encode()).await.is_ok(),
            Item::Drained(point) => control.write_all(&Message::Drained { point }.encode()).await.is_ok(),
            Item::Seal(seal) => control.write_all(&Message::Seal(*seal).encode()).await.is_ok(),
        };
        if !sent {
            return;
        }
    }
    // The control stream stays open as long as the session: dropping it here would end it for the receiver.
    connection.closed().await;
}

/// While stopping, how often to look whether everything is committed.
const STOP_LOOK: Duration = Duration::from_millis(10);
