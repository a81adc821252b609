//! The life that is swept, and the oracle that goes with it.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use proto::fencing::GroupRole;
use proto::{EpochId, Generation, Point};

use super::examine::{Found, FoundGroup};
use crate::sim::primary::{EpochBytes, GROUP, Primary, Volumes, greet, open, rest_of, send, send_passes, welcome};
use crate::sim::{Replica, SessionNo, SimDisk};

/// Generation, role, point of the fork.
pub(super) type Standing = (Generation, GroupRole, Option<Point>);

/// Stands for what all volumes hold.
pub(super) fn digest(volumes: &Volumes) -> u64 {
    let mut hasher = DefaultHasher::new();
    volumes.hash(&mut hasher);
    hasher.finish()
}

/// What may be found after a crash.
#[derive(Clone, Debug, Default)]
pub(super) struct Expect {
    /// The group's creation was answered.
    created: bool,
    /// Points that were acknowledged, with what they show.
    required: BTreeMap<Point, u64>,
    /// The point whose seal may have been written.
    possible: Option<(Point, u64)>,
    /// Points that a fold may have given up, or thinning left out: gone, or as they were.
    given_up: BTreeMap<Point, u64>,
    standings: Vec<Standing>,
    /// The fork was handed out.
    forked: bool,
}

impl Expect {
    pub(super) fn permits(&self, found: &Found) -> Result<(), String> {
        let Found::Group(FoundGroup { points, standing, forked }) = found else {
            return if self.created { Err("the group is gone".to_owned()) } else { Ok(()) };
        };
        let mut left = points.clone();
        for (point, digest) in &self.required {
            match left.remove(point) {
                Some(found) if found == *digest => {}
                Some(_) => return Err(format!("point {point} shows something else")),
                None => return Err(format!("the acknowledged point {point} is gone")),
            }
        }
        for (point, digest) in &self.given_up {
            if left.remove(point).is_some_and(|found| found != *digest) {
                return Err(format!("point {point}, which is being folded, shows something else"));
            }
        }
        if let Some((point, digest)) = left.pop_first()
            && (self.possible != Some((point, digest)) || !left.is_empty())
        {
            return Err(format!("point {point} was never sealed like that"));
        }
        if !self.standings.contains(standing) {
            return Err(format!("{standing:?} is none of {:?}", self.standings));
        }
        if self.forked && !forked {
            return Err("the fork is gone".to_owned());
        }
        Ok(())
    }
}

/// The process was killed by the disk.
#[derive(Debug)]
struct Dead;

/// What is swept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// Creation, epochs, resets, folds, a promotion.
    Folding,
    /// Small epochs, thinned once and again, with folds in between.
    Thinning,
}

/// A life in progress.
pub(super) struct Run {
    pub(super) disk: SimDisk,
    /// What may be found from a number of changes on.
    pub(super) expects: Vec<(u64, Expect)>,
    /// Changes at which the process that was started after the kill had opened the store.
    pub(super) restarted: u64,
    expect: Expect,
    replica: Option<Replica>,
    primary: Primary,
    dir: tempfile::TempDir,
}

/// A folder in memory, if there is such a place.
pub(in crate::sim) fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

impl Run {
    fn new() -> Self {
        let dir = folder();
        let disk = SimDisk::traced(dir.path());
        let expect = Expect { standings: vec![(Generation(1), GroupRole::Replica, None)], ..Expect::default() };
        let expects = vec![(0, expect.clone())];
        Self { disk, expects, restarted: 0, expect, replica: None, primary: Primary::new(7), dir }
    }

    /// A whole life.
    pub(super) fn whole(life: Life) -> Self {
        let mut run = Self::new();
        run.lives(life).unwrap();
        run
    }

    fn lives(&mut self, life: Life) -> Result<(), Dead> {
        match life {
            Life::Folding => self.live(),
            Life::Thinning => self.live_thinned(),
        }
    }

