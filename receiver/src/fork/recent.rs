//! Blocks that were written and not flushed, kept beyond a process that is killed.
//!
//! A bit of the map is made only when the data of its block is durable (`map`). Alone, a process that is killed would take with it whatever a guest
//! had not flushed, though the data is in the page cache; and the guest, which connects again and flushes, would believe that it is there. So each
//! bit also goes into a file of its own, after the data of its block and before the guest has its answer, and neither is synced.
//!
//! Always holds: as long as the kernel runs that had both, a bit in it is of a block whose data is in the file. Its head says which boot that was; of
//! any other boot it is ignored, for then the bit may have come to the disk and the data not. It holds nothing durable, so it goes
//! round the store's `disk`.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use proto::DirtyMap;

use super::map::{MAP_HEADER_BYTES, MapHeader, load};

/// First bytes of the file.
pub const RECENT_MAGIC: [u8; 8] = *b"TWFRCN01";
/// Random, of each start of the kernel; `proc_sys_kernel(5)`, `random`.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// A UUID as text.
const BOOT_ID_BYTES: usize = 36;

/// Which start of the kernel this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Boot([u8; BOOT_ID_BYTES]);

impl Boot {
    /// # Errors
    /// The system's, or that what it says is no UUID.
    pub(super) fn current() -> io::Result<Self> {
        let text = std::fs::read(BOOT_ID)?;
        let id = text.first_chunk().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no UUID"))?;
        Ok(Self(*id))
    }
}

/// The file of one volume, open for changes.
#[derive(Debug)]
pub(super) struct Recent {
    file: File,
}

impl Recent {
    /// Opens the file at `path`, or begins it anew if it is of another boot or fork. Returns the blocks that it has.
    pub(super) fn open(path: &Path, header: &MapHeader, boot: Boot) -> io::Result<(Self, DirtyMap)> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let found = held(&file, header, boot)?;
        let set = match found {
            Some(set) => set,
            None => {
                // The bits go before a head comes that would vouch for them.
                file.set_len(0)?;
                file.write_all_at(&head(header, boot), 0)?;
                DirtyMap::new(header.size_bytes)
            }
        };
        Ok((Self { file }, set))
    }

    /// The blocks that the file at `path` has, for who only looks; none if it is of another boot or fork, or not there.
    pub(super) fn read(path: &Path, header: &MapHeader, boot: Boot) -> io::Result<DirtyMap> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(DirtyMap::new(header.size_bytes)),
            Err(error) => return Err(error),
        };
        Ok(held(&file, header, boot)?.unwrap_or_else(|| DirtyMap::new(header.size_bytes)))
    }

    /// Adds blocks, whose data is in the file, to those of `set`, which are there. One caller at a time.
    pub(super) fn note(&self, set: &DirtyMap, blocks: &Range<u64>) -> io::Result<()> {
        let (first, end) = (blocks.start / 8, blocks.end.div_ceil(8));
        let mut bytes = vec![u8::MAX; (end - first) as usize];
        for edge in [first, end - 1] {
            let bit = |n: u64| blocks.contains(&(edge * 8 + n)) || set.contains(edge * 8 + n);
            let byte = (0..8).filter(|n| bit(*n)).fold(0, |byte, n| byte | 1 << n);
            if let Some(at) = bytes.get_mut((edge - first) as usize) {
                *at = byte;
            }
        }
        self.file.write_all_at(&bytes, MAP_HEADER_BYTES as u64 + first)
    }
}

fn head(header: &MapHeader, boot: Boot) -> Vec<u8> {
    let mut head = RECENT_MAGIC.to_vec();
    head.extend_from_slice(&boot.0);
    head.extend_from_slice(&[0; 20]);
    head.extend_from_slice(&header.encode());
    head.truncate(MAP_HEADER_BYTES);
    head
}

/// What a file has, if it is of this boot and fork.
fn held(file: &File, header: &MapHeader, boot: Boot) -> io::Result<Option<DirtyMap>> {
    let mut found = vec![0; MAP_HEADER_BYTES];
    let n = crate::disk::read_up_to(file, &mut found, 0)?;
    if n != found.len() || found != head(header, boot) {
        return Ok(None);
    }
    let mut set = DirtyMap::new(header.size_bytes);
    load(file, &mut set)?;
    Ok(Some(set))
}

#[cfg(test)]
mod tests {
    use proto::{EpochId, Generation, Point};

    use super::*;

    const BLOCKS: u64 = 100_000;

    fn header(epoch: u64) -> MapHeader {
        let point = Point { generation: Generation(1), epoch: EpochId(epoch) };
        MapHeader { group_id: [7; 16], point, size_bytes: BLOCKS * 4096 }
    }

    #[test]
    fn what_was_noted_is_found_in_this_boot_and_for_this_fork_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.recent");
        let boot = Boot::current().unwrap();
        let (recent, mut set) = Recent::open(&path, &header(4), boot).unwrap();
        assert!(set.is_empty());
        // Neighbours within a byte, across bytes, a page of bits, the end.
        for blocks in [3..4, 5..6, 0..1, 14..35, 32_760..32_780, 60_000..65_000, BLOCKS - 1..BLOCKS] {
            recent.note(&set, &blocks).unwrap();
            set.mark(blocks.start, blocks.end - blocks.start);
        }
        drop(recent);
        let same = |found: &DirtyMap| found.count() == set.count() && (0..BLOCKS).all(|b| found.contains(b) == set.contains(b));
        assert!(same(&Recent::read(&path, &header(4), boot).unwrap()));
        assert!(same(&Recent::open(&path, &header(4), boot).unwrap().1));

        assert!(Recent::read(&path, &header(5), boot).unwrap().is_empty(), "another fork");
        let earlier = Boot([b'0'; BOOT_ID_BYTES]);
        assert!(Recent::read(&path, &header(4), earlier).unwrap().is_empty(), "another boot");
        let (_, found) = Recent::open(&path, &header(4), earlier).unwrap();
        assert!(found.is_empty());
        assert!(Recent::read(&path, &header(4), boot).unwrap().is_empty(), "begun anew, its bits are gone");
    }
}
