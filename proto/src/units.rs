//! Units and identifiers as types, so that a block number is never taken for a byte offset.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::codec::printable;

/// Bytes in a block: the granule of dirty tracking, of frames and of the journal's index.
pub const BLOCK_BYTES: u64 = 4096;

/// Largest volume in bytes: block numbers stay below 2^32 (16 TiB), which the index of the receiver relies on.
pub const VOLUME_BYTES_MAX: u64 = (1 << 32) * BLOCK_BYTES;

/// Volumes a group may have.
pub const GROUP_VOLUMES_MAX: usize = 64;

/// Number of a 4 KiB block within its volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u64);

impl BlockIndex {
    /// First byte of the block; `None` if it would not fit 64 bits.
    #[must_use]
    pub fn offset(self) -> Option<u64> {
        self.0.checked_mul(BLOCK_BYTES)
    }
}

/// A run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockExtent {
    /// First block.
    pub start: BlockIndex,
    /// Number of blocks, never zero.
    pub blocks: u32,
}

impl BlockExtent {
    /// One past the last block; saturating, which no volume reaches.
    #[must_use]
    pub fn end(self) -> u64 {
        self.start.0.saturating_add(u64::from(self.blocks))
    }
}

/// Blocks that a volume of `size_bytes` has; the last may be partial.
#[must_use]
pub fn blocks_of(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(BLOCK_BYTES)
}

/// Position of a volume in its group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VolumeIndex(pub u16);

/// A random number that a primary draws for each of its sessions. It stands in every seal of the session, so the newest seal
/// tells who wrote last: a clone of the primary that got in between has another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SessionToken(pub [u8; 16]);

/// Number of an epoch; rises by one a commit, never reused within a generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EpochId(pub u64);

impl EpochId {
    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for EpochId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Counter raised at every change of who may write: the fencing token. Zero means "never told".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names one consistent image of a whole group: `generation.epoch`, for example `3.18211`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Point {
    /// Generation in which the epoch was cut.
    pub generation: Generation,
    /// The epoch whose later cut the image shows.
    pub epoch: EpochId,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.generation, self.epoch)
    }
}

/// A point that is not written `generation.epoch`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{given}' is not a point: write generation.epoch, for example 3.18211")]
pub struct PointParseError {
    given: String,
}

impl FromStr for Point {
    type Err = PointParseError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = |s: &str| -> Option<u64> {
            if s.is_empty() || !s.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
            s.parse().ok()
        };
        let parsed = text.split_once('.').and_then(|(g, e)| Some((digits(g)?, digits(e)?)));
        match parsed {
            Some((g, e)) => Ok(Self { generation: Generation(g), epoch: EpochId(e) }),
            None => Err(PointParseError { given: printable(text, 64) }),
        }
    }
}

impl Serialize for Point {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Point {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_read_back_as_written_and_order_by_generation_first() {
        let p: Point = "3.18211".parse().unwrap();
        assert_eq!(p.to_string(), "3.18211");
        let q: Point = "4.1".parse().unwrap();
        assert!(p < q);
        for bad in ["", "3", "3.", ".3", "+3.1", "3.1.2", "a.b", "3. 1", "99999999999999999999.1"] {
            assert!(bad.parse::<Point>().is_err(), "{bad}");
        }
        let error = "1.\n2".parse::<Point>().unwrap_err().to_string();
        assert!(error.starts_with("'1. 2' is not a point"), "one line: {error}");
    }
}
