//! Which private roots run: one file each, as attachments have it, locked by its launcher for as long as that lives.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::process::{Pid, PidfdFlags};
use serde_json::{Value, json};

use super::{Bind, Limits, Run, cgroup, ids};
use crate::attach::random_name;
use crate::attach::record::{Directory, Entry};
use crate::error::{Error, ErrorKind, Result};

/// Where running sessions are written down.
pub const DIRECTORY: &str = "/run/memdev-root";

/// The longest name of a session, in bytes: that of a host name.
const NAME_MAX: usize = 64;

/// A private root that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// 32 hexadecimal digits that nobody else has.
    pub id: String,
    /// What people call it; one at a time has it.
    pub name: String,
    /// What its root is a copy of: the image's path, or the URI of the named session.
    pub source: String,
    /// Whether its root is the host's user 0.
    pub privileged: bool,
    /// The number of its process 1; 0 while it begins.
    pub init: u32,
    /// When process 1 began, in the kernel's ticks: numbers come round again, this does not.
    pub init_started: u64,
    /// The number of its launcher.
    pub launcher: u32,
    /// The first of its 65,536 user and group ids; 0 if it has none that are its alone.
    pub first_id: u32,
    /// Whether it has a network of its own.
    pub own_network: bool,
    /// What its name is made from, if it was given none: the image's name, or that of the named session.
    pub stem: String,
    /// What its device is written down under; empty while it begins, and without a device.
    pub attachment: String,
    /// The partition that it is, if it is one.
    pub partition: Option<u32>,
    /// What is seen of the host.
    pub binds: Vec<Bind>,
    /// Who holds its namespaces open, if it was made without the rights of root: what its maker may not take from process 1.
    pub porter: Option<Porter>,
    /// Its control groups, in each of the machine's trees that it is in.
    pub cgroups: Vec<PathBuf>,
    /// What its processes may use.
    pub limits: Limits,
}

/// A process of the launcher's that does nothing but hold a session's namespaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Porter {
    /// Its number.
    pub pid: u32,
    /// When it began, as [`Session::init_started`].
    pub started: u64,
    /// Its descriptors of the namespaces, in the order in which they are to be entered.
    pub spaces: Vec<u32>,
}

impl Session {
    /// The session as JSON has it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "id": self.id,
            "name": self.name,
            "source": self.source,
            "privileged": self.privileged,
            "init": self.init,
            "init_started": self.init_started,
            "launcher": self.launcher,
            "first_id": self.first_id,
            "own_network": self.own_network,
            "stem": self.stem,
            "attachment": self.attachment,
            "partition": self.partition,
            // A path may be no text: byte by byte.
            "binds": self.binds.iter().map(|bind| {
                let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
                json!([bytes(&bind.source), bytes(&bind.target), bind.read_only])
            }).collect::<Vec<_>>(),
            "porter": self.porter.as_ref().map(|porter| {
                json!({ "pid": porter.pid, "started": porter.started, "spaces": porter.spaces })
            }),
            "cgroups": self.cgroups,
            "limits": self.limits.to_json(),
        })
    }

    /// Its process 1, if that still runs: while the descriptor is open its number is nobody else's.
    pub(super) fn process(&self) -> Option<OwnedFd> {
        let number = i32::try_from(self.init).ok().and_then(Pid::from_raw)?;
        let process = rustix::process::pidfd_open(number, PidfdFlags::empty()).ok()?;
        (started(self.init) == Some(self.init_started)).then_some(process)
    }

    /// Whether its process 1 has ended: nobody is inside any more.
    pub(crate) fn has_ended(&self) -> bool {
        let none = Timespec::default();
        self.process().is_none_or(|process| {
            matches!(poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&none)), Ok(1..))
        })
    }

    fn from_json(id: &str, value: &Value) -> Option<Self> {
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        let number = |key: &str| value[key].as_u64().and_then(|number| u32::try_from(number).ok());
        Some(Self {
            id: id.to_owned(),
            name: text("name")?,
            source: text("source")?,
            privileged: value["privileged"].as_bool()?,
            init: number("init")?,
            init_started: value["init_started"].as_u64()?,
            launcher: number("launcher")?,
            first_id: number("first_id")?,
            own_network: value["own_network"].as_bool()?,
            stem: text("stem")?,
            attachment: text("attachment")?,
            partition: number("partition"),
            binds: value["binds"].as_array()?.iter().map(bind_from_json).collect::<Option<_>>()?,
            porter: Porter::from_json(&value["porter"]),
            cgroups: serde_json::from_value(value["cgroups"].clone()).unwrap_or_default(),
            limits: Limits::from_json(&value["limits"]).unwrap_or_default(),
        })
    }
}

