//! What the fuzz target `wire` does with its input, and the cursor by which targets choose from theirs.
//!
//! Called by `fuzz/` and by the replay of the corpus (`tests/corpus.rs`). A broken promise is a panic.

use std::fmt::Display;
use std::str::FromStr;

use crate::codec::Reader;
use crate::control::{GENERATION_MAX, MESSAGE_BYTES_MAX, Message, REASON_BYTES_MAX};
use crate::handback::{Ready, WANT_EXTENTS_MAX};
use crate::hashes::{HASHES_MAX, QUERY_BLOCKS_MAX};
use crate::name::NAME_BYTES_MAX;
use crate::pass::{PASS_HEADER_BYTES, PASS_MAGIC, PassHeader};
use crate::scrub::{RUN_BLOCKS_MAX, SCRUB_BLOCKS_MAX, SCRUB_RUNS_MAX, ScrubOutcome};
use crate::seal::{SEAL_BYTES, SEAL_MAGIC, Seal};
use crate::units::{GROUP_VOLUMES_MAX, VOLUME_BYTES_MAX};
use crate::{DecodeError, Fingerprint, Name, Point};

/// Takes numbers and bytes off the front of an input; an input at its end gives zeroes, so that every input means something.
#[derive(Clone, Debug)]
pub struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    /// Chooses from `data`.
    #[must_use]
    pub fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    /// Whether all was taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What was not taken yet.
    #[must_use]
    pub fn rest(&self) -> &'a [u8] {
        self.0
    }

    /// Up to `count` bytes.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (head, tail) = self.0.split_at(count.min(self.0.len()));
        self.0 = tail;
        head
    }

    /// Exactly `N` bytes, zeroes where the input has ended.
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let head = self.bytes(N);
        out[..head.len()].copy_from_slice(head);
        out
    }

    /// A byte.
    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    /// Two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `count`, which is at most 65,536 and not 0.
    pub fn below(&mut self, count: usize) -> usize {
        if count <= 256 { usize::from(self.u8()) % count } else { usize::from(self.u16()) % count }
    }
}

/// Control messages, pass headers, seals and the texts that stand in for ids.
///
/// # Panics
/// When something decodes that breaks a limit or does not read back.
pub fn wire(data: &[u8]) {
    let mut choices = Choices::new(data);
    match choices.u8() % 5 {
        0 => message(choices.rest()),
        1 => stream(choices.rest()),
        2 => pass(&mut choices),
        3 => seal(&mut choices),
        _ => texts(choices.rest()),
    }
}

fn message(body: &[u8]) {
    let Ok(message) = Message::decode(body) else { return };
    match &message {
        Message::Hello(hello) => {
            assert!((1..=GROUP_VOLUMES_MAX).contains(&hello.volumes.len()));
            assert!(hello.group.as_str().len() <= NAME_BYTES_MAX);
            for volume in &hello.volumes {
                assert!((1..=VOLUME_BYTES_MAX).contains(&volume.size_bytes) && volume.name.as_str().len() <= NAME_BYTES_MAX);
            }
        }
        Message::Close { reason, .. } => {
            assert!(reason.len() <= REASON_BYTES_MAX, "a reason of {} bytes", reason.len());
            assert!(!reason.contains(char::is_control));
        }
        Message::HashQuery(query) => {
            assert!((1..=QUERY_BLOCKS_MAX).contains(&query.blocks) && (1..=HASHES_MAX).contains(&query.count()));
            assert!(query.end() > query.start.0);
        }
        Message::Hashes(hashes) => assert!(hashes.hashes.len() <= HASHES_MAX),
        Message::Scrub(scrub) => {
            assert!((1..=SCRUB_RUNS_MAX).contains(&scrub.runs.len()));
            assert!(scrub.runs.iter().all(|run| (1..=RUN_BLOCKS_MAX).contains(&run.extent.blocks)));
            assert!(scrub.runs.iter().map(|run| run.extent.blocks).sum::<u32>() <= SCRUB_BLOCKS_MAX);
            assert!(scrub.runs.windows(2).all(|w| w[0].extent.end() <= w[1].extent.start.0));
        }
        Message::Scrubbed(scrubbed) => {
            if let ScrubOutcome::Compared { differing } = &scrubbed.outcome {
                assert!(differing.len() <= SCRUB_RUNS_MAX && differing.windows(2).all(|w| w[0] < w[1]));
            }
        }
        Message::Welcome { staged, .. } => assert!(staged.is_none_or(|s| s.frames > 0)),
        Message::Handback(ask) => {
            assert!((1..=GROUP_VOLUMES_MAX).contains(&ask.volumes.len()) && ask.generation.0 <= GENERATION_MAX);
            assert!(ask.volumes.iter().all(|v| (1..=VOLUME_BYTES_MAX).contains(&v.size_bytes)));
        }
        Message::Want(want) => {
            assert!(want.extents.len() <= WANT_EXTENTS_MAX && want.extents.iter().all(|e| e.blocks > 0));
            assert!(want.extents.windows(2).all(|w| w[0].end() <= w[1].start.0));
        }
        Message::Ready(Ready { generation, .. }) | Message::Handed { generation, .. } => {
            assert!(generation.0 <= GENERATION_MAX);
        }
        Message::Kept { name } => assert!(name.as_str().len() <= NAME_BYTES_MAX),
        Message::Staged { .. }
        | Message::Seal(_)
        | Message::Committed { .. }
        | Message::Fenced { .. }
        | Message::Diverged { .. }
        | Message::Give
        | Message::Applied { .. }
        | Message::Drain
        | Message::Drained { .. } => {}
    }
    let encoded = message.encode();
    let (prefix, again) = encoded.split_first_chunk::<4>().expect("a length prefix");
    assert_eq!(Message::check_length(*prefix), Ok(again.len()));
    assert_eq!(Message::decode(again).as_ref(), Ok(&message));
    // A close may lose what is not for terminals, a welcome without a commit what stands in the place of the commit.
    if !matches!(message, Message::Close { .. } | Message::Welcome { committed: None, .. }) {
        assert_eq!(again, body, "one encoding for one message");
    }
}

