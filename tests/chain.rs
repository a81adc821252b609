//! Three real nodes in a row: alpha's disks, their copy at beta, and the copy of that copy at gamma; through kills, failovers of either copy and the
//! way back.
//!
//! Would catch: a point at the third site that the second never had, a change that is forgotten there when a node dies or the copy changes
//! between following and active, an active copy whose writes do not go onward, and a copy that cannot become the server because of its
//! third site.

mod support;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use support::nbd::Nbd;
use support::node::{COMMIT_WITHIN, Node, free_address, group_config, receiver_config};
use support::{eventually, scratch, seed, sparse, text, views};

const BLOCK_BYTES: usize = 4096;
/// The counter goes round these blocks, so that every image tells its last writes and not just the newest.
const SLOTS: u64 = 64;
/// Blocks from one to the next: they are in several regions.
const STRIDE: u64 = 61;
const BYTES: u64 = SLOTS * STRIDE * BLOCK_BYTES as u64 + 700;
const DISKS: [&str; 2] = ["first", "second"];
const KILLS: u32 = 6;
/// Points of the third site from one kill to the next, at most.
const POINTS_MAX: u64 = 12;
/// Of a group, by default.
const EPOCHS_IN_FLIGHT: u64 = 8;

fn block(counter: u64) -> Vec<u8> {
    counter.to_le_bytes().repeat(BLOCK_BYTES / 8)
}

fn offset(slot: u64) -> u64 {
    slot % SLOTS * STRIDE * BLOCK_BYTES as u64
}

