//! The control socket's file: made with mode 0600 from the start, replaced only when nobody listens on it, removed at the end.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use tokio::net::UnixListener;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    #[error("{}: a node already answers on this control socket: stop it, or set another state_dir and control", path.display())]
    InUse { path: PathBuf },
    #[error("{}: exists and is not a socket: remove it, or set control to another path", path.display())]
    NotASocket { path: PathBuf },
    #[error("{}: cannot make the control socket: {source}", path.display())]
    Make { path: PathBuf, source: io::Error },
}

/// The file; gone when dropped.
#[derive(Debug)]
pub(crate) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Listens on `path`. Must be called within a tokio runtime.
pub(crate) fn listen_on(path: &Path) -> Result<(UnixListener, SocketFile), SocketError> {
    let failed = |source: io::Error| SocketError::Make { path: path.to_path_buf(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(SocketError::NotASocket { path: path.to_path_buf() }),
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(failed)?,
            Ok(_) | Err(_) => return Err(SocketError::InUse { path: path.to_path_buf() }),
        },
    }
    let made = || -> io::Result<UnixListener> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Before bind: the file is never open to others.
        fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
        bind(&fd, &SocketAddrUnix::new(path)?)?;
        listen(&fd, BACKLOG)?;
        UnixListener::from_std(std::os::unix::net::UnixListener::from(fd))
    };
    Ok((made().map_err(failed)?, SocketFile(path.to_path_buf())))
}
