//! A server that takes the place of another one, which goes on serving the clients that it has until they have left.
//!
//! ```text
//!   the one after                                          the one before
//!     ── POST /v1/takeover ───────────────────────────────>
//!     <──── an [`Offer`], with its listening sockets ───────
//!        (opens images, starts threads, confines itself)
//!     ── POST /v1/takeover/commit, one end of the bridge ──>     accepts nobody any more, makes no sessions
//!     <──── [`Taken`]: the sessions that it has ────────────
//!     serves all who come                                        serves those who are there
//!     <═══ bridge: who belongs to the other, what has ended ═══>
//!                                                                ends when it has no connection and no session
//! ```
//!
//! The listening sockets are the same ones all the time, so that whoever connects waits a moment at worst. What a client has
//! written stays where it is: no memory is handed over, and no connection that is beyond its handshake. Why, is told in
//! `docs/design.md`.
//!
//! A connection in its handshake is handed over at the moment when it names what the other server has to do with: the one
//! after gives back who names a session of the one before, the one before hands on who wants a new one. Names go with
//! their sessions, so there is one place for each at any time: what has ended is told before anything else that could refer
//! to it, on a bridge that keeps the order. For the same reason the one before ends only when it has said that nothing is left,
//! and the other one has agreed: a connection that was handed over meanwhile comes back before that.
//!
//! Both may be of different versions: what they tell each other is JSON, and what one of them does not know, it passes over.

use crate::error::{Error, ErrorKind, Result};
use crate::handshake::{Agreed, Side};
use crate::net::rights;
use crossbeam::channel::{Receiver, Sender, unbounded};
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

/// The longest message: longer ones are not sent.
const MOST: usize = 96 << 10;
/// Names in one message.
const NAMES: usize = 100;
/// Connections that wait for a server that reads nothing: each is a descriptor that nobody else counts.
const WAITING: usize = 1000;

/// What a server offers to the one after it; the sockets come along, in this order, that of the control API last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// memdev's version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// The files of its sockets, where they have some that it made, and would remove.
    pub files: Vec<Option<SocketFileOffer>>,
}

/// The file of a unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketFileOffer {
    /// Its absolute path.
    pub path: PathBuf,
    /// Its file system.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
}

/// What the one after wants of the one before, with one end of the bridge.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Commit {
    /// After so many seconds it ends although somebody is still there.
    #[serde(default)]
    pub drain_seconds: Option<f64>,
}

/// What the one before says when it has given way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Taken {
    /// Its sessions that clients may come back to, as `IMAGE@ID`.
    pub sessions: Vec<String>,
    /// Bytes of memory that it may still use.
    pub memory: u64,
}

/// What the two tell each other over the bridge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Message {
    /// A connection of an NBD client in its handshake, which comes along, with what it has sent.
    Client { agreed: Agreed, input: Bytes },
    /// A connection of a control client, which comes along, with the request that it has sent, and what is the first image where
    /// it came in.
    Control {
        input: Bytes,
        #[serde(default)]
        first: Option<String>,
    },
    /// Sessions that clients cannot come back to any more.
    Gone { sessions: Vec<String> },
    /// How far the one before has got.
    State(State),
    /// The answer of the one after where that has got to its end: whatever was handed over is on its way before this, and nothing
    /// comes behind it.
    Released,
}

/// How far a server has got that is being replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Its process.
    pub pid: u32,
    /// Connections that it still has.
    pub connections: u64,
    /// Sessions that it still has.
    pub sessions: u64,
    /// Bytes of memory that it may still use, those of servers before it included.
    pub memory: u64,
}

/// Bytes in hexadecimal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl From<Bytes> for String {
    fn from(bytes: Bytes) -> Self {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digits = bytes.0.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        digits.map(|digit| char::from(DIGITS[usize::from(digit)])).collect()
    }
}

impl TryFrom<String> for Bytes {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let (pairs, rest) = text.as_bytes().as_chunks();
        let bytes = pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?));
        let bytes = bytes.collect::<Option<Vec<u8>>>().filter(|_| rest.is_empty());
        bytes.map(Self).ok_or("no hexadecimal digits")
    }
}

