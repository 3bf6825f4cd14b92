//! Replies of the transmission phase: simple replies and structured reply chunks.
//!
//! ```text
//!   simple reply       | magic 4 | error 4 | cookie 8 | data of a read, when there is no error
//!   structured chunk   | magic 4 | flags 2 | type 2 | cookie 8 | length 4 | payload
//!      offset data     |   offset 8 | data
//!      offset hole     |   offset 8 | length 4
//!      block status    |   context 4 | (length 4 | status flags 4), one or more
//!      error           |   error 4 | message length 2 | message
//!      error offset    |   error 4 | message length 2 | message | offset 8
//! ```
//!
//! Chunks with extended headers are in [`super::extended`]; their payloads are parsed here, too.
//!
//! What goes before data that is sent from elsewhere is built into an array of its size, so that the hot path allocates
//! nothing.

use super::constants::*;
use super::extended::{EXTENDED_CHUNK_HEADER_SIZE, ExtendedBlockDescriptors};
use super::fields::{Fields, Malformed, clip, field, length_u32, parse_string, put};
use super::request::{BadMagic, Cookie};

/// An error as the specification numbers it ("Error values").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Errno {
    /// Operation not permitted.
    Perm = EPERM,
    /// Input/output error.
    Io = EIO,
    /// Cannot allocate memory.
    NoMem = ENOMEM,
    /// Invalid argument.
    Inval = EINVAL,
    /// No space left on device.
    NoSpc = ENOSPC,
    /// Value too large.
    Overflow = EOVERFLOW,
    /// Operation not supported.
    NotSup = ENOTSUP,
    /// Server is in the process of being shut down.
    Shutdown = ESHUTDOWN,
}

impl Errno {
    /// The value of the error field.
    #[must_use]
    pub const fn to_wire(self) -> u32 {
        self as u32
    }

    /// What the value of an error field means to a client: nothing when it is zero; a value that the specification does not
    /// define is treated as [`Errno::Inval`], as it demands.
    #[must_use]
    pub const fn from_wire(value: u32) -> Option<Self> {
        match value {
            0 => None,
            EPERM => Some(Self::Perm),
            EIO => Some(Self::Io),
            ENOMEM => Some(Self::NoMem),
            ENOSPC => Some(Self::NoSpc),
            EOVERFLOW => Some(Self::Overflow),
            ENOTSUP => Some(Self::NotSup),
            ESHUTDOWN => Some(Self::Shutdown),
            _ => Some(Self::Inval),
        }
    }
}

/// Bytes of a simple reply, without data.
pub const SIMPLE_REPLY_SIZE: usize = 16;
/// Bytes of the header of a structured reply chunk.
pub const CHUNK_HEADER_SIZE: usize = 20;
/// Bytes before the data of an offset data chunk: header and offset.
pub const DATA_CHUNK_HEADER_SIZE: usize = 28;
/// Bytes of a whole offset hole chunk.
pub const HOLE_CHUNK_SIZE: usize = 32;
/// Most data that one offset data chunk can carry, in bytes.
pub const MAX_CHUNK_DATA: u32 = u32::MAX - 8;

/// A simple reply; the data of a successful read follows it.
#[inline]
#[must_use]
pub const fn simple_reply(error: Option<Errno>, cookie: Cookie) -> [u8; SIMPLE_REPLY_SIZE] {
    let error = match error {
        Some(errno) => errno.to_wire(),
        None => 0,
    };
    let mut bytes = [0; SIMPLE_REPLY_SIZE];
    put(&mut bytes, 0, &SIMPLE_REPLY_MAGIC.to_be_bytes());
    put(&mut bytes, 4, &error.to_be_bytes());
    put(&mut bytes, 8, &cookie.0.to_be_bytes());
    bytes
}

/// The header of a structured reply chunk of type `kind` (`REPLY_TYPE_*`); `length` bytes of payload follow it.
#[inline]
#[must_use]
pub const fn chunk_header(flags: u16, kind: u16, cookie: Cookie, length: u32) -> [u8; CHUNK_HEADER_SIZE] {
    let mut bytes = [0; CHUNK_HEADER_SIZE];
    put(&mut bytes, 0, &STRUCTURED_REPLY_MAGIC.to_be_bytes());
    put(&mut bytes, 4, &flags.to_be_bytes());
    put(&mut bytes, 6, &kind.to_be_bytes());
    put(&mut bytes, 8, &cookie.0.to_be_bytes());
    put(&mut bytes, 16, &length.to_be_bytes());
    bytes
}

