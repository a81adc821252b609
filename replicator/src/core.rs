//! What a primary does next, for one group: decides, never does.
//!
//! Events go in with the time, actions come out; sockets, disks and clocks live in the driver (`session`), so that the same
//! core runs in a simulator. States move by value; an event that its state does not permit ends the session with an error that
//! names both.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use proto::control::{CloseCode, Hello, Message, Staged, VERSION_MAX, VERSION_MIN, VolumeHello};
use proto::pass::PassKind;
use proto::{BLOCK_BYTES, EpochId, Generation, Hashes, Name, Point, Scrubbed, SessionToken};

/// Passes of one epoch at most. The last is frozen whatever its size, so an epoch always ends.
pub(crate) const PASSES_MAX: u16 = 12;
/// A fuzzy pass that leaves more than this share of its own size dirty has stopped converging.
const CONVERGENCE_PERCENT: u64 = 75;
/// No new cut while more frames than this wait for the network: what waits here cannot merge with later writes to the same
/// blocks, what stays in the dirty map can.
pub(crate) const QUEUE_LOW_BYTES: u64 = 4 << 20;
/// How soon to look again when a cut has to wait for the queue or for a commit.
const RETRY_CUT: Duration = Duration::from_millis(5);
/// First and longest wait before connecting again.
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(15);
/// How long a receiver may take to answer the hello: it may be finishing an older session.
pub(crate) const WELCOME_TIMEOUT: Duration = Duration::from_secs(30);
/// After a refusal that waiting does not mend, the receiver's administrator may still mend it.
const REFUSED_RETRY: Duration = Duration::from_secs(30);

/// What happened.
#[derive(Debug)]
pub(crate) enum Event {
    /// Nothing: time passed. With the group's state as of now.
    Tick(Load),
    /// As a tick, and the node is stopping: cut at once rather than at the end of the interval.
    Hurry(Load),
    /// The connection stands. With a token for the session, drawn at random, and the point up to which the dirty log was cleared.
    Connected { session: SessionToken, cleared: Option<Point> },
    /// A message on the control stream, other than a welcome.
    Message(Message),
    /// The receiver's answer to the hello. `continues`: the outbox holds everything that the receiver does not have yet.
    Welcome { welcome: Welcome, continues: bool },
    /// Nothing is suspect any more.
    Compared,
    /// The pass that was begun is captured; its frames are queued.
    PassDone(Load),
    /// The connection is gone or could not be made. `jitter` is uniform in 0..1. `resumes`: the next connection may go on where this one
    /// broke.
    Lost { jitter: f64, refused: bool, resumes: bool },
}

impl Event {
    /// A message came; `continues` is asked whether the outbox holds all that a receiver needs which expects this epoch and has this of it.
    pub(crate) fn said(message: Message, continues: impl FnOnce(EpochId, Option<&Staged>) -> bool) -> Self {
        let Message::Welcome { version, generation, committed, writer, epochs_in_flight_max: in_flight_max, staged } = message
        else {
            return Self::Message(message);
        };
        let welcome = Welcome { version, generation, committed, writer, in_flight_max, staged };
        Self::Welcome { welcome, continues: continues(welcome.next_epoch(), welcome.staged.as_ref()) }
    }
}

/// How much waits at the primary.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Load {
    /// Bytes marked and not in any epoch.
    pub(crate) open_bytes: u64,
    /// Bytes of frames captured and not yet handed to the network.
    pub(crate) queued_bytes: u64,
    /// A flush waits that no epoch under way will answer: cut at once rather than at the end of the interval.
    pub(crate) flush_waits: bool,
}

/// Which commits at the receiver are ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ours {
    /// The session whose commit the receiver last told us of, and the one that may have committed since. A commit of neither is of another machine with our key.
    pub(crate) sessions: [SessionToken; 2],
    /// The commit that it told us of. All of it was taken into account then; if the first of the two has committed more, it is not ours.
    pub(crate) before: Option<Point>,
}

impl Ours {
    fn has(&self, writer: SessionToken, committed: Option<Point>) -> bool {
        let [told, since] = self.sessions;
        let is_told = writer == told && (self.before.is_none() || self.before == committed);
        writer != SessionToken::default() && (writer == since || is_told)
    }
}

