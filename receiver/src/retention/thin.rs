//! Which points between those that are kept are left out, and which segments of the journal are rewritten for that: a pure function.
//!
//! The unit is a run of segments between two borders that are borders of epochs too. It is due when all its points have come down to a rung that
//! keeps fewer than what it was thinned to before, so a frame is rewritten at most once a rung. The last point of what is rewritten stays: its
//! seal ends it. So that these are few, units wait until they fill a segment together, or span some of the rung's intervals.

use std::collections::BTreeSet;

use proto::Point;

use super::ladder::{Ladder, now};
use crate::group::PointEntry;
use crate::journal::Segment;

/// Most bytes that become one segment, if they are one unit. Offsets in a segment have 32 bits, and an index of what is rewritten has to fit the memory.
pub(crate) const RANGE_BYTES_MAX: u64 = 1 << 30;

/// What spans so many intervals of its rung waits no longer: at most one point in so many is there only because it is the last.
const INTERVALS: u64 = 4;

/// What is known of a group's journal when it is looked at.
pub(crate) struct Situation<'a> {
    /// Oldest first.
    pub(crate) points: &'a [PointEntry],
    /// Points that stay whatever their age.
    pub(crate) stay: &'a BTreeSet<Point>,
    /// The segments that have ended, in order.
    pub(crate) ended: &'a [Segment],
    /// Units are put together up to so many bytes.
    pub(crate) segment_bytes_max: u64,
    pub(crate) now_unix_us: u64,
    /// What is hardly worth a segment of its own waits for what comes after it.
    pub(crate) patient: bool,
}

/// What is to be thinned: it becomes one segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Numbers of its first and last segment.
    pub(crate) first: u32,
    pub(crate) last: u32,
    /// Bytes of them.
    pub(crate) bytes: u64,
    /// Points that are left out.
    pub(crate) drop: BTreeSet<Point>,
    /// What stands in the header: see [`Ladder::spacing`].
    pub(crate) spacing: u8,
}

/// A run of segments that begins and ends with an epoch.
struct Unit {
    first: u32,
    last: u32,
    bytes: u64,
    /// Its points.
    points: std::ops::Range<usize>,
    thinned: u8,
}

/// The oldest segments in which points can be left out, with each point `haste` rungs further down than it is.
pub(crate) fn plan(ladder: &Ladder, of: &Situation<'_>, haste: usize) -> Option<Plan> {
    let cuts: Vec<u64> = of.points.iter().map(|p| p.cut_unix_us).collect();
    let kept = ladder.kept_early(&cuts, of.now_unix_us, haste);
    let now = now(&cuts, of.now_unix_us);
    let goes = |i: usize| {
        let (Some(point), Some(next)) = (of.points.get(i), of.points.get(i + 1)) else { return false };
        // Where a generation ends stays: that is where somebody decided something.
        kept.get(i) == Some(&false) && next.point.generation == point.point.generation && !of.stay.contains(&point.point)
    };
    let youngest = |points: std::ops::Range<usize>| cuts.get(points).unwrap_or_default().iter().max().copied();
    let spacing_of = |unit: &Unit| youngest(unit.points.clone()).map_or(0, |cut| ladder.spacing(cut, now, haste));
    let spans = |first: usize, end: usize| {
        let (from, to) = (cuts.get(first).copied().unwrap_or(0), youngest(first..end).unwrap_or(0));
        let every_us = ladder.interval(to, now, haste).unwrap_or(0);
        to.saturating_sub(from) >= every_us.saturating_mul(INTERVALS)
    };
    let units = units(of);
    let due = |unit: &Unit| Some(spacing_of(unit)).filter(|spacing| *spacing > unit.thinned);
    for (i, begin) in units.iter().enumerate() {
        let Some(spacing) = due(begin).filter(|_| begin.bytes <= RANGE_BYTES_MAX) else { continue };
        let (mut end, mut bytes) = (begin, begin.bytes);
        let dropped = |end: &Unit| (begin.points.start..end.points.end.saturating_sub(1)).filter(|i| goes(*i));
        let mut is_full = false;
        for next in units.get(i + 1..).unwrap_or_default() {
            let max = if dropped(end).next().is_none() { RANGE_BYTES_MAX } else { of.segment_bytes_max };
            if next.first != end.last + 1 || due(next) != Some(spacing) || bytes + next.bytes > max {
                // What is younger comes down to this rung, too.
                is_full = next.first != end.last + 1 || spacing_of(next) >= spacing;
                break;
            }
            (end, bytes) = (next, bytes + next.bytes);
        }
        if of.patient && !is_full && !spans(begin.points.start, end.points.end) {
            continue;
        }
        let drop: BTreeSet<Point> = dropped(end).filter_map(|i| of.points.get(i)).map(|p| p.point).collect();
        if !drop.is_empty() {
            return Some(Plan { first: begin.first, last: end.last, bytes, drop, spacing });
        }
    }
    None
}

