//! What people and machines get wrong, end to end: each gets one clear line at both ends, loses nothing, and the other
//! groups go on. Broken frames, lengths and versions are fed to the decoders in `proto` and `receiver`.
//!
//! Would catch: a mistake that ends a whole node, a retry that never recovers, an error that only one end tells, a copy
//! that is touched by a session that should have been refused.

mod support;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use support::nbd::Nbd;
use support::node::{COMMIT_WITHIN, Node, free_address, group_config, receiver_config};
use support::{eventually, need, need_root, noise, run, scratch, sparse, text};

const MIB: u64 = 1 << 20;

/// A receiver, and a primary whose groups each have one disk `data`.
struct Site {
    folder: tempfile::TempDir,
    receiver: Node,
    primary: Node,
    listen: String,
    receiver_key: String,
    store: PathBuf,
}

impl Site {
    fn new() -> Self {
        let folder = scratch();
        let (receiver, primary) = (Node::new(folder.path(), "receiver"), Node::new(folder.path(), "primary"));
        let (listen, store) = (free_address(), folder.path().join("store"));
        let receiver_key = receiver.key();
        receiver.configure(&receiver_config(&listen, &store, "primary", &primary.key()));
        Self { folder, receiver, primary, listen, receiver_key, store }
    }

    fn socket(&self, group: &str) -> PathBuf {
        self.primary.folder.join(format!("{group}.sock"))
    }

    fn group(&self, group: &str, image: &Path) -> String {
        group_config(group, &self.listen, &self.receiver_key, "50ms", &[("data", image, &self.socket(group))])
    }

    /// An image in the primary's folder.
    fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.primary.folder.join(name);
        sparse(&path, bytes);
        path
    }

    fn write(&self, group: &str, offset: u64, content: &[u8]) {
        let mut nbd = Nbd::connect(&self.socket(group), "data").expect("the export");
        nbd.write(offset, content).expect("a write");
    }

    /// Waits for the group's error at the primary.
    fn error(&self, group: &str) -> String {
        let error = eventually(&format!("group {group} shows an error"), COMMIT_WITHIN, || {
            self.primary.primary(group)["error"].as_str().map(str::to_owned)
        });
        assert_eq!(error.lines().count(), 1, "one line: {error}");
        println!("primary: {error}");
        error
    }

    /// Waits for a line with all of `words` in the receiver's log.
    fn receiver_says(&self, words: &[&str]) -> String {
        let line = eventually(&format!("the receiver says {words:?}"), Duration::from_secs(20), || {
            let log = self.receiver.log();
            log.lines().find(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned)
        });
        println!("receiver: {line}");
        line
    }

    /// A group that has nothing wrong still commits.
    fn goes_on(&self, group: &str, seed: u64) {
        self.write(group, 0, &noise(seed, MIB as usize));
        let status = self.primary.committed(group);
        assert_eq!(status["state"], "streaming", "{status:#}");
    }

    /// Fails over and compares the whole copy with the primary's image.
    fn copy_equals(&mut self, group: &str, image: &Path) {
        self.primary.kill();
        let socket = self.folder.path().join(format!("{group}-copy.sock"));
        self.receiver.failover(group, None, &socket);
        let mut copy = Nbd::connect(&socket, "data").expect("the copy");
        let wanted = std::fs::read(image).expect("the image");
        assert_eq!(copy.size, wanted.len() as u64);
        for (at, piece) in (0..).step_by(MIB as usize).zip(wanted.chunks(MIB as usize)) {
            assert!(copy.read(at, piece.len() as u32).expect("a read") == piece, "{group}: the copy differs in the MiB at {at}");
        }
    }
}

/// A file system of its own; unmounted when dropped.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// A tmpfs of `mib` MiB.
fn small_tmpfs(at: &Path, mib: u64) -> Mount {
    std::fs::create_dir_all(at).expect("a mount point");
    run("mount", &["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs", at.to_str().expect("UTF-8")]);
    Mount(at.to_path_buf())
}

