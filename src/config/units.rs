//! Sizes and durations as people write them: a number and a unit. A number without a unit is refused, because the reader of the
//! file would have to guess it.

use std::time::Duration;

use jiff::civil::Time;

use replicator::{INTERVAL_MAX, INTERVAL_MIN};

use super::drill::{TIMEOUT_MAX, TIMEOUT_MIN};
use super::error::Problem;

const SIZES: &[(&str, u64)] = &[
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];
const DURATIONS_MS: &[(&str, u64)] =
    &[("ms", 1), ("s", 1_000), ("min", 60_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

const RATES: &[(&str, u64)] = &[("bit/s", 1), ("kbit/s", 1_000), ("Mbit/s", 1_000_000), ("Gbit/s", 1_000_000_000)];
/// Below, one frame takes over 16 s.
const RATE_MIN: u64 = 64_000;
const RATE_MAX: u64 = 1_000_000_000_000;

/// Bytes of a text such as `64MiB`.
///
/// # Errors
/// [`Problem::Size`].
pub(crate) fn size(text: &str) -> Result<u64, Problem> {
    scaled(text, SIZES).ok_or(Problem::Size)
}

/// A text such as `250ms`.
///
/// # Errors
/// [`Problem::Duration`].
pub(crate) fn duration(text: &str) -> Result<Duration, Problem> {
    scaled(text, DURATIONS_MS).map(Duration::from_millis).ok_or(Problem::Duration)
}

/// A text such as `7d`; `None` for `off`.
///
/// # Errors
/// [`Problem::DurationOrOff`].
pub(crate) fn duration_or_off(text: &str) -> Result<Option<Duration>, Problem> {
    if text.trim() == "off" {
        return Ok(None);
    }
    duration(text).map(Some).map_err(|_| Problem::DurationOrOff)
}

/// A rung of a ladder: `all for 10m`, or `1h for 3d`, which keeps one point an hour up to an age of three days.
///
/// # Errors
/// [`Problem::Rung`].
pub(crate) fn rung(text: &str) -> Result<receiver::Rung, Problem> {
    let (every, reach) = text.split_once(" for ").ok_or(Problem::Rung)?;
    let every = if every.trim() == "all" { None } else { Some(duration(every).map_err(|_| Problem::Rung)?) };
    Ok(receiver::Rung { every, reach: duration(reach).map_err(|_| Problem::Rung)? })
}

/// Bits a second of a text such as `20 Mbit/s`; `None` for `none`.
///
/// Bits only: "MB/s" and "Mb/s" differ by eight, and by the reader's habit.
///
/// # Errors
/// [`Problem::Rate`].
pub(crate) fn rate(text: &str) -> Result<Option<u64>, Problem> {
    if text.trim() == "none" {
        return Ok(None);
    }
    let bits = scaled(text, RATES).filter(|bits| (RATE_MIN..=RATE_MAX).contains(bits));
    bits.map(Some).ok_or(Problem::Rate)
}

/// A text such as `22:00`.
///
/// # Errors
/// [`Problem::TimeOfDay`].
pub(crate) fn time_of_day(text: &str) -> Result<Time, Problem> {
    let digits = |t: &str| t.len() == 2 && t.bytes().all(|b| b.is_ascii_digit());
    let (hours, minutes) = text.split_once(':').filter(|(h, m)| digits(h) && digits(m)).ok_or(Problem::TimeOfDay)?;
    let number = |t: &str| t.parse::<i8>().map_err(|_| Problem::TimeOfDay);
    Time::new(number(hours)?, number(minutes)?, 0, 0).map_err(|_| Problem::TimeOfDay)
}

/// For clap.
pub(crate) fn duration_argument(text: &str) -> Result<Duration, Problem> {
    duration(text)
}

/// As [`duration_argument`], of an epoch.
pub(crate) fn interval_argument(text: &str) -> Result<Duration, Problem> {
    within(text, INTERVAL_MIN..=INTERVAL_MAX, Problem::Range { min: "10ms", max: "1d" })
}

/// As [`duration_argument`], of a drill's script.
pub(crate) fn timeout_argument(text: &str) -> Result<Duration, Problem> {
    within(text, TIMEOUT_MIN..=TIMEOUT_MAX, Problem::Range { min: "1s", max: "1d" })
}

fn within(text: &str, limits: std::ops::RangeInclusive<Duration>, problem: Problem) -> Result<Duration, Problem> {
    let given = duration(text)?;
    if limits.contains(&given) { Ok(given) } else { Err(problem) }
}

/// For clap.
pub(crate) fn size_argument(text: &str) -> Result<u64, Problem> {
    size(text)
}

fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(split);
    let unit = unit.trim_start();
    let scale = units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit))?.1;
    match number.split_once('.') {
        None => number.parse::<u64>().ok()?.checked_mul(scale),
        Some((whole, fraction)) if !whole.is_empty() && !fraction.is_empty() && fraction.len() <= 6 => {
            let tenths = 10_u64.pow(u32::try_from(fraction.len()).ok()?);
            let whole = whole.parse::<u64>().ok()?.checked_mul(scale)?;
            let part = fraction.parse::<u64>().ok()?.checked_mul(scale)? / tenths;
            whole.checked_add(part)
        }
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_need_a_unit_and_never_wrap() {
        assert_eq!(size("64MiB").unwrap(), 64 << 20);
        assert_eq!(size("1.5 GiB").unwrap(), 3 << 29);
        assert_eq!(size("10gb").unwrap(), 10_000_000_000);
        assert_eq!(duration("250ms").unwrap(), Duration::from_millis(250));
        assert_eq!(duration("1.5s").unwrap(), Duration::from_millis(1500));
        assert_eq!(duration("2m").unwrap(), Duration::from_secs(120));
        assert_eq!(duration_or_off("7d").unwrap(), Some(Duration::from_secs(604_800)));
        assert_eq!(duration_or_off("off").unwrap(), None);
        assert_eq!(duration_or_off("weekly"), Err(Problem::DurationOrOff));
        assert_eq!(rate("20 Mbit/s").unwrap(), Some(20_000_000));
        assert_eq!(rate("1.5gbit/s").unwrap(), Some(1_500_000_000));
        assert_eq!(rate("none").unwrap(), None);
        for bad in ["", "20", "20 MB/s", "20 Mb/s", "0 Mbit/s", "63 kbit/s", "1001 Gbit/s", "unlimited"] {
            assert!(rate(bad).is_err(), "{bad}");
        }
        assert_eq!(time_of_day("06:30").unwrap(), Time::constant(6, 30, 0, 0));
        for bad in ["", "6:30", "24:00", "12:60", "12", "12:00:00", "-1:00", "+1:00", "noon"] {
            assert!(time_of_day(bad).is_err(), "{bad}");
        }
        for bad in ["", "5", "MiB", "1.MiB", ".5MiB", "1..2s", "-1s", "9999999999999TiB", "1 parsec", "1.1234567s"] {
            assert!(size(bad).is_err(), "{bad}");
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
