//! The files of a journal: names, the segment header, the placed seal.

use std::fs::File;
use std::path::{Path, PathBuf};

use proto::codec::{DecodeError, Reader, check_crc};
use proto::seal::SEAL_BYTES;
use proto::{EpochId, Seal};

/// First bytes of every segment.
pub const SEGMENT_MAGIC: [u8; 8] = *b"TWJSEG01";
/// Bytes of a segment's header.
pub const SEGMENT_HEADER_BYTES: usize = 64;
/// Bytes of a seal as it stands in the journal: the record of the wire and the checksum of its place.
pub const PLACED_SEAL_BYTES: usize = SEAL_BYTES + 4;
/// Number of a journal's very first segment.
pub const FIRST_SEGMENT: u32 = 1;

/// Offsets of the structures of a segment, in bytes; integers are little endian.
pub mod layout {
    /// `(offset, bytes, field)` of the header.
    pub const SEGMENT: &[(usize, usize, &str)] = &[
        (0, 8, "magic"),
        (8, 4, "version"),
        (12, 4, "number"),
        (16, 16, "group_id"),
        (32, 8, "first_epoch"),
        (40, 8, "previous_bytes"),
        (48, 8, "created_unix_us"),
        (56, 3, "further"),
        (59, 1, "thinned"),
        (60, 4, "header_crc32"),
    ];
    /// `(offset, bytes, field)` of a seal in the journal.
    pub const PLACED_SEAL: &[(usize, usize, &str)] = &[(0, 124, "seal"), (124, 4, "place_crc32")];
}

const _: () = {
    let (mut i, mut at) = (0, 0);
    while i < layout::SEGMENT.len() {
        assert!(layout::SEGMENT[i].0 == at, "fields of the segment header follow each other");
        at += layout::SEGMENT[i].1;
        i += 1;
    }
    assert!(at == SEGMENT_HEADER_BYTES);
    assert!(layout::PLACED_SEAL[1].0 + layout::PLACED_SEAL[1].1 == PLACED_SEAL_BYTES);
    assert!(layout::PLACED_SEAL[1].0 == SEAL_BYTES);
};

/// Which journal a segment is of.
pub type GroupId = [u8; 16];

/// The header of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Its number; segments follow each other without a gap, up to the numbers that a thinned one stands for.
    pub number: u32,
    /// The group it belongs to.
    pub group_id: GroupId,
    /// The epoch of its first frame: the one after the newest seal when it was created.
    pub first_epoch: EpochId,
    /// Bytes of the segment before it, which is complete from then on; 0 for the first one.
    pub previous_bytes: u64,
    /// When it was created, microseconds since 1970 on this machine's clock; for people.
    pub created_unix_us: u64,
    /// So many numbers after its own are in it too: files of these numbers are left over from before it was thinned. Below 2^24.
    pub further: u32,
    /// 0: as it was received. Else it was thinned, and this grows with the interval of which one point was kept.
    pub thinned: u8,
}

impl SegmentHeader {
    /// The last number that the segment stands for.
    #[must_use]
    pub fn last(&self) -> u32 {
        self.number.saturating_add(self.further)
    }

    /// Encodes the header.
    #[must_use]
    pub fn encode(&self) -> [u8; SEGMENT_HEADER_BYTES] {
        let mut out = Vec::with_capacity(SEGMENT_HEADER_BYTES);
        out.extend_from_slice(&SEGMENT_MAGIC);
        out.extend_from_slice(&1_u32.to_le_bytes());
        out.extend_from_slice(&self.number.to_le_bytes());
        out.extend_from_slice(&self.group_id);
        out.extend_from_slice(&self.first_epoch.0.to_le_bytes());
        out.extend_from_slice(&self.previous_bytes.to_le_bytes());
        out.extend_from_slice(&self.created_unix_us.to_le_bytes());
        let [a, b, c, _] = self.further.to_le_bytes();
        out.extend_from_slice(&[a, b, c, self.thinned]);
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        let mut fixed = [0; SEGMENT_HEADER_BYTES];
        fixed.copy_from_slice(&out);
        fixed
    }

