//! What processes have in memory is not written to core files, nor handed to a program of the host's that collects them.
//!
//! A limit of 0 for core files keeps the kernel from writing one, but not from handing it to a program, if `core_pattern` names
//! one: that is run whatever the limit is. Unless the limit is 1, by which the kernel knows a program that collects cores; and a file
//! of one byte is not written either. So it is 1, for good. A process that sets it to 0 itself has that program run, and so it is
//! settled besides that a core file has none of the memory in it: how a process began and where it was, no more. Both are
//! inherited by everything that a process starts.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::confine;
use crate::error::{Error, Result};

/// From now on there is no core file of this process, nor of what it starts.
///
/// # Errors
/// What the kernel says.
pub(super) fn none() -> Result<()> {
    let failed = |error: io::Error| Error::io("Cannot keep processes from leaving core files", error);
    // Who may not raise it has 0 still.
    let limit = getrlimit(Resource::Core).maximum.map_or(1, |maximum| maximum.min(1));
    let limit = Some(limit);
    setrlimit(Resource::Core, Rlimit { current: limit, maximum: limit })
        .map_err(|error| failed(error.into()))?;
    match confine::empty_cores() {
        // A kernel without core files.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(failed),
    }
}
