//! Memory that is wiped before it is somebody else's: buffers that payload passes through, and an allocator that does so with
//! all that is freed.
//!
//! # Safety
//! The allocator hands every call on to the system's and touches only what its caller gives up with the call; a buffer owns
//! its mapping, and is reached by borrowing it.

use memmap2::{Advice, MmapMut, UncheckedAdvice};
use rustix::mm::MlockFlags;
use std::alloc::{GlobalAlloc, Layout, System};
use std::io;
use std::ops::{Deref, DerefMut};
use zeroize::Zeroize;

/// The system's allocator, but what is freed is wiped first.
///
/// Payload lies in the heap here and there: the beginning of a request that has not come altogether, part of a block that waits for
/// the disk, a library's own buffers. This catches all of them, and what nobody thought of. Memory that is freed costs a
/// `memset`, of as many bytes as were asked for; of a large block, of as many as it has in memory.
///
/// A program has this as its allocator, a library does not choose one for its program:
///
/// ```
/// #[global_allocator]
/// static ALLOCATOR: memdev::sys::WipingAllocator = memdev::sys::WipingAllocator;
/// # fn main() {}
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct WipingAllocator;

/// From this size on it is asked which pages of a block there are, before they are wiped: what nobody has touched takes no
/// memory, and would only for being wiped.
const LARGE: usize = 1 << 20;

/// How many pages are asked for at once. The answer lies on the stack, as nothing can be allocated here.
const PAGES_AT_ONCE: usize = 512;

/// Overwrites what is given up.
///
/// # Safety
/// `size` bytes from `address` on are the caller's alone, to write to, and private anonymous memory, as a heap is.
#[inline]
unsafe fn wipe(address: *mut u8, size: usize) {
    if size < LARGE {
        // SAFETY: as the caller says.
        unsafe { overwrite(address, size) };
    } else {
        // SAFETY: as the caller says.
        unsafe { wipe_present(address, size) };
    }
}

/// Overwrites by writes that the compiler keeps although the memory is freed behind them.
///
/// # Safety
/// `size` bytes from `address` on are the caller's alone, to write to.
#[inline]
unsafe fn overwrite(address: *mut u8, size: usize) {
    // SAFETY: as the caller says.
    unsafe { address.write_bytes(0, size) };
    // Without it they would be dead stores: `free` is known to throw memory away.
    // SAFETY: a byte that was just written to, unless there is none, when the address is not looked at either.
    zeroize::optimization_barrier(unsafe { &*address });
}

/// Overwrites those pages that are in memory. All others are zero afterwards, too, without taking memory for it.
///
/// # Safety
/// As for [`wipe`].
#[cold]
unsafe fn wipe_present(address: *mut u8, size: usize) {
    let page = rustix::param::page_size();
    let head = address.align_offset(page).min(size);
    let pages = (size - head) / page;
    // What lies around the whole pages is in use, or was: it has a neighbour.
    // SAFETY: the block's first bytes, if any.
    unsafe { overwrite(address, head) };
    let tail = head + pages * page;
    if tail < size {
        // SAFETY: the block's last bytes.
        unsafe { overwrite(address.wrapping_add(tail), size - tail) };
    }
    let mut present = [0; PAGES_AT_ONCE];
    for first in (0..pages).step_by(PAGES_AT_ONCE) {
        let present = &mut present[..PAGES_AT_ONCE.min(pages - first)];
        let start = address.wrapping_add(head + first * page);
        // SAFETY: whole pages of the block, and the kernel writes a byte for each, of which `present` has as many.
        if unsafe { libc::mincore(start.cast(), present.len() * page, present.as_mut_ptr()) } != 0 {
            present.fill(1);
        }
        let mut at = start;
        for run in present.chunk_by(|a, b| a & 1 == b & 1) {
            let len = run.len() * page;
            if run[0] & 1 == 1 {
                // SAFETY: part of the block.
                unsafe { overwrite(at, len) };
            } else {
                // What was swapped out is not in memory, either, and would come back. Where it fails the memory is locked: all that
                // is locked here was so before it was used, and so none of it was swapped out.
                // SAFETY: whole pages of private anonymous memory, whose content nobody wants.
                let _ = unsafe { rustix::mm::madvise(at.cast(), len, rustix::mm::Advice::LinuxDontNeed) };
            }
            at = at.wrapping_add(len);
        }
    }
}

// SAFETY: every call goes to the system's allocator, with the layout it came with, and so is as sound as that. What is
// written to is what the caller gives up.
unsafe impl GlobalAlloc for WipingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those of this call, too.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above. What is freed was wiped, but the system has its own ways to know that.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        // SAFETY: it is a block of that layout, which its owner gives up; the system's allocator has its blocks in private
        // anonymous memory.
        unsafe { wipe(address, layout.size()) };
        // SAFETY: as above.
        unsafe { System.dealloc(address, layout) }
    }

    unsafe fn realloc(&self, address: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // Not the system's: that may leave a copy where the block was.
        // SAFETY: a layout with another size, which is not 0 and does not overflow when rounded up, as the caller says.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        // SAFETY: the size is not 0.
        let new = unsafe { System.alloc(new_layout) };
        if !new.is_null() {
            // SAFETY: both are blocks of at least that size, and a new block does not overlap one that is in use.
            unsafe { std::ptr::copy_nonoverlapping(address, new, layout.size().min(new_size)) };
            // SAFETY: a block of that layout, which its owner gives up as the new one takes its place.
            unsafe { self.dealloc(address, layout) };
        }
        new
    }
}

/// Memory that payload passes through: it is in no core file and no child process, takes no memory before it is used, can be
/// locked, and knows how much of it was used, to wipe that.
#[derive(Debug)]
pub struct Buffer {
    memory: MmapMut,
    used: usize,
}

