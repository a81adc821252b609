//! `twinsite demo`: a disaster on one machine, and the proof that the copy is what it should be. Both nodes are real processes of this
//! program with their own keys and configurations; the disk is written over NBD as a guest would.

mod disk;
mod load;
mod report;
mod site;
mod stamp;
mod verify;

use std::io::{IsTerminal, Write};
use std::net::UdpSocket;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use replicator::{GroupStatus, LinkState};
use tempfile::TempDir;

use self::load::{Clock, Load};
use self::report::{Lag, Report};
use self::site::Site;
use crate::api::{FailoverDone, NodeStatus, Points, PrimaryStatus};
use crate::cli::human::{Paint, bar, bytes, count, ms};
use crate::cli::{DemoArgs, client};
use crate::nbd::Disk;

const GROUP: &str = "demo";
const DISK: &str = "disk";
const SAMPLE: Duration = Duration::from_millis(50);
/// A group that makes no progress for this long is stuck.
const STUCK: Duration = Duration::from_secs(60);
/// Between lines of progress where there is no terminal.
const PLAIN_PROGRESS: Duration = Duration::from_secs(2);

/// Shows it.
///
/// # Errors
/// Whatever goes wrong, also when the copy does not verify.
pub(crate) fn run(args: &DemoArgs) -> anyhow::Result<()> {
    let mut folder = tempfile::Builder::new();
    folder.prefix("twinsite-demo-");
    let parent = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    disk::check_space(&parent, args.disk.as_deref())?;
    let folder = folder.tempdir_in(&parent).with_context(|| format!("{}: cannot make a temporary folder", parent.display()))?;
    remove_on_interrupt(folder.path().to_path_buf(), args.keep)?;
    let mut show = Show::new(args.json);
    show.line(&format!("Two nodes of Twinsite on this machine, in {}", folder.path().display()));
    let result = Demo::new(args, &folder).and_then(|mut demo| demo.play(&mut show));
    if args.keep {
        show.line(&format!("Kept: {}", folder.keep().display()));
    }
    let report = result?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        report.print(Paint::stdout());
    }
    if !report.verified {
        bail!("the copy does not verify: {}", count(report.violation_count as usize, "violation"));
    }
    show.line("\nNext steps: twinsite id on both machines, then README.md, \"Protect a disk\".");
    Ok(())
}

/// Ctrl-C ends the nodes (they end with this process) and leaves no files behind.
fn remove_on_interrupt(folder: PathBuf, keep: bool) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        if runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
            if !keep {
                let _ = std::fs::remove_dir_all(&folder);
            }
            eprintln!("\ninterrupted");
            std::process::exit(1);
        }
    });
    Ok(())
}

struct Demo {
    args: DemoArgs,
    original: PathBuf,
    primary: Site,
    receiver: Site,
    run: u64,
    clock: Clock,
}

/// What was seen of the primary until it was killed.
struct Seen {
    last: GroupStatus,
    lags: Vec<u64>,
    first_sync: Duration,
}

impl Demo {
    fn new(args: &DemoArgs, folder: &TempDir) -> anyhow::Result<Self> {
        let (primary, receiver) = (Site::new(folder.path(), "primary")?, Site::new(folder.path(), "recovery")?);
        let original = match &args.disk {
            Some(image) => image.clone(),
            None => {
                let path = folder.path().join("original.raw");
                disk::make(&path).context("cannot make the disk")?;
                path
            }
        };
        disk::copy(&original, &primary.path("disk.raw"))
            .with_context(|| format!("{}: cannot copy the image", original.display()))?;
        let clock = Clock::new();
        let run = clock.now_us() ^ (u64::from(std::process::id()) << 40);
        Ok(Self { args: args.clone(), original, primary, receiver, run, clock })
    }

