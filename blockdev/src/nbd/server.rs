//! Listener, exports and connections of one NBD server.
//!
//! Each connection is one task on one io thread, chosen in turn. Exports come and go while the server runs; removing one ends its
//! connections after the requests they have in flight.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::net::{SocketFlags, accept_with, sockopt};
use tokio::sync::{Notify, watch};

use super::connection::Connection;
use super::error::{ConnectionError, NbdServerError};
use super::handshake::handshake;
use super::listen::{Bound, ListenAddr};
use super::negotiate::{Agreement, Catalog, Offered};
use super::request::Terms;
use super::socket::{Socket, Stream};
use super::stats::{ConnectionStats, Counters, Limit};
use super::wire::NAME_BYTES_MAX;
use crate::uring::watch_owned;
use crate::{BlockDevice, IoThreads};

/// Pause after the system could not give a descriptor to a new connection.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Handshakes at once, of anybody who can connect; clients that are served have their own limit. More are closed as soon as they
/// are accepted.
const HANDSHAKES_MAX: usize = 64;

/// Settings of a server.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Set: every client must start TLS before anything else.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// A client that has not finished its handshake by then is disconnected.
    pub handshake_timeout: Duration,
    /// Clients served at once. More are closed as soon as they are accepted.
    pub connections_max: usize,
    /// Permissions of a unix socket, less the umask.
    pub unix_mode: u32,
    /// Clients may connect, and wait until [`NbdServer::open`]: none is refused because its export comes a moment later.
    pub held: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self { tls: None, handshake_timeout: Duration::from_secs(10), connections_max: 64, unix_mode: 0o600, held: false }
    }
}

/// A device under a name.
#[derive(Clone)]
pub struct Export {
    /// Asked for by clients; at most 4096 bytes.
    pub name: String,
    /// Shown by `nbdinfo --list`; may be empty.
    pub description: String,
    /// The top of the disk's stack.
    pub device: Arc<dyn BlockDevice>,
    /// Refuse writes even if the device takes them.
    pub read_only: bool,
    /// Served to clients that ask for the empty name. If no export is marked and there is only one, it is that one.
    pub default: bool,
}

impl Export {
    /// A writable export without description.
    pub fn new(name: impl Into<String>, device: Arc<dyn BlockDevice>) -> Self {
        Self { name: name.into(), description: String::new(), device, read_only: false, default: false }
    }
}

impl std::fmt::Debug for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Export").field("name", &self.name).field("size", &self.device.size()).finish_non_exhaustive()
    }
}

impl Offered for Arc<Export> {
    fn name(&self) -> &str {
        &self.name
    }
    fn description(&self) -> &str {
        &self.description
    }
    fn size(&self) -> u64 {
        self.device.size()
    }
    fn read_only(&self) -> bool {
        self.read_only || self.device.read_only()
    }
}

/// A listening server. Dropping it stops listening and ends its connections after their requests in flight.
#[derive(Debug)]
pub struct NbdServer {
    shared: Arc<Shared>,
    address: ListenAddr,
}

struct Shared {
    options: ServerOptions,
    io: IoThreads,
    state: Mutex<State>,
    next_id: AtomicU64,
    stop_listening: Notify,
    /// Ends [`ServerOptions::held`].
    open: Notify,
    /// Tasks alive: the listener, handshakes and connections.
    tasks: watch::Sender<usize>,
}

#[derive(Default)]
struct State {
    closing: bool,
    exports: BTreeMap<String, Arc<Export>>,
    connections: HashMap<u64, Arc<Entry>>,
}

/// A connection from its acceptance to its end.
struct Entry {
    id: u64,
    peer: String,
    stop: Notify,
    counters: Arc<Counters>,
    /// Set when the handshake is over.
    serving: Mutex<Option<Serving>>,
}

struct Serving {
    export: Arc<Export>,
    tls: bool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("options", &self.options).finish_non_exhaustive()
    }
}

impl NbdServer {
    /// Listens on `address`; clients are served on `io`.
    ///
    /// # Errors
    /// See [`NbdServerError`].
    pub fn bind(address: &ListenAddr, options: ServerOptions, io: &IoThreads) -> Result<Self, NbdServerError> {
        let bound = Bound::new(address, options.unix_mode)?;
        let address = bound.address.clone();
        let shared = Arc::new(Shared {
            options,
            io: io.clone(),
            state: Mutex::default(),
            next_id: AtomicU64::new(1),
            stop_listening: Notify::new(),
            open: Notify::new(),
            tasks: watch::Sender::new(1),
        });
        let server = Arc::clone(&shared);
        io.spawn(move || async move {
            let guard = TaskGuard(Arc::clone(&server));
            if let Err(error) = server.listen(bound).await {
                tracing::error!(%error, "NBD listener failed; no further clients are accepted");
            }
            drop(guard);
        });
        Ok(Self { shared, address })
    }

