//! The rules of giving a group back, one test each: events in, actions out.

use super::*;
use proto::{BlockExtent, BlockIndex, EpochId, VolumeIndex};

const BLOCKS: u64 = 100;
const BIG: u64 = 100 << 20;

struct Fixture {
    core: Core,
    now: Instant,
}

fn point(generation: u64, epoch: u64) -> Point {
    Point { generation: Generation(generation), epoch: EpochId(epoch) }
}

impl Fixture {
    fn new(is_failback: bool) -> Self {
        let mut out = Vec::new();
        let mut this = Self { core: Core::begin(&mut out), now: Instant::now() };
        assert_eq!(out, [Action::Look]);
        let ready = Ready { version: 1, generation: Generation(2), newest: point(1, 9), from: point(1, 9), give_bytes: 4096 };
        let looked = Looked::Begun { ready, volume_blocks: vec![BLOCKS], is_failback };
        assert_eq!(this.on(Event::Looked(looked)), "ready");
        this
    }

    fn on(&mut self, event: Event) -> String {
        let mut out = Vec::new();
        self.core.handle(self.now, event, &mut out).unwrap();
        let told = |action: &Action| match action {
            Action::Send(message) => message.kind().to_owned(),
            Action::Hash(_) => "Hash".to_owned(),
            Action::Want(_) => "Want".to_owned(),
            other => format!("{other:?}"),
        };
        out.iter().map(told).collect::<Vec<_>>().join(", ")
    }

    fn says(&mut self, message: Message) -> String {
        self.on(Event::Message(message))
    }

    fn refuses(&mut self, event: Event) -> String {
        self.core.handle(self.now, event, &mut Vec::new()).unwrap_err().to_string()
    }

    /// A pass of so many bytes is sent and applied.
    fn passes(&mut self, pass: u16, bytes: u64) -> String {
        assert_eq!(self.on(Event::Sent { bytes }), "");
        self.says(Message::Applied { pass })
    }

    fn claimed(is_failback: bool) -> Self {
        let mut this = Self::new(is_failback);
        assert_eq!(this.says(Message::Give), "Claim");
        let kind = if is_failback { "Fuzzy" } else { "Frozen" };
        assert_eq!(this.on(Event::Claimed(point(1, 9))), format!("Pass {{ pass: 0, kind: {kind} }}"));
        this
    }
}

/// Would catch a handover before the last pass is on the primary's disks, and one without guests held up.
#[test]
fn passes_shrink_until_guests_are_held_up() {
    let mut f = Fixture::claimed(true);
    assert_eq!(f.passes(0, BIG), "Changed");
    assert_eq!(f.on(Event::Changed { bytes: BIG / 2 }), "Pass { pass: 1, kind: Fuzzy }");
    assert_eq!(f.passes(1, BIG / 2), "Changed");
    assert_eq!(f.on(Event::Changed { bytes: FREEZE_BYTES }), "Hold");
    assert_eq!(f.on(Event::Held), "Pass { pass: 2, kind: Frozen }");
    // The primary's word may come before this side has noticed that all is sent.
    assert_eq!(f.says(Message::Applied { pass: 2 }), "");
    assert_eq!(f.on(Event::Sent { bytes: 4096 }), "Seal { passes: 3 }");
    assert_eq!(f.on(Event::Handed(Some((point(2, 10), Generation(3))))), "CleanUp, handed");
    assert!(f.core.is_over());
}

#[test]
fn what_does_not_converge_is_held_up_at_once() {
    let mut f = Fixture::claimed(true);
    f.passes(0, BIG);
    assert_eq!(f.on(Event::Changed { bytes: BIG }), "Hold");
}

#[test]
fn a_rollback_is_one_pass_and_takes_nothing_to_be_kept() {
    let mut f = Fixture::new(false);
    assert!(!f.core.wants_upload());
    let diverged = Message::Diverged { frames: 1, digest: [0; 32] };
    assert_eq!(f.refuses(Event::Message(diverged)), "the primary sent diverged while this side was waiting to give");
    let mut f = Fixture::claimed(false);
    assert_eq!(f.passes(0, BIG), "Seal { passes: 1 }");
}

