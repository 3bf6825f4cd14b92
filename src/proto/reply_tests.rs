//! Replies against bytes written by hand from the specification, and back.

use super::*;

const COOKIE: Cookie = Cookie(0x0102_0304_0506_0708);
/// Magic, flags, type and cookie of a chunk, as a macro so that it can be joined to literals.
macro_rules! chunk {
    ($flags_and_type:literal, $rest:literal) => {
        [&b"\x66\x8e\x33\xef"[..], $flags_and_type, b"\x01\x02\x03\x04\x05\x06\x07\x08", $rest].concat()
    };
}

fn payload(chunk: &[u8]) -> (ChunkHeader, Chunk<'_>) {
    let header = ChunkHeader::parse(&field(chunk, 0)).unwrap();
    assert_eq!(usize::try_from(header.length).unwrap(), chunk.len() - CHUNK_HEADER_SIZE);
    (header, Chunk::parse(header.kind, &chunk[CHUNK_HEADER_SIZE..]).unwrap())
}

#[test]
fn simple_replies_are_as_the_specification_lays_them_out() {
    let ok = b"\x67\x44\x66\x98\x00\x00\x00\x00\x01\x02\x03\x04\x05\x06\x07\x08";
    assert_eq!(&simple_reply(None, COOKIE), ok);
    assert_eq!(SimpleReply::parse(ok), Ok(SimpleReply { error: 0, cookie: COOKIE }));
    let full = simple_reply(Some(Errno::NoSpc), COOKIE);
    assert_eq!(&full, b"\x67\x44\x66\x98\x00\x00\x00\x1c\x01\x02\x03\x04\x05\x06\x07\x08");
    assert_eq!(SimpleReply::parse(&full), Ok(SimpleReply { error: 28, cookie: COOKIE }));
    assert!(SimpleReply::parse(&[0; 16]).is_err());
}

#[test]
fn errors_have_the_values_of_the_specification() {
    let table = [
        (Errno::Perm, 1),
        (Errno::Io, 5),
        (Errno::NoMem, 12),
        (Errno::Inval, 22),
        (Errno::NoSpc, 28),
        (Errno::Overflow, 75),
        (Errno::NotSup, 95),
        (Errno::Shutdown, 108),
    ];
    for (errno, value) in table {
        assert_eq!(errno.to_wire(), value);
        assert_eq!(Errno::from_wire(value), Some(errno));
    }
    assert_eq!(Errno::from_wire(0), None);
    assert_eq!(Errno::from_wire(2), Some(Errno::Inval));
}

#[test]
fn a_chunk_that_only_ends_the_reply() {
    let chunk = none_chunk(COOKIE);
    assert_eq!(chunk.to_vec(), chunk!(b"\x00\x01\x00\x00", b"\x00\x00\x00\x00"));
    let (header, body) = payload(&chunk);
    assert!(header.is_done() && !header.is_error());
    assert_eq!(body, Chunk::None);
    assert_eq!(Chunk::parse(REPLY_TYPE_NONE, b"x"), Err(Malformed::TrailingData));
}

#[test]
fn a_chunk_of_data() {
    let mut chunk = data_chunk_header(0, COOKIE, 0x1000, 3).to_vec();
    chunk.extend_from_slice(b"abc");
    assert_eq!(chunk, chunk!(b"\x00\x00\x00\x01", b"\x00\x00\x00\x0b\x00\x00\x00\x00\x00\x00\x10\x00abc"));
    let (header, body) = payload(&chunk);
    assert!(!header.is_done());
    assert_eq!(body, Chunk::OffsetData { offset: 0x1000, data: b"abc" });
    assert_eq!(Chunk::parse(REPLY_TYPE_OFFSET_DATA, &[0; 8]), Err(Malformed::Truncated));
    let largest = data_chunk_header(0, COOKIE, 0, MAX_CHUNK_DATA);
    assert_eq!(ChunkHeader::parse(&field(&largest, 0)).unwrap().length, u32::MAX);
}

#[test]
fn a_chunk_of_nothing_but_zeroes() {
    let chunk = hole_chunk(REPLY_FLAG_DONE, COOKIE, 0x1000, 0x200);
    assert_eq!(
        chunk.to_vec(),
        chunk!(b"\x00\x01\x00\x02", b"\x00\x00\x00\x0c\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x02\x00")
    );
    assert_eq!(payload(&chunk).1, Chunk::OffsetHole { offset: 0x1000, length: 0x200 });
    assert_eq!(Chunk::parse(REPLY_TYPE_OFFSET_HOLE, &[0; 12]), Err(Malformed::Zero));
    assert_eq!(Chunk::parse(REPLY_TYPE_OFFSET_HOLE, &[1; 11]), Err(Malformed::Truncated));
    assert_eq!(Chunk::parse(REPLY_TYPE_OFFSET_HOLE, &[1; 13]), Err(Malformed::TrailingData));
}

