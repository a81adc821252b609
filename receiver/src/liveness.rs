//! When a group's primary was heard from last: a failover while it lives would make a second writer.
//!
//! Always holds: the primary counts as alive for [`ALIVE_WITHIN`] after the last packet of its session, unless it took leave. Whether
//! the session is still open says nothing: a machine that lost its power keeps one until QUIC gives it up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proto::CloseCode;
use proto::control::LEAVE_REASON;
use quinn::{Connection, ConnectionError, VarInt};
use tokio::task::JoinHandle;

use crate::group::Shared;

/// So long after the last packet from it a primary counts as alive. Both sides send a keep-alive every 2 s at least, so this is
/// more than two that got lost.
pub const ALIVE_WITHIN: Duration = Duration::from_secs(5);
/// How often a session's packets are looked at; by so much the age may be too small.
const LOOK_EVERY: Duration = Duration::from_millis(250);

const _: () = assert!(ALIVE_WITHIN.as_millis() > 2 * proto::transport::KEEP_ALIVE.as_millis() + LOOK_EVERY.as_millis());

/// The last sign of life of a group's primary since the node was started.
#[derive(Debug, Default)]
pub(crate) struct Heard(Mutex<Option<Instant>>);

impl Heard {
    fn note(&self) {
        *self.0.lock() = Some(Instant::now());
    }

    /// It took leave: its guests are off its exports, and what they wrote is committed or known to it.
    pub(crate) fn took_leave(&self) {
        *self.0.lock() = None;
    }

    /// How long ago that was; `None` if there was none, or it took leave.
    pub(crate) fn age(&self) -> Option<Duration> {
        self.0.lock().map(|at| at.elapsed())
    }
}

/// Listens for as long as it is kept.
#[derive(Debug)]
pub(crate) struct Listening(JoinHandle<()>);

impl Listening {
    pub(crate) fn to(connection: Connection, shared: Arc<Shared>) -> Self {
        Self(tokio::spawn(listen(connection, shared)))
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // It holds the connection, which ends with its last holder.
        self.0.abort();
    }
}

async fn listen(connection: Connection, shared: Arc<Shared>) {
    shared.heard.note();
    let mut seen = connection.stats().udp_rx.datagrams;
    loop {
        tokio::select! {
            biased;
            end = connection.closed() => {
                if is_leave(&end) {
                    shared.heard.took_leave();
                }
                return;
            }
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        let now = connection.stats().udp_rx.datagrams;
        if now != seen {
            seen = now;
            shared.heard.note();
        }
    }
}

/// Whether that is how a primary takes leave.
pub(crate) fn is_leave(end: &ConnectionError) -> bool {
    let stopping = VarInt::from_u32(CloseCode::Stopping as u32);
    matches!(end, ConnectionError::ApplicationClosed(close)
        if close.error_code == stopping && close.reason == LEAVE_REASON.as_bytes())
}
