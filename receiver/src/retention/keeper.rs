//! The thread that folds and thins: one for a receiver, at the lowest priority, one group after the other.
//!
//! Looks at every group now and then, and has done what is [`due`](super::due), or what a [`plan`](super::thin::plan) says. What fails is told in the group's status and tried again
//! later. Never in the way of what arrives: the group's thread only does the two changes of the superblock.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::runtime::Handle;

use super::thin::{self, Plan};
use super::{Due, RetentionStatus, SPACE_HIGH_PERCENT, SPACE_LOW_PERCENT, Situation, due};
use crate::base;
use crate::disk::is_out_of_space;
use crate::group::{Group, GroupError, Shared, Usage};
use crate::journal::JournalError;
use crate::node::Node;

/// Niceness of the thread: below capture and comparisons.
const NICE: i32 = 15;
/// From look to look; a client short of space is not kept waiting.
const PERIOD: Duration = Duration::from_secs(1);
/// The ladder is asked at each of so many looks.
const LOOKS_OF_LADDER: u32 = 5;
/// After a fold that failed, the group is left alone for so many looks.
const LOOKS_AFTER_FAILURE: u32 = 30;

/// Segments that are thinned one after the other before the next group has its turn.
const THINS_OF_A_LOOK: usize = 8;

/// The running thread; dropping it stops it, within a frame of a fold.
#[derive(Debug)]
pub(crate) struct Keeper {
    stop: Option<Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Keeper {
    /// Starts it over the groups of `node`, as long as that lives.
    pub(crate) fn start(node: &Arc<Node>) -> std::io::Result<Self> {
        let (stop, stopped) = channel();
        let (node, runtime) = (Arc::downgrade(node), Handle::current());
        let run = move || run(&node, &runtime, &stopped);
        let thread = std::thread::Builder::new().name("retention".to_owned()).spawn(run)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }

    /// Stops it. Blocks until it has put down what it was doing.
    pub(crate) fn stop(mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the retention thread has panicked");
        }
    }
}

fn run(node: &Weak<Node>, runtime: &Handle, stopped: &Receiver<()>) {
    // Zero is this very thread. Without the right to be nicer nothing breaks.
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!(%error, "the retention thread keeps its priority");
    }
    let mut look = 0_u32;
    while stopped.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
        let Some(node) = node.upgrade() else { break };
        look = look.wrapping_add(1);
        for group in node.open_groups() {
            let failed = group.shared.retention.lock().last_error.is_some();
            let every = if failed {
                LOOKS_AFTER_FAILURE
            } else if is_urgent(&group.shared) {
                1
            } else {
                LOOKS_OF_LADDER
            };
            if !look.is_multiple_of(every) {
                continue;
            }
            let is_stopped = || stopped.try_recv() == Err(TryRecvError::Disconnected);
            let mut drive = Drive { ask: &|f| runtime.block_on(f), is_stopped: &is_stopped };
            tend(&group, crate::clock::unix_us(), &mut drive);
            if is_stopped() {
                return;
            }
        }
    }
}

/// While somebody walks the journal, the switch to the new base is tried so often, this far apart.
const SWITCH_TRIES: u32 = 600;
const SWITCH_AGAIN: Duration = Duration::from_millis(100);

fn is_urgent(shared: &Shared) -> bool {
    let state = shared.state.read();
    state.folding.is_some() || to_free(shared, state.journal_bytes) > 0
}

type Asked<'a> = std::pin::Pin<Box<dyn Future<Output = ()> + 'a>>;

/// How the group's thread is asked, and when to stop.
pub(crate) struct Drive<'a> {
    pub(crate) ask: &'a dyn Fn(Asked<'_>),
    pub(crate) is_stopped: &'a dyn Fn() -> bool,
}

impl Drive<'_> {
    fn wait<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let mut answer = None;
        let slot = &mut answer;
        (self.ask)(Box::pin(async move { *slot = Some(future.await) }));
        answer
    }
}

/// What is to be done with a group.
enum Task {
    Fold(Due),
    Thin { plan: Plan, early: bool },
}

