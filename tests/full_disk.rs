//! The receiver's disk is full, and then it is not: what both ends say, who is held up, and how long replication takes to go on by
//! itself once there is space. And an active copy whose store is full.
//!
//! Would catch: a group that waits for a restart, a retry that comes later than the documents say, an outage that only one end
//! tells, a guest or another client that pays for it; a copy that cannot be opened, or not be written to though it has all its blocks.

mod support;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate};
use support::nbd::Nbd;
use support::node::{COMMIT_WITHIN, Node, group_config, receiver_config};
use support::site::{Site, small_ext4};
use support::writers::{Target, Writers};
use support::{eventually, need, need_root, noise, one_at_a_time, seed, sparse};

const MIB: u64 = 1 << 20;
/// Size of both guests' disks.
const DISK_BYTES: u64 = 32 * MIB;
/// More than everything that is written once there is space.
const STORE_MIB: u64 = 128;
/// Refusals before there is space: the waits between them double, and by then the next one is near the longest.
const REFUSALS: usize = 7;
/// Of which so many come after less than 1.6 s.
const SHORT_WAITS: usize = 5;
/// From one look for free space to the next; far less than the shortest wait of a primary.
const FILL_EVERY: Duration = Duration::from_millis(1);
/// Beyond the wait: connecting, what was written meanwhile, a machine that is busy with other tests.
const MARGIN: Duration = Duration::from_secs(10);

/// The longest wait before a full store is tried again, as `docs/journal.md` promises it.
fn retry_max() -> Duration {
    let text = include_str!("../docs/journal.md");
    let (_, rest) = text.split_once("The longest wait is ").expect("the document says it");
    let (seconds, _) = rest.split_once(" s").expect("in seconds");
    Duration::from_secs(seconds.parse().expect("a number"))
}

/// Keeps a file system full: what the receiver gives back when it cuts off an epoch is used up as well.
struct Filler {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Error>,
}

impl Filler {
    fn start(path: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let file = File::create(&path).expect("the filler");
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            // It must be faster than the next attempt of the primary: before all others, and without writing, which waits for the disk.
            rustix::process::setpriority_process(Some(rustix::thread::gettid()), -20).expect("root's priority");
            let (mut taken, mut last) = (0, None);
            while last.is_none() || !stopped.load(Ordering::SeqCst) {
                for piece in [MIB, 4096] {
                    let mut take = || fallocate(&file, FallocateFlags::empty(), taken, piece).map(|()| taken += piece);
                    last = std::iter::repeat_with(&mut take).find_map(Result::err).map(std::io::Error::from);
                }
                std::thread::sleep(FILL_EVERY);
            }
            last.expect("it was full")
        });
        Self { path, stop, thread }
    }

    /// Gives the space back.
    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        let error = self.thread.join().expect("the filler does not panic");
        assert_eq!(error.raw_os_error(), Some(28), "{error}");
        std::fs::remove_file(&self.path).expect("the filler");
    }
}

fn guest(socket: &Path, seed: u64) -> Writers {
    let target = Target { socket: socket.to_path_buf(), export: "data".to_owned(), blocks: DISK_BYTES / 4096 };
    Writers::start(&[target], 1, seed)
}

/// What `twinsite status` shows a person of one group: state and error.
#[track_caller]
fn shown(node: &Node, group: &str) -> String {
    let text = node.cli(&["status", group]);
    let lines = text.lines().filter(|l| ["state", "error"].iter().any(|label| l.trim_start().starts_with(label)));
    lines.map(str::trim).collect::<Vec<_>>().join("\n  ")
}

