//! The connections to one server, which many share. One that is lost is an error of whatever was under way; the next who needs
//! one makes another.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::connection::Connection;
use super::requests::Requests;
use crate::carry::stores::address::Address;

/// The most connections: a server does what it is asked for by one connection one after the other, and waits for its disk then.
const CONNECTIONS: usize = 4;

/// So many use a connection before there is another one.
const USERS: usize = 16;

/// For so long, what others use has to do where the server has not taken one more.
const BACK_OFF: Duration = Duration::from_secs(30);

/// The connections.
#[derive(Default)]
pub(super) struct Pool(Mutex<State>);

#[derive(Default)]
struct State {
    connections: Vec<Arc<Connection>>,
    /// When none could be made last, and why.
    failed: Option<(Instant, io::ErrorKind, String)>,
}

impl Pool {
    /// For the requests of one more.
    ///
    /// # Errors
    /// There is no connection, and none can be made.
    pub(super) fn requests(&self, address: &Address) -> io::Result<Requests> {
        let asked = Instant::now();
        // To make one takes a while: who asks meanwhile uses that one.
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let State { connections, failed } = &mut *state;
        connections.retain(|connection| connection.users().is_some());
        let users = |connection: &&Arc<Connection>| connection.users().unwrap_or(usize::MAX);
        if let Some(connection) = connections.iter().find(|connection| users(connection) < USERS) {
            return Ok(Requests::new(Arc::clone(connection)));
        }
        if let Some(least) = connections.iter().min_by_key(users)
            && (connections.len() >= CONNECTIONS
                || failed.as_ref().is_some_and(|failed| failed.0.elapsed() < BACK_OFF))
        {
            return Ok(Requests::new(Arc::clone(least)));
        }
        // Nor need each wait for a server that is away as long as the first has.
        if let Some((_, kind, text)) = failed.as_ref().filter(|failed| failed.0 >= asked) {
            return Err(io::Error::new(*kind, text.clone()));
        }
        match Connection::new(address) {
            Ok(connection) => {
                let connection = Arc::new(connection);
                connections.push(Arc::clone(&connection));
                Ok(Requests::new(connection))
            }
            Err(error) => {
                *failed = Some((Instant::now(), error.kind(), error.to_string()));
                let other = connections.first().cloned();
                other.map(Requests::new).ok_or(error)
            }
        }
    }
}
