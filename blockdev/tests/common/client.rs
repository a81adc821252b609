//! A blocking NBD client that does what the test says, also what no honest client would.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const CACHE: u16 = 5;
pub const WRITE_ZEROES: u16 = 6;
pub const BLOCK_STATUS: u16 = 7;

pub const FUA: u16 = 1;
pub const NO_HOLE: u16 = 2;
pub const DF: u16 = 4;
pub const REQ_ONE: u16 = 8;
pub const FAST_ZERO: u16 = 16;

pub const EPERM: u32 = 1;
pub const EIO: u32 = 5;
pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;
pub const ENOTSUP: u32 = 95;

/// An option's replies: kind and payload.
pub type OptionReplies = Vec<(u32, Vec<u8>)>;

pub struct Client {
    pub stream: UnixStream,
    structured: bool,
    next_cookie: u64,
}

/// One whole answer to a request.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub cookie: u64,
    pub errno: u32,
    /// Data chunks and holes in the order they came: offset, and bytes or the length of the hole.
    pub chunks: Vec<(u64, Result<Vec<u8>, u32>)>,
    /// Length and flags.
    pub extents: Vec<(u32, u32)>,
}

impl Answer {
    /// The bytes of a read of `length` at `offset`; every byte must have come exactly once.
    pub fn data(&self, offset: u64, length: usize) -> Vec<u8> {
        assert_eq!(self.errno, 0);
        let mut data = vec![0; length];
        let mut seen = 0;
        for (at, chunk) in &self.chunks {
            let start = usize::try_from(at - offset).unwrap();
            match chunk {
                Ok(bytes) => data[start..start + bytes.len()].copy_from_slice(bytes),
                Err(hole) => assert!(start + *hole as usize <= length),
            }
            seen += chunk.as_ref().map_or_else(|hole| *hole as usize, Vec::len);
        }
        assert_eq!(seen, length);
        data
    }
}

impl Client {
    /// Reads the greeting and answers with `flags`.
    pub fn greet(socket: &Path, flags: u32) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut client = Self { stream, structured: false, next_cookie: 1 };
        assert_eq!(client.take(18), b"NBDMAGICIHAVEOPT\0\x03");
        client.send(&flags.to_be_bytes());
        client
    }

    /// In the data phase of export `name`.
    pub fn connect(socket: &Path, name: &str, structured: bool) -> Self {
        let mut client = Self::greet(socket, 3);
        if structured {
            assert_eq!(client.option(8, &[]), [(1, vec![])]);
            let query = [&string(name)[..], &1_u32.to_be_bytes(), &string("base:allocation")].concat();
            assert_eq!(client.option(10, &query).last(), Some(&(1, vec![])));
        }
        let replies = client.option(7, &[&string(name)[..], &[0, 0]].concat());
        assert_eq!(replies.last(), Some(&(1, vec![])), "GO failed");
        client.structured = structured;
        client
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn take(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// The server must close without sending more.
    pub fn expect_end(&mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => assert_eq!(rest, b"", "unexpected bytes before the end"),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
        }
    }

    pub fn send_option(&mut self, option: u32, length: u32, body: &[u8]) {
        self.send(&[b"IHAVEOPT", &option.to_be_bytes()[..], &length.to_be_bytes(), body].concat());
    }

    /// Sends an option and reads its replies up to the final one.
    pub fn option(&mut self, option: u32, body: &[u8]) -> OptionReplies {
        self.send_option(option, body.len() as u32, body);
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.take(8), 0x0003_e889_0455_65a9_u64.to_be_bytes());
            assert_eq!(self.u32(), option);
            let kind = self.u32();
            let length = self.u32() as usize;
            let payload = self.take(length);
            replies.push((kind, payload));
            if kind == 1 || kind >> 31 == 1 {
                return replies;
            }
        }
    }

    pub fn send_request(&mut self, command: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) -> u64 {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.send(&request(command, flags, cookie, offset, length, payload));
        cookie
    }

    /// Reads one whole answer; `length` is that of the read it may belong to, for simple replies.
    pub fn answer(&mut self, read_bytes: usize) -> Answer {
        let mut answer = Answer { cookie: 0, errno: 0, chunks: Vec::new(), extents: Vec::new() };
        loop {
            match self.u32() {
                0x6744_6698 => {
                    answer.errno = self.u32();
                    answer.cookie = self.u64();
                    if answer.errno == 0 && read_bytes > 0 {
                        assert!(!self.structured, "a simple reply to a read");
                        answer.chunks.push((0, Ok(self.take(read_bytes))));
                    }
                    return answer;
                }
                0x668e_33ef => assert!(self.structured, "a chunk that was not agreed on"),
                magic => panic!("reply starts with {magic:#x}"),
            }
            let (flags, kind) = (self.u16(), self.u16());
            answer.cookie = self.u64();
            let length = self.u32();
            match kind {
                0 => assert_eq!(length, 0),
                1 => {
                    let offset = self.u64();
                    let data = self.take(length as usize - 8);
                    answer.chunks.push((offset, Ok(data)));
                }
                2 => {
                    assert_eq!(length, 12);
                    let offset = self.u64();
                    let hole = self.u32();
                    answer.chunks.push((offset, Err(hole)));
                }
                5 => {
                    assert_eq!(self.u32(), 1);
                    for _ in 0..(length - 4) / 8 {
                        let extent = (self.u32(), self.u32());
                        answer.extents.push(extent);
                    }
                }
                0x8001 => {
                    answer.errno = self.u32();
                    let text = self.u16();
                    self.take(text.into());
                }
                kind => panic!("chunk of kind {kind}"),
            }
            if flags & 1 == 1 {
                return answer;
            }
        }
    }

    /// One request and its answer.
    pub fn call(&mut self, command: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) -> Answer {
        let cookie = self.send_request(command, flags, offset, length, payload);
        let mut answer = self.answer(if command == READ { length as usize } else { 0 });
        assert_eq!(answer.cookie, cookie);
        if !self.structured {
            answer.chunks.iter_mut().for_each(|chunk| chunk.0 = offset);
        }
        answer
    }

    pub fn read(&mut self, offset: u64, length: usize) -> Vec<u8> {
        self.call(READ, 0, offset, length as u32, &[]).data(offset, length)
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        assert_eq!(self.call(WRITE, 0, offset, data.len() as u32, data).errno, 0);
    }

    pub fn disconnect(mut self) {
        self.send_request(DISC, 0, 0, 0, &[]);
        self.expect_end();
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }
}

pub fn request(command: u16, flags: u16, cookie: u64, offset: u64, length: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}
