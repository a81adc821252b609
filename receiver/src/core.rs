//! The session of one primary, as a state machine.
//!
//! Pure: events in, actions out; no sockets, files or clock. Owns the order of things: who is admitted, in which order
//! passes, frames and seals may come, when an epoch is complete. What it lets through it has checked; what breaks a rule ends
//! the session with one line that both ends show.
//!
//! The journal is strictly sequential (frames of n, seal n, frames of n + 1), so the core says when the next pass
//! may be read: not between the end of an epoch's frozen pass and its seal.

use std::collections::VecDeque;
use std::sync::Arc;

use proto::control::{Hello, Staged, VERSION_MAX, VERSION_MIN};
use proto::fencing::{Admission, GroupRole, admit};
use proto::frame::FRAME_HEADER_BYTES;
use proto::hashes::{HashQuery, Hashes};
use proto::pass::PassHeader;
use proto::seal::Tally;
use proto::units::{BLOCK_BYTES, blocks_of};
use proto::{EpochId, FrameHeader, FrameKind, Generation, Message, Name, Point, Scrub, Scrubbed, Seal, SessionToken};

use crate::superblock::Volume;

mod error;
mod scrub;
mod streaming;
#[cfg(test)]
mod tests;

pub use error::SessionError;
use streaming::{OpenEpoch, Streaming};

/// Epochs whose seal has arrived and whose commit is not done. A primary that sends more is ended as misbehaving; it was told.
pub const EPOCHS_IN_FLIGHT_MAX: u16 = 16;

/// What a client may do.
#[derive(Clone, Debug)]
pub struct ClientPolicy {
    /// Its name.
    pub client: Name,
    /// The groups it may have; `None`: any, up to the limit.
    pub groups: Option<Vec<Name>>,
    /// Groups it may have in all.
    pub groups_max: usize,
    /// Volumes a group of it may have.
    pub volumes_max: usize,
    /// Bytes its volumes may have together.
    pub volume_bytes_max: u64,
}

/// What the store holds under the name of a hello.
#[derive(Clone, Debug)]
pub enum Stored {
    /// Nothing yet; the client has others.
    Absent {
        /// Groups the client has.
        groups: usize,
        /// Bytes of their volumes together.
        volume_bytes: u64,
    },
    /// A group.
    Present(StoredGroup),
    /// A group that cannot be used, and why.
    Broken(Cause),
}

/// A group in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredGroup {
    /// Its generation.
    pub generation: Generation,
    /// Following or promoted.
    pub role: GroupRole,
    /// Whether the key of this session created it.
    pub owned: bool,
    /// Its volumes.
    pub volumes: Vec<Volume>,
}

/// Why the store failed: an error of the store, shared between the log, the status and the peer.
pub type Cause = Arc<dyn std::error::Error + Send + Sync>;

/// What has arrived of an epoch and is in the journal, without its seal. It outlives the connection that brought it.
#[derive(Clone, Debug)]
pub struct Arrived {
    /// The epoch.
    pub epoch: EpochId,
    /// The pass of its last frame.
    pub pass: u16,
    /// Its frames.
    pub tally: Tally,
}

impl Arrived {
    pub(crate) fn new(epoch: EpochId) -> Self {
        Self { epoch, pass: 0, tally: Tally::default() }
    }

    /// As the primary is told.
    pub(crate) fn told(&self) -> Staged {
        Staged { epoch: self.epoch, frames: self.tally.frames, digest: self.tally.digest() }
    }
}

/// What happens to a session.
#[derive(Debug)]
pub enum Event {
    /// A control message came.
    Message(Message),
    /// Answer to [`Action::Lookup`].
    Stored(Stored),
    /// Answer to [`Action::Claim`]: the group is this session's, and stands at this commit.
    Claimed {
        /// Newest commit.
        committed: Option<Point>,
        /// The session that cut it.
        writer: SessionToken,
        /// What is there of the next epoch, from a session that broke.
        arrived: Option<Box<Arrived>>,
    },
    /// So many frames of this epoch are in the journal.
    Staged {
        /// The epoch.
        epoch: EpochId,
        /// Its frames.
        frames: u64,
    },
    /// A pass stream was opened.
    Pass(PassHeader),
    /// It ended.
    PassEnd,
    /// It was reset.
    PassReset,
    /// Answer to [`Action::Hash`].
    Hashed(Hashes),
    /// Answer to [`Action::Scrub`].
    Scrubbed(Scrubbed),
    /// The epoch of [`Action::Commit`] is durable.
    Committed(Point),
    /// The primary is to take no more writes.
    Drain,
    /// A newer session has the group.
    Superseded,
    /// The group was promoted.
    Fenced(Generation),
    /// The store failed.
    Storage(Cause),
    /// The node is stopping.
    Stopping,
}

