//! How much of a server clients may have, and for how long they may keep it waiting.

use crate::error::{Error, ErrorKind, Result};
use crate::limits::REQUESTS;
use crate::net::Most;
use rustix::process::{Resource, getrlimit};
use std::time::Duration;

/// Descriptors that are no connections, beside those that grow with workers, listeners and images.
const HEADROOM: u64 = 64;
/// One in so many descriptors is for what is not known beforehand: images that were replaced while sessions have them.
const SPARE: u64 = 64;
/// Sessions that there may be, however few connections: as map entries they are cheap, and charged to the memory budget.
const SESSIONS: usize = 1 << 16;

/// How much of a server clients may have, and for how long they may keep it waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections in all; without a number, as many as there are descriptors for.
    pub connections: Option<usize>,
    /// Connections of one party (a user, a host, a virtual machine); without a number, three times what is still free.
    pub connections_per_peer: Option<usize>,
    /// Sessions in all; without a number 65,536, or one for each connection if that is more.
    pub sessions: Option<usize>,
    /// Sessions that one party has made; without a number, three times what is still free.
    pub sessions_per_owner: Option<usize>,
    /// Requests in flight on one connection, one at least: acted on, and their replies not given to the kernel yet.
    pub requests_in_flight: usize,
    /// A client that has not finished its handshake by then is hung up on.
    pub handshake: Option<Duration>,
    /// A client that has left replies unread for so long is hung up on.
    pub unread_reply: Option<Duration>,
    /// A TCP client whose host has not answered for so long is hung up on.
    pub silent_host: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: None,
            connections_per_peer: None,
            sessions: None,
            sessions_per_owner: None,
            requests_in_flight: REQUESTS,
            handshake: Some(Self::HANDSHAKE),
            unread_reply: Some(Self::UNREAD_REPLY),
            silent_host: Some(Self::SILENT_HOST),
        }
    }
}

impl Limits {
    /// A handshake takes a few round trips; one that takes this long is none.
    pub const HANDSHAKE: Duration = Duration::from_secs(10);
    /// Longer than a program that means to go on leaves a disk's answer lying: kernels give a request up after 30 to 120 s,
    /// and a virtual machine that is migrated or saved stands still for less than that. A client that stands still and
    /// has asked for nothing is not affected.
    pub const UNREAD_REPLY: Duration = Duration::from_secs(300);
    /// Longer than networks are usually interrupted.
    pub const SILENT_HOST: Duration = Duration::from_secs(30);

    /// How many connections there may be, when `others` descriptors are taken by other things.
    pub(super) fn most_connections(&self, others: usize) -> Result<Most> {
        let available = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let room = available - available / SPARE;
        let room = room.saturating_sub(HEADROOM + others as u64).max(1);
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        let all = match self.connections {
            Some(wanted) if wanted > room => {
                let why =
                    format!("Cannot have {wanted} connections: the limit of open files has room for {room}");
                return Err(Error::new(ErrorKind::Invalid, why)
                    .advise("raise it (ulimit -n, LimitNOFILE=) or lower --max-connections"));
            }
            Some(wanted) => wanted,
            None => room,
        };
        Ok(Most { all, each: self.connections_per_peer })
    }

    /// How many sessions there may be, beside so many connections.
    pub(super) fn most_sessions(&self, connections: Most) -> Most {
        let all = self.sessions.unwrap_or_else(|| connections.all.max(SESSIONS));
        Most { all, each: self.sessions_per_owner }
    }
}
