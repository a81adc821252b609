//! The board: every block once whatever happens to the messages, and no faster than it should.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use proto::units::BLOCK_BYTES;
use proto::{BlockExtent, BlockIndex, EpochId, Generation, Name, Point};

use super::board::Board;

const POINT: Point = Point { generation: Generation(1), epoch: EpochId(1) };

fn board(blocks: &[u64], interval: Option<Duration>, start: u64, now: Instant) -> Board {
    let name = |i: usize| -> Name { format!("disk{i}").parse().unwrap() };
    // The last block of each volume is partial.
    let volumes: Vec<_> = blocks.iter().enumerate().map(|(i, blocks)| (name(i), blocks * BLOCK_BYTES - 100)).collect();
    Board::new("db".parse().unwrap(), &volumes, interval, start, now)
}

proptest! {
    /// Would catch a range that is forgotten, or compared twice, when its message was stale, its session ended, or it was cut short.
    #[test]
    fn a_walk_covers_every_block_once(
        blocks in prop::collection::vec(1..6000_u64, 1..4),
        start in any::<u64>(),
        verify in any::<bool>(),
        events in prop::collection::vec(0..12_u8, 1..60),
    ) {
        let mut now = Instant::now();
        let board = board(&blocks, None, start, now);
        if verify {
            board.verify(now);
        }
        let mut covered: Vec<Vec<u32>> = blocks.iter().map(|blocks| vec![0; *blocks as usize]).collect();
        let mut count = |range: crate::ledger::Range| {
            covered[range.volume][range.first as usize..(range.first + range.count) as usize].iter_mut().for_each(|n| *n += 1);
        };
        let mut asked = Vec::new();
        let mut events = events.into_iter().chain(std::iter::repeat(0));
        for _ in 0..100_000 {
            now += Duration::from_secs(1);
            if board.status(now).last_pass_age_ms.is_some() {
                break;
            }
            match events.next() {
                Some(1) => {
                    board.session_over();
                    asked.clear();
                }
                Some(2..5) if !asked.is_empty() => {
                    let answered: Option<super::Asked> = board.answered(asked.remove(0));
                    board.stale(answered.unwrap(), now);
                }
                event => {
                    if let Some(mut taken) = board.take(now) {
                        let range = taken.range();
                        match event {
                            Some(5) => drop(taken),
                            Some(6) => {
                                count(range);
                                taken.left_out(now);
                            }
                            _ => {
                                if event == Some(7) && range.count > 1 {
                                    taken.give_back_from(range.first + range.count / 2);
                                }
                                let range = taken.range();
                                let run = BlockExtent { start: BlockIndex(range.first), blocks: range.count as u32 };
                                asked.push(taken.asked(POINT, vec![run]));
                            }
                        }
                    }
                    if (asked.len() >= 8 || event == Some(0)) && !asked.is_empty() {
                        let answered = board.answered(asked.remove(0)).unwrap();
                        count(answered.range);
                        board.compared(&answered, &[], now);
                    }
                }
            }
        }
        prop_assert!(board.status(now).last_pass_age_ms.is_some(), "it ends");
        prop_assert!(covered.iter().flatten().all(|n| *n == 1), "{covered:?}");
        if verify {
            let status = board.verify_status(now).unwrap();
            prop_assert!(!status.running);
            prop_assert_eq!((status.done_bytes, status.total_bytes), (status.total_bytes, blocks.iter().sum::<u64>() * BLOCK_BYTES));
        }
    }
}

/// Takes and answers one range.
fn one(board: &Board, now: Instant) {
    let id = board.take(now).unwrap().asked(POINT, Vec::new());
    board.compared(&board.answered(id).unwrap(), &[], now);
}

/// Would catch a background that reads the disk as fast as it can, or makes up for a night without a connection at once.
#[test]
fn the_background_keeps_its_pace() {
    let now = Instant::now();
    // 100 steps.
    let board = board(&[25_600], Some(Duration::from_secs(1000)), 77, now);
    let (mut at, mut steps) = (now, 0);
    while board.status(at).last_pass_age_ms.is_none() {
        at = board.due(at).unwrap().max(at);
        one(&board, at);
        steps += 1;
    }
    // It begins in the middle of a step, and ends there.
    assert_eq!(steps, 101);
    let took = at - now;
    assert!(took > Duration::from_secs(980) && took < Duration::from_secs(1001), "{took:?}");

    let later = at + Duration::from_secs(50_000);
    let mut burst = 0;
    while board.due(later).unwrap() <= later {
        one(&board, later);
        burst += 1;
    }
    assert!(burst <= 2, "{burst} steps at once");
}

/// Would catch a `verify` that waits for the pace of the background, or for one answer at a time, and a receiver that is asked beyond its limit.
#[test]
fn a_verify_is_limited_by_answers_only() {
    let now = Instant::now();
    let board = board(&[100_000, 300], None, 0, now);
    assert_eq!(board.due(now), None, "there is no background");
    board.verify(now);
    let asked: Vec<u32> = (0..8).map(|_| board.take(now).unwrap().asked(POINT, Vec::new())).collect();
    assert_eq!((board.due(now), board.take(now).is_none(), board.unanswered()), (None, true, (8, 8)));
    board.compared(&board.answered(asked[3]).unwrap(), &[], now);
    assert_eq!(board.due(now), Some(now));
    board.stale(board.answered(asked[0]).unwrap(), now);
    assert!(board.due(now).unwrap() > now, "not at once again");
    let number = board.verify_status(now).unwrap().number;
    board.verify(now);
    assert_eq!(board.verify_status(now).unwrap().number, number, "the one that runs");
}
