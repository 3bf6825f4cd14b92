//! The transmission phase of the raw peer: any request, any number in flight, both kinds of reply.
//!
//! Every reply is checked against the specification while it is read: its cookie was asked for, chunks lie inside
//! the request, do not overlap and cover it, only what was negotiated is used. A breach panics with a sentence.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::net::Shutdown;

use super::{Chunk, Export, Peer, Reply, Request, Stream, nbd, size};

struct Pending {
    request: Request,
    reply: Reply,
    covered: Vec<(u64, u64)>,
}

/// One connection in the transmission phase.
pub struct Client {
    peer: Peer,
    /// What the handshake said about the export.
    pub export: Export,
    structured: bool,
    context: Option<u32>,
    sent: u64,
    pending: BTreeMap<u64, Pending>,
    done: BTreeMap<u64, Reply>,
}

impl Client {
    /// Takes over a peer whose handshake has ended.
    pub fn new(peer: Peer, export: Export, structured: bool, context: Option<u32>) -> Self {
        Self { peer, export, structured, context, sent: 0, pending: BTreeMap::new(), done: BTreeMap::new() }
    }

    /// The whole handshake with structured replies and `base:allocation`; the final error reply if refused.
    pub fn attach(stream: Stream, name: &str) -> Result<Self, super::OptionReply> {
        let mut peer = Peer::new(stream);
        peer.start();
        peer.structured();
        let contexts = peer.contexts(nbd::OPT_SET_META_CONTEXT, name, &["base:allocation"])?;
        assert_eq!(contexts.len(), 1, "base:allocation is supported");
        assert_eq!(contexts[0].1, "base:allocation");
        let export = peer.go(name)?;
        Ok(Self::new(peer, export, true, Some(contexts[0].0)))
    }

    /// The whole handshake for simple replies; the final error reply if refused.
    pub fn attach_simple(stream: Stream, name: &str) -> Result<Self, super::OptionReply> {
        let mut peer = Peer::new(stream);
        peer.start();
        let export = peer.go(name)?;
        Ok(Self::new(peer, export, false, None))
    }

    /// The export's size in bytes.
    pub fn size(&self) -> u64 {
        self.export.size
    }

    /// The raw connection, for bytes that are no proper request.
    pub fn peer(&mut self) -> &mut Peer {
        &mut self.peer
    }

    /// How many requests have been sent and not fully answered.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Numbers a request and remembers that its reply will come; returns the cookie.
    pub fn expect(&mut self, request: &Request) -> u64 {
        // Cookies are opaque: scatter them over all 64 bits (an odd factor keeps them distinct).
        let cookie = self.sent.wrapping_mul(0xd134_2543_de82_ef95) ^ u64::MAX;
        self.sent += 1;
        let request = Request { payload: Vec::new(), ..request.clone() };
        self.pending.insert(cookie, Pending { request, reply: Reply::default(), covered: Vec::new() });
        cookie
    }

    /// Sends a request; returns its cookie.
    pub fn send(&mut self, request: &Request) -> u64 {
        let cookie = self.expect(request);
        self.peer.send(&request.bytes(cookie));
        cookie
    }

    /// Sends requests in one piece; returns their cookies. A unix socket takes far more bytes so than one by one.
    pub fn send_all(&mut self, requests: &[Request]) -> Vec<u64> {
        let (cookies, bytes) = self.expect_all(requests);
        self.peer.send(&bytes);
        cookies
    }

    fn expect_all(&mut self, requests: &[Request]) -> (Vec<u64>, Vec<u8>) {
        let mut bytes = Vec::new();
        let number = |request: &Request| {
            let cookie = self.expect(request);
            bytes.extend_from_slice(&request.bytes(cookie));
            cookie
        };
        (requests.iter().map(number).collect(), bytes)
    }

    /// Receives until the reply to `cookie` is complete.
    pub fn wait(&mut self, cookie: u64) -> Reply {
        self.try_wait(cookie).expect("receiving from the server")
    }

