//! The group's durable record at the primary: its generation. One small JSON file, replaced whole.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use proto::Generation;
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

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    generation: Generation,
}

/// The record of one group.
pub(crate) struct Record {
    dir: PathBuf,
}

impl Record {
    /// Opens the record in `dir`, which is created with mode 0700. Generation zero if there is none yet.
    ///
    /// # Errors
    /// [`RecordError`].
    pub(crate) fn open(dir: &Path) -> Result<(Self, Generation), RecordError> {
        let path = dir.join(FILE);
        let io = |source| RecordError::Io { path: path.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
        let record = Self { dir: dir.to_owned() };
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((record, Generation(0))),
            Err(error) => return Err(io(error)),
            Ok(meta) if meta.len() > FILE_BYTES_MAX => return Err(io(io::ErrorKind::FileTooLarge.into())),
            Ok(_) => {}
        }
        let text = fs::read(&path).map_err(io)?;
        let stored: Stored = serde_json::from_slice(&text).map_err(|source| RecordError::Parse { path: path.clone(), source })?;
        Ok((record, stored.generation))
    }

    /// Makes `generation` durable: new file, fsync, rename, fsync of the folder.
    ///
    /// # Errors
    /// [`RecordError::Io`]; the old record then still stands.
    pub(crate) fn store(&self, generation: Generation) -> Result<(), RecordError> {
        let path = self.dir.join(FILE);
        let write = || -> io::Result<()> {
            let temporary = self.dir.join("group.json.new");
            let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(&serde_json::to_vec(&Stored { generation })?)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            fs::File::open(&self.dir)?.sync_all()
        };
        write().map_err(|source| RecordError::Io { path: path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_and_a_damaged_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (record, generation) = Record::open(&dir.path().join("a/b")).unwrap();
        assert_eq!(generation, Generation(0));
        record.store(Generation(7)).unwrap();
        assert_eq!(Record::open(&dir.path().join("a/b")).unwrap().1, Generation(7));
        fs::write(dir.path().join("a/b").join(FILE), "{").unwrap();
        assert!(matches!(Record::open(&dir.path().join("a/b")), Err(RecordError::Parse { .. })));
    }
}
