//! Sizes and durations as people write them: a number and a unit. A number without a unit is refused, because the reader of the
//! file would have to guess it.

use std::time::Duration;

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

/// For clap.
pub(crate) fn duration_argument(text: &str) -> Result<Duration, Problem> {
    duration(text)
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
        for bad in ["", "5", "MiB", "1.MiB", ".5MiB", "1..2s", "-1s", "9999999999999TiB", "1 parsec", "1.1234567s"] {
            assert!(size(bad).is_err(), "{bad}");
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
