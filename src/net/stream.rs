//! One accepted connection, ready for an event loop, and who is at its other end.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt;

use crate::sys;

/// Bytes of replies that the kernel is asked to hold for one unix stream (capped by `net.core.wmem_max`).
///
/// A batch of replies should leave in one `sendmsg`: on a unix stream every byte that does not fit costs another round
/// through the event loop, and the default of 208 KiB holds not even two replies of 128 KiB. TCP sizes its buffers
/// itself, and better. The cap is not lifted by privilege (`SO_SNDBUFFORCE`): this is kernel memory, and a client that
/// never reads can hold all of it, so how much that may be is the administrator's to say.
const UNIX_SEND_BUFFER: usize = 4 << 20;

/// A TCP client that says nothing for so long is asked whether its host is still there, so often, so many times: a host
/// that vanished is noticed in half a minute.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 4;

/// An accepted connection: non-blocking, close-on-exec, its socket options set. Closed when dropped.
#[derive(Debug)]
pub struct Stream {
    fd: OwnedFd,
    peer: Peer,
}

impl Stream {
    /// Takes over an accepted unix connection that is non-blocking already.
    pub(super) fn from_unix(fd: OwnedFd) -> io::Result<Self> {
        // Less buffer than wished for is no reason to refuse a client.
        let _ = sockopt::set_socket_send_buffer_size(&fd, UNIX_SEND_BUFFER);
        let credentials = sys::peer::credentials(fd.as_fd())?;
        Ok(Self { fd, peer: Peer { kind: PeerKind::Unix { uid: credentials.uid, pid: credentials.pid } } })
    }

    /// Takes over an accepted TCP connection from `addr` that is non-blocking already.
    pub(super) fn from_tcp(fd: OwnedFd, addr: SocketAddr) -> io::Result<Self> {
        // Replies leave in batches made by the event loop; the kernel waiting for more would only add latency.
        sockopt::set_tcp_nodelay(&fd, true)?;
        // A host that vanished sends no end: without this its session would stay for ever.
        sockopt::set_socket_keepalive(&fd, true)?;
        sockopt::set_tcp_keepidle(&fd, KEEPALIVE_IDLE)?;
        sockopt::set_tcp_keepintvl(&fd, KEEPALIVE_INTERVAL)?;
        sockopt::set_tcp_keepcnt(&fd, KEEPALIVE_PROBES)?;
        // One that came through a dual-stack socket is an IPv4 peer all the same.
        let addr = SocketAddr::new(addr.ip().to_canonical(), addr.port());
        Ok(Self { fd, peer: Peer { kind: PeerKind::Tcp { addr } } })
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Who is at the other end of a [`Stream`]. Shown as `uid 1000, pid 4711` or `127.0.0.1:43210`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Peer {
    /// What is known of it, by the kind of its address.
    pub kind: PeerKind,
}

/// What is known of a [`Peer`], by the kind of its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PeerKind {
    /// A process on this machine, as the kernel saw it when it connected.
    Unix {
        /// Its effective user, in this process's user namespace; a user unknown there is the overflow uid, 65534.
        uid: u32,
        /// Its process id, in this process's pid namespace; 0 if it is not visible there. Only for the log: the
        /// process may have gone and its number been given away.
        pid: u32,
    },
    /// Somebody on the network.
    Tcp {
        /// Its address and port.
        addr: SocketAddr,
    },
}

impl Peer {
    /// The user at the other end, where the kernel vouches for it: over a unix socket.
    #[must_use]
    pub fn uid(&self) -> Option<u32> {
        match self.kind {
            PeerKind::Unix { uid, .. } => Some(uid),
            PeerKind::Tcp { .. } => None,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            PeerKind::Unix { uid, pid } => write!(f, "uid {uid}, pid {pid}"),
            PeerKind::Tcp { addr } => addr.fmt(f),
        }
    }
}
