//! What a group's driver, its taps and `status` share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hdrhistogram::Histogram;
use parking_lot::Mutex;
use proto::pass::PassHeader;
use proto::{Generation, Name, Point};
use quinn::Connection;

use crate::capture::CaptureCounters;
use crate::compare::CompareCounters;
use crate::core::{Core, Phase};
use crate::dirtylog::DirtyLog;
use crate::gate::{Closed, Gate};
use crate::ledger::Ledger;
use crate::outbox::Outbox;
use crate::pace::{Governor, LinkSeen, Pace, Seen};
use crate::scrub::Board;
use crate::spec::{PeerSpec, Tuning};
use crate::status::{GroupStatus, LagSummary, LinkState, PassProgress, QueueStatus, VolumeStatus};

/// How often the lag is sampled.
pub(crate) const LAG_SAMPLE: Duration = Duration::from_millis(10);
/// Largest lag that the histogram tells apart: a day.
const LAG_MS_MAX: u64 = 86_400_000;

/// What the driver last said of itself.
struct Published {
    state: LinkState,
    generation: Generation,
    committed: Option<Point>,
    committed_at: Option<Instant>,
    error: Option<String>,
    in_flight: u64,
    round_trip: Option<Duration>,
    /// UDP bytes of connections that are gone, and of the one that stands.
    wire_bytes_before: u64,
    wire_bytes_now: u64,
    connection: Option<Connection>,
    outbox: Option<Outbox>,
    pass: Option<PassHeader>,
    pass_since: Instant,
}

impl Published {
    /// Bytes on the wire since start.
    fn count_wire(&mut self) -> u64 {
        if let Some(connection) = &self.connection {
            self.wire_bytes_now = connection.stats().udp_tx.bytes;
        }
        self.wire_bytes_before + self.wire_bytes_now
    }
}

/// See the module.
pub(crate) struct Shared {
    pub(crate) group: Name,
    pub(crate) peer: PeerSpec,
    pub(crate) tuning: Tuning,
    pub(crate) ledger: std::sync::Arc<Ledger>,
    pub(crate) log: std::sync::Arc<DirtyLog>,
    pub(crate) compared: CompareCounters,
    pub(crate) scrub: Board,
    pub(crate) counters: CaptureCounters,
    pub(crate) sent_bytes: AtomicU64,
    pub(crate) epochs_merged: AtomicU64,
    pub(crate) gate: std::sync::Arc<Gate>,
    /// A handback or a rollback is under way.
    pub(crate) handing: AtomicBool,
    /// Epochs are cut as fast as they can be: somebody waits until all is committed.
    pub(crate) hurry: AtomicBool,
    /// What the disks hold is of this instant, microseconds since 1970; 0: of now.
    pub(crate) as_of_unix_us: AtomicU64,
    volumes: Vec<(Name, u64)>,
    pace: Option<(std::sync::Arc<Pace>, Mutex<Governor>)>,
    sampling: AtomicBool,
    lag_ms: Mutex<Histogram<u64>>,
    published: Mutex<Published>,
}

impl Shared {
    #[expect(clippy::too_many_arguments, reason = "one caller hands over what is shared from then on")]
    pub(crate) fn new(
        group: Name,
        peer: PeerSpec,
        tuning: Tuning,
        volumes: Vec<(Name, u64)>,
        ledger: std::sync::Arc<Ledger>,
        log: std::sync::Arc<DirtyLog>,
        generation: Generation,
        pace: Option<std::sync::Arc<Pace>>,
    ) -> Self {
        let scrub = Board::new(group.clone(), &volumes, tuning.scrub_interval, rand::random(), Instant::now());
        let governed = |pace| Some((pace, Mutex::new(Governor::new(tuning.max_lag?, Instant::now()))));
        let pace = pace.and_then(governed);
        let histogram = Histogram::new_with_bounds(1, LAG_MS_MAX, 3).expect("the bounds are constants that fit");
        Self {
            group,
            peer,
            tuning,
            ledger,
            log,
            compared: CompareCounters::on_all_processors(),
            scrub,
            counters: CaptureCounters::default(),
            sent_bytes: AtomicU64::new(0),
            epochs_merged: AtomicU64::new(0),
            gate: std::sync::Arc::default(),
            handing: AtomicBool::new(false),
            hurry: AtomicBool::new(false),
            as_of_unix_us: AtomicU64::new(0),
            volumes,
            pace,
            sampling: AtomicBool::new(false),
            lag_ms: Mutex::new(histogram),
            published: Mutex::new(Published {
                state: LinkState::Connecting,
                generation,
                committed: None,
                committed_at: None,
                error: None,
                in_flight: 0,
                round_trip: None,
                wire_bytes_before: 0,
                wire_bytes_now: 0,
                connection: None,
                outbox: None,
                pass: None,
                pass_since: Instant::now(),
            }),
        }
    }

