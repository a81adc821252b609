//! One group at the receiver: what everyone may look at, and the thread that alone writes its journal.
//!
//! All changes of a group go through one bounded channel to its own thread, so file I/O never runs on the async threads, a
//! session that lost the group cannot write (its commands carry its number), and a promotion stands between two
//! commits, never in one. Frames of the next epoch wait in the channel while the thread syncs.

mod error;
pub(crate) mod fold;
mod open;
mod points;
pub(crate) mod stage;
#[cfg(test)]
mod tests;
pub(crate) mod thin;
mod worker;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use parking_lot::{Mutex, RwLock};
use proto::fencing::GroupRole;
use proto::{EpochId, Fingerprint, Generation, Name, Point, Seal, SessionToken};
use tokio::sync::{mpsc, oneshot, watch};

use crate::base::Sums;
use crate::batch::Batch;
use crate::core::{Arrived, Cause, StoredGroup};
use crate::disk::Disk;
use crate::fork::{FlattenStatus, Flattening, OpenFork};
use crate::frames::FrameStore;
use crate::index::Index;
use crate::journal::{Ended, GroupId, Mark};
use crate::kept::KeptForks;
use crate::liveness::Heard;
use crate::names::Names;
use crate::pins::{Pinned, Pins};
use crate::retention::{Ladder, RetentionStatus};
use crate::scrub::Findings;
use crate::store::GroupFolder;
use crate::superblock::{ForkInUse, Superblock, Volume};
pub use error::GroupError;
use open::{next_frame, number_frame};
use worker::Worker;

/// Commands waiting for a group's thread, most of them batches of up to 390 KiB. When full, the session stops reading, QUIC flow
/// control stops the primary, and its current epoch grows.
pub const GROUP_QUEUE_MAX: usize = 16;
/// Events waiting for a session. Never full: a session has at most so many commits in flight, and one event ends it.
pub(crate) const SESSION_EVENTS_MAX: usize = crate::core::EPOCHS_IN_FLIGHT_MAX as usize + 4;

/// What a client's groups take, against its limit.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    pub(crate) used: AtomicU64,
    pub(crate) max: Option<u64>,
    /// Limits of single groups.
    pub(crate) group_max: BTreeMap<Name, u64>,
    /// Which of their points are kept.
    pub(crate) ladder: Ladder,
}

/// A committed point.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PointEntry {
    pub(crate) point: Point,
    pub(crate) cut_unix_us: u64,
    pub(crate) first_write_unix_us: u64,
    pub(crate) frame_bytes: u64,
    pub(crate) data_blocks: u64,
    pub(crate) zero_blocks: u64,
    pub(crate) session: SessionToken,
    pub(crate) end: Mark,
    /// Number of the first data frame after it.
    pub(crate) next_frame: u32,
}

impl PointEntry {
    /// The point of the base, whose seal is gone. An adopted image is no point: nobody knows yet what it shows.
    fn of_base(block: &Superblock) -> Option<Self> {
        let seal = block.base_seal;
        Some(Self {
            point: block.base.filter(|point| point.epoch > EpochId(0))?,
            cut_unix_us: seal.cut_unix_us,
            first_write_unix_us: seal.first_write_unix_us,
            frame_bytes: 0,
            data_blocks: 0,
            zero_blocks: 0,
            session: seal.session,
            end: Mark { segment: block.first_segment.saturating_sub(1), bytes: 0 },
            next_frame: 0,
        })
    }

    fn new(seal: &Seal, end: Mark, next_frame: u32) -> Self {
        Self {
            next_frame,
            point: seal.point(),
            cut_unix_us: seal.cut_unix_us,
            first_write_unix_us: seal.first_write_unix_us,
            frame_bytes: seal.frame_bytes,
            data_blocks: seal.data_blocks,
            zero_blocks: seal.zero_blocks,
            session: seal.session,
            end,
        }
    }
}

/// Number of a session; never used twice by a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SessionId(pub(crate) u64);

/// Who replicates now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    pub(crate) since_unix_us: u64,
    pub(crate) interval_ms: u32,
}

/// What a group tells the session that has it.
#[derive(Debug)]
pub(crate) enum GroupEvent {
    Committed(Point),
    /// Its primary is asked to take no more writes.
    Drain,
    Superseded,
    Fenced(Generation),
    Storage(Cause),
}

