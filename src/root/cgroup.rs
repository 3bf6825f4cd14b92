//! The control group of a private root: its processes are in it from the first on, whatever becomes of them, and it is
//! removed when they have gone.
//!
//! ```text
//!   the launcher's, or the nearest one above it that can have such children
//!    └── memdev-ID     the limits: nobody inside sees that it is there
//!         └── inside   the processes; for them it is "/"
//! ```
//!
//! Two levels, because whoever may write to a group's files can take its limits off: root inside, with `--privileged`, is the
//! owner of the inner one's, and of nothing above it that it could get at.
//!
//! Of version 2 there is one tree for everything; of version 1 one for each controller. Where both are in use the controllers are
//! where they are, and version 2, even without any, is used to kill what is left: it can do so at once. A tree of version 1 for that,
//! `freezer`, is used only where version 2 cannot.
//!
//! The paths are written down with the session before there is anything at them, so that whoever finds the session abandoned
//! removes them ([`super::record`]).

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::Access;
use rustix::process::{Pid, Signal};

use super::limits::{Limits, Swap};
use crate::error::{Error, ErrorKind, Result};
use crate::swap;

/// The group that the processes are in.
const INNER: &str = "inside";

/// The controllers that are made use of.
const CONTROLLERS: [&str; 2] = ["memory", "pids"];

/// How long killed processes may take to leave.
const PATIENCE: Duration = Duration::from_secs(1);

/// A tree of groups, as this process sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Tree {
    is_second: bool,
    /// Which controllers version 1 has in it. (Version 2 tells in each group.)
    controllers: Vec<String>,
    /// Where it is mounted, and this process's group in it.
    top: PathBuf,
    own: PathBuf,
}

/// The trees in mount table `mounts`, as `/proc/self/mountinfo` has it, with this process's places in them, as
/// `/proc/self/cgroup` has these.
fn trees(mounts: &str, places: &str) -> Vec<Tree> {
    let mut found: Vec<Tree> = Vec::new();
    let places: HashMap<&str, &str> = places
        .lines()
        .filter_map(|line| line.split_once(':')?.1.split_once(':'))
        .flat_map(|(controllers, path)| controllers.split(',').map(move |controller| (controller, path)))
        .collect();
    for line in mounts.lines() {
        let Some((front, back)) = line.split_once(" - ") else { continue };
        let (front, back): (Vec<_>, Vec<_>) = (front.split(' ').collect(), back.split(' ').collect());
        let ([_, _, _, root, top, ..], [kind, _, settings, ..]) = (&front[..], &back[..]) else { continue };
        let (is_second, controllers) = match *kind {
            "cgroup2" => (true, Vec::new()),
            "cgroup" => (false, settings.split(',').filter(|name| places.contains_key(name)).collect()),
            _ => continue,
        };
        let Some(place) = places.get(controllers.first().copied().unwrap_or("")) else { continue };
        // Where a part of the tree is mounted, it must be one that this process is in.
        let Ok(below) = Path::new(place).strip_prefix(root) else { continue };
        let top = PathBuf::from(top);
        // Several mounts of one tree are the same, and the first one may be hidden by a later one.
        found.retain(|tree| is_second != tree.is_second || tree.controllers != controllers);
        let controllers = controllers.into_iter().map(str::to_owned).collect();
        found.push(Tree { is_second, controllers, own: top.join(below), top });
    }
    found
}

/// A group that is to be made, or has been.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    path: PathBuf,
    is_second: bool,
    controllers: Vec<String>,
}

/// Where a session's groups will be.
#[derive(Clone, Debug, Default)]
pub(super) struct Places {
    groups: Vec<Group>,
    /// Why there are none, if so.
    lacking: Option<String>,
}

