//! The allocator's memory.
//!
//! # Safety
//! One call that takes a number and touches nothing that is allocated.

/// Gives memory that the allocator holds and nobody uses back to the system, all but what is kept for the next
/// allocations.
///
/// glibc does so by itself only at the end of its heap: one small allocation there keeps all the free memory before it.
/// Other allocators are left to themselves.
pub(crate) fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes the allocator's own locks, and changes nothing that is allocated.
    unsafe {
        libc::malloc_trim(0);
    }
}
