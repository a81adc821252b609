//! Files in and out of the page cache, and how fast one reader reads them. What is meant to be out is looked at, not believed.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::Advice;

use crate::os;

/// What `dd bs=1M` reads at once.
const READ_BYTES: usize = 1 << 20;
const ALIGN: usize = 4096;
/// More of a file than this in memory after it was dropped, or less than the rest after it was read, and a measurement would say
/// something else than it means.
const TOLERATED_SHARE: f64 = 0.01;
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(200);

/// Writes `path` to stable storage and drops it from the page cache.
pub(crate) fn drop_file(path: &Path) -> Result<()> {
    let failed = || format!("{}: cannot be dropped from the page cache", path.display());
    let file = File::open(path).with_context(failed)?;
    until(
        path,
        "stayed in",
        |share| share <= TOLERATED_SHARE,
        || {
            // A page that is not written yet cannot be dropped.
            file.sync_all().with_context(failed)?;
            rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).with_context(failed)
        },
    )
}

/// Brings `path` into the page cache.
pub(crate) fn load_file(path: &Path) -> Result<()> {
    until(path, "fit", |share| share >= 1.0 - TOLERATED_SHARE, || read_through(path).map(drop))
}

/// Does `step` until the file is as it should be: a receiver that is folding reads and drops pages of its own.
fn until(path: &Path, what: &str, good: impl Fn(f64) -> bool, mut step: impl FnMut() -> Result<()>) -> Result<()> {
    let failed = || format!("{}: cannot be looked up in the page cache", path.display());
    let file = File::open(path).with_context(failed)?;
    let end = Instant::now() + PATIENCE;
    loop {
        os::check_stop()?;
        step()?;
        let bytes = file.metadata().with_context(failed)?.len();
        let share = share(&file, bytes).with_context(failed)?;
        if bytes == 0 || good(share) {
            return Ok(());
        }
        if Instant::now() > end {
            let (percent, patience) = (100.0 * share, PATIENCE.as_secs());
            bail!("{}: {percent:.1} % of it {what} the page cache after {patience} s: is there enough memory?", path.display());
        }
        thread::sleep(PAUSE);
    }
}

/// Bytes a second of one sequential reader, from the first byte to the last.
pub(crate) fn read_through(path: &Path) -> Result<f64> {
    let failed = || format!("{}: cannot be read", path.display());
    let mut file = File::open(path).with_context(failed)?;
    let mut buffer = vec![0; READ_BYTES];
    let (start, mut bytes) = (Instant::now(), 0);
    loop {
        os::check_stop()?;
        match file.read(&mut buffer).with_context(failed)? {
            0 => break,
            n => bytes += n,
        }
    }
    Ok(bytes as f64 / start.elapsed().as_secs_f64())
}

/// Bytes a second of `readers` who share a file among them, 1 MiB at once, past the page cache.
pub(crate) fn read_past(path: &Path, readers: usize) -> Result<f64> {
    let failed = || format!("{}: cannot be read past the page cache", path.display());
    let start = Instant::now();
    let bytes: Vec<Result<u64>> = thread::scope(|scope| {
        let share = |first: usize| {
            let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
            let file = File::options().read(true).custom_flags(direct).open(path).with_context(failed)?;
            let size = file.metadata().with_context(failed)?.len();
            // O_DIRECT wants an aligned buffer.
            let mut room = vec![0_u8; READ_BYTES + ALIGN];
            let skip = room.as_ptr().align_offset(ALIGN);
            let buffer = room.get_mut(skip..skip + READ_BYTES).with_context(failed)?;
            let mut bytes = 0;
            for at in (0..size).step_by(READ_BYTES).skip(first).step_by(readers) {
                os::check_stop()?;
                let read = file.read_at(buffer, at).with_context(failed)? as u64;
                ensure!(
                    read == size.saturating_sub(at).min(READ_BYTES as u64),
                    "{}: {read} bytes were read at {at}",
                    path.display()
                );
                bytes += read;
            }
            Ok(bytes)
        };
        let running: Vec<_> = (0..readers).map(|first| scope.spawn(move || share(first))).collect();
        running.into_iter().map(|r| r.join().unwrap_or_else(|_| bail!("a reader failed"))).collect()
    });
    let total = bytes.into_iter().sum::<Result<u64>>()?;
    Ok(total as f64 / start.elapsed().as_secs_f64())
}

/// Every file below `folder`. One that goes away meanwhile is left out.
pub(crate) fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |path: &Path| format!("{}: cannot be listed", path.display());
    let (mut files, mut folders) = (Vec::new(), vec![folder.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            entries => entries.with_context(|| failed(&folder))?,
        };
        for entry in entries {
            let entry = entry.with_context(|| failed(&folder))?;
            let kind = entry.file_type().with_context(|| failed(&entry.path()))?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}

/// Share of the first `bytes` of a file that is in the page cache; 0 of nothing.
fn share(file: &File, bytes: u64) -> Result<f64> {
    if bytes == 0 {
        return Ok(0.0);
    }
    let (resident, pages) = os::resident_pages(file, bytes)?;
    Ok(resident as f64 / pages as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_just_written_is_in_memory_and_can_be_read_in() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        fs::write(&path, vec![7; 2_300_000]).unwrap();
        assert_eq!(share(&File::open(&path).unwrap(), 2_300_000).unwrap(), 1.0);
        load_file(&path).unwrap();
        assert!(read_through(&path).unwrap() > 0.0 && read_past(&path, 3).unwrap() > 0.0);
        fs::create_dir(folder.path().join("d")).unwrap();
        fs::write(folder.path().join("d/y"), []).unwrap();
        load_file(&folder.path().join("d/y")).unwrap();
        assert_eq!(files_below(folder.path()).unwrap().len(), 2);
    }
}
