//! Compares suspect blocks with the copy by hash, so that only those that differ are sent.
//!
//! Suspect are the blocks of which nobody knows whether the copy has them: after an unclean stop those of the regions that the dirty log
//! has marked, after a loss of the history all. A suspect range is hashed in granules of 64 KiB at both sides, a granule that
//! differs again block by block. Questions are pipelined; nothing is committed meanwhile, so all answers are of one point.
//! The primary's side is read past the page cache and hashed on threads of its own, as nice to guests as the capture thread.
//!
//! A guest may write while its blocks are compared: such a write marks its blocks in the open map before it is issued, so whatever
//! this comes to about them, they are sent.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockdev::{BlockDevice, IoThreads, Piece, SCAN_PIECE_BYTES, scan};
use futures_util::stream::{FuturesOrdered, StreamExt};
use proto::hashes::{HASHES_MAX, Hash, HashQuery, Hashes, QUERIES_IN_FLIGHT_MAX, hash_chunks, hash_of_zeroes};
use proto::units::{BLOCK_BYTES, blocks_of};
use proto::{BlockExtent, BlockIndex, VolumeIndex};
use tokio::sync::mpsc;

use crate::capture::CaptureError;
use crate::ledger::Ledger;
use crate::outbox::{Item, Outbox};

/// Granule of the first question.
const CHUNK_BLOCKS: u32 = 16;
/// Blocks of a first question: 16 MiB.
const QUERY_BLOCKS: u64 = 4096;
/// Threads that hash, at most: four hash some 18 GB/s, which is more than disks read.
const HASHERS_MAX: usize = 4;
/// Their niceness: that of capture.
const NICE: i32 = 10;

/// How far the comparison is, for `status`, and by how many threads it is made.
#[derive(Debug, Default)]
pub(crate) struct CompareCounters {
    /// Threads that hash. Without any the task that compares hashes itself, as the simulator needs it.
    pub(crate) hashers: usize,
    /// Bytes compared since the start of the process.
    pub(crate) compared_bytes: AtomicU64,
    /// Bytes of them that differed.
    pub(crate) differing_bytes: AtomicU64,
}

impl CompareCounters {
    /// As many threads as there are processors, up to a limit.
    pub(crate) fn on_all_processors() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { hashers: processors.min(HASHERS_MAX), ..Self::default() }
    }
}

/// One comparison, and what it needs.
pub(crate) struct Compare<'a> {
    pub(crate) ledger: &'a Ledger,
    pub(crate) devices: &'a [Arc<dyn BlockDevice>],
    /// Takes the questions.
    pub(crate) queue: &'a Outbox,
    /// Gives the answers, in the order of the questions.
    pub(crate) answers: mpsc::Receiver<Hashes>,
    pub(crate) counters: &'a CompareCounters,
}

type Hashing<'a> = Pin<Box<dyn Future<Output = Result<(HashQuery, Vec<Hash>), CaptureError>> + 'a>>;

