//! A primary for tests: speaks the protocol over QUIC on loopback and keeps an oracle of every point.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blockdev::{BlockDevice, Buf, IoThreads};
use proto::control::{Hello, VolumeHello};
use proto::frame::{FRAME_HEADER_BYTES, encode_data, encode_zero};
use proto::pass::{PassHeader, PassKind};
use proto::seal::Tally;
use proto::{
    BlockExtent, BlockIndex, Codec, EpochId, Fingerprint, Frame, FrameKind, Generation, Identity, Message, Name, Point, Seal,
    VolumeIndex,
};
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use receiver::{ClientConfig, Limits, Receiver, ReceiverConfig};

pub const BLOCK: usize = 4096;
/// Nothing on loopback takes this long, unless it hangs.
pub const DEADLINE: Duration = Duration::from_secs(20);

pub fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub fn identity() -> Identity {
    Identity::from_pem(&Identity::generate_pem().unwrap()).unwrap()
}

pub fn point(generation: u64, epoch: u64) -> Point {
    Point { generation: Generation(generation), epoch: EpochId(epoch) }
}

pub fn extent(start: u64, blocks: u32) -> BlockExtent {
    BlockExtent { start: BlockIndex(start), blocks }
}

/// A receiver with its key, and clients by name.
pub struct Site {
    pub identity: Identity,
    pub clients: Vec<(ClientConfig, Identity)>,
    pub limits: Limits,
    pub dir: tempfile::TempDir,
}

