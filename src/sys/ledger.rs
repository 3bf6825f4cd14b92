//! How many hold each slot of an arena.
//!
//! With loom there is a second account: it cannot see mapped memory, so for each slot a cell stands in for its bytes,
//! and is touched whenever they may be. Elsewhere that costs nothing.
//!
//! # Safety
//!
//! Keeps the counts of invariant 2 of the [parent](super) reachable as atomics only.

#[cfg(not(loom))]
pub(super) use plain::Ledger;
#[cfg(loom)]
pub(super) use watched::Ledger;

#[cfg(not(loom))]
mod plain {
    use memmap2::{MmapOptions, MmapRaw};
    use std::io;
    use std::ops::Range;
    use std::sync::atomic::AtomicU32;

    /// One count a slot, in memory that exists as far as it was used.
    #[derive(Debug)]
    pub(in super::super) struct Ledger {
        counts: MmapRaw,
        slots: u32,
    }

    impl Ledger {
        pub(in super::super) fn new(slots: u32) -> io::Result<Self> {
            let count = usize::try_from(slots).map_err(|_| io::ErrorKind::OutOfMemory)?.max(1);
            let counts =
                MmapOptions::new().len(count * size_of::<AtomicU32>()).no_reserve_swap().map_anon()?;
            Ok(Self { counts: counts.into(), slots })
        }

        #[inline]
        pub(in super::super) fn count(&self, number: u32) -> &AtomicU32 {
            assert!(number < self.slots, "slot outside the arena");
            let address = self.counts.as_ptr().cast::<AtomicU32>().wrapping_add(number as usize);
            // SAFETY: `counts` has one aligned, zero-initialised u32 for every number below `slots` (just checked),
            // lives as long as `self`, and is reached through this function only, so always as an atomic.
            unsafe { &*address }
        }

        /// The slots' bytes may be read from here on.
        #[inline]
        pub(in super::super) fn note_reading(&self, _slots: Range<u32>) {}

        /// The slots' bytes may be written from here on.
        #[inline]
        pub(in super::super) fn note_writing(&self, _slots: Range<u32>) {}
    }
}

#[cfg(loom)]
mod watched {
    use loom::cell::UnsafeCell;
    use loom::sync::atomic::AtomicU32;
    use std::io;
    use std::ops::Range;

    #[derive(Debug)]
    pub(in super::super) struct Ledger {
        slots: Box<[(AtomicU32, UnsafeCell<()>)]>,
    }

    // SAFETY: the cells hold nothing; loom itself checks every use of them, by whatever thread.
    unsafe impl Sync for Ledger {}

    impl Ledger {
        pub(in super::super) fn new(slots: u32) -> io::Result<Self> {
            Ok(Self { slots: (0..slots).map(|_| (AtomicU32::new(0), UnsafeCell::new(()))).collect() })
        }

        pub(in super::super) fn count(&self, number: u32) -> &AtomicU32 {
            &self.slots[number as usize].0
        }

        pub(in super::super) fn note_reading(&self, slots: Range<u32>) {
            slots.for_each(|number| self.slots[number as usize].1.with(|_| ()));
        }

        pub(in super::super) fn note_writing(&self, slots: Range<u32>) {
            slots.for_each(|number| self.slots[number as usize].1.with_mut(|_| ()));
        }
    }
}
