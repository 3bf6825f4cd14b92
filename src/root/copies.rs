//! The mounts of a session, for its fork: what of its mount table can be made anew there, and what cannot.
//!
//! A copy of the table itself would not do: a tmpfs in it would be the same one, and each would see what the other writes
//! there. So every mount is made again, in the order in which they were made, and what is in memory is copied
//! ([`contents`]).

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::mount::MountAttrFlags;
use rustix::process::Pid;
use rustix::thread::ThreadNameSpaceType;
use serde_json::{Value, json};

use super::contents::{self, Incoming};
use super::mounts::{self, NODEV, NOEXEC, NOSUID, RDONLY, Setting};
use super::record::Session;
use super::signals::Signals;
use super::{Bind, child, ids, places, privileges};
use crate::error::{Error, ErrorKind, Result};
use crate::sys;

/// In memory in every session, made by [`places`].
const OWN: [&str; 3] = ["/dev/shm", "/run", "/tmp"];

/// How a mount is made anew.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// It is there already, and empty; what is in it is copied.
    Own,
    /// A tmpfs, with these settings; what is in it is copied.
    Memory(Vec<(String, String)>),
    /// A directory or file that is seen elsewhere, too.
    Bind(String),
    /// A file system with these settings that makes up what is in it by itself.
    Other(String, Vec<(String, String)>),
}

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    target: String,
    /// Its device, as the kernel numbers it.
    device: u64,
    kind: Kind,
    attributes: u32,
}

/// The mounts that are to be made anew, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Copies {
    mounts: Vec<Mount>,
    /// Those that cannot be.
    pub(super) left: Vec<String>,
}

/// A line of a mount table.
struct Line<'a> {
    device: &'a str,
    root: String,
    target: String,
    options: &'a str,
    kind: &'a str,
    settings: Vec<(String, String)>,
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (front, back) = line.split_once(" - ")?;
        let front: Vec<_> = front.split(' ').collect();
        let [_, _, device, root, target, options, ..] = front[..] else { return None };
        let [kind, _, settings] = back.split(' ').collect::<Vec<_>>()[..] else { return None };
        let pair = |text: &str| {
            let (key, value) = text.split_once('=').unwrap_or((text, ""));
            (key.to_owned(), value.to_owned())
        };
        Some(Self {
            device,
            root: unescape(root)?,
            target: unescape(target)?,
            options,
            kind,
            settings: unescape(settings)?.split(',').map(pair).collect(),
        })
    }

    fn number(&self) -> Option<u64> {
        let (major, minor) = self.device.split_once(':')?;
        Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
    }

    fn attributes(&self) -> MountAttrFlags {
        let named = [("ro", RDONLY), ("nosuid", NOSUID), ("nodev", NODEV), ("noexec", NOEXEC)];
        let is_set = |name: &str| self.options.split(',').any(|option| option == name);
        named.iter().filter(|(name, _)| is_set(name)).map(|(_, flag)| *flag).collect()
    }

    fn take(&self, keys: &[&str]) -> Vec<(String, String)> {
        self.settings.iter().filter(|(key, _)| keys.contains(&&**key)).cloned().collect()
    }
}

/// The kernel writes some characters as `\040`; what is no text cannot be taken along.
fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, others)) = rest.split_first() {
        match others.get(..3).filter(|_| first == b'\\') {
            Some(digits) => {
                bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()?);
                rest = &others[3..];
            }
            None => {
                bytes.push(first);
                rest = others;
            }
        }
    }
    String::from_utf8(bytes).ok()
}

