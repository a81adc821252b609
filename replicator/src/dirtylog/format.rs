//! The bytes of a dirty log: a header sector, sectors of bits, then a bitmap for each region. `docs/dirtylog.md` has the tables.

use proto::codec::{DecodeError, Reader, check_crc};
use proto::dirty::REGION_BITMAP_BYTES;
use proto::region::REGION_BYTES;

/// What a disk writes whole or not at all.
pub(super) const SECTOR_BYTES: usize = 512;
/// Bits of a sector.
pub(super) const SECTOR_REGIONS: usize = layout::BITS[0].1 * 8;
const MAGIC: [u8; 8] = *b"TWDLOG01";
const VERSION: u32 = 1;
/// The maps begin at a multiple of this.
const MAP_ALIGN_BYTES: u64 = 4096;

/// `(offset, bytes, field)` of the sectors.
pub(crate) mod layout {
    /// The first sector.
    pub(crate) const HEADER: &[(usize, usize, &str)] = &[
        (0, 8, "magic"),
        (8, 4, "version"),
        (12, 4, "region_bytes"),
        (16, 8, "volume_bytes"),
        (24, 1, "clean"),
        (25, 7, "reserved"),
        (32, 32, "map_digest"),
        (64, 444, "reserved"),
        (508, 4, "sector_crc32"),
    ];
    /// A sector of bits.
    pub(crate) const BITS: &[(usize, usize, &str)] = &[(0, 504, "bits"), (504, 4, "sector"), (508, 4, "sector_crc32")];
}

const fn follows(fields: &[(usize, usize, &str)]) -> bool {
    let (mut i, mut at) = (0, 0);
    while i < fields.len() {
        if fields[i].0 != at {
            return false;
        }
        at += fields[i].1;
        i += 1;
    }
    at == SECTOR_BYTES
}

const _: () = assert!(follows(layout::HEADER) && follows(layout::BITS));

/// Offset of a sector of bits.
pub(super) fn bits_offset(sector: usize) -> u64 {
    ((sector + 1) * SECTOR_BYTES) as u64
}

fn sectors(volume_bytes: u64) -> u64 {
    volume_bytes.div_ceil(REGION_BYTES).next_multiple_of(64).div_ceil(SECTOR_REGIONS as u64)
}

/// Offset of the bitmap of a region, used after a clean stop only.
pub(super) fn map_offset(volume_bytes: u64, region: u64) -> u64 {
    let map = ((sectors(volume_bytes) + 1) * SECTOR_BYTES as u64).next_multiple_of(MAP_ALIGN_BYTES);
    map + region * REGION_BITMAP_BYTES as u64
}

/// Size of the log of a volume, in bytes; the part of the maps is sparse.
pub(crate) fn log_bytes(volume_bytes: u64) -> u64 {
    map_offset(volume_bytes, volume_bytes.div_ceil(REGION_BYTES).next_multiple_of(64))
}

/// A sector as it was found.
pub(super) enum Sector<T> {
    /// Never written.
    Empty,
    Good(T),
    Bad(DecodeError),
}

/// The first sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) volume_bytes: u64,
    /// After a clean stop: the digest of the maps.
    pub(super) clean: Option<[u8; 32]>,
}

