//! Three real nodes in a row: alpha's disks, their copy at beta, and the copy of that copy at gamma; through kills, failovers of either copy and the
//! way back.
//!
//! Would catch: a point at the third site that the second never had, a change that is forgotten there when a node dies or the copy changes
//! between following and active, an active copy whose writes do not go onward, and a copy that cannot become the server because of its
//! third site.

mod support;

use std::sync::atomic::Ordering;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use support::chain::{
    BYTES, Chain, DISKS, all_in_order, block, each_is_one_of, image_block, in_order, more_writes, points, read_export, slots,
    under_load,
};
use support::nbd::Nbd;
use support::node::COMMIT_WITHIN;
use support::{eventually, noise, seed, text};

const MIB: u64 = 1 << 20;
const KILLS: u32 = 6;
/// Points of the third site from one kill to the next, at most.
const POINTS_MAX: u64 = 12;
/// Of a group, by default.
const EPOCHS_IN_FLIGHT: u64 = 8;

/// Gamma follows beta that follows alpha, under load, through kills of the second and the third: each point of the third is one of the second.
#[test]
fn each_point_of_the_third_site_is_one_of_the_second() {
    let mut rng = SmallRng::seed_from_u64(seed());
    let mut chain = Chain::start("20ms");
    let sockets = chain.sockets.clone();
    let last = under_load(&sockets, 0, |_| {
        let mut kept: Vec<(String, u64)> = Vec::new();
        for kill in 0..KILLS {
            let (before, more) = (chain.third_points(), rng.random_range(1..=POINTS_MAX));
            eventually("points are committed at the third site", COMMIT_WITHIN, || {
                (chain.third_points() >= before + more).then_some(())
            });
            let victims = rng.random_range(1..4);
            println!("kill {kill}: {} after {more} points", ["the second", "the third", "both"][victims - 1]);
            if victims & 1 != 0 {
                chain.beta.kill();
            }
            if victims & 2 != 0 {
                chain.gamma.kill();
                chain.gamma.start();
            }
            let listed = chain.gamma.points("db");
            assert!(listed.starts_with(&kept), "points that were there before kill {kill} are gone");
            kept = listed;
            if victims & 1 != 0 {
                chain.beta.start();
            }
        }
        let before = chain.third_points();
        eventually("points are committed again", COMMIT_WITHIN, || (chain.third_points() > before + 2).then_some(()));
    });
    chain.all_have_all();
    let report = chain.beta.json(&["verify", "db"]);
    assert_eq!(report["differing_bytes"], 0, "{report:#}");
    chain.alpha.stop();
    chain.beta.stop();
    chain.gamma.stop();
    let second = points(&Chain::store(&chain.beta), "alpha/db");
    let third = points(&Chain::store(&chain.gamma), "beta/db");
    all_in_order(&third);
    let met = each_is_one_of(&third, &second);
    println!("{} points at the third site, {met} images, of {} at the second; {last} writes", third.len(), second.len());
    assert_eq!(in_order("the newest", &third.last().expect("a point").2), last);
}

