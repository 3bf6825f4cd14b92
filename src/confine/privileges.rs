//! Capabilities, core files, new privileges: what the process gives up of its own.
//!
//! All of it belongs to a thread or is inherited by threads that are started later, and so is done before there are any.

use super::Needs;
use super::user::{User, aside};
use crate::error::{Error, Result};
use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use std::path::Path;

/// Capabilities without which this process could not do later what it does now.
///
/// Root needs none for what is root's own. But it may serve an image that is another user's alone, and listen in another
/// user's directory: then it keeps what opening the next image, or removing the socket file, will take, and no more.
pub(super) fn needed(needs: &Needs) -> CapabilitySet {
    let mut needed = CapabilitySet::empty();
    let Ok(had) = capabilities(None) else { return needed };
    if had.effective.is_empty() {
        return needed;
    }
    let as_nobody = || {
        set_capabilities(None, only(CapabilitySet::empty())).is_ok().then(|| {
            let unreadable = needs.images.iter().any(|image| !may_open(image));
            let unremovable = needs.sockets.iter().any(|socket| !may_remove(socket));
            (unreadable, unremovable)
        })
    };
    let Some((unreadable, unremovable)) = aside(as_nobody) else { return needed };
    needed.set(CapabilitySet::DAC_READ_SEARCH, unreadable);
    needed.set(CapabilitySet::DAC_OVERRIDE, unremovable);
    needed & had.permitted
}

/// Whether `user` can serve these images, and what takes their place, and remove these sockets.
///
/// # Errors
/// One line that names the file, and the user who may not.
pub(super) fn check(user: &User, needs: &Needs) -> Result<()> {
    let denied = user.act(|| needs.images.iter().find(|image| !may_open(image)))?;
    match denied {
        None => Ok(()),
        Some(image) => Err(Error::io(format!("User {user} may not read image"), Errno::ACCESS)
            .on_path(image)
            .advise("let that user read it, and search the directories above it")),
    }
}

/// Whether nothing forbids to open the file. That there is none, or nothing to serve, is for others to say.
fn may_open(path: &Path) -> bool {
    // A FIFO would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    !matches!(rustix::fs::open(path, flags, Mode::empty()), Err(Errno::ACCESS | Errno::PERM))
}

fn may_remove(path: &Path) -> bool {
    let directory = path.parent().unwrap_or(path);
    let access = Access::WRITE_OK | Access::EXEC_OK;
    let may_write = rustix::fs::accessat(CWD, directory, access, AtFlags::EACCESS);
    !matches!(may_write, Err(Errno::ACCESS | Errno::PERM))
}

/// Leaves the calling thread with the capabilities in `keep` at most. Nothing that it could execute would have more: not
/// even as root, once new privileges are forbidden.
///
/// # Errors
/// When the system does not let go of them.
pub(super) fn drop_capabilities(keep: CapabilitySet) -> std::io::Result<()> {
    let had = capabilities(None)?;
    let keep = only(had.permitted & keep);
    // Whoever has none needs no call for it, and a service manager may have forbidden that call.
    if had == keep { Ok(()) } else { Ok(set_capabilities(None, keep)?) }
}

/// Empties the set of capabilities that this process, or one that it becomes, could ever get again. Only who has a
/// certain capability can, and there is nothing to be got for others. To be done while there is still that one.
///
/// # Errors
/// When the system does not let go of them.
pub(super) fn bound_capabilities() -> std::io::Result<()> {
    if capabilities(None)?.effective.contains(CapabilitySet::SETPCAP) {
        let all = (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number));
        for capability in all {
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                Ok(()) => {}
                // The kernel has no more of them.
                Err(Errno::INVAL) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(rustix::thread::clear_ambient_capability_set()?)
}

fn only(set: CapabilitySet) -> CapabilitySets {
    CapabilitySets { effective: set, permitted: set, inheritable: CapabilitySet::empty() }
}

/// No core file, however the process ends, and no other process of the same user can look into this one: what sessions
/// hold is in its memory. A limit alone would not do: systems that pipe core files to a program do not ask for it. A core
/// that is made all the same (by `gcore`, or because a process is `traceable` and so has the limit alone) has no memory in it.
///
/// # Errors
/// What the system says.
pub(crate) fn forbid_dumps(traceable: bool) -> std::io::Result<()> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    let dumps = if traceable { DumpableBehavior::Dumpable } else { DumpableBehavior::NotDumpable };
    Ok(set_dumpable_behavior(dumps)?)
}

/// No kind of mapping belongs in a core file of this process. To be said while it still is who it was started as: the file
/// that it is said by belongs to root once that has changed.
///
/// # Errors
/// What the system says.
pub(crate) fn empty_cores() -> std::io::Result<()> {
    std::fs::write("/proc/self/coredump_filter", "0")
}

/// Nothing that this thread, or one it starts, executes has more rights than it has.
///
/// # Errors
/// What the system says.
pub(super) fn forbid_new_privileges() -> std::io::Result<()> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, chown};

    /// The rights that root takes from its capabilities, and the tests may be run by others.
    fn is_root() -> bool {
        rustix::process::geteuid().is_root()
    }

    #[test]
    fn root_needs_nothing_for_its_own_files_and_little_for_those_of_others() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        fs::write(&image, "x").unwrap();
        fs::set_permissions(&image, Permissions::from_mode(0o600)).unwrap();
        let needs = Needs { images: vec![image.clone()], sockets: vec![dir.path().join("socket")] };
        assert_eq!(needed(&needs), CapabilitySet::empty());
        if is_root() {
            chown(&image, Some(1), Some(1)).unwrap();
            assert_eq!(needed(&needs), CapabilitySet::DAC_READ_SEARCH);
            chown(dir.path(), Some(1), Some(1)).unwrap();
            fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
            assert_eq!(needed(&needs), CapabilitySet::DAC_READ_SEARCH | CapabilitySet::DAC_OVERRIDE);
            chown(&image, Some(0), Some(0)).unwrap();
            assert_eq!(needed(&needs), CapabilitySet::DAC_OVERRIDE);
        }
        let missing = Needs { images: vec![dir.path().join("none")], sockets: Vec::new() };
        assert_eq!(needed(&missing), CapabilitySet::empty());
    }

    #[test]
    fn a_user_who_may_not_read_an_image_is_named_with_it() {
        if !is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let image = dir.path().join("image");
        fs::write(&image, "x").unwrap();
        fs::set_permissions(&image, Permissions::from_mode(0o644)).unwrap();
        let needs = Needs { images: vec![image.clone()], sockets: Vec::new() };
        let nobody = User::look_up("nobody").unwrap();
        check(&nobody, &needs).unwrap();
        fs::set_permissions(&image, Permissions::from_mode(0o600)).unwrap();
        let line = check(&nobody, &needs).unwrap_err().to_string();
        let expected = format!("User nobody may not read image {}: permission denied", image.display());
        assert!(line.starts_with(&expected), "{line}");
        // That was another thread's business.
        assert!(is_root());
    }
}
