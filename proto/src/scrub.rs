//! Hashes that travel with an epoch: how a primary finds out, while it follows, that the copy is not what it should be.
//!
//! The primary says what blocks held at the cut of the last epoch that it sealed. The receiver compares that with its view of that very
//! point and answers which runs differ or cannot be read; or that it is not at that point, which is no fault: the primary asks again. Blocks
//! hash as they travel: whole, the last one of a volume padded with zeroes.

use crate::codec::{DecodeError, Reader, bounded};
use crate::hashes::Hash;
use crate::units::{BLOCK_BYTES, BlockExtent, BlockIndex, EpochId, VOLUME_BYTES_MAX, VolumeIndex};

/// Runs in one message at most: it fits a control message.
pub const SCRUB_RUNS_MAX: usize = 256;
/// Blocks of one run at most: 1 MiB. What differs is sent again by the run.
pub const RUN_BLOCKS_MAX: u32 = 256;
/// Blocks of one message at most: 16 MiB, which bounds the time that an answer takes.
pub const SCRUB_BLOCKS_MAX: u32 = 4096;
/// Messages that may wait for their answer. A primary that sends more is ended as misbehaving.
pub const SCRUBS_IN_FLIGHT_MAX: usize = 8;

/// Consecutive blocks and what they held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubRun {
    /// The blocks, 1 to [`RUN_BLOCKS_MAX`].
    pub extent: BlockExtent,
    /// BLAKE3 of their content.
    pub hash: Hash,
}

/// What blocks of a volume held at the cut of an epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scrub {
    /// Comes back with the answer.
    pub id: u32,
    /// The last epoch whose seal was sent before.
    pub epoch: EpochId,
    /// The volume.
    pub volume: VolumeIndex,
    /// 1 to [`SCRUB_RUNS_MAX`] runs in rising order, of [`SCRUB_BLOCKS_MAX`] blocks together at most.
    pub runs: Vec<ScrubRun>,
}

