//! Reads all of a base and compares it with its sums, for `check`.

use std::fs::File;
use std::io;
use std::path::Path;

use proto::units::{BLOCK_BYTES, blocks_of};

use super::{BaseDamage, SUM_BYTES, Sums, next_data};
use crate::disk::read_up_to;

/// Bytes that are read at once.
const PIECE_BYTES: u64 = 1 << 20;

/// What is met on the way.
pub(crate) enum Seen {
    /// So many bytes of data were looked at.
    Bytes(u64),
    /// A block does not fit its sum.
    Damaged(BaseDamage),
    /// The sums end at so many bytes, which are not those of the volume.
    Length(u64),
    /// What begins at this offset cannot be read.
    Unreadable(u64, io::Error),
}

/// Bytes of data in a base of `size` bytes: what [`examine`] reads of it.
///
/// # Errors
/// The system's.
pub(crate) fn data_bytes(base: &Path, size: u64) -> io::Result<u64> {
    let (file, mut at, mut sum) = (File::open(base)?, 0, 0);
    while let Some(range) = next_data(&file, at, size, u64::MAX / 2)? {
        sum += range.end - range.start;
        at = range.end;
    }
    Ok(sum)
}

/// Compares a base of `size` bytes with its sums. Returns whether it has any; without, nothing is read.
///
/// # Errors
/// The system's, where it is not about a part of the base.
pub(crate) fn examine(base: &Path, size: u64, tell: &mut dyn FnMut(Seen)) -> io::Result<bool> {
    let Some(sums) = Sums::open(base, size)? else { return Ok(false) };
    if sums.bytes != blocks_of(size) * SUM_BYTES {
        tell(Seen::Length(sums.bytes));
    }
    let file = File::open(base)?;
    // What lies beyond them has been told with the length.
    let (mut at, end) = (0, size.min(sums.bytes / SUM_BYTES * BLOCK_BYTES));
    let mut piece = vec![0; PIECE_BYTES as usize];
    let mut of_piece = vec![0; (PIECE_BYTES / BLOCK_BYTES * SUM_BYTES) as usize];
    while at < end {
        let data = next_data(&file, at, end, PIECE_BYTES)?;
        let before = data.as_ref().map_or(end, |data| data.start);
        // A hole that should be none.
        let lost = sums.next_set(at / BLOCK_BYTES..before.div_ceil(BLOCK_BYTES))?.map(|block| block * BLOCK_BYTES);
        let is_data = lost.is_none();
        let range = match (lost, data) {
            (Some(lost), _) => lost..(lost + BLOCK_BYTES).min(end),
            (None, Some(data)) => data,
            (None, None) => break,
        };
        at = range.end;
        let wanted = piece.get_mut(..(range.end - range.start) as usize).unwrap_or_default();
        match read_up_to(&file, wanted, range.start) {
            Ok(read) => {
                // A base that is too short is another finding.
                let content = wanted.get(..read).unwrap_or_default();
                let length = (content.len() as u64).div_ceil(BLOCK_BYTES) * SUM_BYTES;
                let stored = of_piece.get_mut(..length as usize).unwrap_or_default();
                let stored_read = read_up_to(sums.file.file(), stored, range.start / BLOCK_BYTES * SUM_BYTES)?;
                let stored = stored.get(..stored_read).unwrap_or_default();
                sums.damaged(range.start, content, stored).for_each(|damage| tell(Seen::Damaged(damage)));
            }
            Err(error) => tell(Seen::Unreadable(range.start, error)),
        }
        if is_data {
            tell(Seen::Bytes(range.end - range.start));
        }
    }
    Ok(true)
}
