//! `durability = "flush-sync"`: what a guest was told is durable survives the loss of the site.
//!
//! A database on a file system on the export, and a plain client that writes and flushes, remember what was acknowledged. The whole
//! primary gets SIGKILL at a random moment, and the copy is activated at once: it must have every acknowledged commit and every flushed
//! write, not only those before the newest cut that somebody happened to wait for.
//!
//! `TWINSITE_FLUSH_SYNC_KILLS` is the number of kills of each test, `TWINSITE_SEED` repeats a run.
//!
//! Would catch: a flush that is answered before its epoch is committed, an epoch that lacks a write acknowledged before the flush, a
//! flush whose epoch was given up and that is answered all the same, a flush that waits for the interval, or for ever, or that is
//! answered well because the node stops.

mod support;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::process::Signal;
use support::block::Disk;
use support::nbd::Nbd;
use support::node::{Node, free_address, group_config, receiver_config};
use support::postgres::{self, Server, record_and_tell};
use support::{Process, eventually, one_at_a_time, run, scratch, seed, sparse};

const KILLS: u32 = 3;
const GROUP: &str = "db";
/// Far longer than the test: whatever is committed is committed because of a flush.
const INTERVAL: &str = "1h";
const PG_BYTES: u64 = 512 << 20;
const MIB: u64 = 1 << 20;
/// pgbench beside the recording client, so that flushes meet.
const CLIENTS: &str = "2";
/// The primary is killed at a random moment of this span after the first commits of the load.
const KILL_AFTER_MS: std::ops::Range<u64> = 300..1500;
/// Commits of a cycle that must be acknowledged, or it would show nothing.
const COMMITS_MIN: usize = 3;

fn kills() -> u32 {
    std::env::var("TWINSITE_FLUSH_SYNC_KILLS").ok().map_or(KILLS, |n| n.parse().expect("TWINSITE_FLUSH_SYNC_KILLS is a number"))
}

/// A receiver and a primary with one disk `data`, in flush-sync.
struct Sites {
    receiver: Node,
    primary: Node,
    socket: PathBuf,
}

impl Sites {
    fn start(folder: &Path, image: impl FnOnce(&Path)) -> Self {
        let (mut receiver, mut primary) = (Node::new(folder, "receiver"), Node::new(folder, "primary"));
        let (listen, store) = (free_address(), folder.join("receiver/store"));
        let (receiver_key, primary_key) = (receiver.key(), primary.key());
        let (path, socket) = (primary.folder.join("data.raw"), primary.folder.join("data.sock"));
        image(&path);
        let group = group_config(GROUP, &listen, &receiver_key, INTERVAL, &[("data", &path, &socket)]);
        receiver.configure(&receiver_config(&listen, &store, "primary", &primary_key));
        let group = group.replacen("interval", "durability = \"flush-sync\"\ninterval", 1);
        primary.configure(&format!("stop_timeout = \"1s\"\n\n{group}"));
        receiver.start();
        primary.start();
        primary.committed_once(GROUP);
        Self { receiver, primary, socket }
    }
}

/// A disk with a database in it, made once and copied for each cycle.
fn template(folder: &Path) -> PathBuf {
    let image = folder.join("template.raw");
    sparse(&image, PG_BYTES);
    let mount = folder.join("mnt-template");
    std::fs::create_dir_all(&mount).expect("a mount point");
    let (file, at) = (image.to_str().expect("UTF-8"), mount.to_str().expect("UTF-8"));
    run("mkfs.ext4", &["-q", "-F", file]);
    run("mount", &["-o", "loop", file, at]);
    let mut server = Server::new(folder.join("sockets-template"));
    server.create(&mount.join("data"));
    server.start(&mount.join("data"));
    server.fill("1");
    server.call("psql", &["-qc", "CHECKPOINT"]);
    server.end();
    run("umount", &[at]);
    image
}

