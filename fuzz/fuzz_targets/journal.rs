#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

/// Below TMPDIR, which `make fuzz` sets and clears: libFuzzer ends a process without destructors.
static SCRATCH: LazyLock<PathBuf> = LazyLock::new(|| tempfile::tempdir().expect("a scratch folder").keep());

libfuzzer_sys::fuzz_target!(|data: &[u8]| receiver::fuzzing::journal(&SCRATCH, data));
