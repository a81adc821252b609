//! File I/O that blocks, on a thread that others need.

use tokio::runtime::{Handle, RuntimeFlavor};

/// Runs `work`, which may wait for a disk. On a thread of a runtime with several, what else it has to run goes on elsewhere meanwhile: connections of all
/// groups, and the answers to whoever asks how they are, must not wait for the disk of one of them.
pub fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// Would catch a wait that takes the only thread away from the others.
    #[test]
    fn others_go_on_meanwhile() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let (sender, receiver) = mpsc::channel();
        let waits = runtime.spawn(async move {
            let other = tokio::spawn(async move { sender.send(()) });
            let heard = blocking(|| receiver.recv_timeout(Duration::from_secs(60)));
            other.await.unwrap().unwrap();
            heard
        });
        runtime.block_on(waits).unwrap().unwrap();
        assert_eq!(blocking(|| 7), 7, "and without a runtime");
        let single = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert_eq!(single.block_on(async { blocking(|| 8) }), 8);
    }
}
