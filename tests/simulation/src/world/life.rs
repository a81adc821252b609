//! The whole life of a protected server: promotions, writes at both sides, switchovers, disks that are given back or rolled back, again and
//! again in one run, under the same faults as everything else.
//!
//! What must always hold besides what `check` says:
//! - never do both sites acknowledge changes of guests in one generation, and no guest is let in whose disks are not its own;
//! - what the old primary had written of its own is in a fork that is kept, or on its disk, block by block;
//! - disks that were given back are what the active copy held when its guests were held up; a rollback gives exactly its point;
//! - while a copy is active nothing is committed but what its primary asked for;
//! - a handback moves 1.1 times what differs at most, if nothing fails meanwhile;
//! - it can be repeated to its end (`settle`).

use std::collections::{BTreeMap, BTreeSet};

use proto::fencing::GroupRole;
use proto::{BLOCK_BYTES, Generation, Point, SessionToken};
use rand::Rng;
use rand::seq::IndexedRandom;

use super::World;
use crate::active::Active;
use crate::check::Images;
use crate::disk::set_tag;
use crate::plan::GROUP;
use crate::primary::HandbackEnd;
use crate::recovery::{Replica, ReplicaError, SessionNo};

/// One step in so many something of this is begun.
const STEPS_AN_EVENT: u32 = 120;
/// The same, once the faults have ended.
const STEPS_AN_EVENT_AT_THE_END: u32 = 20;
/// A switchover that is not done in so many steps is given up.
const STEPS_TO_DRAIN: usize = 3000;
/// A handback may move so much for each 100 bytes that differ.
const MOVED_PERCENT_MAX: u64 = 110;

type Blocks = BTreeMap<(usize, u64), Vec<u8>>;

/// What is measured of a handback that began.
struct Moves {
    /// What failed until then.
    failed: usize,
    /// What the guest of the active copy had begun until then.
    changes: u64,
    began: Images,
}

/// See the module.
#[derive(Default)]
pub(super) struct Life {
    /// Whether this run has it.
    pub(super) lives: bool,
    pub(super) active: Option<Active>,
    /// The point that was asked for, if one was, by session.
    asked: BTreeMap<SessionNo, Option<Point>>,
    target: Option<Point>,
    /// Handbacks that came as far as their seal.
    sealed: BTreeSet<[u8; 16]>,
    /// Since that step all writes are to be committed for a switchover.
    drains: Option<usize>,
    /// What the primary's disks held when it lost power while it drained: what its guests did not flush may be gone from them, not from the copy.
    drained: Option<Images>,
    /// What only the old primary has.
    own: Option<Blocks>,
    /// It is to be kept by now.
    own_is_due: bool,
    moves: Option<Moves>,
    /// The receiver's disk was full at some time.
    was_full: bool,
    /// What the guest of the copy that was given back last had changed.
    given_blocks: Option<BTreeSet<(usize, u64)>>,
    wrote_here: BTreeSet<Generation>,
    wrote_there: BTreeSet<Generation>,
}

impl Life {
    pub(super) fn new(lives: bool) -> Self {
        Self { lives, ..Self::default() }
    }

    pub(super) fn connected(&mut self, session: SessionNo, hands_back: bool) {
        self.asked.remove(&session);
        if hands_back {
            self.asked.insert(session, self.target);
        }
    }
}

/// Blocks of `ours` that differ from `theirs`.
fn differing(ours: &Images, theirs: &Images) -> Blocks {
    let mut blocks = Blocks::new();
    for (volume, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
        let pairs = ours.chunks(BLOCK_BYTES as usize).zip(theirs.chunks(BLOCK_BYTES as usize)).enumerate();
        blocks.extend(pairs.filter(|(_, (a, b))| a != b).map(|(n, (ours, _))| ((volume, n as u64), ours.to_vec())));
    }
    blocks
}

impl World {
    fn failed(&self) -> usize {
        let o = &self.outcome;
        o.crashes + o.broken + o.disk_faults + o.flips
    }

    fn images(&self) -> Images {
        self.volumes.iter().map(|volume| volume.snapshot()).collect()
    }

