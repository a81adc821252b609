//! Bits that flip: in the receiver's journal while it runs, in its files while it is down, in what the primary left.
//!
//! What must hold: wrong content is never shown; an error names the file and where. What is damaged at rest is refused, repaired, or
//! without effect, and costs the last commit at most, and that only if the node was killed just after it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use proto::{Generation, Point, SessionToken};
use rand::Rng;
use rand::seq::IndexedRandom;
use receiver::Disk;

use super::{CLIENT, World};
use crate::places::{self, Part, Span};
use crate::plan::GROUP;
use crate::recovery::Replica;

/// Bits flipped in copies of a store that is down, one after the other.
const FLIPS_A_PROBE: usize = 4;

/// A bit of a segment that is not what it was.
#[derive(Debug)]
pub(super) struct Rot {
    /// Relative to the root of the disk.
    path: PathBuf,
    file: String,
    offset: u64,
    bit: u8,
}

impl Rot {
    /// The damaged file, as errors name it.
    pub(super) fn file(&self) -> &str {
        &self.file
    }
}

/// What a start on a copy of the store finds.
struct Found {
    generation: Generation,
    points: BTreeMap<Point, SessionToken>,
}

fn copy_folder(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() { copy_folder(&path, &to)? } else { fs::copy(&path, &to).map(drop)? }
    }
    Ok(())
}

fn flip(file: &Path, offset: u64, bit: u8) -> io::Result<()> {
    let file = fs::OpenOptions::new().read(true).write(true).open(file)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[byte[0] ^ (1 << bit)], offset)
}

impl World {
    fn group_folder(&self) -> PathBuf {
        self.folder.path().join("store").join(CLIENT).join(GROUP)
    }

    /// A bit of a committed payload flips under the running receiver.
    pub(super) fn rot_journal(&mut self) -> Result<(), String> {
        if self.rot.is_some() || self.replica.is_none() {
            return Ok(());
        }
        let Ok((spans, _)) = places::journal(&self.group_folder()) else { return Ok(()) };
        let payloads: Vec<&Span> = spans.iter().filter(|span| span.part == Part::Payload).collect();
        let Some(span) = payloads.choose(&mut self.rng) else { return Ok(()) };
        let (offset, bit) = (self.rng.random_range(span.bytes.clone()), self.rng.random_range(0..8));
        let path = span.file.strip_prefix(self.folder.path()).map_err(|e| e.to_string())?.to_owned();
        let rot = Rot { file: span.file.display().to_string(), path, offset, bit };
        self.say(|| format!("bit {bit} at offset {offset} of {} flips", rot.path.display()));
        self.disk.flip(&rot.path, offset, bit).map_err(|e| format!("cannot flip a bit: {e}"))?;
        self.outcome.flips += 1;
        self.rot = Some(rot);
        self.check(true)
    }

    /// The bit is what it was.
    pub(super) fn heal_journal(&mut self) -> Result<(), String> {
        let Some(rot) = self.rot.take() else { return Ok(()) };
        self.say(|| format!("bit {} at offset {} of {} is right again", rot.bit, rot.offset, rot.path.display()));
        self.disk.flip(&rot.path, rot.offset, rot.bit).map_err(|e| format!("cannot flip a bit back: {e}"))
    }

    /// Looks at what the receiver shows, see [`Oracle::check`](crate::check::Oracle::check).
    pub(super) fn check(&mut self, all: bool) -> Result<(), String> {
        match &self.replica {
            // On a full disk it may not be open.
            Some(replica) if replica.groups().iter().all(|(_, error)| error.is_none()) => {
                self.oracle.check(replica, GROUP, all, self.rot.as_ref().map(Rot::file))
            }
            _ => Ok(()),
        }
    }

