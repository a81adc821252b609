//! The group's admission ledger: which tag a write carries, which blocks each uncommitted epoch changed, which blocks a
//! capture still needs.
//!
//! What must always hold:
//! - a block is marked before its write is issued, and its mark leaves the ledger only when an epoch that holds the block's
//!   content is committed remotely;
//! - a write that carries a tag later than a frozen epoch never reaches a block that the epoch's capture still needs;
//! - whatever ends a session early, the marks of all epochs that are not committed return to the open map.
//!
//! One mutex a group. Its critical sections are bounded by the size of one request; a cut swaps the open maps for empty ones,
//! so it costs O(volumes) whatever the disks' sizes, and pauses nobody. It knows no device, no socket and no clock: time is
//! passed in.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use blockdev::{BlockDevice, Buf};
use parking_lot::Mutex;
use proto::units::BLOCK_BYTES;
use proto::{BlockExtent, DirtyMap, EpochId, Point};
use tokio::sync::Notify;

use crate::dirtylog::Known;

mod exchange;
mod flushes;
mod suspects;
mod watch;

pub(crate) use self::flushes::FlushRefused;
use self::flushes::{Flushes, Signals};
use self::watch::Watches;

/// Most bytes that one copy-before-write step reads at once.
const COPY_STEP_BLOCKS: u64 = 256;

/// A block run of one volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) volume: usize,
    pub(crate) first: u64,
    pub(crate) count: u64,
}

impl Range {
    /// The blocks that the byte range touches; `length` is not zero.
    pub(crate) fn of_bytes(volume: usize, offset: u64, length: u64) -> Self {
        let first = offset / BLOCK_BYTES;
        Self { volume, first, count: (offset + length).div_ceil(BLOCK_BYTES) - first }
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.volume == other.volume && self.first < other.first + other.count && other.first < self.first + self.count
    }
}

/// Blocks as they were at the cut, read because a guest write was about to overtake the capture.
pub(crate) struct CopiedRun {
    pub(crate) volume: usize,
    pub(crate) extent: BlockExtent,
    pub(crate) content: Copy,
}

/// Where a copy is kept until it is sent.
pub(crate) enum Copy {
    Memory(Buf),
    /// In the spill file, from this offset on.
    Spilled(u64),
    /// On the disk that was exchanged for another one, which does not change any more.
    Before(Arc<dyn BlockDevice>),
}

/// Where a copy may be put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Memory,
    Spill(u64),
    /// Nowhere: the epoch is given up.
    Nowhere,
}

/// Limits of the copies made before guest writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyLimits {
    /// Bytes in memory; further copies go to the spill file.
    pub(crate) memory_bytes: u64,
    /// Bytes in the spill file; beyond them the epoch is given up and merged.
    pub(crate) spill_bytes: u64,
}

struct InFlight {
    tag: u64,
    /// Where to; `None`: to any of them.
    volume: Option<usize>,
    writes: u64,
}

/// An epoch that is cut and whose capture still needs blocks.
struct Frozen {
    /// Writes with this tag or a lower one belong to the epoch.
    tag: u64,
    /// Blocks that nobody has read yet.
    left: Vec<DirtyMap>,
    /// Runs that a guest write is reading now, with the id of its claim.
    copying: Vec<(u64, Range)>,
    copied: Vec<CopiedRun>,
    copied_bytes: u64,
    /// A copy that could not be read or did not fit: the epoch cannot be completed.
    failed: Option<FreezeFailure>,
}

/// Why a frozen epoch cannot be completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FreezeFailure {
    /// The old content of a block could not be read, or not be kept.
    Copy,
    /// The copies made before guest writes exceed memory and spill file.
    Full,
}

/// The changes of an epoch that is not committed.
struct Changes {
    epoch: EpochId,
    /// The tag that its newest cut ended.
    tag: u64,
    maps: Vec<DirtyMap>,
    first_write: Option<Instant>,
}

