//! Which blocks of a fork are its own: in memory a set, on disk a header and one bit a block.
//!
//! A bit goes to disk only after the block's data was synced, and bits are only ever set, so any mixture of old and
//! new sectors of a page that was being written is a true map. That is why pages carry no checksum: a torn page is not damage.
//! (The map of touched regions is the other way round: a bit is set before, and one too many is true too.)

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proto::codec::{DecodeError, Reader, check_crc};
use proto::units::{BlockIndex, blocks_of};
use proto::{BlockExtent, DirtyMap, EpochId, Generation, Point};
use rustix::fs::{SeekFrom, seek};

use super::own::Pages;
use crate::disk::{Disk, DiskFile};

/// First bytes of a map.
pub const MAP_MAGIC: [u8; 8] = *b"TWFMAP01";
/// Bytes before the bits; a page.
pub const MAP_HEADER_BYTES: usize = 4096;
/// Bytes of a page of bits: what is written at once.
pub const MAP_PAGE_BYTES: usize = 4096;
/// Blocks a page speaks of: 128 MiB.
pub(super) const PAGE_BLOCKS: u64 = MAP_PAGE_BYTES as u64 * 8;

/// Offsets of the header, in bytes; integers are little endian.
pub mod layout {
    /// `(offset, bytes, field)`; zeroes follow up to the first page of bits.
    pub const MAP: &[(usize, usize, &str)] = &[
        (0, 8, "magic"),
        (8, 4, "version"),
        (12, 4, "reserved"),
        (16, 16, "group_id"),
        (32, 8, "generation"),
        (40, 8, "epoch"),
        (48, 8, "size_bytes"),
        (56, 4, "header_crc32"),
    ];
}

const USED_BYTES: usize = 60;

/// Why a map is refused.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The file cannot be read or written.
    #[error("{}: cannot {what} the map: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The header cannot be trusted.
    #[error("{}: the header at offset 0 is damaged ({source}): restore the file from a backup", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        source: DecodeError,
    },
    /// The map of another fork.
    #[error("{}: the map of another fork (point {point}, {size_bytes} bytes): restore the right file", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Its point.
        point: Point,
        /// Size of its volume.
        size_bytes: u64,
    },
}

/// What a map belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapHeader {
    pub(crate) group_id: [u8; 16],
    pub(crate) point: Point,
    pub(crate) size_bytes: u64,
}

impl MapHeader {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = MAP_MAGIC.to_vec();
        out.extend_from_slice(&1_u32.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.group_id);
        for value in [self.point.generation.0, self.point.epoch.0, self.size_bytes] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out.resize(MAP_HEADER_BYTES, 0);
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let what = "fork map header";
        let mut r = Reader::new(what, bytes);
        r.magic(MAP_MAGIC)?;
        let version = r.u32()?;
        r.bytes(4)?;
        let header = Self {
            group_id: r.array()?,
            point: Point { generation: Generation(r.u64()?), epoch: EpochId(r.u64()?) },
            size_bytes: r.u64()?,
        };
        check_crc(what, r.u32()?, bytes.get(..USED_BYTES - 4).unwrap_or_default())?;
        if version != 1 {
            return Err(DecodeError::Unknown { what: "fork map version", value: version.into() });
        }
        Ok(header)
    }
}

/// The file of a map.
#[derive(Debug)]
pub(crate) struct MapFile {
    file: Arc<DiskFile>,
}

impl MapFile {
    /// Creates the map of a new fork, with nothing in it.
    pub(crate) fn create(disk: &Disk, path: &Path, header: &MapHeader) -> Result<(), MapError> {
        let io = |source| MapError::Io { path: path.to_owned(), what: "create", source };
        let file = disk.create_file(path).map_err(io)?;
        let pages = blocks_of(header.size_bytes).div_ceil(PAGE_BLOCKS);
        file.write_all_at(&header.encode(), 0)
            .and_then(|()| file.set_len(MAP_HEADER_BYTES as u64 + pages * MAP_PAGE_BYTES as u64))
            .and_then(|()| file.sync_all())
            .map_err(io)
    }

