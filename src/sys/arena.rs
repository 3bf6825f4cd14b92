//! Block memory: one reserved address range, cut into equal slots that are owned like an `Arc`.
//!
//! ```text
//!  reserved, touched chunk by chunk            |slot 0|slot 1| ... |slot 511|slot 512| ...
//!  handles: holders and readers, 2 u32 a slot  |  1 0 |  0 0 | ... |   1 3  |   2 0  | ...
//!  payer: one u32 a slot                       |   7  |   -  | ... |    7   |    9   | ...
//! ```
//!
//! Address space is reserved once, for the whole budget, so a slot is a number and its address is arithmetic: four
//! bytes in an overlay's map instead of a pointer.
//!
//! There are two kinds of handles, counted in the two halves of one word: a [`Slot`] *holds* the memory as somebody's data;
//! a [`Loan`] only reads it for a while, as a reply on its way does. Both keep it. Who gives up the last handle of a kind is
//! told what is left, so that data that ends can be told from data that somebody else has, too.
//!
//! # Safety
//!
//! Keeps invariant 2 of the [parent](super). A [`Slot`] is made by [`Arena::adopt`] only, for a number whose counts
//! were 0, and neither it nor a [`Loan`] is `Copy` or `Clone`: [`Arena::share`] and [`Arena::lend`] are the only ways to
//! a second handle and raise a count first. `&Slot` gives `&[u8]`; `&mut Slot` gives `&mut [u8]` only while there is one
//! holder and no reader, when no other handle exists that could be read through or shared. A slot must be used with the
//! arena that made it, and only the pool may wipe and discard: so these calls are for this crate alone, whose overlay and
//! transmission each know of one arena per server.

use super::ledger::Ledger;
use crate::sync::atomic::{Ordering, fence};
use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};
use rustix::mm::MlockFlags;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16};

/// A counted handle on the memory of one slot, which holds it as data. Not released by dropping: hand it to
/// `Arena::release`.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
#[must_use = "a slot that is dropped instead of released is lost to the arena"]
pub struct Slot(u32);

impl Slot {
    /// The slot's number: neighbours in number are neighbours in memory.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.0
    }
}

/// A counted handle on the memory of one slot, to read it for a while. Not given back by dropping: hand it to
/// `Arena::give_back`.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a loan that is dropped instead of given back is lost to the arena"]
pub struct Loan(u32);

impl Loan {
    /// The slot's number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.0
    }
}

/// What is left of a slot when a holder has given it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// Nobody has it: the memory is the caller's to wipe and to adopt again.
    Nobody,
    /// It is nobody's data any more, and still being read.
    Readers,
    /// Others hold it.
    Holders,
}

/// Loans of slots that are neighbours in memory, so that their bytes are one piece.
#[derive(Debug)]
#[must_use = "loans that are dropped instead of given back are lost to the arena"]
pub struct SlotRun {
    first: Loan,
    count: u32,
}

impl SlotRun {
    /// A run of one.
    pub fn new(loan: Loan) -> Self {
        Self { first: loan, count: 1 }
    }

    /// The number of the slot that would extend the run.
    #[must_use]
    pub fn next_number(&self) -> u32 {
        self.first.0 + self.count
    }

    /// Takes the loan into the run if it is the next neighbour, else gives it back.
    ///
    /// # Errors
    /// The loan itself, when it lies elsewhere.
    pub fn extend(&mut self, loan: Loan) -> Result<(), Loan> {
        if loan.0 != self.next_number() {
            return Err(loan);
        }
        self.count += 1;
        Ok(())
    }

    /// The loans, one by one.
    pub fn into_loans(self) -> impl Iterator<Item = Loan> {
        (self.first.0..self.first.0 + self.count).map(Loan)
    }
}

/// Reserved memory for blocks, and the reference count of each.
#[derive(Debug)]
pub struct Arena {
    memory: MmapRaw,
    // Bytes from the start of the mapping to the first slot, so that chunks are aligned for huge pages.
    lead: usize,
    ledger: Ledger,
    slot_size: usize,
    slots: u32,
    // Numbers behind those of the slots, which have counts and payers and no memory.
    places: u32,
    // When a slot was used last, in ticks; nothing where nobody asks.
    used: Box<[AtomicU16]>,
    tick: AtomicU16,
    // Written by `lock` alone.
    locked: AtomicBool,
}

