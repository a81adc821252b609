//! Slows a guest that would get further ahead of its copy than the user allows (`max_lag`).
//!
//! [`Governor`] decides how many bytes a second writes may have; [`Pace`] makes each write wait for its share. A pause grows smoothly
//! from nothing, and only writes wait, before they are admitted: reads and flushes never, and no capture waits for a write that
//! sleeps here.
//!
//! The age of the oldest uncommitted write alone would come too late: on a slow link, what is written in a second may take a minute to
//! send. So what waits is also divided by what the link carries, which is the lag that is to come.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Below this share of `max_lag` nothing is slowed.
const FREE: f64 = 0.8;
/// At this share of it writes get what the link carries, beyond it less.
const FULL: f64 = 0.9;
/// Cuts are at most this share of `max_lag` apart.
pub(crate) const CUTS_PER_MAX_LAG: u32 = 4;
/// A guest that is slowed gets at most this share of what the link carries: at the pace without bound of a pressure just above [`FREE`], a
/// fast guest could write in a moment what takes the link a minute.
const SHARE_MAX: f64 = 4.0;
/// While connected a guest gets at least this share of what the link carries, so that it moves while the copy catches up.
const FLOOR_SHARE: f64 = 0.1;
/// While nothing can be committed a guest gets at least so much: slowing it further would not make its lag smaller.
const FLOOR_ALONE_BYTES_PER_S: f64 = (1 << 20) as f64;
/// While connected it gets at least so much, however little is known of the link.
const FLOOR_BYTES_PER_S: f64 = 4096.0;
/// What a link is taken to carry of which nothing is known: little, because too little is noticed with the first commit, and too much only
/// when the guest is far ahead.
const LINK_UNKNOWN_BYTES_PER_S: f64 = (1 << 20) as f64;
/// What leaves a connection that always has more to send is measured over so long, and averaged over this many seconds.
const MEASURE: Duration = Duration::from_millis(100);
const AVERAGE_S: f64 = 0.5;
/// A connection with fewer bytes than this to send may be about to run dry.
const UNSENT_BYTES_MIN: f64 = 65_536.0;
/// A frame counts as handed over when all of it is, so the wire may be ahead by as much.
const WIRE_AHEAD_BYTES: f64 = 262_144.0;
/// Bytes of frames per byte on the wire: headers of QUIC, UDP and TLS records, and what is sent again.
const WIRE_SHARE: f64 = 0.95;
/// A commit that took less says more of the timer than of the link.
const COMMIT_MIN: Duration = Duration::from_millis(10);
/// Frames after which older ones count half for how well blocks pack.
const PACKED_BYTES: f64 = (16 << 20) as f64;
/// Longest pause of one write: guests give a disk up after 30 s.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Shorter pauses are not slept: timers are no finer. They add up.
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// A write that sleeps looks so often whether the pace was lifted.
const LOOK: Duration = Duration::from_millis(50);
/// Not slowed.
const FREELY: u64 = u64::MAX;

/// What the governor is told, every few milliseconds. Counters run since start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    /// Age of the oldest acknowledged write that is not committed.
    pub(crate) lag: Duration,
    /// Bytes changed and not committed.
    pub(crate) uncommitted_bytes: u64,
    /// Bytes of them that are in an epoch.
    pub(crate) held_bytes: u64,
    /// Counter of bytes committed.
    pub(crate) committed_bytes: u64,
    /// Counter of bytes of frames handed to the connection.
    pub(crate) handed_bytes: u64,
    /// Counter of bytes on the wire.
    pub(crate) wire_bytes: u64,
    /// Counter of bytes of blocks captured.
    pub(crate) captured_bytes: u64,
    /// Counter of bytes of frames made of them.
    pub(crate) frame_bytes: u64,
    pub(crate) link: LinkSeen,
}

/// What the link is good for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinkSeen {
    /// Epochs are committed.
    Following,
    /// There is a copy, and nothing can be committed: not connected, refused, comparing.
    Stuck,
    /// There is nothing to be ahead of: no copy yet, or not ours any more.
    NoCopy,
}

/// What writes get until the next time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Allowance {
    /// As many bytes as they like.
    All,
    /// These bytes at once, and further ones at this pace: between two times a fast guest could write more than the link carries in a
    /// minute.
    Some { bytes: u64, then_bytes_per_s: u64 },
    /// They are slowed to this pace.
    Paced { bytes_per_s: u64 },
}

