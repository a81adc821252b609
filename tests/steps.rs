//! SIGKILL at every step of failover, switchover, failback, rollback, fold, thin and flatten, on either side of it.
//!
//! A node is told at which step of `blockdev::steps` it is to die, and dies there of its own SIGKILL; started again, it is told the next one. So each
//! transition is killed at one step after the other, and continues by itself or is repeated by the same command, until it comes to its end. After
//! each death: every remembered point is what it was, byte for byte; the active copy or the primary's disks are what their guest wrote; at most
//! one side takes writes; nothing that a primary had of its own is gone.
//!
//! Would catch a step after which a command cannot be repeated or a start does not go on, two writers or none for good, a block of one side
//! that shows up at the other, own blocks that are overwritten before they are kept.

// A release build does not die on demand.
#![cfg(debug_assertions)]

mod support;

use blockdev::steps::Step;
use support::model::{Disks, export_is, fenced, hand_back_well, images_are, verified};
use support::nbd::{Nbd, is_lost};
use support::node::COMMIT_WITHIN;
use support::scene::{Scene, Side};
use support::{eventually, noise, text};

const MIB: u64 = 1 << 20;
/// The second disk ends within a block.
const DISKS: Disks = &[("root", 8 * MIB), ("logs", MIB + 700)];

/// Where to die: at a step, when it is reached for the nth time.
type Deaths = &'static [(Step, u32)];

const FAILOVER: Deaths = &[
    (Step::FailoverRecorded, 1),
    (Step::FailoverRaised, 1),
    (Step::FailoverForkBuilt, 1),
    (Step::FailoverForkNamed, 1),
    (Step::FailoverForkOpen, 1),
    (Step::FailoverExported, 1),
];
const SWITCHOVER_AT_PRIMARY: Deaths =
    &[(Step::SwitchoverAsked, 1), (Step::SwitchoverRecorded, 1), (Step::SwitchoverCommitted, 1)];
/// The second one ends it: the promotion is what counts.
const SWITCHOVER_AT_RECEIVER: Deaths = &[(Step::SwitchoverDrained, 1), (Step::FailoverRaised, 1)];
const FAILBACK_AT_PRIMARY: Deaths = &[
    (Step::TakeBegun, 1),
    (Step::TakeKept, 1),
    (Step::TakeKeptRecorded, 1),
    (Step::TakeFrame, 1),
    (Step::TakeFrame, 12),
    (Step::TakePass, 1),
    (Step::TakeFlushed, 1),
    // Behind the last pass.
    (Step::TakeFlushed, 2),
    (Step::TakeHanded, 1),
    (Step::TakeOpened, 1),
];
const FAILBACK_AT_RECEIVER: Deaths = &[
    (Step::GiveArrived, 1),
    (Step::GiveNamed, 1),
    (Step::GiveClaimed, 1),
    (Step::GivePass, 1),
    (Step::GiveHeld, 1),
    (Step::GiveApplied, 1),
    (Step::GiveSealed, 1),
    (Step::GiveHanded, 1),
];
const FAILBACK_AGAIN: (Step, u32) = (Step::GiveForkRemoved, 1);
const ROLLBACK_AT_PRIMARY: Deaths = &[
    (Step::RollbackParked, 1),
    (Step::TakeBegun, 1),
    (Step::TakeFrame, 1),
    (Step::TakeFrame, 12),
    (Step::TakePass, 1),
    (Step::TakeFlushed, 1),
    (Step::TakeHanded, 1),
    (Step::TakeRecorded, 1),
];
const ROLLBACK_AT_RECEIVER: Deaths =
    &[(Step::GiveClaimed, 1), (Step::GivePass, 1), (Step::GiveApplied, 1), (Step::GiveHanded, 1)];
const ROLLBACK_AGAIN: (Step, u32) = (Step::GiveSealed, 1);
const FOLD: Deaths =
    &[(Step::FoldBegun, 1), (Step::FoldRun, 5), (Step::FoldWritten, 1), (Step::FoldSynced, 1), (Step::FoldEnded, 1)];
