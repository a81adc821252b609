//! What a disk may hold after its power failed: the fault model.
//!
//! What is assumed, so what a store may build on:
//! - A sector of 512 bytes is written whole or not at all.
//! - A sync of a file makes its content and length durable, and nothing else: not its entry in the folder.
//! - A sync of a folder makes its entries durable: creations, renames, removals. Not the content of the files.
//! - A rename is atomic: the file is under the old name or under the new one.
//!
//! What may happen to everything else, in any combination and any order:
//! - A write is lost, or some of its sectors are; a later one may be there without an earlier one, even in the same sector.
//! - A file has grown, and what was to be in the new part is zeroes or garbage; or it has not grown.
//! - What a failed sync was to cover may be on the disk or not, and a later sync does not change that: the page cache has it and
//!   calls it clean. Whoever reads it sees it, until the cache is told to forget it; then it is lost.
//! - A new length did not happen. A creation, rename or removal did not happen, whatever came after it.
//!
//! A process that is killed loses nothing of this: what it wrote is there, not durable, and can be lost later.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::Op;

/// What is written whole or not at all.
pub(super) const SECTOR_BYTES: u64 = 512;

/// A change of the disk; paths are relative to its root.
#[derive(Clone)]
pub(super) enum Change {
    CreateFolder(PathBuf),
    CreateFile(PathBuf),
    Write { file: PathBuf, offset: u64, bytes: Arc<[u8]> },
    Resize { file: PathBuf, bytes: u64 },
    Sync(PathBuf),
    Forget(PathBuf),
    SyncFolder(PathBuf),
    Rename { from: PathBuf, to: PathBuf },
    Remove(PathBuf),
}

impl std::fmt::Debug for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::CreateFolder(path) => write!(f, "create folder {}", path.display()),
            Self::CreateFile(path) => write!(f, "create {}", path.display()),
            Self::Write { file, offset, bytes } => write!(f, "write {} at {offset} of {}", bytes.len(), file.display()),
            Self::Resize { file, bytes } => write!(f, "resize {} to {bytes}", file.display()),
            Self::Sync(path) => write!(f, "sync {}", path.display()),
            Self::Forget(path) => write!(f, "forget {}", path.display()),
            Self::SyncFolder(path) => write!(f, "sync folder '{}'", path.display()),
            Self::Rename { from, to } => write!(f, "rename {} to {}", from.display(), to.display()),
            Self::Remove(path) => write!(f, "remove {}", path.display()),
        }
    }
}

impl Change {
    pub(super) fn new(op: &Op<'_>, root: &Path) -> Self {
        let inside = |path: &Path| path.strip_prefix(root).unwrap_or(path).to_owned();
        match op {
            Op::CreateFolder(path) => Self::CreateFolder(inside(path)),
            Op::CreateFile(path) => Self::CreateFile(inside(path)),
            Op::Write { file, offset, bytes } => Self::Write { file: inside(file), offset: *offset, bytes: Arc::from(*bytes) },
            // The disks of simulations are small: a hole is written as zeroes.
            Op::Punch { file, offset, bytes } => {
                Self::Write { file: inside(file), offset: *offset, bytes: vec![0; *bytes as usize].into() }
            }
            Op::Resize { file, bytes } => Self::Resize { file: inside(file), bytes: *bytes },
            Op::Sync(path) => Self::Sync(inside(path)),
            Op::Forget(path) => Self::Forget(inside(path)),
            Op::SyncFolder(path) => Self::SyncFolder(inside(path)),
            Op::Rename { from, to } => Self::Rename { from: inside(from), to: inside(to) },
            Op::Remove(path) => Self::Remove(inside(path)),
        }
    }
}

/// Content of a file: bytes, then zeroes up to its length.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Content {
    data: Vec<u8>,
    len: u64,
}

