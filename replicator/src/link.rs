//! The QUIC connection to a receiver, and what its failures mean to a person.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use proto::control::{CloseCode, Message};
use proto::{DecodeError, Fingerprint, Identity, transport};
use quinn::{ClientConfig, ConnectError, Connection, ConnectionError, Endpoint, RecvStream};

use crate::spec::PeerSpec;

/// How long a connection attempt may take in all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The name in the handshake. Sides are known by their keys, so it names nobody.
const SERVER_NAME: &str = "twinsite";
/// QUIC codes of TLS alerts start here (RFC 9001, section 4.8).
const TLS_ALERT_BASE: u64 = 0x100;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("peer {address}: the name does not resolve ({source}); check `peer`")]
    Resolve { address: String, source: std::io::Error },
    #[error("peer {address}: the name has no address; check `peer`")]
    NoAddress { address: String },
    #[error("cannot open a UDP socket: {0}")]
    Socket(#[source] std::io::Error),
    #[error("peer {address}: {source}")]
    Connect { address: String, source: ConnectError },
    #[error("peer {address}: no answer within {} s; check the address, its UDP port and the firewalls between", CONNECT_TIMEOUT.as_secs())]
    Timeout { address: String },
    #[error("peer {address} does not know our key {ours}; add it there as a [[receiver.client]]")]
    RefusedUs { address: String, ours: Fingerprint },
    #[error("peer {address} shows another key than the pinned {pinned}; compare with `twinsite id` there")]
    WrongKey { address: String, pinned: Fingerprint },
    #[error("the connection to {address} broke: {source}")]
    Broken { address: String, source: ConnectionError },
    #[error("the key cannot be used: {0}")]
    Identity(#[from] proto::tls::IdentityError),
}

impl LinkError {
    /// Whether trying again unchanged cannot help.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, Self::RefusedUs { .. } | Self::WrongKey { .. })
    }
}

/// What connecting needs.
pub(crate) struct Link {
    pub(crate) peer: PeerSpec,
    pub(crate) identity: Identity,
}

impl Link {
    /// Connects; the connection's peer has proved to own the pinned key.
    ///
    /// # Errors
    /// [`LinkError`].
    pub(crate) async fn connect(&self) -> Result<(Endpoint, Connection), LinkError> {
        self.connect_with(transport::settings(false)).await
    }

    /// As [`Self::connect`], for a conversation in which the receiver sends passes.
    ///
    /// # Errors
    /// [`LinkError`].
    pub(crate) async fn connect_for_handback(&self) -> Result<(Endpoint, Connection), LinkError> {
        self.connect_with(transport::settings(true)).await
    }

    async fn connect_with(&self, settings: quinn::TransportConfig) -> Result<(Endpoint, Connection), LinkError> {
        let address = self.peer.address.clone();
        let remote = resolve(&address).await?;
        let local = match remote {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        let socket = UdpSocket::bind(local).map_err(LinkError::Socket)?;
        enlarge_buffers(&socket);
        let mut endpoint = Endpoint::new(self.identity.quic_endpoint(), None, socket, Arc::new(quinn::TokioRuntime))
            .map_err(LinkError::Socket)?;
        let mut config = ClientConfig::new(Arc::new(self.identity.quic_client(self.peer.key)?));
        config.transport_config(Arc::new(settings));
        endpoint.set_default_client_config(config);
        let connecting =
            endpoint.connect(remote, SERVER_NAME).map_err(|source| LinkError::Connect { address: address.clone(), source })?;
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => Ok((endpoint, connection)),
            Ok(Err(error)) => Err(self.explain(error)),
            Err(_) => Err(LinkError::Timeout { address }),
        }
    }

    /// What the end of a connection means.
    pub(crate) fn explain(&self, error: ConnectionError) -> LinkError {
        let address = self.peer.address.clone();
        match error {
            ConnectionError::TimedOut => LinkError::Timeout { address },
            // An alert that we raised: their key. An alert that they raised: ours.
            ConnectionError::TransportError(e) if is_alert(e.code) => LinkError::WrongKey { address, pinned: self.peer.key },
            ConnectionError::ConnectionClosed(ref e) if is_alert(e.error_code) => {
                LinkError::RefusedUs { address, ours: self.identity.fingerprint() }
            }
            source => LinkError::Broken { address, source },
        }
    }
}

/// Asks for larger socket buffers; less than asked for costs speed only.
fn enlarge_buffers(socket: &UdpSocket) {
    let bytes = transport::SOCKET_BUFFER_BYTES;
    let receive = rustix::net::sockopt::set_socket_recv_buffer_size(socket, bytes);
    let send = rustix::net::sockopt::set_socket_send_buffer_size(socket, bytes);
    if let Err(error) = receive.and(send) {
        tracing::debug!(%error, "socket buffers keep their size");
    }
}

fn is_alert(code: quinn::TransportErrorCode) -> bool {
    (TLS_ALERT_BASE..TLS_ALERT_BASE + 0x100).contains(&u64::from(code))
}

async fn resolve(address: &str) -> Result<SocketAddr, LinkError> {
    let mut found =
        tokio::net::lookup_host(address).await.map_err(|source| LinkError::Resolve { address: address.to_owned(), source })?;
    found.next().ok_or_else(|| LinkError::NoAddress { address: address.to_owned() })
}

/// Why the control stream cannot be read on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("the receiver sent what is no message: {0}")]
    Decode(#[from] DecodeError),
    #[error("the control stream ended")]
    Ended,
}

/// The next message of the control stream.
///
/// # Errors
/// [`ControlError`].
pub(crate) async fn read_message(stream: &mut RecvStream) -> Result<Message, ControlError> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await.map_err(|_| ControlError::Ended)?;
    let mut body = vec![0; Message::check_length(prefix)?];
    stream.read_exact(&mut body).await.map_err(|_| ControlError::Ended)?;
    Ok(Message::decode(&body)?)
}

/// Ends a connection with a reason for the other side's log.
pub(crate) fn close(connection: &Connection, code: CloseCode, reason: &str) {
    connection.close(quinn::VarInt::from_u32(u32::from(code as u16)), reason.as_bytes());
}
