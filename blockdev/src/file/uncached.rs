//! Reads a file once, in large pieces, past the page cache.
//!
//! Owns two descriptors of the file, neither of which can write. Always holds: what a read returns is at least as new as what
//! was written before it began; nobody who writes the file waits for a reader here.
//!
//! A read of what is not cached goes to the disk with O_DIRECT, which costs a third of the processor's time, does not push out what a
//! guest reads, and is faster than one sequential reader with the kernel's read-ahead. What is cached, or written and not yet on the
//! disk, is read through the page cache: a direct read of such a range would write it back first, on ext4 with the inode locked,
//! and a guest's next write would wait for that. `cachestat` (Linux 6.5) tells them apart; without it all goes through the page cache.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use super::{FileDevice, PAGE_BYTES, cache, reopen};
use crate::uring::SharedFile;
use crate::{BlockDevice, Buf, Extent, IoFuture, ZeroMode};

/// A reader of all of a file. Read-only.
#[derive(Debug)]
pub struct UncachedReader {
    cached: FileDevice,
    direct: FileDevice,
}

/// How a range is best read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Cache,
    Disk,
}

impl UncachedReader {
    /// A reader of `file`, which has `size` bytes. `None` if its file system has no O_DIRECT.
    ///
    /// # Errors
    /// The system's, if it cannot be opened again.
    pub fn over(file: &File, size: u64) -> io::Result<Option<Self>> {
        let block_device = {
            use std::os::unix::fs::FileTypeExt;
            file.metadata()?.file_type().is_block_device()
        };
        let direct = match reopen(file, std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT)) {
            Ok(direct) => direct,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
            Err(error) => return Err(error),
        };
        let open = || {
            let cached = reopen(file, std::fs::OpenOptions::new().read(true))?;
            cache::no_read_ahead(&cached)?;
            io::Result::Ok(cached)
        };
        let device = |file, direct| FileDevice::over(file, direct, size, true, block_device);
        Ok(Some(Self { cached: device(open()?, None), direct: device(open()?, Some(SharedFile::new(direct))) }))
    }

    fn way(&self, offset: u64, length: u64) -> Way {
        match cached_pages(self.cached.file.file(), offset, length) {
            Ok(pages) if pages.unwritten == 0 && pages.present < length.div_ceil(PAGE_BYTES) => Way::Disk,
            _ => Way::Cache,
        }
    }
}

impl BlockDevice for UncachedReader {
    fn size(&self) -> u64 {
        self.cached.size
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read<'a>(&'a self, offset: u64, mut buf: Buf) -> IoFuture<'a, Buf> {
        match self.way(offset, buf.len() as u64) {
            Way::Disk => self.direct.read(offset, buf),
            Way::Cache => Box::pin(async move {
                match self.cached.try_read(offset, &mut buf) {
                    Some(result) => result.map(|()| buf),
                    None => self.cached.read(offset, buf).await,
                }
            }),
        }
    }

    fn write<'a>(&'a self, offset: u64, data: Buf) -> IoFuture<'a, Buf> {
        self.cached.write(offset, data)
    }

    fn flush<'a>(&'a self) -> IoFuture<'a, ()> {
        self.cached.flush()
    }

    fn write_zeroes<'a>(&'a self, offset: u64, length: u64, mode: ZeroMode) -> IoFuture<'a, ()> {
        self.cached.write_zeroes(offset, length, mode)
    }

    fn trim<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
        self.cached.trim(offset, length)
    }

    fn extents<'a>(&'a self, offset: u64, length: u64, extents_max: usize) -> IoFuture<'a, Vec<Extent>> {
        self.cached.extents(offset, length, extents_max)
    }
}

/// Pages of a range of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CachedPages {
    /// In the page cache.
    pub(super) present: u64,
    /// Of them not on the disk yet, or on their way to it.
    pub(super) unwritten: u64,
}

/// Number of cachestat(2), the same on all architectures; `libc` does not have it on all of them.
const SYS_CACHESTAT: libc::c_long = 451;

/// cachestat(2).
pub(super) fn cached_pages(file: &File, offset: u64, length: u64) -> io::Result<CachedPages> {
    /// `struct cachestat_range` of `include/uapi/linux/mman.h`.
    #[repr(C)]
    struct Range {
        offset: u64,
        length: u64,
    }
    /// `struct cachestat` of the same header.
    #[repr(C)]
    #[derive(Default)]
    struct Stat {
        cached: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    let (range, mut stat) = (Range { offset, length }, Stat::default());
    // SAFETY: the descriptor is open for the duration of the call; both structures are laid out as the kernel's, and it writes the second only.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut stat, 0) };
    if result == 0 {
        Ok(CachedPages { present: stat.cached, unwritten: stat.dirty + stat.writeback })
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{IoThreads, OpenOptions};
    use std::os::unix::fs::FileExt;

    /// Would catch a read that returns what the disk had before a write that is still in the page cache, and one that goes
    /// through the cache where nothing is in it.
    #[test]
    fn reads_see_what_was_written_and_leave_the_cache_alone() {
        // /tmp may be memory, where nothing is ever on a disk.
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = folder.path().join("disk");
        let size = (1 << 20) + 100;
        std::fs::write(&path, vec![7_u8; size]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        file.sync_all().unwrap();
        cache::drop_clean(&file).unwrap();
        let Some(reader) = UncachedReader::over(&file, size as u64).unwrap() else { return };
        let Ok(before) = cached_pages(&file, 0, 1 << 20) else { return };
        let way = reader.way(0, 1 << 20);
        let io = IoThreads::new(1).unwrap();
        let (reader, found) = io
            .block_on(move || async move {
                let found = reader.read(0, Buf::zeroed(1 << 20)).await.unwrap().to_vec();
                (reader, found)
            })
            .unwrap();
        assert_eq!(found, vec![7; 1 << 20]);
        if before.present == 0 {
            assert_eq!(way, Way::Disk);
            assert_eq!(cached_pages(&file, 0, 1 << 20).unwrap().present, 0, "nothing was put into the page cache");
        }
        file.write_all_at(&[1; 4096], 8192).unwrap();
        if cached_pages(&file, 8192, 4096).unwrap().unwritten > 0 {
            assert_eq!(reader.way(0, 1 << 20), Way::Cache, "a direct read would write it back first");
        }
        let (found, tail) = io
            .block_on(move || async move {
                let found = reader.read(4096, Buf::zeroed(12288)).await.unwrap().to_vec();
                (found, reader.read(1 << 20, Buf::zeroed(100)).await.unwrap().to_vec())
            })
            .unwrap();
        assert_eq!(found, [vec![7; 4096], vec![1; 4096], vec![7; 4096]].concat());
        assert_eq!(tail, [7; 100]);
    }

    #[test]
    fn it_cannot_write() {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let options = OpenOptions { create_size: Some(8192), ..OpenOptions::default() };
        let device = FileDevice::open(folder.path().join("disk"), options).unwrap();
        let Some(reader) = device.uncached().unwrap() else { return };
        let io = IoThreads::new(1).unwrap();
        let write = move || async move { reader.write(0, Buf::zeroed(4096)).await.map_err(|e| e.raw_os_error()).map(drop) };
        assert_eq!(io.block_on(write).unwrap(), Err(Some(libc::EROFS)));
    }
}
