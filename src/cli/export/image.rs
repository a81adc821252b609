//! What an image file is to the copy: pieces in order, then an end. And the plain one.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// A block of zeroes that is left a hole in a raw image, in bytes.
const HOLE_BYTES: usize = 4096;

/// An image that is written from its beginning to its end.
pub(super) trait Image {
    /// Data of the disk at `offset`; offsets grow, and what is between two pieces reads as zeroes.
    fn write(&mut self, offset: u64, content: &[u8]) -> io::Result<()>;
    /// What has to be written at the end.
    fn finish(self) -> io::Result<()>;
}

/// Whether all of it is zeroes.
pub(super) fn is_zero(content: &[u8]) -> bool {
    let (before, words, after) = (content.len() % 8, content.chunks_exact(8), content.chunks_exact(8).remainder());
    debug_assert_eq!(before, after.len());
    words.map(|w| w.iter().fold(0, |a, b| a | b)).all(|w| w == 0) && after.iter().all(|b| *b == 0)
}

/// A plain sparse image.
#[derive(Debug)]
pub(super) struct Raw(File);

impl Raw {
    pub(super) fn new(file: File, size_bytes: u64) -> io::Result<Self> {
        file.set_len(size_bytes)?;
        Ok(Self(file))
    }
}

impl Image for Raw {
    fn write(&mut self, mut offset: u64, content: &[u8]) -> io::Result<()> {
        let mut rest = content;
        while !rest.is_empty() {
            let zeroes = rest.chunks(HOLE_BYTES).take_while(|block| is_zero(block)).map(<[u8]>::len).sum::<usize>();
            let (_, after) = rest.split_at(zeroes);
            let data = after.chunks(HOLE_BYTES).take_while(|block| !is_zero(block)).map(<[u8]>::len).sum::<usize>();
            let (now, later) = after.split_at(data);
            self.0.write_all_at(now, offset + zeroes as u64)?;
            offset += (zeroes + data) as u64;
            rest = later;
        }
        Ok(())
    }

    fn finish(self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// Would catch zeroes that are written, data that is taken for zeroes, and an end that is cut off.
    #[test]
    fn a_raw_image_is_what_was_written_and_sparse() {
        let size = (1 << 20) + 100;
        let file = tempfile::tempfile().unwrap();
        let mut wanted = vec![0_u8; size];
        let mut image = Raw::new(file.try_clone().unwrap(), size as u64).unwrap();
        let mut piece = vec![0_u8; 200_000];
        piece[4095] = 1;
        piece[8192] = 2;
        piece[199_999] = 3;
        image.write(4096, &piece).unwrap();
        wanted[4096..204_096].copy_from_slice(&piece);
        image.write(1 << 20, &[7; 100]).unwrap();
        wanted[1 << 20..].fill(7);
        image.finish().unwrap();
        let mut found = vec![0; size];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == wanted);
        assert!(file.metadata().unwrap().blocks() * 512 <= 16 * 4096, "sparse");
        for at in 0..17 {
            let mut some = [0; 17];
            assert!(is_zero(&some));
            some[at] = 1;
            assert!(!is_zero(&some), "{at}");
        }
    }
}
