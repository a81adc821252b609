//! The handshake as a state machine without I/O.
//!
//! `wants` says how many bytes come next, `advance` takes exactly those, appends what to send and gives the next state.
//! States move by value. Invariants: nothing but STARTTLS and ABORT does anything before TLS where TLS is
//! required; whatever was agreed before TLS is forgotten when TLS starts; a name or query is bounded before it is copied.

use super::error::ProtocolError;
use super::wire::*;

/// What a server offers, as far as the handshake must know it.
pub(super) trait Offered: Clone {
    fn name(&self) -> &str;
    fn description(&self) -> &str;
    fn size(&self) -> u64;
    fn read_only(&self) -> bool;
}

pub(super) trait Catalog {
    type Export: Offered;
    /// By name; the empty name is the default export.
    fn find(&self, name: &str) -> Option<Self::Export>;
    fn all(&self) -> Vec<Self::Export>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tls {
    Off,
    Required,
    Active,
}

/// How the data phase goes on.
#[derive(Debug)]
pub(super) struct Agreement<E> {
    pub(super) export: E,
    pub(super) structured: bool,
    pub(super) base_allocation: bool,
}

#[derive(Debug)]
pub(super) enum Step<E> {
    Next(Negotiation),
    /// Send, then do the TLS handshake, then go on.
    StartTls(Negotiation),
    /// Send, then serve requests.
    Transmit(Agreement<E>),
    /// Send, then close.
    Close,
}

#[derive(Debug)]
pub(super) enum Negotiation {
    ClientFlags { tls: Tls },
    OptionHeader(Agreed),
    OptionBody { agreed: Agreed, option: u32, bytes: u32 },
}

/// What options have settled so far.
#[derive(Debug)]
pub(super) struct Agreed {
    tls: Tls,
    no_zeroes: bool,
    structured: bool,
    /// The export name for which `base:allocation` was selected.
    meta: Option<String>,
    options_seen: u32,
}

impl Negotiation {
    pub(super) fn start(tls: Tls, out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&NBD_MAGIC.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
        Self::ClientFlags { tls }
    }

    pub(super) fn wants(&self) -> usize {
        match self {
            Self::ClientFlags { .. } => 4,
            Self::OptionHeader(_) => 16,
            Self::OptionBody { bytes, .. } => *bytes as usize,
        }
    }

    pub(super) fn advance<C: Catalog>(
        self,
        input: &[u8],
        catalog: &C,
        out: &mut Vec<u8>,
    ) -> Result<Step<C::Export>, ProtocolError> {
        let mut cursor = Cursor(input);
        match self {
            Self::ClientFlags { tls } => {
                let flags = cursor.u32().ok_or(ProtocolError::Truncated)?;
                if flags & !(CLIENT_FIXED_NEWSTYLE | CLIENT_NO_ZEROES) != 0 {
                    return Err(ProtocolError::ClientFlags { flags });
                }
                let no_zeroes = flags & CLIENT_NO_ZEROES != 0;
                let agreed = Agreed { tls, no_zeroes, structured: false, meta: None, options_seen: 0 };
                Ok(Step::Next(Self::OptionHeader(agreed)))
            }
            Self::OptionHeader(agreed) => {
                let found = cursor.u64().ok_or(ProtocolError::Truncated)?;
                let option = cursor.u32().ok_or(ProtocolError::Truncated)?;
                let bytes = cursor.u32().ok_or(ProtocolError::Truncated)?;
                agreed.header::<C>(found, option, bytes, out)
            }
            Self::OptionBody { agreed, option, .. } => agreed.option(option, input, catalog, out),
        }
    }
}

impl Agreed {
    fn header<C: Catalog>(
        mut self,
        found: u64,
        option: u32,
        bytes: u32,
        out: &mut Vec<u8>,
    ) -> Result<Step<C::Export>, ProtocolError> {
        if found != OPTION_MAGIC {
            return Err(ProtocolError::OptionMagic { found });
        }
        self.options_seen += 1;
        if self.options_seen > OPTIONS_MAX {
            return Err(ProtocolError::TooManyOptions);
        }
        if bytes > OPTION_BYTES_MAX {
            if option == OPT_EXPORT_NAME {
                return Err(ProtocolError::OptionTooLong { option, bytes });
            }
            reply(out, option, REP_ERR_TOO_BIG, &[]);
            return Ok(Step::Close);
        }
        Ok(Step::Next(Negotiation::OptionBody { agreed: self, option, bytes }))
    }

