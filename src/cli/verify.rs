//! `twinsite verify`: starts a whole comparison, or joins the one that runs, and shows it to its end.

use std::io::{IsTerminal, Write, stdout};
use std::path::Path;
use std::time::Duration;

use anyhow::bail;
use replicator::LinkState;

use super::client;
use super::human::{self, Paint, bytes, ms};
use crate::api::{Verification, VerifyRequest};

const BAR_WIDTH: usize = 30;
/// From one look to the next.
const LOOK_EVERY: Duration = Duration::from_millis(250);

pub(crate) fn run(socket: &Path, group: &str, json: bool) -> anyhow::Result<()> {
    let mut meter = Meter { shown: std::io::stderr().is_terminal() && !json, drawn: false };
    let mut now: Verification = client::post(socket, "/v1/verify", &VerifyRequest { group: group.to_owned() })?;
    let number = now.verify.number;
    while now.verify.running {
        if now.state == LinkState::Fenced {
            meter.end();
            bail!("group {group} was failed over while it was verified: the copy is not of this disk any more");
        }
        meter.draw(&now);
        std::thread::sleep(LOOK_EVERY);
        now = client::get(socket, &format!("/v1/verify?group={}", client::encoded(group)))?;
        if now.verify.number != number {
            // It ended between two looks, and somebody has begun the next.
            meter.end();
            bail!("group {group}: another verify was begun meanwhile: run this again to see it");
        }
    }
    meter.end();
    if json {
        writeln!(stdout(), "{}", serde_json::to_string_pretty(&now)?)?;
    } else {
        writeln!(stdout(), "{}", told(&now, Paint::stdout()))?;
    }
    if now.verify.differing_bytes > 0 {
        bail!(
            "group {group}: the copy differed in {}, which are sent again with the next epoch; the log of both nodes has the places, and what was \
             damaged there",
            bytes(now.verify.differing_bytes)
        );
    }
    if now.verify.unreadable_bytes > 0 {
        bail!(
            "group {group}: {} of its disks cannot be read here and were not compared; the node's log has the places",
            bytes(now.verify.unreadable_bytes)
        );
    }
    Ok(())
}

fn told(done: &Verification, paint: Paint) -> String {
    let verify = &done.verify;
    let verdict = match verify.differing_bytes {
        0 => paint.good("the copy is what it should be"),
        differing => paint.bad(&format!("{} differed", bytes(differing))),
    };
    let (compared, total) = (bytes(verify.compared_bytes), bytes(verify.total_bytes));
    let rest = match verify.total_bytes - verify.compared_bytes - verify.unreadable_bytes {
        0 => String::new(),
        rest => format!("; {} were just being written and are sent anyway", bytes(rest)),
    };
    format!(
        "group {}: {verdict}: {compared} of {total} compared in {}, {}/s{rest}",
        done.group,
        ms(verify.elapsed_ms),
        bytes(verify.rate_bytes_per_s)
    )
}

/// One line on standard error that changes.
struct Meter {
    shown: bool,
    drawn: bool,
}

impl Meter {
    fn draw(&mut self, now: &Verification) {
        if !self.shown {
            return;
        }
        self.drawn = true;
        let verify = &now.verify;
        let left = verify.left_s.map_or_else(|| "-".to_owned(), |s| ms(s * 1000));
        let drawn = human::bar(verify.done_bytes, verify.total_bytes, BAR_WIDTH);
        let (done, total, rate) = (bytes(verify.done_bytes), bytes(verify.total_bytes), bytes(verify.rate_bytes_per_s));
        let waits = if now.state == LinkState::Streaming { "" } else { "  waits for the receiver" };
        let differing = match verify.differing_bytes {
            0 => String::new(),
            differing => format!("  {} differ", bytes(differing)),
        };
        eprint!("\r\x1b[2K{drawn} {done} of {total}  {rate}/s  {left} left{differing}{waits}");
        // Nothing depends on its being seen.
        let _ = std::io::stderr().flush();
    }

    fn end(&mut self) {
        if std::mem::take(&mut self.drawn) {
            eprint!("\r\x1b[2K");
        }
    }
}
