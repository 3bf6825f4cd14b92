//! Memory as a budget: what a session, and all sessions together, may hold.
//!
//! Three things are counted: *data* (blocks), *map* (what it takes to find them), and what is *pinned*: blocks that were
//! overwritten or trimmed while a reply that its client does not take still holds them. A session's limit is for its
//! data, exactly, with a margin for the others; the server's limit is for data and map, with a margin for what is pinned.

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
    map: AtomicU64,
    pinned: sync::atomic::AtomicU64,
    /// So much that is pinned is not held against the limit.
    pinned_margin: u64,
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
    /// `OutOfSpace` when nothing is left of it.
    pub fn within(parent: &Arc<Self>, limit: u64) -> Outcome<Self> {
        parent.charge_map(Self::SESSION)?;
        Ok(Self::empty(limit, Self::SESSION_PINNED_MARGIN, Some(Arc::clone(parent))))
    }

    fn empty(limit: u64, pinned_margin: u64, parent: Option<Arc<Self>>) -> Self {
        let [data, map] = [const { AtomicU64::new(0) }; 2];
        Self {
            limit: AtomicU64::new(limit),
            data,
            map,
            pinned: sync::atomic::AtomicU64::new(0),
            pinned_margin,
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

    pub(super) fn charge_data(&self, bytes: u64) -> Outcome<()> {
        let data = self.data.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let within = match &self.parent {
            None => data + self.map() + self.pinned_beyond_margin() <= self.limit(),
            Some(parent) => {
                data + self.pinned_beyond_margin() <= self.limit() && parent.charge_data(bytes).is_ok()
            }
        };
        if within {
            return Ok(());
        }
        self.data.fetch_sub(bytes, Ordering::Relaxed);
        Err(ErrorKind::OutOfSpace)
    }

    pub(super) fn charge_map(&self, bytes: u64) -> Outcome<()> {
        let map = self.map.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let within = match &self.parent {
            None => self.data() + map + self.pinned_beyond_margin() <= self.limit(),
            Some(parent) => map <= self.map_margin() && parent.charge_map(bytes).is_ok(),
        };
        if within {
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
        self.data.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(parent) = &self.parent {
            parent.uncharge_data(bytes);
        }
    }

    pub(super) fn uncharge_map(&self, bytes: u64) {
        self.map.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(parent) = &self.parent {
            parent.uncharge_map(bytes);
        }
    }
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