impl Copies {
    /// What is to be done for the table `text`, as `/proc/PID/mountinfo` has it, of a session that was started with `binds`.
    pub(super) fn of_table(text: &str, binds: &[Bind]) -> Self {
        let mut copies = Self::default();
        let mut base: Vec<PathBuf> = ["/", "/proc", "/sys", "/dev", "/dev/pts"].map(PathBuf::from).into();
        base.extend(places::DEVICES.iter().map(|name| Path::new("/dev").join(name)));
        let bound: Vec<_> = binds.iter().map(|bind| places::from_root(&bind.target)).collect();
        base.extend(bound.iter().cloned());
        let mut own: Vec<_> = OWN.to_vec();
        // Where each file system is seen whole.
        let mut whole: HashMap<&str, String> = HashMap::new();
        for text in text.lines() {
            let Some(line) = Line::parse(text) else {
                copies.left.push("something whose name is no text".to_owned());
                continue;
            };
            let target = Path::new(&line.target);
            if line.root == "/" {
                whole.entry(line.device).or_insert_with(|| line.target.clone());
            }
            if let Some(at) = base.iter().position(|path| path == target) {
                base.swap_remove(at);
                continue;
            }
            let below = |path: &Path| target.starts_with(path) && target != path;
            let comes_along = bound.iter().any(|path| below(path)) && line.kind != "tmpfs";
            if comes_along || below(Path::new("/proc")) && ["proc", "devtmpfs", "tmpfs"].contains(&line.kind)
            {
                continue;
            }
            let kind = if let Some(at) = own.iter().position(|path| Path::new(path) == target) {
                own.swap_remove(at);
                Some(Kind::Own)
            } else {
                kind_of(&line, &whole)
            };
            match kind.zip(line.number()) {
                Some((kind, device)) => {
                    let attributes = line.attributes().bits();
                    copies.mounts.push(Mount { target: line.target, device, kind, attributes });
                }
                None => copies.left.push(format!("{} ({})", line.target, line.kind)),
            }
        }
        copies
    }

    /// What [`make`] is told.
    pub(super) fn to_json(&self) -> Value {
        let one = |mount: &Mount| {
            let (kind, detail) = match &mount.kind {
                Kind::Own => ("own", Value::Null),
                Kind::Memory(settings) => ("memory", json!(settings)),
                Kind::Bind(from) => ("bind", json!(from)),
                Kind::Other(name, settings) => ("other", json!([name, settings])),
            };
            json!([mount.target, kind, detail, mount.attributes])
        };
        self.mounts.iter().map(one).collect()
    }

    /// Has a process in `session` send what is in memory there. Gives its number, and where it sends.
    ///
    /// # Errors
    /// What the system says. That it fails later is found out by who reads.
    pub(super) fn send(
        &self,
        session: &Session,
        init: &OwnedFd,
        signals: &Signals,
    ) -> Result<(Pid, OwnedFd)> {
        let failed = |error| Error::io("Cannot copy what is in memory", error);
        let (receive, send) = std::io::pipe().map_err(failed)?;
        let sender = child::start(|| -> Result<()> {
            signals.forget();
            let failed = |error: std::io::Error| Error::io("Cannot enter the session", error);
            // Of the host's there remains what is needed to get there.
            privileges::be_opaque().map_err(failed)?;
            sys::process::keep_only(3, &[init.as_fd(), send.as_fd()]).map_err(failed)?;
            let mut spaces = ThreadNameSpaceType::MOUNT;
            spaces.set(ThreadNameSpaceType::USER, !session.privileged);
            rustix::thread::move_into_thread_name_spaces(init.as_fd(), spaces)
                .map_err(|error| failed(error.into()))?;
            rustix::process::chdir("/").map_err(|error| failed(error.into()))?;
            if session.privileged {
                privileges::give_up(session.own_network)?;
            } else {
                ids::become_root().map_err(failed)?;
                child::end_with_parent().map_err(failed)?;
            }
            for mount in self.mounts.iter().filter(|mount| mount.has_contents()) {
                contents::send(Path::new(&mount.target), mount.device, &send)
                    .map_err(|error| Error::io("Cannot send what is in memory", error))?;
            }
            Ok(())
        })
        .map_err(failed)?;
        Ok((sender, receive.into()))
    }
}