/// What to do, in order.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Open a connection.
    Connect,
    /// Send on the control stream.
    Send(Message),
    /// Record these durably before anything that follows; `forget_cleared` if the copy is of another history.
    Record { generation: Generation, ours: Ours, forget_cleared: bool },
    /// Everything up to this point is committed.
    Committed(Point),
    /// The receiver has so many frames of this epoch.
    Staged { epoch: EpochId, frames: u64 },
    /// Go on sending behind so many frames of this epoch.
    Resume { epoch: EpochId, frames: u64 },
    /// Stop capturing and forget what waits to be sent: the marks of the epoch under way return to the open map.
    GiveUp,
    /// As `GiveUp`, and the marks of all epochs that are not committed return.
    Merge,
    /// Mark everything dirty: there is no copy.
    MarkAll,
    /// Make everything suspect, also durably: the copy is of another history.
    SuspectAll,
    /// Mark one block.
    MarkFirst,
    /// Compare what is suspect with the copy; answer with [`Event::Compared`], at once if nothing is.
    Compare,
    /// Hand this answer to the comparison.
    Answer(Hashes),
    /// Hand this answer to the scrub.
    Scrubbed(Scrubbed),
    /// Capture a pass.
    BeginPass { epoch: EpochId, pass: u16, kind: PassKind },
    /// The epoch's passes are queued: queue its seal.
    Seal { epoch: EpochId, generation: Generation, passes: u32 },
    /// Take no more writes; once all are committed, say so.
    Drain,
    /// Nothing is committed from here any more: refuse the flushes that wait for it, and all that come.
    RefuseFlushes,
    /// Drop the connection.
    Disconnect,
}

/// Why a session cannot go on, in words for a person.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SessionError {
    #[error("the receiver sent {message} while this side was {state}")]
    Unexpected { state: &'static str, message: &'static str },
    #[error("the receiver committed {got}, expected {expected}")]
    WrongCommit { got: Point, expected: Point },
    #[error("the receiver speaks version {theirs}, this side {VERSION_MIN} to {VERSION_MAX}: upgrade the older one")]
    Version { theirs: u16 },
    #[error(
        "generation {generation} holds at the receiver: this group was failed over there and may only be written there; nothing \
         is replicated from here"
    )]
    Fenced { generation: Generation },
    #[error("receiver: {reason}")]
    Closed { code: u16, reason: String },
    #[error("the receiver did not answer the hello in {} s", WELCOME_TIMEOUT.as_secs())]
    Silent,
}

impl SessionError {
    /// Whether trying again unchanged cannot help.
    pub(crate) fn is_refusal(&self) -> bool {
        match self {
            Self::Closed { code, .. } => !CloseCode::from_u16(*code).is_some_and(CloseCode::is_transient),
            Self::Version { .. } | Self::Fenced { .. } => true,
            _ => false,
        }
    }

    /// Whether nothing is wrong with what was sent: the next connection may go on where this one ended.
    pub(crate) fn resumes(&self) -> bool {
        matches!(self, Self::Silent | Self::Closed { .. }) && !self.is_refusal()
    }
}

/// A session that follows the guest.
#[derive(Debug)]
pub(crate) struct Streaming {
    generation: Generation,
    in_flight_max: usize,
    in_flight: VecDeque<EpochId>,
    building: Option<Building>,
    next_epoch: EpochId,
    next_cut: Instant,
    /// From here on a flush that waits makes a cut due. Flushes that come while the pipe is full share the next cut.
    flush_cut: Instant,
    /// Everything known to be needed for a first complete copy has been committed once.
    complete: bool,
    /// Nothing is cut while blocks are suspect: a point without them might never have been.
    comparing: bool,
    session: SessionToken,
}

#[derive(Debug)]
struct Building {
    epoch: EpochId,
    pass: u16,
    kind: PassKind,
    bytes: u64,
}

#[derive(Debug)]
pub(crate) enum Phase {
    Waiting { until: Instant, refused: bool },
    Connecting,
    Greeting { deadline: Instant, session: SessionToken, cleared: Option<Point> },
    Streaming(Box<Streaming>),
    Fenced,
}

impl Phase {
    fn name(&self) -> &'static str {
        match self {
            Self::Waiting { .. } => "waiting to connect",
            Self::Connecting => "connecting",
            Self::Greeting { .. } => "waiting for its welcome",
            Self::Streaming(_) => "streaming",
            Self::Fenced => "fenced",
        }
    }
}

