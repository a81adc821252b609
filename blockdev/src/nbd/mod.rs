//! The NBD export: fixed newstyle over unix and TCP sockets, with TLS where configured.
//!
//! From pure to driven: [`wire`] holds the constants of the protocol, [`negotiate`] is the handshake as a state
//! machine without I/O, [`request`] turns a client's request into a valid one or a refusal, [`reply`] encodes answers. [`handshake`]
//! and [`connection`] drive them over a socket, [`execute`] runs valid requests on a device, [`server`] owns
//! listeners, exports and the list of connections.
//!
//! Invariants: only a `ValidRequest` reaches a device; every length from a client is bounded before anything is allocated
//! for it; a reply is sent only after the device is done. The export knows the `BlockDevice` trait and nothing below it.

mod connection;
mod error;
mod execute;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod handshake;
mod inbox;
mod linger;
mod listen;
mod negotiate;
mod outbox;
mod pool;
mod reply;
mod request;
mod server;
mod socket;
mod stats;
mod tls;
mod wire;

pub use error::NbdServerError;
pub use listen::ListenAddr;
pub use server::{Export, NbdServer, ServerOptions};
pub use stats::{ConnectionStats, Limit};
pub use tls::{TlsError, server_config};