    /// A life up to a kill after so many changes, the restart, and a little of the life after it. `None` if it was over.
    pub(super) fn killed_after(life: Life, changes: u64) -> Option<Self> {
        let mut run = Self::new();
        run.disk.die_after(changes);
        run.lives(life).err()?;
        run.replica = None;
        run.disk.restart();
        let replica = open(run.dir.path(), run.disk.disk()).unwrap();
        let found = super::examine::look(run.dir.path(), &replica).unwrap();
        run.expects.last().unwrap().1.permits(&found).unwrap_or_else(|error| panic!("killed after {changes}: {error}"));
        // From here on it is promised.
        run.primary = Primary::new(changes);
        if let Found::Group(FoundGroup { points, standing, .. }) = found {
            run.expect = Expect { created: true, required: points, standings: vec![standing], ..Expect::default() };
            if let Some(newest) = run.expect.required.last_key_value().map(|(p, _)| *p) {
                run.primary.committed = newest.epoch;
                run.primary.now = crate::sim::primary::read_at(&replica, newest).unwrap();
            }
        } else {
            run.expect = Expect { standings: vec![(Generation(1), GroupRole::Replica, None)], ..Expect::default() };
        }
        run.replica = Some(replica);
        run.restarted = run.disk.changes();
        run.mark();
        if let Ok(Some(point)) = run.replica().folding(GROUP) {
            run.fold(point.epoch.0).unwrap();
        }
        if life == Life::Thinning && run.expect.created {
            run.thin(Duration::from_secs(1 << 20)).unwrap();
        }
        if run.expect.standings[0].1 == GroupRole::Replica {
            let session = run.greet().unwrap();
            run.epoch(session, &[2]).unwrap();
        } else {
            run.activate(run.expect.standings[0].2).unwrap();
        }
        run.replica = None;
        Some(run)
    }

    fn mark(&mut self) {
        self.expects.push((self.disk.changes(), self.expect.clone()));
    }

    fn alive(&self) -> Result<(), Dead> {
        if self.disk.is_dead() { Err(Dead) } else { Ok(()) }
    }

    fn open(&mut self) -> Result<(), Dead> {
        self.replica = None;
        let opened = open(self.dir.path(), self.disk.disk());
        self.alive()?;
        let replica = opened.unwrap();
        if self.expect.created {
            let found = super::examine::look(self.dir.path(), &replica).unwrap();
            self.expect.permits(&found).unwrap();
            // What it says it holds is promised.
            if let (Found::Group(found), Some((point, digest))) = (found, self.expect.possible.take())
                && found.points.contains_key(&point)
            {
                self.expect.required.insert(point, digest);
            }
        }
        self.replica = Some(replica);
        self.mark();
        Ok(())
    }

    fn replica(&mut self) -> &mut Replica {
        self.replica.as_mut().unwrap()
    }

    fn greet(&mut self) -> Result<SessionNo, Dead> {
        let primary = self.primary.clone();
        let greeted = greet(self.replica(), &primary);
        self.alive()?;
        let (session, committed) = greeted.unwrap();
        assert_eq!(committed, self.expect.required.last_key_value().map(|(p, _)| *p));
        self.expect.created = true;
        self.mark();
        Ok(session)
    }

    fn epoch(&mut self, session: SessionNo, passes: &[usize]) -> Result<(), Dead> {
        let epoch = self.primary.epoch(passes);
        self.sends(session, &epoch)
    }

    fn sends(&mut self, session: SessionNo, epoch: &EpochBytes) -> Result<(), Dead> {
        let digest = digest(&self.primary.now);
        self.expect.possible = Some((epoch.point, digest));
        self.mark();
        let sent = send(self.replica(), session, epoch);
        self.alive()?;
        sent.unwrap();
        self.primary.committed = epoch.point.epoch;
        self.expect.possible = None;
        self.expect.required.insert(epoch.point, digest);
        self.mark();
        Ok(())
    }