    /// Receives until the reply to `cookie` is complete or the server hangs up.
    pub fn try_wait(&mut self, cookie: u64) -> io::Result<Reply> {
        loop {
            if let Some(reply) = self.done.remove(&cookie) {
                return Ok(reply);
            }
            self.receive_message()?;
        }
    }

    /// One request and its reply.
    pub fn call(&mut self, request: &Request) -> Reply {
        let cookie = self.send(request);
        self.wait(cookie)
    }

    /// All requests in one stream, sent while replies are received; replies in the order of the requests.
    pub fn pipeline(&mut self, requests: &[Request]) -> Vec<Reply> {
        self.pipeline_then(requests, &[])
    }

    /// The same with `last` sent behind the requests.
    pub fn pipeline_then(&mut self, requests: &[Request], last: &[u8]) -> Vec<Reply> {
        let replies = self.try_pipeline(requests, last).into_iter();
        replies.map(|reply| reply.expect("receiving from the server")).collect()
    }

    /// The same where the server may hang up.
    pub fn try_pipeline(&mut self, requests: &[Request], last: &[u8]) -> Vec<io::Result<Reply>> {
        let (cookies, mut bytes) = self.expect_all(requests);
        bytes.extend_from_slice(last);
        let mut writer = self.peer.stream().try_clone().expect("a second handle on the socket");
        std::thread::scope(|scope| {
            let sending = scope.spawn(move || writer.write_all(&bytes));
            let replies: Vec<_> = cookies.into_iter().map(|cookie| self.try_wait(cookie)).collect();
            let sent = sending.join().expect("the writer does not panic");
            assert!(sent.is_ok() || replies.iter().any(Result::is_err), "sending to the server: {sent:?}");
            replies
        })
    }

    /// Reads, or panics.
    #[track_caller]
    pub fn read(&mut self, offset: u64, length: u64) -> Vec<u8> {
        self.call(&Request::read(offset, length)).ok().data
    }

    /// Reads the whole export in requests of at most 1 MiB.
    #[track_caller]
    pub fn read_all(&mut self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(size(self.size()));
        while (bytes.len() as u64) < self.size() {
            let offset = bytes.len() as u64;
            bytes.extend(self.read(offset, (self.size() - offset).min(1 << 20)));
        }
        bytes
    }