fn seal(mut out: Vec<u8>) -> [u8; SECTOR_BYTES] {
    let crc = crc32fast::hash(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    let mut sector = [0; SECTOR_BYTES];
    sector.copy_from_slice(&out);
    sector
}

fn check(what: &'static str, bytes: &[u8]) -> Result<(), DecodeError> {
    let (covered, stored) = bytes.split_last_chunk::<4>().ok_or(DecodeError::Truncated { what, needed: 4, left: bytes.len() })?;
    check_crc(what, u32::from_le_bytes(*stored), covered)
}

impl Header {
    pub(super) fn encode(&self) -> [u8; SECTOR_BYTES] {
        let mut out = Vec::with_capacity(SECTOR_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(REGION_BYTES as u32).to_le_bytes());
        out.extend_from_slice(&self.volume_bytes.to_le_bytes());
        out.push(self.clean.is_some().into());
        out.extend_from_slice(&[0; 7]);
        out.extend_from_slice(&self.clean.unwrap_or_default());
        out.resize(SECTOR_BYTES - 4, 0);
        seal(out)
    }

    pub(super) fn decode(bytes: &[u8]) -> Sector<Self> {
        if bytes.iter().all(|b| *b == 0) {
            return Sector::Empty;
        }
        match Self::decode_written(bytes) {
            Ok(header) => Sector::Good(header),
            Err(error) => Sector::Bad(error),
        }
    }

    fn decode_written(bytes: &[u8]) -> Result<Self, DecodeError> {
        let what = "dirty log header";
        let mut r = Reader::new(what, bytes);
        r.magic(MAGIC)?;
        check(what, bytes)?;
        let (version, region_bytes) = (r.u32()?, r.u32()?);
        if (version, u64::from(region_bytes)) != (VERSION, REGION_BYTES) {
            return Err(DecodeError::Unknown { what: "dirty log version", value: version.into() });
        }
        let volume_bytes = r.u64()?;
        let clean = r.u8()? != 0;
        r.bytes(7)?;
        let digest = r.array()?;
        Ok(Self { volume_bytes, clean: clean.then_some(digest) })
    }
}

/// The sector `number` of the bits in `words`.
pub(super) fn encode_bits(number: usize, words: &[u64]) -> [u8; SECTOR_BYTES] {
    let mut out = Vec::with_capacity(SECTOR_BYTES);
    let per_sector = SECTOR_REGIONS / 64;
    for word in words.iter().skip(number * per_sector).take(per_sector) {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.resize(layout::BITS[0].1, 0);
    out.extend_from_slice(&(number as u32).to_le_bytes());
    seal(out)
}

/// Puts the bits of a sector into `words`.
pub(super) fn decode_bits(bytes: &[u8], number: usize, words: &mut [u64]) -> Result<(), DecodeError> {
    let what = "dirty log sector";
    check(what, bytes)?;
    let mut r = Reader::new(what, bytes);
    let bits = r.bytes(layout::BITS[0].1)?;
    if r.u32()? as usize != number {
        return Err(DecodeError::Rule { what, rule: "it lies where it was written" });
    }
    let per_sector = SECTOR_REGIONS / 64;
    for (word, bytes) in words.iter_mut().skip(number * per_sector).zip(bits.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    Ok(())
}

/// Adds a region's bitmap to the digest of the maps.
pub(super) fn hash_region(hasher: &mut blake3::Hasher, region: u64, bits: &[u8; REGION_BITMAP_BYTES]) {
    hasher.update(&region.to_le_bytes());
    hasher.update(bits);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_read_back_and_a_flipped_bit_is_noticed() {
        let header = Header { volume_bytes: 1 << 40, clean: Some([7; 32]) };
        let bytes = header.encode();
        assert!(matches!(Header::decode(&bytes), Sector::Good(h) if h == header));
        assert!(matches!(Header::decode(&[0; SECTOR_BYTES]), Sector::Empty));
        let words: Vec<u64> = (0..200).map(|i| i * 0x0102_0304_0506_0709).collect();
        let bits = encode_bits(1, &words);
        let mut seen = vec![0; 200];
        decode_bits(&bits, 1, &mut seen).unwrap();
        assert_eq!(seen[63..126], words[63..126]);
        assert!(seen[..63].iter().chain(&seen[126..]).all(|w| *w == 0));
        assert!(decode_bits(&bits, 2, &mut seen).is_err(), "in another place");
        for bit in 0..SECTOR_BYTES * 8 {
            let (mut h, mut b) = (bytes, bits);
            h[bit / 8] ^= 1 << (bit % 8);
            b[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(Header::decode(&h), Sector::Bad(_)), "bit {bit}");
            assert!(decode_bits(&b, 1, &mut seen).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn the_byte_tables_of_the_document_are_the_codes() {
        let document = include_str!("../../../docs/dirtylog.md");
        for (name, layout) in [("header", layout::HEADER), ("bits", layout::BITS)] {
            let (_, rest) = document.split_once(&format!("<!-- table: {name} -->")).unwrap();
            let rows = rest.lines().skip_while(|l| !l.starts_with('|')).take_while(|l| l.starts_with('|')).skip(2);
            let expected: Vec<String> = layout.iter().map(|(o, b, f)| format!("| {o} | {b} | {f} |")).collect();
            assert!(rows.eq(expected), "table {name}");
        }
    }

    #[test]
    fn the_parts_of_a_log_do_not_overlap() {
        for volume_bytes in [1, REGION_BYTES, 4032 * REGION_BYTES, 4033 * REGION_BYTES, 1 << 40, 1 << 44] {
            let regions = volume_bytes.div_ceil(REGION_BYTES);
            let last = ((regions - 1) / SECTOR_REGIONS as u64) as usize;
            assert!(bits_offset(last) + SECTOR_BYTES as u64 <= map_offset(volume_bytes, 0), "{volume_bytes}");
            assert!(map_offset(volume_bytes, regions) <= log_bytes(volume_bytes));
        }
    }
}
