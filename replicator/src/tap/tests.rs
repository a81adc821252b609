//! What a write waits for.

use std::time::Duration;

use blockdev::{DelayDevice, MemoryDevice, Operation};
use futures_util::FutureExt;
use proto::region::{REGION_BLOCKS, REGION_BYTES};
use proto::{DirtyMap, EpochId, Generation, Point};

use super::*;
use crate::dirtylog::{Known, LogFile, log_bytes};
use crate::ledger::CopyLimits;
use crate::record::RecordError;
use crate::upkeep;

/// Two parts of the disk that the log enters separately.
const SIZE: u64 = 16 * REGION_BYTES;
const FAR: u64 = 12 * REGION_BYTES;
const BLOCK: usize = BLOCK_BYTES as usize;

/// A disk that replicates itself while the disk of the log does not answer.
///
/// Would catch a write that waits for the log and is in flight meanwhile: the capture of the next cut would wait for it, and with the capture every
/// write to a block that it has yet to read, wherever it goes and however well its own part of the disk is entered. And one that nobody knows of: the maps of
/// an orderly stop would be saved without it, and it would reach the disk behind them.
#[tokio::test]
async fn a_log_that_hangs_holds_up_nothing_but_writes_to_new_regions() {
    let disk: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(SIZE));
    let below = Arc::new(DelayDevice::new(Arc::new(MemoryDevice::new(log_bytes(SIZE))), Duration::ZERO));
    let file = LogFile { name: "memory".to_owned(), device: below.clone(), volume_bytes: SIZE };
    let (log, _) = DirtyLog::open(vec![file]).await.unwrap();
    let far: Vec<u64> = (FAR / REGION_BYTES..SIZE / REGION_BYTES).collect();
    far.iter().for_each(|region| log.unset(0, *region));
    log.write_unset(&[far]).await.unwrap();
    let known = Known { suspect: DirtyMap::new(SIZE), dirty: DirtyMap::new(SIZE) };
    let limits = CopyLimits { memory_bytes: 1 << 20, spill_bytes: 0 };
    let ledger = Arc::new(Ledger::new(vec![SIZE], limits, vec![known]));
    let log = Arc::new(log);
    let tap = Tap::new(disk.clone(), ledger.clone(), log.clone(), Arc::new(MemoryDevice::new(0)), 0);
    let put = |offset: u64, byte: u8| tap.write(offset, Buf::copy_of(&[byte; BLOCK]));
    put(0, 1).await.unwrap();

    below.hold(Operation::Flush);
    let waiting = put(FAR, 2);
    tokio::pin!(waiting);
    assert!(waiting.as_mut().now_or_never().is_none());
    below.until_held(1).await;
    assert!(
        !ledger.is_quiet() && ledger.settled().is_none(),
        "it will be in flight again: no map is exact, and nothing is drained"
    );
    let tag = ledger.freeze(EpochId(1));
    assert!(ledger.drained(tag).now_or_never().is_some(), "the capture begins");
    put(0, 3).now_or_never().expect("a write that overtakes the capture waits for nothing").unwrap();
    put(BLOCK_BYTES, 4).now_or_never().expect("nor any other").unwrap();
    let copied = ledger.take_copied();
    assert!(copied.len() == 1 && copied[0].extent.start.0 == 0, "the block as it was at the cut is kept");
    assert!(waiting.as_mut().now_or_never().is_none(), "its region is not entered");
    assert!(*disk.read(FAR, Buf::zeroed(BLOCK)).await.unwrap() == [0; BLOCK]);

    below.release();
    waiting.await.unwrap();
    assert!(ledger.is_quiet());
    assert!(*disk.read(FAR, Buf::zeroed(BLOCK)).await.unwrap() == [2; BLOCK]);
    assert!(log.covers(&Range { volume: 0, first: FAR / BLOCK_BYTES, count: REGION_BLOCKS }));
    assert_eq!(ledger.summary().open_bytes, [3 * BLOCK_BYTES], "it belongs to the next epoch");
}

