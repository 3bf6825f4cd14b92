//! Who is at the other end of a unix socket (`SO_PEERCRED`).
//!
//! rustix wraps this call, but with a process id that cannot be 0. The kernel says 0 for a peer outside this process's
//! pid namespace (a client on the host, a server in a container), which that type cannot hold: such a peer would come out
//! as an error made of its uid.
//!
//! # Safety
//! One call of `getsockopt` that writes a plain `ucred` of this function's own.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The peer as it was when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Credentials {
    /// Process id, 0 if it is not visible from here.
    pub(crate) pid: u32,
    /// Effective user id.
    pub(crate) uid: u32,
}

/// The credentials of the process that connected the unix socket `fd`.
///
/// # Errors
/// What `getsockopt` says: `fd` is no socket, or none that knows its peer.
pub(crate) fn credentials(fd: BorrowedFd<'_>) -> io::Result<Credentials> {
    let mut ucred = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length =
        libc::socklen_t::try_from(mem::size_of::<libc::ucred>()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: `ucred` and `length` outlive the call, `length` is the size of `ucred`, which the kernel does not write
    // beyond, and every bit pattern is a valid `ucred`.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut ucred).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Credentials { pid: u32::try_from(ucred.pid).unwrap_or(0), uid: ucred.uid })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_socket_pair_was_made_by_this_very_process() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = credentials(one.as_fd()).unwrap();
        assert_eq!(peer.pid, std::process::id());
        assert_eq!(peer.uid, rustix::process::getuid().as_raw());
    }

    #[test]
    fn what_is_no_socket_has_no_peer() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(credentials(file.as_fd()).is_err());
    }
}
