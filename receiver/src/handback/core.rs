//! What a receiver does that gives a group back: decides, never does.
//!
//! Pure: events in with the time, actions out; no sockets, files or clock, so that the simulator runs it too. Owns the order of things: what may be
//! asked when, when a pass is the last, and that nothing is handed over before the primary has all of it.

use std::time::{Duration, Instant};

use proto::handback::{HANDBACK_PASSES_MAX, Ready, Want};
use proto::hashes::{HashQuery, Hashes, QUERIES_IN_FLIGHT_MAX};
use proto::pass::PassKind;
use proto::{Generation, Message, Name, Point};

use super::HandbackError;
use crate::core::SessionError;

/// A primary that says nothing for so long is stuck: it answers each pass once that is on its disks, which may be slow ones. That it is there at all, the
/// connection tells.
pub(crate) const ANSWER_DEADLINE: Duration = Duration::from_secs(1800);
/// Guests of the activated copy are held up for so long at most; then it goes on, and the handback is given up.
pub(crate) const HANDOVER_DEADLINE: Duration = Duration::from_secs(60);
/// No more than this is left for the pass that holds guests up.
const FREEZE_BYTES: u64 = 8 << 20;
/// A pass that leaves more than this share of its own size changed has stopped converging.
const CONVERGENCE_PERCENT: u64 = 75;

/// What was found when the group was looked at.
#[derive(Clone, Debug)]
pub(crate) enum Looked {
    /// An earlier conversation came to its end, and the primary did not hear it.
    Done { point: Point, generation: Generation },
    /// It can be given.
    Begun {
        ready: Ready,
        /// Blocks of its volumes.
        volume_blocks: Vec<u64>,
        /// Whether an active copy is given back, and not an earlier point.
        is_failback: bool,
    },
}

/// What happened.
#[derive(Debug)]
pub(crate) enum Event {
    /// Answer to [`Action::Look`].
    Looked(Looked),
    /// The primary said something.
    Message(Message),
    /// It opened a stream.
    Upload,
    /// What came on it is there, durably: so many frames with this digest.
    Arrived { frames: u64, digest: [u8; 32] },
    /// Answer to [`Action::Name`].
    Named(Name),
    /// Answer to [`Action::Hash`].
    Hashed(Hashes),
    /// Answer to [`Action::Claim`]: the group's newest point.
    Claimed(Point),
    /// The pass is sent and staged; it had blocks of so many bytes.
    Sent { bytes: u64 },
    /// Answer to [`Action::Changed`]: so many bytes of blocks are to be sent again.
    Changed { bytes: u64 },
    /// Answer to [`Action::Hold`].
    Held,
    /// Answer to [`Action::Seal`]: the generation from here on; `None` if another session has the group.
    Handed(Option<(Point, Generation)>),
    /// The connection is gone.
    Gone(String),
    /// Time passed.
    Tick,
}

/// What to do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Look at the group; answer with [`Event::Looked`].
    Look,
    /// Send a message.
    Send(Message),
    /// Hash a range of the newest point; answer with [`Event::Hashed`].
    Hash(HashQuery),
    /// Keep what comes on the stream, each block once; answer with [`Event::Arrived`].
    Keep,
    /// Give what arrived its name, durably; answer with [`Event::Named`].
    Name,
    /// These blocks are to be in the first pass too.
    Want(Want),
    /// Take the group over, so that the journal has nobody else's frames; answer with [`Event::Claimed`].
    Claim,
    /// Send and stage a pass of what is to be sent; answer with [`Event::Sent`].
    Pass { pass: u16, kind: PassKind },
    /// Find out what the active copy's guests changed since; answer with [`Event::Changed`].
    Changed,
    /// Hold the active copy's guests up, and add what they changed since; answer with [`Event::Held`].
    Hold,
    /// Seal what was staged in so many passes and let the primary write: from here on there is no way back. Answer with [`Event::Handed`].
    Seal { passes: u16 },
    /// The group was handed over: what it took is not needed any more.
    CleanUp,
}

/// What the primary had written of its own.
#[derive(Debug)]
enum Upload {
    None,
    Arriving,
    /// It is there; its name waits for the primary's word.
    Arrived {
        frames: u64,
        digest: [u8; 32],
    },
    Naming,
    Kept,
}

