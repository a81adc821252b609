//! The group's durable record at the primary: its generation, its sessions, and the point up to which the dirty log was cleared.
//!
//! One file of two sectors of 512 bytes, written in turn: a change never touches the one that holds, and needs no space on a full
//! disk. A sector is a magic, a sequence number, a length, JSON, zeroes, and a CRC-32 of all before it.
//!
//! Who may write is in both sectors when a change of it is done, and whoever opens the record finishes that: a sector that rots later never lets guests
//! write who may not. With a session or a clearing that is a change too old, more is compared and nothing is lost, so those are in one sector.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use proto::{Generation, Point, SessionToken};
use serde::{Deserialize, Serialize};

use crate::core::Ours;
use crate::gate::Closed;

const FILE: &str = "group.record";
const SECTOR_BYTES: usize = 512;
const MAGIC: [u8; 4] = *b"TWR1";
const HEAD_BYTES: usize = 16;
const CRC_BYTES: usize = 4;

/// What can be wrong with the record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file or its folder cannot be read or written.
    #[error("{}: {source}; check the folder's owner and free space", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is not what was written.
    #[error("{}: both sectors (offsets 0 and {SECTOR_BYTES}) are damaged; move it away to have the disks compared with the copy", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// A write failed earlier: what is on disk is unknown until it is read again.
    #[error("{}: an earlier write failed; check the disk, then restart the node", path.display())]
    Poisoned {
        /// The file.
        path: PathBuf,
    },
}

/// What a primary must not forget.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Recorded {
    pub(crate) generation: Generation,
    /// See [`Ours`].
    #[serde(default)]
    pub(crate) sessions: [SessionToken; 2],
    /// See [`Ours`]; unknown in the record of an older node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) before: Option<Point>,
    /// Regions that were clean at this point, or earlier ones, are not marked in the dirty log any more.
    #[serde(default)]
    pub(crate) cleared: Option<Point>,
    /// Why no guest may write here, if so.
    #[serde(default)]
    pub(crate) stopped: Option<Stopped>,
}

/// Why no guest may write to a group's disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Stopped {
    /// The other site may, in this generation.
    Fenced(Generation),
    /// The other site was told that there will be no more writes, and may have become the writer.
    Drained,
    /// They are being overwritten with what the other site has.
    Handback {
        /// The point that ends it carries this.
        token: SessionToken,
        /// What was written here of its own is kept there.
        kept: bool,
        /// The point that they go back to; `None`: what the active copy has become.
        #[serde(default)]
        to: Option<Point>,
    },
}

impl Recorded {
    pub(crate) fn ours(&self) -> Ours {
        Ours { sessions: self.sessions, before: self.before }
    }

    pub(crate) fn set_ours(&mut self, ours: Ours) {
        (self.sessions, self.before) = (ours.sessions, ours.before);
    }

    /// All that is there was brought by this conversation.
    pub(crate) fn handed(&mut self, generation: Generation, token: SessionToken) {
        self.set_ours(Ours { sessions: [token, token], before: None });
        (self.generation, self.cleared, self.stopped) = (generation, None, None);
    }

    /// Whether both say the same of who may write.
    pub(crate) fn agrees_with(&self, other: &Self) -> bool {
        (self.generation, self.stopped) == (other.generation, other.stopped)
    }
}

impl Stopped {
    /// Why guests are held up, if they are: a primary whose guests are to go on writing lets them do so, but never on disks that are in between.
    pub(crate) fn holds_up(self, writes_when_fenced: bool) -> Option<Closed> {
        match self {
            Self::Fenced(_) | Self::Drained if writes_when_fenced => None,
            Self::Fenced(_) => Some(Closed::Fenced),
            Self::Drained => Some(Closed::Drained),
            Self::Handback { .. } => Some(Closed::Handback),
        }
    }
}

/// The record of one group.
pub(crate) struct Record {
    path: PathBuf,
    file: File,
    /// What holds.
    stored: Mutex<Recorded>,
    state: Mutex<State>,
}

struct State {
    sequence: u64,
    poisoned: bool,
}

