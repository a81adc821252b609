//! Reads frames back out of a group's journal: where they are, open segment files, and a bounded cache of decoded frames.
//!
//! Every read verifies the frame's checksums; a frame that does not fit is an error with file and offset, never data.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use blockdev::{Buf, SharedFile};
use parking_lot::{Mutex, RwLock};
use proto::codec::DecodeError;
use proto::units::BLOCK_BYTES;
use proto::{BlockExtent, Frame};

use crate::disk::read_nowait;
use crate::index::{FrameId, FramePlace, FrameTable};
use crate::journal::segment_path;
use crate::spill::Spill;

/// Decoded bytes kept for one group. When full, the frame that was not used for longest goes.
pub const FRAME_CACHE_BYTES: usize = 8 << 20;
/// Open segment files kept for one group. When full, the one that was not used for longest is closed.
pub const OPEN_SEGMENTS_MAX: usize = 64;

/// Why a frame cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The index speaks of a frame that the table does not have.
    #[error("{}: frame {frame} is not in the journal: this is a defect, please report it", path.display())]
    Unknown {
        /// The journal's folder.
        path: PathBuf,
        /// Its number.
        frame: u32,
    },
    /// The bytes in the journal are not the frame that was committed.
    #[error("{}: the frame at offset {offset} is damaged ({source}): run `twinsite check`", path.display())]
    Damaged {
        /// The segment.
        path: PathBuf,
        /// Where the frame starts.
        offset: u64,
        /// What does not fit.
        source: DecodeError,
    },
    /// The file cannot be read.
    #[error("{}: cannot read the frame at offset {offset}: {source}", path.display())]
    Io {
        /// The segment.
        path: PathBuf,
        /// Where the frame starts.
        offset: u64,
        /// Why.
        source: io::Error,
    },
}

/// Which blocks a frame has, and where in its content.
#[derive(Debug)]
pub(crate) struct Layout {
    volume: u16,
    /// First block, how many, and the position of the first one's content in blocks.
    extents: Vec<(u64, u32, u32)>,
}

impl Layout {
    /// The positions in the content, in blocks, of `block` and those that follow it in its extent; `None` if the frame does not hold it.
    pub(crate) fn run(&self, volume: usize, block: u64) -> Option<Range<usize>> {
        if usize::from(self.volume) != volume {
            return None;
        }
        let i = self.extents.partition_point(|(start, ..)| *start <= block).checked_sub(1)?;
        let (start, blocks, at) = *self.extents.get(i)?;
        let skip = block - start;
        (skip < u64::from(blocks)).then(|| at as usize + skip as usize..(at + blocks) as usize)
    }
}

/// A frame's blocks, decoded.
#[derive(Debug)]
pub(crate) struct Decoded {
    layout: Arc<Layout>,
    content: Vec<u8>,
}

impl Decoded {
    pub(crate) fn new(volume: u16, extents: &[BlockExtent], content: Vec<u8>) -> Self {
        let mut at = 0;
        let place = |e: &BlockExtent| {
            let entry = (e.start.0, e.blocks, at);
            at += e.blocks;
            entry
        };
        Self { layout: Arc::new(Layout { volume, extents: extents.iter().map(place).collect() }), content }
    }

    pub(crate) fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// All of it.
    pub(crate) fn content(&self) -> &[u8] {
        &self.content
    }

    /// The content from `block` on, as far as blocks follow each other; `None` if the frame does not hold it.
    pub(crate) fn from(&self, volume: usize, block: u64) -> Option<&[u8]> {
        let run = self.layout.run(volume, block)?;
        self.content.get(run.start * BLOCK_BYTES as usize..run.end * BLOCK_BYTES as usize)
    }
}

/// Decoded frames of one reader, who wants what is on the disk now and not what somebody read before it began. Bounded as the group's.
#[derive(Debug)]
pub(crate) struct FreshFrames(Cache);

