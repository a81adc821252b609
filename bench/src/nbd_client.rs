//! The smallest NBD client that can write and read a block: fixed newstyle, GO, simple replies. It exists because starting
//! a program for one read takes longer than what is measured.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

// https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CLIENT_FLAGS: u32 = 0b11;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERROR_BIT: u32 = 1 << 31;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const REPLY_BYTES_MAX: u32 = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection in the transmission phase.
#[derive(Debug)]
pub(crate) struct NbdClient {
    stream: UnixStream,
}

impl NbdClient {
    /// Connects to `export` of the server at `socket`.
    pub(crate) fn connect(socket: &Path, export: &str) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("{}: cannot connect", socket.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut client = Self { stream };
        client.go(export).with_context(|| format!("{}: NBD negotiation failed", socket.display()))?;
        Ok(client)
    }

    fn go(&mut self, export: &str) -> Result<()> {
        if (self.u64()?, self.u64()?) != (MAGIC, OPTION_MAGIC) {
            bail!("not a newstyle NBD server");
        }
        let _server_flags = self.u16()?;
        let name = u32::try_from(export.len()).context("export name too long")?;
        let mut hello = CLIENT_FLAGS.to_be_bytes().to_vec();
        hello.extend(OPTION_MAGIC.to_be_bytes());
        hello.extend(OPT_GO.to_be_bytes());
        hello.extend((name + 6).to_be_bytes());
        hello.extend(name.to_be_bytes());
        hello.extend(export.as_bytes());
        hello.extend(0_u16.to_be_bytes());
        self.stream.write_all(&hello)?;
        loop {
            let (magic, _option, kind, length) = (self.u64()?, self.u32()?, self.u32()?, self.u32()?);
            if magic != OPTION_REPLY_MAGIC || length > REPLY_BYTES_MAX {
                bail!("not a reply to an option");
            }
            let mut data = vec![0; length as usize];
            self.stream.read_exact(&mut data)?;
            match kind {
                REP_ACK => return Ok(()),
                REP_INFO => {}
                kind if kind & REP_ERROR_BIT != 0 => bail!("refused: {kind:#x} {}", String::from_utf8_lossy(&data)),
                kind => bail!("unexpected reply {kind:#x}"),
            }
        }
    }

    pub(crate) fn read(&mut self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.request(CMD_READ, offset, u32::try_from(data.len())?, &[])?;
        Ok(self.stream.read_exact(data)?)
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.request(CMD_WRITE, offset, u32::try_from(data.len())?, data)
    }

    fn request(&mut self, command: u16, offset: u64, length: u32, data: &[u8]) -> Result<()> {
        let mut request = REQUEST_MAGIC.to_be_bytes().to_vec();
        request.extend(0_u16.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(1_u64.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request)?;
        let (magic, error, _cookie) = (self.u32()?, self.u32()?, self.u64()?);
        if magic != SIMPLE_REPLY_MAGIC || error != 0 {
            bail!("NBD command {command} at {offset} failed: error {error}");
        }
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u16(&mut self) -> Result<u16> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.take().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.take().map(u64::from_be_bytes)
    }
}
