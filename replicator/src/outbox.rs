//! What a primary still has to send, and what it may have to send again.
//!
//! Owns the frames, marks and seals of the epochs that are not committed, in their order, from the capture that makes them to the receiver's
//! word that it has them. A connection sends from a cursor; the next connection goes on where the receiver says that it stands, so a line
//! that breaks again and again still carries an epoch of any size, and the epoch keeps its cut.
//!
//! What must always hold: whatever the receiver has not said it has can be sent again, byte for byte; bytes of frames held here are bounded.
//! Knows no socket and no clock.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use proto::control::{STAGED_EVERY_BYTES, Staged};
use proto::frame::{FRAME_BYTES_MAX, FRAME_HEADER_BYTES};
use proto::pass::PassHeader;
use proto::seal::Tally;
use proto::{EpochId, HashQuery, Point, Scrub, Seal};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::capture::CaptureError;

/// Least bytes of frames that an outbox may hold: what a receiver may have without having said so, and a frame under way at each side.
const LIMIT_BYTES_MIN: usize = 2 * STAGED_EVERY_BYTES as usize + 3 * FRAME_BYTES_MAX;

/// What the sender gets, in order.
#[derive(Clone, Debug)]
pub(crate) enum Item {
    /// A pass begins, or goes on.
    Begin(PassHeader),
    /// A frame of it.
    Frame(Bytes),
    /// The pass is complete.
    End,
    /// Every pass of the epoch is complete.
    Seal(Box<Seal>),
    /// Hashes are wanted. Of this connection only: never sent again.
    Query(HashQuery),
    /// Blocks are to be compared at the epoch that was sealed last. Of this connection only, too.
    Scrub(Box<Scrub>),
    /// No guest writes any more, and all is committed up to this point. Of this connection only, too.
    Drained(Point),
}

impl Item {
    fn is_once(&self) -> bool {
        matches!(self, Self::Query(_) | Self::Scrub(_) | Self::Drained(_))
    }
}

/// A receiver that says it has what it was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the receiver says it has {frames} frames of epoch {epoch}, it was sent {sent} of epoch {of}: update the older side")]
pub(crate) struct StagedError {
    epoch: EpochId,
    frames: u64,
    of: EpochId,
    sent: u64,
}

struct Entry {
    item: Item,
    /// Blocks of data and of zeroes in a frame.
    blocks: (u64, u64),
    /// Its share of the bytes; given back when the receiver has it.
    _permit: Option<OwnedSemaphorePermit>,
}

/// How far the receiver is in the epoch at the front.
#[derive(Clone, Default)]
struct Front {
    epoch: Option<EpochId>,
    /// The pass of its last frame.
    pass: Option<PassHeader>,
    /// Its frames.
    tally: Tally,
}

impl Front {
    fn take(&mut self, entry: &Entry) {
        match &entry.item {
            Item::Begin(header) => self.pass = Some(*header),
            Item::Frame(bytes) => {
                if let Some(head) = bytes.first_chunk::<FRAME_HEADER_BYTES>() {
                    self.tally.add(head, bytes.len(), entry.blocks.0, entry.blocks.1);
                }
            }
            Item::Seal(seal) => *self = Self { epoch: Some(seal.epoch.next()), ..Self::default() },
            Item::End | Item::Query(_) | Item::Scrub(_) | Item::Drained(_) => {}
        }
    }
}

#[derive(Default)]
struct State {
    front: Front,
    /// What the receiver has not said it has, or has in part.
    entries: VecDeque<Entry>,
    /// The next of them to send.
    cursor: usize,
    /// The pass to open again before anything is sent.
    reopen: Option<PassHeader>,
    unsent_bytes: u64,
    /// The connection that may take. One that is gone may still be running: it must not take what the next one is to send.
    connection: u64,
    closed: bool,
}

impl State {
    fn release_front(&mut self) {
        if let Some(entry) = self.entries.pop_front() {
            self.front.take(&entry);
            self.cursor = self.cursor.saturating_sub(1);
        }
    }

