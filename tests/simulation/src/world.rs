//! One run: the two sites, the guest, the faults, and the end in which everything must arrive.

mod faults;
mod life;
mod network;
mod rise;
mod rot;
mod settle;

use std::path::PathBuf;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use blockdev::{CrashDevice, FaultDevice, MemoryDevice};
use parking_lot::Mutex;
use proto::{Generation, Point};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use replicator::Durability;

use self::faults::Hurt;
use self::life::Life;
use self::rot::Rot;
use crate::check::Oracle;
use crate::disk::{Applied, Mishaps, set_tag};
use crate::guest::{Covered, Operation};
use crate::link::{Link, Path};
use crate::plan::{GROUP, Plan};
use crate::primary::{DurableRecord, Primary, PrimaryConfig, dirty_log_bytes, set_lingers};
use crate::recovery::{Replica, SimDisk};

/// The client's key: any text of the right form.
const KEY: &str = "SHA256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
const CLIENT: &str = "vm";
/// Steps with faults.
const STEPS: usize = 6000;
/// One step in so many is a fault.
const STEPS_A_FAULT: u32 = 250;
/// Steps within which everything must arrive once the faults have ended.
const STEPS_TO_SETTLE: usize = 60_000;
/// Guest operations at once.
const OPERATIONS_MAX: usize = 6;
/// From one rest of the guest to the next, on average; a rest is half as long.
const STEPS_BETWEEN_RESTS: usize = 800;
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
    /// Faults of the primary's disks, its logs and its spill file.
    pub disk_faults: usize,
    /// Partitions of the network.
    pub partitions: usize,
    /// Bits flipped, at either side.
    pub flips: usize,
    /// Bytes compared by hash.
    pub compared_bytes: u64,
    /// Bytes scrubbed.
    pub scrubbed_bytes: u64,
    /// Flushes answered because the receiver had what they cover.
    pub flushes: usize,
    /// Whether there was a promotion.
    pub promoted: bool,
    /// Switchovers in which nothing was lost.
    pub switched: usize,
    /// Disks given back, or rolled back.
    pub handed: usize,
    /// Blocks of old primaries that were kept, or stayed.
    pub own_blocks: usize,
    /// Failbacks of which the bytes that moved were measured.
    pub measured: usize,
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
    simulate(seed, None, false)
}

/// As [`run`], telling every step on standard error.
///
/// # Errors
/// [`Violation`].
pub fn run_traced(seed: u64) -> Result<Outcome, Violation> {
    simulate(seed, None, true)
}

/// Runs a seed on a path on which each connection carries so many bytes and then breaks, and nothing else fails: everything must arrive all the
/// same. The group has one disk of 64 to 128 blocks, half of which are to be sent at first and cannot be compressed.
///
/// # Errors
/// [`Violation`].
pub fn run_flapping(seed: u64, bytes_per_connection: u64) -> Result<Outcome, Violation> {
    simulate(seed, Some(bytes_per_connection), false)
}

fn simulate(seed: u64, bytes_per_connection: Option<u64>, traced: bool) -> Result<Outcome, Violation> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let plan = match bytes_per_connection {
        Some(bytes) => Plan::flapping(bytes, &mut rng),
        None => Plan::of_seed(seed, &mut rng),
    };
    World::new(seed, plan, rng, traced).run()
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
    mishaps: Vec<Arc<Mutex<Mishaps>>>,
    logs: Vec<Arc<CrashDevice>>,
    /// The logs as the primary has them: they fail when they are told to.
    log_faults: Vec<Arc<FaultDevice>>,
    spill: Arc<FaultDevice>,
    hurt: Hurt,
    record: Arc<Mutex<DurableRecord>>,
    primary: Option<Primary>,
    operations: Vec<Operation>,
    /// The guest rests from this step on, for so many.
    rest_from: usize,
    rests: usize,
    applied: Arc<Mutex<Vec<Applied>>>,
    base: Vec<Vec<u8>>,
    folder: tempfile::TempDir,
    disk: SimDisk,
    replica: Option<Replica>,
    path: Path,
    link: Option<Link>,
    /// A connection that the primary knows to be gone and the receiver does not: what was under way may still arrive.
    ghost: Option<Link>,
    is_noise: bool,
    faults: bool,
    /// A flipped bit of the journal.
    rot: Option<Rot>,
    /// The primary asked for a connection.
    wanted: bool,
    full: bool,
    /// A sync failed, or the next one will.
    sync_fails: bool,
    /// A person has read that the receiver's journal takes nothing until its node is restarted.
    mends_receiver: bool,
    /// A sync was made to fail at some time.
    sync_failed: bool,
    /// The generation that the receiver stood at when its process ended last.
    stood: Generation,
    /// While a copy is active: the newest point when it was activated.
    promoted: Option<Point>,
    life: Life,
    oracle: Oracle,
    outcome: Outcome,
}

