//! Checksums of the bases: beside `base/<volume>.raw` a file `base/<volume>.sums` with 4 bytes for each block.
//!
//! A sum is the CRC-32 of the block, exclusive-or that of a block of zeroes. So a hole fits a hole: what was never written takes no space here either, and
//! a block that should not be zeroes is found when it is.
//!
//! Always holds: whoever writes a base writes its sums, and makes both durable before anything is given up for them. A reader never meets a block
//! whose sum is being written: while a fold writes blocks, everyone who may look reads them in frames (`group/fold`). A base without sums, which an
//! older node has made, is read unchecked until [`make`] has made them.

mod examine;
mod writing;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use blockdev::{Buf, SharedFile};
use proto::units::BLOCK_BYTES;
use rustix::fs::{SeekFrom, seek};

pub(crate) use examine::{Seen, data_bytes, examine};
pub(crate) use writing::{SumsFile, make, sums_of};

use crate::disk::{read_nowait, read_up_to};

/// Bytes of a sum.
pub(crate) const SUM_BYTES: u64 = 4;
/// CRC-32 of a block of zeroes.
const CRC_OF_ZEROES: u32 = 0xc71c_0011;
const ZEROES: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];
/// Sums looked at in one go when the next one that is set is searched.
const SEARCH_BYTES: usize = 4096;
/// Sums that are compared without an allocation: those of 256 KiB.
const SMALL_BYTES: usize = 256;

/// The sum of a block, or of the part of a volume's last block that is in it.
pub(crate) fn sum_of(block: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(block);
    hasher.update(ZEROES.get(block.len()..).unwrap_or_default());
    hasher.finalize() ^ CRC_OF_ZEROES
}

/// The file of sums of a base.
pub(crate) fn sums_path(base: &Path) -> PathBuf {
    base.with_extension("sums")
}

/// Writes the sums of what a base holds, where readers that have them open see them.
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
pub(crate) fn write_sums(base: &Path) {
    let content = std::fs::read(base).unwrap();
    let sums: Vec<u8> = content.chunks(BLOCK_BYTES as usize).flat_map(|block| sum_of(block).to_le_bytes()).collect();
    std::fs::write(sums_path(base), sums).unwrap();
}

/// What of a base is not what was written into it. The file named first is the base; the bit may have flipped in either.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BaseDamage {
    #[error(
        "{}: the block at offset {offset} is damaged (its checksum is {computed:08x}, {} has {stored:08x} at offset {sum_offset}): run `twinsite check`",
        path.display(), sums.display()
    )]
    Block { path: PathBuf, offset: u64, computed: u32, sums: PathBuf, sum_offset: u64, stored: u32 },
    #[error("{}: the block at offset {offset} has no checksum ({} ends at {bytes} bytes): run `twinsite check`", path.display(), sums.display())]
    NoSum { path: PathBuf, offset: u64, sums: PathBuf, bytes: u64 },
}

impl BaseDamage {
    /// Where the block begins in the base, in bytes.
    pub(crate) fn offset(&self) -> u64 {
        match self {
            Self::Block { offset, .. } | Self::NoSum { offset, .. } => *offset,
        }
    }

    /// What does not fit, without the base's name and offset.
    pub(crate) fn problem(&self) -> String {
        match self {
            Self::Block { computed, sums, sum_offset, stored, .. } => {
                format!("the block's checksum is {computed:08x}, {} has {stored:08x} at offset {sum_offset}", sums.display())
            }
            Self::NoSum { sums, bytes, .. } => format!("the block has no checksum: {} ends at {bytes} bytes", sums.display()),
        }
    }
}

/// The sums of one base, for readers.
#[derive(Debug)]
pub(crate) struct Sums {
    file: SharedFile,
    path: PathBuf,
    base: PathBuf,
    /// Bytes of the volume.
    size: u64,
    /// Bytes of sums.
    bytes: u64,
}