    /// Sends an epoch whose connection is lost in its last pass; the next one goes on behind what has arrived.
    fn resumed(&mut self, session: SessionNo, passes: &[usize]) -> Result<SessionNo, Dead> {
        let epoch = self.primary.epoch(passes);
        let (last, whole) = epoch.passes.split_last().unwrap();
        for pass in whole {
            let stream = self.replica().pass_open(session);
            self.replica().pass_data(session, stream, pass);
            self.replica().pass_end(session, stream);
        }
        let stream = self.replica().pass_open(session);
        self.replica().pass_data(session, stream, &last[..last.len() * 2 / 3]);
        self.replica().lost(session);
        self.alive()?;
        let primary = self.primary.clone();
        let welcomed = welcome(self.replica(), &primary);
        self.alive()?;
        let (session, _, staged) = welcomed.unwrap();
        let staged = staged.expect("what has arrived is there");
        let all: usize = passes.iter().sum();
        assert!(staged.frames > 0 && (staged.frames as usize) < all, "{staged:?} of {all}");
        self.sends(session, &rest_of(&epoch, staged.frames))?;
        Ok(session)
    }

    /// Sends passes of an epoch that is never sealed.
    fn unsealed(&mut self, session: SessionNo, passes: &[usize]) -> Result<(), Dead> {
        let before = self.primary.now.clone();
        let mut epoch = self.primary.epoch(passes);
        self.primary.now = before;
        let last = epoch.passes.pop().unwrap();
        send_passes(self.replica(), session, &epoch, 5000);
        let stream = self.replica().pass_open(session);
        self.replica().pass_data(session, stream, &last[..last.len() / 2]);
        self.replica().pass_reset(session, stream);
        self.alive()
    }

    /// Folds up to an epoch.
    fn fold(&mut self, epoch: u64) -> Result<(), Dead> {
        let point = Point { generation: Generation(1), epoch: EpochId(epoch) };
        let kept = self.expect.required.split_off(&point);
        self.expect.given_up = std::mem::replace(&mut self.expect.required, kept);
        self.mark();
        let folded = self.replica().fold(GROUP, point);
        self.alive()?;
        folded.unwrap();
        self.expect.given_up.clear();
        let found = super::examine::look(self.dir.path(), self.replica.as_ref().unwrap()).unwrap();
        self.expect.permits(&found).unwrap();
        self.mark();
        Ok(())
    }

    /// Leaves one point of each interval, as far as segments can be rewritten. Returns how many points are gone.
    fn thin(&mut self, every: Duration) -> Result<usize, Dead> {
        let mut gone = 0;
        while let Some(plan) = self.replica().plan(GROUP, every).unwrap() {
            for point in &plan.drop {
                self.expect.given_up.extend(self.expect.required.remove_entry(point));
            }
            self.mark();
            let thinned = self.replica().thin(GROUP, &plan, |_| ());
            self.alive()?;
            thinned.unwrap();
            gone += plan.drop.len();
            self.expect.given_up.clear();
            let found = super::examine::look(self.dir.path(), self.replica.as_ref().unwrap()).unwrap();
            self.expect.permits(&found).unwrap();
            self.mark();
        }
        Ok(gone)
    }

    fn stop(&mut self) -> Result<(), Dead> {
        self.replica.take().unwrap().stop();
        self.alive()
    }

    fn activate(&mut self, point: Option<Point>) -> Result<(), Dead> {
        let newest = *self.expect.required.last_key_value().unwrap().0;
        let after = (Generation(2), GroupRole::Active, Some(point.unwrap_or(newest)));
        self.expect.standings.push(after);
        self.mark();
        let promoted = self.replica().activate(GROUP, point);
        self.alive()?;
        assert_eq!(promoted.unwrap(), (after.0, after.2.unwrap()));
        self.expect.standings = vec![after];
        self.expect.forked = true;
        self.mark();
        Ok(())
    }

