//! A disk in memory, for tests and for the model that other devices are compared with.
//!
//! Sparse: chunks never written, or zeroed with leave to unmap, take no space and are reported as holes. A flush does nothing: what
//! is in memory is as durable as it will ever be.

use std::io;

use parking_lot::RwLock;

use crate::{BlockDevice, Buf, Extent, ExtentKind, IoFuture, ZeroMode};

/// Unit of allocation.
const CHUNK_BYTES: u64 = 4096;

type Chunk = Option<Box<[u8]>>;

/// A sparse disk in memory.
pub struct MemoryDevice {
    size: u64,
    chunks: RwLock<Vec<Chunk>>,
}

impl MemoryDevice {
    /// A disk of `size` bytes, all zero.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let count = usize::try_from(size.div_ceil(CHUNK_BYTES)).expect("a disk in memory fits the address space");
        Self { size, chunks: RwLock::new(vec![None; count]) }
    }

    /// A disk with this content.
    #[must_use]
    pub fn with_content(content: &[u8]) -> Self {
        let disk = Self::new(content.len() as u64);
        for (chunk, bytes) in disk.chunks.write().iter_mut().zip(content.chunks(CHUNK_BYTES as usize)) {
            let mut whole = vec![0; CHUNK_BYTES as usize];
            whole[..bytes.len()].copy_from_slice(bytes);
            *chunk = Some(whole.into());
        }
        disk
    }

    /// The whole content.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        let mut all = vec![0; usize::try_from(self.size).expect("a disk in memory fits the address space")];
        self.read_now(0, &mut all);
        all
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) {
        assert!(offset + buf.len() as u64 <= self.size, "range checked by the caller");
        let chunks = self.chunks.read();
        for (index, within, at) in pieces(offset, buf.len()) {
            match &chunks[index] {
                Some(chunk) => buf[at].copy_from_slice(&chunk[within]),
                None => buf[at].fill(0),
            }
        }
    }

    fn write_now(&self, offset: u64, data: &[u8]) {
        assert!(offset + data.len() as u64 <= self.size, "range checked by the caller");
        let mut chunks = self.chunks.write();
        for (index, within, at) in pieces(offset, data.len()) {
            let chunk = chunks[index].get_or_insert_with(|| vec![0; CHUNK_BYTES as usize].into_boxed_slice());
            chunk[within].copy_from_slice(&data[at]);
        }
    }

    fn zero_now(&self, offset: u64, length: u64, unmap: bool) {
        assert!(offset + length <= self.size, "range checked by the caller");
        let mut chunks = self.chunks.write();
        for (index, within, _) in pieces(offset, usize::try_from(length).expect("fits the address space")) {
            let whole = within.len() == CHUNK_BYTES as usize;
            match &mut chunks[index] {
                chunk if whole && unmap => *chunk = None,
                Some(chunk) => chunk[within].fill(0),
                chunk if !unmap => *chunk = Some(vec![0; CHUNK_BYTES as usize].into_boxed_slice()),
                _ => {}
            }
        }
    }
}

/// Splits a range into (chunk, range within the chunk, range within the request).
fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (usize, std::ops::Range<usize>, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == length {
            return None;
        }
        let at = offset + done as u64;
        let within = (at % CHUNK_BYTES) as usize;
        let run = (CHUNK_BYTES as usize - within).min(length - done);
        let piece = ((at / CHUNK_BYTES) as usize, within..within + run, done..done + run);
        done += run;
        Some(piece)
    })
}

impl std::fmt::Debug for MemoryDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MemoryDevice({} bytes)", self.size)
    }
}

fn ready<'a, T: 'a>(result: io::Result<T>) -> IoFuture<'a, T> {
    Box::pin(std::future::ready(result))
}

impl BlockDevice for MemoryDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn read<'a>(&'a self, offset: u64, mut buf: Buf) -> IoFuture<'a, Buf> {
        self.read_now(offset, &mut buf);
        ready(Ok(buf))
    }

    fn write<'a>(&'a self, offset: u64, data: Buf) -> IoFuture<'a, Buf> {
        self.write_now(offset, &data);
        ready(Ok(data))
    }

    fn flush<'a>(&'a self) -> IoFuture<'a, ()> {
        ready(Ok(()))
    }

    fn write_zeroes<'a>(&'a self, offset: u64, length: u64, mode: ZeroMode) -> IoFuture<'a, ()> {
        self.zero_now(offset, length, mode.may_unmap);
        ready(Ok(()))
    }

    fn trim<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
        self.zero_now(offset, length, true);
        ready(Ok(()))
    }

    fn extents<'a>(&'a self, offset: u64, length: u64, extents_max: usize) -> IoFuture<'a, Vec<Extent>> {
        let chunks = self.chunks.read();
        let mut extents: Vec<Extent> = Vec::new();
        for (index, within, _) in pieces(offset, usize::try_from(length).unwrap_or(usize::MAX)) {
            let kind = if chunks[index].is_some() { ExtentKind::Data } else { ExtentKind::Hole };
            let run = within.len() as u64;
            let full = extents.len() == extents_max;
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.length += run,
                _ if full => break,
                _ => extents.push(Extent { length: run, kind }),
            }
        }
        ready(Ok(extents))
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        self.read_now(offset, buf);
        Some(Ok(()))
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Option<io::Result<()>> {
        self.write_now(offset, data);
        Some(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn holes_appear_where_nothing_was_written_or_all_was_unmapped() {
        let disk = MemoryDevice::new(5 * CHUNK_BYTES + 7);
        disk.write_now(CHUNK_BYTES - 1, &[1; 2]);
        disk.write_now(5 * CHUNK_BYTES, &[2; 7]);
        let extents = |max| disk.extents(0, disk.size(), max).now_or_never().unwrap().unwrap();
        let (data, hole) = (ExtentKind::Data, ExtentKind::Hole);
        let all = [(2 * CHUNK_BYTES, data), (3 * CHUNK_BYTES, hole), (7, data)];
        assert_eq!(extents(9), all.map(|(length, kind)| Extent { length, kind }));
        assert_eq!(extents(1).len(), 1);
        disk.zero_now(0, 2 * CHUNK_BYTES, true);
        disk.zero_now(CHUNK_BYTES, CHUNK_BYTES, false);
        assert_eq!(extents(9)[..2], [hole, data].map(|kind| Extent { length: CHUNK_BYTES, kind }));
        assert_eq!(disk.snapshot()[..5 * CHUNK_BYTES as usize], vec![0; 5 * CHUNK_BYTES as usize]);
    }
}