/// What a receiver answers to a hello.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Welcome {
    pub(crate) version: u16,
    pub(crate) generation: Generation,
    pub(crate) committed: Option<Point>,
    pub(crate) writer: SessionToken,
    pub(crate) in_flight_max: u16,
    pub(crate) staged: Option<Staged>,
}

impl Welcome {
    /// The epoch that the receiver expects next.
    pub(crate) fn next_epoch(&self) -> EpochId {
        self.committed.map_or(EpochId(1), |p| p.epoch.next())
    }
}

/// Fixed facts of a group.
#[derive(Clone, Debug)]
pub(crate) struct CoreConfig {
    pub(crate) group: Name,
    pub(crate) volumes: Vec<VolumeHello>,
    pub(crate) interval: Duration,
    pub(crate) freeze_budget_bytes: u64,
    pub(crate) epochs_in_flight: u16,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Core {
    config: CoreConfig,
    phase: Phase,
    /// What the last connection was in when it broke: the capture goes on, and so does the sending if the receiver still has its part.
    suspended: Option<Box<Streaming>>,
    attempt: u32,
    generation: Generation,
    /// Durably recorded.
    ours: Ours,
    /// Newest commit this run of the process knows of.
    committed: Option<Point>,
    /// Newest epoch sealed in the last session.
    sealed: Option<EpochId>,
}

impl Core {
    pub(crate) fn new(config: CoreConfig, generation: Generation, ours: Ours, now: Instant) -> Self {
        let phase = Phase::Waiting { until: now, refused: false };
        Self { config, phase, suspended: None, attempt: 0, generation, ours, committed: None, sealed: None }
    }

    /// Does nothing from here on, until it begins again. Whoever calls this ends what is under way.
    pub(crate) fn park(&mut self) {
        (self.phase, self.suspended) = (Phase::Fenced, None);
    }

    /// Begins again, after a handback or in vain: in this generation, with a receiver whose newest commit is one of these.
    pub(crate) fn begin(&mut self, now: Instant, generation: Generation, ours: Ours) {
        *self = Self::new(self.config.clone(), generation, ours, now);
    }

    /// The record that an action asked for is durable.
    pub(crate) fn recorded(&mut self, ours: Ours) {
        self.ours = ours;
    }

    /// What is under way, connected or not.
    fn streaming(&self) -> Option<&Streaming> {
        if let Phase::Streaming(s) = &self.phase { Some(s) } else { self.suspended.as_deref() }
    }

    /// The token of the session under way.
    pub(crate) fn session(&self) -> SessionToken {
        self.streaming().map_or_else(SessionToken::default, |s| s.session)
    }

    pub(crate) fn generation(&self) -> Generation {
        self.generation
    }

    pub(crate) fn committed(&self) -> Option<Point> {
        self.committed
    }

    pub(crate) fn phase(&self) -> &Phase {
        &self.phase
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.streaming().map_or(0, |s| s.in_flight.len())
    }

    /// Whether the first copy is still being made.
    pub(crate) fn syncing(&self) -> bool {
        matches!(&self.phase, Phase::Streaming(s) if !s.complete)
    }

    /// Whether suspect blocks are being compared with the copy.
    pub(crate) fn comparing(&self) -> bool {
        matches!(&self.phase, Phase::Streaming(s) if s.comparing)
    }

    /// Whether a complete copy follows the guest, so that it can be scrubbed.
    pub(crate) fn follows(&self) -> bool {
        matches!(&self.phase, Phase::Streaming(s) if s.complete && !s.comparing)
    }

    /// The newest epoch that is sealed in this session, or that the receiver had at its beginning.
    pub(crate) fn newest_sealed(&self) -> Option<EpochId> {
        match &self.phase {
            Phase::Streaming(s) => s.next_epoch.0.checked_sub(1).filter(|epoch| *epoch > 0).map(EpochId),
            _ => None,
        }
    }

    /// When a tick is due at the latest; `flush_waits` as in [`Load`].
    pub(crate) fn deadline(&self, now: Instant, flush_waits: bool) -> Instant {
        match &self.phase {
            Phase::Waiting { until, .. } => *until,
            Phase::Greeting { deadline, .. } => *deadline,
            // A cut that has to wait is looked at again soon; one that is being captured ends with an event of its own.
            Phase::Streaming(s) if s.building.is_none() && !s.comparing => {
                let next = s.next_cut.max(now + Duration::from_millis(1));
                if flush_waits { next.min(s.flush_cut) } else { next }
            }
            Phase::Connecting | Phase::Streaming(_) | Phase::Fenced => now + Duration::from_secs(3600),
        }
    }

