//! What comes back to the raw peer in the transmission phase.
//!
//! Every reply is checked against the specification while it is read: its cookie was asked for, chunks lie inside
//! the request, do not overlap and cover it, only what was negotiated is used. A breach panics with a sentence.

use std::io;

use super::client::Style;
use super::{Chunk, Client, Reply, Request, nbd, size};

/// A request that is not fully answered.
pub struct Pending {
    request: Request,
    reply: Reply,
    covered: Vec<(u64, u64)>,
}

/// The header of a chunk of either kind.
struct Header {
    flags: u16,
    kind: u16,
    cookie: u64,
    length: u64,
}

impl Client {
    /// Receives one simple reply or one chunk.
    ///
    /// # Errors
    /// When the server hangs up; what was received until then is kept.
    pub(super) fn receive_message(&mut self) -> io::Result<()> {
        match (self.peer.try_u32()?, self.style) {
            (nbd::SIMPLE_REPLY_MAGIC, Style::Simple | Style::Structured) => self.receive_simple(),
            (nbd::STRUCTURED_REPLY_MAGIC, Style::Structured) => {
                let (flags, kind) = (self.peer.try_u16()?, self.peer.try_u16()?);
                let (cookie, length) = (self.peer.try_u64()?, u64::from(self.peer.try_u32()?));
                self.receive_chunk(Header { flags, kind, cookie, length })
            }
            (nbd::EXTENDED_REPLY_MAGIC, Style::Extended) => {
                let (flags, kind) = (self.peer.try_u16()?, self.peer.try_u16()?);
                let (cookie, offset, length) =
                    (self.peer.try_u64()?, self.peer.try_u64()?, self.peer.try_u64()?);
                let asked = self.pending.get(&cookie).map(|pending| pending.request.offset);
                assert_eq!(Some(offset), asked, "an extended chunk repeats the request's offset");
                self.receive_chunk(Header { flags, kind, cookie, length })
            }
            (other, style) => panic!("a reply starts with {other:#010x}, which does not belong to {style:?}"),
        }
    }

    fn receive_simple(&mut self) -> io::Result<()> {
        let error = self.peer.try_u32()?;
        let cookie = self.peer.try_u64()?;
        let pending = self.pending.remove(&cookie).unwrap_or_else(|| panic!("nobody asked {cookie:#x}"));
        let mut reply = pending.reply;
        assert!(!reply.structured, "a reply is either simple or structured");
        if error != 0 {
            reply.error = Some(error);
        }
        match pending.request.command {
            nbd::CMD_READ => {
                assert!(
                    self.style == Style::Simple,
                    "with structured replies a read is never answered by a simple one"
                );
                if error == 0 {
                    reply.data = vec![0; size(pending.request.length)];
                    self.peer.try_fill(&mut reply.data)?;
                }
            }
            nbd::CMD_BLOCK_STATUS if error == 0 => {
                panic!("block status succeeds only with a structured reply")
            }
            _ => {}
        }
        self.done.insert(cookie, reply);
        Ok(())
    }

    fn receive_chunk(&mut self, header: Header) -> io::Result<()> {
        let Header { flags, kind, cookie, length } = header;
        assert_eq!(flags & !nbd::REPLY_DONE, 0, "only DONE is a known reply flag");
        let mut pending = self.pending.remove(&cookie).unwrap_or_else(|| panic!("nobody asked {cookie:#x}"));
        pending.reply.structured = true;
        let (start, end) = pending.request.range();
        match kind {
            nbd::REPLY_NONE => {
                assert_eq!(length, 0, "NONE has no payload");
                assert_ne!(flags & nbd::REPLY_DONE, 0, "NONE is always final");
                pending.reply.chunks.push(Chunk::None);
            }
            nbd::REPLY_OFFSET_DATA => {
                assert_eq!(pending.request.command, nbd::CMD_READ);
                assert!(length > 8, "a data chunk has at least one byte");
                let offset = self.peer.try_u64()?;
                let count = length - 8;
                pending.cover(offset, count);
                let at = size(offset - start);
                self.peer.try_fill(&mut pending.reply.data[at..at + size(count)])?;
                pending.reply.chunks.push(Chunk::Data(offset, count));
            }
            nbd::REPLY_OFFSET_HOLE => {
                assert_eq!(pending.request.command, nbd::CMD_READ);
                assert_eq!(length, 12, "a hole chunk has 12 bytes");
                let offset = self.peer.try_u64()?;
                let count = u64::from(self.peer.try_u32()?);
                assert_ne!(count, 0, "a hole is not empty");
                pending.cover(offset, count);
                let at = size(offset - start);
                pending.reply.data[at..at + size(count)].fill(0);
                pending.reply.chunks.push(Chunk::Hole(offset, count));
            }
            nbd::REPLY_BLOCK_STATUS | nbd::REPLY_BLOCK_STATUS_EXT => {
                let long = kind == nbd::REPLY_BLOCK_STATUS_EXT;
                assert_eq!(
                    long,
                    self.style == Style::Extended,
                    "extended headers, and only they, have 64-bit status"
                );
                self.receive_status(&mut pending, length, long)?;
            }
            nbd::REPLY_ERROR | nbd::REPLY_ERROR_OFFSET => {
                let fixed = if kind == nbd::REPLY_ERROR { 6 } else { 14 };
                assert!(length >= fixed, "an error chunk of {length} bytes");
                let errno = self.peer.try_u32()?;
                assert_ne!(errno, 0, "an error chunk names an error");
                let message = self.peer.try_u16()?;
                assert_eq!(length, fixed + u64::from(message), "the message fills the error chunk");
                assert!(message <= 4096, "a message is short");
                let mut text = vec![0; usize::from(message)];
                self.peer.try_fill(&mut text)?;
                pending.reply.message = String::from_utf8(text).expect("a message is UTF-8");
                let offset = if kind == nbd::REPLY_ERROR { None } else { Some(self.peer.try_u64()?) };
                if let Some(offset) = offset {
                    assert!(offset >= start && offset < end, "an error's offset lies in the request");
                }
                pending.reply.error.get_or_insert(errno);
                pending.reply.chunks.push(Chunk::Error(errno, offset));
            }
            other => panic!("a chunk of unknown type {other}"),
        }
        if flags & nbd::REPLY_DONE == 0 {
            self.pending.insert(cookie, pending);
        } else {
            let reply = pending.finish(&self.contexts);
            self.done.insert(cookie, reply);
        }
        Ok(())
    }

