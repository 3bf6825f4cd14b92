//! One accepted connection, ready for an event loop, and who is at its other end.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketType, sockopt};

use super::Place;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::vsock::VsockAddr;
use crate::sys::{self, inherited};

use super::tls::Fingerprint;

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
        Ok(Self::new(fd, PeerKind::Unix { uid: credentials.uid, pid: credentials.pid }))
    }

    /// Takes over an accepted TCP connection from `addr` that is non-blocking already.
    pub(super) fn from_tcp(fd: OwnedFd, addr: SocketAddr) -> io::Result<Self> {
        // Replies leave in batches made by the event loop; the kernel waiting for more would only add latency.
        sockopt::set_tcp_nodelay(&fd, true)?;
        // One that came through a dual-stack socket is an IPv4 peer all the same.
        let addr = SocketAddr::new(addr.ip().to_canonical(), addr.port());
        Ok(Self::new(fd, PeerKind::Tcp { addr }))
    }

    /// Takes over an accepted vsock connection from `addr` that is non-blocking already.
    pub(super) fn from_vsock(fd: OwnedFd, addr: VsockAddr) -> Self {
        Self::new(fd, PeerKind::Vsock { cid: addr.cid, port: addr.port })
    }

    /// Takes the connected stream socket that this process was started with as descriptor `number`. Where it was given
    /// as standard streams too, these are `/dev/null` from then on.
    ///
    /// # Errors
    /// `Invalid` if there is no such descriptor, or if it is no connected stream socket.
    pub fn inherited(number: i32) -> Result<Self> {
        let name = format!("descriptor {number}");
        let cannot = |error: io::Error| match error.kind() {
            io::ErrorKind::PermissionDenied => unfit(&name, "this process was not started with it"),
            _ => Error::io("Cannot serve", error).on(&name).advise(FIT),
        };
        let fd = inherited::take(number).map_err(cannot)?;
        let system = |errno: rustix::io::Errno| match errno {
            rustix::io::Errno::NOTSOCK => unfit(&name, "it is no socket"),
            rustix::io::Errno::NOTCONN => unfit(&name, "it is not connected"),
            errno => cannot(errno.into()),
        };
        if sockopt::socket_type(&fd).map_err(system)? != SocketType::STREAM {
            return Err(unfit(&name, "it is no stream socket"));
        }
        if sockopt::socket_acceptconn(&fd).map_err(system)? {
            return Err(unfit(&name, "it listens, and has no client"));
        }
        rustix::io::ioctl_fionbio(&fd, true).map_err(system)?;
        Self::connected(fd, &name, cannot)
    }

    /// Takes a connection that another server has accepted, which has made it non-blocking.
    ///
    /// # Errors
    /// It is not connected any more, or is no connection that a server would have accepted.
    pub(crate) fn passed(fd: OwnedFd) -> Result<Self> {
        let name = "a connection of the other server";
        Self::connected(fd, name, |error| Error::io("Cannot serve", error).on(name))
    }

    /// Finds out who is at the other end.
    fn connected(fd: OwnedFd, name: &str, cannot: impl Fn(io::Error) -> Error) -> Result<Self> {
        let system = |errno: rustix::io::Errno| match errno {
            rustix::io::Errno::NOTSOCK => unfit(name, "it is no socket"),
            rustix::io::Errno::NOTCONN => unfit(name, "it is not connected"),
            errno => cannot(errno.into()),
        };
        let peer = rustix::net::getpeername(&fd).map_err(system)?;
        match sockopt::socket_domain(&fd).map_err(system)? {
            AddressFamily::UNIX => Self::from_unix(fd).map_err(cannot),
            AddressFamily::INET | AddressFamily::INET6 => {
                match peer.and_then(|peer| SocketAddr::try_from(peer).ok()) {
                    Some(addr) => Self::from_tcp(fd, addr).map_err(cannot),
                    None => Err(unfit(name, "its peer has no address")),
                }
            }
            AddressFamily::VSOCK => match peer.as_ref().and_then(VsockAddr::from_any) {
                Some(addr) => Ok(Self::from_vsock(fd, addr)),
                None => Err(unfit(name, "its peer has no address")),
            },
            _ => Err(unfit(name, "it is neither a unix nor a TCP nor a vsock socket")),
        }
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

    fn new(fd: OwnedFd, kind: PeerKind) -> Self {
        Self { fd, peer: Peer { kind, certificate: None }, place: None }
    }

    /// Notes whose certificate the peer has shown, over TLS and verified.
    pub(crate) fn identify(&mut self, certificate: Fingerprint) {
        self.peer.certificate = Some(certificate);
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

const FIT: &str = "give the number of a connected unix, TCP or vsock stream socket";

fn unfit(name: &str, why: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("Cannot serve {name}: {why}")).advise(FIT)
}

/// Who is at the other end of a [`Stream`]. Shown as `uid 1000, pid 4711`, `127.0.0.1:43210` or `vsock:3:1023`, and with the
/// beginning of its certificate's fingerprint if it has shown one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Peer {
    /// What is known of it, by the kind of its address.
    pub kind: PeerKind,
    /// Whose certificate it has shown, if one was demanded and found to be good.
    pub certificate: Option<Fingerprint>,
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
    /// A virtual machine on this host, or the host of this virtual machine, as the hypervisor vouches for it.
    Vsock {
        /// Its context id.
        cid: u32,
        /// Its port.
        port: u32,
    },
}

impl Peer {
    /// The user at the other end, where the kernel vouches for it: over a unix socket.
    #[must_use]
    pub fn uid(&self) -> Option<u32> {
        match self.kind {
            PeerKind::Unix { uid, .. } => Some(uid),
            PeerKind::Tcp { .. } | PeerKind::Vsock { .. } => None,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            PeerKind::Unix { uid, pid } => write!(f, "uid {uid}, pid {pid}")?,
            PeerKind::Tcp { addr } => addr.fmt(f)?,
            PeerKind::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}")?,
        }
        match self.certificate {
            Some(certificate) => write!(f, ", certificate {certificate:.16}"),
            None => Ok(()),
        }
    }
}
