//! A guest's QEMU between the export and real clients: it holds requests while its server is away and sends them again when it is back,
//! as the QEMU of a guest does that was started with `reconnect-delay`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use super::{Process, eventually};

/// The tool, with its Debian package.
pub(crate) const TOOLS: &[(&str, &str)] = &[("qemu-storage-daemon", "qemu-utils")];
/// How long QEMU holds requests for a server that is away before its guest gets an error.
const RECONNECT_S: u32 = 60;

/// A `qemu-storage-daemon` that serves exports of others again, with the same names.
#[derive(Debug)]
pub(crate) struct Reconnecting {
    process: Process,
    /// Where it serves them.
    pub(crate) socket: PathBuf,
}

impl Reconnecting {
    /// Attaches exports: their servers' sockets and their names.
    pub(crate) fn start(folder: &Path, exports: &[(&Path, &str)]) -> Self {
        let socket = folder.join("qemu.sock");
        let mut command = Command::new("qemu-storage-daemon");
        for (server, name) in exports {
            command.arg("--blockdev").arg(format!(
                "driver=nbd,node-name={name},export={name},reconnect-delay={RECONNECT_S},server.type=unix,server.path={}",
                server.display()
            ));
        }
        command.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}", socket.display()));
        for (_, name) in exports {
            command.arg("--export").arg(format!("type=nbd,id={name}-again,node-name={name},name={name},writable=on"));
        }
        let mut process = Process::start(&mut command);
        eventually("qemu-storage-daemon serves", Duration::from_secs(20), || {
            assert!(process.runs(), "qemu-storage-daemon ended: see its message above");
            std::os::unix::net::UnixStream::connect(&socket).ok()
        });
        Self { process, socket }
    }

    /// Holds all its clients: nothing more is sent to the servers.
    pub(crate) fn hold(&self) {
        self.process.signal(Signal::STOP);
    }

    /// Lets them go on.
    pub(crate) fn go_on(&self) {
        self.process.signal(Signal::CONT);
    }

    /// The loss of the guest's machine.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }
}
