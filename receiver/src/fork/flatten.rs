//! Turns a fork into plain raw files while it runs: every block of the view that was not written is copied, in order, behind the
//! guest.
//!
//! Always holds: a block is copied under its exclusive range lock and only if it is not resident, so a guest's write is never undone;
//! a copied bit is on disk only after the data was synced; the view is given up when all bits of all blocks are durable. It stops at any
//! instant and goes on from what the maps say. The guest goes first: a thread of low priority, pieces that hold a lock for
//! milliseconds, and while the guest is busy three quarters of the time nothing.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockdev::steps::{Step, reach};
use blockdev::{BlockDevice, Buf, ExtentKind, IoThreads, ZeroMode};
use parking_lot::Mutex;
use proto::DirtyMap;
use proto::units::BLOCK_BYTES;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, oneshot, watch};

use super::device::ForkDevice;
use super::map::{MapFile, PAGE_BLOCKS, page_of};
use super::own::{REGION_BLOCKS, regions_bytes};
use super::{FLAT_FILE, ForkError, OpenFork, header};
use crate::group::Shared;
use crate::scrub::is_damage;
use crate::view::View;

/// Blocks that are copied under one lock: 256 KiB, some milliseconds for a guest's write that wants them.
const PIECE_BLOCKS: u64 = 64;
/// Blocks of a hole that are entered under one lock; no data is moved for them.
const HOLE_BLOCKS: u64 = PAGE_BLOCKS;
/// Bytes copied between two syncs: what may be copied once more after a crash.
const SYNC_BYTES: u64 = 16 << 20;
/// The same while the guest is busy: its flush has to wait for what was copied since.
const BUSY_SYNC_BYTES: u64 = 2 << 20;
/// While the guest is busy, so many times as long as a piece took nothing is done after it.
const GIVE_WAY: u32 = 3;
/// How often regions that are settled are forgotten. One that a guest goes on writing to stays for a second turn.
const SETTLE_EVERY: Duration = Duration::from_secs(10);
/// From a failure to the next try.
const RETRY_AFTER: Duration = Duration::from_secs(30);
/// Space that is left to the others on the store's disk: a sixteenth of it, at most this.
const FREE_BYTES_MAX: u64 = 1 << 30;

/// What flattening is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlattenState {
    /// It waits: for another fork that is being flattened, for space, or after an error.
    #[default]
    Waiting,
    /// It copies.
    Copying,
    /// Everything is copied but what is damaged in the journal.
    Incomplete,
    /// The data files are the whole disks.
    Flat,
}

/// How far a fork is flattened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlattenStatus {
    /// What it is doing.
    pub state: FlattenState,
    /// Bytes that are in the data files, holes included.
    pub done_bytes: u64,
    /// Bytes of all disks.
    pub total_bytes: u64,
    /// Bytes that become resident in a second, of late.
    pub rate_bytes_per_s: u64,
    /// Seconds until it is done at that rate.
    pub left_s: Option<u64>,
    /// Bytes that cannot be copied because their frames are damaged.
    pub damaged_bytes: u64,
    /// Why it waits, one line.
    pub error: Option<String>,
}

/// The flattening of an open fork, and what keeps its maps exact afterwards.
#[derive(Debug)]
pub(crate) struct Flattening {
    fork: Arc<OpenFork>,
    progress: Arc<Mutex<Progress>>,
    stop: watch::Sender<bool>,
    ended: oneshot::Receiver<()>,
    io: IoThreads,
}

#[derive(Debug, Default)]
struct Progress {
    state: FlattenState,
    error: Option<String>,
    damaged_blocks: u64,
    rate: Option<f64>,
}

impl Flattening {
    /// Starts it. `turn` has one permit, so that one fork is flattened at a time.
    pub(crate) fn start(shared: Arc<Shared>, fork: Arc<OpenFork>, turn: Arc<Semaphore>) -> io::Result<Self> {
        let io = IoThreads::new(1)?;
        let (stop, stopped) = watch::channel(false);
        let (end, ended) = oneshot::channel();
        let progress: Arc<Mutex<Progress>> = Arc::default();
        let work = Work { shared, fork: Arc::clone(&fork), progress: Arc::clone(&progress), stopped };
        io.spawn(move || async move {
            // Without the right to be nicer nothing breaks.
            if let Err(error) = blockdev::yield_to_others() {
                tracing::debug!(%error, "the flattening thread keeps its priority");
            }
            tokio::join!(work.copy(&turn), work.settle());
            let _ = end.send(());
        });
        Ok(Self { fork, progress, stop, ended, io })
    }

