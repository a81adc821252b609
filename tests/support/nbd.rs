//! A small NBD client: fixed newstyle over a unix socket, GO, simple replies. Written from the protocol's text and not from
//! the server under test, so that a mistake there is not made twice.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_WRITE_ZEROES: u16 = 6;
/// A server that does not answer is a failure, not a hang.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// A connection to one export.
#[derive(Debug)]
pub(crate) struct Nbd {
    stream: UnixStream,
    next: u64,
    /// Size of the export in bytes.
    pub(crate) size: u64,
}

fn protocol(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

fn be_u16(b: &[u8]) -> u16 {
    u16::from_be_bytes(b.try_into().expect("two bytes"))
}

fn be_u32(b: &[u8]) -> u32 {
    u32::from_be_bytes(b.try_into().expect("four bytes"))
}

fn be_u64(b: &[u8]) -> u64 {
    u64::from_be_bytes(b.try_into().expect("eight bytes"))
}

impl Nbd {
    /// Connects and chooses `export`.
    pub(crate) fn connect(socket: &Path, export: &str) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        stream.set_write_timeout(Some(ANSWER_WITHIN))?;
        let mut nbd = Self { stream, next: 1, size: 0 };
        let greeting = nbd.get::<18>()?;
        if &greeting[..8] != b"NBDMAGIC" || be_u64(&greeting[8..16]) != OPTION_MAGIC || be_u16(&greeting[16..]) & 1 == 0 {
            return Err(protocol("not a fixed newstyle server"));
        }
        // Fixed newstyle, no trailing zeroes.
        nbd.stream.write_all(&3_u32.to_be_bytes())?;
        let mut option = OPTION_MAGIC.to_be_bytes().to_vec();
        option.extend(OPT_GO.to_be_bytes());
        option.extend((export.len() as u32 + 6).to_be_bytes());
        option.extend((export.len() as u32).to_be_bytes());
        option.extend(export.as_bytes());
        option.extend(0_u16.to_be_bytes());
        nbd.stream.write_all(&option)?;
        loop {
            let header = nbd.get::<20>()?;
            if be_u64(&header[..8]) != REPLY_MAGIC || be_u32(&header[8..12]) != OPT_GO {
                return Err(protocol("not an answer to GO"));
            }
            let mut body = vec![0; be_u32(&header[16..20]).min(1 << 16) as usize];
            nbd.stream.read_exact(&mut body)?;
            match be_u32(&header[12..16]) {
                REP_ACK => return Ok(nbd),
                // INFO_EXPORT: size and flags.
                REP_INFO if body.len() == 12 && be_u16(&body[..2]) == 0 => nbd.size = be_u64(&body[2..10]),
                REP_INFO => {}
                refusal => return Err(protocol(format!("GO refused ({refusal:#x}): {}", String::from_utf8_lossy(&body)))),
            }
        }
    }

    fn get<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn request(&mut self, command: u16, offset: u64, length: u32, payload: &[u8]) -> io::Result<u64> {
        let cookie = self.next;
        self.next += 1;
        let mut request = Vec::with_capacity(28 + payload.len());
        request.extend(REQUEST_MAGIC.to_be_bytes());
        request.extend(0_u16.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(payload);
        self.stream.write_all(&request)?;
        Ok(cookie)
    }

    fn reply(&mut self, cookie: u64) -> io::Result<()> {
        let reply = self.get::<16>()?;
        if be_u32(&reply[..4]) != SIMPLE_REPLY_MAGIC || be_u64(&reply[8..]) != cookie {
            return Err(protocol("not the reply to the request"));
        }
        match be_u32(&reply[4..8]) {
            0 => Ok(()),
            // NBD's numbers are those of Linux.
            error => Err(io::Error::from_raw_os_error(error.cast_signed())),
        }
    }

    /// Reads; returns when the server has answered.
    pub(crate) fn read(&mut self, offset: u64, bytes: u32) -> io::Result<Vec<u8>> {
        let cookie = self.request(CMD_READ, offset, bytes, &[])?;
        self.reply(cookie)?;
        let mut content = vec![0; bytes as usize];
        self.stream.read_exact(&mut content)?;
        Ok(content)
    }

    /// Writes; returns when the server has acknowledged.
    pub(crate) fn write(&mut self, offset: u64, content: &[u8]) -> io::Result<()> {
        let cookie = self.request(CMD_WRITE, offset, content.len() as u32, content)?;
        self.reply(cookie)
    }

    /// Makes a range zero, which may become a hole; returns when the server has acknowledged.
    pub(crate) fn zero(&mut self, offset: u64, bytes: u32) -> io::Result<()> {
        let cookie = self.request(CMD_WRITE_ZEROES, offset, bytes, &[])?;
        self.reply(cookie)
    }

    /// Flushes; returns when the server has acknowledged.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        let cookie = self.request(CMD_FLUSH, 0, 0, &[])?;
        self.reply(cookie)
    }
}

/// Whether an error says that the server is gone, and not that it refused a request.
pub(crate) fn is_lost(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(error.kind(), K::UnexpectedEof | K::BrokenPipe | K::ConnectionReset | K::ConnectionRefused | K::NotFound)
}

impl Drop for Nbd {
    fn drop(&mut self) {
        let _ = self.request(CMD_DISC, 0, 0, &[]);
    }
}
