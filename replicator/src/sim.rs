//! A primary without threads, sockets and clock, for the simulator: the real core, ledger, tap, dirty log, capture and comparison,
//! driven one step at a time.
//!
//! Owns what `session` owns in the daemon. Disks, logs and the record belong to the caller, who may lose power at any step by dropping
//! the primary. Nothing here sleeps or reads a clock; tasks are polled when [`Primary::poll`] is called, in an order that the caller's
//! random numbers decide.

mod handback;
mod parts;

use std::cell::Cell;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use blockdev::BlockDevice;
use proto::control::VolumeHello;
use proto::pass::{PassHeader, PassKind};
use proto::seal::Tally;
use proto::{Codec, EpochId, Generation, Hashes, Message, Name, Point, Scrubbed, Seal, SessionToken};
use tokio::sync::mpsc;

use crate::capture::{CaptureCounters, CaptureError, Pass};
use crate::compare::{Compare, CompareCounters};
use crate::compress::Compressor;
use crate::core::{Action, Core, CoreConfig, Event, Load, Phase, SessionError};
use crate::dirtylog::{DirtyLog, LogFile};
use crate::gate::{Closed, Gate};
use crate::ledger::{CopyLimits, FlushRefused, Ledger};
use crate::outbox::{Item, Outbox};
use crate::record::Stopped;
use crate::scrub::{Board, Scrub};
use crate::tap::Tap;
use crate::upkeep;
pub use handback::HandbackEnd;
use handback::Handing;
pub use parts::{Disks, DurableRecord, Output, PrimaryConfig};

/// Room for a frame beside what the simulated receiver has not said it has.
const OUTBOX_BYTES_MIN: usize = proto::frame::FRAME_BYTES_MAX + (64 << 10);

/// Bytes of the dirty log of a volume.
#[must_use]
pub fn dirty_log_bytes(volume_bytes: u64) -> u64 {
    crate::dirtylog::log_bytes(volume_bytes)
}

/// A rule that the simulator breaks on purpose, to see that it notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// Marks are forgotten when an epoch is sent, not when it is committed.
    ClearOnSend,
    /// A guest write overtakes the capture of what it overwrites.
    SkipCopyBeforeWrite,
    /// A write is issued although its region is not in the dirty log.
    SkipDirtyLog,
    /// A flush that is to wait for the receiver is answered by the local disk alone.
    AnswerFlushEarly,
    /// What was written of its own is overwritten before the receiver keeps it.
    OverwriteBeforeKept,
    /// Guests are let in before the receiver has handed the disks over.
    OpenGateEarly,
}

thread_local! {
    static SABOTAGE: Cell<Option<Sabotage>> = const { Cell::new(None) };
    static ADMITTED: Cell<u64> = const { Cell::new(0) };
    static LINGERS: Cell<u64> = const { Cell::new(0) };
}

/// Breaks a rule in all primaries of this thread, or none.
pub fn sabotage(rule: Option<Sabotage>) {
    SABOTAGE.set(rule);
}

/// Whose tag [`admitted`] tells: the simulator sets it before it polls an operation, 0 for none.
pub fn set_admitted(tag: u64) {
    ADMITTED.set(tag);
}

/// The tag under which this thread's operation was admitted last. A change that waited for the dirty log is admitted again.
#[must_use]
pub fn admitted() -> u64 {
    ADMITTED.get()
}

/// From now on changes that wait for the dirty log take 0 to 15 polls more, twice, as `seed` decides. 0: none.
pub fn set_lingers(seed: u64) {
    LINGERS.set(seed);
}

