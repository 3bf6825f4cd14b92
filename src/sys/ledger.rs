//! How many hold and read each slot of an arena, and who pays for it.
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
    use std::sync::atomic::{AtomicU32, AtomicU64};

    /// One count and one payer a slot, in memory that exists as far as it was used.
    #[derive(Debug)]
    pub(in super::super) struct Ledger {
        counts: MmapRaw,
        payers: MmapRaw,
        slots: u32,
    }

    impl Ledger {
        pub(in super::super) fn new(slots: u32) -> io::Result<Self> {
            let count = usize::try_from(slots).map_err(|_| io::ErrorKind::OutOfMemory)?.max(1);
            let map = |size: usize| MmapOptions::new().len(count * size).no_reserve_swap().map_anon();
            let (counts, payers) = (map(size_of::<AtomicU64>())?.into(), map(size_of::<AtomicU32>())?.into());
            Ok(Self { counts, payers, slots })
        }

        #[inline]
        pub(in super::super) fn count(&self, number: u32) -> &AtomicU64 {
            assert!(number < self.slots, "slot outside the arena");
            let address = self.counts.as_ptr().cast::<AtomicU64>().wrapping_add(number as usize);
            // SAFETY: `counts` has one aligned, zero-initialised u64 for every number below `slots` (just checked),
            // lives as long as `self`, and is reached through this function only, so always as an atomic.
            unsafe { &*address }
        }

        pub(in super::super) fn payer(&self, number: u32) -> &AtomicU32 {
            assert!(number < self.slots, "slot outside the arena");
            let address = self.payers.as_ptr().cast::<AtomicU32>().wrapping_add(number as usize);
            // SAFETY: as in `count`, for `payers` and its u32.
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
    use loom::sync::atomic::AtomicU64;
    use std::io;
    use std::ops::Range;
    use std::sync::atomic::AtomicU32;

    #[derive(Debug)]
    pub(in super::super) struct Ledger {
        slots: Box<[(AtomicU64, UnsafeCell<()>)]>,
        /// Not loom's: a name in an account book, by which nothing is published.
        payers: Box<[AtomicU32]>,
    }

    // SAFETY: the cells hold nothing; loom itself checks every use of them, by whatever thread.
    unsafe impl Sync for Ledger {}

    impl Ledger {
        pub(in super::super) fn new(slots: u32) -> io::Result<Self> {
            Ok(Self {
                slots: (0..slots).map(|_| (AtomicU64::new(0), UnsafeCell::new(()))).collect(),
                payers: (0..slots).map(|_| AtomicU32::new(0)).collect(),
            })
        }

        pub(in super::super) fn count(&self, number: u32) -> &AtomicU64 {
            &self.slots[number as usize].0
        }

        pub(in super::super) fn payer(&self, number: u32) -> &AtomicU32 {
            &self.payers[number as usize]
        }

        pub(in super::super) fn note_reading(&self, slots: Range<u32>) {
            slots.for_each(|number| self.slots[number as usize].1.with(|_| ()));
        }

        pub(in super::super) fn note_writing(&self, slots: Range<u32>) {
            slots.for_each(|number| self.slots[number as usize].1.with_mut(|_| ()));
        }
    }
}