    fn option<C: Catalog>(
        mut self,
        option: u32,
        body: &[u8],
        catalog: &C,
        out: &mut Vec<u8>,
    ) -> Result<Step<C::Export>, ProtocolError> {
        if self.tls == Tls::Required && !matches!(option, OPT_STARTTLS | OPT_ABORT) {
            if option == OPT_EXPORT_NAME {
                return Err(ProtocolError::ExportNameRefused);
            }
            reply(out, option, REP_ERR_TLS_REQD, &[]);
            return Ok(self.next());
        }
        match option {
            OPT_EXPORT_NAME => return self.export_name(body, catalog, out),
            OPT_ABORT => {
                reply(out, option, REP_ACK, &[]);
                return Ok(Step::Close);
            }
            OPT_STARTTLS => return Ok(self.start_tls(body, out)),
            OPT_INFO | OPT_GO => return Ok(self.info_or_go(option, body, catalog, out)),
            OPT_LIST => list(body, catalog, out),
            OPT_STRUCTURED_REPLY if body.is_empty() => {
                self.structured = true;
                reply(out, option, REP_ACK, &[]);
            }
            OPT_STRUCTURED_REPLY => reply(out, option, REP_ERR_INVALID, &[]),
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => self.meta_context(option, body, catalog, out),
            _ => reply(out, option, REP_ERR_UNSUP, &[]),
        }
        Ok(self.next())
    }

    fn next<E>(self) -> Step<E> {
        Step::Next(Negotiation::OptionHeader(self))
    }

    fn start_tls<E>(mut self, body: &[u8], out: &mut Vec<u8>) -> Step<E> {
        let answer = match self.tls {
            _ if !body.is_empty() => REP_ERR_INVALID,
            Tls::Off => REP_ERR_POLICY,
            Tls::Active => REP_ERR_INVALID,
            Tls::Required => REP_ACK,
        };
        reply(out, OPT_STARTTLS, answer, &[]);
        if answer != REP_ACK {
            return self.next();
        }
        self.tls = Tls::Active;
        self.structured = false;
        self.meta = None;
        Step::StartTls(Negotiation::OptionHeader(self))
    }

    fn agreement<E>(&self, export: E, asked: &str) -> Agreement<E> {
        let base_allocation = self.structured && self.meta.as_deref() == Some(asked);
        Agreement { export, structured: self.structured, base_allocation }
    }

