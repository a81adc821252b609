//! A primary over QUIC against a real receiver: commits, points, views, restarts, failover.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "../../tests/support/stalls.rs"]
#[allow(dead_code, reason = "every test uses a part of it")]
mod stalls;

use std::sync::Arc;
use std::time::Instant;

use blockdev::{Buf, IoThreads};
use common::*;
use proto::{Generation, Message};
use stalls::Stalls;

const SIZE: u64 = 3 * 1024 * 4096 + 1000;

/// Every point, also those across restarts, in several passes, several volumes and several segments, reads as it was cut.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_point_reads_as_it_was_cut_also_after_a_restart() {
    let site = Site::new(&["a"]);
    let io = IoThreads::new(1).unwrap();
    let receiver = site.start().await;
    let volumes = [("root", SIZE), ("logs", 64 * 4096)];
    let mut primary = Primary::open(site.connect(&receiver, 0).await, hello("db", &volumes)).await;
    assert_eq!(primary.generation, 1);
    primary.commit(vec![data(0, 32, 1), data(100, 7, 2), Change::Data { volume: 1, start: 3, blocks: 2, seed: 9 }]).await;
    // Several passes: the later one wins. More than one segment.
    let passes: Vec<Vec<Change>> = vec![
        (0..40).map(|i| data(i * 32, 32, i as u8)).collect(),
        vec![data(10, 3, 77), zero(40, 50)],
        vec![data(45, 1, 78), data(3071, 1, 5), zero(3072, 1)],
    ];
    let point = primary.send(&passes).await;
    primary.committed(point).await;
    // A small epoch, then some in flight at once.
    primary.commit(vec![zero(0, 1)]).await;
    let mut sent = Vec::new();
    for i in 0..10 {
        sent.push(primary.send(&[vec![data(i * 5, 9, i as u8 + 100), zero(i * 9, 2)]]).await);
    }
    for point in sent {
        primary.committed(point).await;
    }
    check_images(&io, &receiver, "db", &primary.images).await;
    let status = receiver.status();
    assert_eq!((status[0].points, status[0].committed.unwrap().point), (13, point_of(13)));
    assert!(status[0].peer.is_some() && status[0].journal_bytes > 1000 && status[0].index_bytes > 0);
    let Primary { mut images, disks, control, .. } = primary;
    receiver.shutdown().await;
    drop(control);

    let receiver = site.start().await;
    check_images(&io, &receiver, "a/db", &images).await;
    let mut hello = hello("db", &volumes);
    hello.generation = Generation(1);
    let mut primary = Primary::open(site.connect(&receiver, 0).await, hello).await;
    assert_eq!(primary.next, 14);
    primary.disks = disks;
    primary.commit(vec![data(1, 1, 200)]).await;
    images.append(&mut primary.images);
    check_images(&io, &receiver, "db", &images).await;
    receiver.shutdown().await;
}

fn point_of(epoch: u64) -> proto::Point {
    point(1, epoch)
}

/// An epoch that was not sealed leaves no trace: not after a reset, not after a lost session, not for the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unsealed_epoch_leaves_no_trace() {
    let site = Site::new(&["a"]);
    let io = IoThreads::new(1).unwrap();
    let receiver = site.start().await;
    let volumes = [("root", SIZE)];
    let mut primary = Primary::open(site.connect(&receiver, 0).await, hello("db", &volumes)).await;
    primary.commit(vec![data(0, 32, 1)]).await;
    let journal = receiver.status()[0].journal_bytes;
    // Three megabytes of an epoch, over segments, then a reset.
    let frames: Vec<_> = (0..90).map(|i| data(i * 32, 32, i as u8).frame(2, 0)).collect();
    let mut stream = primary.control.connection.open_uni().await.unwrap();
    let header =
        proto::pass::PassHeader { epoch: proto::EpochId(2), pass: 0, kind: proto::pass::PassKind::Fuzzy, continued: false };
    stream.write_all(&header.encode()).await.unwrap();
    stream.write_all(&frames.concat()).await.unwrap();
    let arrived = |receiver: &receiver::Receiver| receiver.status()[0].bytes_received;
    let deadline = Instant::now() + DEADLINE;
    while arrived(&receiver) < 60_000 {
        assert!(Instant::now() < deadline, "frames arrive");
        tokio::task::yield_now().await;
    }
    stream.reset(7_u32.into()).unwrap();
    // The same epoch again, with other content.
    primary.commit(vec![data(5, 1, 50)]).await;
    check_images(&io, &receiver, "db", &primary.images).await;
    assert!(receiver.status()[0].journal_bytes < journal + 10_000, "the reset frames are gone");
    // A second session takes over; the first is told.
    let mut second = Primary::open(site.connect(&receiver, 0).await, hello("db", &volumes)).await;
    assert_eq!(second.next, 3);
    let (code, reason) = primary.control.hear_close().await;
    assert_eq!((code, reason.as_str()), (5, "another session of group 'db' took over"));
    second.disks = primary.disks.clone();
    second.commit(vec![data(6, 1, 51)]).await;
    check_images(&io, &receiver, "db", &second.images).await;
    check_images(&io, &receiver, "db", &primary.images).await;
    receiver.shutdown().await;
}

