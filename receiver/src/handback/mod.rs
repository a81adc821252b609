//! Gives a group's disks back to its primary: after a failover, or to an earlier point. `proto::handback` has the conversation.
//!
//! Always holds: until the superblock is written in the last step, the copy is what it was, and the activated copy goes on; after it the
//! primary is the only writer, and the newest point is what it was given. What is sent is staged in the journal as an epoch that
//! nobody sees before that step, so a conversation that breaks has changed nothing but the forks it was asked to keep.

mod give;
mod keep;

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{FuturesOrdered, StreamExt};
use proto::control::{VERSION_MAX, VERSION_MIN};
use proto::fencing::GroupRole;
use proto::handback::{Ask, Ready, Want};
use proto::hashes::{HashQuery, Hashes, QUERIES_IN_FLIGHT_MAX};
use proto::units::{BLOCK_BYTES, blocks_of};
use proto::{CloseCode, DecodeError, DirtyMap, Generation, Message, Name, Point};
use quinn::{Connection, RecvStream, SendStream, VarInt};
use tokio::sync::{mpsc, watch};

use crate::core::{Cause, SessionError, same_volumes};
use crate::fork::OpenFork;
use crate::group::{Group, GroupError, GroupEvent, Peer, SessionId};
use crate::input::ControlInput;
use crate::node::Node;
use crate::pins::{Pin as PointPin, Pinned};
use crate::session::{Client, one_line};
use crate::superblock::Volume;
use crate::view::{View, views};

/// A primary that says nothing for so long has gone: it answers each pass once that is on its disks.
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);
/// Guests of the activated copy are held up for so long at most; then it goes on, and the handback is given up.
const HANDOVER_DEADLINE: Duration = Duration::from_secs(60);

/// Why a handback ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandbackError {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("group '{group}' is not active here: there is nothing to give back; its primary may write")]
    NotActive { group: Name },
    #[error("group '{group}' is active here: give it back first (`twinsite failback {group}` at its primary), then roll back")]
    Active { group: Name },
    #[error("client '{client}' may not have its disks back: its `handback` is false at the receiver")]
    Forbidden { client: Name },
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error("cannot give back group '{group}': {source}")]
    Io { group: Name, source: std::io::Error },
    #[error("the primary sent {message} while this side was {state}")]
    Unexpected { message: &'static str, state: &'static str },
    #[error("the primary's own blocks did not arrive as it sent them: try again")]
    Diverged,
    #[error("the primary sent more blocks of its own than its disks have")]
    Endless,
    #[error("client '{client}' has no space left for what its primary wrote of its own ({bytes} bytes): raise `space_max`")]
    Space { client: Name, bytes: u64 },
    #[error("group '{group}' keeps {count} forks of its primary's own writes already: delete some first")]
    Forks { group: Name, count: usize },
    #[error("the primary has {QUERIES_IN_FLIGHT_MAX} unanswered hash queries: update the older side")]
    Queries,
    #[error("the primary sent what is no message or frame: {0}")]
    Decode(#[from] DecodeError),
    #[error("connection lost: {0}")]
    Lost(String),
    #[error("the primary did not answer within {} s", ANSWER_DEADLINE.as_secs())]
    Silent,
    #[error("the last blocks were not at the primary within {} s: the active copy goes on, try again", HANDOVER_DEADLINE.as_secs())]
    Slow,
    #[error("another session of this group took over")]
    Superseded,
    #[error("{0}")]
    Storage(Cause),
    #[error("the node is stopping")]
    Stopping,
}

impl HandbackError {
    fn code(&self) -> CloseCode {
        match self {
            Self::Session(error) => error.code(),
            Self::NotActive { .. } | Self::Active { .. } | Self::Forbidden { .. } => CloseCode::Mismatch,
            Self::Group(_) | Self::Io { .. } | Self::Storage(_) => CloseCode::Storage,
            Self::Space { .. } | Self::Forks { .. } => CloseCode::Limit,
            Self::Unexpected { .. } | Self::Diverged | Self::Endless | Self::Queries | Self::Decode(_) => CloseCode::Misbehaved,
            Self::Lost(_) | Self::Silent | Self::Slow | Self::Stopping => CloseCode::Stopping,
            Self::Superseded => CloseCode::Superseded,
        }
    }
}

/// The connection of a primary that asked.
pub(crate) struct Line {
    pub(crate) connection: Connection,
    pub(crate) send: SendStream,
    pub(crate) recv: RecvStream,
    pub(crate) input: ControlInput,
    pub(crate) stop: watch::Receiver<bool>,
}

impl Line {
    async fn tell(&mut self, message: &Message) -> Result<(), HandbackError> {
        self.send.write_all(&message.encode()).await.map_err(|error| HandbackError::Lost(one_line(&error)))
    }

