//! The header of a pass stream: a unidirectional stream that carries one pass of one epoch, and behind the header frames only.

use crate::codec::{DecodeError, Reader};
use crate::units::EpochId;

/// First bytes of a pass stream.
pub const PASS_MAGIC: [u8; 4] = *b"TWP1";
/// Bytes of a pass stream's header.
pub const PASS_HEADER_BYTES: usize = 16;

/// Offsets of the fixed structures of this module.
pub mod layout {
    /// `(offset, bytes, field)` of the header of a pass stream.
    pub const PASS: &[(usize, usize, &str)] =
        &[(0, 4, "magic"), (4, 8, "epoch"), (12, 2, "pass"), (14, 1, "kind"), (15, 1, "continued")];
}

/// How a pass was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PassKind {
    /// Without freezing: blocks may be of different instants, later passes mend that.
    Fuzzy,
    /// Blocks as they were at the cut; the last pass of its epoch.
    Frozen,
}

/// Header of a unidirectional stream: which pass of which epoch its frames are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassHeader {
    /// The epoch.
    pub epoch: EpochId,
    /// Number of the pass, from 0.
    pub pass: u16,
    /// How it was read.
    pub kind: PassKind,
    /// The frames follow those that the welcome said were staged. Without this the epoch begins anew.
    pub continued: bool,
}

impl PassHeader {
    /// Encodes the header.
    #[must_use]
    pub fn encode(&self) -> [u8; PASS_HEADER_BYTES] {
        let mut out = [0; PASS_HEADER_BYTES];
        out[..4].copy_from_slice(&PASS_MAGIC);
        out[4..12].copy_from_slice(&self.epoch.0.to_le_bytes());
        out[12..14].copy_from_slice(&self.pass.to_le_bytes());
        out[14] = match self.kind {
            PassKind::Fuzzy => 1,
            PassKind::Frozen => 2,
        };
        out[15] = u8::from(self.continued);
        out
    }

    /// Decodes the header.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(bytes: &[u8; PASS_HEADER_BYTES]) -> Result<Self, DecodeError> {
        let mut r = Reader::new("pass header", bytes);
        r.magic(PASS_MAGIC)?;
        let (epoch, pass) = (EpochId(r.u64()?), r.u16()?);
        let kind = match r.u8()? {
            1 => PassKind::Fuzzy,
            2 => PassKind::Frozen,
            value => return Err(DecodeError::Unknown { what: "pass kind", value: value.into() }),
        };
        let continued = match r.u8()? {
            0 => false,
            1 => true,
            value => return Err(DecodeError::Unknown { what: "pass continued", value: value.into() }),
        };
        r.expect_end()?;
        Ok(Self { epoch, pass, kind, continued })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Would catch a kind that becomes the other one, and a byte that nobody looks at.
    #[test]
    fn a_header_reads_back_and_what_is_none_is_refused() {
        for (kind, continued) in [PassKind::Fuzzy, PassKind::Frozen].into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
            let pass = PassHeader { epoch: EpochId(7), pass: 3, kind, continued };
            assert_eq!(PassHeader::decode(&pass.encode()).unwrap(), pass);
        }
        let good = PassHeader { epoch: EpochId(7), pass: 3, kind: PassKind::Frozen, continued: false }.encode();
        for (at, value) in [(0, 0), (3, b'2'), (14, 0), (14, 3), (15, 2)] {
            let mut bad = good;
            bad[at] = value;
            assert!(PassHeader::decode(&bad).is_err(), "{value} at {at}");
        }
    }
}
