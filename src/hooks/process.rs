//! One hook as a process: started, watched, ended.
//!
//! Always holds: signals go to the process group that this module started, by its id, and only while its leader is not reaped, so the
//! id is nobody else's; a hook that ended is not waited for on account of what it left running.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use super::file;
use crate::api::HookOutcome;

/// For a node that has no PATH itself.
pub(super) const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// From SIGTERM to SIGKILL, and once more until a hook that even that does not end is left behind.
pub(super) const GRACE: Duration = Duration::from_secs(5);
/// Most bytes of output that are kept: the last ones, where an error is.
pub(super) const OUTPUT_BYTES_MAX: usize = 64 << 10;
/// Most bytes that are read after a hook has ended: what a pipe holds. A process that it left behind may print for ever.
const DRAIN_BYTES_MAX: usize = 1 << 20;
/// Hooks that wait to be started. Beyond, one is refused.
const STARTS_MAX: usize = 16;

type Start = (Command, oneshot::Sender<io::Result<Child>>);

/// Starts processes from a thread of its own, with the priority of the thread that made it: the runtime's threads yield to guests,
/// and what a hook starts may be the guest.
pub(super) struct Spawner(SyncSender<Start>);

impl Spawner {
    pub(super) fn start() -> io::Result<Self> {
        let (sender, inbox) = sync_channel::<Start>(STARTS_MAX);
        std::thread::Builder::new().name("hooks".to_owned()).spawn(move || {
            for (mut command, reply) in inbox {
                // Nobody waits any more: the child is not left without its watcher.
                if let Err(Ok(mut child)) = reply.send(command.spawn()) {
                    let _ = child.kill();
                    let _ = child.wait();
                }
            }
        })?;
        Ok(Self(sender))
    }

    async fn spawn(&self, command: Command) -> io::Result<Child> {
        let (reply, answer) = oneshot::channel();
        self.0.try_send((command, reply)).map_err(|_| io::Error::other("too many hooks at once"))?;
        answer.await.map_err(|_| io::Error::other("the thread that starts hooks is gone"))?
    }
}

/// How a hook ended.
pub(super) struct Ended {
    pub(super) outcome: HookOutcome,
    pub(super) took: Duration,
    pub(super) output: Tail,
}

/// The last bytes of what came, and the number of those before.
#[derive(Debug, Default)]
pub(super) struct Tail {
    bytes: std::collections::VecDeque<u8>,
    left_out: u64,
}

impl Tail {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        let excess = self.bytes.len().saturating_sub(OUTPUT_BYTES_MAX);
        self.bytes.drain(..excess);
        self.left_out += excess as u64;
    }

    /// As text, and the number of bytes that are not in it.
    pub(super) fn into_text(self) -> (String, u64) {
        (String::from_utf8_lossy(&Vec::from(self.bytes)).into_owned(), self.left_out)
    }
}

/// A process group whose leader is not reaped yet.
struct Running {
    child: Option<Child>,
    group: Pid,
}

impl Running {
    fn signal(&self, signal: Signal) {
        // It may have ended a moment ago.
        let _ = kill_process_group(self.group, signal);
    }

    fn reap(mut self) -> io::Result<ExitStatus> {
        match self.child.take() {
            Some(mut child) => child.wait(),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

impl Drop for Running {
    /// Whoever watched it is gone: it does not run on without a limit.
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            self.signal(Signal::KILL);
            std::thread::spawn(move || child.wait());
        }
    }
}

/// Runs `path` to its end.
pub(super) async fn run(spawner: &Spawner, path: &Path, environment: Vec<(&'static str, OsString)>, limit: Duration) -> Ended {
    let began = Instant::now();
    let mut output = Tail::default();
    let outcome = match file::check(path) {
        Err(problem) => HookOutcome::Refused { error: format!("it {problem}") },
        Ok(()) => match watched(spawner, path, environment, limit, &mut output).await {
            Ok(outcome) => outcome,
            Err(error) => HookOutcome::Refused { error: error.to_string() },
        },
    };
    Ended { outcome, took: began.elapsed(), output }
}

async fn watched(
    spawner: &Spawner,
    path: &Path,
    environment: Vec<(&'static str, OsString)>,
    limit: Duration,
    output: &mut Tail,
) -> io::Result<HookOutcome> {
    let (reader, writer) = io::pipe()?;
    let mut command = Command::new(path);
    command.env_clear().envs(environment).current_dir("/").process_group(0).stdin(Stdio::null());
    command.stdout(writer.try_clone()?).stderr(writer);
    let child = spawner.spawn(command).await?;
    let running = Running { group: Pid::from_child(&child), child: Some(child) };
    let group = running.group;
    // Looked at without reaping it, so that its id stays its own until the last signal.
    let mut ended =
        tokio::task::spawn_blocking(move || waitid(WaitId::Pid(group), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).map(drop));
    let mut printed = pipe::Receiver::from_owned_fd(OwnedFd::from(reader))?;
    let mut buf = vec![0; 16 << 10];
    let (mut is_open, mut signals) = (true, [Signal::TERM, Signal::KILL].into_iter());
    let mut deadline = tokio::time::Instant::now() + limit;
    let mut timed_out = false;
    loop {
        tokio::select! {
            biased;
            _ = &mut ended => break,
            () = tokio::time::sleep_until(deadline) => {
                timed_out = true;
                match signals.next() {
                    Some(signal) => running.signal(signal),
                    // In the kernel, where no signal reaches it. Dropping it leaves a thread behind that reaps it.
                    None => return Ok(HookOutcome::TimedOut { limit_ms: super::millis(limit) }),
                }
                deadline += GRACE;
            }
            read = printed.read(&mut buf), if is_open => match read {
                Ok(0) | Err(_) => is_open = false,
                Ok(n) => output.push(buf.get(..n).unwrap_or_default()),
            },
        }
    }
    let mut drained = 0;
    // Of the pipe itself, which does not wait: the runtime may not have heard yet that there is something in it.
    while let Ok(n @ 1..) = rustix::io::read(&printed, &mut buf) {
        output.push(buf.get(..n).unwrap_or_default());
        drained += n;
        if drained >= DRAIN_BYTES_MAX {
            break;
        }
    }
    if timed_out {
        // What it started belongs to what had to be ended. What a hook in time left running is its own affair.
        running.signal(Signal::KILL);
    }
    let status = running.reap()?;
    Ok(match (timed_out, status.code(), status.signal()) {
        (true, ..) => HookOutcome::TimedOut { limit_ms: super::millis(limit) },
        (_, Some(0), _) => HookOutcome::Succeeded,
        (_, Some(exit_code), _) => HookOutcome::Failed { exit_code },
        (_, None, signal) => HookOutcome::Killed { signal: signal.unwrap_or_default() },
    })
}
