//! Who is counted as one, and how many of something each may have.
//!
//! Whatever a server has a limited number of (connections, sessions) is counted in a [`Tally`], in all and for each
//! [`Party`]. Unless told otherwise no party may have more than three times what is still free: one that takes all that
//! it can get has three quarters, and leaves the rest to others; the next one likewise has three quarters of that rest.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::{Peer, PeerKind};

/// Unless told otherwise, a party may have so many times what is still free.
const TIMES_FREE: usize = 3;

/// Who is counted as one. Shown as `user 1000`, `host 192.0.2.1`, `hosts in 2001:db8::/64` or `machine 3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Party {
    /// A user of this machine.
    User(u32),
    /// A host on the network. For IPv6 a network of the smallest usual size (/64), since whoever has one address there
    /// can have them all.
    Host(IpAddr),
    /// A virtual machine, or the host of this one.
    Machine(u32),
}

impl Party {
    /// The party that `peer` belongs to.
    #[must_use]
    pub fn of(peer: &Peer) -> Self {
        match peer.kind {
            PeerKind::Unix { uid, .. } => Self::User(uid),
            PeerKind::Tcp { addr } => Self::Host(match addr.ip() {
                IpAddr::V6(ip) if !ip.is_loopback() => {
                    IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64))
                }
                ip => ip,
            }),
            PeerKind::Vsock { cid, .. } => Self::Machine(cid),
        }
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(uid) => write!(f, "user {uid}"),
            Self::Host(IpAddr::V6(ip)) if !ip.is_loopback() => write!(f, "hosts in {ip}/64"),
            Self::Host(ip) => write!(f, "host {ip}"),
            Self::Machine(cid) => write!(f, "machine {cid}"),
        }
    }
}

/// How many there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Most {
    /// Of all parties together.
    pub all: usize,
    /// Of each; without a number, three times what is still free.
    pub each: Option<usize>,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// All are taken.
    #[error("all {0} are taken")]
    All(usize),
    /// The party has what it may have.
    #[error("{party} has {has} already")]
    Party {
        /// Who.
        party: Party,
        /// How many it has.
        has: usize,
    },
}

/// A count of what is limited.
#[derive(Debug)]
pub struct Tally {
    most: Most,
    counts: Mutex<Counts>,
    empty: (Sender<()>, Receiver<()>),
}

#[derive(Debug, Default)]
struct Counts {
    all: usize,
    /// Those who have any.
    of: HashMap<Party, Arc<Member>>,
}

/// A party that has some. It keeps the tally that keeps it, until it has none any more.
#[derive(Debug)]
struct Member {
    tally: Arc<Tally>,
    party: Party,
    /// Changed under the lock on the counts.
    has: AtomicUsize,
}

impl Tally {
    /// A count that begins with nothing.
    #[must_use]
    pub fn new(most: Most) -> Arc<Self> {
        Arc::new(Self { most, counts: Mutex::default(), empty: bounded(1) })
    }

    /// Takes one for `party`.
    ///
    /// # Errors
    /// When there is none left, in all or for this party.
    pub fn enter(self: &Arc<Self>, party: Party) -> Result<Place, Full> {
        let mut counts = self.counts();
        if counts.all >= self.most.all {
            return Err(Full::All(self.most.all));
        }
        let has = counts.of.get(&party).map_or(0, |member| member.has.load(Ordering::Relaxed));
        let most = self.most.each.unwrap_or_else(|| (self.most.all - counts.all).saturating_mul(TIMES_FREE));
        if has >= most {
            return Err(Full::Party { party, has });
        }
        counts.all += 1;
        let new = || Arc::new(Member { tally: Arc::clone(self), party, has: AtomicUsize::new(0) });
        let member = counts.of.entry(party).or_insert_with(new);
        member.has.store(has + 1, Ordering::Relaxed);
        Ok(Place { member: Arc::clone(member) })
    }