/// Messages one after the other, each behind its length, as a session reads them.
fn stream(bytes: &[u8]) {
    let mut r = Reader::new("stream", bytes);
    while let Ok(prefix) = r.array::<4>() {
        let claimed = u32::from_le_bytes(prefix) as usize;
        match Message::check_length(prefix) {
            Ok(length) => assert!(length == claimed && length <= MESSAGE_BYTES_MAX),
            Err(error) => {
                assert!(matches!(error, DecodeError::TooLong { .. }) && claimed > MESSAGE_BYTES_MAX);
                return;
            }
        }
        let Ok(body) = r.bytes(claimed) else { return };
        message(body);
    }
}

fn pass(choices: &mut Choices<'_>) {
    let as_is = choices.u8().is_multiple_of(2);
    let mut bytes: [u8; PASS_HEADER_BYTES] = choices.array();
    if !as_is {
        bytes[..4].copy_from_slice(&PASS_MAGIC);
    }
    let Ok(header) = PassHeader::decode(&bytes) else { return };
    let again = header.encode();
    // The last byte is reserved: written as zero, read as anything.
    assert_eq!(again[..PASS_HEADER_BYTES - 1], bytes[..PASS_HEADER_BYTES - 1]);
    assert_eq!(PassHeader::decode(&again), Ok(header));
}

fn seal(choices: &mut Choices<'_>) {
    let mended = choices.u8().is_multiple_of(2);
    let mut bytes: [u8; SEAL_BYTES] = choices.array();
    if mended {
        let (covered, crc) = bytes.split_last_chunk_mut::<4>().expect("longer than its checksum");
        covered[..4].copy_from_slice(&SEAL_MAGIC);
        *crc = crc32fast::hash(covered).to_le_bytes();
    }
    let decoded = Seal::decode(&bytes);
    assert!(decoded.is_ok() || !mended, "every field of a seal is free");
    if let Ok(seal) = decoded {
        assert_eq!(seal.encode(), bytes);
        let _ = seal.epoch.next();
    }
    message(&[&[3], &bytes[..]].concat());
}

fn texts(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    reads_back::<Point>(text);
    if let Some(key) = reads_back::<Fingerprint>(text) {
        assert_eq!(key.to_string(), text, "one text for one key");
    }
    if let Some(name) = reads_back::<Name>(text) {
        let name = name.as_str();
        assert!(name == text && (1..=NAME_BYTES_MAX).contains(&name.len()));
        assert!(!name.starts_with('.') && !name.contains('/'), "a name never leaves its folder");
    }
}

fn reads_back<T: FromStr<Err: Display> + Display + PartialEq + std::fmt::Debug>(text: &str) -> Option<T> {
    match text.parse::<T>() {
        Ok(value) => {
            assert_eq!(value.to_string().parse::<T>().ok().as_ref(), Some(&value));
            Some(value)
        }
        Err(error) => {
            let said = error.to_string();
            assert!(said.len() < 4096 && !said.contains('\n'), "{said:?}");
            None
        }
    }
}
