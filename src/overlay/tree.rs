//! The map of an overlay: a tree of leaves, of which checkpoints and forks share what they have in common.
//!
//! ```text
//!  Tree     ──> Branch (1 GiB of blocks of 4 KiB)  ──> Node: Zero, or ──> Leaf (2 MiB)
//!  Snapshot ──┘   as soon as one of two who share it changes anything in it, it gets one of its own
//! ```
//!
//! A snapshot is a copy of the tree's top: one counted pointer a branch. To whom a branch or a leaf belongs is said by its
//! *era*: a number that the tree shares with those parts alone that were made, or found to be nobody else's, since its last
//! snapshot. Only these are changed, and so whoever reads a tree under its lock need not look at any count. All others are
//! frozen: a change first puts a copy in their place, whose slots have one more holder.
//!
//! The invariant: what carries the tree's era is in no other tree, and neither is what leads to it.

use super::account::Account;
use super::leaf::{LEAF_BLOCKS, Leaf};
use super::{Content, Outcome, State};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes charged for a branch, beside its nodes.
pub(super) const BRANCH_COST: u64 = 128;
/// Leaves that a branch covers.
const BRANCH_LEAVES: u64 = 512;

fn next_era() -> u64 {
    static ERAS: AtomicU64 = AtomicU64::new(0);
    ERAS.fetch_add(1, Ordering::Relaxed)
}

/// What stands in a leaf's place.
#[derive(Clone, Debug)]
pub(super) enum Node {
    /// Nothing: all of its blocks are zero.
    Zero,
    Leaf(Arc<OwnedLeaf>),
}

impl Node {
    /// Bytes charged for a place in the tree.
    pub(super) const COST: u64 = 32;
}

/// A leaf, and who pays for it.
#[derive(Debug)]
pub(super) struct OwnedLeaf {
    leaf: Leaf,
    era: u64,
    account: Arc<Account>,
    charged: u64,
}

/// With the two counts of its `Arc`, and up to 16 bytes more that an allocator takes.
#[cfg(not(loom))]
const _: () = assert!(size_of::<OwnedLeaf>() as u64 + 32 <= Leaf::COST);

impl OwnedLeaf {
    fn node(make: impl FnOnce() -> Leaf, slots: usize, era: u64, account: &Arc<Account>) -> Outcome<Node> {
        let charged = Leaf::COST + (slots * size_of::<crate::sys::Slot>()) as u64;
        account.budget().charge_map(charged)?;
        Ok(Node::Leaf(Arc::new(Self { leaf: make(), era, account: Arc::clone(account), charged })))
    }
}

impl OwnedLeaf {
    pub(super) fn leaf(&self) -> &Leaf {
        &self.leaf
    }
}

impl Drop for OwnedLeaf {
    fn drop(&mut self) {
        self.account.pool().take_later(self.account.let_go_all(self.leaf.take_slots().into_iter()));
        self.account.budget().uncharge_map(self.charged);
    }
}

#[derive(Debug)]
struct Branch {
    nodes: BTreeMap<u64, Node>,
    era: u64,
    account: Arc<Account>,
    charged: u64,
}

impl Branch {
    fn with(nodes: BTreeMap<u64, Node>, era: u64, account: &Arc<Account>) -> Outcome<Arc<Self>> {
        let charged = BRANCH_COST + nodes.len() as u64 * Node::COST;
        account.budget().charge_map(charged)?;
        Ok(Arc::new(Self { nodes, era, account: Arc::clone(account), charged }))
    }
}

impl Drop for Branch {
    fn drop(&mut self) {
        self.account.budget().uncharge_map(self.charged);
    }
}

/// A map.
#[derive(Debug)]
pub(super) struct Tree {
    branches: BTreeMap<u64, Arc<Branch>>,
    era: u64,
}

impl Default for Tree {
    fn default() -> Self {
        Self { branches: BTreeMap::new(), era: next_era() }
    }
}

/// How far a look at the states of blocks has got.
pub(super) enum Looked {
    /// As far as was wanted.
    Through,
    /// To this block.
    UpTo(u64),
}

impl Tree {
    /// Bytes charged for a copy of the top.
    pub(super) fn top_cost(&self) -> u64 {
        256 + self.branches.len() as u64 * Node::COST
    }

