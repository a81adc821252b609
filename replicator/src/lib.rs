//! The primary's half of Twinsite: a tap on every guest disk, dirty maps, cuts, capture, and the sender.
//!
//! It knows nothing of the receiver's store; the two meet in `proto` only. A guest request never waits for the network, unless the
//! user asked for that (`flush-sync`, `max_lag`): the tap waits for the local disk at most, and a full queue makes the current
//! epoch grow.

#![forbid(unsafe_code)]
#![allow(missing_debug_implementations, reason = "devices and sockets have nothing to show")]

mod capture;
mod compare;
mod compress;
mod core;
mod dirtylog;
mod exchange;
mod gate;
mod handback;
mod ledger;
mod link;
#[cfg(test)]
mod oracle_tests;
mod outbox;
mod pace;
mod rate;
mod record;
mod scrub;
mod session;
mod shared;
#[cfg(feature = "simulation")]
pub mod sim;
mod spec;
mod status;
mod tap;
mod upkeep;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockdev::{BlockDevice, FileDevice, FileError, IoThreads, OpenOptions};
use proto::control::VolumeHello;
use proto::units::{GROUP_VOLUMES_MAX, VOLUME_BYTES_MAX};
use proto::{DirtyMap, Identity, Name, Point};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::core::{Core, CoreConfig};
use crate::dirtylog::{DirtyLog, LogFile, log_bytes};
pub use crate::exchange::{Exchange, ExchangeError, Exchanger};
use crate::handback::Handback;
pub use crate::handback::{HandbackError, HandbackPlan, HandbackStatus, HandbackTarget};
use crate::ledger::{CopyLimits, FlushRefused, Ledger};
use crate::link::Link;
use crate::pace::{CUTS_PER_MAX_LAG, Pace};
pub use crate::rate::{RateSchedule, RateWindow};
pub use crate::record::RecordError;
use crate::record::{Record, Stopped};
use crate::session::Driver;
use crate::shared::{LAG_SAMPLE, Shared};
pub use crate::spec::{
    Durability, GroupSpec, INTERVAL_MAX, INTERVAL_MIN, MAX_LAG_MAX, MAX_LAG_MIN, PeerSpec, SCRUB_INTERVAL_DEFAULT,
    SCRUB_INTERVAL_MAX, SCRUB_INTERVAL_MIN, Tuning, VolumeSpec,
};
pub use crate::status::{GroupStatus, LagSummary, LinkState, PassProgress, QueueStatus, ScrubStatus, VerifyStatus, VolumeStatus};
use crate::tap::Tap;
use crate::upkeep::Upkeep;

/// The capture thread yields to the guest: its niceness.
const CAPTURE_NICE: i32 = 10;

