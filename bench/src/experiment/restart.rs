//! What a primary sends again after it was killed while it was written: against what really differed, found by reading both images while
//! it was dead.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde::Serialize;
use serde_json::json;

use crate::chart::{Bar, Chart, Panel};
use crate::child::{self, Daemon};
use crate::context::Bench;
use crate::fio::{self, Load, Span};
use crate::nbd_client::NbdClient;
use crate::node::{self, DISK, Primary, Receiver};
use crate::report::{Check, Report, Table, whole};
use crate::stats::{median, range, ratio};
use crate::{dirty_log, disk, os, tools};

/// A disk and what is written to it.
struct Case {
    title: &'static str,
    disk_bytes: u64,
    load: Load,
}

const CASES: [Case; 3] = [
    Case { title: "16 GiB", disk_bytes: 16 << 30, load: load("4 KiB random write over 16 GiB, 5,000 a second", EVERYWHERE) },
    Case {
        title: "1 TiB, its first 16 GiB written",
        disk_bytes: 1 << 40,
        load: load("4 KiB random write to 16 of 1024 GiB, 5,000 a second", FIRST),
    },
    Case { title: "1 TiB", disk_bytes: 1 << 40, load: load("4 KiB random write over 1 TiB, 5,000 a second", EVERYWHERE) },
];
/// A rate at which epochs keep up: little differs at the kill, and all that a comparison costs counts against little.
const EVERYWHERE: &[&str] = &["--norandommap", "--random_generator=tausworthe64", "--rate_iops=5000"];
const FIRST: &[&str] = &["--norandommap", "--random_generator=tausworthe64", "--rate_iops=5000", "--size=16g"];

/// Sent at most: so many times what differed, and so many MiB more.
const TIMES: f64 = 4.0;
const MORE_MIB: f64 = 64.0;
const INTERVAL: &str = "1s";
/// Committed under the load before the kill, at least.
const EPOCHS_MIN: u64 = 2;
const EPOCHS_WITHIN: Duration = Duration::from_secs(60);
/// fio goes on until its server is gone.
const LOAD_MAX_S: u32 = 600;
const SYNC_MAX: Duration = Duration::from_secs(300);
/// The log forgets clean regions after one to two minutes.
const CLEAN_MAX: Duration = Duration::from_secs(180);
const RESYNC_MAX: Duration = Duration::from_secs(3600);
const FAILOVER_MAX: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(20);
/// From the start of the process to a guest's first write, and to the answer to a look at status: whatever the disk's size.
const START_MAX_S: f64 = 5.0;
const BLOCK: usize = 4096;