    /// Another tree with the same contents. All that they have in common is frozen.
    pub(super) fn snapshot(&mut self) -> Self {
        self.era = next_era();
        self.copy()
    }

    /// Another tree with the same contents as this one, which is frozen itself.
    pub(super) fn copy(&self) -> Self {
        Self { branches: self.branches.clone(), era: next_era() }
    }

    pub(super) fn get(&self, index: u64) -> Option<&Node> {
        self.branches.get(&(index / BRANCH_LEAVES))?.nodes.get(&index)
    }

    /// The leaf `index`, if it may be changed.
    pub(super) fn own_leaf(&self, index: u64) -> Option<&Leaf> {
        match self.get(index)? {
            Node::Leaf(leaf) if leaf.era == self.era => Some(&leaf.leaf),
            Node::Leaf(_) | Node::Zero => None,
        }
    }

    /// The branch of the leaf `index`, to be changed: made, or put in place of one that others have, too.
    fn own_branch(&mut self, index: u64, account: &Arc<Account>) -> Outcome<&mut Branch> {
        let (key, era) = (index / BRANCH_LEAVES, self.era);
        let copy = match self.branches.get_mut(&key).map(|branch| (Arc::get_mut(branch).is_some(), branch)) {
            None => Some(BTreeMap::new()),
            Some((true, _)) => None,
            Some((false, shared)) => Some(shared.nodes.clone()),
        };
        if let Some(nodes) = copy {
            self.branches.insert(key, Branch::with(nodes, era, account)?);
        }
        let branch =
            self.branches.get_mut(&key).and_then(Arc::get_mut).expect("a branch that nobody else has");
        branch.era = era;
        Ok(branch)
    }

    /// Makes the leaf `index` one that may be changed, with the contents that it has.
    ///
    /// # Errors
    /// `OutOfSpace` when a budget has no room for its map.
    pub(super) fn make_own(&mut self, index: u64, account: &Arc<Account>) -> Outcome<()> {
        let era = self.era;
        let branch = self.own_branch(index, account)?;
        let leaf = match branch.nodes.get_mut(&index) {
            Some(Node::Leaf(leaf)) => {
                if let Some(leaf) = Arc::get_mut(leaf) {
                    // Those who had it, too, have ended.
                    leaf.era = era;
                    return Ok(());
                }
                let contents = leaf.leaf.lock();
                let arena = account.pool().arena();
                OwnedLeaf::node(|| contents.copy(|slot| arena.share(slot)), contents.slots(), era, account)?
            }
            Some(Node::Zero) => OwnedLeaf::node(Leaf::all_zero, 0, era, account)?,
            None => OwnedLeaf::node(Leaf::default, 0, era, account)?,
        };
        branch.put(index, leaf).map(drop)
    }

    /// Puts "all zero" in place of the leaf `index`; returns what was there, to be dropped without the lock.
    ///
    /// # Errors
    /// As [`Tree::make_own`]; never where there is a leaf that may be changed.
    pub(super) fn set_zero(&mut self, index: u64, account: &Arc<Account>) -> Outcome<Option<Node>> {
        if matches!(self.get(index), Some(Node::Zero)) {
            return Ok(None);
        }
        self.own_branch(index, account)?.put(index, Node::Zero)
    }