    /// Bits flip in what the primary left: one of a dirty log, or one of the newer sector of its record. It goes on as if nothing had
    /// happened, and compares more.
    pub(super) fn rot_primary(&mut self) {
        self.outcome.flips += 1;
        let log = self.rng.random_range(0..=self.logs.len());
        match self.logs.get(log) {
            Some(disk) => {
                // Most of a log is maps that are not used.
                let end = if self.rng.random_bool(0.8) { 1024.min(disk.snapshot().len()) } else { disk.snapshot().len() };
                let (offset, bit) = (self.rng.random_range(0..end as u64), self.rng.random_range(0..8));
                self.say(|| format!("bit {bit} at offset {offset} of dirty log {log} flips"));
                disk.flip(offset, 1 << bit);
            }
            None => {
                self.say(|| "a bit of the newer sector of the primary's record flips".to_owned());
                self.record.lock().rot();
            }
        }
    }

    /// Bits flip in the files of the receiver that is down, each in a fresh copy of its store; a receiver is started on each.
    pub(super) fn probe_rot(&mut self) -> Result<(), String> {
        let (store, probe) = (self.folder.path().join("store"), self.folder.path().join("probe"));
        let io = |error: io::Error| format!("cannot try flipped bits: {error}");
        if !self.group_folder().is_dir() {
            return Ok(());
        }
        copy_folder(&store, &probe).map_err(io)?;
        let whole = self.start_on(&probe, None);
        fs::remove_dir_all(&probe).map_err(io)?;
        // Of a full disk, or after a failed sync, there may be nothing to start.
        let Ok(whole) = whole else { return Ok(()) };
        let (mut spans, seals) = places::journal(&self.group_folder()).map_err(io)?;
        spans.extend(places::superblock(&self.group_folder()));
        for _ in 0..FLIPS_A_PROBE {
            let Some(span) = spans.choose(&mut self.rng) else { break };
            let (offset, bit) = (self.rng.random_range(span.bytes.clone()), self.rng.random_range(0..8));
            let what = format!("bit {bit} at offset {offset} of {} in {:?}", span.file.display(), span.part);
            self.say(|| format!("started on a copy with a flipped {what}"));
            self.outcome.flips += 1;
            copy_folder(&store, &probe).map_err(io)?;
            let file = probe.join(span.file.strip_prefix(&store).map_err(|e| e.to_string())?);
            flip(&file, offset, bit).map_err(io)?;
            let found = self.start_on(&probe, Some(&file.display().to_string()));
            fs::remove_dir_all(&probe).map_err(io)?;
            self.judge(span, seals, &whole, found).map_err(|error| format!("with a flipped {what}: {error}"))?;
        }
        Ok(())
    }

    fn judge(&self, span: &Span, seals: usize, whole: &Found, found: Result<Found, String>) -> Result<(), String> {
        let found = match found {
            Ok(found) => found,
            // Wrong content, or an error that names nothing, is `Err` with another text.
            Err(refused) if refused.starts_with("refused: ") => return Ok(()),
            Err(error) => return Err(error),
        };
        // A change that the kill interrupted may count or not; what the process stood at may not be lost.
        if !(self.stood..=whole.generation).contains(&found.generation) {
            return Err(format!("generation {} became {}", whole.generation, found.generation));
        }
        let missing: Vec<_> = whole.points.keys().filter(|point| !found.points.contains_key(point)).collect();
        // After a kill nobody knows which commit was the last: that one alone can be taken for one that never was.
        let newest = whole.points.last_key_value().map(|(point, _)| point);
        let is_last =
            span.part != Part::SuperblockSlot && span.seals_before + 1 == seals && missing.as_slice() == newest.as_slice();
        if missing.is_empty() || is_last { Ok(()) } else { Err(format!("points {missing:?} are gone")) }
    }

    /// Starts a receiver on a copy of the store. A refusal begins with `refused: `.
    fn start_on(&self, store: &Path, damaged: Option<&str>) -> Result<Found, String> {
        let replica = Replica::open(store, Disk::default(), vec![Self::client()?], Self::limits()).map_err(|e| e.to_string())?;
        if let Some((_, Some(error))) = replica.groups().first() {
            let is_named = damaged.is_none_or(|file| error.contains(file) || error.contains("it ends at "));
            return Err(if is_named { format!("refused: {error}") } else { format!("an error that does not name it: {error}") });
        }
        let (generation, ..) = replica.generation(GROUP).map_err(|e| e.to_string())?;
        let points = self.oracle.examine(&replica, GROUP, damaged)?;
        Ok(Found { generation, points })
    }
}
