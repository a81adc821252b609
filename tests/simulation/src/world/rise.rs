//! Whatever is down comes back, on what its disks have.

use std::sync::Arc;

use blockdev::{BlockDevice, CrashDevice};
use rand::Rng;
use receiver::{ClientConfig, Limits};

use super::faults::Hurt;
use super::rot::Rot;
use super::{CLIENT, KEY, World};
use crate::disk::SlowDisk;
use crate::plan::{GROUP, name};
use crate::primary::{Disks, Primary};
use crate::recovery::Replica;

impl World {
    pub(super) fn client() -> Result<ClientConfig, String> {
        let key = KEY.parse().map_err(|_| "the key")?;
        Ok(ClientConfig {
            name: name(CLIENT),
            key,
            groups: None,
            space_max_bytes: None,
            group_space_max_bytes: Default::default(),
            handback: true,
            retention: receiver::Ladder::default(),
        })
    }

    pub(super) fn limits() -> Limits {
        Limits { segment_bytes: 20_000, ..Limits::default() }
    }

    /// Whatever is down comes back.
    pub(super) fn rise(&mut self) -> Result<(), String> {
        if self.primary.is_none() {
            self.primary_rises()?;
        }
        while self.replica.is_none() {
            match Replica::open(&self.folder.path().join("store"), self.disk.disk(), vec![Self::client()?], Self::limits()) {
                Ok(replica) if !self.disk.is_dead() => {
                    self.say(|| "the receiver starts".to_owned());
                    self.replica = Some(replica);
                }
                Err(error) if !self.disk.is_dead() && !self.full => return Err(format!("the receiver does not start: {error}")),
                _ => self.receiver_falls()?,
            }
        }
        if let Some(replica) = &self.replica {
            let broken = replica.groups().into_iter().find_map(|(group, error)| Some((group, error?)));
            match broken {
                None => {
                    self.oracle.check(replica, GROUP, false, self.rot.as_ref().map(Rot::file))?;
                    self.revive_active()?;
                }
                // It cannot be opened on a full disk; the next start after that opens it.
                Some(_) if self.full => {}
                // The sync that failed was one of its start's: a person starts it again.
                Some(_) if std::mem::take(&mut self.sync_fails) => return self.restart_receiver(),
                Some((group, error)) => return Err(format!("{group} is refused: {error}")),
            }
        }
        Ok(())
    }

    /// A process on what a former one left.
    pub(super) fn primary_rises(&mut self) -> Result<(), String> {
        let seed = self.rng.random::<u64>();
        // What a failed sync left is read until the cache drops it. The guest's disk has lost it by then: see the header of the crate.
        self.volumes.iter().for_each(|volume| volume.reopen(true));
        for log in &self.logs {
            log.reopen(self.rng.random_bool(0.5));
        }
        let slow = |(i, disk): (usize, &Arc<CrashDevice>)| {
            let (applied, mishaps) = (self.applied.clone(), self.mishaps[i].clone());
            Arc::new(SlowDisk::new(i, disk.clone(), applied, mishaps, seed.wrapping_add(i as u64))) as Arc<dyn BlockDevice>
        };
        let disks = Disks {
            volumes: self.volumes.iter().enumerate().map(slow).collect(),
            logs: self.log_faults.iter().map(|l| l.clone() as Arc<dyn BlockDevice>).collect(),
            spill: self.spill.clone(),
        };
        self.applied.lock().clear();
        self.base = self.volumes.iter().map(|v| v.snapshot()).collect();
        self.primary = match Primary::start(self.config.clone(), disks.clone(), self.record.clone(), self.now) {
            Ok(primary) => Some(primary),
            Err(error) if self.is_explained(&error) => {
                self.say(|| format!("the primary does not start: {error}; the disk of its log is mended"));
                self.mend_logs();
                self.logs.iter().for_each(|log| log.reopen(false));
                Some(Primary::start(self.config.clone(), disks, self.record.clone(), self.now)?)
            }
            Err(error) => return Err(format!("the primary does not start: {error}")),
        };
        self.hurt = Hurt::default();
        self.say(|| "the primary starts".to_owned());
        Ok(())
    }
}
