//! The guest's writes at a fixed rate while the link is healthy, cut, restored and throttled: none of it may be felt by the guest.
//!
//! One load a round, without a pause; the link changes under it, and each request counts where it was answered.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use relay::{Counts, Direction, HEADER_BYTES, Path, Relay};
use serde::Serialize;
use serde_json::json;

use crate::chart::{Bar, Chart, Panel};
use crate::child::Daemon;
use crate::context::Bench;
use crate::fio::{self, Load, Request, Span};
use crate::node::{self, GroupStatus, Primary};
use crate::report::{Check, Report, Table, whole};
use crate::stats::{median, percentile, range, ratio};
use crate::{disk, tools};

const RATE: u32 = 2000;
const LOAD: Load = Load {
    title: "4 KiB random write, 2,000 a second",
    rw: "randwrite",
    bs: "4k",
    // More than it takes: a request that is held up does not hold up the next.
    iodepth: 8,
    bandwidth: false,
    more: &["--rate_iops=2000"],
};
const INTERVAL: &str = "1s";
const THROTTLED_BITS_PER_S: u64 = 1_000_000;
/// A queue that empties at the end of a phase may pass a little more than the rate.
const RATE_TOLERATED: f64 = 1.1;
const BOUND: f64 = 1.2;
/// Less of the rate than this and the load was not the one promised.
const RATE_REACHED_PERCENT: f64 = 95.0;
const SETTLE_MAX: Duration = Duration::from_secs(300);
/// How often status is asked.
const LOOK: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Not counted: it is as healthy as the next.
    WarmUp,
    Healthy,
    Cut,
    Restored,
    Throttled,
}

const PHASES: [Phase; 5] = [Phase::WarmUp, Phase::Healthy, Phase::Cut, Phase::Restored, Phase::Throttled];

impl Phase {
    fn title(self) -> &'static str {
        match self {
            Self::WarmUp => "warm-up",
            Self::Healthy => "healthy",
            Self::Cut => "cut",
            Self::Restored => "restored",
            Self::Throttled => "throttled to 1 Mbit/s",
        }
    }

    fn begin(self, relay: &Relay) {
        match self {
            Self::WarmUp | Self::Healthy => {}
            Self::Cut => relay.cut(),
            Self::Restored => relay.restore(),
            Self::Throttled => relay.set_both(Path { rate_bits_per_s: Some(THROTTLED_BITS_PER_S), ..Path::default() }),
        }
    }

    fn seconds(self, seconds: u32) -> u32 {
        if self == Self::WarmUp { fio::WARM_UP_S } else { seconds }
    }
}

