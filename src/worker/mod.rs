//! The server as a running thing: a fixed number of workers with event loops, and helpers for what takes time.
//!
//! ```text
//!   listeners ─┬─> worker 0: epoll, its connections, one receive buffer, one magazine of block memory
//!              └─> worker 1: ...                    │ cold base pages            ^ they are here
//!                                                   └──────> warmers: may wait for a disk
//!   housekeeper: ends sessions     tender: keeps block memory ready, wipes     watcher: pages that the kernel dropped
//! ```
//!
//! A connection stays on the worker that it was given to, and no worker ever waits for anything but its events.

mod cold;
mod connection;
mod environment;
mod event_loop;
mod mailbox;
mod polling;

use crate::base::Source;
use crate::error::{Error, Result};
use crate::handshake::Knobs;
use crate::net::Listener;
use crate::overlay::{BlockSize, Budget, Pool};
use crate::session::{Limits, Registry};
use crossbeam::channel::{Sender, unbounded};
use event_loop::Worker;
use mailbox::Mailbox;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Threads that may wait for a disk: as many reads as a disk does well at a time.
const WARMERS: usize = 16;

/// What a server serves, where, and within which limits.
#[derive(Debug)]
pub struct ServerConfig {
    /// Export names and image paths; the first is also the empty export.
    pub images: Vec<(String, PathBuf)>,
    /// Where clients come in.
    pub listeners: Vec<Listener>,
    /// Event loops.
    pub workers: usize,
    /// Bytes for all overlays; without it half of the machine's memory.
    pub memory: Option<u64>,
    /// Bytes of data for one session's overlay; without it as much as for all.
    pub session_memory: Option<u64>,
    /// The overlays' unit.
    pub block_size: BlockSize,
    /// How long a named session stays when nobody is in it.
    pub linger: Duration,
    /// What the handshake offers.
    pub knobs: Knobs,
}

/// What all threads of a server share.
#[derive(Debug)]
struct Shared {
    registry: Arc<Registry>,
    listeners: Vec<Listener>,
    mailboxes: Vec<Mailbox>,
    cold: Sender<cold::Order>,
    block_size: BlockSize,
    knobs: Knobs,
    stopping: AtomicBool,
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    helpers: Vec<JoinHandle<()>>,
    watcher: JoinHandle<()>,
}

impl Server {
    /// Opens the images and starts to serve.
    ///
    /// # Errors
    /// When an image cannot be served, or the system has no more threads, descriptors or address space.
    pub fn start(config: ServerConfig) -> Result<Self> {
        let sources =
            config.images.iter().map(|(name, path)| Source::open(name, path)).collect::<Result<Vec<_>>>()?;
        let memory = config.memory.unwrap_or_else(half_of_memory);
        let pool = Pool::new(memory, config.block_size)?;
        let limits =
            Limits { session_memory: config.session_memory.unwrap_or(memory), linger: config.linger };
        let registry = Registry::new(sources, Arc::clone(&pool), Budget::total(memory), limits);

        let count = config.workers.max(1);
        let (mailboxes, inboxes): (Vec<_>, Vec<_>) =
            (0..count).map(|_| mailbox::open()).collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let (cold, orders) = unbounded();
        let shared = Arc::new(Shared {
            registry: Arc::clone(&registry),
            listeners: config.listeners,
            mailboxes,
            cold,
            block_size: config.block_size,
            knobs: config.knobs,
            stopping: AtomicBool::new(false),
        });

        let mut helpers = Vec::new();
        for _ in 0..WARMERS {
            let (orders, shared) = (orders.clone(), Arc::clone(&shared));
            helpers.push(spawn("warmer", move || cold::warm(&orders, &shared))?);
        }
        helpers.push(spawn("housekeeper", {
            let registry = Arc::clone(&registry);
            move || registry.keep_house()
        })?);
        helpers.push(spawn("tender", move || pool.tend())?);
        let watcher = spawn("watcher", {
            let shared = Arc::clone(&shared);
            move || cold::watch(&shared)
        })?;
        let mut workers = Vec::new();
        for (index, inbox) in inboxes.into_iter().enumerate() {
            let worker = Worker::new(index, inbox, Arc::clone(&shared))?;
            workers.push(spawn(&format!("worker-{index}"), move || worker.run())?);
        }
        Ok(Self { shared, workers, helpers, watcher })
    }

    /// Hangs up on everybody, ends all sessions, wipes their memory, and returns when all threads have ended.
    ///
    /// # Errors
    /// When a thread had panicked.
    pub fn stop(self) -> Result<()> {
        let Self { shared, workers, helpers, watcher } = self;
        shared.registry.stop();
        shared.stopping.store(true, Ordering::Release);
        shared.mailboxes.iter().for_each(Mailbox::wake);
        let mut fine = workers.into_iter().fold(true, |fine, worker| worker.join().is_ok() && fine);
        shared.registry.end_all();
        for _ in 0..WARMERS {
            // The receivers live as long as the warmers do.
            let _ = shared.cold.send(cold::Order::Stop);
        }
        watcher.thread().unpark();
        fine &= watcher.join().is_ok();
        shared.registry.pool().stop();
        fine &= helpers.into_iter().fold(true, |fine, helper| helper.join().is_ok() && fine);
        if fine { Ok(()) } else { Err(Error::new(crate::ErrorKind::Io, "A thread of the server had failed")) }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map_err(|error| Error::io("Cannot start a thread", error).on(name).advise("raise ulimit -u"))
}

/// Half of the machine's memory, in bytes: so much for overlays leaves the other half to page cache and programs.
fn half_of_memory() -> u64 {
    let info = rustix::system::sysinfo();
    #[allow(clippy::useless_conversion, reason = "the field's type differs between architectures")]
    let total = u64::from(info.totalram) * u64::from(info.mem_unit.max(1));
    total / 2
}
