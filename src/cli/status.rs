//! `twinsite status`: a block of aligned lines for each group.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::bail;
use receiver::{FlattenState, FlattenStatus};
use replicator::{Durability, GroupStatus, LinkState, QueueStatus, ScrubStatus};

use super::drill::{verdict, what};
use super::human::{self, Paint, bit_rate, bytes, ms};
use super::{client, hooks};
use crate::api::{CopyState, CopyStatus, ExportStatus, HookOutcome, NodeStatus, OnwardState, OnwardStatus, PrimaryStatus};

const WATCH_INTERVAL: Duration = Duration::from_secs(1);
const BAR_WIDTH: usize = 30;
const LABEL_WIDTH: usize = 10;

pub(crate) fn run(socket: &Path, group: Option<&str>, watch: bool, json: bool) -> anyhow::Result<()> {
    loop {
        let status = narrowed(client::get(socket, "/v1/status")?, group)?;
        let text = if json { serde_json::to_string(&status)? + "\n" } else { render(&status, Paint::stdout()) };
        let mut out = std::io::stdout().lock();
        // One write: a terminal shows whole pictures only.
        let clear = if watch && !json && std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
        out.write_all(format!("{clear}{text}").as_bytes())?;
        out.flush()?;
        if !watch {
            return Ok(());
        }
        std::thread::sleep(WATCH_INTERVAL);
    }
}

fn narrowed(mut status: NodeStatus, group: Option<&str>) -> anyhow::Result<NodeStatus> {
    let Some(wanted) = group else { return Ok(status) };
    let copies = status.receiver.as_ref().map(|r| r.groups.as_slice()).unwrap_or_default();
    let full = |c: &CopyStatus| format!("{}/{}", c.client, c.group);
    let mut known: Vec<String> = status.primary.iter().map(|g| g.group().to_string()).collect();
    known.extend(copies.iter().map(full));
    status.primary.retain(|g| g.group().as_str() == wanted);
    if let Some(receiver) = &mut status.receiver {
        receiver.groups.retain(|c| c.group.as_str() == wanted || full(c) == wanted);
    }
    if status.primary.is_empty() && status.receiver.as_ref().is_none_or(|r| r.groups.is_empty()) {
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        bail!("unknown group '{wanted}': known here are {known}");
    }
    Ok(status)
}

/// The whole picture.
pub(crate) fn render(status: &NodeStatus, paint: Paint) -> String {
    let mut out = Lines::default();
    let up = ms(status.uptime_s * 1000);
    out.plain(&format!("node {}  {}  version {}, up {up}", paint.bold(&status.node.name), status.node.key, status.version));
    for group in &status.primary {
        out.plain("");
        match group {
            PrimaryStatus::Running(group) => {
                let onward = status.onward.iter().find(|onward| onward.group == group.group);
                primary(&mut out, group, (onward, &status.exports), paint);
            }
            PrimaryStatus::Waiting { group, reason } => {
                out.plain(&format!("group {}, primary", paint.bold(group.as_str())));
                out.pair("state", &paint.warn(&format!("waiting: {}", human::sanitised(reason))));
            }
            PrimaryStatus::Failed { group, error } => {
                out.plain(&format!("group {}, primary", paint.bold(group.as_str())));
                out.pair("state", &paint.bad(&format!("not started: {}", human::sanitised(error))));
            }
        }
    }
    if let Some(receiver) = &status.receiver {
        if let Some(error) = &receiver.error {
            out.plain("");
            out.plain(&format!("receiver on {}: {}", receiver.listen, paint.bad(&human::sanitised(error))));
        } else if receiver.groups.is_empty() {
            out.plain("");
            out.plain(&format!("receiver on {}: no copies yet", receiver.listen));
        }
        for group in &receiver.groups {
            out.plain("");
            copy(&mut out, group, &status.exports, paint);
        }
    }
    if !status.hooks.is_empty() {
        out.plain("");
        out.plain("hooks, the newest run of each (all of it: twinsite hooks)");
    }
    for run in &status.hooks {
        let line = hooks::line(run);
        let is_good = matches!(run.outcome, HookOutcome::Succeeded | HookOutcome::Running);
        out.plain(&format!("  {}", if is_good { line } else { paint.bad(&line) }));
        if let Some(last) = run.output.lines().rev().find(|line| !line.trim().is_empty() && !is_good) {
            out.plain(&format!("  | {}", human::sanitised(last)));
        }
    }
    out.0
}

#[derive(Default)]
struct Lines(String);

