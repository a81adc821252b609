//! Why a file cannot be opened as a device.

use std::io;
use std::path::PathBuf;

/// One line each: what, where, what to do.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The path cannot be opened.
    #[error("{}: cannot open: {source}", path.display())]
    Open {
        /// As given.
        path: PathBuf,
        /// From the kernel.
        source: io::Error,
    },
    /// Another process, or another device of this one, uses the file.
    #[error("{}: in use by another process (a running node, a guest, or another tool): stop it first", path.display())]
    InUse {
        /// As given.
        path: PathBuf,
    },
    /// A lock, a size or a new length could not be had.
    #[error("{}: {what}: {source}", path.display())]
    Prepare {
        /// As given.
        path: PathBuf,
        /// The step.
        what: &'static str,
        /// From the kernel.
        source: io::Error,
    },
    /// A directory, a pipe and so on.
    #[error("{}: neither a regular file nor a block device: give the path of a disk image or of a disk", path.display())]
    NotADisk {
        /// As given.
        path: PathBuf,
    },
    /// `create_size` names another size than the file has.
    #[error("{}: is {found_bytes} bytes long, not {wanted_bytes}: change the configured size or the file", path.display())]
    SizeDiffers {
        /// As given.
        path: PathBuf,
        /// What is there.
        found_bytes: u64,
        /// What was asked for.
        wanted_bytes: u64,
    },
    /// The file system has no O_DIRECT.
    #[error("{}: the file system does not support direct I/O: set direct = false", path.display())]
    NoDirect {
        /// As given.
        path: PathBuf,
    },
}
