//! One accepted connection, ready for an event loop, and who is at its other end.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt;

use super::Place;
use crate::sys;

/// Bytes of replies that the kernel is asked to hold for one unix stream (capped by `net.core.wmem_max`).
///
/// A batch of replies should leave in one `sendmsg`: on a unix stream every byte that does not fit costs another round
/// through the event loop, and the default of 208 KiB holds not even two replies of 128 KiB. TCP sizes its buffers
/// itself, and better. The cap is not lifted by privilege (`SO_SNDBUFFORCE`): this is kernel memory, and a client that
/// never reads can hold all of it, so how much that may be is the administrator's to say.
const UNIX_SEND_BUFFER: usize = 4 << 20;

/// A connection: non-blocking, close-on-exec, its socket options set. Closed when dropped.
#[derive(Debug)]
pub struct Stream {
    // Before `place`, so that whoever gets the place finds the descriptor free.
    fd: OwnedFd,
    peer: Peer,
    place: Option<Place>,
}

/// How what was sent over a TCP connection gets on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outlook {
    /// The other host has taken everything.
    Taken,
    /// It is on its way.
    Underway,
    /// The other host answers, but its program reads nothing, so that there is no room for more.
    Unread,
}

impl Stream {
    /// Takes over an accepted unix connection that is non-blocking already.
    pub(super) fn from_unix(fd: OwnedFd) -> io::Result<Self> {
        // Less buffer than wished for is no reason to refuse a client.
        let _ = sockopt::set_socket_send_buffer_size(&fd, UNIX_SEND_BUFFER);
        let credentials = sys::peer::credentials(fd.as_fd())?;
        let kind = PeerKind::Unix { uid: credentials.uid, pid: credentials.pid };
        Ok(Self { fd, peer: Peer { kind }, place: None })
    }

    /// Takes over an accepted TCP connection from `addr` that is non-blocking already.
    pub(super) fn from_tcp(fd: OwnedFd, addr: SocketAddr) -> io::Result<Self> {
        // Replies leave in batches made by the event loop; the kernel waiting for more would only add latency.
        sockopt::set_tcp_nodelay(&fd, true)?;
        // One that came through a dual-stack socket is an IPv4 peer all the same.
        let addr = SocketAddr::new(addr.ip().to_canonical(), addr.port());
        Ok(Self { fd, peer: Peer { kind: PeerKind::Tcp { addr } }, place: None })
    }

    /// Keeps `place` as long as the connection is open.
    pub fn keep(&mut self, place: Place) {
        self.place = Some(place);
    }

    /// Whether it came over TCP.
    #[must_use]
    pub fn is_tcp(&self) -> bool {
        matches!(self.peer.kind, PeerKind::Tcp { .. })
    }

    /// Lets the kernel hang up when the other host has not answered for `time`: on what was sent, or, when nothing was
    /// sent, on being asked whether it is still there. A host that vanished sends no end, and without this its session
    /// would stay for ever. Only for TCP; over other sockets the kernel knows.
    ///
    /// A host that answers is given up, too, when its program has not read for `time` what was sent: see
    /// [`Stream::bear_with`].
    ///
    /// # Errors
    /// What the system says.
    pub fn expect_answers_within(&self, time: Duration) -> io::Result<()> {
        // Whole seconds for the kernel. The last question is asked when five sixths are over, and the verdict is due.
        let part = |n: u64| Duration::from_secs((time.as_secs() / n).max(1));
        sockopt::set_socket_keepalive(&self.fd, true)?;
        sockopt::set_tcp_keepidle(&self.fd, part(3))?;
        sockopt::set_tcp_keepintvl(&self.fd, part(6))?;
        sockopt::set_tcp_keepcnt(&self.fd, 3)?;
        self.bear_with(Some(time * 5 / 6))
    }

    /// Sets only how long the other host may be silent on what was sent over TCP, or its program leave it unread; without
    /// a time, it is as the system's own defaults have it.
    ///
    /// # Errors
    /// What the system says.
    pub fn bear_with(&self, time: Option<Duration>) -> io::Result<()> {
        // The kernel takes it as an `int`, and 0 for its defaults.
        let most = u32::MAX >> 1;
        let millis = time.map_or(0, |time| u32::try_from(time.as_millis()).unwrap_or(most).clamp(1, most));
        Ok(sockopt::set_tcp_user_timeout(&self.fd, millis)?)
    }

    /// How what was sent over TCP gets on.
    ///
    /// # Errors
    /// What the system says.
    pub fn outlook(&self) -> io::Result<Outlook> {
        if sys::tcp::unacknowledged(self.fd.as_fd())? == 0 {
            return Ok(Outlook::Taken);
        }
        let outlook = sys::tcp::outlook(self.fd.as_fd())?;
        // With something to send and nothing on its way there is no room at the other end. The kernel asks there from
        // time to time; a host that is there answers every time.
        Ok(if outlook.in_flight == 0 && outlook.unanswered_probes < 3 {
            Outlook::Unread
        } else {
            Outlook::Underway
        })
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
