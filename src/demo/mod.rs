//! stub
use crate::cli::DemoArgs;
pub(crate) fn run(_args: &DemoArgs) -> anyhow::Result<()> {
    anyhow::bail!("not yet")
}
