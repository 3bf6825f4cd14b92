//! One connection: what arrived and was not used, what is to be sent, and the phase it is in.
//!
//! A connection costs little while it is idle: it receives into its worker's buffer and borrows its worker's queue for
//! replies, and keeps what is left over, which for a client that behaves is nothing.

use super::Shared;
use super::environment::Exports;
use super::hold::Verdict;
use super::payload_memory::Buffers;
use super::sealed::Scratch;
use super::wire::{Input, Received, Wire};
use crate::cow::{Device, Piece};
use crate::handshake::{Agreed, Handshake, Progress, Side};
use crate::net::Stream;
use crate::net::tls::Trouble;
use crate::overlay::Magazine;
use crate::session::Turn;
use crate::sys::Buffer;
use crate::takeover::Outgoing;
use crate::transmission::{Context, Flushed, Output, Pause, Share, Transmission, Warm};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;
use zeroize::Zeroizing;

/// Bytes of replies that take so long to send that more input has often come meanwhile: it is worth a look before the event
/// loop's.
const MANY: u64 = 16 << 10;

/// What a worker lends to the connection that it drives.
#[derive(Debug)]
pub(super) struct Tools {
    pub(super) buffer: Buffer,
    pub(super) magazine: Magazine,
    pub(super) orders: Vec<Warm>,
    pub(super) pieces: Vec<Piece>,
    pub(super) output: Output,
    pub(super) scratch: Scratch,
    /// When the events of this turn were seen.
    pub(super) now: Instant,
    /// What a connection may do in its turn.
    pub(super) share: Share,
}

impl Tools {
    pub(super) fn new(magazine: Magazine, buffers: Buffers) -> Self {
        let Buffers { input, records, plain } = buffers;
        Self {
            buffer: input,
            magazine,
            orders: Vec::new(),
            pieces: Vec::new(),
            output: Output::default(),
            scratch: Scratch::new(records, plain),
            now: Instant::now(),
            share: Share::ALL,
        }
    }

    /// Wipes the buffers: whoever's payload passed through them may be gone.
    pub(super) fn wipe(&mut self) {
        self.buffer.wipe();
        self.scratch.wipe();
    }
}

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Input.
    Readable,
    /// Room for output.
    Writable,
    /// Room for output; meanwhile, some input is taken.
    WritableOrReadable,
    /// Its next turn: it has work.
    Again,
    /// Base pages.
    Warmed,
    /// The time when its session may be asked for more.
    Paced,
    /// Input, or that none comes for a while.
    Certainty,
    /// Nothing any more.
    Close,
}

/// Why acting on input stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    At(Pause),
    /// What is queued goes out as it is, and then TLS begins.
    Upgrade,
    /// What is queued goes out as it is, and then the connection goes to another server.
    Pass,
    /// It may not go on before it is known whether the client is still there.
    Doubtful,
}

#[derive(Debug)]
enum Phase {
    Handshake(Box<Handshake>),
    /// The client was told to begin TLS. Once that is sent, the handshake goes on over TLS.
    Upgrade(Box<Handshake>),
    Transmission(Box<Transmission>),
    /// What is queued is still sent, and then the connection handed over.
    Passing(Box<Passing>),
    /// What is queued is still sent.
    Closing,
}

/// A connection that belongs to another server.
#[derive(Debug)]
struct Passing {
    side: Side,
    agreed: Agreed,
    option: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct Connection {
    wire: Wire,
    phase: Phase,
    rest: Zeroizing<Vec<u8>>,
    output: Output,
    /// What the event loop was last told to wait for.
    pub(super) waits_for: Next,
    /// When its next request may go, if it waits for that.
    pub(super) paced_until: Option<Instant>,
    /// When the event loop is going to look at it again for that.
    pub(super) timer: Option<Instant>,
    /// Whether the event loop is going to look at it again for certainty.
    pub(super) is_doubted: bool,
    /// Whether it is on the list of the rounds.
    pub(super) is_in_rounds: bool,
    /// Whether the socket has taken all output at some moment since this was last asked.
    took_all: bool,
    /// What is wrong with it is in the log.
    is_told_of: bool,
}

/// What a worker lent for this turn.
struct Lent<'a> {
    input: Input<'a>,
    magazine: &'a mut Magazine,
    orders: &'a mut Vec<Warm>,
    pieces: &'a mut Vec<Piece>,
    scratch: &'a mut Scratch,
    shared: &'a Shared,
    /// When the input had arrived, or later, if something was done since.
    now: Instant,
    share: Share,
    /// Bytes that came and went in this turn.
    moved: u64,
}