/// See the module.
pub(crate) struct Governor {
    max_lag: Duration,
    /// Bytes of disk a second that the link carries, with the receiver at its end.
    carries: f64,
    before: Option<Seen>,
    ticked: Instant,
    /// Bytes of blocks, and of the frames that they became.
    packed: (f64, f64),
    /// At least so many bytes of frames were handed to the connection and have not left yet; negative while the wire is ahead.
    unsent_bytes: f64,
    /// A stretch in which the connection never ran dry: its start, and the bytes on the wire then.
    leaving: Option<(Instant, u64)>,
    /// The stretch in which always something was on its way: instants and bytes committed by then, some for each `max_lag`.
    busy: VecDeque<(Instant, u64)>,
    busy_since: Option<Instant>,
}

impl Governor {
    pub(crate) fn new(max_lag: Duration, now: Instant) -> Self {
        Self {
            max_lag,
            carries: LINK_UNKNOWN_BYTES_PER_S,
            before: None,
            ticked: now,
            packed: (0.0, 0.0),
            unsent_bytes: 0.0,
            leaving: None,
            busy: VecDeque::new(),
            busy_since: None,
        }
    }

    /// What writes may have from now on.
    pub(crate) fn allow(&mut self, now: Instant, seen: Seen) -> Allowance {
        self.learn(now, &seen);
        self.ticked = now;
        let max_lag = self.max_lag.as_secs_f64();
        let lag = seen.lag.as_secs_f64() / max_lag;
        let (pressure, floor, room) = match seen.link {
            LinkSeen::NoCopy => return Allowance::All,
            LinkSeen::Following => {
                let (waits, room) = (seen.uncommitted_bytes as f64, self.carries * max_lag);
                (lag.max(waits / room), (self.carries * FLOOR_SHARE).max(FLOOR_BYTES_PER_S), room * FREE - waits)
            }
            LinkSeen::Stuck => (lag, FLOOR_ALONE_BYTES_PER_S, f64::INFINITY),
        };
        // Four times what the link carries at first: a pause of a millisecond, or of less than that and not slept.
        let share = |pressure: f64| ((FULL - FREE) / (pressure - FREE)).powi(2).min(SHARE_MAX);
        let pace = |pressure: f64| (self.carries * share(pressure)).max(floor) as u64;
        if pressure > FREE {
            Allowance::Paced { bytes_per_s: pace(pressure) }
        } else if room.is_finite() {
            Allowance::Some { bytes: room.max(0.0) as u64, then_bytes_per_s: (self.carries * SHARE_MAX) as u64 }
        } else {
            Allowance::All
        }
    }

    /// What the link carries is known from three things. What leaves a connection that always has more to send shows at once that it is
    /// less than was thought, and never that it is more: the receiver behind it may be slower, and megabytes fit between them. What is
    /// committed while always something is on its way is all of the truth, later. And a single commit, which may have been small, can
    /// only show that it is more.
    fn learn(&mut self, now: Instant, seen: &Seen) {
        let before = self.before.replace(*seen);
        let Some(before) = before.filter(|b| b.link == LinkSeen::Following && seen.link == LinkSeen::Following) else {
            (self.unsent_bytes, self.leaving, self.busy_since) = (0.0, None, None);
            return;
        };
        self.learn_packing(&before, seen);
        self.learn_commits(now, &before, seen);
        self.learn_leaving(now, &before, seen);
        self.carries = self.carries.max(1.0);
    }

    fn learn_packing(&mut self, before: &Seen, seen: &Seen) {
        self.packed.0 += seen.captured_bytes.saturating_sub(before.captured_bytes) as f64;
        self.packed.1 += seen.frame_bytes.saturating_sub(before.frame_bytes) as f64;
        if self.packed.1 > PACKED_BYTES {
            self.packed = (self.packed.0 / 2.0, self.packed.1 / 2.0);
        }
    }

    fn learn_leaving(&mut self, now: Instant, before: &Seen, seen: &Seen) {
        let handed = seen.handed_bytes.saturating_sub(before.handed_bytes) as f64;
        let left = seen.wire_bytes.saturating_sub(before.wire_bytes) as f64 * WIRE_SHARE;
        self.unsent_bytes = if seen.held_bytes == 0 { 0.0 } else { (self.unsent_bytes + handed - left).max(-WIRE_AHEAD_BYTES) };
        if self.unsent_bytes < UNSENT_BYTES_MIN {
            self.leaving = None;
            return;
        }
        let (since, wire_bytes) = *self.leaving.get_or_insert((now, seen.wire_bytes));
        let took = now.saturating_duration_since(since);
        if took >= MEASURE {
            let packed = if self.packed.1 > 0.0 { self.packed.0 / self.packed.1 } else { 1.0 };
            let frames = seen.wire_bytes.saturating_sub(wire_bytes) as f64 * WIRE_SHARE;
            let rate = frames * packed / took.as_secs_f64();
            if rate < self.carries {
                self.towards(rate, took.as_secs_f64() / AVERAGE_S);
            }
            self.leaving = None;
        }
    }

