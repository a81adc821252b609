//! A raw file or a block device as the bottom of a stack.
//!
//! Owns: the descriptor, the lock that keeps other processes away, punching holes, and read-modify-write where direct
//! I/O needs aligned requests. Must not know who asks.
//!
//! Invariants: bytes outside a write never change; after a failed fdatasync every later flush fails until
//! the file is opened anew, because the kernel may have dropped the data and would report success the second time.

mod cache;
mod direct;
mod error;
mod gate;
mod lock;
mod uncached;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{OFlags, SeekFrom, fcntl_getfl, fcntl_setfl, seek};
use rustix::io::ReadWriteFlags;

pub use error::FileError;
pub use uncached::UncachedReader;

use crate::ranges::RangeLocks;
use crate::uring::SharedFile;
use crate::{BlockDevice, Buf, Extent, ExtentKind, IoFuture, ZeroMode};
use gate::InlineGate;

/// Largest write made on the io thread itself, in bytes. Copying more into the page cache takes longer than the
/// hop to a worker and keeps other connections waiting.
const INLINE_WRITE_BYTES_MAX: usize = 256 << 10;
/// Largest piece when zeroes have to be written byte by byte.
const ZERO_CHUNK_BYTES: u64 = 1 << 20;
/// Unit of the page cache: a buffered write that covers whole pages never reads.
const PAGE_BYTES: u64 = 4096;

/// How to open a [`FileDevice`].
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// Bypass the page cache (O_DIRECT). Requests that are not aligned to 4 KiB then cost a read.
    pub direct: bool,
    /// Refuse writes; other readers may use the file at the same time.
    pub read_only: bool,
    /// Create the file, sparse, with this size in bytes if it is not there (or is empty); an existing one must have this size.
    pub create_size: Option<u64>,
    /// Empty the page cache of the file, behind the first requests, where what is cached in large pieces makes small writes slow: on ext4 each write
    /// walks all 4 KiB buffers of the folio it hits, up to 512 of them. Whoever made the image left such folios.
    pub drop_cached: bool,
}

/// A raw file or block device.
#[derive(Debug)]
pub struct FileDevice {
    /// Page-cache descriptor: all requests, or with `direct` the last partial block only.
    file: SharedFile,
    direct: Option<SharedFile>,
    size: u64,
    read_only: bool,
    block_device: bool,
    gate: InlineGate,
    /// Blocks of 4 KiB under read-modify-write and the writes they must not overlap; used with `direct` only.
    ranges: RangeLocks,
    poisoned: AtomicBool,
    /// Cleared when the file system turned out not to know the call.
    can_punch: AtomicBool,
    can_zero_range: AtomicBool,
    _dropping: Option<cache::Dropping>,
}

impl FileDevice {
    /// Opens and locks `path`.
    ///
    /// # Errors
    /// See [`FileError`].
    pub fn open(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self, FileError> {
        let path = path.as_ref();
        let owned = || path.to_path_buf();
        let prepare = |what| move |source| FileError::Prepare { path: path.to_path_buf(), what, source };

        let existing_block_device = std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
        let writable = !options.read_only;
        let mut open = std::fs::OpenOptions::new();
        open.read(true).write(writable).create(writable && options.create_size.is_some()).mode(0o600);
        // Never wait for a FIFO's writer. O_EXCL keeps mounted disks out.
        let exclusive = if existing_block_device && writable { libc::O_EXCL } else { 0 };
        open.custom_flags(libc::O_NONBLOCK | exclusive);
        let file = open.open(path).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => FileError::InUse { path: owned() },
            _ => FileError::Open { path: owned(), source },
        })?;

