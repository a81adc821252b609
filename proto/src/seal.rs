//! The seal: what turns the frames of an epoch into a commit. The same record travels on the control stream and ends the
//! epoch in the journal.

use crate::codec::{DecodeError, Reader, check_crc};
use crate::frame::FRAME_HEADER_BYTES;
use crate::units::{EpochId, Generation, Point, SessionToken};

/// First bytes of every seal record.
pub const SEAL_MAGIC: [u8; 4] = *b"TWS1";
/// Bytes of a seal record.
pub const SEAL_BYTES: usize = 124;

/// Offsets of a seal record.
pub mod layout {
    /// `(offset, bytes, field)`.
    pub const SEAL: &[(usize, usize, &str)] = &[
        (0, 4, "magic"),
        (4, 4, "passes"),
        (8, 8, "epoch"),
        (16, 8, "generation"),
        (24, 8, "cut_unix_us"),
        (32, 8, "frames"),
        (40, 8, "frame_bytes"),
        (48, 8, "data_blocks"),
        (56, 8, "zero_blocks"),
        (64, 8, "first_write_unix_us"),
        (72, 16, "session"),
        (88, 32, "digest"),
        (120, 4, "record_crc32"),
    ];
}

/// Totals and digest of one epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seal {
    /// Passes the epoch was sent in.
    pub passes: u32,
    /// The epoch.
    pub epoch: EpochId,
    /// Generation it was cut in.
    pub generation: Generation,
    /// The cut, microseconds since 1970 on the primary's clock.
    pub cut_unix_us: u64,
    /// Frames of all passes.
    pub frames: u64,
    /// Bytes of these frames.
    pub frame_bytes: u64,
    /// Blocks in data frames, counted once a frame.
    pub data_blocks: u64,
    /// Blocks in zero frames.
    pub zero_blocks: u64,
    /// The oldest write in the epoch, microseconds since 1970 on the primary's clock; 0 if it has none.
    pub first_write_unix_us: u64,
    /// The session that cut it.
    pub session: SessionToken,
    /// BLAKE3 of the fixed parts of all frames in order (each carries the checksums of its table and payload).
    pub digest: [u8; 32],
}

impl Seal {
    /// The point that this seal makes.
    #[must_use]
    pub fn point(&self) -> Point {
        Point { generation: self.generation, epoch: self.epoch }
    }

    /// Encodes the record.
    #[must_use]
    pub fn encode(&self) -> [u8; SEAL_BYTES] {
        let mut out = Vec::with_capacity(SEAL_BYTES);
        out.extend_from_slice(&SEAL_MAGIC);
        out.extend_from_slice(&self.passes.to_le_bytes());
        for value in [
            self.epoch.0,
            self.generation.0,
            self.cut_unix_us,
            self.frames,
            self.frame_bytes,
            self.data_blocks,
            self.zero_blocks,
            self.first_write_unix_us,
        ] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        out.extend_from_slice(&self.session.0);
        out.extend_from_slice(&self.digest);
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        let mut fixed = [0; SEAL_BYTES];
        fixed.copy_from_slice(&out);
        fixed
    }

    /// Decodes a record and checks its checksum.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let what = "seal";
        let mut r = Reader::new(what, bytes);
        r.magic(SEAL_MAGIC)?;
        let seal = Self {
            passes: r.u32()?,
            epoch: EpochId(r.u64()?),
            generation: Generation(r.u64()?),
            cut_unix_us: r.u64()?,
            frames: r.u64()?,
            frame_bytes: r.u64()?,
            data_blocks: r.u64()?,
            zero_blocks: r.u64()?,
            first_write_unix_us: r.u64()?,
            session: SessionToken(r.array()?),
            digest: r.array()?,
        };
        let stored = r.u32()?;
        r.expect_end()?;
        check_crc(what, stored, bytes.get(..SEAL_BYTES - 4).unwrap_or_default())?;
        Ok(seal)
    }
}

/// Counts and digests the frames of an epoch as they pass, at either side.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Frames seen.
    pub frames: u64,
    /// Their bytes.
    pub frame_bytes: u64,
    /// Blocks in data frames.
    pub data_blocks: u64,
    /// Blocks in zero frames.
    pub zero_blocks: u64,
    hasher: blake3::Hasher,
}

impl Tally {
    /// Adds a frame: its fixed part as encoded, the bytes of the whole frame, its blocks.
    pub fn add(&mut self, head: &[u8; FRAME_HEADER_BYTES], frame_bytes: usize, data_blocks: u64, zero_blocks: u64) {
        self.frames += 1;
        self.frame_bytes += frame_bytes as u64;
        self.data_blocks += data_blocks;
        self.zero_blocks += zero_blocks;
        self.hasher.update(head);
    }

    /// The digest so far.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        *self.hasher.finalize().as_bytes()
    }

    /// Whether the frames seen are the frames that `seal` speaks of.
    #[must_use]
    pub fn matches(&self, seal: &Seal) -> bool {
        (self.frames, self.frame_bytes, self.data_blocks, self.zero_blocks)
            == (seal.frames, seal.frame_bytes, seal.data_blocks, seal.zero_blocks)
            && self.digest() == seal.digest
    }
}

const _: () = {
    let (mut i, mut at) = (0, 0);
    while i < layout::SEAL.len() {
        assert!(layout::SEAL[i].0 == at, "fields of the seal follow each other");
        at += layout::SEAL[i].1;
        i += 1;
    }
    assert!(at == SEAL_BYTES);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_reads_back_and_a_flipped_bit_is_noticed() {
        let seal = Seal {
            passes: 2,
            epoch: EpochId(5),
            generation: Generation(3),
            cut_unix_us: 1_700_000_000_000_000,
            frames: 10,
            frame_bytes: 1000,
            data_blocks: 99,
            zero_blocks: 4,
            first_write_unix_us: 1_699_999_999_000_000,
            session: SessionToken([9; 16]),
            digest: [7; 32],
        };
        let bytes = seal.encode();
        assert_eq!(Seal::decode(&bytes).unwrap(), seal);
        for bit in 0..SEAL_BYTES * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Seal::decode(&bad).is_err(), "bit {bit}");
        }
        assert!(Seal::decode(&bytes[..100]).is_err());
    }
}
