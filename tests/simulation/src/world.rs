//! One run: the two sites, the guest, the faults, and the end in which everything must arrive.

use std::path::PathBuf;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use blockdev::{BlockDevice, CrashDevice, MemoryDevice};
use parking_lot::Mutex;
use proto::{BLOCK_BYTES, Name, Point, SessionToken};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use receiver::{ClientConfig, Limits};
use replicator::Durability;

use crate::check::Oracle;
use crate::guest::{Applied, Covered, Operation, SlowDisk, image};
use crate::link::Link;
use crate::primary::{Disks, DurableRecord, Output, Primary, PrimaryConfig, dirty_log_bytes};
use crate::recovery::{self, Replica, SimDisk};

/// The client's key: any text of the right form.
const KEY: &str = "SHA256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
const CLIENT: &str = "vm";
const GROUP: &str = "db";
/// Steps with faults.
const STEPS: usize = 6000;
/// One step in so many is a fault.
const STEPS_A_FAULT: u32 = 400;
/// Steps within which everything must arrive once the faults have ended.
const STEPS_TO_SETTLE: usize = 60_000;
/// One seed in so many has flushes that wait for the receiver.
const SEEDS_A_FLUSH_SYNC: u64 = 3;
/// Guest operations at once.
const OPERATIONS_MAX: usize = 6;
const SPILL_BYTES: u64 = 1 << 20;

/// What a run came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// Points committed.
    pub points: usize,
    /// Processes killed and power losses, at either side.
    pub crashes: usize,
    /// Connections broken.
    pub broken: usize,
    /// Bytes compared by hash.
    pub compared_bytes: u64,
    /// Bytes scrubbed.
    pub scrubbed_bytes: u64,
    /// Flushes answered because the receiver had what they cover.
    pub flushes: usize,
    /// Whether it ended with a promotion.
    pub promoted: bool,
}

impl Outcome {
    /// Adds what a primary did that is gone, or about to be.
    fn count(&mut self, primary: &Primary, now: Instant) {
        self.compared_bytes += primary.compared_bytes().0;
        self.scrubbed_bytes += primary.scrubbed_bytes(now).0;
    }
}

/// A promise that was broken.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Replays it.
    pub seed: u64,
    /// The step.
    pub step: usize,
    /// What.
    pub what: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "seed {}, step {}: {}; replay it with: make simulate SEED={}", self.seed, self.step, self.what, self.seed)
    }
}

impl std::error::Error for Violation {}

/// Runs a seed.
///
/// # Errors
/// [`Violation`].
pub fn run(seed: u64) -> Result<Outcome, Violation> {
    World::new(seed, false).run()
}

/// As [`run`], telling every step on standard error.
///
/// # Errors
/// [`Violation`].
pub fn run_traced(seed: u64) -> Result<Outcome, Violation> {
    World::new(seed, true).run()
}

struct World {
    seed: u64,
    step: usize,
    traced: bool,
    rng: SmallRng,
    now: Instant,
    start: Instant,
    interval: Duration,
    config: PrimaryConfig,
    volumes: Vec<Arc<CrashDevice>>,
    logs: Vec<Arc<CrashDevice>>,
    record: Arc<Mutex<DurableRecord>>,
    primary: Option<Primary>,
    operations: Vec<Operation>,
    applied: Arc<Mutex<Vec<Applied>>>,
    base: Vec<Vec<u8>>,
    folder: tempfile::TempDir,
    disk: SimDisk,
    replica: Option<Replica>,
    link: Option<Link>,
    /// The primary asked for a connection.
    wanted: bool,
    full: bool,
    /// A sync failed, or the next one will.
    sync_fails: bool,
    /// A sync was made to fail at some time.
    sync_failed: bool,
    promoted: Option<Point>,
    oracle: Oracle,
    outcome: Outcome,
}

/// A folder in memory, where there is one.
fn folder() -> tempfile::TempDir {
    let memory = PathBuf::from("/dev/shm");
    let place = if memory.is_dir() { memory } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("twinsite-sim.").tempdir_in(place).expect("a temporary folder")
}

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

