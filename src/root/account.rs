//! Users of the image, by its own `/etc/passwd` and `/etc/group`: the host's know other people.
//!
//! The files are the image's, so they may hold, and be, anything.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::process::{Gid, Uid};

use crate::error::{Error, ErrorKind, Result};

/// The most that is read of such a file, in bytes.
const SIZE_MAX: u64 = 4 << 20;

/// A user, as the command runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) name: String,
    pub(super) user: Uid,
    pub(super) group: Gid,
    pub(super) groups: Vec<Gid>,
    pub(super) home: PathBuf,
    pub(super) shell: PathBuf,
}

/// A user of the host who comes into a root whose image may not know them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stranger {
    /// The name on the host.
    pub name: String,
    /// The user's number there.
    pub user: u32,
    /// The number of the first group there.
    pub group: u32,
    /// The home directory there.
    pub home: PathBuf,
}

impl Stranger {
    /// What is so of an account that the image does not have: the host's numbers, name and home directory, no further
    /// groups, and the shell that is everywhere.
    fn account(&self) -> Account {
        Account {
            name: self.name.clone(),
            user: Uid::from_raw(self.user),
            group: Gid::from_raw(self.group),
            groups: Vec::new(),
            home: if self.home.is_dir() { self.home.clone() } else { "/".into() },
            shell: "/bin/sh".into(),
        }
    }
}

/// The user `spec` (`USER[:GROUP]`, each a name or a number) by the files in `/etc`; without it root. Where the image does
/// not know that user, it is `stranger`, if there is one.
///
/// # Errors
/// `NotFound` if the image has no such user or group.
pub(super) fn look_up(spec: Option<&str>, stranger: Option<&Stranger>) -> Result<Account> {
    let read = |path: &str| read(Path::new(path)).unwrap_or_default();
    look_up_in(spec, stranger, &read("/etc/passwd"), &read("/etc/group"))
}

/// The same by the files of a root directory that is not this process's.
///
/// # Errors
/// As [`look_up`].
pub(super) fn look_up_below(
    root: BorrowedFd<'_>,
    spec: Option<&str>,
    stranger: Option<&Stranger>,
) -> Result<Account> {
    let read = |path: &str| {
        // A link in there leads to nowhere else.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let file = rustix::fs::openat2(root, path, flags, Mode::empty(), resolve);
        file.map_err(io::Error::from).and_then(|file| text(file.into())).unwrap_or_default()
    };
    look_up_in(spec, stranger, &read("etc/passwd"), &read("etc/group"))
}

fn look_up_in(spec: Option<&str>, stranger: Option<&Stranger>, passwd: &str, group: &str) -> Result<Account> {
    let found = find(spec.unwrap_or("0"), passwd, group);
    let Some(stranger) = stranger.filter(|stranger| ![stranger.user, stranger.group].contains(&u32::MAX))
    else {
        return found;
    };
    let own = stranger.account();
    match found {
        // By number, and the image has no name for it.
        Ok(found) if found.user == own.user && found.name == stranger.user.to_string() => Ok(own),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(own),
        found => found,
    }
}

/// Has the files in `/etc` know `user`, if they do not: login programs look for a name in the middle of what they do, and give up
/// without one. It is the private root's copy that is changed.
///
/// # Errors
/// What the file system says.
pub(super) fn introduce(user: &Stranger) -> Result<()> {
    let (name, number, group) = (&user.name, user.user, user.group);
    let home = user.account().home;
    let line = format!("{name}:x:{number}:{group}::{}:/bin/sh", home.display());
    add_line(Path::new("/etc/passwd"), &line, |fields| fields[0] == name)?;
    let line = format!("{name}:x:{group}:");
    add_line(Path::new("/etc/group"), &line, |fields| {
        fields.get(2).is_some_and(|field| field.parse() == Ok(group))
    })
}

/// Adds a line to a file of fields, unless there is one that is it.
fn add_line(path: &Path, line: &str, is_it: impl Fn(&[&str]) -> bool) -> Result<()> {
    let failed = |error: io::Error| Error::io("Cannot add the user to", error).on_path(path);
    let text = match read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        text => text.map_err(failed)?,
    };
    if text.lines().any(|line| is_it(&line.split(':').collect::<Vec<_>>())) {
        return Ok(());
    }
    let before = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    let file = File::options().append(true).create(true).custom_flags(libc::O_NONBLOCK).open(path);
    file.and_then(|mut file| file.write_all(format!("{before}{line}\n").as_bytes())).map_err(failed)
}

/// Neither waits for a FIFO, nor reads without end.
fn read(path: &Path) -> io::Result<String> {
    text(File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?)
}

