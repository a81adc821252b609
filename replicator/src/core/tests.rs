//! The rules of the core, one test each: events in, actions out.

use super::*;

const BUDGET: u64 = 1000;

struct Fixture {
    core: Core,
    now: Instant,
    /// Whether the primary's own disk takes the record of a generation.
    records: bool,
}

impl Fixture {
    fn new() -> Self {
        let config = CoreConfig {
            group: "g".parse().unwrap(),
            volumes: vec![VolumeHello { name: "v".parse().unwrap(), size_bytes: 4096 }],
            interval: Duration::from_secs(1),
            freeze_budget_bytes: BUDGET,
            epochs_in_flight: 2,
        };
        let now = Instant::now();
        Self { core: Core::new(config, Generation(0), now), now, records: true }
    }

    fn on(&mut self, event: Event) -> Vec<Action> {
        self.try_on(event).expect("permitted")
    }

    fn try_on(&mut self, event: Event) -> Result<Vec<Action>, SessionError> {
        let mut out = Vec::new();
        self.core.handle(self.now, event, &mut out).map(|()| out)
    }

    fn tick(&mut self, open_bytes: u64) -> Vec<Action> {
        self.now += Duration::from_secs(1);
        self.on(Event::Tick(Load { open_bytes, queued_bytes: 0 }))
    }

    fn greet(&mut self, committed: Option<Point>) -> Vec<Action> {
        self.now += Duration::from_secs(60);
        assert_eq!(self.on(Event::Tick(Load::default())), [Action::Connect]);
        assert!(matches!(self.on(Event::Connected)[..], [Action::Send(Message::Hello(_))]));
        let actions = self.on(Event::Message(welcome(1, committed)));
        for action in actions.iter().filter(|_| self.records) {
            if let Action::Record(generation) = action {
                self.core.recorded(*generation);
            }
        }
        actions
    }

    fn epoch(&mut self, epoch: u64) {
        assert_eq!(self.tick(10), [begin(epoch, 0, PassKind::Frozen)]);
        let sealed = self.on(Event::PassDone(Load::default()));
        assert!(matches!(sealed[..], [Action::Seal { epoch: EpochId(e), passes: 1, .. }] if e == epoch));
    }
}

fn point(generation: u64, epoch: u64) -> Point {
    Point { generation: Generation(generation), epoch: EpochId(epoch) }
}

fn welcome(generation: u64, committed: Option<Point>) -> Message {
    Message::Welcome { version: 1, generation: Generation(generation), committed, epochs_in_flight_max: 8 }
}

fn begin(epoch: u64, pass: u16, kind: PassKind) -> Action {
    Action::BeginPass { epoch: EpochId(epoch), pass, kind }
}

fn lost() -> Event {
    Event::Lost { jitter: 0.5, refused: false }
}

#[test]
fn a_first_sync_goes_in_passes_until_it_fits_the_budget() {
    let mut f = Fixture::new();
    assert_eq!(f.greet(None), [Action::Record(Generation(1)), Action::Merge]);
    assert_eq!(f.core.syncing(), Some(false));
    assert_eq!(f.tick(100 * BUDGET), [begin(1, 0, PassKind::Fuzzy)]);
    let load = |open_bytes| Load { open_bytes, queued_bytes: 0 };
    assert_eq!(f.on(Event::PassDone(load(10 * BUDGET))), [begin(1, 1, PassKind::Fuzzy)]);
    assert_eq!(f.on(Event::PassDone(load(BUDGET))), [begin(1, 2, PassKind::Frozen)]);
    assert!(matches!(f.on(Event::PassDone(load(0)))[..], [Action::Seal { passes: 3, .. }]));
    assert_eq!(f.on(Event::Message(Message::Committed { point: point(1, 1) })), [Action::Committed(EpochId(1))]);
    assert_eq!(f.core.syncing(), None);
}

#[test]
fn passes_that_do_not_converge_end_in_a_frozen_one() {
    let mut f = Fixture::new();
    f.greet(None);
    f.tick(100 * BUDGET);
    let load = Load { open_bytes: 99 * BUDGET, queued_bytes: 0 };
    assert_eq!(f.on(Event::PassDone(load)), [begin(1, 1, PassKind::Frozen)]);
}

#[test]
fn the_current_epoch_grows_while_the_pipe_is_full() {
    let mut f = Fixture::new();
    f.greet(None);
    f.epoch(1);
    f.epoch(2);
    assert_eq!(f.tick(10), [], "two epochs are in flight");
    assert_eq!(f.on(Event::Message(Message::Committed { point: point(1, 1) })), [Action::Committed(EpochId(1))]);
    f.epoch(3);
    let queued = Load { open_bytes: 10, queued_bytes: QUEUE_LOW_BYTES + 1 };
    f.on(Event::Message(Message::Committed { point: point(1, 2) }));
    f.now += Duration::from_secs(1);
    assert_eq!(f.on(Event::Tick(queued)), [], "frames wait for the network");
}