/// Why a group cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum ReplicatorError {
    /// Its durable record is missing or damaged.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A number of volumes that no group may have.
    #[error("group {group}: {count} disks, a group has 1 to {GROUP_VOLUMES_MAX}")]
    VolumeCount {
        /// The group.
        group: Name,
        /// Its disks.
        count: usize,
    },
    /// A size that no volume may have.
    #[error("group {group}, disk {volume}: {size_bytes} bytes; a disk has 1 byte to 16 TiB")]
    VolumeSize {
        /// The group.
        group: Name,
        /// The disk.
        volume: Name,
        /// Its size.
        size_bytes: u64,
    },
    /// An interval outside the limits.
    #[error("group {group}: epoch interval of {given:?}, allowed are 10 ms to 24 h")]
    Interval {
        /// The group.
        group: Name,
        /// What was asked for.
        given: Duration,
    },
    /// A `max_lag` outside the limits.
    #[error("group {group}: max_lag of {given:?}, allowed are 100 ms to 24 h")]
    MaxLag {
        /// The group.
        group: Name,
        /// What was asked for.
        given: Duration,
    },
    /// The spill file cannot be made.
    #[error("spill file {}: {source}", path.display())]
    Spill {
        /// The file.
        path: PathBuf,
        /// Why.
        source: FileError,
    },
    /// A dirty log cannot be opened.
    #[error("dirty log of disk {volume}: {source}")]
    DirtyLogOpen {
        /// The disk.
        volume: Name,
        /// Why.
        source: FileError,
    },
    /// A dirty log cannot be read or written, or is of another disk.
    #[error("{reason}")]
    DirtyLog {
        /// What, where, and what to do.
        reason: String,
    },
    /// A disk cannot be opened a second time.
    #[error("disk {volume}: cannot open it again to read it: {source}: is /proc mounted?")]
    Scanner {
        /// Which.
        volume: Name,
        /// Why.
        source: std::io::Error,
    },
    /// An old spill file cannot be removed.
    #[error("spill file {}: cannot remove it: {source}", path.display())]
    SpillRemove {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The capture thread cannot be started.
    #[error("group {group}: cannot start its capture thread: {source}")]
    Thread {
        /// The group.
        group: Name,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// Why the disks of a group cannot be compared with the copy now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerifyRefused {
    /// There is nothing to compare with.
    #[error("group {group}: there is no complete copy yet: wait until `twinsite status` says streaming")]
    NoCopy {
        /// The group.
        group: Name,
    },
    /// Suspect blocks are being compared.
    #[error("group {group}: what may differ is being compared already: wait until `twinsite status` says streaming")]
    Comparing {
        /// The group.
        group: Name,
    },
    /// The receiver is not there.
    #[error("group {group}: its receiver is not connected: see `twinsite status {group}`")]
    NotConnected {
        /// The group.
        group: Name,
    },
    /// Another side is the server.
    #[error("group {group} is fenced: it was failed over, and the copy is not of this disk any more")]
    Fenced {
        /// The group.
        group: Name,
    },
}

/// The spill file: sparse, and nameless once it is open, so that nothing of it outlives the process.
fn open_spill(dir: &Path, limit_bytes: u64) -> Result<Arc<dyn BlockDevice>, ReplicatorError> {
    let path = dir.join("spill");
    let remove = |path: &Path| match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    let failed = |source| ReplicatorError::SpillRemove { path: path.clone(), source };
    remove(&path).map_err(failed)?;
    let options = OpenOptions { create_size: Some(limit_bytes.max(1)), ..OpenOptions::default() };
    let device = FileDevice::open(&path, options).map_err(|source| ReplicatorError::Spill { path: path.clone(), source })?;
    remove(&path).map_err(failed)?;
    Ok(Arc::new(device))
}

/// Opens the dirty logs of all disks, on the group's own thread.
fn open_logs(
    dir: &Path,
    volumes: &[VolumeSpec],
    thread: &IoThreads,
) -> Result<(DirtyLog, Vec<dirtylog::Known>), ReplicatorError> {
    let mut files = Vec::new();
    for VolumeSpec { name, device } in volumes {
        let (path, volume_bytes) = (dir.join(format!("{name}.dirtylog")), device.size());
        let options = OpenOptions { create_size: Some(log_bytes(volume_bytes)), ..OpenOptions::default() };
        let failed = |source| ReplicatorError::DirtyLogOpen { volume: name.clone(), source };
        let device = match FileDevice::open(&path, options) {
            // The disk was resized: a new log has all of it compared.
            Err(FileError::SizeDiffers { .. }) => {
                tracing::warn!("dirty log {}: it is of a disk of another size and is begun anew", path.display());
                std::fs::remove_file(&path).map_err(|source| failed(FileError::Open { path: path.clone(), source }))?;
                FileDevice::open(&path, options)
            }
            opened => opened,
        };
        let device = device.map_err(failed)?;
        files.push(LogFile { name: path.display().to_string(), device: Arc::new(device), volume_bytes });
    }
    let opened = thread.block_on(move || DirtyLog::open(files));
    let failed = |reason: String| ReplicatorError::DirtyLog { reason };
    opened.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))
}

