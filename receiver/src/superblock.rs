//! The superblock of a group: who owns it, who may write, what it consists of.
//!
//! Two checksummed slots, written one after the other at every change. In between, and after a torn write, the other slot
//! holds the state before or after the change, whole. Because a finished change is in both slots, and whoever opens the file finishes it, one slot
//! that rots later never takes a raised generation back.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use proto::codec::{DecodeError, Reader, bounded, check_crc};
use proto::fencing::GroupRole;
use proto::units::{GROUP_VOLUMES_MAX, VOLUME_BYTES_MAX};
use proto::{EpochId, Fingerprint, Generation, Name, Point, SessionToken};

use crate::disk::{Disk, DiskFile};

/// First bytes of every slot.
pub const SLOT_MAGIC: [u8; 8] = *b"TWSUPER1";
/// Version of the layout.
pub const SLOT_VERSION: u32 = 1;
/// Bytes of a slot; a multiple of 4 KiB, so that no write of one touches a sector of the other.
pub const SLOT_BYTES: usize = 8192;
/// Offset of the volume table in a slot.
pub const VOLUMES_AT: usize = 1024;
/// Bytes of an entry of the volume table.
pub const VOLUME_ENTRY_BYTES: usize = 80;
/// Bytes of the file.
pub const FILE_BYTES: usize = 2 * SLOT_BYTES;
/// Name of the file in the group's folder.
pub const FILE_NAME: &str = "superblock";

/// Offsets of a slot, in bytes; integers are little endian.
pub mod layout {
    /// `(offset, bytes, field)` of the fixed part.
    pub const SLOT: &[(usize, usize, &str)] = &[
        (0, 8, "magic"),
        (8, 4, "version"),
        (12, 4, "volumes"),
        (16, 8, "sequence"),
        (24, 16, "group_id"),
        (40, 64, "owner"),
        (104, 8, "generation"),
        (112, 1, "role"),
        (113, 1, "has_base"),
        (114, 1, "has_synced"),
        (115, 1, "has_fork"),
        (116, 4, "first_segment"),
        (120, 8, "base_generation"),
        (128, 8, "base_epoch"),
        (136, 8, "synced_generation"),
        (144, 8, "synced_epoch"),
        (152, 8, "fork_generation"),
        (160, 8, "fork_epoch"),
        (168, 8, "created_unix_us"),
        (176, 65, "fork_name"),
        (241, 1, "has_folding"),
        (242, 6, "reserved"),
        (248, 8, "folding_generation"),
        (256, 8, "folding_epoch"),
        (264, 8, "base_cut_unix_us"),
        (272, 8, "base_first_write_unix_us"),
        (280, 16, "base_session"),
    ];
    /// `(offset, bytes, field)` of an entry of the volume table.
    pub const VOLUME: &[(usize, usize, &str)] = &[(0, 8, "size_bytes"), (8, 65, "name"), (73, 7, "reserved")];
    /// `(offset, bytes, field)` at the end of a slot.
    pub const TAIL: &[(usize, usize, &str)] = &[(8188, 4, "slot_crc32")];
}

const _: () = {
    let (mut i, mut at) = (0, 0);
    while i < layout::SLOT.len() {
        assert!(layout::SLOT[i].0 == at, "fields of the slot follow each other");
        at += layout::SLOT[i].1;
        i += 1;
    }
    assert!(at <= VOLUMES_AT);
    assert!(VOLUMES_AT + GROUP_VOLUMES_MAX * VOLUME_ENTRY_BYTES <= SLOT_BYTES - 4);
    assert!(SLOT_BYTES.is_multiple_of(4096));
    let last = layout::VOLUME[layout::VOLUME.len() - 1];
    assert!(last.0 + last.1 == VOLUME_ENTRY_BYTES);
    assert!(layout::TAIL[0].0 + layout::TAIL[0].1 == SLOT_BYTES);
};

/// A volume of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its name.
    pub name: Name,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// A writable fork that is the running server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForkInUse {
    /// Its folder under `forks/`.
    pub name: Name,
    /// The point it started from.
    pub point: Point,
}

