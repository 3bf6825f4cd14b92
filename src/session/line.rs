//! A connection as its session sees it: something that can be fenced off.

use crate::net::Stream;
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

    /// Whether the client has hung up: it has said that it sends no more, or is not there any more.
    pub(super) fn peer_is_gone(&self) -> bool {
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let mut fds = [PollFd::new(&*self.stream, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(gone)
    }

    /// Waits for the turn that is held, if any; there is none after it.
    pub(super) fn fence(&self) {
        *self.lock() = true;
    }
}
