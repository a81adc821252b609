//! Runs a script of the user to its end, or to its time limit, and keeps the end of what it prints.
//!
//! Always holds: when [`run`] returns, or when the process that called it is gone, killed or not, nothing of the script's process group runs any more;
//! of its output no more than [`OUTPUT_BYTES_MAX`] is held. A script that prints megabytes is never blocked by us. Must not know what the
//! script is for.
//!
//! The second one is why a script has a guard: this program again, between the two and the leader of the group. Its standard input is a
//! socket whose other end is ours; when that is closed, nobody is left who wants the script.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Parser;
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, Signal, getpgrp, getpid, kill_current_process_group, kill_process_group};

use crate::cli::human::sanitised;
use crate::cli::interrupt;

/// Most of the output that is kept, in bytes: its end.
pub(crate) const OUTPUT_BYTES_MAX: usize = receiver::drill::OUTPUT_BYTES_MAX;
/// Longest remark, in characters.
const REMARK_CHARS_MAX: usize = 200;
/// From SIGTERM to SIGKILL.
const GRACE: Duration = Duration::from_secs(5);
/// How long a process that left the group may keep the output open.
const OUTPUT_LINGER: Duration = Duration::from_secs(1);
/// Most time that what is left in the pipe then may take to be read.
const OUTPUT_READ_MAX: Duration = Duration::from_secs(10);
/// From one look at the process to the next.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Longest report of a guard, in bytes.
const REPORT_BYTES_MAX: u64 = 4096;
/// The first argument of a guard.
pub(crate) const GUARD: &str = "script-guard";

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    /// An executable file.
    pub(crate) path: PathBuf,
    /// Added to our own environment.
    pub(crate) env: Vec<(String, OsString)>,
    /// It is ended after this time.
    pub(crate) timeout: Duration,
    /// Whom it runs as; our own user by default.
    pub(crate) user: Option<User>,
    /// Where it runs; our own folder by default.
    pub(crate) folder: Option<PathBuf>,
}

/// A user of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl User {
    /// Of /etc/passwd.
    pub(crate) fn named(name: &str) -> Option<Self> {
        let text = std::fs::read_to_string("/etc/passwd").ok()?;
        text.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            match fields.as_slice() {
                [found, _, uid, gid, ..] if *found == name => Some(Self { uid: uid.parse().ok()?, gid: gid.parse().ok()? }),
                _ => None,
            }
        })
    }
}

/// Why a file cannot be run; the path goes before it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unfit {
    #[error("is not there: {0}")]
    Missing(io::Error),
    #[error("is not a file: name an executable script")]
    NotAFile,
    #[error("is not executable: run chmod +x on it")]
    NotExecutable,
}

/// Whether a file can be run, as far as a look at it tells.
pub(crate) fn check(path: &Path) -> Result<(), Unfit> {
    let found = std::fs::metadata(path).map_err(Unfit::Missing)?;
    if !found.is_file() {
        return Err(Unfit::NotAFile);
    }
    if found.permissions().mode() & 0o111 == 0 { Err(Unfit::NotExecutable) } else { Ok(()) }
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// By itself, with this code.
    Exited(i32),
    /// By a signal that was not ours.
    Killed(i32),
    /// It ran for too long.
    TimedOut,
    /// Whoever wanted it does not any more.
    Cancelled,
    /// It could not be started.
    NotRun,
}

/// What is left of it.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub(crate) end: End,
    pub(crate) took: Duration,
    /// The last line that is not empty, or why there is none.
    pub(crate) remark: String,
    /// The end of what it printed, both streams.
    pub(crate) output: String,
}

/// The end of an output.
#[derive(Debug, Default)]
struct Tail {
    end: Vec<u8>,
    /// Bytes of all of it so far.
    bytes: u64,
}

impl Tail {
    fn add(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        let bytes = bytes.get(bytes.len().saturating_sub(OUTPUT_BYTES_MAX)..).unwrap_or_default();
        let excess = (self.end.len() + bytes.len()).saturating_sub(OUTPUT_BYTES_MAX);
        self.end.drain(..excess.min(self.end.len()));
        self.end.extend_from_slice(bytes);
    }
}

