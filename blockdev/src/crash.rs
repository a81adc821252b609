//! A disk in memory that can lose power, for tests and the simulator.
//!
//! What it injects: at a crash, every write since the last flush is kept, lost, or torn, each sector by itself and in any combination that
//! the test chooses; a later write may survive an earlier one. A flush that fails: what it was to cover stays readable and is not durable,
//! whatever is flushed later, until it is written again; as with a file, every later flush fails until the disk is opened again.
//! What it keeps: a sector of 512 bytes is written whole or not at all; what was flushed stays.

use std::collections::BTreeSet;
use std::io;

use parking_lot::Mutex;

use crate::{BlockDevice, Buf, Extent, ExtentKind, IoFuture, ZeroMode};

/// What a disk writes whole or not at all, in bytes.
const SECTOR_BYTES: u64 = 512;

/// See the module.
pub struct CrashDevice {
    state: Mutex<State>,
}

struct State {
    /// What every reader sees.
    now: Vec<u8>,
    /// What is on the platters for certain.
    durable: Vec<u8>,
    /// Byte ranges written since the last flush, with their content, in order.
    unsynced: Vec<(usize, Vec<u8>)>,
    writes: u64,
    flushes: u64,
    /// Writes and flushes that are still done.
    left: Option<u64>,
    flush: Flush,
    /// Sectors that a failed flush was to make durable: readable, and no flush will do it.
    doomed: BTreeSet<usize>,
}

/// What the next flush does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flush {
    Works,
    Fails,
    /// One failed: so do all until the disk is opened again.
    Failed,
}

impl CrashDevice {
    /// A disk with this content, durable.
    #[must_use]
    pub fn new(content: Vec<u8>) -> Self {
        let state = State {
            durable: content.clone(),
            now: content,
            unsynced: Vec::new(),
            writes: 0,
            flushes: 0,
            left: None,
            flush: Flush::Works,
            doomed: BTreeSet::new(),
        };
        Self { state: Mutex::new(state) }
    }

    /// What readers see now.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        self.state.lock().now.clone()
    }

    /// Writes and flushes so far.
    #[must_use]
    pub fn operations(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.writes, state.flushes)
    }

    /// The power goes after so many more writes and flushes: every one after them fails, until [`crash`](Self::crash).
    pub fn power_off_after(&self, operations: u64) {
        self.state.lock().left = Some(operations);
    }

    /// Loses power: `keep` decides for each sector of each write since the last flush, in order, whether it reached the disk. Afterwards
    /// readers see what was left.
    pub fn crash(&self, mut keep: impl FnMut() -> bool) {
        let state = &mut *self.state.lock();
        for sector in std::mem::take(&mut state.doomed) {
            if keep() {
                let range = state.sector(sector);
                state.durable[range.clone()].copy_from_slice(&state.now[range]);
            }
        }
        for (offset, data) in std::mem::take(&mut state.unsynced) {
            let mut at = 0;
            while at < data.len() {
                let sector = SECTOR_BYTES as usize;
                let end = ((offset + at) / sector * sector + sector - offset).min(data.len());
                if keep() {
                    state.durable[offset + at..offset + end].copy_from_slice(&data[at..end]);
                }
                at = end;
            }
        }
        state.now.clone_from(&state.durable);
        (state.left, state.flush) = (None, Flush::Works);
    }

    /// The next flush fails, see the module.
    pub fn fail_next_flush(&self) {
        self.state.lock().flush = Flush::Fails;
    }

    /// Whether a flush failed since it was opened.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.state.lock().flush == Flush::Failed
    }

    /// It is opened again, by another process: flushes work. What a failed one was to make durable is either still readable, or
    /// no longer if the cache was dropped meanwhile.
    pub fn reopen(&self, cache_dropped: bool) {
        let state = &mut *self.state.lock();
        state.flush = Flush::Works;
        if cache_dropped {
            for sector in std::mem::take(&mut state.doomed) {
                let range = state.sector(sector);
                state.now[range.clone()].copy_from_slice(&state.durable[range]);
            }
        }
    }

    /// Changes a durable byte behind everybody's back, as a failing disk does.
    pub fn flip(&self, offset: u64, mask: u8) {
        let state = &mut *self.state.lock();
        state.durable[offset as usize] ^= mask;
        state.now[offset as usize] ^= mask;
    }

    fn put(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let state = &mut *self.state.lock();
        state.spend()?;
        let at = offset as usize;
        state.now[at..at + data.len()].copy_from_slice(data);
        for sector in sectors(at, data.len()) {
            state.doomed.remove(&sector);
        }
        state.unsynced.push((at, data.to_vec()));
        state.writes += 1;
        Ok(())
    }
}

/// The sectors that a range touches.
fn sectors(offset: usize, length: usize) -> std::ops::Range<usize> {
    offset / SECTOR_BYTES as usize..(offset + length).div_ceil(SECTOR_BYTES as usize)
}

