//! The signals that end the server: the first in good order, the second at once.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;

use crossbeam::channel::{Receiver, bounded, select};
use memdev::sys::process::is_ignored;
use memdev::{Error, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::iterator::Signals;
use signal_hook::low_level::signal_name;

/// The signals are caught.
pub(super) struct Caught(Signals);

/// Waits for the signal to stop.
pub(super) struct StopSignal(Receiver<&'static str>);

impl Caught {
    /// From now on SIGTERM, SIGINT and SIGHUP no longer kill: the first is told by [`StopSignal::wait`], however early
    /// it came, the second kills, for whoever does not want to wait any longer.
    ///
    /// # Errors
    /// The system has no descriptor for it.
    pub(super) fn watch() -> Result<Self> {
        let failed = |error| Error::io("Cannot watch for signals", error);
        let mut watched = vec![SIGTERM, SIGINT];
        // Without a terminal, a hang-up is an end like any other, that must leave no socket behind; but not when it is
        // ignored: that is how nohup keeps a server running.
        if !is_ignored(SIGHUP) {
            watched.push(SIGHUP);
        }
        let came = Arc::new(AtomicBool::new(false));
        for &signal in &watched {
            // In this order: the first signal finds the flag down and raises it. The second finds it up, and ends the
            // process as if the signal had never been watched, so that its parent sees the truth.
            flag::register_conditional_default(signal, Arc::clone(&came)).map_err(failed)?;
            flag::register(signal, Arc::clone(&came)).map_err(failed)?;
        }
        Ok(Self(Signals::new(watched).map_err(failed)?))
    }

    /// Starts the thread that waits for the first. Not before the main thread has entered its confinement, which a thread
    /// that is there already would not be in.
    ///
    /// # Errors
    /// The system has no thread for it.
    pub(super) fn listen(self) -> Result<StopSignal> {
        let (sender, receiver) = bounded(1);
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                let Self(mut signals) = self;
                // The iterator ends when it is closed, which nobody does.
                let first = signals.forever().next();
                // The receiver is gone only when the server is about to end anyway.
                let _ = sender.send(first.and_then(signal_name).unwrap_or("a signal"));
            })
            .map_err(|error| Error::io("Cannot watch for signals", error))?;
        Ok(StopSignal(receiver))
    }
}

impl StopSignal {
    /// Blocks until the first signal, or until there is nothing to do any more; says which it was.
    pub(super) fn wait(&self, over: &Receiver<()>) -> &'static str {
        select! {
            // It fails only if the thread panicked: then it is time to stop, too.
            recv(self.0) -> signal => signal.unwrap_or("a failure of the signal thread"),
            recv(over) -> _ => "the end of its last connection",
        }
    }
}
