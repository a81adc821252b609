//! What status shows of the export: every connection, its queues and their limits.

use std::sync::atomic::{AtomicU64, Ordering};

use super::connection::{BYTES_IN_FLIGHT_MAX, REQUESTS_IN_FLIGHT_MAX};

/// A queue's fill and its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Limit {
    /// Now.
    pub used: u64,
    /// When this is reached, the connection's socket is not read until there is room.
    pub limit: u64,
}

/// One client's connection.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ConnectionStats {
    /// Number of the connection, unique in its server.
    pub id: u64,
    /// The export's name.
    pub export: String,
    /// The client's address; for a unix socket its process id, where the system tells.
    pub peer: String,
    /// Whether TLS is active.
    pub tls: bool,
    /// Requests that were read and not yet answered by the device.
    pub requests_in_flight: Limit,
    /// Their payload bytes and those of replies not yet sent.
    pub bytes_in_flight: Limit,
    /// Requests answered so far.
    pub requests: u64,
    /// Bytes read from the device for the client.
    pub read_bytes: u64,
    /// Bytes the client wrote.
    pub written_bytes: u64,
}

/// Kept by a connection, read by anybody.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) requests_in_flight: AtomicU64,
    pub(super) bytes_in_flight: AtomicU64,
    pub(super) requests: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
}

impl Counters {
    /// The connection is the only writer, so no read-modify-write is needed.
    pub(super) fn add(counter: &AtomicU64, n: u64) {
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self, id: u64, export: String, peer: String, tls: bool) -> ConnectionStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ConnectionStats {
            id,
            export,
            peer,
            tls,
            requests_in_flight: Limit { used: read(&self.requests_in_flight), limit: REQUESTS_IN_FLIGHT_MAX as u64 },
            bytes_in_flight: Limit { used: read(&self.bytes_in_flight), limit: BYTES_IN_FLIGHT_MAX as u64 },
            requests: read(&self.requests),
            read_bytes: read(&self.read_bytes),
            written_bytes: read(&self.written_bytes),
        }
    }
}