/// What the seal of the base's point said; the seal itself is gone with its segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BaseSeal {
    /// Its cut, microseconds since 1970 on the primary's clock.
    pub cut_unix_us: u64,
    /// The oldest write in it, on the same clock.
    pub first_write_unix_us: u64,
    /// The session that cut it.
    pub session: SessionToken,
}

/// What the receiver must never forget about a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Random identity of this copy; ties segments and forks to it.
    pub group_id: [u8; 16],
    /// The key that created the group: nobody else may write it.
    pub owner: Fingerprint,
    /// The generation that holds.
    pub generation: Generation,
    /// Following or promoted.
    pub role: GroupRole,
    /// The point that the base shows; `None`: an empty base, all zeroes.
    pub base: Option<Point>,
    /// What its seal said; zeroes while there is no base.
    pub base_seal: BaseSeal,
    /// Set before the first block of a fold up to this point is written into the base: points before it are not offered any more.
    pub folding: Option<Point>,
    /// The newest point known to have been synced when this was written; its frames are never taken for a torn commit.
    pub synced: Option<Point>,
    /// The fork in use, if promoted.
    pub fork: Option<ForkInUse>,
    /// Number of the journal's first segment.
    pub first_segment: u32,
    /// When the group was created, microseconds since 1970 on this machine's clock.
    pub created_unix_us: u64,
    /// Its volumes in order.
    pub volumes: Vec<Volume>,
}

/// Why a superblock is refused.
#[derive(Debug, thiserror::Error)]
pub enum SuperblockError {
    /// The file cannot be read or written.
    #[error("{}: cannot {what} the superblock: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Neither slot can be trusted.
    #[error(
        "{}: both slots of the superblock are damaged (offset 0: {first}; offset {SLOT_BYTES}: {second}): restore the file from a backup", path.display()
    )]
    BothBad {
        /// The file.
        path: PathBuf,
        /// What is wrong with the first slot.
        first: DecodeError,
        /// What is wrong with the second.
        second: DecodeError,
    },
    /// Both slots are whole, but no order of writes leaves these two.
    #[error(
        "{}: the slots at offset 0 and {SLOT_BYTES} do not belong together (sequence {first} and {second}): restore the file from a backup", path.display()
    )]
    Sequence {
        /// The file.
        path: PathBuf,
        /// Sequence number of the first slot.
        first: u64,
        /// Sequence number of the second.
        second: u64,
    },
    /// An earlier write failed half-way: what is on disk is unknown until the file is read again.
    #[error("{}: an earlier write of the superblock failed: restart the node", path.display())]
    Poisoned {
        /// The file.
        path: PathBuf,
    },
}

/// What the file has.
#[derive(Debug)]
pub(crate) struct Slots {
    /// The offset of the slot that holds.
    pub(crate) holds: usize,
    sequence: u64,
    /// What holds.
    pub(crate) block: Superblock,
    pub(crate) other: OtherSlot,
}

/// What is in the slot that does not hold.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum OtherSlot {
    /// The same state: the last change was finished.
    Same,
    /// The state before a change that was not finished.
    Former,
    /// Nothing that can be read.
    Damaged(DecodeError),
}

/// Which slot to believe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    First,
    Second,
    Unrelated,
    BothBad,
}

/// The table of recovery: sequence numbers of the slots that are whole. A change writes sequence `s + 1` and then `s + 2`, so two
/// whole slots always differ by one.
///
/// Numbers wrap. No disk lives that long, but a slot may say so all the same: a limit would be a number from which the
/// group can no longer be promoted, and one that stays at its end would leave two slots that do not belong together.
fn choose(first: Option<u64>, second: Option<u64>) -> Choice {
    match (first, second) {
        (Some(a), Some(b)) if a == b.wrapping_add(1) => Choice::First,
        (Some(a), Some(b)) if b == a.wrapping_add(1) => Choice::Second,
        (Some(_), Some(_)) => Choice::Unrelated,
        (Some(_), None) => Choice::First,
        (None, Some(_)) => Choice::Second,
        (None, None) => Choice::BothBad,
    }
}

