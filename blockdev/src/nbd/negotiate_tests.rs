//! The handshake's states, message by message.

use super::*;

#[derive(Clone, Debug)]
struct Disk(&'static str);

impl Offered for Disk {
    fn name(&self) -> &str {
        self.0
    }
    fn description(&self) -> &str {
        "a disk"
    }
    fn size(&self) -> u64 {
        1 << 20
    }
    fn read_only(&self) -> bool {
        false
    }
}

struct Disks;

impl Catalog for Disks {
    type Export = Disk;
    fn find(&self, name: &str) -> Option<Disk> {
        ["a", "b"].into_iter().find(|known| *known == name || (name.is_empty() && *known == "a")).map(Disk)
    }
    fn all(&self) -> Vec<Disk> {
        vec![Disk("a"), Disk("b")]
    }
}

/// Sends one option; gives the step and the kinds of the replies.
fn option(state: Negotiation, option: u32, body: &[u8]) -> (Step<Disk>, Vec<u32>) {
    let mut header = OPTION_MAGIC.to_be_bytes().to_vec();
    header.extend_from_slice(&option.to_be_bytes());
    header.extend_from_slice(&(body.len() as u32).to_be_bytes());
    let mut out = Vec::new();
    let mut step = state.advance(&header, &Disks, &mut out).unwrap();
    if let Step::Next(state) = step {
        assert_eq!(state.wants(), body.len());
        step = state.advance(body, &Disks, &mut out).unwrap();
    }
    let mut kinds = Vec::new();
    let mut cursor = Cursor(&out);
    while let Some(magic) = cursor.u64() {
        assert_eq!(magic, OPTION_REPLY_MAGIC);
        assert_eq!(cursor.u32(), Some(option));
        kinds.push(cursor.u32().unwrap());
        let length = cursor.u32().unwrap() as usize;
        cursor.0 = &cursor.0[length..];
    }
    (step, kinds)
}

fn begin(tls: Tls) -> Negotiation {
    let mut out = Vec::new();
    let state = Negotiation::start(tls, &mut out);
    assert_eq!(out, b"NBDMAGICIHAVEOPT\0\x03");
    next(state.advance(&3_u32.to_be_bytes(), &Disks, &mut out).unwrap())
}

fn next(step: Step<Disk>) -> Negotiation {
    match step {
        Step::Next(state) => state,
        other => panic!("expected to go on, got {other:?}"),
    }
}

fn name_then(name: &str, rest: &[u8]) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes(), name.as_bytes(), rest].concat()
}

fn base_allocation(name: &str) -> Vec<u8> {
    name_then(name, &[&1_u32.to_be_bytes()[..], &name_then(BASE_ALLOCATION, &[])].concat())
}

#[test]
fn a_usual_client_gets_structured_replies_and_its_context() {
    let (step, kinds) = option(begin(Tls::Off), OPT_STRUCTURED_REPLY, &[]);
    assert_eq!(kinds, [REP_ACK]);
    let (step, kinds) = option(next(step), OPT_SET_META_CONTEXT, &base_allocation("b"));
    assert_eq!(kinds, [REP_META_CONTEXT, REP_ACK]);
    let (step, kinds) = option(next(step), OPT_GO, &name_then("b", &[0, 1, 0, 2]));
    assert_eq!(kinds, [REP_INFO, REP_INFO, REP_INFO, REP_ACK]);
    let Step::Transmit(agreed) = step else { panic!("{step:?}") };
    assert!(agreed.structured && agreed.base_allocation && agreed.export.0 == "b");
}

#[test]
fn a_context_counts_for_its_own_export_only() {
    let (step, _) = option(begin(Tls::Off), OPT_STRUCTURED_REPLY, &[]);
    let (step, _) = option(next(step), OPT_SET_META_CONTEXT, &base_allocation("a"));
    let (step, _) = option(next(step), OPT_GO, &name_then("b", &[0, 0]));
    let Step::Transmit(agreed) = step else { panic!("{step:?}") };
    assert!(!agreed.base_allocation);
    let (_, kinds) = option(begin(Tls::Off), OPT_SET_META_CONTEXT, &base_allocation("a"));
    assert_eq!(kinds, [REP_ERR_INVALID], "contexts need structured replies");
}