    fn receive_status(&mut self, pending: &mut Pending, length: u64, long: bool) -> io::Result<()> {
        assert_eq!(pending.request.command, nbd::CMD_BLOCK_STATUS);
        let context = self.peer.try_u32()?;
        let name = self.contexts.iter().find(|known| known.0 == context).map(|known| known.1.as_str());
        let name = name.expect("only selected contexts are reported");
        assert!(pending.request.wants(context), "only contexts that were asked for are reported");
        assert!(pending.reply.statuses.iter().all(|told| told.0 != context), "one status chunk a context");
        let count = if long {
            let count = u64::from(self.peer.try_u32()?);
            assert_eq!(length, 8 + 16 * count, "the count is that of the extents in the chunk");
            count
        } else {
            assert!(length % 8 == 4, "a status chunk of {length} bytes");
            length / 8
        };
        assert!((1..=1 << 20).contains(&count), "a status chunk with {count} extents");
        let (start, end) = pending.request.range();
        let (wanted, mut total, mut extents) = (end - start, 0_u64, Vec::new());
        for _ in 0..count {
            assert!(total < wanted, "no extent follows one that reaches the end of the request");
            let (extent, state) = if long {
                let (extent, state) = (self.peer.try_u64()?, self.peer.try_u64()?);
                (extent, u32::try_from(state).expect("these contexts have 32 bits"))
            } else {
                (u64::from(self.peer.try_u32()?), self.peer.try_u32()?)
            };
            assert_ne!(extent, 0, "an extent is not empty");
            assert_eq!(state & !3, 0, "reserved state bits are clear");
            assert!(name != "memdev:dirty" || state != 2, "what is not dirty is not told to be zero");
            total += extent;
            extents.push((extent, state));
        }
        assert!(start + total <= self.export.size, "extents lie inside the export");
        if pending.request.flags & nbd::REQ_ONE != 0 {
            assert_eq!(extents.len(), 1, "REQ_ONE asks for one extent");
            assert!(total <= wanted, "with REQ_ONE the extent does not exceed the request");
        }
        pending.reply.statuses.push((context, extents));
        pending.reply.chunks.push(Chunk::Status(context));
        Ok(())
    }
}

impl Pending {
    /// What a request needs until it is answered.
    pub fn new(request: Request) -> Self {
        Self { request, reply: Reply::default(), covered: Vec::new() }
    }

    /// A content chunk of a read: inside the request, not overlapping an earlier one.
    fn cover(&mut self, offset: u64, count: u64) {
        let (start, end) = self.request.range();
        assert!(offset >= start && offset + count <= end, "a chunk lies inside its request");
        let overlaps = self.covered.iter().any(|&(from, to)| offset < to && from < offset + count);
        assert!(!overlaps, "chunks do not overlap");
        self.covered.push((offset, offset + count));
        if self.request.flags & nbd::DF != 0 {
            assert_eq!(self.covered.len(), 1, "with DF there is one content chunk");
        }
        // Poison, so that a byte nobody sent cannot look right.
        self.reply.data.resize(size(end - start), 0xa5);
    }

    /// The final chunk has come: a success must be complete.
    fn finish(mut self, contexts: &[(u32, String)]) -> Reply {
        if self.reply.error.is_none() {
            let covered: u64 = self.covered.iter().map(|(from, to)| to - from).sum();
            match self.request.command {
                nbd::CMD_READ => {
                    assert_eq!(covered, self.request.length, "the chunks cover the whole request");
                }
                nbd::CMD_BLOCK_STATUS => {
                    let told = |id: u32| self.reply.statuses.iter().find(|told| told.0 == id);
                    let wanted: Vec<_> = contexts
                        .iter()
                        .map(|context| context.0)
                        .filter(|&id| self.request.wants(id))
                        .collect();
                    assert!(!wanted.is_empty(), "block status without a context does not succeed");
                    assert!(wanted.iter().all(|&id| told(id).is_some()), "every context is reported");
                    self.reply.extents = told(wanted[0]).map(|told| told.1.clone()).unwrap_or_default();
                }
                _ => assert!(self.covered.is_empty(), "only reads have content chunks"),
            }
        }
        self.reply
    }
}