    fn release_epoch(&mut self, epoch: EpochId) {
        let end = self.entries.iter().position(|e| matches!(&e.item, Item::Seal(seal) if seal.epoch == epoch));
        for _ in 0..end.map_or(0, |end| end + 1) {
            self.release_front();
        }
    }

    fn release_frames(&mut self, frames: u64) {
        while self.front.tally.frames < frames && !self.entries.is_empty() {
            self.release_front();
        }
    }

    fn next(&mut self) -> Option<Item> {
        if let Some(header) = self.reopen.take() {
            return Some(Item::Begin(header));
        }
        let item = self.entries.get(self.cursor)?.item.clone();
        if item.is_once() {
            self.entries.remove(self.cursor);
        } else {
            self.cursor += 1;
        }
        if let Item::Frame(bytes) = &item {
            self.unsent_bytes -= bytes.len() as u64;
        }
        Some(item)
    }
}

struct Inner {
    state: Mutex<State>,
    budget: Arc<Semaphore>,
    limit_bytes: usize,
    /// Signalled when there is something to send, or the outbox is closed.
    wake: Notify,
}

/// See the module. Clones are handles to one outbox.
#[derive(Clone)]
pub(crate) struct Outbox(Arc<Inner>);

impl Outbox {
    /// An outbox of at most `limit_bytes` of frames. When it is full, capture waits; guest writes do not.
    pub(crate) fn new(limit_bytes: usize) -> Self {
        Self::with_limit(limit_bytes.clamp(LIMIT_BYTES_MIN, Semaphore::MAX_PERMITS.min(u32::MAX as usize)))
    }

    /// As [`new`](Self::new), of exactly this limit.
    pub(crate) fn with_limit(limit_bytes: usize) -> Self {
        let budget = Arc::new(Semaphore::new(limit_bytes));
        Self(Arc::new(Inner { state: Mutex::default(), budget, limit_bytes, wake: Notify::new() }))
    }

    /// Bytes of frames held, sent or not.
    pub(crate) fn held_bytes(&self) -> u64 {
        (self.0.limit_bytes - self.0.budget.available_permits()) as u64
    }

    /// Bytes of frames that this connection has not sent.
    pub(crate) fn unsent_bytes(&self) -> u64 {
        self.0.state.lock().unsent_bytes
    }

    pub(crate) fn limit_bytes(&self) -> u64 {
        self.0.limit_bytes as u64
    }

    /// Adds what is no frame.
    ///
    /// # Errors
    /// [`CaptureError::Stopped`] if the outbox is closed.
    pub(crate) fn mark(&self, item: Item) -> Result<(), CaptureError> {
        self.put(Entry { item, blocks: (0, 0), _permit: None })
    }

    /// Adds a frame with so many blocks of data and of zeroes; waits while the outbox is full.
    ///
    /// # Errors
    /// As [`mark`](Self::mark).
    pub(crate) async fn frame(&self, bytes: Vec<u8>, blocks: (u64, u64)) -> Result<(), CaptureError> {
        let permit = self.0.budget.clone().acquire_many_owned(bytes.len() as u32).await;
        let permit = permit.map_err(|_| CaptureError::Stopped)?;
        self.put(Entry { item: Item::Frame(Bytes::from(bytes)), blocks, _permit: Some(permit) })
    }

    fn put(&self, entry: Entry) -> Result<(), CaptureError> {
        let mut state = self.0.state.lock();
        if state.closed {
            return Err(CaptureError::Stopped);
        }
        match &entry.item {
            Item::Begin(header) => {
                state.front.epoch.get_or_insert(header.epoch);
            }
            Item::Frame(bytes) => state.unsent_bytes += bytes.len() as u64,
            Item::End | Item::Seal(_) | Item::Query(_) | Item::Scrub(_) | Item::Drained(_) => {}
        }
        state.entries.push_back(entry);
        drop(state);
        self.0.wake.notify_one();
        Ok(())
    }

    /// A connection begins to send; whoever did so before gets nothing more. Returns its number.
    pub(crate) fn attach(&self) -> u64 {
        let mut state = self.0.state.lock();
        state.connection += 1;
        state.connection
    }

