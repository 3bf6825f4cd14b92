//! Blocks of sealed overlays that go to a file when memory is short, and come back when they are used.
//!
//! ```text
//!   out    lock: lend what was not used since the last look ── write it to places, unlocked ── lock: if nothing happened to the block
//!          meanwhile, the place takes its slot's place
//!   in     lock: lend the place ── read it into a new slot, unlocked ── lock: if the block is still there, the slot takes its place
//! ```
//!
//! Both may wait for a disk, and are for helpers. A loan keeps what is being copied as it is: a write in between puts a new slot in
//! its place, and then the copy is thrown away. A block that several leaves hold (checkpoints, forks) stays in memory; one that is in a leaf
//! which these share goes out for all of them.

use super::tree::{Node, Tree, per_leaf};
use super::{LEAF_BLOCKS, LongRead, Magazine, Outcome, Overflow, Overlay};
use crate::error::ErrorKind;
use crate::sys::{Loan, Slot};
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Blocks that go out before the locks are taken again.
const AT_ONCE: usize = 256;

/// How far [`Overlay::move_out`] has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Bytes that are in the file now and were not before.
    pub bytes: u64,
    /// The block to go on with; `None` when all were looked at.
    pub next: Option<u64>,
}

impl Overlay {
    /// Where its blocks may go.
    fn overflow(&self) -> Option<&Overflow> {
        self.seal.as_ref().and(self.pool().overflow())
    }

    /// Whether the server's memory is so short that room should be made, by moving blocks out, before more of it is taken. Never for
    /// an overlay whose blocks cannot go anywhere, nor while no room can be made.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.overflow().is_some_and(|overflow| {
            let (used, limit) = self.budget().used_of_total();
            // Below where others' reserve begins, by as much as all workers can take before they look again.
            used > limit / 4 * 3 && !overflow.is_stuck()
        })
    }

    /// Moves some blocks that were not used for `idle` ticks of the arena's clock into the file, from block `from` on.
    /// Waits for the disk.
    ///
    /// # Errors
    /// When the file takes no more.
    pub fn move_out(&self, from: u64, idle: u16) -> io::Result<Moved> {
        let Some(overflow) = self.overflow() else { return Ok(Moved { bytes: 0, next: None }) };
        let (lent, next) = self.choose(from, idle);
        let mut result = Ok(());
        let mut bytes = 0;
        let mut free = Vec::new();
        for (block, loan) in lent {
            if result.is_ok() {
                match self.send_out(overflow, block, &loan) {
                    Ok(true) => bytes += self.block_size().bytes(),
                    Ok(false) => {}
                    Err(error) => result = Err(error),
                }
            }
            free.extend(self.account.give_back(loan));
        }
        self.pool().take_later(free);
        result.map(|()| Moved { bytes, next })
    }

    /// Lends what may go.
    fn choose(&self, from: u64, idle: u16) -> (Vec<(u64, Loan)>, Option<u64>) {
        let arena = self.pool().arena();
        let tree = self.read_tree();
        let (mut lent, mut next) = (Vec::new(), None);
        for (index, leaf) in tree.leaves_from(from / LEAF_BLOCKS as u64) {
            if lent.len() >= AT_ONCE {
                next = Some(index * LEAF_BLOCKS as u64);
                break;
            }
            leaf.lock().for_slots(0..LEAF_BLOCKS, |within, slot| {
                if !arena.is_away(slot.number())
                    && arena.is_sole_and_read(slot) == (true, false)
                    && arena.idle_ticks(slot).is_some_and(|ticks| ticks >= idle)
                {
                    lent.push((index * LEAF_BLOCKS as u64 + within as u64, arena.lend(slot)));
                }
            });
        }
        (lent, next)
    }

    /// Writes a block to a place; whether it is there now.
    fn send_out(&self, overflow: &Overflow, block: u64, loan: &Loan) -> io::Result<bool> {
        let arena = self.pool().arena();
        let place = overflow.take().ok_or(io::ErrorKind::StorageFull)?;
        if let Err(error) = overflow.write(place, arena.loan_bytes(loan)) {
            overflow.free(place);
            return Err(error);
        }
        let mut place = Some(place);
        self.with_slot(None, block, |slot| {
            if slot.number() == loan.number() && arena.is_sole_and_read(slot).0 {
                place.take().into_iter().for_each(|place| self.account.replace(slot, arena.adopt(place)));
            }
        });
        place.into_iter().for_each(|unused| overflow.free(unused));
        Ok(place.is_none())
    }

    /// Brings the blocks of `blocks` that are in the file into memory, of what `view` sees if there is one. Waits for the disk.
    ///
    /// # Errors
    /// `OutOfSpace` when there is no memory for them, `Io` when the file cannot be read.
    pub fn bring_in(&self, view: Option<&LongRead>, blocks: Range<u64>) -> Outcome<()> {
        let Some(overflow) = self.overflow() else { return Ok(()) };
        let arena = self.pool().arena();
        let mut magazine = Magazine::new(Arc::clone(self.pool()));
        let mut result = Ok(());
        for (index, within) in per_leaf(blocks) {
            let mut lent = Vec::new();
            self.with_tree(view, |tree| {
                if let Some(Node::Leaf(leaf)) = tree.get(index) {
                    leaf.leaf().lock().for_slots(within, |within, slot| {
                        if arena.is_away(slot.number()) {
                            lent.push((index * LEAF_BLOCKS as u64 + within as u64, arena.lend(slot)));
                        }
                    });
                }
            });
            for (block, loan) in lent {
                if result.is_ok() {
                    result = self.fetch(overflow, view, block, &loan, &mut magazine);
                }
                self.release(loan, &mut magazine);
            }
        }
        result
    }

    fn fetch(
        &self,
        overflow: &Overflow,
        view: Option<&LongRead>,
        block: u64,
        loan: &Loan,
        magazine: &mut Magazine,
    ) -> Outcome<()> {
        let arena = self.pool().arena();
        let mut slot = magazine.allocate_to_overwrite()?;
        let read = arena.bytes_mut(&mut slot).map_or(Ok(()), |bytes| overflow.read(loan.number(), bytes));
        let mut slot = Some(slot);
        if read.is_ok() {
            self.with_slot(view, block, |old| {
                if old.number() == loan.number() {
                    slot.take().into_iter().for_each(|slot| {
                        arena.expect_use(&slot);
                        self.account.replace(old, slot);
                    });
                }
            });
        }
        if let Some(unused) = slot {
            magazine.release(unused);
        }
        read.map_err(|_| ErrorKind::Io)
    }

    /// Does something with the slot of a block, if it has one.
    fn with_slot(&self, view: Option<&LongRead>, block: u64, act: impl FnOnce(&mut Slot)) {
        let within = super::within_leaf(block);
        self.with_tree(view, |tree| {
            if let Some(Node::Leaf(leaf)) = tree.get(super::leaf_of(block))
                && let Some(slot) = leaf.leaf().lock().slot_mut(within)
            {
                act(slot);
            }
        });
    }

    fn with_tree(&self, view: Option<&LongRead>, act: impl FnOnce(&Tree)) {
        if let Some(tree) = view.map(LongRead::before).as_deref().and_then(Option::as_ref) {
            return act(tree);
        }
        act(&self.read_tree());
    }
}
