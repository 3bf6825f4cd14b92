//! One connection under load: its requests in flight, what waits to be sent, where its replies stand.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};

use hdrhistogram::Histogram;
use memdev::proto::{Command, CommandFlags, Cookie, Request};
use rustix::net::{self, RecvFlags, SendAncillaryBuffer, SendFlags};

use crate::pattern::Source;
use crate::replies::{Awaited, Replies};
use crate::target::Connection;
use crate::tls::Tls;

/// The kernel's limit of parts a send (`UIO_MAXIOV`).
const MAX_PARTS: usize = 1024;

/// What a set of lanes has seen.
#[derive(Debug)]
pub(crate) struct Tally {
    /// Nanoseconds from the send of a request to the arrival of all of its reply.
    pub(crate) latency: Histogram<u64>,
    pub(crate) requests: u64,
    pub(crate) bytes: u64,
    pub(crate) errors: u64,
    /// When the last reply came, in nanoseconds since the start.
    pub(crate) last: u64,
}

impl Tally {
    pub(crate) fn new() -> Self {
        let latency = Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("bounds that hold");
        Self { latency, requests: 0, bytes: 0, errors: 0, last: 0 }
    }

    /// Counts one answered request.
    pub(crate) fn count(&mut self, nanoseconds: u64, bytes: u32, now: u64) {
        self.latency.saturating_record(nanoseconds.max(1));
        self.requests += 1;
        self.bytes += u64::from(bytes);
        self.last = now;
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.latency.add(&other.latency).expect("histograms of one shape");
        self.requests += other.requests;
        self.bytes += other.bytes;
        self.errors += other.errors;
        self.last = self.last.max(other.last);
    }
}

/// The bytes of a request without flags.
fn request(command: Command, cookie: u64, offset: u64, length: u32) -> [u8; Request::SIZE] {
    Request { flags: CommandFlags::NONE, command, cookie: Cookie(cookie), offset, length }.encode()
}

/// A request in flight, or a place for one.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    busy: bool,
    sent: u64,
    length: u32,
    /// Payload of the answer.
    payload: u32,
}

/// The requests of a connection; the cookie is the slot's index.
#[derive(Debug)]
struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

/// The slots while a receive is parsed, with the time of that receive.
struct Arrivals<'a> {
    slots: &'a mut Slots,
    tally: &'a mut Tally,
    now: u64,
    /// Later answers (of a drain) are not counted.
    until: u64,
}

impl Awaited for Arrivals<'_> {
    fn payload(&self, cookie: Cookie) -> Option<u32> {
        let slot = self.slots.slots.get(usize::try_from(cookie.0).ok()?)?;
        slot.busy.then_some(slot.payload)
    }

    fn done(&mut self, cookie: Cookie, failed: bool) {
        let index = u32::try_from(cookie.0).expect("a cookie that was found");
        let slot = &mut self.slots.slots[index as usize];
        slot.busy = false;
        self.slots.free.push(index);
        if failed {
            self.tally.errors += 1;
        } else if self.now <= self.until {
            self.tally.count(self.now - slot.sent, slot.length, self.now);
        }
    }
}

/// Requests of one batch that the socket has not taken yet.
#[derive(Debug, Default)]
struct Outgoing {
    headers: Vec<u8>,
    /// Payload bytes behind each header.
    payloads: Vec<u32>,
    /// Bytes of the batch that the socket has taken, from the first entry that is not through.
    sent: usize,
    first: usize,
}

impl Outgoing {
    fn is_empty(&self) -> bool {
        self.first == self.payloads.len()
    }

    fn push(&mut self, header: &[u8; Request::SIZE], payload: u32) {
        self.headers.extend_from_slice(header);
        self.payloads.push(payload);
    }

