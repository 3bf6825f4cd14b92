//! A server that takes another's place, or gives way to one, as the control thread does it: it answers the other server's
//! requests, and keeps the bridge. See [`crate::takeover`].

use super::Subject;
use super::http::{Head, Response};
use super::routes::parse;
use crate::error::{Error, ErrorKind, Result};
use crate::handshake::{Agreed, Side};
use crate::net::{Listener, Stream};
use crate::takeover::{
    Bridge, Bytes, Collected, Commit, Message, Offer, Outgoing, Received, State, Taken, cannot,
};
use rustix::event::{PollFd, PollFlags};
use rustix::net::{SocketType, sockopt};
use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// What the control thread can have the rest of the server do.
pub trait House: Send + Sync + std::fmt::Debug {
    /// What another server is offered that wants to take this one's place: its listening sockets.
    ///
    /// # Errors
    /// It has none, or they cannot be shared.
    fn offer(&self) -> Result<(Offer, Vec<OwnedFd>)>;

    /// Has no worker accept any more, and leaves the socket files to the other server.
    fn stop_listening(&self);

    /// Takes over the connection of an NBD client that has agreed on this with the other server, and has sent `input` since.
    ///
    /// # Errors
    /// There is no room for it, or what was agreed on is not offered here.
    fn take_in(&self, socket: OwnedFd, agreed: Agreed, input: Vec<u8>) -> Result<()>;

    /// Nobody is left, and the server is to end.
    fn is_done(&self);
}

/// Whoever was handed over by a server that has ended since, or is in its handshake, has so long to come in.
const LATECOMERS: Duration = Duration::from_secs(10);

/// This server's place between the one before it and the one after it.
#[derive(Debug)]
pub struct Succession {
    collected: Collected,
    before: Option<Bridge>,
    /// What was heard last of the server before.
    heard: State,
    after: Option<After>,
    /// Bytes of memory that this server may use when there is none before it.
    memory: u64,
}

/// The server that has taken this one's place.
#[derive(Debug)]
struct After {
    /// `None` when it has ended.
    bridge: Option<Bridge>,
    /// When it has ended.
    ended: Option<Instant>,
    /// The sessions that it knows to be here.
    announced: HashSet<String>,
    ends: Option<Instant>,
    /// Bytes of memory that were free when it came, half of which stayed here.
    kept: u64,
}

/// A control client that another server has passed on.
pub(super) struct Passed {
    pub(super) stream: Stream,
    /// Its request.
    pub(super) input: Vec<u8>,
    /// The first image where it came in.
    pub(super) first: Option<String>,
}

impl Succession {
    /// The place of a server that takes the place of the one at the other end of the bridge, if there is one.
    #[must_use]
    pub(crate) fn new(subject: &Subject, collected: Collected, before: Option<(Bridge, u64)>) -> Self {
        let (before, memory) = before.unzip();
        let limit = subject.registry.total().limit();
        let memory = memory.unwrap_or(limit);
        // What is not this one's is the other's, until that says so by itself.
        let heard = State { memory: memory.saturating_sub(limit), ..State::default() };
        Self { collected, before, heard, after: None, memory }
    }

    /// What it was heard last from the server before, while that is there.
    pub(super) fn before(&self) -> Option<State> {
        self.before.as_ref().map(|_| self.heard)
    }

    pub(super) fn gives_way(&self) -> bool {
        self.after.is_some()
    }