impl Lines {
    fn plain(&mut self, text: &str) {
        self.0.push_str(text);
        self.0.push('\n');
    }
    fn pair(&mut self, label: &str, text: &str) {
        self.plain(&format!("  {}  {text}", human::padded(label, LABEL_WIDTH)));
    }
}

fn state_of(state: LinkState, paint: Paint) -> String {
    match state {
        LinkState::Connecting => paint.warn("connecting"),
        LinkState::FirstSync => paint.warn("first sync"),
        LinkState::Comparing => {
            paint.warn("comparing: what may differ from the copy is looked for by hash; the copy stays activatable")
        }
        LinkState::Streaming => paint.good("streaming"),
        LinkState::Fenced => paint.bad("fenced: another side may write now, nothing is replicated"),
        LinkState::Refused => paint.bad("refused by the receiver"),
        LinkState::Stopped => paint.warn("stopped"),
    }
}

/// `onward` is set for a group whose disks are a copy.
fn primary(out: &mut Lines, group: &GroupStatus, (onward, exports): (Option<&OnwardStatus>, &[ExportStatus]), paint: Paint) {
    out.plain(&format!("group {}, primary, to {}", paint.bold(group.group.as_str()), group.peer));
    out.pair("state", &state_of(group.state, paint));
    if let Some(error) = &group.error {
        out.pair("error", &paint.bad(&human::sanitised(error)));
    }
    if let Some(pass) = &group.pass
        && group.state == LinkState::FirstSync
    {
        let percent = (u128::from(pass.done_bytes) * 100).checked_div(u128::from(pass.total_bytes)).unwrap_or(100);
        let left = pass.left_s.map_or_else(|| "-".to_owned(), |s| ms(s * 1000));
        let (done, total) = (bytes(pass.done_bytes), bytes(pass.total_bytes));
        let drawn = human::bar(pass.done_bytes, pass.total_bytes, BAR_WIDTH);
        out.pair("progress", &format!("{drawn} {percent} %  {done} of {total}  {}/s  {left} left", bytes(pass.rate_bytes_per_s)));
    }
    let committed = match (group.committed, group.committed_age_ms) {
        (Some(point), Some(age)) => format!("{point}, {} ago", ms(age)),
        (Some(point), None) => point.to_string(),
        _ => "nothing yet".to_owned(),
    };
    if let Some(why) = &group.writes_refused {
        let what = match why.as_str() {
            "fenced" => {
                format!("may not write: the other site is the server; `twinsite failback {}` takes the disks back", group.group)
            }
            "drained" => "may not write: the other site takes over".to_owned(),
            _ => format!(
                "may not write: the disks are being given back; if nothing runs, repeat `twinsite failback {}`",
                group.group
            ),
        };
        out.pair("guests", &paint.bad(&what));
    }
    if let Some(handback) = &group.handback {
        let drawn = human::bar(handback.done_bytes, handback.total_bytes, BAR_WIDTH);
        let (done, total) = (bytes(handback.done_bytes), bytes(handback.total_bytes));
        out.pair("handback", &format!("{drawn} {done} of {total}, {}", handback.step));
    }
    out.pair("generation", &group.generation.to_string());
    out.pair("committed", &committed);
    let lag = format!("{} now", ms(group.lag_ms));
    out.pair(
        "lag",
        &match group.lag.samples {
            0 => lag,
            _ => format!("{lag}; p50 {}, p99 {}, largest {}", ms(group.lag.p50_ms), ms(group.lag.p99_ms), ms(group.lag.max_ms)),
        },
    );
    out.pair("dirty", &bytes(group.dirty_bytes));
    if group.suspect_bytes > 0 || group.compared_bytes > 0 {
        let (left, done, differing) = (bytes(group.suspect_bytes), bytes(group.compared_bytes), bytes(group.differing_bytes));
        out.pair("suspect", &format!("{left} to compare; {done} compared, {differing} of it differed"));
    }
    out.pair("scrub", &scrub(&group.scrub, paint));
    let (captured, zero, sent) = (bytes(group.captured_bytes), bytes(group.zero_bytes), bytes(group.sent_bytes));
    out.pair("captured", &format!("{captured} (and {zero} of zeroes)"));
    out.pair("sent", &format!("{sent}, saved {:.1} %", group.saved_percent));
    let round_trip = group.round_trip_ms.map_or_else(String::new, |t| format!(", round trip {t:.1} ms"));
    let (done, merged, interval) = (group.epochs_committed, group.epochs_merged, ms(group.interval_ms));
    out.pair(
        "epochs",
        &format!("{done} committed, {} in flight, {merged} merged, one every {interval}{round_trip}", group.epochs_in_flight),
    );
    if group.durability == Durability::FlushSync {
        out.pair("flush-sync", &flushes(group, paint));
    }
    if group.rate_limited {
        out.pair("limit", &group.rate_limit_bits_per_s.map_or_else(|| "none at this time".to_owned(), bit_rate));
    }
    if let Some(max_lag) = group.max_lag_ms {
        out.pair("max lag", &format!("{}; {}", ms(max_lag), slowed(group, paint)));
    }
    for volume in &group.volumes {
        match onward {
            Some(onward) => {
                let (name, size) = (volume.name.as_str(), bytes(volume.size_bytes));
                out.pair("disk", &format!("{name}  {size}  copy of {}{}", onward.copy, shown(onward, paint)));
            }
            None => disk(out, volume.name.as_str(), volume.size_bytes, group.group.as_str(), exports),
        }
    }
    if let Some(error) = onward.and_then(|onward| onward.error.as_ref()) {
        out.pair("copy", &paint.bad(&human::sanitised(error)));
    }
    queues(out, &group.queues);
    client_queues(out, group.group.as_str(), exports);
}

