//! The block device of a session: its overlay over the shared base, by bytes.
//!
//! ```text
//!   read    overlay run:  allocated -> slots          zero -> zeroes          unallocated -> base (or its hole)
//!   write   whole block -> overlay                    part of a block -> base's bytes under it first, once
//!   trim, write zeroes    whole blocks -> zero, memory freed                  parts -> zeroes written
//! ```
//!
//! The device never waits for a disk: [`Device::read_needs`] and [`Device::write_needs`] tell which part of the base
//! has to be brought into memory first, which the caller has done elsewhere. Ranges are validated by the caller.

mod incoming;

pub use incoming::{Fragment, Incoming, Remainder};

use crate::base::Image;
use crate::error::ErrorKind;
use crate::overlay::{BlockSize, Budget, Content, LongRead, Magazine, Outcome, Overlay, State};
use crate::sys::SlotRun;
use std::ops::Range;
use std::sync::Arc;

/// Where the bytes of a part of a read are.
#[derive(Debug)]
pub enum Piece {
    /// In the base, at this byte.
    Base {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: usize,
    },
    /// In block memory.
    Blocks {
        /// The slots, held so that nothing changes or recycles them.
        run: SlotRun,
        /// The block that the first of them is of. Where the device is sealed they hold ciphertext: see [`Device::copy`].
        first: u64,
        /// Where in them the part begins.
        at: usize,
        /// Bytes.
        len: usize,
    },
    /// Nowhere: they are zero, and take no memory.
    Zero {
        /// Bytes.
        len: usize,
    },
}

impl Piece {
    /// Bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a piece is never empty")]
    pub fn len(&self) -> usize {
        match self {
            Self::Base { len, .. } | Self::Blocks { len, .. } | Self::Zero { len } => *len,
        }
    }
}

/// A range of bytes of one kind, as block status tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, never 0.
    pub len: u64,
    /// Whether it is a hole that reads as zeroes; else it is data.
    pub hole: bool,
    /// Whether it is the overlay's, which was written to; else it is the base's.
    pub dirty: bool,
}

/// One private, writable block device.
#[derive(Debug)]
pub struct Device {
    image: Arc<Image>,
    overlay: Overlay,
}

impl Device {
    /// A device that shows `image` until it is written to; what is written goes to `overlay`.
    #[must_use]
    pub fn new(image: Arc<Image>, overlay: Overlay) -> Self {
        Self { image, overlay }
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.image.size()
    }

    /// The shared half.
    #[must_use]
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// The private half.
    #[must_use]
    pub fn overlay(&self) -> &Overlay {
        &self.overlay
    }

    /// Another device with the same contents, which pays for what is written to it out of `budget`.
    #[must_use]
    pub fn fork(&self, budget: Budget) -> Self {
        Self { image: Arc::clone(&self.image), overlay: self.overlay.fork(budget) }
    }

    fn block_size(&self) -> BlockSize {
        self.overlay.block_size()
    }

    fn blocks(&self, range: &Range<u64>) -> Range<u64> {
        let size = self.block_size();
        if range.is_empty() { 0..0 } else { size.index_of(range.start)..size.index_of(range.end - 1) + 1 }
    }

    /// The bytes of a run of blocks that are within `range`.
    fn bytes(&self, blocks: &Range<u64>, range: &Range<u64>) -> Range<u64> {
        let size = self.block_size().bytes();
        (blocks.start * size).max(range.start)..(blocks.end * size).min(range.end)
    }

    /// What of the base must be read into memory before a read of `range` can be answered at once.
    #[must_use]
    pub fn read_needs(&self, range: &Range<u64>) -> Option<Range<u64>> {
        if self.image.is_warm(range.clone()) {
            return None;
        }
        let mut cold: Option<Range<u64>> = None;
        self.overlay.for_runs(self.blocks(range), |blocks, content| {
            let bytes = self.bytes(&blocks, range);
            if matches!(content, Content::Unallocated) && !self.image.is_warm_after_a_look(bytes.clone()) {
                let start = cold.as_ref().map_or(bytes.start, |cold| cold.start);
                cold = Some(start..bytes.end);
            }
        });
        cold
    }