impl Superblock {
    fn encode(&self, sequence: u64) -> Vec<u8> {
        let mut out = Vec::with_capacity(SLOT_BYTES);
        let point = |out: &mut Vec<u8>, p: Option<Point>| {
            let p = p.unwrap_or(Point { generation: Generation(0), epoch: EpochId(0) });
            out.extend_from_slice(&p.generation.0.to_le_bytes());
            out.extend_from_slice(&p.epoch.0.to_le_bytes());
        };
        out.extend_from_slice(&SLOT_MAGIC);
        out.extend_from_slice(&SLOT_VERSION.to_le_bytes());
        out.extend_from_slice(&(self.volumes.len() as u32).to_le_bytes());
        out.extend_from_slice(&sequence.to_le_bytes());
        out.extend_from_slice(&self.group_id);
        put_text(&mut out, &self.owner.to_string(), 64);
        out.extend_from_slice(&self.generation.0.to_le_bytes());
        out.push(match self.role {
            GroupRole::Replica => 1,
            GroupRole::Active => 2,
        });
        out.push(self.base.is_some().into());
        out.push(self.synced.is_some().into());
        out.push(self.fork.is_some().into());
        out.extend_from_slice(&self.first_segment.to_le_bytes());
        point(&mut out, self.base);
        point(&mut out, self.synced);
        point(&mut out, self.fork.as_ref().map(|f| f.point));
        out.extend_from_slice(&self.created_unix_us.to_le_bytes());
        put_text(&mut out, self.fork.as_ref().map_or("", |f| f.name.as_str()), 65);
        out.push(self.folding.is_some().into());
        out.extend_from_slice(&[0; 6]);
        point(&mut out, self.folding);
        out.extend_from_slice(&self.base_seal.cut_unix_us.to_le_bytes());
        out.extend_from_slice(&self.base_seal.first_write_unix_us.to_le_bytes());
        out.extend_from_slice(&self.base_seal.session.0);
        out.resize(VOLUMES_AT, 0);
        for volume in &self.volumes {
            out.extend_from_slice(&volume.size_bytes.to_le_bytes());
            put_text(&mut out, volume.name.as_str(), 65);
            out.extend_from_slice(&[0; 7]);
        }
        out.resize(SLOT_BYTES - 4, 0);
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Result<(u64, Self), DecodeError> {
        let what = "superblock slot";
        let rule = |rule| DecodeError::Rule { what, rule };
        let mut r = Reader::new(what, bytes);
        r.magic(SLOT_MAGIC)?;
        let version = r.u32()?;
        let (covered, tail) = bytes
            .split_last_chunk::<4>()
            .filter(|_| bytes.len() == SLOT_BYTES)
            .map(|(a, b)| (a, u32::from_le_bytes(*b)))
            .ok_or(rule("8192 bytes long"))?;
        check_crc(what, tail, covered)?;
        if version != SLOT_VERSION {
            return Err(DecodeError::Unknown { what: "superblock version", value: version.into() });
        }
        let count = bounded("superblock volumes", r.u32()?.into(), GROUP_VOLUMES_MAX as u64)?;
        let sequence = r.u64()?;
        let group_id = r.array()?;
        let owner = get_text(&mut r, 64)?.parse().map_err(|_| rule("the owner is a key fingerprint"))?;
        let generation = Generation(r.u64()?);
        let role = match r.u8()? {
            1 => GroupRole::Replica,
            2 => GroupRole::Active,
            value => return Err(DecodeError::Unknown { what: "superblock role", value: value.into() }),
        };
        let (has_base, has_synced, has_fork) = (r.u8()? != 0, r.u8()? != 0, r.u8()? != 0);
        let first_segment = r.u32()?;
        let (base, synced, fork_point) = (get_point(&mut r)?, get_point(&mut r)?, get_point(&mut r)?);
        let created_unix_us = r.u64()?;
        let fork_name = get_text(&mut r, 65)?;
        let has_folding = r.u8()? != 0;
        r.bytes(6)?;
        let folding = get_point(&mut r)?;
        let base_seal = BaseSeal { cut_unix_us: r.u64()?, first_write_unix_us: r.u64()?, session: SessionToken(r.array()?) };
        let fork = if has_fork {
            let name = fork_name.parse().map_err(|_| rule("the fork has a name"))?;
            Some(ForkInUse { name, point: fork_point })
        } else {
            None
        };
        let mut r = Reader::new(what, bytes.get(VOLUMES_AT..).unwrap_or_default());
        let mut volumes = Vec::new();
        for _ in 0..count {
            let size_bytes = bounded("volume bytes", r.u64()?, VOLUME_BYTES_MAX)?;
            let name = get_text(&mut r, 65)?.parse().map_err(|_| rule("volumes have names"))?;
            r.bytes(7)?;
            volumes.push(Volume { name, size_bytes });
        }
        let block = Self {
            group_id,
            owner,
            generation,
            role,
            base: has_base.then_some(base),
            base_seal,
            folding: has_folding.then_some(folding),
            synced: has_synced.then_some(synced),
            fork,
            first_segment,
            created_unix_us,
            volumes,
        };
        Ok((sequence, block))
    }
}

fn get_point(r: &mut Reader<'_>) -> Result<Point, DecodeError> {
    Ok(Point { generation: Generation(r.u64()?), epoch: EpochId(r.u64()?) })
}

/// A length byte, the text, zeroes up to `field_bytes`.
fn put_text(out: &mut Vec<u8>, text: &str, field_bytes: usize) {
    let end = out.len() + field_bytes;
    assert!(text.len() < field_bytes, "texts of a superblock are bounded by their types");
    out.push(text.len() as u8);
    out.extend_from_slice(text.as_bytes());
    out.resize(end, 0);
}

fn get_text<'a>(r: &mut Reader<'a>, field_bytes: usize) -> Result<&'a str, DecodeError> {
    let field = r.bytes(field_bytes)?;
    let bad = DecodeError::Rule { what: "superblock text", rule: "a length byte and that much UTF-8" };
    let (len, rest) = field.split_first().ok_or(bad.clone())?;
    rest.get(..usize::from(*len)).and_then(|b| std::str::from_utf8(b).ok()).ok_or(bad)
}