/// One end of the connection between the two.
#[derive(Debug)]
pub struct Bridge {
    socket: OwnedFd,
    outgoing: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
}

/// What came over a bridge.
pub(crate) enum Received {
    /// A message, and what came along.
    Message(Message, Option<OwnedFd>),
    /// Nothing now.
    Nothing,
    /// The other server has ended.
    End,
}

impl Bridge {
    /// Both ends of a bridge. They keep messages apart, and their order.
    ///
    /// # Errors
    /// The system has no descriptors for it.
    pub fn pair() -> Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (one, other) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
                .map_err(|error| Error::io("Cannot make a socket", error).advise("raise ulimit -n"))?;
        Ok((Self::of(one), other))
    }

    /// The end that the other server has sent.
    pub(crate) fn of(socket: OwnedFd) -> Self {
        Self { socket, outgoing: VecDeque::new() }
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether something waits for room.
    pub(crate) fn has_outgoing(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Sends a message with what comes along, when there is room; whether it does. One that is too long goes nowhere, nor does
    /// something that comes along where too much waits already; then that is closed.
    pub(crate) fn send(&mut self, message: &Message, file: Option<OwnedFd>) -> bool {
        let Ok(bytes) = serde_json::to_vec(message) else { return false };
        if bytes.len() > MOST {
            tracing::warn!(bytes = bytes.len(), "A message to the other server is too long");
            return false;
        }
        if file.is_some() && self.outgoing.len() >= WAITING {
            tracing::warn!(
                waiting = self.outgoing.len(),
                "The other server does not take what is handed to it"
            );
            return false;
        }
        self.outgoing.push_back((bytes, file));
        self.flush();
        true
    }

    /// Tells of sessions that have ended.
    pub(crate) fn send_gone(&mut self, sessions: &[String]) {
        for some in sessions.chunks(NAMES) {
            self.send(&Message::Gone { sessions: some.to_vec() }, None);
        }
    }

    /// Sends what there is room for.
    pub(crate) fn flush(&mut self) {
        while let Some((bytes, file)) = self.outgoing.front() {
            let files: Vec<_> = file.iter().map(AsFd::as_fd).collect();
            match rights::send(&self.socket, bytes, &files, SendFlags::DONTWAIT) {
                Ok(_) => drop(self.outgoing.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Its end is found out by who receives.
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) =>
                {
                    self.outgoing.clear();
                }
                // The system is short of something. What is told must not be lost: it is tried again.
                Err(error) => return tracing::warn!(%error, "Cannot send to the other server now"),
            }
        }
    }

    /// The next message.
    pub(crate) fn receive(&mut self) -> Received {
        let mut buffer = vec![0; MOST];
        loop {
            match rights::receive(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Received::End,
                Ok((length, mut files)) => match serde_json::from_slice(&buffer[..length]) {
                    Ok(message) => return Received::Message(message, files.pop()),
                    // Of a newer version.
                    Err(error) => tracing::warn!(%error, "The other server has sent what is not understood"),
                },
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Received::Nothing,
                Err(_) => return Received::End,
            }
        }
    }
}

/// An NBD client's connection on its way to another server.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) side: Side,
    pub(crate) agreed: Agreed,
    /// What it has sent, from the option on that names what is there.
    pub(crate) input: Vec<u8>,
    pub(crate) socket: OwnedFd,
}

/// Where workers put what goes to another server.
#[derive(Debug)]
pub(crate) struct Outbox {
    sender: Sender<Outgoing>,
    bell: Arc<OwnedFd>,
}

/// Where it is taken from.
#[derive(Debug)]
pub(crate) struct Collected {
    receiver: Receiver<Outgoing>,
    bell: Arc<OwnedFd>,
}

/// Both ends.
///
/// # Errors
/// The system has no descriptor for it.
pub(crate) fn outbox() -> Result<(Outbox, Collected)> {
    let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|error| Error::io("Cannot make an eventfd", error).advise("raise ulimit -n"))?;
    let (bell, (sender, receiver)) = (Arc::new(bell), unbounded());
    Ok((Outbox { sender, bell: Arc::clone(&bell) }, Collected { receiver, bell }))
}

