//! Loop devices: made with an attachment's id on them, recognised by it, and taken away again.
//!
//! A device that carries an id is cleared only by way of a descriptor that has it exclusively (`O_EXCL`): while that is
//! open nobody can mount it, and nobody can give it another file, so that what was recognised is what is cleared.
//!
//! The daemon never has its own device open. It could let the kernel clear the device at its death that way
//! (`LO_FLAGS_AUTOCLEAR`), but the kernel writes back what the device has in its cache when the last who has it open
//! closes it, and would wait for the very process that is dying.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::loop_device as ioctl;

use super::device::Device;
use super::usage;

/// In front of the id, in a loop device's name.
const MARK: &str = "memdev:";

/// Somebody else can take the free device that the kernel named; but not for ever.
const TRIES: u32 = 1000;

/// Programs of udev look at every device that comes or changes: they are not in the way for long.
const PASSERS_BY: Duration = Duration::from_secs(2);

/// What a device is to be.
pub(super) struct Wanted<'a> {
    /// The id that it carries.
    pub(super) id: &'a str,
    /// The file that it shows.
    pub(super) file: BorrowedFd<'a>,
    /// Bytes.
    pub(super) block_size: u32,
    /// Whether it refuses writes.
    pub(super) read_only: bool,
}

/// The name that a device of this id has in the kernel (`lo_file_name`).
pub(super) fn mark(id: &str) -> String {
    format!("{MARK}{id}")
}

/// Makes `device`, or else one that is free. `announce` is told which before it is made, so that it can be found if this
/// process dies.
///
/// # Errors
/// `InUse` if `device` is taken; what `announce` or the kernel says.
pub(super) fn make(
    wanted: &Wanted<'_>,
    device: Option<&Device>,
    mut announce: impl FnMut(&Device) -> Result<()>,
) -> Result<Device> {
    if let Some(device) = device {
        announce(device)?;
        return match configure(wanted, device) {
            Ok(()) => Ok(device.clone()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let users = if device.attribute("loop/backing_file").is_some() {
                    vec!["it has a file already".to_owned()]
                } else {
                    usage::users(device)
                };
                Err(in_use("Cannot attach to", device, &users))
            }
            Err(error) => Err(Error::io("Cannot attach to", error).on_path(device.path())),
        };
    }
    let failed = |error| {
        Error::io("Cannot get a loop device from /dev/loop-control", error)
            .advise("is the kernel's loop driver there?")
    };
    let control = File::options().read(true).write(true).open("/dev/loop-control").map_err(failed)?;
    for _ in 0..TRIES {
        let number = ioctl::next_free(control.as_fd()).map_err(failed)?;
        let device = Device::named(&format!("loop{number}"))
            .ok_or_else(|| Error::new(ErrorKind::Io, "A loop device without a number"))?;
        device.wait_for_node()?;
        announce(&device)?;
        match configure(wanted, &device) {
            Ok(()) => return Ok(device),
            // Somebody else was quicker.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(Error::io("Cannot set up", error).on_path(device.path())),
        }
    }
    Err(Error::new(ErrorKind::InUse, "Every loop device that was free was taken by somebody else"))
}

fn configure(wanted: &Wanted<'_>, device: &Device) -> io::Result<()> {
    let file = File::options().read(true).write(!wanted.read_only).open(device.path())?;
    // Past the cache of the file: the device has one of its own, and a second copy of everything helps nobody.
    let mut flags = ioctl::DIRECT_IO;
    if wanted.read_only {
        flags |= ioctl::READ_ONLY;
    }
    ioctl::configure(file.as_fd(), wanted.file, mark(wanted.id).as_bytes(), wanted.block_size, flags)
}

/// Whether the device carries this id, by what the kernel shows without the device's being opened: the name of its file,
/// which begins with the mark.
pub(super) fn carries(device: &Device, id: &str) -> bool {
    let file = device.attribute("loop/backing_file").unwrap_or_default();
    file.trim_start_matches('/').starts_with(&mark(id))
}

/// From now on the device lets go of its file when the last who has it open closes it: `file`, or somebody after it.
///
/// # Errors
/// What the kernel says.
pub(super) fn release_with_last_user(file: &File) -> io::Result<()> {
    ioctl::release_with_last_user(file.as_fd())
}

/// Makes the device let go of its file, if it carries this id, and returns when it has. A device that does not carry it
/// is somebody else's, or free, and is left alone.
///
/// # Errors
/// `InUse` if somebody uses it: nothing has changed then.
pub(super) fn clear(device: &Device, id: &str) -> Result<()> {
    if !carries(device, id) {
        return Ok(());
    }
    let failed = |error| Error::io("Cannot detach", error).on_path(device.path());
    let start = Instant::now();
    let file = loop {
        match open_exclusively(&device.path()) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && start.elapsed() > PASSERS_BY => {
                return Err(in_use("Cannot detach", device, &usage::users(device)));
            }
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let users = usage::users(device);
                if !users.is_empty() {
                    return Err(in_use("Cannot detach", device, &users));
                }
                // Nobody who can be seen: somebody who just went, or who looks at it for a moment.
                std::thread::sleep(Duration::from_millis(10));
            }
            result => break result.map_err(failed)?,
        }
    };
    let ours = |status: &ioctl::Status| status.name == mark(id).as_bytes();
    if !ioctl::status(file.as_fd()).map_err(failed)?.as_ref().is_some_and(ours) {
        return Ok(());
    }
    // Exclusive or not: whoever has it open would lose it under their hands.
    let own = format!("process {} ", std::process::id());
    loop {
        let others: Vec<_> =
            usage::users(device).into_iter().filter(|user| !user.starts_with(&own)).collect();
        if others.is_empty() {
            break;
        }
        if start.elapsed() > PASSERS_BY {
            return Err(in_use("Cannot detach", device, &others));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    // The last close writes back what is in the device's cache, too, but tells nobody when that fails.
    if let Err(error) = file.sync_all() {
        tracing::warn!(%error, device = device.name(), "Some of what was written to the device is lost");
    }
    ioctl::clear(file.as_fd()).map_err(failed)?;
    drop(file);
    // If somebody opened it just now, it goes when they close it.
    while carries(device, id) {
        if start.elapsed() > PASSERS_BY * 2 {
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