    fn learn_commits(&mut self, now: Instant, before: &Seen, seen: &Seen) {
        let committed = seen.committed_bytes.saturating_sub(before.committed_bytes);
        let since = match self.busy_since {
            Some(since) => since,
            None if seen.held_bytes > 0 => {
                // It may have begun as soon as it was not looked at any more.
                self.busy_since = Some(self.ticked);
                self.busy.clear();
                self.busy.push_back((self.ticked, before.committed_bytes));
                self.ticked
            }
            None => return,
        };
        let took = now.saturating_duration_since(since);
        if took < self.max_lag / 2 {
            if committed > 0 && took >= COMMIT_MIN {
                self.carries = self.carries.max(committed as f64 / took.as_secs_f64());
            }
        } else if self.unsent_bytes < UNSENT_BYTES_MIN && seen.held_bytes > 0 {
            while self.busy.get(1).is_some_and(|(at, _)| now.saturating_duration_since(*at) >= self.max_lag * 2) {
                self.busy.pop_front();
            }
            if let Some((at, bytes)) = self.busy.front().copied() {
                let span = now.saturating_duration_since(at).as_secs_f64().max(0.001);
                let done = seen.committed_bytes.saturating_sub(bytes) as f64;
                // As long as nothing is committed, what is on its way would have taken longer.
                let rate = if done > 0.0 { done / span } else { self.carries.min(seen.held_bytes as f64 / span) };
                let tick = now.saturating_duration_since(self.ticked).as_secs_f64();
                self.towards(rate, tick / (self.max_lag.as_secs_f64() / 4.0));
            }
        }
        if seen.held_bytes == 0 {
            self.busy_since = None;
        } else if committed > 0 && self.busy.back().is_none_or(|(at, _)| now.saturating_duration_since(*at) >= self.max_lag / 16)
        {
            self.busy.push_back((now, seen.committed_bytes));
        }
    }

    /// Moves what the link carries towards `rate`; `weight` is the time that it stands for, in times of the average.
    fn towards(&mut self, rate: f64, weight: f64) {
        self.carries += (rate - self.carries) * (1.0 - (-weight).exp());
    }
}

/// What `status` shows of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PaceSummary {
    /// Bytes a second that writes get; `None`: they are not slowed.
    pub(crate) rate_bytes_per_s: Option<u64>,
    /// How long a write would wait that came now.
    pub(crate) pause: Duration,
    /// All pauses since start.
    pub(crate) paused: Duration,
}

/// The pace of a group's writes.
pub(crate) struct Pace {
    /// Bytes a second, or [`FREELY`].
    rate: AtomicU64,
    /// Bytes that may go at once beside it.
    free_bytes: AtomicI64,
    slowed: AtomicBool,
    paused_us: AtomicU64,
    /// When the next write may go.
    next: Mutex<Instant>,
}

