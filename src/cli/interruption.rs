//! Signals that end a command which must not leave something half done behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use memdev::sys::process::is_ignored;
use memdev::{Error, ErrorKind, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{flag, low_level};

/// A signal that ends the command, in good order: the second one at once.
pub(super) struct Interruption(Arc<AtomicUsize>);

impl Interruption {
    pub(super) fn watch() -> Result<Self> {
        let failed = |error| Error::io("Cannot watch for signals", error);
        let (which, came) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            if is_ignored(signal) {
                continue;
            }
            flag::register_conditional_default(signal, Arc::clone(&came)).map_err(failed)?;
            flag::register(signal, Arc::clone(&came)).map_err(failed)?;
            let number = usize::try_from(signal).unwrap_or(0);
            flag::register_usize(signal, Arc::clone(&which), number).map_err(failed)?;
        }
        Ok(Self(which))
    }

    pub(super) fn check(&self) -> Result<()> {
        match self.0.load(Ordering::Relaxed) {
            0 => Ok(()),
            _ => Err(Error::new(ErrorKind::Shutdown, "Interrupted")),
        }
    }

    /// Ends the process by the signal that came, if one did, so that its parent sees the truth.
    pub(super) fn pass_on(&self) {
        if let Ok(signal @ 1..) = i32::try_from(self.0.load(Ordering::Relaxed)) {
            // It does not come back; if it did, the error would be said.
            let _ = low_level::emulate_default_handler(signal);
        }
    }
}
