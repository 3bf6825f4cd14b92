//! A daemon that serves a block device, made harmless to itself.
//!
//! # Memory
//!
//! When memory runs short the kernel writes dirty pages of the device back, to have them free. That needs the daemon. If
//! the daemon then waits for memory, be it for a page of its own program that was dropped, be it in an allocation for
//! which the kernel first wants to write dirty pages, both wait for each other for ever. So what the daemon has is locked
//! in memory, and it tells the kernel that it is part of how dirty pages are written (`PR_SET_IO_FLUSHER`), so that no
//! allocation made for it waits for such a write, and it is not held back as one who makes pages dirty.
//!
//! # Mounts
//!
//! The daemon has a mount namespace of its own, and in it an empty root with nothing but `/proc`. In the namespace of
//! whoever attaches it would (1) keep that namespace alive, and in it the mount of its own device, which could so never
//! be unmounted by the namespace's end; (2) block everything at that end, when the last process in a namespace unmounts
//! what is mounted there, and writes it back to a device whose server it is itself; (3) get into trouble with a
//! `pivot_root` that moves its own root into what it serves. A copy of the namespace would instead keep every other mount
//! of the machine busy, so there is no copy either: nothing is pinned, and nothing is ever mounted there later.

use std::io;
use std::path::Path;

use rustix::fs::{CWD, Mode};
use rustix::mm::MlockAllFlags;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, mount_move,
    move_mount, open_tree, unmount,
};

use rustix::process::{Resource, getrlimit};

use crate::error::{Error, Result};
use crate::sys;

/// Locks what this process has in memory, and what it will have. Where that is not allowed, it goes on without: above all
/// an `ordinary` user, who may lock a little, and whose every reservation of address space would count as that.
pub(super) fn lock_memory(ordinary: bool) {
    if ordinary && getrlimit(Resource::Memlock).current.is_some() {
        tracing::info!("An ordinary user's daemon is not locked in memory");
        return;
    }
    // All that is there now is read in, program and all. What comes later is locked where it is touched: threads reserve
    // far more for their stacks than they use. (Overlays and images are not, see `sys`: their memory goes back.)
    let now = rustix::mm::mlockall(MlockAllFlags::CURRENT);
    let later = rustix::mm::mlockall(MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT);
    if let Err(error) = now.and(later) {
        tracing::info!(%error, "Cannot lock the daemon's memory");
    }
    // Inherited by threads, so before there are any. Needs CAP_SYS_RESOURCE.
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::info!(%error, "Cannot become an I/O flusher");
    }
}

/// Leaves the mount namespace for one that is empty but for `/proc`. `over` is a directory that can be seen now: the new
/// root is put on it, where nobody else sees it.
///
/// # Errors
/// What the kernel says, `EPERM` without CAP_SYS_ADMIN above all.
pub(super) fn leave_mounts(over: &Path) -> Result<()> {
    let failed = |step: &'static str| {
        move |error: rustix::io::Errno| {
            Error::io(format!("Cannot get a mount namespace of its own ({step})"), io::Error::from(error))
        }
    };
    // First, since somebody without the rights of root may mount there only.
    sys::process::leave_mount_namespace()
        .map_err(|error| Error::io("Cannot get a mount namespace", error))?;
    // Nothing that happens here is to be seen elsewhere, and the other way round.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(failed("private"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let config = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("tmpfs"))?;
    fsconfig_set_string(&config, "size", "64k").map_err(failed("tmpfs"))?;
    fsconfig_set_string(&config, "mode", "0700").map_err(failed("tmpfs"))?;
    fsconfig_create(&config).map_err(failed("tmpfs"))?;
    let root = fsmount(&config, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("tmpfs"))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let proc = open_tree(CWD, "/proc", flags)
        // Without the rights of root, what is mounted below it must come along.
        .or_else(|_| open_tree(CWD, "/proc", flags | OpenTreeFlags::AT_RECURSIVE))
        .map_err(failed("/proc"))?;
    move_mount(&root, "", CWD, over, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(failed("root"))?;
    rustix::process::chdir(over).map_err(failed("root"))?;
    rustix::fs::mkdir("proc", Mode::RWXU).map_err(failed("/proc"))?;
    move_mount(&proc, "", CWD, "proc", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(failed("/proc"))?;
    match rustix::process::pivot_root(".", ".") {
        Ok(()) => unmount(".", UnmountFlags::DETACH).map_err(failed("old root"))?,
        // The root that an initramfs is unpacked into cannot be pivoted away from; it is there for ever anyway.
        Err(rustix::io::Errno::INVAL) => {
            mount_move(".", "/").map_err(failed("over the root"))?;
            rustix::process::chroot(".").map_err(failed("over the root"))?;
        }
        Err(error) => return Err(failed("pivot_root")(error)),
    }
    rustix::process::chdir("/").map_err(failed("root"))
}