    /// Takes over the driver's state for `status`.
    pub(crate) fn publish(&self, core: &Core, live: Option<&Connection>, outbox: &Outbox, pass: Option<PassHeader>) {
        let state = match core.phase() {
            Phase::Waiting { refused: true, .. } => LinkState::Refused,
            Phase::Fenced => LinkState::Fenced,
            Phase::Streaming(_) if core.syncing() => LinkState::FirstSync,
            Phase::Streaming(_) if core.comparing() => LinkState::Comparing,
            Phase::Streaming(_) => LinkState::Streaming,
            _ => LinkState::Connecting,
        };
        let mut p = self.published.lock();
        if p.state != state {
            tracing::info!(group = %self.group, peer = %self.peer.address, ?state, "link");
        }
        if state == LinkState::Streaming {
            p.error = None;
        }
        p.state = state;
        p.generation = core.generation();
        // After a restart of the session the point may not be known to belong to this run; the last one known still stands.
        p.committed = core.committed().or(p.committed);
        p.in_flight = core.in_flight() as u64;
        p.pass = pass;
        p.round_trip = live.map(Connection::rtt);
        p.outbox = Some(outbox.clone());
        let id = |c: &Connection| c.stable_id();
        if live.map(id) != p.connection.as_ref().map(id) {
            p.wire_bytes_before += std::mem::take(&mut p.wire_bytes_now);
            p.connection = live.cloned();
        }
        p.count_wire();
    }

    /// The instant of a cut that is made now, microseconds since 1970. What was acknowledged before it is on the disks.
    pub(crate) fn cut_unix_us(&self) -> u64 {
        let now = now_unix_us();
        match self.as_of_unix_us.load(Ordering::SeqCst) {
            0 => now,
            as_of => as_of.min(now),
        }
    }

    pub(crate) fn report(&self, error: &str) {
        let mut p = self.published.lock();
        if p.error.as_deref() != Some(error) {
            tracing::warn!(group = %self.group, peer = %self.peer.address, "{error}");
        }
        p.error = Some(error.to_owned());
    }

    /// A commit is told. What it covers is the ledger's affair, from which the status has it: nobody sees one without the other.
    pub(crate) fn committed_now(&self) {
        self.sampling.store(true, Ordering::Relaxed);
        self.published.lock().committed_at = Some(Instant::now());
    }

    pub(crate) fn pass_begins(&self) {
        self.published.lock().pass_since = Instant::now();
    }

    pub(crate) fn stopped(&self) {
        self.published.lock().state = LinkState::Stopped;
    }

    /// Takes one sample of the lag.
    pub(crate) fn sample_lag(&self) {
        if self.sampling.load(Ordering::Relaxed) {
            let lag = self.ledger.oldest_write().map_or(0, |since| since.elapsed().as_millis());
            self.lag_ms.lock().saturating_record(u64::try_from(lag).unwrap_or(LAG_MS_MAX));
        }
    }

    /// Sets the pace of the guest's writes, if the user wants one.
    pub(crate) fn steer(&self) {
        let Some((pace, governor)) = &self.pace else { return };
        let (now, summary) = (Instant::now(), self.ledger.summary());
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (link, wire_bytes) = {
            let mut p = self.published.lock();
            let link = match p.state {
                LinkState::Streaming => LinkSeen::Following,
                LinkState::Connecting | LinkState::Comparing | LinkState::Refused if p.committed.is_some() => LinkSeen::Stuck,
                _ => LinkSeen::NoCopy,
            };
            (link, p.count_wire())
        };
        let seen = Seen {
            lag: summary.oldest_write.map_or(Duration::ZERO, |since| now.saturating_duration_since(since)),
            uncommitted_bytes: summary.uncommitted_bytes,
            held_bytes: summary.held_bytes,
            committed_bytes: summary.committed_bytes,
            handed_bytes: load(&self.sent_bytes),
            wire_bytes,
            captured_bytes: load(&self.counters.data_bytes),
            frame_bytes: load(&self.counters.frame_bytes),
            link,
        };
        pace.set(governor.lock().allow(now, seen));
    }

    pub(crate) fn state(&self) -> LinkState {
        self.published.lock().state
    }

