//! The other side, played by a test: it speaks the protocol as a node of another build would.

use std::collections::BTreeSet;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use proto::control::{Hello, VolumeHello};
use proto::{EpochId, Generation, Identity, Message, transport};
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use tokio::runtime::Runtime;

/// Nothing on loopback takes this long, unless it hangs.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

fn identity() -> Identity {
    Identity::from_pem(&Identity::generate_pem().expect("a key")).expect("a key")
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

async fn within<T>(what: &str, done: impl Future<Output = T>) -> T {
    tokio::time::timeout(ANSWER_WITHIN, done).await.unwrap_or_else(|_| panic!("{what}: not within {ANSWER_WITHIN:?}"))
}

async fn hear(stream: &mut RecvStream) -> Option<Message> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await.ok()?;
    let mut body = vec![0; Message::check_length(prefix).ok()?];
    stream.read_exact(&mut body).await.ok()?;
    Message::decode(&body).ok()
}

/// A receiver that gives every hello one answer.
#[derive(Debug)]
pub(crate) struct FalseReceiver {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// Its key, for `peer_key`.
    pub(crate) key: String,
    _runtime: Runtime,
}

impl FalseReceiver {
    /// Lets the node with the key `client` in.
    pub(crate) fn start(client: &str, answer: Message) -> Self {
        let (identity, runtime) = (identity(), runtime());
        let crypto = identity.quic_server(BTreeSet::from([client.parse().expect("a key")])).expect("TLS");
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(Arc::new(transport::settings(true)));
        let _inside = runtime.enter();
        let endpoint = Endpoint::server(config, (Ipv4Addr::LOCALHOST, 0).into()).expect("a socket");
        let address = endpoint.local_addr().expect("its address");
        runtime.spawn(async move {
            while let Some(incoming) = endpoint.accept().await {
                let answer = answer.clone();
                tokio::spawn(async move {
                    let Ok(connection) = incoming.await else { return };
                    let Ok((mut send, mut recv)) = connection.accept_bi().await else { return };
                    if let Some(Message::Hello(_)) = hear(&mut recv).await {
                        let _ = send.write_all(&answer.encode()).await;
                    }
                    connection.closed().await;
                });
            }
        });
        Self { address, key: identity.fingerprint().to_string(), _runtime: runtime }
    }
}

/// A primary that says what it is told to.
pub(crate) struct FalsePrimary {
    identity: Identity,
    runtime: Runtime,
}

/// A session's control stream; the connection lives as long as it.
struct Control {
    _endpoint: Endpoint,
    connection: Connection,
    send: SendStream,
    recv: RecvStream,
}

impl FalsePrimary {
    /// One with a key of its own.
    pub(crate) fn new() -> Self {
        Self { identity: identity(), runtime: runtime() }
    }

    /// Its key, for `[[receiver.client]]`.
    pub(crate) fn key(&self) -> String {
        self.identity.fingerprint().to_string()
    }

    /// A hello that this build's receiver accepts, for a group with the disk `data`.
    pub(crate) fn hello(group: &str, size_bytes: u64) -> Hello {
        Hello {
            version_min: proto::control::VERSION_MIN,
            version_max: proto::control::VERSION_MAX,
            block_bytes: 4096,
            interval_ms: 1000,
            group: group.parse().expect("a name"),
            generation: Generation(0),
            committed: EpochId(0),
            volumes: vec![VolumeHello { name: "data".parse().expect("a name"), size_bytes }],
        }
    }

    /// Says hello to a receiver that must refuse; returns its last message, after it has closed the connection.
    pub(crate) fn refused(&self, receiver: &str, key: &str, hello: Hello) -> Message {
        self.runtime.block_on(within("an answer to the hello", async {
            let mut control = self.connect(receiver, key).await;
            control.send.write_all(&Message::Hello(hello).encode()).await.expect("the hello is sent");
            let answer = hear(&mut control.recv).await.expect("an answer");
            control.connection.closed().await;
            answer
        }))
    }

    async fn connect(&self, receiver: &str, key: &str) -> Control {
        let crypto = self.identity.quic_client(key.parse().expect("a key")).expect("TLS");
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport::settings(false)));
        let endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).expect("a socket");
        let to = receiver.parse().expect("an address");
        let connection = endpoint.connect_with(config, to, "twinsite").expect("a way").await.expect("a connection");
        let (send, recv) = connection.open_bi().await.expect("a control stream");
        Control { _endpoint: endpoint, connection, send, recv }
    }
}