/// The moment at which a phase begins.
struct Mark {
    at: Instant,
    at_ms: u64,
    status: GroupStatus,
    to_receiver: Counts,
    to_primary: Counts,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Sample {
    phase: &'static str,
    iops: f64,
    p99_us: f64,
    largest_us: f64,
    /// At the end.
    lag_ms: u64,
    epochs: u64,
    /// From the beginning of the phase to its first commit.
    first_commit_s: Option<f64>,
    /// To the receiver, with headers.
    link_mbit_per_s: f64,
}

pub(crate) fn run(bench: &Bench) -> Result<Report> {
    let needed = vec![tools::FIO];
    tools::require(&needed)?;
    let (rounds, seconds) = (bench.rounds(2, 5), bench.seconds(4, 12));
    let size = bench.bytes(512 << 20, 1 << 30);
    let file = bench.path("disk.raw");
    disk::filled(&file, size)?;
    let (receiver, mut primary) = node::pair_of_one(bench, "l", &file, INTERVAL)?;
    let server = primary.peer().parse().context("the receiver's address is none")?;
    let relay = Relay::start(server, 1).context("a UDP path cannot be made on loopback")?;
    primary.reach(relay.address().to_string(), INTERVAL)?;
    let receiving = receiver.start(bench)?;
    let mut daemon = primary.start(bench)?;
    primary.settle(&mut daemon, SETTLE_MAX)?;
    let (mut samples, mut catch_up_s) = (Vec::new(), Vec::new());
    for round in 0..rounds as usize {
        eprintln!("link: round {} of {rounds}", round + 1);
        bench.sync()?;
        samples.extend(once(bench, &primary, &relay, seconds, round + 1)?);
        relay.set_both(Path::default());
        let healed = Instant::now();
        primary.settle(&mut daemon, SETTLE_MAX)?;
        catch_up_s.push(healed.elapsed().as_secs_f64());
    }
    end(daemon, receiving)?;
    let parameters = json!({
        "rounds": rounds, "seconds_a_phase": seconds, "warm_up_seconds": fio::WARM_UP_S, "disk_bytes": size, "interval": INTERVAL,
        "rate_iops": RATE, "depth": LOAD.iodepth, "throttled_bits_per_s": THROTTLED_BITS_PER_S,
    });
    Ok(report(&samples, &catch_up_s, rounds, parameters, needed))
}

fn end(primary: Daemon, receiver: Daemon) -> Result<()> {
    primary.stop()?;
    receiver.stop()
}

/// One load through all phases.
fn once(bench: &Bench, primary: &Primary, relay: &Relay, seconds: u32, seed: usize) -> Result<Vec<Sample>> {
    let mut marks: Vec<Mark> = Vec::new();
    let mut commits: Vec<(Instant, u64)> = Vec::new();
    let (mut next, mut looked) = (Instant::now(), Instant::now());
    let total = PHASES.iter().map(|p| p.seconds(seconds)).sum();
    let span = Span { seconds: total, seed };
    let (_, requests) = fio::run_logged(bench, &primary.socket(), &LOAD, span, &mut || {
        let looks = looked.elapsed() >= LOOK;
        if !looks && (marks.is_empty() || Instant::now() < next) {
            return Ok(());
        }
        looked = Instant::now();
        let status = primary.status()?;
        commits.push((Instant::now(), status.epochs_committed));
        let begun = !marks.is_empty() || status.dirty_bytes > 0;
        if begun
            && (marks.is_empty() || Instant::now() >= next)
            && let Some(phase) = PHASES.get(marks.len())
        {
            // What passes between the two would be counted as having passed the cut.
            if *phase == Phase::Cut {
                phase.begin(relay);
                marks.push(mark(relay, status)?);
            } else {
                marks.push(mark(relay, status)?);
                phase.begin(relay);
            }
            next = Instant::now() + Duration::from_secs(phase.seconds(seconds).into());
        }
        Ok(())
    })?;
    ensure!(marks.len() == PHASES.len(), "the load ended before the link was throttled");
    marks.push(mark(relay, primary.status()?)?);
    PHASES.iter().zip(marks.windows(2)).skip(1).map(|(phase, ends)| sample(*phase, ends, &requests, &commits)).collect()
}

fn mark(relay: &Relay, status: GroupStatus) -> Result<Mark> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    Ok(Mark {
        at: Instant::now(),
        at_ms: u64::try_from(since.as_millis())?,
        status,
        to_receiver: relay.counts(Direction::ToServer),
        to_primary: relay.counts(Direction::ToClient),
    })
}

/// What happened between two marks. That the link was what its name says is looked at, not believed.
fn sample(phase: Phase, ends: &[Mark], requests: &[Request], commits: &[(Instant, u64)]) -> Result<Sample> {
    let [from, to] = ends else { anyhow::bail!("a phase has a beginning and an end") };
    let answered = requests.iter().filter(|r| (from.at_ms..to.at_ms).contains(&r.at_ms));
    let latencies: Vec<f64> = answered.map(|r| r.latency_ns as f64 / 1e3).collect();
    let seconds = to.at.duration_since(from.at).as_secs_f64();
    let before = from.status.epochs_committed;
    let first_commit = commits.iter().find(|(at, epochs)| *at > from.at && *at <= to.at && *epochs > before);
    let delivered = to.to_receiver.delivered - from.to_receiver.delivered;
    let bytes = to.to_receiver.delivered_bytes - from.to_receiver.delivered_bytes + delivered * HEADER_BYTES;
    let back = to.to_primary.delivered - from.to_primary.delivered;
    let bits_per_s = ratio(bytes as f64 * 8.0, seconds);
    match phase {
        Phase::Cut => ensure!(delivered + back == 0, "{} datagrams passed the cut", delivered + back),
        Phase::Throttled => ensure!(
            delivered > 0 && bits_per_s <= RATE_TOLERATED * THROTTLED_BITS_PER_S as f64,
            "{delivered} datagrams, {bits_per_s:.0} bit/s passed the link that was throttled to {THROTTLED_BITS_PER_S}"
        ),
        Phase::WarmUp | Phase::Healthy | Phase::Restored => {
            ensure!(delivered > 0, "nothing passed the link while {}", phase.title())
        }
    }
    Ok(Sample {
        phase: phase.title(),
        iops: ratio(latencies.len() as f64, seconds),
        p99_us: if latencies.is_empty() { f64::NAN } else { percentile(&latencies, 99.0) },
        largest_us: percentile(&latencies, 100.0),
        lag_ms: to.status.lag_ms,
        epochs: to.status.epochs_committed - before,
        first_commit_s: first_commit.map(|(at, _)| at.duration_since(from.at).as_secs_f64()),
        link_mbit_per_s: bits_per_s / 1e6,
    })
}

