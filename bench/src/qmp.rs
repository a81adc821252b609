//! QMP over a unix socket: enough to start a mirror job and to watch it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::os;

const PATIENCE: Duration = Duration::from_secs(60);

/// A monitor.
#[derive(Debug)]
pub(crate) struct Qmp {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

/// How far a job is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) ready: bool,
    pub(crate) left: u64,
}

impl Qmp {
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let failed = || format!("{}: no QMP monitor", socket.display());
        let stream = UnixStream::connect(socket).with_context(failed)?;
        stream.set_read_timeout(Some(PATIENCE)).with_context(failed)?;
        let lines = BufReader::new(stream.try_clone().with_context(failed)?);
        let mut qmp = Self { stream, lines };
        qmp.line().with_context(failed)?;
        qmp.execute("qmp_capabilities", json!({})).with_context(failed)?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            bail!("the monitor closed the connection");
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// What `command` returns; events in between are dropped.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        writeln!(self.stream, "{}", json!({ "execute": command, "arguments": arguments }))?;
        loop {
            let line = self.line().with_context(|| format!("QMP {command}: no answer"))?;
            if let Some(error) = line.get("error") {
                bail!("QMP {command}: {}", error.get("desc").and_then(Value::as_str).unwrap_or("refused"));
            }
            if let Some(value) = line.get("return") {
                return Ok(value.clone());
            }
        }
    }

    /// How far the only job is.
    pub(crate) fn progress(&mut self) -> Result<Progress> {
        progress(&self.execute("query-jobs", json!({}))?)
    }

    /// Waits until the mirror is complete and follows with nothing left.
    pub(crate) fn settle(&mut self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            os::check_stop()?;
            let now = self.progress()?;
            if now.ready && now.left == 0 {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("blockdev-mirror: still {} MiB behind after {} s", now.left >> 20, limit.as_secs());
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

fn progress(jobs: &Value) -> Result<Progress> {
    let job = jobs.get(0).context("blockdev-mirror: the job is gone")?;
    let text = |key: &str| job.get(key).and_then(Value::as_str).unwrap_or_default();
    let number = |key: &str| job.get(key).and_then(Value::as_u64).unwrap_or_default();
    if !text("error").is_empty() {
        bail!("blockdev-mirror: {}", text("error"));
    }
    let left = number("total-progress").saturating_sub(number("current-progress"));
    Ok(Progress { ready: text("status") == "ready", left })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_of_a_job() {
        let jobs = json!([{ "status": "ready", "current-progress": 5, "total-progress": 8, "id": "m", "type": "mirror" }]);
        assert_eq!(progress(&jobs).unwrap(), Progress { ready: true, left: 3 });
        assert!(progress(&json!([])).is_err());
        assert!(progress(&json!([{ "status": "concluded", "error": "No space left" }])).is_err());
    }
}
