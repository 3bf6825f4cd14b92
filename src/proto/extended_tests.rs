//! Extended headers against bytes written by hand from the specification, and back.

use super::super::reply::Chunk;
use super::*;

const COOKIE: Cookie = Cookie(0x0102_0304_0506_0708);

/// Magic, flags, type, cookie and offset of a chunk that answers a request for 0x1000, as a macro so that it can be joined
/// to literals.
macro_rules! chunk {
    ($flags_and_type:literal, $rest:literal) => {
        [
            &b"\x6e\x8a\x27\x8c"[..],
            $flags_and_type,
            b"\x01\x02\x03\x04\x05\x06\x07\x08\x00\x00\x00\x00\x00\x00\x10\x00",
            $rest,
        ]
        .concat()
    };
}

fn payload(chunk: &[u8]) -> (ExtendedChunkHeader, Chunk<'_>) {
    let header = ExtendedChunkHeader::parse(&field(chunk, 0)).unwrap();
    assert_eq!(usize::try_from(header.length).unwrap(), chunk.len() - EXTENDED_CHUNK_HEADER_SIZE);
    assert_eq!((header.cookie, header.offset), (COOKIE, 0x1000));
    (header, Chunk::parse(header.kind, &chunk[EXTENDED_CHUNK_HEADER_SIZE..]).unwrap())
}

#[test]
fn requests_are_as_the_specification_lays_them_out() {
    let wire = b"\x21\xe4\x1c\x71\x00\x20\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\
                 \x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x01\x00\x00\x02\x00";
    let request = ExtendedRequest {
        flags: CommandFlags::PAYLOAD_LEN,
        command: Command::Write,
        cookie: COOKIE,
        offset: 4096,
        length: (1 << 32) + 512,
    };
    assert_eq!(ExtendedRequest::parse(wire), Ok(request));
    assert_eq!(request.encode(), *wire);
    let mut compact = *wire;
    put(&mut compact, 0, &REQUEST_MAGIC.to_be_bytes());
    assert_eq!(ExtendedRequest::parse(&compact).unwrap_err().found, u64::from(REQUEST_MAGIC));
}

#[test]
fn a_compact_request_loses_nothing() {
    let compact = Request {
        flags: CommandFlags(0xffff),
        command: Command::Other(77),
        cookie: COOKIE,
        offset: u64::MAX,
        length: u32::MAX,
    };
    let ExtendedRequest { flags, command, cookie, offset, length } = compact.into();
    assert_eq!((flags, command, cookie, offset), (compact.flags, compact.command, COOKIE, u64::MAX));
    assert_eq!(length, u64::from(u32::MAX));
}

#[test]
fn a_status_payload_is_a_length_and_the_contexts_wanted() {
    let wire = b"\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x01";
    let parsed = StatusPayload::parse(wire).unwrap();
    assert_eq!(parsed.length, 1 << 32);
    assert_eq!(parsed.contexts().collect::<Vec<_>>(), [2, 1]);
    assert_eq!(StatusPayload::build(1 << 32, &[2, 1]), wire);
    assert_eq!(wire.len(), StatusPayload::size(2));
    for (length, why) in [
        (0, Malformed::Truncated),
        (7, Malformed::Truncated),
        (8, Malformed::Zero),
        (9, Malformed::Truncated),
        (15, Malformed::Truncated),
    ] {
        assert_eq!(StatusPayload::parse(&wire[..length]), Err(why), "{length}");
    }
}

#[test]
fn a_chunk_that_only_ends_the_reply() {
    let chunk = extended_none_chunk(COOKIE, 0x1000);
    assert_eq!(chunk.to_vec(), chunk!(b"\x00\x01\x00\x00", b"\x00\x00\x00\x00\x00\x00\x00\x00"));
    assert_eq!(payload(&chunk).1, Chunk::None);
    let mut structured = chunk;
    put(&mut structured, 0, &STRUCTURED_REPLY_MAGIC.to_be_bytes());
    assert!(ExtendedChunkHeader::parse(&structured).is_err());
}

