//! Who writes, changed on purpose between two real nodes: disks given back after a failover and a split, switchover there and home, rollback,
//! and a SIGKILL of either side at any moment of it.
//!
//! Would catch a block that is lost, mixed or left behind on the way back, two writers at once, writes of a split that are thrown away, a
//! handback that moves what does not differ, and one that cannot be repeated after a crash.

mod support;

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use support::nbd::Nbd;
use support::node::{COMMIT_WITHIN, Pair};
use support::{eventually, noise, scratch, seed, text};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
/// The second disk ends within a block.
const DISKS: &[(&str, u64)] = &[("root", 48 * MIB), ("logs", 3 * MIB + 700)];
/// A handback may move so much for each byte that differs.
const MOVED_MAX: f64 = 1.1;
/// A failback in the test that kills takes less than this; half of the kills fall into its first half.
const KILL_WITHIN_MS: u64 = 600;
const KILLS: usize = 8;

/// What the disks hold, as their clients know it, and the blocks that were changed since somebody asked last.
struct Model {
    disks: Vec<Vec<u8>>,
    changed: BTreeSet<(usize, u64)>,
}

impl Model {
    fn new() -> Self {
        Self { disks: DISKS.iter().map(|(_, bytes)| vec![0; *bytes as usize]).collect(), changed: BTreeSet::new() }
    }

    fn put(&mut self, disk: usize, offset: u64, content: &[u8]) {
        self.disks[disk][offset as usize..offset as usize + content.len()].copy_from_slice(content);
        let end = offset + content.len() as u64;
        self.changed.extend((offset / BLOCK..end.div_ceil(BLOCK)).map(|block| (disk, block)));
    }
}

/// Writes at random places; each is in the model once it is acknowledged.
fn write_some(sockets: &[PathBuf], model: &mut Model, random: &mut SmallRng, writes: usize) {
    let mut disks: Vec<Nbd> =
        sockets.iter().zip(DISKS).map(|(socket, (name, _))| Nbd::connect(socket, name).expect("an export")).collect();
    for _ in 0..writes {
        let (disk, offset, content) = one_write(random);
        disks[disk].write(offset, &content).expect("a write");
        model.put(disk, offset, &content);
    }
    disks.iter_mut().for_each(|disk| disk.flush().expect("a flush"));
}

fn one_write(random: &mut SmallRng) -> (usize, u64, Vec<u8>) {
    let disk = usize::from(random.random_bool(0.2));
    let length = random.random_range(1..40_000).min(DISKS[disk].1);
    let offset = random.random_range(0..=DISKS[disk].1 - length);
    // Zeroes travel another way.
    let content = if random.random_bool(0.1) { vec![0; length as usize] } else { noise(random.random(), length as usize) };
    (disk, offset, content)
}

#[track_caller]
fn images_are(pair: &Pair, model: &Model, when: &str) {
    for ((image, disk), (name, _)) in pair.images.iter().zip(&model.disks).zip(DISKS) {
        let found = std::fs::read(image).expect("an image");
        let differs = found.chunks(BLOCK as usize).zip(disk.chunks(BLOCK as usize)).position(|(a, b)| a != b);
        assert_eq!(differs, None, "{when}: disk {name} differs in that block");
        assert_eq!(found.len(), disk.len(), "{when}: disk {name}");
    }
}

#[track_caller]
fn export_is(socket: &Path, model: &Model, when: &str) {
    for ((name, bytes), disk) in DISKS.iter().zip(&model.disks) {
        let mut nbd = Nbd::connect(socket, name).expect("the export");
        for at in (0..*bytes).step_by(MIB as usize) {
            let length = MIB.min(bytes - at);
            let found = nbd.read(at, length as u32).expect("a read");
            assert!(found == disk[at as usize..(at + length) as usize], "{when}: disk {name} differs in the MiB at {at}");
        }
    }
}

/// Runs a failback or a rollback to its end, well or not.
fn hand_back(pair: &Pair, args: &[&str]) -> Result<Value, String> {
    let output = pair.primary.ask(&[args, &["--yes", "--json"]].concat());
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    match serde_json::from_str::<Value>(&printed) {
        Ok(done) if output.status.success() => Ok(done["handback"].clone()),
        _ => Err(text(&output)),
    }
}

