//! `twinsite failback` and `twinsite rollback` at the primary, `twinsite switchover` at the receiver: each says what it will do, asks, does it.

use std::io::{IsTerminal, Write, stdout};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::bail;
use replicator::HandbackPlan;

use super::failover::{confirmed, open_to_all};
use super::human::{self, bytes, ms};
use super::{Usage, client, hooks};
use crate::api::{FailoverDone, FailoverPlan, HandbackProgress, HandbackRequest, PlannedHandback, SwitchoverRequest, nbd_uri};
use crate::config::export_address;

const BAR_WIDTH: usize = 30;
/// From one look to the next.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What was asked for.
pub(crate) struct Wish {
    pub(crate) group: String,
    /// To go back to, a point or a name of one; else what the other site has is taken.
    pub(crate) point: Option<String>,
    pub(crate) ignore_hooks: bool,
    pub(crate) yes: bool,
    pub(crate) json: bool,
}

/// All that may differ is compared, and the receiver reads its journal up to an older point.
const LOOKS: &str = "comparing the disks with the other site";

/// Failback and rollback.
pub(crate) fn run(socket: &Path, wish: &Wish) -> anyhow::Result<()> {
    let mut request = HandbackRequest { group: wish.group.clone(), point: wish.point.clone(), ignore_hooks: wish.ignore_hooks };
    let PlannedHandback { plan, hooks: planned } = client::wait_for(socket, "/v1/handback/plan", &request, LOOKS)?;
    // The point that was shown is the one that is gone back to, whatever becomes of its name.
    request.point = wish.point.as_ref().map(|_| plan.from.to_string());
    if !wish.json {
        print!("{}", described(&plan, wish.point.is_some()));
        hooks::planned(&planned).for_each(|line| println!("{line}"));
    }
    if !wish.yes && !confirmed()? {
        println!("Nothing was changed.");
        return Ok(());
    }
    let mut meter = Meter { shown: std::io::stderr().is_terminal() && !wish.json, drawn: false };
    // The hook before it has a limit of its own, which only the node knows.
    let mut now: HandbackProgress = client::wait(socket, "/v1/handback", &request)?;
    let number = now.handback.number;
    while now.handback.running {
        meter.draw(&now);
        std::thread::sleep(LOOK_EVERY);
        now = client::get(socket, &format!("/v1/handback?group={}", client::encoded(&wish.group)))?;
        if now.handback.number != number {
            meter.end();
            bail!("group {}: another one was begun meanwhile: look at `twinsite status {}`", wish.group, wish.group);
        }
    }
    meter.end();
    if wish.json {
        writeln!(stdout(), "{}", serde_json::to_string_pretty(&now)?)?;
    }
    let handback = &now.handback;
    if let Some(error) = &handback.error {
        bail!("{error}");
    }
    if !wish.json {
        let point = handback.point.map_or_else(|| "-".to_owned(), |p| p.to_string());
        writeln!(
            stdout(),
            "\nGroup {}: guests may write here again, at point {point}, after {}. {} changed here, {} came over the line.",
            now.group,
            ms(handback.elapsed_ms),
            bytes(handback.done_bytes),
            bytes(handback.received_bytes)
        )?;
        if let Some(kept) = &handback.kept {
            writeln!(stdout(), "What was written here after the sites had parted is kept at the receiver as fork {kept}.")?;
        }
    }
    Ok(())
}

fn described(plan: &HandbackPlan, rollback: bool) -> String {
    let mut told = String::new();
    let mut line = |text: String| told.push_str(&format!("{text}\n"));
    let after = plan.generation.0 + 1;
    if rollback {
        line(format!("Rollback of group {} to point {}:", plan.group, plan.from));
        line(format!(
            "  kept        what the disks hold now: all of it is committed first, as a point of the receiver (now {})",
            plan.newest
        ));
    } else {
        line(format!("Failback of group {}:", plan.group));
        line(format!("  from        the copy that was activated from point {}, as it is at the end", plan.from));
        match plan.own_bytes {
            0 => line("  kept        nothing was written here that the receiver does not have".to_owned()),
            own => line(format!(
                "  kept        {} written here after the sites had parted: sent to the receiver first, as a fork of its own",
                bytes(own)
            )),
        }
    }
    line(format!("  generation  {} is raised to {after}", plan.generation));
    line(format!("  to move     {} of blocks before compression, to this node", bytes(plan.receive_bytes)));
    line("  meanwhile   guests cannot write here; stop the machine that uses these disks".to_owned());
    if !rollback {
        line("  at the end  the copy at the other site is no longer served: stop the machine that runs there by then".to_owned());
    }
    told
}