struct State {
    tag: u64,
    open: Vec<DirtyMap>,
    /// Blocks that may differ from the copy and are not known to: they must be compared before the next commit.
    suspect: Vec<DirtyMap>,
    /// The newest commit that was told.
    committed: Option<Point>,
    open_first_write: Option<Instant>,
    in_flight: VecDeque<InFlight>,
    /// Writes that were in flight, wait for the dirty log, and will be again.
    aside: u64,
    frozen: Option<Frozen>,
    building: Option<Changes>,
    sealed: VecDeque<Changes>,
    next_claim: u64,
    /// Claims whose copy is still being made, also those of freezes that have ended.
    claims_open: u64,
    /// Bytes of the spill file in use. Reused from the start once no claim is open: a late copy must not hit a newer one.
    spilled_bytes: u64,
    copied_before_write: u64,
    /// Of all maps that were released, since start.
    committed_bytes: u64,
    /// And how many epochs they were of.
    committed_epochs: u64,
    flushes: Flushes,
    watches: Watches,
}

/// See the module.
pub(crate) struct Ledger {
    state: Mutex<State>,
    sizes: Vec<u64>,
    limits: CopyLimits,
    /// Signalled when writes of an old tag have drained, a copy is done, or a freeze ends.
    changed: Notify,
    signals: Signals,
}

/// A write that was admitted; dropping it says that the write has ended, well or not.
pub(crate) struct Ticket<'a> {
    ledger: &'a Ledger,
    tag: u64,
    volume: Option<usize>,
}

/// A write that stepped aside: no capture waits for it, and nothing is quiet as long as it is there.
pub(crate) struct Aside<'a>(&'a Ledger);

impl Drop for Aside<'_> {
    fn drop(&mut self) {
        self.0.state.lock().aside -= 1;
        self.0.changed.notify_waiters();
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.ledger.release(self.tag, self.volume);
    }
}

/// What a write has to do before it may be issued.
pub(crate) enum Step {
    /// Issue it.
    Issue,
    /// Wait for [`Ledger::changed`], then ask again.
    Wait,
    /// Read these runs and hand them to [`Ledger::copied`] under this claim, then ask again.
    Copy { claim: u64, runs: Vec<BlockExtent> },
}

/// Dirty bytes and ages for `status` and for the core.
#[derive(Clone, Debug, Default)]
pub(crate) struct Summary {
    pub(crate) open_bytes: Vec<u64>,
    pub(crate) uncommitted_bytes: u64,
    /// Bytes of them that are in an epoch.
    pub(crate) held_bytes: u64,
    /// The newest commit that was told; `None` until it is known what the receiver has.
    pub(crate) committed: Option<Point>,
    /// Bytes and epochs committed since start.
    pub(crate) committed_bytes: u64,
    pub(crate) committed_epochs: u64,
    pub(crate) suspect_bytes: u64,
    pub(crate) oldest_write: Option<Instant>,
    pub(crate) copied_before_write: u64,
    pub(crate) copied_bytes: u64,
    pub(crate) spilled_bytes: u64,
}

impl Ledger {
    /// A ledger that begins with what the dirty log knows.
    pub(crate) fn new(sizes: Vec<u64>, limits: CopyLimits, known: Vec<Known>) -> Self {
        let (suspect, open) = known.into_iter().map(|k| (k.suspect, k.dirty)).unzip();
        let state = State {
            tag: 1,
            open,
            suspect,
            committed: None,
            open_first_write: None,
            in_flight: VecDeque::new(),
            aside: 0,
            frozen: None,
            building: None,
            sealed: VecDeque::new(),
            next_claim: 0,
            claims_open: 0,
            spilled_bytes: 0,
            copied_before_write: 0,
            committed_bytes: 0,
            committed_epochs: 0,
            flushes: Flushes::default(),
            watches: Watches::default(),
        };
        Self { state: Mutex::new(state), sizes, limits, changed: Notify::new(), signals: Signals::default() }
    }

    /// Signalled whenever a [`Step::Wait`] may have become something else.
    pub(crate) fn changed(&self) -> &Notify {
        &self.changed
    }

