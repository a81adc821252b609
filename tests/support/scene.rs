//! Two nodes, what their disks are to hold, and every point that is remembered: what has to be so after a SIGKILL at any step.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use blockdev::steps::Step;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use receiver::PointInfo;

use super::model::{Disks, Model, differing, export_is, images_are, kept_is, refuses, write_some};
use super::nbd::Nbd;
use super::node::{COMMIT_WITHIN, Node, Pair};
use super::views::{Disk, each_point_and_copy};
use super::{Process, eventually, noise, run, scratch, seed};

/// One of the nodes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Side {
    Primary,
    Receiver,
}

/// Everything that a transition is tried on.
#[derive(Debug)]
pub(crate) struct Scene {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) pair: Pair,
    /// What the guest that may write has written.
    pub(crate) model: Model,
    pub(crate) random: SmallRng,
    /// Images of points, by name.
    pub(crate) remembered: BTreeMap<String, Vec<Vec<u8>>>,
    /// The disks as the old primary had them when the sites parted, and the blocks that only it has.
    pub(crate) own: Option<(Model, BTreeSet<(usize, u64)>)>,
}

impl Scene {
    /// A pair that follows, with a point that is remembered.
    #[track_caller]
    pub(crate) fn new(disks: Disks) -> Self {
        let folder = scratch();
        let pair = Pair::start(folder.path(), "db", "50ms", disks);
        let random = SmallRng::seed_from_u64(seed());
        let mut scene = Self { folder, pair, model: Model::new(disks), random, remembered: BTreeMap::new(), own: None };
        scene.write(200);
        scene.remember();
        scene
    }

    /// The guest at the primary writes.
    #[track_caller]
    pub(crate) fn write(&mut self, writes: usize) {
        write_some(&self.pair.sockets, &mut self.model, &mut self.random, writes);
    }

    /// The guest at the primary writes some of the first disk's beginning in one request.
    #[track_caller]
    pub(crate) fn write_again(&mut self, bytes: std::ops::Range<usize>) {
        let bytes = self.random.random_range(bytes);
        let content = noise(self.random.random(), bytes);
        let mut nbd = Nbd::connect(&self.pair.sockets[0], self.model.names[0].0).expect("an export");
        nbd.write(0, &content).expect("a write");
        self.model.put(0, 0, &content);
        nbd.flush().expect("a flush");
    }

    /// The guest of the active copy writes.
    #[track_caller]
    pub(crate) fn write_at_copy(&mut self, writes: usize) {
        let sockets = vec![self.copy_socket(); self.model.names.len()];
        write_some(&sockets, &mut self.model, &mut self.random, writes);
    }

    /// Where the active copy is served.
    pub(crate) fn copy_socket(&self) -> PathBuf {
        self.folder.path().join("copy.sock")
    }

    /// Its address, as commands take it.
    pub(crate) fn copy_export(&self) -> String {
        format!("unix:{}", self.copy_socket().display())
    }

    /// Waits until all is committed, and remembers the newest point. Returns its name.
    #[track_caller]
    pub(crate) fn remember(&mut self) -> String {
        self.pair.primary.settled("db");
        let name = self.pair.receiver.points("db").last().expect("a point").0.clone();
        self.remembered.insert(name.clone(), self.model.disks.clone());
        name
    }

    /// The sites part, the primary goes on by itself for a while, and the copy is activated and written. Nothing of the primary runs in the end.
    #[track_caller]
    pub(crate) fn part(&mut self) {
        let common = self.model.snapshot();
        self.pair.receiver.kill();
        self.write(60);
        self.pair.primary.kill();
        let own = differing(&self.model.disks, &common.disks);
        self.own = Some((std::mem::replace(&mut self.model, common), own));
        self.pair.receiver.start();
        self.pair.receiver.failover("db", None, &self.copy_socket());
        self.write_at_copy(300);
    }

    /// Waits until both sides say that the copy follows.
    #[track_caller]
    pub(crate) fn follows(&self) {
        eventually("the copy follows", COMMIT_WITHIN, || {
            let there = self.pair.primary.primary("db")["state"] == "streaming";
            (there && !self.pair.receiver.copy("primary", "db")["peer"].is_null()).then_some(())
        });
    }

    /// The primary is the writer: its disks are what they are to be, its guest writes, and the copy gets it.
    #[track_caller]
    pub(crate) fn goes_on(&mut self, when: &str) {
        self.follows();
        images_are(&self.pair, &self.model, when);
        assert!(self.pair.primary.primary("db")["writes_refused"].is_null(), "{when}: its guest may write");
        self.write(10);
        self.remember();
    }

    /// The active copy is the writer, and what it is to be.
    #[track_caller]
    pub(crate) fn copy_goes_on(&mut self, when: &str) {
        assert_eq!(self.pair.receiver.copy("primary", "db")["state"], "active", "{when}");
        export_is(&self.copy_socket(), &self.model, when);
        self.write_at_copy(5);
    }

