//! The private half of a device: the blocks that a session wrote, sparse, in memory.
//!
//! ```text
//!  Overlay   leaf index -> Leaf, only where something was written (or "all zero", which has no leaf)
//!  Leaf      512 blocks   present  |1101...|   one bit a block: the overlay decides, not the base
//!                         zero     |0100...|   one bit a block: it decides "reads as zeroes"
//!                         slots    [s0 s3 ..]  memory of the allocated blocks (present, not zero), in block order
//!  Pool      slots of block memory, shared by all overlays of a server, wiped when they come back
//! ```
//!
//! A block is *unallocated* (the base shows through), *allocated* (a slot holds it) or *zero*. What an overlay costs
//! follows from what was written, not from the size of the device.
//!
//! # Locking, and the races that are allowed
//!
//! The tree is behind a reader-writer lock that is taken for writing only to add a leaf, or to put "all zero" in a
//! leaf's place. A leaf's slots and its `zero` plane are behind its mutex; `present` changes only under that mutex, but
//! is atomic, so that a reader that finds it clear may go to the base at once. A write fills its slot first and sets the bit then
//! (Release; readers: Acquire), so a block is seen whole or not at all. Two first writes to parts of one block meet
//! in the mutex: the second finds the block allocated. A reader takes handles on the slots under the mutex and looks
//! at them later; a write in between finds the slot shared and puts a new one in its place, so what was read stays
//! as it was when it was read. Requests that overlap while both are in flight may be seen in either order.

mod budget;
mod leaf;
mod pool;

pub use budget::Budget;
pub use leaf::State;
pub use pool::{Magazine, Pool, Staging};

use crate::error::ErrorKind;
use crate::sync::{RwLock, RwLockReadGuard};
use crate::sys::Slot;
use leaf::{LEAF_BLOCKS, Leaf, Locked};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, PoisonError};

/// The overlay's unit, in bytes: a power of two from 4 KiB to 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize(u32);

impl BlockSize {
    /// 4 KiB: the page size of most hosts and the block size of most file systems.
    pub const DEFAULT: Self = Self(4096);
    /// The smallest.
    pub const MIN: u32 = 4096;
    /// The largest.
    pub const MAX: u32 = 1 << 20;

    /// A block size of `bytes`, if it is a power of two within the limits.
    #[must_use]
    pub fn new(bytes: u32) -> Option<Self> {
        (bytes.is_power_of_two() && (Self::MIN..=Self::MAX).contains(&bytes)).then_some(Self(bytes))
    }

    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// In bytes, as a length in memory.
    #[must_use]
    pub fn in_memory(self) -> usize {
        self.0 as usize
    }

    /// The block that byte `offset` is in.
    #[must_use]
    pub fn index_of(self, offset: u64) -> u64 {
        offset >> self.0.trailing_zeros()
    }

    /// Where in its block byte `offset` is.
    #[must_use]
    pub fn offset_within(self, offset: u64) -> usize {
        #[allow(clippy::cast_possible_truncation, reason = "below 1 MiB by construction")]
        let within = (offset & (self.bytes() - 1)) as usize;
        within
    }

    /// Blocks needed for `bytes` bytes.
    #[must_use]
    pub fn blocks_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }
}

/// What a run of blocks holds, as far as the overlay knows.
#[derive(Debug)]
pub enum Content<'a> {
    /// The base shows through.
    Unallocated,
    /// Zeroes.
    Zero,
    /// The memory of each block of the run.
    Allocated(&'a [Slot]),
}

/// Error kinds of the data path: cheap to make, as quota and range errors are a client's everyday.
pub type Outcome<T> = Result<T, ErrorKind>;

/// What became of an attempt to write part of a block.
enum Step {
    /// It is written; this slot was replaced.
    Done(Option<Slot>),
    /// The base's bytes are needed under it first.
    NeedsBase,
}

/// A node of the tree: a leaf, or nothing for "all of these blocks are zero".
type Node = Option<Box<Leaf>>;
type Tree = BTreeMap<u64, Node>;

/// The blocks that one session wrote.
#[derive(Debug)]
pub struct Overlay {
    pool: Arc<Pool>,
    budget: Budget,
    blocks: u64,
    tree: RwLock<Tree>,
}

fn leaf_of(block: u64) -> u64 {
    block / LEAF_BLOCKS as u64
}

/// Splits a range of blocks at the leaves: for each, its index and the blocks within it.
fn per_leaf(blocks: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    let size = LEAF_BLOCKS as u64;
    let leaves = if blocks.is_empty() { 0..0 } else { leaf_of(blocks.start)..leaf_of(blocks.end - 1) + 1 };
    #[allow(clippy::cast_possible_truncation, reason = "within a leaf everything is at most 512")]
    let within =
        move |leaf: u64, block: u64| (block.clamp(leaf * size, (leaf + 1) * size) - leaf * size) as usize;
    leaves.map(move |leaf| (leaf, within(leaf, blocks.start)..within(leaf, blocks.end)))
}