/// Would catch a group whose disks wait for the slowest of them, and a copy that is made before a write to the same disk that is older than the cut.
#[tokio::test]
async fn a_disk_that_hangs_holds_up_its_own_writes_only() {
    let below = Arc::new(DelayDevice::new(Arc::new(MemoryDevice::new(SIZE)), Duration::ZERO));
    let disks: [Arc<dyn BlockDevice>; 2] = [Arc::new(MemoryDevice::new(SIZE)), below.clone()];
    let file = || LogFile { name: "memory".to_owned(), device: Arc::new(MemoryDevice::new(log_bytes(SIZE))), volume_bytes: SIZE };
    let (log, _) = DirtyLog::open(vec![file(), file()]).await.unwrap();
    let known = || Known { suspect: DirtyMap::new(SIZE), dirty: DirtyMap::new(SIZE) };
    let limits = CopyLimits { memory_bytes: 1 << 20, spill_bytes: 0 };
    let ledger = Arc::new(Ledger::new(vec![SIZE; 2], limits, vec![known(), known()]));
    let (log, spill) = (Arc::new(log), Arc::new(MemoryDevice::new(0)));
    let [quick, slow] = [0, 1].map(|i| Tap::new(disks[i].clone(), ledger.clone(), log.clone(), spill.clone(), i));
    let block = |byte: u8| Buf::copy_of(&[byte; BLOCK]);
    quick.write(0, block(1)).await.unwrap();
    slow.write(0, block(1)).await.unwrap();

    below.hold(Operation::Write);
    let hangs = slow.write(FAR, block(2));
    tokio::pin!(hangs);
    assert!(hangs.as_mut().now_or_never().is_none());
    ledger.freeze(EpochId(1));
    quick.write(0, block(3)).now_or_never().expect("its own disk is well").unwrap();
    let same = slow.write(0, block(4));
    tokio::pin!(same);
    assert!(same.as_mut().now_or_never().is_none());
    let copied: Vec<_> = ledger.take_copied().iter().map(|run| (run.volume, run.extent.start.0)).collect();
    assert_eq!(copied, [(0, 0)], "of the slow disk nothing is read before what is older than the cut is there");

    below.release();
    hangs.await.unwrap();
    same.await.unwrap();
    assert_eq!(ledger.take_copied().len(), 1);
}

/// A group of one disk that is behind a gate, and what is below its log.
struct Gated {
    log_disk: Arc<dyn BlockDevice>,
    disk: Arc<DelayDevice>,
    devices: [Arc<dyn BlockDevice>; 1],
    log: Arc<DirtyLog>,
    ledger: Arc<Ledger>,
    gate: Arc<Gate>,
    tap: Tap,
}

impl Gated {
    async fn new() -> Self {
        let log_disk: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(log_bytes(SIZE)));
        let disk = Arc::new(DelayDevice::new(Arc::new(MemoryDevice::new(SIZE)), Duration::ZERO));
        let devices: [Arc<dyn BlockDevice>; 1] = [disk.clone()];
        let (log, _) = DirtyLog::open(vec![Self::file(&log_disk)]).await.unwrap();
        let known = Known { suspect: DirtyMap::new(SIZE), dirty: DirtyMap::new(SIZE) };
        let limits = CopyLimits { memory_bytes: 1 << 20, spill_bytes: 0 };
        let (log, ledger) = (Arc::new(log), Arc::new(Ledger::new(vec![SIZE], limits, vec![known])));
        let gate: Arc<Gate> = Arc::default();
        let tap = Tap::new(disk.clone(), ledger.clone(), log.clone(), Arc::new(MemoryDevice::new(0)), 0).with_gate(gate.clone());
        Self { log_disk, disk, devices, log, ledger, gate, tap }
    }

    fn file(disk: &Arc<dyn BlockDevice>) -> LogFile {
        LogFile { name: "memory".to_owned(), device: disk.clone(), volume_bytes: SIZE }
    }

    async fn stop(&self) {
        self.stop_while(false).await;
    }

    async fn stop_while(&self, hands_over: bool) {
        upkeep::save(&self.log, &self.ledger, (&self.devices, &self.gate), |_| Ok(()), || hands_over).await.unwrap();
    }

    /// What the next start knows.
    async fn next_start(&self) -> Known {
        DirtyLog::open(vec![Self::file(&self.log_disk)]).await.unwrap().1.remove(0)
    }
}

