//! A disk with one request at a time: what a guest's driver would do, without a guest.

use std::io::{self, Read};
use std::path::Path;

use super::{CMD_READ, Connection, errno, nonsense};

const REPLY_MAGIC: u32 = 0x6744_6698;
const CMD_WRITE: u16 = 1;
const CMD_FLUSH: u16 = 3;

/// A connection to one export.
#[derive(Debug)]
pub(crate) struct Disk(Connection);

impl Disk {
    /// Connects and chooses `export`.
    pub(crate) fn connect(socket: &Path, export: &str) -> io::Result<Self> {
        let mut connection = Connection::open(socket)?;
        connection.go(export)?;
        Ok(Self(connection))
    }

    /// Bytes of the disk.
    pub(crate) fn size(&self) -> u64 {
        self.0.size
    }

    /// Fills `buf` from `offset`.
    pub(crate) fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.done(CMD_READ, offset, buf.len(), &[])?;
        self.0.stream.read_exact(buf)
    }

    /// Returns when the write is acknowledged.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.done(CMD_WRITE, offset, data.len(), data)
    }

    /// Returns when all acknowledged writes are on the disk.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.done(CMD_FLUSH, 0, 0, &[])
    }

    /// Makes a request and takes its simple reply; the content of a read follows it.
    fn done(&mut self, command: u16, offset: u64, length: usize, data: &[u8]) -> io::Result<()> {
        let bytes = u32::try_from(length).map_err(io::Error::other)?;
        let asked = self.0.request(command, offset, bytes, data)?;
        let (magic, error, cookie) = (self.0.u32()?, self.0.u32()?, self.0.u64()?);
        match error {
            _ if magic != REPLY_MAGIC || cookie != asked => Err(nonsense()),
            0 => Ok(()),
            number => Err(errno(number)),
        }
    }
}
