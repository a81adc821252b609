//! Replies that wait to be sent: small bytes together, large payloads as they are, sent by one vectored write.

use std::collections::VecDeque;
use std::io::IoSlice;

use super::pool::Pool;
use crate::Buf;

/// Pieces handed to one vectored write.
pub(super) const IOVECS_MAX: usize = 32;

#[derive(Debug)]
enum Piece {
    /// So many of the next small bytes.
    Small(usize),
    Large(Buf),
}

/// Bounded by the connection's bytes in flight: a reply counts until it is sent.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    small: Vec<u8>,
    /// Small bytes already sent.
    small_sent: usize,
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece already sent, if it is large.
    large_sent: usize,
    bytes: usize,
}

impl Outbox {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Bytes that wait to be sent.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.small.extend_from_slice(bytes);
        self.account(bytes.len());
    }

    /// Appends `header` and `length` bytes that `fill` writes in place; takes all back if `fill` does not succeed.
    pub(super) fn push_with<T>(&mut self, header: &[u8], length: usize, fill: impl FnOnce(&mut [u8]) -> Option<T>) -> Option<T> {
        let before = self.small.len();
        self.small.extend_from_slice(header);
        let body = self.small.len();
        self.small.resize(body + length, 0);
        let result = fill(&mut self.small[body..]);
        if result.is_some() {
            self.account(header.len() + length);
        } else {
            self.small.truncate(before);
        }
        result
    }

    pub(super) fn push_large(&mut self, buf: Buf) {
        if !buf.is_empty() {
            self.bytes += buf.len();
            self.pieces.push_back(Piece::Large(buf));
        }
    }

    fn account(&mut self, length: usize) {
        self.bytes += length;
        match self.pieces.back_mut() {
            Some(Piece::Small(n)) => *n += length,
            _ => self.pieces.push_back(Piece::Small(length)),
        }
    }

    /// The next slices to send, into `slices`; returns how many.
    pub(super) fn fill_slices<'a>(&'a self, slices: &mut [IoSlice<'a>; IOVECS_MAX]) -> usize {
        let mut small_at = self.small_sent;
        let mut skip = self.large_sent;
        let mut count = 0;
        for (slot, piece) in slices.iter_mut().zip(&self.pieces) {
            *slot = match piece {
                Piece::Small(n) => {
                    let slice = &self.small[small_at..small_at + n];
                    small_at += n;
                    IoSlice::new(slice)
                }
                Piece::Large(buf) => IoSlice::new(&buf[std::mem::take(&mut skip)..]),
            };
            count += 1;
        }
        count
    }

    /// `n` bytes were sent; buffers that are done go back to the pool.
    pub(super) fn advance(&mut self, mut n: usize, pool: &Pool) {
        self.bytes -= n;
        while n > 0 {
            match self.pieces.front_mut() {
                Some(Piece::Small(left)) => {
                    let sent = n.min(*left);
                    *left -= sent;
                    self.small_sent += sent;
                    n -= sent;
                    if *left == 0 {
                        self.pieces.pop_front();
                    }
                }
                Some(Piece::Large(buf)) => {
                    let sent = n.min(buf.len() - self.large_sent);
                    self.large_sent += sent;
                    n -= sent;
                    if self.large_sent == buf.len() {
                        self.large_sent = 0;
                        if let Some(Piece::Large(buf)) = self.pieces.pop_front() {
                            pool.give(buf);
                        }
                    }
                }
                None => unreachable!("sent more than there was"),
            }
        }
        if self.small_sent == self.small.len() {
            self.small.clear();
            self.small_sent = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_leave_in_order_however_they_are_cut() {
        for step in [1, 2, 3, 7, 100] {
            let pool = Pool::default();
            let mut out = Outbox::default();
            out.push(b"ab");
            out.push_large(Buf::copy_of(b"CDE"));
            out.push(b"f");
            assert!(out.push_with(b"gh", 2, |_| None::<()>).is_none());
            out.push_with(b"i", 2, |space| {
                space.copy_from_slice(b"jk");
                Some(())
            });
            out.push_large(Buf::copy_of(b"LM"));
            let mut sent = Vec::new();
            while !out.is_empty() {
                let mut slices = [IoSlice::new(&[]); IOVECS_MAX];
                let count = out.fill_slices(&mut slices);
                let flat: Vec<u8> = slices[..count].iter().flat_map(|s| s.iter().copied()).collect();
                assert_eq!(flat.len(), out.bytes());
                let n = flat.len().min(step);
                sent.extend_from_slice(&flat[..n]);
                out.advance(n, &pool);
            }
            assert_eq!(sent, b"abCDEfijkLM");
            assert!(out.small.is_empty() && out.pieces.is_empty());
        }
    }
}
