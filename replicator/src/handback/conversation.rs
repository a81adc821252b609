//! Performs what the core of a handback decides, on a connection to the receiver.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use blockdev::steps::{Step, reach};
use proto::pass::{PASS_HEADER_BYTES, PassHeader};
use proto::{Hashes, Message};
use quinn::RecvStream;
use tokio::sync::{mpsc, oneshot};

use super::Handback;
use super::core::{Action, Core, Event};
use super::talk::{Broken, Talk};
use crate::capture::CaptureError;
use crate::compare::Compare;
use crate::gate::Closed;
use crate::ledger::Ledger;
use crate::link::{ControlError, read_message};
use crate::outbox::{Item, Outbox};
use crate::record::Stopped;
use crate::session::Order;
use crate::status::LinkState;

/// How often to look whether guests' writes are done.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// The comparison of what was marked with the receiver's newest point, on the capture thread.
struct Comparing {
    /// What differs is marked there.
    ledger: Arc<Ledger>,
    queue: Outbox,
    number: u64,
    /// Never full: as many answers as questions may be asked at once.
    answers: mpsc::Sender<Hashes>,
    done: oneshot::Receiver<Result<(), CaptureError>>,
}

/// See the module.
pub(super) struct Conversation<'a> {
    of: &'a Handback,
    core: &'a mut Core,
    talk: Option<Talk>,
    comparing: Option<Comparing>,
    /// Whether all blocks are looked at.
    suspects_all: bool,
    /// Whether a pass is to come.
    takes: bool,
    /// The pass that arrives, behind its header.
    pass: Option<RecvStream>,
}

impl<'a> Conversation<'a> {
    pub(super) fn new(of: &'a Handback, core: &'a mut Core) -> Self {
        Self { of, core, talk: None, comparing: None, suspects_all: false, takes: false, pass: None }
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// [`Broken`]; the core is not told.
    pub(super) async fn run(mut self) -> Result<(), Broken> {
        let done = self.converse().await;
        self.of.shared.hurry.store(false, Ordering::SeqCst);
        if let Some(Comparing { queue, answers, done, .. }) = self.comparing.take() {
            queue.close();
            drop(answers);
            // It notices that nobody answers; what it has not compared stays suspect.
            let _ = done.await;
        }
        done
    }

    async fn converse(&mut self) -> Result<(), Broken> {
        let mut next = Some(Event::Begin);
        while !self.core.is_done() {
            let event = match next.take() {
                Some(event) => event,
                None => self.next_event().await?,
            };
            let mut actions = Vec::new();
            self.core.handle(Instant::now(), event, &mut actions)?;
            for action in actions {
                next = self.perform(action).await?.or(next);
            }
        }
        Ok(())
    }

    async fn next_event(&mut self) -> Result<Event, Broken> {
        let deadline = self.core.deadline();
        loop {
            let Self { talk, comparing, takes, .. } = self;
            let talk = talk.as_mut().ok_or(ControlError::Ended)?;
            let connection = talk.connection.clone();
            let due = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                    None => std::future::pending().await,
                }
            };
            let compared = async {
                match comparing {
                    Some(Comparing { done, queue, number, .. }) => tokio::select! {
                        biased;
                        compared = done => Compared::Done(compared.unwrap_or(Err(CaptureError::Stopped))),
                        item = queue.next(*number) => Compared::Asks(item),
                    },
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                compared = compared => match compared {
                    Compared::Done(result) => {
                        let marked = self.comparing.take().map(|comparing| comparing.ledger.marked());
                        return result.map(|()| Event::Compared(marked.unwrap_or_default())).map_err(Broken::from);
                    }
                    Compared::Asks(Some(Item::Query(query))) => talk.say(&Message::HashQuery(query)).await?,
                    Compared::Asks(_) => return Err(CaptureError::Stopped.into()),
                },
                stream = connection.accept_uni(), if *takes => {
                    let mut stream = stream?;
                    let mut header = [0; PASS_HEADER_BYTES];
                    stream.read_exact(&mut header).await.map_err(|error| Broken::Lost(error.to_string()))?;
                    (self.takes, self.pass) = (false, Some(stream));
                    return Ok(Event::Pass(PassHeader::decode(&header)?));
                }
                message = talk.hear() => return Ok(Event::Message(message?)),
                () = due => return Ok(Event::Tick),
            }
        }
    }