/// Runs it; blocks. `show` gets the output as it comes, on a thread of its own.
pub(crate) fn run(script: &Script, cancelled: &AtomicBool, show: impl FnMut(&[u8]) + Send + 'static) -> Ended {
    run_as(guarded(script), script, cancelled, show)
}

/// The script, with a guard around it.
fn guarded(script: &Script) -> Command {
    // The program that runs now, also if there is another one at its path by now.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("twinsite").arg(GUARD);
    if let Some(User { uid, gid }) = script.user {
        command.arg(format!("--uid={uid}")).arg(format!("--gid={gid}"));
    }
    if let Some(folder) = &script.folder {
        command.arg("--folder").arg(folder);
    }
    command.arg("--").arg(&script.path);
    command
}

/// The script itself.
fn plain(path: &Path, user: Option<User>, folder: Option<&Path>) -> Command {
    let mut command = Command::new(path);
    if let Some(User { uid, gid }) = user {
        command.uid(uid).gid(gid);
    }
    if let Some(folder) = folder {
        command.current_dir(folder);
    }
    command
}

fn run_as(command: Command, script: &Script, cancelled: &AtomicBool, show: impl FnMut(&[u8]) + Send + 'static) -> Ended {
    let began = Instant::now();
    let not_run = |error: &dyn std::fmt::Display| {
        let remark = format!("{}: cannot be run: {error}", script.path.display());
        Ended { end: End::NotRun, took: began.elapsed(), remark, output: String::new() }
    };
    let tail = Arc::new(Mutex::new(Tail::default()));
    let started = start(command, script, Arc::clone(&tail), show);
    let mut started = match started {
        Ok(started) => started,
        Err(error) => return not_run(&error),
    };
    let (end, broken) = match watch(&mut started.child, began + script.timeout, cancelled) {
        Ok((_, Some(end))) => (end, None),
        Ok((status, None)) => match reported(&started.guard).unwrap_or_else(|| told(status)) {
            Report::Exited(code) => (End::Exited(code), None),
            Report::Killed(signal) => (End::Killed(signal), None),
            Report::NotRun(error) => return not_run(&error),
        },
        Err(error) => (End::Killed(0), Some(format!("cannot wait for the script: {error}"))),
    };
    let took = began.elapsed();
    started.output_ends(&tail);
    let output = String::from_utf8_lossy(&tail.lock().end).into_owned();
    let last = output.lines().rev().map(str::trim).find(|line| !line.is_empty());
    let last = last.map(|line| sanitised(line).chars().take(REMARK_CHARS_MAX).collect::<String>());
    let remark = match (broken, end, last) {
        (Some(broken), ..) => broken,
        (None, End::TimedOut, last) => {
            let said = last.map_or_else(String::new, |last| format!("; it last said: {last}"));
            format!("did not end within {}{said}", crate::cli::human::ms(script.timeout.as_millis() as u64))
        }
        (None, _, last) => last.unwrap_or_default(),
    };
    Ended { end, took, remark, output }
}

struct Started {
    child: Child,
    /// Our end of the guard's standard input; while it is open somebody wants the script.
    guard: UnixStream,
    /// Nobody sends; the end of the sender is the end of the output.
    closed: mpsc::Receiver<()>,
    /// The pipe that it is read from.
    output: OwnedFd,
}

impl Started {
    /// Waits for the end of the output. Who was left running may hold the pipe open; what is in it by then is read all the same.
    fn output_ends(&self, tail: &Mutex<Tail>) {
        if self.closed.recv_timeout(OUTPUT_LINGER) == Err(mpsc::RecvTimeoutError::Timeout) {
            let (until, all) = (Instant::now() + OUTPUT_READ_MAX, {
                let read = tail.lock();
                read.bytes + rustix::io::ioctl_fionread(&self.output).unwrap_or(0)
            });
            while tail.lock().bytes < all && Instant::now() < until {
                std::thread::sleep(LOOK_EVERY);
            }
        }
    }
}