impl Default for FreshFrames {
    fn default() -> Self {
        Self(Mutex::new(Lru::new(FRAME_CACHE_BYTES)))
    }
}

/// The frames of a group's journal.
#[derive(Debug)]
pub(crate) struct FrameStore {
    folder: PathBuf,
    volume_blocks: Arc<[u64]>,
    pub(crate) table: RwLock<FrameTable>,
    files: Mutex<Lru<u32, SharedFile>>,
    cache: Cache,
    /// Frames before this one were folded: the base has what they said last.
    folded: AtomicU32,
    /// Decoded frames for the forks there are.
    spill: Mutex<Weak<Spill>>,
}

type Cache = Mutex<Lru<u32, Arc<Decoded>>>;

impl FrameStore {
    pub(crate) fn new(folder: &Path, volume_blocks: Arc<[u64]>) -> Self {
        Self {
            folder: folder.to_owned(),
            volume_blocks,
            table: RwLock::default(),
            files: Mutex::new(Lru::new(OPEN_SEGMENTS_MAX)),
            cache: Mutex::new(Lru::new(FRAME_CACHE_BYTES)),
            folded: AtomicU32::new(0),
            spill: Mutex::default(),
        }
    }

    /// The frame, if it is decoded already.
    pub(crate) fn cached(&self, frame: FrameId) -> Option<Arc<Decoded>> {
        self.cache.lock().get(frame.0)
    }

    /// Forgets decoded frames from `first` on, whose numbers are given again.
    pub(crate) fn forget_from(&self, first: u32) {
        self.cache.lock().retain(|frame| frame < first);
        if let Some(spill) = self.spilled() {
            spill.retain(|frame| frame < first);
        }
    }

    /// Decoded frames in a file of the journal's folder, for a fork; it is there as long as a fork has it. `None` if the file system cannot do that.
    pub(crate) fn spill(&self) -> Option<Arc<Spill>> {
        let mut known = self.spill.lock();
        if let Some(spill) = known.upgrade() {
            return Some(spill);
        }
        match Spill::new(&self.folder) {
            Ok(spill) => {
                let spill = Arc::new(spill);
                *known = Arc::downgrade(&spill);
                Some(spill)
            }
            Err(error) => {
                tracing::info!("{}: forks keep decoded frames in memory only: {error}", self.folder.display());
                None
            }
        }
    }

    /// The same, if there is one.
    pub(crate) fn spilled(&self) -> Option<Arc<Spill>> {
        self.spill.lock().upgrade()
    }

    /// Whether the base has the blocks of this frame. Whoever holds an index from before the fold is sent there: its point is not before that of
    /// the base, so what it wants of the frame was the last word at the base's point too.
    pub(crate) fn is_folded(&self, frame: FrameId) -> bool {
        frame.0 < self.folded.load(Ordering::Acquire)
    }

    /// The frames before `first` were folded, and segments before `segment` are about to go.
    pub(crate) fn fold_before(&self, first: u32, segment: u32) {
        self.folded.store(first, Ordering::Release);
        self.table.write().forget_before(first);
        self.cache.lock().retain(|frame| frame >= first);
        if let Some(spill) = self.spilled() {
            spill.retain(|frame| frame >= first);
        }
        self.files.lock().retain(|number| number >= segment);
    }

    /// Bytes of decoded frames held now.
    pub(crate) fn cache_bytes(&self) -> usize {
        self.cache.lock().used
    }

    /// Reads, verifies and decodes a frame; on an io thread, which does not wait for the disk.
    pub(crate) async fn load(&self, frame: FrameId, fresh: Option<&FreshFrames>) -> Result<Arc<Decoded>, FrameError> {
        let cache = fresh.map_or(&self.cache, |fresh| &fresh.0);
        if let Some(decoded) = cache.lock().get(frame.0) {
            return Ok(decoded);
        }
        let (place, file) = self.place(frame)?;
        let bytes = bytes(place, &file).await.map_err(|source| self.unread(place, source))?;
        self.decode(cache, frame, place, &bytes)
    }