/// The whole life: alpha dies, beta is the server and gamma goes on following; alpha is repaired and has its disks back; in the end beta dies as
/// the server, and gamma takes over.
#[test]
fn an_active_copy_is_protected_and_goes_back() {
    let mut rng = SmallRng::seed_from_u64(seed());
    let mut chain = Chain::start("20ms");
    let sockets = chain.sockets.clone();
    under_load(&sockets, 0, |acknowledged| {
        more_writes(acknowledged, 200);
        chain.alpha.kill();
    });

    let at_beta = chain.socket("beta");
    let active = vec![at_beta.clone(), at_beta.clone()];
    chain.beta.failover("db", None, &at_beta);
    let from = in_order("beta, active", &read_export(&at_beta));
    let last = under_load(&active, from, |acknowledged| {
        more_writes(acknowledged, 100);
        assert_eq!(chain.onward()["state"], "active", "{:#}", chain.onward());
        // Either side of the protection dies, and goes on.
        chain.gamma.kill();
        more_writes(acknowledged, 50);
        chain.gamma.start();
        more_writes(acknowledged, rng.random_range(10..50));
        chain.beta.kill();
        chain.beta.start();
        more_writes(acknowledged, 50);
    });
    chain.third_has_all();
    assert_eq!(in_order("beta, after a restart", &read_export(&at_beta)), last, "its restart lost nothing");

    // Home again, with a guest that goes on at beta until it is over.
    chain.alpha.start();
    eventually("alpha learns that it is fenced", COMMIT_WITHIN, || {
        (chain.alpha.primary("db")["state"] == "fenced").then_some(())
    });
    under_load(&active, last, |acknowledged| {
        more_writes(acknowledged, 20);
        let told = chain.alpha.ask(&["failback", "db", "--yes", "--json"]);
        assert!(told.status.success(), "{}\n{}", text(&told), chain.logs());
    });
    eventually("the copy follows again", COMMIT_WITHIN, || (chain.onward()["state"] == "following").then_some(()));
    let home = in_order("alpha, home again", &slots(|disk, at| image_block(&chain.images[disk], at)));
    assert!(home >= last);
    let last = under_load(&sockets, home, |acknowledged| more_writes(acknowledged, 200));
    chain.all_have_all();

    // Once more; and now the second site is lost while it is the server.
    chain.alpha.kill();
    chain.beta.failover("db", None, &at_beta);
    assert_eq!(in_order("beta, active again", &read_export(&at_beta)), last);
    let mut told = 0;
    let acknowledged = under_load(&active, last, |acknowledged| {
        more_writes(acknowledged, 150);
        told = acknowledged.load(Ordering::SeqCst);
        let committed = chain.third_points();
        // Those on their way may have been cut before; later ones have everything.
        let later = committed + EPOCHS_IN_FLIGHT + 1;
        eventually("later points", COMMIT_WITHIN, || (chain.third_points() >= later).then_some(()));
        chain.beta.kill();
    });
    let at_gamma = chain.socket("gamma");
    chain.gamma.failover("db", None, &at_gamma);
    let found = in_order("gamma, active", &read_export(&at_gamma));
    println!("gamma has {found} writes: {told} were acknowledged some points before, {acknowledged} in all");
    assert!(found >= told && found <= acknowledged + 1, "{found} of {told} to {acknowledged}");
    chain.gamma.stop();
    all_in_order(&points(&Chain::store(&chain.gamma), "beta/db"));
}

/// What was shown is older than what is chosen, newer, or not known any more: the third site has exactly what the second has.
#[test]
fn an_older_point_and_a_forgotten_record_go_onward() {
    let mut chain = Chain::start("20ms");
    let sockets = chain.sockets.clone();
    let half = under_load(&sockets, 0, |acknowledged| more_writes(acknowledged, 150));
    chain.all_have_all();
    let older = chain.beta.points("db").last().expect("a point").0.clone();
    under_load(&sockets, half, |acknowledged| more_writes(acknowledged, 150));
    chain.all_have_all();

    // Stopped in order, without the record of what was shown: all of it is compared, and none of it differs.
    chain.beta.stop();
    let record = chain.beta.folder.join("state/groups/db/onward.json");
    std::fs::remove_file(&record).expect("the record");
    chain.beta.start();
    let status = eventually("all is compared", COMMIT_WITHIN, || {
        let status = chain.beta.primary("db");
        (status["compared_bytes"].as_u64() >= Some(2 * BYTES) && status["suspect_bytes"] == 0).then_some(status)
    });
    assert_eq!(status["differing_bytes"], 0, "{status:#}");
    eventually("it is known again", std::time::Duration::from_secs(5), || record.exists().then_some(()));
    // Stopped in order, with the record: nothing is.
    chain.beta.stop();
    chain.beta.start();
    chain.all_have_all();
    assert_eq!(chain.beta.primary("db")["compared_bytes"], 0);

    chain.alpha.kill();
    let at_beta = chain.socket("beta");
    chain.beta.failover("db", Some(&older), &at_beta);
    assert_eq!(in_order("the older point", &read_export(&at_beta)), half);
    chain.third_has_all();
    // Killed, with the record of the active copy.
    chain.beta.kill();
    chain.beta.start();
    let last = under_load(&[at_beta.clone(), at_beta.clone()], half, |acknowledged| more_writes(acknowledged, 70));
    chain.third_has_all();
    chain.beta.kill();
    let at_gamma = chain.socket("gamma");
    chain.gamma.failover("db", None, &at_gamma);
    assert_eq!(in_order("gamma", &read_export(&at_gamma)), last);
}

