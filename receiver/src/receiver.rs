//! The running receiver: its endpoint, its store, and what the daemon asks of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use blockdev::BlockDevice;
use proto::fencing::GroupRole;
use proto::tls::IdentityError;
use proto::{CloseCode, Fingerprint, Generation, Identity, Name, Point};
use quinn::rustls::pki_types::CertificateDer;
use quinn::{Endpoint, Incoming, VarInt};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::adopt::{AdoptError, AdoptProgress, Adoption};
use crate::config::ReceiverConfig;
use crate::drill::{self, Drill, DrillError, DrillResult, DrillWish, Of, ResultsError, Whole};
use crate::fork::{Flattening, OpenFork};
use crate::group::{Group, GroupError};
use crate::kept::{KeptError, KeptFork};
use crate::node::{Means, Node, SelectError, Slot};
use crate::retention::keeper::Keeper;
use crate::session::{self, Client, one_line};
use crate::status::{self, GroupStatus, PointInfo};
use crate::store::{Store, StoreError};
use crate::view::View;

/// Handshakes at once; they are of anybody who can send packets. Sessions have their own limits.
const HANDSHAKES_MAX: usize = 64;
/// A handshake that is not done by then is given up.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// Sessions have this long to say their last words when the receiver stops.
const STOP_DEADLINE: Duration = Duration::from_secs(5);
/// Sessions of a client at once, for each group it may have: one, and one that takes over from it.
const SESSIONS_PER_GROUP: usize = 2;
/// Sessions a client may have in any case: those of a lost path linger until their idle timeout.
const SESSIONS_MIN: usize = 16;

