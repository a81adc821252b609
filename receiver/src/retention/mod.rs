//! What is given up, and when: the ladder decides which points, the space limits may ask for more, and what somebody needs stays. Points before the oldest one
//! that stays are folded into the base; points between those that stay are thinned away (`thin`).
//!
//! Decides only; the keeper has it done. Always holds: the newest point, named points, pinned points and that of the fork in use stay, whatever is
//! asked for.

pub(crate) mod keeper;
mod ladder;
pub(crate) mod thin;

use std::collections::BTreeSet;

use proto::Point;
use serde::{Deserialize, Serialize};

use crate::group::PointEntry;
use crate::journal::Segment;

pub use ladder::{Ladder, LadderError, RUNGS_MAX, Rung};

/// A client that has used more of its space than this many per cent gives up points earlier than its ladder says.
pub(crate) const SPACE_HIGH_PERCENT: u64 = 85;
/// Until it uses no more than so many.
pub(crate) const SPACE_LOW_PERCENT: u64 = 70;

/// How retention of a group fares.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetentionStatus {
    /// The point that the base shows; `None`: nothing was folded yet.
    pub base: Option<Point>,
    /// A fold up to this point runs, or is to be done again.
    pub folding: Option<Point>,
    /// Bytes of the journal that it has looked through.
    pub folding_done_bytes: u64,
    /// Bytes of the journal when it began.
    pub folding_total_bytes: u64,
    /// Folds done since the node was started.
    pub folds: u64,
    /// Bytes written into the base since the node was started.
    pub folded_bytes: u64,
    /// Bytes of journal given back since the node was started.
    pub freed_bytes: u64,
    /// Points were given up before their time since the node was started, because the client's space or the group's was nearly used.
    pub early_folds: u64,
    /// Bytes of the segments that are being thinned that were looked through; 0 while none are.
    #[serde(default)]
    pub thinning_done_bytes: u64,
    /// Bytes of them.
    #[serde(default)]
    pub thinning_total_bytes: u64,
    /// Times that segments were thinned since the node was started.
    #[serde(default)]
    pub thins: u64,
    /// How many of these were earlier than the ladder says, for want of space.
    #[serde(default)]
    pub early_thins: u64,
    /// Points that were left out since the node was started.
    #[serde(default)]
    pub thinned_points: u64,
    /// Bytes of journal given back by that.
    #[serde(default)]
    pub thinned_freed_bytes: u64,
    /// Bytes written for that: what survived.
    #[serde(default)]
    pub thinned_written_bytes: u64,
    /// The oldest point that somebody looks at, if it holds folding back.
    pub held_by: Option<Point>,
    /// Why the last fold, or thinning, failed.
    pub last_error: Option<String>,
    /// Bytes of bases without checksums, of which they are being made, that were looked at.
    #[serde(default)]
    pub sums_done_bytes: u64,
    /// Bytes of data in those bases; 0: every base has checksums, or they cannot be made.
    #[serde(default)]
    pub sums_total_bytes: u64,
    /// Why bases have no checksums.
    #[serde(default)]
    pub sums_error: Option<String>,
}

/// What is known of a group when it is looked at.
pub(crate) struct Situation<'a> {
    /// Oldest first.
    pub(crate) points: &'a [PointEntry],
    pub(crate) base: Option<Point>,
    /// A fold that has begun.
    pub(crate) folding: Option<Point>,
    /// The oldest point that is pinned, or that of the fork in use.
    pub(crate) pinned: Option<Point>,
    pub(crate) named: &'a BTreeSet<Point>,
    /// The segments that have ended, in order.
    pub(crate) ended: &'a [Segment],
    /// What the space limit wants this group to give up.
    pub(crate) to_free: u64,
    pub(crate) now_unix_us: u64,
}

/// A fold that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Due {
    pub(crate) to: Point,
    /// Space asks for it, not the ladder.
    pub(crate) early: bool,
}

/// The fold that is due, if one is; and the pinned point that holds one back.
pub(crate) fn due(ladder: &Ladder, of: &Situation<'_>) -> (Option<Due>, Option<Point>) {
    let Some((newest, older)) = of.points.split_last() else { return (None, None) };
    let cuts: Vec<u64> = of.points.iter().map(|p| p.cut_unix_us).collect();
    let kept = ladder.kept(&cuts, of.now_unix_us);
    let oldest_kept = of.points.iter().zip(&kept).find(|(p, kept)| **kept || of.named.contains(&p.point));
    let by_ladder = oldest_kept.map_or(newest.point, |(p, _)| p.point);
    let by_space = older.iter().find(|p| of.to_free > 0 && freed_by(p, of.ended) >= of.to_free).or(older.last());
    let early = by_space.map(|p| p.point).filter(|p| of.to_free > 0 && *p > by_ladder);
    let wanted = early.unwrap_or(by_ladder);
    // What nobody may give up: folding stops at the first of them.
    let named = of.named.iter().find(|name| of.points.iter().any(|p| p.point == **name)).copied();
    let bound = [of.pinned, named].into_iter().flatten().min();
    let to = older.iter().rev().find(|p| p.point <= wanted && bound.is_none_or(|bound| p.point <= bound));
    let held_by = of.pinned.filter(|pinned| *pinned < wanted && Some(*pinned) == bound);
    let Some(to) = to else { return (None, held_by) };
    // What has begun is brought to its end; else it has to be worth the while. What was just received is left alone: a first copy would be written
    // a second time while its successors arrive.
    let age_us = of.now_unix_us.min(newest.cut_unix_us).saturating_sub(to.cut_unix_us);
    let is_settled = early.is_some() || ladder.rungs().first().is_some_and(|rung| u128::from(age_us) > rung.reach.as_micros());
    let due = of.folding.is_some() || (is_settled && of.base < Some(to.point) && freed_by(to, of.ended) > 0);
    (due.then_some(Due { to: to.point, early: early.is_some() }), held_by)
}

