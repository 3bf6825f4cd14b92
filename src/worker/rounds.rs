//! Connections whose clients have something to take, looked at in rounds.
//!
//! A client that leaves its replies unread holds memory, so there is a limit to how long it may. With a timer for every
//! reply a server would do little else, so there is none: a connection on which something was sent is put on a list
//! (once), the list is gone through every few seconds, and who has taken everything is struck off. An idle connection is
//! on no list.
//!
//! Over TCP it is also looked after that the kernel does not give up clients that are alive: told how long to wait for
//! a silent host, it counts a host as silent, too, that answers and only has no room, because its program reads nothing.
//! While that is so, the kernel is told to be patient.

use super::connection::Connection;
use super::event_loop::Worker;
use super::limits::Limits;
use crate::net::Outlook;
use std::time::{Duration, Instant};

/// Between rounds, at most.
const PACE: Duration = Duration::from_secs(10);
/// Connections that are looked at, before all others have a turn.
const BATCH: usize = 64;

#[derive(Debug)]
pub(super) struct Rounds {
    /// Between the beginnings of rounds; `None` when nothing is to be looked at.
    pace: Option<Duration>,
    list: Vec<Entry>,
    /// How many of the list this round has been to.
    done: usize,
    next: Option<Instant>,
}

#[derive(Debug)]
struct Entry {
    token: u64,
    /// Since when, at most one round too early, its client has left something unread.
    unread_since: Instant,
    /// Whether the kernel was told to bear with its host.
    borne_with: bool,
}

/// What a look led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// Its client has taken everything.
    Fine,
    /// Not everything; look again.
    Again,
    /// Its client has had its time.
    TooLong,
}

impl Rounds {
    pub(super) fn new(limits: &Limits) -> Self {
        // Clients have their time, and at most two rounds more. And there are several looks before the kernel gives a
        // silent host up.
        let pace = [limits.unread_reply.map(|time| time / 16), limits.silent_host.map(|time| time / 6)];
        let pace = pace.into_iter().flatten().min();
        let pace = pace.map(|pace| pace.clamp(Duration::from_millis(5), PACE));
        Self { pace, list: Vec::new(), done: 0, next: None }
    }

    /// Whether anything is to be looked at.
    pub(super) fn are_made(&self) -> bool {
        self.pace.is_some()
    }

    /// Puts a connection that is not on the list there.
    pub(super) fn add(&mut self, token: u64) {
        let now = Instant::now();
        self.list.push(Entry { token, unread_since: now, borne_with: false });
        if self.next.is_none() {
            self.next = self.pace.map(|pace| now + pace);
        }
    }

    /// When to go on.
    pub(super) fn next(&self) -> Option<Instant> {
        self.next
    }
}

impl Worker {
    /// Looks at the next connections of a round that is due.
    pub(super) fn go_round(&mut self, now: Instant) {
        let Some(pace) = self.rounds.pace.filter(|_| self.rounds.next.is_some_and(|next| next <= now)) else {
            return;
        };
        for _ in 0..BATCH {
            let Some(entry) = self.rounds.list.get_mut(self.rounds.done) else { break };
            let connection = self.connections.get_mut(&entry.token);
            match connection.map(|connection| entry.look(connection, now, pace, &self.shared.limits)) {
                Some(Look::Again) => self.rounds.done += 1,
                Some(Look::Fine) | None => {
                    self.rounds.list.swap_remove(self.rounds.done);
                }
                Some(Look::TooLong) => {
                    let Entry { token, .. } = self.rounds.list.swap_remove(self.rounds.done);
                    self.say_unread(token);
                    self.close(token);
                }
            }
        }
        if self.rounds.done < self.rounds.list.len() {
            // Others first, then the rest of this round.
            self.rounds.next = Some(now);
            return;
        }
        self.rounds.done = 0;
        self.rounds.next = (!self.rounds.list.is_empty()).then(|| now + pace);
    }

    fn say_unread(&self, token: u64) {
        let Some(connection) = self.connections.get(&token) else { return };
        self.shared.lines.unread.say(|omitted| {
            tracing::warn!(peer = %connection.peer(), omitted, "client left replies unread for too long: hung up");
        });
    }
}

impl Entry {
    /// Whether the client took what there is for it, and what to do if not.
    fn look(&mut self, connection: &mut Connection, now: Instant, pace: Duration, limits: &Limits) -> Look {
        let unread = connection.has_been_unread();
        if !unread {
            self.unread_since = now;
        } else if let Some(most) = limits.unread_reply
            && now.saturating_duration_since(self.unread_since) >= most + pace
        {
            return Look::TooLong;
        }
        let outlook = match limits.silent_host {
            Some(time) if connection.stream().is_tcp() => {
                self.be_patient(connection, time, limits.unread_reply)
            }
            _ => Outlook::Taken,
        };
        if connection.has_output() || outlook != Outlook::Taken {
            return Look::Again;
        }
        connection.is_in_rounds = false;
        Look::Fine
    }

    /// Has the kernel bear with a host that answers, as long as its program may leave something unread.
    fn be_patient(
        &mut self,
        connection: &Connection,
        silent_host: Duration,
        unread_reply: Option<Duration>,
    ) -> Outlook {
        // If the connection is lost, its next event tells.
        let outlook = connection.stream().outlook().unwrap_or(Outlook::Taken);
        if self.borne_with != (outlook == Outlook::Unread) {
            self.borne_with = !self.borne_with;
            let time = match self.borne_with {
                // Longer than this server itself waits, which then can say why it hangs up.
                true => unread_reply.map(|time| time + PACE * 2 + silent_host),
                false => Some(silent_host * 5 / 6),
            };
            if let Err(error) = connection.stream().bear_with(time) {
                tracing::debug!(%error, "cannot tell the kernel how patient to be");
            }
        }
        outlook
    }
}
