//! The guest and its disks: operations of random shape, and a disk that takes its time and remembers what reached it.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use blockdev::{BlockDevice, Buf, CrashDevice, Extent, IoFuture, ZeroMode};
use parking_lot::Mutex;
use proto::BLOCK_BYTES;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

thread_local! {
    /// The tag of the guest operation that is being polled.
    static TAG: Cell<u64> = const { Cell::new(0) };
}

/// A change that reached a disk.
#[derive(Clone, Debug)]
pub(crate) struct Applied {
    pub(crate) tag: u64,
    pub(crate) volume: usize,
    pub(crate) offset: usize,
    pub(crate) data: Vec<u8>,
}

/// A disk that answers after a random number of polls, before and after it did what it was asked.
pub(crate) struct SlowDisk {
    volume: usize,
    pub(crate) disk: Arc<CrashDevice>,
    applied: Arc<Mutex<Vec<Applied>>>,
    random: Mutex<SmallRng>,
}

impl SlowDisk {
    pub(crate) fn new(volume: usize, disk: Arc<CrashDevice>, applied: Arc<Mutex<Vec<Applied>>>, seed: u64) -> Self {
        Self { volume, disk, applied, random: Mutex::new(SmallRng::seed_from_u64(seed)) }
    }

    async fn dawdle(&self) {
        let times = self.random.lock().random_range(0..4);
        for _ in 0..times {
            pause().await;
        }
    }
}

/// Pending once.
async fn pause() {
    let mut paused = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut paused, true) {
            return Poll::Ready(());
        }
        // A set of futures polls those that were woken only.
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

impl BlockDevice for SlowDisk {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read<'a>(&'a self, offset: u64, mut buf: Buf) -> IoFuture<'a, Buf> {
        Box::pin(async move {
            self.dawdle().await;
            // A read is not atomic either: its halves may see different instants.
            let (at, half) = (offset as usize, buf.len() / 2);
            let length = buf.len();
            buf[..half].copy_from_slice(&self.disk.snapshot()[at..at + half]);
            self.dawdle().await;
            buf[half..].copy_from_slice(&self.disk.snapshot()[at + half..at + length]);
            Ok(buf)
        })
    }

    fn write<'a>(&'a self, offset: u64, data: Buf) -> IoFuture<'a, Buf> {
        let tag = TAG.get();
        Box::pin(async move {
            self.dawdle().await;
            let back = self.disk.write(offset, data).await?;
            self.applied.lock().push(Applied { tag, volume: self.volume, offset: offset as usize, data: back.to_vec() });
            self.dawdle().await;
            Ok(back)
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a, ()> {
        Box::pin(async move {
            self.dawdle().await;
            self.disk.flush().await
        })
    }

    fn write_zeroes<'a>(&'a self, offset: u64, length: u64, _mode: ZeroMode) -> IoFuture<'a, ()> {
        Box::pin(async move { self.write(offset, Buf::zeroed(length as usize)).await.map(drop) })
    }

    fn trim<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
        self.write_zeroes(offset, length, ZeroMode::default())
    }

    fn extents<'a>(&'a self, offset: u64, length: u64, extents_max: usize) -> IoFuture<'a, Vec<Extent>> {
        self.disk.extents(offset, length, extents_max)
    }
}

/// A guest operation under way.
pub(crate) struct Operation {
    future: Pin<Box<dyn Future<Output = std::io::Result<()>>>>,
    /// Set when it is polled first: that is when it is admitted.
    tag: Option<u64>,
    volume: usize,
    /// What it changes; `None` for a flush.
    change: Option<std::ops::Range<usize>>,
    /// Of a flush that began.
    covers: Option<Covered>,
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
    pub(crate) fn random(tap: Arc<dyn BlockDevice>, volume: usize, rng: &mut SmallRng) -> Self {
        let size = tap.size();
        let offset = match rng.random_range(0..3) {
            0 => rng.random_range(0..size / BLOCK_BYTES) * BLOCK_BYTES,
            _ => rng.random_range(0..size),
        };
        let longest = if rng.random_bool(0.1) { size } else { 3 * BLOCK_BYTES };
        let length = rng.random_range(1..=longest).min(size - offset);
        let kind = rng.random_range(0..10);
        let byte = rng.random_range(1..=255_u8);
        let future: Pin<Box<dyn Future<Output = std::io::Result<()>>>> = Box::pin(async move {
            match kind {
                0 => tap.flush().await,
                1 => tap.write_zeroes(offset, length, ZeroMode::default()).await,
                _ => {
                    let mut data = Buf::zeroed(length as usize);
                    for (i, b) in data.iter_mut().enumerate() {
                        *b = byte.wrapping_add((i / 512) as u8);
                    }
                    tap.write(offset, data).await.map(drop)
                }
            }
        });
        let change = (kind > 0).then_some(offset as usize..(offset + length) as usize);
        Self { future, tag: None, volume, change, covers: None }
    }

    /// Whether it is a flush.
    pub(crate) fn is_flush(&self) -> bool {
        self.change.is_none()
    }

    /// Whether it is a flush that has yet to be polled.
    pub(crate) fn begins(&self) -> bool {
        self.is_flush() && self.tag.is_none()
    }

    /// What a flush that begins now covers.
    pub(crate) fn covered(operations: &[Self], applied: usize) -> Covered {
        let open = operations.iter().filter_map(|o| Some((o.volume, o.change.clone()?)));
        Covered { applied, open: open.collect() }
    }

    /// See [`Covered`].
    pub(crate) fn set_covers(&mut self, covers: Covered) {
        self.covers = Some(covers);
    }

    /// What it covered when it began, if it is a flush.
    pub(crate) fn take_covers(&mut self) -> Option<Covered> {
        self.covers.take()
    }

    /// Polls it once. `tag` is what a write gets that is admitted now.
    pub(crate) fn poll(&mut self, tag: u64) -> Poll<std::io::Result<()>> {
        TAG.set(*self.tag.get_or_insert(tag));
        self.future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
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
