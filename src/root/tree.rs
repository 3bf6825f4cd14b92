//! A root without a block device, for who may not have any: memdev's daemon serves the image's copy as a file, and fuse2fs
//! the ext4 in it as a tree.
//!
//! ```text
//!   the session's /, a mount ── FUSE ── fuse2fs ── "memdev/disk" ── FUSE ── daemon ── the session
//!   (in the session's namespace)        (in a mount namespace apart, M0)    (in one with nothing in it)
//! ```
//!
//! Both servers are outside of what they serve. Where a `pivot_root` is done in the mount namespace of such a server, its own
//! root directory becomes the one that it serves, and its next look for a file waits for itself: for ever, or until it
//! is killed. So fuse2fs mounts in M0, the mount is copied out of it by descriptor, and taken away there. When the session
//! has ended nobody has that mount any more: fuse2fs writes down what it has and ends, with it M0, and then the daemon.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mount::{MountAttrFlags, MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use rustix::thread::LinkNameSpaceType;
use serde_json::{Value, json};

use super::ids::{self, Ids};
use super::partition::Table;
use super::{Run, child, filesystem, mounts, talk};
use crate::attach::control;
use crate::attach::file::Served;
use crate::attach::fuse::mount::Detached;
use crate::attach::{Keeper, Options, Source};
use crate::error::{Error, ErrorKind, Result};
use crate::sys;

/// The program, of Debian's package of that name.
const PROGRAM: &str = "fuse2fs";

/// What it is told. It would decide by itself who may do what, and lets everybody do all: so the kernel decides, by owners
/// and modes.
const OPTIONS: &str = "fakeroot,allow_other,default_permissions";

/// Where the daemon's file system is in M0, and fuse2fs's.
const DISK: &str = "memdev";
const ROOT: &str = "root";

/// The daemon's file in it, as mount tables show it.
const FILE: &str = "disk";

/// How long it may take to mount: it may have to write back the journal of a large image.
const PATIENCE: Duration = Duration::from_secs(60);

/// The most of what it says that is kept.
const SAID_MAX: u64 = 16 << 10;

/// A root that is served.
pub(super) struct Tree {
    /// The mount, in no tree.
    pub(super) mount: OwnedFd,
    pub(super) read_only: bool,
    /// fuse2fs.
    pub(super) server: Pid,
    /// Who serves the file.
    pub(super) keeper: Keeper,
}

impl Tree {
    /// Starts both servers.
    ///
    /// # Errors
    /// What either says; `Unsupported` if there is no ext4 in the file, or no fuse2fs.
    pub(super) fn serve(run: &Run, options: &Options, ids: &Ids) -> Result<Self> {
        let failed = |error| Error::io("Cannot start what mounts the root", error);
        let (ours, theirs) = control::pair().map_err(failed)?;
        let stage = Stage { run, ids };
        let child = child::start(|| -> Result<()> {
            let failed = |error: io::Error| Error::io("Cannot begin", error);
            sys::process::keep_only(3, &[theirs.as_fd(), ids.namespace.as_fd()]).map_err(failed)?;
            if let Err(error) = stage.play(theirs.as_fd()) {
                talk::answer(theirs.as_fd(), Err(error))?;
            }
            Ok(())
        })
        .map_err(failed)?;
        drop(theirs);
        let made = (|| {
            let (_, mut opened) = hear(ours.as_fd())?;
            let requests = opened.pop().ok_or_else(died)?;
            let served = Served::start(options, FILE, requests, ids.namespace.as_fd())?;
            let word = json!({ "read_only": served.read_only() });
            control::send(ours.as_fd(), &word, &[]).map_err(failed)?;
            let (told, _) = hear(ours.as_fd())?;
            let server = told["server"].as_i64().and_then(|n| i32::try_from(n).ok()).and_then(Pid::from_raw);
            let server = server.ok_or_else(died)?;
            let read_only = served.read_only();
            let mount = hear(ours.as_fd()).and_then(|(_, mut opened)| opened.pop().ok_or_else(died));
            match mount.and_then(|mount| Ok((mount, served.keep()?))) {
                Ok((mount, keeper)) => Ok(Self { mount, read_only, server, keeper }),
                Err(error) => {
                    let _ = rustix::process::kill_process(server, Signal::KILL);
                    let _ = rustix::process::waitpid(Some(server), WaitOptions::empty());
                    Err(error)
                }
            }
        })();
        drop(ours);
        if made.is_err() {
            let _ = rustix::process::kill_process(child, Signal::KILL);
        }
        let _ = rustix::process::waitpid(Some(child), WaitOptions::empty());
        made
    }
}

