//! One volume of a fork.
//!
//! A block is either wholly in the fork's data file (it is resident: written, or copied by flattening) or wholly the view's. A write of part of a block that is not the
//! fork's yet copies the block up under an exclusive lock. A bit is set in memory, and in the file that a killed process leaves (`recent`), when the data is in
//! the file, and on disk by a flush, after the data was synced.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blockdev::{BlockDevice, Buf, Extent, IoFuture, RangeLocks, ZeroMode};
use parking_lot::RwLock;
use proto::units::BLOCK_BYTES;

use super::data::Data;
use super::map::MapFile;
use super::own::Own;
use super::recent::Recent;
use super::under::Under;
use crate::view::View;

/// A writable overlay on a view, or on another fork; read-only if its data file is.
#[derive(Debug)]
pub struct ForkDevice {
    /// `None` once all blocks are resident.
    under: RwLock<Option<Under>>,
    /// As `Own::is_flat`, for who has no time to ask.
    flat: AtomicBool,
    pub(super) data: Data,
    map: MapFile,
    /// `None` if nobody may write, or the fork was flat when it was opened, or there is no space for it, or no kernel says when it was started.
    recent: Option<Recent>,
    pub(super) own: RwLock<Own>,
    pub(super) locks: RangeLocks,
    /// The map of touched regions, once there is one; held by whoever changes it.
    pub(super) touching: tokio::sync::Mutex<Option<MapFile>>,
    /// Requests so far, for those who give way to them.
    requests: AtomicU64,
    /// One flush at a time: the second one finds its pages written by the first.
    pub(super) flushing: tokio::sync::Mutex<()>,
    /// After a failed sync nobody knows what is on disk: every later flush fails.
    poisoned: AtomicBool,
    /// Held by every change while it is made; whoever takes it exclusively holds changes up, and says in the end whether there may be
    /// more of them.
    gate: Arc<tokio::sync::RwLock<Gate>>,
}

/// Whether a fork may be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    Open,
    /// Its primary has it back.
    GivenBack,
}

impl ForkDevice {
    /// `under` may be missing only if all of `own` is resident.
    pub(super) fn with(
        under: Option<Under>,
        data: Data,
        (map, recent): (MapFile, Option<Recent>),
        own: Own,
        touched: Option<MapFile>,
    ) -> Self {
        let is_flat = own.is_flat();
        Self {
            under: RwLock::new(under.filter(|_| !is_flat)),
            flat: AtomicBool::new(is_flat),
            data,
            map,
            recent,
            own: RwLock::new(own),
            locks: RangeLocks::default(),
            touching: tokio::sync::Mutex::new(touched),
            requests: AtomicU64::new(0),
            flushing: tokio::sync::Mutex::new(()),
            poisoned: AtomicBool::new(false),
            gate: Arc::new(tokio::sync::RwLock::new(Gate::Open)),
        }
    }

    /// The blocks that were written since the fork.
    pub(crate) fn written(&self) -> proto::DirtyMap {
        self.own.read().written.blocks.clone()
    }

    /// Holds changes up, once those under way are done, until the guard is dropped.
    pub(crate) async fn hold(&self) -> tokio::sync::OwnedRwLockWriteGuard<Gate> {
        Arc::clone(&self.gate).write_owned().await
    }

    /// As [`hold`](Self::hold), if nobody has to be waited for.
    #[cfg(any(test, feature = "simulation"))]
    pub(crate) fn try_hold(&self) -> Option<tokio::sync::OwnedRwLockWriteGuard<Gate>> {
        Arc::clone(&self.gate).try_write_owned().ok()
    }

