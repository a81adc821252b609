//! An activated copy becomes a plain raw file while its guest writes, whatever is killed meanwhile.
//!
//! Would catch: a copied block that undoes a guest's write, a bit on disk before its data, a kill after which the fork cannot be opened
//! or begins from nothing, an answered write that goes with the process, a data file that is not what the export shows, an export that still needs the journal.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod support;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blockdev::steps::Step;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use support::nbd::{Nbd, is_lost};
use support::node::Pair;
use support::{eventually, need, noise, run, scratch, seed};

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;
/// Kills of the node while it flattens.
const KILLS: usize = 6;
/// And before those, deaths in the middle of a piece.
const DEATHS: usize = 2;

/// What a disk must hold. A write that a kill interrupted may be there or not, block by block; nothing is written there until that is known.
struct Oracle {
    image: Vec<u8>,
    unsure: Vec<(usize, Vec<u8>)>,
}

impl Oracle {
    /// After kills: what became of the writes that they interrupted.
    fn resolve(&mut self, socket: &Path) {
        for (at, data) in std::mem::take(&mut self.unsure) {
            let found = Nbd::connect(socket, "root").unwrap().read(at as u64, data.len() as u32).unwrap();
            for from in (0..data.len()).step_by(BLOCK) {
                let (old, new, now) = (at + from..at + from + BLOCK, &data[from..from + BLOCK], &found[from..from + BLOCK]);
                assert!(now == new || *now == self.image[old.clone()], "block {} is neither old nor new", old.start / BLOCK);
                self.image[old].copy_from_slice(now);
            }
        }
    }

    fn is_unsure(&self, from: usize, bytes: usize) -> bool {
        self.unsure.iter().any(|(at, data)| from < at + data.len() && *at < from + bytes)
    }

    fn check(&self, found: &[u8]) {
        let differs = found.chunks(BLOCK).zip(self.image.chunks(BLOCK)).position(|(a, b)| a != b);
        assert!(differs.is_none() && found.len() == self.image.len(), "block {differs:?} differs");
    }
}

/// Writes until told to stop or the node is gone. Few writes are flushed: a kill of the process loses nothing that was answered, flushed or not.
fn write(socket: &Path, oracle: &Mutex<Oracle>, seed: u64, stop: &AtomicBool) -> u64 {
    let (mut rng, mut count) = (SmallRng::seed_from_u64(seed), 0);
    let Ok(mut nbd) = Nbd::connect(socket, "root") else { return 0 };
    while !stop.load(Ordering::Relaxed) {
        let mut oracle = oracle.lock().unwrap();
        let blocks = rng.random_range(1..=16_usize);
        let at = rng.random_range(0..=oracle.image.len() / BLOCK - blocks) * BLOCK;
        if oracle.is_unsure(at, blocks * BLOCK) {
            continue;
        }
        let data = if rng.random_range(0..5) == 0 { vec![0; blocks * BLOCK] } else { noise(rng.random(), blocks * BLOCK) };
        let flushes = rng.random_range(0..8) == 0;
        match nbd.write(at as u64, &data).and_then(|()| if flushes { nbd.flush() } else { Ok(()) }) {
            Ok(()) => oracle.image[at..at + data.len()].copy_from_slice(&data),
            Err(error) if is_lost(&error) => {
                oracle.unsure.push((at, data));
                return count;
            }
            Err(error) => panic!("a write: {error}"),
        }
        count += 1;
    }
    count
}

fn read(socket: &Path, bytes: usize) -> Vec<u8> {
    let mut nbd = Nbd::connect(socket, "root").unwrap();
    (0..bytes).step_by(MIB as usize).flat_map(|at| nbd.read(at as u64, MIB as u32).unwrap()).collect()
}

fn flatten(pair: &Pair) -> Value {
    pair.receiver.copy("primary", "db")["active"]["flatten"].clone()
}

fn is_flat(pair: &Pair) -> bool {
    flatten(pair)["state"] == "flat"
}

/// For the next start of the receiver.
fn flattens(pair: &Pair, does: bool) {
    let config = std::fs::read_to_string(pair.receiver.config()).unwrap();
    let with = |value: bool| format!("[receiver]\nflatten = {value}\n");
    let plain = config.replacen(&with(true), "[receiver]\n", 1).replacen(&with(false), "[receiver]\n", 1);
    std::fs::write(pair.receiver.config(), plain.replacen("[receiver]\n", &with(does), 1)).unwrap();
}

/// A pair with a disk that has data, holes and blocks of zeroes, whose copy was activated and is not flattened yet; the image, and the copy's socket.
fn activated(folder: &Path, mib: u64) -> (Pair, Vec<u8>, PathBuf) {
    let mut pair = Pair::start(folder, "db", "100ms", &[("root", mib * MIB)]);
    let mut nbd = Nbd::connect(&pair.sockets[0], "root").unwrap();
    let mut image = vec![0; (mib * MIB) as usize];
    // Two thirds of it, in pieces of 1 MiB.
    for at in (0..mib).filter(|at| at % 3 != 2) {
        let piece = noise(at, MIB as usize);
        nbd.write(at * MIB, &piece).unwrap();
        image[(at * MIB) as usize..((at + 1) * MIB) as usize].copy_from_slice(&piece);
    }
    nbd.write(5 * MIB, &vec![0; MIB as usize]).unwrap();
    drop(nbd);
    pair.primary.committed("db");
    pair.primary.stop();
    pair.receiver.stop();
    flattens(&pair, false);
    pair.receiver.start();
    let copy = folder.join("copy.sock");
    pair.receiver.failover("db", None, &copy);
    pair.receiver.kill();
    (pair, image, copy)
}

