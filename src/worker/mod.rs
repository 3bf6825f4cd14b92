//! The server as a running thing: a fixed number of workers with event loops, and helpers for what takes time.
//!
//! ```text
//!   listeners ─┬─> worker 0: epoll, its connections, one receive buffer, one magazine of block memory
//!              └─> worker 1: ...                    │ cold base pages            ^ they are here
//!                                                   └──────> warmers: may wait for a disk
//!   control: answers those who look after the server
//!   housekeeper: ends sessions     tender: keeps block memory ready, wipes     watcher: pages that the kernel dropped
//! ```
//!
//! A connection stays on the worker that it was given to, and no worker ever waits for anything but its events.

mod accepting;
mod cold;
mod connection;
mod deadlines;
mod environment;
mod event_loop;
mod hold;
mod limits;
mod mailbox;
mod memory;
mod payload_memory;
mod polling;
mod rounds;
mod sealed;
mod seldom;
mod succession;
mod wire;

pub use limits::Limits;
pub use memory::default_budget;
pub use payload_memory::{LockMemory, Memory};

use crate::base::Source;
use crate::control;
use crate::error::{Error, ErrorKind, Result};
use crate::handshake::{Knobs, TlsPolicy};
use crate::net::tls::ServerTls;
use crate::net::{Listener, Party, Stream, Tally};
use crate::overlay::{BlockSize, Budget};
use crate::session::{self, Caps, Registry};
use crate::sys;
use crate::takeover::{self, Bridge, Collected, Outbox};
use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use event_loop::Worker;
use mailbox::{Inbox, Mailbox, Message};
use payload_memory::Buffers;
use seldom::Lines;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use succession::Doors;

/// Threads that may wait for a disk, each for one read or for some short ones that it has begun: as many as a disk does well at a time.
const WARMERS: usize = 16;

/// What a server serves, where, and within which limits.
#[derive(Debug)]
pub struct ServerConfig {
    /// Export names and image paths; the first is also the empty export.
    pub images: Vec<(String, PathBuf)>,
    /// Where clients come in.
    pub listeners: Vec<Listener>,
    /// Clients that are there already.
    pub connections: Vec<Stream>,
    /// Event loops.
    pub workers: usize,
    /// Bytes for all overlays; without it half of the machine's memory, or of what this process may use of it.
    pub memory: Option<u64>,
    /// Whether what sessions write is kept out of swap.
    pub lock_memory: LockMemory,
    /// Whether the blocks of every session are ciphertext in memory; else those of sessions that were asked to be.
    pub seal: bool,
    /// Where blocks go that memory is short for: a directory, and the bytes that may lie there. Of sealed sessions only.
    pub overflow: Option<(PathBuf, u64)>,
    /// Bytes of data for one session's overlay; without it as much as for all.
    pub session_memory: Option<u64>,
    /// How much one session may be asked to do in a second.
    pub session_caps: Caps,
    /// The overlays' unit.
    pub block_size: BlockSize,
    /// How long a named session stays when nobody is in it.
    pub linger: Duration,
    /// What the handshake offers.
    pub knobs: Knobs,
    /// How much clients may have, and for how long they may keep the server waiting.
    pub limits: Limits,
    /// How to do TLS; must be there if `knobs` offers it.
    pub tls: Option<ServerTls>,
    /// Where control clients come in: a unix socket that its owner only may connect to.
    pub control: Option<Listener>,
}

/// What all threads of a server share.
#[derive(Debug)]
struct Shared {
    registry: Arc<Registry>,
    /// Empty once the server stops, or has given way to another.
    listeners: RwLock<Vec<Listener>>,
    /// Workers that have not let go of the listeners yet, when the server gives way.
    listening: AtomicUsize,
    outbox: Outbox,
    mailboxes: Vec<Mailbox>,
    cold: Sender<cold::Order>,
    away: Sender<cold::Order>,
    block_size: BlockSize,
    knobs: Knobs,
    limits: Limits,
    /// Who is connected.
    connections: Arc<Tally>,
    tls: Option<ServerTls>,
    /// The lines of the log that clients can provoke.
    lines: Lines,
    /// Bytes of input that doubtful connections keep.
    held: Arc<AtomicUsize>,
    stopping: AtomicBool,
}

