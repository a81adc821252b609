//! The dirty log: which regions of a disk may differ from the copy, on stable storage before they do.
//!
//! One small file a volume, one bit a region of 4 MiB. Writes that wait for a bit share one fdatasync: the first of them writes for
//! all that came meanwhile. Bits are cleared lazily, in batches. A clean stop adds the exact map of dirty blocks.
//!
//! What must always hold:
//! - no write is issued to a region whose bit is not durable;
//! - a bit is cleared on disk only after the point that made its region clean is recorded ([`DirtyLog::unset`], then the record, then
//!   [`DirtyLog::write_unset`]), so a receiver that lost that point is noticed;
//! - a sector that cannot be believed means that all its regions are suspect, and is said with file and offset.
//!
//! Fault model: a 512-byte sector is written whole or not at all; an fdatasync that failed is never tried again.

mod format;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockdev::{BlockDevice, Buf};
use parking_lot::Mutex;
use proto::DirtyMap;
use proto::region::REGION_BLOCKS;
use tokio::sync::Notify;

use crate::ledger::Range;
pub(crate) use format::log_bytes;
use format::{Header, SECTOR_BYTES, SECTOR_REGIONS, Sector, bits_offset, decode_bits, encode_bits, map_offset};

/// Regions whose bits are set together when one of them is needed: 32 MiB. Fewer syncs for a guest that goes on next to where it wrote, at the
/// price of comparing more after an unclean stop.
const REGIONS_TOGETHER: u64 = 8;
/// Regions whose bitmaps are read or written at once.
const MAP_REGIONS_AT_ONCE: u64 = 1024;

/// Why a log cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DirtyLogError {
    #[error("dirty log {file}: cannot {what} at offset {offset}: {source}")]
    Io { file: String, what: &'static str, offset: u64, source: io::Error },
}

/// What a log says of its volume at the start.
#[derive(Debug)]
pub(crate) struct Known {
    /// Blocks that must be compared with the copy.
    pub(crate) suspect: DirtyMap,
    /// Blocks that are known to differ.
    pub(crate) dirty: DirtyMap,
}

/// The file of one volume, for [`DirtyLog::open`].
pub(crate) struct LogFile {
    /// As it is named in errors.
    pub(crate) name: String,
    /// At least [`log_bytes`] of the volume.
    pub(crate) device: Arc<dyn BlockDevice>,
    /// Bytes of the volume it speaks of.
    pub(crate) volume_bytes: u64,
}

struct Volume {
    file: LogFile,
    regions: u64,
    /// Regions whose bits are durable; a write to one of them may be issued.
    set: Box<[AtomicU64]>,
    /// Regions written since [`DirtyLog::idle`] looked last.
    touched: Box<[AtomicU64]>,
}

struct State {
    /// Bits that the files hold, or may hold.
    disk: Vec<Vec<u64>>,
    /// Regions that writes wait for.
    wanted: Vec<Vec<u64>>,
    writing: bool,
    /// The first failure; from then on no bit is set any more.
    failed: Option<String>,
}

/// The logs of a group.
pub(crate) struct DirtyLog {
    volumes: Vec<Volume>,
    state: Mutex<State>,
    changed: Notify,
}

fn has(words: &[u64], region: u64) -> bool {
    words.get((region / 64) as usize).is_some_and(|w| w & (1 << (region % 64)) != 0)
}

fn add(words: &mut [u64], region: u64) {
    if let Some(word) = words.get_mut((region / 64) as usize) {
        *word |= 1 << (region % 64);
    }
}

fn remove(words: &mut [u64], region: u64) {
    if let Some(word) = words.get_mut((region / 64) as usize) {
        *word &= !(1 << (region % 64));
    }
}

/// Regions of a bitmap, in order.
fn regions_of(words: &[u64]) -> impl Iterator<Item = u64> + '_ {
    words
        .iter()
        .zip(0_u64..)
        .filter(|(w, _)| **w != 0)
        .flat_map(|(w, i)| (0..64).filter(move |b| w & (1 << b) != 0).map(move |b| i * 64 + b))
}

impl Volume {
    fn new(file: LogFile, disk: &[u64]) -> Self {
        let regions = file.volume_bytes.div_ceil(proto::region::REGION_BYTES);
        let words = |value: &dyn Fn(usize) -> u64| (0..disk.len()).map(|i| AtomicU64::new(value(i))).collect();
        Self { file, regions, set: words(&|i| disk[i]), touched: words(&|_| 0) }
    }