    fn export_name<C: Catalog>(self, body: &[u8], catalog: &C, out: &mut Vec<u8>) -> Result<Step<C::Export>, ProtocolError> {
        let name = std::str::from_utf8(body).ok().filter(|name| name.len() <= NAME_BYTES_MAX as usize);
        let Some((name, export)) = name.and_then(|name| Some((name, catalog.find(name)?))) else {
            return Err(ProtocolError::ExportNameRefused);
        };
        out.extend_from_slice(&export.size().to_be_bytes());
        out.extend_from_slice(&transmission_flags(&export, self.structured).to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        Ok(Step::Transmit(self.agreement(export, name)))
    }

    fn info_or_go<C: Catalog>(self, option: u32, body: &[u8], catalog: &C, out: &mut Vec<u8>) -> Step<C::Export> {
        let Some((name, wanted)) = parse_info(body) else {
            reply(out, option, REP_ERR_INVALID, &[]);
            return self.next();
        };
        let Some(export) = catalog.find(name) else {
            reply(out, option, REP_ERR_UNKNOWN, &[]);
            return self.next();
        };
        let mut info = |kind: u16, parts: &[&[u8]]| {
            let mut payload = kind.to_be_bytes().to_vec();
            parts.iter().for_each(|part| payload.extend_from_slice(part));
            reply(out, option, REP_INFO, &payload);
        };
        let flags = transmission_flags(&export, self.structured);
        info(INFO_EXPORT, &[&export.size().to_be_bytes(), &flags.to_be_bytes()]);
        let sizes = [BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, PAYLOAD_BYTES_MAX].map(u32::to_be_bytes);
        info(INFO_BLOCK_SIZE, &[&sizes[0], &sizes[1], &sizes[2]]);
        if wanted.contains(&INFO_NAME) {
            info(INFO_NAME, &[export.name().as_bytes()]);
        }
        if wanted.contains(&INFO_DESCRIPTION) && !export.description().is_empty() {
            info(INFO_DESCRIPTION, &[export.description().as_bytes()]);
        }
        reply(out, option, REP_ACK, &[]);
        if option == OPT_GO { Step::Transmit(self.agreement(export, name)) } else { self.next() }
    }

    fn meta_context<C: Catalog>(&mut self, option: u32, body: &[u8], catalog: &C, out: &mut Vec<u8>) {
        let setting = option == OPT_SET_META_CONTEXT;
        if setting {
            // A failed SET leaves nothing selected.
            self.meta = None;
        }
        let parsed = parse_meta(body).filter(|_| self.structured);
        let Some((name, queries)) = parsed else {
            return reply(out, option, REP_ERR_INVALID, &[]);
        };
        if catalog.find(name).is_none() {
            return reply(out, option, REP_ERR_UNKNOWN, &[]);
        }
        let listed = |query: &&str| *query == BASE_ALLOCATION || (!setting && *query == "base:");
        if queries.iter().any(listed) || (!setting && queries.is_empty()) {
            // The id means something only where it selects.
            let id = if setting { BASE_ALLOCATION_ID } else { 0 };
            let mut payload = id.to_be_bytes().to_vec();
            payload.extend_from_slice(BASE_ALLOCATION.as_bytes());
            reply(out, option, REP_META_CONTEXT, &payload);
            if setting {
                self.meta = Some(name.to_owned());
            }
        }
        reply(out, option, REP_ACK, &[]);
    }
}

fn list<C: Catalog>(body: &[u8], catalog: &C, out: &mut Vec<u8>) {
    if !body.is_empty() {
        return reply(out, OPT_LIST, REP_ERR_INVALID, &[]);
    }
    for export in catalog.all() {
        let name = export.name().as_bytes();
        let mut payload = (name.len() as u32).to_be_bytes().to_vec();
        payload.extend_from_slice(name);
        payload.extend_from_slice(export.description().as_bytes());
        reply(out, OPT_LIST, REP_SERVER, &payload);
    }
    reply(out, OPT_LIST, REP_ACK, &[]);
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, payload: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    // Payloads are names, descriptions (bounded when an export is added) and fixed fields.
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(payload);
}

fn transmission_flags(export: &impl Offered, structured: bool) -> u16 {
    let mut flags = TRANSMISSION_HAS_FLAGS
        | TRANSMISSION_SEND_FLUSH
        | TRANSMISSION_SEND_FUA
        | TRANSMISSION_SEND_TRIM
        | TRANSMISSION_SEND_WRITE_ZEROES
        | TRANSMISSION_SEND_FAST_ZERO
        | TRANSMISSION_SEND_CACHE
        // True by the device's contract: a flush covers every write acknowledged before it, whoever sent it.
        | TRANSMISSION_CAN_MULTI_CONN;
    if export.read_only() {
        flags |= TRANSMISSION_READ_ONLY;
    }
    if structured {
        flags |= TRANSMISSION_SEND_DF;
    }
    flags
}

fn parse_info(body: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut cursor = Cursor(body);
    let name = cursor.string()?;
    let count = cursor.u16()?;
    let wanted = (0..count).map(|_| cursor.u16()).collect::<Option<Vec<u16>>>()?;
    cursor.0.is_empty().then_some((name, wanted))
}

fn parse_meta(body: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut cursor = Cursor(body);
    let name = cursor.string()?;
    let count = cursor.u32()?;
    // Not `with_capacity(count)`: each query takes at least four bytes of a bounded body, the count alone proves nothing.
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(cursor.string()?);
    }
    cursor.0.is_empty().then_some((name, queries))
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn string(&mut self) -> Option<&'a str> {
        let length = self.u32().filter(|length| *length <= NAME_BYTES_MAX)? as usize;
        let (head, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        std::str::from_utf8(head).ok()
    }
}

#[cfg(test)]
#[path = "negotiate_tests.rs"]
mod tests;
