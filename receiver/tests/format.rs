//! Holds the byte tables of `docs/journal.md` against the layout constants.

type Row = (usize, usize, String);

/// The rows of `<!-- table: NAME -->`.
fn table(text: &str, name: &str) -> Vec<Row> {
    let begin = format!("<!-- table: {name} -->");
    let (_, rest) = text.split_once(&begin).unwrap_or_else(|| panic!("no table {name}"));
    let (body, _) = rest.split_once("<!-- end -->").expect("a table has an end");
    let rows = body.lines().filter_map(|line| {
        let cells: Vec<&str> = line.trim().trim_matches('|').split('|').map(str::trim).collect();
        let [offset, bytes, field] = cells.as_slice() else { return None };
        Some((offset.parse().ok()?, bytes.parse().ok()?, (*field).to_owned()))
    });
    rows.collect()
}

fn code(layout: &[(usize, usize, &str)]) -> Vec<Row> {
    layout.iter().map(|(o, b, f)| (*o, *b, (*f).to_owned())).collect()
}

#[test]
fn the_tables_of_the_document_are_the_layouts_of_the_code() {
    let text = include_str!("../../docs/journal.md");
    use receiver::{drill, fork, journal, superblock};
    assert_eq!(table(text, "superblock"), code(superblock::layout::SLOT));
    assert_eq!(table(text, "volume"), code(superblock::layout::VOLUME));
    assert_eq!(table(text, "superblock tail"), code(superblock::layout::TAIL));
    assert_eq!(table(text, "segment"), code(journal::layout::SEGMENT));
    assert_eq!(table(text, "seal in the journal"), code(journal::layout::PLACED_SEAL));
    assert_eq!(table(text, "fork map"), code(fork::layout::MAP));
    assert_eq!(table(text, "drill result"), code(drill::layout::ENTRY));
    let facts = [
        format!("Two slots of {} bytes", superblock::SLOT_BYTES),
        format!("up to offset {}", superblock::VOLUMES_AT),
        format!("{} bytes a volume", superblock::VOLUME_ENTRY_BYTES),
        format!("A header of {} bytes", journal::SEGMENT_HEADER_BYTES),
        format!("`{}`", String::from_utf8_lossy(&superblock::SLOT_MAGIC)),
        format!("`{}`", String::from_utf8_lossy(&journal::SEGMENT_MAGIC)),
        format!("`{}`", String::from_utf8_lossy(&fork::MAP_MAGIC)),
        format!("`{}`", String::from_utf8_lossy(&drill::RESULTS_MAGIC)),
        format!("at most {})", drill::RESULTS_MAX),
        format!("script (at most {} bytes)", drill::SCRIPT_BYTES_MAX),
        format!("remark (at most {} bytes)", drill::REMARK_BYTES_MAX),
        format!("output (at most {} bytes)", drill::OUTPUT_BYTES_MAX),
        format!("Bits begin at offset {}", fork::MAP_HEADER_BYTES),
        format!("in pages of {} bytes", fork::MAP_PAGE_BYTES),
    ];
    for fact in facts {
        assert!(text.contains(&fact), "the document does not say {fact:?}");
    }
}