fn shown(onward: &OnwardStatus, paint: Paint) -> String {
    match (onward.state, onward.point) {
        (OnwardState::Following, Some(point)) => format!(", at its point {point}"),
        (OnwardState::Active, _) => ", which is active".to_owned(),
        (OnwardState::Bypassed, _) => paint.bad(", which guests write past this group"),
        (OnwardState::Following | OnwardState::Waiting, _) => String::new(),
    }
}

fn scrub(scrub: &ScrubStatus, paint: Paint) -> String {
    let percent = (u128::from(scrub.done_bytes) * 100).checked_div(u128::from(scrub.total_bytes)).unwrap_or(0);
    let pass = match (scrub.verifying, scrub.interval_s) {
        (true, _) => "a verify runs".to_owned(),
        (false, Some(interval)) => format!("{percent} % of a pass of {}", ms(interval * 1000)),
        (false, None) => "off".to_owned(),
    };
    let last = scrub.last_pass_age_ms.map_or_else(String::new, |age| format!(", the last whole one ended {} ago", ms(age)));
    let compared = format!("{} compared", bytes(scrub.compared_bytes));
    let differing = match (scrub.differing_bytes, scrub.last_difference_age_ms) {
        (0, _) | (_, None) => "none of it differed".to_owned(),
        (differing, Some(age)) => {
            paint.bad(&format!("{} differed and were sent again, the last {} ago", bytes(differing), ms(age)))
        }
    };
    let unreadable = match scrub.unreadable_bytes {
        0 => String::new(),
        unreadable => paint.bad(&format!(", {} cannot be read here", bytes(unreadable))),
    };
    format!("{pass}{last}; {compared}, {differing}{unreadable}")
}

/// A flush that waits for longer than this is worth a colour.
const FLUSH_WAIT_LONG_MS: u64 = 2000;

fn flushes(group: &GroupStatus, paint: Paint) -> String {
    let done = format!("{} flushes committed", group.flushes_committed);
    match (group.flushes_waiting, group.flush_wait_ms) {
        (1.., Some(since)) => {
            let waiting = format!("{} waiting, the oldest for {}", group.flushes_waiting, ms(since));
            let waiting = if since < FLUSH_WAIT_LONG_MS { waiting } else { paint.bad(&waiting) };
            format!("{done}, {waiting}")
        }
        _ => done,
    }
}

fn slowed(group: &GroupStatus, paint: Paint) -> String {
    match group.write_rate_bytes_per_s {
        None => "writes are not slowed".to_owned(),
        Some(rate) => {
            let pause = group.write_pause_ms;
            paint.warn(&format!("writes are slowed to {}/s, one that comes now waits {pause:.1} ms", bytes(rate)))
        }
    }
}