/// The stream and the word that speaks of it come in any order; the name comes after both, once.
#[test]
fn what_is_kept_is_what_was_sent() {
    let diverged = || Message::Diverged { frames: 4, digest: [1; 32] };
    let arrived = || Event::Arrived { frames: 4, digest: [1; 32] };
    let named = || Event::Named("diverged-1".parse().unwrap());
    for word_first in [true, false] {
        let mut f = Fixture::new(true);
        if word_first {
            assert_eq!(f.says(diverged()), "");
        }
        assert!(f.core.wants_upload());
        assert_eq!(f.on(Event::Upload), "Keep");
        assert!(!f.core.wants_upload());
        let mut last = arrived();
        if !word_first {
            assert_eq!(f.on(last), "");
            last = Event::Message(diverged());
        }
        assert_eq!(f.on(last), "Name");
        assert_eq!(f.on(named()), "kept");
        assert!(!f.core.wants_upload(), "one is enough");
        assert_eq!(f.says(Message::Give), "Claim");
    }
    let mut f = Fixture::new(true);
    f.on(Event::Upload);
    f.on(arrived());
    assert!(f.refuses(Event::Message(Message::Diverged { frames: 3, digest: [1; 32] })).contains("did not arrive as it sent"));
    let mut f = Fixture::new(true);
    f.on(Event::Upload);
    assert_eq!(f.refuses(Event::Message(Message::Give)), "the primary sent give while this side was waiting to give");
}

#[test]
fn questions_and_wishes_are_bounded() {
    let mut f = Fixture::new(true);
    let query = |start, blocks| {
        Event::Message(Message::HashQuery(HashQuery {
            id: 1,
            volume: VolumeIndex(0),
            start: BlockIndex(start),
            blocks,
            chunk_blocks: 16,
        }))
    };
    for _ in 0..QUERIES_IN_FLIGHT_MAX {
        assert_eq!(f.on(query(0, 16)), "Hash");
    }
    assert!(f.refuses(query(0, 16)).contains("unanswered hash queries"));
    Fixture::new(true).refuses(query(BLOCKS - 1, 2));
    let want =
        |volume, start| Want { volume: VolumeIndex(volume), extents: vec![BlockExtent { start: BlockIndex(start), blocks: 1 }] };
    let mut f = Fixture::new(true);
    assert_eq!(f.says(Message::Want(want(0, BLOCKS - 1))), "Want");
    f.refuses(Event::Message(Message::Want(want(0, BLOCKS))));
    Fixture::new(true).refuses(Event::Message(Message::Want(want(1, 0))));
}

/// Would catch an active copy whose guests are held up for ever, and a primary that is waited for for ever.
#[test]
fn deadlines_end_it() {
    let mut f = Fixture::new(true);
    f.now += ANSWER_DEADLINE;
    assert!(f.core.deadline() == Some(f.now) && f.refuses(Event::Tick).contains("did not answer"));
    let mut f = Fixture::claimed(true);
    assert_eq!(f.core.deadline(), None, "a first pass may be long on its way");
    f.now += ANSWER_DEADLINE * 10;
    f.on(Event::Sent { bytes: BIG });
    assert_eq!(f.core.deadline(), Some(f.now + ANSWER_DEADLINE));
    f.says(Message::Applied { pass: 0 });
    f.on(Event::Changed { bytes: 0 });
    let held = f.now;
    f.on(Event::Held);
    f.on(Event::Sent { bytes: 0 });
    assert_eq!(f.core.deadline(), Some(held + HANDOVER_DEADLINE));
    f.now = held + HANDOVER_DEADLINE;
    assert!(f.refuses(Event::Tick).contains("the active copy goes on"));
}

#[test]
fn a_point_committed_meanwhile_ends_it() {
    let mut f = Fixture::new(true);
    f.says(Message::Give);
    assert!(f.refuses(Event::Claimed(point(1, 10))).contains("took over"));
}
