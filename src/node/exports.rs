//! The NBD servers of a node: one for each address, shared by every disk that names the address.
//!
//! Knows nothing of groups beyond their name; who adds disks also withdraws them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use blockdev::nbd::{ConnectionStats, Export, ListenAddr, NbdServer, NbdServerError, ServerOptions, TlsError, server_config};
use blockdev::{BlockDevice, IoThreads};
use proto::Name;
use replicator::QueueStatus;
use tokio::sync::Mutex;

use crate::api::{ConnectionStatus, ExportStatus, ExportedDisk};
use crate::config::TlsConfig;

/// How long a server's clients may take to finish the requests they have in flight.
const DRAIN: Duration = Duration::from_secs(5);

/// Niceness of the threads that serve drills: above that of replication, which goes first.
const DRILL_NICE: i32 = 15;

/// Why disks cannot be offered. One line each.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExportError {
    #[error(transparent)]
    Nbd(#[from] NbdServerError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(
        "{address} serves a disk named {disk} already, of group {group}: nothing was changed; choose another --export address"
    )]
    NameTaken { address: String, disk: String, group: String },
    #[error(
        "{address} serves drills, or disks that are none, and not both: nothing was changed; choose another --export address"
    )]
    Mixed { address: String },
    #[error("cannot start threads for drills: {0}")]
    Threads(std::io::Error),
    #[error("{address} is not served any more: the node is stopping")]
    Stopping { address: String },
    #[error("{}: cannot make the folder of the socket: {source}: make it, or choose another path", path.display())]
    Folder { path: PathBuf, source: std::io::Error },
}

/// The servers, by address.
pub(crate) struct Exports {
    io: IoThreads,
    /// Made for the first drill.
    yielding: OnceLock<IoThreads>,
    servers: Mutex<BTreeMap<String, Served>>,
    /// Why a group's disks are not offered, by group.
    failed: Mutex<BTreeMap<String, String>>,
}

/// Where groups are offered now, and why others are not.
#[derive(Debug, Default)]
pub(crate) struct Offered {
    pub(crate) addresses: BTreeMap<String, String>,
    pub(crate) failed: BTreeMap<String, String>,
}

struct Served {
    server: NbdServer,
    /// Of drills, on threads that yield.
    yields: bool,
    tls: bool,
    disks: Vec<ExportedDisk>,
    /// Disks of groups that are being started. Until they are there clients wait: a guest that comes back while its node starts must not
    /// find an address without its disk.
    expected: usize,
}

impl Exports {
    pub(crate) fn new(io: IoThreads) -> Self {
        Self { io, yielding: OnceLock::new(), servers: Mutex::default(), failed: Mutex::default() }
    }

    /// Clients of `address` wait until [`arrived`](Self::arrived) was called as often, or somebody adds disks of another group there.
    pub(crate) async fn expect(&self, address: &ListenAddr) {
        if let Some(served) = self.servers.lock().await.get_mut(&address.to_string()) {
            served.expected += 1;
        }
    }

    /// An expected disk is there, or will not come. With the last one the address is served, if it has any.
    pub(crate) async fn arrived(&self, address: &ListenAddr) {
        if let Some(served) = self.servers.lock().await.get_mut(&address.to_string()) {
            served.expected = served.expected.saturating_sub(1);
            if served.expected == 0 && !served.disks.is_empty() {
                served.server.open();
            }
        }
    }

    /// Makes sure that a server listens on `address`; its clients wait until disks are added. Returns the address with the port that
    /// the system chose. Nobody else's server is touched.
    pub(crate) async fn listen(&self, address: &ListenAddr, tls: Option<&TlsConfig>) -> Result<ListenAddr, ExportError> {
        self.listen_on(address, tls, (&self.io, false)).await
    }