    fn play(&mut self, show: &mut Show) -> anyhow::Result<Report> {
        self.start(show)?;
        let socket = self.primary.path("disk.sock");
        let load = Load::start(&socket, DISK, self.run, self.clock, self.args.writes_per_second)
            .map_err(|error| anyhow!("cannot use the disk over NBD: {error}\n{}", self.primary.log_tail()))?;
        let seen = self.watch(&load, show)?;
        self.primary.kill()?;
        let killed_us = self.clock.now_us();
        let logs = load.finish().context("the load failed")?;
        show.line("The primary was killed (SIGKILL). Failover:");
        let (done, activate, mut copy) = self.fail_over()?;
        show.line(&format!("  point {} is active after {}", done.point, ms(millis(activate))));
        let cut_unix_us = self.cut_of(&done)?;
        let verdict = verify::verify(&mut copy, &self.original, self.run, &logs, cut_unix_us, |done, total| {
            show.progress(&format!("  verify      {}  {} of {}", bar(done, total, 30), bytes(done), bytes(total)));
        })
        .with_context(|| format!("cannot read the copy\n{}", self.receiver.log_tail()))?;
        show.end_progress();
        writable(&mut copy).context("the copy cannot be written")?;
        let mut report = Report {
            verified: false,
            violations: Vec::new(),
            violation_count: 0,
            disk_bytes: copy.size(),
            interval_ms: millis(self.args.interval),
            first_sync_ms: millis(seen.first_sync),
            writes_acknowledged: 0,
            writes_acknowledged_before_cut: 0,
            blocks_compared: 0,
            writes_lost: 0,
            recovery_point_ms: killed_us.saturating_sub(cut_unix_us) / 1000,
            point: done.point,
            generation: done.generation,
            activate_ms: millis(activate),
            captured_bytes: seen.last.captured_bytes,
            sent_bytes: seen.last.sent_bytes,
            saved_percent: seen.last.saved_percent,
            lag: Lag::of(seen.lags),
        };
        report.take_verdict(verdict);
        Ok(report)
    }

    fn start(&mut self, show: &mut Show) -> anyhow::Result<()> {
        // Free now; if somebody takes it before the receiver does, the receiver says so.
        let address = UdpSocket::bind("127.0.0.1:0").and_then(|s| s.local_addr()).context("cannot find a free port")?;
        let (primary_key, receiver_key) = (self.primary.key()?, self.receiver.key()?);
        self.receiver.configure(&format!(
            "[receiver]\nlisten = \"{address}\"\nstore = \"store\"\n\n[[receiver.client]]\nname = \"primary\"\nkey = \"{primary_key}\"\n"
        ))?;
        self.primary.configure(&format!(
            "[[group]]\nname = \"{GROUP}\"\npeer = \"{address}\"\npeer_key = \"{receiver_key}\"\ninterval = \"{}ms\"\n\n\
             [[group.disk]]\nname = \"{DISK}\"\npath = \"disk.raw\"\nexport = \"unix:disk.sock\"\n",
            self.args.interval.as_millis()
        ))?;
        self.receiver.start()?;
        self.primary.start()?;
        show.line(&format!("  primary     {primary_key}"));
        show.line(&format!("  recovery    {receiver_key} on {address}"));
        Ok(())
    }

    /// Shows the load and the replication until the time is up.
    fn watch(&self, load: &Load, show: &mut Show) -> anyhow::Result<Seen> {
        let began = Instant::now();
        let mut first_sync = None;
        let mut lags = Vec::new();
        let mut moved = (Instant::now(), (0, 0));
        loop {
            let status = self.group()?;
            let progress = (status.sent_bytes, status.epochs_committed);
            if progress != moved.1 {
                moved = (Instant::now(), progress);
            }
            if moved.0.elapsed() > STUCK || status.state == LinkState::Refused || status.state == LinkState::Fenced {
                let error = status.error.unwrap_or_default();
                bail!(
                    "replication does not get on: {error}\nprimary:\n{}recovery:\n{}",
                    self.primary.log_tail(),
                    self.receiver.log_tail()
                );
            }
            if load.broken() {
                bail!("the primary's disk failed under the load:\n{}", self.primary.log_tail());
            }
            if status.committed.is_some() {
                let synced = *first_sync.get_or_insert_with(|| (began.elapsed(), Instant::now()));
                lags.push(status.lag_ms);
                // Not always in the same part of an epoch.
                let some = Duration::from_millis(self.run % millis(self.args.interval).max(1));
                if synced.1.elapsed() >= Duration::from_secs(self.args.seconds) + some {
                    show.end_progress();
                    return Ok(Seen { last: status, lags, first_sync: synced.0 });
                }
            }
            show.progress(&describe(&status, load.acknowledged()));
            std::thread::sleep(SAMPLE);
        }
    }

