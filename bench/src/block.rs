//! An NBD export as a mounted file system: `nbdfuse` shows the export as a file, a loop device makes a disk of it. Needs root.
//! Taken down in reverse order when dropped, also after an error.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::child::{self, Daemon};
use crate::context::Bench;

const START_MAX: Duration = Duration::from_secs(30);
const MKFS_MAX: Duration = Duration::from_secs(300);
/// Processes that ended a moment ago may still hold the file system.
const UNMOUNT_TRIES: u32 = 100;

/// A disk, and where it is mounted.
#[derive(Debug)]
pub(crate) struct Disk {
    file: PathBuf,
    device: Option<String>,
    mounted: Option<PathBuf>,
    // Ended after the rest: fields are dropped after the code of `drop`.
    _fuse: Daemon,
}

impl Disk {
    /// Attaches the export `disk` of the server at `socket`.
    pub(crate) fn attach(bench: &Bench, socket: &Path) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            bail!("wire: a loop device and a mount need root: run it with sudo");
        }
        let name = bench.fresh("disk");
        let (file, ready) = (bench.path(&format!("{name}.fuse")), bench.path(&format!("{name}.pid")));
        fs::write(&file, []).with_context(|| format!("{}: cannot be made", file.display()))?;
        let mut command = Command::new("nbdfuse");
        command.arg("-P").arg(&ready).arg(&file).arg(format!("nbd+unix:///disk?socket={}", socket.display()));
        let mut fuse = Daemon::spawn(bench, "nbdfuse", command)?;
        fuse.wait_until("shows the export", START_MAX, || Ok(fs::metadata(&ready).is_ok_and(|m| m.len() > 0)))?;
        let mut disk = Self { file, device: None, mounted: None, _fuse: fuse };
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show"]).arg(&disk.file);
        disk.device = Some(child::run(bench, "losetup", losetup, START_MAX)?.trim().to_owned());
        Ok(disk)
    }

    pub(crate) fn make_ext4(&self, bench: &Bench) -> Result<()> {
        let mut command = Command::new("mkfs.ext4");
        command.arg("-q").args(&self.device);
        child::run(bench, "mkfs.ext4", command, MKFS_MAX).map(drop)
    }

    pub(crate) fn mount(&mut self, bench: &Bench, at: &Path) -> Result<()> {
        fs::create_dir_all(at).with_context(|| format!("{}: cannot be made", at.display()))?;
        let mut command = Command::new("mount");
        command.args(&self.device).arg(at);
        child::run(bench, "mount", command, START_MAX)?;
        self.mounted = Some(at.to_path_buf());
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let quiet = |program: &str, args: &[&str]| {
            let done = Command::new(program).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
            done.is_ok_and(|s| s.success())
        };
        if let Some(at) = self.mounted.take() {
            let at = at.to_string_lossy();
            let gone = (0..UNMOUNT_TRIES).any(|_| {
                let gone = quiet("umount", &[&*at]);
                if !gone {
                    thread::sleep(Duration::from_millis(50));
                }
                gone
            });
            if !gone {
                eprintln!("bench: {at}: busy, unmounted lazily");
                quiet("umount", &["--lazy", &*at]);
            }
        }
        if let Some(device) = self.device.take()
            && !quiet("losetup", &["--detach", &device])
        {
            eprintln!("bench: {device}: cannot be detached: run losetup --detach {device}");
        }
        // The kernel gives the loop device's file back a moment later; a lazy unmount waits for that itself.
        quiet("umount", &["--lazy", &*self.file.to_string_lossy()]);
    }
}