    fn is_set(&self, region: u64) -> bool {
        self.set.get((region / 64) as usize).is_some_and(|w| w.load(Ordering::Acquire) & (1 << (region % 64)) != 0)
    }

    fn set_bit(&self, region: u64) {
        if let Some(word) = self.set.get((region / 64) as usize) {
            word.fetch_or(1 << (region % 64), Ordering::Release);
        }
    }

    fn touch(&self, region: u64) {
        if let Some(word) = self.touched.get((region / 64) as usize) {
            let bit = 1 << (region % 64);
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }
}

impl LogFile {
    async fn read(&self, offset: u64, bytes: usize) -> Result<Buf, DirtyLogError> {
        self.device.read(offset, Buf::zeroed(bytes)).await.map_err(self.failed("read", offset))
    }

    async fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), DirtyLogError> {
        self.device.write(offset, Buf::copy_of(bytes)).await.map(drop).map_err(self.failed("write", offset))
    }

    async fn sync(&self) -> Result<(), DirtyLogError> {
        self.device.flush().await.map_err(self.failed("sync", 0))
    }

    fn failed(&self, what: &'static str, offset: u64) -> impl FnOnce(io::Error) -> DirtyLogError {
        let file = self.name.clone();
        move |source| DirtyLogError::Io { file, what, offset, source }
    }

    fn words(&self) -> usize {
        self.volume_bytes.div_ceil(proto::region::REGION_BYTES).div_ceil(64) as usize
    }

    /// Reads a log, or begins one. Afterwards the file says that the volume is in use.
    async fn load(&self) -> Result<(Vec<u64>, Known), DirtyLogError> {
        let nothing = || DirtyMap::new(self.volume_bytes);
        let first = self.read(0, SECTOR_BYTES).await?;
        let header = match Header::decode(&first) {
            Sector::Empty => None,
            Sector::Good(header) if header.volume_bytes != self.volume_bytes => {
                let (found, wanted) = (header.volume_bytes, self.volume_bytes);
                tracing::warn!("dirty log {}: the disk has {wanted} bytes, it had {found}; all of it is compared", self.name);
                None
            }
            Sector::Good(header) => Some(header),
            Sector::Bad(error) => {
                tracing::warn!("dirty log {}: {error} at offset 0; all of the disk is compared", self.name);
                None
            }
        };
        let Some(header) = header else {
            let disk = vec![u64::MAX; self.words()];
            for sector in 0..(disk.len() * 64).div_ceil(SECTOR_REGIONS) {
                self.write(bits_offset(sector), &encode_bits(sector, &disk)).await?;
            }
            self.sync().await?;
            self.write(0, &Header { volume_bytes: self.volume_bytes, clean: None }.encode()).await?;
            self.sync().await?;
            return Ok((disk, Known { suspect: DirtyMap::full(self.volume_bytes), dirty: nothing() }));
        };
        let mut disk = vec![0; self.words()];
        let mut whole = true;
        for sector in 0..(disk.len() * 64).div_ceil(SECTOR_REGIONS) {
            let bytes = self.read(bits_offset(sector), SECTOR_BYTES).await?;
            if let Err(error) = decode_bits(&bytes, sector, &mut disk) {
                whole = false;
                let offset = bits_offset(sector);
                tracing::warn!(
                    "dirty log {}: {error} at offset {offset}; the part of the disk that it covers is compared",
                    self.name
                );
                let first = (sector * SECTOR_REGIONS) as u64;
                (first..first + SECTOR_REGIONS as u64).for_each(|region| add(&mut disk, region));
            }
            // Also what reads well: after a sync that failed, the system's cache has bits that no later sync brings to the disk.
            self.write(bits_offset(sector), &encode_bits(sector, &disk)).await?;
        }
        let mut exact = None;
        if let Some(digest) = header.clean.filter(|_| whole) {
            exact = self.load_map(&disk, digest).await?;
            if exact.is_none() {
                let offset = map_offset(self.volume_bytes, 0);
                tracing::warn!(
                    "dirty log {}: the maps of a clean stop, from offset {offset} on, do not fit their digest; what they cover is compared",
                    self.name
                );
            }
        }
        // From here on the map is out of date.
        self.write(0, &Header { volume_bytes: self.volume_bytes, clean: None }.encode()).await?;
        self.sync().await?;
        let known = match exact {
            Some(dirty) => Known { suspect: nothing(), dirty },
            None => {
                let mut suspect = nothing();
                regions_of(&disk).for_each(|region| suspect.mark(region * REGION_BLOCKS, REGION_BLOCKS));
                Known { suspect, dirty: nothing() }
            }
        };
        Ok((disk, known))
    }

