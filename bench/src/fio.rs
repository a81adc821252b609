//! fio as an NBD client, and its JSON.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::child::{self, Daemon};
use crate::context::Bench;
use crate::tools::FIO;

/// Time beyond the run time that fio may take to start and to drain.
const GRACE: Duration = Duration::from_secs(60);

/// Seconds of load before a measurement that are not counted.
pub(crate) const WARM_UP_S: u32 = 1;
/// Added to a seed for the warm-up: far from the seeds of all rounds.
const WARM_UP_SEED: usize = 1_000_000;

/// One kind of load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// For people.
    pub(crate) title: &'static str,
    /// fio's `--rw`.
    pub(crate) rw: &'static str,
    /// Bytes of a request, as fio writes them.
    pub(crate) bs: &'static str,
    /// Requests in flight.
    pub(crate) iodepth: u32,
    /// Shown as MB/s instead of IOPS.
    pub(crate) bandwidth: bool,
    /// Further options.
    pub(crate) more: &'static [&'static str],
}

/// What one run gave.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub(crate) iops: f64,
    pub(crate) bytes_per_s: f64,
    pub(crate) bytes: f64,
    pub(crate) p99_us: f64,
}

impl Outcome {
    /// IOPS or MB/s, as the load asks.
    pub(crate) fn figure(&self, load: &Load) -> f64 {
        if load.bandwidth { self.bytes_per_s / 1e6 } else { self.iops }
    }
}

impl Load {
    /// Unit of [`Outcome::figure`].
    pub(crate) fn unit(&self) -> &'static str {
        if self.bandwidth { "MB/s" } else { "IOPS" }
    }
}

#[derive(Deserialize)]
struct Document {
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    error: i64,
    read: Direction,
    write: Direction,
}

#[derive(Deserialize)]
struct Direction {
    io_bytes: u64,
    bw_bytes: u64,
    iops: f64,
    total_ios: u64,
    clat_ns: Latency,
}

#[derive(Deserialize)]
struct Latency {
    #[serde(default)]
    percentile: std::collections::BTreeMap<String, u64>,
}

/// Reads fio's JSON; lines before it (`fio: connected to NBD server`) are skipped.
fn parse(text: &str) -> Result<Outcome> {
    let json = text.find('{').and_then(|at| text.get(at..)).context("no JSON")?;
    let document: Document = serde_json::Deserializer::from_str(json).into_iter().next().context("no JSON")??;
    let job = document.jobs.into_iter().next().context("no job")?;
    if job.error != 0 {
        bail!("I/O error {}", job.error);
    }
    let d = if job.write.total_ios > job.read.total_ios { job.write } else { job.read };
    if d.total_ios == 0 {
        bail!("no request was answered");
    }
    let p99_ns = d.clat_ns.percentile.get("99.000000").copied().context("no 99th percentile")?;
    Ok(Outcome { iops: d.iops, bytes_per_s: d.bw_bytes as f64, bytes: d.io_bytes as f64, p99_us: p99_ns as f64 / 1e3 })
}

/// How long, and with which numbers: equal seeds are equal sequences of offsets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) seconds: u32,
    pub(crate) seed: usize,
}

/// Runs `load` against the export `disk` of the server at `socket`.
pub(crate) fn run(bench: &Bench, socket: &Path, load: &Load, span: Span) -> Result<Outcome> {
    run_watched(bench, socket, load, span, &mut || Ok(()))
}

/// Puts the server at `socket` under `load` for a second, not measured, with other offsets than [`run`] will use.
pub(crate) fn warm_up(bench: &Bench, socket: &Path, load: &Load, span: Span) -> Result<()> {
    run(bench, socket, load, Span { seconds: WARM_UP_S, seed: span.seed + WARM_UP_SEED }).map(drop)
}

/// As [`run`], calling `watch` often meanwhile.
pub(crate) fn run_watched(
    bench: &Bench,
    socket: &Path,
    load: &Load,
    span: Span,
    watch: &mut dyn FnMut() -> Result<()>,
) -> Result<Outcome> {
    finish(bench, load, span, command(socket, load, span), watch)
}

/// Starts `load` and leaves it running: for a server that ends before its client.
pub(crate) fn start(bench: &Bench, socket: &Path, load: &Load, span: Span) -> Result<Daemon> {
    let mut command = command(socket, load, span);
    // One process, so that nothing of it outlives its end.
    command.arg("--thread");
    Daemon::spawn(bench, "fio", command)
}

