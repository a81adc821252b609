//! The primary's half of Twinsite: a tap on every guest disk, dirty maps, cuts, capture, and the sender.
//!
//! It knows nothing of the receiver's store; the two meet in `proto` only.

#![forbid(unsafe_code)]
#![allow(missing_debug_implementations, reason = "devices and sockets have nothing to show")]

mod spec;
mod status;

pub use spec::{GroupSpec, INTERVAL_MAX, INTERVAL_MIN, PeerSpec, Tuning, VolumeSpec};
pub use status::{GroupStatus, LagSummary, LinkState, PassProgress, QueueStatus, VolumeStatus};
