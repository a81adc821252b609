//! Answers hash queries and scrubs of primaries from views, on threads of its own at low priority: a comparison of a whole disk must not
//! delay an activated copy. Each query is answered by one thread; several queries use several processors.
//!
//! Holes are not read: the hash of zeroes is computed once an answer. A granule that is damaged has no hash, which is an answer too.

use std::io;
use std::sync::Arc;

use blockdev::{BlockDevice, IoThreads, Piece, scan};
use proto::hashes::{Hash, HashQuery, Hashes, UNREADABLE, hash_chunks, hash_of_zeroes};
use proto::{BLOCK_BYTES, Point, Scrub, Scrubbed};

use crate::core::Cause;
use crate::scrub::{compare, is_damage};
use crate::view::View;

/// Niceness of the hashing threads.
const NICE: i32 = 10;
/// Threads at most: four hash some 18 GB/s, which is more than disks read.
const THREADS_MAX: usize = 4;

/// The threads: as many as there are processors, up to a limit; clones share them.
#[derive(Clone, Debug)]
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

    /// The threads, for whatever else reads or writes disks of this store and may wait.
    pub(crate) fn io(&self) -> &IoThreads {
        &self.io
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

    /// Compares a scrub with a view of `point`; the core has checked that it lies in its volume.
    pub(crate) fn scrub(
        &self,
        view: View,
        scrub: Scrub,
        point: Point,
    ) -> impl Future<Output = Result<Scrubbed, Cause>> + Send + use<> {
        let answer = self.io.call(move || async move { compare(&view, &scrub, point).await });
        async move { answer.await.map_err(|error| Arc::new(error) as Cause) }
    }
}

/// The answer to `query` from one volume.
pub(crate) async fn hashes(view: &dyn BlockDevice, query: &HashQuery) -> io::Result<Hashes> {
    let (granule, mut zero) = (u64::from(query.chunk_blocks) * BLOCK_BYTES, None);
    let (start, length) = (query.start.0 * BLOCK_BYTES, u64::from(query.blocks) * BLOCK_BYTES);
    let mut hashes = match scanned(view, (start, length), query.chunk_blocks, &mut zero).await {
        Err(error) if is_damage(&error) => Vec::with_capacity(query.count()),
        done => return Ok(Hashes { id: query.id, hashes: done? }),
    };
    // Somewhere in it is a frame that is damaged: granule by granule.
    for offset in (start..start + length).step_by(granule as usize) {
        match scanned(view, (offset, granule.min(start + length - offset)), query.chunk_blocks, &mut zero).await {
            Ok(one) => hashes.extend(one),
            Err(error) if is_damage(&error) => hashes.push(UNREADABLE),
            Err(error) => return Err(error),
        }
    }
    Ok(Hashes { id: query.id, hashes })
}

/// Hashes of the granules of `length` bytes from `offset` on; `zero` keeps that of a hole.
async fn scanned(
    view: &dyn BlockDevice,
    (offset, length): (u64, u64),
    chunk_blocks: u32,
    zero: &mut Option<Hash>,
) -> io::Result<Vec<Hash>> {
    let granule = u64::from(chunk_blocks) * BLOCK_BYTES;
    let mut hashes = Vec::with_capacity(length.div_ceil(granule) as usize);
    let scanned = scan(view, offset, length, granule, |piece| match piece {
        Piece::Data(content) => hashes.extend(hash_chunks(content, chunk_blocks)),
        Piece::Hole(bytes) => {
            let zero = *zero.get_or_insert_with(|| hash_of_zeroes(chunk_blocks));
            hashes.extend(std::iter::repeat_n(zero, (bytes / granule) as usize));
        }
    });
    scanned.await.map_err(|(_, error)| error)?;
    Ok(hashes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockdev::{Buf, MemoryDevice, SCAN_PIECE_BYTES};
    use proto::{BlockIndex, VolumeIndex};

    /// Holes, data, granules that straddle both, and a volume whose last block is partial.
    #[test]
    fn hashes_are_those_of_the_padded_blocks() {
        let size = 20 * SCAN_PIECE_BYTES + 1000;
        let disk = Arc::new(MemoryDevice::new(size));
        let io = IoThreads::new(1).unwrap();
        let writer = disk.clone();
        io.block_on(move || async move {
            for at in [70_000, 4 * SCAN_PIECE_BYTES + 5, size - 10] {
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