#[test]
fn after_a_lost_session_the_receivers_word_releases_what_got_through() {
    let mut f = Fixture::new();
    f.greet(None);
    f.epoch(1);
    f.on(Event::Message(Message::Committed { point: point(1, 1) }));
    f.epoch(2);
    assert_eq!(f.on(lost()), [Action::Disconnect]);
    assert_eq!(f.greet(Some(point(1, 2))), [Action::Committed(EpochId(2)), Action::Merge]);
    f.epoch(3);
}

/// A first copy whose acknowledgement was lost is not sent again.
#[test]
fn a_first_commit_that_was_not_heard_of_counts() {
    let mut f = Fixture::new();
    f.greet(None);
    f.epoch(1);
    f.on(lost());
    assert_eq!(f.greet(Some(point(1, 1))), [Action::Committed(EpochId(1)), Action::Merge]);
    assert_eq!(f.core.syncing(), None);
}

#[test]
fn another_history_at_the_receiver_means_that_everything_is_sent() {
    for theirs in [None, Some(point(1, 1)), Some(point(1, 9)), Some(point(2, 2))] {
        let mut f = Fixture::new();
        f.greet(None);
        f.epoch(1);
        f.on(Event::Message(Message::Committed { point: point(1, 1) }));
        f.epoch(2);
        f.on(Event::Message(Message::Committed { point: point(1, 2) }));
        f.on(lost());
        assert_eq!(f.greet(theirs), [Action::Merge, Action::MarkAll], "{theirs:?}");
    }
}

/// A clone of this machine took the group over and committed an epoch with the number of ours.
#[test]
fn after_being_superseded_an_unheard_commit_is_not_ours() {
    let mut f = Fixture::new();
    f.greet(None);
    f.epoch(1);
    f.on(Event::Message(Message::Committed { point: point(1, 1) }));
    f.epoch(2);
    let close = Message::close(CloseCode::Superseded, "another session of this group");
    assert!(f.try_on(Event::Message(close)).is_err());
    f.on(lost());
    assert_eq!(f.greet(Some(point(1, 2))), [Action::Merge, Action::MarkAll]);
}

/// A record that could not be made durable is asked for again.
#[test]
fn a_generation_is_recorded_before_it_counts_as_recorded() {
    let mut f = Fixture::new();
    f.records = false;
    assert_eq!(f.greet(None)[0], Action::Record(Generation(1)));
    f.on(lost());
    f.records = true;
    assert_eq!(f.greet(None)[0], Action::Record(Generation(1)));
    f.on(lost());
    assert_eq!(f.greet(None), [Action::Merge]);
}

#[test]
fn a_fenced_primary_never_connects_again() {
    let mut f = Fixture::new();
    f.greet(None);
    let error = f.try_on(Event::Message(Message::Fenced { generation: Generation(2) })).unwrap_err();
    assert!(error.is_refusal());
    f.on(lost());
    f.now += Duration::from_secs(1000);
    assert_eq!(f.on(Event::Tick(Load::default())), []);
    assert!(matches!(f.core.phase(), Phase::Fenced));
}

#[test]
fn a_commit_out_of_order_ends_the_session() {
    let mut f = Fixture::new();
    f.greet(None);
    f.epoch(1);
    f.epoch(2);
    for bad in [point(1, 2), point(2, 1), point(1, 3)] {
        let error = f.try_on(Event::Message(Message::Committed { point: bad })).unwrap_err();
        assert!(matches!(error, SessionError::WrongCommit { .. }));
    }
    let error = f.try_on(Event::Message(welcome(1, None))).unwrap_err();
    assert_eq!(error.to_string(), "the receiver sent welcome while this side was streaming");
}

#[test]
fn backoff_grows_to_its_limit_and_a_refusal_waits_longest() {
    let mut f = Fixture::new();
    let mut waits = Vec::new();
    for _ in 0..12 {
        f.on(lost());
        let Phase::Waiting { until, .. } = f.core.phase() else { panic!("waits") };
        waits.push(*until - f.now);
    }
    assert!(waits.is_sorted() && waits[0] < Duration::from_millis(200) && *waits.last().unwrap() < BACKOFF_MAX);
    f.on(Event::Lost { jitter: 1.0, refused: true });
    let Phase::Waiting { until, refused } = f.core.phase() else { panic!("waits") };
    assert!(*refused && *until - f.now == REFUSED_RETRY);
}
