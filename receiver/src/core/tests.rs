//! The state machine without a driver: orders of events that a network makes rare.

use proto::control::VolumeHello;
use proto::pass::PassKind;
use proto::scrub::SCRUBS_IN_FLIGHT_MAX;
use proto::{BlockExtent, BlockIndex, ScrubOutcome, ScrubRun, SessionToken, VolumeIndex};

use super::*;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn core() -> Core {
    Core::new(ClientPolicy { client: name("a"), groups: None, groups_max: 4, volumes_max: 4, volume_bytes_max: 10_000 })
}

fn hello() -> Hello {
    Hello {
        version_min: 1,
        version_max: 7,
        block_bytes: 4096,
        interval_ms: 1000,
        group: name("db"),
        generation: Generation(0),
        committed: EpochId(0),
        volumes: vec![VolumeHello { name: name("root"), size_bytes: 8192 }],
    }
}

/// The one frame of an epoch.
fn frame(epoch: u64) -> Vec<u8> {
    let extents = [proto::BlockExtent { start: proto::BlockIndex(0), blocks: 1 }];
    proto::frame::encode_zero(proto::VolumeIndex(0), EpochId(epoch), 0, &extents)
}

fn frame_arrives(core: &mut Core, epoch: u64) {
    let bytes = frame(epoch);
    let decoded = proto::Frame::decode(&bytes, 2).unwrap();
    core.frame_arrived(&decoded.header, bytes.first_chunk().unwrap(), 1);
}

fn seal(epoch: u64) -> Seal {
    let (mut tally, frame) = (Tally::default(), frame(epoch));
    tally.add(frame.first_chunk().unwrap(), frame.len(), 0, 1);
    let (frames, frame_bytes, digest) = (tally.frames, tally.frame_bytes, tally.digest());
    Seal { frames, frame_bytes, zero_blocks: 1, digest, ..empty_seal(epoch) }
}

fn empty_seal(epoch: u64) -> Seal {
    Seal {
        passes: 1,
        epoch: EpochId(epoch),
        generation: Generation(1),
        cut_unix_us: 0,
        frames: 0,
        frame_bytes: 0,
        data_blocks: 0,
        zero_blocks: 0,
        first_write_unix_us: 0,
        session: proto::SessionToken::default(),
        digest: Tally::default().digest(),
    }
}

fn pass(epoch: u64) -> PassHeader {
    PassHeader { epoch: EpochId(epoch), pass: 0, kind: PassKind::Frozen, continued: false }
}

/// Takes an event that must not end the session.
fn good(core: &mut Core, event: Event) -> Vec<Action> {
    let mut out = Vec::new();
    let ended = core.handle(event, &mut out);
    assert!(ended.is_none(), "{ended:?}");
    out
}

/// A session whose group has this of epoch 1.
fn resumed(arrived: Option<Arrived>) -> Core {
    let mut core = core();
    good(&mut core, Event::Message(Message::Hello(hello())));
    good(&mut core, Event::Stored(Stored::Absent { groups: 0, volume_bytes: 0 }));
    let staged = arrived.as_ref().map(Arrived::told);
    let out =
        good(&mut core, Event::Claimed { committed: None, writer: SessionToken::default(), arrived: arrived.map(Box::new) });
    let welcome = Message::Welcome {
        version: 1,
        generation: Generation(1),
        committed: None,
        writer: SessionToken::default(),
        epochs_in_flight_max: EPOCHS_IN_FLIGHT_MAX,
        staged,
    };
    assert_eq!(out, [Action::Send(welcome)]);
    core
}

fn streaming() -> Core {
    resumed(None)
}

/// One frame of pass 2 is there from a connection that broke.
fn arrived() -> Arrived {
    let mut tally = Tally::default();
    tally.add(&[7; FRAME_HEADER_BYTES], 4200, 1, 0);
    Arrived { epoch: EpochId(1), pass: 2, tally }
}

/// Would catch frames that are taken for others than the primary means.
#[test]
fn an_epoch_goes_on_only_if_the_primary_says_so() {
    let continued = PassHeader { pass: 2, continued: true, ..pass(1) };
    let mut core = resumed(Some(arrived()));
    assert!(core.wants_pass());
    assert_eq!(good(&mut core, Event::Pass(continued)), []);
    let mut core = resumed(Some(arrived()));
    assert_eq!(good(&mut core, Event::Pass(pass(1))), [Action::Abandon], "it begins the epoch anew");
    for (arrived, header) in [
        (None, PassHeader { continued: true, ..pass(1) }),
        (Some(arrived()), PassHeader { pass: 1, ..continued }),
        (Some(arrived()), PassHeader { pass: 3, ..continued }),
        (Some(arrived()), PassHeader { epoch: EpochId(2), ..continued }),
    ] {
        assert!(resumed(arrived).handle(Event::Pass(header), &mut Vec::new()).is_some(), "{header:?}");
    }
    // Only the first pass of a connection goes on.
    let mut core = resumed(Some(arrived()));
    good(&mut core, Event::Pass(PassHeader { kind: PassKind::Fuzzy, ..continued }));
    good(&mut core, Event::PassEnd);
    let again = core.handle(Event::Pass(PassHeader { pass: 3, ..continued }), &mut Vec::new()).unwrap();
    assert!(matches!(again, SessionError::NotSuspended { .. }));
}

