//! Reads a disk of an NBD server from its beginning to its end, without its holes.
//!
//! Several reads are under way at once; structured replies bring holes as holes, so a sparse disk costs what is on it and a few requests. Bounds:
//! [`READS_MAX`] reads of [`PIECE_BYTES`]; no length from the server is believed beyond what was asked for.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Bytes of a read.
pub(super) const PIECE_BYTES: u64 = 1 << 20;
/// Reads under way at once.
const READS_MAX: usize = 8;
/// A hole up to this long is read with the data around it.
const GAP_BYTES: u64 = 256 << 10;
/// How far one question for holes looks.
const LOOK_BYTES: u64 = 1 << 30;
/// A server that has not answered by then hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const CLIENT_FLAGS: u32 = 0b11;
const OPTION_GO: u32 = 7;
const OPTION_STRUCTURED: u32 = 8;
const OPTION_META: u32 = 10;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const CONTEXT: &str = "base:allocation";
const CMD_READ: u16 = 0;
const CMD_DISCONNECT: u16 = 2;
const CMD_BLOCK_STATUS: u16 = 7;
const CHUNK_DONE: u16 = 1;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = 1 << 15;
const STATE_ZERO: u32 = 2;
/// Longest reply but that to a read, in bytes.
const REPLY_BYTES_MAX: u32 = 64 << 10;

/// Content of the disk.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) content: Vec<u8>,
}

/// The disk, as far as it was not read yet.
#[derive(Debug)]
pub(super) struct Source {
    stream: UnixStream,
    cookie: u64,
    size: u64,
    /// How far holes were looked for.
    looked: u64,
    /// Data before that which was not asked for yet, in order.
    data: VecDeque<Range<u64>>,
    /// Cookies of reads under way, in the order of their offsets.
    order: VecDeque<u64>,
    /// Reads by cookie; whether all of one has come.
    reads: BTreeMap<u64, (Piece, bool)>,
}

