//! Drives one connection: turns QUIC into events of the core and performs its actions.
//!
//! Decides nothing about the protocol. Reads are cancel-safe, so one task serves control stream, pass stream and group.

use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{FuturesOrdered, StreamExt};
use proto::handback::Ask;
use proto::hashes::HashQuery;
use proto::{CloseCode, DecodeError, EpochId, Fingerprint, Message, Name, Scrub, ScrubOutcome, Scrubbed};
use quinn::{Connection, ReadError, RecvStream, SendStream, VarInt};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::batch::Assembler;
use crate::config::ClientConfig;
use crate::core::{Action, Cause, ClientPolicy, Core, Event, SessionError};
use crate::group::{Claimed, Group, GroupEvent, Peer, SessionId, Snapshot};
use crate::handback::{self, Line};
use crate::input::{ControlInput, PassInput};
use crate::liveness::{Listening, is_leave};
use crate::node::Node;
use crate::view::{View, fresh, views};

/// A connection that has not said hello by then is closed.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);
/// How long the last message is given to arrive before the connection is closed.
pub(crate) const LAST_WORDS_DEADLINE: Duration = Duration::from_secs(2);
/// Packets taken from a stream at once.
const CHUNKS: usize = 64;

/// What ends a session without an error of the protocol.
#[derive(Debug, thiserror::Error)]
enum Gone {
    #[error("connection lost: {}", one_line(.0))]
    Connection(#[from] quinn::ConnectionError),
    #[error("the primary closed its control stream")]
    ControlEnded,
    #[error("no hello within {} seconds", HELLO_DEADLINE.as_secs())]
    Silent,
}

/// The client behind a connection, known by its key.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) config: ClientConfig,
    pub(crate) key: Fingerprint,
    /// One permit a session.
    pub(crate) sessions: Semaphore,
}

impl Client {
    pub(crate) fn new(config: ClientConfig, sessions_max: usize) -> Self {
        Self { key: config.key, config, sessions: Semaphore::new(sessions_max) }
    }
}

