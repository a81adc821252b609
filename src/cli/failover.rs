//! `twinsite failover`: says what it will do, asks, does it.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::{Usage, client, hooks, human};
use crate::api::{ApiError, FailoverDone, FailoverPlan, FailoverRequest, HookOutcome, HookRun, HookRuns, Refused, nbd_uri};
use crate::config::export_address;

/// How often the run of a hook is looked at.
const HOOK_LOOK: Duration = Duration::from_millis(100);

/// What was asked for.
pub(crate) struct Wish {
    pub(crate) group: String,
    /// A point, or a name of one; the newest by default.
    pub(crate) point: Option<String>,
    /// Only a preview needs none.
    pub(crate) export: Option<String>,
    pub(crate) preview: bool,
    pub(crate) yes: bool,
    pub(crate) force: bool,
    pub(crate) ignore_hooks: bool,
    pub(crate) json: bool,
}

pub(crate) fn run(socket: &Path, wish: &Wish) -> anyhow::Result<()> {
    // Relative to where the user stands, not to the daemon's folder.
    let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    let address = |given: &String| {
        let address = export_address(&here, given).map_err(|problem| Usage(format!("--export '{given}' {problem}")))?;
        Ok::<_, Usage>(address.to_string())
    };
    let export = wish.export.as_ref().map(address).transpose()?;
    let mut query = format!("/v1/failover?group={}", client::encoded(&wish.group));
    if let Some(point) = &wish.point {
        query.push_str(&format!("&point={}", client::encoded(point)));
    }
    let plan: FailoverPlan = client::get(socket, &query)?;
    let Some(export) = export.filter(|_| !wish.preview) else {
        if wish.json {
            println!("{}", serde_json::to_string_pretty(&plan)?);
        } else {
            describe(&plan, wish.export.as_deref());
            println!("Nothing was changed.");
        }
        return Ok(());
    };
    if !wish.json {
        describe(&plan, Some(&export));
    }
    if let Some(error) = plan.refusal.clone().filter(|_| !wish.force) {
        let refused = if plan.primary_alive { Refused::PrimaryAlive } else { Refused::ThirdSite };
        return Err(told(client::Refusal(ApiError { error, refused: Some(refused) }).into(), wish.json));
    }
    if !wish.yes && !confirmed()? {
        println!("Nothing was changed.");
        return Ok(());
    }
    // The point that was shown is the point that is activated, also if a newer one has arrived meanwhile.
    let point = match (&plan.active, &wish.point) {
        (Some(active), None) => active.point,
        _ => plan.point,
    };
    let group = format!("{}/{}", plan.client, plan.group);
    let request =
        FailoverRequest { group, point: Some(point.to_string()), export, force: wish.force, ignore_hooks: wish.ignore_hooks };
    let hooks_ms: u64 = plan.hooks.iter().map(|hook| hook.limit_ms).sum();
    let deadline = client::DEADLINE + Duration::from_millis(hooks_ms);
    // The hook before it has a limit; another group's failover, and its hook, come first.
    let done = client::wait(socket, "/v1/failover", &request);
    let mut done: FailoverDone = done.map_err(|error| told(error, wish.json))?;
    if wish.json {
        done.hooks.extend(done.post_hook.map(|number| hook_ended(socket, number, deadline)).transpose()?);
        println!("{}", serde_json::to_string_pretty(&done)?);
        return Ok(());
    }
    println!("\nActive: point {}, generation {}, after {}.", done.point, done.generation, human::ms(done.took_ms));
    for volume in &done.volumes {
        println!("  {}  {}", human::padded(volume.name.as_str(), 12), nbd_uri(&done.export, volume.name.as_str()));
    }
    for run in &done.hooks {
        println!("{}", hooks::line(run));
    }
    if let Some(number) = done.post_hook {
        println!("The copy is served; the hook that follows runs …");
        let run = hook_ended(socket, number, deadline)?;
        println!("{}", hooks::line(&run));
        if run.outcome != HookOutcome::Succeeded {
            eprintln!("WARNING: hook {} {}: the copy is active, and what the hook should do is not done", run.hook, run.outcome);
        }
    }
    Ok(())
}

/// A script that asked for JSON gets the refusal as JSON too.
fn told(error: anyhow::Error, json: bool) -> anyhow::Error {
    if let Some(client::Refusal(answer)) = error.downcast_ref()
        && json
        && let Ok(text) = serde_json::to_string_pretty(answer)
    {
        println!("{text}");
    }
    error
}

