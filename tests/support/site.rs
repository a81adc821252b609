//! Two nodes with groups that a test spoils, and what both ends say about it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::nbd::Nbd;
use super::node::{COMMIT_WITHIN, Node, free_address, group_config, receiver_config};
use super::{eventually, noise, run, scratch, sparse};

const MIB: u64 = 1 << 20;

/// A receiver, and a primary whose groups each have one disk `data`.
#[derive(Debug)]
pub(crate) struct Site {
    /// Holds everything.
    pub(crate) folder: tempfile::TempDir,
    /// Keeps the copies.
    pub(crate) receiver: Node,
    /// Has the disks.
    pub(crate) primary: Node,
    /// Address of the receiver.
    pub(crate) listen: String,
    /// Its key.
    pub(crate) receiver_key: String,
    /// Its store.
    pub(crate) store: PathBuf,
}

impl Site {
    /// Both, configured but for the primary's groups; nothing runs yet.
    pub(crate) fn new() -> Self {
        let folder = scratch();
        let (receiver, primary) = (Node::new(folder.path(), "receiver"), Node::new(folder.path(), "primary"));
        let (listen, store) = (free_address(), folder.path().join("store"));
        let receiver_key = receiver.key();
        receiver.configure(&receiver_config(&listen, &store, "primary", &primary.key()));
        Self { folder, receiver, primary, listen, receiver_key, store }
    }

    /// Where the group's disk is exported.
    pub(crate) fn socket(&self, group: &str) -> PathBuf {
        self.primary.folder.join(format!("{group}.sock"))
    }

    /// The configuration of a group with this image.
    pub(crate) fn group(&self, group: &str, image: &Path) -> String {
        self.group_to(group, image, &self.listen, &self.receiver_key)
    }

    /// The same, for another receiver.
    pub(crate) fn group_to(&self, group: &str, image: &Path, peer: &str, peer_key: &str) -> String {
        group_config(group, peer, peer_key, "50ms", &[("data", image, &self.socket(group))])
    }

    /// An image in the primary's folder.
    pub(crate) fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.primary.folder.join(name);
        sparse(&path, bytes);
        path
    }

    /// Writes to the group's disk as its guest would.
    pub(crate) fn write(&self, group: &str, offset: u64, content: &[u8]) {
        let mut nbd = Nbd::connect(&self.socket(group), "data").expect("the export");
        nbd.write(offset, content).expect("a write");
    }

    /// Waits for the group's error at the primary.
    pub(crate) fn error(&self, group: &str) -> String {
        let error = eventually(&format!("group {group} shows an error"), COMMIT_WITHIN, || {
            self.primary.primary(group)["error"].as_str().map(str::to_owned)
        });
        assert_eq!(error.lines().count(), 1, "one line: {error}");
        println!("primary: {error}");
        error
    }

    /// Waits for a line with all of `words` in the receiver's log.
    pub(crate) fn receiver_says(&self, words: &[&str]) -> String {
        let line = eventually(&format!("the receiver says {words:?}"), Duration::from_secs(20), || {
            let log = self.receiver.log();
            log.lines().find(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned)
        });
        println!("receiver: {line}");
        line
    }

    /// A group that has nothing wrong still commits.
    pub(crate) fn goes_on(&self, group: &str, seed: u64) {
        self.write(group, 0, &noise(seed, MIB as usize));
        let status = self.primary.committed(group);
        assert_eq!(status["state"], "streaming", "{status:#}");
    }

    /// Fails over and compares the whole copy with the primary's image.
    pub(crate) fn copy_equals(&mut self, group: &str, image: &Path) {
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
#[derive(Debug)]
pub(crate) struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// A tmpfs of `mib` MiB.
pub(crate) fn small_tmpfs(at: &Path, mib: u64) -> Mount {
    std::fs::create_dir_all(at).expect("a mount point");
    run("mount", &["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs", at.to_str().expect("UTF-8")]);
    Mount(at.to_path_buf())
}

/// An ext4 of `mib` MiB on a loop device; `image` is what it is in.
pub(crate) fn small_ext4(image: &Path, at: &Path, mib: u64) -> Mount {
    let (image_text, at_text) = (image.to_str().expect("UTF-8"), at.to_str().expect("UTF-8"));
    sparse(image, mib * MIB);
    // Nothing is kept back for root, who runs this.
    run("mkfs.ext4", &["-q", "-F", "-m", "0", image_text]);
    std::fs::create_dir_all(at).expect("a mount point");
    run("mount", &["-o", "loop", image_text, at_text]);
    Mount(at.to_path_buf())
}