impl World {
    fn new(seed: u64, traced: bool) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let count = rng.random_range(1..=2);
        let sizes: Vec<u64> = (0..count).map(|_| rng.random_range(2..60) * BLOCK_BYTES + rng.random_range(0..2) * 700).collect();
        let interval = Duration::from_millis(*[10, 100, 1000].get(rng.random_range(0..3)).unwrap_or(&10));
        let config = PrimaryConfig {
            group: name(GROUP),
            volumes: (0..count).map(|i| name(&format!("disk{i}"))).collect(),
            interval,
            freeze_budget_bytes: rng.random_range(1..30) * BLOCK_BYTES,
            spill_limit_bytes: rng.random_range(0..3) * 16 * BLOCK_BYTES,
            epochs_in_flight: rng.random_range(1..5),
            durability: if seed.is_multiple_of(SEEDS_A_FLUSH_SYNC) { Durability::FlushSync } else { Durability::Async },
        };
        let disk = |bytes: u64, rng: &mut SmallRng| {
            let mut content = vec![0; bytes as usize];
            for block in content.chunks_mut(BLOCK_BYTES as usize).filter(|_| rng.random_bool(0.5)) {
                block.fill(0x5a);
            }
            Arc::new(CrashDevice::new(content))
        };
        let volumes: Vec<_> = sizes.iter().map(|size| disk(*size, &mut rng)).collect();
        let logs = sizes.iter().map(|size| Arc::new(CrashDevice::new(vec![0; dirty_log_bytes(*size) as usize]))).collect();
        let folder = folder();
        let (now, base) = (Instant::now(), volumes.iter().map(|v| v.snapshot()).collect());
        Self {
            seed,
            step: 0,
            traced,
            rng,
            now,
            start: now,
            interval,
            config,
            volumes,
            logs,
            record: Arc::default(),
            primary: None,
            operations: Vec::new(),
            applied: Arc::default(),
            base,
            disk: SimDisk::new(folder.path()),
            folder,
            replica: None,
            link: None,
            wanted: false,
            full: false,
            sync_fails: false,
            sync_failed: false,
            promoted: None,
            oracle: Oracle::default(),
            outcome: Outcome::default(),
        }
    }

    fn say(&self, what: impl FnOnce() -> String) {
        if self.traced {
            let phase = self.primary.as_ref().map_or("down", Primary::phase);
            eprintln!("{:6} {:9.3} s  [{phase}] {}", self.step, self.now.duration_since(self.start).as_secs_f64(), what());
        }
    }

    fn violation(&self, what: String) -> Violation {
        Violation { seed: self.seed, step: self.step, what }
    }

    fn run(mut self) -> Result<Outcome, Violation> {
        let faults = self.rng.random_bool(0.9);
        while self.step < STEPS {
            self.step += 1;
            let done = self.one(faults, true);
            done.map_err(|what| self.violation(what))?;
        }
        let promote = self.rng.random_bool(0.3);
        if promote && let Err(what) = self.promote() {
            return Err(self.violation(what));
        }
        let settled = self.settle();
        settled.map_err(|what| self.violation(what))?;
        self.outcome.points = self.oracle.points();
        Ok(self.outcome)
    }

    /// One step: something happens.
    fn one(&mut self, faults: bool, guest: bool) -> Result<(), String> {
        self.rise()?;
        if faults && self.rng.random_ratio(1, STEPS_A_FAULT) {
            self.fault()?;
        }
        match self.rng.random_range(0..100) {
            0..8 if guest && self.operations.len() < OPERATIONS_MAX => self.operate(),
            0..30 => self.poll_guest()?,
            30..56 => self.poll_primary()?,
            56..76 => self.deliver()?,
            76..86 => self.answer()?,
            86..94 => self.tick()?,
            94 => self.upkeep(),
            95 => self.scrub(),
            96.. if self.wanted => self.connect()?,
            _ => {}
        }
        let (used, limit) = self.primary.as_ref().map_or((0, 0), Primary::queue);
        if used > limit {
            return Err(format!("{used} bytes wait for the network, the limit is {limit}"));
        }
        // Nothing is damaged here, so the copy is what the primary says at each of its points.
        let (_, differing) = self.primary.as_ref().map_or((0, 0), |primary| primary.scrubbed_bytes(self.now));
        if differing > 0 {
            return Err(format!("a scrub found {differing} bytes that differ"));
        }
        Ok(())
    }

    /// Whatever is down comes back.
    fn rise(&mut self) -> Result<(), String> {
        if self.primary.is_none() {
            let seed = self.rng.random::<u64>();
            let slow = |(i, disk): (usize, &Arc<CrashDevice>)| {
                Arc::new(SlowDisk::new(i, disk.clone(), self.applied.clone(), seed.wrapping_add(i as u64)))
                    as Arc<dyn BlockDevice>
            };
            let disks = Disks {
                volumes: self.volumes.iter().enumerate().map(slow).collect(),
                logs: self.logs.iter().map(|l| l.clone() as Arc<dyn BlockDevice>).collect(),
                spill: Arc::new(MemoryDevice::new(SPILL_BYTES)),
            };
            self.applied.lock().clear();
            self.base = self.volumes.iter().map(|v| v.snapshot()).collect();
            self.primary = Some(Primary::start(self.config.clone(), disks, self.record.clone(), self.now)?);
            self.say(|| "the primary starts".to_owned());
        }
        while self.replica.is_none() {
            let client = ClientConfig {
                name: name(CLIENT),
                key: KEY.parse().map_err(|_| "the key")?,
                groups: None,
                space_max_bytes: None,
            };
            let limits = Limits { segment_bytes: 20_000, ..Limits::default() };
            match Replica::open(&self.folder.path().join("store"), self.disk.disk(), vec![client], limits) {
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
                None => self.oracle.check(replica, GROUP, false)?,
                // It cannot be opened on a full disk; the next start after that opens it.
                Some(_) if self.full => {}
                // The sync that failed was one of its start's: a person starts it again.
                Some(_) if std::mem::take(&mut self.sync_fails) => return self.restart_receiver(),
                Some((group, error)) => return Err(format!("{group} is refused: {error}")),
            }
        }
        Ok(())
    }

    fn operate(&mut self) {
        let Some(primary) = &self.primary else { return };
        let volume = self.rng.random_range(0..self.volumes.len());
        let operation = Operation::random(primary.volume(volume), volume, &mut self.rng);
        self.operations.push(operation);
    }

    fn poll_guest(&mut self) -> Result<(), String> {
        let (Some(primary), false) = (&self.primary, self.operations.is_empty()) else { return Ok(()) };
        let index = self.rng.random_range(0..self.operations.len());
        if self.operations[index].begins() {
            let covers = Operation::covered(&self.operations, self.applied.lock().len());
            self.operations[index].set_covers(covers);
        }
        if let Poll::Ready(result) = self.operations[index].poll(primary.tag()) {
            let fenced = primary.is_fenced();
            let mut ended = self.operations.swap_remove(index);
            match (result, ended.take_covers()) {
                (Ok(()), Some(covers)) if self.config.durability == Durability::FlushSync => self.flushed(&covers)?,
                // Nothing that it flushes can be committed any more, and it is told.
                (Err(_), Some(_)) if fenced => {}
                (result, _) => result.map_err(|e| format!("a guest operation failed: {e}"))?,
            }
        }
        Ok(())
    }

    /// A flush was answered: the newest point must hold what it covers.
    fn flushed(&mut self, covers: &Covered) -> Result<(), String> {
        self.outcome.flushes += 1;
        let Some((point, image)) = self.oracle.newest() else {
            return Err("a flush was answered and there is no point".to_owned());
        };
        covers.check(&self.applied.lock(), image).map_err(|what| format!("a flush was answered, but at {point} {what}"))
    }

    fn poll_primary(&mut self) -> Result<(), String> {
        let (Some(primary), rng) = (&mut self.primary, &mut self.rng) else { return Ok(()) };
        primary.poll(self.now, |count| rng.random_range(0..count));
        self.take_outputs()
    }

    fn tick(&mut self) -> Result<(), String> {
        let Some(primary) = &mut self.primary else { return Ok(()) };
        self.now += self.interval.mul_f64(self.rng.random_range(0.0..1.5));
        // A session that waits to connect is not waited for.
        if self.rng.random_bool(0.1) {
            self.now = self.now.max(primary.deadline(self.now).min(self.now + Duration::from_secs(30)));
        }
        primary.tick(self.now);
        self.take_outputs()
    }

    fn upkeep(&mut self) {
        if let Some(primary) = &mut self.primary {
            primary.upkeep();
        }
    }

    fn scrub(&mut self) {
        if let Some(primary) = &mut self.primary {
            primary.scrub(self.now);
        }
    }

    fn connect(&mut self) -> Result<(), String> {
        let (Some(primary), Some(replica)) = (&mut self.primary, &mut self.replica) else { return Ok(()) };
        let Some(session) = replica.connect(KEY.parse().map_err(|_| "the key")?) else {
            return Err("the key is not known".to_owned());
        };
        let token = SessionToken(self.rng.random());
        self.link = Some(Link::new(session, token));
        self.wanted = false;
        primary.connected(self.now, token);
        self.say(|| format!("connected, session {session:?}"));
        self.take_outputs()
    }

    /// Bytes reach the receiver.
    fn deliver(&mut self) -> Result<(), String> {
        let (Some(link), Some(replica)) = (&mut self.link, &mut self.replica) else { return Ok(()) };
        link.deliver(replica, &mut self.rng);
        let outputs = replica.outputs();
        if self.disk.is_dead() {
            // Nobody heard what it said since it died.
            return self.receiver_falls();
        }
        for (session, output) in outputs {
            let link = self.link.as_mut().filter(|l| l.session == session);
            match (output, link) {
                (recovery::Output::Control(bytes), Some(link)) => link.answer(&bytes),
                (recovery::Output::Closed { code, reason }, Some(link)) => {
                    link.closed = true;
                    self.say(|| format!("the receiver closes: {code} {reason}"));
                }
                _ => {}
            }
        }
        // What is committed must be right at once, before anybody hears of it.
        let Some(replica) = &self.replica else { return Ok(()) };
        self.oracle.check(replica, GROUP, false)?;
        // The one epoch whose sync failed may turn out to be on the disk after all.
        let doubtful = u64::from(self.sync_failed);
        if let Some(last) = self.promoted
            && self.oracle.newest().is_some_and(|(newest, _)| newest.epoch.0 > last.epoch.0 + doubtful)
        {
            return Err(format!("after the promotion from {last} another point was committed"));
        }
        Ok(())
    }

    /// Bytes reach the primary.
    fn answer(&mut self) -> Result<(), String> {
        let (Some(link), Some(primary)) = (&mut self.link, &mut self.primary) else { return Ok(()) };
        match link.take_answer(&mut self.rng) {
            Some(bytes) => primary.control(self.now, &bytes),
            None if link.closed => return self.break_link("closed"),
            None => {}
        }
        self.take_outputs()
    }

    fn take_outputs(&mut self) -> Result<(), String> {
        let outputs = self.primary.as_mut().map(Primary::outputs).unwrap_or_default();
        for output in outputs {
            self.say(|| format!("{output:?}").chars().take(60).collect());
            match (output, &mut self.link) {
                (Output::Connect, _) => self.wanted = true,
                (Output::Control(bytes), Some(link)) => link.send(&bytes),
                (Output::PassOpen, Some(link)) => link.open(),
                (Output::PassData(bytes), Some(link)) => link.data(&bytes),
                (Output::PassEnd, Some(link)) => link.end(),
                (Output::Disconnect, _) => self.forget_link(),
                (Output::Sealed { point, session, tag }, _) => {
                    let images = image(&self.base, &self.applied.lock(), tag);
                    self.oracle.sealed(point, session, images);
                    self.say(|| format!("sealed {point}"));
                }
                (Output::Committed(point), _) => {
                    self.say(|| format!("told that {point} is committed"));
                    self.oracle.told(point)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The receiver learns that the connection is gone.
    fn forget_link(&mut self) {
        if let (Some(link), Some(replica)) = (self.link.take(), &mut self.replica) {
            replica.lost(link.session);
            let _ = replica.outputs();
        }
    }

    fn break_link(&mut self, why: &str) -> Result<(), String> {
        self.say(|| format!("the connection breaks: {why}"));
        self.outcome.broken += 1;
        self.forget_link();
        self.wanted = false;
        if self.disk.is_dead() {
            self.receiver_falls()?;
        }
        let jitter = self.rng.random_range(0.0..1.0);
        if let Some(primary) = &mut self.primary {
            primary.lost(self.now, jitter, false);
        }
        self.take_outputs()
    }

    fn fault(&mut self) -> Result<(), String> {
        match self.rng.random_range(0..14) {
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
            12 => {
                self.has_room();
                Ok(())
            }
            _ => {
                self.say(|| "the next sync at the receiver fails".to_owned());
                self.disk.fail_next_sync();
                (self.sync_fails, self.sync_failed) = (true, true);
                Ok(())
            }
        }
    }

    fn has_room(&mut self) {
        if std::mem::take(&mut self.full) {
            self.say(|| "the receiver's disk has room again".to_owned());
            self.disk.set_room(None);
            // A group that could not be opened on a full disk is opened by the next start.
            if self.replica.as_ref().is_some_and(|r| r.groups().iter().any(|(_, error)| error.is_some())) {
                self.forget_link();
                self.replica = None;
                self.disk.restart();
            }
        }
    }

    /// Killed, or its power lost: then every sector that was not flushed is kept or lost.
    fn primary_falls(&mut self, power: bool) -> Result<(), String> {
        self.say(|| format!("the primary is killed{}", if power { ", its power lost" } else { "" }));
        self.outcome.crashes += 1;
        self.primary_gone();
        if power {
            let keep = self.rng.random_range(0.0..=1.0);
            for disk in self.volumes.iter().chain(&self.logs) {
                disk.crash(|| self.rng.random_bool(keep));
            }
        }
        self.forget_link();
        if self.disk.is_dead() { self.receiver_falls() } else { Ok(()) }
    }

    fn primary_gone(&mut self) {
        self.operations.clear();
        if let Some(primary) = self.primary.take() {
            self.outcome.count(&primary, self.now);
        }
        self.wanted = false;
    }

    /// A clean stop, once the guest's operations have ended.
    fn primary_stops(&mut self) -> Result<(), String> {
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
            primary.stop();
        }
        self.wanted = false;
        self.forget_link();
        if self.disk.is_dead() { self.receiver_falls() } else { Ok(()) }
    }

    fn restart_receiver(&mut self) -> Result<(), String> {
        self.say(|| "the receiver's node is restarted".to_owned());
        self.replica = None;
        self.disk.restart();
        self.break_link("restart")
    }

    /// Killed, or its power lost.
    fn receiver_falls(&mut self) -> Result<(), String> {
        self.outcome.crashes += 1;
        self.replica = None;
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
        // The primary finds out in its own time.
        if let Some(link) = &mut self.link {
            link.closed = true;
        }
        if self.rng.random_bool(0.5) { self.break_link("the receiver is gone") } else { self.orphan_link() }
    }

    /// The connection's other end is gone, and nothing on its way arrives.
    fn orphan_link(&mut self) -> Result<(), String> {
        if let Some(link) = &mut self.link {
            *link = Link::new(link.session, link.token);
            link.closed = true;
        }
        Ok(())
    }

    fn promote(&mut self) -> Result<(), String> {
        self.has_room();
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
    fn settle(&mut self) -> Result<(), String> {
        self.has_room();
        let mut poisoned_since = 0;
        for _ in 0..STEPS_TO_SETTLE {
            self.step += 1;
            self.one(false, false)?;
            let Some(primary) = &self.primary else { continue };
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
            // A journal whose sync failed takes nothing until its node is restarted; a person does that.
            poisoned_since += 1;
            if poisoned_since % 5_000 == 0 {
                self.restart_receiver()?;
            }
        }
        let Some(primary) = &self.primary else { return Err("the primary is down".to_owned()) };
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
        self.oracle.check(replica, GROUP, true)
    }
}
