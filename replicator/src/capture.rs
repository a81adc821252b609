//! Capture: turns a set of dirty blocks into frames.
//!
//! Runs on an io thread of its own, so that compressing never delays a guest request. It reads ahead, drops blocks that are
//! zero into zero extents, packs neighbours into frames of up to 128 KiB, and hands frames to the sender through a queue whose
//! bytes are bounded.
//!
//! A frozen pass is validated after reading: a block counts only if no guest write has claimed it meanwhile (those
//! writes hand in their own copy). So capture holds no lock while it reads, and a guest write never waits for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use blockdev::{BlockDevice, Buf, ExtentKind, read_blocks};
use futures_util::stream::{FuturesOrdered, StreamExt};
use proto::frame::FRAME_HEADER_BYTES;
use proto::pack::{FRAME_BLOCKS, Packed, Packer, push_block};
use proto::pass::{PassHeader, PassKind};
use proto::seal::Tally;
use proto::units::BLOCK_BYTES;
use proto::{BlockExtent, DirtyMap, VolumeIndex};

use crate::compress::Compressor;
use crate::ledger::{Copy, FreezeFailure, Ledger};
use crate::outbox::{Item, Outbox};

/// Frames whose blocks are being read at once.
const READ_AHEAD_FRAMES: usize = 8;
/// From this length on a run is asked for holes before it is read.
const HOLE_QUERY_BLOCKS: u32 = FRAME_BLOCKS;

/// A pass with no more than this many bytes a second of its interval is compressed thoroughly. At some 250 MB/s the compressor then takes
/// an eighth of a core at most; a busier guest gets the fast one (`lz4_flex`, above 1 GB/s), as does a first copy.
const THOROUGH_BYTES_PER_S: f64 = (32 << 20) as f64;
/// Intervals count as this long at least, so that one burst does not switch.
const THOROUGH_INTERVAL_MIN_S: f64 = 0.1;

/// Why a pass did not complete.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CaptureError {
    /// The session ended.
    #[error("the session ended")]
    Stopped,
    /// The disk could not be read.
    #[error("volume {volume}: cannot read {bytes} bytes at {offset}: {source}")]
    Read { volume: usize, offset: u64, bytes: u64, source: std::io::Error },
    /// The spill file could not be read back.
    #[error("spill file: cannot read {bytes} bytes at {offset}: {source}")]
    Spill { offset: u64, bytes: u64, source: std::io::Error },
    /// The receiver answered another question than it was asked.
    #[error(
        "the receiver answered hash query {got}, {asked} was asked or the answer is of another length: update the older side"
    )]
    Answer { asked: u32, got: u32 },
    /// The receiver answered a scrub that nobody asked, or named runs that it does not have.
    #[error("the receiver's answer to scrub {got} fits nothing that was asked: update the older side")]
    ScrubAnswer { got: u32 },
    /// The frozen epoch could not be completed.
    #[error("the epoch is given up and merged into the next: {0}")]
    Freeze(#[from] FreezeFailure),
}

impl std::fmt::Display for FreezeFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Copy => "a block could not be kept before it was overwritten",
            Self::Full => "copies made before guest writes exceed freeze_budget and spill_limit",
        })
    }
}

impl std::error::Error for FreezeFailure {}

/// Counters of a group's captures since start.
#[derive(Default)]
pub(crate) struct CaptureCounters {
    /// Bytes of data blocks put into frames.
    pub(crate) data_bytes: AtomicU64,
    /// Bytes of zero blocks and holes put into zero extents.
    pub(crate) zero_bytes: AtomicU64,
    /// Bytes of frames.
    pub(crate) frame_bytes: AtomicU64,
    /// Bytes of the pass under way, dealt with and in all.
    pub(crate) pass_done_bytes: AtomicU64,
    pub(crate) pass_total_bytes: AtomicU64,
}