#[test]
fn a_wrong_key_is_told_at_both_ends() {
    let mut site = Site::new();
    let (good, bad) = (site.image("good.raw", 8 * MIB), site.image("bad.raw", 8 * MIB));
    let wrong = site.group("bad", &bad).replace(&site.receiver_key, &site.primary.key());
    site.primary.configure(&(site.group("good", &good) + &wrong));
    site.receiver.start();
    site.primary.start();
    let error = site.error("bad");
    assert!(error.contains(&site.primary.key()), "it shows the key that was pinned: {error}");
    site.receiver_says(&["127.0.0.1", "it does not accept this node's key: compare its `peer_key`"]);
    site.goes_on("good", 1);
    site.copy_equals("good", &good);
}

#[test]
fn a_disk_of_another_size_is_refused_and_its_copy_kept() {
    let mut site = Site::new();
    let (image, other) = (site.image("image.raw", 8 * MIB), site.image("other.raw", 8 * MIB));
    site.primary.configure(&(site.group("db", &image) + &site.group("other", &other)));
    site.receiver.start();
    site.primary.start();
    site.goes_on("db", 1);
    site.primary.stop();
    let before = site.receiver.points("db");
    let resize = |bytes: u64| OpenOptions::new().write(true).open(&image).and_then(|f| f.set_len(bytes)).expect("a resize");
    resize(12 * MIB);
    site.primary.start();
    let error = site.error("db");
    assert!(error.contains(&(12 * MIB).to_string()) && error.contains(&(8 * MIB).to_string()), "both sizes: {error}");
    site.receiver_says(&["db", &(12 * MIB).to_string()]);
    site.goes_on("other", 2);
    assert_eq!(site.receiver.points("db"), before, "the refused session left the copy alone");
    site.primary.stop();
    resize(8 * MIB);
    site.primary.start();
    site.goes_on("db", 3);
    site.copy_equals("db", &image);
}

#[test]
fn a_full_store_stops_no_guest_and_recovers_when_there_is_space() {
    need_root();
    need(&[("mount", "mount"), ("umount", "mount")]);
    let mut site = Site::new();
    let _space = small_tmpfs(&site.store, 24);
    let image = site.image("image.raw", 64 * MIB);
    site.primary.configure(&site.group("db", &image));
    site.receiver.start();
    site.primary.start();
    site.goes_on("db", 1);
    let before = site.receiver.points("db");
    for at in 0..40 {
        // Promise 5: the guest is served whatever happens at the other site.
        site.write("db", at * MIB, &noise(100 + at, MIB as usize));
    }
    let error = site.error("db");
    assert!(error.contains("space"), "{error}");
    site.receiver_says(&["db", "space"]);
    let kept = site.receiver.points("db");
    assert!(kept.starts_with(&before), "no committed point is given up");
    run("mount", &["-o", "remount,size=200m", site.store.to_str().expect("UTF-8")]);
    let status = site.primary.committed("db");
    assert!(status["error"].is_null(), "{status:#}");
    assert!(site.receiver.points("db").starts_with(&kept), "the points from before are still there");
    site.copy_equals("db", &image);
    site.receiver.stop();
    site.receiver.cli(&["check", site.store.to_str().expect("UTF-8")]);
}

/// The store is full, which is why the copy fell behind, and then the primary is lost.
#[test]
fn a_full_store_can_be_activated_once_it_has_a_little_space() {
    need_root();
    need(&[("mount", "mount"), ("umount", "mount")]);
    let mut site = Site::new();
    let _space = small_tmpfs(&site.store, 8);
    let image = site.image("image.raw", 64 * MIB);
    site.primary.configure(&site.group("db", &image));
    site.receiver.start();
    site.primary.start();
    site.goes_on("db", 1);
    let newest = site.receiver.points("db").pop().expect("a point").0;
    site.write("db", MIB, &noise(2, 20 * MIB as usize));
    site.error("db");
    site.primary.kill();
    // What is left of the space is used up, so that a failover has none.
    let mut filler = std::fs::File::create(site.store.join(".filler")).expect("a file");
    let room = (0..4096).find(|_| filler.write_all(&[1; 4096]).is_err()).expect("a full store");
    println!("{} KiB were left", room * 4);
    let socket = site.folder.path().join("copy.sock");
    let export = format!("unix:{}", socket.display());
    let refused = site.receiver.ask(&["failover", "db", "--export", &export, "--yes", "--json"]);
    if !refused.status.success() {
        let said = text(&refused);
        println!("failover: {}", said.trim());
        assert!(said.contains("space") && said.trim().lines().count() == 1, "{said}");
        run("mount", &["-o", "remount,size=9m", site.store.to_str().expect("UTF-8")]);
        site.receiver.failover("db", None, &socket);
    }
    let active = site.receiver.copy("primary", "db");
    assert_eq!(active["active"]["point"], *newest, "{active:#}");
    let mut copy = Nbd::connect(&socket, "data").expect("the copy");
    let read = |copy: &mut Nbd| copy.read(0, MIB as u32).expect("a read");
    assert!(read(&mut copy) == noise(1, MIB as usize), "the committed data");
    // Its guest fills it again: an error for the guest, not for the copy.
    let full = (2..64).find_map(|at| copy.write(at * MIB, &noise(at, MIB as usize)).err()).expect("a full store");
    assert_eq!(full.raw_os_error(), Some(28), "ENOSPC reaches the guest: {full}");
    assert!(read(&mut copy) == noise(1, MIB as usize), "the committed data is still there");
    run("mount", &["-o", "remount,size=100m", site.store.to_str().expect("UTF-8")]);
    for at in 2..64 {
        copy.write(at * MIB, &noise(at, MIB as usize)).expect("a write, now that there is space");
    }
    copy.flush().expect("a flush");
}

