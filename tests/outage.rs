//! The path between the sites breaks under write load and comes back.
//!
//! Would catch: guests that feel an outage, a status that does not tell, a session that does not come back or only after a long wait,
//! a short outage that breaks a session, changes that are lost on the way.

#[path = "support/relayed.rs"]
mod relayed;
mod support;

use std::path::{Path as File, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use proto::transport::IDLE_TIMEOUT;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use relay::{Direction, Path};
use relayed::{ETHERNET_PAYLOAD_BYTES, Relayed, quantile};
use serde_json::Value;
use support::nbd::Nbd;
use support::node::COMMIT_WITHIN;
use support::stalls::Stalls;
use support::{eventually, noise, one_at_a_time, scratch, seed};

const MIB: u64 = 1 << 20;
const DISK: (&str, u64) = ("data", 16 * MIB);
const WRITE_BYTES: usize = 4096;
const WRITE_EVERY: Duration = Duration::from_millis(5);

/// A guest that writes a block every few milliseconds and notes how long each took.
struct Guest {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<(Instant, Duration)>>>,
}

impl Guest {
    fn start(socket: &File, seed: u64) -> Self {
        let (socket, stop): (PathBuf, _) = (socket.to_path_buf(), Arc::new(AtomicBool::new(false)));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut nbd = Nbd::connect(&socket, DISK.0).expect("the export");
            let mut took = Vec::new();
            while !stopped.load(Ordering::SeqCst) {
                let at = rng.random_range(0..DISK.1 / WRITE_BYTES as u64) * WRITE_BYTES as u64;
                let content = noise(rng.random(), WRITE_BYTES);
                let began = Instant::now();
                nbd.write(at, &content).expect("a write");
                took.push((began, began.elapsed()));
                std::thread::sleep(WRITE_EVERY);
            }
            took
        });
        Self { stop, thread: Some(thread) }
    }

    fn stop(&mut self) -> Vec<(Instant, Duration)> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().expect("stopped once").join().expect("no write fails")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

fn pass(what: &str, time: Duration) {
    let until = Instant::now() + time;
    eventually(what, time + Duration::from_secs(5), || (Instant::now() >= until).then_some(()));
}

fn path(rate_bits_per_s: u64) -> Path {
    Path {
        delay: Duration::from_millis(20),
        rate_bits_per_s: Some(rate_bits_per_s),
        payload_bytes_max: Some(ETHERNET_PAYLOAD_BYTES),
        ..Path::default()
    }
}

fn started(folder: &File, rate_bits_per_s: u64) -> Relayed {
    let mut site = Relayed::new(folder, "db", "1s", &[DISK], seed());
    site.relay.set_both(path(rate_bits_per_s));
    site.pair.primary.start();
    site.committed(COMMIT_WITHIN);
    site
}

/// The outage of the first test, longer than a session lives in silence.
const OUTAGE: Duration = Duration::from_secs(15);
/// From the end of an outage to a lag as before: a handshake whose last attempt went into the outage is repeated after 4 s at most, what
/// was written meanwhile is sent in 2 s, and is cut and committed within two intervals.
const BACK_WITHIN: Duration = Duration::from_secs(10);
/// From a cut to the end of both sides' sessions: a side that sent something into the silence waits anew from there, once, and a receiver sends a
/// keep-alive 2 s after what it heard last.
const APART_WITHIN: Duration = IDLE_TIMEOUT.saturating_add(Duration::from_secs(3));
/// A write that takes longer is looked at twice.
const LONG: Duration = Duration::from_millis(5);
const LAG_USUAL_MAX: Duration = Duration::from_secs(3);