    /// The exact map of the marked regions; `None` if it is not what was written.
    async fn load_map(&self, disk: &[u64], digest: [u8; 32]) -> Result<Option<DirtyMap>, DirtyLogError> {
        let mut map = DirtyMap::new(self.volume_bytes);
        let mut hasher = blake3::Hasher::new();
        let mut marked = regions_of(disk).peekable();
        while let Some(first) = marked.peek().copied() {
            let count = MAP_REGIONS_AT_ONCE.min(disk.len() as u64 * 64 - first);
            let length = count as usize * proto::dirty::REGION_BITMAP_BYTES;
            let bytes = self.read(map_offset(self.volume_bytes, first), length).await?;
            while let Some(region) = marked.next_if(|region| *region < first + count) {
                let at = (region - first) as usize * proto::dirty::REGION_BITMAP_BYTES;
                let Some(bits) = bytes[at..].first_chunk() else { continue };
                format::hash_region(&mut hasher, region, bits);
                map.mark_bits(region, bits);
            }
        }
        Ok((*hasher.finalize().as_bytes() == digest).then_some(map))
    }
}

impl DirtyLog {
    /// Reads the logs, or begins them. Must run on an io thread.
    ///
    /// # Errors
    /// [`DirtyLogError`]; a damaged log is no error, it makes blocks suspect.
    pub(crate) async fn open(files: Vec<LogFile>) -> Result<(Self, Vec<Known>), DirtyLogError> {
        let (mut volumes, mut known, mut disks) = (Vec::new(), Vec::new(), Vec::new());
        for file in files {
            let (disk, of_volume) = file.load().await?;
            volumes.push(Volume::new(file, &disk));
            known.push(of_volume);
            disks.push(disk);
        }
        let wanted = disks.iter().map(|d| vec![0; d.len()]).collect();
        let state = Mutex::new(State { disk: disks, wanted, writing: false, failed: None });
        Ok((Self { volumes, state, changed: Notify::new() }, known))
    }

    /// Volumes of the group.
    pub(crate) fn volume_count(&self) -> usize {
        self.volumes.len()
    }

    /// Whether a write to these blocks may be issued at once. The write's mark must be in the ledger before this is asked.
    pub(crate) fn covers(&self, range: &Range) -> bool {
        let Some(volume) = self.volumes.get(range.volume) else { return false };
        let (first, last) = (range.first / REGION_BLOCKS, (range.first + range.count - 1) / REGION_BLOCKS);
        let covered = (first..=last).all(|region| volume.is_set(region));
        if covered {
            (first..=last).for_each(|region| volume.touch(region));
        }
        covered
    }

