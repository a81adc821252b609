//! What fails: connections, the path, processes, power, disks. Each fault is named in the trace.

use blockdev::{Fault, Operation as DiskOperation};
use rand::Rng;

use super::World;
use crate::disk::INJECTED;
use crate::guest::Operation;
use crate::link::Link;
use crate::plan::GROUP;

const NO_SPACE: i32 = 28;
const IO_ERROR: i32 = 5;

/// What was made to fail of the primary that runs, and explains errors of its guest.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Hurt {
    /// A write or a sync of a dirty log.
    pub(super) log: bool,
    /// A sync of a disk.
    pub(super) sync: bool,
}

impl World {
    pub(super) fn fault(&mut self) -> Result<(), String> {
        match self.rng.random_range(0..25) {
            0..4 => self.break_link("cut"),
            4 => self.primary_falls(false),
            5..7 => self.primary_falls(true),
            7 => self.primary_stops(),
            8..10 => self.receiver_falls(),
            10 => {
                let changes = self.rng.random_range(1..30);
                self.say(|| format!("the receiver dies {changes} changes of its disk later"));
                self.disk.die_after(changes);
                Ok(())
            }
            11 => {
                self.full = true;
                self.say(|| "the receiver's disk is full".to_owned());
                self.disk.set_room(Some(self.rng.random_range(0..5_000)));
                Ok(())
            }
            12 => self.has_room(),
            13 => {
                self.say(|| "the next sync at the receiver fails".to_owned());
                self.disk.fail_next_sync();
                (self.sync_fails, self.sync_failed) = (true, true);
                Ok(())
            }
            14..16 => self.partition(),
            16..18 => self.rot_journal(),
            18 => self.heal_journal(),
            19 => self.disk_fails(),
            20 => self.disk_sync_fails(),
            21..23 => self.log_fails(),
            _ => self.spill_fails(),
        }
    }

    /// Nothing arrives for a time. The connection may outlive it.
    fn partition(&mut self) -> Result<(), String> {
        let lasts = self.interval.mul_f64(self.rng.random_range(0.0..60.0));
        self.path.cut_until = Some(self.now + lasts);
        self.outcome.partitions += 1;
        self.say(|| format!("the path is cut for {lasts:?}"));
        if self.rng.random_bool(0.5) { self.break_link("the path is cut") } else { Ok(()) }
    }

    /// Some reads or writes of a guest's disk fail.
    fn disk_fails(&mut self) -> Result<(), String> {
        self.outcome.disk_faults += 1;
        let (volume, times) = (self.rng.random_range(0..self.volumes.len()), self.rng.random_range(1..4));
        let reads = self.rng.random_bool(0.6);
        self.say(|| format!("the next {times} {} of disk {volume} fail", if reads { "reads" } else { "writes" }));
        let mishaps = self.mishaps[volume].lock();
        if reads {
            mishaps.reads.set(times)
        } else {
            mishaps.writes.set(times)
        }
        Ok(())
    }

    fn disk_sync_fails(&mut self) -> Result<(), String> {
        self.outcome.disk_faults += 1;
        self.hurt.sync = true;
        let volume = self.rng.random_range(0..self.volumes.len());
        self.say(|| format!("the next sync of disk {volume} fails, and all after it"));
        self.volumes[volume].fail_next_flush();
        Ok(())
    }

    /// The dirty log cannot be written, or not be synced.
    fn log_fails(&mut self) -> Result<(), String> {
        self.outcome.disk_faults += 1;
        self.hurt.log = true;
        let log = self.rng.random_range(0..self.logs.len());
        if self.rng.random_bool(0.5) {
            self.say(|| format!("the next sync of dirty log {log} fails, and all after it"));
            self.logs[log].fail_next_flush();
            return Ok(());
        }
        let times = self.rng.random_range(1..4);
        let errno = if self.rng.random_bool(0.5) { NO_SPACE } else { IO_ERROR };
        self.say(|| format!("the next {times} writes of dirty log {log} fail with errno {errno}"));
        let whole = self.rng.random_bool(0.5);
        let bytes_done = if whole { 512 } else { 0 };
        self.log_faults[log].inject(Fault { count: times, bytes_done, ..Fault::always(DiskOperation::Write, errno) });
        Ok(())
    }

    /// The spill file has no space for some time, or cannot be read back.
    fn spill_fails(&mut self) -> Result<(), String> {
        self.outcome.disk_faults += 1;
        if self.rng.random_bool(0.3) {
            self.say(|| "the spill file works again".to_owned());
            self.spill.heal();
            return Ok(());
        }
        let read = self.rng.random_bool(0.3);
        let (operation, errno) = if read { (DiskOperation::Read, IO_ERROR) } else { (DiskOperation::Write, NO_SPACE) };
        let count = if read { 1 } else { self.rng.random_range(1..20) };
        self.say(|| format!("{count} {operation:?} of the spill file to fail with errno {errno}"));
        self.spill.inject(Fault { count, ..Fault::always(operation, errno) });
        Ok(())
    }

