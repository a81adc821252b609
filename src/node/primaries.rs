//! The groups this node is the primary of: open the disks, put the tap on, export them. A group that cannot start leaves a
//! line in the log and in `status`; the others go on. So does one whose disk or `state_dir` does not answer: each is started on a thread of its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use blockdev::nbd::ListenAddr;
use blockdev::{FileDevice, FileError, OpenOptions};
use futures_util::future::join_all;
use proto::{Identity, Name, Point};
use replicator::{
    GroupSpec, HandbackError, HandbackPlan, HandbackTarget, PeerSpec, Replicator, ReplicatorError, Tuning, VolumeSpec,
};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::copies::GroupRef;
use super::exports::{ExportError, Exports};
use super::failover::RequestError;
use super::onward::Onward;
use crate::api::{HandbackProgress, PrimaryStatus, Verification};
use crate::config::GroupConfig;

/// How long flushes may wait for a receiver once the node is told to stop: less than clients have to finish their requests, so that
/// they hear of it.
const FLUSH_DRAIN: Duration = Duration::from_secs(4);

/// What a group waits for that is not there yet.
pub(crate) const STARTING: &str =
    "its disks or its folder in state_dir do not answer yet; its guests wait: check the disk that they are on";

/// Why a group does not run. One line each.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("disk {disk}: {source}")]
    Disk { disk: Name, source: FileError },
    #[error(transparent)]
    Replicator(#[from] ReplicatorError),
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error("cannot start its thread: {0}")]
    Thread(std::io::Error),
    #[error("its start was given up: this is a defect")]
    GivenUp,
}

enum Run {
    /// Its disks are being opened, and what is known of them.
    Starting,
    Running(Replicator),
    Failed(String),
    /// Its disks are a copy of this node, which may not be there yet.
    Onward(Arc<Onward>),
}

struct Primary {
    name: Name,
    run: Run,
}

/// All groups, in the order of the file.
pub(crate) struct Primaries {
    groups: Vec<Primary>,
}

/// The groups that are being started. Their guests are served as soon as they are there, whether or not somebody asks for [`next`](Self::next).
pub(crate) struct Starting {
    tasks: JoinSet<Arrived>,
}

/// A group that was started, or why it was not.
pub(crate) struct Arrived {
    name: Name,
    run: Result<Replicator, StartError>,
}

impl Starting {
    /// The next one that is there, or will not come; `None` once all are known. Nothing is lost if it is not waited for to the end.
    pub(crate) async fn next(&mut self) -> Option<Arrived> {
        loop {
            match self.tasks.join_next().await? {
                Ok(arrived) => return Some(arrived),
                Err(error) => tracing::error!("a group's start was given up: {error}"),
            }
        }
    }

    /// Those that are there already.
    pub(crate) fn arrived(&mut self) -> Vec<Arrived> {
        let given_up = |error| tracing::error!("a group's start was given up: {error}");
        std::iter::from_fn(|| self.tasks.try_join_next()).filter_map(|joined| joined.map_err(given_up).ok()).collect()
    }
}

impl Primaries {
    /// Has all groups started. All addresses are bound when it returns, and clients wait there.
    pub(crate) async fn begin(
        configs: &[GroupConfig],
        state_dir: &Path,
        identity: &Identity,
        exports: &Arc<Exports>,
    ) -> (Self, Starting) {
        let groups_dir = groups_dir(state_dir);
        let (mut primaries, mut begun) = (Self { groups: Vec::new() }, Vec::new());
        for config in configs {
            let name = config.name.clone();
            if let Some(onward) = Onward::of(config, &groups_dir, identity) {
                primaries.groups.push(Primary { name, run: Run::Onward(onward) });
                continue;
            }
            primaries.groups.push(Primary { name: name.clone(), run: Run::Starting });
            // In the order of the file, and before anything is started: an address that several groups share is served when all of them
            // are there, and one that is in use leaves no session behind.
            match listen(config, exports).await {
                Ok(addresses) => begun.push((config.clone(), addresses)),
                Err(error) => primaries.arrive(Arrived { name, run: Err(error.into()) }),
            }
        }
        let mut tasks = JoinSet::new();
        for (config, addresses) in begun {
            let group =
                Group { config, addresses, dir: groups_dir.clone(), identity: identity.clone(), exports: exports.clone() };
            tasks.spawn(group.start(Handle::current()));
        }
        (primaries, Starting { tasks })
    }

