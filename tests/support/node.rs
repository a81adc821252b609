//! A real `twinsite` process with a folder, a configuration and a log of its own.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use blockdev::steps::{self, Step};
use rustix::process::Signal;
use serde_json::Value;

use super::{Process, eventually, text};

/// Most time a node takes to answer on its control socket.
const UP_WITHIN: Duration = Duration::from_secs(60);
/// Most time of a command: `verify`, `export` and the like of a small disk.
const ASK_WITHIN: Duration = Duration::from_secs(300);
/// Services of a machine have the ports below.
const PORT_MIN: u32 = 10_000;
/// Most time a healthy group takes to its next commit.
pub(crate) const COMMIT_WITHIN: Duration = Duration::from_secs(60);

/// A node: its folder, and its process while it runs.
#[derive(Debug)]
pub(crate) struct Node {
    /// Its folder.
    pub(crate) folder: PathBuf,
    namespace: Option<String>,
    process: Option<Process>,
    log_from: u64,
    /// Where the next run is to die.
    dies_at: Option<String>,
}

impl Node {
    /// A node with a folder below `parent` and no configuration yet.
    pub(crate) fn new(parent: &Path, name: &str) -> Self {
        let folder = parent.join(name);
        std::fs::create_dir_all(&folder).expect("the node's folder");
        Self { folder, namespace: None, process: None, log_from: 0, dies_at: None }
    }

    /// The same, with every command run in a network namespace.
    pub(crate) fn within(parent: &Path, name: &str, namespace: &str) -> Self {
        Self { namespace: Some(namespace.to_owned()), ..Self::new(parent, name) }
    }

    /// `twinsite.toml`.
    pub(crate) fn config(&self) -> PathBuf {
        self.folder.join("twinsite.toml")
    }

    /// Writes the configuration: `[node]` of this folder, then `rest`.
    pub(crate) fn configure(&self, rest: &str) {
        let state = self.folder.join("state");
        let text = format!("[node]\nstate_dir = \"{}\"\n\n{rest}", state.display());
        std::fs::write(self.config(), text).expect("the configuration");
    }

