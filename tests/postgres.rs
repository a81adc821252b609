//! A database on a replicated disk: the replicator is killed under load, and the copy must hold every transaction that was
//! acknowledged before the cut of the point.
//!
//! Would catch: an fsync that is acknowledged and not in the epoch, WAL and heap of different cuts, a cut time that claims more
//! than the epoch holds, damage in heap or index pages.

mod support;

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use support::block::Disk;
use support::node::Pair;
use support::postgres::{self, Server, record_and_tell};
use support::{Process, eventually, one_at_a_time, scratch, seed, unix_us};

const DISK_BYTES: u64 = 2 << 30;
/// pgbench's scale and clients: enough to keep WAL, heap and checkpoints busy on a small machine.
const SCALE: &str = "4";
const CLIENTS: &str = "4";
/// The replicator is killed at a random moment of this span after the load began.
const KILL_AFTER_MS: std::ops::Range<u64> = 2_500..7_500;
/// Commits by the recording client that must be before the cut, or the test would show nothing.
const COMMITS_MIN: u64 = 20;

#[test]
fn every_commit_acknowledged_before_the_cut_is_on_the_copy() {
    postgres::needed();
    let _alone = one_at_a_time();
    let seed = seed();
    let kill_after = Duration::from_millis(SmallRng::seed_from_u64(seed).random_range(KILL_AFTER_MS));
    println!("the replicator is killed {} ms after the load began", kill_after.as_millis());

    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "100ms", &[("data", DISK_BYTES)]);
    let before = folder.path().join("mnt-before");
    let acknowledged = {
        let mut disk = Disk::attach(folder.path(), "before", &pair.sockets[0], "data");
        disk.mkfs("ext4");
        disk.mount(&before);
        let mut server = Server::new(folder.path().join("sockets-before"));
        let data = before.join("data");
        server.create(&data);
        server.start(&data);
        server.fill(SCALE);
        let mut bench = Process::start(
            server
                .command("pgbench")
                .args(["--client", CLIENTS, "--jobs", "1", "--time", "86400"])
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        );
        // The first sync and the load of the tables are not what is tested.
        let begun = unix_us();
        eventually("epochs are committed under load", Duration::from_secs(60), || {
            pair.receiver.copy("primary", "db")["cut_unix_us"].as_u64().filter(|cut| *cut > begun)
        });
        let sockets = server.sockets.clone();
        let enough = Arc::new(AtomicU64::new(u64::MAX));
        let told = Arc::clone(&enough);
        let recorder = std::thread::spawn(move || {
            record_and_tell(&sockets, |commits| {
                if commits as u64 == COMMITS_MIN {
                    told.store(unix_us(), Ordering::SeqCst);
                }
            })
        });
        // A kill before that would show nothing.
        eventually("commits are at the receiver", Duration::from_secs(60), || {
            pair.receiver.copy("primary", "db")["cut_unix_us"].as_u64().filter(|cut| *cut > enough.load(Ordering::SeqCst))
        });
        let kill_at = Instant::now() + kill_after;
        eventually("the random moment", kill_after + Duration::from_secs(5), || (Instant::now() >= kill_at).then_some(()));
        assert!(
            bench.runs(),
            "pgbench ended before the disk was lost: {}",
            std::fs::read_to_string(server.log()).unwrap_or_default()
        );
        pair.primary.kill();
        bench.kill();
        server.end();
        let (acknowledged, error) = recorder.join().expect("the recorder");
        println!("{} commits acknowledged, then: {error}", acknowledged.len());
        acknowledged
    };

    let socket = folder.path().join("copy.sock");
    let (newest, cut) = pair.receiver.failover_newest("db", &socket);
    let due = acknowledged.iter().filter(|at| **at < cut).count() as u64;
    assert!(due >= COMMITS_MIN, "only {due} commits before the cut of {newest}: nothing would be shown");

    postgres::verify_copy(folder.path(), &socket, "data", &newest, cut, &acknowledged);
}