impl State {
    /// The bytes of a sector.
    fn sector(&self, number: usize) -> std::ops::Range<usize> {
        let first = number * SECTOR_BYTES as usize;
        first..(first + SECTOR_BYTES as usize).min(self.now.len())
    }

    /// Makes everything durable but what is doomed.
    fn sync(&mut self) -> io::Result<()> {
        if self.flush != Flush::Works {
            self.flush = Flush::Failed;
            for (at, data) in std::mem::take(&mut self.unsynced) {
                self.doomed.extend(sectors(at, data.len()));
            }
            return Err(io::Error::other("the disk failed to sync"));
        }
        let kept: Vec<_> =
            self.doomed.iter().map(|number| self.sector(*number)).map(|r| (r.clone(), self.durable[r].to_vec())).collect();
        self.unsynced.clear();
        self.durable.clone_from(&self.now);
        for (range, old) in kept {
            self.durable[range].copy_from_slice(&old);
        }
        self.flushes += 1;
        Ok(())
    }

    fn spend(&mut self) -> io::Result<()> {
        match &mut self.left {
            Some(0) => Err(io::Error::other("the power is off")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl std::fmt::Debug for CrashDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.state.lock();
        write!(f, "CrashDevice({} bytes, {} writes not flushed)", state.now.len(), state.unsynced.len())
    }
}

fn ready<'a, T: 'a>(value: T) -> IoFuture<'a, T> {
    Box::pin(std::future::ready(io::Result::Ok(value)))
}

impl BlockDevice for CrashDevice {
    fn size(&self) -> u64 {
        self.state.lock().now.len() as u64
    }

    fn read<'a>(&'a self, offset: u64, mut buf: Buf) -> IoFuture<'a, Buf> {
        let length = buf.len();
        buf.copy_from_slice(&self.state.lock().now[offset as usize..offset as usize + length]);
        ready(buf)
    }

    fn write<'a>(&'a self, offset: u64, data: Buf) -> IoFuture<'a, Buf> {
        let done = self.put(offset, &data).map(|()| data);
        Box::pin(std::future::ready(done))
    }

    fn flush<'a>(&'a self) -> IoFuture<'a, ()> {
        let state = &mut *self.state.lock();
        if let Err(error) = state.spend() {
            return Box::pin(std::future::ready(Err(error)));
        }
        Box::pin(std::future::ready(state.sync()))
    }

    fn write_zeroes<'a>(&'a self, offset: u64, length: u64, _mode: ZeroMode) -> IoFuture<'a, ()> {
        let done = self.put(offset, &vec![0; length as usize]);
        Box::pin(std::future::ready(done))
    }

    fn trim<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
        self.write_zeroes(offset, length, ZeroMode::default())
    }

    fn extents<'a>(&'a self, _offset: u64, length: u64, _extents_max: usize) -> IoFuture<'a, Vec<Extent>> {
        ready(vec![Extent { length, kind: ExtentKind::Data }])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    /// Would catch a model that is kinder than Linux: a failed fdatasync leaves pages that are read and never written.
    #[test]
    fn what_a_failed_flush_was_to_cover_is_lost_whatever_is_flushed_later() {
        let disk = CrashDevice::new(vec![0; 2048]);
        let write = |at, byte, length| drop(disk.write(at, Buf::copy_of(&vec![byte; length])).now_or_never());
        let flush = || disk.flush().now_or_never().unwrap().is_ok();
        write(0, 1, 1536);
        disk.fail_next_flush();
        assert!(!flush() && !flush() && disk.has_failed(), "not until it is opened again");
        disk.reopen(false);
        assert_eq!(disk.snapshot()[0], 1, "readable");
        write(600, 2, 1);
        assert!(flush());
        disk.crash(|| false);
        let left = disk.snapshot();
        assert_eq!((left[0], left[512], left[600], left[1024]), (0, 1, 2, 0), "only what was written again is there");

        write(0, 3, 512);
        disk.fail_next_flush();
        assert!(!flush());
        disk.reopen(true);
        assert_eq!(disk.snapshot()[0], 0, "the cache was dropped");
    }

    #[test]
    fn a_crash_keeps_what_was_flushed_and_chooses_among_the_rest_by_sector() {
        let disk = CrashDevice::new(vec![0; 2048]);
        let write = |at, byte, length| drop(disk.write(at, Buf::copy_of(&vec![byte; length])).now_or_never());
        write(0, 1, 2048);
        disk.flush().now_or_never().unwrap().unwrap();
        write(500, 2, 600);
        write(0, 3, 512);
        // Sectors of the first write: 500..512, 512..1024, 1024..1100; then the one of the second.
        let mut choices = [true, false, true, false].into_iter();
        disk.crash(|| choices.next().unwrap());
        let left = disk.snapshot();
        assert!(choices.next().is_none());
        assert!(left[..500].iter().chain(&left[512..1024]).chain(&left[1100..]).all(|b| *b == 1));
        assert!(left[500..512].iter().chain(&left[1024..1100]).all(|b| *b == 2));
    }
}
