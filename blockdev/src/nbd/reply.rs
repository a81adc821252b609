//! Encoding of replies into an outbox.

use super::error::Errno;
use super::outbox::Outbox;
use super::wire::*;
use crate::{Buf, Extent, ExtentKind};

pub(super) fn simple_header(cookie: u64, errno: u32) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut header = [0; SIMPLE_REPLY_BYTES];
    header[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    header[4..8].copy_from_slice(&errno.to_be_bytes());
    header[8..].copy_from_slice(&cookie.to_be_bytes());
    header
}

pub(super) fn chunk_header(cookie: u64, flags: u16, kind: u16, length: u32) -> [u8; CHUNK_HEADER_BYTES] {
    let mut header = [0; CHUNK_HEADER_BYTES];
    header[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    header[4..6].copy_from_slice(&flags.to_be_bytes());
    header[6..8].copy_from_slice(&kind.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header[16..].copy_from_slice(&length.to_be_bytes());
    header
}

/// Header of a chunk of read data, up to the data itself.
pub(super) fn data_header(cookie: u64, flags: u16, offset: u64, length: u32) -> [u8; CHUNK_HEADER_BYTES + 8] {
    let mut header = [0; CHUNK_HEADER_BYTES + 8];
    // The payload is at most PAYLOAD_BYTES_MAX, so the sum fits.
    header[..CHUNK_HEADER_BYTES].copy_from_slice(&chunk_header(cookie, flags, CHUNK_OFFSET_DATA, length + 8));
    header[CHUNK_HEADER_BYTES..].copy_from_slice(&offset.to_be_bytes());
    header
}

/// Success of a command that returns no data.
pub(super) fn done(out: &mut Outbox, cookie: u64) {
    out.push(&simple_header(cookie, 0));
}

/// Failure. Commands that answer in chunks (`structured`) fail in a chunk too.
pub(super) fn failed(out: &mut Outbox, cookie: u64, errno: Errno, structured: bool) {
    if structured {
        out.push(&chunk_header(cookie, CHUNK_FLAG_DONE, CHUNK_ERROR, 6));
        out.push(&(errno as u32).to_be_bytes());
        // No message.
        out.push(&0_u16.to_be_bytes());
    } else {
        out.push(&simple_header(cookie, errno as u32));
    }
}

/// One piece of the answer to a read.
#[derive(Debug)]
pub(super) enum Fragment {
    Data(Buf),
    Hole(u32),
}

/// A read in one piece.
pub(super) fn read_whole(out: &mut Outbox, cookie: u64, offset: u64, data: Buf, structured: bool) {
    if !structured {
        out.push(&simple_header(cookie, 0));
    } else if data.is_empty() {
        out.push(&chunk_header(cookie, CHUNK_FLAG_DONE, CHUNK_NONE, 0));
    } else {
        out.push(&data_header(cookie, CHUNK_FLAG_DONE, offset, data.len() as u32));
    }
    out.push_large(data);
}

/// A read in pieces that follow each other from `offset`.
pub(super) fn read_fragments(out: &mut Outbox, cookie: u64, mut offset: u64, fragments: Vec<Fragment>) {
    let count = fragments.len();
    for (index, fragment) in fragments.into_iter().enumerate() {
        let flags = if index + 1 == count { CHUNK_FLAG_DONE } else { 0 };
        match fragment {
            Fragment::Data(data) => {
                let length = data.len() as u32;
                out.push(&data_header(cookie, flags, offset, length));
                out.push_large(data);
                offset += u64::from(length);
            }
            Fragment::Hole(length) => {
                out.push(&chunk_header(cookie, flags, CHUNK_OFFSET_HOLE, 12));
                out.push(&offset.to_be_bytes());
                out.push(&length.to_be_bytes());
                offset += u64::from(length);
            }
        }
    }
}

/// The answer to BLOCK_STATUS; neighbours of one kind are joined. `extents` is not empty.
pub(super) fn block_status(out: &mut Outbox, cookie: u64, extents: &[Extent], one: bool) {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for extent in extents {
        let state = match extent.kind {
            ExtentKind::Data => 0,
            ExtentKind::Zero => STATE_ZERO,
            ExtentKind::Hole => STATE_HOLE | STATE_ZERO,
        };
        // Together at most the length asked for, which is 32 bits.
        let length = u32::try_from(extent.length).unwrap_or(u32::MAX);
        match runs.last_mut() {
            Some((total, last)) if *last == state => *total = total.saturating_add(length),
            Some(_) if one => break,
            _ => runs.push((length, state)),
        }
    }
    out.push(&chunk_header(cookie, CHUNK_FLAG_DONE, CHUNK_BLOCK_STATUS, 4 + 8 * runs.len() as u32));
    out.push(&BASE_ALLOCATION_ID.to_be_bytes());
    for (length, state) in runs {
        out.push(&length.to_be_bytes());
        out.push(&state.to_be_bytes());
    }
}
