//! A disk in memory that can lose power, for tests and the simulator.
//!
//! What it injects: at a crash, every write since the last flush is kept, lost, or torn, each sector by itself and in any combination that
//! the test chooses; a later write may survive an earlier one. What it keeps: a sector of 512 bytes is written whole or not at
//! all; what was flushed stays.

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
}

impl CrashDevice {
    /// A disk with this content, durable.
    #[must_use]
    pub fn new(content: Vec<u8>) -> Self {
        let state = State { durable: content.clone(), now: content, unsynced: Vec::new(), writes: 0, flushes: 0, left: None };
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
        state.left = None;
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
        state.unsynced.push((at, data.to_vec()));
        state.writes += 1;
        Ok(())
    }
}

impl State {
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
        state.unsynced.clear();
        state.durable.clone_from(&state.now);
        state.flushes += 1;
        ready(())
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
