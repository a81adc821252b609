//! What drills found, kept durably: `drills` in the group's folder, replaced whole.
//!
//! Always holds: the file is a whole former or a whole newer one; it has the newest [`RESULTS_MAX`] results. It is for people, and nothing that
//! a copy needs depends on it: a file that cannot be trusted is refused by name, the group goes on, and nothing is written over it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use proto::codec::{DecodeError, Reader, bounded, check_crc};
use proto::{EpochId, Generation, Point};
use serde::{Deserialize, Serialize};

use crate::disk::Disk;

/// First bytes of the file.
pub const RESULTS_MAGIC: [u8; 8] = *b"TWDRIL01";
/// Results that are kept; when there is one more, the oldest goes.
pub const RESULTS_MAX: usize = 1000;
/// Longest name of a script, in bytes.
pub const SCRIPT_BYTES_MAX: usize = 512;
/// Longest remark, in bytes.
pub const REMARK_BYTES_MAX: usize = 512;
/// Most of a script's output that is kept, in bytes: its end.
pub const OUTPUT_BYTES_MAX: usize = 4096;
/// The file in the group's folder.
pub(crate) const RESULTS_FILE: &str = "drills";
const VERSION: u32 = 1;
/// Fixed fields of an entry and its longest texts.
const ENTRY_BYTES_MAX: usize = 56 + SCRIPT_BYTES_MAX + REMARK_BYTES_MAX + OUTPUT_BYTES_MAX;
const HEADER_BYTES: usize = 16;

/// Offsets of an entry's fixed fields, in bytes; integers are little endian.
pub mod layout {
    /// `(offset, bytes, field)`; script, remark and output follow, as long as they say.
    pub const ENTRY: &[(usize, usize, &str)] = &[
        (0, 8, "generation"),
        (8, 8, "epoch"),
        (16, 8, "cut_unix_us"),
        (24, 8, "began_unix_us"),
        (32, 8, "took_ms"),
        (40, 1, "outcome"),
        (41, 1, "scheduled"),
        (42, 2, "script_bytes"),
        (44, 4, "code"),
        (48, 2, "remark_bytes"),
        (50, 2, "output_bytes"),
        (52, 4, "reserved"),
    ];
}

/// How a drill's script ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum DrillOutcome {
    /// Exit code 0: the point is verified.
    Passed,
    /// Another exit code.
    Failed {
        /// The code.
        code: i32,
    },
    /// A signal ended it.
    Killed {
        /// Its number.
        signal: i32,
    },
    /// It was ended because it ran for too long.
    TimedOut,
    /// It could not be started.
    NotRun,
}

/// What a drill found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillResult {
    /// The point it began from.
    pub point: Point,
    /// That point's cut, microseconds since 1970 on the primary's clock.
    pub cut_unix_us: u64,
    /// When the drill began, microseconds since 1970 on this machine's clock.
    pub began_unix_us: u64,
    /// How long its script ran, in ms.
    pub took_ms: u64,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: DrillOutcome,
    /// Whether the schedule began it.
    pub scheduled: bool,
    /// The script.
    pub script: String,
    /// The last line that it printed.
    pub remark: String,
    /// The end of what it printed.
    pub output: String,
}

impl DrillResult {
    /// Whether it verified its point.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.outcome == DrillOutcome::Passed
    }
}

/// Why results are not read or kept.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ResultsError {
    /// The file cannot be read or written.
    #[error("{}: cannot {what} the results of drills: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: Arc<io::Error>,
    },
    /// Its content cannot be trusted.
    #[error("{}: the results of drills are damaged at offset {offset} ({source}): move the file away to begin a new one", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What does not fit.
        source: DecodeError,
    },
}

/// What `status` shows of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Summary {
    pub(crate) verified: Option<Arc<DrillResult>>,
    pub(crate) last: Option<Arc<DrillResult>>,
    pub(crate) error: Option<String>,
}

/// The results of a group, oldest first.
#[derive(Debug)]
pub(crate) struct Results {
    path: PathBuf,
    known: Mutex<Result<Vec<Arc<DrillResult>>, ResultsError>>,
    /// Held while the file is written; what is known is looked at meanwhile.
    writing: Mutex<()>,
}

