//! Reads a primary's dirty log as `docs/dirtylog.md` lays it out: how many regions are marked. It may be written meanwhile: a sector is
//! written whole, so what is read is the mark of a moment.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

const MAGIC: &[u8; 8] = b"TWDLOG01";
const SECTOR_BYTES: usize = 512;
/// Bytes of bits in a sector.
const BITS_BYTES: usize = 504;

/// What is marked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Marks {
    /// Regions of the disk.
    pub(crate) regions: u64,
    /// Those that may differ from the copy.
    pub(crate) marked: u64,
    /// Groups of eight regions of which one is marked. Bits are set by groups, so making these took as many syncs at most.
    pub(crate) groups: u64,
}

/// The marks of the log at `path`.
pub(crate) fn read(path: &Path) -> Result<Marks> {
    let failed = || format!("{}: cannot be read as a dirty log", path.display());
    let file = File::open(path).with_context(failed)?;
    let mut header = [0; SECTOR_BYTES];
    file.read_exact_at(&mut header, 0).with_context(failed)?;
    let regions = regions(&header).with_context(failed)?;
    let sectors = usize::try_from(regions)?.div_ceil(8 * BITS_BYTES);
    let mut bits = vec![0; sectors * SECTOR_BYTES];
    file.read_exact_at(&mut bits, SECTOR_BYTES as u64).with_context(failed)?;
    Ok(count(&bits, regions))
}

/// Regions that a header speaks of.
fn regions(header: &[u8; SECTOR_BYTES]) -> Result<u64> {
    let (head, rest) = header.split_at(MAGIC.len());
    ensure!(head == MAGIC, "no such magic");
    let (version, rest) = rest.split_first_chunk().context("too short")?;
    ensure!(u32::from_le_bytes(*version) == 1, "another version");
    let (region_bytes, rest) = rest.split_first_chunk().context("too short")?;
    let (volume_bytes, _) = rest.split_first_chunk().context("too short")?;
    let (region_bytes, volume_bytes) = (u32::from_le_bytes(*region_bytes), u64::from_le_bytes(*volume_bytes));
    ensure!(region_bytes > 0, "regions of no bytes");
    Ok(volume_bytes.div_ceil(region_bytes.into()))
}

fn count(sectors: &[u8], regions: u64) -> Marks {
    let bytes = sectors.chunks(SECTOR_BYTES).flat_map(|sector| sector.iter().take(BITS_BYTES));
    let mut marks = Marks { regions, ..Marks::default() };
    let mut left = regions;
    for byte in bytes {
        let valid = left.min(8) as u32;
        // Bits beyond the last region mean nothing.
        let marked = (byte & 0xff_u8.checked_shr(8 - valid).unwrap_or_default()).count_ones();
        marks.marked += u64::from(marked);
        marks.groups += u64::from(marked > 0);
        left -= u64::from(valid);
    }
    marks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_counted_to_the_last_region_and_not_beyond() {
        let mut sectors = vec![0; 2 * SECTOR_BYTES];
        sectors[0] = 0b101;
        sectors[BITS_BYTES] = 0xff; // The sector's number and checksum are no bits.
        sectors[SECTOR_BYTES] = 0xff;
        assert_eq!(count(&sectors, 4032 + 3), Marks { regions: 4035, marked: 5, groups: 2 });
        assert_eq!(count(&sectors, 4032 + 8), Marks { regions: 4040, marked: 10, groups: 2 });
        assert_eq!(count(&sectors, 1), Marks { regions: 1, marked: 1, groups: 1 });
    }

    #[test]
    fn a_header_tells_the_regions_or_is_none() {
        let mut header = [0; SECTOR_BYTES];
        header[..8].copy_from_slice(MAGIC);
        header[8] = 1;
        header[12..16].copy_from_slice(&(4_u32 << 20).to_le_bytes());
        header[16..24].copy_from_slice(&((8_u64 << 20) + 1).to_le_bytes());
        assert_eq!(regions(&header).unwrap(), 3);
        header[8] = 2;
        assert!(regions(&header).is_err());
        assert!(regions(&[0; SECTOR_BYTES]).is_err());
    }
}
