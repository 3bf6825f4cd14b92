//! The control thread: a few clients at a time, each with a few kilobytes, and none that can keep the others waiting.

use super::Subject;
use super::held::Held;
use super::http::{self, CONTINUE, Head, MOST_BODY, MOST_HEAD, Response};
use super::routes::{self, Asker};
use super::succession::{Passed, Succession};
use crate::error::{self, Error, Result};
use crate::net::{Listener, PeerKind, Stream, rights};
use crate::session::{Found, Registry};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Clients at a time. One more takes the place of the one that has been idle for longest, or waits.
pub const MOST_CLIENTS: usize = 64;

/// Of these, so many may hold sessions, and are not sent away then.
const MOST_HOLDERS: usize = MOST_CLIENTS / 2;

/// Descriptors that may come with a request.
const MOST_FILES: usize = 4;

/// How long a request may take to arrive, from its first byte to its last.
const REQUEST: Duration = Duration::from_secs(10);
/// How long a client may be idle between requests.
const IDLE: Duration = Duration::from_secs(60);
/// How long a client may take nothing of a response.
const RESPONSE: Duration = Duration::from_secs(10);
/// How long to wait for the end of a client that was sent away, so that it sees why before it sees the end.
const FAREWELL: Duration = Duration::from_secs(2);
/// How much is thrown away of what it sends meanwhile.
const FAREWELL_BYTES: usize = 1 << 20;

/// How often what sessions did is sampled,
const SAMPLING: Duration = Duration::from_secs(1);
/// unless that takes more than one part in so many of the time: then it is done less often.
const SAMPLING_SHARE: u32 = 100;

/// When a listener cannot accept (out of descriptors), so long until it is tried again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Tells the control thread to end.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<OwnedFd>);

/// What tells the control thread to end.
///
/// # Errors
/// The system has no descriptor for it.
pub fn stopper() -> Result<Stopper> {
    let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|error| Error::io("Cannot make an eventfd", error).advise("raise ulimit -n"))?;
    Ok(Stopper(Arc::new(bell)))
}

impl Stopper {
    /// Tells it.
    pub fn stop(&self) {
        #[allow(clippy::disallowed_methods, reason = "an eventfd counts in the host's byte order")]
        let one = 1_u64.to_ne_bytes();
        // It fails only when the counter is full: it was told often enough.
        let _ = rustix::io::write(&*self.0, &one);
    }
}

/// Answers control clients on `listener`, until `stopper` says so. The socket's file is gone when it returns.
///
/// When the server has given way to another one, that one listens.
pub fn serve(listener: Listener, subject: &Subject, succession: Succession, stopper: &Stopper) {
    let mut doors = Doors { listener: Some(listener), succession };
    let mut clients: Vec<Client> = Vec::new();
    let mut accepts_again: Option<Instant> = None;
    let mut sampled = Instant::now();
    loop {
        let now = Instant::now();
        if now >= sampled {
            subject.registry.sessions().iter().for_each(|Found { session, .. }| session.sample());
            doors.succession.look(subject);
            sampled = now + SAMPLING.max(now.elapsed() * SAMPLING_SHARE);
        }
        clients.retain(|client| client.deadline.is_none_or(|deadline| deadline > now));
        let has_room = clients.len() < MOST_CLIENTS || clients.iter().any(Client::is_idle);
        accepts_again = accepts_again.filter(|again| *again > now);
        let listens = has_room && accepts_again.is_none();
        let others = accepts_again.into_iter().chain(doors.succession.deadline());
        let deadline = clients.iter().filter_map(|client| client.deadline).chain(others).min();
        let timeout = deadline.map_or(sampled, |deadline| deadline.min(sampled));
        let timeout = timeout.saturating_duration_since(now) + Duration::from_millis(1);

        let listener = doors.listener.as_ref().filter(|_| listens);
        let mut fds = vec![PollFd::new(&*stopper.0, PollFlags::IN)];
        fds.extend(listener.map(|listener| PollFd::new(listener, PollFlags::IN)));
        let (first_watched, watched) = (fds.len(), doors.succession.watched());
        let first_client = first_watched + watched.len();
        fds.extend(watched);
        fds.extend(clients.iter().map(|client| PollFd::new(&client.stream, client.waits_for())));
        match poll(&mut fds, Timespec::try_from(timeout).ok().as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return tracing::error!(%error, "the control socket cannot be watched"),
        }
        let seen: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        drop(fds);
        if !seen[0].is_empty() {
            return;
        }
        let mut events = seen[first_client..].iter();
        let mut holders = clients.iter().filter(|client| !client.held.is_empty()).count();
        clients.retain_mut(|client| match events.next() {
            Some(seen) if !seen.is_empty() => {
                let held_before = !client.held.is_empty();
                client.held.set_room(holders < MOST_HOLDERS);
                let stays = client.drive(subject, &mut doors);
                holders += usize::from(!client.held.is_empty());
                holders -= usize::from(held_before);
                stays
            }
            _ => true,
        });
        if seen[first_watched..first_client].iter().any(|seen| !seen.is_empty()) {
            for Passed { stream, input, first } in doors.succession.act(subject) {
                make_room(&mut clients);
                let mut client = Client::new(stream, &subject.registry);
                (client.input, client.first) = (input, first);
                if client.go_on(subject, &mut doors) {
                    clients.push(client);
                }
            }
        }
        let listener = doors.listener.as_ref();
        if let Some(listener) = listener.filter(|_| first_watched == 2 && !seen[1].is_empty()) {
            match listener.accept() {
                Ok(None) => {}
                Ok(Some(stream)) => {
                    make_room(&mut clients);
                    clients.push(Client::new(stream, &subject.registry));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a control client; raise ulimit -n if this goes on");
                    accepts_again = Some(now + ACCEPT_PAUSE);
                }
            }
        }
    }
}