#[track_caller]
fn hand_back_well(pair: &Pair, args: &[&str]) -> Value {
    hand_back(pair, args).unwrap_or_else(|told| panic!("{told}\n{}\n{}", pair.primary.log(), pair.receiver.log()))
}

#[track_caller]
fn moved_little(done: &Value, differing: usize) {
    let (moved, differing) = (done["done_bytes"].as_u64().expect("bytes"), differing as u64 * BLOCK);
    // The block that is always there.
    let most = (differing as f64 * MOVED_MAX) as u64 + BLOCK;
    assert!(moved <= most, "{moved} bytes were moved, {differing} differ");
    println!("moved {moved} bytes, {differing} differ: {:.3}", moved as f64 / differing.max(1) as f64);
}

#[track_caller]
fn fenced(pair: &Pair) {
    eventually("the old primary learns that it is fenced", COMMIT_WITHIN, || {
        (pair.primary.primary("db")["state"] == "fenced").then_some(())
    });
    let mut nbd = Nbd::connect(&pair.sockets[0], DISKS[0].0).expect("the export");
    nbd.read(0, 4096).expect("reads go on");
    let refused = nbd.write(0, &[1; 4096]).expect_err("a fenced primary takes no writes");
    assert_eq!(refused.raw_os_error(), Some(1), "{refused}");
    assert_eq!(pair.primary.primary("db")["writes_refused"], "fenced");
}

/// Waits until a rollback can begin, for the first time or again: before, it would be refused, and nothing would be tried.
#[track_caller]
fn can_begin(pair: &Pair) -> Value {
    eventually("it is known where the disks stand", COMMIT_WITHIN, || {
        let status = pair.primary.primary("db");
        (status["state"] == "streaming" || status["writes_refused"] == "handback").then_some(status)
    })
}

#[track_caller]
fn verified(pair: &Pair) {
    pair.primary.committed("db");
    let report = pair.primary.json(&["verify", "db"]);
    assert_eq!(report["differing_bytes"], 0, "{report:#}");
}

fn kept_is(pair: &Pair, kept: &str, model: &Model, own: &BTreeSet<(usize, u64)>) {
    let folder = pair.store.join("primary/db/forks").join(kept);
    for (disk, block) in own {
        let file = std::fs::File::open(folder.join(format!("{}.raw", DISKS[*disk].0))).expect("the kept fork");
        let (from, end) = (block * BLOCK, ((block + 1) * BLOCK).min(DISKS[*disk].1));
        let mut found = vec![0; (end - from) as usize];
        file.read_exact_at(&mut found, from).expect("a block");
        assert!(found == model.disks[*disk][from as usize..end as usize], "block {block} of disk {disk} is not kept");
    }
}

/// The blocks in which two sets of images differ. A write may leave a block as it was: zeroes over the zeroes behind an earlier write.
fn differing(a: &[Vec<u8>], b: &[Vec<u8>]) -> BTreeSet<(usize, u64)> {
    let blocks = |disk: &Vec<u8>| disk.len() as u64 / BLOCK + 1;
    let block = |disk: &Vec<u8>, n: u64| disk.chunks(BLOCK as usize).nth(n as usize).map(<[u8]>::to_vec);
    (0..a.len())
        .flat_map(|disk| (0..blocks(&a[disk])).map(move |n| (disk, n)))
        .filter(|(disk, n)| block(&a[*disk], *n) != block(&b[*disk], *n))
        .collect()
}