    /// Calls `see` for the runs that make up `blocks`, in order. A run ends at a leaf's end at the latest.
    pub(super) fn for_runs(&self, blocks: Range<u64>, mut see: impl FnMut(Range<u64>, Content<'_>)) {
        for (index, within) in per_leaf(blocks) {
            let base = index * LEAF_BLOCKS as u64;
            let absolute = |run: &Range<usize>| base + run.start as u64..base + run.end as u64;
            match self.get(index) {
                None => see(absolute(&within), Content::Unallocated),
                Some(Node::Zero) => see(absolute(&within), Content::Zero),
                Some(Node::Leaf(leaf)) => {
                    leaf.leaf.for_runs(within, |run, content| see(absolute(&run), content));
                }
            }
        }
    }

    /// Calls `see` for runs of blocks and their state that make up `blocks`, in order, until it says false, or so many
    /// leaves were looked at.
    pub(super) fn for_states(
        &self,
        blocks: &Range<u64>,
        leaves: usize,
        see: &mut impl FnMut(Range<u64>, State) -> bool,
    ) -> Looked {
        let size = LEAF_BLOCKS as u64;
        let mut at = blocks.start;
        if blocks.is_empty() {
            return Looked::Through;
        }
        let mut nodes = self.range(leaf_of(at)..leaf_of(blocks.end - 1) + 1);
        for (index, node) in nodes.by_ref().take(leaves) {
            if index * size > at && !see(at..index * size, State::Unallocated) {
                return Looked::Through;
            }
            let here = at.max(index * size)..blocks.end.min((index + 1) * size);
            at = here.end;
            let going = match node {
                Node::Zero => see(here, State::Zero),
                Node::Leaf(leaf) => leaf.leaf.for_states(here, index * size, &mut *see),
            };
            if !going {
                return Looked::Through;
            }
        }
        if nodes.next().is_some() {
            return Looked::UpTo(at);
        }
        if at < blocks.end {
            see(at..blocks.end, State::Unallocated);
        }
        Looked::Through
    }

    fn range(&self, leaves: Range<u64>) -> impl Iterator<Item = (u64, &Node)> {
        let branches = leaves.start / BRANCH_LEAVES..leaves.end.div_ceil(BRANCH_LEAVES);
        self.branches.range(branches).flat_map(move |(_, branch)| {
            branch.nodes.range(leaves.clone()).map(|(&index, node)| (index, node))
        })
    }

    /// Its leaves from `index` on.
    pub(super) fn leaves_from(&self, index: u64) -> impl Iterator<Item = (u64, &Leaf)> {
        self.range(index..u64::MAX).filter_map(|(index, node)| match node {
            Node::Zero => None,
            Node::Leaf(leaf) => Some((index, &leaf.leaf)),
        })
    }

    /// Slots in it.
    pub(super) fn slots(&self) -> u64 {
        let all = self.branches.values().flat_map(|branch| branch.nodes.values());
        all.map(|node| match node {
            Node::Zero => 0,
            Node::Leaf(leaf) => leaf.leaf.lock().slots() as u64,
        })
        .sum()
    }
}

impl Branch {
    /// Puts a node into the branch, which nobody else has; returns the one that was there.
    fn put(&mut self, index: u64, node: Node) -> Outcome<Option<Node>> {
        if !self.nodes.contains_key(&index) {
            self.account.budget().charge_map(Node::COST)?;
            self.charged += Node::COST;
        }
        Ok(self.nodes.insert(index, node))
    }
}

/// What is not needed any more, and has not been taken apart yet.
#[derive(Debug, Default)]
pub(super) struct Rubbish {
    branches: Vec<Arc<Branch>>,
    nodes: Vec<Node>,
}

impl Rubbish {
    pub(super) fn add(&mut self, tree: Tree) {
        self.branches.extend(tree.branches.into_values());
    }

    /// Takes out something that is not much work to drop; nothing when there is none left.
    pub(super) fn take_some(&mut self) -> Option<Node> {
        loop {
            if let Some(node) = self.nodes.pop() {
                return Some(node);
            }
            let branch = self.branches.pop()?;
            if let Some(mut branch) = Arc::into_inner(branch) {
                self.nodes.extend(std::mem::take(&mut branch.nodes).into_values());
            }
        }
    }
}

pub(super) fn leaf_of(block: u64) -> u64 {
    block / LEAF_BLOCKS as u64
}

/// Splits a range of blocks at the leaves: for each, its index and the blocks within it.
pub(super) fn per_leaf(blocks: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    let size = LEAF_BLOCKS as u64;
    let leaves = if blocks.is_empty() { 0..0 } else { leaf_of(blocks.start)..leaf_of(blocks.end - 1) + 1 };
    #[allow(clippy::cast_possible_truncation, reason = "within a leaf everything is at most 512")]
    let within =
        move |leaf: u64, block: u64| (block.clamp(leaf * size, (leaf + 1) * size) - leaf * size) as usize;
    leaves.map(move |leaf| (leaf, within(leaf, blocks.start)..within(leaf, blocks.end)))
}
