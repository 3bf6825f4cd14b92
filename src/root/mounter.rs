//! The mounter: a process with the host's rights in a copy of the host's mount table, in which it puts the session's root
//! in the host's place.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags};
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags};
use serde_json::json;

use super::launcher::World;
use super::mounts::{self, NODEV, NOEXEC, NOSUID, RDONLY};
use super::plan::Step;
use super::talk::{self, Yield};
use super::{Bind, Network, child, ids, init, places};
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
    /// Process 1.
    init: Option<OwnedFd>,
}

/// Does what the launcher asks for, until it asks no more.
///
/// # Errors
/// That the launcher is not to be heard.
pub(super) fn serve(world: &World<'_>, channel: &OwnedFd, init_channel: OwnedFd) -> Result<()> {
    let init_channel = Some(init_channel);
    let (root, devices, binds, init) = (None, Vec::new(), Vec::new(), None);
    let mut mounter = Mounter { world, init_channel, root, devices, binds, init };
    while let Some((step, _)) = talk::next(channel.as_fd(), world.plan)? {
        talk::answer(channel.as_fd(), mounter.perform(step))?;
    }
    Ok(())
}

impl Mounter<'_> {
    fn perform(&mut self, step: Step) -> Result<Yield> {
        let world = self.world;
        match step {
            Step::LeaveMounts => {
                sys::process::leave_mount_namespace()
                    .map_err(|error| Error::io("Cannot get a mount namespace", error))?;
                mounts::make_private()?;
            }
            Step::MountImage => {
                let root = mounts::image(
                    &world.disk.path,
                    world.disk.kind,
                    world.disk.read_only,
                    world.ids.map(AsFd::as_fd),
                )?;
                self.root = Some(root);
            }
            Step::CopyDevices => self.devices = places::copy_devices()?,
            Step::CopyBind(n) => {
                let first_id = (!world.run.privileged).then_some(world.session.first_id);
                self.binds.push(copy_bind(&world.run.binds[n], first_id)?);
            }
            Step::StartInit => return self.start_init(),
            Step::ExchangeRoot => {
                let root = self.root.take().ok_or_else(out_of_order)?;
                mounts::pivot(root.as_fd(), &world.run.sessions)?;
            }
            Step::MountKernel => self.mount_kernel()?,
            Step::PutBind(n) => {
                let target = places::from_root(&world.run.binds[n].target);
                mounts::attach(self.binds[n].as_fd(), &target)?;
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
        let (mut told, tell) = io::pipe().map_err(failed)?;
        let helper = child::start_sibling(|| {
            let mut tell = tell.try_clone()?;
            match self.make_init(channel) {
                Ok(init) => write!(tell, "{}", init.as_raw_nonzero()),
                Err(error) => write!(tell, "{error}"),
            }
        })
        .map_err(failed)?;
        drop(tell);
        let mut text = String::new();
        told.read_to_string(&mut text).map_err(failed)?;
        let init = text.parse::<i32>().ok().and_then(Pid::from_raw);
        let init = init.ok_or_else(|| Error::new(ErrorKind::Io, text))?;
        let pidfd = rustix::process::pidfd_open(init, PidfdFlags::empty());
        self.init = Some(pidfd.map_err(|error| failed(error.into()))?);
        let numbers = json!({ "init": init.as_raw_nonzero(), "helper": helper.as_raw_nonzero() });
        Ok((numbers, Vec::new()))
    }

    fn make_init(&self, channel: OwnedFd) -> Result<Pid> {
        let world = self.world;
        if let Some(ids) = world.ids {
            rustix::thread::move_into_link_name_space(ids.as_fd(), Some(LinkNameSpaceType::User))
                .map_err(|error| Error::io("Cannot enter the user namespace", error))?;
            ids::become_root().map_err(|error| Error::io("Cannot become root in it", error))?;
        }
        let mut flags =
            UnshareFlags::NEWPID | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWCGROUP;
        flags.set(UnshareFlags::NEWNET, world.run.network == Network::None);
        sys::process::unshare(flags).map_err(|error| Error::io("Cannot make namespaces", error))?;
        child::start_sibling(|| init::serve(world, channel, &self.devices, &self.binds))
            .map_err(|error| Error::io("Cannot start process 1", error))
    }

    /// By a process that is in the namespaces of process 1, since these decide what the two show; with this one's rights,
    /// and in this one's mount table.
    fn mount_kernel(&self) -> Result<()> {
        let init = self.init.as_ref().ok_or_else(out_of_order)?;
        let mut spaces = ThreadNameSpaceType::PROCESS_ID;
        spaces.set(ThreadNameSpaceType::NETWORK, self.world.run.network == Network::None);
        child::call(|| {
            rustix::thread::move_into_thread_name_spaces(init.as_fd(), spaces)
                .map_err(|error| Error::io("Cannot enter the namespaces of process 1", error))?;
            // Only a child is in the namespace of processes.
            child::call(|| {
                let attributes = NOSUID | NODEV | NOEXEC;
                let proc = mounts::new("proc", &[], attributes)?;
                mounts::attach(proc.as_fd(), Path::new("/proc"))?;
                let sys = mounts::new("sysfs", &[], attributes | RDONLY)?;
                mounts::attach(sys.as_fd(), Path::new("/sys"))
            })
        })
    }
}

/// A copy of what is to be seen of the host. With ids of its own, the session gets the files of the owner of `source` as
/// that user's, and no others as anybody's: so it can make no file of the host's root, setuid or not, unless root's
/// directory was given to it.
fn copy_bind(bind: &Bind, first_id: Option<u32>) -> Result<OwnedFd> {
    let mut attributes = NODEV | NOSUID;
    attributes.set(RDONLY, bind.read_only);
    let mount = mounts::copy_with(&bind.source, true, attributes)?;
    let Some(first_id) = first_id else { return Ok(mount) };
    let metadata = std::fs::metadata(&bind.source)
        .map_err(|error| Error::io("Cannot read", error).on_path(&bind.source))?;
    let range =
        |id: u32| (id < ids::COUNT).then(|| ids::Range { inside: id, outside: first_id + id, count: 1 });
    if let Some((user, group)) = range(metadata.uid()).zip(range(metadata.gid())) {
        let owner = ids::user_namespace(user, group)?;
        let shift = |recursive| {
            let none = rustix::mount::MountAttrFlags::empty();
            sys::mount::set_attributes(mount.as_fd(), recursive, none, Some(owner.as_fd()))
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
