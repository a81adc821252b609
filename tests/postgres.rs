//! A database on a replicated disk: the replicator is killed under load, and the copy must hold every transaction that was
//! acknowledged before the cut of the point.
//!
//! Would catch: an fsync that is acknowledged and not in the epoch, WAL and heap of different cuts, a cut time that claims more
//! than the epoch holds, damage in heap or index pages.

mod support;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::process::Signal;
use support::block::{self, Disk};
use support::node::Pair;
use support::{Process, eventually, need, need_root, one_at_a_time, run, scratch, seed, text, unix_us};

const DISK_BYTES: u64 = 2 << 30;
/// pgbench's scale and clients: enough to keep WAL, heap and checkpoints busy on a small machine.
const SCALE: &str = "4";
const CLIENTS: &str = "4";
/// The replicator is killed at a random moment of this span after the load began.
const KILL_AFTER_MS: std::ops::Range<u64> = 2_500..7_500;
/// Commits by the recording client that must be before the cut, or the test would show nothing.
const COMMITS_MIN: u64 = 20;

/// Programs of the newest PostgreSQL that is installed, where Debian keeps them.
fn programs() -> PathBuf {
    let found = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = found.filter_map(|e| Some((e.file_name().to_str()?.parse::<u32>().ok()?, e.path().join("bin")))).max();
    let (_, folder) = newest.expect("this test needs a PostgreSQL server: install the Debian package postgresql");
    assert!(folder.join("pg_amcheck").is_file(), "this test needs pg_amcheck: install the Debian package postgresql");
    folder
}

/// A PostgreSQL server on a mounted disk, run as the user postgres.
struct Server {
    programs: PathBuf,
    /// Folder of its unix socket, outside of the disk.
    sockets: PathBuf,
    process: Option<Process>,
}

impl Server {
    fn new(sockets: PathBuf) -> Self {
        std::fs::create_dir_all(&sockets).expect("a folder for sockets");
        run("chown", &["postgres:", sockets.to_str().expect("UTF-8")]);
        Self { programs: programs(), sockets, process: None }
    }

    /// A command as the user postgres; it replaces `setpriv`, so its process id is the program's.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--init-groups", "--"]).arg(self.programs.join(program));
        command.env("PGHOST", &self.sockets).env("PGUSER", "postgres").env("PGDATABASE", "postgres").env("LC_ALL", "C");
        command.current_dir(&self.sockets).stdin(Stdio::null());
        command
    }

    #[track_caller]
    fn call(&self, program: &str, args: &[&str]) -> String {
        let output: Output = self.command(program).args(args).output().expect("setpriv");
        assert!(output.status.success(), "{program} {}: {}\n{}", args.join(" "), output.status, text(&output));
        text(&output)
    }

    fn create(&self, data: &Path) {
        let data = data.to_str().expect("UTF-8");
        run("mkdir", &["-m", "0700", data]);
        run("chown", &["postgres:", data]);
        self.call("initdb", &["-D", data, "-A", "trust", "--no-sync", "--data-checksums", "-E", "UTF8"]);
        // Once for all of it is faster than file by file, and without it a crash would leave files that were never synced.
        run("sync", &["--file-system", data]);
    }

    /// Starts it and waits until it takes connections, which includes its recovery.
    fn start(&mut self, data: &Path) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log()).expect("its log");
        let mut command = self.command("postgres");
        command.arg("-D").arg(data).args(["-c", "listen_addresses=", "-c", "shared_buffers=64MB", "-c", "max_wal_size=128MB"]);
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

    fn log(&self) -> PathBuf {
        self.sockets.with_extension("log")
    }

    /// Ends it at once, without a checkpoint.
    fn end(&mut self) {
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
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
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
fn record(sockets: &Path) -> (Vec<u64>, io::Error) {
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
    }
}

#[test]
fn every_commit_acknowledged_before_the_cut_is_on_the_copy() {
    need_root();
    need(block::TOOLS);
    need(&[("mkfs.ext4", "e2fsprogs"), ("setpriv", "util-linux")]);
    programs();
    let _alone = one_at_a_time();
    let seed = seed();
    let kill_after = Duration::from_millis(SmallRng::seed_from_u64(seed).random_range(KILL_AFTER_MS));
    println!("the replicator is killed {} ms after the load began", kill_after.as_millis());

    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "100ms", &[("data", DISK_BYTES)]);
    let before = folder.path().join("mnt-before");
    let acknowledged = {
        let mut disk = Disk::attach(folder.path(), "before", &pair.sockets[0], "data");
        disk.mkfs("ext4");
        disk.mount(&before);
        let mut server = Server::new(folder.path().join("sockets-before"));
        let data = before.join("data");
        server.create(&data);
        server.start(&data);
        server.call("pgbench", &["--initialize", "--quiet", "--scale", SCALE]);
        server.call("psql", &["-qc", "CREATE TABLE acknowledged (number bigint PRIMARY KEY, filler text)"]);
        let mut bench = Process::start(
            server
                .command("pgbench")
                .args(["--client", CLIENTS, "--jobs", "1", "--time", "120"])
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        );
        // The first sync and the load of the tables are not what is tested.
        let begun = unix_us();
        eventually("epochs are committed under load", Duration::from_secs(60), || {
            pair.receiver.copy("primary", "db")["cut_unix_us"].as_u64().filter(|cut| *cut > begun)
        });
        let sockets = server.sockets.clone();
        let recorder = std::thread::spawn(move || record(&sockets));
        let kill_at = Instant::now() + kill_after;
        eventually("the random moment", kill_after + Duration::from_secs(5), || (Instant::now() >= kill_at).then_some(()));
        assert!(
            bench.runs(),
            "pgbench ended before the disk was lost: {}",
            std::fs::read_to_string(server.log()).unwrap_or_default()
        );
        pair.primary.kill();
        bench.kill();
        server.end();
        let (acknowledged, error) = recorder.join().expect("the recorder");
        println!("{} commits acknowledged, then: {error}", acknowledged.len());
        acknowledged
    };

    let (newest, cut) = pair.receiver.points("db").pop().expect("a point");
    let socket = folder.path().join("copy.sock");
    assert_eq!(pair.receiver.failover("db", None, &socket), newest, "a failover takes the newest point");
    let due = acknowledged.iter().filter(|at| **at < cut).count() as u64;
    assert!(due >= COMMITS_MIN, "only {due} commits before the cut of {newest}: nothing would be shown");

    let mut disk = Disk::attach(folder.path(), "after", &socket, "data");
    let after = folder.path().join("mnt-after");
    disk.mount(&after);
    let mut server = Server::new(folder.path().join("sockets-after"));
    server.start(&after.join("data"));
    let query = |sql: &str| server.call("psql", &["-qAtc", sql]).trim().to_owned();
    let (rows, last) = (
        query("SELECT count(*) FROM acknowledged").parse::<u64>().expect("a number"),
        query("SELECT coalesce(max(number), 0) FROM acknowledged").parse::<u64>().expect("a number"),
    );
    println!(
        "point {newest}: {due} commits acknowledged before its cut, {rows} present, {} acknowledged in all",
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
