//! Shared by the tests that drive the binary.
#![allow(dead_code, reason = "each test file uses its part")]

use std::process::Command;

/// Two keys that look right and belong to nobody.
pub(crate) const KEY_A: &str = "SHA256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
pub(crate) const KEY_B: &str = "SHA256:AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE";

/// The binary under test, without the caller's settings.
pub(crate) fn twinsite() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_twinsite"));
    command.env_remove("TWINSITE_CONFIG").env_remove("RUST_LOG").env_remove("NOTIFY_SOCKET");
    command
}
