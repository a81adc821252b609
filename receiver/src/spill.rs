//! Decoded frames in a file without a name: a fork is read in small pieces all over, and each would decode a frame of up to 128 KiB again.
//!
//! Owns the file, which is on the store's file system, and what is where in it. Shared by the forks of a group, active copy and drills; it is gone
//! with the last of them, and with the process. Always holds: what is given out fits the checksum that was made when the frame was decoded
//! and verified; nothing in it is durable, and nothing is lost with it. It takes no space that the next epoch or a drill's writes need.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use blockdev::{BlockDevice, Buf, FileDevice, OpenOptions};
use parking_lot::{Mutex, RwLock};
use proto::frame::FRAME_CONTENT_BYTES_MAX;
use proto::units::BLOCK_BYTES;
use rand::Rng;

use crate::frames::{Decoded, Layout};

/// Bytes of decoded frames kept for the forks of one group. When full, any of them makes room for a new one: who reads all of a disk again and
/// again would always find the oldest gone.
pub const SPILL_BYTES_MAX: u64 = 2 << 30;
/// Room of a frame. Smaller ones leave the rest of it a hole.
const SLOT_BYTES: u64 = FRAME_CONTENT_BYTES_MAX as u64;
const SLOTS_MAX: usize = (SPILL_BYTES_MAX / SLOT_BYTES) as usize;
/// The file system's free space is looked at again after so many frames: 4 MiB.
const LOOK_EVERY_FRAMES: u32 = 32;
/// Numbers of frames for which it is remembered that they were decoded, up to the remainder.
const SEEN_FRAMES: u32 = 65_536;
/// Frames kept in a second while the group receives, 8 MiB: each is a write of 128 KiB, and the epochs that arrive have the disk first.
const FRAMES_A_SECOND: u32 = 64;
/// A group receives for so long after the last byte: longer than most intervals of epochs.
const RECEIVES_FOR: Duration = Duration::from_secs(3);

/// The file.
#[derive(Debug)]
pub(crate) struct Spill {
    device: FileDevice,
    folder: PathBuf,
    slots_max: usize,
    table: RwLock<Table>,
    /// For what the device does not do.
    file: OwnedFd,
    seen: Vec<AtomicU32>,
    offered: AtomicU32,
    /// There was no space at the last look.
    is_short: AtomicBool,
    pace: Mutex<Pace>,
}

/// How many frames are kept while the group receives.
#[derive(Debug, Default)]
struct Pace {
    /// What it had received at the last look, and when that was found to have grown.
    received: Option<u64>,
    grown: Option<Instant>,
    /// A second that began then, and the frames kept in it.
    second: Option<Instant>,
    frames: u32,
}

impl Pace {
    /// Whether a frame may be kept now, by a group that has received so many bytes.
    fn admits(&mut self, received: u64, now: Instant) -> bool {
        if self.received.replace(received).is_some_and(|before| before != received) {
            self.grown = Some(now);
        }
        if self.grown.is_none_or(|grown| now.duration_since(grown) > RECEIVES_FOR) {
            return true;
        }
        if self.second.is_none_or(|second| now.duration_since(second) >= Duration::from_secs(1)) {
            (self.second, self.frames) = (Some(now), 0);
        }
        self.frames += 1;
        self.frames <= FRAMES_A_SECOND
    }
}

#[derive(Debug, Default)]
struct Table {
    frames: HashMap<u32, Arc<Slot>>,
    /// The frame of each slot that was ever used; `None`: it is free, or being written.
    slots: Vec<Option<u32>>,
    free: Vec<u32>,
    bytes: u64,
}

/// A frame that is kept.
#[derive(Debug)]
struct Slot {
    number: u32,
    layout: Arc<Layout>,
    /// CRC-32 of each block of its content.
    sums: Box<[u32]>,
}

impl Slot {
    fn bytes(&self) -> u64 {
        self.sums.len() as u64 * BLOCK_BYTES
    }

    fn offset(&self, block: usize) -> u64 {
        u64::from(self.number) * SLOT_BYTES + block as u64 * BLOCK_BYTES
    }

