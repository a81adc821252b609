//! A flipped bit in the dirty log of a real node: the start says which file and where, compares what it cannot know, and the copy ends up
//! as the disk is.
//!
//! Would catch: a start that believes a damaged log and forgets what was written while the receiver was away; damage that is
//! repaired and not told. Every bit of a small log is tried in `replicator/src/dirtylog/tests.rs`.

mod support;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use support::node::COMMIT_WITHIN;
use support::site::Site;
use support::{eventually, noise};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 64 * MIB;

/// The file of that name below a folder.
fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    std::fs::read_dir(folder).expect("a folder").find_map(|entry| {
        let path = entry.expect("an entry").path();
        if path.is_dir() { find(&path, name) } else { (path.file_name()? == name).then_some(path) }
    })
}

/// What is written while the receiver is away is in the log only; then the primary ends, and a bit of the log flips.
fn flipped(offset: u64, clean: bool, says: &str) {
    let mut site = Site::new();
    let image = site.image("image.raw", DISK_BYTES);
    site.primary.configure(&site.group("db", &image));
    site.receiver.start();
    site.primary.start();
    site.write("db", 0, &noise(1, MIB as usize));
    site.primary.committed("db");
    site.receiver.stop();
    site.write("db", MIB / 2, &noise(2, MIB as usize));
    if clean {
        site.primary.stop()
    } else {
        site.primary.kill()
    }
    let log = find(&site.primary.folder, "data.dirtylog").expect("the log");
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&log).expect("the log");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("the log is longer");
    file.write_all_at(&[byte[0] ^ 4], offset).expect("a write");
    site.receiver.start();
    site.primary.start();
    let line = eventually("the start names the damage", COMMIT_WITHIN, || {
        let begin = format!("dirty log {}: ", log.display());
        site.primary.log().lines().find(|line| line.contains(&begin)).map(str::to_owned)
    });
    println!("{line}");
    assert!(line.contains(says), "{line}");
    eventually("what is suspect has been compared", COMMIT_WITHIN, || {
        let status = site.primary.primary("db");
        (status["suspect_bytes"] == 0 && status["compared_bytes"].as_u64()? > 0).then_some(())
    });
    site.primary.committed("db");
    site.copy_equals("db", &image);
}

#[test]
fn a_flipped_bit_in_the_header_is_named_and_costs_a_comparison() {
    flipped(20, true, "at offset 0; all of the disk is compared");
}

#[test]
fn a_flipped_bit_in_the_bits_is_named_and_costs_a_comparison() {
    flipped(512, false, "at offset 512; the part of the disk that it covers is compared");
}

#[test]
fn a_flipped_bit_in_the_maps_of_a_clean_stop_is_named_and_costs_a_comparison() {
    flipped(4096, true, "from offset 4096 on");
}
