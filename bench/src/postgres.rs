//! A PostgreSQL 15 of Debian on a mounted disk, run as the user postgres, reached over a unix socket.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::child::{self, Daemon};
use crate::context::Bench;
use crate::tools;

const USER: &str = "postgres";
const START_MAX: Duration = Duration::from_secs(120);
const SETUP_MAX: Duration = Duration::from_secs(1800);

/// A cluster; its server runs while a [`Daemon`] of it lives.
#[derive(Debug)]
pub(crate) struct Cluster {
    data: PathBuf,
    sockets: PathBuf,
    uid: u32,
    gid: u32,
}

impl Cluster {
    /// A cluster whose data will be below the mount point `mount`.
    pub(crate) fn new(bench: &Bench, mount: &Path) -> Result<Self> {
        let users = fs::read_to_string("/etc/passwd").context("/etc/passwd: cannot be read")?;
        let (uid, gid) = ids(&users, USER).context("no user postgres: run apt-get install postgresql-15")?;
        // The user postgres must reach its socket and its data.
        fs::set_permissions(bench.path(""), fs::Permissions::from_mode(0o755))
            .context("the temporary folder: cannot be opened up")?;
        let cluster = Self { data: mount.join("data"), sockets: bench.path("pg"), uid, gid };
        cluster.folder(&cluster.sockets)?;
        Ok(cluster)
    }

    fn folder(&self, path: &Path) -> Result<()> {
        let made = fs::create_dir_all(path).and_then(|()| chown(path, Some(self.uid), Some(self.gid)));
        made.with_context(|| format!("{}: cannot be made", path.display()))
    }

    fn command(&self, program: &str) -> Result<Command> {
        let path = tools::find(program).with_context(|| format!("{program}: not found: run apt-get install postgresql-15"))?;
        let mut command = Command::new(path);
        command.uid(self.uid).gid(self.gid).current_dir(&self.sockets);
        command.env("PGHOST", &self.sockets).env("PGUSER", USER).env("PGDATABASE", USER).env("LC_ALL", "C");
        Ok(command)
    }

    /// `initdb`, with Debian's defaults.
    pub(crate) fn create(&self, bench: &Bench) -> Result<()> {
        self.folder(&self.data)?;
        fs::set_permissions(&self.data, fs::Permissions::from_mode(0o700)).context("the data folder: cannot be closed")?;
        let mut command = self.command("initdb")?;
        command.arg("-D").arg(&self.data).args(["-A", "trust", "-E", "UTF8"]);
        child::run(bench, "initdb", command, SETUP_MAX).map(drop)
    }

    /// Starts the server, with a checkpoint every `checkpoint_s` seconds, and waits until it answers.
    pub(crate) fn start(&self, bench: &Bench, checkpoint_s: u32) -> Result<Daemon> {
        let mut command = self.command("postgres")?;
        command.arg("-D").arg(&self.data).args(["-c", "listen_addresses=", "-c"]);
        command.arg(format!("unix_socket_directories={}", self.sockets.display()));
        command.arg("-c").arg(format!("checkpoint_timeout={checkpoint_s}s"));
        let mut daemon = Daemon::spawn(bench, "postgres", command)?;
        let socket = self.sockets.join(".s.PGSQL.5432");
        daemon.wait_until("accepts connections", START_MAX, || Ok(socket.exists() && self.sql(bench, "select 1").is_ok()))?;
        Ok(daemon)
    }

    pub(crate) fn sql(&self, bench: &Bench, text: &str) -> Result<String> {
        let mut command = self.command("psql")?;
        command.args(["-qAtX", "-c", text]);
        child::run(bench, "psql", command, SETUP_MAX)
    }

    /// pgbench's tables.
    pub(crate) fn fill(&self, bench: &Bench, scale: u32) -> Result<()> {
        let mut command = self.command("pgbench")?;
        command.args(["-i", "-q", "-s", &scale.to_string()]);
        child::run(bench, "pgbench-init", command, SETUP_MAX).map(drop)
    }

    /// pgbench at a fixed rate; `watch` is called often meanwhile. Returns the transactions a second that were reached.
    pub(crate) fn load(&self, bench: &Bench, rate: u32, seconds: u32, watch: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let mut command = self.command("pgbench")?;
        command.args(["-n", "-c", "8", "-j", "2", "-R", &rate.to_string(), "-T", &seconds.to_string()]);
        let limit = Duration::from_secs(u64::from(seconds) + 120);
        let text = child::run_watched(bench, "pgbench", command, limit, watch)?;
        tps(&text).context("pgbench: no tps line in its output")
    }
}

/// User and group number of a line of passwd(5).
fn ids(users: &str, name: &str) -> Option<(u32, u32)> {
    let line = users.lines().find(|l| l.split(':').next() == Some(name))?;
    let mut fields = line.split(':').skip(2);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

/// `tps = 399.1 (without initial connection time)`.
fn tps(text: &str) -> Option<f64> {
    let line = text.lines().find_map(|l| l.strip_prefix("tps = "))?;
    line.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_rates_are_read() {
        let users = "root:x:0:0:root:/root:/bin/sh\npostgres:x:105:112:PostgreSQL,,,:/var/lib/postgresql:/bin/bash\n";
        assert_eq!(ids(users, "postgres"), Some((105, 112)));
        assert_eq!(ids(users, "post"), None);
        assert_eq!(tps("latency average = 5 ms\ntps = 399.125 (without initial connection time)\n"), Some(399.125));
        assert_eq!(tps("nothing"), None);
    }
}
