//! The data phase of one connection: one task that receives, starts requests, and sends.
//!
//! Requests that the device can do at once (`try_read`, `try_write`) are done where they are parsed, with the payload still in the
//! receive buffer and the answer straight in the send buffer. Others become futures of this task. Ready
//! replies leave together. Nothing here blocks or takes a lock per request.
//!
//! Invariants: requests and bytes in flight stay within their limits (the socket is not read when they are full, so
//! the client waits); a request that was started runs to its end, also when the client is gone.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::{Either, select};
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::error::{ConnectionError, Errno, ProtocolError};
use super::execute::{Outcome, execute};
use super::inbox::Inbox;
use super::linger::Linger;
use super::outbox::{IOVECS_MAX, Outbox};
use super::pool::Pool;
use super::reply;
use super::request::{RawRequest, Terms, ValidRequest};
use super::socket::Stream;
use super::stats::Counters;
use super::wire::{CHUNK_FLAG_DONE, REQUEST_BYTES};
use crate::uring::submit_pending;
use crate::{BlockDevice, Buf};

/// Requests of one connection that wait for the device. When full, the socket is not read until one is done.
pub(super) const REQUESTS_IN_FLIGHT_MAX: usize = 256;
/// Bytes of payloads and unsent replies of one connection; same effect when full. A single request always fits.
pub(super) const BYTES_IN_FLIGHT_MAX: usize = 32 << 20;

/// Requests handled before other tasks of the thread get a turn.
const REQUESTS_PER_TURN: u32 = 128;
/// Replies collected before they are sent although more requests wait: the client works on these meanwhile.
const REPLIES_PER_SEND: u32 = 16;
/// Payloads up to this many bytes are written whole from the receive buffer; longer ones leave it in pieces of at least as much, so
/// that each piece is written while the processor's cache still holds it. What the device cannot take at once is
/// received into a buffer of its own.
const INLINE_PAYLOAD_BYTES_MAX: usize = 64 << 10;
/// Unsent reply bytes at which no further request is taken: data leave for the socket before the next are read, for the cache's
/// sake again.
const SEND_FIRST_BYTES: usize = 256 << 10;
/// A piece of a long write ends on a multiple of this, so that no page is written twice in part.
const PIECE_ALIGN_BYTES: u64 = 4096;

/// How long a client may take to accept its last replies when its connection is ended from this side.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

type Running = Pin<Box<dyn Future<Output = Finished>>>;

struct Finished {
    cookie: u64,
    held: usize,
    outcome: Outcome,
}

enum Receiving {
    Payload {
        cookie: u64,
        request: ValidRequest,
        buf: Buf,
        filled: usize,
    },
    /// What is left of a long write whose beginning was written from the inbox, piece by piece.
    Pieces {
        cookie: u64,
        offset: u64,
        left: usize,
        fua: bool,
    },
    /// The payload of a refused write.
    Skip {
        left: usize,
    },
}

/// What parsing came to.
enum Parsed {
    /// A request was taken.
    One,
    /// A long read was started: it is looked at, and perhaps sent, before more requests are taken.
    LongRead,
    /// More bytes are needed, or there is no room for more requests.
    Wait,
    Disconnect,
}

pub(super) struct Connection {
    stream: Stream,
    device: Arc<dyn BlockDevice>,
    terms: Terms,
    inbox: Inbox,
    receiving: Option<Receiving>,
    running: FuturesUnordered<Running>,
    /// Payload bytes of `running`.
    held: usize,
    outbox: Outbox,
    replies_unsent: u32,
    pool: Rc<Pool>,
    counters: Arc<Counters>,
    linger: Linger,
    /// No further requests are taken; the connection ends when all is answered.
    draining: bool,
    /// Replies are dropped: the socket failed.
    unreachable: bool,
    failure: Option<ConnectionError>,
}