    /// Whether an error of the guest, or of a stop, comes of what was made to fail.
    pub(super) fn is_explained(&self, error: &str) -> bool {
        error.contains(INJECTED)
            || self.hurt.sync && error.contains("the disk failed to sync")
            || self.hurt.log && error.contains("dirty log volume ")
    }

    pub(super) fn mend_logs(&mut self) {
        self.log_faults.iter().for_each(|log| log.heal());
    }

    /// What was to fail and did not will not fail any more.
    pub(super) fn mend(&mut self) {
        self.mend_logs();
        self.spill.heal();
        for mishaps in &self.mishaps {
            *mishaps.lock() = Default::default();
        }
        self.path.cut_until = None;
    }

    pub(super) fn has_room(&mut self) -> Result<(), String> {
        if std::mem::take(&mut self.full) {
            self.say(|| "the receiver's disk has room again".to_owned());
            self.disk.set_room(None);
            // A group that could not be opened on a full disk is opened by the next start.
            if self.replica.as_ref().is_some_and(|r| r.groups().iter().any(|(_, error)| error.is_some())) {
                self.heal_journal()?;
                self.forget_link();
                (self.replica, self.ghost) = (None, None);
                self.life_falls();
                self.disk.restart();
            }
        }
        Ok(())
    }

    /// Killed, or its power lost: then every sector that was not flushed is kept or lost.
    pub(super) fn primary_falls(&mut self, power: bool) -> Result<(), String> {
        self.say(|| format!("the primary is killed{}", if power { ", its power lost" } else { "" }));
        self.outcome.crashes += 1;
        self.primary_gone();
        if power {
            self.drainer_falls();
            let keep = self.rng.random_range(0.0..=1.0);
            for disk in self.volumes.iter().chain(&self.logs) {
                disk.crash(|| self.rng.random_bool(keep));
            }
        }
        self.primary_is_down()
    }

    fn primary_gone(&mut self) {
        self.operations.clear();
        if let Some(primary) = self.primary.take() {
            self.outcome.count(&primary, self.now);
        }
        self.wanted = false;
    }

    /// However it ended.
    fn primary_is_down(&mut self) -> Result<(), String> {
        if self.faults && self.rng.random_bool(0.15) {
            self.rot_primary();
        }
        self.forget_link();
        if self.disk.is_dead() { self.receiver_falls() } else { Ok(()) }
    }

    /// A clean stop, once the guest's operations have ended.
    pub(super) fn primary_stops(&mut self) -> Result<(), String> {
        self.say(|| "the primary stops".to_owned());
        for _ in 0..10_000 {
            // Flushes that wait for the receiver end with the process.
            if self.operations.iter().all(Operation::is_flush) {
                break;
            }
            self.poll_guest()?;
            self.poll_primary()?;
        }
        self.operations.clear();
        if let Some(primary) = self.primary.take() {
            self.outcome.count(&primary, self.now);
            match primary.stop() {
                Err(error) if !self.is_explained(&error) => return Err(format!("a clean stop failed: {error}")),
                Err(error) => self.say(|| format!("no clean stop: {error}")),
                Ok(()) => {}
            }
        }
        self.wanted = false;
        self.primary_is_down()
    }

    pub(super) fn restart_receiver(&mut self) -> Result<(), String> {
        self.say(|| "the receiver's node is restarted".to_owned());
        self.heal_journal()?;
        (self.replica, self.ghost) = (None, None);
        self.life_falls();
        self.disk.restart();
        self.break_link("restart")
    }

    /// Killed, or its power lost.
    pub(super) fn receiver_falls(&mut self) -> Result<(), String> {
        self.heal_journal()?;
        self.outcome.crashes += 1;
        if let Some((generation, ..)) = self.replica.as_ref().and_then(|replica| replica.generation(GROUP).ok()) {
            self.stood = generation;
        }
        (self.replica, self.ghost) = (None, None);
        self.life_falls();
        let power = self.rng.random_bool(0.5);
        self.say(|| format!("the receiver is killed{}", if power { ", its power lost" } else { "" }));
        if power {
            let rng = &mut self.rng;
            self.disk.crash(|n| rng.random_range(0..n)).map_err(|e| format!("cannot simulate a power loss: {e}"))?;
        } else {
            self.disk.restart();
        }
        self.disk.set_room(None);
        self.full = false;
        if self.faults && self.rng.random_bool(0.1) {
            self.probe_rot()?;
        }
        // The primary finds out in its own time.
        if let Some(link) = &mut self.link {
            link.closed = true;
        }
        if self.rng.random_bool(0.5) { self.break_link("the receiver is gone") } else { self.orphan_link() }
    }

    /// The connection's other end is gone, and nothing on its way arrives.
    fn orphan_link(&mut self) -> Result<(), String> {
        if let Some(link) = &mut self.link {
            *link = Link::new(link.session, link.token, &self.path, self.now);
            link.closed = true;
        }
        Ok(())
    }
}