fn report(samples: &[Sample], catch_up_s: &[f64], rounds: u32, parameters: serde_json::Value, tools: Vec<tools::Tool>) -> Report {
    let head = [
        "link",
        "p99 µs",
        "of healthy",
        "lowest..highest",
        "largest µs",
        "IOPS",
        "lag at the end ms",
        "epochs",
        "first commit after s",
        "link Mbit/s",
    ];
    let mut table = Table::new(LOAD.title, &head);
    let (mut checks, mut bars) = (Vec::new(), Vec::new());
    let all = |phase: Phase, pick: fn(&Sample) -> f64| {
        samples.iter().filter(|s| s.phase == phase.title()).map(pick).collect::<Vec<_>>()
    };
    let healthy = median(&all(Phase::Healthy, |s| s.p99_us));
    for phase in PHASES.into_iter().skip(1) {
        let of = |pick: fn(&Sample) -> f64| median(&all(phase, pick));
        let p99 = of(|s| s.p99_us);
        let (low, high) = range(&all(phase, |s| s.p99_us));
        let first: Vec<f64> = samples.iter().filter(|s| s.phase == phase.title()).filter_map(|s| s.first_commit_s).collect();
        table.row(vec![
            phase.title().to_owned(),
            whole(p99),
            format!("{:.2}", ratio(p99, healthy)),
            format!("{}..{}", whole(low), whole(high)),
            whole(range(&all(phase, |s| s.largest_us)).1),
            whole(of(|s| s.iops)),
            whole(of(|s| s.lag_ms as f64)),
            whole(of(|s| s.epochs as f64)),
            if first.is_empty() { "-".to_owned() } else { format!("{:.1}", median(&first)) },
            format!("{:.1}", of(|s| s.link_mbit_per_s)),
        ]);
        let name = format!("link {}", phase.title());
        if phase != Phase::Healthy {
            checks.push(Check::at_most(format!("{name}: p99 of the guest's writes / healthy"), p99 / healthy, BOUND, "times"));
        }
        let slowest = all(phase, |s| 100.0 * s.iops / f64::from(RATE)).into_iter().reduce(f64::min).unwrap_or(f64::NAN);
        checks.push(Check::at_least(format!("{name}: of the rate reached, slowest round"), slowest, RATE_REACHED_PERCENT, "%"));
        if phase == Phase::Healthy || phase == Phase::Restored {
            let least = all(phase, |s| s.epochs as f64).into_iter().reduce(f64::min).unwrap_or(f64::NAN);
            checks.push(Check::at_least(format!("{name}: epochs committed in every round"), least, 1.0, "epochs"));
        }
        bars.push(Bar { label: phase.title().to_owned(), value: p99, ours: true });
    }
    let mut catch_up = Table::new("after the throttled link was healed, without load", &["", "s", "lowest..highest"]);
    let (low, high) = range(catch_up_s);
    catch_up.row(vec![
        "until all was committed".to_owned(),
        format!("{:.1}", median(catch_up_s)),
        format!("{low:.1}..{high:.1}"),
    ]);
    Report {
        name: "link",
        title: format!("the guest's writes at {RATE} a second while the link fails"),
        parameters,
        results: json!({ "phases": samples, "catch_up_s": catch_up_s }),
        tables: vec![table, catch_up],
        checks,
        chart: Chart {
            title: "Writes at a fixed rate while the link fails".to_owned(),
            panels: vec![Panel {
                title: "99th percentile of the guest's write latency".to_owned(),
                axis: format!("µs (median of {rounds} rounds)"),
                bars,
                bound: Some(BOUND * healthy),
            }],
        },
        tools,
    }
}