    /// How many there may be.
    #[must_use]
    pub fn most(&self) -> Most {
        self.most
    }

    /// How many there are.
    #[must_use]
    pub fn all(&self) -> usize {
        self.counts().all
    }

    /// Tells when there were some and none is left, at least once.
    #[must_use]
    pub fn empty(&self) -> &Receiver<()> {
        &self.empty.1
    }

    fn leave(&self, member: &Member) {
        let mut counts = self.counts();
        counts.all -= 1;
        if member.has.fetch_sub(1, Ordering::Relaxed) == 1 {
            counts.of.remove(&member.party);
        }
        if counts.all == 0 {
            // When nobody has taken note of the last time, that is told already.
            let _ = self.empty.0.try_send(());
        }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        // Nothing panics between one count and the other.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One that was counted; dropping it gives it back. No larger than a pointer, as everything that is counted has one.
#[derive(Debug)]
pub struct Place {
    member: Arc<Member>,
}

impl Place {
    /// Whose it is.
    #[must_use]
    pub fn party(&self) -> Party {
        self.member.party
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.member.tally.leave(&self.member);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Party = Party::User(1);
    const TWO: Party = Party::User(2);

    /// Takes until there is no more.
    fn all_for(tally: &Arc<Tally>, party: Party) -> Vec<Place> {
        std::iter::from_fn(|| tally.enter(party).ok()).collect()
    }

    #[test]
    fn each_and_all_are_bounded() {
        let tally = Tally::new(Most { all: 5, each: Some(3) });
        let one = all_for(&tally, ONE);
        assert_eq!(one.len(), 3);
        assert_eq!(tally.enter(ONE).unwrap_err(), Full::Party { party: ONE, has: 3 });
        let two = all_for(&tally, TWO);
        assert_eq!(two.len(), 2);
        assert_eq!(tally.enter(TWO).unwrap_err(), Full::All(5));
        assert!(tally.empty().is_empty());
        drop((one, two));
        assert_eq!(tally.empty().try_recv(), Ok(()));
        assert_eq!((tally.all(), tally.counts().of.len()), (0, 0));
    }

    #[test]
    fn somebody_greedy_leaves_some() {
        let tally = Tally::new(Most { all: 1000, each: None });
        let mut all = Vec::new();
        for (user, gets) in [(1, 750), (2, 188), (3, 47), (4, 12), (5, 3)] {
            let places = all_for(&tally, Party::User(user));
            assert_eq!(places.len(), gets, "user {user}");
            all.push(places);
        }
        assert_eq!(tally.all(), 1000);
        // What the first gives back is not for the first alone.
        all[0].truncate(700);
        assert!(tally.enter(ONE).is_err());
        assert!(tally.enter(TWO).is_err());
        assert!(tally.enter(Party::User(6)).is_ok());
    }

    #[test]
    fn even_of_one_somebody_gets_it() {
        let tally = Tally::new(Most { all: 1, each: None });
        let place = tally.enter(ONE).unwrap();
        assert!(tally.enter(ONE).is_err());
        drop(place);
        assert!(tally.enter(TWO).is_ok());
    }

    #[test]
    fn neighbours_of_one_network_are_one_party() {
        let party = |addr: &str| {
            Party::of(&Peer { kind: PeerKind::Tcp { addr: addr.parse().unwrap() }, certificate: None })
        };
        assert_eq!(party("[2001:db8::1]:1"), party("[2001:db8::ffff:2]:2"));
        assert_eq!(party("[2001:db8::1]:1").to_string(), "hosts in 2001:db8::/64");
        assert_ne!(party("[2001:db8:0:1::1]:1"), party("[2001:db8::1]:1"));
        assert_ne!(party("192.0.2.1:1"), party("192.0.2.2:1"));
        assert_eq!(party("192.0.2.1:1").to_string(), "host 192.0.2.1");
        assert_eq!(party("[::1]:1").to_string(), "host ::1");
    }
}
