//! Random lives of a store: epochs, folds, thinning, resets, lost connections, full disks, failing syncs, kills and power losses in any order, one
//! after the other on the same disk. What the sweep does once at every change, this does again and again on what came of it.
//!
//! A failure names the seed that replays it.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::{EpochId, Point};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::primary::{GROUP, Primary, SIZES, Volumes, greet, messages, open, read_all, send, send_passes};
use super::sweep::folder;
use super::{Replica, SessionNo, SimDisk};

const LIVES: u64 = 150;
const STEPS: usize = 40;

struct Life {
    dir: tempfile::TempDir,
    disk: SimDisk,
    rng: SmallRng,
    primary: Primary,
    up: Option<(Replica, SessionNo)>,
    required: BTreeMap<Point, Volumes>,
    possible: Option<(Point, Volumes)>,
    /// Points that a fold may have given up.
    given_up: BTreeMap<Point, Volumes>,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    commits: usize,
    kills: usize,
    power_losses: usize,
    refused: usize,
    folds: usize,
    failed_folds: usize,
    thins: usize,
    failed_thins: usize,
}

impl Life {
    fn new(seed: u64) -> Self {
        let dir = folder();
        let (disk, rng) = (SimDisk::new(dir.path()), SmallRng::seed_from_u64(seed));
        let (required, counts) = (BTreeMap::new(), Counts::default());
        Self {
            dir,
            disk,
            rng,
            primary: Primary::new(seed),
            up: None,
            required,
            possible: None,
            given_up: BTreeMap::new(),
            counts,
        }
    }

    /// The process is gone; perhaps the power too.
    fn fall(&mut self) {
        self.up = None;
        if self.rng.random_bool(0.5) {
            self.counts.kills += 1;
            self.disk.restart();
        } else {
            self.counts.power_losses += 1;
            let rng = &mut self.rng;
            // Some crashes lose nearly everything, some nearly nothing.
            let bias = rng.random_range(0..3);
            let choose = |n: u32| if n == 4 && bias < 2 && rng.random_bool(0.7) { bias * 2 } else { rng.random_range(0..n) };
            self.disk.crash(choose).unwrap();
        }
        self.disk.set_room(None);
    }

    /// Starts and says hello, if it is not up; falls again if it was killed meanwhile.
    fn rise(&mut self) -> Result<(), String> {
        while self.up.is_none() {
            let replica = open(self.dir.path(), self.disk.disk());
            let Some(mut replica) = self.alive(replica) else { continue };
            if self.take(&replica)? {
                continue;
            }
            let greeted = greet(&mut replica, &self.primary);
            let Some((session, _)) = self.alive(greeted) else { continue };
            // A session begins after what could not be committed was cut off.
            self.possible = None;
            self.up = Some((replica, session));
        }
        Ok(())
    }

    /// The value, unless the process was killed or the disk was full or failed on the way: then it falls.
    fn alive<T, E>(&mut self, value: Result<T, E>) -> Option<T> {
        if self.disk.is_dead() || value.is_err() {
            self.counts.refused += usize::from(!self.disk.is_dead());
            self.fall();
            return None;
        }
        value.ok()
    }

    /// What the start found against what must be and may be; from here on it is promised. Whether it fell meanwhile.
    fn take(&mut self, replica: &Replica) -> Result<bool, String> {
        if let Some((_, Some(refused))) = replica.groups().first() {
            // Only a sync that was made to fail, or a kill, may keep a group from being opened.
            if refused.contains("failed to sync") || self.disk.is_dead() {
                self.fall();
                return Ok(true);
            }
            return Err(refused.clone());
        }
        let found = if replica.groups().is_empty() { BTreeMap::new() } else { read_all(replica).map_err(|e| e.to_string())? };
        for (point, volumes) in &self.required {
            if found.get(point) != Some(volumes) {
                return Err(format!("point {point} is gone or shows something else"));
            }
        }
        let given_up = std::mem::take(&mut self.given_up);
        let extra: Vec<_> = found.iter().filter(|(p, v)| !self.required.contains_key(p) && given_up.get(p) != Some(v)).collect();
        if !extra.is_empty() && !matches!((extra.as_slice(), &self.possible), ([(p, v)], Some((q, w))) if *p == q && *v == w) {
            return Err(format!("points that were never sealed: {:?}", extra.iter().map(|(p, _)| p).collect::<Vec<_>>()));
        }
        self.primary.committed = found.last_key_value().map_or(EpochId(0), |(p, _)| p.epoch);
        self.primary.now = found.last_key_value().map_or(SIZES.map(|bytes| vec![0; bytes]), |(_, v)| v.clone());
        self.required = found;
        Ok(false)
    }

    fn passes(&mut self) -> Vec<usize> {
        (0..self.rng.random_range(1..5)).map(|_| self.rng.random_range(1..4)).collect()
    }

