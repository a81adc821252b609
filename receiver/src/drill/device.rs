//! One volume of a drill: a fork whose written blocks are counted, and whose flushes cost nothing.
//!
//! A block is counted before it is written, so the limit holds whatever is in flight; a write that fails leaves its blocks counted.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use blockdev::{BlockDevice, Buf, Extent, IoFuture, ZeroMode};
use parking_lot::Mutex;
use proto::DirtyMap;
use proto::units::BLOCK_BYTES;

use super::space::Space;
use crate::fork::ForkDevice;

/// A fork within a limit.
#[derive(Debug)]
pub(super) struct DrillDevice {
    fork: Arc<ForkDevice>,
    space: Arc<Space>,
    /// Blocks of the fork's file that hold data.
    counted: Mutex<DirtyMap>,
}

impl DrillDevice {
    pub(super) fn new(fork: Arc<ForkDevice>, space: Arc<Space>) -> Self {
        let counted = Mutex::new(DirtyMap::new(fork.size()));
        Self { fork, space, counted }
    }

    /// Takes space for those blocks that have none yet.
    fn take(&self, blocks: Range<u64>) -> io::Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        let mut counted = self.counted.lock();
        let new = blocks.clone().filter(|block| !counted.contains(*block)).count() as u64;
        if new > 0 {
            self.space.take(new)?;
            counted.mark(blocks.start, blocks.end - blocks.start);
        }
        Ok(())
    }

    fn give_back(&self, blocks: Range<u64>) {
        if !blocks.is_empty() {
            let freed = self.counted.lock().clear(blocks.start, blocks.end - blocks.start);
            self.space.give_back(freed);
        }
    }

    /// Before a range becomes a hole: its whole blocks give their space back; one that it covers in part is written.
    fn take_for_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset + length;
        let first = offset.div_ceil(BLOCK_BYTES);
        let last = if end == self.size() { end.div_ceil(BLOCK_BYTES) } else { end / BLOCK_BYTES };
        let touched = touched(offset, length);
        self.take(touched.start..first.min(touched.end))?;
        self.take(last.max(touched.start)..touched.end)?;
        self.give_back(first..last.max(first));
        Ok(())
    }
}

fn touched(offset: u64, length: u64) -> Range<u64> {
    if length == 0 { 0..0 } else { offset / BLOCK_BYTES..(offset + length).div_ceil(BLOCK_BYTES) }
}

fn failed<'a, T: 'a>(error: io::Error) -> IoFuture<'a, T> {
    Box::pin(std::future::ready(Err(error)))
}

impl BlockDevice for DrillDevice {
    fn size(&self) -> u64 {
        self.fork.size()
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a, Buf> {
        self.fork.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, data: Buf) -> IoFuture<'a, Buf> {
        match self.take(touched(offset, data.len() as u64)) {
            Ok(()) => self.fork.write(offset, data),
            Err(error) => failed(error),
        }
    }

    fn flush<'a>(&'a self) -> IoFuture<'a, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn write_zeroes<'a>(&'a self, offset: u64, length: u64, mode: ZeroMode) -> IoFuture<'a, ()> {
        let taken = match mode.may_unmap {
            true => self.take_for_hole(offset, length),
            false => self.take(touched(offset, length)),
        };
        match taken {
            Ok(()) => self.fork.write_zeroes(offset, length, mode),
            Err(error) => failed(error),
        }
    }

    fn trim<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
        match self.take_for_hole(offset, length) {
            Ok(()) => self.fork.trim(offset, length),
            Err(error) => failed(error),
        }
    }

    fn extents<'a>(&'a self, offset: u64, length: u64, extents_max: usize) -> IoFuture<'a, Vec<Extent>> {
        self.fork.extents(offset, length, extents_max)
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        self.fork.try_read(offset, buf)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Option<io::Result<()>> {
        match self.take(touched(offset, data.len() as u64)) {
            // If it cannot be done at once, the write that follows finds its blocks counted.
            Ok(()) => self.fork.try_write(offset, data),
            Err(error) => Some(Err(error)),
        }
    }
}