impl Connection {
    pub(super) fn new(stream: Stream, shared: &Shared) -> Self {
        let handshake = Handshake::new(shared.knobs);
        let mut output = Output::default();
        output.put(&handshake.greeting());
        Self { output, ..Self::resumed(stream, Box::new(handshake), Vec::new()) }
    }

    /// One that another server has begun the handshake with, and what it has sent since.
    pub(super) fn resumed(stream: Stream, handshake: Box<Handshake>, input: Vec<u8>) -> Self {
        Self {
            wire: Wire::new(stream),
            phase: Phase::Handshake(handshake),
            rest: Zeroizing::new(input),
            output: Output::default(),
            waits_for: Next::Readable,
            paced_until: None,
            timer: None,
            is_doubted: false,
            is_in_rounds: false,
            took_all: false,
            is_told_of: false,
        }
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.wire.stream().as_fd()
    }

    /// Whether the transmission phase has not begun, or never will.
    pub(super) fn is_before_transmission(&self) -> bool {
        !matches!(self.phase, Phase::Transmission(_))
    }

    pub(super) fn peer(&self) -> &crate::net::Peer {
        self.wire.stream().peer()
    }

    pub(super) fn stream(&self) -> &Stream {
        self.wire.stream()
    }

    /// Whether there is something that the socket has not taken.
    pub(super) fn has_output(&self) -> bool {
        !self.output.is_empty() || self.wire.has_unsent()
    }

    /// Whether its client may have something to take that it has not taken. Over TCP what was sent may be underway.
    pub(super) fn may_be_unread(&self) -> bool {
        self.has_output() || self.stream().is_tcp()
    }

    /// Whether there has been output all the time since this was last asked.
    pub(super) fn has_been_unread(&mut self) -> bool {
        !std::mem::take(&mut self.took_all) && self.has_output()
    }

    /// Notes that base pages came.
    pub(super) fn warmed(&mut self, ticket: u64, readable: bool) {
        if let Phase::Transmission(transmission) = &mut self.phase {
            transmission.warmed(ticket, readable);
        }
    }

    /// Does what can be done now.
    pub(super) fn drive(&mut self, tools: &mut Tools, shared: &Shared) -> Next {
        let lends_output = self.output.is_empty();
        if lends_output {
            std::mem::swap(&mut self.output, &mut tools.output);
        }
        let Tools { buffer, magazine, orders, pieces, output: idle, scratch, now, share } = tools;
        let input = Input::new(buffer, &self.rest);
        self.rest.clear();
        let mut lent =
            Lent { input, magazine, orders, pieces, scratch, shared, now: *now, share: *share, moved: 0 };
        self.set_in_request(true);
        self.paced_until = None;
        let next = self.work(&mut lent);
        if next != Next::Close {
            self.rest.extend_from_slice(lent.input.bytes());
            if self.rest.is_empty() {
                self.rest = Zeroizing::default();
            }
            self.set_in_request(false);
        }
        if self.output.is_empty() {
            self.output.clear(device(&self.phase), magazine);
            if lends_output {
                std::mem::swap(&mut self.output, idle);
            } else {
                self.output = Output::default();
            }
        }
        next
    }

    /// Tells the session whether part of a request is, or may come to be, in the worker's hands.
    fn set_in_request(&self, may_receive: bool) {
        if let Phase::Transmission(transmission) = &self.phase {
            let has_some = !self.rest.is_empty() || self.wire.begun() > 0;
            let in_request = may_receive || has_some || transmission.in_payload();
            transmission.attachment().line().set_in_request(in_request);
        }
    }

