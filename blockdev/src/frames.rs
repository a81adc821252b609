//! Frames off a stream of them: whole, checked, and written to the device of their volume.
//!
//! What must hold: no more is kept than one frame may have, whatever the peer says; a frame is handed over only with its checksums right and its
//! extents within its volume.

use std::io;

use proto::frame::{FRAME_HEADER_BYTES, Frame, FrameHeader};
use proto::units::BLOCK_BYTES;
use proto::{DecodeError, FrameKind};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::{BlockDevice, apply_frame};

/// Why a stream of frames is not read on.
#[derive(Debug, thiserror::Error)]
pub enum FrameStreamError {
    /// What came is no frame.
    #[error("what came is no frame: {0}")]
    Decode(#[from] DecodeError),
    /// A frame of a volume that the group does not have.
    #[error("a frame of volume {volume}, the group has {volumes}")]
    Volume {
        /// Its number.
        volume: u16,
        /// Volumes of the group.
        volumes: usize,
    },
    /// The stream cannot be read.
    #[error(transparent)]
    Read(#[from] io::Error),
}

/// Cuts a stream into frames, in whatever pieces it arrives.
#[derive(Debug)]
pub struct FrameReader {
    volume_blocks: Vec<u64>,
    bytes: Vec<u8>,
    /// Of the frame that arrives, with the blocks of its volume.
    header: Option<(FrameHeader, u64)>,
}

impl FrameReader {
    /// For the frames of a group whose volumes have so many blocks.
    pub fn new(volume_blocks: impl IntoIterator<Item = u64>) -> Self {
        Self { volume_blocks: volume_blocks.into_iter().collect(), bytes: Vec::new(), header: None }
    }

    /// Bytes that are missing to a header, or to a frame whose header is there.
    fn missing(&self) -> usize {
        self.header.as_ref().map_or(FRAME_HEADER_BYTES, |(header, _)| header.frame_bytes()) - self.bytes.len()
    }

    /// Takes from `bytes` what belongs to the next frame; returns it once it is whole.
    ///
    /// # Errors
    /// [`FrameStreamError`]; nothing that follows is to be trusted.
    pub fn take(&mut self, bytes: &mut &[u8]) -> Result<Option<ArrivedFrame>, FrameStreamError> {
        loop {
            let (now, later) = bytes.split_at(bytes.len().min(self.missing()));
            self.bytes.extend_from_slice(now);
            *bytes = later;
            if self.missing() > 0 {
                return Ok(None);
            }
            if let Some(frame) = self.whole()? {
                return Ok(Some(frame));
            }
        }
    }

    /// The next frame of `stream`; `None` at its end. Loses nothing when it is dropped.
    ///
    /// # Errors
    /// [`FrameStreamError`].
    pub async fn next(&mut self, stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<ArrivedFrame>, FrameStreamError> {
        loop {
            let missing = self.missing() as u64;
            if missing == 0 {
                if let Some(frame) = self.whole()? {
                    return Ok(Some(frame));
                }
                continue;
            }
            if (&mut *stream).take(missing).read_buf(&mut self.bytes).await? == 0 {
                return self.end().map(|()| None);
            }
        }
    }

    /// The stream has ended.
    ///
    /// # Errors
    /// If that was within a frame.
    pub fn end(&self) -> Result<(), FrameStreamError> {
        let left = self.bytes.len();
        let needed = left + self.missing();
        if left == 0 { Ok(()) } else { Err(DecodeError::Truncated { what: "frame at the end of a stream", needed, left }.into()) }
    }

    /// What is there is a whole header, or a whole frame.
    fn whole(&mut self) -> Result<Option<ArrivedFrame>, FrameStreamError> {
        let short = DecodeError::Truncated { what: "frame", needed: FRAME_HEADER_BYTES, left: self.bytes.len() };
        let head = *self.bytes.first_chunk::<FRAME_HEADER_BYTES>().ok_or(short)?;
        let Some((header, volume_blocks)) = self.header.take() else {
            let header = FrameHeader::decode(&head)?;
            let (volume, volumes) = (header.volume.0, self.volume_blocks.len());
            let blocks = self.volume_blocks.get(usize::from(volume)).copied();
            self.header = Some((header, blocks.ok_or(FrameStreamError::Volume { volume, volumes })?));
            return Ok(None);
        };
        let bytes = std::mem::take(&mut self.bytes);
        let frame = Frame::decode_body(header, &bytes[FRAME_HEADER_BYTES..], volume_blocks)?;
        let blocks = frame.extents.iter().map(|e| u64::from(e.blocks)).sum();
        Ok(Some(ArrivedFrame { head, header, bytes, volume_blocks, blocks }))
    }
}

/// A frame that has arrived whole.
#[derive(Clone, Debug)]
pub struct ArrivedFrame {
    head: [u8; FRAME_HEADER_BYTES],
    header: FrameHeader,
    bytes: Vec<u8>,
    volume_blocks: u64,
    blocks: u64,
}

impl ArrivedFrame {
    /// Its fixed part, as a tally counts it.
    #[must_use]
    pub fn head(&self) -> &[u8; FRAME_HEADER_BYTES] {
        &self.head
    }

    /// Its fixed part.
    #[must_use]
    pub fn header(&self) -> &FrameHeader {
        &self.header
    }

    /// Its volume's number.
    #[must_use]
    pub fn volume(&self) -> usize {
        self.header.volume.0.into()
    }

    /// Its blocks with data, and its blocks of zeroes.
    #[must_use]
    pub fn blocks(&self) -> (u64, u64) {
        if self.header.kind == FrameKind::Data { (self.blocks, 0) } else { (0, self.blocks) }
    }

    /// Bytes of its blocks, the last one of a volume counted whole.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.blocks * BLOCK_BYTES
    }

    /// Bytes of the frame itself.
    #[must_use]
    pub fn frame_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Writes what it says to the device of its volume.
    ///
    /// # Errors
    /// As [`apply_frame`].
    pub async fn apply(&self, device: &dyn BlockDevice) -> io::Result<()> {
        let frame = Frame::decode_body(self.header, &self.bytes[FRAME_HEADER_BYTES..], self.volume_blocks);
        apply_frame(device, &frame.map_err(io::Error::other)?).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::frame::{encode_data, encode_zero};
    use proto::{BlockExtent, BlockIndex, Codec, EpochId, VolumeIndex};

    fn frames() -> Vec<Vec<u8>> {
        let extent = |start, blocks| BlockExtent { start: BlockIndex(start), blocks };
        let data = encode_data(VolumeIndex(1), EpochId(4), 0, &[extent(2, 2)], &[7; 2 * 4096], Codec::Raw);
        vec![data, encode_zero(VolumeIndex(0), EpochId(4), 0, &[extent(0, 1), extent(5, 3)])]
    }

    /// However the stream is cut, the same frames come out; an end within one is told.
    #[test]
    fn any_cutting_gives_the_same_frames() {
        let stream = frames().concat();
        for piece in [1, 7, 39, 40, 41, 5000, stream.len()] {
            let (mut reader, mut seen) = (FrameReader::new([8, 4]), Vec::new());
            for mut bytes in stream.chunks(piece) {
                while !bytes.is_empty() {
                    seen.extend(reader.take(&mut bytes).unwrap());
                }
            }
            reader.end().unwrap();
            let seen: Vec<_> = seen.iter().map(|f| (f.volume(), f.blocks(), f.bytes.clone())).collect();
            assert_eq!(seen, [(1, (2, 0), frames()[0].clone()), (0, (0, 4), frames()[1].clone())], "pieces of {piece}");
        }
        let mut reader = FrameReader::new([8, 4]);
        reader.take(&mut &stream[..50]).unwrap();
        assert!(matches!(reader.end(), Err(FrameStreamError::Decode(DecodeError::Truncated { .. }))));
    }

    /// A peer's volume, extents and checksums are looked at before anything of a frame is used.
    #[test]
    fn what_is_no_frame_of_the_group_is_refused() {
        let stream = frames().concat();
        let taken = |volumes: &[u64], bytes: &[u8]| FrameReader::new(volumes.iter().copied()).take(&mut &*bytes);
        assert!(matches!(taken(&[8], &stream), Err(FrameStreamError::Volume { volume: 1, volumes: 1 })));
        assert!(matches!(taken(&[8, 3], &stream), Err(FrameStreamError::Decode(_))), "an extent beyond the volume");
        for at in [0, 30, 45, 60, 4000] {
            let mut flipped = stream.clone();
            flipped[at] ^= 1;
            assert!(matches!(taken(&[8, 4], &flipped), Err(FrameStreamError::Decode(_))), "byte {at}");
        }
    }
}
