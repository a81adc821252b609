//! The groups this node is the primary of: open the disks, put the tap on, export them. A group that cannot start leaves a
//! line in the log and in `status`; the others go on.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blockdev::nbd::ListenAddr;
use blockdev::{BlockDevice, FileDevice, FileError, OpenOptions};
use proto::{Identity, Name, Point};
use replicator::{GroupSpec, HandbackPlan, HandbackTarget, PeerSpec, Replicator, ReplicatorError, Tuning, VolumeSpec};

use super::exports::{ExportError, Exports};
use super::failover::RequestError;
use crate::api::{HandbackProgress, PrimaryStatus, Verification};
use crate::config::GroupConfig;

/// How long flushes may wait for a receiver once the node is told to stop: less than clients have to finish their requests, so that
/// they hear of it.
const FLUSH_DRAIN: Duration = Duration::from_secs(4);

/// Why a group does not run. One line each.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("disk {disk}: {source}")]
    Disk { disk: Name, source: FileError },
    #[error(transparent)]
    Replicator(#[from] ReplicatorError),
    #[error(transparent)]
    Export(#[from] ExportError),
}

struct Primary {
    name: Name,
    run: Result<Replicator, String>,
}

/// All groups, in the order of the file.
pub(crate) struct Primaries {
    groups: Vec<Primary>,
}

impl Primaries {
    pub(crate) async fn start(configs: &[GroupConfig], state_dir: &Path, identity: &Identity, exports: &Exports) -> Self {
        let mut groups = Vec::new();
        for config in configs {
            let run = start(config, state_dir, identity, exports).await.map_err(|error| error.to_string());
            match &run {
                Ok(_) => tracing::info!(group = %config.name, disks = config.disks.len(), peer = config.peer, "group started"),
                Err(error) => {
                    tracing::error!(group = %config.name, "group not started: {error}; the other groups go on");
                    exports.withdraw(config.name.as_str()).await;
                }
            }
            groups.push(Primary { name: config.name.clone(), run });
        }
        Self { groups }
    }

    /// Groups that run.
    pub(crate) fn running(&self) -> usize {
        self.groups.iter().filter(|g| g.run.is_ok()).count()
    }

    pub(crate) fn status(&self) -> Vec<PrimaryStatus> {
        let one = |group: &Primary| match &group.run {
            Ok(replicator) => PrimaryStatus::Running(Box::new(replicator.status())),
            Err(error) => PrimaryStatus::Failed { group: group.name.clone(), error: error.clone() },
        };
        self.groups.iter().map(one).collect()
    }

    fn replicator(&self, group: &str) -> Option<Result<&Replicator, RequestError>> {
        let primary = self.groups.iter().find(|g| g.name.as_str() == group)?;
        Some(primary.run.as_ref().map_err(|error| RequestError::NotRunning { group: group.to_owned(), error: error.clone() }))
    }

    /// Starts to compare the disks of a group with its copy; `None` if it is none of these.
    pub(crate) fn verify(&self, group: &str) -> Option<Result<Verification, RequestError>> {
        let replicator = self.replicator(group)?;
        let begun = replicator.and_then(|replicator| Ok(replicator.verify()?));
        match begun {
            Ok(()) => self.verification(group),
            Err(error) => Some(Err(error)),
        }
    }

    /// How the comparison that runs fares, or the last one.
    pub(crate) fn verification(&self, group: &str) -> Option<Result<Verification, RequestError>> {
        let status = self.replicator(group)?.and_then(|replicator| {
            let (state, verify) = replicator.verify_status();
            let name = group.to_owned();
            let verify = verify.ok_or(RequestError::NeverVerified { group: name })?;
            Ok(Verification { group: replicator.status().group, state, verify })
        });
        Some(status)
    }

    pub(crate) async fn handback_plan(&self, group: &str, target: HandbackTarget) -> Option<Result<HandbackPlan, RequestError>> {
        match self.replicator(group)? {
            Ok(replicator) => Some(replicator.handback_plan(target).await.map_err(Into::into)),
            Err(error) => Some(Err(error)),
        }
    }

    /// The point that has a name at the receiver of a group.
    pub(crate) async fn point_named(&self, group: &str, name: Name) -> Option<Result<Point, RequestError>> {
        match self.replicator(group)? {
            Ok(replicator) => Some(replicator.point_named(name).await.map_err(Into::into)),
            Err(error) => Some(Err(error)),
        }
    }

    pub(crate) fn begin_handback(&self, group: &str, target: HandbackTarget) -> Option<Result<HandbackProgress, RequestError>> {
        let begun = self.replicator(group)?.and_then(|replicator| Ok(replicator.begin_handback(target)?));
        match begun {
            Ok(()) => self.handback(group),
            Err(error) => Some(Err(error)),
        }
    }

    /// How the handback that runs fares, or the last one.
    pub(crate) fn handback(&self, group: &str) -> Option<Result<HandbackProgress, RequestError>> {
        let progress = self.replicator(group)?.and_then(|replicator| {
            let handback = replicator.handback_status();
            let handback = handback.ok_or(RequestError::NeverHandedBack { group: group.to_owned() })?;
            Ok(HandbackProgress { group: replicator.status().group, handback })
        });
        Some(progress)
    }

    /// The node is about to stop: flushes that wait for a receiver fail before their clients are cut off.
    pub(crate) fn end_flushes(&self) {
        self.groups.iter().filter_map(|g| g.run.as_ref().ok()).for_each(|replicator| replicator.end_flushes(FLUSH_DRAIN));
    }

    /// Commits what is left, all groups at once. The exports must have stopped before.
    pub(crate) async fn shutdown(&mut self, within: Duration) {
        let all = self.groups.drain(..).filter_map(|g| Some((g.name, g.run.ok()?))).map(|(name, replicator)| async move {
            if replicator.shutdown(within).await {
                tracing::info!(group = %name, "stopped; everything is committed at the receiver");
            } else {
                tracing::warn!(group = %name, "stopped; not everything is committed at the receiver");
            }
        });
        futures_util::future::join_all(all).await;
    }
}

async fn start(config: &GroupConfig, state_dir: &Path, identity: &Identity, exports: &Exports) -> Result<Replicator, StartError> {
    let mut volumes = Vec::new();
    for disk in &config.disks {
        let options = OpenOptions { direct: disk.direct, drop_cached: true, ..OpenOptions::default() };
        let device =
            FileDevice::open(&disk.path, options).map_err(|source| StartError::Disk { disk: disk.name.clone(), source })?;
        volumes.push(VolumeSpec { name: disk.name.clone(), device: Arc::new(device) });
    }
    // Listening comes first: an address in use must not leave a session behind.
    let mut addresses = Vec::new();
    for disk in &config.disks {
        addresses.push(exports.listen(&disk.export, disk.tls.as_ref()).await?);
    }
    let spec = GroupSpec {
        group: config.name.clone(),
        volumes,
        peer: PeerSpec { address: config.peer.clone(), key: config.peer_key },
        state_dir: state_dir.join("groups").join(config.name.as_str()),
        tuning: Tuning {
            interval: config.interval,
            freeze_budget_bytes: config.freeze_budget_bytes,
            spill_limit_bytes: config.spill_limit_bytes,
            epochs_in_flight: config.epochs_in_flight,
            codec: config.codec,
            durability: config.durability,
            max_lag: config.max_lag,
            rate: config.rate.clone(),
            scrub_interval: config.scrub_interval,
            writes_when_fenced: config.writes_when_fenced,
        },
    };
    let replicator = Replicator::start(spec, identity.clone())?;
    for (disk, address) in config.disks.iter().zip(&addresses) {
        if let Some(device) = replicator.volume(&disk.name) {
            offer(exports, address, config, &disk.name, device).await?;
        }
    }
    Ok(replicator)
}

async fn offer(
    exports: &Exports,
    address: &ListenAddr,
    config: &GroupConfig,
    disk: &Name,
    device: Arc<dyn BlockDevice>,
) -> Result<(), ExportError> {
    exports.add(address, config.name.as_str(), vec![(disk.clone(), device)]).await?;
    tracing::info!(group = %config.name, %disk, %address, "disk exported");
    Ok(())
}