impl Overlay {
    /// An empty overlay for a device of `blocks` blocks, with memory from `pool` within `budget`.
    #[must_use]
    pub fn new(blocks: u64, pool: Arc<Pool>, budget: Budget) -> Self {
        Self { pool, budget, blocks, tree: RwLock::default() }
    }

    /// The unit.
    #[must_use]
    pub fn block_size(&self) -> BlockSize {
        self.pool.block_size()
    }

    /// Where its memory comes from.
    #[must_use]
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// What it may hold and holds.
    #[must_use]
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    fn read_tree(&self) -> RwLockReadGuard<'_, Tree> {
        // A panic elsewhere leaves the tree whole: every change of it is one insertion.
        self.tree.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `see` for the runs that make up `blocks`, in order. A run ends at a leaf's end at the latest. While it is
    /// called for a run with slots, nobody can change these.
    pub fn for_runs(&self, blocks: Range<u64>, mut see: impl FnMut(Range<u64>, Content<'_>)) {
        let tree = self.read_tree();
        for (index, within) in per_leaf(blocks) {
            let base = index * LEAF_BLOCKS as u64;
            let absolute = |run: &Range<usize>| base + run.start as u64..base + run.end as u64;
            match tree.get(&index) {
                None => see(absolute(&within), Content::Unallocated),
                Some(None) => see(absolute(&within), Content::Zero),
                Some(Some(leaf)) => leaf.for_runs(within, |run, content| see(absolute(&run), content)),
            }
        }
    }

    /// Calls `see` for runs of blocks and their state that make up `blocks`, in order, until it says false. A stretch
    /// without leaves is one run, so the time that it takes follows from what was written, not from the device's size.
    pub fn for_states(&self, blocks: Range<u64>, mut see: impl FnMut(Range<u64>, State) -> bool) {
        // Leaves that are looked at before writers, who may want to add one, have their turn.
        const AT_ONCE: usize = 256;
        let size = LEAF_BLOCKS as u64;
        let mut at = blocks.start;
        while at < blocks.end {
            let tree = self.read_tree();
            let mut nodes = tree.range(leaf_of(at)..leaf_of(blocks.end - 1) + 1);
            for (&index, node) in nodes.by_ref().take(AT_ONCE) {
                if index * size > at && !see(at..index * size, State::Unallocated) {
                    return;
                }
                let here = at.max(index * size)..blocks.end.min((index + 1) * size);
                at = here.end;
                let going = match node {
                    None => see(here, State::Zero),
                    Some(leaf) => leaf.for_states(here, index * size, &mut see),
                };
                if !going {
                    return;
                }
            }
            if nodes.next().is_none() {
                if at < blocks.end {
                    see(at..blocks.end, State::Unallocated);
                }
                return;
            }
        }
    }

    /// The state of one block.
    #[must_use]
    pub fn state(&self, block: u64) -> State {
        let mut state = State::Unallocated;
        self.for_states(block..block + 1, |_, found| {
            state = found;
            false
        });
        state
    }

    /// Does something with the leaf `index`, which is made if it is not there.
    fn with_leaf<R>(&self, index: u64, act: impl FnOnce(&Leaf) -> R) -> Outcome<R> {
        loop {
            if let Some(Some(leaf)) = self.read_tree().get(&index) {
                return Ok(act(leaf));
            }
            self.budget.charge_map(Leaf::COST)?;
            let mut tree = self.tree.write().unwrap_or_else(PoisonError::into_inner);
            match tree.get_mut(&index) {
                // Another connection was faster.
                Some(Some(_)) => self.budget.uncharge_map(Leaf::COST),
                Some(zeroes) => {
                    self.budget.uncharge_map(Leaf::ZERO_COST);
                    *zeroes = Some(Box::new(Leaf::all_zero()));
                }
                None => {
                    tree.insert(index, Some(Box::default()));
                }
            }
        }
    }

    /// Makes `slot`, filled by the caller, the contents of `block`. Replacing what is there takes nothing from the
    /// budget, so a session that has used up its own can still overwrite.
    ///
    /// # Errors
    /// `OutOfSpace` when a budget is used up; the slot is given back then.
    pub fn install(&self, block: u64, slot: Slot, magazine: &mut Magazine) -> Outcome<()> {
        let mut slot = Some(slot);
        let result = self.with_leaf(leaf_of(block), |leaf| self.put_slot(&mut leaf.lock(), block, &mut slot));
        // It found no room.
        if let Some(unused) = slot {
            magazine.release(unused);
        }
        if let Some(old) = result?? {
            self.let_go(old, magazine);
        }
        Ok(())
    }

    /// Puts a slot into its leaf, within the budget, and takes out the one that was there. It stays where it is on an
    /// error.
    fn put_slot(&self, leaf: &mut Locked<'_>, block: u64, slot: &mut Option<Slot>) -> Outcome<Option<Slot>> {
        let within = within_leaf(block);
        match leaf.slot_mut(within).map(|old| self.pool.arena().is_unique(old)) {
            None => self.budget.charge_data(self.block_size().bytes())?,
            Some(true) => {}
            // A reply holds what is replaced.
            Some(false) => self.budget.check_pinned()?,
        }
        Ok(slot.take().and_then(|slot| leaf.set_allocated(within, slot)))
    }

    /// Gives back a handle that a block had. If readers hold the memory, it is pinned until the last of them gives up
    /// its handle by [`Overlay::release`].
    fn let_go(&self, mut slot: Slot, magazine: &mut Magazine) {
        // Nobody can get a new handle, as the block has none any more.
        if self.pool.arena().is_unique(&mut slot) {
            magazine.release(slot);
            return;
        }
        // In this order, as the last reader may be about to give up.
        self.budget.pin(self.block_size().bytes());
        self.release(slot, magazine);
    }

    /// Gives back a handle that [`Overlay::for_runs`] lent a reader, who kept it.
    pub fn release(&self, slot: Slot, magazine: &mut Magazine) {
        // The last handle is a reader's only where the block's own was given up before, and it was pinned then.
        if magazine.release(slot) {
            self.budget.unpin(self.block_size().bytes());
        }
    }

    /// Writes whole blocks from `first` on. Blocks of zeroes become zero blocks, which take no memory.
    ///
    /// # Errors
    /// `OutOfSpace`; the blocks before the one that found no memory are written.
    ///
    /// # Panics
    /// If `data` is not a whole number of blocks.
    pub fn write(&self, first: u64, data: &[u8], magazine: &mut Magazine) -> Outcome<()> {
        let size = self.block_size().in_memory();
        assert_eq!(data.len() % size, 0, "only whole blocks");
        for (block, data) in (first..).zip(data.chunks_exact(size)) {
            if is_zero(data) {
                self.set_zero(block..block + 1, magazine)?;
            } else {
                self.write_part(block, 0, data, magazine, |_| Ok(()))?;
            }
        }
        Ok(())
    }

    /// Writes `data` at byte `at` of one block. Where the base shows through, `fill` gets the block's memory, zeroed,
    /// to put the base's bytes there first; it may be called and its work thrown away when another writer was faster.
    ///
    /// # Errors
    /// `OutOfSpace`, or what `fill` says.
    pub fn write_part(
        &self,
        block: u64,
        at: usize,
        data: &[u8],
        magazine: &mut Magazine,
        fill: impl Fn(&mut [u8]) -> Outcome<()>,
    ) -> Outcome<()> {
        let arena = self.pool.arena();
        let within = within_leaf(block);
        let whole = data.len() == self.block_size().in_memory();
        let put = |slot: &mut Slot| {
            arena.bytes_mut(slot).map(|bytes| bytes[at..at + data.len()].copy_from_slice(data)).is_some()
        };
        // A slot with the base's bytes, if it turns out to be needed.
        let mut ground: Option<Slot> = None;
        let written = loop {
            let step = self.with_leaf(leaf_of(block), |leaf| {
                let mut leaf = leaf.lock();
                let state = leaf.state(within);
                if leaf.slot_mut(within).is_some_and(put) {
                    return Ok(Step::Done(None));
                }
                let mut slot = match state {
                    State::Unallocated if !whole => match ground.take() {
                        Some(slot) => slot,
                        None => return Ok(Step::NeedsBase),
                    },
                    _ if whole => magazine.allocate_to_overwrite()?,
                    _ => magazine.allocate()?,
                };
                // Shared with a reply in flight: those bytes stay as they were read.
                if let (false, Some(old), Some(new)) =
                    (whole, leaf.slot_mut(within), arena.bytes_mut(&mut slot))
                {
                    new.copy_from_slice(arena.bytes(old));
                }
                put(&mut slot);
                let mut slot = Some(slot);
                let replaced = self.put_slot(&mut leaf, block, &mut slot);
                if let Some(unused) = slot {
                    magazine.release(unused);
                }
                replaced.map(Step::Done)
            });
            match step.unwrap_or_else(Err) {
                Ok(Step::Done(replaced)) => break Ok(replaced),
                Ok(Step::NeedsBase) => match self.ground(magazine, &fill) {
                    Ok(slot) => ground = Some(slot),
                    Err(error) => break Err(error),
                },
                Err(error) => break Err(error),
            }
        };
        if let Some(unused) = ground {
            magazine.release(unused);
        }
        if let Some(old) = written? {
            self.let_go(old, magazine);
        }
        Ok(())
    }

    /// A slot with the base's bytes: made outside of all locks, as that may take time.
    fn ground(&self, magazine: &mut Magazine, fill: impl Fn(&mut [u8]) -> Outcome<()>) -> Outcome<Slot> {
        let mut slot = magazine.allocate()?;
        match self.pool.arena().bytes_mut(&mut slot).map_or(Ok(()), fill) {
            Ok(()) => Ok(slot),
            Err(error) => {
                magazine.release(slot);
                Err(error)
            }
        }
    }

    /// Makes `blocks` read as zeroes, and frees what they held.
    ///
    /// # Errors
    /// `OutOfSpace` when there was no memory for the map; what needed none is zero all the same, so that whoever has
    /// used up a budget can give back.
    pub fn set_zero(&self, blocks: Range<u64>, magazine: &mut Magazine) -> Outcome<()> {
        let mut result = Ok(());
        for (index, within) in per_leaf(blocks) {
            let blocks_here = (self.blocks - index * LEAF_BLOCKS as u64).min(LEAF_BLOCKS as u64);
            let done = if within.len() as u64 == blocks_here {
                self.set_leaf_zero(index)
            } else {
                self.set_part_zero(index, within, magazine)
            };
            result = result.and(done);
        }
        result
    }

    fn set_part_zero(&self, index: u64, within: Range<usize>, magazine: &mut Magazine) -> Outcome<()> {
        if matches!(self.read_tree().get(&index), Some(None)) {
            return Ok(());
        }
        let mut freed = Vec::new();
        self.with_leaf(index, |leaf| leaf.lock().set_zero(within, &mut freed))?;
        self.free(freed, magazine);
        Ok(())
    }

    fn set_leaf_zero(&self, index: u64) -> Outcome<()> {
        let mut tree = self.tree.write().unwrap_or_else(PoisonError::into_inner);
        match tree.get_mut(&index) {
            Some(node) => {
                if let Some(leaf) = node.take() {
                    drop(tree);
                    self.budget.uncharge_map(Leaf::COST - Leaf::ZERO_COST);
                    self.free_later(leaf.into_slots());
                }
            }
            None => {
                self.budget.charge_map(Leaf::ZERO_COST)?;
                tree.insert(index, None);
            }
        }
        Ok(())
    }

    fn free(&self, slots: Vec<Slot>, magazine: &mut Magazine) {
        // So many bytes are wiped while the client waits; more than that would keep other clients waiting.
        const AT_ONCE: usize = 256 << 10;
        if slots.len() * self.block_size().in_memory() > AT_ONCE {
            self.free_later(slots);
        } else {
            self.budget.uncharge_data(slots.len() as u64 * self.block_size().bytes());
            slots.into_iter().for_each(|slot| self.let_go(slot, magazine));
        }
    }

    fn free_later(&self, mut slots: Vec<Slot>) {
        let count = slots.len();
        let arena = self.pool.arena();
        let held = slots.iter_mut().map(|slot| usize::from(!arena.is_unique(slot))).sum::<usize>();
        // As in `let_go`, for many.
        self.budget.pin(held as u64 * self.block_size().bytes());
        let still_held = count - self.pool.release_later(slots);
        self.budget.unpin((held - still_held) as u64 * self.block_size().bytes());
        self.budget.uncharge_data(count as u64 * self.block_size().bytes());
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let tree = std::mem::take(&mut *self.tree.write().unwrap_or_else(PoisonError::into_inner));
        for leaf in tree.into_values() {
            self.budget.uncharge_map(if leaf.is_some() { Leaf::COST } else { Leaf::ZERO_COST });
            if let Some(leaf) = leaf {
                self.free_later(leaf.into_slots());
            }
        }
    }
}

fn within_leaf(block: u64) -> usize {
    #[allow(clippy::cast_possible_truncation, reason = "below 512")]
    let within = (block % LEAF_BLOCKS as u64) as usize;
    within
}

/// Whether all bytes are zero. Stops at the first that is not, so ordinary data costs one look.
#[must_use]
pub fn is_zero(data: &[u8]) -> bool {
    let (words, rest) = data.as_chunks::<32>();
    words.iter().all(|chunk| *chunk == [0; 32]) && rest.iter().all(|&byte| byte == 0)
}

#[cfg(all(test, loom))]
mod interleavings;
#[cfg(all(test, not(loom)))]
mod tests;
