//! Changes of a superblock, one of them perhaps torn, then damage: what opens is a state that was written, whole, and the newest one
//! unless that is damaged. With mended checksums anything may open, and then it must read back.

use std::path::Path;

use proto::fencing::GroupRole;
use proto::fuzzing::Choices;
use proto::units::{GROUP_VOLUMES_MAX, VOLUME_BYTES_MAX};
use proto::{EpochId, Generation, Point, SessionToken};

use super::{CHANGES_MAX, damage, mend};
use crate::disk::Disk;
use crate::superblock::{
    BaseSeal, FILE_BYTES, FILE_NAME, ForkInUse, OtherSlot, SLOT_BYTES, Superblock, SuperblockError, SuperblockFile, Volume,
};

/// A slot as it was written, its sequence number, and what it says.
type Written = (Vec<u8>, u64, Superblock);

/// Damage to a superblock.
pub fn superblock(scratch: &Path, data: &[u8]) {
    let mut choices = Choices::new(data);
    let (mut bytes, written) = write_some(scratch, &mut choices);
    let mut mended = false;
    for _ in 0..CHANGES_MAX {
        if choices.is_empty() {
            break;
        }
        let at = place(&mut choices);
        damage(&mut bytes, at, &mut choices);
        if choices.u8() % 4 == 3 {
            mended = true;
            bytes.chunks_exact_mut(SLOT_BYTES).for_each(mend);
        }
    }
    let path = scratch.join(FILE_NAME);
    std::fs::write(&path, &bytes).unwrap();
    let opened = SuperblockFile::open(&Disk::default(), scratch);
    let left = std::fs::read(&path).unwrap();
    match &opened {
        Ok(file) => {
            let slots = SuperblockFile::read(&std::fs::File::open(&path).unwrap(), &path).unwrap();
            assert_eq!((&slots.block, slots.other), (file.get(), OtherSlot::Same), "both slots say what is believed");
            let kept = |slot: usize| left.get(slot..slot + SLOT_BYTES) == bytes.get(slot..slot + SLOT_BYTES);
            assert!(kept(0) || kept(SLOT_BYTES), "the slot that holds is left alone");
        }
        Err(_) => assert_eq!(left, bytes, "what is refused is left alone"),
    }
    if mended {
        if let Ok(file) = opened {
            reads_back(scratch, file);
        }
        return;
    }
    let slot = |n: usize| {
        let bytes = bytes.get(n * SLOT_BYTES..(n + 1) * SLOT_BYTES)?;
        written.iter().find(|(whole, ..)| whole == bytes)
    };
    let due = match (slot(0), slot(1)) {
        (Some(first), Some(second)) if first.1.abs_diff(second.1) == 1 => Some(if first.1 > second.1 { first } else { second }),
        (Some(_), Some(_)) | (None, None) => None,
        (Some(one), None) | (None, Some(one)) => Some(one),
    };
    match (opened, due) {
        (Ok(file), Some((_, _, block))) => assert_eq!(file.get(), block),
        (Ok(file), None) => panic!("{:?} is believed", file.get()),
        (Err(error), None) => {
            let said = error.to_string();
            assert!(said.starts_with(&path.display().to_string()) && !said.contains('\n'), "{said}");
            assert!(matches!(error, SuperblockError::BothBad { .. } | SuperblockError::Sequence { .. }));
        }
        (Err(error), Some(_)) => panic!("refused although a slot is whole: {error}"),
    }
}

/// A place in a slot, more often where the fields are.
fn place(choices: &mut Choices<'_>) -> usize {
    let slot = choices.u8();
    let at = if slot & 2 == 0 { choices.below(256) } else { choices.below(FILE_BYTES) };
    usize::from(slot & 1) * SLOT_BYTES + at
}

/// One to three states written one after the other; of the last change perhaps only sectors of the first slot are there.
fn write_some(scratch: &Path, choices: &mut Choices<'_>) -> (Vec<u8>, Vec<Written>) {
    let path = scratch.join(FILE_NAME);
    let _ = std::fs::remove_file(&path);
    let first = block(choices);
    let mut file = SuperblockFile::create(&Disk::default(), scratch, first.clone()).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let mut written = Vec::new();
    let mut keep = |bytes: &[u8], sequence: u64, block: &Superblock| {
        written.push((bytes[..SLOT_BYTES].to_vec(), sequence, block.clone()));
        written.push((bytes[SLOT_BYTES..].to_vec(), sequence + 1, block.clone()));
    };
    keep(&bytes, 1, &first);
    for change in 1..=choices.below(3) as u64 {
        let next = block(choices);
        file.write(next.clone()).unwrap();
        let after = std::fs::read(&path).unwrap();
        keep(&after, 1 + 2 * change, &next);
        let sectors = choices.u16();
        if sectors == 0 {
            bytes = after;
            continue;
        }
        // Power went during the first write: some of its sectors are there, and the other slot is as it was.
        for sector in (0..SLOT_BYTES / 512).filter(|sector| sectors & (1 << sector) != 0) {
            let range = sector * 512..(sector + 1) * 512;
            bytes[range.clone()].copy_from_slice(&after[range]);
        }
        break;
    }
    (bytes, written)
}

fn block(choices: &mut Choices<'_>) -> Superblock {
    let has = choices.u8();
    let mut point = |bit: u8| {
        let point = Point { generation: Generation(choices.u8().into()), epoch: EpochId(choices.u16().into()) };
        (has & (1 << bit) != 0).then_some(point)
    };
    let (base, synced, fork) = (point(0), point(1), point(2));
    let folding = (has & 32 != 0).then_some(()).and(base);
    let volumes = if has & 8 == 0 { 1 + choices.below(4) } else { GROUP_VOLUMES_MAX };
    Superblock {
        group_id: [choices.u8(); 16],
        owner: "SHA256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".parse().unwrap(),
        generation: Generation(choices.u64()),
        role: if has & 16 == 0 { GroupRole::Replica } else { GroupRole::Active },
        base,
        base_seal: BaseSeal {
            cut_unix_us: choices.u64(),
            first_write_unix_us: choices.u64(),
            session: SessionToken([choices.u8(); 16]),
        },
        folding,
        synced,
        fork: fork.map(|point| ForkInUse { name: format!("active-{}", point.generation).parse().unwrap(), point }),
        first_segment: choices.u8().into(),
        created_unix_us: choices.u64(),
        volumes: (0..volumes)
            .map(|i| Volume { name: format!("v{i:x>63}").parse().unwrap(), size_bytes: 1 + choices.u64() % VOLUME_BYTES_MAX })
            .collect(),
    }
}

/// What was opened with mended checksums is written as well as any other, over itself and anew.
fn reads_back(scratch: &Path, mut file: SuperblockFile) {
    let block = file.get().clone();
    file.write(block.clone()).unwrap();
    drop(file);
    assert_eq!(SuperblockFile::open(&Disk::default(), scratch).unwrap().get(), &block);
    std::fs::remove_file(scratch.join(FILE_NAME)).unwrap();
    SuperblockFile::create(&Disk::default(), scratch, block.clone()).unwrap();
    assert_eq!(SuperblockFile::open(&Disk::default(), scratch).unwrap().get(), &block);
}