/// The chunk that only ends a reply: success, when no error chunk came before.
#[inline]
#[must_use]
pub const fn none_chunk(cookie: Cookie) -> [u8; CHUNK_HEADER_SIZE] {
    chunk_header(REPLY_FLAG_DONE, REPLY_TYPE_NONE, cookie, 0)
}

/// What goes before the `length` bytes of data that are at `offset` of the export; `length` is 1 to [`MAX_CHUNK_DATA`].
#[inline]
#[must_use]
pub const fn data_chunk_header(
    flags: u16,
    cookie: Cookie,
    offset: u64,
    length: u32,
) -> [u8; DATA_CHUNK_HEADER_SIZE] {
    debug_assert!(length != 0 && length <= MAX_CHUNK_DATA);
    let mut bytes = [0; DATA_CHUNK_HEADER_SIZE];
    put(&mut bytes, 0, &chunk_header(flags, REPLY_TYPE_OFFSET_DATA, cookie, length.saturating_add(8)));
    put(&mut bytes, CHUNK_HEADER_SIZE, &offset.to_be_bytes());
    bytes
}

/// The chunk that says that `length` bytes at `offset` of the export are zero; `length` is not zero.
#[inline]
#[must_use]
pub const fn hole_chunk(flags: u16, cookie: Cookie, offset: u64, length: u32) -> [u8; HOLE_CHUNK_SIZE] {
    debug_assert!(length != 0);
    let mut bytes = [0; HOLE_CHUNK_SIZE];
    put(&mut bytes, 0, &chunk_header(flags, REPLY_TYPE_OFFSET_HOLE, cookie, 12));
    put(&mut bytes, CHUNK_HEADER_SIZE, &offset.to_be_bytes());
    put(&mut bytes, CHUNK_HEADER_SIZE + 8, &length.to_be_bytes());
    bytes
}

/// One extent of a metadata context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockDescriptor {
    /// Length in bytes, not zero.
    pub length: u32,
    /// Status flags; for `base:allocation`, [`STATE_HOLE`] and [`STATE_ZERO`].
    pub flags: u32,
}

/// Appends a block status chunk of metadata context `context`. There should be one descriptor at least; those beyond
/// [`MAX_BLOCK_DESCRIPTORS`] are left out.
pub fn append_block_status_chunk(
    out: &mut Vec<u8>,
    flags: u16,
    cookie: Cookie,
    context: u32,
    descriptors: &[BlockDescriptor],
) {
    let descriptors = &descriptors[..descriptors.len().min(MAX_BLOCK_DESCRIPTORS)];
    let length = length_u32(4 + 8 * descriptors.len());
    out.extend_from_slice(&chunk_header(flags, REPLY_TYPE_BLOCK_STATUS, cookie, length));
    out.extend_from_slice(&context.to_be_bytes());
    for descriptor in descriptors {
        out.extend_from_slice(&descriptor.length.to_be_bytes());
        out.extend_from_slice(&descriptor.flags.to_be_bytes());
    }
}

/// The chunk that says that the whole request failed; `message` is for people and is clipped to what the specification
/// allows.
#[must_use]
pub fn error_chunk(flags: u16, cookie: Cookie, error: Errno, message: &str) -> Vec<u8> {
    error_payload(flags, REPLY_TYPE_ERROR, cookie, error, message, &[])
}

/// The chunk that says that the request failed at `offset`, which lies within its range.
#[must_use]
pub fn error_offset_chunk(flags: u16, cookie: Cookie, error: Errno, message: &str, offset: u64) -> Vec<u8> {
    error_payload(flags, REPLY_TYPE_ERROR_OFFSET, cookie, error, message, &offset.to_be_bytes())
}