/// A split: the sites part, both are written, and the old primary takes back what the other one has become, under load.
#[test]
fn a_split_loses_nothing_and_the_disks_come_back() {
    let folder = scratch();
    let mut random = SmallRng::seed_from_u64(seed());
    let mut pair = Pair::start(folder.path(), "db", "50ms", DISKS);
    let mut model = Model::new();
    write_some(&pair.sockets, &mut model, &mut random, 400);
    pair.primary.settled("db");
    let common: Vec<Vec<u8>> = model.disks.clone();

    // The sites part. What is written here now, nobody else ever sees.
    pair.receiver.kill();
    model.changed.clear();
    write_some(&pair.sockets, &mut model, &mut random, 60);
    pair.primary.kill();
    let ours = Model { disks: model.disks.clone(), changed: BTreeSet::new() };
    let own = differing(&ours.disks, &common);
    model.changed.clear();
    model.disks = common;

    pair.receiver.start();
    let socket = folder.path().join("active.sock");
    pair.receiver.failover("db", None, &socket);
    let active = vec![socket.clone(), socket.clone()];
    write_some(&active, &mut model, &mut random, 100);

    pair.primary.start();
    fenced(&pair);
    images_are(&pair, &ours, "fenced");
    // A restart does not make it forget.
    pair.primary.kill();
    pair.primary.start();
    fenced(&pair);

    // The active copy goes on being written while it is given back; its last writes are in or were refused.
    let stop = AtomicBool::new(false);
    let done = std::thread::scope(|scope| {
        let (model, random, active, stop) = (&mut model, &mut random, &active, &stop);
        let writer = scope.spawn(move || {
            let mut disks: Vec<Nbd> =
                active.iter().zip(DISKS).map(|(s, (name, _))| Nbd::connect(s, name).expect("the active copy")).collect();
            let mut writes = 0_u64;
            while !stop.load(Ordering::SeqCst) {
                let (disk, offset, content) = one_write(random);
                match disks[disk].write(offset, &content) {
                    Ok(()) => model.put(disk, offset, &content),
                    Err(_) => break,
                }
                writes += 1;
            }
            writes
        });
        let done = hand_back_well(&pair, &["failback", "db"]);
        stop.store(true, Ordering::SeqCst);
        println!("{} writes while the disks were given back", writer.join().expect("the writer"));
        done
    });
    assert_eq!(done["kept"], "diverged-1", "{done:#}");
    kept_is(&pair, "diverged-1", &ours, &own);
    images_are(&pair, &model, "after the failback");

    // The guest writes here again, the other site follows, and nobody is left there to write.
    assert!(Nbd::connect(&socket, DISKS[0].0).is_err(), "the copy is not served any more");
    write_some(&pair.sockets, &mut model, &mut random, 100);
    verified(&pair);
    let copy = pair.receiver.copy("primary", "db");
    assert_eq!((&copy["state"], &copy["generation"]), (&Value::from("following"), &Value::from(3)), "{copy:#}");
    // All over again, from a copy that was one before.
    pair.primary.kill();
    pair.receiver.failover("db", None, &folder.path().join("again.sock"));
    export_is(&folder.path().join("again.sock"), &model, "the second failover");
}

/// There and home again under load, with nothing lost and little moved.
#[test]
fn a_switchover_there_and_home_loses_nothing() {
    let folder = scratch();
    let mut random = SmallRng::seed_from_u64(seed());
    let pair = Pair::start(folder.path(), "db", "100ms", DISKS);
    let mut model = Model::new();
    write_some(&pair.sockets, &mut model, &mut random, 300);
    pair.primary.committed_once("db");
    let socket = folder.path().join("active.sock");
    let export = format!("unix:{}", socket.display());
    let stop = AtomicBool::new(false);
    let told = std::thread::scope(|scope| {
        let (model, random, stop, sockets) = (&mut model, &mut random, &stop, &pair.sockets);
        let writer = scope.spawn(move || {
            let mut disks: Vec<Nbd> =
                sockets.iter().zip(DISKS).map(|(s, (name, _))| Nbd::connect(s, name).expect("an export")).collect();
            while !stop.load(Ordering::SeqCst) {
                let (disk, offset, content) = one_write(random);
                if disks[disk].write(offset, &content).is_err() {
                    return true;
                }
                model.put(disk, offset, &content);
            }
            false
        });
        let told = pair.receiver.json(&["switchover", "db", "--export", &export, "--yes"]);
        eventually("the guest's writes are refused", COMMIT_WITHIN, || writer.is_finished().then_some(()));
        stop.store(true, Ordering::SeqCst);
        assert!(writer.join().expect("the writer"), "refused, not stopped");
        told
    });
    assert_eq!(told["generation"], 2, "{told:#}");
    export_is(&socket, &model, "switched over");
    fenced(&pair);
    model.changed.clear();
    write_some(&[socket.clone(), socket.clone()], &mut model, &mut random, 200);
    let done = hand_back_well(&pair, &["failback", "db"]);
    assert_eq!((&done["kept"], &done["sent_bytes"]), (&Value::Null, &Value::from(0)), "nothing was written here of its own");
    moved_little(&done, model.changed.len());
    images_are(&pair, &model, "home again");
    write_some(&pair.sockets, &mut model, &mut random, 50);
    verified(&pair);
    images_are(&pair, &model, "home again, and written");
}