const FOLD_AGAIN: Deaths = &[(Step::FoldSegmentRemoved, 1)];
const THIN: Deaths =
    &[(Step::ThinBuilt, 1), (Step::ThinNamed, 1), (Step::ThinSynced, 1), (Step::ThinSegmentRemoved, 1), (Step::ThinNamed, 2)];
/// Bytes of a write that is more than half of a segment of 2 MiB. Not always the same: epochs that end where a segment does now and then.
const LARGE: std::ops::Range<usize> = 1100 << 10..1500 << 10;
const FLATTEN: Deaths = &[
    (Step::FlattenBegun, 1),
    (Step::FlattenPiece, 1),
    (Step::FlattenPiece, 7),
    (Step::FlattenSynced, 1),
    (Step::FlattenBits, 1),
    (Step::FlattenCopied, 1),
    (Step::FlattenMarked, 1),
];
const FLAT: (Step, u32) = (Step::FlattenTouched, 1);

/// Would catch a step that is added to the table, or to a transition, and that no test here walks to. That each of these is reached is
/// what the others fail for.
#[test]
fn every_step_of_the_table_is_died_at() {
    let all = [
        FAILOVER,
        SWITCHOVER_AT_PRIMARY,
        SWITCHOVER_AT_RECEIVER,
        FAILBACK_AT_PRIMARY,
        FAILBACK_AT_RECEIVER,
        &[FAILBACK_AGAIN],
        ROLLBACK_AT_PRIMARY,
        ROLLBACK_AT_RECEIVER,
        &[ROLLBACK_AGAIN],
        FOLD,
        FOLD_AGAIN,
        THIN,
        FLATTEN,
        &[FLAT],
    ];
    let died: Vec<Step> = all.concat().into_iter().map(|(step, _)| step).collect();
    let missing: Vec<_> = Step::ALL.iter().filter(|step| !died.contains(step)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    println!("{} deaths at {} steps", died.len(), Step::ALL.len());
}

#[test]
fn a_failover_continues_after_each_step() {
    let mut scene = Scene::new(DISKS);
    scene.pair.primary.kill();
    scene.pair.receiver.kill();
    let export = scene.copy_export();
    let command = ["failover", "db", "--export", &export, "--yes", "--force", "--json"];
    for &(step, nth) in FAILOVER {
        let when = format!("receiver died at '{step}'");
        scene.pair.receiver.dies_next_at(step, nth);
        scene.pair.receiver.launch();
        // What was begun goes on by itself at the start, and may have died there already.
        if scene.pair.receiver.answers() {
            assert!(!scene.pair.receiver.ask(&command).status.success(), "{when}: and the command says that it is done");
        }
        scene.pair.receiver.died_at(step);
        scene.store_is_sound(step > Step::FailoverRecorded, &when);
        println!("{when}: every point and the copy are what they were");
    }
    scene.pair.receiver.start();
    scene.copy_goes_on("served again by the start alone");
    // Asked again, it says what holds.
    let told = scene.pair.receiver.json(&command[..command.len() - 1]);
    let newest = scene.remembered.keys().next().expect("a point");
    assert!(told["generation"] == 2 && told["point"] == newest.as_str(), "{told:#}");
    scene.copy_goes_on("served by the command");
    scene.pair.primary.start();
    fenced(&scene.pair, &scene.model);
    scene.pair.receiver.kill();
    scene.store_is_sound(true, "in the end");
}

#[test]
fn a_switchover_that_dies_leaves_one_writer() {
    let mut scene = Scene::new(DISKS);
    let export = scene.copy_export();
    let command = ["switchover", "db", "--export", &export, "--yes"];
    for &(step, nth) in SWITCHOVER_AT_PRIMARY {
        let when = format!("primary died at '{step}' of the switchover");
        scene.pair.primary.kill();
        scene.pair.primary.dies_next_at(step, nth);
        scene.pair.primary.start();
        scene.follows();
        scene.write(20);
        let running = scene.dies_of([Side::Primary, Side::Receiver], &command, step);
        images_are(&scene.pair, &scene.model, &when);
        scene.pair.primary.start();
        Scene::broke(running, &when);
        scene.goes_on(&when);
        scene.copy_is_handed(1, &when);
        println!("{when}: nothing was switched, its guest goes on");
    }
    scene.pair.receiver.kill();
    for &(step, nth) in SWITCHOVER_AT_RECEIVER {
        let when = format!("receiver died at '{step}' of the switchover");
        scene.pair.receiver.dies_next_at(step, nth);
        scene.pair.receiver.start();
        scene.goes_on("before the next try");
        let running = scene.dies_of([Side::Receiver, Side::Receiver], &command, step);
        Scene::broke(running, &when);
        let promoted = step == Step::FailoverRaised;
        scene.store_is_sound(promoted, &when);
        // Nobody knows here whether the other side is the writer by now.
        scene.refuses("drained");
        scene.pair.primary.kill();
        scene.pair.primary.start();
        scene.refuses("drained");
        images_are(&scene.pair, &scene.model, &when);
        println!("{when}: the primary refuses writes until it hears from it");
    }
    scene.pair.receiver.start();
    fenced(&scene.pair, &scene.model);
    scene.copy_goes_on("switched over by the start alone");
}

#[test]
fn a_failback_is_repeated_after_each_step_of_the_primary() {
    let mut scene = Scene::new(DISKS);
    scene.part();
    for (done, &(step, nth)) in FAILBACK_AT_PRIMARY.iter().enumerate() {
        let when = format!("primary died at '{step}' ({nth}) of the failback");
        scene.pair.primary.dies_next_at(step, nth);
        scene.pair.primary.start();
        if done == 0 {
            fenced(&scene.pair, &scene.model);
        } else {
            scene.refuses("handback");
        }
        let running = scene.dies_of([Side::Primary, Side::Primary], &["failback", "db", "--yes"], step);
        Scene::broke(running, &when);
        scene.own_is_safe(&when);
        if step < Step::TakeHanded {
            scene.copy_goes_on(&when);
            println!("{when}: the active copy goes on, nothing of its own is lost");
        } else {
            scene.copy_is_handed(3, &when);
            images_are(&scene.pair, &scene.model, &when);
            println!("{when}: the disks are back");
        }
    }
    scene.pair.primary.start();
    scene.goes_on("after the failback");
    scene.own_is_safe("after the failback");
    verified(&scene.pair);
    scene.pair.receiver.kill();
    scene.store_is_sound(false, "after the failback");
}

#[test]
fn a_failback_is_repeated_after_each_step_of_the_receiver() {
    let mut scene = Scene::new(DISKS);
    scene.part();
    scene.pair.primary.start();
    fenced(&scene.pair, &scene.model);
    for &(step, nth) in FAILBACK_AT_RECEIVER {
        give_and_die(&mut scene, &["failback", "db"], (step, nth), step != Step::GiveHanded);
        scene.own_is_safe("what is kept");
        scene.refuses("handback");
        if step == Step::GiveHanded {
            scene.copy_is_handed(3, "handed over");
        } else {
            scene.copy_goes_on("the failback broke");
        }
    }
    let forks = scene.forks();
    assert!(forks.iter().all(|name| name.starts_with("diverged-1")), "what was given back takes space: {forks:?}");
    hand_back_well(&scene.pair, &["failback", "db"]);
    scene.goes_on("after the failback");
    scene.own_is_safe("after the failback");

    // All over again, without writes of its own.
    scene.pair.receiver.kill();
    let (step, nth) = FAILBACK_AGAIN;
    scene.pair.receiver.dies_next_at(step, nth);
    scene.pair.receiver.start();
    scene.goes_on("before the second failover");
    scene.pair.receiver.failover("db", None, &scene.copy_socket());
    fenced(&scene.pair, &scene.model);
    scene.write_at_copy(100);
    let running = scene.dies_of([Side::Receiver, Side::Primary], &["failback", "db", "--yes"], step);
    scene.store_is_sound(false, "the fork is removed");
    scene.pair.receiver.start();
    Scene::broke(running, "the fork is removed");
    scene.refuses("handback");
    hand_back_well(&scene.pair, &["failback", "db"]);
    scene.goes_on("after the second failback");
    let forks = scene.forks();
    assert!(forks.iter().all(|name| name.starts_with("diverged-1")), "what was given back takes space: {forks:?}");
    println!("receiver died at '{step}' of the failback: repeated, it finds that it is done");
    verified(&scene.pair);
    scene.pair.receiver.kill();
    scene.store_is_sound(false, "after the second failback");
}

/// The receiver, started anew, dies at a step of what the primary asks for; the store is looked at, and the receiver started again.
#[track_caller]
fn give_and_die(scene: &mut Scene, command: &[&str], (step, nth): (Step, u32), active: bool) {
    let when = format!("receiver died at '{step}' of the {}", command[0]);
    scene.pair.receiver.kill();
    scene.pair.receiver.dies_next_at(step, nth);
    scene.pair.receiver.start();
    if scene.pair.primary.primary("db")["writes_refused"].is_null() {
        scene.follows();
    }
    let running = scene.dies_of([Side::Receiver, Side::Primary], &[command, &["--yes"]].concat(), step);
    scene.store_is_sound(active, &when);
    scene.pair.receiver.start();
    Scene::broke(running, &when);
    println!("{when}: every point is what it was");
}

/// A scene with more written after the remembered point, which is remembered too; both points' names.
fn written_on() -> (Scene, String, String) {
    let mut scene = Scene::new(DISKS);
    let before = scene.remembered.keys().next().expect("a point").clone();
    scene.write(300);
    let after = scene.remember();
    (scene, before, after)
}

#[test]
fn a_rollback_is_repeated_after_each_step_of_the_primary() {
    let (mut scene, before, after) = written_on();
    let rollback = ["rollback", "db", "--point", &before, "--yes"];
    scene.pair.primary.kill();
    for &(step, nth) in ROLLBACK_AT_PRIMARY {
        let when = format!("primary died at '{step}' ({nth}) of the rollback");
        scene.pair.primary.dies_next_at(step, nth);
        scene.pair.primary.start();
        if step <= Step::TakeBegun {
            // The one before had not begun.
            scene.follows();
            images_are(&scene.pair, &scene.model, &when);
        } else {
            scene.refuses("handback");
        }
        let running = scene.dies_of([Side::Primary, Side::Primary], &rollback, step);
        Scene::broke(running, &when);
        scene.copy_is_handed(if step < Step::TakeHanded { 1 } else { 2 }, &when);
        println!("{when}: {}", if step < Step::TakeBegun { "its guest goes on" } else { "no guest writes until it is repeated" });
    }
    scene.pair.primary.start();
    scene.model.disks = scene.remembered[&before].clone();
    scene.goes_on("rolled back");

    // Who asks for another point than the one that broke at its very end is told where the disks are, also if it is asked for by its name.
    scene.pair.receiver.cli(&["points", "db", "--name", &before, "earlier"]);
    let step = Step::TakeHanded;
    for asked in [&before, "earlier"] {
        scene.pair.primary.kill();
        scene.pair.primary.dies_next_at(step, 1);
        scene.pair.primary.start();
        scene.follows();
        let running = scene.dies_of([Side::Primary, Side::Primary], &["rollback", "db", "--point", &after, "--yes"], step);
        Scene::broke(running, "primary died when it went forward");
        scene.pair.primary.start();
        let told = text(&scene.pair.primary.ask(&["rollback", "db", "--point", asked, "--yes"]));
        let place = format!("the disks are at point {after}, where an earlier try had brought them");
        assert!(told.contains(&place) && told.contains(&format!("to point {before}")), "{asked}: {told}");
        scene.model.disks = scene.remembered[&after].clone();
        scene.goes_on("forward");
        hand_back_well(&scene.pair, &rollback[..rollback.len() - 1]);
        scene.model.disks = scene.remembered[&before].clone();
        scene.goes_on("back again");
    }
    verified(&scene.pair);
    scene.pair.receiver.kill();
    scene.store_is_sound(false, "rolled back");
}

#[test]
fn a_rollback_is_repeated_after_each_step_of_the_receiver() {
    let (mut scene, before, after) = written_on();
    let rollback = ["rollback", "db", "--point", &before];
    for &death in ROLLBACK_AT_RECEIVER {
        give_and_die(&mut scene, &rollback, death, false);
        scene.refuses("handback");
        scene.copy_is_handed(if death.0 == Step::GiveHanded { 2 } else { 1 }, "the rollback broke");
    }
    hand_back_well(&scene.pair, &rollback);
    scene.model.disks = scene.remembered[&before].clone();
    scene.goes_on("rolled back");
    let forward = ["rollback", "db", "--point", &after];
    give_and_die(&mut scene, &forward, ROLLBACK_AGAIN, false);
    scene.refuses("handback");
    hand_back_well(&scene.pair, &forward);
    scene.model.disks = scene.remembered[&after].clone();
    scene.goes_on("rolled forward");
    verified(&scene.pair);
    scene.pair.receiver.kill();
    scene.store_is_sound(false, "rolled forward");
}

/// The receiver's configuration, with `lines` at the end: of its only client.
fn configure(scene: &Scene, lines: &str, receiver: &str) {
    let config = std::fs::read_to_string(scene.pair.receiver.config()).expect("its configuration");
    let at = config.find("[receiver]\n").expect("its section");
    let section = config[at..].replacen("[receiver]\n", &format!("[receiver]\n{receiver}"), 1);
    scene.pair.receiver.configure(&format!("{section}{lines}"));
}

/// Both ends agree, nothing that was remembered is lost, and `check` finds nothing; `retention` is what the status says of it.
#[track_caller]
fn is_whole_in_the_end(scene: &mut Scene, retention: &serde_json::Value) {
    assert!(retention["last_error"].is_null(), "{retention:#}");
    scene.pair.primary.settled("db");
    verified(&scene.pair);
    scene.pair.receiver.kill();
    scene.store_is_sound(false, "in the end");
    scene.pair.receiver.cli(&["check", scene.pair.store.to_str().expect("UTF-8")]);
}

#[test]
fn a_fold_continues_after_each_step() {
    let mut scene = Scene::new(DISKS);
    // Only what has a name stays; segments are of 1 MiB.
    let first = scene.remembered.keys().next().expect("a point").clone();
    scene.remembered.remove(&first);
    scene.pair.receiver.kill();
    configure(&scene, "retention = [\"all for 1s\"]\nspace_max = \"32MiB\"\n", "");
    for (name, deaths) in [("kept", FOLD), ("kept-too", FOLD_AGAIN)] {
        scene.pair.receiver.start();
        scene.write(150);
        let point = scene.remember();
        scene.pair.receiver.cli(&["points", "db", "--name", &point, name]);
        if name != "kept" {
            scene.pair.receiver.cli(&["points", "db", "--unname", "kept"]);
            scene.remembered.retain(|name, _| *name == point);
        }
        scene.pair.receiver.kill();
        for &(step, nth) in deaths {
            let when = format!("receiver died at '{step}' ({nth})");
            scene.pair.receiver.dies_next_at(step, nth);
            scene.pair.receiver.launch();
            // Nothing is folded that was just received: time goes by as the primary counts it, in cuts.
            eventually(&when, COMMIT_WITHIN, || {
                scene.write(1);
                (!scene.pair.receiver.runs()).then_some(())
            });
            scene.pair.receiver.died_at(step);
            scene.store_is_sound(false, &when);
            println!("{when}: point {point} is what it was");
        }
    }
    scene.pair.receiver.start();
    let status = eventually("the base is at the named point", COMMIT_WITHIN, || {
        scene.write(1);
        let status = scene.pair.receiver.copy("primary", "db")["retention"].clone();
        let name = scene.remembered.keys().next().expect("a point");
        (status["base"] == name.as_str() && status["folding"].is_null()).then_some(status)
    });
    is_whole_in_the_end(&mut scene, &status);
}

#[test]
fn thinning_continues_after_each_step() {
    let mut scene = Scene::new(DISKS);
    let first = scene.remembered.keys().next().expect("a point").clone();
    scene.pair.receiver.cli(&["points", "db", "--name", &first, "kept"]);
    scene.pair.receiver.kill();
    // Segments are of 2 MiB.
    configure(&scene, "retention = [\"all for 1s\", \"2s for 1h\"]\nspace_max = \"64MiB\"\n", "");
    for &(step, nth) in THIN {
        let when = format!("receiver died at '{step}' ({nth})");
        scene.pair.receiver.dies_next_at(step, nth);
        scene.pair.receiver.launch();
        // Time goes by as the primary counts it, in cuts. However slow the disks are, an epoch goes on in the next segment, so the two become
        // one, and there is one to be removed.
        eventually(&when, COMMIT_WITHIN, || {
            scene.write(3);
            scene.write_again(LARGE);
            (!scene.pair.receiver.runs()).then_some(())
        });
        scene.pair.receiver.died_at(step);
        scene.store_is_sound(false, &when);
        println!("{when}: the points that stay are what they were");
        scene.pair.receiver.start();
        let point = scene.remember();
        scene.remembered.retain(|name, _| *name == point);
        scene.pair.receiver.cli(&["points", "db", "--unname", "kept"]);
        scene.pair.receiver.cli(&["points", "db", "--name", &point, "kept"]);
        scene.pair.receiver.kill();
    }
    scene.pair.receiver.start();
    let status = eventually("points are left out", COMMIT_WITHIN, || {
        scene.write(3);
        scene.write_again(LARGE);
        let status = scene.pair.receiver.copy("primary", "db")["retention"].clone();
        (status["thinned_points"].as_u64() > Some(0)).then_some(status)
    });
    is_whole_in_the_end(&mut scene, &status);
}

#[test]
fn flattening_continues_after_each_step() {
    let mut scene = Scene::new(DISKS);
    scene.pair.primary.kill();
    scene.pair.receiver.kill();
    // Until there are writes to the fork nothing is flattened.
    configure(&scene, "", "flatten = false\n");
    scene.pair.receiver.start();
    scene.pair.receiver.failover("db", None, &scene.copy_socket());
    scene.write_at_copy(60);
    scene.pair.receiver.kill();
    let config = std::fs::read_to_string(scene.pair.receiver.config()).expect("its configuration");
    std::fs::write(scene.pair.receiver.config(), config.replacen("flatten = false\n", "", 1)).expect("its configuration");
    for &(step, nth) in FLATTEN {
        let when = format!("receiver died at '{step}' ({nth})");
        scene.pair.receiver.dies_next_at(step, nth);
        scene.pair.receiver.launch();
        scene.pair.receiver.died_at(step);
        scene.store_is_sound(true, &when);
        println!("{when}: the copy is what its guest wrote");
    }
    let (step, nth) = FLAT;
    let when = format!("receiver died at '{step}'");
    scene.pair.receiver.dies_next_at(step, nth);
    scene.pair.receiver.start();
    eventually("it is flat", COMMIT_WITHIN, || {
        (scene.pair.receiver.copy("primary", "db")["active"]["flatten"]["state"] == "flat").then_some(())
    });
    export_is(&scene.copy_socket(), &scene.model, "flat");
    write_until_lost(&mut scene);
    scene.pair.receiver.died_at(step);
    scene.store_is_sound(true, &when);
    println!("{when}: the write that touched it was not made");
    scene.pair.receiver.start();
    scene.copy_goes_on("in the end");
    scene.pair.receiver.kill();
    scene.store_is_sound(true, "in the end");
}

/// Writes to one block after the other until the server is gone: with the first that was copied and never written.
#[track_caller]
fn write_until_lost(scene: &mut Scene) {
    let mut nbd = Nbd::connect(&scene.copy_socket(), DISKS[0].0).expect("the copy");
    for at in (0..DISKS[0].1).step_by(4096) {
        let content = noise(at, 4096);
        match nbd.write(at, &content) {
            Ok(()) => scene.model.put(0, at, &content),
            Err(error) if is_lost(&error) => return,
            Err(error) => panic!("a write: {error}"),
        }
    }
    panic!("no block of the disk was only copied");
}
