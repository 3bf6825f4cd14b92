//! The mounter: a process with the host's rights in a copy of the host's mount table, in which it puts the session's root
//! in the host's place.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};
use serde_json::json;

use super::cgroup::Cgroup;
use super::device::Medium;
use super::launcher::World;
use super::mounts::{self, NODEV, NOEXEC, NOSUID, RDONLY};
use super::plan::Step;
use super::talk::{self, Yield};
use super::{Bind, Network, child, ids, init, places, reach};
use crate::attach::{Source, control};
use crate::error::{Error, ErrorKind, Result};
use crate::sys;

/// What has been made and has no place yet.
struct Mounter<'a> {
    world: &'a World<'a>,
    /// Process 1's end of what it hears the launcher by, until it has been started.
    init_channel: Option<OwnedFd>,
    root: Option<OwnedFd>,
    devices: Vec<(&'static str, OwnedFd)>,
    binds: Vec<OwnedFd>,
    /// `/proc` and `/sys`.
    kernel: Vec<OwnedFd>,
    /// Those of process 1 that decide what `/proc` and `/sys` show: of processes, and network.
    spaces: Vec<OwnedFd>,
}

/// Does what the launcher asks for, until it asks no more.
///
/// # Errors
/// That the launcher is not to be heard.
pub(super) fn serve(world: &World<'_>, channel: &OwnedFd, init_channel: OwnedFd) -> Result<()> {
    let init_channel = Some(init_channel);
    let (root, devices, binds, kernel, spaces) = (None, Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut mounter = Mounter { world, init_channel, root, devices, binds, kernel, spaces };
    while let Some((step, ..)) = talk::next(channel.as_fd(), world.plan)? {
        talk::answer(channel.as_fd(), mounter.perform(step))?;
    }
    Ok(())
}

impl Mounter<'_> {
    fn perform(&mut self, step: Step) -> Result<Yield> {
        let world = self.world;
        match step {
            Step::LeaveMounts => {
                if let Some(ids) = world.ids.filter(|_| world.run.ordinary) {
                    // Only there may it have a mount namespace, and mount in it.
                    enter(&ids.namespace)?;
                }
                sys::process::leave_mount_namespace()
                    .map_err(|error| Error::io("Cannot get a mount namespace", error))?;
                mounts::make_private()?;
            }
            Step::MountImage => {
                let ids = world.ids.map(|ids| ids.namespace.as_fd());
                self.root = Some(match world.disk.medium.as_ref().ok_or_else(out_of_order)? {
                    Medium::Device { path, kind } => {
                        let is_copy = matches!(world.run.source, Source::Image { .. });
                        mounts::image(path, *kind, (world.disk.read_only, is_copy), ids)?
                    }
                    Medium::Tree(mount) => mount
                        .try_clone()
                        .map_err(|error| Error::io("Cannot take over the mount of the root", error))?,
                });
            }
            Step::CopyDevices => self.devices = places::copy_devices()?,
            Step::CopyBind(n) => {
                let shifted = !world.run.privileged && !world.run.ordinary;
                let first_id = shifted.then_some(world.session.first_id);
                self.binds.push(copy_bind(&world.run.binds[n], first_id, world.run.binds_by_roots_links)?);
            }
            Step::StartInit => return self.start_init(),
            Step::ExchangeRoot => {
                let root = self.root.take().ok_or_else(out_of_order)?;
                mounts::pivot(root.as_fd(), &world.run.sessions)?;
            }
            Step::MakeKernel => self.kernel = self.make_kernel()?,
            Step::PutKernel => {
                for (mount, place) in self.kernel.iter().zip(["/proc", "/sys"]) {
                    mounts::attach(mount.as_fd(), Path::new(place))?;
                }
            }
            Step::PutBind(n) => {
                let target = places::from_root(&world.run.binds[n].target);
                mounts::attach(self.binds[n].as_fd(), &target)?;
            }
            // An ordinary user's mounter is root among the ids that the session has.
            Step::MountMemory => {
                let shifted = !world.run.privileged && !world.run.ordinary;
                places::mount_memory(if shifted { world.session.first_id } else { 0 })?;
            }
            _ => return Err(out_of_order()),
        }
        Ok(talk::done())
    }

    /// Process 1 is made by way of another process, which takes on the session's ids and namespaces first, and tells the
    /// number.
    fn start_init(&mut self) -> Result<Yield> {
        let failed = |error| Error::io("Cannot start process 1", error);
        let channel = self.init_channel.take().ok_or_else(out_of_order)?;
        // The session's own, of the same ids where this process is in that of an ordinary user: so its root has no rights
        // over what was mounted here, nor over who serves it.
        let nested = match self.world.ids {
            Some(ids) if self.world.run.ordinary => Some(ids.nested()?),
            _ => None,
        };
        let ids = nested.as_ref().or(self.world.ids.map(|ids| &ids.namespace));
        let (ours, theirs) = control::pair().map_err(failed)?;
        let group = self.world.cgroup.and_then(Cgroup::birthplace);
        let helper = child::start_sibling_in(group, |inside| {
            talk::answer(theirs.as_fd(), self.make_init(ids, channel, inside))
        })
        .map_err(failed)?;
        drop(theirs);
        let died = || Error::new(ErrorKind::Io, "A process that makes the private root has died");
        let (mut told, spaces) = control::receive(ours.as_fd()).map_err(failed)?.ok_or_else(died)?;
        if let Some(error) = control::error_from_json(&told) {
            return Err(error);
        }
        self.spaces = spaces;
        told["helper"] = json!(helper.as_raw_nonzero());
        Ok((told, Vec::new()))
    }

    /// Gives the number of process 1, and two of its namespaces: into a process that nobody may look into, the mounter of an
    /// ordinary user has no other way.
    fn make_init(&self, ids: Option<&OwnedFd>, channel: OwnedFd, born_inside: bool) -> Result<Yield> {
        let world = self.world;
        // Its namespace of control groups begins at the one that it is in.
        world.cgroup.map_or(Ok(()), |cgroup| cgroup.take_in(born_inside))?;
        if let Some(ids) = ids {
            enter(ids)?;
            ids::become_root().map_err(|error| Error::io("Cannot become root in it", error))?;
        }
        let mut flags =
            UnshareFlags::NEWPID | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWCGROUP;
        flags.set(UnshareFlags::NEWNET, world.run.network == Network::None);
        sys::process::unshare(flags).map_err(|error| Error::io("Cannot make namespaces", error))?;
        let init = child::start_sibling(|| init::serve(world, channel, &self.devices, &self.binds))
            .map_err(|error| Error::io("Cannot start process 1", error))?;
        let open = |name: &str| {
            let file = File::open(Path::new("/proc/self/ns").join(name));
            file.map(OwnedFd::from).map_err(|error| Error::io("Cannot open a namespace", error))
        };
        Ok((json!({ "init": init.as_raw_nonzero() }), vec![open("pid_for_children")?, open("net")?]))
    }

    /// By a process that is in the namespaces of process 1, since these decide what the two show; with this one's rights,
    /// and in this one's mount table.
    fn make_kernel(&self) -> Result<Vec<OwnedFd>> {
        child::call(|| {
            let own_network = self.world.run.network == Network::None;
            for space in &self.spaces[..if own_network { 2 } else { 1 }] {
                rustix::thread::move_into_link_name_space(space.as_fd(), None)
                    .map_err(|error| Error::io("Cannot enter the namespaces of process 1", error))?;
            }
            // Only a child is in the namespace of processes.
            child::call(|| {
                let attributes = NOSUID | NODEV | NOEXEC;
                let proc = mounts::new("proc", &[], attributes)?;
                let sys = if self.world.run.ordinary && self.world.run.network == Network::Host {
                    // It shows the host's network, so that only the host's root may mount it.
                    mounts::copy_with(Path::new("/sys"), true, attributes | RDONLY)?
                } else {
                    mounts::new("sysfs", &[], attributes | RDONLY)?
                };
                Ok(vec![proc, sys])
            })
        })
    }
}

