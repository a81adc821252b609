//! The whole life of a protected server with a database on its disk: protect, load, drill, disaster, failover, the old primary back, failback,
//! switchover and home again, rollback. At each step the database is exactly what it should be.
//!
//! Would catch any step that loses a commit, brings one back, mixes two histories, or damages heap, index or file system, and a command that
//! does not do what the one before left it with.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use support::block::Disk;
use support::node::{COMMIT_WITHIN, Pair};
use support::postgres::{self, Server, record_and_tell};
use support::{Process, eventually, need, one_at_a_time, run, scratch, text};

const DISK_BYTES: u64 = 1 << 30;
const SCALE: &str = "2";
/// Rows of each step, each a transaction of its own.
const ROWS: u64 = 150;
/// Commits of the recording client before the disaster, or it would show nothing.
const COMMITS_MIN: usize = 50;

/// What a drill does with a disk: the file system's own check of a copy of it.
const CHECK: &str = "#!/bin/sh
set -e
image=$(mktemp)
trap 'rm -f $image' EXIT
nbdcopy --no-progress \"$TWINSITE_EXPORT\" \"$image\" 2> /dev/null || nbdcopy \"$TWINSITE_EXPORT\" \"$image\"
e2fsck -fp \"$image\" > /dev/null || test $? = 1
echo \"file system is sound at $TWINSITE_POINT\"
";

/// A server on a disk; both are taken down when it is dropped, the server first.
struct Site {
    server: Server,
    disk: Disk,
}

impl Site {
    fn open(folder: &Path, name: &str, socket: &Path, make: bool) -> Self {
        let mut disk = Disk::attach(folder, name, socket, "data");
        let (mount, mut server) = (folder.join(format!("mnt-{name}")), Server::new(folder.join(format!("sockets-{name}"))));
        if make {
            disk.mkfs("ext4");
        }
        disk.mount(&mount);
        let data = mount.join("data");
        if make {
            server.create(&data);
        }
        server.start(&data);
        if make {
            server.fill(SCALE);
            server.call("psql", &["-qc", "CREATE TABLE story (step text, number bigint, PRIMARY KEY (step, number))"]);
        }
        Self { server, disk }
    }

    fn query(&self, sql: &str) -> String {
        self.server.call("psql", &["-qAtc", sql]).trim().to_owned()
    }

    /// Rows of a step, and pgbench beside them.
    fn load(&self, step: &str) {
        let bench = self
            .server
            .command("pgbench")
            .args(["-n", "-c", "2", "-t", "150"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let rows: String = (1..=ROWS).map(|n| format!("INSERT INTO story VALUES ('{step}', {n});\n")).collect();
        let file = self.server.sockets.join(format!("{step}.sql"));
        std::fs::write(&file, rows).expect("the statements");
        self.server.call("psql", &["-q", "-v", "ON_ERROR_STOP=1", "-f", file.to_str().expect("UTF-8")]);
        let ended = bench.expect("pgbench").wait().expect("pgbench");
        assert!(ended.success(), "pgbench: {ended}");
    }

    /// Holds the rows of these steps and of no other, pgbench's books agree, heap and indexes are sound.
    #[track_caller]
    fn holds(&self, steps: &[&str]) {
        let found = self.query("SELECT step || ' ' || count(*) FROM story GROUP BY step ORDER BY min(step)");
        let mut wanted: Vec<String> = steps.iter().map(|step| format!("{step} {ROWS}")).collect();
        wanted.sort();
        assert_eq!(found.lines().collect::<Vec<_>>(), wanted, "after {steps:?}");
        let books = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)";
        assert_eq!(self.query(books), "t", "the balances do not agree with the history");
        let checked = self.server.call("pg_amcheck", &["--all", "--install-missing", "--heapallindexed", "--parent-check"]);
        println!("{steps:?}: exactly these; pg_amcheck: clean{}", checked.trim());
    }

    /// An orderly end of the guest.
    fn close(mut self) {
        self.server.call("psql", &["-qc", "CHECKPOINT"]);
        self.server.end();
        self.disk.unmount();
    }
}

#[track_caller]
fn failed_back(pair: &Pair) {
    let output = pair.primary.ask(&["failback", "db", "--yes", "--json"]);
    assert!(output.status.success(), "{}\n{}\n{}", text(&output), pair.primary.log(), pair.receiver.log());
    println!("failback: {}", text(&output).lines().filter(|l| l.contains("_bytes") || l.contains("elapsed")).collect::<String>());
}

#[test]
fn a_protected_server_lives_through_all_of_it() {
    postgres::needed();
    need(&[("nbdcopy", "libnbd-bin"), ("e2fsck", "e2fsprogs")]);
    let _alone = one_at_a_time();
    let folder = scratch();
    let path = folder.path();
    let mut pair = Pair::start(path, "db", "100ms", &[("data", DISK_BYTES)]);
    let home = pair.sockets[0].clone();

    // Protect and load.
    let site = Site::open(path, "one", &home, true);
    site.load("protected");
    eventually("the load is committed", COMMIT_WITHIN, || (!pair.primary.primary("db")["committed"].is_null()).then_some(()));

    // A drill beside it.
    let script = path.join("check.sh");
    std::fs::write(&script, CHECK).expect("the script");
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).expect("its mode");
    let told = pair.receiver.cli(&["drill", "db", "--run", script.to_str().expect("UTF-8")]);
    assert!(told.contains("file system is sound"), "{told}");

