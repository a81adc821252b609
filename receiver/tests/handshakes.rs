//! Peers that never finish a handshake: anybody who can send packets may be one.
//!
//! Would catch: an answer that is larger than its question, to an address that may be forged; handshakes without a limit, or
//! whose places are not given back; a limit that reaches sessions.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::*;
use quinn::{Connecting, ConnectionError, Endpoint};
use tokio::net::UdpSocket;
use tokio::sync::watch;

const SIZE: u64 = 64 * 4096;
/// The receiver's limit (docs/operations.md, "Queues").
const HANDSHAKES_MAX: usize = 64;
/// Bits of a QUIC packet's first byte: long header and type (RFC 9000, section 17.2).
const LONG_TYPE: u8 = 0b1011_0000;
const RETRY: u8 = 0b1011_0000;

#[derive(Clone, Default)]
struct Seen {
    /// Length of the client's first datagram.
    asked: Option<usize>,
    /// First byte and length of all that the receiver sent.
    answers: Vec<(u8, usize)>,
}

/// Forwards datagrams between one client and the receiver, until the receiver has taken the client's handshake up. From then
/// on nothing passes: the client is not heard of again.
struct Relay {
    address: SocketAddr,
    seen: watch::Receiver<Seen>,
    /// Lets the client be heard again.
    open: Arc<AtomicBool>,
}

fn is_retry(first: u8) -> bool {
    first & LONG_TYPE == RETRY
}

impl Relay {
    async fn start(to: SocketAddr) -> Self {
        let (near, far) = (UdpSocket::bind("127.0.0.1:0").await.unwrap(), UdpSocket::bind("127.0.0.1:0").await.unwrap());
        far.connect(to).await.unwrap();
        let address = near.local_addr().unwrap();
        let (tell, seen) = watch::channel(Seen::default());
        let open = Arc::new(AtomicBool::new(true));
        let passes = Arc::clone(&open);
        tokio::spawn(async move {
            let (mut there, mut back) = (vec![0; 65536], vec![0; 65536]);
            let mut client = None;
            loop {
                tokio::select! {
                    Ok((length, from)) = near.recv_from(&mut there) => {
                        client = Some(from);
                        tell.send_modify(|seen| { seen.asked.get_or_insert(length); });
                        if passes.load(Ordering::SeqCst) {
                            let _ = far.send(&there[..length]).await;
                        }
                    }
                    Ok(length) = far.recv(&mut back) => {
                        if is_retry(back[0]) && let Some(client) = client {
                            let _ = near.send_to(&back[..length], client).await;
                        } else {
                            passes.store(false, Ordering::SeqCst);
                        }
                        tell.send_modify(|seen| seen.answers.push((back[0], length)));
                    }
                }
            }
        });
        Self { address, seen, open }
    }

    /// Waits for an answer that fits.
    async fn answered(&mut self, fits: impl Fn(u8) -> bool) {
        let wait = self.seen.wait_for(|seen| seen.answers.iter().any(|(first, _)| fits(*first)));
        tokio::time::timeout(DEADLINE, wait).await.expect("an answer in time").unwrap();
    }
}

fn connecting(site: &Site, to: SocketAddr) -> (Endpoint, Connecting) {
    let mut config = quinn::ClientConfig::new(Arc::new(site.clients[0].1.quic_client(site.identity.fingerprint()).unwrap()));
    config.transport_config(Arc::new(proto::transport::settings(false)));
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let connecting = endpoint.connect_with(config, to, "twinsite").unwrap();
    (endpoint, connecting)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unproved_address_gets_one_small_answer() {
    let site = Site::new(&["a"]);
    let receiver = site.start().await;
    let mut relay = Relay::start(receiver.local_addr().unwrap()).await;
    let (endpoint, connecting) = connecting(&site, relay.address);
    relay.answered(|_| true).await;
    let Seen { asked, answers } = relay.seen.borrow().clone();
    let (asked, (first, answered)) = (asked.unwrap(), answers[0]);
    assert!(is_retry(first), "the first answer is a retry: first byte {first:#04x}");
    assert!(answered * 4 < asked, "{answered} bytes for {asked}: no use to an attacker");
    drop((endpoint, connecting));
    // Whoever proves the address is let in.
    let mut primary = Primary::open(site.connect(&receiver, 0).await, hello("db", &[("root", SIZE)])).await;
    primary.commit(vec![data(0, 1, 1)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_that_never_end_have_a_limit_and_disturb_no_session() {
    let site = Site::new(&["a"]);
    let receiver = site.start().await;
    let to = receiver.local_addr().unwrap();
    let mut primary = Primary::open(site.connect(&receiver, 0).await, hello("db", &[("root", SIZE)])).await;
    primary.commit(vec![data(0, 1, 1)]).await;

    // Each proves its address, begins a handshake, and is not heard of again.
    let mut silent = Vec::new();
    for _ in 0..HANDSHAKES_MAX {
        let mut relay = Relay::start(to).await;
        let held = connecting(&site, relay.address);
        relay.answered(|first| !is_retry(first)).await;
        silent.push((relay, held));
    }
    let refused = site.connect_as(to, &site.clients[0].1).await.unwrap_err();
    let ConnectionError::ConnectionClosed(close) = &refused else { panic!("{refused}") };
    assert_eq!(close.error_code, quinn::TransportErrorCode::CONNECTION_REFUSED, "{refused}");
    primary.commit(vec![data(1, 1, 2)]).await;

    // A place that is given up is free for the next.
    let (relay, (endpoint, connecting)) = silent.pop().unwrap();
    relay.open.store(true, Ordering::SeqCst);
    endpoint.close(0_u32.into(), b"");
    drop(connecting);
    let deadline = Instant::now() + DEADLINE;
    let connection = loop {
        match site.connect_as(to, &site.clients[0].1).await {
            Ok(connection) => break connection,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let again = Primary::open(connection, hello("db", &[("root", SIZE)])).await;
    assert_eq!(again.next, 3);
}