/// A copy becomes the server although what is shown cannot be recorded; what its guests write then reaches the third site after a restart.
#[test]
fn a_copy_becomes_the_server_whatever_its_third_site_does() {
    let mut chain = Chain::start("20ms");
    let sockets = chain.sockets.clone();
    under_load(&sockets, 0, |acknowledged| more_writes(acknowledged, 100));
    chain.all_have_all();
    chain.alpha.kill();
    let in_the_way = chain.beta.folder.join("state/groups/db/onward.json.new");
    std::fs::create_dir(&in_the_way).expect("something in the way");
    let at_beta = chain.socket("beta");
    let active = vec![at_beta.clone(), at_beta.clone()];
    chain.beta.failover("db", None, &at_beta);
    let from = in_order("beta, active", &read_export(&at_beta));
    let last = under_load(&active, from, |acknowledged| more_writes(acknowledged, 100));
    let onward = chain.onward();
    assert_eq!(onward["state"], "bypassed", "{onward:#}");
    let error = onward["error"].as_str().expect("why");
    assert!(error.contains("restart the node") && error.contains("onward.json"), "{error}");
    assert!(chain.beta.cli(&["status"]).contains("guests write past this group"));

    chain.beta.stop();
    std::fs::remove_dir(&in_the_way).expect("out of the way");
    chain.beta.start();
    chain.third_has_all();
    assert_eq!(chain.onward()["state"], "active");
    chain.beta.kill();
    let at_gamma = chain.socket("gamma");
    chain.gamma.failover("db", None, &at_gamma);
    assert_eq!(in_order("gamma", &read_export(&at_gamma)), last);
}

/// The copy goes back to its primary, and that it is a follower again cannot be recorded before the second site is killed: the record still says
/// that the active copy is shown, which is no more.
#[test]
fn a_record_of_an_active_copy_that_was_given_back() {
    let mut chain = Chain::start("20ms");
    let sockets = chain.sockets.clone();
    under_load(&sockets, 0, |acknowledged| more_writes(acknowledged, 100));
    chain.all_have_all();
    chain.alpha.kill();
    let at_beta = chain.socket("beta");
    chain.beta.failover("db", None, &at_beta);
    let from = in_order("beta, active", &read_export(&at_beta));
    let last = under_load(&[at_beta.clone(), at_beta.clone()], from, |acknowledged| more_writes(acknowledged, 70));
    chain.third_has_all();
    let in_the_way = chain.beta.folder.join("state/groups/db/onward.json.new");
    std::fs::create_dir(&in_the_way).expect("something in the way");
    chain.alpha.start();
    eventually("alpha learns that it is fenced", COMMIT_WITHIN, || {
        (chain.alpha.primary("db")["state"] == "fenced").then_some(())
    });
    let told = chain.alpha.ask(&["failback", "db", "--yes", "--json"]);
    assert!(told.status.success(), "{}\n{}", text(&told), chain.logs());
    let last = under_load(&sockets, last, |acknowledged| more_writes(acknowledged, 70));
    chain.alpha.settled("db");
    eventually("beta says what is in the way", COMMIT_WITHIN, || {
        chain.onward()["error"].as_str().filter(|error| error.contains("onward.json")).map(drop)
    });
    assert_eq!(chain.onward()["state"], "active", "nothing else is shown yet");
    chain.beta.kill();
    std::fs::remove_dir(&in_the_way).expect("out of the way");
    chain.beta.start();
    chain.all_have_all();
    assert_eq!(chain.onward()["state"], "following");
    // What the copy was at its end is known; the point that holds it is shown first.
    let log = chain.beta.log();
    assert!(log.contains("all_suspect=false"), "{log}");
    let report = chain.beta.json(&["verify", "db"]);
    assert_eq!(report["differing_bytes"], 0, "{report:#}");
    chain.beta.kill();
    let at_gamma = chain.socket("gamma");
    chain.gamma.failover("db", None, &at_gamma);
    assert_eq!(in_order("gamma", &read_export(&at_gamma)), last);
}

