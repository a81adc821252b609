//! Holds the copy against what the writers noted.
//!
//! Three claims: every block is whole and is what the disk held at one instant (for each writer a prefix of its writes, nothing
//! else touched); every write acknowledged before the point's cut is in it; and no write is in it whose
//! issuer could already have known of a write that is not (promise 2 of the design).

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::load::Log;
use super::stamp::{BLOCK, Content, Stamp};
use crate::nbd::Disk;

/// Bytes of one read.
const CHUNK: usize = 1 << 20;
/// Violations told one by one; the rest are counted.
const TOLD_MAX: usize = 10;

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// Blocks read and compared.
    pub(super) blocks: u64,
    /// Of them, blocks that a writer wrote.
    pub(super) stamped: u64,
    /// Writes acknowledged before the cut; all are in the copy unless there is a violation.
    pub(super) acknowledged_before_cut: u64,
    /// Writes acknowledged at all.
    pub(super) acknowledged: u64,
    /// Writes of which the copy shows that they are in it.
    pub(super) contained: u64,
    /// What is wrong.
    pub(super) violations: Violations,
}

/// Everything wrong.
#[derive(Debug, Default)]
pub(super) struct Violations {
    pub(super) told: Vec<String>,
    pub(super) count: u64,
}

impl Violations {
    fn add(&mut self, text: impl FnOnce() -> String) {
        self.count += 1;
        if self.told.len() < TOLD_MAX {
            self.told.push(text());
        }
    }
}

/// Stamps found in the copy, by block.
type Found = HashMap<u64, Stamp>;

/// Reads all of the copy and compares it. `original` is the disk before the first write.
pub(super) fn verify(
    client: &mut Disk,
    original: &Path,
    run: u64,
    logs: &[Log],
    cut_unix_us: u64,
    mut progress: impl FnMut(u64, u64),
) -> io::Result<Verdict> {
    let mut verdict = Verdict::default();
    let mut before = File::open(original)?;
    if client.size() != before.metadata()?.len() {
        verdict.violations.add(|| format!("the copy has {} bytes, another size than the disk", client.size()));
        return Ok(verdict);
    }
    let mut found = Found::new();
    let (mut copy, mut expected) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut offset = 0;
    while offset < client.size() {
        let length = CHUNK.min(usize::try_from(client.size() - offset).unwrap_or(CHUNK));
        let (Some(copy), Some(expected)) = (copy.get_mut(..length), expected.get_mut(..length)) else { break };
        client.read(offset, copy)?;
        before.read_exact(expected)?;
        for (i, (now, then)) in copy.chunks(BLOCK).zip(expected.chunks(BLOCK)).enumerate() {
            let block = offset / BLOCK as u64 + i as u64;
            verdict.blocks += 1;
            match Stamp::read(now, run) {
                Content::Stamped(stamp) if stamp.block == block => {
                    found.insert(block, stamp);
                }
                Content::Stamped(stamp) => {
                    verdict.violations.add(|| format!("block {block} holds what was written to block {}", stamp.block));
                }
                Content::Torn => verdict.violations.add(|| format!("block {block} is torn: its checksum does not fit")),
                Content::Other if now == then => {}
                Content::Other => verdict.violations.add(|| format!("block {block} was never written and differs from the disk")),
            }
        }
        offset += length as u64;
        progress(offset, client.size());
    }
    verdict.stamped = found.len() as u64;
    compare(&found, logs, cut_unix_us, &mut verdict);
    Ok(verdict)
}

