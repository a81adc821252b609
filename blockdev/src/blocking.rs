//! File I/O that blocks, on a thread that others need.

use std::io;

use tokio::runtime::{Handle, RuntimeFlavor};

/// Runs `work`, which may wait for a disk. On a thread of a runtime with several, what else it has to run goes on elsewhere meanwhile: connections of all
/// groups, and the answers to whoever asks how they are, must not wait for the disk of one of them.
pub fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

/// Runs `work`, which may wait for a disk, beside the thread of the caller; what else that thread has to run goes on meanwhile. Without a runtime, as in a
/// simulation, the caller waits.
///
/// `work` runs to its end also if nobody waits for it any more.
///
/// # Errors
/// `work` panicked, or the runtime is being shut down.
pub async fn offload<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    match Handle::try_current() {
        Ok(runtime) => runtime.spawn_blocking(work).await.map_err(io::Error::other),
        Err(_) => Ok(work()),
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

    /// Would catch work that takes the only thread of an io runtime away from the other disks.
    #[test]
    fn an_io_thread_goes_on_meanwhile() {
        let io = crate::IoThreads::new(1).unwrap();
        let (sender, receiver) = mpsc::channel();
        let waits = || async move {
            let other = tokio::task::spawn_local(async move { sender.send(()) });
            let heard = offload(move || receiver.recv_timeout(Duration::from_secs(60))).await;
            other.await.unwrap().unwrap();
            heard
        };
        io.block_on(waits).unwrap().unwrap().unwrap();
    }
}