    /// Whether whole blocks from position `block` of its content on are what was decoded.
    fn fits(&self, block: usize, content: &[u8]) -> bool {
        let blocks = content.chunks(BLOCK_BYTES as usize);
        let sums = self.sums.get(block..block + blocks.len()).unwrap_or_default();
        sums.len() == blocks.len() && blocks.zip(sums).all(|(block, sum)| crc32fast::hash(block) == *sum)
    }
}

impl Table {
    /// A slot to write to: a free one, a new one while there may be more, or that of any frame.
    fn take(&mut self, slots_max: usize) -> Option<u32> {
        if let Some(number) = self.free.pop() {
            return Some(number);
        }
        if self.slots.len() < slots_max {
            self.slots.push(None);
            return u32::try_from(self.slots.len() - 1).ok();
        }
        let number = rand::rng().random_range(0..self.slots.len());
        // One that is being written is left alone; the next frame has better luck.
        let frame = self.slots.get(number).copied().flatten()?;
        self.remove(frame);
        self.free.pop()
    }

    fn remove(&mut self, frame: u32) {
        let Some(slot) = self.frames.remove(&frame) else { return };
        self.bytes -= slot.bytes();
        if let Some(of_slot) = self.slots.get_mut(slot.number as usize) {
            *of_slot = None;
        }
        self.free.push(slot.number);
    }
}

impl Spill {
    /// A new one in `folder`, empty.
    ///
    /// # Errors
    /// The system's: the file system may not offer files without a name.
    pub(crate) fn new(folder: &Path) -> io::Result<Self> {
        Self::of(folder, SLOTS_MAX)
    }