    /// Decodes a header and checks its checksum.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let what = "segment header";
        let mut r = Reader::new(what, bytes);
        r.magic(SEGMENT_MAGIC)?;
        let version = r.u32()?;
        let header = Self {
            number: r.u32()?,
            group_id: r.array()?,
            first_epoch: EpochId(r.u64()?),
            previous_bytes: r.u64()?,
            created_unix_us: r.u64()?,
            further: 0,
            thinned: 0,
        };
        let [a, b, c, thinned] = r.array()?;
        let header = Self { further: u32::from_le_bytes([a, b, c, 0]), thinned, ..header };
        let stored = r.u32()?;
        r.expect_end()?;
        check_crc(what, stored, bytes.get(..SEGMENT_HEADER_BYTES - 4).unwrap_or_default())?;
        if version != 1 {
            return Err(DecodeError::Unknown { what: "segment version", value: version.into() });
        }
        if header.further > 0 && (header.thinned == 0 || header.number.checked_add(header.further).is_none()) {
            return Err(DecodeError::Rule { what, rule: "only a thinned segment stands for others" });
        }
        Ok(header)
    }
}

/// The checksum that ties a seal to its place: group, segment, offset. Guest data that looks like a seal, by accident or by
/// intent, or a seal of another journal does not have it: the group's identity is random and never leaves the receiver.
fn place_crc(group_id: &GroupId, segment: u32, offset: u64, seal: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(group_id);
    hasher.update(&segment.to_le_bytes());
    hasher.update(&offset.to_le_bytes());
    hasher.update(seal);
    hasher.finalize()
}

/// Encodes a seal for its place in the journal.
#[must_use]
pub(crate) fn encode_placed_seal(group_id: &GroupId, segment: u32, offset: u64, seal: &Seal) -> [u8; PLACED_SEAL_BYTES] {
    let mut out = [0; PLACED_SEAL_BYTES];
    let (record, place) = out.split_at_mut(SEAL_BYTES);
    record.copy_from_slice(&seal.encode());
    place.copy_from_slice(&place_crc(group_id, segment, offset, record).to_le_bytes());
    out
}

/// Decodes a seal at its place in the journal.
///
/// # Errors
/// [`DecodeError`].
pub(crate) fn decode_placed_seal(group_id: &GroupId, segment: u32, offset: u64, bytes: &[u8]) -> Result<Seal, DecodeError> {
    let mut r = Reader::new("seal in the journal", bytes);
    let record = r.bytes(SEAL_BYTES)?;
    let stored = r.u32()?;
    r.expect_end()?;
    let seal = Seal::decode(record)?;
    let computed = place_crc(group_id, segment, offset, record);
    if stored == computed { Ok(seal) } else { Err(DecodeError::Checksum { what: "place of a seal", stored, computed }) }
}

/// The file of segment `number`.
#[must_use]
pub fn segment_path(folder: &Path, number: u32) -> PathBuf {
    folder.join(format!("{number:010}.seg"))
}

/// The segment numbers in a folder, in order. Other files are left alone.
pub(crate) fn list_segments(folder: &Path) -> std::io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name();
        let Some(stem) = name.to_str().and_then(|n| n.strip_suffix(".seg")) else { continue };
        if stem.len() == 10
            && stem.bytes().all(|b| b.is_ascii_digit())
            && let Ok(number) = stem.parse()
        {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// The file in which a thinned segment is built.
pub(crate) fn building_path(folder: &Path, number: u32) -> PathBuf {
    folder.join(format!("{number:010}.{BUILDING}"))
}

const BUILDING: &str = "thin";

/// A segment that the journal consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) number: u32,
    /// The last number that it stands for.
    pub(crate) last: u32,
    pub(crate) bytes: u64,
    /// As in its header, or what it was looked at for and left as it is.
    pub(crate) thinned: u8,
}

/// What is in a journal's folder.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    /// In order.
    pub(crate) live: Vec<Segment>,
    /// Left over: segments that a thinned one stands for, and what was being built.
    pub(crate) dead: Vec<PathBuf>,
    /// Why a header could not be read. Its segment is listed as one that stands for itself.
    unread: Option<std::io::Error>,
}

