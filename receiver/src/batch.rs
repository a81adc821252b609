//! Cuts a pass stream into whole, verified frames, and collects them for the journal.
//!
//! A frame is copied once, from the packets it came in to the buffer that is written. Nothing is allocated on a
//! length from the peer beyond [`FRAME_BYTES_MAX`](proto::frame::FRAME_BYTES_MAX).

use proto::codec::{DecodeError, check_crc};
use proto::frame::{FRAME_BYTES_MAX, FRAME_HEADER_BYTES};
use proto::units::VolumeIndex;
use proto::{BlockExtent, FrameHeader, FrameKind};

/// A batch is handed to the journal when it has this many bytes.
pub(crate) const BATCH_BYTES: usize = 256 << 10;

/// A frame of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FrameRef {
    pub(crate) bytes: u32,
    pub(crate) volume: VolumeIndex,
    pub(crate) kind: FrameKind,
    pub(crate) pass: u16,
    pub(crate) extents: u16,
}

/// Whole frames, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) bytes: Vec<u8>,
    pub(crate) frames: Vec<FrameRef>,
    pub(crate) extents: Vec<BlockExtent>,
}

/// A frame that was just completed, for the rules of the session.
#[derive(Debug)]
pub(crate) struct Arrived<'a> {
    pub(crate) header: &'a FrameHeader,
    pub(crate) head: &'a [u8; FRAME_HEADER_BYTES],
    pub(crate) blocks: u64,
}

/// Collects the bytes of passes. One for a session.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    batch: Batch,
    /// Bytes of whole frames in `batch.bytes`; the rest is a frame in part.
    whole: usize,
    /// The fixed part of the frame in part, and the blocks of its volume.
    header: Option<(FrameHeader, u64)>,
}

