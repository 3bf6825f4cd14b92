//! The connections to one server, which many share. One that is lost is an error of whatever was under way; the next who needs
//! one makes another.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::connection::Connection;
use super::requests::Requests;
use crate::carry::stores::address::Address;

/// The most connections: a server does what it is asked for by one connection one after the other, and waits for its disk then.
const CONNECTIONS: usize = 4;

/// So many use a connection before there is another one.
const USERS: usize = 4;

/// For so long, those that there are have to do where the server has not taken one more.
const BACK_OFF: Duration = Duration::from_secs(30);

/// The connections.
#[derive(Default)]
pub(super) struct Pool(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    connections: Vec<Arc<Connection>>,
    /// One more is being made.
    is_opening: bool,
    /// That none could be made last.
    failed: Option<Failure>,
}

/// An attempt that others have waited for, who need not make one of their own.
pub(super) struct Failure {
    at: Instant,
    why: (io::ErrorKind, String),
}

impl Failure {
    /// One of this moment.
    pub(super) fn new(why: &io::Error) -> Self {
        Self { at: Instant::now(), why: (why.kind(), why.to_string()) }
    }

    /// What whoever has waited since `asked` is told, if it came since then.
    pub(super) fn since(&self, asked: Instant) -> Option<io::Error> {
        let (kind, text) = &self.why;
        (self.at >= asked).then(|| io::Error::new(*kind, text.clone()))
    }
}

impl State {
    fn add(&mut self, made: io::Result<Connection>) -> io::Result<Arc<Connection>> {
        let connection = Arc::new(made.inspect_err(|error| self.failed = Some(Failure::new(error)))?);
        self.failed = None;
        self.connections.push(Arc::clone(&connection));
        Ok(connection)
    }
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the requests of one more.
    ///
    /// # Errors
    /// There is no connection, and none can be made.
    pub(super) fn requests(&self, address: &Address) -> io::Result<Requests> {
        let asked = Instant::now();
        // To make the first takes a while: who asks meanwhile waits for that one.
        let mut state = self.lock();
        state.connections.retain(|connection| connection.users().is_some());
        let users = |connection: &&Arc<Connection>| connection.users().unwrap_or(usize::MAX);
        if let Some(least) = state.connections.iter().min_by_key(users).cloned() {
            let has_failed = state.failed.as_ref().is_some_and(|failed| failed.at.elapsed() < BACK_OFF);
            let are_few = users(&&least) < USERS || state.connections.len() >= CONNECTIONS;
            if !are_few && !state.is_opening && !has_failed {
                state.is_opening = self.open(address);
            }
            return Ok(Requests::new(least));
        }
        // Nor need each wait for a server that is away as long as the first has.
        if let Some(error) = state.failed.as_ref().and_then(|failed| failed.since(asked)) {
            return Err(error);
        }
        state.add(Connection::new(address)).map(Requests::new)
    }

    /// Makes one more, which nobody waits for. Whether that has begun.
    fn open(&self, address: &Address) -> bool {
        let (pool, address) = (Self(Arc::clone(&self.0)), address.clone());
        let open = move || {
            let made = Connection::new(&address);
            let mut state = pool.lock();
            state.is_opening = false;
            // That the server takes no more of them is nobody's error.
            let _ = state.add(made);
        };
        std::thread::Builder::new().name("sftp-opener".into()).spawn(open).is_ok()
    }
}
