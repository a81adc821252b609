//! What the fuzz targets `nbd_options` and `nbd_requests` do with their input: a client's bytes against the state machines, beside
//! a second, slower opinion of what must come out.
//!
//! Called by `fuzz/` and by the replay of the corpus (`tests/corpus.rs`). A broken promise is a panic.

use super::error::ProtocolError;
use super::negotiate::{Agreement, Catalog, Negotiation, Offered, Step, Tls};
use super::request::{RawRequest, Terms, ValidRequest};
use super::wire::*;

#[derive(Clone, Debug)]
struct Disk {
    name: &'static str,
    read_only: bool,
}

impl Offered for Disk {
    fn name(&self) -> &str {
        self.name
    }
    fn description(&self) -> &str {
        if self.read_only { "" } else { "a disk" }
    }
    fn size(&self) -> u64 {
        1 << 20
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
}

const DISKS: [Disk; 2] = [Disk { name: "a", read_only: false }, Disk { name: "disk é", read_only: true }];

struct Disks;

impl Catalog for Disks {
    type Export = Disk;
    fn find(&self, name: &str) -> Option<Disk> {
        DISKS.into_iter().find(|disk| disk.name == name || name.is_empty())
    }
    fn all(&self) -> Vec<Disk> {
        DISKS.to_vec()
    }
}

/// What the client may count on, kept beside the state machine.
#[derive(Debug)]
struct Client {
    tls: Tls,
    no_zeroes: bool,
    structured: bool,
    /// A context was selected since TLS began.
    context: bool,
    options: u32,
}

/// The handshake, with everything a client may send after connecting. The first byte says whether TLS is required.
///
/// # Panics
/// When a promise of the handshake is broken.
pub fn nbd_options(data: &[u8]) {
    let Some((first, mut left)) = data.split_first() else { return };
    let tls = if first % 2 == 0 { Tls::Off } else { Tls::Required };
    let mut client = Client { tls, no_zeroes: false, structured: false, context: false, options: 0 };
    let mut out = Vec::new();
    let mut state = Negotiation::start(tls, &mut out);
    assert_eq!(out, b"NBDMAGICIHAVEOPT\0\x03");
    loop {
        let wants = state.wants();
        assert!(wants <= OPTION_BYTES_MAX as usize, "{wants} bytes");
        let Some((input, rest)) = left.split_at_checked(wants) else { return };
        left = rest;
        out.clear();
        let option = match &state {
            Negotiation::ClientFlags { .. } => {
                client.no_zeroes = input.get(3).is_some_and(|b| b & 2 != 0);
                None
            }
            Negotiation::OptionHeader(_) => {
                client.options += 1;
                assert!(client.options <= OPTIONS_MAX + 1);
                None
            }
            Negotiation::OptionBody { option, .. } => Some(*option),
        };
        let Ok(step) = state.advance(input, &Disks, &mut out) else {
            assert!(out.is_empty(), "a client that is cut off is told nothing more");
            return;
        };
        if let Some(option) = option {
            client.answered(option, input, &step, &out);
        }
        match step {
            Step::Next(next) | Step::StartTls(next) => state = next,
            Step::Transmit(agreement) => return client.transmits(&agreement),
            Step::Close => return,
        }
    }
}

impl Client {
    /// Looks at what an option led to.
    fn answered(&mut self, option: u32, body: &[u8], step: &Step<Disk>, out: &[u8]) {
        if option == OPT_EXPORT_NAME {
            assert!(matches!(step, Step::Transmit(_)));
            assert_ne!(self.tls, Tls::Required);
            assert_eq!(out.len(), if self.no_zeroes { 10 } else { 134 });
            return;
        }
        let replies = replies(option, out);
        let (last, infos) = replies.split_last().expect("every option is answered");
        let refused = last.0 & (1 << 31) != 0;
        assert!(refused || last.0 == REP_ACK, "an answer ends with an acknowledgement or an error");
        assert!(infos.is_empty() || !refused, "an error comes alone");
        assert!(infos.iter().all(|(kind, _)| matches!(*kind, REP_SERVER | REP_INFO | REP_META_CONTEXT)));
        if self.tls == Tls::Required && !matches!(option, OPT_STARTTLS | OPT_ABORT) {
            assert_eq!(last.0, REP_ERR_TLS_REQD);
        }
        match (option, step) {
            (OPT_STARTTLS, Step::StartTls(_)) => {
                assert!(self.tls == Tls::Required && !refused && body.is_empty());
                (self.tls, self.structured, self.context) = (Tls::Active, false, false);
            }
            (_, Step::StartTls(_)) => panic!("TLS starts by its own option only"),
            (OPT_GO, Step::Transmit(_)) => assert!(!refused && self.tls != Tls::Required),
            (_, Step::Transmit(_)) => panic!("option {option:#x} led to the data phase"),
            (OPT_GO, _) => assert!(refused, "an agreed GO is the end of the handshake"),
            (OPT_ABORT, step) => assert!(matches!(step, Step::Close)),
            (OPT_STRUCTURED_REPLY, _) if !refused => self.structured = true,
            (OPT_SET_META_CONTEXT, _) => self.context = !infos.is_empty(),
            _ => {}
        }
        if matches!(option, OPT_SET_META_CONTEXT | OPT_LIST_META_CONTEXT) && !refused {
            assert!(self.structured, "contexts need structured replies");
        }
    }

