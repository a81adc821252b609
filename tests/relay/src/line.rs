//! One direction of a path: what becomes of each datagram, and when.
//!
//! Decides and does nothing: time is passed in, so its tests need no clock and no socket. The order is that of a real path: a queue in
//! front of the narrowest link, which sends at the path's rate, then loss, then the way. A datagram that is lost has taken its share of the rate.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Headers of IPv4 and UDP, which take their share of the rate as well.
pub const HEADER_BYTES: u64 = 28;
/// Bytes under way, after the queue, at most; what would be more is lost and counted as `overflowed`. 5 Gbit/s for 100 ms.
pub const UNDER_WAY_BYTES_MAX: u64 = 64 << 20;
/// The queue by itself holds what the link sends in this time, ...
const QUEUE_TIME: Duration = Duration::from_millis(100);
/// ... and no less than a sender's burst.
const QUEUE_BYTES_MIN: u64 = 64 << 10;

/// What a direction of the path is like. The default changes nothing: no delay, no loss, no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Path {
    /// From the link's end to the other side.
    pub delay: Duration,
    /// Added to the delay of each datagram, evenly from nothing to this: datagrams that are closer to each other than that overtake.
    pub jitter: Duration,
    /// Share of the datagrams that is lost at random, 0 to 1.
    pub loss: f64,
    /// Bits per second of the link, headers included; `None`: no limit. Not 0: that is a cut.
    pub rate_bits_per_s: Option<u64>,
    /// Bytes that wait for the link at most, headers included; what comes when it is full is lost. `None`: what the link sends in
    /// 100 ms, at least 64 KiB.
    pub queue_bytes: Option<u64>,
    /// Payload that a datagram may have; a larger one is lost, as behind a router that does not fragment. `None`: any.
    pub payload_bytes_max: Option<usize>,
}

impl Path {
    fn queue_bytes(&self, rate: u64) -> u64 {
        let of_time = rate as f64 / 8.0 * QUEUE_TIME.as_secs_f64();
        self.queue_bytes.unwrap_or((of_time as u64).max(QUEUE_BYTES_MIN))
    }

    /// # Panics
    /// If a figure makes no sense.
    pub(crate) fn check(&self) {
        assert!((0.0..=1.0).contains(&self.loss), "a path's loss is 0 to 1, not {}", self.loss);
        assert!(self.rate_bits_per_s != Some(0), "a path's rate is not 0: cut it instead");
    }
}

/// What became of the datagrams of a direction. `entered` is the sum of the others and of what is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Datagrams that came from the sender.
    pub entered: u64,
    /// Bytes of their payloads.
    pub entered_bytes: u64,
    /// Datagrams handed to the other side.
    pub delivered: u64,
    /// Bytes of their payloads.
    pub delivered_bytes: u64,
    /// Lost at random.
    pub lost: u64,
    /// Lost because the queue was full.
    pub overflowed: u64,
    /// Lost because they were too large.
    pub too_large: u64,
    /// Lost because the path was cut when they came or when they should have arrived.
    pub cut: u64,
    /// Lost because this machine's network did not take them; part of `delivered` to the model.
    pub refused: u64,
}

struct Waiting<T> {
    bytes: usize,
    item: T,
}

struct UnderWay<T> {
    due: Instant,
    order: u64,
    bytes: usize,
    item: T,
}

impl<T> PartialEq for UnderWay<T> {
    fn eq(&self, other: &Self) -> bool {
        (self.due, self.order) == (other.due, other.order)
    }
}

impl<T> Eq for UnderWay<T> {}

impl<T> PartialOrd for UnderWay<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for UnderWay<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.order).cmp(&(other.due, other.order))
    }
}

/// See the module.
pub(crate) struct Line<T> {
    path: Path,
    cut: bool,
    rng: SmallRng,
    waiting: VecDeque<Waiting<T>>,
    /// With headers.
    waiting_bytes: u64,
    /// When the first of `waiting` began to be sent.
    sending_since: Instant,
    under_way: BinaryHeap<Reverse<UnderWay<T>>>,
    under_way_bytes: u64,
    order: u64,
    counts: Counts,
}

