//! A write whose payload is still arriving: received straight into new block memory, published window by window.
//!
//! ```text
//!   payload   |part of a block|  whole blocks ...                       |part of a block|
//!   window                    [slot][slot][slot] ... up to 256 KiB, the next ones when these are full
//! ```
//!
//! A client that sends slowly, or never sends the rest, holds one window and no more; what was not published when its
//! connection ends never happened. A window is in nobody's budget until it is published, so that a session that has used
//! up its own can still overwrite; all windows together are bounded by the pool ([`crate::overlay::Staging`]). Parts of blocks are kept aside as [`Fragment`]s, as they may have to wait for the
//! base.

use super::Device;
use crate::limits::PAYLOAD_WINDOW_BYTES as WINDOW;
use crate::overlay::{Magazine, Outcome, is_zero};
use crate::sys::{KernelSpanMut, Slot};
use std::ops::Range;
use zeroize::Zeroizing;

/// The payload for part of one block.
#[derive(Debug)]
pub struct Fragment {
    /// Where it belongs, in bytes.
    pub offset: u64,
    /// What belongs there.
    pub data: Zeroizing<Vec<u8>>,
}

/// A write in the middle of its payload.
#[derive(Debug)]
pub struct Incoming {
    /// What is still to be received.
    left: Range<u64>,
    /// The block of the first slot.
    first: u64,
    /// Memory for the blocks that are being received.
    slots: Vec<Slot>,
    /// Where the window's payload begins.
    start: u64,
    fragments: Vec<Fragment>,
    /// What [`crate::overlay::Overlay::returns`] said when the first window was published.
    since: Option<u64>,
}

/// What is left to be done of a write when its payload has arrived.
#[derive(Debug)]
pub struct Remainder {
    /// The parts of blocks, to be written by [`Device::write`] once the base under them is warm.
    pub fragments: Vec<Fragment>,
    since: Option<u64>,
}

impl Remainder {
    /// Whether a part of the write, which was published, is lost, because the session was rolled back since.
    #[must_use]
    pub fn is_torn(&self, device: &Device) -> bool {
        self.since.is_some_and(|since| since != device.overlay.returns())
    }
}

impl Incoming {
    /// The payload of a write of `range`, of which nothing has arrived.
    #[must_use]
    pub fn new(range: Range<u64>) -> Self {
        Self {
            start: range.start,
            left: range,
            first: 0,
            slots: Vec::new(),
            fragments: Vec::new(),
            since: None,
        }
    }

    /// Bytes still to come.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.left.end - self.left.start
    }

    /// Makes room for the next bytes, if there is none.
    ///
    /// # Errors
    /// `OutOfSpace` when the server's block memory is used up: what is missing must be thrown away.
    pub fn open_window(&mut self, device: &Device, magazine: &mut Magazine) -> Outcome<()> {
        if !self.slots.is_empty() || self.left.is_empty() {
            return Ok(());
        }
        let size = device.block_size();
        self.start = self.left.start;
        self.first = size.index_of(self.start);
        let end = (self.left.start + WINDOW.max(size.bytes())).min(self.left.end);
        let staging = device.overlay.pool().staging();
        for _ in self.first..size.blocks_for(end) {
            // One block is always tried, so that a write goes on, slowly, where many are in the middle of theirs.
            if !self.slots.is_empty() && !staging.has_room() {
                break;
            }
            // Only what was received into it will be read.
            match magazine.allocate_to_overwrite() {
                Ok(slot) => self.slots.push(slot),
                // With some room the write goes on that far; the next window tells whether there is more.
                Err(_) if !self.slots.is_empty() => break,
                Err(error) => return Err(error),
            }
            staging.add(1);
        }
        Ok(())
    }

    /// Where the window ends, in bytes.
    fn window_end(&self, device: &Device) -> u64 {
        ((self.first + self.slots.len() as u64) * device.block_size().bytes()).min(self.left.end)
    }

    /// The part of the window that is still to be received, for the kernel to write to.
    pub fn spans<'a>(&'a mut self, device: &'a Device) -> impl Iterator<Item = KernelSpanMut<'a>> {
        let end = self.window_end(device);
        let (first, next, size) = (self.first, self.left.start, device.block_size());
        let arena = device.overlay.pool().arena();
        self.slots.iter_mut().zip(first..).filter_map(move |(slot, block)| {
            let start = block * size.bytes();
            let (from, to) = (next.clamp(start, start + size.bytes()), end.min(start + size.bytes()));
            let bytes = arena.bytes_mut(slot)?;
            (from < to)
                .then(|| KernelSpanMut::new(&mut bytes[super::clamp(from - start)..super::clamp(to - start)]))
        })
    }

    /// Takes bytes that arrived elsewhere; returns how many of them belonged to the window.
    pub fn take(&mut self, data: &[u8], device: &Device) -> usize {
        let size = device.block_size();
        let arena = device.overlay.pool().arena();
        let mut taken = 0;
        let end = self.window_end(device);
        while taken < data.len() && self.left.start < end {
            let block = size.index_of(self.left.start);
            let within = size.offset_within(self.left.start);
            let len =
                (data.len() - taken).min(size.in_memory() - within).min(super::clamp(end - self.left.start));
            let slot = &mut self.slots[super::clamp(block - self.first)];
            if let Some(bytes) = arena.bytes_mut(slot) {
                bytes[within..within + len].copy_from_slice(&data[taken..taken + len]);
            }
            taken += len;
            self.left.start += len as u64;
        }
        taken
    }

    /// Notes that the kernel put `count` bytes into [`Incoming::spans`].
    pub fn advance(&mut self, count: u64) {
        self.left.start += count;
        debug_assert!(self.left.start <= self.left.end, "more payload than was asked for");
    }

    /// Publishes the window if it is full.
    ///
    /// # Errors
    /// `OutOfSpace` when a budget is used up; the rest of the window is given back.
    pub fn close_window(&mut self, device: &Device, magazine: &mut Magazine) -> Outcome<()> {
        if self.slots.is_empty() || self.left.start < self.window_end(device) {
            return Ok(());
        }
        let size = device.block_size();
        let (start, end) = (self.start, self.left.start);
        let mut result = Ok(());
        self.since.get_or_insert_with(|| device.overlay.returns());
        device.overlay.pool().staging().remove(self.slots.len());
        for (mut slot, block) in self.slots.drain(..).zip(self.first..) {
            let bytes = device.overlay.pool().arena().bytes(&slot);
            let from = start.max(block * size.bytes());
            let to = end.min((block + 1) * size.bytes());
            let whole = to - from == size.bytes();
            if result.is_err() {
                magazine.release(slot);
            } else if !whole {
                let at = size.offset_within(from);
                let data = bytes[at..at + super::clamp(to - from)].to_vec();
                self.fragments.push(Fragment { offset: from, data: data.into() });
                magazine.release(slot);
            } else if is_zero(bytes) {
                magazine.release(slot);
                result = device.overlay.set_zero(block..block + 1, magazine);
            } else {
                device.overlay.seal_slot(block, &mut slot);
                result = device.overlay.install(block, slot, magazine);
            }
        }
        result
    }

    /// What is left to be done, when everything has been received.
    #[must_use]
    pub fn finish(self) -> Remainder {
        debug_assert!(self.slots.is_empty(), "an open window was forgotten");
        Remainder { fragments: self.fragments, since: self.since }
    }

    /// Gives back what was received and not published.
    pub fn abandon(self, device: &Device, magazine: &mut Magazine) {
        device.overlay.pool().staging().remove(self.slots.len());
        for slot in self.slots {
            magazine.release(slot);
        }
    }
}
