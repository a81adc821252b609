//! `twinsite check`: verifies a store offline, with progress on a terminal. Findings go to standard output, one a line.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::bail;
use receiver::check::{Progress, Report};

use super::human::{self, Paint, bytes};

const BAR_WIDTH: usize = 30;

pub(crate) fn run(store: &Path, json: bool) -> anyhow::Result<()> {
    let mut meter = Meter { began: Instant::now(), shown: std::io::stderr().is_terminal() && !json, drawn: false };
    let report = receiver::check::check(store, &mut |progress| meter.draw(progress))?;
    meter.end();
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report, Paint::stdout());
    }
    if !report.is_clean() {
        let found: u64 = report.groups.iter().map(|g| g.findings.len() as u64 + g.findings_left_out).sum();
        bail!(
            "{}: {}: nothing was changed; `twinsite verify` at the primary has blocks of the newest point sent again; of a file that is refused as a whole keep the store as it is and make a new copy elsewhere",
            store.display(),
            findings(found)
        );
    }
    Ok(())
}

fn findings(n: u64) -> String {
    human::count(usize::try_from(n).unwrap_or(usize::MAX), "finding")
}

fn print(report: &Report, paint: Paint) {
    if report.groups.is_empty() {
        println!("no groups in this store");
    }
    for group in &report.groups {
        let found = group.findings.len() as u64 + group.findings_left_out;
        let verdict = if found == 0 { paint.good("good") } else { paint.bad(&findings(found)) };
        println!(
            "{}: {verdict}: {}, {}, {} read",
            group.group,
            human::count(group.points as usize, "point"),
            human::count(group.frames as usize, "frame"),
            bytes(group.bytes)
        );
        for disk in &group.unchecked {
            println!("  the base of disk {disk} has no checksums yet and was not read: the node makes them when it runs");
        }
        for finding in &group.findings {
            println!("  {}", human::sanitised(&finding.to_string()));
        }
        if group.findings_left_out > 0 {
            println!("  and {} more", group.findings_left_out);
        }
        if group.unsealed_bytes > 0 {
            println!(
                "  {} after the last seal, which the next start cuts off: an epoch that was never committed",
                bytes(group.unsealed_bytes)
            );
        }
    }
}

/// One line on standard error that changes.
struct Meter {
    began: Instant,
    shown: bool,
    drawn: bool,
}

impl Meter {
    fn draw(&mut self, Progress { bytes_done, bytes_total }: Progress) {
        if !self.shown {
            return;
        }
        self.drawn = true;
        let rate = (bytes_done as f64 / self.began.elapsed().as_secs_f64().max(0.001)) as u64;
        let left = (bytes_total - bytes_done).checked_div(rate).map_or_else(|| "-".to_owned(), |s| human::ms(s * 1000));
        let drawn = human::bar(bytes_done, bytes_total, BAR_WIDTH);
        eprint!("\r\x1b[2K{drawn} {} of {}  {}/s  {left} left", bytes(bytes_done), bytes(bytes_total), bytes(rate));
        // Nothing depends on its being seen.
        let _ = std::io::stderr().flush();
    }

    fn end(&self) {
        if self.drawn {
            eprint!("\r\x1b[2K");
        }
    }
}