/// Writes a counter to both disks by turns until it is told to stop, from one after `counter` on. A write that gets no answer is made again, as
/// QEMU would. Returns the last that was acknowledged on both.
fn alternate(sockets: &[PathBuf], mut counter: u64, acknowledged: &AtomicU64, stop: &AtomicBool) -> u64 {
    let mut disks: [Option<Nbd>; 2] = [None, None];
    loop {
        let content = block(counter + 1);
        for (n, disk) in disks.iter_mut().enumerate() {
            loop {
                if disk.is_none() {
                    *disk = Nbd::connect(&sockets[n], DISKS[n]).ok();
                }
                match disk.as_mut().map(|nbd| nbd.write(offset(counter + 1), &content)) {
                    Some(Ok(())) => break,
                    _ if stop.load(Ordering::SeqCst) => return counter,
                    _ => *disk = None,
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        counter += 1;
        acknowledged.store(counter, Ordering::SeqCst);
        if stop.load(Ordering::SeqCst) {
            return counter;
        }
        std::thread::sleep(Duration::from_micros(300));
    }
}

/// What the slots of both disks hold.
type Slots = [Vec<u64>; 2];

/// Reads the slots of both disks; a block that has two counters is torn.
fn slots(mut read: impl FnMut(usize, u64) -> Vec<u8>) -> Slots {
    [0, 1].map(|disk| {
        let one = |slot| {
            let content = read(disk, offset(slot));
            let value = u64::from_le_bytes(content[..8].try_into().expect("eight bytes"));
            assert!(content == block(value), "disk {disk}, slot {slot} is torn");
            value
        };
        (0..SLOTS).map(one).collect()
    })
}

/// The newest counter of both disks, after checking that the image holds exactly the writes up to it, in their order.
fn in_order(what: &str, slots: &Slots) -> u64 {
    let newest = slots.each_ref().map(|of_disk| {
        let newest = of_disk.iter().copied().max().unwrap_or_default();
        for (slot, value) in (0..).zip(of_disk) {
            let wanted = newest.saturating_sub((newest + SLOTS - slot) % SLOTS);
            assert_eq!(*value, wanted, "{what}: newest is {newest}, slot {slot}");
        }
        newest
    });
    assert!(newest[0] == newest[1] || newest[0] == newest[1] + 1, "{what}: the disks have {newest:?}");
    newest[1]
}

/// A point of a store: its name, its cut and what it holds.
type Seen = (String, u64, Slots);

/// Every point of a stopped node's store, oldest first.
fn points(store: &Path, group: &str) -> Vec<Seen> {
    let mut all = Vec::new();
    views::each_point(
        store,
        group,
        |_| true,
        |point, disks| {
            assert_eq!(disks.iter().map(views::Disk::name).collect::<Vec<_>>(), DISKS);
            let held = slots(|disk, at| disks[disk].read(at, BLOCK_BYTES));
            all.push((point.point.to_string(), point.cut_unix_us, held));
        },
    );
    all
}

fn all_in_order(points: &[Seen]) {
    for (name, _, held) in points {
        in_order(name, held);
    }
}

/// Each point of the third site is one that the second had, in the same order, and says of no later instant that it is of it. Returns how
/// many of the second's points were met.
#[track_caller]
fn each_is_one_of(third: &[Seen], second: &[Seen]) -> usize {
    let mut at = 0;
    for (name, cut, held) in third {
        let same = |seen: &Seen| seen.2 == *held;
        let found = second[at..].iter().position(same);
        at += found.unwrap_or_else(|| {
            let anywhere = second.iter().find(|seen| same(seen)).map(|seen| &seen.0);
            panic!("point {name} of the third site is none of the second's from {} on; anywhere: {anywhere:?}", second[at].0)
        });
        let run = second[at..].iter().take_while(|seen| same(seen));
        let newest = run.map(|seen| seen.1).max().unwrap_or_default();
        assert!(*cut <= newest, "point {name} says it is of {cut}, and was cut there at {newest}");
    }
    third.iter().map(|seen| &seen.2).collect::<std::collections::BTreeSet<_>>().len()
}

struct Chain {
    folder: tempfile::TempDir,
    alpha: Node,
    beta: Node,
    gamma: Node,
    /// Exports at alpha.
    sockets: Vec<PathBuf>,
    images: Vec<PathBuf>,
}

impl Chain {
    /// Configured; nothing runs.
    fn new(interval: &str) -> Self {
        let folder = scratch();
        let [alpha, beta, gamma] = ["alpha", "beta", "gamma"].map(|name| Node::new(folder.path(), name));
        let (to_beta, to_gamma) = (free_address(), free_address());
        let path = |name: &str, kind: &str| alpha.folder.join(format!("{name}.{kind}"));
        let images = DISKS.map(|name| path(name, "raw")).to_vec();
        let sockets = DISKS.map(|name| path(name, "sock")).to_vec();
        images.iter().for_each(|image| sparse(image, BYTES));
        let listed: Vec<_> =
            DISKS.iter().zip(images.iter().zip(&sockets)).map(|(name, (i, s))| (*name, i.as_path(), s.as_path())).collect();
        let store = |node: &Node| node.folder.join("store");
        gamma.configure(&receiver_config(&to_gamma, &store(&gamma), "beta", &beta.key()));
        let onward = onward_config("db", &to_gamma, &gamma.key(), interval, "alpha/db");
        beta.configure(&(receiver_config(&to_beta, &store(&beta), "alpha", &alpha.key()) + "\n" + &onward));
        alpha.configure(&group_config("db", &to_beta, &beta.key(), interval, &listed));
        Self { folder, alpha, beta, gamma, sockets, images }
    }

    /// All three, and the first point at the third site.
    fn start(interval: &str) -> Self {
        let mut chain = Self::new(interval);
        chain.gamma.start();
        chain.beta.start();
        chain.alpha.start();
        chain.first_point();
        chain
    }

    #[track_caller]
    fn first_point(&self) {
        eventually("the first point at the third site", COMMIT_WITHIN, || (self.third_points() > 0).then_some(()));
    }

    fn third_points(&self) -> u64 {
        self.gamma.copy("beta", "db")["points"].as_u64().unwrap_or_default()
    }

    fn onward(&self) -> Value {
        self.beta.status()["onward"][0].clone()
    }

    /// Waits until the third site has all that the second has; nobody writes.
    #[track_caller]
    fn third_has_all(&self) {
        eventually("the newest point of the second site goes onward", COMMIT_WITHIN, || {
            let (onward, copy) = (self.onward(), self.beta.copy("alpha", "db"));
            (onward["state"] == "active" || onward["point"] == copy["committed"]).then_some(())
        });
        eventually("nothing is left to be compared", COMMIT_WITHIN, || {
            let status = self.beta.primary("db");
            (status["state"] == "streaming" && status["suspect_bytes"] == 0).then_some(())
        });
        self.beta.settled("db");
    }

    /// Waits until the second site has all that was written at the first, and the third has it too.
    #[track_caller]
    fn all_have_all(&self) {
        self.alpha.settled("db");
        self.third_has_all();
    }

    fn store(node: &Node) -> PathBuf {
        node.folder.join("store")
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.sock"))
    }

    fn logs(&self) -> String {
        format!("beta:\n{}\ngamma:\n{}", self.beta.log(), self.gamma.log())
    }
}

fn onward_config(group: &str, peer: &str, peer_key: &str, interval: &str, copy: &str) -> String {
    format!(
        "[[group]]\nname = \"{group}\"\npeer = \"{peer}\"\npeer_key = \"{peer_key}\"\ninterval = \"{interval}\"\ncopy = \"{copy}\"\n"
    )
}

/// What an export holds.
fn read_export(socket: &Path) -> Slots {
    let mut disks = DISKS.map(|disk| Nbd::connect(socket, disk).expect("the export"));
    slots(|disk, at| disks[disk].read(at, BLOCK_BYTES as u32).expect("a read"))
}

/// Runs `during` beside a guest that writes to `sockets`, from one after `from` on; returns the last counter that was acknowledged.
fn under_load(sockets: &[PathBuf], from: u64, during: impl FnOnce(&AtomicU64)) -> u64 {
    let (acknowledged, stop) = (AtomicU64::new(from), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| alternate(sockets, from, &acknowledged, &stop));
        // Also if it panics: the scope waits for the writer.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| during(&acknowledged)));
        stop.store(true, Ordering::SeqCst);
        let last = writer.join().expect("the writer");
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        last
    })
}

#[track_caller]
fn more_writes(acknowledged: &AtomicU64, more: u64) {
    let from = acknowledged.load(Ordering::SeqCst);
    eventually("the guest writes", COMMIT_WITHIN, || (acknowledged.load(Ordering::SeqCst) >= from + more).then_some(()));
}

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
        let committed = chain.third_points();
        told = acknowledged.load(Ordering::SeqCst);
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

fn image_block(image: &Path, at: u64) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut content = vec![0; BLOCK_BYTES];
    std::fs::File::open(image).and_then(|file| file.read_exact_at(&mut content, at)).expect("the image");
    content
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
    assert!(record.exists(), "it is known again");
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
