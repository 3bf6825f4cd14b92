//! Sessions: one private writable world each, and who may enter it.
//!
//! ```text
//!   Registry ── images by name
//!      │    └── named sessions: NAME@ID ──> Session ── Device
//!      └ attach ──> Attachment (one a connection) ──────┘   └── lines: the connections that are in it
//! ```
//!
//! Asking for `NAME` makes a session of the connection's own, over when it is; asking for `NAME@ID` joins the named
//! session or makes it, and it is over when it was left by all for the *linger* time.
//!
//! # A dead client's writes
//!
//! A connection whose client is gone may still hold requests that nobody has read. When somebody attaches to its
//! session afterwards, these must never be done. So requests are acted on only within a [`Turn`], and attaching first
//! *fences* every connection of the session whose client has hung up: it waits for the turn that is being acted on, if
//! any, and none begins after that. Where it cannot be known yet whether the client has hung up, the connection is
//! *doubtful*: its requests wait until it is known.

mod census;
mod handover;
mod housekeeper;
mod line;
mod name;
mod pace;
mod points;
mod registry;
mod traffic;

pub use census::{Found, Rates};
pub use line::{Line, Turn, TurnGuard};
pub use name::{Request, SessionId};
pub use pace::{BURST, Caps, Pace, Reserved};
pub use points::{Checkpoint, Heir};
pub use registry::{Attachment, Description, Limits, Registry};
pub use traffic::{Count, Histogram, Kind, Totals, Traffic};

use crate::cow::Device;
use crate::net::tls::Fingerprint;
use crate::net::{Peer, PeerKind};
use census::Samples;
use points::Points;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

/// Whom a named session belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// Whoever has the key of a certificate that was shown over TLS and verified.
    Certificate(Fingerprint),
    /// A user of this machine, as the kernel vouched for over a unix socket.
    User(u32),
    /// A virtual machine, or the host of this one, as the hypervisor vouches for.
    Machine(u32),
    /// Whoever knows its name and comes over TCP without a certificate, where nobody vouches for anybody.
    WhoKnowsTheName,
}

impl Owner {
    fn of(peer: &Peer) -> Self {
        match (peer.certificate, peer.kind) {
            (Some(certificate), _) => Self::Certificate(certificate),
            (None, PeerKind::Unix { uid, .. }) => Self::User(uid),
            (None, PeerKind::Vsock { cid, .. }) => Self::Machine(cid),
            (None, PeerKind::Tcp { .. }) => Self::WhoKnowsTheName,
        }
    }

    /// Whether `peer` may enter what belongs to this owner. Somebody from the network may not enter what belongs to a
    /// user or a certificate, and neither of these is led into what somebody on the network has prepared.
    fn admits(self, peer: &Peer) -> bool {
        self == Self::of(peer)
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Certificate(fingerprint) => write!(f, "certificate {fingerprint}"),
            Self::User(uid) => write!(f, "user {uid}"),
            Self::Machine(cid) => write!(f, "machine {cid}"),
            Self::WhoKnowsTheName => f.write_str("who knows its name"),
        }
    }
}

/// One private writable world.
#[derive(Debug)]
pub struct Session {
    /// Its number among all sessions that this process ever had.
    serial: u64,
    device: Device,
    /// Without one it belongs to whoever enters it first.
    owner: OnceLock<Owner>,
    born: Instant,
    attached: Mutex<Attached>,
    samples: Mutex<Samples>,
    points: Mutex<Points>,
    pace: Pace,
}

#[derive(Debug)]
struct Attached {
    lines: Vec<Arc<Line>>,
    /// When the last one left; meaningful while there is none.
    left: Instant,
    /// It was made for somebody who has not come yet, and stays until then.
    awaited: bool,
    /// What went over those that have left, once there was anything.
    past: Option<Box<Totals>>,
}

impl Session {
    fn new(device: Device, owner: Owner, caps: Caps) -> Self {
        Self::owned_by(device, OnceLock::from(owner), caps)
    }

    /// One that belongs to whoever enters it first.
    fn unclaimed(device: Device, caps: Caps) -> Self {
        Self::owned_by(device, OnceLock::new(), caps)
    }

    fn owned_by(device: Device, owner: OnceLock<Owner>, caps: Caps) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let born = Instant::now();
        let attached = Attached { lines: Vec::new(), left: born, awaited: false, past: None };
        Self {
            serial: NEXT.fetch_add(1, Ordering::Relaxed),
            device,
            owner,
            born,
            attached: Mutex::new(attached),
            samples: Mutex::new(Samples::since(born)),
            points: Mutex::default(),
            pace: Pace::new(caps),
        }
    }

    /// Its block device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// How much it may be asked to do in a second.
    #[must_use]
    pub fn pace(&self) -> &Pace {
        &self.pace
    }

    fn attached(&self) -> MutexGuard<'_, Attached> {
        // The list is whole at every point where it could panic.
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
