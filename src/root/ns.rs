//! The namespace copy alone: this process gets a private copy of the mount table that it has, and what it starts from then
//! on lives in it.
//!
//! It is the kernel that keeps the promise: a mount namespace ends, with all mounts made in it, when the last process in it
//! does. Nothing has to be undone, so nothing can be left, however that process ends.
//!
//! An ordinary user may have a mount namespace only if it belongs to a user namespace in which that user is root; so it is
//! root there of what it mounts itself, and of nothing else.

use crate::error::{Error, Result};
use crate::sys::process::{leave_mount_namespace, leave_user_and_mount_namespace};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::{CapabilitySet, capabilities};
use std::fs;
use std::io;

/// What this process may do in its copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// What it could do before.
    Unchanged,
    /// It is root in a user namespace of its own, into which no id but its own is mapped.
    OwnUserNamespace,
}

/// Puts this process into a copy of its mount table, of which nothing propagates to other copies and nothing from them.
///
/// The process must have one thread.
///
/// # Errors
/// One line that says what the system refused. The process may be in the copy by then: it is to end.
pub fn copy_mount_table() -> Result<Rights> {
    let failed = |error| Error::io("Cannot copy the mount table", error);
    let had = capabilities(None).map_err(failed)?;
    let rights = if had.effective.contains(CapabilitySet::SYS_ADMIN) {
        leave_mount_namespace().map_err(|error| Error::io("Cannot copy the mount table", error))?;
        Rights::Unchanged
    } else {
        with_user_namespace()?;
        Rights::OwnUserNamespace
    };
    // A mount here must not show up elsewhere, as it would wherever systemd has made the root shared.
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE).map_err(|error| {
        let error = Error::io("Cannot make the copy of the mount table private", error);
        if error.kind() == crate::ErrorKind::Invalid {
            error.advise(
                "the root directory is no mount point here, as in a chroot: leave that, or use pivot_root",
            )
        } else {
            error
        }
    })?;
    Ok(rights)
}

/// A mount namespace by way of a user namespace with one user and one group in it: root, who is the caller outside.
fn with_user_namespace() -> Result<()> {
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    leave_user_and_mount_namespace().map_err(refused)?;
    let write = |file: &str, text: &str| {
        let failed = |error| Error::io("Cannot say who is root in the user namespace", error).on(file);
        fs::write(file, text).map_err(failed)
    };
    // Who could drop groups here could get at files that are forbidden to a group; without this the kernel takes no map.
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &format!("0 {} 1", uid.as_raw()))?;
    write("/proc/self/gid_map", &format!("0 {} 1", gid.as_raw()))
}

fn refused(error: io::Error) -> Error {
    let advice = match Errno::from_io_error(&error) {
        Some(Errno::PERM) => {
            "this system forbids user namespaces (see kernel.unprivileged_userns_clone, AppArmor), or this is a chroot; \
             be root"
        }
        Some(Errno::NOSPC | Errno::USERS) => {
            "there are as many as this system allows (see user.max_user_namespaces)"
        }
        _ => "be root",
    };
    Error::io("Cannot make a user namespace, in which an ordinary user may mount", error).advise(advice)
}
