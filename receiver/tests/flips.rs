//! One flipped bit, in every field of every kind of record of a journal: `check` names its file and offset, and nobody is ever given
//! wrong data for it, neither by a node that runs nor after a restart, by no view of any point and by no fork.
//!
//! The store was written by a receiver, over the network. Every position is tried on a fresh copy of it.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use blockdev::{BlockDevice, Buf, IoThreads};
use common::*;
use proto::frame::{EXTENT_BYTES, FRAME_HEADER_BYTES, FRAME_MAGIC};
use proto::{FrameHeader, FrameKind, Point};
use receiver::journal::{self, PLACED_SEAL_BYTES, SEGMENT_HEADER_BYTES, segment_path};
use receiver::superblock::FILE_NAME;
use receiver::{Receiver, Role, check};

const ROOT_BLOCKS: u64 = 48;
const LOGS_BLOCKS: u64 = 8;
const VOLUMES: [(&str, u64); 2] = [("root", ROOT_BLOCKS * BLOCK as u64), ("logs", LOGS_BLOCKS * BLOCK as u64 - 100)];
/// Small enough for some segments.
const SEGMENT_BYTES: u64 = 20_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    SegmentHeader,
    /// Of a data frame, or of one that says which blocks are zero.
    FrameHeader(FrameKind),
    Extents(FrameKind),
    Payload,
    Seal,
}

/// One bit, and the record it belongs to.
struct Flip {
    part: Part,
    field: String,
    segment: u32,
    /// Where the record begins.
    record: u64,
    byte: u64,
    bit: u8,
}

impl std::fmt::Display for Flip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { part, field, segment, record, byte, bit } = self;
        write!(f, "bit {bit} of byte {byte} of segment {segment}: {field} in {part:?} at {record}")
    }
}

/// A store as its receiver left it.
struct Written {
    site: Site,
    images: BTreeMap<Point, Vec<Vec<u8>>>,
    /// Segments by number.
    segments: BTreeMap<u32, Vec<u8>>,
    /// The superblock of before the clean stop, which does not say how far the journal goes.
    killed_superblock: Vec<u8>,
}

async fn written() -> Written {
    let mut site = Site::new(&["a"]);
    site.limits.segment_bytes = SEGMENT_BYTES;
    let receiver = site.start().await;
    let mut primary = Primary::open(site.connect(&receiver, 0).await, hello("db", &VOLUMES)).await;
    let logs = |start, blocks, seed| Change::Data { volume: 1, start, blocks, seed };
    // Even seeds do not compress.
    primary.commit(vec![data(0, 8, 2), data(20, 4, 1), zero(40, 4)]).await;
    primary.commit(vec![data(8, 4, 3), logs(0, 2, 4), logs(7, 1, 5)]).await;
    let point = primary.send(&[vec![data(2, 3, 6), data(30, 6, 7)], vec![zero(5, 2), data(3, 1, 9)]]).await;
    primary.committed(point).await;
    primary.commit(vec![data(10, 2, 8), zero(31, 1), logs(1, 1, 10)]).await;
    primary.commit(vec![zero(32, 1)]).await;
    primary.commit(vec![data(44, 2, 11), zero(0, 1)]).await;
    let images = primary.images.clone();
    let killed_superblock = std::fs::read(site.store().join("a/db").join(FILE_NAME)).unwrap();
    receiver.shutdown().await;
    let folder = site.store().join("a/db/journal");
    let read = |number| Some((number, std::fs::read(segment_path(&folder, number)).ok()?));
    let segments: BTreeMap<u32, Vec<u8>> = (1..).map_while(read).collect();
    assert!(segments.len() >= 3, "{} segments", segments.len());
    Written { site, images, segments, killed_superblock }
}

impl Written {
    /// A fresh copy of the store, with this bit flipped if it is to be so.
    fn copy(&self, to: &Path, killed: bool) {
        copy_folder(&self.site.store(), to);
        if killed {
            std::fs::write(to.join("a/db").join(FILE_NAME), &self.killed_superblock).unwrap();
        }
    }