impl Connection {
    pub(super) fn new(stream: Stream, device: Arc<dyn BlockDevice>, terms: Terms, counters: Arc<Counters>) -> Self {
        Self {
            stream,
            device,
            terms,
            inbox: Inbox::new(),
            receiving: None,
            running: FuturesUnordered::new(),
            held: 0,
            outbox: Outbox::default(),
            replies_unsent: 0,
            pool: Rc::new(Pool::default()),
            counters,
            linger: Linger::new(),
            draining: false,
            unreachable: false,
            failure: None,
        }
    }

    /// Serves until the client disconnects, `stop` resolves, or something fails.
    pub(super) async fn serve(mut self, stop: impl Future<Output = ()>) -> Result<(), ConnectionError> {
        let result = {
            let serving = std::future::poll_fn(|cx| {
                let polled = self.poll_serve(cx);
                self.publish();
                polled
            });
            // The stop first: what a client sent while its disk hung is not begun once the server has ended.
            match select(std::pin::pin!(stop), serving).await {
                Either::Left(((), _)) => self.finish().await,
                Either::Right((result, _)) => result,
            }
        };
        // A client that does not take the last bytes is not waited for.
        let closing = std::future::poll_fn(|cx| Pin::new(&mut self.stream).poll_shutdown(cx));
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, closing).await;
        result
    }

    /// Takes no further requests and answers those that were taken; a client that does not read its replies loses them.
    async fn finish(&mut self) -> Result<(), ConnectionError> {
        self.drain();
        if let Ok(result) = tokio::time::timeout(DRAIN_TIMEOUT, std::future::poll_fn(|cx| self.poll_serve(cx))).await {
            return result;
        }
        self.fail(ConnectionError::DrainTimeout);
        std::future::poll_fn(|cx| self.poll_serve(cx)).await
    }

    fn drain(&mut self) {
        self.draining = true;
        self.receiving = None;
    }

    /// The client cannot be reached any more; what was started still runs to its end.
    fn fail(&mut self, error: ConnectionError) {
        self.drain();
        self.unreachable = true;
        self.outbox = Outbox::default();
        self.failure.get_or_insert(error);
    }

    fn publish(&self) {
        use std::sync::atomic::Ordering::Relaxed;
        self.counters.requests_in_flight.store(self.running.len() as u64, Relaxed);
        self.counters.bytes_in_flight.store((self.held + self.outbox.bytes()) as u64, Relaxed);
    }

    fn poll_serve(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        let mut turns = REQUESTS_PER_TURN;
        loop {
            let mut progress = self.poll_running(cx);
            while !self.draining && turns > 0 && self.replies_unsent < REPLIES_PER_SEND && self.outbox.bytes() < SEND_FIRST_BYTES
            {
                match self.parse() {
                    Ok(Parsed::One) => turns -= 1,
                    Ok(Parsed::LongRead) => {
                        turns -= 1;
                        progress = true;
                        break;
                    }
                    Ok(Parsed::Wait) => break,
                    Ok(Parsed::Disconnect) => self.drain(),
                    Err(error) => {
                        // The requests before it were fine: they are finished and answered.
                        self.drain();
                        self.failure.get_or_insert(error.into());
                    }
                }
                progress = true;
            }
            progress |= self.poll_send(cx);
            if self.draining {
                if self.running.is_empty() && self.outbox.is_empty() {
                    return Poll::Ready(self.failure.take().map_or(Ok(()), Err));
                }
            } else {
                progress |= self.poll_receive(cx);
            }
            if !progress && !self.draining && self.running.is_empty() {
                progress = self.linger();
            }
            if !progress {
                return Poll::Pending;
            }
            if turns == 0 {
                // Sockets and the ring get their turn before this task has its next one.
                submit_pending();
                let mut turn = std::pin::pin!(tokio::task::yield_now());
                let _ = turn.as_mut().poll(cx);
                return Poll::Pending;
            }
        }
    }

    fn poll_running(&mut self, cx: &mut Context<'_>) -> bool {
        let mut progress = false;
        while let Poll::Ready(Some(finished)) = self.running.poll_next_unpin(cx) {
            self.held -= finished.held;
            progress = true;
            if !self.unreachable {
                self.answer(finished.cookie, finished.outcome);
            }
        }
        progress
    }

    fn answer(&mut self, cookie: u64, outcome: Outcome) {
        self.replies_unsent += 1;
        Counters::add(&self.counters.requests, 1);
        let structured = self.terms.structured;
        let out = &mut self.outbox;
        match outcome {
            Outcome::Done(buf) => {
                reply::done(out, cookie);
                if let Some(buf) = buf {
                    self.pool.give(buf);
                }
            }
            Outcome::Read { offset, data } => reply::read_whole(out, cookie, offset, data, structured),
            Outcome::Fragments { offset, fragments } => reply::read_fragments(out, cookie, offset, fragments),
            Outcome::Status { extents, one } => reply::block_status(out, cookie, &extents, one),
            Outcome::Failed { errno, chunk } => reply::failed(out, cookie, errno, chunk && structured),
        }
    }

    /// Takes one request from the inbox, if it and what is needed of its payload are there.
    fn parse(&mut self) -> Result<Parsed, ProtocolError> {
        match self.receiving.take() {
            None => {}
            Some(Receiving::Payload { cookie, request, buf, filled }) => {
                if filled < buf.len() {
                    self.receiving = Some(Receiving::Payload { cookie, request, buf, filled });
                    return Ok(Parsed::Wait);
                }
                self.held -= buf.len();
                self.start_write(cookie, request, buf);
                return Ok(Parsed::One);
            }
            Some(Receiving::Pieces { cookie, offset, left, fua }) => return Ok(self.take_piece(cookie, offset, left, fua)),
            Some(Receiving::Skip { left }) => {
                let skipped = left.min(self.inbox.unread().len());
                self.inbox.consume(skipped);
                if skipped < left {
                    self.receiving = Some(Receiving::Skip { left: left - skipped });
                    return Ok(Parsed::Wait);
                }
            }
        }
        let Some(header) = self.inbox.unread().first_chunk::<REQUEST_BYTES>() else { return Ok(Parsed::Wait) };
        let raw = RawRequest::parse(header)?;
        let payload_bytes = raw.payload_bytes()? as usize;
        let request = match raw.validate(&self.terms) {
            Ok(request) => request,
            Err(errno) => {
                self.inbox.consume(REQUEST_BYTES);
                if payload_bytes > 0 {
                    self.receiving = Some(Receiving::Skip { left: payload_bytes });
                }
                let chunk = matches!(raw.command, super::wire::CMD_READ | super::wire::CMD_BLOCK_STATUS);
                self.answer(raw.cookie, Outcome::Failed { errno, chunk });
                return Ok(Parsed::One);
            }
        };
        if !self.admits(&request) {
            return Ok(Parsed::Wait);
        }
        let cookie = raw.cookie;
        match request {
            ValidRequest::Disconnect => return Ok(Parsed::Disconnect),
            ValidRequest::Write { length, .. } if length > 0 => return Ok(self.take_write(cookie, request)),
            ValidRequest::Read { offset, length, .. } => {
                self.inbox.consume(REQUEST_BYTES);
                Counters::add(&self.counters.read_bytes, u64::from(length));
                if !self.read_at_once(cookie, offset, length) {
                    self.start(cookie, length as usize, request, None);
                    if length as usize > INLINE_PAYLOAD_BYTES_MAX {
                        return Ok(Parsed::LongRead);
                    }
                }
            }
            _ => {
                self.inbox.consume(REQUEST_BYTES);
                self.start(cookie, 0, request, None);
            }
        }
        Ok(Parsed::One)
    }

    fn admits(&self, request: &ValidRequest) -> bool {
        let cost = match request {
            ValidRequest::Read { length, .. } | ValidRequest::Write { length, .. } => *length as usize,
            _ => 0,
        };
        let bytes = self.held + self.outbox.bytes();
        self.running.len() < REQUESTS_IN_FLIGHT_MAX && (bytes == 0 || bytes + cost <= BYTES_IN_FLIGHT_MAX)
    }

    fn start(&mut self, cookie: u64, held: usize, request: ValidRequest, payload: Option<Buf>) {
        let work = execute(Arc::clone(&self.device), Rc::clone(&self.pool), request, payload);
        self.held += held;
        self.running.push(Box::pin(async move { Finished { cookie, held, outcome: work.await } }));
    }

    fn read_at_once(&mut self, cookie: u64, offset: u64, length: u32) -> bool {
        if length == 0 || length as usize > INLINE_PAYLOAD_BYTES_MAX {
            return false;
        }
        let (simple, data);
        let header: &[u8] = if self.terms.structured {
            data = reply::data_header(cookie, CHUNK_FLAG_DONE, offset, length);
            &data
        } else {
            simple = reply::simple_header(cookie, 0);
            &simple
        };
        let device = &self.device;
        // An error takes the slow path too, which then reports it.
        let filled = self.outbox.push_with(header, length as usize, |space| device.try_read(offset, space)?.ok());
        if filled.is_some() {
            self.replies_unsent += 1;
            Counters::add(&self.counters.requests, 1);
        }
        filled.is_some()
    }

    /// A write whose header is at the front of the inbox.
    fn take_write(&mut self, cookie: u64, request: ValidRequest) -> Parsed {
        let ValidRequest::Write { offset, length, fua } = request else { return Parsed::Wait };
        let length = length as usize;
        let here = &self.inbox.unread()[REQUEST_BYTES..];
        if let Some(data) = here.get(..length) {
            let at_once = if fua { None } else { self.device.try_write(offset, data) };
            Counters::add(&self.counters.written_bytes, length as u64);
            match at_once {
                Some(Ok(())) => self.answer(cookie, Outcome::Done(None)),
                Some(Err(error)) => {
                    self.answer(cookie, Outcome::Failed { errno: Errno::of(&error), chunk: false });
                }
                None => {
                    let mut buf = self.pool.take(length);
                    buf.copy_from_slice(data);
                    self.start(cookie, length, request, Some(buf));
                }
            }
            self.inbox.consume(REQUEST_BYTES + length);
            return Parsed::One;
        }
        if length <= INLINE_PAYLOAD_BYTES_MAX {
            return Parsed::Wait;
        }
        self.inbox.consume(REQUEST_BYTES);
        self.take_piece(cookie, offset, length, fua)
    }

    /// Writes what the inbox has of a long write whose next byte goes to `offset`.
    ///
    /// A client that goes away in the middle leaves the write in part, as a machine does that loses power: it had no answer.
    fn take_piece(&mut self, cookie: u64, offset: u64, left: usize, fua: bool) -> Parsed {
        let here = self.inbox.unread();
        let mut piece = here.len().min(left);
        if piece < left {
            // The inbox has room for more than the least piece and an unaligned end of it.
            if piece < INLINE_PAYLOAD_BYTES_MAX {
                self.receiving = Some(Receiving::Pieces { cookie, offset, left, fua });
                return Parsed::Wait;
            }
            piece -= ((offset + piece as u64) % PIECE_ALIGN_BYTES) as usize;
        }
        match self.device.try_write(offset, &here[..piece]) {
            Some(Ok(())) => {
                Counters::add(&self.counters.written_bytes, piece as u64);
                self.inbox.consume(piece);
                let (offset, left) = (offset + piece as u64, left - piece);
                if left > 0 {
                    self.receiving = Some(Receiving::Pieces { cookie, offset, left, fua });
                } else if fua {
                    self.start(cookie, 0, ValidRequest::Flush, None);
                } else {
                    self.answer(cookie, Outcome::Done(None));
                }
            }
            Some(Err(error)) => {
                self.answer(cookie, Outcome::Failed { errno: Errno::of(&error), chunk: false });
                self.receiving = Some(Receiving::Skip { left });
            }
            None => {
                let filled = here.len().min(left);
                let mut buf = self.pool.take(left);
                buf[..filled].copy_from_slice(&here[..filled]);
                self.inbox.consume(filled);
                self.held += left;
                // Bounded by the length of a request, 32 bits.
                let request = ValidRequest::Write { offset, length: left as u32, fua };
                self.receiving = Some(Receiving::Payload { cookie, request, buf, filled });
            }
        }
        Parsed::One
    }

    /// A write whose payload was received into its own buffer.
    fn start_write(&mut self, cookie: u64, request: ValidRequest, buf: Buf) {
        let ValidRequest::Write { offset, fua, .. } = request else { return };
        Counters::add(&self.counters.written_bytes, buf.len() as u64);
        let at_once = if fua { None } else { self.device.try_write(offset, &buf) };
        match at_once {
            Some(Ok(())) => self.answer(cookie, Outcome::Done(Some(buf))),
            Some(Err(error)) => self.answer(cookie, Outcome::Failed { errno: Errno::of(&error), chunk: false }),
            None => self.start(cookie, buf.len(), request, Some(buf)),
        }
    }

    /// Looks at the socket a little longer before the thread sleeps. True if something came.
    fn linger(&mut self) -> bool {
        let Stream::Plain(socket) = &self.stream else { return false };
        if self.receiving.is_some() || !self.inbox.unread().is_empty() {
            return false;
        }
        submit_pending();
        let room = self.inbox.room();
        let mut received = 0;
        self.linger.look(|| {
            received = socket.recv_now(room);
            received > 0
        });
        self.linger.moved(received);
        self.inbox.received(received);
        received > 0
    }

    /// Receives into the payload under way or the inbox. False if nothing came or there is no room.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> bool {
        let (space, filled) = match &mut self.receiving {
            Some(Receiving::Payload { buf, filled, .. }) => (&mut buf[*filled..], Some(filled)),
            _ => (self.inbox.room(), None),
        };
        if space.is_empty() {
            return false;
        }
        let mut space = ReadBuf::new(space);
        let polled = Pin::new(&mut self.stream).poll_read(cx, &mut space);
        let received = space.filled().len();
        self.linger.moved(received);
        match polled {
            Poll::Pending => return false,
            Poll::Ready(Err(error)) => self.fail(error.into()),
            Poll::Ready(Ok(())) if received == 0 => {
                let truncated = self.receiving.is_some() || !self.inbox.unread().is_empty();
                self.drain();
                if truncated {
                    self.failure.get_or_insert(ProtocolError::Truncated.into());
                }
            }
            Poll::Ready(Ok(())) => match filled {
                Some(filled) => *filled += received,
                None => self.inbox.received(received),
            },
        }
        true
    }

    /// Sends what waits, as far as the socket takes it. True if anything left.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> bool {
        let mut progress = false;
        while !self.outbox.is_empty() {
            let mut slices = [IoSlice::new(&[]); IOVECS_MAX];
            let count = self.outbox.fill_slices(&mut slices);
            match Pin::new(&mut self.stream).poll_write_vectored(cx, &slices[..count]) {
                Poll::Pending => return progress,
                Poll::Ready(Ok(0)) => self.fail(io::Error::from(io::ErrorKind::WriteZero).into()),
                Poll::Ready(Ok(n)) => {
                    self.linger.moved(n);
                    self.outbox.advance(n, &self.pool);
                }
                Poll::Ready(Err(error)) => self.fail(error.into()),
            }
            progress = true;
        }
        self.replies_unsent = 0;
        // A TLS stream keeps records until it is flushed; nothing to do on a plain socket.
        if let Poll::Ready(Err(error)) = Pin::new(&mut self.stream).poll_flush(cx) {
            self.fail(error.into());
            progress = true;
        }
        progress
    }
}
