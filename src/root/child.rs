//! Processes that are copies of this one, and never come back from what they are to do.

use std::fmt::Display;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, WaitOptions};
use serde_json::Value;

use super::talk;
use crate::attach::control;
use crate::error::{Error, ErrorKind, Result, plain};
use crate::sys;

/// The exit status of a child that failed before it could tell anybody why.
const FAILED: u8 = 125;

/// A copy of this process must never return into what the original does; not by a panic either.
struct NeverReturns;

impl Drop for NeverReturns {
    fn drop(&mut self) {
        sys::process::exit_now(FAILED);
    }
}

/// Starts a copy of this process that does `body`, and ends; at once when its parent's thread ends.
///
/// # Errors
/// What `fork(2)` says.
pub(crate) fn start<E: Display>(body: impl FnOnce() -> Result<(), E>) -> io::Result<Pid> {
    let parent = rustix::process::getpid();
    start_alone(|| end_with(Some(parent)).and_then(|()| body().map_err(|error| error.to_string())))
}

/// As [`start`], but the copy may outlive its parent.
///
/// # Errors
/// What `fork(2)` says.
pub(crate) fn start_alone<E: Display>(body: impl FnOnce() -> Result<(), E>) -> io::Result<Pid> {
    match sys::process::fork()? {
        Some(pid) => Ok(pid),
        None => carry_out(body),
    }
}

/// Has a copy of this process do `body`, and waits for what that opened.
///
/// # Errors
/// What `body` said, or that it could not be done.
pub(crate) fn call(body: impl FnOnce() -> Result<Vec<OwnedFd>>) -> Result<Vec<OwnedFd>> {
    let failed = |error| Error::io("Cannot start a process", error);
    let (ours, theirs) = control::pair().map_err(failed)?;
    let child = start(|| talk::answer(theirs.as_fd(), body().map(|opened| (Value::Null, opened))));
    let child = child.map_err(failed)?;
    drop(theirs);
    let heard = control::receive(ours.as_fd()).map_err(failed);
    let _ = rustix::process::waitpid(Some(child), WaitOptions::empty());
    let died = || Error::new(ErrorKind::Io, "A process that makes the private root has died");
    let (told, opened) = heard?.ok_or_else(died)?;
    control::error_from_json(&told).map_or(Ok(opened), Err)
}

/// As [`start`], but the copy is a child of this process's parent, and ends with that.
///
/// # Errors
/// What `clone(2)` says.
pub(crate) fn start_sibling<E: Display>(body: impl FnOnce() -> Result<(), E>) -> io::Result<Pid> {
    let parent = rustix::process::getppid();
    match sys::process::fork_sibling()? {
        Some(pid) => Ok(pid),
        None => carry_out(|| end_with(parent).and_then(|()| body().map_err(|error| error.to_string()))),
    }
}

/// As [`start_sibling`], but in the control group `group` from its beginning on, if the kernel can do that: `body` is told
/// whether it is.
///
/// # Errors
/// What `clone(2)` says.
pub(crate) fn start_sibling_in<E: Display>(
    group: Option<BorrowedFd<'_>>,
    body: impl FnOnce(bool) -> Result<(), E>,
) -> io::Result<Pid> {
    let parent = rustix::process::getppid();
    match group.map(sys::process::fork_sibling_in) {
        Some(Ok(Some(pid))) => Ok(pid),
        Some(Ok(None)) => {
            carry_out(|| end_with(parent).and_then(|()| body(true).map_err(|error| error.to_string())))
        }
        None | Some(Err(_)) => start_sibling(|| body(false)),
    }
}

/// [`end_with_parent`], for a copy that has just begun: its `parent` may have ended before that was asked for, which nobody
/// tells it then. One that is in another namespace of processes is not known by number.
fn end_with(parent: Option<Pid>) -> Result<(), String> {
    end_with_parent().map_err(|error| plain(&error))?;
    match rustix::process::getppid() {
        found if found.is_none() || found == parent => Ok(()),
        _ => Err("its parent has ended".to_owned()),
    }
}

fn carry_out<E: Display>(body: impl FnOnce() -> Result<(), E>) -> ! {
    let _never = NeverReturns;
    let status = match body() {
        Ok(()) => 0,
        Err(error) => {
            tracing::debug!(%error, "A process of the private root failed");
            FAILED
        }
    };
    sys::process::exit_now(status)
}

/// Lets go of standard input, output and error: they are somebody's who waits for their end.
///
/// # Errors
/// What the system says.
pub(crate) fn let_go_of_standard() -> io::Result<()> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(rustix::stdio::dup2_stderr(&null)?)
}

/// From now on this process is killed when its parent ends. Changing users undoes it. A parent that has ended by then is
/// noticed by the descriptors that it no longer holds.
///
/// # Errors
/// What the system says.
pub(crate) fn end_with_parent() -> io::Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?)
}