/// The file: the current superblock and where the next write goes.
#[derive(Debug)]
pub struct SuperblockFile {
    path: PathBuf,
    file: DiskFile,
    /// The offset of the slot that holds.
    holds: usize,
    sequence: u64,
    current: Superblock,
    poisoned: bool,
}

impl SuperblockFile {
    /// Writes the first superblock of a new group and makes it durable. The folder is synced by the caller.
    ///
    /// # Errors
    /// [`SuperblockError::Io`].
    pub fn create(disk: &Disk, folder: &Path, block: Superblock) -> Result<Self, SuperblockError> {
        let path = folder.join(FILE_NAME);
        let file =
            disk.create_file(&path).map_err(|source| SuperblockError::Io { path: path.clone(), what: "create", source })?;
        let mut this = Self { path, file, holds: SLOT_BYTES, sequence: 0, current: block.clone(), poisoned: false };
        this.write(block)?;
        Ok(this)
    }

    /// Reads the superblock and decides which slot holds. If the other one is damaged, or has the state before a change that was not finished, it is written
    /// anew: what is answered with from now on must not be in one slot alone.
    ///
    /// # Errors
    /// [`SuperblockError`] names file and offset. That the other slot cannot be written is none: what holds is known.
    pub fn open(disk: &Disk, folder: &Path) -> Result<Self, SuperblockError> {
        let path = folder.join(FILE_NAME);
        let io = |what| {
            let path = path.clone();
            move |source| SuperblockError::Io { path, what, source }
        };
        // What is read here is answered with from now on.
        let file = disk.open_settled(&path).map_err(io("open"))?;
        let Slots { holds, sequence, block: current, other } = Self::read(file.file(), &path)?;
        let mut this = Self { path, file, holds, sequence, current: current.clone(), poisoned: false };
        let path = this.path.display();
        match &other {
            OtherSlot::Same => return Ok(this),
            OtherSlot::Former => {}
            OtherSlot::Damaged(error) => {
                tracing::warn!(
                    "{path}: the superblock slot at offset {} is damaged ({error}); the other one holds",
                    SLOT_BYTES - holds
                );
            }
        }
        if let Err(error) = this.put(&current) {
            let path = this.path.display();
            tracing::warn!("{path}: the other slot of the superblock cannot be written: {error}; its next change tries again");
        }
        Ok(this)
    }

