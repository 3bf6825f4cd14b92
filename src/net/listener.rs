//! Bound sockets that accept clients, and the care of unix socket files.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::error::{Error, Result};
use crate::sys::vsock::{self, VsockAddr};
use crate::takeover::SocketFileOffer;

use super::{Address, Stream};

/// Connections that may wait to be accepted (capped by `net.core.somaxconn`): a fleet of clients that all start at once
/// should wait a moment rather than be refused.
const BACKLOG: i32 = 4096;

/// A bound, listening socket. Dropping it closes it and removes its socket file, if it made it.
#[derive(Debug)]
pub struct Listener {
    // Before `fd`, so that it is dropped while the socket still listens: until then, no other server can take the file
    // for a stale one and put its own in its place, and the file removed is certain to be ours.
    file: Option<SocketFile>,
    /// The same, where another server is going to remove it, unless this one takes its place.
    theirs: Option<SocketFileOffer>,
    pub(super) fd: OwnedFd,
    pub(super) address: Address,
}

impl Listener {
    /// Who may connect to a unix socket unless told otherwise, as the mode of its file: its owner. A named session
    /// belongs to a uid, but an image's content is for whoever can connect.
    pub const UNIX_MODE: u32 = 0o600;

    /// A listener on a socket that somebody else has bound, and whose file is theirs.
    pub(super) fn adopted(fd: OwnedFd, address: Address) -> Self {
        Self { file: None, theirs: None, fd, address }
    }

    /// A listener that another server has offered, with its socket file. The file is that server's, until [`Listener::own`].
    ///
    /// # Errors
    /// It is no listening stream socket.
    pub fn offered(fd: OwnedFd, file: Option<SocketFileOffer>) -> Result<Self> {
        let mut listener = Self::take_over(fd, "a socket of the other server")?;
        if let Some(file) = &file {
            listener.address = Address::Unix(file.path.clone());
        }
        listener.theirs = file;
        Ok(listener)
    }

    /// Tells another server of its socket file.
    #[must_use]
    pub fn file_offer(&self) -> Option<SocketFileOffer> {
        self.file.as_ref().map(|file| SocketFileOffer {
            path: file.path.clone(),
            device: file.dev,
            inode: file.ino,
        })
    }

    /// Leaves its socket file to another server.
    pub fn disown(&mut self) {
        self.theirs = self.file_offer();
        if let Some(file) = self.file.take() {
            // Nothing is removed.
            std::mem::forget(file);
        }
    }

    /// Takes the socket file over that another server has left.
    pub fn own(&mut self) {
        if let Some(SocketFileOffer { path, device, inode }) = self.theirs.take() {
            self.file = Some(SocketFile { path, dev: device, ino: inode });
        }
    }

    /// Whether it listens where `address` says.
    #[must_use]
    pub fn stands_for(&self, address: &Address) -> bool {
        match (&self.address, address) {
            (Address::Unix(own), Address::Unix(path)) => {
                std::path::absolute(path).is_ok_and(|path| path == *own)
            }
            (Address::Tcp { .. }, Address::Tcp { host, port }) => {
                let found = resolve(address, host, *port).unwrap_or_default();
                found.into_iter().any(|addr| tcp_address(addr) == self.address)
            }
            (own, address) => own == address,
        }
    }

    /// Listens on `address`; if its host has several addresses, on the first that can be bound. A stale unix socket file
    /// (one that nobody listens on) is replaced.
    ///
    /// # Errors
    /// `InUse` if another server listens there, `NotFound` if the directory or host does not exist, and whatever else the
    /// system says.
    pub fn bind(address: &Address) -> Result<Self> {
        match address {
            Address::Unix(path) => Self::bind_unix(path, Self::UNIX_MODE),
            Address::Vsock { cid, port } => {
                Self::bind_vsock(*cid, *port).map_err(|errno| explain_vsock(address, errno))
            }
            Address::Tcp { host, port } => {
                let mut result = Err(no_address(address));
                for addr in resolve(address, host, *port)? {
                    result = Self::bind_tcp(addr).map_err(|errno| explain_tcp(address, errno));
                    if result.is_ok() {
                        break;
                    }
                }
                result
            }
        }
    }

