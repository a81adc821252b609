//! File systems on the export: ext4 and XFS through nbdfuse and a loop device. Needs root.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use common::{MIB, Server, file_device, noise, run, succeed};

const SIZE: u64 = 512 * MIB;

/// Takes everything down again, also when the test fails half way; what is not there is not minded.
struct Mounted {
    folder: PathBuf,
    device: Option<String>,
    fuse: Option<Child>,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let quiet = |tool: &str, arg: &Path| drop(Command::new(tool).arg(arg).output());
        quiet("umount", &self.folder.join("mnt"));
        if let Some(device) = &self.device {
            drop(Command::new("losetup").args(["-d", device]).output());
        }
        quiet("umount", &self.folder.join("fuse/nbd"));
        if let Some(mut fuse) = self.fuse.take() {
            let _ = fuse.wait();
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of this test")
}

fn round_trip(package: &str, mkfs: &str, check: (&str, &[&str])) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let server = Server::new(file_device(folder.path(), SIZE, false));
    let (mount, fuse) = (folder.path().join("mnt"), folder.path().join("fuse/nbd"));
    std::fs::create_dir(&mount).expect("mount point");
    std::fs::create_dir(folder.path().join("fuse")).expect("folder of nbdfuse");
    std::fs::write(&fuse, "").expect("file of nbdfuse");
    let mut mounted = Mounted { folder: folder.path().to_path_buf(), device: None, fuse: None };

    succeed("libnbd-bin", "nbdfuse", &["--version"]);
    let child = Command::new("nbdfuse").arg(&fuse).arg(server.uri()).spawn();
    mounted.fuse = Some(child.expect("nbdfuse is there"));
    let deadline = Instant::now() + Duration::from_secs(20);
    while std::fs::metadata(&fuse).map_or(0, |found| found.len()) != SIZE {
        assert!(Instant::now() < deadline, "nbdfuse did not mount: root and /dev/fuse are needed");
        std::thread::yield_now();
    }
    let device = succeed("mount", "losetup", &["-f", "--show", text(&fuse)]).trim().to_owned();
    mounted.device = Some(device.clone());
    succeed(package, mkfs, &["-q", &device]);

    let files: Vec<(PathBuf, Vec<u8>)> = (0..200)
        .map(|seed| (mount.join(format!("{}/file-{seed}", seed % 7)), noise(seed, (seed * seed * 23) as usize)))
        .collect();
    succeed("mount", "mount", &[&device, text(&mount)]);
    for (path, content) in &files {
        std::fs::create_dir_all(path.parent().expect("in a folder")).expect("folder");
        std::fs::write(path, content).expect("file");
    }
    succeed("mount", "umount", &[text(&mount)]);
    // Nothing is left in the page cache of the loop device: this reads through the export.
    succeed("mount", "mount", &[&device, text(&mount)]);
    for (path, content) in &files {
        assert!(std::fs::read(path).expect("file") == *content, "{}", path.display());
    }
    succeed("util-linux", "fstrim", &[text(&mount)]);
    succeed("mount", "umount", &[text(&mount)]);
    drop(mounted);
    server.wait(server.server.shutdown());
    drop(server);
    let (tool, args) = check;
    let checked = run(package, tool, &[args, &[text(&folder.path().join("disk.raw"))]].concat());
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
}

#[test]
fn ext4() {
    round_trip("e2fsprogs", "mkfs.ext4", ("e2fsck", &["-fn"]));
}

#[test]
fn xfs() {
    round_trip("xfsprogs", "mkfs.xfs", ("xfs_repair", &["-n"]));
}
