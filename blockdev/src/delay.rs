//! A layer that makes operations wait, for tests: for a fixed time, or at a gate until the test opens it.
//!
//! The gate makes orders of events certain without sleeping: hold, start an operation, wait until it is held, do the other
//! thing, release.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::fault::Operation;
use crate::{BlockDevice, Buf, Extent, IoFuture, ZeroMode};

/// The device below, slower.
pub struct DelayDevice {
    inner: Arc<dyn BlockDevice>,
    delay: Duration,
    gate: watch::Sender<Gate>,
}

#[derive(Clone, Debug, Default)]
struct Gate {
    closed: Vec<Operation>,
    held: usize,
}

impl DelayDevice {
    /// Every operation waits for `delay` before it starts.
    #[must_use]
    pub fn new(inner: Arc<dyn BlockDevice>, delay: Duration) -> Self {
        Self { inner, delay, gate: watch::Sender::new(Gate::default()) }
    }

    /// From now on, operations of this kind wait, before they touch the device below, until [`release`](Self::release).
    pub fn hold(&self, operation: Operation) {
        self.gate.send_modify(|gate| gate.closed.push(operation));
    }

    /// Lets everything go on.
    pub fn release(&self) {
        self.gate.send_modify(|gate| gate.closed.clear());
    }

    /// Waits until at least `count` operations are held at the gate.
    pub async fn until_held(&self, count: usize) {
        // The sender lives as long as `self`.
        let _ = self.gate.subscribe().wait_for(|gate| gate.held >= count).await;
    }

    async fn wait(&self, operation: Operation) {
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
        if !self.gate.borrow().closed.contains(&operation) {
            return;
        }
        let _held = Held::new(&self.gate);
        let _ = self.gate.subscribe().wait_for(|gate| !gate.closed.contains(&operation)).await;
    }

    fn at_once(&self) -> bool {
        self.delay.is_zero() && self.gate.borrow().closed.is_empty()
    }
}

/// Counts an operation at the gate, also one that is dropped there.
struct Held<'a>(&'a watch::Sender<Gate>);

impl<'a> Held<'a> {
    fn new(gate: &'a watch::Sender<Gate>) -> Self {
        gate.send_modify(|gate| gate.held += 1);
        Self(gate)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|gate| gate.held -= 1);
    }
}

impl std::fmt::Debug for DelayDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DelayDevice").field("delay", &self.delay).finish_non_exhaustive()
    }
}

impl BlockDevice for DelayDevice {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a, Buf> {
        Box::pin(async move {
            self.wait(Operation::Read).await;
            self.inner.read(offset, buf).await
        })
    }

    fn write<'a>(&'a self, offset: u64, data: Buf) -> IoFuture<'a, Buf> {
        Box::pin(async move {
            self.wait(Operation::Write).await;
            self.inner.write(offset, data).await
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a, ()> {
        Box::pin(async move {
            self.wait(Operation::Flush).await;
            self.inner.flush().await
        })
    }

    fn write_zeroes<'a>(&'a self, offset: u64, length: u64, mode: ZeroMode) -> IoFuture<'a, ()> {
        Box::pin(async move {
            self.wait(Operation::WriteZeroes).await;
            self.inner.write_zeroes(offset, length, mode).await
        })
    }

    fn trim<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
        Box::pin(async move {
            self.wait(Operation::Trim).await;
            self.inner.trim(offset, length).await
        })
    }

    fn extents<'a>(&'a self, offset: u64, length: u64, extents_max: usize) -> IoFuture<'a, Vec<Extent>> {
        Box::pin(async move {
            self.wait(Operation::Extents).await;
            self.inner.extents(offset, length, extents_max).await
        })
    }

    fn cache<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
        self.inner.cache(offset, length)
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        if self.at_once() { self.inner.try_read(offset, buf) } else { None }
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Option<io::Result<()>> {
        if self.at_once() { self.inner.try_write(offset, data) } else { None }
    }
}