    pub(crate) fn status(&self) -> FlattenStatus {
        let progress = self.progress.lock();
        let total_bytes = self.fork.volumes.iter().map(|(_, device)| device.size()).sum();
        let done_bytes = self.fork.volumes.iter().map(|(_, device)| device.resident_bytes()).sum();
        let rate = progress.rate.filter(|_| progress.state == FlattenState::Copying).unwrap_or(0.0);
        let left = (rate >= 1.0).then(|| (total_bytes - done_bytes) as f64 / rate);
        FlattenStatus {
            state: progress.state,
            done_bytes,
            total_bytes,
            rate_bytes_per_s: rate as u64,
            left_s: left.map(|s| s.ceil() as u64),
            damaged_bytes: progress.damaged_blocks * BLOCK_BYTES,
            error: progress.error.clone(),
        }
    }

    /// Ends it in order: what was copied and written is in the maps, exactly.
    pub(crate) async fn stop(self) {
        let _ = self.stop.send(true);
        let _ = self.ended.await;
        // Its thread is joined, which waits.
        let _ = tokio::task::spawn_blocking(move || drop(self.io)).await;
    }
}

struct Work {
    shared: Arc<Shared>,
    fork: Arc<OpenFork>,
    progress: Arc<Mutex<Progress>>,
    stopped: watch::Receiver<bool>,
}

/// Told to stop.
struct Stopped;

/// Why copying does not go on for now.
#[derive(Debug, thiserror::Error)]
enum Halt {
    #[error(transparent)]
    Fork(#[from] ForkError),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the store's disk has {free} bytes left, of which {kept} are kept for others: make space")]
    Space { free: u64, kept: u64 },
}

impl Work {
    async fn wait(&self, time: Duration) -> Result<(), Stopped> {
        let mut stopped = self.stopped.clone();
        tokio::select! {
            _ = stopped.wait_for(|stop| *stop) => Err(Stopped),
            () = tokio::time::sleep(time) => Ok(()),
        }
    }

    /// Copies until nothing is missing, or it is told to stop.
    async fn copy(&self, turn: &Semaphore) {
        let mut stopped = self.stopped.clone();
        let turn = tokio::select! {
            _ = stopped.wait_for(|stop| *stop) => return,
            turn = turn.acquire() => turn,
        };
        loop {
            match self.copy_all().await {
                Ok(Ok(state)) => {
                    self.progress.lock().state = state;
                    break;
                }
                Ok(Err(Stopped)) => return,
                Err(halt) => {
                    let folder = self.shared.folder.fork(&self.fork.name);
                    tracing::error!("{}: flattening waits: {halt}", folder.display());
                    let mut progress = self.progress.lock();
                    (progress.state, progress.error) = (FlattenState::Waiting, Some(halt.to_string()));
                }
            }
            if self.wait(RETRY_AFTER).await.is_err() {
                return;
            }
        }
        drop(turn);
    }

