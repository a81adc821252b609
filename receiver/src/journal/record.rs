//! Reads the records of one segment in order: frames (fixed part and extent table; payloads only when asked) and seals.
//!
//! The one decoder of the journal: recovery, the index of an earlier point and `check` all read through it.

use std::fs::File;
use std::io;
use std::sync::Arc;

use proto::codec::{DecodeError, check_crc};
use proto::frame::{FRAME_HEADER_BYTES, FRAME_MAGIC, FrameKind};
use proto::seal::SEAL_MAGIC;
use proto::{BlockExtent, FrameHeader, Seal};

use super::segment::{GroupId, PLACED_SEAL_BYTES, SEGMENT_HEADER_BYTES, decode_placed_seal};

/// Bytes read at once when payloads are skipped: a fixed part and a full extent table fit.
const WINDOW_BYTES: usize = 16 << 10;
/// Bytes read at once when a seal is searched for.
const SCAN_BYTES: usize = 1 << 20;

/// How far the payload of a frame is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Payloads {
    /// Not at all.
    Skip,
    /// Its checksum.
    Checksum,
    /// Its checksum, and that it decodes to the stated length.
    Decode,
}

/// A record of the journal.
#[derive(Debug)]
pub(crate) enum Record {
    /// `payload` is what looking at the payload found; the rest of the record is whole.
    Frame {
        header: FrameHeader,
        head: [u8; FRAME_HEADER_BYTES],
        extents: Vec<BlockExtent>,
        payload: Result<(), DecodeError>,
    },
    Seal(Seal),
}

/// Why a record cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("{0}")]
    Bad(#[from] DecodeError),
    #[error("cannot read: {0}")]
    Io(#[from] io::Error),
}

/// Walks one segment.
#[derive(Debug)]
pub(crate) struct SegmentReader {
    file: File,
    bytes: u64,
    number: u32,
    group_id: GroupId,
    volume_blocks: Arc<[u64]>,
    at: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl SegmentReader {
    /// Reads from the first record, up to `bytes`.
    pub(crate) fn new(file: File, bytes: u64, number: u32, group_id: GroupId, volume_blocks: Arc<[u64]>) -> Self {
        let at = SEGMENT_HEADER_BYTES as u64;
        Self { file, bytes, number, group_id, volume_blocks, at, window: Vec::new(), window_at: 0 }
    }

    /// Goes on at `offset`, where a record starts.
    pub(crate) fn seek(&mut self, offset: u64) {
        self.at = offset;
    }

    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The first seal at or after `from` that was written for this place of this journal.
    pub(crate) fn find_seal(&self, from: u64) -> io::Result<Option<(u64, Seal)>> {
        let mut chunk = vec![0; SCAN_BYTES + PLACED_SEAL_BYTES];
        let mut at = from;
        while at + PLACED_SEAL_BYTES as u64 <= self.bytes {
            let want = chunk.len().min((self.bytes - at) as usize);
            let buf = chunk.get_mut(..want).unwrap_or_default();
            let n = crate::disk::read_up_to(&self.file, buf, at)?;
            let buf = buf.get(..n).unwrap_or_default();
            for (i, bytes) in buf.windows(PLACED_SEAL_BYTES).enumerate().filter(|(_, w)| w.starts_with(&SEAL_MAGIC)) {
                let offset = at + i as u64;
                if let Ok(seal) = decode_placed_seal(&self.group_id, self.number, offset, bytes) {
                    return Ok(Some((offset, seal)));
                }
            }
            if n < want {
                break;
            }
            at += SCAN_BYTES as u64;
        }
        Ok(None)
    }

    /// Where the next record starts.
    pub(crate) fn offset(&self) -> u64 {
        self.at
    }

    /// The next record, `None` at the end of the segment. After an error the reader stays at the bad record.
    pub(crate) fn next(&mut self, payloads: Payloads) -> Result<Option<Record>, RecordError> {
        let left = self.bytes.saturating_sub(self.at);
        if left == 0 {
            return Ok(None);
        }
        let magic: [u8; 4] = self.array(0)?;
        if magic == SEAL_MAGIC {
            let bytes: [u8; PLACED_SEAL_BYTES] = self.array(0)?;
            let seal = decode_placed_seal(&self.group_id, self.number, self.at, &bytes)?;
            self.at += PLACED_SEAL_BYTES as u64;
            return Ok(Some(Record::Seal(seal)));
        }
        if magic != FRAME_MAGIC {
            return Err(DecodeError::Rule { what: "journal record", rule: "starts with the magic of a frame or a seal" }.into());
        }
        let head: [u8; FRAME_HEADER_BYTES] = self.array(0)?;
        let header = FrameHeader::decode(&head)?;
        if (header.frame_bytes() as u64) > left {
            let (needed, left) = (header.frame_bytes(), left as usize);
            return Err(DecodeError::Truncated { what: "frame", needed, left }.into());
        }
        let blocks = self.volume_blocks.get(usize::from(header.volume.0)).copied();
        let blocks = blocks.ok_or(DecodeError::Unknown { what: "frame volume", value: header.volume.0.into() })?;
        let extents = header.decode_extents(self.slice(FRAME_HEADER_BYTES, header.table_bytes())?, blocks)?;
        let payload = match header.kind {
            FrameKind::Data if payloads != Payloads::Skip => self.look_at_payload(&header, payloads)?,
            FrameKind::Data | FrameKind::Zero => Ok(()),
        };
        self.at += header.frame_bytes() as u64;
        Ok(Some(Record::Frame { header, head, extents, payload }))
    }

    fn look_at_payload(&mut self, header: &FrameHeader, how: Payloads) -> Result<Result<(), DecodeError>, RecordError> {
        let payload = self.slice(FRAME_HEADER_BYTES + header.table_bytes(), header.payload_bytes as usize)?;
        let whole = check_crc("frame payload", header.payload_crc32, payload);
        Ok(match how {
            Payloads::Decode => whole.and_then(|()| proto::frame::decode_payload(header, payload).map(drop)),
            Payloads::Skip | Payloads::Checksum => whole,
        })
    }

    fn array<const N: usize>(&mut self, skip: usize) -> Result<[u8; N], RecordError> {
        let slice = self.slice(skip, N)?;
        let left = slice.len();
        slice.try_into().map_err(|_| DecodeError::Truncated { what: "journal record", needed: N, left }.into())
    }

    /// `len` bytes, `skip` bytes into the record.
    fn slice(&mut self, skip: usize, len: usize) -> Result<&[u8], RecordError> {
        let start = self.at + skip as u64;
        let end = start + len as u64;
        if end > self.bytes {
            let left = self.bytes.saturating_sub(start) as usize;
            return Err(DecodeError::Truncated { what: "journal record", needed: len, left }.into());
        }
        let have = self.window_at + self.window.len() as u64;
        if start < self.window_at || end > have {
            // Never past the end that was given: what is beyond may be in the middle of being written.
            let want = len.max(WINDOW_BYTES).min((self.bytes - start) as usize);
            self.window.resize(want, 0);
            self.window_at = start;
            let n = crate::disk::read_up_to(&self.file, &mut self.window, start)?;
            self.window.truncate(n);
        }
        let from = (start - self.window_at) as usize;
        self.window
            .get(from..from + len)
            .ok_or_else(|| DecodeError::Truncated { what: "journal record", needed: len, left: 0 }.into())
    }
}
