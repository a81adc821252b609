//! Shared by the tests: a server on a socket in a temporary folder, other people's tools, and a plain blocking client.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test binary uses a part; helpers of tests")]

pub mod client;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use blockdev::nbd::{Export, ListenAddr, NbdServer, ServerOptions};
use blockdev::{BlockDevice, FileDevice, IoThreads, OpenOptions};

pub const MIB: u64 = 1 << 20;

/// A server with one export, `disk`, on a unix socket.
pub struct Server {
    pub server: NbdServer,
    pub io: IoThreads,
    pub socket: PathBuf,
    pub folder: tempfile::TempDir,
}

impl Server {
    pub fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self::with_options(device, ServerOptions::default())
    }

    pub fn with_options(device: Arc<dyn BlockDevice>, options: ServerOptions) -> Self {
        Self::on(IoThreads::new(2).unwrap(), device, options)
    }

    pub fn on(io: IoThreads, device: Arc<dyn BlockDevice>, options: ServerOptions) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("nbd.sock");
        let server = NbdServer::bind(&ListenAddr::Unix(socket.clone()), options, &io).unwrap();
        server.add_export(Export { description: "a test disk".into(), ..Export::new("disk", device) }).unwrap();
        Self { server, io, socket, folder }
    }

    pub fn uri(&self) -> String {
        self.uri_of("disk")
    }

    pub fn uri_of(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    /// Waits for a future that needs no io thread.
    pub fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        wait(future)
    }
}

/// Waits for a future on this thread; fails the test after a generous deadline.
pub fn wait<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(30), future).await }).expect("did not happen within 30 s")
}

/// A sparse file of `size` bytes as a device.
pub fn file_device(folder: &Path, size: u64, direct: bool) -> Arc<FileDevice> {
    let options = OpenOptions { direct, create_size: Some(size), ..OpenOptions::default() };
    Arc::new(FileDevice::open(folder.join("disk.raw"), options).unwrap_or_else(|error| panic!("{error}")))
}

/// Bytes that look random and are the same in every run.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Runs a tool of a Debian package to its end, at most a minute; fails the test if it is missing.
pub fn run(package: &str, tool: &str, args: &[&str]) -> Output {
    let found =
        std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(tool).is_file()));
    assert!(found, "{tool}: not found; install the Debian package `{package}`");
    Command::new("timeout").arg("60").arg(tool).args(args).output().unwrap()
}

/// As [`run`]; the tool must succeed. Gives what it printed.
pub fn succeed(package: &str, tool: &str, args: &[&str]) -> String {
    let output = run(package, tool, args);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{tool} {args:?}: {}\n{}{}", output.status, text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}
