//! Packs blocks into frames: neighbours and near blocks of a volume together, zeroes as zero extents.

use crate::dirty::DirtyMap;
use crate::frame::{FRAME_CONTENT_BYTES_MAX, FRAME_EXTENTS_MAX, encode_data_with, encode_zero};
use crate::units::{BLOCK_BYTES, BlockExtent, BlockIndex, EpochId, VolumeIndex};

/// Blocks in a data frame at most.
pub const FRAME_BLOCKS: u32 = (FRAME_CONTENT_BYTES_MAX as u64 / BLOCK_BYTES) as u32;

/// A frame that was packed.
#[derive(Clone, Debug)]
pub struct Packed {
    /// The frame.
    pub bytes: Vec<u8>,
    /// Its blocks.
    pub extents: Vec<BlockExtent>,
    /// Blocks of it with content.
    pub data_blocks: u64,
    /// Blocks of it that are zeroes.
    pub zero_blocks: u64,
}

/// The data frame being packed, and the zero runs that wait for theirs.
#[derive(Debug)]
pub struct Packer {
    volume: VolumeIndex,
    extents: Vec<BlockExtent>,
    content: Vec<u8>,
    zeroes: Vec<BlockExtent>,
}

impl Packer {
    /// Nothing yet, of a volume.
    #[must_use]
    pub fn new(volume: VolumeIndex) -> Self {
        Self { volume, extents: Vec::new(), content: Vec::with_capacity(FRAME_CONTENT_BYTES_MAX), zeroes: Vec::new() }
    }

    /// The volume.
    #[must_use]
    pub fn volume(&self) -> VolumeIndex {
        self.volume
    }

    /// Adds a block, which comes after all that were added since the last frame. Whoever adds one asks [`Self::is_full`] then.
    pub fn block(&mut self, block: u64, content: &[u8]) {
        if is_zero(content) {
            return self.zero(BlockExtent { start: BlockIndex(block), blocks: 1 });
        }
        push_block(&mut self.extents, block);
        self.content.extend_from_slice(content);
    }

    /// Adds a run of zeroes.
    pub fn zero(&mut self, run: BlockExtent) {
        match self.zeroes.last_mut() {
            Some(last) if last.end() == run.start.0 && last.blocks.checked_add(run.blocks).is_some() => last.blocks += run.blocks,
            _ => self.zeroes.push(run),
        }
    }

    /// Whether the data frame takes no further block.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.content.len() >= FRAME_CONTENT_BYTES_MAX
    }

    /// Whether there are zero runs for a whole frame.
    #[must_use]
    pub fn has_zeroes(&self) -> bool {
        self.zeroes.len() >= FRAME_EXTENTS_MAX
    }

    /// The data frame, if there is anything in it. `compress` as for [`encode_data_with`].
    pub fn take_data(
        &mut self,
        epoch: EpochId,
        pass: u16,
        compress: impl FnOnce(&[u8], &mut [u8]) -> Option<usize>,
    ) -> Option<Packed> {
        if self.content.is_empty() {
            return None;
        }
        let bytes = encode_data_with(self.volume, epoch, pass, &self.extents, &self.content, compress);
        let data_blocks = self.content.len() as u64 / BLOCK_BYTES;
        self.content.clear();
        Some(Packed { bytes, extents: std::mem::take(&mut self.extents), data_blocks, zero_blocks: 0 })
    }

    /// The frames of the zero runs.
    pub fn take_zeroes(&mut self, epoch: EpochId, pass: u16) -> Vec<Packed> {
        let zeroes = std::mem::take(&mut self.zeroes);
        let frame = |extents: &[BlockExtent]| Packed {
            bytes: encode_zero(self.volume, epoch, pass, extents),
            extents: extents.to_vec(),
            data_blocks: 0,
            zero_blocks: extents.iter().map(|e| u64::from(e.blocks)).sum(),
        };
        zeroes.chunks(FRAME_EXTENTS_MAX).map(frame).collect()
    }
}

/// Blocks of one volume that are to be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The volume.
    pub volume: VolumeIndex,
    /// At most as many blocks as a frame has.
    pub runs: Vec<BlockExtent>,
}

/// Makes the frames of one pass out of all blocks of a group's sets, LZ4 where that helps: says what is to be read, takes what was read in the
/// same order, and gives the frames. Several reads may be under way.
#[derive(Debug)]
pub struct GroupPacker {
    sets: Vec<DirtyMap>,
    epoch: EpochId,
    pass: u16,
    /// Where the next read begins.
    next: (usize, u64),
    packer: Packer,
}

impl GroupPacker {
    /// For sets of the volumes in their order.
    #[must_use]
    pub fn new(sets: Vec<DirtyMap>, epoch: EpochId, pass: u16) -> Self {
        Self { sets, epoch, pass, next: (0, 0), packer: Packer::new(VolumeIndex(0)) }
    }

    /// What is to be read next; `None` once all is.
    pub fn wanted(&mut self) -> Option<Wanted> {
        loop {
            let (volume, at) = self.next;
            let runs = self.sets.get(volume)?.pick(at, FRAME_BLOCKS);
            match runs.last() {
                Some(last) => self.next = (volume, last.end()),
                None => self.next = (volume + 1, 0),
            }
            if !runs.is_empty() {
                // A group has 64 volumes at most.
                return Some(Wanted { volume: VolumeIndex(volume as u16), runs });
            }
        }
    }

