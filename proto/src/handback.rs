//! Giving a group's disks back to its primary: after a failover (what the activated copy has become), or to an earlier point (rollback).
//!
//! The primary asks, on a connection of its own, in place of a hello. It compares what it has marked with the receiver's newest point, sends
//! what it had written of its own to be kept as a fork, says which blocks it wants besides those the receiver knows to differ, and applies
//! what comes. What comes is staged in the receiver's journal as well: in the end both hold one point, and the generation is raised.

use crate::codec::{DecodeError, Reader, bounded};
use crate::control::{VolumeHello, get_generation, get_name, get_point, get_volumes, put_name, put_point, put_volumes};
use crate::name::Name;
use crate::units::{
    BLOCK_BYTES, BlockExtent, BlockIndex, EpochId, Generation, Point, SessionToken, VOLUME_BYTES_MAX, VolumeIndex,
};

/// Extents of one [`Want`] at most: it fits a control message.
pub const WANT_EXTENTS_MAX: usize = 1024;
/// Passes of a handback at most; the last is frozen whatever its size.
pub const HANDBACK_PASSES_MAX: u16 = 12;

/// First message of a primary that wants its disks back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Oldest version it speaks.
    pub version_min: u16,
    /// Newest version it speaks.
    pub version_max: u16,
    /// Block size in bytes; 4096.
    pub block_bytes: u32,
    /// The group.
    pub group: Name,
    /// Its generation as the primary has recorded it.
    pub generation: Generation,
    /// Drawn at random once for a handback, and durably recorded: the point that ends it carries it.
    pub token: SessionToken,
    /// The point to go back to (rollback); `None`: what the activated copy has become (failback).
    pub to: Option<Point>,
    /// The point to go back to by a name that the receiver knows, in place of `to`.
    pub named: Option<Name>,
    /// Its volumes in order.
    pub volumes: Vec<VolumeHello>,
}

/// The receiver's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// The version both speak.
    pub version: u16,
    /// The generation that holds at the receiver.
    pub generation: Generation,
    /// Its newest point: hash queries are of it.
    pub newest: Point,
    /// The point whose fork is given back, or the point to go back to.
    pub from: Point,
    /// Bytes of blocks that are sent in any case, before compression.
    pub give_bytes: u64,
}

/// Blocks that the primary needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// The volume.
    pub volume: VolumeIndex,
    /// In rising order, none empty.
    pub extents: Vec<BlockExtent>,
}

/// What a [`Ask`] wants: the activated copy as it is, a point, a point by its name.
const TO_ACTIVE: u8 = 0;
const TO_POINT: u8 = 1;
const TO_NAME: u8 = 2;

const NO_POINT: Point = Point { generation: Generation(0), epoch: EpochId(0) };

impl Ask {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.version_min.to_le_bytes());
        out.extend_from_slice(&self.version_max.to_le_bytes());
        out.extend_from_slice(&self.block_bytes.to_le_bytes());
        put_name(out, &self.group);
        out.extend_from_slice(&self.generation.0.to_le_bytes());
        out.extend_from_slice(&self.token.0);
        match (&self.named, self.to) {
            (Some(name), _) => {
                out.push(TO_NAME);
                put_name(out, name);
            }
            (None, Some(point)) => {
                out.push(TO_POINT);
                put_point(out, point);
            }
            (None, None) => {
                out.push(TO_ACTIVE);
                put_point(out, NO_POINT);
            }
        }
        put_volumes(out, &self.volumes);
    }

    pub(crate) fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (version_min, version_max, block_bytes, group) = (r.u16()?, r.u16()?, r.u32()?, get_name(r)?);
        let generation = get_generation(r)?;
        let token = SessionToken(r.array()?);
        let (to, named) = match r.u8()? {
            TO_NAME => (None, Some(get_name(r)?)),
            TO_POINT => (Some(get_point(r)?), None),
            TO_ACTIVE if get_point(r)? == NO_POINT => (None, None),
            TO_ACTIVE => return Err(DecodeError::Rule { what: "handback", rule: "no point is zeroes" }),
            value => return Err(DecodeError::Unknown { what: "handback point", value: value.into() }),
        };
        if token == SessionToken::default() {
            return Err(DecodeError::Rule { what: "handback", rule: "a token is not zeroes" });
        }
        let volumes = get_volumes(r)?;
        Ok(Self { version_min, version_max, block_bytes, group, generation, token, to, named, volumes })
    }
}

