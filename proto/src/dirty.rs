//! Which blocks of a volume changed: one bit a block, a region's 128 bytes allocated when it is first touched.
//!
//! A clean TiB costs 4 KiB, a TiB in which every region was touched 36 MiB.

use bitvec::array::BitArray;
use bitvec::order::Lsb0;

use crate::region::{REGION_BLOCKS, RegionMap};
use crate::units::{BLOCK_BYTES, BlockExtent, BlockIndex, blocks_of};

/// Bytes of the bits of one region.
pub const REGION_BITMAP_BYTES: usize = (REGION_BLOCKS / 8) as usize;

const WORDS: usize = (REGION_BLOCKS / 64) as usize;

#[derive(Clone, Debug, Default)]
struct Region {
    bits: BitArray<[u64; WORDS], Lsb0>,
}

/// A set of blocks of one volume.
#[derive(Clone, Debug)]
pub struct DirtyMap {
    regions: RegionMap<Region>,
    blocks: u64,
    set: u64,
}

impl DirtyMap {
    /// The empty set for a volume of `size_bytes`.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        Self { regions: RegionMap::new(size_bytes), blocks: blocks_of(size_bytes), set: 0 }
    }

    /// All blocks of a volume of `size_bytes`.
    #[must_use]
    pub fn full(size_bytes: u64) -> Self {
        let mut map = Self::new(size_bytes);
        map.mark(0, map.blocks);
        map
    }

    /// Blocks in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.set
    }

    /// Bytes in the set, counting the last block whole.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.set * BLOCK_BYTES
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.set == 0
    }

    /// Adds blocks `first..first + count`; what lies beyond the volume is ignored.
    pub fn mark(&mut self, first: u64, count: u64) {
        self.change(first, count, true);
    }

    /// Removes blocks `first..first + count`. Returns how many were in the set.
    pub fn clear(&mut self, first: u64, count: u64) -> u64 {
        let before = self.set;
        self.change(first, count, false);
        before - self.set
    }

    /// Whether `block` is in the set.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        let bit = (block % REGION_BLOCKS) as usize;
        self.regions.get(block / REGION_BLOCKS).is_some_and(|r| r.bits.get(bit).is_some_and(|b| *b))
    }

    /// Whether any of `first..first + count` is in the set.
    #[must_use]
    pub fn intersects(&self, first: u64, count: u64) -> bool {
        self.set != 0
            && pieces(first, first.saturating_add(count).min(self.blocks))
                .any(|(region, from, to)| self.regions.get(region).is_some_and(|r| r.bits[from..to].any()))
    }

    /// Whether any block of `region` is in the set.
    #[must_use]
    pub fn touches_region(&self, region: u64) -> bool {
        self.set != 0 && self.regions.get(region).is_some_and(|r| r.bits.any())
    }

    /// The bits of `region` as they are stored: bit `i` of the little-endian bytes is block `i` of the region.
    #[must_use]
    pub fn region_bits(&self, region: u64) -> [u8; REGION_BITMAP_BYTES] {
        let mut out = [0; REGION_BITMAP_BYTES];
        if let Some(region) = self.regions.get(region) {
            for (bytes, word) in out.chunks_exact_mut(8).zip(region.bits.data) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
        }
        out
    }

    /// Adds blocks of `region` from bits as [`region_bits`](Self::region_bits) gave them; bits beyond the volume are ignored.
    pub fn mark_bits(&mut self, region: u64, bits: &[u8; REGION_BITMAP_BYTES]) {
        for (i, byte) in bits.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            for bit in (0..8).filter(|bit| byte & (1 << bit) != 0) {
                self.mark(region * REGION_BLOCKS + i as u64 * 8 + bit, 1);
            }
        }
    }

    /// Adds everything that is in `other`, a set of a volume of the same size.
    pub fn merge(&mut self, other: &Self) {
        if self.set == 0 {
            *self = other.clone();
            return;
        }
        for (number, theirs) in other.regions.iter() {
            let ours = self.regions.get_or_default(number);
            let before = ours.bits.count_ones();
            ours.bits |= theirs.bits;
            self.set += (ours.bits.count_ones() - before) as u64;
        }
    }

    /// The first run of the set at or after block `from`, at most `blocks_max` long and within one region.
    #[must_use]
    pub fn next_run(&self, from: u64, blocks_max: u32) -> Option<BlockExtent> {
        if self.set == 0 {
            return None;
        }
        for (number, region) in self.regions.iter_from(from / REGION_BLOCKS) {
            let base = number * REGION_BLOCKS;
            let skip = from.saturating_sub(base) as usize;
            let Some(start) = region.bits[skip..].first_one().map(|i| i + skip) else { continue };
            let tail = &region.bits[start..];
            let run = tail.first_zero().unwrap_or(tail.len());
            let blocks = u32::try_from(run).unwrap_or(u32::MAX).min(blocks_max.max(1));
            return Some(BlockExtent { start: BlockIndex(base + start as u64), blocks });
        }
        None
    }

    /// Runs of the set at or after `from`, together at most `blocks_max` blocks.
    #[must_use]
    pub fn pick(&self, from: u64, blocks_max: u32) -> Vec<BlockExtent> {
        let (mut runs, mut at, mut left) = (Vec::new(), from, blocks_max);
        while left > 0
            && let Some(run) = self.next_run(at, left)
        {
            left -= run.blocks;
            at = run.end();
            runs.push(run);
        }
        runs
    }

    fn change(&mut self, first: u64, count: u64, value: bool) {
        let end = first.saturating_add(count).min(self.blocks);
        for (region, from, to) in pieces(first, end) {
            if !value && self.regions.get(region).is_none() {
                continue;
            }
            let bits = &mut self.regions.get_or_default(region).bits[from..to];
            if to - from == 1 {
                let was = bits.replace(0, value);
                self.set = self.set + u64::from(value) - u64::from(was);
            } else {
                let before = bits.count_ones() as u64;
                bits.fill(value);
                let after = if value { (to - from) as u64 } else { 0 };
                self.set = self.set + after - before;
            }
        }
    }
}

