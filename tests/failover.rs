//! A failover as an administrator meets it: what it says first, and that it does not make a second writer by accident.
//!
//! Would catch: `--yes` that overrides the refusal, a refusal that changes something, a primary that counts as alive for ever after
//! it was killed, or as alive after an orderly stop; a preview that does not tell what an older point leaves out.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod support;

use std::time::{Duration, Instant};

use serde_json::Value;
use support::nbd::Nbd;
use support::node::{COMMIT_WITHIN, Pair};
use support::stalls::Stalls;
use support::{eventually, noise, scratch, text};

const MIB: u64 = 1 << 20;
/// As `receiver::ALIVE_WITHIN`: a test must notice if it changes.
const ALIVE_WITHIN: Duration = Duration::from_secs(5);

fn alive(pair: &Pair) -> bool {
    pair.receiver.copy("primary", "db")["primary_alive"] == true
}

#[test]
fn a_living_primary_is_not_failed_over_unless_told_so() {
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "100ms", &[("root", 4 * MIB)]);
    let mut nbd = Nbd::connect(&pair.sockets[0], "root").unwrap();
    nbd.write(0, &noise(1, 4096)).unwrap();
    pair.primary.committed("db");
    let copy = folder.path().join("copy.sock");
    let export = format!("unix:{}", copy.display());
    let ask = |args: &[&str]| pair.receiver.ask(&[&["failover", "db", "--export", &export], args].concat());
    let before = std::fs::read(pair.store.join("primary/db/superblock")).unwrap();
    for args in [&["--yes"][..], &[], &["--yes", "--json"]] {
        let refused = ask(args);
        let said = String::from_utf8_lossy(&refused.stderr).trim().to_owned();
        assert_eq!(refused.status.code(), Some(3), "{}", text(&refused));
        assert!(said.lines().count() == 1 && said.starts_with("group primary/db: its primary at 127.0.0.1:"), "{said}");
        assert!(said.contains("is alive") && said.contains("--force"), "{said}");
        if args.contains(&"--json") {
            let answer: Value = serde_json::from_slice(&refused.stdout).unwrap();
            assert!(answer["refused"] == "primary-alive" && answer["error"] == said.as_str(), "{answer:#}");
        }
    }
    // The command line is not the only one who asks: the node itself refuses.
    let preview: Value = pair.receiver.json(&["failover", "db", "--preview"]);
    assert!(preview["primary_alive"] == true && preview["refusal"].is_string(), "{preview:#}");
    assert_eq!(std::fs::read(pair.store.join("primary/db/superblock")).unwrap(), before, "a refusal changes nothing");
    assert!(!copy.exists());
    nbd.write(4096, &noise(2, 4096)).unwrap();
    pair.primary.committed("db");

    // Told so, it does: the living primary is fenced.
    let forced = ask(&["--yes", "--force", "--json"]);
    assert!(forced.status.success(), "{}", text(&forced));
    assert!(Nbd::connect(&copy, "root").unwrap().read(4096, 4096).unwrap() == noise(2, 4096));
    eventually("the primary is fenced", Duration::from_secs(20), || {
        (pair.primary.primary("db")["state"] == "fenced").then_some(())
    });
    // Served elsewhere it makes no second writer: nothing to force.
    let moved = format!("unix:{}", folder.path().join("moved.sock").display());
    pair.receiver.cli(&["failover", "db", "--export", &moved, "--yes"]);
    pair.primary.stop();
}

#[test]
fn a_killed_primary_is_given_up_and_a_stopped_one_at_once() {
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "100ms", &[("root", 4 * MIB)]);
    pair.primary.committed("db");
    // Nobody writes: keep-alives alone must keep it alive, for longer than the limit.
    let until = Instant::now() + ALIVE_WITHIN + Duration::from_secs(2);
    while Instant::now() < until {
        assert!(alive(&pair), "{:#}", pair.receiver.copy("primary", "db"));
        std::thread::sleep(Duration::from_millis(100));
    }
    let heard = || Duration::from_millis(pair.receiver.copy("primary", "db")["heard_age_ms"].as_u64().expect("it was heard"));
    let last_heard = Instant::now() - heard();
    pair.primary.kill();
    let (stalls, killed) = (Stalls::start(), Instant::now());
    eventually("it is given up", COMMIT_WITHIN, || (!alive(&pair)).then_some(()));
    // What the receiver missed while the machine stood still for 2 s, less the time between two looks, it waits for once more.
    let (took, ran) = (killed.elapsed(), stalls.ran_since(killed));
    let again = if took.saturating_sub(ran) > Duration::from_millis(1500) { Duration::from_secs(15) } else { Duration::ZERO };
    assert!(ran <= ALIVE_WITHIN + again + Duration::from_secs(2), "{took:?}, {ran:?} without what the machine stood still");
    assert!(last_heard.elapsed() >= ALIVE_WITHIN, "given up {:?} after it was heard last", last_heard.elapsed());
    let before = heard();
    let told = pair.receiver.cli(&["failover", "db", "--preview"]);
    let (_, rest) = told.split_once("last heard from ").expect("when it was heard");
    let (seconds, _) = rest.split_once(" s ago").expect("seconds");
    // Printed in tenths, cut off.
    let printed = Duration::from_secs_f64(seconds.parse().expect("a number")) + Duration::from_millis(100);
    assert!(ALIVE_WITHIN <= before && before <= printed && printed <= heard() + Duration::from_millis(100), "{before:?}: {told}");
    for part in ["(the newest)", "after the newest cut", "to move     0 B", "Nothing was changed."] {
        assert!(told.contains(part), "{part:?} is not in\n{told}");
    }

    pair.primary.start();
    eventually("it is back", Duration::from_secs(20), || alive(&pair).then_some(()));
    pair.primary.stop();
    // It took leave, so nobody has to wait for it; its last packet may arrive a moment after its end.
    eventually("it took leave", Duration::from_secs(2), || (!alive(&pair)).then_some(()));
    let export = format!("unix:{}", folder.path().join("copy.sock").display());
    pair.receiver.cli(&["failover", "db", "--export", &export, "--yes"]);
}

#[test]
fn an_older_point_says_what_it_leaves_out() {
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "100ms", &[("root", 4 * MIB)]);
    let mut nbd = Nbd::connect(&pair.sockets[0], "root").unwrap();
    for n in 0..4 {
        nbd.write(n * 65536, &noise(n, 8192)).unwrap();
        pair.primary.committed("db");
    }
    let points = pair.receiver.json(&["points", "db"])["points"].as_array().unwrap().clone();
    pair.primary.stop();
    eventually("it took leave", Duration::from_secs(2), || (!alive(&pair)).then_some(()));
    let older = &points[points.len() - 3];
    let name = older["point"].as_str().unwrap();
    let plan = pair.receiver.json(&["failover", "db", "--preview", "--point", name]);
    let changed: u64 = points[points.len() - 2..].iter().map(|p| p["changed_bytes"].as_u64().unwrap()).sum();
    assert!(plan["points_after"] == 2 && plan["changed_bytes_after"] == changed && changed > 0, "{plan:#}");
    assert!(plan["newest"] == points.last().unwrap()["point"] && plan["primary_alive"] == false, "{plan:#}");
    let told = pair.receiver.cli(&["failover", "db", "--preview", "--point", name]);
    for part in ["2 points before the newest", "lost here   2 later epochs of ", "they stay in the store", "stopped in order"] {
        assert!(told.contains(part), "{part:?} is not in\n{told}");
    }
}
