//! Scrub and verify between two real nodes: what changed behind the tap's back and what rotted in the journal is found, told with its
//! place, and sent again, while the guest goes on.
//!
//! Would catch a copy that silently stays wrong, an alarm about nothing under load, a repair that does not arrive, and a damaged frame that ends the
//! session.

mod support;

use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proto::frame::{FRAME_HEADER_BYTES, FRAME_MAGIC};
use proto::seal::SEAL_MAGIC;
use proto::{Frame, FrameHeader, FrameKind};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use receiver::journal::{PLACED_SEAL_BYTES, SEGMENT_HEADER_BYTES, segment_path};
use serde_json::Value;
use support::nbd::Nbd;
use support::node::{COMMIT_WITHIN, Pair};
use support::{Stop, eventually, flip, noise, scratch, text};

const MIB: u64 = 1 << 20;
/// The second disk ends within a block.
const DISKS: &[(&str, u64)] = &[("root", 48 * MIB), ("logs", 3 * MIB + 700)];

/// What `verify --json` said: the report, and everything it printed.
struct Verified {
    report: Value,
    success: bool,
    told: String,
}

fn verify(pair: &Pair) -> Verified {
    let output: Output = pair.primary.ask(&["verify", "db", "--json"]);
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let report = serde_json::from_str(&printed).unwrap_or_else(|e| panic!("{e}: {}\n{}", text(&output), pair.primary.log()));
    Verified { report, success: output.status.success(), told: text(&output) }
}

/// A verify that finds nothing.
#[track_caller]
fn verify_clean(pair: &Pair) {
    let verified = verify(pair);
    assert!(verified.success && verified.report["differing_bytes"] == 0, "{}\n{}", verified.told, pair.receiver.log());
    assert_eq!(verified.report["done_bytes"], verified.report["total_bytes"], "everything was covered");
}

/// A verify that finds `bytes`; its repair is then committed.
#[track_caller]
fn verify_finds(pair: &Pair, bytes: u64) {
    let verified = verify(pair);
    assert!(!verified.success && verified.told.contains("sent again"), "{}", verified.told);
    assert_eq!(verified.report["differing_bytes"], bytes, "{}", verified.told);
    pair.primary.committed("db");
}

fn write(pair: &Pair, disk: usize, offset: u64, content: &[u8]) {
    let mut nbd = Nbd::connect(&pair.sockets[disk], DISKS[disk].0).expect("the export");
    nbd.write(offset, content).expect("a write");
}

/// The copy of the newest point is what the images hold.
#[track_caller]
fn copy_is_the_disk(pair: &Pair, folder: &Path) {
    let socket = folder.join("copy.sock");
    pair.receiver.failover("db", None, &socket);
    for ((name, bytes), image) in DISKS.iter().zip(&pair.images) {
        let mut nbd = Nbd::connect(&socket, name).expect("the copy");
        let image = std::fs::read(image).expect("the image");
        for at in (0..*bytes).step_by(MIB as usize) {
            let length = MIB.min(bytes - at);
            let copy = nbd.read(at, length as u32).expect("a read of the copy");
            assert!(copy == image[at as usize..(at + length) as usize], "disk {name} differs in the MiB at {at}");
        }
    }
}

/// A data frame of the first segment that holds blocks of the first disk: where it begins, and the first of its blocks.
fn newest_frame(segment: &Path) -> (u64, u64, u64) {
    let bytes = std::fs::read(segment).expect("a segment");
    let (mut at, mut found) = (SEGMENT_HEADER_BYTES, None);
    while at < bytes.len() {
        if bytes[at..].starts_with(&FRAME_MAGIC) {
            let header = FrameHeader::decode(bytes[at..].first_chunk().expect("a header")).expect("a frame");
            let frame = Frame::decode(&bytes[at..at + header.frame_bytes()], u64::from(u32::MAX)).expect("a frame");
            if header.kind == FrameKind::Data && header.volume.0 == 0 {
                let payload = (at + FRAME_HEADER_BYTES + header.table_bytes()) as u64;
                found = Some((at as u64, payload + u64::from(header.payload_bytes) / 2, frame.extents[0].start.0));
            }
            at += header.frame_bytes();
        } else {
            assert!(bytes[at..].starts_with(&SEAL_MAGIC), "neither frame nor seal at {at}");
            at += PLACED_SEAL_BYTES;
        }
    }
    found.expect("a data frame")
}

