//! Small file helpers under the store: short reads, folders, faults for tests.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Reads until `buf` is full or the file ends. Returns the bytes read.
pub(crate) fn read_up_to(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buf.get_mut(done..).filter(|r| !r.is_empty()) {
        match file.read_at(rest, offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Makes the entries of a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Makes writes and syncs of a journal fail, for tests; does nothing otherwise.
///
/// What it injects: a write that fails before anything is written, as a full disk does, and a failing sync. What must survive: every
/// committed epoch, and the other groups.
#[derive(Clone, Default)]
pub(crate) struct Faults(Option<std::sync::Arc<dyn Fn(Fault) -> io::Result<()> + Send + Sync>>);

/// What is about to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A write of so many bytes.
    Write(usize),
    /// An fdatasync.
    Sync,
}

impl Faults {
    #[cfg(test)]
    pub(crate) fn new(decide: impl Fn(Fault) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Some(std::sync::Arc::new(decide)))
    }

    pub(crate) fn before_write(&self, bytes: usize) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), |decide| decide(Fault::Write(bytes)))
    }

    pub(crate) fn before_sync(&self) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), |decide| decide(Fault::Sync))
    }
}

impl std::fmt::Debug for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Faults({})", if self.0.is_some() { "some" } else { "none" })
    }
}