    /// The next to send; `None` once the outbox is closed, or another connection sends.
    pub(crate) async fn next(&self, connection: u64) -> Option<Item> {
        loop {
            {
                let mut state = self.0.state.lock();
                if state.closed || state.connection != connection {
                    // Two may wait for a moment, and what woke this one was meant for the other too.
                    self.0.wake.notify_one();
                    return None;
                }
                if let Some(item) = state.next() {
                    return Some(item);
                }
            }
            self.0.wake.notified().await;
        }
    }

    /// As [`next`](Self::next), if there is something to send.
    #[cfg(any(test, feature = "simulation"))]
    pub(crate) fn try_next(&self) -> Option<Item> {
        let mut state = self.0.state.lock();
        if state.closed { None } else { state.next() }
    }

    /// The receiver has the first `frames` frames of `epoch`.
    ///
    /// # Errors
    /// [`StagedError`] if it was sent fewer.
    pub(crate) fn staged(&self, epoch: EpochId, frames: u64) -> Result<(), StagedError> {
        let mut state = self.0.state.lock();
        let of = state.front.epoch.unwrap_or_default();
        // Of an epoch that is committed already.
        if epoch < of {
            return Ok(());
        }
        let sent = state.entries.iter().take(state.cursor).take_while(|e| !matches!(e.item, Item::Seal(_)));
        let sent = state.front.tally.frames + sent.filter(|e| matches!(e.item, Item::Frame(_))).count() as u64;
        if epoch != of || frames > sent {
            return Err(StagedError { epoch, frames, of, sent });
        }
        state.release_frames(frames);
        Ok(())
    }

    /// The receiver has committed everything up to `epoch`.
    pub(crate) fn committed(&self, epoch: EpochId) {
        self.0.state.lock().release_epoch(epoch);
    }

    /// Whether a receiver that expects epoch `next`, and has `staged` of it, can be sent the rest.
    pub(crate) fn continues(&self, next: EpochId, staged: Option<&Staged>) -> bool {
        let state = self.0.state.lock();
        let (mut front, mut from) = (state.front.clone(), 0);
        if front.epoch.is_some_and(|epoch| epoch < next) {
            let before = |e: &Entry| matches!(&e.item, Item::Seal(seal) if seal.epoch.next() == next);
            let Some(at) = state.entries.iter().position(before) else { return false };
            (front, from) = (Front { epoch: Some(next), ..Front::default() }, at + 1);
        }
        if front.epoch.is_some_and(|epoch| epoch != next) || staged.is_some_and(|s| s.epoch != next) {
            return false;
        }
        let frames = staged.map_or(0, |s| s.frames);
        for entry in state.entries.iter().skip(from).take_while(|e| !matches!(e.item, Item::Seal(_))) {
            if front.tally.frames >= frames {
                break;
            }
            front.take(entry);
        }
        front.tally.frames == frames && staged.is_none_or(|s| s.digest == front.tally.digest())
    }

    /// A new connection, whose receiver is known to continue: it has everything before epoch `next`, and `frames` frames of that.
    pub(crate) fn resume(&self, next: EpochId, frames: u64) {
        let mut state = self.0.state.lock();
        state.entries.retain(|e| !e.item.is_once());
        state.release_epoch(EpochId(next.0.saturating_sub(1)));
        state.release_frames(frames);
        state.cursor = 0;
        state.reopen = state.front.pass.filter(|_| frames > 0).map(|header| PassHeader { continued: true, ..header });
        state.unsent_bytes =
            state.entries.iter().map(|e| if let Item::Frame(bytes) = &e.item { bytes.len() as u64 } else { 0 }).sum();
        drop(state);
        self.0.wake.notify_one();
    }

    /// Nothing is sent any more: whoever waits is told, and what is held is dropped.
    pub(crate) fn close(&self) {
        let entries = {
            let mut state = self.0.state.lock();
            state.closed = true;
            std::mem::take(&mut state.entries)
        };
        drop(entries);
        self.0.budget.close();
        self.0.wake.notify_one();
    }
}

#[cfg(test)]
mod tests;