    /// The next message. Loses nothing when it is dropped.
    async fn next(&mut self) -> Result<Message, HandbackError> {
        loop {
            if let Some(message) = self.input.next()? {
                return Ok(message);
            }
            let chunk = tokio::select! {
                biased;
                _ = self.stop.wait_for(|stop| *stop) => return Err(HandbackError::Stopping),
                chunk = self.recv.read_chunk(proto::control::MESSAGE_BYTES_MAX, true) => chunk,
                () = tokio::time::sleep(ANSWER_DEADLINE) => return Err(HandbackError::Silent),
            };
            match chunk {
                Ok(Some(chunk)) => self.input.push(&chunk.bytes),
                Ok(None) => return Err(HandbackError::Lost("the primary closed its control stream".to_owned())),
                Err(error) => return Err(HandbackError::Lost(one_line(&error))),
            }
        }
    }
}

/// A handback under way.
struct Handback {
    line: Line,
    node: Arc<Node>,
    client: Arc<Client>,
    group: Arc<Group>,
    id: SessionId,
    ask: Ask,
    ready: Ready,
    /// What is given back; without it an earlier point is.
    fork: Option<Arc<OpenFork>>,
    /// Views of the newest point, for the primary's comparison.
    newest: Arc<Vec<View>>,
    /// Blocks to be sent in the first pass, by volume.
    give: Vec<DirtyMap>,
    /// What is given stays until it is there.
    _pin: Option<PointPin>,
    events: mpsc::Receiver<GroupEvent>,
}

impl Drop for Handback {
    fn drop(&mut self) {
        if let Some(fork) = &self.fork {
            fork.volumes.iter().for_each(|(_, device)| device.unfollow());
        }
    }
}

/// Serves a primary that asked, to the end.
pub(crate) async fn serve(line: Line, node: Arc<Node>, client: Arc<Client>, ask: Ask) {
    let (peer, connection) = (line.connection.remote_address(), line.connection.clone());
    let label = format!("{}/{} from {peer}", client.config.name, ask.group);
    match run(line, node, client, ask).await {
        Ok(()) => {}
        Err((error, line)) => {
            tracing::warn!("{label}: handback: {error}");
            let (code, reason) = (error.code(), error.to_string());
            if let Some(mut line) = line {
                let last = match &error {
                    HandbackError::Session(SessionError::Fenced { generation, .. }) => {
                        Message::Fenced { generation: *generation }
                    }
                    _ => Message::close(code, &reason),
                };
                if line.tell(&last).await.is_ok() && line.send.finish().is_ok() {
                    let _ = tokio::time::timeout(crate::session::LAST_WORDS_DEADLINE, line.send.stopped()).await;
                }
            }
            connection.close(VarInt::from_u32(u32::from(code as u16)), reason.as_bytes());
        }
    }
}

type Failed = (HandbackError, Option<Line>);

async fn run(mut line: Line, node: Arc<Node>, client: Arc<Client>, ask: Ask) -> Result<(), Failed> {
    let opened = match open(&node, &client, &ask).await {
        Ok(opened) => opened,
        Err(error) => return Err((error, Some(line))),
    };
    let (group, ready, fork, newest, give, pin) = match opened {
        Opened::Done { point, generation } => {
            let told = line.tell(&Message::Handed { point, generation }).await;
            return match told {
                Ok(()) => {
                    end(&mut line).await;
                    Ok(())
                }
                Err(error) => Err((error, Some(line))),
            };
        }
        Opened::Begun { group, ready, fork, newest, give, pin } => (group, ready, fork, newest, give, pin),
    };
    let (id, (_, events)) = (node.next_session(), mpsc::channel(1));
    let mut handback =
        Handback { line, node, client, group, id, ask, ready, fork, newest: Arc::new(newest), give, _pin: pin, events };
    match handback.converse().await {
        Ok(()) => {
            end(&mut handback.line).await;
            Ok(())
        }
        Err(error) => {
            handback.group.release(handback.id, format!("handback: {error}")).await;
            if let Err(error) = handback.line.tell(&Message::close(error.code(), &error.to_string())).await {
                tracing::debug!(%error, "the primary is not told why");
            }
            let _ = handback.line.send.finish();
            let _ = tokio::time::timeout(crate::session::LAST_WORDS_DEADLINE, handback.line.send.stopped()).await;
            Err((error, None))
        }
    }
}

/// Waits until the primary has heard the last word.
async fn end(line: &mut Line) {
    if line.send.finish().is_ok() {
        let _ = tokio::time::timeout(crate::session::LAST_WORDS_DEADLINE, line.send.stopped()).await;
    }
    line.connection.close(VarInt::from_u32(u32::from(CloseCode::Stopping as u16)), b"handed back");
}

