//! Process 1 inside: makes what is the session's own, starts the command, and then is what every process 1 is: parent of
//! whoever has none, and the end of all when it ends.
//!
//! It never becomes another program, so that no file of the host is to be reached by way of it; nobody inside may look
//! into it; and it keeps no descriptor but the one by which it hears the launcher. When that is closed it ends.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use rustix::thread::UnshareFlags;
use serde_json::{Value, json};
use signal_hook::consts::SIGCHLD;

use super::command::{Ready, Size};
use super::launcher::World;
use super::plan::Step;
use super::signals::Signals;
use super::talk::{self, Yield};
use super::{Network, child, copies, places, privileges};
use crate::attach::control;
use crate::error::{Error, ErrorKind, Result};
use crate::sys;

/// The exit status when it was the launcher that ended.
const ABANDONED: u8 = 137;

/// The session's namespaces, in the order in which they are entered: with the first come the rights over the others.
const SPACES: [&str; 7] = ["user", "mnt", "pid", "ipc", "uts", "cgroup", "net"];

struct Init<'a> {
    world: &'a World<'a>,
    devices: &'a [(&'static str, OwnedFd)],
    binds: &'a [OwnedFd],
    command: Option<Pid>,
    /// Whether there is to be no command.
    holding: bool,
    /// The command's terminal: open here as well, so that it stays when nobody else has it open for a moment.
    terminal: Option<OwnedFd>,
}