impl Sums {
    /// Opens the sums of a base of `size` bytes; `None` if it has none.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn open(base: &Path, size: u64) -> io::Result<Option<Self>> {
        let path = sums_path(base);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let bytes = file.metadata()?.len();
        Ok(Some(Self { file: SharedFile::new(file), path, base: base.to_owned(), size, bytes }))
    }

    /// The whole blocks around a range, as first byte and end; a volume's last block ends with the volume.
    pub(crate) fn around(&self, offset: u64, length: u64) -> Range<u64> {
        offset - offset % BLOCK_BYTES..(offset + length).next_multiple_of(BLOCK_BYTES).min(self.size)
    }

    /// Where the sums of whole blocks are, and how many bytes they have.
    ///
    /// # Errors
    /// [`BaseDamage::NoSum`].
    fn place(&self, offset: u64, content: &[u8]) -> Result<(u64, usize), BaseDamage> {
        let (first, blocks) = (offset / BLOCK_BYTES, (content.len() as u64).div_ceil(BLOCK_BYTES));
        let known = self.bytes / SUM_BYTES;
        if first + blocks > known {
            let offset = first.max(known) * BLOCK_BYTES;
            return Err(BaseDamage::NoSum { path: self.base.clone(), offset, sums: self.path.clone(), bytes: self.bytes });
        }
        Ok((first * SUM_BYTES, (blocks * SUM_BYTES) as usize))
    }

    /// Compares whole blocks with their sums. The damaged ones, in order.
    fn damaged<'a>(&'a self, offset: u64, content: &'a [u8], sums: &'a [u8]) -> impl Iterator<Item = BaseDamage> + 'a {
        let stored = sums.as_chunks::<{ SUM_BYTES as usize }>().0.iter().map(|sum| u32::from_le_bytes(*sum));
        let blocks = content.chunks(BLOCK_BYTES as usize).zip(stored).zip((offset..).step_by(BLOCK_BYTES as usize));
        blocks.filter_map(move |((block, stored), offset)| {
            let computed = sum_of(block);
            (computed != stored).then(|| BaseDamage::Block {
                path: self.base.clone(),
                offset,
                computed,
                sums: self.path.clone(),
                sum_offset: offset / BLOCK_BYTES * SUM_BYTES,
                stored,
            })
        })
    }

    fn compare(&self, offset: u64, content: &[u8], sums: &[u8]) -> io::Result<()> {
        self.damaged(offset, content, sums).next().map_or(Ok(()), |damage| Err(io::Error::other(damage)))
    }

    /// Whether whole blocks from byte `offset` on fit their sums, if those are in memory.
    pub(crate) fn try_check(&self, offset: u64, content: &[u8]) -> Option<bool> {
        let (at, length) = self.place(offset, content).ok()?;
        let (mut small, mut large) = ([0; SMALL_BYTES], Vec::new());
        let sums = match small.get_mut(..length) {
            Some(sums) => sums,
            None => {
                large.resize(length, 0);
                large.as_mut_slice()
            }
        };
        read_nowait(self.file.file(), sums, at).then(|| self.damaged(offset, content, sums).next().is_none())
    }

    /// Compares whole blocks from byte `offset` on with their sums; on an io thread, which does not wait for the disk.
    ///
    /// # Errors
    /// [`BaseDamage`], within an I/O error, or that the sums cannot be read.
    pub(crate) async fn check(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        let (at, length) = self.place(offset, content).map_err(io::Error::other)?;
        let mut sums = Buf::zeroed(length);
        if !read_nowait(self.file.file(), &mut sums, at) {
            sums = self.file.read_exact_at(at, sums).await?;
        }
        self.compare(offset, content, &sums)
    }

    /// As [`check`](Self::check), on this thread, which waits for the disk.
    #[cfg(any(test, feature = "simulation"))]
    pub(crate) fn check_now(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        let (at, length) = self.place(offset, content).map_err(io::Error::other)?;
        let mut sums = vec![0; length];
        std::os::unix::fs::FileExt::read_exact_at(self.file.file(), &mut sums, at)?;
        self.compare(offset, content, &sums)
    }

    /// The first block of a range whose sum says that it is not zeroes. Blocks on file I/O; holes cost nothing.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn next_set(&self, blocks: Range<u64>) -> io::Result<Option<u64>> {
        let (mut at, end) = (blocks.start * SUM_BYTES, (blocks.end * SUM_BYTES).min(self.bytes));
        let mut piece = [0; SEARCH_BYTES];
        while at < end {
            at = match seek(&self.file, SeekFrom::Data(at)) {
                // Never within a sum, wherever the file system says that its data begins.
                Ok(data) => data - data % SUM_BYTES,
                Err(rustix::io::Errno::NXIO) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            let Some(wanted) = piece.get_mut(..end.saturating_sub(at).min(SEARCH_BYTES as u64) as usize) else { break };
            let read = read_up_to(self.file.file(), wanted, at)?;
            let found = wanted.get(..read).unwrap_or_default().iter().position(|byte| *byte != 0);
            if let Some(byte) = found {
                return Ok(Some((at + byte as u64) / SUM_BYTES));
            }
            if read == 0 {
                break;
            }
            at += read as u64;
        }
        Ok(None)
    }
}

/// The next piece of a file from block boundary `at` on that has data: whole blocks, at most `most` bytes of them, as first byte and end.
fn next_data(file: &File, at: u64, size: u64, most: u64) -> io::Result<Option<Range<u64>>> {
    let data = match seek(file, SeekFrom::Data(at)) {
        Ok(data) if data < size => data,
        Ok(_) | Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let start = data - data % BLOCK_BYTES;
    let hole = seek(file, SeekFrom::Hole(data))?.max(data + 1);
    Ok(Some(start..hole.next_multiple_of(BLOCK_BYTES).min(start + most).min(size)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_have_the_sum_of_a_hole_and_any_bit_shows() {
        assert_eq!(crc32fast::hash(&ZEROES), CRC_OF_ZEROES);
        for length in [1, 100, 4095, 4096] {
            let mut block = vec![0; length];
            assert_eq!(sum_of(&block), 0);
            for bit in [0, 7, length * 4, length * 8 - 1] {
                block[bit / 8] ^= 1 << (bit % 8);
                assert_ne!(sum_of(&block), 0, "bit {bit} of {length} bytes");
                block[bit / 8] ^= 1 << (bit % 8);
            }
        }
        // The last block of a volume has the sum of its padded content.
        let mut padded = vec![7; 100];
        let part = sum_of(&padded);
        padded.resize(4096, 0);
        assert_eq!(sum_of(&padded), part);
    }
}
