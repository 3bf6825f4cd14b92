//! A socket in front of a server's, which counts the connections that a client makes.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::Server;

/// The socket. Its threads end with their connections, or with the test.
pub struct Door {
    socket: PathBuf,
    count: Arc<AtomicUsize>,
}

impl Door {
    /// Opens a door in `dir` to the server.
    pub fn new(dir: &Path, server: &Server) -> Self {
        let socket = dir.join("door.sock");
        let listener = UnixListener::bind(&socket).expect("binding a socket");
        let count = Arc::new(AtomicUsize::new(0));
        let (counted, behind) = (Arc::clone(&count), server.socket().to_owned());
        std::thread::spawn(move || {
            for client in listener.incoming() {
                counted.fetch_add(1, Ordering::SeqCst);
                let client = client.expect("accepting a connection");
                let server = UnixStream::connect(&behind).expect("connecting to the server");
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to) = (from.try_clone(), to.try_clone());
                    let (mut from, mut to) = (from.expect("duplicating"), to.expect("duplicating"));
                    std::thread::spawn(move || {
                        // A client may go at any time.
                        let _ = io::copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Write);
                    });
                }
            }
        });
        Self { socket, count }
    }

    /// The URI of an export behind it.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    /// How many connections were made since this was asked last.
    pub fn connections(&self) -> usize {
        self.count.swap(0, Ordering::SeqCst)
    }
}
