//! Attributes of mounts (`mount_setattr(2)`), which no crate at hand wraps.
//!
//! # Safety
//! The kernel reads one `struct mount_attr`, of this file's own, of the size that it is told, that outlives the call.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::mount::MountAttrFlags;

/// The ids of the mount are shifted; `linux/mount.h`.
const IDMAP: u64 = 0x0010_0000;

/// `struct mount_attr`.
#[repr(C)]
struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Sets and clears attributes of the mount `mount`, and, where asked for, of all mounts below it. With `ids` the owners of its files
/// are shifted by that user namespace: what is id 0 of it on the disk is seen as what id 0 is outside of it.
///
/// # Errors
/// `EINVAL` if the file system's ids cannot be shifted, `EPERM` without the right or if they are shifted already.
pub(crate) fn set_attributes(
    mount: BorrowedFd<'_>,
    recursive: bool,
    set: MountAttrFlags,
    clear: MountAttrFlags,
    ids: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let descriptor = match ids {
        Some(ids) => u64::try_from(ids.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?,
        None => 0,
    };
    let attributes = Attributes {
        set: u64::from(set.bits()) | if ids.is_some() { IDMAP } else { 0 },
        clear: u64::from(clear.bits()),
        propagation: 0,
        user_namespace: descriptor,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a string that ends with 0, `attributes` a `struct mount_attr` of the size that is given; the
    // call reads both and writes neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn what_is_no_mount_is_an_error() {
        assert_eq!(size_of::<Attributes>(), 32);
        let file = std::fs::File::open("/dev/null").unwrap();
        let (set, clear) = (MountAttrFlags::MOUNT_ATTR_NODEV, MountAttrFlags::empty());
        assert!(set_attributes(file.as_fd(), false, set, clear, None).is_err());
    }
}
