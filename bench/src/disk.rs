//! Raw files to measure on.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

use crate::os;

const CHUNK: usize = 1 << 20;
const BLOCK: usize = 4096;
const TEXT: &[u8] = b"Twinsite keeps a live, consistent copy of a server's disks at a second site. ";

/// What a disk is filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Nothing compresses it.
    Random,
    /// Every 4 KiB block is half random, half the same text: LZ4 halves it.
    Half,
}

impl Content {
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Random => "random data",
            Self::Half => "data that compresses to about half",
        }
    }
}

/// Makes `path` with `size` bytes of random data, so that every block is allocated, written (no unwritten extents) and in the
/// page cache.
pub(crate) fn filled(path: &Path, size: u64) -> Result<()> {
    fill(path, size, Content::Random)
}

/// Makes `path` with `size` bytes of `content`, on stable storage and in the page cache.
pub(crate) fn fill(path: &Path, size: u64, content: Content) -> Result<()> {
    let failed = || format!("{}: cannot be filled: is there {} MiB of space?", path.display(), size >> 20);
    let mut file = File::create(path).with_context(failed)?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut chunk = vec![0_u8; CHUNK];
    let mut left = size;
    while left > 0 {
        os::check_stop()?;
        match content {
            Content::Random => noise(&mut state, &mut chunk),
            Content::Half => {
                for block in chunk.chunks_exact_mut(BLOCK) {
                    let (random, text) = block.split_at_mut(BLOCK / 2);
                    noise(&mut state, random);
                    text.iter_mut().zip(TEXT.iter().cycle()).for_each(|(to, from)| *to = *from);
                }
            }
        }
        let take = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        file.write_all(chunk.get(..take).unwrap_or_default()).with_context(failed)?;
        left -= take as u64;
    }
    file.sync_all().with_context(failed)
}

/// Marsaglia's xorshift64: fast, and nothing compresses it.
fn noise(state: &mut u64, out: &mut [u8]) {
    for word in out.chunks_exact_mut(8) {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}
