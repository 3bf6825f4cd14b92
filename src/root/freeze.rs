//! A file system that stands still for an instant: what has been written is on its disk, and nothing is written.
//!
//! Whoever freezes it can die, and a file system that stays frozen holds up everybody in it, whom not even SIGKILL ends
//! then. So two processes do it together: a watchdog, which is nobody's child and hears no signal, freezes and thaws; whoever
//! needs it frozen tells it when. If one of them dies, or takes too long, the other thaws.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions};
use serde_json::json;

use super::child;
use super::signals::Signals;
use crate::attach::control;
use crate::error::{Error, ErrorKind, Result};
use crate::sys;

/// For how long a file system may be frozen.
const AT_MOST: Duration = Duration::from_secs(10);

/// How long somebody else may have it frozen.
const PATIENCE: Duration = Duration::from_secs(20);

/// The root directory of the process `pid`, to freeze its file system by.
///
/// # Errors
/// What the system says.
pub(super) fn root_of(pid: u32) -> Result<OwnedFd> {
    let root = File::open(format!("/proc/{pid}/root"));
    root.map(OwnedFd::from).map_err(|error| Error::io("Cannot open the session's root", error))
}

/// Does `act` while the file system of `root` is frozen.
///
/// # Errors
/// It cannot be frozen, or has not stayed so; what `act` says.
pub(super) fn while_frozen(
    root: &OwnedFd,
    signals: &Signals,
    act: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let failed = |error| Error::io("Cannot freeze the session's file system", error);
    let (ours, theirs) = control::pair().map_err(failed)?;
    let watchdog = child::start_alone(|| {
        signals.forget();
        watch(root, &theirs)
    })
    .map_err(failed)?;
    drop(theirs);
    let died = || Error::new(ErrorKind::Io, "Who freezes the session's file system has died");
    let result = (|| {
        let (word, _) = control::receive(ours.as_fd()).map_err(failed)?.ok_or_else(died)?;
        if let Some(error) = control::error_from_json(&word) {
            return Err(error);
        }
        let done = act();
        let told = control::send(ours.as_fd(), &json!({ "thaw": true }), &[]);
        let thawed = told.and_then(|()| control::receive(ours.as_fd())).map_err(failed)?;
        let (word, _) = thawed.ok_or_else(died)?;
        done?;
        control::error_from_json(&word).map_or(Ok(()), Err)
    })();
    let status = rustix::process::waitpid(Some(watchdog), WaitOptions::empty());
    if !matches!(status, Ok(Some((_, status))) if status.exit_status() == Some(0)) {
        // It has not said that it has thawed.
        let _ = sys::freeze::thaw(root.as_fd());
    }
    result
}

/// The watchdog.
fn watch(root: &OwnedFd, channel: &OwnedFd) -> Result<()> {
    let failed = |error| Error::io("Cannot freeze the session's file system", error);
    // Whoever ends a session of processes, or types at a terminal, does not mean this one.
    rustix::process::setsid().map_err(|error| failed(error.into()))?;
    sys::process::block_signals().map_err(failed)?;
    sys::process::keep_only(3, &[root.as_fd(), channel.as_fd()]).map_err(failed)?;
    child::let_go_of_standard().map_err(failed)?;
    let _ = rustix::thread::set_name(c"memdev-freeze");
    let start = Instant::now();
    loop {
        match sys::freeze::freeze(root.as_fd()) {
            Ok(()) => break,
            // Somebody else has it frozen, for an instant.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && start.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => {
                let error = failed(error);
                let _ = control::send(channel.as_fd(), &control::error_to_json(&error), &[]);
                return Ok(());
            }
        }
    }
    let told = control::send(channel.as_fd(), &json!({}), &[]);
    let in_time = told.is_ok() && word_within(channel.as_fd(), AT_MOST);
    let thawed = sys::freeze::thaw(root.as_fd());
    let word = if in_time && thawed.is_ok() {
        json!({})
    } else {
        let why = "The session's file system has not stayed frozen for as long as it had to";
        control::error_to_json(&Error::new(ErrorKind::Io, why).advise("try again"))
    };
    let _ = control::send(channel.as_fd(), &word, &[]);
    Ok(())
}

/// Whether there is a word, and no end, within `time`.
fn word_within(channel: BorrowedFd<'_>, time: Duration) -> bool {
    let start = Instant::now();
    loop {
        let left = Timespec::try_from(time.saturating_sub(start.elapsed())).unwrap_or_default();
        match poll(&mut [PollFd::from_borrowed_fd(channel, PollFlags::IN)], Some(&left)) {
            Ok(0) => return false,
            Ok(_) => return matches!(control::receive(channel), Ok(Some(_))),
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// Has a process thaw what the processes in the namespace of processes `space` (as the kernel shows it) have for a root: where
/// both who had it frozen were killed, and its processes cannot be. That process may have to wait for the very disk that
/// they wait for, and so is not waited for here.
///
/// # Errors
/// What `fork(2)` says.
pub(super) fn thaw_roots(space: &Path, signals: &Signals) -> std::io::Result<Pid> {
    child::start_alone(|| -> std::io::Result<()> {
        signals.forget();
        sys::process::keep_only(3, &[])?;
        child::let_go_of_standard()?;
        thaw_all(space);
        Ok(())
    })
}

fn thaw_all(space: &Path) {
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let process = entry.path();
        if fs::read_link(process.join("ns/pid")).is_ok_and(|own| own == space)
            && let Ok(root) = File::open(process.join("root"))
        {
            let _ = sys::freeze::thaw(root.as_fd());
        }
    }
}
