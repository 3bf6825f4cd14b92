//! A FUSE file system that is mounted nowhere: a mount without a place in any tree, reached by its descriptor alone, so
//! that it is in nobody's mount table and ends with the last file that is open in it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

use crate::error::{Error, Result};

/// The two ends of a FUSE file system.
pub(crate) struct Detached {
    /// Where its requests come from, for the daemon. A copy that is kept elsewhere would keep the file system waiting
    /// when the daemon dies.
    pub(crate) requests: OwnedFd,
    mount: OwnedFd,
}

impl Detached {
    /// Mounts it nowhere. Its root is a directory of this user's.
    ///
    /// # Errors
    /// The kernel has no FUSE, or this process may not mount.
    pub(crate) fn new() -> Result<Self> {
        let requests = File::options().read(true).write(true).open("/dev/fuse").map_err(|error| {
            let advice = match Errno::from_io_error(&error) {
                // It is there, and closed to this user: root is not asked for modes.
                Some(Errno::ACCESS) => "open it to everybody, as udev does: 'chmod 666 /dev/fuse' as root",
                _ => "run 'modprobe fuse' as root",
            };
            Error::io("Cannot open /dev/fuse", error).advise(advice)
        })?;
        let mount = mount(&requests).map_err(|error| {
            Error::io("Cannot mount a FUSE file system", io::Error::from(error))
                .advise("this takes root and Linux 5.2")
        })?;
        Ok(Self { requests: requests.into(), mount })
    }

    /// Opens the file `name` in it. Waits until the daemon answers.
    ///
    /// # Errors
    /// What the daemon answers, or that it is gone.
    pub(crate) fn open(mount: &OwnedFd, name: &str, read_only: bool) -> io::Result<OwnedFd> {
        let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
        Ok(rustix::fs::openat(mount, name, access | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// The ends apart: the requests' and the mount.
    pub(crate) fn split(self) -> (OwnedFd, OwnedFd) {
        (self.requests, self.mount)
    }
}

fn mount(requests: &File) -> rustix::io::Result<OwnedFd> {
    let config = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&config, "source", "memdev")?;
    fsconfig_set_string(&config, "fd", requests.as_raw_fd().to_string())?;
    fsconfig_set_string(&config, "rootmode", "040000")?;
    fsconfig_set_string(&config, "user_id", rustix::process::geteuid().as_raw().to_string())?;
    fsconfig_set_string(&config, "group_id", rustix::process::getegid().as_raw().to_string())?;
    fsconfig_create(&config)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&config, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}
