//! How much may be sent: a limit by the time of day, and the bucket that keeps it.
//!
//! The sender is held back, nothing else: capture then waits for room in the queue of frames, and the current epoch grows. Time is passed in.

use std::time::{Duration, Instant};

use jiff::Zoned;
use jiff::civil::Time;

/// What an idle sender may send at once, in seconds of the limit.
const BURST_S: f64 = 0.1;
/// The limit is looked up again after so long, also in the middle of a wait.
const LOOK: Duration = Duration::from_millis(200);

/// Bits a second by the time of day; `None`: without a limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RateSchedule {
    /// Whenever no window says otherwise.
    pub limit_bits_per_s: Option<u64>,
    /// The first that has the time decides.
    pub windows: Vec<RateWindow>,
}

/// A part of each day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateWindow {
    /// Local time at which it begins.
    pub from: Time,
    /// Local time at which it has ended; before `from`: on the next day.
    pub to: Time,
    /// The limit within it.
    pub limit_bits_per_s: Option<u64>,
}

impl RateWindow {
    fn has(&self, time: Time) -> bool {
        if self.from <= self.to { self.from <= time && time < self.to } else { self.from <= time || time < self.to }
    }
}

impl RateSchedule {
    /// The limit at an instant, by the clock on the wall: where an hour is skipped or comes twice, so does what lies within it.
    #[must_use]
    pub fn limit_at(&self, at: &Zoned) -> Option<u64> {
        let time = at.time();
        self.windows.iter().find(|w| w.has(time)).map_or(self.limit_bits_per_s, |w| w.limit_bits_per_s)
    }

    /// The limit now, in the time zone of this machine.
    #[must_use]
    pub fn limit_now(&self) -> Option<u64> {
        if self.windows.is_empty() { self.limit_bits_per_s } else { self.limit_at(&Zoned::now()) }
    }

    /// Whether there is ever a limit.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.limit_bits_per_s.is_some() || self.windows.iter().any(|w| w.limit_bits_per_s.is_some())
    }
}

/// Bytes that may go. What is sent at once may be more than there is: the next then waits for all of it.
pub(crate) struct Bucket {
    bytes: f64,
    at: Instant,
}

impl Bucket {
    pub(crate) fn new(now: Instant) -> Self {
        Self { bytes: 0.0, at: now }
    }