impl Site {
    pub fn new(clients: &[&str]) -> Self {
        let clients = clients.iter().map(|c| {
            let identity = identity();
            let key = identity.fingerprint();
            (
                ClientConfig {
                    name: name(c),
                    key,
                    groups: None,
                    space_max_bytes: None,
                    group_space_max_bytes: Default::default(),
                    handback: true,
                    retention: Default::default(),
                },
                identity,
            )
        });
        Self {
            identity: identity(),
            clients: clients.collect(),
            limits: Limits { segment_bytes: 1 << 20, ..Limits::default() },
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// The same in memory, if there is such a place: for what takes no longer, and keeps no less, than its own work allows, whatever disk is below.
    pub fn in_memory(clients: &[&str]) -> Self {
        Self { dir: tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap(), ..Self::new(clients) }
    }

    pub fn config(&self) -> ReceiverConfig {
        ReceiverConfig {
            flatten: false,
            listen: "127.0.0.1:0".parse().unwrap(),
            store: self.store(),
            clients: self.clients.iter().map(|(c, _)| c.clone()).collect(),
            limits: self.limits.clone(),
        }
    }

    pub fn store(&self) -> std::path::PathBuf {
        self.dir.path().join("store")
    }

    pub async fn start(&self) -> Receiver {
        Receiver::start(self.config(), self.identity.clone()).await.unwrap()
    }

    pub async fn connect(&self, receiver: &Receiver, client: usize) -> Connection {
        self.connect_as(receiver.local_addr().unwrap(), &self.clients[client].1).await.unwrap()
    }

    pub async fn connect_as(&self, to: SocketAddr, identity: &Identity) -> Result<Connection, quinn::ConnectionError> {
        dial(to, identity, self.identity.fingerprint()).await
    }
}

pub async fn dial(to: SocketAddr, identity: &Identity, pinned: Fingerprint) -> Result<Connection, quinn::ConnectionError> {
    dial_with(to, identity, pinned, proto::transport::settings(false)).await
}

pub async fn dial_with(
    to: SocketAddr,
    identity: &Identity,
    pinned: Fingerprint,
    settings: quinn::TransportConfig,
) -> Result<Connection, quinn::ConnectionError> {
    let mut config = quinn::ClientConfig::new(Arc::new(identity.quic_client(pinned).unwrap()));
    config.transport_config(Arc::new(settings));
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    endpoint.connect_with(config, to, "twinsite").unwrap().await
}

pub fn hello(group: &str, volumes: &[(&str, u64)]) -> Hello {
    Hello {
        version_min: 1,
        version_max: 1,
        block_bytes: 4096,
        interval_ms: 1000,
        group: name(group),
        generation: Generation(0),
        committed: EpochId(0),
        volumes: volumes.iter().map(|(n, size)| VolumeHello { name: name(n), size_bytes: *size }).collect(),
    }
}

/// A session's control stream.
pub struct Control {
    pub connection: Connection,
    pub send: SendStream,
    pub recv: RecvStream,
}

impl Control {
    pub async fn open(connection: Connection, hello: Hello) -> (Self, Message) {
        let (send, recv) = connection.open_bi().await.unwrap();
        let mut control = Self { connection, send, recv };
        control.say(&Message::Hello(hello)).await;
        let answer = control.hear().await;
        (control, answer)
    }

    pub async fn say(&mut self, message: &Message) {
        self.send.write_all(&message.encode()).await.unwrap();
    }

    /// The next message, but for how many frames have arrived.
    pub async fn hear(&mut self) -> Message {
        let read = async {
            loop {
                let mut prefix = [0; 4];
                self.recv.read_exact(&mut prefix).await.unwrap();
                let mut body = vec![0; Message::check_length(prefix).unwrap()];
                self.recv.read_exact(&mut body).await.unwrap();
                let message = Message::decode(&body).unwrap();
                if !matches!(message, Message::Staged { .. }) {
                    return message;
                }
            }
        };
        tokio::time::timeout(DEADLINE, read).await.expect("an answer in time")
    }

    /// The close message that must come now, and the close code of the connection after it.
    pub async fn hear_close(&mut self) -> (u16, String) {
        let Message::Close { code, reason } = self.hear().await else { panic!("a close was due") };
        let closed = tokio::time::timeout(DEADLINE, self.connection.closed()).await.expect("closed in time");
        let quinn::ConnectionError::ApplicationClosed(close) = closed else { panic!("closed by {closed}") };
        assert_eq!(close.error_code.into_inner(), u64::from(code));
        assert_eq!(close.reason, reason.as_bytes());
        (code, reason)
    }

    pub async fn pass(&self, header: PassHeader, bytes: &[u8]) {
        let mut stream = self.connection.open_uni().await.unwrap();
        stream.write_all(&header.encode()).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream.finish().unwrap();
    }
}

/// A change of blocks.
#[derive(Clone, Debug)]
pub enum Change {
    Data { volume: u16, start: u64, blocks: u32, seed: u8 },
    Zero { volume: u16, start: u64, blocks: u32 },
}

/// Content of a block: compressible for odd seeds.
pub fn fill(seed: u8, block: u64) -> Vec<u8> {
    let mut out = vec![seed; BLOCK];
    out[..8].copy_from_slice(&block.to_le_bytes());
    if seed.is_multiple_of(2) {
        let mut x = block ^ (u64::from(seed) << 40) ^ 0x9E37_79B9_7F4A_7C15;
        for b in out.iter_mut().skip(8) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            *b = x as u8;
        }
    }
    out
}

impl Change {
    pub fn frame(&self, epoch: u64, pass: u16) -> Vec<u8> {
        match *self {
            Self::Data { volume, start, blocks, seed } => {
                let content: Vec<u8> = (start..start + u64::from(blocks)).flat_map(|b| fill(seed, b)).collect();
                encode_data(VolumeIndex(volume), EpochId(epoch), pass, &[extent(start, blocks)], &content, Codec::Lz4)
            }
            Self::Zero { volume, start, blocks } => {
                encode_zero(VolumeIndex(volume), EpochId(epoch), pass, &[extent(start, blocks)])
            }
        }
    }

