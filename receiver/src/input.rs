//! The byte streams of a session, cut into what the core understands: messages, pass headers, frames.
//!
//! Always holds: however the bytes are cut into pieces, the core sees the same. Knows no sockets and no group; the driver
//! of the connection and the simulation both read through it.

use proto::pass::{PASS_HEADER_BYTES, PassHeader};
use proto::{DecodeError, Message};

use crate::batch::Assembler;
use crate::core::{Action, Core, Event, SessionError};

/// The control stream.
#[derive(Debug, Default)]
pub(crate) struct ControlInput {
    buffer: Vec<u8>,
}

impl ControlInput {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, if it is there. Its length is checked before it is waited for.
    pub(crate) fn next(&mut self) -> Result<Option<Message>, DecodeError> {
        let Some((prefix, rest)) = self.buffer.split_first_chunk::<4>() else { return Ok(None) };
        let len = Message::check_length(*prefix)?;
        let Some(body) = rest.get(..len) else { return Ok(None) };
        let message = Message::decode(body);
        self.buffer.drain(..4 + len);
        message.map(Some)
    }
}

/// The stream of a pass.
#[derive(Debug, Default)]
pub(crate) struct PassInput {
    header: Vec<u8>,
    begun: bool,
}

impl PassInput {
    /// Takes from `bytes`: the header to the core, frames to the assembler. Returns why the session ended, if it did. Stops behind the header if
    /// that asks for something, and when the assembler is full: the caller has to see to that before it comes back with the rest.
    pub(crate) fn take(
        &mut self,
        bytes: &mut &[u8],
        core: &mut Core,
        assembler: &mut Assembler,
        actions: &mut Vec<Action>,
    ) -> Option<SessionError> {
        if !self.begun {
            let (now, later) = bytes.split_at(bytes.len().min(PASS_HEADER_BYTES - self.header.len()));
            self.header.extend_from_slice(now);
            *bytes = later;
            let header = self.header.first_chunk::<PASS_HEADER_BYTES>()?;
            self.begun = true;
            let ended = match PassHeader::decode(header) {
                Ok(header) => core.handle(Event::Pass(header), actions),
                Err(error) => Some(core.fail(error.into(), actions)),
            };
            if ended.is_some() || !actions.is_empty() {
                return ended;
            }
        }
        let (now, later) = bytes.split_at(bytes.len().min(assembler.room()));
        *bytes = later;
        // Counted afterwards: the core cannot decide on a frame and count another at once.
        let mut arrived = Vec::new();
        let rules = &*core;
        let pushed = assembler.push::<SessionError>(now, &mut |header| rules.frame_begins(header), &mut |frame| {
            arrived.push((*frame.header, *frame.head, frame.blocks));
        });
        for (header, head, blocks) in arrived {
            core.frame_arrived(&header, &head, blocks);
        }
        pushed.err().map(|error| core.fail(error, actions))
    }

    /// The stream ended: whether that was between two frames.
    pub(crate) fn end(&self, assembler: &Assembler) -> Result<(), DecodeError> {
        if self.begun {
            return assembler.end();
        }
        Err(DecodeError::Truncated { what: "pass header", needed: PASS_HEADER_BYTES, left: 0 })
    }
}
