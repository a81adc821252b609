//! Both sides are killed again and again under load: no guest sees an error or a mismatch, and every view still equals its cut.
//!
//! One group of four disks. Two have writers of the test's own, which remember what was acknowledged when; `fio --verify` works on the
//! third and PostgreSQL on the fourth, with pgbench and a client that records every acknowledged commit. In a cycle the replicator, the
//! receiver or both get SIGKILL at a random moment, also while they catch up with the last one, and are started again; the guests keep
//! their connections to a QEMU that holds requests meanwhile. After every three cycles the guests are held and every point of the
//! store is read: the newest must equal the images, byte for byte, and each must hold the writes that its cut promises and be what it
//! was at the last look. At the end the primary is lost for good, and the copy must have every commit acknowledged before its cut.
//!
//! `TWINSITE_TORTURE_CYCLES` is the number of cycles of each kind (`make torture CYCLES=100`), `TWINSITE_SEED` repeats a run.
//!
//! Would catch: a request that is answered and lost with its process, dirty blocks that are forgotten, epochs that are half there or
//! twice after a recovery, a commit that was told and not kept, points that change, a node that does not come back.

mod support;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::seq::{IndexedRandom, IteratorRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use receiver::PointInfo;
use rustix::process::Signal;
use support::block::Disk;
use support::history::{BLOCK_BYTES, History};
use support::nbd::Nbd;
use support::node::{COMMIT_WITHIN, Pair};
use support::postgres::{self, Server, record};
use support::qemu::{self, Reconnecting};
use support::writers::{Target, Writers};
use support::{Process, eventually, need, one_at_a_time, scratch, seed, views};

const MIB: u64 = 1 << 20;
const GROUP: &str = "all";
/// Of the test's own writers.
const OWN: [(&str, u64); 2] = [("left", MIB), ("right", MIB)];
const FIO: (&str, u64) = ("fio", 32 * MIB);
const PG: (&str, u64) = ("pg", 384 * MIB);
const WRITERS: u32 = 3;
const INTERVAL: &str = "40ms";
/// Cycles of each kind, unless `TWINSITE_TORTURE_CYCLES` says otherwise.
const CYCLES: u32 = 5;
/// Cycles of each kind on one store; then everything is made anew, so that a long run needs no more space than a short one.
const CYCLES_OF_A_ROUND: u32 = 5;
/// Points that are committed before the next kill, at most. None: it may hit a side that is catching up.
const POINTS_MAX: u64 = 40;
/// And then this long at most.
const MOMENT_MS_MAX: u64 = 300;
/// From a kill to the next start, at most.
const DOWN_MS_MAX: u64 = 200;
/// Points that were looked at before and are looked at again in each check; at the end of a round it is all.
const AGAIN: usize = 20;
/// PostgreSQL's load.
const SCALE: &str = "1";
const TRANSACTIONS_PER_SECOND: &str = "100";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Victim {
    Replicator,
    Receiver,
    Both,
}

impl Victim {
    const ALL: [Self; 3] = [Self::Replicator, Self::Receiver, Self::Both];

    fn replicator(self) -> bool {
        self != Self::Receiver
    }

    fn receiver(self) -> bool {
        self != Self::Replicator
    }
}

impl fmt::Display for Victim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Replicator => "the replicator",
            Self::Receiver => "the receiver",
            Self::Both => "both",
        })
    }
}

/// What was done and seen, for the summary.
#[derive(Default)]
struct Totals {
    cycles: HashMap<Victim, u32>,
    kills: HashMap<Victim, u32>,
    points: HashMap<Victim, u64>,
    compared: u64,
    writes: u64,
    fio_runs: u64,
    commits: u64,
    reconnections: u64,
    longest: Duration,
}

/// `fio --verify`, again and again.
struct Fio {
    stop: Arc<AtomicBool>,
    runs: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<(), String>>>,
}