    /// Takes an event.
    ///
    /// # Errors
    /// The session must be dropped; the driver then reports [`Event::Lost`].
    pub(crate) fn handle(&mut self, now: Instant, event: Event, out: &mut Vec<Action>) -> Result<(), SessionError> {
        let phase = std::mem::replace(&mut self.phase, Phase::Connecting);
        let (phase, result) = self.next(phase, now, event, out);
        self.phase = phase;
        result
    }

    fn next(&mut self, phase: Phase, now: Instant, event: Event, out: &mut Vec<Action>) -> (Phase, Result<(), SessionError>) {
        match (phase, event) {
            (Phase::Fenced, _) => (Phase::Fenced, Ok(())),
            (phase, Event::Lost { jitter, refused, resumes }) => {
                self.suspend(phase, resumes, out);
                (self.lost(now, jitter, refused, out), Ok(()))
            }
            (Phase::Waiting { until, .. }, Event::Tick(_) | Event::Hurry(_)) if now >= until => {
                out.push(Action::Connect);
                (Phase::Connecting, Ok(()))
            }
            (Phase::Connecting, Event::Connected { session, cleared }) => {
                out.push(Action::Send(Message::Hello(self.hello())));
                (Phase::Greeting { deadline: now + WELCOME_TIMEOUT, session, cleared }, Ok(()))
            }
            (phase @ Phase::Greeting { deadline, .. }, Event::Tick(_) | Event::Hurry(_)) if now >= deadline => {
                (phase, Err(SessionError::Silent))
            }
            (phase, Event::Message(Message::Fenced { generation })) => {
                out.extend([Action::Merge, Action::RefuseFlushes, Action::Disconnect]);
                drop(phase);
                self.suspended = None;
                (Phase::Fenced, Err(SessionError::Fenced { generation }))
            }
            (phase, Event::Message(Message::Close { code, reason })) => (phase, Err(SessionError::Closed { code, reason })),
            (phase @ Phase::Greeting { session, cleared, .. }, Event::Welcome { welcome, continues }) => {
                if !(VERSION_MIN..=VERSION_MAX).contains(&welcome.version) {
                    return (phase, Err(SessionError::Version { theirs: welcome.version }));
                }
                let streaming = match self.suspended.take().filter(|s| continues && self.is_continued(s, &welcome)) {
                    Some(suspended) => self.resume(suspended, &welcome, out),
                    None => Box::new(self.welcome(now, welcome, session, cleared, out)),
                };
                (Phase::Streaming(streaming), Ok(()))
            }
            (Phase::Streaming(mut s), event) => {
                let result = self.stream(&mut s, now, event, out);
                (Phase::Streaming(s), result)
            }
            (phase, Event::Message(message)) => {
                let error = SessionError::Unexpected { state: phase.name(), message: message.kind() };
                (phase, Err(error))
            }
            (phase, Event::Welcome { .. }) => {
                let error = SessionError::Unexpected { state: phase.name(), message: "welcome" };
                (phase, Err(error))
            }
            // A pass needs no connection to end.
            (phase, Event::PassDone(load)) => {
                if let Some(mut s) = self.suspended.take() {
                    self.pass_done(&mut s, now, load, out);
                    self.suspended = Some(s);
                }
                (phase, Ok(()))
            }
            // A tick that comes early, or the end of a comparison whose session is gone.
            (phase, Event::Tick(_) | Event::Hurry(_) | Event::Compared | Event::Connected { .. }) => (phase, Ok(())),
        }
    }

    fn hello(&self) -> Hello {
        Hello {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            block_bytes: BLOCK_BYTES as u32,
            interval_ms: u32::try_from(self.config.interval.as_millis()).unwrap_or(u32::MAX),
            group: self.config.group.clone(),
            generation: self.generation,
            committed: self.committed.map_or(EpochId(0), |p| p.epoch),
            volumes: self.config.volumes.clone(),
        }
    }

    /// The connection is gone: what was under way waits for the next one, or is given up.
    fn suspend(&mut self, phase: Phase, resumes: bool, out: &mut Vec<Action>) {
        if let Phase::Streaming(s) = phase {
            self.suspended = Some(s).filter(|s| !s.comparing);
        }
        self.suspended = self.suspended.take().filter(|_| resumes);
        if self.suspended.is_none() {
            out.push(Action::GiveUp);
        }
    }