/// A pass, and what it needs.
pub(crate) struct Pass<'a> {
    pub(crate) ledger: &'a Ledger,
    pub(crate) devices: &'a [Arc<dyn BlockDevice>],
    /// Where copies are that did not fit memory.
    pub(crate) spill: &'a dyn BlockDevice,
    pub(crate) queue: &'a Outbox,
    pub(crate) counters: &'a CaptureCounters,
    pub(crate) header: PassHeader,
    pub(crate) compressor: Compressor,
    /// Epoch interval: with the bytes of the pass it says how busy the guest is.
    pub(crate) interval: Duration,
    /// Counts the frames of all passes of the epoch.
    pub(crate) tally: &'a mut Tally,
}

/// Reads of one frame's blocks.
struct Batch {
    volume: usize,
    runs: Vec<BlockExtent>,
    contents: Vec<Buf>,
    /// Runs known to be holes, not read.
    holes: Vec<BlockExtent>,
}

/// Where the blocks of a pass come from.
enum Source {
    /// A snapshot of the maps; nothing is frozen.
    Fuzzy(Vec<DirtyMap>),
    /// The ledger's frozen epoch.
    Frozen,
}

impl Source {
    fn runs(&self, ledger: &Ledger, volume: usize, from: u64) -> Vec<BlockExtent> {
        match self {
            Self::Fuzzy(maps) => maps[volume].pick(from, FRAME_BLOCKS),
            Self::Frozen => ledger.frozen_runs(volume, from, FRAME_BLOCKS),
        }
    }

    /// One long run from `from` on, where a hole may save the reading.
    fn long_run(&self, ledger: &Ledger, volume: usize, from: u64) -> Option<BlockExtent> {
        let run = match self {
            Self::Fuzzy(maps) => maps[volume].next_run(from, u32::MAX),
            Self::Frozen => ledger.frozen_runs(volume, from, proto::region::REGION_BLOCKS as u32).into_iter().next(),
        };
        run.filter(|r| r.blocks >= HOLE_QUERY_BLOCKS)
    }
}

