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
const BATCH: usize = 256;

#[derive(Debug)]
pub(super) struct Rounds {
    /// Between the beginnings of rounds; `None` when nothing is to be looked at.
    pace: Option<Duration>,
    tokens: Vec<u64>,
    /// How many of the tokens this round has been to.
    done: usize,
    next: Option<Instant>,
}

/// What a look led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Its client has taken everything.
    Fine,
    /// Not everything; look again.
    Again,
    /// Its client has had its time.
    TooLong,
}

impl Rounds {
    pub(super) fn new(limits: &Limits) -> Self {
        // Often enough for an eighth more than the time that clients have; and twice, at the least, before the kernel
        // gives a silent host up.
        let pace = [limits.unread_reply.map(|time| time / 8), limits.silent_host.map(|time| time / 6)];
        let pace = pace.into_iter().flatten().min();
        let pace = pace.map(|pace| pace.clamp(Duration::from_millis(5), PACE));
        Self { pace, tokens: Vec::new(), done: 0, next: None }
    }

    /// Whether anything is to be looked at.
    pub(super) fn are_made(&self) -> bool {
        self.pace.is_some()
    }

    /// Puts a connection that is not on the list there.
    pub(super) fn add(&mut self, token: u64) {
        self.tokens.push(token);
        if self.next.is_none() {
            self.next = self.pace.map(|pace| Instant::now() + pace);
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
        if self.rounds.next.is_none_or(|next| next > now) {
            return;
        }
        for _ in 0..BATCH {
            let Some(&token) = self.rounds.tokens.get(self.rounds.done) else { break };
            match self.connections.get_mut(&token).map(|connection| connection.look(now, &self.shared.limits))
            {
                Some(Look::Again) => self.rounds.done += 1,
                Some(Look::Fine) | None => {
                    self.rounds.tokens.swap_remove(self.rounds.done);
                }
                Some(Look::TooLong) => {
                    self.rounds.tokens.swap_remove(self.rounds.done);
                    self.say_unread(token);
                    self.close(token);
                }
            }
        }
        if self.rounds.done < self.rounds.tokens.len() {
            // Others first, then the rest of this round.
            self.rounds.next = Some(now);
            return;
        }
        self.rounds.done = 0;
        self.rounds.next = self.rounds.pace.filter(|_| !self.rounds.tokens.is_empty()).map(|pace| now + pace);
    }

    fn say_unread(&self, token: u64) {
        if let (Some(connection), Some(omitted)) = (self.connections.get(&token), self.shared.unread.say()) {
            tracing::warn!(peer = %connection.peer(), omitted, "client left replies unread for too long: hung up");
        }
    }
}

impl Connection {
    /// Whether its client took what there is for it, and what to do if not.
    fn look(&mut self, now: Instant, limits: &Limits) -> Look {
        let unread = self.unread_since.map(|since| now.saturating_duration_since(since));
        if let (Some(unread), Some(most)) = (unread, limits.unread_reply)
            && unread >= most
        {
            return Look::TooLong;
        }
        let outlook = match limits.silent_host {
            Some(time) if self.stream().is_tcp() => self.be_patient(time, limits.unread_reply),
            _ => Outlook::Taken,
        };
        if unread.is_some() || outlook != Outlook::Taken {
            return Look::Again;
        }
        self.is_in_rounds = false;
        Look::Fine
    }

    /// Has the kernel bear with a host that answers, as long as its program may leave something unread.
    fn be_patient(&mut self, silent_host: Duration, unread_reply: Option<Duration>) -> Outlook {
        // If the connection is lost, its next event tells.
        let outlook = self.stream().outlook().unwrap_or(Outlook::Taken);
        if self.is_borne_with != (outlook == Outlook::Unread) {
            self.is_borne_with = !self.is_borne_with;
            // Longer than this server itself waits, which then can say why it hangs up.
            let time = if self.is_borne_with {
                unread_reply.map(|time| time + PACE + silent_host)
            } else {
                Some(silent_host * 5 / 6)
            };
            if let Err(error) = self.stream().bear_with(time) {
                tracing::debug!(%error, "cannot tell the kernel how patient to be");
            }
        }
        outlook
    }
}