impl<T> Line<T> {
    pub(crate) fn new(seed: u64, now: Instant) -> Self {
        Self {
            path: Path::default(),
            cut: false,
            rng: SmallRng::seed_from_u64(seed),
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            sending_since: now,
            under_way: BinaryHeap::new(),
            under_way_bytes: 0,
            order: 0,
            counts: Counts::default(),
        }
    }

    pub(crate) fn path(&self) -> Path {
        self.path
    }

    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    /// Changes the path. What waits is sent at the new rate, what is under way keeps its time.
    pub(crate) fn set(&mut self, now: Instant, path: Path) {
        path.check();
        self.advance(now);
        self.path = path;
    }

    /// While it is cut, nothing enters and nothing arrives.
    pub(crate) fn set_cut(&mut self, cut: bool) {
        self.cut = cut;
    }

    /// The network did not take what was delivered.
    pub(crate) fn refused(&mut self) {
        self.counts.refused += 1;
    }

    /// A datagram of `bytes` comes.
    pub(crate) fn push(&mut self, now: Instant, bytes: usize, item: T) {
        self.advance(now);
        self.counts.entered += 1;
        self.counts.entered_bytes += bytes as u64;
        if self.cut {
            self.counts.cut += 1;
            return;
        }
        if self.path.payload_bytes_max.is_some_and(|max| bytes > max) {
            self.counts.too_large += 1;
            return;
        }
        let Some(rate) = self.path.rate_bits_per_s else { return self.send(now, bytes, item) };
        // One may always wait, or a queue smaller than a datagram would be a cut.
        let needed = self.waiting_bytes + bytes as u64 + HEADER_BYTES;
        if !self.waiting.is_empty() && needed > self.path.queue_bytes(rate) {
            self.counts.overflowed += 1;
            return;
        }
        if self.waiting.is_empty() {
            self.sending_since = now;
        }
        self.waiting_bytes = needed;
        self.waiting.push_back(Waiting { bytes, item });
    }

