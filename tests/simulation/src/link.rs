//! A connection between the two sites: ordered streams whose bytes arrive in pieces of any size, each stream in its own time.

use std::collections::VecDeque;

use proto::SessionToken;
use rand::Rng;
use rand::rngs::SmallRng;

use crate::recovery::{Replica, SessionNo, StreamNo};

/// A pass on its way.
#[derive(Debug, Default)]
struct Stream {
    number: Option<StreamNo>,
    bytes: VecDeque<u8>,
    ended: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) session: SessionNo,
    pub(crate) token: SessionToken,
    to_receiver: VecDeque<u8>,
    streams: VecDeque<Stream>,
    to_primary: VecDeque<u8>,
    /// The receiver closed it; what it said before still arrives.
    pub(crate) closed: bool,
}

fn piece(bytes: &mut VecDeque<u8>, rng: &mut SmallRng) -> Vec<u8> {
    let all = bytes.len();
    let length = if rng.random_bool(0.7) { all } else { rng.random_range(1..=all) };
    bytes.drain(..length).collect()
}

impl Link {
    pub(crate) fn new(session: SessionNo, token: SessionToken) -> Self {
        let (to_receiver, streams, to_primary) = Default::default();
        Self { session, token, to_receiver, streams, to_primary, closed: false }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.to_receiver.extend(bytes);
    }

    pub(crate) fn open(&mut self) {
        self.streams.push_back(Stream::default());
    }

    pub(crate) fn data(&mut self, bytes: &[u8]) {
        if let Some(stream) = self.streams.back_mut() {
            stream.bytes.extend(bytes);
        }
    }

    pub(crate) fn end(&mut self) {
        if let Some(stream) = self.streams.back_mut() {
            stream.ended = true;
        }
    }

    pub(crate) fn answer(&mut self, bytes: &[u8]) {
        self.to_primary.extend(bytes);
    }

    /// Whether nothing is under way.
    pub(crate) fn is_quiet(&self) -> bool {
        self.to_receiver.is_empty() && self.to_primary.is_empty() && self.streams.iter().all(|s| s.bytes.is_empty() && !s.ended)
    }

    /// Bytes for the primary, if there are any.
    pub(crate) fn take_answer(&mut self, rng: &mut SmallRng) -> Option<Vec<u8>> {
        (!self.to_primary.is_empty()).then(|| piece(&mut self.to_primary, rng))
    }

    /// Delivers something to the receiver, if there is anything.
    pub(crate) fn deliver(&mut self, replica: &mut Replica, rng: &mut SmallRng) {
        let streams = self.streams.len();
        let choice = rng.random_range(0..=streams);
        if choice == streams {
            if !self.to_receiver.is_empty() {
                replica.control(self.session, &piece(&mut self.to_receiver, rng));
            }
            return;
        }
        // Streams become known in the order in which they were opened.
        for stream in self.streams.iter_mut().take(choice + 1).filter(|s| s.number.is_none()) {
            stream.number = Some(replica.pass_open(self.session));
        }
        let stream = &mut self.streams[choice];
        let Some(number) = stream.number else { return };
        if !stream.bytes.is_empty() {
            replica.pass_data(self.session, number, &piece(&mut stream.bytes, rng));
        } else if stream.ended {
            replica.pass_end(self.session, number);
            self.streams.remove(choice);
        }
    }
}
