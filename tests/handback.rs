//! Who writes, changed on purpose between two real nodes: disks given back after a failover and a split, switchover there and home, rollback,
//! and a SIGKILL of either side at any moment of it.
//!
//! Would catch a block that is lost, mixed or left behind on the way back, two writers at once, writes of a split that are thrown away, a
//! handback that moves what does not differ, and one that cannot be repeated after a crash.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use support::model::{
    BLOCK, Disks, Model, can_begin, differing, export_is, fenced, hand_back, hand_back_well, images_are, kept_is, verified,
    write_some,
};
use support::nbd::Nbd;
use support::node::{COMMIT_WITHIN, Pair};
use support::scene::Scene;
use support::{Stop, eventually, scratch, seed, text};

const MIB: u64 = 1 << 20;
/// The second disk ends within a block.
const DISKS: Disks = &[("root", 48 * MIB), ("logs", 3 * MIB + 700)];
/// A handback may move so much for each byte that differs.
const MOVED_MAX: f64 = 1.1;
/// A failback in the test that kills takes less than this; half of the kills fall into its first half.
const KILL_WITHIN_MS: u64 = 600;
const KILLS: usize = 8;

#[track_caller]
fn moved_little(done: &Value, differing: usize) {
    let (moved, differing) = (done["done_bytes"].as_u64().expect("bytes"), differing as u64 * BLOCK);
    // The block that is always there.
    let most = (differing as f64 * MOVED_MAX) as u64 + BLOCK;
    assert!(moved <= most, "{moved} bytes were moved, {differing} differ");
    println!("moved {moved} bytes, {differing} differ: {:.3}", moved as f64 / differing.max(1) as f64);
}