    /// Sends what the socket takes at once.
    fn send(&mut self, stream: BorrowedFd<'_>, noise: &[u8]) -> io::Result<()> {
        while !self.is_empty() {
            let taken = if self.payloads[self.first..].iter().all(|&length| length == 0) {
                let start = self.first * Request::SIZE + self.sent;
                net::send(stream, &self.headers[start..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            } else {
                self.send_parts(stream, noise)
            };
            match taken {
                Ok(taken) => self.advance(taken),
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.headers.clear();
        self.payloads.clear();
        self.first = 0;
        Ok(())
    }

    fn send_parts(&self, stream: BorrowedFd<'_>, noise: &[u8]) -> rustix::io::Result<usize> {
        let waiting = &self.payloads[self.first..];
        let mut parts = Vec::with_capacity((waiting.len() * 2).min(MAX_PARTS));
        let mut skip = self.sent;
        for (header, &payload) in
            self.headers[self.first * Request::SIZE..].chunks(Request::SIZE).zip(waiting)
        {
            if parts.len() + 2 > MAX_PARTS {
                break;
            }
            for part in [header, &noise[..payload as usize]] {
                let skipped = skip.min(part.len());
                skip -= skipped;
                if skipped < part.len() {
                    parts.push(IoSlice::new(&part[skipped..]));
                }
            }
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        net::sendmsg(stream, &parts, &mut SendAncillaryBuffer::default(), flags)
    }

    /// Seals all of the batch, which then waits in `tls`.
    fn seal(&mut self, tls: &mut Tls, noise: &[u8]) -> io::Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let mut plain = Vec::with_capacity(self.payloads.iter().map(|&length| length as usize + 64).sum());
        for (header, &payload) in self.headers.chunks(Request::SIZE).zip(&self.payloads) {
            plain.extend_from_slice(header);
            plain.extend_from_slice(&noise[..payload as usize]);
        }
        self.headers.clear();
        self.payloads.clear();
        tls.seal(&plain)
    }

    fn advance(&mut self, taken: usize) {
        self.sent += taken;
        while let Some(&payload) = self.payloads.get(self.first) {
            let whole = Request::SIZE + payload as usize;
            if self.sent < whole {
                break;
            }
            self.sent -= whole;
            self.first += 1;
        }
    }
}

/// One connection and its load.
#[derive(Debug)]
pub(crate) struct Lane {
    connection: Connection,
    source: Option<Source>,
    slots: Slots,
    outgoing: Outgoing,
    replies: Replies,
    /// Requests that this lane may still issue.
    left: u64,
}

impl Lane {
    /// A lane with nothing to do: [`load`](Self::load) gives it requests.
    pub(crate) fn new(connection: Connection) -> Self {
        Self {
            connection,
            source: None,
            slots: Slots { slots: Vec::new(), free: Vec::new() },
            outgoing: Outgoing::default(),
            replies: Replies::default(),
            left: 0,
        }
    }

    /// Gives an idle lane its next `requests` requests, `depth` of them at a time.
    pub(crate) fn load(&mut self, source: Source, depth: u32, requests: u64) {
        self.source = Some(source);
        self.left = requests;
        self.slots.slots = vec![Slot::default(); depth as usize];
        self.slots.free = (0..depth).rev().collect();
    }

    pub(crate) fn stream(&self) -> BorrowedFd<'_> {
        self.connection.stream.as_fd()
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.slots.slots.len() - self.slots.free.len()
    }

    /// The socket was full: wait until it takes more.
    pub(crate) fn wants_to_send(&self) -> bool {
        !self.outgoing.is_empty() || self.connection.tls.as_ref().is_some_and(|tls| tls.wants_to_send())
    }

    /// No more requests, whatever is left.
    pub(crate) fn stop(&mut self) {
        self.left = 0;
    }

    /// Fills all free slots and sends the batch in one call.
    pub(crate) fn refill(&mut self, now: u64, noise: &[u8]) -> io::Result<()> {
        while self.left > 0 {
            let Some(index) = self.slots.free.pop() else { break };
            let Some((command, offset, length)) = self.source.as_mut().and_then(Source::next) else {
                self.slots.free.push(index);
                self.left = 0;
                break;
            };
            self.left -= 1;
            let answer = if command == Command::Read { length } else { 0 };
            let payload = if command == Command::Write { length } else { 0 };
            self.slots.slots[index as usize] = Slot { busy: true, sent: now, length, payload: answer };
            self.outgoing.push(&request(command, u64::from(index), offset, length), payload);
        }
        self.send(noise)
    }

    /// Sends what an earlier batch left over.
    pub(crate) fn send(&mut self, noise: &[u8]) -> io::Result<()> {
        let Connection { stream, tls, .. } = &mut self.connection;
        let Some(tls) = tls else { return self.outgoing.send(stream.as_fd(), noise) };
        self.outgoing.seal(tls, noise)?;
        tls.flush(stream.as_fd(), false)
    }

    /// Receives what is there (waiting for it if `wait`), and counts the answers that were completed by it.
    /// False: nothing was there.
    ///
    /// # Errors
    ///
    /// The server hung up or is out of step.
    pub(crate) fn receive(
        &mut self,
        buffer: &mut [u8],
        wait: bool,
        clock: impl FnOnce() -> u64,
        until: u64,
        tally: &mut Tally,
    ) -> io::Result<bool> {
        let start = self.replies.prepare(buffer);
        let flags = if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        let Connection { stream, tls, .. } = &mut self.connection;
        let received = match tls {
            Some(tls) => tls.receive(stream.as_fd(), &mut buffer[start..], wait)?,
            None => match net::recv(stream.as_fd(), &mut buffer[start..], flags) {
                Ok((_, 0)) => return Err(io::Error::other("the server hung up")),
                Ok((_, received)) => received,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
                Err(error) => return Err(error.into()),
            },
        };
        let mut arrivals = Arrivals { slots: &mut self.slots, tally, now: clock(), until };
        self.replies.parse(&buffer[..start + received], &mut arrivals).map_err(io::Error::other)?;
        Ok(received > 0)
    }

    /// Says goodbye, as the protocol asks; the close follows when the lane is dropped.
    pub(crate) fn disconnect(&mut self) {
        let bye = request(Command::Disc, 0, 0, 0);
        if let Connection { stream, tls: Some(tls), .. } = &mut self.connection {
            let _ = tls.seal(&bye).and_then(|()| tls.flush(stream.as_fd(), false));
            return;
        }
        let _ = net::send(self.connection.stream.as_fd(), &bye, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_batch_survives_a_socket_that_takes_a_little_at_a_time() {
        let (here, mut there) = UnixStream::pair().unwrap();
        there.set_nonblocking(true).unwrap();
        let noise: Vec<u8> = (0..=255).cycle().take(100_000).collect();
        let (mut outgoing, mut want): (_, Vec<u8>) = (Outgoing::default(), Vec::new());
        for (cookie, payload) in [(1, 100_000), (2, 0), (3, 77_777), (4, 99_999), (5, 1)] {
            let header = request(Command::Write, cookie, 0, payload);
            outgoing.push(&header, payload);
            want.extend(header);
            want.extend(&noise[..payload as usize]);
        }
        let (mut got, mut part): (Vec<u8>, _) = (Vec::new(), [0; 10_007]);
        while got.len() < want.len() {
            outgoing.send(here.as_fd(), &noise).unwrap();
            if let Ok(length) = there.read(&mut part) {
                got.extend(&part[..length]);
            }
        }
        assert!(outgoing.is_empty());
        assert!(got == want);
    }
}