/// What the driver has to do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a message.
    Send(Message),
    /// Look the group up; answer with [`Event::Stored`].
    Lookup {
        /// The group.
        group: Name,
    },
    /// Take the group over, creating it if `create`, provided that nothing changed since it was looked up (else answer with
    /// [`Event::Stored`] again).
    Claim {
        /// The group.
        group: Name,
        /// Generation of the session.
        generation: Generation,
        /// Whether the group is not there yet.
        create: bool,
        /// Its volumes.
        volumes: Vec<Volume>,
    },
    /// Hash a range of the newest committed point; answer with [`Event::Hashed`].
    Hash(HashQuery),
    /// Compare with the view of the epoch of the [`Action::Commit`] before, whether it is done or not, or of the newest committed point if
    /// there was none; answer with [`Event::Scrubbed`].
    Scrub(Scrub),
    /// Append the seal and make the epoch durable; answer with [`Event::Committed`].
    Commit(Seal),
    /// The primary takes no more writes, and all that it took are in this point.
    Drained(Point),
    /// Forget the frames since the last commit.
    Abandon,
    /// Close the connection once what was sent has arrived.
    Close {
        /// Close code of the connection.
        code: u16,
        /// Its reason.
        reason: String,
    },
}

/// One session.
#[derive(Debug)]
pub struct Core {
    policy: ClientPolicy,
    state: State,
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one a session")]
enum State {
    Opening,
    Looking(Hello),
    Claiming { hello: Hello, generation: Generation, volumes: Vec<Volume> },
    Streaming(Streaming),
    Closed,
}

impl State {
    fn kind(&self) -> &'static str {
        match self {
            Self::Opening => "waiting for the hello",
            Self::Looking(_) | Self::Claiming { .. } => "opening the group",
            Self::Streaming(_) => "replicating",
            Self::Closed => "closed",
        }
    }

    fn group(&self) -> Option<&Name> {
        match self {
            Self::Looking(hello) | Self::Claiming { hello, .. } => Some(&hello.group),
            Self::Streaming(s) => Some(&s.group),
            Self::Opening | Self::Closed => None,
        }
    }
}

impl Core {
    /// A session of a client whose key was verified.
    #[must_use]
    pub fn new(policy: ClientPolicy) -> Self {
        Self { policy, state: State::Opening }
    }

    /// Takes an event; the driver performs what is added to `out`, in order. Returns the reason if the session ends.
    pub fn handle(&mut self, event: Event, out: &mut Vec<Action>) -> Option<SessionError> {
        let state = std::mem::replace(&mut self.state, State::Closed);
        let group = state.group().cloned();
        match self.step(state, event, out) {
            Ok(next) => {
                self.state = next;
                None
            }
            Err(error) => {
                self.end(&error, group.is_some(), out);
                Some(error)
            }
        }
    }

    /// Ends the session for a reason that the driver found.
    pub fn fail(&mut self, error: SessionError, out: &mut Vec<Action>) -> SessionError {
        let begun = self.state.group().is_some();
        self.state = State::Closed;
        self.end(&error, begun, out);
        error
    }

    fn end(&mut self, error: &SessionError, begun: bool, out: &mut Vec<Action>) {
        // A node that stops keeps what has arrived, as one whose connection breaks does.
        if begun && !matches!(error, SessionError::Stopping) {
            out.push(Action::Abandon);
        }
        let (code, reason) = (error.code(), error.to_string());
        out.push(Action::Send(match error {
            SessionError::Fenced { generation, .. } => Message::Fenced { generation: *generation },
            _ => Message::close(code, &reason),
        }));
        out.push(Action::Close { code: code as u16, reason });
    }

    /// Whether nothing was said yet.
    pub(crate) fn is_opening(&self) -> bool {
        matches!(self.state, State::Opening)
    }

    /// Whether the next pass stream may be read now.
    #[must_use]
    pub fn wants_pass(&self) -> bool {
        match &self.state {
            State::Streaming(s) => s.pass.is_none() && s.open.as_ref().is_none_or(|o| !o.complete),
            _ => false,
        }
    }

