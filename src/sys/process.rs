//! What a process does to itself, or makes of itself, and cannot be made safe in general: closing descriptors whose owners
//! it does not know, leaving namespaces, and becoming two; and what it was started with.
//!
//! # Safety
//! All of it is for processes with one thread: those that have just begun, and those that make a private root, which look
//! whether they have before they begin (`threads`).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::process::Pid;
use rustix::thread::UnshareFlags;

/// Closes every descriptor from `first` on: those that this process inherited and nothing in it knows of.
///
/// To be called before anything in this process has opened a file. Descriptors that Rust's standard library or a crate
/// opened earlier would be closed under their owners' hands: I/O safety is broken then, memory safety is not.
///
/// # Errors
/// What `close_range(2)` says: a kernel before 5.9 does not know it.
pub fn close_inherited(first: u32) -> io::Result<()> {
    close_range(first, u32::MAX)
}

/// Closes every descriptor from `first` on but those in `keep`. Values that own the others must never be used again, nor
/// dropped: this is for a process that was made by [`fork`] and never returns to where it came from.
///
/// # Errors
/// What `close_range(2)` says.
pub(crate) fn keep_only(first: u32, keep: &[BorrowedFd<'_>]) -> io::Result<()> {
    let numbers = keep.iter().filter_map(|fd| u32::try_from(fd.as_raw_fd()).ok());
    let mut numbers: Vec<_> = numbers.filter(|&number| number >= first).collect();
    numbers.sort_unstable();
    let mut next = first;
    for number in numbers {
        if number > next {
            close_range(next, number - 1)?;
        }
        next = number + 1;
    }
    close_range(next, u32::MAX)
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: no memory is touched. That nothing here uses these descriptors any more is what the caller has to keep, as
    // the documentation says; the only callers are the first line of a daemon, and processes that never return.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// No program that this process becomes, or starts, gets any descriptor from `first` on, whoever has opened it.
///
/// # Errors
/// What `close_range(2)` says: a kernel before 5.11 does not know the flag.
pub(crate) fn close_on_exec(first: u32) -> io::Result<()> {
    // SAFETY: no memory is touched, and no descriptor is closed here.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives the calling thread, and the threads that it starts from now on, a mount namespace of its own.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN, and what else `unshare(2)` says.
pub fn leave_mount_namespace() -> io::Result<()> {
    unshare(UnshareFlags::NEWNS)
}

/// Gives the calling process, which must have one thread only, a user namespace of its own, and a mount namespace that
/// belongs to it.
///
/// # Errors
/// `EINVAL` with more threads than one, `EPERM` where an administrator has forbidden it, and what else `unshare(2)` says.
pub fn leave_user_and_mount_namespace() -> io::Result<()> {
    unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNS)
}

/// Gives the calling thread namespaces of its own. The table of descriptors stays shared with all threads, whatever is
/// asked for.
///
/// # Errors
/// What `unshare(2)` says.
pub(crate) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: without FILES the table of descriptors stays shared with all threads.
    unsafe { rustix::thread::unshare_unsafe(flags - UnshareFlags::FILES) }?;
    Ok(())
}

/// How many threads this process has; more than one, to be safe, if nobody says.
pub(crate) fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(usize::MAX, Iterator::count)
}

/// Makes a second process of this one, which must have one thread (else what other threads had locked would stay locked in
/// the copy). Gives its number here, and nothing there.
///
/// # Errors
/// What `fork(2)` says.
pub(crate) fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: this process has one thread, as the documentation asks for, so that the copy is a whole program in a
    // consistent state.
    let result = unsafe { libc::fork() };
    forked(result.into())
}

/// As [`fork`], but the new process is a child of this one's parent. The copy must not use what keeps a thread's number:
/// the C library does not know that it has another one.
///
/// # Errors
/// What `clone(2)` says.
pub(crate) fn fork_sibling() -> io::Result<Option<Pid>> {
    let flags = libc::c_long::from(libc::CLONE_PARENT | libc::SIGCHLD);
    // SAFETY: without a stack and without CLONE_VM this is `fork`; see there. No pointer is given.
    let result = unsafe { libc::syscall(libc::SYS_clone, flags, 0_usize, 0_usize, 0_usize, 0_usize) };
    forked(result)
}

/// As [`fork_sibling`], but the new process is in the control group (of version 2) whose directory is `group` from its
/// beginning on.
///
/// # Errors
/// What `clone3(2)` says: before Linux 5.7, above all.
pub(crate) fn fork_sibling_in(group: BorrowedFd<'_>) -> io::Result<Option<Pid>> {
    const CLONE_INTO_CGROUP: u64 = 1 << 33;
    /// `struct clone_args`.
    #[repr(C)]
    #[derive(Default)]
    struct Arguments {
        flags: u64,
        pidfd: u64,
        child_tid: u64,
        parent_tid: u64,
        exit_signal: u64,
        stack: u64,
        stack_size: u64,
        tls: u64,
        set_tid: u64,
        set_tid_size: u64,
        cgroup: u64,
    }
    // The parent hears of its end by the signal that it hears of this one's by.
    let flags = u64::from(libc::CLONE_PARENT.cast_unsigned()) | CLONE_INTO_CGROUP;
    let cgroup = u64::try_from(group.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let arguments = Arguments { flags, cgroup, ..Arguments::default() };
    let size = std::mem::size_of::<Arguments>();
    // SAFETY: as in `fork_sibling`. The arguments outlive the call, which only reads them.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size) };
    forked(result)
}

fn forked(result: libc::c_long) -> io::Result<Option<Pid>> {
    match i32::try_from(result) {
        Ok(0) => Ok(None),
        Ok(number) if number > 0 => Ok(Pid::from_raw(number)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// From now on the calling thread gets no signals but those that cannot be blocked.
///
/// # Errors
/// What `sigprocmask(2)` says.
pub(crate) fn block_signals() -> io::Result<()> {
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `all` is a signal set that outlives the call, which fills it.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: the set has just been filled; the old one is not asked for.
    let result = unsafe { libc::sigprocmask(libc::SIG_BLOCK, all.as_ptr(), std::ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Ends this process at once: nothing is dropped, flushed or called that belongs to the process it is a copy of.
pub(crate) fn exit_now(status: u8) -> ! {
    // SAFETY: it has no preconditions.
    unsafe { libc::_exit(status.into()) }
}

/// Takes a new, empty session keyring, so that the keys of whoever started this are out of reach. A kernel without keys
/// has nothing to hide.
pub(crate) fn leave_keyring() {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: the name is null, which asks for one without a name; no memory is looked at.
    unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0_usize) };
}

/// Whether this process was started with `signal` ignored, as nohup does.
#[must_use]
pub fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_counted() {
        // The test harness has one of its own.
        assert!((2..1000).contains(&threads()));
    }

    #[test]
    fn ignored_signals_are_known() {
        // Rust's runtime ignores this one; nobody can ignore the other.
        assert!(is_ignored(signal_hook::consts::SIGPIPE));
        assert!(!is_ignored(signal_hook::consts::SIGKILL));
    }
}