impl Shared {
    fn listeners(&self) -> RwLockReadGuard<'_, Vec<Listener>> {
        self.listeners.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the listeners and removes their socket files.
    fn stop_listening(&self) {
        self.listeners.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    helpers: Vec<JoinHandle<()>>,
    tender: Option<JoinHandle<()>>,
    control: Option<(JoinHandle<()>, control::Stopper)>,
    over: Receiver<()>,
    /// Kept, so that `over` has two ends.
    done: Sender<()>,
    /// The server whose place this one takes, and the memory that this one may use when that has ended; until the control
    /// thread has it.
    before: Arc<Mutex<Option<(Bridge, u64)>>>,
}

impl Server {
    /// Opens the images and starts to serve. The process' allocator keeps less for later from then on. Threads that wait for the disk
    /// are started when there is something to wait for: a program that is to confine itself takes [`Server::start_when`].
    ///
    /// # Errors
    /// When an image cannot be served, or the system has no more threads, descriptors or address space.
    pub fn start(config: ServerConfig) -> Result<Self> {
        let memory = Memory::reserve(&config)?;
        Self::start_with(config, memory, Warmers::OnDemand, |_| Ok(()))
    }

    /// Opens the images, starts all threads that the server will ever have, and serves no client before `ready` has
    /// returned: so that it can do to all of them what must be done before (see [`crate::confine`]). `memory` was reserved for
    /// `config`.
    ///
    /// # Errors
    /// As [`Server::start`], and what `ready` returns, which gets the server.
    pub fn start_when(
        config: ServerConfig,
        memory: Memory,
        ready: impl FnOnce(&Self) -> Result<()>,
    ) -> Result<Self> {
        Self::start_with(config, memory, Warmers::AtOnce, ready)
    }

    fn start_with(
        config: ServerConfig,
        memory: Memory,
        warmers: Warmers,
        ready: impl FnOnce(&Self) -> Result<()>,
    ) -> Result<Self> {
        sys::heap::keep_little();
        let Memory { limit, pool, buffers, warnings } = memory;
        let sources =
            config.images.iter().map(|(name, path)| Source::open(name, path)).collect::<Result<Vec<_>>>()?;
        // Only now: if an image cannot be opened, that is all that is of interest.
        warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        let count = buffers.len();
        // A worker has its epoll and its bell. An image may be replaced, and then is open twice for a while.
        // The control thread has its socket, two bells and two bridges.
        let controls = config.control.as_ref().map_or(0, |_| 5 + control::MOST_CLIENTS);
        let others = 2 * count + config.listeners.len() + 2 * config.images.len() + controls;
        let connections = config.limits.most_connections(others)?;
        let limits = session::Limits {
            session_memory: config.session_memory.unwrap_or(limit),
            linger: config.linger,
            sessions: config.limits.most_sessions(connections),
            caps: config.session_caps,
            seal: config.seal,
        };
        let registry = Registry::new(sources, Arc::clone(&pool), Budget::total(limit), limits);

        let (mailboxes, inboxes): (Vec<_>, Vec<_>) =
            (0..count).map(|_| mailbox::open()).collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let ((cold, orders), (away, moves)) = (unbounded(), unbounded());
        let (outbox, collected) = takeover::outbox()?;
        let shared = Arc::new(Shared {
            registry: Arc::clone(&registry),
            listeners: RwLock::new(config.listeners),
            listening: AtomicUsize::new(0),
            outbox,
            mailboxes,
            cold,
            away,
            block_size: config.block_size,
            knobs: config.knobs,
            limits: config.limits,
            connections: Tally::new(connections),
            tls: config.tls,
            lines: Lines::default(),
            held: Arc::default(),
            stopping: AtomicBool::new(false),
        });

        // Not to be kept by what it keeps.
        let workers = Arc::downgrade(&shared);
        registry.when_caps_change(move || {
            let shared = workers.upgrade();
            shared
                .iter()
                .flat_map(|shared| &shared.mailboxes)
                .for_each(|mailbox| mailbox.send(Message::CapsChanged));
        });
        let (done, given_way) = bounded(1);
        let over = if shared.listeners().is_empty() { shared.connections.empty().clone() } else { given_way };
        let mut server = Self {
            shared,
            workers: Vec::new(),
            helpers: Vec::new(),
            tender: None,
            control: None,
            over,
            done,
            before: Arc::default(),
        };
        // Nothing is ever sent: the workers wait until this end of it is gone.
        let (gate, opened) = bounded(0);
        let started = server
            .begin(config.connections)
            .and_then(|()| {
                server.start_threads(inboxes.into_iter().zip(buffers), (&orders, &moves), warmers, &opened)
            })
            .and_then(|()| match config.control {
                Some(listener) => server.start_control(listener, collected, &opened),
                None => Ok(()),
            })
            .and_then(|()| ready(&server));
        if started.is_err() {
            server.shared.stopping.store(true, Ordering::Release);
        }
        drop(gate);
        match started {
            Ok(()) => Ok(server),
            Err(error) => {
                // Those that were started must not keep the sockets; what they may say is of no interest any more.
                let _ = server.stop();
                Err(error)
            }
        }
    }

