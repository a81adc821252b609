//! A small NBD client: fixed newstyle, one export, one request at a time. What a guest's driver would do, without a guest.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const CLIENT_FLAGS: u32 = 0b11;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISCONNECT: u16 = 2;
const CMD_FLUSH: u16 = 3;
/// Longest option reply that makes sense, in bytes.
const OPTION_REPLY_BYTES_MAX: u32 = 64 << 10;
/// A server that has not answered by then hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to one export.
pub(super) struct NbdClient {
    stream: UnixStream,
    cookie: u64,
    /// Bytes of the disk.
    pub(super) size: u64,
}

impl NbdClient {
    /// Connects and chooses `export`.
    pub(super) fn connect(path: &Path, export: &str) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let mut client = Self { stream, cookie: 0, size: 0 };
        if client.u64()? != NBD_MAGIC || client.u64()? != OPTION_MAGIC {
            return Err(io::Error::other("not an NBD server"));
        }
        client.take::<2>()?;
        let mut hello = CLIENT_FLAGS.to_be_bytes().to_vec();
        hello.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        hello.extend_from_slice(&OPTION_GO.to_be_bytes());
        let name_bytes = u32::try_from(export.len()).map_err(io::Error::other)?;
        hello.extend_from_slice(&(name_bytes + 6).to_be_bytes());
        hello.extend_from_slice(&name_bytes.to_be_bytes());
        hello.extend_from_slice(export.as_bytes());
        hello.extend_from_slice(&[0, 0]);
        client.stream.write_all(&hello)?;
        client.go()?;
        Ok(client)
    }

    fn go(&mut self) -> io::Result<()> {
        loop {
            let (magic, _option, kind, length) = (self.u64()?, self.u32()?, self.u32()?, self.u32()?);
            if magic != OPTION_REPLY_MAGIC || length > OPTION_REPLY_BYTES_MAX {
                return Err(io::Error::other("the server's handshake makes no sense"));
            }
            let mut data = vec![0; length as usize];
            self.stream.read_exact(&mut data)?;
            match kind {
                REPLY_ACK => return Ok(()),
                REPLY_INFO => {
                    if let Some((kind, rest)) = data.split_first_chunk::<2>()
                        && u16::from_be_bytes(*kind) == INFO_EXPORT
                        && let Some(size) = rest.first_chunk::<8>()
                    {
                        self.size = u64::from_be_bytes(*size);
                    }
                }
                kind if kind & REPLY_ERROR != 0 => return Err(io::Error::other("the server has no such export")),
                _ => {}
            }
        }
    }

    /// Fills `buf` from `offset`.
    pub(super) fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.request(CMD_READ, offset, buf.len(), &[])?;
        self.stream.read_exact(buf)
    }

    /// Returns when the write is acknowledged.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.request(CMD_WRITE, offset, data.len(), data)
    }

    /// Returns when all acknowledged writes are on the disk.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.request(CMD_FLUSH, 0, 0, &[])
    }

    fn request(&mut self, command: u16, offset: u64, length: usize, data: &[u8]) -> io::Result<()> {
        self.send(command, offset, length, data)?;
        let (magic, error, cookie) = (self.u32()?, self.u32()?, self.u64()?);
        if magic != REPLY_MAGIC || cookie != self.cookie {
            return Err(io::Error::other("the server's reply makes no sense"));
        }
        match error {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno.cast_signed())),
        }
    }

    fn send(&mut self, command: u16, offset: u64, length: usize, data: &[u8]) -> io::Result<()> {
        self.cookie += 1;
        let mut request = Vec::with_capacity(28 + data.len());
        request.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        request.extend_from_slice(&0_u16.to_be_bytes());
        request.extend_from_slice(&command.to_be_bytes());
        request.extend_from_slice(&self.cookie.to_be_bytes());
        request.extend_from_slice(&offset.to_be_bytes());
        request.extend_from_slice(&u32::try_from(length).map_err(io::Error::other)?.to_be_bytes());
        request.extend_from_slice(data);
        self.stream.write_all(&request)
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

impl Drop for NbdClient {
    fn drop(&mut self) {
        // The server may be dead already.
        let _ = self.send(CMD_DISCONNECT, 0, 0, &[]);
    }
}