/// The units of the segments before that of the newest point.
fn units(of: &Situation<'_>) -> Vec<Unit> {
    let Some(newest) = of.points.last() else { return Vec::new() };
    let (mut units, mut open) = (Vec::new(), None::<Unit>);
    let mut at = of.ended.first().map_or(0, |first| of.points.partition_point(|p| p.end.segment < first.number));
    for segment in of.ended.iter().filter(|segment| segment.last < newest.end.segment) {
        let points = at..at + of.points.get(at..).unwrap_or_default().partition_point(|p| p.end.segment <= segment.last);
        at = points.end;
        let ends = of.points.get(points.clone()).and_then(<[_]>::last).is_some_and(|p| p.end.bytes == segment.bytes);
        let unit = open.get_or_insert(Unit {
            first: segment.number,
            last: segment.last,
            bytes: 0,
            points: points.start..points.start,
            thinned: 0,
        });
        unit.last = segment.last;
        unit.bytes += segment.bytes;
        unit.points.end = points.end;
        unit.thinned = unit.thinned.max(segment.thinned);
        if ends {
            units.extend(open.take());
        }
    }
    units
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Mark;
    use proto::{EpochId, Generation, SessionToken};
    use std::collections::BTreeMap;
    use std::time::Duration;

    const S: u64 = 1_000_000;
    const HOUR: u64 = 3600;
    const DAY: u64 = 24 * HOUR;
    const MAX: u64 = 1000;

    fn entry(epoch: u64, generation: u64, cut_unix_us: u64, (segment, bytes): (u32, u64)) -> PointEntry {
        PointEntry {
            point: Point { generation: Generation(generation), epoch: EpochId(epoch) },
            cut_unix_us,
            first_write_unix_us: 0,
            frame_bytes: 0,
            data_blocks: 0,
            zero_blocks: 0,
            session: SessionToken::default(),
            end: Mark { segment, bytes },
            next_frame: 0,
        }
    }

    fn segment(number: u32) -> Segment {
        Segment { number, last: number, bytes: 400, thinned: 0 }
    }

    fn ladder(rungs: &[(u64, u64)]) -> Ladder {
        let seconds = |s: u64| Duration::from_secs(s);
        let rung =
            |(every, reach): &(u64, u64)| crate::Rung { every: (*every > 0).then(|| seconds(*every)), reach: seconds(*reach) };
        Ladder::new(rungs.iter().map(rung).collect()).unwrap()
    }

    /// Four points a segment, one a second, the last at the segment's end; the newest is in the segment after `segments`.
    fn journal(segments: u32) -> (Vec<PointEntry>, Vec<Segment>) {
        let mut points = Vec::new();
        for number in 1..=segments + 1 {
            for i in 1..=4 {
                let epoch = u64::from(number - 1) * 4 + i;
                points.push(entry(epoch, 1, epoch * S, (number, i * 100)));
            }
        }
        (points, (1..=segments).map(segment).collect())
    }

    fn planned(points: &[PointEntry], ended: &[Segment], stay: &[u64], haste: usize) -> Option<(u32, u32, Vec<u64>)> {
        let stay = points.iter().map(|p| p.point).filter(|p| stay.contains(&p.epoch.0)).collect();
        let of = Situation { points, stay: &stay, ended, segment_bytes_max: MAX, now_unix_us: u64::MAX, patient: false };
        let plan = plan(&ladder(&[(0, 10), (4, 100), (20, 1000)]), &of, haste)?;
        assert_eq!(plan.bytes, ended.iter().filter(|s| (plan.first..=plan.last).contains(&s.number)).map(|s| s.bytes).sum());
        Some((plan.first, plan.last, plan.drop.iter().map(|p| p.epoch.0).collect()))
    }

    /// Every kind of obstacle. Would catch a plan that drops what stays, that takes a segment in which an epoch begins or ends elsewhere, that begins before all
    /// points have come down to the rung, or that does the same again.
    #[test]
    fn what_is_left_out_is_decided_for_every_kind_of_obstacle() {
        // Epochs 1 to 16, at seconds of the same number; the ages are 15 to 0.
        let (points, ended) = journal(3);
        // Only those of the first segment are all beyond 10 s; the intervals of 4 s begin at 0 and 4.
        assert_eq!(planned(&points, &ended, &[], 0), Some((1, 1, vec![2, 3])));
        assert_eq!(planned(&points, &ended, &[2], 0), Some((1, 1, vec![3])));
        assert_eq!(planned(&points, &ended, &[2, 3], 0), None);
        assert_eq!(planned(&points, &[], &[], 0), None);
        assert_eq!(planned(&[], &ended, &[], 0), None);
        // For want of space one rung further down: two of them fit into one, and the last point of the first one goes too.
        assert_eq!(planned(&points, &ended, &[], 1), Some((1, 1, vec![2, 3])), "the rung of 20 s begins for the first only");
        let done = |number: u32, thinned| {
            ended.iter().map(|s| if s.number == number { Segment { thinned, ..*s } } else { *s }).collect::<Vec<_>>()
        };
        assert_eq!(planned(&points, &done(1, u8::MAX), &[], 1), Some((2, 3, vec![5, 6, 7, 9, 10, 11])));
        assert_eq!(planned(&points, &done(1, u8::MAX), &[], 0), None, "done, and the others are too young");
        assert_eq!(planned(&points, &done(1, 1), &[], 0), Some((1, 1, vec![2, 3])), "was thinned to less than this rung");
        // The segment of the newest point is still written to, whatever the list says.
        assert_eq!(planned(&points, &done(9, 0), &[], 2).map(|(_, last, _)| last), Some(2));
        // An epoch that goes on in the next segment ties the two together.
        let mut tied = points.clone();
        tied[3].end = Mark { segment: 2, bytes: 20 };
        assert_eq!(planned(&tied, &ended, &[], 0), None, "5 to 8 are too young");
        assert_eq!(planned(&tied, &ended, &[], 2), Some((1, 2, vec![2, 3, 4, 5, 6, 7])));
        // Where a generation ends, its last point stays.
        let mut handed = points.clone();
        for p in &mut handed[2..] {
            p.point.generation = Generation(2);
        }
        assert_eq!(planned(&handed, &ended, &[], 0), Some((1, 1, vec![3])));
    }

    /// Would catch a segment whose last point stays for good although the next segment could have gone with it, and one that waits for ever.
    #[test]
    fn what_is_hardly_worth_a_segment_waits_for_the_next() {
        let (points, ended) = journal(9);
        let none = BTreeSet::new();
        let plan = |count: usize, ended: &[Segment], every: u64, segment_bytes_max: u64| {
            let points = &points[..count];
            let of = Situation { points, stay: &none, ended, segment_bytes_max, now_unix_us: u64::MAX, patient: true };
            plan(&ladder(&[(0, 4), (every, 100)]), &of, 0).map(|plan| (plan.first, plan.last))
        };
        // One point in 10 s, the segments are of 4 s each: the first is old enough, the second is not.
        assert_eq!(plan(10, &ended[..2], 10, 900), None);
        // A third one would not fit, so nothing is waited for.
        assert_eq!(plan(18, &ended[..4], 10, 900), Some((1, 2)));
        // The second was looked at and left as it is: it will not come.
        let passed: Vec<_> = ended.iter().map(|s| Segment { thinned: if s.number == 2 { u8::MAX } else { 0 }, ..*s }).collect();
        assert_eq!(plan(14, &passed[..3], 10, 900), Some((1, 1)));
        // One point in 2 s: the first spans 3 s, three of them 11 s, which is enough.
        assert_eq!(plan(10, &ended[..2], 2, 5000), None);
        assert_eq!(plan(18, &ended[..4], 2, 5000), Some((1, 3)));
        // Nothing is kept behind the ladder: that waits for nothing.
        let of = Situation {
            points: &points[..10],
            stay: &none,
            ended: &ended[..2],
            segment_bytes_max: 900,
            now_unix_us: u64::MAX,
            patient: true,
        };
        assert_eq!(super::plan(&ladder(&[(0, 4)]), &of, 0).map(|plan| plan.last), Some(1));
    }

    /// Segments with one point each are put together until a point can go.
    #[test]
    fn points_alone_in_their_segments_are_put_together() {
        let points: Vec<_> = (1..=20).map(|epoch| entry(epoch, 1, epoch * S, (epoch as u32, 400))).collect();
        let ended: Vec<_> = (1..=19).map(segment).collect();
        // 1, 4, 8 are the first of their intervals of 4 s; 1 and 2 leave nothing out, with 3 it is 2.
        assert_eq!(planned(&points, &ended, &[], 0), Some((1, 3, vec![2])));
        let large: Vec<_> = ended.iter().map(|s| Segment { bytes: RANGE_BYTES_MAX / 2 + 1, ..*s }).collect();
        let points: Vec<_> =
            points.iter().map(|p| PointEntry { end: Mark { bytes: RANGE_BYTES_MAX / 2 + 1, ..p.end }, ..*p }).collect();
        assert_eq!(planned(&points, &large, &[], 0), None, "what is rewritten has a limit");
    }

    /// A clock that moves through 40 days, four points within half a minute of every 10 minutes, a segment of 40 points: what the ladder keeps and what has a name is
    /// never left out, of the rest hardly anything stays, and no segment is rewritten twice on a rung.
    #[test]
    fn forty_days_leave_what_each_rung_keeps() {
        let ladder = Ladder::default();
        let begin = 20_000 * DAY * S;
        let (mut points, mut ended) = (Vec::<PointEntry>::new(), Vec::<Segment>::new());
        let mut rewritten = BTreeMap::<u64, BTreeSet<u8>>::new();
        let named: BTreeSet<Point> = [7, 401, 9_002].map(|e| Point { generation: Generation(1), epoch: EpochId(e) }).into();
        let mut cuts = Vec::new();
        for epoch in 1..=40 * 144 * 4_u64 {
            let now = begin + (epoch / 4 * 600 + epoch % 4 * 10) * S;
            let number = ((epoch - 1) / 40 + 1) as u32;
            points.push(entry(epoch, 1, now, (number, ((epoch - 1) % 40 + 1) * 10)));
            cuts.push(now);
            if epoch % 40 == 1 && epoch > 1 {
                ended.push(segment(number - 1));
            }
            while let Some(plan) = plan(
                &ladder,
                &Situation {
                    points: &points,
                    stay: &named,
                    ended: &ended,
                    segment_bytes_max: MAX,
                    now_unix_us: now,
                    patient: true,
                },
                0,
            ) {
                let of = |p: &PointEntry| (plan.first..=plan.last).contains(&p.end.segment);
                for p in points.iter().filter(|p| of(p) && !plan.drop.contains(&p.point)) {
                    assert!(
                        rewritten.entry(p.point.epoch.0).or_default().insert(plan.spacing),
                        "{} twice at {}",
                        p.point,
                        plan.spacing
                    );
                }
                points.retain(|p| !plan.drop.contains(&p.point));
                let (mut at, left) = (0, points.iter().filter(|p| of(p)).count() as u64);
                for p in points.iter_mut().filter(|p| of(p)) {
                    at += 10;
                    p.end = Mark { segment: plan.first, bytes: at };
                }
                let new = Segment { number: plan.first, last: plan.last, bytes: left * 10, thinned: plan.spacing };
                ended.retain(|s| !(plan.first..=plan.last).contains(&s.number));
                ended.push(new);
                ended.sort_by_key(|s| s.number);
            }
            if !epoch.is_multiple_of(997) {
                continue;
            }
            let kept = ladder.kept(&cuts, now);
            let due: BTreeSet<u64> = (1..).zip(kept).filter(|(_, kept)| *kept).map(|(epoch, _)| epoch).collect();
            let listed: BTreeSet<u64> = points.iter().map(|p| p.point.epoch.0).collect();
            let names = named.iter().map(|p| p.epoch.0).filter(|e| *e <= epoch);
            assert!(due.iter().copied().chain(names).all(|e| listed.contains(&e)), "something is missing at {epoch}");
            let beyond = points.iter().filter(|p| p.cut_unix_us + 30 * DAY * S < now).count();
            assert!(listed.len() < due.len() + beyond + 250, "{} of {} at {epoch}", listed.len(), due.len());
            assert!(beyond < 40, "{beyond} points beyond the ladder at {epoch}");
        }
        assert!(rewritten.values().all(|spacings| spacings.len() <= 4), "once a rung");
    }
}