    fn group(&self) -> anyhow::Result<GroupStatus> {
        let status: NodeStatus = client::get(&self.primary.control(), "/v1/status")
            .with_context(|| format!("the primary is gone\n{}", self.primary.log_tail()))?;
        match status.primary.into_iter().next() {
            Some(PrimaryStatus::Running(status)) => Ok(*status),
            Some(PrimaryStatus::Failed { error, .. }) => bail!("the group did not start: {error}"),
            Some(PrimaryStatus::Waiting { .. }) | None => bail!("the primary has no group"),
        }
    }

    /// The command a person would give; the time runs until the first bytes are read.
    fn fail_over(&self) -> anyhow::Result<(FailoverDone, Duration, Disk)> {
        let socket = self.receiver.path("copy.sock");
        let export = format!("unix:{}", socket.display());
        let began = Instant::now();
        let output = self.receiver.command(&["failover", GROUP, "--export", &export, "--yes", "--force", "--json"])?.output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            bail!("failover failed: {said}\n{}", self.receiver.log_tail());
        }
        let done: FailoverDone = serde_json::from_slice(&output.stdout).context("failover printed something else than JSON")?;
        let mut copy = Disk::connect(&socket, DISK).context("the copy is not served")?;
        copy.read(0, &mut [0; stamp::BLOCK]).context("the copy cannot be read")?;
        Ok((done, began.elapsed(), copy))
    }

    fn cut_of(&self, done: &FailoverDone) -> anyhow::Result<u64> {
        let points: Points = client::get(&self.receiver.control(), &format!("/v1/points?group={GROUP}"))?;
        let found = points.points.iter().find(|p| p.point == done.point);
        Ok(found.ok_or_else(|| anyhow!("the receiver does not list point {}", done.point))?.cut_unix_us)
    }
}

/// A copy is a running server's disk: it takes writes and gives them back.
fn writable(copy: &mut Disk) -> anyhow::Result<()> {
    let (mut written, mut read) = ([0; stamp::BLOCK], [0; stamp::BLOCK]);
    stamp::Stamp { run: 0, block: 0, writer: 0, sequence: 0 }.write(&mut written);
    copy.write(0, &written)?;
    copy.flush()?;
    copy.read(0, &mut read)?;
    if written != read {
        bail!("it does not hold what was written to it");
    }
    Ok(())
}

fn describe(status: &GroupStatus, acknowledged: u64) -> String {
    let writes = format!("{acknowledged} writes");
    match (status.committed, &status.pass) {
        (Some(point), _) => format!(
            "  streaming   {writes}  point {point}  lag {}  sent {}  saved {:.0} %",
            ms(status.lag_ms),
            bytes(status.sent_bytes),
            status.saved_percent
        ),
        (None, Some(pass)) => {
            let left = pass.left_s.map_or_else(String::new, |s| format!("  {} left", ms(s * 1000)));
            let drawn = bar(pass.done_bytes, pass.total_bytes, 30);
            format!("  first sync  {drawn}  {}/s{left}  {writes}", bytes(pass.rate_bytes_per_s))
        }
        (None, None) => format!("  connecting  {writes}"),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Lines and one line that changes; silent for JSON.
struct Show {
    silent: bool,
    terminal: bool,
    /// When the changing line was shown last; where there is no terminal, also when the last phase ended.
    shown: Instant,
    /// The changing line is there.
    open: bool,
}

impl Show {
    fn new(silent: bool) -> Self {
        Self { silent, terminal: std::io::stdout().is_terminal(), shown: Instant::now(), open: false }
    }

    fn line(&self, text: &str) {
        if !self.silent {
            println!("{text}");
        }
    }

    fn progress(&mut self, text: &str) {
        if self.silent {
            return;
        }
        if self.terminal {
            print!("\r\x1b[2K{text}");
            // Nothing depends on its being seen.
            let _ = std::io::stdout().flush();
            self.open = true;
        } else if self.shown.elapsed() >= PLAIN_PROGRESS {
            println!("{text}");
            self.shown = Instant::now();
        }
    }

    fn end_progress(&mut self) {
        if self.open {
            println!();
        }
        self.open = false;
        self.shown = Instant::now();
    }
}