fn start(
    mut command: Command,
    script: &Script,
    tail: Arc<Mutex<Tail>>,
    mut show: impl FnMut(&[u8]) + Send + 'static,
) -> io::Result<Started> {
    let (mut reader, writer) = io::pipe()?;
    let (guard, theirs) = UnixStream::pair()?;
    guard.set_read_timeout(Some(OUTPUT_LINGER))?;
    command.envs(script.env.iter().map(|(k, v)| (k, v))).process_group(0);
    command.stdin(OwnedFd::from(theirs)).stdout(writer.try_clone()?).stderr(writer);
    let child = command.spawn()?;
    // Our ends of the pipe: without this the output never ends.
    drop(command);
    let output = OwnedFd::from(reader.try_clone()?);
    let (open, closed) = mpsc::channel();
    let read = move || {
        let mut buf = vec![0; 64 << 10];
        loop {
            let ready = rustix::event::poll(&mut [PollFd::new(&reader, PollFlags::IN)], None);
            if ready == Err(rustix::io::Errno::INTR) {
                continue;
            }
            // There is something to be read, or the end: this waits for nobody. What is not in the pipe any more is in the tail.
            let mut kept = tail.lock();
            let Ok(n @ 1..) = reader.read(&mut buf) else { break };
            let bytes = buf.get(..n).unwrap_or_default();
            kept.add(bytes);
            drop(kept);
            show(bytes);
        }
        drop(open);
    };
    std::thread::Builder::new().name("script-output".to_owned()).spawn(read)?;
    Ok(Started { child, guard, closed, output })
}

/// Waits for the end of the process, and ends its group at the latest then. Returns its status, and why it was told to end, if it was.
fn watch(child: &mut Child, until: Instant, cancelled: &AtomicBool) -> io::Result<(ExitStatus, Option<End>)> {
    let group = Pid::from_child(child);
    let signal = |signal| match kill_process_group(group, signal) {
        // Nobody is left in it.
        Err(rustix::io::Errno::SRCH) | Ok(()) => {}
        Err(error) => tracing::debug!(%error, "a script's process group cannot be ended"),
    };
    // Why it was told to end, and when it is killed.
    let mut ending: Option<(End, Instant)> = None;
    let end = loop {
        if let Some(status) = child.try_wait()? {
            break (status, ending.map(|(end, _)| end));
        }
        let now = Instant::now();
        match ending {
            Some((_, kill_at)) if now >= kill_at => signal(Signal::KILL),
            Some(_) => {}
            None => {
                let why = if cancelled.load(Ordering::Relaxed) { Some(End::Cancelled) } else { None };
                if let Some(end) = why.or((now >= until).then_some(End::TimedOut)) {
                    ending = Some((end, now + GRACE));
                    signal(Signal::TERM);
                }
            }
        }
        std::thread::sleep(LOOK_EVERY);
    };
    signal(Signal::KILL);
    Ok(end)
}

/// What a guard says of its script.
enum Report {
    Exited(i32),
    Killed(i32),
    NotRun(String),
}

impl Report {
    fn encode(&self) -> String {
        match self {
            Self::Exited(code) => format!("exited {code}"),
            Self::Killed(signal) => format!("killed {signal}"),
            Self::NotRun(error) => format!("not-run {error}"),
        }
    }

    fn decode(text: &str) -> Option<Self> {
        match text.split_once(' ')? {
            ("exited", code) => Some(Self::Exited(code.parse().ok()?)),
            ("killed", signal) => Some(Self::Killed(signal.parse().ok()?)),
            ("not-run", error) => Some(Self::NotRun(error.to_owned())),
            _ => None,
        }
    }
}

/// What the guard, which has ended, has said; nothing if it was killed itself.
fn reported(guard: &UnixStream) -> Option<Report> {
    let mut text = String::new();
    guard.take(REPORT_BYTES_MAX).read_to_string(&mut text).ok()?;
    Report::decode(&text)
}