impl Listing {
    /// The listing, if every header was read.
    pub(crate) fn whole(self) -> std::io::Result<Self> {
        match self.unread {
            Some(error) => Err(error),
            None => Ok(self),
        }
    }
}

/// Lists a journal from segment `first` on. A segment whose header is not whole stands for itself: whoever reads it, says so.
pub(crate) fn list_journal(folder: &Path, first: u32) -> std::io::Result<Listing> {
    let mut listing = Listing::default();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == BUILDING) {
            listing.dead.push(path);
        }
    }
    for number in list_segments(folder)?.into_iter().filter(|n| *n >= first) {
        let path = segment_path(folder, number);
        if listing.live.last().is_some_and(|before: &Segment| number <= before.last) {
            listing.dead.push(path);
            continue;
        }
        let read = || -> std::io::Result<(Option<SegmentHeader>, u64)> {
            let file = File::open(&path)?;
            Ok((read_header(&file)?.filter(|header| header.number == number), file.metadata()?.len()))
        };
        let (header, bytes) = match read() {
            Ok(found) => found,
            // Cut off with an epoch that was given up.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => {
                listing.unread.get_or_insert(error);
                (None, 0)
            }
        };
        let (last, thinned) = header.map_or((number, 0), |header| (header.last(), header.thinned));
        listing.live.push(Segment { number, last, bytes, thinned });
    }
    Ok(listing)
}

/// The header of a segment's file, if it is whole.
pub(super) fn read_header(file: &File) -> std::io::Result<Option<SegmentHeader>> {
    let mut head = [0; SEGMENT_HEADER_BYTES];
    let n = crate::disk::read_up_to(file, &mut head, 0)?;
    Ok(SegmentHeader::decode(head.get(..n).unwrap_or_default()).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::Generation;

    /// Golden bytes of version 1: a change here is a change of the format.
    #[test]
    fn golden_header_and_flipped_bits() {
        let header = SegmentHeader {
            number: 3,
            group_id: [9; 16],
            first_epoch: EpochId(5),
            previous_bytes: 1000,
            created_unix_us: 1,
            further: 0x0003_0201,
            thinned: 9,
        };
        let bytes = header.encode();
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex.get(..120).unwrap(),
            "54574a53454730310100000003000000090909090909090909090909090909090500000000000000e803000000000000010000000000000001020309"
        );
        assert_eq!(SegmentHeader::decode(&bytes).unwrap(), header);
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(SegmentHeader::decode(&bad).is_err(), "bit {bit}");
        }
        for (further, thinned, fits) in [(0, 0, true), (0, 1, true), (1, 1, true), (1, 0, false)] {
            let bytes = SegmentHeader { further, thinned, ..header }.encode();
            assert_eq!(SegmentHeader::decode(&bytes).is_ok(), fits, "{further} {thinned}");
        }
        let beyond = SegmentHeader { number: u32::MAX, further: 1, ..header };
        assert!(SegmentHeader::decode(&beyond.encode()).is_err());
    }

    /// Would catch a seal that is believed in another place or another group's journal.
    #[test]
    fn a_seal_is_believed_in_its_own_place_only() {
        let seal = Seal {
            passes: 1,
            epoch: EpochId(1),
            generation: Generation(1),
            cut_unix_us: 1,
            frames: 1,
            frame_bytes: 1,
            data_blocks: 1,
            zero_blocks: 0,
            first_write_unix_us: 0,
            session: proto::SessionToken::default(),
            digest: [1; 32],
        };
        let bytes = encode_placed_seal(&[1; 16], 2, 64, &seal);
        assert_eq!(decode_placed_seal(&[1; 16], 2, 64, &bytes).unwrap(), seal);
        for (id, segment, offset) in [([2; 16], 2, 64), ([1; 16], 3, 64), ([1; 16], 2, 65)] {
            assert!(decode_placed_seal(&id, segment, offset, &bytes).is_err());
        }
    }
}