impl Pace {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            rate: AtomicU64::new(FREELY),
            free_bytes: AtomicI64::new(0),
            slowed: AtomicBool::new(false),
            paused_us: AtomicU64::new(0),
            next: Mutex::new(now),
        }
    }

    /// Sets what all writes together may have.
    pub(crate) fn set(&self, allowance: Allowance) {
        let (rate, free_bytes, slowed) = match allowance {
            Allowance::All => (FREELY, 0, false),
            Allowance::Some { bytes, then_bytes_per_s } => (then_bytes_per_s, i64::try_from(bytes).unwrap_or(i64::MAX), false),
            Allowance::Paced { bytes_per_s } => (bytes_per_s, 0, true),
        };
        self.free_bytes.store(free_bytes, Ordering::Relaxed);
        self.rate.store(rate, Ordering::Relaxed);
        self.slowed.store(slowed, Ordering::Relaxed);
    }

    /// Whether a write of `bytes` is among those that need no pace; if so it has had its share.
    fn is_free(&self, bytes: u64) -> bool {
        let cost = i64::try_from(bytes).unwrap_or(i64::MAX);
        // Several at once may take too much; what is missing then is the next allowance's.
        let spend = || self.free_bytes.load(Ordering::Relaxed) > 0 && self.free_bytes.fetch_sub(cost, Ordering::Relaxed) > 0;
        self.rate.load(Ordering::Relaxed) == FREELY || spend()
    }

    /// Whether a write of `bytes` may go at once; if so it has had its share.
    pub(crate) fn passes(&self, bytes: u64, now: impl FnOnce() -> Instant) -> bool {
        if self.is_free(bytes) {
            return true;
        }
        let (now, rate) = (now(), self.rate.load(Ordering::Relaxed));
        let mut next = self.next.lock();
        let passes = next.saturating_duration_since(now) < PAUSE_MIN;
        if passes {
            *next = after(*next, now, bytes, rate);
        }
        passes
    }

    /// How long a write of `bytes` has to wait.
    fn pause(&self, bytes: u64, now: Instant) -> Duration {
        if self.is_free(bytes) {
            return Duration::ZERO;
        }
        let rate = self.rate.load(Ordering::Relaxed);
        let mut next = self.next.lock();
        let pause = next.saturating_duration_since(now);
        *next = after(*next, now, bytes, rate);
        if pause < PAUSE_MIN { Duration::ZERO } else { pause }
    }

    /// Waits for the share of a write of `bytes`.
    pub(crate) async fn wait(&self, bytes: u64) {
        let begun = Instant::now();
        let until = begun + self.pause(bytes, begun);
        loop {
            let now = Instant::now();
            if now >= until || self.rate.load(Ordering::Relaxed) == FREELY {
                let paused = u64::try_from((now - begun).as_micros()).unwrap_or(u64::MAX);
                self.paused_us.fetch_add(paused, Ordering::Relaxed);
                return;
            }
            tokio::time::sleep_until(until.min(now + LOOK).into()).await;
        }
    }

    pub(crate) fn summary(&self, now: Instant) -> PaceSummary {
        let slowed = self.slowed.load(Ordering::Relaxed);
        PaceSummary {
            rate_bytes_per_s: slowed.then(|| self.rate.load(Ordering::Relaxed)),
            pause: if slowed { self.next.lock().saturating_duration_since(now) } else { Duration::ZERO },
            paused: Duration::from_micros(self.paused_us.load(Ordering::Relaxed)),
        }
    }
}