    /// Writes, or panics.
    #[track_caller]
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.call(&Request::write(offset, data)).ok();
    }

    /// Flushes, or panics.
    #[track_caller]
    pub fn flush(&mut self) {
        self.call(&Request::flush()).ok();
    }

    /// Trims, or panics.
    #[track_caller]
    pub fn trim(&mut self, offset: u64, length: u64) {
        self.call(&Request::trim(offset, length)).ok();
    }

    /// Writes zeroes, or panics.
    #[track_caller]
    pub fn zeroes(&mut self, offset: u64, length: u64) {
        self.call(&Request::zeroes(offset, length)).ok();
    }

    /// The status of exactly `length` bytes, asked for until all is known; neighbours of equal state are merged.
    #[track_caller]
    pub fn status(&mut self, mut offset: u64, length: u64) -> Vec<(u64, u32)> {
        let end = offset + length;
        let mut merged: Vec<(u64, u32)> = Vec::new();
        while offset < end {
            let ask = (end - offset).min(u64::from(u32::MAX) & !4095);
            for (extent, state) in self.call(&Request::status(offset, ask)).ok().extents {
                let extent = u64::from(extent).min(end - offset);
                offset += extent;
                match merged.last_mut() {
                    Some((length, last)) if *last == state => *length += extent,
                    _ if extent > 0 => merged.push((extent, state)),
                    _ => {}
                }
            }
        }
        merged
    }

    /// Soft disconnect: nothing may be in flight; the server closes.
    pub fn disconnect(mut self) {
        self.send_disconnect();
        self.peer.expect_end();
    }

    /// Sends `NBD_CMD_DISC` and does not wait.
    pub fn send_disconnect(&mut self) {
        self.peer.send(&Request::disconnect());
    }

    /// Hard disconnect: both directions at once, whatever is in flight.
    pub fn cut(self) {
        // The server may have closed already.
        let _ = self.peer.stream().shutdown(Shutdown::Both);
    }

    /// Receives one simple reply or one chunk.
    ///
    /// # Errors
    /// When the server hangs up; what was received until then is kept.
    fn receive_message(&mut self) -> io::Result<()> {
        match self.peer.try_u32()? {
            nbd::SIMPLE_REPLY_MAGIC => self.receive_simple(),
            nbd::STRUCTURED_REPLY_MAGIC => self.receive_chunk(),
            other => panic!("a reply starts with {other:#010x}: the stream is out of step"),
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
                assert!(!self.structured, "with structured replies a read is never answered by a simple one");
                if error == 0 {
                    reply.data = vec![0; size(u64::from(pending.request.length))];
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

    fn receive_chunk(&mut self) -> io::Result<()> {
        assert!(self.structured, "structured replies were not negotiated");
        let (flags, kind) = (self.peer.try_u16()?, self.peer.try_u16()?);
        let (cookie, length) = (self.peer.try_u64()?, self.peer.try_u32()?);
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
                let count = u64::from(length) - 8;
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
            nbd::REPLY_BLOCK_STATUS => self.receive_status(&mut pending, length)?,
            nbd::REPLY_ERROR | nbd::REPLY_ERROR_OFFSET => {
                let fixed = if kind == nbd::REPLY_ERROR { 6 } else { 14 };
                assert!(length >= fixed, "an error chunk of {length} bytes");
                let errno = self.peer.try_u32()?;
                assert_ne!(errno, 0, "an error chunk names an error");
                let message = self.peer.try_u16()?;
                assert_eq!(length, fixed + u32::from(message), "the message fills the error chunk");
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
            let reply = pending.finish();
            self.done.insert(cookie, reply);
        }
        Ok(())
    }

    fn receive_status(&mut self, pending: &mut Pending, length: u32) -> io::Result<()> {
        assert_eq!(pending.request.command, nbd::CMD_BLOCK_STATUS);
        assert!(length >= 12 && length % 8 == 4, "a status chunk of {length} bytes");
        let context = self.peer.try_u32()?;
        assert_eq!(Some(context), self.context, "only the selected context is reported");
        assert!(pending.reply.extents.is_empty(), "one status chunk a context");
        let wanted = u64::from(pending.request.length);
        let mut total = 0;
        for _ in 0..length / 8 {
            assert!(total < wanted, "no extent follows one that reaches the end of the request");
            let (extent, state) = (self.peer.try_u32()?, self.peer.try_u32()?);
            assert_ne!(extent, 0, "an extent is not empty");
            assert_eq!(state & !3, 0, "reserved state bits are clear");
            total += u64::from(extent);
            pending.reply.extents.push((extent, state));
        }
        let (start, _) = pending.request.range();
        assert!(start + total <= self.export.size, "extents lie inside the export");
        if pending.request.flags & nbd::REQ_ONE != 0 {
            assert_eq!(pending.reply.extents.len(), 1, "REQ_ONE asks for one extent");
            assert!(total <= wanted, "with REQ_ONE the extent does not exceed the request");
        }
        pending.reply.chunks.push(Chunk::Status(context));
        Ok(())
    }
}

impl Pending {
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
    fn finish(self) -> Reply {
        if self.reply.error.is_none() {
            let covered: u64 = self.covered.iter().map(|(from, to)| to - from).sum();
            match self.request.command {
                nbd::CMD_READ => {
                    assert_eq!(covered, u64::from(self.request.length), "the chunks cover the whole request");
                }
                nbd::CMD_BLOCK_STATUS => {
                    assert!(!self.reply.extents.is_empty(), "a successful block status has an extent");
                }
                _ => assert!(self.covered.is_empty(), "only reads have content chunks"),
            }
        }
        self.reply
    }
}
