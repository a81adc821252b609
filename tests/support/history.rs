//! What writers did to the blocks of some disks, and what an image of them at one instant must then hold.
//!
//! The rule is promise 2 of the design: if a write is there, so is every write that was acknowledged before it was issued, whatever the
//! disks. And a point's cut is a promise too: what was acknowledged before it is there.

use std::collections::HashMap;

/// Bytes of a block, which is written whole.
pub(crate) const BLOCK_BYTES: usize = 4096;

/// Content of a block that tells who wrote it, when, and whether all of it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Stamp {
    /// The writer, from 0.
    pub(crate) writer: u32,
    /// Number of its write, from 1.
    pub(crate) number: u64,
    /// The block's disk and place: content that was put elsewhere is found.
    pub(crate) place: Place,
}

/// A block of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) disk: u32,
    pub(crate) block: u64,
}

impl Stamp {
    /// The block: half of it does not compress.
    pub(crate) fn content(&self) -> Vec<u8> {
        let mut words = vec![u64::from(self.writer) + 1, self.number, u64::from(self.place.disk), self.place.block];
        let mut x = self.number ^ self.place.block.rotate_left(32) ^ 0x9e37_79b9_7f4a_7c15;
        while words.len() < BLOCK_BYTES / 16 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            words.push(x ^ (x >> 29));
        }
        words.resize(BLOCK_BYTES / 8, self.number);
        words.into_iter().flat_map(u64::to_le_bytes).collect()
    }

    /// Reads a block back: `None` if it is zero.
    fn read(content: &[u8], place: Place) -> Result<Option<Self>, String> {
        if content.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let word = |at: usize| u64::from_le_bytes(content[at..at + 8].try_into().expect("eight bytes"));
        let writer = u32::try_from(word(0).wrapping_sub(1)).map_err(|_| format!("{place:?} holds what nobody wrote"))?;
        let stamp = Self { writer, number: word(8), place };
        if content != stamp.content() {
            return Err(format!("{place:?} is torn or from elsewhere: it begins as {stamp:?}"));
        }
        Ok(Some(stamp))
    }
}

/// One write of one or more blocks. `issued` and `acknowledged` are instants of one clock of all writers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// The first block.
    pub(crate) place: Place,
    /// Blocks.
    pub(crate) blocks: u32,
    /// Zeroes instead of stamps.
    pub(crate) zero: bool,
    /// Before it was first sent.
    pub(crate) issued: u64,
    /// After its acknowledgement was read; `u64::MAX` while there is none.
    pub(crate) acknowledged: u64,
    /// The same, microseconds since 1970.
    pub(crate) acknowledged_us: u64,
}

#[derive(Clone, Copy)]
struct Change {
    /// `None`: zeroes.
    stamp: Option<(u32, u64)>,
    issued: u64,
    acknowledged: u64,
    acknowledged_us: u64,
}

/// The writes of each block, in their order: a block has one writer, which has one write of it at a time.
pub(crate) struct History {
    blocks: HashMap<Place, Vec<Change>>,
}

impl History {
    /// From what each writer did, in its order: entry `n` is its write number `n + 1`.
    pub(crate) fn new(writers: &[Vec<Entry>]) -> Self {
        let mut blocks: HashMap<Place, Vec<Change>> = HashMap::new();
        for (writer, entries) in (0..).zip(writers) {
            for (number, entry) in (1..).zip(entries) {
                for n in 0..u64::from(entry.blocks) {
                    let place = Place { block: entry.place.block + n, ..entry.place };
                    blocks.entry(place).or_default().push(Change {
                        stamp: (!entry.zero).then_some((writer, number)),
                        issued: entry.issued,
                        acknowledged: entry.acknowledged,
                        acknowledged_us: entry.acknowledged_us,
                    });
                }
            }
        }
        Self { blocks }
    }

    /// Checks an image: the blocks of each disk from its start. Returns how many writes it has at the latest of each block, and how many
    /// acknowledged ones it need not have yet.
    pub(crate) fn check(&self, cut_unix_us: u64, disks: &[Vec<u8>]) -> Result<usize, String> {
        let mut found = Vec::new();
        let mut newest = (0, None);
        for (disk, image) in (0..).zip(disks) {
            for (block, content) in (0..).zip(image.chunks_exact(BLOCK_BYTES)) {
                let place = Place { disk, block };
                let stamp = Stamp::read(content, place)?;
                let changes = self.blocks.get(&place).map_or(&[][..], Vec::as_slice);
                // Zero may be one of several changes, or none; the last is the one that asks least.
                let wanted = stamp.map(|s| (s.writer, s.number));
                let at = changes.iter().rposition(|change| change.stamp == wanted);
                if let Some(stamp) = stamp {
                    let at = at.ok_or_else(|| format!("{stamp:?} was never written"))?;
                    newest = newest.max((changes[at].issued, Some(stamp.number)));
                }
                found.push((place, changes, at));
            }
        }
        for (place, changes, at) in &found {
            let due = changes.iter().rposition(|c| c.acknowledged < newest.0 || c.acknowledged_us < cut_unix_us);
            if let Some(due) = due
                && at.is_none_or(|at| at < due)
            {
                return Err(format!(
                    "{place:?} has its change {at:?} of {}; change {due} was acknowledged at {} ({} µs before the cut), and the image \
                     holds a write that was issued at {}",
                    changes.len(),
                    changes[due].acknowledged,
                    i128::from(cut_unix_us) - i128::from(changes[due].acknowledged_us),
                    newest.0,
                ));
            }
        }
        Ok(found.iter().filter(|(_, _, at)| at.is_some()).count())
    }
}
