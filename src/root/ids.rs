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

/// A user namespace, in which there is nobody, and the ids in it.
pub(super) struct Ids {
    pub(super) namespace: OwnedFd,
    pub(super) users: Vec<Range>,
    pub(super) groups: Vec<Range>,
    /// Why there is no id in it but root's, if so.
    pub(super) alone: Option<Error>,
}

impl Ids {
    /// Those of a session that root starts: from `first` on, nobody's outside.
    ///
    /// # Errors
    /// As [`user_namespace`].
    pub(super) fn of_session(first: u32) -> Result<Self> {
        let all = vec![Range { inside: 0, outside: first, count: COUNT }];
        let namespace = user_namespace(&all, &all)?;
        Ok(Self { namespace, users: all.clone(), groups: all, alone: None })
    }

    /// A namespace in this one, with the same ids. Whoever is root there has no rights over this one, nor over what was
    /// mounted in it.
    ///
    /// # Errors
    /// As [`user_namespace`].
    pub(super) fn nested(&self) -> Result<OwnedFd> {
        let same = |ranges: &[Range]| -> Vec<_> {
            ranges.iter().map(|range| Range { outside: range.inside, ..*range }).collect()
        };
        user_namespace(&same(&self.users), &same(&self.groups))
    }
}

/// A user namespace with these ids, in which there is nobody: it lives as long as the descriptor.
///
/// # Errors
/// What the system says; that this process has no right to these ids.
pub(super) fn user_namespace(users: &[Range], groups: &[Range]) -> Result<OwnedFd> {
    namespace_by(|holder| fill(holder, users, groups))
}

/// A user namespace, in which there is nobody, and the ids that `give` gives to it by way of a process that holds it.
///
/// # Errors
/// What the system or `give` says.
pub(super) fn namespace_by(give: impl FnOnce(Pid) -> Result<()>) -> Result<OwnedFd> {
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
        ready.read_exact(&mut [0]).map_err(failed)?;
        give(holder)?;
        Ok(fs::File::open(file_of(holder, "ns/user")).map_err(failed)?.into())
    })();
    let _ = rustix::process::kill_process(holder, Signal::KILL);
    let _ = rustix::process::waitpid(Some(holder), WaitOptions::empty());
    made
}

/// Gives these ids to the user namespace of `holder`.
///
/// # Errors
/// What the system says.
pub(super) fn fill(holder: Pid, users: &[Range], groups: &[Range]) -> Result<()> {
    let line = |range: &Range| format!("{} {} {}\n", range.inside, range.outside, range.count);
    for (file, ranges) in [("uid_map", users), ("gid_map", groups)] {
        let lines: String = ranges.iter().map(line).collect();
        fs::write(file_of(holder, file), lines)
            .map_err(|error| Error::io("Cannot give ids to a user namespace", error))?;
    }
    Ok(())
}

/// Nobody in the user namespace of `holder` can change the groups that they are in.
///
/// # Errors
/// What the system says.
pub(super) fn deny_groups(holder: Pid) -> Result<()> {
    fs::write(file_of(holder, "setgroups"), "deny")
        .map_err(|error| Error::io("Cannot give ids to a user namespace", error))
}

fn file_of(process: Pid, name: &str) -> String {
    format!("/proc/{}/{name}", process.as_raw_nonzero())
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
    match rustix::thread::set_thread_groups(groups) {
        // In a namespace without subordinate ids they are kept, and there is no user there to have any.
        Err(rustix::io::Errno::PERM) if groups.is_empty() && groups_are_denied() => {}
        result => result?,
    }
    rustix::thread::set_thread_res_gid(group, group, group)?;
    rustix::thread::set_thread_res_uid(user, user, user)?;
    Ok(())
}

/// Whether the user namespace of this process has that user, and that group. (If nobody can tell, it will be found out.)
pub(super) fn are_here(user: Uid, group: Gid) -> bool {
    let has = |file: &str, id: u32| {
        let Ok(text) = fs::read_to_string(file) else { return true };
        text.lines().any(|line| {
            let mut numbers = line.split_whitespace().map_while(|word| word.parse::<u32>().ok());
            let (first, count) = (numbers.next(), numbers.nth(1));
            first.zip(count).is_some_and(|(first, count)| id >= first && id - first < count)
        })
    };
    has("/proc/self/uid_map", user.as_raw()) && has("/proc/self/gid_map", group.as_raw())
}

fn groups_are_denied() -> bool {
    fs::read_to_string("/proc/self/setgroups").is_ok_and(|word| word.trim() == "deny")
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
