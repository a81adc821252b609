//! Who writes, changed on purpose: switchover here, disks given back (failback) and taken back to a point (rollback) at the primary.

use std::sync::Arc;
use std::time::Duration;

use blockdev::steps::{Step, reach};
use proto::{Generation, Name};
use replicator::{HandbackStatus, HandbackTarget};

use super::Node;
use super::copies::GroupRef;
use super::failover::RequestError;
use crate::api::{FailoverDone, FailoverRequest, HandbackProgress, HandbackRequest, PlannedHandback, SwitchoverRequest};
use crate::hooks::{Facts, Phase, Transition};

/// How long a primary may take to commit what it has, unless another time is given.
pub(crate) const DRAIN_DEFAULT: Duration = Duration::from_secs(60);
/// How often it is looked whether a handback has ended.
const LOOK_EVERY: Duration = Duration::from_millis(500);

impl Node {
    /// What is asked for; the name of a point is the receiver's affair, so it is asked.
    async fn target(&self, request: &HandbackRequest) -> Result<HandbackTarget, RequestError> {
        let Some(text) = &request.point else { return Ok(HandbackTarget::Failback) };
        if let Ok(point) = text.parse() {
            return Ok(HandbackTarget::Rollback(point));
        }
        let unknown = || RequestError::UnknownName { group: request.group.clone(), given: text.clone() };
        let name = text.parse::<Name>().map_err(|_| unknown())?;
        let asked = self.primaries.read().await.point_named(&request.group, name);
        match asked {
            Some(point) => Ok(HandbackTarget::Rollback(point?.await?)),
            None => Err(self.no_primary(&request.group).await),
        }
    }

    /// What a handback would do; changes nothing.
    pub(crate) async fn handback_plan(&self, request: &HandbackRequest) -> Result<PlannedHandback, RequestError> {
        let target = self.target(request).await?;
        let transition = match target {
            HandbackTarget::Rollback(_) => Transition::Rollback,
            HandbackTarget::Failback => Transition::Failback,
        };
        let planned = self.primaries.read().await.handback_plan(&request.group, target);
        match planned {
            Some(plan) => {
                let plan = plan?.await?;
                Ok(PlannedHandback { hooks: self.hooks.planned(transition, None, &plan.group), plan })
            }
            None => Err(self.no_primary(&request.group).await),
        }
    }

    /// Begins, behind the hook before it; the hook after it runs if it comes to its end.
    pub(crate) async fn begin_handback(self: &Arc<Self>, request: &HandbackRequest) -> Result<HandbackProgress, RequestError> {
        let plan = self.handback_plan(request).await?.plan;
        let (transition, target) = match request.point {
            Some(_) => (Transition::Rollback, HandbackTarget::Rollback(plan.from)),
            None => (Transition::Failback, HandbackTarget::Failback),
        };
        let facts = Facts {
            client: None,
            group: plan.group.clone(),
            point: Some(plan.from),
            generation: Generation(plan.generation.0.saturating_add(1)),
            export: None,
            disks: Vec::new(),
            repeated: false,
            drill: None,
        };
        match self.hooks.run(transition, Phase::Pre, &facts).await {
            Ok(_) => {}
            Err(error) if request.ignore_hooks => tracing::warn!(group = %plan.group, "goes on without its hook: {error}"),
            Err(error) => return Err(RequestError::Hook(error)),
        }
        let begun = match self.primaries.read().await.begin_handback(&request.group, target) {
            Some(begun) => begun?,
            None => return Err(self.no_primary(&request.group).await),
        };
        let (node, group, number) = (self.clone(), request.group.clone(), begun.handback.number);
        tokio::spawn(async move {
            while let Ok(progress) = node.handback(&group).await {
                let HandbackStatus { running, point, number: now, .. } = progress.handback;
                if now != number || (!running && point.is_none()) {
                    return;
                }
                if !running {
                    node.hooks.begin(transition, Phase::Post, Facts { point, ..facts });
                    return;
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        });
        Ok(begun)
    }

    pub(crate) async fn handback(&self, group: &str) -> Result<HandbackProgress, RequestError> {
        match self.primaries.read().await.handback(group) {
            Some(progress) => progress,
            None => Err(self.no_primary(group).await),
        }
    }

    /// The primary takes no more writes and commits what it has; then the copy is activated from that point. When it cannot be, the primary
    /// takes writes again.
    pub(crate) async fn switchover(&self, request: &SwitchoverRequest) -> Result<FailoverDone, RequestError> {
        let copies = self.receiving()?;
        let plan = self.failover_plan(Transition::Switchover, &request.group, None).await?;
        let group = GroupRef { client: plan.client, group: plan.group };
        if let Some(active) = &plan.active {
            return Err(RequestError::AlreadyActive { group: group.to_string(), point: active.point });
        }
        // Before anything is drained: guests could write at neither site then.
        if let Some(error) = self.third_site(&group).await {
            return Err(error);
        }
        let within = request.within_ms.map_or(DRAIN_DEFAULT, Duration::from_millis);
        let point = copies.drain(&group, within).await?;
        tracing::warn!(%group, %point, "the primary takes no more writes, and all it took are here");
        reach(Step::SwitchoverDrained);
        let failover = FailoverRequest {
            group: group.to_string(),
            point: Some(point.to_string()),
            export: request.export.clone(),
            // It takes no more writes.
            force: true,
            ignore_hooks: request.ignore_hooks,
        };
        let done = self.failover_as(Transition::Switchover, &failover).await;
        if done.is_err() {
            copies.give_up_drain(&group).await?;
        }
        done
    }

    /// Withdraws the disks of groups whose primaries have them back, as long as the node runs.
    pub(crate) async fn follow_handbacks(self: Arc<Self>) {
        let Ok(copies) = self.receiving() else { return };
        let Some(mut handed) = copies.handed_back().await else { return };
        while handed.changed().await.is_ok() {
            for group in copies.status(&self.exports.offered().await, &[]).await {
                let selector = GroupRef { client: group.client, group: group.group }.to_string();
                let mut record = self.record.lock().await;
                if group.active.is_some() || record.get(&selector).is_none() {
                    continue;
                }
                self.exports.withdraw(&selector).await;
                if let Err(error) = record.set(&selector, None) {
                    tracing::error!(group = selector, "{error}");
                }
                tracing::info!(group = selector, "its primary has the disks back: they are not served here any more");
            }
            self.exports.prune().await;
        }
    }
}