    /// Takes `bytes` if they may go now, else says when to ask again.
    pub(crate) fn take(&mut self, now: Instant, bytes: usize, limit_bits_per_s: Option<u64>) -> Result<(), Duration> {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        let Some(limit) = limit_bits_per_s else {
            self.bytes = 0.0;
            return Ok(());
        };
        let rate = (limit as f64 / 8.0).max(1.0);
        self.bytes = (self.bytes + passed * rate).min(rate * BURST_S);
        if self.bytes < 0.0 {
            return Err(Duration::from_secs_f64(-self.bytes / rate).clamp(Duration::from_millis(1), LOOK));
        }
        self.bytes -= bytes as f64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use jiff::civil::{date, time};
    use jiff::tz::TimeZone;

    use super::*;

    fn window(from: Time, to: Time, limit_bits_per_s: Option<u64>) -> RateWindow {
        RateWindow { from, to, limit_bits_per_s }
    }

    /// Central Europe, without a database of time zones: +1, in summer +2, from the last Sunday of March to that of October.
    fn berlin() -> TimeZone {
        TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
    }

    #[test]
    fn a_window_may_go_over_midnight_and_the_first_decides() {
        let schedule = RateSchedule {
            limit_bits_per_s: Some(20),
            windows: vec![
                window(time(12, 0, 0, 0), time(13, 0, 0, 0), Some(50)),
                window(time(22, 0, 0, 0), time(6, 0, 0, 0), None),
                window(time(12, 30, 0, 0), time(14, 0, 0, 0), Some(7)),
            ],
        };
        let at = |h: i8, m: i8, s: i8| schedule.limit_at(&date(2026, 5, 4).at(h, m, s, 0).to_zoned(TimeZone::UTC).unwrap());
        for (h, m, s, wanted) in [
            (21, 59, 59, Some(20)),
            (22, 0, 0, None),
            (23, 59, 59, None),
            (0, 0, 0, None),
            (5, 59, 59, None),
            (6, 0, 0, Some(20)),
            (11, 59, 59, Some(20)),
            (12, 0, 0, Some(50)),
            (12, 59, 59, Some(50)),
            (13, 0, 0, Some(7)),
            (14, 0, 0, Some(20)),
        ] {
            assert_eq!(at(h, m, s), wanted, "{h}:{m}:{s}");
        }
        assert!(schedule.is_limited() && !RateSchedule::default().is_limited());
    }

    /// Minutes that a window lasts in the night to that day, in central Europe.
    fn minutes(from: Time, to: Time, year: i16, month: i8, day: i8) -> usize {
        let schedule = RateSchedule { limit_bits_per_s: None, windows: vec![window(from, to, Some(1))] };
        let noon = date(year, month, day).at(12, 0, 0, 0).to_zoned(berlin()).unwrap().timestamp();
        let instants = (0..24 * 60).map(|m| (noon - jiff::SignedDuration::from_mins(m)).to_zoned(berlin()));
        instants.filter(|at| schedule.limit_at(at).is_some()).count()
    }

    #[test]
    fn where_the_clock_is_put_forward_or_back_the_wall_decides() {
        let (two, three) = (time(2, 0, 0, 0), time(3, 0, 0, 0));
        assert_eq!(minutes(two, three, 2026, 3, 28), 60);
        assert_eq!(minutes(two, three, 2026, 3, 29), 0, "that hour is skipped");
        assert_eq!(minutes(two, three, 2026, 10, 25), 120, "that hour comes twice");
        let (evening, morning) = (time(22, 0, 0, 0), time(6, 0, 0, 0));
        assert_eq!(minutes(evening, morning, 2026, 3, 28), 8 * 60);
        assert_eq!(minutes(evening, morning, 2026, 3, 29), 7 * 60);
        assert_eq!(minutes(evening, morning, 2026, 10, 25), 9 * 60);
    }

    /// Sends frames as soon as they may go; returns the bytes that went within `seconds`.
    fn sent(
        bucket: &mut Bucket,
        now: &mut Instant,
        seconds: u64,
        frame: usize,
        limit: impl Fn(Duration) -> Option<u64>,
    ) -> usize {
        let (begun, mut bytes) = (*now, 0);
        while *now - begun < Duration::from_secs(seconds) {
            match bucket.take(*now, frame, limit(*now - begun)) {
                Ok(()) => bytes += frame,
                Err(wait) => {
                    assert!(wait <= LOOK, "a changed limit counts within a second");
                    *now += wait;
                }
            }
        }
        bytes
    }

    #[test]
    fn the_limit_is_kept_and_a_change_counts_at_once() {
        let mut now = Instant::now();
        let mut bucket = Bucket::new(now);
        let megabyte = |mbit: u64| (mbit as f64 * 1e6 / 8.0) as usize;
        let bytes = sent(&mut bucket, &mut now, 10, 131_072, |_| Some(8_000_000));
        assert!(bytes.abs_diff(10 * megabyte(8)) < 300_000, "{bytes}");
        // An idle hour saves up no more than a burst.
        now += Duration::from_secs(3600);
        let bytes = sent(&mut bucket, &mut now, 10, 131_072, |_| Some(8_000_000));
        assert!(bytes.abs_diff(10 * megabyte(8)) < 500_000, "{bytes}");
        // A frame at 64 kbit/s takes 16 s; the limit rises after one.
        sent(&mut bucket, &mut now, 1, 131_072, |_| Some(64_000));
        let bytes =
            sent(&mut bucket, &mut now, 3, 131_072, |t| Some(if t < Duration::from_secs(1) { 64_000 } else { 80_000_000 }));
        assert!(bytes.abs_diff(2 * megabyte(80)) < 3_000_000, "{bytes}");
        assert_eq!(bucket.take(now, usize::MAX, None), Ok(()), "without a limit nothing waits");
        assert_eq!(bucket.take(now, 1, None), Ok(()));
    }
}
