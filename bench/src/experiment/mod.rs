//! One experiment a file: each returns a [`Report`](crate::report::Report), prints nothing but progress, and leaves nothing behind.

pub(crate) mod compare;
pub(crate) mod dirty_log;
pub(crate) mod drill;
pub(crate) mod failover;
pub(crate) mod first_sync;
pub(crate) mod fork_reads;
pub(crate) mod link;
pub(crate) mod memory;
pub(crate) mod mirror;
pub(crate) mod nbd;
pub(crate) mod points;
pub(crate) mod restart;
pub(crate) mod retention;
pub(crate) mod wire;
