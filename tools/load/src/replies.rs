//! The client's side of the replies. Pure; no I/O.
//!
//! Replies are parsed where they lie in the receive buffer and their payload is skipped there, never copied: a load
//! generator that touches the data measures itself.

use memdev::proto::{CHUNK_HEADER_SIZE, ChunkHeader, Cookie, ReplyKind, SIMPLE_REPLY_SIZE, SimpleReply};

/// What the parser asks about a request that is being answered, and tells of its end.
pub(crate) trait Awaited {
    /// The bytes of payload that follow a successful simple reply with this cookie; None if no such request is out.
    fn payload(&self, cookie: Cookie) -> Option<u32>;
    /// The whole answer has arrived.
    fn done(&mut self, cookie: Cookie, failed: bool);
}

/// Where in the stream of replies one connection stands between two receives.
#[derive(Debug, Default)]
pub(crate) struct Replies {
    /// The start of a header whose rest has not arrived.
    carry: [u8; CHUNK_HEADER_SIZE],
    carried: usize,
    /// Payload bytes still to be skipped.
    skip: u64,
    /// The request that is complete when they are.
    ending: Option<Cookie>,
    /// An error chunk of the reply that is under way was seen.
    failed: bool,
}

impl Replies {
    /// Puts the carried start of a header before what will be received; returns how many bytes it has.
    pub(crate) fn prepare(&mut self, buffer: &mut [u8]) -> usize {
        buffer[..self.carried].copy_from_slice(&self.carry[..self.carried]);
        std::mem::take(&mut self.carried)
    }

    /// Parses all replies in `bytes` (what [`prepare`](Self::prepare) placed and what was received behind it).
    ///
    /// # Errors
    ///
    /// A reply with a wrong magic, or to a request that is not out: the stream is out of step.
    pub(crate) fn parse(&mut self, bytes: &[u8], awaited: &mut impl Awaited) -> Result<(), &'static str> {
        let mut rest = bytes;
        loop {
            if self.skip > 0 {
                let here = usize::try_from(self.skip).unwrap_or(usize::MAX).min(rest.len());
                rest = &rest[here..];
                self.skip -= here as u64;
                if self.skip > 0 {
                    return Ok(());
                }
            }
            if let Some(cookie) = self.ending.take() {
                awaited.done(cookie, std::mem::take(&mut self.failed));
            }
            let (Some(&magic), kept) = (rest.first_chunk(), rest) else {
                self.keep(rest);
                return Ok(());
            };
            match ReplyKind::parse(magic).map_err(|_| "a reply with a wrong magic")? {
                ReplyKind::Simple => {
                    let Some((header, behind)) = rest.split_first_chunk() else {
                        self.keep(kept);
                        return Ok(());
                    };
                    self.simple(header, awaited)?;
                    rest = behind;
                }
                ReplyKind::Extended => return Err("an extended reply, which was not agreed on"),
                ReplyKind::Structured => {
                    let Some((header, behind)) = rest.split_first_chunk() else {
                        self.keep(kept);
                        return Ok(());
                    };
                    self.chunk(header, awaited)?;
                    rest = behind;
                }
            }
        }
    }

    /// Keeps the start of a header for the next receive.
    fn keep(&mut self, start: &[u8]) {
        self.carry[..start.len()].copy_from_slice(start);
        self.carried = start.len();
    }

    fn simple(
        &mut self,
        header: &[u8; SIMPLE_REPLY_SIZE],
        awaited: &impl Awaited,
    ) -> Result<(), &'static str> {
        let SimpleReply { error, cookie } = SimpleReply::parse(header).map_err(|_| "a garbled reply")?;
        let payload = awaited.payload(cookie).ok_or("a reply to no request")?;
        self.failed = error != 0;
        self.skip = if self.failed { 0 } else { payload.into() };
        self.ending = Some(cookie);
        Ok(())
    }

    fn chunk(
        &mut self,
        header: &[u8; CHUNK_HEADER_SIZE],
        awaited: &impl Awaited,
    ) -> Result<(), &'static str> {
        let chunk = ChunkHeader::parse(header).map_err(|_| "a garbled reply")?;
        awaited.payload(chunk.cookie).ok_or("a reply to no request")?;
        self.failed |= chunk.is_error();
        self.skip = chunk.length.into();
        self.ending = chunk.is_done().then_some(chunk.cookie);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memdev::proto::{
        Errno, REPLY_FLAG_DONE, REPLY_TYPE_ERROR, REPLY_TYPE_OFFSET_DATA, REPLY_TYPE_OFFSET_HOLE,
        chunk_header, none_chunk, simple_reply,
    };

    /// Requests with cookies 1 (a read of 5 bytes) and 2 (a write) are out.
    #[derive(Default)]
    struct Two(Vec<(u64, bool)>);

    impl Awaited for Two {
        fn payload(&self, cookie: Cookie) -> Option<u32> {
            match cookie.0 {
                1 => Some(5),
                2 => Some(0),
                _ => None,
            }
        }
        fn done(&mut self, cookie: Cookie, failed: bool) {
            self.0.push((cookie.0, failed));
        }
    }

    fn simple(error: Option<Errno>, cookie: u64) -> Vec<u8> {
        simple_reply(error, Cookie(cookie)).to_vec()
    }

    fn chunk(flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap();
        [&chunk_header(flags, kind, Cookie(1), length)[..], payload].concat()
    }

    /// Feeds `stream` in pieces of `piece` bytes, as a socket might.
    fn outcome(stream: &[u8], piece: usize) -> Vec<(u64, bool)> {
        let (mut replies, mut two, mut buffer) = (Replies::default(), Two::default(), [0; 256]);
        for part in stream.chunks(piece) {
            let start = replies.prepare(&mut buffer);
            buffer[start..start + part.len()].copy_from_slice(part);
            replies.parse(&buffer[..start + part.len()], &mut two).unwrap();
        }
        two.0
    }

    #[test]
    fn replies_are_found_wherever_the_stream_is_cut() {
        let stream = [
            simple(None, 2),
            [simple(None, 1), b"hello".to_vec()].concat(),
            simple(Some(Errno::Io), 1),
            chunk(0, REPLY_TYPE_OFFSET_DATA, b"12345678hel"),
            chunk(REPLY_FLAG_DONE, REPLY_TYPE_OFFSET_HOLE, b"123456780002"),
            chunk(0, REPLY_TYPE_ERROR, b"000000"),
            none_chunk(Cookie(1)).to_vec(),
            none_chunk(Cookie(2)).to_vec(),
        ]
        .concat();
        let want = [(2, false), (1, false), (1, true), (1, false), (1, true), (2, false)];
        for piece in 1..=stream.len() {
            assert_eq!(outcome(&stream, piece), want, "cut every {piece} bytes");
        }
    }

    #[test]
    fn a_stream_out_of_step_is_an_error() {
        let mut two = Two::default();
        assert!(Replies::default().parse(&simple(None, 3), &mut two).is_err());
        assert!(Replies::default().parse(b"nonsense", &mut two).is_err());
    }
}
