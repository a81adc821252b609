//! The rules of taking disks back, one test each: events in, actions out.

use super::*;
use proto::EpochId;

struct Fixture {
    core: Core,
    now: Instant,
}

fn point(generation: u64, epoch: u64) -> Point {
    Point { generation: Generation(generation), epoch: EpochId(epoch) }
}

fn wish(target: HandbackTarget) -> Wish {
    Wish {
        target,
        plans: false,
        named: None,
        group: "db".parse().unwrap(),
        generation: Generation(1),
        volumes: vec![VolumeHello { name: "root".parse().unwrap(), size_bytes: 1 << 20 }],
        token: SessionToken([7; 16]),
        repeats: false,
        kept: false,
        gate: Some(Closed::Fenced),
        cleared: Some(point(1, 9)),
    }
}

fn own(blocks: u64) -> Vec<DirtyMap> {
    let mut map = DirtyMap::new(1 << 20);
    map.mark(3, blocks);
    vec![map]
}

fn pass(pass: u16, kind: PassKind) -> Event {
    Event::Pass(PassHeader { epoch: EpochId(10), pass, kind, continued: false })
}

fn ready() -> Event {
    let (newest, from) = (point(1, 9), point(1, 9));
    Event::Message(Message::Ready(Ready { version: 1, generation: Generation(2), newest, from, give_bytes: 4096 }))
}

impl Fixture {
    fn new(wish: Wish) -> Self {
        Self { core: Core::new(wish), now: Instant::now() }
    }

    fn on(&mut self, event: Event) -> String {
        let mut out = Vec::new();
        self.core.handle(self.now, event, &mut out).unwrap();
        let told = |action: &Action| match action {
            Action::Send(message) => message.kind().to_owned(),
            Action::SendOwn(_) => "SendOwn".to_owned(),
            Action::Step(_) | Action::Total(_) => String::new(),
            other => format!("{other:?}"),
        };
        out.iter().map(told).filter(|told| !told.is_empty()).collect::<Vec<_>>().join(", ")
    }

    fn refuses(&mut self, event: Event) -> String {
        self.core.handle(self.now, event, &mut Vec::new()).unwrap_err().to_string()
    }

    fn fails(&mut self, in_between: bool) -> String {
        let mut out = Vec::new();
        self.core.fail(in_between, &mut out);
        format!("{out:?}")
    }

    /// Up to the answer of the receiver.
    fn asked(wish: Wish) -> Self {
        let mut this = Self::new(wish);
        this.on(Event::Begin);
        this.on(Event::Settled);
        assert_eq!(this.on(Event::Connected), "handback");
        assert_eq!(this.on(ready()), "Compare");
        this
    }
}

/// Would catch blocks that are overwritten before they are kept, guests that are let in early, and a seal before the disks are durable.
#[test]
fn a_failback_keeps_then_takes_then_lets_guests_in() {
    let mut f = Fixture::new(wish(HandbackTarget::Failback));
    assert_eq!(f.on(Event::Begin), "CloseGate, Settle { committed: false }");
    assert_eq!(f.on(Event::Settled), "Connect");
    assert_eq!(f.on(Event::Connected), "handback");
    assert_eq!(f.on(ready()), "Compare");
    assert_eq!(f.on(Event::Compared(own(2))), "Record { kept: false }, SendOwn");
    assert_eq!(f.on(Event::Sent { frames: 1, digest: [1; 32] }), "diverged");
    let kept = Event::Message(Message::Kept { name: "diverged-1".parse().unwrap() });
    assert_eq!(f.on(kept), "Kept(Name(\"diverged-1\")), Record { kept: true }, want, give, TakePass");
    assert_eq!(f.on(pass(0, PassKind::Fuzzy)), "Apply");
    assert_eq!(f.on(Event::Applied), "Flush, applied, TakePass");
    assert_eq!(f.on(pass(1, PassKind::Frozen)), "Apply");
    assert_eq!(f.on(Event::Applied), "Flush, applied");
    let handed = f.on(Event::Message(Message::Handed { point: point(2, 10), generation: Generation(3) }));
    assert!(handed.starts_with("Handed {") && handed.contains("compares: false"), "{handed}");
    assert!(handed.ends_with("End, OpenGate, Unpark"), "{handed}");
    assert!(f.core.is_done() && f.core.handed() == Some((point(2, 10), Generation(3))));
}

/// Would catch regions that were forgotten at a point that the receiver, put back to an earlier one, does not have: what was written there is in no map.
#[test]
fn a_receiver_that_is_older_than_what_was_forgotten_is_compared_with_all() {
    for plans in [false, true] {
        let mut f = Fixture::new(Wish { plans, cleared: Some(point(1, 10)), ..wish(HandbackTarget::Failback) });
        f.on(Event::Begin);
        f.on(Event::Settled);
        f.on(Event::Connected);
        assert_eq!(f.on(ready()), "SuspectAll, Compare", "plans {plans}");
    }
}

