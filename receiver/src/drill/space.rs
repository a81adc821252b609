//! What the blocks written to a drill take, and the limits of that.
//!
//! Two limits, and a write beyond either fails with ENOSPC, for the drill's client only: the drill's own, and what the store's file system must
//! keep free, so that no drill takes the space that the next epoch needs. Blocks count from the first write until they are trimmed.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use proto::units::BLOCK_BYTES;

/// Drills leave so many bytes of the store's file system free, or [`FREE_FRACTION`] of it if that is less.
pub const FREE_BYTES_MAX: u64 = 1 << 30;
/// One part of so many.
pub const FREE_FRACTION: u64 = 20;
/// How many blocks may be written from one look at the file system to the next: 4 MiB.
const LOOK_EVERY_BLOCKS: u64 = 1024;
const NEVER: u64 = u64::MAX;

/// Whether the file system of a folder has more space than must be kept free.
pub(crate) fn has_room(folder: &Path) -> io::Result<bool> {
    let found = rustix::fs::statvfs(folder)?;
    let keep = (found.f_blocks.saturating_mul(found.f_frsize) / FREE_FRACTION).min(FREE_BYTES_MAX);
    Ok(found.f_bavail.saturating_mul(found.f_frsize) > keep)
}

/// What a drill takes.
#[derive(Debug)]
pub struct Space {
    max_blocks: u64,
    used_blocks: AtomicU64,
    refused_writes: AtomicU64,
    folder: PathBuf,
    /// `used_blocks` at the last look at the file system, or [`NEVER`]: look before the next block.
    looked_at_blocks: AtomicU64,
}

impl Space {
    pub(super) fn new(max_bytes: u64, folder: &Path) -> Self {
        Self {
            max_blocks: max_bytes / BLOCK_BYTES,
            used_blocks: AtomicU64::new(0),
            refused_writes: AtomicU64::new(0),
            folder: folder.to_owned(),
            looked_at_blocks: AtomicU64::new(NEVER),
        }
    }

    /// Bytes of blocks that were written and not trimmed.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used_blocks.load(Ordering::Relaxed) * BLOCK_BYTES
    }

    /// The limit in bytes.
    #[must_use]
    pub fn max_bytes(&self) -> u64 {
        self.max_blocks * BLOCK_BYTES
    }

    /// Writes that failed because there was no space.
    #[must_use]
    pub fn refused_writes(&self) -> u64 {
        self.refused_writes.load(Ordering::Relaxed)
    }

    /// Takes space for `blocks` more, all or none.
    pub(super) fn take(&self, blocks: u64) -> io::Result<()> {
        let add = |used: u64| used.checked_add(blocks).filter(|sum| *sum <= self.max_blocks);
        let taken = self.used_blocks.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        let done = match taken {
            Err(_) => Err(io::ErrorKind::StorageFull.into()),
            Ok(before) => self.look(before + blocks).inspect_err(|_| self.give_back(blocks)),
        };
        done.inspect_err(|_| {
            self.refused_writes.fetch_add(1, Ordering::Relaxed);
        })
    }

    pub(super) fn give_back(&self, blocks: u64) {
        self.used_blocks.fetch_sub(blocks, Ordering::Relaxed);
    }

    /// Looks at the file system's free space, now and then.
    fn look(&self, used: u64) -> io::Result<()> {
        let looked_at = self.looked_at_blocks.load(Ordering::Relaxed);
        // Less than at the last look: something was trimmed since.
        if looked_at != NEVER && used.abs_diff(looked_at) < LOOK_EVERY_BLOCKS {
            return Ok(());
        }
        let enough = has_room(&self.folder)?;
        self.looked_at_blocks.store(if enough { used } else { NEVER }, Ordering::Relaxed);
        if enough { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) }
    }
}