/// An error with a peer's text in it, for a log or a terminal: control characters do not get there.
pub(crate) fn one_line(error: &impl ToString) -> String {
    error.to_string().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

struct Session {
    connection: Connection,
    node: Arc<Node>,
    client: Arc<Client>,
    id: SessionId,
    core: Core,
    send: SendStream,
    control: ControlReader,
    pass: Option<PassReader>,
    assembler: Assembler,
    group: Option<(Arc<Group>, mpsc::Receiver<GroupEvent>)>,
    /// Since the group was claimed.
    listening: Option<Listening>,
    /// Frames of the epoch that arrives which are in the journal.
    staged: Option<watch::Receiver<(EpochId, u64)>>,
    interval_ms: u32,
    /// Views of the newest point while the primary compares; none while it sends.
    compared: Option<Arc<Vec<View>>>,
    /// Answers under way, in the order of their questions; the core bounds their number.
    hashing: FuturesOrdered<Hashing>,
}

type Hashing = Pin<Box<dyn Future<Output = Result<Event, Cause>> + Send>>;

/// Serves a connection whose key was verified until it ends.
pub(crate) async fn serve(connection: Connection, node: Arc<Node>, client: Arc<Client>, stop: watch::Receiver<bool>) {
    let peer = connection.remote_address();
    let name = client.config.name.clone();
    let opened = tokio::time::timeout(HELLO_DEADLINE, connection.accept_bi()).await;
    let (send, recv) = match opened {
        Ok(Ok(streams)) => streams,
        Ok(Err(error)) => return tracing::info!("client '{name}' at {peer}: {}", one_line(&error)),
        Err(_) => {
            let reason = Gone::Silent.to_string();
            connection.close(VarInt::from_u32(CloseCode::Misbehaved as u32), reason.as_bytes());
            return tracing::warn!("client '{name}' at {peer}: {reason}");
        }
    };
    let policy = ClientPolicy {
        client: name.clone(),
        groups: client.config.groups.clone(),
        groups_max: node.limits.groups_per_client,
        volumes_max: node.limits.volumes_per_group,
        volume_bytes_max: node.limits.volume_bytes_per_client,
    };
    let mut session = Session {
        connection,
        id: node.next_session(),
        node,
        client,
        core: Core::new(policy),
        send,
        control: ControlReader { recv, input: ControlInput::default() },
        pass: None,
        assembler: Assembler::default(),
        group: None,
        listening: None,
        staged: None,
        interval_ms: 0,
        compared: None,
        hashing: FuturesOrdered::new(),
    };
    let reason = session.run(stop.clone()).await;
    if let End::Handback(ask) = reason {
        let Session { connection, send, control, node, client, .. } = session;
        let line = Line { connection, send, recv: control.recv, input: control.input, stop };
        return handback::serve(line, node, client, *ask).await;
    }
    if matches!(reason, End::Gone(_)) {
        // Whole frames count, wherever the connection broke.
        session.flush().await;
    }
    let group = session.group.take();
    let label = group.as_ref().map_or_else(|| name.to_string(), |(g, _)| format!("{name}/{}", g.shared.folder.group));
    match &reason {
        End::Handback(_) => {}
        End::Core(SessionError::Stopping | SessionError::Superseded { .. } | SessionError::PeerClosed { .. }) | End::Gone(_) => {
            tracing::info!("{label} from {peer}: {reason}")
        }
        End::Core(_) => tracing::warn!("{label} from {peer}: {reason}"),
    }
    if let Some((group, _)) = group {
        session.listening = None;
        if matches!(&reason, End::Gone(Gone::Connection(end)) if is_leave(end)) {
            group.shared.heard.took_leave();
        }
        group.release(session.id, reason.to_string()).await;
    }
}

#[derive(Debug, thiserror::Error)]
enum End {
    #[error("{0}")]
    Core(SessionError),
    #[error("{0}")]
    Gone(#[from] Gone),
    /// Not a session, but the wish to have the disks back.
    #[error("handback")]
    Handback(Box<Ask>),
}

/// One thing that happened on the connection.
enum Input {
    Control(Message),
    Opened(RecvStream),
    Data(usize),
    DataEnd,
    DataReset,
    Group(GroupEvent),
    Staged(EpochId, u64),
    Hashed(Result<Event, Cause>),
    Stop,
}

impl Session {
    /// Returns why the session ended.
    async fn run(&mut self, mut stop: watch::Receiver<bool>) -> End {
        let mut chunks: Vec<bytes::Bytes> = vec![bytes::Bytes::new(); CHUNKS];
        let hello_by = tokio::time::Instant::now() + HELLO_DEADLINE;
        loop {
            let input = match self.next_input(&mut chunks, &mut stop, hello_by).await {
                Ok(input) => input,
                Err(InputError::Gone(gone)) => {
                    self.connection.close(VarInt::from_u32(CloseCode::Stopping as u32), gone.to_string().as_bytes());
                    return End::Gone(gone);
                }
                Err(InputError::Decode(error)) => {
                    let mut actions = Vec::new();
                    let error = self.core.fail(SessionError::Decode(error), &mut actions);
                    self.perform(actions).await;
                    return End::Core(error);
                }
            };
            let input = match input {
                Input::Control(Message::Handback(ask)) if self.core.is_opening() => return End::Handback(Box::new(ask)),
                input => input,
            };
            let mut actions = Vec::new();
            let ended = self.take(input, &mut chunks, &mut actions).await;
            let ended = self.perform(actions).await.or(ended);
            if let Some(error) = ended {
                return End::Core(error);
            }
        }
    }

    async fn next_input(
        &mut self,
        chunks: &mut [bytes::Bytes],
        stop: &mut watch::Receiver<bool>,
        hello_by: tokio::time::Instant,
    ) -> Result<Input, InputError> {
        let Self { connection, control, pass, group, staged, core, hashing, .. } = self;
        let wants_pass = core.wants_pass() && pass.is_none();
        let greeted = group.is_some();
        let events = async {
            match group {
                Some((_, events)) => events.recv().await,
                None => pending().await,
            }
        };
        let staged = async {
            let Some(staged) = staged else { return pending().await };
            match staged.changed().await {
                Ok(()) => *staged.borrow_and_update(),
                // Its end is told by an event.
                Err(_) => pending().await,
            }
        };
        let data = async {
            match pass {
                Some(pass) => pass.read(chunks).await,
                None => pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => Ok(Input::Stop),
            // The group's thread is gone: the node is stopping.
            event = events => Ok(event.map_or(Input::Stop, Input::Group)),
            (epoch, frames) = staged => Ok(Input::Staged(epoch, frames)),
            Some(hashed) = hashing.next() => Ok(Input::Hashed(hashed)),
            message = control.next() => message.map(Input::Control),
            stream = connection.accept_uni(), if wants_pass => Ok(Input::Opened(stream.map_err(Gone::from)?)),
            data = data => data,
            () = tokio::time::sleep_until(hello_by), if !greeted => Err(Gone::Silent.into()),
        }
    }

    async fn take(&mut self, input: Input, chunks: &mut [bytes::Bytes], actions: &mut Vec<Action>) -> Option<SessionError> {
        match input {
            Input::Control(message) => {
                if let Message::Hello(hello) = &message {
                    self.interval_ms = hello.interval_ms;
                }
                self.core.handle(Event::Message(message), actions)
            }
            Input::Staged(epoch, frames) => self.core.handle(Event::Staged { epoch, frames }, actions),
            Input::Hashed(Ok(event)) => self.core.handle(event, actions),
            Input::Hashed(Err(cause)) => self.core.handle(Event::Storage(cause), actions),
            Input::Opened(stream) => {
                self.compared = None;
                self.pass = Some(PassReader { stream, input: PassInput::default() });
                None
            }
            Input::Data(count) => self.data(chunks.get_mut(..count).unwrap_or_default(), actions).await,
            Input::DataEnd => {
                let whole = self.pass.take().map_or(Ok(()), |pass| pass.input.end(&self.assembler));
                if let Err(error) = whole {
                    return Some(self.core.fail(error.into(), actions));
                }
                self.flush().await;
                self.core.handle(Event::PassEnd, actions)
            }
            Input::DataReset => {
                self.pass = None;
                self.core.handle(Event::PassReset, actions)
            }
            Input::Group(event) => {
                let event = match event {
                    GroupEvent::Committed(point) => Event::Committed(point),
                    GroupEvent::Drain => Event::Drain,
                    GroupEvent::Superseded => Event::Superseded,
                    GroupEvent::Fenced(generation) => Event::Fenced(generation),
                    GroupEvent::Storage(cause) => Event::Storage(cause),
                };
                self.core.handle(event, actions)
            }
            Input::Stop => self.core.handle(Event::Stopping, actions),
        }
    }

    async fn data(&mut self, chunks: &mut [bytes::Bytes], actions: &mut Vec<Action>) -> Option<SessionError> {
        for chunk in chunks {
            // Given back at once: a chunk may be as large as the window.
            let chunk = std::mem::take(chunk);
            let mut rest: &[u8] = &chunk;
            while !rest.is_empty() {
                let pass = self.pass.as_mut()?;
                let ended = pass.input.take(&mut rest, &mut self.core, &mut self.assembler, actions);
                if ended.is_some() {
                    return ended;
                }
                // What a header asks for comes before the frames behind it.
                let asked = std::mem::take(actions);
                let ended = if asked.is_empty() { None } else { self.perform(asked).await };
                if ended.is_some() {
                    return ended;
                }
                if self.assembler.is_ready() {
                    self.flush().await;
                }
            }
        }
        None
    }

    /// Hands whole frames to the group.
    async fn flush(&mut self) {
        if let Some(batch) = self.assembler.take()
            && let Some((group, _)) = &self.group
        {
            group.append(self.id, batch).await;
        }
    }

    /// Performs actions in order; those that are answered may bring more. Returns why the session ended, if it did.
    async fn perform(&mut self, actions: Vec<Action>) -> Option<SessionError> {
        let mut queue = std::collections::VecDeque::from(actions);
        let mut ended = None;
        while let Some(action) = queue.pop_front() {
            let mut more = Vec::new();
            match action {
                Action::Send(message) => {
                    let encoded = message.encode();
                    let written = tokio::time::timeout(LAST_WORDS_DEADLINE, self.send.write_all(&encoded)).await;
                    // A failure shows up as a lost connection at the next read; the last words have their own end.
                    let is_last = queue.iter().any(|a| matches!(a, Action::Close { .. }));
                    if written.is_err() && !is_last {
                        let error = SessionError::Deaf;
                        self.connection.close(VarInt::from_u32(error.code() as u32), error.to_string().as_bytes());
                        queue.clear();
                        ended = Some(self.core.fail(error, &mut more));
                    }
                }
                Action::Lookup { group } => {
                    let stored = self.node.lookup(&self.client.config.name, &group, self.client.key);
                    ended = self.core.handle(Event::Stored(stored), &mut more).or(ended);
                }
                Action::Claim { group, generation, create, volumes } => {
                    let event = self.claim(group, generation, create, volumes).await;
                    ended = self.core.handle(event, &mut more).or(ended);
                }
                Action::Hash(query) => {
                    if let Err(cause) = self.hash(query) {
                        ended = self.core.handle(Event::Storage(cause), &mut more).or(ended);
                    }
                }
                Action::Scrub(scrub) => {
                    if let Err(cause) = self.scrub(scrub).await {
                        ended = self.core.handle(Event::Storage(cause), &mut more).or(ended);
                    }
                }
                Action::Drained(point) => {
                    if let Some((group, _)) = &self.group {
                        group.drained(point);
                    }
                }
                Action::Commit(seal) => {
                    if let Some((group, _)) = &self.group {
                        group.commit(self.id, seal).await;
                    }
                }
                Action::Abandon => {
                    self.assembler.clear();
                    if let Some((group, _)) = &self.group {
                        group.abandon(self.id).await;
                    }
                }
                Action::Close { code, reason } => self.close(code, &reason).await,
            }
            queue.extend(more);
        }
        ended
    }

    async fn claim(
        &mut self,
        group: Name,
        generation: proto::Generation,
        create: bool,
        volumes: Vec<crate::superblock::Volume>,
    ) -> Event {
        let (client, key) = (self.client.config.name.clone(), self.client.key);
        let handle = if create {
            let node = Arc::clone(&self.node);
            let (client, group) = (client.clone(), group.clone());
            let created = tokio::task::spawn_blocking(move || node.create(&client, &group, key, generation, volumes)).await;
            match created {
                Ok(Ok(handle)) => handle,
                Ok(Err(cause)) => return Event::Storage(cause),
                Err(error) => return Event::Storage(Arc::new(error)),
            }
        } else {
            self.node.get(&client, &group)
        };
        let Some(handle) = handle else { return Event::Stored(self.node.lookup(&client, &group, key)) };
        if create && !handle.stored(key).owned {
            return Event::Stored(self.node.lookup(&client, &group, key));
        }
        let peer = Peer {
            address: self.connection.remote_address(),
            since_unix_us: crate::clock::unix_us(),
            interval_ms: self.interval_ms,
        };
        let (claimed, events) = handle.claim(self.id, peer, generation).await;
        match claimed {
            Claimed::Yes { committed, writer, arrived, staged } => {
                tracing::info!(
                    "{client}/{group} from {}: session in generation {generation}, at {}",
                    peer.address,
                    committed.map_or_else(|| "no point yet".to_owned(), |p| format!("point {p}"))
                );
                if let Some(arrived) = &arrived {
                    tracing::info!("{client}/{group}: {} frames of epoch {} are there", arrived.tally.frames, arrived.epoch);
                }
                self.listening = Some(Listening::to(self.connection.clone(), Arc::clone(&handle.shared)));
                (self.group, self.staged) = (Some((handle, events)), Some(staged));
                Event::Claimed { committed, writer, arrived }
            }
            Claimed::Changed => Event::Stored(self.node.lookup(&client, &group, key)),
            Claimed::No(cause) => Event::Storage(cause),
        }
    }

    /// Starts the answer to a query, of the newest committed point.
    fn hash(&mut self, query: HashQuery) -> Result<(), Cause> {
        let Some((group, _)) = &self.group else { return Ok(()) };
        let views = match &self.compared {
            Some(views) => Arc::clone(views),
            None => {
                let index = group.shared.newest();
                let views = views(&group.shared, index).map_err(|error| Arc::new(error) as Cause)?;
                let views: Result<Vec<View>, _> = views.into_iter().map(|view| view.reading_fresh().in_bulk()).collect();
                let views = views.map_err(|error| Arc::new(error) as Cause)?;
                Arc::clone(self.compared.insert(Arc::new(views)))
            }
        };
        let hasher = self.node.hasher().map_err(|error| Arc::new(error) as Cause)?;
        let answer = hasher.answer(views, query);
        self.hashing.push_back(Box::pin(async move { answer.await.map(Event::Hashed) }));
        Ok(())
    }

    /// Starts the comparison with the view of the commit that was handed over last.
    async fn scrub(&mut self, scrub: Scrub) -> Result<(), Cause> {
        let Some((group, _)) = &self.group else { return Ok(()) };
        let hasher = self.node.hasher().map_err(|error| Arc::new(error) as Cause)?.clone();
        let (group, snapshot) = (Arc::clone(group), group.snapshot(self.id).await);
        self.hashing.push_back(Box::pin(async move {
            // Without an answer the session has lost the group, and hears so.
            let Ok(Snapshot { point, index }) = snapshot.await else { return pending().await };
            let Some(point) = point.filter(|point| point.epoch == scrub.epoch) else {
                return Ok(Event::Scrubbed(Scrubbed { id: scrub.id, outcome: ScrubOutcome::Stale }));
            };
            let view = fresh(&group.shared, index, usize::from(scrub.volume.0)).map_err(|error| Arc::new(error) as Cause)?;
            let Some(view) = view else { return Err(Arc::new(std::io::Error::from(std::io::ErrorKind::NotFound)) as Cause) };
            hasher.scrub(view, scrub, point).await.map(Event::Scrubbed)
        }));
        Ok(())
    }

    /// Closes the connection after the last message has arrived, or a deadline.
    async fn close(&mut self, code: u16, reason: &str) {
        if self.send.finish().is_ok() {
            let _ = tokio::time::timeout(LAST_WORDS_DEADLINE, self.send.stopped()).await;
        }
        self.connection.close(VarInt::from_u32(code.into()), reason.as_bytes());
    }
}

enum InputError {
    Gone(Gone),
    Decode(DecodeError),
}

impl From<Gone> for InputError {
    fn from(gone: Gone) -> Self {
        Self::Gone(gone)
    }
}

/// Cuts the control stream into messages; keeps what it has when its future is dropped.
struct ControlReader {
    recv: RecvStream,
    input: ControlInput,
}

impl ControlReader {
    async fn next(&mut self) -> Result<Message, InputError> {
        loop {
            if let Some(message) = self.input.next().map_err(InputError::Decode)? {
                return Ok(message);
            }
            match self.recv.read_chunk(proto::control::MESSAGE_BYTES_MAX, true).await {
                Ok(Some(chunk)) => self.input.push(&chunk.bytes),
                Ok(None) => return Err(Gone::ControlEnded.into()),
                Err(ReadError::ConnectionLost(error)) => return Err(Gone::Connection(error).into()),
                Err(_) => return Err(Gone::ControlEnded.into()),
            }
        }
    }
}

struct PassReader {
    stream: RecvStream,
    input: PassInput,
}

impl PassReader {
    async fn read(&mut self, chunks: &mut [bytes::Bytes]) -> Result<Input, InputError> {
        match self.stream.read_chunks(chunks).await {
            Ok(Some(count)) => Ok(Input::Data(count)),
            Ok(None) => Ok(Input::DataEnd),
            Err(ReadError::Reset(_)) => Ok(Input::DataReset),
            Err(ReadError::ConnectionLost(error)) => Err(Gone::Connection(error).into()),
            Err(_) => Ok(Input::DataReset),
        }
    }
}
