//! Points as files, with the real binary, compared by `qemu-img` with what the disk was.
//!
//! Would catch: a block of another point or of an epoch that is arriving, a hole that is data or data that is a hole, an image that QEMU finds wrong,
//! half a file under the name that was asked for, and a file that is replaced without being asked.

mod support;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use support::nbd::Nbd;
use support::node::Pair;
use support::{Process, Stop, eventually, flip, need, noise, run, scratch, text};

const MIB: u64 = 1 << 20;
/// Not a multiple of a qcow2 cluster.
const DISK_BYTES: u64 = 96 * MIB + 5 * 4096;
const OTHER_BYTES: u64 = 3 * MIB;
const SOON: Duration = Duration::from_secs(30);

fn path(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A point, and what the disks were then.
struct Kept {
    point: String,
    images: Vec<PathBuf>,
}

fn keep(pair: &Pair, folder: &Path, number: usize) -> Kept {
    pair.primary.settled("db");
    let point = pair.receiver.points("db").last().expect("a point").0.clone();
    let copied = pair.images.iter().enumerate().map(|(i, image)| {
        let to = folder.join(format!("wanted-{number}-{i}.raw"));
        run("cp", &["--sparse=always", path(image), path(&to)]);
        to
    });
    Kept { point, images: copied.collect() }
}

#[test]
fn every_point_is_the_image_that_it_was() {
    need(&[("qemu-img", "qemu-utils")]);
    let folder = scratch();
    let pair = Pair::start(folder.path(), "db", "50ms", &[("root", DISK_BYTES), ("data", OTHER_BYTES)]);
    let mut root = Nbd::connect(&pair.sockets[0], "root").expect("the disk");
    let mut data = Nbd::connect(&pair.sockets[1], "data").expect("the disk");
    let mut kept = vec![keep(&pair, folder.path(), 0)];
    for round in 1..5_u64 {
        for i in 0..30_u64 {
            let at = (round * 31 + i) * 1_299_709 % (DISK_BYTES - 70_000);
            root.write(at, &noise(round * 100 + i, 4096 + (i as usize * 2003) % 60_000)).expect("a write");
        }
        root.zero(round * 11 * MIB, 3 * MIB as u32).expect("zeroes");
        root.write(DISK_BYTES - 4096, &noise(round, 4096)).expect("the last block");
        data.write(round * 4096, &noise(round, 8192)).expect("a write");
        kept.push(keep(&pair, folder.path(), round as usize));
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        // What is exported are points of before; epochs arrive all the while.
        scope.spawn(|| {
            let mut n = 0;
            while !stop.load(Ordering::Relaxed) {
                root.write(n * 7919 % 20_000 * 4096, &noise(n, 65536)).expect("a write");
                n += 1;
            }
        });
        for Kept { point, images } in &kept {
            for (disk, image) in ["root", "data"].iter().zip(images) {
                for format in ["raw", "qcow2"] {
                    let to = folder.path().join(format!("{point}-{disk}.{format}"));
                    let told = pair.receiver.json(&[
                        "export",
                        "db",
                        "--point",
                        point,
                        "--disk",
                        disk,
                        "--format",
                        format,
                        "--to",
                        path(&to),
                    ]);
                    assert_eq!(
                        (told["point"].as_str(), told["format"].as_str()),
                        (Some(point.as_str()), Some(format)),
                        "{told:#}"
                    );
                    run("qemu-img", &["compare", "-f", "raw", "-F", format, path(image), path(&to)]);
                    if format == "qcow2" {
                        run("qemu-img", &["check", "-f", format, path(&to)]);
                    }
                    let (file, wanted) =
                        (std::fs::metadata(&to).expect("the file"), std::fs::metadata(image).expect("the image"));
                    assert_eq!(file.permissions().mode() & 0o777, 0o600);
                    assert!(format != "raw" || file.len() == wanted.len());
                    // A cluster of qcow2 holds 16 blocks, of which one may be data.
                    let most = if format == "raw" { wanted.blocks() + 64 } else { 16 * wanted.blocks() + 2048 };
                    assert!(file.blocks() <= most, "{}: {} of {} blocks: sparse", to.display(), file.blocks(), most);
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(std::fs::read(&kept[1].images[0]).unwrap() != std::fs::read(&kept[2].images[0]).unwrap(), "the points differ");

    let to = folder.path().join("newest.raw");
    let several = pair.receiver.ask(&["export", "db", "--to", path(&to)]);
    assert!(text(&several).contains("several disks: choose one with --disk: root, data"), "{}", text(&several));
    let unknown = pair.receiver.ask(&["export", "db", "--disk", "swap", "--to", path(&to)]);
    assert!(text(&unknown).contains("has no disk 'swap'"), "{}", text(&unknown));
    std::fs::write(&to, "mine").expect("a file");
    let there = pair.receiver.ask(&["export", "db", "--disk", "data", "--to", path(&to)]);
    assert!(there.status.code() == Some(2) && text(&there).contains("--force"), "{}", text(&there));
    assert_eq!(std::fs::read(&to).unwrap(), b"mine");
    println!("{}", pair.receiver.cli(&["export", "db", "--disk", "data", "--force", "--to", path(&to)]));
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", path(&kept[4].images[1]), path(&to)]);
    let nowhere = pair.receiver.ask(&["export", "db", "--disk", "data", "--to", path(&folder.path().join("no/folder.raw"))]);
    assert!(!nowhere.status.success() && text(&nowhere).contains("cannot write there"), "{}", text(&nowhere));
    let left = pair.receiver.json(&["drill", "list"]);
    assert_eq!(left["drills"].as_array().unwrap().len(), 0, "nothing is held any more: {left:#}");
}

/// An export that is interrupted, one whose node is killed, one that meets a damaged frame: no file, and nothing held at the node.
#[test]
fn an_export_that_fails_leaves_no_file() {
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "50ms", &[("root", 512 * MIB)]);
    let mut root = Nbd::connect(&pair.sockets[0], "root").expect("the disk");
    for mib in 0..512 {
        root.write(mib * MIB, &noise(mib, MIB as usize)).expect("a write");
        // A slow disk gets the time for all of them piece by piece.
        if mib % 32 == 31 {
            pair.primary.committed("db");
        }
    }
    drop(root);
    pair.primary.settled("db");
    let to = folder.path().join("out.raw");
    let partial = || {
        let entries = std::fs::read_dir(folder.path()).expect("the folder");
        entries.map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8")).find(|n| n.ends_with(".partial"))
    };
    let begin = |pair: &Pair| {
        let process = Process::start(pair.receiver.command(&["export", "db", "--to", path(&to)]).stdout(Stdio::null()));
        eventually("the export writes", SOON, || {
            let name = partial()?;
            std::fs::metadata(folder.path().join(name)).ok().filter(|m| m.blocks() > 100)
        });
        process
    };
    let mut interrupted = begin(&pair);
    interrupted.signal(rustix::process::Signal::INT);
    assert_eq!(interrupted.ended(SOON).code(), Some(1));
    assert!(!to.exists() && partial().is_none());

    let mut cut_off = begin(&pair);
    pair.receiver.kill();
    assert_eq!(cut_off.ended(SOON).code(), Some(1));
    assert!(!to.exists() && partial().is_none());

    // Under the running node, as a start would find it: a byte of what was written between two points, which no later frame replaces.
    pair.receiver.start();
    let end = |pair: &Pair| {
        pair.primary.settled("db");
        let segments = std::fs::read_dir(pair.store.join("primary/db/journal")).expect("the journal");
        let newest = segments.map(|entry| entry.expect("an entry").path()).max().expect("a segment");
        (std::fs::metadata(&newest).expect("a segment").len(), newest)
    };
    let mut root = Nbd::connect(&pair.sockets[0], "root").expect("the disk");
    let (before, older) = end(&pair);
    root.write(7 * MIB, &noise(1000, MIB as usize)).expect("a write");
    drop(root);
    let (after, segment) = end(&pair);
    let start = if older == segment { before } else { 0 };
    flip(&segment, start.midpoint(after));
    let failed = pair.receiver.ask(&["export", "db", "--to", path(&to)]);
    assert!(!failed.status.success() && text(&failed).contains("the node's log says why"), "{}", text(&failed));
    println!("{}", text(&failed));
    assert!(!to.exists() && partial().is_none());
    assert!(pair.receiver.log().contains("is damaged"), "{}", pair.receiver.log());
    eventually("nothing is held", SOON, || {
        let list = pair.receiver.json(&["drill", "list"]);
        list["drills"].as_array().expect("a list").is_empty().then_some(())
    });
}