    /// Where in `range` the last byte that a read would take from the base ends; 0 if it would take none.
    #[must_use]
    pub fn base_end(&self, range: &Range<u64>) -> u64 {
        let mut end = 0;
        self.overlay.for_runs(self.blocks(range), |blocks, content| {
            if matches!(content, Content::Unallocated) {
                let runs = self.image.extents().runs(self.bytes(&blocks, range));
                end = runs.filter(|run| run.data).map(|run| run.range().end).max().unwrap_or(end);
            }
        });
        end
    }

    /// Calls `put` for the pieces that make up `range`, in order.
    ///
    /// # Panics
    /// If a part of it is in a file: for those who have [`Device::read_in`] bring that in.
    pub fn read(&self, range: Range<u64>, put: impl FnMut(Piece)) {
        self.read_in(None, range, put).expect("all of it is in memory");
    }

    /// The same for a part of a long read, which sees the device as it was when the read began if it was rolled back since.
    ///
    /// # Errors
    /// `Away` when a part of it is in a file, and must be brought in first; what was `put` is to be given back then.
    pub fn read_in(
        &self,
        read: Option<&LongRead>,
        range: Range<u64>,
        mut put: impl FnMut(Piece),
    ) -> Outcome<()> {
        let arena = self.overlay.pool().arena();
        let sealed = self.is_sealed();
        let mut is_away = false;
        self.overlay.for_runs_in(read, self.blocks(&range), |blocks, content| {
            let bytes = self.bytes(&blocks, &range);
            let mut left = clamp(bytes.end - bytes.start);
            match content {
                Content::Unallocated => {
                    for run in self.image.extents().runs(bytes) {
                        let len = clamp(run.len);
                        put(if run.data {
                            Piece::Base { offset: run.offset, len }
                        } else {
                            Piece::Zero { len }
                        });
                    }
                }
                Content::Zero => put(Piece::Zero { len: left }),
                Content::Allocated(slots)
                    if sealed && slots.iter().any(|slot| arena.is_away(slot.number())) =>
                {
                    is_away = true;
                }
                Content::Allocated(slots) => {
                    if sealed {
                        slots.iter().for_each(|slot| arena.touch(slot));
                    }
                    let mut at = self.block_size().offset_within(bytes.start);
                    let mut first = blocks.start;
                    let mut slots = slots.iter().map(|slot| arena.lend(slot)).peekable();
                    while let Some(slot) = slots.next() {
                        let (mut run, mut len, mut count) = (SlotRun::new(slot), arena.slot_size() - at, 1);
                        while let Some(next) = slots.next_if(|slot| slot.number() == run.next_number()) {
                            // Just seen to be the neighbour.
                            let _ = run.extend(next);
                            len += arena.slot_size();
                            count += 1;
                        }
                        let len = len.min(left);
                        left -= len;
                        put(Piece::Blocks { run, first, at, len });
                        (at, first) = (0, first + count);
                    }
                }
            }
        });
        if is_away { Err(ErrorKind::Away) } else { Ok(()) }
    }

