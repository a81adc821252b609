//! The network between the two sites: a path with delay, a rate, partitions and connections that break, and one connection on it, with
//! ordered streams whose bytes arrive in pieces of any size, each stream in its own time.
//!
//! What it injects: a byte arrives no sooner than the path lets it (delay, and the rate that both directions have each for themselves); while
//! the path is cut nothing arrives; a connection on a flapping path carries so many bytes and no more. What it keeps: what
//! arrives of a stream is a prefix of what was sent, unchanged.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use proto::SessionToken;
use rand::Rng;
use rand::rngs::SmallRng;

use crate::primary::Primary;
use crate::recovery::{Replica, SessionNo, StreamNo};

/// What travels as one on a path that has a rate: a datagram.
const PACKET_BYTES: usize = 1400;

/// The path between the sites, for all connections of a run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Path {
    /// From one end to the other.
    pub(crate) delay: Duration,
    /// Bytes a second of virtual time, each way.
    pub(crate) bytes_per_s: Option<u64>,
    /// A connection carries so many bytes, both ways together, and breaks.
    pub(crate) bytes_per_connection: Option<u64>,
    /// Bytes that the primary may have under way; the rest waits in its own queue.
    pub(crate) window_bytes: Option<usize>,
    /// Until then nothing arrives.
    pub(crate) cut_until: Option<Instant>,
}

impl Path {
    pub(crate) fn is_cut(&self, now: Instant) -> bool {
        self.cut_until.is_some_and(|until| now < until)
    }
}

/// Bytes of one stream on their way, with the time at which they arrive.
#[derive(Debug, Default)]
struct Lane {
    packets: VecDeque<(Instant, usize)>,
    bytes: VecDeque<u8>,
}

impl Lane {
    fn push(&mut self, arrives: Instant, bytes: &[u8]) {
        self.bytes.extend(bytes);
        match self.packets.back_mut() {
            Some((at, length)) if *at == arrives => *length += bytes.len(),
            _ => self.packets.push_back((arrives, bytes.len())),
        }
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn next_arrival(&self) -> Option<Instant> {
        self.packets.front().map(|(at, _)| *at)
    }

    /// A piece of what has arrived; at most `left` bytes, which it is taken off.
    fn take(&mut self, now: Instant, left: &mut Option<u64>, rng: &mut SmallRng) -> Option<Vec<u8>> {
        let arrived: usize = self.packets.iter().take_while(|(at, _)| *at <= now).map(|(_, length)| length).sum();
        let most = left.map_or(arrived, |left| arrived.min(usize::try_from(left).unwrap_or(usize::MAX)));
        if most == 0 {
            return None;
        }
        let length = if rng.random_bool(0.7) { most } else { rng.random_range(1..=most) };
        if let Some(left) = left {
            *left -= length as u64;
        }
        let mut rest = length;
        while let Some((_, packet)) = self.packets.front_mut() {
            let taken = rest.min(*packet);
            (*packet, rest) = (*packet - taken, rest - taken);
            if *packet > 0 {
                break;
            }
            self.packets.pop_front();
        }
        Some(self.bytes.drain(..length).collect())
    }
}

/// A pass on its way.
#[derive(Debug, Default)]
struct Stream {
    number: Option<StreamNo>,
    /// The primary knows of it.
    opened: bool,
    lane: Lane,
    ended: bool,
}

/// One direction of a connection: its packets leave one after the other.
#[derive(Debug)]
struct Departures {
    free_at: Instant,
}

impl Departures {
    /// Puts `bytes` on the path.
    fn send(&mut self, path: &Path, now: Instant, bytes: &[u8], lane: &mut Lane) {
        let Some(rate) = path.bytes_per_s else { return lane.push(now + path.delay, bytes) };
        for packet in bytes.chunks(PACKET_BYTES) {
            self.free_at = self.free_at.max(now) + Duration::from_secs_f64(packet.len() as f64 / rate as f64);
            lane.push(self.free_at + path.delay, packet);
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) session: SessionNo,
    pub(crate) token: SessionToken,
    to_receiver: Lane,
    streams: VecDeque<Stream>,
    to_primary: Lane,
    /// Streams of the receiver, in a handback.
    back_streams: VecDeque<Stream>,
    there: Departures,
    back: Departures,
    /// Bytes that it still carries.
    left: Option<u64>,
    /// The receiver closed it; what it said before still arrives.
    pub(crate) closed: bool,
}

impl Link {
    pub(crate) fn new(session: SessionNo, token: SessionToken, path: &Path, now: Instant) -> Self {
        let (to_receiver, streams, to_primary, back_streams) = Default::default();
        let (there, back) = (Departures { free_at: now }, Departures { free_at: now });
        let (left, closed) = (path.bytes_per_connection, false);
        Self { session, token, to_receiver, streams, to_primary, back_streams, there, back, left, closed }
    }

