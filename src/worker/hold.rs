//! Input of a doubtful connection: read on, but not acted on, until it is known whether its client is still there.
//!
//! What a client that is gone has sent arrives first, and that it is gone behind that. So everything that is there is
//! read and kept; if the end comes, or a reset, nothing of it ever happened. If nothing more comes for a while, or more
//! than sockets can hold, the client is there and what was kept is acted on.

use crate::limits::{HELD_BYTES, HELD_BYTES_OF_ALL};
use crate::sys::{self, KernelSpanMut};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// How long to wait for the end to come behind the last byte: far longer than a local network takes to deliver it.
pub(super) const GRACE: Duration = Duration::from_millis(20);

/// What was read and not acted on.
#[derive(Debug)]
pub(super) struct Hold {
    bytes: Zeroizing<Vec<u8>>,
    used: usize,
    until: Instant,
    /// What all connections keep.
    of_all: Arc<AtomicUsize>,
}

/// What is known of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    There,
    Gone,
    Unknown,
}

impl Hold {
    pub(super) fn new(of_all: Arc<AtomicUsize>) -> Self {
        Self { bytes: Zeroizing::default(), used: 0, until: Instant::now() + GRACE, of_all }
    }

    /// A doubt begins: the wait for the end does, too.
    pub(super) fn renew(&mut self) {
        self.until = Instant::now() + GRACE;
    }

    /// Reads what is there.
    pub(super) fn read_on(&mut self, socket: BorrowedFd<'_>) -> Verdict {
        let mut buffer = Zeroizing::new([0; 16 << 10]);
        loop {
            match sys::receive(socket, &mut [KernelSpanMut::new(&mut buffer[..])]) {
                Ok(0) => return Verdict::Gone,
                Ok(count) => {
                    self.bytes.extend_from_slice(&buffer[..count]);
                    if self.of_all.fetch_add(count, Ordering::Relaxed) > HELD_BYTES_OF_ALL {
                        return Verdict::Gone;
                    }
                    if self.bytes.len() > HELD_BYTES {
                        return Verdict::There;
                    }
                    self.renew();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Verdict::Gone,
            }
        }
        if Instant::now() < self.until { Verdict::Unknown } else { Verdict::There }
    }

    /// Moves bytes to the front of `buffer`; returns how many.
    pub(super) fn give(&mut self, buffer: &mut [u8]) -> usize {
        let left = &self.bytes[self.used..];
        let count = left.len().min(buffer.len());
        buffer[..count].copy_from_slice(&left[..count]);
        self.used += count;
        count
    }

    /// Whether everything was given.
    pub(super) fn is_spent(&self) -> bool {
        self.used == self.bytes.len()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.of_all.fetch_sub(self.bytes.len(), Ordering::Relaxed);
    }
}