    /// Takes in the clients that are there already.
    fn begin(&self, connections: Vec<Stream>) -> Result<()> {
        let shared = &self.shared;
        for (mut stream, mailbox) in connections.into_iter().zip(shared.mailboxes.iter().cycle()) {
            let refused =
                |full| Error::new(ErrorKind::OutOfSpace, format!("No room for a connection: {full}"));
            let place = shared.connections.enter(Party::of(stream.peer())).map_err(refused)?;
            stream.keep(place);
            if let Some(time) = shared.limits.silent_host.filter(|_| stream.is_tcp()) {
                let failed = |error| Error::io("Cannot set up the connection of", error).on(stream.peer());
                stream.expect_answers_within(time).map_err(failed)?;
            }
            mailbox.load().fetch_add(1, Ordering::Relaxed);
            mailbox.send(Message::Connection(stream));
        }
        Ok(())
    }

    /// Its images and sessions.
    #[must_use]
    pub fn registry(&self) -> &Arc<Registry> {
        &self.shared.registry
    }

    /// Gets a message when there is nothing to do any more: when the server listens nowhere, or has given way to another one,
    /// and the last of its clients has left.
    #[must_use]
    pub fn over(&self) -> &Receiver<()> {
        &self.over
    }

    fn start_threads(
        &mut self,
        loops: impl Iterator<Item = (Inbox, Buffers)>,
        (orders, moves): (&Receiver<cold::Order>, &Receiver<cold::Order>),
        warmers: Warmers,
        opened: &Receiver<Infallible>,
    ) -> Result<()> {
        let shared = &self.shared;
        match warmers {
            Warmers::AtOnce => start_warmers(&mut self.helpers, WARMERS, orders, shared)?,
            Warmers::OnDemand => {
                let (orders, shared) = (orders.clone(), Arc::clone(shared));
                let body = move || {
                    cold::warm_with_help(&orders, &shared, |others| {
                        start_warmers(others, WARMERS - 1, &orders, &shared)
                    });
                };
                self.helpers.push(spawn("warmer", body)?);
            }
        }
        if shared.registry.pool().overflow().is_some() {
            for _ in 0..cold::MOVERS {
                let (moves, shared) = (moves.clone(), Arc::clone(shared));
                self.helpers.push(spawn("mover", move || cold::move_blocks(&moves, &shared))?);
            }
        }
        let registry = Arc::clone(&shared.registry);
        self.helpers.push(spawn("housekeeper", move || registry.keep_house())?);
        let pool = Arc::clone(shared.registry.pool());
        self.tender = Some(spawn("tender", move || pool.tend())?);
        let watched = Arc::clone(shared);
        self.helpers.push(spawn("watcher", move || cold::watch(&watched))?);
        for (index, (inbox, buffers)) in loops.enumerate() {
            let worker = Worker::new(index, inbox, buffers, Arc::clone(shared))?;
            let opened = opened.clone();
            let body = move || {
                // It fails when the gate is opened, which is what it waits for.
                let _ = opened.recv();
                worker.run();
            };
            self.workers.push(spawn(&format!("worker-{index}"), body)?);
        }
        Ok(())
    }

