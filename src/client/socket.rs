//! A blocking connection, and what can be read from it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::error::{Error, ErrorKind, Result};
use crate::net::Address;
use crate::net::tls::ClientTls;
use crate::sys::vsock::VsockAddr;

/// A server that takes longer to accept or to answer is taken for dead.
const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes to and from a server, whatever carries them.
pub(super) trait Transport: Read + Write + Send {}

impl<T: Read + Write + Send> Transport for T {}

/// A connection to a server.
pub(super) struct Socket(Box<dyn Transport>);

impl Socket {
    pub(super) fn new(transport: impl Transport + 'static) -> Self {
        Self(Box::new(transport))
    }

    pub(super) fn connect(address: &Address) -> Result<Self> {
        Ok(Self::new(File::from(dial(address)?)))
    }

    /// Goes on over TLS.
    pub(super) fn secure(&mut self, tls: &ClientTls) -> Result<()> {
        let plain = std::mem::replace(&mut self.0, Box::new(io::empty()));
        self.0 = Box::new(tls.connect(plain)?);
        Ok(())
    }

    pub(super) fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.0.write_all(bytes).map_err(|error| failed("send to the server", error))
    }

    /// Fills `buffer`.
    pub(super) fn receive(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.0.read_exact(buffer).map_err(|error| failed("receive from the server", error))
    }

    /// The next `N` bytes.
    pub(super) fn receive_array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.receive(&mut bytes)?;
        Ok(bytes)
    }

    /// The next `length` bytes, which may be `limit` at most.
    pub(super) fn receive_vec(&mut self, length: u32, limit: u32) -> Result<Vec<u8>> {
        if length > limit {
            return Err(broken(format!("announces {length} bytes where {limit} are the most")));
        }
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| broken("announces too much"))?];
        self.receive(&mut bytes)?;
        Ok(bytes)
    }
}

/// A connection to the server at `address`, which is not waited for longer than [`PATIENCE`].
pub(super) fn dial(address: &Address) -> Result<OwnedFd> {
    let cannot = |error: io::Error| {
        let error = match error.kind() {
            // Over vsock it is the kernel's patience that ends, not ours.
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
                if !matches!(address, Address::Vsock { .. }) =>
            {
                timed_out()
            }
            _ => error,
        };
        Error::io("Cannot connect to", error).on(address).advise("check that a server is running there")
    };
    let fd: OwnedFd = match address {
        Address::Unix(path) => UnixStream::connect(path).map_err(cannot)?.into(),
        Address::Tcp { host, port } => {
            let mut result = Err(io::Error::new(io::ErrorKind::NotFound, "the host has no address"));
            for addr in (host.as_str(), *port).to_socket_addrs().map_err(cannot)? {
                result = TcpStream::connect_timeout(&addr, PATIENCE);
                if result.is_ok() {
                    break;
                }
            }
            let stream = result.map_err(cannot)?;
            stream.set_nodelay(true).map_err(cannot)?;
            stream.into()
        }
        // How long it takes to find nobody there is the kernel's to say: 2 seconds.
        Address::Vsock { cid, port } => dial_vsock(*cid, *port).map_err(|error| cannot(error.into()))?,
    };
    for timeout in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&fd, timeout, Some(PATIENCE)).map_err(|error| cannot(error.into()))?;
    }
    Ok(fd)
}

fn dial_vsock(cid: u32, port: u32) -> rustix::io::Result<OwnedFd> {
    let socket =
        rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&socket, &VsockAddr { cid, port })?;
    Ok(socket)
}

/// The server broke the protocol.
pub(super) fn broken(how: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Protocol, format!("The server breaks the protocol: it {how}"))
}

fn failed(what: &str, error: io::Error) -> Error {
    let error = match error.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::new(io::ErrorKind::UnexpectedEof, "it hung up"),
        // What a socket's timeout is called depends on the system.
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => timed_out(),
        _ => error,
    };
    Error::io(format!("Cannot {what}"), error)
}

fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("it did not answer for {} seconds", PATIENCE.as_secs()))
}