    /// Creation, epochs in one and in several segments, resets within one and across several, a lost connection and its
    /// successor, folds, one of them while an epoch arrives, kills, clean stops, a promotion, the life after it.
    fn live(&mut self) -> Result<(), Dead> {
        self.open()?;
        let session = self.greet()?;
        self.epoch(session, &[3])?;
        // What is cut off is longer than what comes next.
        self.unsealed(session, &[3, 1])?;
        self.epoch(session, &[1])?;
        self.epoch(session, &[1, 2, 1])?;
        self.unsealed(session, &[4, 4, 4, 3])?;
        self.epoch(session, &[4, 4, 2])?;
        self.fold(2)?;
        // The connection is lost in the middle of an epoch; another session goes on.
        let before = self.primary.now.clone();
        let lost = self.primary.epoch(&[4, 4, 4]);
        self.primary.now = before;
        send_passes(self.replica(), session, &lost, 2000);
        self.replica().lost(session);
        self.alive()?;
        let session = self.greet()?;
        self.epoch(session, &[2, 1])?;
        let session = self.resumed(session, &[2, 3])?;
        self.epoch(session, &[1])?;
        self.stop()?;
        self.open()?;
        let session = self.greet()?;
        self.epoch(session, &[5])?;
        self.fold(4)?;
        // Killed in the middle of an epoch that spans segments.
        let before = self.primary.now.clone();
        let killed = self.primary.epoch(&[4, 4, 4]);
        self.primary.now = before;
        send_passes(self.replica(), session, &killed, 4096);
        self.alive()?;
        self.fold(5)?;
        self.open()?;
        let session = self.greet()?;
        self.epoch(session, &[1, 1])?;
        self.activate(Some(Point { generation: Generation(1), epoch: EpochId(6) }))?;
        self.open()?;
        self.activate(Some(Point { generation: Generation(1), epoch: EpochId(6) }))?;
        let past_the_fork = self.replica().fold(GROUP, Point { generation: Generation(1), epoch: EpochId(7) });
        self.alive()?;
        assert!(past_the_fork.unwrap_err().to_string().contains("the active fork needs an earlier one"));
        self.fold(6)?;
        self.stop()?;
        self.open()
    }

    fn epochs(&mut self, session: SessionNo, passes: &[usize]) -> Result<(), Dead> {
        passes.iter().try_for_each(|frames| self.epoch(session, &[*frames]))
    }

    /// Small epochs, so that segments end between them; thinned, a start, thinned again with what is new, while an epoch arrives, folded in
    /// between, and at the end a promotion.
    fn live_thinned(&mut self) -> Result<(), Dead> {
        self.open()?;
        let session = self.greet()?;
        self.epochs(session, &[1, 2, 1, 1, 2, 1, 2, 1, 1, 2])?;
        let few = self.thin(Duration::from_micros(3))?;
        self.epochs(session, &[1, 1, 2, 1])?;
        let older = *self.expect.required.keys().nth(1).unwrap();
        self.fold(older.epoch.0)?;
        self.stop()?;
        self.open()?;
        let session = self.greet()?;
        self.epochs(session, &[1, 2, 1])?;
        let more = self.thin(Duration::from_secs(1))?;
        self.epochs(session, &[1, 1, 2, 1, 1, 2, 1])?;
        let before = self.primary.now.clone();
        let killed = self.primary.epoch(&[3, 3]);
        self.primary.now = before;
        send_passes(self.replica(), session, &killed, 4096);
        self.alive()?;
        let most = self.thin(Duration::from_secs(1 << 20))?;
        assert!(few > 1 && more > 1 && most > 0, "{few}, {more}, {most} points were left out");
        self.open()?;
        let session = self.greet()?;
        self.epochs(session, &[2, 2])?;
        let older = *self.expect.required.keys().nth(1).unwrap();
        self.fold(older.epoch.0)?;
        self.activate(None)?;
        self.open()
    }
}