    /// Where it listens, with the port that the system chose.
    #[must_use]
    pub fn address(&self) -> &ListenAddr {
        &self.address
    }

    /// Serves the clients that wait, and all that come, if the server was [held](ServerOptions::held).
    pub fn open(&self) {
        self.shared.open.notify_one();
    }

    /// Offers an export from now on.
    ///
    /// # Errors
    /// When the name is taken or too long.
    pub fn add_export(&self, export: Export) -> Result<(), NbdServerError> {
        for text in [&export.name, &export.description] {
            if text.len() > NAME_BYTES_MAX as usize {
                return Err(NbdServerError::NameTooLong { bytes: text.len() });
            }
        }
        let mut state = self.shared.state.lock();
        if state.exports.contains_key(&export.name) {
            return Err(NbdServerError::ExportExists { name: export.name });
        }
        state.exports.insert(export.name.clone(), Arc::new(export));
        Ok(())
    }

    /// Withdraws an export and waits until its connections have finished their requests and are closed. False if there is none
    /// of this name.
    pub async fn remove_export(&self, name: &str) -> bool {
        let Some(removed) = self.shared.state.lock().exports.remove(name) else { return false };
        let mut tasks = self.shared.tasks.subscribe();
        loop {
            tasks.borrow_and_update();
            let users: Vec<_> = self.shared.entries(|entry| entry.uses(&removed));
            if users.is_empty() {
                return true;
            }
            users.iter().for_each(|entry| entry.stop.notify_one());
            // The sender lives in `shared`.
            let _ = tasks.changed().await;
        }
    }

    /// Connections that are being served, for status.
    #[must_use]
    pub fn connections(&self) -> Vec<ConnectionStats> {
        let mut all: Vec<_> = self.shared.entries(|_| true).iter().filter_map(|entry| entry.stats()).collect();
        all.sort_by_key(|stats| stats.id);
        all
    }

    /// Connections that are being served, and how many there may be.
    #[must_use]
    pub fn connection_limit(&self) -> Limit {
        let used = self.shared.state.lock().served() as u64;
        Limit { used, limit: self.shared.options.connections_max as u64 }
    }

