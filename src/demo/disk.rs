//! The demo's disk: a copy of the user's image, or a small one of its own with something on it.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, bail};
use rustix::fs::{SeekFrom, seek, statvfs};

use super::stamp::mix;

/// Size of the disk if none is given, in bytes.
const SIZE: u64 = 256 << 20;
/// Of these, bytes that are not zero at the start.
const FILLED: u64 = 64 << 20;
/// What a run may need for each allocated byte of the image: the disk, the copy's base and journal.
const SPACE_FACTOR: u64 = 3;
/// Room for the load's own epochs, in bytes.
const SPACE_EXTRA: u64 = 512 << 20;
const PIECE: usize = 1 << 20;

/// Refuses to start what would fill the file system.
pub(super) fn check_space(folder: &Path, image: Option<&Path>) -> anyhow::Result<()> {
    let allocated = match image {
        Some(path) => {
            let found = std::fs::metadata(path).with_context(|| format!("{}: cannot read the image", path.display()))?;
            if !found.is_file() || found.len() < PIECE as u64 {
                bail!("{}: not a disk image: give a raw file of at least 1 MiB", path.display());
            }
            found.blocks() * 512
        }
        None => FILLED,
    };
    let space = statvfs(folder).with_context(|| format!("{}: cannot find the free space", folder.display()))?;
    let (free, needed) = (space.f_bavail * space.f_frsize, allocated * SPACE_FACTOR + SPACE_EXTRA);
    if free < needed {
        let human = crate::cli::human::bytes;
        bail!("{}: {} free, the demo may need {}: name another folder with --dir", folder.display(), human(free), human(needed));
    }
    Ok(())
}

/// Makes a disk with something on it.
pub(super) fn make(path: &Path) -> io::Result<()> {
    let mut file = File::create(path)?;
    let mut state = 1;
    let mut piece = vec![0; PIECE];
    for _ in 0..FILLED / PIECE as u64 {
        // Half random, half text, in turns of 64 bytes: like a disk, neither empty nor noise.
        for (i, part) in piece.chunks_exact_mut(64).enumerate() {
            match i % 2 {
                0 => part.chunks_exact_mut(8).for_each(|w| w.copy_from_slice(&mix(&mut state).to_le_bytes())),
                _ => part.copy_from_slice(b"a server's disk, before the disaster ...........................\n".split_at(64).0),
            }
        }
        file.write_all(&piece)?;
    }
    file.set_len(SIZE)
}

/// Copies a raw image, holes as holes.
pub(super) fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let (source, target) = (File::open(from)?, File::create(to)?);
    let size = source.metadata()?.len();
    target.set_len(size)?;
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < size {
        let start = match seek(&source, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(&source, SeekFrom::Hole(start))?;
        at = start;
        while at < end {
            let length = PIECE.min(usize::try_from(end - at).unwrap_or(PIECE));
            let Some(piece) = piece.get_mut(..length) else { break };
            source.read_exact_at(piece, at)?;
            target.write_all_at(piece, at)?;
            at += length as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_the_same_and_stays_sparse() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("a"), folder.path().join("b"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"begin", 3).unwrap();
        file.write_all_at(&vec![9; 3 << 20], 20 << 20).unwrap();
        copy(&from, &to).unwrap();
        assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
        assert!(std::fs::metadata(&to).unwrap().blocks() * 512 < 16 << 20);
    }
}
