//! A group whose disks are a copy that this node keeps: the copy goes on to a third site, whether it follows its primary or is active.
//!
//! While the copy follows, the disks are its newest point, read-only; while it is active they are its fork, which guests write through the
//! group's taps. Going from one to the other is an exchange below the taps (`replicator`), which every epoch of this group has whole or not at all:
//! so each point at the third site is exactly one that the copy had, until guests write here.
//!
//! What must always hold: what differs is marked before it is shown, and what is shown is recorded before it is (`record`), so that a restart knows
//! what the third site may lack. A copy becomes the server whatever goes wrong here: then its guests write past the tap, which is said and
//! never forgotten.

mod record;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use blockdev::{BlockDevice, SwitchDevice};
use proto::{DirtyMap, Identity, Name, Point};
use receiver::{GroupError, Image};
use replicator::{Exchange, ExchangeError, Exchanger, GroupSpec, PeerSpec, Replicator, ReplicatorError, VolumeSpec};
use tokio::sync::Mutex;

use self::record::OnwardRecord;
pub(crate) use self::record::{Shown, forget};
use super::copies::{Activated, Copies, GroupRef};
use super::failover::RequestError;
use super::primaries::tuning;
use crate::api::{OnwardState, OnwardStatus, PrimaryStatus};
use crate::config::GroupConfig;

/// How often it is looked whether the copy is there, or what failed can be done now.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Newer points are shown up to so many times an interval: each costs some syncs, and one a cut would do but for when it comes.
const SHOWN_PER_INTERVAL: u32 = 4;

