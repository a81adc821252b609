//! Buffers of one connection, kept for reuse: a fresh one costs zeroing and page faults, more than the copy into it.

use std::cell::RefCell;

use crate::Buf;

/// Most bytes that idle buffers of one connection may keep; beyond it they are freed.
const IDLE_BYTES_MAX: usize = 8 << 20;
/// Most idle buffers; bounds the search.
const IDLE_BUFS_MAX: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Pool {
    idle: RefCell<Idle>,
}

#[derive(Debug, Default)]
struct Idle {
    bufs: Vec<Buf>,
    bytes: usize,
}

impl Pool {
    /// A buffer of `len` bytes with any content of this connection's earlier requests in it: the caller overwrites it all.
    pub(super) fn take(&self, len: usize) -> Buf {
        let mut idle = self.idle.borrow_mut();
        // The smallest that fits, and not one that is far too large.
        let fits = |buf: &Buf| buf.capacity() >= len && buf.capacity() / 4 <= len.max(4096);
        // Among equals the one that came back last: the processor's cache may still hold it.
        let best = (0..idle.bufs.len()).rev().filter(|&i| fits(&idle.bufs[i])).min_by_key(|&i| idle.bufs[i].capacity());
        match best {
            Some(index) => {
                let mut buf = idle.bufs.remove(index);
                idle.bytes -= buf.capacity();
                buf.set_len(len);
                buf
            }
            None => Buf::zeroed(len),
        }
    }

    pub(super) fn give(&self, buf: Buf) {
        let mut idle = self.idle.borrow_mut();
        if idle.bufs.len() < IDLE_BUFS_MAX && idle.bytes + buf.capacity() <= IDLE_BYTES_MAX {
            idle.bytes += buf.capacity();
            idle.bufs.push(buf);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reuses_what_fits_and_keeps_a_bound() {
        let pool = Pool::default();
        pool.give(Buf::zeroed(1 << 20));
        assert_eq!(pool.take(100).capacity(), 4096, "a large buffer is not spent on a small request");
        let buf = pool.take((1 << 20) - 5);
        assert_eq!((buf.len(), buf.capacity()), ((1 << 20) - 5, 1 << 20));
        for _ in 0..100 {
            pool.give(Buf::zeroed(1 << 20));
        }
        assert_eq!(pool.idle.borrow().bytes, IDLE_BYTES_MAX);
    }
}
