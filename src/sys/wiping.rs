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
/// `memset`, of as many bytes as were asked for.
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

/// Overwrites what is given up, by writes that the compiler keeps although the memory is freed behind them.
///
/// # Safety
/// `size` bytes from `address` on are the caller's alone, to write to.
#[inline]
unsafe fn wipe(address: *mut u8, size: usize) {
    // SAFETY: as the caller says.
    unsafe { address.write_bytes(0, size) };
    // Without it they would be dead stores: `free` is known to throw memory away.
    // SAFETY: a byte that was just written to, unless there is none, when the address is not looked at either.
    zeroize::optimization_barrier(unsafe { &*address });
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
        // SAFETY: it is a block of that layout, which its owner gives up.
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