/// Would catch a client that outlives its server, because its disk hung, and writes behind the maps that an orderly stop has saved: the next start would
/// believe them, and forget what was written.
#[tokio::test]
async fn nothing_is_written_behind_the_maps_of_an_orderly_stop() {
    let group = Gated::new().await;
    let put = |offset: u64, byte: u8| group.tap.write(offset, Buf::copy_of(&[byte; BLOCK]));
    put(0, 1).await.unwrap();
    group.stop().await;
    assert!(put(BLOCK_BYTES, 2).now_or_never().is_none(), "it is not answered: its client repeats it when the node is back");
    assert!(group.tap.try_write(BLOCK_BYTES, &[2; BLOCK]).is_none());
    assert!(group.tap.trim(0, BLOCK_BYTES).now_or_never().is_none());
    assert!(*group.disk.read(0, Buf::zeroed(2 * BLOCK)).await.unwrap() == [[1; BLOCK], [0; BLOCK]].concat());
    let known = group.next_start().await;
    assert_eq!((known.suspect.count(), known.dirty.count()), (0, 1), "the maps were saved, exactly");
}

/// Would catch maps that are saved while a write that was let in before is still on its way to the disk.
#[tokio::test]
async fn a_stop_while_a_disk_hangs_saves_no_maps() {
    let group = Gated::new().await;
    group.disk.hold(Operation::Write);
    let hangs = group.tap.write(FAR, Buf::copy_of(&[2; BLOCK]));
    tokio::pin!(hangs);
    assert!(hangs.as_mut().now_or_never().is_none());
    group.stop().await;
    group.disk.release();
    hangs.await.unwrap();
    assert!(group.next_start().await.suspect.contains(FAR / BLOCK_BYTES), "its region is compared");
}

/// Would catch maps that are saved while disks are given back: what comes behind them would be in none.
#[tokio::test]
async fn a_stop_while_disks_are_given_back_saves_no_maps() {
    let group = Gated::new().await;
    group.tap.write(0, Buf::copy_of(&[1; BLOCK])).await.unwrap();
    group.stop_while(true).await;
    let known = group.next_start().await;
    assert!(known.suspect.contains(0) && known.dirty.is_empty(), "its region is compared");
}

/// Would catch a region that is forgotten in memory when what has to come before could not be done: a write to it would ask a disk that fails for what is there.
#[tokio::test]
async fn upkeep_that_fails_forgets_nothing() {
    let group = Gated::new().await;
    group.ledger.committed(Point { generation: Generation(1), epoch: EpochId(1) });
    let of_first = Range { volume: 0, first: 0, count: 1 };
    assert!(group.log.covers(&of_first));
    // The first time tells which regions were written since the last.
    let fails = |_| Err(RecordError::Poisoned { path: "group.record".into() });
    let _ = upkeep::forget_clean(&group.log, &group.ledger, &group.devices, fails).await;
    upkeep::forget_clean(&group.log, &group.ledger, &group.devices, fails).await.unwrap_err();
    assert!(group.log.covers(&of_first));
    upkeep::forget_clean(&group.log, &group.ledger, &group.devices, |_| Ok(())).await.unwrap();
    upkeep::forget_clean(&group.log, &group.ledger, &group.devices, |_| Ok(())).await.unwrap();
    assert!(!group.log.covers(&of_first), "it is clean and idle");
}

/// Would catch a look at what differs, while guests may write, that takes away the mark of a write on its way: the block still is as the copy has it.
#[tokio::test]
async fn who_only_looks_changes_no_marks() {
    let group = Gated::new().await;
    group.disk.hold(Operation::Write);
    let write = group.tap.write(0, Buf::copy_of(&[2; BLOCK]));
    tokio::pin!(write);
    assert!(write.as_mut().now_or_never().is_none());
    let look = group.ledger.to_look_at();
    assert_eq!(look.suspect_bytes(), BLOCK_BYTES, "it is looked at");
    look.settle(0, &[look.suspect_run(0, 0).unwrap()], false);
    assert_eq!((look.suspect_bytes(), look.marked()[0].count()), (0, 0), "and found to be the same");
    group.disk.release();
    write.await.unwrap();
    assert!(group.ledger.marked()[0].contains(0));
}