    /// Takes in a group that was being started, or why it was not.
    pub(crate) fn arrive(&mut self, Arrived { name, run }: Arrived) {
        let run = match run {
            Ok(replicator) => Run::Running(replicator),
            Err(error) => {
                tracing::error!(group = %name, "group not started: {error}; the other groups go on");
                Run::Failed(error.to_string())
            }
        };
        if let Some(group) = self.groups.iter_mut().find(|group| group.name == name) {
            group.run = run;
        }
    }

    /// Groups that are being started still.
    pub(crate) fn starting(&self) -> impl Iterator<Item = &Name> {
        self.groups.iter().filter(|group| matches!(group.run, Run::Starting)).map(|group| &group.name)
    }

    /// Groups that run, or may come to. One whose disks are a copy runs or not as its receiver does.
    pub(crate) fn running(&self) -> usize {
        self.groups.iter().filter(|g| matches!(g.run, Run::Starting | Run::Running(_))).count()
    }

    pub(crate) fn status(&self) -> Vec<PrimaryStatus> {
        let one = |group: &Primary| match &group.run {
            Run::Starting => PrimaryStatus::Waiting { group: group.name.clone(), reason: STARTING.to_owned() },
            Run::Running(replicator) => PrimaryStatus::Running(Box::new(replicator.status())),
            Run::Failed(error) => PrimaryStatus::Failed { group: group.name.clone(), error: error.clone() },
            Run::Onward(onward) => onward.primary_status(),
        };
        self.groups.iter().map(one).collect()
    }

    /// The groups whose disks are copies of this node.
    pub(crate) fn onward(&self) -> Vec<Arc<Onward>> {
        let onward = |group: &Primary| match &group.run {
            Run::Onward(onward) => Some(Arc::clone(onward)),
            Run::Starting | Run::Running(_) | Run::Failed(_) => None,
        };
        self.groups.iter().filter_map(onward).collect()
    }

    /// The group that replicates a copy onward.
    pub(crate) fn onward_of(&self, copy: &GroupRef) -> Option<Arc<Onward>> {
        self.onward().into_iter().find(|onward| onward.copy() == copy)
    }

    /// Refuses to take disks back that cannot be written.
    fn check_writable(&self, group: &str) -> Result<(), RequestError> {
        let primary = self.groups.iter().find(|g| g.name.as_str() == group);
        match primary.map(|primary| &primary.run) {
            Some(Run::Onward(onward)) if !onward.is_active() => {
                Err(RequestError::CopyFollows { group: group.to_owned(), copy: onward.copy().to_string() })
            }
            _ => Ok(()),
        }
    }

    fn replicator(&self, group: &str) -> Option<Result<&Replicator, RequestError>> {
        let primary = self.groups.iter().find(|g| g.name.as_str() == group)?;
        let found = match &primary.run {
            Run::Starting => Err(STARTING.to_owned()),
            Run::Running(replicator) => Ok(replicator),
            Run::Failed(error) => Err(error.clone()),
            Run::Onward(onward) => onward.replicator().ok_or_else(|| onward.waits_for()),
        };
        Some(found.map_err(|error| RequestError::NotRunning { group: group.to_owned(), error }))
    }

