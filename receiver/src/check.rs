//! Reads a whole store offline and names every finding with file and offset. Changes nothing.
//!
//! Uses the decoders of the running receiver, and its own judgement: whatever a start would refuse is a finding. Beyond that, it looks at
//! every payload, and goes on after the first damage. An unsealed end of a journal is no finding: the next start cuts it off.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proto::units::{BLOCK_BYTES, blocks_of};
use proto::{DirtyMap, Name};
use serde::{Deserialize, Serialize};

use crate::base;
use crate::journal::{
    self, Bad, Expected, Item, JournalError, Mark, Payloads, Walker, list_journal, list_segments, segment_path,
};
use crate::store::{GroupFolder, Store, StoreError};
use crate::superblock::{FILE_NAME, OtherSlot, SLOT_BYTES, Slots, Superblock, SuperblockFile, Volume};

/// Progress is told after so many bytes at least.
const PROGRESS_BYTES: u64 = 16 << 20;
/// Findings kept of one group; more of them are counted only.
pub const FINDINGS_MAX: usize = 1000;

/// What a check found.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// By client and group.
    pub groups: Vec<GroupReport>,
}

impl Report {
    /// Whether nothing was found.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.groups.iter().all(|g| g.findings.is_empty())
    }
}

/// What a check found in one group.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct GroupReport {
    /// `client/group`.
    pub group: String,
    /// Committed points.
    pub points: u64,
    /// Frames in them.
    pub frames: u64,
    /// Segments read.
    pub segments: u64,
    /// Bytes read, of the journal and of the bases.
    pub bytes: u64,
    /// Bytes of them that were read of the bases.
    #[serde(default)]
    pub base_bytes: u64,
    /// Disks whose base has no checksums yet, so that it was not read.
    #[serde(default)]
    pub unchecked: Vec<Name>,
    /// Bytes after the last seal, which the next start cuts off.
    pub unsealed_bytes: u64,
    /// Everything that does not fit.
    pub findings: Vec<Finding>,
    /// Findings beyond the first [`FINDINGS_MAX`].
    pub findings_left_out: u64,
}

/// One thing that does not fit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The file.
    pub path: PathBuf,
    /// Where in it, in bytes.
    pub offset: u64,
    /// What.
    pub problem: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: at offset {}: {}", self.path.display(), self.offset, self.problem)
    }
}

/// How far a check is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes read so far.
    pub bytes_done: u64,
    /// Bytes to read in all.
    pub bytes_total: u64,
}

/// Checks the store at `root`, which no running node may hold.
///
/// # Errors
/// [`StoreError`] if the store is in use or cannot be listed; what is wrong within it is in the report.
pub fn check(root: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Report, StoreError> {
    let store = Store::lock_existing(root)?;
    let folders = store.groups()?;
    let bytes_total = folders.iter().map(bytes_of).sum();
    let mut meter = Meter { progress, done: 0, told: 0, total: bytes_total };
    let mut report = Report::default();
    for folder in &folders {
        let mut check = GroupCheck {
            report: GroupReport { group: format!("{}/{}", folder.client, folder.group), ..GroupReport::default() },
            meter: &mut meter,
        };
        check.group(folder);
        report.groups.push(check.report);
    }
    meter.tell();
    Ok(report)
}

/// Bytes that are read of a group, for the progress: what cannot be read is found later.
fn bytes_of(folder: &GroupFolder) -> u64 {
    let journal = folder.journal();
    let numbers = list_segments(&journal).unwrap_or_default();
    let segments =
        numbers.iter().filter_map(|n| std::fs::metadata(segment_path(&journal, *n)).ok()).map(|m| m.len()).sum::<u64>();
    let path = folder.path.join(FILE_NAME);
    let block = File::open(&path).ok().and_then(|file| SuperblockFile::read(&file, &path).ok()).map(|slots| slots.block);
    let base = |volume: &Volume| {
        let path = folder.base(&volume.name);
        if base::sums_path(&path).exists() { base::data_bytes(&path, volume.size_bytes).unwrap_or(0) } else { 0 }
    };
    segments + block.map_or(0, |block| block.volumes.iter().map(base).sum())
}

struct Meter<'a> {
    progress: &'a mut dyn FnMut(Progress),
    done: u64,
    told: u64,
    total: u64,
}

impl Meter<'_> {
    fn add(&mut self, bytes: u64) {
        self.done += bytes;
        if self.done - self.told >= PROGRESS_BYTES {
            self.tell();
        }
    }

    fn tell(&mut self) {
        self.told = self.done;
        (self.progress)(Progress { bytes_done: self.done.min(self.total), bytes_total: self.total });
    }
}