impl Content {
    fn resize(&mut self, len: u64) {
        self.data.truncate(usize::try_from(len).unwrap_or(usize::MAX));
        self.len = len;
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let (from, end) = (offset as usize, offset as usize + bytes.len());
        if self.data.len() < end {
            self.data.resize(end, 0);
        }
        if let Some(to) = self.data.get_mut(from..end) {
            to.copy_from_slice(bytes);
        }
        self.len = self.len.max(end as u64);
    }

    fn apply(&mut self, change: &DataChange, fate: &Fate) {
        match (change, fate) {
            (_, Fate::Lost) | (DataChange::Resize(_), Fate::Torn { .. }) => {}
            (DataChange::Resize(len), Fate::Kept) => self.resize(*len),
            (DataChange::Write { offset, bytes }, Fate::Kept) => self.put(*offset, bytes),
            (DataChange::Write { offset, bytes }, Fate::Torn { kept, grown, garbage }) => {
                let end = offset + bytes.len() as u64;
                if *grown && end > self.len {
                    if *garbage {
                        let from = self.len;
                        // Neither zeroes nor anything that the store writes.
                        let filler: Vec<u8> = (from..end).map(|at| 0x5a ^ (at % 251) as u8).collect();
                        self.put(from, &filler);
                    }
                    self.len = end;
                }
                for (i, (at, piece)) in sectors(*offset, bytes).enumerate() {
                    if kept.get(i).copied().unwrap_or(false) {
                        self.put(at, piece);
                    }
                }
            }
        }
    }
}

/// The pieces of a write that lie in one sector each.
fn sectors(offset: u64, bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let (mut at, mut rest) = (offset, bytes);
    std::iter::from_fn(move || {
        let room = (SECTOR_BYTES - at % SECTOR_BYTES) as usize;
        let (now, later) = rest.split_at(rest.len().min(room));
        let piece = (at, now);
        rest = later;
        at += now.len() as u64;
        (!now.is_empty()).then_some(piece)
    })
}

#[derive(Clone, Debug)]
enum DataChange {
    Write { offset: u64, bytes: Arc<[u8]> },
    Resize(u64),
}

#[derive(Clone, Debug)]
enum EntryChange {
    Add { name: String, node: usize },
    Remove { name: String },
    Rename { from: String, to: String, node: usize },
}

type Entries = BTreeMap<String, usize>;

fn enter(entries: &mut Entries, change: &EntryChange) {
    match change {
        EntryChange::Add { name, node } => drop(entries.insert(name.clone(), *node)),
        EntryChange::Remove { name } => drop(entries.remove(name)),
        EntryChange::Rename { from, to, node } => {
            entries.remove(from);
            entries.insert(to.clone(), *node);
        }
    }
}

#[derive(Clone, Debug)]
enum Node {
    File {
        durable: Content,
        pending: Vec<(u64, DataChange)>,
        /// The first so many of `pending` were to be covered by a sync that failed.
        doomed: usize,
    },
    Folder {
        durable: Entries,
        now: Entries,
        pending: Vec<(u64, EntryChange)>,
    },
}

/// A change that is not durable, as one thing that can happen or not. Ordered by time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) at: u64,
    /// Sectors of a write; 0 for every other change.
    pub(super) sectors: usize,
}

/// What becomes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Kept,
    Lost,
    /// Some sectors of a write. `grown`: the file is as long as if all of it were there; the gap is zeroes or garbage.
    Torn {
        kept: Vec<bool>,
        grown: bool,
        garbage: bool,
    },
}

/// What is on a disk: folders (`None`) and files by path, parents first.
pub(super) type Image = BTreeMap<PathBuf, Option<Content>>;

/// The disk: what is durable, and what happened since.
#[derive(Clone, Debug)]
pub(super) struct Model {
    nodes: Vec<Node>,
    clock: u64,
}

impl Model {
    /// An empty root folder.
    pub(super) fn new() -> Self {
        Self { nodes: vec![folder()], clock: 0 }
    }

    /// Everything of `image` is durable.
    pub(super) fn of(image: &Image) -> Self {
        let mut this = Self::new();
        for (path, content) in image {
            let node = content.as_ref().map_or_else(folder, |c| file(c.clone()));
            let id = this.add(node);
            this.entry(path, |name| EntryChange::Add { name, node: id });
        }
        for node in &mut this.nodes {
            settle(node);
        }
        this
    }

