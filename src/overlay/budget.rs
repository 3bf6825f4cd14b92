//! Memory as a budget: what a session, and all sessions together, may hold.
//!
//! Three things are counted: *data* (blocks), *map* (what it takes to find them), and what is *pinned*: blocks that were
//! overwritten or trimmed while a reply that its client does not take still holds them. A session's limit is for its
//! data, exactly, with a margin for the others; the server's limit is for data and map, with a margin for what is pinned.
//!
//! # When the server's is short
//!
//! ```text
//!   0                                             15/16       31/32        limit
//!   |  anybody's                                    |  for those with less than their share  |
//!                                                   |           |            |
//!                    others: no more data beyond here           |            nobody anything
//!                                 others: no more map, and no new sessions beyond here
//! ```
//!
//! The last sixteenth of the server's limit is a reserve for sessions that hold less than an equal share of the limit, which
//! is the limit divided by how many hold any data. So whoever took the most is the first to get `ENOSPC`, and cannot keep
//! others from what is theirs. That somebody who is alone can take everything follows. Those who are beyond their share can
//! still use half of the reserve for map, so that they can trim; the other half keeps new sessions from taking what those
//! who are there may still need.

use super::Outcome;
use crate::error::ErrorKind;
use crate::sync;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What may be held, and what is held, in bytes.
#[derive(Debug)]
pub struct Budget {
    /// Changed by whoever runs the server, while it is used.
    limit: AtomicU64,
    data: AtomicU64,
    /// Bytes of data that lie in files: of a session's among its `data`, of the server's beside them.
    away: AtomicU64,
    map: AtomicU64,
    pinned: sync::atomic::AtomicU64,
    /// So much that is pinned is not held against the limit.
    pinned_margin: u64,
    /// Of the server's: how many sessions hold data.
    holders: AtomicU64,
    parent: Option<Arc<Budget>>,
}

impl Budget {
    /// The budget of a server: `limit` bytes for data and map of all sessions.
    #[must_use]
    pub fn total(limit: u64) -> Arc<Self> {
        Arc::new(Self::empty(limit, Self::TOTAL_PINNED_MARGIN, None))
    }

    /// So much pinned memory of all sessions is not held against the server's limit.
    pub(super) const TOTAL_PINNED_MARGIN: u64 = 32 << 20;
    /// The same for a session: what sixteen connections hold at most that are slow to take their replies.
    const SESSION_PINNED_MARGIN: u64 = 16 << 20;

    /// Bytes that the total is charged with for a session as such, however empty.
    pub const SESSION: u64 = 1024;

    /// The budget of a session: `limit` bytes of data, within what is left of `parent`.
    ///
    /// # Errors
    /// `OutOfSpace` when there is so little left of it that those who are there need it.
    pub fn within(parent: &Arc<Self>, limit: u64) -> Outcome<Self> {
        if !parent.take(&parent.map, Self::SESSION, Taker::Newcomer) {
            return Err(ErrorKind::OutOfSpace);
        }
        Ok(Self::empty(limit, Self::SESSION_PINNED_MARGIN, Some(Arc::clone(parent))))
    }

    fn empty(limit: u64, pinned_margin: u64, parent: Option<Arc<Self>>) -> Self {
        let [data, away, map] = [const { AtomicU64::new(0) }; 3];
        Self {
            limit: AtomicU64::new(limit),
            data,
            away,
            map,
            pinned: sync::atomic::AtomicU64::new(0),
            pinned_margin,
            holders: AtomicU64::new(0),
            parent,
        }
    }

    /// Bytes that may be held.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Changes what may be held, from the next block on. What is held already stays, even if it is more: then there is no
    /// more of it before so much was given back.
    pub fn set_limit(&self, bytes: u64) {
        self.limit.store(bytes, Ordering::Relaxed);
    }

    /// Bytes of data held.
    #[must_use]
    pub fn data(&self) -> u64 {
        self.data.load(Ordering::Relaxed)
    }

    /// Bytes of data that lie in files, because memory was short. A session's are among its [`Budget::data`], the server's are
    /// not.
    #[must_use]
    pub fn away(&self) -> u64 {
        self.away.load(Ordering::Relaxed)
    }

    /// Bytes of the server's limit that are used, for a session as for the server.
    pub(super) fn used_of_total(&self) -> (u64, u64) {
        let total = self.parent.as_deref().unwrap_or(self);
        (total.data() + total.map() + total.pinned_beyond_margin(), total.limit())
    }

