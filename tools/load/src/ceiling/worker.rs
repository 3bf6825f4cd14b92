//! One event loop of the ceiling: receive all that arrived, parse all, one send.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use memdev::net::Stream;
use memdev::proto::{Command, Request, simple_reply};
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::{RecvFlags, recv};

use super::image::{Image, Reply};

/// One receive takes at most this much.
const RECEIVE: usize = 256 << 10;
/// Receives in a row before others have a turn: more has often come while the batch before was answered.
const ROUNDS: usize = 4;
/// How long to look for work before going to sleep, as long as the work comes within this time: as memdev's workers do.
const POLL: Duration = Duration::from_micros(50);

/// A handle on a running event loop.
pub(super) struct Worker {
    epoll: Arc<OwnedFd>,
    inbox: Sender<(u64, Arc<Stream>)>,
}

impl Worker {
    /// Starts an event loop in a thread of its own.
    pub(super) fn start(image: Arc<Image>) -> io::Result<Self> {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let (inbox, streams) = channel();
        let events = Arc::clone(&epoll);
        std::thread::Builder::new().name("ceiling".into()).spawn(move || {
            let mut turns = Loop { image, epoll: events, streams, connections: HashMap::new() };
            if let Err(error) = turns.run() {
                eprintln!("memdev-load: The ceiling's event loop ended: {error}");
            }
        })?;
        Ok(Self { epoll, inbox })
    }

    /// Gives the loop a connection in its transmission phase, under a number that no other one has.
    pub(super) fn adopt(&self, number: u64, stream: Stream) -> io::Result<()> {
        let stream = Arc::new(stream);
        // The loop looks into the inbox at the first event whose number it does not know, so the stream must lie
        // there before there can be an event.
        self.inbox.send((number, Arc::clone(&stream))).map_err(io::Error::other)?;
        epoll::add(&self.epoll, &stream, EventData::new_u64(number), EventFlags::IN)?;
        Ok(())
    }
}

struct Loop {
    image: Arc<Image>,
    epoll: Arc<OwnedFd>,
    streams: Receiver<(u64, Arc<Stream>)>,
    connections: HashMap<u64, Connection>,
}

impl Loop {
    fn run(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; RECEIVE];
        let mut events = Vec::with_capacity(256);
        let (mut busy, mut poll) = (Instant::now(), true);
        loop {
            let polling = poll && busy.elapsed() < POLL;
            let timeout = polling.then_some(&NOW);
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if events.is_empty() {
                // Looking for work must not keep the processor from whoever makes it.
                rustix::thread::sched_yield();
                continue;
            }
            // Polling pays only while the next request comes sooner than a sleep and a wake-up would take.
            poll = busy.elapsed() < POLL;
            for event in &events {
                self.turn(event.data.u64(), &mut buffer)?;
            }
            busy = Instant::now();
        }
    }

    /// A turn for the connection that is ready.
    fn turn(&mut self, number: u64, buffer: &mut [u8]) -> io::Result<()> {
        if !self.connections.contains_key(&number) {
            self.connections
                .extend(self.streams.try_iter().map(|(number, stream)| (number, Connection::new(stream))));
        }
        let Some(connection) = self.connections.get_mut(&number) else { return Ok(()) };
        let was_sending = connection.sending();
        let open = connection.turn(&self.image, buffer);
        if open.is_err() {
            epoll::delete(&self.epoll, &connection.stream)?;
            self.connections.remove(&number);
        } else if connection.sending() != was_sending {
            let flags = if connection.sending() { EventFlags::OUT } else { EventFlags::IN };
            epoll::modify(&self.epoll, &connection.stream, EventData::new_u64(number), flags)?;
        }
        Ok(())
    }
}

const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// Why a connection is over: the client left, or sent what cannot be followed.
struct Over;

struct Connection {
    stream: Arc<Stream>,
    /// The start of a request whose rest has not arrived.
    carry: [u8; Request::SIZE],
    carried: usize,
    /// Bytes of a write's payload still to be dropped.
    dropping: usize,
    /// The answer to that write.
    dropped: Option<Reply>,
    /// Answers that the socket has not taken; nothing is received meanwhile.
    replies: Vec<Reply>,
    /// Bytes of the first of them that it has.
    sent: usize,
}

impl Connection {
    fn new(stream: Arc<Stream>) -> Self {
        Self {
            stream,
            carry: [0; Request::SIZE],
            carried: 0,
            dropping: 0,
            dropped: None,
            replies: Vec::new(),
            sent: 0,
        }
    }

    fn sending(&self) -> bool {
        !self.replies.is_empty()
    }

    fn turn(&mut self, image: &Image, buffer: &mut [u8]) -> Result<(), Over> {
        self.send(image)?;
        for _ in 0..ROUNDS {
            if self.sending() || !self.receive(image, buffer)? {
                break;
            }
            self.send(image)?;
        }
        Ok(())
    }

    /// Whether anything had arrived.
    fn receive(&mut self, image: &Image, buffer: &mut [u8]) -> Result<bool, Over> {
        buffer[..self.carried].copy_from_slice(&self.carry[..self.carried]);
        let received = match recv(&self.stream, &mut buffer[self.carried..], RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Err(Over),
            Ok((_, received)) => received,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(false),
            Err(_) => return Err(Over),
        };
        let mut rest = &buffer[..self.carried + received];
        loop {
            let here = self.dropping.min(rest.len());
            self.dropping -= here;
            rest = &rest[here..];
            if self.dropping == 0 {
                self.replies.extend(self.dropped.take());
            }
            let Some((request, behind)) = rest.split_first_chunk() else { break };
            rest = behind;
            self.answer(request, image)?;
        }
        self.carry[..rest.len()].copy_from_slice(rest);
        self.carried = rest.len();
        Ok(true)
    }

    /// Queues the answer, that of a write for when its payload has been dropped.
    fn answer(&mut self, request: &[u8; Request::SIZE], image: &Image) -> Result<(), Over> {
        let request = Request::parse(request).map_err(|_| Over)?;
        let offset = usize::try_from(request.offset).map_err(|_| Over)?;
        let length = request.length as usize;
        let mut reply = Reply { header: simple_reply(None, request.cookie), offset: 0, length: 0 };
        match request.command {
            Command::Read if image.holds(offset, length) => (reply.offset, reply.length) = (offset, length),
            Command::Read | Command::Disc => return Err(Over),
            Command::Write => {
                self.dropping = length;
                self.dropped = Some(reply);
                return Ok(());
            }
            _ => {}
        }
        self.replies.push(reply);
        Ok(())
    }

    fn send(&mut self, image: &Image) -> Result<(), Over> {
        let mut first = 0;
        while first < self.replies.len() {
            match image.send(self.stream.as_fd(), &self.replies[first..], self.sent) {
                Ok(taken) => self.sent += taken,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Over),
            }
            while let Some(size) = self.replies.get(first).map(Reply::size).filter(|&size| size <= self.sent)
            {
                self.sent -= size;
                first += 1;
            }
        }
        self.replies.drain(..first);
        Ok(())
    }
}