    pub(crate) fn status(&self) -> GroupStatus {
        let mut p = self.published.lock();
        // Behind the lock: what is published is never newer than the ledger.
        let summary = self.ledger.summary();
        let flushes = self.ledger.flushes();
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (data, sent) = (load(&self.counters.data_bytes), load(&self.counters.frame_bytes));
        let pace = self.pace.as_ref().map(|(pace, _)| pace.summary(Instant::now()));
        let (scrubs, scrubs_max) = self.scrub.unanswered();
        let wire_bytes = p.count_wire();
        let p = &*p;
        let lag = self.lag_ms.lock();
        GroupStatus {
            group: self.group.clone(),
            peer: self.peer.address.clone(),
            peer_key: self.peer.key,
            state: p.state,
            error: self.log.failure().or_else(|| p.error.clone()),
            generation: p.generation,
            committed: summary.committed.or(p.committed),
            committed_age_ms: p.committed_at.map(|t| millis(t.elapsed())),
            lag_ms: summary.oldest_write.map_or(0, |since| millis(since.elapsed())),
            lag: LagSummary {
                samples: lag.len(),
                p50_ms: lag.value_at_quantile(0.5),
                p99_ms: lag.value_at_quantile(0.99),
                max_ms: lag.max(),
            },
            dirty_bytes: summary.uncommitted_bytes,
            suspect_bytes: summary.suspect_bytes,
            compared_bytes: load(&self.compared.compared_bytes),
            differing_bytes: load(&self.compared.differing_bytes),
            captured_bytes: data,
            zero_bytes: load(&self.counters.zero_bytes),
            sent_bytes: load(&self.sent_bytes),
            wire_bytes,
            saved_percent: if data == 0 { 0.0 } else { 100.0 * (1.0 - sent as f64 / data as f64) },
            copied_before_write: summary.copied_before_write,
            epochs_committed: summary.committed_epochs,
            epochs_merged: load(&self.epochs_merged),
            epochs_in_flight: p.in_flight,
            interval_ms: millis(self.tuning.interval),
            durability: self.tuning.durability,
            handback: None,
            writes_refused: self.gate.closed().map(|why| {
                match why {
                    Closed::Fenced => "fenced",
                    Closed::Drained => "drained",
                    Closed::Handback => "handback",
                    Closed::Stopping => "stopping",
                }
                .to_owned()
            }),
            flushes_waiting: flushes.waiting,
            flush_wait_ms: flushes.oldest.map(|since| millis(since.elapsed())),
            flushes_committed: flushes.answered,
            rate_limited: self.tuning.rate.is_limited(),
            rate_limit_bits_per_s: self.tuning.rate.limit_now(),
            max_lag_ms: self.tuning.max_lag.map(millis),
            write_rate_bytes_per_s: pace.and_then(|pace| pace.rate_bytes_per_s),
            write_pause_ms: pace.map_or(0.0, |pace| pace.pause.as_secs_f64() * 1000.0),
            write_paused_ms: pace.map_or(0, |pace| millis(pace.paused)),
            scrub: self.scrub.status(Instant::now()),
            round_trip_ms: p.round_trip.map(|d| d.as_secs_f64() * 1000.0),
            pass: p.pass.map(|header| self.progress(header, p.pass_since.elapsed())),
            volumes: self
                .volumes
                .iter()
                .zip(&summary.open_bytes)
                .map(|((name, size_bytes), dirty_bytes)| VolumeStatus {
                    name: name.clone(),
                    size_bytes: *size_bytes,
                    dirty_bytes: *dirty_bytes,
                })
                .collect(),
            queues: vec![
                queue("frames-to-send", "bytes", p.outbox.as_ref().map_or(0, Outbox::held_bytes), self.frames_limit(p)),
                queue("copied-before-write", "bytes", summary.copied_bytes, self.ledger.copy_limits().memory_bytes),
                queue("spilled-before-write", "bytes", summary.spilled_bytes, self.ledger.copy_limits().spill_bytes),
                queue("epochs-in-flight", "epochs", p.in_flight, self.tuning.epochs_in_flight.into()),
                queue("scrubs-in-flight", "messages", scrubs, scrubs_max),
            ],
        }
    }

    fn frames_limit(&self, p: &Published) -> u64 {
        p.outbox.as_ref().map_or(self.tuning.freeze_budget_bytes, Outbox::limit_bytes)
    }

    fn progress(&self, header: PassHeader, since: Duration) -> PassProgress {
        let done = self.counters.pass_done_bytes.load(Ordering::Relaxed);
        let total = self.counters.pass_total_bytes.load(Ordering::Relaxed);
        let rate = (done as f64 / since.as_secs_f64().max(0.001)) as u64;
        PassProgress {
            epoch: header.epoch.0,
            pass: header.pass,
            done_bytes: done.min(total),
            total_bytes: total,
            rate_bytes_per_s: rate,
            left_s: total.saturating_sub(done).checked_div(rate),
        }
    }
}

/// Microseconds since 1970.
pub(crate) fn now_unix_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}

fn queue(name: &str, unit: &str, used: u64, limit: u64) -> QueueStatus {
    QueueStatus { name: name.to_owned(), unit: unit.to_owned(), used, limit }
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}
