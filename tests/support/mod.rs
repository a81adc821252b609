//! What the end-to-end tests share: real nodes, real clients, deadlines, and guards that clean up when a test fails.
//!
//! Nothing here sleeps and hopes: [`eventually`] asks again until its deadline and then says what did not happen.
#![allow(dead_code, reason = "every test uses a part of it")]

pub(crate) mod block;
pub(crate) mod chain;
pub(crate) mod history;
pub(crate) mod model;
pub(crate) mod nbd;
pub(crate) mod node;
pub(crate) mod peer;
pub(crate) mod postgres;
pub(crate) mod qemu;
pub(crate) mod scene;
pub(crate) mod site;
pub(crate) mod stalls;
pub(crate) mod views;
pub(crate) mod writers;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// From one question of [`eventually`] to the next.
const ASK_EVERY: Duration = Duration::from_millis(10);

/// Sets the flag that ends a thread when it is dropped: a failure elsewhere in the scope of both ends it too, and is not waited for.
pub(crate) struct Stop<'a>(pub(crate) &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Flips one bit of the byte at `offset`.
#[track_caller]
pub(crate) fn flip(path: &Path, offset: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("the file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("a byte");
    byte[0] ^= 0x10;
    file.write_all_at(&byte, offset).expect("a byte");
}

/// Fails with one line unless the test runs as root.
pub(crate) fn need_root() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root: it uses loop devices, mounts or network namespaces");
}

/// Fails with one line for the first tool that is missing, naming the Debian package.
pub(crate) fn need(tools: &[(&str, &str)]) {
    for (tool, package) in tools {
        assert!(find(tool).is_some(), "this test needs {tool}: install the Debian package {package}");
    }
}

/// A tool's path, also where a plain user's PATH does not look.
pub(crate) fn find(tool: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let known = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin", "/usr/bin"].map(Into::into));
    known.map(|folder| folder.join(tool)).find(|file| file.is_file())
}

/// A folder of this test alone, which other users may enter (a database server runs as its own).
pub(crate) fn scratch() -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("ts-").tempdir().expect("a temporary folder");
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).expect("its mode");
    folder
}

/// Held by tests that use loop devices and mounts: two at once would only be slow, and what is mounted when one begins is of tests that were killed.
pub(crate) fn one_at_a_time() -> File {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(std::env::temp_dir().join("twinsite-tests.lock"));
    let file = file.expect("the lock file");
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).expect("the lock");
    clear_leftovers();
    file
}

/// Unmounts what tests that were killed have left in the folder of temporary files: `mkfs.btrfs` fails as long as any disk is mounted whose
/// server is dead.
fn clear_leftovers() {
    let scratch = format!("{}/ts-", std::env::temp_dir().display());
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("the mounts");
    for at in mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)).filter(|at| at.starts_with(&scratch)) {
        eprintln!("left by a test that was killed: {at}");
        run("umount", &["--lazy", at]);
    }
    // Without loop devices there is nothing to detach, and whoever needs them says so.
    let Ok(loops) = Command::new("losetup").args(["--list", "--noheadings", "--output", "NAME,BACK-FILE"]).output() else {
        return;
    };
    for line in text(&loops).lines().filter(|line| line.contains(&scratch)) {
        let device = line.split_whitespace().next().expect("a name");
        let detached = Command::new("losetup").args(["--detach", device]).output().expect("losetup");
        // The kernel detaches by itself when the last user is gone, which may be now.
        let left = Command::new("losetup").args(["--list", "--noheadings", "--output", "BACK-FILE", device]).output();
        let gone = left.is_ok_and(|left| !text(&left).contains(&scratch));
        assert!(detached.status.success() || gone, "losetup --detach {device}: {}", text(&detached));
    }
}

/// Asks until there is an answer; fails when `within` has passed, telling what was waited for.
#[track_caller]
pub(crate) fn eventually<T>(what: &str, within: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + within;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < until, "{what}: not within {within:?}");
        std::thread::sleep(ASK_EVERY);
    }
}

/// Runs a command to its end and returns its output; fails with what it printed.
#[track_caller]
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {}: {}\n{}", args.join(" "), output.status, text(&output));
    text(&output)
}

/// Both outputs of a command.
pub(crate) fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Microseconds since 1970, as points count them.
pub(crate) fn unix_us() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_micros()).expect("before 586912")
}

/// The seed of a test: `TWINSITE_SEED`, else the clock. Printed, so that a failure can be had again.
pub(crate) fn seed() -> u64 {
    let seed = std::env::var("TWINSITE_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| unix_us() % 1_000_000_007);
    println!("TWINSITE_SEED={seed}");
    seed
}

/// A child process that does not outlive its test.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    /// For messages.
    name: String,
}

impl Process {
    /// Starts it.
    #[track_caller]
    pub(crate) fn start(command: &mut Command) -> Self {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.stdin(Stdio::null()).spawn().unwrap_or_else(|e| panic!("{name}: {e}"));
        Self { child, name }
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub(crate) fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, signal);
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn ended(&mut self, within: Duration) -> std::process::ExitStatus {
        let what = format!("{} (pid {}) ends", self.name, self.child.id());
        eventually(&what, within, || self.child.try_wait().expect("a child of ours"))
    }

    /// SIGKILL, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Writes a sparse file of `bytes`.
pub(crate) fn sparse(path: &Path, bytes: u64) {
    File::create(path).and_then(|file| file.set_len(bytes)).expect("an image file");
}

/// Content that differs with `seed` and does not compress away.
pub(crate) fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    use rand::{RngCore, SeedableRng};
    let mut content = vec![0; bytes];
    rand::rngs::SmallRng::seed_from_u64(seed).fill_bytes(&mut content);
    content
}