impl Pass<'_> {
    /// Runs the pass from its cut to its last frame. Returns the instant of the cut, microseconds since 1970.
    ///
    /// # Errors
    /// [`CaptureError`]; the caller gives the epoch up.
    pub(crate) async fn run(mut self, now_unix_us: impl Fn() -> u64) -> Result<u64, CaptureError> {
        self.queue.mark(Item::Begin(self.header))?;
        // Read before the cut: whatever was acknowledged before the stated time is then in the epoch. Read after it, a write could
        // be tagged with the next epoch and be acknowledged before the clock is read.
        let cut_unix_us = now_unix_us();
        let (tag, source) = match self.header.kind {
            PassKind::Fuzzy => {
                let (tag, maps) = self.ledger.take_fuzzy(self.header.epoch);
                (tag, Source::Fuzzy(maps))
            }
            PassKind::Frozen => (self.ledger.freeze(self.header.epoch), Source::Frozen),
        };
        self.ledger.drained(tag).await;
        let total: u64 = match &source {
            Source::Fuzzy(maps) => maps.iter().map(DirtyMap::bytes).sum(),
            Source::Frozen => self.ledger.frozen_left_bytes(),
        };
        self.compressor.thorough =
            total as f64 <= THOROUGH_BYTES_PER_S * self.interval.as_secs_f64().max(THOROUGH_INTERVAL_MIN_S);
        self.counters.pass_done_bytes.store(0, Ordering::Relaxed);
        self.counters.pass_total_bytes.store(total, Ordering::Relaxed);
        for volume in 0..self.devices.len() {
            self.volume(volume, &source).await?;
        }
        if self.header.kind == PassKind::Frozen {
            let copied = self.ledger.thaw().await?;
            self.send_copied(copied).await?;
            self.release_spill().await;
        }
        self.queue.mark(Item::End)?;
        Ok(cut_unix_us)
    }

    async fn volume(&mut self, volume: usize, source: &Source) -> Result<(), CaptureError> {
        let devices = self.devices;
        let mut packer = Packer::new(VolumeIndex(volume as u16));
        let mut reads = FuturesOrdered::new();
        let (mut at, mut ended) = (0, false);
        loop {
            while !ended && reads.len() < READ_AHEAD_FRAMES {
                let runs = source.runs(self.ledger, volume, at);
                let Some(last) = runs.last() else {
                    ended = true;
                    break;
                };
                let first = runs[0];
                // A frame of one unbroken run is probably part of a long one: a first copy, a big write.
                if first.blocks == FRAME_BLOCKS
                    && let Some(long) = source.long_run(self.ledger, volume, first.start.0)
                    && let Some(hole) = hole_at(&*devices[volume], long).await
                {
                    at = hole.end();
                    reads.push_back(futures_util::future::Either::Left(std::future::ready(Ok(Batch {
                        volume,
                        runs: Vec::new(),
                        contents: Vec::new(),
                        holes: vec![hole],
                    }))));
                    continue;
                }
                at = last.end();
                reads.push_back(futures_util::future::Either::Right(read_batch(&*devices[volume], volume, runs)));
            }
            let Some(batch) = reads.next().await else { break };
            self.pack(batch?, source, &mut packer).await?;
            if matches!(source, Source::Frozen) {
                if let Some(failure) = self.ledger.freeze_failure() {
                    return Err(failure.into());
                }
                let copied = self.ledger.take_copied();
                self.send_copied(copied).await?;
            }
        }
        self.flush(&mut packer).await
    }

    /// Adds what was read to the frame being packed: for a frozen pass only the blocks that nobody has overtaken.
    async fn pack(&mut self, batch: Batch, source: &Source, packer: &mut Packer) -> Result<(), CaptureError> {
        let runs = batch.runs.iter().chain(&batch.holes);
        self.counters.pass_done_bytes.fetch_add(runs.map(|r| u64::from(r.blocks) * BLOCK_BYTES).sum(), Ordering::Relaxed);
        let (mut kept, mut holes) = (Kept::All, batch.holes);
        if matches!(source, Source::Frozen) {
            let (mut blocks, mut untouched) = (Vec::new(), Vec::new());
            self.ledger.claim_captured(batch.volume, &batch.runs, |block| blocks.push(block));
            self.ledger.claim_captured(batch.volume, &holes, |block| push_block(&mut untouched, block));
            (kept, holes) = (Kept::Only(blocks), untouched);
        }
        for hole in holes {
            packer.zero(hole);
        }
        for (run, content) in batch.runs.iter().zip(&batch.contents) {
            for (block, bytes) in (run.start.0..run.end()).zip(content.chunks_exact(BLOCK_BYTES as usize)) {
                if !kept.contains(block) {
                    continue;
                }
                packer.block(block, bytes);
                if packer.is_full() {
                    self.flush_data(packer).await?;
                }
            }
        }
        if packer.has_zeroes() {
            self.flush_zeroes(packer).await?;
        }
        Ok(())
    }

    async fn send_copied(&mut self, copied: Vec<crate::ledger::CopiedRun>) -> Result<(), CaptureError> {
        let mut copied = copied;
        copied.sort_by_key(|c| (c.volume, c.extent.start));
        let mut packer: Option<Packer> = None;
        for run in copied {
            if packer.as_ref().is_some_and(|p| usize::from(p.volume().0) != run.volume)
                && let Some(mut full) = packer.take()
            {
                self.flush(&mut full).await?;
            }
            let packer = packer.get_or_insert_with(|| Packer::new(VolumeIndex(run.volume as u16)));
            let content = match run.content {
                Copy::Memory(content) => content,
                Copy::Spilled(offset) => self.read_spilled(offset, run.extent).await?,
                Copy::Before(device) => read_run(&*device, run.volume, run.extent).await?,
            };
            let batch = Batch { volume: run.volume, runs: vec![run.extent], contents: vec![content], holes: Vec::new() };
            // Already claimed: taken as it is.
            self.pack(batch, &Source::Fuzzy(Vec::new()), packer).await?;
        }
        match packer {
            Some(mut packer) => self.flush(&mut packer).await,
            None => Ok(()),
        }
    }

    /// Gives the spill file's space back. Failing to do so costs space only.
    async fn release_spill(&self) {
        let used = self.ledger.summary().spilled_bytes;
        if used > 0
            && let Err(error) = self.spill.trim(0, used).await
        {
            tracing::warn!(%error, "the spill file keeps its space");
        }
    }

    async fn read_spilled(&self, offset: u64, run: BlockExtent) -> Result<Buf, CaptureError> {
        let bytes = u64::from(run.blocks) * BLOCK_BYTES;
        let read = self.spill.read(offset, Buf::zeroed(bytes as usize)).await;
        read.map_err(|source| CaptureError::Spill { offset, bytes, source })
    }

    async fn flush(&mut self, packer: &mut Packer) -> Result<(), CaptureError> {
        self.flush_data(packer).await?;
        self.flush_zeroes(packer).await
    }

    async fn flush_data(&mut self, packer: &mut Packer) -> Result<(), CaptureError> {
        let compressor = &mut self.compressor;
        let packed = packer.take_data(self.header.epoch, self.header.pass, |content, room| compressor.compress(content, room));
        let Some(packed) = packed else { return Ok(()) };
        self.counters.data_bytes.fetch_add(packed.data_blocks * BLOCK_BYTES, Ordering::Relaxed);
        self.send(packed).await
    }

    async fn flush_zeroes(&mut self, packer: &mut Packer) -> Result<(), CaptureError> {
        for packed in packer.take_zeroes(self.header.epoch, self.header.pass) {
            self.counters.zero_bytes.fetch_add(packed.zero_blocks * BLOCK_BYTES, Ordering::Relaxed);
            self.send(packed).await?;
        }
        Ok(())
    }

    async fn send(&mut self, packed: Packed) -> Result<(), CaptureError> {
        let Packed { bytes, data_blocks, zero_blocks, .. } = packed;
        if let Some(head) = bytes.first_chunk::<FRAME_HEADER_BYTES>() {
            self.tally.add(head, bytes.len(), data_blocks, zero_blocks);
        }
        self.counters.frame_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.queue.frame(bytes, (data_blocks, zero_blocks)).await
    }
}

