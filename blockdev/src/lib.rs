//! Block devices in user space: the trait every layer of a disk stack implements, the backends at the
//! bottom of a stack (file, memory, fault, delay) and the NBD export at the top.
//!
//! A stack is a composition of one trait: the primary is `Export(Tap(File))`, an activated copy is
//! `Export(Tap(Fork(View)))`. This crate knows nothing of epochs, groups or peers; of the wire it knows the frame, whose blocks it reads and writes.

mod blocking;
mod blocks;
mod buf;
mod crash;
mod delay;
mod device;
mod fault;
mod file;
mod frames;
mod memory;
pub mod nbd;
mod priority;
mod ranges;
mod scan;
pub mod steps;
mod switch;
mod uring;
mod waits;

pub use blocking::{blocking, offload};
pub use blocks::{apply_frame, read_blocks};
pub use buf::Buf;
pub use crash::CrashDevice;
pub use delay::DelayDevice;
pub use device::{BlockDevice, Extent, ExtentKind, IoFuture, ZeroMode};
pub use fault::{Fault, FaultDevice, Operation};
pub use file::{FileDevice, FileError, OpenOptions, UncachedReader};
pub use frames::{ArrivedFrame, FrameReader, FrameStreamError};
pub use memory::MemoryDevice;
pub use priority::{prefer_latency, prefer_throughput, yield_to_others};
pub use ranges::{RangeGuard, RangeLocks};
pub use scan::{Piece, SCAN_PIECE_BYTES, scan};
pub use switch::SwitchDevice;
pub use uring::{IoThreads, SharedFile};
