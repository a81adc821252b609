//! A primary for tests: speaks bytes to a [`Replica`] and remembers every image that it sealed.

use std::collections::BTreeMap;
use std::path::Path;

use proto::control::{Hello, Staged, VolumeHello};
use proto::frame::{FRAME_HEADER_BYTES, encode_data, encode_zero};
use proto::pass::{PASS_HEADER_BYTES, PassHeader, PassKind};
use proto::seal::Tally;
use proto::{
    BlockExtent, BlockIndex, Codec, EpochId, Fingerprint, Frame, FrameHeader, FrameKind, Generation, Message, Point, Seal,
    VolumeIndex,
};
use rand::{Rng, RngCore, SeedableRng};

use super::{Output, Replica, ReplicaError, SessionNo};
use crate::config::{ClientConfig, Limits};
use crate::disk::Disk;

pub(super) const BLOCK: usize = 4096;
/// Blocks of the two volumes; the second ends within a block.
pub(super) const BLOCKS: [u64; 2] = [8, 5];
pub(super) const SIZES: [usize; 2] = [8 * BLOCK, 4 * BLOCK + 512];
pub(super) const GROUP: &str = "a/db";

pub(super) fn key() -> Fingerprint {
    "SHA256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".parse().unwrap()
}

/// Opens the store of the tests, whose segments hold a handful of blocks.
pub(super) fn open(root: &Path, disk: Disk) -> Result<Replica, ReplicaError> {
    open_within(root, disk, None)
}

/// As [`open`], with so much space for the client.
pub(super) fn open_within(root: &Path, disk: Disk, space_max_bytes: Option<u64>) -> Result<Replica, ReplicaError> {
    open_with(root, disk, client(space_max_bytes), 14_000)
}

/// As [`open`], with a client and segments of other sizes.
pub(super) fn open_with(root: &Path, disk: Disk, client: ClientConfig, segment_bytes: u64) -> Result<Replica, ReplicaError> {
    Replica::open(&root.join("store"), disk, vec![client], Limits { segment_bytes, ..Limits::default() })
}

pub(super) fn client(space_max_bytes: Option<u64>) -> ClientConfig {
    ClientConfig {
        name: "a".parse().unwrap(),
        key: key(),
        groups: None,
        space_max_bytes,
        group_space_max_bytes: Default::default(),
        handback: true,
        retention: Default::default(),
    }
}

/// One epoch as bytes.
pub(super) struct EpochBytes {
    pub(super) point: Point,
    pub(super) passes: Vec<Vec<u8>>,
    pub(super) seal: Vec<u8>,
}

/// What the volumes hold.
pub(super) type Volumes = [Vec<u8>; 2];

#[derive(Clone)]
pub(super) struct Primary {
    pub(super) generation: Generation,
    pub(super) committed: EpochId,
    pub(super) now: Volumes,
    /// What its clock shows; 0: the number of the epoch.
    pub(super) clock_unix_us: u64,
    frames: u64,
    rng: rand::rngs::SmallRng,
}

impl Primary {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            generation: Generation(1),
            committed: EpochId(0),
            now: SIZES.map(|bytes| vec![0; bytes]),
            clock_unix_us: 0,
            frames: 0,
            rng: rand::rngs::SmallRng::seed_from_u64(seed),
        }
    }

    pub(super) fn hello(&self) -> Vec<u8> {
        let volume = |(name, bytes): (&str, usize)| VolumeHello { name: name.parse().unwrap(), size_bytes: bytes as u64 };
        Message::Hello(Hello {
            version_min: 1,
            version_max: 1,
            block_bytes: BLOCK as u32,
            interval_ms: 1,
            group: "db".parse().unwrap(),
            generation: self.generation,
            committed: self.committed,
            volumes: ["root", "data"].into_iter().zip(SIZES).map(volume).collect(),
        })
        .encode()
    }

    /// Changes the volumes and packs the changes as the next epoch: one pass for each number of frames.
    pub(super) fn epoch(&mut self, passes: &[usize]) -> EpochBytes {
        let epoch = self.committed.next();
        let (mut tally, mut streams) = (Tally::default(), Vec::new());
        for (number, frames) in passes.iter().enumerate() {
            let kind = if number + 1 == passes.len() { PassKind::Frozen } else { PassKind::Fuzzy };
            let mut stream = PassHeader { epoch, pass: number as u16, kind, continued: false }.encode().to_vec();
            for _ in 0..*frames {
                let frame = self.frame(epoch, number as u16);
                let volume = Frame::decode(&frame, BLOCKS[0].max(BLOCKS[1])).unwrap();
                let blocks = volume.extents.iter().map(|e| u64::from(e.blocks)).sum();
                let (data, zero) = if volume.header.kind == FrameKind::Data { (blocks, 0) } else { (0, blocks) };
                tally.add(frame.first_chunk::<FRAME_HEADER_BYTES>().unwrap(), frame.len(), data, zero);
                stream.extend(frame);
            }
            streams.push(stream);
        }
        let seal = Seal {
            passes: passes.len() as u32,
            epoch,
            generation: self.generation,
            cut_unix_us: if self.clock_unix_us == 0 { epoch.0 } else { self.clock_unix_us },
            frames: tally.frames,
            frame_bytes: tally.frame_bytes,
            data_blocks: tally.data_blocks,
            zero_blocks: tally.zero_blocks,
            first_write_unix_us: 0,
            session: proto::SessionToken::default(),
            digest: tally.digest(),
        };
        EpochBytes { point: seal.point(), passes: streams, seal: Message::Seal(seal).encode() }
    }

    fn frame(&mut self, epoch: EpochId, pass: u16) -> Vec<u8> {
        let volume = self.rng.random_range(0..2_usize);
        let start = self.rng.random_range(0..BLOCKS[volume]);
        // Every fourth frame is zeroes of one or two blocks; the others are one block, 2 KiB as LZ4.
        self.frames += 1;
        let zero = self.frames.is_multiple_of(4);
        let blocks = if zero { self.rng.random_range(1..=2.min(BLOCKS[volume] - start)) } else { 1 };
        let extents = [BlockExtent { start: BlockIndex(start), blocks: blocks as u32 }];
        let (from, end) = (start as usize * BLOCK, (start + blocks) as usize * BLOCK);
        let mut content = vec![0; end - from];
        if !zero {
            // Half of a block is noise, so that frames are of several sectors.
            for block in content.chunks_mut(BLOCK) {
                self.rng.fill_bytes(&mut block[..BLOCK / 2]);
            }
        }
        let end = end.min(SIZES[volume]);
        self.now[volume][from..end].copy_from_slice(&content[..end - from]);
        let index = VolumeIndex(volume as u16);
        if zero {
            return encode_zero(index, epoch, pass, &extents);
        }
        encode_data(index, epoch, pass, &extents, &content, Codec::Lz4)
    }
}