async fn read_batch(device: &dyn BlockDevice, volume: usize, runs: Vec<BlockExtent>) -> Result<Batch, CaptureError> {
    let mut contents = Vec::with_capacity(runs.len());
    for run in &runs {
        contents.push(read_run(device, volume, *run).await?);
    }
    Ok(Batch { volume, runs, contents, holes: Vec::new() })
}

async fn read_run(device: &dyn BlockDevice, volume: usize, run: BlockExtent) -> Result<Buf, CaptureError> {
    let (offset, bytes) = (run.start.0 * BLOCK_BYTES, u64::from(run.blocks) * BLOCK_BYTES);
    read_blocks(device, run).await.map_err(|source| CaptureError::Read { volume, offset, bytes, source })
}

/// The whole blocks at the start of `run` that are a hole; `None` if it starts with data or the device cannot tell.
async fn hole_at(device: &dyn BlockDevice, run: BlockExtent) -> Option<BlockExtent> {
    let offset = run.start.0 * BLOCK_BYTES;
    let length = (u64::from(run.blocks) * BLOCK_BYTES).min(device.size().saturating_sub(offset));
    let extents = device.extents(offset, length, 1).await.ok()?;
    let first = extents.first().filter(|e| e.kind != ExtentKind::Data)?;
    let whole = if first.length >= length { u64::from(run.blocks) } else { first.length / BLOCK_BYTES };
    (whole > 0).then_some(BlockExtent { start: run.start, blocks: whole as u32 })
}

/// Which blocks of a batch go into the frame.
enum Kept {
    /// All: the pass is fuzzy, or the blocks are claimed already.
    All,
    /// These, in rising order; a batch has at most [`FRAME_BLOCKS`].
    Only(Vec<u64>),
}

impl Kept {
    fn contains(&self, block: u64) -> bool {
        match self {
            Self::All => true,
            Self::Only(blocks) => blocks.binary_search(&block).is_ok(),
        }
    }
}
