//! What control clients and the server tell each other, as JSON: `docs/openapi.json` has the same.
//!
//! Sizes are bytes. Whatever a client does not know in an answer it must pass over; the server refuses what it does not
//! know in a request.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A server and all that it does and holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Server {
    /// memdev's version.
    pub version: String,
    /// Its process id, in its own pid namespace.
    pub pid: u32,
    /// How long it has been running.
    pub age_seconds: f64,
    /// Event loops.
    pub workers: u64,
    /// Where NBD clients connect, as URIs.
    pub addresses: Vec<String>,
    /// What it offers; the first is also the empty export.
    pub images: Vec<Image>,
    /// The server whose place this one has taken, while it still has clients.
    pub before: Option<Predecessor>,
    /// Connections of NBD clients.
    pub connections: Used,
    /// Sessions, those of one connection included.
    pub sessions: Used,
    /// Memory of all sessions.
    pub memory: Memory,
    /// What all connections, also those that are closed, have asked for.
    pub requests: Requests,
    /// The bytes of that.
    pub bytes: Bytes,
    /// How long it took.
    pub latency: Latencies,
}

/// A server that has given way, and goes on serving those whom it has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Predecessor {
    /// Its process id; 0 as long as it has not said so.
    pub pid: u32,
    /// Connections that it still has.
    pub connections: u64,
    /// Sessions that it still has.
    pub sessions: u64,
    /// Bytes of memory that it may still use, which this one may not.
    pub memory: u64,
}

/// An image that is offered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Image {
    /// The export's name.
    pub name: String,
    /// Bytes of the image that new sessions were given last.
    pub size: u64,
}

/// All images that are offered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Images {
    /// Themselves; the first is also the empty export.
    pub images: Vec<ImageDetail>,
}

/// An image and its files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageDetail {
    /// The export's name.
    pub name: String,
    /// The file that new sessions were given last, and those before it that sessions are still on, the newest first.
    pub files: Vec<ImageFile>,
}

/// A file of an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageFile {
    /// Itself.
    #[serde(flatten)]
    pub base: Base,
    /// How many sessions are on it.
    pub sessions: u64,
}

/// A file for an image.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewImage {
    /// Its absolute path. Where a descriptor comes with the request, that is the file, and this is where it lies.
    #[serde(default)]
    pub path: Option<PathBuf>,
}

/// How many there are of how many there may be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Used {
    /// Now.
    pub now: u64,
    /// At most.
    pub most: u64,
}

/// Some sessions, the oldest first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sessions {
    /// Themselves.
    pub sessions: Vec<Session>,
    /// There are more: ask again for those after this serial number.
    pub next: Option<u64>,
    /// Sessions that are still with the server whose place this one has taken; each can be asked for by its name. With the last
    /// of the others.
    pub before: Vec<String>,
}

/// A session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Session {
    /// What it is called here: `IMAGE@ID`, or `IMAGE@:SERIAL` if it is one connection's own.
    pub name: String,
    /// Its number; those that were made later have higher ones.
    pub serial: u64,
    /// The image's name.
    pub image: String,
    /// Its id; none if it is one connection's own.
    pub id: Option<String>,
    /// Whom it belongs to, as `user 1000`; nobody before it was entered.
    pub owner: Option<String>,
    /// How long it has been there.
    pub age_seconds: f64,
    /// How many connections are in it.
    pub connections: u64,
    /// Bytes of the device.
    pub size: u64,
    /// The file that it is on; its image may have another one by now.
    pub base: Base,
    /// Whether what was written to it is ciphertext in memory.
    #[serde(default)]
    pub sealed: bool,
    /// What it holds.
    pub memory: Memory,
    /// How much it may be asked to do.
    pub caps: Caps,
    /// What was asked for.
    pub requests: Requests,
    /// The bytes of that.
    pub bytes: Bytes,
    /// What is asked for now.
    pub rates: Rates,
    /// Where its NBD clients connect; nowhere if it is one connection's own.
    pub uris: Vec<String>,
}

/// The file that an image was at some time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Base {
    /// Where it lay when it was opened.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// The file system that it is on, and
    pub device: u64,
    /// its number there, as `stat` has them.
    pub inode: u64,
    /// When it was opened: seconds since the beginning of 1970 (UTC).
    pub opened: f64,
    /// How many files the image has been until then, itself included.
    pub generation: u64,
    /// Whether new sessions get it.
    pub current: bool,
}

/// A session, with what takes more to find out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionDetail {
    /// What is told of every session.
    #[serde(flatten)]
    pub session: Session,
    /// Who is in it, one for each connection.
    pub peers: Vec<String>,
    /// How long requests took.
    pub latency: Latencies,
}