    /// The newest commit, if it can be believed to be of a session of ours: it lies between what we know to be committed and what we sealed
    /// last.
    fn known(&self, welcome: &Welcome, least: Option<Point>) -> Option<Point> {
        let ours = self.ours.has(welcome.writer, welcome.committed);
        let most = self.sealed.or(self.committed.map(|p| p.epoch));
        welcome.committed.filter(|t| {
            ours && least.is_none_or(|least| t.generation == least.generation && *t >= least)
                && most.is_none_or(|most| t.epoch <= most)
        })
    }

    /// Whether the receiver stands where the last connection left it, or further on the same way.
    fn is_continued(&self, s: &Streaming, welcome: &Welcome) -> bool {
        let known = self.known(welcome, self.committed);
        let same_history = known == welcome.committed && (known.is_some() || self.committed.is_none());
        let uncommitted = s.in_flight.iter().copied().find(|epoch| *epoch >= welcome.next_epoch());
        let next = uncommitted.or(s.building.as_ref().map(|b| b.epoch)).unwrap_or(s.next_epoch);
        same_history && welcome.generation == s.generation && next == welcome.next_epoch()
    }

    /// Goes on where the last connection broke.
    fn resume(&mut self, mut s: Box<Streaming>, welcome: &Welcome, out: &mut Vec<Action>) -> Box<Streaming> {
        let epoch = welcome.next_epoch();
        if welcome.committed > self.committed {
            s.complete = true;
            self.committed = welcome.committed;
            out.extend(welcome.committed.map(Action::Committed));
        }
        s.in_flight.retain(|e| *e >= epoch);
        s.in_flight_max = usize::from(welcome.in_flight_max.min(self.config.epochs_in_flight).max(1));
        out.push(Action::Resume { epoch, frames: welcome.staged.map_or(0, |s| s.frames) });
        s
    }

    /// The receiver's newest commit decides which marks are still needed. One that is not known to be ours is of another history, and all
    /// is compared with it.
    fn welcome(
        &mut self,
        now: Instant,
        welcome: Welcome,
        session: SessionToken,
        cleared: Option<Point>,
        out: &mut Vec<Action>,
    ) -> Streaming {
        let Welcome { generation, committed: theirs, writer, in_flight_max, .. } = welcome;
        self.generation = generation;
        // After a restart all that is known is what made the dirty log forget regions.
        let known = self.known(&welcome, self.committed.or(cleared));
        out.extend(known.map(Action::Committed));
        out.push(Action::Merge);
        if theirs.is_none() {
            out.push(Action::MarkAll);
        } else if known.is_none() {
            out.push(Action::SuspectAll);
            // An adopted image is no point before an epoch was committed, and an epoch holds something, also if nothing differs.
            out.extend(theirs.filter(|point| point.epoch == EpochId(0)).map(|_| Action::MarkFirst));
        }
        // Whoever wrote last is known from here on: what is suspect because of it is so durably.
        let ours = Ours { sessions: [writer, session], before: theirs };
        out.push(Action::Record { generation, ours, forget_cleared: known.is_none() });
        out.push(Action::Compare);
        self.committed = known;
        self.sealed = None;
        Streaming {
            generation,
            in_flight_max: usize::from(in_flight_max.min(self.config.epochs_in_flight).max(1)),
            in_flight: VecDeque::new(),
            building: None,
            next_epoch: theirs.map_or(EpochId(1), |p| p.epoch.next()),
            next_cut: now,
            flush_cut: now,
            complete: theirs.is_some(),
            comparing: true,
            session,
        }
    }