/// Where control clients come in, and where some are passed on to.
struct Doors {
    /// `None` when another server has taken this one's place.
    listener: Option<Listener>,
    succession: Succession,
}

/// Hangs up on whoever has been idle for longest, if there is no room.
fn make_room(clients: &mut Vec<Client>) {
    if clients.len() < MOST_CLIENTS {
        return;
    }
    let idle = clients.iter().enumerate().filter(|(_, client)| client.is_idle());
    if let Some((index, _)) = idle.min_by_key(|(_, client)| client.deadline) {
        clients.swap_remove(index);
    }
}

/// What is going on with a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Waits for a request, or for the rest of one.
    Request,
    /// A response is on its way; then the next request, or the end.
    Response { keep_alive: bool },
    /// It was told to go: so many bytes more are thrown away.
    Farewell { bytes: usize },
}

struct Client {
    stream: Stream,
    input: Vec<u8>,
    output: Vec<u8>,
    sent: usize,
    phase: Phase,
    /// It was told to go on with the body of the request at hand.
    continued: bool,
    /// `None` between the requests of one that holds sessions: it is busy with these.
    deadline: Option<Instant>,
    held: Held,
    /// The first image where it came in, if that was at another server.
    first: Option<String>,
    /// Descriptors that came with what is in `input`.
    files: Vec<OwnedFd>,
    /// Descriptors that go with what is in `output`.
    outgoing: Vec<OwnedFd>,
}

/// What there was to do for a client.
enum Took {
    Nothing,
    Request,
    /// It is another server's client from now on.
    Leave,
}

impl Client {
    fn new(stream: Stream, registry: &Arc<Registry>) -> Self {
        let mut client = Self {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
            phase: Phase::Request,
            continued: false,
            deadline: Some(Instant::now() + REQUEST),
            held: Held::new(registry),
            first: None,
            files: Vec::new(),
            outgoing: Vec::new(),
        };
        // The socket's mode keeps others out. This holds where the mode was changed, or the socket handed on.
        let own = rustix::process::geteuid().as_raw();
        let is_admitted = match client.stream.peer().kind {
            PeerKind::Unix { uid, .. } => uid == own || uid == 0,
            _ => false,
        };
        if !is_admitted {
            let peer = client.stream.peer();
            tracing::warn!(%peer, "A control client was refused: it is neither this server's user nor root");
            let why = "Only the server's own user, and root, may control it";
            client.answer(&Response::failure(403, error::ErrorKind::Denied, why), false, false);
        }
        client
    }

    /// Whether it has nothing to ask for, nor anything to get.
    fn is_idle(&self) -> bool {
        self.phase == Phase::Request && self.input.is_empty() && self.held.is_empty()
    }

    fn waits_for(&self) -> PollFlags {
        match self.phase {
            // A response is taken before the next request is looked at.
            _ if self.sent < self.output.len() => PollFlags::OUT,
            _ => PollFlags::IN,
        }
    }

    /// Does what can be done; whether it is to stay.
    fn drive(&mut self, subject: &Subject, doors: &mut Doors) -> bool {
        if self.sent == self.output.len() && !self.receive() {
            return false;
        }
        self.go_on(subject, doors)
    }

