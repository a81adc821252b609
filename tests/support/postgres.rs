//! A PostgreSQL server as the guest's program, a client that knows which commits were acknowledged, and what a copy must hold.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::block::{self, Disk};
use super::{Process, eventually, need, need_root, run, text, unix_us};

/// A commit that takes longer is a failure, not a hang: the disk of a guest is held while its server is started again.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// Programs of the newest PostgreSQL that is installed, where Debian keeps them.
fn programs() -> PathBuf {
    let found = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = found.filter_map(|e| Some((e.file_name().to_str()?.parse::<u32>().ok()?, e.path().join("bin")))).max();
    let (_, folder) = newest.expect("this test needs a PostgreSQL server: install the Debian package postgresql");
    assert!(folder.join("pg_amcheck").is_file(), "this test needs pg_amcheck: install the Debian package postgresql");
    folder
}

/// Says what a test of a database on a mounted disk is missing, before anything of it is started.
pub(crate) fn needed() {
    need_root();
    need(block::TOOLS);
    need(&[("mkfs.ext4", "e2fsprogs"), ("setpriv", "util-linux")]);
    programs();
}

/// A PostgreSQL server on a mounted disk, run as the user postgres.
#[derive(Debug)]
pub(crate) struct Server {
    programs: PathBuf,
    /// Folder of its unix socket, outside of the disk.
    pub(crate) sockets: PathBuf,
    process: Option<Process>,
}

impl Server {
    /// Stopped; `sockets` is made for its user.
    pub(crate) fn new(sockets: PathBuf) -> Self {
        std::fs::create_dir_all(&sockets).expect("a folder for sockets");
        run("chown", &["postgres:", sockets.to_str().expect("UTF-8")]);
        Self { programs: programs(), sockets, process: None }
    }

