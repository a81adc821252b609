//! Scrub: compares the whole disks with the copy while the guest works, again and again.
//!
//! A step takes a range, reads it and hashes those of its blocks of which the newest sealed epoch has the content (`ledger::watch`). The
//! hashes travel behind that epoch's seal; the receiver compares them with its view of that very point. What differs is marked dirty, so the next epoch
//! sends it. Blocks that are left out are dirty and travel anyway.
//!
//! No write of the guest ever waits for this. It knows no connection and no clock but the one that paces it.

mod board;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::time::Instant;

use blockdev::{BlockDevice, Buf, ExtentKind, read_blocks};
use futures_util::stream::StreamExt;
use proto::hashes::{Hash, hash};
use proto::scrub::{RUN_BLOCKS_MAX, SCRUB_RUNS_MAX};
use proto::units::BLOCK_BYTES;
use proto::{BlockExtent, BlockIndex, ScrubOutcome, ScrubRun, Scrubbed, VolumeIndex};
use tokio::sync::mpsc;

pub(crate) use self::board::Board;
use self::board::{Asked, Taken};
use crate::capture::CaptureError;
use crate::dirtylog::DirtyLog;
use crate::ledger::{Ledger, Range};
use crate::outbox::{Item, Outbox};

/// Runs that are read at once.
const READ_AHEAD_RUNS: usize = 4;

/// What a scrub of one session needs.
pub(crate) struct Scrub<'a> {
    pub(crate) ledger: &'a Ledger,
    pub(crate) log: &'a DirtyLog,
    pub(crate) devices: &'a [Arc<dyn BlockDevice>],
    /// Takes the hashes.
    pub(crate) queue: &'a Outbox,
    /// What is to be compared, and what came of it; outlives the session.
    pub(crate) board: &'a Board,
}

/// A run that was read: its hash, and its content (`None` for a hole) in case that a write divides it.
struct ReadRun {
    extent: BlockExtent,
    hash: Hash,
    content: Option<Buf>,
}