    /// Listens on every address that `address` stands for: `localhost:10809` is often both `127.0.0.1` and `[::1]`.
    /// With port 0 only on the first, since each would get a port of its own.
    ///
    /// # Errors
    /// As [`Listener::bind`]. An address that this machine does not have is no error as long as another could be bound
    /// (IPv6 may be switched off while `localhost` still names `::1`).
    pub fn bind_all(address: &Address) -> Result<Vec<Self>> {
        let Address::Tcp { host, port: port @ 1.. } = address else {
            return Ok(vec![Self::bind(address)?]);
        };
        let mut listeners = Vec::new();
        let mut absent = no_address(address);
        for addr in resolve(address, host, *port)? {
            match Self::bind_tcp(addr) {
                Ok(listener) => listeners.push(listener),
                Err(errno @ (Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT)) => {
                    absent = explain_tcp(address, errno)
                }
                Err(errno) => return Err(explain_tcp(address, errno)),
            }
        }
        if listeners.is_empty() { Err(absent) } else { Ok(listeners) }
    }

    /// Listens on a unix socket whose file has the permission bits of `mode` from its first moment on.
    ///
    /// # Errors
    /// As [`Listener::bind`].
    pub fn bind_unix_with(path: &Path, mode: u32) -> Result<Self> {
        Self::bind_unix(path, mode)
    }