    /// What the map at `path` belongs to.
    pub(crate) fn header(path: &Path) -> Result<MapHeader, MapError> {
        let io = |source| MapError::Io { path: path.to_owned(), what: "read", source };
        let mut head = [0; USED_BYTES];
        let n = File::open(path).and_then(|file| crate::disk::read_up_to(&file, &mut head, 0)).map_err(io)?;
        let header = MapHeader::decode(head.get(..n).unwrap_or_default());
        header.map_err(|source| MapError::Header { path: path.to_owned(), source })
    }

    /// The point of the fork whose map is at `path`, and the set that it holds, for who only looks.
    #[cfg(any(test, feature = "simulation"))]
    pub(crate) fn read(path: &Path, size_bytes: u64) -> Result<(Point, DirtyMap), MapError> {
        let mut set = DirtyMap::new(size_bytes);
        let io = |source| MapError::Io { path: path.to_owned(), what: "read", source };
        File::open(path).and_then(|file| load(&file, &mut set)).map_err(io)?;
        Ok((Self::header(path)?.point, set))
    }

    /// Opens a map and reads the set it holds; costs what was touched.
    pub(crate) fn open(disk: &Disk, path: &Path, expected: &MapHeader) -> Result<(Self, DirtyMap), MapError> {
        let io = |source| MapError::Io { path: path.to_owned(), what: "read", source };
        // Bits that a killed process did not live to sync are synced here: no later flush would know of them.
        let file = disk.open_settled(path).map_err(io)?;
        let mut head = [0; USED_BYTES];
        let n = crate::disk::read_up_to(file.file(), &mut head, 0).map_err(io)?;
        let header = MapHeader::decode(head.get(..n).unwrap_or_default())
            .map_err(|source| MapError::Header { path: path.to_owned(), source })?;
        if header != *expected {
            let MapHeader { point, size_bytes, .. } = header;
            return Err(MapError::Foreign { path: path.to_owned(), point, size_bytes });
        }
        let mut set = DirtyMap::new(header.size_bytes);
        load(file.file(), &mut set).map_err(io)?;
        Ok((Self { file: Arc::new(file) }, set))
    }

    /// Writes pages and syncs them, if there are any. The data of their blocks must be durable. The caller's thread, which has other disks to serve, does not wait.
    pub(super) async fn keep(&self, pages: Pages) -> io::Result<()> {
        if pages.is_empty() {
            return Ok(());
        }
        let file = Arc::clone(&self.file);
        blockdev::offload(move || write(&file, &pages)).await?
    }

    /// As [`keep`](Self::keep), for a caller who may wait.
    pub(super) fn keep_waiting(&self, pages: &Pages) -> io::Result<()> {
        write(&self.file, pages)
    }

    /// Takes the blocks of `set` out of a map that has no others, and syncs it. Torn, some of them are still in it.
    pub(crate) fn clear(&self, set: &DirtyMap) -> io::Result<()> {
        let (mut at, mut pages) = (0, Pages::new());
        while let Some(run) = set.next_run(at, u32::MAX) {
            let page = run.start.0 / PAGE_BLOCKS;
            pages.push((page, Box::new([0; MAP_PAGE_BYTES])));
            at = (page + 1) * PAGE_BLOCKS;
        }
        self.keep_waiting(&pages)
    }

    /// Opens a map, or creates it, whole under its name.
    pub(crate) fn open_or_create(disk: &Disk, path: &Path, header: &MapHeader) -> Result<(Self, DirtyMap), MapError> {
        let io = |what| move |source| MapError::Io { path: path.to_owned(), what, source };
        if !path.exists() {
            let building = path.with_extension("new");
            if building.exists() {
                disk.remove_file(&building).map_err(io("remove what is left of"))?;
            }
            Self::create(disk, &building, header)?;
            disk.rename(&building, path).map_err(io("name"))?;
            if let Some(folder) = path.parent() {
                disk.sync_folder(folder).map_err(io("sync the folder of"))?;
            }
        }
        Self::open(disk, path, header)
    }