/// What is known of disks of which nothing is known; durably so.
fn suspect_all(log: &Arc<DirtyLog>, sizes: &[u64], thread: &IoThreads) -> Result<Vec<dirtylog::Known>, ReplicatorError> {
    let all = log.clone();
    let covered = thread.block_on(move || async move { all.cover_all().await }).flatten();
    covered.map_err(|error| ReplicatorError::DirtyLog { reason: error.to_string() })?;
    let known = |size: &u64| dirtylog::Known { suspect: DirtyMap::full(*size), dirty: DirtyMap::new(*size) };
    Ok(sizes.iter().map(known).collect())
}

/// Where capture reads a disk.
fn scanner(volume: &VolumeSpec) -> Result<Arc<dyn BlockDevice>, ReplicatorError> {
    let scanner = volume.device.scanner().map_err(|source| ReplicatorError::Scanner { volume: volume.name.clone(), source })?;
    Ok(scanner.unwrap_or_else(|| volume.device.clone()))
}

/// One group at its primary, running.
pub struct Replicator {
    shared: Arc<Shared>,
    taps: Vec<(Name, Arc<dyn BlockDevice>)>,
    stop: watch::Sender<Option<Instant>>,
    driver: JoinHandle<()>,
    handback: Arc<Handback>,
    sampler: JoinHandle<()>,
    /// Held by an exchange.
    exchanging: Arc<tokio::sync::Mutex<()>>,
    capture: IoThreads,
}

