//! qemu-storage-daemon with a `blockdev-mirror` job: the peer that people would use to keep a live copy.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use crate::child::Daemon;
use crate::context::Bench;
use crate::peers::Server;
use crate::qmp::{Progress, Qmp};
use crate::tools::QEMU_STORAGE_DAEMON;

const START_MAX: Duration = Duration::from_secs(20);

/// Where the mirror goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// An NBD export of a second qemu-storage-daemon on the same machine: the counterpart of our receiver.
    Nbd,
    /// A raw file opened by the same process: no network at all.
    Raw,
}

impl Target {
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Nbd => "qemu mirror to NBD",
            Self::Raw => "qemu mirror to a raw file",
        }
    }
}

/// A source with its export and monitor, and the target's server if it has one.
#[derive(Debug)]
pub(crate) struct QemuMirror {
    // Ended in this order.
    pub(crate) qmp: Qmp,
    pub(crate) source: Daemon,
    _target: Option<Daemon>,
    pub(crate) socket: PathBuf,
}

impl QemuMirror {
    /// Starts source and target; the job is not started yet.
    pub(crate) fn start(bench: &Bench, name: &str, disk: &Path, copy: &Path, target: Target) -> Result<Self> {
        let size = std::fs::metadata(disk).with_context(|| format!("{}: cannot be examined", disk.display()))?.len();
        let created = File::create(copy).and_then(|f| f.set_len(size));
        created.with_context(|| format!("{}: cannot be made", copy.display()))?;
        let (socket, monitor) = (bench.path(&format!("{name}.sock")), bench.path(&format!("{name}.qmp")));
        let mut command = Command::new(QEMU_STORAGE_DAEMON.program);
        let file = format!("driver=file,node-name=file,filename={},discard=unmap,cache.direct=off", disk.display());
        command
            .args(["--blockdev", &file])
            .args(["--blockdev", "driver=raw,node-name=disk,file=file,discard=unmap"])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={},max-connections=8", socket.display())])
            .args(["--export", "type=nbd,id=disk,node-name=disk,name=disk,writable=on"])
            .args(["--chardev", &format!("socket,id=monitor,path={},server=on,wait=off", monitor.display())])
            .args(["--monitor", "chardev=monitor"]);
        let served = match target {
            Target::Nbd => Some(Server::QemuStorageDaemon.start(bench, copy, &bench.path(&format!("{name}-target.sock")))?),
            Target::Raw => None,
        };
        let mut source = Daemon::spawn(bench, name, command)?;
        source.wait_until("listens", START_MAX, || Ok(monitor.exists() && socket.exists()))?;
        let mut qmp = Qmp::connect(&monitor)?;
        let node = match target {
            Target::Nbd => json!({
                "driver": "nbd", "node-name": "target", "export": "disk",
                "server": { "type": "unix", "path": bench.path(&format!("{name}-target.sock")) },
            }),
            Target::Raw => json!({
                "driver": "raw", "node-name": "target",
                "file": { "driver": "file", "filename": copy, "discard": "unmap", "cache": { "direct": false } },
            }),
        };
        qmp.execute("blockdev-add", node)?;
        Ok(Self { qmp, source, _target: served, socket })
    }

    /// Starts the job: everything once, then what changes, in the background.
    pub(crate) fn mirror(&mut self) -> Result<()> {
        let job = json!({ "job-id": "mirror", "device": "disk", "target": "target", "sync": "full", "copy-mode": "background" });
        self.qmp.execute("blockdev-mirror", job)?;
        Ok(())
    }

    pub(crate) fn settle(&mut self, limit: Duration) -> Result<()> {
        self.qmp.settle(limit)
    }

    pub(crate) fn progress(&mut self) -> Result<Progress> {
        self.qmp.progress()
    }
}
