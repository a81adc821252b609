//! What a side does that takes its disks back: decides, never does.
//!
//! Events go in with the time, actions come out; the conversation, the disks and the clock are the driver's, so that the same core runs in the
//! simulator. Actions are performed in order, each before the next; one that fails ends the handback with [`Core::fail`].
//!
//! What must always hold: what was written here after the sites had parted is kept at the receiver before [`Action::Apply`]; guests are let in
//! by [`Action::OpenGate`] after [`Action::Handed`], or if nothing was overwritten.

use std::time::{Duration, Instant};

use proto::control::{VERSION_MAX, VERSION_MIN, VolumeHello};
use proto::handback::{Ask, HANDBACK_PASSES_MAX, Ready, WANT_EXTENTS_MAX, Want};
use proto::pass::{PassHeader, PassKind};
use proto::{BLOCK_BYTES, DirtyMap, Generation, Hashes, Message, Name, Point, SessionToken, VolumeIndex};

use super::{Broken, HandbackTarget};
use crate::gate::Closed;

/// How long the receiver may take to find out what it would give: it may have to walk a journal of any size. That it is there at all, the connection tells.
pub(crate) const READY_DEADLINE: Duration = Duration::from_secs(1800);
/// How long everything written so far may take to be done, and before a rollback to be committed.
pub(crate) const DRAIN_DEADLINE: Duration = Duration::from_secs(60);

/// What happened.
#[derive(Debug)]
pub(crate) enum Event {
    /// It is to begin.
    Begin,
    /// What [`Action::Settle`] waits for is so.
    Settled,
    /// The group's session has ended, and does nothing more.
    Parked,
    /// The connection stands.
    Connected,
    /// The receiver said something.
    Message(Message),
    /// What was marked is compared: these blocks, by volume, differ from the receiver's newest point.
    Compared(Vec<DirtyMap>),
    /// The own blocks are sent: so many frames with this digest.
    Sent { frames: u64, digest: [u8; 32] },
    /// A pass begins to arrive.
    Pass(PassHeader),
    /// All of it is written to the disks.
    Applied,
    /// Time passed.
    Tick,
}

/// What to do, in order.
#[derive(Debug)]
pub(crate) enum Action {
    /// Tell the user what is being done.
    Step(&'static str),
    /// Take no more changes from guests.
    CloseGate,
    /// Let guests change the disks.
    OpenGate,
    /// Let guests do what they might before, if nothing that is recorded since forbids it.
    RestoreGate(Option<Closed>),
    /// Wait until no write is in flight, and with `committed` until all is committed; answer with [`Event::Settled`].
    Settle { committed: bool },
    /// End the group's session; answer with [`Event::Parked`].
    Park,
    /// The group's session begins again, as it is recorded.
    Unpark,
    /// Open a connection; answer with [`Event::Connected`].
    Connect,
    /// Send a message.
    Send(Message),
    /// Nothing is known of the copy: all blocks are suspect.
    SuspectAll,
    /// Find out which marked blocks differ; answer with [`Event::Compared`].
    Compare,
    /// Hand this answer to the comparison.
    Answer(Hashes),
    /// So many bytes of blocks are known to come.
    Total(u64),
    /// Record durably that the disks are in between.
    Record { kept: bool },
    /// Send these blocks as they are; answer with [`Event::Sent`].
    SendOwn(Vec<DirtyMap>),
    /// The receiver keeps what was sent under this name.
    Kept(Name),
    /// Answer with [`Event::Pass`] when a pass begins to arrive.
    TakePass,
    /// Write what comes of the pass to the disks; answer with [`Event::Applied`].
    Apply,
    /// Make the disks durable before anything that follows.
    Flush,
    /// Record durably that both sites hold `point`. `compares`: marks are not all of this conversation, and are to be looked at again.
    Handed { point: Point, generation: Generation, compares: bool },
    /// Close the connection.
    End,
}

/// Where it stands.
#[derive(Debug)]
enum State {
    Beginning,
    Settling { deadline: Instant },
    Parking,
    Connecting,
    Asking { deadline: Instant },
    Comparing,
    Sending { own: Vec<DirtyMap> },
    Keeping { own: Vec<DirtyMap> },
    Waiting { expected: u16 },
    Applying(PassHeader),
    Handing,
    Done,
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            Self::Beginning | Self::Settling { .. } | Self::Parking | Self::Connecting => "beginning",
            Self::Asking { .. } => "asking",
            Self::Comparing => "comparing",
            Self::Sending { .. } | Self::Keeping { .. } => "waiting for its own blocks to be kept",
            Self::Waiting { .. } => "waiting for a pass",
            Self::Applying(_) => "writing a pass",
            Self::Handing => "waiting to be handed the disks",
            Self::Done => "done",
        }
    }
}

