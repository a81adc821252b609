//! Failover at the recovery site: what it would do, doing it, and exporting active copies again after a restart.
//!
//! Order: the address is bound first (an address in use changes nothing), then it is recorded, then the generation is raised,
//! then the disks are offered. A crash between the steps leaves either nothing done or an active copy with a recorded address.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use blockdev::BlockDevice;
use blockdev::nbd::ListenAddr;
use blockdev::steps::{Step, reach};
use proto::{Generation, Name, Point};

use super::Node;
use super::adopt::AdoptRefused;
use super::copies::{Activated, Copies, GroupRef};
use super::drills::DrillRefused;
use super::exports::ExportError;
use super::onward;
use super::primaries::groups_dir;
use super::record::RecordError;
use crate::api::{CopyVolume, FailoverDone, FailoverPlan, FailoverRequest, nbd_uri};
use crate::config::{Problem, export_address};
use crate::hooks::{Facts, HookError, Phase, Transition};

/// How many known points a message names.
const POINTS_NAMED_MAX: usize = 6;

/// Why a request is refused. One line each.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("this node keeps no copies: it has no [receiver] section; ask the node at the other site")]
    NoReceiver,
    #[error("unknown group '{given}': {}", known_groups(known))]
    UnknownGroup { given: String, known: Vec<String> },
    #[error("group '{given}' is sent by several clients: name one of {}", known.join(", "))]
    AmbiguousGroup { given: String, known: Vec<String> },
    #[error("group {group} has no point {point}: {}", known_points(known))]
    UnknownPoint { group: String, point: Point, known: Vec<Point> },
    #[error(
        "group {group}: what it sent onward, as group {onward}, was failed over at the third site, or is about to be: guests here could \
         not write. See `twinsite status {onward}`; `twinsite failover --force` activates it nevertheless, and then `twinsite failback {onward}` takes \
         its disks back"
    )]
    ThirdSite { group: String, onward: Name },
    #[error(
        "group '{group}' has nothing to write to: its disks are the copy {copy}, which is not active through it; fail that over first"
    )]
    CopyFollows { group: String, copy: String },
    #[error("group {group} has no committed point yet: its first sync is not complete, there is nothing to fail over to")]
    NoPoint { group: String },
    #[error("group {group} is active already, from point {point}: it can be exported elsewhere, but not from another point")]
    AlreadyActive { group: String, point: Point },
    #[error(
        "group {group}: its primary{} is alive, heard from {heard_ms} ms ago: stop it, or cut it off and wait {} s; --force fails over \
         nevertheless, and then two servers may run",
        at_address(address), receiver::ALIVE_WITHIN.as_secs()
    )]
    PrimaryAlive { group: String, address: Option<String>, heard_ms: u64 },
    #[error("export '{given}' {problem}")]
    Export { given: String, problem: Problem },
    #[error(transparent)]
    Exports(#[from] ExportError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("{0}: nothing was changed; --ignore-hooks goes on nevertheless")]
    Hook(HookError),
    #[error("group '{group}' is a copy here: run this at its primary, on the node that has its disks")]
    CopyOnly { group: String },
    #[error("group '{given}' is none of this node's: {}", known_primaries(known))]
    UnknownPrimary { given: String, known: Vec<String> },
    #[error("group {group} does not run: {error}")]
    NotRunning { group: String, error: String },
    #[error("group {group} was not verified since this node was started: run twinsite verify {group}")]
    NeverVerified { group: String },
    #[error(transparent)]
    Verify(#[from] replicator::VerifyRefused),
    #[error("group {group} was neither given back nor rolled back since this node was started")]
    NeverHandedBack { group: String },
    #[error(transparent)]
    Handback(#[from] replicator::HandbackError),
    #[error(transparent)]
    Drill(#[from] DrillRefused),
    #[error(transparent)]
    Adopt(#[from] AdoptRefused),
    #[error("group {group} has no point '{given}': give a point such as 3.18211, or a name that twinsite points {group} shows")]
    UnknownName { group: String, given: String },
    #[error("{0}")]
    Name(String),
    #[error("{0}")]
    Fork(String),
    #[error("receiver: {0}")]
    Receiver(String),
    #[error("{}", .0.body_text())]
    Query(#[from] QueryRejection),
    #[error("{}", .0.body_text())]
    Body(#[from] JsonRejection),
    #[error("the failover ended without an answer: look at status and at the node's log")]
    Aborted,
}

fn at_address(address: &Option<String>) -> String {
    address.as_ref().map_or_else(String::new, |address| format!(" at {address}"))
}

fn known_groups(known: &[String]) -> String {
    if known.is_empty() { "no copies here yet".to_owned() } else { format!("known here are {}", known.join(", ")) }
}

fn known_primaries(known: &[String]) -> String {
    if known.is_empty() { "it has no [[group]]".to_owned() } else { format!("its groups are {}", known.join(", ")) }
}

fn known_points(known: &[Point]) -> String {
    let newest: Vec<String> = known.iter().rev().take(POINTS_NAMED_MAX).map(ToString::to_string).collect();
    match known.len() {
        0 => "it has none yet".to_owned(),
        n if n > newest.len() => format!("it has {n}, the newest are {}", newest.join(", ")),
        _ => format!("it has {}", newest.join(", ")),
    }
}

impl Node {
    /// What a failover or a switchover would do; `point` is one, or a name of one.
    pub(crate) async fn failover_plan(
        &self,
        transition: Transition,
        selector: &str,
        point: Option<&str>,
    ) -> Result<FailoverPlan, RequestError> {
        let copies = self.receiving()?;
        let group = copies.find(selector).await?;
        let points = copies.points(&group).await?;
        let no_point = || RequestError::NoPoint { group: group.to_string() };
        let newest = points.points.last().ok_or_else(no_point)?;
        let wanted = match point {
            Some(text) => copies.resolve(&group, text).await?,
            None => newest.point,
        };
        let chosen = points.points.iter().find(|p| p.point == wanted).ok_or_else(|| RequestError::UnknownPoint {
            group: group.to_string(),
            point: wanted,
            known: points.points.iter().map(|p| p.point).collect(),
        })?;
        let status = copies
            .status(&self.exports.offered().await, &[])
            .await
            .into_iter()
            .find(|g| g.client == group.client && g.group == group.group);
        let status = status.ok_or_else(no_point)?;
        let after = || points.points.iter().filter(|p| p.point > chosen.point);
        // An active group has its generation already: serving it elsewhere makes no second writer.
        let refusal = status.primary_alive.then_some(()).filter(|()| status.active.is_none()).map(|()| {
            let (address, heard_ms) = (status.peer.clone(), status.heard_age_ms.unwrap_or_default());
            RequestError::PrimaryAlive { group: group.to_string(), address, heard_ms }.to_string()
        });
        let third_site = self.third_site(&group).await.filter(|_| status.active.is_none());
        let refusal = refusal.or_else(|| third_site.map(|error| error.to_string()));
        if let (Some(active), Transition::Switchover) = (&status.active, transition) {
            return Err(RequestError::AlreadyActive { group: group.to_string(), point: active.point });
        }
        let hooks = self.hooks.planned(transition, Some(&group.client), &group.group);
        Ok(FailoverPlan {
            client: group.client,
            group: group.group,
            point: chosen.point,
            newest: newest.point,
            cut_unix_us: chosen.cut_unix_us,
            newest_cut_unix_us: newest.cut_unix_us,
            points_after: after().count() as u64,
            changed_bytes_after: after().map(|p| p.changed_bytes).sum(),
            generation: status.generation,
            generation_after: if status.active.is_some() { status.generation } else { Generation(status.generation.0 + 1) },
            connected: status.peer,
            heard_age_ms: status.heard_age_ms,
            primary_alive: status.primary_alive,
            refusal,
            active: status.active,
            volumes: status.volumes,
            hooks,
            bytes_to_move: 0,
        })
    }

    /// Activates a copy and serves it; an active copy is served at another address.
    pub(crate) async fn failover(&self, request: &FailoverRequest) -> Result<FailoverDone, RequestError> {
        self.failover_as(Transition::Failover, request).await
    }

    /// As [`Self::failover`], with the hooks of `transition`.
    pub(crate) async fn failover_as(
        &self,
        transition: Transition,
        request: &FailoverRequest,
    ) -> Result<FailoverDone, RequestError> {
        let began = Instant::now();
        let copies = self.receiving()?;
        // One failover at a time, from the plan on: a second one sees what the first has done.
        let mut record = self.record.lock().await;
        let plan = self.failover_plan(transition, &request.group, request.point.as_deref()).await?;
        let group = GroupRef { client: plan.client.clone(), group: plan.group.clone() };
        if let (Some(active), Some(_)) = (&plan.active, &request.point)
            && active.point != plan.point
        {
            return Err(RequestError::AlreadyActive { group: group.to_string(), point: active.point });
        }
        if plan.refusal.is_some() && !request.force {
            if !plan.primary_alive
                && let Some(error) = self.third_site(&group).await
            {
                return Err(error);
            }
            let (address, heard_ms) = (plan.connected, plan.heard_age_ms.unwrap_or_default());
            return Err(RequestError::PrimaryAlive { group: group.to_string(), address, heard_ms });
        }
        let refused = |problem| RequestError::Export { given: request.export.clone(), problem };
        // A relative path would be relative to the daemon's folder, which nobody knows; the command line makes it absolute.
        let address = export_address(Path::new("/"), &request.export).map_err(refused)?;
        let selector = group.to_string();
        self.exports.check_free(&address, &selector, plan.volumes.iter().map(|v| &v.name)).await?;
        let before = record.get(&selector).map(str::to_owned);
        let address = self.exports.listen(&address, None).await?;
        let facts = facts(&plan, &address);
        let mut hooks = Vec::new();
        let result = async {
            match self.hooks.run(transition, Phase::Pre, &facts).await {
                Ok(run) => hooks.extend(run),
                Err(error) if request.ignore_hooks => tracing::warn!(group = selector, "goes on without its hook: {error}"),
                Err(error) => return Err(RequestError::Hook(error)),
            }
            record.set(&selector, Some(&address.to_string()))?;
            reach(Step::FailoverRecorded);
            let activated = match (&plan.active, transition) {
                (Some(_), _) => copies.failover(&group, None).await?,
                (None, Transition::Switchover) => copies.switchover(&group, plan.point).await?,
                (None, _) => copies.failover(&group, Some(plan.point)).await?,
            };
            let volumes = volumes(&activated);
            self.exports.withdraw(&selector).await;
            let disks = self.disks_for_guests(copies, &activated).await;
            self.exports.add(&address, &selector, disks).await?;
            reach(Step::FailoverExported);
            Ok::<_, RequestError>((activated.point, activated.generation, volumes))
        }
        .await;
        if let Err(error) = &result {
            if record.get(&selector) != before.as_deref()
                && let Err(error) = record.set(&selector, before.as_deref())
            {
                tracing::error!(group = selector, "{error}");
            }
            self.exports.note_failed(&selector, &error.to_string()).await;
        }
        self.exports.prune().await;
        let (point, generation, volumes) = result?;
        let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::warn!(group = selector, %point, %generation, %address, took_ms, "failover: the copy is active");
        let facts = Facts { point: Some(point), generation, ..facts };
        let post_hook = self.hooks.begin(transition, Phase::Post, facts);
        Ok(FailoverDone {
            client: plan.client,
            group: plan.group,
            point,
            generation,
            export: address.to_string(),
            volumes,
            took_ms,
            hooks,
            post_hook,
        })
    }

    /// Serves every copy that was active when the node stopped.
    pub(crate) async fn export_active(&self) {
        let Ok(copies) = self.receiving() else { return };
        for activated in copies.all_activated().await {
            let activated = match activated {
                Ok(activated) => activated,
                Err(error) => {
                    tracing::error!("active copy not opened: {error}");
                    continue;
                }
            };
            let selector = activated.group.to_string();
            let recorded = self.record.lock().await.get(&selector).map(str::to_owned);
            let Some(recorded) = recorded else {
                tracing::error!(group = selector, "active, but nowhere exported: run twinsite failover {selector} --export …");
                continue;
            };
            match self.export_again(&selector, &recorded, activated).await {
                Ok(()) => tracing::info!(group = selector, address = recorded, "active copy exported again"),
                Err(error) => {
                    tracing::error!(group = selector, "active copy not exported: {error}");
                    self.exports.note_failed(&selector, &error.to_string()).await;
                }
            }
        }
        self.exports.prune().await;
    }

    async fn export_again(&self, selector: &str, recorded: &str, activated: Activated) -> Result<(), RequestError> {
        let refused = |problem| RequestError::Export { given: recorded.to_owned(), problem };
        let address = export_address(Path::new("/"), recorded).map_err(refused)?;
        let address = self.exports.listen(&address, None).await?;
        let disks = self.disks_for_guests(self.receiving()?, &activated).await;
        Ok(self.exports.add(&address, selector, disks).await?)
    }

    /// The disks of an active copy for its guests: if it goes onward, those whose changes do.
    async fn disks_for_guests(&self, copies: &Copies, activated: &Activated) -> Vec<(Name, Arc<dyn BlockDevice>)> {
        let onward = self.primaries.read().await.onward_of(&activated.group);
        if let Some(onward) = onward {
            return onward.activate(copies, activated).await;
        }
        // It may go onward again, one day.
        if let Err(error) = onward::forget(&groups_dir(&self.state_dir), &activated.group.to_string()) {
            tracing::error!(group = %activated.group, "{error}: remove it before this copy is replicated onward again");
        }
        activated.volumes.clone()
    }

    /// Why guests of a copy could not write, if its third site is the reason.
    pub(super) async fn third_site(&self, group: &GroupRef) -> Option<RequestError> {
        let onward = self.primaries.read().await.onward_of(group).filter(|onward| onward.refuses_guests())?;
        Some(RequestError::ThirdSite { group: group.to_string(), onward: onward.status().group })
    }
}

fn facts(plan: &FailoverPlan, address: &ListenAddr) -> Facts {
    let export = address.to_string();
    let disk = |v: &CopyVolume| (v.name.clone(), v.size_bytes, Some(nbd_uri(&export, v.name.as_str())));
    Facts {
        client: Some(plan.client.clone()),
        group: plan.group.clone(),
        point: Some(plan.active.as_ref().map_or(plan.point, |active| active.point)),
        generation: plan.generation_after,
        disks: plan.volumes.iter().map(disk).collect(),
        repeated: plan.active.is_some(),
        drill: None,
        export: Some(export),
    }
}

fn volumes(activated: &Activated) -> Vec<CopyVolume> {
    activated.volumes.iter().map(|(name, device)| CopyVolume { name: name.clone(), size_bytes: device.size() }).collect()
}
