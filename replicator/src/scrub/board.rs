//! What is to be compared, in which order and how fast, and what came of it. Outlives sessions.
//!
//! A walk goes over all blocks of a group, each once: the one in the background for ever, at the pace that the user chose; that of a
//! `verify` once, as fast as answers come. What was asked and not answered when a session ended, or was answered by a receiver at
//! another point, is asked again.

use std::time::{Duration, Instant};

use blockdev::Buf;
use parking_lot::Mutex;
use proto::hashes::{Hash, hash};
use proto::scrub::{SCRUB_BLOCKS_MAX, SCRUBS_IN_FLIGHT_MAX};
use proto::units::{BLOCK_BYTES, blocks_of};
use proto::{BlockExtent, Name, Point};
use tokio::sync::Notify;

use crate::ledger::Range;
use crate::status::{ScrubStatus, VerifyStatus};

/// Blocks of a step in the background: 1 MiB.
const STEP_BLOCKS: u64 = 256;
/// A background walk that fell behind catches up with this much of its time at once, and forgets the rest.
const CATCH_UP: Duration = Duration::from_millis(100);
/// How long to wait when the receiver was at another point, or there is none yet.
const STALE_PAUSE: Duration = Duration::from_millis(50);

/// A range that was asked for, and what of it was compared.
pub(super) struct Asked {
    walk: u64,
    pub(super) range: Range,
    pub(super) point: Point,
    pub(super) runs: Vec<BlockExtent>,
}

/// One walk over all blocks.
struct Walk {
    number: u64,
    /// The next block, counted through all volumes.
    at: u64,
    /// Blocks that nobody has taken yet.
    left: u64,
    again: Vec<Range>,
    /// Blocks that are dealt with.
    done: u64,
    compared: u64,
    differing: u64,
    unreadable: u64,
    began: Instant,
    ended: Option<Instant>,
}

impl Walk {
    fn new(number: u64, at: u64, blocks: u64, began: Instant) -> Self {
        Self {
            number,
            at,
            left: blocks,
            again: Vec::new(),
            done: 0,
            compared: 0,
            differing: 0,
            unreadable: 0,
            began,
            ended: None,
        }
    }

    fn has_more(&self) -> bool {
        self.left > 0 || !self.again.is_empty()
    }

    /// The next range of at most `blocks_max` blocks, which do not cross a multiple of that.
    fn take(&mut self, volumes: &[(Name, u64)], blocks_max: u64) -> Option<Range> {
        if let Some(range) = self.again.pop() {
            return Some(range);
        }
        if self.left == 0 {
            return None;
        }
        let total: u64 = volumes.iter().map(|(_, blocks)| blocks).sum();
        let mut first = self.at % total;
        for (volume, (_, blocks)) in volumes.iter().enumerate() {
            if first < *blocks {
                let count = (blocks_max - first % blocks_max).min(blocks - first).min(self.left);
                self.at += count;
                self.left -= count;
                return Some(Range { volume, first, count });
            }
            first -= blocks;
        }
        None
    }
}

struct State {
    background: Walk,
    /// The last one that was asked for, running or not.
    verify: Option<Walk>,
    next_walk: u64,
    asked: Vec<(u32, Asked)>,
    next_id: u32,
    next_due: Instant,
    not_before: Instant,
    compared: u64,
    differing: u64,
    unreadable: u64,
    last_pass: Option<Instant>,
    last_difference: Option<Instant>,
    zeroes: Option<(u32, Hash)>,
}

impl State {
    fn verifying(&mut self) -> Option<&mut Walk> {
        self.verify.as_mut().filter(|walk| walk.ended.is_none())
    }

    fn walk(&mut self, number: u64) -> Option<&mut Walk> {
        [Some(&mut self.background), self.verify.as_mut()].into_iter().flatten().find(|walk| walk.number == number)
    }
}

/// See the module.
pub(crate) struct Board {
    group: Name,
    /// Names, and blocks.
    volumes: Vec<(Name, u64)>,
    blocks: u64,
    /// Time of a whole walk in the background; `None`: there is none.
    interval: Option<Duration>,
    state: Mutex<State>,
    changed: Notify,
}

impl Board {
    /// `volumes` are names and sizes in bytes. The first walk in the background begins at the block `start` modulo the number of blocks: a node that
    /// is restarted every day would otherwise never come to the end of its disks.
    pub(crate) fn new(group: Name, volumes: &[(Name, u64)], interval: Option<Duration>, start: u64, now: Instant) -> Self {
        let volumes: Vec<(Name, u64)> = volumes.iter().map(|(name, bytes)| (name.clone(), blocks_of(*bytes))).collect();
        let blocks = volumes.iter().map(|(_, blocks)| blocks).sum();
        let state = State {
            background: Walk::new(0, start % blocks, blocks, now),
            verify: None,
            next_walk: 1,
            asked: Vec::new(),
            next_id: 0,
            next_due: now,
            not_before: now,
            compared: 0,
            differing: 0,
            unreadable: 0,
            last_pass: None,
            last_difference: None,
            zeroes: None,
        };
        Self { group, volumes, blocks, interval, state: Mutex::new(state), changed: Notify::new() }
    }