/// A switchover without a primary is refused, and changes nothing.
#[test]
fn a_switchover_needs_both_sites() {
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "50ms", DISKS);
    write_some(&pair.sockets, &mut Model::new(), &mut SmallRng::seed_from_u64(1), 20);
    pair.primary.settled("db");
    let told = pair.primary.ask(&["failback", "db", "--yes"]);
    assert!(!told.status.success() && text(&told).contains("not fenced"), "{}", text(&told));
    pair.primary.kill();
    eventually("the receiver notices", COMMIT_WITHIN, || pair.receiver.copy("primary", "db")["peer"].is_null().then_some(()));
    let export = format!("unix:{}", folder.path().join("active.sock").display());
    let told = pair.receiver.ask(&["switchover", "db", "--export", &export, "--yes"]);
    assert!(!told.status.success() && text(&told).contains("not connected"), "{}", text(&told));
    assert_eq!(pair.receiver.copy("primary", "db")["generation"], 1);
}

/// Back to a point, and forward again: each image is what it was, and nothing is forgotten.
#[test]
fn a_rollback_goes_back_and_forward_again() {
    let folder = scratch();
    let mut random = SmallRng::seed_from_u64(seed());
    let pair = Pair::start(folder.path(), "db", "50ms", DISKS);
    let mut model = Model::new();
    write_some(&pair.sockets, &mut model, &mut random, 200);
    pair.primary.settled("db");
    let then = Model { disks: model.disks.clone(), changed: BTreeSet::new() };
    let point = |pair: &Pair| pair.receiver.points("db").last().expect("a point").0.clone();
    let before = point(&pair);
    model.changed.clear();
    write_some(&pair.sockets, &mut model, &mut random, 60);
    pair.primary.settled("db");
    let after = point(&pair);

    let unknown = hand_back(&pair, &["rollback", "db", "--point", "1.999999"]).expect_err("no such point");
    assert!(unknown.contains("no point 1.999999"), "{unknown}");
    write_some(&pair.sockets, &mut model, &mut random, 1);
    pair.primary.settled("db");
    let newest = point(&pair);
    assert_ne!(newest, after, "the guest goes on after a rollback that was refused");

    let done = hand_back_well(&pair, &["rollback", "db", "--point", &before]);
    moved_little(&done, model.changed.len());
    images_are(&pair, &then, "rolled back");
    let points = pair.receiver.points("db");
    assert!(points.iter().any(|(name, _)| *name == newest), "what was there before is a point still: {points:?}");
    verified(&pair);
    hand_back_well(&pair, &["rollback", "db", "--point", &newest]);
    images_are(&pair, &model, "rolled forward");
    write_some(&pair.sockets, &mut model, &mut random, 50);
    verified(&pair);
    images_are(&pair, &model, "written again");
    assert_eq!(pair.receiver.copy("primary", "db")["generation"], 3);
}

