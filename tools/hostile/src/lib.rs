//! Crowds of NBD clients that misbehave: ten thousand of them, on one thread.
//!
//! ```text
//!   Kind ── script ──> Step Step Step ...      what one client does, drawn from a seed
//!                        └─ Client: one socket that never blocks, and where it is in its script
//!                              └─ Crowd (run): one event loop, so many at once, so many in all
//! ```
//!
//! What a server should do about them is not decided here: it may hang up on them or bear with them. A crowd only says
//! how many ended as they wanted and how many were hung up on; whether the server still serves others, and what it holds
//! afterwards, is for whoever started the crowd to find out.
//!
//! Nothing here uses memdev: the few bytes of the protocol that a client needs in order to get in are written from the
//! specification.

mod client;
mod crowd;
mod kind;
mod place;
mod random;
mod script;
mod wire;

pub use crowd::{Crowd, Progress, Report, run};
pub use kind::Kind;
pub use place::Place;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises this process's limit of open files as far as it may be raised; returns what it is then. Every client is a
/// descriptor, and children inherit the limit.
#[must_use]
pub fn raise_descriptor_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    // Without the right to, the limit stays as it is, which the caller is told.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