#[test]
fn replication_goes_on_by_itself_when_a_full_store_has_space_again() {
    need_root();
    need(&[("mount", "mount"), ("umount", "mount"), ("mkfs.ext4", "e2fsprogs")]);
    let (_alone, seed) = (one_at_a_time(), seed());
    let mut site = Site::new();
    let mut other = Node::new(site.folder.path(), "other");
    let config = receiver_config(&site.listen, &site.store, "primary", &site.primary.key());
    site.receiver.configure(&format!("{config}\n[[receiver.client]]\nname = \"other\"\nkey = \"{}\"\n", other.key()));
    let image = site.image("image.raw", DISK_BYTES);
    site.primary.configure(&site.group("db", &image));
    let (theirs, socket) = (other.folder.join("image.raw"), other.folder.join("db.sock"));
    sparse(&theirs, DISK_BYTES);
    other.configure(&group_config("db", &site.listen, &site.receiver_key, "50ms", &[("data", &theirs, &socket)]));
    // One client's folder is a file system of its own; the other's is not.
    let small = site.store.join("primary");
    let _space = small_ext4(&site.folder.path().join("small.img"), &small, STORE_MIB);
    site.receiver.start();
    site.primary.start();
    other.start();
    let (mut guest, mut neighbour) = (guest(&site.socket("db"), seed), guest(&socket, seed + 1));
    site.primary.committed_once("db");
    other.committed_once("db");

    let full_since = Instant::now();
    let filler = Filler::start(small.join(".filler"));
    let refusal = |log: &str| {
        log.lines().filter(|l| l.contains("ERROR") && l.contains("primary/db: ") && l.contains("No space left")).count()
    };
    eventually("the receiver refuses", COMMIT_WITHIN, || (refusal(&site.receiver.log()) > 0).then_some(()));
    println!("full; the receiver refuses after {:.1} s", full_since.elapsed().as_secs_f64());

    // Both ends say so, for as long as it lasts, and nobody else is held up.
    let (mut kept, mut told) = (Vec::new(), 0);
    for refusals in 2..=REFUSALS {
        let (ours, theirs) = (guest.acknowledged(), neighbour.acknowledged());
        let points = site.receiver.copy("other", "db")["points"].as_u64().expect("points");
        eventually("the next refusal", retry_max() + MARGIN, || {
            let (primary, copy) = (site.primary.primary("db"), site.receiver.copy("primary", "db"));
            let says = |status: &serde_json::Value| status["error"].as_str().is_some_and(|e| e.contains("No space left"));
            told += usize::from(says(&primary) && says(&copy));
            (refusal(&site.receiver.log()) >= refusals).then_some(())
        });
        if refusals == 2 {
            kept = site.receiver.points("primary/db");
        }
        let go_on = || {
            let points_now = site.receiver.copy("other", "db")["points"].as_u64();
            guest.acknowledged() > ours && neighbour.acknowledged() > theirs && points_now > Some(points)
        };
        // The first waits are shorter than what one sync of a busy disk may take.
        if refusals <= SHORT_WAITS {
            eventually("both guests write on, and the other client's points go on", MARGIN, || go_on().then_some(()));
        }
        assert!(go_on(), "both guests write on, and the other client's points go on");
    }
    assert!(told > 0, "both ends tell it at the same time");
    println!("primary: {}\nreceiver: {}", shown(&site.primary, "db"), shown(&site.receiver, "primary/db"));
    for (node, group) in [(&site.primary, "db"), (&site.receiver, "primary/db")] {
        eventually("status tells it to a person", retry_max() + MARGIN, || {
            let text = shown(node, group);
            (text.contains("No space left") && text.contains("free space in the store")).then_some(())
        });
    }
    assert_eq!(site.receiver.points("primary/db"), kept, "nothing is given up, nothing is new");
    assert!(!other.log().contains("WARN"), "the other client's log tells of nothing:\n{}", other.log());

    filler.end();
    let space_since = Instant::now();
    println!("space after {:.1} s and {} refusals", full_since.elapsed().as_secs_f64(), refusal(&site.receiver.log()));
    let points = || site.receiver.copy("primary", "db")["points"].as_u64().expect("points");
    let bound = retry_max() + MARGIN;
    eventually("the next point", bound, || (points() > kept.len() as u64).then_some(()));
    let pause = space_since.elapsed();
    println!("pause from space to the next committed point: {:.2} s; allowed: {:.0} s", pause.as_secs_f64(), bound.as_secs_f64());
    assert!(pause <= bound, "{pause:?}");

    for (whose, writers) in [("its", &mut guest), ("the other's", &mut neighbour)] {
        let (reconnections, longest) = writers.outages();
        println!("{whose} guest: {} writes, longest {:.0} ms", writers.acknowledged(), longest.as_secs_f64() * 1e3);
        assert_eq!(reconnections, 0, "its disk was there all the time");
        writers.stop();
    }
    for (node, copy) in [(&site.primary, ("primary", "db")), (&other, ("other", "db"))] {
        let status = node.committed("db");
        assert!(status["error"].is_null() && status["state"] == "streaming", "{status:#}");
        let status = site.receiver.copy(copy.0, copy.1);
        assert!(status["error"].is_null() && status["state"] == "following", "{status:#}");
    }
    assert!(site.receiver.points("primary/db").starts_with(&kept), "the points from before are still there");
    other.kill();
    site.copy_equals("primary/db", &image);
    site.receiver.stop();
    site.receiver.cli(&["check", site.store.to_str().expect("UTF-8")]);
}

