//! Clients that write and remember: each connects again when its server is gone and sends again what was not acknowledged, as QEMU
//! does for its guest. Any other error is the guest's, and fails the test.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::history::{BLOCK_BYTES, Entry, History, Place, Stamp};
use super::nbd::{Nbd, is_lost};
use super::unix_us;

/// Blocks of a write at most.
const BLOCKS_MAX: u64 = 4;
/// From one write of a writer to the next: enough to keep epochs full, and to leave the machine to others.
const PACE: Duration = Duration::from_millis(2);
/// From one attempt to connect to the next.
const CONNECT_EVERY: Duration = Duration::from_millis(5);

/// A disk as the writers see it.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// Socket of its export.
    pub(crate) socket: PathBuf,
    /// Name of its export.
    pub(crate) export: String,
    /// Its size in blocks.
    pub(crate) blocks: u64,
}

#[derive(Debug)]
struct Shared {
    targets: Vec<Target>,
    writers: u64,
    stop: AtomicBool,
    /// Held for reading during a write.
    gate: RwLock<()>,
    clock: AtomicU64,
    reconnections: AtomicU64,
    longest_us: AtomicU64,
}

/// Writers at work.
#[derive(Debug)]
pub(crate) struct Writers {
    shared: Arc<Shared>,
    logs: Vec<Arc<Mutex<Vec<Entry>>>>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

struct Writer {
    shared: Arc<Shared>,
    log: Arc<Mutex<Vec<Entry>>>,
    number: u32,
    rng: SmallRng,
    disks: Vec<Option<Nbd>>,
}

impl Writers {
    /// Starts them; each owns a part of every disk.
    pub(crate) fn start(targets: &[Target], writers: u32, seed: u64) -> Self {
        let shared = Arc::new(Shared {
            targets: targets.to_vec(),
            writers: writers.into(),
            stop: AtomicBool::new(false),
            gate: RwLock::new(()),
            clock: AtomicU64::new(1),
            reconnections: AtomicU64::new(0),
            longest_us: AtomicU64::new(0),
        });
        let logs: Vec<_> = (0..writers).map(|_| Arc::new(Mutex::new(Vec::new()))).collect();
        let threads = (0..writers).zip(&logs).map(|(number, log)| {
            let rng = SmallRng::seed_from_u64(seed.wrapping_add(number.into()));
            let disks = targets.iter().map(|_| None).collect();
            let writer = Writer { shared: Arc::clone(&shared), log: Arc::clone(log), number, rng, disks };
            std::thread::spawn(move || writer.run())
        });
        let threads = threads.collect();
        Self { shared, logs, threads }
    }

    /// Fails if a writer had an error.
    #[track_caller]
    pub(crate) fn fine(&self) {
        assert!(!self.threads.iter().any(JoinHandle::is_finished), "a writer ended: its error is above");
    }

    /// Runs `during` while every write that was issued is acknowledged and none is issued.
    pub(crate) fn paused<T>(&self, during: impl FnOnce() -> T) -> T {
        let _closed = self.shared.gate.write().expect("no writer panics");
        during()
    }

    /// What they did so far.
    pub(crate) fn history(&self) -> History {
        let logs: Vec<_> = self.logs.iter().map(|log| log.lock().expect("no writer panics").clone()).collect();
        History::new(&logs)
    }

    /// Writes acknowledged so far.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.logs.iter().map(|log| log.lock().expect("no writer panics").len() as u64).sum()
    }

    /// Times that a writer found its server gone, and the longest that a write took.
    pub(crate) fn outages(&self) -> (u64, Duration) {
        let shared = &self.shared;
        (shared.reconnections.load(Ordering::Relaxed), Duration::from_micros(shared.longest_us.load(Ordering::Relaxed)))
    }

