//! Writes that leave nothing in the page cache (`RWF_DONTCACHE`, Linux 6.14 and newer; ext4, XFS, btrfs).
//!
//! Owns whether the file's file system can do it. Always holds: the bytes are written all the same where it cannot.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::{Errno, ReadWriteFlags, pwritev2};

/// `RWF_DONTCACHE` of `include/uapi/linux/fs.h`; `rustix` has no name for it.
const DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);
const PAGE_BYTES: u64 = 4096;

/// What is known of one file.
#[derive(Debug, Default)]
pub(super) struct Uncached {
    refused: AtomicBool,
}

impl Uncached {
    /// Writes all of `bytes`. The last page, if it is not full, stays in the cache: the next append goes on in it, and
    /// would read it from the disk first.
    pub(super) fn write_all_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        let end = offset + bytes.len() as u64;
        let whole = (end - end % PAGE_BYTES).saturating_sub(offset) as usize;
        let (body, tail) = bytes.split_at_checked(whole).unwrap_or((&[], bytes));
        let done = self.write_body(file, body, offset)?;
        if let Some(rest) = body.get(done..).filter(|r| !r.is_empty()) {
            file.write_all_at(rest, offset + done as u64)?;
        }
        if tail.is_empty() { Ok(()) } else { file.write_all_at(tail, end - tail.len() as u64) }
    }

    /// Returns the bytes written: all, or as far as it got before the kernel refused.
    fn write_body(&self, file: &File, body: &[u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = body.get(done..).filter(|r| !r.is_empty() && !self.refused.load(Ordering::Relaxed)) {
            match pwritev2(file, &[IoSlice::new(rest)], offset + done as u64, DONTCACHE) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                // An older kernel knows no such flag; a file system may not offer it.
                Err(Errno::OPNOTSUPP | Errno::INVAL) => self.refused.store(true, Ordering::Relaxed),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every start and end within a page, with the flag and where it is refused.
    #[test]
    fn appends_are_whole_wherever_they_begin_and_end() {
        let folder = tempfile::tempdir().unwrap();
        for refused in [false, true] {
            let path = folder.path().join(format!("{refused}"));
            let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
            let uncached = Uncached { refused: AtomicBool::new(refused) };
            let mut expected = Vec::new();
            for (turn, bytes) in [1, 4095, 4096, 0, 12_288, 5000, 3, 4093, 130_000, 8191].into_iter().enumerate() {
                let piece: Vec<u8> = (0..bytes).map(|i| (i as u8).wrapping_mul(31).wrapping_add(turn as u8)).collect();
                uncached.write_all_at(&file, &piece, expected.len() as u64).unwrap();
                expected.extend(piece);
                assert_eq!(std::fs::read(&path).unwrap(), expected, "after piece {turn}");
            }
        }
    }

    #[test]
    fn a_file_that_cannot_be_written_says_so() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), b"x").unwrap();
        let file = File::open(folder.path().join("file")).unwrap();
        assert!(Uncached::default().write_all_at(&file, &[0; 10_000], 0).is_err());
    }
}
