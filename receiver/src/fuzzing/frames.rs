//! A stream of good, mended and broken frames, decoded at once and by the [`Assembler`] in pieces: however it is cut, the same frames come
//! out and the same error.

use proto::codec::DecodeError;
use proto::frame::{EXTENT_BYTES, FRAME_CONTENT_BYTES_MAX, FRAME_EXTENTS_MAX, FRAME_HEADER_BYTES, FRAME_MAGIC};
use proto::frame::{encode_data, encode_zero};
use proto::fuzzing::Choices;
use proto::{BLOCK_BYTES, BlockExtent, BlockIndex, Codec, EpochId, Frame, FrameHeader, FrameKind, VolumeIndex};

use super::mend;
use crate::batch::{Assembler, BATCH_BYTES};

/// Blocks of the volumes: a small one and the largest.
const VOLUME_BLOCKS: [u64; 2] = [64, 1 << 32];
/// A stream is not made longer than this by far.
const STREAM_BYTES: usize = BATCH_BYTES * 2;

#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    bytes: Vec<u8>,
    /// Bytes, volume and number of extents of each frame.
    frames: Vec<(u32, VolumeIndex, u16)>,
    extents: Vec<BlockExtent>,
    end: Result<(), DecodeError>,
}

/// Frames in a stream cut into pieces.
pub fn frames(data: &[u8]) {
    let mut choices = Choices::new(data);
    let cuts: Vec<(usize, bool)> =
        (0..1 + choices.below(16)).map(|_| choices.u16()).map(|cut| (1 + usize::from(cut >> 1), cut & 1 == 1)).collect();
    let mut stream = Vec::new();
    while !choices.is_empty() && stream.len() < STREAM_BYTES {
        extend(&mut stream, &mut choices);
    }
    assert_eq!(in_pieces(&stream, &cuts), at_once(&stream));
}

/// The session's rule, as far as frames need it.
fn admit(header: &FrameHeader) -> Result<u64, DecodeError> {
    let unknown = DecodeError::Unknown { what: "frame volume", value: header.volume.0.into() };
    VOLUME_BLOCKS.get(usize::from(header.volume.0)).copied().ok_or(unknown)
}

fn at_once(stream: &[u8]) -> Outcome {
    let mut found = Outcome { bytes: Vec::new(), frames: Vec::new(), extents: Vec::new(), end: Ok(()) };
    found.end = decode_all(stream, &mut found);
    found
}

fn decode_all(mut left: &[u8], found: &mut Outcome) -> Result<(), DecodeError> {
    let short = |needed, left: &[u8]| DecodeError::Truncated { what: "frame at the end of a pass", needed, left: left.len() };
    while !left.is_empty() {
        let head = left.first_chunk::<FRAME_HEADER_BYTES>().ok_or_else(|| short(FRAME_HEADER_BYTES, left))?;
        let header = FrameHeader::decode(head)?;
        assert_eq!(header.encode(), *head, "one encoding for one header");
        let blocks = admit(&header)?;
        let (bytes, rest) = left.split_at_checked(header.frame_bytes()).ok_or_else(|| short(header.frame_bytes(), left))?;
        let frame = Frame::decode(bytes, blocks)?;
        check(&frame, blocks);
        found.bytes.extend_from_slice(bytes);
        found.frames.push((bytes.len() as u32, header.volume, header.extents));
        found.extents.extend_from_slice(&frame.extents);
        left = rest;
    }
    Ok(())
}

/// What holds for every frame that decodes.
fn check(frame: &Frame<'_>, volume_blocks: u64) {
    assert!((1..=FRAME_EXTENTS_MAX).contains(&frame.extents.len()) && frame.extents.len() == usize::from(frame.header.extents));
    let (mut end, mut blocks) = (0, 0);
    for extent in &frame.extents {
        assert!(extent.blocks > 0 && extent.start.0 >= end && extent.end() <= volume_blocks);
        assert!(extent.start.offset().is_some());
        end = extent.end();
        blocks += u64::from(extent.blocks);
    }
    match (frame.header.kind, frame.content()) {
        (FrameKind::Zero, content) => assert_eq!(content, Ok(Vec::new())),
        (FrameKind::Data, Ok(content)) => {
            assert!(content.len() as u64 == blocks * BLOCK_BYTES && content.len() <= FRAME_CONTENT_BYTES_MAX);
        }
        (FrameKind::Data, Err(_)) => assert_eq!(frame.header.codec, Codec::Lz4, "a raw payload is its content"),
    }
}

fn in_pieces(stream: &[u8], cuts: &[(usize, bool)]) -> Outcome {
    let mut found = Outcome { bytes: Vec::new(), frames: Vec::new(), extents: Vec::new(), end: Ok(()) };
    let (mut assembler, mut blocks_told) = (Assembler::default(), 0);
    let mut left = stream;
    for (cut, take) in cuts.iter().cycle() {
        if left.is_empty() {
            break;
        }
        let (now, later) = left.split_at((*cut).min(left.len()));
        left = later;
        let pushed = assembler.push(now, &mut admit, &mut |arrived| blocks_told += arrived.blocks);
        if *take || assembler.is_ready() || pushed.is_err() {
            collect(&mut assembler, &mut found);
        }
        if pushed.is_err() {
            found.end = pushed;
            break;
        }
    }
    collect(&mut assembler, &mut found);
    if found.end.is_ok() {
        found.end = assembler.end();
    }
    assert_eq!(found.extents.iter().map(|e| u64::from(e.blocks)).sum::<u64>(), blocks_told);
    found
}