    /// Returns what came of it, if the core waits for that.
    pub(super) async fn perform(&mut self, action: Action) -> Result<Option<Event>, Broken> {
        let shared = &self.of.shared;
        match action {
            Action::Step(step) => self.of.step(step),
            Action::CloseGate => shared.gate.close(Closed::Handback),
            Action::OpenGate => {
                // Both sides have said so durably: from here on a session that is let in may say who writes.
                shared.handing.store(false, Ordering::SeqCst);
                shared.gate.open();
                reach(Step::TakeOpened);
            }
            Action::RestoreGate(was) => {
                // The other site may have become the writer meanwhile.
                let stopped = self.of.record.get().stopped;
                match stopped.and_then(|stopped| stopped.holds_up(shared.tuning.writes_when_fenced)).or(was) {
                    Some(why) => shared.gate.close(why),
                    None => shared.gate.open(),
                }
            }
            Action::Settle { committed } => return Ok(Some(self.settle(committed).await)),
            Action::Park => {
                let (done, parked) = oneshot::channel();
                self.order(Order::Park(done)).await?;
                parked.await.map_err(|_| Broken::Stopping)?;
                reach(Step::RollbackParked);
                return Ok(Some(Event::Parked));
            }
            Action::Unpark => {
                let recorded = self.of.record.get();
                self.order(Order::Begin { generation: recorded.generation, ours: recorded.ours() }).await?;
            }
            Action::Connect => {
                self.connect().await?;
                return Ok(Some(Event::Connected));
            }
            Action::Send(message) => {
                if let Some(talk) = &mut self.talk {
                    talk.say(&message).await?;
                }
            }
            Action::SuspectAll if self.core.wish().plans => self.suspects_all = true,
            Action::SuspectAll => shared.ledger.suspect_all(),
            Action::Compare => self.compare(),
            Action::Answer(hashes) => {
                let taken = self.comparing.as_ref().map(|comparing| comparing.answers.try_send(hashes));
                if taken.is_none_or(|taken| taken.is_err()) {
                    return Err(CaptureError::Stopped.into());
                }
            }
            Action::Total(bytes) => self.of.state.lock().0.total_bytes = bytes,
            Action::Record { kept } => {
                let (token, to) = (self.core.wish().token, self.core.wish().target.point());
                self.of.record.update(|record| record.stopped = Some(Stopped::Handback { token, kept, to }))?;
                reach(if kept { Step::TakeKeptRecorded } else { Step::TakeBegun });
                // Whoever saves the maps closes the gate first, and then looks whether this is recorded.
                if shared.gate.is_stopping() {
                    return Err(Broken::Stopping);
                }
            }
            Action::SendOwn(own) => {
                let (Some(talk), Some(ready)) = (&self.talk, self.core.ready()) else { return Ok(None) };
                let tally = self.of.send_own(&talk.connection, own, ready.newest).await?;
                return Ok(Some(Event::Sent { frames: tally.frames, digest: tally.digest() }));
            }
            Action::Kept(name) => {
                self.of.state.lock().0.kept = Some(name);
                reach(Step::TakeKept);
            }
            Action::TakePass => self.takes = true,
            Action::Apply => {
                if let Some(mut stream) = self.pass.take() {
                    self.of.apply(&mut stream).await?;
                    reach(Step::TakePass);
                }
                return Ok(Some(Event::Applied));
            }
            Action::Flush => {
                self.of.flush().await?;
                reach(Step::TakeFlushed);
            }
            Action::Handed { point, generation, compares } => {
                let token = self.core.wish().token;
                reach(Step::TakeHanded);
                self.of.record.update(|record| {
                    record.handed(generation, token);
                })?;
                reach(Step::TakeRecorded);
                match compares {
                    true => shared.ledger.suspect_marks(),
                    false => shared.ledger.handed(point),
                }
            }
            Action::End => {
                if let Some(talk) = &self.talk {
                    talk.end();
                }
            }
        }
        Ok(None)
    }

    /// Waits for guests' writes that were let in before, at most until the core's deadline.
    async fn settle(&self, committed: bool) -> Event {
        let shared = &self.of.shared;
        shared.hurry.store(committed, Ordering::SeqCst);
        let settled = loop {
            let is_committed = || shared.ledger.summary().uncommitted_bytes == 0 && shared.state() == LinkState::Streaming;
            if shared.ledger.is_quiet() && (!committed || is_committed()) {
                break Event::Settled;
            }
            if self.core.deadline().is_none_or(|deadline| Instant::now() >= deadline) {
                break Event::Tick;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        };
        shared.hurry.store(false, Ordering::SeqCst);
        settled
    }

    async fn order(&self, order: Order) -> Result<(), Broken> {
        self.of.orders.send(order).await.map_err(|_| Broken::Stopping)
    }

    async fn connect(&mut self) -> Result<(), Broken> {
        let (endpoint, connection) = self.of.link.connect_for_handback().await?;
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
        self.talk = Some(Talk { connection, _endpoint: endpoint, control, messages });
        Ok(())
    }

    /// Begins to find out exactly which of the marked blocks differ from the receiver's newest point; they stay marked. Whoever only plans, while guests may
    /// write, leaves all marks as they are: one whose write is still under way must not go because the block is as it was.
    fn compare(&mut self) {
        let queue = Outbox::new(0);
        let number = queue.attach();
        let (finished, done) = oneshot::channel();
        let (sender, answers) = mpsc::channel(proto::hashes::QUERIES_IN_FLIGHT_MAX);
        let (shared, devices, asked) = (self.of.shared.clone(), self.of.scanners.clone(), queue.clone());
        // In this order: one that was let in before the gate was closed is in flight.
        let is_still = shared.gate.closed().is_some() && shared.ledger.is_quiet();
        let ledger = match self.core.wish().plans && (self.suspects_all || !is_still) {
            true => {
                let ledger = shared.ledger.to_look_at();
                if self.suspects_all {
                    ledger.suspect_all();
                }
                Arc::new(ledger)
            }
            false => {
                shared.ledger.suspect_marks();
                shared.ledger.clone()
            }
        };
        let looked_at = ledger.clone();
        self.of.capture.spawn(move || async move {
            let compare = Compare { ledger: &looked_at, devices: &devices, queue: &asked, answers, counters: &shared.compared };
            // Whoever waits may be gone: then nobody needs the result.
            let _ = finished.send(compare.run().await);
        });
        self.comparing = Some(Comparing { ledger, queue, number, answers: sender, done });
    }
}

enum Compared {
    Done(Result<(), CaptureError>),
    Asks(Option<Item>),
}
