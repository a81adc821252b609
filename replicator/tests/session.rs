//! The replicator over real QUIC against a small receiver in memory: what the guest wrote arrives, whole epochs only, through
//! lost connections, refusals and fencing.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockdev::{BlockDevice, Buf, IoThreads, MemoryDevice, ZeroMode};
use parking_lot::Mutex;
use proto::control::{CloseCode, Hello, Message};
use proto::frame::{FRAME_HEADER_BYTES, FrameKind};
use proto::pass::{PASS_HEADER_BYTES, PassHeader, PassKind};
use proto::seal::Tally;
use proto::{
    BLOCK_BYTES, EpochId, Fingerprint, Frame, FrameHeader, Generation, HashQuery, Hashes, Identity, Point, Scrub, ScrubOutcome,
    Scrubbed, SessionToken, transport,
};
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use replicator::{
    Durability, GroupSpec, GroupStatus, LinkState, PeerSpec, RateSchedule, Replicator, ReplicatorError, Tuning, VerifyStatus,
    VolumeSpec,
};
use tokio::sync::mpsc;

#[path = "../../tests/support/stalls.rs"]
#[allow(dead_code, reason = "every test uses a part of it")]
mod stalls;

use stalls::Stalls;

const SIZE: u64 = 20 * 1024 * 1024 + 512;
const DEADLINE: Duration = Duration::from_secs(20);

/// What the small receiver does beside committing.
#[derive(Default)]
struct Behaviour {
    /// Hang up instead of committing this epoch, once.
    drop_at: Option<u64>,
    /// Commit this epoch but hang up before saying so, once.
    drop_after: Option<u64>,
    /// Answer the hello with this.
    answer: Option<Message>,
    /// Take no more than so many bytes of content a second.
    bytes_per_s: Option<f64>,
    /// Answer a question for hashes after so long.
    hash_pause: Duration,
}

#[derive(Default)]
struct Store {
    image: Vec<Vec<u8>>,
    committed: Option<Point>,
    writer: SessionToken,
    queries: Vec<HashQuery>,
    scrubbed_blocks: u64,
    hellos: Vec<Hello>,
    passes: Vec<PassHeader>,
    data_blocks: u64,
}

struct SmallReceiver {
    address: SocketAddr,
    identity: Identity,
    store: Arc<Mutex<Store>>,
    behaviour: Arc<Mutex<Behaviour>>,
    _endpoint: Endpoint,
}

