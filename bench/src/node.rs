//! Twinsite nodes: their folders, configuration and pairing, and what their control sockets say.

use std::fs;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::child::{self, Daemon};
use crate::context::{Bench, TWINSITE};
use crate::{http, os, tools};

const START_MAX: Duration = Duration::from_secs(30);
const COPY_MAX: Duration = Duration::from_secs(600);
/// How often a wait asks.
const PACE: Duration = Duration::from_millis(2);
/// A queue that `status` shows in bytes and that is a file: no memory, so it does not raise the bound.
const ON_DISK: &str = "spilled-before-write";
/// Name of every disk, which is also its export's.
pub(crate) const DISK: &str = "disk";
/// Name of every group; two primaries are told apart by their keys.
const GROUP: &str = "bench";

/// A node's folder.
#[derive(Debug)]
struct Site {
    name: String,
    binary: PathBuf,
    folder: PathBuf,
}

impl Site {
    fn new(bench: &Bench, binary: &Path, name: &str) -> Result<Self> {
        let folder = bench.path(name);
        fs::create_dir(&folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
        Ok(Self { name: name.to_owned(), binary: binary.to_path_buf(), folder })
    }

    fn config(&self) -> PathBuf {
        self.folder.join("twinsite.toml")
    }

    fn control(&self) -> PathBuf {
        self.folder.join("control.sock")
    }

    fn write(&self, roles: &str) -> Result<()> {
        let text = format!(
            "[node]\nname = \"{}\"\nstate_dir = \"state\"\ncontrol = \"control.sock\"\nlog = \"warn\"\n\n{roles}",
            self.name
        );
        fs::write(self.config(), text).with_context(|| format!("{}: cannot be written", self.config().display()))
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(words).arg("--config").arg(self.config());
        command
    }

    /// Its key, made at the first call.
    fn key(&self, bench: &Bench) -> Result<String> {
        #[derive(Deserialize)]
        struct Id {
            key: String,
        }
        let text = child::run(bench, &format!("{}-id", self.name), self.command(&["id", "--json"]), START_MAX)?;
        Ok(serde_json::from_str::<Id>(&text).with_context(|| format!("{}: twinsite id: not as expected", self.name))?.key)
    }

    fn start(&self, bench: &Bench) -> Result<Daemon> {
        let mut daemon = Daemon::spawn(bench, &self.name, self.command(&["run"]))?;
        let control = self.control();
        daemon.wait_until("answers on its control socket", START_MAX, || Ok(http::get(&control, "/v1/id").is_ok()))?;
        Ok(daemon)
    }

    fn status(&self) -> Result<NodeStatus> {
        let body = http::get(&self.control(), "/v1/status")?;
        serde_json::from_slice(&body).with_context(|| format!("{}: GET /v1/status: not as expected", self.name))
    }
}

/// A queue and its limit.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Queue {
    pub(crate) name: String,
    pub(crate) unit: String,
    pub(crate) limit: u64,
}

/// The part of the primary's status that experiments use.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct GroupStatus {
    pub(crate) state: String,
    pub(crate) error: Option<String>,
    pub(crate) committed: Option<serde_json::Value>,
    pub(crate) lag_ms: u64,
    pub(crate) dirty_bytes: u64,
    pub(crate) suspect_bytes: u64,
    pub(crate) compared_bytes: u64,
    pub(crate) differing_bytes: u64,
    pub(crate) captured_bytes: u64,
    pub(crate) zero_bytes: u64,
    pub(crate) sent_bytes: u64,
    pub(crate) wire_bytes: u64,
    pub(crate) copied_before_write: u64,
    pub(crate) epochs_committed: u64,
    pub(crate) epochs_merged: u64,
    pub(crate) queues: Vec<Queue>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "run")]
enum Primaries {
    Running(Box<GroupStatus>),
    Failed { error: String },
}

#[derive(Debug, Deserialize)]
struct Connection {
    queues: Vec<Queue>,
}

#[derive(Debug, Deserialize)]
struct Export {
    connections: Vec<Connection>,
}

/// The part of a copy's status that experiments use.
#[derive(Debug, Deserialize)]
pub(crate) struct Copy {
    queues: Vec<Queue>,
    pub(crate) received_bytes: u64,
    pub(crate) stored_bytes: u64,
    pub(crate) retention: Retention,
    active: Option<Active>,
}