/// A split: the sites part, both are written, and the old primary takes back what the other one has become, under load.
#[test]
fn a_split_loses_nothing_and_the_disks_come_back() {
    let folder = scratch();
    let mut random = SmallRng::seed_from_u64(seed());
    let mut pair = Pair::start(folder.path(), "db", "50ms", DISKS);
    let mut model = Model::new(DISKS);
    write_some(&pair.sockets, &mut model, &mut random, 400);
    pair.primary.settled("db");
    let common: Vec<Vec<u8>> = model.disks.clone();

    // The sites part. What is written here now, nobody else ever sees.
    pair.receiver.kill();
    model.changed.clear();
    write_some(&pair.sockets, &mut model, &mut random, 60);
    pair.primary.kill();
    let ours = model.snapshot();
    let own = differing(&ours.disks, &common);
    model.changed.clear();
    model.disks = common;

    pair.receiver.start();
    let socket = folder.path().join("active.sock");
    pair.receiver.failover("db", None, &socket);
    let active = vec![socket.clone(), socket.clone()];
    write_some(&active, &mut model, &mut random, 100);

    pair.primary.start();
    fenced(&pair, &model);
    images_are(&pair, &ours, "fenced");
    // A restart does not make it forget.
    pair.primary.kill();
    pair.primary.start();
    fenced(&pair, &model);

    // The active copy goes on being written while it is given back; its last writes are in or were refused.
    let stop = AtomicBool::new(false);
    let done = std::thread::scope(|scope| {
        let (model, random, active, stop) = (&mut model, &mut random, &active, &stop);
        let _stop = Stop(stop);
        let writer = scope.spawn(move || {
            let mut disks = model.connect(active);
            let mut writes = 0_u64;
            while !stop.load(Ordering::SeqCst) {
                let (disk, offset, content) = model.one_write(random);
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
    eventually("the copy is not served any more", Duration::from_secs(5), || match Nbd::connect(&socket, DISKS[0].0) {
        Ok(mut nbd) => {
            nbd.write(0, &[1; 4096]).expect_err("the copy takes no writes any more");
            None
        }
        Err(_) => Some(()),
    });
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
    let mut model = Model::new(DISKS);
    write_some(&pair.sockets, &mut model, &mut random, 300);
    pair.primary.committed_once("db");
    let socket = folder.path().join("active.sock");
    let export = format!("unix:{}", socket.display());
    let stop = AtomicBool::new(false);
    let told = std::thread::scope(|scope| {
        let (model, random, stop, sockets) = (&mut model, &mut random, &stop, &pair.sockets);
        let _stop = Stop(stop);
        let writer = scope.spawn(move || {
            let mut disks = model.connect(sockets);
            while !stop.load(Ordering::SeqCst) {
                let (disk, offset, content) = model.one_write(random);
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
    fenced(&pair, &model);
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
    write_some(&pair.sockets, &mut Model::new(DISKS), &mut SmallRng::seed_from_u64(1), 20);
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

/// A primary that comes back before the promotion takes writes again: a switchover from the point it had said to be the last would lose them.
#[test]
fn a_switchover_ends_if_its_primary_takes_writes_again() {
    let mut scene = Scene::new(&[("root", 4 * MIB), ("logs", MIB)]);
    let (hook, begun, go) = (scene.folder.path().join("hook"), scene.folder.path().join("begun"), scene.folder.path().join("go"));
    let script = format!("#!/bin/sh\ntouch {}\nwhile [ ! -e {} ]; do sleep 0.02; done\n", begun.display(), go.display());
    std::fs::write(&hook, script).expect("a hook");
    std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).expect("its mode");
    scene.pair.receiver.kill();
    let config = std::fs::read_to_string(scene.pair.receiver.config()).expect("its configuration");
    let config = format!("{config}\n[hooks]\npre_switchover = \"{}\"\n", hook.display());
    std::fs::write(scene.pair.receiver.config(), config).expect("its configuration");
    scene.pair.receiver.start();
    scene.goes_on("before the switchover");

    let export = scene.copy_export();
    // What would run is told first.
    let told = text(&scene.pair.receiver.ask(&["switchover", "db", "--export", &export]));
    let wanted = format!("  hook        pre-switchover: {}, at most 1 min 5 s", hook.display());
    assert!(told.contains(&wanted) && told.contains("nothing was changed"), "{told}");
    let running = Scene::begin(&scene.pair.receiver, &["switchover", "db", "--export", &export, "--yes"]);
    eventually("the hook runs", COMMIT_WITHIN, || begun.exists().then_some(()));
    scene.refuses("drained");
    scene.pair.primary.kill();
    let config = std::fs::read_to_string(scene.pair.primary.config()).expect("its configuration");
    let config = format!("{config}\n[hooks]\npost_rollback = \"{}/none\"\n", scene.folder.path().display());
    std::fs::write(scene.pair.primary.config(), config).expect("its configuration");
    scene.pair.primary.start();
    scene.goes_on("let in again, while the hook runs");
    std::fs::write(&go, "").expect("a file");
    Scene::broke(running, "its primary takes writes again");
    scene.goes_on("after the switchover that was not made");
    scene.copy_is_handed(1, "not promoted");
    let point = scene.pair.receiver.points("db").last().expect("a point").0.clone();
    let told = text(&scene.pair.primary.ask(&["rollback", "db", "--point", &point]));
    assert!(told.contains("  hook        post-rollback: WILL FAIL: ") && told.contains("nothing was changed"), "{told}");
}

/// Back to a point, and forward again: each image is what it was, and nothing is forgotten.
#[test]
fn a_rollback_goes_back_and_forward_again() {
    let folder = scratch();
    let mut random = SmallRng::seed_from_u64(seed());
    let pair = Pair::start(folder.path(), "db", "50ms", DISKS);
    let mut model = Model::new(DISKS);
    write_some(&pair.sockets, &mut model, &mut random, 200);
    pair.primary.settled("db");
    let then = model.snapshot();
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
    let mut model = Model::new(DISKS);
    write_some(&pair.sockets, &mut model, &mut random, 300);
    pair.primary.settled("db");
    let common = model.disks.clone();
    pair.receiver.kill();
    model.changed.clear();
    write_some(&pair.sockets, &mut model, &mut random, 200);
    pair.primary.kill();
    let ours = model.snapshot();
    let own = differing(&ours.disks, &common);
    model.changed.clear();
    model.disks = common;
    pair.receiver.start();
    let socket = folder.path().join("active.sock");
    pair.receiver.failover("db", None, &socket);
    let active = vec![socket.clone(), socket.clone()];
    write_some(&active, &mut model, &mut random, 1200);
    pair.primary.start();
    fenced(&pair, &model);

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
        // One that was broken off may be handing the disks over all the same.
        let copy = eventually("it has ended at the receiver", COMMIT_WITHIN, || {
            let copy = pair.receiver.copy("primary", "db");
            (done || copy["state"] != "active" || copy["peer"].is_null()).then_some(copy)
        });
        let state = copy["state"].clone();
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
    let mut model = Model::new(DISKS);
    write_some(&pair.sockets, &mut model, &mut random, 300);
    pair.primary.settled("db");
    let then = model.snapshot();
    let before = pair.receiver.points("db").last().expect("a point").0.clone();
    write_some(&pair.sockets, &mut model, &mut random, 1000);
    pair.primary.settled("db");
    for kill in 0..KILLS {
        can_begin(&pair);
        let overwriting = kill % 2 == 0;
        let within = if overwriting { KILL_WITHIN_MS / 4 } else { KILL_WITHIN_MS };
        let wait = Duration::from_millis(random.random_range(0..within));
        let mut running =
            pair.primary.command(&["rollback", "db", "--point", &before, "--yes", "--json"]).spawn().expect("the command");
        // Most of its time goes by before the first block is overwritten: every other kill comes after that.
        eventually("the rollback begins", COMMIT_WITHIN, || {
            let status = pair.primary.primary("db")["handback"].clone();
            let begun = !status.is_null() && (!overwriting || status["step"] == "taking what the other site has");
            (begun || matches!(running.try_wait(), Ok(Some(_)))).then_some(())
        });
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
        println!(
            "kill {kill} after {wait:?} (overwriting: {overwriting}, primary: {primary}): generation {generation}, succeeded: {done}"
        );
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
