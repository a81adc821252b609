//! What a write waits for.

use std::time::Duration;

use blockdev::{DelayDevice, MemoryDevice, Operation};
use futures_util::FutureExt;
use proto::region::{REGION_BLOCKS, REGION_BYTES};
use proto::{DirtyMap, EpochId};

use super::*;
use crate::dirtylog::{Known, LogFile, log_bytes};
use crate::ledger::CopyLimits;

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
