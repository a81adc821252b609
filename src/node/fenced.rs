//! Notices that a group of this node is fenced, and runs its hook: once for each time that this run of the node learns it.
//!
//! Looks at the status, as a person would; the session that is told knows nothing of hooks.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use proto::Name;
use replicator::{GroupStatus, LinkState};

use super::Node;
use crate::api::PrimaryStatus;
use crate::hooks::Facts;

/// How often it is looked at: nothing is held up by it.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Watches for ever.
pub(crate) async fn watch(node: Arc<Node>) {
    let mut fenced: BTreeSet<Name> = BTreeSet::new();
    loop {
        for status in node.primaries.read().await.status() {
            let PrimaryStatus::Running(status) = status else { continue };
            // While the disks are given back or rolled back, nobody has to be told that they may not be written.
            if status.state != LinkState::Fenced || status.handback.is_some() {
                fenced.remove(&status.group);
            } else if fenced.insert(status.group.clone()) {
                node.hooks.fenced(facts(&status));
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn facts(status: &GroupStatus) -> Facts {
    Facts {
        client: None,
        group: status.group.clone(),
        point: status.committed,
        generation: status.generation,
        export: None,
        disks: status.volumes.iter().map(|v| (v.name.clone(), v.size_bytes, None)).collect(),
        repeated: false,
        drill: None,
    }
}
