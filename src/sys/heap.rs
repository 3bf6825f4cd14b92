//! The allocator's memory.
//!
//! # Safety
//! Calls that take numbers and touch nothing that is allocated.

/// Bytes: what the allocator keeps at the end of each of its heaps, and from which size on it takes memory from the system,
/// and gives it back, for each allocation alone. Nothing on the way of a request is as large.
#[cfg(target_env = "gnu")]
const KEPT: libc::c_int = 4 << 20;

/// Makes the allocator keep little of what is free.
///
/// By itself glibc raises both limits with the size of what is freed, to as much as 64 MiB for the end of every heap, of
/// which a thread may have one to itself; and [`trim`] leaves the ends of all heaps but the first alone.
pub(crate) fn keep_little() {
    #[cfg(target_env = "gnu")]
    for limit in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: it takes the allocator's own lock, and changes nothing that is allocated.
        unsafe {
            libc::mallopt(limit, KEPT);
        }
    }
}

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