/// Fixed facts of a handback.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub(crate) target: HandbackTarget,
    /// Only to find out what would be done; nothing is changed.
    pub(crate) plans: bool,
    /// With `plans`: only to find out the point that the receiver knows by this name.
    pub(crate) named: Option<Name>,
    pub(crate) group: Name,
    pub(crate) generation: Generation,
    pub(crate) volumes: Vec<VolumeHello>,
    /// Recorded, or drawn.
    pub(crate) token: SessionToken,
    /// Whether the token was recorded: the disks may be in between, and the session is parked.
    pub(crate) repeats: bool,
    /// Whether what was written here of its own is kept.
    pub(crate) kept: bool,
    /// What holds guests up.
    pub(crate) gate: Option<Closed>,
    /// What was written up to this point is not marked any more.
    pub(crate) cleared: Option<Point>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Core {
    wish: Wish,
    state: State,
    ready: Option<Ready>,
    parked: bool,
    handed: Option<(Point, Generation)>,
    found_ended: bool,
    own_bytes: u64,
}

impl Core {
    pub(crate) fn new(wish: Wish) -> Self {
        Self { wish, state: State::Beginning, ready: None, parked: false, handed: None, found_ended: false, own_bytes: 0 }
    }

    pub(crate) fn wish(&self) -> &Wish {
        &self.wish
    }

    /// What the receiver answered.
    pub(crate) fn ready(&self) -> Option<&Ready> {
        self.ready.as_ref()
    }

    /// The point that both sites hold in the end, and the generation from there on. Who only asks is told so of an earlier conversation.
    pub(crate) fn handed(&self) -> Option<(Point, Generation)> {
        self.handed
    }

    /// Whether an earlier conversation had come to its end, whatever this one asked for.
    pub(crate) fn found_ended(&self) -> bool {
        self.found_ended
    }

    /// Bytes of blocks that differ from the receiver's newest point, once they were compared.
    pub(crate) fn own_bytes(&self) -> u64 {
        self.own_bytes
    }