/// What a copy has given up.
#[derive(Debug, Deserialize)]
pub(crate) struct Retention {
    pub(crate) folding: Option<serde_json::Value>,
    pub(crate) folds: u64,
    pub(crate) folded_bytes: u64,
    pub(crate) freed_bytes: u64,
    pub(crate) thins: u64,
    pub(crate) thinned_points: u64,
    pub(crate) thinned_freed_bytes: u64,
    pub(crate) thinned_written_bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Active {
    flatten: Option<Flatten>,
}

#[derive(Debug, Deserialize)]
struct Flatten {
    state: String,
}

#[derive(Debug, Deserialize)]
struct ReceiverStatus {
    error: Option<String>,
    groups: Vec<Copy>,
}

#[derive(Debug, Deserialize)]
struct NodeStatus {
    primary: Vec<Primaries>,
    receiver: Option<ReceiverStatus>,
    exports: Vec<Export>,
}

/// A primary to be made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PrimarySpec<'a> {
    pub(crate) name: &'a str,
    pub(crate) disk: &'a Path,
    pub(crate) interval: &'a str,
}

/// A primary of one group of one disk.
#[derive(Debug)]
pub(crate) struct Primary {
    site: Site,
    disk: PathBuf,
    peer: String,
    peer_key: String,
}

/// A receiver.
#[derive(Debug)]
pub(crate) struct Receiver {
    site: Site,
    listen: String,
    /// Whom it knows, as its configuration says it.
    clients: String,
    /// Whether it makes raw files of active copies: off where it would disturb a measurement.
    flatten: bool,
}