    async fn start(&self, store: &Path) -> Receiver {
        let config = receiver::ReceiverConfig { store: store.to_owned(), ..self.site.config() };
        Receiver::start(config, self.site.identity.clone()).await.unwrap()
    }

    fn last_segment(&self) -> u32 {
        *self.segments.last_key_value().unwrap().0
    }

    fn newest(&self) -> Point {
        *self.images.last_key_value().unwrap().0
    }

    /// Where the last epoch begins, and its seal.
    fn last_epoch(&self) -> ((u32, u64), (u32, u64)) {
        let seals: Vec<_> = self.flips().into_iter().filter(|f| f.part == Part::Seal).map(|f| (f.segment, f.record)).collect();
        let last = *seals.last().unwrap();
        let before = *seals.iter().rev().find(|s| **s != last).unwrap();
        ((before.0, before.1 + PLACED_SEAL_BYTES as u64), last)
    }

    /// Every field of every record: a bit of its first byte or one of its last.
    fn flips(&self) -> Vec<Flip> {
        let mut flips = Vec::new();
        for (segment, bytes) in &self.segments {
            let mut add = |part, record: usize, fields: &[(usize, usize, &str)]| {
                for (offset, length, field) in fields {
                    let at = if flips.len().is_multiple_of(2) { *offset } else { offset + length - 1 };
                    let (byte, bit) = ((record + at) as u64, (flips.len() % 8) as u8);
                    flips.push(Flip { part, field: (*field).to_owned(), segment: *segment, record: record as u64, byte, bit });
                }
            };
            add(Part::SegmentHeader, 0, journal::layout::SEGMENT);
            let mut at = SEGMENT_HEADER_BYTES;
            while at < bytes.len() {
                if !bytes[at..].starts_with(&FRAME_MAGIC) {
                    add(Part::Seal, at, proto::seal::layout::SEAL);
                    add(Part::Seal, at, &journal::layout::PLACED_SEAL[1..]);
                    at += PLACED_SEAL_BYTES;
                    continue;
                }
                let header = FrameHeader::decode(bytes[at..].first_chunk().unwrap()).unwrap();
                add(Part::FrameHeader(header.kind), at, proto::frame::layout::FRAME);
                for extent in 0..usize::from(header.extents) {
                    let table = FRAME_HEADER_BYTES + extent * EXTENT_BYTES;
                    let fields = proto::frame::layout::EXTENT.iter().map(|(o, b, f)| (table + o, *b, *f));
                    add(Part::Extents(header.kind), at, &fields.collect::<Vec<_>>());
                }
                let (payload, length) = (FRAME_HEADER_BYTES + header.table_bytes(), header.payload_bytes as usize);
                if length > 0 {
                    let places = [payload, payload + length / 2, payload + length - 1];
                    add(Part::Payload, at, &places.map(|place| (place, 1, "payload")));
                }
                at += header.frame_bytes();
            }
        }
        flips
    }

    fn flip(&self, store: &Path, flip: &Flip) {
        let mut bytes = self.segments[&flip.segment].clone();
        bytes[flip.byte as usize] ^= 1 << flip.bit;
        std::fs::write(self.path(store, flip), &bytes).unwrap();
    }

    fn path(&self, store: &Path, flip: &Flip) -> PathBuf {
        segment_path(&store.join("a/db/journal"), flip.segment)
    }

    /// How a line begins that names the flip's record.
    fn place(&self, store: &Path, flip: &Flip) -> String {
        format!("{}: at offset {}: ", self.path(store, flip).display(), flip.record)
    }

    /// The same, of a frame that is read.
    fn frame_place(&self, store: &Path, flip: &Flip) -> String {
        format!("{}: the frame at offset {} is damaged", self.path(store, flip).display(), flip.record)
    }
}

/// In memory, if there is such a place: what the disk does is not what is looked at.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if path.is_dir() { copy_folder(&path, &to) } else { std::fs::copy(&path, &to).map(drop).unwrap() }
    }
}

/// What the views of a point gave: blocks that are right, and the errors of the others.
#[derive(Debug, Default)]
struct Given {
    right: usize,
    errors: Vec<String>,
}