    pub(crate) fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// When a tick is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Settling { deadline } | State::Asking { deadline } => Some(*deadline),
            _ => None,
        }
    }

    /// Takes an event.
    ///
    /// # Errors
    /// The handback is over; the driver reports that with [`Self::fail`].
    pub(crate) fn handle(&mut self, now: Instant, event: Event, out: &mut Vec<Action>) -> Result<(), Broken> {
        let state = std::mem::replace(&mut self.state, State::Done);
        self.state = self.next(state, now, event, out)?;
        Ok(())
    }

    /// It ends here without its end. `in_between`: the record says that the disks may be neither what they were nor what they are to be. Then
    /// guests wait for the next try; else all is as it was.
    pub(crate) fn fail(&mut self, in_between: bool, out: &mut Vec<Action>) {
        self.state = State::Done;
        if self.wish.plans || in_between {
            return;
        }
        out.push(Action::RestoreGate(self.wish.gate));
        if self.parked {
            out.push(Action::Unpark);
        }
    }

    fn next(&mut self, state: State, now: Instant, event: Event, out: &mut Vec<Action>) -> Result<State, Broken> {
        match (state, event) {
            (State::Beginning, Event::Begin) if self.wish.plans => Ok(self.connect(out)),
            (State::Beginning, Event::Begin) => {
                // A rollback that is repeated has everything committed; after a failover nothing can be.
                let committed = self.is_rollback() && !self.wish.repeats;
                out.push(Action::CloseGate);
                out.push(Action::Step(if committed {
                    "committing what was written last"
                } else {
                    "waiting for writes under way"
                }));
                out.push(Action::Settle { committed });
                Ok(State::Settling { deadline: now + DRAIN_DEADLINE })
            }
            (State::Settling { deadline }, Event::Tick) if now >= deadline => Err(Broken::NotDrained),
            (State::Settling { .. }, Event::Settled) if self.is_rollback() && !self.wish.repeats => {
                out.push(Action::Park);
                Ok(State::Parking)
            }
            (State::Settling { .. }, Event::Settled) => Ok(self.connect(out)),
            (State::Parking, Event::Parked) => {
                self.parked = true;
                Ok(self.connect(out))
            }
            (State::Connecting, Event::Connected) => {
                out.push(Action::Send(Message::Handback(self.ask())));
                Ok(State::Asking { deadline: now + READY_DEADLINE })
            }
            (State::Asking { deadline }, Event::Tick) if now >= deadline => Err(Broken::Silent),
            (_, Event::Message(Message::Close { reason, .. })) => Err(Broken::Refused(reason)),
            (_, Event::Message(Message::Fenced { generation })) => {
                Err(Broken::Refused(format!("generation {generation} holds, and this node has another on record")))
            }
            (State::Asking { .. }, Event::Message(Message::Ready(ready))) => Ok(self.asked(ready, out)),
            // An earlier conversation came to its end, and this side did not hear it. What was marked since is not known to be of it.
            (State::Asking { .. }, Event::Message(Message::Handed { point, generation })) => {
                self.found_ended = true;
                Ok(self.ended(point, generation, true, out))
            }
            (State::Comparing, Event::Message(Message::Hashes(hashes))) => {
                out.push(Action::Answer(hashes));
                Ok(State::Comparing)
            }
            (State::Comparing, Event::Compared(own)) => Ok(self.compared(own, out)),
            (State::Sending { own }, Event::Sent { frames, digest }) => {
                out.push(Action::Send(Message::Diverged { frames, digest }));
                Ok(State::Keeping { own })
            }
            (State::Keeping { own }, Event::Message(Message::Kept { name })) => {
                out.push(Action::Kept(name));
                Ok(self.want(&own, out))
            }
            (State::Waiting { expected }, Event::Pass(header)) => {
                if header.pass != expected || expected >= HANDBACK_PASSES_MAX {
                    return Err(Broken::Order { got: header.pass, expected });
                }
                out.push(Action::Apply);
                Ok(State::Applying(header))
            }
            (State::Applying(header), Event::Applied) => {
                let frozen = header.kind == PassKind::Frozen;
                if frozen {
                    out.push(Action::Step("handing over"));
                }
                // After each pass, so that behind the last one, while guests are held up, there is little left to be synced.
                out.push(Action::Flush);
                out.push(Action::Send(Message::Applied { pass: header.pass }));
                if frozen {
                    return Ok(self.last_applied(out));
                }
                out.push(Action::TakePass);
                Ok(State::Waiting { expected: header.pass + 1 })
            }
            (State::Handing, Event::Message(Message::Handed { point, generation })) => {
                Ok(self.ended(point, generation, false, out))
            }
            (state, Event::Message(message)) => Err(Broken::Unexpected { message: message.kind(), state: state.name() }),
            (state, _) => Ok(state),
        }
    }

    fn is_rollback(&self) -> bool {
        matches!(self.wish.target, HandbackTarget::Rollback(_))
    }

    fn ask(&self) -> Ask {
        Ask {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            block_bytes: BLOCK_BYTES as u32,
            group: self.wish.group.clone(),
            generation: self.wish.generation,
            token: self.wish.token,
            to: match self.wish.target {
                HandbackTarget::Rollback(point) if self.wish.named.is_none() => Some(point),
                _ => None,
            },
            named: self.wish.named.clone(),
            volumes: self.wish.volumes.clone(),
        }
    }

    fn connect(&self, out: &mut Vec<Action>) -> State {
        out.extend([Action::Step("asking the receiver"), Action::Connect]);
        State::Connecting
    }

    fn asked(&mut self, ready: Ready, out: &mut Vec<Action>) -> State {
        self.ready = Some(ready);
        // A guest that may write makes marks of its own, which an epoch may hold: those are of no concern to who only asks.
        if self.wish.plans && (self.is_rollback() || self.wish.named.is_some()) {
            out.push(Action::End);
            return State::Done;
        }
        // A store that was put back to an earlier point lacks what was forgotten here since.
        if self.wish.cleared > Some(ready.newest) {
            out.extend([Action::SuspectAll, Action::Step("comparing all blocks: the receiver is older than what is known here")]);
        } else {
            out.push(Action::Step("comparing what was marked here"));
        }
        out.push(Action::Compare);
        State::Comparing
    }

    fn compared(&mut self, own: Vec<DirtyMap>, out: &mut Vec<Action>) -> State {
        let own_bytes = own.iter().map(DirtyMap::bytes).sum::<u64>();
        self.own_bytes = own_bytes;
        if self.wish.plans {
            out.push(Action::End);
            return State::Done;
        }
        out.push(Action::Total(self.ready.map_or(0, |ready| ready.give_bytes) + own_bytes));
        // From here on the disks are in between, and a node that starts must know so.
        out.push(Action::Record { kept: self.wish.kept });
        // Before a rollback all was committed. What differs all the same is what a power loss took from these disks; the receiver has it.
        if !self.wish.kept && !self.is_rollback() && own_bytes > 0 && !skips_keeping() {
            out.extend([Action::Step("sending what was written here, to be kept"), Action::SendOwn(own.clone())]);
            return State::Sending { own };
        }
        self.want(&own, out)
    }

    /// What was written here is kept, or there is nothing: it may be overwritten.
    fn want(&mut self, own: &[DirtyMap], out: &mut Vec<Action>) -> State {
        if !std::mem::replace(&mut self.wish.kept, true) {
            out.push(Action::Record { kept: true });
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
                out.push(Action::Send(Message::Want(Want { volume: VolumeIndex(volume as u16), extents })));
            }
        }
        out.push(Action::Send(Message::Give));
        out.extend([Action::Step("taking what the other site has"), Action::TakePass]);
        State::Waiting { expected: 0 }
    }

    fn last_applied(&self, out: &mut Vec<Action>) -> State {
        if opens_early() {
            out.push(Action::OpenGate);
        }
        State::Handing
    }

    /// Both sites hold `point`: this one is the writer once that is recorded.
    fn ended(&mut self, point: Point, generation: Generation, compares: bool, out: &mut Vec<Action>) -> State {
        self.handed = Some((point, generation));
        if self.wish.plans {
            out.push(Action::End);
            return State::Done;
        }
        out.extend([Action::Handed { point, generation, compares }, Action::End, Action::OpenGate, Action::Unpark]);
        State::Done
    }
}

/// Whether the simulator wants to see that it notices when own blocks are overwritten before they are kept.
fn skips_keeping() -> bool {
    #[cfg(feature = "simulation")]
    return crate::sim::is_sabotaged(crate::sim::Sabotage::OverwriteBeforeKept);
    #[cfg(not(feature = "simulation"))]
    false
}

/// Whether the simulator wants to see that it notices when guests are let in before the receiver has handed over.
fn opens_early() -> bool {
    #[cfg(feature = "simulation")]
    return crate::sim::is_sabotaged(crate::sim::Sabotage::OpenGateEarly);
    #[cfg(not(feature = "simulation"))]
    false
}

#[cfg(test)]
mod tests;
