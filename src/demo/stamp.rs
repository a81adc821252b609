//! What the demo writes: a block that says who wrote it, where, as which of its writes, and proves with a checksum that it is
//! whole. Half of the filling is random and half repeats, so that compression has something to show and nothing to boast of.

use proto::BLOCK_BYTES;

/// Bytes of a block.
pub(super) const BLOCK: usize = BLOCK_BYTES as usize;
const MAGIC: [u8; 8] = *b"TWSTAMP1";
/// Magic, run, block, writer, sequence.
const HEAD_BYTES: usize = 40;
const RANDOM_BYTES: usize = 2040;
const TEXT: &[u8] = b"every acknowledged write up to the point is in the copy; ";

/// Who wrote a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    /// Tells this run from blocks that an earlier one left in the image.
    pub(super) run: u64,
    /// Where it was written.
    pub(super) block: u64,
    /// Which writer.
    pub(super) writer: u64,
    /// Which of its writes.
    pub(super) sequence: u64,
}

/// What a block of the copy holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Whole, of this run.
    Stamped(Stamp),
    /// Starts as a block of this run and is not whole.
    Torn,
    /// Anything else.
    Other,
}

impl Stamp {
    /// Fills `block`.
    pub(super) fn write(self, block: &mut [u8; BLOCK]) {
        let (head, rest) = block.split_at_mut(HEAD_BYTES);
        for (field, value) in
            head.chunks_exact_mut(8).zip([u64::from_le_bytes(MAGIC), self.run, self.block, self.writer, self.sequence])
        {
            field.copy_from_slice(&value.to_le_bytes());
        }
        let (random, text) = rest.split_at_mut(RANDOM_BYTES);
        let mut state = self.run ^ (self.block << 32) ^ (self.writer << 24) ^ self.sequence;
        for word in random.chunks_exact_mut(8) {
            word.copy_from_slice(&mix(&mut state).to_le_bytes());
        }
        for piece in text.chunks_mut(TEXT.len()) {
            piece.copy_from_slice(TEXT.get(..piece.len()).unwrap_or_default());
        }
        let (body, tail) = block.split_at_mut(BLOCK - 4);
        tail.copy_from_slice(&crc32fast::hash(body).to_le_bytes());
    }

    /// What `block` holds, in the eyes of `run`.
    pub(super) fn read(block: &[u8], run: u64) -> Content {
        let mut fields = block.chunks_exact(8).map(|b| b.try_into().map_or(0, u64::from_le_bytes));
        let mut next = || fields.next().unwrap_or_default();
        if next().to_le_bytes() != MAGIC || next() != run {
            return Content::Other;
        }
        let stamp = Self { run, block: next(), writer: next(), sequence: next() };
        let Some((body, tail)) = block.split_last_chunk::<4>() else { return Content::Torn };
        if crc32fast::hash(body) == u32::from_le_bytes(*tail) { Content::Stamped(stamp) } else { Content::Torn }
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
pub(super) fn mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_reads_back_and_damage_is_noticed() {
        let stamp = Stamp { run: 7, block: 3, writer: 1, sequence: 99 };
        let mut block = [0; BLOCK];
        stamp.write(&mut block);
        assert_eq!(Stamp::read(&block, 7), Content::Stamped(stamp));
        assert_eq!(Stamp::read(&block, 8), Content::Other);
        assert_eq!(Stamp::read(&[0; BLOCK], 7), Content::Other);
        for at in [16, 100, BLOCK - 1] {
            let mut torn = block;
            torn[at] ^= 1;
            assert_eq!(Stamp::read(&torn, 7), Content::Torn, "{at}");
        }
    }
}