    // The disaster, under load.
    let mut bench = Process::start(
        site.server.command("pgbench").args(["-n", "-c", "2", "-T", "120"]).stdout(Stdio::null()).stderr(Stdio::null()),
    );
    let sockets = site.server.sockets.clone();
    let so_far = Arc::new(AtomicUsize::new(0));
    let told = Arc::clone(&so_far);
    let recorder = std::thread::spawn(move || record_and_tell(&sockets, |commits| told.store(commits, Ordering::SeqCst)));
    std::thread::sleep(Duration::from_secs(3));
    eventually("commits", COMMIT_WITHIN, || (so_far.load(Ordering::SeqCst) >= COMMITS_MIN).then_some(()));
    assert!(bench.runs(), "pgbench ended before the disaster");
    pair.primary.kill();
    bench.kill();
    drop(site);
    let (acknowledged, error) = recorder.join().expect("the recorder");
    println!("{} commits acknowledged, then: {error}", acknowledged.len());
    assert!(acknowledged.len() >= COMMITS_MIN, "{} commits: nothing would be shown", acknowledged.len());

    // Failover: every commit before the cut, and no gap.
    let away = path.join("active.sock");
    let (_, cut) = pair.receiver.failover_newest("db", &away);
    let site = Site::open(path, "two", &away, false);
    site.holds(&["protected"]);
    let due = acknowledged.iter().filter(|at| **at < cut).count() as u64;
    let rows: u64 = site.query("SELECT count(*) FROM acknowledged").parse().expect("a number");
    let last: u64 = site.query("SELECT coalesce(max(number), 0) FROM acknowledged").parse().expect("a number");
    assert!(rows == last && rows >= due && rows <= acknowledged.len() as u64 + 1, "{due} due, {rows} there, the last is {last}");
    site.load("failed-over");

    // The old primary comes back, and takes its disk back.
    pair.primary.start();
    eventually("it learns that it is fenced", COMMIT_WITHIN, || (pair.primary.primary("db")["state"] == "fenced").then_some(()));
    site.holds(&["protected", "failed-over"]);
    site.close();
    failed_back(&pair);
    let site = Site::open(path, "three", &home, false);
    site.holds(&["protected", "failed-over"]);
    assert_eq!(site.query("SELECT count(*) FROM acknowledged"), rows.to_string(), "what the copy did not have stays out");
    site.load("failed-back");
    site.close();

    // There on purpose, and home again.
    let export = format!("unix:{}", away.display());
    pair.receiver.json(&["switchover", "db", "--export", &export, "--yes"]);
    let site = Site::open(path, "four", &away, false);
    site.holds(&["protected", "failed-over", "failed-back"]);
    site.load("switched-over");
    site.close();
    failed_back(&pair);
    let site = Site::open(path, "five", &home, false);
    let all = ["protected", "failed-over", "failed-back", "switched-over"];
    site.holds(&all);
    site.close();
    pair.primary.settled("db");
    let good = pair.receiver.points("db").pop().expect("a point").0;

    // Somebody drops a table; the disk goes back to the point before.
    let site = Site::open(path, "six", &home, false);
    site.load("mistake");
    site.query("DROP TABLE pgbench_accounts; DELETE FROM story WHERE step = 'protected'");
    site.close();
    let output = pair.primary.ask(&["rollback", "db", "--point", &good, "--yes", "--json"]);
    assert!(output.status.success(), "{}\n{}", text(&output), pair.receiver.log());
    let site = Site::open(path, "seven", &home, false);
    site.holds(&all);
    site.load("rolled-back");
    site.close();
    pair.primary.settled("db");
    let report = pair.primary.json(&["verify", "db"]);
    assert_eq!(report["differing_bytes"], 0, "{report:#}");
    run("e2fsck", &["-f", "-n", pair.images[0].to_str().expect("UTF-8")]);
}