#[derive(Debug)]
enum State {
    Looking,
    Preparing {
        hashing: usize,
        upload: Upload,
        /// The primary's word, which may overtake the stream.
        diverged: Option<(u64, [u8; 32])>,
        heard: Instant,
    },
    Claiming,
    /// A pass is being sent, or on its way to the primary's disks.
    Giving {
        pass: u16,
        kind: PassKind,
        /// Bytes of its blocks, once it is sent.
        sent: Option<u64>,
        applied: bool,
        deadline: Instant,
    },
    /// It is being looked what has changed since a pass of so many bytes.
    Counting {
        pass: u16,
        bytes: u64,
    },
    Holding {
        pass: u16,
        deadline: Instant,
    },
    Sealing,
    Over,
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            Self::Looking => "looking at the group",
            Self::Preparing { .. } => "waiting to give",
            Self::Claiming => "taking the group over",
            Self::Giving { .. } | Self::Counting { .. } | Self::Holding { .. } => "waiting for a pass to be applied",
            Self::Sealing => "handing over",
            Self::Over => "done",
        }
    }
}

/// One conversation.
#[derive(Debug)]
pub(crate) struct Core {
    state: State,
    ready: Option<Ready>,
    volume_blocks: Vec<u64>,
    is_failback: bool,
}

impl Core {
    /// Begins.
    pub(crate) fn begin(out: &mut Vec<Action>) -> Self {
        out.push(Action::Look);
        Self { state: State::Looking, ready: None, volume_blocks: Vec::new(), is_failback: false }
    }

    /// Whether all is said.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    /// Whether a stream of the primary's is to be accepted.
    pub(crate) fn wants_upload(&self) -> bool {
        // Before a rollback all was committed: there is nothing that only the primary has.
        matches!(self.state, State::Preparing { upload: Upload::None, .. }) && self.is_failback
    }