fn error_payload(flags: u16, kind: u16, cookie: Cookie, error: Errno, message: &str, tail: &[u8]) -> Vec<u8> {
    let message = clip(message);
    let length = length_u32(6 + message.len() + tail.len());
    let mut out = chunk_header(flags, kind, cookie, length).to_vec();
    append_error(&mut out, error, message);
    out.extend_from_slice(tail);
    out
}

/// Appends what every error chunk's payload begins with; `message` must be clipped.
pub(super) fn append_error(out: &mut Vec<u8>, error: Errno, message: &str) {
    let message_length = u16::try_from(message.len()).expect("a clipped string is at most 4096 bytes");
    out.extend_from_slice(&error.to_wire().to_be_bytes());
    out.extend_from_slice(&message_length.to_be_bytes());
    out.extend_from_slice(message.as_bytes());
}

/// Which kind of reply begins with these four bytes: what a client must know to tell how much header to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyKind {
    /// [`SIMPLE_REPLY_SIZE`] bytes of header.
    Simple,
    /// [`CHUNK_HEADER_SIZE`] bytes of header.
    Structured,
    /// [`EXTENDED_CHUNK_HEADER_SIZE`] bytes of header.
    Extended,
}

impl ReplyKind {
    /// Reads the magic of a reply.
    ///
    /// # Errors
    /// It is no magic of a reply.
    pub fn parse(magic: [u8; 4]) -> Result<Self, BadMagic> {
        match u32::from_be_bytes(magic) {
            SIMPLE_REPLY_MAGIC => Ok(Self::Simple),
            STRUCTURED_REPLY_MAGIC => Ok(Self::Structured),
            EXTENDED_REPLY_MAGIC => Ok(Self::Extended),
            found => Err(BadMagic { found: u64::from(found) }),
        }
    }

    /// Bytes of its header, the magic included.
    #[must_use]
    pub const fn header_size(self) -> usize {
        match self {
            Self::Simple => SIMPLE_REPLY_SIZE,
            Self::Structured => CHUNK_HEADER_SIZE,
            Self::Extended => EXTENDED_CHUNK_HEADER_SIZE,
        }
    }
}

/// A simple reply, as a client reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimpleReply {
    /// The error field as it came; see [`Errno::from_wire`].
    pub error: u32,
    /// Of the request.
    pub cookie: Cookie,
}

impl SimpleReply {
    /// Reads a simple reply.
    ///
    /// # Errors
    /// The magic is wrong.
    #[inline]
    pub fn parse(bytes: &[u8; SIMPLE_REPLY_SIZE]) -> Result<Self, BadMagic> {
        BadMagic::check_u32(SIMPLE_REPLY_MAGIC, field(bytes, 0))?;
        Ok(Self {
            error: u32::from_be_bytes(field(bytes, 4)),
            cookie: Cookie(u64::from_be_bytes(field(bytes, 8))),
        })
    }
}

/// The header of a structured reply chunk, as a client reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// `REPLY_FLAG_*`.
    pub flags: u16,
    /// `REPLY_TYPE_*`.
    pub kind: u16,
    /// Of the request.
    pub cookie: Cookie,
    /// Length of the payload in bytes.
    pub length: u32,
}

impl ChunkHeader {
    /// Reads the header of a chunk.
    ///
    /// # Errors
    /// The magic is wrong.
    #[inline]
    pub fn parse(bytes: &[u8; CHUNK_HEADER_SIZE]) -> Result<Self, BadMagic> {
        BadMagic::check_u32(STRUCTURED_REPLY_MAGIC, field(bytes, 0))?;
        Ok(Self {
            flags: u16::from_be_bytes(field(bytes, 4)),
            kind: u16::from_be_bytes(field(bytes, 6)),
            cookie: Cookie(u64::from_be_bytes(field(bytes, 8))),
            length: u32::from_be_bytes(field(bytes, 16)),
        })
    }

    /// Whether this is the last chunk of its reply.
    #[must_use]
    pub const fn is_done(&self) -> bool {
        self.flags & REPLY_FLAG_DONE != 0
    }

    /// Whether this is an error chunk, of a known type or not.
    #[must_use]
    pub const fn is_error(&self) -> bool {
        self.kind & REPLY_TYPE_FLAG_ERROR != 0
    }
}

