//! Io threads and files on io_uring: the only place that names it.
//!
//! Owns: one ring and one single-threaded tokio runtime per io thread ([`IoThreads`]), and the file operations that run
//! on them ([`SharedFile`]). Must not know what a device, an export or a request is.
//!
//! Invariants: memory handed to the kernel is owned by the operation until the kernel is done with it, also when the
//! future that started it is dropped; a thread does not end before its ring is empty.
//!
//! This drives the `io-uring` crate itself instead of `tokio-uring`. Reasons: `tokio-uring` enters the kernel each time its
//! thread is about to sleep, also with nothing to submit, which is one more system call for every request of an
//! export at queue depth 1 (a ping-pong of 4 KiB over a unix socket ran at 0.90 of plain tokio's rate, median of six
//! interleaved rounds); it submits nothing while the thread keeps busy; and its files own their descriptor per
//! thread, so one file shared by several threads would need a cache of duplicates that keeps locks and space alive
//! after the last user is gone.

mod ring;
mod shared_file;
mod threads;
mod watch;

pub use shared_file::SharedFile;
pub use threads::IoThreads;

pub(crate) use ring::submit_pending;
pub(crate) use watch::watch_owned;