/// What the stage has to say.
fn hear(channel: BorrowedFd<'_>) -> Result<(Value, Vec<OwnedFd>)> {
    let failed = |error| Error::io("Cannot hear what mounts the root", error);
    let (told, opened) = control::receive(channel).map_err(failed)?.ok_or_else(died)?;
    match control::error_from_json(&told) {
        Some(error) => Err(error),
        None => Ok((told, opened)),
    }
}

fn died() -> Error {
    Error::new(ErrorKind::Io, "A process that makes the private root has died")
}

/// The process that sets all of it up in M0, and then ends.
struct Stage<'a> {
    run: &'a Run,
    ids: &'a Ids,
}

impl Stage<'_> {
    fn play(&self, channel: BorrowedFd<'_>) -> Result<()> {
        let failed =
            |error: io::Error| Error::io("Cannot get a mount namespace for the root's server", error);
        rustix::thread::move_into_link_name_space(self.ids.namespace.as_fd(), Some(LinkNameSpaceType::User))
            .map_err(|error| failed(error.into()))?;
        // fuse2fs mounts by itself only if it is root; what is root's here is then root's on the disk.
        ids::become_root().map_err(failed)?;
        child::end_with_parent().map_err(failed)?;
        sys::process::leave_mount_namespace().map_err(failed)?;
        // What is unmounted on the host goes here, too: nothing of it is kept busy by this.
        mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
            .map_err(|error| failed(error.into()))?;
        let (requests, disk) = Detached::new()?.split();
        control::send(channel, &json!({}), &[requests.as_fd()])
            .map_err(|error| Error::io("Cannot hand over the file system's requests", error))?;
        // Else the file system would not know of the daemon's end.
        drop(requests);
        let Ok(Some((word, _))) = control::receive(channel) else { return Ok(()) };

        // Nobody else sees that it is there.
        let place = mounts::tmpfs("64k", "0755", mounts::NOEXEC)?;
        mounts::attach(place.as_fd(), &self.run.sessions)?;
        let failed = |error: io::Error| Error::io("Cannot make a place for the root", error);
        rustix::process::chdir(&self.run.sessions).map_err(|error| failed(error.into()))?;
        for name in [DISK, ROOT] {
            std::fs::create_dir(name).map_err(failed)?;
        }
        mounts::attach(disk.as_fd(), Path::new(DISK))?;
        drop((place, disk));
        let offset = self.look()?;
        let mount = self.mount(offset, word["read_only"] == true, channel)?;
        talk::answer(channel, Ok((Value::Null, vec![mount])))
    }

    /// Where the file system begins, if it is one that can be mounted.
    fn look(&self) -> Result<u64> {
        let what = match &self.run.source {
            Source::Image { path, .. } => path.display().to_string(),
            Source::Export(uri) => uri.to_string(),
        };
        let failed = |error| Error::io("Cannot read", error).on(&what);
        let file = File::open(Path::new(DISK).join(FILE)).map_err(failed)?;
        let part = self.run.partition.map(|number| Table::of_file(&file)?.find(number)).transpose()?;
        let offset = part.map_or(0, |part| part.offset);
        let kind = filesystem::on(&file, offset).map_err(failed)?;
        match kind {
            Some(kind) if kind.name == "ext4" => Ok(offset),
            Some(kind) => {
                let why = format!("{} takes root, and is on", kind.name);
                Err(Error::new(ErrorKind::Unsupported, why).on(what).advise("without root there is ext4"))
            }
            None => Err(filesystem::none(&what)),
        }
    }

    /// Starts fuse2fs, of which the launcher is told, and gives its mount when it is there.
    fn mount(&self, offset: u64, read_only: bool, channel: BorrowedFd<'_>) -> Result<OwnedFd> {
        let failed = |error: io::Error| Error::io("Cannot start", error).on(PROGRAM);
        let mut said = Said::new(self.run.log.as_deref())?;
        let mut options = OPTIONS.to_owned();
        if offset > 0 {
            options.push_str(&format!(",offset={offset}"));
        }
        options.push_str(if read_only { ",ro" } else { ",rw" });
        let errors = said.file.try_clone().map_err(failed)?;
        let server = child::start_sibling(|| -> io::Result<()> {
            sys::process::keep_only(3, &[errors.as_fd()])?;
            rustix::process::setsid()?;
            let mut command = Command::new(PROGRAM);
            command.args(["-f", "-o", &options]).arg(Path::new(DISK).join(FILE)).arg(ROOT);
            command.stdin(Stdio::null()).stdout(errors.try_clone()?).stderr(errors.try_clone()?);
            let error = command.exec();
            let missing = error.kind() == io::ErrorKind::NotFound;
            let advice = if missing { "; install the package fuse2fs" } else { "" };
            io::Write::write_all(&mut &errors, format!("{error}{advice}").as_bytes())
        })
        .map_err(failed)?;
        talk::answer(channel, Ok((json!({ "server": server.as_raw_nonzero() }), Vec::new())))?;
        copied(server).map_err(|error| {
            let said = said.text();
            let why = if said.is_empty() { error.to_string() } else { said };
            Error::new(ErrorKind::Io, format!("{PROGRAM} cannot mount the root: {why}"))
        })
    }
}

