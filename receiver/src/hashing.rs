//! Answers hash queries of primaries from views, on threads of its own at low priority: a comparison of a whole disk must not
//! delay an activated copy. Each query is answered by one thread; several queries use several processors.
//!
//! Holes are not read: the hash of zeroes is computed once an answer.

use std::io;
use std::sync::Arc;

use blockdev::{BlockDevice, Buf, ExtentKind, IoThreads};
use proto::BLOCK_BYTES;
use proto::hashes::{Hash, HashQuery, Hashes, hash_chunks};

use crate::core::Cause;
use crate::view::View;

/// Niceness of the hashing threads.
const NICE: i32 = 10;
/// Threads at most: four hash some 18 GB/s, which is more than disks read.
const THREADS_MAX: usize = 4;
/// Most bytes read at once, if a granule is not longer.
const READ_BYTES_MAX: u64 = 1 << 20;

/// The threads: as many as there are processors, up to a limit.
#[derive(Debug)]
pub(crate) struct Hasher {
    io: IoThreads,
}

impl Hasher {
    pub(crate) fn new() -> io::Result<Self> {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let io = IoThreads::new(processors.min(THREADS_MAX))?;
        for index in 0..io.count() {
            io.spawn_on(index, || async {
                // Zero is that very thread. Without the right to be nicer nothing breaks.
                if let Err(error) = rustix::process::setpriority_process(None, NICE) {
                    tracing::debug!(%error, "a hashing thread keeps its priority");
                }
            });
        }
        Ok(Self { io })
    }

    /// Hashes a range of a view; the core has checked that it lies in its volume.
    pub(crate) fn answer(
        &self,
        views: Arc<Vec<View>>,
        query: HashQuery,
    ) -> impl Future<Output = Result<Hashes, Cause>> + Send + use<> {
        let answer = self.io.call(move || async move {
            let view = views.get(usize::from(query.volume.0)).ok_or(io::ErrorKind::NotFound)?;
            hashes(view, &query).await
        });
        async move { answer.await.flatten().map_err(|error| Arc::new(error) as Cause) }
    }
}

/// The answer to `query` from one volume.
pub(crate) async fn hashes(view: &dyn BlockDevice, query: &HashQuery) -> io::Result<Hashes> {
    let chunk_bytes = u64::from(query.chunk_blocks) * BLOCK_BYTES;
    let piece_bytes = (READ_BYTES_MAX / chunk_bytes).max(1) * chunk_bytes;
    let end = query.end() * BLOCK_BYTES;
    let mut hashes = Vec::with_capacity(query.count());
    let mut zero: Option<Hash> = None;
    // One for all pieces: a fresh one of this size costs as much as hashing it.
    let mut content = Buf::zeroed(piece_bytes.min(end.saturating_sub(query.start.0 * BLOCK_BYTES)) as usize);
    let mut at = query.start.0 * BLOCK_BYTES;
    while at < end {
        let piece = piece_bytes.min(end - at);
        let inside = piece.min(view.size().saturating_sub(at));
        let extents = view.extents(at, inside, 1).await?;
        let hole = extents.first().is_some_and(|e| e.kind != ExtentKind::Data && e.length >= inside);
        if hole && piece.is_multiple_of(chunk_bytes) {
            let zero = *zero.get_or_insert_with(|| *blake3_zeroes(chunk_bytes));
            hashes.extend((0..piece / chunk_bytes).map(|_| zero));
        } else {
            content.set_len(inside as usize);
            content = view.read(at, content).await?;
            // What lies between the volume's end and its last block's is hashed as zeroes.
            content.set_len(piece as usize);
            content.iter_mut().skip(inside as usize).for_each(|byte| *byte = 0);
            hashes.extend(hash_chunks(&content, query.chunk_blocks));
        }
        at += piece;
    }
    Ok(Hashes { id: query.id, hashes })
}

fn blake3_zeroes(bytes: u64) -> Box<Hash> {
    let zeroes = Buf::zeroed(bytes as usize);
    Box::new(hash_chunks(&zeroes, (bytes / BLOCK_BYTES) as u32).next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockdev::MemoryDevice;
    use proto::{BlockIndex, VolumeIndex};

    /// Holes, data, granules that straddle both, and a volume whose last block is partial.
    #[test]
    fn hashes_are_those_of_the_padded_blocks() {
        let size = 5 * READ_BYTES_MAX + 1000;
        let disk = Arc::new(MemoryDevice::new(size));
        let io = IoThreads::new(1).unwrap();
        let writer = disk.clone();
        io.block_on(move || async move {
            for at in [70_000, READ_BYTES_MAX + 5, size - 10] {
                writer.write(at, Buf::copy_of(&[7; 10])).await.unwrap();
            }
        })
        .unwrap();
        let mut image = disk.snapshot();
        image.resize(image.len().next_multiple_of(BLOCK_BYTES as usize), 0);
        let blocks = image.len() as u64 / BLOCK_BYTES;
        for (start, count, chunk_blocks) in [(0, blocks, 16), (3, blocks - 3, 5), (blocks - 1, 1, 1), (256, 512, 7680)] {
            let query = HashQuery { id: 1, volume: VolumeIndex(0), start: BlockIndex(start), blocks: count as u32, chunk_blocks };
            let disk = disk.clone();
            let answer = io.block_on(move || async move { hashes(&*disk, &query).await.unwrap() }).unwrap();
            let range = &image[(start * BLOCK_BYTES) as usize..((start + count) * BLOCK_BYTES) as usize];
            assert!(answer.hashes.iter().copied().eq(hash_chunks(range, chunk_blocks)), "{start}+{count} by {chunk_blocks}");
            assert_eq!(answer.hashes.len(), query.count());
        }
    }
}
