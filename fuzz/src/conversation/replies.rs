//! What the server answered, read by the letter of the specification: every byte of it must be part of a reply.

use memdev::handshake::Negotiated;
use memdev::proto::{
    CHUNK_HEADER_SIZE, Chunk, ChunkHeader, Command, CommandFlags, Cookie, EXTENDED_CHUNK_HEADER_SIZE,
    ExtendedChunkHeader, REPLY_FLAG_DONE, ReplyKind, SIMPLE_REPLY_SIZE, SimpleReply,
};

use super::plan::{Ask, Planned};

/// The whole answer to one request.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) cookie: u64,
    /// The error field, if the request failed.
    pub(crate) error: Option<u32>,
    /// What was read.
    pub(crate) data: Vec<u8>,
    /// What was told of each metadata context: its number, and lengths with status flags.
    pub(crate) extents: Vec<(u32, Vec<(u64, u64)>)>,
}

/// Takes the next answer off the front of `bytes`; nothing when its end is missing. `find` tells which request a cookie
/// belongs to.
pub(crate) fn next<'p>(
    bytes: &mut &[u8],
    negotiated: &Negotiated,
    find: impl FnOnce(Cookie) -> &'p Planned,
) -> Option<Answer> {
    let magic = bytes.first_chunk::<4>()?;
    let kind = ReplyKind::parse(*magic).expect("a reply");
    let is_agreed_on = match kind {
        ReplyKind::Simple => !negotiated.extended_headers,
        ReplyKind::Structured => negotiated.structured_replies && !negotiated.extended_headers,
        ReplyKind::Extended => negotiated.extended_headers,
    };
    assert!(is_agreed_on, "{kind:?} replies were not agreed on");
    if kind == ReplyKind::Simple { simple(bytes, negotiated, find) } else { chunks(bytes, kind, find) }
}

fn simple<'p>(
    bytes: &mut &[u8],
    negotiated: &Negotiated,
    find: impl FnOnce(Cookie) -> &'p Planned,
) -> Option<Answer> {
    let (header, rest) = bytes.split_first_chunk::<SIMPLE_REPLY_SIZE>()?;
    let SimpleReply { error, cookie } = SimpleReply::parse(header).expect("the magic is right");
    let ask = &find(cookie).ask;
    let mut answer = Answer { cookie: cookie.0, error: (error != 0).then_some(error), ..Answer::default() };
    if negotiated.structured_replies {
        assert!(
            !matches!(ask.command, Command::Read | Command::BlockStatus),
            "this takes a structured reply"
        );
        assert_eq!(error, 0, "with structured replies, errors have words");
    }
    *bytes = rest;
    if ask.command == Command::Read && error == 0 {
        let length = usize::try_from(ask.length).expect("a valid length");
        let (data, rest) = bytes.split_at_checked(length)?;
        answer.data = data.to_vec();
        *bytes = rest;
    }
    Some(answer)
}

/// Takes the header of a chunk off the front; an extended one repeats the request's offset.
fn header(bytes: &mut &[u8], kind: ReplyKind) -> Option<(ChunkHeader, Option<u64>)> {
    if kind == ReplyKind::Extended {
        let (header, rest) = bytes.split_first_chunk::<EXTENDED_CHUNK_HEADER_SIZE>()?;
        let ExtendedChunkHeader { flags, kind, cookie, offset, length } =
            ExtendedChunkHeader::parse(header).expect("a chunk behind a chunk that is not the last");
        let length = u32::try_from(length).expect("a length in memory");
        *bytes = rest;
        Some((ChunkHeader { flags, kind, cookie, length }, Some(offset)))
    } else {
        let (header, rest) = bytes.split_first_chunk::<CHUNK_HEADER_SIZE>()?;
        *bytes = rest;
        Some((ChunkHeader::parse(header).expect("a chunk behind a chunk that is not the last"), None))
    }
}

fn chunks<'p>(
    bytes: &mut &[u8],
    kind: ReplyKind,
    find: impl FnOnce(Cookie) -> &'p Planned,
) -> Option<Answer> {
    let first = header(&mut &**bytes, kind)?.0;
    let request = find(first.cookie);
    let ask = &request.ask;
    let mut answer = Answer { cookie: first.cookie.0, ..Answer::default() };
    let mut chunks = 0;
    loop {
        let (header, offset) = header(bytes, kind)?;
        assert_eq!(header.cookie, first.cookie, "a reply within a reply");
        assert!(offset.is_none_or(|offset| offset == ask.offset), "the request's offset");
        assert_eq!(header.flags & !REPLY_FLAG_DONE, 0, "unknown reply flags");
        let length = usize::try_from(header.length).expect("a length in memory");
        let (payload, rest) = bytes.split_at_checked(length)?;
        *bytes = rest;
        assert!(answer.error.is_none(), "nothing behind an error");
        content(ask, kind, Chunk::parse(header.kind, payload).expect("a chunk as specified"), &mut answer);
        chunks += 1;
        if header.is_done() {
            break;
        }
    }
    if answer.error.is_some() {
        return Some(answer);
    }
    match ask.command {
        Command::Read => {
            assert_eq!(answer.data.len() as u64, ask.length, "all that was asked for");
            assert!(!ask.flags.contains(CommandFlags::DF) || chunks == 1, "not to be fragmented");
        }
        Command::BlockStatus => {
            let told: Vec<u32> = answer.extents.iter().map(|(context, _)| *context).collect();
            assert_eq!(told, request.contexts, "a chunk a context, in the order of their numbers");
        }
        command => assert!(kind == ReplyKind::Extended && chunks == 1, "{command:?} succeeds in few words"),
    }
    Some(answer)
}

fn content(ask: &Ask, kind: ReplyKind, chunk: Chunk<'_>, answer: &mut Answer) {
    let next = ask.offset.wrapping_add(answer.data.len() as u64);
    match chunk {
        Chunk::Error { error, message, offset } => {
            assert!(!message.is_empty() && offset.is_none());
            answer.error = Some(error);
        }
        Chunk::None => {
            let says_enough = match ask.command {
                Command::Read => ask.length == 0,
                Command::BlockStatus => false,
                _ => kind == ReplyKind::Extended,
            };
            assert!(says_enough, "more was asked for");
        }
        Chunk::OffsetData { offset, data } => {
            assert_eq!((ask.command, offset), (Command::Read, next), "data in order, without gaps");
            answer.data.extend_from_slice(data);
        }
        Chunk::OffsetHole { offset, length } => {
            assert_eq!((ask.command, offset), (Command::Read, next), "data in order, without gaps");
            assert!(!ask.flags.contains(CommandFlags::DF), "not to be fragmented");
            assert!(u64::from(length) <= ask.length, "no more than was asked for");
            let length = usize::try_from(length).expect("a length in memory");
            answer.data.resize(answer.data.len() + length, 0);
        }
        Chunk::BlockStatus { context, descriptors } => {
            assert_eq!((ask.command, kind), (Command::BlockStatus, ReplyKind::Structured));
            let extents = descriptors.iter().map(|extent| (extent.length.into(), extent.flags.into()));
            answer.extents.push((context, extents.collect()));
        }
        Chunk::BlockStatusExt { context, descriptors } => {
            assert_eq!((ask.command, kind), (Command::BlockStatus, ReplyKind::Extended));
            let extents = descriptors.iter().map(|extent| (extent.length, extent.flags));
            answer.extents.push((context, extents.collect()));
        }
        Chunk::Other(kind, _) => panic!("a chunk of type {kind}"),
    }
}
