//! Free slots that one thread has taken from the pool for itself, so that it allocates and releases without a lock.
//!
//! The invariant: what is in `clean` is zeroed, and what is in `dirty` was somebody's, and is wiped before it is anybody's who
//! does not overwrite all of it.

use super::Outcome;
use super::pool::{MAGAZINE, Pool};
use crate::error::ErrorKind;
use crate::sys::{Left, Loan, Slot};
use std::sync::Arc;

/// Some free slots of one thread's own, so that it allocates and releases without a lock.
///
/// What comes back is wiped when it is needed zeroed, given back to the pool, or at [`Magazine::wipe`]. A slot that is
/// going to be overwritten altogether needs no wiping before that.
#[derive(Debug)]
pub struct Magazine {
    pool: Arc<Pool>,
    // The next to hand out is the last: most recently used, so still in this core's cache.
    clean: Vec<u32>,
    dirty: Vec<u32>,
}

impl Magazine {
    /// An empty magazine, filled from `pool` as needed.
    #[must_use]
    pub fn new(pool: Arc<Pool>) -> Self {
        Self { pool, clean: Vec::new(), dirty: Vec::new() }
    }

    /// A zeroed slot.
    ///
    /// # Errors
    /// `OutOfSpace` when the pool has none left.
    pub fn allocate(&mut self) -> Outcome<Slot> {
        if self.clean.is_empty() {
            match self.dirty.pop() {
                Some(number) => {
                    self.pool.arena.wipe(number, 1);
                    self.clean.push(number);
                }
                None => self.pool.take(&mut self.clean)?,
            }
        }
        let number = self.clean.pop().ok_or(ErrorKind::OutOfSpace)?;
        Ok(self.pool.arena.adopt(number))
    }

    /// A slot with anything in it: the caller overwrites all of it before anybody can read it.
    ///
    /// # Errors
    /// As [`Magazine::allocate`].
    pub fn allocate_to_overwrite(&mut self) -> Outcome<Slot> {
        match self.dirty.pop() {
            Some(number) => Ok(self.pool.arena.adopt(number)),
            None => self.allocate(),
        }
    }

    /// Gives a holder's handle back that is in nobody's account; with the last one the slot is free. Returns whether it
    /// was the last.
    pub fn release(&mut self, slot: Slot) -> bool {
        let number = slot.number();
        let last = self.pool.arena.release(slot) == Left::Nobody;
        if last {
            self.recycle(number);
        }
        last
    }

    /// Gives a reader's handle back whose session has ended; with the last one the slot is free. Returns whether it was the
    /// last.
    pub fn give_back(&mut self, loan: Loan) -> bool {
        let number = loan.number();
        let last = self.pool.arena.give_back(loan);
        if last {
            self.recycle(number);
        }
        last
    }

    /// Takes back a slot that nobody has any more.
    pub(super) fn recycle(&mut self, number: u32) {
        if self.pool.take_place(number) {
            return;
        }
        self.dirty.push(number);
        let some = self.pool.slots_in(MAGAZINE);
        if self.dirty.len() >= 2 * some {
            // The oldest, which are in no cache any more.
            self.pool.wipe(&self.dirty[..some]);
            self.pool.put(self.dirty.drain(..some));
        }
    }

    /// Wipes what came back: whoever wrote it may be gone.
    pub fn wipe(&mut self) {
        self.pool.wipe(&self.dirty);
        self.clean.append(&mut self.dirty);
        let some = self.pool.slots_in(MAGAZINE);
        if self.clean.len() > 4 * some {
            self.pool.put(self.clean.drain(..2 * some));
        }
    }

    /// Gives all free slots back to the pool, so that idle workers keep no chunk from the system.
    pub fn flush(&mut self) {
        self.wipe();
        if !self.clean.is_empty() {
            self.pool.put(self.clean.drain(..));
        }
        // A worker that had to do with many sessions must not keep their room.
        (self.clean, self.dirty) = (Vec::new(), Vec::new());
    }
}

impl Drop for Magazine {
    fn drop(&mut self) {
        self.flush();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::BlockSize;
    use super::*;

    #[test]
    fn slots_come_zeroed_and_in_order() {
        let pool = Pool::new(8 << 20, BlockSize::DEFAULT).unwrap();
        let mut magazine = Magazine::new(Arc::clone(&pool));
        let mut first = magazine.allocate().unwrap();
        let second = magazine.allocate().unwrap();
        assert_eq!(second.number(), first.number() + 1);
        pool.arena().bytes_mut(&mut first).unwrap().fill(7);
        let number = first.number();
        magazine.release(first);
        let again = magazine.allocate_to_overwrite().unwrap();
        assert_eq!(again.number(), number);
        magazine.release(again);
        magazine.wipe();
        let again = magazine.allocate().unwrap();
        assert_eq!(again.number(), number);
        assert!(crate::overlay::is_zero(pool.arena().bytes(&again)));
        magazine.release(again);
        magazine.release(second);
        drop(magazine);
        assert_eq!(pool.free_slots(), 512);
    }
}
