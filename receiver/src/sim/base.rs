//! Bits that flip in a base or in its checksums, bases that have none yet, and crashes while those are made.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use blockdev::ExtentKind;
use proto::{EpochId, Generation, Point};

use super::folding::scene;
use super::primary::{BLOCK, BLOCKS, GROUP, SIZES, Volumes, open, read_all, read_at};
use super::sweep::folder;
use super::{Replica, SimDisk};
use crate::base::{SUM_BYTES, sums_path};
use crate::check::{self, GroupReport};

const NAMES: [&str; 2] = ["root", "data"];
/// Epochs of the scene, and up to which of them they are in the base.
const EPOCHS: u64 = 9;
const FOLDED: u64 = 7;

fn point(epoch: u64) -> Point {
    Point { generation: Generation(1), epoch: EpochId(epoch) }
}

fn base(root: &Path, volume: usize) -> PathBuf {
    root.join(format!("store/a/db/base/{}.raw", NAMES[volume]))
}

fn checked(root: &Path) -> GroupReport {
    check::check(&root.join("store"), &mut |_| ()).unwrap().groups.remove(0)
}

/// A store with a base; what each point shows.
fn folded(root: &Path, disk: &SimDisk) -> Vec<Volumes> {
    let mut replica = open(root, disk.disk()).unwrap();
    let images = scene(&mut replica, EPOCHS);
    replica.fold(GROUP, point(3)).unwrap();
    replica.fold(GROUP, point(FOLDED)).unwrap();
    replica.stop();
    images
}

fn flip(path: &Path, byte: u64, bit: u8) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut content = [0];
    file.read_exact_at(&mut content, byte).unwrap();
    file.write_all_at(&[content[0] ^ (1 << bit)], byte).unwrap();
}

/// Reads every block of every view, in one piece and in parts. Returns the errors; wrong data is the end of the test.
fn read_blocks(replica: &Replica, images: &[Volumes]) -> Vec<String> {
    let mut errors = Vec::new();
    for at in replica.points(GROUP).unwrap() {
        for (view, image) in replica.views(GROUP, at).unwrap().iter().zip(&images[at.epoch.0 as usize]) {
            for (number, block) in image.chunks(BLOCK).enumerate() {
                for (from, to) in [(0, block.len()), (100, 200), (block.len() - 1, block.len())] {
                    let mut found = vec![0xee; to - from];
                    match view.read_now((number * BLOCK + from) as u64, &mut found) {
                        Ok(()) => assert!(found == block[from..to], "point {at}, block {number}"),
                        Err(error) => errors.push(error.to_string()),
                    }
                }
            }
        }
    }
    errors
}

/// Every block of the bases and every byte of the sums: the one block reads as an error that names the base and the offset, `check` names the same, and
/// everything else is served. Would catch a read that does not compare, or compares with another block's sum.
#[test]
fn a_flipped_bit_in_base_or_sums_is_named_and_never_served() {
    let dir = folder();
    let disk = SimDisk::new(dir.path());
    let images = folded(dir.path(), &disk);
    let clean = checked(dir.path());
    assert!(clean.findings.is_empty() && clean.base_bytes > 0 && clean.unchecked.is_empty(), "{clean:?}");
    let (mut flips, mut shown) = (0, 0);
    for volume in 0..2 {
        let path = base(dir.path(), volume);
        let bytes_of = |block: u64| {
            let (first, end) = (block * BLOCK as u64, ((block + 1) * BLOCK as u64).min(SIZES[volume] as u64));
            let in_base = [first, (first + end) / 2, end - 1].map(|byte| (path.clone(), byte));
            let in_sums = (block * SUM_BYTES..(block + 1) * SUM_BYTES).map(|byte| (sums_path(&path), byte));
            in_base.into_iter().chain(in_sums).collect::<Vec<_>>()
        };
        for (block, file, byte) in
            (0..BLOCKS[volume]).flat_map(|block| bytes_of(block).into_iter().map(move |(f, b)| (block, f, b)))
        {
            let bit = (flips % 8) as u8;
            flips += 1;
            flip(&file, byte, bit);
            let what = format!("bit {bit} of byte {byte} of {}", file.display());
            let offset = block * BLOCK as u64;
            let found = checked(dir.path()).findings;
            assert!(found.len() == 1 && (&found[0].path, found[0].offset) == (&path, offset), "{what}: {found:?}");
            let replica = open(dir.path(), disk.disk()).unwrap();
            let errors = read_blocks(&replica, &images);
            let place = format!("{}: the block at offset {offset} is damaged", path.display());
            assert!(errors.iter().all(|error| error.starts_with(&place) && !error.contains('\n')), "{what}: {errors:?}");
            shown += usize::from(!errors.is_empty());
            let counted = crate::status::of(&replica.node().select(GROUP).unwrap()).scrub;
            assert_eq!(counted.damaged_base_blocks, u64::from(!errors.is_empty()), "{what}");
            drop(replica);
            flip(&file, byte, bit);
        }
    }
    println!("bits flipped in bases and sums: {flips}");
    assert!(shown == flips && flips > 80, "{shown} of {flips}: the base's point reads all of it there");
    let replica = open(dir.path(), disk.disk()).unwrap();
    assert_eq!(read_blocks(&replica, &images), Vec::<String>::new());
}

