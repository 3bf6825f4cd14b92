//! Where the server is, and sockets that never block.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// Where the server listens.
#[derive(Clone, Debug)]
pub enum Place {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP address; for a crowd only ever a loopback one.
    Tcp(SocketAddr),
}

impl Place {
    /// A connection that is there or on its way; `None` when the server's queue, or this machine, has no room for another
    /// one just now.
    ///
    /// # Errors
    /// Nobody listens there, or this process has no descriptors left.
    pub(crate) fn connect(&self) -> io::Result<Option<OwnedFd>> {
        let family = match self {
            Self::Unix(_) => AddressFamily::UNIX,
            Self::Tcp(SocketAddr::V4(_)) => AddressFamily::INET,
            Self::Tcp(SocketAddr::V6(_)) => AddressFamily::INET6,
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(family, SocketType::STREAM, flags, None)?;
        let connected = match self {
            Self::Unix(path) => connect(&socket, &SocketAddrUnix::new(path)?),
            Self::Tcp(address) => connect(&socket, address),
        };
        match connected {
            Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Ok(Some(socket)),
            Err(Errno::AGAIN | Errno::ADDRNOTAVAIL) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}