impl Replicator {
    /// Starts replicating. The taps may be exported at once: until the receiver answers, changes are only marked.
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`ReplicatorError`].
    pub fn start(spec: GroupSpec, identity: Identity) -> Result<Self, ReplicatorError> {
        let GroupSpec { group, volumes, peer, state_dir, mut tuning, all_suspect } = spec;
        if volumes.is_empty() || volumes.len() > GROUP_VOLUMES_MAX {
            return Err(ReplicatorError::VolumeCount { group, count: volumes.len() });
        }
        for VolumeSpec { name, device } in &volumes {
            let size_bytes = device.size();
            if size_bytes == 0 || size_bytes > VOLUME_BYTES_MAX {
                return Err(ReplicatorError::VolumeSize { group, volume: name.clone(), size_bytes });
            }
        }
        if !(INTERVAL_MIN..=INTERVAL_MAX).contains(&tuning.interval) {
            return Err(ReplicatorError::Interval { group, given: tuning.interval });
        }
        if let Some(given) = tuning.max_lag {
            if !(MAX_LAG_MIN..=MAX_LAG_MAX).contains(&given) {
                return Err(ReplicatorError::MaxLag { group, given });
            }
            tuning.interval = tuning.interval.min(given / CUTS_PER_MAX_LAG);
        }
        let record = Arc::new(Record::open(&state_dir)?);
        let recorded = record.get();
        let capture = IoThreads::new(1).map_err(|source| ReplicatorError::Thread { group: group.clone(), source })?;
        capture.spawn(|| async {
            // Zero is this very thread. Without the right to be nicer nothing breaks.
            if let Err(error) = rustix::process::setpriority_process(None, CAPTURE_NICE) {
                tracing::debug!(%error, "the capture thread keeps its priority");
            }
            if let Err(error) = blockdev::prefer_throughput() {
                tracing::debug!(%error, "the capture thread keeps its slice of time");
            }
        });
        let sizes: Vec<u64> = volumes.iter().map(|v| v.device.size()).collect();
        let limits = CopyLimits { memory_bytes: tuning.freeze_budget_bytes, spill_bytes: tuning.spill_limit_bytes };
        let (log, mut known) = open_logs(&state_dir, &volumes, &capture)?;
        let log = Arc::new(log);
        if all_suspect {
            known = suspect_all(&log, &sizes, &capture)?;
        }
        let ledger = Arc::new(Ledger::new(sizes, limits, known));
        let spill = open_spill(&state_dir, tuning.spill_limit_bytes)?;
        let devices: Arc<[Arc<dyn BlockDevice>]> = volumes.iter().map(|v| v.device.clone()).collect();
        let scanners = volumes.iter().map(scanner).collect::<Result<Arc<[_]>, _>>()?;
        let names: Vec<(Name, u64)> =
            volumes.iter().map(|v| v.name.clone()).zip(volumes.iter().map(|v| v.device.size())).collect();
        let pace = tuning.max_lag.map(|_| Arc::new(Pace::new(Instant::now())));
        let bare = |(index, device): (usize, &Arc<dyn BlockDevice>)| {
            Tap::new(device.clone(), ledger.clone(), log.clone(), spill.clone(), index)
        };
        // What a handback brings is marked like a guest's writes, and nobody holds it up.
        let inner = devices.iter().enumerate().map(bare).map(|tap| Arc::new(tap) as Arc<dyn BlockDevice>).collect();
        let gated: Vec<(Name, Tap)> = volumes
            .into_iter()
            .map(|v| v.name)
            .zip(devices.iter().enumerate().map(bare))
            .map(|(name, tap)| (name, tap.with_durability(tuning.durability).with_pace(pace.clone())))
            .collect();
        let hello = |(name, size_bytes): &(Name, u64)| VolumeHello { name: name.clone(), size_bytes: *size_bytes };
        let hellos: Vec<VolumeHello> = names.iter().map(hello).collect();
        let config = CoreConfig {
            group: group.clone(),
            volumes: hellos.clone(),
            interval: tuning.interval,
            freeze_budget_bytes: tuning.freeze_budget_bytes,
            epochs_in_flight: tuning.epochs_in_flight,
        };
        let mut core = Core::new(config, recorded.generation, recorded.ours(), Instant::now());
        if let Some(Stopped::Handback { .. }) = recorded.stopped {
            // The disks are neither the one nor the other: nothing is replicated until the handback is repeated.
            core.park();
        }
        let shared = Arc::new(Shared::new(group, peer.clone(), tuning, names, ledger, log, recorded.generation, pace));
        let (stop, stopping) = watch::channel(None);
        if let Some(why) = recorded.stopped.and_then(|stopped| stopped.holds_up(shared.tuning.writes_when_fenced)) {
            shared.gate.close(why);
        }
        let gate = |(name, tap): (Name, Tap)| (name, Arc::new(tap.with_gate(shared.gate.clone())) as Arc<dyn BlockDevice>);
        let taps = gated.into_iter().map(gate).collect();
        let upkeep = Upkeep::new(shared.clone(), record.clone(), devices.clone());
        let link = Arc::new(Link { peer, identity });
        let (orders, inbox) = tokio::sync::mpsc::channel(1);
        let handback = Arc::new(Handback {
            shared: shared.clone(),
            link: link.clone(),
            record: record.clone(),
            capture: capture.clone(),
            volumes: hellos,
            scanners: scanners.clone(),
            devices,
            taps: inner,
            orders,
            state: Default::default(),
            busy: Arc::default(),
        });
        let driver = Driver::new(shared.clone(), core, link, record, capture.clone(), upkeep, scanners, spill, stopping, inbox);
        let sampled = shared.clone();
        let sampler = tokio::spawn(async move {
            let mut tick = tokio::time::interval(LAG_SAMPLE);
            loop {
                tick.tick().await;
                sampled.sample_lag();
                sampled.steer();
            }
        });
        Ok(Self {
            shared,
            taps,
            stop,
            driver: tokio::spawn(driver.run()),
            handback,
            sampler,
            exchanging: Arc::default(),
            capture,
        })
    }

    /// For who exchanges the disks below the taps.
    #[must_use]
    pub fn exchanger(&self) -> Exchanger {
        Exchanger { shared: self.shared.clone(), capture: self.capture.clone(), one: self.exchanging.clone() }
    }

    /// The tapped disk `name`, to be exported to the guest.
    #[must_use]
    pub fn volume(&self, name: &Name) -> Option<Arc<dyn BlockDevice>> {
        self.taps.iter().find(|(n, _)| n == name).map(|(_, tap)| tap.clone())
    }

    /// What `status` shows.
    #[must_use]
    pub fn status(&self) -> GroupStatus {
        let handback = self.handback.status().filter(|handback| handback.running);
        GroupStatus { handback, ..self.shared.status() }
    }

    /// Begins to compare all blocks with the copy, at full speed; if that is under way already, it goes on. What differs is sent again.
    /// When the connection is lost it waits for the next one.
    ///
    /// # Errors
    /// [`VerifyRefused`].
    pub fn verify(&self) -> Result<(), VerifyRefused> {
        let group = self.shared.group.clone();
        match self.shared.state() {
            LinkState::Streaming => {
                self.shared.scrub.verify(Instant::now());
                Ok(())
            }
            LinkState::Connecting | LinkState::Refused if self.shared.scrub.is_verifying() => Ok(()),
            LinkState::FirstSync => Err(VerifyRefused::NoCopy { group }),
            LinkState::Comparing => Err(VerifyRefused::Comparing { group }),
            LinkState::Fenced => Err(VerifyRefused::Fenced { group }),
            LinkState::Connecting | LinkState::Refused | LinkState::Stopped => Err(VerifyRefused::NotConnected { group }),
        }
    }

    /// The `verify` that runs, or the last one; and where the session stands, which it may have to wait for.
    #[must_use]
    pub fn verify_status(&self) -> (LinkState, Option<VerifyStatus>) {
        (self.shared.state(), self.shared.scrub.verify_status(Instant::now()))
    }

    /// What it would take to have the disks back, or to go back to a point. Changes nothing.
    ///
    /// # Errors
    /// [`HandbackError`].
    pub fn handback_plan(&self, target: HandbackTarget) -> impl Future<Output = Result<HandbackPlan, HandbackError>> + use<> {
        let handback = self.handback.clone();
        async move { handback.plan(target).await }
    }

    /// The point that has a name at the receiver; changes nothing.
    ///
    /// # Errors
    /// [`HandbackError`].
    pub fn point_named(&self, name: Name) -> impl Future<Output = Result<Point, HandbackError>> + use<> {
        let handback = self.handback.clone();
        async move { handback.resolve(name).await }
    }

    /// Begins to take the disks back, or to go back to a point. From here to the end guests may not write.
    ///
    /// # Errors
    /// [`HandbackError`] if it cannot begin.
    pub fn begin_handback(&self, target: HandbackTarget) -> Result<(), HandbackError> {
        self.handback.begin(target)
    }

    /// The handback that runs, or the last one.
    #[must_use]
    pub fn handback_status(&self) -> Option<HandbackStatus> {
        self.handback.status()
    }

    /// The node is about to stop: flushes that still wait for the receiver fail after `within`, so that their guests hear of it.
    pub fn end_flushes(&self, within: Duration) {
        let shared = self.shared.clone();
        tokio::spawn(async move {
            tokio::time::sleep(within).await;
            shared.ledger.refuse_flushes(FlushRefused::Stopping);
        });
    }

    /// Stops. While connected, everything written so far is sent and committed first, for at most `within`. The exports must
    /// have stopped before. Returns whether everything is committed. The dirty log then says exactly what is not.
    pub async fn shutdown(mut self, within: Duration) -> bool {
        self.stop.send_replace(Some(Instant::now() + within));
        let ended = (&mut self.driver).await;
        self.sampler.abort();
        let left = self.shared.ledger.summary();
        ended.is_ok() && left.uncommitted_bytes == 0 && left.suspect_bytes == 0
    }
}

impl Drop for Replicator {
    fn drop(&mut self) {
        self.driver.abort();
        self.sampler.abort();
        self.shared.ledger.refuse_flushes(FlushRefused::Stopping);
    }
}