enum Opened {
    /// An earlier conversation came to its end, and the primary did not hear it.
    Done { point: Point, generation: Generation },
    Begun {
        group: Arc<Group>,
        ready: Ready,
        fork: Option<Arc<OpenFork>>,
        newest: Vec<View>,
        give: Vec<DirtyMap>,
        pin: Option<PointPin>,
    },
}

/// Checks what is asked, and finds out what would be given.
async fn open(node: &Arc<Node>, client: &Arc<Client>, ask: &Ask) -> Result<Opened, HandbackError> {
    let (name, group) = (client.config.name.clone(), ask.group.clone());
    if ask.version_min > VERSION_MAX || ask.version_max < VERSION_MIN {
        return Err(SessionError::Version { theirs_min: ask.version_min, theirs_max: ask.version_max }.into());
    }
    if u64::from(ask.block_bytes) != BLOCK_BYTES {
        return Err(SessionError::BlockSize { theirs: ask.block_bytes }.into());
    }
    let allowed = client.config.groups.as_ref().is_none_or(|groups| groups.contains(&group));
    let found = node.get(&name, &group).filter(|_| allowed);
    let found = found.ok_or_else(|| SessionError::UnknownGroup { group: group.clone(), client: name.clone() })?;
    let stored = found.stored(client.key);
    if !stored.owned {
        return Err(SessionError::Owner { group, client: name }.into());
    }
    if !client.config.handback {
        return Err(HandbackError::Forbidden { client: name });
    }
    let given = ask.volumes.iter().map(|v| Volume { name: v.name.clone(), size_bytes: v.size_bytes });
    same_volumes(&group, &stored.volumes, &given.collect::<Vec<_>>())?;
    let (newest, writer, generation) = {
        let state = found.shared.state.read();
        let newest = state.points.last().map(|p| (p.point, p.session));
        let (newest, writer) = newest.ok_or_else(|| GroupError::Empty { group: group.clone() })?;
        (newest, writer, state.generation)
    };
    if stored.role == GroupRole::Replica && writer == ask.token {
        return Ok(Opened::Done { point: newest, generation });
    }
    let (from, fork) = match (stored.role, ask.to) {
        (GroupRole::Active, None) => {
            let fork = crate::node::activate(&found, None).await?;
            (fork.point, Some(fork))
        }
        (GroupRole::Replica, None) if ask.generation < generation => {
            return Err(SessionError::Fenced { group, generation }.into());
        }
        (GroupRole::Replica, None) => return Err(HandbackError::NotActive { group }),
        (GroupRole::Active, Some(_)) => return Err(HandbackError::Active { group }),
        (GroupRole::Replica, Some(_)) if ask.generation != generation => {
            return Err(SessionError::Fenced { group, generation }.into());
        }
        (GroupRole::Replica, Some(point)) => (point, None),
    };
    let shared = Arc::clone(&found.shared);
    let looked = tokio::task::spawn_blocking(move || {
        let (Pinned { index: then, _pin: pin }, now) = (shared.index_at(from)?, shared.index_at(newest)?);
        let volumes = (0..shared.volumes.len()).filter_map(|v| Some((now.index.volume(v)?, then.volume(v)?)));
        let give = volumes.map(|(now, then)| now.differing(then)).collect::<Vec<_>>();
        Ok::<_, GroupError>((views(&shared, now)?, give, pin))
    });
    let closed = || GroupError::Closed { group: group.clone() };
    let (views, mut give, pin) = looked.await.map_err(|_| closed())??;
    if let Some(fork) = &fork {
        for (map, (_, device)) in give.iter_mut().zip(&fork.volumes) {
            map.merge(&device.follow());
        }
    }
    let give_bytes = give.iter().map(DirtyMap::bytes).sum();
    let version = ask.version_max.min(VERSION_MAX);
    let ready = Ready { version, generation, newest, from, give_bytes };
    Ok(Opened::Begun { group: found, ready, fork, newest: views, give, pin })
}

type Hashing = Pin<Box<dyn Future<Output = Result<Hashes, Cause>> + Send>>;

impl Handback {
    async fn converse(&mut self) -> Result<(), HandbackError> {
        self.line.tell(&Message::Ready(self.ready)).await?;
        if !self.prepare().await? {
            return Ok(());
        }
        self.hand().await
    }

    fn io(&self) -> impl Fn(std::io::Error) -> HandbackError + use<> {
        let group = self.ask.group.clone();
        move |source| HandbackError::Io { group: group.clone(), source }
    }