    /// The next datagram that has arrived by `now`.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<T> {
        self.advance(now);
        while self.under_way.peek().is_some_and(|Reverse(first)| first.due <= now) {
            let Reverse(UnderWay { bytes, item, .. }) = self.under_way.pop()?;
            self.under_way_bytes -= bytes as u64;
            if self.cut {
                self.counts.cut += 1;
                continue;
            }
            self.counts.delivered += 1;
            self.counts.delivered_bytes += bytes as u64;
            return Some(item);
        }
        None
    }

    /// When to look again at the latest, unless something comes.
    pub(crate) fn next(&self) -> Option<Instant> {
        let sent = self.waiting.front().map(|first| self.sent_at(first.bytes));
        let due = self.under_way.peek().map(|Reverse(first)| first.due);
        [sent, due].into_iter().flatten().min()
    }

    fn sent_at(&self, bytes: usize) -> Instant {
        let bits = (bytes as u64 + HEADER_BYTES) * 8;
        let takes = self.path.rate_bits_per_s.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(bits as f64 / rate as f64));
        self.sending_since + takes
    }

    /// Sends what the link has sent by `now`.
    fn advance(&mut self, now: Instant) {
        while let Some(first) = self.waiting.front() {
            let sent = self.sent_at(first.bytes);
            if sent > now {
                return;
            }
            let Some(Waiting { bytes, item }) = self.waiting.pop_front() else { return };
            self.waiting_bytes -= bytes as u64 + HEADER_BYTES;
            self.sending_since = sent;
            self.send(sent, bytes, item);
        }
    }

    fn send(&mut self, at: Instant, bytes: usize, item: T) {
        if self.rng.random_bool(self.path.loss) {
            self.counts.lost += 1;
            return;
        }
        if self.under_way_bytes + bytes as u64 > UNDER_WAY_BYTES_MAX {
            self.counts.overflowed += 1;
            return;
        }
        let due = at + self.path.delay + self.path.jitter.mul_f64(self.rng.random::<f64>());
        self.order += 1;
        self.under_way_bytes += bytes as u64;
        self.under_way.push(Reverse(UnderWay { due, order: self.order, bytes, item }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn line(path: Path) -> (Line<u32>, Instant) {
        let now = Instant::now();
        let mut line = Line::new(7, now);
        line.set(now, path);
        (line, now)
    }

    /// Everything that arrives within a minute, with the time since `start`.
    fn arrivals(line: &mut Line<u32>, start: Instant) -> Vec<(u32, Duration)> {
        let mut all = Vec::new();
        while let Some(now) = line.next().filter(|next| *next < start + Duration::from_secs(60)) {
            while let Some(item) = line.pop(now) {
                all.push((item, now - start));
            }
        }
        all
    }

    /// Would catch a delay that is not kept, or that is added up along a burst.
    #[test]
    fn every_datagram_is_delayed_alike() {
        let (mut line, now) = line(Path { delay: 40 * MS, ..Path::default() });
        (0..100).for_each(|n| line.push(now + MS * n, 1000, n));
        assert_eq!(line.next(), Some(now + 40 * MS));
        let all = arrivals(&mut line, now);
        assert_eq!(all, (0..100).map(|n| (n, (40 + n) * MS)).collect::<Vec<_>>());
    }

    /// Would catch a jitter that keeps the order, or that leaves its bounds.
    #[test]
    fn jitter_reorders_within_its_bounds() {
        let (mut line, now) = line(Path { delay: 40 * MS, jitter: 10 * MS, ..Path::default() });
        (0..1000).for_each(|n| line.push(now, 1000, n));
        let all = arrivals(&mut line, now);
        assert_eq!(all.len(), 1000);
        assert!(all.iter().all(|(_, at)| (40 * MS..=50 * MS).contains(at)));
        let mean = all.iter().map(|(_, at)| at.as_secs_f64()).sum::<f64>() / 1000.0;
        assert!((0.0445..0.0455).contains(&mean), "mean {mean}");
        let overtaken = all.windows(2).filter(|pair| pair[0].0 > pair[1].0).count();
        assert!(overtaken > 400, "{overtaken} of 1000 were overtaken");
    }

    /// Would catch a loss that is not the given share, is not the seed's, or is not counted.
    #[test]
    fn the_given_share_is_lost_and_the_seed_repeats_it() {
        let lose = |loss| {
            let (mut line, now) = line(Path { loss, ..Path::default() });
            (0..100_000).for_each(|n| line.push(now, 100, n));
            let arrived: Vec<u32> = arrivals(&mut line, now).into_iter().map(|(n, _)| n).collect();
            let counts = line.counts();
            assert_eq!((counts.delivered, counts.lost), (arrived.len() as u64, 100_000 - arrived.len() as u64));
            assert_eq!((counts.entered, counts.entered_bytes), (100_000, 10_000_000));
            assert_eq!(counts.delivered_bytes, counts.delivered * 100);
            arrived
        };
        let arrived = lose(0.01);
        // Five standard deviations.
        assert!((98_842..=99_158).contains(&arrived.len()), "{} arrived", arrived.len());
        assert_eq!(arrived, lose(0.01));
        assert_eq!((lose(0.0).len(), lose(1.0).len()), (100_000, 0));
    }

    /// Would catch a rate that is not kept, and idle time that is saved for later.
    #[test]
    fn the_rate_is_kept_headers_included() {
        let (mut line, now) = line(Path { rate_bits_per_s: Some(8_000_000), delay: 5 * MS, ..Path::default() });
        let later = now + 500 * MS;
        // 1000 bytes with headers: 1 ms each.
        (0..50).for_each(|n| line.push(later, 972, n));
        let all = arrivals(&mut line, later);
        assert_eq!(all, (0..50).map(|n| (n, (6 + n) * MS)).collect::<Vec<_>>());
    }

    /// Would catch a queue without a limit, and one whose default is too small for a burst.
    #[test]
    fn a_full_queue_drops_what_comes_last() {
        let (mut small, now) = line(Path { rate_bits_per_s: Some(8_000_000), queue_bytes: Some(10_000), ..Path::default() });
        (0..100).for_each(|n| small.push(now, 972, n));
        assert_eq!(small.counts().overflowed, 90);
        assert_eq!(arrivals(&mut small, now).into_iter().map(|(n, _)| n).collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());

        let (mut usual, now) = line(Path { rate_bits_per_s: Some(8_000_000), ..Path::default() });
        (0..200).for_each(|n| usual.push(now, 972, n));
        assert_eq!(usual.counts().overflowed, 100, "100 ms of the rate");
        let (mut slow, now) = line(Path { rate_bits_per_s: Some(80_000), ..Path::default() });
        (0..100).for_each(|n| slow.push(now, 972, n));
        assert_eq!(slow.counts().overflowed, 35, "64 KiB");
        let (mut tiny, now) = line(Path { rate_bits_per_s: Some(80_000), queue_bytes: Some(0), ..Path::default() });
        (0..2).for_each(|n| tiny.push(now, 972, n));
        assert_eq!(arrivals(&mut tiny, now).len(), 1, "one may always wait");
    }

    /// Would catch a changed rate that holds only for what comes later.
    #[test]
    fn what_waits_is_sent_at_the_new_rate() {
        let (mut line, now) = line(Path { rate_bits_per_s: Some(80_000), ..Path::default() });
        (0..10).for_each(|n| line.push(now, 972, n));
        line.set(now + 100 * MS, Path { rate_bits_per_s: Some(8_000_000), ..Path::default() });
        let all = arrivals(&mut line, now);
        assert_eq!(all.len(), 10);
        assert_eq!(all[9], (9, 109 * MS));
        let (mut line, now) = self::line(Path { rate_bits_per_s: Some(80_000), ..Path::default() });
        (0..10).for_each(|n| line.push(now, 972, n));
        line.set(now + MS, Path::default());
        assert_eq!(arrivals(&mut line, now).len(), 10, "without a limit all go at once");
    }

    /// Would catch a cut that lets pass what was under way, or that stays.
    #[test]
    fn nothing_passes_a_cut() {
        let (mut line, now) = line(Path { delay: 40 * MS, ..Path::default() });
        line.push(now, 100, 1);
        line.set_cut(true);
        line.push(now + MS, 100, 2);
        assert_eq!(line.pop(now + 41 * MS), None);
        line.set_cut(false);
        line.push(now + 50 * MS, 100, 3);
        assert_eq!(arrivals(&mut line, now), [(3, 90 * MS)]);
        assert_eq!(line.counts().cut, 2);
    }

    /// Would catch a path on which discovery of the largest datagram finds none.
    #[test]
    fn too_large_is_lost() {
        let (mut line, now) = line(Path { payload_bytes_max: Some(1472), ..Path::default() });
        line.push(now, 1472, 1);
        line.push(now, 1473, 2);
        assert_eq!(arrivals(&mut line, now), [(1, Duration::ZERO)]);
        assert_eq!(line.counts().too_large, 1);
    }

    /// Would catch a long path that takes all memory.
    #[test]
    fn what_is_under_way_is_bounded() {
        let (mut line, now) = line(Path { delay: Duration::from_secs(10), ..Path::default() });
        let fit = (UNDER_WAY_BYTES_MAX / 65_536) as u32;
        (0..fit + 5).for_each(|n| line.push(now, 65_536, n));
        assert_eq!(line.counts().overflowed, 5);
        assert_eq!(arrivals(&mut line, now).len(), fit as usize);
    }

    #[test]
    #[should_panic(expected = "cut it instead")]
    fn a_rate_of_nothing_is_refused() {
        line(Path { rate_bits_per_s: Some(0), ..Path::default() });
    }
}