/// Makes a receiver and primaries that know each other's keys; starts none.
pub(crate) fn pair(bench: &Bench, receiver: &str, specs: &[PrimarySpec<'_>]) -> Result<(Receiver, Vec<Primary>)> {
    let binary = bench.binary(&TWINSITE)?;
    let site = Site::new(bench, &binary, receiver)?;
    let listen = free_udp_address()?;
    let mut receiver = Receiver { site, listen, clients: String::new(), flatten: false };
    receiver.configure()?;
    let peer_key = receiver.site.key(bench)?;
    let mut primaries = Vec::new();
    for spec in specs {
        let primary = Primary {
            site: Site::new(bench, &binary, spec.name)?,
            disk: spec.disk.to_path_buf(),
            peer: receiver.listen.clone(),
            peer_key: peer_key.clone(),
        };
        primary.configure(spec.interval)?;
        let key = primary.site.key(bench)?;
        receiver.clients.push_str(&format!("\n[[receiver.client]]\nname = \"{}\"\nkey = \"{key}\"\n", spec.name));
        primaries.push(primary);
    }
    receiver.configure()?;
    Ok((receiver, primaries))
}

/// One primary and its receiver.
pub(crate) fn pair_of_one(bench: &Bench, name: &str, disk: &Path, interval: &str) -> Result<(Receiver, Primary)> {
    let primary = format!("p{name}");
    let specs = [PrimarySpec { name: &primary, disk, interval }];
    let (receiver, mut primaries) = pair(bench, &format!("r{name}"), &specs)?;
    Ok((receiver, primaries.pop().context("no primary was made")?))
}

impl Primary {
    /// Writes the configuration, for the next start.
    pub(crate) fn configure(&self, interval: &str) -> Result<()> {
        self.site.write(&format!(
            "[[group]]\nname = \"{GROUP}\"\npeer = \"{}\"\npeer_key = \"{}\"\ninterval = \"{interval}\"\n\n\
             [[group.disk]]\nname = \"{DISK}\"\npath = \"{}\"\nexport = \"unix:nbd.sock\"\n",
            self.peer,
            self.peer_key,
            self.disk.display(),
        ))
    }

    /// Where it sends to.
    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }

    /// Has it send to another address, behind which the same receiver must be, from its next start on.
    pub(crate) fn reach(&mut self, peer: String, interval: &str) -> Result<()> {
        self.peer = peer;
        self.configure(interval)
    }

    pub(crate) fn start(&self, bench: &Bench) -> Result<Daemon> {
        self.site.start(bench)
    }

    /// Its dirty log, see `docs/dirtylog.md`.
    pub(crate) fn dirty_log(&self) -> PathBuf {
        self.site.folder.join("state/groups").join(GROUP).join(format!("{DISK}.dirtylog"))
    }

    /// The base of its disk in the store of `receiver`.
    pub(crate) fn base_in(&self, receiver: &Receiver) -> PathBuf {
        receiver.store().join(&self.site.name).join(GROUP).join("base").join(format!("{DISK}.raw"))
    }

    /// The newest epoch that the receiver has committed.
    pub(crate) fn newest_epoch(&self) -> Result<u64> {
        let committed = self.status()?.committed;
        let epoch = committed.as_ref().and_then(|point| point.as_str()?.split_once('.')?.1.parse().ok());
        epoch.with_context(|| format!("{}: no committed point in its status", self.site.name))
    }

    /// Where the disk is exported.
    pub(crate) fn socket(&self) -> PathBuf {
        self.site.folder.join("nbd.sock")
    }

    pub(crate) fn status(&self) -> Result<GroupStatus> {
        match self.site.status()?.primary.into_iter().next() {
            Some(Primaries::Running(status)) => Ok(*status),
            Some(Primaries::Failed { error }) => bail!("{}: the group does not run: {error}", self.site.name),
            None => bail!("{}: no group in its status", self.site.name),
        }
    }

    /// Waits until the copy is complete and nothing is left to send; `settled` says whether to wait for the latter. Shows `watch` what
    /// it sees, every `pace`.
    fn wait(
        &self,
        daemon: &mut Daemon,
        limit: Duration,
        settled: bool,
        pace: Duration,
        watch: &mut dyn FnMut(&GroupStatus),
    ) -> Result<()> {
        let mut last = String::new();
        let end = Instant::now() + limit;
        loop {
            os::check_stop()?;
            daemon.check_alive()?;
            let now = self.status()?;
            watch(&now);
            if now.state == "streaming" && now.committed.is_some() && (!settled || now.dirty_bytes == 0) {
                return Ok(());
            }
            if now.state == "refused" || Instant::now() > end {
                bail!("{}: not in sync after {} s: {last}", self.site.name, limit.as_secs());
            }
            last = format!("{}, {} bytes dirty, {}", now.state, now.dirty_bytes, now.error.as_deref().unwrap_or("no error"));
            thread::sleep(pace);
        }
    }

    /// Waits for the first complete copy.
    pub(crate) fn wait_first_copy(&self, daemon: &mut Daemon, limit: Duration) -> Result<()> {
        self.wait(daemon, limit, false, PACE, &mut |_| {})
    }

    /// Waits until nothing is left to send.
    pub(crate) fn settle(&self, daemon: &mut Daemon, limit: Duration) -> Result<()> {
        self.wait(daemon, limit, true, PACE, &mut |_| {})
    }

    /// As [`settle`](Self::settle), showing `watch` the status every `pace`: what is waited for is measured, so it should not be
    /// asked more often than needed.
    pub(crate) fn settle_watched(
        &self,
        daemon: &mut Daemon,
        limit: Duration,
        pace: Duration,
        watch: &mut dyn FnMut(&GroupStatus),
    ) -> Result<()> {
        self.wait(daemon, limit, true, pace, watch)
    }

    /// Queues in memory: the group's and those of its NBD connections.
    pub(crate) fn buffers(&self) -> Result<Vec<Queue>> {
        self.site.buffers()
    }
}

impl Receiver {
    fn configure(&self) -> Result<()> {
        let Self { listen, clients, flatten, .. } = self;
        self.site.write(&format!("[receiver]\nlisten = \"{listen}\"\nstore = \"store\"\nflatten = {flatten}\n{clients}"))
    }

    /// Another receiver, `name`, with a copy of this one's store. This one must not run.
    pub(crate) fn twin(&self, bench: &Bench, name: &str) -> Result<Self> {
        let site = Site::new(bench, &self.site.binary, name)?;
        let twin = Self { site, listen: free_udp_address()?, clients: self.clients.clone(), flatten: self.flatten };
        twin.configure()?;
        let mut command = Command::new(tools::CP.program);
        command.args(["--archive", "--sparse=always", "--reflink=auto"]).arg(self.store()).arg(twin.store());
        child::run(bench, "cp", command, COPY_MAX)?;
        Ok(twin)
    }

    pub(crate) fn start(&self, bench: &Bench) -> Result<Daemon> {
        let daemon = self.site.start(bench)?;
        if let Some(error) = self.site.status()?.receiver.and_then(|r| r.error) {
            bail!("{}: the receiver does not run: {error}", self.site.name);
        }
        Ok(daemon)
    }

