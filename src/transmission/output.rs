//! Replies on their way out: headers of our own, data where it lies, sent by as few calls as possible.
//!
//! ```text
//!   segments   |header|base bytes|header|slot bytes|header header|zeroes| ...      one sendmsg, up to 1024 spans
//!   replies     ^                 ^                 (where each reply to a read begins)
//! ```
//!
//! Nothing is copied but headers, and the blocks of sealed sessions, which are opened into a buffer as they are sent. Slots are held until they are sent, so nothing that a client was told can be
//! recycled under it. A base page that cannot be read makes the send fail; the replies that touch it are then turned
//! into error replies, unless the client has got the beginning of one already: then only hanging up is honest.

use super::accounts::Answered;
use super::reply::Asked;
use crate::cow::{Device, Piece};
use crate::error::ErrorKind;
use crate::limits::REPLY_BYTES;
use crate::overlay::Magazine;
use crate::sys::{self, Buffer, KernelSpan, MAX_SPANS, SlotRun};
use arrayvec::ArrayVec;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::time::Instant;

/// Past this many segments, replies are sent before more of them are made: what one call can send.
const ENOUGH_SEGMENTS: usize = MAX_SPANS - 64;

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

#[derive(Debug)]
enum Segment {
    /// A part of `Output::bytes`.
    Inline { start: usize, len: usize },
    /// A part of the base image.
    Base { offset: u64, len: usize },
    /// A part of some slots.
    Blocks { run: SlotRun, first: u64, at: usize, len: usize },
    /// Zeroes.
    Zero { len: usize },
    /// Already sent.
    Sent,
}

impl Segment {
    fn len(&self) -> usize {
        match self {
            Self::Inline { len, .. }
            | Self::Base { len, .. }
            | Self::Blocks { len, .. }
            | Self::Zero { len } => *len,
            Self::Sent => 0,
        }
    }
}

/// A reply to a read that has bytes of the base in it: it can be taken back as long as nothing of it is sent.
#[derive(Debug)]
struct ReadReply {
    segments: Range<usize>,
    asked: Asked,
    /// Whether its beginning went out before.
    continued: bool,
}

/// What became of an attempt to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flushed {
    /// Everything is sent.
    All,
    /// The socket takes no more now.
    Blocked,
}

/// Replies on their way out.
#[derive(Debug, Default)]
pub struct Output {
    bytes: Vec<u8>,
    segments: Vec<Segment>,
    reads: Vec<ReadReply>,
    /// No bytes are added to segments before this one.
    border: usize,
    /// Bytes that are not sent.
    queued: u64,
    /// The first segment that is not sent altogether, and what of it is.
    next: usize,
    next_sent: usize,
    /// What the counters are to be told.
    pub(super) answered: Answered,
}