    /// Of the server's: whether blocks should go out, so that those who wait for room find some.
    pub(crate) fn wants_room(&self) -> bool {
        let (used, limit) = self.used_of_total();
        used > limit / 8 * 5
    }

    /// Notes that bytes that were charged are in a file now.
    pub(super) fn move_out(&self, bytes: u64) {
        self.away.fetch_add(bytes, Ordering::Relaxed);
        if let Some(parent) = &self.parent {
            parent.away.fetch_add(bytes, Ordering::Relaxed);
            parent.data.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    /// Notes that bytes that were in a file are in memory, or about to be overwritten there, whatever is left of that.
    pub(super) fn move_in(&self, bytes: u64) {
        self.away.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(parent) = &self.parent {
            parent.data.fetch_add(bytes, Ordering::Relaxed);
            parent.away.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    /// Charges for a second copy in memory of what is in a file, whatever is left: it is read, and must not fail for that.
    pub(super) fn charge_copy(&self, bytes: u64) {
        let before = self.data.fetch_add(bytes, Ordering::Relaxed);
        if let Some(parent) = &self.parent {
            if before == 0 {
                parent.holders.fetch_add(1, Ordering::Relaxed);
            }
            parent.data.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Gives back what was charged for data that is in a file.
    pub(super) fn uncharge_away(&self, bytes: u64) {
        self.away.fetch_sub(bytes, Ordering::Relaxed);
        self.give_up_data(bytes);
        if let Some(parent) = &self.parent {
            parent.away.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    /// Bytes of map held.
    #[must_use]
    pub fn map(&self) -> u64 {
        self.map.load(Ordering::Relaxed)
    }

    /// Bytes held by replies alone, whose blocks were overwritten or trimmed since.
    #[must_use]
    pub fn pinned(&self) -> u64 {
        // Where two holders of a block give up at the same time, its reader may be faster than the second of them, and then
        // it is for a moment less than nothing.
        self.pinned_exactly().cast_signed().max(0).cast_unsigned()
    }

    /// Whether no block is charged to it.
    pub(super) fn pays_for_nothing(&self) -> bool {
        self.data() == 0 && self.pinned_exactly() == 0
    }

    /// What is pinned, also where that is less than nothing for a moment.
    pub(super) fn pinned_exactly(&self) -> u64 {
        self.pinned.load(Ordering::Relaxed)
    }

    fn pinned_beyond_margin(&self) -> u64 {
        self.pinned().saturating_sub(self.pinned_margin)
    }

    /// A session's map may take this much beside its data: enough for a session full of blocks of 4 KiB that all lie in
    /// leaves of their own.
    fn map_margin(&self) -> u64 {
        self.limit() / 16 + (1 << 20)
    }

    /// Bytes that a session may hold before others come first.
    fn share(&self) -> u64 {
        self.limit() / self.holders.load(Ordering::Relaxed).max(1)
    }

    /// Takes so many more bytes of the server's limit, for data or map; whether they could be had.
    fn take(&self, kind: &AtomicU64, bytes: u64, taker: Taker<'_>) -> bool {
        kind.fetch_add(bytes, Ordering::Relaxed);
        let used = self.data() + self.map() + self.pinned_beyond_margin();
        let limit = self.limit();
        let reserve = limit / RESERVE;
        let within = match taker {
            Taker::Data(_) if used + reserve <= limit => true,
            Taker::Map(_) | Taker::Newcomer if used + reserve / 2 <= limit => true,
            Taker::Data(session) | Taker::Map(session) => {
                used <= limit && session.data() + session.map() <= self.share()
            }
            Taker::Newcomer => false,
        };
        if !within {
            kind.fetch_sub(bytes, Ordering::Relaxed);
        }
        within
    }

    pub(super) fn charge_data(&self, bytes: u64) -> Outcome<()> {
        let before = self.data.fetch_add(bytes, Ordering::Relaxed);
        let within = before + bytes + self.pinned_beyond_margin() <= self.limit();
        if let Some(parent) = &self.parent {
            if before == 0 && bytes > 0 {
                parent.holders.fetch_add(1, Ordering::Relaxed);
            }
            if within && parent.take(&parent.data, bytes, Taker::Data(self)) {
                return Ok(());
            }
        }
        self.give_up_data(bytes);
        Err(ErrorKind::OutOfSpace)
    }

    fn give_up_data(&self, bytes: u64) {
        let before = self.data.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(parent) = &self.parent
            && before == bytes
            && bytes > 0
        {
            parent.holders.fetch_sub(1, Ordering::Relaxed);
        }
    }

    pub(super) fn charge_map(&self, bytes: u64) -> Outcome<()> {
        let map = self.map.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if let Some(parent) = &self.parent
            && map <= self.map_margin()
            && parent.take(&parent.map, bytes, Taker::Map(self))
        {
            return Ok(());
        }
        self.map.fetch_sub(bytes, Ordering::Relaxed);
        Err(ErrorKind::OutOfSpace)
    }

    /// Whether one more block may be overwritten that a reply holds.
    ///
    /// # Errors
    /// `OutOfSpace` when so much is pinned that the limit, which data alone would keep to, is passed.
    pub(super) fn check_pinned(&self) -> Outcome<()> {
        match self.pinned_beyond_margin() {
            0 => {}
            beyond if self.data() + self.map() + beyond > self.limit() => return Err(ErrorKind::OutOfSpace),
            _ => {}
        }
        self.parent.as_ref().map_or(Ok(()), |parent| parent.check_pinned())
    }

    pub(super) fn pin(&self, bytes: u64) {
        self.pinned.fetch_add(bytes, Ordering::Relaxed);
        if let Some(parent) = &self.parent {
            parent.pin(bytes);
        }
    }

    pub(super) fn unpin(&self, bytes: u64) {
        self.pinned.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(parent) = &self.parent {
            parent.unpin(bytes);
        }
    }

    pub(super) fn uncharge_data(&self, bytes: u64) {
        self.give_up_data(bytes);
        if let Some(parent) = &self.parent {
            parent.data.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    pub(super) fn uncharge_map(&self, bytes: u64) {
        self.map.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(parent) = &self.parent {
            parent.uncharge_map(bytes);
        }
    }
}

/// Of the server's limit, one part in so many is kept for sessions that hold less than their share.
const RESERVE: u64 = 16;

/// For whom, and for what, something of the server's limit is taken.
#[derive(Clone, Copy)]
enum Taker<'a> {
    /// Data of a session, which counts what is asked for among what it holds.
    Data(&'a Budget),
    /// Map of a session, likewise.
    Map(&'a Budget),
    /// A session that is being made.
    Newcomer,
}

impl Drop for Budget {
    fn drop(&mut self) {
        if let Some(parent) = &self.parent {
            parent.uncharge_map(Self::SESSION);
            parent.unpin(self.pinned());
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_session_is_held_to_its_own_limit_exactly() {
        let total = Budget::total(1 << 30);
        let session = Budget::within(&total, 8192).unwrap();
        assert!(session.charge_data(4096).is_ok() && session.charge_data(4096).is_ok());
        assert_eq!(session.charge_data(1), Err(ErrorKind::OutOfSpace));
        session.uncharge_data(4096);
        assert!(session.charge_data(4096).is_ok());
        assert_eq!((session.data(), total.data()), (8192, 8192));
    }

    #[test]
    fn a_limit_that_is_changed_holds_from_then_on() {
        let total = Budget::total(1 << 30);
        let session = Budget::within(&total, 8192).unwrap();
        assert!(session.charge_data(8192).is_ok());
        session.set_limit(4096);
        assert_eq!((session.limit(), session.data()), (4096, 8192), "what it has it keeps");
        session.uncharge_data(4096);
        assert_eq!(session.charge_data(4096), Err(ErrorKind::OutOfSpace));
        session.set_limit(8192);
        assert!(session.charge_data(4096).is_ok());
    }

    #[test]
    fn what_is_pinned_beyond_a_margin_takes_the_place_of_data() {
        let total = Budget::total(1 << 30);
        let session = Budget::within(&total, 1 << 20).unwrap();
        assert!(session.charge_data(1 << 20).is_ok());
        session.pin(Budget::SESSION_PINNED_MARGIN);
        assert!(session.check_pinned().is_ok(), "a session that is full can still overwrite");
        session.pin(4096);
        assert_eq!(session.check_pinned(), Err(ErrorKind::OutOfSpace));
        session.uncharge_data(4096);
        assert!(session.check_pinned().is_ok());
        assert_eq!(session.charge_data(4096), Err(ErrorKind::OutOfSpace));
        session.unpin(4096);
        assert!(session.charge_data(4096).is_ok());
        assert_eq!((session.pinned(), total.pinned()), (Budget::SESSION_PINNED_MARGIN, session.pinned()));
    }

    #[test]
    fn whoever_took_the_most_leaves_the_rest_to_others() {
        const BLOCK: u64 = 4096;
        let total = Budget::total(1 << 20);
        let session = || Budget::within(&total, u64::MAX / 2);
        let fill = |session: &Budget| {
            (0..).take_while(|_| session.charge_data(BLOCK).is_ok()).count() as u64 * BLOCK
        };
        let hog = session().unwrap();
        assert!(fill(&hog) + BLOCK + Budget::SESSION > 1 << 20, "alone it takes everything");
        while hog.data() > 0 {
            hog.uncharge_data(BLOCK);
        }
        let (small, other) = (session().unwrap(), session().unwrap());
        assert!(small.charge_data(BLOCK).is_ok());
        let anybodys = 15 * (1 << 20) / 16 - 3 * Budget::SESSION;
        assert_eq!(fill(&hog) / BLOCK, anybodys / BLOCK - 1);
        assert_eq!(hog.charge_data(BLOCK), Err(ErrorKind::OutOfSpace));
        assert!(hog.charge_map(100).is_ok(), "it can trim");
        // Newcomers have half of what is left,
        let newcomers: Vec<_> = std::iter::from_fn(|| session().ok()).collect();
        assert!((30..33).contains(&newcomers.len()), "{}", newcomers.len());
        assert_eq!(hog.charge_map(Budget::SESSION), Err(ErrorKind::OutOfSpace));
        // and those who are there the rest.
        let rest = fill(&small) + fill(&other) + fill(&newcomers[0]);
        assert!((1 << 15) - 2 * BLOCK < rest && rest <= 1 << 15, "{rest}");
        assert!(total.data() + total.map() <= 1 << 20);
        hog.uncharge_data(1 << 18);
        assert!(session().is_ok() && hog.charge_data(BLOCK).is_ok());
        drop((hog, small, other, newcomers));
    }

    proptest! {
        /// What may be refused, and what may not, after anything.
        #[test]
        fn nobody_who_has_less_than_a_share_is_refused_while_there_is_room(
            steps in prop::collection::vec((0..6_usize, 0..4_u8, 1..40_000_u64), 1..300),
        ) {
            const LIMIT: u64 = 1 << 20;
            let total = Budget::total(LIMIT);
            let sessions: Vec<_> = (0..6).map(|_| Budget::within(&total, u64::MAX / 2).unwrap()).collect();
            for (index, what, bytes) in steps {
                let session = &sessions[index];
                let before = (session.data(), session.map(), total.data() + total.map());
                let holders = sessions.iter().filter(|session| session.data() > 0).count() as u64;
                match what {
                    0 | 1 => {
                        let charged = session.charge_data(bytes).is_ok();
                        let holders = (holders + u64::from(before.0 == 0)).max(1);
                        let has_room = before.2 + bytes <= LIMIT;
                        let is_small = before.0 + before.1 + bytes <= LIMIT / holders;
                        let is_short = before.2 + bytes + LIMIT / RESERVE > LIMIT;
                        prop_assert_eq!(charged, has_room && (is_small || !is_short));
                        prop_assert_eq!(session.data(), before.0 + if charged { bytes } else { 0 });
                    }
                    2 => session.uncharge_data(bytes.min(before.0)),
                    _ => {
                        let charged = session.charge_map(bytes / 8).is_ok();
                        prop_assert_eq!(session.map(), before.1 + if charged { bytes / 8 } else { 0 });
                    }
                }
                prop_assert!(total.data() + total.map() <= LIMIT);
                prop_assert_eq!(total.data(), sessions.iter().map(Budget::data).sum::<u64>());
                let holders = sessions.iter().filter(|session| session.data() > 0).count() as u64;
                prop_assert_eq!(total.holders.load(Ordering::Relaxed), holders);
            }
        }
    }

    #[test]
    fn all_sessions_are_held_to_the_total() {
        let total = Budget::total(10_000 + 2 * Budget::SESSION);
        let session = || Budget::within(&total, u64::MAX / 2).unwrap();
        let (a, b) = (session(), session());
        assert!(a.charge_data(6_000).is_ok());
        assert!(b.charge_data(6_000).is_err());
        assert!(b.charge_map(4_000).is_ok());
        assert!(a.charge_map(1).is_err() && a.charge_data(1).is_err());
        assert_eq!((a.data(), a.map(), b.data(), b.map()), (6_000, 0, 0, 4_000));
        assert_eq!((total.data(), total.map()), (6_000, 4_000 + 2 * Budget::SESSION));
        assert!(Budget::within(&total, 1).is_err());
        drop((a, b));
        assert_eq!(total.map(), 4_000, "the overlay gives back what it charged, the budget its own");
    }
}