/// The third site becomes the server while the second follows: what follows has nothing to take back, and a failover there says what it would be
/// worth; forced, it takes the third site's disks back.
#[test]
fn the_third_site_may_be_the_server_and_give_back() {
    let mut chain = Chain::start("20ms");
    let sockets = chain.sockets.clone();
    let from = under_load(&sockets, 0, |acknowledged| more_writes(acknowledged, 100));
    chain.all_have_all();
    chain.alpha.kill();
    let at_gamma = chain.socket("gamma");
    chain.gamma.failover("db", None, &at_gamma);
    let last = under_load(&[at_gamma.clone(), at_gamma.clone()], from, |acknowledged| more_writes(acknowledged, 100));
    eventually("beta learns that its group is fenced", COMMIT_WITHIN, || {
        (chain.beta.primary("db")["state"] == "fenced").then_some(())
    });
    let told = chain.beta.ask(&["failback", "db", "--yes"]);
    assert!(!told.status.success() && text(&told).contains("copy alpha/db"), "{}", text(&told));
    let at_beta = chain.socket("beta");
    let export = format!("unix:{}", at_beta.display());
    eventually("alpha counts as gone", COMMIT_WITHIN, || {
        (chain.beta.copy("alpha", "db")["primary_alive"] == false).then_some(())
    });
    let told = chain.beta.ask(&["failover", "db", "--export", &export, "--yes"]);
    assert_eq!(told.status.code(), Some(3), "{}", text(&told));
    assert!(text(&told).contains("third site") && text(&told).contains("--force"), "{}", text(&told));

    chain.beta.failover("db", None, &at_beta);
    let mut refused = Nbd::connect(&at_beta, DISKS[0]).expect("the export");
    refused.write(0, &block(1)).expect_err("gamma is the server");
    let told = chain.beta.ask(&["failback", "db", "--yes", "--json"]);
    assert!(told.status.success(), "{}\n{}", text(&told), chain.logs());
    assert_eq!(in_order("beta, home from gamma", &read_export(&at_beta)), last);
    let active = [at_beta.clone(), at_beta.clone()];
    let last = under_load(&active, last, |acknowledged| more_writes(acknowledged, 70));
    chain.third_has_all();

    // And all the way to alpha.
    chain.alpha.start();
    eventually("alpha learns that it is fenced", COMMIT_WITHIN, || {
        (chain.alpha.primary("db")["state"] == "fenced").then_some(())
    });
    let told = chain.alpha.ask(&["failback", "db", "--yes", "--json"]);
    assert!(told.status.success(), "{}\n{}", text(&told), chain.logs());
    assert_eq!(in_order("alpha", &slots(|disk, at| image_block(&chain.images[disk], at))), last);
    chain.all_have_all();
}

/// A copy that is not there yet is waited for, and said; a group that would go to its own node does not start.
#[test]
fn a_copy_that_is_not_there_is_waited_for() {
    let mut chain = Chain::new("20ms");
    chain.gamma.start();
    chain.beta.start();
    let reason = eventually("it says what it waits for", COMMIT_WITHIN, || {
        let status = chain.beta.primary("db");
        status["reason"].as_str().filter(|reason| reason.contains("alpha/db")).map(str::to_owned)
    });
    assert_eq!(reason.lines().count(), 1);
    let shown = chain.beta.cli(&["status"]);
    assert!(shown.contains("waiting: there is no copy alpha/db here yet"), "{shown}");
    let refused = chain.beta.ask(&["verify", "db"]);
    assert!(!refused.status.success() && text(&refused).contains("alpha/db"), "{}", text(&refused));
    // It stops in order all the same.
    chain.beta.stop();
    chain.beta.start();
    chain.alpha.start();
    chain.first_point();
    let shown = chain.beta.cli(&["status", "db"]);
    assert!(shown.contains("copy of alpha/db, at its point"), "{shown}");

    chain.beta.stop();
    let config = std::fs::read_to_string(chain.beta.config()).expect("its configuration");
    std::fs::write(chain.beta.config(), config.replace(&chain.gamma.key(), &chain.beta.key())).expect("the configuration");
    chain.beta.start();
    eventually("it says that it is its own", COMMIT_WITHIN, || {
        let status = chain.beta.primary("db");
        status["reason"].as_str().filter(|reason| reason.contains("this node's own")).map(drop)
    });
}

/// The third site becomes the server in order, with a guest at the active copy: its last acknowledged write is there. Then it is given up: under
/// another name the group is sent anew.
#[test]
fn a_switchover_to_the_third_site_loses_nothing() {
    let mut chain = Chain::start("20ms");
    let sockets = chain.sockets.clone();
    under_load(&sockets, 0, |acknowledged| more_writes(acknowledged, 100));
    chain.all_have_all();
    chain.alpha.kill();
    let (at_beta, at_gamma) = (chain.socket("beta"), chain.socket("gamma"));
    chain.beta.failover("db", None, &at_beta);
    let active = [at_beta.clone(), at_beta.clone()];
    let from = in_order("beta, active", &read_export(&at_beta));
    let export = format!("unix:{}", at_gamma.display());
    let last = under_load(&active, from, |acknowledged| {
        more_writes(acknowledged, 50);
        let told = chain.gamma.json(&["switchover", "db", "--export", &export, "--yes"]);
        assert_eq!(told["generation"], 2, "{told:#}");
    });
    assert!(last >= from + 50);
    assert_eq!(in_order("gamma, switched over", &read_export(&at_gamma)), last);
    eventually("beta learns that its group is fenced", COMMIT_WITHIN, || {
        (chain.beta.primary("db")["state"] == "fenced").then_some(())
    });

    // What gamma holds is given up.
    chain.beta.stop();
    let config = std::fs::read_to_string(chain.beta.config()).expect("its configuration");
    std::fs::write(chain.beta.config(), config.replace("name = \"db\"", "name = \"again\"")).expect("the configuration");
    chain.beta.start();
    let last = under_load(&active, last, |acknowledged| more_writes(acknowledged, 70));
    chain.third_has_all_of("again");
    chain.beta.kill();
    let again = chain.socket("again");
    chain.gamma.failover("again", None, &again);
    assert_eq!(in_order("gamma, anew", &read_export(&again)), last);
}

