//! The private half of a device: the blocks that a session wrote, sparse, in memory.
//!
//! ```text
//!  Overlay   a tree of leaves, only where something was written (or "all zero", which has no leaf)
//!  Leaf      512 blocks   present  |1101...|   one bit a block: the overlay decides, not the base
//!                         zero     |0100...|   one bit a block: it decides "reads as zeroes"
//!                         slots    [s0 s3 ..]  memory of the allocated blocks (present, not zero), in block order
//!  Pool      slots of block memory, shared by all overlays of a server, wiped when they come back
//!  Snapshot  the tree as it was: checkpoints and forks share branches, leaves and slots until one of them writes
//! ```
//!
//! A block is *unallocated* (the base shows through), *allocated* (a slot holds it) or *zero*. What an overlay costs
//! follows from what was written, not from the size of the device.
//!
//! # Locking, and the races that are allowed
//!
//! The tree is behind a reader-writer lock that is taken for writing only to add a leaf, to put "all zero" in a leaf's
//! place or a copy in that of a shared one, to take a snapshot, and to put a snapshot in the tree's place: so what is done
//! under the lock for reading is before or behind each of these, wholly. A leaf's slots and its `zero` plane are behind its mutex; `present` changes only under that mutex, but
//! is atomic, so that a reader that finds it clear may go to the base at once. A write fills its slot first and sets the bit then
//! (Release; readers: Acquire), so a block is seen whole or not at all. Two first writes to parts of one block meet
//! in the mutex: the second finds the block allocated. A reader takes handles on the slots under the mutex and looks
//! at them later; a write in between finds the slot shared and puts a new one in its place, so what was read stays
//! as it was when it was read. In the same way a slot that a snapshot holds, too, is replaced and not changed. Requests that overlap while both are in flight may be seen in either order.

mod account;
mod away;
mod block_size;
mod budget;
mod leaf;
mod magazine;
mod overflow;
mod points;
mod pool;
mod tree;

pub use away::Moved;
pub use block_size::BlockSize;
pub use budget::Budget;
pub use leaf::State;
pub use magazine::Magazine;
pub(crate) use overflow::{IDLE, TICK};
pub use overflow::{Overflow, OverflowFile};
pub use points::{LongRead, Snapshot};
pub use pool::{Pool, Staging};

use crate::error::ErrorKind;
use crate::seal::Seal;
use crate::sync::{Mutex, RwLock, RwLockReadGuard};
use crate::sys::{Loan, Slot};
use account::Account;
use leaf::{LEAF_BLOCKS, Leaf, Locked};
use std::ops::Range;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError, Weak};
use tree::{Looked, Rubbish, Tree, leaf_of, per_leaf};

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
    /// It is written; this was replaced.
    Done(Option<Replaced>),
    /// The base's bytes are needed under it first.
    NeedsBase,
    /// What the block has is in a file.
    IsAway,
}

/// A slot that another has been put in the place of.
struct Replaced {
    slot: Slot,
    /// What was charged for it is charged for the other now.
    passed_on: bool,
}

/// The blocks that one session wrote.
#[derive(Debug)]
pub struct Overlay {
    /// By which all of its blocks are sealed. It goes first: behind it, what is in the others is noise.
    seal: Option<Arc<Seal>>,
    account: Arc<Account>,
    blocks: u64,
    tree: RwLock<Tree>,
    /// What was left behind by rollbacks.
    rubbish: Mutex<Rubbish>,
    returns: AtomicU64,
    long_reads: Mutex<Vec<Weak<LongRead>>>,
}

impl Overlay {
    /// An empty overlay for a device of `blocks` blocks, with memory from `pool` within `budget`.
    #[must_use]
    pub fn new(blocks: u64, pool: Arc<Pool>, budget: Budget) -> Self {
        Self::with(Tree::default(), blocks, Account::open(budget, pool), None)
    }

    /// The same, whose blocks are ciphertext by `seal` wherever they lie. It must be no other overlay's but those that are made
    /// of this one.
    #[must_use]
    pub fn sealed(blocks: u64, pool: Arc<Pool>, budget: Budget, seal: Arc<Seal>) -> Self {
        Self::with(Tree::default(), blocks, Account::open(budget, pool), Some(seal))
    }

    fn with(tree: Tree, blocks: u64, account: Arc<Account>, seal: Option<Arc<Seal>>) -> Self {
        Self {
            seal,
            account,
            blocks,
            tree: RwLock::new(tree),
            rubbish: Mutex::default(),
            returns: AtomicU64::new(0),
            long_reads: Mutex::default(),
        }
    }

    /// The unit.
    #[must_use]
    pub fn block_size(&self) -> BlockSize {
        self.pool().block_size()
    }

