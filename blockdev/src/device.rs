//! The one trait of a disk stack.
//!
//! Methods take validated ranges: `offset + length <= size()`, checked by whoever parsed the request (the
//! NBD export, the capture). A layer may assert it and must not wrap or panic elsewhere.
//! Futures are not `Send`: they run on the io thread that polls them; devices themselves are shared.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;

use crate::Buf;

/// A future of one device operation, bound to the io thread that polls it.
pub type IoFuture<'a, T> = Pin<Box<dyn Future<Output = io::Result<T>> + 'a>>;

/// What a range of a device holds, as far as the device can tell cheaply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Allocated data.
    Data,
    /// Reads as zeroes, space allocated.
    Zero,
    /// Reads as zeroes, no space allocated.
    Hole,
}

/// A run of bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, never zero.
    pub length: u64,
    /// What the run holds.
    pub kind: ExtentKind,
}

/// How a range may be zeroed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroMode {
    /// Space may be given back (the opposite of NBD's NO_HOLE).
    pub may_unmap: bool,
    /// Fail with `ErrorKind::Unsupported` rather than write zeroes byte by byte (NBD's FAST_ZERO).
    pub fast_only: bool,
}

/// A disk: a fixed number of bytes that can be read, written, zeroed and made durable.
///
/// Any byte range is legal; alignment is the device's affair. Two overlapping writes in flight at once may land in either
/// order, but bytes outside a write never change because of it, also when both share a block.
/// A write that failed may have changed any part of its range.
pub trait BlockDevice: Send + Sync + 'static {
    /// Size in bytes; constant for the life of the device.
    fn size(&self) -> u64;

    /// Whether writes are refused.
    fn read_only(&self) -> bool {
        false
    }

    /// Fills all of `buf` from `offset` and gives it back.
    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a, Buf>;

    /// Writes all of `data` at `offset` and gives the buffer back for reuse.
    fn write<'a>(&'a self, offset: u64, data: Buf) -> IoFuture<'a, Buf>;

    /// Every write acknowledged before this call is durable when it returns.
    fn flush<'a>(&'a self) -> IoFuture<'a, ()>;

    /// Makes the range read as zeroes.
    fn write_zeroes<'a>(&'a self, offset: u64, length: u64, mode: ZeroMode) -> IoFuture<'a, ()>;

    /// Gives the range back. In Twinsite a trimmed range reads as zeroes afterwards, so that both sites agree on it;
    /// a device that cannot promise that leaves the content as it is.
    fn trim<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()>;

    /// Describes `[offset, offset + length)`: extents in order that together cover at least a first part of the range and at
    /// most all of it; at most `extents_max` of them.
    fn extents<'a>(&'a self, offset: u64, length: u64, extents_max: usize) -> IoFuture<'a, Vec<Extent>>;

    /// Hints that the range is read soon. Does nothing by default.
    fn cache<'a>(&'a self, _offset: u64, _length: u64) -> IoFuture<'a, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Another way to the same content, for a reader that goes through all of it and reads ahead by itself; its reads do not
    /// put large pieces into the page cache. `None`, the default, if the device itself is as good.
    ///
    /// # Errors
    /// The system's, if it cannot be opened.
    fn scanner(&self) -> io::Result<Option<Arc<dyn BlockDevice>>> {
        Ok(None)
    }

    /// Another way to the same content, for a reader that goes through all of it once in pieces of a MiB or so: what the page cache
    /// has comes from there, the rest past it. `None`, the default, if the device itself is as good.
    ///
    /// # Errors
    /// The system's, if it cannot be opened.
    fn uncached(&self) -> io::Result<Option<Arc<dyn BlockDevice>>> {
        Ok(None)
    }

    /// Reads at once if that needs no waiting (the page cache has it), else `None` and nothing has happened.
    fn try_read(&self, _offset: u64, _buf: &mut [u8]) -> Option<io::Result<()>> {
        None
    }

    /// Writes at once if that needs no waiting, else `None` and nothing has happened.
    fn try_write(&self, _offset: u64, _data: &[u8]) -> Option<io::Result<()>> {
        None
    }
}
