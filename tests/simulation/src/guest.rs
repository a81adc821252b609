//! The guest: writes, zeroes, flushes and reads of random shape, several at once, and what it may expect of each.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use blockdev::{BlockDevice, Buf, ZeroMode};
use parking_lot::Mutex;
use proto::BLOCK_BYTES;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::disk::{Applied, set_tag};
use crate::primary::{admitted, set_admitted};

/// A guest operation under way.
pub(crate) struct Operation {
    future: Pin<Box<dyn Future<Output = std::io::Result<()>>>>,
    /// Whether it was polled.
    begun: bool,
    /// Under which it was admitted last, 0 before that.
    tag: u64,
    volume: usize,
    kind: Kind,
    /// What it changes or reads; nothing for a flush.
    range: std::ops::Range<usize>,
    /// Of a flush that began.
    covers: Option<Covered>,
    /// It began when guests might not write, as was recorded.
    was_stopped: bool,
    /// Changes that had reached a disk when it began.
    applied: usize,
    /// What it read.
    seen: Arc<Mutex<Vec<u8>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Flush,
    Zero,
    Read,
    Write,
}

/// What was acknowledged when a flush began.
#[derive(Debug)]
pub(crate) struct Covered {
    /// So many changes had reached a disk.
    applied: usize,
    /// Where changes were under way: nothing is said about these.
    open: Vec<(usize, std::ops::Range<usize>)>,
}

impl Covered {
    /// Checks that `image` holds all that is covered. `applied` are the changes until now: where a later one went, nothing is said either.
    pub(crate) fn check(&self, applied: &[Applied], image: &[Vec<u8>]) -> Result<(), String> {
        let mut wanted: Vec<Vec<Option<u8>>> = image.iter().map(|v| vec![None; v.len()]).collect();
        for (index, change) in applied.iter().enumerate() {
            for (at, byte) in change.data.iter().enumerate() {
                wanted[change.volume][change.offset + at] = (index < self.applied).then_some(*byte);
            }
        }
        for (volume, range) in &self.open {
            wanted[*volume][range.clone()].fill(None);
        }
        for (volume, (wanted, image)) in wanted.iter().zip(image).enumerate() {
            let differs = wanted.iter().zip(image).position(|(w, i)| w.is_some_and(|w| w != *i));
            if let Some(at) = differs {
                return Err(format!("byte {at} of volume {volume} was acknowledged before the flush and is not there"));
            }
        }
        Ok(())
    }
}

impl Operation {
    /// An operation of random shape on a volume of the primary.
    pub(crate) fn random(tap: Arc<dyn BlockDevice>, volume: usize, is_noise: bool, rng: &mut SmallRng) -> Self {
        let size = tap.size();
        let offset = match rng.random_range(0..3) {
            0 => rng.random_range(0..size / BLOCK_BYTES) * BLOCK_BYTES,
            _ => rng.random_range(0..size),
        };
        let longest = if rng.random_bool(0.1) { size } else { 3 * BLOCK_BYTES };
        let length = rng.random_range(1..=longest).min(size - offset);
        let kind = match rng.random_range(0..11) {
            0 => Kind::Flush,
            1 => Kind::Zero,
            2 => Kind::Read,
            _ => Kind::Write,
        };
        let byte = rng.random_range(1..=255_u8);
        let seen: Arc<Mutex<Vec<u8>>> = Arc::default();
        let read = seen.clone();
        let future: Pin<Box<dyn Future<Output = std::io::Result<()>>>> = Box::pin(async move {
            match kind {
                Kind::Flush => tap.flush().await,
                Kind::Zero => tap.write_zeroes(offset, length, ZeroMode::default()).await,
                Kind::Read => {
                    *read.lock() = tap.read(offset, Buf::zeroed(length as usize)).await?.to_vec();
                    Ok(())
                }
                Kind::Write => {
                    let mut data = Buf::zeroed(length as usize);
                    for (i, b) in data.iter_mut().enumerate() {
                        *b = byte.wrapping_add((i / 512) as u8);
                    }
                    if is_noise {
                        SmallRng::seed_from_u64(offset ^ u64::from(byte) << 48).fill(&mut data[..]);
                    }
                    tap.write(offset, data).await.map(drop)
                }
            }
        });
        let range = if kind == Kind::Flush { 0..0 } else { offset as usize..(offset + length) as usize };
        Self { future, begun: false, tag: 0, volume, kind, range, covers: None, was_stopped: false, applied: 0, seen }
    }

