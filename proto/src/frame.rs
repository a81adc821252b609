//! The frame: up to 128 KiB of changed blocks of one volume, or a list of zeroed runs.
//!
//! The bytes on the wire are the bytes in the journal. `docs/wire.md` has the byte table; a test holds it against
//! [`layout`].

use crate::codec::{DecodeError, Reader, bounded, check_crc};
use crate::units::{BLOCK_BYTES, BlockExtent, BlockIndex, EpochId, VolumeIndex};

/// First bytes of every frame.
pub const FRAME_MAGIC: [u8; 4] = *b"TWF1";
/// Bytes of the fixed part of a frame.
pub const FRAME_HEADER_BYTES: usize = 40;
/// Bytes of one entry of the extent table.
pub const EXTENT_BYTES: usize = 12;
/// Most content a data frame carries, in bytes: 32 blocks. Larger frames compress little better and make reading one
/// block of a view dearer.
pub const FRAME_CONTENT_BYTES_MAX: usize = 128 * 1024;
/// Most extents in a frame.
pub const FRAME_EXTENTS_MAX: usize = 256;
/// Largest frame in bytes, all parts.
pub const FRAME_BYTES_MAX: usize = FRAME_HEADER_BYTES + FRAME_EXTENTS_MAX * EXTENT_BYTES + FRAME_CONTENT_BYTES_MAX;

/// Offsets of the fixed part, in bytes; integers are little endian.
pub mod layout {
    /// `(offset, bytes, field)` of the fixed part.
    pub const FRAME: &[(usize, usize, &str)] = &[
        (0, 4, "magic"),
        (4, 1, "kind"),
        (5, 1, "codec"),
        (6, 2, "volume"),
        (8, 8, "epoch"),
        (16, 2, "pass"),
        (18, 2, "extents"),
        (20, 4, "payload_bytes"),
        (24, 4, "content_bytes"),
        (28, 4, "payload_crc32"),
        (32, 4, "extents_crc32"),
        (36, 4, "header_crc32"),
    ];
    /// `(offset, bytes, field)` of one entry of the extent table.
    pub const EXTENT: &[(usize, usize, &str)] = &[(0, 8, "first_block"), (8, 4, "blocks")];
}

/// What a frame says about its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// The payload holds their content.
    Data,
    /// They read as zeroes; there is no payload.
    Zero,
}

/// How the payload is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// As it is.
    Raw,
    /// One LZ4 block (no size prefix).
    Lz4,
}

/// The decoded fixed part of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the frame says.
    pub kind: FrameKind,
    /// How its payload is stored.
    pub codec: Codec,
    /// Volume within the group.
    pub volume: VolumeIndex,
    /// Epoch it belongs to.
    pub epoch: EpochId,
    /// Pass of that epoch; a later pass wins.
    pub pass: u16,
    /// Entries in the extent table, 1 to [`FRAME_EXTENTS_MAX`].
    pub extents: u16,
    /// Bytes of payload as stored, at most [`FRAME_CONTENT_BYTES_MAX`].
    pub payload_bytes: u32,
    /// Bytes of payload once decoded: blocks of the extents times 4 KiB; 0 for a zero frame.
    pub content_bytes: u32,
    /// CRC-32 of the payload as stored.
    pub payload_crc32: u32,
    /// CRC-32 of the extent table.
    pub extents_crc32: u32,
}

impl FrameHeader {
    /// Decodes and checks the fixed part. Bounds hold for every field afterwards.
    ///
    /// # Errors
    /// [`DecodeError`] names the field.
    pub fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<Self, DecodeError> {
        let what = "frame header";
        let mut r = Reader::new(what, bytes);
        r.magic(FRAME_MAGIC)?;
        let (kind, codec) = (r.u8()?, r.u8()?);
        let header = Self {
            volume: VolumeIndex(r.u16()?),
            epoch: EpochId(r.u64()?),
            pass: r.u16()?,
            extents: r.u16()?,
            payload_bytes: r.u32()?,
            content_bytes: r.u32()?,
            payload_crc32: r.u32()?,
            extents_crc32: r.u32()?,
            kind: match kind {
                1 => FrameKind::Data,
                2 => FrameKind::Zero,
                value => return Err(DecodeError::Unknown { what: "frame kind", value: value.into() }),
            },
            codec: match codec {
                0 => Codec::Raw,
                1 => Codec::Lz4,
                value => return Err(DecodeError::Unknown { what: "frame codec", value: value.into() }),
            },
        };
        let stored = r.u32()?;
        r.expect_end()?;
        check_crc(what, stored, bytes.get(..36).unwrap_or_default())?;
        bounded("frame payload bytes", header.payload_bytes.into(), FRAME_CONTENT_BYTES_MAX as u64)?;
        bounded("frame content bytes", header.content_bytes.into(), FRAME_CONTENT_BYTES_MAX as u64)?;
        bounded("frame extents", header.extents.into(), FRAME_EXTENTS_MAX as u64)?;
        let rule = |rule| DecodeError::Rule { what, rule };
        if header.extents == 0 {
            return Err(rule("a frame has at least one extent"));
        }
        match header.kind {
            FrameKind::Zero if header.payload_bytes != 0 || header.content_bytes != 0 || header.codec != Codec::Raw => {
                Err(rule("a zero frame has no payload"))
            }
            FrameKind::Data if header.content_bytes == 0 || header.payload_bytes == 0 => Err(rule("a data frame has a payload")),
            FrameKind::Data if header.codec == Codec::Raw && header.payload_bytes != header.content_bytes => {
                Err(rule("a raw payload is as long as its content"))
            }
            _ => Ok(header),
        }
    }

