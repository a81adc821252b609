//! `[[drill]]`: a script that the node runs on a fork of the newest point, again and again.

use std::time::Duration;

use proto::Name;

use super::error::{ConfigError, Problem};
use super::parse::{Context, Copies, check_sent, path};
use super::reader::{Found, Reader, Section, text};
use super::{DRILL_TIMEOUT_DEFAULT, DrillConfig, DrillTime, units};

const EVERY_MIN: Duration = Duration::from_secs(60);
const EVERY_MAX: Duration = Duration::from_secs(365 * 86_400);
pub(super) const TIMEOUT_MIN: Duration = Duration::from_secs(1);
pub(super) const TIMEOUT_MAX: Duration = Duration::from_secs(86_400);

pub(super) fn drill<'d>(
    reader: &mut Reader<'d>,
    mut section: Section<'d>,
    context: &Context,
    copies: Copies<'_>,
) -> Option<DrillConfig> {
    let s = &mut section;
    let group = reader.need(s, "group", "\"db\"", text("\"db\"", selector));
    let run = reader.need(s, "run", "\"/etc/twinsite/drill-db.sh\"", text("a path in quotes", |t| path(context, t)));
    let every = reader.get(s, "every", text("\"1d\"", units::duration));
    if let Some(found) = &every
        && !(EVERY_MIN..=EVERY_MAX).contains(&found.value)
    {
        reader.wrong(found, Problem::Range { min: "\"1min\"", max: "\"365d\"" });
    }
    let at = reader.get(s, "at", text("\"03:00\"", units::time_of_day));
    let timeout = reader.get(s, "timeout", text("\"10min\"", units::duration));
    if let Some(found) = &timeout
        && !(TIMEOUT_MIN..=TIMEOUT_MAX).contains(&found.value)
    {
        reader.wrong(found, Problem::Range { min: "\"1s\"", max: "\"1d\"" });
    }
    let user = reader.get(s, "user", text("\"drills\"", |t| Ok(t.parse::<Name>()?)));
    let space = reader.get(s, "space_max", text("\"10GiB\"", units::size));
    let time = time(reader, s, every, at);
    if copies.is_none() {
        let place = reader.place(section.at);
        reader.errors.push(ConfigError::DrillWithoutCopies { place });
    }
    // Without clients nobody sends anything, which is told as such.
    if let (Some(Some(receiver)), Some(found)) = (copies, &group)
        && !receiver.clients.is_empty()
    {
        let (client, name) = &found.value;
        check_sent(reader, found, receiver, (client.as_ref(), name));
    }
    reader.finish(section);
    Some(DrillConfig {
        group: match group?.value {
            (Some(client), group) => format!("{client}/{group}"),
            (None, group) => group.to_string(),
        },
        run: run?.value,
        time: time?,
        timeout: timeout.map_or(DRILL_TIMEOUT_DEFAULT, |found| found.value),
        user: user.map(|found| found.value.to_string()),
        space_max_bytes: space.map(|found| found.value),
    })
}

fn time<'d>(
    reader: &mut Reader<'d>,
    section: &mut Section<'d>,
    every: Option<Found<Duration>>,
    at: Option<Found<jiff::civil::Time>>,
) -> Option<DrillTime> {
    match (every, at) {
        (Some(every), None) => Some(DrillTime::Every(every.value)),
        (None, Some(at)) => Some(DrillTime::At(at.value)),
        (Some(_), Some(at)) => {
            reader.wrong(&at, Problem::EveryAndAt);
            None
        }
        // Neither, or one that is wrong and said so.
        (None, None) => {
            if section.peek("every").is_none() && section.peek("at").is_none() {
                let (place, table) = (reader.place(section.at), section.title.clone());
                reader.errors.push(ConfigError::Missing { place, table, key: "every", example: "\"1d\", or at = \"03:00\"" });
            }
            None
        }
    }
}

/// `GROUP` or `CLIENT/GROUP`.
fn selector(given: &str) -> Result<(Option<Name>, Name), Problem> {
    let (client, group) = given.split_once('/').map_or((None, given), |(client, group)| (Some(client), group));
    Ok((client.map(str::parse).transpose()?, group.parse()?))
}
