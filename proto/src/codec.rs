//! The bounded cursor under every decoder, and its mirror for encoding. All integers are little endian.

/// Why bytes are not what they should be. Decoders never panic and never allocate on a length they have not bounded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Fewer bytes than the field needs.
    #[error("{what}: truncated, {needed} bytes needed, {left} left")]
    Truncated {
        /// Structure being read.
        what: &'static str,
        /// Bytes the field needs.
        needed: usize,
        /// Bytes that are left.
        left: usize,
    },
    /// A length or count beyond its limit.
    #[error("{what}: {value} is beyond the limit of {max}")]
    TooLong {
        /// Field.
        what: &'static str,
        /// Value given.
        value: u64,
        /// Its limit.
        max: u64,
    },
    /// A value outside the set that is defined.
    #[error("{what}: {value:#x} is not defined")]
    Unknown {
        /// Field.
        what: &'static str,
        /// Value given.
        value: u64,
    },
    /// Bytes are left after the last field.
    #[error("{what}: {left} bytes left over")]
    Trailing {
        /// Structure being read.
        what: &'static str,
        /// Bytes that are left.
        left: usize,
    },
    /// A checksum does not match.
    #[error("{what}: checksum {computed:#010x} computed, {stored:#010x} stored")]
    Checksum {
        /// What is covered.
        what: &'static str,
        /// Stored value.
        stored: u32,
        /// Value computed from the bytes.
        computed: u32,
    },
    /// A rule between fields is broken.
    #[error("{what}: {rule}")]
    Rule {
        /// Structure being read.
        what: &'static str,
        /// The rule.
        rule: &'static str,
    },
}

/// A cursor over bytes that a peer or a disk supplied.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    what: &'static str,
    left: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads `bytes` as a `what` (named in errors).
    #[must_use]
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, left: bytes }
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        match self.left.split_at_checked(count) {
            Some((head, tail)) => {
                self.left = tail;
                Ok(head)
            }
            None => Err(DecodeError::Truncated { what: self.what, needed: count, left: self.left.len() }),
        }
    }

    /// The next `N` bytes as an array.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        match self.left.split_first_chunk::<N>() {
            Some((head, tail)) => {
                self.left = tail;
                Ok(*head)
            }
            None => Err(DecodeError::Truncated { what: self.what, needed: N, left: self.left.len() }),
        }
    }

    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A magic number.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`], [`DecodeError::Rule`] if the bytes differ.
    pub fn magic<const N: usize>(&mut self, expected: [u8; N]) -> Result<(), DecodeError> {
        if self.array::<N>()? == expected {
            Ok(())
        } else {
            Err(DecodeError::Rule { what: self.what, rule: "wrong magic number" })
        }
    }

    /// Fails unless everything was consumed.
    ///
    /// # Errors
    /// [`DecodeError::Trailing`].
    pub fn expect_end(&self) -> Result<(), DecodeError> {
        if self.left.is_empty() { Ok(()) } else { Err(DecodeError::Trailing { what: self.what, left: self.left.len() }) }
    }
}

/// Checks `value <= max` before anyone relies on it.
///
/// # Errors
/// [`DecodeError::TooLong`].
pub fn bounded(what: &'static str, value: u64, max: u64) -> Result<u64, DecodeError> {
    if value <= max { Ok(value) } else { Err(DecodeError::TooLong { what, value, max }) }
}

/// The first `chars_max` characters of a text that goes to a log or a terminal, with spaces for control characters: a message stays one
/// line.
pub(crate) fn printable(text: &str, chars_max: usize) -> String {
    text.chars().take(chars_max).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Checks a stored CRC-32 against the bytes it covers.
///
/// # Errors
/// [`DecodeError::Checksum`].
pub fn check_crc(what: &'static str, stored: u32, bytes: &[u8]) -> Result<(), DecodeError> {
    let computed = crc32fast::hash(bytes);
    if stored == computed { Ok(()) } else { Err(DecodeError::Checksum { what, stored, computed }) }
}
