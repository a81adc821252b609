//! Drills that the configuration asks for: when each is due, and doing it.
//!
//! Always holds: one drill of a `[[drill]]` at a time; each that was begun leaves a result, unless the node was stopped meanwhile. When the
//! last one was is read from the results, so a restart neither repeats nor forgets one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jiff::civil::Time;
use jiff::{Timestamp, ToSpan, Zoned};

use super::start::Asked;
use super::*;
use crate::api::{CopyState, DrillOutcome, DrillRequest, DrillStarted, nbd_uri};
use crate::config::{DrillConfig, DrillTime};
use crate::script::{self, End, Script, User};

/// Longest sleep: the clock on the wall may be set meanwhile.
const SLEEP_MAX: Duration = Duration::from_secs(30);
/// How soon it is tried again while there is no point, or the group is active.
const AGAIN: Duration = Duration::from_secs(5);

/// Runs all of them until `quit` turns true.
pub(crate) async fn run(node: Arc<Node>, drills: Vec<DrillConfig>, quit: watch::Receiver<bool>) {
    let each = drills.into_iter().map(|drill| one(Arc::clone(&node), drill, quit.clone()));
    futures_util::future::join_all(each).await;
}

async fn one(node: Arc<Node>, drill: DrillConfig, mut quit: watch::Receiver<bool>) {
    let began = Timestamp::now();
    // Of what it had no result to keep: tried again no sooner than a failed one would be.
    let mut tried = None;
    let mut told_missing = false;
    loop {
        let last = node.last_of(&drill).await.max(tried);
        let wait = match due(&drill.time, last, began, &Zoned::now()) {
            Some(wait) if !wait.is_zero() => wait.min(SLEEP_MAX),
            Some(_) if node.ready(&drill).await => {
                tried = Some(Timestamp::now());
                node.scheduled(&drill, &quit).await;
                Duration::ZERO
            }
            Some(_) => {
                if !std::mem::replace(&mut told_missing, true)
                    && let Err(error) = node.found(&drill).await
                {
                    tracing::warn!(script = %drill.run.display(), "scheduled drill: it waits for its group: {error}");
                }
                AGAIN
            }
            None => SLEEP_MAX,
        };
        tokio::select! {
            () = told(&mut quit) => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Returns when the node is to stop.
async fn told(quit: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone: the node stops as well.
    let _ = quit.wait_for(|quit| *quit).await;
}

/// How long until it is due; zero: now. `last` is when the last one began, `since` when the node did.
///
/// A time of day that passed while the node was not running is not made up for: the night is over then.
fn due(time: &DrillTime, last: Option<Timestamp>, since: Timestamp, now: &Zoned) -> Option<Duration> {
    let next = match (time, last) {
        (DrillTime::Every(_), None) => return Some(Duration::ZERO),
        (DrillTime::Every(every), Some(last)) => last.checked_add(*every).ok()?,
        (DrillTime::At(at), last) => {
            let from = last.map_or(since, |last| last.max(since)).to_zoned(now.time_zone().clone());
            next_at(*at, &from)?
        }
    };
    Some(Duration::try_from(next.duration_since(now.timestamp())).unwrap_or(Duration::ZERO))
}

/// The first time of day `at` after `from`; in a night that does not have it, the first moment after it.
fn next_at(at: Time, from: &Zoned) -> Option<Timestamp> {
    let on = |day: jiff::civil::Date| Some(day.to_datetime(at).to_zoned(from.time_zone().clone()).ok()?.timestamp());
    let today = on(from.date())?;
    if today > from.timestamp() { Some(today) } else { on(from.date().checked_add(1.day()).ok()?) }
}

impl Node {
    /// When the last drill of this script began.
    async fn last_of(&self, drill: &DrillConfig) -> Option<Timestamp> {
        let results = self.drill_results(&drill.group).await.ok()?.results;
        let script = drill.run.display().to_string();
        let last = results.iter().rev().find(|r| r.scheduled && r.script == script)?;
        Timestamp::from_microsecond(i64::try_from(last.began_unix_us).ok()?).ok()
    }

    async fn found(&self, drill: &DrillConfig) -> Result<GroupRef, RequestError> {
        self.receiving()?.find(&drill.group).await
    }

    /// Whether there is a copy to try, and it is not the server itself.
    async fn ready(&self, drill: &DrillConfig) -> bool {
        let (Ok(copies), Ok(group)) = (self.receiving(), self.found(drill).await) else { return false };
        let groups = copies.status(&self.exports.offered().await, &[]).await;
        let found = groups.into_iter().find(|g| g.client == group.client && g.group == group.group);
        found.is_some_and(|g| g.committed.is_some() && matches!(g.state, CopyState::Following | CopyState::Waiting))
    }

    /// One drill, from its fork to its result.
    async fn scheduled(self: &Arc<Self>, drill: &DrillConfig, quit: &watch::Receiver<bool>) {
        if let Err(error) = self.scheduled_to_its_end(drill, quit).await {
            tracing::error!(group = drill.group, script = %drill.run.display(), "scheduled drill: {error}");
        }
    }

    async fn scheduled_to_its_end(
        self: &Arc<Self>,
        drill: &DrillConfig,
        quit: &watch::Receiver<bool>,
    ) -> Result<(), RequestError> {
        let script = drill.run.display().to_string();
        let began_unix_us = unix_us_now();
        let begun = self.begin_scheduled(drill, &script).await;
        let (started, user) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                // No fork, so no report: but that it could not be tried is a result of the point that would have been.
                self.keep_unstarted(drill, script, began_unix_us, &error).await?;
                return Err(error);
            }
        };
        let run = Script {
            path: drill.run.clone(),
            env: environment(&started, drill.timeout),
            timeout: drill.timeout,
            user,
            folder: Some(PathBuf::from("/")),
        };
        let cancelled = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&cancelled);
        let running = tokio::task::spawn_blocking(move || script::run(&run, &flag, |_| {}));
        tokio::pin!(running);
        let mut quit = quit.clone();
        let ended = tokio::select! {
            ended = &mut running => ended,
            () = told(&mut quit) => {
                cancelled.store(true, Ordering::Relaxed);
                running.await
            }
        };
        let report = ended.ok().and_then(|ended| report(&ended));
        self.end_drill(DrillEnd { name: started.name, serial: Some(started.serial), report }).await.map(drop)
    }

    async fn begin_scheduled(
        self: &Arc<Self>,
        drill: &DrillConfig,
        script: &str,
    ) -> Result<(DrillStarted, Option<User>), RequestError> {
        let user =
            drill.user.as_deref().map(|name| User::named(name).ok_or_else(|| DrillRefused::NoUser { user: name.to_owned() }));
        let user = user.transpose()?;
        let request = DrillRequest {
            group: drill.group.clone(),
            point: None,
            fork: None,
            name: None,
            export: None,
            space_max_bytes: drill.space_max_bytes,
            script: Some(script.to_owned()),
            ignore_hooks: false,
            read_only: false,
        };
        Ok((self.start_drill_as(&request, Asked { scheduled: true, user }).await?, user))
    }

    async fn keep_unstarted(
        &self,
        drill: &DrillConfig,
        script: String,
        began_unix_us: u64,
        error: &RequestError,
    ) -> Result<(), RequestError> {
        let copies = self.receiving()?;
        let group = copies.find(&drill.group).await?;
        let Some(newest) = copies.points(&group).await?.points.pop() else { return Ok(()) };
        let result = DrillResult {
            point: newest.point,
            cut_unix_us: newest.cut_unix_us,
            began_unix_us,
            took_ms: 0,
            outcome: DrillOutcome::NotRun,
            scheduled: true,
            script,
            remark: match error {
                RequestError::Hook(error) => error.to_string(),
                error => error.to_string(),
            },
            output: String::new(),
        };
        self.keep(&group.to_string(), result).await
    }
}

