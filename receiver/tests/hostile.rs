//! Peers that break rules: each gets one exact line, the receiver's status shows the same, nothing is lost, and the other
//! groups go on.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::time::Instant;

use blockdev::IoThreads;
use common::*;
use proto::control::{Hello, VolumeHello};
use proto::pass::{PassHeader, PassKind};
use proto::{CloseCode, EpochId, Generation, Message};
use quinn::Connection;
use receiver::{Receiver, Role};

const SIZE: u64 = 256 * 4096;

/// A receiver with a well-behaved group `a/db` at point 1.1, and another client's group that must go on whatever happens.
struct Scene {
    site: Site,
    receiver: Receiver,
    good: Primary,
    io: IoThreads,
}

impl Scene {
    async fn new(prepare: impl FnOnce(&mut Site)) -> Self {
        let mut site = Site::new(&["a", "b"]);
        prepare(&mut site);
        let receiver = site.start().await;
        let mut good = Primary::open(site.connect(&receiver, 1).await, hello("db", &[("root", SIZE)])).await;
        good.commit(vec![data(0, 8, 3)]).await;
        let mut first = Primary::open(site.connect(&receiver, 0).await, hello("db", &[("root", SIZE)])).await;
        first.commit(vec![data(0, 8, 1)]).await;
        first.control.connection.close(0_u32.into(), b"");
        Self { site, receiver, good, io: IoThreads::new(1).unwrap() }
    }

    async fn connect(&self) -> Connection {
        self.site.connect(&self.receiver, 0).await
    }

    /// The answer to a hello that must be refused.
    async fn refused(&self, hello: Hello) -> (CloseCode, String) {
        let connection = self.connect().await;
        let (send, recv) = connection.open_bi().await.unwrap();
        let mut control = Control { connection, send, recv };
        control.say(&Message::Hello(hello)).await;
        let (code, reason) = control.hear_close().await;
        (CloseCode::from_u16(code).unwrap(), reason)
    }

    async fn primary(&self) -> Primary {
        Primary::open(self.connect().await, hello("db", &[("root", SIZE)])).await
    }

    /// Waits until the status of `a/db` shows the line, then checks that nothing was lost and the other group goes on.
    async fn shown_and_unharmed(&mut self, line: &str) {
        let deadline = Instant::now() + DEADLINE;
        let shown = |r: &Receiver| r.status().iter().find(|s| s.client == name("a")).unwrap().last_error.clone();
        while shown(&self.receiver).as_deref() != Some(line) {
            assert!(Instant::now() < deadline, "status shows {:?}, not {line:?}", shown(&self.receiver));
            tokio::task::yield_now().await;
        }
        self.unharmed().await;
    }

    async fn unharmed(&mut self) {
        self.good.commit(vec![data(9, 1, 7)]).await;
        let images = std::mem::take(&mut self.good.images);
        check_images(&self.io, &self.receiver, "b/db", &images).await;
        let again = self.primary().await;
        assert_eq!(again.next, 2, "point 1.1 of a/db is still the newest");
    }
}

fn pass(epoch: u64, pass: u16, kind: PassKind) -> PassHeader {
    PassHeader { epoch: EpochId(epoch), pass, kind, continued: false }
}

