//! Makes the journal of a stopped receiver longer, in the format of `docs/journal.md`: what half a day of epochs of a second leaves,
//! in half a minute. What it writes goes through the recovery of the receiver that is started on it, which checks all of it.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use proto::frame::{FRAME_HEADER_BYTES, encode_data};
use proto::seal::Tally;
use proto::{BlockExtent, BlockIndex, Codec, EpochId, Generation, Seal, SessionToken, VolumeIndex};
use receiver::journal::{SEGMENT_HEADER_BYTES, SegmentHeader, segment_path};

/// Bytes after which the next segment is begun, as the receiver's.
const SEGMENT_BYTES: u64 = 256 << 20;
const BLOCK: usize = 4096;
/// Blocks that each epoch changes, anywhere on the disk.
pub(crate) const EPOCH_BLOCKS: u64 = 4;

/// The blocks that epoch `epoch` changes on a disk of `blocks`, rising.
pub(crate) fn blocks_of(epoch: u64, blocks: u64) -> Vec<u64> {
    let part = blocks / EPOCH_BLOCKS;
    (0..EPOCH_BLOCKS).map(|i| i * part + mixed(epoch * EPOCH_BLOCKS + i) % part).collect()
}

/// What epoch `epoch` writes into its block `block`; half of it does not compress.
pub(crate) fn content_of(epoch: u64, block: u64) -> Vec<u8> {
    let mut x = mixed(epoch ^ block.rotate_left(32));
    let mut out = Vec::with_capacity(BLOCK);
    while out.len() < BLOCK / 2 {
        x = mixed(x);
        out.extend(x.to_le_bytes());
    }
    out.resize(BLOCK, 1);
    out
}

/// SplitMix64's step.
fn mixed(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Adds `count` epochs of generation 1 after `newest` to the journal in `folder`, of a group of one disk of `blocks`.
pub(crate) fn extend(folder: &Path, newest: u64, count: u64, blocks: u64) -> Result<()> {
    let mut number = 1;
    while segment_path(folder, number + 1).exists() {
        number += 1;
    }
    let last = segment_path(folder, number);
    let found = fs::read(&last).with_context(|| format!("{}: cannot be read", last.display()))?;
    let head = SegmentHeader::decode(found.get(..SEGMENT_HEADER_BYTES).unwrap_or_default()).context("the last segment")?;
    let mut previous_bytes = found.len() as u64;
    let (mut epoch, end) = (newest + 1, newest + count);
    while epoch <= end {
        number += 1;
        let path = segment_path(folder, number);
        let failed = || format!("{}: cannot be written", path.display());
        let mut file = BufWriter::with_capacity(1 << 20, File::create_new(&path).with_context(failed)?);
        let header = SegmentHeader { number, first_epoch: EpochId(epoch), previous_bytes, ..head };
        file.write_all(&header.encode()).with_context(failed)?;
        let mut at = SEGMENT_HEADER_BYTES as u64;
        while epoch <= end && at < SEGMENT_BYTES {
            let bytes = epoch_bytes(epoch, blocks, (&head.group_id, number, at));
            file.write_all(&bytes).with_context(failed)?;
            at += bytes.len() as u64;
            epoch += 1;
        }
        let file = file.into_inner().with_context(failed)?;
        file.sync_all().with_context(failed)?;
        previous_bytes = at;
    }
    Ok(())
}

fn epoch_bytes(epoch: u64, blocks: u64, (group_id, segment, at): (&[u8; 16], u32, u64)) -> Vec<u8> {
    let changed = blocks_of(epoch, blocks);
    let extents: Vec<_> = changed.iter().map(|block| BlockExtent { start: BlockIndex(*block), blocks: 1 }).collect();
    let content: Vec<u8> = changed.iter().flat_map(|block| content_of(epoch, *block)).collect();
    let mut out = encode_data(VolumeIndex(0), EpochId(epoch), 0, &extents, &content, Codec::Lz4);
    let mut tally = Tally::default();
    if let Some(head) = out.first_chunk::<FRAME_HEADER_BYTES>() {
        tally.add(head, out.len(), EPOCH_BLOCKS, 0);
    }
    let cut_unix_us = 1_700_000_000_000_000 + epoch * 1_000_000;
    let seal = Seal {
        passes: 1,
        epoch: EpochId(epoch),
        generation: Generation(1),
        cut_unix_us,
        frames: tally.frames,
        frame_bytes: tally.frame_bytes,
        data_blocks: tally.data_blocks,
        zero_blocks: 0,
        first_write_unix_us: cut_unix_us - 900_000,
        session: SessionToken([7; 16]),
        digest: tally.digest(),
    };
    let offset = at + out.len() as u64;
    let record = seal.encode();
    let mut place = crc32fast::Hasher::new();
    place.update(group_id);
    place.update(&segment.to_le_bytes());
    place.update(&offset.to_le_bytes());
    place.update(&record);
    out.extend(record);
    out.extend(place.finalize().to_le_bytes());
    out
}