/// Looks at a group and does what is due.
pub(crate) fn tend(group: &Group, now_unix_us: u64, drive: &mut Drive<'_>) {
    let shared = &group.shared;
    if let Some(damage) = shared.names.damage() {
        shared.retention.lock().last_error = Some(damage.to_string());
        return;
    }
    make_sums(shared, drive);
    for _ in 0..THINS_OF_A_LOOK {
        match look(shared, now_unix_us) {
            Some(Task::Fold(due)) => return do_fold(group, due, drive),
            Some(Task::Thin { plan, early }) if !(drive.is_stopped)() => {
                if !do_thin(group, &plan, early, drive) {
                    return;
                }
            }
            _ => return,
        }
    }
}

fn do_fold(group: &Group, due: Due, drive: &mut Drive<'_>) {
    let shared = &group.shared;
    if due.early {
        say_early(shared, &format!("points before {} are given up", due.to));
    }
    match fold(group, due, drive) {
        Ok(()) => {
            let mut status = shared.retention.lock();
            status.folds += 1;
            status.early_folds += u64::from(due.early);
            status.last_error = None;
        }
        // Somebody began to look at a point a moment ago; the next look takes it into account.
        Err(GroupError::Kept { .. } | GroupError::Closed { .. }) => {}
        Err(error) => failed(shared, "points cannot be folded into the base", &error),
    }
    shared.fold_waiting.store(0, std::sync::atomic::Ordering::Relaxed);
    let mut status = shared.retention.lock();
    (status.folding_done_bytes, status.folding_total_bytes) = (0, 0);
}

/// Makes the checksums of bases that have none, which an older node has left. If they cannot be made the bases are read unchecked, and folded: it
/// is said, and tried again at the next start.
fn make_sums(shared: &Shared, drive: &Drive<'_>) {
    if shared.base_sums.iter().all(|sums| sums.get().is_some()) || shared.retention.lock().sums_error.is_some() {
        return;
    }
    if let Err((path, error)) = try_make_sums(shared, drive) {
        let line = format!(
            "{}: its checksums cannot be made, it is read unchecked until the node is started again: {error}",
            path.display()
        );
        tracing::error!("{}/{}: {line}", shared.folder.client, shared.folder.group);
        shared.retention.lock().sums_error = Some(line);
    }
    let mut status = shared.retention.lock();
    (status.sums_done_bytes, status.sums_total_bytes) = (0, 0);
}

fn try_make_sums(shared: &Shared, drive: &Drive<'_>) -> Result<(), (PathBuf, std::io::Error)> {
    let missing: Vec<_> = shared.volumes.iter().zip(&shared.base_sums).filter(|(_, sums)| sums.get().is_none()).collect();
    for (volume, _) in &missing {
        let path = shared.folder.base(&volume.name);
        let bytes = base::data_bytes(&path, volume.size_bytes).map_err(|error| (path, error))?;
        shared.retention.lock().sums_total_bytes += bytes;
    }
    for (volume, sums) in missing {
        let (path, size) = (shared.folder.base(&volume.name), volume.size_bytes);
        let mut goes_on = |bytes| {
            shared.retention.lock().sums_done_bytes += bytes;
            !(drive.is_stopped)()
        };
        let made = base::make(&shared.disk, &path, size, &mut goes_on).and_then(|made| match made {
            true => base::Sums::open(&path, size),
            false => Ok(None),
        });
        // Readers that are there use them from here on.
        match made.map_err(|error| (path.clone(), error))? {
            Some(made) => drop(sums.set(made)),
            None => return Ok(()),
        }
        tracing::info!("{}: the base has checksums from now on", path.display());
    }
    Ok(())
}

/// Returns whether there may be more to do at once.
fn do_thin(group: &Group, plan: &Plan, early: bool, drive: &mut Drive<'_>) -> bool {
    let shared = &group.shared;
    if early {
        let (oldest, newest) = (plan.drop.first(), plan.drop.last());
        let between = oldest.zip(newest).map_or_else(String::new, |(oldest, newest)| format!(" from {oldest} to {newest}"));
        say_early(shared, &format!("{} points{between} are left out", plan.drop.len()));
    }
    let done = thin(group, plan, drive);
    let mut status = shared.retention.lock();
    (status.thinning_done_bytes, status.thinning_total_bytes) = (0, 0);
    match &done {
        Ok(true) => {
            status.thins += 1;
            status.early_thins += u64::from(early);
            status.last_error = None;
        }
        // Looked at again when its points have come down to the next rung.
        Ok(false) => pass_over(shared, plan),
        // Somebody began to look at a point a moment ago; the next look takes it into account.
        Err(GroupError::Kept { .. } | GroupError::Closed { .. }) => {}
        Err(error) => {
            drop(status);
            // On a full disk folding may be what is left. Damage does not go away: it must not be in the way of what is behind it.
            if early || !is_full(error) {
                pass_over(shared, plan);
            }
            failed(shared, "points cannot be left out of the journal", error);
        }
    }
    done.is_ok()
}

