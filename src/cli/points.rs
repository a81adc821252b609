//! `twinsite points`.

use std::path::Path;

use super::drill::verdict;
use super::human::Paint;
use super::{Usage, client, human};
use crate::api::{NameRequest, Named, Points};

/// Points shown unless all are asked for.
const SHOWN: usize = 20;

pub(crate) fn run(socket: &Path, group: &str, all: bool, json: bool) -> anyhow::Result<()> {
    let points: Points = client::get(socket, &format!("/v1/points?group={}", client::encoded(group)))?;
    if json {
        println!("{}", serde_json::to_string_pretty(&points)?);
        return Ok(());
    }
    if points.points.is_empty() {
        println!("group {}/{}: no committed point yet", points.client, points.group);
        return Ok(());
    }
    let skipped = if all { 0 } else { points.points.len().saturating_sub(SHOWN) };
    let mut rows = vec![["POINT", "CUT", ">AGE", ">CHANGED", ">STORED"].map(str::to_owned).to_vec()];
    let named = points.points.iter().any(|p| !p.names.is_empty());
    let drilled = points.points.iter().skip(skipped).any(|p| p.drill.is_some());
    if let Some(head) = rows.first_mut() {
        head.extend(named.then(|| "NAME".to_owned()));
        head.extend(drilled.then(|| "DRILL".to_owned()));
    }
    for p in points.points.iter().skip(skipped) {
        let mut row = vec![
            p.point.to_string(),
            human::utc(p.cut_unix_us),
            human::ms(human::age_ms(p.cut_unix_us)),
            human::bytes(p.changed_bytes),
            human::bytes(p.stored_bytes),
        ];
        row.extend(named.then(|| p.names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")));
        // Without colour: a table counts characters.
        row.extend(p.drill.as_ref().map(|drill| verdict(drill, Paint::plain())));
        rows.push(row);
    }
    if skipped > 0 {
        println!("{skipped} older points not shown; --all shows them");
    }
    print!("{}", human::table(&rows));
    Ok(())
}

/// Ages that a timeline tells apart, in ms, with what it calls them.
const AGES: [(u64, &str); 8] = [
    (10 * 60_000, "10 minutes"),
    (3_600_000, "1 hour"),
    (6 * 3_600_000, "6 hours"),
    (86_400_000, "1 day"),
    (3 * 86_400_000, "3 days"),
    (7 * 86_400_000, "7 days"),
    (30 * 86_400_000, "30 days"),
    (u64::MAX, "older"),
];

/// How many points there are of each age, and what they take.
pub(crate) fn timeline(socket: &Path, group: &str) -> anyhow::Result<()> {
    let points: Points = client::get(socket, &format!("/v1/points?group={}", client::encoded(group)))?;
    let mut rows = vec![["UP TO", ">POINTS", ">CHANGED", ">STORED", "OLDEST", "NAMES"].map(str::to_owned).to_vec()];
    let mut younger = 0;
    for (limit, called) in AGES {
        let of_age: Vec<_> = points.points.iter().filter(|p| (younger..limit).contains(&human::age_ms(p.cut_unix_us))).collect();
        younger = limit;
        let Some(oldest) = of_age.first() else { continue };
        let names: Vec<String> = of_age.iter().flat_map(|p| &p.names).map(ToString::to_string).collect();
        rows.push(vec![
            called.to_owned(),
            of_age.len().to_string(),
            human::bytes(of_age.iter().map(|p| p.changed_bytes).sum()),
            human::bytes(of_age.iter().map(|p| p.stored_bytes).sum()),
            oldest.point.to_string(),
            names.join(", "),
        ]);
    }
    if rows.len() == 1 {
        println!("group {}/{}: no committed point yet", points.client, points.group);
        return Ok(());
    }
    print!("{}", human::table(&rows));
    Ok(())
}

/// Names a point, or takes a name away.
pub(crate) fn name(socket: &Path, group: &str, name: &str, point: Option<&str>, json: bool) -> anyhow::Result<()> {
    let name = name.parse().map_err(|error| Usage(format!("name '{name}': {error}")))?;
    let request = NameRequest { group: group.to_owned(), name, point: point.map(str::to_owned) };
    let named: Named = client::post(socket, "/v1/names", &request)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&named)?);
    } else if point.is_some() {
        println!(
            "{}/{}: point {} is '{}' and stays until that name is taken away",
            named.client, named.group, named.point, named.name
        );
    } else {
        println!("{}/{}: point {} is no longer '{}'", named.client, named.group, named.point, named.name);
    }
    Ok(())
}
