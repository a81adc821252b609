//! `twinsite forks`: what old primaries had written of their own, and the end of it.

use std::io::Write;
use std::path::Path;

use anyhow::bail;
use proto::Name;

use super::failover::confirmed;
use super::{Usage, client, human};
use crate::api::{ForkList, ForkRemoval, ListedFork};

fn asked(socket: &Path, group: Option<&str>) -> anyhow::Result<ForkList> {
    let query = group.map_or_else(String::new, |group| format!("?group={}", client::encoded(group)));
    client::get(socket, &format!("/v1/forks{query}"))
}

pub(crate) fn list(socket: &Path, group: Option<&str>, json: bool) -> anyhow::Result<()> {
    let list = asked(socket, group)?;
    let mut out = std::io::stdout().lock();
    if json {
        return Ok(writeln!(out, "{}", serde_json::to_string_pretty(&list)?)?);
    }
    if list.forks.is_empty() {
        return Ok(writeln!(out, "no forks are kept{}", group.map_or_else(String::new, |group| format!(" of group {group}")))?);
    }
    let mut rows = vec![["FORK", "GROUP", "GENERATION", "FROM POINT", "MADE", ">OWN", ">STORED"].map(str::to_owned).to_vec()];
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    for ListedFork { client, group, fork } in &list.forks {
        rows.push(vec![
            fork.name.to_string(),
            format!("{client}/{group}"),
            or_dash(fork.generation.map(|generation| generation.to_string())),
            or_dash(fork.point.map(|point| point.to_string())),
            human::utc(fork.made_unix_us),
            human::bytes(fork.own_bytes),
            human::bytes(fork.space_bytes),
        ]);
    }
    out.write_all(human::table(&rows).as_bytes())?;
    for ListedFork { client, group, fork } in &list.forks {
        if let Some(error) = &fork.error {
            writeln!(out, "{} of group {client}/{group} cannot be used: {}", fork.name, human::sanitised(error))?;
        }
    }
    Ok(())
}

pub(crate) fn remove(socket: &Path, group: Option<&str>, name: &Name, yes: bool, json: bool) -> anyhow::Result<()> {
    if json && !yes {
        return Err(Usage("--remove with --json needs --yes".to_owned()).into());
    }
    let found: Vec<ListedFork> = asked(socket, group)?.forks.into_iter().filter(|f| f.fork.name == *name).collect();
    let one = match found.as_slice() {
        [one] => one,
        [] => bail!("no fork {name} is kept{}: see twinsite forks", group.map_or_else(String::new, |g| format!(" of group {g}"))),
        several => {
            let groups: Vec<String> = several.iter().map(|f| format!("{}/{}", f.client, f.group)).collect();
            return Err(Usage(format!("several groups keep a fork {name}: name one of {}", groups.join(", "))).into());
        }
    };
    let group = format!("{}/{}", one.client, one.group);
    if !json {
        let over = one.fork.point.map_or_else(String::new, |point| format!(" over point {point}"));
        println!("Removal of fork {name} of group {group}:");
        println!(
            "  lost        {} that its primary wrote of its own{over}; nothing else has them",
            human::bytes(one.fork.own_bytes)
        );
        println!("  space       {} are given back", human::bytes(one.fork.space_bytes));
    }
    if !yes && !confirmed()? {
        println!("Nothing was changed.");
        return Ok(());
    }
    let removed: ListedFork = client::post(socket, "/v1/forks/remove", &ForkRemoval { group, fork: name.clone() })?;
    if json {
        println!("{}", serde_json::to_string_pretty(&removed)?);
    } else {
        println!("Fork {name} of group {}/{} is removed.", removed.client, removed.group);
    }
    Ok(())
}