    /// As [`load`](Self::load), on this thread, which waits for the disk.
    #[cfg(any(test, feature = "simulation"))]
    pub(crate) fn load_now(&self, frame: FrameId, fresh: Option<&FreshFrames>) -> Result<Arc<Decoded>, FrameError> {
        let cache = fresh.map_or(&self.cache, |fresh| &fresh.0);
        if let Some(decoded) = cache.lock().get(frame.0) {
            return Ok(decoded);
        }
        let (place, file) = self.place(frame)?;
        let read = || -> io::Result<Buf> {
            let mut buf = room(place, &file)?;
            std::os::unix::fs::FileExt::read_exact_at(file.file(), &mut buf, place.offset)?;
            Ok(buf)
        };
        let bytes = read().map_err(|source| self.unread(place, source))?;
        self.decode(cache, frame, place, &bytes)
    }

    /// Where a frame is, and the file that it is in: together, because thinning gives it another place in another file under the same name.
    fn place(&self, frame: FrameId) -> Result<(FramePlace, SharedFile), FrameError> {
        let table = self.table.read();
        let place = table.get(frame).ok_or_else(|| FrameError::Unknown { path: self.folder.clone(), frame: frame.0 })?;
        let file = self.file(place.segment).map_err(|source| self.unread(place, source))?;
        Ok((place, file))
    }

    fn unread(&self, place: FramePlace, source: io::Error) -> FrameError {
        FrameError::Io { path: segment_path(&self.folder, place.segment), offset: place.offset, source }
    }

    fn decode(&self, cache: &Cache, id: FrameId, place: FramePlace, bytes: &[u8]) -> Result<Arc<Decoded>, FrameError> {
        let damaged =
            |source| FrameError::Damaged { path: segment_path(&self.folder, place.segment), offset: place.offset, source };
        let short = DecodeError::Truncated { what: "frame", needed: 40, left: bytes.len() };
        let head = bytes.first_chunk().ok_or(short.clone()).map_err(damaged)?;
        let header = proto::FrameHeader::decode(head).map_err(damaged)?;
        let whole = bytes.get(..header.frame_bytes()).ok_or(short).map_err(damaged)?;
        let volume = header.volume.0;
        let blocks = self.volume_blocks.get(usize::from(volume)).copied();
        let blocks = blocks.ok_or(DecodeError::Unknown { what: "frame volume", value: volume.into() }).map_err(damaged)?;
        let frame = Frame::decode(whole, blocks).map_err(damaged)?;
        let decoded = Arc::new(Decoded::new(volume, &frame.extents, frame.content().map_err(damaged)?));
        cache.lock().put(id.0, Arc::clone(&decoded), decoded.content.len());
        Ok(decoded)
    }

    fn file(&self, segment: u32) -> io::Result<SharedFile> {
        let mut files = self.files.lock();
        if let Some(file) = files.get(segment) {
            return Ok(file);
        }
        let file = SharedFile::new(File::open(segment_path(&self.folder, segment))?);
        files.put(segment, file.clone(), 1);
        Ok(file)
    }

    /// Closes files of segments from `first` on: they may be removed and made anew.
    pub(crate) fn close_from(&self, first: u32) {
        self.files.lock().retain(|segment| segment < first);
    }

    /// Closes files of these segments: others get their names. To be called while nobody can read the table.
    pub(crate) fn close(&self, segments: &std::ops::RangeInclusive<u32>) {
        self.files.lock().retain(|segment| !segments.contains(&segment));
    }

    /// The error that `frame` does not hold what the index says it does.
    pub(crate) fn mismatch(&self, frame: FrameId) -> FrameError {
        let place = self.table.read().get(frame);
        let (segment, offset) = place.map_or((0, 0), |p| (p.segment, p.offset));
        let source = DecodeError::Rule { what: "frame", rule: "holds the blocks that it held when it was committed" };
        FrameError::Damaged { path: segment_path(&self.folder, segment), offset, source }
    }
}

