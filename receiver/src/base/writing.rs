//! Writes sums: with what a fold or an adoption writes into a base, and of a base that has none.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use proto::units::{BLOCK_BYTES, blocks_of};
use rustix::fs::{SeekFrom, seek};

use super::{SUM_BYTES, next_data, sum_of, sums_path};
use crate::disk::{Disk, DiskFile, read_up_to};

/// Sums of a page of the file.
const PAGE_SUMS: u64 = 4096 / SUM_BYTES;
/// Zeroes of fewer bytes than this are written; more are made a hole.
const HOLE_BYTES_MIN: u64 = 4096;
/// Bytes of a base that are read at once.
const PIECE_BYTES: u64 = 1 << 20;

/// A file of sums that is written.
#[derive(Debug)]
pub(crate) struct SumsFile {
    file: DiskFile,
    path: PathBuf,
}

impl SumsFile {
    /// Makes the sums of a base of zeroes, at `path`. Not durable until it is synced.
    pub(crate) fn create(disk: &Disk, path: &Path, size: u64) -> io::Result<Self> {
        let file = disk.create_file(path)?;
        file.set_len(blocks_of(size) * SUM_BYTES)?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Opens the sums of a base as they are on the disk; `None` if it has none.
    pub(crate) fn open_settled(disk: &Disk, base: &Path) -> io::Result<Option<Self>> {
        let path = sums_path(base);
        match disk.open_settled(&path) {
            Ok(file) => Ok(Some(Self { file, path })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Enters the sums of blocks, which rise: one write for each page of the file. Sums in between are written again as they are.
    pub(crate) fn put(&self, sums: &[(u64, u32)]) -> io::Result<()> {
        for of_page in sums.chunk_by(|a, b| a.0 / PAGE_SUMS == b.0 / PAGE_SUMS) {
            let (Some((first, _)), Some((last, _))) = (of_page.first(), of_page.last()) else { continue };
            let mut bytes = vec![0; ((last + 1 - first) * SUM_BYTES) as usize];
            if bytes.len() as u64 != of_page.len() as u64 * SUM_BYTES {
                read_up_to(self.file.file(), &mut bytes, first * SUM_BYTES)?;
            }
            for (block, sum) in of_page {
                let at = ((block - first) * SUM_BYTES) as usize;
                if let Some(to) = bytes.get_mut(at..at + SUM_BYTES as usize) {
                    to.copy_from_slice(&sum.to_le_bytes());
                }
            }
            self.file.write_all_at(&bytes, first * SUM_BYTES)?;
        }
        Ok(())
    }

    /// Enters that blocks are zeroes. Whatever is there is written over, since a cache may show what no disk has.
    pub(crate) fn clear(&self, blocks: Range<u64>) -> io::Result<()> {
        let (mut at, end) = (blocks.start * SUM_BYTES, (blocks.end * SUM_BYTES).min(self.file.bytes()?));
        while at < end {
            let data = match seek(self.file.file(), SeekFrom::Data(at)) {
                Ok(data) if data < end => data,
                Ok(_) | Err(rustix::io::Errno::NXIO) => break,
                Err(error) => return Err(error.into()),
            };
            at = seek(self.file.file(), SeekFrom::Hole(data))?.clamp(data + 1, end);
            if at - data < HOLE_BYTES_MIN {
                self.file.write_all_at(&vec![0; (at - data) as usize], data)?;
            } else {
                self.file.punch(data, at - data)?;
            }
        }
        Ok(())
    }

    /// Makes them durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// The sums of consecutive blocks from `block` on.
pub(crate) fn sums_of(block: u64, content: &[u8]) -> impl Iterator<Item = (u64, u32)> + '_ {
    (block..).zip(content.chunks(BLOCK_BYTES as usize).map(sum_of))
}

/// Makes the sums of a base that has none from what it holds, durably; nobody may write it meanwhile. Told how many bytes of data were
/// looked at, `goes_on` says whether to go on. Returns whether they were made.
///
/// # Errors
/// The system's. What was made until then is made anew the next time.
pub(crate) fn make(disk: &Disk, base: &Path, size: u64, goes_on: &mut dyn FnMut(u64) -> bool) -> io::Result<bool> {
    let path = sums_path(base);
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return Err(io::ErrorKind::NotFound.into()) };
    // No volume is called so.
    let building = folder.join(format!(".new-{}", name.display()));
    if building.exists() {
        disk.remove_file(&building)?;
    }
    let source = disk.open_settled(base)?;
    let sums = SumsFile::create(disk, &building, size)?;
    let (mut at, mut piece) = (0, vec![0; PIECE_BYTES as usize]);
    while let Some(range) = next_data(source.file(), at, size, PIECE_BYTES)? {
        let wanted = piece.get_mut(..(range.end - range.start) as usize).unwrap_or_default();
        std::os::unix::fs::FileExt::read_exact_at(source.file(), wanted, range.start)?;
        sums.put(&sums_of(range.start / BLOCK_BYTES, wanted).collect::<Vec<_>>())?;
        at = range.end;
        if !goes_on(range.end - range.start) {
            disk.remove_file(&building)?;
            return Ok(false);
        }
    }
    sums.sync()?;
    disk.rename(&building, &path)?;
    disk.sync_folder(folder)?;
    Ok(true)
}