fn copy(out: &mut Lines, group: &CopyStatus, exports: &[ExportStatus], paint: Paint) {
    let name = format!("{}/{}", group.client, group.group);
    out.plain(&format!("group {}, copy", paint.bold(&name)));
    let state = match group.state {
        CopyState::Following => paint.good(&format!("following {}", group.peer.as_deref().unwrap_or("its primary"))),
        CopyState::Waiting => paint.warn("waiting: its primary is not connected"),
        CopyState::Active => match &group.active {
            Some(active) => paint.good(&format!("active from point {}", active.point)),
            None => paint.good("active"),
        },
        CopyState::Failed => paint.bad("failed"),
    };
    out.pair("state", &state);
    if let Some(error) = &group.error {
        out.pair("error", &paint.bad(&human::sanitised(error)));
    }
    if let Some(flatten) = group.active.as_ref().and_then(|active| active.flatten.as_ref()) {
        out.pair("flatten", &flattened(flatten, paint));
    }
    out.pair("generation", &group.generation.to_string());
    let committed = match (group.committed, group.committed_age_ms) {
        (Some(point), Some(age)) => format!("{point}, cut {} ago", ms(age)),
        (Some(point), None) => point.to_string(),
        _ => "nothing yet".to_owned(),
    };
    out.pair("committed", &committed);
    out.pair("points", &group.points.to_string());
    let limit = |of: &str, max: Option<u64>| max.map_or_else(String::new, |max| format!(", limit{of} {}", bytes(max)));
    let whole = if group.group_space_max_bytes.is_some() { " of all groups" } else { "" };
    let limits = limit("", group.group_space_max_bytes) + &limit(whole, group.space_max_bytes);
    out.pair("stored", &format!("{}{limits}", bytes(group.stored_bytes)));
    out.pair("received", &format!("{} since the node started", bytes(group.received_bytes)));
    retention(out, group, paint);
    let differing = match group.differing_bytes {
        0 => "none of it differed".to_owned(),
        differing => paint.bad(&format!("{} of it differed and were sent again", bytes(differing))),
    };
    out.pair("scrub", &format!("{} compared, {differing}", bytes(group.scrubbed_bytes)));
    if let Some(damage) = &group.last_damage {
        let count = |n: u64, of: &str| human::count(usize::try_from(n).unwrap_or(usize::MAX), of);
        let counts = [(group.damaged_frames, "frame"), (group.damaged_base_blocks, "base block")];
        let counts: Vec<_> = counts.iter().filter(|(n, _)| *n > 0).map(|(n, of)| count(*n, of)).collect();
        out.pair("damage", &paint.bad(&format!("{}, the last: {}", counts.join(" and "), human::sanitised(damage))));
    }
    drills(out, group, paint);
    forks(out, group, paint);
    for volume in &group.volumes {
        disk(out, volume.name.as_str(), volume.size_bytes, &name, exports);
    }
    queues(out, &group.queues);
    client_queues(out, &name, exports);
}

/// What its primary had written of its own, and is kept.
fn forks(out: &mut Lines, group: &CopyStatus, paint: Paint) {
    for fork in &group.forks {
        let over = fork.point.map_or_else(String::new, |point| format!(" over point {point}"));
        out.pair("fork", &format!("{}  {} written by its primary of its own{over}, kept", fork.name, bytes(fork.own_bytes)));
        if let Some(error) = &fork.error {
            out.pair("fork", &paint.bad(&human::sanitised(error)));
        }
    }
}

/// What drills found, and those that run.
fn drills(out: &mut Lines, group: &CopyStatus, paint: Paint) {
    if let Some(result) = &group.verified {
        let age = ms(human::age_ms(result.cut_unix_us));
        out.pair("verified", &format!("point {}, cut {age} ago: {}", result.point, verdict(result, paint)));
    }
    if let Some(result) = group.last_drill.as_ref().filter(|result| !result.passed()) {
        out.pair("drill", &paint.bad(&format!("the last one, of point {}: {}", result.point, verdict(result, Paint::plain()))));
    }
    if let Some(error) = &group.drill_error {
        out.pair("drill", &paint.bad(&human::sanitised(error)));
    }
    for drill in &group.drills {
        let point = drill.point.map_or_else(|| "being made".to_owned(), |point| what(point, drill.fork.as_ref()));
        let age = ms(human::age_ms(drill.began_unix_us));
        let space = match (drill.read_only, drill.refused_writes) {
            (true, _) => "read only".to_owned(),
            (false, refused) => {
                let used = format!("{} of {}", bytes(drill.space_used_bytes), bytes(drill.space_max_bytes));
                let full = format!("{used}: {refused} writes had no space");
                if refused == 0 { used } else { paint.bad(&full) }
            }
        };
        let at = drill.script.as_ref().or(drill.export.as_ref()).map_or_else(String::new, |at| human::sanitised(at));
        out.pair("drill", &format!("{}  {point}, for {age}, {space}  {at}", drill.name));
    }
}