/// Reads a device block by block. Wrong data is the end of the test.
async fn read_blocks(io: &IoThreads, device: Arc<dyn BlockDevice>, image: &[u8], what: &str) -> Given {
    let blocks = io.call(move || async move {
        let mut blocks = Vec::new();
        for at in (0..device.size()).step_by(BLOCK) {
            let length = (device.size() - at).min(BLOCK as u64) as usize;
            // Both ways in which an export reads.
            let mut buf = vec![0; length];
            let tried = device.try_read(at, &mut buf).map(|done| done.map(|()| buf.clone()));
            let read = device.read(at, Buf::zeroed(length)).await.map(|buf| buf.to_vec());
            blocks.push((tried, read));
        }
        blocks
    });
    let mut given = Given::default();
    for (number, (tried, read)) in blocks.await.unwrap().into_iter().enumerate() {
        let wanted = &image[number * BLOCK..((number + 1) * BLOCK).min(image.len())];
        for read in tried.into_iter().chain([read]) {
            match read {
                Ok(content) => {
                    assert!(content == wanted, "{what}: block {number} is wrong");
                    given.right += 1;
                }
                Err(error) => given.errors.push(error.to_string()),
            }
        }
    }
    given
}

/// Reads every view of every point there is. A point that cannot be viewed is an error as well.
async fn read_views(written: &Written, io: &IoThreads, receiver: &Receiver, what: &str) -> BTreeMap<Point, Given> {
    let mut all = BTreeMap::new();
    for info in receiver.points("db").unwrap() {
        let given: &mut Given = all.entry(info.point).or_default();
        match receiver.view("db", Some(info.point)).await {
            Ok((_, views)) => {
                for ((name, view), image) in views.into_iter().zip(&written.images[&info.point]) {
                    let what = format!("{what}: volume {name} at {}", info.point);
                    let part = read_blocks(io, Arc::new(view), image, &what).await;
                    given.right += part.right;
                    given.errors.extend(part.errors);
                }
            }
            Err(error) => given.errors.push(error.to_string()),
        }
    }
    all
}

/// Every error line of this process.
fn log() -> &'static Mutex<Vec<String>> {
    static LOG: OnceLock<Mutex<Vec<String>>> = OnceLock::new();
    LOG.get_or_init(|| {
        tracing::subscriber::set_global_default(Collector).unwrap();
        Mutex::default()
    })
}

fn is_logged(begin: &str) -> bool {
    log().lock().unwrap().iter().any(|line| line.starts_with(begin))
}

struct Collector;

impl tracing::Subscriber for Collector {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::ERROR
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Message;
        impl tracing::field::Visit for Message {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                if field.name() == "message" {
                    log().lock().unwrap().push(format!("{value:?}"));
                }
            }
        }
        event.record(&mut Message);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

/// The bit flips while nobody looks, after a clean stop: `check` names its record; the next start refuses the group with file and
/// offset, or gives everything but the blocks of that frame, and errors with file and offset for those.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bit_that_flips_at_rest_is_named_and_never_served() {
    let (written, io, dir) = (written().await, IoThreads::new(1).unwrap(), folder());
    log();
    let (mut refused, mut served) = (0, 0);
    for (number, flip) in written.flips().iter().enumerate() {
        let store = dir.path().join(number.to_string());
        written.copy(&store, false);
        written.flip(&store, flip);
        let report = check::check(&store, &mut |_| ()).unwrap();
        let found: Vec<String> = report.groups[0].findings.iter().map(ToString::to_string).collect();
        let place = written.place(&store, flip);
        assert!(found.iter().any(|f| f.starts_with(&place)), "{flip}: {place} is not in {found:#?}");

        let receiver = written.start(&store).await;
        let status = receiver.status().remove(0);
        let is_opened = flip.part == Part::Payload && flip.segment < written.last_segment();
        assert_eq!(status.role != Role::Broken, is_opened, "{flip}: {:?}", status.last_error);
        if is_opened {
            served += 1;
            let frame = written.frame_place(&store, flip);
            let given = read_views(&written, &io, &receiver, &format!("{flip}")).await;
            assert!(given.keys().eq(written.images.keys()), "{flip}: all points are there");
            let errors: Vec<_> = given.values().flat_map(|g| &g.errors).collect();
            assert!(!errors.is_empty() && errors.iter().all(|e| e.starts_with(&frame)), "{flip}: {errors:#?}");
            assert!(given.values().all(|g| g.right > 0), "{flip}: the other blocks are served");
            assert!(is_logged(&frame), "{flip}: {frame} is not in the log");
            fork_of(&written, &io, &receiver, flip, &frame).await;
        } else {
            refused += 1;
            let error = status.last_error.unwrap();
            // Without the last seal the journal is as good as a shorter one: the point that is missing is named.
            let lost =
                format!("it ends at point 1.{}, and point {} was committed", written.newest().epoch.0 - 1, written.newest());
            let is_last_seal = (flip.segment, flip.record) == written.last_epoch().1;
            assert!(error.starts_with(&place) || (is_last_seal && error.contains(&lost)), "{flip}: {error}");
            assert!(error.contains("run `twinsite check`"), "{flip}: {error}");
            assert!(receiver.view("db", None).await.is_err() && receiver.failover("db", None).await.is_err(), "{flip}");
        }
        receiver.shutdown().await;
        let is = std::fs::read(written.path(&store, flip)).unwrap();
        assert!(is.len() == written.segments[&flip.segment].len(), "{flip}: what is damaged is left as it is");
        std::fs::remove_dir_all(&store).unwrap();
    }
    println!("bits flipped: {}; groups refused: {refused}; groups that serve all else: {served}", refused + served);
    assert!(refused > 200 && served > 10, "the table shrank: {refused} and {served}");
}

