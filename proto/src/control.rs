//! Messages of the control stream.
//!
//! A message on the wire is a 4-byte length, a type byte and a body. `Hello` and `Close` never change their encoding: they
//! are how two versions find out that they do not fit.

use crate::codec::{DecodeError, Reader, bounded, printable};
use crate::handback::{Ask, Ready, Want};
use crate::hashes::{HashQuery, Hashes};
use crate::name::{NAME_BYTES_MAX, Name};
use crate::scrub::{Scrub, Scrubbed};
use crate::seal::Seal;
use crate::units::{EpochId, GROUP_VOLUMES_MAX, Generation, Point, SessionToken, VOLUME_BYTES_MAX};

/// The protocol's name in the TLS handshake.
pub const ALPN: &[u8] = b"twinsite/1";
/// Oldest version this build speaks.
pub const VERSION_MIN: u16 = 1;
/// Newest version this build speaks.
pub const VERSION_MAX: u16 = 1;
/// First bytes of a hello.
pub const HELLO_MAGIC: [u8; 8] = *b"TWINSITE";
/// Highest generation of a hello: a failover raises it by one, so there is always a next one.
pub const GENERATION_MAX: u64 = 1 << 48;
/// Longest control message in bytes, without its length prefix.
pub const MESSAGE_BYTES_MAX: usize = 16 * 1024;
/// Longest reason in a close message, in bytes.
pub const REASON_BYTES_MAX: usize = 512;
/// A receiver tells what it has staged of an epoch each time that so many bytes of frames were appended since it told last. What a primary
/// keeps for sending again is bounded by more than that.
pub const STAGED_EVERY_BYTES: u64 = 256 << 10;

/// A volume as the primary describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeHello {
    /// Its name.
    pub name: Name,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// First message of a primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version it speaks.
    pub version_min: u16,
    /// Newest version it speaks.
    pub version_max: u16,
    /// Block size in bytes; 4096.
    pub block_bytes: u32,
    /// Epoch interval in milliseconds, for display at the other side.
    pub interval_ms: u32,
    /// The group.
    pub group: Name,
    /// Its generation as the primary knows it; 0 if it has no record.
    pub generation: Generation,
    /// The newest commit the primary knows of; 0 if none.
    pub committed: EpochId,
    /// Its volumes in order.
    pub volumes: Vec<VolumeHello>,
}

/// What a receiver has of an epoch that is not sealed: the first frames, from a connection that broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Staged {
    /// The epoch: the one after the newest commit.
    pub epoch: EpochId,
    /// Its frames; at least one.
    pub frames: u64,
    /// BLAKE3 of their fixed parts in order, as in a seal.
    pub digest: [u8; 32],
}

impl Staged {
    /// How "nothing" travels.
    const NONE: Self = Self { epoch: EpochId(0), frames: 0, digest: [0; 32] };
}

/// Reason with which a primary closes the connection (code 1) when it is stopped in order: it takes leave, and is not alive any more.
/// Other ends of a session have other reasons.
pub const LEAVE_REASON: &str = "this node is stopping";

/// Why a session ends. The numbers are the wire's and the QUIC close code's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum CloseCode {
    /// The node is stopping; come back later.
    Stopping = 1,
    /// The two sides speak no common version.
    Version = 2,
    /// The group is not this client's, or is not configured.
    UnknownGroup = 3,
    /// Volumes, sizes or block size differ from what the receiver holds.
    Mismatch = 4,
    /// Another session of this group took over.
    Superseded = 5,
    /// The receiver cannot store: full or failing disk.
    Storage = 6,
    /// A message or frame broke the protocol.
    Misbehaved = 7,
    /// A generation beyond the receiver's.
    Ahead = 8,
    /// A limit of the receiver is reached.
    Limit = 9,
}

impl CloseCode {
    /// The code of a number from the wire.
    #[must_use]
    pub fn from_u16(value: u16) -> Option<Self> {
        use CloseCode as C;
        [C::Stopping, C::Version, C::UnknownGroup, C::Mismatch, C::Superseded, C::Storage, C::Misbehaved, C::Ahead, C::Limit]
            .into_iter()
            .find(|c| *c as u16 == value)
    }

