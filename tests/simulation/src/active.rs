//! The activated copy and its guest: what it holds, what of it is durable, and what a crash may make of it.
//!
//! Its guest writes, zeroes, flushes and reads, several at once, never two changes of one block at a time: so the model is exact.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use blockdev::{BlockDevice, Buf, ZeroMode};
use parking_lot::Mutex;
use proto::{BLOCK_BYTES, Generation, Point};
use rand::Rng;
use rand::rngs::SmallRng;

use crate::check::Images;
use crate::recovery::ActiveCopy;

/// Guest operations at once.
const OPERATIONS_MAX: usize = 4;

/// A change that was made or tried and is not known to be durable.
struct Change {
    number: u64,
    volume: usize,
    offset: usize,
    data: Vec<u8>,
    done: bool,
}

enum Kind {
    /// A change of that number.
    Change(u64),
    /// Covers these changes.
    Flush(Vec<u64>),
    Read(Arc<Mutex<Vec<u8>>>),
}

struct Operation {
    future: Pin<Box<dyn Future<Output = std::io::Result<()>>>>,
    begun: bool,
    kind: Kind,
    volume: usize,
    range: std::ops::Range<usize>,
    data: Vec<u8>,
}

/// See the module.
pub(crate) struct Active {
    pub(crate) generation: Generation,
    pub(crate) point: Point,
    /// What its guest reads.
    pub(crate) image: Images,
    durable: Images,
    since: Vec<Change>,
    /// Changes that its guest has begun.
    pub(crate) changes: u64,
    operations: Vec<Operation>,
    devices: Vec<Arc<dyn BlockDevice>>,
    /// Blocks that its guest changed since it was activated, or began to: a kill may have come before the answer.
    pub(crate) written: std::collections::BTreeSet<(usize, u64)>,
}

/// Reads a device whose files answer at once.
fn read_now(device: &dyn BlockDevice, range: std::ops::Range<usize>) -> Result<Vec<u8>, String> {
    let mut read = device.read(range.start as u64, Buf::zeroed(range.len()));
    match read.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Ok(buf)) => Ok(buf.to_vec()),
        Poll::Ready(Err(error)) => Err(error.to_string()),
        Poll::Pending => Err("a read of the copy waits".to_owned()),
    }
}

impl Active {
    /// A copy that was activated just now, or is found so, from a point with this image.
    pub(crate) fn new(copy: ActiveCopy, image: Images) -> Result<Self, String> {
        let ActiveCopy { generation, point, devices } = copy;
        let mut this = Self {
            generation,
            point,
            durable: image.clone(),
            image,
            since: Vec::new(),
            changes: 0,
            operations: Vec::new(),
            devices,
            written: Default::default(),
        };
        this.compare()?;
        Ok(this)
    }

    /// The receiver is gone, and the copy's guest with it.
    pub(crate) fn fall(&mut self) {
        self.operations.clear();
        self.devices.clear();
    }