fn bind_from_json(value: &Value) -> Option<Bind> {
    let path = |value: &Value| {
        let bytes: Vec<u8> = serde_json::from_value(value.clone()).ok()?;
        Some(PathBuf::from(OsString::from_vec(bytes)))
    };
    Some(Bind { source: path(&value[0])?, target: path(&value[1])?, read_only: value[2].as_bool()? })
}

impl Porter {
    fn from_json(value: &Value) -> Option<Self> {
        let number = |value: &Value| value.as_u64().and_then(|number| u32::try_from(number).ok());
        Some(Self {
            pid: number(&value["pid"])?,
            started: value["started"].as_u64()?,
            spaces: value["spaces"].as_array()?.iter().map(number).collect::<Option<_>>()?,
        })
    }
}

/// The sessions that run at this moment, by name.
///
/// # Errors
/// The directory cannot be read; `Denied` for whoever is not root.
pub fn sessions(directory: &Path) -> Result<Vec<Session>> {
    let mut all = running(&Directory::open(directory)?)?;
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

/// Those that run; what dead launchers have left of theirs is removed.
fn running(directory: &Directory) -> Result<Vec<Session>> {
    let mut all = Vec::new();
    for entry in directory.entries()? {
        if entry.is_abandoned() {
            let session = entry.read().and_then(|value| Session::from_json(entry.id(), &value));
            // What is still there is looked for again.
            if session.is_none_or(|session| cgroup::remove(entry.id(), &session.cgroups)) {
                directory.remove(entry.id());
            }
        } else if let Some(session) = entry.read().and_then(|value| Session::from_json(entry.id(), &value)) {
            all.push(session);
        }
    }
    Ok(all)
}

/// This process's session, written down until this is dropped.
pub(super) struct Written {
    directory: Directory,
    entry: Entry,
    pub(super) session: Session,
}

impl Written {
    /// Writes a session down, with a name and ids that no other one has.
    ///
    /// # Errors
    /// `InUse` if its name is taken, `Invalid` if it cannot be one; what the system says.
    pub(super) fn new(run: &Run) -> Result<Self> {
        let failed = |error: rustix::io::Errno| {
            Error::io("Cannot write the session down", error).on_path(&run.sessions)
        };
        let directory = Directory::open(&run.sessions)?;
        // One at a time chooses.
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let lock = rustix::fs::openat(&directory, ".", flags, Mode::empty()).and_then(|lock| {
            rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
            Ok(lock)
        });
        let _lock = lock.map_err(failed)?;
        let others = running(&directory)?;
        let id = random_name()?;
        let (source, stem) = match &run.source {
            crate::attach::Source::Image { name, path } => (path.display().to_string(), name.clone()),
            crate::attach::Source::Export(uri) => (uri.to_string(), uri.export.replace('@', "-")),
        };
        let name = match &run.name {
            Some(name) => check(name)?.to_owned(),
            None => format!("{}-{}", host_name(&stem), &id[..6]),
        };
        if others.iter().any(|other| other.name == name) {
            return Err(Error::new(ErrorKind::InUse, "There is a session already that is called")
                .on(name)
                .advise("choose another name, or 'memdev enter' it"));
        }
        let first_id = if run.privileged || run.ordinary { 0 } else { first_id(&id, &others)? };
        let entry = directory.create(&id)?;
        let session = Session {
            id,
            name,
            source,
            privileged: run.privileged,
            init: 0,
            init_started: 0,
            launcher: std::process::id(),
            first_id,
            own_network: run.network == super::Network::None,
            stem,
            attachment: String::new(),
            partition: run.partition,
            binds: run.binds.clone(),
            porter: None,
            cgroups: Vec::new(),
            limits: run.limits,
        };
        let written = Self { directory, entry, session };
        written.write()?;
        Ok(written)
    }

    /// Adds where its control groups will be.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn set_cgroups(&mut self, paths: Vec<PathBuf>) -> Result<()> {
        self.session.cgroups = paths;
        self.write()
    }

    /// Adds who is process 1.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn set_init(&mut self, pid: u32) -> Result<()> {
        self.session.init = pid;
        self.session.init_started = started(pid).unwrap_or(0);
        self.write()
    }

    /// Adds what its device is written down under, and of what it is, if that has changed.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn set_attachment(&mut self, id: &str, source: Option<String>) -> Result<()> {
        id.clone_into(&mut self.session.attachment);
        if let Some(source) = source {
            self.session.source = source;
        }
        self.write()
    }

    /// Adds who holds its namespaces.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn set_porter(&mut self, pid: u32, spaces: Vec<u32>) -> Result<()> {
        let started = started(pid).unwrap_or(0);
        self.session.porter = Some(Porter { pid, started, spaces });
        self.write()
    }

    fn write(&self) -> Result<()> {
        let written = self.entry.write_down(&self.session.to_json());
        written.map_err(|error| Error::io("Cannot write the session down", error))
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        self.directory.remove(self.entry.id());
    }
}