/// Waits for the end of a hook's run.
fn hook_ended(socket: &Path, number: u64, within: Duration) -> anyhow::Result<HookRun> {
    let until = Instant::now() + within;
    loop {
        let all: HookRuns = client::get(socket, "/v1/hooks")?;
        let found = all.runs.into_iter().find(|run| run.number == number);
        let run = found.context("the copy is active, but nothing is known of the hook that follows: see twinsite hooks")?;
        if run.outcome != HookOutcome::Running || Instant::now() >= until {
            return Ok(run);
        }
        std::thread::sleep(HOOK_LOOK);
    }
}

fn describe(plan: &FailoverPlan, export: Option<&str>) {
    let name = format!("{}/{}", plan.client, plan.group);
    let served = export.map_or_else(String::new, |export| format!(", served at {export}"));
    if let Some(active) = &plan.active {
        let at = export.map_or_else(String::new, |export| format!(" It will be served at {export}."));
        println!("Group {name} is active already, from point {}.{at}", active.point);
        println!("Its present clients, if any, will be disconnected. Bytes to move: 0.");
        hooks::planned(&plan.hooks).for_each(|line| println!("{line}"));
        open_to_all(export);
        return;
    }
    println!("Failover of group {name}:");
    let age = human::ms(human::age_ms(plan.cut_unix_us));
    let newest = match plan.points_after {
        0 => "the newest".to_owned(),
        1 => format!("1 point before the newest, {}", plan.newest),
        after => format!("{after} points before the newest, {}", plan.newest),
    };
    println!("  point       {} ({newest}), cut {age} ago, {}", plan.point, human::utc(plan.cut_unix_us));
    println!("  generation  {} is raised to {}: replication into this group ends", plan.generation, plan.generation_after);
    for line in lost(plan) {
        println!("  lost here   {line}");
    }
    println!("  primary     {}", primary(plan));
    for volume in &plan.volumes {
        println!("  disk        {}, {}{served}", volume.name, human::bytes(volume.size_bytes));
    }
    hooks::planned(&plan.hooks).for_each(|line| println!("{line}"));
    println!("  to move     {}", human::bytes(plan.bytes_to_move));
    if plan.primary_alive {
        println!("  WARNING     the primary is alive and may still be serving this disk: stop it first");
    } else if plan.refusal.is_some() {
        println!("  WARNING     the third site is the server of what went onward from here: guests here could not write");
    }
    open_to_all(export);
}

/// Says so if others than this machine's reach the address: it has neither TLS nor password.
pub(super) fn open_to_all(export: Option<&str>) {
    let ip = export.and_then(|export| export.strip_prefix("tcp:")).and_then(|at| at.parse::<SocketAddr>().ok());
    if ip.is_some_and(|at| !at.ip().is_loopback()) {
        println!(
            "  WARNING     anyone who reaches that address can read and write the disks, it has no TLS: use unix:, or loopback"
        );
    }
}

/// What the activated copy will not hold.
fn lost(plan: &FailoverPlan) -> Vec<String> {
    let mut lines = Vec::new();
    if plan.points_after > 0 {
        let (points, bytes) = (human::count(plan.points_after as usize, "later epoch"), human::bytes(plan.changed_bytes_after));
        let span = human::ms(plan.newest_cut_unix_us.saturating_sub(plan.cut_unix_us) / 1000);
        lines.push(format!("{points} of {span}, {bytes} changed, up to point {}; they stay in the store", plan.newest));
    }
    let cut = if plan.points_after == 0 { "that cut".to_owned() } else { format!("the cut of {}", plan.newest) };
    lines.push(format!("what was written at the primary after {cut}; it stays on the primary's disk"));
    lines
}

/// What is known of the primary, and with it of how much it may have written since the newest point.
fn primary(plan: &FailoverPlan) -> String {
    let session = match &plan.connected {
        Some(peer) => format!("{peer} has a session"),
        None => "not connected".to_owned(),
    };
    let Some(heard) = plan.heard_age_ms else {
        return format!("{session}; it was stopped in order, or not heard from since this node was started");
    };
    let behind = human::age_ms(plan.newest_cut_unix_us).saturating_sub(heard);
    format!("{session}; last heard from {} ago, {} after the newest cut", human::ms(heard), human::ms(behind))
}

pub(crate) fn confirmed() -> anyhow::Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Err(Usage("nothing was changed: there is no terminal to ask on; add --yes to go on".to_owned()).into());
    }
    print!("Go on? [y/N] ");
    std::io::stdout().flush()?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).context("cannot read the answer")?;
    Ok(matches!(line.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}
