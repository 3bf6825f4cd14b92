//! User and group ids: a private root has 65,536 of its own, and its root is nobody outside.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use rustix::process::{Gid, Pid, Signal, Uid, WaitOptions};
use rustix::thread::UnshareFlags;

use super::child;
use crate::error::{Error, Result};
use crate::sys;

/// How many users, and groups, a private root has: as many as 16 bits tell, what a Debian system uses.
pub(super) const COUNT: u32 = 1 << 16;

/// The first of the ids that sessions get, and how many sessions' worth of them there are: from 0x7000_0000 to the end of
/// what a signed number holds. Nobody else allocates there: subordinate ids (`/etc/subuid`) begin at 100,000, containers
/// of systemd end at 0x6FFF_FFFF.
const FIRST: u32 = 0x7000_0000;
const SLOTS: u32 = 4096;

/// The first of the ids of the session in this slot. Two sessions in different slots have no id in common, so that none
/// can send the other a signal, whatever else they share.
pub(super) fn first_of(slot: u32) -> u32 {
    FIRST + slot % SLOTS * COUNT
}

/// A slot that none of `taken` (first ids of running sessions) is in; `from` is where to begin to look.
pub(super) fn free_slot(taken: &[u32], from: u32) -> Option<u32> {
    (0..SLOTS).map(|n| from.wrapping_add(n) % SLOTS).find(|&slot| !taken.contains(&first_of(slot)))
}

/// One line of `uid_map`: `inside`, and so many more, are `outside`, and so many more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) inside: u32,
    pub(super) outside: u32,
    pub(super) count: u32,
}

/// A user namespace with these ids, in which there is nobody: it lives as long as the descriptor.
///
/// # Errors
/// What the system says; that this needs root.
pub(super) fn user_namespace(users: Range, groups: Range) -> Result<OwnedFd> {
    let failed = |error: io::Error| {
        Error::io("Cannot make a user namespace", error)
            .advise("see /proc/sys/user/max_user_namespaces, or use --privileged")
    };
    let (mut ready, said) = io::pipe().map_err(failed)?;
    let holder = child::start(move || -> io::Result<()> {
        let mut said = said;
        sys::process::unshare(UnshareFlags::NEWUSER)?;
        said.write_all(b"1")?;
        // Until its namespace has been opened.
        loop {
            std::thread::park();
        }
    })
    .map_err(failed)?;
    let made = (|| {
        // Its end of the pipe has been closed here, so that its death is an end of file.
        ready.read_exact(&mut [0])?;
        open_and_fill(holder, users, groups)
    })();
    let _ = rustix::process::kill_process(holder, Signal::KILL);
    let _ = rustix::process::waitpid(Some(holder), WaitOptions::empty());
    made.map_err(failed)
}

fn open_and_fill(holder: Pid, users: Range, groups: Range) -> io::Result<OwnedFd> {
    let directory = format!("/proc/{}", holder.as_raw_nonzero());
    let line = |range: Range| format!("{} {} {}\n", range.inside, range.outside, range.count);
    fs::write(format!("{directory}/uid_map"), line(users))?;
    fs::write(format!("{directory}/gid_map"), line(groups))?;
    Ok(fs::File::open(format!("{directory}/ns/user"))?.into())
}

/// Makes this process the user and group 0 of the user namespace that it is in, with no other group.
///
/// # Errors
/// What the system says.
pub(super) fn become_root() -> io::Result<()> {
    become_user(Uid::ROOT, Gid::ROOT, &[])
}

/// Makes this process that user, in all of its ids.
///
/// # Errors
/// What the system says: above all, that the namespace has no such id.
pub(super) fn become_user(user: Uid, group: Gid, groups: &[Gid]) -> io::Result<()> {
    rustix::thread::set_thread_groups(groups)?;
    rustix::thread::set_thread_res_gid(group, group, group)?;
    rustix::thread::set_thread_res_uid(user, user, user)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_have_no_id_in_common_and_all_ids_are_positive_numbers() {
        assert_eq!(first_of(0), 0x7000_0000);
        assert_eq!(first_of(SLOTS - 1) + (COUNT - 1), 0x7fff_ffff);
        assert_eq!(first_of(SLOTS), first_of(0));
    }

    #[test]
    fn a_slot_that_is_taken_is_passed_over() {
        assert_eq!(free_slot(&[], 7), Some(7));
        assert_eq!(free_slot(&[first_of(7), first_of(8)], 7), Some(9));
        assert_eq!(free_slot(&[first_of(SLOTS - 1)], u32::MAX), Some(0));
        let all: Vec<_> = (0..SLOTS).map(first_of).collect();
        assert_eq!(free_slot(&all, 0), None);
    }
}
