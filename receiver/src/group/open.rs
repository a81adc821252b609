//! From a group's folder to a group: recovery of its journal into an index, and its thread.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};
use proto::fencing::GroupRole;
use proto::units::blocks_of;
use proto::{BlockExtent, EpochId, FrameHeader, FrameKind, Seal};
use tokio::sync::{mpsc, watch};

use super::stage::Stage;
use super::worker::Worker;
use super::{Beginning, Drained, GROUP_QUEUE_MAX, Group, GroupError, PointEntry, Runner, Shared, State, Usage};
use crate::base::Sums;
use crate::core::Arrived;
use crate::frames::FrameStore;
use crate::index::{FrameId, FrameTable, Index};
use crate::journal::{self, Expected, JournalOptions, Mark, Sink, Unsealed};
use crate::kept::KeptForks;
use crate::liveness::Heard;
use crate::names::Names;
use crate::pins::Pins;
use crate::scrub::Findings;
use crate::store::GroupFolder;
use crate::superblock::{SuperblockFile, Volume};

/// Collects what recovery finds.
struct Recovered<'a> {
    committed: Index,
    stage: Stage,
    points: Vec<PointEntry>,
    frames: &'a FrameStore,
    next_committed: u32,
    /// What is there of an epoch that was arriving is for the primary to go on with; a promoted group has none.
    keeps: bool,
    unsealed: Option<Unsealed>,
}

impl Sink for Recovered<'_> {
    fn frame(&mut self, segment: u32, offset: u64, header: &FrameHeader, extents: &[BlockExtent]) {
        let id = number_frame(&mut self.frames.table.write(), segment, offset, header.kind);
        self.stage.add(&self.committed, (header.volume, header.kind, id), extents);
    }

    fn sealed(&mut self, seal: &Seal, end: Mark) {
        self.stage.seal(&mut self.committed);
        self.next_committed = next_frame(self.frames);
        self.points.push(PointEntry::new(seal, end, self.next_committed));
    }

    fn unsealed(&mut self, unsealed: &Unsealed) -> bool {
        self.unsealed = Some(unsealed.clone()).filter(|_| self.keeps);
        self.keeps
    }

    fn dropped(&mut self) {
        self.stage.clear();
        self.frames.table.write().truncate(self.next_committed);
    }
}

pub(super) fn next_frame(frames: &FrameStore) -> u32 {
    frames.table.read().next().map_or(u32::MAX, |f| f.0)
}

/// Enters a frame into the table. The same order of frames gives the same numbers, here and in every rebuild.
pub(super) fn number_frame(table: &mut FrameTable, segment: u32, offset: u64, kind: FrameKind) -> FrameId {
    match kind {
        FrameKind::Zero => FrameId::ZERO,
        FrameKind::Data => {
            let id = table.next().unwrap_or(FrameId::MAX);
            table.push(segment, u32::try_from(offset).unwrap_or(u32::MAX));
            id
        }
    }
}

impl Group {
    /// Opens a group's folder with recovery and starts its thread.
    pub(crate) fn open(folder: GroupFolder, usage: Arc<Usage>, options: JournalOptions) -> Result<Arc<Self>, GroupError> {
        let group = Self::parked(folder, usage, options)?;
        let name = group.shared.folder.group.clone();
        let mut runner = group.runner.lock();
        if let Runner::Parked(mut worker, inbox) = std::mem::replace(&mut *runner, Runner::Stopped) {
            let thread = std::thread::Builder::new().name(format!("group-{name}")).spawn(move || worker.run(inbox));
            *runner = Runner::Thread(thread.map_err(|source| GroupError::Thread { group: name, source })?);
        }
        drop(runner);
        Ok(group)
    }