/// What process 1 does, from its beginning to its end.
///
/// # Errors
/// That it cannot begin; later it does not return.
pub(super) fn serve(
    world: &World<'_>,
    channel: OwnedFd,
    devices: &[(&'static str, OwnedFd)],
    binds: &[OwnedFd],
) -> Result<()> {
    let failed = |error: io::Error| Error::io("Process 1 cannot begin", error);
    world.signals.forget();
    privileges::be_opaque().map_err(failed)?;
    // Of the host's there remain what has been copied for here, and the launcher.
    let mut keep = vec![channel.as_fd()];
    keep.extend(devices.iter().map(|(_, mount)| mount.as_fd()));
    keep.extend(binds.iter().map(AsFd::as_fd));
    sys::process::keep_only(3, &keep).map_err(failed)?;
    rustix::process::setsid().map_err(|error| failed(error.into()))?;
    sys::process::leave_keyring();
    let _ = rustix::thread::set_name(c"memdev-init");
    let mut init = Init { world, devices, binds, command: None, holding: false, terminal: None };
    while init.command.is_none() && !init.holding {
        let Some((step, with, given)) = talk::next(channel.as_fd(), world.plan)? else {
            sys::process::exit_now(ABANDONED);
        };
        let result = init.perform(step, &with, given);
        talk::answer(channel.as_fd(), result)?;
    }
    init.live(&channel)
}

impl Init<'_> {
    fn perform(&mut self, step: Step, with: &Value, given: Vec<OwnedFd>) -> Result<Yield> {
        let failed = |what: &'static str| move |error: io::Error| Error::io(what, error);
        let run = self.world.run;
        match step {
            Step::MakePlaces => {
                // It still is in the host's tree, which was taken away from under it.
                rustix::process::chdir("/")
                    .map_err(|error| Error::io("Cannot leave the host's directory", error))?;
                // What is made is for everybody to see.
                rustix::process::umask(rustix::fs::Mode::WGRP | rustix::fs::Mode::WOTH);
                let targets = run.binds.iter().map(|bind| bind.target.as_path());
                places::make(targets.zip(self.binds))?;
            }
            Step::LockMounts => {
                sys::process::unshare(UnshareFlags::NEWNS).map_err(failed("Cannot copy the mount table"))?;
                if run.ordinary {
                    let open = |name| File::open(Path::new("/proc/self/ns").join(name)).map(OwnedFd::from);
                    // The host's network is nobody's to enter who is in it already.
                    let own = if run.network == Network::None { 7 } else { 6 };
                    let spaces = SPACES.into_iter().take(own).map(open).collect::<io::Result<_>>();
                    return Ok((json!({}), spaces.map_err(failed("Cannot open the session's namespaces"))?));
                }
            }
            Step::FillPlaces => places::fill(self.devices)?,
            Step::CoverUp => privileges::cover_up()?,
            Step::BringUpLoopback => {
                sys::network::bring_up_loopback().map_err(failed("Cannot bring up the loopback interface"))?
            }
            Step::SetHostname => {
                let name = run.hostname.as_deref().unwrap_or(&self.world.session.name);
                rustix::system::sethostname(name.as_bytes())
                    .map_err(|error| Error::io("Cannot set the host name to", error).on(name))?;
            }
            Step::GiveUp => privileges::give_up(run.network == Network::None)?,
            Step::CopyMounts => {
                let bad = || Error::new(ErrorKind::Invalid, "There is nothing to copy from");
                let contents = given.into_iter().next().ok_or_else(bad)?;
                return Ok((json!({ "left": copies::make(with, contents)? }), Vec::new()));
            }
            Step::Hold => {
                child::let_go_of_standard().map_err(failed("Cannot let go of standard input and output"))?;
                self.holding = true;
            }
            Step::StartCommand => return self.start_command(&Size::from_json(with)),
            _ => return Err(Error::new(ErrorKind::Invalid, "A step of the plan is out of order")),
        }
        Ok(talk::done())
    }

    fn start_command(&mut self, size: &Size) -> Result<Yield> {
        let order = self.world.order();
        let ready = Ready::new(&order)?;
        let (outer, inner) = ready.terminal(size)?.unzip();
        let (command, trouble) = start(&ready, inner.as_ref())?;
        if let Some(told) = trouble {
            return Ok((told, Vec::new()));
        }
        self.command = Some(command);
        self.terminal = inner;
        // It is the command's business from now on; held here, it would not end with who reads or writes it.
        child::let_go_of_standard()
            .map_err(|error| Error::io("Cannot let go of standard input and output", error))?;
        Ok((json!({}), outer.into_iter().collect()))
    }

    /// Until the command has ended, if there is one, or the launcher.
    fn live(&self, channel: &OwnedFd) -> ! {
        // What it was to put in place has got there. (Before signals are caught, which takes descriptors, too.)
        let mut keep = vec![channel.as_fd()];
        keep.extend(self.terminal.iter().map(AsFd::as_fd));
        let kept = sys::process::keep_only(3, &keep);
        let (Ok(()), Ok(children)) = (kept, Signals::catch(&[SIGCHLD])) else {
            sys::process::exit_now(ABANDONED);
        };
        loop {
            // The first time for those that had ended before.
            if let Some(status) = self.reap() {
                // The launcher hears of it before it can hear of the end of the device: a process that ends closes what it
                // has only after it has left its mounts.
                let _ = rustix::net::shutdown(channel, rustix::net::Shutdown::Both);
                sys::process::exit_now(status);
            }
            let mut fds = [PollFd::new(channel, PollFlags::IN), PollFd::new(&children, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => sys::process::exit_now(ABANDONED),
            }
            let heard = !fds[0].revents().is_empty();
            children.take();
            if heard {
                self.pass_on(channel);
            }
        }
    }

    /// Takes leave of all who have ended. If the command is among them, its status.
    fn reap(&self) -> Option<u8> {
        let mut ended = None;
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            if Some(pid) == self.command {
                ended = Some(status_of(status));
            }
        }
        ended
    }

    /// A signal that the launcher got.
    fn pass_on(&self, channel: &OwnedFd) {
        let Ok(Some((message, _))) = control::receive(channel.as_fd()) else {
            sys::process::exit_now(ABANDONED);
        };
        let signal = message["signal"].as_i64().and_then(|n| i32::try_from(n).ok());
        let Some((signal, command)) = signal.and_then(Signal::from_named_raw).zip(self.command) else {
            return;
        };
        // What a terminal would send to all in the foreground; else to the command alone.
        let _ = if message["group"] == true {
            rustix::process::kill_process_group(command, signal)
        } else {
            rustix::process::kill_process(command, signal)
        };
    }
}

/// Starts the command; gives what is to be told, if it cannot be executed.
fn start(ready: &Ready<'_>, terminal: Option<&OwnedFd>) -> Result<(Pid, Option<Value>)> {
    let failed = |error| Error::io("Cannot start the command", error);
    let (mut told, tell) = io::pipe().map_err(failed)?;
    let command = child::start_alone(|| {
        let mut tell = tell.try_clone()?;
        // The pipe is closed when it is another program.
        let told = ready.execute(terminal.map(AsFd::as_fd));
        write!(tell, "{told}")
    })
    .map_err(failed)?;
    drop(tell);
    let mut text = String::new();
    told.read_to_string(&mut text).map_err(failed)?;
    Ok((command, serde_json::from_str(&text).ok()))
}

/// An exit status as shells have it.
pub(super) fn status_of(status: WaitStatus) -> u8 {
    let status = match (status.exit_status(), status.terminating_signal()) {
        (Some(status), _) => status,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 1,
    };
    u8::try_from(status & 0xff).unwrap_or(1)
}