    /// Whether nothing is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.operations.is_empty()
    }

    pub(crate) fn is_up(&self) -> bool {
        !self.devices.is_empty()
    }

    /// Another process opened it, on what the former one left: each byte is what was durable, or what was written there since.
    pub(crate) fn revive(&mut self, copy: ActiveCopy) -> Result<(), String> {
        self.devices = copy.devices;
        self.compare()?;
        self.since.clear();
        self.durable = self.image.clone();
        Ok(())
    }

    /// Looks at all of it, and takes over what it holds.
    fn compare(&mut self) -> Result<(), String> {
        for (volume, device) in self.devices.iter().enumerate() {
            let found = read_now(&**device, 0..self.durable[volume].len())?;
            for (at, byte) in found.iter().enumerate() {
                let wrote = |c: &Change| c.volume == volume && c.offset <= at && c.data.get(at - c.offset) == Some(byte);
                if self.durable[volume][at] != *byte && !self.since.iter().any(wrote) {
                    let want = self.durable[volume][at];
                    return Err(format!(
                        "byte {at} of volume {volume} of the active copy is {byte}, it was {want}, and nobody wrote it"
                    ));
                }
            }
            self.image[volume] = found;
        }
        Ok(())
    }

    /// What its disks hold is what the model says.
    pub(crate) fn check(&self) -> Result<(), String> {
        for (volume, (device, image)) in self.devices.iter().zip(&self.image).enumerate() {
            let found = read_now(&**device, 0..image.len())?;
            if let Some(at) = found.iter().zip(image).position(|(a, b)| a != b) {
                let (have, want) = (found[at], image[at]);
                return Err(format!("byte {at} of volume {volume} of the active copy is {have}, its guest wrote {want}"));
            }
        }
        Ok(())
    }

    /// Its guest begins something.
    pub(crate) fn operate(&mut self, rng: &mut SmallRng) {
        if self.operations.len() >= OPERATIONS_MAX || self.devices.is_empty() {
            return;
        }
        let volume = rng.random_range(0..self.devices.len());
        let device = self.devices[volume].clone();
        let size = device.size() as usize;
        let offset = rng.random_range(0..size);
        let length = rng.random_range(1..=3 * BLOCK_BYTES as usize).min(size - offset);
        let block = BLOCK_BYTES as usize;
        let blocks = |r: &std::ops::Range<usize>| r.start / block..r.end.div_ceil(block);
        let ours = blocks(&(offset..offset + length));
        let choice = rng.random_range(0..10);
        let overlaps = |o: &Operation| {
            let theirs = blocks(&o.range);
            o.volume == volume && theirs.start < ours.end && ours.start < theirs.end
        };
        if choice > 0 && self.operations.iter().any(overlaps) {
            return;
        }
        let byte = if choice < 3 { 0 } else { rng.random_range(1..=255_u8) };
        let data: Vec<u8> = (0..length).map(|i| if byte == 0 { 0 } else { byte.wrapping_add((i / 512) as u8) }).collect();
        let seen: Arc<Mutex<Vec<u8>>> = Arc::default();
        let (kind, read, written) = match choice {
            0 => (Kind::Flush(Vec::new()), None, None),
            1 => (Kind::Read(seen.clone()), Some(seen), None),
            _ => {
                self.changes += 1;
                (Kind::Change(self.changes), None, Some(data.clone()))
            }
        };
        let future = Box::pin(async move {
            match (read, written) {
                (Some(seen), _) => *seen.lock() = device.read(offset as u64, Buf::zeroed(length)).await?.to_vec(),
                (None, None) => device.flush().await?,
                (None, Some(_)) if choice == 2 => {
                    device.write_zeroes(offset as u64, length as u64, ZeroMode::default()).await?;
                }
                (None, Some(data)) => drop(device.write(offset as u64, Buf::copy_of(&data)).await?),
            }
            Ok(())
        });
        let range = if choice == 0 { 0..0 } else { offset..offset + length };
        self.operations.push(Operation { future, begun: false, kind, volume, range, data });
    }

    /// Polls one of its operations. Returns whether a change was acknowledged, or the error that its guest got.
    pub(crate) fn poll(&mut self, rng: &mut SmallRng) -> Result<Result<bool, String>, String> {
        if self.operations.is_empty() {
            return Ok(Ok(false));
        }
        let index = rng.random_range(0..self.operations.len());
        let operation = &mut self.operations[index];
        if !std::mem::replace(&mut operation.begun, true) {
            match &mut operation.kind {
                Kind::Change(number) => {
                    let (volume, range) = (operation.volume, &operation.range);
                    self.since.push(Change {
                        number: *number,
                        volume,
                        offset: range.start,
                        data: operation.data.clone(),
                        done: false,
                    });
                    let blocks = range.start as u64 / BLOCK_BYTES..(range.end as u64).div_ceil(BLOCK_BYTES);
                    self.written.extend(blocks.map(|block| (volume, block)));
                }
                Kind::Flush(covers) => *covers = self.since.iter().filter(|c| c.done).map(|c| c.number).collect(),
                Kind::Read(_) => {}
            }
        }
        let Poll::Ready(result) = operation.future.as_mut().poll(&mut Context::from_waker(Waker::noop())) else {
            return Ok(Ok(false));
        };
        let Operation { kind, volume, range, data, .. } = self.operations.swap_remove(index);
        if let Err(error) = result {
            // It may have been made in part.
            if let (Kind::Change(_), Some(device)) = (&kind, self.devices.get(volume)) {
                // What cannot be read was not changed: it is read before a part of it is.
                let found = read_now(&**device, range.clone()).unwrap_or_else(|_| self.image[volume][range.clone()].to_vec());
                let old = &self.image[volume][range.clone()];
                if let Some(at) = found.iter().zip(old.iter().zip(&data)).position(|(f, (o, n))| f != o && f != n) {
                    return Err(format!(
                        "byte {} of volume {volume} is neither old nor new after a write that failed",
                        range.start + at
                    ));
                }
                self.image[volume][range].copy_from_slice(&found);
            }
            return Ok(Err(error.to_string()));
        }
        match kind {
            Kind::Change(number) => {
                self.image[volume][range.clone()].copy_from_slice(&data);
                self.since.iter_mut().filter(|c| c.number == number).for_each(|c| c.done = true);
                Ok(Ok(true))
            }
            Kind::Flush(covers) => {
                // A flush is of one volume.
                let covers = |c: &Change| c.volume == volume && covers.contains(&c.number);
                for change in self.since.iter().filter(|c| covers(c)) {
                    self.durable[volume][change.offset..change.offset + change.data.len()].copy_from_slice(&change.data);
                }
                self.since.retain(|c| !covers(c));
                Ok(Ok(false))
            }
            Kind::Read(seen) => {
                let (seen, now) = (seen.lock(), &self.image[volume][range.clone()]);
                match seen.iter().zip(now).position(|(a, b)| a != b) {
                    None => Ok(Ok(false)),
                    Some(at) => {
                        Err(format!("byte {} of volume {volume} of the active copy was read and never written", range.start + at))
                    }
                }
            }
        }
    }
}