    fn transmits(&self, agreement: &Agreement<Disk>) {
        assert_ne!(self.tls, Tls::Required);
        assert!(DISKS.iter().any(|disk| disk.name == agreement.export.name));
        assert_eq!(agreement.structured, self.structured);
        assert!(!agreement.base_allocation || (self.structured && self.context));
    }
}

/// Takes the replies to `option` apart: kinds and payloads.
fn replies(option: u32, mut out: &[u8]) -> Vec<(u32, &[u8])> {
    let mut found = Vec::new();
    while let Some((head, rest)) = out.split_first_chunk::<20>() {
        let number = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        assert_eq!(head[..8], OPTION_REPLY_MAGIC.to_be_bytes());
        assert_eq!(number(8), option);
        let (payload, rest) = rest.split_at_checked(number(16) as usize).expect("a reply is whole");
        found.push((number(12), payload));
        out = rest;
    }
    assert!(out.is_empty());
    found
}

/// Requests one after the other, under terms from the first ten bytes.
///
/// # Panics
/// When a request that no device may see is found valid, or a good one is refused.
pub fn nbd_requests(data: &[u8]) {
    let Some((head, requests)) = data.split_first_chunk::<10>() else { return };
    let [flags, shift, size @ ..] = *head;
    let structured = flags & 1 != 0;
    let terms = Terms {
        // Small sizes as likely as large ones.
        size: u64::from_be_bytes(size) >> (shift % 64),
        read_only: flags & 2 != 0,
        structured,
        base_allocation: structured && flags & 4 != 0,
    };
    for bytes in requests.chunks_exact(REQUEST_BYTES) {
        let Some(mut bytes) = bytes.first_chunk::<REQUEST_BYTES>().copied() else { return };
        if flags & 8 == 0 {
            bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        }
        match RawRequest::parse(&bytes) {
            Ok(raw) => {
                request(&raw, &terms);
                // The same at the very end of the device, and one byte beyond: inputs hit these by chance too seldom.
                let last = terms.size.saturating_sub(raw.length.into());
                request(&RawRequest { offset: last, ..raw }, &terms);
                request(&RawRequest { offset: last.saturating_add(1), ..raw }, &terms);
            }
            Err(error) => {
                assert!(matches!(error, ProtocolError::RequestMagic { found } if found.to_be_bytes() == bytes[..4]));
                return;
            }
        }
    }
}

fn request(raw: &RawRequest, terms: &Terms) {
    match raw.payload_bytes() {
        Ok(bytes) => {
            assert!(bytes <= PAYLOAD_BYTES_MAX);
            assert_eq!(bytes, if raw.command == CMD_WRITE { raw.length } else { 0 });
        }
        Err(error) => {
            assert!(raw.command == CMD_WRITE && raw.length > PAYLOAD_BYTES_MAX, "{error}");
            return;
        }
    }
    let found = raw.validate(terms);
    assert_eq!(found.is_ok(), fits(raw, terms), "{raw:?} under {terms:?}: {found:?}");
    let Ok(valid) = found else { return };
    let (command, offset, length, fua) = match valid {
        ValidRequest::Read { offset, length, fragment } => {
            assert!(length <= PAYLOAD_BYTES_MAX && (terms.structured || !fragment));
            (CMD_READ, offset, length, false)
        }
        ValidRequest::Write { offset, length, fua } => (CMD_WRITE, offset, length, fua),
        ValidRequest::Trim { offset, length, fua } => (CMD_TRIM, offset, length, fua),
        ValidRequest::WriteZeroes { offset, length, fua, .. } => (CMD_WRITE_ZEROES, offset, length, fua),
        ValidRequest::Cache { offset, length } => (CMD_CACHE, offset, length, false),
        ValidRequest::BlockStatus { offset, length, .. } => {
            assert!(terms.base_allocation && length > 0);
            (CMD_BLOCK_STATUS, offset, length, false)
        }
        ValidRequest::Flush => return assert_eq!((raw.command, raw.offset, raw.length), (CMD_FLUSH, 0, 0)),
        ValidRequest::Disconnect => return assert_eq!(raw.command, CMD_DISC),
    };
    assert_eq!((command, offset, length), (raw.command, raw.offset, raw.length));
    assert!(u128::from(offset) + u128::from(length) <= u128::from(terms.size), "{valid:?} of {} bytes", terms.size);
    let changes = matches!(command, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES);
    assert!(!(changes && terms.read_only));
    assert_eq!(fua, changes && raw.flags & CMD_FLAG_FUA != 0, "what was to be durable at once is");
}

/// Whether a device may see the request, said the other way round.
fn fits(raw: &RawRequest, terms: &Terms) -> bool {
    let known = match raw.command {
        CMD_READ => CMD_FLAG_FUA | if terms.structured { CMD_FLAG_DF } else { 0 },
        CMD_WRITE_ZEROES => CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
        CMD_BLOCK_STATUS => CMD_FLAG_FUA | CMD_FLAG_REQ_ONE,
        CMD_WRITE | CMD_DISC | CMD_FLUSH | CMD_TRIM | CMD_CACHE => CMD_FLAG_FUA,
        _ => return false,
    };
    let inside = u128::from(raw.offset) + u128::from(raw.length) <= u128::from(terms.size);
    raw.flags & !known == 0
        && match raw.command {
            CMD_READ => inside && raw.length <= PAYLOAD_BYTES_MAX,
            CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES => inside && !terms.read_only,
            CMD_CACHE => inside,
            CMD_BLOCK_STATUS => inside && raw.length > 0 && terms.base_allocation,
            CMD_FLUSH => (raw.offset, raw.length) == (0, 0),
            _ => true,
        }
}
