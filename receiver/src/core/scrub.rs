//! When a scrub may be compared: at its own epoch, after its commit was started and before the next one is.

use proto::scrub::SCRUBS_IN_FLIGHT_MAX;
use proto::{EpochId, Message, Scrub, ScrubOutcome, Scrubbed};

use super::{Action, SessionError, Streaming};

impl Streaming {
    /// A scrub is of the last epoch that was sealed before it. Its commit may be under way, or its frames; then it is compared as soon as the
    /// commit is started, before the next one can be. Of another epoch nothing can be said, which is no fault: a seal may have been on its way.
    pub(super) fn scrub(mut self, scrub: Scrub, out: &mut Vec<Action>) -> Result<Self, SessionError> {
        if self.scrubs.len() + self.scrubbing >= SCRUBS_IN_FLIGHT_MAX {
            return Err(SessionError::Scrubs);
        }
        let blocks = self.volume_blocks.get(usize::from(scrub.volume.0)).copied().unwrap_or(0);
        if scrub.end() > blocks {
            return Err(SessionError::ScrubRange { volume: scrub.volume.0, end: scrub.end(), blocks });
        }
        if scrub.epoch == self.sealed && self.sealed != EpochId(0) {
            self.scrubbing += 1;
            out.push(Action::Scrub(scrub));
        } else if self.seals.iter().any(|seal| seal.epoch == scrub.epoch) {
            self.scrubs.push(scrub);
        } else {
            out.push(Action::Send(Message::Scrubbed(Scrubbed { id: scrub.id, outcome: ScrubOutcome::Stale })));
        }
        Ok(self)
    }

    /// The commit of `epoch` is started: what was kept for it is compared.
    pub(super) fn scrub_waiting(&mut self, epoch: EpochId, out: &mut Vec<Action>) {
        let (now, later) = std::mem::take(&mut self.scrubs).into_iter().partition(|scrub| scrub.epoch == epoch);
        self.scrubs = later;
        self.scrubbing += now.len();
        out.extend(now.into_iter().map(Action::Scrub));
    }
}