/// What was left by a broken connection is not of the newest point, and in nobody's way.
#[test]
fn hashes_may_be_asked_for_before_an_epoch_goes_on() {
    let query = HashQuery { id: 1, volume: proto::VolumeIndex(0), start: proto::BlockIndex(0), blocks: 1, chunk_blocks: 1 };
    let mut core = resumed(Some(arrived()));
    assert_eq!(good(&mut core, Event::Message(Message::HashQuery(query))), [Action::Hash(query)]);
    good(&mut core, Event::Pass(PassHeader { pass: 2, continued: true, ..pass(1) }));
    assert!(core.handle(Event::Message(Message::HashQuery(query)), &mut Vec::new()).is_some());
}

/// The next pass is not read between the end of an epoch's frozen pass and its seal: the journal is sequential.
#[test]
fn a_pass_waits_for_the_seal_before_it() {
    let mut core = streaming();
    assert!(core.wants_pass());
    good(&mut core, Event::Pass(pass(1)));
    assert!(!core.wants_pass());
    frame_arrives(&mut core, 1);
    good(&mut core, Event::PassEnd);
    assert!(!core.wants_pass(), "the seal is not here yet");
    assert_eq!(good(&mut core, Event::Message(Message::Seal(seal(1)))), [Action::Commit(seal(1))]);
    assert!(core.wants_pass(), "the next epoch arrives while this one syncs");
    good(&mut core, Event::Pass(pass(2)));
    let point = seal(1).point();
    assert_eq!(good(&mut core, Event::Committed(point)), [Action::Send(Message::Committed { point })]);
}

/// An epoch in which nothing changed would be a point that costs its sender nothing.
#[test]
fn an_empty_epoch_is_refused() {
    let mut core = streaming();
    good(&mut core, Event::Pass(pass(1)));
    good(&mut core, Event::PassEnd);
    let ended = core.handle(Event::Message(Message::Seal(empty_seal(1))), &mut Vec::new()).unwrap();
    assert_eq!((ended.to_string().as_str(), ended.code()), ("seal of epoch 1 has no frames", proto::CloseCode::Misbehaved));
}

/// Volumes are declared in a few bytes; what they may come to is bounded by the client, not by its words.
#[test]
fn the_volumes_of_a_client_are_limited_together() {
    for (volume_bytes, fits) in [(10_000 - 8192, true), (10_000 - 8191, false), (u64::MAX, false)] {
        let mut core = core();
        good(&mut core, Event::Message(Message::Hello(hello())));
        let ended = core.handle(Event::Stored(Stored::Absent { groups: 1, volume_bytes }), &mut Vec::new());
        assert_eq!(ended.is_none(), fits, "{volume_bytes}");
        assert!(ended.is_none_or(|e| e.code() == proto::CloseCode::Limit));
    }
}

/// Seals overtake passes; each is used when its own epoch is complete.
#[test]
fn seals_that_come_early_wait_for_their_epoch() {
    let mut core = streaming();
    for epoch in 1..=3 {
        assert_eq!(good(&mut core, Event::Message(Message::Seal(seal(epoch)))), []);
    }
    for epoch in 1..=3 {
        good(&mut core, Event::Pass(pass(epoch)));
        frame_arrives(&mut core, epoch);
        assert_eq!(good(&mut core, Event::PassEnd), [Action::Commit(seal(epoch))]);
    }
}

/// What changed between looking a group up and claiming it is decided on again.
#[test]
fn a_promotion_between_lookup_and_claim_fences() {
    let mut core = core();
    good(&mut core, Event::Message(Message::Hello(hello())));
    let stored = |generation, role| {
        let volumes = vec![Volume { name: name("root"), size_bytes: 8192 }];
        Event::Stored(Stored::Present(StoredGroup { generation: Generation(generation), role, owned: true, volumes }))
    };
    good(&mut core, stored(1, GroupRole::Replica));
    let mut out = Vec::new();
    let ended = core.handle(stored(2, GroupRole::Active), &mut out).unwrap();
    assert!(matches!(ended, SessionError::Fenced { generation: Generation(2), .. }));
    assert!(out.contains(&Action::Send(Message::Fenced { generation: Generation(2) })));
}

/// A session that ended stays ended: nothing that arrives late does anything.
#[test]
fn late_events_after_the_end_do_nothing() {
    let mut core = streaming();
    let mut out = Vec::new();
    assert!(core.handle(Event::Superseded, &mut out).is_some());
    let point = seal(1).point();
    for event in [
        Event::Committed(point),
        Event::PassEnd,
        Event::Superseded,
        Event::Claimed { committed: None, writer: SessionToken::default(), arrived: None },
    ] {
        assert_eq!(good(&mut core, event), []);
    }
    assert!(!core.wants_pass());
}