    /// A `twinsite` command of this node, with its configuration named.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let program = env!("CARGO_BIN_EXE_twinsite");
        let mut command = match &self.namespace {
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace, program]);
                command
            }
            None => Command::new(program),
        };
        command.args(args).arg("--config").arg(self.config()).stdin(Stdio::null());
        command
    }

    /// Runs a command of this node to its end, whatever that is.
    ///
    /// A command that never ends is killed, and the test says so instead of hanging with it.
    pub(crate) fn ask(&self, args: &[&str]) -> Output {
        let child = self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the twinsite binary");
        let pid = rustix::process::Pid::from_child(&child);
        let (ended, ends) = std::sync::mpsc::channel::<()>();
        let watch = std::thread::spawn(move || {
            let hangs = ends.recv_timeout(ASK_WITHIN) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
            // Nobody has waited for it yet, so the number is its own.
            hangs.then(|| rustix::process::kill_process(pid, Signal::KILL))
        });
        let output = child.wait_with_output().expect("its output");
        drop(ended);
        let killed = watch.join().expect("no panic");
        assert!(killed.is_none(), "twinsite {}: not within {ASK_WITHIN:?}: {}\n{}", args.join(" "), text(&output), self.log());
        output
    }

    /// Runs a command that must succeed; returns what it printed.
    #[track_caller]
    pub(crate) fn cli(&self, args: &[&str]) -> String {
        let output = self.ask(args);
        assert!(output.status.success(), "twinsite {}: {}\n{}\n{}", args.join(" "), output.status, text(&output), self.log());
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The same with `--json`.
    #[track_caller]
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let printed = self.cli(&[args, &["--json"]].concat());
        serde_json::from_str(&printed).unwrap_or_else(|e| panic!("twinsite {}: not JSON: {e}\n{printed}", args.join(" ")))
    }

    /// The fingerprint of its key, made at first use.
    #[track_caller]
    pub(crate) fn key(&self) -> String {
        if !self.config().exists() {
            // Enough of a configuration to have a state folder.
            self.configure("[receiver]\nlisten = \"127.0.0.1:7447\"\nstore = \"store\"\n");
        }
        self.json(&["id"])["key"].as_str().expect("a key").to_owned()
    }

    /// Starts `twinsite run` and waits until it answers.
    #[track_caller]
    pub(crate) fn start(&mut self) {
        self.launch();
        let log = self.folder.join("log");
        eventually("the node answers", UP_WITHIN, || {
            let runs = self.process.as_mut().expect("launched").runs();
            assert!(runs, "the node ended:\n{}", std::fs::read_to_string(&log).unwrap_or_default());
            self.ask(&["status", "--json"]).status.success().then_some(())
        });
    }

    /// Starts `twinsite run` and does not wait.
    #[track_caller]
    pub(crate) fn launch(&mut self) {
        let path = self.folder.join("log");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&path).expect("its log");
        self.log_from = log.metadata().expect("its log").len();
        let errors = log.try_clone().expect("its log");
        let mut command = self.command(&["run"]);
        if let Some(step) = self.dies_at.take() {
            command.env(steps::DIE_AT, step);
        }
        self.process = Some(Process::start(command.stdout(log).stderr(errors)));
    }

    /// The next run dies by SIGKILL when it comes to `step` for the `nth` time.
    pub(crate) fn dies_next_at(&mut self, step: Step, nth: u32) {
        self.dies_at = Some(format!("{step}#{nth}"));
    }

    /// Whether the run has not ended.
    pub(crate) fn runs(&mut self) -> bool {
        self.process.as_mut().expect("a running node").runs()
    }

    /// Waits until the run has died where it was to.
    #[track_caller]
    pub(crate) fn died_at(&mut self, step: Step) {
        let process = self.process.as_mut().expect("a running node");
        let within = Instant::now() + COMMIT_WITHIN;
        while process.runs() {
            assert!(Instant::now() < within, "'{step}' is not reached within {COMMIT_WITHIN:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        let status = self.process.take().expect("a node that ran").ended(Duration::ZERO);
        let there = self.log().contains(&format!("dies at '{step}'"));
        assert!(status.signal() == Some(9) && there, "not by '{step}', but {status}:\n{}", self.log());
    }

    /// Waits until the run answers; false if it has ended before.
    #[track_caller]
    pub(crate) fn answers(&mut self) -> bool {
        eventually("the node answers or ends", UP_WITHIN, || {
            if !self.process.as_mut().expect("launched").runs() {
                return Some(false);
            }
            self.ask(&["status", "--json"]).status.success().then_some(true)
        })
    }

    /// What this run printed so far.
    pub(crate) fn log(&self) -> String {
        let all = std::fs::read(self.folder.join("log")).unwrap_or_default();
        let from = usize::try_from(self.log_from).unwrap_or_default().min(all.len());
        String::from_utf8_lossy(&all[from..]).into_owned()
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.process.as_ref().expect("a running node").pid()
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        self.process.as_ref().expect("a running node").signal(signal);
    }

    /// SIGKILL: what the loss of a machine leaves of a process.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// An orderly stop.
    #[track_caller]
    pub(crate) fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.signal(Signal::TERM);
            let status = process.ended(Duration::from_secs(40));
            assert!(status.success(), "stopped with {status}:\n{}", self.log());
        }
    }

    /// Waits for the end of a run that ends by itself; returns what it printed.
    #[track_caller]
    pub(crate) fn ended(&mut self, within: Duration) -> (bool, String) {
        let status = self.process.take().expect("a running node").ended(within);
        (status.success(), self.log())
    }

    /// `status --json`.
    #[track_caller]
    pub(crate) fn status(&self) -> Value {
        self.json(&["status"])
    }

    /// A group this node is the primary of.
    #[track_caller]
    pub(crate) fn primary(&self, group: &str) -> Value {
        let status = self.status();
        let found = status["primary"].as_array().and_then(|all| all.iter().find(|g| g["group"] == group));
        found.unwrap_or_else(|| panic!("no group {group} in {status:#}")).clone()
    }

    /// A copy that this node keeps; `Null` while there is none.
    #[track_caller]
    pub(crate) fn copy(&self, client: &str, group: &str) -> Value {
        let status = self.status();
        let groups = status["receiver"]["groups"].as_array();
        groups.and_then(|all| all.iter().find(|g| g["client"] == client && g["group"] == group)).cloned().unwrap_or(Value::Null)
    }

    /// Waits until everything written before this call is committed at the receiver.
    #[track_caller]
    pub(crate) fn committed(&self, group: &str) -> Value {
        let deadline = Instant::now() + COMMIT_WITHIN;
        loop {
            let status = self.primary(group);
            if !status["committed"].is_null() && status["dirty_bytes"] == 0 {
                return status;
            }
            let waiting = Instant::now() < deadline;
            assert!(waiting, "group {group} is not committed within {COMMIT_WITHIN:?}: {status:#}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until nothing is left to be compared, for as long as it becomes less.
    #[track_caller]
    pub(crate) fn compared(&self, group: &str) {
        let mut left = u64::MAX;
        while left > 0 {
            left = eventually("less is left to be compared", COMMIT_WITHIN, || {
                self.primary(group)["suspect_bytes"].as_u64().filter(|now| *now < left)
            });
        }
    }

    /// Waits for the first commit.
    #[track_caller]
    pub(crate) fn committed_once(&self, group: &str) {
        eventually("the first commit", COMMIT_WITHIN, || (!self.primary(group)["committed"].is_null()).then_some(()));
    }

    /// Waits until everything is committed and stays so: the guests were held a moment ago, and a request of theirs may still be on
    /// its way.
    #[track_caller]
    pub(crate) fn settled(&self, group: &str) {
        let (mut last, mut same) = (self.committed(group), 0);
        eventually("no further commit", COMMIT_WITHIN, || {
            let now = self.committed(group);
            same = if now["committed"] == last["committed"] { same + 1 } else { 0 };
            last = now;
            (same == 5).then_some(())
        });
    }

    /// The points of a group, oldest first: name and cut.
    #[track_caller]
    pub(crate) fn points(&self, group: &str) -> Vec<(String, u64)> {
        let answer = self.json(&["points", group]);
        let points = answer["points"].as_array().unwrap_or_else(|| panic!("no points in {answer:#}"));
        points
            .iter()
            .map(|p| (p["point"].as_str().expect("a name").to_owned(), p["cut_unix_us"].as_u64().expect("a time")))
            .collect()
    }

    /// Fails over to the newest point; returns it and its cut. What a killed primary had sent may be committed until then: only an active
    /// group's points are the last ones. On a slow disk what it had sent last may come after the command has chosen, which is no fault of it.
    #[track_caller]
    pub(crate) fn failover_newest(&self, group: &str, socket: &Path) -> (String, u64) {
        // The command asks for the newest point before it says which one it wants.
        let (mut points, mut same) = (0, 0);
        eventually("no further point", COMMIT_WITHIN, || {
            let now = self.points(group).len();
            same = if now == points { same + 1 } else { 0 };
            points = now;
            std::thread::sleep(Duration::from_millis(50));
            (same == 3).then_some(())
        });
        let (newest, _) = self.points(group).pop().expect("a point");
        let point = self.failover(group, None, socket);
        let points = self.points(group);
        let at = |name: &str| points.iter().position(|(point, _)| point == name).unwrap_or_else(|| panic!("no point {name}"));
        assert!(at(&point) >= at(&newest), "a failover takes the newest point: {newest} was there, {point} is active");
        points[at(&point)].clone()
    }

    /// Fails over and returns the point that was activated; at once, so a primary that was killed a moment ago may count as alive.
    #[track_caller]
    pub(crate) fn failover(&self, group: &str, point: Option<&str>, socket: &Path) -> String {
        let export = format!("unix:{}", socket.display());
        let mut args = vec!["failover", group, "--export", &export, "--yes", "--force"];
        if let Some(point) = point {
            args.extend(["--point", point]);
        }
        self.json(&args)["point"].as_str().expect("the point").to_owned()
    }
}

/// An address of loopback that nobody listens on now, neither for UDP nor for TCP, and that is given to no client by itself: those of outgoing
/// connections come from a range of their own, and could have it before the node begins to listen, or while it is down.
pub(crate) fn free_address() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").expect("the range of outgoing connections");
    let end: u32 = range.split_whitespace().next().and_then(|first| first.parse().ok()).expect("its first port");
    let ports = end.checked_sub(PORT_MIN).filter(|ports| *ports > 0).expect("ports below it");
    for _ in 0..ports {
        // Tests in other processes begin elsewhere.
        let port = PORT_MIN + (std::process::id() % ports * 61 + NEXT.fetch_add(1, Ordering::Relaxed)) % ports;
        let address = format!("127.0.0.1:{port}");
        if std::net::UdpSocket::bind(&address).is_ok() && std::net::TcpListener::bind(&address).is_ok() {
            return address;
        }
    }
    panic!("no port of {PORT_MIN} to {end} is free");
}

/// `[receiver]` with one client that may send any group.
pub(crate) fn receiver_config(listen: &str, store: &Path, client: &str, key: &str) -> String {
    format!(
        "[receiver]\nlisten = \"{listen}\"\nstore = \"{}\"\n\n[[receiver.client]]\nname = \"{client}\"\nkey = \"{key}\"\n",
        store.display()
    )
}

/// `[[group]]` with its disks: name, image, socket of the export.
pub(crate) fn group_config(group: &str, peer: &str, peer_key: &str, interval: &str, disks: &[(&str, &Path, &Path)]) -> String {
    let mut text =
        format!("[[group]]\nname = \"{group}\"\npeer = \"{peer}\"\npeer_key = \"{peer_key}\"\ninterval = \"{interval}\"\n");
    for (name, image, socket) in disks {
        text += &format!(
            "\n[[group.disk]]\nname = \"{name}\"\npath = \"{}\"\nexport = \"unix:{}\"\n",
            image.display(),
            socket.display()
        );
    }
    text + "\n"
}

/// Two paired nodes on loopback, one group.
#[derive(Debug)]
pub(crate) struct Pair {
    /// Runs the receiver.
    pub(crate) receiver: Node,
    /// Runs the group.
    pub(crate) primary: Node,
    /// The receiver's store.
    pub(crate) store: PathBuf,
    /// Sockets of the disks' exports at the primary.
    pub(crate) sockets: Vec<PathBuf>,
    /// Images of the disks at the primary.
    pub(crate) images: Vec<PathBuf>,
}

impl Pair {
    /// Starts both; `disks` are names and sizes, made as sparse images.
    #[track_caller]
    pub(crate) fn start(folder: &Path, group: &str, interval: &str, disks: &[(&str, u64)]) -> Self {
        let (mut receiver, mut primary) = (Node::new(folder, "receiver"), Node::new(folder, "primary"));
        let (listen, store) = (free_address(), folder.join("receiver/store"));
        let (receiver_key, primary_key) = (receiver.key(), primary.key());
        let path = |name: &str, kind: &str| primary.folder.join(format!("{name}.{kind}"));
        let images: Vec<_> = disks.iter().map(|(name, _)| path(name, "raw")).collect();
        let sockets: Vec<_> = disks.iter().map(|(name, _)| path(name, "sock")).collect();
        for (image, (_, bytes)) in images.iter().zip(disks) {
            super::sparse(image, *bytes);
        }
        let listed: Vec<_> =
            disks.iter().zip(images.iter().zip(&sockets)).map(|((name, _), (i, s))| (*name, i.as_path(), s.as_path())).collect();
        receiver.configure(&receiver_config(&listen, &store, "primary", &primary_key));
        primary.configure(&group_config(group, &listen, &receiver_key, interval, &listed));
        receiver.start();
        primary.start();
        Self { receiver, primary, store, sockets, images }
    }
}
