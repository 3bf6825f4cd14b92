//! Extended headers: requests and reply chunks of one size each, with 64-bit lengths.
//!
//! ```text
//!   extended request   | magic 4 | flags 2 | command 2 | cookie 8 | offset 8 | length 8 | payload, if there is one
//!      status payload  |   effect length 8 | context 4, one or more
//!   extended chunk     | magic 4 | flags 2 | type 2 | cookie 8 | offset of the request 8 | length 8 | payload
//!      block status    |   context 4 | count 4 | (length 8 | status flags 8), one or more
//! ```
//!
//! The other payloads are those of structured chunks. Whether `length` counts bytes that follow the header or bytes of
//! the export that are meant is told by `CMD_FLAG_PAYLOAD_LEN`.

use super::constants::*;
use super::fields::{Fields, Malformed, clip, field, length_u32, put};
use super::reply::{Errno, append_error};
use super::request::{BadMagic, Command, CommandFlags, Cookie, Request};

/// Bytes of the header of an extended reply chunk.
pub const EXTENDED_CHUNK_HEADER_SIZE: usize = 32;
/// Bytes before the data of an extended offset data chunk: header and offset.
pub const EXTENDED_DATA_CHUNK_HEADER_SIZE: usize = 40;
/// Bytes of a whole extended offset hole chunk.
pub const EXTENDED_HOLE_CHUNK_SIZE: usize = 44;

/// A request with an extended header, and what every request is once its header is read: a compact one has no length that
/// this could not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtendedRequest {
    /// How.
    pub flags: CommandFlags,
    /// What.
    pub command: Command,
    /// By which name the reply will be known.
    pub cookie: Cookie,
    /// First byte of the range.
    pub offset: u64,
    /// With [`CommandFlags::PAYLOAD_LEN`] the length of the payload that follows, else of the range; in bytes.
    pub length: u64,
}

impl ExtendedRequest {
    /// Bytes on the wire, without a payload.
    pub const SIZE: usize = 32;

    /// Reads the header of an extended request.
    ///
    /// # Errors
    /// The magic is wrong; nothing behind it can be trusted to be a request.
    #[inline]
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Result<Self, BadMagic> {
        BadMagic::check_u32(EXTENDED_REQUEST_MAGIC, field(bytes, 0))?;
        Ok(Self {
            flags: CommandFlags(u16::from_be_bytes(field(bytes, 4))),
            command: Command::from(u16::from_be_bytes(field(bytes, 6))),
            cookie: Cookie(u64::from_be_bytes(field(bytes, 8))),
            offset: u64::from_be_bytes(field(bytes, 16)),
            length: u64::from_be_bytes(field(bytes, 24)),
        })
    }

    /// Its bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        put(&mut bytes, 0, &EXTENDED_REQUEST_MAGIC.to_be_bytes());
        put(&mut bytes, 4, &self.flags.0.to_be_bytes());
        put(&mut bytes, 6, &u16::from(self.command).to_be_bytes());
        put(&mut bytes, 8, &self.cookie.0.to_be_bytes());
        put(&mut bytes, 16, &self.offset.to_be_bytes());
        put(&mut bytes, 24, &self.length.to_be_bytes());
        bytes
    }
}

impl From<Request> for ExtendedRequest {
    #[inline]
    fn from(request: Request) -> Self {
        let Request { flags, command, cookie, offset, length } = request;
        Self { flags, command, cookie, offset, length: u64::from(length) }
    }
}

/// The payload of a block status request that has one: of which contexts to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusPayload<'a> {
    /// Length of the range in bytes.
    pub length: u64,
    contexts: &'a [u8],
}

impl<'a> StatusPayload<'a> {
    /// Bytes of such a payload that names `count` contexts.
    #[must_use]
    pub const fn size(count: usize) -> usize {
        8 + 4 * count
    }

    /// Reads the payload.
    ///
    /// # Errors
    /// It is no length and a list of numbers, or names no context.
    pub fn parse(payload: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new(payload);
        let length = fields.u64()?;
        let contexts = fields.rest();
        match contexts.as_chunks::<4>() {
            (_, [_, ..]) => Err(Malformed::Truncated),
            ([], _) => Err(Malformed::Zero),
            _ => Ok(Self { length, contexts }),
        }
    }