    pub(super) fn group(&self) -> &Name {
        &self.group
    }

    pub(super) fn disk(&self, volume: usize) -> &str {
        self.volumes.get(volume).map_or("", |(name, _)| name.as_str())
    }

    /// The hash of so many blocks of zeroes.
    pub(super) fn zeroes(&self, blocks: u32) -> Hash {
        let known = self.state.lock().zeroes;
        match known {
            Some((of, hash)) if of == blocks => hash,
            _ => {
                let zeroes = hash(&Buf::zeroed(blocks as usize * BLOCK_BYTES as usize));
                self.state.lock().zeroes = Some((blocks, zeroes));
                zeroes
            }
        }
    }

    /// A session begins; when what this returns is dropped, it is over.
    pub(super) fn session(&self, now: Instant) -> Session<'_> {
        let mut state = self.state.lock();
        state.next_due = state.next_due.max(now);
        Session(self)
    }

    /// What is not answered will not be: it is asked again in the next session.
    pub(crate) fn session_over(&self) {
        let mut state = self.state.lock();
        for (_, asked) in std::mem::take(&mut state.asked) {
            if let Some(walk) = state.walk(asked.walk) {
                walk.again.push(asked.range);
            }
        }
    }

    /// Resolves when there may be something to be done sooner than it was due.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// When the next step is due; `None` if an answer or [`changed`](Self::changed) must come first.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        let state = &mut *self.state.lock();
        if state.asked.len() >= SCRUBS_IN_FLIGHT_MAX {
            return None;
        }
        match (state.verify.as_ref().filter(|walk| walk.ended.is_none()), self.interval) {
            (Some(verify), _) => verify.has_more().then(|| state.not_before.max(now)),
            (None, Some(_)) => state.background.has_more().then(|| state.not_before.max(state.next_due)),
            (None, None) => None,
        }
    }

    /// The next range, if one may be asked for.
    pub(super) fn take(&self, now: Instant) -> Option<Taken<'_>> {
        let state = &mut *self.state.lock();
        if state.asked.len() >= SCRUBS_IN_FLIGHT_MAX {
            return None;
        }
        let background = state.verifying().is_none();
        let (walk, blocks_max) = match &mut state.verify {
            Some(walk) if !background => (walk, u64::from(SCRUB_BLOCKS_MAX)),
            _ => (&mut state.background, STEP_BLOCKS),
        };
        let range = walk.take(&self.volumes, blocks_max)?;
        let walk = walk.number;
        if background && let Some(interval) = self.interval {
            let share = interval.mul_f64(range.count as f64 / self.blocks as f64);
            state.next_due = (state.next_due + share).max(now.checked_sub(CATCH_UP).unwrap_or(now));
        }
        state.not_before = now;
        Some(Taken { board: self, walk, range: Some(range), now })
    }

    pub(super) fn answered(&self, id: u32) -> Option<Asked> {
        let mut state = self.state.lock();
        let at = state.asked.iter().position(|(of, _)| *of == id)?;
        Some(state.asked.swap_remove(at).1)
    }

    /// The receiver was at another point.
    pub(super) fn stale(&self, asked: Asked, now: Instant) {
        self.again(asked.walk, asked.range, now);
    }

    fn again(&self, walk: u64, range: Range, now: Instant) {
        let state = &mut *self.state.lock();
        state.not_before = now + STALE_PAUSE;
        if let Some(walk) = state.walk(walk) {
            walk.again.push(range);
        }
    }

    /// The receiver has compared what was asked.
    pub(super) fn compared(&self, asked: &Asked, differing: &[BlockExtent], now: Instant) {
        let blocks = |runs: &[BlockExtent]| runs.iter().map(|run| u64::from(run.blocks)).sum::<u64>();
        let (compared, differing) = (blocks(&asked.runs), blocks(differing));
        {
            let state = &mut *self.state.lock();
            state.compared += compared;
            state.differing += differing;
            if differing > 0 {
                state.last_difference = Some(now);
            }
            if let Some(walk) = state.walk(asked.walk) {
                walk.compared += compared;
                walk.differing += differing;
            }
        }
        self.dealt_with(asked.walk, &asked.range, now);
    }

    /// The disk here does not give the run.
    pub(super) fn unreadable(&self, walk: u64, run: BlockExtent) {
        let state = &mut *self.state.lock();
        state.unreadable += u64::from(run.blocks);
        if let Some(walk) = state.walk(walk) {
            walk.unreadable += u64::from(run.blocks);
        }
    }

    fn dealt_with(&self, walk: u64, range: &Range, now: Instant) {
        let state = &mut *self.state.lock();
        let total = self.blocks;
        let Some(walk) = state.walk(walk) else { return };
        walk.done += range.count;
        if walk.done < total {
            return;
        }
        walk.ended = Some(now);
        state.last_pass = Some(now);
        // Whatever has just been all over the disks, the background begins anew.
        let (at, number) = (state.background.at, state.next_walk);
        state.next_walk += 1;
        state.background = Walk::new(number, at % total, total, now);
    }

    /// Begins to compare everything now; a comparison that is under way already is that one.
    pub(crate) fn verify(&self, now: Instant) {
        let state = &mut *self.state.lock();
        if state.verifying().is_none() {
            state.verify = Some(Walk::new(state.next_walk, 0, self.blocks, now));
            state.next_walk += 1;
            tracing::info!("group {}: verify: all blocks are compared with the copy", self.group);
        }
        self.changed.notify_one();
    }

    pub(crate) fn is_verifying(&self) -> bool {
        self.state.lock().verifying().is_some()
    }

    /// The `verify` that runs, or the last one.
    pub(crate) fn verify_status(&self, now: Instant) -> Option<VerifyStatus> {
        let state = self.state.lock();
        let walk = state.verify.as_ref()?;
        let elapsed = walk.ended.unwrap_or(now).saturating_duration_since(walk.began);
        let (done, total) = (walk.done * BLOCK_BYTES, self.blocks * BLOCK_BYTES);
        let rate = (done as f64 / elapsed.as_secs_f64().max(0.001)) as u64;
        Some(VerifyStatus {
            number: walk.number,
            running: walk.ended.is_none(),
            total_bytes: total,
            done_bytes: done,
            compared_bytes: walk.compared * BLOCK_BYTES,
            differing_bytes: walk.differing * BLOCK_BYTES,
            unreadable_bytes: walk.unreadable * BLOCK_BYTES,
            elapsed_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
            rate_bytes_per_s: rate,
            left_s: (total - done).checked_div(rate),
        })
    }

    pub(crate) fn status(&self, now: Instant) -> ScrubStatus {
        let state = self.state.lock();
        let age =
            |at: Option<Instant>| at.map(|at| u64::try_from(now.saturating_duration_since(at).as_millis()).unwrap_or(u64::MAX));
        ScrubStatus {
            interval_s: self.interval.map(|interval| interval.as_secs()),
            done_bytes: state.background.done * BLOCK_BYTES,
            total_bytes: self.blocks * BLOCK_BYTES,
            last_pass_age_ms: age(state.last_pass),
            verifying: state.verify.as_ref().is_some_and(|walk| walk.ended.is_none()),
            compared_bytes: state.compared * BLOCK_BYTES,
            differing_bytes: state.differing * BLOCK_BYTES,
            unreadable_bytes: state.unreadable * BLOCK_BYTES,
            last_difference_age_ms: age(state.last_difference),
        }
    }

    /// Messages that are not answered, and how many may be.
    pub(crate) fn unanswered(&self) -> (u64, u64) {
        (self.state.lock().asked.len() as u64, SCRUBS_IN_FLIGHT_MAX as u64)
    }
}

