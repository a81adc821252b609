//! A read-only disk: one volume at one point.
//!
//! An index snapshot says for each block whether it is in a frame of the journal, zero, or in the base. Nothing that is committed
//! later, and no epoch that is arriving, is ever seen through it.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use blockdev::{BlockDevice, Buf, Extent, ExtentKind, IoFuture, SharedFile, UncachedReader, ZeroMode};
use proto::units::BLOCK_BYTES;
use rustix::fs::{SeekFrom, seek};

use crate::base::Sums;
use crate::disk::read_nowait;
use crate::frames::{Decoded, FrameError, FreshFrames};
use crate::group::{GroupError, Shared};
use crate::index::{FrameId, Place};
use crate::journal::JournalError;
use crate::pins::Pinned;
use crate::spill::Spill;
use crate::superblock::Volume;

/// One volume of a group at one point.
#[derive(Debug)]
pub struct View {
    shared: Arc<Shared>,
    index: Arc<Pinned>,
    volume: usize,
    size: u64,
    base: SharedFile,
    base_path: PathBuf,
    /// Set for a comparison with the primary: frames are read from the disk, and what is damaged is counted.
    fresh: Option<FreshFrames>,
    /// Reads the base for whoever goes through all of it.
    bulk: Option<UncachedReader>,
    /// Keeps decoded frames, for whoever reads small pieces all over.
    spill: Option<Arc<Spill>>,
}

/// The view of one volume for a comparison with the primary: what is decoded in memory does not count.
pub(crate) fn fresh(shared: &Arc<Shared>, index: Pinned, volume: usize) -> Result<Option<View>, GroupError> {
    let of_volume = shared.volumes.get(volume).map(|spec| view(shared, &Arc::new(index), volume, spec)).transpose()?;
    Ok(of_volume.map(View::reading_fresh))
}

/// The views of all volumes of a group from one index.
pub(crate) fn views(shared: &Arc<Shared>, index: Pinned) -> Result<Vec<View>, GroupError> {
    let index = Arc::new(index);
    shared.volumes.iter().enumerate().map(|(volume, spec)| view(shared, &index, volume, spec)).collect()
}

fn view(shared: &Arc<Shared>, index: &Arc<Pinned>, volume: usize, spec: &Volume) -> Result<View, GroupError> {
    let base_path = shared.folder.base(&spec.name);
    let base = File::open(&base_path).map(SharedFile::new).map_err(|source| JournalError::Io {
        path: base_path.clone(),
        what: "open the base of",
        source,
    })?;
    let (shared, index) = (Arc::clone(shared), Arc::clone(index));
    Ok(View { shared, index, volume, size: spec.size_bytes, base, base_path, fresh: None, bulk: None, spill: None })
}

impl View {
    /// The same, for a comparison with the primary.
    pub(crate) fn reading_fresh(self) -> Self {
        Self { fresh: Some(FreshFrames::default()), ..self }
    }

    /// The same view, for who copies all of it: neither the page cache nor the decoded frames that others use are touched.
    pub(crate) fn for_copying(&self) -> io::Result<Self> {
        Self {
            shared: Arc::clone(&self.shared),
            index: Arc::clone(&self.index),
            volume: self.volume,
            size: self.size,
            base: self.base.clone(),
            base_path: self.base_path.clone(),
            fresh: Some(FreshFrames::default()),
            bulk: None,
            spill: None,
        }
        .in_bulk()
    }

    /// The same view, for a fork.
    pub(crate) fn for_fork(self) -> Self {
        let spill = self.shared.frames.spill();
        Self { spill, ..self }
    }

    /// The group.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The volume's name.
    pub(crate) fn name(&self) -> &str {
        self.shared.volumes.get(self.volume).map_or("", |spec| spec.name.as_str())
    }

