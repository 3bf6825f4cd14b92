//! Who logs in, as the host knows them.

use std::ffi::CString;
use std::path::PathBuf;

use nix::unistd::{Gid, Group, Uid, User, getgrouplist};

use crate::error::{Error, ErrorKind, Result};
use crate::root::Stranger;

/// A user of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Person {
    /// The name.
    pub name: String,
    /// The user's number.
    pub uid: u32,
    /// The number of the first group.
    pub gid: u32,
    /// The home directory.
    pub home: PathBuf,
    /// The names of all groups, the first one first. One that has no name is called by its number.
    pub groups: Vec<String>,
}

impl Person {
    /// The user of this number.
    ///
    /// # Errors
    /// `NotFound` if the host knows none.
    pub fn by_uid(uid: u32) -> Result<Self> {
        Self::found(User::from_uid(Uid::from_raw(uid)), &format!("number {uid}"))
    }

    /// The user of this name.
    ///
    /// # Errors
    /// `NotFound` if the host knows none.
    pub fn by_name(name: &str) -> Result<Self> {
        Self::found(User::from_name(name), &format!("name '{name}'"))
    }

    /// Who it is where nobody may know the name.
    pub(super) fn as_stranger(&self) -> Stranger {
        Stranger { name: self.name.clone(), user: self.uid, group: self.gid, home: self.home.clone() }
    }

    fn found(user: nix::Result<Option<User>>, which: &str) -> Result<Self> {
        let failed = |errno: nix::errno::Errno| {
            Error::io(format!("Cannot look up the user of the {which}"), std::io::Error::from(errno))
        };
        let unknown = || Error::new(ErrorKind::NotFound, format!("The host has no user of the {which}"));
        let user = user.map_err(failed)?.ok_or_else(unknown)?;
        // The name becomes a part of paths and of lines.
        let bad = |c: char| c == '/' || c == ':' || c.is_control();
        if user.name.is_empty() || user.name.starts_with(['.', '-']) || user.name.contains(bad) {
            return Err(Error::new(ErrorKind::Invalid, format!("The user of the {which} has an odd name")));
        }
        let name = CString::new(user.name.as_str()).map_err(|_| unknown())?;
        let groups = getgrouplist(&name, user.gid).map_err(failed)?;
        Ok(Self {
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
            home: user.dir,
            groups: groups.into_iter().map(group_name).collect(),
            name: user.name,
        })
    }
}

fn group_name(gid: Gid) -> String {
    Group::from_gid(gid).ok().flatten().map_or_else(|| gid.to_string(), |group| group.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_number_and_by_name() {
        let root = Person::by_uid(0).unwrap();
        assert_eq!((root.name.as_str(), root.uid, root.gid), ("root", 0, 0));
        assert_eq!(root.groups[0], "root");
        assert_eq!(Person::by_name("root").unwrap(), root);
        assert_eq!(Person::by_uid(0x7fff_0001).unwrap_err().kind(), ErrorKind::NotFound);
        assert!(Person::by_name("no such user").unwrap_err().to_string().contains("no user"));
    }
}
