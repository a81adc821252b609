//! Listening sockets: a unix socket replaces a stale file only when nobody listens on it, and is private by default.

use std::fmt;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with, sockopt};

use super::error::NbdServerError;

/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 128;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddr {
    /// A unix socket at this path.
    Unix(PathBuf),
    /// A TCP address; port 0 lets the system choose.
    Tcp(SocketAddr),
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

/// A bound socket; removes its file when dropped.
#[derive(Debug)]
pub(super) struct Bound {
    pub(super) fd: Option<OwnedFd>,
    pub(super) address: ListenAddr,
    _file: Option<SocketFile>,
}

impl Bound {
    pub(super) fn new(address: &ListenAddr, unix_mode: u32) -> Result<Self, NbdServerError> {
        let failed = |source: io::Error| NbdServerError::Listen { address: address.clone(), source };
        match address {
            ListenAddr::Unix(path) => {
                let (fd, file) = bind_unix(path, unix_mode, &failed)?;
                Ok(Self { fd: Some(fd), address: address.clone(), _file: Some(file) })
            }
            ListenAddr::Tcp(wanted) => {
                let (fd, actual) = bind_tcp(*wanted).map_err(failed)?;
                Ok(Self { fd: Some(fd), address: ListenAddr::Tcp(actual), _file: None })
            }
        }
    }
}

/// The file of a listening socket, known by its inode so that a successor's file is never removed.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours =
            std::fs::symlink_metadata(&self.path).is_ok_and(|found| found.dev() == self.device && found.ino() == self.inode);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn bind_unix(
    path: &Path,
    mode: u32,
    failed: &dyn Fn(io::Error) -> NbdServerError,
) -> Result<(OwnedFd, SocketFile), NbdServerError> {
    // Two starters must not both find the same stale file: the second waits here, then finds a listener.
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let folder = File::open(folder).map_err(failed)?;
    flock(&folder, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
    remove_stale(path, failed)?;
    let bound = (|| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Before bind: the file is then made with this mode (less the umask) and is never open to others.
        fchmod(&fd, Mode::from_raw_mode(mode))?;
        bind(&fd, &SocketAddrUnix::new(path)?)?;
        listen(&fd, BACKLOG)?;
        Ok(fd)
    })();
    let fd = bound.map_err(|error: rustix::io::Errno| failed(error.into()))?;
    let made = std::fs::symlink_metadata(path).map_err(failed)?;
    Ok((fd, SocketFile { path: path.to_path_buf(), device: made.dev(), inode: made.ino() }))
}

fn remove_stale(path: &Path, failed: &dyn Fn(io::Error) -> NbdServerError) -> Result<(), NbdServerError> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(NbdServerError::NotASocket { path: path.to_path_buf() });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(failed),
        // Also when it is busy or not ours to connect to: somebody may be there.
        Ok(_) | Err(_) => Err(NbdServerError::SocketInUse { path: path.to_path_buf() }),
    }
}

fn bind_tcp(address: SocketAddr) -> io::Result<(OwnedFd, SocketAddr)> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    bind(&fd, &address)?;
    listen(&fd, BACKLOG)?;
    let listener = std::net::TcpListener::from(fd);
    let actual = listener.local_addr()?;
    Ok((listener.into(), actual))
}