    /// The places of a byte range in order: place, first byte of the piece, its length.
    fn pieces(&self, offset: u64, length: u64) -> impl Iterator<Item = (Place, u64, u64)> + '_ {
        let map = self.index.index.volume(self.volume);
        let (mut at, end) = (offset, offset + length);
        std::iter::from_fn(move || {
            let map = map.filter(|_| at < end)?;
            let block = at / BLOCK_BYTES;
            let (place, run) = map.find(block, end.div_ceil(BLOCK_BYTES) - block);
            let stop = ((block + run) * BLOCK_BYTES).min(end);
            let piece = (self.known(place), at, stop - at);
            at = stop;
            Some(piece)
        })
    }

    /// Where it is now. What was in no frame when the index was made, before anything was folded, is zeroes, whatever a fold writes elsewhere.
    fn known(&self, place: Place) -> Place {
        let base_is_zero = || self.index.index.volume(self.volume).is_some_and(|map| map.base_is_zero());
        match place {
            Place::Base if base_is_zero() => Place::Zero,
            Place::Frame(frame) if self.shared.frames.is_folded(frame) => Place::Base,
            place => place,
        }
    }

    /// The frame, or nothing if its blocks are in the base by now.
    async fn load(&self, frame: FrameId) -> io::Result<Option<Arc<Decoded>>> {
        let loaded = self.shared.frames.load(frame, self.fresh.as_ref()).await;
        loaded.map(Some).or_else(|error| self.folded_meanwhile(frame, error))
    }

    fn folded_meanwhile(&self, frame: FrameId, error: FrameError) -> io::Result<Option<Arc<Decoded>>> {
        if self.shared.frames.is_folded(frame) { Ok(None) } else { Err(self.failed(error)) }
    }

    async fn fill(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        for (place, at, bytes) in self.pieces(offset, buf.len() as u64) {
            let from = (at - offset) as usize;
            let part = buf.get_mut(from..from + bytes as usize).unwrap_or_default();
            match place {
                Place::Zero => part.fill(0),
                Place::Base => part.copy_from_slice(&self.read_base(at, Buf::zeroed(part.len())).await?),
                Place::Frame(frame) => self.fill_from(frame, at, part).await?,
            }
        }
        Ok(())
    }

    /// Copies blocks of a frame: decoded in memory, decoded before and kept, or decoded now. A fork keeps what it decodes.
    async fn fill_from(&self, frame: FrameId, at: u64, part: &mut [u8]) -> io::Result<()> {
        if let Some(spill) = &self.spill
            && self.shared.frames.cached(frame).is_none()
            && spill.copy(frame.0, self.volume, at, part).await
        {
            return Ok(());
        }
        let Some(decoded) = self.load(frame).await? else {
            part.copy_from_slice(&self.read_base(at, Buf::zeroed(part.len())).await?);
            return Ok(());
        };
        self.copy(&decoded, at, part).ok_or_else(|| self.failed(self.shared.frames.mismatch(frame)))?;
        if let Some(spill) = &self.spill {
            let received = self.shared.bytes_received.load(std::sync::atomic::Ordering::Relaxed);
            spill.offer(frame.0, &decoded, part.len(), received);
        }
        Ok(())
    }

    /// As a read, on this thread, which waits for the disk.
    ///
    /// # Errors
    /// What the disk said, or a frame that is not what was committed.
    #[cfg(any(test, feature = "simulation"))]
    pub fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        for (place, at, bytes) in self.pieces(offset, buf.len() as u64) {
            let from = (at - offset) as usize;
            let part = buf.get_mut(from..from + bytes as usize).unwrap_or_default();
            match place {
                Place::Zero => part.fill(0),
                Place::Base => self.read_base_now(at, part)?,
                Place::Frame(frame) => {
                    let loaded = self.shared.frames.load_now(frame, self.fresh.as_ref()).map(Some);
                    let loaded = loaded.or_else(|error| self.folded_meanwhile(frame, error))?;
                    let Some(decoded) = loaded else {
                        self.read_base_now(at, part)?;
                        continue;
                    };
                    self.copy(&decoded, at, part).ok_or_else(|| self.failed(self.shared.frames.mismatch(frame)))?;
                }
            }
        }
        Ok(())
    }

    /// Says what does not fit, file and offset, in the log; the reader gets an I/O error.
    fn failed(&self, error: FrameError) -> io::Error {
        match &self.fresh {
            Some(_) => self.shared.findings.note(&error),
            None => tracing::error!("{error}"),
        }
        io::Error::other(error)
    }

    /// The same view, for a reader of all of it: what the page cache does not have of the base is read past it.
    pub(crate) fn in_bulk(self) -> io::Result<Self> {
        let bulk = UncachedReader::over(self.base.file(), self.size)?;
        Ok(Self { bulk, ..self })
    }

    fn sums(&self) -> Option<&Sums> {
        self.shared.base_sums.get(self.volume)?.get()
    }

    /// Reads the base. Whole blocks are read and compared with their checksums, however little of them is wanted.
    async fn read_base(&self, at: u64, mut buf: Buf) -> io::Result<Buf> {
        let Some(sums) = self.sums() else { return self.read_unchecked(at, buf).await };
        let whole = sums.around(at, buf.len() as u64);
        if whole == (at..at + buf.len() as u64) {
            let content = self.read_unchecked(at, buf).await?;
            sums.check(at, &content).await.map_err(|error| self.base_failed(error))?;
            return Ok(content);
        }
        let content = self.read_unchecked(whole.start, Buf::zeroed((whole.end - whole.start) as usize)).await?;
        sums.check(whole.start, &content).await.map_err(|error| self.base_failed(error))?;
        let skip = (at - whole.start) as usize;
        let wanted = content.get(skip..skip + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(wanted);
        Ok(buf)
    }

    /// As [`read_base`](Self::read_base), on this thread, which waits for the disk.
    #[cfg(any(test, feature = "simulation"))]
    fn read_base_now(&self, at: u64, part: &mut [u8]) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let Some(sums) = self.sums() else { return self.base.file().read_exact_at(part, at) };
        let whole = sums.around(at, part.len() as u64);
        let mut content = vec![0; (whole.end - whole.start) as usize];
        self.base.file().read_exact_at(&mut content, whole.start)?;
        sums.check_now(whole.start, &content).map_err(|error| self.base_failed(error))?;
        let skip = (at - whole.start) as usize;
        part.copy_from_slice(content.get(skip..skip + part.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    /// Says which block does not fit, file and offset, in the log; the reader gets an I/O error.
    fn base_failed(&self, error: io::Error) -> io::Error {
        match error.get_ref().and_then(|inner| inner.downcast_ref()) {
            Some(damage) => self.shared.findings.note_base(damage),
            None => tracing::error!("{}: cannot read the checksums of the base: {error}", self.base_path.display()),
        }
        error
    }

    /// Whole blocks of the base from memory, if they and their checksums are there, and fit.
    fn try_base(&self, at: u64, part: &mut [u8]) -> Option<()> {
        let sums = self.sums();
        let is_whole = |sums: &Sums| sums.around(at, part.len() as u64) == (at..at + part.len() as u64);
        if !sums.is_none_or(is_whole) || !read_nowait(self.base.file(), part, at) {
            return None;
        }
        sums.is_none_or(|sums| sums.try_check(at, part) == Some(true)).then_some(())
    }

    async fn read_unchecked(&self, at: u64, buf: Buf) -> io::Result<Buf> {
        let read = match &self.bulk {
            Some(bulk) => bulk.read(at, buf).await,
            None => self.base.read_exact_at(at, buf).await,
        };
        read.inspect_err(|error| {
            tracing::error!("{}: cannot read the base at offset {at}: {error}", self.base_path.display());
        })
    }

    /// Copies the content of a frame from byte `at` on; `None` if the frame does not hold all of it.
    fn copy(&self, decoded: &Decoded, mut at: u64, mut part: &mut [u8]) -> Option<()> {
        while !part.is_empty() {
            let content = decoded.from(self.volume, at / BLOCK_BYTES)?.get((at % BLOCK_BYTES) as usize..)?;
            let n = content.len().min(part.len());
            let (now, later) = part.split_at_mut(n);
            now.copy_from_slice(content.get(..n).filter(|c| !c.is_empty())?);
            part = later;
            at += n as u64;
        }
        Some(())
    }

    pub(crate) fn find_extents(&self, offset: u64, length: u64, extents_max: usize) -> io::Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        for (place, at, bytes) in self.pieces(offset, length) {
            let mut done = 0;
            while done < bytes {
                let (kind, run) = match place {
                    Place::Frame(_) => (ExtentKind::Data, bytes - done),
                    Place::Zero => (ExtentKind::Hole, bytes - done),
                    Place::Base => self.base_extent(at + done, bytes - done)?,
                };
                let full = extents.len() >= extents_max;
                match extents.last_mut() {
                    Some(last) if last.kind == kind => last.length += run,
                    _ if full => return Ok(extents),
                    _ => extents.push(Extent { length: run, kind }),
                }
                done += run;
            }
        }
        Ok(extents)
    }

    fn base_extent(&self, at: u64, bytes: u64) -> io::Result<(ExtentKind, u64)> {
        let end = at + bytes;
        let data = match seek(&self.base, SeekFrom::Data(at)) {
            Ok(data) => data.min(end),
            Err(rustix::io::Errno::NXIO) => end,
            Err(error) => return Err(error.into()),
        };
        if data > at {
            // A hole where something was written is to be read, and found to be damaged.
            let set = self.sums().map(|sums| sums.next_set(at / BLOCK_BYTES..data.div_ceil(BLOCK_BYTES))).transpose()?.flatten();
            return Ok(match set.map(|block| (block * BLOCK_BYTES, ((block + 1) * BLOCK_BYTES).min(end))) {
                Some((start, stop)) if start <= at => (ExtentKind::Data, stop - at),
                Some((start, _)) => (ExtentKind::Hole, start - at),
                None => (ExtentKind::Hole, data - at),
            });
        }
        let hole = seek(&self.base, SeekFrom::Hole(at))?.clamp(at + 1, end);
        Ok((ExtentKind::Data, hole - at))
    }
}

fn read_only<'a, T: 'a>() -> IoFuture<'a, T> {
    Box::pin(std::future::ready(Err(io::ErrorKind::ReadOnlyFilesystem.into())))
}

