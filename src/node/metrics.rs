//! Prometheus metrics: the status as text over plain HTTP. `docs/operations.md` explains each; a test holds that list against
//! this one.
//!
//! Bounds: [`SCRAPES_MAX`] connections at once (others wait in the kernel), each for [`SCRAPE_TIME`] at most, one request each.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use replicator::{Durability, GroupStatus, LinkState, QueueStatus};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::Node;
use crate::api::{CopyState, CopyStatus, ExportStatus, NodeStatus, PrimaryStatus};
use crate::cli::human::age_ms;

const SCRAPES_MAX: usize = 16;
const SCRAPE_TIME: Duration = Duration::from_secs(5);
const REQUEST_BYTES_MAX: usize = 8 << 10;
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// `(name, type, help)` of every metric.
pub(crate) const METRICS: &[(&str, &str, &str)] = &[
    ("twinsite_up", "gauge", "1 while the node answers"),
    ("twinsite_uptime_seconds", "gauge", "Time since the node started"),
    (
        "twinsite_primary_up",
        "gauge",
        "1 if the group runs at its primary, 0 if it could not be started, or waits for its disks, or for the copy that it is to replicate",
    ),
    (
        "twinsite_primary_streaming",
        "gauge",
        "1 while the group follows epoch by epoch, 0 while connecting, syncing, fenced or refused",
    ),
    ("twinsite_primary_fenced", "gauge", "1 if another side may write now"),
    ("twinsite_primary_lag_seconds", "gauge", "Age of the oldest acknowledged write that is not committed at the receiver"),
    ("twinsite_primary_dirty_bytes", "gauge", "Bytes changed and not committed at the receiver"),
    ("twinsite_primary_suspect_bytes", "gauge", "Bytes that have yet to be compared with the copy"),
    ("twinsite_primary_compared_bytes_total", "counter", "Bytes compared with the copy since start"),
    ("twinsite_primary_differing_bytes_total", "counter", "Compared bytes that differed"),
    ("twinsite_primary_scrub_compared_bytes_total", "counter", "Bytes that scrub and verify have compared with the copy"),
    ("twinsite_primary_scrub_differing_bytes_total", "counter", "Bytes of them that differed and were sent again"),
    (
        "twinsite_primary_scrub_unreadable_bytes_total",
        "counter",
        "Bytes that the disk did not give, so that they were not compared",
    ),
    ("twinsite_primary_scrub_pass_ratio", "gauge", "How much of the disks the pass under way has dealt with, 0 to 1"),
    (
        "twinsite_primary_scrub_last_pass_age_seconds",
        "gauge",
        "Time since the last whole pass ended; absent before the first of this run of the node",
    ),
    ("twinsite_primary_generation", "gauge", "Generation of the group"),
    ("twinsite_primary_committed_epoch", "gauge", "Newest committed epoch"),
    ("twinsite_primary_committed_age_seconds", "gauge", "Time since the newest commit"),
    ("twinsite_primary_captured_bytes_total", "counter", "Bytes of dirty blocks captured"),
    ("twinsite_primary_sent_bytes_total", "counter", "Bytes of frames handed to the network"),
    ("twinsite_primary_wire_bytes_total", "counter", "UDP payload bytes sent, with QUIC's overhead and retransmissions"),
    ("twinsite_primary_epochs_committed_total", "counter", "Epochs committed"),
    ("twinsite_primary_epochs_merged_total", "counter", "Epochs given up and merged into the current one"),
    ("twinsite_primary_epochs_in_flight", "gauge", "Epochs sealed and not yet committed"),
    ("twinsite_primary_flushes_waiting", "gauge", "Flushes that wait for the receiver's commit (flush-sync)"),
    ("twinsite_primary_flush_wait_seconds", "gauge", "How long the oldest of them has waited"),
    ("twinsite_primary_flushes_committed_total", "counter", "Flushes answered after the receiver's commit (flush-sync)"),
    (
        "twinsite_primary_rate_limit_bits_per_second",
        "gauge",
        "Bits a second that may be sent now (rate_limit); absent while there is no limit",
    ),
    ("twinsite_primary_write_slowed", "gauge", "1 while writes are slowed (max_lag)"),
    ("twinsite_primary_write_pause_seconds", "gauge", "How long a write would wait that came now (max_lag)"),
    ("twinsite_primary_write_paused_seconds_total", "counter", "What writes have waited, all together (max_lag)"),
    ("twinsite_receiver_up", "gauge", "1 if the receiver runs, 0 if it could not be started"),
    ("twinsite_receiver_connected", "gauge", "1 while the group's primary is connected"),
    ("twinsite_receiver_active", "gauge", "1 if the copy was activated"),
    ("twinsite_receiver_generation", "gauge", "Generation of the copy"),
    ("twinsite_receiver_committed_epoch", "gauge", "Newest committed epoch"),
    (
        "twinsite_receiver_last_commit_age_seconds",
        "gauge",
        "Age of the newest committed cut, by this machine's clock against the primary's",
    ),
    ("twinsite_receiver_points", "gauge", "Points that can be activated"),
    ("twinsite_receiver_stored_bytes", "gauge", "Bytes the journal takes in the store"),
    ("twinsite_receiver_space_limit_bytes", "gauge", "Bytes the journal may take; absent if the group has no limit of its own"),
    ("twinsite_receiver_thinned_points_total", "counter", "Points left out between those that are kept"),
    ("twinsite_receiver_freed_bytes_total", "counter", "Bytes of journal given back by folding and thinning"),
    ("twinsite_receiver_rewritten_bytes_total", "counter", "Bytes written by folding into the base and by thinning"),
    (
        "twinsite_receiver_early_total",
        "counter",
        "Times that points were left out or given up earlier than the ladder says, for want of space",
    ),
    ("twinsite_receiver_scrub_compared_bytes_total", "counter", "Bytes of the newest point compared with the primary's hashes"),
    ("twinsite_receiver_scrub_differing_bytes_total", "counter", "Bytes of them that differed or could not be read"),
    ("twinsite_receiver_damaged_frames_total", "counter", "Frames of the journal found to be damaged or not to be read"),
    ("twinsite_receiver_damaged_base_blocks_total", "counter", "Blocks of the base that were read and found to be damaged"),
    ("twinsite_receiver_drills", "gauge", "Drills of the group that run, with points that are being read"),
    ("twinsite_receiver_drill_refused_writes", "gauge", "Writes to its running drills that had no space"),
    ("twinsite_receiver_last_drill_failed", "gauge", "1 if the last drill with a script did not pass; absent before the first"),
    (
        "twinsite_receiver_last_drill_age_seconds",
        "gauge",
        "Time since the last drill with a script began; absent before the first",
    ),
    (
        "twinsite_receiver_verified_age_seconds",
        "gauge",
        "Age of the cut of the newest point that a drill verified; absent before the first",
    ),
    ("twinsite_queue_used", "gauge", "Fill of a queue, in its unit"),
    ("twinsite_queue_limit", "gauge", "Limit of a queue, in its unit"),
    ("twinsite_nbd_connections", "gauge", "NBD clients of an address"),
    ("twinsite_nbd_connections_limit", "gauge", "NBD clients of an address at most"),
];

