//! Gives a group's disks back to its primary: after a failover, or to an earlier point. `proto::handback` has the conversation.
//!
//! Always holds: until the superblock is written in the last step, the copy is what it was, and the activated copy goes on; after it the
//! primary is the only writer, and the newest point is what it was given. What is sent is staged in the journal as an epoch that
//! nobody sees before that step, so a conversation that breaks has changed nothing but the forks it was asked to keep.

pub(crate) mod core;
pub(crate) mod give;
pub(crate) mod keep;
pub(crate) mod look;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use blockdev::steps::{Step, reach};
use blockdev::{IoThreads, read_blocks};
use futures_util::stream::{FuturesOrdered, StreamExt};
use proto::handback::Ask;
use proto::hashes::{HashQuery, Hashes, QUERIES_IN_FLIGHT_MAX};
use proto::pack::Wanted;
use proto::{BlockExtent, CloseCode, DecodeError, Message, Name};
use quinn::{Connection, RecvStream, SendStream, VarInt};
use tokio::sync::watch;

use self::core::{ANSWER_DEADLINE, Action, Core, Event, HANDOVER_DEADLINE, Looked};
use crate::core::{Cause, SessionError};
use crate::group::{GroupError, Peer, SessionId};
use crate::input::ControlInput;
use crate::kept::KeptError;
use crate::node::Node;
use crate::session::{Client, one_line};
use give::{Gift, heard};
use keep::{Keeping, Kept};
use look::Permitted;

/// Frames whose blocks are being read at once.
const READ_AHEAD: usize = 8;