    fn of(folder: &Path, slots_max: usize) -> io::Result<Self> {
        use rustix::fs::{Mode, OFlags};
        let file = rustix::fs::open(folder, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let options = OpenOptions { create_size: Some(slots_max as u64 * SLOT_BYTES), ..OpenOptions::default() };
        let device = FileDevice::open(path, options).map_err(io::Error::other)?;
        let seen = (0..SEEN_FRAMES / u32::BITS).map(|_| AtomicU32::new(0)).collect();
        Ok(Self {
            device,
            folder: folder.to_owned(),
            slots_max,
            table: RwLock::default(),
            file,
            seen,
            offered: AtomicU32::new(0),
            is_short: AtomicBool::new(false),
            pace: Mutex::default(),
        })
    }

    /// Bytes of decoded frames in it.
    pub(crate) fn bytes(&self) -> u64 {
        self.table.read().bytes
    }

    /// Forgets frames: their numbers are given again, or nobody reads them any more.
    pub(crate) fn retain(&self, keep: impl Fn(u32) -> bool) {
        let mut table = self.table.write();
        let gone: Vec<u32> = table.frames.keys().copied().filter(|frame| !keep(*frame)).collect();
        gone.into_iter().for_each(|frame| table.remove(frame));
    }

    /// Copies blocks of a frame from byte `at` of the volume on, if all of them are here and in memory. Returns whether it did; if not, `part` may
    /// have been scribbled on.
    pub(crate) fn try_copy(&self, frame: u32, volume: usize, mut at: u64, mut part: &mut [u8]) -> bool {
        // Held over the reads, so that the slot stays what it is.
        let table = self.table.read();
        let Some(slot) = table.frames.get(&frame) else { return false };
        while !part.is_empty() {
            let Some(run) = slot.layout.run(volume, at / BLOCK_BYTES) else { return false };
            let bytes = part.len().min(run.len() * BLOCK_BYTES as usize);
            if !at.is_multiple_of(BLOCK_BYTES) || !bytes.is_multiple_of(BLOCK_BYTES as usize) {
                return false;
            }
            let (now, later) = part.split_at_mut(bytes);
            let is_read = matches!(self.device.try_read(slot.offset(run.start), now), Some(Ok(())));
            if !is_read || !slot.fits(run.start, now) {
                return false;
            }
            (part, at) = (later, at + bytes as u64);
        }
        true
    }

    /// As [`try_copy`](Self::try_copy), waiting for the disk; on an io thread.
    pub(crate) async fn copy(&self, frame: u32, volume: usize, mut at: u64, mut part: &mut [u8]) -> bool {
        let found = self.table.read().frames.get(&frame).cloned();
        let Some(slot) = found else { return false };
        while !part.is_empty() {
            let Some(run) = slot.layout.run(volume, at / BLOCK_BYTES) else { return false };
            let skip = (at % BLOCK_BYTES) as usize;
            let bytes = part.len().min(run.len() * BLOCK_BYTES as usize - skip);
            let whole = Buf::zeroed((skip + bytes).next_multiple_of(BLOCK_BYTES as usize));
            // If another frame has got the slot meanwhile, it does not fit.
            let content = match self.device.read(slot.offset(run.start), whole).await {
                Ok(content) if slot.fits(run.start, &content) => content,
                _ => {
                    self.forget(frame, &slot);
                    return false;
                }
            };
            let (now, later) = part.split_at_mut(bytes);
            let Some(wanted) = content.get(skip..skip + bytes) else { return false };
            now.copy_from_slice(wanted);
            (part, at) = (later, at + bytes as u64);
        }
        true
    }

    fn forget(&self, frame: u32, slot: &Arc<Slot>) {
        let mut table = self.table.write();
        if table.frames.get(&frame).is_some_and(|kept| Arc::ptr_eq(kept, slot)) {
            table.remove(frame);
        }
    }

    /// Takes a frame that was decoded for `wanted` bytes of it: at once if most of it was decoded for nothing, else if it was decoded before. Who
    /// reads all of a disk once does not pay for what he will not read again. `received` is what the group has received so far: while that grows, few
    /// are kept.
    pub(crate) fn offer(&self, frame: u32, decoded: &Decoded, wanted: usize, received: u64) {
        let (word, bit) = (frame % SEEN_FRAMES / u32::BITS, 1 << (frame % u32::BITS));
        let seen = self.seen.get(word as usize).is_some_and(|word| word.fetch_or(bit, Ordering::Relaxed) & bit != 0);
        if (seen || wanted * 2 <= decoded.content().len()) && self.pace.lock().admits(received, Instant::now()) {
            self.keep(frame, decoded);
        }
    }

    fn keep(&self, frame: u32, decoded: &Decoded) {
        if !self.has_room() {
            return;
        }
        let number = {
            let mut table = self.table.write();
            if table.frames.contains_key(&frame) { None } else { table.take(self.slots_max) }
        };
        // From here on the slot is this frame's alone: neither free nor in the table.
        let Some(number) = number else { return };
        let sums = decoded.content().chunks(BLOCK_BYTES as usize).map(crc32fast::hash).collect();
        let slot = Arc::new(Slot { number, layout: Arc::clone(decoded.layout()), sums });
        // Never waits: while the disk is behind with writing, nothing is kept.
        let written = self.device.try_write(slot.offset(0), decoded.content());
        let mut table = self.table.write();
        if matches!(written, Some(Ok(()))) && !table.frames.contains_key(&frame) {
            table.bytes += slot.bytes();
            if let Some(of_slot) = table.slots.get_mut(number as usize) {
                *of_slot = Some(frame);
            }
            table.frames.insert(frame, slot);
        } else {
            table.free.push(number);
        }
    }

    /// Whether the file system has space for more; if not, what is kept is given back.
    fn has_room(&self) -> bool {
        let is_due = self.offered.fetch_add(1, Ordering::Relaxed).is_multiple_of(LOOK_EVERY_FRAMES);
        if !is_due && !self.is_short.load(Ordering::Relaxed) {
            return true;
        }
        let has_room = crate::drill::has_room(&self.folder).unwrap_or(false);
        self.is_short.store(!has_room, Ordering::Relaxed);
        if !has_room && self.bytes() > 0 {
            self.retain(|_| false);
            let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            if let Err(error) = rustix::fs::fallocate(&self.file, flags, 0, self.device.size()) {
                tracing::debug!(%error, "decoded frames keep their space until they are replaced");
            }
        }
        has_room
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockdev::IoThreads;
    use proto::{BlockExtent, BlockIndex};

    /// Blocks 10 to 29 and 40 to 44 of volume 1, each of them with bytes that only this frame has there.
    fn frame(number: u32) -> Decoded {
        let extents = [(10, 20), (40, 5)].map(|(start, blocks)| BlockExtent { start: BlockIndex(start), blocks });
        let content = (0..25).flat_map(|block| content(number, if block < 20 { 10 + block } else { 20 + block })).collect();
        Decoded::new(1, &extents, content)
    }

    fn content(number: u32, block: u64) -> Vec<u8> {
        let mut content = vec![(number as u8).wrapping_mul(31) ^ block as u8; BLOCK_BYTES as usize];
        content[..8].copy_from_slice(&(u64::from(number) << 32 | block).to_le_bytes());
        content
    }

    /// The bytes of the volume from `at` on as the frame has them; `at` is in one of its extents, and so is the end.
    fn wanted(number: u32, at: u64, length: usize) -> Vec<u8> {
        let blocks = at / BLOCK_BYTES..(at + length as u64).div_ceil(BLOCK_BYTES);
        let bytes: Vec<u8> = blocks.flat_map(|block| content(number, block)).collect();
        bytes[(at % BLOCK_BYTES) as usize..][..length].to_vec()
    }

    fn spill(slots: usize) -> (tempfile::TempDir, Arc<Spill>) {
        let folder = tempfile::tempdir().unwrap();
        let spill = Spill::of(folder.path(), slots).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "it has no name");
        (folder, Arc::new(spill))
    }

    /// Until it is kept: a disk that was slow for a moment is not asked again for up to 2 s.
    fn keep(io: &IoThreads, spill: &Arc<Spill>, number: u32, wanted: usize) {
        let until = Instant::now() + Duration::from_secs(30);
        while !spill.table.read().frames.contains_key(&number) {
            assert!(Instant::now() < until, "frame {number} is not kept");
            offer(io, spill, number, wanted);
        }
    }

    /// As a fork does, on a thread that can tell its own waiting from that for a processor.
    fn offer(io: &IoThreads, spill: &Arc<Spill>, number: u32, wanted: usize) {
        let spill = Arc::clone(spill);
        io.block_on(move || async move { spill.offer(number, &frame(number), wanted, 0) }).unwrap();
    }

    /// Reads that were answered at once.
    static TRIED: AtomicU32 = AtomicU32::new(0);

    /// Both ways of reading; `None` if neither could.
    fn read(io: &IoThreads, spill: &Arc<Spill>, number: u32, at: u64, length: usize) -> Option<Vec<u8>> {
        let spill = Arc::clone(spill);
        io.block_on(move || async move {
            let (mut tried, mut found) = (vec![0xee; length], vec![0xee; length]);
            let is_tried = spill.try_copy(number, 1, at, &mut tried);
            TRIED.fetch_add(u32::from(is_tried), Ordering::Relaxed);
            let is_found = spill.copy(number, 1, at, &mut found).await;
            // It may have been replaced in between.
            assert!(!is_tried || !is_found || tried == found, "at once something else than otherwise");
            if is_tried { Some(tried) } else { is_found.then_some(found) }
        })
        .unwrap()
    }

    /// Would catch a block that is taken from another place of the frame or of another frame, and a part of a block that is not.
    #[test]
    fn blocks_come_back_as_they_were_decoded() {
        let (_folder, spill) = spill(8);
        let io = IoThreads::new(1).unwrap();
        for number in 0..3 {
            keep(&io, &spill, number, 4096);
        }
        assert_eq!(spill.bytes(), 3 * 25 * BLOCK_BYTES);
        for number in 0..3 {
            for (at, length) in [(10, 4096), (12, 8 * 4096), (29, 4096), (40, 5 * 4096)] {
                assert_eq!(read(&io, &spill, number, at * BLOCK_BYTES, length), Some(wanted(number, at * BLOCK_BYTES, length)));
            }
            for (at, length) in [(10 * 4096 + 5, 1), (11 * 4096 + 512, 512), (20 * 4096 + 4000, 9000), (44 * 4096, 100)] {
                assert_eq!(read(&io, &spill, number, at, length), Some(wanted(number, at, length)), "{length} bytes at {at}");
            }
            assert_eq!(read(&io, &spill, number, 30 * BLOCK_BYTES, 4096), None, "a block that it does not have");
        }
        assert!(TRIED.load(Ordering::Relaxed) > 0, "what is in the page cache is read at once");
        spill.retain(|number| number != 1);
        assert_eq!(read(&io, &spill, 1, 10 * BLOCK_BYTES, 4096), None);
        assert_eq!(spill.bytes(), 2 * 25 * BLOCK_BYTES);
    }

    /// Would catch drills that take the disk from the epochs that arrive, and a fork that stays slow although nothing arrives.
    #[test]
    fn few_frames_are_kept_while_the_group_receives() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        let mut kept = |ms: u64, received: u64| {
            let now = begin + Duration::from_millis(ms);
            (0..1000).filter(|_| pace.admits(received, now)).count()
        };
        assert_eq!(kept(0, 500), 1000, "nothing was received since it is there");
        assert_eq!(kept(100, 500), 1000);
        assert_eq!([kept(200, 600), kept(1100, 700), kept(1250, 700)], [64, 0, 64]);
        assert_eq!(kept(4200, 700), 1000, "nothing for three seconds");
        assert_eq!(kept(4300, 701), 64);
    }