/// Listens for scrapers.
pub(crate) async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Answers scrapers for ever.
pub(crate) async fn serve(listener: TcpListener, node: Arc<Node>) {
    let slots = Arc::new(Semaphore::new(SCRAPES_MAX));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let node = node.clone();
                tokio::spawn(async move {
                    // A scraper that is slow or gone is nobody's problem but its own.
                    let _ = tokio::time::timeout(SCRAPE_TIME, answer(stream, &node)).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a scraper; trying again");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, node: &Node) -> io::Result<()> {
    let mut request = Vec::with_capacity(512);
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        if request.len() > REQUEST_BYTES_MAX || stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let (status, body) = if request.starts_with(b"GET /metrics ") || request.starts_with(b"GET /metrics?") {
        ("200 OK", render(&node.status().await))
    } else {
        ("404 Not Found", "metrics are at /metrics\n".to_owned())
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

/// One sample.
struct Sample {
    name: &'static str,
    labels: String,
    value: f64,
}

#[derive(Default)]
struct Samples(Vec<Sample>);

impl Samples {
    fn add(&mut self, name: &'static str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> = labels.iter().map(|(k, v)| format!("{k}=\"{}\"", escape(v))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        self.0.push(Sample { name, labels, value });
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

/// The text format, samples of one metric together.
pub(crate) fn render(status: &NodeStatus) -> String {
    let mut samples = Samples::default();
    samples.add("twinsite_up", &[("name", &status.node.name), ("version", &status.version)], 1.0);
    samples.add("twinsite_uptime_seconds", &[], status.uptime_s as f64);
    for group in &status.primary {
        samples.add(
            "twinsite_primary_up",
            &[("group", group.group().as_str())],
            f64::from(u8::from(matches!(group, PrimaryStatus::Running(_)))),
        );
        if let PrimaryStatus::Running(group) = group {
            primary(&mut samples, group);
        }
    }
    if let Some(receiver) = &status.receiver {
        samples.add("twinsite_receiver_up", &[], f64::from(u8::from(receiver.error.is_none())));
        receiver.groups.iter().for_each(|group| copy(&mut samples, group));
    }
    for export in &status.exports {
        nbd(&mut samples, export);
    }
    let mut text = String::new();
    for (name, kind, help) in METRICS {
        let mut of_name = samples.0.iter().filter(|s| s.name == *name).peekable();
        if of_name.peek().is_some() {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for Sample { labels, value, .. } in of_name {
                let _ = writeln!(text, "{name}{labels} {value}");
            }
        }
    }
    text
}

fn primary(samples: &mut Samples, group: &GroupStatus) {
    let name = [("group", group.group.as_str())];
    let mut add = |metric, value| samples.add(metric, &name, value);
    let flag = |state| f64::from(u8::from(group.state == state));
    add("twinsite_primary_streaming", flag(LinkState::Streaming));
    add("twinsite_primary_fenced", flag(LinkState::Fenced));
    add("twinsite_primary_lag_seconds", seconds(group.lag_ms));
    add("twinsite_primary_dirty_bytes", group.dirty_bytes as f64);
    add("twinsite_primary_suspect_bytes", group.suspect_bytes as f64);
    add("twinsite_primary_compared_bytes_total", group.compared_bytes as f64);
    add("twinsite_primary_differing_bytes_total", group.differing_bytes as f64);
    add("twinsite_primary_scrub_compared_bytes_total", group.scrub.compared_bytes as f64);
    add("twinsite_primary_scrub_differing_bytes_total", group.scrub.differing_bytes as f64);
    add("twinsite_primary_scrub_unreadable_bytes_total", group.scrub.unreadable_bytes as f64);
    add("twinsite_primary_scrub_pass_ratio", group.scrub.done_bytes as f64 / group.scrub.total_bytes.max(1) as f64);
    if let Some(age) = group.scrub.last_pass_age_ms {
        add("twinsite_primary_scrub_last_pass_age_seconds", seconds(age));
    }
    add("twinsite_primary_generation", group.generation.0 as f64);
    if let Some(point) = group.committed {
        add("twinsite_primary_committed_epoch", point.epoch.0 as f64);
    }
    if let Some(age) = group.committed_age_ms {
        add("twinsite_primary_committed_age_seconds", seconds(age));
    }
    add("twinsite_primary_captured_bytes_total", group.captured_bytes as f64);
    add("twinsite_primary_sent_bytes_total", group.sent_bytes as f64);
    add("twinsite_primary_wire_bytes_total", group.wire_bytes as f64);
    add("twinsite_primary_epochs_committed_total", group.epochs_committed as f64);
    add("twinsite_primary_epochs_merged_total", group.epochs_merged as f64);
    add("twinsite_primary_epochs_in_flight", group.epochs_in_flight as f64);
    if group.durability == Durability::FlushSync {
        add("twinsite_primary_flushes_waiting", group.flushes_waiting as f64);
        add("twinsite_primary_flush_wait_seconds", seconds(group.flush_wait_ms.unwrap_or(0)));
        add("twinsite_primary_flushes_committed_total", group.flushes_committed as f64);
    }
    if let Some(limit) = group.rate_limit_bits_per_s {
        add("twinsite_primary_rate_limit_bits_per_second", limit as f64);
    }
    if group.max_lag_ms.is_some() {
        add("twinsite_primary_write_slowed", f64::from(u8::from(group.write_rate_bytes_per_s.is_some())));
        add("twinsite_primary_write_pause_seconds", group.write_pause_ms / 1000.0);
        add("twinsite_primary_write_paused_seconds_total", seconds(group.write_paused_ms));
    }
    for queue in &group.queues {
        let labels =
            [("role", "primary"), ("group", group.group.as_str()), ("queue", queue.name.as_str()), ("unit", &queue.unit)];
        samples.add("twinsite_queue_used", &labels, queue.used as f64);
        samples.add("twinsite_queue_limit", &labels, queue.limit as f64);
    }
}

fn copy(samples: &mut Samples, group: &CopyStatus) {
    let name = [("client", group.client.as_str()), ("group", group.group.as_str())];
    let mut add = |metric, value| samples.add(metric, &name, value);
    add("twinsite_receiver_connected", f64::from(u8::from(group.peer.is_some())));
    add("twinsite_receiver_active", f64::from(u8::from(group.state == CopyState::Active)));
    add("twinsite_receiver_generation", group.generation.0 as f64);
    if let Some(point) = group.committed {
        add("twinsite_receiver_committed_epoch", point.epoch.0 as f64);
    }
    if let Some(age) = group.committed_age_ms {
        add("twinsite_receiver_last_commit_age_seconds", seconds(age));
    }
    add("twinsite_receiver_points", group.points as f64);
    add("twinsite_receiver_stored_bytes", group.stored_bytes as f64);
    if let Some(limit) = group.group_space_max_bytes {
        add("twinsite_receiver_space_limit_bytes", limit as f64);
    }
    let retention = &group.retention;
    add("twinsite_receiver_thinned_points_total", retention.thinned_points as f64);
    add("twinsite_receiver_freed_bytes_total", (retention.freed_bytes + retention.thinned_freed_bytes) as f64);
    add("twinsite_receiver_rewritten_bytes_total", (retention.folded_bytes + retention.thinned_written_bytes) as f64);
    add("twinsite_receiver_early_total", (retention.early_folds + retention.early_thins) as f64);
    add("twinsite_receiver_scrub_compared_bytes_total", group.scrubbed_bytes as f64);
    add("twinsite_receiver_scrub_differing_bytes_total", group.differing_bytes as f64);
    add("twinsite_receiver_damaged_frames_total", group.damaged_frames as f64);
    add("twinsite_receiver_damaged_base_blocks_total", group.damaged_base_blocks as f64);
    add("twinsite_receiver_drills", group.drills.len() as f64);
    add("twinsite_receiver_drill_refused_writes", group.drills.iter().map(|d| d.refused_writes).sum::<u64>() as f64);
    if let Some(last) = &group.last_drill {
        add("twinsite_receiver_last_drill_failed", f64::from(u8::from(!last.passed())));
        add("twinsite_receiver_last_drill_age_seconds", seconds(age_ms(last.began_unix_us)));
    }
    if let Some(verified) = &group.verified {
        add("twinsite_receiver_verified_age_seconds", seconds(age_ms(verified.cut_unix_us)));
    }
    for queue in &group.queues {
        let (client, group) = (group.client.as_str(), group.group.as_str());
        let labels = [("role", "receiver"), ("client", client), ("group", group), ("queue", &queue.name), ("unit", &queue.unit)];
        samples.add("twinsite_queue_used", &labels, queue.used as f64);
        samples.add("twinsite_queue_limit", &labels, queue.limit as f64);
    }
}

/// Of the clients' queues, the fullest of each kind: clients come and go, and may be many.
fn nbd(samples: &mut Samples, export: &ExportStatus) {
    let address = export.address.as_str();
    samples.add("twinsite_nbd_connections", &[("address", address)], export.connections.len() as f64);
    samples.add("twinsite_nbd_connections_limit", &[("address", address)], export.connections_max as f64);
    let mut fullest: BTreeMap<&str, &QueueStatus> = BTreeMap::new();
    for queue in export.connections.iter().flat_map(|c| &c.queues) {
        let known = fullest.entry(&queue.name).or_insert(queue);
        if queue.used > known.used {
            *known = queue;
        }
    }
    for queue in fullest.values() {
        let labels = [("role", "nbd"), ("address", address), ("queue", queue.name.as_str()), ("unit", &queue.unit)];
        samples.add("twinsite_queue_used", &labels, queue.used as f64);
        samples.add("twinsite_queue_limit", &labels, queue.limit as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Catches a metric that the documentation does not explain, or explains and does not exist.
    #[test]
    fn the_documentation_lists_every_metric() {
        let text = include_str!("../../docs/operations.md");
        for (name, _, _) in METRICS {
            assert!(text.contains(&format!("`{name}`")), "{name} is not in docs/operations.md");
        }
        let told: Vec<&str> = text.split('`').filter(|w| w.starts_with("twinsite_") && !w.contains(['{', ' '])).collect();
        for name in told {
            assert!(METRICS.iter().any(|(n, _, _)| *n == name), "{name} is in docs/operations.md only");
        }
    }
}
