//! Which points are kept: a pure function of their times, the ladder and the time of day.
//!
//! Up to a rung's reach one point of each interval is kept, the first; intervals begin at multiples of their length since 1970, so
//! that a point that a rung keeps, the finer rungs before it kept too (if its interval is a multiple of theirs). A point beyond the last rung is given up. The newest is always kept.

use std::time::Duration;

/// Rungs a ladder may have.
pub const RUNGS_MAX: usize = 16;

/// One rung.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rung {
    /// One point of each interval of this length; `None`: all of them.
    pub every: Option<Duration>,
    /// Up to this age.
    pub reach: Duration,
}

/// Which points are kept, and for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ladder(Vec<Rung>);

/// Why rungs are no ladder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LadderError {
    /// None, or too many.
    #[error("a ladder has 1 to {RUNGS_MAX} rungs")]
    Count,
    /// A rung that does not reach further than the one before it.
    #[error("each rung reaches further than the one before it")]
    Reach,
    /// A rung that keeps more than the one before it.
    #[error("each rung keeps fewer points than the one before it")]
    Every,
}

impl Default for Ladder {
    /// Every epoch for 10 minutes, one a minute for 6 hours, one an hour for 3 days, one a day for 30 days.
    fn default() -> Self {
        let rung = |every: u64, reach| Rung {
            every: (every > 0).then(|| Duration::from_secs(every)),
            reach: Duration::from_secs(reach),
        };
        Self(vec![rung(0, 600), rung(60, 6 * 3600), rung(3600, 3 * 86_400), rung(86_400, 30 * 86_400)])
    }
}

impl Ladder {
    /// A ladder of these rungs, finest first.
    ///
    /// # Errors
    /// [`LadderError`].
    pub fn new(rungs: Vec<Rung>) -> Result<Self, LadderError> {
        if rungs.is_empty() || rungs.len() > RUNGS_MAX {
            return Err(LadderError::Count);
        }
        for (a, b) in rungs.iter().zip(rungs.iter().skip(1)) {
            if a.reach >= b.reach {
                return Err(LadderError::Reach);
            }
            if a.every >= b.every {
                return Err(LadderError::Every);
            }
        }
        if rungs.iter().any(|r| r.every.is_some_and(|every| every.is_zero()) || r.reach.is_zero()) {
            return Err(LadderError::Reach);
        }
        Ok(Self(rungs))
    }

    /// The rungs, finest first.
    #[must_use]
    pub fn rungs(&self) -> &[Rung] {
        &self.0
    }

    /// Whether each of the points, given by the times of their cuts and oldest first, is kept.
    ///
    /// Ages are taken against the newest cut and against this machine's clock, whichever says younger: while the primary is away nothing ages, and a
    /// primary whose clock runs ahead makes nothing old.
    #[must_use]
    pub fn kept(&self, cuts_unix_us: &[u64], now_unix_us: u64) -> Vec<bool> {
        self.kept_early(cuts_unix_us, now_unix_us, 0)
    }

    /// As [`kept`](Self::kept), with each point `haste` rungs further down than it is: fewer are kept. The last rung's reach stays as it is.
    #[must_use]
    pub fn kept_early(&self, cuts_unix_us: &[u64], now_unix_us: u64, haste: usize) -> Vec<bool> {
        let now = now(cuts_unix_us, now_unix_us);
        let mut kept = Vec::with_capacity(cuts_unix_us.len());
        let mut before = None;
        for (i, cut) in cuts_unix_us.iter().enumerate() {
            let rung = self.rung(now.saturating_sub(*cut), haste).and_then(|number| self.0.get(number));
            kept.push(match rung {
                _ if i + 1 == cuts_unix_us.len() => true,
                None => false,
                Some(Rung { every: None, .. }) => true,
                // Whatever rung the point before it is on: what is the first now will be the first when both are older.
                Some(Rung { every: Some(every), .. }) => {
                    let interval = |cut: u64| cut / u64::try_from(every.as_micros()).unwrap_or(u64::MAX).max(1);
                    before.is_none_or(|before| interval(before) != interval(*cut))
                }
            });
            before = Some(*cut);
        }
        kept
    }

    /// The rung of a point of this age, `haste` further down than it is; `None` beyond the last one.
    fn rung(&self, age_us: u64, haste: usize) -> Option<usize> {
        let number = self.0.iter().position(|rung| u128::from(age_us) <= rung.reach.as_micros())?;
        Some((number + haste).min(self.0.len() - 1))
    }

    /// The interval of the rung of a point of this cut, in microseconds; `None` where all are kept, and beyond the last rung.
    pub(crate) fn interval(&self, cut_unix_us: u64, now_us: u64, haste: usize) -> Option<u64> {
        let every = self.0.get(self.rung(now_us.saturating_sub(cut_unix_us), haste)?)?.every?;
        u64::try_from(every.as_micros()).ok()
    }

