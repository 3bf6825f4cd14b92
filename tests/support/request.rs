//! Requests as they go out, and replies as they came in.

use super::{len32, nbd, wire_len};

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
    pub length: u32,
    /// What follows the header.
    pub payload: Vec<u8>,
}

impl Request {
    /// A request without a payload.
    pub fn new(command: u16, offset: u64, length: u64) -> Self {
        Self { flags: 0, command, offset, length: wire_len(length), payload: Vec::new() }
    }

    /// `NBD_CMD_READ`.
    pub fn read(offset: u64, length: u64) -> Self {
        Self::new(nbd::CMD_READ, offset, length)
    }

    /// `NBD_CMD_WRITE`.
    pub fn write(offset: u64, data: &[u8]) -> Self {
        Self { flags: 0, command: nbd::CMD_WRITE, offset, length: len32(data), payload: data.to_vec() }
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

    /// The bytes of `NBD_CMD_DISC`, to which there is no reply.
    pub fn disconnect() -> Vec<u8> {
        Self::new(nbd::CMD_DISC, 0, 0).header(0xd15c)
    }

    /// The same with these command flags.
    #[must_use]
    pub fn with(mut self, flags: u16) -> Self {
        self.flags = flags;
        self
    }

    /// First byte, and the one behind the last.
    pub fn range(&self) -> (u64, u64) {
        (self.offset, self.offset.saturating_add(u64::from(self.length)))
    }

    /// The 28 bytes of the header.
    pub fn header(&self, cookie: u64) -> Vec<u8> {
        let mut bytes = nbd::REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&self.flags.to_be_bytes());
        bytes.extend_from_slice(&self.command.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&self.offset.to_be_bytes());
        bytes.extend_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// Header and payload.
    pub fn bytes(&self, cookie: u64) -> Vec<u8> {
        let mut bytes = self.header(cookie);
        bytes.extend_from_slice(&self.payload);
        bytes
    }
}

/// One chunk of a structured reply, without its data. Offsets and lengths in bytes.
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
    /// Block status: length in bytes and `nbd::STATE_*`.
    pub extents: Vec<(u32, u32)>,
    /// The chunks in the order in which they came; empty for a simple reply.
    pub chunks: Vec<Chunk>,
    /// Whether it was a structured reply.
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

    /// How many content chunks there were.
    pub fn content_chunks(&self) -> usize {
        self.chunks.iter().filter(|chunk| matches!(chunk, Chunk::Data(..) | Chunk::Hole(..))).count()
    }
}