fn flattened(flatten: &FlattenStatus, paint: Paint) -> String {
    let (done, total) = (bytes(flatten.done_bytes), bytes(flatten.total_bytes));
    let percent = (u128::from(flatten.done_bytes) * 100).checked_div(u128::from(flatten.total_bytes)).unwrap_or(100);
    match flatten.state {
        FlattenState::Flat => paint.good("done: its data files are the whole disks"),
        FlattenState::Incomplete => {
            paint.bad(&format!("{} are damaged in the journal and were not copied", bytes(flatten.damaged_bytes)))
        }
        FlattenState::Waiting => match &flatten.error {
            Some(error) => paint.bad(&format!("{percent} %, waits: {}", human::sanitised(error))),
            None => paint.warn(&format!("{percent} %, waits for its turn")),
        },
        FlattenState::Copying => {
            let left = flatten.left_s.map_or_else(|| "-".to_owned(), |s| ms(s * 1000));
            let drawn = human::bar(flatten.done_bytes, flatten.total_bytes, BAR_WIDTH);
            format!("{drawn} {percent} %  {done} of {total}  {}/s  {left} left", bytes(flatten.rate_bytes_per_s))
        }
    }
}

fn retention(out: &mut Lines, group: &CopyStatus, paint: Paint) {
    let of = &group.retention;
    let base = of.base.map_or_else(|| "base empty".to_owned(), |point| format!("base at point {point}"));
    let now = match of.folding {
        Some(to) if of.folding_total_bytes > 0 => {
            format!(", folding up to {to}: {} of {}", bytes(of.folding_done_bytes), bytes(of.folding_total_bytes))
        }
        Some(to) => format!(", folding up to {to} waits"),
        None => String::new(),
    };
    let thinning = match of.thinning_total_bytes {
        0 => String::new(),
        total => format!(", thinning: {} of {}", bytes(of.thinning_done_bytes), bytes(total)),
    };
    let fork = |point| group.forks.iter().find(|fork| fork.point == Some(point));
    let held = of.held_by.map_or_else(String::new, |point| match fork(point) {
        Some(fork) => format!(", held back by the kept fork {} of point {point}", fork.name),
        None => format!(", held back by a reader of point {point}"),
    });
    let freed = bytes(of.freed_bytes + of.thinned_freed_bytes);
    out.pair("retention", &format!("{base}{now}{thinning}{held}; {freed} given back since the node started"));
    if of.thinned_points > 0 {
        let points = human::count(usize::try_from(of.thinned_points).unwrap_or(usize::MAX), "point");
        out.pair("thinned", &format!("{points} left out, {} given back by that", bytes(of.thinned_freed_bytes)));
    }
    let early = match (of.early_thins > 0, of.early_folds > 0) {
        (false, false) => None,
        (true, false) => Some("left out"),
        (false, true) => Some("given up"),
        (true, true) => Some("left out and given up"),
    };
    if let Some(what) = early {
        out.pair("space", &paint.warn(&format!("nearly used: points are {what} earlier than the ladder says")));
    }
    if let Some(error) = &of.last_error {
        out.pair("retention", &paint.bad(&human::sanitised(error)));
    }
    if of.sums_total_bytes > 0 {
        let (done, total) = (bytes(of.sums_done_bytes), bytes(of.sums_total_bytes));
        out.pair(
            "base",
            &paint.warn(&format!("its checksums are being made, {done} of {total}; until then it is read unchecked")),
        );
    }
    if let Some(error) = &of.sums_error {
        out.pair("base", &paint.bad(&human::sanitised(error)));
    }
}

fn disk(out: &mut Lines, name: &str, size_bytes: u64, group: &str, exports: &[ExportStatus]) {
    let at = exports.iter().find(|e| e.disks.iter().any(|d| d.name == name && d.group == group));
    let at = at.map_or_else(String::new, |export| {
        let clients = export.connections.iter().filter(|c| c.export == name).count();
        format!("  {}  {} of {} clients", export.uri(name), clients, export.connections_max)
    });
    out.pair("disk", &format!("{name}  {}{at}", bytes(size_bytes)));
}

fn queues(out: &mut Lines, queues: &[QueueStatus]) {
    for queue in queues {
        let (used, limit) = match queue.unit.as_str() {
            "bytes" => (bytes(queue.used), bytes(queue.limit)),
            unit => (queue.used.to_string(), format!("{} {unit}", queue.limit)),
        };
        out.pair("queue", &format!("{}  {used} of {limit}", human::padded(&queue.name, 20)));
    }
}

/// The fullest of each kind, of all clients of a group's disks.
fn client_queues(out: &mut Lines, group: &str, exports: &[ExportStatus]) {
    let mut fullest: Vec<QueueStatus> = Vec::new();
    for export in exports {
        let ours = |name: &str| export.disks.iter().any(|d| d.name == name && d.group == group);
        for queue in export.connections.iter().filter(|c| ours(&c.export)).flat_map(|c| &c.queues) {
            match fullest.iter_mut().find(|q| q.name == queue.name) {
                Some(known) => known.used = known.used.max(queue.used),
                None => fullest.push(queue.clone()),
            }
        }
    }
    queues(out, &fullest);
}