fn encode(recorded: &Recorded, sequence: u64) -> io::Result<[u8; SECTOR_BYTES]> {
    let json = serde_json::to_vec(recorded)?;
    let mut sector = [0; SECTOR_BYTES];
    sector[..4].copy_from_slice(&MAGIC);
    sector[4..8].copy_from_slice(&(json.len() as u32).to_le_bytes());
    sector[8..HEAD_BYTES].copy_from_slice(&sequence.to_le_bytes());
    let body = sector[HEAD_BYTES..SECTOR_BYTES - CRC_BYTES].get_mut(..json.len()).ok_or(io::ErrorKind::FileTooLarge)?;
    body.copy_from_slice(&json);
    let crc = crc32fast::hash(&sector[..SECTOR_BYTES - CRC_BYTES]);
    sector[SECTOR_BYTES - CRC_BYTES..].copy_from_slice(&crc.to_le_bytes());
    Ok(sector)
}

/// `None` for a sector that was not written whole.
fn decode(sector: &[u8; SECTOR_BYTES]) -> Option<(u64, Recorded)> {
    let (covered, crc) = sector.split_last_chunk::<CRC_BYTES>()?;
    if covered[..4] != MAGIC || crc32fast::hash(covered) != u32::from_le_bytes(*crc) {
        return None;
    }
    let length = u32::from_le_bytes(*covered[4..].first_chunk()?) as usize;
    let sequence = u64::from_le_bytes(*covered[8..].first_chunk()?);
    Some((sequence, serde_json::from_slice(covered[HEAD_BYTES..].get(..length)?).ok()?))
}

impl Record {
    /// Opens the record in `dir`, which is created with mode 0700. It is empty if there was none yet.
    ///
    /// # Errors
    /// [`RecordError`].
    pub(crate) fn open(dir: &Path) -> Result<Self, RecordError> {
        let path = dir.join(FILE);
        let io = |source| RecordError::Io { path: path.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
        let mut options = fs::OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(io)?;
        let mut sectors = [[0; SECTOR_BYTES]; 2];
        let mut written = false;
        for (sector, offset) in sectors.iter_mut().zip([0, SECTOR_BYTES as u64]) {
            match file.read_exact_at(sector, offset) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
                result => result.map_err(io)?,
            }
            written |= sector.iter().any(|b| *b != 0);
        }
        let mut whole: Vec<(u64, Recorded)> = sectors.iter().filter_map(decode).collect();
        whole.sort_by_key(|(sequence, _)| *sequence);
        let newest = whole.pop();
        let (sequence, stored) = match newest {
            Some((mut sequence, stored)) => {
                if !whole.first().is_some_and(|(_, other)| other.agrees_with(&stored)) {
                    match put(&file, &stored, sequence + 1) {
                        Ok(()) => sequence += 1,
                        // What holds is known; the next change tries again.
                        Err(error) => tracing::warn!(
                            "{}: the other sector cannot be written: {error}; check the disk of state_dir",
                            path.display()
                        ),
                    }
                }
                (sequence, stored)
            }
            None if written => return Err(RecordError::Damaged { path }),
            None => {
                // Its space is taken now, so that a full disk never keeps a session from being recorded.
                let begin = || -> io::Result<()> {
                    file.write_all_at(&[0; 2 * SECTOR_BYTES], 0)?;
                    file.sync_all()?;
                    File::open(dir)?.sync_all()
                };
                begin().map_err(io)?;
                (0, Recorded::default())
            }
        };
        Ok(Self { file, stored: Mutex::new(stored), state: Mutex::new(State { sequence, poisoned: false }), path })
    }

    /// What is recorded.
    pub(crate) fn get(&self) -> Recorded {
        self.stored.lock().clone()
    }

    /// Changes the record durably.
    ///
    /// # Errors
    /// [`RecordError`]; whether the change holds is unknown then, and the record takes no further one.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Recorded)) -> Result<(), RecordError> {
        blockdev::blocking(|| self.try_update(change))
    }

    fn try_update(&self, change: impl FnOnce(&mut Recorded)) -> Result<(), RecordError> {
        // Held throughout: two changes must not overtake each other. What holds is looked at meanwhile.
        let mut state = self.state.lock();
        if state.poisoned {
            return Err(RecordError::Poisoned { path: self.path.clone() });
        }
        let stored = self.get();
        let mut changed = stored.clone();
        change(&mut changed);
        if changed == stored {
            return Ok(());
        }
        let writes = if changed.agrees_with(&stored) { 1 } else { 2 };
        for _ in 0..writes {
            let sequence = state.sequence + 1;
            if let Err(source) = put(&self.file, &changed, sequence) {
                state.poisoned = true;
                return Err(RecordError::Io { path: self.path.clone(), source });
            }
            state.sequence = sequence;
        }
        *self.stored.lock() = changed;
        Ok(())
    }
}