    /// Whether trying again unchanged can help.
    #[must_use]
    pub fn is_transient(self) -> bool {
        matches!(self, Self::Stopping | Self::Superseded | Self::Storage | Self::Limit)
    }
}

/// A message of the control stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Primary to receiver, first.
    Hello(Hello),
    /// Receiver to primary: admitted.
    Welcome {
        /// The version both speak.
        version: u16,
        /// Generation of the session's epochs.
        generation: Generation,
        /// Newest commit, if there is any; the next epoch is one more than its epoch (or 1).
        committed: Option<Point>,
        /// The session that cut it; zeroes if there is none.
        writer: SessionToken,
        /// Epochs the receiver accepts in flight.
        epochs_in_flight_max: u16,
        /// What it has of the next epoch. The primary goes on from there, or begins that epoch anew.
        staged: Option<Staged>,
    },
    /// Receiver to primary: it has so many frames of the epoch that is arriving, and keeps them if the connection breaks.
    Staged {
        /// The epoch.
        epoch: EpochId,
        /// Frames from its beginning.
        frames: u64,
    },
    /// Primary to receiver: the epoch's frames are all sent.
    Seal(Seal),
    /// Receiver to primary: the epoch is on stable storage.
    Committed {
        /// The point.
        point: Point,
    },
    /// Primary to receiver: asks for hashes of the newest committed point.
    HashQuery(HashQuery),
    /// Receiver to primary: the answer.
    Hashes(Hashes),
    /// Primary to receiver: what blocks held at the cut of the last sealed epoch.
    Scrub(Scrub),
    /// Receiver to primary: the answer.
    Scrubbed(Scrubbed),
    /// Receiver to primary: another side may write now.
    Fenced {
        /// The generation that holds.
        generation: Generation,
    },
    /// Primary to receiver, first, in place of a hello: give the group's disks back.
    Handback(Ask),
    /// Receiver to primary: it can.
    Ready(Ready),
    /// Primary to receiver: what it had written of its own was sent on a stream, so many frames with this digest.
    Diverged {
        /// Frames.
        frames: u64,
        /// BLAKE3 of their fixed parts in order, as in a seal.
        digest: [u8; 32],
    },
    /// Receiver to primary: that is on stable storage, as a fork of this name.
    Kept {
        /// The fork.
        name: Name,
    },
    /// Primary to receiver: it needs these blocks besides those that the receiver knows to differ.
    Want(Want),
    /// Primary to receiver: send.
    Give,
    /// Primary to receiver: this pass is on its disks; the last one durably.
    Applied {
        /// The pass.
        pass: u16,
    },
    /// Receiver to primary: the primary may write now.
    Handed {
        /// The point that both sides hold.
        point: Point,
        /// The generation of the primary's epochs from here on.
        generation: Generation,
    },
    /// Receiver to primary: stop taking writes, and commit what there is.
    Drain,
    /// Primary to receiver: it takes no writes, and all of them are committed, up to this point.
    Drained {
        /// The newest commit.
        point: Point,
    },
    /// Either way, last: why the session ends, for the other side's log.
    Close {
        /// Why.
        code: u16,
        /// One line for a person.
        reason: String,
    },
}

const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const SEAL: u8 = 3;
const COMMITTED: u8 = 4;
const FENCED: u8 = 5;
const CLOSE: u8 = 6;
const HASH_QUERY: u8 = 7;
const HASHES: u8 = 8;
const STAGED: u8 = 9;
const SCRUB: u8 = 10;
const SCRUBBED: u8 = 11;
const HANDBACK: u8 = 12;
const READY: u8 = 13;
const DIVERGED: u8 = 14;
const KEPT: u8 = 15;
const WANT: u8 = 16;
const GIVE: u8 = 17;
const APPLIED: u8 = 18;
const HANDED: u8 = 19;
const DRAIN: u8 = 20;
const DRAINED: u8 = 21;

impl Message {
    /// A close message; the reason is cut to its limit.
    #[must_use]
    pub fn close(code: CloseCode, reason: &str) -> Self {
        let end = reason.floor_char_boundary(REASON_BYTES_MAX);
        Self::Close { code: code as u16, reason: reason.get(..end).unwrap_or_default().to_owned() }
    }

