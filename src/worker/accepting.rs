//! How a worker gets its connections: all workers listen to all listeners, and the one that accepts gives the connection
//! to whoever has the fewest. Who has as many connections as it may have is sent away here.

use super::connection::Connection;
use super::event_loop::{BELL, Worker};
use super::mailbox::{Message, least_loaded};
use crate::net::{Full, Listener, Party, Peer};
use rustix::event::epoll;
use std::time::{Duration, Instant};

/// Connections that are accepted at a time, before those that are there have a turn: each takes tens of microseconds, which
/// whoever streams waits for.
const ACCEPTS: usize = 8;
/// How long to leave clients waiting when no connection can be accepted (out of descriptors, usually).
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl Worker {
    /// Every worker listens; the kernel wakes one of them.
    pub(super) fn listen(&self) -> rustix::io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::EXCLUSIVE;
        for (listener, token) in self.shared.listeners().iter().zip((0..BELL).rev()) {
            epoll::add(&self.epoll, listener, epoll::EventData::new_u64(token), flags)?;
        }
        Ok(())
    }

    pub(super) fn stop_listening(&self) {
        for listener in self.shared.listeners().iter() {
            // It was added when the worker was made.
            let _ = epoll::delete(&self.epoll, listener);
        }
    }

    /// Another server accepts from now on. Its sockets are the same ones: when all workers have let go of them here, they are
    /// closed.
    pub(super) fn give_way(&mut self) {
        self.stop_listening();
        // The kernel wakes one who listens, which may have been this one: who came then is taken in here, and handed on when
        // it has named what it wants. Left in the queue it would wait until somebody else comes.
        let listeners = self.shared.listeners().len();
        for listener in 0..listeners {
            while self.accept(listener) {}
        }
        self.accepts_again = None;
        self.shared.one_gives_way();
    }

    /// Accepts some; whether there may be more.
    pub(super) fn accept(&mut self, listener: usize) -> bool {
        for _ in 0..ACCEPTS {
            let accepted = self.shared.listeners().get(listener).map_or(Ok(None), Listener::accept);
            match accepted {
                Ok(None) => return false,
                Ok(Some(mut stream)) => {
                    match self.shared.connections.enter(Party::of(stream.peer())) {
                        Ok(place) => stream.keep(place),
                        Err(full) => {
                            // At once: in the queue it would keep others waiting who may come in.
                            self.say_refused(stream.peer(), full);
                            continue;
                        }
                    }
                    if let Some(time) = self.shared.limits.silent_host.filter(|_| stream.is_tcp())
                        && let Err(error) = stream.expect_answers_within(time)
                    {
                        tracing::debug!(peer = %stream.peer(), %error, "client was gone before it was accepted");
                        continue;
                    }
                    let worker = least_loaded(&self.shared.mailboxes, self.index);
                    if worker == self.index {
                        self.add(Connection::new(stream, &self.shared));
                    } else {
                        self.shared.mailboxes[worker].send(Message::Connection(stream));
                    }
                }
                Err(error) => {
                    if self.accepts_again.is_none() {
                        self.shared.lines.no_descriptors.say(|omitted| {
                            tracing::warn!(%error, omitted, "cannot accept a connection; raise ulimit -n if this goes on");
                        });
                        self.stop_listening();
                    }
                    self.accepts_again = Some(Instant::now() + ACCEPT_PAUSE);
                    return false;
                }
            }
        }
        true
    }

    fn say_refused(&self, peer: &Peer, full: Full) {
        let flag = match full {
            Full::All(_) => "--max-connections",
            Full::Party { .. } => "--max-connections-per-peer",
        };
        self.shared.lines.one_too_many.say(|omitted| {
            tracing::warn!(%peer, omitted, "connection refused: of the connections that there may be, {full} ({flag})");
        });
    }
}