    /// All that run.
    fn replicators(&self) -> impl Iterator<Item = &Replicator> {
        self.groups.iter().filter_map(|group| match &group.run {
            Run::Running(replicator) => Some(replicator),
            Run::Starting | Run::Failed(_) => None,
            Run::Onward(onward) => onward.replicator(),
        })
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

    /// It may take long, and nobody must wait for it who waits for these.
    pub(crate) fn handback_plan(
        &self,
        group: &str,
        target: HandbackTarget,
    ) -> Option<Result<impl Future<Output = Result<HandbackPlan, HandbackError>> + use<>, RequestError>> {
        let replicator = self.replicator(group)?;
        Some(self.check_writable(group).and(replicator).map(|replicator| replicator.handback_plan(target)))
    }

    /// The point that has a name at the receiver of a group.
    pub(crate) fn point_named(
        &self,
        group: &str,
        name: Name,
    ) -> Option<Result<impl Future<Output = Result<Point, HandbackError>> + use<>, RequestError>> {
        Some(self.replicator(group)?.map(|replicator| replicator.point_named(name)))
    }

    pub(crate) fn begin_handback(&self, group: &str, target: HandbackTarget) -> Option<Result<HandbackProgress, RequestError>> {
        let replicator = self.replicator(group)?;
        let begun = self.check_writable(group).and(replicator).and_then(|replicator| Ok(replicator.begin_handback(target)?));
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
        self.replicators().for_each(|replicator| replicator.end_flushes(FLUSH_DRAIN));
    }

    /// Commits what is left, all groups at once. The exports must have stopped before.
    pub(crate) async fn shutdown(&mut self, within: Duration) {
        let taken = |Primary { name, run }: Primary| match run {
            Run::Running(replicator) => Some((name, replicator)),
            Run::Starting | Run::Failed(_) => None,
            Run::Onward(onward) => match Arc::try_unwrap(onward) {
                Ok(onward) => Some((name, onward.into_replicator()?)),
                Err(_) => {
                    tracing::warn!(group = %name, "a failover is under way; what was written lately is compared at the next start");
                    None
                }
            },
        };
        let all = self.groups.drain(..).filter_map(taken).map(|(name, replicator)| async move {
            if replicator.shutdown(within).await {
                tracing::info!(group = %name, "stopped; everything is committed at the receiver");
            } else {
                tracing::warn!(group = %name, "stopped; not everything is committed at the receiver");
            }
        });
        join_all(all).await;
    }
}

/// Where groups have what they must not forget.
pub(crate) fn groups_dir(state_dir: &Path) -> PathBuf {
    state_dir.join("groups")
}

pub(crate) fn tuning(config: &GroupConfig) -> Tuning {
    Tuning {
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
    }
}

/// Binds the addresses of a group's disks, in their order; clients wait there.
async fn listen(config: &GroupConfig, exports: &Exports) -> Result<Vec<ListenAddr>, ExportError> {
    let mut addresses = Vec::new();
    for disk in &config.disks {
        addresses.push(exports.listen(&disk.export, disk.tls.as_ref()).await?);
    }
    // All or none.
    for address in &addresses {
        exports.expect(address).await;
    }
    Ok(addresses)
}

/// A group that is being started.
struct Group {
    config: GroupConfig,
    /// Of its disks.
    addresses: Vec<ListenAddr>,
    dir: PathBuf,
    identity: Identity,
    exports: Arc<Exports>,
}

impl Group {
    /// To be called on the thread whose priority the group's threads are to have; the future may run anywhere.
    fn start(self, runtime: Handle) -> impl Future<Output = Arrived> + Send + use<> {
        let Self { config, addresses, dir, identity, exports } = self;
        let (sender, opened) = oneshot::channel();
        let group = config.clone();
        // It opens files, and waits for their disks.
        let thread = std::thread::Builder::new().name("start".to_owned()).spawn(move || {
            let _runtime = runtime.enter();
            // Nobody takes it if the node was stopped meanwhile.
            let _ = sender.send(open(&group, &dir, &identity));
        });
        async move {
            let run = async {
                thread.map_err(StartError::Thread)?;
                let replicator = opened.await.map_err(|_| StartError::GivenUp)??;
                for (disk, address) in config.disks.iter().zip(&addresses) {
                    if let Some(device) = replicator.volume(&disk.name) {
                        exports.add_expected(address, config.name.as_str(), vec![(disk.name.clone(), device)]).await?;
                        tracing::info!(group = %config.name, disk = %disk.name, %address, "disk exported");
                    }
                }
                tracing::info!(group = %config.name, disks = config.disks.len(), peer = config.peer, "group started");
                Ok(replicator)
            };
            let run = run.await;
            if run.is_err() {
                exports.withdraw(config.name.as_str()).await;
            }
            for address in &addresses {
                exports.arrived(address).await;
            }
            Arrived { name: config.name, run }
        }
    }
}

fn open(config: &GroupConfig, groups_dir: &Path, identity: &Identity) -> Result<Replicator, StartError> {
    let mut volumes = Vec::new();
    for disk in &config.disks {
        let options = OpenOptions { direct: disk.direct, drop_cached: true, ..OpenOptions::default() };
        let device =
            FileDevice::open(&disk.path, options).map_err(|source| StartError::Disk { disk: disk.name.clone(), source })?;
        volumes.push(VolumeSpec { name: disk.name.clone(), device: Arc::new(device) });
    }
    let spec = GroupSpec {
        group: config.name.clone(),
        volumes,
        peer: PeerSpec { address: config.peer.clone(), key: config.peer_key },
        state_dir: groups_dir.join(config.name.as_str()),
        tuning: tuning(config),
        all_suspect: false,
    };
    Ok(Replicator::start(spec, identity.clone())?)
}
