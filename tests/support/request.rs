//! Requests as they go out, and replies as they came in.

use super::client::Style;
use super::{nbd, wire_len};

/// A request, not yet numbered.
#[derive(Clone, Debug)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// The command.
    pub command: u16,
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes as stated in the header.
    pub length: u64,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// Block status with a payload: the length of the range, and which contexts are wanted.
    pub chosen: Option<(u64, Vec<u32>)>,
}

impl Request {
    /// A request without a payload.
    pub fn new(command: u16, offset: u64, length: u64) -> Self {
        Self { flags: 0, command, offset, length, payload: Vec::new(), chosen: None }
    }

    /// `NBD_CMD_READ`.
    pub fn read(offset: u64, length: u64) -> Self {
        Self::new(nbd::CMD_READ, offset, length)
    }

    /// `NBD_CMD_WRITE`. It does not say `PAYLOAD_LEN` unless told to, as some clients do not.
    pub fn write(offset: u64, data: &[u8]) -> Self {
        Self::new(nbd::CMD_WRITE, offset, data.len() as u64).carrying(data)
    }

    /// `NBD_CMD_FLUSH`.
    pub fn flush() -> Self {
        Self::new(nbd::CMD_FLUSH, 0, 0)
    }

    /// `NBD_CMD_TRIM`.
    pub fn trim(offset: u64, length: u64) -> Self {
        Self::new(nbd::CMD_TRIM, offset, length)
    }

    /// `NBD_CMD_WRITE_ZEROES`.
    pub fn zeroes(offset: u64, length: u64) -> Self {
        Self::new(nbd::CMD_WRITE_ZEROES, offset, length)
    }

    /// `NBD_CMD_CACHE`.
    pub fn cache(offset: u64, length: u64) -> Self {
        Self::new(nbd::CMD_CACHE, offset, length)
    }

    /// `NBD_CMD_BLOCK_STATUS`.
    pub fn status(offset: u64, length: u64) -> Self {
        Self::new(nbd::CMD_BLOCK_STATUS, offset, length)
    }

    /// `NBD_CMD_BLOCK_STATUS` of these contexts only: the range and they are in its payload.
    pub fn chosen_status(offset: u64, length: u64, contexts: &[u32]) -> Self {
        let mut payload = length.to_be_bytes().to_vec();
        contexts.iter().for_each(|context| payload.extend_from_slice(&context.to_be_bytes()));
        let request = Self::new(nbd::CMD_BLOCK_STATUS, offset, payload.len() as u64);
        let chosen = Some((length, contexts.to_vec()));
        Self { chosen, ..request.carrying(&payload).with(nbd::PAYLOAD_LEN) }
    }

    /// The bytes of `NBD_CMD_DISC` with a compact header; there is no reply.
    pub fn disconnect() -> Vec<u8> {
        Self::new(nbd::CMD_DISC, 0, 0).header(0xd15c)
    }

    /// The same with this behind its header, whatever the header says.
    #[must_use]
    pub fn carrying(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    /// The same with these command flags.
    #[must_use]
    pub fn with(mut self, flags: u16) -> Self {
        self.flags = flags;
        self
    }

    /// First byte of the range, and the one behind the last.
    pub fn range(&self) -> (u64, u64) {
        let length = self.chosen.as_ref().map_or(self.length, |chosen| chosen.0);
        (self.offset, self.offset.saturating_add(length))
    }

    /// Whether a block status request wants to know about this context.
    pub fn wants(&self, context: u32) -> bool {
        self.chosen.as_ref().is_none_or(|chosen| chosen.1.contains(&context))
    }

    /// The 28 bytes of the compact header.
    pub fn header(&self, cookie: u64) -> Vec<u8> {
        let mut bytes = self.header_start(nbd::REQUEST_MAGIC, cookie);
        bytes.extend_from_slice(&wire_len(self.length).to_be_bytes());
        bytes
    }

    /// The 32 bytes of the extended header.
    pub fn extended_header(&self, cookie: u64) -> Vec<u8> {
        let mut bytes = self.header_start(nbd::EXTENDED_REQUEST_MAGIC, cookie);
        bytes.extend_from_slice(&self.length.to_be_bytes());
        bytes
    }

    fn header_start(&self, magic: u32, cookie: u64) -> Vec<u8> {
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend_from_slice(&self.flags.to_be_bytes());
        bytes.extend_from_slice(&self.command.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&self.offset.to_be_bytes());
        bytes
    }

    /// Header and payload, as the style has them.
    pub fn bytes_in(&self, style: Style, cookie: u64) -> Vec<u8> {
        let mut bytes =
            if style == Style::Extended { self.extended_header(cookie) } else { self.header(cookie) };
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    /// Compact header and payload.
    pub fn bytes(&self, cookie: u64) -> Vec<u8> {
        self.bytes_in(Style::Structured, cookie)
    }
}

/// One chunk of a reply, without its data. Offsets and lengths in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// `OFFSET_DATA`.
    Data(u64, u64),
    /// `OFFSET_HOLE`.
    Hole(u64, u64),
    /// `BLOCK_STATUS` with its context id.
    Status(u32),
    /// `ERROR` or `ERROR_OFFSET`.
    Error(u32, Option<u64>),
    /// `NONE`.
    None,
}

/// Everything the server said in answer to one request.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    /// The first error, if any.
    pub error: Option<u32>,
    /// The error's text, if any.
    pub message: String,
    /// The bytes read; empty unless a read succeeded or partly succeeded.
    pub data: Vec<u8>,
    /// Block status of the first context asked for: length in bytes and state.
    pub extents: Vec<(u64, u32)>,
    /// Block status of every context, by its number.
    pub statuses: Vec<(u32, Vec<(u64, u32)>)>,
    /// The chunks in the order in which they came; empty for a simple reply.
    pub chunks: Vec<Chunk>,
    /// Whether it came in chunks.
    pub structured: bool,
}

impl Reply {
    /// Panics unless the request succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.error, None, "the request succeeds ({})", self.message);
        self
    }

    /// Panics unless the request failed with `errno`.
    #[track_caller]
    pub fn fails(self, errno: u32) -> Self {
        assert_eq!(self.error, Some(errno), "the request fails as specified ({})", self.message);
        self
    }

    /// The block status of one context.
    #[track_caller]
    pub fn status_of(&self, context: u32) -> &[(u64, u32)] {
        &self.statuses.iter().find(|told| told.0 == context).expect("the context is reported").1
    }

    /// How many content chunks there were.
    pub fn content_chunks(&self) -> usize {
        self.chunks.iter().filter(|chunk| matches!(chunk, Chunk::Data(..) | Chunk::Hole(..))).count()
    }
}
