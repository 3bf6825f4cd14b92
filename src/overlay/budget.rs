//! Memory as a budget: what a session, and all sessions together, may hold.
//!
//! Two things are counted: *data* (blocks) and *map* (what it takes to find them). A session's limit is for its data,
//! exactly, with a margin for the map; the server's limit is for both.

use super::Outcome;
use crate::error::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What may be held, and what is held, in bytes.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    data: AtomicU64,
    map: AtomicU64,
    parent: Option<Arc<Budget>>,
}

impl Budget {
    /// The budget of a server: `limit` bytes for data and map of all sessions.
    #[must_use]
    pub fn total(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, data: AtomicU64::new(0), map: AtomicU64::new(0), parent: None })
    }

    /// Bytes that the total is charged with for a session as such, however empty.
    pub const SESSION: u64 = 1024;

    /// The budget of a session: `limit` bytes of data, within what is left of `parent`.
    ///
    /// # Errors
    /// `OutOfSpace` when nothing is left of it.
    pub fn within(parent: &Arc<Self>, limit: u64) -> Outcome<Self> {
        parent.charge_map(Self::SESSION)?;
        let parent = Some(Arc::clone(parent));
        Ok(Self { limit, data: AtomicU64::new(0), map: AtomicU64::new(0), parent })
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

    /// A session's map may take this much beside its data: enough for a session full of blocks of 4 KiB that all lie in
    /// leaves of their own.
    fn map_margin(&self) -> u64 {
        self.limit / 16 + (1 << 20)
    }

    pub(super) fn charge_data(&self, bytes: u64) -> Outcome<()> {
        let data = self.data.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let within = match &self.parent {
            None => data + self.map() <= self.limit,
            Some(parent) => data <= self.limit && parent.charge_data(bytes).is_ok(),
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
            None => self.data() + map <= self.limit,
            Some(parent) => map <= self.map_margin() && parent.charge_map(bytes).is_ok(),
        };
        if within {
            return Ok(());
        }
        self.map.fetch_sub(bytes, Ordering::Relaxed);
        Err(ErrorKind::OutOfSpace)
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
        }
    }
}

#[cfg(test)]
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
