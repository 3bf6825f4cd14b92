//! What a process does to itself before it becomes a daemon, and cannot be made safe in general: closing descriptors
//! whose owners it does not know, and leaving namespaces.
//!
//! # Safety
//! All are for a process that has just begun: nothing in it has opened anything yet, and it has one thread.

use std::io;

use rustix::thread::UnshareFlags;

/// Closes every descriptor from `first` on: those that this process inherited and nothing in it knows of.
///
/// To be called before anything in this process has opened a file. Descriptors that Rust's standard library or a crate
/// opened earlier would be closed under their owners' hands: I/O safety is broken then, memory safety is not.
///
/// # Errors
/// What `close_range(2)` says: a kernel before 5.9 does not know it.
pub fn close_inherited(first: u32) -> io::Result<()> {
    // SAFETY: no memory is touched. That nothing here owns these descriptors yet is what the caller has to keep, as the
    // documentation says; the only caller is the first line of a daemon.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives the calling thread, and the threads that it starts from now on, a mount namespace of its own.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN, and what else `unshare(2)` says.
pub fn leave_mount_namespace() -> io::Result<()> {
    // SAFETY: the flag is NEWNS alone, so that the table of descriptors stays shared with all threads.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    Ok(())
}

/// Gives the calling process, which must have one thread only, a user namespace of its own, and a mount namespace that
/// belongs to it.
///
/// # Errors
/// `EINVAL` with more threads than one, `EPERM` where an administrator has forbidden it, and what else `unshare(2)` says.
pub fn leave_user_and_mount_namespace() -> io::Result<()> {
    // SAFETY: the table of descriptors stays shared: NEWUSER brings along a view of directories (FS) of this thread's own
    // and nothing else.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNS) }?;
    Ok(())
}
