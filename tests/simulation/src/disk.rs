//! The guest's disk at the primary: takes its time, remembers what reached it, and fails when it is told to.
//!
//! What it injects: an answer after any number of steps, before and after the disk did what it was asked; reads that see two
//! instants; a read that fails; a write that fails after a part of its data, or all, reached the disk; a sync that fails, and with it every
//! later one until the disk is opened again, as `FileDevice` promises. Power losses: see `CrashDevice`.

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::task::Poll;

use blockdev::{BlockDevice, Buf, CrashDevice, Extent, IoFuture, ZeroMode};
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// How the error of a read or write begins that was made to fail.
pub(crate) const INJECTED: &str = "injected";

thread_local! {
    /// The tag of what is being polled; a guest's operation has that of its admission.
    static TAG: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Writes that are made now have `tag`; `None`: that under which they were admitted.
pub(crate) fn set_tag(tag: Option<u64>) {
    TAG.set(tag);
}

/// A change that reached a disk.
#[derive(Clone, Debug)]
pub(crate) struct Applied {
    pub(crate) tag: u64,
    pub(crate) volume: usize,
    pub(crate) offset: usize,
    pub(crate) data: Vec<u8>,
}

/// Operations that are still to fail.
#[derive(Debug, Default)]
pub(crate) struct Mishaps {
    pub(crate) reads: Cell<u32>,
    pub(crate) writes: Cell<u32>,
}

fn strikes(left: &Cell<u32>) -> bool {
    let now = left.get();
    left.set(now.saturating_sub(1));
    now > 0
}

/// See the module.
pub(crate) struct SlowDisk {
    volume: usize,
    disk: Arc<CrashDevice>,
    applied: Arc<Mutex<Vec<Applied>>>,
    mishaps: Arc<Mutex<Mishaps>>,
    random: Mutex<SmallRng>,
}

impl SlowDisk {
    pub(crate) fn new(
        volume: usize,
        disk: Arc<CrashDevice>,
        applied: Arc<Mutex<Vec<Applied>>>,
        mishaps: Arc<Mutex<Mishaps>>,
        seed: u64,
    ) -> Self {
        Self { volume, disk, applied, mishaps, random: Mutex::new(SmallRng::seed_from_u64(seed)) }
    }

    async fn dawdle(&self) {
        let times = self.random.lock().random_range(0..4);
        for _ in 0..times {
            pause().await;
        }
    }

    async fn put(&self, tag: u64, offset: u64, data: Buf) -> io::Result<Buf> {
        let back = self.disk.write(offset, data).await?;
        self.applied.lock().push(Applied { tag, volume: self.volume, offset: offset as usize, data: back.to_vec() });
        Ok(back)
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
            if strikes(&self.mishaps.lock().reads) {
                return Err(io::Error::other(format!("{INJECTED}: the read failed")));
            }
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
        let tag = TAG.get().unwrap_or_else(crate::primary::admitted);
        Box::pin(async move {
            self.dawdle().await;
            if strikes(&self.mishaps.lock().writes) {
                let done = self.random.lock().random_range(0..=data.len());
                if done > 0 {
                    self.put(tag, offset, Buf::copy_of(&data[..done])).await?;
                }
                self.dawdle().await;
                return Err(io::Error::other(format!("{INJECTED}: the write failed")));
            }
            let back = self.put(tag, offset, data).await?;
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
