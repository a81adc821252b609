//! What an experiment leaves: tables and PASS or FAIL lines on the terminal, a JSON file, a chart.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Value, json};

use crate::chart::Chart;
use crate::context::Bench;
use crate::tools::{self, Tool};

/// A table; the first column is set left, the others right.
#[derive(Debug)]
pub(crate) struct Table {
    title: String,
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(title: impl Into<String>, head: &[&str]) -> Self {
        Self { title: title.into(), head: head.iter().map(|h| (*h).to_owned()).collect(), rows: Vec::new() }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    fn print(&self) {
        let width = |i: usize| {
            let cells = self.rows.iter().chain([&self.head]).filter_map(|r| r.get(i));
            cells.map(|c| c.chars().count()).max().unwrap_or_default()
        };
        println!("\n{}", self.title);
        for row in [&self.head].into_iter().chain(&self.rows) {
            let cells = row.iter().enumerate().map(|(i, cell)| {
                let width = width(i);
                if i == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            println!("  {}", cells.collect::<Vec<_>>().join("  ").trim_end());
        }
    }
}

/// A bound that must be kept.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Check {
    what: String,
    value: f64,
    relation: &'static str,
    bound: f64,
    unit: &'static str,
    pass: bool,
}

impl Check {
    /// `value` must be at least `bound`. No figure (NaN) fails.
    pub(crate) fn at_least(what: impl Into<String>, value: f64, bound: f64, unit: &'static str) -> Self {
        Self { what: what.into(), value, relation: "at least", bound, unit, pass: value >= bound }
    }

    /// `value` must be at most `bound`. No figure (NaN) fails.
    pub(crate) fn at_most(what: impl Into<String>, value: f64, bound: f64, unit: &'static str) -> Self {
        Self { what: what.into(), value, relation: "at most", bound, unit, pass: value <= bound }
    }

    fn print(&self) {
        let verdict = if self.pass { "PASS" } else { "FAIL" };
        // As many digits as it takes to see on which side of the bound it is.
        println!(
            "  {verdict}  {}: {:.3} {} (must be {} {} {})",
            self.what, self.value, self.unit, self.relation, self.bound, self.unit
        );
    }
}

/// Everything an experiment found.
#[derive(Debug)]
pub(crate) struct Report {
    /// Name of the experiment and of its files.
    pub(crate) name: &'static str,
    /// One line for people.
    pub(crate) title: String,
    /// What was chosen: sizes, seconds, rounds.
    pub(crate) parameters: Value,
    /// Every figure, every round.
    pub(crate) results: Value,
    pub(crate) tables: Vec<Table>,
    pub(crate) checks: Vec<Check>,
    pub(crate) chart: Chart,
    /// Whose versions to write down.
    pub(crate) tools: Vec<Tool>,
}

impl Report {
    /// Prints and writes it; true if every bound is kept.
    pub(crate) fn finish(&self, bench: &Bench) -> Result<bool> {
        println!("\n== {}: {}", self.name, self.title);
        for table in &self.tables {
            table.print();
        }
        if !self.checks.is_empty() {
            println!("\nmust reach");
        }
        for check in &self.checks {
            check.print();
        }
        let versions: BTreeMap<&str, String> = self.tools.iter().map(|t| (t.program, tools::version(*t))).collect();
        let document = json!({
            "experiment": self.name,
            "title": self.title,
            "date": utc(SystemTime::now()),
            "quick": bench.quick,
            "took_s": bench.took().as_secs(),
            "machine": machine(),
            "versions": versions,
            "parameters": self.parameters,
            "commands": bench.commands(),
            "results": self.results,
            "checks": self.checks,
        });
        let text = serde_json::to_string_pretty(&document).context("cannot write the results as JSON")? + "\n";
        let json = write(bench.out(), &format!("{}.json", self.name), &text)?;
        let svg = write(bench.out(), &format!("{}.svg", self.name), &self.chart.svg())?;
        println!("\ntook {} s; written: {json}, {svg}", bench.took().as_secs());
        Ok(self.checks.iter().all(|c| c.pass))
    }
}

/// Writes beside, then renames: a reader never sees half a file.
fn write(folder: &Path, name: &str, text: &str) -> Result<String> {
    let failed = || format!("{}: cannot write {name}", folder.display());
    fs::create_dir_all(folder).with_context(failed)?;
    let beside = folder.join(format!("{name}.tmp"));
    fs::write(&beside, text).with_context(failed)?;
    fs::rename(&beside, folder.join(name)).with_context(failed)?;
    Ok(folder.join(name).display().to_string())
}

fn machine() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, key: &str| {
        let line = text.lines().find(|l| l.starts_with(key)).and_then(|l| l.split_once(':'));
        line.map(|(_, v)| v.trim().to_owned()).unwrap_or_default()
    };
    let (cpu, memory) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
    json!({
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "cpu": field(&cpu, "model name"),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "memory": field(&memory, "MemTotal"),
        "load_before_the_end": read("/proc/loadavg").trim(),
    })
}

/// `2026-01-31T12:00:00Z`. Days to a date by Howard Hinnant's `civil_from_days`.
fn utc(now: SystemTime) -> String {
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

/// `1234567.8` as `1,234,568`.
pub(crate) fn whole(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(c);
    }
    if value <= -0.5 { format!("-{text}") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_and_numbers_for_people() {
        let at = |s| utc(UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(at(1_798_761_599), "2026-12-31T23:59:59Z");
        assert_eq!(whole(1_234_567.8), "1,234,568");
        assert_eq!(whole(999.4), "999");
        assert_eq!(whole(-1000.0), "-1,000");
    }

    #[test]
    fn a_bound_is_kept_or_not_and_no_figure_is_not() {
        assert!(Check::at_least("x", 1.0, 1.0, "").pass);
        assert!(!Check::at_least("x", 0.999_999, 1.0, "").pass);
        assert!(!Check::at_least("x", f64::NAN, 1.0, "").pass);
        assert!(Check::at_most("x", 1.0, 1.0, "").pass);
        assert!(!Check::at_most("x", f64::NAN, 1.0, "").pass);
    }
}
