//! 512 blocks: two bit planes, and the slots of those that are allocated.
//!
//! The slots are in block order without gaps, found by counting bits: a leaf with one block costs some 180 bytes, a
//! full one four bytes a block. The first four slots lie in the leaf itself, so that one byte written here and there takes
//! no second piece of memory. The `zero` plane is there only where something was zeroed: most leaves are just written.

use super::Content;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard, load_locked};
use crate::sys::Slot;
use smallvec::SmallVec;
use std::ops::Range;
use std::sync::PoisonError;

/// Blocks in a leaf. For loom, which looks at every word of its planes, fewer.
pub(super) const LEAF_BLOCKS: usize = if cfg!(loom) { 128 } else { 512 };
const WORDS: usize = LEAF_BLOCKS / 64;

/// What the overlay knows of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing: the base shows through.
    Unallocated,
    /// Its contents.
    Allocated,
    /// That it reads as zeroes.
    Zero,
}

#[derive(Debug, Default)]
pub(super) struct Leaf {
    /// The overlay decides about the block.
    present: [AtomicU64; WORDS],
    contents: Mutex<Contents>,
}

/// What the blocks that are present hold.
#[derive(Debug, Default)]
struct Contents {
    /// Those that are zero: never set where `present` is not. None, as long as there are none.
    zero: Option<Box<[u64; WORDS]>>,
    /// The memory of the others, in block order.
    slots: Slots,
}

/// A vector whose first elements lie where it would keep the address of them.
pub(super) type Slots = SmallVec<[Slot; 4]>;

const _: () = assert!(size_of::<Slots>() == size_of::<Vec<Slot>>());

/// A leaf whose slots and planes nobody else changes.
pub(super) struct Locked<'a> {
    present: &'a [AtomicU64; WORDS],
    contents: MutexGuard<'a, Contents>,
}

impl Leaf {
    /// Bytes charged for a leaf, beside its place in the tree: itself, and what the allocator needs for it.
    pub(super) const COST: u64 = 176;

    pub(super) fn all_zero() -> Self {
        let contents = Contents { zero: Some(Box::new([u64::MAX; WORDS])), slots: Slots::new() };
        let present = std::array::from_fn(|_| AtomicU64::new(u64::MAX));
        Self { present, contents: Mutex::new(contents) }
    }

    pub(super) fn lock(&self) -> Locked<'_> {
        let contents = self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        Locked { present: &self.present, contents }
    }

    /// What it holds, to be given up: the leaf is of no use any more.
    pub(super) fn take_slots(&mut self) -> Slots {
        std::mem::take(&mut self.contents.get_mut().unwrap_or_else(PoisonError::into_inner).slots)
    }

    /// The runs that make up the blocks `within`, in order.
    pub(super) fn for_runs(&self, within: Range<usize>, mut see: impl FnMut(Range<usize>, Content<'_>)) {
        // Without the lock: blocks of which the overlay knew nothing an instant ago were the base's then.
        if self.next_present(within.start) >= within.end {
            return see(within, Content::Unallocated);
        }
        let leaf = self.lock();
        let mut at = within.start;
        while at < within.end {
            let state = leaf.state(at);
            let end = leaf.run_end(at, state).min(within.end);
            see(
                at..end,
                match state {
                    State::Unallocated => Content::Unallocated,
                    State::Zero => Content::Zero,
                    State::Allocated => {
                        let rank = leaf.rank(at);
                        Content::Allocated(&leaf.contents.slots[rank..rank + (end - at)])
                    }
                },
            );
            at = end;
        }
    }

    /// Calls `see` for the runs of blocks and their states that make up `blocks` of the device, in order, until it says
    /// false; says so, too. `first` is the leaf's first block.
    pub(super) fn for_states(
        &self,
        blocks: Range<u64>,
        first: u64,
        mut see: impl FnMut(Range<u64>, State) -> bool,
    ) -> bool {
        #[allow(clippy::cast_possible_truncation, reason = "within a leaf everything is at most 512")]
        let within = (blocks.start - first) as usize..(blocks.end - first) as usize;
        let mut going = true;
        self.for_runs(within, |run, content| {
            let state = match content {
                Content::Unallocated => State::Unallocated,
                Content::Zero => State::Zero,
                Content::Allocated(_) => State::Allocated,
            };
            going = going && see(first + run.start as u64..first + run.end as u64, state);
        });
        going
    }

    fn next_present(&self, from: usize) -> usize {
        // Acquire: whoever sees the bit sees the block.
        first_one(from, |word| self.present[word].load(Ordering::Acquire))
    }
}

