//! QUIC transport settings that both sites share: windows, streams, timeouts.

use std::sync::Arc;
use std::time::Duration;

use quinn_proto::{MtuDiscoveryConfig, TransportConfig, VarInt};

use crate::congestion::TolerantConfig;

/// A silent peer is given up after this long. Replication resumes on a new connection, so the price of giving up early is low.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval of keep-alives; also how fast a dead path is noticed when nothing is being sent.
pub const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Bytes a receiver buffers for one connection that its journal has not taken yet. When full, the primary's pass waits
/// (QUIC flow control) and its current epoch grows.
pub const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Bytes a sender keeps for one connection until they are acknowledged. When full, the pass waits.
pub const SEND_WINDOW_BYTES: u64 = 16 << 20;
/// Bytes asked of the kernel for each direction of a QUIC socket: at 1 Gbit/s, what arrives in 30 ms while the process does not run.
/// The system's limits (`net.core.rmem_max`, `wmem_max`) hold; with the usual default of 208 KiB datagrams are lost and sent again.
pub const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// Largest UDP payload that is tried and accepted: what fits a 9000-byte Ethernet frame. Path MTU discovery finds out what passes.
pub const UDP_PAYLOAD_BYTES_MAX: u16 = 8952;
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
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(UDP_PAYLOAD_BYTES_MAX);
    let (bidi, uni) = if accepts_streams { (1, PASS_STREAMS_MAX) } else { (0, 0) };
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(bidi))
        .max_concurrent_uni_streams(VarInt::from_u32(uni))
        .stream_receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .send_window(SEND_WINDOW_BYTES)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(Some(mtu))
        .congestion_controller_factory(Arc::new(TolerantConfig::default()))
        .max_idle_timeout(Some(IDLE_TIMEOUT.try_into().expect("ten seconds fit")));
    config
}