const fn load(title: &'static str, more: &'static [&'static str]) -> Load {
    Load { title, rw: "randwrite", bs: "4k", iodepth: 32, bandwidth: false, more }
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Sample {
    case: &'static str,
    epochs_before: u64,
    /// Found by reading both images while the primary was dead.
    differing_bytes: u64,
    /// What status showed afterwards.
    suspect_bytes: u64,
    compared_bytes: u64,
    found_differing_bytes: u64,
    frame_bytes: u64,
    udp_bytes: u64,
    /// From the start of the process until its control socket answered.
    control_s: f64,
    /// Until a block was read over NBD and written back.
    first_write_s: f64,
    /// The longest that status took, from then until the copy was as the disk.
    slowest_status_s: f64,
    /// Until the copy was as the disk.
    in_sync_s: f64,
    /// Found by reading both images at the end.
    left_differing_bytes: u64,
}

impl Sample {
    fn allowed_mib(&self) -> f64 {
        TIMES * mib(self.differing_bytes) + MORE_MIB
    }
}

pub(crate) fn run(bench: &Bench) -> Result<Report> {
    let needed = vec![tools::FIO, tools::CP];
    tools::require(&needed)?;
    let (rounds, seconds) = (bench.rounds(1, 2), bench.seconds(4, 8));
    let mut samples = Vec::new();
    for round in 0..rounds as usize {
        eprintln!(
            "restart: round {} of {rounds}: waiting a minute until the dirty logs have forgotten the first copies",
            round + 1
        );
        let mut groups = CASES.iter().map(|case| Group::start(bench, case)).collect::<Result<Vec<_>>>()?;
        groups.iter_mut().try_for_each(Group::wait_clean)?;
        for group in groups {
            eprintln!("restart: round {} of {rounds}: {}", round + 1, group.case.title);
            samples.push(group.measure(bench, Span { seconds, seed: round + 1 })?);
        }
    }
    Ok(report(&samples, rounds, seconds, needed))
}

/// A group in sync.
struct Group {
    case: &'static Case,
    file: PathBuf,
    receiver: Receiver,
    primary: Primary,
    // Ended in this order.
    daemon: Daemon,
    receiving: Daemon,
}

impl Group {
    fn start(bench: &Bench, case: &'static Case) -> Result<Self> {
        let name = bench.fresh("k");
        let file = bench.path(&format!("{name}.raw"));
        disk::sparse(&file, case.disk_bytes)?;
        let (receiver, primary) = node::pair_of_one(bench, &name, &file, INTERVAL)?;
        let receiving = receiver.start(bench)?;
        let mut daemon = primary.start(bench)?;
        primary.settle(&mut daemon, SYNC_MAX)?;
        Ok(Self { case, file, receiver, primary, daemon, receiving })
    }

    /// After a first copy all regions are marked, for a while.
    fn wait_clean(&mut self) -> Result<()> {
        let log = self.primary.dirty_log();
        self.daemon.wait_until("forgets clean regions", CLEAN_MAX, || Ok(dirty_log::read(&log)?.marked == 0))
    }

    fn measure(self, bench: &Bench, span: Span) -> Result<Sample> {
        let Self { case, file, receiver, primary, daemon, receiving } = self;
        let before = primary.status()?.epochs_committed;
        let mut load = fio::start(bench, &primary.socket(), &case.load, Span { seconds: LOAD_MAX_S, ..span })?;
        let start = Instant::now();
        let epochs_before = loop {
            os::check_stop()?;
            load.check_alive()?;
            let epochs = primary.status()?.epochs_committed - before;
            if start.elapsed() >= Duration::from_secs(span.seconds.into()) && epochs >= EPOCHS_MIN {
                break epochs;
            }
            if start.elapsed() > EPOCHS_WITHIN {
                bail!("{}: only {epochs} epochs were committed under load in {} s", case.title, EPOCHS_WITHIN.as_secs());
            }
            thread::sleep(LOOK);
        };
        daemon.kill()?;
        // Its server is gone, so how it ends means nothing. At a fixed rate it would go on to say so for each request.
        load.kill()?;
        // The store is at rest while it is copied.
        receiving.stop()?;
        let differing_bytes = differing(bench, &file, &receiver, &primary)?;
        ensure!(differing_bytes > 0, "{}: everything was committed when the primary was killed: nothing to measure", case.title);
        let receiving = receiver.start(bench)?;
        let start = Instant::now();
        let mut daemon = primary.start(bench)?;
        let control_s = start.elapsed().as_secs_f64();
        let mut guest = NbdClient::connect(&primary.socket(), DISK)?;
        let mut block = [0; BLOCK];
        guest.read(0, &mut block)?;
        guest.write(0, &block)?;
        let first_write_s = start.elapsed().as_secs_f64();
        drop(guest);
        let (mut suspect_bytes, mut slowest_status_s) = (0, 0.0_f64);
        let resynced_by = Instant::now() + RESYNC_MAX;
        loop {
            os::check_stop()?;
            daemon.check_alive()?;
            let asked = Instant::now();
            let status = primary.status()?;
            slowest_status_s = slowest_status_s.max(asked.elapsed().as_secs_f64());
            suspect_bytes = suspect_bytes.max(status.suspect_bytes);
            if status.state == "streaming" && status.committed.is_some() && status.dirty_bytes == 0 {
                break;
            }
            ensure!(asked < resynced_by, "{}: not in sync after {} s", case.title, RESYNC_MAX.as_secs());
            thread::sleep(LOOK);
        }
        let in_sync_s = start.elapsed().as_secs_f64();
        let status = primary.status()?;
        daemon.stop()?;
        receiving.stop()?;
        let left_differing_bytes = differing(bench, &file, &receiver, &primary)?;
        // Scattered blocks take space.
        fs::remove_file(&file)?;
        fs::remove_dir_all(receiver.store())?;
        Ok(Sample {
            case: case.title,
            epochs_before,
            differing_bytes,
            suspect_bytes,
            compared_bytes: status.compared_bytes,
            found_differing_bytes: status.differing_bytes,
            frame_bytes: status.sent_bytes,
            udp_bytes: status.wire_bytes,
            control_s,
            first_write_s,
            slowest_status_s,
            in_sync_s,
            left_differing_bytes,
        })
    }
}

/// Bytes at which the primary's disk differs from the newest point of the receiver, neither of which runs: the point is activated by another
/// receiver on a copy of the store, and read from there.
fn differing(bench: &Bench, file: &Path, receiver: &Receiver, primary: &Primary) -> Result<u64> {
    let name = bench.fresh("twin");
    let twin = receiver.twin(bench, &name)?;
    let viewing = twin.start(bench)?;
    let socket = bench.path(&format!("{name}.sock"));
    child::run(bench, "failover", twin.failover(primary, &socket), FAILOVER_MAX)?;
    let mut client = NbdClient::connect(&socket, DISK)?;
    let bytes = disk::differing_bytes(file, |at, to| client.read(at, to))?;
    drop(client);
    viewing.stop()?;
    fs::remove_dir_all(twin.store())?;
    Ok(bytes)
}

fn report(samples: &[Sample], rounds: u32, seconds: u32, tools: Vec<tools::Tool>) -> Report {
    let head = [
        "disk",
        "differed MiB",
        "found MiB",
        "suspect MiB",
        "compared MiB",
        "frames MiB",
        "UDP MiB",
        "allowed MiB",
        "in sync after s",
        "lowest..highest",
    ];
    let mut table = Table::new("after a restart (median)", &head);
    let head = ["disk", "control socket answers after s", "first write after s", "slowest status s"];
    let mut starts = Table::new("the start itself (slowest)", &head);
    let (mut checks, mut bars) = (Vec::new(), Vec::new());
    for case in &CASES {
        let of_case: Vec<&Sample> = samples.iter().filter(|s| s.case == case.title).collect();
        let all = |pick: &dyn Fn(&Sample) -> f64| of_case.iter().map(|s| pick(s)).collect::<Vec<_>>();
        let of = |pick: &dyn Fn(&Sample) -> f64| median(&all(pick));
        let (low, high) = range(&all(&|s| s.in_sync_s));
        table.row(vec![
            case.title.to_owned(),
            whole(of(&|s| mib(s.differing_bytes))),
            whole(of(&|s| mib(s.found_differing_bytes))),
            whole(of(&|s| mib(s.suspect_bytes))),
            whole(of(&|s| mib(s.compared_bytes))),
            whole(of(&|s| mib(s.frame_bytes))),
            whole(of(&|s| mib(s.udp_bytes))),
            whole(of(&|s| s.allowed_mib())),
            format!("{:.1}", of(&|s| s.in_sync_s)),
            format!("{low:.1}..{high:.1}"),
        ]);
        let slowest = |pick: &dyn Fn(&Sample) -> f64| all(pick).into_iter().reduce(f64::max).unwrap_or(f64::NAN);
        let (control, write) = (slowest(&|s| s.control_s), slowest(&|s| s.first_write_s));
        let status = slowest(&|s| s.slowest_status_s);
        starts.row(vec![case.title.to_owned(), format!("{control:.2}"), format!("{write:.2}"), format!("{status:.3}")]);
        let what = |of: &str| format!("{}: {of}, slowest round", case.title);
        checks.push(Check::at_most(what("from the start to the guest's first write"), write, START_MAX_S, "s"));
        checks.push(Check::at_most(what("answer to a look at status"), status, START_MAX_S, "s"));
        let worst = of_case.iter().max_by(|a, b| share(a).total_cmp(&share(b)));
        let (sent, allowed) = worst.map_or((f64::NAN, 0.0), |s| (mib(s.udp_bytes), s.allowed_mib()));
        let what =
            format!("{}: UDP payload sent again ({TIMES} times what differed and {MORE_MIB} MiB), worst round", case.title);
        checks.push(Check::at_most(what, sent, allowed, "MiB"));
        let found = all(&|s| 100.0 * s.found_differing_bytes as f64 / s.differing_bytes as f64);
        let least = if found.is_empty() { f64::NAN } else { range(&found).0 };
        checks.push(Check::at_least(format!("{}: of what differed found by its hash", case.title), least, 100.0, "%"));
        let left = of_case.iter().map(|s| mib(s.left_differing_bytes)).reduce(f64::max);
        checks.push(Check::at_most(format!("{}: differs at the end", case.title), left.unwrap_or(f64::NAN), 0.0, "MiB"));
        bars.push(Bar { label: format!("{}: differed", case.title), value: of(&|s| mib(s.differing_bytes)), ours: false });
        bars.push(Bar { label: format!("{}: sent", case.title), value: of(&|s| mib(s.udp_bytes)), ours: true });
    }
    let disks: Vec<_> = CASES.iter().map(|c| json!({ "disk": c.title, "bytes": c.disk_bytes, "load": c.load.title })).collect();
    Report {
        name: "restart",
        title: "a primary killed under random writes, and what it sends when it is started again".to_owned(),
        parameters: json!({ "rounds": rounds, "seconds_of_writes": seconds, "interval": INTERVAL, "disks": disks }),
        results: json!(samples),
        tables: vec![table, starts],
        checks,
        chart: Chart {
            title: "Sent again after a kill".to_owned(),
            panels: vec![Panel {
                title: "What differed and what was sent (UDP payload)".to_owned(),
                axis: format!("MiB (median of {rounds} rounds)"),
                bars,
                bound: None,
            }],
        },
        tools,
    }
}

/// How much of what it may send it sent.
fn share(sample: &Sample) -> f64 {
    ratio(mib(sample.udp_bytes), sample.allowed_mib())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