#[test]
fn every_acknowledged_commit_survives_the_site() {
    postgres::needed();
    let _alone = one_at_a_time();
    let mut random = SmallRng::seed_from_u64(seed());
    let folder = scratch();
    let template = template(folder.path());
    let (kills, mut commits) = (kills(), 0);
    for kill in 1..=kills {
        let after = Duration::from_millis(random.random_range(KILL_AFTER_MS));
        let cycle = scratch();
        let acknowledged = cycle_of(cycle.path(), &template, after);
        commits += acknowledged;
        println!(
            "kill {kill} of {kills}: {} ms after the first commits, {acknowledged} commits acknowledged, all there",
            after.as_millis()
        );
    }
    println!("{kills} kills of the primary, {commits} acknowledged commits verified, none is missing");
}

/// One life of a primary. Returns the commits that were acknowledged, all of which the copy has.
fn cycle_of(folder: &Path, template: &Path, after: Duration) -> usize {
    let mut sites = Sites::start(folder, |image| {
        run("cp", &["--sparse=always", template.to_str().expect("UTF-8"), image.to_str().expect("UTF-8")]);
    });
    let before = folder.join("mnt-before");
    let acknowledged = {
        let mut disk = Disk::attach(folder, "before", &sites.socket, "data");
        disk.mount(&before);
        let mut server = Server::new(folder.join("sockets-before"));
        server.start(&before.join("data"));
        let mut bench = Process::start(
            server
                .command("pgbench")
                .args(["--client", CLIENTS, "--jobs", "1", "--time", "86400"])
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        );
        let sockets = server.sockets.clone();
        let so_far = Arc::new(AtomicUsize::new(0));
        let told = so_far.clone();
        let recorder = std::thread::spawn(move || record_and_tell(&sockets, |commits| told.store(commits, Ordering::SeqCst)));
        // A kill before anything was acknowledged would show nothing.
        eventually("commits", Duration::from_secs(60), || (so_far.load(Ordering::SeqCst) >= COMMITS_MIN).then_some(()));
        let kill_at = Instant::now() + after;
        eventually("the random moment", after + Duration::from_secs(5), || (Instant::now() >= kill_at).then_some(()));
        sites.primary.kill();
        bench.kill();
        server.end();
        let (acknowledged, error) = recorder.join().expect("the recorder");
        assert!(acknowledged.len() >= COMMITS_MIN, "only {} commits before: {error}", acknowledged.len());
        acknowledged
    };
    let socket = folder.join("copy.sock");
    let newest = sites.receiver.failover(GROUP, None, &socket);
    // All are due, whatever the cut: that is the promise.
    postgres::verify_copy(folder, &socket, "data", &newest, u64::MAX, &acknowledged);
    acknowledged.len()
}

/// Blocks of each writer of [`every_flushed_write_survives_the_site`].
const BLOCKS: u64 = 512;
const WRITERS: u64 = 3;
const BLOCK: u64 = 4096;

/// Content of a writer's block that was written as the number-th.
fn stamp(writer: u64, number: u64) -> Vec<u8> {
    let mut block = vec![writer as u8 + 1; BLOCK as usize];
    block[..8].copy_from_slice(&number.to_le_bytes());
    block
}

/// Where a writer's number-th write goes: round and round, so that a block has older and newer content.
fn place(writer: u64, number: u64) -> u64 {
    (writer * BLOCKS + number % BLOCKS) * BLOCK
}