/// Would catch a start that needs space: a store is often full exactly when its node has to be restarted.
#[test]
fn a_node_starts_and_stops_on_a_full_store() {
    need_root();
    need(&[("mount", "mount"), ("umount", "mount"), ("mkfs.ext4", "e2fsprogs")]);
    let _alone = one_at_a_time();
    let mut site = Site::new();
    let _space = small_ext4(&site.folder.path().join("small.img"), &site.store, STORE_MIB / 4);
    let image = site.image("image.raw", DISK_BYTES);
    site.primary.configure(&site.group("db", &image));
    site.receiver.start();
    site.primary.start();
    site.goes_on("db", 1);
    let filler = Filler::start(site.store.join(".filler"));
    filled(&site.store);
    site.write("db", MIB, &noise(2, 8 * MIB as usize));
    site.error("db");
    let points = site.receiver.points("db");
    for orderly in [false, true, false] {
        if orderly {
            site.receiver.stop();
        } else {
            site.receiver.kill();
        }
        site.receiver.start();
        assert_eq!(site.receiver.points("db"), points, "every point is there, and none is new");
    }
    filler.end();
    let status = site.primary.committed("db");
    assert!(status["error"].is_null() && status["state"] == "streaming", "{status:#}");
    site.copy_equals("db", &image);
}

/// Waits until a [`Filler`] has taken the last block of the file system at `path`.
#[track_caller]
fn filled(path: &Path) {
    let free = || rustix::fs::statvfs(path).expect("a file system").f_bavail;
    eventually("the last block is taken", Duration::from_secs(20), || (free() == 0).then_some(()));
}

/// Would catch a copy that does not open, or that refuses or loses what a guest writes, where it needs no new block for it.
#[test]
fn an_active_copy_goes_on_on_a_full_store() {
    need_root();
    need(&[("mount", "mount"), ("umount", "mount"), ("mkfs.ext4", "e2fsprogs")]);
    let _alone = one_at_a_time();
    let mut site = Site::new();
    let _space = small_ext4(&site.folder.path().join("small.img"), &site.store, STORE_MIB);
    let image = site.image("image.raw", DISK_BYTES);
    site.primary.configure(&site.group("db", &image));
    site.receiver.start();
    site.primary.start();
    let mut content = noise(3, DISK_BYTES as usize);
    site.write("db", 0, &content);
    site.primary.committed("db");
    site.primary.stop();
    site.receiver.stop();
    let config = std::fs::read_to_string(site.receiver.config()).expect("the configuration");
    let without = config.replacen("[receiver]\n", "[receiver]\nflatten = false\n", 1);
    std::fs::write(site.receiver.config(), without).expect("the configuration");
    site.receiver.start();
    let copy = site.folder.path().join("copy.sock");
    site.receiver.failover("db", None, &copy);
    let connect = || Nbd::connect(&copy, "data").expect("the copy");
    let same = |content: &[u8]| {
        let mut nbd = connect();
        let differs =
            (0..).zip(content.chunks(MIB as usize)).find(|(n, piece)| nbd.read(n * MIB, MIB as u32).expect("a read") != *piece);
        assert!(differs.is_none(), "the MiB {:?} differs", differs.map(|(n, _)| n));
    };

    // The machine was started again since, and there is no space to begin the file of what is not flushed.
    let fork = site.store.join("primary/db/forks/active-2");
    site.receiver.kill();
    let filler = Filler::start(site.store.join(".filler"));
    std::fs::write(fork.join("data.recent"), "").expect("the file");
    filled(&site.store);
    site.receiver.start();
    same(&content);
    let warned =
        site.receiver.log().lines().filter(|l| l.contains("data.recent: ") && l.contains("free space in the store")).count();
    assert_eq!(warned, 1, "{}", site.receiver.log());
    site.receiver.kill();
    filler.end();

    // All of it is copied; then every write finds its block, and its bits, on the disk.
    std::fs::write(site.receiver.config(), config).expect("the configuration");
    site.receiver.start();
    let is_flat = |site: &Site| site.receiver.copy("primary", "db")["active"]["flatten"]["state"] == "flat";
    eventually("it is flat", Duration::from_secs(60), || is_flat(&site).then_some(()));
    let filler = Filler::start(site.store.join(".filler"));
    filled(&site.store);
    for flush in [true, false] {
        let mut nbd = connect();
        for at in (0..DISK_BYTES).step_by(MIB as usize / 4).map(|at| at as usize + if flush { 0 } else { 8192 }) {
            let block = noise(at as u64 + 7, 4096);
            nbd.write(at as u64, &block).expect("a write to a block that is there");
            content[at..at + 4096].copy_from_slice(&block);
        }
        if flush {
            nbd.flush().expect("a flush");
        }
        site.receiver.kill();
        site.receiver.start();
        same(&content);
    }
    filler.end();
}
