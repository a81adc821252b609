//! Drives the handshake over a socket. Reads exactly what the state machine wants, so nothing a client sent before TLS can be
//! taken for something sent inside of it.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;

use super::error::{ConnectionError, ProtocolError};
use super::negotiate::{Agreement, Catalog, Negotiation, Step, Tls};
use super::socket::{Socket, Stream};

/// `None`: the client asked for no more than information, or left.
pub(super) async fn handshake<C: Catalog>(
    socket: Socket,
    tls: Option<&Arc<rustls::ServerConfig>>,
    catalog: &C,
) -> Result<Option<(Stream, Agreement<C::Export>)>, ConnectionError> {
    let mut stream = Stream::Plain(socket);
    let mut out = Vec::new();
    let mut state = Negotiation::start(if tls.is_some() { Tls::Required } else { Tls::Off }, &mut out);
    let mut input = Vec::new();
    loop {
        stream.write_all(&out).await?;
        stream.flush().await?;
        out.clear();
        input.resize(state.wants(), 0);
        match stream.read_exact(&mut input).await {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        match state.advance(&input, catalog, &mut out)? {
            Step::Next(next) => state = next,
            Step::StartTls(next) => {
                stream.write_all(&out).await?;
                out.clear();
                let (Stream::Plain(socket), Some(config)) = (stream, tls) else {
                    return Err(ProtocolError::ExportNameRefused.into());
                };
                let accepted = TlsAcceptor::from(Arc::clone(config)).accept(socket).await;
                stream = Stream::Tls(Box::new(accepted.map_err(ConnectionError::Tls)?));
                state = next;
            }
            Step::Transmit(agreement) => {
                stream.write_all(&out).await?;
                stream.flush().await?;
                return Ok(Some((stream, agreement)));
            }
            Step::Close => {
                stream.write_all(&out).await?;
                stream.shutdown().await?;
                return Ok(None);
            }
        }
    }
}
