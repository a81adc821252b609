//! What the disks of a pair hold, as their clients know it, and the commands that change who may write them.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rand::Rng;
use rand::rngs::SmallRng;
use serde_json::Value;

use super::nbd::Nbd;
use super::node::{COMMIT_WITHIN, Pair};
use super::{eventually, noise, text};

const MIB: u64 = 1 << 20;
pub(crate) const BLOCK: u64 = 4096;

/// Names and sizes of a group's disks.
pub(crate) type Disks = &'static [(&'static str, u64)];

/// What the disks hold, and the blocks that were changed since somebody asked last.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) names: Disks,
    pub(crate) disks: Vec<Vec<u8>>,
    pub(crate) changed: BTreeSet<(usize, u64)>,
}

impl Model {
    /// Disks of zeroes.
    pub(crate) fn new(names: Disks) -> Self {
        let disks = names.iter().map(|(_, bytes)| vec![0; *bytes as usize]).collect();
        Self { names, disks, changed: BTreeSet::new() }
    }

    /// What they hold now, for later.
    pub(crate) fn snapshot(&self) -> Self {
        Self { names: self.names, disks: self.disks.clone(), changed: BTreeSet::new() }
    }

    pub(crate) fn put(&mut self, disk: usize, offset: u64, content: &[u8]) {
        self.disks[disk][offset as usize..offset as usize + content.len()].copy_from_slice(content);
        let end = offset + content.len() as u64;
        self.changed.extend((offset / BLOCK..end.div_ceil(BLOCK)).map(|block| (disk, block)));
    }

    /// A write at a random place.
    pub(crate) fn one_write(&self, random: &mut SmallRng) -> (usize, u64, Vec<u8>) {
        let disk = usize::from(random.random_bool(0.2));
        let bytes = self.names[disk].1;
        let length = random.random_range(1..40_000).min(bytes);
        let offset = random.random_range(0..=bytes - length);
        // Zeroes travel another way.
        let content = if random.random_bool(0.1) { vec![0; length as usize] } else { noise(random.random(), length as usize) };
        (disk, offset, content)
    }

    /// Connections to the exports of all disks.
    #[track_caller]
    pub(crate) fn connect(&self, sockets: &[PathBuf]) -> Vec<Nbd> {
        sockets.iter().zip(self.names).map(|(socket, (name, _))| Nbd::connect(socket, name).expect("an export")).collect()
    }
}

/// Writes at random places; each is in the model once it is acknowledged.
#[track_caller]
pub(crate) fn write_some(sockets: &[PathBuf], model: &mut Model, random: &mut SmallRng, writes: usize) {
    let mut disks = model.connect(sockets);
    for n in 1..=writes {
        // A single flush of all of them takes long on a slow disk.
        if n % 100 == 0 {
            disks.iter_mut().for_each(|disk| disk.flush().expect("a flush"));
        }
        let (disk, offset, content) = model.one_write(random);
        disks[disk].write(offset, &content).expect("a write");
        model.put(disk, offset, &content);
    }
    disks.iter_mut().for_each(|disk| disk.flush().expect("a flush"));
}

/// The first block in which a disk is not what it is to be.
pub(crate) fn first_difference(found: &[u8], wanted: &[u8]) -> Option<usize> {
    let differs = found.chunks(BLOCK as usize).zip(wanted.chunks(BLOCK as usize)).position(|(a, b)| a != b);
    differs.or((found.len() != wanted.len()).then_some(found.len().min(wanted.len()) / BLOCK as usize))
}

#[track_caller]
pub(crate) fn images_are(pair: &Pair, model: &Model, when: &str) {
    for ((image, disk), (name, _)) in pair.images.iter().zip(&model.disks).zip(model.names) {
        let found = std::fs::read(image).expect("an image");
        assert_eq!(first_difference(&found, disk), None, "{when}: disk {name} differs in that block");
    }
}

#[track_caller]
pub(crate) fn export_is(socket: &Path, model: &Model, when: &str) {
    for ((name, bytes), disk) in model.names.iter().zip(&model.disks) {
        let mut nbd = Nbd::connect(socket, name).expect("the export");
        for at in (0..*bytes).step_by(MIB as usize) {
            let length = MIB.min(bytes - at);
            let found = nbd.read(at, length as u32).expect("a read");
            assert!(found == disk[at as usize..(at + length) as usize], "{when}: disk {name} differs in the MiB at {at}");
        }
    }
}