impl Places {
    /// Finds places for the groups of the session `id`. Makes nothing, but may have the kernel allow that there is one.
    pub(super) fn find(id: &str) -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let all = trees(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"));
        if all.is_empty() {
            let lacking = Some("the machine has no control groups mounted".to_owned());
            return Self { groups: Vec::new(), lacking };
        }
        let name = format!("memdev-{id}");
        let mut groups = Vec::new();
        let second = all.iter().find(|tree| tree.is_second);
        if let Some((parent, controllers)) = second.and_then(parent_of_second) {
            groups.push(Group { path: parent.join(&name), is_second: true, controllers });
        }
        // The ones of version 1, for what version 2 does not have.
        let kept = second.map(|tree| common(&tree.top, "cgroup.controllers")).unwrap_or_default();
        let mut wanted = CONTROLLERS.to_vec();
        wanted.retain(|name| !kept.iter().any(|kept| kept == name));
        if groups.is_empty() || !second_can_kill() {
            wanted.push("freezer");
        }
        for tree in all.iter().filter(|tree| !tree.is_second) {
            let has: Vec<_> =
                tree.controllers.iter().filter(|name| wanted.contains(&&***name)).cloned().collect();
            if !has.is_empty() && may_write(&tree.own) {
                groups.push(Group { path: tree.own.join(&name), is_second: false, controllers: has });
            }
        }
        let lacking = groups.is_empty().then(|| "none is delegated to this user".to_owned());
        Self { groups, lacking }
    }

    /// The paths of the groups.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.groups.iter().map(|group| group.path.clone()).collect()
    }
}

/// Those of the [`CONTROLLERS`] that the file names.
fn common(group: &Path, file: &str) -> Vec<String> {
    let text = fs::read_to_string(group.join(file)).unwrap_or_default();
    text.split_whitespace().filter(|name| CONTROLLERS.contains(name)).map(str::to_owned).collect()
}

fn may_write(path: &Path) -> bool {
    rustix::fs::access(path, Access::WRITE_OK).is_ok()
}

/// Whether version 2 can kill all that is in a group.
fn second_can_kill() -> bool {
    let name = rustix::system::uname();
    let mut numbers =
        name.release().to_str().unwrap_or_default().split(['.', '-', '+']).map(str::parse::<u32>);
    let mut next = || numbers.next().and_then(std::result::Result::ok).unwrap_or(0);
    (next(), next()) >= (5, 14)
}

/// The nearest group, from this process's own upwards, whose children can be limited, or made to; and by which controllers. One
/// with processes in it cannot, unless it is the topmost. A process is moved to another group by who may write to the nearest
/// one above both, which is this one.
fn parent_of_second(tree: &Tree) -> Option<(PathBuf, Vec<String>)> {
    let wanted = common(&tree.top, "cgroup.controllers");
    let usable = |group: &&Path| may_write(group) && may_write(&group.join("cgroup.procs"));
    let above = || tree.own.ancestors().take_while(|group| group.starts_with(&tree.top)).filter(usable);
    for group in above() {
        let available = common(group, "cgroup.controllers");
        if available.len() < wanted.len() {
            continue;
        }
        let given = common(group, "cgroup.subtree_control");
        let missing: Vec<_> = wanted.iter().filter(|name| !given.contains(name)).collect();
        let words: String = missing.iter().map(|name| format!("+{name} ")).collect();
        if missing.is_empty() || put(&group.join("cgroup.subtree_control"), words.trim_end()).is_ok() {
            return Some((group.to_owned(), wanted));
        }
    }
    // It can still be killed as a whole.
    above().next().map(|group| (group.to_owned(), common(group, "cgroup.subtree_control")))
}

/// A session's groups. They are removed when this is dropped, and before that whatever is in them killed.
#[derive(Debug)]
pub(super) struct Cgroup {
    groups: Vec<Group>,
    /// What a process writes to that goes into the inner ones: opened by the launcher, whose rights the kernel asks for, whoever
    /// writes to them.
    doors: Vec<OwnedFd>,
    /// The door of version 2, and that group itself, for who is made in it.
    second: Option<(OwnedFd, OwnedFd)>,
    lacking: Option<String>,
    /// Why what is inside may be swapped out, though it should not.
    swappable: Option<String>,
}

