//! Which compressor a frame gets, and whether trying is worth it.
//!
//! Owns what the frames so far taught about the pass's content. Always holds: a frame decodes to the same content whatever is
//! chosen; content that compresses is found again within [`RETRY_FRAMES`] frames.

use proto::Codec;
use proto::units::BLOCK_BYTES;

/// Level of LZ4's high compression. On the blocks that pgbench dirties, in 128 KiB frames: fast 77.7 % saved, level 3 80.5 %,
/// level 6 80.6 % at half the speed.
const THOROUGH_LEVEL: i32 = 3;
/// A frame, or a block of a sample, that saves less than one part in so many is not worth the time that it takes, here and at every later
/// reading.
const SAVES_AT_LEAST: usize = 32;
/// After a frame that saved nothing, the next are tried by a sample of blocks; every so many, a frame is tried whole.
const RETRY_FRAMES: u32 = 16;
/// Every so many blocks of a frame one is in the sample.
const SAMPLE_EVERY_BLOCKS: usize = 16;

/// The compressor of one pass after another.
#[derive(Debug)]
pub(crate) struct Compressor {
    codec: Codec,
    /// High compression: there is time for it.
    pub(crate) thorough: bool,
    /// Frames since one was tried whole; `None` while content compresses.
    sampled: Option<u32>,
    /// The block that samples begin with moves on, so that a pattern in the content cannot hide.
    turn: usize,
    scratch: Vec<u8>,
}

impl Compressor {
    pub(crate) fn new(codec: Codec) -> Self {
        Self { codec, thorough: false, sampled: None, turn: 0, scratch: Vec::new() }
    }

    /// Compresses `content` into `room`; `None` if it is to be stored as it is.
    pub(crate) fn compress(&mut self, content: &[u8], room: &mut [u8]) -> Option<usize> {
        if self.codec == Codec::Raw {
            return None;
        }
        if let Some(frames) = self.sampled
            && frames < RETRY_FRAMES
            && !self.sample_shrinks(content)
        {
            self.sampled = Some(frames + 1);
            return None;
        }
        let packed = self.pack(content, room).filter(|n| shrinks(*n, content.len()));
        self.sampled = if packed.is_some() { None } else { Some(0) };
        packed
    }

    fn sample_shrinks(&mut self, content: &[u8]) -> bool {
        self.turn = (self.turn + 1) % SAMPLE_EVERY_BLOCKS;
        let block_bytes = BLOCK_BYTES as usize;
        self.scratch.resize(lz4_flex::block::get_maximum_output_size(block_bytes), 0);
        let blocks = content.chunks_exact(block_bytes);
        let first = self.turn % blocks.len().max(1);
        let mut sample = blocks.skip(first).step_by(SAMPLE_EVERY_BLOCKS);
        sample.any(|block| lz4_flex::block::compress_into(block, &mut self.scratch).is_ok_and(|n| shrinks(n, block_bytes)))
    }

    fn pack(&self, content: &[u8], room: &mut [u8]) -> Option<usize> {
        if self.thorough {
            let mode = lz4::block::CompressionMode::HIGHCOMPRESSION(THOROUGH_LEVEL);
            return lz4::block::compress_to_buffer(content, Some(mode), false, room).ok();
        }
        lz4_flex::block::compress_into(content, room).ok()
    }
}

fn shrinks(packed_bytes: usize, content_bytes: usize) -> bool {
    packed_bytes <= content_bytes - content_bytes / SAVES_AT_LEAST
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME_BYTES: usize = 128 << 10;

    fn noise(seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        (0..FRAME_BYTES)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
            .collect()
    }

    fn room() -> Vec<u8> {
        vec![0; lz4_flex::block::get_maximum_output_size(FRAME_BYTES)]
    }

    #[test]
    fn noise_is_sampled_and_text_is_found_at_once() {
        let mut compressor = Compressor::new(Codec::Lz4);
        for seed in 0..40 {
            assert_eq!(compressor.compress(&noise(seed), &mut room()), None);
        }
        assert!(compressor.sampled.is_some());
        let text = b"a row of the table; ".repeat(FRAME_BYTES / 20 + 1);
        assert!(compressor.compress(&text[..FRAME_BYTES], &mut room()).is_some_and(|n| n < FRAME_BYTES / 10));
        assert_eq!(compressor.sampled, None);
    }

    /// What a sample misses is found by the frames that are tried whole.
    #[test]
    fn a_block_that_compresses_is_found_among_noise() {
        let mut compressor = Compressor::new(Codec::Lz4);
        let mut found = 0;
        for seed in 0..64 {
            let mut content = noise(seed);
            content[5 * 4096..7 * 4096].fill(7);
            let mut room = room();
            if let Some(n) = compressor.compress(&content, &mut room) {
                assert_eq!(lz4_flex::block::decompress(&room[..n], FRAME_BYTES).unwrap(), content);
                found += 1;
            }
        }
        assert_eq!(found, 64, "a frame that saved something is followed by one that is tried whole");
        for seed in 0..3 {
            compressor.compress(&noise(seed), &mut room());
        }
        let mut content = noise(9);
        content[5 * 4096..7 * 4096].fill(7);
        let tries = (0..=RETRY_FRAMES).filter(|_| compressor.compress(&content, &mut room()).is_some()).count();
        assert!(tries > 0, "not found within {RETRY_FRAMES} frames");
    }

    #[test]
    fn raw_stays_raw() {
        assert_eq!(Compressor::new(Codec::Raw).compress(&[0; FRAME_BYTES], &mut room()), None);
    }
}
