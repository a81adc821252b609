//! Compares what a primary says its disk held at a point with the view of that point.
//!
//! What is read here is read from the disk, whatever decoded frames are in memory: a bit that flipped since is to be found. A run that
//! cannot be read counts as one that differs: the primary has its content and sends it again. Nothing is served or repaired here.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use blockdev::{BlockDevice, Buf, ExtentKind};
use parking_lot::Mutex;
use proto::hashes::{Hash, hash};
use proto::scrub::ScrubRun;
use proto::units::BLOCK_BYTES;
use proto::{Point, Scrub, ScrubOutcome, Scrubbed};

use crate::base::BaseDamage;
use crate::frames::FrameError;
use crate::view::View;

/// What was compared with primaries since the node was started, and what was found to be damaged.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) compared_bytes: AtomicU64,
    pub(crate) differing_bytes: AtomicU64,
    /// Frames that were found to be damaged, or not to be read.
    pub(crate) damaged_frames: AtomicU64,
    /// Blocks of a base that were found to be damaged, by whoever read them.
    pub(crate) damaged_base_blocks: AtomicU64,
    damage: Mutex<Damage>,
}

/// What was said already.
#[derive(Debug, Default)]
struct Damage {
    told: BTreeSet<String>,
    /// Segments with damaged frames.
    segments: BTreeSet<PathBuf>,
    last: Option<String>,
}

/// Damaged frames and blocks that are remembered. When full, all are forgotten, and said again when they are met again.
const TOLD_MAX: usize = 1024;

impl Findings {
    /// Says what cannot be read, file and offset, in the log: once, however many reads meet it.
    pub(crate) fn note(&self, error: &FrameError) {
        let segment = if let FrameError::Damaged { path, .. } = error { Some(path) } else { None };
        self.tell(error.to_string(), segment, &self.damaged_frames);
    }

    /// The same of a block of a base.
    pub(crate) fn note_base(&self, damage: &BaseDamage) {
        self.tell(damage.to_string(), None, &self.damaged_base_blocks);
    }

    fn tell(&self, line: String, segment: Option<&PathBuf>, count: &AtomicU64) {
        let mut damage = self.damage.lock();
        if damage.told.contains(&line) {
            return;
        }
        if damage.told.len() >= TOLD_MAX {
            damage.told.clear();
            damage.segments.clear();
        }
        tracing::error!("{line}");
        damage.told.insert(line.clone());
        damage.segments.extend(segment.cloned());
        damage.last = Some(line);
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether a frame of the segment was found to be damaged.
    pub(crate) fn is_damaged(&self, segment: &Path) -> bool {
        self.damaged_frames.load(Ordering::Relaxed) > 0 && self.damage.lock().segments.contains(segment)
    }

    /// The last damage that was met, with file and offset.
    pub(crate) fn last_damage(&self) -> Option<String> {
        self.damage.lock().last.clone()
    }
}

/// Whether a read failed because the bytes are not what was committed, and not because of the disk.
pub(crate) fn is_damage(error: &io::Error) -> bool {
    error
        .get_ref()
        .is_some_and(|inner| matches!(inner.downcast_ref(), Some(FrameError::Damaged { .. })) || inner.is::<BaseDamage>())
}

/// The comparison of one message.
struct Comparison<'a> {
    view: &'a View,
    scrub: &'a Scrub,
    point: Point,
    differing: Vec<u16>,
    places: Vec<Place>,
}

/// Where the copy is wrong, in bytes, and in which way.
struct Place {
    offset: u64,
    bytes: u64,
    what: String,
}

