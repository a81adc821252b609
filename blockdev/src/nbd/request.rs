//! From a client's 28 bytes to a request that a device may see.
//!
//! `RawRequest::parse` only decodes; `validate` checks bounds, flags and permission. Nothing else makes a `ValidRequest`.

use super::error::{Errno, ProtocolError};
use super::wire::*;
use crate::ZeroMode;

/// A request as it came, with a good magic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RawRequest {
    pub(super) flags: u16,
    pub(super) command: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

/// What the handshake agreed on, as far as requests depend on it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub(super) size: u64,
    pub(super) read_only: bool,
    pub(super) structured: bool,
    pub(super) base_allocation: bool,
}

/// In range, allowed and with known flags: fit for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ValidRequest {
    Read { offset: u64, length: u32, fragment: bool },
    Write { offset: u64, length: u32, fua: bool },
    Flush,
    Trim { offset: u64, length: u32, fua: bool },
    WriteZeroes { offset: u64, length: u32, mode: ZeroMode, fua: bool },
    Cache { offset: u64, length: u32 },
    BlockStatus { offset: u64, length: u32, one: bool },
    Disconnect,
}

impl RawRequest {
    pub(super) fn parse(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, ProtocolError> {
        let [m0, m1, m2, m3, f0, f1, t0, t1, rest @ ..] = *bytes;
        let found = u32::from_be_bytes([m0, m1, m2, m3]);
        if found != REQUEST_MAGIC {
            return Err(ProtocolError::RequestMagic { found });
        }
        let [c0, c1, c2, c3, c4, c5, c6, c7, o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, l2, l3] = rest;
        Ok(Self {
            flags: u16::from_be_bytes([f0, f1]),
            command: u16::from_be_bytes([t0, t1]),
            cookie: u64::from_be_bytes([c0, c1, c2, c3, c4, c5, c6, c7]),
            offset: u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            length: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }

    /// Bytes of data that follow the request on the wire, whether or not it is valid.
    ///
    /// # Errors
    /// When there is more than the server is willing to read past.
    pub(super) fn payload_bytes(&self) -> Result<u32, ProtocolError> {
        match self.command {
            CMD_WRITE if self.length > PAYLOAD_BYTES_MAX => Err(ProtocolError::WriteTooLong { bytes: self.length }),
            CMD_WRITE => Ok(self.length),
            _ => Ok(0),
        }
    }

    /// The request, or what to tell the client.
    pub(super) fn validate(&self, terms: &Terms) -> Result<ValidRequest, Errno> {
        let Self { flags, offset, length, .. } = *self;
        let fua = flags & CMD_FLAG_FUA != 0;
        // FUA is legal on every command and means something on those that write.
        let allowed = CMD_FLAG_FUA
            | match self.command {
                CMD_READ if terms.structured => CMD_FLAG_DF,
                CMD_WRITE_ZEROES => CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
                CMD_BLOCK_STATUS => CMD_FLAG_REQ_ONE,
                _ => 0,
            };
        if flags & !allowed != 0 {
            return Err(Errno::Inval);
        }
        let writes = matches!(self.command, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES);
        if writes && terms.read_only {
            return Err(Errno::Perm);
        }
        let ranged = writes || matches!(self.command, CMD_READ | CMD_CACHE | CMD_BLOCK_STATUS);
        if ranged && offset.checked_add(u64::from(length)).is_none_or(|end| end > terms.size) {
            return Err(if self.command == CMD_TRIM || !writes { Errno::Inval } else { Errno::NoSpc });
        }
        match self.command {
            CMD_READ if length > PAYLOAD_BYTES_MAX => Err(Errno::Inval),
            CMD_READ => {
                let fragment = terms.structured && flags & CMD_FLAG_DF == 0;
                Ok(ValidRequest::Read { offset, length, fragment })
            }
            CMD_WRITE => Ok(ValidRequest::Write { offset, length, fua }),
            CMD_FLUSH if offset != 0 || length != 0 => Err(Errno::Inval),
            CMD_FLUSH => Ok(ValidRequest::Flush),
            CMD_TRIM => Ok(ValidRequest::Trim { offset, length, fua }),
            CMD_WRITE_ZEROES => {
                let mode = ZeroMode { may_unmap: flags & CMD_FLAG_NO_HOLE == 0, fast_only: flags & CMD_FLAG_FAST_ZERO != 0 };
                Ok(ValidRequest::WriteZeroes { offset, length, mode, fua })
            }
            CMD_CACHE => Ok(ValidRequest::Cache { offset, length }),
            CMD_BLOCK_STATUS if !terms.base_allocation || length == 0 => Err(Errno::Inval),
            CMD_BLOCK_STATUS => Ok(ValidRequest::BlockStatus { offset, length, one: flags & CMD_FLAG_REQ_ONE != 0 }),
            CMD_DISC => Ok(ValidRequest::Disconnect),
            _ => Err(Errno::Inval),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms = Terms { size: 10_000, read_only: false, structured: true, base_allocation: true };

    fn raw(command: u16, flags: u16, offset: u64, length: u32) -> RawRequest {
        RawRequest { flags, command, cookie: 7, offset, length }
    }

    #[test]
    fn parses_the_documented_layout() {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[5] = 1;
        bytes[7] = 6;
        bytes[15] = 9;
        bytes[23] = 0x10;
        bytes[26] = 2;
        let parsed = RawRequest::parse(&bytes).unwrap();
        assert_eq!(parsed, RawRequest { flags: 1, command: 6, cookie: 9, offset: 16, length: 512 });
        bytes[0] = 0;
        assert_eq!(RawRequest::parse(&bytes), Err(ProtocolError::RequestMagic { found: 0x0060_9513 }));
    }

    #[test]
    fn ranges_end_at_the_size_and_never_wrap() {
        for command in [CMD_READ, CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES, CMD_CACHE, CMD_BLOCK_STATUS] {
            let beyond = if matches!(command, CMD_WRITE | CMD_WRITE_ZEROES) { Errno::NoSpc } else { Errno::Inval };
            assert!(raw(command, 0, 9_999, 1).validate(&TERMS).is_ok(), "{command}");
            for (offset, length) in [(9_999, 2), (10_000, 1), (u64::MAX, 1), (u64::MAX - 1, u32::MAX), (0, 10_001)] {
                assert_eq!(raw(command, 0, offset, length).validate(&TERMS), Err(beyond), "{command} {offset}");
            }
        }
        let huge = Terms { size: u64::MAX, ..TERMS };
        assert_eq!(raw(CMD_READ, 0, 0, PAYLOAD_BYTES_MAX + 1).validate(&huge), Err(Errno::Inval));
        assert!(raw(CMD_TRIM, 0, 0, u32::MAX).validate(&huge).is_ok());
    }

    #[test]
    fn unknown_flags_and_commands_are_invalid_and_fua_is_taken_everywhere() {
        for command in [CMD_READ, CMD_WRITE, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS] {
            let length = u32::from(command != CMD_FLUSH);
            assert!(raw(command, CMD_FLAG_FUA, 0, length).validate(&TERMS).is_ok(), "{command}");
            assert_eq!(raw(command, 1 << 9, 0, length).validate(&TERMS), Err(Errno::Inval), "{command}");
        }
        assert_eq!(raw(99, 0, 0, 0).validate(&TERMS), Err(Errno::Inval));
        let simple = Terms { structured: false, base_allocation: false, ..TERMS };
        assert_eq!(raw(CMD_READ, CMD_FLAG_DF, 0, 1).validate(&simple), Err(Errno::Inval));
        assert_eq!(raw(CMD_BLOCK_STATUS, 0, 0, 1).validate(&simple), Err(Errno::Inval));
    }

    #[test]
    fn a_read_only_export_refuses_what_changes_it() {
        let terms = Terms { read_only: true, ..TERMS };
        for command in [CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES] {
            assert_eq!(raw(command, 0, 0, 1).validate(&terms), Err(Errno::Perm));
        }
        assert!(raw(CMD_FLUSH, 0, 0, 0).validate(&terms).is_ok());
        assert!(raw(CMD_READ, 0, 0, 1).validate(&terms).is_ok());
    }

    #[test]
    fn only_writes_carry_data_and_only_so_much() {
        assert_eq!(raw(CMD_WRITE, 0, 0, 5).payload_bytes(), Ok(5));
        assert_eq!(raw(CMD_READ, 0, 0, u32::MAX).payload_bytes(), Ok(0));
        let bytes = PAYLOAD_BYTES_MAX + 1;
        assert_eq!(raw(CMD_WRITE, 0, 0, bytes).payload_bytes(), Err(ProtocolError::WriteTooLong { bytes }));
    }
}
