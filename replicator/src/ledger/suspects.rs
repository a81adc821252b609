//! What nobody knows to be at the receiver, and what is known to be.
//!
//! Suspect are blocks that may differ from the copy: they are compared before the next commit. The dirty log asks which regions it may forget,
//! and a clean stop for the exact maps; both are answered under the lock that admits writes.

use proto::{BlockExtent, DirtyMap, Point};

use super::Ledger;
use crate::dirtylog::Known;

impl Ledger {
    /// Everything is suspect: the copy is of another history.
    pub(crate) fn suspect_all(&self) {
        let suspect = self.sizes.iter().map(|s| DirtyMap::full(*s)).collect();
        let mut state = self.state.lock();
        state.committed = None;
        state.flushes.copy_is_known();
        let old = std::mem::replace(&mut state.suspect, suspect);
        drop(state);
        drop(old);
    }

    /// All that is marked is to be compared: how the disks differ from the copy is wanted exactly. Nothing is under way.
    pub(crate) fn suspect_marks(&self) {
        let mut state = self.state.lock();
        let state = &mut *state;
        for (suspect, (open, size)) in state.suspect.iter_mut().zip(state.open.iter_mut().zip(&self.sizes)) {
            suspect.merge(&std::mem::replace(open, DirtyMap::new(*size)));
        }
    }

    /// A ledger of its own in which all that is marked or suspect here is suspect: for who only looks, while guests may write.
    pub(crate) fn to_look_at(&self) -> Ledger {
        let state = self.state.lock();
        let known = state.suspect.iter().zip(&state.open).zip(&self.sizes).map(|((suspect, open), size)| {
            let mut all = suspect.clone();
            all.merge(open);
            Known { suspect: all, dirty: DirtyMap::new(*size) }
        });
        Ledger::new(self.sizes.clone(), self.limits, known.collect())
    }

    /// What is marked and in no epoch.
    pub(crate) fn marked(&self) -> Vec<DirtyMap> {
        self.state.lock().open.clone()
    }

    /// The disks hold `point`, all of it, and the receiver has it. Nothing is under way.
    pub(crate) fn handed(&self, point: Point) {
        let empty = || self.sizes.iter().map(|s| DirtyMap::new(*s)).collect::<Vec<_>>();
        let mut state = self.state.lock();
        state.committed = Some(point);
        state.open_first_write = None;
        state.flushes.copy_is_known();
        let old = (std::mem::replace(&mut state.open, empty()), std::mem::replace(&mut state.suspect, empty()));
        drop(state);
        drop(old);
        self.flushes_changed();
    }

    /// Whether no write is in flight, or will be again.
    pub(crate) fn is_quiet(&self) -> bool {
        let state = self.state.lock();
        state.aside == 0 && state.in_flight.iter().all(|w| w.writes == 0)
    }

    /// Marks the first block of the first volume, so that there is something to send.
    pub(crate) fn mark_first(&self) {
        if let Some(open) = self.state.lock().open.first_mut() {
            open.mark(0, 1);
        }
    }

    /// Bytes that must be compared with the copy.
    pub(crate) fn suspect_bytes(&self) -> u64 {
        self.state.lock().suspect.iter().map(DirtyMap::bytes).sum()
    }

    /// The first suspect run of `volume` at or after `from`, within one region.
    pub(crate) fn suspect_run(&self, volume: usize, from: u64) -> Option<BlockExtent> {
        self.state.lock().suspect.get(volume)?.next_run(from, u32::MAX)
    }

    /// These blocks were compared: they are suspect no longer, and dirty if they differ.
    pub(crate) fn settle(&self, volume: usize, runs: &[BlockExtent], differ: bool) {
        let mut state = self.state.lock();
        for run in runs {
            state.suspect[volume].clear(run.start.0, run.blocks.into());
            if differ {
                state.open[volume].mark(run.start.0, run.blocks.into());
            }
        }
        drop(state);
        self.flushes_changed();
    }

    /// Calls `clean` for those of `regions` in which every block is as it is in the newest commit, while no write can be admitted. Returns
    /// that commit, if there is one; without one nothing is clean.
    pub(crate) fn clean_regions(&self, volume: usize, regions: &[u64], mut clean: impl FnMut(u64)) -> Option<Point> {
        let state = self.state.lock();
        let point = state.committed?;
        let changes = state.sealed.iter().chain(&state.building).map(|c| &c.maps);
        let maps: Vec<&DirtyMap> = changes.chain([&state.open, &state.suspect]).filter_map(|maps| maps.get(volume)).collect();
        for region in regions {
            if !maps.iter().any(|map| map.touches_region(*region)) {
                clean(*region);
            }
        }
        Some(point)
    }

    /// What is dirty when nothing is under way any more: the exact maps for the next start. `None` while blocks are suspect or an
    /// epoch is not committed.
    pub(crate) fn settled(&self) -> Option<Vec<DirtyMap>> {
        let state = self.state.lock();
        let quiet = state.building.is_none() && state.sealed.is_empty() && state.suspect.iter().all(DirtyMap::is_empty);
        (quiet && state.aside == 0 && state.in_flight.iter().all(|w| w.writes == 0)).then(|| state.open.clone())
    }
}