    /// As [`listen`](Self::listen), for drills: on threads that yield to guests and to replication.
    pub(crate) async fn listen_yielding(&self, address: &ListenAddr) -> Result<ListenAddr, ExportError> {
        let io = match self.yielding.get() {
            Some(io) => io,
            None => {
                let made = yielding_threads(self.io.count()).map_err(ExportError::Threads)?;
                self.yielding.get_or_init(|| made)
            }
        };
        self.listen_on(address, None, (io, true)).await
    }

    async fn listen_on(
        &self,
        address: &ListenAddr,
        tls: Option<&TlsConfig>,
        (io, yields): (&IoThreads, bool),
    ) -> Result<ListenAddr, ExportError> {
        let mut servers = self.servers.lock().await;
        if let Some(served) = servers.get(&address.to_string()) {
            // A guest must not end up on threads that yield to everybody, nor a drill on its.
            let same = served.yields == yields;
            return if same { Ok(address.clone()) } else { Err(ExportError::Mixed { address: address.to_string() }) };
        }
        if let ListenAddr::Unix(path) = address
            && let Some(folder) = path.parent()
            && !folder.as_os_str().is_empty()
        {
            match std::fs::create_dir(folder) {
                Err(source) if source.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(ExportError::Folder { path: folder.to_path_buf(), source });
                }
                _ => {}
            }
        }
        let tls = tls.map(|t| server_config(&t.cert, &t.key, t.client_ca.as_deref())).transpose()?;
        if let ListenAddr::Tcp(ip) = address
            && tls.is_none()
            && !ip.ip().is_loopback()
        {
            tracing::warn!(%address, "anyone who reaches this address can read and write its disks: use a unix socket, or loopback, or for a [[group.disk]] tls with client_ca");
        }
        let has_tls = tls.is_some();
        let server = NbdServer::bind(address, ServerOptions { tls, held: true, ..ServerOptions::default() }, io)?;
        let bound = server.address().clone();
        servers.insert(bound.to_string(), Served { server, yields, tls: has_tls, disks: Vec::new(), expected: 0 });
        Ok(bound)
    }

    /// Refuses if another group has one of these names at `address`.
    pub(crate) async fn check_free(
        &self,
        address: &ListenAddr,
        group: &str,
        names: impl Iterator<Item = &Name>,
    ) -> Result<(), ExportError> {
        let servers = self.servers.lock().await;
        let Some(served) = servers.get(&address.to_string()) else { return Ok(()) };
        for name in names {
            if let Some(other) = served.disks.iter().find(|d| d.name == name.as_str() && d.group != group) {
                let (address, disk, group) = (address.to_string(), other.name.clone(), other.group.clone());
                return Err(ExportError::NameTaken { address, disk, group });
            }
        }
        Ok(())
    }

    /// Notes why the disks of `group` are not offered, until they are.
    pub(crate) async fn note_failed(&self, group: &str, error: &str) {
        self.failed.lock().await.insert(group.to_owned(), error.to_owned());
    }

    /// Where groups are offered.
    pub(crate) async fn offered(&self) -> Offered {
        let mut addresses = BTreeMap::new();
        for (address, served) in self.servers.lock().await.iter() {
            addresses.extend(served.disks.iter().map(|d| (d.group.clone(), address.clone())));
        }
        Offered { addresses, failed: self.failed.lock().await.clone() }
    }

    /// Offers `disks` of `group` on `address`, all or none, and serves them. While the node stops nothing is served any more: the next start does.
    pub(crate) async fn add(
        &self,
        address: &ListenAddr,
        group: &str,
        disks: Vec<(Name, Arc<dyn BlockDevice>)>,
    ) -> Result<(), ExportError> {
        match self.add_expected(address, group, disks).await {
            Err(ExportError::Stopping { .. }) => return Ok(()),
            added => added?,
        }
        if let Some(served) = self.servers.lock().await.get(&address.to_string()) {
            served.server.open();
        }
        Ok(())
    }

    /// As [`add`](Self::add); they are served when all that are expected there have [`arrived`](Self::arrived).
    pub(crate) async fn add_expected(
        &self,
        address: &ListenAddr,
        group: &str,
        disks: Vec<(Name, Arc<dyn BlockDevice>)>,
    ) -> Result<(), ExportError> {
        let mut servers = self.servers.lock().await;
        let Some(served) = servers.get_mut(&address.to_string()) else {
            return Err(ExportError::Stopping { address: address.to_string() });
        };
        let mut added = Vec::new();
        for (name, device) in disks {
            let export = Export { description: format!("{group}/{name}"), ..Export::new(name.as_str(), device) };
            if let Err(error) = served.server.add_export(export) {
                for disk in &added {
                    let ExportedDisk { name, .. } = disk;
                    served.server.remove_export(name).await;
                }
                return Err(error.into());
            }
            added.push(ExportedDisk { name: name.to_string(), group: group.to_owned() });
        }
        served.disks.append(&mut added);
        self.failed.lock().await.remove(group);
        Ok(())
    }

    /// Withdraws all disks of `group`; their servers go on listening until [`prune`](Self::prune).
    pub(crate) async fn withdraw(&self, group: &str) {
        let mut servers = self.servers.lock().await;
        for served in servers.values_mut() {
            for disk in served.disks.iter().filter(|d| d.group == group) {
                if tokio::time::timeout(DRAIN, served.server.remove_export(&disk.name)).await.is_err() {
                    tracing::warn!(group, disk = disk.name, "a client still has requests in flight; it is left behind");
                }
            }
            served.disks.retain(|d| d.group != group);
        }
    }

    /// Stops servers that offer nothing, and of which nothing is expected.
    pub(crate) async fn prune(&self) {
        let mut servers = self.servers.lock().await;
        let (idle, busy) =
            std::mem::take(&mut *servers).into_iter().partition(|(_, served)| served.disks.is_empty() && served.expected == 0);
        *servers = busy;
        stop(idle).await;
    }

    /// What `status` shows.
    pub(crate) async fn status(&self) -> Vec<ExportStatus> {
        let servers = self.servers.lock().await;
        servers
            .iter()
            .map(|(address, served)| ExportStatus {
                address: address.clone(),
                tls: served.tls,
                disks: served.disks.clone(),
                connections: served.server.connections().into_iter().map(connection).collect(),
                connections_max: served.server.connection_limit().limit,
            })
            .collect()
    }

    /// Stops everything: clients finish the requests they have in flight, for a bounded time.
    pub(crate) async fn shutdown(&self) {
        stop(std::mem::take(&mut *self.servers.lock().await)).await;
    }
}