/// How to make it anew, if that is possible. `whole` is where each file system is seen from its root on.
fn kind_of(line: &Line<'_>, whole: &HashMap<&str, String>) -> Option<Kind> {
    // What a file system shows from its root on and is seen for the first time is one that was mounted.
    let is_first = line.root == "/" && whole.get(line.device) == Some(&line.target);
    if !is_first {
        let top = whole.get(line.device)?;
        return (!line.root.ends_with("//deleted"))
            .then(|| Kind::Bind(format!("{}{}", top.trim_end_matches('/'), line.root)));
    }
    Some(match line.kind {
        "tmpfs" => Kind::Memory(line.take(&["size", "nr_inodes", "nr_blocks"])),
        "overlay" => {
            let settings = line.take(&["lowerdir", "upperdir", "workdir", "userxattr"]);
            // Several layers, or a name that would have to be written otherwise.
            let simple = !settings.iter().any(|(_, value)| value.contains(['\\', ',']));
            simple.then(|| Kind::Other("overlay".to_owned(), settings))?
        }
        "proc" => Kind::Other("proc".to_owned(), line.take(&["hidepid", "subset"])),
        "devpts" => Kind::Other("devpts".to_owned(), line.take(&["mode", "ptmxmode"])),
        "mqueue" | "cgroup2" => Kind::Other(line.kind.to_owned(), Vec::new()),
        _ => return None,
    })
}

impl Mount {
    fn has_contents(&self) -> bool {
        matches!(self.kind, Kind::Own | Kind::Memory(_))
    }

    fn from_json(value: &Value) -> Option<Self> {
        let pairs = |value: &Value| serde_json::from_value(value.clone()).ok();
        let detail = &value[2];
        let kind = match value[1].as_str()? {
            "own" => Kind::Own,
            "memory" => Kind::Memory(pairs(detail)?),
            "bind" => Kind::Bind(detail.as_str()?.to_owned()),
            _ => Kind::Other(detail[0].as_str()?.to_owned(), pairs(&detail[1])?),
        };
        let attributes = u32::try_from(value[3].as_u64()?).ok()?;
        Some(Self { target: value[0].as_str()?.to_owned(), device: 0, kind, attributes })
    }

    fn make(&self) -> Result<()> {
        // It is to be written to first.
        let attributes = MountAttrFlags::from_bits_retain(self.attributes) - RDONLY;
        let new = |name: &str, pairs: &[(String, String)]| {
            let mut settings = Vec::new();
            for (key, value) in pairs {
                settings.push(if value.is_empty() { Setting::Flag(key) } else { Setting::Pair(key, value) });
            }
            mounts::new(name, &settings, attributes)
        };
        let mount = match &self.kind {
            Kind::Own => return Ok(()),
            Kind::Memory(pairs) => new("tmpfs", pairs)?,
            Kind::Other(name, pairs) => new(name, pairs)?,
            Kind::Bind(from) => mounts::copy_with(Path::new(from), false, attributes)?,
        };
        mounts::attach(mount.as_fd(), Path::new(&self.target))
    }
}