#[test]
fn guests_do_not_notice_an_outage_and_the_copy_catches_up() {
    let _alone = one_at_a_time();
    let folder = scratch();
    let mut site = started(folder.path(), 50_000_000);
    let stalls = Stalls::start();
    let mut guest = Guest::start(&site.pair.sockets[0], 1);
    pass("the usual", Duration::from_secs(5));
    let before = site.pair.receiver.points("db");
    let session = site.copy()["peer"].clone();
    assert!(session.is_string(), "the receiver has a session");

    let cut = Instant::now();
    site.relay.cut();
    let told = stalls.eventually("both sides tell that they are apart", APART_WITHIN, || {
        let status = site.primary();
        let apart = status["state"] == "connecting" && site.copy()["peer"].is_null();
        apart.then(|| status["error"].as_str().unwrap_or_default().to_owned())
    });
    println!("after {:.1?} the primary says: {told}", cut.elapsed());
    assert!(told.lines().count() == 1 && told.contains("peer"), "one line that says who does not answer: {told:?}");
    pass("the outage's end", OUTAGE.saturating_sub(cut.elapsed()));
    let status = site.primary();
    assert!(status["state"] == "connecting" && status["dirty_bytes"].as_u64() > Some(0), "{status:#}");
    let lag = Duration::from_millis(status["lag_ms"].as_u64().expect("a number"));
    assert!(lag + LAG_USUAL_MAX > OUTAGE && lag > IDLE_TIMEOUT, "the lag tells the outage: {lag:?}");

    let restored = Instant::now();
    site.relay.restore();
    let connected = stalls.eventually("the session is back", BACK_WITHIN, || {
        (site.primary()["state"] == "streaming").then(|| stalls.ran_since(restored))
    });
    let back = stalls.eventually("the lag is as before", BACK_WITHIN, || {
        let lag = Duration::from_millis(site.primary()["lag_ms"].as_u64().expect("a number"));
        (lag < LAG_USUAL_MAX).then(|| stalls.ran_since(restored))
    });
    println!("lag {lag:.1?} at the end of the outage; streaming again after {connected:.2?}, usual lag after {back:.2?}");
    assert!(back <= BACK_WITHIN, "{back:?}");
    let status = site.primary();
    assert!(status["error"].is_null(), "the error goes with its cause: {status:#}");
    assert_ne!(site.copy()["peer"], session, "an outage of this length ends a session");
    pass("the usual", Duration::from_secs(3));

    let took = guest.stop();
    // The longest only: the others need no second look.
    let ran = |at: Instant, took: Duration| if took < LONG { took } else { took.saturating_sub(stalls.between(at, at + took)) };
    let during = |from: Instant, to: Instant| {
        let within = took.iter().filter(move |(at, _)| (from..to).contains(at));
        within.map(|(at, took)| ran(*at, *took)).collect::<Vec<_>>()
    };
    let [usual, apart] = [(took[0].0, cut), (cut, restored)].map(|(from, to)| {
        let quantiles = [0.5, 0.99, 1.0].map(|share| quantile(during(from, to), share));
        println!("{} writes, p50 p99 max: {quantiles:?}", during(from, to).len());
        quantiles
    });
    // The same, but for what else a busy machine does. Whoever waits for the network waits for seconds.
    assert!(apart[1] <= usual[1] * 4 + Duration::from_millis(20), "p99 was {:?}, is {:?}", usual[1], apart[1]);
    assert!(apart[2] < Duration::from_secs(1), "a write took {:?}", apart[2]);

    site.committed(COMMIT_WITHIN);
    let points = site.pair.receiver.points("db");
    assert!(before.iter().all(|point| points.contains(point)), "points of before are lost");
    site.copy_equals();
}

/// A path on which an epoch takes longer than it ever stands.
const SLOW_BITS_PER_S: u64 = 4_000_000;
const EPOCH_BYTES: usize = 4 << 20;
const EPOCH_TIME: Duration = Duration::from_millis(EPOCH_BYTES as u64 * 8 * 1000 / SLOW_BITS_PER_S);

/// Of a standing path. What is missing is the wait for the next attempt to send into the silence, or to connect.
const USED_PERCENT_MIN: f64 = 25.0;

/// What one time of a standing path brought.
#[derive(Debug)]
struct Window {
    /// Of what the path could carry, in percent.
    used: f64,
    /// Points that the receiver has.
    points: u64,
    /// Whose session it was.
    session: Value,
    /// Epochs given up so far.
    merged: u64,
}

/// Lets the path stand again and again, with outages between; it is cut before and after.
fn windows(site: &Relayed, count: u32, outage: Duration, standing: Duration) -> Vec<Window> {
    let delivered = || site.relay.counts(Direction::ToServer).delivered_bytes;
    let mut all = Vec::new();
    for n in 0..count {
        let before = delivered();
        site.relay.restore();
        pass("a time in which the path stands", standing);
        site.relay.cut();
        let bits = (delivered() - before) as f64 * 8.0;
        let window = Window {
            used: bits / (SLOW_BITS_PER_S as f64 * standing.as_secs_f64()) * 100.0,
            points: site.copy()["points"].as_u64().expect("a number"),
            session: site.copy()["peer"].clone(),
            merged: site.primary()["epochs_merged"].as_u64().expect("a number"),
        };
        println!("{n}: {window:?}");
        all.push(window);
        pass("an outage", outage);
    }
    all
}

