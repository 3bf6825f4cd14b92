//! The way through TLS: what a wire does with records, on buffers that its worker lends.
//!
//! ```text
//!   partial ─┐                                    ┌─> input
//!   socket ──┴─> Scratch::records ── open ────────┤
//!                                                 └─> partial (the beginning of a record) ──> next time
//!   Output ── gather ──> Scratch::plain ── seal ──> Scratch::sealed ──> socket
//!                                                       └─ what it does not take now ──> unsent
//! ```
//!
//! A connection that has nothing on its way holds none of these. One whose client does not read holds one round of
//! sealed replies, beside what any connection may hold.

use super::wire::{Input, Intake, Received};
use crate::cow::Device;
use crate::limits::{INPUT_BYTES as BUFFER, SEALED_BYTES};
use crate::net::Stream;
use crate::net::tls::{Channel, ServerTls, Trouble};
use crate::overlay::Magazine;
use crate::sys::{self, Buffer, KernelSpan};
use crate::transmission::{Flushed, Output};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

/// Bytes of records that are looked at together: beside a worker's whole buffer, the longest message of a handshake, which
/// must be kept until it is whole.
pub(super) const RECORDS: usize = BUFFER + (128 << 10);

/// Steps of handshakes that are taken before others have a turn: each may cost as much as hundreds of requests.
const HANDSHAKES_A_TURN: u32 = 4;

/// What a worker lends for TLS; takes no memory before it is used.
#[derive(Debug)]
pub(super) struct Scratch {
    records: Buffer,
    plain: Buffer,
    /// Only what is sealed is ever in it.
    sealed: Vec<u8>,
    /// Steps of handshakes that were taken in this turn.
    handshakes: u32,
}

impl Scratch {
    pub(super) fn new(records: Buffer, plain: Buffer) -> Self {
        Self { records, plain, sealed: Vec::new(), handshakes: 0 }
    }

    /// For what is to be sent in plain, and is not where it can be sent from.
    pub(super) fn plain(&mut self) -> &mut Buffer {
        &mut self.plain
    }

    /// Wipes what was in plain.
    pub(super) fn wipe(&mut self) {
        self.records.wipe();
        self.plain.wipe();
    }

    /// All connections have had their turn.
    pub(super) fn begin_turn(&mut self) {
        self.handshakes = 0;
    }
}

/// The TLS of one connection.
#[derive(Debug)]
pub(super) struct Sealed {
    channel: Channel,
    /// Records, or what has come of one, that are to be opened.
    partial: Vec<u8>,
    /// `partial` was not looked at yet.
    is_fresh: bool,
    /// Records that the socket has not taken.
    unsent: Vec<u8>,
    /// How much of `unsent` it has taken by now.
    sent: usize,
}

impl Sealed {
    pub(super) fn new(tls: &ServerTls, first: &[u8]) -> Result<Self, Trouble> {
        Ok(Self {
            channel: Channel::new(tls)?,
            partial: first.to_vec(),
            is_fresh: !first.is_empty(),
            unsent: Vec::new(),
            sent: 0,
        })
    }

    pub(super) fn is_handshaking(&self) -> bool {
        self.channel.is_handshaking()
    }

    /// Bytes of a record that has not come to its end.
    pub(super) fn begun(&self) -> usize {
        self.partial.len()
    }