    /// Encodes the fixed part.
    #[must_use]
    pub fn encode(&self) -> [u8; FRAME_HEADER_BYTES] {
        let mut out = Vec::with_capacity(FRAME_HEADER_BYTES);
        out.extend_from_slice(&FRAME_MAGIC);
        out.push(match self.kind {
            FrameKind::Data => 1,
            FrameKind::Zero => 2,
        });
        out.push(match self.codec {
            Codec::Raw => 0,
            Codec::Lz4 => 1,
        });
        out.extend_from_slice(&self.volume.0.to_le_bytes());
        out.extend_from_slice(&self.epoch.0.to_le_bytes());
        out.extend_from_slice(&self.pass.to_le_bytes());
        out.extend_from_slice(&self.extents.to_le_bytes());
        out.extend_from_slice(&self.payload_bytes.to_le_bytes());
        out.extend_from_slice(&self.content_bytes.to_le_bytes());
        out.extend_from_slice(&self.payload_crc32.to_le_bytes());
        out.extend_from_slice(&self.extents_crc32.to_le_bytes());
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        let mut fixed = [0; FRAME_HEADER_BYTES];
        fixed.copy_from_slice(&out);
        fixed
    }

    /// Bytes of the extent table.
    #[must_use]
    pub fn table_bytes(&self) -> usize {
        usize::from(self.extents) * EXTENT_BYTES
    }

    /// Bytes that follow the fixed part: extent table and payload.
    #[must_use]
    pub fn body_bytes(&self) -> usize {
        self.table_bytes() + self.payload_bytes as usize
    }

    /// Bytes of the whole frame.
    #[must_use]
    pub fn frame_bytes(&self) -> usize {
        FRAME_HEADER_BYTES + self.body_bytes()
    }

    /// Decodes the extent table and checks it: checksum, runs not empty, in rising order, inside a volume of
    /// `volume_blocks`, and as many blocks as the header says.
    ///
    /// # Errors
    /// [`DecodeError`] names the rule.
    pub fn decode_extents(&self, table: &[u8], volume_blocks: u64) -> Result<Vec<BlockExtent>, DecodeError> {
        let what = "frame extents";
        check_crc(what, self.extents_crc32, table)?;
        let mut r = Reader::new(what, table);
        let mut extents = Vec::with_capacity(usize::from(self.extents).min(FRAME_EXTENTS_MAX));
        let (mut end, mut blocks) = (0_u64, 0_u64);
        for _ in 0..self.extents {
            let extent = BlockExtent { start: BlockIndex(r.u64()?), blocks: r.u32()? };
            if extent.blocks == 0 || extent.start.0 < end {
                return Err(DecodeError::Rule { what, rule: "extents are not empty and in rising order" });
            }
            end = extent.end();
            bounded("last block of an extent", end, volume_blocks)?;
            blocks += u64::from(extent.blocks);
            extents.push(extent);
        }
        r.expect_end()?;
        if self.kind == FrameKind::Data && blocks * BLOCK_BYTES != u64::from(self.content_bytes) {
            return Err(DecodeError::Rule { what, rule: "as many blocks as the content has bytes" });
        }
        Ok(extents)
    }
}