impl Cgroup {
    /// Makes the groups, with these limits.
    ///
    /// # Errors
    /// `Unsupported` if a limit cannot be had.
    pub(super) fn make(places: Places, limits: &Limits) -> Result<Self> {
        let Places { groups, lacking } = places;
        let mut cgroup = Self { groups, doors: Vec::new(), second: None, lacking, swappable: None };
        if let Err(error) = cgroup.make_groups(limits) {
            if limits.pids.or(limits.memory).is_some() || limits.swap == Swap::Never {
                return Err(error);
            }
            // Without a limit it is no more than order. What was made is removed.
            let (groups, doors, lacking) = (Vec::new(), Vec::new(), Some(error.to_string()));
            cgroup = Self { groups, doors, second: None, lacking, swappable: None };
        }
        cgroup.check(limits)?;
        Ok(cgroup)
    }

    fn make_groups(&mut self, limits: &Limits) -> Result<()> {
        let (mut promised, mut why) = (false, "the kernel has no memory controller here".to_owned());
        for group in &self.groups {
            let failed =
                |error: io::Error| Error::io("Cannot make control group", error).on_path(&group.path);
            fs::create_dir(&group.path).map_err(failed)?;
            if group.has("pids")
                && let Some(pids) = limits.pids
            {
                group.set("pids.max", &pids.to_string())?;
            }
            if group.has("memory") {
                // Before the inner one is made, which takes over how willingly it is swapped.
                (promised, why) = group.limit_memory(limits)?;
            }
            let inner = group.path.join(INNER);
            fs::create_dir(&inner).map_err(failed)?;
            let door = File::options().write(true).open(door_of(&inner)).map_err(failed)?.into();
            if group.is_second {
                self.second = Some((door, File::open(&inner).map_err(failed)?.into()));
            } else {
                self.doors.push(door);
            }
        }
        self.swappable = (!promised && limits.swap != Swap::Allow).then_some(why);
        Ok(())
    }

    /// Whether everything that was asked for is there.
    fn check(&mut self, limits: &Limits) -> Result<()> {
        let has = |controller: &str| self.groups.iter().any(|group| group.has(controller));
        let asked =
            [("pids", limits.pids.is_some(), "processes"), ("memory", limits.memory.is_some(), "memory")];
        for (controller, is_asked, what) in asked {
            if is_asked && !has(controller) {
                let why =
                    self.lacking.clone().unwrap_or_else(|| format!("there is no {controller} controller"));
                let error = Error::new(ErrorKind::Unsupported, format!("Cannot limit {what}: {why}"));
                return Err(error.advise("start it by 'systemd-run --user --scope', or as root"));
            }
        }
        if self.groups.is_empty() && limits.swap != Swap::Allow {
            self.swappable = Some("there is no control group for it".to_owned());
        }
        match &self.swappable {
            Some(why) if limits.swap == Swap::Never => {
                let why = format!("Cannot promise that nothing is swapped out: {why}");
                // Whatever there is to swap to at this moment: somebody may turn some on later.
                Err(Error::new(ErrorKind::Unsupported, why)
                    .advise("use --swap avoid, which does what can be done"))
            }
            _ => Ok(()),
        }
    }