    /// Who reads the whole of a frame once does not have it kept, and the second time he has.
    #[test]
    fn what_is_read_once_as_a_whole_is_not_kept() {
        let (_folder, spill) = spill(8);
        let io = IoThreads::new(1).unwrap();
        offer(&io, &spill, 7, 20 * 4096);
        assert_eq!(spill.bytes(), 0);
        keep(&io, &spill, 7, 20 * 4096);
        assert_eq!(spill.bytes(), 25 * BLOCK_BYTES);
        offer(&io, &spill, 7, 4096);
        assert_eq!(spill.bytes(), 25 * BLOCK_BYTES, "once");
    }

    /// Would catch a bit that flips in the file and is served.
    #[test]
    fn what_is_not_what_was_decoded_is_forgotten() {
        let (_folder, spill) = spill(8);
        let io = IoThreads::new(1).unwrap();
        keep(&io, &spill, 3, 4096);
        let mut block = content(3, 12);
        block[2000] ^= 1;
        rustix::io::pwrite(&spill.file, &block, 2 * BLOCK_BYTES).unwrap();
        assert_eq!(read(&io, &spill, 3, 12 * BLOCK_BYTES, 4096), None);
        assert_eq!(spill.bytes(), 0);
        keep(&io, &spill, 3, 4096);
        assert_eq!(read(&io, &spill, 3, 12 * BLOCK_BYTES, 4096), Some(wanted(3, 12 * BLOCK_BYTES, 4096)));
    }

