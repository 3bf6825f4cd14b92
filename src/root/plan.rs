//! The steps by which a private root is made, in their order, and who does each. What is printed by `--dry-run` is what
//! is done.
//!
//! # Why this order
//!
//! - *The root is attached and exchanged in a mount namespace of the host's user, and copied into one of the session's
//!   after that.* A mount that is moved into the session's own namespace keeps flags that can be cleared there, `nodev`
//!   among them; a copy across users has every flag locked, and every mount, so that what is below cannot be uncovered.
//! - *Process 1 begins before the root is exchanged*, because its process namespace is needed for `/proc`, and leaves the
//!   host's tree with the mounter; but its working directory does not, and is set to the new root before anything else.
//! - *`/proc` and `/sys` are made by the mounter*, in the namespaces of process 1: the session's own user may mount them
//!   only where they are to be seen already, and what it has mounted it could unmount. The same goes for a mounter without
//!   the rights of root: so they are made while the host's are to be seen still.
//! - *The device's daemon is outside of all of it*: in a namespace whose root it serves, it would wait for itself.

use std::fmt;

use super::{Network, Run};
use crate::attach::Source;

/// Who does a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Actor {
    Launcher,
    Mounter,
    Init,
}

impl Actor {
    fn name(self) -> &'static str {
        match self {
            Self::Launcher => "launcher",
            Self::Mounter => "mounter",
            Self::Init => "init",
        }
    }
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The session is written down, its ids chosen.
    WriteDown,
    /// The control group.
    MakeCgroup,
    /// A block device of the copy.
    Attach,
    /// The user namespace.
    MakeIds,
    /// The mounter begins.
    StartMounter,
    /// The mounter leaves the host's mount namespace for a copy of it.
    LeaveMounts,
    /// The file system is mounted in no tree.
    MountImage,
    /// The host's device nodes are copied, each as a mount of its own.
    CopyDevices,
    /// What is to be seen of the host is copied.
    CopyBind(usize),
    /// Process 1 begins, in its namespaces.
    StartInit,
    /// `/proc` and `/sys`, in no tree.
    MakeKernel,
    /// The file system becomes the root, the host's tree disappears.
    ExchangeRoot,
    /// Directories for what is mounted next.
    MakePlaces,
    /// `/proc` and `/sys` are put in their places.
    PutKernel,
    /// What is to be seen of the host is put in its place.
    PutBind(usize),
    /// Process 1 copies the mount table into a namespace of its own.
    LockMounts,
    /// A process holds the namespaces, for those who enter.
    StartPorter,
    /// What is in memory is mounted, empty.
    MountMemory,
    /// `/dev` and `/run` get what is in them.
    FillPlaces,
    /// What is mounted in the session that this is a fork of.
    CopyMounts,
    /// What user 0 could do without capabilities.
    CoverUp,
    /// The loopback interface.
    BringUpLoopback,
    /// The host name.
    SetHostname,
    /// What is carried is filled in, and watched from now on.
    StartCarriers,
    /// The mounter ends, and nobody outside holds the device any more.
    LetGo,
    /// Capabilities.
    GiveUp,
    /// The command.
    StartCommand,
    /// No command: process 1 waits until it is ended.
    Hold,
}

impl Step {
    pub(super) fn actor(self) -> Actor {
        match self {
            Self::WriteDown
            | Self::MakeCgroup
            | Self::Attach
            | Self::MakeIds
            | Self::StartMounter
            | Self::StartPorter
            | Self::StartCarriers
            | Self::LetGo => Actor::Launcher,
            Self::LeaveMounts
            | Self::MountImage
            | Self::CopyDevices
            | Self::CopyBind(_)
            | Self::StartInit
            | Self::MakeKernel
            | Self::ExchangeRoot
            | Self::PutKernel
            | Self::PutBind(_)
            | Self::MountMemory => Actor::Mounter,
            Self::MakePlaces
            | Self::LockMounts
            | Self::FillPlaces
            | Self::CopyMounts
            | Self::CoverUp
            | Self::BringUpLoopback
            | Self::SetHostname
            | Self::GiveUp
            | Self::StartCommand
            | Self::Hold => Actor::Init,
        }
    }