impl Assembler {
    /// Takes bytes of the stream. `begin` decides on a fixed part, before anything of its frame is stored beyond it, and tells
    /// the blocks of its volume; `arrived` is told of each complete frame.
    pub(crate) fn push<E: From<DecodeError>>(
        &mut self,
        mut bytes: &[u8],
        begin: &mut dyn FnMut(&FrameHeader) -> Result<u64, E>,
        arrived: &mut dyn FnMut(Arrived<'_>),
    ) -> Result<(), E> {
        if self.batch.bytes.capacity() == 0 {
            self.batch.bytes.reserve_exact(BATCH_BYTES + FRAME_BYTES_MAX);
        }
        while !bytes.is_empty() {
            let have = self.batch.bytes.len() - self.whole;
            let want = self.header.as_ref().map_or(FRAME_HEADER_BYTES, |(h, _)| h.frame_bytes());
            let (now, later) = bytes.split_at(bytes.len().min(want - have));
            self.batch.bytes.extend_from_slice(now);
            bytes = later;
            if have + now.len() < want {
                break;
            }
            let frame = self.batch.bytes.get(self.whole..).unwrap_or_default();
            let short = DecodeError::Truncated { what: "frame", needed: want, left: frame.len() };
            let (head, body) = frame.split_first_chunk::<FRAME_HEADER_BYTES>().ok_or(short)?;
            let Some((header, volume_blocks)) = self.header else {
                let header = FrameHeader::decode(head)?;
                self.header = Some((header, begin(&header)?));
                continue;
            };
            let (table, payload) = body.split_at(header.table_bytes());
            let extents = header.decode_extents(table, volume_blocks)?;
            check_crc("frame payload", header.payload_crc32, payload)?;
            let blocks = extents.iter().map(|e| u64::from(e.blocks)).sum();
            arrived(Arrived { header: &header, head, blocks });
            self.batch.frames.push(FrameRef {
                bytes: want as u32,
                volume: header.volume,
                kind: header.kind,
                pass: header.pass,
                extents: header.extents,
            });
            self.batch.extents.extend_from_slice(&extents);
            self.whole = self.batch.bytes.len();
            self.header = None;
        }
        Ok(())
    }

    /// Bytes that may come before somebody must ask whether the batch [is ready](Self::is_ready); at least 1. QUIC hands over
    /// many MiB at once when it had to put a stream in order.
    pub(crate) fn room(&self) -> usize {
        (BATCH_BYTES + FRAME_BYTES_MAX).saturating_sub(self.batch.bytes.len()).max(1)
    }

    /// Whether the batch is large enough to be handed over.
    pub(crate) fn is_ready(&self) -> bool {
        self.whole >= BATCH_BYTES
    }

    /// Whether whole frames of so many bytes are collected.
    #[cfg(any(test, feature = "simulation"))]
    pub(crate) fn holds(&self, bytes: usize) -> bool {
        self.whole >= bytes
    }

    /// The whole frames collected so far, if there are any; a frame in part stays.
    pub(crate) fn take(&mut self) -> Option<Batch> {
        if self.whole == 0 {
            return None;
        }
        let mut next = Batch::default();
        let rest = self.batch.bytes.get(self.whole..).unwrap_or_default();
        if !rest.is_empty() {
            next.bytes.reserve_exact(BATCH_BYTES + FRAME_BYTES_MAX);
            next.bytes.extend_from_slice(rest);
        }
        self.batch.bytes.truncate(self.whole);
        self.whole = 0;
        Some(std::mem::replace(&mut self.batch, next))
    }

    /// The stream ended.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`] if it ended within a frame.
    pub(crate) fn end(&self) -> Result<(), DecodeError> {
        let left = self.batch.bytes.len() - self.whole;
        if left == 0 {
            return Ok(());
        }
        let needed = self.header.as_ref().map_or(FRAME_HEADER_BYTES, |(h, _)| h.frame_bytes());
        Err(DecodeError::Truncated { what: "frame at the end of a pass", needed, left })
    }

    /// Forgets everything: the epoch was abandoned.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proto::frame::{encode_data, encode_zero};
    use proto::{BlockIndex, Codec, EpochId};

    proptest! {
        /// However the stream is cut into packets, the same frames come out, byte for byte.
        #[test]
        fn any_cutting_gives_the_same_frames(cuts in prop::collection::vec(1..5000usize, 1..40), take in 1..6usize) {
            let extent = |start, blocks| BlockExtent { start: BlockIndex(start), blocks };
            let mut stream = Vec::new();
            for i in 0..6u64 {
                let content = vec![i as u8; 4096 * (i as usize + 1)];
                stream.extend(encode_data(VolumeIndex(0), EpochId(1), 0, &[extent(i * 10, i as u32 + 1)], &content, Codec::Raw));
                stream.extend(encode_zero(VolumeIndex(0), EpochId(1), 0, &[extent(i, 1), extent(i + 4, 2)]));
            }
            let (mut assembler, mut out, mut count, mut extents) = (Assembler::default(), Vec::new(), 0, 0);
            let mut left = stream.as_slice();
            for (i, cut) in cuts.iter().cycle().enumerate() {
                let (now, later) = left.split_at((*cut).min(left.len()));
                assembler.push::<DecodeError>(now, &mut |_| Ok(100), &mut |a| { count += 1; assert!(a.blocks > 0); }).unwrap();
                if i % take == 0 && let Some(batch) = assembler.take() {
                    prop_assert_eq!(batch.bytes.len(), batch.frames.iter().map(|f| f.bytes as usize).sum::<usize>());
                    extents += batch.extents.len();
                    out.extend(batch.bytes);
                }
                left = later;
                if left.is_empty() { break; }
                prop_assert!(i < 100_000);
            }
            assembler.end().unwrap();
            if let Some(batch) = assembler.take() { extents += batch.extents.len(); out.extend(batch.bytes); }
            prop_assert_eq!(out, stream);
            prop_assert_eq!((count, extents), (12, 18));
        }
    }

    /// Would catch batches of the size of whatever QUIC hands over: the queue behind them is counted in batches.
    #[test]
    fn a_batch_stays_within_its_limit() {
        let mut stream = Vec::new();
        for i in 0..300 {
            let extent = BlockExtent { start: BlockIndex(i * 40), blocks: 32 };
            stream.extend(encode_data(VolumeIndex(0), EpochId(1), 0, &[extent], &vec![i as u8; 32 * 4096], Codec::Raw));
        }
        let (mut assembler, mut left, mut out) = (Assembler::default(), stream.as_slice(), Vec::new());
        while !left.is_empty() {
            let (now, later) = left.split_at(left.len().min(assembler.room()));
            left = later;
            assembler.push::<DecodeError>(now, &mut |_| Ok(1 << 20), &mut |_| ()).unwrap();
            if assembler.is_ready() {
                let batch = assembler.take().unwrap();
                assert!(batch.bytes.capacity() <= BATCH_BYTES + FRAME_BYTES_MAX);
                out.extend(batch.bytes);
            }
        }
        out.extend(assembler.take().map(|b| b.bytes).unwrap_or_default());
        assert_eq!(out, stream);
    }

    #[test]
    fn a_frame_cut_short_is_named() {
        let frame = encode_zero(VolumeIndex(0), EpochId(1), 0, &[BlockExtent { start: BlockIndex(0), blocks: 1 }]);
        let mut assembler = Assembler::default();
        assembler.push::<DecodeError>(&frame[..50], &mut |_| Ok(1), &mut |_| ()).unwrap();
        assert_eq!(assembler.end().unwrap_err().to_string(), "frame at the end of a pass: truncated, 52 bytes needed, 50 left");
    }
}
