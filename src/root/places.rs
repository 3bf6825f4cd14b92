//! `/dev`, `/run` and `/tmp`, which the mounter mounts and process 1 fills; and the directories for what is mounted.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use rustix::fs::FileType;

use super::mounts::{self, NODEV, NOEXEC, NOSUID, RDONLY, Setting};
use crate::error::{Error, Result};

/// The devices there are. Each is a mount of the host's node, since nobody can make one inside; read-only, which for a
/// device means that its owner and mode cannot be changed.
pub(super) const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// The group `tty`, whose number is the same everywhere.
const TTY_GROUP: &str = "5";

/// The host's devices, each as a mount in no tree. To be called while the host's `/dev` is to be seen.
///
/// # Errors
/// What the kernel says.
pub(super) fn copy_devices() -> Result<Vec<(&'static str, OwnedFd)>> {
    let copy = |name| {
        let mount = mounts::copy_with(&Path::new("/dev").join(name), false, RDONLY | NOSUID | NOEXEC)?;
        Ok((name, mount))
    };
    DEVICES.into_iter().map(copy).collect()
}

/// Makes the directories that every root has, and those (or files) that `binds` are to be mounted on.
///
/// # Errors
/// What the file system says.
pub(super) fn make<'a>(binds: impl Iterator<Item = (&'a Path, &'a OwnedFd)>) -> Result<()> {
    for name in ["/proc", "/sys", "/dev", "/run", "/tmp"] {
        make_directory(Path::new(name))?;
    }
    for (target, mount) in binds {
        let target = from_root(target);
        let failed = |error: io::Error| Error::io("Cannot make", error).on_path(&target);
        let stat = rustix::fs::fstat(mount).map_err(|error| failed(error.into()))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            make_directory(&target)?;
        } else {
            make_directory(target.parent().unwrap_or(Path::new("/")))?;
            if !target.exists() {
                File::create(&target).map_err(failed)?;
            }
        }
    }
    Ok(())
}

fn make_directory(path: &Path) -> Result<()> {
    let failed = |error| Error::io("Cannot make directory", error).on_path(path);
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(failed)
}

/// The path as it is from the root, whatever `..` it holds.
pub(super) fn from_root(path: &Path) -> PathBuf {
    let mut result = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => result.push(name),
            Component::ParentDir => {
                result.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    result
}

/// What is in memory: `/dev`, `/dev/shm`, `/run` and `/tmp`, each empty, and root's inside, who is `owner` here.
///
/// # Errors
/// What the kernel says.
pub(super) fn mount_memory(owner: u32) -> Result<()> {
    let all = [
        ("/dev", "1m", "0755", NOEXEC),
        ("/dev/shm", "25%", "1777", NOEXEC),
        ("/run", "10%", "0755", NODEV),
        ("/tmp", "25%", "1777", NODEV),
    ];
    for (path, size, mode, attributes) in all {
        let path = Path::new(path);
        make_directory(path)?;
        let mount = mounts::unswapped_tmpfs(size, mode, owner, attributes)?;
        mounts::attach(mount.as_fd(), path)?;
    }
    Ok(())
}

/// Fills `/dev` with `devices`, and terminals of its own; and `/run` with what programs expect there.
///
/// # Errors
/// What the kernel says.
pub(super) fn fill(devices: &[(&'static str, OwnedFd)]) -> Result<()> {
    let dev = Path::new("/dev");
    let failed = |error: io::Error| Error::io("Cannot set up /dev", error);
    for (name, device) in devices {
        let path = dev.join(name);
        File::create(&path).map_err(failed)?;
        mounts::attach(device.as_fd(), &path)?;
    }
    let settings = [
        Setting::Flag("newinstance"),
        Setting::Pair("ptmxmode", "0666"),
        Setting::Pair("mode", "0620"),
        Setting::Pair("gid", TTY_GROUP),
    ];
    let terminals = mounts::new("devpts", &settings, NOSUID | NOEXEC)
        // Where root is the only user there is no such group.
        .or_else(|_| mounts::new("devpts", &settings[..3], NOSUID | NOEXEC))?;
    let place = dev.join("pts");
    fs::create_dir(&place).map_err(failed)?;
    mounts::attach(terminals.as_fd(), &place)?;
    symlink("pts/ptmx", dev.join("ptmx")).map_err(failed)?;
    // No devices: what shells and scripts call their own descriptors.
    for (name, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        symlink(format!("/proc/self/fd{target}"), dev.join(name)).map_err(failed)?;
    }
    // Where Debian's programs expect to be able to lock something.
    let lock = Path::new("/run/lock");
    fs::create_dir(lock)
        .and_then(|()| fs::set_permissions(lock, fs::Permissions::from_mode(0o1777)))
        .map_err(|error| Error::io("Cannot make directory", error).on_path(lock))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_below_the_root() {
        for (path, expected) in [("a/b", "/a/b"), ("/a/../../b", "/b"), ("..", "/"), ("/./a/", "/a")] {
            assert_eq!(from_root(Path::new(path)), Path::new(expected));
        }
    }
}