#[test]
fn a_chunk_of_block_status() {
    let extents = [
        BlockDescriptor { length: 4096, flags: 0 },
        BlockDescriptor { length: 512, flags: STATE_HOLE | STATE_ZERO },
    ];
    let mut chunk = Vec::new();
    append_block_status_chunk(&mut chunk, REPLY_FLAG_DONE, COOKIE, 1, &extents);
    assert_eq!(
        chunk,
        chunk!(
            b"\x00\x01\x00\x05",
            b"\x00\x00\x00\x14\x00\x00\x00\x01\x00\x00\x10\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x03"
        )
    );
    let (_, body) = payload(&chunk);
    let Chunk::BlockStatus { context: 1, descriptors } = body else { panic!("{body:?}") };
    assert_eq!(descriptors.iter().collect::<Vec<_>>(), extents);
    for (length, why) in [(3, Malformed::Truncated), (4, Malformed::Truncated), (11, Malformed::Truncated)] {
        assert_eq!(Chunk::parse(REPLY_TYPE_BLOCK_STATUS, &vec![1; length]), Err(why));
    }
    assert_eq!(Chunk::parse(REPLY_TYPE_BLOCK_STATUS, &[0; 12]), Err(Malformed::Zero));
}

#[test]
fn chunks_of_errors() {
    let chunk = error_chunk(REPLY_FLAG_DONE, COOKIE, Errno::Inval, "odd");
    assert_eq!(chunk, chunk!(b"\x00\x01\x80\x01", b"\x00\x00\x00\x09\x00\x00\x00\x16\x00\x03odd"));
    let (header, body) = payload(&chunk);
    assert!(header.is_error());
    assert_eq!(body, Chunk::Error { error: 22, message: "odd", offset: None });

    let chunk = error_offset_chunk(0, COOKIE, Errno::Io, "", 512);
    assert_eq!(
        chunk,
        chunk!(
            b"\x00\x00\x80\x02",
            b"\x00\x00\x00\x0e\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00"
        )
    );
    assert_eq!(payload(&chunk).1, Chunk::Error { error: 5, message: "", offset: Some(512) });

    // An unknown error type begins as the known ones do; what is behind is not looked at.
    let unknown = Chunk::parse(0x8042, b"\x00\x00\x00\x05\x00\x01!more");
    assert_eq!(unknown, Ok(Chunk::Error { error: 5, message: "!", offset: None }));
    assert_eq!(Chunk::parse(REPLY_TYPE_ERROR, b"\x00\x00\x00\x05\x00\x02!"), Err(Malformed::Truncated));
    assert_eq!(Chunk::parse(REPLY_TYPE_ERROR, &[0; 6]), Err(Malformed::Zero));
    assert_eq!(Chunk::parse(REPLY_TYPE_ERROR_OFFSET, &[1, 1, 1, 1, 0, 0, 1]), Err(Malformed::Truncated));
}

#[test]
fn a_long_message_is_clipped() {
    let message = "é".repeat(70_000);
    let chunk = error_chunk(0, COOKIE, Errno::Io, &message);
    let Chunk::Error { message, .. } = payload(&chunk).1 else { panic!() };
    assert_eq!(message.len(), MAX_STRING);
}

#[test]
fn unknown_types_survive_and_kinds_are_told_by_their_magic() {
    assert_eq!(Chunk::parse(7, b"new"), Ok(Chunk::Other(7, b"new")));
    assert_eq!(ReplyKind::parse(*b"\x67\x44\x66\x98"), Ok(ReplyKind::Simple));
    let structured = ReplyKind::parse(*b"\x66\x8e\x33\xef").unwrap();
    assert_eq!((structured, structured.header_size()), (ReplyKind::Structured, 20));
    let extended = ReplyKind::parse(*b"\x6e\x8a\x27\x8c").unwrap();
    assert_eq!((extended, extended.header_size()), (ReplyKind::Extended, 32));
    assert!(ReplyKind::parse(*b"\x96\x74\x46\x68").is_err());
}
