//! The board: every block once whatever happens to the messages, and no faster than it should.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blockdev::{BlockDevice, Buf, Fault, FaultDevice, MemoryDevice, Operation};
use futures_util::FutureExt;
use proptest::prelude::*;
use proto::units::BLOCK_BYTES;
use proto::{BlockExtent, BlockIndex, DirtyMap, EpochId, Generation, Name, Point, ScrubOutcome, Scrubbed};

use super::Scrub;
use super::board::Board;
use crate::dirtylog::{DirtyLog, Known, LogFile, log_bytes};
use crate::ledger::{CopyLimits, Ledger};
use crate::outbox::{Item, Outbox};

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

/// Would catch a bad sector, which no guest may ever ask for, that ends the session each time that the scrub comes to it.
#[test]
fn what_the_disk_does_not_give_is_left_out() {
    const SIZE: u64 = 700 * BLOCK_BYTES;
    let disk = FaultDevice::new(Arc::new(MemoryDevice::new(SIZE)));
    for at in [10, 300, 699] {
        disk.write(at * BLOCK_BYTES, Buf::copy_of(&[7; 4096])).now_or_never().unwrap().unwrap();
    }
    // EIO.
    disk.inject(Fault::always(Operation::Read, 5).within(300 * BLOCK_BYTES..301 * BLOCK_BYTES));
    let devices: Vec<Arc<dyn BlockDevice>> = vec![Arc::new(disk)];
    let none = || DirtyMap::new(SIZE);
    let limits = CopyLimits { memory_bytes: 1 << 20, spill_bytes: 0 };
    let ledger = Ledger::new(vec![SIZE], limits, vec![Known { suspect: none(), dirty: none() }]);
    ledger.follow(Generation(1), Some(EpochId(1)));
    let log = LogFile { name: "log".to_owned(), device: Arc::new(MemoryDevice::new(log_bytes(SIZE))), volume_bytes: SIZE };
    let (log, _) = DirtyLog::open(vec![log]).now_or_never().unwrap().unwrap();
    let now = Instant::now();
    let board = Board::new("db".parse().unwrap(), &[("root".parse().unwrap(), SIZE)], None, 0, now);
    board.verify(now);
    let queue = Outbox::new(1 << 20);
    let scrub = Scrub { ledger: &ledger, log: &log, devices: &devices, queue: &queue, board: &board };
    scrub.step(now).now_or_never().unwrap().unwrap();
    let Some(Item::Scrub(message)) = queue.try_next() else { panic!("nothing was asked") };
    let asked: Vec<_> = message.runs.iter().map(|run| (run.extent.start.0, run.extent.blocks)).collect();
    assert_eq!(asked, [(0, 256), (512, 188)]);
    let outcome = ScrubOutcome::Compared { differing: vec![1] };
    scrub.answered(Scrubbed { id: message.id, outcome }, now).now_or_never().unwrap().unwrap();
    let status = board.verify_status(now).unwrap();
    assert!(!status.running && status.done_bytes == status.total_bytes);
    assert_eq!((status.unreadable_bytes, status.differing_bytes), (256 * BLOCK_BYTES, 188 * BLOCK_BYTES));
    assert_eq!(
        (ledger.open_bytes(), log.covers(&crate::ledger::Range { volume: 0, first: 512, count: 188 })),
        (188 * BLOCK_BYTES, true)
    );
    assert!(scrub.answered(Scrubbed { id: message.id, outcome: ScrubOutcome::Stale }, now).now_or_never().unwrap().is_err());
}
