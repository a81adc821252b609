//! The tap: the layer between an export and a disk that knows which blocks change.
//!
//! Reads never wait for anything but the disk. Writes wait besides to copy a block that a capture still needs before it is overwritten,
//! and, if the user asked for it (`max_lag`), for their share of what the link carries. A flush waits for the receiver's commit if the
//! user asked for that (`flush-sync`).

use std::io;
use std::sync::Arc;
use std::time::Instant;

use blockdev::{BlockDevice, Buf, Extent, IoFuture, ZeroMode, read_blocks};
use proto::BlockExtent;
use proto::units::BLOCK_BYTES;

use crate::dirtylog::DirtyLog;
use crate::gate::Gate;
use crate::ledger::{CopiedRun, Copy, Ledger, Place, Range, Step, Ticket};
use crate::pace::Pace;
use crate::spec::Durability;

/// A disk whose changes are tracked.
pub(crate) struct Tap {
    device: Arc<dyn BlockDevice>,
    ledger: Arc<Ledger>,
    log: Arc<DirtyLog>,
    /// Takes the copies that do not fit memory.
    spill: Arc<dyn BlockDevice>,
    volume: usize,
    durability: Durability,
    pace: Option<Arc<Pace>>,
    gate: Option<Arc<Gate>>,
}

impl Tap {
    pub(crate) fn new(
        device: Arc<dyn BlockDevice>,
        ledger: Arc<Ledger>,
        log: Arc<DirtyLog>,
        spill: Arc<dyn BlockDevice>,
        volume: usize,
    ) -> Self {
        Self { device, ledger, log, spill, volume, durability: Durability::Async, pace: None, gate: None }
    }

    /// The same tap, with flushes answered as `durability` says.
    pub(crate) fn with_durability(self, durability: Durability) -> Self {
        Self { durability, ..self }
    }

    /// The same tap, with writes that keep to `pace`.
    pub(crate) fn with_pace(self, pace: Option<Arc<Pace>>) -> Self {
        Self { pace, ..self }
    }

    /// The same tap, with changes that `gate` may refuse.
    pub(crate) fn with_gate(self, gate: Arc<Gate>) -> Self {
        Self { gate: Some(gate), ..self }
    }

    /// Asked once a change is admitted.
    async fn pass_gate(&self) -> io::Result<()> {
        match &self.gate {
            Some(gate) => gate.pass().await,
            None => Ok(()),
        }
    }

    /// As [`pass_gate`](Self::pass_gate), for who may not wait; `None` if it would have to.
    fn check_gate(&self) -> Option<io::Result<()>> {
        match &self.gate {
            Some(gate) if gate.is_stopping() => None,
            Some(gate) => Some(gate.check()),
            None => Some(Ok(())),
        }
    }

    /// Waits until a change of `bytes` may be admitted. Nothing waits for a write that waits here.
    async fn keep_pace(&self, bytes: u64) {
        if let Some(pace) = &self.pace {
            pace.wait(bytes).await;
        }
    }

    /// Admission of a change of `length` bytes at `offset`: marks it, makes sure that the dirty log has it, then copies what a capture
    /// still needs of it. The mark comes first: regions without a mark are those that the log may forget.
    ///
    /// While the log is written it is in flight no more, and is admitted again behind it: a capture waits for what is in flight, and others' writes
    /// for the capture, but none of them for a sync of the log. The marks stay.
    async fn admit(&self, offset: u64, length: u64) -> io::Result<Ticket<'_>> {
        let range = Range::of_bytes(self.volume, offset, length);
        let mut aside = None;
        let ticket = loop {
            let ticket = self.ledger.admit(range, Instant::now);
            if sabotaged() || self.log.covers(&range) {
                break ticket;
            }
            aside = Some(self.ledger.step_aside(ticket));
            linger().await;
            self.log.cover(&range).await?;
            linger().await;
        };
        drop(aside);
        loop {
            let changed = self.ledger.changed().notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            match self.ledger.step(&ticket, &range) {
                Step::Issue => return Ok(ticket),
                Step::Wait => changed.await,
                Step::Copy { claim, runs } => {
                    let guard = ClaimGuard { ledger: &self.ledger, claim, done: false };
                    guard.finish(self.copy(&runs).await);
                }
            }
        }
    }

    async fn copy(&self, runs: &[BlockExtent]) -> Option<Vec<CopiedRun>> {
        let mut copies = Vec::with_capacity(runs.len());
        for run in runs {
            match self.copy_run(*run).await {
                Ok(content) => copies.push(CopiedRun { volume: self.volume, extent: *run, content: content? }),
                Err(error) => {
                    let block = run.start.0;
                    tracing::error!(block, %error, "cannot keep a block before it is overwritten; the epoch is given up and merged");
                    return None;
                }
            }
        }
        Some(copies)
    }
}

