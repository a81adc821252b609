//! QUIC transport settings that both sites share: windows, streams, timeouts.

use std::time::Duration;

use quinn_proto::{TransportConfig, VarInt};

/// A silent peer is given up after this long. Replication resumes on a new connection, so the price of giving up early is low.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval of keep-alives; also how fast a dead path is noticed when nothing is being sent.
pub const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Bytes a receiver buffers for one connection that its journal has not taken yet. When full, the primary's pass waits
/// (QUIC flow control) and its current epoch grows.
pub const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Bytes a sender keeps for one connection until they are acknowledged. When full, the pass waits.
pub const SEND_WINDOW_BYTES: u64 = 16 << 20;
/// Pass streams open at once; at most one is being sent, the others wait to be read.
pub const PASS_STREAMS_MAX: u32 = 64;

/// The settings of either side. A primary accepts no streams at all; a receiver accepts one control stream and
/// [`PASS_STREAMS_MAX`] passes. Nobody sends datagrams.
///
/// # Panics
/// Never: the constants fit QUIC's integers.
#[must_use]
pub fn settings(accepts_streams: bool) -> TransportConfig {
    let mut config = TransportConfig::default();
    let (bidi, uni) = if accepts_streams { (1, PASS_STREAMS_MAX) } else { (0, 0) };
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(bidi))
        .max_concurrent_uni_streams(VarInt::from_u32(uni))
        .stream_receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .send_window(SEND_WINDOW_BYTES)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(Some(IDLE_TIMEOUT.try_into().expect("ten seconds fit")));
    config
}