fn first_segment(pair: &Pair) -> PathBuf {
    segment_path(&pair.store.join("primary/db/journal"), 1)
}

/// A byte of each image is changed behind the tap's back, under a guest that writes elsewhere: `verify` finds the two, and nothing else.
#[test]
fn a_change_behind_the_tap_is_found_and_sent() {
    let folder = scratch();
    let pair = Pair::start(folder.path(), "db", "20ms", DISKS);
    write(&pair, 0, 0, &noise(1, 8 * MIB as usize));
    write(&pair, 1, 5000, &noise(2, MIB as usize));
    pair.primary.committed("db");
    let (stop, seed) = (AtomicBool::new(false), support::seed());
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        let guest = scope.spawn(|| {
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut nbd = Nbd::connect(&pair.sockets[0], "root").expect("the export");
            let mut writes = 0_u64;
            while !stop.load(Ordering::SeqCst) {
                // The first 16 MiB stay as they are.
                let offset = 16 * MIB + rng.random_range(0..31 * MIB);
                nbd.write(offset, &noise(writes, rng.random_range(1..40_000))).expect("a write of the guest");
                writes += 1;
            }
            writes
        });
        eventually("the guest writes and epochs are committed", COMMIT_WITHIN, || {
            (pair.primary.primary("db")["epochs_committed"].as_u64()? > 10).then_some(())
        });
        for _ in 0..5 {
            verify_clean(&pair);
        }
        flip(&pair.images[0], 9 * MIB + 4321);
        // In the last, partial block.
        flip(&pair.images[1], 3 * MIB + 699);
        let verified = verify(&pair);
        assert!(!verified.success, "{}", verified.told);
        // What is sent again is the run: up to 1 MiB, and less where the guest's writes or the end of the disk cut it.
        assert_eq!(verified.report["differing_bytes"], MIB + 4096, "{}", verified.told);
        println!("{}", verified.told);
        stop.store(true, Ordering::SeqCst);
        let writes = guest.join().expect("the guest");
        println!("{writes} writes meanwhile");
        assert!(writes > 100, "{writes} writes: there was no load");
    });
    let log = pair.receiver.log();
    let said = |disk: &str, offset: u64| {
        format!("disk {disk}: {} bytes at offset {offset} differ", if disk == "root" { MIB } else { 4096 })
    };
    assert!(log.contains(&said("root", 9 * MIB)) && log.contains(&said("logs", 3 * MIB)), "{log}");
    assert!(pair.primary.log().contains("the copy differs in"), "{}", pair.primary.log());
    let status = pair.primary.committed("db");
    assert_eq!(status["scrub"]["differing_bytes"], MIB + 4096);
    assert!(status["scrub"]["last_pass_age_ms"].is_u64() && status["scrub"]["last_difference_age_ms"].is_u64());
    assert_eq!(pair.receiver.copy("primary", "db")["differing_bytes"], MIB + 4096);
    verify_clean(&pair);
    copy_is_the_disk(&pair, folder.path());
}

/// A bit flips in the journal under a running receiver, in a frame that the newest view shows: `verify` finds it although nobody has read it,
/// both nodes tell the place, and the copy is whole again, also after a restart. No session ended.
#[test]
fn a_bit_that_flips_in_the_journal_is_found_and_repaired() {
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "20ms", DISKS);
    pair.primary.committed("db");
    write(&pair, 0, 4 * MIB, &noise(3, MIB as usize));
    pair.primary.committed("db");
    verify_clean(&pair);
    let segment = first_segment(&pair);
    let (frame, byte, block) = newest_frame(&segment);
    assert!((MIB..2 * MIB).contains(&(block * 4096 / 4)), "the frame is of the last write");
    flip(&segment, byte);
    verify_finds(&pair, MIB);
    let told = format!("{}: the frame at offset {frame} is damaged", segment.display());
    assert!(pair.receiver.log().contains(&told), "{told}: not in {}", pair.receiver.log());
    let copy = pair.receiver.copy("primary", "db");
    assert_eq!(copy["damaged_frames"], 1);
    assert!(copy["last_damage"].as_str().expect("the damage").starts_with(&told), "{copy:#}");
    assert!(pair.receiver.cli(&["status"]).contains(&told));
    verify_clean(&pair);
    let sessions = pair.receiver.log().matches("session in generation").count();
    assert_eq!(sessions, 1, "no session ended: {}", pair.receiver.log());
    // The damaged frame stays in the journal; the group is there all the same after a restart.
    pair.receiver.stop();
    pair.receiver.start();
    eventually("it is back", COMMIT_WITHIN, || (pair.primary.primary("db")["state"] == "streaming").then_some(()));
    verify_clean(&pair);
    copy_is_the_disk(&pair, folder.path());
}

