//! What both sites must agree on: units, names, wire messages, frames, seals, fencing rules.
//!
//! Pure: no I/O, no clock, no threads, no unsafe. Everything that a peer or a disk hands us is decoded here with its bounds
//! checked before anything is allocated.

#![forbid(unsafe_code)]

pub mod codec;
pub mod congestion;
pub mod control;
pub mod dirty;
pub mod fencing;
pub mod frame;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod handback;
pub mod hashes;
pub mod name;
pub mod pack;
pub mod pass;
pub mod region;
pub mod scrub;
pub mod seal;
pub mod tls;
pub mod transport;
pub mod units;

pub use codec::DecodeError;
pub use control::{CloseCode, Message};
pub use dirty::DirtyMap;
pub use frame::{Codec, Frame, FrameHeader, FrameKind};
pub use hashes::{HashQuery, Hashes};
pub use name::Name;
pub use region::RegionMap;
pub use scrub::{Scrub, ScrubOutcome, ScrubRun, Scrubbed};
pub use seal::Seal;
pub use tls::{Fingerprint, Identity};
pub use units::{BLOCK_BYTES, BlockExtent, BlockIndex, EpochId, Generation, Point, SessionToken, VolumeIndex};
