//! The recovery site's half of Twinsite: journal, base, views, forks, promotion.
//!
//! A primary's session is decided by `core` and driven by `session`; each group has one thread that writes its journal
//! (`group`, `journal`); readers look through index snapshots (`index`, `view`), and an activated copy writes to an overlay
//! (`fork`). The store's layout and formats are in `docs/journal.md`. Knows nothing of the replicator; the two meet in `proto`.

#![forbid(unsafe_code)]

pub mod adopt;
mod base;
mod batch;
pub mod check;
mod clock;
mod config;
pub mod core;
mod disk;
pub mod drill;
pub mod fork;
mod frames;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod group;
mod handback;
mod hashing;
mod index;
mod input;
pub mod journal;
mod liveness;
mod names;
mod node;
mod pins;
mod receiver;
mod retention;
mod scrub;
mod session;
#[cfg(any(test, feature = "simulation"))]
pub mod sim;
mod spill;
mod status;
mod store;
pub mod superblock;
mod view;

pub use config::{ClientConfig, Limits, ReceiverConfig};
pub use disk::{Disk, Op, Watch};
pub use drill::{Drill, Whole};
pub use fork::{FlattenState, FlattenStatus};
pub use frames::{FRAME_CACHE_BYTES, FrameError, OPEN_SEGMENTS_MAX};
pub use group::{GROUP_QUEUE_MAX, GroupError};
pub use liveness::ALIVE_WITHIN;
pub use names::{NAMES_MAX, NameError};
pub use node::SelectError;
pub use receiver::{Activated, Receiver, ReceiverError};
pub use retention::{Ladder, LadderError, RUNGS_MAX, RetentionStatus, Rung};
pub use spill::SPILL_BYTES_MAX;
pub use status::{ActiveStatus, DrillsStatus, GroupStatus, PeerStatus, PointInfo, QueueStatus, Role, VolumeStatus};
pub use store::{GroupFolder, Store, StoreError};
pub use view::View;
