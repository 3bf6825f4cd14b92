//! How the bytes of one connection move between its socket and its worker's buffers; what they mean is no matter here.
//!
//! ```text
//!   socket ──────────────────────────> input, and payload in its place
//!   Output ── one call, not copied ──> socket
//!   doubtful: what was read on and kept stands in for the socket until it is used up
//! ```

use super::hold::{Hold, Verdict};
use crate::cow::Device;
use crate::limits::{INPUT_AHEAD_BYTES as AHEAD, INPUT_BYTES as BUFFER};
use crate::net::Stream;
use crate::overlay::Magazine;
use crate::sys::{self, KernelSpanMut, MAX_SPANS};
use crate::transmission::{Flushed, Output, Transmission};
use arrayvec::ArrayVec;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

/// Bytes that are received at a time when a large payload is expected behind the next header.
const SMALL_BUFFER: usize = 4 << 10;

/// The part of a worker's buffer that holds input of the connection at hand.
pub(super) struct Input<'a> {
    buffer: &'a mut [u8],
    start: usize,
    end: usize,
}

impl<'a> Input<'a> {
    /// Input in `buffer`, of [`BUFFER`] bytes, that begins with what was left over before.
    pub(super) fn new(buffer: &'a mut [u8], rest: &[u8]) -> Self {
        buffer[..rest.len()].copy_from_slice(rest);
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
}

/// What came of an attempt to receive.
pub(super) enum Received {
    /// The client sends no more.
    End,
    /// Something; if the room was filled, there may be more.
    Some { filled: bool },
}

/// The two ends of a connection: its socket, and what stands in for it.
#[derive(Debug)]
pub(super) struct Wire {
    stream: Arc<Stream>,
    /// What arrived while it was not known whether the client is still there; acted on before anything newer.
    hold: Option<Box<Hold>>,
    /// The client sends no more.
    ended: bool,
}

impl Wire {
    pub(super) fn new(stream: Stream) -> Self {
        Self { stream: Arc::new(stream), hold: None, ended: false }
    }

    pub(super) fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Whether something that was received and kept is still to be acted on.
    pub(super) fn holds(&self) -> bool {
        self.hold.is_some()
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
    ) -> io::Result<Flushed> {
        if output.is_empty() {
            return Ok(Flushed::All);
        }
        output.flush(self.stream.as_fd(), device, magazine)
    }

    /// Receives payload to its place, and whatever comes behind it into the buffer.
    pub(super) fn receive(
        &mut self,
        input: &mut Input<'_>,
        mut transmission: Option<&mut Transmission>,
    ) -> io::Result<Received> {
        input.make_room();
        let end = input.end;
        if let Some(hold) = &mut self.hold {
            let count = hold.give(&mut input.buffer[end..]);
            input.end += count;
            if hold.is_spent() {
                self.hold = None;
            }
            if count > 0 {
                return Ok(Received::Some { filled: true });
            }
        }
        if self.ended {
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
        let count = sys::receive(self.stream.as_fd(), &mut spans)?;
        drop(spans);
        if let Some(transmission) = transmission {
            transmission.payload_received(count.min(payload) as u64);
        }
        input.end += count.saturating_sub(payload);
        Ok(if count == 0 { Received::End } else { Received::Some { filled: count == payload + room - end } })
    }

    /// Takes some input, without acting on it, from a client that does not take its replies: many a client sends all its
    /// requests before it reads the first reply. Returns whether more may be taken.
    pub(super) fn read_ahead(&mut self, input: &mut Input<'_>) -> bool {
        input.make_room();
        let end = input.end;
        if self.ended || self.hold.is_some() || end >= AHEAD {
            return false;
        }
        match sys::receive(self.stream.as_fd(), &mut [KernelSpanMut::new(&mut input.buffer[end..AHEAD])]) {
            Ok(0) => self.ended = true,
            Ok(count) => input.end += count,
            // What is wrong with the connection is told by the next attempt to send.
            Err(_) => {}
        }
        !self.ended && input.end < AHEAD
    }

    /// Reads on without acting, to find out whether the client is still there. `renewed` says that the doubt is a new
    /// one; `of_all` counts what all connections keep.
    pub(super) fn read_on(&mut self, renewed: bool, of_all: &Arc<AtomicUsize>) -> Verdict {
        let hold = self.hold.get_or_insert_with(|| Box::new(Hold::new(Arc::clone(of_all))));
        if renewed {
            hold.renew();
        }
        hold.read_on(self.stream.as_fd())
    }
}