/// Why a receiver does not start, or does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ReceiverError {
    /// Two clients have one name or one key.
    #[error("clients '{first}' and '{second}' have the same {what}: each client needs its own")]
    SameClient {
        /// One.
        first: Name,
        /// The other.
        second: Name,
        /// Name or key.
        what: &'static str,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Keys.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The socket.
    #[error("cannot listen on UDP {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The thread that folds.
    #[error("cannot start the retention thread: {source}")]
    Thread {
        /// Why.
        source: std::io::Error,
    },
    /// The group is not found.
    #[error(transparent)]
    Select(#[from] SelectError),
    /// The group failed.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// A drill.
    #[error(transparent)]
    Drill(#[from] DrillError),
    /// A kept fork.
    #[error(transparent)]
    Kept(#[from] KeptError),
    /// An image that was carried over.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    /// The results of drills.
    #[error(transparent)]
    Results(#[from] ResultsError),
    /// A task was stopped with its runtime.
    #[error("the node is stopping")]
    Stopping,
}

/// A group that is the running server.
#[derive(Clone)]
pub struct Activated {
    /// The client it was replicated from.
    pub client: Name,
    /// The group.
    pub group: Name,
    /// The point it was started from.
    pub point: Point,
    /// The generation that holds since.
    pub generation: Generation,
    /// Name of the fork.
    pub fork: Name,
    /// Its disks, writable.
    pub volumes: Vec<(Name, Arc<dyn BlockDevice>)>,
}

impl std::fmt::Debug for Activated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Activated({}/{} at {})", self.client, self.group, self.point)
    }
}

/// A running receiver.
#[derive(Debug)]
pub struct Receiver {
    node: Arc<Node>,
    endpoint: Endpoint,
    stop: watch::Sender<bool>,
    keeper: Keeper,
    accepting: JoinHandle<()>,
    /// Set if activated copies are flattened, one at a time.
    flatten: Option<Arc<Semaphore>>,
}

impl Receiver {
    /// Opens the store, with recovery of every group, and listens. Needs a multi-threaded tokio runtime.
    ///
    /// A group that cannot be opened is reported by [`status`](Self::status); the others go on.
    ///
    /// # Errors
    /// [`ReceiverError`].
    pub async fn start(config: ReceiverConfig, identity: Identity) -> Result<Self, ReceiverError> {
        let ReceiverConfig { listen, store, clients, flatten, limits } = config;
        let flatten = flatten.then(|| Arc::new(Semaphore::new(1)));
        for (i, a) in clients.iter().enumerate() {
            for b in clients.iter().skip(i + 1) {
                let what = match (a.name == b.name, a.key == b.key) {
                    (true, _) => "name",
                    (_, true) => "key",
                    _ => continue,
                };
                return Err(ReceiverError::SameClient { first: a.name.clone(), second: b.name.clone(), what });
            }
        }
        let connections = Arc::new(Semaphore::new(limits.connections));
        let sessions_max =
            limits.groups_per_client.saturating_mul(SESSIONS_PER_GROUP).clamp(SESSIONS_MIN, Semaphore::MAX_PERMITS);
        let configured = clients.clone();
        let node = tokio::task::spawn_blocking(move || Node::open(Store::open(&store)?, &configured, limits, Means::NODE))
            .await
            .map_err(|_| ReceiverError::Stopping)??;
        let node = Arc::new(node);
        let keeper = Keeper::start(&node).map_err(|source| ReceiverError::Thread { source })?;
        let keys: BTreeSet<Fingerprint> = clients.iter().map(|c| c.key).collect();
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(identity.quic_server(keys)?));
        server.transport_config(Arc::new(proto::transport::settings(true)));
        let socket = std::net::UdpSocket::bind(listen);
        let endpoint = socket
            .inspect(enlarge_buffers)
            .and_then(|socket| Endpoint::new(identity.quic_endpoint(), Some(server), socket, Arc::new(quinn::TokioRuntime)))
            .map_err(|source| ReceiverError::Listen { address: listen, source })?;
        let clients: BTreeMap<Fingerprint, Arc<Client>> =
            clients.into_iter().map(|config| (config.key, Arc::new(Client::new(config, sessions_max)))).collect();
        let (stop, stopped) = watch::channel(false);
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        let accept = Accept { node: Arc::clone(&node), clients: Arc::new(clients), connections, handshakes, stopped };
        let accepting = tokio::spawn(accept.run(endpoint.clone()));
        Ok(Self { node, endpoint, stop, keeper, accepting, flatten })
    }

    /// The address it listens on.
    ///
    /// # Errors
    /// [`ReceiverError::Listen`] if the socket is gone.
    pub fn local_addr(&self) -> Result<SocketAddr, ReceiverError> {
        let address = SocketAddr::from(([0, 0, 0, 0], 0));
        self.endpoint.local_addr().map_err(|source| ReceiverError::Listen { address, source })
    }

    /// The state of every group, by client and group.
    #[must_use]
    pub fn status(&self) -> Vec<GroupStatus> {
        let of = |(client, group, slot)| match slot {
            Slot::Open(group) => status::of(&group),
            Slot::Broken(cause) => status::broken(client, group, cause.to_string()),
        };
        self.node.all().into_iter().map(of).collect()
    }

    /// The kept points of a group (`group` or `client/group`), oldest first.
    ///
    /// # Errors
    /// [`ReceiverError::Select`].
    pub fn points(&self, group: &str) -> Result<Vec<PointInfo>, ReceiverError> {
        let group = self.node.select(group)?;
        let state = group.shared.state.read();
        Ok(state.points.iter().map(PointInfo::from).collect())
    }

    /// The named points of a group.
    ///
    /// # Errors
    /// [`ReceiverError::Select`].
    pub fn names(&self, group: &str) -> Result<BTreeMap<Name, Point>, ReceiverError> {
        Ok(self.node.select(group)?.shared.names.all())
    }

    /// Names a kept point; it stays until the name is taken away. Durable when this returns.
    ///
    /// # Errors
    /// [`ReceiverError`].
    pub async fn name_point(&self, group: &str, point: Point, name: &Name) -> Result<(), ReceiverError> {
        let (group, name) = (self.node.select(group)?, name.clone());
        let named = tokio::task::spawn_blocking(move || group.shared.name_point(point, &name));
        Ok(named.await.map_err(|_| ReceiverError::Stopping)??)
    }

    /// Takes a name away and gives the point that had it.
    ///
    /// # Errors
    /// [`ReceiverError`].
    pub async fn unname_point(&self, group: &str, name: &Name) -> Result<Point, ReceiverError> {
        let (group, name) = (self.node.select(group)?, name.clone());
        let removed = tokio::task::spawn_blocking(move || group.shared.names.remove(&group.shared.disk, &name));
        Ok(removed.await.map_err(|_| ReceiverError::Stopping)?.map_err(GroupError::from)?)
    }

    /// Read-only disks of a group at a kept point (the newest by default), and that point.
    ///
    /// # Errors
    /// [`ReceiverError`].
    pub async fn view(&self, group: &str, point: Option<Point>) -> Result<(Point, Vec<(Name, View)>), ReceiverError> {
        let group = self.node.select(group)?;
        let shared = Arc::clone(&group.shared);
        let views = tokio::task::spawn_blocking(move || {
            let empty = || GroupError::Empty { group: shared.folder.group.clone() };
            let newest = shared.state.read().points.last().map(|p| p.point);
            let point = point.or(newest).ok_or_else(empty)?;
            let views = crate::view::views(&shared, shared.index_at(point)?)?;
            let names = shared.volumes.iter().map(|v| v.name.clone());
            Ok::<_, GroupError>((point, names.zip(views).collect()))
        });
        Ok(views.await.map_err(|_| ReceiverError::Stopping)??)
    }

    /// Makes the copy the running server: raises the generation durably, ends the primary's session for good, and opens
    /// a writable fork of `point` (the newest by default). Asked again, it gives the same fork.
    ///
    /// # Errors
    /// [`ReceiverError`]. After an error it can be asked again.
    pub async fn failover(&self, group: &str, point: Option<Point>) -> Result<Activated, ReceiverError> {
        let group = self.node.select(group)?;
        self.activate(&group, point).await
    }

    async fn activate(&self, group: &Arc<Group>, point: Option<Point>) -> Result<Activated, ReceiverError> {
        let fork = crate::node::activate(group, point).await?;
        if let Some(turn) = &self.flatten {
            let mut flattening = group.flattening.lock();
            if flattening.is_none() {
                match Flattening::start(Arc::clone(&group.shared), Arc::clone(&fork), Arc::clone(turn)) {
                    Ok(started) => *flattening = Some(started),
                    // The copy runs as well without.
                    Err(error) => tracing::error!("{}: not flattened: {error}", group.shared.folder.path.display()),
                }
            }
        }
        Ok(described(group, &fork))
    }

    /// Has the primary of a group take no more writes and commit what it has. Returns the point that holds all of it. The primary takes writes
    /// again after [`give_up_drain`](Self::give_up_drain), or if it is not done `within` the time; else the copy is to be activated.
    ///
    /// # Errors
    /// [`ReceiverError`]; nothing was changed then.
    pub async fn drain(&self, group: &str, within: Duration) -> Result<Point, ReceiverError> {
        Ok(self.node.select(group)?.drain(within).await?)
    }

    /// Lets the primary take writes again; does nothing to a group that is active.
    ///
    /// # Errors
    /// [`ReceiverError::Select`].
    pub async fn give_up_drain(&self, group: &str) -> Result<(), ReceiverError> {
        let group = self.node.select(group)?;
        if group.shared.state.read().role == GroupRole::Replica {
            group.give_up_drain().await;
        }
        Ok(())
    }

    /// Changes whenever a group was given back to its primary, and is active no more.
    #[must_use]
    pub fn handed_back(&self) -> watch::Receiver<u64> {
        self.node.watch_handed()
    }

    /// The groups that are the running server, opened again after a start.
    pub async fn activated(&self) -> Vec<Result<Activated, ReceiverError>> {
        let mut all = Vec::new();
        for group in self.node.open_groups() {
            let role = group.shared.state.read().role;
            if role == GroupRole::Active {
                all.push(self.activate(&group, None).await);
            }
        }
        all
    }

    /// A point or a kept fork of a group for a reader of all of it: its cut, and its disks, read-only.
    ///
    /// # Errors
    /// [`ReceiverError`].
    pub async fn whole(&self, group: &str, of: Of) -> Result<Whole, ReceiverError> {
        let group = self.node.select(group)?;
        let whole = tokio::task::spawn_blocking(move || drill::whole(&group, &of));
        Ok(whole.await.map_err(|_| ReceiverError::Stopping)??)
    }

    /// Removes a fork that keeps what the group's primary had written of its own. It is gone when this returns.
    ///
    /// # Errors
    /// [`ReceiverError`].
    pub async fn remove_fork(&self, group: &str, fork: &Name) -> Result<KeptFork, ReceiverError> {
        let (group, fork) = (self.node.select(group)?, fork.clone());
        let removed = tokio::task::spawn_blocking(move || group.shared.kept.remove(&group.shared, &fork));
        Ok(removed.await.map_err(|_| ReceiverError::Stopping)??)
    }

    /// Makes a drill of a group; nothing of the group changes.
    ///
    /// # Errors
    /// [`ReceiverError`].
    pub async fn drill(&self, group: &str, wish: DrillWish) -> Result<Drill, ReceiverError> {
        let group = self.node.select(group)?;
        let made = tokio::task::spawn_blocking(move || drill::make(&group, &wish));
        Ok(made.await.map_err(|_| ReceiverError::Stopping)??)
    }

    /// Throws a drill away. Devices that are still in use stay usable.
    ///
    /// # Errors
    /// [`ReceiverError::Group`] if its files could not be removed; the next start tries again.
    pub async fn end_drill(&self, drill: Drill) -> Result<(), ReceiverError> {
        let ended = tokio::task::spawn_blocking(move || drill::end(&drill));
        Ok(ended.await.map_err(|_| ReceiverError::Stopping)?.map_err(GroupError::from)?)
    }

    /// Keeps what a drill found, durably.
    ///
    /// # Errors
    /// [`ReceiverError`].
    pub async fn record_drill(&self, group: &str, result: DrillResult) -> Result<(), ReceiverError> {
        let group = self.node.select(group)?;
        let kept = tokio::task::spawn_blocking(move || group.shared.drills.record(&group.shared.disk, result));
        Ok(kept.await.map_err(|_| ReceiverError::Stopping)??)
    }

    /// What drills of a group found, oldest first.
    ///
    /// # Errors
    /// [`ReceiverError`].
    pub fn drill_results(&self, group: &str) -> Result<Vec<Arc<DrillResult>>, ReceiverError> {
        Ok(self.node.select(group)?.shared.drills.all()?)
    }

    /// Makes images that were carried over by hand the base of a new group. Takes as long as copying them; nothing can be activated before
    /// the group's primary has compared them.
    ///
    /// # Errors
    /// [`ReceiverError::Adopt`]; nothing of it is left then.
    pub fn adopt(
        &self,
        adoption: Adoption,
        progress: Arc<AdoptProgress>,
    ) -> impl Future<Output = Result<(), ReceiverError>> + Send + use<> {
        let node = Arc::clone(&self.node);
        let adopted = tokio::task::spawn_blocking(move || crate::adopt::adopt(&node, &adoption, &progress));
        async move { Ok(adopted.await.map_err(|_| ReceiverError::Stopping)??) }
    }

    /// Ends all sessions, syncs what has to be and gives the store up. Devices that are still in use stay usable.
    pub async fn shutdown(self) {
        let _ = self.stop.send(true);
        let _ = self.accepting.await;
        let keeper = self.keeper;
        let _ = tokio::task::spawn_blocking(move || keeper.stop()).await;
        for group in self.node.open_groups() {
            group.stop().await;
        }
        self.endpoint.close(VarInt::from_u32(CloseCode::Stopping as u32), b"the receiver is stopping");
        self.endpoint.wait_idle().await;
    }
}

/// Asks for larger socket buffers; less than asked for costs speed only.
fn enlarge_buffers(socket: &std::net::UdpSocket) {
    let bytes = proto::transport::SOCKET_BUFFER_BYTES;
    let receive = rustix::net::sockopt::set_socket_recv_buffer_size(socket, bytes);
    let send = rustix::net::sockopt::set_socket_send_buffer_size(socket, bytes);
    if let Err(error) = receive.and(send) {
        tracing::debug!(%error, "socket buffers keep their size");
    }
}

fn described(group: &Group, fork: &OpenFork) -> Activated {
    Activated {
        client: group.shared.folder.client.clone(),
        group: group.shared.folder.group.clone(),
        point: fork.point,
        generation: fork.generation,
        fork: fork.name.clone(),
        volumes: fork.devices(),
    }
}

type Clients = BTreeMap<Fingerprint, Arc<Client>>;

/// Accepts connections until told to stop, then waits for the sessions.
struct Accept {
    node: Arc<Node>,
    clients: Arc<Clients>,
    /// One permit a connection, taken before anything is done for it.
    connections: Arc<Semaphore>,
    /// One permit a connection whose key is not known yet.
    handshakes: Arc<Semaphore>,
    stopped: watch::Receiver<bool>,
}

impl Accept {
    async fn run(mut self, endpoint: Endpoint) {
        let mut sessions = tokio::task::JoinSet::new();
        loop {
            let incoming = tokio::select! {
                biased;
                _ = self.stopped.wait_for(|stop| *stop) => break,
                Some(_) = sessions.join_next(), if !sessions.is_empty() => continue,
                incoming = endpoint.accept() => incoming,
            };
            let Some(incoming) = incoming else { break };
            // An address that may be forged costs one packet and no permit.
            if !incoming.remote_address_validated() && incoming.may_retry() {
                if let Err(error) = incoming.retry() {
                    tracing::debug!(%error, "no retry");
                }
                continue;
            }
            let handshake = Arc::clone(&self.handshakes).try_acquire_owned();
            let (Ok(permit), Ok(handshake)) = (Arc::clone(&self.connections).try_acquire_owned(), handshake) else {
                incoming.refuse();
                continue;
            };
            let (node, clients, mut stopped) = (Arc::clone(&self.node), Arc::clone(&self.clients), self.stopped.clone());
            sessions.spawn(async move {
                let greeted = greet(incoming, &clients, &mut stopped).await;
                drop(handshake);
                if let Some((connection, client)) = greeted {
                    admit(connection, node, client, stopped).await;
                }
                drop(permit);
            });
        }
        let all = async { while sessions.join_next().await.is_some() {} };
        if tokio::time::timeout(STOP_DEADLINE, all).await.is_err() {
            tracing::warn!("{} sessions did not end within {} seconds", sessions.len(), STOP_DEADLINE.as_secs());
            sessions.shutdown().await;
        }
    }
}

/// Why a handshake failed, in words that say whose key is meant.
fn not_let_in(error: &quinn::ConnectionError) -> String {
    let is_alert = |code: quinn::TransportErrorCode| (0x100..0x200).contains(&u64::from(code));
    match error {
        quinn::ConnectionError::ConnectionClosed(close) if is_alert(close.error_code) => {
            "it does not accept this node's key: compare its `peer_key` with `twinsite id` here".to_owned()
        }
        quinn::ConnectionError::TransportError(refused) if is_alert(refused.code) => {
            let reason = one_line(&refused.reason);
            format!("not let in: {reason}: add its key to [[receiver.client]] if it is one of yours")
        }
        other => format!("handshake failed: {}", one_line(other)),
    }
}

/// The handshake; a key that is not pinned ends here.
async fn greet(
    incoming: Incoming,
    clients: &Clients,
    stopped: &mut watch::Receiver<bool>,
) -> Option<(quinn::Connection, Arc<Client>)> {
    let peer = incoming.remote_address();
    let connecting = match incoming.accept() {
        Ok(connecting) => connecting,
        Err(error) => {
            tracing::info!("{peer}: {}", one_line(&error));
            return None;
        }
    };
    let connection = tokio::select! {
        _ = stopped.wait_for(|stop| *stop) => return None,
        connection = tokio::time::timeout(HANDSHAKE_DEADLINE, connecting) => connection,
    };
    let connection = match connection {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            tracing::warn!("{peer}: {}", not_let_in(&error));
            return None;
        }
        Err(_) => {
            tracing::info!("{peer}: no handshake within {} seconds", HANDSHAKE_DEADLINE.as_secs());
            return None;
        }
    };
    let key = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .and_then(|keys| keys.first().map(|key| Fingerprint::of_spki(key.as_ref())));
    let Some(client) = key.and_then(|key| clients.get(&key)) else {
        // The verifier let it in, so this cannot be; and if it were, it would get nothing.
        connection.close(VarInt::from_u32(CloseCode::UnknownGroup as u32), b"unknown key");
        return None;
    };
    Some((connection, Arc::clone(client)))
}

/// One client's sessions leave room for those of the others.
async fn admit(connection: quinn::Connection, node: Arc<Node>, client: Arc<Client>, stopped: watch::Receiver<bool>) {
    let Ok(_permit) = client.sessions.try_acquire() else {
        let reason = format!("client '{}' has too many sessions at once", client.config.name);
        tracing::warn!("{}: {reason}", connection.remote_address());
        return connection.close(VarInt::from_u32(CloseCode::Limit as u32), reason.as_bytes());
    };
    session::serve(connection, node, Arc::clone(&client), stopped).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Would catch a peer's text that forges lines of a log.
    #[test]
    fn a_peers_text_stays_on_one_line() {
        let close = quinn::ApplicationClose { error_code: VarInt::from_u32(1), reason: "bye\nERROR \x1b[31mforged".into() };
        let error = quinn::ConnectionError::ApplicationClosed(close);
        assert_eq!(not_let_in(&error), "handshake failed: closed by peer: bye ERROR  [31mforged (code 1)");
    }
}
