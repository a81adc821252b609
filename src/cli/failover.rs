//! `twinsite failover`: says what it will do, asks, does it.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use proto::Point;

use super::{Usage, client, human};
use crate::api::{FailoverDone, FailoverPlan, FailoverRequest};
use crate::config::export_address;

/// What was asked for.
pub(crate) struct Wish {
    pub(crate) group: String,
    pub(crate) point: Option<Point>,
    pub(crate) export: String,
    pub(crate) yes: bool,
    pub(crate) json: bool,
}

pub(crate) fn run(socket: &Path, wish: &Wish) -> anyhow::Result<()> {
    // Relative to where the user stands, not to the daemon's folder.
    let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    let export = export_address(&here, &wish.export)
        .map_err(|problem| Usage(format!("--export '{}' {problem}", wish.export)))?
        .to_string();
    let mut query = format!("/v1/failover?group={}", client::encoded(&wish.group));
    if let Some(point) = wish.point {
        query.push_str(&format!("&point={point}"));
    }
    let plan: FailoverPlan = client::get(socket, &query)?;
    if !wish.json {
        describe(&plan, &export);
    }
    if !wish.yes && !confirmed()? {
        println!("Nothing was changed.");
        return Ok(());
    }
    // The point that was shown is the point that is activated, also if a newer one has arrived meanwhile.
    let point = match (&plan.active, wish.point) {
        (Some(active), None) => active.point,
        _ => plan.point,
    };
    let request = FailoverRequest { group: format!("{}/{}", plan.client, plan.group), point: Some(point), export };
    let done: FailoverDone = client::post(socket, "/v1/failover", &request)?;
    if wish.json {
        println!("{}", serde_json::to_string_pretty(&done)?);
        return Ok(());
    }
    println!("\nActive: point {}, generation {}, after {}.", done.point, done.generation, human::ms(done.took_ms));
    for volume in &done.volumes {
        println!("  {}  {}", human::padded(volume.name.as_str(), 12), uri(&done.export, volume.name.as_str()));
    }
    Ok(())
}

/// What NBD clients call an export.
pub(crate) fn uri(address: &str, disk: &str) -> String {
    match address.split_once(':') {
        Some(("unix", path)) => format!("nbd+unix:///{disk}?socket={path}"),
        Some((_, address)) => format!("nbd://{address}/{disk}"),
        None => address.to_owned(),
    }
}

fn describe(plan: &FailoverPlan, export: &str) {
    let name = format!("{}/{}", plan.client, plan.group);
    if let Some(active) = &plan.active {
        println!("Group {name} is active already, from point {}. It will be served at {export}.", active.point);
        println!("Its present clients, if any, will be disconnected. Bytes to move: 0.");
        return;
    }
    println!("Failover of group {name}:");
    let newest = if plan.point == plan.newest { "the newest".to_owned() } else { format!("the newest is {}", plan.newest) };
    let age = human::ms(human::age_ms(plan.cut_unix_us));
    println!("  point       {} ({newest}), cut {age} ago, {}", plan.point, human::utc(plan.cut_unix_us));
    println!("  generation  {} is raised to {}: replication into this group ends", plan.generation, plan.generation_after);
    println!("  lost here   what was written at the primary after that cut; it stays on the primary's disk");
    for volume in &plan.volumes {
        println!("  disk        {}, {}, served at {export}", volume.name, human::bytes(volume.size_bytes));
    }
    println!("  to move     {}", human::bytes(plan.bytes_to_move));
    if let Some(peer) = &plan.connected {
        println!("  WARNING     the primary {peer} is connected and may still be serving this disk: stop it first");
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_is_named_as_clients_name_it() {
        assert_eq!(uri("unix:/run/a.sock", "root"), "nbd+unix:///root?socket=/run/a.sock");
        assert_eq!(uri("tcp:127.0.0.1:10809", "root"), "nbd://127.0.0.1:10809/root");
    }
}
