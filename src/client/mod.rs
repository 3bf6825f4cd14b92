//! A small blocking NBD client: what `memdev` itself needs to ask a server, its own or another.
//!
//! ```text
//!   Haggling::connect ─┬─ list, info, meta contexts     questions; nothing is opened by them
//!                      └─ go ──> Client ─┬─ read, write, flush, trim, write_zeroes, block_status
//!                                        └─ disconnect
//! ```
//!
//! One request at a time: it is for looking, testing and copying little, not for speed. For many requests at a time there
//! is [`pipeline()`], with [`open_simple`] before it. A server is not trusted: lengths
//! that it announces are bounded, and what does not belong to the question asked is [`crate::ErrorKind::Protocol`].

mod haggling;
mod pipeline;
mod socket;
#[cfg(test)]
mod tests;
mod transmission;

pub use haggling::{Export, Haggling, ListedExport, MetaContext};
pub use pipeline::{Receiver, Submitter, open_simple, pipeline};
pub use transmission::{Client, Extent};
