//! Scatter and gather: vectored socket calls over memory that Rust may, and may not, look at.
//!
//! # Safety
//!
//! Keeps invariants 1 and 3 of the [parent](super): spans are made from slices, from arena slots or from a base
//! mapping, always with the lifetime of their source, and are handed to the kernel only.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The most spans that one call takes (`IOV_MAX` of Linux).
pub const MAX_SPANS: usize = 1024;

/// Memory that the kernel will read: its address and length, never its bytes.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct KernelSpan<'a> {
    raw: libc::iovec,
    source: PhantomData<&'a [u8]>,
}

impl<'a> KernelSpan<'a> {
    /// A span over ordinary bytes.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self::from_raw(bytes.as_ptr(), bytes.len())
    }

    /// A span over `len` bytes at `start`, which the caller (in `sys`) has tied to `'a`.
    pub(super) fn from_raw(start: *const u8, len: usize) -> Self {
        // The kernel only reads through it; `iovec` has no const form.
        let raw = libc::iovec { iov_base: start.cast_mut().cast(), iov_len: len };
        Self { raw, source: PhantomData }
    }

    /// Bytes in the span.
    #[must_use]
    pub fn len(&self) -> usize {
        self.raw.iov_len
    }

    /// Whether the span has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The span without its first `count` bytes.
    ///
    /// # Panics
    /// If the span is shorter than that.
    #[must_use]
    pub fn skip(&self, count: usize) -> Self {
        assert!(count <= self.len(), "skipping past the end of a span");
        Self::from_raw(self.raw.iov_base.cast::<u8>().wrapping_add(count), self.len() - count)
    }
}

/// Memory that the kernel will write, borrowed exclusively.
#[repr(transparent)]
pub struct KernelSpanMut<'a> {
    raw: libc::iovec,
    source: PhantomData<&'a mut [u8]>,
}

impl<'a> KernelSpanMut<'a> {
    /// A span over bytes that the caller owns for `'a`.
    #[must_use]
    pub fn new(bytes: &'a mut [u8]) -> Self {
        let raw = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        Self { raw, source: PhantomData }
    }

    /// Bytes in the span.
    #[must_use]
    pub fn len(&self) -> usize {
        self.raw.iov_len
    }

    /// Whether the span has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn message(spans: *const libc::iovec, count: usize) -> libc::msghdr {
    // SAFETY: `msghdr` is plain old data of the C library, for which all zeroes means "no name, no control data".
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = spans.cast_mut();
    // The field's type differs between C libraries; the count is at most MAX_SPANS.
    #[allow(clippy::useless_conversion)]
    {
        header.msg_iovlen = count.min(MAX_SPANS).try_into().unwrap_or_default();
    }
    header
}

fn result(returned: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

/// Sends the spans, in order, as far as the socket takes them now; returns the bytes sent.
///
/// At most [`MAX_SPANS`] spans are looked at.
///
/// # Errors
/// `WouldBlock` when the socket takes nothing now; `EFAULT` when the first byte that was left is in a page of a base
/// mapping that cannot be read; else what `sendmsg(2)` says. Never raises `SIGPIPE`.
pub fn send(socket: BorrowedFd<'_>, spans: &[KernelSpan<'_>]) -> io::Result<usize> {
    let header = message(spans.as_ptr().cast(), spans.len());
    // SAFETY: `KernelSpan` is a transparent `iovec` and `spans` outlives the call, so the header describes
    // `spans.len()` valid vectors. What they point to is only read by the kernel, which checks every page itself.
    result(unsafe {
        libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    })
}

/// Receives into the spans, in order, what has arrived; returns the bytes received, 0 at the end of the stream.
///
/// # Errors
/// `WouldBlock` when nothing has arrived; else what `recvmsg(2)` says.
pub fn receive(socket: BorrowedFd<'_>, spans: &mut [KernelSpanMut<'_>]) -> io::Result<usize> {
    // Most receives are into one, for which the kernel need not be given a list.
    if let [KernelSpanMut { raw, .. }] = spans {
        // SAFETY: the span is memory that its lifetime borrows exclusively, and which outlives the call.
        return result(unsafe {
            libc::recv(socket.as_raw_fd(), raw.iov_base, raw.iov_len, libc::MSG_DONTWAIT)
        });
    }
    let mut header = message(spans.as_mut_ptr().cast::<libc::iovec>(), spans.len());
    // SAFETY: each span is a transparent `iovec` over memory that its lifetime borrows exclusively, and both the
    // vectors and that memory outlive the call.
    result(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn what_is_gathered_is_scattered_again() {
        let (a, b) = UnixStream::pair().unwrap();
        let sent = send(a.as_fd(), &[KernelSpan::new(b"one"), KernelSpan::new(b"-two").skip(1)]).unwrap();
        assert_eq!(sent, 6);
        let (mut head, mut tail) = ([0; 2], [0; 8]);
        let got =
            receive(b.as_fd(), &mut [KernelSpanMut::new(&mut head), KernelSpanMut::new(&mut tail)]).unwrap();
        assert_eq!((got, &head, &tail[..4]), (6, b"on", &b"etwo"[..]));
        assert_eq!(receive(b.as_fd(), &mut []).unwrap_or(0), 0);
    }

    #[test]
    fn an_empty_socket_would_block_and_a_closed_one_ends() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut buffer = [0; 4];
        let error = receive(b.as_fd(), &mut [KernelSpanMut::new(&mut buffer)]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(a);
        assert_eq!(receive(b.as_fd(), &mut [KernelSpanMut::new(&mut buffer)]).unwrap(), 0);
        let error = send(b.as_fd(), &[KernelSpan::new(b"x")]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
