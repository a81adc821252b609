//! An epoch over several connections, and over restarts of the receiver.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::time::Instant;

use blockdev::IoThreads;
use common::*;
use proto::control::Staged;
use proto::pass::{PassHeader, PassKind};
use proto::{EpochId, Message};
use receiver::Receiver;

const SIZE: u64 = 16 << 20;
const FRAMES: u64 = 90;

/// An epoch of twelve megabytes that do not compress, which is several segments.
struct Epoch {
    number: u64,
    changes: Vec<Change>,
    frames: Vec<Vec<u8>>,
}

impl Epoch {
    fn new(number: u64) -> Self {
        let changes: Vec<_> = (0..FRAMES).map(|i| data(i * 32, 32, ((i + number) * 2) as u8)).collect();
        let frames = changes.iter().map(|c| c.frame(number, 0)).collect();
        Self { number, changes, frames }
    }

    fn header(&self, continued: bool) -> PassHeader {
        PassHeader { epoch: EpochId(self.number), pass: 0, kind: PassKind::Frozen, continued }
    }

    /// Sends frames of it from `from` on and half of the next, waits until some are in the journal, and loses the connection.
    async fn breaks(&self, control: Control, receiver: &Receiver, from: u64, frames: u64) {
        let arrived = || receiver.status()[0].bytes_received;
        let (before, (from, to)) = (arrived(), (from as usize, (from + frames) as usize));
        let whole = self.frames[from..to].concat();
        let mut stream = control.connection.open_uni().await.unwrap();
        stream.write_all(&self.header(from > 0).encode()).await.unwrap();
        stream.write_all(&[whole.as_slice(), &self.frames[to][..self.frames[to].len() / 2]].concat()).await.unwrap();
        let deadline = Instant::now() + DEADLINE;
        while arrived() == before {
            assert!(Instant::now() < deadline, "frames arrive");
            tokio::task::yield_now().await;
        }
        control.connection.close(0_u32.into(), b"broken");
    }
}

/// A session, and what its welcome said of the next epoch.
async fn greeted(site: &Site, receiver: &Receiver) -> (Control, Option<Staged>) {
    let (control, answer) = Control::open(site.connect(receiver, 0).await, hello("db", &[("root", SIZE)])).await;
    let Message::Welcome { staged, .. } = answer else { panic!("not let in: {answer:?}") };
    (control, staged)
}

/// Would catch frames that are lost, kept twice or shown too early when a connection breaks or the receiver is restarted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_epoch_goes_on_over_connections_and_restarts() {
    let site = Site::new(&["a"]);
    let io = IoThreads::new(1).unwrap();
    let mut receiver = site.start().await;
    let mut primary = Primary::open(site.connect(&receiver, 0).await, hello("db", &[("root", SIZE)])).await;
    primary.commit(vec![data(0, 32, 1)]).await;
    let mut control = primary.control;
    let epoch = Epoch::new(2);
    let mut has = 0;
    for restarts in [false, true, false] {
        epoch.breaks(control, &receiver, has, 20).await;
        if restarts {
            receiver.shutdown().await;
            receiver = site.start().await;
        }
        let staged;
        (control, staged) = greeted(&site, &receiver).await;
        let staged = staged.expect("whole frames stay");
        assert!(staged.frames > has && staged.frames <= has + 20, "{staged:?} after {has} and 20 frames");
        assert_eq!(staged.digest, seal_of(1, 2, 1, &epoch.frames[..staged.frames as usize]).digest);
        has = staged.frames;
        check_images(&io, &receiver, "db", &primary.images).await;
    }
    control.pass(epoch.header(true), &epoch.frames[has as usize..].concat()).await;
    let seal = seal_of(1, 2, 1, &epoch.frames);
    control.say(&Message::Seal(seal)).await;
    assert_eq!(control.hear().await, Message::Committed { point: seal.point() });
    epoch.changes.iter().for_each(|change| change.apply(&mut primary.disks));
    primary.images.insert(seal.point(), primary.disks.clone());
    check_images(&io, &receiver, "db", &primary.images).await;
    receiver.shutdown().await;
    check_images(&io, &site.start().await, "db", &primary.images).await;
}

/// Would catch what is left of a given up epoch in the one that takes its place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_epoch_that_begins_anew_has_nothing_of_what_was_there() {
    let site = Site::new(&["a"]);
    let io = IoThreads::new(1).unwrap();
    let receiver = site.start().await;
    let mut primary = Primary::open(site.connect(&receiver, 0).await, hello("db", &[("root", SIZE)])).await;
    primary.commit(vec![data(0, 32, 1)]).await;
    let before = receiver.status()[0].journal_bytes;
    Epoch::new(2).breaks(primary.control, &receiver, 0, 60).await;
    let (control, staged) = greeted(&site, &receiver).await;
    assert!(staged.is_some() && receiver.status()[0].journal_bytes > before + 100_000, "it is there, and counted");
    primary.control = control;
    // In one piece with its header: nothing of it may be dropped with the old frames.
    primary.commit(vec![data(5, 1, 50), data(9, 32, 60)]).await;
    check_images(&io, &receiver, "db", &primary.images).await;
    assert!(receiver.status()[0].journal_bytes < before + 200_000, "the old frames are gone");
    // What goes on must be announced, and only where something was left.
    let (mut control, staged) = greeted(&site, &receiver).await;
    assert_eq!(staged, None);
    control.pass(Epoch::new(3).header(true), &[]).await;
    let (code, reason) = control.hear_close().await;
    assert_eq!((code, reason.contains("goes on behind staged frames")), (7, true), "{reason}");
    receiver.shutdown().await;
}