/// Why a handback ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandbackError {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("group '{group}' is not active here: there is nothing to give back; its primary may write")]
    NotActive { group: Name },
    #[error("group '{group}' is active here: give it back first (`twinsite failback {group}` at its primary), then roll back")]
    Active { group: Name },
    #[error(
        "group '{group}' has no point named '{name}': give the point itself, or a name that `twinsite points {group}` shows at the receiver"
    )]
    NoName { group: Name, name: Name },
    #[error("client '{client}' may not have its disks back: its `handback` is false at the receiver")]
    Forbidden { client: Name },
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error("cannot give back group '{group}': {source}")]
    Io { group: Name, source: std::io::Error },
    #[error("cannot keep what the primary wrote of its own: {0}")]
    Keeping(std::io::Error),
    #[error(transparent)]
    Kept(#[from] KeptError),
    #[error("the primary sent {message} while this side was {state}")]
    Unexpected { message: &'static str, state: &'static str },
    #[error("the primary's own blocks did not arrive as it sent them: try again")]
    Diverged,
    #[error("the primary sent more blocks of its own than its disks have")]
    Endless,
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
    pub(crate) fn code(&self) -> CloseCode {
        match self {
            Self::Session(error) => error.code(),
            Self::NotActive { .. } | Self::Active { .. } | Self::NoName { .. } | Self::Forbidden { .. } => CloseCode::Mismatch,
            Self::Kept(KeptError::Space { .. } | KeptError::Full { .. }) => CloseCode::Limit,
            Self::Group(_) | Self::Io { .. } | Self::Kept(_) | Self::Keeping(_) | Self::Storage(_) => CloseCode::Storage,
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

    /// Waits until the primary has heard the last word.
    async fn end(&mut self, code: CloseCode, reason: &str) {
        if self.send.finish().is_ok() {
            let _ = tokio::time::timeout(crate::session::LAST_WORDS_DEADLINE, self.send.stopped()).await;
        }
        self.connection.close(VarInt::from_u32(u32::from(code as u16)), reason.as_bytes());
    }
}

/// The next message. Loses nothing when it is dropped.
async fn next_of(recv: &mut RecvStream, input: &mut ControlInput) -> Result<Message, HandbackError> {
    loop {
        if let Some(message) = input.next()? {
            return Ok(message);
        }
        match recv.read_chunk(proto::control::MESSAGE_BYTES_MAX, true).await {
            Ok(Some(chunk)) => input.push(&chunk.bytes),
            Ok(None) => return Err(HandbackError::Lost("the primary closed its control stream".to_owned())),
            Err(error) => return Err(HandbackError::Lost(one_line(&error))),
        }
    }
}

type Hashing = Pin<Box<dyn Future<Output = Result<Hashes, Cause>> + Send>>;

/// A handback under way: performs what its core decides.
struct Handback {
    line: Line,
    node: Arc<Node>,
    client: Arc<Client>,
    id: SessionId,
    ask: Ask,
    gift: Option<Gift>,
    /// Answers under way, in the order of their questions; the core bounds their number.
    hashing: FuturesOrdered<Hashing>,
    /// The stream of the primary's own blocks.
    upload: Option<RecvStream>,
    kept: Option<Kept>,
}

/// Serves a primary that asked, to the end.
pub(crate) async fn serve(line: Line, node: Arc<Node>, client: Arc<Client>, ask: Ask) {
    let label = format!("{}/{} from {}", client.config.name, ask.group, line.connection.remote_address());
    let id = node.next_session();
    let (gift, upload, kept) = (None, None, None);
    let mut handback = Handback { line, node, client, id, ask, gift, hashing: FuturesOrdered::new(), upload, kept };
    let error = match handback.converse().await {
        Ok(()) => return handback.line.end(CloseCode::Stopping, "handed back").await,
        Err(error) => error,
    };
    tracing::warn!("{label}: handback: {error}");
    let (code, reason) = (error.code(), error.to_string());
    // The active copy goes on at once, before anybody is told.
    if let Some(gift) = handback.gift.take() {
        gift.release(format!("handback: {error}")).await;
    }
    // What was not kept is removed, and its space given back, before the next try.
    handback.kept = None;
    let last = match &error {
        HandbackError::Session(SessionError::Fenced { generation, .. }) => Message::Fenced { generation: *generation },
        _ => Message::close(code, &reason),
    };
    if let Err(error) = handback.line.tell(&last).await {
        tracing::debug!(%error, "the primary is not told why");
    }
    handback.line.end(code, &reason).await;
}

impl Handback {
    async fn converse(&mut self) -> Result<(), HandbackError> {
        let mut actions = Vec::new();
        let mut core = Core::begin(&mut actions);
        loop {
            let mut next = None;
            for action in std::mem::take(&mut actions) {
                next = self.perform(action, core.deadline()).await?.or(next);
            }
            if core.is_over() {
                return Ok(());
            }
            let event = match next {
                Some(event) => event,
                None => self.next_event(&core).await?,
            };
            core.handle(Instant::now(), event, &mut actions)?;
        }
    }

    async fn next_event(&mut self, core: &Core) -> Result<Event, HandbackError> {
        let deadline = core.deadline();
        let due = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                None => std::future::pending().await,
            }
        };
        let Self { line: Line { connection, recv, input, stop, .. }, gift, hashing, upload, .. } = self;
        let events = async {
            match gift {
                Some(gift) => gift.events.recv().await,
                None => None,
            }
        };
        let happened = tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => Err(HandbackError::Stopping),
            Some(event) = events => return heard(event).map(|()| Event::Tick),
            Some(hashes) = hashing.next() => return hashes.map(Event::Hashed).map_err(HandbackError::Storage),
            stream = connection.accept_uni(), if core.wants_upload() => match stream {
                Ok(stream) => {
                    *upload = Some(stream);
                    Ok(Event::Upload)
                }
                Err(error) => Err(HandbackError::Lost(one_line(&error))),
            },
            () = due => Ok(Event::Tick),
            message = next_of(recv, input) => message.map(Event::Message),
        };
        match happened {
            Err(HandbackError::Lost(why)) => Ok(Event::Gone(why)),
            happened => happened,
        }
    }

    /// Returns what came of it, if the core waits for that. `deadline` is the core's.
    async fn perform(&mut self, action: Action, deadline: Option<Instant>) -> Result<Option<Event>, HandbackError> {
        Ok(match action {
            Action::Send(message) => {
                self.line.tell(&message).await?;
                None
            }
            Action::Look => Some(Event::Looked(self.look().await?)),
            Action::Hash(query) => {
                let hashing = self.hash(query)?;
                self.hashing.push_back(hashing);
                None
            }
            Action::Keep => match self.upload.take() {
                Some(stream) => Some(self.keep(stream).await?),
                None => None,
            },
            Action::Name => match self.kept.take() {
                Some(kept) => {
                    let generation = self.ask.generation;
                    let name = blocking(&self.ask.group, move || kept.name(generation)).await?;
                    reach(Step::GiveNamed);
                    let (client, group) = (&self.client.config.name, &self.ask.group);
                    tracing::warn!("{client}/{group}: what its primary wrote of its own is kept as fork {name}");
                    Some(Event::Named(name))
                }
                None => None,
            },
            Action::Want(want) => {
                self.gift()?.want(&want);
                None
            }
            Action::Claim => {
                let address = self.line.connection.remote_address();
                let peer = Peer { address, since_unix_us: crate::clock::unix_us(), interval_ms: 0 };
                let gift = self.gift()?;
                let (stands, what) = (gift.claim(peer).await?, gift.what());
                reach(Step::GiveClaimed);
                tracing::warn!("{}/{}: giving {what} back to {address}", self.client.config.name, self.ask.group);
                Some(Event::Claimed(stands))
            }
            Action::Pass { pass, kind } => {
                let bytes = in_time(deadline, self.pass(pass, kind)).await??;
                reach(Step::GivePass);
                Some(Event::Sent { bytes })
            }
            Action::Changed => Some(Event::Changed { bytes: self.gift()?.changed()? }),
            Action::Hold => {
                in_time(deadline, self.gift()?.hold()).await??;
                reach(Step::GiveHeld);
                Some(Event::Held)
            }
            Action::Seal { passes } => {
                reach(Step::GiveApplied);
                let handed = self.gift()?.hand(passes).await?;
                if let Some((point, generation)) = handed {
                    let (client, group) = (&self.client.config.name, &self.ask.group);
                    tracing::warn!("{client}/{group}: handed back at point {point}; generation {generation} holds");
                }
                Some(Event::Handed(handed))
            }
            Action::CleanUp => {
                self.clean_up().await?;
                None
            }
        })
    }

    fn gift(&mut self) -> Result<&mut Gift, HandbackError> {
        self.gift.as_mut().ok_or_else(|| GroupError::Changed { group: self.ask.group.clone() }.into())
    }

    fn io(&self) -> Result<IoThreads, HandbackError> {
        let hasher = self.node.hasher().map_err(|source| HandbackError::Io { group: self.ask.group.clone(), source })?;
        Ok(hasher.io().clone())
    }

    async fn look(&mut self) -> Result<Looked, HandbackError> {
        let (standing, fork, to) = match look::permitted(&self.node, &self.client.config, self.client.key, &self.ask)? {
            Permitted::Done { point, generation } => return Ok(Looked::Done { point, generation }),
            Permitted::Failback(standing) => {
                let fork = crate::node::in_use(&standing.group).await?;
                (standing, Some(fork), None)
            }
            Permitted::Rollback(standing, point) => (standing, None, Some(point)),
        };
        let (id, ask) = (self.id, self.ask.clone());
        let gift = blocking(&self.ask.group, move || look::look(standing, id, ask, (fork, to))).await?;
        let looked = gift.looked();
        self.gift = Some(gift);
        Ok(looked)
    }

    fn hash(&mut self, query: HashQuery) -> Result<Hashing, HandbackError> {
        let newest = Arc::clone(&self.gift()?.newest);
        let hasher = self.node.hasher().map_err(|source| HandbackError::Io { group: self.ask.group.clone(), source })?;
        Ok(Box::pin(hasher.answer(newest, query)))
    }

    /// Takes the primary's own blocks from a stream.
    async fn keep(&mut self, mut stream: RecvStream) -> Result<Event, HandbackError> {
        let (id, generation, gift) = (self.id, self.ask.generation, self.gift()?);
        let (shared, newest) = (Arc::clone(&gift.group.shared), gift.ready.newest);
        let keeping = blocking(&self.ask.group, move || Keeping::begin(&shared, id, generation, newest)).await?;
        let io = self.io()?;
        let kept = keeping.take(&mut stream, &io, &mut self.line.stop).await?;
        reach(Step::GiveArrived);
        let (frames, digest) = kept.told();
        self.kept = Some(kept);
        Ok(Event::Arrived { frames, digest })
    }

    /// Sends and stages one pass. Returns the bytes of its blocks.
    async fn pass(&mut self, pass: u16, kind: proto::pass::PassKind) -> Result<u64, HandbackError> {
        let lost = |error: &dyn ToString| HandbackError::Lost(one_line(&error.to_string()));
        let (io, connection) = (self.io()?, self.line.connection.clone());
        let gift = self.gift()?;
        let header = gift.header(pass, kind);
        let (mut packer, bytes) = gift.packer(header);
        let mut stream = connection.open_uni().await.map_err(|e| lost(&e))?;
        stream.write_all(&header.encode()).await.map_err(|e| lost(&e))?;
        let (mut reads, mut frames, mut ended) = (FuturesOrdered::new(), Vec::new(), false);
        loop {
            while !ended && reads.len() < READ_AHEAD {
                match packer.wanted() {
                    Some(wanted) => reads.push_back(gift.read(&io, wanted)?),
                    None => ended = true,
                }
            }
            let read = reads.next().await;
            let is_last = read.is_none();
            match read {
                Some(read) => {
                    let (volume, done) = read.map_err(|source| HandbackError::Io { group: gift.ask.group.clone(), source })?;
                    done.iter().for_each(|(run, content)| packer.put(volume, *run, content, &mut frames));
                }
                None => packer.finish(&mut frames),
            }
            for (volume, packed) in frames.drain(..) {
                stream.write_all(&packed.bytes).await.map_err(|e| lost(&e))?;
                if gift.add(pass, volume, packed) {
                    gift.stage().await?;
                }
            }
            if is_last {
                break;
            }
        }
        gift.stage().await?;
        stream.finish().map_err(|e| lost(&e))?;
        Ok(bytes)
    }

    async fn clean_up(&mut self) -> Result<(), HandbackError> {
        let gift = self.gift()?;
        let group = Arc::clone(&gift.group);
        if let Some(fork) = gift.retire().await {
            let removed = blocking(&self.ask.group, move || give::forget(&group, &fork));
            if let Err(error) = removed.await {
                tracing::warn!("{}/{}: {error}; it is of no use any more", self.client.config.name, self.ask.group);
            }
            reach(Step::GiveForkRemoved);
        }
        self.node.handed();
        Ok(())
    }
}