impl BlockDevice for View {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read<'a>(&'a self, offset: u64, mut buf: Buf) -> IoFuture<'a, Buf> {
        #[cfg(any(test, feature = "simulation"))]
        if self.shared.disk.in_one_thread() {
            return Box::pin(async move { self.read_now(offset, &mut buf).map(|()| buf) });
        }
        Box::pin(async move {
            // All of it from the base needs no second buffer.
            if let Some((Place::Base, _, bytes)) = self.pieces(offset, buf.len() as u64).next()
                && bytes == buf.len() as u64
            {
                return self.read_base(offset, buf).await;
            }
            self.fill(offset, &mut buf).await?;
            Ok(buf)
        })
    }

    fn write<'a>(&'a self, _offset: u64, _data: Buf) -> IoFuture<'a, Buf> {
        read_only()
    }

    fn flush<'a>(&'a self) -> IoFuture<'a, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn write_zeroes<'a>(&'a self, _offset: u64, _length: u64, _mode: ZeroMode) -> IoFuture<'a, ()> {
        read_only()
    }

    fn trim<'a>(&'a self, _offset: u64, _length: u64) -> IoFuture<'a, ()> {
        read_only()
    }

    fn extents<'a>(&'a self, offset: u64, length: u64, extents_max: usize) -> IoFuture<'a, Vec<Extent>> {
        Box::pin(std::future::ready(self.find_extents(offset, length, extents_max)))
    }
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        for (place, at, bytes) in self.pieces(offset, buf.len() as u64) {
            let from = (at - offset) as usize;
            let part = buf.get_mut(from..from + bytes as usize)?;
            match place {
                Place::Zero => part.fill(0),
                // What does not fit is found again, and said, by the read proper.
                Place::Base | Place::Frame(_) if self.fresh.is_some() || self.bulk.is_some() => return None,
                Place::Base => self.try_base(at, part)?,
                Place::Frame(frame) => match self.shared.frames.cached(frame) {
                    Some(decoded) => self.copy(&decoded, at, part)?,
                    None => self.spill.as_ref()?.try_copy(frame.0, self.volume, at, part).then_some(())?,
                },
            }
        }
        Some(Ok(()))
    }
}