    /// The numbers of the contexts, in the client's order, as often as it names them.
    pub fn contexts(&self) -> impl Iterator<Item = u32> + use<'a> {
        self.contexts.as_chunks::<4>().0.iter().map(|bytes| u32::from_be_bytes(*bytes))
    }

    /// The bytes of such a payload.
    #[must_use]
    pub fn build(length: u64, contexts: &[u32]) -> Vec<u8> {
        let mut out = length.to_be_bytes().to_vec();
        contexts.iter().for_each(|context| out.extend_from_slice(&context.to_be_bytes()));
        out
    }
}

/// The header of an extended reply chunk of type `kind` (`REPLY_TYPE_*`) to the request `cookie` for `offset`; `length`
/// bytes of payload follow it.
#[inline]
#[must_use]
pub const fn extended_chunk_header(
    flags: u16,
    kind: u16,
    cookie: Cookie,
    offset: u64,
    length: u64,
) -> [u8; EXTENDED_CHUNK_HEADER_SIZE] {
    let mut bytes = [0; EXTENDED_CHUNK_HEADER_SIZE];
    put(&mut bytes, 0, &EXTENDED_REPLY_MAGIC.to_be_bytes());
    put(&mut bytes, 4, &flags.to_be_bytes());
    put(&mut bytes, 6, &kind.to_be_bytes());
    put(&mut bytes, 8, &cookie.0.to_be_bytes());
    put(&mut bytes, 16, &offset.to_be_bytes());
    put(&mut bytes, 24, &length.to_be_bytes());
    bytes
}

/// The chunk that only ends a reply: success, when no error chunk came before.
#[inline]
#[must_use]
pub const fn extended_none_chunk(cookie: Cookie, offset: u64) -> [u8; EXTENDED_CHUNK_HEADER_SIZE] {
    extended_chunk_header(REPLY_FLAG_DONE, REPLY_TYPE_NONE, cookie, offset, 0)
}

/// What goes before the `length` bytes of data, not 0, that are at `at` of the export, in a reply to a read of `offset`.
#[inline]
#[must_use]
pub const fn extended_data_chunk_header(
    flags: u16,
    cookie: Cookie,
    offset: u64,
    at: u64,
    length: u64,
) -> [u8; EXTENDED_DATA_CHUNK_HEADER_SIZE] {
    debug_assert!(length != 0);
    let mut bytes = [0; EXTENDED_DATA_CHUNK_HEADER_SIZE];
    let header =
        extended_chunk_header(flags, REPLY_TYPE_OFFSET_DATA, cookie, offset, length.saturating_add(8));
    put(&mut bytes, 0, &header);
    put(&mut bytes, EXTENDED_CHUNK_HEADER_SIZE, &at.to_be_bytes());
    bytes
}

/// The chunk that says that `length` bytes, not 0, at `at` of the export are zero, in a reply to a read of `offset`.
#[inline]
#[must_use]
pub const fn extended_hole_chunk(
    flags: u16,
    cookie: Cookie,
    offset: u64,
    at: u64,
    length: u32,
) -> [u8; EXTENDED_HOLE_CHUNK_SIZE] {
    debug_assert!(length != 0);
    let mut bytes = [0; EXTENDED_HOLE_CHUNK_SIZE];
    put(&mut bytes, 0, &extended_chunk_header(flags, REPLY_TYPE_OFFSET_HOLE, cookie, offset, 12));
    put(&mut bytes, EXTENDED_CHUNK_HEADER_SIZE, &at.to_be_bytes());
    put(&mut bytes, EXTENDED_CHUNK_HEADER_SIZE + 8, &length.to_be_bytes());
    bytes
}

