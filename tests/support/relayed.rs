//! Two paired nodes with a path between them that a test shapes, and what their status says over time.
#![allow(dead_code, reason = "every test uses a part of it")]

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use relay::Relay;
use serde_json::Value;

use crate::support::nbd::Nbd;
use crate::support::node::{Node, Pair, free_address, group_config, receiver_config};
use crate::support::{eventually, sparse};

const MIB: u64 = 1 << 20;
/// From one look at the status to the next.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A node that is busy still answers in this time.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Payload that fits an Ethernet frame, which is what passes most wide area networks.
pub(crate) const ETHERNET_PAYLOAD_BYTES: usize = 1472;

/// A receiver, a primary that reaches it through a relay, and one group.
pub(crate) struct Relayed {
    /// The nodes.
    pub(crate) pair: Pair,
    /// Between them.
    pub(crate) relay: Relay,
    group: String,
    disks: Vec<String>,
}

impl Relayed {
    /// As [`Pair::start`]; the path changes nothing yet, and the primary is configured but not started.
    #[track_caller]
    pub(crate) fn new(folder: &Path, group: &str, interval: &str, disks: &[(&str, u64)], seed: u64) -> Self {
        let (mut receiver, primary) = (Node::new(folder, "receiver"), Node::new(folder, "primary"));
        let (listen, store) = (free_address(), folder.join("receiver/store"));
        let relay = Relay::start(listen.parse::<SocketAddr>().expect("an address"), seed).expect("a relay");
        let (receiver_key, primary_key) = (receiver.key(), primary.key());
        let path = |name: &str, kind: &str| primary.folder.join(format!("{name}.{kind}"));
        let images: Vec<_> = disks.iter().map(|(name, _)| path(name, "raw")).collect();
        let sockets: Vec<_> = disks.iter().map(|(name, _)| path(name, "sock")).collect();
        for (image, (_, bytes)) in images.iter().zip(disks) {
            sparse(image, *bytes);
        }
        let listed: Vec<_> =
            disks.iter().zip(images.iter().zip(&sockets)).map(|((name, _), (i, s))| (*name, i.as_path(), s.as_path())).collect();
        receiver.configure(&receiver_config(&listen, &store, "primary", &primary_key));
        primary.configure(&group_config(group, &relay.address().to_string(), &receiver_key, interval, &listed));
        receiver.start();
        let disks = disks.iter().map(|(name, _)| (*name).to_owned()).collect();
        Self { pair: Pair { receiver, primary, store, sockets, images }, relay, group: group.to_owned(), disks }
    }

    /// The group at the primary.
    #[track_caller]
    pub(crate) fn primary(&self) -> Value {
        primary_of(&control(&self.pair.primary), &self.group)
    }

    /// The copy at the receiver.
    #[track_caller]
    pub(crate) fn copy(&self) -> Value {
        let status = status(&control(&self.pair.receiver));
        let groups = status["receiver"]["groups"].as_array();
        groups.and_then(|all| all.iter().find(|g| g["group"] == *self.group)).cloned().unwrap_or(Value::Null)
    }

    /// Looks at the primary's status until it is stopped.
    pub(crate) fn watch(&self) -> Watch {
        let (socket, group, stop) = (control(&self.pair.primary), self.group.clone(), Arc::new(AtomicBool::new(false)));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut samples = Vec::new();
            while !stopped.load(Ordering::SeqCst) {
                samples.push(Sample::of(&primary_of(&socket, &group)));
                std::thread::sleep(LOOK_EVERY);
            }
            samples
        });
        Watch { stop, thread: Some(thread) }
    }

    /// Waits until everything is committed; fails after `within`.
    #[track_caller]
    pub(crate) fn committed(&self, within: Duration) -> Value {
        eventually("everything is committed", within, || {
            let status = self.primary();
            (status["state"] == "streaming" && status["dirty_bytes"] == 0).then_some(status)
        })
    }

    /// Loses the primary, fails over to the newest point and compares every disk with its image.
    #[track_caller]
    pub(crate) fn copy_equals(&mut self) {
        self.pair.primary.kill();
        let socket = self.pair.receiver.folder.join("copy.sock");
        let (newest, _) = self.pair.receiver.failover_newest(&self.group, &socket);
        for (disk, image) in self.disks.iter().zip(&self.pair.images) {
            let mut copy = Nbd::connect(&socket, disk).expect("the copy");
            let wanted = std::fs::read(image).expect("the image");
            assert_eq!(copy.size, wanted.len() as u64);
            for (at, piece) in (0..).step_by(MIB as usize).zip(wanted.chunks(MIB as usize)) {
                let same = copy.read(at, piece.len() as u32).expect("a read") == piece;
                assert!(same, "{disk}: point {newest} differs from the disk in the MiB at {at}");
            }
        }
    }
}

fn control(node: &Node) -> PathBuf {
    node.folder.join("state/control.sock")
}

/// `GET /v1/status`: without a process for each look, which would cost more than what is looked at.
#[track_caller]
fn status(control: &Path) -> Value {
    let answer = || -> std::io::Result<Vec<u8>> {
        let mut stream = UnixStream::connect(control)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        stream.write_all(b"GET /v1/status HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    };
    let answer = answer().unwrap_or_else(|error| panic!("{}: {error}", control.display()));
    let body = answer.windows(4).position(|w| w == b"\r\n\r\n").map_or(&[][..], |at| &answer[at + 4..]);
    serde_json::from_slice(body).unwrap_or_else(|e| panic!("not JSON: {e}: {}", String::from_utf8_lossy(&answer)))
}

#[track_caller]
fn primary_of(control: &Path, group: &str) -> Value {
    let status = status(control);
    let found = status["primary"].as_array().and_then(|all| all.iter().find(|g| g["group"] == group));
    found.unwrap_or_else(|| panic!("no group {group} in {status:#}")).clone()
}

/// The primary's status at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// When.
    pub(crate) at: Instant,
    /// `lag_ms`.
    pub(crate) lag: Duration,
    /// Epochs committed since its start.
    pub(crate) epochs: u64,
    /// Bytes sent since its start, all of QUIC included.
    pub(crate) wire_bytes: u64,
    /// Whether it follows.
    pub(crate) streaming: bool,
}

impl Sample {
    fn of(status: &Value) -> Self {
        let number = |key: &str| status[key].as_u64().unwrap_or_else(|| panic!("no {key} in {status:#}"));
        Self {
            at: Instant::now(),
            lag: Duration::from_millis(number("lag_ms")),
            epochs: number("epochs_committed"),
            wire_bytes: number("wire_bytes"),
            streaming: status["state"] == "streaming",
        }
    }
}

/// See [`Relayed::watch`].
#[derive(Debug)]
pub(crate) struct Watch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<Sample>>>,
}

impl Watch {
    /// What was seen.
    #[track_caller]
    pub(crate) fn stop(mut self) -> Vec<Sample> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().expect("stopped once").join().expect("the node answers while it is watched")
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

/// The value that this share of all values does not exceed.
pub(crate) fn quantile(values: impl IntoIterator<Item = Duration>, share: f64) -> Duration {
    let mut all: Vec<_> = values.into_iter().collect();
    all.sort_unstable();
    let at = ((all.len() as f64 * share).ceil() as usize).clamp(1, all.len().max(1)) - 1;
    *all.get(at).expect("at least one value")
}
