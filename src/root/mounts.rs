//! Mounts: made without a place in any tree, given their attributes there, and only then put where they belong. So there is
//! no moment at which anybody sees one that is not what it is to be.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_change,
    move_mount, open_tree, unmount,
};

use super::filesystem::Kind;
use crate::error::{Error, ErrorKind, Result};
use crate::sys;

/// No device nodes.
pub(crate) const NODEV: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV;
/// No setuid programs.
pub(crate) const NOSUID: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID;
/// No programs.
pub(crate) const NOEXEC: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOEXEC;
/// No changes.
pub(crate) const RDONLY: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_RDONLY;

/// What a new file system is told before it is there.
pub(crate) enum Setting<'a> {
    /// `key=value`.
    Pair(&'a str, &'a str),
    /// `key`.
    Flag(&'a str),
}

/// A new mount of a new file system, with these attributes, in no tree.
///
/// # Errors
/// What the kernel says.
pub(crate) fn new(kind: &str, settings: &[Setting<'_>], attributes: MountAttrFlags) -> Result<OwnedFd> {
    let failed = |error: Errno| Error::io("Cannot mount", error).on(kind);
    let config = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed)?;
    if !settings.iter().any(|setting| matches!(setting, Setting::Pair("source", _))) {
        // What mount tables show for it.
        fsconfig_set_string(&config, "source", kind).map_err(failed)?;
    }
    for setting in settings {
        match setting {
            Setting::Pair(key, value) => fsconfig_set_string(&config, *key, *value),
            Setting::Flag(key) => fsconfig_set_flag(&config, *key),
        }
        .map_err(failed)?;
    }
    fsconfig_create(&config).map_err(failed)?;
    fsmount(&config, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed)
}

/// A tmpfs of at most `size` (as tmpfs takes it: bytes, or `25%` of the machine's memory), with nothing in it that has
/// more rights than who made it.
///
/// # Errors
/// What the kernel says.
pub(super) fn tmpfs(size: &str, mode: &str, attributes: MountAttrFlags) -> Result<OwnedFd> {
    let settings = [Setting::Pair("size", size), Setting::Pair("mode", mode)];
    new("tmpfs", &settings, attributes | NODEV | NOSUID)
}

/// The same, of the user and group `owner`, and with nothing in it that is swapped out where the kernel can do that: since
/// Linux 6.4, and only for who is root on the host.
///
/// # Errors
/// What the kernel says.
pub(super) fn unswapped_tmpfs(
    size: &str,
    mode: &str,
    owner: u32,
    attributes: MountAttrFlags,
) -> Result<OwnedFd> {
    let owner = owner.to_string();
    let pairs = [("size", size), ("mode", mode), ("uid", &owner), ("gid", &owner)];
    let mut settings: Vec<_> = pairs.map(|(key, value)| Setting::Pair(key, value)).into();
    settings.push(Setting::Flag("noswap"));
    let attributes = attributes | NODEV | NOSUID;
    new("tmpfs", &settings, attributes).or_else(|_| new("tmpfs", &settings[..pairs.len()], attributes))
}

/// The file system on `device`, without device nodes, its owners shifted by `ids`. The kernel makes the lock on its flags
/// when it is copied into a namespace of other ids: see [`super::plan`].
///
/// # Errors
/// What the kernel says; above all, that this file system's owners cannot be shifted.
pub(super) fn image(
    device: &Path,
    kind: Kind,
    (read_only, is_copy): (bool, bool),
    ids: Option<BorrowedFd<'_>>,
) -> Result<OwnedFd> {
    let source = device.to_str().unwrap_or_default();
    let mut settings = vec![Setting::Pair("source", source)];
    let for_copies = kind.for_copies.iter().filter(|_| is_copy);
    settings.extend(kind.options.iter().chain(for_copies).map(|option| Setting::Flag(option)));
    if read_only {
        settings.push(Setting::Flag("ro"));
    }
    let attributes = if read_only { NODEV | RDONLY } else { NODEV };
    let mount = new(kind.name, &settings, attributes).map_err(|error| error.advise("see dmesg"))?;
    if let Some(ids) = ids {
        let none = MountAttrFlags::empty();
        sys::mount::set_attributes(mount.as_fd(), false, none, none, Some(ids)).map_err(|error| {
            Error::io("Cannot shift the owners of files on", error)
                .on(kind.name)
                .advise("this takes Linux 5.12, for some file systems a later one; or use --privileged")
        })?;
    }
    Ok(mount)
}