    /// Opens a group's folder with recovery; nothing is done for it until somebody does.
    pub(crate) fn parked(folder: GroupFolder, usage: Arc<Usage>, options: JournalOptions) -> Result<Arc<Self>, GroupError> {
        let superblock = SuperblockFile::open(&options.disk, &folder.path)?;
        let block = superblock.get().clone();
        let volume_blocks: Arc<[u64]> = block.volumes.iter().map(|v| blocks_of(v.size_bytes)).collect();
        let expected = Expected {
            group_id: block.group_id,
            first_segment: block.first_segment,
            base: block.base,
            volume_blocks: Arc::clone(&volume_blocks),
        };
        let frames = FrameStore::new(&folder.journal(), Arc::clone(&volume_blocks));
        let empty = Index::new(block.volumes.iter().map(|v| v.size_bytes), block.base.is_none());
        let mut found = Recovered {
            committed: empty,
            stage: Stage::default(),
            points: PointEntry::of_base(&block).into_iter().collect(),
            frames: &frames,
            next_committed: 0,
            keeps: block.role == GroupRole::Replica,
            unsealed: None,
        };
        let disk = options.disk.clone();
        let names = Names::open(&disk, &folder.path);
        let mut journal = journal::open(&folder.journal(), &expected, block.synced, options, &mut found)?;
        let Recovered { committed, stage, mut points, next_committed, unsealed, .. } = found;
        // The base may have something of what comes after them.
        points.retain(|p| block.folding.is_none_or(|folding| p.point >= folding));
        let newest = points.last().map(|p| p.point).or(block.base);
        let epoch = newest.map_or(EpochId(1), |p| p.epoch.next());
        journal.expect(epoch);
        let arrived = unsealed.map_or_else(|| Arrived::new(epoch), |u| Arrived { epoch, pass: u.pass, tally: u.tally });
        usage.used.fetch_add(journal.bytes(), Ordering::Relaxed);
        let state = State {
            generation: block.generation,
            role: block.role,
            fork: block.fork.clone(),
            index: committed,
            points,
            beginning: Beginning { base: block.base, first_segment: block.first_segment },
            folding: block.folding,
            peer: None,
            last_error: None,
            journal_bytes: journal.bytes(),
        };
        let pins = Arc::new(Pins::default());
        crate::fork::sweep(&disk, &folder, &block);
        let oldest = state.points.first().map(|p| p.point);
        let kept = KeptForks::open(&disk, &folder, (block.group_id, block.volumes.as_slice()), &pins, oldest);
        usage.used.fetch_add(kept.space_bytes(), Ordering::Relaxed);
        let base_sums = block.volumes.iter().map(|volume| base_sums(&folder, volume)).collect();
        let shared = Arc::new(Shared {
            drills: crate::drill::Results::open(&folder.path),
            ended: journal.ended(),
            segment_bytes_max: journal.segment_bytes_max(),
            space_max: usage.group_max.get(&folder.group).copied(),
            folder,
            disk,
            group_id: block.group_id,
            volume_blocks,
            pins,
            walks: RwLock::default(),
            owner: block.owner,
            base_sums,
            volumes: block.volumes,
            state: RwLock::new(state),
            frames,
            bytes_received: AtomicU64::new(0),
            findings: Findings::default(),
            drained: watch::Sender::new(Drained::No),
            heard: Heard::default(),
            kept,
            names,
            retention: Mutex::default(),
            onward: crate::onward::Turns::default(),
            fold_waiting: AtomicUsize::new(0),
            usage: Arc::clone(&usage),
        });
        let (commands, inbox) = mpsc::channel(GROUP_QUEUE_MAX);
        let worker = Worker {
            counted: journal.bytes(),
            told_bytes: arrived.tally.frame_bytes,
            arrived,
            next_committed,
            shared: Arc::clone(&shared),
            journal,
            superblock,
            stage,
            session: None,
            usage,
        };
        let runner = Mutex::new(Runner::Parked(Box::new(worker), inbox));
        Ok(Arc::new(Self { shared, commands, runner, active: tokio::sync::Mutex::new(None), flattening: Mutex::new(None) }))
    }
}

/// The checksums of a base. Without them it is read unchecked, until they are made of what it holds.
fn base_sums(folder: &GroupFolder, volume: &Volume) -> OnceLock<Sums> {
    let base = folder.base(&volume.name);
    match Sums::open(&base, volume.size_bytes) {
        Ok(Some(sums)) => return OnceLock::from(sums),
        Ok(None) => tracing::warn!("{}: the base has no checksums; they are made of what it holds now", base.display()),
        Err(error) => tracing::error!("{}: cannot open the checksums of the base: {error}", base.display()),
    }
    OnceLock::new()
}
