//! Reads a disk of an NBD server from its beginning to its end, without its holes.
//!
//! Several reads are under way at once; structured replies bring holes as holes, so a sparse disk costs what is on it and a few requests. Bounds:
//! [`READS_MAX`] reads of [`PIECE_BYTES`]; no length from the server is believed beyond what was asked for.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;

use super::{CMD_READ, Connection, counted, errno, nonsense};

/// Bytes of a read.
pub(crate) const PIECE_BYTES: u64 = 1 << 20;
/// Reads under way at once.
const READS_MAX: usize = 8;
/// A hole up to this long is read with the data around it.
const GAP_BYTES: u64 = 256 << 10;
/// How far one question for holes looks.
const LOOK_BYTES: u64 = 1 << 30;

const CHUNK_MAGIC: u32 = 0x668e_33ef;
const OPTION_STRUCTURED: u32 = 8;
const OPTION_META: u32 = 10;
const CONTEXT: &str = "base:allocation";
const CMD_BLOCK_STATUS: u16 = 7;
const CHUNK_DONE: u16 = 1;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = 1 << 15;
const STATE_ZERO: u32 = 2;

/// Content of the disk.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) offset: u64,
    pub(crate) content: Vec<u8>,
}

/// The disk, as far as it was not read yet.
#[derive(Debug)]
pub(crate) struct Source {
    connection: Connection,
    /// How far holes were looked for.
    looked: u64,
    /// Data before that which was not asked for yet, in order.
    data: VecDeque<Range<u64>>,
    /// Cookies of reads under way, in the order of their offsets.
    order: VecDeque<u64>,
    /// Reads by cookie; whether all of one has come.
    reads: BTreeMap<u64, (Piece, bool)>,
}

/// A part of a reply.
struct Chunk {
    flags: u16,
    kind: u16,
    cookie: u64,
    bytes: u32,
}

impl Source {
    /// Connects and chooses `export`.
    pub(crate) fn connect(socket: &Path, export: &str) -> io::Result<Self> {
        let mut connection = Connection::open(socket)?;
        connection.option(OPTION_STRUCTURED, &[])?;
        connection.option(OPTION_META, &[counted(export), 1_u32.to_be_bytes().to_vec(), counted(CONTEXT)].concat())?;
        connection.go(export)?;
        Ok(Self { connection, looked: 0, data: VecDeque::new(), order: VecDeque::new(), reads: BTreeMap::new() })
    }

    /// Bytes of the disk.
    pub(crate) fn size(&self) -> u64 {
        self.connection.size
    }

    /// Where the piece begins that comes next.
    pub(crate) fn at(&self) -> u64 {
        self.order.front().and_then(|cookie| self.reads.get(cookie)).map_or(self.looked, |(piece, _)| piece.offset)
    }

    /// The next piece that is no hole; `None` at the end of the disk.
    pub(crate) fn next(&mut self) -> io::Result<Option<Piece>> {
        loop {
            while self.order.len() < READS_MAX && self.find_data()? {
                self.ask()?;
            }
            let Some(cookie) = self.order.front() else { return Ok(None) };
            if self.reads.get(cookie).is_some_and(|(_, whole)| *whole) {
                let read = self.order.pop_front().and_then(|cookie| self.reads.remove(&cookie));
                return Ok(read.map(|(piece, _)| piece));
            }
            let chunk = self.chunk()?;
            self.take_read(&chunk)?;
        }
    }

    /// Whether there is data that was not asked for; looks for it.
    fn find_data(&mut self) -> io::Result<bool> {
        while self.data.is_empty() && self.looked < self.size() {
            let bytes = LOOK_BYTES.min(self.size() - self.looked);
            let cookie = self.connection.request(CMD_BLOCK_STATUS, self.looked, bytes as u32, &[])?;
            for (bytes, is_zero) in self.extents(cookie)? {
                let run = self.looked..self.looked.saturating_add(u64::from(bytes)).min(self.size());
                self.looked = run.end;
                match self.data.back_mut() {
                    _ if is_zero || run.is_empty() => {}
                    Some(last) if run.start - last.end <= GAP_BYTES => last.end = run.end,
                    _ => self.data.push_back(run),
                }
            }
        }
        Ok(!self.data.is_empty())
    }