/// Answer to a claim.
#[derive(Debug)]
pub(crate) enum Claimed {
    Yes {
        committed: Option<Point>,
        /// The session that cut it.
        writer: SessionToken,
        /// What is there of the next epoch.
        arrived: Option<Box<Arrived>>,
        /// Frames of the epoch that arrives, whenever some were appended.
        staged: watch::Receiver<(EpochId, u64)>,
    },
    /// Generation or role are not what they were when the group was looked up.
    Changed,
    No(Cause),
}

/// What is known of a primary that was asked to take no more writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drained {
    /// Nobody asked.
    No,
    /// It has not answered.
    Waiting,
    /// All that it took is committed, up to this point. So it is until another session begins, which lets it take writes again.
    All(Point),
    /// It cannot be said any more.
    Lost,
}

impl Drained {
    /// What is known when its session ends.
    fn without_session(self) -> Self {
        if self == Self::Waiting { Self::Lost } else { self }
    }
}

/// A fork that was promised durably.
#[derive(Clone, Debug)]
pub(crate) struct Promoted {
    pub(crate) generation: Generation,
    pub(crate) fork: ForkInUse,
}

/// The newest point at an instant between two commands.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) point: Option<Point>,
    pub(crate) index: Pinned,
}

#[derive(Debug)]
enum Command {
    Claim {
        session: SessionId,
        peer: Peer,
        generation: Generation,
        events: mpsc::Sender<GroupEvent>,
        reply: oneshot::Sender<Claimed>,
    },
    Append {
        session: SessionId,
        batch: Batch,
    },
    Commit {
        session: SessionId,
        seal: Seal,
    },
    Abandon {
        session: SessionId,
    },
    /// Answers with the newest point once all commands before are done.
    Snapshot {
        session: SessionId,
        reply: oneshot::Sender<Snapshot>,
    },
    Release {
        session: SessionId,
        reason: String,
    },
    Promote {
        point: Option<Point>,
        /// Only while its primary takes no more writes, and has none that this point lacks.
        drained: bool,
        reply: oneshot::Sender<Result<Promoted, GroupError>>,
    },
    /// Takes the group over to give it back, if it is in that role and generation.
    ClaimHandback {
        session: SessionId,
        peer: Peer,
        stands: (GroupRole, Generation),
        events: mpsc::Sender<GroupEvent>,
        reply: oneshot::Sender<Result<Option<Point>, GroupError>>,
    },
    /// Seals what is staged and makes the group a replica of the next generation. Answers `None` to a session that lost the group.
    Hand {
        session: SessionId,
        seal: Seal,
        reply: oneshot::Sender<Result<Option<Generation>, GroupError>>,
    },
    /// Asks the session that has the group to have its primary take no more writes. Answers whether there is one.
    Drain {
        reply: oneshot::Sender<bool>,
    },
    /// Ends the session, so that its primary comes back and takes writes again.
    GiveUpDrain,
    /// Gives up the points before this one, durably: a fold overwrites what they need.
    BeginFold {
        point: Point,
        reply: oneshot::Sender<Result<PointEntry, GroupError>>,
    },
    /// The base has everything up to this point, durably.
    EndFold {
        point: Point,
        reply: oneshot::Sender<Result<fold::Switched, GroupError>>,
    },
    /// A segment that was built takes the place of those that it stands for.
    EndThin {
        thinned: Arc<thin::Thinned>,
        reply: oneshot::Sender<Result<(), GroupError>>,
    },
    Stop,
}

/// Where the journal begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Beginning {
    pub(crate) base: Option<Point>,
    pub(crate) first_segment: u32,
}

/// What holds now, for readers.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) generation: Generation,
    pub(crate) role: GroupRole,
    pub(crate) fork: Option<ForkInUse>,
    pub(crate) index: Index,
    /// Oldest first; that of the base, if there is one, is the first.
    pub(crate) points: Vec<PointEntry>,
    pub(crate) beginning: Beginning,
    /// A fold up to this point has begun, and may have to be done again.
    pub(crate) folding: Option<Point>,
    pub(crate) peer: Option<Peer>,
    pub(crate) last_error: Option<String>,
    pub(crate) journal_bytes: u64,
}

