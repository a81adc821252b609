//! What every experiment works with: a temporary folder on the disk to be measured, the binaries under test, the commands that
//! were run, and how long to measure.

use std::cell::{Cell, RefCell};
use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::Options;

/// A socket path is bounded by the kernel (107 bytes); what is left for the names below the temporary folder.
const DIR_BYTES_MAX: usize = 60;

/// One experiment's surroundings.
#[derive(Debug)]
pub(crate) struct Bench {
    dir: PathBuf,
    keep: bool,
    no_build: bool,
    built: RefCell<Vec<&'static str>>,
    out: PathBuf,
    pub(crate) quick: bool,
    rounds: Option<u32>,
    seconds: Option<u32>,
    commands: RefCell<Vec<String>>,
    logs: Cell<u32>,
    started: Instant,
}

impl Bench {
    pub(crate) fn new(options: &Options) -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let out = options.out.clone().unwrap_or_else(|| manifest.join("results"));
        let parent = fs::canonicalize(&options.dir)
            .with_context(|| format!("--dir {}: cannot be used: name a folder on the disk to measure", options.dir.display()))?;
        refuse_memory(&parent)?;
        let dir = tempfile::Builder::new()
            .prefix("twinsite-bench.")
            .tempdir_in(&parent)
            .with_context(|| format!("--dir {}: cannot make a folder in it", parent.display()))?
            .keep();
        if dir.as_os_str().len() > DIR_BYTES_MAX {
            bail!("--dir {}: too long for unix sockets: choose a shorter path", parent.display());
        }
        Ok(Self {
            dir,
            keep: options.keep,
            no_build: options.no_build,
            built: RefCell::default(),
            out,
            quick: options.quick,
            rounds: options.rounds,
            seconds: options.seconds,
            commands: RefCell::default(),
            logs: Cell::new(0),
            started: Instant::now(),
        })
    }

    /// A path in the temporary folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A name that was not used yet in this experiment.
    pub(crate) fn fresh(&self, name: &str) -> String {
        let n = self.logs.get();
        self.logs.set(n + 1);
        format!("{name}{n}")
    }

    /// How long the experiment has been running.
    pub(crate) fn took(&self) -> Duration {
        self.started.elapsed()
    }

    /// Folder of the results.
    pub(crate) fn out(&self) -> &Path {
        &self.out
    }

    pub(crate) fn rounds(&self, quick: u32, full: u32) -> u32 {
        self.rounds.unwrap_or(if self.quick { quick } else { full })
    }

    pub(crate) fn seconds(&self, quick: u32, full: u32) -> u32 {
        self.seconds.unwrap_or(if self.quick { quick } else { full })
    }

    /// Bytes, by whether the run is a quick one.
    pub(crate) fn bytes(&self, quick: u64, full: u64) -> u64 {
        if self.quick { quick } else { full }
    }

    /// Writes everything that the disk's file system holds dirty, so that nobody pays for the write-back of the one before.
    pub(crate) fn sync(&self) -> Result<()> {
        let failed = || format!("{}: cannot be synced", self.dir.display());
        let folder = File::open(&self.dir).with_context(failed)?;
        rustix::fs::syncfs(&folder).with_context(failed)
    }

    /// A new file for what a process says.
    pub(crate) fn log_path(&self, name: &str) -> PathBuf {
        let n = self.logs.get();
        self.logs.set(n + 1);
        self.dir.join(format!("{n:04}-{name}.log"))
    }

    /// Remembers a command for the results, once, without the folders of this machine.
    pub(crate) fn record(&self, command: &Command) {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let line: Vec<String> = words.map(|w| self.portable(&w.to_string_lossy())).collect();
        let line = line.join(" ");
        let mut commands = self.commands.borrow_mut();
        if !commands.contains(&line) {
            commands.push(line);
        }
    }

    /// The commands so far.
    pub(crate) fn commands(&self) -> Vec<String> {
        self.commands.borrow().clone()
    }

    fn portable(&self, word: &str) -> String {
        let word = word.replace(&*self.dir.to_string_lossy(), "$DIR");
        match release_folder() {
            Ok(folder) => word.replace(&*folder.to_string_lossy(), "target/release"),
            Err(_) => word,
        }
    }

    /// A release binary of this workspace, built first unless the user said not to.
    pub(crate) fn binary(&self, target: &Target) -> Result<PathBuf> {
        let path = release_folder()?.join(target.path);
        if !self.no_build && !self.built.borrow().contains(&target.path) {
            let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            command.args(["build", "--release", "--quiet"]).args(target.build).stdin(Stdio::null());
            command.current_dir(env!("CARGO_MANIFEST_DIR"));
            let status = command.status().context("cargo: cannot be started: install Rust, or build first and use --no-build")?;
            if !status.success() {
                bail!("{}: does not build: run cargo build --release {}", target.path, target.build.join(" "));
            }
            self.built.borrow_mut().push(target.path);
        }
        if !path.is_file() {
            bail!("{}: not there: run cargo build --release {}", path.display(), target.build.join(" "));
        }
        Ok(path)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if self.keep {
            eprintln!("bench: kept {}", self.dir.display());
        } else if let Err(error) = fs::remove_dir_all(&self.dir) {
            eprintln!("bench: {}: cannot be removed: {error}", self.dir.display());
        }
    }
}

/// A binary of this workspace.
#[derive(Debug)]
pub(crate) struct Target {
    path: &'static str,
    build: &'static [&'static str],
}

/// The NBD export alone.
pub(crate) const NBD_EXPORT: Target =
    Target { path: "examples/nbd_export", build: &["-p", "twinsite-blockdev", "--example", "nbd_export"] };

/// The product.
pub(crate) const TWINSITE: Target = Target { path: "twinsite", build: &["-p", "twinsite"] };

/// Where this program lies, which is where cargo puts its siblings.
fn release_folder() -> Result<PathBuf> {
    let own = env::current_exe().context("cannot find this program's own path")?;
    let folder = own.parent().context("this program has no folder")?;
    if cfg!(debug_assertions) { Ok(folder.with_file_name("release")) } else { Ok(folder.to_path_buf()) }
}

/// Figures of a memory file system say nothing of a disk.
fn refuse_memory(dir: &Path) -> Result<()> {
    /// statfs(2): TMPFS_MAGIC and RAMFS_MAGIC.
    const MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
    let folder = File::open(dir).with_context(|| format!("--dir {}: cannot be opened", dir.display()))?;
    let found = rustix::fs::fstatfs(&folder).with_context(|| format!("--dir {}: cannot be examined", dir.display()))?;
    if MEMORY.contains(&(found.f_type as u64 & 0xffff_ffff)) {
        bail!("--dir {}: is in memory: name a folder on the disk to measure", dir.display());
    }
    Ok(())
}