fn nonsense() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the server's reply makes no sense")
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
    pub(super) fn connect(socket: &Path, export: &str) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        let mut source =
            Self { stream, cookie: 0, size: 0, looked: 0, data: VecDeque::new(), order: VecDeque::new(), reads: BTreeMap::new() };
        if source.u64()? != NBD_MAGIC || source.u64()? != OPTION_MAGIC {
            return Err(io::Error::other("not an NBD server"));
        }
        source.take::<2>()?;
        source.stream.write_all(&CLIENT_FLAGS.to_be_bytes())?;
        source.option(OPTION_STRUCTURED, &[])?;
        let text = |text: &str| [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat();
        source.option(OPTION_META, &[text(export), 1_u32.to_be_bytes().to_vec(), text(CONTEXT)].concat())?;
        source.option(OPTION_GO, &[text(export), vec![0, 0]].concat())?;
        Ok(source)
    }

    /// Bytes of the disk.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Where the piece begins that comes next.
    pub(super) fn at(&self) -> u64 {
        self.order.front().and_then(|cookie| self.reads.get(cookie)).map_or(self.looked, |(piece, _)| piece.offset)
    }

    /// The next piece that is no hole; `None` at the end of the disk.
    pub(super) fn next(&mut self) -> io::Result<Option<Piece>> {
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
        while self.data.is_empty() && self.looked < self.size {
            let bytes = LOOK_BYTES.min(self.size - self.looked);
            let cookie = self.request(CMD_BLOCK_STATUS, self.looked, bytes as u32)?;
            for (bytes, is_zero) in self.extents(cookie)? {
                let run = self.looked..self.looked.saturating_add(u64::from(bytes)).min(self.size);
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
        let cookie = self.request(CMD_READ, piece.start, bytes as u32)?;
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
            if chunk.bytes > REPLY_BYTES_MAX {
                return Err(nonsense());
            }
            let mut body = vec![0; chunk.bytes as usize];
            self.stream.read_exact(&mut body)?;
            if chunk.kind & CHUNK_ERROR != 0 {
                return Err(errno(&body));
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
        let magic = self.u32()?;
        let (flags, kind) = (u16::from_be_bytes(self.take()?), u16::from_be_bytes(self.take()?));
        let (cookie, bytes) = (self.u64()?, self.u32()?);
        if magic == CHUNK_MAGIC { Ok(Chunk { flags, kind, cookie, bytes }) } else { Err(nonsense()) }
    }

    /// Takes a part of the reply to a read.
    fn take_read(&mut self, chunk: &Chunk) -> io::Result<()> {
        let Self { stream, reads, .. } = self;
        let (piece, whole) = reads.get_mut(&chunk.cookie).ok_or_else(nonsense)?;
        let (begin, asked) = (piece.offset, piece.content.len() as u64);
        let place = |bytes: u64, at: u64| -> io::Result<Range<usize>> {
            let from = at.checked_sub(begin).ok_or_else(nonsense)?;
            let until = from.checked_add(bytes).filter(|end| *end <= asked).ok_or_else(nonsense)?;
            Ok(from as usize..until as usize)
        };
        let long = |stream: &mut UnixStream| -> io::Result<u64> {
            let mut bytes = [0; 8];
            stream.read_exact(&mut bytes)?;
            Ok(u64::from_be_bytes(bytes))
        };
        match chunk.kind {
            CHUNK_DATA => {
                let at = long(stream)?;
                let range = place(u64::from(chunk.bytes).checked_sub(8).ok_or_else(nonsense)?, at)?;
                stream.read_exact(piece.content.get_mut(range).ok_or_else(nonsense)?)?;
            }
            CHUNK_HOLE if chunk.bytes == 12 => {
                let at = long(stream)?;
                let mut bytes = [0; 4];
                stream.read_exact(&mut bytes)?;
                piece.content.get_mut(place(u64::from(u32::from_be_bytes(bytes)), at)?).ok_or_else(nonsense)?.fill(0);
            }
            kind if chunk.bytes <= REPLY_BYTES_MAX => {
                let mut body = vec![0; chunk.bytes as usize];
                stream.read_exact(&mut body)?;
                if kind & CHUNK_ERROR != 0 {
                    return Err(errno(&body));
                }
            }
            _ => return Err(nonsense()),
        }
        *whole = chunk.flags & CHUNK_DONE != 0;
        Ok(())
    }

    /// Asks for an option; the server must agree.
    fn option(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let mut out = OPTION_MAGIC.to_be_bytes().to_vec();
        out.extend_from_slice(&option.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
        self.stream.write_all(&out)?;
        loop {
            let (magic, of, kind, bytes) = (self.u64()?, self.u32()?, self.u32()?, self.u32()?);
            if magic != OPTION_REPLY_MAGIC || of != option || bytes > REPLY_BYTES_MAX {
                return Err(nonsense());
            }
            let mut body = vec![0; bytes as usize];
            self.stream.read_exact(&mut body)?;
            match kind {
                REPLY_ACK => return Ok(()),
                kind if kind & REPLY_ERROR != 0 => return Err(io::Error::other(format!("the server refused option {option}"))),
                REPLY_INFO => {
                    if let Some((kind, rest)) = body.split_first_chunk::<2>()
                        && u16::from_be_bytes(*kind) == INFO_EXPORT
                        && let Some(size) = rest.first_chunk::<8>()
                    {
                        self.size = u64::from_be_bytes(*size);
                    }
                }
                _ => {}
            }
        }
    }

    fn request(&mut self, command: u16, offset: u64, bytes: u32) -> io::Result<u64> {
        self.cookie += 1;
        let mut out = REQUEST_MAGIC.to_be_bytes().to_vec();
        out.extend_from_slice(&0_u16.to_be_bytes());
        out.extend_from_slice(&command.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(&bytes.to_be_bytes());
        self.stream.write_all(&out)?;
        Ok(self.cookie)
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.take().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> io::Result<u64> {
        self.take().map(u64::from_be_bytes)
    }
}

/// The error of a reply.
fn errno(body: &[u8]) -> io::Error {
    match body.first_chunk::<4>() {
        // NBD's numbers are those of Linux.
        Some(number) => io::Error::from_raw_os_error(u32::from_be_bytes(*number).cast_signed()),
        None => nonsense(),
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        // The server may be dead already.
        let _ = self.request(CMD_DISCONNECT, 0, 0);
    }
}
