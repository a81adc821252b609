//! The recovery site in one thread, on a disk that loses what was not synced.
//!
//! For tests and for the simulator of both sites: [`Replica`] drives the real core, assembler, worker, journal and superblock
//! through bytes as on the wire; [`SimDisk`] is the disk under it, whose fault model is in `model`. No runtime, no threads, and no
//! clock that anything depends on: the same calls and choices give the same files, up to times of day in headers.
//! Not part of the daemon: behind the feature `simulation`, which is off.

mod disk;
#[cfg(test)]
mod lives;
mod model;
#[cfg(test)]
mod primary;
mod replica;
mod session;
#[cfg(test)]
mod sweep;
#[cfg(test)]
mod tests;

pub use disk::SimDisk;
pub use replica::{Output, Replica, ReplicaError, SessionNo, StreamNo};