/// A plain log of blocks, three at once on connections of their own, flushed after every few.
#[test]
fn every_flushed_write_survives_the_site() {
    let mut random = SmallRng::seed_from_u64(seed());
    let (kills, mut verified) = (kills(), 0);
    for kill in 1..=kills {
        let folder = scratch();
        let mut sites = Sites::start(folder.path(), |image| sparse(image, 8 * MIB));
        let (stop, flushed) = (Arc::new(AtomicBool::new(false)), Arc::new([const { AtomicU64::new(0) }; WRITERS as usize]));
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (stop, flushed, socket) = (stop.clone(), flushed.clone(), sites.socket.clone());
                let mut random = SmallRng::seed_from_u64(random.random());
                std::thread::spawn(move || {
                    let mut nbd = Nbd::connect(&socket, "data").expect("the export");
                    let mut number = 0;
                    while !stop.load(Ordering::SeqCst) {
                        for _ in 0..random.random_range(1..4) {
                            number += 1;
                            // The site is lost: what is not flushed may be.
                            let Ok(()) = nbd.write(place(writer, number), &stamp(writer, number)) else { return };
                        }
                        let Ok(()) = nbd.flush() else { return };
                        flushed[writer as usize].store(number, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        eventually("every writer has flushed", Duration::from_secs(20), || {
            flushed.iter().all(|n| n.load(Ordering::SeqCst) > 0).then_some(())
        });
        let kill_at = Instant::now() + Duration::from_millis(random.random_range(0..400));
        eventually("the random moment", Duration::from_secs(5), || (Instant::now() >= kill_at).then_some(()));
        sites.primary.kill();
        stop.store(true, Ordering::SeqCst);
        writers.into_iter().for_each(|w| w.join().expect("a writer"));
        let socket = folder.path().join("copy.sock");
        let point = sites.receiver.failover(GROUP, None, &socket);
        let mut copy = Nbd::connect(&socket, "data").expect("the copy");
        for writer in 0..WRITERS {
            let due = flushed[writer as usize].load(Ordering::SeqCst);
            for number in (1..=due).rev().take(BLOCKS as usize) {
                let found = copy.read(place(writer, number), BLOCK as u32).expect("a read");
                let there = u64::from_le_bytes(found[..8].try_into().expect("eight bytes"));
                // A later round may have been written there; never an older one.
                assert!(
                    there >= number && found == stamp(writer, there),
                    "{point}: writer {writer}: {number} flushed, {there} there"
                );
            }
            verified += due;
        }
        println!("kill {kill} of {kills}: {point} has all that was flushed");
    }
    println!("{kills} kills of the primary, {verified} flushed writes verified, none is missing");
}

/// Without a receiver a flush waits, and the status says so; it is answered when the receiver is back, and fails when the node stops.
#[test]
fn a_flush_waits_for_the_receiver_and_is_never_answered_falsely() {
    let folder = scratch();
    let mut sites = Sites::start(folder.path(), |image| sparse(image, 8 * MIB));
    let mut nbd = Nbd::connect(&sites.socket, "data").expect("the export");
    nbd.write(0, &stamp(0, 1)).expect("a write");
    nbd.flush().expect("a flush");
    assert_eq!(sites.primary.primary(GROUP)["dirty_bytes"], 0, "the flush was answered, so nothing is left");

    sites.receiver.kill();
    nbd.write(BLOCK, &stamp(0, 2)).expect("a write");
    let flushing = std::thread::spawn(move || {
        let result = nbd.flush();
        (nbd, result)
    });
    let waiting = eventually("the status shows that a flush waits", Duration::from_secs(20), || {
        let status = sites.primary.primary(GROUP);
        (status["flushes_waiting"] == 1 && status["flush_wait_ms"].as_u64() > Some(100)).then_some(status)
    });
    assert!(waiting["dirty_bytes"].as_u64() > Some(0), "{waiting:#}");
    let said = sites.primary.cli(&["status"]);
    assert!(said.contains("1 waiting, the oldest for"), "{said}");
    assert!(!flushing.is_finished(), "answered without a receiver");
    sites.receiver.start();
    let (mut nbd, result) = flushing.join().expect("the client");
    result.expect("the flush, once the receiver is back");
    assert_eq!(sites.primary.primary(GROUP)["dirty_bytes"], 0, "the flush was answered, so nothing is left");

    sites.receiver.kill();
    nbd.write(2 * BLOCK, &stamp(0, 3)).expect("a write");
    let flushing = std::thread::spawn(move || nbd.flush());
    eventually("a flush waits", Duration::from_secs(20), || (sites.primary.primary(GROUP)["flushes_waiting"] == 1).then_some(()));
    sites.primary.signal(Signal::TERM);
    let error = flushing.join().expect("the client").expect_err("the receiver has nothing of it");
    assert_eq!(error.raw_os_error(), Some(5), "an I/O error, told before the client is cut off: {error}");
    let (orderly, log) = sites.primary.ended(Duration::from_secs(40));
    assert!(orderly, "{log}");
}