/// Splits `first..end` at region boundaries: (region, first bit, last bit + 1).
fn pieces(first: u64, end: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut at = first;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let region = at / REGION_BLOCKS;
        let stop = ((region + 1) * REGION_BLOCKS).min(end);
        let piece = (region, (at % REGION_BLOCKS) as usize, (stop - region * REGION_BLOCKS) as usize);
        at = stop;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_full_map_ends_with_the_volume() {
        let map = DirtyMap::full(REGION_BLOCKS * BLOCK_BYTES + 1);
        assert_eq!(map.count(), REGION_BLOCKS + 1);
        assert!(!map.contains(REGION_BLOCKS + 1));
    }

    #[test]
    fn the_bits_of_a_region_read_back() {
        let size = (REGION_BLOCKS + 9) * BLOCK_BYTES;
        let (mut map, mut copy) = (DirtyMap::new(size), DirtyMap::new(size));
        map.mark(3, 10);
        map.mark(REGION_BLOCKS + 8, 1);
        for region in 0..2 {
            copy.mark_bits(region, &map.region_bits(region));
        }
        assert_eq!((copy.count(), copy.next_run(0, 99), copy.contains(REGION_BLOCKS + 8)), (11, map.next_run(0, 99), true));
        copy.mark_bits(1, &[0xff; REGION_BITMAP_BYTES]);
        assert_eq!(copy.count(), 10 + 9, "nothing beyond the volume");
    }

    proptest! {
        /// Against a plain set: marks, clears, merges, runs.
        #[test]
        fn behaves_like_a_set(ops in prop::collection::vec((0..3u8, 0..5000u64, 1..1500u64), 1..40)) {
            let size = 5000 * BLOCK_BYTES - 100;
            let (mut map, mut oracle) = (DirtyMap::new(size), BTreeSet::new());
            for (op, first, count) in ops {
                let range = (first..first + count).filter(|b| *b < 5000);
                match op {
                    0 => { map.mark(first, count); oracle.extend(range); }
                    1 => {
                        let gone = map.clear(first, count);
                        let before = oracle.len();
                        for b in range { oracle.remove(&b); }
                        prop_assert_eq!(gone, (before - oracle.len()) as u64);
                    }
                    _ => { let mut o = DirtyMap::new(size); o.mark(first, count); map.merge(&o); oracle.extend(range); }
                }
                prop_assert_eq!(map.count(), oracle.len() as u64);
                prop_assert_eq!(map.intersects(first, count), oracle.range(first..first + count).next().is_some());
            }
            let (mut seen, mut at) = (BTreeSet::new(), 0);
            while let Some(run) = map.next_run(at, 32) {
                prop_assert!(run.blocks <= 32 && run.start.0 >= at);
                seen.extend(run.start.0..run.end());
                at = run.end();
            }
            prop_assert_eq!(seen, oracle);
        }
    }
}