/// A whole frame, borrowed from the bytes it was decoded from.
#[derive(Clone, Debug)]
pub struct Frame<'a> {
    /// Its fixed part.
    pub header: FrameHeader,
    /// Its extents in rising order.
    pub extents: Vec<BlockExtent>,
    /// Its payload as stored; checksum verified.
    pub payload: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Decodes the body of a frame whose header was decoded, verifying every checksum.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode_body(header: FrameHeader, body: &'a [u8], volume_blocks: u64) -> Result<Self, DecodeError> {
        let mut r = Reader::new("frame body", body);
        let extents = header.decode_extents(r.bytes(header.table_bytes())?, volume_blocks)?;
        let payload = r.bytes(header.payload_bytes as usize)?;
        r.expect_end()?;
        check_crc("frame payload", header.payload_crc32, payload)?;
        Ok(Self { header, extents, payload })
    }

    /// Decodes a whole frame, which must fill `bytes`.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(bytes: &'a [u8], volume_blocks: u64) -> Result<Self, DecodeError> {
        let (head, body) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>().ok_or(DecodeError::Truncated {
            what: "frame header",
            needed: FRAME_HEADER_BYTES,
            left: bytes.len(),
        })?;
        Self::decode_body(FrameHeader::decode(head)?, body, volume_blocks)
    }

    /// The content: blocks of the extents, one after the other. Empty for a zero frame.
    ///
    /// # Errors
    /// [`DecodeError`] if the payload does not decompress to exactly the length the header states.
    pub fn content(&self) -> Result<Vec<u8>, DecodeError> {
        decode_payload(&self.header, self.payload)
    }
}

/// Decompresses a payload whose checksum was verified.
///
/// # Errors
/// [`DecodeError::Rule`] if it does not decompress to exactly `content_bytes`.
pub fn decode_payload(header: &FrameHeader, payload: &[u8]) -> Result<Vec<u8>, DecodeError> {
    match header.codec {
        Codec::Raw => Ok(payload.to_vec()),
        Codec::Lz4 => {
            let mut content = vec![0; header.content_bytes as usize];
            match lz4_flex::block::decompress_into(payload, &mut content) {
                Ok(n) if n == content.len() => Ok(content),
                _ => Err(DecodeError::Rule { what: "frame payload", rule: "LZ4 decodes to the stated length" }),
            }
        }
    }
}

/// Encodes a data frame: `content` is the blocks of `extents` one after the other. Compresses with LZ4 if that is
/// allowed and makes it smaller.
///
/// # Panics
/// If `extents` and `content` break the frame's own rules: they are ours.
#[must_use]
pub fn encode_data(
    volume: VolumeIndex,
    epoch: EpochId,
    pass: u16,
    extents: &[BlockExtent],
    content: &[u8],
    codec: Codec,
) -> Vec<u8> {
    encode_data_with(volume, epoch, pass, extents, content, |content, room| match codec {
        Codec::Lz4 => lz4_flex::block::compress_into(content, room).ok(),
        Codec::Raw => None,
    })
}

/// As [`encode_data`], with the caller's own LZ4 compressor: it gets the content and room for the worst case, and returns the
/// bytes of the LZ4 block it made, or `None` to store the content as it is. A block that saves nothing is not used.
///
/// # Panics
/// As [`encode_data`].
#[must_use]
pub fn encode_data_with(
    volume: VolumeIndex,
    epoch: EpochId,
    pass: u16,
    extents: &[BlockExtent],
    content: &[u8],
    compress: impl FnOnce(&[u8], &mut [u8]) -> Option<usize>,
) -> Vec<u8> {
    let blocks: u64 = extents.iter().map(|e| u64::from(e.blocks)).sum();
    assert!(blocks * BLOCK_BYTES == content.len() as u64 && content.len() <= FRAME_CONTENT_BYTES_MAX && !content.is_empty());
    let table = encode_table(extents);
    let body_at = FRAME_HEADER_BYTES + table.len();
    let mut out = vec![0; body_at + lz4_flex::block::get_maximum_output_size(content.len())];
    let packed = compress(content, &mut out[body_at..]).filter(|n| *n < content.len());
    let (codec, payload_bytes) = match packed {
        Some(n) => (Codec::Lz4, n),
        None => {
            out[body_at..body_at + content.len()].copy_from_slice(content);
            (Codec::Raw, content.len())
        }
    };
    out.truncate(body_at + payload_bytes);
    let header = FrameHeader {
        kind: FrameKind::Data,
        codec,
        volume,
        epoch,
        pass,
        extents: extents.len() as u16,
        payload_bytes: payload_bytes as u32,
        content_bytes: content.len() as u32,
        payload_crc32: crc32fast::hash(&out[body_at..]),
        extents_crc32: crc32fast::hash(&table),
    };
    out[..FRAME_HEADER_BYTES].copy_from_slice(&header.encode());
    out[FRAME_HEADER_BYTES..body_at].copy_from_slice(&table);
    out
}