fn enter(ids: &OwnedFd) -> Result<()> {
    rustix::thread::move_into_link_name_space(ids.as_fd(), Some(LinkNameSpaceType::User))
        .map_err(|error| Error::io("Cannot enter the user namespace", error))
}

/// A copy of what is to be seen of the host. With ids of its own, the session gets the files of the owner of `source` as
/// that user's, and no others as anybody's: so it can make no file of the host's root, setuid or not, unless root's
/// directory was given to it.
fn copy_bind(bind: &Bind, first_id: Option<u32>, by_roots_links: bool) -> Result<OwnedFd> {
    let failed = |error: Errno| Error::io("Cannot read", error).on_path(&bind.source);
    let mut attributes = NODEV | NOSUID;
    attributes.set(RDONLY, bind.read_only);
    let mount = if by_roots_links {
        let source = reach::open(&reach::without_links(&bind.source)?, OFlags::PATH)
            .map_err(|error| mounts::cannot_bind(&bind.source, error))?;
        mounts::copy_opened(source.as_fd(), &bind.source, attributes)?
    } else {
        mounts::bind(&bind.source, attributes)?
    };
    let Some(first_id) = first_id else { return Ok(mount) };
    // Of what was copied: by now something else may have the name.
    let stat = rustix::fs::fstat(&mount).map_err(failed)?;
    let range =
        |id: u32| (id < ids::COUNT).then(|| ids::Range { inside: id, outside: first_id + id, count: 1 });
    if let Some((user, group)) = range(stat.st_uid).zip(range(stat.st_gid)) {
        let owner = ids::user_namespace(&[user], &[group])?;
        let shift = |recursive| {
            let none = rustix::mount::MountAttrFlags::empty();
            sys::mount::set_attributes(mount.as_fd(), recursive, none, none, Some(owner.as_fd()))
        };
        if shift(true).or_else(|_| shift(false)).is_ok() {
            return Ok(mount);
        }
    }
    tracing::warn!(
        path = %bind.source.display(),
        "The session sees these files as nobody's: their owners cannot be shifted to its ids"
    );
    Ok(mount)
}

fn out_of_order() -> Error {
    Error::new(ErrorKind::Invalid, "A step of the plan is out of order")
}