/// Failover: the primary is fenced, now and later; the fork is writable, the same after a restart, and asked twice it is the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failover_fences_and_gives_a_fork_that_survives_restarts() {
    let site = Site::new(&["a"]);
    let io = IoThreads::new(2).unwrap();
    let receiver = site.start().await;
    let volumes = [("root", SIZE)];
    let mut primary = Primary::open(site.connect(&receiver, 0).await, hello("db", &volumes)).await;
    primary.commit(vec![data(0, 32, 1)]).await;
    primary.commit(vec![data(5, 3, 2)]).await;
    let active = receiver.failover("db", Some(point(1, 2))).await.unwrap();
    assert_eq!((active.generation, active.point), (Generation(2), point(1, 2)));
    assert_eq!(primary.control.hear().await, Message::Fenced { generation: Generation(2) });
    let (_, answer) = Control::open(site.connect(&receiver, 0).await, hello("db", &volumes)).await;
    assert_eq!(answer, Message::Fenced { generation: Generation(2) });

    let mut image = primary.images[&point(1, 2)][0].clone();
    let device = Arc::clone(&active.volumes[0].1);
    let write = |device: Arc<dyn blockdev::BlockDevice>, at: u64, bytes: Vec<u8>| {
        io.call(move || async move {
            device.write(at, Buf::copy_of(&bytes)).await?;
            device.flush().await
        })
    };
    write(Arc::clone(&device), 4000, vec![7; 5000]).await.unwrap().unwrap();
    image[4000..9000].fill(7);
    assert!(read_all(&io, Arc::clone(&device)).await.unwrap() == image);
    let again = receiver.failover("a/db", None).await.unwrap();
    assert!(Arc::ptr_eq(&again.volumes[0].1, &device));
    let error = receiver.failover("db", Some(point(1, 1))).await.unwrap_err().to_string();
    assert_eq!(error, "group 'db' is active already, from point 1.2: it cannot be activated from point 1.1 too");
    let status = receiver.status();
    assert_eq!((status[0].role, status[0].generation), (receiver::Role::Active, Generation(2)));
    drop((active, again, device));
    receiver.shutdown().await;

    let receiver = site.start().await;
    let started = Instant::now();
    let mut found = receiver.activated().await;
    let active = found.pop().unwrap().unwrap();
    assert!(found.is_empty() && active.generation == Generation(2));
    assert!(read_all(&io, Arc::clone(&active.volumes[0].1)).await.unwrap() == image);
    assert!(started.elapsed().as_secs() < 5);
    let (_, answer) = Control::open(site.connect(&receiver, 0).await, hello("db", &volumes)).await;
    assert_eq!(answer, Message::Fenced { generation: Generation(2) });
    drop(active);
    receiver.shutdown().await;
}

/// A frame that rots in the journal reads as an error, never as data; everything else reads on, and `check` names it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotten_frame_is_an_error_and_never_data() {
    let site = Site::new(&["a"]);
    let io = IoThreads::new(1).unwrap();
    let receiver = site.start().await;
    let mut primary = Primary::open(site.connect(&receiver, 0).await, hello("db", &[("root", SIZE)])).await;
    let frame = data(0, 8, 2).frame(1, 0);
    primary.commit(vec![data(0, 8, 2)]).await;
    primary.commit(vec![data(100, 8, 4)]).await;
    let segment = only_file(&site.store().join("a/db/journal"));
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[64 + frame.len() - 1] ^= 1;
    std::fs::write(&segment, &bytes).unwrap();
    let (_, mut views) = receiver.view("db", None).await.unwrap();
    let view = Arc::new(views.pop().unwrap().1);
    let read = |at: u64, length: usize| {
        let view = Arc::clone(&view);
        io.call(move || async move { blockdev::BlockDevice::read(&*view, at, Buf::zeroed(length)).await })
    };
    let error = read(4096, 100).await.unwrap().unwrap_err().to_string();
    let begin = format!("{}: the frame at offset 64 is damaged (frame payload: checksum", segment.display());
    assert!(error.starts_with(&begin), "{error}");
    let good = read(100 * 4096, 8 * 4096).await.unwrap().unwrap();
    assert!(*good == primary.disks[0][100 * 4096..108 * 4096]);
    receiver.shutdown().await;
    let mut told = Vec::new();
    let report = receiver::check::check(&site.store(), &mut |p| told.push(p)).unwrap();
    let group = &report.groups[0];
    assert_eq!((group.points, group.frames, group.findings.len()), (2, 2, 1));
    assert_eq!((&group.findings[0].path, group.findings[0].offset), (&segment, 64));
    assert!(told.last().is_some_and(|p| p.bytes_total == bytes.len() as u64 && p.bytes_done > 0));
}