    /// Whether blocks are ciphertext where they lie.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.overlay.seal().is_some()
    }

    /// Puts what a [`Piece::Blocks`] has from byte `at` of its slots on into `out`, in plain.
    ///
    /// # Panics
    /// If there are not as many bytes.
    pub fn copy(&self, run: &SlotRun, first: u64, at: usize, out: &mut [u8]) {
        let bytes = self.overlay.pool().arena().run_bytes(run);
        let Some(seal) = self.overlay.seal() else { return out.copy_from_slice(&bytes[at..at + out.len()]) };
        let size = self.block_size().in_memory();
        let (mut at, mut out) = (at, out);
        while !out.is_empty() {
            let (index, within) = (at / size, at % size);
            let count = out.len().min(size - within);
            let (now, rest) = out.split_at_mut(count);
            seal.read(first + index as u64, &bytes[index * size..(index + 1) * size], within, now);
            (at, out) = (at + count, rest);
        }
    }

    /// Gives back what a [`Piece::Blocks`] of [`Device::read`] holds.
    pub fn release(&self, run: SlotRun, magazine: &mut Magazine) {
        run.into_loans().for_each(|loan| self.overlay.release(loan, magazine));
    }

    /// The blocks that a write of `range` covers only in part: at most two, its first and its last.
    fn edges(&self, range: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let size = self.block_size().bytes();
        let blocks = self.blocks(range);
        let last = (blocks.end.saturating_sub(1)).max(blocks.start);
        let range = range.clone();
        [Some(blocks.start), (last > blocks.start).then_some(last)]
            .into_iter()
            .flatten()
            .map(move |block| block * size..(block + 1) * size)
            .filter(move |block| !range.is_empty() && (block.start < range.start || block.end > range.end))
    }

    /// What of the base must be read into memory before a write of `range` can be done at once: the parts that blocks
    /// at its edges keep.
    #[must_use]
    pub fn write_needs(&self, range: &Range<u64>) -> Option<Range<u64>> {
        self.edges(range).find_map(|block| self.read_needs(&(block.start..block.end.min(self.size()))))
    }

    /// The first block at an edge of `range`, covered in part, that is in a file.
    #[must_use]
    pub fn away_edge(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let arena = self.overlay.pool().arena();
        self.edges(range).find(|edge| {
            let mut is_away = false;
            self.overlay.for_runs(self.blocks(edge), |_, content| {
                if let Content::Allocated(slots) = content {
                    is_away |= slots.iter().any(|slot| arena.is_away(slot.number()));
                }
            });
            is_away
        })
    }

    /// Writes `data` at byte `offset`. Whole blocks of zeroes become zero blocks, which take no memory.
    ///
    /// # Errors
    /// `OutOfSpace` when a budget is used up, `Io` when the base cannot be read, `Away` when a block at an edge is in a file and must be
    /// brought in first; part may be written then.
    pub fn write(&self, offset: u64, data: &[u8], magazine: &mut Magazine) -> Outcome<()> {
        let size = self.block_size();
        let (mut at, mut data) = (offset, data);
        while !data.is_empty() {
            let within = size.offset_within(at);
            let len = if within == 0 && data.len() >= size.in_memory() {
                data.len() - data.len() % size.in_memory()
            } else {
                data.len().min(size.in_memory() - within)
            };
            let (now, rest) = data.split_at(len);
            let block = size.index_of(at);
            if len >= size.in_memory() {
                self.overlay.write(block, now, magazine)?;
            } else {
                self.overlay.write_part(block, within, now, magazine, |memory| self.fill(block, memory))?;
            }
            (at, data) = (at + len as u64, rest);
        }
        Ok(())
    }

    /// Puts the base's bytes of a block into its new memory.
    fn fill(&self, block: u64, memory: &mut [u8]) -> Outcome<()> {
        let start = block * self.block_size().bytes();
        let bytes = start..(start + self.block_size().bytes()).min(self.size());
        for run in self.image.extents().runs(bytes).filter(|run| run.data) {
            let at = clamp(run.offset - start);
            let part = &mut memory[at..at + clamp(run.len)];
            self.image.read_at(run.offset, part).map_err(|_| ErrorKind::Io)?;
        }
        Ok(())
    }

    /// Makes `range` read as zeroes, and frees the memory of the whole blocks in it. With `allocate`, gives every
    /// block of it memory instead, so that later writes to it cannot run out.
    ///
    /// # Errors
    /// As [`Device::write`].
    pub fn write_zeroes(&self, range: Range<u64>, allocate: bool, magazine: &mut Magazine) -> Outcome<()> {
        let size = self.block_size().bytes();
        let whole = self.whole_blocks(&range);
        for part in
            [range.start..range.end.min(whole.start * size), range.start.max(whole.end * size)..range.end]
        {
            self.write_zero_part(part, allocate, magazine)?;
        }
        if allocate {
            return self.allocate_zeroes(whole, magazine);
        }
        if self.reads_as_zero(&(whole.start * size..(whole.end * size).min(self.size()))) {
            return Ok(());
        }
        self.overlay.set_zero(whole, magazine)
    }

    /// The blocks that lie wholly in `range`; the device's last counts as whole where the device ends. Empty, and at
    /// the end of the range, when there is none.
    fn whole_blocks(&self, range: &Range<u64>) -> Range<u64> {
        let size = self.block_size();
        let start = size.blocks_for(range.start);
        let end =
            if range.end == self.size() { size.blocks_for(range.end) } else { size.index_of(range.end) };
        start..end.max(start)
    }

    /// Zeroes part of one block (or nothing).
    fn write_zero_part(&self, part: Range<u64>, allocate: bool, magazine: &mut Magazine) -> Outcome<()> {
        if part.is_empty() || (!allocate && self.reads_as_zero(&part)) {
            return Ok(());
        }
        let zeroes = vec![0; clamp(part.end - part.start)];
        self.write(part.start, &zeroes, magazine)
    }

    fn allocate_zeroes(&self, blocks: Range<u64>, magazine: &mut Magazine) -> Outcome<()> {
        for block in blocks {
            // Slots come zeroed.
            let mut slot = magazine.allocate()?;
            self.overlay.seal_slot(block, &mut slot);
            self.overlay.install(block, slot, magazine)?;
        }
        Ok(())
    }

    /// Whether `range` is known to read as zeroes without looking at data.
    fn reads_as_zero(&self, range: &Range<u64>) -> bool {
        let mut zero = true;
        self.extents(range.clone(), |extent| {
            zero &= extent.hole;
            zero
        });
        zero
    }

    /// Forgets `range`: the whole blocks in it read as zeroes afterwards, and their memory is freed. Parts of blocks
    /// stay as they are. Never fails: where there is no memory to note it, the blocks keep their contents.
    pub fn trim(&self, range: &Range<u64>, magazine: &mut Magazine) {
        let whole = self.whole_blocks(range);
        let size = self.block_size().bytes();
        if !whole.is_empty()
            && !self.reads_as_zero(&(whole.start * size..(whole.end * size).min(self.size())))
        {
            // The specification leaves what a trimmed range reads as, so an answer of "no memory" would be a lie.
            let _ = self.overlay.set_zero(whole, magazine);
        }
    }

    /// Calls `see` for extents that make up `range`, in order, until it says false. Neighbours may be of one kind. What
    /// the overlay knows nothing of costs no time, however long it is, but for the base's own runs in it.
    pub fn extents(&self, range: Range<u64>, mut see: impl FnMut(Extent) -> bool) {
        self.overlay.for_states(self.blocks(&range), |blocks, state| {
            let bytes = self.bytes(&blocks, &range);
            let len = bytes.end - bytes.start;
            match state {
                State::Unallocated => {
                    let mut runs = self.image.extents().runs(bytes);
                    runs.all(|run| see(Extent { len: run.len, hole: !run.data, dirty: false }))
                }
                State::Zero => see(Extent { len, hole: true, dirty: true }),
                State::Allocated => see(Extent { len, hole: false, dirty: true }),
            }
        });
    }

    /// Bytes at the start of `range` that read as zeroes without a look at data, or fewer: it does not look far where
    /// much was written.
    #[must_use]
    pub fn leading_hole(&self, range: Range<u64>) -> u64 {
        const MOST_LOOKS: usize = 64;
        let (mut hole, mut looks) = (0, 0);
        self.extents(range, |extent| {
            hole += if extent.hole { extent.len } else { 0 };
            looks += 1;
            extent.hole && looks < MOST_LOOKS
        });
        hole
    }
}

/// A length that is known to fit: requests and blocks are far below the address space.
fn clamp(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

#[cfg(all(test, not(loom)))]
mod points_tests;
#[cfg(test)]
mod tests;