    /// Where its memory comes from.
    #[must_use]
    pub fn pool(&self) -> &Arc<Pool> {
        self.account.pool()
    }

    /// By which its blocks are sealed, if they are.
    #[must_use]
    pub fn seal(&self) -> Option<&Seal> {
        self.seal.as_deref()
    }

    /// Makes what is in `slot` what block `block` looks like in memory. For a slot that is nobody else's.
    pub fn seal_slot(&self, block: u64, slot: &mut Slot) {
        if let Some(seal) = &self.seal
            && let Some(bytes) = self.pool().arena().bytes_mut(slot)
        {
            seal.seal(block, bytes);
        }
    }

    /// What it may hold and holds.
    #[must_use]
    pub fn budget(&self) -> &Budget {
        self.account.budget()
    }

    fn read_tree(&self) -> RwLockReadGuard<'_, Tree> {
        // A panic elsewhere leaves the tree whole: every change of it is one insertion, or one replacement.
        self.tree.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `see` for the runs that make up `blocks`, in order. A run ends at a leaf's end at the latest. While it is
    /// called for a run with slots, nobody can change these.
    pub fn for_runs(&self, blocks: Range<u64>, mut see: impl FnMut(Range<u64>, Content<'_>)) {
        self.read_tree().for_runs(blocks, &mut see);
    }

    /// Calls `see` for runs of blocks and their state that make up `blocks`, in order, until it says false. A stretch
    /// without leaves is one run, so the time that it takes follows from what was written, not from the device's size.
    pub fn for_states(&self, blocks: Range<u64>, mut see: impl FnMut(Range<u64>, State) -> bool) {
        // Leaves that are looked at before writers, who may want to add one, have their turn.
        const AT_ONCE: usize = 256;
        let mut at = blocks.start;
        while let Looked::UpTo(next) = self.read_tree().for_states(&(at..blocks.end), AT_ONCE, &mut see) {
            at = next;
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

    /// Does something with the leaf `index`, which is made if it is not there, or is shared.
    fn with_leaf<R>(&self, index: u64, act: impl FnOnce(&Leaf) -> R) -> Outcome<R> {
        loop {
            if let Some(leaf) = self.read_tree().own_leaf(index) {
                return Ok(act(leaf));
            }
            // It may be there by then: another connection may have been faster.
            self.tree.write().unwrap_or_else(PoisonError::into_inner).make_own(index, &self.account)?;
        }
    }

    /// Makes `slot`, filled and sealed by the caller, the contents of `block`. Replacing what is there takes nothing from the
    /// budget unless a checkpoint or a fork has it, too: so a session that has used up its own can still overwrite.
    ///
    /// # Errors
    /// `OutOfSpace` when a budget is used up; the slot is given back then.
    pub fn install(&self, block: u64, slot: Slot, magazine: &mut Magazine) -> Outcome<()> {
        let mut slot = Some(slot);
        let result = loop {
            let put =
                self.with_leaf(leaf_of(block), |leaf| self.put_slot(&mut leaf.lock(), block, &mut slot));
            match put.unwrap_or_else(Err) {
                Err(ErrorKind::OutOfSpace) if self.tidy_some() => {}
                result => break result,
            }
        };
        // It found no room.
        if let Some(unused) = slot {
            magazine.release(unused);
        }
        if let Some(old) = result? {
            self.let_go(old, magazine);
        }
        Ok(())
    }

    /// Puts a slot into its leaf, within the budget, and takes out the one that was there. It stays where it is on an
    /// error.
    fn put_slot(
        &self,
        leaf: &mut Locked<'_>,
        block: u64,
        slot: &mut Option<Slot>,
    ) -> Outcome<Option<Replaced>> {
        let within = within_leaf(block);
        let mut passed_on = false;
        if let Some(old) = leaf.slot_mut(within) {
            if self.pool().arena().is_sole_and_read(old) == (true, true) {
                // Replies alone are going to hold what is replaced.
                self.budget().check_pinned()?;
            }
            passed_on = self.account.pays_alone(old);
            if passed_on && self.pool().arena().is_away(old.number()) {
                self.budget().move_in(self.block_size().bytes());
            }
        }
        if !passed_on {
            self.budget().charge_data(self.block_size().bytes())?;
        }
        let Some(mut slot) = slot.take() else { return Ok(None) };
        self.account.take_on(&mut slot);
        if self.seal.is_some() {
            self.pool().arena().touch(&slot);
        }
        Ok(leaf.set_allocated(within, slot).map(|slot| Replaced { slot, passed_on }))
    }

    /// Gives up a slot that a block had.
    fn let_go(&self, old: Replaced, magazine: &mut Magazine) {
        if let Some(free) = self.account.let_go(old.slot, old.passed_on) {
            magazine.recycle(free);
        }
    }

    /// Gives back what was lent to a reader of what [`Overlay::for_runs`] showed.
    pub fn release(&self, loan: Loan, magazine: &mut Magazine) {
        if let Some(free) = self.account.give_back(loan) {
            magazine.recycle(free);
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
    /// `OutOfSpace`, `Away` when the block is in a file and part of it is to stay, or what `fill` says.
    pub fn write_part(
        &self,
        block: u64,
        at: usize,
        data: &[u8],
        magazine: &mut Magazine,
        fill: impl Fn(&mut [u8]) -> Outcome<()>,
    ) -> Outcome<()> {
        let arena = self.pool().arena();
        let within = within_leaf(block);
        let whole = data.len() == self.block_size().in_memory();
        let put = |slot: &mut Slot| {
            let Some(bytes) = arena.bytes_mut(slot) else { return false };
            match &self.seal {
                None => bytes[at..at + data.len()].copy_from_slice(data),
                Some(seal) => {
                    seal.write(block, bytes, at, data);
                    arena.touch(slot);
                }
            }
            true
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
                if !whole && leaf.slot_mut(within).is_some_and(|slot| arena.is_away(slot.number())) {
                    return Ok(Step::IsAway);
                }
                let mut slot = match state {
                    State::Unallocated if !whole => match ground.take() {
                        Some(slot) => slot,
                        None => return Ok(Step::NeedsBase),
                    },
                    _ if whole => magazine.allocate_to_overwrite()?,
                    _ => {
                        let mut slot = magazine.allocate()?;
                        if state == State::Zero {
                            self.seal_slot(block, &mut slot);
                        }
                        slot
                    }
                };
                // Shared with a reply in flight: those bytes stay as they were read. Sealed ones are of the same block.
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
                Ok(Step::IsAway) => break Err(ErrorKind::Away),
                Ok(Step::NeedsBase) => match self.ground(block, magazine, &fill) {
                    Ok(slot) => ground = Some(slot),
                    Err(ErrorKind::OutOfSpace) if self.tidy_some() => {}
                    Err(error) => break Err(error),
                },
                Err(ErrorKind::OutOfSpace) if self.tidy_some() => {}
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
    fn ground(
        &self,
        block: u64,
        magazine: &mut Magazine,
        fill: impl Fn(&mut [u8]) -> Outcome<()>,
    ) -> Outcome<Slot> {
        let mut slot = magazine.allocate()?;
        match self.pool().arena().bytes_mut(&mut slot).map_or(Ok(()), fill) {
            Ok(()) => {
                self.seal_slot(block, &mut slot);
                Ok(slot)
            }
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
            let done = loop {
                let done = if within.len() as u64 == blocks_here {
                    self.set_leaf_zero(index)
                } else {
                    self.set_part_zero(index, within.clone(), magazine)
                };
                if done.is_ok() || !self.tidy_some() {
                    break done;
                }
            };
            result = result.and(done);
        }
        result
    }

    fn set_part_zero(&self, index: u64, within: Range<usize>, magazine: &mut Magazine) -> Outcome<()> {
        if matches!(self.read_tree().get(index), Some(tree::Node::Zero)) {
            return Ok(());
        }
        let mut freed = Vec::new();
        self.with_leaf(index, |leaf| leaf.lock().set_zero(within, &mut freed))?;
        self.free(freed, magazine);
        Ok(())
    }

    fn set_leaf_zero(&self, index: u64) -> Outcome<()> {
        let mut tree = self.tree.write().unwrap_or_else(PoisonError::into_inner);
        let old = tree.set_zero(index, &self.account)?;
        // What it frees, it frees without the lock.
        drop(tree);
        drop(old);
        Ok(())
    }

    fn free(&self, slots: Vec<Slot>, magazine: &mut Magazine) {
        // So many bytes are wiped while the client waits; more than that would keep other clients waiting.
        const AT_ONCE: usize = 256 << 10;
        let at_once = slots.len() * self.block_size().in_memory() <= AT_ONCE;
        let free = self.account.let_go_all(slots.into_iter());
        if at_once {
            free.into_iter().for_each(|number| magazine.recycle(number));
        } else {
            self.pool().take_later(free);
        }
    }
}

/// The smallest limit of a server under which a session can hold a block. Less is of no use to anybody.
#[must_use]
pub fn least_memory(block: BlockSize) -> u64 {
    Budget::SESSION + tree::BRANCH_COST + tree::Node::COST + leaf::Leaf::COST + block.bytes()
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