impl Fio {
    fn start(socket: &Path, export: &str, folder: &Path, seed: u64) -> Self {
        let (stop, runs) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&runs));
        let uri = format!("--uri=nbd+unix:///{export}?socket={}", socket.display());
        let folder = folder.to_path_buf();
        let thread = std::thread::spawn(move || {
            loop {
                let printed = folder.join("fio.log");
                let log = File::create(&printed).map_err(|e| e.to_string())?;
                let mut fio = Command::new("fio");
                fio.args(["--name=torture", "--ioengine=nbd", "--thread", "--rw=randwrite", "--bsrange=4k-64k", "--size=4m"]);
                fio.args(["--iodepth=8", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--rate_iops=300,300"]);
                fio.arg(format!("--randseed={}", seed + counted.load(Ordering::SeqCst))).arg(&uri).current_dir(&folder);
                fio.stdout(log.try_clone().map_err(|e| e.to_string())?).stderr(log);
                let mut fio = Process::start(&mut fio);
                while fio.runs() {
                    // Not to its end: a fio whose disk is gone may never come to one.
                    if stopped.load(Ordering::SeqCst) {
                        return Ok(());
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                let status = fio.ended(Duration::ZERO);
                if !status.success() {
                    return Err(format!("{status}\n{}", std::fs::read_to_string(&printed).unwrap_or_default()));
                }
                counted.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self { stop, runs, thread: Some(thread) }
    }

    #[track_caller]
    fn fine(&mut self) {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            let ended = self.thread.take().expect("looked at").join().expect("its thread");
            panic!("fio ended: {}", ended.expect_err("it ends with an error, or when it is told to"));
        }
    }

    fn stop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The guests of one round. Dropped from the top: fio ends while its disk is there, and a QEMU that is gone lets the others end.
struct Guests {
    fio: Fio,
    qemu: Reconnecting,
    writers: Writers,
    bench: Process,
    recorder: Option<JoinHandle<(Vec<u64>, io::Error)>>,
    server: Server,
    disk: Disk,
    /// What PostgreSQL's log had before the load.
    log_from: usize,
}

impl Guests {
    fn start(folder: &Path, pair: &Pair, seed: u64) -> Self {
        let [_, _, fio, pg] = <&[PathBuf; 4]>::try_from(&pair.sockets[..]).expect("four disks");
        let qemu = Reconnecting::start(folder, &[(fio, FIO.0), (pg, PG.0)]);
        let mut disk = Disk::attach(folder, "guest", &qemu.socket, PG.0);
        disk.mkfs("ext4");
        let mount = folder.join("mnt-guest");
        disk.mount(&mount);
        let mut server = Server::new(folder.join("sockets-guest"));
        let data = mount.join("data");
        server.create(&data);
        server.start(&data);
        server.fill(SCALE);
        let log_from = std::fs::read(server.log()).map_or(0, |log| log.len());
        let bench = Process::start(
            server
                .command("pgbench")
                .args(["--client", "2", "--jobs", "1", "--time", "86400", "--rate", TRANSACTIONS_PER_SECOND])
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        );
        let sockets = server.sockets.clone();
        let recorder = Some(std::thread::spawn(move || record(&sockets)));
        let targets: Vec<_> = OWN
            .iter()
            .zip(&pair.sockets)
            .map(|((name, bytes), socket)| Target {
                socket: socket.clone(),
                export: (*name).to_owned(),
                blocks: bytes / BLOCK_BYTES as u64,
            })
            .collect();
        let writers = Writers::start(&targets, WRITERS, seed);
        let fio = Fio::start(&qemu.socket, FIO.0, folder, seed);
        Self { qemu, writers, fio, bench, recorder, server, disk, log_from }
    }

    /// Fails if a guest had an error.
    #[track_caller]
    fn fine(&mut self) {
        self.writers.fine();
        self.fio.fine();
        let log = std::fs::read(self.server.log()).expect("PostgreSQL's log");
        let log = String::from_utf8_lossy(&log[self.log_from..]).into_owned();
        let errors: Vec<_> = log.lines().filter(|l| ["ERROR:", "FATAL:", "PANIC:"].iter().any(|word| l.contains(word))).collect();
        assert!(errors.is_empty(), "PostgreSQL: {errors:?}");
        assert!(self.bench.runs(), "pgbench ended:\n{log}");
        assert!(!self.recorder.as_ref().is_some_and(JoinHandle::is_finished), "a commit failed:\n{log}");
        let name = self.disk.device().trim_start_matches("/dev/");
        let errors = std::fs::read_to_string(format!("/sys/fs/ext4/{name}/errors_count")).expect("ext4's count of errors");
        assert_eq!(errors.trim(), "0", "ext4 found errors");
    }

    /// The loss of their machine. Returns when each commit was acknowledged.
    fn lost(&mut self) -> Vec<u64> {
        self.fio.stop();
        self.qemu.kill();
        self.writers.stop();
        self.bench.kill();
        self.server.end();
        let (acknowledged, error) = self.recorder.take().expect("once").join().expect("the recorder");
        println!("{} commits acknowledged, then: {error}", acknowledged.len());
        acknowledged
    }
}

/// One store and its guests. The folder is last: it can be removed only when nothing is mounted in it any more.
struct Round {
    guests: Guests,
    pair: Pair,
    rng: SmallRng,
    /// Every point that was listed, oldest first.
    listed: Vec<(String, u64)>,
    /// After which kill it was first listed.
    after: HashMap<String, Victim>,
    /// Checksums of the writers' disks at each point that was read, and of all disks where they were compared with the images.
    seen: HashMap<String, u32>,
    compared: HashMap<String, u32>,
    folder: tempfile::TempDir,
}

/// Waits a random time.
fn moment(rng: &mut SmallRng, ms_max: u64) {
    let until = Instant::now() + Duration::from_millis(rng.random_range(0..=ms_max));
    eventually("a random moment", Duration::from_secs(5), || (Instant::now() >= until).then_some(()));
}

impl Round {
    fn start(seed: u64) -> Self {
        let folder = scratch();
        let disks: Vec<_> = OWN.into_iter().chain([FIO, PG]).collect();
        let pair = Pair::start(folder.path(), GROUP, INTERVAL, &disks);
        let guests = Guests::start(folder.path(), &pair, seed);
        let rng = SmallRng::seed_from_u64(seed);
        let mut round = Self {
            folder,
            guests,
            pair,
            rng,
            listed: Vec::new(),
            after: HashMap::new(),
            seen: HashMap::new(),
            compared: HashMap::new(),
        };
        round.pair.primary.committed_once(GROUP);
        round.list(None);
        round
    }

    fn points(&self) -> u64 {
        self.pair.receiver.copy("primary", GROUP)["points"].as_u64().unwrap_or_default()
    }

    /// Lists the points: none that was there may be gone.
    #[track_caller]
    fn list(&mut self, after: Option<Victim>) {
        let now = self.pair.receiver.points(GROUP);
        assert!(now.starts_with(&self.listed), "points that were there before are gone");
        for (point, _) in &now[self.listed.len()..] {
            if let Some(victim) = after {
                self.after.insert(point.clone(), victim);
            }
        }
        self.listed = now;
    }

    /// Kills at a random moment and starts again. Returns how long the commits took to go on, if that was waited for.
    fn cycle(&mut self, victim: Victim) {
        let before = self.points();
        let more = if self.rng.random_ratio(1, 3) { 0 } else { self.rng.random_range(1..=POINTS_MAX) };
        let since = Instant::now();
        eventually("points are committed between two kills", COMMIT_WITHIN, || (self.points() >= before + more).then_some(()));
        moment(&mut self.rng, MOMENT_MS_MAX);
        let told = self.pair.primary.primary(GROUP);
        println!(
            "kill {victim}: after {more} points and {:.1} s, {}, committed {}",
            since.elapsed().as_secs_f64(),
            told["state"],
            told["committed"]
        );
        if victim.replicator() {
            self.pair.primary.signal(Signal::KILL);
        }
        if victim.receiver() {
            self.pair.receiver.kill();
        }
        if victim.replicator() {
            self.pair.primary.kill();
        }
        moment(&mut self.rng, DOWN_MS_MAX);
        let primary_first = self.rng.random_bool(0.5);
        if victim.replicator() && primary_first {
            self.pair.primary.start();
        }
        if victim.receiver() {
            self.pair.receiver.start();
        }
        self.list(Some(victim));
        if let Some(told) = told["committed"].as_str() {
            assert!(self.listed.iter().any(|(point, _)| point == told), "{told} was committed before the kill and is gone");
        }
        if victim.replicator() && !primary_first {
            self.pair.primary.start();
        }
        self.guests.fine();
    }

    /// Holds the guests, lets everything be committed, and looks at every point of the store.
    fn check(&mut self, victim: Victim, totals: &mut Totals) {
        let began = Instant::now();
        let Self { guests, pair, rng, listed, after, seen, compared, .. } = self;
        let kill = rng.random_bool(0.5);
        let images: Vec<_> = pair.images.iter().map(|path| File::open(path).expect("an image")).collect();
        // Most older points are left for the end.
        let again: HashSet<String> = listed.choose_multiple(rng, AGAIN).map(|(point, _)| point.clone()).collect();
        let whole_again: Vec<String> =
            compared.keys().cloned().collect::<BTreeSet<_>>().into_iter().choose(rng).into_iter().collect();
        let history = guests.writers.paused(|| {
            guests.qemu.hold();
            pair.primary.settled(GROUP);
            let history = guests.writers.history();
            if kill {
                pair.receiver.kill();
            } else {
                pair.receiver.stop();
            }
            let left: HashSet<String> = seen.keys().filter(|point| !again.contains(*point)).cloned().collect();
            let all = look_at(&pair.store, &history, seen, |point| !left.contains(point));
            let newest = &all.last().expect("a point").0;
            let wanted = |info: &PointInfo| {
                let point = info.point.to_string();
                point == *newest || whole_again.contains(&point)
            };
            views::each_point(&pair.store, &selector(), wanted, |info, disks| {
                let point = info.point.to_string();
                let sum = whole(&point, disks, (point == *newest).then_some(&images[..]));
                assert_eq!(*compared.entry(point.clone()).or_insert(sum), sum, "point {point} is not what it was");
                totals.compared += 1;
            });
            assert!(all.starts_with(listed), "points that were there before are gone");
            for (point, _) in &all[listed.len()..] {
                after.insert(point.clone(), victim);
            }
            *listed = all;
            history
        });
        guests.qemu.go_on();
        pair.receiver.start();
        drop(history);
        guests.fine();
        println!("{} points, looked at in {:.1} s", listed.len(), began.elapsed().as_secs_f64());
    }

    /// The primary is lost for good.
    fn end(mut self, totals: &mut Totals) {
        moment(&mut self.rng, MOMENT_MS_MAX);
        self.guests.fine();
        self.pair.primary.kill();
        let acknowledged = self.guests.lost();
        totals.commits += acknowledged.len() as u64;
        totals.fio_runs += self.guests.fio.runs.load(Ordering::SeqCst);
        totals.writes += self.guests.writers.acknowledged();
        let (reconnections, longest) = self.guests.writers.outages();
        totals.reconnections += reconnections;
        totals.longest = totals.longest.max(longest);
        for victim in self.after.values() {
            *totals.points.entry(*victim).or_default() += 1;
        }

        let socket = self.folder.path().join("copy.sock");
        let (newest, cut) = self.pair.receiver.failover_newest(GROUP, &socket);
        let copies = OWN.map(|(name, bytes)| {
            let mut nbd = Nbd::connect(&socket, name).expect("the copy");
            nbd.read(0, bytes as u32).expect("a read")
        });
        if let Err(wrong) = self.guests.writers.history().check(cut, &copies) {
            panic!("the active copy of {newest}: {wrong}");
        }
        postgres::verify_copy(self.folder.path(), &socket, PG.0, &newest, cut, &acknowledged);
        self.pair.receiver.stop();
        // The copy was written to meanwhile: no point may show it.
        let all = look_at(&self.pair.store, &self.guests.writers.history(), &mut self.seen, |_| true);
        println!("{} points looked at", all.len());
        self.pair.receiver.cli(&["check", &self.pair.store.display().to_string()]);
    }
}

fn selector() -> String {
    format!("primary/{GROUP}")
}

/// Looks at points, each of which must be what it was when it was `seen`. Returns all names and cuts.
fn look_at(
    store: &Path,
    history: &History,
    seen: &mut HashMap<String, u32>,
    wanted: impl Fn(&str) -> bool,
) -> Vec<(String, u64)> {
    views::each_point(
        store,
        &selector(),
        |info| wanted(&info.point.to_string()),
        |info, disks| {
            let point = info.point.to_string();
            let sum = look(&point, info.cut_unix_us, disks, history);
            assert_eq!(*seen.entry(point.clone()).or_insert(sum), sum, "point {point} is not what it was");
        },
    )
}

/// Checks the writers' disks at a point; returns their checksum.
fn look(point: &str, cut_unix_us: u64, disks: &[views::Disk<'_>], history: &History) -> u32 {
    let images = OWN.iter().zip(disks).map(|((name, bytes), disk)| {
        assert_eq!((disk.name(), disk.size()), (*name, *bytes));
        disk.read(0, *bytes as usize)
    });
    let images: Vec<_> = images.collect();
    if let Err(wrong) = history.check(cut_unix_us, &images) {
        panic!("point {point}: {wrong}");
    }
    let mut sum = crc32fast::Hasher::new();
    images.iter().for_each(|image| sum.update(image));
    sum.finalize()
}

/// Compares all disks at a point with the images, if there are any; returns their checksum.
fn whole(point: &str, disks: &[views::Disk<'_>], images: Option<&[File]>) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    let mut wanted = vec![0; MIB as usize];
    for (n, disk) in disks.iter().enumerate() {
        for at in (0..disk.size()).step_by(MIB as usize) {
            let content = disk.read(at, MIB as usize);
            if let Some(image) = images.map(|images| &images[n]) {
                image.read_exact_at(&mut wanted, at).expect("the image");
                assert!(content == wanted, "point {point}, disk {}: differs from the image in the MiB at {at}", disk.name());
            }
            sum.update(&content);
        }
    }
    sum.finalize()
}

#[test]
fn kills_of_either_side_under_load() {
    postgres::needed();
    need(qemu::TOOLS);
    need(&[("fio", "fio")]);
    let _alone = one_at_a_time();
    let seed = seed();
    let cycles = std::env::var("TWINSITE_TORTURE_CYCLES").ok().map_or(CYCLES, |given| given.parse().expect("a number of cycles"));
    let began = Instant::now();
    let mut totals = Totals::default();
    let rounds = cycles.div_ceil(CYCLES_OF_A_ROUND);
    for n in 0..rounds {
        let mut round = Round::start(seed + u64::from(n));
        println!("round {} of {rounds}, {:.0} s after the start", n + 1, began.elapsed().as_secs_f64());
        for _ in n * CYCLES_OF_A_ROUND..cycles.min((n + 1) * CYCLES_OF_A_ROUND) {
            let mut victims = Victim::ALL;
            victims.shuffle(&mut round.rng);
            for victim in victims {
                round.cycle(victim);
                *totals.cycles.entry(victim).or_default() += 1;
                *totals.kills.entry(victim).or_default() += u32::from(victim.replicator()) + u32::from(victim.receiver());
            }
            round.check(victims[2], &mut totals);
        }
        round.end(&mut totals);
    }
    println!("\n{:.0} s", began.elapsed().as_secs_f64());
    for victim in Victim::ALL {
        let of = |counts: &HashMap<Victim, u32>| counts.get(&victim).copied().unwrap_or_default();
        println!(
            "kills of {victim}: {} cycles, {} kills, {} points checked",
            of(&totals.cycles),
            of(&totals.kills),
            totals.points.get(&victim).copied().unwrap_or_default()
        );
    }
    println!(
        "{} points compared byte for byte; {} writes, {} runs of fio, {} commits; {} reconnections, the longest write took {:.1} s",
        totals.compared,
        totals.writes,
        totals.fio_runs,
        totals.commits,
        totals.reconnections,
        totals.longest.as_secs_f64()
    );
    assert!(totals.writes > 0 && totals.fio_runs > 0 && totals.commits > 0, "a guest did nothing");
}
