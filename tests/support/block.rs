//! A real block device on an NBD export: `nbdfuse` shows the export as a file, a loop device makes a disk of it, and a file
//! system goes on top. Taken down in reverse order, also when a test fails and when the server is dead.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use super::{Process, eventually, run, sparse};

/// Tools that [`Disk`] uses, with their Debian packages.
pub(crate) const TOOLS: &[(&str, &str)] =
    &[("nbdfuse", "libnbd-bin"), ("losetup", "mount"), ("mount", "mount"), ("umount", "mount")];

/// An NBD export as a block device.
#[derive(Debug)]
pub(crate) struct Disk {
    fuse: Process,
    file: PathBuf,
    device: Option<String>,
    mounted: Option<PathBuf>,
}

impl Disk {
    /// Attaches `export` of the server at `socket`; `folder/<name>…` are its files.
    pub(crate) fn attach(folder: &Path, name: &str, socket: &Path, export: &str) -> Self {
        let file = folder.join(format!("{name}.fuse"));
        let ready = folder.join(format!("{name}.pid"));
        let _ = std::fs::remove_file(&ready);
        sparse(&file, 0);
        let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
        let fuse = Process::start(Command::new("nbdfuse").arg("-P").args([&ready, &file]).arg(uri));
        let mut disk = Self { fuse, file, device: None, mounted: None };
        eventually("nbdfuse shows the export", Duration::from_secs(20), || {
            assert!(disk.fuse.runs(), "nbdfuse ended: see its message above");
            std::fs::metadata(&ready).is_ok_and(|m| m.len() > 0).then_some(())
        });
        let device = run("losetup", &["--find", "--show", disk.file.to_str().expect("UTF-8")]);
        disk.device = Some(device.trim().to_owned());
        disk
    }

    /// What `nbdfuse` shows: a file whose disk can stand still.
    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    /// From now on nothing that is asked of the file is answered, not even to open it.
    pub(crate) fn stand_still(&self) {
        self.fuse.signal(Signal::STOP);
    }

    /// Ends [`stand_still`](Self::stand_still).
    pub(crate) fn go_on(&self) {
        self.fuse.signal(Signal::CONT);
    }

    /// From now on whatever is asked of the file fails.
    pub(crate) fn lose(&mut self) {
        self.fuse.kill();
    }

    /// `/dev/loopN`.
    pub(crate) fn device(&self) -> &str {
        self.device.as_deref().expect("attached")
    }

    /// Makes a file system.
    pub(crate) fn mkfs(&self, kind: &str) {
        let quiet = match kind {
            "ext4" => "-q",
            "btrfs" | "xfs" => "-q",
            other => panic!("no options known for {other}"),
        };
        run(&format!("mkfs.{kind}"), &[quiet, self.device()]);
    }

    /// Mounts it, which replays the file system's journal.
    pub(crate) fn mount(&mut self, at: &Path) {
        std::fs::create_dir_all(at).expect("a mount point");
        run("mount", &[self.device(), at.to_str().expect("UTF-8")]);
        self.mounted = Some(at.to_path_buf());
    }

    /// Unmounts it; a server that is dead is no obstacle.
    pub(crate) fn unmount(&mut self) {
        let Some(at) = self.mounted.take() else { return };
        let quiet = |args: &[&str]| {
            let done = Command::new("umount").args(args).arg(&at).stdout(Stdio::null()).stderr(Stdio::null()).status();
            done.is_ok_and(|s| s.success())
        };
        // Writers that were killed a moment ago may still hold it.
        for _ in 0..100 {
            if quiet(&[]) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        quiet(&["--lazy"]);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.go_on();
        self.unmount();
        let silent = |program: &str, args: &[&str]| {
            let _ = Command::new(program).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
        };
        if let Some(device) = &self.device {
            silent("losetup", &["--detach", device]);
        }
        // The kernel gives a loop device's file back a moment later; a lazy unmount waits for that itself.
        silent("umount", &["--lazy", self.file.to_str().unwrap_or_default()]);
        self.fuse.kill();
    }
}
