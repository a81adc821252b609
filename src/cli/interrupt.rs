//! SIGINT and SIGTERM as a wish that is looked at, for commands that have something to put in order first.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

/// Sets `flag` at the first signal. A second one finds the flag set, and changes nothing.
pub(crate) fn cancels(flag: &Arc<AtomicBool>) -> anyhow::Result<()> {
    let flag = Arc::clone(flag);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot watch for signals")?;
    let (mut interrupt, mut terminate) = {
        let _within = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        flag.store(true, Ordering::Relaxed);
    })?;
    Ok(())
}