        let kind = file.metadata().map_err(prepare("cannot read its attributes"))?.file_type();
        let block_device = kind.is_block_device();
        if !block_device && !kind.is_file() {
            return Err(FileError::NotADisk { path: owned() });
        }
        // Left on, it would make io_uring answer EAGAIN where the file system cannot say whether it waits.
        let flags = fcntl_getfl(&file).map_err(|e| prepare("cannot read its flags")(e.into()))?;
        fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(|e| prepare("cannot set its flags")(e.into()))?;
        if !lock::try_lock(&file, writable).map_err(prepare("cannot lock"))? {
            return Err(FileError::InUse { path: owned() });
        }
        let mut size = seek(&file, SeekFrom::End(0)).map_err(|e| prepare("cannot find its size")(e.into()))?;
        if let Some(wanted_bytes) = options.create_size
            && wanted_bytes != size
        {
            if size != 0 || block_device || !writable {
                return Err(FileError::SizeDiffers { path: owned(), found_bytes: size, wanted_bytes });
            }
            file.set_len(wanted_bytes).map_err(prepare("cannot set its size"))?;
            size = wanted_bytes;
        }
        let mut dropping = None;
        if options.drop_cached && cache::large_folios_are_slow(&file) {
            dropping = Some(cache::drop_clean_behind(&file, size).map_err(prepare("cannot drop its cached pages"))?);
        }
        let direct = if options.direct { Some(SharedFile::new(open_direct(path, &file, writable)?)) } else { None };
        Ok(Self { _dropping: dropping, ..Self::over(file, direct, size, options.read_only, block_device) })
    }

    fn over(file: File, direct: Option<SharedFile>, size: u64, read_only: bool, block_device: bool) -> Self {
        Self {
            file: SharedFile::new(file),
            direct,
            size,
            read_only,
            block_device,
            gate: InlineGate::new(),
            ranges: RangeLocks::default(),
            poisoned: AtomicBool::new(false),
            can_punch: AtomicBool::new(true),
            can_zero_range: AtomicBool::new(true),
            _dropping: None,
        }
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.read_only { Err(io::Error::from_raw_os_error(libc::EROFS)) } else { Ok(()) }
    }

    /// Whether an inline write of this range would have to read a page first.
    fn edges_cached(&self, offset: u64, length: u64) -> bool {
        let end = offset + length;
        let cached = |at: u64| read_nowait(self.file.file(), at, &mut [0]).is_some();
        (offset.is_multiple_of(PAGE_BYTES) || cached(offset))
            && (end.is_multiple_of(PAGE_BYTES) || end == self.size || cached(end - 1))
    }

    async fn zero(&self, offset: u64, length: u64, mode: ZeroMode) -> io::Result<()> {
        let _guard = self.lock_for_zero(offset, length).await;
        // fallocate on a block device wants whole blocks; the edges are written.
        let (head, body, tail) = if self.block_device { split(offset, length) } else { (0, length, 0) };
        if body > 0 && !self.zero_fast(offset + head, body, mode.may_unmap).await? {
            if mode.fast_only {
                return Err(io::ErrorKind::Unsupported.into());
            }
            self.zero_slow(offset + head, body).await?;
        }
        self.zero_slow(offset, head).await?;
        self.zero_slow(offset + head + body, tail).await
    }

    /// Zeroes by the file system; false if it cannot.
    async fn zero_fast(&self, offset: u64, length: u64, may_unmap: bool) -> io::Result<bool> {
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let zero = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        for (wanted, mode, supported) in [(may_unmap, punch, &self.can_punch), (true, zero, &self.can_zero_range)] {
            if !wanted || !supported.load(Ordering::Relaxed) {
                continue;
            }
            match self.file.fallocate(mode, offset, length).await {
                Ok(()) => return Ok(true),
                Err(error) if unsupported(&error) => supported.store(false, Ordering::Relaxed),
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    async fn zero_slow(&self, offset: u64, length: u64) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        let end = offset + length;
        let mut at = offset;
        let mut zeroes = Buf::zeroed(length.min(ZERO_CHUNK_BYTES) as usize);
        while at < end {
            zeroes.set_len((end - at).min(ZERO_CHUNK_BYTES) as usize);
            zeroes = self.file.write_all_at(at, zeroes).await?;
            at += zeroes.len() as u64;
        }
        Ok(())
    }

    fn seek_extents(&self, offset: u64, length: u64, extents_max: usize) -> io::Result<Vec<Extent>> {
        let end = offset + length;
        let mut extents = Vec::new();
        let mut at = offset;
        while at < end && extents.len() < extents_max {
            let data = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data.min(end),
                // No data from here to the end of the file.
                Err(rustix::io::Errno::NXIO) => end,
                Err(error) => return Err(error.into()),
            };
            let (next, kind) = if data > at {
                (data, ExtentKind::Hole)
            } else {
                (seek(&self.file, SeekFrom::Hole(at))?.min(end), ExtentKind::Data)
            };
            if next <= at {
                // A writer changed the file between the two calls.
                extents.push(Extent { length: end - at, kind: ExtentKind::Data });
                break;
            }
            extents.push(Extent { length: next - at, kind });
            at = next;
        }
        Ok(extents)
    }
}

