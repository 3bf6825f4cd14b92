//! What is left of root's rights with `--privileged`, and what is covered up besides.
//!
//! # Why CAP_SYS_ADMIN is not among what is left
//!
//! With it, whoever is root inside mounts: a fresh `/proc`, and writes a program's name to `sys/kernel/core_pattern`,
//! which the kernel then runs as the host's root; or remounts its root with device nodes. No other capability has to be
//! missing for that, and no mount can be made that it does not undo. So mounts inside are for user mode, or for
//! `unshare -Urm`, whose mounts have all flags locked.
//!
//! # Why capabilities are not enough
//!
//! User 0 owns the files of `/proc/sys`: to open them for writing takes no capability at all. So they are covered by
//! read-only copies. What is covered cannot be uncovered in a user namespace of one's own (it is locked there), nor can
//! `/proc` be mounted anew (the kernel wants to see one that is not covered).

use std::io;
use std::path::Path;

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

use super::mounts::{self, RDONLY};
use crate::error::{Error, Result};

/// What is left: rights over files, users, processes and ports, none over the kernel and its devices.
const KEPT: CapabilitySet = CapabilitySet::from_bits_retain(
    CapabilitySet::CHOWN.bits()
        | CapabilitySet::DAC_OVERRIDE.bits()
        | CapabilitySet::FOWNER.bits()
        | CapabilitySet::FSETID.bits()
        | CapabilitySet::KILL.bits()
        | CapabilitySet::SETGID.bits()
        | CapabilitySet::SETUID.bits()
        | CapabilitySet::SETPCAP.bits()
        | CapabilitySet::NET_BIND_SERVICE.bits()
        | CapabilitySet::IPC_OWNER.bits()
        | CapabilitySet::SYS_CHROOT.bits()
        | CapabilitySet::LEASE.bits()
        | CapabilitySet::AUDIT_WRITE.bits()
        | CapabilitySet::SETFCAP.bits(),
);

/// Left as well where the network is not the host's.
const KEPT_OF_NETWORK: CapabilitySet =
    CapabilitySet::from_bits_retain(CapabilitySet::NET_ADMIN.bits() | CapabilitySet::NET_RAW.bits());

/// Where host-wide settings are, which user 0 may write because they are its own.
const READ_ONLY: [&str; 5] = ["/proc/sys", "/proc/irq", "/proc/bus", "/proc/fs", "/proc/sysrq-trigger"];

/// What tells of the kernel's memory, of everybody's keys and timers. Not `/proc/kmsg`, which takes a capability that is
/// not left: covered, it would be an empty file instead of an error.
const HIDDEN: [&str; 6] = [
    "/proc/kcore",
    "/proc/keys",
    "/proc/kpagecgroup",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/timer_list",
];

/// Covers up what user 0 could reach without a capability. `/dev/null` must be there.
///
/// # Errors
/// What the kernel says.
pub(super) fn cover_up() -> Result<()> {
    for path in READ_ONLY {
        mounts::freeze(Path::new(path))?;
    }
    for path in HIDDEN {
        mounts::cover(Path::new(path), Path::new("/dev/null"), RDONLY)?;
    }
    Ok(())
}

/// Gives up all but what is left, for this process and all that it becomes.
///
/// # Errors
/// What the kernel says.
pub(super) fn give_up(own_network: bool) -> Result<()> {
    let failed = |error: io::Error| Error::io("Cannot give up capabilities", error);
    let keep = if own_network { KEPT | KEPT_OF_NETWORK } else { KEPT };
    rustix::thread::clear_ambient_capability_set().map_err(|error| failed(error.into()))?;
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if keep.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel has no more of them.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(failed(error.into())),
        }
    }
    let had = rustix::thread::capabilities(None).map_err(|error| failed(error.into()))?.permitted;
    let left = had & keep;
    let sets = CapabilitySets { effective: left, permitted: left, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(|error| failed(error.into()))
}

/// Nobody inside can look into this process, nor take descriptors from it, until it becomes another program.
///
/// # Errors
/// What the kernel says.
pub(super) fn be_opaque() -> io::Result<()> {
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_the_list_that_was_tried() {
        assert_eq!((KEPT | KEPT_OF_NETWORK).bits(), 0xb004_b5fb);
        assert!(
            !KEPT.intersects(CapabilitySet::SYS_ADMIN | CapabilitySet::MKNOD | CapabilitySet::SYS_PTRACE)
        );
    }
}