/// Writes a sector durably, over the one that was written before the last.
fn put(file: &File, recorded: &Recorded, sequence: u64) -> io::Result<()> {
    file.write_all_at(&encode(recorded, sequence)?, (sequence % 2) * SECTOR_BYTES as u64)?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_and_a_damaged_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("a/b");
        let open = || Record::open(&folder);
        assert_eq!(open().unwrap().get(), Recorded::default());
        assert_eq!(open().unwrap().get(), Recorded::default(), "made and never written");
        let record = open().unwrap();
        record.update(|r| r.generation = Generation(7)).unwrap();
        let cleared = Some(Point { generation: Generation(1 << 48), epoch: proto::EpochId(u64::MAX) });
        record.update(|r| (r.sessions, r.before, r.cleared) = ([SessionToken([255; 16]); 2], cleared, cleared)).unwrap();
        let stopped = Some(Stopped::Handback { token: SessionToken([255; 16]), kept: false, to: cleared });
        record.update(|r| (r.generation, r.stopped) = (Generation(1 << 48), stopped)).unwrap();
        assert_eq!(open().unwrap().get().stopped, stopped);
        record.update(|r| (r.generation, r.stopped) = (Generation(7), None)).unwrap();
        record.update(|r| r.cleared = None).unwrap();
        record.update(|r| r.cleared = cleared).unwrap();
        let again = open().unwrap().get();
        assert_eq!((again.generation, again.sessions[1], again.cleared), (Generation(7), SessionToken([255; 16]), cleared));

        // The newer sector is torn: the older one holds. Both: refused.
        let path = folder.join(FILE);
        let whole = fs::read(&path).unwrap();
        let newer = if record.state.lock().sequence % 2 == 0 { 0 } else { SECTOR_BYTES };
        for offset in 0..SECTOR_BYTES {
            let mut torn = whole.clone();
            torn[newer + offset] ^= 1;
            fs::write(&path, &torn).unwrap();
            assert_eq!(open().unwrap().get().cleared, None, "offset {offset}");
            torn[SECTOR_BYTES - newer + offset] ^= 1;
            fs::write(&path, &torn).unwrap();
            assert!(matches!(open(), Err(RecordError::Damaged { .. })));
        }
    }

    /// Would catch a bit that flips and lets guests write again who may not, or holds up those who may; also after a kill in the middle of a change.
    #[test]
    fn no_rotten_sector_changes_who_may_write() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Record::open(dir.path()).unwrap();
        let path = dir.path().join(FILE);
        let rot = |sector: usize| {
            let mut bytes = fs::read(&path).unwrap();
            bytes[sector * SECTOR_BYTES + 30] ^= 1;
            fs::write(&path, &bytes).unwrap();
        };
        open().update(|r| r.generation = Generation(1)).unwrap();
        let handback = Stopped::Handback { token: SessionToken([1; 16]), kept: true, to: None };
        for stopped in [Some(Stopped::Fenced(Generation(2))), None, Some(Stopped::Drained), Some(handback), None] {
            for sector in [0, 1] {
                let generation = Generation(open().get().generation.0 + 1);
                let before = fs::read(&path).unwrap();
                open().update(|r| (r.generation, r.stopped) = (generation, stopped)).unwrap();
                rot(sector);
                let found = open().get();
                assert_eq!((found.generation, found.stopped), (generation, stopped), "sector {sector} rots");
                // Damage is mended, so the other one may go next.
                rot(1 - sector);
                assert_eq!(open().get(), found, "then the other");

                // Only the first sector of the change came to the disk, and was believed at a start.
                let after = fs::read(&path).unwrap();
                fs::write(&path, &before).unwrap();
                open().update(|r| (r.generation, r.stopped) = (generation, stopped)).unwrap();
                let sequence = open().state.lock().sequence;
                let first = (sequence as usize - 1) % 2;
                let mut image = fs::read(&path).unwrap();
                let range = (1 - first) * SECTOR_BYTES..(2 - first) * SECTOR_BYTES;
                image[range.clone()].copy_from_slice(&before[range]);
                fs::write(&path, &image).unwrap();
                assert_eq!(open().get(), found, "cut off");
                rot(first);
                assert_eq!(open().get(), found, "cut off, then rotten");
                fs::write(&path, &after).unwrap();
            }
        }
    }
}