    /// Name of the message for errors.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Welcome { .. } => "welcome",
            Self::Staged { .. } => "staged",
            Self::Seal(_) => "seal",
            Self::Committed { .. } => "committed",
            Self::HashQuery(_) => "hash query",
            Self::Hashes(_) => "hashes",
            Self::Scrub(_) => "scrub",
            Self::Scrubbed(_) => "scrubbed",
            Self::Fenced { .. } => "fenced",
            Self::Handback(_) => "handback",
            Self::Ready(_) => "ready",
            Self::Diverged { .. } => "diverged",
            Self::Kept { .. } => "kept",
            Self::Want(_) => "want",
            Self::Give => "give",
            Self::Applied { .. } => "applied",
            Self::Handed { .. } => "handed",
            Self::Drain => "drain",
            Self::Drained { .. } => "drained",
            Self::Close { .. } => "close",
        }
    }

    /// Encodes with the length prefix.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(128);
        match self {
            Self::Hello(h) => {
                body.push(HELLO);
                body.extend_from_slice(&HELLO_MAGIC);
                body.extend_from_slice(&h.version_min.to_le_bytes());
                body.extend_from_slice(&h.version_max.to_le_bytes());
                body.extend_from_slice(&h.block_bytes.to_le_bytes());
                body.extend_from_slice(&h.interval_ms.to_le_bytes());
                put_name(&mut body, &h.group);
                body.extend_from_slice(&h.generation.0.to_le_bytes());
                body.extend_from_slice(&h.committed.0.to_le_bytes());
                put_volumes(&mut body, &h.volumes);
            }
            Self::Welcome { version, generation, committed, writer, epochs_in_flight_max, staged } => {
                body.push(WELCOME);
                body.extend_from_slice(&version.to_le_bytes());
                body.extend_from_slice(&generation.0.to_le_bytes());
                body.push(u8::from(committed.is_some()));
                let point = committed.unwrap_or(Point { generation: Generation(0), epoch: EpochId(0) });
                body.extend_from_slice(&point.generation.0.to_le_bytes());
                body.extend_from_slice(&point.epoch.0.to_le_bytes());
                body.extend_from_slice(&writer.0);
                body.extend_from_slice(&epochs_in_flight_max.to_le_bytes());
                let staged = staged.unwrap_or(Staged::NONE);
                body.extend_from_slice(&staged.epoch.0.to_le_bytes());
                body.extend_from_slice(&staged.frames.to_le_bytes());
                body.extend_from_slice(&staged.digest);
            }
            Self::Staged { epoch, frames } => {
                body.push(STAGED);
                body.extend_from_slice(&epoch.0.to_le_bytes());
                body.extend_from_slice(&frames.to_le_bytes());
            }
            Self::Seal(seal) => {
                body.push(SEAL);
                body.extend_from_slice(&seal.encode());
            }
            Self::Committed { point } => {
                body.push(COMMITTED);
                put_point(&mut body, *point);
            }
            Self::HashQuery(query) => {
                body.push(HASH_QUERY);
                query.encode(&mut body);
            }
            Self::Hashes(hashes) => {
                body.push(HASHES);
                hashes.encode(&mut body);
            }
            Self::Scrub(scrub) => {
                body.push(SCRUB);
                scrub.encode(&mut body);
            }
            Self::Scrubbed(scrubbed) => {
                body.push(SCRUBBED);
                scrubbed.encode(&mut body);
            }
            Self::Fenced { generation } => {
                body.push(FENCED);
                body.extend_from_slice(&generation.0.to_le_bytes());
            }
            Self::Handback(ask) => {
                body.push(HANDBACK);
                ask.encode(&mut body);
            }
            Self::Ready(ready) => {
                body.push(READY);
                ready.encode(&mut body);
            }
            Self::Diverged { frames, digest } => {
                body.push(DIVERGED);
                body.extend_from_slice(&frames.to_le_bytes());
                body.extend_from_slice(digest);
            }
            Self::Kept { name } => {
                body.push(KEPT);
                put_name(&mut body, name);
            }
            Self::Want(want) => {
                body.push(WANT);
                want.encode(&mut body);
            }
            Self::Give => body.push(GIVE),
            Self::Applied { pass } => {
                body.push(APPLIED);
                body.extend_from_slice(&pass.to_le_bytes());
            }
            Self::Handed { point, generation } => {
                body.push(HANDED);
                put_point(&mut body, *point);
                body.extend_from_slice(&generation.0.to_le_bytes());
            }
            Self::Drain => body.push(DRAIN),
            Self::Drained { point } => {
                body.push(DRAINED);
                put_point(&mut body, *point);
            }
            Self::Close { code, reason } => {
                body.push(CLOSE);
                body.extend_from_slice(&code.to_le_bytes());
                body.extend_from_slice(&(reason.len() as u16).to_le_bytes());
                body.extend_from_slice(reason.as_bytes());
            }
        }
        let mut out = (body.len() as u32).to_le_bytes().to_vec();
        out.append(&mut body);
        out
    }

    /// Checks a length prefix before anything is allocated for it.
    ///
    /// # Errors
    /// [`DecodeError::TooLong`].
    pub fn check_length(prefix: [u8; 4]) -> Result<usize, DecodeError> {
        bounded("control message bytes", u32::from_le_bytes(prefix).into(), MESSAGE_BYTES_MAX as u64).map(|n| n as usize)
    }

    /// Decodes a message without its length prefix.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new("control message", bytes);
        let message = match r.u8()? {
            HELLO => Self::Hello(decode_hello(&mut r)?),
            WELCOME => {
                let (version, generation, some) = (r.u16()?, Generation(r.u64()?), r.u8()?);
                let point = Point { generation: Generation(r.u64()?), epoch: EpochId(r.u64()?) };
                let committed = match some {
                    0 => None,
                    1 => Some(point),
                    value => return Err(DecodeError::Unknown { what: "welcome committed", value: value.into() }),
                };
                let (writer, epochs_in_flight_max) = (SessionToken(r.array()?), r.u16()?);
                let staged = Staged { epoch: EpochId(r.u64()?), frames: r.u64()?, digest: r.array()? };
                if staged.frames == 0 && staged != Staged::NONE {
                    return Err(DecodeError::Rule { what: "welcome staged", rule: "no frames have neither epoch nor digest" });
                }
                let staged = (staged.frames > 0).then_some(staged);
                Self::Welcome { version, generation, committed, writer, epochs_in_flight_max, staged }
            }
            STAGED => Self::Staged { epoch: EpochId(r.u64()?), frames: r.u64()? },
            SEAL => Self::Seal(Seal::decode(r.bytes(crate::seal::SEAL_BYTES)?)?),
            COMMITTED => Self::Committed { point: get_point(&mut r)? },
            HASH_QUERY => Self::HashQuery(HashQuery::decode(&mut r)?),
            HASHES => Self::Hashes(Hashes::decode(&mut r)?),
            SCRUB => Self::Scrub(Scrub::decode(&mut r)?),
            SCRUBBED => Self::Scrubbed(Scrubbed::decode(&mut r)?),
            FENCED => Self::Fenced { generation: Generation(r.u64()?) },
            HANDBACK => Self::Handback(Ask::decode(&mut r)?),
            READY => Self::Ready(Ready::decode(&mut r)?),
            DIVERGED => Self::Diverged { frames: r.u64()?, digest: r.array()? },
            KEPT => Self::Kept { name: get_name(&mut r)? },
            WANT => Self::Want(Want::decode(&mut r)?),
            GIVE => Self::Give,
            APPLIED => Self::Applied { pass: r.u16()? },
            HANDED => Self::Handed { point: get_point(&mut r)?, generation: get_generation(&mut r)? },
            DRAIN => Self::Drain,
            DRAINED => Self::Drained { point: get_point(&mut r)? },
            CLOSE => {
                let code = r.u16()?;
                let len = bounded("close reason bytes", r.u16()?.into(), REASON_BYTES_MAX as u64)? as usize;
                // A peer's text goes to a log and a terminal: control characters do not.
                let mut reason = printable(&String::from_utf8_lossy(r.bytes(len)?), REASON_BYTES_MAX);
                // What is put in the place of bytes that are no text is longer than these.
                reason.truncate(reason.floor_char_boundary(REASON_BYTES_MAX));
                Self::Close { code, reason }
            }
            value => return Err(DecodeError::Unknown { what: "control message type", value: value.into() }),
        };
        r.expect_end()?;
        Ok(message)
    }
}

