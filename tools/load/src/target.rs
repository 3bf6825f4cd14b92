//! Connecting: address, socket options, and the newstyle handshake up to the transmission phase.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use memdev::net::Address;
use memdev::proto::{
    ClientFlags, Greeting, InfoItem, InfoPayload, OptionCode, OptionHeader, OptionReplyHeader,
    OptionReplyType,
};
use memdev::{Error, ErrorKind, Result};
use rustix::net::sockopt;

use crate::tls::Tls;

/// No handshake and no drain may hang a run for longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Where a server listens.
#[derive(Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub(crate) struct Place {
    /// The server's unix socket
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,
    /// The server's TCP address; for load only ever a loopback one
    #[arg(long, value_name = "HOST:PORT")]
    tcp: Option<String>,
}

impl Place {
    /// The address that was given.
    ///
    /// # Errors
    ///
    /// It is not well-formed.
    pub(crate) fn address(&self) -> Result<Address> {
        match (&self.unix, &self.tcp) {
            (Some(path), _) => Address::unix(path),
            (None, Some(text)) => Address::tcp(text),
            (None, None) => Err(Error::new(ErrorKind::Invalid, "Neither --unix nor --tcp was given")),
        }
    }
}

/// What to connect to, and as what.
#[derive(Args, Clone, Debug)]
pub(crate) struct Target {
    #[command(flatten)]
    pub(crate) place: Place,
    /// The export to open; each connection has a session of its own where the server gives it one
    #[arg(long, default_value = "", value_name = "NAME")]
    pub(crate) export: String,
    /// Share the session ID among all connections, by opening NAME@ID
    #[arg(long, value_name = "ID")]
    pub(crate) share: Option<String>,
    /// Encrypt: the server is `localhost` by the CA whose certificate is in this file
    #[arg(long, value_name = "CA-CERT.PEM")]
    pub(crate) tls: Option<PathBuf>,
    /// Negotiate structured replies
    #[arg(long)]
    pub(crate) structured: bool,
}

/// An open connection in the transmission phase.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) stream: OwnedFd,
    /// What goes over it is sealed by this.
    pub(crate) tls: Option<Box<Tls>>,
    /// The export's size in bytes.
    pub(crate) size: u64,
}

/// A stream of either kind while it is still blocking.
trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// Connects to a unix socket. Where its queue is full, as others connect at the same time, there is room again soon.
fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
                    && start.elapsed() < PATIENCE =>
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            connected => return connected,
        }
    }
}

impl Target {
    /// The name that goes into the handshake.
    fn export(&self) -> String {
        match &self.share {
            Some(id) => format!("{}@{id}", self.export),
            None => self.export.clone(),
        }
    }

    /// Connects and haggles.
    ///
    /// # Errors
    ///
    /// The address does not answer within [`PATIENCE`], is no newstyle NBD server, or refuses the export.
    pub(crate) fn connect(&self) -> Result<Connection> {
        let address = self.place.address()?;
        let refused = |e: io::Error| Error::io("Cannot connect to", e).on(&address);
        let opened = match &address {
            Address::Unix(path) => self.open(connect_unix(path).map_err(refused)?),
            Address::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).map_err(refused)?;
                stream.set_nodelay(true).and_then(|()| self.open(stream))
            }
            _ => return Err(Error::new(ErrorKind::Unsupported, "No way to connect to").on(&address)),
        };
        opened.map_err(|e| Error::io("Handshake failed with", e).on(&address))
    }

    fn open<S: Stream + AsFd + Into<OwnedFd>>(&self, mut stream: S) -> io::Result<Connection> {
        sockopt::set_socket_timeout(&stream, sockopt::Timeout::Recv, Some(PATIENCE))?;
        let Some(authority) = &self.tls else {
            let hello = greet(&mut stream)?;
            let size = haggle(&mut stream, hello, &self.export(), self.structured)?;
            return Ok(Connection { stream: stream.into(), tls: None, size });
        };
        let mut out = greet(&mut stream)?;
        option(&mut out, OptionCode::StartTls, &[])?;
        stream.write_all(&out)?;
        if option_reply(&mut stream)?.0 != OptionReplyType::Ack {
            return Err(io::Error::other("the server has no TLS"));
        }
        let mut tls = Box::new(Tls::begin(stream.as_fd(), authority)?);
        let mut sealed = Sealed { stream: stream.as_fd(), tls: &mut tls, plain: Vec::new() };
        let size = haggle(&mut sealed, Vec::new(), &self.export(), self.structured)?;
        Ok(Connection { stream: stream.into(), tls: Some(tls), size })
    }
}

