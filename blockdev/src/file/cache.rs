//! What the page cache holds of a file, and in which pieces.
//!
//! Owns a thread that empties the cache of one file, for as long as that takes. Always holds: content is never changed, only where it
//! is kept; pages that are not on the disk yet stay; nobody waits for the thread, and it keeps no file locked.
//!
//! ext4 keeps a list of 4 KiB buffers for each folio of its page cache, and a write walks the whole list of the folio that it hits.
//! A file that was written or read ahead in large pieces has folios of up to 2 MiB, so 512 buffers are walked for 4 KiB: measured
//! on Linux 6.18, 25,000 random writes a second on such a file and 104,000 on one that was read in small pieces.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Advice, fadvise, fstatfs};

use super::reopen;

/// `EXT4_SUPER_MAGIC` of `include/uapi/linux/magic.h`; ext2 and ext3 have the same.
const EXT4_MAGIC: u64 = 0xEF53;

/// Whether small writes into large folios of `file` are slow.
pub(super) fn large_folios_are_slow(file: &File) -> bool {
    fstatfs(file).is_ok_and(|fs| fs.f_type as u64 == EXT4_MAGIC)
}

/// How much of a file is dropped at once. A process that is killed ends, and gives its locks back, only after the step it is in.
const STEP_BYTES: NonZeroU64 = NonZeroU64::new(64 << 20).expect("not zero");
/// Niceness of the thread that drops: that of replication.
const NICE: i32 = 10;

/// Takes everything out of the page cache that is on the disk already.
#[cfg(test)]
pub(super) fn drop_clean(file: &File) -> io::Result<()> {
    Ok(fadvise(file, 0, None, Advice::DontNeed)?)
}

/// A file's cache being emptied; ends when this is dropped, or when all is done.
#[derive(Debug)]
pub(super) struct Dropping(Arc<AtomicBool>);

impl Drop for Dropping {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Takes out of the page cache, step by step on a thread of its own, what is on the disk already. The kernel begins to write what is not:
/// of a sparse file that was written all over that took 12 s for some 400,000 blocks, which no guest is to wait for.
pub(super) fn drop_clean_behind(file: &File, size: u64) -> io::Result<Dropping> {
    // Another open file, so that the lock of the first goes with it.
    let file = reopen(file, std::fs::OpenOptions::new().read(true))?;
    let ended = Arc::new(AtomicBool::new(false));
    let dropping = Dropping(Arc::clone(&ended));
    std::thread::Builder::new().name("drop-cached".to_owned()).spawn(move || {
        // Zero is this very thread. Without the right to be nicer nothing breaks.
        if let Err(error) = rustix::process::setpriority_process(None, NICE) {
            tracing::debug!(%error, "the thread that empties the page cache keeps its priority");
        }
        for at in (0..size).step_by(STEP_BYTES.get() as usize) {
            if ended.load(Ordering::Relaxed) {
                return;
            }
            if let Err(error) = fadvise(&file, at, Some(STEP_BYTES), Advice::DontNeed) {
                tracing::warn!(%error, "cannot drop cached pages of a disk; small writes to it may be slower");
                return;
            }
        }
    })?;
    Ok(dropping)
}

/// Reads through this descriptor fetch what they ask for, in single pages.
pub(super) fn no_read_ahead(file: &File) -> io::Result<()> {
    Ok(fadvise(file, 0, None, Advice::Random)?)
}

#[cfg(test)]
mod tests {
    use super::super::uncached::cached_pages;
    use super::super::{FileDevice, OpenOptions};
    use std::fs::File;
    use std::time::{Duration, Instant};

    /// Would catch a cache that stays full, and a thread that keeps a disk locked whose device is closed.
    #[test]
    fn a_cache_is_emptied_behind_and_the_disk_can_be_opened_again_at_once() {
        // /tmp may be memory, which is no disk.
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, vec![7_u8; 8 << 20]).unwrap();
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap();
        let options = OpenOptions { drop_cached: true, ..OpenOptions::default() };
        for _ in 0..20 {
            drop(FileDevice::open(&path, options).unwrap());
        }
        let device = FileDevice::open(&path, options).unwrap();
        if device._dropping.is_none() {
            return; // Not on ext4.
        }
        let deadline = Instant::now() + Duration::from_secs(30);
        while cached_pages(&file, 0, 8 << 20).is_ok_and(|pages| pages.present > 0) {
            assert!(Instant::now() < deadline, "the pages are still there");
            std::thread::yield_now();
        }
    }
}
