use super::*;

fn block() -> Superblock {
    Superblock {
        group_id: [7; 16],
        owner: "SHA256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".parse().unwrap(),
        generation: Generation(3),
        role: GroupRole::Active,
        base: None,
        base_seal: BaseSeal { cut_unix_us: 7, first_write_unix_us: 6, session: SessionToken([4; 16]) },
        folding: Some(Point { generation: Generation(1), epoch: EpochId(8) }),
        synced: Some(Point { generation: Generation(2), epoch: EpochId(9) }),
        fork: Some(ForkInUse {
            name: "active-3".parse().unwrap(),
            point: Point { generation: Generation(2), epoch: EpochId(9) },
        }),
        first_segment: 1,
        created_unix_us: 5,
        volumes: (0..GROUP_VOLUMES_MAX)
            .map(|i| Volume { name: format!("{i:x>64}").parse().unwrap(), size_bytes: VOLUME_BYTES_MAX })
            .collect(),
    }
}

/// The largest superblock fits its slot and reads back; a flipped bit in any byte is noticed.
#[test]
fn the_largest_slot_reads_back_and_notices_flipped_bits() {
    let bytes = block().encode(11);
    assert_eq!(bytes.len(), SLOT_BYTES);
    assert_eq!(Superblock::decode(&bytes).unwrap(), (11, block()));
    for at in 0..SLOT_BYTES {
        let mut bad = bytes.clone();
        bad[at] ^= 1 << (at % 8);
        assert!(Superblock::decode(&bad).is_err(), "byte {at}");
    }
}

/// Every combination of (first whole?, second whole?, order): exactly the rows of the table, nothing else is believed.
#[test]
fn recovery_is_decided_for_every_combination() {
    let sequences = [None, Some(0), Some(1), Some(2), Some(3), Some(u64::MAX)];
    for first in sequences {
        for second in sequences {
            let expected = match (first, second) {
                (None, None) => Choice::BothBad,
                (Some(_), None) => Choice::First,
                (None, Some(_)) => Choice::Second,
                // Zero follows the highest number.
                (Some(a), Some(b)) => match (i128::from(a) - i128::from(b)).rem_euclid(1 << 64) {
                    1 => Choice::First,
                    n if n == (1 << 64) - 1 => Choice::Second,
                    _ => Choice::Unrelated,
                },
            };
            assert_eq!(choose(first, second), expected, "{first:?} {second:?}");
        }
    }
}

/// Would catch a change that a torn write can undo or mix: every prefix of the bytes of a change leaves the old or the new.
#[test]
fn a_change_torn_anywhere_leaves_the_old_or_the_new() {
    let dir = tempfile::tempdir().unwrap();
    let old = Superblock { generation: Generation(1), fork: None, role: GroupRole::Replica, ..block() };
    let mut file = SuperblockFile::create(&Disk::default(), dir.path(), old.clone()).unwrap();
    let path = dir.path().join(FILE_NAME);
    let before = std::fs::read(&path).unwrap();
    file.write(block()).unwrap();
    let after = std::fs::read(&path).unwrap();
    // The writes of a change in order: first slot (odd sequence), then second.
    let mut seen_new = false;
    for torn in (0..=FILE_BYTES).step_by(64) {
        let mut image = before.clone();
        image[..torn].copy_from_slice(&after[..torn]);
        std::fs::write(&path, &image).unwrap();
        let found = SuperblockFile::open(&Disk::default(), dir.path()).unwrap();
        if *found.get() == block() {
            seen_new = true;
        } else {
            assert_eq!(*found.get(), old, "torn at {torn}");
            assert!(!seen_new, "the old one came back at {torn}");
        }
    }
    assert!(seen_new);
}

/// Would catch a promotion that was answered for after a kill in the middle of it, and that a flipped bit then takes back.
#[test]
fn a_change_that_was_not_finished_is_finished_by_who_opens_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let old = Superblock { generation: Generation(1), fork: None, role: GroupRole::Replica, ..block() };
    let path = dir.path().join(FILE_NAME);
    let mut file = SuperblockFile::create(&Disk::default(), dir.path(), old).unwrap();
    let before = std::fs::read(&path).unwrap();
    file.write(block()).unwrap();
    let after = std::fs::read(&path).unwrap();
    // Killed after the first of its two writes, which is to the first slot; after a part of the second.
    for torn in [SLOT_BYTES, SLOT_BYTES + SLOT_BYTES / 2] {
        for slot in [0, SLOT_BYTES] {
            let mut image = before.clone();
            image[..torn].copy_from_slice(&after[..torn]);
            std::fs::write(&path, &image).unwrap();
            assert_eq!(SuperblockFile::open(&Disk::default(), dir.path()).unwrap().get(), &block());
            let mut image = std::fs::read(&path).unwrap();
            image[slot + 100] ^= 1;
            std::fs::write(&path, &image).unwrap();
            assert_eq!(SuperblockFile::open(&Disk::default(), dir.path()).unwrap().get(), &block(), "{torn} {slot}");
            let slots = SuperblockFile::read(&File::open(&path).unwrap(), &path).unwrap();
            assert_eq!(slots.other, OtherSlot::Same, "{torn} {slot}");
        }
    }
}