    /// Waits until the bits of these blocks are durable. The write's mark must be in the ledger before, or [`covers`](Self::covers) be asked once it is.
    ///
    /// # Errors
    /// When the log cannot be written: the write must then fail too, or a crash would forget it.
    pub(crate) async fn cover(&self, range: &Range) -> io::Result<()> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.covers(range) {
                return Ok(());
            }
            let batch = {
                let mut state = self.state.lock();
                if let Some(failure) = &state.failed {
                    return Err(io::Error::other(failure.clone()));
                }
                self.want(&mut state, range);
                self.begin(&mut state)
            };
            match batch {
                Some(batch) => self.write_batch(batch).await,
                None => changed.await,
            }
        }
    }

    /// As [`cover`](Self::cover), of all blocks of `maps`, by volume.
    ///
    /// # Errors
    /// As [`cover`](Self::cover).
    pub(crate) async fn cover_maps(&self, maps: &[DirtyMap]) -> io::Result<()> {
        let mut ranges: Vec<Range> = Vec::new();
        for (volume, map) in maps.iter().enumerate() {
            let mut at = 0;
            while let Some(run) = map.next_run(at, 1) {
                let first = run.start.0 / REGION_BLOCKS * REGION_BLOCKS;
                at = first + REGION_BLOCKS;
                match ranges.last_mut().filter(|last| last.volume == volume && last.first + last.count == first) {
                    Some(last) => last.count += REGION_BLOCKS,
                    None => ranges.push(Range { volume, first, count: REGION_BLOCKS }),
                }
            }
        }
        // At once, so that they share a sync.
        futures_util::future::try_join_all(ranges.iter().map(|range| self.cover(range))).await.map(drop)
    }

    /// Makes every region marked: nothing is known of the copy any more.
    ///
    /// # Errors
    /// As [`cover`](Self::cover).
    pub(crate) async fn cover_all(&self) -> io::Result<()> {
        for (volume, of) in self.volumes.iter().enumerate() {
            self.cover(&Range { volume, first: 0, count: proto::units::blocks_of(of.file.volume_bytes) }).await?;
        }
        Ok(())
    }

    fn want(&self, state: &mut State, range: &Range) {
        let (Some(volume), Some(wanted)) = (self.volumes.get(range.volume), state.wanted.get_mut(range.volume)) else { return };
        let (first, last) = (range.first / REGION_BLOCKS, (range.first + range.count - 1) / REGION_BLOCKS);
        let (first, end) = (first / REGIONS_TOGETHER * REGIONS_TOGETHER, (last + 1).next_multiple_of(REGIONS_TOGETHER));
        for region in (first..end.min(volume.regions)).filter(|region| !volume.is_set(*region)) {
            add(wanted, region);
        }
    }

    /// Takes what is wanted, unless another one is writing.
    fn begin(&self, state: &mut State) -> Option<Batch<'_>> {
        if state.writing {
            return None;
        }
        state.writing = true;
        let bits = state.wanted.iter_mut().map(|w| std::mem::replace(w, vec![0; w.len()])).collect();
        Some(Batch { log: self, bits })
    }

    /// Makes the bits of a batch durable, then lets the writes go.
    async fn write_batch(&self, batch: Batch<'_>) {
        let sectors: Vec<(usize, u64, [u8; SECTOR_BYTES])> = {
            let mut state = self.state.lock();
            let mut sectors = Vec::new();
            for (volume, bits) in batch.bits.iter().enumerate() {
                let disk = &mut state.disk[volume];
                // What is there already need not be written again: a bit that was unset in memory only.
                let new: Vec<u64> = regions_of(bits).filter(|region| !has(disk, *region)).collect();
                new.iter().for_each(|region| add(disk, *region));
                let mut numbers: Vec<usize> = new.iter().map(|region| *region as usize / SECTOR_REGIONS).collect();
                numbers.dedup();
                sectors.extend(numbers.into_iter().map(|n| (volume, bits_offset(n), encode_bits(n, disk))));
            }
            sectors
        };
        match self.write_sectors(&sectors).await {
            Ok(()) => {
                for (volume, bits) in self.volumes.iter().zip(&batch.bits) {
                    for (set, bits) in volume.set.iter().zip(bits).filter(|(_, bits)| **bits != 0) {
                        set.fetch_or(*bits, Ordering::Release);
                    }
                }
            }
            Err(error) => {
                let failure =
                    format!("{error}; writes to parts of the disk not written before are refused: check the disk of state_dir");
                tracing::error!("{failure}");
                self.state.lock().failed.get_or_insert(failure);
            }
        }
        // Ends the turn and wakes those who wait.
        drop(batch);
    }

    async fn write_sectors(&self, sectors: &[(usize, u64, [u8; SECTOR_BYTES])]) -> Result<(), DirtyLogError> {
        for (volume, offset, bytes) in sectors {
            self.volumes[*volume].file.write(*offset, bytes).await?;
        }
        for (index, volume) in self.volumes.iter().enumerate() {
            if sectors.iter().any(|(of, _, _)| *of == index) {
                volume.file.sync().await?;
            }
        }
        Ok(())
    }

    /// Why bits cannot be set any more, if so.
    pub(crate) fn failure(&self) -> Option<String> {
        self.state.lock().failed.clone()
    }

    /// Marked regions of a volume that were not written since this was asked last.
    pub(crate) fn idle(&self, volume: usize) -> Vec<u64> {
        let Some(volume) = self.volumes.get(volume) else { return Vec::new() };
        let words = volume.set.iter().zip(&volume.touched);
        let idle: Vec<u64> =
            words.map(|(set, touched)| set.load(Ordering::Acquire) & !touched.swap(0, Ordering::Relaxed)).collect();
        regions_of(&idle).collect()
    }

    /// Forgets a bit in memory; the file keeps it for now. Called under the ledger's lock, for a region without a mark: a write that
    /// is admitted later finds the bit gone and sets it again.
    pub(crate) fn unset(&self, volume: usize, region: u64) {
        if let Some(word) = self.volumes.get(volume).and_then(|v| v.set.get((region / 64) as usize)) {
            word.fetch_and(!(1 << (region % 64)), Ordering::AcqRel);
        }
    }

    /// Takes [`unset`](Self::unset) back, of regions by volume whose bits are in the files still.
    pub(crate) fn set_again(&self, unset: &[Vec<u64>]) {
        for (volume, regions) in self.volumes.iter().zip(unset) {
            regions.iter().for_each(|region| volume.set_bit(*region));
        }
    }

    /// Clears in the files the bits that were unset and not set again. What made their regions clean must be recorded durably.
    ///
    /// # Errors
    /// [`DirtyLogError`]; the bits then stay, which costs a comparison at most.
    pub(crate) async fn write_unset(&self, unset: &[Vec<u64>]) -> Result<(), DirtyLogError> {
        let turn = loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let turn = {
                let mut state = self.state.lock();
                if state.failed.is_some() {
                    // Nothing of them was cleared in the files, and nothing can be set there any more: writes there may go on.
                    self.set_again(unset);
                    return Ok(());
                }
                self.begin(&mut state)
            };
            match turn {
                Some(turn) => break turn,
                None => changed.await,
            }
        };
        let mut sectors = Vec::new();
        {
            let mut state = self.state.lock();
            // What came meanwhile waits for the next turn.
            for (wanted, taken) in state.wanted.iter_mut().zip(&turn.bits) {
                wanted.iter_mut().zip(taken).for_each(|(w, t)| *w |= t);
            }
            let State { disk, wanted, .. } = &mut *state;
            for (volume, regions) in unset.iter().enumerate() {
                let mut numbers = Vec::new();
                for region in regions {
                    if !self.volumes[volume].is_set(*region) && !has(&wanted[volume], *region) && has(&disk[volume], *region) {
                        remove(&mut disk[volume], *region);
                        numbers.push(*region as usize / SECTOR_REGIONS);
                    }
                }
                numbers.dedup();
                sectors.extend(numbers.into_iter().map(|n| (volume, bits_offset(n), encode_bits(n, &disk[volume]))));
            }
        }
        let mut result = Ok(());
        for (volume, offset, bytes) in &sectors {
            result = result.and(self.volumes[*volume].file.write(*offset, bytes).await);
        }
        drop(turn);
        result
    }

    /// Saves the exact maps: the next start compares nothing. Nothing may be written to the volumes any more.
    ///
    /// # Errors
    /// [`DirtyLogError`]; the next start then compares the marked regions.
    pub(crate) async fn save(&self, maps: &[DirtyMap]) -> Result<(), DirtyLogError> {
        let disks = self.state.lock().disk.clone();
        for ((volume, map), disk) in self.volumes.iter().zip(maps).zip(&disks) {
            let file = &volume.file;
            let mut hasher = blake3::Hasher::new();
            let mut marked = regions_of(disk).peekable();
            while let Some(first) = marked.next() {
                let mut bytes = map.region_bits(first).to_vec();
                format::hash_region(&mut hasher, first, &map.region_bits(first));
                let mut next = first + 1;
                while next - first < MAP_REGIONS_AT_ONCE && marked.next_if_eq(&next).is_some() {
                    let bits = map.region_bits(next);
                    format::hash_region(&mut hasher, next, &bits);
                    bytes.extend_from_slice(&bits);
                    next += 1;
                }
                file.write(map_offset(file.volume_bytes, first), &bytes).await?;
            }
            file.sync().await?;
            let clean = Some(*hasher.finalize().as_bytes());
            file.write(0, &Header { volume_bytes: file.volume_bytes, clean }.encode()).await?;
            file.sync().await?;
        }
        Ok(())
    }
}

/// The turn of whoever writes; ends also when the write that made it is dropped half way.
struct Batch<'a> {
    log: &'a DirtyLog,
    bits: Vec<Vec<u64>>,
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        self.log.state.lock().writing = false;
        self.log.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests;