    async fn copy_all(&self) -> Result<Result<FlattenState, Stopped>, Halt> {
        let folder = self.shared.folder.fork(&self.fork.name);
        let marker = folder.join(FLAT_FILE);
        if marker.exists() {
            return Ok(Ok(FlattenState::Flat));
        }
        {
            let mut progress = self.progress.lock();
            (progress.state, progress.error, progress.damaged_blocks) = (FlattenState::Copying, None, 0);
        }
        for (name, device) in &self.fork.volumes {
            let file = |kind: &str| folder.join(format!("{name}.{kind}"));
            let of = |bytes| header(&self.shared, self.fork.point, bytes);
            // The map of touched regions comes first: with the other one there, it has to be.
            let regions = of(regions_bytes(device.size()));
            let (touched, _) = MapFile::open_or_create(&self.shared.disk, &file("touched"), &regions).map_err(ForkError::from)?;
            let (map, _) =
                MapFile::open_or_create(&self.shared.disk, &file("flat"), &of(device.size())).map_err(ForkError::from)?;
            // A copy that is whole takes writes on a full disk too.
            touched.allocate().and_then(|()| device.allocate_map())?;
            reach(Step::FlattenBegun);
            device.begin_copies(touched).await;
            if let Err(Stopped) = self.copy_volume(device, &map, &folder).await? {
                return Ok(Err(Stopped));
            }
        }
        if self.fork.volumes.iter().any(|(_, device)| !device.is_flat()) {
            return Ok(Ok(FlattenState::Incomplete));
        }
        // A block that a guest wrote and nobody flushed is shown after a kill from here on, so its bit has to be there: going back asks for it.
        for (_, device) in &self.fork.volumes {
            device.flush_all().await?;
        }
        reach(Step::FlattenCopied);
        let made = self.shared.disk.create_file(&marker).and_then(|file| file.sync_all());
        made.and_then(|()| self.shared.disk.sync_folder(&folder))?;
        reach(Step::FlattenMarked);
        tracing::info!("{}: flat: its data files are the whole disks", folder.display());
        Ok(Ok(FlattenState::Flat))
    }

    async fn copy_volume(&self, device: &ForkDevice, map: &MapFile, folder: &Path) -> Result<Result<(), Stopped>, Halt> {
        let Some(view) = device.view() else { return Ok(Ok(())) };
        let view = view.for_copying()?;
        let blocks = device.size().div_ceil(BLOCK_BYTES);
        let (mut at, mut unsynced, mut requests) = (0, 0, device.requests());
        let (mut since, mut before) = (Instant::now(), device.resident_bytes());
        while let Some(missing) = device.next_missing(at, blocks) {
            if *self.stopped.borrow() {
                device.sync_copies(map).await?;
                return Ok(Err(Stopped));
            }
            let began = Instant::now();
            let (end, copied) = self.copy_piece(device, &view, missing).await?;
            reach(Step::FlattenPiece);
            at = end;
            unsynced += copied;
            let busy = device.requests() != requests;
            if unsynced >= if busy { BUSY_SYNC_BYTES } else { SYNC_BYTES } {
                device.sync_copies(map).await?;
                check_space(folder)?;
                unsynced = 0;
            }
            if since.elapsed() >= Duration::from_secs(1) {
                let now = device.resident_bytes();
                let rate = now.saturating_sub(before) as f64 / since.elapsed().as_secs_f64();
                let mut progress = self.progress.lock();
                progress.rate = Some(progress.rate.map_or(rate, |known| known * 0.8 + rate * 0.2));
                (since, before) = (Instant::now(), now);
            }
            if !busy {
                tokio::task::yield_now().await;
            } else {
                requests = device.requests();
                // A stop is noticed at the top.
                let _ = self.wait(began.elapsed() * GIVE_WAY).await;
            }
        }
        device.sync_copies(map).await?;
        device.notice_flat();
        Ok(Ok(()))
    }

    /// Copies a first part of what is missing; block by block where a frame is damaged. Returns where it came to, and the bytes moved.
    async fn copy_piece(&self, device: &ForkDevice, view: &View, missing: Range<u64>) -> io::Result<(u64, u64)> {
        let piece = piece(view, &missing)?;
        match device.take_over(view, piece.clone()).await {
            Err(error) if is_damage(&error) => {}
            copied => return Ok((piece.end, copied?)),
        }
        let mut copied = 0;
        for block in piece.clone() {
            match device.take_over(view, block..block + 1).await {
                Err(error) if is_damage(&error) => self.progress.lock().damaged_blocks += 1,
                done => copied += done?,
            }
        }
        Ok((piece.end, copied))
    }