fn yielding_threads(count: usize) -> std::io::Result<IoThreads> {
    let io = IoThreads::new(count)?;
    io.on_each(|| {
        // Without the right to be nicer nothing breaks.
        if let Err(error) = rustix::process::setpriority_process(None, DRILL_NICE) {
            tracing::debug!(%error, "a thread of drills keeps its priority");
        }
    });
    Ok(io)
}

async fn stop(servers: BTreeMap<String, Served>) {
    let all = servers.iter().map(|(address, served)| async move {
        if tokio::time::timeout(DRAIN, served.server.shutdown()).await.is_err() {
            tracing::warn!(address, "NBD clients still had requests in flight; they were cut off");
        }
    });
    futures_util::future::join_all(all).await;
}

fn connection(stats: ConnectionStats) -> ConnectionStatus {
    let queue = |name: &str, unit: &str, limit: blockdev::nbd::Limit| QueueStatus {
        name: name.to_owned(),
        unit: unit.to_owned(),
        used: limit.used,
        limit: limit.limit,
    };
    ConnectionStatus {
        export: stats.export,
        peer: stats.peer,
        tls: stats.tls,
        requests: stats.requests,
        read_bytes: stats.read_bytes,
        written_bytes: stats.written_bytes,
        queues: vec![
            queue("nbd-requests", "requests", stats.requests_in_flight),
            queue("nbd-bytes", "bytes", stats.bytes_in_flight),
        ],
    }
}