    fn role(&self) -> Option<GroupRole> {
        self.replica.as_ref().and_then(|replica| replica.generation(GROUP).ok()).map(|(_, role, _)| role)
    }

    /// One step of it. `begins`: failovers, switchovers and rollbacks; else only what brings the group home.
    pub(super) fn live(&mut self, begins: bool) -> Result<(), String> {
        self.life.was_full |= self.full;
        if self.rng.random_bool(0.3) {
            self.poll_active(begins)?;
        }
        if self.rng.random_bool(0.4) {
            self.work()?;
        }
        if self.life.drains.is_some() {
            self.drained()?;
        }
        self.check_kept()?;
        let odds = if begins { STEPS_AN_EVENT } else { STEPS_AN_EVENT_AT_THE_END };
        if self.rng.random_ratio(1, odds) { self.event(begins) } else { Ok(()) }
    }

    fn event(&mut self, begins: bool) -> Result<(), String> {
        let role = self.role();
        let Some(primary) = &self.primary else { return Ok(()) };
        let is_free = !primary.hands_back();
        match role {
            Some(GroupRole::Active) if is_free && (primary.is_fenced() || primary.is_in_between()) => self.hand_back(None),
            Some(GroupRole::Replica) if is_free && primary.is_in_between() => self.hand_back(self.life.target),
            Some(GroupRole::Replica) if begins => match self.rng.random_range(0..8) {
                0 => self.failover(),
                1 => self.switchover(),
                2 | 3 if is_free && primary.follows() => {
                    let points = self.replica.as_ref().and_then(|r| r.points(GROUP).ok()).unwrap_or_default();
                    let to = points.choose(&mut self.rng).copied();
                    if to.is_some() { self.hand_back(to) } else { Ok(()) }
                }
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// A part of what takes a receiver time.
    fn work(&mut self) -> Result<(), String> {
        let sessions = self.link.iter().chain(&self.ghost).map(|link| link.session).collect::<Vec<_>>();
        let (Some(replica), Some(session)) = (&mut self.replica, sessions.choose(&mut self.rng)) else { return Ok(()) };
        replica.work(*session);
        self.take_answers()
    }

    fn poll_active(&mut self, begins: bool) -> Result<(), String> {
        let operates = begins && !self.guest_rests() && self.rng.random_bool(0.2);
        let Some(active) = self.life.active.as_mut().filter(|active| active.is_up()) else { return Ok(()) };
        if operates {
            active.operate(&mut self.rng);
            return Ok(());
        }
        let generation = active.generation;
        let polled = active.poll(&mut self.rng);
        if self.disk.is_dead() {
            return self.receiver_falls();
        }
        match polled? {
            Ok(true) => {
                self.life.wrote_there.insert(generation);
                self.one_writer()
            }
            Ok(false) => Ok(()),
            Err(error) if self.is_hurt() || self.is_rotten(&error) || error.contains("given back") => {
                self.say(|| format!("the guest of the active copy gets: {error}"));
                Ok(())
            }
            Err(error) => Err(format!("an operation of the active copy's guest failed: {error}")),
        }
    }

    /// Whether the receiver's disk has failed in a way that only a restart of its node mends.
    fn is_hurt(&self) -> bool {
        self.full || self.sync_failed || self.life.was_full
    }

    /// Whether an error names the file in which a bit is flipped.
    fn is_rotten(&self, error: &str) -> bool {
        self.rot.as_ref().is_some_and(|rot| error.contains(rot.file()))
    }

    /// A guest of the primary was told that a change is made.
    pub(super) fn wrote_here(&mut self, was_stopped: bool) -> Result<(), String> {
        if was_stopped {
            return Err("a guest's change was acknowledged at a primary that may not be written".to_owned());
        }
        let generation = self.record.lock().generation();
        if generation > Generation(0) {
            self.life.wrote_here.insert(generation);
        }
        self.one_writer()
    }

    fn one_writer(&self) -> Result<(), String> {
        match self.life.wrote_here.intersection(&self.life.wrote_there).next() {
            None => Ok(()),
            Some(generation) => Err(format!("both sites acknowledged changes in generation {generation}")),
        }
    }

    /// From the newest point, or from an earlier one.
    fn failover(&mut self) -> Result<(), String> {
        let points = self.replica.as_ref().and_then(|r| r.points(GROUP).ok()).unwrap_or_default();
        let point = if self.rng.random_bool(0.3) { points.choose(&mut self.rng).copied() } else { None };
        if points.is_empty() { Ok(()) } else { self.activate(point) }
    }

    fn activate(&mut self, point: Option<Point>) -> Result<(), String> {
        self.activate_by(|replica| replica.promote(GROUP, point))
    }

    fn activate_by(
        &mut self,
        promote: impl FnOnce(&mut Replica) -> Result<(Generation, Point), ReplicaError>,
    ) -> Result<(), String> {
        let Some(replica) = &mut self.replica else { return Ok(()) };
        let promoted = promote(replica);
        if let Ok((generation, point)) = &promoted {
            self.say(|| format!("promoted from {point}, generation {generation}"));
        }
        self.take_answers()?;
        self.outcome.promoted |= promoted.is_ok();
        match promoted {
            Err(error) if self.is_hurt() => {
                self.mends_receiver |= error.to_string().contains("restart the node");
                Ok(())
            }
            Err(error) if self.replica.is_some() => Err(format!("a promotion failed: {error}")),
            _ => self.revive_active(),
        }
    }

    fn switchover(&mut self) -> Result<(), String> {
        let Some(replica) = &mut self.replica else { return Ok(()) };
        let asked = replica.drain(GROUP).map_err(|error| error.to_string())?;
        if asked {
            self.say(|| "a switchover begins".to_owned());
            (self.life.drains, self.life.drained) = (Some(self.step), None);
        }
        self.take_answers()
    }

    /// The primary loses its power now.
    pub(super) fn drainer_falls(&mut self) {
        if self.life.drains.is_some() && self.life.drained.is_none() && self.record.lock().is_stopped() {
            self.life.drained = Some(self.images());
        }
    }

    /// Promotes once the primary has committed all.
    fn drained(&mut self) -> Result<(), String> {
        // A failover came in between.
        if self.role() == Some(GroupRole::Active) {
            self.life.drains = None;
        }
        let (Some(replica), Some(since)) = (&mut self.replica, self.life.drains) else { return Ok(()) };
        let drained = match replica.drained(GROUP) {
            Ok(drained) => drained,
            // Its primary takes writes again.
            Err(ReplicaError::Group(error)) => {
                self.life.drains = None;
                self.say(|| format!("no switchover: {error}"));
                return Ok(());
            }
            Err(error) => return Err(error.to_string()),
        };
        if let Some(point) = drained {
            self.life.drains = None;
            // Nothing of what its guests were told is done is missing: else it had begun a new session, and there is no switchover.
            let stands = self.primary.is_some() && self.role() == Some(GroupRole::Replica);
            if let Some(image) = self.oracle.image(point).filter(|_| stands) {
                let ours = self.life.drained.take().unwrap_or_else(|| self.images());
                if let Some(((volume, block), _)) = differing(&ours, image).first_key_value() {
                    return Err(format!("block {block} of volume {volume} is not in {point}, from which it is switched over"));
                }
                self.outcome.switched += 1;
            }
            return self.activate_by(|replica| replica.switch_over(GROUP, point));
        }
        if self.step > since + STEPS_TO_DRAIN {
            self.life.drains = None;
            replica.give_up_drain(GROUP).map_err(|error| error.to_string())?;
            return self.take_answers();
        }
        Ok(())
    }

    fn hand_back(&mut self, to: Option<Point>) -> Result<(), String> {
        let token = SessionToken(self.rng.random());
        let Some(primary) = &mut self.primary else { return Ok(()) };
        let repeats = primary.is_in_between();
        set_tag(Some(primary.tag()));
        self.life.target = to;
        match primary.hand_back(self.now, to, token) {
            Ok(()) => {
                let idle = self.life.active.as_ref().filter(|active| active.is_idle()).map(|active| active.changes);
                let moves = idle.map(|changes| Moves { failed: self.failed(), changes, began: self.images() });
                self.life.moves = moves.filter(|_| !repeats);
                self.say(|| to.map_or_else(|| "a failback begins".to_owned(), |to| format!("a rollback to {to} begins")));
                self.take_outputs()
            }
            Err(why) => {
                self.say(|| format!("no handback: {why}"));
                Ok(())
            }
        }
    }

    /// The primary has recorded that its disks are in between.
    pub(super) fn in_between(&mut self, newest: Point, kept: bool) -> Result<(), String> {
        if kept || self.life.target.is_some() {
            return Ok(());
        }
        let Some(image) = self.oracle.image(newest) else {
            return Err(format!("the receiver says its newest point is {newest}, and it is none"));
        };
        // A guest's writes may have been under way when it was asked for; from here on there are none.
        let began = self.images();
        if let Some(moves) = &mut self.life.moves {
            moves.began = began;
        }
        self.life.own = Some(differing(&self.images(), image));
        Ok(())
    }

    /// The receiver is about to make this point of what it gave.
    pub(super) fn sealing(&mut self, session: SessionNo, point: Point, token: SessionToken) -> Result<(), String> {
        let image = match (self.life.asked.get(&session), &self.life.active) {
            (Some(Some(to)), _) => self.oracle.image(*to).cloned(),
            (Some(None), Some(active)) => {
                match active.check() {
                    Err(error) if !self.is_rotten(&error) => return Err(error),
                    _ => {}
                }
                Some(active.image.clone())
            }
            _ => None,
        };
        let Some(image) = image else { return Err(format!("point {point} is sealed by a session that asked for nothing")) };
        self.say(|| format!("the receiver seals {point}"));
        self.life.sealed.insert(token.0);
        self.oracle.sealed(point, token, image);
        Ok(())
    }

    /// The primary heard that its guests may write.
    pub(super) fn handed(&mut self, point: Point, generation: Generation) -> Result<(), String> {
        self.oracle.told(point)?;
        let Some(image) = self.oracle.image(point) else { return Err(format!("{point} was handed over and is none")) };
        if let Some(((volume, block), _)) = differing(&self.images(), image).first_key_value() {
            return Err(format!("block {block} of volume {volume} differs from {point}, which was handed over"));
        }
        if let Some((theirs, role, _)) = self.replica.as_ref().and_then(|r| r.generation(GROUP).ok())
            && (theirs < generation || theirs == generation && role != GroupRole::Replica)
        {
            return Err(format!("{point} was handed over in generation {generation}, the receiver is {role:?} in {theirs}"));
        }
        self.outcome.handed += 1;
        self.life.own_is_due = self.life.own.is_some();
        self.check_kept()
    }

    /// What was the old primary's own is kept, or on its disk.
    fn check_kept(&mut self) -> Result<(), String> {
        let Some(replica) = self.replica.as_ref().filter(|_| self.life.own_is_due) else { return Ok(()) };
        let forks = replica.kept(GROUP).map_err(|error| error.to_string())?;
        self.life.own_is_due = false;
        let (own, now) = (self.life.own.take().unwrap_or_default(), self.images());
        for ((volume, block), content) in &own {
            let is_kept = forks.iter().any(|fork| fork.volumes[*volume].get(block).is_some_and(|kept| kept == content));
            let from = *block as usize * BLOCK_BYTES as usize;
            if !is_kept && now[*volume][from..from + content.len()] != **content {
                return Err(format!("block {block} of volume {volume} was the old primary's own and is nowhere"));
            }
        }
        self.outcome.own_blocks += own.len();
        Ok(())
    }

    /// A handback is over, well or not.
    pub(super) fn handed_back(&mut self, end: &HandbackEnd) -> Result<(), String> {
        let moves = self.life.moves.take();
        let point = match &end.point {
            Ok(point) => *point,
            Err(why) => {
                self.say(|| format!("the handback ends: {why}"));
                self.mends_receiver |= why.contains("restart the node") && self.rng.random_bool(0.2);
                return Ok(());
            }
        };
        let (Some(Moves { failed, began, .. }), Some(image)) = (moves, self.oracle.image(point)) else { return Ok(()) };
        if failed != self.failed() {
            return Ok(());
        }
        let Some(given) = self.life.given_blocks.take().filter(|_| self.life.target.is_none()) else { return Ok(()) };
        let mut blocks: BTreeSet<(usize, u64)> = differing(&began, image).into_keys().collect();
        blocks.extend(given);
        // The block that is always there.
        let most = blocks.len() as u64 * BLOCK_BYTES * MOVED_PERCENT_MAX / 100 + BLOCK_BYTES;
        self.outcome.measured += 1;
        if end.moved_bytes > most {
            return Err(format!("a failback moved {} bytes, {} blocks differ", end.moved_bytes, blocks.len()));
        }
        Ok(())
    }

    /// Who may write at the receiver's site, and whether anybody else did.
    pub(super) fn check_writer(&mut self) -> Result<(), String> {
        // The one epoch whose sync failed may turn out to be on the disk after all.
        let doubtful = u64::from(self.sync_failed);
        if let Some(last) = self.promoted
            && let Some((newest, writer)) = self.oracle.newest_writer()
            && newest.epoch.0 > last.epoch.0 + doubtful
            && !self.life.sealed.contains(&writer.0)
        {
            return Err(format!("after the promotion from {last} another point was committed"));
        }
        if !self.life.lives || self.role() != Some(GroupRole::Replica) {
            return Ok(());
        }
        if let Some(active) = self.life.active.take() {
            let from_newest = self.promoted.take() == Some(active.point);
            let (_, writer) = self.oracle.newest_writer().unwrap_or((active.point, SessionToken::default()));
            if !self.life.sealed.contains(&writer.0) {
                return Err("the active copy is gone, and nobody gave it back".to_owned());
            }
            // Blocks that change while they are given back may move twice.
            let rested = self.life.moves.as_ref().is_some_and(|moves| moves.changes == active.changes);
            self.life.given_blocks = Some(active.written).filter(|_| from_newest && rested);
        }
        Ok(())
    }

    /// The copy of a group that is active is opened, by a receiver that has just started or promoted it.
    pub(super) fn revive_active(&mut self) -> Result<(), String> {
        if !self.life.lives {
            return Ok(());
        }
        self.check_writer()?;
        let Some(replica) = self.replica.as_ref().filter(|_| self.role() == Some(GroupRole::Active)) else { return Ok(()) };
        if self.life.active.as_ref().is_some_and(Active::is_up) {
            return Ok(());
        }
        self.promoted = self.promoted.or(self.oracle.newest().map(|(point, _)| point));
        let copy = match replica.active(GROUP) {
            Ok(copy) if !self.disk.is_dead() => copy,
            // Opened again when there is room, or by the next process.
            Ok(_) => return Ok(()),
            Err(error) if self.is_rotten(&error.to_string()) => return self.heal_journal(),
            Err(_) if self.is_hurt() || self.disk.is_dead() => return Ok(()),
            Err(error) => return Err(format!("the active copy is not opened: {error}")),
        };
        let opened = match &mut self.life.active {
            Some(active) if (active.generation, active.point) == (copy.generation, copy.point) => active.revive(copy),
            active => {
                let Some(image) = self.oracle.image(copy.point) else {
                    return Err(format!("the copy is active from {}, which is no point", copy.point));
                };
                Active::new(copy, image.clone()).map(|new| *active = Some(new))
            }
        };
        match opened {
            // It is read again in the next step: what it holds must be known.
            Err(error) if self.is_rotten(&error) => {
                self.life.active.iter_mut().for_each(Active::fall);
                self.heal_journal()
            }
            opened => opened,
        }
    }

    /// A person starts the receiver's node again after its disk has failed.
    pub(super) fn mend_life(&mut self) -> Result<(), String> {
        if self.life.lives && self.is_hurt() { self.restart_receiver() } else { Ok(()) }
    }

    /// The receiver is gone.
    pub(super) fn life_falls(&mut self) {
        self.life.drains = None;
        self.life.asked.clear();
        if let Some(active) = &mut self.life.active {
            active.fall();
        }
    }
}