#[test]
fn nothing_happens_before_tls_where_it_is_required() {
    let mut state = begin(Tls::Required);
    for code in [OPT_LIST, OPT_INFO, OPT_GO, OPT_STRUCTURED_REPLY, OPT_SET_META_CONTEXT, OPT_LIST_META_CONTEXT, 77] {
        let (step, kinds) = option(state, code, &name_then("a", &[0, 0]));
        assert_eq!(kinds, [REP_ERR_TLS_REQD], "option {code}");
        state = next(step);
    }
    let (step, kinds) = option(state, OPT_STARTTLS, b"x");
    assert_eq!(kinds, [REP_ERR_INVALID]);
    let (step, kinds) = option(next(step), OPT_STARTTLS, &[]);
    assert_eq!(kinds, [REP_ACK]);
    let Step::StartTls(state) = step else { panic!("{step:?}") };
    let (step, kinds) = option(state, OPT_STARTTLS, &[]);
    assert_eq!(kinds, [REP_ERR_INVALID], "not twice");
    let (step, _) = option(next(step), OPT_GO, &name_then("a", &[0, 0]));
    assert!(matches!(step, Step::Transmit(_)));
}

#[test]
fn tls_is_refused_where_it_is_not_configured() {
    assert_eq!(option(begin(Tls::Off), OPT_STARTTLS, &[]).1, [REP_ERR_POLICY]);
}

#[test]
fn lengths_that_lie_are_refused_and_the_handshake_goes_on() {
    let mut state = begin(Tls::Off);
    for body in [&b""[..], b"\0\0\0\x05ab", b"\xff\xff\xff\xff", b"\0\0\0\x01a\0\x01", b"\0\0\0\x01a\0\0x", b"\0\0\0\x01\xff\0\0"]
    {
        let (step, kinds) = option(state, OPT_GO, body);
        assert_eq!(kinds, [REP_ERR_INVALID], "{body:?}");
        state = next(step);
    }
    let (step, kinds) = option(state, OPT_GO, &name_then("nope", &[0, 0]));
    assert_eq!(kinds, [REP_ERR_UNKNOWN]);
    let (step, kinds) = option(next(step), 4242, b"whatever");
    assert_eq!(kinds, [REP_ERR_UNSUP]);
    let (step, kinds) = option(next(step), OPT_LIST, b"x");
    assert_eq!(kinds, [REP_ERR_INVALID]);
    let (step, kinds) = option(next(step), OPT_LIST, b"");
    assert_eq!(kinds, [REP_SERVER, REP_SERVER, REP_ACK]);
    let (step, kinds) = option(next(step), OPT_ABORT, b"");
    assert_eq!(kinds, [REP_ACK]);
    assert!(matches!(step, Step::Close));
}

#[test]
fn a_huge_option_is_refused_before_its_body_is_read() {
    let mut header = OPTION_MAGIC.to_be_bytes().to_vec();
    header.extend_from_slice(&OPT_GO.to_be_bytes());
    header.extend_from_slice(&u32::MAX.to_be_bytes());
    let mut out = Vec::new();
    assert!(matches!(begin(Tls::Off).advance(&header, &Disks, &mut out), Ok(Step::Close)));
    header[0] = 0;
    assert!(matches!(begin(Tls::Off).advance(&header, &Disks, &mut out), Err(ProtocolError::OptionMagic { .. })));
}

#[test]
fn unknown_client_flags_and_endless_options_end_it() {
    let mut out = Vec::new();
    let state = Negotiation::start(Tls::Off, &mut out);
    assert!(matches!(state.advance(&[0, 0, 0, 4], &Disks, &mut out), Err(ProtocolError::ClientFlags { flags: 4 })));
    let mut state = begin(Tls::Off);
    for _ in 0..OPTIONS_MAX {
        state = next(option(state, 4242, b"").0);
    }
    let mut header = OPTION_MAGIC.to_be_bytes().to_vec();
    header.extend_from_slice(&[0; 8]);
    assert!(matches!(state.advance(&header, &Disks, &mut out), Err(ProtocolError::TooManyOptions)));
}