/// In every state a message that does not belong there ends the session with both named.
#[test]
fn messages_out_of_place_name_state_and_message() {
    let welcome = Message::Fenced { generation: Generation(1) };
    let mut opening = core();
    let mut looking = core();
    good(&mut looking, Event::Message(Message::Hello(hello())));
    for (core, state) in
        [(&mut opening, "waiting for the hello"), (&mut looking, "opening the group"), (&mut streaming(), "replicating")]
    {
        let ended = core.handle(Event::Message(welcome.clone()), &mut Vec::new()).unwrap();
        assert_eq!(ended.to_string(), format!("fenced message while {state}"));
    }
}

fn scrub(id: u32, epoch: u64) -> Scrub {
    let extent = BlockExtent { start: BlockIndex(1), blocks: 1 };
    Scrub { id, epoch: EpochId(epoch), volume: VolumeIndex(0), runs: vec![ScrubRun { extent, hash: [0; 32] }] }
}

fn scrub_comes(core: &mut Core, id: u32, epoch: u64) -> Vec<Action> {
    good(core, Event::Message(Message::Scrub(scrub(id, epoch))))
}

/// Would catch a comparison with another point than the one that the primary speaks of.
#[test]
fn a_scrub_is_compared_at_its_own_epoch() {
    let stale = |id| Action::Send(Message::Scrubbed(Scrubbed { id, outcome: ScrubOutcome::Stale }));
    let mut core = streaming();
    assert_eq!(scrub_comes(&mut core, 1, 0), [stale(1)], "nothing is committed");
    assert_eq!(scrub_comes(&mut core, 2, 1), [stale(2)], "the seal was on its way");
    good(&mut core, Event::Message(Message::Seal(seal(1))));
    assert_eq!(scrub_comes(&mut core, 3, 1), [], "its frames are on their way");
    good(&mut core, Event::Message(Message::Seal(seal(2))));
    assert_eq!(scrub_comes(&mut core, 4, 2), []);
    assert_eq!(scrub_comes(&mut core, 5, 1), []);
    good(&mut core, Event::Pass(pass(1)));
    frame_arrives(&mut core, 1);
    let compared = |id, epoch| Action::Scrub(scrub(id, epoch));
    assert_eq!(good(&mut core, Event::PassEnd), [Action::Commit(seal(1)), compared(3, 1), compared(5, 1)]);
    assert_eq!(scrub_comes(&mut core, 6, 1), [compared(6, 1)], "its commit is started, the next one is not");
    good(&mut core, Event::Pass(pass(2)));
    frame_arrives(&mut core, 2);
    assert_eq!(good(&mut core, Event::PassEnd), [Action::Commit(seal(2)), compared(4, 2)]);
    assert_eq!(scrub_comes(&mut core, 7, 1), [stale(7)], "the view has moved on");
    let answer = Scrubbed { id: 3, outcome: ScrubOutcome::Compared { differing: vec![0] } };
    assert_eq!(good(&mut core, Event::Scrubbed(answer.clone())), [Action::Send(Message::Scrubbed(answer))]);
}

/// Would catch a primary that has the receiver keep or hash without bound, or read beyond a volume.
#[test]
fn scrubs_are_bounded() {
    let mut core = streaming();
    good(&mut core, Event::Message(Message::Seal(seal(1))));
    for id in 0..SCRUBS_IN_FLIGHT_MAX as u32 {
        assert_eq!(scrub_comes(&mut core, id, 1), []);
    }
    let ended = core.handle(Event::Message(Message::Scrub(scrub(99, 1))), &mut Vec::new()).unwrap();
    assert_eq!(ended.to_string(), "the primary has 8 unanswered scrubs: update the older side");
    assert_eq!(ended.code(), proto::CloseCode::Misbehaved);

    for (volume, start) in [(0, 2), (1, 0)] {
        let mut core = streaming();
        let mut scrub = scrub(1, 1);
        scrub.volume = VolumeIndex(volume);
        scrub.runs[0].extent.start = BlockIndex(start);
        let ended = core.handle(Event::Message(Message::Scrub(scrub)), &mut Vec::new()).unwrap();
        assert!(matches!(ended, SessionError::ScrubRange { .. }) && ended.code() == proto::CloseCode::Misbehaved, "{ended}");
    }
}

/// An answer makes room for the next scrub.
#[test]
fn answers_make_room() {
    let mut core = streaming();
    good(&mut core, Event::Pass(pass(1)));
    frame_arrives(&mut core, 1);
    good(&mut core, Event::PassEnd);
    good(&mut core, Event::Message(Message::Seal(seal(1))));
    for id in 0..100 {
        assert_eq!(scrub_comes(&mut core, id, 1), [Action::Scrub(scrub(id, 1))]);
        let outcome = ScrubOutcome::Compared { differing: vec![] };
        good(&mut core, Event::Scrubbed(Scrubbed { id, outcome }));
    }
}
