//! Hashes of a range of the copy: how a primary finds out which of its suspect blocks differ, without sending them.
//!
//! The question names a range and a granule; the answer has one BLAKE3 hash for each granule of the newest committed point. Blocks
//! hash as they travel: whole, the last one of a volume padded with zeroes.

use crate::codec::{DecodeError, Reader, bounded};
use crate::units::{BLOCK_BYTES, BlockIndex, VOLUME_BYTES_MAX, VolumeIndex};

/// Hashes in one answer at most: it fits a control message.
pub const HASHES_MAX: usize = 480;
/// Blocks of one question at most: 30 MiB, which bounds the time that an answer takes.
pub const QUERY_BLOCKS_MAX: u32 = 7680;
/// Questions that may wait for their answer. A primary that asks more is ended as misbehaving.
pub const QUERIES_IN_FLIGHT_MAX: usize = 8;

/// A BLAKE3 hash.
pub type Hash = [u8; 32];
/// Stands for a granule that the receiver cannot read, because what it stored is damaged. No content is known to hash to it, so it differs.
pub const UNREADABLE: Hash = [0; 32];

/// Which hashes are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashQuery {
    /// Comes back with the answer.
    pub id: u32,
    /// The volume.
    pub volume: VolumeIndex,
    /// First block.
    pub start: BlockIndex,
    /// Number of blocks, 1 to [`QUERY_BLOCKS_MAX`].
    pub blocks: u32,
    /// Blocks of one hash; the last hash may be of fewer.
    pub chunk_blocks: u32,
}

impl HashQuery {
    /// Hashes that answer it.
    #[must_use]
    pub fn count(&self) -> usize {
        self.blocks.div_ceil(self.chunk_blocks.max(1)) as usize
    }

    /// One past the last block.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.start.0.saturating_add(u64::from(self.blocks))
    }

    /// Appends the encoded query.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.to_le_bytes());
        out.extend_from_slice(&self.volume.0.to_le_bytes());
        out.extend_from_slice(&self.start.0.to_le_bytes());
        out.extend_from_slice(&self.blocks.to_le_bytes());
        out.extend_from_slice(&self.chunk_blocks.to_le_bytes());
    }

    /// Decodes a query and checks its bounds.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let query = Self {
            id: r.u32()?,
            volume: VolumeIndex(r.u16()?),
            start: BlockIndex(bounded("first block of a hash query", r.u64()?, VOLUME_BYTES_MAX / BLOCK_BYTES)?),
            blocks: bounded("blocks of a hash query", r.u32()?.into(), QUERY_BLOCKS_MAX.into())? as u32,
            chunk_blocks: bounded("blocks of a hash", r.u32()?.into(), QUERY_BLOCKS_MAX.into())? as u32,
        };
        if query.blocks == 0 || query.chunk_blocks == 0 {
            return Err(DecodeError::Rule { what: "hash query", rule: "a range and a granule are not empty" });
        }
        bounded("hashes of a query", query.count() as u64, HASHES_MAX as u64)?;
        Ok(query)
    }
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hashes {
    /// That of the question.
    pub id: u32,
    /// One for each granule, in order.
    pub hashes: Vec<Hash>,
}

impl Hashes {
    /// Appends the encoded answer.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.to_le_bytes());
        // HASHES_MAX fits.
        out.extend_from_slice(&(self.hashes.len() as u16).to_le_bytes());
        self.hashes.iter().for_each(|hash| out.extend_from_slice(hash));
    }

    /// Decodes an answer and checks its bound before anything is allocated.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let id = r.u32()?;
        let count = bounded("hashes of an answer", r.u16()?.into(), HASHES_MAX as u64)?;
        let hashes = (0..count).map(|_| r.array()).collect::<Result<_, _>>()?;
        Ok(Self { id, hashes })
    }
}

/// The hash of `content`, which is whole blocks.
#[must_use]
pub fn hash(content: &[u8]) -> Hash {
    *blake3::hash(content).as_bytes()
}

/// The hash of each granule of `content`, which is whole blocks.
pub fn hash_chunks(content: &[u8], chunk_blocks: u32) -> impl Iterator<Item = Hash> + '_ {
    let bytes = (u64::from(chunk_blocks.max(1)) * BLOCK_BYTES) as usize;
    content.chunks(bytes).map(hash)
}

/// The hash of a granule of zeroes.
#[must_use]
pub fn hash_of_zeroes(chunk_blocks: u32) -> Hash {
    const BLOCK: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];
    let mut hasher = blake3::Hasher::new();
    for _ in 0..chunk_blocks {
        hasher.update(&BLOCK);
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(query: &HashQuery) -> Result<HashQuery, DecodeError> {
        let mut bytes = Vec::new();
        query.encode(&mut bytes);
        HashQuery::decode(&mut Reader::new("test", &bytes))
    }

    /// Would catch a query that makes the receiver read without bound, or answer beyond a message.
    #[test]
    fn a_query_is_bounded() {
        let good = HashQuery { id: 1, volume: VolumeIndex(0), start: BlockIndex(0), blocks: QUERY_BLOCKS_MAX, chunk_blocks: 16 };
        assert_eq!(decode(&good).unwrap(), good);
        assert_eq!(good.count(), HASHES_MAX);
        for bad in [
            HashQuery { blocks: 0, ..good },
            HashQuery { chunk_blocks: 0, ..good },
            HashQuery { chunk_blocks: 15, ..good },
            HashQuery { blocks: QUERY_BLOCKS_MAX + 1, ..good },
            HashQuery { start: BlockIndex(u64::MAX), ..good },
        ] {
            assert!(decode(&bad).is_err(), "{bad:?}");
        }
        let answer = Hashes { id: 1, hashes: vec![[0; 32]; HASHES_MAX] };
        assert!(crate::Message::Hashes(answer).encode().len() <= crate::control::MESSAGE_BYTES_MAX);
        let mut long = vec![0; 4];
        long.extend_from_slice(&(HASHES_MAX as u16 + 1).to_le_bytes());
        long.resize(100_000, 0);
        assert!(Hashes::decode(&mut Reader::new("test", &long)).is_err());
    }

    #[test]
    fn the_last_granule_may_be_short() {
        let content = vec![7; 5 * BLOCK_BYTES as usize];
        let hashes: Vec<_> = hash_chunks(&content, 2).collect();
        assert_eq!(hashes.len(), 3);
        assert_eq!(hashes[0], hashes[1]);
        assert_eq!(hashes[2], *blake3::hash(&content[..4096]).as_bytes());
        assert_eq!(hash_of_zeroes(3), *blake3::hash(&[0; 3 * 4096]).as_bytes());
    }
}