/// A folder in memory, where there is one.
fn folder() -> tempfile::TempDir {
    let memory = PathBuf::from("/dev/shm");
    let place = if memory.is_dir() { memory } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("twinsite-sim.").tempdir_in(place).expect("a temporary folder")
}

impl World {
    fn new(seed: u64, plan: Plan, rng: SmallRng, traced: bool) -> Self {
        let Plan { config, disks, path, is_noise, faults, lives } = plan;
        let log = |disk: &Vec<u8>| Arc::new(CrashDevice::new(vec![0; dirty_log_bytes(disk.len() as u64) as usize]));
        let logs: Vec<_> = disks.iter().map(log).collect();
        let folder = folder();
        set_lingers(seed.wrapping_mul(2).wrapping_add(1));
        let now = Instant::now();
        Self {
            seed,
            step: 0,
            traced,
            rng,
            now,
            start: now,
            interval: config.interval,
            config,
            base: disks.clone(),
            mishaps: disks.iter().map(|_| Arc::default()).collect(),
            volumes: disks.into_iter().map(|disk| Arc::new(CrashDevice::new(disk))).collect(),
            log_faults: logs.iter().map(|log| Arc::new(FaultDevice::new(log.clone()))).collect(),
            logs,
            spill: Arc::new(FaultDevice::new(Arc::new(MemoryDevice::new(SPILL_BYTES)))),
            hurt: Hurt::default(),
            record: Arc::default(),
            primary: None,
            operations: Vec::new(),
            rest_from: 0,
            rests: 0,
            applied: Arc::default(),
            disk: SimDisk::new(folder.path()),
            folder,
            replica: None,
            path,
            link: None,
            ghost: None,
            is_noise,
            faults,
            rot: None,
            wanted: false,
            full: false,
            sync_fails: false,
            sync_failed: false,
            stood: Generation(0),
            mends_receiver: false,
            promoted: None,
            life: Life::new(lives),
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
        self.say(|| format!("{:?}, {:?}", self.config, self.path));
        while self.step < STEPS {
            self.step += 1;
            let done = self.one(self.faults, true);
            done.map_err(|what| self.violation(what))?;
        }
        let promote = self.faults && !self.life.lives && self.rng.random_bool(0.3);
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
        if std::mem::take(&mut self.mends_receiver) {
            self.restart_receiver()?;
        }
        if faults && self.rng.random_ratio(1, STEPS_A_FAULT) {
            self.fault()?;
        }
        match self.rng.random_range(0..100) {
            0..8 if guest && !self.guest_rests() && self.operations.len() < OPERATIONS_MAX => self.operate(),
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
        if self.life.lives {
            self.live(guest)?;
        }
        self.check_scrub()?;
        self.check_bounds()
    }

    /// The guest writes nothing for a while every now and then: only what is left alone is forgotten by the dirty log.
    fn guest_rests(&mut self) -> bool {
        if self.step >= self.rest_from + self.rests {
            self.rest_from = self.step + self.rng.random_range(0..2 * STEPS_BETWEEN_RESTS);
            self.rests = self.rng.random_range(0..STEPS_BETWEEN_RESTS);
        }
        self.step >= self.rest_from
    }

    /// As long as nothing is damaged and no disk failed, the copy is what the primary says at each of its points.
    fn check_scrub(&self) -> Result<(), String> {
        let (_, differing) = self.primary.as_ref().map_or((0, 0), |primary| primary.scrubbed_bytes(self.now));
        if differing > 0 && self.outcome.flips == 0 && self.outcome.disk_faults == 0 {
            return Err(format!("a scrub found {differing} bytes that differ"));
        }
        Ok(())
    }

    /// Whatever either side keeps is within its limit.
    fn check_bounds(&self) -> Result<(), String> {
        let ours = self.primary.iter().flat_map(Primary::bounds);
        if let Some((what, used, limit)) = ours.into_iter().find(|(_, used, limit)| used > limit) {
            return Err(format!("the primary keeps {used} {what}, the limit is {limit}"));
        }
        let theirs = self.replica.iter().flat_map(|replica| replica.queues(GROUP));
        if let Some(queue) = theirs.into_iter().find(|queue| queue.used > queue.limit) {
            return Err(format!("the receiver keeps {} {}, the limit is {}", queue.used, queue.name, queue.limit));
        }
        Ok(())
    }

    fn operate(&mut self) {
        let Some(primary) = &self.primary else { return };
        let volume = self.rng.random_range(0..self.volumes.len());
        let operation = Operation::random(primary.volume(volume), volume, self.is_noise, &mut self.rng);
        self.operations.push(operation);
    }

    fn poll_guest(&mut self) -> Result<(), String> {
        let (Some(primary), false) = (&self.primary, self.operations.is_empty()) else { return Ok(()) };
        let index = self.rng.random_range(0..self.operations.len());
        if self.operations[index].begins() {
            let covers = Operation::covered(&self.operations, self.applied.lock().len());
            self.operations[index].set_covers(covers);
        }
        let applied = self.applied.lock().len();
        self.operations[index].note_stopped(self.record.lock().is_stopped());
        if let Poll::Ready(result) = self.operations[index].poll(applied) {
            let fenced = primary.is_fenced() || self.life.lives;
            let mut ended = self.operations.swap_remove(index);
            if let (Ok(()), Some(was_stopped)) = (&result, ended.change()) {
                self.wrote_here(was_stopped)?;
            }
            match (result, ended.take_covers()) {
                (Ok(()), Some(covers)) if self.config.durability == Durability::FlushSync => self.flushed(&covers)?,
                // Nothing that it flushes can be committed any more, and it is told.
                (Err(_), Some(_)) if fenced => {}
                // Another site is the server, or is about to be.
                (Err(error), None) if fenced && error.kind() == std::io::ErrorKind::ReadOnlyFilesystem => {}
                (Err(error), _) if self.is_explained(&error.to_string()) => self.say(|| format!("the guest gets: {error}")),
                (Err(error), _) => return Err(format!("a guest operation failed: {error}")),
                (Ok(()), _) => ended.check_read(&self.base, &self.applied.lock())?,
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
        if let (Some(window), Some(link)) = (self.path.window_bytes, &self.link) {
            primary.set_room(window.saturating_sub(link.under_way()));
        }
        set_tag(Some(primary.tag()));
        primary.poll(self.now, |count| rng.random_range(0..count));
        self.take_outputs()
    }

    fn tick(&mut self) -> Result<(), String> {
        let Some(primary) = &mut self.primary else { return Ok(()) };
        self.now += self.interval.mul_f64(self.rng.random_range(0.0..1.5));
        // A session that waits to connect is not waited for.
        if self.rng.random_bool(0.1) {
            let arrival = self.link.as_ref().and_then(Link::next_arrival).map(|at| at.max(self.now));
            let healed = self.path.cut_until.filter(|until| *until > self.now);
            let next = arrival.into_iter().chain(healed).fold(primary.deadline(self.now), Instant::min);
            self.now = self.now.max(next.min(self.now + Duration::from_secs(30)));
        }
        set_tag(Some(primary.tag()));
        primary.tick(self.now);
        self.take_outputs()
    }

    fn scrub(&mut self) {
        if let Some(primary) = &mut self.primary {
            primary.scrub(self.now);
        }
    }

    fn upkeep(&mut self) {
        if let Some(primary) = &mut self.primary {
            primary.upkeep();
        }
    }
}
