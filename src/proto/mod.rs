//! The wire: the NBD protocol's messages as values, both ways.
//!
//! ```text
//!   bytes --parse--> value          value --encode / append--> bytes
//! ```
//!
//! Everything here is pure: no I/O, no state, no policy. A parser accepts any bytes and never panics; values that it does
//! not know survive as `Other(n)`, so that the caller can answer them as the specification says. The server's side
//! (requests and options in, replies out) and the client's side (the reverse) are both here, so that the server, the
//! client, the load generator and the tests speak of one wire.
//!
//! It uses nothing else of this crate.

mod constants;
mod extended;
mod fields;
mod greeting;
mod option;
mod reply;
mod request;

pub use constants::*;
pub use extended::{
    EXTENDED_CHUNK_HEADER_SIZE, EXTENDED_DATA_CHUNK_HEADER_SIZE, EXTENDED_HOLE_CHUNK_SIZE,
    ExtendedBlockDescriptor, ExtendedBlockDescriptors, ExtendedChunkHeader, ExtendedRequest, StatusPayload,
    append_extended_block_status_chunk, extended_chunk_header, extended_data_chunk_header,
    extended_error_chunk, extended_hole_chunk, extended_none_chunk,
};
pub(crate) use fields::clip;
pub use fields::{Malformed, parse_string};
pub use greeting::{ClientFlags, ExportNameReply, Greeting, HandshakeFlags, TransmissionFlags};
pub use option::{
    BlockSizes, ExportEntry, InfoItem, InfoPayload, InfoType, MetaContext, MetaContextPayload, OptionCode,
    OptionHeader, OptionReplyHeader, OptionReplyType, append_option_reply,
};
pub use reply::{
    BlockDescriptor, BlockDescriptors, CHUNK_HEADER_SIZE, Chunk, ChunkHeader, DATA_CHUNK_HEADER_SIZE, Errno,
    HOLE_CHUNK_SIZE, MAX_CHUNK_DATA, ReplyKind, SIMPLE_REPLY_SIZE, SimpleReply, append_block_status_chunk,
    chunk_header, data_chunk_header, error_chunk, error_offset_chunk, hole_chunk, none_chunk, simple_reply,
};
pub use request::{BadMagic, Command, CommandFlags, Cookie, Request};
