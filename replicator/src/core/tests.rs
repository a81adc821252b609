//! The rules of the core, one test each: events in, actions out.

use super::*;

const BUDGET: u64 = 1000;

struct Fixture {
    core: Core,
    now: Instant,
    /// Whether the primary's own disk takes the record of a generation.
    records: bool,
    /// Sessions begun; the token of each is its number.
    drawn: u8,
    /// The point in the record up to which the dirty log was cleared.
    cleared: Option<Point>,
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
        Self { core: Core::new(config, Generation(0), Default::default(), now), now, records: true, drawn: 0, cleared: None }
    }

    fn on(&mut self, event: Event) -> Vec<Action> {
        self.try_on(event).expect("permitted")
    }

    fn try_on(&mut self, event: Event) -> Result<Vec<Action>, SessionError> {
        let mut out = Vec::new();
        self.core.handle(self.now, event, &mut out).map(|()| out)
    }

    fn hurry(&mut self) -> Vec<Action> {
        self.on(Event::Hurry(Load::default()))
    }

    fn tick(&mut self, open_bytes: u64) -> Vec<Action> {
        self.now += Duration::from_secs(1);
        self.on(Event::Tick(Load { open_bytes, ..Load::default() }))
    }

    /// A session, up to the end of its comparison, with a receiver whose newest commit is of our last session.
    fn greet(&mut self, committed: Option<Point>) -> Vec<Action> {
        self.greet_after(committed, committed.map_or(0, |_| self.drawn))
    }

    fn greet_after(&mut self, committed: Option<Point>, writer: u8) -> Vec<Action> {
        self.now += Duration::from_secs(60);
        assert_eq!(self.on(Event::Tick(Load::default())), [Action::Connect]);
        self.drawn += 1;
        let connected = Event::Connected { session: token(self.drawn), cleared: self.cleared };
        assert!(matches!(self.on(connected)[..], [Action::Send(Message::Hello(_))]));
        let mut actions = self.on(welcome(1, committed, writer));
        assert_eq!(actions.pop(), Some(Action::Compare));
        let Some(Action::Record { generation, ours, .. }) = actions.pop() else { panic!("recorded at every session") };
        let wanted = Ours { sessions: [token(writer), token(self.drawn)], before: committed };
        assert_eq!((generation, ours), (Generation(1), wanted));
        if self.records {
            self.core.recorded(ours);
        }
        assert_eq!(self.tick(10), [], "nothing is cut while it compares");
        assert_eq!(self.on(Event::Compared), []);
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

fn token(number: u8) -> SessionToken {
    SessionToken([number; 16])
}

fn welcome(generation: u64, committed: Option<Point>, writer: u8) -> Event {
    let (generation, writer) = (Generation(generation), token(writer));
    let welcome = Welcome { version: 1, generation, committed, writer, in_flight_max: 8, staged: None };
    Event::Welcome { welcome, continues: false }
}

fn begin(epoch: u64, pass: u16, kind: PassKind) -> Action {
    Action::BeginPass { epoch: EpochId(epoch), pass, kind }
}

fn lost() -> Event {
    Event::Lost { jitter: 0.5, refused: false, resumes: false }
}

#[test]
fn a_first_sync_goes_in_passes_until_it_fits_the_budget() {
    let mut f = Fixture::new();
    assert_eq!(f.greet(None), [Action::Merge, Action::MarkAll]);
    assert!(f.core.syncing());
    assert_eq!(f.tick(100 * BUDGET), [begin(1, 0, PassKind::Fuzzy)]);
    let load = |open_bytes| Load { open_bytes, ..Load::default() };
    assert_eq!(f.on(Event::PassDone(load(10 * BUDGET))), [begin(1, 1, PassKind::Fuzzy)]);
    assert_eq!(f.on(Event::PassDone(load(BUDGET))), [begin(1, 2, PassKind::Frozen)]);
    assert!(matches!(f.on(Event::PassDone(load(0)))[..], [Action::Seal { passes: 3, .. }]));
    assert_eq!(f.on(Event::Message(Message::Committed { point: point(1, 1) })), [Action::Committed(point(1, 1))]);
    assert!(!f.core.syncing());
}

#[test]
fn passes_that_do_not_converge_end_in_a_frozen_one() {
    let mut f = Fixture::new();
    f.greet(None);
    f.tick(100 * BUDGET);
    let load = Load { open_bytes: 99 * BUDGET, ..Load::default() };
    assert_eq!(f.on(Event::PassDone(load)), [begin(1, 1, PassKind::Frozen)]);
}

#[test]
fn the_current_epoch_grows_while_the_pipe_is_full() {
    let mut f = Fixture::new();
    f.greet(None);
    f.epoch(1);
    f.epoch(2);
    assert_eq!(f.tick(10), [], "two epochs are in flight");
    assert_eq!(f.on(Event::Message(Message::Committed { point: point(1, 1) })), [Action::Committed(point(1, 1))]);
    f.epoch(3);
    let queued = Load { open_bytes: 10, queued_bytes: QUEUE_LOW_BYTES + 1, ..Load::default() };
    f.on(Event::Message(Message::Committed { point: point(1, 2) }));
    f.now += Duration::from_secs(1);
    assert_eq!(f.on(Event::Tick(queued)), [], "frames wait for the network");
}

/// Flushes make cuts due at once; those that come while the pipe is full share one, as soon as there is room.
#[test]
fn a_flush_does_not_wait_for_the_interval() {
    let mut f = Fixture::new();
    f.greet(None);
    f.epoch(1);
    assert_eq!(f.tick(0), []);
    f.now += RETRY_CUT;
    let waits = Load { open_bytes: 10, flush_waits: true, ..Load::default() };
    assert!(f.core.deadline(f.now, false) > f.now + Duration::from_millis(900), "the interval has just begun");
    assert!(f.core.deadline(f.now, true) <= f.now);
    assert_eq!(f.on(Event::Tick(waits)), [begin(2, 0, PassKind::Frozen)]);
    assert_eq!(f.on(Event::Tick(waits)), [], "one is captured");
    f.on(Event::PassDone(waits));
    assert_eq!(f.on(Event::Tick(waits)), [], "two are in flight");
    assert!(f.core.deadline(f.now, true) > f.now, "a full pipe is not asked in a loop");
    f.on(Event::Message(Message::Committed { point: point(1, 1) }));
    assert!(f.core.deadline(f.now, true) <= f.now);
    assert_eq!(f.on(Event::Tick(waits)), [begin(3, 0, PassKind::Frozen)]);
    f.on(Event::PassDone(Load::default()));
    f.on(Event::Message(Message::Committed { point: point(1, 2) }));
    assert_eq!(f.on(Event::Tick(Load { open_bytes: 10, ..Load::default() })), [], "without a flush the interval counts");
    assert!(f.core.deadline(f.now, false) <= f.now + Duration::from_secs(1));
    // A flush with nothing to send (its epoch was lost and empty) is no reason to spin.
    assert_eq!(f.on(Event::Tick(Load { flush_waits: true, ..Load::default() })), []);
    assert!(f.core.deadline(f.now, true) > f.now);
}

/// Nothing is cut for a flush while blocks are suspect.
#[test]
fn a_flush_waits_for_the_comparison() {
    let mut f = Fixture::new();
    f.now += Duration::from_secs(60);
    f.on(Event::Tick(Load::default()));
    f.on(Event::Connected { session: token(1), cleared: None });
    f.on(welcome(1, None, 0));
    let waits = Load { open_bytes: 10, flush_waits: true, ..Load::default() };
    assert_eq!(f.on(Event::Tick(waits)), []);
    assert!(f.core.deadline(f.now, true) > f.now + Duration::from_secs(1));
    f.on(Event::Compared);
    assert_eq!(f.on(Event::Tick(waits)), [begin(1, 0, PassKind::Frozen)]);
}

#[test]
fn after_a_lost_session_the_receivers_word_releases_what_got_through() {
    let mut f = Fixture::new();
    f.greet(None);
    f.epoch(1);
    f.on(Event::Message(Message::Committed { point: point(1, 1) }));
    f.epoch(2);
    assert_eq!(f.on(lost()), [Action::GiveUp, Action::Disconnect]);
    assert_eq!(f.greet(Some(point(1, 2))), [Action::Committed(point(1, 2)), Action::Merge]);
    f.epoch(3);
}

fn broke() -> Event {
    Event::Lost { jitter: 0.5, refused: false, resumes: true }
}

/// Up to the hello of the next connection.
fn reconnect(f: &mut Fixture) {
    f.now += Duration::from_secs(60);
    assert_eq!(f.on(Event::Tick(Load { open_bytes: 10, ..Load::default() })), [Action::Connect], "nothing is cut meanwhile");
    f.drawn += 1;
    f.on(Event::Connected { session: token(f.drawn), cleared: f.cleared });
}

fn welcomed(committed: Option<Point>, continues: bool) -> Event {
    let staged = Staged { epoch: committed.map_or(EpochId(1), |p| p.epoch.next()), frames: 2, digest: [1; 32] };
    let (generation, writer) = (Generation(1), token(1));
    Event::Welcome {
        welcome: Welcome { version: 1, generation, committed, writer, in_flight_max: 8, staged: Some(staged) },
        continues,
    }
}

/// Epoch 1 is committed, epoch 2 sealed, epoch 3 being captured, and the connection breaks.
fn broken() -> Fixture {
    let mut f = Fixture::new();
    f.greet(None);
    f.epoch(1);
    f.on(Event::Message(Message::Committed { point: point(1, 1) }));
    f.epoch(2);
    assert_eq!(f.tick(10), [begin(3, 0, PassKind::Frozen)]);
    assert_eq!(f.on(broke()), [Action::Disconnect]);
    f
}

/// Would catch an epoch that is cut anew, or sent from its start, because the line broke.
#[test]
fn what_was_under_way_goes_on_over_the_next_connection() {
    let mut f = broken();
    let session = f.core.session();
    assert!(matches!(f.on(Event::PassDone(Load::default()))[..], [Action::Seal { epoch: EpochId(3), .. }]));
    for _ in 0..3 {
        reconnect(&mut f);
        assert_eq!(f.on(broke()), [Action::Disconnect], "before the welcome");
    }
    reconnect(&mut f);
    let resumed = [Action::Committed(point(1, 2)), Action::Resume { epoch: EpochId(3), frames: 2 }];
    assert_eq!(f.on(welcomed(Some(point(1, 2)), true)), resumed);
    assert_eq!((f.core.session(), f.core.in_flight(), f.core.comparing()), (session, 1, false));
    let staged = Message::Staged { epoch: EpochId(3), frames: 5 };
    assert_eq!(f.on(Event::Message(staged)), [Action::Staged { epoch: EpochId(3), frames: 5 }]);
    assert_eq!(f.on(Event::Message(Message::Committed { point: point(1, 3) })), [Action::Committed(point(1, 3))]);
    f.epoch(4);
}

/// Would catch epochs that go on against a copy that is not what they were cut for.
#[test]
fn nothing_goes_on_when_the_receiver_stands_elsewhere() {
    let other_generation = |event| match event {
        Event::Welcome { welcome, continues } => {
            Event::Welcome { welcome: Welcome { generation: Generation(2), ..welcome }, continues }
        }
        event => event,
    };
    let by_another = |event| match event {
        Event::Welcome { welcome, continues } => Event::Welcome { welcome: Welcome { writer: token(99), ..welcome }, continues },
        event => event,
    };
    for (case, welcome) in [
        welcomed(Some(point(1, 2)), false),
        welcomed(None, true),
        welcomed(Some(point(1, 3)), true),
        other_generation(welcomed(Some(point(1, 2)), true)),
        by_another(welcomed(Some(point(1, 2)), true)),
    ]
    .into_iter()
    .enumerate()
    {
        let mut f = broken();
        reconnect(&mut f);
        let actions = f.on(welcome);
        assert!(actions.contains(&Action::Merge) && actions.last() == Some(&Action::Compare), "case {case}: {actions:?}");
        assert_eq!(f.core.in_flight(), 0);
    }
    let mut f = broken();
    assert_eq!(f.on(lost()), [Action::GiveUp, Action::Disconnect], "the capture failed meanwhile");
    reconnect(&mut f);
    assert!(f.on(welcomed(Some(point(1, 2)), true)).contains(&Action::Merge));
}

/// A first copy whose acknowledgement was lost is not sent again.
#[test]
fn a_first_commit_that_was_not_heard_of_counts() {
    let mut f = Fixture::new();
    f.greet(None);
    f.epoch(1);
    f.on(lost());
    assert_eq!(f.greet(Some(point(1, 1))), [Action::Committed(point(1, 1)), Action::Merge]);
    assert!(!f.core.syncing());
}

#[test]
fn another_history_at_the_receiver_means_that_everything_is_compared() {
    for theirs in [point(1, 1), point(1, 9), point(2, 2)] {
        let mut f = Fixture::new();
        f.greet(None);
        f.epoch(1);
        f.on(Event::Message(Message::Committed { point: point(1, 1) }));
        f.epoch(2);
        f.on(Event::Message(Message::Committed { point: point(1, 2) }));
        f.on(lost());
        assert_eq!(f.greet(Some(theirs)), [Action::Merge, Action::SuspectAll], "{theirs:?}");
    }
}

/// After a restart the dirty log speaks for all that was written, unless the copy is older than what the log has forgotten.
#[test]
fn after_a_restart_the_record_decides() {
    let sessions = [token(1), token(2)];
    for (theirs, writer, before, known) in [
        // The first of the two had committed this when the second began, and may have committed no more since.
        (point(1, 7), 1, Some(point(1, 7)), true),
        (point(1, 8), 1, Some(point(1, 7)), false),
        (point(1, 6), 1, Some(point(1, 7)), false),
        (point(1, 9), 2, Some(point(1, 7)), true),
        (point(1, 9), 3, Some(point(1, 7)), false),
    ] {
        let mut f = Fixture::new();
        f.core.recorded(Ours { sessions, before });
        f.drawn = 2;
        let actions = f.greet_after(Some(theirs), writer);
        let wanted = if known { vec![Action::Committed(theirs), Action::Merge] } else { vec![Action::Merge, Action::SuspectAll] };
        assert_eq!(actions, wanted, "{theirs} by {writer}, before {before:?}");
    }
    for (theirs, writer, cleared, known) in [
        (point(1, 7), 1, None, true),
        (point(1, 7), 2, Some(point(1, 7)), true),
        (point(1, 7), 2, Some(point(1, 8)), false),
        (point(2, 9), 2, Some(point(1, 8)), false),
        (point(1, 7), 3, None, false),
        (point(1, 7), 0, None, false),
    ] {
        let mut f = Fixture::new();
        f.core.recorded(Ours { sessions, before: None });
        (f.drawn, f.cleared) = (2, cleared);
        let actions = f.greet_after(Some(theirs), writer);
        let wanted = if known { vec![Action::Committed(theirs), Action::Merge] } else { vec![Action::Merge, Action::SuspectAll] };
        assert_eq!(actions, wanted, "{theirs} by {writer}, cleared {cleared:?}");
        assert!(!f.core.syncing());
        f.epoch(theirs.epoch.0 + 1);
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
    f.on(lost());
    assert_eq!(f.greet_after(Some(point(1, 2)), 99), [Action::Merge, Action::SuspectAll]);
    // Its session is in the record from then on: what it wrote was suspect durably before.
    f.on(lost());
    assert_eq!(f.greet_after(Some(point(1, 2)), 99), [Action::Committed(point(1, 2)), Action::Merge]);
}

/// A session whose token could not be made durable never counts as ours.
#[test]
fn a_session_is_recorded_before_it_counts() {
    let mut f = Fixture::new();
    f.greet(None);
    f.epoch(1);
    f.on(Event::Message(Message::Committed { point: point(1, 1) }));
    f.on(lost());
    f.records = false;
    f.greet(Some(point(1, 1)));
    f.on(lost());
    assert_eq!(f.greet(Some(point(1, 1))), [Action::Merge, Action::SuspectAll]);
}

#[test]
fn a_fenced_primary_never_connects_again() {
    let mut f = Fixture::new();
    f.greet(None);
    let mut out = Vec::new();
    let fenced = Event::Message(Message::Fenced { generation: Generation(2) });
    let error = f.core.handle(f.now, fenced, &mut out).unwrap_err();
    assert!(error.is_refusal());
    assert_eq!(out, [Action::Merge, Action::RefuseFlushes, Action::Disconnect]);
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
    let error = f.try_on(welcome(1, None, 0)).unwrap_err();
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
    f.on(Event::Lost { jitter: 1.0, refused: true, resumes: false });
    let Phase::Waiting { until, refused } = f.core.phase() else { panic!("waits") };
    assert!(*refused && *until - f.now == REFUSED_RETRY);
}

/// Would catch an image that is compared, found to be equal, and never a point, because the guest writes nothing.
#[test]
fn an_adopted_image_is_compared_and_has_something_to_send() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.greet_after(Some(point(1, 0)), 0), [Action::Merge, Action::SuspectAll, Action::MarkFirst]);
    fixture.epoch(1);
    assert_eq!(fixture.on(Event::Message(Message::Committed { point: point(1, 1) })), [Action::Committed(point(1, 1))]);
    assert_eq!(fixture.tick(0), []);
}

/// Would catch a session that broke while somebody waited for all to be committed, and that nobody makes again until that is given up.
#[test]
fn who_is_in_a_hurry_connects_too() {
    let mut f = Fixture::new();
    assert_eq!(f.hurry(), [Action::Connect]);
    f.on(Event::Connected { session: token(1), cleared: None });
    f.now += WELCOME_TIMEOUT;
    assert_eq!(f.try_on(Event::Hurry(Load::default())), Err(SessionError::Silent));
}