impl Output {
    /// Whether there is nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queued == 0
    }

    /// Whether it should be sent before more is added.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.queued >= REPLY_BYTES || self.segments.len() >= ENOUGH_SEGMENTS
    }

    /// Bytes that are to be sent.
    #[must_use]
    pub fn queued(&self) -> u64 {
        self.queued
    }

    /// When the input that is acted on now had arrived.
    pub(super) fn now(&self) -> Option<Instant> {
        self.answered.now()
    }

    /// Notes that the last of the answer to a request was put.
    pub(super) fn note_answer(&mut self, asked: Asked) {
        self.answered.note(asked);
    }

    /// Notes that an answer is an error.
    pub(super) fn note_error(&mut self) {
        self.answered.note_error();
    }

    /// Adds bytes of the server's own.
    pub fn put(&mut self, bytes: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        self.queued += bytes.len() as u64;
        let count = self.segments.len();
        match self.segments.last_mut() {
            // Not across the border of a reply to a read, so that it can be replaced.
            Some(Segment::Inline { start: first, len }) if *first + *len == start && self.border < count => {
                *len += bytes.len();
            }
            _ => self.segments.push(Segment::Inline { start, len: bytes.len() }),
        }
    }

    /// Adds a reply to a read, or the next part of one (`continued`), by what `put` puts.
    pub(super) fn put_read(&mut self, asked: Asked, continued: bool, put: impl FnOnce(&mut Self)) {
        let start = self.segments.len();
        self.border = start;
        put(self);
        let end = self.segments.len();
        self.border = end;
        if self.segments[start..end].iter().any(|segment| matches!(segment, Segment::Base { .. })) {
            self.reads.push(ReadReply { segments: start..end, asked, continued });
        }
    }

    /// Adds data.
    pub(super) fn put_piece(&mut self, piece: Piece) {
        let segment = match piece {
            Piece::Base { offset, len } => Segment::Base { offset, len },
            Piece::Blocks { run, first, at, len } => Segment::Blocks { run, first, at, len },
            Piece::Zero { len } => Segment::Zero { len },
        };
        self.queued += segment.len() as u64;
        self.segments.push(segment);
    }

    /// Sends as much as the socket takes. `device` is where the data of the replies lies; before there is one, there
    /// are only bytes of the server's own. In `plain` sealed blocks are opened, a bufferful at a time.
    ///
    /// # Errors
    /// When the connection is of no more use: the client is gone, or part of a reply is sent whose rest cannot be
    /// read.
    pub fn flush(
        &mut self,
        socket: BorrowedFd<'_>,
        device: Option<&Device>,
        magazine: &mut Magazine,
        plain: &mut Buffer,
    ) -> io::Result<Flushed> {
        while !self.is_empty() {
            // Filled where it lies: it has room for 16 KiB, which would be copied for every reply.
            let mut spans = ArrayVec::new();
            let opened = match device {
                Some(device) if device.is_sealed() => self.open_blocks(device, plain),
                _ => 0,
            };
            self.put_spans(device, &plain[..opened], &mut spans);
            let sent = sys::send(socket, &spans);
            drop(spans);
            match sent {
                Ok(sent) => self.advance(sent, device, magazine),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Flushed::Blocked),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                    self.take_back_unreadable(device.ok_or(error)?, magazine)?;
                }
                Err(error) => return Err(error),
            }
        }
        self.clear(device, magazine);
        Ok(Flushed::All)
    }

    /// Opens the sealed blocks that are to be sent next into the front of `plain`, one behind the other, as far as there is
    /// room; returns how many bytes. What the socket does not take is opened again when it does.
    fn open_blocks(&self, device: &Device, plain: &mut Buffer) -> usize {
        let mut done = 0;
        let mut skip = self.next_sent;
        for segment in &self.segments[self.next..] {
            if let Segment::Blocks { run, first, at, len } = segment {
                let count = (len - skip).min(plain.len() - done);
                device.copy(run, *first, at + skip, &mut plain[done..done + count]);
                done += count;
                if count < len - skip {
                    break;
                }
            }
            skip = 0;
        }
        plain.note_used(done);
        done
    }

    /// Puts what is to be sent next into `spans`, as far as there is room. `opened` are the sealed blocks in it, as far as they
    /// were opened.
    fn put_spans<'a>(
        &'a self,
        device: Option<&'a Device>,
        mut opened: &'a [u8],
        spans: &mut ArrayVec<KernelSpan<'a>, MAX_SPANS>,
    ) {
        let mut skip = self.next_sent;
        for segment in &self.segments[self.next..] {
            let span = match (segment, device) {
                (Segment::Inline { start, len }, _) => KernelSpan::new(&self.bytes[*start..*start + *len]),
                (Segment::Base { offset, len }, Some(device)) => device.image().span(*offset, *len),
                (Segment::Blocks { len, .. }, Some(device)) if device.is_sealed() => {
                    let (now, rest) = opened.split_at(opened.len().min(len - skip));
                    if !now.is_empty() && !spans.is_full() {
                        spans.push(KernelSpan::new(now));
                    }
                    if now.len() < len - skip || spans.is_full() {
                        break;
                    }
                    (opened, skip) = (rest, 0);
                    continue;
                }
                (Segment::Blocks { run, at, len, .. }, Some(device)) => {
                    KernelSpan::new(&device.overlay().pool().arena().run_bytes(run)[*at..*at + *len])
                }
                (Segment::Zero { len }, _) => {
                    let mut left = *len - skip;
                    skip = 0;
                    while left > 0 && !spans.is_full() {
                        let now = left.min(ZEROES.len());
                        spans.push(KernelSpan::new(&ZEROES[..now]));
                        left -= now;
                    }
                    if left > 0 {
                        break;
                    }
                    continue;
                }
                (Segment::Sent, _) => continue,
                (Segment::Base { .. } | Segment::Blocks { .. }, None) => {
                    unreachable!("data is only put by a transmission, which has a device")
                }
            };
            if spans.is_full() {
                break;
            }
            spans.push(span.skip(skip));
            skip = 0;
        }
    }

    /// Copies what is to be sent next into `buffer`, as far as it has room, for a way out that must look at every byte;
    /// returns how much. Nothing counts as sent before [`Output::advance`] is told so. The base is read by the kernel
    /// here, too, and never through its mapping.
    ///
    /// # Errors
    /// As [`Output::flush`].
    pub fn gather(
        &mut self,
        device: Option<&Device>,
        buffer: &mut [u8],
        magazine: &mut Magazine,
    ) -> io::Result<usize> {
        loop {
            match (self.copy_out(device, buffer), device) {
                (Ok(count), _) => return Ok(count),
                // What cannot be read is not begun yet, or cannot be helped: nothing of this round has gone out.
                (Err(_), Some(device)) => self.take_back_unreadable(device, magazine)?,
                (Err(error), None) => return Err(error),
            }
        }
    }

    fn copy_out(&self, device: Option<&Device>, buffer: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        let mut skip = self.next_sent;
        for segment in &self.segments[self.next..] {
            if done == buffer.len() {
                break;
            }
            let len = (segment.len() - skip).min(buffer.len() - done);
            let out = &mut buffer[done..done + len];
            match (segment, device) {
                (Segment::Inline { start, .. }, _) => {
                    out.copy_from_slice(&self.bytes[*start + skip..][..len]);
                }
                (Segment::Base { offset, .. }, Some(device)) => {
                    device.image().read_at(*offset + skip as u64, out)?;
                }
                (Segment::Blocks { run, first, at, .. }, Some(device)) => {
                    device.copy(run, *first, *at + skip, out);
                }
                (Segment::Zero { .. }, _) => out.fill(0),
                (Segment::Sent, _) => {}
                (Segment::Base { .. } | Segment::Blocks { .. }, None) => {
                    unreachable!("data is only put by a transmission, which has a device")
                }
            }
            done += len;
            skip = 0;
        }
        Ok(done)
    }

    /// Notes that the next `sent` bytes are out, and lets go of what they were in.
    pub fn advance(&mut self, mut sent: usize, device: Option<&Device>, magazine: &mut Magazine) {
        self.queued -= sent as u64;
        while let Some(segment) = self.segments.get_mut(self.next) {
            let left = segment.len() - self.next_sent;
            if sent < left {
                self.next_sent += sent;
                return;
            }
            sent -= left;
            release(std::mem::replace(segment, Segment::Sent), device, magazine);
            self.next += 1;
            self.next_sent = 0;
        }
    }

    /// Replaces the replies that touch unreadable parts of the base by error replies.
    fn take_back_unreadable(&mut self, device: &Device, magazine: &mut Magazine) -> io::Result<()> {
        let mut reads = std::mem::take(&mut self.reads);
        let (mut lost, mut replaced) = (false, false);
        // From the last to the first, so that what is replaced does not move what is still to be looked at.
        for index in (0..reads.len()).rev() {
            let ReadReply { segments: Range { start, end }, continued, .. } = reads[index];
            let readable = self.segments[start..end].iter().all(|segment| match segment {
                Segment::Base { offset, len } => device.image().can_read(*offset, *len),
                _ => true,
            });
            if readable {
                continue;
            }
            if continued || start < self.next || (start == self.next && self.next_sent > 0) {
                lost = true;
                continue;
            }
            replaced = true;
            self.note_error();
            let bytes = reads[index].asked.error(ErrorKind::Io.into());
            let error = Segment::Inline { start: self.bytes.len(), len: bytes.len() };
            self.bytes.extend_from_slice(&bytes);
            self.segments
                .splice(start..end, [error])
                .for_each(|segment| release(segment, Some(device), magazine));
            reads.remove(index);
            for later in &mut reads[index..] {
                later.segments.start -= end - start - 1;
                later.segments.end -= end - start - 1;
            }
        }
        self.reads = reads;
        let unsent: u64 = self.segments[self.next..].iter().map(|segment| segment.len() as u64).sum();
        self.queued = unsent - self.next_sent as u64;
        // Where all can be read, the fault lies elsewhere, and trying again would not end.
        if lost || !replaced {
            return Err(io::Error::other("A reply cannot be sent: its memory cannot be read"));
        }
        Ok(())
    }

    /// Throws everything away. `device` as for [`Output::flush`].
    pub fn clear(&mut self, device: Option<&Device>, magazine: &mut Magazine) {
        self.segments.drain(..).for_each(|segment| release(segment, device, magazine));
        self.bytes.clear();
        self.reads.clear();
        (self.border, self.queued, self.next, self.next_sent) = (0, 0, 0, 0);
    }
}

fn release(segment: Segment, device: Option<&Device>, magazine: &mut Magazine) {
    if let (Segment::Blocks { run, .. }, Some(device)) = (segment, device) {
        device.release(run, magazine);
    }
}
