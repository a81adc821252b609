//! The group's durable record at the primary: its generation, its sessions, and the point up to which the dirty log was cleared. One
//! small JSON file, replaced whole.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use proto::{Generation, Point, SessionToken};
use serde::{Deserialize, Serialize};

const FILE: &str = "group.json";
const FILE_BYTES_MAX: u64 = 64 * 1024;

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
    #[error("{}: not a group record ({source}); restore it, or move it away to send everything again", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where it is wrong.
        source: serde_json::Error,
    },
}

/// What a primary must not forget.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Recorded {
    pub(crate) generation: Generation,
    /// The session whose commit the receiver last told us of, and the one that may have committed since. If a commit is of neither, another
    /// machine with our key wrote.
    #[serde(default)]
    pub(crate) sessions: [SessionToken; 2],
    /// Regions that were clean at this point, or earlier ones, are not marked in the dirty log any more.
    #[serde(default)]
    pub(crate) cleared: Option<Point>,
}

/// The record of one group.
pub(crate) struct Record {
    dir: PathBuf,
    stored: Mutex<Recorded>,
}

impl Record {
    /// Opens the record in `dir`, which is created with mode 0700. Generation zero if there is none yet.
    ///
    /// # Errors
    /// [`RecordError`].
    pub(crate) fn open(dir: &Path) -> Result<Self, RecordError> {
        let path = dir.join(FILE);
        let io = |source| RecordError::Io { path: path.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
        let record = |stored| Self { dir: dir.to_owned(), stored: Mutex::new(stored) };
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(record(Recorded::default())),
            Err(error) => return Err(io(error)),
            Ok(meta) if meta.len() > FILE_BYTES_MAX => return Err(io(io::ErrorKind::FileTooLarge.into())),
            Ok(_) => {}
        }
        let text = fs::read(&path).map_err(io)?;
        let stored = serde_json::from_slice(&text).map_err(|source| RecordError::Parse { path: path.clone(), source })?;
        Ok(record(stored))
    }

    /// What is recorded.
    pub(crate) fn get(&self) -> Recorded {
        self.stored.lock().clone()
    }

    /// Changes the record durably: new file, fsync, rename, fsync of the folder.
    ///
    /// # Errors
    /// [`RecordError::Io`]; the old record then still stands.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Recorded)) -> Result<(), RecordError> {
        // Held throughout: two changes must not overtake each other.
        let mut stored = self.stored.lock();
        let mut changed = stored.clone();
        change(&mut changed);
        if changed == *stored {
            return Ok(());
        }
        let path = self.dir.join(FILE);
        let write = || -> io::Result<()> {
            let temporary = self.dir.join("group.json.new");
            let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(&serde_json::to_vec(&changed)?)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            fs::File::open(&self.dir)?.sync_all()
        };
        write().map_err(|source| RecordError::Io { path: path.clone(), source })?;
        *stored = changed;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_and_a_damaged_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let record = Record::open(&dir.path().join("a/b")).unwrap();
        assert_eq!(record.get(), Recorded::default());
        record.update(|r| r.generation = Generation(7)).unwrap();
        record.update(|r| r.sessions[1] = SessionToken([9; 16])).unwrap();
        let again = Record::open(&dir.path().join("a/b")).unwrap().get();
        assert_eq!((again.generation, again.sessions[1], again.cleared), (Generation(7), SessionToken([9; 16]), None));
        fs::write(dir.path().join("a/b").join(FILE), "{\"generation\":3}").unwrap();
        assert_eq!(Record::open(&dir.path().join("a/b")).unwrap().get().generation, Generation(3), "of an earlier build");
        fs::write(dir.path().join("a/b").join(FILE), "{").unwrap();
        assert!(matches!(Record::open(&dir.path().join("a/b")), Err(RecordError::Parse { .. })));
    }
}