/// Bytes of the segments that nobody needs when everything up to `point` is in the base.
fn freed_by(point: &PointEntry, ended: &[Segment]) -> u64 {
    let is_before = |segment: &&Segment| {
        segment.number < point.end.segment || (segment.number == point.end.segment && segment.bytes == point.end.bytes)
    };
    ended.iter().filter(is_before).map(|segment| segment.bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Mark;
    use proto::{EpochId, Generation, SessionToken};

    const HOUR_US: u64 = 3_600_000_000;

    fn point(epoch: u64) -> Point {
        Point { generation: Generation(1), epoch: EpochId(epoch) }
    }

    /// A point an hour, each at the end of a segment of 100 bytes.
    fn points(count: u64) -> Vec<PointEntry> {
        let one = |epoch: u64| PointEntry {
            point: point(epoch),
            cut_unix_us: epoch * HOUR_US,
            first_write_unix_us: 0,
            frame_bytes: 0,
            data_blocks: 0,
            zero_blocks: 0,
            session: SessionToken::default(),
            end: Mark { segment: epoch as u32, bytes: 100 },
            next_frame: 0,
        };
        (1..=count).map(one).collect()
    }

    struct Given {
        count: u64,
        base: Option<u64>,
        folding: Option<u64>,
        pinned: Option<u64>,
        named: Vec<u64>,
        to_free: u64,
    }

    const NOTHING: Given = Given { count: 0, base: None, folding: None, pinned: None, named: Vec::new(), to_free: 0 };

    fn decide(given: &Given) -> (Option<(u64, bool)>, Option<u64>) {
        let points = points(given.count);
        let ended: Vec<Segment> =
            (1..given.count as u32).map(|number| Segment { number, last: number, bytes: 100, thinned: 0 }).collect();
        let named = given.named.iter().copied().map(point).collect();
        let situation = Situation {
            points: &points,
            base: given.base.map(point),
            folding: given.folding.map(point),
            pinned: given.pinned.map(point),
            named: &named,
            ended: &ended,
            to_free: given.to_free,
            now_unix_us: u64::MAX,
        };
        let (due, held) = due(&Ladder::default(), &situation);
        (due.map(|due| (due.to.epoch.0, due.early)), held.map(|p| p.epoch.0))
    }

    /// Every row: what is asked for, what stands in the way. Would catch a fold past a pin, a named point or the newest.
    #[test]
    fn what_is_folded_is_decided_for_every_kind_of_obstacle() {
        let month = 30 * 24;
        let rows = [
            // Nothing is old enough to be given up; the oldest point can be the base's.
            (Given { count: month, ..NOTHING }, (Some((1, false)), None)),
            (Given { count: month, base: Some(1), ..NOTHING }, (None, None)),
            // It is hardly received.
            (Given { count: 1, ..NOTHING }, (None, None)),
            // Two days beyond the ladder: up to the first point of the 30 days.
            (Given { count: month + 48, ..NOTHING }, (Some((48, false)), None)),
            (Given { count: month + 48, base: Some(48), ..NOTHING }, (None, None)),
            // A pin before that.
            (Given { count: month + 48, pinned: Some(20), ..NOTHING }, (Some((20, false)), Some(20))),
            (Given { count: month + 48, pinned: Some(20), base: Some(20), ..NOTHING }, (None, Some(20))),
            (Given { count: month + 48, pinned: Some(60), ..NOTHING }, (Some((48, false)), None)),
            // A name before that holds folding, and is no pin.
            (Given { count: month + 48, named: vec![30], ..NOTHING }, (Some((30, false)), None)),
            (Given { count: month + 48, named: vec![30], base: Some(30), ..NOTHING }, (None, None)),
            // Space: 250 bytes are in three segments.
            (Given { count: 10, to_free: 250, ..NOTHING }, (Some((3, true)), None)),
            (Given { count: 10, to_free: 250, pinned: Some(2), ..NOTHING }, (Some((2, true)), Some(2))),
            (Given { count: 10, to_free: 250, named: vec![1], ..NOTHING }, (Some((1, true)), None)),
            // More than there is: all but the newest.
            (Given { count: 10, to_free: 1 << 40, ..NOTHING }, (Some((9, true)), None)),
            (Given { count: 1, to_free: 1 << 40, ..NOTHING }, (None, None)),
            (NOTHING, (None, None)),
            // What has begun goes on, though it frees nothing by now.
            (Given { count: 10, folding: Some(1), ..NOTHING }, (Some((1, false)), None)),
        ];
        for (i, (given, expected)) in rows.iter().enumerate() {
            assert_eq!(decide(given), *expected, "row {i}");
        }
    }
}