fn is_full(error: &GroupError) -> bool {
    matches!(error, GroupError::Journal(JournalError::Io { source, .. }) if is_out_of_space(source))
}

/// The segments of `plan` stay as they are on this rung.
fn pass_over(shared: &Shared, plan: &Plan) {
    for segment in shared.ended.lock().iter_mut().filter(|segment| (plan.first..=plan.last).contains(&segment.number)) {
        segment.thinned = segment.thinned.max(plan.spacing);
    }
}

fn say_early(shared: &Shared, what: &str) {
    let (folder, usage) = (&shared.folder, &shared.usage);
    let used = usage.used.load(std::sync::atomic::Ordering::Relaxed);
    let journal_bytes = shared.state.read().journal_bytes;
    let whose = match (shared.space_max, usage.max) {
        (Some(max), _) if excess(journal_bytes, Some(max)) > 0 => format!("it has used {journal_bytes} of its {max}"),
        (_, max) => format!("client '{}' has used {used} of its {}", folder.client, max.unwrap_or(0)),
    };
    tracing::warn!("{}/{}: {whose} bytes of space: {what} earlier than the ladder says", folder.client, folder.group);
}

fn failed(shared: &Shared, what: &str, error: &dyn std::error::Error) {
    let line = format!("{what}: {error}; it is tried again");
    let mut status = shared.retention.lock();
    if status.last_error.as_ref() != Some(&line) {
        tracing::error!("{}/{}: {line}", shared.folder.client, shared.folder.group);
    }
    status.last_error = Some(line);
}

/// What the ladder says first; for want of space points are left out earlier, oldest first and each rung as late as can be, and only then given up.
fn look(shared: &Shared, now_unix_us: u64) -> Option<Task> {
    let named = shared.names.points();
    let ended = shared.ended.lock().clone();
    let state = shared.state.read();
    let fork = state.fork.as_ref().map(|fork| fork.point);
    let to_free = to_free(shared, state.journal_bytes);
    let situation = Situation {
        points: &state.points,
        base: state.beginning.base,
        folding: state.folding,
        pinned: [shared.pins.oldest(), fork].into_iter().flatten().min(),
        named: &named,
        ended: &ended,
        to_free,
        now_unix_us,
    };
    let ladder = &shared.usage.ladder;
    let (fold, held_by) = due(ladder, &situation);
    shared.retention.lock().held_by = held_by;
    if let Some(due) = fold.filter(|due| state.folding.is_some() || !due.early) {
        return Some(Task::Fold(due));
    }
    if state.folding.is_some() {
        return None;
    }
    let stay = shared.points_that_stay(fork);
    let of = thin::Situation {
        points: &state.points,
        stay: &stay,
        ended: &ended,
        segment_bytes_max: shared.segment_bytes_max,
        now_unix_us,
        patient: to_free == 0,
    };
    let hastes = if to_free > 0 { ladder.rungs().len() } else { 1 };
    let plan = (0..hastes).find_map(|haste| Some(Task::Thin { plan: thin::plan(ladder, &of, haste)?, early: haste > 0 }));
    plan.or(fold.map(Task::Fold))
}

/// What of a group's journal has to go so that its client has room again, in proportion to what the group takes, or so that it has room itself.
fn to_free(shared: &Shared, journal_bytes: u64) -> u64 {
    let usage: &Usage = &shared.usage;
    let used = usage.used.load(std::sync::atomic::Ordering::Relaxed);
    let of_client = u128::from(excess(used, usage.max)) * u128::from(journal_bytes) / u128::from(used.max(1));
    u64::try_from(of_client).unwrap_or(u64::MAX).max(excess(journal_bytes, shared.space_max))
}