/// The part that the thread, sessions and readers share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) folder: GroupFolder,
    pub(crate) disk: Disk,
    pub(crate) group_id: GroupId,
    pub(crate) volume_blocks: Arc<[u64]>,
    pub(crate) pins: Arc<Pins>,
    /// The segments of the journal that have ended.
    pub(crate) ended: Ended,
    pub(crate) segment_bytes_max: u64,
    /// Most bytes that the journal may take, if the group has a limit of its own.
    pub(crate) space_max: Option<u64>,
    /// Held by whoever walks the journal; segments are given up or replaced only while nobody does.
    walks: RwLock<()>,
    pub(crate) owner: Fingerprint,
    pub(crate) volumes: Vec<Volume>,
    pub(crate) state: RwLock<State>,
    pub(crate) frames: FrameStore,
    /// The checksums of each volume's base, once it has any.
    pub(crate) base_sums: Vec<OnceLock<Sums>>,
    pub(crate) bytes_received: AtomicU64,
    pub(crate) findings: Findings,
    /// How far its primary is that was asked to take no more writes.
    pub(crate) drained: watch::Sender<Drained>,
    pub(crate) drills: crate::drill::Results,
    pub(crate) heard: Heard,
    /// What its primary had written of its own.
    pub(crate) kept: KeptForks,
    pub(crate) names: Names,
    pub(crate) retention: Mutex<RetentionStatus>,
    /// For who shows the copy onward.
    pub(crate) onward: crate::onward::Turns,
    /// Bytes that a fold has collected and not written yet.
    pub(crate) fold_waiting: AtomicUsize,
    pub(crate) usage: Arc<Usage>,
}

/// A handle to a group.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    runner: Mutex<Runner>,
    /// The fork in use, once it is open; also what keeps two failovers of one group from running at once.
    pub(crate) active: tokio::sync::Mutex<Option<Arc<OpenFork>>>,
    /// Makes plain files of it.
    pub(crate) flattening: Mutex<Option<Flattening>>,
}

/// Who performs the commands.
#[derive(Debug)]
enum Runner {
    /// Nobody yet; a simulation does it by hand.
    Parked(Box<Worker>, mpsc::Receiver<Command>),
    Thread(JoinHandle<()>),
    Stopped,
}

impl Group {
    pub(crate) fn stored(&self, key: Fingerprint) -> StoredGroup {
        self.shared.stored(key)
    }

