//! One of the demo's two sites: a folder and a real `twinsite run` process.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use proto::Fingerprint;

use crate::key;

/// A node that is not ready by then will not be.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// Lines of its log that a failure shows.
const LOG_LINES: usize = 15;

/// A site; its process ends with it.
pub(super) struct Site {
    name: &'static str,
    folder: PathBuf,
    child: Option<Child>,
}

impl Site {
    pub(super) fn new(parent: &Path, name: &'static str) -> anyhow::Result<Self> {
        let folder = parent.join(name);
        fs::create_dir(&folder).with_context(|| format!("{}: cannot make the folder", folder.display()))?;
        Ok(Self { name, folder, child: None })
    }

    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    pub(super) fn key(&self) -> anyhow::Result<Fingerprint> {
        Ok(key::load_or_create(&self.path("state"))?.fingerprint())
    }

    pub(super) fn control(&self) -> PathBuf {
        self.path("state").join("control.sock")
    }

    /// Writes the configuration: `[node]`, then `rest`.
    pub(super) fn configure(&self, rest: &str) -> anyhow::Result<()> {
        let text = format!("[node]\nname = \"{}\"\nstate_dir = \"state\"\n\n{rest}", self.name);
        fs::write(self.path("twinsite.toml"), text).context("cannot write a configuration")
    }

    /// A command of this site.
    pub(super) fn command(&self, args: &[&str]) -> anyhow::Result<Command> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut command = Command::new(program);
        command.args(args).arg("--config").arg(self.path("twinsite.toml")).stdin(Stdio::null());
        Ok(command)
    }

    /// Starts the node and waits until it says that it is ready.
    pub(super) fn start(&mut self) -> anyhow::Result<()> {
        let log = File::create(self.path("log")).context("cannot make a log file")?;
        let mut command = self.command(&["run", "--with-parent"])?;
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().context("cannot start a node")?;
        let stdout = child.stdout.take();
        self.child = Some(child);
        let (said, ready) = mpsc::channel();
        // Ends with the node's output.
        std::thread::spawn(move || {
            for line in stdout.into_iter().flat_map(|out| BufReader::new(out).lines()).map_while(Result::ok) {
                if line == "ready" && said.send(()).is_err() {
                    return;
                }
            }
        });
        if ready.recv_timeout(READY_WITHIN).is_err() {
            bail!("the {} node did not get ready:\n{}", self.name, self.log_tail());
        }
        Ok(())
    }

    /// SIGKILL: no goodbye, nothing flushed.
    pub(super) fn kill(&mut self) -> anyhow::Result<()> {
        let mut child = self.child.take().ok_or_else(|| anyhow!("the {} node does not run", self.name))?;
        child.kill().context("cannot kill the primary")?;
        child.wait().context("cannot wait for the primary")?;
        Ok(())
    }

    /// The end of its log, for failures.
    pub(super) fn log_tail(&self) -> String {
        let text = fs::read_to_string(self.path("log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines.iter().skip(lines.len().saturating_sub(LOG_LINES)).map(|l| format!("  {l}\n")).collect()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