fn collect(assembler: &mut Assembler, found: &mut Outcome) {
    let Some(batch) = assembler.take() else { return };
    assert_eq!(batch.bytes.len(), batch.frames.iter().map(|f| f.bytes as usize).sum::<usize>());
    assert_eq!(batch.extents.len(), batch.frames.iter().map(|f| usize::from(f.extents)).sum::<usize>());
    found.bytes.extend(batch.bytes);
    found.frames.extend(batch.frames.iter().map(|f| (f.bytes, f.volume, f.extents)));
    found.extents.extend(batch.extents);
}

/// Appends what the input chooses: a frame of our own making, one of the input's making with good checksums, or plain bytes.
fn extend(stream: &mut Vec<u8>, choices: &mut Choices<'_>) {
    let volume = VolumeIndex(choices.u8().into());
    let epoch = EpochId(choices.u8().into());
    match choices.below(4) {
        0 => {
            let extents = rising(choices);
            stream.extend(altered(encode_zero(volume, epoch, 0, &extents), choices));
        }
        1 => {
            let mut extents = rising(choices);
            extents.iter_mut().for_each(|e| e.blocks = 1 + e.blocks % 4);
            extents.truncate(8);
            let blocks: u64 = extents.iter().map(|e| u64::from(e.blocks)).sum();
            let pattern = choices.bytes(16);
            let content: Vec<u8> =
                (0..blocks * BLOCK_BYTES).map(|i| pattern.get(i as usize % 17).copied().unwrap_or((i >> 9) as u8)).collect();
            let codec = if choices.u8().is_multiple_of(2) { Codec::Raw } else { Codec::Lz4 };
            stream.extend(altered(encode_data(volume, epoch, 0, &extents, &content, codec), choices));
        }
        2 => mended(stream, choices),
        _ => {
            let count = choices.below(256);
            stream.extend_from_slice(choices.bytes(count));
        }
    }
}

fn rising(choices: &mut Choices<'_>) -> Vec<BlockExtent> {
    let (count, mut at) = (1 + choices.below(FRAME_EXTENTS_MAX), 0);
    let one = |_| {
        let start = at + u64::from(choices.u8());
        let blocks = 1 + u32::from(choices.u8());
        at = start + u64::from(blocks);
        BlockExtent { start: BlockIndex(start), blocks }
    };
    (0..count).map(one).collect()
}

/// A good frame with bytes changed that the input chooses, and checksums mended as far as it chooses.
fn altered(mut frame: Vec<u8>, choices: &mut Choices<'_>) -> Vec<u8> {
    let how = choices.u8();
    for _ in 0..how % 4 {
        let end = if how & 4 == 0 { FRAME_HEADER_BYTES } else { frame.len() };
        let at = choices.below(end.min(65_536));
        frame[at] ^= choices.u8();
    }
    let entries = usize::from(u16::from_le_bytes([frame[18], frame[19]]));
    let body_at = (FRAME_HEADER_BYTES + entries * EXTENT_BYTES).min(frame.len());
    if how & 8 != 0 {
        let crc = crc32fast::hash(&frame[body_at..]);
        frame[28..32].copy_from_slice(&crc.to_le_bytes());
    }
    if how & 16 != 0 {
        let crc = crc32fast::hash(&frame[FRAME_HEADER_BYTES..body_at]);
        frame[32..36].copy_from_slice(&crc.to_le_bytes());
    }
    if how & 32 != 0 {
        mend(&mut frame[..FRAME_HEADER_BYTES]);
    }
    frame
}

/// A frame whose fields are the input's and whose checksums are good, so that the rules behind them are reached.
fn mended(stream: &mut Vec<u8>, choices: &mut Choices<'_>) {
    let wrong = choices.u8();
    let mut head: [u8; FRAME_HEADER_BYTES] = choices.array();
    let entries = choices.below(32);
    let table = choices.bytes(entries * EXTENT_BYTES);
    let count = choices.below(4096);
    let payload = choices.bytes(count);
    head[..4].copy_from_slice(&FRAME_MAGIC);
    let mut put = |bit: u8, at: usize, bytes: &[u8]| {
        if wrong & (1 << bit) == 0 {
            head[at..at + bytes.len()].copy_from_slice(bytes);
        }
    };
    put(0, 18, &((table.len() / EXTENT_BYTES) as u16).to_le_bytes());
    put(1, 20, &(payload.len() as u32).to_le_bytes());
    put(2, 28, &crc32fast::hash(payload).to_le_bytes());
    put(3, 32, &crc32fast::hash(table).to_le_bytes());
    put(4, 6, &[wrong >> 7, 0]);
    mend(&mut head);
    stream.extend_from_slice(&head);
    stream.extend_from_slice(table);
    stream.extend_from_slice(payload);
}