/// A request that was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// When, in ms since 1970.
    pub(crate) at_ms: u64,
    pub(crate) latency_ns: u64,
}

/// As [`run_watched`], with every request, in the order of the answers.
pub(crate) fn run_logged(
    bench: &Bench,
    socket: &Path,
    load: &Load,
    span: Span,
    watch: &mut dyn FnMut() -> Result<()>,
) -> Result<(Outcome, Vec<Request>)> {
    let prefix = bench.log_path("requests").with_extension("");
    let mut command = command(socket, load, span);
    command.arg(format!("--write_lat_log={}", prefix.display()));
    command.args(["--log_unix_epoch=1", "--disable_slat=1", "--disable_lat=1"]);
    let outcome = finish(bench, load, span, command, watch)?;
    let log = PathBuf::from(format!("{}_clat.1.log", prefix.display()));
    let text = fs::read_to_string(&log).with_context(|| format!("{}: fio wrote no log of its requests", log.display()))?;
    let requests = parse_log(&text).with_context(|| format!("{}: cannot be used", log.display()))?;
    // As large as the requests are many.
    fs::remove_file(&log).with_context(|| format!("{}: cannot be removed", log.display()))?;
    Ok((outcome, requests))
}

/// Lines of `time, latency, direction, bytes, …`.
fn parse_log(text: &str) -> Result<Vec<Request>> {
    text.lines()
        .map(|line| {
            let mut fields = line.split(',').map(|f| f.trim().parse::<u64>().ok());
            let (at_ms, latency_ns) = (fields.next().flatten(), fields.next().flatten());
            at_ms
                .zip(latency_ns)
                .map(|(at_ms, latency_ns)| Request { at_ms, latency_ns })
                .with_context(|| format!("'{line}' is no request"))
        })
        .collect()
}

fn command(socket: &Path, load: &Load, span: Span) -> Command {
    let Span { seconds, seed } = span;
    let mut command = Command::new(FIO.program);
    command
        .args(["--name=load", "--ioengine=nbd", "--output-format=json", "--time_based"])
        .arg(format!("--uri=nbd+unix:///disk?socket={}", socket.display()))
        .arg(format!("--rw={}", load.rw))
        .arg(format!("--bs={}", load.bs))
        .arg(format!("--iodepth={}", load.iodepth))
        .arg(format!("--runtime={seconds}"))
        .arg(format!("--randseed={seed}"))
        .args(load.more);
    command
}

fn finish(bench: &Bench, load: &Load, span: Span, command: Command, watch: &mut dyn FnMut() -> Result<()>) -> Result<Outcome> {
    let text = child::run_watched(bench, "fio", command, Duration::from_secs(span.seconds.into()) + GRACE, watch)?;
    parse(&text).with_context(|| format!("fio, {}: cannot use its output", load.title))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIDE: &str = r#"{"io_bytes":IO,"bw_bytes":240121350,"iops":58623.3,"total_ios":N,"clat_ns":{PCT}}"#;

    fn document(error: i64, write_ios: u64) -> String {
        let idle = SIDE.replace("IO", "0").replace("N", "0").replace("PCT", "\"min\":0");
        let busy = SIDE
            .replace("IO", "240361472")
            .replace("N", &write_ios.to_string())
            .replace("PCT", r#""percentile":{"50.000000":473088,"99.000000":1679360}"#);
        format!("fio: connected to NBD server\n{{\"jobs\":[{{\"error\":{error},\"read\":{idle},\"write\":{busy}}}]}}\nbye\n")
    }

    #[test]
    fn the_busy_direction_is_read() {
        let outcome = parse(&document(0, 58682)).unwrap();
        assert_eq!(outcome.iops, 58623.3);
        assert_eq!(outcome.bytes, 240361472.0);
        assert_eq!(outcome.p99_us, 1679.36);
    }

    #[test]
    fn a_log_of_requests_is_read_or_refused() {
        let log = "1790000000001, 52000, 1, 4096, 0, 0\n1790000000003, 1700, 1, 4096, 0, 0\n";
        let requests = parse_log(log).unwrap();
        assert_eq!(requests[1], Request { at_ms: 1_790_000_000_003, latency_ns: 1700 });
        assert_eq!(requests.len(), 2);
        assert!(parse_log("1790000000001, -, 1\n").is_err());
    }

    #[test]
    fn failed_and_idle_runs_are_no_figures() {
        assert!(parse(&document(5, 58682)).is_err());
        assert!(parse(&document(0, 0)).is_err());
        assert!(parse("fio: cannot connect\n").is_err());
    }
}