/// Either side is killed at any moment of a failback: the active copy goes on, or the disks are back; the command can be repeated until
/// they are.
#[test]
fn a_failback_survives_the_death_of_either_side() {
    let folder = scratch();
    let mut random = SmallRng::seed_from_u64(seed());
    let mut pair = Pair::start(folder.path(), "db", "50ms", DISKS);
    let mut model = Model::new();
    write_some(&pair.sockets, &mut model, &mut random, 300);
    pair.primary.settled("db");
    let common = model.disks.clone();
    pair.receiver.kill();
    model.changed.clear();
    write_some(&pair.sockets, &mut model, &mut random, 200);
    pair.primary.kill();
    let ours = Model { disks: model.disks.clone(), changed: BTreeSet::new() };
    let own = differing(&ours.disks, &common);
    model.changed.clear();
    model.disks = common;
    pair.receiver.start();
    let socket = folder.path().join("active.sock");
    pair.receiver.failover("db", None, &socket);
    let active = vec![socket.clone(), socket.clone()];
    write_some(&active, &mut model, &mut random, 1200);
    pair.primary.start();
    fenced(&pair);

    let mut given = false;
    for kill in 0..KILLS {
        let wait = Duration::from_millis(random.random_range(0..KILL_WITHIN_MS));
        let mut running = pair.primary.command(&["failback", "db", "--yes", "--json"]).spawn().expect("the command");
        std::thread::sleep(wait);
        let (primary, receiver) = (random.random_bool(0.6), random.random_bool(0.6));
        if primary {
            pair.primary.kill();
        }
        if receiver || !primary {
            pair.receiver.kill();
        }
        let done = running.wait().expect("its end").success();
        if receiver || !primary {
            pair.receiver.start();
        }
        if primary {
            pair.primary.start();
        }
        let state = pair.receiver.copy("primary", "db")["state"].clone();
        println!("kill {kill} after {wait:?} (primary: {primary}): the receiver is {state}, the command succeeded: {done}");
        given = state != "active";
        assert!(!done || given, "a failback that succeeded and did not happen");
        if given {
            break;
        }
        // The copy is what its guest wrote, and takes more.
        write_some(&active, &mut model, &mut random, 10);
    }
    if !given || pair.primary.primary("db")["state"] == "fenced" || !pair.primary.primary("db")["writes_refused"].is_null() {
        eventually("it is known who may write", COMMIT_WITHIN, || {
            (pair.primary.primary("db")["state"] == "fenced").then_some(())
        });
        hand_back_well(&pair, &["failback", "db"]);
    }
    images_are(&pair, &model, "after the failback");
    kept_is(&pair, "diverged-1", &ours, &own);
    write_some(&pair.sockets, &mut model, &mut random, 50);
    verified(&pair);
}

/// Either side is killed at any moment of a rollback: the disks are what they were, or what they are to be, or no guest writes to them until
/// the command is repeated.
#[test]
fn a_rollback_survives_the_death_of_either_side() {
    let folder = scratch();
    let mut random = SmallRng::seed_from_u64(seed());
    let mut pair = Pair::start(folder.path(), "db", "50ms", DISKS);
    let mut model = Model::new();
    write_some(&pair.sockets, &mut model, &mut random, 300);
    pair.primary.settled("db");
    let then = Model { disks: model.disks.clone(), changed: BTreeSet::new() };
    let before = pair.receiver.points("db").last().expect("a point").0.clone();
    write_some(&pair.sockets, &mut model, &mut random, 1000);
    pair.primary.settled("db");
    for kill in 0..KILLS {
        can_begin(&pair);
        let wait = Duration::from_millis(random.random_range(0..KILL_WITHIN_MS));
        let mut running =
            pair.primary.command(&["rollback", "db", "--point", &before, "--yes", "--json"]).spawn().expect("the command");
        std::thread::sleep(wait);
        let primary = random.random_bool(0.7);
        if primary {
            pair.primary.kill()
        } else {
            pair.receiver.kill()
        }
        let done = running.wait().expect("its end").success();
        if primary {
            pair.primary.start()
        } else {
            pair.receiver.start()
        }
        let generation = pair.receiver.copy("primary", "db")["generation"].as_u64().expect("a generation");
        println!("kill {kill} after {wait:?} (primary: {primary}): generation {generation}, the command succeeded: {done}");
        if generation > 1 {
            break;
        }
        let status = pair.primary.primary("db");
        if status["writes_refused"] == "handback" {
            let mut nbd = Nbd::connect(&pair.sockets[0], DISKS[0].0).expect("the export");
            nbd.write(0, &[1; 4096]).expect_err("disks that are neither the one nor the other take no writes");
        } else {
            // Nothing was overwritten: the guest goes on with what it had.
            images_are(&pair, &model, "a rollback that had not begun");
            pair.primary.committed("db");
        }
    }
    let status = can_begin(&pair);
    if pair.receiver.copy("primary", "db")["generation"] == 1 || !status["writes_refused"].is_null() {
        hand_back_well(&pair, &["rollback", "db", "--point", &before]);
    }
    images_are(&pair, &then, "rolled back");
    model.disks = then.disks;
    write_some(&pair.sockets, &mut model, &mut random, 50);
    verified(&pair);
    images_are(&pair, &model, "written again");
}
