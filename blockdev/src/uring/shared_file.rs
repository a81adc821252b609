//! File operations on the io thread that calls them, on a file that any number of threads share.
//!
//! Short reads and writes and interruptions are finished here. Offsets and lengths are the caller's affair.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::{opcode, types};

use super::ring;
use crate::Buf;

/// The most bytes in one operation: below the kernel's own limit of 2 GiB less a page, and a multiple of every block size.
const OP_BYTES_MAX: usize = 1 << 30;

/// A file, or block device, that can be used from every io thread. Clones share the descriptor.
#[derive(Clone, Debug)]
pub struct SharedFile {
    file: Arc<File>,
}

impl SharedFile {
    /// Shares `file`; it is closed when the last clone and the last operation in flight are gone.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self { file: Arc::new(file) }
    }

    /// The file itself, for calls that never wait.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Fills all of `buf` from `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` if the file ends before; otherwise what the kernel said.
    pub async fn read_exact_at(&self, offset: u64, mut buf: Buf) -> io::Result<Buf> {
        let mut done = 0;
        while done < buf.len() {
            let length = (buf.len() - done).min(OP_BYTES_MAX);
            let entry = opcode::Read::new(types::Fd(self.file.as_raw_fd()), buf[done..].as_mut_ptr(), length as u32)
                .offset(offset + done as u64)
                .build();
            // SAFETY: the pointer is into `buf`'s heap memory, which does not move with `buf`; both it and the
            // file are owned by the operation until it resolves.
            let op = unsafe { ring::start(&entry, (buf, Arc::clone(&self.file))) }?;
            let (result, (back, _)) = op.await;
            buf = back;
            match check(result) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(error) if retry(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(buf)
    }

    /// Writes all of `buf` at `offset`.
    ///
    /// # Errors
    /// What the kernel said; any part may have been written.
    pub async fn write_all_at(&self, offset: u64, mut buf: Buf) -> io::Result<Buf> {
        let mut done = 0;
        while done < buf.len() {
            let length = (buf.len() - done).min(OP_BYTES_MAX);
            let entry = opcode::Write::new(types::Fd(self.file.as_raw_fd()), buf[done..].as_ptr(), length as u32)
                .offset(offset + done as u64)
                .build();
            // SAFETY: as in `read_exact_at`; the kernel only reads.
            let op = unsafe { ring::start(&entry, (buf, Arc::clone(&self.file))) }?;
            let (result, (back, _)) = op.await;
            buf = back;
            match check(result) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(error) if retry(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(buf)
    }

    /// Makes written data durable, with the metadata needed to read it back.
    ///
    /// # Errors
    /// What the kernel said. The data that failed to reach the disk may be gone from the cache: never call it again and
    /// believe the answer.
    pub async fn fdatasync(&self) -> io::Result<()> {
        let entry = opcode::Fsync::new(types::Fd(self.file.as_raw_fd())).flags(types::FsyncFlags::DATASYNC).build();
        // SAFETY: no memory involved; the operation owns the file.
        let op = unsafe { ring::start(&entry, Arc::clone(&self.file)) }?;
        check(op.await.0).map(drop)
    }

    /// `fallocate(2)` with `mode` flags.
    ///
    /// # Errors
    /// What the kernel said; `Unsupported` if the file system cannot do it.
    pub async fn fallocate(&self, mode: i32, offset: u64, length: u64) -> io::Result<()> {
        loop {
            let entry = opcode::Fallocate::new(types::Fd(self.file.as_raw_fd()), length).offset(offset).mode(mode).build();
            // SAFETY: no memory involved; the operation owns the file.
            let op = unsafe { ring::start(&entry, Arc::clone(&self.file)) }?;
            match check(op.await.0) {
                Ok(_) => return Ok(()),
                Err(error) if retry(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for SharedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn check(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.wrapping_neg()))
}

fn retry(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}