struct GroupCheck<'a, 'b> {
    report: GroupReport,
    meter: &'a mut Meter<'b>,
}

impl GroupCheck<'_, '_> {
    fn find(&mut self, path: &Path, offset: u64, problem: impl ToString) {
        if self.report.findings.len() < FINDINGS_MAX {
            self.report.findings.push(Finding { path: path.to_owned(), offset, problem: problem.to_string() });
        } else {
            self.report.findings_left_out += 1;
        }
    }

    fn group(&mut self, folder: &GroupFolder) {
        let path = folder.path.join(FILE_NAME);
        let read = File::open(&path).map_err(|e| e.to_string());
        let read = read.and_then(|file| SuperblockFile::read(&file, &path).map_err(|e| e.to_string()));
        let block = match read {
            Ok(Slots { holds, block, other, .. }) => {
                if let OtherSlot::Damaged(error) = other {
                    self.find(&path, (SLOT_BYTES - holds) as u64, format!("{error}; the other slot of the superblock holds"));
                }
                block
            }
            Err(problem) => return self.find(&path, 0, problem),
        };
        for volume in &block.volumes {
            let base = folder.base(&volume.name);
            match std::fs::metadata(&base) {
                Ok(m) if m.len() == volume.size_bytes => {}
                Ok(m) => self.find(&base, m.len(), format!("the base has {} bytes, the volume {}", m.len(), volume.size_bytes)),
                Err(error) => self.find(&base, 0, error),
            }
        }
        let results = folder.path.join(crate::drill::RESULTS_FILE);
        match crate::drill::check(&results) {
            Err(crate::drill::ResultsError::Damaged { offset, source, .. }) => self.find(&results, offset, source),
            Err(error) => self.find(&results, 0, error),
            Ok(()) => {}
        }
        let journal = folder.journal();
        let mut folding: Vec<DirtyMap> = match block.folding {
            Some(_) => block.volumes.iter().map(|volume| DirtyMap::new(volume.size_bytes)).collect(),
            None => Vec::new(),
        };
        if let Err(error) = self.journal(&journal, &block, &mut folding) {
            self.find(&journal, 0, error);
        }
        for (number, volume) in block.volumes.iter().enumerate() {
            let base = folder.base(&volume.name);
            if let Err(error) = self.base(&base, volume, folding.get(number)) {
                self.find(&base, 0, error);
            }
        }
    }

