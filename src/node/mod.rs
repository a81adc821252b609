//! The daemon: joins both roles, their exports, the control socket and the metrics.
//!
//! Must hold: a part that cannot start or fails says so in one line and leaves the others running; the state folder and
//! the control socket belong to one process.

mod adopt;
mod control;
mod copies;
mod drills;
mod exports;
mod failover;
mod fenced;
mod handback;
mod metrics;
mod notify;
mod onward;
mod primaries;
mod record;
mod socket;

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use blockdev::IoThreads;
use rustix::fs::{FlockOperation, flock};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, Notify, RwLock, watch};

use self::adopt::Adoptions;
use self::copies::Copies;
use self::drills::Drills;
pub(crate) use self::drills::{environment as drill_environment, report as drill_report};
use self::exports::Exports;
pub(crate) use self::failover::RequestError;
use self::primaries::{Primaries, Starting};
use self::record::ExportRecord;
use crate::api::{HookRuns, NodeId, NodeStatus, Points, ReceiverStatus, Verification};
use crate::config::{Config, DRILL_SPACE_MAX_DEFAULT};
use crate::hooks::Hooks;
use crate::key;

/// Niceness of the threads that replicate.
const REPLICATION_NICE: i32 = 10;
/// Threads of the runtime: network, control socket, journals.
const RUNTIME_THREADS: usize = 2;
/// How long groups may take to start before the node is ready without them.
const START_WITHIN: Duration = Duration::from_secs(20);
/// How long the runtime's last tasks may take once everything is shut down.
const RUNTIME_STOP: Duration = Duration::from_secs(2);

/// A running node.
pub(crate) struct Node {
    pub(crate) id: NodeId,
    listen: Option<String>,
    started: Instant,
    exports: Arc<Exports>,
    primaries: RwLock<Primaries>,
    copies: Option<Result<Copies, String>>,
    record: Mutex<ExportRecord>,
    pub(crate) drills: Drills,
    hooks: Arc<Hooks>,
    adoptions: Adoptions,
    state_dir: PathBuf,
}

impl Node {
    pub(crate) async fn status(&self) -> NodeStatus {
        let receiver = match (&self.copies, &self.listen) {
            (Some(Ok(copies)), Some(listen)) => {
                let groups = copies.status(&self.exports.offered().await, &self.drills.status()).await;
                Some(ReceiverStatus { listen: listen.clone(), error: None, groups })
            }
            (Some(Err(error)), Some(listen)) => {
                Some(ReceiverStatus { listen: listen.clone(), error: Some(error.clone()), groups: Vec::new() })
            }
            _ => None,
        };
        let (primary, onward) = {
            let primaries = self.primaries.read().await;
            (primaries.status(), primaries.onward().iter().map(|onward| onward.status()).collect())
        };
        NodeStatus {
            node: self.id.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_s: self.started.elapsed().as_secs(),
            primary,
            receiver,
            exports: self.exports.status().await,
            hooks: self.hooks.newest(),
            onward,
        }
    }

    pub(crate) async fn points(&self, selector: &str) -> Result<Points, RequestError> {
        let copies = self.receiving()?;
        copies.points(&copies.find(selector).await?).await
    }

    /// Starts to compare the disks of a group with its copy, or goes on with it.
    pub(crate) async fn verify(&self, group: &str) -> Result<Verification, RequestError> {
        match self.primaries.read().await.verify(group) {
            Some(begun) => begun,
            None => Err(self.no_primary(group).await),
        }
    }

    pub(crate) async fn verification(&self, group: &str) -> Result<Verification, RequestError> {
        match self.primaries.read().await.verification(group) {
            Some(found) => found,
            None => Err(self.no_primary(group).await),
        }
    }

    /// Why this node has no disks of a group.
    async fn no_primary(&self, group: &str) -> RequestError {
        if let Ok(copies) = self.receiving()
            && copies.find(group).await.is_ok()
        {
            return RequestError::CopyOnly { group: group.to_owned() };
        }
        let known = self.primaries.read().await.status().iter().map(|g| g.group().to_string()).collect();
        RequestError::UnknownPrimary { given: group.to_owned(), known }
    }

    /// The newest runs of hooks.
    pub(crate) fn hook_runs(&self) -> HookRuns {
        HookRuns { runs: self.hooks.runs() }
    }

    /// Has copies go onward, each in a task of its own.
    async fn follow_onward(self: &Arc<Self>) -> tokio::task::JoinSet<()> {
        let mut tasks = tokio::task::JoinSet::new();
        for onward in self.primaries.read().await.onward() {
            let node = Arc::clone(self);
            tasks.spawn(async move {
                match node.receiving() {
                    Ok(copies) => onward.follow(copies).await,
                    Err(error) => onward.cannot(&error.to_string()),
                }
            });
        }
        tasks
    }

