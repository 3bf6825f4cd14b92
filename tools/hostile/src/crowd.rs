//! The crowd: one event loop for all of its clients.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};

use crate::client::{Client, Clock, Fate, Next};
use crate::kind::Kind;
use crate::place::Place;
use crate::random::Random;
use crate::script::script;

/// Clients that are started before those that are there have their turn.
const STARTS: usize = 64;
/// The longest sleep: whether the crowd shall end is looked at so often.
const SLEEP: Duration = Duration::from_millis(20);

/// Who is to misbehave, how, and where.
#[derive(Clone, Debug)]
pub struct Crowd {
    /// The server.
    pub place: Place,
    /// The export.
    pub export: String,
    /// The named sessions of it that every other client asks for begin with this; a dozen clients share one of them. The
    /// other clients have a session each.
    pub session: String,
    /// The ways to misbehave, in turn.
    pub kinds: Vec<Kind>,
    /// Clients in all, or, with `goes_on`, at least.
    pub clients: usize,
    /// Clients at a time.
    pub at_once: usize,
    /// Whether clients follow one another until the crowd is told to stop.
    pub goes_on: bool,
    /// How long those who stay do so.
    pub hold: Duration,
    /// Between two bytes of a slow client.
    pub gap: Duration,
    /// Bytes of the export that are used, from its start; at least 1 MiB is taken to be there.
    pub span: u64,
    /// The same seed, the same crowd.
    pub seed: u64,
}

impl Crowd {
    /// Ten thousand of every kind, a thousand at a time, each staying for a second.
    #[must_use]
    pub fn new(place: Place, export: &str) -> Self {
        Self {
            place,
            export: export.to_owned(),
            session: "rude".to_owned(),
            kinds: Kind::ALL.to_vec(),
            clients: 10_000,
            at_once: 1000,
            goes_on: false,
            hold: Duration::from_secs(1),
            gap: Duration::from_millis(100),
            span: 1 << 20,
            seed: 1,
        }
    }
}

/// How a crowd that runs is watched, and told to end.
#[derive(Debug, Default)]
pub struct Progress {
    /// No more clients than were asked for, and those who stay end now.
    pub stop: AtomicBool,
    /// Clients that have come to what they are here for.
    pub settled: AtomicUsize,
}

/// What became of a crowd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Clients that ended as they wanted.
    pub ended: usize,
    /// Clients that the server hung up on.
    pub hung_up: usize,
    /// Clients that never got in.
    pub refused: usize,
    /// The most at a time.
    pub most_at_once: usize,
}

impl Report {
    /// Clients in all.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.ended + self.hung_up + self.refused
    }
}

/// Sends a crowd to a server; returns when all of its clients have ended.
///
/// # Errors
/// Nobody listens there, or this process has too few descriptors for so many clients at once.
pub fn run(crowd: &Crowd, progress: &Progress) -> io::Result<Report> {
    let mut running = Running {
        crowd,
        progress,
        epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        clients: HashMap::new(),
        started: 0,
        times: BinaryHeap::new(),
        scratch: vec![0; 64 << 10],
        report: Report::default(),
        random: Random::new(crowd.seed),
    };
    running.run()?;
    Ok(running.report)
}

struct Running<'a> {
    crowd: &'a Crowd,
    progress: &'a Progress,
    epoll: OwnedFd,
    clients: HashMap<u64, Client>,
    started: u64,
    /// When to look at whom again. One that has moved on since is looked at in vain, which does no harm.
    times: BinaryHeap<Reverse<(Instant, u64)>>,
    scratch: Vec<u8>,
    report: Report,
    random: Random,
}