/// See [`Board::session`].
pub(super) struct Session<'a>(&'a Board);

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.0.session_over();
    }
}

/// A range that is being read. Dropped before it is dealt with, it is taken again.
pub(super) struct Taken<'a> {
    board: &'a Board,
    walk: u64,
    /// `None` once it is dealt with.
    range: Option<Range>,
    now: Instant,
}

impl Taken<'_> {
    /// Number of the walk that it is of.
    pub(super) fn walk(&self) -> u64 {
        self.walk
    }

    pub(super) fn range(&self) -> Range {
        self.range.expect("it is not dealt with yet")
    }

    /// Ends the range before `block`; the rest is taken another time.
    pub(super) fn give_back_from(&mut self, block: u64) {
        if let Some(range) = &mut self.range {
            let end = range.first + range.count;
            range.count = block - range.first;
            let rest = Range { volume: range.volume, first: block, count: end - block };
            let mut state = self.board.state.lock();
            if let Some(walk) = state.walk(self.walk) {
                walk.again.push(rest);
            }
        }
    }

    /// Nothing of the range can be compared: all of it is on its way anyway.
    pub(super) fn left_out(mut self, now: Instant) {
        if let Some(range) = self.range.take() {
            self.board.dealt_with(self.walk, &range, now);
        }
    }

    /// The range is asked for under the number that this returns.
    pub(super) fn asked(mut self, point: Point, runs: Vec<BlockExtent>) -> u32 {
        let range = self.range.take().expect("it is not dealt with yet");
        let state = &mut *self.board.state.lock();
        let id = state.next_id;
        state.next_id = id.wrapping_add(1);
        state.asked.push((id, Asked { walk: self.walk, range, point, runs }));
        id
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some(range) = self.range.take() {
            self.board.again(self.walk, range, self.now);
        }
    }
}
