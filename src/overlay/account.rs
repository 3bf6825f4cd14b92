//! Who pays for which block, when blocks are shared by checkpoints and forks.
//!
//! A block is paid for by the session that wrote it, from then until nobody holds it as data any more: neither that session,
//! nor a checkpoint, nor a fork of it. So each block is counted once however many share it, the sum over all accounts is
//! what is in memory, and a fork pays for what it writes itself. A session that has ended goes on paying, out of the
//! server's budget alone, for what others still hold.
//!
//! A slot's payer is a number in the arena's ledger. Nearly always it is the session at hand; for the others there is the
//! book, under a lock.

use super::{Budget, Pool};
use crate::sync::Mutex;
use crate::sys::{Left, Loan, Slot};
use std::sync::{Arc, PoisonError};

/// The accounts of a pool's slots, by number.
#[derive(Debug, Default)]
pub(super) struct Book {
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    of: Vec<Option<Entry>>,
    /// Numbers that are nobody's.
    free: Vec<u32>,
}

#[derive(Debug)]
struct Entry {
    budget: Arc<Budget>,
    /// Nobody charges it any more.
    is_closed: bool,
}

impl Book {
    fn with_entries<R>(&self, act: impl FnOnce(&mut Entries) -> R) -> R {
        act(&mut self.entries.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn open(&self, budget: &Arc<Budget>) -> u32 {
        let entry = Entry { budget: Arc::clone(budget), is_closed: false };
        self.with_entries(|entries| match entries.free.pop() {
            Some(number) => {
                entries.of[number as usize] = Some(entry);
                number
            }
            None => {
                entries.of.push(Some(entry));
                // Each has a session or a block, of which there are fewer.
                u32::try_from(entries.of.len() - 1).unwrap_or(u32::MAX)
            }
        })
    }

    fn with(&self, number: u32, act: impl FnOnce(&Budget)) {
        self.with_entries(|entries| {
            if let Some(entry) = entries.of.get(number as usize).and_then(Option::as_ref) {
                act(&entry.budget);
            } else {
                debug_assert!(false, "a block is paid for by nobody");
            }
            entries.strike_out_if_done(number);
        });
    }

    fn close(&self, number: u32) {
        self.with_entries(|entries| {
            if let Some(entry) = &mut entries.of[number as usize] {
                entry.is_closed = true;
            }
            entries.strike_out_if_done(number);
        });
    }

    /// How many there are.
    #[cfg(all(test, not(loom)))]
    pub(super) fn len(&self) -> usize {
        self.with_entries(|entries| entries.of.len() - entries.free.len())
    }
}

impl Entries {
    fn strike_out_if_done(&mut self, number: u32) {
        let entry = &mut self.of[number as usize];
        if entry.as_ref().is_some_and(|entry| entry.is_closed && entry.budget.pays_for_nothing()) {
            *entry = None;
            self.free.push(number);
        }
    }
}

/// A session's account: kept by its overlay, and by every part of a map that it has paid for.
#[derive(Debug)]
pub(super) struct Account {
    number: u32,
    budget: Arc<Budget>,
    pool: Arc<Pool>,
}

impl Account {
    pub(super) fn open(budget: Budget, pool: Arc<Pool>) -> Arc<Self> {
        let budget = Arc::new(budget);
        Arc::new(Self { number: pool.book().open(&budget), budget, pool })
    }

    pub(super) fn budget(&self) -> &Budget {
        &self.budget
    }

    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    fn block(&self) -> u64 {
        self.pool.block_size().bytes()
    }

    fn with_payer(&self, number: u32, act: impl FnOnce(&Budget)) {
        if number == self.number { act(&self.budget) } else { self.pool.book().with(number, act) }
    }

    /// Whether what `slot` holds is this account's, and ends when this handle does.
    pub(super) fn pays_alone(&self, slot: &Slot) -> bool {
        let arena = self.pool.arena();
        arena.is_sole_and_read(slot).0 && arena.payer(slot.number()) == self.number
    }

    /// Takes the charge for `slot` on.
    pub(super) fn take_on(&self, slot: &mut Slot) {
        self.pool.arena().set_payer(slot, self.number);
    }

    /// Gives up a holder's handle, which nobody can share any more; returns the slot's number if nobody has it. What was
    /// charged for it is given back with the last holder, unless it was `passed_on` to another slot. If readers have the
    /// memory then, it is pinned until the last of them gives up its handle by [`Account::give_back`].
    #[must_use]
    pub(super) fn let_go(&self, slot: Slot, passed_on: bool) -> Option<u32> {
        let (number, payer, left) = self.release(slot);
        if left != Left::Holders && !passed_on {
            self.with_payer(payer, |budget| self.uncharge(budget, number, self.block()));
        }
        (left == Left::Nobody).then_some(number)
    }

    fn uncharge(&self, budget: &Budget, number: u32, bytes: u64) {
        if self.pool.arena().is_away(number) {
            budget.uncharge_away(bytes);
        } else {
            budget.uncharge_data(bytes);
        }
    }

    /// Puts `new`, which has the same bytes, into the place of `old`, of which the caller has a loan: one of the two is in memory and
    /// the other in a file. What is charged moves with it.
    pub(super) fn replace(&self, old: &mut Slot, mut new: Slot) {
        let arena = self.pool.arena();
        let payer = arena.payer(old.number());
        arena.set_payer(&mut new, payer);
        let goes_out = arena.is_away(new.number());
        let old = std::mem::replace(old, new);
        let (_, payer, left) = self.release(old);
        self.with_payer(payer, |budget| match (left, goes_out) {
            // Others have it where it was, and go on being paid for.
            (Left::Holders, _) => budget.charge_copy(self.block()),
            (_, true) => budget.move_out(self.block()),
            (_, false) => budget.move_in(self.block()),
        });
    }

    /// [`Account::let_go`] for many, none of whose charges was passed on; returns the numbers of those that nobody has.
    #[must_use]
    pub(super) fn let_go_all(&self, slots: impl ExactSizeIterator<Item = Slot>) -> Vec<u32> {
        let mut free = Vec::with_capacity(slots.len());
        // Neighbours mostly have one payer.
        let arena = self.pool.arena();
        let (mut payer_of_ended, mut ended) = ((self.number, false), 0);
        let settle = |(payer, away), ended| {
            if ended > 0 {
                let bytes = ended * self.block();
                self.with_payer(payer, |budget| match away {
                    true => budget.uncharge_away(bytes),
                    false => budget.uncharge_data(bytes),
                });
            }
        };
        for slot in slots {
            let (number, payer, left) = self.release(slot);
            if left == Left::Holders {
                continue;
            }
            let payer = (payer, arena.is_away(number));
            if payer != payer_of_ended {
                settle(payer_of_ended, ended);
                (payer_of_ended, ended) = (payer, 0);
            }
            ended += 1;
            if left == Left::Nobody {
                free.push(number);
            }
        }
        settle(payer_of_ended, ended);
        free
    }

    fn release(&self, slot: Slot) -> (u32, u32, Left) {
        let arena = self.pool.arena();
        let number = slot.number();
        // While the handle is there, so that it is not another's yet.
        let payer = arena.payer(number);
        let (is_sole, is_read) = arena.is_sole_and_read(&slot);
        let pinned = is_sole && is_read;
        if pinned {
            // In this order, as the last reader may be about to give up.
            self.with_payer(payer, |budget| budget.pin(self.block()));
        }
        let left = arena.release(slot);
        match left {
            Left::Nobody if pinned => self.with_payer(payer, |budget| budget.unpin(self.block())),
            // Two holders gave up at the same time.
            Left::Readers if !pinned => self.with_payer(payer, |budget| budget.pin(self.block())),
            Left::Nobody | Left::Readers | Left::Holders => {}
        }
        (number, payer, left)
    }

    /// Gives up a reader's handle; returns the slot's number if nobody has it.
    #[must_use]
    pub(super) fn give_back(&self, loan: Loan) -> Option<u32> {
        let number = loan.number();
        self.pool.arena().give_back(loan).then(|| {
            // The last handle is a reader's only where all holders' were given up before, and it was pinned then.
            let payer = self.pool.arena().payer(number);
            self.with_payer(payer, |budget| budget.unpin(self.block()));
            number
        })
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.pool.book().close(self.number);
    }
}