    fn step(&mut self) -> Result<(), String> {
        self.rise()?;
        match self.rng.random_range(0..27) {
            23.. => self.thin(),
            20..23 => self.fold(),
            0..9 => self.epoch(),
            9..11 => self.unsealed(),
            11 => self.fall(),
            12..16 => self.disk.die_after(self.rng.random_range(1..25)),
            16 => self.disk.set_room(Some(self.rng.random_range(0..20_000))),
            17 => self.disk.fail_next_sync(),
            18 => {
                if let Some((replica, _)) = self.up.take() {
                    replica.stop();
                }
                if self.disk.is_dead() {
                    self.fall();
                }
            }
            _ => {
                let primary = self.primary.clone();
                if let Some((replica, session)) = &mut self.up {
                    replica.lost(*session);
                    let greeted = greet(replica, &primary);
                    if let Some((session, _)) = self.alive(greeted) {
                        self.up = self.up.take().map(|(replica, _)| (replica, session));
                    }
                }
            }
        }
        Ok(())
    }

    fn epoch(&mut self) {
        let passes = self.passes();
        let Some((mut replica, session)) = self.up.take() else { return };
        let epoch = self.primary.epoch(&passes);
        self.possible = Some((epoch.point, self.primary.now.clone()));
        let sent = send(&mut replica, session, &epoch);
        if self.alive(sent).is_none() {
            return;
        }
        self.counts.commits += 1;
        self.primary.committed = epoch.point.epoch;
        self.required.extend(self.possible.take());
        self.up = Some((replica, session));
    }

    /// Folds up to any point but the newest. One that fails goes on living, or falls.
    fn fold(&mut self) {
        let Some((mut replica, session)) = self.up.take() else { return };
        let older: Vec<Point> = self.required.keys().copied().collect();
        let Some(to) = older.get(..older.len().saturating_sub(1)).filter(|o| !o.is_empty()) else {
            self.up = Some((replica, session));
            return;
        };
        let to = to[self.rng.random_range(0..to.len())];
        let kept = self.required.split_off(&to);
        self.given_up.extend(std::mem::replace(&mut self.required, kept));
        match replica.fold(GROUP, to) {
            Err(_) if self.disk.is_dead() || self.rng.random_bool(0.5) => {
                self.counts.failed_folds += 1;
                return self.fall();
            }
            Err(_) => {
                self.counts.failed_folds += 1;
                self.disk.set_room(None);
            }
            Ok(()) => self.counts.folds += 1,
        }
        self.up = Some((replica, session));
    }

    /// Thins as far as it can be. What fails goes on living, or falls.
    fn thin(&mut self) {
        let Some((mut replica, session)) = self.up.take() else { return };
        // Longer and longer intervals: what was thinned is thinned again.
        let every = Duration::from_micros(3 << (10 * self.rng.random_range(0..3)));
        while let Some(plan) = replica.plan(GROUP, every).unwrap() {
            let dropped: Vec<_> = plan.drop.iter().filter_map(|point| self.required.remove_entry(point)).collect();
            match replica.thin(GROUP, &plan, |_| ()) {
                Ok(()) => self.counts.thins += 1,
                // Before the new segment has its name nothing has happened; after it the points are gone as soon as that is on the disk.
                Err(_) => {
                    self.counts.failed_thins += 1;
                    let listed = replica.points(GROUP).unwrap();
                    let gone = dropped.first().is_none_or(|(point, _)| !listed.contains(point));
                    if self.disk.is_dead() || gone || self.rng.random_bool(0.5) {
                        self.given_up.extend(dropped);
                        return self.fall();
                    }
                    self.required.extend(dropped);
                    self.disk.set_room(None);
                    break;
                }
            }
        }
        self.up = Some((replica, session));
    }

    fn unsealed(&mut self) {
        let passes = self.passes();
        let before = self.primary.now.clone();
        let mut epoch = self.primary.epoch(&passes);
        self.primary.now = before;
        if let (Some((replica, session)), Some(last)) = (&mut self.up, epoch.passes.pop()) {
            send_passes(replica, *session, &epoch, 2500);
            let stream = replica.pass_open(*session);
            replica.pass_data(*session, stream, &last[..last.len() / 2]);
            replica.pass_reset(*session, stream);
        }
        let said = self.up.as_mut().map_or(Vec::new(), |(replica, session)| messages(replica, *session));
        self.alive(if said.is_empty() { Ok(()) } else { Err(said) });
    }
}

/// Would catch what only shows after several mishaps in a row.
#[test]
fn random_lives_keep_every_answered_point() {
    let mut all = Counts::default();
    for seed in 0..LIVES {
        let mut life = Life::new(seed);
        for step in 0..STEPS {
            life.step().unwrap_or_else(|error| panic!("seed {seed}, step {step}: {error}"));
        }
        life.up = None;
        life.fall();
        life.rise().unwrap_or_else(|error| panic!("seed {seed}, at the end: {error}"));
        assert_eq!(life.up.as_ref().map(|(r, _)| r.points(GROUP).unwrap().len()), Some(life.required.len()));
        all.commits += life.counts.commits;
        all.kills += life.counts.kills;
        all.power_losses += life.counts.power_losses;
        all.refused += life.counts.refused;
        all.folds += life.counts.folds;
        all.failed_folds += life.counts.failed_folds;
        all.thins += life.counts.thins;
        all.failed_thins += life.counts.failed_thins;
    }
    eprintln!("{LIVES} lives: {all:?}");
    assert!(all.commits > 1000 && all.kills > 100 && all.power_losses > 100, "{all:?}");
    assert!(all.folds > 100 && all.failed_folds > 50, "{all:?}");
    assert!(all.thins > 100 && all.failed_thins > 20, "{all:?}");
}
