//! What the fuzz target `config` does with its input. The configuration is a module of the binary, so the target and the replay of
//! the corpus (`tests/corpus.rs`) each compile it into themselves.

#[allow(dead_code, unreachable_pub, unused_imports, clippy::unwrap_used, reason = "the binary uses the rest of it")]
#[path = "../src/config/mod.rs"]
mod config;

use std::collections::BTreeSet;
use std::path::Path;

use config::{Config, ConfigErrors};

/// Not relative: what is found must not depend on the folder in which it is found.
const FILE: &str = "/etc/twinsite/twinsite.toml";

/// Any text as `twinsite.toml`.
pub(crate) fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Config::parse(Path::new(FILE), text) {
        Ok(config) => accepted(&config),
        Err(errors) => refused(&errors, text),
    }
}

fn accepted(config: &Config) {
    let mut groups = BTreeSet::new();
    for group in &config.groups {
        assert!(groups.insert(&group.name), "group {} twice", group.name);
        assert!((replicator::INTERVAL_MIN..=replicator::INTERVAL_MAX).contains(&group.interval));
        assert!((1..=64).contains(&group.epochs_in_flight) && !group.disks.is_empty());
        let mut disks = BTreeSet::new();
        for disk in &group.disks {
            assert!(disks.insert(&disk.name), "disk {} twice", disk.name);
            assert!(disk.path.is_absolute());
        }
    }
    if let Some(receiver) = &config.receiver {
        assert!(receiver.store.is_absolute());
        let names: BTreeSet<_> = receiver.clients.iter().map(|c| &c.name).collect();
        let keys: BTreeSet<_> = receiver.clients.iter().map(|c| c.key).collect();
        assert!(names.len() == receiver.clients.len() && keys.len() == receiver.clients.len());
        assert!(receiver.clients.iter().all(|c| c.groups.as_ref().is_none_or(|g| !g.is_empty())));
    }
    assert!((1..=64).contains(&config.node.io_threads) && config.node.control.as_os_str().len() > 1);
}

/// Every mistake is one line that names the line of the file.
fn refused(errors: &ConfigErrors, text: &str) {
    assert!(!errors.0.is_empty(), "refused without a reason");
    let lines = 1 + text.bytes().filter(|b| *b == b'\n').count();
    let mut last = 0;
    for error in &errors.0 {
        let (line, said) = (error.line(), error.to_string());
        assert!((1..=lines).contains(&line), "{said}: line {line} of {lines}");
        assert!(line >= last, "in the order of the lines");
        last = line;
        assert!(said.starts_with(&format!("{FILE}:{line}: ")), "{said}");
        assert!(!said.contains(|c: char| c.is_control()), "more than a line: {said:?}");
    }
}