/// An activated copy: its guest gets errors for the damaged blocks, cannot make good ones of them by writing a part, and can by
/// writing the whole.
async fn fork_of(written: &Written, io: &IoThreads, receiver: &Receiver, flip: &Flip, frame: &str) {
    // The newest point at which a block of that frame is still to be seen.
    let mut seen = None;
    for info in receiver.points("db").unwrap() {
        let (_, views) = receiver.view("db", Some(info.point)).await.unwrap();
        for (volume, (_, view)) in views.into_iter().enumerate() {
            let view: Arc<dyn BlockDevice> = Arc::new(view);
            let bad = io.call(move || async move {
                for at in (0..view.size()).step_by(BLOCK) {
                    if view.read(at, Buf::zeroed(1)).await.is_err() {
                        return Some(at);
                    }
                }
                None
            });
            if let Some(at) = bad.await.unwrap() {
                seen = Some((info.point, volume, at));
            }
        }
    }
    let (point, volume, at) = seen.unwrap_or_else(|| panic!("{flip}: no point shows it"));
    let active = receiver.failover("db", Some(point)).await.unwrap();
    for ((name, device), image) in active.volumes.iter().zip(&written.images[&point]) {
        let given = read_blocks(io, Arc::clone(device), image, &format!("{flip}: fork of {name} at {point}")).await;
        assert!(given.errors.iter().all(|e| e.starts_with(frame)), "{flip}: {given:#?}");
    }
    let device = Arc::clone(&active.volumes[volume].1);
    let length = (device.size() - at).min(BLOCK as u64) as usize;
    let outcome = io.call(move || async move {
        let part = device.write(at, Buf::copy_of(&[1; 10])).await.map(drop);
        let after_part = device.read(at, Buf::zeroed(length)).await.map(drop);
        let whole = device.write(at, Buf::copy_of(&vec![9; length])).await.map(drop);
        let after_whole = device.read(at, Buf::zeroed(length)).await.map(|buf| buf.to_vec());
        (part, after_part, whole, after_whole)
    });
    let (part, after_part, whole, after_whole) = outcome.await.unwrap();
    for error in [part.unwrap_err(), after_part.unwrap_err()] {
        assert!(error.to_string().starts_with(frame), "{flip}: {error}");
    }
    whole.unwrap();
    assert!(after_whole.unwrap() == vec![9; length], "{flip}");
}