impl Buffer {
    /// A buffer of `len` bytes, which are zero.
    ///
    /// # Errors
    /// What `mmap(2)` and `madvise(2)` say.
    pub fn new(len: usize) -> io::Result<Self> {
        let memory = MmapMut::map_anon(len)?;
        memory.advise(Advice::DontDump)?;
        memory.advise(Advice::DontFork)?;
        // As with block memory: locked by `lock` or not at all, whatever the process does with the rest.
        memory.unlock()?;
        Ok(Self { memory, used: 0 })
    }

    /// Keeps it out of swap: each page from its first touch on.
    ///
    /// # Errors
    /// `OutOfMemory` or `PermissionDenied` where locked memory is limited.
    pub fn lock(&self) -> io::Result<()> {
        let address = self.memory.as_ptr().cast_mut().cast();
        // SAFETY: the range is the mapping that `self` owns; locking changes no byte of it.
        Ok(unsafe { rustix::mm::mlock_with(address, self.memory.len(), MlockFlags::ONFAULT) }?)
    }

    /// Takes [`Buffer::lock`] back.
    ///
    /// # Errors
    /// What `munlock(2)` says.
    pub fn unlock(&self) -> io::Result<()> {
        self.memory.unlock()
    }

    /// Notes that bytes before `end` may have been written to.
    pub fn note_used(&mut self, end: usize) {
        self.used = self.used.max(end.min(self.memory.len()));
    }

    /// All of it, to be written to up to a place that is noted by [`Buffer::note_used`], if not now then later.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory
    }

    /// Overwrites what was used with zeroes.
    pub fn wipe(&mut self) {
        if self.used > 0 {
            self.memory[..self.used].zeroize();
            self.used = 0;
        }
    }

    /// Gives its memory back to the system, after [`Buffer::wipe`].
    pub fn give_back(&mut self) {
        self.wipe();
        // SAFETY: `self` is borrowed exclusively, so nobody looks at the bytes, which become zero. Where they are locked it
        // fails, and they stay, wiped.
        let _ = unsafe { self.memory.unchecked_advise(UncheckedAdvice::DontNeed) };
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.wipe();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_forgets_what_was_noted() {
        let mut buffer = Buffer::new(8192).unwrap();
        buffer[..5000].fill(7);
        buffer.note_used(5000);
        buffer.wipe();
        assert!(buffer.iter().all(|&byte| byte == 0));
        buffer[..9].fill(7);
        buffer.note_used(9);
        buffer.give_back();
        assert!(buffer.iter().all(|&byte| byte == 0));
    }

    /// Which pages of `memory` are there, without a look at them, which would bring them.
    fn present(memory: &MmapMut) -> Vec<bool> {
        let mut pages = vec![0; memory.len() / rustix::param::page_size()];
        let start = memory.as_ptr().cast_mut().cast();
        // SAFETY: the whole mapping, and a byte for each of its pages.
        assert_eq!(unsafe { libc::mincore(start, memory.len(), pages.as_mut_ptr()) }, 0);
        pages.iter().map(|page| page & 1 == 1).collect()
    }

    /// The buffer for what the kernel asks of a file in user space is of 16 MiB, of which little is ever used: to wipe all of it
    /// took longer than everything else at a session's end.
    #[test]
    fn of_a_large_block_only_what_was_touched_is_wiped() {
        for locked in [false, true] {
            let page = rustix::param::page_size();
            let (count, touched) = (1200, [0, 1, 7, 511, 512, 600, 1198, 1199]);
            let mut memory = MmapMut::map_anon(count * page).unwrap();
            // Else a page may bring its neighbours with it.
            let _ = memory.advise(Advice::NoHugePage);
            if locked {
                let address = memory.as_mut_ptr().cast();
                // SAFETY: the mapping; locking changes no byte of it.
                unsafe { rustix::mm::mlock_with(address, count * page, MlockFlags::ONFAULT) }.unwrap();
            }
            for n in touched {
                memory[n * page..][..page].fill(0xa5);
            }
            let before = present(&memory);
            // As blocks are: neither end at a page's.
            let (start, end) = (16, count * page - 100);
            // SAFETY: part of the mapping, of which nobody has a reference now.
            unsafe { wipe(memory.as_mut_ptr().wrapping_add(start), end - start) };
            assert_eq!(present(&memory), before);
            assert_eq!(before.iter().filter(|present| **present).count(), touched.len());
            assert!(memory[..start].iter().chain(&memory[end..]).all(|&byte| byte == 0xa5));
            assert!(memory[start..end].iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn what_grows_and_shrinks_keeps_its_bytes() {
        let layout = Layout::from_size_align(100, 16).unwrap();
        // SAFETY: a layout with a size.
        let block = unsafe { WipingAllocator.alloc(layout) };
        // SAFETY: it has a hundred bytes.
        unsafe { block.write_bytes(0xa5, 100) };
        // SAFETY: the block and its layout.
        let larger = unsafe { WipingAllocator.realloc(block, layout, 100_000) };
        // SAFETY: the first hundred were copied.
        assert_eq!(unsafe { std::slice::from_raw_parts(larger, 100) }, [0xa5; 100]);
        let layout = Layout::from_size_align(100_000, 16).unwrap();
        // SAFETY: the block and its layout.
        let smaller = unsafe { WipingAllocator.realloc(larger, layout, 10) };
        // SAFETY: the first ten were kept.
        assert_eq!(unsafe { std::slice::from_raw_parts(smaller, 10) }, [0xa5; 10]);
        // SAFETY: the block and its layout.
        unsafe { WipingAllocator.dealloc(smaller, Layout::from_size_align(10, 16).unwrap()) };
    }
}
