//! Three nodes in a row, and a guest that counts: alpha's disks, their copy at beta, and the copy of that copy at gamma.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;

use super::nbd::Nbd;
use super::node::{COMMIT_WITHIN, Node, free_address, group_config, receiver_config};
use super::{eventually, scratch, sparse, views};

pub(crate) const BLOCK_BYTES: usize = 4096;
/// The counter goes round these blocks, so that every image tells its last writes and not just the newest.
pub(crate) const SLOTS: u64 = 64;
/// Blocks from one to the next: they are in several regions.
pub(crate) const STRIDE: u64 = 61;
pub(crate) const BYTES: u64 = SLOTS * STRIDE * BLOCK_BYTES as u64 + 700;
pub(crate) const DISKS: [&str; 2] = ["first", "second"];

pub(crate) fn block(counter: u64) -> Vec<u8> {
    counter.to_le_bytes().repeat(BLOCK_BYTES / 8)
}

pub(crate) fn offset(slot: u64) -> u64 {
    slot % SLOTS * STRIDE * BLOCK_BYTES as u64
}

/// Writes a counter to both disks by turns until it is told to stop, from one after `counter` on. A write that gets no answer is made again, as
/// QEMU would. Returns the last that was acknowledged on both.
pub(crate) fn alternate(sockets: &[PathBuf], mut counter: u64, acknowledged: &AtomicU64, stop: &AtomicBool) -> u64 {
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
pub(crate) type Slots = [Vec<u64>; 2];

/// Reads the slots of both disks; a block that has two counters is torn.
pub(crate) fn slots(mut read: impl FnMut(usize, u64) -> Vec<u8>) -> Slots {
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
pub(crate) fn in_order(what: &str, slots: &Slots) -> u64 {
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
pub(crate) type Seen = (String, u64, Slots);

/// Every point of a stopped node's store, oldest first.
pub(crate) fn points(store: &Path, group: &str) -> Vec<Seen> {
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

pub(crate) fn all_in_order(points: &[Seen]) {
    for (name, _, held) in points {
        in_order(name, held);
    }
}

/// Each point of the third site is one that the second had, in the same order, and says of no later instant that it is of it. Returns how
/// many of the second's points were met.
#[track_caller]
pub(crate) fn each_is_one_of(third: &[Seen], second: &[Seen]) -> usize {
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

pub(crate) struct Chain {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) alpha: Node,
    pub(crate) beta: Node,
    pub(crate) gamma: Node,
    /// Exports at alpha.
    pub(crate) sockets: Vec<PathBuf>,
    /// Images there.
    pub(crate) images: Vec<PathBuf>,
}

impl Chain {
    /// Configured; nothing runs.
    pub(crate) fn new(interval: &str) -> Self {
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
    pub(crate) fn start(interval: &str) -> Self {
        let mut chain = Self::new(interval);
        chain.gamma.start();
        chain.beta.start();
        chain.alpha.start();
        chain.first_point();
        chain
    }

    #[track_caller]
    pub(crate) fn first_point(&self) {
        eventually("the first point at the third site", COMMIT_WITHIN, || (self.third_points() > 0).then_some(()));
    }

    pub(crate) fn third_points(&self) -> u64 {
        self.gamma.copy("beta", "db")["points"].as_u64().unwrap_or_default()
    }

    pub(crate) fn onward(&self) -> Value {
        self.beta.status()["onward"][0].clone()
    }

    /// Waits until the third site has all that the second has; nobody writes.
    #[track_caller]
    pub(crate) fn third_has_all(&self) {
        self.third_has_all_of("db");
    }

    /// The same, of an onward group of that name.
    #[track_caller]
    pub(crate) fn third_has_all_of(&self, group: &str) {
        eventually("the newest point of the second site goes onward", COMMIT_WITHIN, || {
            let (onward, copy) = (self.onward(), self.beta.copy("alpha", "db"));
            (onward["state"] == "active" || onward["point"] == copy["committed"]).then_some(())
        });
        eventually("nothing is left to be compared", COMMIT_WITHIN, || {
            let status = self.beta.primary(group);
            (status["state"] == "streaming" && status["suspect_bytes"] == 0).then_some(())
        });
        self.beta.settled(group);
    }

    /// Waits until the second site has all that was written at the first, and the third has it too.
    #[track_caller]
    pub(crate) fn all_have_all(&self) {
        self.alpha.settled("db");
        self.third_has_all();
    }

    pub(crate) fn store(node: &Node) -> PathBuf {
        node.folder.join("store")
    }

    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.sock"))
    }

    pub(crate) fn logs(&self) -> String {
        format!("beta:\n{}\ngamma:\n{}", self.beta.log(), self.gamma.log())
    }
}

pub(crate) fn onward_config(group: &str, peer: &str, peer_key: &str, interval: &str, copy: &str) -> String {
    format!(
        "[[group]]\nname = \"{group}\"\npeer = \"{peer}\"\npeer_key = \"{peer_key}\"\ninterval = \"{interval}\"\ncopy = \"{copy}\"\n"
    )
}

/// What an export holds.
pub(crate) fn read_export(socket: &Path) -> Slots {
    let mut disks = DISKS.map(|disk| Nbd::connect(socket, disk).expect("the export"));
    slots(|disk, at| disks[disk].read(at, BLOCK_BYTES as u32).expect("a read"))
}

/// Runs `during` beside a guest that writes to `sockets`, from one after `from` on; returns the last counter that was acknowledged.
pub(crate) fn under_load(sockets: &[PathBuf], from: u64, during: impl FnOnce(&AtomicU64)) -> u64 {
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
pub(crate) fn more_writes(acknowledged: &AtomicU64, more: u64) {
    let from = acknowledged.load(Ordering::SeqCst);
    eventually("the guest writes", COMMIT_WITHIN, || (acknowledged.load(Ordering::SeqCst) >= from + more).then_some(()));
}

/// A block of an image.
pub(crate) fn image_block(image: &Path, at: u64) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut content = vec![0; BLOCK_BYTES];
    std::fs::File::open(image).and_then(|file| file.read_exact_at(&mut content, at)).expect("the image");
    content
}