#[test]
fn a_rollback_commits_first_and_sends_nothing_to_be_kept() {
    let mut f = Fixture::new(Wish { gate: None, ..wish(HandbackTarget::Rollback(point(1, 4))) });
    assert_eq!(f.on(Event::Begin), "CloseGate, Settle { committed: true }");
    assert_eq!(f.on(Event::Settled), "Park");
    assert_eq!(f.on(Event::Parked), "Connect");
    f.on(Event::Connected);
    f.on(ready());
    assert_eq!(f.on(Event::Compared(own(1))), "Record { kept: false }, Record { kept: true }, want, give, TakePass");
    assert_eq!(f.refuses(pass(1, PassKind::Frozen)), "the receiver sent pass 1, expected 0");
    assert_eq!(f.fails(true), "[]", "the disks are in between: guests wait");
}

/// Nothing was overwritten: all is as it was, and the session goes on if it was ended.
#[test]
fn what_fails_before_anything_is_overwritten_changes_nothing() {
    let mut f = Fixture::asked(wish(HandbackTarget::Failback));
    assert_eq!(f.fails(false), "[RestoreGate(Some(Fenced))]");
    let mut f = Fixture::new(Wish { gate: None, ..wish(HandbackTarget::Rollback(point(1, 4))) });
    f.on(Event::Begin);
    f.on(Event::Settled);
    f.on(Event::Parked);
    assert_eq!(f.fails(false), "[RestoreGate(None), Unpark]");
}

/// A repeated one that has kept its blocks keeps none again; one whose end was not heard compares what was marked since.
#[test]
fn it_can_be_repeated() {
    let again = || Wish { repeats: true, kept: true, ..wish(HandbackTarget::Failback) };
    let mut f = Fixture::asked(again());
    assert_eq!(f.on(Event::Compared(own(2))), "Record { kept: true }, want, give, TakePass");
    let mut f = Fixture::new(again());
    f.on(Event::Begin);
    f.on(Event::Settled);
    f.on(Event::Connected);
    let handed = f.on(Event::Message(Message::Handed { point: point(2, 10), generation: Generation(3) }));
    assert!(handed.contains("compares: true"), "{handed}");
}

#[test]
fn who_only_asks_changes_nothing() {
    let mut f = Fixture::new(Wish { plans: true, ..wish(HandbackTarget::Failback) });
    assert_eq!(f.on(Event::Begin), "Connect");
    f.on(Event::Connected);
    assert_eq!(f.on(ready()), "Compare");
    assert_eq!(f.on(Event::Compared(own(2))), "End");
    assert!(f.core.is_done());
    assert_eq!(f.fails(false), "[]");
    // That an earlier one came to its end is told, and nothing is recorded.
    let mut f = Fixture::new(Wish { plans: true, repeats: true, ..wish(HandbackTarget::Failback) });
    f.on(Event::Begin);
    f.on(Event::Connected);
    assert_eq!(f.on(Event::Message(Message::Handed { point: point(2, 10), generation: Generation(3) })), "End");
    assert!(f.core.is_done() && f.core.handed() == Some((point(2, 10), Generation(3))));
}

#[test]
fn the_point_of_a_name_is_asked_for_and_nothing_else() {
    let named: proto::Name = "before-upgrade".parse().unwrap();
    let mut f = Fixture::new(Wish { plans: true, named: Some(named.clone()), ..wish(HandbackTarget::Failback) });
    f.on(Event::Begin);
    let ask = f.core.ask();
    assert!(ask.named == Some(named) && ask.to.is_none());
    f.on(Event::Connected);
    assert_eq!(f.on(ready()), "End");
    assert!(f.core.is_done() && f.core.ready().is_some_and(|ready| ready.from == point(1, 9)));
}

#[test]
fn a_deadline_ends_it() {
    let mut f = Fixture::new(wish(HandbackTarget::Failback));
    f.on(Event::Begin);
    f.now += DRAIN_DEADLINE - Duration::from_millis(1);
    assert_eq!(f.on(Event::Tick), "");
    f.now += Duration::from_millis(1);
    assert!(f.core.deadline() == Some(f.now) && f.refuses(Event::Tick).contains("in time"));
    let mut f = Fixture::new(wish(HandbackTarget::Failback));
    f.on(Event::Begin);
    f.on(Event::Settled);
    f.on(Event::Connected);
    f.now += READY_DEADLINE;
    assert!(f.refuses(Event::Tick).contains("did not answer"));
}

#[test]
fn what_the_receiver_may_not_say_is_named() {
    let mut f = Fixture::asked(wish(HandbackTarget::Failback));
    let early = Event::Message(Message::Handed { point: point(2, 10), generation: Generation(3) });
    assert_eq!(f.refuses(early), "the receiver sent handed while this side was comparing");
}