/// A fork that is read in small pieces all over, of more than is kept in memory: right at the first read and at the later ones, which decode
/// nothing, also beside writes; what it kept is shown as a queue and goes with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fork_read_in_small_pieces_keeps_what_it_decoded() {
    const FRAMES: u64 = 96;
    let site = Site::in_memory(&["a"]);
    let io = IoThreads::new(1).unwrap();
    let receiver = site.start().await;
    let size = FRAMES * 32 * BLOCK as u64;
    let mut primary = Primary::open(site.connect(&receiver, 0).await, hello("db", &[("root", size)])).await;
    primary.commit((0..FRAMES).map(|n| data(n * 32, 32, 2)).collect()).await;
    primary.commit(vec![data(7, 1, 4), data(40, 3, 6), zero(100, 2)]).await;
    let kept = || {
        let queues = receiver.status().remove(0).queues;
        queues.into_iter().find(|queue| queue.name == "kept frame bytes").map(|queue| (queue.used, queue.limit))
    };
    assert_eq!(kept(), None);
    let active = receiver.failover("db", None).await.unwrap();
    let device = Arc::clone(&active.volumes[0].1);
    let mut oracle = primary.disks[0].clone();
    let mut tried_right = 0;
    for pass in 0..3_u64 {
        // Every block once, far from each other.
        for n in 0..FRAMES * 32 {
            let at = n * 1021 % (FRAMES * 32) * BLOCK as u64;
            let length = if n % 7 == 0 { 512 } else { BLOCK };
            let reader = Arc::clone(&device);
            let (tried, read) = io
                .call(move || async move {
                    let mut buf = vec![0; length];
                    let tried = reader.try_read(at, &mut buf).map(|done| done.map(|()| buf).unwrap());
                    (tried, reader.read(at, Buf::zeroed(length)).await.unwrap().to_vec())
                })
                .await
                .unwrap();
            let wanted = &oracle[at as usize..at as usize + length];
            assert!(read == wanted, "{length} bytes at {at} in pass {pass}");
            assert!(tried.as_ref().is_none_or(|tried| tried == wanted), "{length} bytes at {at} in pass {pass}, at once");
            tried_right += u64::from(pass > 0 && tried.is_some());
        }
        let (used, limit) = kept().expect("a fork keeps what it decodes");
        assert!(used > 8 << 20 && used <= limit, "{used} of {limit}: more than is kept in memory");
        let (at, writer) = ((pass + 50) * 32 * BLOCK as u64, Arc::clone(&device));
        io.call(move || async move { writer.write(at, Buf::copy_of(&[9; 3 * BLOCK])).await.map(drop) }).await.unwrap().unwrap();
        oracle[at as usize..at as usize + 3 * BLOCK].fill(9);
    }
    // Whole blocks, but for a page that is not in memory any more, need no waiting.
    assert!(tried_right > FRAMES * 32, "{tried_right}");
    drop((active, device));
    receiver.shutdown().await;
}

/// The first read after a failover of a sparse 1 TiB disk, also after a restart, does not depend on its size.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failover_of_a_tebibyte_answers_within_a_second() {
    let site = Site::in_memory(&["a"]);
    let io = IoThreads::new(1).unwrap();
    let receiver = site.start().await;
    let mut small = hello("db", &[("root", 4096)]);
    small.volumes[0].size_bytes = 1 << 40;
    let (mut control, _) = Control::open(site.connect(&receiver, 0).await, small).await;
    let frame = data((1 << 28) - 4, 4, 2).frame(1, 0);
    let header =
        proto::pass::PassHeader { epoch: proto::EpochId(1), pass: 0, kind: proto::pass::PassKind::Frozen, continued: false };
    control.pass(header, &frame).await;
    control.say(&Message::Seal(seal_of(1, 1, 1, &[frame]))).await;
    assert_eq!(control.hear().await, Message::Committed { point: point(1, 1) });
    receiver.shutdown().await;
    let receiver = site.start().await;
    let (stalls, started) = (Stalls::start(), Instant::now());
    let active = receiver.failover("db", None).await.unwrap();
    let device = Arc::clone(&active.volumes[0].1);
    let last = io
        .call(move || async move {
            device.read(1 << 39, Buf::zeroed(4096)).await?;
            device.read((1 << 40) - 4096, Buf::zeroed(4096)).await
        })
        .await
        .unwrap()
        .unwrap();
    let (took, ran) = (started.elapsed(), stalls.ran_since(started));
    assert!(ran.as_millis() < 1000, "{took:?}, {ran:?} without what the machine stood still");
    assert!(*last == fill(2, (1 << 28) - 1)[..]);
    drop(active);
    receiver.shutdown().await;
}