impl Scrub<'_> {
    /// Steps at the pace of the board until the sender of `answers` is gone.
    ///
    /// # Errors
    /// [`CaptureError`]; the session must be dropped. What is not answered is asked again in the next one.
    pub(crate) async fn run(self, mut answers: mpsc::Receiver<Scrubbed>) -> Result<(), CaptureError> {
        let _session = self.board.session(Instant::now());
        loop {
            let due = self.board.due(Instant::now());
            tokio::select! {
                biased;
                answer = answers.recv() => match answer {
                    Some(answer) => self.answered(answer, Instant::now()).await?,
                    None => return Ok(()),
                },
                () = self.board.changed() => {}
                () = async { tokio::time::sleep_until(due.expect("guarded").into()).await }, if due.is_some() => {
                    self.step(Instant::now()).await?;
                }
            }
        }
    }

    /// Reads and asks for the next range, if there is one to be asked for.
    ///
    /// # Errors
    /// [`CaptureError`].
    pub(crate) async fn step(&self, now: Instant) -> Result<(), CaptureError> {
        let Some(mut taken) = self.board.take(now) else { return Ok(()) };
        let range = taken.range();
        let (watch, unsettled) = self.ledger.watch(range);
        let within = BlockExtent { start: BlockIndex(range.first), blocks: range.count as u32 };
        let mut runs = unsettled.gaps(within, RUN_BLOCKS_MAX);
        cut_short(&mut taken, &mut runs, |run| *run);
        let read = self.read(taken.walk(), range.volume, runs).await;
        let (point, marked) = watch.end();
        // Without a sealed epoch there is nothing to compare with yet: the range is taken again.
        let Some(point) = point else { return Ok(()) };
        let mut runs = Vec::with_capacity(read.len());
        for ReadRun { extent, hash: whole, content } in read {
            if marked.touches(extent) {
                runs.extend(marked.gaps(extent, RUN_BLOCKS_MAX).into_iter().map(|gap| {
                    let part = content.as_deref().map(|content| part_of(content, gap.start.0 - extent.start.0, gap.blocks));
                    ScrubRun { extent: gap, hash: part.map_or_else(|| self.board.zeroes(gap.blocks), hash) }
                }));
            } else {
                runs.push(ScrubRun { extent, hash: whole });
            }
        }
        cut_short(&mut taken, &mut runs, |run| run.extent);
        if runs.is_empty() {
            taken.left_out(now);
            return Ok(());
        }
        let extents = runs.iter().map(|run| run.extent).collect();
        let id = taken.asked(point, extents);
        let scrub = proto::Scrub { id, epoch: point.epoch, volume: VolumeIndex(range.volume as u16), runs };
        self.queue.mark(Item::Scrub(Box::new(scrub)))
    }

    /// Takes an answer; what differs is marked to be sent.
    ///
    /// # Errors
    /// [`CaptureError::ScrubAnswer`] if nobody asked that.
    pub(crate) async fn answered(&self, answer: Scrubbed, now: Instant) -> Result<(), CaptureError> {
        let wrong = CaptureError::ScrubAnswer { got: answer.id };
        let Some(asked) = self.board.answered(answer.id) else { return Err(wrong) };
        let ScrubOutcome::Compared { differing } = answer.outcome else {
            self.board.stale(asked, now);
            return Ok(());
        };
        let differing: Option<Vec<BlockExtent>> =
            differing.iter().map(|run| asked.runs.get(usize::from(*run)).copied()).collect();
        let Some(differing) = differing else { return Err(wrong) };
        self.repair(&asked, &differing).await;
        self.board.compared(&asked, &differing, now);
        Ok(())
    }

    /// The mark comes first: regions without a mark are those that the dirty log may forget.
    async fn repair(&self, asked: &Asked, differing: &[BlockExtent]) {
        let volume = asked.range.volume;
        for run in joined(differing) {
            let (offset, bytes) = (run.first * BLOCK_BYTES, run.count * BLOCK_BYTES);
            let (group, disk, point) = (self.board.group(), self.board.disk(volume), asked.point);
            tracing::warn!(
                "group {group}, disk {disk}: the copy differs in {bytes} bytes at offset {offset} at point {point}; they are sent again"
            );
            let range = Range { volume, ..run };
            self.ledger.mark_differing(&range);
            if let Err(error) = self.log.cover(&range).await {
                tracing::warn!(
                    "group {group}, disk {disk}: {error}; a crash before they are sent forgets that they differ, until the next scrub"
                );
            }
        }
    }

    /// A bad sector that the guest may never ask for must not end the session: replication goes on without it.
    fn cannot_read(&self, walk: u64, volume: usize, run: BlockExtent, error: &io::Error) {
        let (offset, bytes) = (run.start.0 * BLOCK_BYTES, u64::from(run.blocks) * BLOCK_BYTES);
        let (group, disk) = (self.board.group(), self.board.disk(volume));
        tracing::error!(
            "group {group}, disk {disk}: cannot read {bytes} bytes at offset {offset}: {error}; they are not compared"
        );
        self.board.unreadable(walk, run);
    }

    async fn read(&self, walk: u64, volume: usize, runs: Vec<BlockExtent>) -> Vec<ReadRun> {
        let device = &*self.devices[volume];
        let reads = futures_util::stream::iter(runs).map(|extent| async move { (extent, content(device, extent).await) });
        let hashed = reads.buffered(READ_AHEAD_RUNS).filter_map(|(extent, content)| {
            let read = content.map(|content| {
                let hash = content.as_deref().map_or_else(|| self.board.zeroes(extent.blocks), hash);
                ReadRun { extent, hash, content }
            });
            std::future::ready(read.map_err(|error| self.cannot_read(walk, volume, extent, &error)).ok())
        });
        hashed.collect().await
    }
}

/// Leaves as many runs as a message holds; what is beyond them is for another message.
fn cut_short<T>(taken: &mut Taken<'_>, runs: &mut Vec<T>, extent: impl Fn(&T) -> BlockExtent) {
    if let Some(beyond) = runs.get(SCRUB_RUNS_MAX).map(&extent) {
        taken.give_back_from(beyond.start.0);
        runs.truncate(SCRUB_RUNS_MAX);
    }
}

fn part_of(content: &[u8], skip: u64, blocks: u32) -> &[u8] {
    let from = (skip * BLOCK_BYTES) as usize;
    &content[from..from + blocks as usize * BLOCK_BYTES as usize]
}

/// Runs that touch, as one.
fn joined(runs: &[BlockExtent]) -> Vec<Range> {
    let mut ranges: Vec<Range> = Vec::new();
    for run in runs {
        match ranges.last_mut() {
            Some(last) if last.first + last.count == run.start.0 => last.count += u64::from(run.blocks),
            _ => ranges.push(Range { volume: 0, first: run.start.0, count: run.blocks.into() }),
        }
    }
    ranges
}

/// `None` for a hole.
async fn content(device: &dyn BlockDevice, run: BlockExtent) -> io::Result<Option<Buf>> {
    let (offset, bytes) = (run.start.0 * BLOCK_BYTES, u64::from(run.blocks) * BLOCK_BYTES);
    let inside = bytes.min(device.size().saturating_sub(offset));
    let extents = device.extents(offset, inside, 1).await?;
    if extents.first().is_some_and(|e| e.kind != ExtentKind::Data && e.length >= inside) {
        return Ok(None);
    }
    read_blocks(device, run).await.map(Some)
}
