//! Connecting: address, socket options, and the newstyle handshake up to the transmission phase.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use memdev::{Error, ErrorKind, Result};
use rustix::net::sockopt;

use crate::wire::{u32_at, u64_at};

/// No handshake and no drain may hang a run for longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

const GREETING: &[u8; 16] = b"NBDMAGICIHAVEOPT";
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Fixed newstyle and no zeroes, which every server of the last ten years offers.
const CLIENT_FLAGS: u32 = 3;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_FLAG_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;

/// Where a server listens.
#[derive(Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub(crate) struct Address {
    /// The server's unix socket
    #[arg(long, value_name = "PATH")]
    pub(crate) unix: Option<PathBuf>,
    /// The server's TCP address; for load only ever a loopback one
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) tcp: Option<String>,
}

/// What to connect to, and as what.
#[derive(Args, Clone, Debug)]
pub(crate) struct Target {
    #[command(flatten)]
    pub(crate) address: Address,
    /// The export to open; each connection has a session of its own where the server gives it one
    #[arg(long, default_value = "", value_name = "NAME")]
    pub(crate) export: String,
    /// Share the session ID among all connections, by opening NAME@ID
    #[arg(long, value_name = "ID")]
    pub(crate) share: Option<String>,
    /// Negotiate structured replies
    #[arg(long)]
    pub(crate) structured: bool,
}

/// An open connection in the transmission phase.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) stream: OwnedFd,
    /// The export's size in bytes.
    pub(crate) size: u64,
}

/// A stream of either kind while it is still blocking.
trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

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
        match (&self.address.unix, &self.address.tcp) {
            (Some(path), _) => {
                let stream =
                    UnixStream::connect(path).map_err(|e| Error::io("Cannot connect to", e).on_path(path))?;
                self.open(stream).map_err(|e| Error::io("Handshake failed with", e).on_path(path))
            }
            (None, Some(address)) => {
                let stream =
                    TcpStream::connect(address).map_err(|e| Error::io("Cannot connect to", e).on(address))?;
                let opened = stream.set_nodelay(true).and_then(|()| self.open(stream));
                opened.map_err(|e| Error::io("Handshake failed with", e).on(address))
            }
            (None, None) => Err(Error::new(ErrorKind::Invalid, "Neither --unix nor --tcp was given")),
        }
    }

    fn open<S: Stream + AsFd + Into<OwnedFd>>(&self, mut stream: S) -> io::Result<Connection> {
        sockopt::set_socket_timeout(&stream, sockopt::Timeout::Recv, Some(PATIENCE))?;
        let size = haggle(&mut stream, &self.export(), self.structured)?;
        Ok(Connection { stream: stream.into(), size })
    }
}

/// Makes room for a whole batch of write payloads in one send; best effort, the system may cap it.
pub(crate) fn widen(stream: &OwnedFd) {
    let _ = sockopt::set_socket_send_buffer_size(stream, 2 << 20);
}

/// From the greeting to the answer of GO; returns the export's size.
fn haggle(stream: &mut impl Stream, export: &str, structured: bool) -> io::Result<u64> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    if !greeting.starts_with(GREETING) {
        return Err(io::Error::other("not a newstyle NBD server"));
    }
    // Everything in one send: a careful client saves the round trips too, and they would drown the server's own time.
    let mut out = CLIENT_FLAGS.to_be_bytes().to_vec();
    if structured {
        option(&mut out, OPT_STRUCTURED_REPLY, &[]);
    }
    let name = export.as_bytes();
    let length = u32::try_from(name.len()).map_err(io::Error::other)?;
    option(&mut out, OPT_GO, &[&length.to_be_bytes()[..], name, &[0, 0]].concat());
    stream.write_all(&out)?;
    let mut replies = io::BufReader::with_capacity(4096, stream);
    if structured {
        let (kind, _) = option_reply(&mut replies)?;
        if kind != REP_ACK {
            return Err(io::Error::other("the server refuses structured replies"));
        }
    }
    let mut size = None;
    loop {
        let (kind, data) = option_reply(&mut replies)?;
        match kind {
            REP_INFO if data.len() >= 12 && data.starts_with(&INFO_EXPORT.to_be_bytes()) => {
                size = Some(u64_at(&data, 2));
            }
            REP_ACK => return size.ok_or_else(|| io::Error::other("the server did not tell the size")),
            kind if kind & REP_FLAG_ERROR != 0 => {
                let message = String::from_utf8_lossy(&data).into_owned();
                return Err(io::Error::other(format!("export refused with {kind:#x}: {message}")));
            }
            _ => {}
        }
    }
}

fn option(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    out.extend(OPTION_MAGIC);
    out.extend(kind.to_be_bytes());
    out.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend(data);
}

fn option_reply(stream: &mut impl Read) -> io::Result<(u32, Vec<u8>)> {
    let mut header = [0; 20];
    stream.read_exact(&mut header)?;
    let length = u32_at(&header, 16);
    if u64_at(&header, 0) != OPTION_REPLY_MAGIC || length > 65536 {
        return Err(io::Error::other("a garbled option reply"));
    }
    let mut data = vec![0; length as usize];
    stream.read_exact(&mut data)?;
    Ok((u32_at(&header, 12), data))
}