/// Would catch a block that is lost as a whole and then told, and read, as a hole.
#[test]
fn a_hole_that_should_be_none_is_damage() {
    let dir = folder();
    let disk = SimDisk::new(dir.path());
    let images = folded(dir.path(), &disk);
    let replica = open(dir.path(), disk.disk()).unwrap();
    let view = &replica.views(GROUP, point(FOLDED)).unwrap()[0];
    let is_data = |block: &u64| images[FOLDED as usize][0][*block as usize * BLOCK..][..BLOCK].iter().any(|byte| *byte != 0);
    let block = (0..BLOCKS[0]).find(is_data).unwrap();
    let (at, size) = (block * BLOCK as u64, BLOCK as u64);
    let file = std::fs::File::options().write(true).open(base(dir.path(), 0)).unwrap();
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, flags, at, size).unwrap();
    let extents = view.find_extents(at + 10, size - 10, 8).unwrap();
    assert!(extents.iter().all(|extent| extent.kind == ExtentKind::Data), "{extents:?}");
    assert!(
        view.read_now(at + 10, &mut [0; 1]).unwrap_err().to_string().contains(&format!("the block at offset {at} is damaged"))
    );
    let found = checked_beside(&replica, dir.path());
    assert!(found.iter().any(|finding| finding.offset == at), "{found:?}");
}

/// As [`checked`], beside the lock: the store is in use.
fn checked_beside(replica: &Replica, root: &Path) -> Vec<check::Finding> {
    assert_eq!(replica.groups().len(), 1);
    let aside = folder();
    // No process is started for it: between its fork and its exec it would hold the locks of all stores of this one.
    let (from, to) = (root.join("store"), aside.path().join("store"));
    std::fs::create_dir(&to).unwrap();
    for (inside, content) in super::model::read_image(&from).unwrap() {
        let (from, to) = (from.join(&inside), to.join(&inside));
        match content {
            None => std::fs::create_dir(&to).unwrap(),
            Some(_) if inside.file_name().is_some_and(|name| name == ".lock") => drop(std::fs::File::create(&to).unwrap()),
            // The very file, with its holes.
            Some(_) => std::fs::hard_link(&from, &to).unwrap(),
        }
    }
    checked(aside.path()).findings
}

/// Sums that end too early: the blocks behind their end are errors, those before are served.
#[test]
fn sums_that_end_too_early_cost_the_blocks_behind_them() {
    let dir = folder();
    let disk = SimDisk::new(dir.path());
    let images = folded(dir.path(), &disk);
    let (path, kept) = (base(dir.path(), 0), 2);
    let sums = std::fs::File::options().write(true).open(sums_path(&path)).unwrap();
    sums.set_len(kept * SUM_BYTES + 1).unwrap();
    let found = checked(dir.path()).findings;
    assert!(found.iter().any(|f| f.path == sums_path(&path) && f.offset == kept * SUM_BYTES + 1), "{found:?}");
    let replica = open(dir.path(), disk.disk()).unwrap();
    let errors = read_blocks(&replica, &images);
    assert!(!errors.is_empty() && errors.iter().all(|e| e.contains("has no checksum")), "{errors:?}");
    let offset = |block: u64| format!("the block at offset {} has", block * BLOCK as u64);
    assert!((0..kept).all(|block| !errors.iter().any(|e| e.contains(&offset(block)))), "{errors:?}");
}

