//! A client with little space, and one with a steep ladder: the real receiver folds and thins while it receives, and is killed in the middle of it again and again.
//!
//! Would catch: a client that is refused for good although old points could make room, a fold or a thinning that a SIGKILL leaves half done, a base or a
//! point that shows something else afterwards, a named point that is given up, a store that `check` does not understand afterwards.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::DirEntryExt;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use support::nbd::Nbd;
use support::site::Site;
use support::{eventually, noise, seed};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 24 * MIB;
const SPACE_MIB: u64 = 40;
const GROUP: &str = "db";
/// Each writes some MiB, and most of them end with a SIGKILL.
const ROUNDS: u64 = 5;
/// A primary that was refused comes back within 15 s.
const FOLDED_WITHIN: Duration = Duration::from_secs(90);

fn retention(site: &Site) -> Value {
    site.receiver.copy("primary", GROUP)["retention"].clone()
}

/// Folds that space made it begin, and folds that were done, as its log says; one that was killed counts as done at the next.
fn folds(site: &Site) -> [usize; 2] {
    let log = site.receiver.log();
    let last = log.rfind("given up earlier").map_or("", |at| log.get(at..).unwrap_or_default());
    [usize::from(!last.is_empty()), usize::from(last.contains("the base is at point"))]
}

#[test]
fn a_receiver_that_is_killed_while_it_folds_keeps_what_it_promised() {
    let mut site = Site::new();
    let mut rng = SmallRng::seed_from_u64(seed());
    let config = std::fs::read_to_string(site.receiver.config()).unwrap();
    let at = config.find("[receiver]").unwrap();
    site.receiver.configure(&format!("{}space_max = \"{SPACE_MIB}MiB\"\n", &config[at..]));
    site.receiver.start();
    let image = site.image("db.raw", DISK_BYTES);
    site.primary.configure(&site.group(GROUP, &image));
    site.primary.start();
    site.primary.committed_once(GROUP);
    let (mut images, mut kills_in_a_fold, mut early) = (BTreeMap::new(), 0, 0);
    for round in 0..ROUNDS {
        let mut nbd = Nbd::connect(&site.socket(GROUP), "data").unwrap();
        for piece in 0..16 {
            let offset = rng.random_range(0..DISK_BYTES / MIB) * MIB;
            nbd.write(offset, &noise(round * 100 + piece, MIB as usize)).unwrap();
            // Epochs of their own, so that there are points to give up.
            std::thread::sleep(Duration::from_millis(60));
        }
        nbd.flush().unwrap();
        // Killed as soon as it says that it folds, or when everything was taken.
        let deadline = Instant::now() + FOLDED_WITHIN;
        let in_a_fold = loop {
            let [begun, done] = folds(&site);
            if begun > done || site.primary.primary(GROUP)["dirty_bytes"] == 0 {
                break begun > done;
            }
            assert!(Instant::now() < deadline, "neither a fold nor all of it committed");
            for _ in 0..50 {
                let [begun, done] = folds(&site);
                if begun > done {
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        if in_a_fold {
            site.receiver.kill();
            site.receiver.start();
        }
        early += retention(&site)["early_folds"].as_u64().unwrap();
        site.receiver.kill();
        kills_in_a_fold += u32::from(in_a_fold);
        site.receiver.start();
        eventually("all of it committed", FOLDED_WITHIN, || (site.primary.primary(GROUP)["dirty_bytes"] == 0).then_some(()));
        site.primary.settled(GROUP);
        let newest = site.receiver.points(GROUP).last().unwrap().0.clone();
        images.insert(newest, std::fs::read(&image).unwrap());
    }
    let status = eventually("the base has something", FOLDED_WITHIN, || {
        let (status, stored) = (retention(&site), site.receiver.copy("primary", GROUP)["stored_bytes"].as_u64().unwrap());
        // Not so much that the next look for space folds again: nobody writes from here on.
        let calm = stored <= SPACE_MIB * MIB * 85 / 100;
        (!status["base"].is_null() && status["folding"].is_null() && calm).then_some(status)
    });
    println!("killed in a fold: {kills_in_a_fold}; early folds seen: {early}; {status}");
    assert!(status["last_error"].is_null(), "{status}");
    let points = site.receiver.points(GROUP);
    assert_eq!(points[0].0, status["base"].as_str().unwrap(), "the base's point is offered");
    // A name: by point, by another name, and taken away.
    let newest = points.last().unwrap().0.clone();
    site.receiver.cli(&["points", GROUP, "--name", &newest, "before-upgrade"]);
    site.receiver.cli(&["points", GROUP, "--name", "before-upgrade", "again"]);
    site.receiver.cli(&["points", GROUP, "--unname", "again"]);
    let listed = site.receiver.json(&["points", GROUP]);
    assert_eq!(listed["points"].as_array().unwrap().last().unwrap()["names"], serde_json::json!(["before-upgrade"]));
    assert!(site.receiver.cli(&["points", GROUP, "--timeline"]).contains("before-upgrade"));
    assert!(!site.receiver.ask(&["points", GROUP, "--name", "9.9", "nowhere"]).status.success());
    site.receiver.kill();
    let store = site.store.to_str().unwrap().to_owned();
    let checked = site.receiver.ask(&["check", &store]);
    assert!(checked.status.success(), "{}", support::text(&checked));
    site.receiver.start();
    // The oldest point of which the image is remembered and that is still there, and the newest.
    let kept: Vec<String> = site.receiver.points(GROUP).into_iter().map(|p| p.0).collect();
    assert!(kept.contains(&newest));
    let oldest = images.keys().find(|point| kept.contains(point)).unwrap().clone();
    site.primary.kill();
    let socket = site.folder.path().join("copy.sock");
    site.receiver.failover(GROUP, Some(&oldest), &socket);
    let mut copy = Nbd::connect(&socket, "data").unwrap();
    for (at, piece) in (0..).step_by(MIB as usize).zip(images[&oldest].chunks(MIB as usize)) {
        assert!(copy.read(at, piece.len() as u32).unwrap() == piece, "point {oldest} differs in the MiB at {at}");
    }
}

/// Each ends with a SIGKILL in the middle of thinning, or right after.
const THIN_ROUNDS: u64 = 6;
const HOT_BYTES: u64 = MIB / 2;

/// Whether a thinned segment is being built, or is built and has no name yet.
fn is_thinning(site: &Site) -> bool {
    !thinned(site).is_empty()
}

/// The files of them.
fn thinned(site: &Site) -> BTreeSet<u64> {
    let entries = std::fs::read_dir(site.store.join("primary").join(GROUP).join("journal")).unwrap();
    entries.flatten().filter(|entry| entry.path().extension().is_some_and(|e| e == "thin")).map(|entry| entry.ino()).collect()
}

#[test]
fn a_receiver_that_is_killed_while_it_thins_keeps_what_it_promised() {
    let mut site = Site::new();
    let mut rng = SmallRng::seed_from_u64(seed());
    let config = std::fs::read_to_string(site.receiver.config()).unwrap();
    let at = config.find("[receiver]").unwrap();
    let keys = "space_max = \"96MiB\"\nretention = [\"all for 1s\", \"3s for 1h\"]\n";
    site.receiver
        .configure(&format!("{}{keys}[[receiver.client.group]]\nname = \"{GROUP}\"\nspace_max = \"64MiB\"\n", &config[at..]));
    site.receiver.start();
    let image = site.image("db.raw", DISK_BYTES);
    site.primary.configure(&site.group(GROUP, &image));
    site.primary.start();
    site.primary.committed_once(GROUP);
    let mut images = BTreeMap::new();
    let mut piece = 0;
    // Small writes over the same place, in epochs of their own: most of what a segment holds is written over in it.
    let mut write = |site: &Site, rng: &mut SmallRng| {
        let mut nbd = Nbd::connect(&site.socket(GROUP), "data").unwrap();
        piece += 1;
        nbd.write(rng.random_range(0..2) * (HOT_BYTES / 2), &noise(piece, HOT_BYTES as usize / 2)).unwrap();
        nbd.flush().unwrap();
    };
    for round in 0..THIN_ROUNDS {
        let deadline = Instant::now() + FOLDED_WITHIN;
        'thinning: loop {
            assert!(Instant::now() < deadline, "nothing was thinned: {}", retention(&site));
            write(&site, &mut rng);
            for _ in 0..60 {
                if is_thinning(&site) {
                    break 'thinning;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        // Every other time when it has its name, and what it stands for is being removed.
        while round % 2 == 1 && is_thinning(&site) {
            assert!(Instant::now() < deadline, "a thinned segment that gets no name");
        }
        site.receiver.kill();
        let left = thinned(&site);
        // A number may be given again as soon as its file is gone; one that is held open is no other's.
        let journal = site.store.join("primary").join(GROUP).join("journal");
        let held: Vec<_> =
            std::fs::read_dir(&journal).unwrap().flatten().filter_map(|e| std::fs::File::open(e.path()).ok()).collect();
        site.receiver.start();
        assert!(left.is_disjoint(&thinned(&site)), "what was left of it is removed by the start");
        drop(held);
        eventually("all of it committed", FOLDED_WITHIN, || (site.primary.primary(GROUP)["dirty_bytes"] == 0).then_some(()));
        site.primary.settled(GROUP);
        let newest = site.receiver.points(GROUP).last().unwrap().0.clone();
        site.receiver.cli(&["points", GROUP, "--name", &newest, &format!("round-{round}")]);
        images.insert(newest, std::fs::read(&image).unwrap());
    }
    let status = eventually("points are left out once more", FOLDED_WITHIN, || {
        write(&site, &mut rng);
        let status = retention(&site);
        (status["thinned_points"].as_u64().unwrap() > 0).then_some(status)
    });
    println!("{status}");
    assert!(status["last_error"].is_null() && status["thinned_freed_bytes"].as_u64().unwrap() > 0, "{status}");
    assert!(site.receiver.cli(&["status", GROUP]).contains("left out"), "people are told");
    site.receiver.kill();
    let store = site.store.to_str().unwrap().to_owned();
    let checked = site.receiver.ask(&["check", &store]);
    assert!(checked.status.success(), "{}", support::text(&checked));
    site.receiver.start();
    for (point, image) in &images {
        let to = site.folder.path().join(format!("{point}.raw"));
        site.receiver.cli(&["export", GROUP, "--point", point, "--to", to.to_str().unwrap()]);
        assert!(std::fs::read(&to).unwrap() == *image, "point {point} shows something else");
        std::fs::remove_file(to).unwrap();
    }
}