/// In the tick of a slot's use: it is still to come.
const EXPECTED: u16 = 1 << 15;
/// Ticks after which whoever was to use a slot is gone.
const EXPECTED_FOR: u16 = 16;

/// One holder in a slot's count; readers are counted below it.
const HOLDER: u64 = 1 << 32;

#[allow(clippy::cast_possible_truncation, reason = "the upper half")]
fn holders(count: u64) -> u32 {
    (count / HOLDER) as u32
}

#[allow(clippy::cast_possible_truncation, reason = "the lower half")]
fn readers(count: u64) -> u32 {
    (count % HOLDER) as u32
}

/// Alignment of the first slot: the size of a huge page on x86-64 and, with 4 KiB pages, on arm64.
const ALIGNMENT: usize = 2 << 20;

impl Arena {
    /// Reserves address space, not memory, for `slots` slots of `slot_size` bytes.
    ///
    /// # Errors
    /// What `mmap(2)` says when the address space is full or limited.
    pub fn reserve(slots: u32, slot_size: usize) -> io::Result<Self> {
        Self::reserve_with_places(slots, slot_size, 0)
    }

    /// The same, and the numbers of `places` more behind the slots, for blocks whose bytes are elsewhere: they are held and paid
    /// for as slots are, and nobody can look at them here. With any, it is noted which slots were used lately.
    ///
    /// # Errors
    /// As [`Arena::reserve`].
    pub fn reserve_with_places(slots: u32, slot_size: usize, places: u32) -> io::Result<Self> {
        let too_large = || io::Error::from(io::ErrorKind::OutOfMemory);
        let count = usize::try_from(slots).map_err(|_| too_large())?.max(1);
        let bytes =
            count.checked_mul(slot_size).and_then(|n| n.checked_add(ALIGNMENT)).ok_or_else(too_large)?;
        let memory = MmapRaw::from(MmapOptions::new().len(bytes).no_reserve_swap().map_anon()?);
        // Neither a core file nor a child process may hold what sessions wrote.
        memory.advise(Advice::DontDump)?;
        memory.advise(Advice::DontFork)?;
        // Where a process locks all of its memory (a daemon that serves the kernel does), this is locked by `lock` or not at
        // all: what is locked can be given back in one way only, and not on every kernel.
        memory.unlock()?;
        // Not every kernel has huge pages; without them there are more page faults, on a helper thread.
        let _ = memory.advise(Advice::HugePage);
        let lead = memory.as_ptr().align_offset(ALIGNMENT);
        Ok(Self {
            memory,
            lead,
            ledger: Ledger::new(slots.checked_add(places).ok_or_else(too_large)?)?,
            slot_size,
            slots,
            places,
            used: (0..if places > 0 { slots } else { 0 }).map(|_| AtomicU16::new(0)).collect(),
            tick: AtomicU16::new(0),
            locked: AtomicBool::new(false),
        })
    }

    /// Bytes in a slot.
    #[must_use]
    pub fn slot_size(&self) -> usize {
        self.slot_size
    }

    /// Slots in the arena.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Places behind the slots.
    #[must_use]
    pub fn places(&self) -> u32 {
        self.places
    }

    /// Whether the number is a place's: its bytes are elsewhere.
    #[must_use]
    pub fn is_away(&self, number: u32) -> bool {
        number >= self.slots
    }

