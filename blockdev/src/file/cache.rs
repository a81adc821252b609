//! What the page cache holds of a file, and in which pieces.
//!
//! Owns nothing. Always holds: content is never changed, only where it is kept; pages that are not on the disk yet stay.
//!
//! ext4 keeps a list of 4 KiB buffers for each folio of its page cache, and a write walks the whole list of the folio that it hits.
//! A file that was written or read ahead in large pieces has folios of up to 2 MiB, so 512 buffers are walked for 4 KiB: measured
//! on Linux 6.18, 25,000 random writes a second on such a file and 104,000 on one that was read in small pieces.

use std::fs::File;
use std::io;

use rustix::fs::{Advice, fadvise, fstatfs};

/// `EXT4_SUPER_MAGIC` of `include/uapi/linux/magic.h`; ext2 and ext3 have the same.
const EXT4_MAGIC: u64 = 0xEF53;

/// Whether small writes into large folios of `file` are slow.
pub(super) fn large_folios_are_slow(file: &File) -> bool {
    fstatfs(file).is_ok_and(|fs| fs.f_type as u64 == EXT4_MAGIC)
}

/// Takes everything out of the page cache that is on the disk already.
pub(super) fn drop_clean(file: &File) -> io::Result<()> {
    Ok(fadvise(file, 0, None, Advice::DontNeed)?)
}

/// Reads through this descriptor fetch what they ask for, in single pages.
pub(super) fn no_read_ahead(file: &File) -> io::Result<()> {
    Ok(fadvise(file, 0, None, Advice::Random)?)
}
