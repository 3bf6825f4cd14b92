//! Points in an overlay's life: snapshots of it, the way back to them, and other overlays that begin with them.

use super::account::Account;
use super::tree::{Looked, Rubbish, Tree};
use super::{Budget, Content, Outcome, Overlay, State};
use crate::seal::Seal;
use crate::sync::{Mutex, MutexGuard};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, Weak};

/// What an overlay held at one moment. It holds the blocks of then, and never changes.
///
/// Dropping it takes apart what it alone holds, on the spot; [`Overlay::forget`] leaves that for later.
#[derive(Debug)]
pub struct Snapshot {
    /// Whose blocks it shares, their key it does.
    seal: Option<Arc<Seal>>,
    tree: Tree,
    blocks: u64,
    account: Arc<Account>,
    charged: u64,
}

impl Snapshot {
    /// Bytes of the blocks that it holds.
    #[must_use]
    pub fn data(&self) -> u64 {
        self.tree.slots() * self.account.pool().block_size().bytes()
    }

    /// As [`Overlay::for_runs`].
    pub fn for_runs(&self, blocks: Range<u64>, see: impl FnMut(Range<u64>, Content<'_>)) {
        self.tree.for_runs(blocks, see);
    }

    /// As [`Overlay::for_states`].
    pub fn for_states(&self, blocks: Range<u64>, mut see: impl FnMut(Range<u64>, State) -> bool) {
        let mut at = blocks.start;
        while let Looked::UpTo(next) = self.tree.for_states(&(at..blocks.end), usize::MAX, &mut see) {
            at = next;
        }
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        self.account.budget().uncharge_map(self.charged);
    }
}

/// Somebody who reads in several goes, and is to see one state of an overlay.
#[derive(Debug, Default)]
pub struct LongRead {
    /// What the overlay was when it was made something else.
    before: Mutex<Option<Tree>>,
}

impl LongRead {
    pub(super) fn before(&self) -> MutexGuard<'_, Option<Tree>> {
        self.before.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Overlay {
    /// What it holds now. Costs the top of the map, whatever was written. A write that is acknowledged by now is in it, one
    /// that begins later is not.
    ///
    /// # Errors
    /// `OutOfSpace` when a budget has no room for the copy of the map's top.
    pub fn snapshot(&self) -> Outcome<Snapshot> {
        let mut tree = self.tree.write().unwrap_or_else(PoisonError::into_inner);
        let charged = tree.top_cost();
        self.budget().charge_map(charged)?;
        let tree = tree.snapshot();
        let (seal, account) = (self.seal.clone(), Arc::clone(&self.account));
        Ok(Snapshot { seal, tree, blocks: self.blocks, account, charged })
    }

    /// Makes it what it was at `snapshot`, or, without one, what it was before anything was written. What it held until now
    /// is freed by [`Overlay::tidy`].
    pub fn return_to(&self, snapshot: Option<&Snapshot>) {
        let tree = snapshot.map_or_else(Tree::default, |snapshot| snapshot.tree.copy());
        let mut now = self.tree.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *now, tree);
        self.returns.fetch_add(1, Ordering::Relaxed);
        for read in self.long_reads().drain(..).filter_map(|read| read.upgrade()) {
            read.before().get_or_insert_with(|| old.copy());
        }
        drop(now);
        self.rubbish().add(old);
    }

    /// Begins a read in several goes, to be told to [`Overlay::for_runs_in`].
    pub fn begin_long_read(&self) -> Arc<LongRead> {
        let read = Arc::new(LongRead::default());
        let mut all = self.long_reads();
        all.retain(|read| read.strong_count() > 0);
        all.push(Arc::downgrade(&read));
        read
    }

    /// As [`Overlay::for_runs`]; but what `read` sees is what was there before the overlay was first made what it had been
    /// before since the read began.
    pub fn for_runs_in(
        &self,
        read: Option<&LongRead>,
        blocks: Range<u64>,
        see: impl FnMut(Range<u64>, Content<'_>),
    ) {
        if let Some(tree) = read.map(LongRead::before).as_deref().and_then(Option::as_ref) {
            return tree.for_runs(blocks, see);
        }
        self.for_runs(blocks, see);
    }

    fn long_reads(&self) -> MutexGuard<'_, Vec<Weak<LongRead>>> {
        self.long_reads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often it was made what it was before. What was written in two parts, and found this changed in between, is in it
    /// in part.
    #[must_use]
    pub fn returns(&self) -> u64 {
        self.returns.load(Ordering::Relaxed)
    }

    /// Another overlay with the same contents, which pays for what is written to it out of `budget`.
    #[must_use]
    pub fn fork(&self, budget: Budget) -> Self {
        let tree = self.tree.write().unwrap_or_else(PoisonError::into_inner).snapshot();
        let account = Account::open(budget, Arc::clone(self.pool()));
        Self::with(tree, self.blocks, account, self.seal.clone())
    }

    /// Another overlay with the contents of `snapshot`, which pays for what is written to it out of `budget`.
    #[must_use]
    pub fn of(snapshot: &Snapshot, budget: Budget) -> Self {
        let account = Account::open(budget, Arc::clone(snapshot.account.pool()));
        Self::with(snapshot.tree.copy(), snapshot.blocks, account, snapshot.seal.clone())
    }

    /// Bytes of the blocks that it holds, whoever pays for them.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.read_tree().slots() * self.block_size().bytes()
    }

    /// Gives up a snapshot of it; what that alone held is freed by [`Overlay::tidy`].
    pub fn forget(&self, mut snapshot: Snapshot) {
        self.rubbish().add(std::mem::take(&mut snapshot.tree));
    }

    fn rubbish(&self) -> MutexGuard<'_, Rubbish> {
        // Whole at every point.
        self.rubbish.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Frees what nobody needs any more. Takes time, which others do not wait for.
    pub fn tidy(&self) {
        while self.tidy_some() {}
    }

    /// Frees some of it; returns whether there was any. Whoever finds a budget used up does so before giving up.
    pub(super) fn tidy_some(&self) -> bool {
        let some = self.rubbish().take_some();
        some.is_some()
    }
}