impl Outbox {
    pub(crate) fn put(&self, outgoing: Outgoing) {
        // Where nobody takes it, the connection is closed.
        if self.sender.send(outgoing).is_ok() {
            #[allow(clippy::disallowed_methods, reason = "an eventfd counts in the host's byte order")]
            let one = 1_u64.to_ne_bytes();
            // It fails only when the counter is full: then it was rung often enough.
            let _ = rustix::io::write(&*self.bell, &one);
        }
    }
}

impl Collected {
    /// What becomes readable when there is something.
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// All that is there; the bell is silent until there is more.
    pub(crate) fn take(&self) -> Vec<Outgoing> {
        let _ = rustix::io::read(&*self.bell, &mut [0_u8; 8]);
        self.receiver.try_iter().collect()
    }
}

/// What cannot be taken over.
pub(crate) fn cannot(why: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("This server cannot be taken over: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    #[test]
    fn messages_keep_their_order_and_bring_descriptors() {
        let (mut one, other) = Bridge::pair().unwrap();
        let mut other = Bridge::of(other);
        let (reader, writer) = std::io::pipe().unwrap();
        let client = Message::Client { agreed: Agreed::default(), input: Bytes(vec![0, 255, 16]) };
        one.send_gone(&["root@a".to_owned(), "root@b".to_owned()]);
        one.send(&client, Some(writer.into()));
        let Received::Message(first, None) = other.receive() else { panic!("a message") };
        assert_eq!(first, Message::Gone { sessions: vec!["root@a".into(), "root@b".into()] });
        let Received::Message(second, Some(file)) = other.receive() else { panic!("a message and a file") };
        assert_eq!(second, client);
        std::io::Write::write_all(&mut File::from(file), b"here").unwrap();
        let mut text = String::new();
        File::from(OwnedFd::from(reader)).read_to_string(&mut text).unwrap();
        assert_eq!(text, "here");
        assert!(matches!(other.receive(), Received::Nothing));
        drop(one);
        assert!(matches!(other.receive(), Received::End));
    }

    #[test]
    fn what_finds_no_room_waits_and_what_is_too_long_goes_nowhere() {
        let (mut one, other) = Bridge::pair().unwrap();
        let mut other = Bridge::of(other);
        let control = |length| Message::Control { input: Bytes(vec![7; length]), first: None };
        assert!(!one.send(&control(MOST), None));
        assert!(!one.has_outgoing() && matches!(other.receive(), Received::Nothing));
        (0..100).for_each(|_| assert!(one.send(&control(40_000), None)));
        assert!(one.has_outgoing());
        let mut count = 0;
        loop {
            match other.receive() {
                Received::Message(message, None) => {
                    assert_eq!(message, control(40_000));
                    count += 1;
                }
                Received::Nothing if one.has_outgoing() => one.flush(),
                _ => break,
            }
        }
        assert_eq!(count, 100);
        // Connections do not wait without end; what is told of does.
        let file = || Some(OwnedFd::from(File::open("/dev/null").unwrap()));
        let sent = (0..2 * WAITING).filter(|_| one.send(&control(1), file())).count();
        assert!((WAITING..WAITING + 1000).contains(&sent), "{sent}");
        assert!(one.send(&control(1), None));
    }

    #[test]
    fn what_is_not_understood_is_passed_over() {
        let (one, other) = Bridge::pair().unwrap();
        let mut other = Bridge::of(other);
        for text in
            [&br#"{"newer":{"x":1}}"#[..], br#"{"control":{"input":"0g"}}"#, br#"{"control":{"input":"0a"}}"#]
        {
            rights::send(&one.socket, text, &[], SendFlags::empty()).unwrap();
        }
        let Received::Message(message, None) = other.receive() else { panic!("a message") };
        assert_eq!(message, Message::Control { input: Bytes(vec![10]), first: None });
    }
}