    /// Takes the content of a run that was wanted, whole blocks, and adds the frames that are full to `out`.
    pub fn put(&mut self, volume: VolumeIndex, run: BlockExtent, content: &[u8], out: &mut Vec<(VolumeIndex, Packed)>) {
        if volume != self.packer.volume() {
            self.finish(out);
            self.packer = Packer::new(volume);
        }
        for (block, bytes) in (run.start.0..run.end()).zip(content.chunks_exact(BLOCK_BYTES as usize)) {
            self.packer.block(block, bytes);
            if self.packer.is_full() {
                out.extend(self.packer.take_data(self.epoch, self.pass, lz4).map(|packed| (volume, packed)));
            }
        }
        if self.packer.has_zeroes() {
            out.extend(self.packer.take_zeroes(self.epoch, self.pass).into_iter().map(|packed| (volume, packed)));
        }
    }

    /// Adds the frames that are left to `out`.
    pub fn finish(&mut self, out: &mut Vec<(VolumeIndex, Packed)>) {
        let volume = self.packer.volume();
        out.extend(self.packer.take_data(self.epoch, self.pass, lz4).map(|packed| (volume, packed)));
        out.extend(self.packer.take_zeroes(self.epoch, self.pass).into_iter().map(|packed| (volume, packed)));
    }
}

fn lz4(content: &[u8], room: &mut [u8]) -> Option<usize> {
    lz4_flex::block::compress_into(content, room).ok()
}

/// Whether a block is all zeroes.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Most blocks differ from zero in their first bytes; the rest is compared as the compiler vectorises best.
    bytes.iter().take(16).all(|b| *b == 0) && bytes.chunks(64).all(|c| c.iter().fold(0, |a, b| a | b) == 0)
}

/// Appends `block` to runs that are kept in rising order.
pub fn push_block(runs: &mut Vec<BlockExtent>, block: u64) {
    match runs.last_mut() {
        Some(last) if last.end() == block && last.blocks < u32::MAX => last.blocks += 1,
        _ => runs.push(BlockExtent { start: BlockIndex(block), blocks: 1 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Frame;

    /// What goes in comes out, each block once, in frames within their limits.
    #[test]
    fn blocks_come_out_as_they_went_in() {
        let block_bytes = BLOCK_BYTES as usize;
        let content =
            |block: u64| if block.is_multiple_of(3) { vec![0; block_bytes] } else { vec![block as u8 | 1; block_bytes] };
        let (mut packer, mut frames) = (Packer::new(VolumeIndex(4)), Vec::new());
        let compress = |content: &[u8], room: &mut [u8]| lz4_flex::block::compress_into(content, room).ok();
        for block in (0..4000).filter(|b| b % 7 < 5) {
            packer.block(block, &content(block));
            if packer.is_full() {
                frames.extend(packer.take_data(EpochId(5), 2, compress));
            }
            if packer.has_zeroes() {
                frames.extend(packer.take_zeroes(EpochId(5), 2));
            }
        }
        frames.extend(packer.take_data(EpochId(5), 2, compress));
        frames.extend(packer.take_zeroes(EpochId(5), 2));
        let mut seen = DirtyMap::new(4000 * BLOCK_BYTES);
        for packed in frames {
            let frame = Frame::decode(&packed.bytes, 4000).unwrap();
            let (bytes, mut at, mut blocks) = (frame.content().unwrap(), 0, 0);
            for block in frame.extents.iter().flat_map(|e| e.start.0..e.end()) {
                let zeroes = vec![0; block_bytes];
                let found = bytes.get(at..at + block_bytes).unwrap_or(&zeroes);
                assert_eq!(found, content(block), "block {block}");
                at += block_bytes;
                blocks += 1;
                assert!(!seen.contains(block));
                seen.mark(block, 1);
            }
            assert_eq!(packed.data_blocks + packed.zero_blocks, blocks);
        }
        assert_eq!(seen.count(), (0..4000).filter(|b| b % 7 < 5).count() as u64);
    }

    /// Every block of every set comes out once, in frames of its own volume, also where a set is empty.
    #[test]
    fn a_groups_sets_come_out_whole() {
        let mut sets: Vec<DirtyMap> = (0..4).map(|_| DirtyMap::new(3000 * BLOCK_BYTES)).collect();
        for (volume, first, count) in [(0, 5, 70), (0, 2000, 1), (2, 0, 3000), (3, 2999, 1)] {
            sets[volume].mark(first, count);
        }
        let (mut packer, mut frames, mut reads) = (GroupPacker::new(sets.clone(), EpochId(9), 1), Vec::new(), Vec::new());
        while let Some(wanted) = packer.wanted() {
            reads.push(wanted);
        }
        for Wanted { volume, runs } in reads {
            for run in runs {
                let block = |b: u64| vec![if b.is_multiple_of(4) { 0 } else { (b + u64::from(volume.0)) as u8 | 1 }; 4096];
                let content = (run.start.0..run.end()).flat_map(block).collect::<Vec<_>>();
                packer.put(volume, run, &content, &mut frames);
            }
        }
        packer.finish(&mut frames);
        for (volume, packed) in frames {
            let frame = Frame::decode(&packed.bytes, 3000).unwrap();
            assert_eq!((frame.header.volume, frame.header.epoch, frame.header.pass), (volume, EpochId(9), 1));
            for extent in frame.extents {
                assert_eq!(sets[usize::from(volume.0)].clear(extent.start.0, extent.blocks.into()), u64::from(extent.blocks));
            }
        }
        assert!(sets.iter().all(DirtyMap::is_empty));
    }
}