/// Makes the mounts that `told` tells of, in a session that is being made, with the contents that come. Gives those that
/// could not be made.
///
/// # Errors
/// What is in memory cannot be had whole.
pub(super) fn make(told: &Value, contents: OwnedFd) -> Result<Vec<String>> {
    let mut incoming = Incoming::new(File::from(contents));
    let mut left = Vec::new();
    for value in told.as_array().into_iter().flatten() {
        let bad = || Error::new(ErrorKind::Invalid, "What is mounted cannot be understood");
        let mount = Mount::from_json(value).ok_or_else(bad)?;
        let target = Path::new(&mount.target);
        let made = mount.make();
        if mount.has_contents() {
            incoming.make(made.is_ok().then_some(target)).map_err(|error| {
                Error::io("Cannot copy what is in memory on", error).on_path(target).advise("make room there")
            })?;
        }
        let made = made.and_then(|()| {
            let attributes = MountAttrFlags::from_bits_retain(mount.attributes) & RDONLY;
            if attributes.is_empty() { Ok(()) } else { mounts::add(target, attributes) }
        });
        if let Err(error) = made {
            left.push(format!("{} ({error})", mount.target));
        }
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
22 21 7:1 / / rw,nodev,relatime - ext4 /dev/loop1 rw,nobarrier\n\
23 22 0:40 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw\n\
24 22 0:41 / /sys ro,nosuid,nodev,noexec,relatime - sysfs sysfs rw\n\
25 22 8:1 /home/joe /home/joe rw,nosuid,nodev - ext4 /dev/sda1 rw\n\
26 25 8:2 / /home/joe/disk rw,nosuid,nodev - ext4 /dev/sda2 rw\n\
27 22 0:42 / /dev rw,nosuid - tmpfs tmpfs rw,size=1024k\n\
28 27 0:5 /null /dev/null ro,nosuid,noexec - devtmpfs devtmpfs rw\n\
29 27 0:43 / /dev/pts rw,nosuid,noexec - devpts devpts rw,gid=5\n\
30 27 0:44 / /dev/shm rw,nosuid,nodev - tmpfs tmpfs rw,size=10k\n\
31 22 0:45 / /run rw,nosuid,nodev - tmpfs tmpfs rw\n\
32 22 0:46 / /tmp rw,nosuid,nodev - tmpfs tmpfs rw\n\
33 22 0:47 / /mnt/a\\040b ro,nosuid,relatime - tmpfs none rw,size=4096k,nr_inodes=7,mode=755,uid=1879048192\n\
34 22 7:1 /usr /b rw,nodev - ext4 /dev/loop1 rw\n\
35 22 0:47 /c /d rw - tmpfs none rw,size=4096k\n\
36 22 0:48 / /ov rw - overlay none rw,lowerdir=/etc,upperdir=/tmp/u,workdir=/tmp/w,uuid=on\n\
37 22 0:49 / /p rw - proc none rw\n\
38 22 0:50 / /net rw - nfs host:/x rw,vers=4\n\
39 23 0:40 /sys /proc/sys ro - proc proc rw\n\
40 32 0:51 / /tmp rw - tmpfs none rw\n\
41 22 7:1 /gone//deleted /g rw,nodev - ext4 /dev/loop1 rw\n";

    fn binds() -> Vec<Bind> {
        vec![Bind { source: "/home/joe".into(), target: "/home/joe/".into(), read_only: false }]
    }

    #[test]
    fn a_table_is_sorted_into_what_can_be_made_anew_and_what_not() {
        let copies = Copies::of_table(TABLE, &binds());
        let found: Vec<_> = copies.mounts.iter().map(|mount| (&*mount.target, &mount.kind)).collect();
        let pairs = |list: &[(&str, &str)]| -> Vec<(String, String)> {
            list.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        let overlay = [("lowerdir", "/etc"), ("upperdir", "/tmp/u"), ("workdir", "/tmp/w")];
        let expected = [
            ("/dev/shm", &Kind::Own),
            ("/run", &Kind::Own),
            ("/tmp", &Kind::Own),
            ("/mnt/a b", &Kind::Memory(pairs(&[("size", "4096k"), ("nr_inodes", "7")]))),
            ("/b", &Kind::Bind("/usr".to_owned())),
            ("/d", &Kind::Bind("/mnt/a b/c".to_owned())),
            ("/ov", &Kind::Other("overlay".to_owned(), pairs(&overlay))),
            ("/p", &Kind::Other("proc".to_owned(), Vec::new())),
            // The second one that was put there.
            ("/tmp", &Kind::Memory(Vec::new())),
        ];
        assert_eq!(found, expected);
        assert_eq!(copies.left, ["/net (nfs)", "/g (ext4)"]);
        let memory = &copies.mounts[3];
        assert_eq!(
            (memory.attributes, memory.device),
            ((RDONLY | NOSUID).bits(), rustix::fs::makedev(0, 47))
        );
    }

    #[test]
    fn it_survives_the_way() {
        let copies = Copies::of_table(TABLE, &binds());
        let told = copies.to_json();
        let back: Vec<_> =
            told.as_array().unwrap().iter().map(|one| Mount::from_json(one).unwrap()).collect();
        let sent: Vec<_> = copies.mounts.into_iter().map(|mount| Mount { device: 0, ..mount }).collect();
        assert_eq!(back, sent);
        assert_eq!(Mount::from_json(&json!(["/x"])), None);
    }

    #[test]
    fn names_are_read_as_the_kernel_writes_them() {
        assert_eq!(unescape("/a\\040b\\134").unwrap(), "/a b\\");
        assert_eq!(unescape("\\303\\244").unwrap(), "ä");
        assert!(unescape("\\377").is_none() && unescape("\\9").is_some_and(|text| text == "\\9"));
    }
}
