//! Figures for people: units, ages, bars, colours. Colour only on a terminal, and not with NO_COLOR set.

use std::io::IsTerminal;
use std::time::{SystemTime, UNIX_EPOCH};

/// `1.5 GiB`.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64;
    let mut unit = "B";
    for next in UNITS {
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// `20 Mbit/s`.
pub(crate) fn bit_rate(bits_per_s: u64) -> String {
    let (unit, scale) = match bits_per_s {
        0..1_000_000 => ("kbit/s", 1e3),
        1_000_000..1_000_000_000 => ("Mbit/s", 1e6),
        _ => ("Gbit/s", 1e9),
    };
    let text = format!("{:.3}", bits_per_s as f64 / scale);
    format!("{} {unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

/// `230 ms`, `1.4 s`, `3 min 5 s`, `2 h 10 min`, `3 d 4 h`.
pub(crate) fn ms(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0 => format!("{ms} ms"),
        1..60 => format!("{}.{} s", s, ms % 1000 / 100),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

/// `1 disk`, `2 disks`.
pub(crate) fn count(n: usize, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}

/// `2026-01-31 12:59:59 UTC`, from microseconds since 1970.
pub(crate) fn utc(unix_us: u64) -> String {
    let s = unix_us / 1_000_000;
    let (year, month, day) = civil(s / 86_400);
    let (h, m, s) = (s % 86_400 / 3600, s % 3600 / 60, s % 60);
    format!("{year:04}-{month:02}-{day:02} {h:02}:{m:02}:{s:02} UTC")
}

/// `2026-01-31 12:59`, by the clock on the wall of this machine.
pub(crate) fn local(unix_us: u64) -> String {
    let time = i64::try_from(unix_us).ok().and_then(|us| jiff::Timestamp::from_microsecond(us).ok());
    time.map_or_else(|| utc(unix_us), |t| t.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M").to_string())
}

/// Year, month and day of a number of days since 1970 (Howard Hinnant's `civil_from_days`, for days that are not negative).
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + u64::from(month <= 2), month, doy - (153 * mp + 2) / 5 + 1)
}

/// Milliseconds between then (microseconds since 1970) and now; 0 for the future, which only clocks that disagree show.
pub(crate) fn age_ms(unix_us: u64) -> u64 {
    unix_us_now().saturating_sub(unix_us) / 1000
}

/// Microseconds since 1970.
pub(crate) fn unix_us_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}

/// `[#####.....]`.
pub(crate) fn bar(done: u64, total: u64, width: usize) -> String {
    let filled = if total == 0 { width } else { (done.min(total) as u128 * width as u128 / u128::from(total)) as usize };
    format!("[{}{}]", "#".repeat(filled), ".".repeat(width - filled))
}

/// Text from a peer or a file as one line, without what would move a terminal's cursor.
pub(crate) fn sanitised(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Pads to `width` characters.
pub(crate) fn padded(text: &str, width: usize) -> String {
    format!("{text}{}", " ".repeat(width.saturating_sub(text.chars().count())))
}

/// Rows with aligned columns; the first row is the heading. Columns whose heading starts with `>` are flush right.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let right: Vec<bool> =
        (0..columns).map(|i| rows.first().and_then(|r| r.get(i)).is_some_and(|c| c.starts_with('>'))).collect();
    let cell = |row: usize, text: &str| if row == 0 { text.trim_start_matches('>').to_owned() } else { text.to_owned() };
    let widths: Vec<usize> = (0..columns)
        .map(|i| rows.iter().enumerate().filter_map(|(n, r)| Some(cell(n, r.get(i)?).chars().count())).max().unwrap_or(0))
        .collect();
    let mut out = String::new();
    for (n, row) in rows.iter().enumerate() {
        let mut line = String::new();
        for (i, text) in row.iter().enumerate() {
            let text = cell(n, text);
            let pad = " ".repeat(widths.get(i).copied().unwrap_or(0).saturating_sub(text.chars().count()));
            let gap = if i == 0 { "" } else { "  " };
            if right.get(i).copied().unwrap_or(false) {
                line.push_str(&format!("{gap}{pad}{text}"));
            } else {
                line.push_str(&format!("{gap}{text}{pad}"));
            }
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// Colours, or none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paint(bool);

impl Paint {
    /// For standard output.
    pub(crate) fn stdout() -> Self {
        Self(std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none())
    }

    /// None.
    pub(crate) fn plain() -> Self {
        Self(false)
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub(crate) fn good(self, text: &str) -> String {
        self.paint("32", text)
    }
    pub(crate) fn warn(self, text: &str) -> String {
        self.paint("33", text)
    }
    pub(crate) fn bad(self, text: &str) -> String {
        self.paint("31;1", text)
    }
    pub(crate) fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_well() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1 << 20), "1.0 MiB");
        assert_eq!(bytes((1 << 20) - 1), "1.0 MiB");
        assert_eq!(bytes(u64::MAX), "16384.0 PiB");
        assert_eq!(bit_rate(64_000), "64 kbit/s");
        assert_eq!(bit_rate(20_000_000), "20 Mbit/s");
        assert_eq!(bit_rate(1_500_000_000), "1.5 Gbit/s");
        assert_eq!(bit_rate(100_000_000_000), "100 Gbit/s");
        assert_eq!(ms(999), "999 ms");
        assert_eq!(ms(1450), "1.4 s");
        assert_eq!(ms(185_000), "3 min 5 s");
        assert_eq!(ms(7_800_000), "2 h 10 min");
        assert_eq!(ms(273_600_000), "3 d 4 h");
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(1_709_208_000_000_000), "2024-02-29 12:00:00 UTC");
        assert_eq!(utc(1_769_864_399_000_000), "2026-01-31 12:59:59 UTC");
        assert_eq!(bar(1, 2, 10), "[#####.....]");
        assert_eq!(bar(9, 0, 4), "[####]");
        assert_eq!(sanitised("a\x1b[2Jb\nc"), "a [2Jb c");
        assert_eq!(table(&[vec!["A".into(), ">N".into()], vec!["xyz".into(), "1".into()]]), "A    N\nxyz  1\n");
    }
}
