//! Primaries that break the rules of a handback: each gets one exact line, and the group is what it was.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::collections::BTreeSet;

use common::*;
use proto::handback::{Ask, Want};
use proto::{BlockExtent, BlockIndex, CloseCode, EpochId, Generation, Message, Point, SessionToken, VolumeIndex};
use receiver::Receiver;

const SIZE: u64 = 16 * 4096;
/// `hello` has one volume of that name.
const VOLUME: &[(&str, u64)] = &[("root", SIZE)];

/// A group `a/db` with the points 1.1 and 1.2, whose primary has gone.
async fn scene() -> (Site, Receiver) {
    let site = Site::new(&["a"]);
    let receiver = site.start().await;
    let mut primary = Primary::open(site.connect(&receiver, 0).await, hello("db", VOLUME)).await;
    primary.commit(vec![data(0, 8, 3)]).await;
    primary.commit(vec![data(4, 8, 5)]).await;
    primary.control.connection.close(0_u32.into(), b"");
    (site, receiver)
}

fn point(generation: u64, epoch: u64) -> Point {
    Point { generation: Generation(generation), epoch: EpochId(epoch) }
}

/// Asks, and is told that it may be given.
async fn ready(site: &Site, receiver: &Receiver, to: Option<Point>) -> Control {
    let connection = site.connect(receiver, 0).await;
    let (send, recv) = connection.open_bi().await.unwrap();
    let mut control = Control { connection, send, recv };
    let ask = Ask {
        version_min: 1,
        version_max: 1,
        block_bytes: 4096,
        group: name("db"),
        generation: Generation(1),
        token: SessionToken([9; 16]),
        to,
        named: None,
        volumes: hello("db", VOLUME).volumes,
    };
    control.say(&Message::Handback(ask)).await;
    let Message::Ready(ready) = control.hear().await else { panic!("it may be given") };
    assert_eq!((ready.newest, ready.generation), (point(1, 2), Generation(if to.is_some() { 1 } else { 2 })));
    control
}

fn forks(site: &Site) -> BTreeSet<String> {
    let listed = std::fs::read_dir(site.store().join("a/db/forks")).unwrap();
    listed.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

async fn told(mut control: Control, line: &str) {
    assert_eq!(control.hear_close().await, (CloseCode::Misbehaved as u16, line.to_owned()));
}

/// Before a rollback all is committed: what a primary sends to be kept all the same is refused, however it is sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_takes_nothing_to_be_kept() {
    let (site, receiver) = scene().await;
    let mut control = ready(&site, &receiver, Some(point(1, 1))).await;
    let mut stream = control.connection.open_uni().await.unwrap();
    stream.write_all(&data(0, 4, 7).frame(2, 0)).await.unwrap();
    stream.finish().unwrap();
    control.say(&Message::Diverged { frames: 1, digest: [0; 32] }).await;
    told(control, "the primary sent diverged while this side was waiting to give").await;
    assert_eq!(forks(&site), BTreeSet::new());
    let again = Primary::open(site.connect(&receiver, 0).await, hello("db", VOLUME)).await;
    assert_eq!((again.generation, again.next), (1, 3), "the group follows as before");
}

/// Would catch a primary that has the receiver write for ever, or keep what nobody sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_to_be_kept_is_each_block_once_and_what_was_sent() {
    let (site, receiver) = scene().await;
    receiver.failover("a/db", None).await.unwrap();
    let control = ready(&site, &receiver, None).await;
    let mut stream = control.connection.open_uni().await.unwrap();
    for _ in 0..5 {
        // The stream may be stopped by now.
        let _ = stream.write_all(&data(0, 4, 7).frame(2, 0)).await;
    }
    told(control, "the primary sent more blocks of its own than its disks have").await;

    let mut control = ready(&site, &receiver, None).await;
    let mut stream = control.connection.open_uni().await.unwrap();
    stream.write_all(&data(0, 4, 7).frame(2, 0)).await.unwrap();
    stream.finish().unwrap();
    control.say(&Message::Diverged { frames: 1, digest: [0; 32] }).await;
    told(control, "the primary's own blocks did not arrive as it sent them: try again").await;
    assert!(!forks(&site).iter().any(|name| name.starts_with("diverged")), "nothing was named");
    let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while forks(&site) != BTreeSet::from(["active-2".to_owned()]) {
        assert!(std::time::Instant::now() < until, "nothing is left of it: {:?}", forks(&site));
        tokio::task::yield_now().await;
    }

    let mut control = ready(&site, &receiver, None).await;
    let beyond = vec![BlockExtent { start: BlockIndex(15), blocks: 2 }];
    control.say(&Message::Want(Want { volume: VolumeIndex(0), extents: beyond })).await;
    let (code, line) = control.hear_close().await;
    assert_eq!(code, CloseCode::Misbehaved as u16, "{line}");
    assert_eq!(receiver.status()[0].generation, Generation(2), "the copy is active as before");
}