    /// The group of version 2, if there is one: a process that is made in it need not be moved, for which the kernel would
    /// wait until no process of the machine is just being made or ending, some 10 ms.
    pub(super) fn birthplace(&self) -> Option<BorrowedFd<'_>> {
        self.second.as_ref().map(|(_, group)| group.as_fd())
    }

    /// Puts the calling process, which has one thread, in; into that of version 2 only if it was not `born_inside`.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn take_in(&self, born_inside: bool) -> Result<()> {
        let enter = |door: &OwnedFd| File::from(door.try_clone()?).write_all(b"0");
        let second = self.second.iter().filter(|_| !born_inside).map(|(door, _)| door);
        second
            .chain(&self.doors)
            .try_for_each(enter)
            .map_err(|error| Error::io("Cannot enter the control group", error))
    }

    /// What it takes to get in.
    pub(super) fn doors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let second = self.second.iter().flat_map(|(door, group)| [door, group]);
        second.chain(&self.doors).map(AsFd::as_fd)
    }

    /// What a session has not that it should have, on this machine as it is: for people, if there is anything.
    pub(super) fn shortfall(&self) -> Option<String> {
        let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
        let swappable = self.swappable.as_deref().filter(|_| swap::areas(&swaps).next().is_some());
        match (&self.lacking, swappable) {
            (None, None) => None,
            (Some(why), None) => Some(format!("no control group of its own ({why})")),
            (Some(why), Some(_)) => {
                Some(format!("no control group of its own ({why}), so what is in memory may be swapped out"))
            }
            (None, Some(why)) => Some(format!("what its processes have in memory may be swapped out: {why}")),
        }
    }

    fn paths(&self) -> Vec<PathBuf> {
        self.groups.iter().map(|group| group.path.clone()).collect()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if !remove_all(&self.paths()) {
            tracing::warn!("A control group of the session is still there");
        }
    }
}

impl Group {
    fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|name| name == controller)
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        let path = self.path.join(file);
        put(&path, value).map_err(|error| Error::io("Cannot write to", error).on_path(path))
    }

    /// Gives whether nothing will be swapped out, and why not.
    fn limit_memory(&self, limits: &Limits) -> Result<(bool, String)> {
        let (limit, for_both) = match self.is_second {
            true => ("memory.max", None),
            false => {
                ("memory.limit_in_bytes", limits.memory.map(|bytes| ("memory.memsw.limit_in_bytes", bytes)))
            }
        };
        if let Some(bytes) = limits.memory {
            self.set(limit, &bytes.to_string())?;
        }
        if limits.swap == Swap::Allow {
            return Ok((false, String::new()));
        }
        if self.is_second {
            return Ok(match self.set("memory.swap.max", "0") {
                Ok(()) => (true, String::new()),
                Err(_) => (false, "the kernel does not limit swap by group".to_owned()),
            });
        }
        // With no more for memory and swap together than for memory alone, the group's own limit swaps nothing out; nor does
        // the machine's, as long as there is anything else to be had. More than that version 1 does not have.
        if let Some((file, bytes)) = for_both {
            let _ = self.set(file, &bytes.to_string());
        }
        let _ = self.set("memory.swappiness", "0");
        Ok((false, "version 1 of control groups cannot keep a group from it".to_owned()))
    }
}

/// The file of `group` that a process with one thread writes to when it goes in. In version 1 that is the threads' one: for a
/// thread that moves itself the kernel waits for nobody.
fn door_of(group: &Path) -> PathBuf {
    let threads = group.join("tasks");
    if threads.exists() { threads } else { group.join("cgroup.procs") }
}

/// Puts the calling process, which has one thread, into groups that a session has.
///
/// # Errors
/// What the kernel says.
pub(super) fn enter(paths: &[PathBuf]) -> Result<()> {
    paths.iter().map(|path| door_of(&path.join(INNER))).try_for_each(|path| {
        let failed = |error| Error::io("Cannot enter the session's control group", error).on_path(&path);
        put(&path, "0").map_err(failed)
    })
}

/// Removes the groups that the session `id` had, with all that is in them. Whether they are gone.
pub(super) fn remove(id: &str, paths: &[PathBuf]) -> bool {
    let name = format!("memdev-{id}");
    // What is written down cannot make this kill anybody else.
    let own: Vec<_> = paths.iter().filter(|path| path.file_name() == Some(name.as_ref())).cloned().collect();
    remove_all(&own)
}