impl Results {
    /// Reads them; what is wrong is said now and whenever somebody asks for them.
    pub(crate) fn open(folder: &Path) -> Self {
        let path = folder.join(RESULTS_FILE);
        let read = read(&path).inspect_err(|error| tracing::error!("{error}"));
        Self { path, known: Mutex::new(read), writing: Mutex::new(()) }
    }

    pub(crate) fn all(&self) -> Result<Vec<Arc<DrillResult>>, ResultsError> {
        self.known.lock().clone()
    }

    pub(crate) fn summary(&self) -> Summary {
        match &*self.known.lock() {
            Ok(all) => Summary {
                verified: all.iter().filter(|r| r.passed()).max_by_key(|r| (r.point, r.began_unix_us)).cloned(),
                last: all.last().cloned(),
                error: None,
            },
            Err(error) => Summary { error: Some(error.to_string()), ..Summary::default() },
        }
    }

    /// Adds one; it is durable when this returns. Blocks on file I/O.
    pub(crate) fn record(&self, disk: &Disk, result: DrillResult) -> Result<(), ResultsError> {
        let _alone = self.writing.lock();
        let mut all = self.known.lock().clone()?;
        all.push(Arc::new(cut_to_size(result)));
        all.drain(..all.len().saturating_sub(RESULTS_MAX));
        self.replace(disk, &encode(&all)).map_err(|(what, source)| {
            let source = Arc::new(source);
            ResultsError::Io { path: self.path.clone(), what, source }
        })?;
        *self.known.lock() = Ok(all);
        Ok(())
    }

    fn replace(&self, disk: &Disk, bytes: &[u8]) -> Result<(), (&'static str, io::Error)> {
        let aside = self.path.with_extension("new");
        match disk.remove_file(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(("replace", error)),
            _ => {}
        }
        let written = disk.create_file(&aside).and_then(|file| file.write_all_at(bytes, 0).and_then(|()| file.sync_all()));
        written.map_err(|e| ("write", e))?;
        disk.rename(&aside, &self.path).map_err(|e| ("replace", e))?;
        self.path.parent().map_or(Ok(()), |folder| disk.sync_folder(folder)).map_err(|e| ("sync", e))
    }
}

/// Whether the results in a file can be trusted; there need not be any.
pub(crate) fn check(path: &Path) -> Result<(), ResultsError> {
    read(path).map(drop)
}

fn read(path: &Path) -> Result<Vec<Arc<DrillResult>>, ResultsError> {
    let io = |source| ResultsError::Io { path: path.to_owned(), what: "read", source: Arc::new(source) };
    let found = match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        found => found.map_err(io)?,
    };
    let damaged = |(offset, source)| ResultsError::Damaged { path: path.to_owned(), offset, source };
    let max = (HEADER_BYTES + RESULTS_MAX * ENTRY_BYTES_MAX + 4) as u64;
    bounded("results of drills", found.len(), max).map_err(|e| damaged((max, e)))?;
    decode(&std::fs::read(path).map_err(io)?).map_err(damaged)
}

/// Texts as long as the file takes them; of the output, the end.
fn cut_to_size(result: DrillResult) -> DrillResult {
    let head = |mut text: String, max: usize| {
        text.truncate(text.floor_char_boundary(max));
        text
    };
    let output = &result.output;
    let from = output.ceil_char_boundary(output.len().saturating_sub(OUTPUT_BYTES_MAX));
    DrillResult {
        output: output.get(from..).unwrap_or_default().to_owned(),
        script: head(result.script, SCRIPT_BYTES_MAX),
        remark: head(result.remark, REMARK_BYTES_MAX),
        ..result
    }
}