    /// Whether nobody but this machine, and the machines that run on it or that it runs on, can connect.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match &self.address {
            Address::Unix(_) | Address::Vsock { .. } => true,
            // Without its zone: only link-local addresses have one, and these are not loopback.
            Address::Tcp { host, .. } => {
                host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
            }
        }
    }

    /// Where it listens: an absolute path, or a numeric address with its real port.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The absolute path of the socket file that this listener made, or is going to take over, and will remove.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        let own = self.file.as_ref().map(|file| file.path.as_path());
        own.or(self.theirs.as_ref().map(|file| file.path.as_path()))
    }

    /// The URI of [`Listener::address`], to which a client appends an export's name.
    #[must_use]
    pub fn uri(&self) -> String {
        self.address.to_string()
    }

    /// Accepts one connection; `None` if none is waiting. Connections that died while they waited are passed over.
    ///
    /// # Errors
    /// What the system says when it cannot accept although somebody waits: out of descriptors (`EMFILE`, `ENFILE`) or of
    /// memory. The connection stays in the queue, so that a level-triggered loop must pause before it tries again.
    pub fn accept(&self) -> io::Result<Option<Stream>> {
        loop {
            let (fd, addr) =
                match rustix::net::acceptfrom_with(&self.fd, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                    Ok(accepted) => accepted,
                    Err(Errno::AGAIN) => return Ok(None),
                    Err(errno) if is_transient(errno) => continue,
                    Err(errno) => return Err(errno.into()),
                };
            let stream = match &self.address {
                Address::Unix(_) => Stream::from_unix(fd),
                Address::Tcp { .. } => match addr.and_then(|addr| SocketAddr::try_from(addr).ok()) {
                    Some(addr) => Stream::from_tcp(fd, addr),
                    None => continue,
                },
                Address::Vsock { .. } => match addr.as_ref().and_then(VsockAddr::from_any) {
                    Some(addr) => Ok(Stream::from_vsock(fd, addr)),
                    None => continue,
                },
            };
            match stream {
                Ok(stream) => return Ok(Some(stream)),
                Err(error) => tracing::debug!(%error, "A client was gone before it was accepted"),
            }
        }
    }

    fn bind_tcp(addr: SocketAddr) -> rustix::io::Result<Self> {
        let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let fd = new_socket(family)?;
        // Without it a restart fails for as long as connections of the server before linger in TIME_WAIT.
        sockopt::set_socket_reuseaddr(&fd, true)?;
        rustix::net::bind(&fd, &addr)?;
        rustix::net::listen(&fd, BACKLOG)?;
        let bound = SocketAddr::try_from(rustix::net::getsockname(&fd)?)?;
        Ok(Self { file: None, theirs: None, fd, address: tcp_address(bound) })
    }

    fn bind_vsock(cid: u32, port: u32) -> rustix::io::Result<Self> {
        let fd = new_socket(AddressFamily::VSOCK)?;
        let port = if port == 0 { u32::MAX } else { port };
        rustix::net::bind(&fd, &VsockAddr { cid, port })?;
        rustix::net::listen(&fd, BACKLOG)?;
        let bound = VsockAddr::from_any(&rustix::net::getsockname(&fd)?).ok_or(Errno::INVAL)?;
        Ok(Self { file: None, theirs: None, fd, address: vsock_address(bound) })
    }

    fn bind_unix(path: &Path, mode: u32) -> Result<Self> {
        let mode = Mode::from_raw_mode(mode);
        let fail = |errno: Errno| explain_unix(path, errno);
        let sockaddr = SocketAddrUnix::new(path).map_err(fail)?;
        let absolute = std::path::absolute(path).map_err(|error| cannot_listen(path, error))?;

        // Replacing a stale file is to look, remove and bind, and two servers that do so at the same time must not remove
        // each other's fresh socket. So they take turns, by a lock on the directory: it leaves no file behind and ends
        // with its process. (Binding beside it and renaming over the old file would show clients no gap, but nobody
        // answered there anyway; it does not tell two starting servers apart either, and `ss` and `lsof` would for ever
        // show the name it was bound to.)
        let _turn = lock_directory(&absolute);
        clear_way(path, &sockaddr)?;

        let fd = new_socket(AddressFamily::UNIX).map_err(fail)?;
        // The file is made with the mode of the socket's own inode (less the umask), so it is private from its first
        // moment on, which no chmod after the bind could promise.
        rustix::fs::fchmod(&fd, mode).map_err(fail)?;
        rustix::net::bind(&fd, &sockaddr).map_err(fail)?;
        let stat = rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
        let file = SocketFile { path: absolute.clone(), dev: stat.st_dev, ino: stat.st_ino };
        if Mode::from_raw_mode(stat.st_mode) != mode {
            // The umask takes away, and a file system may be strange. Nobody can connect before the listen below.
            rustix::fs::chmod(path, mode).map_err(fail)?;
        }
        rustix::net::listen(&fd, BACKLOG).map_err(fail)?;
        Ok(Self { file: Some(file), theirs: None, fd, address: Address::Unix(absolute) })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A socket file that we made. Removed when dropped, if it is still the same file.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    dev: u64,
    ino: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = rustix::fs::statat(CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (self.dev, self.ino));
        if ours && let Err(error) = rustix::fs::unlink(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "Cannot remove the socket file");
        }
    }
}

/// The address of a bound TCP socket.
pub(super) fn tcp_address(bound: SocketAddr) -> Address {
    // The scope of a link-local address (`fe80::1%eth0`) is not in `ip()`, but in the address as a whole.
    let host = match bound {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => format!("{}%{}", v6.ip(), v6.scope_id()),
        _ => bound.ip().to_string(),
    };
    Address::Tcp { host, port: bound.port() }
}

/// The address of a bound vsock socket. One that is bound to any context id is shown with the one that others know this
/// machine by, where it has one.
pub(super) fn vsock_address(bound: VsockAddr) -> Address {
    let cid = match bound.cid {
        Address::ANY_CID => vsock::local_cid().unwrap_or(Address::ANY_CID),
        cid => cid,
    };
    Address::Vsock { cid, port: bound.port }
}

fn new_socket(family: AddressFamily) -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)
}

/// Errors of `accept` that belong to a connection which is gone, not to the listener (accept(2), "Error handling").
fn is_transient(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::CONNABORTED
            | Errno::INTR
            | Errno::PERM
            | Errno::PROTO
            | Errno::NETDOWN
            | Errno::NOPROTOOPT
            | Errno::HOSTDOWN
            | Errno::NONET
            | Errno::HOSTUNREACH
            | Errno::OPNOTSUPP
            | Errno::NETUNREACH
            | Errno::TIMEDOUT
    )
}

