//! How the bytes of one connection move between its socket and its worker's buffers; what they mean is no matter here.
//!
//! ```text
//!   plain   socket ──────────────────────────> input, and payload in its place
//!           Output ── one call, not copied ──> socket
//!   TLS     socket ──> records ── open ──────> input                                (see `sealed`)
//!           Output ── gather ── seal ── records ──> socket
//!   doubtful: what was read on and kept stands in for the socket until it is used up
//! ```
//!
//! A kernel that seals by itself (kTLS) would be a third way, and one that needs nothing new here: once keys are agreed
//! on they are given to the socket, and the connection goes on as a plain one.

use super::hold::{Hold, Verdict};
use super::sealed::{Scratch, Sealed};
use crate::cow::Device;
use crate::limits::{INPUT_AHEAD_BYTES as AHEAD, INPUT_BYTES as BUFFER};
use crate::net::Stream;
use crate::net::tls::{ServerTls, Trouble};
use crate::overlay::Magazine;
use crate::sys::{self, Buffer, KernelSpanMut, MAX_SPANS};
use crate::transmission::{Flushed, Output, Transmission};
use arrayvec::ArrayVec;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

/// Bytes that are received at a time when a large payload is expected behind the next header.
const SMALL_BUFFER: usize = 4 << 10;
/// Receives in a row before others have a turn.
const ROUNDS: usize = 4;
/// The same over TLS, where each costs many times as much.
const SEALED_ROUNDS: usize = 2;

/// The part of a worker's buffer that holds input of the connection at hand.
pub(super) struct Input<'a> {
    buffer: &'a mut Buffer,
    start: usize,
    end: usize,
}

impl<'a> Input<'a> {
    /// Input in `buffer`, of [`BUFFER`] bytes, that begins with what was left over before.
    pub(super) fn new(buffer: &'a mut Buffer, rest: &[u8]) -> Self {
        buffer[..rest.len()].copy_from_slice(rest);
        buffer.note_used(rest.len());
        Self { buffer, start: 0, end: rest.len() }
    }

    /// What arrived and was not used.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Notes that the first `count` bytes were used.
    pub(super) fn take(&mut self, count: usize) {
        self.start += count;
    }

    /// Moves what is left to the front, to make room behind it.
    fn make_room(&mut self) {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
    }

    /// The room up to `most` bytes of input in all.
    pub(super) fn room(&mut self, most: usize) -> &mut [u8] {
        // How much of it will be written to is not known in every case.
        self.buffer.note_used(most);
        &mut self.buffer[self.end..most.max(self.end)]
    }

    /// Notes that the first `count` bytes of the room were filled.
    pub(super) fn fill(&mut self, count: usize) {
        self.end += count;
        self.buffer.note_used(self.end);
    }
}

/// What came of an attempt to receive.
pub(super) enum Received {
    /// The client sends no more.
    End,
    /// So many bytes; if the room was filled, there may be more.
    Some { filled: bool, bytes: u64 },
}

/// Where bytes come from: a socket, and what stands in for it.
#[derive(Debug)]
pub(super) struct Intake {
    pub(super) stream: Arc<Stream>,
    /// What arrived while it was not known whether the client is still there; acted on before anything newer.
    hold: Option<Box<Hold>>,
    /// The client sends no more.
    pub(super) ended: bool,
}

impl Intake {
    /// What was kept, if there is any: how many bytes of `buffer` it filled.
    fn take_held(&mut self, buffer: &mut [u8]) -> usize {
        let Some(hold) = &mut self.hold else { return 0 };
        let count = hold.give(buffer);
        if hold.is_spent() {
            self.hold = None;
        }
        count
    }

    /// What was kept, else what has arrived; 0 at the end.
    pub(super) fn take(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.take_held(buffer) {
            0 if self.ended => Ok(0),
            0 => sys::receive(self.stream.as_fd(), &mut [KernelSpanMut::new(buffer)]),
            count => Ok(count),
        }
    }
}

/// A connection's way to its client.
#[derive(Debug)]
pub(super) struct Wire {
    intake: Intake,
    /// Over TLS.
    sealed: Option<Box<Sealed>>,
}

impl Wire {
    pub(super) fn new(stream: Stream) -> Self {
        let intake = Intake { stream: Arc::new(stream), hold: None, ended: false };
        Self { intake, sealed: None }
    }

    pub(super) fn stream(&self) -> &Arc<Stream> {
        &self.intake.stream
    }

    /// Whether something that was received and kept is still to be acted on.
    pub(super) fn holds(&self) -> bool {
        self.intake.hold.is_some()
    }

    /// Bytes that are on this side of the socket, beside those in the input, and may be part of a request.
    pub(super) fn begun(&self) -> usize {
        self.sealed.as_ref().map_or(0, |sealed| sealed.begun())
    }

    /// Whether something is still to be sent, beside the output.
    pub(super) fn has_unsent(&self) -> bool {
        self.sealed.as_ref().is_some_and(|sealed| sealed.has_unsent())
    }