#[test]
fn a_full_disk_at_the_primary_is_the_guests_error_alone() {
    need_root();
    need(&[("mount", "mount"), ("umount", "mount")]);
    let mut site = Site::new();
    let small = site.folder.path().join("small");
    let _space = small_tmpfs(&small, 8);
    let image = small.join("image.raw");
    sparse(&image, 32 * MIB);
    let other = site.image("other.raw", 8 * MIB);
    site.primary.configure(&(site.group("db", &image) + &site.group("other", &other)));
    site.receiver.start();
    site.primary.start();
    let mut nbd = Nbd::connect(&site.socket("db"), "data").expect("the export");
    let refused = (0..32).find_map(|at| nbd.write(at * MIB, &noise(at, MIB as usize)).err()).expect("a full file system");
    assert_eq!(refused.raw_os_error(), Some(28), "ENOSPC reaches the guest: {refused}");
    // The connection and the group live on: what was written is replicated, also the part of the write that failed.
    nbd.write(0, &noise(99, MIB as usize)).expect("a write where there is space already");
    drop(nbd);
    site.goes_on("other", 1);
    let status = site.primary.committed("db");
    assert_eq!(status["state"], "streaming", "{status:#}");
    site.copy_equals("db", &image);
}

#[test]
fn a_store_that_belongs_to_a_running_node_is_refused() {
    let mut site = Site::new();
    let image = site.image("image.raw", 8 * MIB);
    site.primary.configure(&site.group("db", &image));
    site.receiver.start();
    site.primary.start();
    site.goes_on("db", 1);
    let pid = site.receiver.pid().to_string();

    let mut second = Node::new(site.folder.path(), "second");
    second.configure(&receiver_config(&free_address(), &site.store, "primary", &site.primary.key()));
    second.launch();
    let line = eventually("the second node tells who has the store", Duration::from_secs(20), || {
        let log = second.log();
        log.lines().find(|l| l.contains("belongs to a running node")).map(str::to_owned)
    });
    println!("second: {line}");
    assert!(line.contains(&pid) && line.contains(site.store.to_str().expect("UTF-8")), "{line}");
    second.kill();

    let check = second.ask(&["check", site.store.to_str().expect("UTF-8")]);
    let said = text(&check);
    println!("check: {}", said.trim());
    assert!(!check.status.success() && said.contains(&pid) && said.trim().lines().count() == 1, "{said}");
    site.goes_on("db", 2);
    site.copy_equals("db", &image);
}

#[test]
fn an_unknown_key_of_the_configuration_is_named_with_its_line() {
    let folder = scratch();
    let mut node = Node::new(folder.path(), "node");
    let config = receiver_config(&free_address(), &folder.path().join("store"), "a", &node.key());
    node.configure(&config.replace("listen", "lisen"));
    node.launch();
    let (success, said) = node.ended(Duration::from_secs(20));
    println!("{}", said.trim());
    assert!(!success);
    assert!(said.contains("twinsite.toml:5: unknown key 'lisen'") && said.contains("did you mean 'listen'"), "{said}");
    assert!(!folder.path().join("store").exists(), "nothing is made from a configuration that is wrong");
}