impl BlockDevice for FileDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a, Buf> {
        match &self.direct {
            Some(direct) => Box::pin(self.read_direct(direct, offset, buf)),
            None => Box::pin(self.file.read_exact_at(offset, buf)),
        }
    }

    fn write<'a>(&'a self, offset: u64, data: Buf) -> IoFuture<'a, Buf> {
        Box::pin(async move {
            self.check_writable()?;
            match &self.direct {
                Some(direct) => self.write_direct(direct, offset, data).await,
                None => match self.try_write(offset, &data) {
                    Some(result) => result.map(|()| data),
                    None => {
                        let _beside = self.gate.beside();
                        self.file.write_all_at(offset, data).await
                    }
                },
            }
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a, ()> {
        Box::pin(async move {
            if self.read_only {
                return Ok(());
            }
            let result = self.file.fdatasync().await;
            if result.is_err() {
                self.poisoned.store(true, Ordering::Release);
            }
            // Looked at afterwards too: a flush that failed meanwhile took this one's data with it.
            if self.poisoned.load(Ordering::Acquire) {
                return Err(result.err().unwrap_or_else(|| io::Error::from_raw_os_error(libc::EIO)));
            }
            Ok(())
        })
    }

    fn write_zeroes<'a>(&'a self, offset: u64, length: u64, mode: ZeroMode) -> IoFuture<'a, ()> {
        Box::pin(async move {
            self.check_writable()?;
            self.zero(offset, length, mode).await
        })
    }

    fn trim<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
        Box::pin(async move {
            self.check_writable()?;
            match self.zero(offset, length, ZeroMode { may_unmap: true, fast_only: true }).await {
                // It cannot be given back; the content stays as it is.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
                result => result,
            }
        })
    }

    fn extents<'a>(&'a self, offset: u64, length: u64, extents_max: usize) -> IoFuture<'a, Vec<Extent>> {
        // Seeking takes the inode's lock. While writers are throttled under it, the io thread must not queue up behind them,
        // and "data" is always a true answer.
        let result = if self.block_device || !self.gate.is_open() {
            Ok(vec![Extent { length, kind: ExtentKind::Data }])
        } else {
            self.seek_extents(offset, length, extents_max)
        };
        Box::pin(std::future::ready(result))
    }

    fn cache<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
        let result = match std::num::NonZeroU64::new(length) {
            Some(length) if self.direct.is_none() => {
                rustix::fs::fadvise(&self.file, offset, Some(length), rustix::fs::Advice::WillNeed).map_err(io::Error::from)
            }
            _ => Ok(()),
        };
        Box::pin(std::future::ready(result))
    }

    fn scanner(&self) -> io::Result<Option<Arc<dyn BlockDevice>>> {
        if self.direct.is_some() {
            return Ok(None);
        }
        let file = reopen(self.file.file(), std::fs::OpenOptions::new().read(true))?;
        cache::no_read_ahead(&file)?;
        Ok(Some(Arc::new(Self::over(file, None, self.size, true, self.block_device))))
    }

    fn uncached(&self) -> io::Result<Option<Arc<dyn BlockDevice>>> {
        if self.direct.is_some() {
            return Ok(None);
        }
        let reader = UncachedReader::over(self.file.file(), self.size)?;
        Ok(reader.map(|reader| Arc::new(reader) as Arc<dyn BlockDevice>))
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        if self.direct.is_some() {
            return None;
        }
        read_nowait(self.file.file(), offset, buf).map(Ok)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Option<io::Result<()>> {
        if self.direct.is_some() || self.read_only || data.len() > INLINE_WRITE_BYTES_MAX || !self.gate.is_open() {
            return None;
        }
        if !self.edges_cached(offset, data.len() as u64) {
            return None;
        }
        Some(self.gate.timed(|| self.file.file().write_all_at(data, offset)))
    }
}