/// Slots whose numbers are at their end, alone or both: a change is possible, durable and survives being torn.
#[test]
fn a_change_at_the_highest_sequence_number_is_a_change_like_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE_NAME);
    let old = Superblock { generation: Generation(1), fork: None, role: GroupRole::Replica, ..block() };
    let at = |sequence: u64| if sequence.is_multiple_of(2) { SLOT_BYTES } else { 0 };
    for newest in [u64::MAX - 2, u64::MAX - 1, u64::MAX, 0] {
        for other in [Some(newest.wrapping_sub(1)), None] {
            let mut before = vec![0; FILE_BYTES];
            for sequence in [Some(newest), other].into_iter().flatten() {
                before[at(sequence)..][..SLOT_BYTES].copy_from_slice(&old.encode(sequence));
            }
            std::fs::write(&path, &before).unwrap();
            let mut file = SuperblockFile::open(&Disk::default(), dir.path()).unwrap();
            assert_eq!(*file.get(), old);
            // A slot that is not whole was written anew.
            before = std::fs::read(&path).unwrap();
            let newest = file.sequence;
            assert_eq!(before[at(newest)..][..SLOT_BYTES], old.encode(newest));
            file.write(block()).unwrap();
            assert_eq!(*SuperblockFile::open(&Disk::default(), dir.path()).unwrap().get(), block());
            // Torn in the middle of its first write: the old state, never a mixture.
            let after = std::fs::read(&path).unwrap();
            let first = at(newest.wrapping_add(1));
            let mut torn = before.clone();
            torn[first..][..SLOT_BYTES / 2].copy_from_slice(&after[first..][..SLOT_BYTES / 2]);
            std::fs::write(&path, &torn).unwrap();
            assert_eq!(*SuperblockFile::open(&Disk::default(), dir.path()).unwrap().get(), old, "{newest} {other:?}");
            // Torn between its two writes: the new state.
            before[first..][..SLOT_BYTES].copy_from_slice(&after[first..][..SLOT_BYTES]);
            std::fs::write(&path, &before).unwrap();
            assert_eq!(*SuperblockFile::open(&Disk::default(), dir.path()).unwrap().get(), block(), "{newest} {other:?}");
        }
    }
}

/// A slot that rots after a promotion does not bring the former generation back.
#[test]
fn one_rotten_slot_keeps_the_raised_generation_and_two_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let old = Superblock { generation: Generation(1), fork: None, role: GroupRole::Replica, ..block() };
    let mut file = SuperblockFile::create(&Disk::default(), dir.path(), old).unwrap();
    file.write(block()).unwrap();
    let path = dir.path().join(FILE_NAME);
    let whole = std::fs::read(&path).unwrap();
    for slot in [0, SLOT_BYTES] {
        let mut image = whole.clone();
        image[slot + 100] ^= 1;
        std::fs::write(&path, &image).unwrap();
        assert_eq!(SuperblockFile::open(&Disk::default(), dir.path()).unwrap().get().generation, Generation(3));
        // And it can be changed again.
        let mut again = SuperblockFile::open(&Disk::default(), dir.path()).unwrap();
        again.write(Superblock { generation: Generation(4), ..block() }).unwrap();
        assert_eq!(SuperblockFile::open(&Disk::default(), dir.path()).unwrap().get().generation, Generation(4));
    }
    let mut image = whole;
    image[100] ^= 1;
    image[SLOT_BYTES + 100] ^= 1;
    std::fs::write(&path, &image).unwrap();
    let error = SuperblockFile::open(&Disk::default(), dir.path()).unwrap_err().to_string();
    assert!(error.contains("both slots") && error.contains("superblock: ") && error.contains("offset 8192"), "{error}");
}