/// Runs a failback or a rollback to its end, well or not.
pub(crate) fn hand_back(pair: &Pair, args: &[&str]) -> Result<Value, String> {
    let output = pair.primary.ask(&[args, &["--yes", "--json"]].concat());
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    match serde_json::from_str::<Value>(&printed) {
        Ok(done) if output.status.success() => Ok(done["handback"].clone()),
        _ => Err(text(&output)),
    }
}

#[track_caller]
pub(crate) fn hand_back_well(pair: &Pair, args: &[&str]) -> Value {
    hand_back(pair, args).unwrap_or_else(|told| panic!("{told}\n{}\n{}", pair.primary.log(), pair.receiver.log()))
}

/// The primary refuses writes, and says why; reads go on.
#[track_caller]
pub(crate) fn refuses(pair: &Pair, model: &Model, why: &str) {
    assert_eq!(pair.primary.primary("db")["writes_refused"], why);
    let mut nbd = Nbd::connect(&pair.sockets[0], model.names[0].0).expect("the export");
    nbd.read(0, 4096).expect("reads go on");
    let refused = nbd.write(0, &[1; 4096]).expect_err("it takes no writes");
    assert_eq!(refused.raw_os_error(), Some(1), "{refused}");
}

#[track_caller]
pub(crate) fn fenced(pair: &Pair, model: &Model) {
    eventually("the old primary learns that it is fenced", COMMIT_WITHIN, || {
        (pair.primary.primary("db")["state"] == "fenced").then_some(())
    });
    refuses(pair, model, "fenced");
}

/// Waits until a rollback can begin, for the first time or again: before, it would be refused, and nothing would be tried.
#[track_caller]
pub(crate) fn can_begin(pair: &Pair) -> Value {
    eventually("it is known where the disks stand", COMMIT_WITHIN, || {
        let status = pair.primary.primary("db");
        (status["state"] == "streaming" || status["writes_refused"] == "handback").then_some(status)
    })
}

#[track_caller]
pub(crate) fn verified(pair: &Pair) {
    // A handback that has ended begins a session anew.
    eventually("a session", COMMIT_WITHIN, || (pair.primary.primary("db")["state"] == "streaming").then_some(()));
    pair.primary.committed("db");
    let report = pair.primary.json(&["verify", "db"]);
    assert_eq!(report["differing_bytes"], 0, "{report:#}");
}

/// A kept fork has all of `own` as the old primary had it.
#[track_caller]
pub(crate) fn kept_is(pair: &Pair, kept: &str, model: &Model, own: &BTreeSet<(usize, u64)>) {
    let folder = pair.store.join("primary/db/forks").join(kept);
    for (disk, block) in own {
        let (name, bytes) = model.names[*disk];
        let file = std::fs::File::open(folder.join(format!("{name}.raw"))).expect("the kept fork");
        let (from, end) = (block * BLOCK, ((block + 1) * BLOCK).min(bytes));
        let mut found = vec![0; (end - from) as usize];
        file.read_exact_at(&mut found, from).expect("a block");
        assert!(found == model.disks[*disk][from as usize..end as usize], "block {block} of disk {disk} is not kept");
    }
}

/// The blocks in which two sets of images differ. A write may leave a block as it was: zeroes over the zeroes behind an earlier write.
pub(crate) fn differing(a: &[Vec<u8>], b: &[Vec<u8>]) -> BTreeSet<(usize, u64)> {
    let blocks = |disk: &Vec<u8>| disk.len() as u64 / BLOCK + 1;
    let block = |disk: &Vec<u8>, n: u64| disk.chunks(BLOCK as usize).nth(n as usize).map(<[u8]>::to_vec);
    (0..a.len())
        .flat_map(|disk| (0..blocks(&a[disk])).map(move |n| (disk, n)))
        .filter(|(disk, n)| block(&a[*disk], *n) != block(&b[*disk], *n))
        .collect()
}
