//! The transmission phase of the raw peer: any request, any number in flight, every kind of header.
//!
//! What comes back is read, and checked, in [`super::receive`].

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::net::Shutdown;

use super::receive::Pending;
use super::{Export, Peer, Reply, Request, Stream, nbd, size};

/// How headers look, as negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Compact requests, simple replies.
    Simple,
    /// Compact requests, structured replies and simple ones.
    Structured,
    /// Extended headers both ways.
    Extended,
}

impl Style {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Structured, Self::Simple, Self::Extended];

    /// Whether there is block status.
    pub fn has_chunks(self) -> bool {
        self != Self::Simple
    }
}

/// One connection in the transmission phase.
pub struct Client {
    pub(super) peer: Peer,
    /// What the handshake said about the export.
    pub export: Export,
    /// How headers look.
    pub style: Style,
    /// The metadata contexts that were selected: their numbers and names.
    pub contexts: Vec<(u32, String)>,
    sent: u64,
    pub(super) pending: BTreeMap<u64, Pending>,
    pub(super) done: BTreeMap<u64, Reply>,
}

impl Client {
    /// Takes over a peer whose handshake has ended, with compact headers and perhaps `base:allocation`.
    pub fn new(peer: Peer, export: Export, structured: bool, context: Option<u32>) -> Self {
        let style = if structured { Style::Structured } else { Style::Simple };
        let contexts = context.map(|id| (id, "base:allocation".to_owned())).into_iter().collect();
        Self::in_style(peer, export, style, contexts)
    }

    /// Takes over a peer whose handshake has ended.
    pub fn in_style(peer: Peer, export: Export, style: Style, contexts: Vec<(u32, String)>) -> Self {
        let (pending, done) = (BTreeMap::new(), BTreeMap::new());
        Self { peer, export, style, contexts, sent: 0, pending, done }
    }

    /// The whole handshake with structured replies and `base:allocation`; the final error reply if refused.
    pub fn attach(stream: Stream, name: &str) -> Result<Self, super::OptionReply> {
        Self::attach_as(stream, name, Style::Structured, &["base:allocation"])
    }

    /// The whole handshake for simple replies; the final error reply if refused.
    pub fn attach_simple(stream: Stream, name: &str) -> Result<Self, super::OptionReply> {
        Self::attach_as(stream, name, Style::Simple, &[])
    }

    /// The whole handshake, with these metadata contexts, all of which the server must have; the final error reply if
    /// refused.
    pub fn attach_as(
        stream: Stream,
        name: &str,
        style: Style,
        contexts: &[&str],
    ) -> Result<Self, super::OptionReply> {
        let mut peer = Peer::new(stream);
        peer.start();
        match style {
            Style::Simple => {}
            Style::Structured => peer.structured(),
            Style::Extended => peer.extended(),
        }
        let mut selected = Vec::new();
        if !contexts.is_empty() {
            selected = peer.contexts(nbd::OPT_SET_META_CONTEXT, name, contexts)?;
            let names: Vec<_> = selected.iter().map(|(_, name)| name.as_str()).collect();
            assert_eq!(names, contexts, "the server has these contexts");
        }
        let export = peer.go(name)?;
        Ok(Self::in_style(peer, export, style, selected))
    }

    /// The number of a selected context.
    pub fn context(&self, name: &str) -> u32 {
        self.contexts.iter().find(|context| context.1 == name).expect("it was selected").0
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
        self.pending.insert(cookie, Pending::new(request));
        cookie
    }

    /// Sends a request; returns its cookie.
    pub fn send(&mut self, request: &Request) -> u64 {
        let cookie = self.expect(request);
        self.peer.send(&request.bytes_in(self.style, cookie));
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
        let style = self.style;
        let number = |request: &Request| {
            let cookie = self.expect(request);
            bytes.extend_from_slice(&request.bytes_in(style, cookie));
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

    /// The status of exactly `length` bytes, asked for until all is known; neighbours of equal state are merged. Of the
    /// first context that was selected.
    #[track_caller]
    pub fn status(&mut self, offset: u64, length: u64) -> Vec<(u64, u32)> {
        let context = self.contexts.first().expect("a context was selected").0;
        self.status_of(context, offset, length)
    }

    /// The same of another context.
    #[track_caller]
    pub fn status_of(&mut self, context: u32, mut offset: u64, length: u64) -> Vec<(u64, u32)> {
        let end = offset + length;
        let most = if self.style == Style::Extended { u64::MAX } else { u64::from(u32::MAX) & !4095 };
        let mut merged: Vec<(u64, u32)> = Vec::new();
        while offset < end {
            let ask = (end - offset).min(most);
            for (extent, state) in self.call(&Request::status(offset, ask)).ok().status_of(context).to_vec() {
                let extent = extent.min(end - offset);
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
        let goodbye = Request::new(nbd::CMD_DISC, 0, 0).bytes_in(self.style, 0xd15c);
        self.peer.send(&goodbye);
    }

    /// Hard disconnect: both directions at once, whatever is in flight.
    pub fn cut(self) {
        // The server may have closed already.
        let _ = self.peer.stream().shutdown(Shutdown::Both);
    }
}