fn first_id(id: &str, others: &[Session]) -> Result<u32> {
    let taken: Vec<_> = others.iter().map(|other| other.first_id).collect();
    let from = u32::from_str_radix(&id[..8], 16).unwrap_or(0);
    let slot = ids::free_slot(&taken, from).ok_or_else(|| {
        Error::new(ErrorKind::OutOfSpace, "Every range of ids is taken by a running session")
    })?;
    Ok(ids::first_of(slot))
}

/// When the process began, in the kernel's ticks since the machine did; `None` if there is none of this number.
pub(super) fn started(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything; field 22, the 20th after it.
    text.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

/// What a session may be called: what is a host name, too.
fn check(name: &str) -> Result<&str> {
    let fine = !name.is_empty()
        && name.len() <= NAME_MAX
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
        && !name.starts_with(['-', '.']);
    let bad = || {
        Error::new(ErrorKind::Invalid, format!("A session cannot be called '{name}'"))
            .advise("use up to 64 of A-Z a-z 0-9 - . _")
    };
    fine.then_some(name).ok_or_else(bad)
}

/// The beginning of a host name that is made from anything.
fn host_name(text: &str) -> String {
    let fine = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let name: String = text.chars().map(fine).take(40).collect();
    let name = name.trim_matches('-');
    if name.is_empty() { "root".to_owned() } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attach::Source;

    fn run(directory: &Path, name: Option<&str>) -> Run {
        let mut run = Run::new(Source::Image { name: "Debian 12".into(), path: "/srv/d.img".into() });
        let source = OsString::from_vec(b"/home/\xff".to_vec()).into();
        run.binds = vec![Bind { source, target: "/x".into(), read_only: true }];
        run.sessions = directory.to_owned();
        run.name = name.map(str::to_owned);
        run
    }

    #[test]
    fn a_session_is_found_while_it_runs() {
        let dir = tempfile::tempdir().unwrap();
        let mut written = Written::new(&run(dir.path(), Some("one"))).unwrap();
        written.set_init(std::process::id()).unwrap();
        let found = sessions(dir.path()).unwrap();
        assert_eq!(found, [written.session.clone()]);
        assert!(found[0].init_started > 0);
        written.set_porter(std::process::id(), vec![4, 7]).unwrap();
        written.set_cgroups(vec!["/sys/fs/cgroup/memdev-x".into()]).unwrap();
        assert_eq!(sessions(dir.path()).unwrap(), [written.session.clone()]);
        assert_eq!(sessions(dir.path()).unwrap()[0].porter.as_ref().unwrap().spaces, [4, 7]);
        let error = Written::new(&run(dir.path(), Some("one"))).err().unwrap().to_string();
        assert!(error.contains("already that is called one"), "{error}");
        let other = Written::new(&run(dir.path(), None)).unwrap();
        assert!(other.session.name.starts_with("debian-12-"), "{}", other.session.name);
        assert_ne!(other.session.first_id, written.session.first_id);
        drop((written, other));
        assert_eq!(sessions(dir.path()).unwrap(), []);
        assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
    }

    #[test]
    fn names_are_host_names() {
        for good in ["a", "kiosk-1", "A.b_c", &"x".repeat(64)] {
            assert_eq!(check(good).unwrap(), good);
        }
        for bad in ["", "-a", ".a", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(check(bad).is_err(), "{bad}");
        }
        assert_eq!(host_name("ä//"), "root");
    }
}
