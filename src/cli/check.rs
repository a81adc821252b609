//! `twinsite check`: verifies a store offline.

use std::path::Path;

use anyhow::bail;

pub(crate) fn run(_store: &Path, _json: bool) -> anyhow::Result<()> {
    bail!("check is not part of this build yet")
}
