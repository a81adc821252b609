//! Every change of the store's durable state goes through here: files, folders, writes, syncs, renames, removals.
//!
//! Owns no state of its own. Always holds: an operation is announced to the watcher before it is made, so that it can be
//! refused, and told when it is done; nobody changes superblocks, journals or folders of the store behind its back.
//! In production there is no watcher, and the cost is one look at a `None`. Reading needs no watcher and does not pass here.

mod uncached;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::uncached::Uncached;

/// A change of the store.
#[derive(Clone, Copy, Debug)]
pub enum Op<'a> {
    /// A new folder, empty.
    CreateFolder(&'a Path),
    /// A new file, empty.
    CreateFile(&'a Path),
    /// Bytes into a file, which grows if they go beyond its end.
    Write {
        /// The file.
        file: &'a Path,
        /// Where the first byte goes.
        offset: u64,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// Zeroes in a file, which give their space back where that can be done.
    Punch {
        /// The file.
        file: &'a Path,
        /// Where the first zero goes.
        offset: u64,
        /// How many; not beyond the file's end.
        bytes: u64,
    },
    /// A new length: zeroes are added, or the end is cut off.
    Resize {
        /// The file.
        file: &'a Path,
        /// Its length from now on.
        bytes: u64,
    },
    /// Content and length of a file made durable.
    Sync(&'a Path),
    /// What the page cache has of a file is forgotten, so that it is read from the disk again.
    Forget(&'a Path),
    /// The entries of a folder made durable.
    SyncFolder(&'a Path),
    /// A new name in the same folder.
    Rename {
        /// The former name.
        from: &'a Path,
        /// The new name.
        to: &'a Path,
    },
    /// A file, or an empty folder, is no more.
    Remove(&'a Path),
}

/// Sees every change of a disk.
pub trait Watch: Send + Sync {
    /// Before the operation is made.
    ///
    /// # Errors
    /// An error refuses it: nothing of it happens, and whoever wanted it gets the error.
    fn before(&self, op: &Op<'_>) -> io::Result<()>;
    /// After it was made.
    fn done(&self, op: &Op<'_>);
    /// Whether all of the store is used from one thread, which may wait: then a fork's data goes through here too.
    fn in_one_thread(&self) -> bool {
        false
    }
}

/// Where a store is changed. Clones share the watcher.
#[derive(Clone, Default)]
pub struct Disk(Option<Arc<dyn Watch>>);

impl Disk {
    /// A disk whose changes are seen, and can be refused, by `watch`.
    #[must_use]
    pub fn watched(watch: Arc<dyn Watch>) -> Self {
        Self(Some(watch))
    }

    /// Whether there is a watcher.
    pub(crate) fn is_watched(&self) -> bool {
        self.0.is_some()
    }

    /// See [`Watch::in_one_thread`].
    #[cfg(any(test, feature = "simulation"))]
    pub(crate) fn in_one_thread(&self) -> bool {
        self.0.as_ref().is_some_and(|watch| watch.in_one_thread())
    }

    /// A disk that does what it is told if `decide` lets it, and nothing of it otherwise.
    #[cfg(test)]
    pub(crate) fn faulty(decide: impl Fn(&Op<'_>) -> io::Result<()> + Send + Sync + 'static) -> Self {
        struct Decide<F>(F);
        impl<F: Fn(&Op<'_>) -> io::Result<()> + Send + Sync> Watch for Decide<F> {
            fn before(&self, op: &Op<'_>) -> io::Result<()> {
                (self.0)(op)
            }
            fn done(&self, _: &Op<'_>) {}
        }
        Self(Some(Arc::new(Decide(decide))))
    }

    fn perform<T>(&self, op: &Op<'_>, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let Some(watch) = &self.0 else { return make() };
        watch.before(op)?;
        let made = make()?;
        watch.done(op);
        Ok(made)
    }

    /// Creates a file that must not exist, for its owner only.
    pub(crate) fn create_file(&self, path: &Path) -> io::Result<DiskFile> {
        let create = || OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
        let file = self.perform(&Op::CreateFile(path), create)?;
        Ok(DiskFile { disk: self.clone(), path: path.to_owned(), file, uncached: Uncached::default() })
    }

    /// Opens a file that must exist.
    pub(crate) fn open_file(&self, path: &Path) -> io::Result<DiskFile> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(DiskFile { disk: self.clone(), path: path.to_owned(), file, uncached: Uncached::default() })
    }

    /// Opens a file that another process may have left half-way: what is read from here on is on the disk.
    ///
    /// What a killed process wrote is made durable. What failed to reach the disk at a sync that failed is another matter:
    /// its pages stay in the cache, count as clean, and a second sync has nothing to do. They are dropped from the cache.
    pub(crate) fn open_settled(&self, path: &Path) -> io::Result<DiskFile> {
        let file = self.open_file(path)?;
        file.sync_data()?;
        let forget = || Ok(rustix::fs::fadvise(&file.file, 0, None, rustix::fs::Advice::DontNeed)?);
        self.perform(&Op::Forget(path), forget)?;
        Ok(file)
    }

    /// Creates a folder and its parents, as far as they are not there, each for its owner only.
    pub(crate) fn create_folders(&self, path: &Path) -> io::Result<()> {
        let missing: Vec<&Path> = path.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists()).collect();
        for folder in missing.into_iter().rev() {
            self.perform(&Op::CreateFolder(folder), || DirBuilder::new().mode(0o700).create(folder))?;
        }
        if path.is_dir() { Ok(()) } else { Err(io::ErrorKind::NotADirectory.into()) }
    }

    /// Makes the entries of a folder durable.
    pub(crate) fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        self.perform(&Op::SyncFolder(folder), || File::open(folder)?.sync_all())
    }

    /// Gives a file or folder a new name in its folder, at once or not at all.
    pub(crate) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        debug_assert_eq!(from.parent(), to.parent());
        self.perform(&Op::Rename { from, to }, || std::fs::rename(from, to))
    }

    pub(crate) fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.perform(&Op::Remove(path), || std::fs::remove_file(path))
    }

    /// Removes a folder with all that is in it.
    pub(crate) fn remove_folder(&self, path: &Path) -> io::Result<()> {
        for entry in std::fs::read_dir(path)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                self.remove_folder(&entry.path())?;
            } else {
                self.remove_file(&entry.path())?;
            }
        }
        self.perform(&Op::Remove(path), || std::fs::remove_dir(path))
    }
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Disk({})", if self.0.is_some() { "watched" } else { "plain" })
    }
}

/// A file that is changed through its disk.
#[derive(Debug)]
pub(crate) struct DiskFile {
    disk: Disk,
    path: PathBuf,
    file: File,
    uncached: Uncached,
}

impl DiskFile {
    /// The file itself, for reading.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    pub(crate) fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.perform(&Op::Write { file: &self.path, offset, bytes }, || self.file.write_all_at(bytes, offset))
    }

    /// As [`write_all_at`](Self::write_all_at), for what will not be read soon: its pages go to the disk at once and out of the page
    /// cache, so the journal neither pushes out what guests read nor takes a fresh page of memory for each that it writes.
    pub(crate) fn append_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk
            .perform(&Op::Write { file: &self.path, offset, bytes }, || self.uncached.write_all_at(&self.file, bytes, offset))
    }

    /// Makes a range of the file zeroes, as a hole where the file system can.
    pub(crate) fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.disk.perform(&Op::Punch { file: &self.path, offset, bytes }, || {
            let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(&self.file, flags, offset, bytes) {
                Err(rustix::io::Errno::OPNOTSUPP) => self.write_zeroes(offset, bytes),
                done => Ok(done?),
            }
        })
    }

    fn write_zeroes(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let zeroes = vec![0; bytes.min(1 << 20) as usize];
        let (mut at, end) = (offset, offset + bytes);
        while at < end {
            let piece = zeroes.get(..(end - at).min(zeroes.len() as u64) as usize).unwrap_or_default();
            self.file.write_all_at(piece, at)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    pub(crate) fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.disk.perform(&Op::Resize { file: &self.path, bytes }, || self.file.set_len(bytes))
    }

    /// Makes the file so long, with space on the disk behind all of it.
    pub(crate) fn allocate(&self, bytes: u64) -> io::Result<()> {
        let allocate = || Ok(rustix::fs::fallocate(&self.file, rustix::fs::FallocateFlags::empty(), 0, bytes)?);
        self.disk.perform(&Op::Resize { file: &self.path, bytes }, allocate)
    }

    /// Makes content and length durable.
    pub(crate) fn sync_data(&self) -> io::Result<()> {
        self.disk.perform(&Op::Sync(&self.path), || self.file.sync_data())
    }

    /// As [`sync_data`](Self::sync_data), with times and allocated space.
    pub(crate) fn sync_all(&self) -> io::Result<()> {
        self.disk.perform(&Op::Sync(&self.path), || self.file.sync_all())
    }
}

/// Whether it failed for want of space, of the file system or of a quota.
pub(crate) fn is_out_of_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Fills `buf` if all of it can be had without waiting for the disk. Returns whether it was.
pub(crate) fn read_nowait(file: &File, buf: &mut [u8], offset: u64) -> bool {
    let length = buf.len();
    let slices = &mut [io::IoSliceMut::new(buf)];
    rustix::io::preadv2(file, slices, offset, rustix::io::ReadWriteFlags::NOWAIT).is_ok_and(|n| n == length)
}

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
