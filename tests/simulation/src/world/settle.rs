//! The end of a run: a promotion perhaps, then no faults, and everything must arrive; in a whole life, the primary must have its disks back.

use super::{CLIENT, STEPS_TO_SETTLE, World};
use crate::plan::GROUP;

impl World {
    pub(super) fn promote(&mut self) -> Result<(), String> {
        self.has_room()?;
        self.rise()?;
        let Some(replica) = &mut self.replica else { return Ok(()) };
        match replica.promote(&format!("{CLIENT}/{GROUP}"), None) {
            Ok((generation, point)) if !self.disk.is_dead() => {
                self.promoted = Some(point);
                self.outcome.promoted = true;
                self.say(|| format!("promoted from {point}, generation {generation}"));
                Ok(())
            }
            _ if self.disk.is_dead() => {
                self.receiver_falls()?;
                self.rise()?;
                // Nobody heard the answer; it may have been done all the same.
                let standing = self.replica.as_ref().and_then(|r| r.generation(&format!("{CLIENT}/{GROUP}")).ok());
                self.promoted = standing.and_then(|(_, _, point)| point);
                self.outcome.promoted = self.promoted.is_some();
                Ok(())
            }
            // Without a point, or with a failed sync behind it, there is nothing to activate.
            _ => Ok(()),
        }
    }

    /// The faults have ended: everything must arrive.
    pub(super) fn settle(&mut self) -> Result<(), String> {
        self.has_room()?;
        self.mend();
        self.heal_journal()?;
        // A person starts a node again whose disk has failed.
        if self.hurt.log || self.hurt.sync {
            self.primary_falls(false)?;
        }
        self.mend_life()?;
        for _ in 0..STEPS_TO_SETTLE {
            self.step += 1;
            self.one(false, false)?;
            let Some(primary) = &self.primary else { continue };
            if self.life.lives && (self.promoted.is_some() || primary.hands_back() || !primary.takes_writes()) {
                continue;
            }
            if self.promoted.is_some() {
                if primary.is_fenced() {
                    break;
                }
                continue;
            }
            let quiet = self.link.as_ref().is_some_and(|l| l.is_quiet() && !l.closed);
            if self.operations.is_empty() && quiet && primary.phase() == "streaming" && primary.dirty_bytes() == 0 {
                break;
            }
        }
        let Some(primary) = &self.primary else { return Err("the primary is down".to_owned()) };
        if self.life.lives && (self.promoted.is_some() || !primary.takes_writes()) {
            let phase = primary.phase();
            return Err(format!("the primary does not have its disks back after {STEPS_TO_SETTLE} steps, it is {phase}"));
        }
        if self.promoted.is_some() {
            if !primary.is_fenced() {
                return Err(format!("the old primary was not fenced in {STEPS_TO_SETTLE} steps, it is {}", primary.phase()));
            }
        } else if primary.dirty_bytes() > 0 {
            let (dirty, phase) = (primary.dirty_bytes(), primary.phase());
            return Err(format!("after {STEPS_TO_SETTLE} steps without faults {dirty} bytes are not committed, it is {phase}"));
        } else {
            let images: Vec<Vec<u8>> = self.volumes.iter().map(|v| v.snapshot()).collect();
            let newest = self.oracle.newest();
            if newest.is_none_or(|(_, copy)| *copy != images) {
                return Err(format!("the newest point {:?} is not the guest's disk, and nothing is dirty", newest.map(|n| n.0)));
            }
        }
        self.outcome.count(primary, self.now);
        let Some(replica) = &self.replica else { return Err("the receiver is down".to_owned()) };
        self.oracle.check(replica, GROUP, true, None)
    }
}