/// Work on files, where it holds nobody up.
async fn blocking<T: Send + 'static>(
    group: &Name,
    work: impl FnOnce() -> Result<T, HandbackError> + Send + 'static,
) -> Result<T, HandbackError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| GroupError::Closed { group: group.clone() })?
}

/// Within the time that guests may be held up.
async fn in_time<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Result<T, HandbackError> {
    match deadline {
        Some(deadline) => tokio::time::timeout_at(deadline.into(), work).await.map_err(|_| HandbackError::Slow),
        None => Ok(work.await),
    }
}

type Runs = (proto::VolumeIndex, Vec<(BlockExtent, blockdev::Buf)>);

impl Gift {
    /// Reads blocks on the threads that may wait.
    fn read(
        &self,
        io: &IoThreads,
        Wanted { volume, runs }: Wanted,
    ) -> Result<impl Future<Output = std::io::Result<Runs>> + use<>, HandbackError> {
        let source = self.source(volume).map_err(|source| HandbackError::Io { group: self.ask.group.clone(), source })?;
        let read = io.call(move || async move {
            let mut done = Vec::with_capacity(runs.len());
            for run in runs {
                done.push((run, read_blocks(&*source, run).await?));
            }
            Ok((volume, done))
        });
        Ok(async move { read.await.flatten() })
    }
}