    /// Answers questions, keeps what the primary had of its own, takes what it wants. Returns whether it wants to be given anything: a
    /// primary that only asks what would come closes the connection.
    async fn prepare(&mut self) -> Result<bool, HandbackError> {
        let mut hashing: FuturesOrdered<Hashing> = FuturesOrdered::new();
        let mut kept: VecDeque<keep::Kept> = VecDeque::new();
        loop {
            let connection = self.line.connection.clone();
            tokio::select! {
                biased;
                Some(hashes) = hashing.next() => {
                    let hashes = hashes.map_err(HandbackError::Storage)?;
                    self.line.tell(&Message::Hashes(hashes)).await?;
                }
                stream = connection.accept_uni(), if kept.is_empty() && self.fork.is_some() => {
                    let stream = stream.map_err(|error| HandbackError::Lost(one_line(&error)))?;
                    kept.push_back(self.keep(stream).await?);
                }
                message = self.line.next() => match message {
                    Ok(Message::HashQuery(query)) => {
                        if hashing.len() >= QUERIES_IN_FLIGHT_MAX {
                            return Err(HandbackError::Queries);
                        }
                        hashing.push_back(self.hash(query)?);
                    }
                    // Before a rollback all is committed: there is nothing that only the primary has.
                    Ok(Message::Diverged { frames, digest }) if self.fork.is_some() => {
                        // The stream may be behind the message that speaks of it.
                        let done = match kept.pop_front() {
                            Some(done) => done,
                            None => {
                                let stream = connection.accept_uni().await;
                                self.keep(stream.map_err(|error| HandbackError::Lost(one_line(&error)))?).await?
                            }
                        };
                        let name = self.name(done, frames, digest).await?;
                        self.line.tell(&Message::Kept { name }).await?;
                    }
                    Ok(Message::Want(want)) => self.want(&want)?,
                    Ok(Message::Give) if kept.is_empty() && hashing.is_empty() => return Ok(true),
                    Ok(Message::Close { .. }) => return Ok(false),
                    Ok(other) => return Err(HandbackError::Unexpected { message: other.kind(), state: "waiting to give" }),
                    // Whoever only asked has gone.
                    Err(HandbackError::Lost(_)) => return Ok(false),
                    Err(error) => return Err(error),
                }
            }
        }
    }

    fn hash(&self, query: HashQuery) -> Result<Hashing, HandbackError> {
        let volume = usize::from(query.volume.0);
        let blocks = self.group.shared.volumes.get(volume).map_or(0, |v| blocks_of(v.size_bytes));
        if query.end() > blocks {
            return Err(SessionError::HashRange { volume: query.volume.0, end: query.end(), blocks }.into());
        }
        let hasher = self.node.hasher().map_err(self.io())?;
        Ok(Box::pin(hasher.answer(Arc::clone(&self.newest), query)))
    }

    fn want(&mut self, want: &Want) -> Result<(), HandbackError> {
        let volume = usize::from(want.volume.0);
        let blocks = self.group.shared.volumes.get(volume).map_or(0, |v| blocks_of(v.size_bytes));
        let end = want.extents.last().map_or(0, |e| e.end());
        let map = self.give.get_mut(volume).filter(|_| end <= blocks);
        let Some(map) = map else {
            return Err(SessionError::HashRange { volume: want.volume.0, end, blocks }.into());
        };
        want.extents.iter().for_each(|extent| map.mark(extent.start.0, extent.blocks.into()));
        Ok(())
    }

    /// Takes the group over, so that the journal has nobody else's frames, sends, and hands over in the end.
    async fn hand(&mut self) -> Result<(), HandbackError> {
        let role = if self.fork.is_some() { GroupRole::Active } else { GroupRole::Replica };
        let peer =
            Peer { address: self.line.connection.remote_address(), since_unix_us: crate::clock::unix_us(), interval_ms: 0 };
        let (events, inbox) = mpsc::channel(crate::group::SESSION_EVENTS_MAX);
        self.events = inbox;
        let stands = self.group.claim_handback(self.id, peer, (role, self.ready.generation), events).await?;
        if stands != self.ready.newest {
            // Something was committed since the primary compared.
            return Err(HandbackError::Superseded);
        }
        // The point that ends this carries the primary's token, so there is always something in it.
        if let Some(first) = self.give.first_mut() {
            first.mark(0, 1);
        }
        let (client, group) = (self.client.config.name.clone(), self.ask.group.clone());
        let what = self.ask.to.map_or_else(|| "its active copy".to_owned(), |point| format!("point {point}"));
        tracing::warn!("{client}/{group}: giving {what} back to {}", self.line.connection.remote_address());
        let (point, generation) = self.give().await?;
        // Whoever still has the fork open finds its gate closed; nobody opens it again.
        *self.group.active.lock().await = None;
        if let Some(fork) = &self.fork {
            let flattening = self.group.flattening.lock().take();
            if let Some(flattening) = flattening {
                flattening.stop().await;
            }
            self.forget(&fork.name).await;
        }
        self.node.handed();
        tracing::warn!("{client}/{group}: handed back at point {point}; generation {generation} holds");
        self.line.tell(&Message::Handed { point, generation }).await
    }
}