    /// Counts a write in flight and marks its blocks. `now` is called for the first write of an epoch only.
    pub(crate) fn admit(&self, range: Range, now: impl FnOnce() -> Instant) -> Ticket<'_> {
        let mut state = self.state.lock();
        Ticket { ledger: self, volume: Some(range.volume), tag: state.admit(range, now) }
    }

    /// The write is in flight no more, keeps its marks, and has not ended: it is to be admitted again before what is returned is dropped.
    pub(crate) fn step_aside<'a>(&'a self, ticket: Ticket<'a>) -> Aside<'a> {
        self.state.lock().aside += 1;
        drop(ticket);
        Aside(self)
    }

    /// As [`Self::admit`], if the write may be issued without any further step.
    pub(crate) fn try_admit(&self, range: Range, now: impl FnOnce() -> Instant) -> Option<Ticket<'_>> {
        let mut state = self.state.lock();
        if let Some(frozen) = &state.frozen
            && (frozen.needs(&range) || frozen.copying(&range))
            && !sabotaged()
        {
            return None;
        }
        Some(Ticket { ledger: self, volume: Some(range.volume), tag: state.admit(range, now) })
    }

    /// What an admitted write of `range` has to do next.
    pub(crate) fn step(&self, ticket: &Ticket<'_>, range: &Range) -> Step {
        let state = &mut *self.state.lock();
        let Some(frozen) = state.frozen.as_mut().filter(|f| f.tag < ticket.tag) else { return Step::Issue };
        if frozen.copying(range) {
            return Step::Wait;
        }
        if frozen.failed.is_some() || !frozen.needs(range) || sabotaged() {
            return Step::Issue;
        }
        // A straddling write of the old epoch may still be on its way to these very blocks: the copy comes after it. One to another disk is not, and may
        // take as long as that disk does.
        if state.in_flight.iter().any(|w| w.tag <= frozen.tag && w.volume.is_none_or(|volume| volume == range.volume)) {
            return Step::Wait;
        }
        let map = &mut frozen.left[range.volume];
        let (mut runs, mut at, mut blocks) = (Vec::new(), range.first, 0);
        let end = range.first + range.count;
        while blocks < COPY_STEP_BLOCKS
            && let Some(run) = map.next_run(at, u32::try_from(end - at).unwrap_or(u32::MAX)).filter(|r| r.start.0 < end)
        {
            let take = (run.end().min(end) - run.start.0).min(COPY_STEP_BLOCKS - blocks);
            runs.push(BlockExtent { start: run.start, blocks: take as u32 });
            blocks += take;
            at = run.start.0 + take;
            if at >= end {
                break;
            }
        }
        let claim = state.next_claim;
        state.next_claim += 1;
        state.claims_open += 1;
        for run in &runs {
            map.clear(run.start.0, run.blocks.into());
            frozen.copying.push((claim, Range { volume: range.volume, first: run.start.0, count: run.blocks.into() }));
        }
        state.copied_before_write += blocks;
        Step::Copy { claim, runs }
    }

    /// Ends a claim: the runs as they were at the cut, or `None` if they could not be read.
    pub(crate) fn copied(&self, claim: u64, runs: Option<Vec<CopiedRun>>) {
        let mut state = self.state.lock();
        state.claims_open -= 1;
        if let Some(frozen) = &mut state.frozen {
            let before = frozen.copying.len();
            frozen.copying.retain(|(id, _)| *id != claim);
            // A claim of an earlier freeze that ended meanwhile is nobody's any more.
            if frozen.copying.len() < before {
                match runs {
                    Some(_) if frozen.failed.is_some() => {}
                    Some(runs) => frozen.copied.extend(runs),
                    None => frozen.fail(FreezeFailure::Copy),
                }
            }
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// Reserves room for a copy of `bytes`.
    pub(crate) fn place_copy(&self, bytes: u64) -> Place {
        let state = &mut *self.state.lock();
        // Of a freeze that has ended nothing is kept; where it would have gone does not matter.
        let Some(frozen) = state.frozen.as_mut().filter(|f| f.failed.is_none()) else { return Place::Memory };
        if frozen.copied_bytes + bytes <= self.limits.memory_bytes {
            frozen.copied_bytes += bytes;
            Place::Memory
        } else if state.spilled_bytes + bytes <= self.limits.spill_bytes {
            let offset = state.spilled_bytes;
            state.spilled_bytes += bytes;
            Place::Spill(offset)
        } else {
            frozen.fail(FreezeFailure::Full);
            Place::Nowhere
        }
    }

    fn release(&self, tag: u64, volume: Option<usize>) {
        let mut state = self.state.lock();
        let current = state.tag;
        let mut drained = false;
        if let Some(at) = state.in_flight.iter().position(|w| w.tag == tag && w.volume == volume) {
            let entry = &mut state.in_flight[at];
            entry.writes -= 1;
            if entry.writes == 0 && tag < current {
                state.in_flight.remove(at);
                drained = true;
            }
        }
        drop(state);
        if drained {
            self.changed.notify_waiters();
        }
    }

    /// Starts a pass of `epoch` without freezing: takes the open maps. Returns them and the tag whose writes must have
    /// drained before the pass reads anything (a marked write that was not yet issued would otherwise be lost).
    pub(crate) fn take_fuzzy(&self, epoch: EpochId) -> (u64, Vec<DirtyMap>) {
        let mut state = self.state.lock();
        state.cut(epoch, &self.sizes)
    }

    /// Cuts `epoch`: everything marked so far belongs to it, everything admitted later to the next. Returns the tag that must
    /// have drained before capture.
    pub(crate) fn freeze(&self, epoch: EpochId) -> u64 {
        let mut state = self.state.lock();
        assert!(state.frozen.is_none(), "one epoch is captured at a time");
        if state.claims_open == 0 {
            state.spilled_bytes = 0;
        }
        let (tag, left) = state.cut(epoch, &self.sizes);
        state.frozen = Some(Frozen { tag, left, copying: Vec::new(), copied: Vec::new(), copied_bytes: 0, failed: None });
        tag
    }

    /// The tag that a write gets which is admitted now.
    #[cfg(feature = "simulation")]
    pub(crate) fn tag(&self) -> u64 {
        self.state.lock().tag
    }

    /// Waits until no write with `tag` or a lower one is in flight.
    pub(crate) async fn drained(&self, tag: u64) {
        self.wait_until(|state| state.in_flight.iter().all(|w| w.tag > tag || w.writes == 0)).await;
    }

    async fn wait_until(&self, ready: impl Fn(&State) -> bool) {
        let notified = self.changed.notified();
        tokio::pin!(notified);
        loop {
            notified.as_mut().enable();
            if ready(&self.state.lock()) {
                return;
            }
            notified.as_mut().await;
            notified.set(self.changed.notified());
        }
    }

    /// The next runs at or after `from` that the frozen epoch still needs of `volume`: at most `blocks_max` blocks.
    pub(crate) fn frozen_runs(&self, volume: usize, from: u64, blocks_max: u32) -> Vec<BlockExtent> {
        let state = self.state.lock();
        state.frozen.as_ref().map_or_else(Vec::new, |f| f.left[volume].pick(from, blocks_max))
    }

    /// Bytes that the frozen epoch still needs.
    pub(crate) fn frozen_left_bytes(&self) -> u64 {
        self.state.lock().frozen.as_ref().map_or(0, |f| f.left.iter().map(DirtyMap::bytes).sum())
    }

    /// Keeps of `runs`, which the capture has just read, those blocks that no guest write has overtaken, and counts them as
    /// captured. A block still needed now was untouched while it was read: writers take it out before they write.
    pub(crate) fn claim_captured(&self, volume: usize, runs: &[BlockExtent], mut keep: impl FnMut(u64)) {
        let mut state = self.state.lock();
        let Some(frozen) = &mut state.frozen else { return };
        let map = &mut frozen.left[volume];
        for run in runs {
            for block in run.start.0..run.end() {
                if map.contains(block) {
                    keep(block);
                }
            }
            map.clear(run.start.0, run.blocks.into());
        }
    }

    /// Takes the copies that guest writes have made so far.
    pub(crate) fn take_copied(&self) -> Vec<CopiedRun> {
        let mut state = self.state.lock();
        state.frozen.as_mut().map_or_else(Vec::new, |f| {
            f.copied_bytes = 0;
            std::mem::take(&mut f.copied)
        })
    }

    /// Whether the freeze was found impossible to complete.
    pub(crate) fn freeze_failure(&self) -> Option<FreezeFailure> {
        self.state.lock().frozen.as_ref().and_then(|f| f.failed)
    }

    /// Waits until no guest write is copying, then ends the freeze and returns the last copies.
    ///
    /// # Errors
    /// The reason why the epoch is not complete.
    pub(crate) async fn thaw(&self) -> Result<Vec<CopiedRun>, FreezeFailure> {
        self.wait_until(|state| state.frozen.as_ref().is_none_or(|f| f.copying.is_empty())).await;
        let frozen = { self.state.lock().frozen.take() };
        self.changed.notify_waiters();
        match frozen {
            Some(Frozen { failed: Some(failure), .. }) => Err(failure),
            Some(frozen) => {
                assert!(frozen.left.iter().all(DirtyMap::is_empty), "a thawed epoch has captured all its blocks");
                Ok(frozen.copied)
            }
            None => Ok(Vec::new()),
        }
    }

    /// The epoch's frames are complete: it waits for its commit.
    pub(crate) fn seal(&self, epoch: EpochId) {
        let mut state = self.state.lock();
        if let Some(changes) = state.building.take_if(|b| b.epoch == epoch) {
            state.sealed.push_back(changes);
            state.watches.sealed(epoch);
        }
    }

    /// First write of the epoch being built.
    pub(crate) fn building_first_write(&self) -> Option<Instant> {
        self.state.lock().building.as_ref().and_then(|b| b.first_write)
    }

    /// Everything up to `point` is on stable storage at the receiver.
    pub(crate) fn committed(&self, point: Point) {
        let mut state = self.state.lock();
        state.committed = Some(point);
        let done = state.sealed.iter().take_while(|c| c.epoch <= point.epoch).count();
        let released: Vec<Changes> = state.sealed.drain(..done).collect();
        if let Some(newest) = released.last() {
            state.flushes.covers(newest.tag);
        }
        state.flushes.copy_is_known();
        state.committed_bytes += released.iter().flat_map(|c| &c.maps).map(DirtyMap::bytes).sum::<u64>();
        state.committed_epochs += released.len() as u64;
        // Freeing the maps of a large disk takes milliseconds, which no guest write is to wait for.
        drop(state);
        self.flushes_changed();
        drop(released);
    }

    /// Gives up the epoch that is being built (also a freeze that is under way): its marks return to the open maps.
    /// Returns whether there was one.
    pub(crate) fn give_up_building(&self) -> bool {
        let mut state = self.state.lock();
        state.frozen = None;
        let building = state.building.take();
        let given_up = building.is_some();
        let emptied = building.map(|changes| state.reopen(changes));
        drop(state);
        self.changed.notify_waiters();
        // Freed outside: large maps take a while.
        drop(emptied);
        given_up
    }

    /// Returns the marks of every epoch that is sealed and not committed to the open maps. Returns how many there were.
    pub(crate) fn merge_sealed(&self) -> usize {
        let mut state = self.state.lock();
        let sealed = std::mem::take(&mut state.sealed);
        state.watches.forget();
        let emptied: Vec<Vec<DirtyMap>> = sealed.into_iter().map(|changes| state.reopen(changes)).collect();
        drop(state);
        // Freed outside: large maps take a while.
        emptied.len()
    }

    /// Everything is dirty: there is no copy.
    pub(crate) fn mark_all(&self) {
        let open = self.sizes.iter().map(|s| DirtyMap::full(*s)).collect();
        let suspect = self.sizes.iter().map(|s| DirtyMap::new(*s)).collect();
        let mut state = self.state.lock();
        state.sealed.clear();
        state.flushes.copy_is_known();
        let old = (std::mem::replace(&mut state.open, open), std::mem::replace(&mut state.suspect, suspect));
        // Freed outside: large maps take a while.
        drop(state);
        drop(old);
    }

    /// When the oldest write that is not committed was admitted.
    pub(crate) fn oldest_write(&self) -> Option<Instant> {
        self.state.lock().oldest_write()
    }

    /// Bytes marked and not in any epoch yet.
    pub(crate) fn open_bytes(&self) -> u64 {
        self.state.lock().open.iter().map(DirtyMap::bytes).sum()
    }

    /// Figures for `status`.
    pub(crate) fn summary(&self) -> Summary {
        let state = self.state.lock();
        let open_bytes: Vec<u64> = state.open.iter().map(DirtyMap::bytes).collect();
        let held: u64 = state.sealed.iter().chain(&state.building).flat_map(|c| &c.maps).map(DirtyMap::bytes).sum();
        Summary {
            uncommitted_bytes: open_bytes.iter().sum::<u64>() + held,
            held_bytes: held,
            committed: state.committed,
            committed_bytes: state.committed_bytes,
            committed_epochs: state.committed_epochs,
            suspect_bytes: state.suspect.iter().map(DirtyMap::bytes).sum(),
            open_bytes,
            oldest_write: state.oldest_write(),
            copied_before_write: state.copied_before_write,
            copied_bytes: state.frozen.as_ref().map_or(0, |f| f.copied_bytes),
            spilled_bytes: state.spilled_bytes,
        }
    }

    /// Limits of the copies made before guest writes.
    pub(crate) fn copy_limits(&self) -> CopyLimits {
        self.limits
    }
}

/// Whether the simulator wants to see that it notices when copies before writes are skipped.
fn sabotaged() -> bool {
    #[cfg(feature = "simulation")]
    return crate::sim::is_sabotaged(crate::sim::Sabotage::SkipCopyBeforeWrite);
    #[cfg(not(feature = "simulation"))]
    false
}

impl State {
    fn admit(&mut self, range: Range, now: impl FnOnce() -> Instant) -> u64 {
        let tag = self.count_in_flight(Some(range.volume));
        self.open[range.volume].mark(range.first, range.count);
        self.watches.mark(&range);
        self.open_first_write.get_or_insert_with(now);
        tag
    }

    /// Counts a change in flight; returns its tag.
    fn count_in_flight(&mut self, volume: Option<usize>) -> u64 {
        let tag = self.tag;
        match self.in_flight.iter_mut().rev().take_while(|w| w.tag == tag).find(|w| w.volume == volume) {
            Some(entry) => entry.writes += 1,
            None => self.in_flight.push_back(InFlight { tag, volume, writes: 1 }),
        }
        #[cfg(feature = "simulation")]
        crate::sim::set_admitted(tag);
        tag
    }

    /// Moves the open maps into the epoch being built and raises the tag. Returns the old tag and the maps.
    fn cut(&mut self, epoch: EpochId, sizes: &[u64]) -> (u64, Vec<DirtyMap>) {
        let empty = sizes.iter().map(|s| DirtyMap::new(*s)).collect();
        let maps = std::mem::replace(&mut self.open, empty);
        let first_write = self.open_first_write.take();
        let tag = self.tag;
        match &mut self.building {
            Some(changes) => {
                changes.tag = tag;
                assert!(changes.epoch == epoch, "one epoch is built at a time");
                for (held, map) in changes.maps.iter_mut().zip(&maps) {
                    held.merge(map);
                }
                changes.first_write = changes.first_write.into_iter().chain(first_write).min();
            }
            none => *none = Some(Changes { epoch, tag, maps: maps.clone(), first_write }),
        }
        self.tag += 1;
        self.in_flight.retain(|w| w.writes > 0);
        (tag, maps)
    }

    fn oldest_write(&self) -> Option<Instant> {
        self.sealed.iter().chain(&self.building).filter_map(|c| c.first_write).chain(self.open_first_write).min()
    }

    /// Returns marks to the open maps. The smaller map goes into the larger, whichever is which: guests wait for this, and of an epoch
    /// that was long in the making and the writes since its cut one is small as a rule. What is left over is returned.
    fn reopen(&mut self, changes: Changes) -> Vec<DirtyMap> {
        let mut maps = changes.maps;
        for (open, map) in self.open.iter_mut().zip(&mut maps) {
            if map.count() > open.count() {
                std::mem::swap(open, map);
            }
            open.merge(map);
        }
        self.open_first_write = self.open_first_write.into_iter().chain(changes.first_write).min();
        maps
    }
}

impl Frozen {
    fn needs(&self, range: &Range) -> bool {
        self.failed.is_none() && self.left[range.volume].intersects(range.first, range.count)
    }

    fn copying(&self, range: &Range) -> bool {
        self.copying.iter().any(|(_, r)| r.overlaps(range))
    }

    /// Nothing more is kept of an epoch that cannot be completed; its marks stay in `building` and are merged.
    fn fail(&mut self, failure: FreezeFailure) {
        self.failed = Some(failure);
        self.copied = Vec::new();
        self.copied_bytes = 0;
    }
}
