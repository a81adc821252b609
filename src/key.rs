//! The node's private key: a file of mode 0600 in the state folder (mode 0700), made at first use.
//!
//! Must hold: a key that others could have read is refused, and a key never appears in a log or a message.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use proto::Identity;
use proto::tls::IdentityError;

/// Name of the key's file in the state folder.
pub const KEY_FILE: &str = "node.key";
/// Bits of a mode that let others in.
const OTHERS: u32 = 0o077;

/// Why there is no usable key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The state folder cannot be made or read.
    #[error("{}: cannot use the state folder: {source}: check its path and owner, or set state_dir", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file cannot be made or read.
    #[error("{}: cannot use the key file: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Others could read it.
    #[error("{}: mode {mode:04o} lets other users in: run chmod {wanted} on it; if anyone may have read the key, delete it and pair again", path.display())]
    Open {
        /// File or folder.
        path: PathBuf,
        /// As found.
        mode: u32,
        /// As it should be.
        wanted: &'static str,
    },
    /// Not a key.
    #[error("{}: {source}: restore it from a backup, or delete it and pair again", path.display())]
    Identity {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: IdentityError,
    },
}

/// Reads the key in `state_dir`, making folder and key if they are not there.
///
/// # Errors
/// [`KeyError`].
pub fn load_or_create(state_dir: &Path) -> Result<Identity, KeyError> {
    let folder = |source| KeyError::Folder { path: state_dir.to_path_buf(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir).map_err(folder)?;
    refuse_open(state_dir, fs::metadata(state_dir).map_err(folder)?.mode(), "0700")?;
    let path = state_dir.join(KEY_FILE);
    let file = |source| KeyError::File { path: path.clone(), source };
    let identity = |source| KeyError::Identity { path: path.clone(), source };
    let pem = match fs::metadata(&path) {
        Ok(found) => {
            refuse_open(&path, found.mode(), "0600")?;
            fs::read_to_string(&path).map_err(file)?
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            create(state_dir, &path, &Identity::generate_pem().map_err(identity)?).map_err(file)?;
            // Another process may have been first: its key holds.
            fs::read_to_string(&path).map_err(file)?
        }
        Err(error) => return Err(file(error)),
    };
    Identity::from_pem(&pem).map_err(identity)
}

/// Makes the file complete and durable under another name, then links it: nobody ever reads half a key, and of two processes
/// that start at once one wins.
fn create(state_dir: &Path, path: &Path, pem: &str) -> io::Result<()> {
    let temporary = state_dir.join(format!(".{KEY_FILE}.{}", std::process::id()));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    let made = file.write_all(pem.as_bytes()).and_then(|()| file.sync_all()).and_then(|()| fs::hard_link(&temporary, path));
    let removed = fs::remove_file(&temporary);
    match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    removed?;
    fs::File::open(state_dir)?.sync_all()
}

fn refuse_open(path: &Path, mode: u32, wanted: &'static str) -> Result<(), KeyError> {
    if mode & OTHERS != 0 {
        return Err(KeyError::Open { path: path.to_path_buf(), mode: mode & 0o7777, wanted });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_is_made_once_and_refused_when_others_may_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("a/b");
        let first = load_or_create(&state).unwrap().fingerprint();
        assert_eq!(load_or_create(&state).unwrap().fingerprint(), first);
        let path = state.join(KEY_FILE);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(fs::metadata(&state).unwrap().mode() & 0o7777, 0o700);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = load_or_create(&state).unwrap_err().to_string();
        assert!(error.contains("mode 0640") && error.contains("chmod 0600"), "{error}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::set_permissions(&state, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(load_or_create(&state), Err(KeyError::Open { .. })));
        fs::set_permissions(&state, fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(&path, "nonsense").unwrap();
        assert!(matches!(load_or_create(&state), Err(KeyError::Identity { .. })));
        assert_eq!(fs::read_dir(&state).unwrap().count(), 1, "no temporary file stays behind");
    }
}