    /// Takes the group over for a session. When this answers yes, no session before it writes any more.
    pub(crate) async fn claim(
        &self,
        session: SessionId,
        peer: Peer,
        generation: Generation,
    ) -> (Claimed, mpsc::Receiver<GroupEvent>) {
        let (events, inbox) = mpsc::channel(SESSION_EVENTS_MAX);
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Claim { session, peer, generation, events, reply }).await;
        let closed = || Claimed::No(Arc::new(GroupError::Closed { group: self.shared.folder.group.clone() }));
        (answer.await.unwrap_or_else(|_| closed()), inbox)
    }

    /// Hands frames over; waits while the queue is full. A session that lost the group is told by its events.
    pub(crate) async fn append(&self, session: SessionId, batch: Batch) {
        let _ = self.commands.send(Command::Append { session, batch }).await;
    }

    pub(crate) async fn commit(&self, session: SessionId, seal: Seal) {
        let _ = self.commands.send(Command::Commit { session, seal }).await;
    }

    pub(crate) async fn abandon(&self, session: SessionId) {
        let _ = self.commands.send(Command::Abandon { session }).await;
    }

    /// Asks for the point of the commit that was handed over last; it is there when that commit is done. A session that lost the group gets
    /// no answer.
    pub(crate) async fn snapshot(&self, session: SessionId) -> oneshot::Receiver<Snapshot> {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Snapshot { session, reply }).await;
        answer
    }

    pub(crate) async fn release(&self, session: SessionId, reason: String) {
        let _ = self.commands.send(Command::Release { session, reason }).await;
    }

    /// Raises the generation durably and promises the fork of `point`. Asked again, it answers the same.
    pub(crate) async fn promote(&self, point: Option<Point>) -> Result<Promoted, GroupError> {
        self.promote_if(point, false).await
    }

    /// As [`promote`](Self::promote), at the point that [`drain`](Self::drain) gave; refused if its primary takes writes again.
    pub(crate) async fn promote_drained(&self, point: Point) -> Result<Promoted, GroupError> {
        self.promote_if(Some(point), true).await
    }

    async fn promote_if(&self, point: Option<Point>, drained: bool) -> Result<Promoted, GroupError> {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Promote { point, drained, reply }).await;
        answer.await.unwrap_or_else(|_| Err(GroupError::Closed { group: self.shared.folder.group.clone() }))
    }

    /// Takes the group over for a handback. Returns its newest point.
    pub(crate) async fn claim_handback(
        &self,
        session: SessionId,
        peer: Peer,
        stands: (GroupRole, Generation),
        events: mpsc::Sender<GroupEvent>,
    ) -> Result<Point, GroupError> {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::ClaimHandback { session, peer, stands, events, reply }).await;
        let group = || self.shared.folder.group.clone();
        let newest = answer.await.unwrap_or_else(|_| Err(GroupError::Closed { group: group() }))?;
        newest.ok_or_else(|| GroupError::Changed { group: group() })
    }

    /// Ends a handback: see [`Command::Hand`].
    pub(crate) async fn hand(&self, session: SessionId, seal: Seal) -> Result<Option<Generation>, GroupError> {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Hand { session, seal, reply }).await;
        answer.await.unwrap_or_else(|_| Err(GroupError::Closed { group: self.shared.folder.group.clone() }))
    }

    /// Has the primary take no more writes and commit what there is; waits until that is done. Returns the newest point.
    pub(crate) async fn drain(&self, within: std::time::Duration) -> Result<Point, GroupError> {
        let group = || self.shared.folder.group.clone();
        let mut drained = self.shared.drained.subscribe();
        if !self.ask_to_drain().await? {
            return Err(GroupError::NotConnected { group: group() });
        }
        let answered = |drained: &Drained| *drained != Drained::Waiting;
        let waited = tokio::time::timeout(within, drained.wait_for(answered)).await;
        match waited.ok().and_then(Result::ok).map(|drained| *drained) {
            Some(Drained::All(point)) => Ok(point),
            Some(_) => Err(GroupError::DrainLost { group: group() }),
            None => {
                self.give_up_drain().await;
                Err(GroupError::NotDrained { group: group(), seconds: within.as_secs() })
            }
        }
    }

    /// Its primary says that all it took is committed.
    pub(crate) fn drained(&self, point: Point) {
        self.shared.drained.send_if_modified(|drained| {
            let waiting = *drained == Drained::Waiting;
            if waiting {
                *drained = Drained::All(point);
            }
            waiting
        });
    }

    /// Asks the primary that follows, if there is one, to take no more writes. Whether there is.
    pub(crate) async fn ask_to_drain(&self) -> Result<bool, GroupError> {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Drain { reply }).await;
        answer.await.map_err(|_| GroupError::Closed { group: self.shared.folder.group.clone() })
    }

    /// Lets the primary take writes again.
    pub(crate) async fn give_up_drain(&self) {
        let _ = self.commands.send(Command::GiveUpDrain).await;
    }

    /// Performs what is in the queue of a parked group, on this thread. Returns whether there was anything.
    #[cfg(any(test, feature = "simulation"))]
    pub(crate) fn turn(&self) -> bool {
        let mut runner = self.runner.lock();
        let Runner::Parked(worker, inbox) = &mut *runner else { return false };
        let mut any = false;
        while let Ok(command) = inbox.try_recv() {
            any = true;
            if worker.handle(command).is_break() {
                worker.stop();
                *runner = Runner::Stopped;
                break;
            }
        }
        any
    }

    pub(crate) fn queue_used(&self) -> usize {
        GROUP_QUEUE_MAX - self.commands.capacity()
    }

    /// How far the fork in use is made plain files, if it is.
    pub(crate) fn flattened(&self) -> Option<FlattenStatus> {
        self.flattening.lock().as_ref().map(Flattening::status)
    }

    /// Stops the thread after what is in its queue.
    pub(crate) async fn stop(&self) {
        let flattening = self.flattening.lock().take();
        if let Some(flattening) = flattening {
            flattening.stop().await;
        }
        let _ = self.commands.send(Command::Stop).await;
        self.commands.closed().await;
        let runner = std::mem::replace(&mut *self.runner.lock(), Runner::Stopped);
        if let Runner::Thread(thread) = runner {
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }
}

impl Shared {
    /// The fork of an active group.
    pub(crate) fn promised(&self) -> Result<Promoted, GroupError> {
        let state = self.state.read();
        match (state.role, &state.fork) {
            (GroupRole::Active, Some(fork)) => Ok(Promoted { generation: state.generation, fork: fork.clone() }),
            _ => Err(GroupError::Changed { group: self.folder.group.clone() }),
        }
    }

    pub(crate) fn stored(&self, key: Fingerprint) -> StoredGroup {
        let state = self.state.read();
        StoredGroup { generation: state.generation, role: state.role, owned: self.owner == key, volumes: self.volumes.clone() }
    }
}
