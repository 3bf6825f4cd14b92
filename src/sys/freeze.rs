//! Freezing a file system, and thawing it (`ioctl_fs(2)`: FIFREEZE, FITHAW), which no crate at hand wraps.
//!
//! # Safety
//! The calls have an argument that the kernel does not look at.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `_IOWR('X', 119, int)` and the next; `linux/fs.h`.
const FIFREEZE: libc::Ioctl = 0xC004_5877;
const FITHAW: libc::Ioctl = 0xC004_5878;

/// Has the file system of `fd` write all that it has, and change nothing any more. This outlives the process.
///
/// # Errors
/// `EBUSY` if it is frozen, `EOPNOTSUPP` if it cannot be, `EPERM` without the right.
pub(crate) fn freeze(fd: BorrowedFd<'_>) -> io::Result<()> {
    call(fd, FIFREEZE)
}

/// Lets it go on.
///
/// # Errors
/// `EINVAL` if it is not frozen.
pub(crate) fn thaw(fd: BorrowedFd<'_>) -> io::Result<()> {
    call(fd, FITHAW)
}

fn call(fd: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<()> {
    // SAFETY: these requests look at no memory of this process.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn what_cannot_be_frozen_is_an_error() {
        // proc has nothing to freeze.
        let proc = std::fs::File::open("/proc").unwrap();
        assert!(freeze(proc.as_fd()).is_err());
        assert!(thaw(proc.as_fd()).is_err());
    }
}
