//! Figures, not checks: `cargo test --release -p twinsite-receiver --test measure -- --ignored --nocapture --test-threads 1`.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::time::{Duration, Instant};

use blockdev::{BlockDevice, Buf, IoThreads};
use common::*;
use proto::control::{PassHeader, PassKind};
use proto::frame::encode_data;
use proto::{Codec, EpochId, Message, VolumeIndex};
use receiver::Limits;

fn rss_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

async fn open(site: &Site, receiver: &receiver::Receiver, size: u64) -> Primary {
    let (control, answer) = Control::open(site.connect(receiver, 0).await, hello("db", &[("root", size)])).await;
    let Message::Welcome { generation, committed, .. } = answer else { panic!("{answer:?}") };
    Primary {
        control,
        generation: generation.0,
        next: committed.map_or(1, |p| p.epoch.0 + 1),
        disks: Vec::new(),
        images: Default::default(),
    }
}

async fn epoch(primary: &mut Primary, frames: &[Vec<u8>]) {
    let header = PassHeader { epoch: EpochId(primary.next), pass: 0, kind: PassKind::Frozen };
    let mut stream = primary.control.connection.open_uni().await.unwrap();
    stream.write_all(&header.encode()).await.unwrap();
    for frame in frames {
        stream.write_all(frame).await.unwrap();
    }
    stream.finish().unwrap();
    let seal = seal_of(primary.generation, primary.next, 1, frames);
    primary.next += 1;
    primary.control.say(&Message::Seal(seal)).await;
    primary.committed(seal.point()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long; prints figures"]
async fn figures() {
    let mut site = Site::new(&["a"]);
    site.limits = Limits::default();
    let receiver = site.start().await;
    let size = 1_u64 << 40;
    let mut primary = open(&site, &receiver, size).await;

    let mut commits = Vec::new();
    for i in 0..200 {
        let frames = [data(i * 9, 8, 2).frame(primary.next, 0)];
        let start = Instant::now();
        epoch(&mut primary, &frames).await;
        commits.push(start.elapsed());
    }
    commits.sort();
    println!("commit of 32 KiB: p50 {:?} p99 {:?}", commits[100], commits[197]);

    random(&site, &receiver, &mut primary, size).await;
    let content: Vec<u8> = (0..32).flat_map(|b| fill(2, b)).collect();
    let n = 4000_u64;
    let epoch_id = EpochId(primary.next);
    let frames: Vec<_> =
        (0..n).map(|i| encode_data(VolumeIndex(0), epoch_id, 0, &[extent(i * 32, 32)], &content, Codec::Raw)).collect();
    let start = Instant::now();
    epoch(&mut primary, &frames).await;
    let took = start.elapsed();
    println!("ingest with commit: {:.0} MB/s ({n} frames of 128 KiB)", (n * 131_072) as f64 / 1e6 / took.as_secs_f64());
    drop(frames);

    receiver.shutdown().await;
    drop(primary);

    let start = Instant::now();
    let receiver = site.start().await;
    println!("restart with {} points: {:?}", receiver.points("db").unwrap().len(), start.elapsed());
    let io = IoThreads::new(1).unwrap();
    let start = Instant::now();
    let active = receiver.failover("db", None).await.unwrap();
    let device = std::sync::Arc::clone(&active.volumes[0].1);
    io.call(move || async move { device.read(0, Buf::zeroed(4096)).await.unwrap() }).await.unwrap();
    println!("failover of 1 TiB to the first read: {:?}", start.elapsed());
    drop(active);
    let start = Instant::now();
    let (_, views) = receiver.view("db", Some(point(1, 150))).await.unwrap();
    println!("view of an earlier point: {:?}", start.elapsed());
    let view = views.into_iter().next().unwrap().1;
    let start = Instant::now();
    io.call(move || async move {
        for i in 0..4000_u64 {
            view.read(i * 131_072, Buf::zeroed(131_072)).await.unwrap();
        }
    })
    .await
    .unwrap();
    println!("sequential read of a view: {:.0} MB/s", 4000.0 * 0.131_072 / start.elapsed().as_secs_f64());
    receiver.shutdown().await;
}

async fn random(site: &Site, receiver: &receiver::Receiver, primary: &mut Primary, size: u64) {
    // 20,000 random blocks an epoch, in frames of 32 blocks; contents compress, so that the disk is not what is measured.
    let (before, index_before) = (rss_bytes(), receiver.status()[0].index_bytes);
    let mut x = 88_172_645_463_325_252_u64;
    let content = vec![1; 131_072];
    let (epochs, start) = (120, Instant::now());
    let mut slowest = Duration::ZERO;
    for n in 0..epochs {
        if [1, 10, 60].contains(&n) {
            println!("  before epoch {n}: process {} MiB", rss_bytes() >> 20);
        }
        let mut blocks: Vec<u64> = (0..20_000)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x % (size / 4096)
            })
            .collect();
        blocks.sort_unstable();
        blocks.dedup();
        let id = EpochId(primary.next);
        let frames: Vec<_> = blocks
            .chunks_exact(32)
            .map(|c| {
                let extents: Vec<_> = c.iter().map(|b| extent(*b, 1)).collect();
                encode_data(VolumeIndex(0), id, 0, &extents, &content, Codec::Lz4)
            })
            .collect();
        let begin = Instant::now();
        epoch(primary, &frames).await;
        slowest = slowest.max(begin.elapsed());
    }
    let blocks = f64::from(epochs) * 20_000.0;
    let index = receiver.status()[0].index_bytes - index_before;
    println!(
        "random: {epochs} epochs of 20,000 blocks in {:?}, slowest {slowest:?}; estimated index {:.1} B a block, resident {:.1} B a block, process {} MiB",
        start.elapsed(),
        index as f64 / blocks,
        (rss_bytes() - before) as f64 / blocks,
        rss_bytes() >> 20
    );
    let started = Instant::now();
    drop(receiver.view("db", Some(point(1, 150))).await.unwrap());
    println!("view of an earlier point: {:?}, store at {}", started.elapsed(), site.store().display());
}