/// What is left of an epoch behind its first `frames` frames, which are at least one.
pub(super) fn rest_of(epoch: &EpochBytes, frames: u64) -> EpochBytes {
    let mut skip = frames;
    let mut passes = Vec::new();
    for pass in &epoch.passes {
        let (head, mut rest) = pass.split_first_chunk::<PASS_HEADER_BYTES>().unwrap();
        let mut header = PassHeader::decode(head).unwrap();
        while let (1.., Some(head)) = (skip, rest.first_chunk::<FRAME_HEADER_BYTES>()) {
            rest = &rest[FrameHeader::decode(head).unwrap().frame_bytes()..];
            skip -= 1;
            header.continued = skip == 0;
        }
        if skip == 0 {
            passes.push([header.encode().as_slice(), rest].concat());
        }
    }
    EpochBytes { point: epoch.point, passes, seal: epoch.seal.clone() }
}

/// Says hello; the newest commit and what is there of the next epoch if the replica lets it in, else what it says.
pub(super) fn welcome(replica: &mut Replica, primary: &Primary) -> Result<(SessionNo, Option<Point>, Option<Staged>), String> {
    let session = replica.connect(key()).unwrap();
    replica.control(session, &primary.hello());
    match messages(replica, session).as_slice() {
        [Ok(Message::Welcome { committed, staged, .. })] => Ok((session, *committed, *staged)),
        other => Err(format!("{other:?}")),
    }
}

/// As [`welcome`], without what is there of the next epoch.
pub(super) fn greet(replica: &mut Replica, primary: &Primary) -> Result<(SessionNo, Option<Point>), String> {
    welcome(replica, primary).map(|(session, committed, _)| (session, committed))
}

/// Sends passes, `cut` bytes at a time.
pub(super) fn send_passes(replica: &mut Replica, session: SessionNo, epoch: &EpochBytes, cut: usize) {
    for pass in &epoch.passes {
        let stream = replica.pass_open(session);
        for piece in pass.chunks(cut) {
            replica.pass_data(session, stream, piece);
        }
        replica.pass_end(session, stream);
    }
}

/// Sends an epoch; whether it was answered as committed.
pub(super) fn send(replica: &mut Replica, session: SessionNo, epoch: &EpochBytes) -> Result<(), String> {
    send_passes(replica, session, epoch, 3000);
    replica.control(session, &epoch.seal);
    let mut answers = messages(replica, session);
    answers.retain(|answer| !matches!(answer, Ok(Message::Staged { .. })));
    match answers.as_slice() {
        [Ok(Message::Committed { point })] if *point == epoch.point => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

/// What a session's primary got: messages, and at the end the reason of a close.
pub(super) fn messages(replica: &mut Replica, session: SessionNo) -> Vec<Result<Message, (u16, String)>> {
    let of = |(number, output): (SessionNo, Output)| match output {
        _ if number != session => None,
        Output::Control(bytes) => Some(Ok(Message::decode(&bytes[4..]).unwrap())),
        Output::Closed { code, reason } => Some(Err((code, reason))),
        Output::PassOpen | Output::PassData(_) | Output::PassEnd | Output::Sealing { .. } => None,
    };
    replica.outputs().into_iter().filter_map(of).collect()
}

/// All volumes at every point, through the views.
pub(super) fn read_all(replica: &Replica) -> Result<BTreeMap<Point, Volumes>, ReplicaError> {
    let points = replica.points(GROUP)?;
    points.into_iter().map(|point| Ok((point, read_at(replica, point)?))).collect()
}

pub(super) fn read_at(replica: &Replica, point: Point) -> Result<Volumes, ReplicaError> {
    let views = replica.views(GROUP, point)?;
    let mut volumes = SIZES.map(|bytes| vec![0xee; bytes]);
    for (view, bytes) in views.iter().zip(&mut volumes) {
        view.read_now(0, bytes)?;
    }
    Ok(volumes)
}
