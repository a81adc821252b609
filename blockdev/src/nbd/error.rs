//! Errors of the export: what ends a connection, what a client is told, and what the operator is told.

use std::io;
use std::path::PathBuf;

use super::tls::TlsError;

/// Why a server cannot be started or changed. One line each: what, where, what to do.
#[derive(Debug, thiserror::Error)]
pub enum NbdServerError {
    /// Another process answers on this unix socket.
    #[error("{}: another process listens on this socket: stop it or choose another path", path.display())]
    SocketInUse {
        /// The socket's path.
        path: PathBuf,
    },
    /// Something that is no socket is in the way.
    #[error("{}: exists and is not a socket: remove it or choose another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Listening failed.
    #[error("{address}: cannot listen: {source}")]
    Listen {
        /// As given.
        address: super::ListenAddr,
        /// From the kernel.
        source: io::Error,
    },
    /// The name is taken.
    #[error("export {name:?}: already exists on this server: remove it first or choose another name")]
    ExportExists {
        /// The export's name.
        name: String,
    },
    /// Longer than the protocol allows.
    #[error("export name or description of {bytes} bytes: shorten it to at most 4096")]
    NameTooLong {
        /// Its length.
        bytes: usize,
    },
    /// See [`TlsError`].
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// What ended a connection, other than the client's wish.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("client misbehaved: {0}")]
    Misbehaved(#[from] ProtocolError),
    #[error("handshake not finished within the deadline")]
    HandshakeTimeout,
    #[error("client did not take its last replies in time")]
    DrainTimeout,
    #[error("TLS handshake: {0}")]
    Tls(#[source] io::Error),
    #[error("socket: {0}")]
    Io(#[from] io::Error),
}

/// Whose fault: the client's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ProtocolError {
    #[error("unknown client flags {flags:#x}")]
    ClientFlags { flags: u32 },
    #[error("option starts with {found:#018x}, not IHAVEOPT")]
    OptionMagic { found: u64 },
    #[error("option {option} of {bytes} bytes")]
    OptionTooLong { option: u32, bytes: u32 },
    #[error("more options than a handshake may have")]
    TooManyOptions,
    #[error("EXPORT_NAME before TLS or for an unknown export")]
    ExportNameRefused,
    #[error("request starts with {found:#010x}")]
    RequestMagic { found: u32 },
    #[error("write of {bytes} bytes")]
    WriteTooLong { bytes: u32 },
    #[error("connection ended inside of a message")]
    Truncated,
}

/// Error numbers of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Errno {
    Perm = 1,
    Io = 5,
    NoMem = 12,
    Inval = 22,
    NoSpc = 28,
    NotSup = 95,
    Shutdown = 108,
}

impl Errno {
    pub(super) fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES | libc::EROFS) => return Self::Perm,
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => return Self::NoSpc,
            Some(libc::EINVAL) => return Self::Inval,
            Some(libc::ENOMEM) => return Self::NoMem,
            Some(libc::EOPNOTSUPP) => return Self::NotSup,
            Some(libc::ESHUTDOWN) => return Self::Shutdown,
            Some(_) => return Self::Io,
            None => {}
        }
        match error.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Self::Perm,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => Self::NoSpc,
            io::ErrorKind::InvalidInput => Self::Inval,
            io::ErrorKind::OutOfMemory => Self::NoMem,
            io::ErrorKind::Unsupported => Self::NotSup,
            _ => Self::Io,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_kernel_keep_their_meaning() {
        let os = |code| Errno::of(&io::Error::from_raw_os_error(code));
        assert_eq!(os(libc::ENOSPC), Errno::NoSpc);
        assert_eq!(os(libc::EROFS), Errno::Perm);
        assert_eq!(os(libc::EIO), Errno::Io);
        assert_eq!(os(libc::ENXIO), Errno::Io);
        assert_eq!(Errno::of(&io::ErrorKind::Unsupported.into()), Errno::NotSup);
        assert_eq!(Errno::of(&io::Error::other("anything")), Errno::Io);
    }
}