impl Ready {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.version.to_le_bytes());
        out.extend_from_slice(&self.generation.0.to_le_bytes());
        put_point(out, self.newest);
        put_point(out, self.from);
        out.extend_from_slice(&self.give_bytes.to_le_bytes());
    }

    pub(crate) fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            version: r.u16()?,
            generation: get_generation(r)?,
            newest: get_point(r)?,
            from: get_point(r)?,
            give_bytes: r.u64()?,
        })
    }
}

impl Want {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.volume.0.to_le_bytes());
        // WANT_EXTENTS_MAX fits.
        out.extend_from_slice(&(self.extents.len() as u16).to_le_bytes());
        for extent in &self.extents {
            out.extend_from_slice(&extent.start.0.to_le_bytes());
            out.extend_from_slice(&extent.blocks.to_le_bytes());
        }
    }

    pub(crate) fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let volume = VolumeIndex(r.u16()?);
        let count = bounded("extents of a want", r.u16()?.into(), WANT_EXTENTS_MAX as u64)?;
        let (mut extents, mut end) = (Vec::new(), 0);
        for _ in 0..count {
            let extent = BlockExtent { start: BlockIndex(r.u64()?), blocks: r.u32()? };
            if extent.blocks == 0 || extent.start.0 < end {
                return Err(DecodeError::Rule { what: "want", rule: "extents are not empty and in rising order" });
            }
            end = bounded("last block of a want", extent.end(), VOLUME_BYTES_MAX / BLOCK_BYTES)?;
            extents.push(extent);
        }
        Ok(Self { volume, extents })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Message;

    fn point(generation: u64, epoch: u64) -> Point {
        Point { generation: Generation(generation), epoch: EpochId(epoch) }
    }

    /// Every message reads back as it was, and no shortened one is taken.
    #[test]
    fn messages_read_back() {
        let volumes = vec![VolumeHello { name: "root".parse().unwrap(), size_bytes: 1 << 30 }];
        let ask = Ask {
            version_min: 1,
            version_max: 1,
            block_bytes: 4096,
            group: "db".parse().unwrap(),
            generation: Generation(3),
            token: SessionToken([7; 16]),
            to: None,
            named: None,
            volumes,
        };
        let extent = |start, blocks| BlockExtent { start: BlockIndex(start), blocks };
        let messages = [
            Message::Handback(ask.clone()),
            Message::Handback(Ask { to: Some(point(3, 9)), ..ask.clone() }),
            Message::Handback(Ask { named: Some("before-upgrade".parse().unwrap()), ..ask }),
            Message::Ready(Ready {
                version: 1,
                generation: Generation(4),
                newest: point(3, 9),
                from: point(3, 7),
                give_bytes: 1 << 40,
            }),
            Message::Diverged { frames: 3, digest: [9; 32] },
            Message::Kept { name: "diverged-3".parse().unwrap() },
            Message::Want(Want { volume: VolumeIndex(2), extents: vec![extent(1, 4), extent(5, 1)] }),
            Message::Give,
            Message::Applied { pass: 4 },
            Message::Handed { point: point(4, 10), generation: Generation(5) },
            Message::Drain,
            Message::Drained { point: point(3, 9) },
        ];
        for message in messages {
            let bytes = message.encode();
            assert_eq!(Message::decode(&bytes[4..]).unwrap(), message);
            for cut in 5..bytes.len() {
                assert!(Message::decode(&bytes[4..cut]).is_err(), "{} cut to {cut}", message.kind());
            }
        }
    }

    #[test]
    fn the_longest_want_fits_a_message_and_a_longer_one_is_refused() {
        let extent = |i| BlockExtent { start: BlockIndex(i * 2), blocks: 1 };
        let want = |count| Message::Want(Want { volume: VolumeIndex(0), extents: (0..count).map(extent).collect() }).encode();
        let longest = want(WANT_EXTENTS_MAX as u64);
        assert!(longest.len() - 4 <= crate::control::MESSAGE_BYTES_MAX);
        Message::decode(&longest[4..]).unwrap();
        Message::decode(&want(WANT_EXTENTS_MAX as u64 + 1)[4..]).unwrap_err();
    }
}
