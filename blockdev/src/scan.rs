//! Goes once through a range of a device, in order, for whoever hashes it.
//!
//! Always holds: pieces are whole granules but for the last; while one is looked at the next ones are being read; holes are not read.
//! What lies beyond the device's end reads as zeroes. It needs four buffers of a piece, whatever the range.

use std::future::{Future, ready};
use std::io;
use std::pin::Pin;

use futures_util::stream::{FuturesOrdered, StreamExt};

use crate::{BlockDevice, Buf, ExtentKind};

/// Pieces are as long as this, if a granule is not longer: all of a scan's are in the processor's cache when they are looked at, and a disk reads them
/// as fast as longer ones.
pub const SCAN_PIECE_BYTES: u64 = 256 << 10;
/// The piece that is looked at, and those being read. On an io thread requests leave when it has nothing else to do, so they
/// must be asked for before the first is there.
const PIECES: usize = 4;

/// A piece of a scanned range.
#[derive(Debug)]
pub enum Piece<'a> {
    /// So many bytes of zeroes, whole granules, that take no space.
    Hole(u64),
    /// Content.
    Data(&'a [u8]),
}

enum Found {
    Hole(u64),
    Data(Buf),
}

type Reading<'a> = Pin<Box<dyn Future<Output = io::Result<Found>> + 'a>>;

