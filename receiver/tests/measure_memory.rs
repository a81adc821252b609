//! Resident memory of a receiver in a process of its own, while a 1 TiB disk is written at random:
//! `cargo test --release -p twinsite-receiver --test measure_memory -- --ignored --nocapture --exact memory`.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::*;
use proto::control::{PassHeader, PassKind};
use proto::frame::encode_data;
use proto::{Codec, EpochId, Identity, Message, VolumeIndex};
use receiver::{ClientConfig, Limits, Receiver, ReceiverConfig};

/// The other process: a receiver until its parent removes the folder's `run` file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "started by `memory`"]
async fn child() {
    let Some(dir) = std::env::var_os("TWINSITE_MEASURE").map(PathBuf::from) else { return };
    let identity = Identity::from_pem(&std::fs::read_to_string(dir.join("server.pem")).unwrap()).unwrap();
    let key = std::fs::read_to_string(dir.join("client")).unwrap().parse().unwrap();
    let config = ReceiverConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        store: dir.join("store"),
        clients: vec![ClientConfig { name: name("a"), key, groups: None, space_max_bytes: None }],
        limits: Limits::default(),
    };
    let receiver = Receiver::start(config, identity).await.unwrap();
    std::fs::write(dir.join("address.new"), receiver.local_addr().unwrap().to_string()).unwrap();
    std::fs::rename(dir.join("address.new"), dir.join("address")).unwrap();
    while dir.join("run").exists() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    println!("index estimated {} MiB", receiver.status()[0].index_bytes >> 20);
    receiver.shutdown().await;
}

fn memory_of(pid: u32) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    text.lines().filter(|l| l.starts_with("VmRSS") || l.starts_with("VmHWM")).collect::<Vec<_>>().join(" ")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long; prints figures"]
async fn memory() {
    let dir = tempfile::tempdir().unwrap();
    let pem = Identity::generate_pem().unwrap();
    let (server, client) = (Identity::from_pem(&pem).unwrap(), identity());
    std::fs::write(dir.path().join("server.pem"), pem).unwrap();
    std::fs::write(dir.path().join("client"), client.fingerprint().to_string()).unwrap();
    std::fs::write(dir.path().join("run"), "").unwrap();
    let mut process = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "child", "--nocapture"])
        .env("TWINSITE_MEASURE", dir.path())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + DEADLINE;
    while !dir.path().join("address").exists() {
        assert!(Instant::now() < deadline, "the receiver starts");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let address = std::fs::read_to_string(dir.path().join("address")).unwrap().parse().unwrap();
    let size = 1_u64 << 40;
    let connection = dial(address, &client, server.fingerprint()).await.unwrap();
    let (mut control, answer) = Control::open(connection, hello("db", &[("root", size)])).await;
    assert!(matches!(answer, Message::Welcome { .. }));
    // Content that does not compress: 80 MB an epoch, as a guest's random writes may be.
    let content: Vec<u8> = (0..32).flat_map(|b| fill(2, b)).collect();
    let compressible = vec![7; content.len()];
    let mut x = 88_172_645_463_325_252_u64;
    for epoch in 1..=120_u64 {
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
        // Every tenth epoch in full, the others small, so that the disk is spared.
        let content = if epoch % 10 == 0 { &content } else { &compressible };
        let frame = |c: &[u64]| {
            let extents: Vec<_> = c.iter().map(|b| extent(*b, 1)).collect();
            encode_data(VolumeIndex(0), EpochId(epoch), 0, &extents, content, Codec::Lz4)
        };
        let frames: Vec<_> = blocks.chunks_exact(32).map(frame).collect();
        control.pass(PassHeader { epoch: EpochId(epoch), pass: 0, kind: PassKind::Frozen }, &frames.concat()).await;
        let seal = seal_of(1, epoch, 1, &frames);
        control.say(&Message::Seal(seal)).await;
        assert_eq!(control.hear().await, Message::Committed { point: seal.point() });
        if [1, 9, 10, 60, 120].contains(&epoch) {
            println!("after {epoch} epochs of 20,000 blocks: {}", memory_of(process.id()));
        }
    }
    std::fs::remove_file(dir.path().join("run")).unwrap();
    process.wait().unwrap();
}
