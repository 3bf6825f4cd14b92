//! What this process was started with: descriptors, and variables of its environment.
//!
//! # Safety
//! A descriptor's number becomes an owner of it only if nobody in this process owns it already. Everything that this
//! process opens, it opens close-on-exec; what it was started with cannot have that flag, or it would not have survived
//! the `exec`. So an open descriptor without the flag, other than the three standard ones, is nobody's; taking it sets
//! the flag, so it is taken once. The standard streams are the standard library's: of these a duplicate is taken.
//!
//! The environment may be changed while no other thread can read it: while there is none.

use std::ffi::c_int;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

/// Takes the descriptor `number`, close-on-exec from now on. A standard stream that is the same file is `/dev/null` then,
/// so that the file is closed when the descriptor is.
///
/// # Errors
/// `EBADF` if there is none, `PermissionDenied` if this process was not started with it; else what the system says.
pub(crate) fn take(number: RawFd) -> io::Result<OwnedFd> {
    // Between the look at the flag and its setting, nobody else must look.
    static TAKING: Mutex<()> = Mutex::new(());
    let _alone = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let fd = match number {
        0 => rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?,
        1 => rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?,
        2 => rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stderr(), 3)?,
        _ => {
            if descriptor_flags(number)? & libc::FD_CLOEXEC != 0 {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            // SAFETY: it is open and, without the flag, nobody's (see above); with the flag set right after, under
            // the lock, it is not given out again.
            let fd = unsafe { OwnedFd::from_raw_fd(number) };
            rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
            fd
        }
    };
    release_standard_streams(fd.as_fd())?;
    Ok(fd)
}

fn descriptor_flags(number: RawFd) -> io::Result<c_int> {
    // SAFETY: it looks up a number in the process's table, whatever the number, and touches no memory.
    match unsafe { libc::fcntl(number, libc::F_GETFD) } {
        -1 => Err(io::Error::last_os_error()),
        flags => Ok(flags),
    }
}

/// Puts `/dev/null` in the place of every standard stream that is the same file as `fd`: who starts a server on a
/// connected socket often gives it as several of them.
fn release_standard_streams(fd: BorrowedFd<'_>) -> io::Result<()> {
    let same = |stream: BorrowedFd<'_>| -> io::Result<bool> {
        let (one, other) = (rustix::fs::fstat(fd)?, rustix::fs::fstat(stream)?);
        Ok((one.st_dev, one.st_ino) == (other.st_dev, other.st_ino))
    };
    // A stream that is closed is not the same.
    let same = |stream| same(stream).unwrap_or(false);
    let nothing = || File::options().read(true).write(true).open("/dev/null");
    if same(rustix::stdio::stdin()) {
        rustix::stdio::dup2_stdin(nothing()?)?;
    }
    if same(rustix::stdio::stdout()) {
        rustix::stdio::dup2_stdout(nothing()?)?;
    }
    if same(rustix::stdio::stderr()) {
        rustix::stdio::dup2_stderr(nothing()?)?;
    }
    Ok(())
}

/// Removes variables from the environment, so that no child takes for its own what was meant for this process. Returns
/// whether it could: not once there are several threads.
pub(crate) fn remove_variables(names: &[&str]) -> bool {
    let alone = std::fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() == 1);
    if alone {
        for name in names {
            // SAFETY: no other thread is there that could read the environment at the same time, and only this one
            // could start one.
            unsafe { std::env::remove_var(name) };
        }
    }
    alone
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn what_this_process_has_opened_is_not_given_away() {
        let file = File::open("/dev/null").unwrap();
        assert_eq!(take(file.as_raw_fd()).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(take(-1).unwrap_err().raw_os_error(), Some(libc::EBADF));
        assert_eq!(take(1_000_000).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn what_it_was_started_with_is_taken_once() {
        let file = File::open("/dev/null").unwrap();
        // As one that was inherited: without the flag, and nobody's.
        let inherited = rustix::io::dup(&file).unwrap();
        let number = std::os::fd::IntoRawFd::into_raw_fd(inherited);
        let taken = take(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        assert_eq!(take(number).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn the_environment_is_left_alone_when_there_are_threads() {
        // The test runner has at least two: its own and this one.
        assert!(!remove_variables(&["PATH"]));
        assert!(std::env::var_os("PATH").is_some());
    }
}