/// Shows `take` every piece of `length` bytes from `offset` on. Granules of `granule_bytes` are counted from `offset`.
///
/// # Errors
/// The device's, with the offset of the piece that could not be read.
pub async fn scan(
    device: &dyn BlockDevice,
    offset: u64,
    length: u64,
    granule_bytes: u64,
    mut take: impl FnMut(Piece<'_>),
) -> Result<(), (u64, io::Error)> {
    let granule = granule_bytes.max(1);
    let piece_bytes = (SCAN_PIECE_BYTES / granule).max(1).saturating_mul(granule);
    let end = offset.saturating_add(length);
    let (mut reads, mut spare, mut at): (FuturesOrdered<Reading<'_>>, Vec<Buf>, u64) =
        (FuturesOrdered::new(), Vec::new(), offset);
    let mut shown = offset;
    loop {
        while reads.len() < PIECES && at < end {
            let inside = (end - at).min(device.size().saturating_sub(at));
            let (kind, run) = run_at(device, at, inside).await.map_err(|error| (at, error))?;
            // What reaches the device's end goes on behind it.
            let run = if run == inside { end - at } else { run };
            let hole = run / granule * granule;
            if kind != ExtentKind::Data && hole > 0 {
                reads.push_back(Box::pin(ready(Ok(Found::Hole(hole)))));
                at += hole;
                continue;
            }
            // No more than there is data: scattered blocks of a sparse disk would cost a whole piece each.
            let bytes = piece_bytes.min(run.max(1).next_multiple_of(granule)).min(end - at);
            let buf = spare.pop().unwrap_or_else(|| Buf::zeroed(piece_bytes.min(length) as usize));
            reads.push_back(Box::pin(read(device, at, bytes as usize, inside.min(bytes) as usize, buf)));
            at += bytes;
        }
        let Some(found) = reads.next().await else { return Ok(()) };
        match found.map_err(|error| (shown, error))? {
            Found::Hole(bytes) => {
                take(Piece::Hole(bytes));
                shown += bytes;
            }
            Found::Data(buf) => {
                take(Piece::Data(&buf));
                shown += buf.len() as u64;
                spare.push(buf);
            }
        }
    }
}

/// What the device says of the bytes from `at` on, and of how many.
async fn run_at(device: &dyn BlockDevice, at: u64, bytes: u64) -> io::Result<(ExtentKind, u64)> {
    if bytes == 0 {
        return Ok((ExtentKind::Hole, 0));
    }
    let extents = device.extents(at, bytes, 1).await?;
    Ok(extents.first().map_or((ExtentKind::Data, bytes), |e| (e.kind, e.length.min(bytes))))
}

/// Reads the first `inside` of `bytes` bytes; the others are zeroes.
async fn read(device: &dyn BlockDevice, at: u64, bytes: usize, inside: usize, mut buf: Buf) -> io::Result<Found> {
    buf.set_len(inside);
    if inside > 0 {
        buf = match device.try_read(at, &mut buf) {
            Some(result) => result.map(|()| buf)?,
            None => device.read(at, buf).await?,
        };
    }
    buf.set_len(bytes);
    buf.iter_mut().skip(inside).for_each(|byte| *byte = 0);
    Ok(Found::Data(buf))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Fault, FaultDevice, FileDevice, IoThreads, MemoryDevice, OpenOptions, Operation};
    use std::sync::Arc;

    const MIB: u64 = 1 << 20;

    fn scanned(device: Arc<dyn BlockDevice>, offset: u64, length: u64, granule: u64) -> Result<(Vec<u8>, u64), (u64, i32)> {
        let io = IoThreads::new(1).unwrap();
        io.block_on(move || async move {
            let (mut content, mut holes) = (Vec::new(), 0);
            let result = scan(&*device, offset, length, granule, |piece| match piece {
                Piece::Hole(bytes) => {
                    assert_eq!(bytes % granule, 0, "holes are whole granules");
                    content.resize(content.len() + bytes as usize, 0);
                    holes += bytes;
                }
                Piece::Data(bytes) => {
                    assert_eq!(content.len() as u64 % granule, 0, "pieces begin with a granule");
                    content.extend_from_slice(bytes);
                }
            });
            result.await.map_err(|(at, error)| (at, error.raw_os_error().unwrap_or(0)))?;
            Ok((content, holes))
        })
        .unwrap()
    }

    /// Would catch pieces out of order, a buffer used again with old bytes behind the device's end, and holes that are read.
    #[test]
    fn a_range_is_shown_in_order_padded_and_without_its_holes() {
        let size = 9 * MIB + 1000;
        let disk = Arc::new(MemoryDevice::new(size));
        let writer = disk.clone();
        IoThreads::new(1)
            .unwrap()
            .block_on(move || async move {
                for at in [70_000, MIB + 5, 2 * MIB + 9, 3 * MIB - 3, size - 10] {
                    writer.write(at, Buf::copy_of(&[7; 10])).await.unwrap();
                }
            })
            .unwrap();
        let mut image = disk.snapshot();
        image.resize(10 << 20, 0);
        for (offset, length, granule) in
            [(0, 10 * MIB, 65_536), (4096, 9 * MIB, 4096), (0, 9 * MIB + 4096, 5 * MIB), (8192, 8192, 4096)]
        {
            let (content, _) = scanned(disk.clone(), offset, length, granule).unwrap();
            assert!(content == image[offset as usize..(offset + length) as usize], "{offset}+{length} by {granule}");
        }
        let (_, holes) = scanned(disk, 0, 9 * MIB, 65_536).unwrap();
        assert!(holes >= 5 * MIB, "{holes} bytes were not read");
    }

    /// Would catch that a block among holes costs a whole piece.
    #[test]
    fn of_scattered_blocks_little_more_is_read_than_they_are() {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let options = OpenOptions { create_size: Some(64 * MIB), ..OpenOptions::default() };
        let disk = Arc::new(FileDevice::open(folder.path().join("disk"), options).unwrap());
        let writer = disk.clone();
        let write = move || async move {
            for at in (0..64 * MIB).step_by(MIB as usize) {
                writer.write(at + 300_000 / 4096 * 4096, Buf::copy_of(&[7; 4096])).await?;
            }
            io::Result::Ok(())
        };
        IoThreads::new(1).unwrap().block_on(write).unwrap().unwrap();
        // As it is scanned: by a device of its own, which has not just written.
        let scanner = disk.scanner().unwrap().unwrap();
        let (content, holes) = scanned(scanner, 0, 64 * MIB, 65_536).unwrap();
        assert_eq!(content.iter().filter(|b| **b == 7).count(), 64 * 4096);
        assert!(64 * MIB - holes <= 64 * 2 * 65_536, "{} bytes were read", 64 * MIB - holes);
    }

    #[test]
    fn an_error_says_where() {
        let disk = Arc::new(MemoryDevice::new(8 * MIB));
        let writer = disk.clone();
        let fill = move || async move { writer.write(0, Buf::copy_of(&[7; 8 << 20])).await.map(drop) };
        IoThreads::new(1).unwrap().block_on(fill).unwrap().unwrap();
        let faulty = FaultDevice::new(disk);
        faulty.inject(Fault::always(Operation::Read, libc::EIO).within(5 * MIB..5 * MIB + 1));
        assert_eq!(scanned(Arc::new(faulty), 0, 8 * MIB, 4096), Err((5 * MIB, libc::EIO)));
    }
}
