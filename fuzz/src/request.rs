//! The messages of the transmission phase, both ways: whatever parses is written back as the same bytes.
//!
//! The input is one message: a request, a simple reply, or a structured reply chunk with its payload.

use memdev::proto::{
    CHUNK_HEADER_SIZE, Chunk, ChunkHeader, Errno, REPLY_TYPE_ERROR, REPLY_TYPE_ERROR_OFFSET, ReplyKind,
    Request, SIMPLE_REPLY_SIZE, SimpleReply, append_block_status_chunk, chunk_header, data_chunk_header,
    error_chunk, error_offset_chunk, hole_chunk, simple_reply,
};

/// One input.
pub fn body(data: &[u8]) {
    if let Some(bytes) = data.first_chunk::<{ Request::SIZE }>()
        && let Ok(request) = Request::parse(bytes)
    {
        assert_eq!(request.encode(), *bytes);
    }
    let Some(&magic) = data.first_chunk::<4>() else { return };
    match ReplyKind::parse(magic) {
        Ok(ReplyKind::Simple) => {
            let Some(bytes) = data.first_chunk::<SIMPLE_REPLY_SIZE>() else { return };
            let reply = SimpleReply::parse(bytes).expect("the magic is right");
            if let Some(known) = known_errno(reply.error) {
                assert_eq!(simple_reply(known, reply.cookie), *bytes);
            }
        }
        Ok(ReplyKind::Structured) => {
            let Some((bytes, payload)) = data.split_first_chunk::<CHUNK_HEADER_SIZE>() else { return };
            let header = ChunkHeader::parse(bytes).expect("the magic is right");
            assert_eq!(chunk_header(header.flags, header.kind, header.cookie, header.length), *bytes);
            chunk(header, payload);
        }
        Err(_) => {}
    }
}

/// The error field's meaning, when writing it back gives the same value.
fn known_errno(value: u32) -> Option<Option<Errno>> {
    let errno = Errno::from_wire(value);
    (errno.map_or(0, Errno::to_wire) == value).then_some(errno)
}

fn chunk(header: ChunkHeader, payload: &[u8]) {
    let Ok(parsed) = Chunk::parse(header.kind, payload) else { return };
    let (flags, cookie) = (header.flags, header.cookie);
    let written = match parsed {
        Chunk::None => Vec::new(),
        Chunk::OffsetData { offset, data } => {
            let length = u32::try_from(data.len()).expect("inputs are small");
            [&data_chunk_header(flags, cookie, offset, length)[CHUNK_HEADER_SIZE..], data].concat()
        }
        Chunk::OffsetHole { offset, length } => {
            hole_chunk(flags, cookie, offset, length)[CHUNK_HEADER_SIZE..].to_vec()
        }
        Chunk::BlockStatus { context, descriptors } => {
            let mut out = Vec::new();
            let descriptors: Vec<_> = descriptors.iter().collect();
            append_block_status_chunk(&mut out, flags, cookie, context, &descriptors);
            out.split_off(CHUNK_HEADER_SIZE)
        }
        Chunk::Error { error, message, offset } => {
            let Some(Some(errno)) = known_errno(error) else { return };
            // A message with NUL is refused, so that what parsed is what would be sent.
            let written = match offset {
                Some(offset) => error_offset_chunk(flags, cookie, errno, message, offset),
                None => error_chunk(flags, cookie, errno, message),
            };
            let known = [REPLY_TYPE_ERROR, REPLY_TYPE_ERROR_OFFSET].contains(&header.kind);
            assert!(payload.starts_with(&written[CHUNK_HEADER_SIZE..]) || !known);
            return;
        }
        Chunk::Other(kind, bytes) => {
            assert_eq!(kind, header.kind);
            bytes.to_vec()
        }
    };
    assert_eq!(written, payload);
}