fn text(file: File) -> io::Result<String> {
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = Vec::new();
    file.take(SIZE_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn find(spec: &str, passwd: &str, group: &str) -> Result<Account> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (spec, None),
    };
    let unknown = |what: &str, name: &str| {
        Error::new(ErrorKind::NotFound, format!("The image has no {what} '{name}'"))
            .advise("give one of its names, or a number")
    };
    let number = user.parse::<u32>().ok();
    let entry = passwd.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let [name, _, uid, gid, _, home, shell] = fields[..] else { return None };
        let (uid, gid) = (uid.parse::<u32>().ok()?, gid.parse::<u32>().ok()?);
        let is_it = name == user || number == Some(uid);
        is_it.then(|| (name.to_owned(), uid, gid, PathBuf::from(home), PathBuf::from(shell)))
    });
    let (name, uid, gid, home, shell) = match (entry, number) {
        (Some(entry), _) => entry,
        (None, Some(0)) => ("root".to_owned(), 0, 0, "/root".into(), PathBuf::new()),
        (None, Some(number)) => (number.to_string(), number, number, "/".into(), PathBuf::new()),
        (None, None) => return Err(unknown("user", user)),
    };
    let groups = || {
        group.lines().filter_map(|line| {
            let fields: Vec<_> = line.split(':').collect();
            let [name, _, gid, members] = fields[..] else { return None };
            Some((name, gid.parse::<u32>().ok()?, members))
        })
    };
    let (gid, others) = match wanted_group {
        Some(wanted) => {
            let by_name = groups().find(|(name, ..)| *name == wanted).map(|(_, gid, _)| gid);
            let gid = by_name.or_else(|| wanted.parse().ok()).ok_or_else(|| unknown("group", wanted))?;
            (gid, Vec::new())
        }
        None => {
            let member = |members: &str| members.split(',').any(|member| member == name);
            (gid, groups().filter(|(_, _, members)| member(members)).map(|(_, gid, _)| gid).collect())
        }
    };
    // What the kernel takes for "leave it as it is" is nobody's id.
    if [uid, gid].contains(&u32::MAX) {
        return Err(unknown("user", spec));
    }
    let shell = if shell.as_os_str().is_empty() { "/bin/sh".into() } else { shell };
    let groups = others.into_iter().filter(|&gid| gid != u32::MAX).map(Gid::from_raw).collect();
    Ok(Account { name, user: Uid::from_raw(uid), group: Gid::from_raw(gid), groups, home, shell })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbroken\njoe:x:1000:1001:Joe,,,:/home/joe:\n\
        evil:x:4294967295:0::/:/bin/sh\n";
    const GROUP: &str = "root:x:0:\ntty:x:5:joe\njoe:x:1001:\naudio:x:29:ann,joe\n";

    fn find(spec: &str) -> Result<Account> {
        super::find(spec, PASSWD, GROUP)
    }

    #[test]
    fn users_are_found_by_name_and_by_number() {
        let joe = find("joe").unwrap();
        assert_eq!(find("1000").unwrap(), joe);
        assert_eq!((joe.user.as_raw(), joe.group.as_raw()), (1000, 1001));
        assert_eq!(joe.groups, [5, 29].map(Gid::from_raw));
        assert_eq!((joe.home.as_path(), joe.shell.as_path()), (Path::new("/home/joe"), Path::new("/bin/sh")));
        let with_group = find("joe:audio").unwrap();
        assert_eq!((with_group.group.as_raw(), with_group.groups), (29, vec![]));
        assert_eq!(find("joe:7").unwrap().group.as_raw(), 7);
        assert_eq!(find("0").unwrap().shell, Path::new("/bin/bash"));
        let nobody = find("4242").unwrap();
        assert_eq!((nobody.name.as_str(), nobody.user.as_raw(), nobody.group.as_raw()), ("4242", 4242, 4242));
    }

    #[test]
    fn a_stranger_has_the_hosts_numbers_where_the_image_has_no_such_user() {
        let stranger =
            |name: &str, user| Stranger { name: name.into(), user, group: user, home: "/no/such".into() };
        let look_up =
            |spec: &str, stranger: &Stranger| look_up_in(Some(spec), Some(stranger), PASSWD, GROUP).unwrap();
        // The image's joe is joe, whatever number the host's has.
        assert_eq!(look_up("joe", &stranger("joe", 7)), find("joe").unwrap());
        let ann = look_up("ann", &stranger("ann", 1000));
        assert_eq!((ann.name.as_str(), ann.user.as_raw(), ann.home.as_path()), ("ann", 1000, Path::new("/")));
        assert_eq!(look_up("4242:4242", &stranger("eve", 4242)).name, "eve");
        assert_eq!(look_up("1000:7", &stranger("ann", 1000)).name, "joe");
        assert!(look_up_in(Some("ann"), Some(&stranger("ann", u32::MAX)), PASSWD, GROUP).is_err());
    }

    #[test]
    fn a_line_is_added_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("passwd");
        let add = |name: &str| {
            add_line(&path, &format!("{name}:x:1"), |fields| fields[0] == name).unwrap();
            std::fs::read_to_string(&path).unwrap()
        };
        assert_eq!(add("joe"), "joe:x:1\n");
        assert_eq!(add("joe"), "joe:x:1\n");
        std::fs::write(&path, "root:x:0").unwrap();
        assert_eq!(add("joe"), "root:x:0\njoe:x:1\n");
    }

    #[test]
    fn an_image_without_users_has_root() {
        let root = super::find("0", "", "").unwrap();
        assert_eq!((root.user.as_raw(), root.home.as_path()), (0, Path::new("/root")));
        assert!(super::find("root", "", "").is_err());
    }

    #[test]
    fn who_is_not_there_is_an_error() {
        assert!(find("ann").unwrap_err().to_string().contains("no user 'ann'"));
        assert!(find("joe:wheel").unwrap_err().to_string().contains("no group 'wheel'"));
        assert!(find("evil").is_err());
        assert!(find("4294967295").is_err());
    }

    #[test]
    fn a_fifo_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("passwd");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert!(read(&fifo).is_err());
    }

    use rustix::fs::FileType;
}
