//! Where activated copies are exported, kept across restarts: a small JSON file in the state folder, replaced whole.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::files;

/// Name of the file in the state folder.
const FILE: &str = "exports.json";

/// Why it cannot be kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("{}: cannot keep where copies are exported: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: not readable as JSON: {source}: remove it, then run failover again with --export for each active group", path.display())]
    Parse { path: PathBuf, source: serde_json::Error },
}

/// Export address by `client/group`.
#[derive(Debug, Default)]
pub(crate) struct ExportRecord {
    path: PathBuf,
    addresses: BTreeMap<String, String>,
}

impl ExportRecord {
    pub(crate) fn open(state_dir: &Path) -> Result<Self, RecordError> {
        let path = state_dir.join(FILE);
        match fs::read(&path) {
            Ok(bytes) => match serde_json::from_slice(&bytes) {
                Ok(addresses) => Ok(Self { path, addresses }),
                Err(source) => Err(RecordError::Parse { path, source }),
            },
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(Self { path, addresses: BTreeMap::new() }),
            Err(source) => Err(RecordError::Io { path, source }),
        }
    }

    pub(crate) fn get(&self, selector: &str) -> Option<&str> {
        self.addresses.get(selector).map(String::as_str)
    }

    /// Durable when it returns; `None` forgets. An error changes nothing.
    pub(crate) fn set(&mut self, selector: &str, address: Option<&str>) -> Result<(), RecordError> {
        let mut addresses = self.addresses.clone();
        match address {
            Some(address) => addresses.insert(selector.to_owned(), address.to_owned()),
            None => addresses.remove(selector),
        };
        let text = serde_json::to_vec_pretty(&addresses).unwrap_or_default();
        files::replace(&self.path, &text).map_err(|source| RecordError::Io { path: self.path.clone(), source })?;
        self.addresses = addresses;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_and_a_damaged_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        ExportRecord::open(folder.path()).unwrap().set("a/db", Some("unix:/x")).unwrap();
        let mut record = ExportRecord::open(folder.path()).unwrap();
        assert_eq!(record.get("a/db"), Some("unix:/x"));
        assert_eq!(record.get("a/web"), None);
        record.set("a/db", None).unwrap();
        assert_eq!(ExportRecord::open(folder.path()).unwrap().get("a/db"), None);
        fs::write(folder.path().join(FILE), "{").unwrap();
        assert!(ExportRecord::open(folder.path()).unwrap_err().to_string().contains(FILE));
    }
}