/// The chunk that says that the whole request for `offset` failed; `message` is for people and is clipped to what the
/// specification allows.
#[must_use]
pub fn extended_error_chunk(flags: u16, cookie: Cookie, offset: u64, error: Errno, message: &str) -> Vec<u8> {
    let message = clip(message);
    let length = u64::from(length_u32(6 + message.len()));
    let mut out = extended_chunk_header(flags, REPLY_TYPE_ERROR, cookie, offset, length).to_vec();
    append_error(&mut out, error, message);
    out
}

/// One extent of a metadata context, in an extended chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtendedBlockDescriptor {
    /// Length in bytes, not zero.
    pub length: u64,
    /// Status flags, as the context defines them.
    pub flags: u64,
}

/// Appends an extended block status chunk of metadata context `context`, in a reply to a request for `offset`. There should
/// be one descriptor at least; those beyond [`MAX_BLOCK_DESCRIPTORS`] are left out.
pub fn append_extended_block_status_chunk(
    out: &mut Vec<u8>,
    flags: u16,
    cookie: Cookie,
    offset: u64,
    context: u32,
    descriptors: &[ExtendedBlockDescriptor],
) {
    let descriptors = &descriptors[..descriptors.len().min(MAX_BLOCK_DESCRIPTORS)];
    let count = length_u32(descriptors.len());
    let length = 8 + 16 * u64::from(count);
    out.extend_from_slice(&extended_chunk_header(flags, REPLY_TYPE_BLOCK_STATUS_EXT, cookie, offset, length));
    out.extend_from_slice(&context.to_be_bytes());
    out.extend_from_slice(&count.to_be_bytes());
    for descriptor in descriptors {
        out.extend_from_slice(&descriptor.length.to_be_bytes());
        out.extend_from_slice(&descriptor.flags.to_be_bytes());
    }
}

/// The header of an extended reply chunk, as a client reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtendedChunkHeader {
    /// `REPLY_FLAG_*`.
    pub flags: u16,
    /// `REPLY_TYPE_*`.
    pub kind: u16,
    /// Of the request.
    pub cookie: Cookie,
    /// Of the request, too.
    pub offset: u64,
    /// Length of the payload in bytes.
    pub length: u64,
}

impl ExtendedChunkHeader {
    /// Reads the header of a chunk.
    ///
    /// # Errors
    /// The magic is wrong.
    #[inline]
    pub fn parse(bytes: &[u8; EXTENDED_CHUNK_HEADER_SIZE]) -> Result<Self, BadMagic> {
        BadMagic::check_u32(EXTENDED_REPLY_MAGIC, field(bytes, 0))?;
        Ok(Self {
            flags: u16::from_be_bytes(field(bytes, 4)),
            kind: u16::from_be_bytes(field(bytes, 6)),
            cookie: Cookie(u64::from_be_bytes(field(bytes, 8))),
            offset: u64::from_be_bytes(field(bytes, 16)),
            length: u64::from_be_bytes(field(bytes, 24)),
        })
    }
}

/// The extents of an extended block status chunk, one at least, none of length zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtendedBlockDescriptors<'a>(&'a [u8]);

impl<'a> ExtendedBlockDescriptors<'a> {
    pub(super) fn parse(count: u32, bytes: &'a [u8]) -> Result<Self, Malformed> {
        let (pairs, rest) = bytes.as_chunks::<16>();
        if !rest.is_empty() || u32::try_from(pairs.len()) != Ok(count) {
            let announced = usize::try_from(count).unwrap_or(usize::MAX);
            return Err(if pairs.len() < announced { Malformed::Truncated } else { Malformed::TrailingData });
        }
        let descriptors = Self(bytes);
        if count == 0 || descriptors.iter().any(|descriptor| descriptor.length == 0) {
            return Err(Malformed::Zero);
        }
        Ok(descriptors)
    }

    /// The extents in the order of the export.
    pub fn iter(&self) -> impl Iterator<Item = ExtendedBlockDescriptor> + use<'a> {
        self.0.as_chunks::<16>().0.iter().map(|bytes| ExtendedBlockDescriptor {
            length: u64::from_be_bytes(field(bytes, 0)),
            flags: u64::from_be_bytes(field(bytes, 8)),
        })
    }
}

#[cfg(test)]
#[path = "extended_tests.rs"]
mod tests;
