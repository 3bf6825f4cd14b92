//! A worker: one event loop, and the connections that were given to it.

use super::Shared;
use super::cold::{self, Order};
use super::connection::{Connection, Next, Tools};
use super::hold::GRACE;
use super::mailbox::{Inbox, Message};
use super::payload_memory::Buffers;
use super::polling::Polling;
use super::rounds::Rounds;
use crate::error::{Error, Result};
use crate::overlay::Magazine;
use crate::transmission::{Need, Share};
use rustix::event::{Timespec, epoll};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Events that are taken at a time. Among many, whoever streams has one turn for each so many of others'.
const EVENTS: usize = 64;
/// After so long without anything to do, block memory that is kept ready is given back.
const IDLE: Duration = Duration::from_millis(200);

/// For so long after several connections had something to do at the same time, turns are short: while one has its turn, another
/// can only wait for it.
const CROWDED: Duration = Duration::from_millis(10);

/// The bell's token; a listener's is this, less one, less its index. Connections count up from 0.
pub(super) const BELL: u64 = u64::MAX;

pub(super) struct Worker {
    pub(super) index: usize,
    pub(super) shared: Arc<Shared>,
    pub(super) epoll: OwnedFd,
    inbox: Inbox,
    pub(super) connections: HashMap<u64, Connection>,
    next_token: u64,
    /// The lowest token of a listener.
    first_listener: u64,
    /// Connections that have work and wait for their turn.
    again: VecDeque<u64>,
    /// Handshakes in the order in which they began.
    pub(super) handshakes: VecDeque<(Instant, u64)>,
    /// Connections to look at again when they may be certain of their client, in that order.
    pub(super) doubts: VecDeque<(Instant, u64)>,
    /// Connections that wait because of their sessions' caps, and until when.
    pub(super) paced: BTreeSet<(Instant, u64)>,
    /// When several connections had something to do at the same time, the last time.
    crowded: Option<Instant>,
    /// Connections whose clients may have something to take.
    pub(super) rounds: Rounds,
    pub(super) accepts_again: Option<Instant>,
    polling: Polling,
    tools: Tools,
}

impl Worker {
    /// `buffers` are what it lends to its connections.
    pub(super) fn new(index: usize, inbox: Inbox, buffers: Buffers, shared: Arc<Shared>) -> Result<Self> {
        let failed = |error: rustix::io::Errno| Error::io("Cannot set up an event loop", error);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?;
        epoll::add(&epoll, inbox.bell(), epoll::EventData::new_u64(BELL), epoll::EventFlags::IN)
            .map_err(failed)?;
        let magazine = Magazine::new(Arc::clone(shared.registry.pool()));
        let rounds = Rounds::new(&shared.limits);
        let first_listener = BELL - shared.listeners().len() as u64;
        let worker = Self {
            index,
            shared,
            epoll,
            inbox,
            connections: HashMap::new(),
            next_token: 0,
            first_listener,
            again: VecDeque::new(),
            handshakes: VecDeque::new(),
            doubts: VecDeque::new(),
            paced: BTreeSet::new(),
            crowded: None,
            rounds,
            accepts_again: None,
            polling: Polling::default(),
            tools: Tools::new(magazine, buffers),
        };
        worker.listen().map_err(failed)?;
        Ok(worker)
    }