/// The bit flips after a kill, when nobody knows which commit was the last: only the last one can be taken for a torn one, and
/// whatever else is there is right.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bit_that_flips_after_a_kill_costs_the_last_commit_at_most() {
    let (written, io, dir) = (written().await, IoThreads::new(1).unwrap(), folder());
    log();
    let (begin, last_seal) = written.last_epoch();
    let all: Vec<Point> = written.images.keys().copied().collect();
    let in_last = |f: &&Flip| f.segment == written.last_segment();
    let (mut dropped, mut refused) = (0, 0);
    for (number, flip) in written.flips().iter().filter(in_last).enumerate() {
        let store = dir.path().join(number.to_string());
        written.copy(&store, true);
        written.flip(&store, flip);
        let group = check::check(&store, &mut |_| ()).unwrap().groups.remove(0);
        let place = written.place(&store, flip);
        let is_last_seal = (flip.segment, flip.record) == last_seal;
        if is_last_seal {
            // As a crash leaves it: the end of an epoch that was arriving.
            assert!(group.findings.is_empty() && group.unsealed_bytes > 0, "{flip}: {group:#?}");
        } else {
            assert!(group.findings.iter().any(|f| f.to_string().starts_with(&place)), "{flip}: {group:#?}");
        }
        let receiver = written.start(&store).await;
        let status = receiver.status().remove(0);
        let is_torn = (flip.segment, flip.record) >= begin;
        assert_eq!(status.role != Role::Broken, is_torn, "{flip}: {:?}", status.last_error);
        if is_torn {
            dropped += 1;
            let given = read_views(&written, &io, &receiver, &format!("{flip}")).await;
            assert!(given.keys().eq(&all[..all.len() - 1]), "{flip}: {:?}", given.keys());
            assert!(given.values().all(|g| g.errors.is_empty()), "{flip}: {given:#?}");
        } else {
            refused += 1;
            assert!(status.last_error.as_ref().unwrap().starts_with(&place), "{flip}: {:?}", status.last_error);
        }
        receiver.shutdown().await;
        std::fs::remove_dir_all(&store).unwrap();
    }
    println!("bits flipped: {}; groups refused: {refused}; last commits dropped: {dropped}", refused + dropped);
    assert!(dropped > 20 && refused > 20, "the table shrank: {dropped} and {refused}");
}

/// The bit flips under a node that runs: what is read from then on is right, or an error with file and offset, in the log too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bit_that_flips_under_a_running_node_is_never_served() {
    let (written, io, dir) = (written().await, IoThreads::new(1).unwrap(), folder());
    log();
    let newest = written.newest();
    let (mut harmless, mut errors_total) = (0, 0);
    for (number, flip) in written.flips().iter().enumerate() {
        let store = dir.path().join(number.to_string());
        written.copy(&store, false);
        let receiver = written.start(&store).await;
        written.flip(&store, flip);
        let given = read_views(&written, &io, &receiver, &format!("{flip}")).await;
        assert!(given.keys().eq(written.images.keys()), "{flip}: all points are known");
        let (place, frame) = (written.place(&store, flip), written.frame_place(&store, flip));
        for (point, given) in &given {
            let is_named = |e: &String| e.starts_with(&place) || e.starts_with(&frame);
            assert!(given.errors.iter().all(is_named), "{flip}: at {point}: {:#?}", given.errors);
            assert!(*point != newest || given.right > 0, "{flip}: the newest point needs no walk of the journal");
        }
        let read_errors = given.values().flat_map(|g| &g.errors).filter(|e| e.starts_with(&frame)).count();
        assert!(read_errors == 0 || is_logged(&frame), "{flip}: {frame} is not in the log");
        let errors = given.values().map(|g| g.errors.len()).sum::<usize>();
        // Every point but the newest is found by a walk, which meets every record but payloads and those of the last epoch.
        let is_walked = flip.part != Part::Payload && (flip.segment, flip.record) < written.last_epoch().0;
        let is_data = matches!(flip.part, Part::Payload | Part::FrameHeader(FrameKind::Data) | Part::Extents(FrameKind::Data));
        assert!(errors > 0 || !(is_walked || is_data), "{flip}: nobody notices");
        harmless += usize::from(errors == 0);
        errors_total += errors;
        receiver.shutdown().await;
        std::fs::remove_dir_all(&store).unwrap();
    }
    println!("bits flipped: {}; without an effect on any view: {harmless}; errors: {errors_total}", written.flips().len());
}