    /// The space of its last client, from the next start on.
    pub(crate) fn limit_space(&mut self, bytes: u64) -> Result<()> {
        self.clients.truncate(self.clients.find("space_max").unwrap_or(self.clients.len()));
        self.clients.push_str(&format!("space_max = \"{bytes}B\"\n"));
        self.configure()
    }

    /// Which points its last client keeps, from the next start on: a TOML list. After [`limit_space`](Self::limit_space), which forgets it.
    pub(crate) fn keep(&mut self, ladder: &str) -> Result<()> {
        self.clients.truncate(self.clients.find("retention").unwrap_or(self.clients.len()));
        self.clients.push_str(&format!("retention = {ladder}\n"));
        self.configure()
    }

    /// Its only copy.
    pub(crate) fn copy(&self) -> Result<Copy> {
        let copy = self.site.status()?.receiver.and_then(|r| r.groups.into_iter().next());
        copy.with_context(|| format!("{}: no copy in its status", self.site.name))
    }

    /// Says whether it makes raw files of active copies, from its next start on.
    pub(crate) fn flatten(&mut self, flatten: bool) -> Result<()> {
        self.flatten = flatten;
        self.configure()
    }

    /// Whether its one copy is a raw file by now.
    pub(crate) fn is_flat(&self) -> Result<bool> {
        let copies = self.site.status()?.receiver.map(|r| r.groups).unwrap_or_default();
        let state = copies.into_iter().find_map(|copy| copy.active?.flatten).map(|flatten| flatten.state);
        Ok(state.as_deref() == Some("flat"))
    }

    /// Folder of the copy of `primary`'s group.
    pub(crate) fn group_folder(&self, primary: &Primary) -> PathBuf {
        self.store().join(&primary.site.name).join(GROUP)
    }

    /// As [`failover`](Self::failover), to `point`.
    pub(crate) fn failover_to(&self, primary: &Primary, socket: &Path, point: Option<&str>) -> Command {
        let mut command = self.failover(primary, socket);
        if let Some(point) = point {
            command.args(["--point", point]);
        }
        command
    }

    /// The command that activates the newest point of `primary`'s group and exports it on `socket`.
    pub(crate) fn failover(&self, primary: &Primary, socket: &Path) -> Command {
        let group = format!("{}/{GROUP}", primary.site.name);
        let export = format!("unix:{}", socket.display());
        self.site.command(&["failover", &group, "--export", &export, "--yes", "--force", "--json"])
    }

    /// The command that begins a drill of the newest point of `primary`'s group, served on `socket`.
    pub(crate) fn drill(&self, primary: &Primary, name: &str, socket: &Path) -> Command {
        let group = format!("{}/{GROUP}", primary.site.name);
        let export = format!("unix:{}", socket.display());
        self.site.command(&["drill", &group, "--name", name, "--export", &export, "--json"])
    }

    /// The command that makes a copy of `image` the base of `primary`'s group.
    pub(crate) fn adopt(&self, primary: &Primary, image: &Path) -> Command {
        let group = format!("{}/{GROUP}", primary.site.name);
        let mut command = self.site.command(&["adopt", &group, "--disk", DISK]);
        command.arg("--from").arg(image);
        command
    }

    /// The command that throws a drill away.
    pub(crate) fn end_drill(&self, name: &str) -> Command {
        self.site.command(&["drill", "end", name])
    }

    /// Folder of the copies.
    pub(crate) fn store(&self) -> PathBuf {
        self.site.folder.join("store")
    }

    pub(crate) fn buffers(&self) -> Result<Vec<Queue>> {
        self.site.buffers()
    }
}

impl Site {
    fn buffers(&self) -> Result<Vec<Queue>> {
        let status = self.status()?;
        let groups = status.primary.into_iter().filter_map(|p| match p {
            Primaries::Running(status) => Some(status.queues),
            Primaries::Failed { .. } => None,
        });
        let copies = status.receiver.into_iter().flat_map(|r| r.groups).map(|c| c.queues);
        let clients = status.exports.into_iter().flat_map(|e| e.connections).map(|c| c.queues);
        Ok(groups.chain(copies).chain(clients).flatten().filter(|q| q.unit == "bytes" && q.name != ON_DISK).collect())
    }
}

/// An address of this machine that nobody uses right now.
fn free_udp_address() -> Result<String> {
    let socket = UdpSocket::bind("127.0.0.1:0").context("cannot bind a UDP socket on 127.0.0.1")?;
    Ok(socket.local_addr().context("a UDP socket without address")?.to_string())
}
