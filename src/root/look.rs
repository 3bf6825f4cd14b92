//! Looking at what a private root has on its disk, from outside, while it goes on.

use std::fs::File;
use std::path::Path;

use super::enter::find;
use super::record::{sessions, started};
use crate::error::{Error, ErrorKind, Result};
use crate::net::Uri;

/// The session of a server that is the root of the private root called `name`, after the kernel has written to it what it
/// had in its cache.
///
/// # Errors
/// `NotFound` if no private root is called so, `Unsupported` if it is on a session of its own, which no server has; or the
/// kernel cannot write.
pub fn write_back(directory: &Path, name: &str) -> Result<Uri> {
    let session = find(sessions(directory)?, name)?;
    let Ok(uri) = session.source.parse::<Uri>() else {
        let error = Error::new(ErrorKind::Unsupported, "No server has the session that is the root of");
        return Err(error.on(&session.name).advise(
            "start private roots that are to be looked at on a session of a server: memdev run --session URI",
        ));
    };
    let failed = |error| Error::io("Cannot have the kernel write back the root of", error).on(&session.name);
    let root = File::open(format!("/proc/{}/root", session.init)).map_err(failed)?;
    // Only now: numbers of processes come round again, and this one is of the root that was opened if it is still there.
    if started(session.init) != Some(session.init_started) {
        return Err(Error::new(ErrorKind::NotFound, "The private root has just ended:").on(&session.name));
    }
    rustix::fs::syncfs(&root).map_err(|error| failed(error.into()))?;
    Ok(uri)
}
