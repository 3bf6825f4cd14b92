//! Signals as something that can be waited for together with descriptors.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::SigId;
use signal_hook::low_level;

/// Signals that are caught until this is dropped.
pub(crate) struct Signals {
    came: Vec<(i32, Arc<AtomicBool>)>,
    ids: Vec<SigId>,
    wake: UnixStream,
}

impl Signals {
    /// Catches these signals.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn catch(signals: &[i32]) -> io::Result<Self> {
        let (wake, waker) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        let mut this = Self { came: Vec::new(), ids: Vec::new(), wake };
        for &signal in signals {
            let came = Arc::new(AtomicBool::new(false));
            // In this order: whoever is woken finds the flag.
            this.ids.push(signal_hook::flag::register(signal, Arc::clone(&came))?);
            this.ids.push(low_level::pipe::register(signal, waker.try_clone()?)?);
            this.came.push((signal, came));
        }
        Ok(this)
    }

    /// Those that came since the last call.
    pub(crate) fn take(&self) -> Vec<i32> {
        // Before the flags: what comes after that wakes again.
        while matches!((&self.wake).read(&mut [0; 64]), Ok(1..)) {}
        let came = self.came.iter().filter(|(_, came)| came.swap(false, Ordering::AcqRel));
        came.map(|(signal, _)| *signal).collect()
    }

    /// In a copy of the process that caught them: nothing is done for them any more.
    pub(crate) fn forget(&self) {
        for id in &self.ids {
            low_level::unregister(*id);
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.forget();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    #[test]
    fn a_signal_wakes_and_is_told_once() {
        let signals = Signals::catch(&[signal_hook::consts::SIGUSR2]).unwrap();
        assert!(signals.take().is_empty());
        low_level::raise(signal_hook::consts::SIGUSR2).unwrap();
        poll(&mut [PollFd::new(&signals, PollFlags::IN)], None).unwrap();
        assert_eq!(signals.take(), [signal_hook::consts::SIGUSR2]);
        assert!(signals.take().is_empty());
    }
}