/// Writes an epoch's worth while the path is cut.
fn fill(site: &Relayed) {
    let mut nbd = Nbd::connect(&site.pair.sockets[0], DISK.0).expect("the export");
    for (at, piece) in (0..).step_by(MIB as usize).zip(noise(2, EPOCH_BYTES).chunks(MIB as usize)) {
        nbd.write(at, piece).expect("a write");
    }
}

/// Outages that a session outlives: what was sent counts, although each time of a standing path is shorter than the epoch's transfer.
#[test]
fn short_outages_cost_their_time_only() {
    let _alone = one_at_a_time();
    let folder = scratch();
    let mut site = started(folder.path(), SLOW_BITS_PER_S);
    let session = site.copy()["peer"].clone();
    site.relay.cut();
    fill(&site);
    pass("an outage", Duration::from_secs(1));
    let all = windows(&site, 4, Duration::from_secs(5), Duration::from_secs(5));
    site.relay.restore();
    let restored = Instant::now();
    site.committed(EPOCH_TIME + BACK_WITHIN);
    println!("committed {:.1?} after the last outage; an epoch takes {EPOCH_TIME:.1?}", restored.elapsed());
    assert!(all.iter().all(|window| window.session == session && window.merged == 0), "one session: {all:?}");
    // Once the epoch is through there is nothing to send.
    let mut under_way = all.iter().take_while(|window| window.points == all[0].points);
    assert!(under_way.all(|window| window.used >= USED_PERCENT_MIN), "the path is used when it stands: {all:?}");
    // Three fifths of the epoch fit into one of the times; what was sent before an outage is not sent again.
    assert!(all[3].points > all[0].points, "the epoch is there after four: {all:?}");
    assert_eq!((site.primary()["epochs_merged"].as_u64(), &site.copy()["peer"]), (Some(0), &session));
    site.copy_equals();
}

/// Most that passes the line for an epoch, in percent of its bytes: everything else is overhead, and what was on its way when the line broke.
const SENT_PERCENT_MAX: u64 = 130;
/// A line that stands for so long, and is then gone for longer than a session lives in silence.
const STANDING: Duration = Duration::from_secs(5);
/// Of which so many are enough for the epoch, and one is not.
const WINDOWS_MAX: u32 = 6;

/// Would catch an epoch that begins anew with every connection, or with a restart of the receiver: on such a line it would never be
/// there, or be sent several times over.
#[test]
fn an_epoch_goes_on_over_connections_that_are_each_too_short_for_it() {
    let _alone = one_at_a_time();
    let folder = scratch();
    let mut site = started(folder.path(), SLOW_BITS_PER_S);
    let before = site.pair.receiver.points("db");
    site.relay.cut();
    // Only then: a primary with a session cuts, and could divide what is written.
    Stalls::start()
        .eventually("the session is given up", APART_WITHIN, || (site.primary()["state"] == "connecting").then_some(()));
    fill(&site);
    let delivered = site.relay.counts(Direction::ToServer).delivered_bytes;
    let mut all: Vec<Window> = Vec::new();
    while all.last().is_none_or(|window| window.points == before.len() as u64) && all.len() < WINDOWS_MAX as usize {
        if all.len() == 1 {
            site.pair.receiver.kill();
            site.pair.receiver.start();
        }
        all.extend(windows(&site, 1, IDLE_TIMEOUT + Duration::from_secs(1), STANDING));
    }
    assert!(all.len() > 1 && all[0].points == before.len() as u64, "one connection is too short for the epoch: {all:?}");
    assert!(all.last().is_some_and(|w| w.points > before.len() as u64), "no point after {WINDOWS_MAX} connections: {all:?}");
    assert!(all.windows(2).all(|w| w[0].session != w[1].session), "each outage ended a session: {all:?}");
    assert!(all.iter().all(|window| window.merged == 0), "no epoch was given up: {all:?}");
    let sent = site.relay.counts(Direction::ToServer).delivered_bytes - delivered;
    println!("{} connections, {sent} bytes for an epoch of {EPOCH_BYTES}", all.len());
    assert!(sent * 100 <= EPOCH_BYTES as u64 * SENT_PERCENT_MAX, "{sent} bytes were sent for an epoch of {EPOCH_BYTES}");
    site.relay.restore();
    site.committed(EPOCH_TIME + BACK_WITHIN * 2);
    let points = site.pair.receiver.points("db");
    assert!(before.iter().all(|point| points.contains(point)), "points of before are lost");
    site.copy_equals();
}