    fn work(&mut self, lent: &mut Lent<'_>) -> Next {
        // Replies that a client did not take come before anything that could make more of them.
        match self.flush(lent) {
            Ok(Flushed::All) => {}
            Ok(Flushed::Blocked) => return self.read_ahead(lent),
            Err(error) => return self.lost(&error, lent.shared),
        }
        let mut may_have_more = true;
        for _ in 0..self.wire.rounds() {
            let stop = self.act(lent);
            let replies = self.output.queued();
            lent.moved += replies;
            match self.flush(lent) {
                Ok(Flushed::All) => {}
                Ok(Flushed::Blocked) => return self.read_ahead(lent),
                Err(error) => return self.lost(&error, lent.shared),
            }
            match stop {
                Stop::At(Pause::Output) if lent.moved < lent.share.bytes => continue,
                Stop::At(Pause::Output) => return Next::Again,
                Stop::At(Pause::Input) => may_have_more |= replies >= MANY,
                Stop::At(Pause::Turn) => return Next::Again,
                Stop::At(Pause::Waiting) => return Next::Warmed,
                Stop::At(Pause::Paced(until)) => {
                    self.paced_until = Some(until);
                    return Next::Paced;
                }
                Stop::At(Pause::Over) => {
                    self.wire.say_goodbye();
                    return Next::Close;
                }
                Stop::Upgrade => {
                    if let Err(error) = self.upgrade(lent) {
                        return self.lost(&error, lent.shared);
                    }
                    may_have_more = true;
                }
                Stop::Pass => {
                    self.pass(lent);
                    return Next::Close;
                }
                Stop::Doubtful => match self.read_on(lent.shared) {
                    Verdict::There => continue,
                    Verdict::Gone => return Next::Close,
                    Verdict::Unknown => return Next::Certainty,
                },
            }
            if !may_have_more && !self.wire.holds() {
                return Next::Readable;
            }
            if lent.moved >= lent.share.bytes {
                return Next::Again;
            }
            let transmission = match &mut self.phase {
                Phase::Transmission(transmission) => Some(&mut **transmission),
                Phase::Handshake(_) | Phase::Upgrade(_) | Phase::Passing(_) | Phase::Closing => None,
            };
            match self.wire.receive(&mut lent.input, transmission, lent.scratch) {
                Ok(Received::End) => match &mut self.phase {
                    Phase::Transmission(transmission) => transmission.end_of_input(lent.magazine),
                    Phase::Handshake(_) | Phase::Upgrade(_) | Phase::Passing(_) | Phase::Closing => {
                        return Next::Close;
                    }
                },
                Ok(Received::Some { filled, bytes }) => {
                    may_have_more = filled;
                    lent.moved += bytes;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Next::Readable,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => return Next::Again,
                Err(error) => return self.lost(&error, lent.shared),
            }
        }
        Next::Again
    }

    fn lost(&mut self, error: &io::Error, shared: &Shared) -> Next {
        let peer = self.wire.stream().peer();
        match Trouble::behind(error) {
            Some(trouble) => {
                shared.lines.not_let_in.say(|omitted| {
                    tracing::warn!(%peer, omitted, "TLS with a client failed: {trouble}");
                });
                self.is_told_of = true;
            }
            None => tracing::debug!(%peer, %error, "connection lost"),
        }
        Next::Close
    }

    /// Acts on the input.
    fn act(&mut self, lent: &mut Lent<'_>) -> Stop {
        let Lent { input, magazine, orders, pieces, shared, now, share, .. } = lent;
        if let Phase::Handshake(handshake) = &mut self.phase {
            let first = handshake.first().map(str::to_owned);
            let exports = Exports { shared, stream: self.wire.stream(), first: first.as_deref() };
            let mut replies = Vec::new();
            let (used, progress) = handshake.receive(&exports, input.bytes(), &mut replies);
            input.take(used);
            self.output.put(&replies);
            match progress {
                Progress::More => return Stop::At(Pause::Input),
                Progress::StartTls => {
                    if let Phase::Handshake(handshake) = std::mem::replace(&mut self.phase, Phase::Closing) {
                        self.phase = Phase::Upgrade(handshake);
                    }
                }
                Progress::Elsewhere { side, mut agreed, option } => {
                    agreed.first.get_or_insert_with(|| shared.registry.first().to_owned());
                    tracing::debug!(peer = %self.wire.stream().peer(), ?side, "it is another server's");
                    self.phase = Phase::Passing(Box::new(Passing { side, agreed, option }));
                }
                Progress::Closed => {
                    self.tell_of_handshake(shared);
                    self.phase = Phase::Closing;
                }
                Progress::Ready { export, info, negotiated } => {
                    tracing::debug!(peer = %self.wire.stream().peer(), export = info.name, "transmission begins");
                    let transmission = Transmission::new(export, negotiated)
                        .with_most_requests(shared.limits.requests_in_flight);
                    self.phase = Phase::Transmission(Box::new(transmission));
                }
            }
        }
        let transmission = match &mut self.phase {
            Phase::Transmission(transmission) => transmission,
            Phase::Upgrade(_) => return Stop::Upgrade,
            Phase::Passing(_) => return Stop::Pass,
            Phase::Handshake(_) | Phase::Closing => return Stop::At(Pause::Over),
        };
        let line = Arc::clone(transmission.attachment().line());
        let _turn = match line.turn() {
            Turn::Granted(turn) => turn,
            Turn::Doubtful => return Stop::Doubtful,
            Turn::Fenced => {
                tracing::debug!(peer = %self.wire.stream().peer(), "client is gone, and its session was attached again");
                return Stop::At(Pause::Over);
            }
        };
        self.output.begin(*now);
        let mut cx = Context { magazine, output: &mut self.output, orders, pieces, share: *share };
        let (used, pause) = transmission.consume(input.bytes(), &mut cx);
        input.take(used);
        Stop::At(pause)
    }

    fn flush(&mut self, lent: &mut Lent<'_>) -> io::Result<Flushed> {
        let device = device(&self.phase);
        let flushed = self.wire.flush(&mut self.output, device, lent.magazine, lent.scratch);
        if let Phase::Transmission(transmission) = &self.phase
            && let Some(now) = transmission.account(&mut self.output)
        {
            lent.now = now;
        }
        let flushed = flushed?;
        if flushed == Flushed::All {
            self.took_all = true;
        }
        Ok(flushed)
    }

    /// Begins TLS, now that everything before it is sent.
    fn upgrade(&mut self, lent: &mut Lent<'_>) -> io::Result<()> {
        let tls = lent.shared.tls.as_ref().ok_or_else(|| io::Error::other("There is no TLS to begin"))?;
        self.wire.secure(tls, &mut lent.input)?;
        if let Phase::Upgrade(handshake) = std::mem::replace(&mut self.phase, Phase::Closing) {
            self.phase = Phase::Handshake(handshake);
        }
        Ok(())
    }

    /// Hands the connection over, now that everything before it is sent.
    fn pass(&mut self, lent: &mut Lent<'_>) {
        let Phase::Passing(passing) = std::mem::replace(&mut self.phase, Phase::Closing) else { return };
        let Passing { side, agreed, option: mut input } = *passing;
        input.extend_from_slice(lent.input.bytes());
        match rustix::io::fcntl_dupfd_cloexec(self.wire.stream(), 0) {
            Ok(socket) => lent.shared.outbox.put(Outgoing { side, agreed, input, socket }),
            Err(error) => {
                tracing::warn!(%error, "cannot hand over a connection; raise ulimit -n if this goes on")
            }
        }
    }

    /// Says what became of a handshake that came to nothing.
    fn tell_of_handshake(&mut self, shared: &Shared) {
        let Phase::Handshake(handshake) = &self.phase else { return };
        let peer = self.wire.stream().peer();
        if let Some(reason) = handshake.close_reason() {
            tracing::debug!(%peer, %reason, "handshake ended");
        }
        let why = if handshake.wanted_plain_text() {
            "A client was refused: it speaks plain text, and TLS is demanded"
        } else if self.wire.is_securing() {
            "A client did not finish the TLS handshake; perhaps it does not trust this server's certificate"
        } else if handshake.is_silent_over_tls() {
            "A client left after the TLS handshake; perhaps it does not trust this server's certificate"
        } else {
            return;
        };
        if !self.is_told_of {
            shared.lines.not_let_in.say(|omitted| tracing::warn!(%peer, omitted, "{why}"));
        }
    }

    /// Reads on without acting, to find out whether the client is still there.
    fn read_on(&mut self, shared: &Shared) -> Verdict {
        let Phase::Transmission(transmission) = &self.phase else { return Verdict::There };
        let verdict = self.wire.read_on(self.waits_for != Next::Certainty, &shared.held);
        if verdict == Verdict::There {
            transmission.attachment().line().vouch();
        }
        verdict
    }

    fn read_ahead(&mut self, lent: &mut Lent<'_>) -> Next {
        match self.wire.read_ahead(&mut lent.input, lent.scratch) {
            Ok(true) => Next::WritableOrReadable,
            Ok(false) => Next::Writable,
            Err(error) => self.lost(&error, lent.shared),
        }
    }

    /// Gives back what it holds. What was not acted on never happened.
    pub(super) fn close(mut self, magazine: &mut Magazine, shared: &Shared) {
        self.tell_of_handshake(shared);
        self.output.clear(device(&self.phase), magazine);
        if let Phase::Transmission(transmission) = &mut self.phase {
            transmission.close(magazine);
        }
    }
}

fn device(phase: &Phase) -> Option<&Device> {
    match phase {
        Phase::Transmission(transmission) => Some(transmission.attachment().session().device()),
        Phase::Handshake(_) | Phase::Upgrade(_) | Phase::Passing(_) | Phase::Closing => None,
    }
}