impl Comparison<'_> {
    /// Offset and length of a run, as far as it is inside of the volume.
    fn range(&self, run: &ScrubRun) -> (u64, usize) {
        let (offset, bytes) = (run.extent.start.0 * BLOCK_BYTES, u64::from(run.extent.blocks) * BLOCK_BYTES);
        (offset, bytes.min(self.view.size().saturating_sub(offset)) as usize)
    }

    fn is_hole(&self, offset: u64, inside: usize) -> bool {
        let extents = self.view.find_extents(offset, inside as u64, 1);
        extents.is_ok_and(|e| e.first().is_some_and(|e| e.kind != ExtentKind::Data && e.length >= inside as u64))
    }

    /// Takes the hash of the next run, or why it has none.
    fn take(&mut self, number: usize, run: &ScrubRun, found: io::Result<Hash>) {
        let shared = self.view.shared();
        let bytes = u64::from(run.extent.blocks) * BLOCK_BYTES;
        shared.findings.compared_bytes.fetch_add(bytes, Ordering::Relaxed);
        let what = match found {
            Ok(hash) if hash == run.hash => return,
            Ok(_) => "differ from the primary".to_owned(),
            Err(error) => format!("cannot be read ({error})"),
        };
        shared.findings.differing_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.differing.push(number as u16);
        let offset = run.extent.start.0 * BLOCK_BYTES;
        match self.places.last_mut() {
            Some(last) if last.offset + last.bytes == offset && last.what == what => last.bytes += bytes,
            _ => self.places.push(Place { offset, bytes, what }),
        }
    }

    /// Says what differs, a line for each stretch of a disk.
    fn tell(&self) {
        let (folder, disk, point) = (&self.view.shared().folder, self.view.name(), self.point);
        let (client, group) = (&folder.client, &folder.group);
        for Place { offset, bytes, what } in &self.places {
            tracing::warn!(
                "{client}/{group}: disk {disk}: {bytes} bytes at offset {offset} {what} at point {point}; the primary sends them again"
            );
        }
    }

    fn done(self) -> Scrubbed {
        self.tell();
        Scrubbed { id: self.scrub.id, outcome: ScrubOutcome::Compared { differing: self.differing } }
    }
}

/// The hash of a run of zeroes; computed anew only if its length is not that of the run before.
#[derive(Default)]
struct Zeroes(Option<(u32, Hash)>);

impl Zeroes {
    fn hash(&mut self, blocks: u32) -> Hash {
        match self.0 {
            Some((of, hash)) if of == blocks => hash,
            _ => {
                let hash = hash(&Buf::zeroed(blocks as usize * BLOCK_BYTES as usize));
                self.0 = Some((blocks, hash));
                hash
            }
        }
    }
}

/// Compares with a view of `point`, which reads from the disk.
pub(crate) async fn compare(view: &View, scrub: &Scrub, point: Point) -> Scrubbed {
    let mut comparison = Comparison { view, scrub, point, differing: Vec::new(), places: Vec::new() };
    let mut zeroes = Zeroes::default();
    for (number, run) in scrub.runs.iter().enumerate() {
        let (offset, inside) = comparison.range(run);
        let found = if comparison.is_hole(offset, inside) {
            Ok(zeroes.hash(run.extent.blocks))
        } else {
            view.read(offset, Buf::zeroed(inside)).await.map(|mut content| {
                // What lies between the volume's end and its last block's was allocated zeroed and never written.
                content.set_len(run.extent.blocks as usize * BLOCK_BYTES as usize);
                hash(&content)
            })
        };
        comparison.take(number, run, found);
    }
    comparison.done()
}

/// As [`compare`], on this thread, which waits for the disk.
#[cfg(any(test, feature = "simulation"))]
pub(crate) fn compare_now(view: &View, scrub: &Scrub, point: Point) -> Scrubbed {
    let mut comparison = Comparison { view, scrub, point, differing: Vec::new(), places: Vec::new() };
    for (number, run) in scrub.runs.iter().enumerate() {
        let (offset, inside) = comparison.range(run);
        let mut content = vec![0; run.extent.blocks as usize * BLOCK_BYTES as usize];
        let found = view.read_now(offset, content.get_mut(..inside).unwrap_or_default()).map(|()| hash(&content));
        comparison.take(number, run, found);
    }
    comparison.done()
}