    pub(crate) fn send(&mut self, path: &Path, now: Instant, bytes: &[u8]) {
        self.there.send(path, now, bytes, &mut self.to_receiver);
    }

    pub(crate) fn open(&mut self) {
        self.streams.push_back(Stream::default());
    }

    pub(crate) fn data(&mut self, path: &Path, now: Instant, bytes: &[u8]) {
        if let Some(stream) = self.streams.back_mut() {
            self.there.send(path, now, bytes, &mut stream.lane);
        }
    }

    pub(crate) fn end(&mut self) {
        if let Some(stream) = self.streams.back_mut() {
            stream.ended = true;
        }
    }

    pub(crate) fn answer(&mut self, path: &Path, now: Instant, bytes: &[u8]) {
        self.back.send(path, now, bytes, &mut self.to_primary);
    }

    pub(crate) fn answer_open(&mut self) {
        self.back_streams.push_back(Stream::default());
    }

    pub(crate) fn answer_data(&mut self, path: &Path, now: Instant, bytes: &[u8]) {
        if let Some(stream) = self.back_streams.back_mut() {
            self.back.send(path, now, bytes, &mut stream.lane);
        }
    }

    pub(crate) fn answer_end(&mut self) {
        if let Some(stream) = self.back_streams.back_mut() {
            stream.ended = true;
        }
    }

    /// Whether nothing is under way.
    pub(crate) fn is_quiet(&self) -> bool {
        let streams = self.streams.iter().chain(&self.back_streams).all(|s| s.lane.is_empty() && !s.ended);
        self.to_receiver.is_empty() && self.to_primary.is_empty() && streams
    }

    /// Bytes on their way to the receiver.
    pub(crate) fn under_way(&self) -> usize {
        self.to_receiver.bytes.len() + self.streams.iter().map(|s| s.lane.bytes.len()).sum::<usize>()
    }

    /// Whether it has carried all that it carries.
    pub(crate) fn is_used_up(&self) -> bool {
        self.left == Some(0)
    }

    /// When something arrives next.
    pub(crate) fn next_arrival(&self) -> Option<Instant> {
        let streams = self.streams.iter().chain(&self.back_streams).map(|s| &s.lane);
        let lanes = streams.chain([&self.to_receiver, &self.to_primary]);
        lanes.filter_map(Lane::next_arrival).min()
    }

    /// Delivers something to the primary. Whether anything had arrived there.
    pub(crate) fn deliver_back(&mut self, primary: &mut Primary, now: Instant, rng: &mut SmallRng) -> bool {
        let streams = self.back_streams.len();
        let choice = if streams == 0 { 0 } else { rng.random_range(0..=streams) };
        if choice == streams {
            let bytes = self.to_primary.take(now, &mut self.left, rng);
            if let Some(bytes) = &bytes {
                primary.control(now, bytes);
            }
            return bytes.is_some();
        }
        for stream in self.back_streams.iter_mut().take(choice + 1).filter(|s| !s.opened) {
            stream.opened = true;
            primary.pass_open();
        }
        let stream = &mut self.back_streams[choice];
        if let Some(bytes) = stream.lane.take(now, &mut self.left, rng) {
            primary.pass_data(now, choice, &bytes);
            return true;
        }
        let ends = stream.lane.is_empty() && stream.ended;
        if ends {
            self.back_streams.remove(choice);
            primary.pass_end(now, choice);
        }
        ends
    }

    /// Whether more may come for the primary.
    pub(crate) fn owes_answer(&self) -> bool {
        !self.to_primary.is_empty() || self.back_streams.iter().any(|s| !s.lane.is_empty())
    }

    /// Delivers something to the receiver, if anything has arrived there.
    pub(crate) fn deliver(&mut self, replica: &mut Replica, now: Instant, rng: &mut SmallRng) {
        let streams = self.streams.len();
        let choice = rng.random_range(0..=streams);
        if choice == streams {
            if let Some(bytes) = self.to_receiver.take(now, &mut self.left, rng) {
                replica.control(self.session, &bytes);
            }
            return;
        }
        // Streams become known in the order in which they were opened.
        for stream in self.streams.iter_mut().take(choice + 1).filter(|s| s.number.is_none()) {
            stream.number = Some(replica.pass_open(self.session));
        }
        let stream = &mut self.streams[choice];
        let Some(number) = stream.number else { return };
        if let Some(bytes) = stream.lane.take(now, &mut self.left, rng) {
            replica.pass_data(self.session, number, &bytes);
        } else if stream.lane.is_empty() && stream.ended {
            replica.pass_end(self.session, number);
            self.streams.remove(choice);
        }
    }
}
