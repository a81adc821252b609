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

fn put(map: &mut VolumeIndexMap, extent: BlockExtent, frame: FrameId) {
    let mut placed = map.cut(extent, frame).collect();
    map.enter(&mut placed);
}

proptest! {
    /// Entered one by one, all at once, or as an index of its own: the same.
    #[test]
    fn entering_and_merging_agree(
        ops in prop::collection::vec((0..BLOCKS, prop_oneof![1..4u32, 1..2000u32], prop::bool::weighted(0.3)), 1..60),
        half in 0..60_usize,
    ) {
        let empty = VolumeIndexMap::new(BLOCKS * BLOCK_BYTES - 5, false);
        let (mut single, mut listed, mut first) = (empty.clone(), Vec::new(), empty.clone());
        for (i, (start, blocks, zero)) in ops.iter().enumerate() {
            let frame = if *zero { FrameId::ZERO } else { FrameId(i as u32) };
            let extent = BlockExtent { start: BlockIndex(*start), blocks: *blocks };
            put(&mut single, extent, frame);
            listed.extend(empty.cut(extent, frame));
            if i == half {
                first.enter(&mut listed);
            }
        }
        let mut later = empty.blank();
        later.enter(&mut listed);
        first.merge(later);
        let content = |map: &VolumeIndexMap| map.regions.iter_from(0).map(|(n, runs)| (n, runs.to_vec())).collect::<Vec<_>>();
        prop_assert_eq!(content(&first), content(&single));
        prop_assert_eq!((first.runs, first.regions_used), (single.runs, single.regions_used));
    }

    /// Would catch a change that is overlooked because of what the base has meanwhile; and, where nothing was folded, a block that is said to have
    /// changed and was not written.
    #[test]
    fn what_changed_since_a_point_is_found(
        ops in prop::collection::vec((0..BLOCKS, prop_oneof![1..4u32, 1..2000u32], prop::bool::weighted(0.3)), 1..60),
        earlier in 0..60_usize, fold in prop::option::of(0..60_usize), empty_base in any::<bool>(), prune_both in any::<bool>(),
    ) {
        let earlier = earlier.min(ops.len() - 1);
        let fold = fold.filter(|fold| *fold <= earlier);
        let mut live = VolumeIndexMap::new(BLOCKS * BLOCK_BYTES, empty_base);
        let initial = if empty_base { FrameId::ZERO } else { FrameId::MAX };
        let mut content = vec![initial; BLOCKS as usize];
        let (mut then, mut then_content, mut folded) = (live.clone(), content.clone(), None);
        let mut written = vec![false; BLOCKS as usize];
        for (i, (start, blocks, zero)) in ops.iter().enumerate() {
            let frame = if *zero { FrameId::ZERO } else { FrameId(i as u32) };
            put(&mut live, BlockExtent { start: BlockIndex(*start), blocks: *blocks }, frame);
            let range = *start as usize..(*start + u64::from(*blocks)).min(BLOCKS) as usize;
            content[range.clone()].fill(frame);
            written[range].fill(true);
            if fold == Some(i) {
                folded = Some((FrameId(i as u32 + 1), live.clone()));
            }
            if i == earlier {
                (then, then_content) = (live.clone(), content.clone());
                written.fill(false);
            }
        }
        let prune = |map: &mut VolumeIndexMap| {
            let Some((first, folded)) = &folded else { return };
            let mut next = Some(0);
            while let Some(number) = next {
                next = map.forget_folded(number, 2, *first, folded);
            }
        };
        prune(&mut live);
        if prune_both {
            prune(&mut then);
        }
        let changed = live.changed_since(&then, |frame| folded.as_ref().is_some_and(|(first, _)| frame < *first));
        for block in 0..BLOCKS {
            let at = block as usize;
            prop_assert!(changed.contains(block) || content[at] == then_content[at], "block {} changed", block);
            prop_assert!(!changed.contains(block) || written[at] || folded.is_some(), "block {} was not written", block);
        }
    }

    /// After a fold the base has what the index of its point says: a pruned index and the base together show what the whole index showed.
    #[test]
    fn what_the_base_has_is_forgotten_and_nothing_else(
        ops in prop::collection::vec((0..BLOCKS, prop_oneof![1..4u32, 1..2000u32], prop::bool::weighted(0.3)), 1..60),
        fold in 0..60_usize, empty_base in any::<bool>(), step in 1..4_usize,
    ) {
        let mut live = VolumeIndexMap::new(BLOCKS * BLOCK_BYTES, empty_base);
        let mut folded = live.clone();
        for (i, (start, blocks, zero)) in ops.iter().enumerate() {
            let frame = if *zero { FrameId::ZERO } else { FrameId(i as u32) };
            put(&mut live, BlockExtent { start: BlockIndex(*start), blocks: *blocks }, frame);
            if i == fold {
                folded = live.clone();
            }
        }
        let whole = live.clone();
        let first = FrameId(fold as u32 + 1);
        let mut next = Some(0);
        while let Some(number) = next {
            next = live.forget_folded(number, step, first, &folded);
        }
        if fold >= ops.len() {
            return Ok(());
        }
        let one = |map: &VolumeIndexMap, block: u64| map.find(block, 1).0;
        for block in 0..BLOCKS {
            // What the base shows where its point had nothing is what it showed before.
            let in_base = one(&folded, block);
            let shown = match one(&live, block) { Place::Base => in_base, place => place };
            prop_assert_eq!(shown, one(&whole, block), "block {}", block);
            prop_assert!(!matches!(one(&live, block), Place::Frame(frame) if frame < first));
        }
        let (mut runs, mut used) = (0, 0);
        for (_, of_region) in live.regions.iter_from(0) {
            (runs, used) = (runs + of_region.len() as u64, used + 1);
        }
        prop_assert_eq!((live.runs, live.regions_used), (runs, used));
    }

    /// Against a plain map of blocks, with snapshots taken on the way that must stay as they were.
    #[test]
    fn behaves_like_a_map_of_blocks(
        ops in prop::collection::vec((0..BLOCKS, prop_oneof![1..4u32, 1..2000u32], prop::bool::weighted(0.3)), 1..60)
    ) {
        let (mut map, mut oracle) = (VolumeIndexMap::new(BLOCKS * BLOCK_BYTES - 5, false), BTreeMap::new());
        let mut snapshots = Vec::new();
        for (i, (start, blocks, zero)) in ops.into_iter().enumerate() {
            let frame = if zero { FrameId::ZERO } else { FrameId(i as u32) };
            put(&mut map, BlockExtent { start: BlockIndex(start), blocks }, frame);
            oracle.extend((start..(start + u64::from(blocks)).min(BLOCKS)).map(|b| (b, frame)));
            if i % 7 == 0 {
                snapshots.push((map.clone(), oracle.clone()));
            }
        }
        check(&map, &oracle);
        for (older, former) in &snapshots {
            check(older, former);
            let differing = map.differing(older);
            for block in 0..BLOCKS {
                prop_assert_eq!(differing.contains(block), oracle.get(&block) != former.get(&block), "block {}", block);
            }
        }
        let counted: usize = map.regions.iter_from(0).map(|(_, r)| r.len()).sum();
        prop_assert_eq!(map.runs, counted as u64);
        for (_, runs) in map.regions.iter_from(0) {
            prop_assert!(runs.windows(2).all(|w| w[0].end() <= w[1].start));
            prop_assert!(runs.windows(2).all(|w| w[0].frame != FrameId::ZERO
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
    put(&mut map, BlockExtent { start: BlockIndex(5000), blocks: 1 }, FrameId(1));
    assert_eq!(map.find(3, blocks - 3), (Place::Base, 4096 - 3));
    assert_eq!(map.find(4096, blocks - 4096), (Place::Base, 904));
}

/// Would catch a frame that is found in the wrong place, or not at all, once others were thinned away between.
#[test]
fn frames_keep_their_numbers_when_others_are_thinned_away() {
    let mut table = FrameTable::default();
    for (segment, offset) in [(1, 64), (1, 100), (2, 64), (2, 90), (3, 64), (5, 64)] {
        table.push(segment, offset);
    }
    table.replace(2..=4, &[(FrameId(3), 70), (FrameId(4), 95)]);
    let place = |table: &FrameTable, frame| table.get(FrameId(frame)).map(|p| (p.segment, p.offset));
    let all: Vec<_> = (0..7).map(|frame| place(&table, frame)).collect();
    assert_eq!(all, [Some((1, 64)), Some((1, 100)), None, Some((2, 70)), Some((2, 95)), Some((5, 64)), None]);
    assert_eq!(table.get(FrameId(3)).unwrap().bytes_max, 25);
    assert_eq!(table.find(2, 95), Some(FrameId(4)));
    assert_eq!((table.find(5, 64), table.find(1, 100)), (Some(FrameId(5)), Some(FrameId(1))));
    assert_eq!((table.find(2, 64), table.find(3, 64), table.find(9, 64)), (None, None, None));
    table.forget_before(4);
    assert_eq!((place(&table, 3), place(&table, 4), table.find(2, 70)), (None, Some((2, 95)), None));
    table.replace(2..=2, &[]);
    assert_eq!((place(&table, 4), place(&table, 5)), (None, Some((5, 64))));
    table.truncate(5);
    assert_eq!((table.next(), place(&table, 5)), (Some(FrameId(5)), None));
}
