//! The filter of system calls (seccomp), put over every thread of the process.
//!
//! `seccompiler` makes the program; its own way to install one cannot ask for refused calls to be logged, so that
//! whoever updates a C library could not find out which call it has come to need.
//!
//! # Safety
//! One system call, that reads a program which this function owns and changes no memory.

use seccompiler::sock_filter;
use std::io;

/// Puts `program` over all threads of this process, for good. The kernel logs what it refuses.
///
/// # Errors
/// `EACCES` unless the calling thread has given up new privileges, `EINVAL` or `ENOSYS` where the kernel has no filters,
/// and an error that names a thread whose own filter is in the way. Then no thread has got it.
pub(crate) fn install(program: &[sock_filter]) -> io::Result<()> {
    let mut program: Vec<libc::sock_filter> =
        program.iter().map(|i| libc::sock_filter { code: i.code, jt: i.jt, jf: i.jf, k: i.k }).collect();
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let filter = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    let flags = libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_LOG;
    // SAFETY: `filter` and the `len` instructions it points to outlive the call, which copies them; no other memory of
    // this process is read or written.
    let returned =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const filter) };
    match returned {
        0 => Ok(()),
        thread @ 1.. => Err(io::Error::other(format!("thread {thread} has a filter of its own"))),
        _ => Err(io::Error::last_os_error()),
    }
}