    /// When a tick is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Preparing { heard, .. } => Some(*heard + ANSWER_DEADLINE),
            // A pass that holds nobody up may be long on its way.
            State::Giving { sent: None, kind, .. } if !self.holds(*kind) => None,
            State::Giving { deadline, .. } | State::Holding { deadline, .. } => Some(*deadline),
            _ => None,
        }
    }

    /// Takes an event.
    ///
    /// # Errors
    /// [`HandbackError`]; the conversation is over then. Nothing was handed over.
    pub(crate) fn handle(&mut self, now: Instant, event: Event, out: &mut Vec<Action>) -> Result<(), HandbackError> {
        let state = std::mem::replace(&mut self.state, State::Over);
        self.state = self.next(state, now, event, out)?;
        Ok(())
    }

    fn next(&mut self, state: State, now: Instant, event: Event, out: &mut Vec<Action>) -> Result<State, HandbackError> {
        match (state, event) {
            (State::Looking, Event::Looked(Looked::Done { point, generation })) => {
                out.push(Action::Send(Message::Handed { point, generation }));
                Ok(State::Over)
            }
            (State::Looking, Event::Looked(Looked::Begun { ready, volume_blocks, is_failback })) => {
                (self.ready, self.volume_blocks, self.is_failback) = (Some(ready), volume_blocks, is_failback);
                out.push(Action::Send(Message::Ready(ready)));
                Ok(State::Preparing { hashing: 0, upload: Upload::None, diverged: None, heard: now })
            }
            (state @ State::Preparing { .. }, event) => self.prepare(state, now, event, out),
            (_, Event::Message(Message::Close { reason, .. })) => {
                Err(HandbackError::Lost(format!("the primary gave up: {reason}")))
            }
            (_, Event::Gone(why)) => Err(HandbackError::Lost(why)),
            (State::Claiming, Event::Claimed(stands)) => {
                if Some(stands) != self.ready.map(|ready| ready.newest) {
                    // Something was committed since the primary compared.
                    return Err(HandbackError::Superseded);
                }
                let kind = if self.is_failback { PassKind::Fuzzy } else { PassKind::Frozen };
                Ok(Self::give(0, kind, now + ANSWER_DEADLINE, out))
            }
            (State::Giving { pass, kind, applied, deadline, .. }, Event::Sent { bytes }) => {
                // Only a pass that holds guests up has a deadline for all of it.
                let deadline = if self.holds(kind) { deadline } else { now + ANSWER_DEADLINE };
                Ok(self.given(State::Giving { pass, kind, sent: Some(bytes), applied, deadline }, out))
            }
            (State::Giving { pass, kind, sent, applied: false, deadline }, Event::Message(Message::Applied { pass: theirs }))
                if theirs == pass =>
            {
                Ok(self.given(State::Giving { pass, kind, sent, applied: true, deadline }, out))
            }
            (State::Giving { kind, deadline, .. }, Event::Tick) if now >= deadline && self.holds(kind) => {
                Err(HandbackError::Slow)
            }
            (State::Giving { sent: Some(_), deadline, .. }, Event::Tick) if now >= deadline => Err(HandbackError::Silent),
            (State::Counting { pass, bytes }, Event::Changed { bytes: left }) => {
                let is_converging = left * 100 <= bytes * CONVERGENCE_PERCENT;
                if left > FREEZE_BYTES && is_converging && pass + 1 < HANDBACK_PASSES_MAX {
                    return Ok(Self::give(pass, PassKind::Fuzzy, now + ANSWER_DEADLINE, out));
                }
                out.push(Action::Hold);
                Ok(State::Holding { pass, deadline: now + HANDOVER_DEADLINE })
            }
            (State::Holding { pass, deadline }, Event::Held) => Ok(Self::give(pass, PassKind::Frozen, deadline, out)),
            (State::Holding { deadline, .. }, Event::Tick) if now >= deadline => Err(HandbackError::Slow),
            (State::Sealing, Event::Handed(Some((point, generation)))) => {
                out.extend([Action::CleanUp, Action::Send(Message::Handed { point, generation })]);
                Ok(State::Over)
            }
            (State::Sealing, Event::Handed(None)) => Err(HandbackError::Superseded),
            (state, Event::Message(message)) => Err(HandbackError::Unexpected { message: message.kind(), state: state.name() }),
            (state, _) => Ok(state),
        }
    }

    /// Answers questions, has what the primary had of its own kept, takes what it wants.
    fn prepare(&mut self, state: State, now: Instant, event: Event, out: &mut Vec<Action>) -> Result<State, HandbackError> {
        let State::Preparing { mut hashing, mut upload, mut diverged, heard } = state else { return Ok(state) };
        match event {
            Event::Message(Message::HashQuery(query)) => {
                if hashing >= QUERIES_IN_FLIGHT_MAX {
                    return Err(HandbackError::Queries);
                }
                self.within(query.volume.0, query.end())?;
                hashing += 1;
                out.push(Action::Hash(query));
            }
            Event::Hashed(hashes) => {
                hashing -= 1;
                out.push(Action::Send(Message::Hashes(hashes)));
            }
            Event::Upload => {
                upload = Upload::Arriving;
                out.push(Action::Keep);
            }
            Event::Arrived { frames, digest } => upload = Upload::Arrived { frames, digest },
            Event::Message(Message::Diverged { frames, digest }) if self.is_failback && diverged.is_none() => {
                diverged = Some((frames, digest));
            }
            Event::Named(name) => {
                upload = Upload::Kept;
                out.push(Action::Send(Message::Kept { name }));
            }
            Event::Message(Message::Want(want)) => {
                self.within(want.volume.0, want.extents.last().map_or(0, |e| e.end()))?;
                out.push(Action::Want(want));
            }
            Event::Message(Message::Give)
                if hashing == 0 && diverged.is_none() && matches!(upload, Upload::None | Upload::Kept) =>
            {
                out.push(Action::Claim);
                return Ok(State::Claiming);
            }
            // Whoever only asked has gone.
            Event::Message(Message::Close { .. }) | Event::Gone(_) => return Ok(State::Over),
            Event::Message(other) => return Err(HandbackError::Unexpected { message: other.kind(), state: "waiting to give" }),
            Event::Tick if now >= heard + ANSWER_DEADLINE => return Err(HandbackError::Silent),
            Event::Tick => return Ok(State::Preparing { hashing, upload, diverged, heard }),
            _ => {}
        }
        if let (Upload::Arrived { frames, digest }, Some(told)) = (&upload, diverged) {
            if (*frames, *digest) != told {
                return Err(HandbackError::Diverged);
            }
            (upload, diverged) = (Upload::Naming, None);
            out.push(Action::Name);
        }
        Ok(State::Preparing { hashing, upload, diverged, heard: now })
    }

    fn within(&self, volume: u16, end: u64) -> Result<(), HandbackError> {
        let blocks = self.volume_blocks.get(usize::from(volume)).copied();
        match blocks {
            Some(blocks) if end <= blocks => Ok(()),
            _ => Err(SessionError::HashRange { volume, end, blocks: blocks.unwrap_or(0) }.into()),
        }
    }

    /// Whether guests wait for such a pass.
    fn holds(&self, kind: PassKind) -> bool {
        self.is_failback && kind == PassKind::Frozen
    }

    fn give(pass: u16, kind: PassKind, deadline: Instant, out: &mut Vec<Action>) -> State {
        out.push(Action::Pass { pass, kind });
        State::Giving { pass, kind, sent: None, applied: false, deadline }
    }

    /// What follows a pass that is on the primary's disks.
    fn given(&self, state: State, out: &mut Vec<Action>) -> State {
        match state {
            State::Giving { pass, kind: PassKind::Frozen, sent: Some(_), applied: true, .. } => {
                out.push(Action::Seal { passes: pass + 1 });
                State::Sealing
            }
            State::Giving { pass, kind: PassKind::Fuzzy, sent: Some(bytes), applied: true, .. } => {
                out.push(Action::Changed);
                State::Counting { pass: pass + 1, bytes }
            }
            state => state,
        }
    }
}

#[cfg(test)]
mod tests;