/// How much of what is used has to go.
fn excess(used: u64, max: Option<u64>) -> u64 {
    let (used, percent) = (u128::from(used), |max: u64, of: u64| u128::from(max) * u128::from(of) / 100);
    let Some(max) = max.filter(|max| used > percent(*max, SPACE_HIGH_PERCENT)) else { return 0 };
    u64::try_from(used - percent(max, SPACE_LOW_PERCENT).min(used)).unwrap_or(u64::MAX)
}

/// Whether it was worth it.
fn thin(group: &Group, plan: &Plan, drive: &mut Drive<'_>) -> Result<bool, GroupError> {
    let shared = &group.shared;
    let closed = || GroupError::Closed { group: shared.folder.group.clone() };
    let written = shared.write_thinned(plan, &mut |done, total| {
        let mut status = shared.retention.lock();
        (status.thinning_done_bytes, status.thinning_total_bytes) = (done, total);
        if (drive.is_stopped)() { Err(closed()) } else { Ok(()) }
    })?;
    let Some(thinned) = written.map(Arc::new) else { return Ok(false) };
    shared.retention.lock().thinned_written_bytes += thinned.written_bytes();
    let mut tries = 0;
    let ended = loop {
        match drive.wait(group.end_thin(&thinned)).unwrap_or_else(|| Err(closed())) {
            // Somebody walks the journal; what is written need not be written again for that.
            Err(GroupError::Kept { .. }) if tries < SWITCH_TRIES && shared.is_walked() && !(drive.is_stopped)() => {
                tries += 1;
                std::thread::sleep(SWITCH_AGAIN);
            }
            done => break done,
        }
    };
    if let Err(GroupError::Kept { .. }) = &ended {
        shared.forget_thinned(&thinned)?;
    }
    ended?;
    shared.remove_thinned(&thinned)?;
    let mut status = shared.retention.lock();
    status.thinned_points += thinned.points();
    status.thinned_freed_bytes += thinned.freed_bytes();
    drop(status);
    tracing::info!(
        "{}/{}: {} points were left out of segments {} to {} of the journal: {} bytes written, {} given back",
        shared.folder.client,
        shared.folder.group,
        thinned.points(),
        plan.first,
        plan.last,
        thinned.written_bytes(),
        thinned.freed_bytes()
    );
    Ok(true)
}

fn fold(group: &Group, due: Due, drive: &mut Drive<'_>) -> Result<(), GroupError> {
    let shared = &group.shared;
    let closed = || GroupError::Closed { group: shared.folder.group.clone() };
    let entry = drive.wait(group.begin_fold(due.to)).ok_or_else(closed)??;
    let (folded, at_base) = shared.write_base(&entry, &mut |done, total| {
        let mut status = shared.retention.lock();
        (status.folding_done_bytes, status.folding_total_bytes) = (done, total);
        if (drive.is_stopped)() { Err(closed()) } else { Ok(()) }
    })?;
    shared.retention.lock().folded_bytes += folded.written_bytes;
    let mut tries = 0;
    let switched = loop {
        match drive.wait(group.end_fold(due.to)).ok_or_else(closed)? {
            // Somebody walks the journal; what is written need not be written again for that.
            Err(GroupError::Kept { .. }) if tries < SWITCH_TRIES && !(drive.is_stopped)() => {
                tries += 1;
                std::thread::sleep(SWITCH_AGAIN);
            }
            done => break done?,
        }
    };
    let freed = shared.clean_up(switched, &at_base)?;
    shared.retention.lock().freed_bytes += freed;
    tracing::info!(
        "{}/{}: the base is at point {}: {} bytes written into it, {} bytes made holes, {freed} bytes of journal given back",
        shared.folder.client,
        shared.folder.group,
        due.to,
        folded.written_bytes,
        folded.punched_bytes
    );
    Ok(())
}

/// The status of a group's retention.
pub(crate) fn status(shared: &Shared) -> RetentionStatus {
    let state = shared.state.read();
    let (base, folding) = (state.beginning.base, state.folding);
    drop(state);
    RetentionStatus { base, folding, ..shared.retention.lock().clone() }
}