/// What a script's end says about the point; nothing if somebody ended it.
pub(crate) fn report(ended: &script::Ended) -> Option<DrillReport> {
    let outcome = match ended.end {
        End::Exited(0) => DrillOutcome::Passed,
        End::Exited(code) => DrillOutcome::Failed { code },
        End::Killed(signal) => DrillOutcome::Killed { signal },
        End::TimedOut => DrillOutcome::TimedOut,
        End::NotRun => DrillOutcome::NotRun,
        End::Cancelled => return None,
    };
    let took_ms = u64::try_from(ended.took.as_millis()).unwrap_or(u64::MAX);
    Some(DrillReport { outcome, took_ms, remark: ended.remark.clone(), output: ended.output.clone() })
}

/// What a drill's script is told; `docs/operations.md` lists it.
pub(crate) fn environment(drill: &DrillStarted, timeout: Duration) -> Vec<(String, std::ffi::OsString)> {
    let uris: Vec<String> = drill.volumes.iter().map(|v| nbd_uri(&drill.export, v.name.as_str())).collect();
    let names: Vec<&str> = drill.volumes.iter().map(|v| v.name.as_str()).collect();
    let mut all = vec![
        ("TWINSITE_DRILL", drill.name.clone()),
        ("TWINSITE_CLIENT", drill.client.to_string()),
        ("TWINSITE_GROUP", drill.group.to_string()),
        ("TWINSITE_POINT", drill.point.to_string()),
        ("TWINSITE_FORK", drill.fork.as_ref().map_or_else(String::new, ToString::to_string)),
        ("TWINSITE_CUT", (drill.cut_unix_us / 1_000_000).to_string()),
        ("TWINSITE_TIMEOUT", timeout.as_secs().to_string()),
        ("TWINSITE_ADDRESS", drill.export.clone()),
        ("TWINSITE_DISKS", names.join(" ")),
        ("TWINSITE_EXPORTS", uris.join(" ")),
        ("TWINSITE_EXPORT", uris.first().cloned().unwrap_or_default()),
    ];
    if let Some(socket) = drill.export.strip_prefix("unix:") {
        all.push(("TWINSITE_SOCKET", socket.to_owned()));
    }
    let mut all: Vec<_> = all.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
    for (name, uri) in names.iter().zip(uris) {
        let name: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        all.push((format!("TWINSITE_EXPORT_{name}"), uri.into()));
    }
    all
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;

    use super::*;

    fn zoned(text: &str) -> Zoned {
        text.parse().unwrap()
    }

    fn at(hour: i8, minute: i8) -> DrillTime {
        DrillTime::At(Time::constant(hour, minute, 0, 0))
    }

    /// Would catch a drill that a restart repeats, or that waits for another whole interval after one.
    #[test]
    fn an_interval_counts_from_the_last_result() {
        let every = DrillTime::Every(Duration::from_secs(3600));
        let now = zoned("2026-03-10T12:00:00+01:00[Europe/Berlin]");
        let wait = |last: Option<&str>| due(&every, last.map(|t| zoned(t).timestamp()), now.timestamp(), &now).unwrap();
        assert_eq!(wait(None), Duration::ZERO);
        assert_eq!(wait(Some("2026-03-10T11:20:00+01:00[Europe/Berlin]")), Duration::from_secs(20 * 60));
        assert_eq!(wait(Some("2026-03-09T11:20:00+01:00[Europe/Berlin]")), Duration::ZERO);
    }

    /// Would catch a time of day that is met twice, not at all, or an hour off when the clock is set; and one that is made up for at noon.
    #[test]
    fn a_time_of_day_is_met_once_a_day() {
        let started = zoned("2026-03-28T12:00:00+01:00[Europe/Berlin]");
        let hours = |last: Option<&Zoned>, now: &Zoned, time: &DrillTime| {
            due(time, last.map(Zoned::timestamp), started.timestamp(), now).unwrap().as_secs_f64() / 3600.0
        };
        assert_eq!(hours(None, &started, &at(3, 0)), 14.0, "the night in which the clock is put forward is an hour shorter");
        assert_eq!(hours(None, &started, &at(2, 30)), 14.5, "02:30 is not on the clock; the moment after it is");
        assert_eq!(hours(None, &started, &at(13, 0)), 1.0);
        let night = zoned("2026-03-29T03:00:01+02:00[Europe/Berlin]");
        assert_eq!(hours(None, &night, &at(3, 0)), 0.0);
        let rest = hours(Some(&night), &night, &at(3, 0));
        assert!((rest - (24.0 - 1.0 / 3600.0)).abs() < 1e-6, "{rest}");
        let utc = Zoned::now().with_time_zone(TimeZone::UTC);
        assert!(next_at(Time::midnight(), &utc).unwrap() > utc.timestamp());
    }

    #[test]
    fn a_user_is_found_by_name() {
        assert_eq!(User::named("root"), Some(User { uid: 0, gid: 0 }));
        assert_eq!(User::named("nobody-of-that-name"), None);
    }

    /// Would catch a disk whose name makes no variable of a shell.
    #[test]
    fn a_script_is_told_every_disk() {
        let volume = |name: &str| crate::api::CopyVolume { name: name.parse().unwrap(), size_bytes: 1 };
        let drill = DrillStarted {
            name: "drill-1".to_owned(),
            serial: 1,
            client: "alpha".parse().unwrap(),
            group: "db".parse().unwrap(),
            point: "1.7".parse().unwrap(),
            fork: None,
            cut_unix_us: 1_700_000_000_999_999,
            export: "unix:/run/d.sock".to_owned(),
            volumes: vec![volume("root"), volume("data-1.x")],
            space_max_bytes: 0,
            took_ms: 0,
        };
        let env = environment(&drill, Duration::from_secs(60));
        let of = |name: &str| env.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name}")).1.to_str().unwrap();
        assert_eq!(of("TWINSITE_DISKS"), "root data-1.x");
        assert_eq!(of("TWINSITE_EXPORT"), "nbd+unix:///root?socket=/run/d.sock");
        assert_eq!(of("TWINSITE_EXPORT_data_1_x"), "nbd+unix:///data-1.x?socket=/run/d.sock");
        assert_eq!(of("TWINSITE_EXPORTS"), "nbd+unix:///root?socket=/run/d.sock nbd+unix:///data-1.x?socket=/run/d.sock");
        assert_eq!((of("TWINSITE_POINT"), of("TWINSITE_CUT"), of("TWINSITE_SOCKET")), ("1.7", "1700000000", "/run/d.sock"));
        let text = include_str!("../../../docs/operations.md");
        for (name, _) in env.iter().filter(|(name, _)| !name.starts_with("TWINSITE_EXPORT_")) {
            assert!(text.contains(&format!("`{name}`")), "{name} is not in docs/operations.md");
        }
    }
}