pub(crate) fn put_point(out: &mut Vec<u8>, point: Point) {
    out.extend_from_slice(&point.generation.0.to_le_bytes());
    out.extend_from_slice(&point.epoch.0.to_le_bytes());
}

pub(crate) fn get_point(r: &mut Reader<'_>) -> Result<Point, DecodeError> {
    Ok(Point { generation: Generation(r.u64()?), epoch: EpochId(r.u64()?) })
}

pub(crate) fn get_generation(r: &mut Reader<'_>) -> Result<Generation, DecodeError> {
    Ok(Generation(bounded("generation", r.u64()?, GENERATION_MAX)?))
}

pub(crate) fn put_volumes(out: &mut Vec<u8>, volumes: &[VolumeHello]) {
    out.extend_from_slice(&(volumes.len() as u16).to_le_bytes());
    for volume in volumes {
        put_name(out, &volume.name);
        out.extend_from_slice(&volume.size_bytes.to_le_bytes());
    }
}

pub(crate) fn put_name(out: &mut Vec<u8>, name: &Name) {
    out.push(name.as_str().len() as u8);
    out.extend_from_slice(name.as_str().as_bytes());
}

pub(crate) fn get_name(r: &mut Reader<'_>) -> Result<Name, DecodeError> {
    let len = bounded("name bytes", r.u8()?.into(), NAME_BYTES_MAX as u64)? as usize;
    let bytes = r.bytes(len)?;
    let rule = DecodeError::Rule { what: "name", rule: "1 to 64 of a-z A-Z 0-9 . _ - starting with a letter or digit" };
    std::str::from_utf8(bytes).ok().and_then(|s| s.parse().ok()).ok_or(rule)
}

