//! A device that is to be taken away is claimed first, so that nobody can begin to use it.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};

use super::device::Device;
use super::usage;

/// Programs of udev look at every device that comes or changes: they are not in the way for long.
pub(super) const PASSERS_BY: Duration = Duration::from_secs(2);

/// Opens the device so that nobody can mount it or set it up anew (`O_EXCL`), if `is_ours` says so of the open device, and
/// nobody else has it open. `None` if it is not ours.
///
/// # Errors
/// `InUse` if somebody uses it; what the system or `is_ours` says.
pub(super) fn claim(
    device: &Device,
    is_ours: impl FnOnce(&File) -> io::Result<bool>,
) -> Result<Option<File>> {
    let failed = |error| Error::io("Cannot detach", error).on_path(device.path());
    let start = Instant::now();
    let file = loop {
        match open_exclusively(&device.path()) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let users = usage::users(device);
                if !users.is_empty() || start.elapsed() > PASSERS_BY {
                    return Err(in_use("Cannot detach", device, &users));
                }
                // Nobody who can be seen: somebody who just went.
                std::thread::sleep(Duration::from_millis(10));
            }
            result => break result.map_err(failed)?,
        }
    };
    if !is_ours(&file).map_err(failed)? {
        return Ok(None);
    }
    // Exclusive or not: whoever has it open would lose it under their hands.
    let own = format!("process {} ", std::process::id());
    loop {
        let others: Vec<_> =
            usage::users(device).into_iter().filter(|user| !user.starts_with(&own)).collect();
        if others.is_empty() {
            return Ok(Some(file));
        }
        if start.elapsed() > PASSERS_BY {
            return Err(in_use("Cannot detach", device, &others));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Writes back what a claimed device has in its cache. Its last close does that too, but tells nobody when it fails.
pub(super) fn sync(file: &File, device: &Device) {
    if let Err(error) = file.sync_all() {
        tracing::warn!(%error, device = device.name(), "Some of what was written to the device is lost");
    }
}

/// Waits until `is_gone`: somebody may have opened the device in the last moment, and then it goes when they close it.
pub(super) fn wait_until_gone(device: &Device, is_gone: impl Fn() -> bool) -> Result<()> {
    let start = Instant::now();
    while !is_gone() {
        if start.elapsed() > 2 * PASSERS_BY {
            return Err(in_use("Waited in vain for the kernel to let go of", device, &usage::users(device)));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn open_exclusively(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_EXCL).open(path)
}

/// The error that says who is in the way.
pub(super) fn in_use(what: &str, device: &Device, users: &[String]) -> Error {
    let who = match users {
        [] => "somebody who cannot be seen from here has claimed it".to_owned(),
        users => users.join(", "),
    };
    Error::new(ErrorKind::InUse, format!("{what} {}, which is in use: {who}", device.path().display()))
        .advise("unmount it and end what uses it first")
}
