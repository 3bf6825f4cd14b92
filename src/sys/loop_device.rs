//! The ioctls of loop devices (`loop(4)`), which no crate wraps as a whole: `LOOP_CONFIGURE` sets backing file, flags and
//! block size in one step, so that nobody ever sees a device that is half made.
//!
//! # Safety
//! Every call hands the kernel a structure of this file's own, of the size and layout of `linux/loop.h`, that outlives
//! the call; the kernel writes nothing beyond it, and every bit pattern of it is valid.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
const LOOP_SET_STATUS64: libc::Ioctl = 0x4C04;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;

/// The device is read-only.
pub(crate) const READ_ONLY: u32 = 1;
/// The device lets go of its file when the last who has it open closes it.
pub(crate) const AUTOCLEAR: u32 = 4;
/// Requests go past the page cache of the file behind it.
pub(crate) const DIRECT_IO: u32 = 16;

/// The longest [`Status::name`], in bytes: the field has 64, one of which ends the string.
pub(crate) const NAME_MAX: usize = 63;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const EMPTY: Info = Info {
    device: 0,
    inode: 0,
    rdevice: 0,
    offset: 0,
    size_limit: 0,
    number: 0,
    encrypt_type: 0,
    encrypt_key_size: 0,
    flags: 0,
    file_name: [0; 64],
    crypt_name: [0; 64],
    encrypt_key: [0; 32],
    init: [0; 2],
};

/// What a loop device that has a file says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    /// What whoever configured it called its file; at most [`NAME_MAX`] bytes.
    pub(crate) name: Vec<u8>,
    /// [`READ_ONLY`], [`AUTOCLEAR`], [`DIRECT_IO`] and others.
    pub(crate) flags: u32,
}

fn outcome(returned: libc::c_int) -> io::Result<u32> {
    u32::try_from(returned).map_err(|_| io::Error::last_os_error())
}

/// The number of a device that has no file at the moment; somebody else may take it before you do.
///
/// # Errors
/// What the kernel says; `control` is `/dev/loop-control`.
pub(crate) fn next_free(control: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: this request has no argument, so that no memory is looked at.
    outcome(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) })
}

/// Gives a device its file, its name (cut to [`NAME_MAX`] bytes), logical block size in bytes and flags.
///
/// # Errors
/// `EBUSY` if the device has a file already or somebody has claimed it, and what else the kernel says.
pub(crate) fn configure(
    device: BorrowedFd<'_>,
    file: BorrowedFd<'_>,
    name: &[u8],
    block_size: u32,
    flags: u32,
) -> io::Result<()> {
    let mut info = Info { flags, ..EMPTY };
    let length = name.len().min(NAME_MAX);
    info.file_name[..length].copy_from_slice(&name[..length]);
    let fd = u32::try_from(file.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let config = Config { fd, block_size, info, reserved: [0; 8] };
    // SAFETY: `config` is a `struct loop_config` that outlives the call, which only reads it.
    outcome(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) }).map(drop)
}

/// What the device says about itself; `None` if it has no file.
///
/// # Errors
/// What the kernel says, if `device` is no loop device.
pub(crate) fn status(device: BorrowedFd<'_>) -> io::Result<Option<Status>> {
    let Some(info) = info(device)? else { return Ok(None) };
    let end = info.file_name.iter().position(|&byte| byte == 0).unwrap_or(NAME_MAX);
    Ok(Some(Status { name: info.file_name[..end].to_vec(), flags: info.flags }))
}

fn info(device: BorrowedFd<'_>) -> io::Result<Option<Info>> {
    let mut info = EMPTY;
    // SAFETY: `info` is a `struct loop_info64` that outlives the call, which writes exactly one.
    match outcome(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) }) {
        Ok(_) => Ok(Some(info)),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// From now on the device lets go of its file when the last who has it open closes it.
///
/// # Errors
/// `ENXIO` if it has no file, and what else the kernel says.
pub(crate) fn release_with_last_user(device: BorrowedFd<'_>) -> io::Result<()> {
    let mut info = info(device)?.ok_or_else(|| io::Error::from_raw_os_error(libc::ENXIO))?;
    info.flags |= AUTOCLEAR;
    // SAFETY: `info` is a `struct loop_info64` that outlives the call, which only reads it.
    outcome(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_STATUS64, &raw const info) }).map(drop)
}

/// Lets the device show only `length` bytes of its file, from `offset` on: whole sectors.
///
/// # Errors
/// `ENXIO` if it has no file, `EAGAIN` if what is in its cache is in use at the moment, and what else the kernel says.
pub(crate) fn narrow(device: BorrowedFd<'_>, offset: u64, length: u64) -> io::Result<()> {
    let mut info = info(device)?.ok_or_else(|| io::Error::from_raw_os_error(libc::ENXIO))?;
    (info.offset, info.size_limit) = (offset, length);
    // SAFETY: `info` is a `struct loop_info64` that outlives the call, which only reads it.
    outcome(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_STATUS64, &raw const info) }).map(drop)
}

/// Makes the device let go of its file: when `device` is closed, or, if others have it open, when the last of them
/// closes it.
///
/// # Errors
/// `ENXIO` if it has no file, and what else the kernel says.
pub(crate) fn clear(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: this request has no argument, so that no memory is looked at.
    outcome(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};
    use std::os::fd::AsFd;

    /// The layout of `linux/loop.h`, as a C compiler has it.
    #[test]
    fn structures_are_those_of_the_kernel() {
        assert_eq!((size_of::<Info>(), size_of::<Config>()), (232, 304));
        assert_eq!((offset_of!(Info, flags), offset_of!(Info, file_name)), (52, 56));
        assert_eq!((offset_of!(Info, crypt_name), offset_of!(Info, init)), (120, 216));
        assert_eq!((offset_of!(Config, info), offset_of!(Config, reserved)), (8, 240));
    }

    #[test]
    fn what_is_no_loop_device_is_an_error() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(status(file.as_fd()).is_err());
        assert!(next_free(file.as_fd()).is_err());
        assert!(clear(file.as_fd()).is_err());
        assert!(release_with_last_user(file.as_fd()).is_err());
        assert!(narrow(file.as_fd(), 512, 512).is_err());
        assert!(configure(file.as_fd(), file.as_fd(), b"x", 512, 0).is_err());
    }
}
