//! Whom to be once everything is open that takes root to open (`--user`).
//!
//! On Linux the user belongs to a thread; what a thread starts is the same user's. So a thread that is thrown away can be
//! that user for a moment, to see or do something as it, and the main thread becomes it before it starts any other.

use crate::error::{Error, ErrorKind, Result};
use nix::unistd;
use rustix::process::{Gid, Uid};
use rustix::thread::{CapabilitySet, capabilities};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use std::ffi::CString;
use std::fmt;
use std::thread;

/// A user, with the groups that it is to be in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    name: String,
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

impl User {
    /// Looks up `USER` or `USER:GROUP`, names or numbers. Without GROUP it is the user's own, and with its other groups
    /// it is in those that the system's database has for it.
    ///
    /// # Errors
    /// `NotFound` if there is no such user or group, or a number has no group; `Io` if the database cannot be asked.
    pub fn look_up(text: &str) -> Result<Self> {
        let (name, group) = match text.split_once(':') {
            Some((name, group)) => (name, Some(group)),
            None => (text, None),
        };
        let failed = |error: nix::Error| {
            Error::io("Cannot look up user", std::io::Error::from_raw_os_error(error as i32)).on(text)
        };
        let unknown = |what: &str, name: &str, advice| {
            Error::new(ErrorKind::NotFound, format!("There is no {what} '{name}'")).advise(advice)
        };
        let number = name.parse::<u32>().ok().filter(|&number| number != u32::MAX);
        let entry = match unistd::User::from_name(name).map_err(failed)? {
            None => match number {
                Some(number) => unistd::User::from_uid(number.into()).map_err(failed)?,
                None => return Err(unknown("user", name, "give a user of this machine to --user")),
            },
            some => some,
        };
        let gid = match group {
            Some(group) => match unistd::Group::from_name(group).map_err(failed)? {
                Some(found) => found.gid.as_raw(),
                None => group.parse().ok().filter(|&number| number != u32::MAX).ok_or_else(|| {
                    unknown("group", group, "give a group of this machine to --user USER:GROUP")
                })?,
            },
            None => match &entry {
                Some(entry) => entry.gid.as_raw(),
                None => return Err(unknown("user", name, "give its group, too: --user UID:GID")),
            },
        };
        let mut groups = vec![gid];
        if let Some(entry) = &entry
            && let Ok(name) = CString::new(entry.name.as_bytes())
        {
            let found = unistd::getgrouplist(&name, gid.into()).map_err(failed)?;
            groups.extend(found.into_iter().map(unistd::Gid::as_raw));
        }
        groups.sort_unstable();
        groups.dedup();
        let uid = entry.as_ref().map(|entry| entry.uid.as_raw()).or(number).unwrap_or_default();
        Ok(Self {
            name: entry.map_or_else(|| name.to_owned(), |entry| entry.name),
            uid: Uid::from_raw(uid),
            gid: Gid::from_raw(gid),
            groups: groups.into_iter().map(Gid::from_raw).collect(),
        })
    }

    /// Does something as this user, with no more rights than it has.
    ///
    /// # Errors
    /// `Denied` if this process may not become that user.
    ///
    /// # Panics
    /// If `act` does.
    pub fn act<T: Send>(&self, act: impl FnOnce() -> T + Send) -> Result<T> {
        aside(|| {
            self.put_on()?;
            Ok(act())
        })
    }

    /// Makes the calling thread this user's, for good.
    ///
    /// # Errors
    /// As [`User::act`].
    pub(super) fn put_on(&self) -> Result<()> {
        let failed = |error| {
            Error::io("Cannot become user", error).on(self).advise("start as root, or without --user")
        };
        let sets = capabilities(None).map_err(failed)?;
        let is_already = rustix::process::geteuid() == self.uid && rustix::process::getegid() == self.gid;
        if is_already && !sets.effective.contains(CapabilitySet::SETUID) {
            return Ok(());
        }
        set_thread_groups(&self.groups).map_err(failed)?;
        set_thread_res_gid(self.gid, self.gid, self.gid).map_err(failed)?;
        set_thread_res_uid(self.uid, self.uid, self.uid).map_err(failed)
    }
}

/// Shown as the name, or the number that was given.
impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Runs `act` on a thread that is gone when this returns, and with it the rights it has or has given up.
pub(super) fn aside<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| match scope.spawn(act).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(user: &User) -> (u32, u32) {
        (user.uid.as_raw(), user.gid.as_raw())
    }

    #[test]
    fn names_and_numbers() {
        let root = User::look_up("root").unwrap();
        assert_eq!((ids(&root), root.to_string().as_str()), ((0, 0), "root"));
        assert_eq!(User::look_up("0").unwrap(), root);
        let nobody = User::look_up("nobody").unwrap();
        assert_ne!(ids(&nobody).0, 0);
        let mixed = User::look_up("nobody:0").unwrap();
        assert_eq!(ids(&mixed), (ids(&nobody).0, 0));
        assert!(mixed.groups.contains(&Gid::from_raw(0)));
        let nameless = User::look_up("3999999990:3999999991").unwrap();
        assert_eq!((ids(&nameless), nameless.groups.len()), ((3_999_999_990, 3_999_999_991), 1));
    }

    #[test]
    fn what_is_no_user_says_so_and_what_to_do() {
        for (text, expected) in [
            ("no such user", "There is no user 'no such user'; give a user of this machine to --user"),
            ("", "There is no user ''; give a user of this machine to --user"),
            ("-1", "There is no user '-1'"),
            ("4294967295:0", "There is no user '4294967295'"),
            ("root:no such group", "There is no group 'no such group'"),
            ("root:", "There is no group ''"),
            ("3999999990", "There is no user '3999999990'; give its group, too: --user UID:GID"),
        ] {
            let error = User::look_up(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound);
            assert!(error.to_string().starts_with(expected), "{text}: {error}");
        }
    }
}