    /// Takes in the groups that were not there when the node was ready, until it stops; says so if nothing is left to run for. Returns those
    /// that are not there by then.
    async fn take_in(
        self: Arc<Self>,
        mut starting: Starting,
        nothing_left: Arc<Notify>,
        mut quitting: watch::Receiver<bool>,
    ) -> Starting {
        loop {
            let arrived = tokio::select! {
                // An error means that the sender is gone: stop as well.
                _ = quitting.wait_for(|quit| *quit) => return starting,
                arrived = starting.next() => arrived,
            };
            let Some(arrived) = arrived else { return starting };
            self.primaries.write().await.arrive(arrived);
            if !self.runs().await {
                nothing_left.notify_one();
            }
            let node = Arc::clone(&self);
            tokio::spawn(async move {
                // A failover binds its address before it offers anything there.
                let _record = node.record.lock().await;
                node.exports.prune().await;
            });
        }
    }

    /// Whether there is anything to run for.
    async fn runs(&self) -> bool {
        matches!(self.copies, Some(Ok(_))) || self.primaries.read().await.running() > 0
    }

    fn receiving(&self) -> Result<&Copies, RequestError> {
        match &self.copies {
            Some(Ok(copies)) => Ok(copies),
            Some(Err(error)) => Err(RequestError::Receiver(error.clone())),
            None => Err(RequestError::NoReceiver),
        }
    }
}