/// Memory, of a session or of all.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// What may be held: of a session data alone, of the server data and map.
    pub limit: u64,
    /// Blocks that were written.
    pub data: u64,
    /// What it takes to find them.
    pub map: u64,
    /// Blocks of it that lie in the file of `--overflow`: of a session among its data, of the server beside it.
    #[serde(default)]
    pub overflow: u64,
    /// Blocks that were overwritten or trimmed since, and that replies hold which a client does not take.
    pub pinned: u64,
}

/// How much a session may be asked to do in a second, by all of its connections together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Caps {
    /// Requests; null without a cap.
    pub iops: Option<u64>,
    /// Bytes that are read and written; null without a cap.
    pub bandwidth: Option<u64>,
}

/// How many requests there were.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Requests {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Write-zeroes.
    pub zeroes: u64,
    /// Trims.
    pub trims: u64,
    /// Flushes.
    pub flushes: u64,
    /// Block status and cache.
    pub others: u64,
    /// Those of any kind that were answered by an error, or refused.
    pub errors: u64,
}

/// How many bytes were asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bytes {
    /// By reads.
    pub read: u64,
    /// By writes.
    pub written: u64,
    /// Of the bytes read: from the image,
    pub from_base: u64,
    /// from what the session had written,
    pub from_overlay: u64,
    /// and from neither, known to be zero.
    pub from_holes: u64,
}

/// On average over the last one to two seconds, or since it was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Read requests.
    pub reads_per_second: f64,
    /// Write requests.
    pub writes_per_second: f64,
    /// Bytes read.
    pub bytes_read_per_second: f64,
    /// Bytes written.
    pub bytes_written_per_second: f64,
}

/// How long requests took, from when they had arrived to when the kernel was given their replies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latencies {
    /// Reads.
    pub read: Latency,
    /// Writes.
    pub write: Latency,
    /// All others.
    pub other: Latency,
}

/// How long requests of one kind took, in microseconds. Counted in buckets that end at powers of two, so the truth may be
/// half of it. Nothing where there was no request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// How many.
    pub requests: u64,
    /// On average.
    pub mean_us: Option<f64>,
    /// Half of them took no longer than this,
    pub p50_us: Option<f64>,
    /// 90 of a hundred,
    pub p90_us: Option<f64>,
    /// 99 of a hundred,
    pub p99_us: Option<f64>,
    /// 999 of a thousand.
    pub p999_us: Option<f64>,
}

/// A session to be made.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewSession {
    /// On which image; the first without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Its id; without, 128 random bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Bytes of data that it may hold; without, as for every session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// It ends with the connection that this is asked for on, unless it is let go before ([`Change::held`]).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub held: bool,
    /// What is written to it is ciphertext in memory, also where the server does not do so with every session.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sealed: bool,
}

/// What is to change of a session.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// Bytes of data that it may hold from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// Requests that it may be asked for in a second from now on; 0 lifts the cap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Bytes that may be read and written in a second from now on; 0 lifts the cap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
    /// What it is called from now on, instead of the id that it has. Who is in it stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// `false`: it does not end with this connection, on which it was made, any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<bool>,
}

/// The checkpoints of a session, the oldest first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checkpoints {
    /// Themselves.
    pub checkpoints: Vec<Checkpoint>,
}

/// A checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// What it is called.
    pub name: String,
    /// When it was taken: seconds since the beginning of 1970 (UTC).
    pub taken: f64,
    /// Bytes of the blocks that it holds; the session, and other checkpoints, may hold them, too.
    pub data: u64,
}

/// A checkpoint to be taken.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewCheckpoint {
    /// What to call it.
    #[serde(default)]
    pub name: Option<String>,
}

/// Where to go back to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollback {
    /// The checkpoint's name.
    #[serde(default)]
    pub checkpoint: Option<String>,
}

/// A session to be made of another.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fork {
    /// Its id; without, 128 random bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// It belongs to whoever connects to it first, and not to whom the other belongs to.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unclaimed: bool,
    /// It ends with the connection that this is asked for on, unless it is let go before ([`Change::held`]).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub held: bool,
}

/// Nothing to say.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// The failure.
    pub error: Problem,
}

/// A failure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Problem {
    /// Of which kind, for programs: `invalid`, `not-found`, `denied`, `in-use`, `out-of-space`, `io`, `unsupported`,
    /// `protocol`, `shutdown` or `elsewhere`.
    pub kind: String,
    /// One line for people.
    pub message: String,
}
