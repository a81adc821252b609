//! The write load: writers that each write one block after the other and note when each write was issued and when it was
//! acknowledged. What they noted is what the copy is held against.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::stamp::{BLOCK, Stamp, mix};
use crate::cli::human::unix_us_now;
use crate::nbd::Disk;

/// Writers; each owns every fourth block.
pub(super) const WRITERS: u64 = 4;
/// A writer flushes after this many writes.
const FLUSH_EVERY: u64 = 64;
/// One write in five goes anywhere, the others to this part of the disk: databases have warm pages too.
const WARM_DIVISOR: u64 = 16;

/// A clock that runs evenly and tells microseconds since 1970.
#[derive(Clone, Copy)]
pub(super) struct Clock {
    began: Instant,
    began_unix_us: u64,
}

impl Clock {
    pub(super) fn new() -> Self {
        Self { began: Instant::now(), began_unix_us: unix_us_now() }
    }

    pub(super) fn now_us(&self) -> u64 {
        self.began_unix_us + u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX / 2)
    }
}

/// One write.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) block: u64,
    /// Microseconds since 1970.
    pub(super) issued_us: u64,
    /// The same; `u64::MAX`: never acknowledged.
    pub(super) acknowledged_us: u64,
}

/// All that a writer did, in its order: entry `n` is its write number `n`.
pub(super) type Log = Vec<Entry>;

/// The writers at work.
pub(super) struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    writers: Vec<JoinHandle<io::Result<Log>>>,
}

struct Writer {
    client: Disk,
    clock: Clock,
    run: u64,
    number: u64,
    pause: Duration,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
}

impl Load {
    /// Starts the writers on the export `disk` at `socket`.
    pub(super) fn start(socket: &Path, disk: &str, run: u64, clock: Clock, writes_per_second: u32) -> io::Result<Self> {
        let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let pause = Duration::from_secs_f64(WRITERS as f64 / f64::from(writes_per_second));
        let mut writers = Vec::new();
        for number in 0..WRITERS {
            let client = Disk::connect(socket, disk)?;
            let writer = Writer { client, clock, run, number, pause, stop: stop.clone(), acknowledged: acknowledged.clone() };
            writers.push(std::thread::Builder::new().name(format!("writer-{number}")).spawn(move || writer.work())?);
        }
        Ok(Self { stop, acknowledged, writers })
    }

    /// Writes acknowledged so far.
    pub(super) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Whether a writer ended by itself, which only the loss of its disk makes it do.
    pub(super) fn broken(&self) -> bool {
        self.writers.iter().any(JoinHandle::is_finished)
    }

    /// Waits for the writers and returns what they noted.
    pub(super) fn finish(self) -> io::Result<Vec<Log>> {
        self.stop.store(true, Ordering::Relaxed);
        self.writers.into_iter().map(|w| w.join().map_err(|_| io::Error::other("a writer failed"))?).collect()
    }
}

impl Writer {
    fn work(mut self) -> io::Result<Log> {
        // A partial last block is left alone.
        let own_blocks = self.client.size() / BLOCK as u64 / WRITERS;
        if own_blocks == 0 {
            return Err(io::Error::other("the disk is smaller than four blocks"));
        }
        let mut log = Log::new();
        let mut random = self.run ^ self.number;
        let mut block_bytes = [0; BLOCK];
        let mut due = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            let range = if mix(&mut random).is_multiple_of(5) { own_blocks } else { (own_blocks / WARM_DIVISOR).max(1) };
            let block = mix(&mut random) % range * WRITERS + self.number;
            let sequence = log.len() as u64;
            Stamp { run: self.run, block, writer: self.number, sequence }.write(&mut block_bytes);
            log.push(Entry { block, issued_us: self.clock.now_us(), acknowledged_us: u64::MAX });
            if self.client.write(block * BLOCK as u64, &block_bytes).is_err() {
                break;
            }
            let now = self.clock.now_us();
            if let Some(entry) = log.last_mut() {
                entry.acknowledged_us = now;
            }
            self.acknowledged.fetch_add(1, Ordering::Relaxed);
            if (sequence + 1).is_multiple_of(FLUSH_EVERY) && self.client.flush().is_err() {
                break;
            }
            due += self.pause;
            match due.checked_duration_since(Instant::now()) {
                Some(wait) => std::thread::sleep(wait),
                // Behind: what was missed is not made up for, a burst would be another load than the one asked for.
                None => due = Instant::now(),
            }
        }
        Ok(log)
    }
}