/// Ends a session by what `misbehave` does, and compares the line at both ends.
async fn ends(scene: &mut Scene, code: CloseCode, line: &str, misbehave: impl AsyncFnOnce(&mut Primary)) {
    let mut primary = scene.primary().await;
    misbehave(&mut primary).await;
    let (found, reason) = primary.control.hear_close().await;
    assert_eq!((CloseCode::from_u16(found).unwrap(), reason.as_str()), (code, line));
    scene.shown_and_unharmed(line).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hellos_that_do_not_fit_are_told_why() {
    let mut scene = Scene::new(|site| {
        site.clients[0].0.groups = Some(vec![name("db"), name("web"), name("one-too-many")]);
        site.limits.groups_per_client = 2;
        site.limits.volumes_per_group = 2;
    })
    .await;
    let fit = || hello("db", &[("root", SIZE)]);
    let web = hello("web", &[("root", SIZE)]);
    Primary::open(scene.connect().await, web).await;
    let cases: Vec<(Hello, CloseCode, &str)> = vec![
        (
            hello("mail", &[("root", SIZE)]),
            CloseCode::UnknownGroup,
            "group 'mail' is not among the groups of client 'a': add it to its `groups` at the receiver",
        ),
        (
            hello("one-too-many", &[("root", SIZE)]),
            CloseCode::Limit,
            "client 'a' has 2 groups, which is its limit: raise it at the receiver, or remove a group",
        ),
        (
            hello("db", &[("a", SIZE), ("b", SIZE), ("c", SIZE)]),
            CloseCode::Limit,
            "group 'db' has 3 volumes, the limit is 2: raise it at the receiver, or split the group",
        ),
        (
            hello("db", &[("root", SIZE + 4096)]),
            CloseCode::Mismatch,
            "volume 'root' of group 'db' has 1048576 bytes here and 1052672 at the primary: use another group name for another disk",
        ),
        (
            hello("db", &[("boot", SIZE)]),
            CloseCode::Mismatch,
            "volume 1 of group 'db' is 'root' here and 'boot' at the primary: volumes keep names and order",
        ),
        (
            hello("db", &[("root", SIZE), ("more", SIZE)]),
            CloseCode::Mismatch,
            "group 'db' has 1 volumes here and 2 at the primary: use another group name for another set",
        ),
        (
            Hello { block_bytes: 512, ..fit() },
            CloseCode::Mismatch,
            "block size 512 bytes, this receiver has 4096: update the older side",
        ),
        (
            Hello { version_min: 2, version_max: 3, ..fit() },
            CloseCode::Version,
            "no common protocol version: the primary speaks 2 to 3, this receiver 1 to 1: update the older side",
        ),
        (
            Hello { generation: Generation(9), ..fit() },
            CloseCode::Ahead,
            "the primary claims generation 9, group 'db' stands at 1 here: this store is older than the primary, or a copy of another",
        ),
        (
            Hello { volumes: vec![VolumeHello { name: name("root"), size_bytes: 0 }], ..fit() },
            CloseCode::Misbehaved,
            "hello: volumes are not empty and have names of their own",
        ),
    ];
    for (hello, code, line) in cases {
        assert_eq!(scene.refused(hello).await, (code, line.to_owned()));
    }
    scene.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_not_pinned_gets_no_further_than_the_handshake() {
    let mut scene = Scene::new(|_| ()).await;
    let to = scene.receiver.local_addr().unwrap();
    // With TLS 1.3 the client may think the handshake done before the server refuses its key.
    let error = match scene.site.connect_as(to, &identity()).await {
        Ok(connection) => connection.closed().await,
        Err(error) => error,
    };
    assert!(error.to_string().contains("the cryptographic handshake failed"), "{error}");
    scene.unharmed().await;
}

/// Two clients may both have a group "db"; neither sees, writes or promotes the other's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_sees_its_own_groups_only() {
    let mut scene = Scene::new(|_| ()).await;
    let error = scene.receiver.failover("db", None).await.unwrap_err().to_string();
    assert_eq!(error, "group 'db' is ambiguous: write a/db or b/db");
    let error = scene.receiver.points("nope").unwrap_err().to_string();
    assert_eq!(error, "no group 'nope' in this store: see `twinsite status`");
    let found = scene.primary().await;
    assert_eq!(found.next, 2, "a sees its own point");
    let a = scene.receiver.points("a/db").unwrap();
    let b = scene.receiver.points("b/db").unwrap();
    assert_eq!((a.len(), b.len()), (1, 1));
    scene.receiver.failover("a/db", None).await.unwrap();
    assert_eq!(scene.receiver.status()[1].role, Role::Replica);
    scene.good.commit(vec![data(1, 1, 1)]).await;
    check_images(&scene.io, &scene.receiver, "b/db", &scene.good.images).await;
}

/// The key owns the group: a client whose key was changed does not get at the old one's groups.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_key_under_the_same_name_is_refused() {
    let mut scene = Scene::new(|_| ()).await;
    let Scene { site, receiver, .. } = &mut scene;
    let stopped = std::mem::replace(receiver, {
        let other = Site::new(&["x"]);
        other.start().await
    });
    stopped.shutdown().await;
    let fresh = identity();
    site.clients[0].0.key = fresh.fingerprint();
    site.clients[0].1 = fresh;
    scene.receiver = scene.site.start().await;
    let line = "group 'db' of client 'a' was created with another key: use that key, or another group name";
    assert_eq!(scene.refused(hello("db", &[("root", SIZE)])).await, (CloseCode::UnknownGroup, line.to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn passes_and_seals_out_of_order_end_the_session() {
    let mut scene = Scene::new(|_| ()).await;
    let scene = &mut scene;
    let misbehaved = CloseCode::Misbehaved;
    ends(scene, misbehaved, "pass 0 of epoch 4 came, pass 0 of epoch 2 was due", async |p| {
        p.control.pass(pass(4, 0, PassKind::Frozen), &[]).await;
    })
    .await;
    ends(scene, misbehaved, "pass 1 of epoch 2 came, pass 0 of epoch 2 was due", async |p| {
        p.control.pass(pass(2, 1, PassKind::Frozen), &[]).await;
    })
    .await;
    ends(scene, misbehaved, "pass 0 of epoch 3 came, pass 1 of epoch 2 was due", async |p| {
        p.control.pass(pass(2, 0, PassKind::Fuzzy), &data(0, 1, 9).frame(2, 0)).await;
        p.control.pass(pass(3, 0, PassKind::Frozen), &[]).await;
    })
    .await;
    ends(scene, misbehaved, "a frame of pass 0 of epoch 7 in the stream of pass 0 of epoch 2", async |p| {
        p.control.pass(pass(2, 0, PassKind::Frozen), &data(0, 1, 9).frame(7, 0)).await;
    })
    .await;
    ends(scene, misbehaved, "a frame of volume 5, the group has 1", async |p| {
        let frame = Change::Data { volume: 5, start: 0, blocks: 1, seed: 1 }.frame(2, 0);
        p.control.pass(pass(2, 0, PassKind::Frozen), &frame).await;
    })
    .await;
    ends(scene, misbehaved, "seal of epoch 3 came, the one of epoch 2 was due", async |p| {
        p.control.say(&Message::Seal(seal_of(1, 3, 1, &[]))).await;
    })
    .await;
    ends(scene, misbehaved, "seal of generation 2 in a session of generation 1", async |p| {
        p.control.say(&Message::Seal(seal_of(2, 2, 1, &[]))).await;
    })
    .await;
    ends(scene, misbehaved, "hello message while replicating", async |p| {
        p.control.say(&Message::Hello(hello("db", &[("root", SIZE)]))).await;
    })
    .await;
    ends(scene, misbehaved, "more than 16 epochs in flight", async |p| {
        for epoch in 2..19 {
            p.control.say(&Message::Seal(seal_of(1, epoch, 1, &[]))).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_and_seals_that_do_not_fit_end_the_session() {
    let mut scene = Scene::new(|_| ()).await;
    let scene = &mut scene;
    let misbehaved = CloseCode::Misbehaved;
    let frame = data(0, 2, 2).frame(2, 0);
    let frozen = pass(2, 0, PassKind::Frozen);
    let line = format!("frame at the end of a pass: truncated, {} bytes needed, {} left", frame.len(), frame.len() - 1);
    ends(scene, misbehaved, &line, async |p| p.control.pass(frozen, &frame[..frame.len() - 1]).await).await;
    let line = "frame at the end of a pass: truncated, 40 bytes needed, 39 left";
    ends(scene, misbehaved, line, async |p| p.control.pass(frozen, &frame[..39]).await).await;

    let mut bad = frame.clone();
    let last = bad.len() - 1;
    bad[last] ^= 1;
    let stored = crc(&frame);
    let line = format!("frame payload: checksum {:#010x} computed, {stored:#010x} stored", crc32(&bad[52..]));
    ends(scene, misbehaved, &line, async |p| p.control.pass(frozen, &bad).await).await;

    // A length beyond its limit, with a header checksum that fits.
    let mut long = frame.clone();
    long[20..24].copy_from_slice(&0x0100_0000_u32.to_le_bytes());
    let sum = crc32(&long[..36]);
    long[36..40].copy_from_slice(&sum.to_le_bytes());
    let line = "frame payload bytes: 16777216 is beyond the limit of 131072";
    ends(scene, misbehaved, line, async |p| p.control.pass(frozen, &long).await).await;

    let line = "last block of an extent: 258 is beyond the limit of 256";
    ends(scene, misbehaved, line, async |p| p.control.pass(frozen, &data(250, 8, 1).frame(2, 0)).await).await;

    let line = "control message bytes: 4294967295 is beyond the limit of 16384";
    ends(scene, misbehaved, line, async |p| p.control.send.write_all(&[0xFF; 4]).await.unwrap()).await;

    let frames = [frame.clone()];
    let line = "seal of epoch 2 does not fit its frames: digests differ";
    ends(scene, misbehaved, line, async |p| {
        p.control.pass(frozen, &frame).await;
        let seal = proto::Seal { digest: [1; 32], ..seal_of(1, 2, 1, &frames) };
        p.control.say(&Message::Seal(seal)).await;
    })
    .await;
    ends(scene, misbehaved, "seal of epoch 2 does not fit its frames: counts differ", async |p| {
        p.control.pass(frozen, &[]).await;
        p.control.say(&Message::Seal(seal_of(1, 2, 1, &frames))).await;
    })
    .await;
    ends(scene, misbehaved, "seal of epoch 2 does not fit its frames: passes differ", async |p| {
        p.control.pass(frozen, &frame).await;
        p.control.say(&Message::Seal(seal_of(1, 2, 3, &frames))).await;
    })
    .await;
}

/// Would catch a session, and its group's place, that a peer can hold for ever by not reading: here no commit reaches it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_does_not_read_its_control_stream_is_closed() {
    let mut scene = Scene::new(|_| ()).await;
    let mut settings = proto::transport::settings(false);
    // Once the welcome is read there is room for two commits.
    settings.stream_receive_window(60_u32.into());
    let (to, identity) = (scene.receiver.local_addr().unwrap(), &scene.site.clients[0].1);
    let connection = dial_with(to, identity, scene.site.identity.fingerprint(), settings).await.unwrap();
    let mut primary = Primary::open(connection.clone(), hello("web", &[("root", SIZE)])).await;
    for seed in 0..4 {
        primary.send(&[vec![data(u64::from(seed), 1, seed)]]).await;
    }
    let began = Instant::now();
    let closed = tokio::time::timeout(DEADLINE, connection.closed()).await.expect("closed in time");
    println!("closed after {:?}", began.elapsed());
    let quinn::ConnectionError::ApplicationClosed(close) = closed else { panic!("closed by {closed}") };
    assert_eq!(close.error_code.into_inner(), CloseCode::Misbehaved as u64);
    assert_eq!(close.reason, "the primary does not read its control stream");
    // The commit that it could not be told of is one all the same, and its next session is told. Whether the fourth seal was read before the
    // session ended is a race.
    let next = Primary::open(scene.connect().await, hello("web", &[("root", SIZE)])).await.next;
    assert!((4..=5).contains(&next), "{:?}", scene.receiver.points("a/web"));
    assert_eq!(scene.receiver.points("a/web").unwrap().len() as u64 + 1, next);
    scene.unharmed().await;
}

fn crc32(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

fn crc(frame: &[u8]) -> u32 {
    u32::from_le_bytes(frame[28..32].try_into().unwrap())
}

/// A client that reaches its space limit is told so; its points stay, and it may go on once there is room.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_out_of_space_is_told_and_loses_nothing() {
    let mut scene = Scene::new(|site| site.clients[0].0.space_max_bytes = Some(100_000)).await;
    let line = "client 'a' has used its 100000 bytes of space: raise `space_max`";
    ends(&mut scene, CloseCode::Storage, line, async |p| {
        // Without its seal: it may be refused before that is sent.
        p.control.pass(pass(2, 0, PassKind::Frozen), &data(0, 30, 2).frame(2, 0)).await;
    })
    .await;
    scene.receiver.shutdown().await;
    scene.site.clients[0].0.space_max_bytes = None;
    scene.receiver = scene.site.start().await;
    let mut primary = scene.primary().await;
    primary.commit(vec![data(0, 30, 2)]).await;
}

/// A second process gets one line.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_in_use_is_refused() {
    let scene = Scene::new(|_| ()).await;
    let error = Receiver::start(scene.site.config(), scene.site.identity.clone()).await.unwrap_err().to_string();
    let wanted = format!(
        "store {} belongs to a running node (pid {}): stop it, or ask it through its control socket",
        scene.site.store().display(),
        std::process::id()
    );
    assert_eq!(error, wanted);
    let error = receiver::check::check(&scene.site.store(), &mut |_| ()).unwrap_err().to_string();
    assert_eq!(error, wanted);
}

/// A damaged group is refused with file and offset; the others go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_group_is_named_and_the_others_go_on() {
    let mut scene = Scene::new(|_| ()).await;
    let mut primary = scene.primary().await;
    for seed in 0..4 {
        primary.commit(vec![data(seed, 3, seed as u8)]).await;
    }
    scene.receiver.shutdown().await;
    let segment = only_file(&scene.site.store().join("a/db/journal"));
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[70] ^= 0x40;
    std::fs::write(&segment, &bytes).unwrap();
    let report = receiver::check::check(&scene.site.store(), &mut |_| ()).unwrap();
    assert_eq!(report.groups[0].findings.len(), 1);
    let finding = &report.groups[0].findings[0];
    assert_eq!((&finding.path, finding.offset), (&segment, 64));
    assert!(report.groups[1].findings.is_empty());

    scene.receiver = scene.site.start().await;
    let status = scene.receiver.status();
    assert_eq!((status[0].role, status[1].role), (Role::Broken, Role::Replica));
    let line = status[0].last_error.clone().unwrap();
    let begin = format!("{}: at offset 64: frame header: checksum", segment.display());
    assert!(line.starts_with(&begin) && line.ends_with("run `twinsite check`"), "{line}");
    assert_eq!(scene.refused(hello("db", &[("root", SIZE)])).await, (CloseCode::Storage, line));
    let error = scene.receiver.failover("a/db", None).await.unwrap_err().to_string();
    assert!(error.starts_with("group 'a/db' cannot be used: "), "{error}");
    let mut other = Primary::open(scene.site.connect(&scene.receiver, 1).await, hello("db", &[("root", SIZE)])).await;
    assert_eq!(other.next, 2);
    other.commit(vec![data(1, 1, 1)]).await;
}
