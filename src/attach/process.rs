//! The daemon, as the commands see it: started, instructed, waited for.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};
use serde_json::json;

use super::control::{self, Told};
use super::keeper::Keeper;
use super::plan::Plan;
use super::record::Entry;
use crate::error::{Error, ErrorKind, Result};

/// A daemon ends when its device is gone. It wipes what it held, which takes time.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// A daemon that has been started. It ends when it sees the end of `control`, unless it was told that it is kept.
#[derive(Debug)]
pub(super) struct Daemon {
    /// The process, unless it is another's child: that of the device that this one is a fork of.
    child: Option<Child>,
    number: u32,
    control: OwnedFd,
}

impl Daemon {
    /// Starts the program as a daemon. Its arguments are for people who list processes, and the id for
    /// [`Process::of_daemon`].
    pub(super) fn start(plan: &Plan<'_>) -> Result<Self> {
        let failed = |error| Error::io("Cannot start the daemon", error);
        let (control, theirs) = control::pair().map_err(failed)?;
        let log = match &plan.options.log {
            None => Stdio::null(),
            Some(path) => {
                let cannot = |error| Error::io("Cannot open log", error).on_path(path);
                Stdio::from(File::options().create(true).append(true).open(path).map_err(cannot)?)
            }
        };
        let child = Command::new(&plan.options.program)
            .arg0("memdev")
            .args([super::daemon::SUBCOMMAND, plan.entry.id(), &plan.export, &plan.source])
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(failed)?;
        Ok(Self { number: child.id(), child: Some(child), control })
    }

    /// The daemon of another device, asked for a fork of it, over `control`.
    pub(super) fn of_other(number: u32, control: OwnedFd) -> Self {
        Self { child: None, number, control }
    }

    /// Tells it what to serve. `file` is the file that it answers for, with the descriptor where the kernel's requests
    /// come from; without it the kernel has the `sockets`, and it watches them. With `ids` it goes into that user
    /// namespace, in which this user is root.
    pub(super) fn instruct(
        &self,
        plan: &Plan<'_>,
        file: Option<(&str, BorrowedFd<'_>)>,
        ids: Option<BorrowedFd<'_>>,
        sockets: &[OwnedFd],
    ) -> Result<()> {
        let failed = |error| Error::io("Cannot instruct the daemon", error);
        let order = json!({
            "id": plan.entry.id(),
            "state": std::path::absolute(&plan.options.state).map_err(failed)?,
            "file": file.map(|(name, _)| name),
            "export": plan.export,
            "ids": ids.is_some(),
            "image": plan.image.is_some(),
            "connections": plan.options.connections,
            "memory": plan.options.memory,
            "read_only": plan.options.read_only,
            "told": plan.told.map(Told::to_json),
            "die_with_parent": plan.options.die_with_parent,
        });
        let mut descriptors = vec![plan.entry.as_fd(), plan.directory.as_fd()];
        descriptors.extend(file.map(|(_, requests)| requests));
        descriptors.extend(ids);
        descriptors.extend(plan.image.iter().map(File::as_fd));
        descriptors.extend(sockets.iter().map(OwnedFd::as_fd));
        control::send(self.control.as_fd(), &order, &descriptors).map_err(failed)
    }

    /// What it answers to its order: what is served, and the sockets for the kernel if it has made them.
    pub(super) fn answer(&self) -> Result<(Told, Vec<OwnedFd>)> {
        let failed = |error| Error::io("Cannot hear the daemon", error);
        let died = || {
            Error::new(ErrorKind::Io, "The daemon died before the device was there").advise("see its --log")
        };
        let (value, sockets) = control::receive(self.control.as_fd()).map_err(failed)?.ok_or_else(died)?;
        match control::error_from_json(&value) {
            Some(error) => Err(error),
            None => Ok((Told::from_json(&value).ok_or_else(died)?, sockets)),
        }
    }

    /// Tells it that the device is kept.
    pub(super) fn keep(&self) -> std::io::Result<()> {
        control::send(self.control.as_fd(), &json!({ "kept": true }), &[])
    }

    /// Tells it that the device is kept as long as its maker looks after it.
    ///
    /// # Errors
    /// It has died.
    pub(super) fn look_after(self) -> std::result::Result<Keeper, (std::io::Error, Self)> {
        let word = json!({ "kept": true, "maker": true });
        let told = control::send(self.control.as_fd(), &word, &[]).and_then(|()| {
            let number = i32::try_from(self.number).ok().and_then(Pid::from_raw);
            let number = number.ok_or(std::io::ErrorKind::NotFound)?;
            Ok(rustix::process::pidfd_open(number, PidfdFlags::empty())?)
        });
        match told {
            Ok(process) => Ok(Keeper::new(self.child, process, self.control)),
            Err(error) => Err((error, self)),
        }
    }

    /// The process, for whoever wants to wait for its end.
    pub(super) fn into_child(self) -> Result<Child> {
        let none = || Error::new(ErrorKind::Invalid, "A fork of a device is looked after by its maker");
        self.child.ok_or_else(none)
    }

    /// Asks the daemon of the device `of` for a fork of it, as the file `name` whose requests come by `requests`.
    pub(super) fn ask_fork(
        &self,
        plan: &Plan<'_>,
        of: &str,
        name: &str,
        requests: BorrowedFd<'_>,
    ) -> Result<Told> {
        let failed = |error| Error::io("Cannot ask for a fork of the device", error);
        let order = json!({ "fork": of, "id": plan.entry.id(), "export": plan.export, "file": name });
        let descriptors = [plan.entry.as_fd(), plan.directory.as_fd(), requests];
        control::send(self.control.as_fd(), &order, &descriptors).map_err(failed)?;
        Ok(self.answer()?.0)
    }

    /// Its process number.
    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// Waits for its end, which comes by itself once it is on its own.
    pub(super) fn end(self) {
        let Self { child, control, .. } = self;
        drop(control);
        // Another's goes on.
        let Some(mut child) = child else { return };
        let start = Instant::now();
        while matches!(child.try_wait(), Ok(None)) {
            if start.elapsed() > PATIENCE {
                // It is ours, has not been waited for, and so cannot be anybody else.
                let _ = child.kill();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A process that can be waited for although it is not this one's child.
pub(super) struct Process(OwnedFd);

impl Process {
    /// The daemon of `entry`, if it lives and can be seen from here. Its number alone would prove nothing: it may be of
    /// another namespace, or somebody else's by now.
    pub(super) fn of_daemon(entry: &Entry) -> Option<Self> {
        let number = entry.record()?.pid;
        let pid = Pid::from_raw(i32::try_from(number).ok()?)?;
        let process = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let arguments = std::fs::read(format!("/proc/{number}/cmdline")).ok()?;
        let is_it = arguments.split(|&byte| byte == 0).any(|argument| argument == entry.id().as_bytes());
        is_it.then_some(Self(process))
    }

    /// Waits for its end, but not for ever.
    ///
    /// # Errors
    /// What `poll(2)` says.
    pub(super) fn wait(&self, patience: Duration) -> Result<()> {
        let failed = |error: rustix::io::Errno| Error::io("Cannot wait for the daemon's end", error);
        let timeout = Timespec::try_from(patience).map_err(|_| failed(rustix::io::Errno::INVAL))?;
        rustix::event::poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&timeout)).map_err(failed)?;
        Ok(())
    }
}