    /// What is to be watched, beside clients; when something is seen of it, [`Succession::act`].
    pub(super) fn watched(&self) -> Vec<PollFd<'_>> {
        let waits_for = |bridge: &Bridge| {
            if bridge.has_outgoing() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN }
        };
        let bridges = self.before.iter().chain(self.after.iter().filter_map(|after| after.bridge.as_ref()));
        let fds = bridges.map(|bridge| (bridge.socket(), waits_for(bridge)));
        std::iter::once((self.collected.bell(), PollFlags::IN))
            .chain(fds)
            .map(|(fd, flags): (BorrowedFd<'_>, _)| PollFd::from_borrowed_fd(fd, flags))
            .collect()
    }

    /// When there is something to do although nothing is seen.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.after.as_ref().and_then(|after| after.ends)
    }

    /// Something was seen: does what there is to do. Control clients that were passed on are returned.
    pub(super) fn act(&mut self, subject: &Subject) -> Vec<Passed> {
        for outgoing in self.collected.take() {
            self.pass_client(subject, outgoing);
        }
        let mut passed = Vec::new();
        self.hear(Side::Before, subject, &mut passed);
        self.hear(Side::After, subject, &mut passed);
        passed
    }

    /// The bridge to the other server; that has ended, or never was, where there is none.
    pub(super) fn bridge(&mut self, side: Side) -> Option<&mut Bridge> {
        match side {
            Side::Before => self.before.as_mut(),
            Side::After => self.after.as_mut().and_then(|after| after.bridge.as_mut()),
        }
    }

    fn pass_client(&mut self, subject: &Subject, outgoing: Outgoing) {
        let Outgoing { side, agreed, input, socket } = outgoing;
        // What has ended is told first: else it would come back.
        self.tell_gone(subject);
        match self.bridge(side).filter(|_| side == Side::After || subject.registry.has_before()) {
            Some(bridge) => {
                bridge.send(&Message::Client { agreed, input: Bytes(input) }, Some(socket));
            }
            // What it has named has ended since, and the other one with it, or is about to end: the name is free.
            None if side == Side::Before => take_in(subject, socket, agreed, input),
            None => {}
        }
    }

    /// Passes a control client on whose request is for another server: whether it was passed.
    pub(super) fn pass_control(
        &mut self,
        subject: &Subject,
        side: Side,
        client: &Stream,
        input: &[u8],
        first: Option<&str>,
    ) -> bool {
        self.tell_gone(subject);
        let Some(bridge) = self.bridge(side) else { return false };
        let Ok(socket) = rustix::io::fcntl_dupfd_cloexec(client, 0) else { return false };
        let first = first.unwrap_or_else(|| subject.registry.first()).to_owned();
        bridge.send(&Message::Control { input: Bytes(input.to_vec()), first: Some(first) }, Some(socket))
    }

    /// Whose the thing is that a control client asks for; `None`: this server's.
    pub(super) fn whose(&self, subject: &Subject, head: &Head) -> Option<Side> {
        let path: Vec<&str> = head.path.iter().map(String::as_str).collect();
        let session = match path.as_slice() {
            ["v1", "sessions", name, ..] => Some(*name),
            _ => None,
        };
        if session.is_some_and(|name| subject.registry.is_before(name)) {
            return Some(Side::Before);
        }
        let is_here = session.is_some_and(|name| subject.registry.session(name).is_ok());
        (self.gives_way() && !is_here).then_some(Side::After)
    }

    /// Tells the server after of sessions that it takes to be here and that are not any more.
    fn tell_gone(&mut self, subject: &Subject) {
        let Some(After { bridge: Some(bridge), announced, .. }) = &mut self.after else { return };
        let names = subject.registry.names();
        let gone: Vec<String> = announced.extract_if(|name| !names.contains(name)).collect();
        bridge.send_gone(&gone);
    }

    fn hear(&mut self, side: Side, subject: &Subject, passed: &mut Vec<Passed>) {
        while let Some(bridge) = self.bridge(side) {
            bridge.flush();
            match bridge.receive() {
                Received::Nothing => return,
                Received::End => self.ended(side, subject),
                Received::Message(message, file) => self.on_message(side, message, file, subject, passed),
            }
        }
    }

    /// Lets go of the server before, and of what it still had.
    fn forget_before(&mut self, subject: &Subject) {
        self.before = None;
        subject.registry.forget_all_before();
        self.heard = State::default();
    }

    fn ended(&mut self, side: Side, subject: &Subject) {
        match (side, &mut self.after) {
            (Side::Before, _) => {
                tracing::info!("The server before has ended");
                self.forget_before(subject);
                self.share_memory(subject);
            }
            (Side::After, Some(after)) => {
                tracing::warn!(
                    "The server that took this one's place has ended, and nobody can reach this one any more: it ends when the \
                     last who is connected has left, or by 'kill {}'",
                    std::process::id()
                );
                (after.bridge, after.ended) = (None, Some(Instant::now()));
                // Nor can anybody reach the server before, which is told so by this.
                self.forget_before(subject);
            }
            (Side::After, None) => {}
        }
    }

    fn on_message(
        &mut self,
        side: Side,
        message: Message,
        file: Option<OwnedFd>,
        subject: &Subject,
        passed: &mut Vec<Passed>,
    ) {
        match (message, file) {
            (Message::Client { agreed, input }, Some(socket)) => take_in(subject, socket, agreed, input.0),
            (Message::Control { input, first }, Some(socket)) => match Stream::passed(socket) {
                Ok(stream) => passed.push(Passed { stream, input: input.0, first }),
                Err(error) => tracing::debug!(%error, "a control client was gone before it was passed on"),
            },
            (Message::Gone { sessions }, _) if side == Side::Before => {
                subject.registry.forget_before(&sessions);
                self.tell_gone(subject);
            }
            (Message::State(state), _) if side == Side::Before => {
                self.heard = state;
                self.share_memory(subject);
                if state.connections == 0
                    && state.sessions == 0
                    && !subject.registry.has_before()
                    && let Some(bridge) = &mut self.before
                {
                    bridge.send(&Message::Released, None);
                }
            }
            (Message::Released, _) if side == Side::After => self.released(subject),
            (message, _) => tracing::warn!(?message, "The other server has sent what makes no sense"),
        }
    }

    /// Sets how much memory this server may use beside the one before.
    fn share_memory(&self, subject: &Subject) {
        if self.after.is_none() {
            subject.registry.total().set_limit(self.memory.saturating_sub(self.heard.memory));
        }
    }

    /// What the other server's requests are answered, and with which descriptors.
    pub(super) fn offer(
        &self,
        subject: &Subject,
        control: Option<&Listener>,
    ) -> Result<(Response, Vec<OwnedFd>)> {
        let control = control.filter(|_| !self.gives_way()).ok_or_else(given_way)?;
        let (mut offer, mut sockets) = subject.house.offer()?;
        offer.files.push(control.file_offer());
        let copy = control.as_fd().try_clone_to_owned();
        sockets.push(copy.map_err(|error| Error::io("Cannot share a socket", error))?);
        if sockets.len() > crate::net::rights::MOST {
            return Err(cannot("it listens on too many sockets"));
        }
        Ok((Response::json(200, &offer), sockets))
    }

    /// Gives way to the server at the other end of the bridge that comes along.
    pub(super) fn commit(
        &mut self,
        subject: &Subject,
        body: &[u8],
        files: &mut Vec<OwnedFd>,
        control: &mut Option<Listener>,
    ) -> Result<Response> {
        let Commit { drain_seconds } = parse(body)?;
        let time = drain_seconds.map(Duration::try_from_secs_f64).transpose();
        let invalid = |why| Error::new(ErrorKind::Invalid, why);
        let time = time.map_err(|_| invalid("Not a number of seconds"))?;
        let (Some(socket), true) = (files.pop(), files.is_empty()) else {
            return Err(invalid("One socket comes with this request: an end of the bridge"));
        };
        if sockopt::socket_type(&socket).ok() != Some(SocketType::SEQPACKET) {
            return Err(invalid(
                "An end of the bridge is a socket that keeps messages apart (SOCK_SEQPACKET)",
            ));
        }
        let mut listener = control.take().filter(|_| !self.gives_way()).ok_or_else(given_way)?;
        // In this order: who comes in between is passed on.
        subject.registry.give_way();
        subject.house.stop_listening();
        listener.disown();
        drop(listener);
        let total = subject.registry.total();
        let kept = total.limit().saturating_sub(total.data() + total.map()) / 2;
        let announced = subject.registry.names();
        let sessions = announced.iter().cloned().collect();
        let ends = time.and_then(|time| Instant::now().checked_add(time));
        self.after = Some(After { bridge: Some(Bridge::of(socket)), ended: None, announced, ends, kept });
        let memory = self.give_memory(subject);
        tracing::info!("Another server takes this one's place");
        Ok(Response::json(200, &Taken { sessions, memory }))
    }

    /// Lowers what this server may use, which gives way, to what it has and half of what was free; returns that, with what the
    /// server before may use.
    fn give_memory(&self, subject: &Subject) -> u64 {
        let total = subject.registry.total();
        if let Some(After { kept, .. }) = &self.after {
            total.set_limit(total.limit().min(total.data() + total.map() + kept));
        }
        total.limit() + self.heard.memory
    }

    /// From time to time: tells the server after how it is, and ends this one when it has nothing left to do.
    pub(super) fn look(&mut self, subject: &Subject) {
        if self.after.is_none() {
            return;
        }
        self.tell_gone(subject);
        let memory = self.give_memory(subject);
        let count = |count: usize| count as u64;
        let state = State {
            pid: std::process::id(),
            connections: count(subject.connections.all()),
            sessions: count(subject.registry.tally().all()),
            memory,
        };
        let Some(After { bridge, ended, ends, .. }) = &mut self.after else { return };
        let mut is_over = ends.is_some_and(|ends| ends <= Instant::now());
        match bridge {
            // It says when.
            Some(bridge) => {
                bridge.send(&Message::State(state), None);
            }
            None if ended.is_some_and(|ended| ended.elapsed() >= LATECOMERS) => {
                subject.registry.become_unreachable();
                is_over |= state.connections == 0 && state.sessions == 0;
            }
            None => {}
        }
        if is_over {
            subject.house.is_done();
        }
    }

    /// The server after hands nothing over any more. Ends this one, unless somebody has come meanwhile.
    fn released(&mut self, subject: &Subject) {
        let nobody = subject.connections.all() == 0 && subject.registry.tally().all() == 0;
        // Who has left by being handed over was put here before that.
        for outgoing in self.collected.take() {
            self.pass_client(subject, outgoing);
        }
        let waits = self.bridge(Side::After).is_some_and(|bridge| bridge.has_outgoing());
        if nobody && !waits && self.before.is_none() {
            subject.house.is_done();
        }
    }
}

fn take_in(subject: &Subject, socket: OwnedFd, agreed: Agreed, input: Vec<u8>) {
    if let Err(error) = subject.house.take_in(socket, agreed, input) {
        tracing::warn!(%error, "A connection of the other server was not taken over");
    }
}

fn given_way() -> Error {
    Error::new(ErrorKind::InUse, "Another server is taking this one's place already")
}
