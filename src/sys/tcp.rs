//! How the bytes that were sent over TCP get on.
//!
//! # Safety
//! Two calls that write plain numbers to variables of these functions' own, no more than their sizes.

use std::ffi::c_int;
use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, BorrowedFd};

/// What the kernel knows of the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outlook {
    /// Segments on their way that the other end has not acknowledged.
    pub(crate) in_flight: u32,
    /// Questions whether it has room by now that were not answered, since the last answer.
    pub(crate) unanswered_probes: u8,
}

/// Bytes of the TCP socket `fd` that the other end has not acknowledged, sent or not.
///
/// # Errors
/// What `ioctl` says.
pub(crate) fn unacknowledged(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut bytes: c_int = 0;
    // SAFETY: this request writes one `int`, to a variable that outlives the call.
    match unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) } {
        0 => Ok(u64::try_from(bytes).unwrap_or(0)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// How the other end of the TCP socket `fd` does.
///
/// # Errors
/// What `getsockopt` says.
pub(crate) fn outlook(fd: BorrowedFd<'_>) -> io::Result<Outlook> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = libc::socklen_t::try_from(mem::size_of::<libc::tcp_info>())
        .map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: `info` and `length` outlive the call, and `length` is the size of `info`, which the kernel does not write
    // beyond.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was zeroed, the kernel wrote over some of it, and every bit pattern is a valid one.
    let info = unsafe { info.assume_init() };
    Ok(Outlook { in_flight: info.tcpi_unacked, unanswered_probes: info.tcpi_probes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::time::{Duration, Instant};

    fn until(what: &str, mut condition: impl FnMut() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < Duration::from_secs(90), "never {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_peer_without_room_can_be_told_from_one_that_reads() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut reader = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut writer, _) = listener.accept().unwrap();
        assert_eq!(unacknowledged(writer.as_fd()).unwrap(), 0);
        writer.write_all(b"hello").unwrap();
        until("acknowledged", || unacknowledged(writer.as_fd()).unwrap() == 0);

        writer.set_nonblocking(true).unwrap();
        let mut sent = 5;
        while let Ok(count) = writer.write(&[0; 65536]) {
            sent += count;
        }
        until("without room", || outlook(writer.as_fd()).unwrap().in_flight == 0);
        assert!(unacknowledged(writer.as_fd()).unwrap() > 0);

        let mut read = vec![0; sent];
        reader.read_exact(&mut read).unwrap();
        until("acknowledged", || unacknowledged(writer.as_fd()).unwrap() == 0);
    }
}