/// One line on standard error that changes.
struct Meter {
    shown: bool,
    drawn: bool,
}

impl Meter {
    fn draw(&mut self, now: &HandbackProgress) {
        if !self.shown {
            return;
        }
        self.drawn = true;
        let handback = &now.handback;
        let rate = (handback.done_bytes * 1000).checked_div(handback.elapsed_ms).unwrap_or(0);
        let left = handback.total_bytes.saturating_sub(handback.done_bytes);
        let left = left.checked_div(rate).map_or_else(|| "-".to_owned(), |s| ms(s * 1000));
        let drawn = human::bar(handback.done_bytes, handback.total_bytes, BAR_WIDTH);
        let (done, total) = (bytes(handback.done_bytes), bytes(handback.total_bytes));
        eprint!("\r\x1b[2K{drawn} {done} of {total}  {}/s  {left} left  {}", bytes(rate), handback.step);
        // Nothing depends on its being seen.
        let _ = std::io::stderr().flush();
    }

    fn end(&mut self) {
        if std::mem::take(&mut self.drawn) {
            eprint!("\r\x1b[2K");
        }
    }
}

/// What was asked for.
pub(crate) struct Switchover {
    pub(crate) group: String,
    pub(crate) export: String,
    pub(crate) within: Duration,
    pub(crate) ignore_hooks: bool,
    pub(crate) yes: bool,
    pub(crate) json: bool,
}

pub(crate) fn switchover(socket: &Path, wish: &Switchover) -> anyhow::Result<()> {
    let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    let export = export_address(&here, &wish.export)
        .map_err(|problem| Usage(format!("--export '{}' {problem}", wish.export)))?
        .to_string();
    let query = format!("/v1/failover?group={}&switchover=true", client::encoded(&wish.group));
    let plan: FailoverPlan = client::get(socket, &query)?;
    let name = format!("{}/{}", plan.client, plan.group);
    if !wish.json {
        println!("Switchover of group {name}:");
        match &plan.connected {
            Some(peer) => println!("  primary     {peer}: takes no more writes, commits what it has; stop its machine first"),
            None => println!("  primary     not connected: this will be refused (without it, `twinsite failover`)"),
        }
        println!("  generation  {} is raised to {}", plan.generation, plan.generation_after);
        println!("  lost        nothing");
        for volume in &plan.volumes {
            println!("  disk        {}, {}, served at {export}", volume.name, bytes(volume.size_bytes));
        }
        hooks::planned(&plan.hooks).for_each(|line| println!("{line}"));
        println!("  to move     what the primary has not committed yet");
        open_to_all(Some(&export));
    }
    if !wish.yes && !confirmed()? {
        println!("Nothing was changed.");
        return Ok(());
    }
    let within_ms = u64::try_from(wish.within.as_millis()).unwrap_or(u64::MAX);
    let request = SwitchoverRequest { group: name, export, within_ms: Some(within_ms), ignore_hooks: wish.ignore_hooks };
    if !wish.json {
        println!("\nThe primary commits what it has, for at most {} …", human::ms(within_ms));
    }
    // The node gives up after that time; the hook before it has a limit of its own.
    let done: FailoverDone = client::wait(socket, "/v1/switchover", &request)?;
    if wish.json {
        println!("{}", serde_json::to_string_pretty(&done)?);
        return Ok(());
    }
    println!("\nActive: point {}, generation {}, nothing lost.", done.point, done.generation);
    for volume in &done.volumes {
        println!("  {}  {}", human::padded(volume.name.as_str(), 12), nbd_uri(&done.export, volume.name.as_str()));
    }
    println!("Home again: `twinsite failback {}` at the primary.", done.group);
    Ok(())
}
