//! The control API: live sessions seen, made, changed and ended, by HTTP with JSON over a unix socket.
//!
//! ```text
//!   curl, 'memdev ps' ── unix socket, owner only ──> http ── routes ──> session::Registry
//!   Client                                            one thread beside the workers
//! ```
//!
//! [`serve`] is the server's side, [`Client`] the other; [`model`] is what they tell each other, as `docs/openapi.json` has
//! it. The API is described in `docs/control-api.md`.
//!
//! Invariant: the thread never holds a lock that workers take for longer than it takes to copy what is behind it, and nobody
//! but the server's own user, and root, gets an answer.

mod client;
mod held;
mod http;
mod images;
mod metrics;
pub mod model;
mod points;
mod routes;
mod server;
mod succession;

pub use client::Client;
pub use server::{MOST_CLIENTS, Stopper, serve, stopper};
pub use succession::{House, Succession};

use crate::net::{Address, Tally};
use crate::session::{Registry, Totals};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// What the control API is about: a server, from the outside.
#[derive(Debug)]
pub struct Subject {
    /// Its images and sessions.
    pub registry: Arc<Registry>,
    /// Who is connected.
    pub connections: Arc<Tally>,
    /// Where it listens for NBD clients.
    pub addresses: Vec<Address>,
    /// Whether all of these must encrypt.
    pub encrypted: bool,
    /// Event loops.
    pub workers: usize,
    /// Since when.
    pub started: Instant,
    /// The sums that were told last: they never go down.
    pub told: Mutex<Totals>,
    /// The rest of the server.
    pub house: Box<dyn House>,
}
