//! The ids that an ordinary user may give to a namespace: one's own, and the subordinate ones that the administrator has
//! given (`/etc/subuid`, `/etc/subgid`), which `newuidmap` and `newgidmap` put into it.
//!
//! Inside, the user keeps the number that it has outside, so that its files, which are seen there by `--bind`, are its
//! own; everybody else, root above all, is one of the subordinate ids, and so nobody outside.

use std::fs;
use std::process::{Command, Stdio};

use rustix::process::Pid;

use super::ids::{self, COUNT, Ids, Range};
use crate::error::{Error, ErrorKind, Result};

/// Some ids: the first, and how many.
type Given = (u32, u32);

/// A user namespace with all the ids that this user may give, or else with one: its root, who is this user.
///
/// # Errors
/// The system has no user namespaces for ordinary users.
pub(super) fn ids() -> Result<Ids> {
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let given = shares(user, group).and_then(|(users, groups)| {
        let namespace = ids::namespace_by(|holder| {
            map("newuidmap", holder, &users)?;
            map("newgidmap", holder, &groups)
        })?;
        Ok(Ids { namespace, users, groups, alone: None })
    });
    given.or_else(|alone| {
        let one = |outside| vec![Range { inside: 0, outside, count: 1 }];
        let (users, groups) = (one(user), one(group));
        let namespace = ids::namespace_by(|holder| {
            // Who could drop groups could get at files that are forbidden to a group: the kernel wants this first.
            ids::deny_groups(holder)?;
            ids::fill(holder, &users, &groups)
        })?;
        Ok(Ids { namespace, users, groups, alone: Some(alone) })
    })
}

/// What there is for the user, and for its group, by the system's files.
fn shares(user: u32, group: u32) -> Result<(Vec<Range>, Vec<Range>)> {
    let account = nix::unistd::User::from_uid(user.into()).ok().flatten();
    let name = account.map_or_else(String::new, |account| account.name);
    let find = |file: &str, own: u32| {
        let given = given(&fs::read_to_string(file).unwrap_or_default(), &name, user);
        let none = || {
            Error::new(ErrorKind::NotFound, format!("No ids for user {user} in")).on(file).advise(
                "have root run 'usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER'",
            )
        };
        if given.is_empty() { Err(none()) } else { Ok(spread(own, &given)) }
    };
    Ok((find("/etc/subuid", user)?, find("/etc/subgid", group)?))
}

/// The lines of such a file, `USER:FIRST:COUNT`, that are the user's.
fn given(text: &str, name: &str, user: u32) -> Vec<Given> {
    let mine = |line: &str| {
        let mut fields = line.split(':');
        let who = fields.next()?;
        let is_me = (!name.is_empty() && who == name) || who.parse() == Ok(user);
        let (first, count) = (fields.next()?.trim().parse().ok()?, fields.next()?.trim().parse().ok()?);
        (is_me && count > 0).then_some((first, count))
    };
    text.lines().filter_map(mine).collect()
}

/// The ids inside, from 0 on: `own` is itself, the others come out of `given`, as far as that goes.
fn spread(own: u32, given: &[Given]) -> Vec<Range> {
    let mut ranges = Vec::new();
    let mut inside = 0;
    for &(mut outside, mut left) in given {
        while left > 0 && inside < COUNT {
            if inside == own {
                inside += 1;
                continue;
            }
            let end = if inside < own { own.min(COUNT) } else { COUNT };
            let count = left.min(end - inside);
            ranges.push(Range { inside, outside, count });
            (inside, outside, left) = (inside + count, outside + count, left - count);
        }
    }
    ranges.push(Range { inside: own, outside: own, count: 1 });
    ranges
}

/// Has `program` (of Debian's package uidmap; it has the right to do so) put the ids into the namespace of `holder`.
fn map(program: &str, holder: Pid, ranges: &[Range]) -> Result<()> {
    let numbers = ranges.iter().flat_map(|range| [range.inside, range.outside, range.count]);
    let done = Command::new(program)
        .arg(holder.as_raw_nonzero().to_string())
        .args(numbers.map(|number| number.to_string()))
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Error::io("Cannot run", error).on(program).advise("install the package uidmap"))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr).trim().replace('\n', " ");
    Err(Error::new(ErrorKind::Denied, format!("No subordinate ids: {said}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_name_users_by_name_or_by_number() {
        let text =
            "joe:100000:65536\nann:165536:65536\n1000:300000:10\njoe:400000:5\nbroken\njoe:x:1\njoe:7:0\n";
        assert_eq!(given(text, "joe", 1000), [(100_000, 65_536), (300_000, 10), (400_000, 5)]);
        assert_eq!(given(text, "", 1000), [(300_000, 10)]);
        assert_eq!(given(text, "eve", 1001), []);
    }

    fn ranges(own: u32, given: &[Given]) -> Vec<(u32, u32, u32)> {
        spread(own, given).into_iter().map(|range| (range.inside, range.outside, range.count)).collect()
    }

    #[test]
    fn everybody_but_oneself_is_a_subordinate_id() {
        let one = ranges(1000, &[(100_000, 65_536)]);
        assert_eq!(one, [(0, 100_000, 1000), (1001, 101_000, 64_535), (1000, 1000, 1)]);
        let two = ranges(5, &[(100, 3), (200, 4)]);
        assert_eq!(two, [(0, 100, 3), (3, 200, 2), (6, 202, 2), (5, 5, 1)]);
        // A number beyond those of a Debian system.
        let high = ranges(2_000_012, &[(100_000, 65_536), (900_000, 65_536)]);
        assert_eq!(high, [(0, 100_000, 65_536), (2_000_012, 2_000_012, 1)]);
        assert_eq!(ranges(0, &[(7, 1)]), [(1, 7, 1), (0, 0, 1)]);
    }
}
