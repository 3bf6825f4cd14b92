//! The locks and atomics by which block memory is shared between threads: those of the standard library, or, in a build
//! with `--cfg loom`, loom's, which try every order of events (`src/overlay/interleavings.rs`, `docs/design.md`).
//!
//! Only what publishes, shares and recycles blocks comes from here. Counters whose order does not matter (of data, map and
//! staging) stay the standard library's everywhere, so that loom has fewer orders to try.

#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, atomic};
#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, atomic};

use atomic::{AtomicU64, Ordering};

/// What a word holds that only changes under a lock which the caller has. Others may look at it without that lock.
#[inline]
pub(crate) fn load_locked(word: &AtomicU64) -> u64 {
    if cfg!(loom) {
        // Of the loads of a word loom remembers the last one alone: had the thread that is about to change it looked
        // before, it would never try what comes of it when another looks in between. A change of nothing is remembered.
        word.fetch_or(0, Ordering::Relaxed)
    } else {
        // The lock orders it behind the last change.
        word.load(Ordering::Relaxed)
    }
}