impl Tap {
    /// `None` if there is no room for the copy.
    async fn copy_run(&self, run: BlockExtent) -> io::Result<Option<Copy>> {
        let content = read_blocks(&*self.device, run).await?;
        Ok(match self.ledger.place_copy(content.len() as u64) {
            Place::Memory => Some(Copy::Memory(content)),
            Place::Spill(offset) => {
                let full = |error: io::Error| {
                    io::Error::new(error.kind(), format!("spill file: {error}; state_dir needs space up to spill_limit"))
                };
                self.spill.write(offset, content).await.map_err(full)?;
                Some(Copy::Spilled(offset))
            }
            Place::Nowhere => None,
        })
    }
}

/// Whether the simulator wants to see that it notices when the dirty log is skipped.
fn sabotaged() -> bool {
    #[cfg(feature = "simulation")]
    return crate::sim::is_sabotaged(crate::sim::Sabotage::SkipDirtyLog);
    #[cfg(not(feature = "simulation"))]
    false
}

/// Waits for as long as the simulator likes: much may happen while the log is written.
async fn linger() {
    #[cfg(feature = "simulation")]
    crate::sim::linger().await;
}

/// Whether the simulator wants to see that it notices when flushes do not wait for the receiver.
fn answers_early() -> bool {
    #[cfg(feature = "simulation")]
    return crate::sim::is_sabotaged(crate::sim::Sabotage::AnswerFlushEarly);
    #[cfg(not(feature = "simulation"))]
    false
}

/// Ends a claim also when the write that made it is dropped half way: others wait for it.
struct ClaimGuard<'a> {
    ledger: &'a Ledger,
    claim: u64,
    done: bool,
}

impl ClaimGuard<'_> {
    fn finish(mut self, runs: Option<Vec<CopiedRun>>) {
        self.done = true;
        self.ledger.copied(self.claim, runs);
    }
}

impl Drop for ClaimGuard<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.ledger.copied(self.claim, None);
        }
    }
}

impl BlockDevice for Tap {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn read_only(&self) -> bool {
        self.device.read_only()
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a, Buf> {
        self.device.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, data: Buf) -> IoFuture<'a, Buf> {
        Box::pin(async move {
            if data.is_empty() {
                return Ok(data);
            }
            self.keep_pace(data.len() as u64).await;
            self.pass_gate().await?;
            let _ticket = self.admit(offset, data.len() as u64).await?;
            self.pass_gate().await?;
            self.device.write(offset, data).await
        })
    }

    /// In `flush-sync` the cut is asked for first, so that the epoch travels while the local disk flushes.
    fn flush<'a>(&'a self) -> IoFuture<'a, ()> {
        match self.durability {
            Durability::Async => self.device.flush(),
            Durability::FlushSync => Box::pin(async move {
                let ticket = self.ledger.begin_flush(Instant::now());
                self.device.flush().await?;
                if answers_early() {
                    return Ok(());
                }
                Ok(ticket.committed().await?)
            }),
        }
    }

    fn write_zeroes<'a>(&'a self, offset: u64, length: u64, mode: ZeroMode) -> IoFuture<'a, ()> {
        Box::pin(async move {
            if length == 0 {
                return Ok(());
            }
            // However long: zeroes travel as an extent.
            self.keep_pace(BLOCK_BYTES).await;
            self.pass_gate().await?;
            let _ticket = self.admit(offset, length).await?;
            self.pass_gate().await?;
            self.device.write_zeroes(offset, length, mode).await
        })
    }

    /// A trimmed range reads as zeroes afterwards: what a trim leaves would otherwise be the device's whim, and the two sites
    /// could not agree on it.
    fn trim<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
        self.write_zeroes(offset, length, ZeroMode { may_unmap: true, fast_only: false })
    }

    fn extents<'a>(&'a self, offset: u64, length: u64, extents_max: usize) -> IoFuture<'a, Vec<Extent>> {
        self.device.extents(offset, length, extents_max)
    }

    fn cache<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
        self.device.cache(offset, length)
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        self.device.try_read(offset, buf)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Option<io::Result<()>> {
        if data.is_empty() {
            return Some(Ok(()));
        }
        if self.pace.as_ref().is_some_and(|pace| !pace.passes(data.len() as u64, Instant::now)) {
            return None;
        }
        // A write that may not be made leaves no mark if that is known before it is admitted.
        if let Err(error) = self.check_gate()? {
            return Some(Err(error));
        }
        let range = Range::of_bytes(self.volume, offset, data.len() as u64);
        let _ticket = self.ledger.try_admit(range, Instant::now)?;
        if let Err(error) = self.check_gate()? {
            return Some(Err(error));
        }
        if !self.log.covers(&range) {
            // Its marks stay; the write proper will make the same.
            return None;
        }
        self.device.try_write(offset, data)
    }
}

#[cfg(test)]
mod tests;