    /// Gets space on the disk for all pages, so that none of them is refused for want of it later; where the file system cannot, they take theirs as they come.
    pub(crate) fn allocate(&self) -> io::Result<()> {
        match self.file.allocate(self.file.bytes()?) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            done => done,
        }
    }
}

fn write(file: &DiskFile, pages: &Pages) -> io::Result<()> {
    for (number, page) in pages {
        file.write_all_at(&page[..], MAP_HEADER_BYTES as u64 + number * MAP_PAGE_BYTES as u64)?;
    }
    file.sync_data()
}

/// The bits of page `number`.
pub(crate) fn page_of(set: &DirtyMap, number: u64) -> Box<[u8; MAP_PAGE_BYTES]> {
    let mut page = Box::new([0_u8; MAP_PAGE_BYTES]);
    let (first, end) = (number * PAGE_BLOCKS, (number + 1) * PAGE_BLOCKS);
    let mut at = first;
    while let Some(run) = set.next_run(at, u32::MAX).filter(|r| r.start.0 < end) {
        for block in run.start.0..run.end().min(end) {
            let bit = (block - first) as usize;
            if let Some(byte) = page.get_mut(bit / 8) {
                *byte |= 1 << (bit % 8);
            }
        }
        at = run.end();
    }
    page
}

pub(super) fn load(file: &File, set: &mut DirtyMap) -> io::Result<()> {
    let header = MAP_HEADER_BYTES as u64;
    let end = file.metadata()?.len();
    let mut at = header;
    let mut page = vec![0; MAP_PAGE_BYTES];
    while at < end {
        at = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => (data - (data - header) % MAP_PAGE_BYTES as u64).max(at),
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let n = crate::disk::read_up_to(file, &mut page, at)?;
        let first = (at - header) * 8;
        for run in runs(page.get(..n).unwrap_or_default()) {
            set.mark(first + run.start.0, run.blocks.into());
        }
        at += MAP_PAGE_BYTES as u64;
    }
    Ok(())
}

/// Runs of set bits.
fn runs(bytes: &[u8]) -> Vec<BlockExtent> {
    let mut runs: Vec<BlockExtent> = Vec::new();
    for (i, byte) in bytes.iter().enumerate().filter(|(_, b)| **b != 0) {
        for bit in (0..8).filter(|bit| byte & (1 << bit) != 0) {
            let block = i as u64 * 8 + bit;
            match runs.last_mut() {
                Some(last) if last.end() == block => last.blocks += 1,
                _ => runs.push(BlockExtent { start: BlockIndex(block), blocks: 1 }),
            }
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_reads_back_across_pages_and_another_forks_map_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.map");
        let point = Point { generation: Generation(1), epoch: EpochId(4) };
        let header = MapHeader { group_id: [3; 16], point, size_bytes: 1 << 40 };
        MapFile::create(&Disk::default(), &path, &header).unwrap();
        let mut set = DirtyMap::new(1 << 40);
        for (first, count) in [(0, 1), (7, 3), (PAGE_BLOCKS - 1, 2), ((1 << 28) - 1, 1)] {
            set.mark(first, count);
        }
        let (file, empty) = MapFile::open(&Disk::default(), &path, &header).unwrap();
        assert!(empty.is_empty());
        file.keep_waiting(&[0, 1, (1 << 28) / PAGE_BLOCKS - 1].map(|page| (page, page_of(&set, page))).into()).unwrap();
        let (_, found) = MapFile::open(&Disk::default(), &path, &header).unwrap();
        assert_eq!(found.count(), set.count());
        let mut at = 0;
        while let Some(run) = set.next_run(at, u32::MAX) {
            assert!((run.start.0..run.end()).all(|b| found.contains(b)));
            at = run.end();
        }
        let other = MapHeader { size_bytes: 1 << 39, ..header };
        assert!(MapFile::open(&Disk::default(), &path, &other).unwrap_err().to_string().contains("map of another fork"));
    }
}