/// Runs a node until it is told to stop.
///
/// # Errors
/// What keeps it from running at all.
pub fn run(config: Config) -> anyhow::Result<()> {
    let identity = key::load_or_create(&config.node.state_dir)?;
    let _lock = lock_state(&config.node.state_dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .thread_name("node")
        .on_thread_start(yield_to_guests)
        .enable_all()
        .build()
        .context("cannot start threads")?;
    let result = runtime.block_on(serve(config, identity));
    runtime.shutdown_timeout(RUNTIME_STOP);
    result
}

/// Replication, at either site, yields to the threads that answer guests (those are started by the main thread and keep its priority).
/// When the processors are full, epochs grow instead.
fn yield_to_guests() {
    // Without the right to be nicer nothing breaks.
    if let Err(error) = rustix::process::setpriority_process(None, REPLICATION_NICE) {
        tracing::debug!(%error, "a thread keeps its priority");
    }
    // Threads that these start do as they do.
    if let Err(error) = blockdev::prefer_throughput() {
        tracing::debug!(%error, "a thread keeps its slice of time");
    }
}

fn lock_state(state_dir: &std::path::Path) -> anyhow::Result<File> {
    let path: PathBuf = state_dir.join("lock");
    let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(&path);
    let file = file.with_context(|| format!("{}: cannot make the lock file", path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!("{}: a node already runs with this state folder: stop it, or set another state_dir", state_dir.display());
    }
    Ok(file)
}

async fn serve(config: Config, identity: proto::Identity) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let record = ExportRecord::open(&config.node.state_dir)?;
    let hooks = Hooks::open(config.hooks.clone(), &config.node.name, &config.node.state_dir).context("cannot start a thread")?;
    let (listener, _socket_file) = socket::listen_on(&config.node.control)?;
    let io = IoThreads::new(config.node.io_threads).context(
        "cannot start io threads: the kernel refused io_uring (sysctl kernel.io_uring_disabled, or a container's seccomp filter)",
    )?;
    // Guests wait for these threads, whatever else keeps the processors busy.
    io.on_each(|| {
        if let Err(error) = blockdev::prefer_latency() {
            tracing::debug!(%error, "a thread of guests keeps its slice of time");
        }
    });
    let exports = Arc::new(Exports::new(io.clone()));
    let begun = tokio::time::Instant::now();
    // Guests are waiting: their disks go first.
    let (mut primaries, mut starting) = Primaries::begin(&config.groups, &config.node.state_dir, &identity, &exports).await;
    let copies = match &config.receiver {
        None => None,
        Some(receiver) => Some(Copies::start(receiver, identity.clone()).await.map_err(|error| error.to_string())),
    };
    if let Some(Err(error)) = &copies {
        tracing::error!("receiver not started: {error}; the other roles go on");
    }
    let drill_space_max_bytes = config.receiver.as_ref().map_or(DRILL_SPACE_MAX_DEFAULT, |r| r.drill_space_max_bytes);
    let arriving = async {
        while let Some(arrived) = starting.next().await {
            primaries.arrive(arrived);
        }
    };
    let told_to_stop = tokio::select! {
        _ = tokio::time::timeout_at(begun + START_WITHIN, arriving) => false,
        _ = terminate.recv() => true,
        _ = interrupt.recv() => true,
    };
    for group in primaries.starting().filter(|_| !told_to_stop) {
        tracing::error!(%group, "group not started after {} s: {}; the others go on", begun.elapsed().as_secs(), primaries::STARTING);
    }
    exports.prune().await;
    let node = Arc::new(Node {
        id: NodeId { name: config.node.name.clone(), key: identity.fingerprint() },
        listen: config.receiver.as_ref().map(|r| r.listen.to_string()),
        started: Instant::now(),
        exports,
        primaries: RwLock::new(primaries),
        copies,
        record: Mutex::new(record),
        drills: Drills::new(&config.node.state_dir, drill_space_max_bytes),
        hooks,
        adoptions: Adoptions::default(),
        state_dir: config.node.state_dir.clone(),
    });
    if !node.runs().await {
        node.exports.shutdown().await;
        bail!("nothing could be started: see the lines above");
    }
    // Ends what is not waited for: the drills of the schedule, whose scripts run on the runtime's threads for blocking work, and groups that come late.
    let (quit, quitting) = watch::channel(false);
    let nothing_left = Arc::new(Notify::new());
    let late = tokio::spawn(node.clone().take_in(starting, nothing_left.clone(), quitting.clone()));
    node.export_active().await;
    node.finish_drills();
    let handbacks = tokio::spawn(node.clone().follow_handbacks());
    // After the active copies: their guests come first.
    let onward = node.follow_onward().await;

    let (stop, stopping) = watch::channel(false);
    let schedule = tokio::spawn(drills::run_schedule(Arc::clone(&node), config.drills, quitting));
    let control = tokio::spawn(serve_control(listener, node.clone(), stopping));
    let metrics = match config.node.metrics {
        None => None,
        Some(address) => match metrics::listen(address).await {
            Ok(listener) => Some(tokio::spawn(metrics::serve(listener, node.clone()))),
            Err(error) => {
                tracing::error!(%address, "metrics are not served: {error}; choose another metrics address");
                None
            }
        },
    };
    let fenced = tokio::spawn(fenced::watch(node.clone()));
    let mut for_nothing = false;
    if !told_to_stop {
        notify::notify("READY=1");
        println!("ready");
        tracing::info!(name = node.id.name, key = %node.id.key, control = %config.node.control.display(), "ready");
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = nothing_left.notified() => for_nothing = true,
        }
    }
    notify::notify("STOPPING=1");
    tracing::info!("stopping; a second signal stops at once");
    let orderly = async {
        node.primaries.read().await.end_flushes();
        quit.send_replace(true);
        node.adoptions.stop();
        // Guests first, so that the last epoch holds all that they wrote.
        node.exports.shutdown().await;
        // They hold their groups.
        end(onward).await;
        match late.await {
            Ok(mut late) => {
                let mut primaries = node.primaries.write().await;
                late.arrived().into_iter().for_each(|arrived| primaries.arrive(arrived));
            }
            Err(error) => tracing::error!("groups that came late are not stopped in order: {error}"),
        }
        node.primaries.write().await.shutdown(config.node.stop_timeout).await;
        // A script that does not listen is killed after a while.
        let _ = schedule.await;
        let ((), hooks) = tokio::join!(node.adoptions.stopped(), node.end_drills());
        if let Some(Ok(copies)) = &node.copies {
            copies.shutdown().await;
        }
        stop.send_replace(true);
        // Of the drills that were ended; each has its limit.
        for hook in hooks {
            let _ = hook.await;
        }
    };
    tokio::select! {
        () = orderly => tracing::info!("stopped"),
        _ = terminate.recv() => tracing::warn!("stopped at once; what was not committed is sent again at the next start"),
        _ = interrupt.recv() => tracing::warn!("stopped at once; what was not committed is sent again at the next start"),
    }
    control.abort();
    handbacks.abort();
    fenced.abort();
    if let Some(metrics) = metrics {
        metrics.abort();
    }
    if for_nothing {
        bail!("nothing could be started: see the lines above");
    }
    Ok(())
}

async fn end(mut tasks: tokio::task::JoinSet<()>) {
    tasks.abort_all();
    while tasks.join_next().await.is_some() {}
}

async fn serve_control(listener: tokio::net::UnixListener, node: Arc<Node>, mut stopping: watch::Receiver<bool>) {
    let stopped = async move {
        // An error means that the sender is gone: stop as well.
        let _ = stopping.wait_for(|stop| *stop).await;
    };
    if let Err(error) = axum::serve(listener, control::router(node)).with_graceful_shutdown(stopped).await {
        tracing::error!(%error, "the control socket failed");
    }
}
