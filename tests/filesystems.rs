//! Real file systems, and fio, on a replicated disk whose primary is killed under load.
//!
//! Would catch: a block lost or mixed between epochs, a flush that is answered too early, a hole that comes back as data or data
//! as a hole, and a copy whose journal does not replay.

mod support;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use support::block::{self, Disk};
use support::node::Pair;
use support::{eventually, find, need, need_root, noise, one_at_a_time, run, scratch, seed, text, unix_us};

const FILES_A_ROUND: usize = 24;
const FILE_BYTES_MAX: usize = 300_000;
/// Rounds that must be committed before the primary is killed.
const ROUNDS_COMMITTED: usize = 8;
/// Points that there must be by then: the copy is made of several epochs, not of one first sync.
const POINTS_MIN: u64 = 8;
/// Rounds at full speed. Should they not do, on a machine that is busy with other things, the rest comes slowly: the disk has room for three times as many.
const ROUNDS_FAST: usize = 100;

/// Paths below the mount point, and length and checksum of each file.
type Manifest = BTreeMap<PathBuf, (u64, u32)>;

/// Files that were synced, and when the sync had returned.
#[derive(Debug)]
struct Round {
    synced_unix_us: u64,
    files: Manifest,
}

/// Creates, overwrites, grows, cuts, renames and deletes files of one folder, then syncs the file system.
fn one_round(root: &Path, number: usize, rng: &mut SmallRng) -> io::Result<Round> {
    let folder = root.join(format!("round-{number}"));
    std::fs::create_dir(&folder)?;
    let mut names = Vec::new();
    for i in 0..FILES_A_ROUND {
        let parent = folder.join(format!("d{}", rng.random_range(0..4)));
        std::fs::create_dir_all(&parent)?;
        let name = parent.join(format!("f{i}"));
        std::fs::write(&name, noise(rng.random(), rng.random_range(0..FILE_BYTES_MAX)))?;
        names.push(name);
    }
    for _ in 0..FILES_A_ROUND / 2 {
        let at = rng.random_range(0..names.len());
        let name = names[at].clone();
        match rng.random_range(0..5) {
            0 => {
                std::fs::remove_file(&name)?;
                names.swap_remove(at);
            }
            1 => {
                let to = folder.join(format!("moved-{}", rng.random::<u32>()));
                std::fs::rename(&name, &to)?;
                names[at] = to;
            }
            2 => std::fs::OpenOptions::new().write(true).open(&name)?.set_len(rng.random_range(0..FILE_BYTES_MAX as u64))?,
            3 => std::fs::OpenOptions::new().append(true).open(&name)?.write_all(&noise(rng.random(), 10_000))?,
            _ => {
                use std::os::unix::fs::FileExt;
                let file = std::fs::OpenOptions::new().write(true).open(&name)?;
                file.write_all_at(&noise(rng.random(), 20_000), rng.random_range(0..FILE_BYTES_MAX as u64))?;
            }
        }
    }
    // Blocks that were used and are free again: the journal is reused, and discards reach the disk.
    let churn = root.join("churn");
    std::fs::write(&churn, noise(rng.random(), 2 << 20))?;
    std::fs::remove_file(&churn)?;
    let files = manifest(root, &folder)?;
    let handle = std::fs::File::open(root)?;
    rustix::fs::syncfs(&handle)?;
    Ok(Round { synced_unix_us: unix_us(), files })
}

fn manifest(root: &Path, folder: &Path) -> io::Result<Manifest> {
    let mut found = Manifest::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let content = std::fs::read(&path)?;
                let name = path.strip_prefix(root).expect("below the root").to_path_buf();
                found.insert(name, (content.len() as u64, crc32fast::hash(&content)));
            }
        }
    }
    Ok(found)
}

/// The file system's own checker, reading only, after its journal was replayed by a mount.
fn check(kind: &str, device: &str) {
    match kind {
        "ext4" => run("e2fsck", &["-f", "-n", device]),
        "xfs" => run("xfs_repair", &["-n", device]),
        "btrfs" => run("btrfs", &["check", "--readonly", device]),
        other => panic!("no checker known for {other}"),
    };
}

