//! A raw NBD peer, written from the specification's text and nothing else: the socket and the handshake.
//!
//! It is deliberately dumb. It sends what it is told to send, well formed or not, and checks everything that comes
//! back: magic numbers, echoes, lengths. The transmission phase is in [`super::client`].

use std::io::{self, BufReader, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::{PATIENCE, nbd};

/// A connected socket of either kind.
#[derive(Debug)]
pub enum Stream {
    /// A unix socket.
    Unix(UnixStream),
    /// A TCP socket.
    Tcp(TcpStream),
}

impl Stream {
    /// Connects to a unix socket.
    pub fn unix(path: &Path) -> io::Result<Self> {
        UnixStream::connect(path).map(Self::Unix)
    }

    /// Connects to `host:port`.
    pub fn tcp(address: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        Ok(Self::Tcp(stream))
    }

    /// Another handle on the same socket.
    pub fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
        }
    }

    /// The local port, if it is a TCP socket.
    pub fn local_port(&self) -> Option<u16> {
        match self {
            Self::Unix(_) => None,
            Self::Tcp(stream) => Some(stream.local_addr().expect("a connected socket has an address").port()),
        }
    }

    /// Shuts one or both directions down.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        }
    }

    /// Whether calls wait.
    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_nonblocking(on),
            Self::Tcp(stream) => stream.set_nonblocking(on),
        }
    }

    /// Calls wait, but not for ever.
    pub fn be_patient(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))
            }
            Self::Tcp(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))
            }
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buffer),
            Self::Tcp(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tcp(stream) => stream.write(bytes),
        }
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write_vectored(parts),
            Self::Tcp(stream) => stream.write_vectored(parts),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One reply to an option: `kind` is an `nbd::REP_*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// Which option it answers.
    pub option: u32,
    /// The reply type.
    pub kind: u32,
    /// What came with it.
    pub data: Vec<u8>,
}

impl OptionReply {
    /// Whether the reply is an error.
    pub fn is_error(&self) -> bool {
        self.kind & nbd::REP_ERROR != 0
    }

    /// Whether no further reply to the same option follows.
    pub fn is_final(&self) -> bool {
        self.is_error() || self.kind == nbd::REP_ACK
    }
}

/// What the server said about an export when the handshake asked for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Export {
    /// The size in bytes.
    pub size: u64,
    /// The transmission flags.
    pub flags: u16,
    /// The canonical name, if told.
    pub name: Option<String>,
    /// The description, if told.
    pub description: Option<String>,
    /// Minimum, preferred and maximum block size, if told.
    pub block_sizes: Option<(u32, u32, u32)>,
}

/// One connection during the handshake.
#[derive(Debug)]
pub struct Peer {
    stream: BufReader<Stream>,
}

impl Peer {
    /// Takes a connected socket; nothing has been read from it.
    pub fn new(stream: Stream) -> Self {
        stream.be_patient().expect("setting a socket's timeouts");
        Self { stream: BufReader::with_capacity(1 << 16, stream) }
    }

    /// The socket itself.
    pub fn stream(&self) -> &Stream {
        self.stream.get_ref()
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).expect("sending to the server");
    }

    /// Sends bytes as they are; the server may have gone.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }

    /// Sends as much of `bytes` as goes without waiting; the server may have gone.
    pub fn shove(&mut self, bytes: &[u8]) {
        // Whatever goes wrong: no more can be sent, which is what the caller expects.
        let _ = self.stream.get_mut().set_nonblocking(true);
        let _ = self.stream.get_mut().write_all(bytes);
        let _ = self.stream.get_mut().set_nonblocking(false);
    }

    /// Receives exactly `length` bytes.
    pub fn receive_vec(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.fill(&mut bytes);
        bytes
    }

    /// Fills `bytes` from the socket.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        self.try_fill(bytes).expect("receiving from the server");
    }

    /// Fills `bytes` from the socket; the server may have gone.
    pub fn try_fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.stream.read_exact(bytes)
    }

    /// Two bytes, big-endian.
    pub fn u16(&mut self) -> u16 {
        self.try_u16().expect("receiving from the server")
    }

    /// The same; the server may have gone.
    pub fn try_u16(&mut self) -> io::Result<u16> {
        let mut bytes = [0; 2];
        self.try_fill(&mut bytes)?;
        Ok(u16::from_be_bytes(bytes))
    }

    /// Four bytes, big-endian.
    pub fn u32(&mut self) -> u32 {
        self.try_u32().expect("receiving from the server")
    }

    /// The same; the server may have gone.
    pub fn try_u32(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.try_fill(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    /// Eight bytes, big-endian.
    pub fn u64(&mut self) -> u64 {
        self.try_u64().expect("receiving from the server")
    }

    /// The same; the server may have gone.
    pub fn try_u64(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.try_fill(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }

    /// The server must close without sending another byte.
    pub fn expect_end(&mut self) {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(0) => {}
            Ok(_) => panic!("the server sent {byte:02x?} where it had to close the connection"),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            Err(error) => panic!("the server did not close the connection: {error}"),
        }
    }

    /// Receives the greeting; returns the handshake flags.
    pub fn greeting(&mut self) -> u16 {
        assert_eq!(self.u64(), nbd::MAGIC, "the greeting starts with NBDMAGIC");
        assert_eq!(self.u64(), nbd::OPTION_MAGIC, "then comes IHAVEOPT");
        self.u16()
    }

    /// Greeting and client flags: fixed newstyle, no zeroes. Option haggling can begin.
    pub fn start(&mut self) {
        let flags = self.greeting();
        assert_ne!(flags & nbd::FLAG_FIXED_NEWSTYLE, 0, "fixed newstyle is offered");
        self.send(&(u32::from(flags & 3)).to_be_bytes());
    }

    /// Sends an option with its true length.
    pub fn send_option(&mut self, option: u32, data: &[u8]) {
        let bytes = option_bytes(option, data);
        self.send(&bytes);
    }

    /// Receives one option reply; only its framing is checked.
    pub fn option_reply(&mut self) -> OptionReply {
        assert_eq!(self.u64(), nbd::OPTION_REPLY_MAGIC, "an option reply starts with its magic number");
        let (option, kind, length) = (self.u32(), self.u32(), self.u32());
        assert!(length <= 1 << 20, "an option reply of {length} bytes");
        let data = self.receive_vec(super::size(u64::from(length)));
        let reply = OptionReply { option, kind, data };
        if kind == nbd::REP_ACK {
            assert!(reply.data.is_empty(), "an ACK carries no data");
        }
        if reply.is_error() {
            let message = std::str::from_utf8(&reply.data).expect("an error's message is UTF-8");
            assert!(message.len() <= 4096 && !message.contains('\0'), "an error's message is a string");
        }
        reply
    }

    /// Sends an option and receives all replies to it, the final one last.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Vec<OptionReply> {
        self.send_option(option, data);
        self.option_replies(option)
    }

    /// Receives all replies to `option`, the final one last.
    pub fn option_replies(&mut self, option: u32) -> Vec<OptionReply> {
        let mut replies = Vec::new();
        loop {
            let reply = self.option_reply();
            assert_eq!(reply.option, option, "the reply names the option it answers");
            let last = reply.is_final();
            replies.push(reply);
            if last {
                return replies;
            }
        }
    }

    /// Sends an option; returns the type of the final reply.
    pub fn ask(&mut self, option: u32, data: &[u8]) -> u32 {
        self.option(option, data).last().expect("there is a final reply").kind
    }

    /// `NBD_OPT_LIST`: names and descriptions.
    pub fn list(&mut self) -> Vec<(String, String)> {
        let mut replies = self.option(nbd::OPT_LIST, &[]);
        let last = replies.pop().expect("there is a final reply");
        assert_eq!(last.kind, nbd::REP_ACK, "LIST succeeds");
        replies
            .into_iter()
            .map(|reply| {
                assert_eq!(reply.kind, nbd::REP_SERVER);
                let (length, rest) = reply.data.split_at(4);
                let length = u32::from_be_bytes(length.try_into().expect("four bytes"));
                let (name, description) = rest.split_at(super::size(u64::from(length)));
                (text(name), text(description))
            })
            .collect()
    }

    /// `NBD_OPT_INFO` or `NBD_OPT_GO`; the error reply if refused.
    pub fn info_or_go(&mut self, option: u32, name: &str, wanted: &[u16]) -> Result<Export, OptionReply> {
        let mut replies = self.option(option, &info_data(name.as_bytes(), wanted));
        let last = replies.pop().expect("there is a final reply");
        if last.is_error() {
            assert!(replies.iter().all(|reply| reply.kind == nbd::REP_INFO));
            return Err(last);
        }
        let mut export = Export::default();
        let mut told = Vec::new();
        for reply in replies {
            assert_eq!(reply.kind, nbd::REP_INFO, "only information precedes the ACK");
            let (kind, data) = reply.data.split_at(2);
            let kind = u16::from_be_bytes(kind.try_into().expect("two bytes"));
            assert!(!told.contains(&kind), "information {kind} is told once");
            told.push(kind);
            match kind {
                nbd::INFO_EXPORT => {
                    assert_eq!(data.len(), 10, "INFO_EXPORT has 12 bytes");
                    export.size = u64::from_be_bytes(data[..8].try_into().expect("eight bytes"));
                    export.flags = u16::from_be_bytes(data[8..].try_into().expect("two bytes"));
                }
                nbd::INFO_NAME => export.name = Some(text(data)),
                nbd::INFO_DESCRIPTION => export.description = Some(text(data)),
                nbd::INFO_BLOCK_SIZE => {
                    assert_eq!(data.len(), 12, "INFO_BLOCK_SIZE has 14 bytes");
                    let word =
                        |at: usize| u32::from_be_bytes(data[at..at + 4].try_into().expect("four bytes"));
                    export.block_sizes = Some((word(0), word(4), word(8)));
                }
                _ => {}
            }
        }
        assert!(told.contains(&nbd::INFO_EXPORT), "INFO_EXPORT is always told");
        assert_ne!(export.flags & nbd::HAS_FLAGS, 0, "HAS_FLAGS is always set");
        Ok(export)
    }

    /// `NBD_OPT_GO`; on success this connection is in the transmission phase.
    pub fn go(&mut self, name: &str) -> Result<Export, OptionReply> {
        self.info_or_go(nbd::OPT_GO, name, &[])
    }

    /// `NBD_OPT_INFO`.
    pub fn info(&mut self, name: &str, wanted: &[u16]) -> Result<Export, OptionReply> {
        self.info_or_go(nbd::OPT_INFO, name, wanted)
    }

    /// `NBD_OPT_EXPORT_NAME` of an export that exists; `zeroes`: whether the 124 zero bytes must follow.
    pub fn export_name(&mut self, name: &str, zeroes: bool) -> Export {
        self.send_option(nbd::OPT_EXPORT_NAME, name.as_bytes());
        let export = Export { size: self.u64(), flags: self.u16(), ..Export::default() };
        if zeroes {
            assert!(self.receive_vec(124).iter().all(|&byte| byte == 0), "124 reserved zero bytes follow");
        }
        assert_ne!(export.flags & nbd::HAS_FLAGS, 0, "HAS_FLAGS is always set");
        export
    }

    /// Negotiates structured replies.
    pub fn structured(&mut self) {
        assert_eq!(
            self.ask(nbd::OPT_STRUCTURED_REPLY, &[]),
            nbd::REP_ACK,
            "structured replies are supported"
        );
    }

    /// Negotiates extended headers.
    pub fn extended(&mut self) {
        assert_eq!(self.ask(nbd::OPT_EXTENDED_HEADERS, &[]), nbd::REP_ACK, "extended headers are supported");
    }

    /// `NBD_OPT_{LIST,SET}_META_CONTEXT`: ids and names, or the error reply.
    pub fn contexts(
        &mut self,
        option: u32,
        name: &str,
        queries: &[&str],
    ) -> Result<Vec<(u32, String)>, OptionReply> {
        let mut replies = self.option(option, &context_data(name.as_bytes(), queries));
        let last = replies.pop().expect("there is a final reply");
        if last.is_error() {
            return Err(last);
        }
        Ok(replies
            .into_iter()
            .map(|reply| {
                assert_eq!(reply.kind, nbd::REP_META_CONTEXT);
                let (id, name) = reply.data.split_at(4);
                (u32::from_be_bytes(id.try_into().expect("four bytes")), text(name))
            })
            .collect())
    }

    /// The server must still answer options: asks for the list.
    pub fn assert_usable(&mut self) {
        assert!(!self.list().is_empty(), "the connection is still usable and lists an export");
    }
}

/// An option as it goes over the wire.
pub fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    option_with_length(option, super::len32(data), data)
}

/// An option whose stated length need not be that of its data.
pub fn option_with_length(option: u32, length: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = nbd::OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
pub fn info_data(name: &[u8], wanted: &[u16]) -> Vec<u8> {
    let mut data = super::len32(name).to_be_bytes().to_vec();
    data.extend_from_slice(name);
    data.extend_from_slice(&u16::try_from(wanted.len()).expect("few requests").to_be_bytes());
    for item in wanted {
        data.extend_from_slice(&item.to_be_bytes());
    }
    data
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
pub fn context_data(name: &[u8], queries: &[&str]) -> Vec<u8> {
    let mut data = super::len32(name).to_be_bytes().to_vec();
    data.extend_from_slice(name);
    data.extend_from_slice(&u32::try_from(queries.len()).expect("few queries").to_be_bytes());
    for query in queries {
        data.extend_from_slice(&super::len32(query.as_bytes()).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

fn text(bytes: &[u8]) -> String {
    let text = String::from_utf8(bytes.to_vec()).expect("strings are UTF-8");
    assert!(text.len() <= 4096 && !text.contains('\0'), "strings are short and have no NUL");
    text
}