    fn start_control(
        &mut self,
        listener: Listener,
        collected: Collected,
        opened: &Receiver<Infallible>,
    ) -> Result<()> {
        let shared = &self.shared;
        let stopper = control::stopper()?;
        let subject = control::Subject {
            registry: Arc::clone(&shared.registry),
            connections: Arc::clone(&shared.connections),
            addresses: shared.listeners().iter().map(|listener| listener.address().clone()).collect(),
            encrypted: shared.knobs.tls == TlsPolicy::Require,
            workers: shared.mailboxes.len(),
            started: Instant::now(),
            told: Mutex::default(),
            house: Box::new(Doors { shared: Arc::downgrade(shared), over: self.done.clone() }),
        };
        let (opened, stop, before) = (opened.clone(), stopper.clone(), Arc::clone(&self.before));
        let mut listener = listener;
        let body = move || {
            let _ = opened.recv();
            let before = before.lock().unwrap_or_else(PoisonError::into_inner).take();
            if before.is_some() {
                listener.own();
            }
            let succession = control::Succession::new(&subject, collected, before);
            control::serve(listener, &subject, succession, &stop);
        };
        self.control = Some((spawn("control", body)?, stopper));
        Ok(())
    }

    /// Stops listening, hangs up on everybody, ends all sessions, wipes their memory, and returns when all threads
    /// have ended.
    ///
    /// # Errors
    /// When a thread had panicked.
    pub fn stop(self) -> Result<()> {
        let Self { shared, workers, helpers, tender, control, over: _, done: _, before: _ } = self;
        let mut fine = true;
        if let Some((control, stopper)) = control {
            stopper.stop();
            fine &= control.join().is_ok();
        }
        shared.stop_listening();
        shared.registry.stop();
        shared.stopping.store(true, Ordering::Release);
        shared.mailboxes.iter().for_each(Mailbox::wake);
        for worker in workers {
            fine &= worker.join().is_ok();
        }
        shared.registry.end_all();
        for _ in 0..WARMERS {
            // The receivers live as long as the warmers do.
            let _ = shared.cold.send(cold::Order::Stop);
            let _ = shared.away.send(cold::Order::Stop);
        }
        for helper in helpers {
            helper.thread().unpark();
            fine &= helper.join().is_ok();
        }
        // Last, so that it wipes what all others gave back.
        shared.registry.pool().stop();
        fine &= tender.is_none_or(|tender| tender.join().is_ok());
        if fine { Ok(()) } else { Err(Error::new(ErrorKind::Io, "A thread of the server had failed")) }
    }
}

/// When there are all warmers.
#[derive(Clone, Copy)]
enum Warmers {
    /// From the beginning: later nobody may start a thread.
    AtOnce,
    /// When there is something cold. A server for one device may never see that, and lives for some milliseconds.
    OnDemand,
}

/// Starts so many and adds them to `threads`, also those before one that cannot be started.
fn start_warmers(
    threads: &mut Vec<JoinHandle<()>>,
    count: usize,
    orders: &Receiver<cold::Order>,
    shared: &Arc<Shared>,
) -> Result<()> {
    for _ in 0..count {
        let (orders, shared) = (orders.clone(), Arc::clone(shared));
        threads.push(spawn("warmer", move || cold::warm(&orders, &shared))?);
    }
    Ok(())
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map_err(|error| Error::io("Cannot start a thread", error).on(name).advise("raise ulimit -u"))
}
