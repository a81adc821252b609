//! `check` beside a start: what a start refuses is found, at the same file and offset; what a start accepts is found good.

use proto::fencing::GroupRole;
use proto::frame::EXTENT_BYTES;

use super::*;
use crate::check::{self, GroupReport};
use crate::store::Store;
use crate::superblock::{Superblock, Volume};

/// Every frame begins a segment of its own.
const SEGMENT_BYTES: u64 = 100;
const HEADER: u64 = SEGMENT_HEADER_BYTES as u64;
/// Segments 1 to 6 hold three epochs of two frames each, their seals in 2, 4 and 6.
const LAST_SEAL: u32 = 6;
/// Segments 7 to 9 hold the frames of an epoch that was arriving.
const LAST: u32 = 9;
/// A byte of the payload of the frame in a segment.
const IN_PAYLOAD: u64 = HEADER + (FRAME_HEADER_BYTES + EXTENT_BYTES) as u64 + 8;

/// A store with one group and that journal.
struct Scene {
    dir: tempfile::TempDir,
    journal: PathBuf,
    synced: Option<Point>,
}

impl Scene {
    fn new(synced_epoch: Option<u64>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let synced = synced_epoch.map(|epoch| Point { generation: Generation(1), epoch: EpochId(epoch) });
        let block = Superblock {
            group_id: expected().group_id,
            owner: "SHA256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".parse().unwrap(),
            generation: Generation(1),
            role: GroupRole::Replica,
            base: None,
            base_seal: Default::default(),
            folding: None,
            synced,
            fork: None,
            first_segment: FIRST_SEGMENT,
            created_unix_us: 0,
            volumes: vec![Volume { name: "root".parse().unwrap(), size_bytes: BLOCKS * 4096 }],
        };
        let store = Store::open(dir.path()).unwrap();
        let journal = store.create_group(&"a".parse().unwrap(), &"db".parse().unwrap(), block).unwrap().journal();
        let (mut open, _) = open_at(&journal, options(SEGMENT_BYTES), None).unwrap();
        for epoch in 1..=3 {
            assert_eq!(write_epoch(&mut open, epoch, 2).unwrap().segment, 2 * epoch as u32);
        }
        for frame in frames(4, 3) {
            open.append(&frame).unwrap();
        }
        assert_eq!(list_segments(&journal).unwrap(), (1..=LAST).collect::<Vec<_>>());
        Self { dir, journal, synced }
    }

    fn path(&self, segment: u32) -> PathBuf {
        segment_path(&self.journal, segment)
    }

    fn change(&self, segment: u32, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = std::fs::read(self.path(segment)).unwrap();
        change(&mut bytes);
        std::fs::write(self.path(segment), bytes).unwrap();
    }

    fn flip(&self, segment: u32, offset: u64) {
        self.change(segment, |bytes| bytes[offset as usize] ^= 1);
    }

    fn remove(&self, segments: impl IntoIterator<Item = u32>) {
        segments.into_iter().for_each(|number| std::fs::remove_file(self.path(number)).unwrap());
    }

    fn seal_at(&self, segment: u32) -> u64 {
        std::fs::metadata(self.path(segment)).unwrap().len() - PLACED_SEAL_BYTES as u64
    }

    fn check(&self) -> GroupReport {
        check::check(self.dir.path(), &mut |_| ()).unwrap().groups.pop().unwrap()
    }

    fn start(&self) -> Result<Found, JournalError> {
        open_at(&self.journal, options(SEGMENT_BYTES), self.synced).map(|(_, found)| found)
    }
}

type Damage = fn(&Scene) -> (u32, u64);