/// Encodes a zero frame.
///
/// # Panics
/// If `extents` is empty or longer than [`FRAME_EXTENTS_MAX`].
#[must_use]
pub fn encode_zero(volume: VolumeIndex, epoch: EpochId, pass: u16, extents: &[BlockExtent]) -> Vec<u8> {
    let table = encode_table(extents);
    let header = FrameHeader {
        kind: FrameKind::Zero,
        codec: Codec::Raw,
        volume,
        epoch,
        pass,
        extents: extents.len() as u16,
        payload_bytes: 0,
        content_bytes: 0,
        payload_crc32: crc32fast::hash(&[]),
        extents_crc32: crc32fast::hash(&table),
    };
    let mut out = header.encode().to_vec();
    out.extend_from_slice(&table);
    out
}

fn encode_table(extents: &[BlockExtent]) -> Vec<u8> {
    assert!((1..=FRAME_EXTENTS_MAX).contains(&extents.len()));
    let mut table = Vec::with_capacity(extents.len() * EXTENT_BYTES);
    for extent in extents {
        table.extend_from_slice(&extent.start.0.to_le_bytes());
        table.extend_from_slice(&extent.blocks.to_le_bytes());
    }
    table
}

const _: () = {
    let (mut i, mut at) = (0, 0);
    while i < layout::FRAME.len() {
        assert!(layout::FRAME[i].0 == at, "fields of the frame header follow each other");
        at += layout::FRAME[i].1;
        i += 1;
    }
    assert!(at == FRAME_HEADER_BYTES);
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn extent(start: u64, blocks: u32) -> BlockExtent {
        BlockExtent { start: BlockIndex(start), blocks }
    }

    /// Golden bytes of version 1: a change here is a change of the format.
    #[test]
    fn golden_zero_and_data_frames() {
        let zero = encode_zero(VolumeIndex(1), EpochId(7), 0, &[extent(2, 3)]);
        let hex = |b: &[u8]| b.iter().map(|x| format!("{x:02x}")).collect::<String>();
        assert_eq!(hex(&zero[..28]), "54574631020001000700000000000000000001000000000000000000");
        assert_eq!(hex(&zero[40..]), "020000000000000003000000");
        let data = encode_data(VolumeIndex(0), EpochId(1), 2, &[extent(5, 1)], &[0xAB; 4096], Codec::Lz4);
        assert_eq!(hex(&data[..20]), "5457463101010000010000000000000002000100");
        assert_eq!(Frame::decode(&data, 6).unwrap().content().unwrap(), [0xAB; 4096]);
    }

    #[test]
    fn an_extent_beyond_the_volume_is_refused() {
        let zero = encode_zero(VolumeIndex(0), EpochId(1), 0, &[extent(2, 3)]);
        assert!(Frame::decode(&zero, 5).is_ok());
        assert!(matches!(Frame::decode(&zero, 4), Err(DecodeError::TooLong { .. })));
        let huge = encode_zero(VolumeIndex(0), EpochId(1), 0, &[extent(u64::MAX, u32::MAX)]);
        assert!(Frame::decode(&huge, 1 << 32).is_err());
    }

    proptest! {
        #[test]
        fn frames_read_back(seed in any::<u8>(), starts in prop::collection::btree_set(0..1000u64, 1..32), lz4 in any::<bool>()) {
            let extents: Vec<_> = starts.iter().map(|s| extent(*s, 1)).collect();
            let content: Vec<u8> = (0..extents.len() * 4096).map(|i| ((i as u64 * 2_654_435_761 * u64::from(seed)) >> 24) as u8).collect();
            let codec = if lz4 { Codec::Lz4 } else { Codec::Raw };
            let bytes = encode_data(VolumeIndex(3), EpochId(9), 1, &extents, &content, codec);
            let frame = Frame::decode(&bytes, 1000).unwrap();
            prop_assert_eq!(frame.content().unwrap(), content);
            prop_assert_eq!(frame.extents, extents);
        }

        /// One flipped bit anywhere is noticed; no input panics.
        #[test]
        fn a_flipped_bit_is_noticed(at in 0..4200usize, bit in 0..8u8) {
            let content: Vec<u8> = (0..4096u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
            let mut bytes = encode_data(VolumeIndex(0), EpochId(1), 0, &[extent(0, 1)], &content, Codec::Lz4);
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert!(Frame::decode(&bytes, 10).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Frame::decode(&bytes, 10);
        }
    }
}
