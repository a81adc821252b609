//! One volume of a fork.
//!
//! A block is either wholly the fork's own (its bit is set) or wholly the view's. A write of part of a block that is not the
//! fork's yet copies the block up under an exclusive lock. A bit is set in memory when the data is in the file, and on disk
//! by a flush, after the data was synced.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockdev::{BlockDevice, Buf, Extent, FileDevice, IoFuture, RangeLocks, ZeroMode};
use parking_lot::RwLock;
use proto::DirtyMap;
use proto::units::BLOCK_BYTES;

use super::map::{MapFile, PAGE_BLOCKS, page_of};
use crate::view::View;

/// A writable overlay on a view.
#[derive(Debug)]
pub struct ForkDevice {
    view: View,
    data: FileDevice,
    map: MapFile,
    own: RwLock<Own>,
    locks: RangeLocks,
    /// One flush at a time: the second one finds its pages written by the first.
    flushing: tokio::sync::Mutex<()>,
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

#[derive(Debug)]
struct Own {
    blocks: DirtyMap,
    /// Blocks changed since somebody began to follow; nobody does if there are none.
    changed: Option<DirtyMap>,
    /// Pages of the map that have bits which are not on disk yet.
    pages: BTreeSet<u64>,
}

impl ForkDevice {
    pub(crate) fn new(view: View, data: FileDevice, map: MapFile, blocks: DirtyMap) -> Self {
        Self {
            view,
            data,
            map,
            own: RwLock::new(Own { blocks, changed: None, pages: BTreeSet::new() }),
            locks: RangeLocks::default(),
            flushing: tokio::sync::Mutex::new(()),
            poisoned: AtomicBool::new(false),
            gate: Arc::new(tokio::sync::RwLock::new(Gate::Open)),
        }
    }

    /// The blocks that are the fork's own; from here on those that change are told by [`Self::take_changed`].
    pub(crate) fn follow(&self) -> DirtyMap {
        let mut own = self.own.write();
        own.changed = Some(DirtyMap::new(self.view.size()));
        own.blocks.clone()
    }

    /// The blocks that were changed since the last call, each of them after it was on the disk.
    pub(crate) fn take_changed(&self) -> DirtyMap {
        let empty = DirtyMap::new(self.view.size());
        self.own.write().changed.as_mut().map_or_else(|| empty.clone(), |changed| std::mem::replace(changed, empty.clone()))
    }

    /// Nobody follows any more.
    pub(crate) fn unfollow(&self) {
        self.own.write().changed = None;
    }

    /// Holds changes up, once those under way are done, until the guard is dropped.
    pub(crate) async fn hold(&self) -> tokio::sync::OwnedRwLockWriteGuard<Gate> {
        Arc::clone(&self.gate).write_owned().await
    }

    async fn enter(&self) -> io::Result<tokio::sync::RwLockReadGuard<'_, Gate>> {
        let gate = self.gate.read().await;
        match *gate {
            Gate::Open => Ok(gate),
            Gate::GivenBack => Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the disk was given back to its primary")),
        }
    }

    /// Bytes of blocks that are the fork's own.
    #[must_use]
    pub fn own_bytes(&self) -> u64 {
        self.own.read().blocks.bytes()
    }

    /// Whether the block of byte `at` is the fork's own, and where the run of such blocks ends (at most `end`).
    fn run_at(&self, at: u64, end: u64) -> (bool, u64) {
        let own = self.own.read();
        let block = at / BLOCK_BYTES;
        let is_own = own.blocks.contains(block);
        let mut stop = block;
        if is_own {
            while stop * BLOCK_BYTES < end
                && let Some(run) = own.blocks.next_run(stop, u32::MAX).filter(|r| r.start.0 == stop)
            {
                stop = run.end();
            }
        } else {
            stop = own.blocks.next_run(block, 1).map_or(u64::MAX / BLOCK_BYTES, |r| r.start.0);
        }
        (is_own, stop.saturating_mul(BLOCK_BYTES).min(end))
    }

    fn mark(&self, blocks: Range<u64>) {
        if blocks.is_empty() {
            return;
        }
        let mut own = self.own.write();
        let before = own.blocks.count();
        own.blocks.mark(blocks.start, blocks.end - blocks.start);
        if let Some(changed) = &mut own.changed {
            changed.mark(blocks.start, blocks.end - blocks.start);
        }
        if own.blocks.count() != before {
            own.pages.extend(blocks.start / PAGE_BLOCKS..=(blocks.end - 1) / PAGE_BLOCKS);
        }
    }

