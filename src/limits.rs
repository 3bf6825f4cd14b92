//! What one connection may hold of the server at a time: all its bounds, in one place.
//!
//! Nobody can ask for more than these, so they are numbers of the program rather than of its command line. How many
//! connections and sessions there may be, and for how long a client may keep the server waiting, is for its user to say:
//! [`crate::worker::Limits`]. What a handshake may take is in [`crate::handshake`].
//!
//! A client that goes beyond is not refused; it has to wait, for its own replies and requests only. With all of them used
//! up a connection holds about [`REPLY_BYTES`] of slots or base pages, [`INPUT_BYTES`] of requests and
//! [`PAYLOAD_WINDOW_BYTES`] of a write.

/// Bytes that are received at a time, beside payload that goes to its place; the buffer is the worker's, what is left in
/// it after a turn the connection's.
pub const INPUT_BYTES: usize = 256 << 10;

/// Bytes of requests that are taken from a client that does not take its replies.
pub const INPUT_AHEAD_BYTES: usize = 64 << 10;

/// Bytes of replies that are made before they are sent. While they are not, no further request is looked at.
pub const REPLY_BYTES: u64 = 1 << 20;

/// Bytes of replies that are sealed at a time, over TLS: enough to make calls cheap, few enough to stay in a cache. What the
/// socket does not take of them stays with the connection, beside [`REPLY_BYTES`].
pub const SEALED_BYTES: usize = 128 << 10;

/// Requests of a connection that are in flight, unless its server is told otherwise: acted on, and their replies not given to the
/// kernel yet. While there are so many, no further request is looked at. Far more than clients have: kernels and `qemu` 128 or
/// fewer, benchmarks 256.
pub const REQUESTS: usize = 1024;

/// Requests that are done for a connection before others on its worker have a turn, if there are others.
pub const TURN_REQUESTS: usize = 64;

/// Bytes of requests, and of replies, after which others have a turn, if there are others.
pub const TURN_BYTES: u64 = 256 << 10;

/// Requests that wait for pages of the base image. While there are so many, no further request is looked at.
pub const WAITING_REQUESTS: usize = 64;

/// Bytes of a write's payload that lie in slots which nobody can see yet; when there are so many they are published.
pub const PAYLOAD_WINDOW_BYTES: u64 = 256 << 10;

/// Bytes of input that are read on and kept while it is not known whether a client is still there: more than socket
/// buffers at both ends hold together, so that whoever has sent so much is there.
pub const HELD_BYTES: usize = 16 << 20;

/// The same of all connections together. Who would be beyond is hung up on, which is always safe.
pub const HELD_BYTES_OF_ALL: usize = 128 << 20;
