//! `twinsite hooks`: what the hooks did.

use std::path::Path;

use super::{client, human};
use crate::api::{HookOutcome, HookRun, HookRuns, PlannedHook};

pub(crate) fn run(socket: &Path, json: bool) -> anyhow::Result<()> {
    let all: HookRuns = client::get(socket, "/v1/hooks")?;
    if json {
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    if all.runs.is_empty() {
        println!("No hook has run yet.");
    }
    for run in &all.runs {
        println!("{}", line(run));
        println!("  {}, started {}", run.path.display(), human::utc(run.started_unix_us));
        if run.output_bytes_left_out > 0 {
            println!("  … {} were printed before this", human::bytes(run.output_bytes_left_out));
        }
        run.output.lines().for_each(|line| println!("  | {}", human::sanitised(line)));
    }
    Ok(())
}

/// What would run with a transition: `hook        pre-failover: /etc/twinsite/move-address, at most 1 min 5 s`.
pub(super) fn planned(hooks: &[PlannedHook]) -> impl Iterator<Item = String> {
    hooks.iter().map(|hook| {
        let (path, limit) = (hook.path.display().to_string(), human::ms(hook.limit_ms));
        let told = hook.problem.as_ref().map_or_else(|| format!("{path}, at most {limit}"), |p| format!("WILL FAIL: {p}"));
        format!("  hook        {}: {}", hook.hook, human::sanitised(&told))
    })
}

/// `hook pre-failover of alpha/db succeeded after 120 ms, 3 s ago`.
pub(crate) fn line(run: &HookRun) -> String {
    let client = run.client.as_ref().map_or_else(String::new, |client| format!("{client}/"));
    let took = match (&run.outcome, run.duration_ms) {
        (HookOutcome::TimedOut { .. } | HookOutcome::Refused { .. }, _) | (_, None) => String::new(),
        (_, Some(took)) => format!(" after {}", human::ms(took)),
    };
    let ago = human::ms(human::age_ms(run.started_unix_us));
    human::sanitised(&format!("hook {} of {client}{} {}{took}, started {ago} ago", run.hook, run.group, run.outcome))
}
