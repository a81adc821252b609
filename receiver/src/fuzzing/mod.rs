//! What the fuzz targets `frames`, `journal` and `superblock` do with their input: damage chosen by it, then the real recovery code,
//! beside an oracle that knows what was written.
//!
//! Called by `fuzz/` and by the replay of the corpus (`tests/corpus.rs`). A broken promise is a panic. `scratch` is a folder that belongs
//! to one caller at a time; what is in it from the last input does not matter.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "panics are what a fuzz target answers with")]

mod frames;
mod journal;
mod superblock;

pub use frames::frames;
pub use journal::journal;
pub use superblock::superblock;

use proto::fuzzing::Choices;

/// Most changes that one input makes to a file.
const CHANGES_MAX: usize = 24;

/// Changes `bytes` somewhere, in one of the ways a disk, a crash or a person does.
fn damage(bytes: &mut Vec<u8>, at: usize, choices: &mut Choices<'_>) {
    let at = at.min(bytes.len());
    let left = bytes.len() - at;
    match choices.below(8) {
        0 if left > 0 => bytes[at] ^= 1 << (choices.u8() % 8),
        1 => {
            let count = choices.below(64).min(left);
            let new = choices.bytes(count);
            bytes[at..at + new.len()].copy_from_slice(new);
        }
        2 => {
            let count = choices.below(16_384).min(left);
            bytes[at..at + count].fill(0);
        }
        3 => bytes.truncate(at),
        4 => {
            let count = choices.below(256);
            bytes.extend_from_slice(choices.bytes(count));
        }
        5 => bytes.resize(bytes.len() + choices.below(16_384), 0),
        6 => {
            // A piece of the same file, over what is here or after the end.
            let from = choices.below(65_536).min(bytes.len());
            let piece = bytes[from..].iter().take(choices.below(9_000)).copied().collect::<Vec<_>>();
            let end = (at + piece.len()).min(bytes.len());
            bytes.splice(at..end, piece);
        }
        7 => drop(bytes.drain(at..at + choices.below(9_000).min(left))),
        _ => {}
    }
}

/// Writes the checksum of everything before the last four bytes into these.
fn mend(covered_and_crc: &mut [u8]) {
    if let Some((covered, crc)) = covered_and_crc.split_last_chunk_mut::<4>() {
        *crc = crc32fast::hash(covered).to_le_bytes();
    }
}
