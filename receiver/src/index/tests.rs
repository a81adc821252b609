use super::*;
use proptest::prelude::*;
use proto::units::{BLOCK_BYTES, BlockIndex};
use std::collections::BTreeMap;

const BLOCKS: u64 = 3000;

fn check(map: &VolumeIndexMap, oracle: &BTreeMap<u64, FrameId>) {
    let mut at = 0;
    while at < BLOCKS {
        let (place, run) = map.find(at, BLOCKS - at);
        assert!(run >= 1);
        for block in at..at + run {
            let expected = match oracle.get(&block) {
                None => Place::Base,
                Some(&FrameId::ZERO) => Place::Zero,
                Some(frame) => Place::Frame(*frame),
            };
            assert_eq!(place, expected, "block {block}");
        }
        at += run;
    }
}

proptest! {
    /// Against a plain map of blocks, with snapshots taken on the way that must stay as they were.
    #[test]
    fn behaves_like_a_map_of_blocks(
        ops in prop::collection::vec((0..BLOCKS, prop_oneof![1..4u32, 1..2000u32], prop::bool::weighted(0.3)), 1..60)
    ) {
        let (mut map, mut oracle) = (VolumeIndexMap::new(BLOCKS * BLOCK_BYTES - 5, false), BTreeMap::new());
        let mut snapshots = Vec::new();
        for (i, (start, blocks, zero)) in ops.into_iter().enumerate() {
            let frame = if zero { FrameId::ZERO } else { FrameId(i as u32) };
            map.put(BlockExtent { start: BlockIndex(start), blocks }, frame);
            oracle.extend((start..(start + u64::from(blocks)).min(BLOCKS)).map(|b| (b, frame)));
            if i % 7 == 0 {
                snapshots.push((map.clone(), oracle.clone()));
            }
        }
        check(&map, &oracle);
        for (map, oracle) in &snapshots {
            check(map, oracle);
        }
        let counted: usize = map.regions.iter().map(|(_, r)| r.runs.len()).sum();
        prop_assert_eq!(map.runs, counted as u64);
        for (_, region) in map.regions.iter() {
            prop_assert!(region.runs.windows(2).all(|w| w[0].end() <= w[1].start));
            prop_assert!(region.runs.windows(2).all(|w| w[0].frame != FrameId::ZERO
                || w[1].frame != FrameId::ZERO || w[0].end() < w[1].start), "zeroes join");
        }
    }
}

#[test]
fn frames_are_found_and_forgotten() {
    let mut table = FrameTable::default();
    for (segment, offset) in [(1, 64), (1, 5000), (3, 64)] {
        table.push(segment, offset);
    }
    assert_eq!(table.get(FrameId(0)), Some(FramePlace { segment: 1, offset: 64, bytes_max: 4936 }));
    assert_eq!(table.get(FrameId(2)).unwrap().segment, 3);
    assert_eq!(table.get(FrameId(3)), None);
    table.truncate(1);
    assert_eq!((table.next(), table.get(FrameId(1))), (Some(FrameId(1)), None));
    table.push(4, 70);
    assert_eq!(table.get(FrameId(1)).map(|p| (p.segment, p.offset)), Some((4, 70)));
}

/// An empty TiB is scanned in one step.
#[test]
fn the_base_is_one_run_over_untouched_regions() {
    let mut map = VolumeIndexMap::new(1 << 40, false);
    let blocks = (1_u64 << 40) / BLOCK_BYTES;
    assert_eq!(map.find(0, blocks), (Place::Base, blocks));
    map.put(BlockExtent { start: BlockIndex(5000), blocks: 1 }, FrameId(1));
    assert_eq!(map.find(3, blocks - 3), (Place::Base, 4096 - 3));
    assert_eq!(map.find(4096, blocks - 4096), (Place::Base, 904));
}

/// Would catch a peer that fills memory with zeroes over nothing: 16 TiB of them are 4 million regions.
#[test]
fn zeroes_over_an_empty_base_cost_nothing() {
    let mut map = VolumeIndexMap::new(1 << 44, true);
    let blocks = (1_u64 << 44) / BLOCK_BYTES;
    let all = BlockExtent { start: BlockIndex(0), blocks: u32::MAX };
    map.put(all, FrameId::ZERO);
    assert_eq!((map.memory_bytes(), map.find(0, blocks)), (0, (Place::Base, blocks)));
    map.put(BlockExtent { start: BlockIndex(1_000_000), blocks: 2 }, FrameId(1));
    map.put(BlockExtent { start: BlockIndex(1_000_001), blocks: u32::MAX - 2_000_000 }, FrameId::ZERO);
    assert_eq!(map.find(1_000_000, 5), (Place::Frame(FrameId(1)), 1));
    assert_eq!(map.find(1_000_001, 5), (Place::Zero, 5));
    map.put(all, FrameId::ZERO);
    assert_eq!(map.find(1_000_000, 5).0, Place::Zero);
    assert_eq!((map.regions_used, map.find(2_000_000, 5)), (1, (Place::Base, 5)));
}