    /// Notes that a slot is used.
    pub(crate) fn touch(&self, slot: &Slot) {
        if let Some(used) = self.used.get(slot.0 as usize) {
            used.store(self.tick.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Notes that somebody waits for what is in a slot, and will use it soon.
    pub(crate) fn expect_use(&self, slot: &Slot) {
        if let Some(used) = self.used.get(slot.0 as usize) {
            used.store(self.tick.load(Ordering::Relaxed) | EXPECTED, Ordering::Relaxed);
        }
    }

    /// Says which tick it is. They come round.
    pub(crate) fn set_tick(&self, tick: u16) {
        self.tick.store(tick & !EXPECTED, Ordering::Relaxed);
    }

    /// Ticks since a slot was used; `None` if it is going to be.
    pub(crate) fn idle_ticks(&self, slot: &Slot) -> Option<u16> {
        let used = self.used.get(slot.0 as usize)?.load(Ordering::Relaxed);
        let ago = self.tick.load(Ordering::Relaxed).wrapping_sub(used) & !EXPECTED;
        (used & EXPECTED == 0 || ago > EXPECTED_FOR).then_some(ago)
    }

    /// The bytes of a slot that is lent.
    #[must_use]
    pub(crate) fn loan_bytes<'a>(&'a self, loan: &'a Loan) -> &'a [u8] {
        self.borrow(loan.0, 1)
    }

    /// Bytes that are reserved.
    #[must_use]
    pub fn address_space(&self) -> usize {
        self.memory.len()
    }

    fn address(&self, number: u32) -> *mut u8 {
        self.memory.as_mut_ptr().wrapping_add(self.lead + number as usize * self.slot_size)
    }

    /// Makes the first handle of a free slot.
    ///
    /// # Panics
    /// If a handle of it exists already.
    pub(crate) fn adopt(&self, number: u32) -> Slot {
        let taken = self.ledger.count(number).swap(HOLDER, Ordering::Relaxed);
        assert_eq!(taken, 0, "slot adopted twice");
        Slot(number)
    }

    /// A second holder of the same memory.
    pub(crate) fn share(&self, slot: &Slot) -> Slot {
        // As for `Arc`: a new handle can only come from an existing one, so no ordering is needed.
        let before = self.ledger.count(slot.0).fetch_add(HOLDER, Ordering::Relaxed);
        assert!(holders(before) < u32::MAX / 2, "too many holders of one slot");
        Slot(slot.0)
    }

    /// A reader of the same memory.
    pub(crate) fn lend(&self, slot: &Slot) -> Loan {
        // As in `share`.
        let before = self.ledger.count(slot.0).fetch_add(1, Ordering::Relaxed);
        assert!(readers(before) < u32::MAX / 2, "too many readers of one slot");
        Loan(slot.0)
    }

    /// Gives a holder's handle back.
    #[must_use]
    pub(crate) fn release(&self, slot: Slot) -> Left {
        // For as long as the handle was there.
        self.ledger.note_reading(slot.0..slot.0 + 1);
        // As for `Arc`: the last one must see every write that was made through the others.
        let left = self.ledger.count(slot.0).fetch_sub(HOLDER, Ordering::Release) - HOLDER;
        if left == 0 {
            fence(Ordering::Acquire);
            Left::Nobody
        } else if holders(left) == 0 {
            Left::Readers
        } else {
            Left::Holders
        }
    }

    /// Gives a reader's handle back; returns whether nobody has the slot any more, whose memory is then the caller's to
    /// wipe and to adopt again.
    #[must_use]
    pub(crate) fn give_back(&self, loan: Loan) -> bool {
        self.ledger.note_reading(loan.0..loan.0 + 1);
        // As in `release`.
        let last = self.ledger.count(loan.0).fetch_sub(1, Ordering::Release) == 1;
        if last {
            fence(Ordering::Acquire);
        }
        last
    }

    /// Whether this is the only handle on its memory.
    #[must_use]
    pub(crate) fn is_unique(&self, slot: &mut Slot) -> bool {
        self.ledger.count(slot.0).load(Ordering::Acquire) == HOLDER
    }

    /// Whether this is the only holder's handle, and whether there are readers. Where the caller can keep others from
    /// sharing this handle, the first stays true.
    #[must_use]
    pub(crate) fn is_sole_and_read(&self, slot: &Slot) -> (bool, bool) {
        let count = self.ledger.count(slot.0).load(Ordering::Acquire);
        (holders(count) == 1, readers(count) > 0)
    }

    /// Who was noted to pay for the memory.
    #[must_use]
    pub(crate) fn payer(&self, number: u32) -> u32 {
        // Noted before the slot became anybody's data, by which everybody else has got to know it.
        self.ledger.payer(number).load(Ordering::Relaxed)
    }

    /// Notes who pays for the memory.
    pub(crate) fn set_payer(&self, slot: &mut Slot, payer: u32) {
        self.ledger.payer(slot.0).store(payer, Ordering::Relaxed);
    }

    /// The slot's bytes.
    #[must_use]
    pub(crate) fn bytes<'a>(&'a self, slot: &'a Slot) -> &'a [u8] {
        self.borrow(slot.0, 1)
    }

    /// The bytes of a run of slots, in one piece.
    #[must_use]
    pub(crate) fn run_bytes<'a>(&'a self, run: &'a SlotRun) -> &'a [u8] {
        self.borrow(run.first.0, run.count)
    }

    /// The bytes of `count` slots from `first` on, on all of which the caller borrows handles for the result's life.
    fn borrow(&self, first: u32, count: u32) -> &[u8] {
        let left = self.slots.checked_sub(first).expect("slots outside the arena");
        assert!(count > 0 && count <= left, "slots outside the arena");
        self.ledger.note_reading(first..first + count);
        let len = self.slot_size * count as usize;
        // SAFETY: the range lies in `memory` (just checked), which is initialised (anonymous memory is zeroes) and
        // lives as long as `self`. While the caller holds handles on these slots nobody has `&mut` to them: that
        // takes one holder, no reader, and the one handle by exclusive reference.
        unsafe { std::slice::from_raw_parts(self.address(first), len) }
    }

    /// The slot's bytes, to write, if no other handle on them exists and they are here.
    #[must_use]
    pub(crate) fn bytes_mut<'a>(&'a self, slot: &'a mut Slot) -> Option<&'a mut [u8]> {
        if !self.is_unique(slot) || self.is_away(slot.0) {
            return None;
        }
        self.ledger.note_writing(slot.0..slot.0 + 1);
        // SAFETY: in bounds and initialised as in `borrow`. There is one handle, and `slot`, which is it, is borrowed
        // exclusively for the result's life, so nobody else can read these bytes or make a handle to.
        Some(unsafe { std::slice::from_raw_parts_mut(self.address(slot.0), self.slot_size) })
    }

    /// Keeps what is in the slots out of swap from now on: each page from its first touch to its being given back.
    ///
    /// # Errors
    /// `Unsupported` before Linux 5.18, where memory that is locked cannot be given back, `OutOfMemory` or
    /// `PermissionDenied` if RLIMIT_MEMLOCK is less than the whole address range.
    pub(crate) fn lock(&self) -> io::Result<()> {
        // Nothing of it: whether the kernel knows how.
        self.dont_need_locked(0, 0).map_err(|_| io::Error::from(io::ErrorKind::Unsupported))?;
        let address = self.memory.as_mut_ptr().cast();
        // SAFETY: the range is the mapping that `self` owns; locking changes no byte of it.
        unsafe { rustix::mm::mlock_with(address, self.memory.len(), MlockFlags::ONFAULT) }?;
        self.locked.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Gives pages back although they are locked. The range must hold slots that nobody has, or nothing.
    fn dont_need_locked(&self, offset: usize, len: usize) -> io::Result<()> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.memory.len()), "outside the arena");
        let address = self.memory.as_mut_ptr().wrapping_add(offset).cast();
        // SAFETY: in bounds; as in `discard`, which is the only one to give a length, no reference to the bytes exists.
        match unsafe { libc::madvise(address, len, libc::MADV_DONTNEED_LOCKED) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Brings the memory of `count` free slots from `first` on into existence, so that first writes do not fault.
    ///
    /// # Errors
    /// `ENOMEM` when the system has no memory left.
    pub fn populate(&self, first: u32, count: u32) -> io::Result<()> {
        let (offset, len) = self.extent(first, count);
        self.memory.advise_range(Advice::PopulateWrite, offset, len)
    }

    /// Gives the memory of `count` free slots from `first` on back to the system; they read as zeroes afterwards.
    ///
    /// # Errors
    /// What `madvise(2)` says.
    ///
    /// # Panics
    /// If a handle on one of them exists.
    pub(crate) fn discard(&self, first: u32, count: u32) -> io::Result<()> {
        let (offset, len) = self.extent(first, count);
        let free =
            (first..first + count).all(|number| self.ledger.count(number).load(Ordering::Acquire) == 0);
        assert!(free, "memory of a slot in use given back");
        self.ledger.note_writing(first..first + count);
        if self.locked.load(Ordering::Relaxed) {
            return self.dont_need_locked(offset, len);
        }
        // SAFETY: no handle on these slots exists (just checked; the pool, which calls this, is the only one that
        // adopts them, and does not do both at once), so no reference to the bytes does either.
        unsafe { self.memory.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, len) }
    }

    /// Overwrites `count` free slots from `first` on with zeroes.
    ///
    /// # Panics
    /// If a handle on one of them exists.
    pub(crate) fn wipe(&self, first: u32, count: u32) {
        let (_, len) = self.extent(first, count);
        let free =
            (first..first + count).all(|number| self.ledger.count(number).load(Ordering::Acquire) == 0);
        assert!(free, "a slot in use wiped");
        self.ledger.note_writing(first..first + count);
        // SAFETY: in bounds, and free as in `discard`. The compiler cannot drop the write: the memory is a mapping
        // that it knows nothing about.
        unsafe { self.address(first).write_bytes(0, len) }
    }

    fn extent(&self, first: u32, count: u32) -> (usize, usize) {
        assert!(first <= self.slots && count <= self.slots - first, "slots outside the arena");
        (self.lead + first as usize * self.slot_size, count as usize * self.slot_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_writable_through_its_only_handle() {
        let arena = Arena::reserve(4, 4096).unwrap();
        let mut slot = arena.adopt(2);
        arena.bytes_mut(&mut slot).unwrap()[7] = 9;
        let other = arena.share(&slot);
        assert!(arena.bytes_mut(&mut slot).is_none());
        assert_eq!(arena.bytes(&other)[7], 9);
        assert_eq!(arena.release(other), Left::Holders);
        assert!(arena.bytes_mut(&mut slot).is_some());
        let loan = arena.lend(&slot);
        assert!(arena.bytes_mut(&mut slot).is_none());
        assert_eq!(arena.run_bytes(&SlotRun::new(loan))[7], 9);
    }

    #[test]
    fn whoever_gives_up_is_told_what_is_left() {
        let arena = Arena::reserve(4, 4096).unwrap();
        let slot = arena.adopt(2);
        let (other, loan, second) = (arena.share(&slot), arena.lend(&slot), arena.lend(&slot));
        assert_eq!(arena.is_sole_and_read(&slot), (false, true));
        assert_eq!(arena.release(other), Left::Holders);
        assert_eq!(arena.is_sole_and_read(&slot), (true, true));
        assert!(!arena.give_back(second));
        assert_eq!(arena.release(slot), Left::Readers);
        assert!(arena.give_back(loan));
        let slot = arena.adopt(2);
        assert_eq!(arena.release(slot), Left::Nobody);
    }

    #[test]
    fn wiped_and_discarded_slots_read_as_zeroes() {
        let arena = Arena::reserve(1024, 4096).unwrap();
        arena.populate(0, 512).unwrap();
        for (number, discard) in [(0, false), (1, true)] {
            let mut slot = arena.adopt(number);
            arena.bytes_mut(&mut slot).unwrap().fill(0xff);
            assert_eq!(arena.release(slot), Left::Nobody);
            if discard {
                arena.discard(number, 1).unwrap()
            } else {
                arena.wipe(number, 1)
            }
            let slot = arena.adopt(number);
            assert!(arena.bytes(&slot).iter().all(|&byte| byte == 0));
            let _ = arena.release(slot);
        }
    }

    #[test]
    #[should_panic(expected = "adopted twice")]
    fn a_slot_in_use_cannot_be_adopted() {
        let arena = Arena::reserve(1, 4096).unwrap();
        let _slot = arena.adopt(0);
        let _ = arena.adopt(0);
    }

    #[test]
    #[should_panic(expected = "in use wiped")]
    fn a_slot_in_use_cannot_be_wiped() {
        let arena = Arena::reserve(1, 4096).unwrap();
        let _slot = arena.adopt(0);
        arena.wipe(0, 1);
    }

    #[test]
    #[should_panic(expected = "outside the arena")]
    fn a_number_outside_the_arena_is_refused() {
        let _ = Arena::reserve(1, 4096).unwrap().adopt(1);
    }
}