    fn add(&mut self, node: Node) -> usize {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    fn find(&self, path: &Path) -> Option<usize> {
        path.iter().try_fold(0, |at, name| match self.nodes.get(at)? {
            Node::Folder { now, .. } => now.get(name.to_str()?).copied(),
            Node::File { .. } => None,
        })
    }

    fn entry(&mut self, path: &Path, change: impl FnOnce(String) -> EntryChange) {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
        let folder = path.parent().and_then(|p| self.find(p));
        let at = self.clock;
        let Some(Node::Folder { now, pending, .. }) = folder.and_then(|f| self.nodes.get_mut(f)) else {
            panic!("{}: no such folder in the model of the disk", path.display())
        };
        let change = change(name);
        enter(now, &change);
        pending.push((at, change));
    }

    fn data(&mut self, path: &Path, change: DataChange) {
        let at = self.clock;
        let node = self.find(path);
        let Some(Node::File { pending, .. }) = node.and_then(|n| self.nodes.get_mut(n)) else {
            panic!("{}: no such file in the model of the disk", path.display())
        };
        pending.push((at, change));
    }

    /// A change was made.
    pub(super) fn apply(&mut self, change: &Change) {
        self.clock += 1;
        match change {
            Change::CreateFolder(path) => {
                let node = self.add(folder());
                self.entry(path, |name| EntryChange::Add { name, node });
            }
            Change::CreateFile(path) => {
                let node = self.add(file(Content::default()));
                self.entry(path, |name| EntryChange::Add { name, node });
            }
            Change::Write { file, offset, bytes } => {
                self.data(file, DataChange::Write { offset: *offset, bytes: Arc::clone(bytes) });
            }
            Change::Resize { file, bytes } => self.data(file, DataChange::Resize(*bytes)),
            Change::Sync(path) | Change::SyncFolder(path) => {
                if let Some(node) = self.find(path).and_then(|n| self.nodes.get_mut(n)) {
                    settle(node);
                }
            }
            Change::Forget(path) => {
                if let Some(Node::File { pending, doomed, .. }) = self.find(path).and_then(|n| self.nodes.get_mut(n)) {
                    pending.drain(..std::mem::take(doomed));
                }
            }
            Change::Rename { from, to } => {
                let Some(node) = self.find(from) else { panic!("{}: renamed, and not there", from.display()) };
                let to = to.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
                self.entry(from, |from| EntryChange::Rename { from, to, node });
            }
            Change::Remove(path) => self.entry(path, |name| EntryChange::Remove { name }),
        }
    }

    /// What is not durable and could still be seen after a crash, by time.
    pub(super) fn units(&self) -> Vec<Unit> {
        let mut units = Vec::new();
        let (mut seen, mut queue) = (vec![false; self.nodes.len()], vec![0]);
        while let Some(id) = queue.pop() {
            if std::mem::replace(&mut seen[id], true) {
                continue;
            }
            match &self.nodes[id] {
                Node::File { pending, .. } => units.extend(pending.iter().map(|(at, change)| match change {
                    DataChange::Write { offset, bytes } => Unit { at: *at, sectors: sectors(*offset, bytes).count() },
                    DataChange::Resize(_) => Unit { at: *at, sectors: 0 },
                })),
                Node::Folder { durable, pending, .. } => {
                    queue.extend(durable.values());
                    for (at, change) in pending {
                        units.push(Unit { at: *at, sectors: 0 });
                        match change {
                            EntryChange::Add { node, .. } | EntryChange::Rename { node, .. } => queue.push(*node),
                            EntryChange::Remove { .. } => {}
                        }
                    }
                }
            }
        }
        units.sort_by_key(|u| u.at);
        units
    }

    /// The disk after a crash in which every unit had this fate.
    pub(super) fn image(&self, fate: &mut dyn FnMut(u64) -> Fate) -> Image {
        let mut image = Image::new();
        self.fill(0, Path::new(""), fate, &mut image);
        image
    }

    fn fill(&self, id: usize, path: &Path, fate: &mut dyn FnMut(u64) -> Fate, image: &mut Image) {
        match &self.nodes[id] {
            Node::File { durable, pending, .. } => {
                let mut content = durable.clone();
                for (at, change) in pending {
                    content.apply(change, &fate(*at));
                }
                image.insert(path.to_owned(), Some(content));
            }
            Node::Folder { durable, pending, .. } => {
                if id != 0 {
                    image.insert(path.to_owned(), None);
                }
                let mut entries = durable.clone();
                for (_, change) in pending.iter().filter(|(at, _)| fate(*at) == Fate::Kept) {
                    enter(&mut entries, change);
                }
                for (name, node) in &entries {
                    self.fill(*node, &path.join(name), fate, image);
                }
            }
        }
    }

    /// A sync of the file fails.
    pub(super) fn fail_sync(&mut self, path: &Path) {
        if let Some(Node::File { pending, doomed, .. }) = self.find(path).and_then(|n| self.nodes.get_mut(n)) {
            *doomed = pending.len();
        }
    }

    /// Whether the page cache shows something of the file that is lost when it forgets it.
    pub(super) fn doomed(&self, path: &Path) -> bool {
        let node = self.find(path).and_then(|n| self.nodes.get(n));
        matches!(node, Some(Node::File { doomed: 1.., .. }))
    }

    /// The file as a process reads it.
    pub(super) fn content(&self, path: &Path) -> Option<Content> {
        let Node::File { durable, pending, .. } = self.nodes.get(self.find(path)?)? else { return None };
        let mut content = durable.clone();
        for (_, change) in pending {
            content.apply(change, &Fate::Kept);
        }
        Some(content)
    }

    /// A bit of a durable file rots; what the process wrote since stays over it.
    pub(super) fn flip(&mut self, path: &Path, offset: u64, bit: u8) {
        if let Some(Node::File { durable, .. }) = self.find(path).and_then(|n| self.nodes.get_mut(n))
            && let Some(byte) = durable.data.get_mut(offset as usize)
        {
            *byte ^= 1 << (bit % 8);
        }
    }
}

fn file(durable: Content) -> Node {
    Node::File { durable, pending: Vec::new(), doomed: 0 }
}

fn folder() -> Node {
    Node::Folder { durable: Entries::new(), now: Entries::new(), pending: Vec::new() }
}

fn settle(node: &mut Node) {
    match node {
        Node::File { durable, pending, doomed } => {
            for (_, change) in pending.drain(*doomed..) {
                durable.apply(&change, &Fate::Kept);
            }
        }
        Node::Folder { durable, pending, .. } => {
            for (_, change) in pending.drain(..) {
                enter(durable, &change);
            }
        }
    }
}

/// Makes `root` hold exactly `image`.
pub(super) fn write_image(root: &Path, image: &Image) -> io::Result<()> {
    for entry in std::fs::read_dir(root)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    for (path, content) in image {
        let path = root.join(path);
        let Some(content) = content else {
            std::fs::create_dir(&path)?;
            continue;
        };
        write_content(&path, content)?;
    }
    Ok(())
}

/// What is in `root`.
#[cfg(test)]
pub(super) fn read_image(root: &Path) -> io::Result<Image> {
    let (mut image, mut folders) = (Image::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            let inside = path.strip_prefix(root).unwrap_or(&path).to_owned();
            if path.is_dir() {
                image.insert(inside, None);
                folders.push(path);
            } else {
                let data = std::fs::read(&path)?;
                let len = data.len() as u64;
                image.insert(inside, Some(Content { data, len }));
            }
        }
    }
    Ok(image)
}

/// Makes the file at `path` hold exactly `content`.
pub(super) fn write_content(path: &Path, content: &Content) -> io::Result<()> {
    let file = std::fs::File::create(path)?;
    file.write_all_at(&content.data, 0)?;
    file.set_len(content.len)
}