/// `twinsite script-guard`.
#[derive(Parser)]
pub(crate) struct GuardArgs {
    /// Run it as this user
    #[arg(long, requires = "gid")]
    uid: Option<u32>,
    /// And this group
    #[arg(long, requires = "uid")]
    gid: Option<u32>,
    /// Run it there
    #[arg(long)]
    folder: Option<PathBuf>,
    /// The script
    path: PathBuf,
}

/// Runs a script as a part of this process group and says on standard input, which is a socket, how it ended. Ends the whole group, itself included, when
/// the script has ended, or when the socket is closed at the other end: SIGTERM, and SIGKILL after a while.
///
/// # Errors
/// If it was not started as a guard is, or the system lets it not be one.
pub(crate) fn guard(args: &GuardArgs) -> anyhow::Result<()> {
    if getpgrp() != getpid() {
        bail!("{GUARD} is started by twinsite itself");
    }
    // What the group is told is for the script; this process hears it too, and stays.
    interrupt::cancels(&Arc::default())?;
    let abandoned = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&abandoned);
    std::thread::Builder::new().name("abandoned".to_owned()).spawn(move || {
        let mut stdin = io::stdin().lock();
        // Nothing is ever sent this way: whatever this returns with, the other end is gone.
        let _ = io::copy(&mut stdin, &mut io::sink());
        flag.store(true, Ordering::Relaxed);
    })?;
    let user = args.uid.zip(args.gid).map(|(uid, gid)| User { uid, gid });
    let started = plain(&args.path, user, args.folder.as_deref()).stdin(Stdio::null()).spawn();
    let report = match started {
        Ok(child) => guarded_to_its_end(child, &abandoned)?,
        Err(error) => Report::NotRun(error.to_string()),
    };
    // Whoever would hear it may be gone.
    let _ = rustix::io::write(io::stdin(), report.encode().as_bytes());
    kill_current_process_group(Signal::KILL)?;
    Ok(())
}