    /// A command as the user postgres; it replaces `setpriv`, so its process id is the program's.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--init-groups", "--"]).arg(self.programs.join(program));
        command.env("PGHOST", &self.sockets).env("PGUSER", "postgres").env("PGDATABASE", "postgres").env("LC_ALL", "C");
        command.current_dir(&self.sockets).stdin(Stdio::null());
        command
    }

    /// Runs one of its programs to its end; fails with what it printed.
    #[track_caller]
    pub(crate) fn call(&self, program: &str, args: &[&str]) -> String {
        let output: Output = self.command(program).args(args).output().expect("setpriv");
        assert!(output.status.success(), "{program} {}: {}\n{}", args.join(" "), output.status, text(&output));
        text(&output)
    }

    /// Makes an empty cluster.
    pub(crate) fn create(&self, data: &Path) {
        let data = data.to_str().expect("UTF-8");
        run("mkdir", &["-m", "0700", data]);
        run("chown", &["postgres:", data]);
        self.call("initdb", &["-D", data, "-A", "trust", "--no-sync", "--data-checksums", "-E", "UTF8"]);
        // Once for all of it is faster than file by file, and without it a crash would leave files that were never synced.
        run("sync", &["--file-system", data]);
    }

    /// pgbench's tables, and the one of [`record`].
    pub(crate) fn fill(&self, scale: &str) {
        self.call("pgbench", &["--initialize", "--quiet", "--scale", scale]);
        self.call("psql", &["-qc", "CREATE TABLE acknowledged (number bigint PRIMARY KEY, filler text)"]);
    }

    /// Starts it and waits until it takes connections, which includes its recovery.
    pub(crate) fn start(&mut self, data: &Path) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log()).expect("its log");
        let mut command = self.command("postgres");
        command.arg("-D").arg(data).args(["-c", "listen_addresses=", "-c", "shared_buffers=64MB", "-c", "max_wal_size=48MB"]);
        // A recovery syncs every file of the cluster first, a thousand of them; where a sync is slow that takes minutes.
        command.args(["-c", "recovery_init_sync_method=syncfs"]);
        command.arg("-c").arg(format!("unix_socket_directories={}", self.sockets.display()));
        command.stdout(log.try_clone().expect("its log")).stderr(log);
        // A group of its own, so that the end of the test's terminal is not its end.
        self.process = Some(Process::start(command.process_group(0)));
        eventually("PostgreSQL takes connections", Duration::from_secs(90), || {
            let log = self.log();
            assert!(
                self.process.as_mut().expect("started").runs(),
                "ended: {}",
                std::fs::read_to_string(log).unwrap_or_default()
            );
            self.command("pg_isready").arg("-q").status().expect("pg_isready").success().then_some(())
        });
    }

    /// Its log.
    pub(crate) fn log(&self) -> PathBuf {
        self.sockets.with_extension("log")
    }

    /// Ends it at once, without a checkpoint.
    pub(crate) fn end(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.signal(Signal::QUIT);
            // A server whose disk is gone may hang in it; dropping the process kills it.
            let until = Instant::now() + Duration::from_secs(10);
            while process.runs() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// A client of PostgreSQL's protocol 3, just large enough to know when a commit is acknowledged: `psql` would buffer.
struct Client {
    stream: UnixStream,
}

impl Client {
    fn connect(sockets: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(sockets.join(".s.PGSQL.5432"))?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        let mut client = Self { stream };
        let parameters = b"user\0postgres\0database\0postgres\0\0";
        let mut startup = (parameters.len() as u32 + 8).to_be_bytes().to_vec();
        startup.extend(196_608_u32.to_be_bytes());
        startup.extend(parameters);
        client.stream.write_all(&startup)?;
        client.ready(|_, _| {})?;
        Ok(client)
    }

    /// Reads messages up to ReadyForQuery.
    fn ready(&mut self, mut each: impl FnMut(u8, &[u8])) -> io::Result<()> {
        loop {
            let mut header = [0; 5];
            self.stream.read_exact(&mut header)?;
            let length = u32::from_be_bytes(header[1..].try_into().expect("four bytes"));
            let mut body = vec![0; length.saturating_sub(4) as usize];
            self.stream.read_exact(&mut body)?;
            match header[0] {
                b'E' => return Err(io::Error::other(String::from_utf8_lossy(&body).replace('\0', " "))),
                b'Z' => return Ok(()),
                kind => each(kind, &body),
            }
        }
    }

    /// Runs one statement, a transaction of its own. Returns the time at which its completion was read.
    fn execute(&mut self, statement: &str) -> io::Result<u64> {
        let mut query = vec![b'Q'];
        query.extend((statement.len() as u32 + 5).to_be_bytes());
        query.extend(statement.as_bytes());
        query.push(0);
        self.stream.write_all(&query)?;
        let mut completed = None;
        self.ready(|kind, _| {
            if kind == b'C' {
                completed = Some(unix_us());
            }
        })?;
        completed.ok_or_else(|| io::Error::other("no completion"))
    }
}

/// Commits numbers one after the other until the server fails. Returns when each was acknowledged; the first is number 1.
pub(crate) fn record(sockets: &Path) -> (Vec<u64>, io::Error) {
    record_and_tell(sockets, |_| {})
}

/// The same; says after each how many there are.
pub(crate) fn record_and_tell(sockets: &Path, tell: impl Fn(usize)) -> (Vec<u64>, io::Error) {
    let mut acknowledged = Vec::new();
    let mut client = match Client::connect(sockets) {
        Ok(client) => client,
        Err(error) => return (acknowledged, error),
    };
    loop {
        let number = acknowledged.len() + 1;
        match client.execute(&format!("INSERT INTO acknowledged VALUES ({number}, repeat('x', {}))", number % 700)) {
            Ok(at) => acknowledged.push(at),
            Err(error) => return (acknowledged, error),
        }
        tell(acknowledged.len());
    }
}

/// Starts a server on the copy of a disk and checks that it holds every commit that was acknowledged before the cut, that these are
/// a prefix of all, that pgbench's sums agree, and that heap, indexes and file system are sound.
#[track_caller]
pub(crate) fn verify_copy(folder: &Path, socket: &Path, export: &str, point: &str, cut_unix_us: u64, acknowledged: &[u64]) {
    let due = acknowledged.iter().filter(|at| **at < cut_unix_us).count() as u64;
    let mut disk = Disk::attach(folder, "after", socket, export);
    let after = folder.join("mnt-after");
    disk.mount(&after);
    let mut server = Server::new(folder.join("sockets-after"));
    server.start(&after.join("data"));
    let query = |sql: &str| server.call("psql", &["-qAtc", sql]).trim().to_owned();
    let (rows, last) = (
        query("SELECT count(*) FROM acknowledged").parse::<u64>().expect("a number"),
        query("SELECT coalesce(max(number), 0) FROM acknowledged").parse::<u64>().expect("a number"),
    );
    println!(
        "point {point}: {due} commits acknowledged before its cut, {rows} present, {} acknowledged in all",
        acknowledged.len()
    );
    assert_eq!(rows, last, "the commits present are not a prefix of those made");
    assert!(rows >= due, "commit {} was acknowledged before the cut and is not there", rows + 1);
    // The one in flight when the disk was lost may be there as well.
    assert!(rows <= acknowledged.len() as u64 + 1, "{rows} commits present, {} were made", acknowledged.len());
    // The bank's own invariant: pgbench adds each amount to one account, one teller, one branch and the history.
    let sums = query(
        "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history) \
         AND (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history) \
         AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)",
    );
    assert_eq!(sums, "t", "the balances do not agree with the history");
    let found = server.call("pg_amcheck", &["--all", "--install-missing", "--heapallindexed", "--parent-check"]);
    println!("pg_amcheck: clean{}{}", if found.trim().is_empty() { "" } else { ": " }, found.trim());
    server.end();
    disk.unmount();
    run("e2fsck", &["-f", "-n", disk.device()]);
}
