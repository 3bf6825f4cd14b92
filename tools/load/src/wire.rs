//! The client's half of the wire: requests out, replies in. Pure; no I/O.
//!
//! Replies are parsed where they lie in the receive buffer and their payload is skipped there, never copied: a load
//! generator that touches the data measures itself.

/// Commands that the generator sends (`NBD_CMD_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read = 0,
    Write = 1,
    Disc = 2,
    Trim = 4,
}

pub(crate) const REQUEST_SIZE: usize = 28;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const SIMPLE_REPLY_SIZE: usize = 16;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const CHUNK_SIZE: usize = 20;
const CHUNK_FLAG_DONE: u16 = 1;
const CHUNK_TYPE_IS_ERROR: u16 = 1 << 15;

/// One request header (compact, without flags).
pub(crate) fn request(command: Command, cookie: u64, offset: u64, length: u32) -> [u8; REQUEST_SIZE] {
    let mut bytes = [0; REQUEST_SIZE];
    bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[6..8].copy_from_slice(&(command as u16).to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..28].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// What the parser asks about a request that is being answered, and tells of its end.
pub(crate) trait Awaited {
    /// The bytes of payload that follow a successful simple reply with this cookie; None if no such request is out.
    fn payload(&self, cookie: u64) -> Option<u32>;
    /// The whole answer has arrived.
    fn done(&mut self, cookie: u64, failed: bool);
}

/// Where in the stream of replies one connection stands between two receives.
#[derive(Debug, Default)]
pub(crate) struct Replies {
    /// The start of a header whose rest has not arrived.
    carry: [u8; CHUNK_SIZE],
    carried: usize,
    /// Payload bytes still to be skipped.
    skip: u64,
    /// The request that is complete when they are.
    ending: Option<u64>,
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
            let header = match rest.first_chunk().map(|magic| u32::from_be_bytes(*magic)) {
                None => 4,
                Some(SIMPLE_REPLY_MAGIC) => SIMPLE_REPLY_SIZE,
                Some(CHUNK_MAGIC) => CHUNK_SIZE,
                Some(_) => return Err("a reply with a wrong magic"),
            };
            if rest.len() < header {
                self.carry[..rest.len()].copy_from_slice(rest);
                self.carried = rest.len();
                return Ok(());
            }
            self.header(&rest[..header], awaited)?;
            rest = &rest[header..];
        }
    }

    fn header(&mut self, bytes: &[u8], awaited: &impl Awaited) -> Result<(), &'static str> {
        let cookie = u64_at(bytes, 8);
        let payload = awaited.payload(cookie).ok_or("a reply to no request")?;
        if bytes.len() == SIMPLE_REPLY_SIZE {
            self.failed = u32_at(bytes, 4) != 0;
            self.skip = if self.failed { 0 } else { payload.into() };
            self.ending = Some(cookie);
        } else {
            let flags = u16::from_be_bytes([bytes[4], bytes[5]]);
            let kind = u16::from_be_bytes([bytes[6], bytes[7]]);
            self.failed |= kind & CHUNK_TYPE_IS_ERROR != 0;
            self.skip = u32_at(bytes, 16).into();
            self.ending = (flags & CHUNK_FLAG_DONE != 0).then_some(cookie);
        }
        Ok(())
    }
}

/// The big-endian number at `at`; the caller has checked that it is there.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// The big-endian number at `at`; the caller has checked that it is there.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests with cookies 1 (a read of 5 bytes) and 2 (a write) are out.
    #[derive(Default)]
    struct Two(Vec<(u64, bool)>);

    impl Awaited for Two {
        fn payload(&self, cookie: u64) -> Option<u32> {
            match cookie {
                1 => Some(5),
                2 => Some(0),
                _ => None,
            }
        }
        fn done(&mut self, cookie: u64, failed: bool) {
            self.0.push((cookie, failed));
        }
    }

    fn simple(error: u32, cookie: u64) -> Vec<u8> {
        [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
    }

    fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap();
        let mut bytes = CHUNK_MAGIC.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(payload);
        bytes
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
            simple(0, 2),
            [simple(0, 1), b"hello".to_vec()].concat(),
            simple(5, 1),
            chunk(0, 1, 1, b"12345678hel"),
            chunk(CHUNK_FLAG_DONE, 2, 1, b"123456780002"),
            chunk(0, CHUNK_TYPE_IS_ERROR | 1, 1, b"000000"),
            chunk(CHUNK_FLAG_DONE, 0, 1, b""),
            chunk(CHUNK_FLAG_DONE, 0, 2, b""),
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
        assert!(Replies::default().parse(&simple(0, 3), &mut two).is_err());
        assert!(Replies::default().parse(b"nonsense", &mut two).is_err());
    }
}