impl Compare<'_> {
    /// Runs until nothing is suspect.
    ///
    /// # Errors
    /// [`CaptureError`]; what was compared until then stays so.
    pub(crate) async fn run(mut self) -> Result<(), CaptureError> {
        let threads = match self.counters.hashers {
            0 => None,
            _ if self.ledger.suspect_bytes() == 0 => None,
            // They end with the comparison.
            count => threads(count)
                .inspect_err(|error| tracing::warn!(%error, "cannot start threads that hash; the capture thread hashes"))
                .ok(),
        };
        for volume in 0..self.devices.len() {
            self.volume(volume, threads.as_ref()).await?;
        }
        Ok(())
    }

    async fn volume(&mut self, volume: usize, threads: Option<&IoThreads>) -> Result<(), CaptureError> {
        let all = BlockExtent { start: BlockIndex(0), blocks: 0 };
        let uncached = self.devices[volume].uncached().map_err(|source| unread(volume, all, source))?;
        let device = uncached.unwrap_or_else(|| self.devices[volume].clone());
        let mut hashing: FuturesOrdered<Hashing<'_>> = FuturesOrdered::new();
        let mut closer: VecDeque<BlockExtent> = VecDeque::new();
        let (mut at, mut next_id) = (0, 0_u32);
        loop {
            while hashing.len() < QUERIES_IN_FLIGHT_MAX {
                let (range, chunk_blocks) = match closer.pop_front() {
                    Some(range) => (range, 1),
                    None => match self.next_range(volume, at) {
                        Some(range) => {
                            at = range.end();
                            (range, CHUNK_BLOCKS)
                        }
                        None => break,
                    },
                };
                let query = HashQuery {
                    id: next_id,
                    volume: VolumeIndex(volume as u16),
                    start: range.start,
                    blocks: range.blocks,
                    chunk_blocks,
                };
                next_id = next_id.wrapping_add(1);
                self.queue.mark(Item::Query(query))?;
                let device = device.clone();
                hashing.push_back(match threads {
                    None => Box::pin(async move { hash(&*device, volume, query).await }),
                    Some(threads) => {
                        let hashed = threads.call(move || async move { hash(&*device, volume, query).await });
                        Box::pin(async move { hashed.await.map_err(|source| unread(volume, range, source))? })
                    }
                });
            }
            if hashing.is_empty() {
                return Ok(());
            }
            // Together, so that the disk is read while answers travel.
            let (ours, theirs) = tokio::join!(hashing.next(), self.answers.recv());
            let Some(ours) = ours else { return Ok(()) };
            let (query, ours) = ours?;
            let theirs = theirs.ok_or(CaptureError::Stopped)?;
            if theirs.id != query.id || theirs.hashes.len() != ours.len() {
                return Err(CaptureError::Answer { asked: query.id, got: theirs.id });
            }
            closer.extend(self.resolve(volume, &query, &ours, &theirs.hashes));
        }
    }

    /// The next suspect blocks, in whole granules, joined where they touch.
    fn next_range(&self, volume: usize, from: u64) -> Option<BlockExtent> {
        let blocks = blocks_of(self.devices[volume].size());
        let granule = u64::from(CHUNK_BLOCKS);
        let mut range: Option<(u64, u64)> = None;
        let mut at = from;
        while let Some(run) = self.ledger.suspect_run(volume, at) {
            let (start, end) = (run.start.0 / granule * granule, run.end().next_multiple_of(granule).min(blocks));
            let (first, last) = *range.get_or_insert((start.max(from), end));
            if start > last || last - first >= QUERY_BLOCKS {
                break;
            }
            range = Some((first, end.max(last)));
            at = end.max(run.end());
        }
        range.map(|(first, last)| BlockExtent { start: BlockIndex(first), blocks: (last - first).min(QUERY_BLOCKS) as u32 })
    }

    /// Takes equal granules off the suspects. Returns those to be looked at block by block.
    fn resolve(&self, volume: usize, query: &HashQuery, ours: &[Hash], theirs: &[Hash]) -> Vec<BlockExtent> {
        let mut differing: Vec<BlockExtent> = Vec::new();
        let mut equal: Vec<BlockExtent> = Vec::new();
        let chunk = u64::from(query.chunk_blocks);
        for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
            let start = query.start.0 + i as u64 * chunk;
            let run = BlockExtent { start: BlockIndex(start), blocks: chunk.min(query.end() - start) as u32 };
            let to = if a == b { &mut equal } else { &mut differing };
            match to.last_mut() {
                // A closer look must fit one answer.
                Some(last) if last.end() == start && ((last.blocks + run.blocks) as usize) <= HASHES_MAX => {
                    last.blocks += run.blocks
                }
                _ => to.push(run),
            }
        }
        let bytes = |runs: &[BlockExtent]| runs.iter().map(|r| u64::from(r.blocks) * BLOCK_BYTES).sum();
        self.ledger.settle(volume, &equal, false);
        self.counters.compared_bytes.fetch_add(bytes(&equal), Ordering::Relaxed);
        if query.chunk_blocks > 1 {
            return differing;
        }
        self.ledger.settle(volume, &differing, true);
        self.counters.compared_bytes.fetch_add(bytes(&differing), Ordering::Relaxed);
        self.counters.differing_bytes.fetch_add(bytes(&differing), Ordering::Relaxed);
        Vec::new()
    }
}

/// Threads that hash.
fn threads(count: usize) -> io::Result<IoThreads> {
    let threads = IoThreads::new(count)?;
    for index in 0..count {
        threads.spawn_on(index, || async {
            // Zero is that very thread. Without the right to be nicer nothing breaks.
            if let Err(error) = rustix::process::setpriority_process(None, NICE) {
                tracing::debug!(%error, "a hashing thread keeps its priority");
            }
        });
    }
    Ok(threads)
}

/// Hashes a range of the primary's disk as the receiver hashes its view.
async fn hash(device: &dyn BlockDevice, volume: usize, query: HashQuery) -> Result<(HashQuery, Vec<Hash>), CaptureError> {
    let granule = u64::from(query.chunk_blocks) * BLOCK_BYTES;
    let (offset, length) = (query.start.0 * BLOCK_BYTES, u64::from(query.blocks) * BLOCK_BYTES);
    let (mut hashes, mut zero) = (Vec::with_capacity(query.count()), None);
    let scanned = scan(device, offset, length, granule, |piece| match piece {
        Piece::Data(content) => hashes.extend(hash_chunks(content, query.chunk_blocks)),
        Piece::Hole(bytes) => {
            let zero = *zero.get_or_insert_with(|| hash_of_zeroes(query.chunk_blocks));
            hashes.extend(std::iter::repeat_n(zero, (bytes / granule) as usize));
        }
    });
    scanned.await.map_err(|(offset, source)| CaptureError::Read { volume, offset, bytes: SCAN_PIECE_BYTES, source })?;
    Ok((query, hashes))
}

fn unread(volume: usize, range: BlockExtent, source: io::Error) -> CaptureError {
    let (offset, bytes) = (range.start.0 * BLOCK_BYTES, u64::from(range.blocks) * BLOCK_BYTES);
    CaptureError::Read { volume, offset, bytes, source }
}