    /// The step for people.
    fn describe(self, run: &Run) -> String {
        let shifted = if run.privileged { "" } else { ", its owners shifted to the session's ids" };
        match self {
            Self::WriteDown => format!("write the session down in {}", run.sessions.display()),
            Self::Attach => {
                let what = match &run.source {
                    Source::Image { path, .. } => format!("a private copy of {}", path.display()),
                    Source::Export(uri) => uri.to_string(),
                };
                if let Some(of) = &run.of {
                    return format!(
                        "freeze the file system of {}, fork its disk ({what}), thaw; attach the fork as a block device, \
                         which ends with the launcher",
                        of.name
                    );
                }
                let part = run.partition.map(|n| format!("partition {n} of ")).unwrap_or_default();
                if run.ordinary {
                    return format!(
                        "serve {part}{what} as a file by FUSE, and the ext4 in it by fuse2fs, each in a mount \
                         namespace apart; both end with the launcher"
                    );
                }
                format!("attach {part}{what} as a block device, whose daemon ends with the launcher")
            }
            Self::MakeCgroup => {
                let limits = run.limits.describe();
                let limits = if limits.is_empty() { limits } else { format!(": {limits}") };
                let whether = if run.ordinary { ", if one is delegated to this user" } else { "" };
                format!("make a control group for its processes{whether}{limits}; no core files from now on")
            }
            Self::MakeIds if run.ordinary => {
                "make a user namespace of this user's subordinate ids, by newuidmap \
                and newgidmap; without any, of this user's own"
                    .to_owned()
            }
            Self::MakeIds => "make a user namespace of 65536 ids that nobody has outside".to_owned(),
            Self::StartMounter => "start the mounter".to_owned(),
            Self::LeaveMounts if run.ordinary => {
                "enter the user namespace, leave the host's mount namespace for a private copy".to_owned()
            }
            Self::LeaveMounts => "leave the host's mount namespace for a private copy".to_owned(),
            Self::MountImage if run.ordinary => "take over the mount of fuse2fs, in no tree".to_owned(),
            Self::MountImage => format!("mount the device, in no tree, without device nodes{shifted}"),
            Self::CopyDevices => {
                format!("copy the mounts of /dev/{{{}}}, read-only", super::places::DEVICES.join(","))
            }
            Self::CopyBind(n) => {
                let bind = &run.binds[n];
                let how = if bind.read_only { ", read-only" } else { "" };
                format!("copy the mounts of {}, without device nodes and setuid{how}", bind.source.display())
            }
            Self::StartInit => {
                let network = if run.network == Network::None { ", network" } else { "" };
                let user = match (run.privileged, run.ordinary) {
                    (true, _) => "",
                    (_, true) => ", in a user namespace below that, of the same ids",
                    _ => ", in the user namespace",
                };
                format!(
                    "start process 1 in the control group, in its own namespaces of processes, ipc, names, cgroups{network}{user}"
                )
            }
            Self::ExchangeRoot => "make the file system the root (pivot_root), detach the host's".to_owned(),
            Self::MakePlaces => "leave the host's working directory, make directories to mount on".to_owned(),
            Self::MakeKernel if run.ordinary && run.network == Network::Host => {
                "make /proc for the namespaces of process 1, copy the mounts of /sys, read-only".to_owned()
            }
            Self::MakeKernel => "make /proc and a read-only /sys, for the namespaces of process 1".to_owned(),
            Self::PutKernel => "mount them".to_owned(),
            Self::PutBind(n) => format!("mount the copy on {}", run.binds[n].target.display()),
            Self::LockMounts => {
                "copy the mount table into a namespace of its own, which locks all flags".to_owned()
            }
            Self::StartPorter => "hold the session's namespaces, for 'memdev enter'".to_owned(),
            Self::MountMemory => {
                "mount /dev, /dev/shm, /run and /tmp in memory, which is not swapped out where the kernel has that".to_owned()
            }
            Self::FillPlaces => "put the copied nodes and /dev/pts into /dev".to_owned(),
            Self::CopyMounts => {
                let of = run.of.as_ref().map_or("", |of| &*of.name);
                format!("mount anew what is mounted in {of}, with a copy of what is in memory there")
            }
            Self::CoverUp => "cover the host-wide settings of /proc".to_owned(),
            Self::BringUpLoopback => "bring up the loopback interface".to_owned(),
            Self::SetHostname => match &run.hostname {
                Some(name) => format!("set the host name to {name}"),
                None => "set the host name to the session's name".to_owned(),
            },
            Self::StartCarriers => {
                let all = run.carrying.carries.iter();
                let all = all.map(|carry| format!("{} from {}", carry.path.display(), carry.destination));
                format!("fill {}, start who delivers there what changes", all.collect::<Vec<_>>().join(", "))
            }
            Self::LetGo => "end the mounter, let go of the disk".to_owned(),
            Self::GiveUp => "give up all capabilities that reach the host or make device nodes".to_owned(),
            Self::Hold => "wait for those who enter".to_owned(),
            Self::StartCommand => {
                let words: Vec<_> = run.command.iter().map(|word| word.to_string_lossy()).collect();
                let command = if words.is_empty() { "the shell".into() } else { words.join(" ") };
                let user = run.user.as_deref().unwrap_or("root");
                format!("start {command} as {user}")
            }
        }
    }
}