    /// How much is left out where all points are at least as old as one of this cut: 0 for nothing, more for longer intervals, 255 beyond
    /// the last rung. Intervals that differ by less than a fifth may have the same.
    pub(crate) fn spacing(&self, cut_unix_us: u64, now_us: u64, haste: usize) -> u8 {
        let Some(rung) = self.rung(now_us.saturating_sub(cut_unix_us), haste) else { return u8::MAX };
        let every = self.0.get(rung).and_then(|rung| rung.every);
        // 1000 years are 180.
        every.map_or(0, |every| (every.as_millis().max(1) as f64).log2().mul_add(4.0, 1.0).min(254.0) as u8)
    }
}

/// What ages are taken against.
pub(crate) fn now(cuts_unix_us: &[u64], now_unix_us: u64) -> u64 {
    cuts_unix_us.last().map_or(now_unix_us, |newest| now_unix_us.min(*newest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const S: u64 = 1_000_000;
    const DAY: u64 = 86_400;

    /// A clock that moves through 40 days, a point every 30 s: what is kept at each instant is what was kept before or is new, and every rung has
    /// what it promises. Would catch points that are given up by one rung and needed by the next.
    #[test]
    fn forty_days_keep_what_each_rung_promises() {
        let ladder = Ladder::default();
        let mut points: Vec<u64> = Vec::new();
        let begin = 1_800_000_000 * S;
        for step in 0..40 * DAY / 30 {
            let now = begin + step * 30 * S;
            points.push(now);
            // Looked at now and then, as a keeper does.
            if step % 97 != 0 && step + 1 != 40 * DAY / 30 {
                continue;
            }
            let kept = ladder.kept(&points, now);
            let mut kept = kept.iter();
            points.retain(|_| *kept.next().unwrap());
            let has = |from: u64, to: u64| points.iter().any(|p| *p >= from && *p <= to);
            for rung in ladder.rungs() {
                let every = rung.every.map_or(30 * S, |e| e.as_micros() as u64);
                let reach = rung.reach.as_micros() as u64;
                let mut at = (now - reach.min(now - begin)).next_multiple_of(every);
                while at + every <= now {
                    assert!(has(at, at + every), "nothing of {}..{} s before {step}", (now - at) / S, (now - at - every) / S);
                    at += every;
                }
            }
            assert!(points.len() < 20 + 21 + 360 + 74 + 31 + 100, "{} points", points.len());
        }
        assert!(points.first().is_some_and(|p| *p + 31 * DAY * S > *points.last().unwrap()));
    }

    #[test]
    fn a_primary_that_is_away_or_ahead_makes_nothing_old() {
        let ladder = Ladder::default();
        let cuts = [100 * S, 101 * S, 102 * S];
        assert_eq!(ladder.kept(&cuts, 400 * DAY * S), [true; 3]);
        let ahead = [100 * S, 101 * S, 400 * DAY * S];
        assert_eq!(ladder.kept(&ahead, 102 * S), [true; 3]);
        assert_eq!(ladder.kept(&ahead, 400 * DAY * S), [false, false, true]);
        assert!(ladder.kept(&[], 5).is_empty());
    }

    proptest! {
        /// A primary sets the times of its cuts. Would catch a way to have points left out, or given up, that this machine's clock keeps, by what is committed after them.
        #[test]
        fn what_is_committed_later_makes_nothing_older(
            mut before in prop::collection::vec(0..50 * DAY * S, 1..100),
            later in prop::collection::vec(prop_oneof![0..60 * DAY * S, Just(u64::MAX), Just(0)], 1..20),
            clock in 0..60 * DAY * S,
        ) {
            let ladder = Ladder::default();
            before.sort_unstable();
            let by_clock = ladder.kept(&[&before[..], &[u64::MAX]].concat(), clock);
            let kept = ladder.kept(&[&before[..], &later[..]].concat(), clock);
            for (i, cut) in before.iter().enumerate() {
                prop_assert!(kept[i] || !by_clock[i], "{cut}");
            }
        }

        /// Clocks may jump: the newest is kept whatever they say, and looking again at once gives nothing more up.
        #[test]
        fn the_newest_is_kept_and_a_second_look_changes_nothing(cuts in prop::collection::vec(0..50 * DAY * S, 1..200), now in 0..60 * DAY * S) {
            let ladder = Ladder::default();
            let kept = ladder.kept(&cuts, now);
            prop_assert!(*kept.last().unwrap());
            let sorted = { let mut c = cuts.clone(); c.sort_unstable(); c };
            let kept = ladder.kept(&sorted, now);
            let left: Vec<u64> = sorted.iter().zip(&kept).filter(|(_, k)| **k).map(|(c, _)| *c).collect();
            prop_assert!(ladder.kept(&left, now).iter().all(|k| *k));
        }
    }
}