fn guarded_to_its_end(mut child: Child, abandoned: &AtomicBool) -> io::Result<Report> {
    let mut kill_at = None;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(told(status));
        }
        match kill_at {
            Some(at) if Instant::now() >= at => kill_current_process_group(Signal::KILL)?,
            None if abandoned.load(Ordering::Relaxed) => {
                kill_at = Some(Instant::now() + GRACE);
                kill_current_process_group(Signal::TERM)?;
            }
            Some(_) | None => {}
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn told(status: ExitStatus) -> Report {
    match (status.code(), status.signal()) {
        (Some(code), _) => Report::Exited(code),
        (None, signal) => Report::Killed(signal.unwrap_or(0)),
    }
}

/// Writes a program for a test, by a process of its own: what this one has open for writing is open in whatever another test forks at that
/// moment, too, and cannot be run.
#[cfg(test)]
pub(crate) fn executable(path: &Path, text: &str) {
    use std::io::Write;
    let mut install = Command::new("install").args(["-m", "755", "/dev/stdin"]).arg(path).stdin(Stdio::piped()).spawn().unwrap();
    install.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(install.wait().unwrap().success(), "{}", path.display());
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn script(folder: &Path, text: &str) -> Script {
        let path = folder.join("script");
        executable(&path, &format!("#!/bin/sh\n{text}\n"));
        Script { path, env: Vec::new(), timeout: Duration::from_secs(20), user: None, folder: None }
    }

    /// Without a guard, which this test is not the program of; `tests/drill.rs` has scripts with theirs.
    fn run_plain(script: &Script, cancelled: &AtomicBool, show: impl FnMut(&[u8]) + Send + 'static) -> Ended {
        run_as(plain(&script.path, script.user, script.folder.as_deref()), script, cancelled, show)
    }

    fn ended(script: &Script) -> Ended {
        run_plain(script, &AtomicBool::new(false), |_| {})
    }

    #[test]
    fn reports_read_back() {
        for text in ["exited -3", "killed 9", "not-run Permission denied (os error 13)"] {
            assert_eq!(Report::decode(text).unwrap().encode(), text);
        }
        assert!(Report::decode("exited").is_none() && Report::decode("exited x").is_none() && Report::decode("").is_none());
    }

    #[test]
    fn the_last_line_is_the_remark_and_the_code_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut one = script(dir.path(), "echo first; echo \"$WHAT boots\" >&2; echo; exit 3");
        one.env.push(("WHAT".to_owned(), "it".into()));
        let found = ended(&one);
        assert_eq!((found.end, found.remark.as_str()), (End::Exited(3), "it boots"));
        assert_eq!(found.output, "first\nit boots\n\n");
        one.path = dir.path().join("nothing");
        let found = ended(&one);
        assert_eq!(found.end, End::NotRun);
        assert!(found.remark.contains("nothing: cannot be run"), "{}", found.remark);
        assert_eq!(ended(&script(dir.path(), "kill -9 $$")).end, End::Killed(9));
    }

    /// Would catch an output that is held in memory, or a script that waits for somebody who reads it.
    #[test]
    fn megabytes_of_output_are_read_and_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let seen = Arc::new(Mutex::new(0));
        let count = Arc::clone(&seen);
        let found = run_plain(
            &script(dir.path(), "head -c 20000000 /dev/zero | tr '\\0' x; echo; echo done"),
            &AtomicBool::new(false),
            move |bytes| *count.lock() += bytes.len(),
        );
        assert_eq!((found.end, found.remark.as_str()), (End::Exited(0), "done"));
        assert!(found.output.len() <= OUTPUT_BYTES_MAX && found.output.ends_with("x\ndone\n"));
        assert_eq!(*seen.lock(), 20_000_006);
    }

    /// Would catch a remark that is lost because whoever watches the output is slow.
    #[test]
    fn what_is_printed_last_is_kept_however_late_it_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let one = script(dir.path(), "echo first; sleep 0.3; setsid sleep 4 & echo last");
        let found = run_plain(&one, &AtomicBool::new(false), |_| std::thread::sleep(OUTPUT_LINGER + Duration::from_millis(800)));
        assert_eq!((found.end, found.remark.as_str()), (End::Exited(0), "last"), "{}", found.output);
    }

    /// Would catch a time limit that only the script itself obeys, and a child that outlives it and keeps us waiting.
    #[test]
    fn a_script_that_hangs_is_ended_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let hang = format!("sleep 1000 & echo $! > {}; echo waiting; wait", pid.display());
        let mut one = script(dir.path(), &hang);
        one.timeout = Duration::from_secs(3);
        let began = Instant::now();
        let found = ended(&one);
        assert_eq!(found.end, End::TimedOut);
        assert_eq!(found.remark, "did not end within 3.0 s; it last said: waiting");
        assert!(began.elapsed() < one.timeout + Duration::from_millis(3500), "ended by SIGTERM");
        let child = std::fs::read_to_string(&pid).unwrap();
        let gone = || match std::fs::read_to_string(format!("/proc/{}/stat", child.trim())) {
            // An orphan that nobody has waited for yet is as good as gone.
            Ok(stat) => stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')),
            Err(_) => true,
        };
        let until = Instant::now() + Duration::from_secs(10);
        while !gone() {
            assert!(Instant::now() < until, "the child still runs");
            std::thread::sleep(LOOK_EVERY);
        }
        let cancelled = AtomicBool::new(true);
        assert_eq!(run_plain(&script(dir.path(), "sleep 1000"), &cancelled, |_| {}).end, End::Cancelled);
    }

    /// Would catch SIGTERM being asked for and never enforced.
    #[test]
    fn a_script_that_ignores_sigterm_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let mut one = script(dir.path(), "trap '' TERM; while :; do sleep 0.1; done");
        one.timeout = Duration::from_secs(2);
        let found = ended(&one);
        assert_eq!(found.end, End::TimedOut);
        assert!(found.took >= one.timeout + GRACE, "{:?}", found.took);
    }
}
