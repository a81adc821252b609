//! `twinsite points`.

use std::path::Path;

use super::drill::verdict;
use super::human::Paint;
use super::{client, human};
use crate::api::Points;

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
    let drilled = points.points.iter().skip(skipped).any(|p| p.drill.is_some());
    if drilled && let Some(head) = rows.first_mut() {
        head.push("DRILL".to_owned());
    }
    for p in points.points.iter().skip(skipped) {
        let mut row = vec![
            p.point.to_string(),
            human::utc(p.cut_unix_us),
            human::ms(human::age_ms(p.cut_unix_us)),
            human::bytes(p.changed_bytes),
            human::bytes(p.stored_bytes),
        ];
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
