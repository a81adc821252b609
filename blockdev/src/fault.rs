//! A layer that fails chosen operations of the device below it, for tests.
//!
//! What it injects: an errno for operations of one kind that touch a range, from the nth match on, for so many matches; a write
//! that fails after its data, or only a first part of it, reached the device. What it does not: wrong data, or an answer that lies.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::{BlockDevice, Buf, Extent, IoFuture, ZeroMode};

/// An operation of [`BlockDevice`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `read` and `try_read`.
    Read,
    /// `write` and `try_write`.
    Write,
    /// `flush`.
    Flush,
    /// `write_zeroes`.
    WriteZeroes,
    /// `trim`.
    Trim,
    /// `extents`.
    Extents,
}

/// When to fail, and how.
#[derive(Clone, Debug)]
pub struct Fault {
    /// What to fail.
    pub operation: Operation,
    /// Only operations that touch these bytes; a flush touches all. `None`: anywhere.
    pub range: Option<Range<u64>>,
    /// Matching operations that pass before the first failure.
    pub skip: u64,
    /// Failures before the fault is spent. `u64::MAX`: for ever.
    pub count: u64,
    /// The error, for example `libc::EIO`.
    pub errno: i32,
    /// For writes: so many bytes of the data reach the device before the error is returned.
    pub bytes_done: usize,
}

impl Fault {
    /// Fails every `operation` with `errno`.
    #[must_use]
    pub fn always(operation: Operation, errno: i32) -> Self {
        Self { operation, range: None, skip: 0, count: u64::MAX, errno, bytes_done: 0 }
    }

    /// Fails the `nth` (from zero) `operation` with `errno`, once.
    #[must_use]
    pub fn nth(operation: Operation, nth: u64, errno: i32) -> Self {
        Self { skip: nth, count: 1, ..Self::always(operation, errno) }
    }

    /// The same, limited to operations that touch `range`.
    #[must_use]
    pub fn within(self, range: Range<u64>) -> Self {
        Self { range: Some(range), ..self }
    }
}

/// The device below, with faults.
pub struct FaultDevice {
    inner: Arc<dyn BlockDevice>,
    faults: Mutex<Vec<Fault>>,
}

impl FaultDevice {
    /// Without faults at first.
    #[must_use]
    pub fn new(inner: Arc<dyn BlockDevice>) -> Self {
        Self { inner, faults: Mutex::default() }
    }

    /// Adds a fault; the first that matches and is not skipped counts.
    pub fn inject(&self, fault: Fault) {
        self.faults.lock().push(fault);
    }

    /// Takes all faults away.
    pub fn heal(&self) {
        self.faults.lock().clear();
    }

    /// The error to give, with the bytes that a write does before.
    fn strike(&self, operation: Operation, offset: u64, length: u64) -> Option<(io::Error, usize)> {
        for fault in self.faults.lock().iter_mut() {
            let touches = fault.range.as_ref().is_none_or(|range| offset < range.end && range.start < offset + length);
            if fault.operation != operation || !touches || fault.count == 0 {
                continue;
            }
            if fault.skip > 0 {
                fault.skip -= 1;
                continue;
            }
            if fault.count != u64::MAX {
                fault.count -= 1;
            }
            return Some((io::Error::from_raw_os_error(fault.errno), fault.bytes_done));
        }
        None
    }

    fn check(&self, operation: Operation, offset: u64, length: u64) -> io::Result<()> {
        self.strike(operation, offset, length).map_or(Ok(()), |(error, _)| Err(error))
    }

    fn untouched(&self) -> bool {
        self.faults.lock().is_empty()
    }
}

impl std::fmt::Debug for FaultDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FaultDevice").field("faults", &self.faults).finish_non_exhaustive()
    }
}

impl BlockDevice for FaultDevice {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a, Buf> {
        Box::pin(async move {
            self.check(Operation::Read, offset, buf.len() as u64)?;
            self.inner.read(offset, buf).await
        })
    }

    fn write<'a>(&'a self, offset: u64, data: Buf) -> IoFuture<'a, Buf> {
        Box::pin(async move {
            if let Some((error, bytes_done)) = self.strike(Operation::Write, offset, data.len() as u64) {
                let done = bytes_done.min(data.len());
                if done > 0 {
                    self.inner.write(offset, Buf::copy_of(&data[..done])).await?;
                }
                return Err(error);
            }
            self.inner.write(offset, data).await
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a, ()> {
        Box::pin(async move {
            self.check(Operation::Flush, 0, u64::MAX)?;
            self.inner.flush().await
        })
    }

    fn write_zeroes<'a>(&'a self, offset: u64, length: u64, mode: ZeroMode) -> IoFuture<'a, ()> {
        Box::pin(async move {
            self.check(Operation::WriteZeroes, offset, length)?;
            self.inner.write_zeroes(offset, length, mode).await
        })
    }

    fn trim<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
        Box::pin(async move {
            self.check(Operation::Trim, offset, length)?;
            self.inner.trim(offset, length).await
        })
    }

    fn extents<'a>(&'a self, offset: u64, length: u64, extents_max: usize) -> IoFuture<'a, Vec<Extent>> {
        Box::pin(async move {
            self.check(Operation::Extents, offset, length)?;
            self.inner.extents(offset, length, extents_max).await
        })
    }

    fn cache<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
        self.inner.cache(offset, length)
    }

    // With faults about, everything takes the slow path, where it is counted once.
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        if self.untouched() { self.inner.try_read(offset, buf) } else { None }
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Option<io::Result<()>> {
        if self.untouched() { self.inner.try_write(offset, data) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryDevice;
    use futures_util::FutureExt;

    #[test]
    fn faults_strike_where_and_when_they_are_told() {
        let disk = FaultDevice::new(Arc::new(MemoryDevice::new(1 << 16)));
        let write = |offset| {
            let result = disk.write(offset, Buf::copy_of(&[9; 100])).now_or_never().unwrap();
            result.map(drop).map_err(|error| error.raw_os_error().unwrap())
        };
        disk.inject(Fault::nth(Operation::Write, 1, libc::ENOSPC).within(4096..8192));
        assert_eq!(write(0), Ok(()), "elsewhere");
        assert_eq!(write(4096), Ok(()), "skipped");
        assert_eq!(write(4000), Err(libc::ENOSPC), "touches the range");
        assert_eq!(write(4096), Ok(()), "spent");
        disk.inject(Fault { bytes_done: 10, ..Fault::always(Operation::Write, libc::EIO) });
        assert!(disk.try_write(0, &[1]).is_none());
        assert_eq!(write(20_000), Err(libc::EIO));
        disk.heal();
        let mut seen = [0; 12];
        assert!(disk.try_read(20_000, &mut seen).is_some());
        assert_eq!(seen, [9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 0, 0]);
    }
}