/// Holds the directory of `path` against other servers that start, until dropped.
///
/// `None` if the directory cannot be read or locked, or if somebody holds the lock for a second (anybody who can read a
/// directory can lock it): then the look and the removal race, as they do in every server without such a lock.
fn lock_directory(path: &Path) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(path.parent()?, flags, Mode::empty()).ok()?;
    for _ in 0..100 {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(Errno::WOULDBLOCK | Errno::INTR) => thread::sleep(Duration::from_millis(10)),
            Err(_) => return None,
        }
    }
    None
}

/// Removes the stale socket at `path`, if there is one; refuses when anything else is there.
fn clear_way(path: &Path, sockaddr: &SocketAddrUnix) -> Result<()> {
    let fail = |errno: Errno| explain_unix(path, errno);
    let stat = match rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(fail(errno)),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        let error = io::Error::new(io::ErrorKind::AlreadyExists, "a file that is no socket is there");
        return Err(cannot_listen(path, error).advise("remove it or choose another path"));
    }
    let probe = new_socket(AddressFamily::UNIX).map_err(fail)?;
    match rustix::net::connect(&probe, sockaddr) {
        Err(Errno::CONNREFUSED) => match rustix::fs::unlink(path) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(fail(errno)),
        },
        Err(Errno::NOENT) => Ok(()),
        // It answers; with EAGAIN its queue of connections is full, with EPROTOTYPE it is no stream socket.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => {
            let error = io::Error::new(io::ErrorKind::AddrInUse, "another server is answering there");
            Err(cannot_listen(path, error).advise("stop it or choose another path"))
        }
        Err(errno) => Err(fail(errno)),
    }
}

fn resolve(address: &Address, host: &str, port: u16) -> Result<Vec<SocketAddr>> {
    match (host, port).to_socket_addrs() {
        Ok(found) => {
            // A hosts file may name one address twice, and the second bind would meet the first.
            let mut addrs = Vec::new();
            for addr in found {
                if !addrs.contains(&addr) {
                    addrs.push(addr);
                }
            }
            Ok(addrs)
        }
        Err(error) => Err(Error::io("Cannot look up the host of", error)
            .on(address)
            .advise("check the name, or give a numeric address")),
    }
}

fn no_address(address: &Address) -> Error {
    let error = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    Error::io("Cannot listen on", error).on(address)
}

fn explain_tcp(address: &Address, errno: Errno) -> Error {
    let error = Error::io("Cannot listen on", errno).on(address);
    match errno {
        Errno::ADDRINUSE => error.advise("stop the server there or choose another port"),
        Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT => {
            error.advise("choose an address of this machine, as 127.0.0.1")
        }
        Errno::ACCESS => error.advise("choose a port of 1024 or above"),
        _ => error,
    }
}

fn explain_vsock(address: &Address, errno: Errno) -> Error {
    let error = Error::io("Cannot listen on", errno).on(address);
    match errno {
        Errno::ADDRINUSE => error.advise("stop the server there or choose another port"),
        Errno::ADDRNOTAVAIL => error.advise("give the port alone, without a CID, or the CID of this machine"),
        Errno::AFNOSUPPORT => error.advise("load the kernel's vsock module"),
        Errno::ACCESS => error.advise("choose a port of 1024 or above"),
        _ => error,
    }
}

fn explain_unix(path: &Path, errno: Errno) -> Error {
    let error = cannot_listen(path, errno.into());
    match errno {
        Errno::NOENT | Errno::NOTDIR => error.advise("make its directory first"),
        Errno::ACCESS | Errno::PERM | Errno::ROFS => error.advise("choose a directory you may write to"),
        Errno::NAMETOOLONG => error.advise("choose a path of at most 107 bytes"),
        _ => error,
    }
}

fn cannot_listen(path: &Path, error: io::Error) -> Error {
    Error::io("Cannot listen on", error).on_path(path)
}