    /// The copy is none that runs, in that generation, and nobody can write to it.
    #[track_caller]
    pub(crate) fn copy_is_handed(&self, generation: u64, when: &str) {
        let copy = self.pair.receiver.copy("primary", "db");
        assert!(copy["active"].is_null() && copy["generation"] == generation, "{when}: {copy:#}");
        eventually("the copy is not served any more", COMMIT_WITHIN, || {
            Nbd::connect(&self.copy_socket(), self.model.names[0].0).is_err().then_some(())
        });
    }

    #[track_caller]
    pub(crate) fn refuses(&self, why: &str) {
        refuses(&self.pair, &self.model, why);
    }

    /// The forks that are in the receiver's store.
    #[track_caller]
    pub(crate) fn forks(&self) -> Vec<String> {
        let forks = std::fs::read_dir(self.pair.store.join("primary/db/forks")).expect("the forks");
        forks.map(|entry| entry.expect("a fork").file_name().into_string().expect("a name")).collect()
    }

    /// What the old primary had of its own is on its disk still, or kept in full.
    #[track_caller]
    pub(crate) fn own_is_safe(&self, when: &str) {
        let Some((ours, own)) = &self.own else { return };
        let kept: Vec<String> = self.forks().into_iter().filter(|name| name.starts_with("diverged-")).collect();
        if kept.is_empty() {
            images_are(&self.pair, ours, when);
        }
        kept.iter().for_each(|name| kept_is(&self.pair, name, ours, own));
    }

    /// Begins a command that will not come to its end.
    #[track_caller]
    pub(crate) fn begin(node: &Node, args: &[&str]) -> Process {
        Process::start(node.command(args).stdout(Stdio::null()).stderr(Stdio::null()))
    }

    /// Runs a command until one of the nodes has died of it, at `step`. What a busy machine made fail before that is begun again.
    #[track_caller]
    pub(crate) fn dies_of(&mut self, [dying, asked]: [Side; 2], args: &[&str], step: Step) -> Process {
        let mut running = Self::begin(self.node(asked), args);
        eventually(step.text(), COMMIT_WITHIN, || {
            if !self.node(dying).runs() {
                return Some(());
            }
            if !running.runs() {
                running = Self::begin(self.node(asked), args);
            }
            None
        });
        self.node(dying).died_at(step);
        running
    }

    fn node(&mut self, side: Side) -> &mut Node {
        match side {
            Side::Primary => &mut self.pair.primary,
            Side::Receiver => &mut self.pair.receiver,
        }
    }

    /// Waits for the end of a command whose node, or whose other side, was killed.
    #[track_caller]
    pub(crate) fn broke(mut running: Process, when: &str) {
        assert!(!running.ended(Duration::from_secs(60)).success(), "{when}: a command that broke says that it is done");
    }

    /// Looks at the receiver's store as a SIGKILL left it: each point that is remembered is there and what it was; the active copy is what its
    /// guest wrote, or there is none. The store itself is left as it is for the next start.
    #[track_caller]
    pub(crate) fn store_is_sound(&self, active: bool, when: &str) {
        let aside = tempfile::Builder::new().prefix("store-").tempdir_in(self.folder.path()).expect("a folder");
        let copied = aside.path().join("store");
        let path = |path: &std::path::Path| path.to_str().expect("UTF-8").to_owned();
        run("cp", &["-a", "--sparse=always", &path(&self.pair.store), &path(&copied)]);
        let (mut found, mut copies) = (BTreeSet::new(), 0);
        let wanted = |info: &PointInfo| self.remembered.contains_key(&info.point.to_string());
        let of_point = |info: &PointInfo, disks: &[Disk<'_>]| {
            let name = info.point.to_string();
            same(disks, &self.remembered[&name], &format!("{when}: point {name}"));
            found.insert(name);
        };
        let of_copy = |disks: &[Disk<'_>]| {
            same(disks, &self.model.disks, &format!("{when}: the active copy"));
            copies += 1;
        };
        each_point_and_copy(&copied, "db", wanted, of_point, of_copy);
        let missing: Vec<_> = self.remembered.keys().filter(|name| !found.contains(*name)).collect();
        assert!(missing.is_empty(), "{when}: points {missing:?} are gone");
        assert_eq!(copies, usize::from(active), "{when}: active copies");
    }
}

#[track_caller]
fn same(disks: &[Disk<'_>], images: &[Vec<u8>], what: &str) {
    for (disk, image) in disks.iter().zip(images) {
        assert_eq!(disk.size(), image.len() as u64, "{what}: disk {}", disk.name());
        for (at, piece) in (0..).step_by(1 << 20).zip(image.chunks(1 << 20)) {
            assert!(disk.read(at, piece.len()) == piece, "{what}: disk {} differs in the MiB at {at}", disk.name());
        }
    }
    assert_eq!(disks.len(), images.len(), "{what}");
}
