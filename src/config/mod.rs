//! `twinsite.toml`: one file, every key checked, every mistake told in one line with its place and its remedy.

mod error;
mod parse;
mod reader;
pub mod units;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockdev::nbd::ListenAddr;
use proto::{Codec, Fingerprint, Name};
use replicator::{Durability, RateSchedule};

pub use error::{ConfigError, ConfigErrors, Problem};
pub use parse::export_address;
pub(crate) use parse::host_name;

/// Where the configuration is looked for.
pub const CONFIG_DEFAULT: &str = "/etc/twinsite/twinsite.toml";
/// Where a node keeps its key and its own small records.
pub const STATE_DIR_DEFAULT: &str = "/var/lib/twinsite";
/// Most time an orderly stop spends on committing the last epoch.
pub const STOP_TIMEOUT_DEFAULT: Duration = Duration::from_secs(20);
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
    /// Who may send.
    pub clients: Vec<ClientConfig>,
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
    /// See `replicator::Tuning`.
    pub max_lag: Option<Duration>,
    /// `rate_limit` and `[[group.rate_schedule]]`.
    pub rate: RateSchedule,
    /// See `replicator::Tuning`.
    pub scrub_interval: Option<Duration>,
    /// Its disks, cut together.
    pub disks: Vec<DiskConfig>,
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