fn remove_all(paths: &[PathBuf]) -> bool {
    let start = Instant::now();
    loop {
        // What kills them waits for none of them.
        let there: Vec<_> = paths.iter().filter(|path| path.exists()).collect();
        there.iter().for_each(|path| kill_all(path));
        let left = there.iter().filter(|path| remove_tree(path).is_err()).count();
        if left == 0 || start.elapsed() >= PATIENCE {
            return left == 0;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Writes to a file of the kernel's; never makes one, where there is none.
fn put(path: &Path, value: &str) -> io::Result<()> {
    File::options().write(true).open(path)?.write_all(value.as_bytes())
}

/// Kills every process in the group and below.
fn kill_all(group: &Path) {
    if put(&group.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    // Not to be thawed before they are killed, so that none makes another one meanwhile.
    let state = group.join("freezer.state");
    let _ = put(&state, "FROZEN");
    for path in inner_first(group) {
        let text = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
        for pid in text.lines().filter_map(|line| line.parse().ok()).filter_map(Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
    let _ = put(&state, "THAWED");
}

/// The group and all below it, each after what is below it.
fn inner_first(group: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            all.extend(inner_first(&entry.path()));
        }
    }
    all.push(group.to_owned());
    all
}

fn remove_tree(group: &Path) -> io::Result<()> {
    inner_first(group).iter().try_for_each(|path| match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
24 1 0:20 / / rw - ext4 /dev/vda rw
30 24 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro
31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 30 0:29 /docker/x /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
34 30 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 30 0:31 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
36 30 0:32 /other /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
";

    const PLACES: &str = "\
5:memory:/jobs/one
4:pids:/docker/x/y
3:cpu,cpuacct:/
2:freezer:/elsewhere
1:name=systemd:/init.scope
0::/user.slice/user-0.slice
";

    #[test]
    fn trees_are_found_with_ones_own_place_in_them() {
        let found = trees(MOUNTS, PLACES);
        let show = |tree: &Tree| format!("{} {}", tree.controllers.join(","), tree.own.display());
        let expected = [
            " /sys/fs/cgroup/unified/user.slice/user-0.slice",
            "memory /sys/fs/cgroup/memory/jobs/one",
            "pids /sys/fs/cgroup/pids/y",
            "cpu,cpuacct /sys/fs/cgroup/cpu,cpuacct/",
            "name=systemd /sys/fs/cgroup/systemd/init.scope",
        ];
        assert_eq!(found.iter().map(show).collect::<Vec<_>>(), expected);
        assert_eq!(
            found.iter().map(|tree| tree.is_second).collect::<Vec<_>>(),
            [true, false, false, false, false]
        );
        assert!(trees("", PLACES).is_empty() && trees(MOUNTS, "").is_empty());
    }

    #[test]
    fn only_a_sessions_own_groups_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (own, other) = (dir.path().join("memdev-a"), dir.path().join("memdev-b"));
        for path in [&own, &other] {
            fs::create_dir_all(path.join(INNER).join("deeper")).unwrap();
        }
        assert!(remove("a", &[own.clone(), other.clone()]));
        assert!(!own.exists() && other.exists());
        assert!(remove("a", &[own]), "that it has gone is fine");
    }

    #[test]
    fn what_cannot_be_had_is_refused_only_if_it_was_asked_for() {
        let none = || Places { groups: Vec::new(), lacking: Some("none is delegated".to_owned()) };
        let make = |pids, memory, swap| Cgroup::make(none(), &Limits { pids, memory, swap });
        let cgroup = make(None, None, Swap::Avoid).unwrap();
        assert!(cgroup.shortfall().unwrap().starts_with("no control group of its own (none is delegated)"));
        assert!(cgroup.swappable.is_some());
        assert!(make(None, None, Swap::Allow).unwrap().swappable.is_none());
        let text = |made: Result<Cgroup>| made.err().unwrap().to_string();
        assert!(text(make(Some(9), None, Swap::Allow)).contains("Cannot limit processes: none is delegated"));
        assert!(text(make(None, Some(1 << 30), Swap::Allow)).contains("Cannot limit memory"));
        assert!(text(make(None, None, Swap::Never)).contains("Cannot promise"));
    }
}