fn identity() -> Identity {
    Identity::from_pem(&Identity::generate_pem().unwrap()).unwrap()
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl SmallReceiver {
    fn start(client: &Identity) -> Self {
        let identity = identity();
        let crypto = identity.quic_server(BTreeSet::from([client.fingerprint()])).unwrap();
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(Arc::new(transport::settings(true)));
        let endpoint = Endpoint::server(config, (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = endpoint.local_addr().unwrap();
        let (store, behaviour) = (Arc::new(Mutex::new(Store::default())), Arc::new(Mutex::new(Behaviour::default())));
        let (accepting, s, b) = (endpoint.clone(), store.clone(), behaviour.clone());
        tokio::spawn(async move {
            while let Some(incoming) = accepting.accept().await {
                if let Ok(connection) = incoming.await {
                    let (s, b) = (s.clone(), b.clone());
                    tokio::spawn(async move {
                        if let Err(reason) = serve(connection.clone(), s, b).await {
                            connection.close(0_u32.into(), reason.as_bytes());
                        }
                    });
                }
            }
        });
        Self { address, identity, store, behaviour, _endpoint: endpoint }
    }
}

async fn message(stream: &mut RecvStream) -> Result<Message, String> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await.map_err(text)?;
    let mut body = vec![0; Message::check_length(prefix).map_err(text)?];
    stream.read_exact(&mut body).await.map_err(text)?;
    Message::decode(&body).map_err(text)
}

async fn send(stream: &mut SendStream, message: &Message) -> Result<(), String> {
    stream.write_all(&message.encode()).await.map_err(text)
}

async fn serve(connection: Connection, store: Arc<Mutex<Store>>, behaviour: Arc<Mutex<Behaviour>>) -> Result<(), String> {
    let (mut out, mut incoming) = connection.accept_bi().await.map_err(text)?;
    let Message::Hello(hello) = message(&mut incoming).await? else { return Err("no hello".into()) };
    let answer = behaviour.lock().answer.clone();
    store.lock().hellos.push(hello.clone());
    if let Some(answer) = answer {
        send(&mut out, &answer).await?;
        connection.closed().await;
        return Ok(());
    }
    let (committed, writer) = {
        let mut store = store.lock();
        if store.image.is_empty() {
            store.image = hello.volumes.iter().map(|v| vec![0; v.size_bytes as usize]).collect();
        }
        (store.committed, store.writer)
    };
    let generation = Generation(hello.generation.0.max(1));
    send(&mut out, &Message::Welcome { version: 1, generation, committed, writer, epochs_in_flight_max: 8, staged: None })
        .await?;
    let mut epoch = committed.map_or(1, |p| p.epoch.0 + 1);
    let (sender, mut messages) = mpsc::channel(16);
    tokio::spawn(async move {
        loop {
            let message = message(&mut incoming).await;
            let ended = message.is_err();
            if sender.send(message).await.is_err() || ended {
                return;
            }
        }
    });
    // A seal may overtake its pass.
    let mut early = None;
    loop {
        let mut staged = store.lock().image.clone();
        let mut tally = Tally::default();
        for pass in 0.. {
            let mut stream = loop {
                tokio::select! {
                    stream = connection.accept_uni() => break stream.map_err(text)?,
                    asked = messages.recv(), if early.is_none() => early = answered(asked, &mut out, &store, &behaviour).await?,
                }
            };
            let mut head = [0; PASS_HEADER_BYTES];
            stream.read_exact(&mut head).await.map_err(text)?;
            let header = PassHeader::decode(&head).map_err(text)?;
            assert_eq!((header.epoch, header.pass), (EpochId(epoch), pass));
            store.lock().passes.push(header);
            let pause = behaviour.lock().bytes_per_s.map(|rate| Duration::from_secs_f64(BLOCK_BYTES as f64 / rate));
            frames(&mut stream, &mut staged, &mut tally, &store, pause.unwrap_or_default()).await?;
            if header.kind == PassKind::Frozen {
                break;
            }
        }
        while early.is_none() {
            early = answered(messages.recv().await, &mut out, &store, &behaviour).await?;
        }
        let Some(Message::Seal(seal)) = early.take() else { return Err("no seal".into()) };
        assert_eq!(seal.epoch, EpochId(epoch));
        assert!(tally.matches(&seal), "digest and totals");
        if behaviour.lock().drop_at.take_if(|e| *e == epoch).is_some() {
            return Err("dropped before the commit".into());
        }
        {
            let mut store = store.lock();
            store.image = staged;
            store.committed = Some(seal.point());
            store.writer = seal.session;
        }
        if behaviour.lock().drop_after.take_if(|e| *e == epoch).is_some() {
            return Err("dropped after the commit".into());
        }
        send(&mut out, &Message::Committed { point: seal.point() }).await?;
        epoch += 1;
    }
}

/// Answers what is a question; gives back what is none.
async fn answered(
    asked: Option<Result<Message, String>>,
    out: &mut SendStream,
    store: &Mutex<Store>,
    behaviour: &Mutex<Behaviour>,
) -> Result<Option<Message>, String> {
    let answer = match asked.ok_or("the control stream ended")?? {
        Message::HashQuery(query) => {
            let pause = behaviour.lock().hash_pause;
            tokio::time::sleep(pause).await;
            Message::Hashes(hashes(&mut store.lock(), query))
        }
        Message::Scrub(scrub) => Message::Scrubbed(scrubbed(&mut store.lock(), &scrub)?),
        other => return Ok(Some(other)),
    };
    send(out, &answer).await?;
    Ok(None)
}

/// The image is that of the newest commit; whatever is said of it must be so.
fn scrubbed(store: &mut Store, scrub: &Scrub) -> Result<Scrubbed, String> {
    if store.committed.is_none_or(|committed| committed.epoch != scrub.epoch) {
        return Ok(Scrubbed { id: scrub.id, outcome: ScrubOutcome::Stale });
    }
    let mut volume = store.image[usize::from(scrub.volume.0)].clone();
    volume.resize(volume.len().next_multiple_of(BLOCK_BYTES as usize), 0);
    for run in &scrub.runs {
        let range = (run.extent.start.0 * BLOCK_BYTES) as usize..(run.extent.end() * BLOCK_BYTES) as usize;
        if proto::hashes::hash(&volume[range]) != run.hash {
            return Err(format!("a scrub of epoch {} says of {:?} what is not so", scrub.epoch, run.extent));
        }
        store.scrubbed_blocks += u64::from(run.extent.blocks);
    }
    Ok(Scrubbed { id: scrub.id, outcome: ScrubOutcome::Compared { differing: Vec::new() } })
}

fn hashes(store: &mut Store, query: HashQuery) -> Hashes {
    store.queries.push(query);
    let mut volume = store.image[usize::from(query.volume.0)].clone();
    volume.resize(volume.len().next_multiple_of(BLOCK_BYTES as usize), 0);
    let range = &volume[(query.start.0 * BLOCK_BYTES) as usize..(query.end() * BLOCK_BYTES) as usize];
    Hashes { id: query.id, hashes: proto::hashes::hash_chunks(range, query.chunk_blocks).collect() }
}

async fn frames(
    stream: &mut RecvStream,
    image: &mut [Vec<u8>],
    tally: &mut Tally,
    store: &Mutex<Store>,
    pause_a_block: Duration,
) -> Result<(), String> {
    loop {
        let mut head = [0; FRAME_HEADER_BYTES];
        match stream.read_exact(&mut head).await {
            Ok(()) => {}
            Err(quinn::ReadExactError::FinishedEarly(0)) => return Ok(()),
            Err(error) => return Err(error.to_string()),
        }
        let header = FrameHeader::decode(&head).map_err(text)?;
        let mut body = vec![0; header.body_bytes()];
        stream.read_exact(&mut body).await.map_err(text)?;
        let volume = &mut image[usize::from(header.volume.0)];
        let frame = Frame::decode_body(header, &body, (volume.len() as u64).div_ceil(BLOCK_BYTES)).map_err(text)?;
        let blocks: u64 = frame.extents.iter().map(|e| u64::from(e.blocks)).sum();
        let data = header.kind == FrameKind::Data;
        tokio::time::sleep(pause_a_block.mul_f64(blocks as f64)).await;
        tally.add(&head, header.frame_bytes(), if data { blocks } else { 0 }, if data { 0 } else { blocks });
        let content = frame.content().map_err(text)?;
        let mut at = 0;
        for extent in &frame.extents {
            let start = (extent.start.0 * BLOCK_BYTES) as usize;
            let end = ((extent.end() * BLOCK_BYTES) as usize).min(volume.len());
            if data {
                volume[start..end].copy_from_slice(&content[at..at + end - start]);
                at += extent.blocks as usize * BLOCK_BYTES as usize;
            } else {
                volume[start..end].fill(0);
            }
        }
        store.lock().data_blocks += if data { blocks } else { 0 };
    }
}

struct Primary {
    replicator: Replicator,
    disks: Vec<Arc<MemoryDevice>>,
    io: IoThreads,
    dir: Arc<tempfile::TempDir>,
}

impl Primary {
    fn start(identity: &Identity, receiver: &SmallReceiver, tuning: Tuning) -> Self {
        Self::start_with(identity, receiver.address, receiver.identity.fingerprint(), tuning)
    }

    fn start_with(identity: &Identity, address: SocketAddr, key: Fingerprint, tuning: Tuning) -> Self {
        let disks = (0..2).map(|_| Arc::new(MemoryDevice::new(SIZE))).collect();
        let dir = tempfile::tempdir().unwrap();
        Self::try_start(identity, address, key, tuning, disks, &Arc::new(dir)).unwrap()
    }

    /// The next process on the same disks and state folder. Without a clean stop it begins where the old one was killed.
    async fn restart(self, identity: &Identity, receiver: &SmallReceiver, clean: bool) -> Self {
        let Self { replicator, disks, dir, .. } = self;
        if clean {
            assert!(replicator.shutdown(DEADLINE).await);
        } else {
            drop(replicator);
        }
        let start = Instant::now();
        loop {
            let (address, key) = (receiver.address, receiver.identity.fingerprint());
            // The old tasks let go of the log's file in their own time.
            match Self::try_start(identity, address, key, fast(), disks.clone(), &dir) {
                Ok(primary) => return primary,
                Err(error) => assert!(start.elapsed() < DEADLINE, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn try_start(
        identity: &Identity,
        address: SocketAddr,
        key: Fingerprint,
        tuning: Tuning,
        disks: Vec<Arc<MemoryDevice>>,
        dir: &Arc<tempfile::TempDir>,
    ) -> Result<Self, ReplicatorError> {
        let volumes = disks
            .iter()
            .enumerate()
            .map(|(i, d)| VolumeSpec { name: format!("disk{i}").parse().unwrap(), device: d.clone() as Arc<dyn BlockDevice> })
            .collect();
        let peer = PeerSpec { address: address.to_string(), key };
        let spec = GroupSpec {
            group: "db".parse().unwrap(),
            volumes,
            peer,
            state_dir: dir.path().join("db"),
            tuning,
            all_suspect: false,
        };
        let replicator = Replicator::start(spec, identity.clone())?;
        Ok(Self { replicator, disks, io: IoThreads::new(1).unwrap(), dir: dir.clone() })
    }

    async fn write(&self, disk: usize, offset: u64, data: Vec<u8>) {
        let tap = self.replicator.volume(&format!("disk{disk}").parse().unwrap()).unwrap();
        self.io.call(move || async move { tap.write(offset, Buf::copy_of(&data)).await.map(drop) }).await.unwrap().unwrap();
    }

    async fn flush(&self, disk: usize) -> std::io::Result<()> {
        let tap = self.replicator.volume(&format!("disk{disk}").parse().unwrap()).unwrap();
        self.io.call(move || async move { tap.flush().await }).await.unwrap()
    }

    async fn zero(&self, disk: usize, offset: u64, length: u64) {
        let tap = self.replicator.volume(&format!("disk{disk}").parse().unwrap()).unwrap();
        self.io.call(move || async move { tap.write_zeroes(offset, length, ZeroMode::default()).await }).await.unwrap().unwrap();
    }

    /// Waits until `status` fits.
    async fn until(&self, what: &str, fits: impl Fn(&GroupStatus) -> bool) -> GroupStatus {
        let start = Instant::now();
        loop {
            let status = self.replicator.status();
            if fits(&status) {
                return status;
            }
            assert!(start.elapsed() < DEADLINE, "waited for {what}: {status:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn settled(&self) -> GroupStatus {
        self.until("everything committed", |s| s.dirty_bytes == 0 && s.state == LinkState::Streaming).await
    }

    /// The last verify, once it has ended.
    async fn verified(&self) -> Option<VerifyStatus> {
        let until = Instant::now() + DEADLINE;
        loop {
            let verified = self.replicator.verify_status().1;
            if verified.as_ref().is_none_or(|verified| !verified.running) {
                return verified;
            }
            assert!(Instant::now() < until, "{verified:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn images(&self) -> Vec<Vec<u8>> {
        self.disks.iter().map(|d| d.snapshot()).collect()
    }
}

fn fast() -> Tuning {
    Tuning { interval: Duration::from_millis(10), ..Tuning::default() }
}

fn pattern(seed: u8, length: usize) -> Vec<u8> {
    (0..length).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) | 1).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_guest_writes_arrives() {
    let identity = identity();
    let receiver = SmallReceiver::start(&identity);
    let primary = Primary::start(&identity, &receiver, fast());
    primary.settled().await;
    assert_eq!(receiver.store.lock().data_blocks, 0, "an empty disk sends no data");
    for round in 0..20_u8 {
        primary.write(0, u64::from(round) * 70_000 + 13, pattern(round, 9000)).await;
        primary.write(1, SIZE - 5000 - u64::from(round), pattern(round, 5000)).await;
        primary.zero(0, u64::from(round) * 35_000, 5000).await;
    }
    let status = primary.settled().await;
    assert!(receiver.store.lock().image == primary.images());
    assert!(status.saved_percent > 0.0 && status.epochs_committed > 1, "{status:?}");
    assert!(status.lag_ms == 0 && status.error.is_none(), "{status:?}");
    assert_eq!(status.committed.map(|p| p.generation), Some(Generation(1)));
}

/// A dirty set beyond the budget goes in fuzzy passes; the epoch is still one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_epoch_is_sent_in_passes() {
    let identity = identity();
    let receiver = SmallReceiver::start(&identity);
    let tuning = Tuning { freeze_budget_bytes: 1 << 20, ..fast() };
    let primary = Primary::start(&identity, &receiver, tuning);
    primary.settled().await;
    primary.write(0, 0, pattern(3, 12 << 20)).await;
    for i in 0..50 {
        primary.write(1, i * 40_000, pattern(i as u8, 4096)).await;
    }
    primary.settled().await;
    assert!(receiver.store.lock().image == primary.images());
    assert!(receiver.store.lock().passes.iter().any(|p| p.kind == PassKind::Fuzzy));
}

/// Before a commit, after a commit that was not heard of: the session breaks, nothing is lost, nothing is doubled. A verify that was under way
/// goes on in the next session, and covers everything once; whatever it says of a point is so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_session_loses_nothing() {
    let identity = identity();
    let receiver = SmallReceiver::start(&identity);
    *receiver.behaviour.lock() = Behaviour { drop_at: Some(4), drop_after: Some(7), ..Behaviour::default() };
    let primary = Primary::start(&identity, &receiver, fast());
    primary.settled().await;
    let mut round = 0;
    while round < 120 || receiver.store.lock().hellos.len() < 3 {
        // Refused while there is no connection.
        let _ = primary.replicator.verify();
        primary.write((round % 2) as usize, (round * 50_001) % (SIZE - 6000), pattern(round as u8, 6000)).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
        round += 1;
    }
    let status = primary.settled().await;
    assert!(receiver.store.lock().image == primary.images());
    assert_eq!(receiver.store.lock().hellos.len(), 3, "two reconnections");
    assert_eq!(status.epochs_merged, 0, "a receiver that kept nothing, and had said so of nothing, gets the same epochs again");
    // Three blocks a write; a full copy of both disks would be 10,240.
    assert!(receiver.store.lock().data_blocks < round * 3 * 2, "only what was not committed is sent again");
    // What was begun while there were writes leaves out what was dirty then.
    primary.verified().await;
    let before = receiver.store.lock().scrubbed_blocks;
    primary.replicator.verify().unwrap();
    let verified = primary.verified().await.unwrap();
    assert_eq!((verified.done_bytes, verified.differing_bytes), (verified.total_bytes, 0));
    assert!(receiver.store.lock().scrubbed_blocks - before >= 2 * SIZE / BLOCK_BYTES, "it compared the disks");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopping_commits_what_is_left() {
    let identity = identity();
    let receiver = SmallReceiver::start(&identity);
    let tuning = Tuning { interval: Duration::from_secs(3600), ..fast() };
    let primary = Primary::start(&identity, &receiver, tuning);
    primary.settled().await;
    primary.write(0, 5, pattern(9, 100_000)).await;
    let images = primary.images();
    assert!(primary.replicator.shutdown(DEADLINE).await);
    assert!(receiver.store.lock().image == images);
}

/// Would catch an orderly stop that leaves what may differ to the next start: a failover behind it would lack it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopping_commits_what_is_still_compared() {
    let identity = identity();
    let receiver = SmallReceiver::start(&identity);
    let primary = Primary::start(&identity, &receiver, fast());
    primary.write(0, 0, pattern(1, 8 << 20)).await;
    primary.settled().await;
    // Blocks reach the disk and not the copy; the log knows their regions.
    receiver.behaviour.lock().answer = Some(Message::close(CloseCode::Stopping, "away"));
    let primary = primary.restart(&identity, &receiver, false).await;
    primary.write(0, 50_000, pattern(4, 5000)).await;
    let images = primary.images();
    *receiver.behaviour.lock() = Behaviour { hash_pause: Duration::from_millis(400), ..Behaviour::default() };
    let primary = primary.restart(&identity, &receiver, false).await;
    let status = primary.until("it compares", |s| s.state == LinkState::Comparing).await;
    assert!(status.suspect_bytes > 0 && receiver.store.lock().image != images, "{status:?}");
    assert!(primary.replicator.shutdown(DEADLINE).await);
    assert!(receiver.store.lock().image == images);
}

/// Each refusal is one line that says what and what to do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_are_told_in_one_line() {
    let (identity, stranger) = (identity(), identity());
    let receiver = SmallReceiver::start(&identity);
    let error = |status: &GroupStatus| status.error.clone().unwrap_or_default();

    let unknown = Primary::start(&stranger, &receiver, fast());
    let status = unknown.until("a refusal", |s| s.error.is_some()).await;
    assert!(
        error(&status).contains("does not know our key SHA256:") && error(&status).contains("[[receiver.client]]"),
        "{status:?}"
    );
    assert_eq!(receiver.store.lock().hellos.len(), 0, "no further than the handshake");

    let misdirected = Primary::start_with(&identity, receiver.address, stranger.fingerprint(), fast());
    let status = misdirected.until("a refusal", |s| s.error.is_some()).await;
    assert!(error(&status).contains("shows another key than the pinned"), "{status:?}");

    receiver.behaviour.lock().answer = Some(Message::close(CloseCode::UnknownGroup, "no group db for client x"));
    let refused = Primary::start(&identity, &receiver, fast());
    let status = refused.until("a refusal", |s| s.state == LinkState::Refused).await;
    assert!(error(&status).contains("no group db for client x"), "{status:?}");

    // What is written before it learns that it is fenced stays dirty; afterwards writes are refused.
    receiver.behaviour.lock().answer = Some(Message::close(CloseCode::Stopping, "away"));
    let fenced = Primary::start(&identity, &receiver, fast());
    fenced.write(0, 0, pattern(1, 10)).await;
    receiver.behaviour.lock().answer = Some(Message::Fenced { generation: Generation(5) });
    let status = fenced.until("fencing", |s| s.state == LinkState::Fenced).await;
    assert!(error(&status).contains("generation 5 holds") && status.dirty_bytes > 0, "{status:?}");
}

/// After a clean stop nothing is compared and nothing is sent again; after a kill only what was marked is compared, and only what differs
/// is sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_sends_what_differs() {
    let identity = identity();
    let receiver = SmallReceiver::start(&identity);
    let primary = Primary::start(&identity, &receiver, fast());
    primary.write(0, 0, pattern(1, 8 << 20)).await;
    primary.write(1, 5, pattern(2, 3 << 20)).await;
    primary.settled().await;
    let primary = primary.restart(&identity, &receiver, true).await;
    primary.write(0, 9 << 20, pattern(3, 4096)).await;
    let status = primary.settled().await;
    assert_eq!((status.suspect_bytes, status.compared_bytes, status.captured_bytes), (0, 0, 4096), "{status:?}");

    // One block reaches the disk and not the copy; the log knows its region.
    receiver.behaviour.lock().answer = Some(Message::close(CloseCode::Stopping, "away"));
    let primary = primary.restart(&identity, &receiver, false).await;
    primary.until("the receiver is away", |s| s.error.is_some()).await;
    primary.write(0, 50_000, pattern(4, 5000)).await;
    let before = receiver.store.lock().data_blocks;
    receiver.behaviour.lock().answer = None;
    let primary = primary.restart(&identity, &receiver, false).await;
    primary.until("compared", |s| s.compared_bytes > 0 && s.suspect_bytes == 0 && s.state == LinkState::Streaming).await;
    let status = primary.settled().await;
    assert!(receiver.store.lock().image == primary.images());
    assert_eq!(status.differing_bytes, 2 * BLOCK_BYTES, "{status:?}");
    assert_eq!(receiver.store.lock().data_blocks - before, 2, "nothing else was sent");
    let chunks: BTreeSet<u32> = receiver.store.lock().queries.iter().map(|q| q.chunk_blocks).collect();
    assert_eq!(chunks, BTreeSet::from([1, 16]));
}

/// A clone of the machine, with its key and its record, writes another history. The original compares everything, also the regions
/// that its log has forgotten.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_in_between_is_noticed() {
    let identity = identity();
    let receiver = SmallReceiver::start(&identity);
    let primary = Primary::start(&identity, &receiver, fast());
    primary.write(0, 0, pattern(1, 1 << 20)).await;
    primary.settled().await;
    let primary = primary.restart(&identity, &receiver, true).await;
    primary.settled().await;
    let clone = {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let state = dir.path().join("db");
        std::fs::create_dir(&state).unwrap();
        for entry in std::fs::read_dir(primary.dir.path().join("db")).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, state.join(path.file_name().unwrap())).unwrap();
        }
        let disks = primary.disks.iter().map(|d| Arc::new(MemoryDevice::with_content(&d.snapshot()))).collect();
        let (address, key) = (receiver.address, receiver.identity.fingerprint());
        Primary::try_start(&identity, address, key, fast(), disks, &dir).unwrap()
    };
    clone.settled().await;
    clone.write(1, 12 << 20, pattern(7, 10_000)).await;
    clone.settled().await;
    let committed = receiver.store.lock().committed;
    assert!(clone.replicator.shutdown(DEADLINE).await);
    assert!(receiver.store.lock().image != primary.images(), "the copy is the clone's");
    let primary = primary.restart(&identity, &receiver, false).await;
    primary.until("compared", |s| s.compared_bytes == 2 * SIZE.next_multiple_of(BLOCK_BYTES) && s.dirty_bytes == 0).await;
    let start = Instant::now();
    while receiver.store.lock().image != primary.images() {
        assert!(start.elapsed() < DEADLINE, "the copy is the original's again");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(receiver.store.lock().committed > committed);
}

fn flush_sync() -> Tuning {
    Tuning { interval: Duration::from_secs(3600), durability: Durability::FlushSync, ..Tuning::default() }
}

/// Catches a flush that waits for the interval, one that is answered before its epoch is committed, and one that is forgotten with its
/// session.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_is_answered_when_the_receiver_has_what_it_covers() {
    let identity = identity();
    let receiver = SmallReceiver::start(&identity);
    let primary = Arc::new(Primary::start(&identity, &receiver, flush_sync()));
    for round in 0..20_u8 {
        primary.write(0, u64::from(round) * 50_000, pattern(round, 9000)).await;
        primary.write(1, u64::from(round) * 30_000, pattern(round, 2000)).await;
        primary.flush(1).await.unwrap();
        assert!(receiver.store.lock().image == primary.images(), "round {round}: both disks are committed");
    }
    let status = primary.replicator.status();
    assert_eq!((status.flushes_waiting, status.flushes_committed), (0, 20), "{status:?}");
    let committed = status.epochs_committed;
    primary.flush(0).await.unwrap();
    assert_eq!(primary.replicator.status().epochs_committed, committed, "without a change there is no cut");

    let newest = receiver.store.lock().committed.unwrap().epoch.0;
    receiver.behaviour.lock().drop_at = Some(newest + 1);
    primary.write(0, 77, pattern(99, 60_000)).await;
    primary.flush(0).await.unwrap();
    assert!(receiver.store.lock().image == primary.images(), "its epoch was lost with its session, and made again");
    assert_eq!(receiver.store.lock().hellos.len(), 2);

    let before = primary.replicator.status().epochs_committed;
    let clients: Vec<_> = (0..32_u64)
        .map(|client| {
            let primary = primary.clone();
            tokio::spawn(async move {
                for round in 0..10_u64 {
                    primary.write((client % 2) as usize, (client * 10 + round) * 50_000, pattern(round as u8, 4096)).await;
                    primary.flush(((client + round) % 2) as usize).await.unwrap();
                }
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    assert!(receiver.store.lock().image == primary.images());
    let cuts = primary.replicator.status().epochs_committed - before;
    println!("320 flushes in {cuts} epochs");
    assert!(cuts < 320, "flushes that wait together share a cut");
}

/// Nothing that cannot be committed is answered well: not by a fenced primary, and not by a node that stops.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_that_cannot_be_kept_fails() {
    let identity = identity();
    let receiver = SmallReceiver::start(&identity);
    // It learns that it is fenced while the flush waits; before that its writes are let in, afterwards refused.
    receiver.behaviour.lock().answer = Some(Message::close(CloseCode::Stopping, "away"));
    let fenced = Arc::new(Primary::start(&identity, &receiver, flush_sync()));
    fenced.write(0, 0, pattern(1, 10)).await;
    let flushing = tokio::spawn({
        let fenced = fenced.clone();
        async move { fenced.flush(0).await }
    });
    fenced.until("a flush waits", |s| s.flushes_waiting == 1).await;
    receiver.behaviour.lock().answer = Some(Message::Fenced { generation: Generation(5) });
    let error = flushing.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("another side may write now"), "{error}");
    let error = fenced.flush(0).await.unwrap_err();
    assert!(error.to_string().contains("another side may write now"), "{error}");

    receiver.behaviour.lock().answer = Some(Message::close(CloseCode::Stopping, "away"));
    let alone = Arc::new(Primary::start(&identity, &receiver, flush_sync()));
    alone.write(0, 0, pattern(1, 10)).await;
    let flushing = tokio::spawn({
        let alone = alone.clone();
        async move { alone.flush(0).await }
    });
    let status = alone.until("a flush waits", |s| s.flushes_waiting == 1 && s.flush_wait_ms > Some(50)).await;
    assert_eq!((status.flushes_committed, flushing.is_finished()), (0, false), "{status:?}");
    alone.replicator.end_flushes(Duration::from_millis(10));
    let error = flushing.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("the node stops"), "{error}");
    assert_eq!(alone.replicator.status().flushes_waiting, 0);
}

/// A guest that writes without end, and a receiver that takes 2 MB/s: the guest is slowed to what it takes, and the lag held.
///
/// Catches a write that goes past the pace (this disk takes every write at once), a pace that starves, and a lag that grows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_is_slowed_to_what_the_receiver_takes() {
    const RATE: f64 = 2e6;
    const MAX_LAG_MS: u64 = 2000;
    const READ_MAX: Duration = Duration::from_millis(300);
    let identity = identity();
    let receiver = SmallReceiver::start(&identity);
    let tuning = Tuning {
        interval: Duration::from_millis(200),
        max_lag: Some(Duration::from_millis(MAX_LAG_MS)),
        codec: proto::Codec::Raw,
        ..Tuning::default()
    };
    let primary = Primary::start(&identity, &receiver, tuning);
    primary.settled().await;
    assert_eq!(primary.replicator.status().write_rate_bytes_per_s, None);
    receiver.behaviour.lock().bytes_per_s = Some(RATE);
    let tap = primary.replicator.volume(&"disk0".parse().unwrap()).unwrap();
    let stalls = Stalls::start();
    let (begun, written) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let (counted, tapped) = (written.clone(), tap.clone());
    let (mut lags, mut reads) = (Vec::new(), Vec::new());
    primary.io.spawn(move || async move {
        for at in (0..).map(|i: u64| i * 16_384 % (SIZE / 16_384 * 16_384)) {
            let content = pattern(at as u8, 16_384);
            // As an export does: at once if that is possible.
            match tapped.try_write(at, &content) {
                Some(result) => result.unwrap(),
                None => drop(tapped.write(at, Buf::copy_of(&content)).await.unwrap()),
            }
            counted.fetch_add(16_384, Ordering::Relaxed);
            tokio::task::yield_now().await;
        }
    });
    // What was written in the moment before anybody could know how slow it has become is behind, however long it takes; no more than the disk is.
    let (known, most) = (Duration::from_secs(2), Duration::from_secs_f64(SIZE as f64 / RATE + 5.0));
    while begun.elapsed() < known || primary.replicator.status().lag_ms > MAX_LAG_MS {
        assert!(begun.elapsed() < most || stalls.ran_since(begun) < most, "{:?}", primary.replicator.status());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("held after {:?}", begun.elapsed());
    let (held, before) = (Instant::now(), written.load(Ordering::Relaxed));
    while held.elapsed() < Duration::from_secs(10) {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let lag = Duration::from_millis(primary.replicator.status().lag_ms);
        lags.push((Instant::now(), lag));
        let reading = Instant::now();
        let tap = tap.clone();
        primary.io.call(move || async move { tap.read(0, Buf::zeroed(4096)).await.map(drop) }).await.unwrap().unwrap();
        reads.push((Instant::now(), reading.elapsed()));
    }
    let per_s = (written.load(Ordering::Relaxed) - before) as f64 / stalls.ran_since(held).as_secs_f64();
    // The longest, without the time in which the machine did not run; what is below half of its bound needs no second look.
    let longest = |all: &[(Instant, Duration)], bound: Duration| {
        let ran = |at: Instant, took: Duration| took.saturating_sub(stalls.between(at.checked_sub(took).unwrap_or(at), at));
        all.iter().map(|(at, took)| if *took < bound / 2 { *took } else { ran(*at, *took) }).max().unwrap_or_default()
    };
    let lag_max = longest(&lags, Duration::from_millis(MAX_LAG_MS)).as_millis() as u64;
    let waited_max = longest(&reads, READ_MAX);
    let status = primary.replicator.status();
    println!("{per_s:.0} B/s written, lag up to {lag_max} ms, a read took {waited_max:?} at most: {status:?}");
    assert!(status.write_rate_bytes_per_s.is_some() && status.write_paused_ms > 1000, "{status:?}");
    assert!(lag_max < MAX_LAG_MS * 3 / 2 && lag_max > MAX_LAG_MS / 2, "lag {lag_max} ms");
    assert!((0.6 * RATE..1.5 * RATE).contains(&per_s), "{per_s} B/s");
    assert!(waited_max < READ_MAX, "a read waited {waited_max:?}");
}

/// 5 MB at 8 Mbit/s take 5 s; without the limit they take none of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limited_transfer_takes_the_time_that_it_must() {
    let identity = identity();
    let receiver = SmallReceiver::start(&identity);
    let rate = RateSchedule { limit_bits_per_s: Some(8_000_000), windows: Vec::new() };
    let tuning = Tuning { codec: proto::Codec::Raw, rate, ..fast() };
    let primary = Primary::start(&identity, &receiver, tuning);
    let status = primary.settled().await;
    assert!(status.rate_limited && status.rate_limit_bits_per_s == Some(8_000_000), "{status:?}");
    let (stalls, begun) = (Stalls::start(), Instant::now());
    primary.write(0, 0, pattern(1, 5_000_000)).await;
    primary.settled().await;
    let (took, ran) = (begun.elapsed().as_secs_f64(), stalls.ran_since(begun).as_secs_f64());
    println!("5 MB at 8 Mbit/s took {took:.2} s, in {ran:.2} s of which the machine ran");
    assert!(receiver.store.lock().image == primary.images());
    assert!(took >= 4.0 && ran < 6.0, "5 MB at 8 Mbit/s took {took} s, {ran} s without what the machine stood still");
}