#[test]
fn chunks_of_data_and_of_zeroes_have_the_offset_asked_for_and_their_own() {
    let mut chunk = extended_data_chunk_header(0, COOKIE, 0x1000, 0x1200, 3).to_vec();
    chunk.extend_from_slice(b"abc");
    assert_eq!(
        chunk,
        chunk!(b"\x00\x00\x00\x01", b"\x00\x00\x00\x00\x00\x00\x00\x0b\x00\x00\x00\x00\x00\x00\x12\x00abc")
    );
    assert_eq!(payload(&chunk).1, Chunk::OffsetData { offset: 0x1200, data: b"abc" });
    let chunk = extended_hole_chunk(REPLY_FLAG_DONE, COOKIE, 0x1000, 0x1200, 0x200);
    assert_eq!(
        chunk.to_vec(),
        chunk!(
            b"\x00\x01\x00\x02",
            b"\x00\x00\x00\x00\x00\x00\x00\x0c\x00\x00\x00\x00\x00\x00\x12\x00\x00\x00\x02\x00"
        )
    );
    assert_eq!(payload(&chunk).1, Chunk::OffsetHole { offset: 0x1200, length: 0x200 });
}

#[test]
fn a_chunk_of_an_error() {
    let chunk = extended_error_chunk(REPLY_FLAG_DONE, COOKIE, 0x1000, Errno::Inval, "odd");
    assert_eq!(
        chunk,
        chunk!(b"\x00\x01\x80\x01", b"\x00\x00\x00\x00\x00\x00\x00\x09\x00\x00\x00\x16\x00\x03odd")
    );
    assert_eq!(payload(&chunk).1, Chunk::Error { error: 22, message: "odd", offset: None });
    let long = extended_error_chunk(0, COOKIE, 0x1000, Errno::Io, &"é".repeat(70_000));
    let Chunk::Error { message, .. } = payload(&long).1 else { panic!() };
    assert_eq!(message.len(), MAX_STRING);
}

#[test]
fn a_chunk_of_block_status() {
    let extents = [
        ExtendedBlockDescriptor { length: 1 << 40, flags: 0 },
        ExtendedBlockDescriptor { length: 512, flags: u64::from(STATE_HOLE | STATE_ZERO) },
    ];
    let mut chunk = Vec::new();
    append_extended_block_status_chunk(&mut chunk, REPLY_FLAG_DONE, COOKIE, 0x1000, 2, &extents);
    assert_eq!(
        chunk,
        chunk!(
            b"\x00\x01\x00\x06",
            b"\x00\x00\x00\x00\x00\x00\x00\x28\x00\x00\x00\x02\x00\x00\x00\x02\
              \x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\
              \x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x00\x03"
        )
    );
    let Chunk::BlockStatusExt { context: 2, descriptors } = payload(&chunk).1 else { panic!() };
    assert_eq!(descriptors.iter().collect::<Vec<_>>(), extents);

    let body = &chunk[EXTENDED_CHUNK_HEADER_SIZE..];
    let parse = |body: &[u8]| Chunk::parse(REPLY_TYPE_BLOCK_STATUS_EXT, body).map(|_| ());
    assert_eq!(parse(&body[..7]), Err(Malformed::Truncated));
    assert_eq!(parse(&body[..39]), Err(Malformed::Truncated));
    assert_eq!(parse(&body[..24]), Err(Malformed::Truncated), "one announced is not there");
    assert_eq!(parse(&[body, &[0; 16]].concat()), Err(Malformed::TrailingData));
    assert_eq!(parse(&[0; 8]), Err(Malformed::Zero), "none at all");
    let mut empty = body.to_vec();
    empty[8..16].fill(0);
    assert_eq!(parse(&empty), Err(Malformed::Zero), "an extent of no bytes");
}