    /// Whether there are records that the socket has not taken.
    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Receives records and opens them into `input`, which comes to hold `most` bytes at most.
    pub(super) fn receive(
        &mut self,
        intake: &mut Intake,
        input: &mut Input<'_>,
        most: usize,
        scratch: &mut Scratch,
    ) -> io::Result<Received> {
        if self.is_handshaking() && scratch.handshakes >= HANDSHAKES_A_TURN {
            // To be tried again.
            return Err(io::ErrorKind::Interrupted.into());
        }
        let held = self.partial.len();
        // A record is longer than what it holds, so that what is in this room can always be opened.
        let room = input.room(most).len().saturating_sub(held).min(RECORDS - held);
        let mut filled = true;
        let mut end = held;
        if !std::mem::take(&mut self.is_fresh) {
            if room == 0 {
                return Ok(Received::Some { filled: true, bytes: 0 });
            }
            match intake.take(&mut scratch.records[held..held + room])? {
                0 => return Ok(Received::End),
                count => {
                    filled = count == room;
                    end += count;
                }
            }
        }
        scratch.records.note_used(end);
        let records = &mut scratch.records[..end];
        records[..held].copy_from_slice(&self.partial);
        let was_handshaking = self.is_handshaking();
        scratch.handshakes += u32::from(was_handshaking);
        let plain = input.room(BUFFER);
        match self.channel.open(records, plain, &mut self.unsent) {
            Ok(opened) => {
                input.fill(opened.plain);
                self.partial.clear();
                self.partial.extend_from_slice(&records[opened.used..]);
                if self.partial.is_empty() || opened.ended {
                    self.partial = Vec::new();
                }
                // There may be more behind what was kept, and what ended is told next time.
                intake.ended |= opened.ended;
                if was_handshaking && !self.is_handshaking() {
                    self.introduce(intake)?;
                }
                Ok(Received::Some { filled: filled || opened.ended, bytes: opened.plain as u64 })
            }
            Err(trouble) => {
                // In good faith: the client may be gone, or not read.
                let _ = self.send(&intake.stream);
                Err(trouble.into())
            }
        }
    }

    /// Keys are agreed on: notes who the client is.
    fn introduce(&self, intake: &mut Intake) -> io::Result<()> {
        if let Some(client) = self.channel.client() {
            // Nobody else has it before there is a session.
            let stream = Arc::get_mut(&mut intake.stream);
            stream.ok_or_else(|| io::Error::other("TLS began in the middle of a session"))?.identify(client);
        }
        tracing::debug!(peer = %intake.stream.peer(), terms = self.channel.terms(), "TLS begins");
        Ok(())
    }

    /// Sends as much as the socket takes: what was sealed before, then `output`.
    pub(super) fn flush(
        &mut self,
        stream: &Stream,
        output: &mut Output,
        device: Option<&Device>,
        magazine: &mut Magazine,
        scratch: &mut Scratch,
    ) -> io::Result<Flushed> {
        if self.send(stream)? == Flushed::Blocked {
            return Ok(Flushed::Blocked);
        }
        if output.is_empty() {
            return Ok(Flushed::All);
        }
        let Scratch { plain, sealed, .. } = scratch;
        plain.note_used(SEALED_BYTES);
        while !output.is_empty() {
            let count = output.gather(device, plain, magazine)?;
            let length = self.channel.seal(&mut self.partial, &plain[..count], sealed)?;
            output.advance(count, device, magazine);
            let taken = send_all(stream, &sealed[..length])?;
            if taken < length {
                self.unsent.extend_from_slice(&sealed[taken..length]);
                return Ok(Flushed::Blocked);
            }
        }
        output.clear(device, magazine);
        Ok(Flushed::All)
    }

    /// Sends what was sealed before.
    fn send(&mut self, stream: &Stream) -> io::Result<Flushed> {
        if self.unsent.is_empty() {
            return Ok(Flushed::All);
        }
        self.sent += send_all(stream, &self.unsent[self.sent..])?;
        if self.sent < self.unsent.len() {
            return Ok(Flushed::Blocked);
        }
        (self.unsent, self.sent) = (Vec::new(), 0);
        Ok(Flushed::All)
    }

    /// Tells the client that no more will be sent, if it can be told at once: nobody waits for it to hear that.
    pub(super) fn say_goodbye(&mut self, stream: &Stream) {
        if self.channel.say_goodbye(&mut self.partial, &mut self.unsent).is_ok() {
            let _ = self.send(stream);
        }
    }
}

/// Sends `bytes` as far as the socket takes them; returns how many it took.
fn send_all(stream: &Stream, bytes: &[u8]) -> io::Result<usize> {
    let mut sent = 0;
    while sent < bytes.len() {
        match sys::send(stream.as_fd(), &[KernelSpan::new(&bytes[sent..])]) {
            Ok(count) => sent += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sent)
}
