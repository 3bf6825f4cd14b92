//! One client: a socket that never blocks, and where it is in its script.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown, sockopt};

use crate::script::Step;

/// Sends of a flood in a row, before other clients have their turn.
const TURN: usize = 4;

/// What a client waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Something to read.
    Readable,
    /// Room to send.
    Writable,
    /// Either.
    Both,
    /// Nothing but the time, and that the server hangs up.
    Time,
    /// Nothing any more.
    Over(Fate),
}

/// How a client ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// As it wanted to.
    Ended,
    /// The server hung up on it.
    HungUp,
    /// It never got in.
    Refused,
}

/// The time as clients see it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    pub(crate) now: Instant,
    /// The crowd is told to end: whoever stays, stays no longer.
    pub(crate) is_over: bool,
    /// Between two bytes of a slow client.
    pub(crate) gap: Duration,
    /// How long those who stay do so.
    pub(crate) hold: Duration,
}

#[derive(Debug)]
pub(crate) struct Client {
    socket: OwnedFd,
    steps: VecDeque<Step>,
    /// Bytes of the step at hand that are done.
    done: usize,
    /// When the step at hand goes on, or ends.
    due: Option<Instant>,
    /// When it stays no longer.
    until: Option<Instant>,
    /// Whether it has come to what it is here for.
    pub(crate) is_settled: bool,
    /// What the event loop was last told to wait for.
    pub(crate) waits_for: Next,
}

impl Client {
    pub(crate) fn new(socket: OwnedFd, steps: Vec<Step>) -> Self {
        let steps = steps.into();
        Self { socket, steps, done: 0, due: None, until: None, is_settled: false, waits_for: Next::Time }
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// When to look at it again, whatever happens.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Goes as far in its script as it can without waiting.
    pub(crate) fn drive(&mut self, clock: Clock, scratch: &mut [u8]) -> Next {
        while let Some(step) = self.steps.front() {
            let stays = matches!(step, Step::Hold | Step::Trickle(_) | Step::Flood { .. } | Step::Sip);
            if stays {
                self.is_settled = true;
                let until = *self.until.get_or_insert(clock.now + clock.hold);
                if clock.is_over || until <= clock.now {
                    break;
                }
            }
            match self.step(clock, scratch) {
                Ok(None) => {
                    self.steps.pop_front();
                    (self.done, self.due) = (0, None);
                }
                Ok(Some(next)) => {
                    if stays {
                        self.due = Some(self.due.into_iter().chain(self.until).min().unwrap_or(clock.now));
                    }
                    return next;
                }
                Err(Errno::CONNREFUSED | Errno::TIMEDOUT) => return Next::Over(Fate::Refused),
                Err(_) => return Next::Over(Fate::HungUp),
            }
        }
        self.is_settled = true;
        Next::Over(Fate::Ended)
    }

    /// Does what can be done of the step at hand; `None` when it is done.
    fn step(&mut self, clock: Clock, scratch: &mut [u8]) -> Result<Option<Next>, Errno> {
        let Some(step) = self.steps.front() else { return Ok(None) };
        match step {
            Step::Send(bytes) => {
                while self.done < bytes.len() {
                    match send(&self.socket, &bytes[self.done..], SENDING) {
                        Ok(count) => self.done += count,
                        Err(Errno::AGAIN) => return Ok(Some(Next::Writable)),
                        Err(Errno::INTR) => {}
                        Err(error) => return Err(error),
                    }
                }
                Ok(None)
            }
            Step::Trickle(bytes) => {
                if self.due.is_none_or(|due| due <= clock.now) {
                    match send(&self.socket, &bytes[self.done..=self.done], SENDING) {
                        Ok(_) => self.done += 1,
                        Err(Errno::AGAIN | Errno::INTR) => {}
                        Err(error) => return Err(error),
                    }
                    self.due = Some(clock.now + clock.gap);
                }
                Ok((self.done < bytes.len()).then_some(Next::Time))
            }
            Step::Flood { bytes, reads } => {
                if *reads {
                    discard(&self.socket, scratch)?;
                }
                for _ in 0..TURN {
                    match send(&self.socket, &bytes[self.done..], SENDING) {
                        Ok(count) => self.done = (self.done + count) % bytes.len(),
                        Err(Errno::AGAIN | Errno::INTR) => break,
                        Err(error) => return Err(error),
                    }
                }
                self.due = None;
                Ok(Some(if *reads { Next::Both } else { Next::Writable }))
            }
            Step::Receive(count) => {
                while (self.done as u64) < *count {
                    let room =
                        usize::try_from(*count - self.done as u64).unwrap_or(usize::MAX).min(scratch.len());
                    match receive(&self.socket, &mut scratch[..room])? {
                        Some(count) => self.done += count,
                        None => return Ok(Some(Next::Readable)),
                    }
                }
                Ok(None)
            }
            Step::Sip => {
                if self.due.is_none_or(|due| due <= clock.now) {
                    receive(&self.socket, &mut scratch[..1])?;
                    self.due = Some(clock.now + clock.gap);
                }
                Ok(Some(Next::Time))
            }
            Step::Pause(time) => {
                let due = *self.due.get_or_insert(clock.now + *time);
                Ok((due > clock.now && !clock.is_over).then_some(Next::Time))
            }
            Step::HalfClose => shutdown(&self.socket, Shutdown::Write).map(|()| None),
            Step::Hold => {
                self.due = None;
                Ok(Some(Next::Time))
            }
            // A unix socket has no such thing; there, closing with something unread is a reset.
            Step::Reset => sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO)).map(|()| None),
        }
    }
}

const SENDING: SendFlags = SendFlags::NOSIGNAL.union(SendFlags::DONTWAIT);

/// Receives what is there; `None` if nothing is. The end is an error: nobody here wants it.
fn receive(socket: &OwnedFd, into: &mut [u8]) -> Result<Option<usize>, Errno> {
    match recv(socket, into, RecvFlags::DONTWAIT) {
        Ok((_, 0)) => Err(Errno::PIPE),
        Ok((_, count)) => Ok(Some(count)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Throws away what is there, a turn's worth of it.
fn discard(socket: &OwnedFd, scratch: &mut [u8]) -> Result<(), Errno> {
    for _ in 0..TURN {
        if receive(socket, scratch)?.is_none() {
            break;
        }
    }
    Ok(())
}