impl Running<'_> {
    fn run(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(1024);
        let mut was_stopped = false;
        loop {
            let full = self.start()?;
            let is_stopped = self.progress.stop.load(Ordering::Relaxed);
            if is_stopped && !was_stopped {
                let all: Vec<u64> = self.clients.keys().copied().collect();
                all.into_iter().try_for_each(|token| self.drive(token))?;
                was_stopped = true;
            }
            if self.clients.is_empty() && !self.has_more() {
                return Ok(());
            }
            let sleep = if full { self.sleep() } else { Duration::from_millis(1) };
            let timeout = Timespec::try_from(sleep).map_err(io::Error::other)?;
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                let gone = EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP;
                let (token, flags) = (event.data.u64(), event.flags);
                let waits = self.clients.get(&token).map(|client| client.waits_for);
                // One that reads finds out by itself, behind what is left for it to read.
                if waits == Some(Next::Time) && flags.intersects(gone) {
                    self.end(token, Fate::HungUp);
                } else {
                    self.drive(token)?;
                }
            }
            let now = Instant::now();
            while let Some(&Reverse((due, token))) = self.times.peek()
                && due <= now
            {
                self.times.pop();
                self.drive(token)?;
            }
        }
    }

    fn has_more(&self) -> bool {
        let goes_on = self.crowd.goes_on && !self.progress.stop.load(Ordering::Relaxed);
        goes_on || self.started < self.crowd.clients as u64
    }

    fn sleep(&self) -> Duration {
        let due = self.times.peek().map(|Reverse((due, _))| due.saturating_duration_since(Instant::now()));
        due.map_or(SLEEP, |due| due.clamp(Duration::from_millis(1), SLEEP))
    }

    /// Starts clients; whether there are as many as may be.
    fn start(&mut self) -> io::Result<bool> {
        for _ in 0..STARTS {
            if self.clients.len() >= self.crowd.at_once || !self.has_more() {
                return Ok(true);
            }
            let Some(socket) = self.crowd.place.connect()? else { return Ok(false) };
            let token = self.started;
            self.started += 1;
            let kind = self.crowd.kinds[self.random.index(self.crowd.kinds.len())];
            let named = format!("{}@{}-{}", self.crowd.export, self.crowd.session, token / 24);
            let name = if token.is_multiple_of(2) { &self.crowd.export } else { &named };
            let steps = script(kind, name, self.crowd.span, &mut self.random);
            epoll::add(&self.epoll, &socket, EventData::new_u64(token), EventFlags::RDHUP)?;
            self.clients.insert(token, Client::new(socket, steps));
            self.report.most_at_once = self.report.most_at_once.max(self.clients.len());
            self.drive(token)?;
        }
        Ok(false)
    }

    fn drive(&mut self, token: u64) -> io::Result<()> {
        let Some(client) = self.clients.get_mut(&token) else { return Ok(()) };
        let clock = Clock {
            now: Instant::now(),
            is_over: self.progress.stop.load(Ordering::Relaxed),
            gap: self.crowd.gap,
            hold: self.crowd.hold,
        };
        let (was_settled, was_due) = (client.is_settled, client.due());
        let next = client.drive(clock, &mut self.scratch);
        if client.is_settled && !was_settled {
            self.progress.settled.fetch_add(1, Ordering::Relaxed);
        }
        if let Next::Over(fate) = next {
            self.end(token, fate);
            return Ok(());
        }
        if let Some(due) = client.due()
            && Some(due) != was_due
        {
            self.times.push(Reverse((due, token)));
        }
        if next != client.waits_for {
            client.waits_for = next;
            let flags = match next {
                Next::Readable => EventFlags::IN,
                Next::Writable => EventFlags::OUT,
                Next::Both => EventFlags::IN | EventFlags::OUT,
                Next::Time | Next::Over(_) => EventFlags::RDHUP,
            };
            epoll::modify(&self.epoll, client.socket().as_fd(), EventData::new_u64(token), flags)?;
        }
        Ok(())
    }

    fn end(&mut self, token: u64, fate: Fate) {
        // Its end closes its socket, which ends its events.
        if self.clients.remove(&token).is_some() {
            match fate {
                Fate::Ended => self.report.ended += 1,
                Fate::HungUp => self.report.hung_up += 1,
                Fate::Refused => self.report.refused += 1,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    /// A server that greets, takes a little, and hangs up.
    #[test]
    fn every_client_of_a_crowd_comes_to_an_end() {
        let dir = std::env::temp_dir().join(format!("memdev-hostile-{}", std::process::id()));
        let listener = UnixListener::bind(&dir).unwrap();
        let crowd = Crowd {
            clients: 220,
            at_once: 40,
            hold: Duration::from_millis(10),
            ..Crowd::new(Place::Unix(dir.clone()), "")
        };
        std::thread::spawn(move || {
            for (n, stream) in listener.incoming().flatten().enumerate() {
                let mut stream = stream;
                let _ = stream.write_all(b"NBDMAGICIHAVEOPT\0\x03");
                if n % 3 != 0 {
                    let _ = stream.read(&mut [0; 100]);
                }
            }
        });
        let progress = Progress::default();
        let report = run(&crowd, &progress).unwrap();
        let _ = std::fs::remove_file(dir);
        assert_eq!(report.clients(), 220);
        assert!(report.hung_up > 0 && report.most_at_once <= 40, "{report:?}");
    }

    #[test]
    fn a_crowd_that_stays_goes_when_it_is_told_to() {
        let dir = std::env::temp_dir().join(format!("memdev-hostile-stay-{}", std::process::id()));
        let listener = UnixListener::bind(&dir).unwrap();
        std::thread::spawn(move || {
            // It takes all that it is sent, and says nothing.
            for mut stream in listener.incoming().flatten() {
                std::thread::spawn(move || std::io::copy(&mut stream, &mut std::io::sink()));
            }
        });
        let crowd = Crowd {
            kinds: vec![Kind::Stall],
            clients: 30,
            at_once: 30,
            hold: Duration::from_secs(3600),
            ..Crowd::new(Place::Unix(dir.clone()), "")
        };
        let progress = Progress::default();
        let report = std::thread::scope(|scope| {
            let running = scope.spawn(|| run(&crowd, &progress));
            while progress.settled.load(Ordering::Relaxed) < 30 {
                std::thread::sleep(Duration::from_millis(1));
            }
            progress.stop.store(true, Ordering::Relaxed);
            running.join().unwrap().unwrap()
        });
        let _ = std::fs::remove_file(dir);
        assert_eq!(report, Report { ended: 30, most_at_once: 30, ..Report::default() });
    }
}