    /// Asks for the next piece of what is data.
    fn ask(&mut self) -> io::Result<()> {
        let Some(run) = self.data.pop_front() else { return Ok(()) };
        let piece = run.start..run.end.min(run.start + PIECE_BYTES);
        if piece.end < run.end {
            self.data.push_front(piece.end..run.end);
        }
        let bytes = piece.end - piece.start;
        let cookie = self.connection.request(CMD_READ, piece.start, bytes as u32, &[])?;
        self.order.push_back(cookie);
        self.reads.insert(cookie, (Piece { offset: piece.start, content: vec![0; bytes as usize] }, false));
        Ok(())
    }

    /// The answer to a question for holes; replies to reads that come before it are taken.
    fn extents(&mut self, cookie: u64) -> io::Result<Vec<(u32, bool)>> {
        let mut found = Vec::new();
        loop {
            let chunk = self.chunk()?;
            if chunk.cookie != cookie {
                self.take_read(&chunk)?;
                continue;
            }
            let body = self.connection.body(chunk.bytes)?;
            if chunk.kind & CHUNK_ERROR != 0 {
                return Err(told(&body));
            }
            if chunk.kind == CHUNK_STATUS {
                let word = |b: &[u8]| b.first_chunk::<4>().map_or(0, |b| u32::from_be_bytes(*b));
                let entries = body.get(4..).unwrap_or_default().chunks_exact(8);
                found.extend(entries.map(|e| (word(e), word(e.get(4..).unwrap_or_default()) & STATE_ZERO != 0)));
            }
            if chunk.flags & CHUNK_DONE != 0 {
                // Without this a server that describes nothing would be asked for ever.
                return if found.iter().any(|(bytes, _)| *bytes > 0) { Ok(found) } else { Err(nonsense()) };
            }
        }
    }

    fn chunk(&mut self) -> io::Result<Chunk> {
        let line = &mut self.connection;
        let magic = line.u32()?;
        let (flags, kind) = (u16::from_be_bytes(line.take()?), u16::from_be_bytes(line.take()?));
        let (cookie, bytes) = (line.u64()?, line.u32()?);
        if magic == CHUNK_MAGIC { Ok(Chunk { flags, kind, cookie, bytes }) } else { Err(nonsense()) }
    }

    /// Takes a part of the reply to a read.
    fn take_read(&mut self, chunk: &Chunk) -> io::Result<()> {
        let Self { connection, reads, .. } = self;
        let (piece, whole) = reads.get_mut(&chunk.cookie).ok_or_else(nonsense)?;
        let (begin, asked) = (piece.offset, piece.content.len() as u64);
        let place = |bytes: u64, at: u64| -> io::Result<Range<usize>> {
            let from = at.checked_sub(begin).ok_or_else(nonsense)?;
            let until = from.checked_add(bytes).filter(|end| *end <= asked).ok_or_else(nonsense)?;
            Ok(from as usize..until as usize)
        };
        match chunk.kind {
            CHUNK_DATA => {
                let at = connection.u64()?;
                let range = place(u64::from(chunk.bytes).checked_sub(8).ok_or_else(nonsense)?, at)?;
                connection.stream.read_exact(piece.content.get_mut(range).ok_or_else(nonsense)?)?;
            }
            CHUNK_HOLE if chunk.bytes == 12 => {
                let at = connection.u64()?;
                let bytes = connection.u32()?;
                piece.content.get_mut(place(u64::from(bytes), at)?).ok_or_else(nonsense)?.fill(0);
            }
            kind => {
                let body = connection.body(chunk.bytes)?;
                if kind & CHUNK_ERROR != 0 {
                    return Err(told(&body));
                }
            }
        }
        *whole = chunk.flags & CHUNK_DONE != 0;
        Ok(())
    }
}

/// The error of a reply.
fn told(body: &[u8]) -> io::Error {
    body.first_chunk::<4>().map_or_else(nonsense, |number| errno(u32::from_be_bytes(*number)))
}
