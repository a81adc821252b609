//! Whether a hook's file may be run: it is run with the node's rights, so nobody else may have a say in what it is.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Why a hook is not run. The path goes before it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileProblem {
    #[error("cannot be looked at: {0}")]
    Io(#[from] io::Error),
    #[error("is missing: put it there, or take the hook out of the configuration")]
    Missing,
    #[error("is not a regular file")]
    NotAFile,
    #[error("is not executable: run chmod u+x")]
    NotExecutable,
    #[error("{}belongs to user {owner}, who is neither root nor this node's: run chown root", of_folder(folder))]
    Owner { folder: Option<PathBuf>, owner: u32 },
    #[error("{}can be changed by others (mode {:04o}): run chmod go-w", of_folder(folder), mode & 0o7777)]
    Writable { folder: Option<PathBuf>, mode: u32 },
}

fn of_folder(folder: &Option<PathBuf>) -> String {
    folder.as_ref().map_or_else(String::new, |folder| format!("its folder {} ", folder.display()))
}

/// Whether `path` may be run.
pub(crate) fn check(path: &Path) -> Result<(), FileProblem> {
    let found = match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(FileProblem::Missing),
        found => found?,
    };
    if !found.is_file() {
        return Err(FileProblem::NotAFile);
    }
    if found.mode() & 0o111 == 0 {
        return Err(FileProblem::NotExecutable);
    }
    trusted(&found, None)?;
    // Who may write to a folder may put another file there; through a link there are two.
    let real = std::fs::canonicalize(path)?;
    for folder in [path.parent(), real.parent()].into_iter().flatten() {
        trusted(&std::fs::metadata(folder)?, Some(folder))?;
    }
    Ok(())
}

fn trusted(found: &Metadata, folder: Option<&Path>) -> Result<(), FileProblem> {
    let folder = folder.map(Path::to_owned);
    let (owner, mode) = (found.uid(), found.mode());
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Err(FileProblem::Owner { folder, owner });
    }
    // In a folder with the sticky bit others may add files, and not touch this one.
    let sticky = folder.is_some() && mode & 0o1000 != 0;
    if mode & 0o022 != 0 && !sticky {
        return Err(FileProblem::Writable { folder, mode });
    }
    Ok(())
}