/// Makes room for a whole batch of write payloads in one send; best effort, the system may cap it.
pub(crate) fn widen(stream: &OwnedFd) {
    let _ = sockopt::set_socket_send_buffer_size(stream, 2 << 20);
}

/// A stream over TLS while it is still blocking.
struct Sealed<'a> {
    stream: BorrowedFd<'a>,
    tls: &'a mut Tls,
    /// Opened and not read.
    plain: Vec<u8>,
}

impl Read for Sealed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.plain.is_empty() {
            let mut plain = vec![0; 64 << 10];
            let count = self.tls.receive(self.stream, &mut plain, true)?;
            plain.truncate(count);
            self.plain = plain;
        }
        let count = self.plain.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.plain[..count]);
        self.plain.drain(..count);
        Ok(count)
    }
}

impl Write for Sealed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tls.seal(bytes)?;
        self.tls.flush(self.stream, true)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Takes the greeting; gives what is to be said to it.
fn greet(stream: &mut impl Stream) -> io::Result<Vec<u8>> {
    let mut greeting = [0; Greeting::SIZE];
    stream.read_exact(&mut greeting)?;
    Greeting::parse(&greeting).map_err(|_| io::Error::other("not a newstyle NBD server"))?;
    Ok(ClientFlags::FIXED_NEWSTYLE.union(ClientFlags::NO_ZEROES).bits().to_be_bytes().to_vec())
}

/// From there to the answer of GO, `out` being what was not said yet; returns the export's size.
fn haggle(stream: &mut impl Stream, mut out: Vec<u8>, export: &str, structured: bool) -> io::Result<u64> {
    // Everything in one send: a careful client saves the round trips too, and they would drown the server's own time.
    if structured {
        option(&mut out, OptionCode::StructuredReply, &[])?;
    }
    option(&mut out, OptionCode::Go, &InfoPayload::build(export, &[]))?;
    stream.write_all(&out)?;
    let mut replies = io::BufReader::with_capacity(4096, stream);
    if structured && option_reply(&mut replies)?.0 != OptionReplyType::Ack {
        return Err(io::Error::other("the server refuses structured replies"));
    }
    let mut export_size = None;
    loop {
        match option_reply(&mut replies)? {
            (OptionReplyType::Info, payload) => {
                if let Ok(InfoItem::Export { size, .. }) = InfoItem::parse(&payload) {
                    export_size = Some(size);
                }
            }
            (OptionReplyType::Ack, _) => {
                return export_size.ok_or_else(|| io::Error::other("the server did not tell the size"));
            }
            (reply, payload) if reply.is_error() => {
                let message = String::from_utf8_lossy(&payload);
                return Err(io::Error::other(format!("the export was refused ({reply:?}): {message}")));
            }
            _ => {}
        }
    }
}

fn option(out: &mut Vec<u8>, option: OptionCode, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
    out.extend(OptionHeader { option, length }.encode());
    out.extend(payload);
    Ok(())
}

fn option_reply(stream: &mut impl Read) -> io::Result<(OptionReplyType, Vec<u8>)> {
    let mut header = [0; OptionReplyHeader::SIZE];
    stream.read_exact(&mut header)?;
    let header = OptionReplyHeader::parse(&header).map_err(io::Error::other)?;
    if header.length > 65536 {
        return Err(io::Error::other("an option reply that is far too long"));
    }
    let mut payload = vec![0; header.length as usize];
    stream.read_exact(&mut payload)?;
    Ok((header.reply, payload))
}
