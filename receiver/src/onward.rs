//! A copy for who shows it onward: the image of its newest point, and what changed since the one before.
//!
//! What must always hold: the blocks that are said to have changed between two images are all in which they differ; they may be more. An
//! image stays what it is while somebody has it: its point is pinned.

use std::sync::Arc;

use blockdev::BlockDevice;
use parking_lot::Mutex;
use proto::fencing::GroupRole;
use proto::{DirtyMap, Generation, Name, Point};
use tokio::sync::watch;

use crate::group::stage::Stage;
use crate::group::{Group, GroupError, Shared};
use crate::journal::GroupId;
use crate::pins::Pinned;
use crate::view::views;

/// What a group notes for who shows it onward.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// Counts commits and handbacks.
    turns: watch::Sender<u64>,
    /// Blocks that commits changed since somebody asked last, by volume; `None`: nobody asks.
    changed: Mutex<Option<Vec<DirtyMap>>>,
}

impl Turns {
    /// An epoch is about to be committed; the state of the group is locked.
    pub(crate) fn commits(&self, stage: &Stage) {
        if let Some(changed) = self.changed.lock().as_mut() {
            stage.mark(changed);
        }
    }

    /// There is another newest point, or the copy is active no more.
    pub(crate) fn turned(&self) {
        self.turns.send_modify(|count| *count += 1);
    }
}

/// An image of a copy at one point.
pub struct Image {
    /// The point.
    pub point: Point,
    /// Its cut, microseconds since 1970 on the primary's clock.
    pub cut_unix_us: u64,
    /// Its disks, read-only.
    pub disks: Vec<(Name, Arc<dyn BlockDevice>)>,
    /// The blocks that changed since the newest image that was taken before, by volume.
    pub changed: Vec<DirtyMap>,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Image of {}", self.point)
    }
}

/// Where a copy stands.
#[derive(Clone, Copy, Debug)]
pub struct Stands {
    /// It is the running server.
    pub is_active: bool,
    /// Its newest point.
    pub newest: Option<Point>,
}

/// A copy, for the one who shows it onward; see the module. There is one for a group at most.
#[derive(Debug)]
pub struct Onward {
    group: Arc<Group>,
}

impl Drop for Onward {
    fn drop(&mut self) {
        *self.group.shared.onward.changed.lock() = None;
    }
}

fn nothing(shared: &Shared) -> Vec<DirtyMap> {
    shared.volumes.iter().map(|volume| DirtyMap::new(volume.size_bytes)).collect()
}

impl Onward {
    pub(crate) fn new(group: Arc<Group>) -> Self {
        *group.shared.onward.changed.lock() = Some(nothing(&group.shared));
        Self { group }
    }

    /// Identity of the group: another one of the same name has another history.
    #[must_use]
    pub fn group_id(&self) -> GroupId {
        self.group.shared.group_id
    }

    /// Its disks: name and bytes.
    #[must_use]
    pub fn volumes(&self) -> Vec<(Name, u64)> {
        self.group.shared.volumes.iter().map(|volume| (volume.name.clone(), volume.size_bytes)).collect()
    }

    /// Changes whenever there is another newest point, or the copy is active no more.
    #[must_use]
    pub fn turns(&self) -> watch::Receiver<u64> {
        self.group.shared.onward.turns.subscribe()
    }

    /// Where it stands now.
    #[must_use]
    pub fn stands(&self) -> Stands {
        let state = self.group.shared.state.read();
        Stands { is_active: state.role == GroupRole::Active, newest: state.points.last().map(|entry| entry.point) }
    }

    /// The newest image; `None` while there is no point.
    ///
    /// # Errors
    /// [`GroupError`] if its base cannot be opened.
    pub async fn newest(&self) -> Result<Option<Image>, GroupError> {
        self.blocking(|shared| {
            let (newest, index, changed) = {
                // No commit comes between the three.
                let state = shared.state.read();
                let Some(newest) = state.points.last().copied() else { return Ok(None) };
                let pinned = Pinned { index: state.index.clone(), _pin: Some(shared.pins.pin(newest.point)) };
                let changed = shared.onward.changed.lock().replace(nothing(shared));
                (newest, pinned, changed.unwrap_or_else(|| nothing(shared)))
            };
            Ok(Some(image(shared, index, newest.point, newest.cut_unix_us, changed)?))
        })
        .await
    }

    /// The image of a point; `None` if the point was given up.
    ///
    /// # Errors
    /// [`GroupError`].
    pub async fn at(&self, point: Point) -> Result<Option<Image>, GroupError> {
        self.blocking(move |shared| {
            let Some(index) = kept(shared.index_at(point))? else { return Ok(None) };
            let cut_unix_us = {
                let state = shared.state.read();
                let at = state.points.binary_search_by_key(&point, |entry| entry.point).ok();
                at.and_then(|at| state.points.get(at)).map_or(0, |entry| entry.cut_unix_us)
            };
            Ok(Some(image(shared, index, point, cut_unix_us, nothing(shared))?))
        })
        .await
    }

    /// The blocks in which two points may differ, by volume; `None` if one of them was given up.
    ///
    /// # Errors
    /// [`GroupError`].
    pub async fn differing(&self, a: Point, b: Point) -> Result<Option<Vec<DirtyMap>>, GroupError> {
        let (earlier, later) = (a.min(b), a.max(b));
        self.blocking(move |shared| {
            if earlier == later {
                return Ok(Some(nothing(shared)));
            }
            let Some(then) = kept(shared.index_at(earlier))? else { return Ok(None) };
            let Some(now) = kept(shared.index_at(later))? else { return Ok(None) };
            let volumes = (0..shared.volumes.len()).filter_map(|v| Some((now.index.volume(v)?, then.index.volume(v)?)));
            let is_folded = |frame| shared.frames.is_folded(frame);
            Ok(Some(volumes.map(|(now, then)| now.changed_since(then, is_folded)).collect()))
        })
        .await
    }

    /// The point that holds what the active copy of `generation` was at its end, when its primary had it back. `None` if there is none,
    /// or it was given up.
    #[must_use]
    pub fn given_back(&self, generation: Generation) -> Option<Point> {
        // A handback that broke between its two steps leaves one too; the last one counts.
        let state = self.group.shared.state.read();
        state.points.iter().rev().map(|entry| entry.point).find(|point| point.generation == generation)
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Shared>) -> Result<T, GroupError> + Send + 'static,
    ) -> Result<T, GroupError> {
        let shared = Arc::clone(&self.group.shared);
        let name = shared.folder.group.clone();
        let done = tokio::task::spawn_blocking(move || work(&shared)).await;
        done.unwrap_or(Err(GroupError::Closed { group: name }))
    }
}

fn kept(found: Result<Pinned, GroupError>) -> Result<Option<Pinned>, GroupError> {
    match found {
        Ok(index) => Ok(Some(index)),
        Err(GroupError::NoPoint { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn image(
    shared: &Arc<Shared>,
    index: Pinned,
    point: Point,
    cut_unix_us: u64,
    changed: Vec<DirtyMap>,
) -> Result<Image, GroupError> {
    let names = shared.volumes.iter().map(|volume| volume.name.clone());
    let disks = views(shared, index)?.into_iter().map(|view| Arc::new(view) as Arc<dyn BlockDevice>);
    Ok(Image { point, cut_unix_us, disks: names.zip(disks).collect(), changed })
}