/// The first bit that is one, from `from` on, in words given by `word`; `LEAF_BLOCKS` if there is none.
fn first_one(from: usize, word: impl Fn(usize) -> u64) -> usize {
    let mut mask = u64::MAX << (from % 64);
    for index in from / 64..WORDS {
        let bits = word(index) & mask;
        if bits != 0 {
            return index * 64 + bits.trailing_zeros() as usize;
        }
        mask = u64::MAX;
    }
    LEAF_BLOCKS
}

impl Locked<'_> {
    fn present(&self, word: usize) -> u64 {
        load_locked(&self.present[word])
    }

    fn zero(&self, word: usize) -> u64 {
        self.contents.zero.as_ref().map_or(0, |zero| zero[word])
    }

    fn allocated(&self, word: usize) -> u64 {
        self.present(word) & !self.zero(word)
    }

    /// A leaf with the same contents, whose slots are made from this one's by `share`.
    pub(super) fn copy(&self, share: impl FnMut(&Slot) -> Slot) -> Leaf {
        let Contents { zero, slots } = &*self.contents;
        let contents = Contents { zero: zero.clone(), slots: slots.iter().map(share).collect() };
        let present = std::array::from_fn(|word| AtomicU64::new(self.present(word)));
        Leaf { present, contents: Mutex::new(contents) }
    }

    /// Calls `see` for each block of `within` that is allocated.
    pub(super) fn for_slots(&self, within: Range<usize>, mut see: impl FnMut(usize, &Slot)) {
        let mut at = within.start;
        while at < within.end {
            let state = self.state(at);
            let end = self.run_end(at, state).min(within.end);
            if state == State::Allocated {
                let rank = self.rank(at);
                let slots = &self.contents.slots[rank..rank + (end - at)];
                (at..end).zip(slots).for_each(|(block, slot)| see(block, slot));
            }
            at = end;
        }
    }

    /// How many blocks are allocated.
    pub(super) fn slots(&self) -> usize {
        self.contents.slots.len()
    }

    pub(super) fn state(&self, block: usize) -> State {
        let (word, bit) = (block / 64, 1 << (block % 64));
        match (self.present(word) & bit != 0, self.zero(word) & bit != 0) {
            (false, _) => State::Unallocated,
            (true, false) => State::Allocated,
            (true, true) => State::Zero,
        }
    }

    /// Where the run of `state` that `from` is in ends.
    fn run_end(&self, from: usize, state: State) -> usize {
        match state {
            State::Unallocated => first_one(from, |word| self.present(word)),
            State::Allocated => first_one(from, |word| !self.allocated(word)),
            State::Zero => first_one(from, |word| !(self.present(word) & self.zero(word))),
        }
    }

    /// How many allocated blocks there are before `block`.
    fn rank(&self, block: usize) -> usize {
        let before: u32 = (0..block / 64).map(|word| self.allocated(word).count_ones()).sum();
        let last = self.allocated(block / 64) & !(u64::MAX << (block % 64));
        (before + last.count_ones()) as usize
    }

    /// The slot of a block that is allocated.
    pub(super) fn slot_mut(&mut self, block: usize) -> Option<&mut Slot> {
        if self.state(block) != State::Allocated {
            return None;
        }
        let rank = self.rank(block);
        Some(&mut self.contents.slots[rank])
    }

    /// Makes `slot` the contents of the block; returns the slot it had.
    pub(super) fn set_allocated(&mut self, block: usize, slot: Slot) -> Option<Slot> {
        if let Some(old) = self.slot_mut(block) {
            return Some(std::mem::replace(old, slot));
        }
        let rank = self.rank(block);
        self.contents.slots.insert(rank, slot);
        let (word, bit) = (block / 64, 1 << (block % 64));
        if let Some(zero) = &mut self.contents.zero {
            zero[word] &= !bit;
        }
        self.present[word].fetch_or(bit, Ordering::Release);
        None
    }

    /// Makes the blocks zero; what they held goes to `freed`.
    pub(super) fn set_zero(&mut self, blocks: Range<usize>, freed: &mut Vec<Slot>) {
        if blocks.is_empty() {
            return;
        }
        let first = self.rank(blocks.start);
        let end = if blocks.end == LEAF_BLOCKS { self.contents.slots.len() } else { self.rank(blocks.end) };
        let Contents { zero, slots } = &mut *self.contents;
        freed.extend(slots.drain(first..end));
        if slots.is_empty() {
            slots.shrink_to_fit();
        }
        let zero = zero.get_or_insert_default();
        for word in blocks.start / 64..blocks.end.div_ceil(64) {
            let low = blocks.start.saturating_sub(word * 64);
            let high = (blocks.end - word * 64).min(64);
            let mask = (u64::MAX << low) & (u64::MAX >> (64 - high));
            zero[word] |= mask;
            self.present[word].fetch_or(mask, Ordering::Release);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::sys::Arena;
    use bitvec::prelude::*;
    use proptest::prelude::*;

    fn runs(leaf: &Leaf, within: Range<usize>) -> Vec<(Range<usize>, State, usize)> {
        let mut all = Vec::new();
        leaf.for_runs(within, |run, content| {
            all.push(match content {
                Content::Unallocated => (run, State::Unallocated, 0),
                Content::Zero => (run, State::Zero, 0),
                Content::Allocated(slots) => (run, State::Allocated, slots.len()),
            });
        });
        all
    }

    #[test]
    fn slots_are_found_by_counting_bits() {
        let arena = Arena::reserve(600, 4096).unwrap();
        let leaf = Leaf::default();
        for block in [511, 0, 64, 63, 300] {
            let number = u32::try_from(block).unwrap();
            assert!(leaf.lock().set_allocated(block, arena.adopt(number)).is_none());
        }
        for block in [0, 63, 64, 300, 511] {
            assert_eq!(leaf.lock().slot_mut(block).unwrap().number() as usize, block);
        }
        assert_eq!(leaf.lock().set_allocated(64, arena.adopt(599)).unwrap().number(), 64);
        assert_eq!(
            runs(&leaf, 60..66),
            [(60..63, State::Unallocated, 0), (63..65, State::Allocated, 2), (65..66, State::Unallocated, 0)]
        );
    }

    #[test]
    fn zeroing_frees_and_writing_brings_back() {
        let arena = Arena::reserve(512, 4096).unwrap();
        let leaf = Leaf::default();
        for block in 0..512_u32 {
            let _ = leaf.lock().set_allocated(block as usize, arena.adopt(block));
        }
        let mut freed = Vec::new();
        leaf.lock().set_zero(10..500, &mut freed);
        assert_eq!((freed.len(), freed[0].number()), (490, 10));
        let _ = leaf.lock().set_allocated(100, freed.pop().unwrap());
        assert_eq!(
            runs(&leaf, 0..512),
            [
                (0..10, State::Allocated, 10),
                (10..100, State::Zero, 0),
                (100..101, State::Allocated, 1),
                (101..500, State::Zero, 0),
                (500..512, State::Allocated, 12)
            ]
        );
        leaf.lock().set_zero(0..512, &mut freed);
        assert_eq!(runs(&leaf, 0..512), [(0..512, State::Zero, 0)]);
        assert_eq!(freed.len(), 489 + 10 + 1 + 12);
    }

    proptest! {
        #[test]
        fn the_planes_are_what_a_bit_vector_says(
            ops in prop::collection::vec((any::<bool>(), 0..LEAF_BLOCKS, 1..100_usize), 1..60),
        ) {
            let arena = Arena::reserve(8192, 4096).unwrap();
            let leaf = Leaf::default();
            let (mut present, mut zero) = (bitvec![0; LEAF_BLOCKS], bitvec![0; LEAF_BLOCKS]);
            let mut numbers = 0..;
            let mut freed = Vec::new();
            for (allocate, start, len) in ops {
                let blocks = start..(start + len).min(LEAF_BLOCKS);
                present[blocks.clone()].fill(true);
                zero[blocks.clone()].fill(!allocate);
                if allocate {
                    for block in blocks {
                        let slot = arena.adopt(numbers.next().unwrap());
                        freed.extend(leaf.lock().set_allocated(block, slot));
                    }
                } else {
                    leaf.lock().set_zero(blocks, &mut freed);
                }
                prop_assert!(BitSlice::<_, Lsb0>::from_slice(&leaf.present) == present.as_bitslice());
                let zeroes = *leaf.lock().contents.zero.clone().unwrap_or_default();
                prop_assert!(BitSlice::<_, Lsb0>::from_slice(&zeroes) == zero.as_bitslice());
                let allocated = present.count_ones() - zero.count_ones();
                prop_assert_eq!(leaf.lock().contents.slots.len(), allocated);
                let mut seen = 0;
                for (run, state, slots) in runs(&leaf, 0..LEAF_BLOCKS) {
                    prop_assert_eq!(run.start, seen);
                    prop_assert!(present[run.clone()].all() || present[run.clone()].not_any());
                    prop_assert_eq!(state == State::Unallocated, !present[run.start]);
                    prop_assert_eq!(state == State::Zero, zero[run.start]);
                    let expected = if state == State::Allocated { run.len() } else { 0 };
                    prop_assert_eq!(slots, expected);
                    seen = run.end;
                }
                prop_assert_eq!(seen, LEAF_BLOCKS);
            }
        }
    }

    #[test]
    fn an_all_zero_leaf_and_an_empty_one_are_one_run() {
        assert_eq!(runs(&Leaf::all_zero(), 0..512), [(0..512, State::Zero, 0)]);
        assert_eq!(runs(&Leaf::default(), 3..77), [(3..77, State::Unallocated, 0)]);
    }
}