    fn stream(&mut self, s: &mut Streaming, now: Instant, event: Event, out: &mut Vec<Action>) -> Result<(), SessionError> {
        match event {
            Event::Tick(load) => {
                let due = now >= s.next_cut || load.flush_waits && now >= s.flush_cut;
                if s.building.is_none() && !s.comparing && due {
                    self.cut_if_due(s, now, load, out);
                }
                Ok(())
            }
            Event::Hurry(load) => {
                if s.building.is_none() && !s.comparing {
                    self.cut_if_due(s, now, load, out);
                }
                Ok(())
            }
            Event::Compared => {
                s.comparing = false;
                (s.next_cut, s.flush_cut) = (now, now);
                Ok(())
            }
            Event::Message(Message::Hashes(hashes)) if s.comparing => {
                out.push(Action::Answer(hashes));
                Ok(())
            }
            Event::Message(Message::Scrubbed(scrubbed)) if !s.comparing => {
                out.push(Action::Scrubbed(scrubbed));
                Ok(())
            }
            Event::PassDone(load) => {
                self.pass_done(s, now, load, out);
                Ok(())
            }
            Event::Message(Message::Committed { point }) => {
                let expected = Point { generation: s.generation, epoch: s.in_flight.front().copied().unwrap_or(s.next_epoch) };
                if point != expected || s.in_flight.is_empty() {
                    return Err(SessionError::WrongCommit { got: point, expected });
                }
                s.in_flight.pop_front();
                // The pipe has room again.
                s.flush_cut = now;
                s.complete = true;
                self.attempt = 0;
                self.committed = Some(point);
                out.push(Action::Committed(point));
                Ok(())
            }
            Event::Message(Message::Staged { epoch, frames }) => {
                // A line that breaks again and again is tried again soon, as long as it carries something.
                self.attempt = 0;
                out.push(Action::Staged { epoch, frames });
                Ok(())
            }
            Event::Message(Message::Drain) => {
                out.push(Action::Drain);
                Ok(())
            }
            Event::Message(message) => Err(SessionError::Unexpected { state: "streaming", message: message.kind() }),
            Event::Welcome { .. } => Err(SessionError::Unexpected { state: "streaming", message: "welcome" }),
            Event::Connected { .. } | Event::Lost { .. } => Ok(()),
        }
    }

    fn cut_if_due(&self, s: &mut Streaming, now: Instant, load: Load, out: &mut Vec<Action>) {
        s.flush_cut = now + RETRY_CUT;
        if load.open_bytes == 0 {
            s.next_cut = now + self.config.interval;
            return;
        }
        if s.in_flight.len() >= s.in_flight_max || load.queued_bytes > QUEUE_LOW_BYTES {
            s.next_cut = s.next_cut.max(now + RETRY_CUT);
            return;
        }
        // The grid of cuts is kept while we keep up with it, and restarted when we do not, or when a flush did not wait for it.
        s.next_cut = if now >= s.next_cut { (s.next_cut + self.config.interval).max(now) } else { now + self.config.interval };
        let kind = if load.open_bytes <= self.config.freeze_budget_bytes { PassKind::Frozen } else { PassKind::Fuzzy };
        let epoch = s.next_epoch;
        s.building = Some(Building { epoch, pass: 0, kind, bytes: load.open_bytes });
        out.push(Action::BeginPass { epoch, pass: 0, kind });
    }

    fn pass_done(&mut self, s: &mut Streaming, now: Instant, load: Load, out: &mut Vec<Action>) {
        let Some(done) = s.building.take() else { return };
        if done.kind == PassKind::Frozen {
            s.in_flight.push_back(done.epoch);
            s.next_epoch = done.epoch.next();
            s.next_cut = s.next_cut.max(now);
            s.flush_cut = now;
            self.sealed = Some(done.epoch);
            out.push(Action::Seal { epoch: done.epoch, generation: s.generation, passes: u32::from(done.pass) + 1 });
            return;
        }
        let pass = done.pass + 1;
        let converging = load.open_bytes * 100 <= done.bytes * CONVERGENCE_PERCENT;
        let small = load.open_bytes <= self.config.freeze_budget_bytes;
        let last = pass + 1 >= PASSES_MAX;
        let kind = if small || last || !converging { PassKind::Frozen } else { PassKind::Fuzzy };
        s.building = Some(Building { epoch: done.epoch, pass, kind, bytes: load.open_bytes });
        out.push(Action::BeginPass { epoch: done.epoch, pass, kind });
    }

    fn lost(&mut self, now: Instant, jitter: f64, refused: bool, out: &mut Vec<Action>) -> Phase {
        out.push(Action::Disconnect);
        let base = BACKOFF_MIN.saturating_mul(1 << self.attempt.min(10)).min(BACKOFF_MAX);
        self.attempt = self.attempt.saturating_add(1);
        let wait = if refused { REFUSED_RETRY } else { base };
        // Half fixed, half random: many groups that lost one receiver do not come back in step.
        Phase::Waiting { until: now + wait.mul_f64(0.5 + 0.5 * jitter.clamp(0.0, 1.0)), refused }
    }
}

#[cfg(test)]
mod tests;
