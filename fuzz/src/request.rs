//! The messages of the transmission phase, both ways: whatever parses is written back as the same bytes.
//!
//! The input is one message: a request (compact, or extended, with the payload of a block status request), a simple
//! reply, or a structured or extended reply chunk with its payload.

use memdev::proto::{
    CHUNK_HEADER_SIZE, Chunk, ChunkHeader, Command, CommandFlags, Cookie, EXTENDED_CHUNK_HEADER_SIZE, Errno,
    ExtendedChunkHeader, ExtendedRequest, REPLY_TYPE_ERROR, REPLY_TYPE_ERROR_OFFSET, ReplyKind, Request,
    SIMPLE_REPLY_SIZE, SimpleReply, StatusPayload, append_block_status_chunk,
    append_extended_block_status_chunk, chunk_header, data_chunk_header, error_chunk, error_offset_chunk,
    extended_chunk_header, extended_data_chunk_header, extended_error_chunk, extended_hole_chunk, hole_chunk,
    simple_reply,
};

/// One input.
pub fn body(data: &[u8]) {
    if let Some(bytes) = data.first_chunk::<{ Request::SIZE }>()
        && let Ok(request) = Request::parse(bytes)
    {
        assert_eq!(request.encode(), *bytes);
    }
    if let Some((bytes, payload)) = data.split_first_chunk::<{ ExtendedRequest::SIZE }>()
        && let Ok(request) = ExtendedRequest::parse(bytes)
    {
        assert_eq!(request.encode(), *bytes);
        let has_payload = request.flags.contains(CommandFlags::PAYLOAD_LEN);
        if request.command == Command::BlockStatus && has_payload {
            status_payload(payload);
        }
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
            chunk(header.kind, header.flags, header.cookie, payload);
        }
        Ok(ReplyKind::Extended) => {
            let Some((bytes, payload)) = data.split_first_chunk::<EXTENDED_CHUNK_HEADER_SIZE>() else {
                return;
            };
            let ExtendedChunkHeader { flags, kind, cookie, offset, length } =
                ExtendedChunkHeader::parse(bytes).expect("the magic is right");
            assert_eq!(extended_chunk_header(flags, kind, cookie, offset, length), *bytes);
            extended_chunk(kind, flags, cookie, offset, payload);
        }
        Err(_) => {}
    }
}

/// The error field's meaning, when writing it back gives the same value.
fn known_errno(value: u32) -> Option<Option<Errno>> {
    let errno = Errno::from_wire(value);
    (errno.map_or(0, Errno::to_wire) == value).then_some(errno)
}

fn status_payload(payload: &[u8]) {
    let Ok(parsed) = StatusPayload::parse(payload) else { return };
    let contexts: Vec<_> = parsed.contexts().collect();
    assert_eq!(StatusPayload::size(contexts.len()), payload.len());
    assert_eq!(StatusPayload::build(parsed.length, &contexts), payload);
}

fn chunk(kind: u16, flags: u16, cookie: Cookie, payload: &[u8]) {
    let Ok(parsed) = Chunk::parse(kind, payload) else { return };
    let written = match parsed {
        Chunk::OffsetData { offset, data } => {
            let length = u32::try_from(data.len()).expect("inputs are small");
            [&data_chunk_header(flags, cookie, offset, length)[CHUNK_HEADER_SIZE..], data].concat()
        }
        Chunk::OffsetHole { offset, length } => {
            hole_chunk(flags, cookie, offset, length)[CHUNK_HEADER_SIZE..].to_vec()
        }
        Chunk::Error { error, message, offset } => {
            let Some(Some(errno)) = known_errno(error) else { return };
            // A message with NUL is refused, so that what parsed is what would be sent.
            let written = match offset {
                Some(offset) => error_offset_chunk(flags, cookie, errno, message, offset),
                None => error_chunk(flags, cookie, errno, message),
            };
            let known = [REPLY_TYPE_ERROR, REPLY_TYPE_ERROR_OFFSET].contains(&kind);
            assert!(payload.starts_with(&written[CHUNK_HEADER_SIZE..]) || !known);
            return;
        }
        other => without_header(kind, flags, cookie, &other),
    };
    assert_eq!(written, payload);
}

fn extended_chunk(kind: u16, flags: u16, cookie: Cookie, asked: u64, payload: &[u8]) {
    let Ok(parsed) = Chunk::parse(kind, payload) else { return };
    let written = match parsed {
        Chunk::OffsetData { offset, data } => {
            let header = extended_data_chunk_header(flags, cookie, asked, offset, data.len() as u64);
            [&header[EXTENDED_CHUNK_HEADER_SIZE..], data].concat()
        }
        Chunk::OffsetHole { offset, length } => {
            extended_hole_chunk(flags, cookie, asked, offset, length)[EXTENDED_CHUNK_HEADER_SIZE..].to_vec()
        }
        Chunk::Error { error, message, .. } => {
            let Some(Some(errno)) = known_errno(error) else { return };
            let written = extended_error_chunk(flags, cookie, asked, errno, message);
            // One with an offset goes on behind the message.
            assert!(payload.starts_with(&written[EXTENDED_CHUNK_HEADER_SIZE..]));
            return;
        }
        other => without_header(kind, flags, cookie, &other),
    };
    assert_eq!(written, payload);
}

/// The payloads that are written in one way only.
fn without_header(kind: u16, flags: u16, cookie: Cookie, chunk: &Chunk<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    match chunk {
        Chunk::BlockStatus { context, descriptors } => {
            let descriptors: Vec<_> = descriptors.iter().collect();
            append_block_status_chunk(&mut out, flags, cookie, *context, &descriptors);
            out.split_off(CHUNK_HEADER_SIZE)
        }
        Chunk::BlockStatusExt { context, descriptors } => {
            let descriptors: Vec<_> = descriptors.iter().collect();
            append_extended_block_status_chunk(&mut out, flags, cookie, 0, *context, &descriptors);
            out.split_off(EXTENDED_CHUNK_HEADER_SIZE)
        }
        Chunk::Other(other, bytes) => {
            assert_eq!(*other, kind);
            bytes.to_vec()
        }
        Chunk::None | Chunk::OffsetData { .. } | Chunk::OffsetHole { .. } | Chunk::Error { .. } => out,
    }
}