/// The payload of a structured or extended reply chunk, as a client reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk<'a> {
    /// Nothing.
    None,
    /// Bytes of the export.
    OffsetData {
        /// Where they are.
        offset: u64,
        /// They themselves, one at least.
        data: &'a [u8],
    },
    /// A range of the export that is zero.
    OffsetHole {
        /// Where it begins.
        offset: u64,
        /// Its length in bytes, not zero.
        length: u32,
    },
    /// Extents of one metadata context.
    BlockStatus {
        /// The number that the context got in the handshake.
        context: u32,
        /// The extents, one at least.
        descriptors: BlockDescriptors<'a>,
    },
    /// Extents of one metadata context, with 64-bit lengths; only in extended chunks.
    BlockStatusExt {
        /// The number that the context got in the handshake.
        context: u32,
        /// The extents, one at least.
        descriptors: ExtendedBlockDescriptors<'a>,
    },
    /// A failure, of any error chunk type.
    Error {
        /// The error field as it came; see [`Errno::from_wire`].
        error: u32,
        /// For people; may be empty.
        message: &'a str,
        /// Where it failed, when the chunk's type says so.
        offset: Option<u64>,
    },
    /// A type that is not known here and is no error.
    Other(u16, &'a [u8]),
}

impl<'a> Chunk<'a> {
    /// Reads the payload of a chunk of type `kind`.
    ///
    /// # Errors
    /// It is not as long as its type demands, a length or an error is zero, or a message is no string.
    pub fn parse(kind: u16, payload: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new(payload);
        match kind {
            REPLY_TYPE_NONE => fields.end().map(|()| Self::None),
            REPLY_TYPE_OFFSET_DATA => {
                let offset = fields.u64()?;
                if fields.is_empty() {
                    return Err(Malformed::Truncated);
                }
                Ok(Self::OffsetData { offset, data: fields.rest() })
            }
            REPLY_TYPE_OFFSET_HOLE => {
                let (offset, length) = (fields.u64()?, fields.u32()?);
                fields.end()?;
                if length == 0 { Err(Malformed::Zero) } else { Ok(Self::OffsetHole { offset, length }) }
            }
            REPLY_TYPE_BLOCK_STATUS => {
                let context = fields.u32()?;
                Ok(Self::BlockStatus { context, descriptors: BlockDescriptors::parse(fields.rest())? })
            }
            REPLY_TYPE_BLOCK_STATUS_EXT => {
                let (context, count) = (fields.u32()?, fields.u32()?);
                let descriptors = ExtendedBlockDescriptors::parse(count, fields.rest())?;
                Ok(Self::BlockStatusExt { context, descriptors })
            }
            kind if kind & REPLY_TYPE_FLAG_ERROR != 0 => {
                let error = fields.u32()?;
                let length = fields.u16()?;
                let message = parse_string(fields.bytes(usize::from(length))?)?;
                let offset = if kind == REPLY_TYPE_ERROR_OFFSET { Some(fields.u64()?) } else { None };
                if error == 0 { Err(Malformed::Zero) } else { Ok(Self::Error { error, message, offset }) }
            }
            kind => Ok(Self::Other(kind, payload)),
        }
    }
}

/// The extents of a block status chunk, one at least, none of length zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDescriptors<'a>(&'a [u8]);

impl<'a> BlockDescriptors<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let (pairs, rest) = bytes.as_chunks::<8>();
        if pairs.is_empty() || !rest.is_empty() {
            return Err(Malformed::Truncated);
        }
        let descriptors = Self(bytes);
        if descriptors.iter().any(|descriptor| descriptor.length == 0) {
            return Err(Malformed::Zero);
        }
        Ok(descriptors)
    }

    /// The extents in the order of the export.
    pub fn iter(&self) -> impl Iterator<Item = BlockDescriptor> + use<'a> {
        self.0.as_chunks::<8>().0.iter().map(|bytes| BlockDescriptor {
            length: u32::from_be_bytes(field(bytes, 0)),
            flags: u32::from_be_bytes(field(bytes, 4)),
        })
    }
}

#[cfg(test)]
#[path = "reply_tests.rs"]
mod tests;
