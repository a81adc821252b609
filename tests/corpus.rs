//! Replays the corpus of the fuzz targets: every input that once found a way through a decoder goes there again at each change, with a
//! stable compiler and without libFuzzer. `docs/fuzzing.md` says how inputs are added.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

#[path = "../fuzz/config.rs"]
mod target;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

const TARGETS: [&str; 7] = ["config", "frames", "journal", "nbd_options", "nbd_requests", "superblock", "wire"];

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

/// Gives every input of a target to `run`, and says which one failed.
fn replay(target: &str, run: impl Fn(&[u8])) {
    assert!(TARGETS.contains(&target));
    let folder = fuzz().join("corpus").join(target);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut inputs: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "{}: no corpus", folder.display());
    for input in inputs {
        let data = std::fs::read(&input).unwrap();
        let ran = catch_unwind(AssertUnwindSafe(|| run(&data)));
        assert!(ran.is_ok(), "replay: cargo fuzz run {target} {}", input.display());
    }
}

/// Would catch a target that nobody replays.
#[test]
fn every_target_is_replayed() {
    let stem = |path: PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
    let list = |folder: &str| -> BTreeSet<String> {
        std::fs::read_dir(fuzz().join(folder)).unwrap().map(|entry| stem(entry.unwrap().path())).collect()
    };
    let replayed: BTreeSet<String> = TARGETS.into_iter().map(str::to_owned).collect();
    assert_eq!(list("fuzz_targets"), replayed);
    assert_eq!(list("corpus"), replayed);
}

#[test]
fn config() {
    replay("config", target::config);
}

#[test]
fn frames() {
    replay("frames", receiver::fuzzing::frames);
}

#[test]
fn journal() {
    let scratch = tempfile::tempdir().unwrap();
    replay("journal", |data| receiver::fuzzing::journal(scratch.path(), data));
}

#[test]
fn nbd_options() {
    replay("nbd_options", blockdev::nbd::fuzzing::nbd_options);
}

#[test]
fn nbd_requests() {
    replay("nbd_requests", blockdev::nbd::fuzzing::nbd_requests);
}

#[test]
fn superblock() {
    let scratch = tempfile::tempdir().unwrap();
    replay("superblock", |data| receiver::fuzzing::superblock(scratch.path(), data));
}

#[test]
fn wire() {
    replay("wire", proto::fuzzing::wire);
}