    pub fn apply(&self, disks: &mut [Vec<u8>]) {
        let (volume, start, blocks) = match *self {
            Self::Data { volume, start, blocks, .. } | Self::Zero { volume, start, blocks } => (volume, start, blocks),
        };
        let disk = &mut disks[usize::from(volume)];
        for block in start..start + u64::from(blocks) {
            let at = block as usize * BLOCK;
            let end = (at + BLOCK).min(disk.len());
            match *self {
                Self::Data { seed, .. } => disk[at..end].copy_from_slice(&fill(seed, block)[..end - at]),
                Self::Zero { .. } => disk[at..end].fill(0),
            }
        }
    }
}

pub fn seal_of(generation: u64, epoch: u64, passes: u32, frames: &[Vec<u8>]) -> Seal {
    let mut tally = Tally::default();
    for bytes in frames {
        let frame = Frame::decode(bytes, u64::from(u32::MAX)).unwrap();
        let blocks = frame.extents.iter().map(|e| u64::from(e.blocks)).sum();
        let (data, zero) = if frame.header.kind == FrameKind::Data { (blocks, 0) } else { (0, blocks) };
        tally.add(bytes.first_chunk::<FRAME_HEADER_BYTES>().unwrap(), bytes.len(), data, zero);
    }
    Seal {
        passes,
        epoch: EpochId(epoch),
        generation: Generation(generation),
        cut_unix_us: 1_700_000_000_000_000 + epoch,
        frames: tally.frames,
        frame_bytes: tally.frame_bytes,
        data_blocks: tally.data_blocks,
        zero_blocks: tally.zero_blocks,
        first_write_unix_us: 0,
        session: proto::SessionToken::default(),
        digest: tally.digest(),
    }
}

/// A primary that behaves, and what its disks were at each point.
pub struct Primary {
    pub control: Control,
    pub generation: u64,
    pub next: u64,
    pub disks: Vec<Vec<u8>>,
    pub images: BTreeMap<Point, Vec<Vec<u8>>>,
}

impl Primary {
    pub async fn open(connection: Connection, hello: Hello) -> Self {
        let disks = hello.volumes.iter().map(|v| vec![0; v.size_bytes as usize]).collect();
        let (control, answer) = Control::open(connection, hello).await;
        let Message::Welcome { generation, committed, .. } = answer else { panic!("not let in: {answer:?}") };
        let next = committed.map_or(1, |p| p.epoch.0 + 1);
        Self { control, generation: generation.0, next, disks, images: BTreeMap::new() }
    }

    /// Sends passes and the seal, without waiting for the commit.
    pub async fn send(&mut self, passes: &[Vec<Change>]) -> Point {
        let epoch = self.next;
        self.next += 1;
        let mut all = Vec::new();
        for (i, changes) in passes.iter().enumerate() {
            let frames: Vec<_> = changes.iter().map(|c| c.frame(epoch, i as u16)).collect();
            let kind = if i + 1 == passes.len() { PassKind::Frozen } else { PassKind::Fuzzy };
            self.control
                .pass(PassHeader { epoch: EpochId(epoch), pass: i as u16, kind, continued: false }, &frames.concat())
                .await;
            all.extend(frames);
            for change in changes {
                change.apply(&mut self.disks);
            }
        }
        let seal = seal_of(self.generation, epoch, passes.len() as u32, &all);
        self.control.say(&Message::Seal(seal)).await;
        self.images.insert(seal.point(), self.disks.clone());
        seal.point()
    }

    pub async fn committed(&mut self, point: Point) {
        assert_eq!(self.control.hear().await, Message::Committed { point });
    }

    pub async fn commit(&mut self, changes: Vec<Change>) -> Point {
        let point = self.send(&[changes]).await;
        self.committed(point).await;
        point
    }
}

pub fn data(start: u64, blocks: u32, seed: u8) -> Change {
    Change::Data { volume: 0, start, blocks, seed }
}

pub fn zero(start: u64, blocks: u32) -> Change {
    Change::Zero { volume: 0, start, blocks }
}

/// Reads a whole device on an io thread.
pub async fn read_all(io: &IoThreads, device: Arc<dyn BlockDevice>) -> std::io::Result<Vec<u8>> {
    io.call(move || async move {
        let mut out = Vec::new();
        while (out.len() as u64) < device.size() {
            let length = (device.size() - out.len() as u64).min(100_000) as usize;
            let buf = device.read(out.len() as u64, Buf::zeroed(length)).await?;
            out.extend_from_slice(&buf);
        }
        Ok(out)
    })
    .await?
}

/// Every point of `images`, byte for byte.
pub async fn check_images(io: &IoThreads, receiver: &Receiver, group: &str, images: &BTreeMap<Point, Vec<Vec<u8>>>) {
    for (point, disks) in images {
        let (found, views) = receiver.view(group, Some(*point)).await.unwrap();
        assert_eq!(found, *point);
        for ((volume, view), disk) in views.into_iter().zip(disks) {
            let bytes = read_all(io, Arc::new(view)).await.unwrap();
            assert!(bytes == *disk, "volume {volume} at point {point}");
        }
    }
}

pub fn only_file(folder: &Path) -> std::path::PathBuf {
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files.pop().unwrap()
}
