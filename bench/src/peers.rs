//! NBD servers on one raw file, ours and the peers', all with the page cache and without O_DIRECT.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::child::Daemon;
use crate::context::Bench;
use crate::tools::{NBDKIT, QEMU_NBD, QEMU_STORAGE_DAEMON, Tool};

/// A server must listen within this.
const START_MAX: Duration = Duration::from_secs(20);

/// A server that can be put in front of a raw file.
#[derive(Clone, Debug)]
pub(crate) enum Server {
    /// Our export alone: `nbd_export`.
    Ours(PathBuf),
    QemuNbd,
    QemuStorageDaemon,
    /// The same with `aio=io_uring`.
    QemuStorageDaemonUring,
    Nbdkit,
}

impl Server {
    pub(crate) fn title(&self) -> &'static str {
        match self {
            Self::Ours(_) => "twinsite export",
            Self::QemuNbd => "qemu-nbd",
            Self::QemuStorageDaemon => "qemu-storage-daemon",
            Self::QemuStorageDaemonUring => "qemu-storage-daemon io_uring",
            Self::Nbdkit => "nbdkit file",
        }
    }

    pub(crate) fn is_ours(&self) -> bool {
        matches!(self, Self::Ours(_))
    }

    /// Its program, if it is a peer's.
    pub(crate) fn tool(&self) -> Option<Tool> {
        match self {
            Self::Ours(_) => None,
            Self::QemuNbd => Some(QEMU_NBD),
            Self::QemuStorageDaemon | Self::QemuStorageDaemonUring => Some(QEMU_STORAGE_DAEMON),
            Self::Nbdkit => Some(NBDKIT),
        }
    }

    fn command(&self, file: &Path, socket: &Path) -> Command {
        let (path, sock) = (file.display(), socket.display());
        let mut command = Command::new(match self {
            Self::Ours(program) => program.as_path(),
            Self::QemuNbd => Path::new(QEMU_NBD.program),
            Self::QemuStorageDaemon | Self::QemuStorageDaemonUring => Path::new(QEMU_STORAGE_DAEMON.program),
            Self::Nbdkit => Path::new(NBDKIT.program),
        });
        match self {
            Self::Ours(_) => command.arg("--file").arg(file).arg("--unix").arg(socket),
            Self::QemuNbd => command
                .args(["--format=raw", "--cache=writeback", "--discard=unmap", "--persistent", "--shared=8"])
                .args(["--export-name=disk", "--socket"])
                .arg(socket)
                .arg(file),
            Self::QemuStorageDaemon | Self::QemuStorageDaemonUring => {
                let aio = if matches!(self, Self::QemuStorageDaemon) { "threads" } else { "io_uring" };
                let file = format!("driver=file,node-name=file,filename={path},aio={aio},discard=unmap,cache.direct=off");
                command
                    .args(["--blockdev", &file])
                    .args(["--blockdev", "driver=raw,node-name=disk,file=file,discard=unmap"])
                    .args(["--nbd-server", &format!("addr.type=unix,addr.path={sock},max-connections=8")])
                    .args(["--export", "type=nbd,id=disk,node-name=disk,name=disk,writable=on"])
            }
            Self::Nbdkit => command.arg("--foreground").arg("--unix").arg(socket).arg("file").arg(file),
        };
        command
    }

    /// Starts it on `file` and waits until it listens on `socket`.
    pub(crate) fn start(&self, bench: &Bench, file: &Path, socket: &Path) -> Result<Daemon> {
        let _ = std::fs::remove_file(socket);
        let name = self.title().replace(' ', "-");
        let mut daemon = Daemon::spawn(bench, &name, self.command(file, socket))?;
        daemon.wait_until("listens", START_MAX, || Ok(std::os::unix::net::UnixStream::connect(socket).is_ok()))?;
        Ok(daemon)
    }
}
