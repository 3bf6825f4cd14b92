//! Where clients come in: addresses, the listeners bound to them, and the streams they accept.
//!
//! ```text
//!   Address ── bind ──> Listener ── accept ──> Stream ──> worker (sendmsg, recvmsg)
//!   Uri (address + export, TLS)                  └─ Peer: who is at the other end
//!   tls: credentials from files, and records, for those who move them
//! ```
//!
//! Besides binding them, a process may be started with sockets: listeners of a service manager ([`Listener::inherited`])
//! or one connection ([`Stream::inherited`]).
//!
//! This room makes sockets ready (non-blocking, close-on-exec, options set) and says who is at the other end; it moves no
//! bytes and knows nothing of NBD but how its addresses are written. The invariant it keeps: a unix socket file that
//! exists because of a [`Listener`] is removed with it, and no file of anybody else's ever is.

mod address;
mod inherited;
mod listener;
mod party;
pub(crate) mod rights;
mod stream;
#[cfg(test)]
mod tests;
pub mod tls;
mod uri;

pub use address::Address;
pub use listener::Listener;
pub use party::{Full, Most, Party, Place, Tally};
pub use stream::{Outlook, Peer, PeerKind, Stream};
pub use uri::Uri;
pub(crate) use uri::{percent_decode, percent_encode};