impl Scrub {
    /// One past the last block.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.extent.end())
    }

    /// Appends the encoded message.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.to_le_bytes());
        out.extend_from_slice(&self.epoch.0.to_le_bytes());
        out.extend_from_slice(&self.volume.0.to_le_bytes());
        // SCRUB_RUNS_MAX fits.
        out.extend_from_slice(&(self.runs.len() as u16).to_le_bytes());
        for run in &self.runs {
            out.extend_from_slice(&run.extent.start.0.to_le_bytes());
            out.extend_from_slice(&run.extent.blocks.to_le_bytes());
            out.extend_from_slice(&run.hash);
        }
    }

    /// Decodes a message and checks its bounds.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (id, epoch, volume) = (r.u32()?, EpochId(r.u64()?), VolumeIndex(r.u16()?));
        let count = bounded("runs of a scrub", r.u16()?.into(), SCRUB_RUNS_MAX as u64)?;
        let (mut runs, mut end, mut blocks_total) = (Vec::new(), 0, 0);
        for _ in 0..count {
            let start = bounded("first block of a run", r.u64()?, VOLUME_BYTES_MAX / BLOCK_BYTES)?;
            let blocks = bounded("blocks of a run", r.u32()?.into(), RUN_BLOCKS_MAX.into())? as u32;
            let extent = BlockExtent { start: BlockIndex(start), blocks };
            if blocks == 0 || start < end {
                return Err(DecodeError::Rule { what: "scrub", rule: "runs are not empty, rise and do not overlap" });
            }
            end = extent.end();
            blocks_total += u64::from(blocks);
            runs.push(ScrubRun { extent, hash: r.array()? });
        }
        bounded("blocks of a scrub", blocks_total, SCRUB_BLOCKS_MAX.into())?;
        if runs.is_empty() {
            return Err(DecodeError::Rule { what: "scrub", rule: "it has at least one run" });
        }
        Ok(Self { id, epoch, volume, runs })
    }
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ScrubOutcome {
    /// The runs were compared with the view of the epoch.
    Compared {
        /// Positions in the message, rising, of the runs that differ or cannot be read.
        differing: Vec<u16>,
    },
    /// The receiver is at another point: nothing was compared.
    Stale,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scrubbed {
    /// That of the message.
    pub id: u32,
    /// What came of it.
    pub outcome: ScrubOutcome,
}

const COMPARED: u8 = 1;
const STALE: u8 = 2;

impl Scrubbed {
    /// Appends the encoded answer.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.to_le_bytes());
        match &self.outcome {
            ScrubOutcome::Compared { differing } => {
                out.push(COMPARED);
                out.extend_from_slice(&(differing.len() as u16).to_le_bytes());
                differing.iter().for_each(|run| out.extend_from_slice(&run.to_le_bytes()));
            }
            ScrubOutcome::Stale => out.push(STALE),
        }
    }

    /// Decodes an answer and checks its bounds.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let id = r.u32()?;
        let outcome = match r.u8()? {
            COMPARED => {
                let count = bounded("runs of an answer", r.u16()?.into(), SCRUB_RUNS_MAX as u64)?;
                let mut differing: Vec<u16> = Vec::new();
                for _ in 0..count {
                    let run = bounded("position of a run", r.u16()?.into(), SCRUB_RUNS_MAX as u64 - 1)? as u16;
                    if differing.last().is_some_and(|last| *last >= run) {
                        return Err(DecodeError::Rule { what: "scrubbed", rule: "positions rise" });
                    }
                    differing.push(run);
                }
                ScrubOutcome::Compared { differing }
            }
            STALE => ScrubOutcome::Stale,
            value => return Err(DecodeError::Unknown { what: "scrub outcome", value: value.into() }),
        };
        Ok(Self { id, outcome })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Message;
    use crate::control::MESSAGE_BYTES_MAX;

    fn run(start: u64, blocks: u32) -> ScrubRun {
        ScrubRun { extent: BlockExtent { start: BlockIndex(start), blocks }, hash: [start as u8; 32] }
    }

    fn scrub(runs: Vec<ScrubRun>) -> Scrub {
        Scrub { id: 7, epoch: EpochId(9), volume: VolumeIndex(1), runs }
    }

    fn decode(scrub: &Scrub) -> Result<Scrub, DecodeError> {
        let mut bytes = Vec::new();
        scrub.encode(&mut bytes);
        Scrub::decode(&mut Reader::new("test", &bytes))
    }

    /// Would catch a message that makes the receiver read without bound.
    #[test]
    fn a_scrub_is_bounded() {
        let most = scrub((0..256).map(|i| run(i * 20, 16)).collect());
        assert_eq!(decode(&most).unwrap(), most);
        assert_eq!((most.end(), most.runs.iter().map(|r| r.extent.blocks).sum::<u32>()), (255 * 20 + 16, SCRUB_BLOCKS_MAX));
        assert!(Message::Scrub(most.clone()).encode().len() <= MESSAGE_BYTES_MAX);
        let mut more = most;
        more.runs[255].extent.blocks += 1;
        for bad in [
            more,
            scrub(vec![]),
            scrub(vec![run(0, 0)]),
            scrub(vec![run(0, RUN_BLOCKS_MAX + 1)]),
            scrub(vec![run(5, 2), run(6, 1)]),
            scrub(vec![run(5, 2), run(4, 1)]),
            scrub(vec![run(u64::MAX, 1)]),
            scrub((0..257).map(|i| run(i, 1)).collect()),
        ] {
            assert!(decode(&bad).is_err(), "{bad:?}");
        }
        assert!(decode(&scrub(vec![run(5, 2), run(7, RUN_BLOCKS_MAX)])).is_ok());
    }

    /// Would catch an answer that names a run twice, or one that no message can have.
    #[test]
    fn an_answer_is_bounded() {
        let answer = |differing: Vec<u16>| {
            let mut bytes = Vec::new();
            Scrubbed { id: 1, outcome: ScrubOutcome::Compared { differing } }.encode(&mut bytes);
            Scrubbed::decode(&mut Reader::new("test", &bytes))
        };
        assert!(answer((0..256).collect()).is_ok() && answer(vec![]).is_ok());
        for bad in [vec![256], vec![3, 3], vec![3, 2], (0..257).collect()] {
            assert!(answer(bad.clone()).is_err(), "{bad:?}");
        }
    }

    /// The bytes are an interface between two versions.
    #[test]
    fn golden_scrub_and_scrubbed() {
        let hex = |b: &[u8]| b.iter().map(|x| format!("{x:02x}")).collect::<String>();
        let message = Message::Scrub(scrub(vec![run(0x11, 0x22)]));
        let head = "3d0000000a070000000900000000000000010001001100000000000000";
        assert_eq!(hex(&message.encode()), format!("{head}22000000{}", "11".repeat(32)));
        let answer = |outcome| hex(&Message::Scrubbed(Scrubbed { id: 7, outcome }).encode());
        assert_eq!(
            answer(ScrubOutcome::Compared { differing: vec![1, 5] }),
            "0c0000000b070000000102000100 0500".replace(' ', "")
        );
        assert_eq!(answer(ScrubOutcome::Stale), "060000000b0700000002");
    }
}
