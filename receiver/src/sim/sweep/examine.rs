//! Opens a crash image with the real code and tells what is there; then makes it go on.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::time::Duration;

use proto::Point;
use proto::fencing::GroupRole;

use super::plans::{self, Effort};
use super::workload::{Standing, digest, folder};
use crate::disk::Disk;
use crate::sim::model::{Image, Model, write_image};
use crate::sim::primary::{GROUP, Primary, greet, open, read_all, read_at, send};
use crate::sim::{Replica, SimDisk};

/// What a store holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    Group(FoundGroup),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FoundGroup {
    pub(super) points: BTreeMap<Point, u64>,
    pub(super) standing: Standing,
    /// The folder of the fork in use is there.
    pub(super) forked: bool,
}

/// Reads everything that a replica shows.
pub(super) fn look(root: &Path, replica: &Replica) -> Result<Found, String> {
    match replica.groups().as_slice() {
        [] => Ok(Found::Nothing),
        [(name, None)] if name == GROUP => {
            let points = read_all(replica).map_err(|e| e.to_string())?;
            let points = points.iter().map(|(point, volumes)| (*point, digest(volumes))).collect();
            let standing = replica.generation(GROUP).map_err(|e| e.to_string())?;
            let forked = root.join("store/a/db/forks").join(format!("active-{}", standing.0)).exists();
            Ok(Found::Group(FoundGroup { points, standing, forked }))
        }
        other => Err(format!("refused: {other:?}")),
    }
}

type Permits<'a> = &'a dyn Fn(&Found) -> Result<(), String>;

/// Opens images, each different one once.
pub(super) struct Examiner {
    dir: tempfile::TempDir,
    /// What was found, and what is found if recovery itself is cut short or its result crashes.
    known: HashMap<u64, Vec<Found>>,
    /// Whether recovery is crashed as well.
    again: bool,
    pub(super) opened: usize,
    pub(super) crashed_again: usize,
}

impl Examiner {
    pub(super) fn new(again: bool) -> Self {
        Self { dir: folder(), known: HashMap::new(), again, opened: 0, crashed_again: 0 }
    }

    /// Everything that can be found from this image on must be permitted.
    pub(super) fn examine(&mut self, image: &Image, permits: Permits<'_>) -> Result<(), String> {
        let mut hasher = DefaultHasher::new();
        image.hash(&mut hasher);
        let hash = hasher.finish();
        if !self.known.contains_key(&hash) {
            let found = self.open(image)?;
            self.known.insert(hash, found);
        }
        self.known[&hash].iter().try_for_each(permits)
    }

    fn open(&mut self, image: &Image) -> Result<Vec<Found>, String> {
        self.opened += 1;
        write_image(self.dir.path(), image).unwrap();
        let disk = SimDisk::traced_from(self.dir.path(), image);
        let replica = open(self.dir.path(), disk.disk()).map_err(|e| e.to_string())?;
        let found = look(self.dir.path(), &replica)?;
        let trace = disk.trace();
        go_on(self.dir.path(), replica, &found)?;
        let mut all = vec![found.clone()];
        if !self.again || trace.is_empty() {
            return Ok(all);
        }
        let mut model = Model::of(image);
        for (done, change) in trace.iter().enumerate() {
            model.apply(change);
            let units = model.units();
            for plan in plans::plans(&units, Effort::Quick, 0).0 {
                self.crashed_again += 1;
                write_image(self.dir.path(), &model.image(&mut |at| plans::fate(&units, &plan, at))).unwrap();
                let replica = open(self.dir.path(), Disk::default()).map_err(|e| e.to_string())?;
                let again = look(self.dir.path(), &replica)
                    .map_err(|e| format!("crashed in recovery after {change:?}, {plan:?}: {e}"))?;
                if done + 1 == trace.len() && again != found {
                    return Err(format!("recovery said {found:?}, and after a crash {again:?}"));
                }
                if !all.contains(&again) {
                    all.push(again);
                }
            }
        }
        Ok(all)
    }
}

/// What was reopened is of use: it takes an epoch, or the promotion again, and the next start knows it.
fn go_on(root: &Path, mut replica: Replica, found: &Found) -> Result<(), String> {
    let mut primary = Primary::new(99);
    // A fold that was stopped is done again, and nobody sees anything of it.
    if let (Found::Group(_), Ok(Some(point))) = (found, replica.folding(GROUP)) {
        replica.fold(GROUP, point).map_err(|e| format!("folding again: {e}"))?;
        let after = look(root, &replica)?;
        if after != *found {
            return Err(format!("before folding again {found:?}, after it {after:?}"));
        }
    }
    // What can be thinned is thinned, and what is left shows what it showed.
    let thinned = thin_on(root, &mut replica, found)?;
    let found = &thinned;
    let standing = match found {
        Found::Group(found) => {
            primary.generation = found.standing.0;
            if let Some(newest) = found.points.last_key_value().map(|(p, _)| *p) {
                primary.committed = newest.epoch;
                primary.now = read_at(&replica, newest).map_err(|e| e.to_string())?;
            }
            Some(found.standing)
        }
        Found::Nothing => None,
    };
    if let Some((generation, GroupRole::Active, Some(fork))) = standing {
        let promoted = replica.activate(GROUP, Some(fork)).map_err(|e| e.to_string())?;
        return if promoted == (generation, fork) { Ok(()) } else { Err("the promotion answers something else".to_owned()) };
    }
    let (session, committed) = greet(&mut replica, &primary)?;
    if committed.map(|p| p.epoch).unwrap_or(proto::EpochId(0)) != primary.committed {
        return Err(format!("the session begins at {committed:?}"));
    }
    let epoch = primary.epoch(&[2, 1]);
    send(&mut replica, session, &epoch)?;
    drop(replica);
    let replica = open(root, Disk::default()).map_err(|e| e.to_string())?;
    let after = read_all(&replica).map_err(|e| e.to_string())?;
    let before = if let Found::Group(found) = found { found.points.len() } else { 0 };
    if after.len() != before + 1 || after.get(&epoch.point) != Some(&primary.now) {
        return Err("the next epoch is not there as it was sent".to_owned());
    }
    Ok(())
}

/// Leaves out every point that can be. What is found from then on.
fn thin_on(root: &Path, replica: &mut Replica, found: &Found) -> Result<Found, String> {
    let Found::Group(group) = found else { return Ok(Found::Nothing) };
    let mut group = group.clone();
    while let Some(plan) = replica.plan(GROUP, Duration::from_secs(1 << 30)).map_err(|e| e.to_string())? {
        replica.thin(GROUP, &plan, |_| ()).map_err(|e| format!("thinning: {e}"))?;
        group.points.retain(|point, _| !plan.drop.contains(point));
        let after = look(root, replica)?;
        if after != Found::Group(group.clone()) {
            return Err(format!("thinned to {group:?}, and there is {after:?}"));
        }
    }
    Ok(Found::Group(group))
}