    /// Decides on the fixed part of a frame. Returns the blocks of its volume.
    ///
    /// # Errors
    /// [`SessionError`]; the driver ends the session with [`fail`](Self::fail).
    pub fn frame_begins(&self, header: &FrameHeader) -> Result<u64, SessionError> {
        let State::Streaming(Streaming { pass: Some(pass), volume_blocks, .. }) = &self.state else {
            return Err(SessionError::Unexpected { state: self.state.kind(), message: "frame" });
        };
        if (header.epoch, header.pass) != (pass.epoch, pass.pass) {
            return Err(SessionError::FrameOrder {
                epoch: header.epoch,
                pass: header.pass,
                due_epoch: pass.epoch,
                due_pass: pass.pass,
            });
        }
        let volume = header.volume.0;
        let blocks = volume_blocks.get(usize::from(volume)).copied();
        blocks.ok_or(SessionError::FrameVolume { volume, volumes: volume_blocks.len() })
    }

    /// Counts a complete, verified frame.
    pub fn frame_arrived(&mut self, header: &FrameHeader, head: &[u8; FRAME_HEADER_BYTES], blocks: u64) {
        if let State::Streaming(Streaming { open: Some(open), .. }) = &mut self.state {
            let (data, zero) = match header.kind {
                FrameKind::Data => (blocks, 0),
                FrameKind::Zero => (0, blocks),
            };
            open.tally.add(head, header.frame_bytes(), data, zero);
        }
    }

    fn step(&self, state: State, event: Event, out: &mut Vec<Action>) -> Result<State, SessionError> {
        let group = state.group().cloned();
        match (state, event) {
            (_, Event::Stopping) => Err(SessionError::Stopping),
            (_, Event::Storage(cause)) => Err(SessionError::Storage(cause)),
            (_, Event::Message(Message::Close { code, reason })) => Err(SessionError::PeerClosed { code, reason }),
            (State::Opening, Event::Message(Message::Hello(hello))) => self.hello(hello, out),
            (State::Looking(hello), Event::Stored(stored)) => self.stored(hello, stored, out),
            // Something changed between looking and claiming: decide again.
            (State::Claiming { hello, .. }, Event::Stored(stored)) => self.stored(hello, stored, out),
            (State::Claiming { hello, generation, volumes }, Event::Claimed { committed, writer, arrived }) => {
                out.push(Action::Send(Message::Welcome {
                    version: hello.version_max.min(VERSION_MAX),
                    generation,
                    committed,
                    writer,
                    epochs_in_flight_max: EPOCHS_IN_FLIGHT_MAX,
                    staged: arrived.as_deref().map(Arrived::told),
                }));
                Ok(State::Streaming(Streaming {
                    group: hello.group,
                    generation,
                    volume_blocks: volumes.iter().map(|v| blocks_of(v.size_bytes)).collect(),
                    sealed: committed.map_or(EpochId(0), |p| p.epoch),
                    open: arrived.map(|arrived| OpenEpoch::suspended(*arrived)),
                    pass: None,
                    seals: VecDeque::new(),
                    committing: VecDeque::new(),
                    hashing: 0,
                    scrubs: Vec::new(),
                    scrubbing: 0,
                }))
            }
            (State::Streaming(s), Event::Staged { epoch, frames }) => {
                out.push(Action::Send(Message::Staged { epoch, frames }));
                Ok(State::Streaming(s))
            }
            (State::Streaming(s), Event::Pass(header)) => s.pass(header, out).map(State::Streaming),
            (State::Streaming(s), Event::PassEnd) => s.pass_end(out).map(State::Streaming),
            (State::Streaming(s), Event::PassReset) => Ok(State::Streaming(s.pass_reset(out))),
            (State::Streaming(s), Event::Message(Message::Seal(seal))) => s.seal(seal, out).map(State::Streaming),
            (State::Streaming(s), Event::Message(Message::HashQuery(query))) => s.hash(query, out).map(State::Streaming),
            (State::Streaming(mut s), Event::Hashed(hashes)) => {
                s.hashing -= 1;
                out.push(Action::Send(Message::Hashes(hashes)));
                Ok(State::Streaming(s))
            }
            (State::Streaming(s), Event::Message(Message::Scrub(scrub))) => s.scrub(scrub, out).map(State::Streaming),
            (State::Streaming(mut s), Event::Scrubbed(scrubbed)) => {
                s.scrubbing -= 1;
                out.push(Action::Send(Message::Scrubbed(scrubbed)));
                Ok(State::Streaming(s))
            }
            (State::Streaming(s), Event::Drain) => {
                out.push(Action::Send(Message::Drain));
                Ok(State::Streaming(s))
            }
            (State::Streaming(s), Event::Message(Message::Drained { point })) => {
                out.push(Action::Drained(point));
                Ok(State::Streaming(s))
            }
            (State::Streaming(s), Event::Committed(point)) => Ok(State::Streaming(s.committed(point, out))),
            (state, Event::Message(message)) => Err(SessionError::Unexpected { state: state.kind(), message: message.kind() }),
            (state, event) => match (event, group) {
                (Event::Superseded, Some(group)) => Err(SessionError::Superseded { group }),
                (Event::Fenced(generation), Some(group)) => Err(SessionError::Fenced { group, generation }),
                // The driver's own events come only in answer to an action; late ones find the session closed.
                _ => Ok(state),
            },
        }
    }

