//! A session that replicates: in which order passes, seals, hash queries and commits may come, and when an epoch is complete.

use std::collections::VecDeque;

use proto::hashes::{HashQuery, QUERIES_IN_FLIGHT_MAX};
use proto::pass::{PassHeader, PassKind};
use proto::seal::Tally;
use proto::{EpochId, Generation, Message, Name, Point, Scrub, Seal};

use super::{Action, Arrived, EPOCHS_IN_FLIGHT_MAX, SessionError};

/// What the session has taken and answered.
#[derive(Debug)]
pub(super) struct Streaming {
    pub(super) group: Name,
    pub(super) generation: Generation,
    pub(super) volume_blocks: Vec<u64>,
    /// The last epoch whose commit was started.
    pub(super) sealed: EpochId,
    pub(super) open: Option<OpenEpoch>,
    pub(super) pass: Option<PassHeader>,
    /// Seals that came before the end of their last pass.
    pub(super) seals: VecDeque<Seal>,
    pub(super) committing: VecDeque<Point>,
    /// Hash queries that are not answered yet.
    pub(super) hashing: usize,
    /// Scrubs of epochs whose seal is here and whose frames are not.
    pub(super) scrubs: Vec<Scrub>,
    /// Scrubs that are being compared.
    pub(super) scrubbing: usize,
}

/// An epoch whose frames arrive.
#[derive(Debug)]
pub(super) struct OpenEpoch {
    pub(super) epoch: EpochId,
    pub(super) passes: u32,
    pub(super) complete: bool,
    /// Of a session that broke; nothing of it has come in this one.
    pub(super) suspended: bool,
    pub(super) tally: Tally,
}

impl OpenEpoch {
    pub(super) fn new(epoch: EpochId) -> Self {
        Self { epoch, passes: 0, complete: false, suspended: false, tally: Tally::default() }
    }

    pub(super) fn suspended(arrived: Arrived) -> Self {
        let Arrived { epoch, pass, tally } = arrived;
        Self { epoch, passes: pass.into(), complete: false, suspended: true, tally }
    }
}

impl Streaming {
    pub(super) fn pass(mut self, header: PassHeader, out: &mut Vec<Action>) -> Result<Self, SessionError> {
        match &mut self.open {
            Some(open) if open.suspended && header.continued => open.suspended = false,
            // The primary has given it up.
            Some(open) if open.suspended => {
                self.open = None;
                out.push(Action::Abandon);
            }
            _ if header.continued => return Err(SessionError::NotSuspended { epoch: header.epoch }),
            _ => {}
        }
        let due = self.open.as_ref().filter(|o| !o.complete).map_or((self.sealed.next(), 0), |o| (o.epoch, o.passes));
        if (header.epoch, u32::from(header.pass)) != due || self.pass.is_some() {
            let (due_epoch, due_pass) = due;
            return Err(SessionError::Order { epoch: header.epoch, pass: header.pass, due_epoch, due_pass });
        }
        self.open.get_or_insert_with(|| OpenEpoch::new(header.epoch));
        self.pass = Some(header);
        Ok(self)
    }

    pub(super) fn pass_end(mut self, out: &mut Vec<Action>) -> Result<Self, SessionError> {
        if let (Some(pass), Some(open)) = (self.pass.take(), self.open.as_mut()) {
            open.passes += 1;
            open.complete = pass.kind == PassKind::Frozen;
        }
        self.try_commit(out)
    }

    /// The epoch begins again from pass 0, if it does. Seals that are here already stay: a primary seals an epoch after all of
    /// its passes, so a seal of the epoch whose pass was reset is of its next try, and overtook the reset.
    pub(super) fn pass_reset(mut self, out: &mut Vec<Action>) -> Self {
        self.pass = None;
        self.open = None;
        out.push(Action::Abandon);
        self
    }

    pub(super) fn seal(mut self, seal: Seal, out: &mut Vec<Action>) -> Result<Self, SessionError> {
        if seal.generation != self.generation {
            return Err(SessionError::SealGeneration { ours: self.generation, theirs: seal.generation });
        }
        let due = self.seals.back().map_or(self.sealed, |s| s.epoch).next();
        if seal.epoch != due {
            return Err(SessionError::SealOrder { epoch: seal.epoch, due });
        }
        if self.seals.len() + self.committing.len() >= usize::from(EPOCHS_IN_FLIGHT_MAX) {
            return Err(SessionError::InFlight);
        }
        self.seals.push_back(seal);
        self.try_commit(out)
    }

    pub(super) fn try_commit(mut self, out: &mut Vec<Action>) -> Result<Self, SessionError> {
        let complete = self.open.as_ref().is_some_and(|o| o.complete);
        let Some(seal) = self.seals.pop_front_if(|_| complete) else { return Ok(self) };
        let Some(open) = self.open.take() else { return Ok(self) };
        let epoch = seal.epoch;
        let t = &open.tally;
        let differ = |what| Err(SessionError::SealMismatch { epoch, what });
        if open.passes != seal.passes {
            return differ("passes");
        }
        if (t.frames, t.frame_bytes, t.data_blocks, t.zero_blocks)
            != (seal.frames, seal.frame_bytes, seal.data_blocks, seal.zero_blocks)
        {
            return differ("counts");
        }
        if !t.matches(&seal) {
            return differ("digests");
        }
        // A primary cuts an epoch when something changed; empty ones would be points without end that cost it nothing.
        if seal.frames == 0 {
            return Err(SessionError::EmptyEpoch { epoch });
        }
        self.sealed = epoch;
        self.committing.push_back(seal.point());
        out.push(Action::Commit(seal));
        self.scrub_waiting(epoch, out);
        Ok(self)
    }

    /// Hashes are of the newest point, so none may be asked for while that is about to change.
    pub(super) fn hash(mut self, query: HashQuery, out: &mut Vec<Action>) -> Result<Self, SessionError> {
        if self.open.as_ref().is_some_and(|o| !o.suspended) || !self.seals.is_empty() || !self.committing.is_empty() {
            return Err(SessionError::HashOrder);
        }
        if self.hashing >= QUERIES_IN_FLIGHT_MAX {
            return Err(SessionError::HashQueries);
        }
        let blocks = self.volume_blocks.get(usize::from(query.volume.0)).copied().unwrap_or(0);
        if query.end() > blocks {
            return Err(SessionError::HashRange { volume: query.volume.0, end: query.end(), blocks });
        }
        self.hashing += 1;
        out.push(Action::Hash(query));
        Ok(self)
    }

    pub(super) fn committed(mut self, point: Point, out: &mut Vec<Action>) -> Self {
        debug_assert_eq!(self.committing.front(), Some(&point), "commits are done in order");
        self.committing.pop_front();
        out.push(Action::Send(Message::Committed { point }));
        self
    }
}
