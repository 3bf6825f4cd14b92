//! A connection as its session sees it: something that can be fenced off.

use crate::net::{PeerKind, Stream};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One connection to a session.
#[derive(Debug)]
pub struct Line {
    stream: Arc<Stream>,
    fenced: Mutex<bool>,
}

/// The right to act on requests that came over a line. While it is held the line cannot be fenced.
#[derive(Debug)]
pub struct Turn<'a> {
    _held: MutexGuard<'a, bool>,
}

impl Line {
    pub(super) fn new(stream: Arc<Stream>) -> Self {
        Self { stream, fenced: Mutex::new(false) }
    }

    /// A turn, unless the line was fenced: then nothing that came over it may be done any more.
    #[must_use]
    pub fn turn(&self) -> Option<Turn<'_>> {
        let fenced = self.lock();
        (!*fenced).then_some(Turn { _held: fenced })
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        // A turn that panicked is over, too.
        self.fenced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the client has hung up. Over a unix socket the kernel knows one that is gone from one that only sends no
    /// more and still waits for its replies; over TCP both look the same, and it has to be taken as gone.
    pub(super) fn peer_is_gone(&self) -> bool {
        let gone = match self.stream.peer().kind {
            PeerKind::Unix { .. } => PollFlags::HUP | PollFlags::ERR,
            PeerKind::Tcp { .. } => PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR,
        };
        let mut fds = [PollFd::new(&*self.stream, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(gone)
    }

    /// Waits for the turn that is held, if any; there is none after it.
    pub(super) fn fence(&self) {
        *self.lock() = true;
    }
}
