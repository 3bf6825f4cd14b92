//! Processes that are copies of this one, and never come back from what they are to do.

use std::fmt::Display;
use std::io::{self, Read, Write};

use rustix::process::{Pid, Signal, WaitOptions};

use crate::error::{Error, ErrorKind, Result};
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
pub(super) fn start<E: Display>(body: impl FnOnce() -> Result<(), E>) -> io::Result<Pid> {
    start_alone(|| {
        end_with_parent().map_err(|error| error.to_string())?;
        body().map_err(|error| error.to_string())
    })
}

/// As [`start`], but the copy may outlive its parent.
///
/// # Errors
/// What `fork(2)` says.
pub(super) fn start_alone<E: Display>(body: impl FnOnce() -> Result<(), E>) -> io::Result<Pid> {
    match sys::process::fork()? {
        Some(pid) => Ok(pid),
        None => carry_out(body),
    }
}

/// Has a copy of this process do `body`, and waits for it.
///
/// # Errors
/// What `body` said, or that it could not be done.
pub(super) fn call(body: impl FnOnce() -> Result<()>) -> Result<()> {
    let failed = |error| Error::io("Cannot start a process", error);
    let (mut said, say) = io::pipe().map_err(failed)?;
    let child = start(move || {
        let mut say = say;
        if let Err(error) = body() {
            let _ = write!(say, "{error}");
        }
        io::Result::Ok(())
    })
    .map_err(failed)?;
    let mut text = String::new();
    let heard = said.read_to_string(&mut text);
    let status = rustix::process::waitpid(Some(child), WaitOptions::empty());
    heard.map_err(failed)?;
    let fine = matches!(status, Ok(Some((_, status))) if status.exit_status() == Some(0));
    match text.is_empty() {
        true if fine => Ok(()),
        true => Err(Error::new(ErrorKind::Io, "A process that makes the private root has died")),
        false => Err(Error::new(ErrorKind::Io, text)),
    }
}

/// As [`start`], but the copy is a child of this process's parent, and ends with that.
///
/// # Errors
/// What `clone(2)` says.
pub(super) fn start_sibling<E: Display>(body: impl FnOnce() -> Result<(), E>) -> io::Result<Pid> {
    match sys::process::fork_sibling()? {
        Some(pid) => Ok(pid),
        None => carry_out(|| {
            end_with_parent().map_err(|error| error.to_string())?;
            body().map_err(|error| error.to_string())
        }),
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

/// From now on this process is killed when its parent ends. Changing users undoes it. A parent that has ended already is
/// noticed by the descriptors that it no longer holds.
///
/// # Errors
/// What the system says.
pub(super) fn end_with_parent() -> io::Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?)
}