/// Damage that a start refuses, the epoch that is known to be synced, and where the damage is found: segment and offset.
const REFUSED: &[(&str, Option<u64>, Damage)] = &[
    ("a segment of the unsealed end is missing", None, |s| {
        s.remove([8]);
        (8, 0)
    }),
    ("a segment of a committed epoch is missing", None, |s| {
        s.remove([3]);
        (3, 0)
    }),
    ("the segment of the last seal is missing", None, |s| {
        s.remove([LAST_SEAL]);
        (LAST_SEAL, 0)
    }),
    ("the first segment is missing, and no seal follows", None, |s| {
        s.remove(1..LAST);
        (1, 0)
    }),
    ("the last segment is of another group", None, |s| {
        s.change(LAST, |bytes| {
            let header = SegmentHeader::decode(&bytes[..SEGMENT_HEADER_BYTES]).unwrap();
            bytes[..SEGMENT_HEADER_BYTES].copy_from_slice(&SegmentHeader { group_id: [6; 16], ..header }.encode());
        });
        (LAST, 0)
    }),
    ("the last segment has the number of another", None, |s| {
        std::fs::copy(s.path(8), s.path(LAST)).unwrap();
        (LAST, 0)
    }),
    ("a frame of the unsealed end is bad, and another segment follows", None, |s| {
        s.flip(7, HEADER);
        (7, HEADER)
    }),
    ("a header of the unsealed end is bad, and another segment follows", None, |s| {
        s.flip(8, 0);
        (8, 0)
    }),
    ("a segment of the unsealed end is shorter than it was", None, |s| {
        s.change(8, |bytes| bytes.truncate(bytes.len() - 1));
        (8, HEADER)
    }),
    ("the last seal is bad, and another segment follows", None, |s| {
        let at = s.seal_at(LAST_SEAL);
        s.flip(LAST_SEAL, at + 1);
        (LAST_SEAL, at)
    }),
    ("a payload is bad, and all segments after it are unsealed", None, |s| {
        s.flip(LAST_SEAL, IN_PAYLOAD);
        (LAST_SEAL, HEADER)
    }),
    ("a payload is bad, and the segment after it is half-begun", None, |s| {
        s.remove(7..=LAST);
        s.flip(LAST_SEAL, IN_PAYLOAD);
        std::fs::write(s.path(7), [0; 30]).unwrap();
        (LAST_SEAL, HEADER)
    }),
    ("a segment cannot be read", None, |s| {
        s.remove([8]);
        std::fs::create_dir(s.path(8)).unwrap();
        (8, 0)
    }),
    ("the journal ends before the synced point, between two segments", Some(3), |s| {
        s.remove(5..=LAST);
        (4, s.seal_at(4) + PLACED_SEAL_BYTES as u64)
    }),
    ("the journal ends before the synced point, in a segment", Some(3), |s| {
        s.remove(7..=LAST);
        s.change(LAST_SEAL, |bytes| bytes.truncate(bytes.len() - PLACED_SEAL_BYTES));
        (4, s.seal_at(4) + PLACED_SEAL_BYTES as u64)
    }),
    ("the seal of the synced point is bad, and nothing follows", Some(3), |s| {
        s.remove(7..=LAST);
        let at = s.seal_at(LAST_SEAL);
        s.flip(LAST_SEAL, at + 1);
        (LAST_SEAL, at)
    }),
    ("a payload of the synced point is bad, and nothing follows", Some(3), |s| {
        s.remove(7..=LAST);
        s.flip(LAST_SEAL, IN_PAYLOAD);
        (LAST_SEAL, HEADER)
    }),
];

type Crash = fn(&Scene);

/// What a crash leaves, and the epoch that is known to be synced. A start finds all three epochs.
const ACCEPTED: &[(&str, Option<u64>, Crash)] = &[
    ("frames without a seal", None, |_| ()),
    ("frames without a seal after the synced point", Some(3), |_| ()),
    ("a synced point that more follow", Some(2), |s| s.remove(7..=LAST)),
    ("a half-begun segment", None, |s| std::fs::write(s.path(LAST + 1), [0; 30]).unwrap()),
    ("a half-begun segment after a seal", Some(3), |s| {
        s.remove(7..=LAST);
        std::fs::write(s.path(7), []).unwrap();
    }),
    ("a bad frame in the last segment, no seal after it", Some(3), |s| s.flip(LAST, HEADER)),
    ("a bad payload in the last segment, no seal after it", Some(3), |s| {
        s.remove([LAST]);
        s.flip(8, IN_PAYLOAD);
    }),
    ("half of a frame", None, |s| s.change(LAST, |bytes| bytes.truncate(bytes.len() - 10))),
];

/// Would catch a `check` that finds a store good which the next start refuses, and a start that drops what it should refuse.
#[test]
fn what_a_start_refuses_is_found_at_its_place() {
    for (what, synced, damage) in REFUSED {
        let scene = Scene::new(*synced);
        let (segment, offset) = damage(&scene);
        let report = scene.check();
        let error = scene.start().map(drop).expect_err(what).to_string();
        let place = format!("{}: at offset {offset}", scene.path(segment).display());
        let found: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
        assert!(found.iter().any(|f| f.starts_with(&place) && !f.contains('\n')), "{what}: {place} is not in {found:#?}");
        assert!(error.starts_with(&place) || synced.is_some(), "{what}: {error}");
        assert_eq!(report.unsealed_bytes, 0, "{what}: nothing is cut off from a refused journal");
        // Asked again, after whatever the first start did.
        let again = scene.start().map(drop).expect_err(what).to_string();
        assert_eq!(again, error, "{what}");
    }
}

/// Would catch a `check` that cries damage over what every crash leaves.
#[test]
fn what_a_crash_leaves_is_found_good() {
    for (what, synced, crash) in ACCEPTED {
        let scene = Scene::new(*synced);
        crash(&scene);
        let before = image(&scene.journal);
        let report = scene.check();
        assert_eq!(report.findings, [], "{what}");
        assert_eq!(image(&scene.journal), before, "{what}: check changes nothing");
        let found = scene.start().unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(found.epochs, [(1, 2), (2, 2), (3, 2)], "{what}");
        let bytes = |image: &[(PathBuf, Vec<u8>)]| image.iter().map(|(_, b)| b.len() as u64).sum::<u64>();
        assert_eq!(report.unsealed_bytes, bytes(&before) - bytes(&image(&scene.journal)), "{what}: what is cut off is told");
        let again = scene.start().unwrap_or_else(|error| panic!("{what}, the second time: {error}"));
        assert_eq!((again.epochs, scene.check().findings), (found.epochs, vec![]), "{what}");
    }
}