    async fn enter(&self) -> io::Result<tokio::sync::RwLockReadGuard<'_, Gate>> {
        let gate = self.gate.read().await;
        match *gate {
            Gate::Open => Ok(gate),
            Gate::GivenBack => Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the disk was given back to its primary")),
        }
    }

    /// Bytes of blocks that were written since the fork.
    #[must_use]
    pub fn own_bytes(&self) -> u64 {
        self.own.read().written.blocks.bytes()
    }

    /// Bytes of blocks that are in the data file, written or copied.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        (self.own.read().resident_blocks() * BLOCK_BYTES).min(self.size())
    }

    /// Whether the data file is the whole disk.
    #[must_use]
    pub fn is_flat(&self) -> bool {
        self.flat.load(Ordering::Acquire)
    }

    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// The view, as long as the fork needs one; a fork on a fork has none.
    pub(super) fn view(&self) -> Option<Arc<View>> {
        match self.under()? {
            Under::View(view) => Some(view),
            Under::Kept(_) => None,
        }
    }

    fn under(&self) -> Option<Under> {
        self.under.read().clone()
    }

    /// What is under it, for a block that was not resident a moment ago; gone if it has become so.
    fn under_or_gone(&self) -> io::Result<Under> {
        self.under()
            .ok_or_else(|| io::Error::other("the view of the fork is gone, and not all of it was copied: this is a defect"))
    }

    /// Gets space for the bits of all blocks.
    pub(super) fn allocate_map(&self) -> io::Result<()> {
        self.map.allocate()
    }

    /// From here on the data file is the whole disk, and the view is not needed any more.
    pub(super) fn set_flat(&self) {
        self.flat.store(true, Ordering::Release);
        *self.under.write() = None;
    }

    /// Whether the block of byte `at` is resident, and where the run of such blocks ends (at most `end`).
    fn run_at(&self, at: u64, end: u64) -> (bool, u64) {
        if self.is_flat() {
            return (true, end);
        }
        let (resident, stop) = self.own.read().run(at / BLOCK_BYTES, end.div_ceil(BLOCK_BYTES));
        (resident, stop.saturating_mul(BLOCK_BYTES).min(end))
    }

    /// The data of these blocks is in the file.
    fn mark(&self, blocks: Range<u64>) -> io::Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        let mut own = self.own.write();
        // Once the copy is flat, that the block is there is on the disk, and that its region was touched: nothing is lost by a kill, and a full disk is no obstacle.
        if let Some(recent) = self.recent.as_ref().filter(|_| !own.is_flat())
            && !own.is_written(&blocks)
        {
            recent.note(&own.written.blocks, &blocks).inspect_err(|_| own.note_changed(&blocks))?;
        }
        own.mark_written(blocks);
        Ok(())
    }

    /// A change that failed may have been made in part: who follows must look again.
    fn note_failed(&self, blocks: &Range<u64>) {
        self.own.write().note_changed(blocks);
    }

    /// Blocks of a range that it covers in part and that are not resident: at most the first and the last.
    /// The last block of a disk whose size is no multiple of a block is whole when the range ends with the disk.
    fn partial_blocks(&self, offset: u64, length: u64) -> impl Iterator<Item = u64> {
        let end = offset + length;
        let (first, last) = (offset / BLOCK_BYTES, (end - 1) / BLOCK_BYTES);
        let head = !offset.is_multiple_of(BLOCK_BYTES);
        let tail = !end.is_multiple_of(BLOCK_BYTES) && end != self.size();
        let own = self.own.read();
        let wanted = |block: u64, partial: bool| (partial && !own.is_resident(block)).then_some(block);
        let head_block = wanted(first, head || (tail && first == last));
        let tail_block = if first == last { None } else { wanted(last, tail) };
        head_block.into_iter().chain(tail_block)
    }

    /// Makes a block the fork's own with the content of the view. The caller holds it exclusively.
    async fn copy_up(&self, block: u64) -> io::Result<()> {
        let offset = block * BLOCK_BYTES;
        let length = BLOCK_BYTES.min(self.size() - offset);
        let under = self.under_or_gone()?;
        let content = under.read(offset, Buf::zeroed(length as usize)).await?;
        self.data.write(offset, content).await?;
        self.mark(block..block + 1)
    }

    /// Locks the blocks of a range for a change and copies up those it covers in part.
    async fn prepare(&self, offset: u64, length: u64) -> io::Result<blockdev::RangeGuard<'_>> {
        let blocks = offset / BLOCK_BYTES..(offset + length).div_ceil(BLOCK_BYTES);
        self.requests.fetch_add(1, Ordering::Relaxed);
        let exclusive = self.partial_blocks(offset, length).next().is_some();
        let guard = self.locks.lock(blocks.clone(), exclusive).await;
        if exclusive {
            // Looked at again: somebody may have copied it up before the lock was granted.
            let partial: Vec<u64> = self.partial_blocks(offset, length).collect();
            for block in partial {
                self.copy_up(block).await?;
            }
        }
        self.touch(&blocks).await?;
        Ok(guard)
    }

    async fn write_locked(&self, offset: u64, data: Buf) -> io::Result<Buf> {
        let length = data.len() as u64;
        if length == 0 {
            return Ok(data);
        }
        let _open = self.enter().await?;
        let _guard = self.prepare(offset, length).await?;
        let blocks = offset / BLOCK_BYTES..(offset + length).div_ceil(BLOCK_BYTES);
        let data = self.data.write(offset, data).await.inspect_err(|_| self.note_failed(&blocks))?;
        self.mark(blocks)?;
        Ok(data)
    }

    async fn zero_locked(&self, offset: u64, length: u64, mode: ZeroMode) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        let _open = self.enter().await?;
        let _guard = self.prepare(offset, length).await?;
        let blocks = offset / BLOCK_BYTES..(offset + length).div_ceil(BLOCK_BYTES);
        self.data.write_zeroes(offset, length, mode).await.inspect_err(|_| self.note_failed(&blocks))?;
        self.mark(blocks)
    }

    pub(super) async fn flush_all(&self) -> io::Result<()> {
        let _one = self.flushing.lock().await;
        self.check_poisoned()?;
        // Bits first, then the sync of the data: a bit taken here is of data written before that sync.
        let pages = self.own.write().written.take_pages();
        let done = async {
            self.data.flush().await?;
            self.map.keep(pages).await
        };
        done.await.inspect_err(|_| self.poison())
    }

    pub(super) fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
    }

    pub(super) fn check_poisoned(&self) -> io::Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier flush of the fork failed: what is on its disk is unknown"));
        }
        Ok(())
    }
}