/// Why nothing is shown, or nothing newer. One line each.
#[derive(Debug, thiserror::Error)]
enum OnwardError {
    #[error("there is no copy {copy} here yet: its primary has not been connected")]
    NoCopy { copy: String },
    #[error("the copy {copy} has no committed point yet: its first sync is not complete")]
    NoPoint { copy: String },
    #[error("the copy {copy} is active and exported nowhere: run twinsite failover {copy} --export …")]
    NotExported { copy: String },
    #[error("peer_key is this node's own: a copy is replicated onward to another node")]
    Itself,
    #[error(
        "guests write to the active copy past this group since {since}: restart the node to have all of it compared and replicated"
    )]
    Bypassed { since: String },
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error(transparent)]
    Copy(#[from] GroupError),
    #[error(transparent)]
    Record(#[from] record::RecordError),
    #[error(transparent)]
    Replicator(#[from] ReplicatorError),
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    #[error("no disk {disk} in the group: this is a defect")]
    NoDisk { disk: Name },
}

impl OnwardError {
    /// Whether it is only a matter of waiting.
    fn is_waiting(&self) -> bool {
        matches!(
            self,
            Self::NoCopy { .. } | Self::NoPoint { .. } | Self::NotExported { .. } | Self::Exchange(ExchangeError::Held { .. })
        )
    }
}

/// Once the copy is there.
struct Live {
    copy: receiver::Onward,
    exchanger: Exchanger,
    /// The disks below the taps.
    switches: Vec<Arc<SwitchDevice>>,
    record: OnwardRecord,
    /// What they are.
    shown: Shown,
    /// The point since which the copy notes what changes; `None`: it is not to be relied on.
    noted_since: Option<Point>,
}

/// What `status` shows.
#[derive(Clone, Debug)]
struct Told {
    shown: Option<Shown>,
    error: Option<String>,
    /// Guests of the active copy write past the tap.
    is_bypassed: bool,
}

/// One onward group.
pub(crate) struct Onward {
    config: GroupConfig,
    copy: GroupRef,
    /// The group's own.
    state_dir: PathBuf,
    identity: Identity,
    replicator: OnceLock<Replicator>,
    /// Held while what is shown changes.
    live: Mutex<Option<Live>>,
    told: parking_lot::Mutex<Told>,
}

type Disks = Vec<(Name, Arc<dyn BlockDevice>)>;

impl Onward {
    /// Of a configured group; `None` if its disks are its own.
    pub(crate) fn of(config: &GroupConfig, groups_dir: &Path, identity: &Identity) -> Option<Arc<Self>> {
        let copy = config.copy.as_ref()?;
        Some(Arc::new(Self {
            config: config.clone(),
            copy: GroupRef { client: copy.client.clone(), group: copy.group.clone() },
            state_dir: groups_dir.join(config.name.as_str()),
            identity: identity.clone(),
            replicator: OnceLock::new(),
            live: Mutex::new(None),
            told: parking_lot::Mutex::new(Told { shown: None, error: None, is_bypassed: false }),
        }))
    }

    /// The copy that it replicates.
    pub(crate) fn copy(&self) -> &GroupRef {
        &self.copy
    }

    /// The running group, once the copy is there.
    pub(crate) fn replicator(&self) -> Option<&Replicator> {
        self.replicator.get()
    }

    /// Ends; the group, if it runs, is to be shut down.
    pub(crate) fn into_replicator(self) -> Option<Replicator> {
        self.replicator.into_inner()
    }

    /// Why it does not run.
    pub(crate) fn waits_for(&self) -> String {
        self.told.lock().error.clone().unwrap_or_else(|| "starting".to_owned())
    }

    pub(crate) fn primary_status(&self) -> PrimaryStatus {
        let group = self.config.name.clone();
        match self.replicator() {
            Some(replicator) => PrimaryStatus::Running(Box::new(replicator.status())),
            None => PrimaryStatus::Waiting { group, reason: self.waits_for() },
        }
    }

    pub(crate) fn status(&self) -> OnwardStatus {
        let told = self.told.lock().clone();
        let (state, point) = match told.shown {
            _ if told.is_bypassed => (OnwardState::Bypassed, None),
            None => (OnwardState::Waiting, None),
            Some(Shown::Point(point)) => (OnwardState::Following, Some(point)),
            Some(Shown::Active(_)) => (OnwardState::Active, None),
        };
        let (group, copy) = (self.config.name.clone(), self.copy.to_string());
        OnwardStatus { group, copy, state, point, error: told.error }
    }

    /// Whether guests of the active copy could not write: the third site is the server, or about to be.
    pub(crate) fn refuses_guests(&self) -> bool {
        let status = self.replicator().map(Replicator::status);
        status.is_some_and(|status| status.writes_refused.is_some()) && !self.config.writes_when_fenced
    }

    /// Whether disks can be taken back from the third site: only what is active can be written.
    pub(crate) fn is_active(&self) -> bool {
        let told = self.told.lock();
        !told.is_bypassed && matches!(told.shown, Some(Shown::Active(_)))
    }

    /// Shows the copy's newest point whenever there is another one, for ever.
    pub(crate) async fn follow(&self, copies: &Copies) {
        loop {
            match self.turn(copies).await {
                Ok(Some(mut turns)) => {
                    tokio::time::sleep((self.config.interval / SHOWN_PER_INTERVAL).min(LOOK_EVERY)).await;
                    // An error means that the copy is closed: the node is stopping.
                    if turns.changed().await.is_err() {
                        return;
                    }
                }
                Ok(None) => tokio::time::sleep(LOOK_EVERY).await,
                Err(error) => {
                    self.note(&error);
                    tokio::time::sleep(LOOK_EVERY).await;
                }
            }
        }
    }

    /// The node keeps no copies.
    pub(crate) fn cannot(&self, why: &str) {
        self.told.lock().error = Some(why.to_owned());
    }

    fn note(&self, error: &OnwardError) {
        let text = error.to_string();
        let mut told = self.told.lock();
        if told.error.as_ref() != Some(&text) {
            let (group, copy) = (&self.config.name, &self.copy);
            match error.is_waiting() {
                true => tracing::info!(%group, %copy, "{text}"),
                false => tracing::error!(%group, %copy, "{text}"),
            }
        }
        told.error = Some(text);
    }

    fn is_shown(&self, shown: Shown) {
        let mut told = self.told.lock();
        (told.shown, told.error) = (Some(shown), None);
    }

    /// Shows what is newest; returns what tells that there may be something newer.
    async fn turn(&self, copies: &Copies) -> Result<Option<tokio::sync::watch::Receiver<u64>>, OnwardError> {
        let mut live = self.live.lock().await;
        if self.told.lock().is_bypassed {
            return Ok(None);
        }
        let live = match &mut *live {
            Some(live) => live,
            none => none.insert(self.begin(copies, None).await?),
        };
        // Before it is looked: what comes meanwhile is seen.
        let turns = live.copy.turns();
        self.show_newest(live).await?;
        self.told.lock().error = None;
        Ok(Some(turns))
    }

    /// Starts the group with what was shown last, or, if nobody knows that any more, with everything suspect.
    async fn begin(&self, copies: &Copies, activated: Option<&Activated>) -> Result<Live, OnwardError> {
        if self.config.peer_key == self.identity.fingerprint() {
            return Err(OnwardError::Itself);
        }
        let name = || self.copy.to_string();
        let copy = copies.onward(&self.copy).await?.ok_or_else(|| OnwardError::NoCopy { copy: name() })?;
        if copy.stands().is_active && activated.is_none() {
            return Err(OnwardError::NotExported { copy: name() });
        }
        let record = OnwardRecord::new(&self.state_dir, name(), copy.group_id());
        let before = match record.shown()? {
            None => None,
            Some(shown) => known(&copy, shown, activated).await?,
        };
        let all_suspect = before.is_none();
        let (disks, shown, as_of, noted_since) = match (before, activated) {
            (Some((disks, shown, as_of)), _) => (disks, shown, as_of, None),
            (None, Some(active)) => (active.volumes.clone(), Shown::Active(active.generation), None, None),
            (None, None) => {
                let image = copy.newest().await?.ok_or_else(|| OnwardError::NoPoint { copy: name() })?;
                (image.disks, Shown::Point(image.point), Some(image.cut_unix_us), Some(image.point))
            }
        };
        if !all_suspect && record.shown()? != Some(shown) {
            record.write(shown).map_err(|source| ExchangeError::Make { source })?;
        }
        let switches: Vec<_> = disks.iter().map(|(_, disk)| Arc::new(SwitchDevice::new(disk.clone()))).collect();
        let volume = |((name, _), switch): (&(Name, _), &Arc<SwitchDevice>)| VolumeSpec {
            name: name.clone(),
            device: switch.clone() as Arc<dyn BlockDevice>,
        };
        let spec = GroupSpec {
            group: self.config.name.clone(),
            volumes: disks.iter().zip(&switches).map(volume).collect(),
            peer: PeerSpec { address: self.config.peer.clone(), key: self.config.peer_key },
            state_dir: self.state_dir.clone(),
            tuning: tuning(&self.config),
            all_suspect,
        };
        let replicator = Replicator::start(spec, self.identity.clone())?;
        let exchanger = replicator.exchanger();
        exchanger.as_of(as_of);
        tracing::info!(group = %self.config.name, copy = %self.copy, ?shown, all_suspect, "group started: a copy goes onward");
        // Set nowhere else, under the lock that is held here.
        let _ = self.replicator.set(replicator);
        if all_suspect && let Err(error) = record.write(shown) {
            // Without it everything is compared at the next start, too.
            tracing::warn!(group = %self.config.name, "{error}");
        }
        self.is_shown(shown);
        Ok(Live { copy, exchanger, switches, record, shown, noted_since })
    }

    /// Nothing to do while the copy is active: its fork is shown when its guests are let in.
    async fn show_newest(&self, live: &mut Live) -> Result<(), OnwardError> {
        let stands = live.copy.stands();
        let Some(newest) = stands.newest.filter(|newest| !stands.is_active && live.shown != Shown::Point(*newest)) else {
            return Ok(());
        };
        if live.exchanger.holds_still() {
            let why = "its disks are being given back, or the other site is about to take over";
            return Err(ExchangeError::Held { group: self.config.name.clone(), why }.into());
        }
        let (image, differing) = live.step().await?.ok_or_else(|| OnwardError::NoPoint { copy: self.copy.to_string() })?;
        tracing::debug!(group = %self.config.name, %newest, point = %image.point, "the copy goes onward");
        let disks = image.disks.into_iter().map(|(_, disk)| disk).collect();
        live.exchange(disks, Shown::Point(image.point), differing, Some(image.cut_unix_us)).await?;
        live.noted_since = Some(image.point);
        self.is_shown(live.shown);
        Ok(())
    }

    /// The disks of an active copy for its guests: through the taps, so that what they write goes onward. If that cannot be, past them: a
    /// copy becomes the server whatever goes wrong with its protection.
    pub(crate) async fn activate(&self, copies: &Copies, activated: &Activated) -> Disks {
        let mut live = self.live.lock().await;
        match self.try_activate(&mut live, copies, activated).await {
            Ok(taps) => taps,
            Err(error) => {
                self.bypass(&error, activated);
                activated.volumes.clone()
            }
        }
    }

    async fn try_activate(&self, live: &mut Option<Live>, copies: &Copies, activated: &Activated) -> Result<Disks, OnwardError> {
        if self.told.lock().is_bypassed {
            return Err(OnwardError::Bypassed { since: "an earlier failover".to_owned() });
        }
        let live = match live {
            Some(live) => live,
            none => none.insert(self.begin(copies, Some(activated)).await?),
        };
        let shown = Shown::Active(activated.generation);
        if live.shown != shown {
            let (image, mut differing) =
                live.step().await?.ok_or_else(|| OnwardError::NoPoint { copy: self.copy.to_string() })?;
            if activated.point != image.point {
                let back = live.copy.differing(activated.point, image.point).await?;
                merge(&mut differing, &back.unwrap_or_else(|| live.everything()));
            }
            merge(&mut differing, &activated.written());
            let disks = activated.volumes.iter().map(|(_, disk)| disk.clone()).collect();
            live.exchange(disks, shown, differing, None).await?;
            self.is_shown(shown);
        }
        let replicator = self.replicator();
        let tap = |(name, _): &(Name, _)| {
            let tap = replicator.and_then(|replicator| replicator.volume(name));
            Ok((name.clone(), tap.ok_or_else(|| OnwardError::NoDisk { disk: name.clone() })?))
        };
        activated.volumes.iter().map(tap).collect()
    }

    /// Guests write past the tap from here on.
    fn bypass(&self, error: &OnwardError, activated: &Activated) {
        let (group, copy) = (&self.config.name, &self.copy);
        tracing::error!(%group, %copy, "what guests write to the active copy is not replicated onward: {error}");
        let groups_dir = self.state_dir.parent().unwrap_or(&self.state_dir);
        if let Err(error) = forget(groups_dir, &copy.to_string()) {
            tracing::error!(%group, %copy, "{error}: remove it before the next start, or what is written now never reaches the third site");
        }
        let mut told = self.told.lock();
        told.is_bypassed = true;
        told.error = Some(match error {
            OnwardError::Bypassed { .. } => error.to_string(),
            error => format!("{} ({error})", OnwardError::Bypassed { since: format!("generation {}", activated.generation) }),
        });
    }
}

impl Live {
    fn everything(&self) -> Vec<DirtyMap> {
        self.switches.iter().map(|switch| DirtyMap::full(switch.size())).collect()
    }

    /// The copy's newest image, and the blocks in which it may differ from what is shown; `None` if it has no point.
    async fn step(&mut self) -> Result<Option<(Image, Vec<DirtyMap>)>, OnwardError> {
        // Taken is taken: what is noted counts from this image on, whatever becomes of it.
        let noted_since = self.noted_since.take();
        let Some(mut image) = self.copy.newest().await? else { return Ok(None) };
        let changed = std::mem::take(&mut image.changed);
        let common = match self.shown {
            Shown::Point(point) if noted_since == Some(point) => return Ok(Some((image, changed))),
            Shown::Point(point) => Some(point),
            Shown::Active(generation) => self.copy.given_back(generation),
        };
        let differing = match common {
            Some(common) => self.copy.differing(common, image.point).await?,
            None => None,
        };
        Ok(Some((image, differing.unwrap_or_else(|| self.everything()))))
    }

    async fn exchange(
        &mut self,
        disks: Vec<Arc<dyn BlockDevice>>,
        shown: Shown,
        differing: Vec<DirtyMap>,
        as_of_unix_us: Option<u64>,
    ) -> Result<(), ExchangeError> {
        let (switches, record) = (self.switches.clone(), self.record.clone());
        let exchange = Exchange {
            differing,
            before: self.switches.iter().map(|switch| switch.inner()).collect(),
            as_of_unix_us,
            // A copy that becomes the server does not wait for the third site.
            in_any_case: matches!(shown, Shown::Active(_)),
            make: Box::new(move || {
                record.write(shown)?;
                switches.iter().zip(disks).try_for_each(|(switch, disk)| switch.exchange(disk))
            }),
        };
        self.exchanger.exchange(exchange).await?;
        self.shown = shown;
        Ok(())
    }
}

fn merge(into: &mut [DirtyMap], maps: &[DirtyMap]) {
    into.iter_mut().zip(maps).for_each(|(into, map)| into.merge(map));
}

/// The disks as they were recorded, if they can still be had: the active copy, or a point that is kept.
async fn known(
    copy: &receiver::Onward,
    shown: Shown,
    activated: Option<&Activated>,
) -> Result<Option<(Disks, Shown, Option<u64>)>, GroupError> {
    let point = match (shown, activated) {
        (Shown::Active(generation), Some(active)) if active.generation == generation => {
            return Ok(Some((active.volumes.clone(), shown, None)));
        }
        (Shown::Active(generation), _) => copy.given_back(generation),
        (Shown::Point(point), _) => Some(point),
    };
    let Some(point) = point else { return Ok(None) };
    let image = copy.at(point).await?;
    Ok(image.map(|image| (image.disks, Shown::Point(point), Some(image.cut_unix_us))))
}