fn survives(kind: &str, bytes: u64) {
    let seed = seed();
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "files", "100ms", &[("data", bytes)]);
    let rounds = Mutex::new(Vec::<Round>::new());
    let enough = AtomicBool::new(false);
    {
        let mut disk = Disk::attach(folder.path(), "before", &pair.sockets[0], "data");
        let root = folder.path().join("mnt-before");
        disk.mkfs(kind);
        disk.mount(&root);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut rng = SmallRng::seed_from_u64(seed);
                for number in 0.. {
                    match one_round(&root, number, &mut rng) {
                        Ok(round) => rounds.lock().expect("rounds").push(round),
                        // The disk died under it, which is the point.
                        Err(error) if enough.load(Ordering::SeqCst) => {
                            return println!("{kind}: round {number} ended by: {error}");
                        }
                        Err(error) => panic!("{kind}: round {number}: {error}"),
                    }
                    if number > ROUNDS_FAST {
                        std::thread::sleep(Duration::from_secs(1));
                    }
                    // A test that fails elsewhere must not write for ever.
                    if number > 2 * ROUNDS_FAST {
                        return;
                    }
                }
            });
            let newest = eventually("rounds are committed while the load goes on", Duration::from_secs(90), || {
                let copy = pair.receiver.copy("primary", "files");
                let (cut, points) = (copy["cut_unix_us"].as_u64()?, copy["points"].as_u64()?);
                let covered = rounds.lock().expect("rounds").iter().filter(|r| r.synced_unix_us < cut).count();
                (covered >= ROUNDS_COMMITTED && points >= POINTS_MIN).then_some(cut)
            });
            println!("{kind}: killing the primary, the newest cut is {newest}");
            enough.store(true, Ordering::SeqCst);
            pair.primary.kill();
        });
    }
    let rounds = rounds.into_inner().expect("rounds");
    let socket = folder.path().join("copy.sock");
    let (point, cut) = pair.receiver.failover_newest("files", &socket);

    let mut disk = Disk::attach(folder.path(), "after", &socket, "data");
    let root = folder.path().join("mnt-after");
    disk.mount(&root);
    let due: Vec<_> = rounds.iter().enumerate().filter(|(_, r)| r.synced_unix_us < cut).collect();
    assert!(due.len() >= ROUNDS_COMMITTED, "{kind}: {} rounds before the cut of {point}", due.len());
    let mut files = 0;
    for (number, round) in &due {
        let found = manifest(&root, &root.join(format!("round-{number}"))).expect("a synced round");
        assert_eq!(found, round.files, "{kind}: round {number} was synced before the cut of {point}");
        files += found.len();
    }
    // The copy is a running server's disk now: it takes writes.
    one_round(&root, rounds.len() + 1, &mut SmallRng::seed_from_u64(1)).expect("a writable copy");
    disk.unmount();
    check(kind, disk.device());
    println!("{kind}: {files} files of {} rounds (of {}) are there at point {point}", due.len(), rounds.len());
}

#[test]
fn ext4_survives_the_loss_of_its_primary() {
    need_root();
    need(block::TOOLS);
    need(&[("mkfs.ext4", "e2fsprogs"), ("e2fsck", "e2fsprogs")]);
    let _alone = one_at_a_time();
    survives("ext4", 1 << 30);
}

#[test]
fn xfs_survives_the_loss_of_its_primary() {
    need_root();
    need(block::TOOLS);
    need(&[("mkfs.xfs", "xfsprogs"), ("xfs_repair", "xfsprogs")]);
    let _alone = one_at_a_time();
    survives("xfs", 1 << 30);
}

/// Only where its tools are: btrfs is not among what Twinsite promises, its checksums are welcome.
#[test]
fn btrfs_survives_the_loss_of_its_primary() {
    need_root();
    need(block::TOOLS);
    if find("mkfs.btrfs").is_none() {
        println!("left out: no mkfs.btrfs (Debian package btrfs-progs)");
        return;
    }
    let _alone = one_at_a_time();
    survives("btrfs", 1 << 30);
}

/// fio verifies through the export what four jobs wrote at once; then the same checksums are asked of the copy.
#[test]
fn what_fio_verified_is_on_the_copy() {
    need_root();
    need(&[("fio", "fio"), ("qemu-img", "qemu-utils")]);
    let _alone = one_at_a_time();
    let seed = seed();
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "fio", "100ms", &[("data", 256 << 20)]);
    let fio = |socket: &Path, more: &[&str]| {
        let mut command = Command::new("fio");
        command.current_dir(folder.path()).args(["--ioengine=nbd", "--name=job", "--numjobs=4", "--group_reporting"]);
        command.args(["--rw=randwrite", "--bsrange=4k-64k", "--bs_unaligned=0", "--blockalign=4k", "--size=48m"]);
        command.args(["--offset_increment=64m", "--iodepth=16", "--verify=crc32c", "--verify_state_save=0", "--verify_fatal=1"]);
        command.arg(format!("--randseed={seed}")).arg(format!("--uri=nbd+unix:///data?socket={}", socket.display())).args(more);
        let output = command.output().expect("fio");
        assert!(output.status.success(), "fio {more:?}: {}\n{}", output.status, text(&output));
    };
    fio(&pair.sockets[0], &["--do_verify=1"]);
    pair.primary.committed("fio");
    pair.primary.kill();

    let socket = folder.path().join("copy.sock");
    let point = pair.receiver.failover("fio", None, &socket);
    fio(&socket, &["--verify_only=1"]);
    let uri = format!("nbd+unix:///data?socket={}", socket.display());
    let image = pair.images[0].to_str().expect("UTF-8");
    println!("{point}: {}", run("qemu-img", &["compare", "-f", "raw", "-F", "raw", image, &uri]).trim());
}