    /// Forgets touched regions whose changes are in the map, for as long as the fork is open; all of them at the end.
    async fn settle(&self) {
        let none = || self.fork.volumes.iter().map(|_| None).collect::<Vec<Option<DirtyMap>>>();
        let mut known = none();
        loop {
            let ended = self.wait(SETTLE_EVERY).await.is_err();
            for ((name, device), known) in self.fork.volumes.iter().zip(&mut known) {
                match device.settle(known.as_ref().filter(|_| !ended)).await {
                    Ok(touched) => *known = touched.filter(|_| !ended),
                    // The guest's next flush says the same.
                    Err(error) => tracing::error!("{}: disk {name}: {error}", self.shared.folder.fork(&self.fork.name).display()),
                }
            }
            if ended {
                return;
            }
        }
    }
}

/// How much of a run of missing blocks is taken at once: much of a hole, little of data.
fn piece(view: &View, missing: &Range<u64>) -> io::Result<Range<u64>> {
    let most = missing.end.min(missing.start + HOLE_BLOCKS);
    let (from, to) = (missing.start * BLOCK_BYTES, (most * BLOCK_BYTES).min(view.size()));
    let hole = match view.find_extents(from, to - from, 1)?.first() {
        Some(extent) if extent.kind != ExtentKind::Data && extent.length == to - from => most,
        Some(extent) if extent.kind != ExtentKind::Data => missing.start + extent.length / BLOCK_BYTES,
        _ => missing.start,
    };
    Ok(missing.start..hole.max(missing.end.min(missing.start + PIECE_BLOCKS)))
}

fn check_space(folder: &Path) -> Result<(), Halt> {
    let found = rustix::fs::statvfs(folder).map_err(io::Error::from)?;
    let (free, all) = (found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize);
    let kept = (all / 16).min(FREE_BYTES_MAX);
    if free < kept { Err(Halt::Space { free, kept }) } else { Ok(()) }
}

/// Runs of equal values: where each begins, and its length.
fn runs(values: &[bool]) -> Vec<(usize, usize)> {
    let mut next = 0;
    let one = |run: &[bool]| {
        let first = next;
        next += run.len();
        (first, run.len())
    };
    values.chunk_by(|a, b| a == b).map(one).collect()
}

impl ForkDevice {
    pub(super) async fn begin_copies(&self, touched: MapFile) {
        let mut touching = self.touching.lock().await;
        if touching.is_none() {
            *touching = Some(touched);
        }
        self.own.write().begin_copies();
    }

    fn next_missing(&self, at: u64, end: u64) -> Option<Range<u64>> {
        self.own.read().missing(at, end)
    }

    /// Copies what is missing of a range. Returns the bytes that were moved.
    pub(super) async fn take_over(&self, view: &View, blocks: Range<u64>) -> io::Result<u64> {
        let _guard = self.locks.lock(blocks.clone(), true).await;
        let (mut at, mut copied) = (blocks.start, 0);
        while let Some(missing) = self.next_missing(at, blocks.end) {
            at = missing.end;
            let (mut offset, end) = (missing.start * BLOCK_BYTES, (missing.end * BLOCK_BYTES).min(self.size()));
            while offset < end {
                let extent = view.find_extents(offset, end - offset, 1)?.first().copied();
                let (kind, length) = extent.map_or((ExtentKind::Data, end - offset), |e| (e.kind, e.length));
                let length = if kind == ExtentKind::Data { length.min(PIECE_BLOCKS * BLOCK_BYTES) } else { length };
                if kind == ExtentKind::Data {
                    let data = view.read(offset, Buf::zeroed(length as usize)).await?;
                    copied += self.put(offset, data).await?;
                } else {
                    self.clear(offset, length).await?;
                }
                offset += length;
            }
            self.own.write().mark_copied(missing);
        }
        Ok(copied)
    }

    /// Writes what is not zeroes of some blocks; the others become holes. Returns the bytes that were written.
    async fn put(&self, offset: u64, data: Buf) -> io::Result<u64> {
        let is_zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
        let blocks: Vec<bool> = data.chunks(BLOCK_BYTES as usize).map(is_zero).collect();
        if !blocks.contains(&true) {
            return Ok(self.data.write(offset, data).await?.len() as u64);
        }
        let mut written = 0;
        for (first, run) in runs(&blocks) {
            let from = first * BLOCK_BYTES as usize;
            let part = data.get(from..data.len().min(from + run * BLOCK_BYTES as usize)).unwrap_or_default();
            let at = offset + from as u64;
            if blocks.get(first) == Some(&true) {
                self.clear(at, part.len() as u64).await?;
            } else {
                written += self.data.write(at, Buf::copy_of(part)).await?.len() as u64;
            }
        }
        Ok(written)
    }