/// All steps of one private root, in their order. Shown, it is a numbered list with who does each.
#[derive(Clone, Debug)]
pub struct Plan {
    steps: Vec<Step>,
    lines: Vec<String>,
}

impl Plan {
    pub(super) fn of(run: &Run) -> Self {
        let mut steps = vec![Step::WriteDown];
        let binds = || 0..run.binds.len();
        let mut when = |condition: bool, step: Step| {
            if condition {
                steps.push(step);
            }
        };
        when(true, Step::MakeCgroup);
        // What serves the disk of an ordinary user is in the namespace, too.
        when(run.ordinary, Step::MakeIds);
        when(true, Step::Attach);
        when(!run.privileged && !run.ordinary, Step::MakeIds);
        when(true, Step::StartMounter);
        when(true, Step::LeaveMounts);
        when(true, Step::MountImage);
        when(true, Step::CopyDevices);
        binds().for_each(|n| when(true, Step::CopyBind(n)));
        when(true, Step::StartInit);
        when(true, Step::MakeKernel);
        when(true, Step::ExchangeRoot);
        when(true, Step::MakePlaces);
        when(true, Step::PutKernel);
        binds().for_each(|n| when(true, Step::PutBind(n)));
        when(true, Step::MountMemory);
        when(true, Step::LockMounts);
        when(run.ordinary, Step::StartPorter);
        when(true, Step::FillPlaces);
        when(run.of.is_some(), Step::CopyMounts);
        when(run.privileged, Step::CoverUp);
        when(run.network == Network::None, Step::BringUpLoopback);
        when(true, Step::SetHostname);
        when(!run.carrying.carries.is_empty(), Step::StartCarriers);
        when(true, Step::LetGo);
        when(run.privileged, Step::GiveUp);
        when(true, if run.holds { Step::Hold } else { Step::StartCommand });
        let lines = steps.iter().map(|step| step.describe(run)).collect();
        Self { steps, lines }
    }

    pub(super) fn steps(&self) -> &[Step] {
        &self.steps
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (step, line)) in self.steps.iter().zip(&self.lines).enumerate() {
            writeln!(f, "{:2}  {:8}  {line}", n + 1, step.actor().name())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> Run {
        let source = Source::Image { name: "root".into(), path: "/srv/root.img".into() };
        Run { ordinary: false, ..Run::new(source) }
    }

    fn at(plan: &Plan, step: Step) -> usize {
        plan.steps.iter().position(|&other| other == step).unwrap()
    }

    #[test]
    fn the_order_is_the_safe_one() {
        let plan = run().plan();
        // Else flags could be cleared from inside.
        assert!(at(&plan, Step::ExchangeRoot) < at(&plan, Step::LockMounts));
        // Else they could be unmounted, and the host's would be below.
        assert!(at(&plan, Step::PutKernel) < at(&plan, Step::LockMounts));
        // Else it might be swapped out.
        assert!(at(&plan, Step::MountMemory) < at(&plan, Step::LockMounts));
        assert!(at(&plan, Step::StartInit) < at(&plan, Step::ExchangeRoot));
        assert_eq!(plan.steps.last(), Some(&Step::StartCommand));
        assert!(!plan.steps.contains(&Step::GiveUp));
        let plan = Run { ordinary: true, ..run() }.plan();
        assert!(at(&plan, Step::MakeIds) < at(&plan, Step::Attach));
        // Else it may not mount it.
        assert!(at(&plan, Step::MakeKernel) < at(&plan, Step::ExchangeRoot));
    }

    #[test]
    fn nothing_runs_with_the_hosts_rights() {
        let plan = Run { privileged: true, ..run() }.plan();
        assert!(at(&plan, Step::CoverUp) < at(&plan, Step::GiveUp));
        assert!(at(&plan, Step::GiveUp) < at(&plan, Step::StartCommand));
        assert!(!plan.steps.contains(&Step::MakeIds));
    }

    #[test]
    fn a_root_that_is_held_starts_nothing() {
        let held = Run { holds: true, ..run() }.plan();
        assert_eq!(held.steps.last(), Some(&Step::Hold));
        assert!(!held.steps.contains(&Step::StartCommand));
    }

    #[test]
    fn it_is_printed_as_a_list() {
        let bind = super::super::Bind { source: "/home/a".into(), target: "/home/b".into(), read_only: true };
        let text = Run { binds: vec![bind], ..run() }.plan().to_string();
        assert!(text.starts_with(" 1  launcher  write the session down"), "{text}");
        assert!(text.contains("copy the mounts of /home/a, without device nodes and setuid, read-only\n"));
        assert!(text.contains("mounter   mount the copy on /home/b\n"), "{text}");
        assert_eq!(text.lines().count(), run().plan().steps.len() + 2);
    }
}