    /// Ends them, also those whose server is gone for good.
    #[track_caller]
    pub(crate) fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.join().expect("no writer panics").expect("no write fails");
        }
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Writer {
    fn run(mut self) -> io::Result<()> {
        let result = self.work();
        if let Err(error) = &result {
            println!("writer {}: {error}", self.number);
        }
        result
    }

    fn stopped(&self) -> bool {
        self.shared.stop.load(Ordering::SeqCst)
    }

    fn work(&mut self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        while !self.stopped() {
            {
                let _open = shared.gate.read().map_err(|_| io::Error::other("the test panicked"))?;
                let place = self.write()?;
                if self.rng.random_ratio(1, 16) {
                    self.read_back(place)?;
                }
            }
            std::thread::sleep(PACE);
        }
        Ok(())
    }

    /// One write, until it is acknowledged or the test ends.
    fn write(&mut self) -> io::Result<(usize, Entry)> {
        let disk = self.rng.random_range(0..self.shared.targets.len());
        let own = self.shared.targets[disk].blocks / self.shared.writers;
        // Half of the writes go to few blocks: epochs then overwrite each other, and captures are overtaken.
        let span = if self.rng.random_bool(0.5) { (own / 16).max(1) } else { own };
        let first = self.rng.random_range(0..span);
        let blocks = self.rng.random_range(1..=BLOCKS_MAX.min(own - first));
        let place = Place { disk: disk as u32, block: u64::from(self.number) * own + first };
        let zero = self.rng.random_ratio(1, 10);
        let issued = self.shared.clock.fetch_add(1, Ordering::SeqCst);
        let mut entry = Entry { place, blocks: blocks as u32, zero, issued, acknowledged: u64::MAX, acknowledged_us: u64::MAX };
        let number = {
            let mut log = self.log.lock().expect("the test does not panic with it");
            log.push(entry);
            log.len() as u64
        };
        let content = self.content(&entry, number);
        let began = Instant::now();
        let done = self.until_answered(disk, |nbd| {
            let at = place.block * BLOCK_BYTES as u64;
            if zero { nbd.zero(at, content.len() as u32) } else { nbd.write(at, &content) }
        })?;
        if done.is_some() {
            self.shared.longest_us.fetch_max(began.elapsed().as_micros() as u64, Ordering::Relaxed);
            entry.acknowledged = self.shared.clock.fetch_add(1, Ordering::SeqCst);
            entry.acknowledged_us = unix_us();
            self.log.lock().expect("the test does not panic with it")[number as usize - 1] = entry;
        }
        Ok((number as usize, entry))
    }

    fn content(&self, entry: &Entry, number: u64) -> Vec<u8> {
        if entry.zero {
            return vec![0; entry.blocks as usize * BLOCK_BYTES];
        }
        let places = (0..u64::from(entry.blocks)).map(|n| Place { block: entry.place.block + n, ..entry.place });
        places.flat_map(|place| Stamp { writer: self.number, number, place }.content()).collect()
    }

    fn read_back(&mut self, (number, entry): (usize, Entry)) -> io::Result<()> {
        let wanted = self.content(&entry, number as u64);
        let at = entry.place.block * BLOCK_BYTES as u64;
        let read = self.until_answered(entry.place.disk as usize, |nbd| nbd.read(at, wanted.len() as u32))?;
        match read {
            Some(read) if read != wanted => {
                Err(io::Error::other(format!("write {number}, {entry:?}: read back as something else")))
            }
            _ => Ok(()),
        }
    }

    /// Sends a request again until it is answered; `None`: the test ended first.
    fn until_answered<T>(&mut self, disk: usize, mut request: impl FnMut(&mut Nbd) -> io::Result<T>) -> io::Result<Option<T>> {
        loop {
            if self.disks[disk].is_none() {
                let target = &self.shared.targets[disk];
                match Nbd::connect(&target.socket, &target.export) {
                    Ok(nbd) => self.disks[disk] = Some(nbd),
                    Err(error) if !is_lost(&error) => return Err(error),
                    Err(_) if self.stopped() => return Ok(None),
                    Err(_) => std::thread::sleep(CONNECT_EVERY),
                }
            }
            let Some(nbd) = self.disks[disk].as_mut() else { continue };
            match request(nbd) {
                Ok(answer) => return Ok(Some(answer)),
                Err(error) if !is_lost(&error) => return Err(error),
                Err(_) => {
                    self.disks[disk] = None;
                    self.shared.reconnections.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}