    /// Compares a base with its checksums. What a fold that was stopped is `folding` is in the journal still, and is written again.
    fn base(&mut self, path: &Path, volume: &Volume, folding: Option<&DirtyMap>) -> io::Result<()> {
        let sums = base::sums_path(path);
        let examined = base::examine(path, volume.size_bytes, &mut |seen| match seen {
            base::Seen::Bytes(bytes) => {
                self.report.base_bytes += bytes;
                self.add(bytes);
            }
            base::Seen::Damaged(damage) => {
                if folding.is_none_or(|folding| !folding.contains(damage.offset() / BLOCK_BYTES)) {
                    self.find(path, damage.offset(), damage.problem());
                }
            }
            base::Seen::Length(bytes) => {
                let wanted = blocks_of(volume.size_bytes) * base::SUM_BYTES;
                self.find(
                    &sums,
                    bytes,
                    format!("the checksums of the base have {bytes} bytes, {wanted} are those of the volume"),
                );
            }
            base::Seen::Unreadable(offset, error) => self.find(path, offset, error),
        });
        match examined {
            Ok(true) => Ok(()),
            Ok(false) => {
                self.report.unchecked.push(volume.name.clone());
                Ok(())
            }
            // That the base itself is not there is a finding already.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Walks the journal. Blocks of the epochs that a fold was moving when it was stopped are marked in `folding`, a map for each volume.
    fn journal(&mut self, journal: &Path, block: &Superblock, folding: &mut [DirtyMap]) -> io::Result<()> {
        let expected = Expected {
            group_id: block.group_id,
            first_segment: block.first_segment,
            base: block.base,
            volume_blocks: block.volumes.iter().map(|v| blocks_of(v.size_bytes)).collect::<Arc<[u64]>>(),
        };
        self.report.segments = list_journal(journal, block.first_segment)?.live.len() as u64;
        let mut walker = Walker::new(journal, expected.clone(), None, (Payloads::Decode, 0))?;
        let (mut open, mut sealed, mut newest) = (Open::default(), None::<Mark>, block.base);
        let (mut damaged, mut stopped) = (false, None::<Bad>);
        loop {
            match walker.next() {
                Ok(Some(Item::Frame { segment, offset, header, payload, extents })) => {
                    open.begin(&self.report);
                    open.frames += 1;
                    // Frames of one generation's epochs follow the newest seal.
                    if newest < block.folding
                        && let Some(map) = folding.get_mut(usize::from(header.volume.0))
                    {
                        extents.iter().for_each(|extent| map.mark(extent.start.0, u64::from(extent.blocks)));
                    }
                    if let Err(error) = payload {
                        damaged = true;
                        self.find(&segment_path(journal, segment), offset, error);
                    }
                    self.add(header.frame_bytes() as u64);
                }
                Ok(Some(Item::Seal { seal, end })) => {
                    (sealed, newest) = (Some(end), Some(seal.point()));
                    self.report.points += 1;
                    self.report.frames += std::mem::take(&mut open).frames;
                    self.add(journal::PLACED_SEAL_BYTES as u64);
                }
                Ok(None) => break,
                Err(bad) => {
                    damaged = true;
                    let later = walker.find_later_seal(&bad);
                    let Some(later) = later.inspect_err(|_| self.find(&bad.path, bad.offset, &bad.error))? else {
                        open.begin(&self.report);
                        stopped = Some(bad);
                        break;
                    };
                    self.find(&bad.path, bad.offset, &bad.error);
                    walker.resume_after(&later)?;
                    sealed = Some(later.end());
                    open = Open::default();
                }
            }
        }
        // A walk without damage to the point that is known to be synced is what a start finds, too.
        let in_doubt = damaged || newest < block.synced;
        let refusal = in_doubt.then(|| journal::refusal(journal, &expected, block.synced)).flatten();
        match (refusal, stopped) {
            (Some(error), stopped) => self.refused(journal, sealed, stopped.as_ref(), &error),
            // The second reading succeeded; such a disk is worth a word all the same.
            (None, Some(bad)) if bad.is_io() => self.find(&bad.path, bad.offset, &bad.error),
            (None, _) => self.unsealed(journal, sealed.unwrap_or(Mark { segment: block.first_segment, bytes: 0 }), &open)?,
        }
        Ok(())
    }

    /// The start refuses the journal: nothing of it is cut off.
    fn refused(&mut self, journal: &Path, sealed: Option<Mark>, stopped: Option<&Bad>, error: &JournalError) {
        // Where this walk stopped was no unsealed end then.
        for bad in stopped.into_iter().chain(error.bad()) {
            if !self.report.findings.iter().any(|f| f.path == bad.path && f.offset == bad.offset) {
                self.find(&bad.path, bad.offset, &bad.error);
            }
        }
        match error {
            JournalError::Lost { end, synced, .. } => {
                let path = sealed.map_or_else(|| journal.to_owned(), |mark| segment_path(journal, mark.segment));
                let end = end.map_or_else(|| "nothing".to_owned(), |point| format!("point {point}"));
                let problem = format!("the journal ends at {end}, and point {synced} was committed");
                self.find(&path, sealed.map_or(0, |mark| mark.bytes), problem);
            }
            error if error.bad().is_none() => self.find(journal, 0, error),
            _ => {}
        }
    }

    /// What the next start cuts off is counted, and nothing found in it counts.
    fn unsealed(&mut self, journal: &Path, sealed: Mark, open: &Open) -> io::Result<()> {
        if let Some((found, left_out)) = open.found_before {
            self.report.findings.truncate(found);
            self.report.findings_left_out = left_out;
        }
        for segment in list_journal(journal, sealed.segment)?.live {
            let of_sealed = if segment.number == sealed.segment { sealed.bytes.min(segment.bytes) } else { 0 };
            self.report.unsealed_bytes += segment.bytes - of_sealed;
        }
        Ok(())
    }

    fn add(&mut self, bytes: u64) {
        self.report.bytes += bytes;
        self.meter.add(bytes);
    }
}

/// What was read since the last seal.
#[derive(Debug, Default)]
struct Open {
    frames: u64,
    /// Findings before it, if it has begun: those listed, those left out.
    found_before: Option<(usize, u64)>,
}

impl Open {
    fn begin(&mut self, report: &GroupReport) {
        self.found_before.get_or_insert((report.findings.len(), report.findings_left_out));
    }
}