/// A base of an older node: it is served unchecked, and `check` says so; then its sums are made of what it holds, a fold after that keeps them, and a bit that
/// flips is found.
#[test]
fn a_base_without_sums_gets_them() {
    let dir = folder();
    let disk = SimDisk::new(dir.path());
    let images = folded(dir.path(), &disk);
    for volume in 0..2 {
        std::fs::remove_file(sums_path(&base(dir.path(), volume))).unwrap();
    }
    let report = checked(dir.path());
    assert_eq!(report.unchecked.iter().map(|name| name.as_str()).collect::<Vec<_>>(), NAMES);
    assert!(report.findings.is_empty() && report.base_bytes == 0, "{report:?}");
    let made = SimDisk::traced_from(dir.path(), &super::model::read_image(dir.path()).unwrap());
    let mut replica = open(dir.path(), made.disk()).unwrap();
    let early = replica.views(GROUP, point(FOLDED)).unwrap();
    assert_eq!(read_blocks(&replica, &images), Vec::<String>::new());
    replica.tend(GROUP, 0).unwrap();
    assert!((0..2).all(|volume| sums_path(&base(dir.path(), volume)).exists()));
    assert_eq!(read_blocks(&replica, &images), Vec::<String>::new());
    replica.fold(GROUP, point(FOLDED + 1)).unwrap_err();
    flip(&base(dir.path(), 0), 17, 3);
    // Also for who looked before they were made.
    assert!(early[0].read_now(0, &mut [0; 1]).unwrap_err().to_string().contains("the block at offset 0 is damaged"));
    drop(early);
    flip(&base(dir.path(), 0), 17, 3);
    replica.fold(GROUP, point(FOLDED + 1)).unwrap();
    replica.stop();
    let report = checked(dir.path());
    assert!(report.findings.is_empty() && report.unchecked.is_empty() && report.base_bytes > 0, "{report:?}");
}

/// The power fails after every change of the making of sums: what is left is a base without any, or with all of them.
#[test]
fn a_crash_while_sums_are_made_leaves_none_or_all() {
    let dir = folder();
    let images = folded(dir.path(), &SimDisk::new(dir.path()));
    for volume in 0..2 {
        std::fs::remove_file(sums_path(&base(dir.path(), volume))).unwrap();
    }
    let start = super::model::read_image(dir.path()).unwrap();
    let (mut crashes, mut with_sums) = (0, 0);
    for after in 0.. {
        let mut ended = true;
        for seed in 0..4_u32 {
            super::model::write_image(dir.path(), &start).unwrap();
            let disk = SimDisk::traced_from(dir.path(), &start);
            let mut replica = open(dir.path(), disk.disk()).unwrap();
            disk.die_after(after);
            replica.tend(GROUP, 0).unwrap();
            ended &= !disk.is_dead();
            drop(replica);
            let mut coin = seed.wrapping_mul(0x9e37_79b9) | 1;
            let choose = |n: u32| {
                coin = coin.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if seed == 0 { 0 } else { (coin >> 16) % n }
            };
            disk.crash(choose).unwrap();
            crashes += 1;
            let report = checked(dir.path());
            assert!(report.findings.is_empty(), "after {after} changes, {seed}: {report:?}");
            with_sums += usize::from(report.unchecked.is_empty());
            let mut replica = open(dir.path(), disk.disk()).unwrap();
            assert_eq!(read_blocks(&replica, &images), Vec::<String>::new(), "after {after} changes, {seed}");
            replica.tend(GROUP, 0).unwrap();
            assert_eq!(read_blocks(&replica, &images), Vec::<String>::new(), "after {after} changes, {seed}");
            replica.stop();
            let report = checked(dir.path());
            assert!(report.findings.is_empty() && report.unchecked.is_empty(), "after {after} changes, {seed}: {report:?}");
        }
        if ended {
            break;
        }
    }
    println!("crashes: {crashes}; with all sums: {with_sums}");
    assert!(crashes > 40 && with_sums > 0 && with_sums < crashes);
}

/// A fold that was stopped has written blocks of which the sums are not there, or the other way round: `check` does not judge them, nobody reads them, and
/// the fold that is done again leaves all of it right.
#[test]
fn what_a_stopped_fold_left_is_not_judged() {
    let dir = folder();
    let disk = SimDisk::new(dir.path());
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    let images = scene(&mut replica, EPOCHS);
    let mut half = 0;
    for after in 1.. {
        disk.die_after(after);
        let folded = replica.fold(GROUP, point(5));
        drop(replica);
        disk.restart();
        let report = checked(dir.path());
        assert!(report.findings.is_empty(), "after {after} changes: {report:?}");
        replica = open(dir.path(), disk.disk()).unwrap();
        for (at, volumes) in read_all(&replica).unwrap() {
            assert_eq!(volumes, images[at.epoch.0 as usize], "point {at} after {after} changes");
        }
        let is_stopped = replica.folding(GROUP).unwrap().is_some();
        half += usize::from(is_stopped);
        // One that died while it cleaned up is done.
        if folded.is_ok() || (half > 0 && !is_stopped) {
            break;
        }
    }
    assert!(half > 5, "{half} folds were stopped half-way");
    assert_eq!(read_at(&replica, point(5)).unwrap(), images[5]);
    replica.stop();
    assert!(checked(dir.path()).findings.is_empty());
}
