//! What the disks of an onward group were last: a small JSON file in the group's state folder, replaced whole.
//!
//! What must always hold: while the file is there, the disks differ from what it names in regions only that are in the dirty log. Whoever lets
//! anybody write to a copy past its tap removes the file first.

use std::io;
use std::path::{Path, PathBuf};

use proto::{Generation, Point};
use serde::{Deserialize, Serialize};

use crate::files;

/// Name of the file in the group's state folder.
const FILE: &str = "onward.json";

/// What the disks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Shown {
    /// The copy at a point.
    Point(Point),
    /// The active copy of this generation.
    Active(Generation),
}

#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    /// `client/group`.
    copy: String,
    /// Identity of the copy's group, in hex: another one of the same name has another history.
    group_id: String,
    shown: Shown,
}

/// Why it cannot be kept.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub(crate) struct RecordError {
    path: PathBuf,
    source: io::Error,
}

/// The record of one group, for one copy.
#[derive(Clone, Debug)]
pub(crate) struct OnwardRecord {
    path: PathBuf,
    copy: String,
    group_id: String,
}

impl OnwardRecord {
    pub(crate) fn new(group_folder: &Path, copy: String, group_id: [u8; 16]) -> Self {
        let group_id = group_id.iter().map(|byte| format!("{byte:02x}")).collect();
        Self { path: group_folder.join(FILE), copy, group_id }
    }

    /// What the disks were last; `None` if that is not known, or was of another copy.
    ///
    /// # Errors
    /// [`RecordError`] if the file is there and cannot be read. What is not JSON is not known.
    pub(crate) fn shown(&self) -> Result<Option<Shown>, RecordError> {
        let Some(stored) = read(&self.path)? else { return Ok(None) };
        Ok((stored.copy == self.copy && stored.group_id == self.group_id).then_some(stored.shown))
    }

    /// Durable when it returns.
    pub(crate) fn write(&self, shown: Shown) -> io::Result<()> {
        let stored = Stored { copy: self.copy.clone(), group_id: self.group_id.clone(), shown };
        let text = serde_json::to_vec_pretty(&stored)?;
        files::replace(&self.path, &text)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", self.path.display())))
    }
}

/// What is not JSON is said, and not known: then everything is compared.
fn read(path: &Path) -> Result<Option<Stored>, RecordError> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(RecordError { path: path.to_path_buf(), source }),
    };
    let stored = serde_json::from_slice(&text);
    Ok(stored.inspect_err(|error| tracing::warn!("{}: {error}: all of the copy is compared", path.display())).ok())
}

fn remove(path: &Path) -> Result<(), RecordError> {
    let removed = match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        removed => removed,
    };
    let folder = path.parent().unwrap_or(Path::new("/"));
    let synced = removed.and_then(|()| std::fs::File::open(folder)?.sync_all());
    synced.map_err(|source| RecordError { path: path.to_path_buf(), source })
}

/// Guests of the copy are about to write past every tap: no group knows any more what it holds. Durable when this returns.
///
/// # Errors
/// [`RecordError`] of a file that could not be removed.
pub(crate) fn forget(groups_folder: &Path, copy: &str) -> Result<(), RecordError> {
    let failed = |source| RecordError { path: groups_folder.to_path_buf(), source };
    let listed = match std::fs::read_dir(groups_folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        listed => listed.map_err(failed)?,
    };
    for entry in listed {
        let path = entry.map_err(failed)?.path().join(FILE);
        if read(&path)?.is_some_and(|stored| stored.copy == copy) {
            remove(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(text: &str) -> Shown {
        Shown::Point(text.parse().unwrap())
    }

    /// Would catch a record that is believed of another copy, or after guests wrote past the tap.
    #[test]
    fn a_record_is_of_one_copy_and_forgotten_with_it() {
        let groups = tempfile::tempdir().unwrap();
        let folder = groups.path().join("db");
        std::fs::create_dir(&folder).unwrap();
        let record = |copy: &str, id: u8| OnwardRecord::new(&folder, copy.to_owned(), [id; 16]);
        let ours = record("alpha/db", 7);
        assert_eq!(ours.shown().unwrap(), None);
        ours.write(point("3.14")).unwrap();
        assert_eq!(ours.shown().unwrap(), Some(point("3.14")));
        assert_eq!(record("alpha/db", 8).shown().unwrap(), None, "a store that was made anew");
        assert_eq!(record("alpha/web", 7).shown().unwrap(), None);
        ours.write(Shown::Active(Generation(4))).unwrap();
        assert_eq!(ours.shown().unwrap(), Some(Shown::Active(Generation(4))));

        forget(groups.path(), "alpha/web").unwrap();
        assert!(ours.shown().unwrap().is_some(), "another copy");
        forget(groups.path(), "alpha/db").unwrap();
        assert_eq!(ours.shown().unwrap(), None);
        forget(&groups.path().join("none"), "alpha/db").unwrap();
        std::fs::write(folder.join(FILE), "{").unwrap();
        assert_eq!(ours.shown().unwrap(), None, "all is compared");
    }
}