    /// Makes a range of the data file zeroes. It is a hole already, unless a write to it came to the disk whose bit did not.
    async fn clear(&self, mut offset: u64, length: u64) -> io::Result<()> {
        let end = offset + length;
        while offset < end {
            let extent = self.data.extents(offset, end - offset, 1).await?.first().copied();
            let (kind, run) = extent.map_or((ExtentKind::Data, end - offset), |e| (e.kind, e.length));
            if kind == ExtentKind::Data {
                self.data.write_zeroes(offset, run, ZeroMode { may_unmap: true, fast_only: false }).await?;
            }
            offset += run;
        }
        Ok(())
    }

    /// Makes what was copied durable, then its bits.
    pub(super) async fn sync_copies(&self, map: &MapFile) -> io::Result<()> {
        let pages = self.own.write().take_copied_pages();
        self.data.flush().await?;
        reach(Step::FlattenSynced);
        map.keep(pages).await?;
        reach(Step::FlattenBits);
        Ok(())
    }

    pub(super) fn notice_flat(&self) {
        if self.own.write().notice_whole() {
            self.set_flat();
        }
    }

    /// Before blocks are changed that are copied and not written: their regions are touched, durably.
    pub(super) async fn touch(&self, blocks: &Range<u64>) -> io::Result<()> {
        if self.own.read().untouched(blocks).is_empty() {
            return Ok(());
        }
        let touching = self.touching.lock().await;
        // Looked at again: whoever held the lock may have touched them.
        let regions = self.own.read().untouched(blocks);
        if regions.is_empty() {
            return Ok(());
        }
        let mut touched = self.own.read().touched.clone();
        regions.iter().for_each(|region| touched.mark(*region, 1));
        let numbers = regions.iter().map(|region| region / PAGE_BLOCKS);
        self.keep_touched(touching.as_ref(), &touched, numbers).await?;
        self.own.write().touched = touched;
        reach(Step::FlattenTouched);
        Ok(())
    }

    /// Writes pages of the map of touched regions. After a failure nobody knows what is on disk.
    async fn keep_touched(
        &self,
        map: Option<&MapFile>,
        touched: &DirtyMap,
        numbers: impl Iterator<Item = u64>,
    ) -> io::Result<()> {
        self.check_poisoned()?;
        let Some(map) = map else { return Err(io::Error::other("the fork has no map of touched regions: this is a defect")) };
        let numbers: std::collections::BTreeSet<u64> = numbers.collect();
        let pages = numbers.into_iter().map(|number| (number, page_of(touched, number))).collect();
        map.keep(pages).await.inspect_err(|_| self.poison())
    }

    /// Forgets the touched regions whose changes are all in the map: those of `known`, or all. Returns what is touched still.
    pub(super) async fn settle(&self, known: Option<&DirtyMap>) -> io::Result<Option<DirtyMap>> {
        if self.own.read().touched.is_empty() {
            return Ok(None);
        }
        self.flush_all().await?;
        let touching = self.touching.lock().await;
        let mut forgotten = Vec::new();
        {
            // No flush is under way: what is not pending is on disk.
            let _flushing = self.flushing.lock().await;
            let (before, end) = (self.own.read().touched.clone(), self.own.read().blocks());
            let mut at = 0;
            while let Some(run) = before.next_run(at, 1) {
                let region = run.start.0;
                at = region + 1;
                if known.is_some_and(|known| !known.contains(region)) {
                    continue;
                }
                // Nothing in flight: what touched it has marked what it wrote. Who comes now waits for `touching`.
                let blocks = region * REGION_BLOCKS..((region + 1) * REGION_BLOCKS).min(end);
                let Some(_alone) = self.locks.try_lock(blocks, true) else { continue };
                let mut own = self.own.write();
                if own.is_settled(region) {
                    own.touched.clear(region, 1);
                    forgotten.push(region);
                }
            }
        }
        let touched = self.own.read().touched.clone();
        if !forgotten.is_empty() {
            self.keep_touched(touching.as_ref(), &touched, forgotten.iter().map(|region| region / PAGE_BLOCKS)).await?;
        }
        Ok(Some(touched))
    }
}