#[test]
fn a_copy_becomes_a_raw_file_under_load_and_kills() {
    need(&[("qemu-img", "qemu-utils")]);
    let folder = scratch();
    let seed = seed();
    let mut rng = SmallRng::seed_from_u64(seed);
    let (mut pair, image, copy) = activated(folder.path(), 256);
    let bytes = image.len();
    let oracle = Arc::new(Mutex::new(Oracle { image, unsure: Vec::new() }));
    let (mut writes, mut progress) = (0, Vec::new());
    let writer = |stop: &Arc<AtomicBool>, seed: u64| {
        let (copy, oracle, stop) = (copy.clone(), Arc::clone(&oracle), Arc::clone(stop));
        std::thread::spawn(move || write(&copy, &oracle, seed, &stop))
    };
    // In the middle of it, however fast it is.
    flattens(&pair, true);
    for _ in 0..DEATHS {
        pair.receiver.dies_next_at(Step::FlattenPiece, rng.random_range(2..12));
        pair.receiver.launch();
        let stop = Arc::new(AtomicBool::new(false));
        let writer = if pair.receiver.answers() { Some(writer(&stop, rng.random())) } else { None };
        pair.receiver.died_at(Step::FlattenPiece);
        stop.store(true, Ordering::Relaxed);
        writes += writer.map_or(0, |writer| writer.join().unwrap());
    }
    pair.receiver.start();
    oracle.lock().unwrap().resolve(&copy);
    for kill in 0..=KILLS {
        let stop = Arc::new(AtomicBool::new(false));
        let writer = writer(&stop, rng.random());
        if kill < KILLS {
            let until = Instant::now() + Duration::from_millis(rng.random_range(5..150));
            while Instant::now() < until && !is_flat(&pair) {}
            progress.push(flatten(&pair)["done_bytes"].as_u64().unwrap());
            pair.receiver.kill();
        } else {
            eventually("it is flat", Duration::from_secs(120), || is_flat(&pair).then_some(()));
            stop.store(true, Ordering::Relaxed);
        }
        writes += writer.join().unwrap();
        if kill < KILLS {
            // Reading all of it here would give it the time to be done before the next kill.
            pair.receiver.start();
            oracle.lock().unwrap().resolve(&copy);
        }
    }
    println!("{writes} writes; resident at the kills: {progress:?} of {bytes}");
    assert!(writes > 20, "{writes} writes");
    oracle.lock().unwrap().check(&read(&copy, bytes));
    let raw = pair.store.join("primary/db/forks/active-2/root.raw");
    // The node has the file locked, so that nobody else changes it.
    let file = format!("driver=raw,file.driver=file,file.locking=off,file.filename={}", raw.display());
    let export = format!("driver=raw,file.driver=nbd,file.export=root,file.server.type=unix,file.server.path={}", copy.display());
    println!("{}", run("qemu-img", &["compare", "-U", "--image-opts", &file, &export]).trim());
    assert!(pair.receiver.cli(&["status"]).contains("flatten     done: its data files are the whole disks"));

    // The journal is not asked any more: the copy is served without a byte of its data. (The node itself wants to walk it at its start.)
    pair.receiver.stop();
    assert!(std::fs::read(&raw).unwrap() == oracle.lock().unwrap().image, "any tool can read it");
    let base = pair.store.join("primary/db/base/root.raw");
    std::fs::write(&base, vec![0xee; bytes]).unwrap();
    pair.receiver.start();
    oracle.lock().unwrap().check(&read(&copy, bytes));
    // Its thread has to look at the marker only: with this base it would copy something else.
    eventually("it is known to be flat", Duration::from_secs(20), || is_flat(&pair).then_some(()));
    oracle.lock().unwrap().check(&read(&copy, bytes));
}

#[test]
fn flattening_can_be_left_out() {
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "100ms", &[("root", 4 * MIB)]);
    Nbd::connect(&pair.sockets[0], "root").unwrap().write(0, &noise(1, MIB as usize)).unwrap();
    pair.primary.committed("db");
    pair.primary.stop();
    pair.receiver.stop();
    flattens(&pair, false);
    pair.receiver.start();
    let copy = folder.path().join("copy.sock");
    pair.receiver.failover("db", None, &copy);
    assert!(flatten(&pair).is_null(), "{:#}", pair.receiver.copy("primary", "db"));
    assert!(read(&copy, 4 * MIB as usize)[..MIB as usize] == noise(1, MIB as usize));
    let fork = pair.store.join("primary/db/forks/active-2");
    let mut names: Vec<_> = std::fs::read_dir(&fork).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["root.map", "root.raw", "root.recent"]);
}