/// Room for as much as the frame can have.
fn room(place: FramePlace, file: &SharedFile) -> io::Result<Buf> {
    let left = file.file().metadata()?.len().saturating_sub(place.offset);
    Ok(Buf::zeroed(place.bytes_max.min(usize::try_from(left).unwrap_or(usize::MAX))))
}

async fn bytes(place: FramePlace, file: &SharedFile) -> io::Result<Buf> {
    let mut buf = room(place, file)?;
    // The newest frames are in the page cache.
    if read_nowait(file.file(), &mut buf, place.offset) { Ok(buf) } else { file.read_exact_at(place.offset, buf).await }
}

/// A map with a bounded total cost; the entry not used for longest goes first.
#[derive(Debug)]
struct Lru<K, V> {
    entries: std::collections::HashMap<K, (V, usize, u64)>,
    order: std::collections::BTreeMap<u64, K>,
    clock: u64,
    used: usize,
    limit: usize,
}

impl<K: Copy + Eq + std::hash::Hash, V: Clone> Lru<K, V> {
    fn new(limit: usize) -> Self {
        Self { entries: Default::default(), order: Default::default(), clock: 0, used: 0, limit }
    }

    fn get(&mut self, key: K) -> Option<V> {
        let (value, _, stamp) = self.entries.get_mut(&key)?;
        self.clock += 1;
        self.order.remove(stamp);
        self.order.insert(self.clock, key);
        *stamp = self.clock;
        Some(value.clone())
    }

    fn put(&mut self, key: K, value: V, cost: usize) {
        self.remove(key);
        self.clock += 1;
        self.entries.insert(key, (value, cost, self.clock));
        self.order.insert(self.clock, key);
        self.used += cost;
        while self.used > self.limit
            && let Some((_, oldest)) = self.order.first_key_value().map(|(s, k)| (*s, *k))
        {
            self.remove(oldest);
        }
    }

    fn remove(&mut self, key: K) {
        if let Some((_, cost, stamp)) = self.entries.remove(&key) {
            self.order.remove(&stamp);
            self.used -= cost;
        }
    }

    fn retain(&mut self, keep: impl Fn(K) -> bool) {
        let gone: Vec<K> = self.entries.keys().copied().filter(|k| !keep(*k)).collect();
        for key in gone {
            self.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_stays_within_its_limit_and_keeps_what_is_used() {
        let mut lru = Lru::new(10);
        for key in 0..5 {
            lru.put(key, key, 2);
        }
        assert_eq!(lru.get(0), Some(0));
        lru.put(9, 9, 3);
        assert_eq!((lru.get(0), lru.get(1), lru.get(2)), (Some(0), None, None));
        assert!(lru.used <= 10);
        lru.put(0, 7, 2);
        lru.retain(|k| k == 0);
        assert_eq!((lru.used, lru.get(0)), (2, Some(7)));
    }

    #[test]
    fn a_frame_gives_blocks_as_far_as_they_follow_each_other() {
        let extent = |start, blocks| BlockExtent { start: proto::BlockIndex(start), blocks };
        let content: Vec<u8> = (0..3_u8).flat_map(|b| vec![b; 4096]).collect();
        let decoded = Decoded::new(1, &[extent(5, 2), extent(9, 1)], content);
        assert_eq!(decoded.from(1, 5).map(<[u8]>::len), Some(8192));
        assert_eq!(decoded.from(1, 6).map(|c| (c.len(), c[0])), Some((4096, 1)));
        assert_eq!(decoded.from(1, 9).map(|c| (c.len(), c[0])), Some((4096, 2)));
        assert!(decoded.from(1, 7).is_none() && decoded.from(1, 4).is_none() && decoded.from(0, 5).is_none());
    }
}