impl BlockDevice for ForkDevice {
    fn size(&self) -> u64 {
        self.data.size()
    }

    fn read_only(&self) -> bool {
        self.data.read_only()
    }

    fn read<'a>(&'a self, offset: u64, mut buf: Buf) -> IoFuture<'a, Buf> {
        let length = buf.len() as u64;
        self.requests.fetch_add(1, Ordering::Relaxed);
        let (own, stop) = self.run_at(offset, offset + length);
        if own && stop == offset + length {
            return self.data.read(offset, buf);
        }
        Box::pin(async move {
            if stop == offset + length {
                // All of one kind, which is the rule. What becomes resident meanwhile holds the same.
                return match self.under() {
                    Some(under) => under.read(offset, buf).await,
                    None => self.data.read(offset, buf).await,
                };
            }
            let (mut at, end) = (offset, offset + length);
            while at < end {
                let (own, stop) = self.run_at(at, end);
                let part = Buf::zeroed((stop - at) as usize);
                let under = if own { None } else { self.under() };
                let part = match under {
                    Some(under) => under.read(at, part).await?,
                    None => self.data.read(at, part).await?,
                };
                let from = (at - offset) as usize;
                if let Some(to) = buf.get_mut(from..from + part.len()) {
                    to.copy_from_slice(&part);
                }
                at = stop;
            }
            Ok(buf)
        })
    }

    fn write<'a>(&'a self, offset: u64, data: Buf) -> IoFuture<'a, Buf> {
        Box::pin(self.write_locked(offset, data))
    }

    fn flush<'a>(&'a self) -> IoFuture<'a, ()> {
        Box::pin(self.flush_all())
    }

    fn write_zeroes<'a>(&'a self, offset: u64, length: u64, mode: ZeroMode) -> IoFuture<'a, ()> {
        Box::pin(self.zero_locked(offset, length, mode))
    }

    fn trim<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
        // Zeroes, whether or not the file system can punch holes: a trimmed block must not show the view through.
        Box::pin(self.zero_locked(offset, length, ZeroMode { may_unmap: true, fast_only: false }))
    }

    fn extents<'a>(&'a self, offset: u64, length: u64, extents_max: usize) -> IoFuture<'a, Vec<Extent>> {
        Box::pin(async move {
            let mut extents: Vec<Extent> = Vec::new();
            let (mut at, end) = (offset, offset + length);
            while at < end && extents.len() < extents_max {
                let (own, stop) = self.run_at(at, end);
                let room = extents_max - extents.len();
                let under = if own { None } else { self.under() };
                let found = match under {
                    Some(under) => under.extents(at, stop - at, room).await?,
                    None => self.data.extents(at, stop - at, room).await?,
                };
                let covered: u64 = found.iter().map(|e| e.length).sum();
                for extent in found {
                    match extents.last_mut() {
                        Some(last) if last.kind == extent.kind => last.length += extent.length,
                        _ => extents.push(extent),
                    }
                }
                at += covered;
                if at < stop {
                    break;
                }
            }
            Ok(extents)
        })
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        let end = offset + buf.len() as u64;
        let done = match self.run_at(offset, end) {
            (true, stop) if stop == end => self.data.try_read(offset, buf),
            (false, stop) if stop == end => self.under()?.try_read(offset, buf),
            _ => None,
        };
        if done.is_some() {
            self.requests.fetch_add(1, Ordering::Relaxed);
        }
        done
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Option<io::Result<()>> {
        let length = data.len() as u64;
        if length == 0 || self.partial_blocks(offset, length).next().is_some() {
            return None;
        }
        let gate = self.gate.try_read().ok()?;
        if *gate != Gate::Open {
            return None;
        }
        let blocks = offset / BLOCK_BYTES..(offset + length).div_ceil(BLOCK_BYTES);
        let _guard = self.locks.try_lock(blocks.clone(), false)?;
        if !self.own.read().untouched(&blocks).is_empty() {
            return None;
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        let result = self.data.try_write(offset, data)?.inspect_err(|_| self.note_failed(&blocks));
        Some(result.and_then(|()| self.mark(blocks)))
    }
}