    /// Whether it is a flush.
    pub(crate) fn is_flush(&self) -> bool {
        self.kind == Kind::Flush
    }

    /// Whether it is a flush that has yet to be polled.
    pub(crate) fn begins(&self) -> bool {
        self.is_flush() && !self.begun
    }

    /// Whether it has yet to be polled, and now it will be.
    pub(crate) fn note_stopped(&mut self, is_stopped: bool) {
        if !self.begun {
            self.was_stopped = is_stopped;
        }
    }

    /// Whether it is a change, and if so, whether guests might not write when it began.
    pub(crate) fn change(&self) -> Option<bool> {
        matches!(self.kind, Kind::Write | Kind::Zero).then_some(self.was_stopped)
    }

    /// What a flush that begins now covers.
    pub(crate) fn covered(operations: &[Self], applied: usize) -> Covered {
        let changes = operations.iter().filter(|o| matches!(o.kind, Kind::Write | Kind::Zero));
        Covered { applied, open: changes.map(|o| (o.volume, o.range.clone())).collect() }
    }

    /// See [`Covered`].
    pub(crate) fn set_covers(&mut self, covers: Covered) {
        self.covers = Some(covers);
    }

    /// What it covered when it began, if it is a flush.
    pub(crate) fn take_covers(&mut self) -> Option<Covered> {
        self.covers.take()
    }

    /// Polls it once. `applied` are the changes that have reached a disk.
    pub(crate) fn poll(&mut self, applied: usize) -> Poll<std::io::Result<()>> {
        if !self.begun {
            self.applied = applied;
        }
        self.begun = true;
        set_tag(None);
        set_admitted(self.tag);
        let polled = self.future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        self.tag = admitted();
        polled
    }

    /// Checks what it read, if it did: every byte is what it was when it began, or came there since.
    pub(crate) fn check_read(&self, base: &[Vec<u8>], applied: &[Applied]) -> Result<(), String> {
        if self.kind != Kind::Read {
            return Ok(());
        }
        let seen = self.seen.lock();
        let mut before = base[self.volume][self.range.clone()].to_vec();
        let mut right = vec![false; seen.len()];
        for (index, change) in applied.iter().enumerate().filter(|(_, c)| c.volume == self.volume) {
            let (from, to) = (change.offset.max(self.range.start), (change.offset + change.data.len()).min(self.range.end));
            for at in from..to {
                let (byte, here) = (change.data[at - change.offset], at - self.range.start);
                if index < self.applied {
                    before[here] = byte;
                } else {
                    right[here] |= seen[here] == byte;
                }
            }
        }
        for (right, (seen, before)) in right.iter_mut().zip(seen.iter().zip(&before)) {
            *right |= seen == before;
        }
        match right.iter().position(|right| !right) {
            None => Ok(()),
            Some(at) => Err(format!("byte {} of volume {} was read and never written", self.range.start + at, self.volume)),
        }
    }
}

/// The image of a volume after the changes with `tag` or a lower one.
pub(crate) fn image(base: &[Vec<u8>], applied: &[Applied], tag: u64) -> Vec<Vec<u8>> {
    let mut image = base.to_vec();
    for change in applied.iter().filter(|c| c.tag <= tag) {
        image[change.volume][change.offset..change.offset + change.data.len()].copy_from_slice(&change.data);
    }
    image
}
