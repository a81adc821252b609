//! Raw files to measure on.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::os;

const CHUNK: usize = 1 << 20;
const BLOCK: usize = 4096;
/// Bytes of two images compared at once.
const COMPARE_BYTES: usize = 256 << 10;
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

/// Makes `path` with `size` bytes, none of which takes space.
pub(crate) fn sparse(path: &Path, size: u64) -> Result<()> {
    let made = File::create(path).and_then(|f| f.set_len(size));
    made.with_context(|| format!("{}: cannot be made: does the file system hold files of {} GiB?", path.display(), size >> 30))
}

/// Bytes, in blocks of 4 KiB, at which `path` differs from another image, of which `read` gives what lies at an offset. Holes of the file
/// are not looked at: under a load that frees nothing they were never written.
pub(crate) fn differing_bytes(path: &Path, mut read: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<u64> {
    let failed = || format!("{}: cannot be read", path.display());
    let file = File::open(path).with_context(failed)?;
    let size = file.metadata().with_context(failed)?.len();
    let (mut ours, mut theirs) = (vec![0; COMPARE_BYTES], vec![0; COMPARE_BYTES]);
    let (mut at, mut differing) = (0, 0);
    while at < size {
        let data = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => break,
            found => found.with_context(failed)?,
        };
        let hole = rustix::fs::seek(&file, SeekFrom::Hole(data)).with_context(failed)?;
        // The file system's blocks may be smaller.
        let end = hole.next_multiple_of(BLOCK as u64).min(size);
        at = data / BLOCK as u64 * BLOCK as u64;
        while at < end {
            os::check_stop()?;
            let bytes = usize::try_from(end - at).unwrap_or(COMPARE_BYTES).min(COMPARE_BYTES);
            let (ours, theirs) = (&mut ours[..bytes], &mut theirs[..bytes]);
            file.read_exact_at(ours, at).with_context(failed)?;
            read(at, theirs)?;
            let pairs = ours.chunks(BLOCK).zip(theirs.chunks(BLOCK));
            differing += pairs.filter(|(a, b)| a != b).map(|(a, _)| a.len() as u64).sum::<u64>();
            at += bytes as u64;
        }
    }
    Ok(differing)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Would catch a comparison that skips data beside holes, at either end, or that counts bytes instead of blocks.
    #[test]
    fn differing_blocks_are_found_among_holes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let size = 64 * CHUNK as u64;
        sparse(&path, size).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let zero = |_: u64, to: &mut [u8]| {
            to.fill(0);
            Ok(())
        };
        assert_eq!(differing_bytes(&path, zero).unwrap(), 0);
        for at in [0, 33 * CHUNK as u64 + 5, size - 1] {
            file.write_all_at(&[1], at).unwrap();
        }
        file.write_all_at(&[0; BLOCK], 9 * CHUNK as u64).unwrap();
        assert_eq!(differing_bytes(&path, zero).unwrap(), 3 * BLOCK as u64);
        file.write_all_at(&vec![1; 2 * COMPARE_BYTES], 50 * CHUNK as u64).unwrap();
        assert_eq!(differing_bytes(&path, zero).unwrap(), (3 * BLOCK + 2 * COMPARE_BYTES) as u64);
        let same = |at: u64, to: &mut [u8]| Ok(File::open(&path)?.read_exact_at(to, at)?);
        assert_eq!(differing_bytes(&path, same).unwrap(), 0);
    }
}