    fn hello(&self, hello: Hello, out: &mut Vec<Action>) -> Result<State, SessionError> {
        if hello.version_min > VERSION_MAX || hello.version_max < VERSION_MIN {
            return Err(SessionError::Version { theirs_min: hello.version_min, theirs_max: hello.version_max });
        }
        if u64::from(hello.block_bytes) != BLOCK_BYTES {
            return Err(SessionError::BlockSize { theirs: hello.block_bytes });
        }
        if self.policy.groups.as_ref().is_some_and(|groups| !groups.contains(&hello.group)) {
            return Err(SessionError::UnknownGroup { group: hello.group, client: self.policy.client.clone() });
        }
        if hello.volumes.len() > self.policy.volumes_max {
            let (given, max) = (hello.volumes.len(), self.policy.volumes_max);
            return Err(SessionError::Volumes { group: hello.group, given, max });
        }
        out.push(Action::Lookup { group: hello.group.clone() });
        Ok(State::Looking(hello))
    }

    fn stored(&self, hello: Hello, stored: Stored, out: &mut Vec<Action>) -> Result<State, SessionError> {
        let client = || self.policy.client.clone();
        let group = hello.group.clone();
        let given = hello.volumes.iter().map(|v| Volume { name: v.name.clone(), size_bytes: v.size_bytes });
        let given: Vec<Volume> = given.collect();
        let (ours, role, create) = match stored {
            Stored::Broken(cause) => return Err(SessionError::Storage(cause)),
            Stored::Absent { groups, .. } if groups >= self.policy.groups_max => {
                return Err(SessionError::Groups { client: client(), max: self.policy.groups_max });
            }
            Stored::Absent { volume_bytes, .. } if total(volume_bytes, &given) > self.policy.volume_bytes_max => {
                let given = total(volume_bytes, &given);
                return Err(SessionError::VolumeBytes { group, client: client(), given, max: self.policy.volume_bytes_max });
            }
            Stored::Absent { .. } => (Generation(0), GroupRole::Replica, true),
            Stored::Present(stored) if !stored.owned => return Err(SessionError::Owner { group, client: client() }),
            Stored::Present(stored) => {
                same_volumes(&group, &stored.volumes, &given)?;
                (stored.generation, stored.role, false)
            }
        };
        match admit(ours, role, hello.generation) {
            Admission::Admit { generation } => {
                out.push(Action::Claim { group, generation, create, volumes: given.clone() });
                Ok(State::Claiming { hello, generation, volumes: given })
            }
            Admission::Fenced { generation } => Err(SessionError::Fenced { group, generation }),
            Admission::Ahead { ours, theirs } => Err(SessionError::Ahead { group, ours, theirs }),
        }
    }
}

/// Bytes of volumes together with those that are there.
pub(crate) fn total(before: u64, volumes: &[Volume]) -> u64 {
    volumes.iter().fold(before, |sum, v| sum.saturating_add(v.size_bytes))
}

pub(crate) fn same_volumes(group: &Name, stored: &[Volume], given: &[Volume]) -> Result<(), SessionError> {
    if stored.len() != given.len() {
        return Err(SessionError::VolumeCount { group: group.clone(), stored: stored.len(), given: given.len() });
    }
    for (i, (s, g)) in stored.iter().zip(given).enumerate() {
        if s.name != g.name {
            let (stored, given) = (s.name.clone(), g.name.clone());
            return Err(SessionError::VolumeName { group: group.clone(), number: i + 1, stored, given });
        }
        if s.size_bytes != g.size_bytes {
            let (stored, given) = (s.size_bytes, g.size_bytes);
            return Err(SessionError::VolumeSize { group: group.clone(), volume: s.name.clone(), stored, given });
        }
    }
    Ok(())
}
