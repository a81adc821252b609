//! `twinsite.toml`: one file, every key checked, every mistake told in one line with its place and its remedy.

mod drill;
mod error;
mod hooks;
mod parse;
mod reader;
pub mod units;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockdev::nbd::ListenAddr;
use proto::{Codec, Fingerprint, Name};
use replicator::{Durability, RateSchedule};

pub use error::{ConfigError, ConfigErrors, Problem};
pub use hooks::{Hook, HooksConfig, Phase, Transition};
pub use parse::export_address;
pub(crate) use parse::host_name;

/// Where the configuration is looked for.
pub const CONFIG_DEFAULT: &str = "/etc/twinsite/twinsite.toml";
/// Where a node keeps its key and its own small records.
pub const STATE_DIR_DEFAULT: &str = "/var/lib/twinsite";
/// Most time an orderly stop spends on committing the last epoch.
pub const STOP_TIMEOUT_DEFAULT: Duration = Duration::from_secs(20);
/// What a drill may take by default, in bytes.
pub const DRILL_SPACE_MAX_DEFAULT: u64 = 10 << 30;
/// How long a drill's script may run by default.
pub const DRILL_TIMEOUT_DEFAULT: Duration = Duration::from_secs(600);
/// Largest file that is read as a configuration, in bytes.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// A checked configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// `[node]`.
    pub node: NodeConfig,
    /// `[receiver]`.
    pub receiver: Option<ReceiverConfig>,
    /// `[[group]]`.
    pub groups: Vec<GroupConfig>,
    /// `[[drill]]`.
    pub drills: Vec<DrillConfig>,
    /// `[hooks]`.
    pub hooks: HooksConfig,
}

/// `[node]`.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// What the node calls itself; the host's name by default.
    pub name: String,
    /// Key and records.
    pub state_dir: PathBuf,
    /// The control socket.
    pub control: PathBuf,
    /// Where metrics are served, if anywhere.
    pub metrics: Option<SocketAddr>,
    /// Threads that do disk and NBD work.
    pub io_threads: usize,
    /// `error`, `warn`, `info`, `debug` or `trace`.
    pub log: &'static str,
    /// How long an orderly stop may take to commit the last epoch.
    pub stop_timeout: Duration,
}

/// `[receiver]`.
#[derive(Clone, Debug)]
pub struct ReceiverConfig {
    /// UDP address.
    pub listen: SocketAddr,
    /// Folder of the copies.
    pub store: PathBuf,
    /// Whether activated copies are turned into plain raw files while they run.
    pub flatten: bool,
    /// Who may send.
    pub clients: Vec<ClientConfig>,
    /// Bytes that a drill may take.
    pub drill_space_max_bytes: u64,
}

/// `[[drill]]`: one that the node does by itself.
#[derive(Clone, Debug)]
pub struct DrillConfig {
    /// `GROUP` or `CLIENT/GROUP`.
    pub group: String,
    /// The script.
    pub run: PathBuf,
    /// When.
    pub time: DrillTime,
    /// The script is ended after this time.
    pub timeout: Duration,
    /// Whom the script runs as; the node's user by default.
    pub user: Option<String>,
    /// Bytes that it may take; `drill_space_max` by default.
    pub space_max_bytes: Option<u64>,
}

/// When a drill is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrillTime {
    /// So long after the last one.
    Every(Duration),
    /// Each day at this local time.
    At(jiff::civil::Time),
}

/// `[[receiver.client]]`.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Its name; a folder of the store.
    pub name: Name,
    /// Its pinned key.
    pub key: Fingerprint,
    /// The groups it may send; `None`: any.
    pub groups: Option<Vec<Name>>,
    /// Most bytes its groups may take.
    pub space_max_bytes: Option<u64>,
    /// Most bytes that single groups may take: `[[receiver.client.group]]`.
    pub group_space_max_bytes: BTreeMap<Name, u64>,
    /// Whether it may have its disks back after a failover, or roll them back.
    pub handback: bool,
    /// Which points are kept: its own ladder, or that of the receiver.
    pub retention: receiver::Ladder,
}

/// `[[group]]`.
#[derive(Clone, Debug)]
pub struct GroupConfig {
    /// Its name.
    pub name: Name,
    /// `host:port` of the receiver.
    pub peer: String,
    /// The receiver's pinned key.
    pub peer_key: Fingerprint,
    /// From cut to cut.
    pub interval: Duration,
    /// See `replicator::Tuning`.
    pub freeze_budget_bytes: u64,
    /// See `replicator::Tuning`.
    pub spill_limit_bytes: u64,
    /// See `replicator::Tuning`.
    pub epochs_in_flight: u16,
    /// How payloads are packed.
    pub codec: Codec,
    /// When a guest's flush is answered.
    pub durability: Durability,
    /// Guests go on writing when the other site was made the server.
    pub writes_when_fenced: bool,
    /// See `replicator::Tuning`.
    pub max_lag: Option<Duration>,
    /// `rate_limit` and `[[group.rate_schedule]]`.
    pub rate: RateSchedule,
    /// See `replicator::Tuning`.
    pub scrub_interval: Option<Duration>,
    /// Its disks, cut together; none if they are those of a copy.
    pub disks: Vec<DiskConfig>,
    /// The copy of this node that is replicated onward in place of disks.
    pub copy: Option<CopyConfig>,
}

/// `copy = "CLIENT/GROUP"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyConfig {
    /// Whose.
    pub client: Name,
    /// The group.
    pub group: Name,
}

/// `[[group.disk]]`.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// Its name, also the name of its NBD export.
    pub name: Name,
    /// Image file or block device.
    pub path: PathBuf,
    /// Where the guest connects.
    pub export: ListenAddr,
    /// TLS of a TCP export.
    pub tls: Option<TlsConfig>,
    /// Bypass the page cache.
    pub direct: bool,
}

/// `tls = { … }`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    /// PEM certificate chain.
    pub cert: PathBuf,
    /// PEM private key.
    pub key: PathBuf,
    /// Clients must show a certificate of this authority.
    pub client_ca: Option<PathBuf>,
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn load(file: &Path) -> Result<Self, ConfigErrors> {
        let failed = |source| ConfigErrors(vec![ConfigError::Read { file: file.to_path_buf(), source }]);
        let found = std::fs::metadata(file).map_err(failed)?;
        if found.is_dir() {
            return Err(failed(std::io::ErrorKind::IsADirectory.into()));
        }
        if !found.is_file() || found.len() > FILE_BYTES_MAX {
            return Err(failed(std::io::Error::other("not a regular file of at most 4 MiB")));
        }
        let text = std::fs::read_to_string(file).map_err(failed)?;
        Self::parse(file, &text)
    }

    /// As [`load`](Self::load), for a node that is to run: it must have something to do.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn load_to_run(file: &Path) -> Result<Self, ConfigErrors> {
        let config = Self::load(file)?;
        if config.receiver.is_none() && config.groups.is_empty() {
            return Err(ConfigErrors(vec![ConfigError::Empty { file: file.to_path_buf() }]));
        }
        Ok(config)
    }

    /// Checks `text`; `file` is its name for messages, its folder the base of relative paths.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigErrors> {
        parse::parse(file, text)
    }
}
