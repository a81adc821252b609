//! The named places of a store's files: where a bit may flip.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use proto::FrameHeader;
use proto::frame::{FRAME_HEADER_BYTES, FRAME_MAGIC};
use proto::seal::SEAL_MAGIC;
use receiver::journal::{FIRST_SEGMENT, PLACED_SEAL_BYTES, SEGMENT_HEADER_BYTES, segment_path};
use receiver::superblock::{FILE_NAME, SLOT_BYTES};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    SuperblockSlot,
    SegmentHeader,
    FrameHeader,
    ExtentTable,
    Payload,
    Seal,
}

/// Bytes of one part.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) part: Part,
    pub(crate) file: PathBuf,
    pub(crate) bytes: Range<u64>,
    /// Seals before it in the journal.
    pub(crate) seals_before: usize,
}

/// All parts of a group's journal up to its last seal, and how many seals there are. What follows was not committed.
pub(crate) fn journal(group: &Path) -> io::Result<(Vec<Span>, usize)> {
    let (mut spans, mut seals) = (Vec::new(), 0);
    for number in FIRST_SEGMENT.. {
        let file = segment_path(&group.join("journal"), number);
        let bytes = match std::fs::read(&file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) => return Err(error),
        };
        let mut at = SEGMENT_HEADER_BYTES;
        let add = |spans: &mut Vec<Span>, part, from: usize, length: usize, seals_before| {
            if length > 0 {
                spans.push(Span { part, file: file.clone(), bytes: from as u64..(from + length) as u64, seals_before });
            }
        };
        add(&mut spans, Part::SegmentHeader, 0, SEGMENT_HEADER_BYTES.min(bytes.len()), seals);
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            if rest.starts_with(&SEAL_MAGIC) && rest.len() >= PLACED_SEAL_BYTES {
                add(&mut spans, Part::Seal, at, PLACED_SEAL_BYTES, seals);
                seals += 1;
                at += PLACED_SEAL_BYTES;
                continue;
            }
            let header = rest.first_chunk::<FRAME_HEADER_BYTES>().filter(|head| head.starts_with(&FRAME_MAGIC));
            let Some(Ok(header)) = header.map(FrameHeader::decode) else { break };
            add(&mut spans, Part::FrameHeader, at, FRAME_HEADER_BYTES, seals);
            add(&mut spans, Part::ExtentTable, at + FRAME_HEADER_BYTES, header.table_bytes(), seals);
            let payload = FRAME_HEADER_BYTES + header.table_bytes();
            add(&mut spans, Part::Payload, at + payload, header.payload_bytes as usize, seals);
            at += header.frame_bytes();
        }
    }
    spans.retain(|span| span.seals_before < seals);
    Ok((spans, seals))
}

/// The slots of a group's superblock.
pub(crate) fn superblock(group: &Path) -> [Span; 2] {
    [0, SLOT_BYTES as u64].map(|first| Span {
        part: Part::SuperblockSlot,
        file: group.join(FILE_NAME),
        bytes: first..first + SLOT_BYTES as u64,
        seals_before: 0,
    })
}
