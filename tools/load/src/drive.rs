//! The event loop: parse all replies that arrived, refill all free slots, one send; and again.

use std::io;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use memdev::{Error, ErrorKind, Result};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::lane::{Lane, Tally};
use crate::pattern::{Plan, Random, Source};
use crate::target::{PATIENCE, Target, widen};

/// One receive takes at most this much: a batch of 4 KiB replies at depth 64, and still inside a core's cache.
const RECEIVE: usize = 256 << 10;

/// How much load, and for how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Requests in flight on each connection.
    pub(crate) depth: u32,
    /// The run ends after this time,
    pub(crate) time: Duration,
    /// or when each connection has issued its share of this many requests.
    pub(crate) requests: Option<u64>,
}

/// What a run has shown.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) tally: Tally,
    /// The time over which the rate counts: up to the last answer or the time limit.
    pub(crate) elapsed: Duration,
    /// CPU seconds that this process used during the run.
    pub(crate) client_cpu: f64,
}

/// Opens `count` connections.
pub(crate) fn connect(target: &Target, count: u64, plan: &Plan) -> Result<Vec<Lane>> {
    let lanes = (0..count).map(|_| {
        let connection = target.connect()?;
        if plan.span > connection.size || plan.span < u64::from(plan.block) {
            return Err(Error::new(
                ErrorKind::Invalid,
                "The span must hold a block and lie inside the export",
            )
            .on(format!("({} of {} bytes)", plan.span, connection.size)));
        }
        widen(&connection.stream);
        Ok(Lane::new(connection))
    });
    lanes.collect()
}

/// Drives all `lanes` with `plan`, on `threads` threads; `shared`: they divide its places between them.
pub(crate) fn drive(
    lanes: &mut [Lane],
    plan: &Plan,
    limits: Limits,
    shared: bool,
    threads: usize,
) -> Result<Outcome> {
    let count = lanes.len() as u64;
    for (index, lane) in (0..).zip(lanes.iter_mut()) {
        let source = if shared {
            Source::new(plan, index, count)
        } else {
            Source::new(&Plan { seed: plan.seed.wrapping_add(index), ..*plan }, 0, 1)
        };
        let share = limits.requests.map_or(u64::MAX, |all| all / count + u64::from(index < all % count));
        lane.load(source, limits.depth, share);
    }
    let mut noise = vec![0; plan.block as usize];
    Random::new(plan.seed).fill(&mut noise);
    let noise = &noise;
    let chunk = lanes.len().div_ceil(threads.max(1)).max(1);
    let barrier = Barrier::new(lanes.len().div_ceil(chunk));
    let barrier = &barrier;
    let cpu = cpu_seconds();
    let begin = Instant::now();
    let outcomes = std::thread::scope(|scope| {
        let threads: Vec<_> = lanes
            .chunks_mut(chunk)
            .map(|lanes| {
                scope.spawn(move || {
                    barrier.wait();
                    let mut driver = Driver::new(begin, limits.time, noise);
                    match lanes {
                        [lane] => driver.one(lane)?,
                        lanes => driver.many(lanes)?,
                    }
                    Ok(driver.tally)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a driver does not panic")).collect::<Vec<_>>()
    });
    let mut tally = Tally::new();
    for outcome in outcomes {
        let part: io::Result<Tally> = outcome;
        tally.add(&part.map_err(|e| Error::io("The load was cut short", e))?);
    }
    // A run that was bounded by its requests ended with the last answer, not with the time that it might have used.
    let ended = if begin.elapsed() > limits.time { limits.time } else { Duration::from_nanos(tally.last) };
    Ok(Outcome { tally, elapsed: ended, client_cpu: cpu_seconds() - cpu })
}

/// One thread's state while it drives its lanes.
struct Driver<'a> {
    begin: Instant,
    /// When the run is over, in nanoseconds since `begin`.
    until: u64,
    noise: &'a [u8],
    buffer: Vec<u8>,
    tally: Tally,
}

impl<'a> Driver<'a> {
    fn new(begin: Instant, time: Duration, noise: &'a [u8]) -> Self {
        let until = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Self { begin, until, noise, buffer: vec![0; RECEIVE], tally: Tally::new() }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.begin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// One receive and what follows from it; then whether the lane is through.
    fn turn(&mut self, lane: &mut Lane, wait: bool) -> io::Result<bool> {
        let begin = self.begin;
        let clock = || u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        lane.receive(&mut self.buffer, wait, clock, self.until, &mut self.tally)?;
        let now = self.now();
        if now > self.until {
            lane.stop();
        }
        lane.refill(now, self.noise)?;
        Ok(lane.in_flight() == 0)
    }

    /// A single connection needs no event queue: it waits in the receive itself, which is one system call less a
    /// batch. Only while the socket is full does it wait for both directions.
    fn one(&mut self, lane: &mut Lane) -> io::Result<()> {
        lane.refill(self.now(), self.noise)?;
        while lane.in_flight() > 0 {
            if self.now() > self.until + PATIENCE_NANOS {
                return Err(io::Error::other("the server did not answer all requests"));
            }
            let wait = !lane.wants_to_send();
            if !wait {
                let stream = lane.stream();
                let mut fds = [PollFd::from_borrowed_fd(stream, PollFlags::IN | PollFlags::OUT)];
                match poll(&mut fds, Some(&SECOND)) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            self.turn(lane, wait)?;
        }
        Ok(())
    }

    fn many(&mut self, lanes: &mut [Lane]) -> io::Result<()> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut sending = vec![false; lanes.len()];
        let mut open = 0_usize;
        for (index, lane) in lanes.iter_mut().enumerate() {
            epoll::add(&epoll, lane.stream(), EventData::new_u64(index as u64), EventFlags::IN)?;
            lane.refill(self.now(), self.noise)?;
            open += usize::from(lane.in_flight() > 0);
            watch(&epoll, index, lane, &mut sending[index])?;
        }
        let mut events = Vec::with_capacity(256);
        while open > 0 {
            if self.now() > self.until + PATIENCE_NANOS {
                return Err(io::Error::other("the server did not answer all requests"));
            }
            events.clear();
            match epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), Some(&SECOND)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                let index = usize::try_from(event.data.u64()).expect("an index that was given");
                let lane = &mut lanes[index];
                let busy = lane.in_flight() > 0;
                let through = self.turn(lane, false)?;
                open -= usize::from(busy && through);
                watch(&epoll, index, lane, &mut sending[index])?;
            }
        }
        Ok(())
    }
}

const PATIENCE_NANOS: u64 = PATIENCE.as_secs() * 1_000_000_000;
const SECOND: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Listens for room in the socket exactly while the lane waits for it.
fn watch(epoll: &impl std::os::fd::AsFd, index: usize, lane: &Lane, sending: &mut bool) -> io::Result<()> {
    if *sending != lane.wants_to_send() {
        *sending = lane.wants_to_send();
        let flags = if *sending { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
        epoll::modify(epoll, lane.stream(), EventData::new_u64(index as u64), flags)?;
    }
    Ok(())
}

/// CPU time of this process so far.
pub(crate) fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default().as_secs_f64()
}