/// A copy of what is seen at `path`, in no tree; with `recursive`, of what is mounted below it, too.
///
/// # Errors
/// What the kernel says.
pub(super) fn copy(path: &Path, recursive: bool) -> Result<OwnedFd> {
    clone_tree(path, recursive).map_err(|error| Error::io("Cannot copy the mount of", error).on_path(path))
}

fn clone_tree(path: &Path, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    open_tree(CWD, path, flags)
}

/// A copy of what is seen at `path`, with these attributes in addition.
///
/// # Errors
/// What the kernel says.
pub(super) fn copy_with(path: &Path, recursive: bool, attributes: MountAttrFlags) -> Result<OwnedFd> {
    with_attributes(copy(path, recursive)?, path, recursive, attributes)
}

fn with_attributes(
    mount: OwnedFd,
    path: &Path,
    recursive: bool,
    attributes: MountAttrFlags,
) -> Result<OwnedFd> {
    sys::mount::set_attributes(mount.as_fd(), recursive, attributes, MountAttrFlags::empty(), None)
        .map_err(|error| Error::io("Cannot set the attributes of", error).on_path(path))?;
    Ok(mount)
}

/// What somebody wants to have seen elsewhere: a copy of `path` and of what is mounted below it, with these attributes in
/// addition.
///
/// # Errors
/// What the kernel says, in words for who named the path.
pub(super) fn bind(path: &Path, attributes: MountAttrFlags) -> Result<OwnedFd> {
    let mount = clone_tree(path, true).map_err(|error| cannot_bind(path, error))?;
    with_attributes(mount, path, true, attributes)
}

/// That `path` cannot be seen elsewhere.
pub(super) fn cannot_bind(path: &Path, error: Errno) -> Error {
    let cannot = Error::io("Cannot bind", error).on_path(path);
    if error == Errno::NOENT { cannot.advise("make it, or bind another path") } else { cannot }
}

/// As [`bind`], of what is open already and was at `path`.
///
/// # Errors
/// What the kernel says.
pub(super) fn copy_opened(
    opened: BorrowedFd<'_>,
    path: &Path,
    attributes: MountAttrFlags,
) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = open_tree(opened, "", flags).map_err(|error| cannot_bind(path, error))?;
    with_attributes(mount, path, true, attributes)
}

/// Gives what is mounted at `path` these attributes in addition.
///
/// # Errors
/// What the kernel says.
pub(super) fn add(path: &Path, attributes: MountAttrFlags) -> Result<()> {
    let failed = |error| Error::io("Cannot set the attributes of", error).on_path(path);
    let mount = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| failed(error.into()))?;
    sys::mount::set_attributes(mount.as_fd(), false, attributes, MountAttrFlags::empty(), None)
        .map_err(failed)
}

/// Puts a mount in its place.
///
/// # Errors
/// What the kernel says.
pub(super) fn attach(mount: BorrowedFd<'_>, path: &Path) -> Result<()> {
    move_mount(mount, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|error| Error::io("Cannot mount on", error).on_path(path))
}

/// Nothing that is mounted here is seen elsewhere any more, and the other way round.
///
/// # Errors
/// What the kernel says.
pub(super) fn make_private() -> Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|error| Error::io("Cannot make the copy of the mount table private", error))
}

/// Makes `mount` the root, and the old one disappear. `over` is a directory of the old tree; only this namespace sees
/// that `mount` is there, for a moment.
///
/// # Errors
/// What the kernel says.
pub(super) fn pivot(mount: BorrowedFd<'_>, over: &Path) -> Result<()> {
    attach(mount, over)?;
    let failed = |error: Errno| {
        let error = Error::io("Cannot exchange the root", error);
        // The root that an initramfs is unpacked into cannot be pivoted away from. To change the root alone (chroot)
        // would leave a way back, which is no private root.
        error.advise("the machine's own root must not be an initramfs")
    };
    rustix::process::chdir(over).map_err(failed)?;
    rustix::process::pivot_root(".", ".").map_err(failed)?;
    unmount(".", UnmountFlags::DETACH).map_err(failed)?;
    rustix::process::chdir("/").map_err(failed)
}

/// Makes what is mounted at `path` of the host unwritable here: a read-only copy of it over itself. That it is not there
/// is fine.
///
/// # Errors
/// What the kernel says.
pub(super) fn freeze(path: &Path) -> Result<()> {
    cover(path, path, RDONLY)
}

/// Puts a read-only copy of `what` over `path`. That there is no such path is fine.
///
/// # Errors
/// What the kernel says.
pub(super) fn cover(path: &Path, what: &Path, attributes: MountAttrFlags) -> Result<()> {
    match copy_with(what, false, attributes | NOSUID | NOEXEC) {
        Ok(mount) => match attach(mount.as_fd(), path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            result => result,
        },
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
