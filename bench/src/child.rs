//! Processes. A [`Daemon`] is ended by its pid when dropped; a run waits for its end but not longer than asked, nor after ctrl-c.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::context::Bench;
use crate::{os, procfs};

/// How often a wait looks again.
const LOOK: Duration = Duration::from_millis(10);
/// A process that ignores SIGTERM this long is killed.
const STOP_MAX: Duration = Duration::from_secs(20);

/// A process that runs until it is told to stop.
#[derive(Debug)]
pub(crate) struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command`; its output goes to a log in the temporary folder.
    pub(crate) fn spawn(bench: &Bench, name: &str, command: Command) -> Result<Self> {
        let (child, log, _) = spawn(bench, name, command)?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// CPU time so far.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        procfs::cpu(self.pid())
    }

    /// An error if it has ended.
    pub(crate) fn check_alive(&mut self) -> Result<()> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => bail!("{} ended ({status}): {}", self.name, last_line(&self.log)),
            Err(error) => bail!("{}: cannot be waited for: {error}", self.name),
        }
    }

    /// Waits until `ready` while the process lives.
    pub(crate) fn wait_until(&mut self, what: &str, limit: Duration, mut ready: impl FnMut() -> Result<bool>) -> Result<()> {
        let end = Instant::now() + limit;
        while !ready()? {
            os::check_stop()?;
            self.check_alive()?;
            if Instant::now() > end {
                bail!("{}: {what}: not within {} s: {}", self.name, limit.as_secs(), last_line(&self.log));
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    /// The last thing it said.
    pub(crate) fn last_line(&self) -> String {
        last_line(&self.log)
    }

    /// Waits for its own successful end.
    pub(crate) fn finish(mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            match self.child.try_wait().with_context(|| format!("{}: cannot be waited for", self.name))? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("{}: {status}: {}", self.name, self.last_line()),
                None if Instant::now() > deadline => bail!("{}: not done within {} s", self.name, limit.as_secs()),
                None => thread::sleep(Duration::from_millis(1)),
            }
            os::check_stop()?;
        }
    }

    /// Ends it with SIGKILL, as a crash would.
    pub(crate) fn kill(mut self) -> Result<()> {
        self.child.kill().and_then(|()| self.child.wait()).with_context(|| format!("{}: cannot be killed", self.name))?;
        Ok(())
    }

    /// Ends it in order.
    pub(crate) fn stop(mut self) -> Result<()> {
        match end(&mut self.child, STOP_MAX) {
            Some(_) => Ok(()),
            None => bail!("{}: did not stop on SIGTERM within {} s and was killed", self.name, STOP_MAX.as_secs()),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        end(&mut self.child, STOP_MAX);
    }
}

/// SIGTERM, then SIGKILL. `None` if it had to be killed.
fn end(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    if let Ok(Some(status)) = child.try_wait() {
        return Some(status);
    }
    signal(child.id(), Signal::TERM);
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        thread::sleep(LOOK);
    }
    // It cannot be gone in between: it is only reaped here.
    let _ = child.kill();
    let _ = child.wait();
    None
}

fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // The only failure is that the process has ended, which is what is wanted.
        let _ = kill_process(pid, signal);
    }
}

fn spawn(bench: &Bench, name: &str, mut command: Command) -> Result<(Child, PathBuf, PathBuf)> {
    os::check_stop()?;
    bench.record(&command);
    let log = bench.log_path(name);
    let out = log.with_extension("out");
    let create = |path: &PathBuf| File::create(path).with_context(|| format!("{}: cannot create", path.display()));
    command.stdin(Stdio::null()).stdout(create(&out)?).stderr(create(&log)?);
    os::bind_to_us(&mut command);
    let child = command.spawn().with_context(|| format!("{name}: cannot start {}", command.get_program().to_string_lossy()))?;
    Ok((child, log, out))
}

/// Runs `command` to its end and returns what it printed.
pub(crate) fn run(bench: &Bench, name: &str, command: Command, limit: Duration) -> Result<String> {
    run_watched(bench, name, command, limit, &mut || Ok(()))
}

/// As [`run`], calling `watch` every [`LOOK`] or so meanwhile.
pub(crate) fn run_watched(
    bench: &Bench,
    name: &str,
    command: Command,
    limit: Duration,
    watch: &mut dyn FnMut() -> Result<()>,
) -> Result<String> {
    let (child, log, out) = spawn(bench, name, command)?;
    let mut daemon = Daemon { name: name.to_owned(), child, log };
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = daemon.child.try_wait().with_context(|| format!("{name}: cannot be waited for"))? {
            break status;
        }
        os::check_stop()?;
        if Instant::now() > deadline {
            bail!("{name}: not done within {} s", limit.as_secs());
        }
        watch()?;
        thread::sleep(LOOK);
    };
    let text = fs::read_to_string(&out).with_context(|| format!("{}: cannot read", out.display()))?;
    if !status.success() {
        bail!("{name}: {status}: {}", last_line(&daemon.log));
    }
    Ok(text)
}

fn last_line(log: &PathBuf) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let line = text.lines().rev().find(|l| !l.trim().is_empty());
    line.map_or_else(|| "it printed no reason".to_owned(), |l| l.trim().chars().take(300).collect())
}
