//! A connection as its session sees it: something that can be fenced off.

use crate::net::{PeerKind, Stream};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One connection to a session.
#[derive(Debug)]
pub struct Line {
    stream: Arc<Stream>,
    standing: Mutex<Standing>,
    /// The worker holds part of a request that came over it.
    in_request: AtomicBool,
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
        Self { stream, standing: Mutex::new(Standing::Good), in_request: AtomicBool::new(false) }
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

    /// Notes whether the worker holds, or may be about to receive, part of a request.
    pub fn set_in_request(&self, in_request: bool) {
        if self.in_request.load(Ordering::Relaxed) != in_request {
            self.in_request.store(in_request, Ordering::Release);
        }
    }

    /// Whether the client has hung up. Over a unix socket the kernel knows one that is gone from one that only sends no
    /// more and still waits for its replies; over TCP and vsock both look the same, and are taken as gone.
    fn peer_is_gone(&self) -> bool {
        let gone = match self.stream.peer().kind {
            PeerKind::Unix { .. } => PollFlags::HUP | PollFlags::ERR,
            PeerKind::Tcp { .. } | PeerKind::Vsock { .. } => {
                PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR
            }
        };
        let mut fds = [PollFd::new(&*self.stream, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(gone)
    }

    /// Somebody attaches to the session: if this line's client is gone, what it left behind must not be done any more.
    /// Waits for the turn that is held, if any.
    ///
    /// A unix socket tells at once that its client is gone. A TCP or vsock socket tells it behind everything that the
    /// client had still sent, which may be more than fits here; so a line with anything unread on it is doubtful until
    /// its worker has read on and seen what is behind.
    pub(super) fn somebody_attaches(&self) {
        let mut standing = self.lock();
        if self.peer_is_gone() {
            *standing = Standing::Fenced;
        } else if !matches!(self.stream.peer().kind, PeerKind::Unix { .. })
            && *standing == Standing::Good
            // In this order: what is read no more is in the worker's hands by then.
            && (self.has_unread() || self.in_request.load(Ordering::Acquire))
        {
            *standing = Standing::Doubtful;
        }
    }

    /// Whether something has arrived, or may have: not every kernel can say it of vsock.
    fn has_unread(&self) -> bool {
        !rustix::io::ioctl_fionread(&*self.stream).is_ok_and(|unread| unread == 0)
    }

    /// Ends the doubt: the client is there.
    pub fn vouch(&self) {
        let mut standing = self.lock();
        if *standing == Standing::Doubtful {
            *standing = Standing::Good;
        }
    }
}