    /// Both slots as they are, used by `check` too.
    pub(crate) fn read(file: &File, path: &Path) -> Result<Slots, SuperblockError> {
        let slot = |offset: usize| -> Result<Result<(u64, Superblock), DecodeError>, SuperblockError> {
            let mut bytes = vec![0; SLOT_BYTES];
            let n = crate::disk::read_up_to(file, &mut bytes, offset as u64).map_err(|source| SuperblockError::Io {
                path: path.to_owned(),
                what: "read",
                source,
            })?;
            bytes.truncate(n);
            Ok(Superblock::decode(&bytes))
        };
        let (first, second) = (slot(0)?, slot(SLOT_BYTES)?);
        let sequence = |s: &Result<(u64, Superblock), _>| s.as_ref().ok().map(|(sequence, _)| *sequence);
        let choice = choose(sequence(&first), sequence(&second));
        let believe = |holds, (sequence, block): (u64, Superblock), other: Result<(u64, Superblock), DecodeError>| {
            let other = match other {
                Ok((_, other)) if other == block => OtherSlot::Same,
                Ok(_) => OtherSlot::Former,
                Err(error) => OtherSlot::Damaged(error),
            };
            Slots { holds, sequence, block, other }
        };
        match (choice, first, second) {
            (Choice::Second, other, Ok(second)) => Ok(believe(SLOT_BYTES, second, other)),
            (Choice::First, Ok(first), other) => Ok(believe(0, first, other)),
            (_, Ok((first, _)), Ok((second, _))) => Err(SuperblockError::Sequence { path: path.to_owned(), first, second }),
            (_, Err(first), Err(second)) => Err(SuperblockError::BothBad { path: path.to_owned(), first, second }),
            (_, Ok(first), other @ Err(_)) => Ok(believe(0, first, other)),
            (_, other @ Err(_), Ok(second)) => Ok(believe(SLOT_BYTES, second, other)),
        }
    }

    /// Whether a write failed: what holds is unknown until the file is read again.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.poisoned
    }

    /// Refuses if it [`is_poisoned`](Self::is_poisoned).
    pub(crate) fn check(&self) -> Result<(), SuperblockError> {
        if self.poisoned { Err(SuperblockError::Poisoned { path: self.path.clone() }) } else { Ok(()) }
    }

    /// What holds.
    #[must_use]
    pub fn get(&self) -> &Superblock {
        &self.current
    }

    /// Makes `block` what holds, durably: when this returns, no crash brings the former one back.
    ///
    /// # Errors
    /// [`SuperblockError`]; the change may or may not have reached the disk, and the file refuses further changes.
    pub fn write(&mut self, block: Superblock) -> Result<(), SuperblockError> {
        self.check()?;
        for _ in 0..2 {
            if let Err(source) = self.put(&block) {
                self.poisoned = true;
                return Err(SuperblockError::Io { path: self.path.clone(), what: "write", source });
            }
        }
        self.current = block;
        Ok(())
    }

    /// Writes the slot that does not hold, durably; then it does.
    fn put(&mut self, block: &Superblock) -> io::Result<()> {
        let (sequence, offset) = (self.sequence.wrapping_add(1), SLOT_BYTES - self.holds);
        self.file.write_all_at(&block.encode(sequence), offset as u64)?;
        self.file.sync_data()?;
        (self.sequence, self.holds) = (sequence, offset);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