/// As above while the second site follows: it commits what it shows and goes no further, and the first site notices nothing.
#[test]
fn a_switchover_to_the_third_site_while_the_second_follows() {
    let mut chain = Chain::start("20ms");
    let (sockets, at_gamma) = (chain.sockets.clone(), chain.socket("gamma"));
    let export = format!("unix:{}", at_gamma.display());
    let mut held = 0;
    let last = under_load(&sockets, 0, |acknowledged| {
        more_writes(acknowledged, 100);
        chain.gamma.json(&["switchover", "db", "--export", &export, "--yes"]);
        held = in_order("gamma, switched over", &read_export(&at_gamma));
        more_writes(acknowledged, 100);
    });
    println!("gamma has {held} writes, of {last} at alpha");
    assert!(held > 0 && held < last, "{held} of {last}");
    chain.alpha.settled("db");
    eventually("what follows goes on, and is only marked", COMMIT_WITHIN, || {
        let status = chain.beta.primary("db");
        (status["state"] == "fenced" && chain.onward()["point"] == chain.beta.copy("alpha", "db")["committed"]).then_some(())
    });
    assert_eq!(in_order("gamma, untouched", &read_export(&at_gamma)), held);
    chain.beta.stop();
    chain.gamma.stop();
    let third = points(&Chain::store(&chain.gamma), "beta/db");
    each_is_one_of(&third, &points(&Chain::store(&chain.beta), "alpha/db"));
}

/// The second site folds its oldest points away while it sends on, is killed in between, and the third is away for a while.
#[test]
fn folding_goes_on_behind_what_is_shown() {
    let mut rng = SmallRng::seed_from_u64(seed());
    let mut chain = Chain::new("50ms");
    let config = std::fs::read_to_string(chain.beta.config()).expect("its configuration");
    let limited = config.replacen("\n\n[[group]]", "\nspace_max = \"40MiB\"\n\n[[group]]", 1);
    assert_ne!(limited, config);
    std::fs::write(chain.beta.config(), limited).expect("the configuration");
    chain.gamma.start();
    chain.beta.start();
    chain.alpha.start();
    chain.first_point();
    let sockets = chain.sockets.clone();
    for round in 0..4 {
        let mut disks = DISKS.map(|disk| Nbd::connect(&sockets[usize::from(disk != DISKS[0])], disk).expect("the export"));
        for piece in 0..16 {
            let at = rng.random_range(0..BYTES / MIB) * MIB;
            disks[piece % 2].write(at, &noise(round * 100 + piece as u64, MIB as usize)).expect("a write");
            // Epochs of their own, so that there are points to give up.
            chain.alpha.committed("db");
        }
        match round {
            0 => chain.gamma.kill(),
            1 => {
                chain.beta.kill();
                chain.gamma.start();
                chain.beta.start();
            }
            _ => {}
        }
    }
    chain.all_have_all();
    let retention = chain.beta.copy("alpha", "db")["retention"].clone();
    println!("{retention}");
    assert!(!retention["base"].is_null() && retention["last_error"].is_null(), "{retention}");
    let report = chain.beta.json(&["verify", "db"]);
    assert_eq!(report["differing_bytes"], 0, "{report:#}");
    chain.beta.kill();
    let at_gamma = chain.socket("gamma");
    chain.gamma.failover("db", None, &at_gamma);
    for (disk, image) in DISKS.iter().zip(&chain.images) {
        let (mut copy, wanted) = (Nbd::connect(&at_gamma, disk).expect("the export"), std::fs::read(image).expect("the image"));
        for (at, piece) in (0..).step_by(MIB as usize).zip(wanted.chunks(MIB as usize)) {
            assert!(copy.read(at, piece.len() as u32).expect("a read") == piece, "disk {disk} differs in the MiB at {at}");
        }
    }
}
