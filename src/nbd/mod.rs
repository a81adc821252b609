//! An NBD client over a unix socket, fixed newstyle: what an export reads a point with, and what the demo has in place of a guest.
//!
//! Owns the handshake and the words of the protocol; [`Disk`] does one request at a time, [`Source`] reads all of a disk without its holes. Always
//! holds: no length from the server is believed beyond its bound, and a server that does not answer is an error, not a hang.

mod disk;
mod source;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub(crate) use disk::Disk;
pub(crate) use source::{PIECE_BYTES, Piece, Source};

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const CLIENT_FLAGS: u32 = 0b11;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const CMD_READ: u16 = 0;
const CMD_DISCONNECT: u16 = 2;
/// Longest reply but that to a read, in bytes.
const REPLY_BYTES_MAX: u32 = 64 << 10;
/// A server that has not answered by then hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection to a server, for one export of it.
#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    cookie: u64,
    /// Bytes of the export, once it is chosen.
    size: u64,
}

fn nonsense() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the server's reply makes no sense")
}

/// The error of a reply: NBD's numbers are those of Linux.
fn errno(number: u32) -> io::Error {
    io::Error::from_raw_os_error(number.cast_signed())
}

/// A text as options have it: its length, then itself.
fn counted(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

impl Connection {
    /// Connects, as far as the server's greeting.
    fn open(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        let mut connection = Self { stream, cookie: 0, size: 0 };
        if connection.u64()? != NBD_MAGIC || connection.u64()? != OPTION_MAGIC {
            return Err(io::Error::other("not an NBD server"));
        }
        connection.take::<2>()?;
        connection.stream.write_all(&CLIENT_FLAGS.to_be_bytes())?;
        Ok(connection)
    }

    /// Chooses the export; requests may follow.
    fn go(&mut self, export: &str) -> io::Result<()> {
        self.option(OPTION_GO, &[counted(export), vec![0, 0]].concat())
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
            if magic != OPTION_REPLY_MAGIC || of != option {
                return Err(nonsense());
            }
            let body = self.body(bytes)?;
            match kind {
                REPLY_ACK => return Ok(()),
                kind if kind & REPLY_ERROR != 0 && option == OPTION_GO => {
                    return Err(io::Error::other("the server has no such export"));
                }
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

    /// Sends a request. Returns its cookie, which the reply has too.
    fn request(&mut self, command: u16, offset: u64, bytes: u32, data: &[u8]) -> io::Result<u64> {
        self.cookie += 1;
        let mut out = Vec::with_capacity(28 + data.len());
        out.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out.extend_from_slice(&0_u16.to_be_bytes());
        out.extend_from_slice(&command.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(&bytes.to_be_bytes());
        out.extend_from_slice(data);
        self.stream.write_all(&out)?;
        Ok(self.cookie)
    }

    /// The body of a reply that is no content of the disk.
    fn body(&mut self, bytes: u32) -> io::Result<Vec<u8>> {
        if bytes > REPLY_BYTES_MAX {
            return Err(nonsense());
        }
        let mut body = vec![0; bytes as usize];
        self.stream.read_exact(&mut body)?;
        Ok(body)
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

impl Drop for Connection {
    fn drop(&mut self) {
        // The server may be dead already.
        let _ = self.request(CMD_DISCONNECT, 0, 0, &[]);
    }
}
