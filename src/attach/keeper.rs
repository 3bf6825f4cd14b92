//! A device that is kept while it is used, as its maker sees it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;

use super::control;

/// Looks after a device, or a file, until it has gone. Its daemon may have others to serve, which are forks of it, or of
/// which it is one. When this is dropped before, everything that is asked of the device fails from then on.
#[derive(Debug)]
pub struct Keeper {
    /// The daemon, if it is this process's child.
    child: Option<Child>,
    process: OwnedFd,
    channel: OwnedFd,
}

impl Keeper {
    pub(super) fn new(child: Option<Child>, process: OwnedFd, channel: OwnedFd) -> Self {
        Self { child, process, channel }
    }

    /// Readable when the device is not served any more: it has gone, or its daemon has.
    #[must_use]
    pub fn watch(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// Whether that comes within this time.
    #[must_use]
    pub fn is_over_within(&self, time: Duration) -> bool {
        readable(self.channel.as_fd(), time)
    }

    /// From now on everything that is asked of the device fails. A daemon that does not answer does not hear of it.
    pub fn give_up(&self) {
        let _ = rustix::net::shutdown(&self.channel, rustix::net::Shutdown::Write);
    }

    /// Kills the daemon, and with it whatever else it serves.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.process, Signal::KILL);
    }

    /// Waits until the device is over, and until its daemon has ended, unless that has others to serve. Whether it was in
    /// order.
    ///
    /// # Errors
    /// What the system says.
    pub fn wait(mut self) -> io::Result<bool> {
        let word = control::receive(self.channel.as_fd())?;
        // Without a word it has died.
        let (in_order, last) = word.map_or((false, true), |(word, _)| (true, word["last"] == true));
        if last {
            while !readable(self.process.as_fd(), Duration::from_secs(60)) {}
            if let Some(child) = &mut self.child {
                return Ok(child.wait()?.success() && in_order);
            }
        }
        Ok(in_order)
    }
}

/// Whether there is something to be read, or an end, within `time`.
fn readable(fd: BorrowedFd<'_>, time: Duration) -> bool {
    let start = Instant::now();
    loop {
        let left = Timespec::try_from(time.saturating_sub(start.elapsed())).unwrap_or_default();
        match poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&left)) {
            Ok(count) => return count > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}
