//! `docs/wire.md` and the code say the same: every byte table is compared field by field.

#![allow(clippy::unwrap_used, reason = "a test")]

use proto::{frame, pass, seal};

fn table(document: &str, name: &str) -> Vec<(usize, usize, String)> {
    let marker = format!("<!-- table: {name} -->");
    let (_, rest) = document.split_once(&marker).unwrap_or_else(|| panic!("docs/wire.md has no {marker}"));
    rest.lines()
        .skip_while(|l| !l.starts_with('|'))
        .take_while(|l| l.starts_with('|'))
        .skip(2)
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            (cells[0].parse().unwrap(), cells[1].parse().unwrap(), cells[2].to_owned())
        })
        .collect()
}

#[test]
fn the_byte_tables_are_the_codes() {
    let document = include_str!("../../docs/wire.md");
    for (name, layout) in [
        ("pass", pass::layout::PASS),
        ("frame", frame::layout::FRAME),
        ("extent", frame::layout::EXTENT),
        ("seal", seal::layout::SEAL),
    ] {
        let expected: Vec<_> = layout.iter().map(|(o, b, f)| (*o, *b, (*f).to_owned())).collect();
        assert_eq!(table(document, name), expected, "table {name}");
    }
}

/// Distinct field values land at the documented offsets.
#[test]
fn the_encoders_follow_the_tables() {
    let (epoch, kind) = (proto::EpochId(0x0102_0304_0506_0708), pass::PassKind::Frozen);
    let header = pass::PassHeader { epoch, pass: 0x0a0b, kind, continued: true };
    let bytes = header.encode();
    assert_eq!(bytes[4..12], 0x0102_0304_0506_0708_u64.to_le_bytes());
    assert_eq!(bytes[12..14], 0x0a0b_u16.to_le_bytes());
    assert_eq!(bytes[14..16], [2, 1]);
    let extent = proto::BlockExtent { start: proto::BlockIndex(0x11), blocks: 0x22 };
    let zero = frame::encode_zero(proto::VolumeIndex(0x33), proto::EpochId(0x44), 0x55, &[extent]);
    assert_eq!((zero[6], zero[8], zero[16], zero[18]), (0x33, 0x44, 0x55, 1));
    assert_eq!((zero[40], zero[48]), (0x11, 0x22));
}
