//! A connection as its session sees it: something that can be fenced off.

use super::Traffic;
use crate::net::{Peer, PeerKind, Stream};
use crossbeam::utils::CachePadded;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// One connection to a session.
#[derive(Debug)]
pub struct Line {
    stream: Arc<Stream>,
    standing: Mutex<Standing>,
    /// The worker holds part of a request that came over it.
    in_request: AtomicBool,
    /// Made with the first request, so that a connection that does nothing costs nothing. Padded, since its worker writes to
    /// it all the time.
    traffic: OnceLock<Box<CachePadded<Traffic>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Good,
    /// Its client may be gone, and what is still to come over it may be what it left behind.
    Doubtful,
    Fenced,
}

/// Whether requests that came over a line may be acted on.
#[derive(Debug)]
pub enum Turn<'a> {
    /// They may. While this is held the line cannot be fenced.
    Granted(TurnGuard<'a>),
    /// Not before it is known whether the client is still there: see [`Line::vouch`].
    Doubtful,
    /// Never again.
    Fenced,
}

/// Keeps the line from being fenced.
#[derive(Debug)]
pub struct TurnGuard<'a> {
    _standing: MutexGuard<'a, Standing>,
}

impl Line {
    pub(super) fn new(stream: Arc<Stream>) -> Self {
        Self {
            stream,
            standing: Mutex::new(Standing::Good),
            in_request: AtomicBool::new(false),
            traffic: OnceLock::new(),
        }
    }

    /// What goes over it, for its worker to count.
    pub fn traffic(&self) -> &Traffic {
        self.traffic.get_or_init(Box::default)
    }

    /// What went over it, if anything did.
    pub(super) fn counted(&self) -> Option<&Traffic> {
        self.traffic.get().map(|traffic| &***traffic)
    }

    /// Who is at the other end.
    pub(super) fn peer(&self) -> &Peer {
        self.stream.peer()
    }

    /// Ends it: nothing more that comes over it is done, and its client sees that it is closed.
    pub(super) fn hang_up(&self) {
        *self.lock() = Standing::Fenced;
        // Where there is nobody any more, it has ended already.
        let _ = rustix::net::shutdown(&*self.stream, rustix::net::Shutdown::Both);
    }

    /// Asks for a turn.
    #[must_use]
    pub fn turn(&self) -> Turn<'_> {
        let standing = self.lock();
        match *standing {
            Standing::Good => Turn::Granted(TurnGuard { _standing: standing }),
            Standing::Doubtful => Turn::Doubtful,
            Standing::Fenced => Turn::Fenced,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Standing> {
        // A turn that panicked is over, too.
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the turn that is being acted on, if any; none begins while this is held.
    pub(super) fn hold(&self) -> TurnGuard<'_> {
        TurnGuard { _standing: self.lock() }
    }

    /// Notes whether the worker holds, or may be about to receive, part of a request.
    pub fn set_in_request(&self, in_request: bool) {
        if self.in_request.load(Ordering::Relaxed) != in_request {
            self.in_request.store(in_request, Ordering::Release);
        }
    }

    /// Somebody attaches to a session that these lines are in: where a client is gone, what it left behind must not be
    /// done any more. Waits for the turns that are held on such lines, if any.
    ///
    /// A unix socket tells at once that its client is gone. A TCP or vsock socket tells it behind everything that the
    /// client had still sent, which may be more than fits here; so a line with anything unread on it is doubtful until
    /// its worker has read on and seen what is behind.
    ///
    /// All lines are asked by one call: whoever attaches must not keep its worker for as long as one call each takes.
    pub(super) fn somebody_attaches(lines: &[Arc<Self>]) {
        let asked = PollFlags::RDHUP | PollFlags::IN;
        let mut fds: Vec<_> = lines.iter().map(|line| PollFd::new(&*line.stream, asked)).collect();
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // A kernel without memory for the answer: nobody is known to be there.
        let answered = poll(&mut fds, Some(&now)).is_ok();
        for (line, fd) in lines.iter().zip(&fds) {
            line.judge(if answered { fd.revents() } else { PollFlags::IN });
        }
    }

    /// Draws the conclusion from what the kernel said of the line.
    ///
    /// Over a unix socket the kernel knows a client that is gone from one that only sends no more and still waits for its
    /// replies; over TCP and vsock both look the same, and are taken as gone.
    fn judge(&self, seen: PollFlags) {
        let is_local = matches!(self.stream.peer().kind, PeerKind::Unix { .. });
        let gone = PollFlags::HUP | PollFlags::ERR;
        if seen.intersects(if is_local { gone } else { gone | PollFlags::RDHUP }) {
            *self.lock() = Standing::Fenced;
        // In this order: what is read no more is in the worker's hands by then.
        } else if !is_local && (seen.contains(PollFlags::IN) || self.in_request.load(Ordering::Acquire)) {
            let mut standing = self.lock();
            if *standing == Standing::Good {
                *standing = Standing::Doubtful;
            }
        }
    }

    /// Ends the doubt: the client is there.
    pub fn vouch(&self) {
        let mut standing = self.lock();
        if *standing == Standing::Doubtful {
            *standing = Standing::Good;
        }
    }
}