    fn go_on(&mut self, subject: &Subject, doors: &mut Doors) -> bool {
        loop {
            if !self.send() {
                return false;
            }
            if self.sent < self.output.len() {
                return true;
            }
            match self.phase {
                Phase::Request => match self.take_request(subject, doors) {
                    Took::Nothing => return true,
                    Took::Request => {}
                    Took::Leave => return false,
                },
                Phase::Response { keep_alive: true } => {
                    self.phase = Phase::Request;
                    self.continued = false;
                    let time = match (self.input.is_empty(), self.held.is_empty()) {
                        (false, _) => Some(REQUEST),
                        (true, true) => Some(IDLE),
                        (true, false) => None,
                    };
                    self.deadline = time.map(|time| Instant::now() + time);
                }
                Phase::Response { keep_alive: false } => {
                    // Closed at once, with something of its unread, it might see that before it sees the response.
                    if rustix::net::shutdown(&self.stream, Shutdown::Write).is_err() {
                        return false;
                    }
                    self.phase = Phase::Farewell { bytes: FAREWELL_BYTES };
                    self.deadline = Some(Instant::now() + FAREWELL);
                    return true;
                }
                Phase::Farewell { .. } => return true,
            }
        }
    }

    /// Takes what has come; whether the client is still there.
    fn receive(&mut self) -> bool {
        let mut buffer = [0; 16 << 10];
        match rights::receive(&self.stream, &mut buffer, RecvFlags::DONTWAIT) {
            Ok((0, _)) => false,
            Ok((count, files)) => {
                self.files.extend(files);
                self.files.truncate(MOST_FILES);
                if let Phase::Farewell { bytes } = &mut self.phase {
                    *bytes = bytes.saturating_sub(count);
                    return *bytes > 0;
                }
                if self.input.is_empty() {
                    self.deadline = Some(Instant::now() + REQUEST);
                }
                self.input.extend_from_slice(&buffer[..count]);
                true
            }
            Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }

    /// Sends what the socket takes; whether the client is still there.
    fn send(&mut self) -> bool {
        while self.sent < self.output.len() {
            // With the first of it.
            let files: Vec<_> = self.outgoing.iter().map(AsFd::as_fd).collect();
            match rights::send(&self.stream, &self.output[self.sent..], &files, SendFlags::DONTWAIT) {
                Ok(count) => {
                    self.sent += count;
                    self.outgoing.clear();
                    self.deadline = Some(Instant::now() + RESPONSE);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        (self.output, self.sent) = (Vec::new(), 0);
        true
    }

    /// Answers the next request, if it is all there.
    fn take_request(&mut self, subject: &Subject, doors: &mut Doors) -> Took {
        // Between requests empty lines are nothing (RFC 9112, 2.2).
        let start = self.input.iter().position(|byte| !b"\r\n".contains(byte)).unwrap_or(self.input.len());
        self.input.drain(..start);
        let mut head = match http::parse(&self.input) {
            Ok(Some(head)) => head,
            Ok(None) => return Took::Nothing,
            Err(response) => {
                self.answer(&response, false, false);
                return Took::Request;
            }
        };
        let &Head { len, body, keep_alive, expects_continue, .. } = &head;
        debug_assert!(len <= MOST_HEAD && body <= MOST_BODY);
        if self.input.len() < len + body {
            if expects_continue && !std::mem::replace(&mut self.continued, true) {
                self.output.extend_from_slice(CONTINUE);
                return Took::Request;
            }
            return Took::Nothing;
        }
        let Self { stream, input, held, first, files, outgoing, .. } = self;
        if let ["v1", "sessions", ..] = head.path.iter().map(String::as_str).collect::<Vec<_>>()[..]
            && let Some(name) = head.path.get_mut(2)
        {
            *name = subject.registry.resolve(name, first.as_deref()).into_owned();
        }
        // Who holds sessions here has something to do with this server only.
        if held.is_empty()
            && let Some(side) = doors.succession.whose(subject, &head)
            && doors.succession.bridge(side).is_some()
            // What came along cannot go on; the client that asks again finds who has it to do.
            && (!files.is_empty() || doors.succession.pass_control(subject, side, stream, input, first.as_deref()))
        {
            return Took::Leave;
        }
        let content = &input[len..len + body];
        let mut asker = Asker { peer: stream.peer(), held, files, outgoing };
        let response =
            routes::respond(subject, &head, content, &mut asker, &mut doors.succession, &mut doors.listener);
        tracing::debug!(peer = %self.stream.peer(), method = head.method, path = ?head.path, status = response.status, "control");
        self.input.drain(..len + body);
        if self.input.is_empty() {
            // Whatever came with it was for it.
            self.files.clear();
        }
        self.answer(&response, keep_alive, head.method == "HEAD");
        Took::Request
    }

    fn answer(&mut self, response: &Response, keep_alive: bool, head_only: bool) {
        response.encode(&mut self.output, keep_alive, head_only);
        self.phase = Phase::Response { keep_alive };
        self.deadline = Some(Instant::now() + RESPONSE);
    }
}