/// The three claims.
fn compare(found: &Found, logs: &[Log], cut_unix_us: u64, verdict: &mut Verdict) {
    // The newest write of a writer in the copy has not been overwritten in it, so it is the newest stamp.
    let mut prefix: Vec<u64> = vec![0; logs.len()];
    for stamp in found.values() {
        match prefix.get_mut(stamp.writer as usize) {
            Some(p) => *p = (*p).max(stamp.sequence + 1),
            None => verdict.violations.add(|| format!("block {}: there is no writer {}", stamp.block, stamp.writer)),
        }
    }
    let mut last_issued_us = 0;
    for (writer, (log, prefix)) in logs.iter().zip(&prefix).enumerate() {
        if *prefix as usize > log.len() {
            verdict.violations.add(|| format!("writer {writer}: the copy holds its write {prefix}, it made {}", log.len()));
            continue;
        }
        let (within, beyond) = log.split_at(*prefix as usize);
        verdict.contained += within.len() as u64;
        if let Some(last) = within.last() {
            last_issued_us = last_issued_us.max(last.issued_us);
        }
        let mut newest: HashMap<u64, u64> = HashMap::new();
        for (sequence, entry) in within.iter().enumerate() {
            newest.insert(entry.block, sequence as u64);
        }
        for (block, sequence) in newest {
            match found.get(&block) {
                Some(stamp) if stamp.sequence == sequence && stamp.writer == writer as u64 => {}
                Some(stamp) => verdict.violations.add(|| {
                    format!(
                        "block {block} holds write {} of writer {}, not write {sequence} of {writer}",
                        stamp.sequence, stamp.writer
                    )
                }),
                None => verdict.violations.add(|| format!("block {block}: write {sequence} of writer {writer} is missing")),
            }
        }
        for entry in beyond.iter().filter(|e| e.acknowledged_us < cut_unix_us) {
            verdict.violations.add(|| {
                let early = cut_unix_us - entry.acknowledged_us;
                format!("block {}: a write of writer {writer}, acknowledged {early} us before the cut, is missing", entry.block)
            });
        }
    }
    for (writer, (log, prefix)) in logs.iter().zip(&prefix).enumerate() {
        let acknowledged = log.iter().filter(|e| e.acknowledged_us != u64::MAX);
        verdict.acknowledged += acknowledged.clone().count() as u64;
        verdict.acknowledged_before_cut += acknowledged.filter(|e| e.acknowledged_us < cut_unix_us).count() as u64;
        for entry in log.iter().skip(*prefix as usize).filter(|e| e.acknowledged_us < last_issued_us) {
            verdict
                .violations
                .add(|| format!("broken order: block {} of writer {writer} is missing, a later write is there", entry.block));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::load::Entry;
    use super::*;

    fn log(blocks: &[u64], start_us: u64) -> Log {
        let entry = |(i, b): (usize, &u64)| {
            let issued_us = start_us + 10 * i as u64;
            Entry { block: *b, issued_us, acknowledged_us: issued_us + 5 }
        };
        blocks.iter().enumerate().map(entry).collect()
    }

    fn found(entries: &[(u64, u64, u64)]) -> Found {
        entries.iter().map(|&(block, writer, sequence)| (block, Stamp { run: 1, block, writer, sequence })).collect()
    }

    fn judge(stamps: &[(u64, u64, u64)], logs: &[Log], cut: u64) -> Verdict {
        let mut verdict = Verdict::default();
        compare(&found(stamps), logs, cut, &mut verdict);
        verdict
    }

    /// Would the demo notice? Each kind of damage, and a good copy.
    #[test]
    fn the_judge_notices_each_kind_of_damage() {
        // Writer 0 at 100, 110, 120; writer 1 at 105, 115, 125.
        let logs = [log(&[0, 2, 0], 100), log(&[1, 3, 1], 105)];
        let good = judge(&[(0, 0, 0), (2, 0, 1), (1, 1, 0)], &logs, 116);
        assert_eq!(good.violations.count, 0, "{:?}", good.violations);
        assert_eq!((good.contained, good.acknowledged_before_cut, good.acknowledged), (3, 3, 6));
        let newer = judge(&[(0, 0, 2), (2, 0, 1), (1, 1, 0), (3, 1, 1)], &logs, 116);
        assert_eq!(newer.violations.count, 0, "a write in flight at the cut may be in: {:?}", newer.violations);
        let cases = [
            (vec![(0, 0, 0), (1, 1, 0)], "acknowledged 1 us before the cut, is missing"),
            (vec![(2, 0, 1), (1, 1, 0)], "write 0 of writer 0 is missing"),
            (vec![(0, 0, 0), (1, 1, 2), (3, 1, 1)], "broken order"),
            (vec![(0, 0, 9)], "holds its write 10, it made 3"),
            (vec![(0, 0, 0), (2, 0, 1), (1, 5, 0)], "there is no writer 5"),
        ];
        for (stamps, expected) in cases {
            // The cut is after the third case's times, so that only the order is left to notice there.
            let cut = if expected == "broken order" { 1 } else { 116 };
            let verdict = judge(&stamps, &logs, cut);
            assert!(verdict.violations.told.iter().any(|t| t.contains(expected)), "{expected}: {:?}", verdict.violations);
        }
    }
}