    /// Begins TLS, all output being sent. What is in `input` came before that, and is for TLS to make something of.
    ///
    /// # Errors
    /// TLS cannot be had.
    pub(super) fn secure(&mut self, tls: &ServerTls, input: &mut Input<'_>) -> Result<(), Trouble> {
        self.sealed = Some(Box::new(Sealed::new(tls, input.bytes())?));
        input.take(input.bytes().len());
        Ok(())
    }

    /// Whether TLS has begun and keys are not agreed on yet.
    pub(super) fn is_securing(&self) -> bool {
        self.sealed.as_ref().is_some_and(|sealed| sealed.is_handshaking())
    }

    /// Says that no more will be sent, if there is a way to say so.
    pub(super) fn say_goodbye(&mut self) {
        if let Some(sealed) = &mut self.sealed {
            sealed.say_goodbye(&self.intake.stream);
        }
    }

    /// Receives in a row before others have a turn.
    pub(super) fn rounds(&self) -> usize {
        if self.sealed.is_some() { SEALED_ROUNDS } else { ROUNDS }
    }

    /// Sends as much of `output` as the socket takes.
    ///
    /// # Errors
    /// As [`Output::flush`].
    pub(super) fn flush(
        &mut self,
        output: &mut Output,
        device: Option<&Device>,
        magazine: &mut Magazine,
        scratch: &mut Scratch,
    ) -> io::Result<Flushed> {
        match &mut self.sealed {
            Some(sealed) => sealed.flush(&self.intake.stream, output, device, magazine, scratch),
            None if output.is_empty() => Ok(Flushed::All),
            None => output.flush(self.intake.stream.as_fd(), device, magazine, scratch.plain()),
        }
    }

    /// Receives payload to its place, and whatever comes behind it into the buffer.
    pub(super) fn receive(
        &mut self,
        input: &mut Input<'_>,
        mut transmission: Option<&mut Transmission>,
        scratch: &mut Scratch,
    ) -> io::Result<Received> {
        input.make_room();
        if let Some(sealed) = &mut self.sealed {
            return sealed.receive(&mut self.intake, input, BUFFER, scratch);
        }
        let end = input.end;
        let count = self.intake.take_held(&mut input.buffer[end..]);
        if count > 0 {
            input.fill(count);
            return Ok(Received::Some { filled: true, bytes: count as u64 });
        }
        if self.intake.ended {
            return Ok(Received::End);
        }
        let mut spans = ArrayVec::<KernelSpanMut<'_>, MAX_SPANS>::new();
        let mut room = BUFFER;
        if let Some(transmission) = &mut transmission {
            if transmission.prefers_small_input() {
                room = SMALL_BUFFER.max(end + 1).min(BUFFER);
            }
            spans.extend(transmission.payload_spans().take(MAX_SPANS - 1));
        }
        let payload = spans.iter().map(KernelSpanMut::len).sum::<usize>();
        spans.push(KernelSpanMut::new(&mut input.buffer[end..room]));
        let count = sys::receive(self.intake.stream.as_fd(), &mut spans)?;
        drop(spans);
        if let Some(transmission) = transmission {
            transmission.payload_received(count.min(payload) as u64);
        }
        input.fill(count.saturating_sub(payload));
        let filled = count == payload + room - end;
        Ok(if count == 0 { Received::End } else { Received::Some { filled, bytes: count as u64 } })
    }

    /// Takes some input, without acting on it, from a client that does not take its replies: many a client sends all its
    /// requests before it reads the first reply. Returns whether more may be taken.
    ///
    /// # Errors
    /// When what came is no TLS. What else is wrong with the connection is told by the next attempt to send.
    pub(super) fn read_ahead(&mut self, input: &mut Input<'_>, scratch: &mut Scratch) -> io::Result<bool> {
        input.make_room();
        if self.intake.ended || self.intake.hold.is_some() || input.end + self.begun() >= AHEAD {
            return Ok(false);
        }
        let received = match &mut self.sealed {
            Some(sealed) => sealed.receive(&mut self.intake, input, AHEAD, scratch),
            None => self.intake.take(input.room(AHEAD)).map(|count| {
                input.fill(count);
                if count == 0 { Received::End } else { Received::Some { filled: false, bytes: count as u64 } }
            }),
        };
        match received {
            Ok(Received::End) => self.intake.ended = true,
            Ok(Received::Some { .. }) => {}
            Err(error) if Trouble::behind(&error).is_some() => return Err(error),
            Err(_) => {}
        }
        Ok(!self.intake.ended && input.end + self.begun() < AHEAD)
    }

    /// Reads on without acting, to find out whether the client is still there. `renewed` says that the doubt is a new
    /// one; `of_all` counts what all connections keep.
    pub(super) fn read_on(&mut self, renewed: bool, of_all: &Arc<AtomicUsize>) -> Verdict {
        let hold = self.intake.hold.get_or_insert_with(|| Box::new(Hold::new(Arc::clone(of_all))));
        if renewed {
            hold.renew();
        }
        hold.read_on(self.intake.stream.as_fd())
    }
}