    /// The worker's life, until the server stops.
    pub(super) fn run(mut self) {
        let mut events = Vec::with_capacity(EVENTS);
        let mut idle = false;
        while !self.shared.stopping.load(Ordering::Acquire) {
            let sleep = if !self.again.is_empty() || self.polling.look() {
                Some(Duration::ZERO)
            } else {
                [self.next_deadline(), (!idle).then_some(IDLE)].into_iter().flatten().min()
            };
            let timeout = sleep.and_then(|sleep| Timespec::try_from(sleep).ok());
            events.clear();
            let waited =
                epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref());
            if let Err(error) = waited
                && error != rustix::io::Errno::INTR
            {
                tracing::error!(%error, "event loop failed");
                break;
            }
            if events.is_empty() && self.again.is_empty() {
                if sleep == Some(Duration::ZERO) {
                    // Looking for work must not keep the processor from whoever makes it.
                    rustix::thread::sched_yield();
                } else {
                    idle = true;
                    self.tools.magazine.flush();
                    self.tools.wipe();
                }
            } else {
                idle = false;
                self.polling.found();
                self.tools.now = Instant::now();
                self.share_out(events.len() + self.again.len());
            }
            self.tools.scratch.begin_turn();
            for event in &events {
                match event.data.u64() {
                    BELL => self.read_mail(),
                    token if token >= self.first_listener => {
                        self.accept(usize::try_from(BELL - 1 - token).unwrap_or(0));
                    }
                    token => self.on_event(token, event.flags),
                }
            }
            for _ in 0..self.again.len() {
                if let Some(token) = self.again.pop_front() {
                    self.drive(token);
                }
            }
            self.check_deadlines();
        }
        self.close_all();
    }

    /// Decides what a connection may do in its turn: where several have something to do, each does a little.
    fn share_out(&mut self, active: usize) {
        let now = self.tools.now;
        if active > 1 {
            self.crowded = Some(now);
        }
        let crowded = self.crowded.is_some_and(|time| now.saturating_duration_since(time) < CROWDED);
        self.tools.share = if crowded { Share::FAIR } else { Share::ALL };
    }

    fn close_all(mut self) {
        while let Some(message) = self.inbox.next() {
            drop(message);
        }
        for (_, connection) in self.connections.drain() {
            connection.close(&mut self.tools.magazine, &self.shared);
        }
    }

    fn read_mail(&mut self) {
        self.inbox.silence();
        while let Some(message) = self.inbox.next() {
            match message {
                Message::Connection(stream) => self.add(Connection::new(stream, &self.shared)),
                Message::Resumed(stream, handshake, input) => {
                    self.add(Connection::resumed(stream, handshake, input));
                }
                Message::StopListening => self.give_way(),
                Message::CapsChanged => self.go_on_with_paced(None),
                Message::Warmed { token, done } => {
                    if let Some(connection) = self.connections.get_mut(&token) {
                        done.into_iter().for_each(|done| connection.warmed(done.ticket, done.is_readable));
                        // One that waits for its client to read must not make more for it to read; one whose turn
                        // comes anyway needs no other.
                        if !matches!(
                            connection.waits_for,
                            Next::Writable | Next::WritableOrReadable | Next::Again
                        ) {
                            self.drive(token);
                        }
                    }
                }
            }
        }
    }

    /// Takes over a connection that was counted for this worker.
    pub(super) fn add(&mut self, connection: Connection) {
        let token = self.next_token;
        self.next_token += 1;
        let added = epoll::add(
            &self.epoll,
            connection.socket(),
            epoll::EventData::new_u64(token),
            epoll::EventFlags::IN,
        );
        if let Err(error) = added {
            tracing::warn!(peer = %connection.peer(), %error, "cannot watch a connection");
            self.count_one_less();
            return;
        }
        if let Some(time) = self.shared.limits.handshake {
            self.handshakes.push_back((Instant::now() + time, token));
        }
        self.connections.insert(token, connection);
        self.drive(token);
    }

    fn count_one_less(&self) {
        self.shared.mailboxes[self.index].count_one_less();
    }

    fn on_event(&mut self, token: u64, flags: epoll::EventFlags) {
        let gone = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
        let waits_for = self.connections.get(&token).map(|connection| connection.waits_for);
        match waits_for {
            // Nobody is there to read a reply. One that waits for input is driven, so that it learns of what is left
            // of it first.
            Some(Next::Warmed | Next::Paced | Next::Writable | Next::WritableOrReadable) if gone => {
                self.close(token)
            }
            // Its turn comes.
            Some(Next::Again) | None => {}
            Some(_) => self.drive(token),
        }
    }

    pub(super) fn drive(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let next = connection.drive(&mut self.tools, &self.shared);
        let orders = &mut self.tools.orders;
        while !orders.is_empty() {
            let to = if matches!(orders[0].need, Need::Base) { &self.shared.cold } else { &self.shared.away };
            let warms = orders.drain(..cold::fit_together(orders)).collect();
            // They live as long as the workers do.
            let _ = to.send(Order::Warm { worker: self.index, token, warms });
        }
        match next {
            Next::Close => return self.close(token),
            Next::Again => self.again.push_back(token),
            Next::Certainty if !connection.is_doubted => {
                connection.is_doubted = true;
                self.doubts.push_back((Instant::now() + GRACE, token));
            }
            _ => {}
        }
        if connection.timer != connection.paced_until {
            if let Some(time) = std::mem::replace(&mut connection.timer, connection.paced_until) {
                self.paced.remove(&(time, token));
            }
            self.paced.extend(connection.timer.map(|time| (time, token)));
        }
        if !connection.is_in_rounds && connection.may_be_unread() && self.rounds.are_made() {
            connection.is_in_rounds = true;
            self.rounds.add(token);
        }
        if next != connection.waits_for {
            let flags = match next {
                Next::Readable | Next::Certainty => epoll::EventFlags::IN,
                Next::Writable => epoll::EventFlags::OUT,
                Next::WritableOrReadable => epoll::EventFlags::OUT | epoll::EventFlags::IN,
                // Only that the client is gone is still of interest, which is told always.
                Next::Again | Next::Warmed | Next::Paced | Next::Close => epoll::EventFlags::empty(),
            };
            let data = epoll::EventData::new_u64(token);
            if let Err(error) = epoll::modify(&self.epoll, connection.socket(), data, flags) {
                tracing::warn!(%error, "cannot watch a connection");
                return self.close(token);
            }
            connection.waits_for = next;
        }
    }

    pub(super) fn close(&mut self, token: u64) {
        if let Some(connection) = self.connections.remove(&token) {
            if let Some(time) = connection.timer {
                self.paced.remove(&(time, token));
            }
            // Closing its descriptor also ends its events, but that waits for the session to let go of it.
            let _ = epoll::delete(&self.epoll, connection.socket());
            connection.close(&mut self.tools.magazine, &self.shared);
            self.tools.magazine.wipe();
            self.tools.wipe();
            self.count_one_less();
        }
    }
}