/// All of `buf` from the page cache, or nothing (the buffer may have been scribbled on).
fn read_nowait(file: &File, offset: u64, buf: &mut [u8]) -> Option<()> {
    let length = buf.len();
    let n = rustix::io::preadv2(file, &mut [io::IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT).ok()?;
    (n == length).then_some(())
}

/// Splits a range into the bytes before the first whole block, whole blocks, and the rest.
fn split(offset: u64, length: u64) -> (u64, u64, u64) {
    let end = offset + length;
    let first = offset.next_multiple_of(PAGE_BYTES).min(end);
    let last = (end - end % PAGE_BYTES).max(first);
    (first - offset, last - first, end - last)
}

fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY))
}

fn open_direct(path: &Path, locked: &File, writable: bool) -> Result<File, FileError> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(writable).custom_flags(libc::O_DIRECT);
    reopen(locked, &options).map_err(|source| match source.raw_os_error() {
        Some(libc::EINVAL) => FileError::NoDirect { path: path.to_path_buf() },
        _ => FileError::Open { path: path.to_path_buf(), source },
    })
}

/// A second descriptor of the file that `open` is, found through it so that a rename cannot come between.
fn reopen(open: &File, options: &std::fs::OpenOptions) -> io::Result<File> {
    use std::os::fd::AsRawFd;
    options.open(format!("/proc/self/fd/{}", open.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_split_at_whole_pages() {
        for (offset, length) in [(0, 0), (0, 4096), (1, 10), (1, 4095), (1, 4096), (1, 8192), (4095, 2), (4000, 100_000)] {
            let (head, body, tail) = split(offset, length);
            assert_eq!(head + body + tail, length);
            assert!(head < PAGE_BYTES && tail < PAGE_BYTES && body.is_multiple_of(PAGE_BYTES), "{offset}+{length}");
            assert!(body == 0 || (offset + head).is_multiple_of(PAGE_BYTES));
        }
    }

    #[test]
    fn a_scanner_reads_what_was_written_and_cannot_write() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, vec![7_u8; 1 << 20]).unwrap();
        let device = FileDevice::open(&path, OpenOptions { drop_cached: true, ..OpenOptions::default() }).unwrap();
        let scanner = device.scanner().unwrap().unwrap();
        let io = crate::IoThreads::new(1).unwrap();
        let (found, refused) = io
            .block_on(move || async move {
                device.write(4096, Buf::copy_of(&[1; 4096])).await.unwrap();
                let found = scanner.read(0, Buf::zeroed(12288)).await.unwrap();
                let refused = scanner.write(0, Buf::zeroed(4096)).await.map_err(|e| e.raw_os_error()).map(drop);
                (found.to_vec(), refused)
            })
            .unwrap();
        assert_eq!(found, [vec![7; 4096], vec![1; 4096], vec![7; 4096]].concat());
        assert_eq!(refused, Err(Some(libc::EROFS)));
    }

    #[test]
    fn a_failed_flush_is_never_followed_by_a_good_one() {
        let folder = tempfile::tempdir().unwrap();
        let options = OpenOptions { create_size: Some(8192), ..OpenOptions::default() };
        let device = std::sync::Arc::new(FileDevice::open(folder.path().join("disk"), options).unwrap());
        let io = crate::IoThreads::new(1).unwrap();
        let flush = || {
            let device = std::sync::Arc::clone(&device);
            io.block_on(move || async move { device.flush().await.map_err(|error| error.raw_os_error()) }).unwrap()
        };
        assert_eq!(flush(), Ok(()));
        device.poisoned.store(true, Ordering::Release);
        assert_eq!(flush(), Err(Some(libc::EIO)));
    }
}