/// Waits until fuse2fs has mounted, and takes its mount away from here.
fn copied(server: Pid) -> Result<OwnedFd> {
    let failed = |error: rustix::io::Errno| Error::io("Cannot wait for its mount", error);
    let watch = rustix::process::pidfd_open(server, PidfdFlags::empty()).map_err(failed)?;
    let table = File::open("/proc/self/mountinfo").map_err(|error| Error::io("Cannot wait", error))?;
    let here = rustix::fs::stat(".").map_err(failed)?.st_dev;
    let start = Instant::now();
    // Its device is another one as soon as something is mounted there.
    while rustix::fs::stat(ROOT).map_err(failed)?.st_dev == here {
        let left = PATIENCE.saturating_sub(start.elapsed());
        let timeout = Timespec::try_from(left).unwrap_or_default();
        let mut fds = [
            PollFd::new(&watch, PollFlags::IN),
            // The kernel tells so that the table has changed since it was opened, or polled.
            PollFd::new(&table, PollFlags::PRI),
        ];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Err(Error::new(ErrorKind::Io, "it takes too long")),
            Ok(_) if !fds[0].revents().is_empty() => {
                return Err(Error::new(ErrorKind::Io, "it has ended"));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    let mount = mounts::copy(Path::new(ROOT), false)?;
    // Its library forbids setuid programs; who is root among these ids decides that.
    let clear = MountAttrFlags::MOUNT_ATTR_NOSUID;
    sys::mount::set_attributes(mount.as_fd(), false, mounts::NODEV, clear, None)
        .map_err(|error| Error::io("Cannot set the attributes of the root", error))?;
    unmount(ROOT, UnmountFlags::DETACH).map_err(failed)?;
    Ok(mount)
}

/// What fuse2fs says: to a log, or to memory, of which there is an end, while nothing that it says later stops it.
struct Said {
    file: File,
    is_log: bool,
}

impl Said {
    fn new(log: Option<&Path>) -> Result<Self> {
        if let Some(path) = log {
            let file = File::options().create(true).append(true).open(path);
            let file = file.map_err(|error| Error::io("Cannot open log", error).on_path(path))?;
            return Ok(Self { file, is_log: true });
        }
        let failed = |error| Error::io("Cannot get memory", error);
        let memory = rustix::fs::memfd_create("fuse2fs", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(failed)?;
        rustix::fs::ftruncate(&memory, SAID_MAX).map_err(failed)?;
        rustix::fs::fcntl_add_seals(&memory, SealFlags::GROW | SealFlags::SHRINK).map_err(failed)?;
        Ok(Self { file: memory.into(), is_log: false })
    }

    /// What was said, in one line.
    fn text(&mut self) -> String {
        if self.is_log {
            return "see its log".to_owned();
        }
        let mut bytes = Vec::new();
        let _ = self.file.rewind().and_then(|()| self.file.read_to_end(&mut bytes));
        let text = String::from_utf8_lossy(&bytes);
        let lines = text.trim_end_matches('\0').lines().map(str::trim).filter(|line| !line.is_empty());
        lines.collect::<Vec<_>>().join("; ")
    }
}