fn encode(all: &[Arc<DrillResult>]) -> Vec<u8> {
    let mut out = RESULTS_MAGIC.to_vec();
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(all.len() as u32).to_le_bytes());
    for r in all {
        for value in [r.point.generation.0, r.point.epoch.0, r.cut_unix_us, r.began_unix_us, r.took_ms] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        let (outcome, code) = match r.outcome {
            DrillOutcome::Passed => (1, 0),
            DrillOutcome::Failed { code } => (2, code),
            DrillOutcome::Killed { signal } => (3, signal),
            DrillOutcome::TimedOut => (4, 0),
            DrillOutcome::NotRun => (5, 0),
        };
        out.extend_from_slice(&[outcome, r.scheduled.into()]);
        out.extend_from_slice(&(r.script.len() as u16).to_le_bytes());
        out.extend_from_slice(&code.to_le_bytes());
        out.extend_from_slice(&(r.remark.len() as u16).to_le_bytes());
        out.extend_from_slice(&(r.output.len() as u16).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        for text in [&r.script, &r.remark, &r.output] {
            out.extend_from_slice(text.as_bytes());
        }
    }
    let crc = crc32fast::hash(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out
}

/// The results, or where in the file something does not fit.
fn decode(bytes: &[u8]) -> Result<Vec<Arc<DrillResult>>, (u64, DecodeError)> {
    let what = "results of drills";
    let short = DecodeError::Truncated { what, needed: HEADER_BYTES + 4, left: bytes.len() };
    let (covered, tail) = bytes.split_last_chunk::<4>().ok_or((0, short))?;
    let mut r = Reader::new(what, covered);
    r.magic(RESULTS_MAGIC).map_err(|e| (0, e))?;
    check_crc(what, u32::from_le_bytes(*tail), covered).map_err(|e| (covered.len() as u64, e))?;
    let version = r.u32().map_err(|e| (8, e))?;
    if version != VERSION {
        return Err((8, DecodeError::Unknown { what: "version of the results of drills", value: version.into() }));
    }
    let count = r.u32().and_then(|n| bounded("count of results", n.into(), RESULTS_MAX as u64)).map_err(|e| (12, e))?;
    let (mut all, mut at) = (Vec::new(), HEADER_BYTES);
    for _ in 0..count {
        let (result, bytes) = entry(&mut r).map_err(|e| (at as u64, e))?;
        all.push(Arc::new(result));
        at += bytes;
    }
    r.expect_end().map_err(|e| (at as u64, e))?;
    Ok(all)
}

fn entry(r: &mut Reader<'_>) -> Result<(DrillResult, usize), DecodeError> {
    let point = Point { generation: Generation(r.u64()?), epoch: EpochId(r.u64()?) };
    let (cut_unix_us, began_unix_us, took_ms) = (r.u64()?, r.u64()?, r.u64()?);
    let (outcome, scheduled) = (r.u8()?, r.u8()? != 0);
    let script_bytes = bounded("script of a drill", r.u16()?.into(), SCRIPT_BYTES_MAX as u64)? as usize;
    let code = i32::from_le_bytes(r.array()?);
    let remark_bytes = bounded("remark of a drill", r.u16()?.into(), REMARK_BYTES_MAX as u64)? as usize;
    let output_bytes = bounded("output of a drill", r.u16()?.into(), OUTPUT_BYTES_MAX as u64)? as usize;
    r.bytes(4)?;
    let outcome = match outcome {
        1 => DrillOutcome::Passed,
        2 => DrillOutcome::Failed { code },
        3 => DrillOutcome::Killed { signal: code },
        4 => DrillOutcome::TimedOut,
        5 => DrillOutcome::NotRun,
        value => return Err(DecodeError::Unknown { what: "outcome of a drill", value: value.into() }),
    };
    let mut text = |bytes| -> Result<String, DecodeError> {
        let found = std::str::from_utf8(r.bytes(bytes)?);
        Ok(found.map_err(|_| DecodeError::Rule { what: "text of a drill", rule: "is UTF-8" })?.to_owned())
    };
    let (script, remark, output) = (text(script_bytes)?, text(remark_bytes)?, text(output_bytes)?);
    let bytes = 56 + script_bytes + remark_bytes + output_bytes;
    Ok((DrillResult { point, cut_unix_us, began_unix_us, took_ms, outcome, scheduled, script, remark, output }, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(epoch: u64, outcome: DrillOutcome) -> DrillResult {
        DrillResult {
            point: Point { generation: Generation(1), epoch: EpochId(epoch) },
            cut_unix_us: 5,
            began_unix_us: 10 * epoch,
            took_ms: 41_000,
            outcome,
            scheduled: true,
            script: "/etc/twinsite/boot.sh".to_owned(),
            remark: "boots".to_owned(),
            output: "starting\nboots\n".to_owned(),
        }
    }

    /// Would catch a field that is written in one way and read in another, and a failed drill that counts as verified.
    #[test]
    fn results_read_back_and_the_newest_verified_point_is_the_newest_that_passed() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::default();
        let results = Results::open(dir.path());
        assert!(results.summary().verified.is_none());
        let outcomes = [
            DrillOutcome::Passed,
            DrillOutcome::Passed,
            DrillOutcome::Failed { code: -7 },
            DrillOutcome::Killed { signal: 9 },
            DrillOutcome::TimedOut,
            DrillOutcome::NotRun,
        ];
        let wanted: Vec<_> = outcomes.iter().zip(1..).map(|(o, epoch)| result(epoch, *o)).collect();
        for r in &wanted {
            results.record(&disk, r.clone()).unwrap();
        }
        // An older point that is drilled later does not hide the newer one.
        results.record(&disk, result(1, DrillOutcome::Passed)).unwrap();
        let again = Results::open(dir.path());
        let found: Vec<_> = again.all().unwrap().iter().map(|r| r.as_ref().clone()).collect();
        assert_eq!(found.get(..wanted.len()).unwrap(), wanted);
        assert_eq!(again.summary().verified.unwrap().point.epoch, EpochId(2));
        assert_eq!(again.summary().last.unwrap().point.epoch, EpochId(1));
    }

    /// Would catch texts that grow the file without end or are cut within a character, and a list without a limit.
    #[test]
    fn the_file_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::default();
        let results = Results::open(dir.path());
        let full = |epoch| DrillResult {
            script: "ä".repeat(SCRIPT_BYTES_MAX),
            remark: "ä".repeat(REMARK_BYTES_MAX),
            output: format!("{}end", "ä".repeat(OUTPUT_BYTES_MAX)),
            ..result(epoch, DrillOutcome::Passed)
        };
        {
            let mut known = results.known.lock();
            *known = Ok((0..RESULTS_MAX as u64).map(|epoch| Arc::new(cut_to_size(full(epoch)))).collect());
        }
        results.record(&disk, full(5000)).unwrap();
        let all = Results::open(dir.path()).all().unwrap();
        assert_eq!((all.len(), all[0].point.epoch.0, all[RESULTS_MAX - 1].point.epoch.0), (RESULTS_MAX, 1, 5000));
        assert!(all[0].output.ends_with("end") && all[0].output.len() <= OUTPUT_BYTES_MAX);
        let bytes = std::fs::metadata(dir.path().join(RESULTS_FILE)).unwrap().len();
        assert!(bytes <= (HEADER_BYTES + RESULTS_MAX * ENTRY_BYTES_MAX + 4) as u64);
    }

    /// Would catch damage that is believed or written over.
    #[test]
    fn a_damaged_file_is_refused_by_name_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::default();
        Results::open(dir.path()).record(&disk, result(1, DrillOutcome::Passed)).unwrap();
        let path = dir.path().join(RESULTS_FILE);
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            assert!(decode(&bad).is_err(), "byte {at}");
            assert!(decode(&good[..at]).is_err(), "cut at {at}");
        }
        let mut bad = good.clone();
        bad[40] ^= 1;
        std::fs::write(&path, &bad).unwrap();
        let results = Results::open(dir.path());
        let error = results.record(&disk, result(2, DrillOutcome::Passed)).unwrap_err().to_string();
        assert!(error.contains(&path.display().to_string()) && error.contains("offset"), "{error}");
        assert_eq!(results.summary().error.unwrap(), error);
        assert_eq!(check(&path).unwrap_err().to_string(), error);
        assert_eq!(std::fs::read(&path).unwrap(), bad);
    }

    /// Would catch a record that counts although it is not on the disk.
    #[test]
    fn a_result_that_cannot_be_written_is_not_shown() {
        let dir = tempfile::tempdir().unwrap();
        Results::open(dir.path()).record(&Disk::default(), result(1, DrillOutcome::Passed)).unwrap();
        let full = Disk::faulty(|op| match op {
            crate::disk::Op::Write { .. } => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        });
        let results = Results::open(dir.path());
        let error = results.record(&full, result(2, DrillOutcome::Passed)).unwrap_err().to_string();
        assert!(error.contains("cannot write the results of drills"), "{error}");
        assert_eq!((results.all().unwrap().len(), Results::open(dir.path()).all().unwrap().len()), (1, 1));
        results.record(&Disk::default(), result(3, DrillOutcome::Passed)).unwrap();
        assert_eq!(Results::open(dir.path()).all().unwrap().len(), 2);
    }
}