    /// Few slots, many frames, several threads that keep, read and forget: what is given out is right, and the limit holds.
    #[test]
    fn slots_that_change_hands_never_show_another_frame() {
        let (_folder, spill) = spill(4);
        let mut hits = 0;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3_u32)
                .map(|thread| {
                    let spill = &spill;
                    scope.spawn(move || {
                        let (io, began, mut hits) = (IoThreads::new(1).unwrap(), Instant::now(), 0);
                        for turn in 0..u32::MAX {
                            // Longer where the disk was slow for a moment and was not asked for some time.
                            if turn >= 2000 && (hits > 100 || began.elapsed() > Duration::from_secs(30)) {
                                break;
                            }
                            let number = turn.wrapping_mul(2_654_435_761 + 2 * thread) >> 28;
                            let at = 10 * BLOCK_BYTES + u64::from(turn % 16) * BLOCK_BYTES;
                            match read(&io, spill, number, at, 8192) {
                                Some(found) => {
                                    assert!(found == wanted(number, at, 8192), "frame {number} in turn {turn}");
                                    hits += 1;
                                }
                                None => offer(&io, spill, number, 4096),
                            }
                            if turn % 100 == 0 {
                                spill.retain(|frame| frame % 3 != turn % 3);
                            }
                            assert!(spill.bytes() <= 4 * 25 * BLOCK_BYTES);
                        }
                        hits
                    })
                })
                .collect();
            for thread in threads {
                hits += thread.join().unwrap();
            }
        });
        assert!(hits > 300, "{hits} reads were served");
        let table = spill.table.read();
        let mut numbers: Vec<u32> = table.frames.values().map(|slot| slot.number).chain(table.free.iter().copied()).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (0..table.slots.len() as u32).collect::<Vec<_>>(), "each slot is a frame's, or free");
    }
}