pub(crate) async fn linger() {
    // xorshift64 (Marsaglia 2003).
    let mut next = LINGERS.get();
    next ^= next << 13;
    next ^= next >> 7;
    next ^= next << 17;
    LINGERS.set(next);
    for _ in 0..next >> 60 {
        let mut waited = false;
        std::future::poll_fn(|context| {
            context.waker().wake_by_ref();
            if std::mem::replace(&mut waited, true) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

pub(crate) fn is_sabotaged(rule: Sabotage) -> bool {
    SABOTAGE.get() == Some(rule)
}

enum Done {
    Pass(Result<u64, CaptureError>, Box<Tally>),
    Compared(Result<(), CaptureError>),
    Upkeep,
    Scrub(Result<(), CaptureError>),
    HandbackCompared(Result<(), CaptureError>),
    OwnSent(std::io::Result<()>),
    Applied(std::io::Result<u64>),
}

/// What a task ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Connection,
    Epoch,
    Handback,
}

struct Task {
    owner: Owner,
    /// It writes what a handback brings.
    writes: bool,
    future: Pin<Box<dyn Future<Output = Done>>>,
}

/// A primary, stepped by hand.
pub struct Primary {
    core: Core,
    ledger: Arc<Ledger>,
    log: Arc<DirtyLog>,
    disks: Disks,
    taps: Vec<Arc<dyn BlockDevice>>,
    /// As the taps, for what a handback brings: nothing holds it up.
    inner: Vec<Arc<dyn BlockDevice>>,
    gate: Arc<Gate>,
    handing: Option<Box<Handing>>,
    /// The receiver waits for the word that all is committed.
    draining: bool,
    /// Epochs are cut as fast as they can be.
    hurry: bool,
    group: Name,
    hellos: Vec<VolumeHello>,
    record: Arc<parking_lot::Mutex<DurableRecord>>,
    counters: Arc<CaptureCounters>,
    compared: Arc<CompareCounters>,
    board: Arc<Board>,
    limit_bytes: usize,
    interval: Duration,
    tasks: Vec<Task>,
    live: Option<Live>,
    outbox: Outbox,
    tally: Option<Box<Tally>>,
    pass: Option<PassHeader>,
    /// Tag of the epoch that is being frozen.
    frozen_tag: Option<u64>,
    outputs: VecDeque<Output>,
    /// Bytes that the network takes now.
    room: usize,
    epochs_in_flight_max: u64,
}

/// A connection. Nothing is sent before its welcome.
#[derive(Default)]
struct Live {
    answers: Option<mpsc::Sender<Hashes>>,
    control: Vec<u8>,
    sends: bool,
}

fn poll<T>(future: &mut Pin<Box<dyn Future<Output = T> + '_>>) -> Poll<T> {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

/// Runs a future whose disks answer after a bounded number of polls.
fn finish<T>(future: impl Future<Output = T>) -> T {
    let mut future: Pin<Box<dyn Future<Output = T> + '_>> = Box::pin(future);
    for _ in 0..1_000_000 {
        if let Poll::Ready(value) = poll(&mut future) {
            return value;
        }
    }
    panic!("a disk never answers");
}

impl Primary {
    /// Starts a primary on what a former one left.
    ///
    /// # Errors
    /// One line, if a log cannot be used.
    pub fn start(
        config: PrimaryConfig,
        disks: Disks,
        record: Arc<parking_lot::Mutex<DurableRecord>>,
        now: Instant,
    ) -> Result<Self, String> {
        let sizes: Vec<u64> = disks.volumes.iter().map(|d| d.size()).collect();
        let files = disks.logs.iter().zip(&sizes).enumerate().map(|(i, (device, volume_bytes))| LogFile {
            name: format!("volume {i}"),
            device: device.clone(),
            volume_bytes: *volume_bytes,
        });
        let (log, known) = finish(DirtyLog::open(files.collect())).map_err(|e| e.to_string())?;
        let log = Arc::new(log);
        let limits = CopyLimits { memory_bytes: config.freeze_budget_bytes, spill_bytes: config.spill_limit_bytes };
        let ledger = Arc::new(Ledger::new(sizes.clone(), limits, known));
        let tap =
            |(i, d): (usize, &Arc<dyn BlockDevice>)| Tap::new(d.clone(), ledger.clone(), log.clone(), disks.spill.clone(), i);
        let gate: Arc<Gate> = Arc::default();
        let inner = disks.volumes.iter().enumerate().map(tap).map(|tap| Arc::new(tap) as Arc<dyn BlockDevice>).collect();
        let gated = |tap: Tap| tap.with_durability(config.durability).with_gate(gate.clone());
        let taps = disks.volumes.iter().enumerate().map(tap).map(|tap| Arc::new(gated(tap)) as Arc<dyn BlockDevice>).collect();
        let volumes: Vec<(Name, u64)> = config.volumes.into_iter().zip(sizes).collect();
        let board = Arc::new(Board::new(config.group.clone(), &volumes, None, 0, now));
        let hellos: Vec<_> = volumes.into_iter().map(|(name, size_bytes)| VolumeHello { name, size_bytes }).collect();
        let core_config = CoreConfig {
            group: config.group.clone(),
            volumes: hellos.clone(),
            interval: config.interval,
            freeze_budget_bytes: config.freeze_budget_bytes,
            epochs_in_flight: config.epochs_in_flight,
        };
        let recorded = record.lock().newest.clone();
        let mut core = Core::new(core_config.clone(), recorded.generation, recorded.ours(), now);
        if let Some(why) = recorded.stopped.and_then(|stopped| stopped.holds_up(false)) {
            gate.close(why);
        }
        if let Some(Stopped::Handback { .. }) = recorded.stopped {
            // Nothing is replicated until the handback is repeated.
            core.park();
        }
        let limit_bytes = usize::try_from(config.freeze_budget_bytes).unwrap_or(usize::MAX).max(OUTBOX_BYTES_MIN);
        Ok(Self {
            epochs_in_flight_max: core_config.epochs_in_flight.into(),
            room: usize::MAX,
            core,
            taps,
            inner,
            gate,
            handing: None,
            draining: false,
            hurry: false,
            group: config.group,
            hellos,
            ledger,
            log,
            disks,
            record,
            counters: Arc::default(),
            compared: Arc::default(),
            board,
            outbox: Outbox::with_limit(limit_bytes),
            limit_bytes,
            interval: config.interval,
            tasks: Vec::new(),
            live: None,
            tally: None,
            pass: None,
            frozen_tag: None,
            outputs: VecDeque::new(),
        })
    }

    /// The tapped disk of a volume, for the guest.
    #[must_use]
    pub fn volume(&self, volume: usize) -> Arc<dyn BlockDevice> {
        self.taps[volume].clone()
    }

    /// The tag that a write gets which is admitted now: a sealed epoch holds the writes up to its tag.
    #[must_use]
    pub fn tag(&self) -> u64 {
        self.ledger.tag()
    }

    /// Bytes that are not known to be at the receiver.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        let summary = self.ledger.summary();
        summary.uncommitted_bytes + summary.suspect_bytes
    }

    /// Bytes compared with the copy, and bytes of them that differed.
    #[must_use]
    pub fn compared_bytes(&self) -> (u64, u64) {
        let load = |c: &std::sync::atomic::AtomicU64| c.load(std::sync::atomic::Ordering::Relaxed);
        (load(&self.compared.compared_bytes), load(&self.compared.differing_bytes))
    }

    /// Bytes scrubbed, and bytes of them that differed.
    #[must_use]
    pub fn scrubbed_bytes(&self, now: Instant) -> (u64, u64) {
        let status = self.board.status(now);
        (status.compared_bytes, status.differing_bytes)
    }

    /// Whether another side may write now.
    #[must_use]
    pub fn is_fenced(&self) -> bool {
        matches!(self.core.phase(), Phase::Fenced) && self.gate.closed() != Some(Closed::Handback)
    }

    /// Whether guests may change the disks.
    #[must_use]
    pub fn takes_writes(&self) -> bool {
        self.gate.closed().is_none()
    }

    /// Whether it follows the guest, and all is known.
    #[must_use]
    pub fn follows(&self) -> bool {
        self.core.follows()
    }

    /// Where it stands, for a trace.
    #[must_use]
    pub fn phase(&self) -> &'static str {
        match self.core.phase() {
            _ if self.handing.is_some() => "handback",
            Phase::Waiting { .. } => "waiting",
            Phase::Connecting => "connecting",
            Phase::Greeting { .. } => "greeting",
            Phase::Streaming(_) if self.core.comparing() => "comparing",
            Phase::Streaming(_) => "streaming",
            Phase::Fenced => "fenced",
        }
    }

    /// What it keeps, by name, and the limits of that.
    #[must_use]
    pub fn bounds(&self) -> [(&'static str, u64, u64); 4] {
        let (copies, limits) = (self.ledger.summary(), self.ledger.copy_limits());
        [
            ("bytes of frames that may have to be sent", self.outbox.held_bytes(), self.outbox.limit_bytes()),
            ("bytes of copies in memory", copies.copied_bytes, limits.memory_bytes),
            ("bytes of the spill file", copies.spilled_bytes, limits.spill_bytes),
            ("epochs in flight", self.core.in_flight() as u64, self.epochs_in_flight_max),
        ]
    }

    /// The network takes so many bytes of frames now; what is beyond waits in the queue, and capture with it.
    pub fn set_room(&mut self, bytes: usize) {
        self.room = bytes;
        self.collect();
    }

    /// When the core wants to be told the time at the latest.
    #[must_use]
    pub fn deadline(&self, now: Instant) -> Instant {
        self.core.deadline(now, self.ledger.flush_wants_cut())
    }

    /// What it did since this was asked last.
    pub fn outputs(&mut self) -> Vec<Output> {
        self.outputs.drain(..).collect()
    }

    /// Time passed.
    pub fn tick(&mut self, now: Instant) {
        let load = self.load();
        self.handle(now, if self.draining || self.hurry { Event::Hurry(load) } else { Event::Tick(load) });
        self.handback_looks(now);
    }

    /// The connection that it wanted stands.
    pub fn connected(&mut self, now: Instant, session: SessionToken) {
        if self.handback_line().is_some() {
            return self.handback_connected(now);
        }
        self.live = Some(Live::default());
        let cleared = self.record.lock().newest.cleared;
        self.handle(now, Event::Connected { session, cleared });
    }

    /// The connection is gone, or could not be made. `jitter` is uniform in 0..1.
    pub fn lost(&mut self, now: Instant, jitter: f64, refused: bool) {
        if self.handback_line().is_some() {
            return self.handback_lost(now);
        }
        self.draining = false;
        self.disconnect();
        self.handle(now, Event::Lost { jitter, refused, resumes: true });
    }

    /// Bytes of the control stream, in pieces of any size.
    pub fn control(&mut self, now: Instant, bytes: &[u8]) {
        if self.handback_line().is_some() {
            return self.handback_control(now, bytes);
        }
        let Some(live) = &mut self.live else { return };
        live.control.extend_from_slice(bytes);
        while let Some(live) = &mut self.live {
            let Some((prefix, rest)) = live.control.split_first_chunk::<4>() else { return };
            let length = Message::check_length(*prefix).expect("the receiver keeps the rules");
            let Some(body) = rest.get(..length) else { return };
            let message = Message::decode(body).expect("the receiver keeps the rules");
            live.control.drain(..4 + length);
            let event = Event::said(message, |next, staged| self.outbox.continues(next, staged));
            self.handle(now, event);
        }
    }

    /// Polls one of its tasks, the one that `choose` picks out of so many.
    pub fn poll(&mut self, now: Instant, choose: impl FnOnce(usize) -> usize) {
        if self.tasks.is_empty() {
            return self.handback_looks(now);
        }
        let index = choose(self.tasks.len());
        let before = self.ledger.tag();
        let polled = poll(&mut self.tasks[index].future);
        if self.pass.is_some_and(|p| p.kind == PassKind::Frozen) && self.ledger.tag() > before {
            self.frozen_tag = Some(before);
        }
        self.collect();
        self.handback_collect();
        let Poll::Ready(done) = polled else { return self.handback_looks(now) };
        drop(self.tasks.swap_remove(index));
        match done {
            Done::HandbackCompared(done) => self.handback_compared(now, done),
            Done::OwnSent(done) => self.handback_sent(now, done),
            Done::Applied(done) => self.handback_applied(now, done),
            Done::Pass(Ok(_), tally) => {
                self.tally = Some(tally);
                let load = self.load();
                self.handle(now, Event::PassDone(load));
            }
            Done::Compared(Ok(())) => self.handle(now, Event::Compared),
            Done::Scrub(Ok(())) => {}
            Done::Pass(Err(CaptureError::Stopped), _)
            | Done::Compared(Err(CaptureError::Stopped))
            | Done::Scrub(Err(CaptureError::Stopped))
            | Done::Upkeep => {}
            Done::Pass(Err(error @ (CaptureError::Answer { .. } | CaptureError::ScrubAnswer { .. })), _)
            | Done::Compared(Err(error @ (CaptureError::Answer { .. } | CaptureError::ScrubAnswer { .. })))
            | Done::Scrub(Err(error @ (CaptureError::Answer { .. } | CaptureError::ScrubAnswer { .. }))) => {
                panic!("{error}")
            }
            Done::Pass(Err(error), _) | Done::Compared(Err(error)) | Done::Scrub(Err(error)) => {
                self.session_fails(now, error.to_string());
            }
        }
    }

    /// Ends the session by itself.
    fn session_fails(&mut self, now: Instant, why: String) {
        self.disconnect();
        self.outputs.extend([Output::Trouble(why), Output::Disconnect]);
        self.handle(now, Event::Lost { jitter: 0.0, refused: false, resumes: false });
    }

    /// Starts a round of upkeep of the dirty log.
    pub fn upkeep(&mut self) {
        let (log, ledger, record) = (self.log.clone(), self.ledger.clone(), self.record.clone());
        let devices = self.disks.volumes.clone();
        self.spawn(Owner::Epoch, async move {
            let cleared = |point: Option<Point>| {
                record.lock().change(|r| r.cleared = r.cleared.max(point));
                Ok(())
            };
            // A disk that lost its power answers with errors; the caller knows.
            let _ = upkeep::forget_clean(&log, &ledger, &devices, cleared).await;
            Done::Upkeep
        });
    }

    /// Compares the next blocks with the copy, if one follows.
    pub fn scrub(&mut self, now: Instant) {
        if self.core.follows() {
            self.begin_scrub(now, None);
        }
    }

    /// A step of the scrub, or what an answer to it asks for.
    fn begin_scrub(&mut self, now: Instant, answer: Option<Scrubbed>) {
        let (ledger, log, devices) = (self.ledger.clone(), self.log.clone(), self.disks.volumes.clone());
        let (queue, board) = (self.outbox.clone(), self.board.clone());
        self.spawn(Owner::Connection, async move {
            let scrub = Scrub { ledger: &ledger, log: &log, devices: &devices, queue: &queue, board: &board };
            Done::Scrub(match answer {
                Some(answer) => scrub.answered(answer, now).await,
                None => scrub.step(now).await,
            })
        });
    }

    /// A clean stop: the guest has stopped before.
    ///
    /// # Errors
    /// One line, if the log of a clean stop cannot be written; the next start then compares.
    pub fn stop(mut self) -> Result<(), String> {
        self.disconnect();
        self.give_up();
        self.ledger.merge_sealed();
        let record = self.record.clone();
        let cleared = |point: Option<Point>| {
            record.lock().change(|r| r.cleared = r.cleared.max(point));
            Ok(())
        };
        finish(upkeep::save(&self.log, &self.ledger, (&self.disks.volumes, &self.gate), cleared, || {
            self.handback_token().is_some()
        }))
        .map_err(|e| e.to_string())
    }

    fn spawn(&mut self, owner: Owner, future: impl Future<Output = Done> + 'static) {
        self.tasks.push(Task { owner, writes: false, future: Box::pin(future) });
    }

    fn disconnect(&mut self) {
        self.live = None;
        self.tasks.retain(|task| task.owner != Owner::Connection);
        self.board.session_over();
    }

    fn load(&self) -> Load {
        let flush_waits = self.ledger.flush_wants_cut();
        Load { open_bytes: self.ledger.open_bytes(), queued_bytes: self.outbox.unsent_bytes(), flush_waits }
    }

    fn handle(&mut self, now: Instant, event: Event) {
        let mut actions = Vec::new();
        let failed = self.core.handle(now, event, &mut actions).err();
        if let Some(SessionError::Fenced { generation }) = &failed {
            self.fenced(*generation);
        }
        let mut failed = failed.map(|error| (error.to_string(), error.resumes()));
        for action in actions {
            if let Err(why) = self.perform(now, action) {
                failed.get_or_insert((why, false));
                // What follows relies on it.
                break;
            }
        }
        if let Some((why, resumes)) = failed {
            self.draining = false;
            self.disconnect();
            self.outputs.extend([Output::Trouble(why), Output::Disconnect]);
            let mut actions = Vec::new();
            let lost = Event::Lost { jitter: 0.5, refused: false, resumes };
            let ended = self.core.handle(now, lost, &mut actions);
            debug_assert!(ended.is_ok());
            for action in actions {
                let ended = self.perform(now, action);
                debug_assert!(ended.is_ok(), "the end of a session needs no disk");
            }
        }
        self.tell_drained();
        self.collect();
    }

    /// The other site may write: guests here may not.
    fn fenced(&mut self, generation: Generation) {
        self.record.lock().change(|record| {
            let given = matches!(record.stopped, Some(Stopped::Handback { .. }));
            record.stopped = record.stopped.filter(|_| given).or(Some(Stopped::Fenced(generation)));
        });
        self.gate.close(Closed::Fenced);
    }

    /// The receiver has let it in: guests may write, unless a handback holds them up.
    fn admitted(&mut self) {
        if self.handing.is_none() {
            self.record.lock().change(|record| record.stopped = None);
            self.gate.open();
        }
    }

    /// Says that all is committed, if the receiver waits for that and it is so.
    fn tell_drained(&mut self) {
        let Some(point) = self.core.committed().filter(|_| self.draining && self.core.follows()) else { return };
        if self.ledger.is_quiet() && self.ledger.summary().uncommitted_bytes == 0 {
            self.draining = false;
            self.outbox.mark(Item::Drained(point)).expect("the outbox of a session under way is open");
        }
    }

    fn perform(&mut self, now: Instant, action: Action) -> Result<(), String> {
        match action {
            Action::Connect => self.outputs.push_back(Output::Connect),
            Action::Send(message) => self.outputs.push_back(Output::Control(message.encode())),
            Action::Record { generation, ours, forget_cleared } => {
                self.record.lock().change(|record| {
                    record.generation = generation;
                    record.set_ours(ours);
                    record.cleared = record.cleared.filter(|_| !forget_cleared);
                });
                self.core.recorded(ours);
                self.admitted();
            }
            Action::Committed(point) => {
                self.outbox.committed(point.epoch);
                self.ledger.committed(point);
                self.outputs.push_back(Output::Committed(point));
            }
            Action::Staged { epoch, frames } => {
                self.outbox.staged(epoch, frames).expect("the receiver has what it was sent");
            }
            Action::Resume { epoch, frames } => {
                self.admitted();
                self.outbox.resume(epoch, frames);
                self.ledger.follow(self.core.generation(), self.core.newest_sealed());
                self.start_sending();
            }
            Action::GiveUp => self.give_up(),
            Action::Merge => {
                self.give_up();
                self.ledger.merge_sealed();
            }
            Action::MarkAll => self.ledger.mark_all(),
            Action::MarkFirst => self.ledger.mark_first(),
            Action::SuspectAll => {
                self.ledger.suspect_all();
                let log = self.log.clone();
                finish(async move { log.cover_all().await }).map_err(|e| e.to_string())?;
            }
            Action::Compare => {
                self.ledger.follow(self.core.generation(), self.core.newest_sealed());
                self.begin_comparison();
            }
            Action::Answer(hashes) => {
                if let Some(answers) = self.live.as_ref().and_then(|l| l.answers.as_ref()) {
                    let _ = answers.try_send(hashes);
                }
            }
            Action::Scrubbed(answer) => self.begin_scrub(now, Some(answer)),
            Action::BeginPass { epoch, pass, kind } => {
                self.begin_pass(PassHeader { epoch, pass, kind, continued: false });
            }
            Action::Seal { epoch, generation, passes } => self.seal(epoch, generation, passes),
            Action::Drain => {
                self.record.lock().change(|record| record.stopped = Some(Stopped::Drained));
                self.gate.close(Closed::Drained);
                self.draining = true;
            }
            Action::RefuseFlushes => self.ledger.refuse_flushes(FlushRefused::Fenced),
            Action::Disconnect => {
                self.disconnect();
                self.outputs.push_back(Output::Disconnect);
            }
        }
        Ok(())
    }

    fn begin_comparison(&mut self) {
        let Some(live) = &mut self.live else { return };
        let (sender, answers) = mpsc::channel(proto::hashes::QUERIES_IN_FLIGHT_MAX);
        live.answers = Some(sender);
        self.start_sending();
        let (ledger, devices, queue) = (self.ledger.clone(), self.disks.volumes.clone(), self.outbox.clone());
        let counters = self.compared.clone();
        self.spawn(Owner::Epoch, async move {
            let compare = Compare { ledger: &ledger, devices: &devices, queue: &queue, answers, counters: &counters };
            Done::Compared(compare.run().await)
        });
    }

    fn start_sending(&mut self) {
        if let Some(live) = &mut self.live {
            live.sends = true;
        }
    }

    fn begin_pass(&mut self, header: PassHeader) {
        let mut tally = match self.tally.take() {
            Some(tally) if header.pass > 0 => tally,
            _ => Box::default(),
        };
        self.pass = Some(header);
        let (ledger, devices, spill) = (self.ledger.clone(), self.disks.volumes.clone(), self.disks.spill.clone());
        let (queue, counters, interval) = (self.outbox.clone(), self.counters.clone(), self.interval);
        self.spawn(Owner::Epoch, async move {
            let pass = Pass {
                ledger: &ledger,
                devices: &devices,
                spill: &*spill,
                queue: &queue,
                counters: &counters,
                header,
                compressor: Compressor::new(Codec::Lz4),
                interval,
                tally: &mut tally,
            };
            let result = pass.run(|| 0).await;
            Done::Pass(result, tally)
        });
    }

    fn seal(&mut self, epoch: EpochId, generation: Generation, passes: u32) {
        let Some(tally) = self.tally.take() else { return };
        self.ledger.seal(epoch);
        self.pass = None;
        let session = self.core.session();
        let seal = Seal {
            passes,
            epoch,
            generation,
            cut_unix_us: 0,
            frames: tally.frames,
            frame_bytes: tally.frame_bytes,
            data_blocks: tally.data_blocks,
            zero_blocks: tally.zero_blocks,
            first_write_unix_us: 0,
            session,
            digest: tally.digest(),
        };
        let tag = self.frozen_tag.take().expect("an epoch ends with a frozen pass");
        self.outputs.push_back(Output::Sealed { point: seal.point(), session, tag });
        self.outbox.mark(Item::Seal(Box::new(seal))).expect("the outbox of an epoch under way is open");
        if is_sabotaged(Sabotage::ClearOnSend) {
            self.ledger.committed(seal.point());
        }
    }

    /// Hands over what the queue holds, as much as the network takes; a last frame may go beyond that.
    fn collect(&mut self) {
        if !self.live.as_ref().is_some_and(|l| l.sends) {
            return;
        }
        while self.room > 0
            && let Some(item) = self.outbox.try_next()
        {
            let output = match item {
                Item::Begin(header) => {
                    self.outputs.push_back(Output::PassOpen);
                    Output::PassData(header.encode().to_vec())
                }
                Item::Frame(bytes) => {
                    self.room = self.room.saturating_sub(bytes.len());
                    Output::PassData(bytes.to_vec())
                }
                Item::End => Output::PassEnd,
                Item::Seal(seal) => Output::Control(Message::Seal(*seal).encode()),
                Item::Scrub(scrub) => Output::Control(Message::Scrub(*scrub).encode()),
                Item::Drained(point) => Output::Control(Message::Drained { point }.encode()),
                Item::Query(query) => Output::Control(Message::HashQuery(query).encode()),
            };
            self.outputs.push_back(output);
        }
    }

    /// Tasks are dropped where they stand: the same as waiting for them to notice that their outbox is closed.
    fn give_up(&mut self) {
        self.outbox.close();
        self.outbox = Outbox::with_limit(self.limit_bytes);
        self.tasks.retain(|task| task.owner == Owner::Handback);
        self.tally = None;
        self.pass = None;
        self.frozen_tag = None;
        self.ledger.give_up_building();
    }
}