    /// Blocks of a range that it covers in part and that are not the fork's own: at most the first and the last.
    /// The last block of a disk whose size is no multiple of a block is whole when the range ends with the disk.
    fn partial_blocks(&self, offset: u64, length: u64) -> impl Iterator<Item = u64> {
        let end = offset + length;
        let (first, last) = (offset / BLOCK_BYTES, (end - 1) / BLOCK_BYTES);
        let head = !offset.is_multiple_of(BLOCK_BYTES);
        let tail = !end.is_multiple_of(BLOCK_BYTES) && end != self.size();
        let own = self.own.read();
        let wanted = |block: u64, partial: bool| (partial && !own.blocks.contains(block)).then_some(block);
        let head_block = wanted(first, head || (tail && first == last));
        let tail_block = if first == last { None } else { wanted(last, tail) };
        head_block.into_iter().chain(tail_block)
    }

    /// Makes a block the fork's own with the content of the view. The caller holds it exclusively.
    async fn copy_up(&self, block: u64) -> io::Result<()> {
        let offset = block * BLOCK_BYTES;
        let length = BLOCK_BYTES.min(self.size() - offset);
        let content = self.view.read(offset, Buf::zeroed(length as usize)).await?;
        self.data.write(offset, content).await?;
        self.mark(block..block + 1);
        Ok(())
    }

    /// Locks the blocks of a range for a change and copies up those it covers in part.
    async fn prepare(&self, offset: u64, length: u64) -> io::Result<blockdev::RangeGuard<'_>> {
        let blocks = offset / BLOCK_BYTES..(offset + length).div_ceil(BLOCK_BYTES);
        let exclusive = self.partial_blocks(offset, length).next().is_some();
        let guard = self.locks.lock(blocks, exclusive).await;
        if exclusive {
            // Looked at again: somebody may have copied it up before the lock was granted.
            let partial: Vec<u64> = self.partial_blocks(offset, length).collect();
            for block in partial {
                self.copy_up(block).await?;
            }
        }
        Ok(guard)
    }

    async fn write_locked(&self, offset: u64, data: Buf) -> io::Result<Buf> {
        let length = data.len() as u64;
        if length == 0 {
            return Ok(data);
        }
        let _open = self.enter().await?;
        let _guard = self.prepare(offset, length).await?;
        let data = self.data.write(offset, data).await?;
        self.mark(offset / BLOCK_BYTES..(offset + length).div_ceil(BLOCK_BYTES));
        Ok(data)
    }

    async fn zero_locked(&self, offset: u64, length: u64, mode: ZeroMode) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        let _open = self.enter().await?;
        let _guard = self.prepare(offset, length).await?;
        self.data.write_zeroes(offset, length, mode).await?;
        self.mark(offset / BLOCK_BYTES..(offset + length).div_ceil(BLOCK_BYTES));
        Ok(())
    }

    async fn flush_all(&self) -> io::Result<()> {
        let _one = self.flushing.lock().await;
        let eio = || io::Error::other("an earlier flush of the fork failed: what is on its disk is unknown");
        if self.poisoned.load(Ordering::Acquire) {
            return Err(eio());
        }
        // Bits first, then the sync of the data: a bit taken here is of data written before that sync.
        let pages: Vec<_> = {
            let mut own = self.own.write();
            let numbers = std::mem::take(&mut own.pages);
            numbers.into_iter().map(|n| (n, page_of(&own.blocks, n))).collect()
        };
        let done = async {
            self.data.flush().await?;
            for (number, page) in &pages {
                self.map.write_page(*number, page)?;
            }
            if pages.is_empty() { Ok(()) } else { self.map.sync() }
        };
        let result = done.await;
        if result.is_err() {
            self.poisoned.store(true, Ordering::Release);
        }
        result
    }
}

impl BlockDevice for ForkDevice {
    fn size(&self) -> u64 {
        self.view.size()
    }

    fn read<'a>(&'a self, offset: u64, mut buf: Buf) -> IoFuture<'a, Buf> {
        let length = buf.len() as u64;
        let (own, stop) = self.run_at(offset, offset + length);
        if stop == offset + length {
            // All of one kind, which is the rule.
            return if own { self.data.read(offset, buf) } else { self.view.read(offset, buf) };
        }
        Box::pin(async move {
            let (mut at, end) = (offset, offset + length);
            while at < end {
                let (own, stop) = self.run_at(at, end);
                let part = Buf::zeroed((stop - at) as usize);
                let part = if own { self.data.read(at, part).await? } else { self.view.read(at, part).await? };
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
                let found = if own {
                    self.data.extents(at, stop - at, room).await?
                } else {
                    self.view.find_extents(at, stop - at, room)?
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
        match self.run_at(offset, end) {
            (true, stop) if stop == end => self.data.try_read(offset, buf),
            (false, stop) if stop == end => self.view.try_read(offset, buf),
            _ => None,
        }
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
        let result = self.data.try_write(offset, data)?;
        if result.is_ok() {
            self.mark(blocks);
        }
        Some(result)
    }
}