/// When the write after one of `bytes` may go.
fn after(next: Instant, now: Instant, bytes: u64, rate: u64) -> Instant {
    let share = Duration::from_secs_f64((bytes as f64 / rate.max(1) as f64).min(PAUSE_MAX.as_secs_f64()));
    (next.max(now) + share).min(now + PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX_LAG: Duration = Duration::from_secs(5);
    const MB: f64 = 1e6;

    fn seen(lag_s: f64, link: LinkSeen) -> Seen {
        let lag = Duration::from_secs_f64(lag_s);
        Seen {
            lag,
            uncommitted_bytes: 0,
            held_bytes: 0,
            committed_bytes: 0,
            handed_bytes: 0,
            wire_bytes: 0,
            captured_bytes: 0,
            frame_bytes: 0,
            link,
        }
    }

    #[test]
    fn the_pause_grows_smoothly_from_nothing() {
        let now = Instant::now();
        let mut governor = Governor::new(MAX_LAG, now);
        assert!(matches!(governor.allow(now, seen(3.99, LinkSeen::Following)), Allowance::Some { .. }));
        let mut pause = 0.0;
        for step in 1..=300 {
            let lag = 4.0 + f64::from(step) * 0.01;
            let Allowance::Paced { bytes_per_s } = governor.allow(now, seen(lag, LinkSeen::Following)) else { panic!("slowed") };
            let next = 4096.0 / bytes_per_s as f64;
            assert!(next >= pause && next - pause < 1e-3, "lag {lag}: a 4 KiB write waits {next} s, before {pause} s");
            pause = next;
        }
        assert!(pause > 4096.0 / (LINK_UNKNOWN_BYTES_PER_S * FLOOR_SHARE) * 0.99);
    }

    #[test]
    fn who_cannot_be_ahead_is_not_slowed_and_who_is_alone_is_not_stopped() {
        let now = Instant::now();
        let mut governor = Governor::new(MAX_LAG, now);
        assert_eq!(governor.allow(now, seen(1000.0, LinkSeen::NoCopy)), Allowance::All);
        assert_eq!(governor.allow(now, seen(1.0, LinkSeen::Stuck)), Allowance::All);
        let alone = governor.allow(now, seen(1e6, LinkSeen::Stuck));
        assert_eq!(alone, Allowance::Paced { bytes_per_s: FLOOR_ALONE_BYTES_PER_S as u64 });
    }

    /// What a run came to, after its first minute.
    struct Run {
        lag_max_s: f64,
        written_per_s: f64,
        slowed: bool,
    }

    /// Where a guest writes to, in bytes a second: `receiver` takes what `link` brings, after at most 16 MiB of frames between them.
    #[derive(Clone, Copy)]
    struct Way {
        link: f64,
        receiver: f64,
        packed: f64,
    }

    struct Epoch {
        first: f64,
        bytes: f64,
        unsent: f64,
        untaken: f64,
        taken_at: Option<f64>,
    }

    /// Three minutes of a guest that writes as fast as it may, up to `guest` bytes a second. Epochs are cut every second, or more often as
    /// `max_lag` wants it; a receiver takes 20 ms to commit.
    fn run(way: impl Fn(f64) -> Way, guest: f64, max_lag: Duration) -> Run {
        const WINDOW: f64 = (16 << 20) as f64;
        let start = Instant::now();
        let mut governor = Governor::new(max_lag, start);
        let (tick, settled) = (0.01, 60.0);
        let interval = (max_lag.as_secs_f64() / f64::from(CUTS_PER_MAX_LAG)).min(1.0);
        let (mut open, mut sending) = ((None::<f64>, 0.0), VecDeque::<Epoch>::new());
        let (mut wire, mut committed, mut cut_at, mut allowed) = (0.0, 0.0, 0.0, Allowance::All);
        let (mut captured, mut frames) = (0.0, 0.0);
        let mut out = Run { lag_max_s: 0.0, written_per_s: 0.0, slowed: false };
        for step in 0..18_000 {
            let t = f64::from(step) * tick;
            let Way { link, receiver, packed } = way(t);
            let may = match allowed {
                Allowance::All => f64::INFINITY,
                Allowance::Some { bytes, then_bytes_per_s } => bytes as f64 + then_bytes_per_s as f64 * tick,
                Allowance::Paced { bytes_per_s } => bytes_per_s as f64 * tick,
            };
            let wrote = may.min(guest * tick);
            open.0.get_or_insert(t);
            open.1 += wrote;
            let waits: f64 = sending.iter().map(|e| e.unsent / packed).sum();
            if t - cut_at >= interval && waits < WINDOW + (4 << 20) as f64 && sending.len() < 8 {
                let bytes = std::mem::take(&mut open.1);
                let first = open.0.take().unwrap_or(t);
                sending.push_back(Epoch { first, bytes, unsent: bytes, untaken: bytes, taken_at: None });
                (captured, frames, cut_at) = (captured + bytes, frames + bytes / packed, t);
            }
            let between: f64 = sending.iter().map(|e| e.untaken - e.unsent).sum();
            let mut takes = receiver * tick;
            let mut room = (link * tick * packed).min((WINDOW * packed - between).max(0.0) + takes);
            for epoch in &mut sending {
                let sent = epoch.unsent.min(room);
                (room, epoch.unsent, wire) = (room - sent, epoch.unsent - sent, wire + sent / packed / WIRE_SHARE);
                let taken = (epoch.untaken - epoch.unsent).min(takes);
                (takes, epoch.untaken) = (takes - taken, epoch.untaken - taken);
                if epoch.untaken < 1e-3 {
                    epoch.taken_at.get_or_insert(t);
                }
            }
            while let Some(epoch) = sending.pop_front_if(|e| e.taken_at.is_some_and(|at| t - at >= 0.02)) {
                committed += epoch.bytes;
            }
            let held: f64 = sending.iter().map(|e| e.bytes).sum();
            let lag = t - sending.front().map(|e| e.first).or(open.0).unwrap_or(t);
            if t >= settled {
                out.lag_max_s = out.lag_max_s.max(lag);
                out.written_per_s += wrote / (180.0 - settled);
                out.slowed |= matches!(allowed, Allowance::Paced { .. });
            }
            let waits: f64 = sending.iter().map(|e| e.unsent / packed).sum();
            let seen = Seen {
                lag: Duration::from_secs_f64(lag),
                uncommitted_bytes: (held + open.1) as u64,
                held_bytes: held as u64,
                committed_bytes: committed as u64,
                handed_bytes: (frames - (waits - WINDOW).max(0.0)) as u64,
                wire_bytes: wire as u64,
                captured_bytes: captured as u64,
                frame_bytes: frames as u64,
                link: LinkSeen::Following,
            };
            allowed = governor.allow(start + Duration::from_secs_f64(t), seen);
        }
        out
    }

    /// Catches a pace that lets the lag grow, one that starves the guest, and one that swings.
    #[test]
    fn the_lag_is_held_and_the_link_is_used() {
        let far = 1e12;
        for (link, receiver, packed, guest, max_lag_s) in [
            (10.0, far, 1.0, 12.0, 5.0),
            (10.0, far, 1.0, 40.0, 5.0),
            (10.0, far, 3.0, 300.0, 5.0),
            (2.5, far, 1.0, 100.0, 5.0),
            (2.5, far, 1.0, 100.0, 1.0),
            (0.2, far, 1.0, 5.0, 5.0),
            (100.0, far, 2.0, 400.0, 5.0),
            (100.0, 2.0, 1.0, 30.0, 2.0),
            (100.0, 2.0, 1.0, 3000.0, 2.0),
            (30.0, 2.0, 1.0, 60.0, 2.0),
            (100.0, 2.0, 1.0, 30.0, 5.0),
            (100.0, 20.0, 1.0, 30.0, 2.0),
        ] {
            let max_lag = Duration::from_secs_f64(max_lag_s);
            let way = Way { link: link * MB, receiver: receiver * MB, packed };
            let Run { lag_max_s, written_per_s, .. } = run(|_| way, guest * MB, max_lag);
            let carried = guest.min(link * packed).min(receiver) * MB;
            let what = format!(
                "link {link} MB/s, receiver {receiver}, packed {packed}, guest {guest}, max_lag {max_lag_s} s: lag to {lag_max_s:.2} s, \
                 {written_per_s:.0} B/s of {carried:.0}"
            );
            println!("{what}");
            assert!(lag_max_s < 1.35 * max_lag_s && lag_max_s > 0.5 * max_lag_s, "{what}");
            assert!(written_per_s > 0.85 * carried, "{what}");
        }
    }

    #[test]
    fn a_guest_that_the_link_can_follow_is_not_slowed() {
        let way = Way { link: 10.0 * MB, receiver: 100.0 * MB, packed: 1.0 };
        for guest in [0.01 * MB, 1.0 * MB, 9.0 * MB] {
            let Run { lag_max_s, slowed, .. } = run(|_| way, guest, MAX_LAG);
            assert!(!slowed && lag_max_s < FREE * MAX_LAG.as_secs_f64(), "guest {guest}: lag {lag_max_s}, slowed {slowed}");
        }
    }

    #[test]
    fn a_link_that_changes_is_followed() {
        let link = |t: f64| if ((t / 40.0) as u64).is_multiple_of(2) { 9.0 * MB } else { 3.0 * MB };
        let way = |t: f64| Way { link: link(t), receiver: 100.0 * MB, packed: 1.0 };
        let Run { lag_max_s, written_per_s, .. } = run(way, 50.0 * MB, MAX_LAG);
        println!("lag to {lag_max_s:.2} s, {written_per_s:.0} B/s");
        // What was let in for the fast link takes three times as long on the slow one.
        assert!(lag_max_s < 3.2 * MAX_LAG.as_secs_f64(), "lag {lag_max_s}");
        assert!(written_per_s > 0.75 * 6.0 * MB, "{written_per_s} of 6 MB/s");
    }

    #[test]
    fn writes_share_the_rate_and_none_waits_too_long() {
        let now = Instant::now();
        let pace = Pace::new(now);
        assert!(pace.passes(1 << 30, || now) && pace.pause(1 << 30, now) == Duration::ZERO, "not slowed");
        pace.set(Allowance::Some { bytes: 5000, then_bytes_per_s: 1 << 20 });
        assert!(pace.passes(4096, || now) && pace.pause(4096, now) == Duration::ZERO, "the second begins within what is free");
        pace.set(Allowance::Paced { bytes_per_s: 1 << 20 });
        assert_eq!(pace.pause(1 << 19, now), Duration::ZERO, "the first finds its share");
        assert!(!pace.passes(1, || now));
        assert_eq!(pace.pause(1 << 19, now), Duration::from_millis(500));
        assert_eq!(pace.pause(1 << 40, now), Duration::from_secs(1));
        assert_eq!(pace.pause(1, now), PAUSE_MAX);
        assert!(pace.passes(1, || now + PAUSE_MAX + Duration::from_millis(1)));
        pace.set(Allowance::All);
        assert!(pace.passes(1 << 30, || now));
    }
}