fn decode_hello(r: &mut Reader<'_>) -> Result<Hello, DecodeError> {
    r.magic(HELLO_MAGIC)?;
    Ok(Hello {
        version_min: r.u16()?,
        version_max: r.u16()?,
        block_bytes: r.u32()?,
        interval_ms: r.u32()?,
        group: get_name(r)?,
        generation: get_generation(r)?,
        committed: EpochId(r.u64()?),
        volumes: get_volumes(r)?,
    })
}

/// The volumes of a group: at least one, none empty, with names of their own.
pub(crate) fn get_volumes(r: &mut Reader<'_>) -> Result<Vec<VolumeHello>, DecodeError> {
    let count = bounded("volumes of a group", r.u16()?.into(), GROUP_VOLUMES_MAX as u64)?;
    if count == 0 {
        return Err(DecodeError::Rule { what: "hello", rule: "a group has at least one volume" });
    }
    let mut volumes: Vec<VolumeHello> = Vec::new();
    for _ in 0..count {
        let volume = VolumeHello { name: get_name(r)?, size_bytes: bounded("volume bytes", r.u64()?, VOLUME_BYTES_MAX)? };
        if volume.size_bytes == 0 || volumes.iter().any(|v| v.name == volume.name) {
            return Err(DecodeError::Rule { what: "hello", rule: "volumes are not empty and have names of their own" });
        }
        volumes.push(volume);
    }
    Ok(volumes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scrub::{ScrubOutcome, ScrubRun};
    use crate::units::{BlockExtent, BlockIndex, VolumeIndex};
    use proptest::prelude::*;

    fn hello() -> Hello {
        Hello {
            version_min: 1,
            version_max: 1,
            block_bytes: 4096,
            interval_ms: 1000,
            group: "db".parse().unwrap(),
            generation: Generation(3),
            committed: EpochId(9),
            volumes: vec![VolumeHello { name: "root".parse().unwrap(), size_bytes: 1 << 30 }],
        }
    }

    /// Hello and close are frozen for ever.
    #[test]
    fn golden_hello_and_close() {
        let hex = |b: &[u8]| b.iter().map(|x| format!("{x:02x}")).collect::<String>();
        assert_eq!(
            hex(&Message::Hello(hello()).encode()),
            "37000000015457494e5349544501000100001000 00e8030000026462030000000000000009000000000000000100\
             04726f6f740000004000000000"
                .replace(' ', "")
        );
        assert_eq!(hex(&Message::close(CloseCode::Version, "old").encode()), "0800000006020003006f6c64");
    }

    /// Would catch a claim after which no failover can raise the generation.
    #[test]
    fn a_generation_without_a_next_one_is_refused() {
        let decoded = |generation| {
            let hello = Hello { generation: Generation(generation), ..hello() };
            Message::decode(&Message::Hello(hello).encode()[4..])
        };
        assert!(decoded(GENERATION_MAX).is_ok());
        let error = decoded(u64::MAX).unwrap_err().to_string();
        assert_eq!(error, "generation: 18446744073709551615 is beyond the limit of 281474976710656");
    }

    #[test]
    fn messages_read_back() {
        let point = Point { generation: Generation(2), epoch: EpochId(5) };
        let seal = Seal {
            passes: 1,
            epoch: EpochId(1),
            generation: Generation(1),
            cut_unix_us: 1,
            frames: 1,
            frame_bytes: 1,
            data_blocks: 1,
            zero_blocks: 0,
            first_write_unix_us: 1,
            session: SessionToken([3; 16]),
            digest: [1; 32],
        };
        for message in [
            Message::Hello(hello()),
            Message::Welcome {
                version: 1,
                generation: Generation(1),
                committed: None,
                writer: SessionToken::default(),
                epochs_in_flight_max: 8,
                staged: None,
            },
            Message::Welcome {
                version: 1,
                generation: Generation(1),
                committed: Some(point),
                writer: SessionToken([5; 16]),
                epochs_in_flight_max: 8,
                staged: Some(Staged { epoch: EpochId(6), frames: 12, digest: [4; 32] }),
            },
            Message::Staged { epoch: EpochId(6), frames: 12 },
            Message::HashQuery(HashQuery { id: 7, volume: VolumeIndex(2), start: BlockIndex(160), blocks: 33, chunk_blocks: 16 }),
            Message::Hashes(Hashes { id: 7, hashes: vec![[1; 32], [2; 32], [3; 32]] }),
            Message::Scrub(Scrub {
                id: 9,
                epoch: EpochId(3),
                volume: VolumeIndex(1),
                runs: vec![
                    ScrubRun { extent: BlockExtent { start: BlockIndex(4), blocks: 2 }, hash: [4; 32] },
                    ScrubRun { extent: BlockExtent { start: BlockIndex(6), blocks: 1 }, hash: [6; 32] },
                ],
            }),
            Message::Scrubbed(Scrubbed { id: 9, outcome: ScrubOutcome::Compared { differing: vec![1] } }),
            Message::Scrubbed(Scrubbed { id: 9, outcome: ScrubOutcome::Stale }),
            Message::Seal(seal),
            Message::Committed { point },
            Message::Fenced { generation: Generation(4) },
            Message::close(CloseCode::Storage, "disk full"),
        ] {
            let bytes = message.encode();
            assert_eq!(Message::check_length(bytes[..4].try_into().unwrap()).unwrap(), bytes.len() - 4);
            assert_eq!(Message::decode(&bytes[4..]).unwrap(), message);
            for cut in 4..bytes.len() {
                assert!(Message::decode(&bytes[4..cut]).is_err(), "{} cut at {cut}", message.kind());
            }
        }
        assert!(Message::check_length([0xff; 4]).is_err());
    }

    #[test]
    fn close_codes_read_back_and_long_reasons_are_cut() {
        for code in 0..20 {
            if let Some(c) = CloseCode::from_u16(code) {
                assert_eq!(c as u16, code);
            }
        }
        let Message::Close { reason, .. } = Message::close(CloseCode::Limit, &"é".repeat(400)) else { unreachable!() };
        assert_eq!(reason.len(), 512);
    }

    /// Would catch a reason that grows beyond its limit when what is no text in it is replaced.
    #[test]
    fn a_reason_that_is_no_text_stays_within_its_limit() {
        let mut body = vec![CLOSE, 3, 0, 0, 2];
        body.extend_from_slice(&[0xff; REASON_BYTES_MAX]);
        let message = Message::decode(&body).unwrap();
        let Message::Close { reason, .. } = &message else { unreachable!() };
        assert_eq!(reason, &"\u{fffd}".repeat(170));
        assert_eq!(Message::decode(&message.encode()[4..]).unwrap(), message);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Message::decode(&bytes);
        }
    }
}
