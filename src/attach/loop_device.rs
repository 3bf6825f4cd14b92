//! Loop devices: made with an attachment's id on them, recognised by it, and taken away again.
//!
//! A device is cleared only by way of a descriptor that has it exclusively: while that is open nobody can give it another
//! file, so that what was recognised is what is cleared.
//!
//! The daemon never has its own device open. It could let the kernel clear the device at its death that way
//! (`LO_FLAGS_AUTOCLEAR`), but the kernel writes back what the device has in its cache when the last who has it open
//! closes it, and would wait for the very process that is dying.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::loop_device as ioctl;

use super::claim::{self, claim, in_use};
use super::device::{Device, mark};
use super::usage;

/// Somebody else can take the free device that the kernel named; but not for ever.
const TRIES: u32 = 1000;

/// What a device is to be.
pub(super) struct Wanted<'a> {
    /// The id that it carries, in its name in the kernel (`lo_file_name`) and in front of its file's.
    pub(super) id: &'a str,
    /// The file that it shows.
    pub(super) file: BorrowedFd<'a>,
    /// Bytes.
    pub(super) block_size: u32,
    /// Whether it refuses writes.
    pub(super) read_only: bool,
    /// Whether it lets go of its file when the last who has it open closes it. To have it do so later ([`release_with_last_user`])
    /// the kernel stops all that is under way, which takes some 10 ms even if there is nothing.
    pub(super) while_used: bool,
}

/// Whether the device is one of the loop driver's.
pub(super) fn is_one(device: &Device) -> bool {
    device.name().strip_prefix("loop").is_some_and(|number| number.parse::<u32>().is_ok())
}

/// Makes `device`, or else one that is free. `announce` is told which before it is made, so that it can be found if this
/// process dies. Gives the device open.
///
/// # Errors
/// `InUse` if `device` is taken; what `announce` or the kernel says.
pub(super) fn make(
    wanted: &Wanted<'_>,
    device: Option<&Device>,
    mut announce: impl FnMut(&Device) -> Result<()>,
) -> Result<(Device, File)> {
    if let Some(device) = device {
        announce(device)?;
        return match configure(wanted, device) {
            Ok(file) => Ok((device.clone(), file)),
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
            Ok(file) => return Ok((device, file)),
            // Somebody else was quicker.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(Error::io("Cannot set up", error).on_path(device.path())),
        }
    }
    Err(Error::new(ErrorKind::InUse, "Every loop device that was free was taken by somebody else"))
}

fn configure(wanted: &Wanted<'_>, device: &Device) -> io::Result<File> {
    let file = File::options().read(true).write(!wanted.read_only).open(device.path())?;
    // Past the cache of the file: the device has one of its own, and a second copy of everything helps nobody.
    let mut flags = ioctl::DIRECT_IO;
    if wanted.read_only {
        flags |= ioctl::READ_ONLY;
    }
    if wanted.while_used {
        flags |= ioctl::AUTOCLEAR;
    }
    ioctl::configure(file.as_fd(), wanted.file, mark(wanted.id).as_bytes(), wanted.block_size, flags)?;
    Ok(file)
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

/// Lets the device show a part of its file only; see [`ioctl::narrow`].
///
/// # Errors
/// What the kernel says.
pub(super) fn narrow(file: &File, offset: u64, length: u64) -> io::Result<()> {
    for _ in 0..TRIES {
        match ioctl::narrow(file.as_fd(), offset, length) {
            // Somebody looks at the new device, as udev does.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            result => return result,
        }
    }
    Err(io::Error::from_raw_os_error(libc::EAGAIN))
}

/// Makes the device let go of its file, if it carries this id, and returns when it has. A device that does not carry it
/// is somebody else's, or free, and is left alone. If it is `served`, what its cache holds is written first.
///
/// # Errors
/// `InUse` if somebody uses it: nothing has changed then.
pub(super) fn clear(device: &Device, id: &str, served: bool) -> Result<()> {
    if !carries(device, id) {
        return Ok(());
    }
    let is_ours = |file: &File| {
        let status = ioctl::status(file.as_fd())?;
        Ok(status.is_some_and(|status| status.name == mark(id).as_bytes()))
    };
    let Some(file) = claim(device, is_ours)? else { return Ok(()) };
    if served {
        claim::sync(&file, device);
    }
    ioctl::clear(file.as_fd()).map_err(|error| Error::io("Cannot detach", error).on_path(device.path()))?;
    drop(file);
    claim::wait_until_gone(device, || !carries(device, id))
}