    /// Stops listening, lets every connection finish its requests in flight, and returns when all are closed.
    pub async fn shutdown(&self) {
        self.shared.close();
        let mut tasks = self.shared.tasks.subscribe();
        // The sender lives in `shared`.
        let _ = tasks.wait_for(|alive| *alive == 0).await;
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl Shared {
    fn close(&self) {
        self.state.lock().closing = true;
        self.stop_listening.notify_one();
        self.entries(|_| true).iter().for_each(|entry| entry.stop.notify_one());
    }

    fn entries(&self, keep: impl Fn(&Entry) -> bool) -> Vec<Arc<Entry>> {
        self.state.lock().connections.values().filter(|entry| keep(entry)).cloned().collect()
    }

    async fn listen(self: &Arc<Self>, mut bound: Bound) -> io::Result<()> {
        let Some(fd) = bound.fd.take() else { return Ok(()) };
        let listener = watch_owned(fd)?;
        let mut stop = std::pin::pin!(self.stop_listening.notified());
        if self.options.held {
            tokio::select! {
                biased;
                () = &mut stop => return Ok(()),
                () = self.open.notified() => {}
            }
        }
        loop {
            let mut guard = tokio::select! {
                biased;
                () = &mut stop => return Ok(()),
                ready = listener.readable() => ready?,
            };
            match accept_with(&listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(fd) => self.admit(fd),
                Err(rustix::io::Errno::AGAIN) => guard.clear_ready(),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(error @ (rustix::io::Errno::MFILE | rustix::io::Errno::NFILE | rustix::io::Errno::NOBUFS)) => {
                    tracing::warn!(%error, "cannot accept an NBD client; trying again");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn admit(self: &Arc<Self>, fd: OwnedFd) {
        let (fd, peer) = describe_peer(fd);
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let entry = Arc::new(Entry { id, peer, stop: Notify::new(), counters: Arc::default(), serving: Mutex::default() });
        {
            let mut state = self.state.lock();
            let (served, limit) = (state.served(), self.options.connections_max);
            if state.closing || served >= limit {
                tracing::warn!(peer = entry.peer, limit, "NBD client refused: too many connections");
                return;
            }
            if state.connections.len() - served >= HANDSHAKES_MAX {
                tracing::warn!(peer = entry.peer, limit = HANDSHAKES_MAX, "NBD client refused: too many handshakes");
                return;
            }
            state.connections.insert(id, Arc::clone(&entry));
        }
        self.tasks.send_modify(|alive| *alive += 1);
        let shared = Arc::clone(self);
        self.io.spawn(move || async move {
            let guard = TaskGuard(Arc::clone(&shared));
            let result = shared.connection(fd, &entry).await;
            match result {
                Ok(()) => tracing::debug!(id, peer = entry.peer, "NBD client left"),
                Err(error) => tracing::info!(id, peer = entry.peer, %error, "NBD client disconnected"),
            }
            shared.state.lock().connections.remove(&id);
            drop(guard);
        });
    }

    async fn connection(&self, fd: OwnedFd, entry: &Arc<Entry>) -> Result<(), ConnectionError> {
        let socket = Socket::new(fd)?;
        let negotiation = handshake(socket, self.options.tls.as_ref(), self);
        let negotiated = tokio::select! {
            biased;
            () = entry.stop.notified() => return Ok(()),
            result = tokio::time::timeout(self.options.handshake_timeout, negotiation) => {
                result.map_err(|_| ConnectionError::HandshakeTimeout)??
            }
        };
        let Some((stream, agreement)) = negotiated else { return Ok(()) };
        let Agreement { export, structured, base_allocation } = agreement;
        let terms = Terms { size: Offered::size(&export), read_only: Offered::read_only(&export), structured, base_allocation };
        {
            let state = self.state.lock();
            if state.served() >= self.options.connections_max {
                let limit = self.options.connections_max;
                tracing::warn!(peer = entry.peer, limit, "NBD client refused: too many connections");
                return Ok(());
            }
            *entry.serving.lock() = Some(Serving { export: Arc::clone(&export), tls: matches!(stream, Stream::Tls(_)) });
            // Withdrawn since it was agreed on: whoever withdrew it did not see this connection.
            if state.closing || !state.exports.get(&export.name).is_some_and(|now| Arc::ptr_eq(now, &export)) {
                return Ok(());
            }
        }
        let device = Arc::clone(&export.device);
        let connection = Connection::new(stream, device, terms, Arc::clone(&entry.counters));
        connection.serve(entry.stop.notified()).await
    }
}

impl State {
    fn served(&self) -> usize {
        self.connections.values().filter(|entry| entry.serving.lock().is_some()).count()
    }
}

impl Entry {
    fn uses(&self, export: &Arc<Export>) -> bool {
        self.serving.lock().as_ref().is_some_and(|serving| Arc::ptr_eq(&serving.export, export))
    }

    fn stats(&self) -> Option<ConnectionStats> {
        let serving = self.serving.lock();
        let Serving { export, tls } = serving.as_ref()?;
        Some(self.counters.snapshot(self.id, export.name.clone(), self.peer.clone(), *tls))
    }
}

impl Catalog for Shared {
    type Export = Arc<Export>;

    fn find(&self, name: &str) -> Option<Arc<Export>> {
        let exports = &self.state.lock().exports;
        if let Some(export) = exports.get(name) {
            return Some(Arc::clone(export));
        }
        if !name.is_empty() {
            return None;
        }
        let only = if exports.len() == 1 { exports.values().next() } else { None };
        exports.values().find(|export| export.default).or(only).cloned()
    }

    fn all(&self) -> Vec<Arc<Export>> {
        self.state.lock().exports.values().cloned().collect()
    }
}

/// Counts a task, also one that panics or is dropped with its thread.
struct TaskGuard(Arc<Shared>);

impl Drop for TaskGuard {
    fn drop(&mut self) {
        self.0.tasks.send_modify(|alive| *alive -= 1);
    }
}

/// Send buffer of a unix socket in bytes, as far as `net.core.wmem_max` allows: with the usual 208 KiB a client that reads
/// megabytes waits for this thread, and this thread for it, several times a reply. Such a buffer holds what is sent, not more.
const UNIX_SEND_BUFFER_BYTES: usize = 1 << 20;

/// Sets a connection up and names the other end.
fn describe_peer(fd: OwnedFd) -> (OwnedFd, String) {
    if let Ok(credentials) = sockopt::socket_peercred(&fd)
        && matches!(sockopt::socket_domain(&fd), Ok(rustix::net::AddressFamily::UNIX))
    {
        // Only speed hangs on it.
        let _ = sockopt::set_socket_send_buffer_size(&fd, UNIX_SEND_BUFFER_BYTES);
        return (fd, format!("pid {}", credentials.pid.as_raw_nonzero()));
    }
    let stream = TcpStream::from(fd);
    // Replies are sent whole; a dead client's connection must not stay for ever.
    let _ = stream.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(&stream, true);
    let peer = stream.peer_addr().map_or_else(|_| "unknown".to_owned(), |address| address.to_string());
    (stream.into(), peer)
}
