//! Adopting images: one of a group at a time, in the background, until it is done or the node stops.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proto::Name;
use receiver::adopt::{AdoptProgress, Adoption};
use tokio::task::JoinSet;

use super::copies::GroupRef;
use super::{Node, RequestError};
use crate::api::{AdoptRequest, AdoptStatus};

/// Most time that an orderly stop waits for an image to be removed.
const STOPPED_WITHIN: Duration = Duration::from_secs(10);

/// Why images are not adopted. One line each.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AdoptRefused {
    #[error("group {group} is being adopted already: see twinsite adopt {group} --watch")]
    Running { group: String },
    #[error("the node is stopping: start it again first")]
    Stopping,
    #[error("no image was adopted for group '{given}' since this node was started")]
    Never { given: String },
    #[error("'{given}' is no group of a client here: write CLIENT/GROUP, with one of {}", known.join(", "))]
    Client { given: String, known: Vec<String> },
    #[error(
        "client '{client}' may not send a group '{group}': add it to groups in its [[receiver.client]], and restart the node"
    )]
    NotAllowed { client: Name, group: Name },
    #[error("name each disk once, with its image: --disk D --from FILE, in the order of the primary's configuration")]
    Disks,
    #[error("{0}: write an absolute path")]
    Relative(String),
}

struct Entry {
    group: GroupRef,
    progress: Arc<AdoptProgress>,
    began: Instant,
    /// How long it took, and why it failed.
    ended: Option<(u64, Option<String>)>,
}

/// What was adopted since the start.
#[derive(Default)]
pub(crate) struct Adoptions(Mutex<State>);

#[derive(Default)]
struct State {
    /// By `client/group`.
    all: BTreeMap<String, Entry>,
    tasks: JoinSet<()>,
    /// The node stops: none begins any more.
    stopping: bool,
}

impl Adoptions {
    /// Tells all that run to stop, and lets no further one begin.
    pub(crate) fn stop(&self) {
        let mut state = self.0.lock();
        state.stopping = true;
        state.all.values().for_each(|entry| entry.progress.stop.store(true, Ordering::Relaxed));
    }

    /// After [`Self::stop`]: waits until nothing is left of them, but no longer than a stop may be held up for that.
    pub(crate) async fn stopped(&self) {
        let mut tasks = std::mem::take(&mut self.0.lock().tasks);
        let all = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(STOPPED_WITHIN, all).await.is_err() {
            tracing::warn!("an image that was being adopted is not removed yet; the next start does it");
        }
    }
}

fn elapsed_ms(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

impl Entry {
    fn status(&self) -> AdoptStatus {
        let (elapsed_ms, error) = self.ended.clone().unwrap_or_else(|| (elapsed_ms(self.began), None));
        AdoptStatus {
            client: self.group.client.clone(),
            group: self.group.group.clone(),
            running: self.ended.is_none(),
            error,
            done_bytes: self.progress.done_bytes.load(Ordering::Relaxed),
            total_bytes: self.progress.total_bytes.load(Ordering::Relaxed),
            elapsed_ms,
        }
    }
}

impl Node {
    /// Begins to copy images; answers at once.
    pub(crate) async fn adopt(self: &Arc<Self>, request: &AdoptRequest) -> Result<AdoptStatus, RequestError> {
        let copies = self.receiving()?;
        let (group, owner) = copies.expected(&request.group)?;
        let mut names: Vec<&Name> = request.disks.iter().map(|d| &d.disk).collect();
        names.sort();
        names.dedup();
        if names.is_empty() || names.len() != request.disks.len() || names.len() > proto::units::GROUP_VOLUMES_MAX {
            return Err(AdoptRefused::Disks.into());
        }
        if let Some(relative) = request.disks.iter().find(|d| !d.from.is_absolute()) {
            return Err(AdoptRefused::Relative(relative.from.display().to_string()).into());
        }
        let selector = group.to_string();
        let progress = Arc::new(AdoptProgress::default());
        let adoption = Adoption {
            client: group.client.clone(),
            owner,
            group: group.group.clone(),
            images: request.disks.iter().map(|d| (d.disk.clone(), d.from.clone())).collect(),
        };
        {
            let state = &mut *self.adoptions.0.lock();
            if state.stopping {
                return Err(AdoptRefused::Stopping.into());
            }
            if state.all.get(&selector).is_some_and(|entry| entry.ended.is_none()) {
                return Err(AdoptRefused::Running { group: selector }.into());
            }
            let entry = Entry { group, progress: Arc::clone(&progress), began: Instant::now(), ended: None };
            state.all.insert(selector.clone(), entry);
            while state.tasks.try_join_next().is_some() {}
            state.tasks.spawn(Arc::clone(self).adopting(selector.clone(), adoption, progress));
        }
        self.adoption(&selector)
    }

    async fn adopting(self: Arc<Self>, name: String, adoption: Adoption, progress: Arc<AdoptProgress>) {
        let done = match self.receiving() {
            Ok(copies) => copies.adopt(adoption, progress).await,
            Err(error) => Err(error),
        };
        match &done {
            Ok(()) => tracing::info!(group = name, "image adopted; its primary may connect"),
            Err(error) => tracing::error!(group = name, "image not adopted: {error}"),
        }
        if let Some(entry) = self.adoptions.0.lock().all.get_mut(&name) {
            entry.ended = Some((elapsed_ms(entry.began), done.err().map(|error| error.to_string())));
        }
    }

    /// How far it is, or how the last one ended.
    pub(crate) fn adoption(&self, given: &str) -> Result<AdoptStatus, RequestError> {
        let state = self.adoptions.0.lock();
        let named = |entry: &&Entry| entry.group.group.as_str() == given || entry.group.to_string() == given;
        let found = state.all.values().filter(named).max_by_key(|entry| entry.began);
        Ok(found.map(Entry::status).ok_or_else(|| AdoptRefused::Never { given: given.to_owned() })?)
    }
}