/// The same while the nodes are down: `check` names the place.
#[test]
fn a_bit_that_flips_at_rest_is_named_by_check() {
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "20ms", DISKS);
    write(&pair, 0, 4 * MIB, &noise(4, MIB as usize));
    pair.primary.committed("db");
    pair.primary.stop();
    pair.receiver.stop();
    let segment = first_segment(&pair);
    let (frame, byte, _) = newest_frame(&segment);
    flip(&segment, byte);
    let checked = pair.receiver.ask(&["check", &pair.store.display().to_string()]);
    let told = format!("{}: at offset {frame}", segment.display());
    assert!(!checked.status.success() && text(&checked).contains(&told), "{told}: not in {}", text(&checked));
}

/// Without anybody asking, the background comes to the place within its interval.
#[test]
fn the_background_finds_it_by_itself() {
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "20ms", DISKS);
    write(&pair, 0, 0, &noise(5, 2 * MIB as usize));
    pair.primary.committed("db");
    assert_eq!(pair.primary.primary("db")["scrub"]["interval_s"], 7 * 86_400, "a week unless told otherwise");
    pair.primary.stop();
    let config = std::fs::read_to_string(pair.primary.config()).expect("the configuration");
    let faster = config.replace("interval = \"20ms\"\n", "interval = \"20ms\"\nscrub_interval = \"2s\"\n");
    std::fs::write(pair.primary.config(), faster).expect("the configuration");
    pair.primary.start();
    eventually("a whole pass", Duration::from_secs(60), || {
        let scrub = pair.primary.primary("db")["scrub"].clone();
        assert_eq!(scrub["differing_bytes"], 0, "{}", pair.receiver.log());
        scrub["last_pass_age_ms"].as_u64()
    });
    flip(&pair.images[0], MIB + 77);
    let differing = eventually("the change is found", Duration::from_secs(60), || {
        pair.primary.primary("db")["scrub"]["differing_bytes"].as_u64().filter(|bytes| *bytes > 0)
    });
    // What is sent again is the run: the whole MiB, but for where the walk begins, which is anywhere on the disks and may divide it.
    let told = format!("disk root: the copy differs in {differing} bytes at offset {MIB} at point");
    assert!((4096..=MIB).contains(&differing) && pair.primary.log().contains(&told), "{told}: not in {}", pair.primary.log());
    pair.primary.committed("db");
    assert_eq!(pair.primary.primary("db")["scrub"]["differing_bytes"], differing, "it was found once");
    verify_clean(&pair);
    copy_is_the_disk(&pair, folder.path());
}

/// Where there is nothing to verify, one line says why; a verify waits for its receiver to come back, and then ends.
#[test]
fn a_verify_that_cannot_be_says_so() {
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "20ms", DISKS);
    pair.primary.committed("db");
    let refused = |node: &support::node::Node, group: &str, words: &str| {
        let output = node.ask(&["verify", group]);
        let told = text(&output);
        assert!(output.status.code() == Some(1) && told.contains(words) && told.trim_end().lines().count() == 1, "{told}");
    };
    refused(&pair.primary, "web", "group 'web' is none of this node's: its groups are db");
    refused(&pair.receiver, "db", "group 'db' is a copy here: run this at its primary, on the node that has its disks");
    pair.receiver.kill();
    eventually("the primary notices", COMMIT_WITHIN, || (pair.primary.primary("db")["state"] == "connecting").then_some(()));
    refused(&pair.primary, "db", "group db: its receiver is not connected");
    pair.receiver.start();
    eventually("it is back", COMMIT_WITHIN, || (pair.primary.primary("db")["state"] == "streaming").then_some(()));
    verify_clean(&pair);
    let socket = folder.path().join("copy.sock");
    pair.receiver.failover("db", None, &socket);
    eventually("it is fenced", COMMIT_WITHIN, || (pair.primary.primary("db")["state"] == "fenced").then_some(()));
    refused(&pair.primary, "db", "group db is fenced");
}
