//! Whole blocks of a device, as frames carry them: the last block of a volume may be partial, and is padded with zeroes.

use std::io;

use proto::units::BLOCK_BYTES;
use proto::{BlockExtent, Frame, FrameKind};

use crate::{BlockDevice, Buf, ZeroMode};

/// Reads whole blocks; a partial last block is padded with zeroes.
///
/// # Errors
/// The device's.
pub async fn read_blocks(device: &dyn BlockDevice, run: BlockExtent) -> io::Result<Buf> {
    let offset = run.start.0 * BLOCK_BYTES;
    let whole = u64::from(run.blocks) * BLOCK_BYTES;
    let inside = whole.min(device.size().saturating_sub(offset));
    let mut buf = Buf::zeroed(inside as usize);
    let mut buf = match device.try_read(offset, &mut buf) {
        Some(result) => result.map(|()| buf)?,
        None => device.read(offset, buf).await?,
    };
    buf.set_len(whole as usize);
    // The allocation is reused nowhere else, so what lies beyond `inside` is still zero.
    Ok(buf)
}

/// Writes what a frame says to the device of its volume. The frame's extents lie within it.
///
/// # Errors
/// The device's, or [`io::ErrorKind::InvalidData`] if the payload is not what its header states.
pub async fn apply_frame(device: &dyn BlockDevice, frame: &Frame<'_>) -> io::Result<()> {
    let inside = |extent: &BlockExtent| {
        let offset = extent.start.0 * BLOCK_BYTES;
        (offset, (u64::from(extent.blocks) * BLOCK_BYTES).min(device.size().saturating_sub(offset)))
    };
    if frame.header.kind == FrameKind::Zero {
        for extent in &frame.extents {
            let (offset, length) = inside(extent);
            device.write_zeroes(offset, length, ZeroMode { may_unmap: true, fast_only: false }).await?;
        }
        return Ok(());
    }
    let content = frame.content().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let mut rest = content.as_slice();
    for extent in &frame.extents {
        let (now, later) = rest.split_at(extent.blocks as usize * BLOCK_BYTES as usize);
        let (offset, length) = inside(extent);
        device.write(offset, Buf::copy_of(now.get(..length as usize).unwrap_or_default())).await?;
        rest = later;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{IoThreads, MemoryDevice};
    use proto::frame::{encode_data, encode_zero};
    use proto::{BlockIndex, Codec, EpochId, VolumeIndex};
    use std::sync::Arc;

    /// The last block is partial: nothing is written beyond the device, and what is read back is padded.
    #[test]
    fn a_partial_last_block_is_written_and_read() {
        let device = Arc::new(MemoryDevice::new(2 * BLOCK_BYTES + 100));
        let (io, of) = (IoThreads::new(1).unwrap(), device.clone());
        let extent = |start, blocks| BlockExtent { start: BlockIndex(start), blocks };
        let (read, zeroed) = io
            .block_on(move || async move {
                let content: Vec<u8> = (0..2 * BLOCK_BYTES).map(|i| i as u8 | 1).collect();
                let bytes = encode_data(VolumeIndex(0), EpochId(1), 0, &[extent(0, 1), extent(2, 1)], &content, Codec::Lz4);
                apply_frame(&*of, &Frame::decode(&bytes, 3).unwrap()).await.unwrap();
                let read = read_blocks(&*of, extent(0, 3)).await.unwrap();
                let bytes = encode_zero(VolumeIndex(0), EpochId(1), 0, &[extent(1, 2)]);
                apply_frame(&*of, &Frame::decode(&bytes, 3).unwrap()).await.unwrap();
                (read, read_blocks(&*of, extent(0, 3)).await.unwrap())
            })
            .unwrap();
        let block = BLOCK_BYTES as usize;
        let pattern = |at: usize, length: usize| (at..at + length).map(|i| i as u8 | 1).collect::<Vec<u8>>();
        assert_eq!(read[..block], pattern(0, block));
        assert!(read[block..2 * block].iter().all(|b| *b == 0));
        assert_eq!(read[2 * block..2 * block + 100], pattern(block, 100));
        assert!(read[2 * block + 100..].iter().all(|b| *b == 0));
        assert_eq!(zeroed[..block], pattern(0, block));
        assert!(zeroed[block..].iter().all(|b| *b == 0));
    }
}
