//! The launcher: goes through the plan, stays beside the command, and sees to the end of everything.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};

use super::command::Order;
use super::device::Disk;
use super::plan::{Actor, Plan, Step};
use super::record::{Session, Written};
use super::signals::Signals;
use super::terminal::{self, Relay};
use super::{Ended, Run, child, ids, init, mounter, talk};
use crate::attach::control;
use crate::error::{Error, ErrorKind, Result};
use crate::sys;

/// Signals that are sent on. To be stopped and continued is this process's own business.
const SENT_ON: [i32; 6] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2];

/// Those that a terminal sends to everybody in the foreground.
pub(super) const OF_TERMINALS: [i32; 3] = [SIGHUP, SIGINT, SIGQUIT];

/// How long a command has to end after a hang-up.
pub(super) const AFTER_HANG_UP: Duration = Duration::from_millis(500);

/// How long processes that were killed may take, before the daemon of the device that they wait for is killed as well.
const AFTER_KILL: Duration = Duration::from_secs(1);

/// What the processes of one private root have in common.
pub(super) struct World<'a> {
    pub(super) run: &'a Run,
    pub(super) plan: &'a Plan,
    pub(super) session: &'a Session,
    pub(super) disk: &'a Disk,
    pub(super) ids: Option<&'a OwnedFd>,
    pub(super) terminals: [bool; 3],
    pub(super) signals: &'a Signals,
}

impl<'a> World<'a> {
    /// What is to be run.
    pub(super) fn order(&self) -> Order<'a> {
        Order {
            command: &self.run.command,
            login: self.run.login,
            env: &self.run.env,
            workdir: self.run.workdir.as_deref(),
            user: self.run.user.as_deref(),
            session: &self.session.name,
            terminals: self.terminals,
            // Process 1 is its parent, whose end is everybody's.
            ends_with_parent: false,
        }
    }
}

/// Does what [`Run::run`] says.
pub(super) fn run(run: &Run) -> Result<Ended> {
    let terminals = terminal::standard()?;
    may_begin()?;
    let signals = catch()?;
    let plan = run.plan();
    let mut launcher = Launcher {
        run,
        plan: &plan,
        terminals,
        signals: &signals,
        relay: None,
        mounter: None,
        init: None,
        helper: None,
        ids: None,
        disk: None,
        written: None,
    };
    let ended = launcher.go();
    launcher.end();
    ended
}

/// Looks whether this process may be copied, and may do what the copies are for.
///
/// # Errors
/// `Invalid` if it has several threads, `Denied` if it is not root's.
pub(super) fn may_begin() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        let why = "A private root can only be made, or entered, by root: it takes mounts and a block device";
        return Err(Error::new(ErrorKind::Denied, why).advise("run it as root"));
    }
    if sys::process::threads() == 1 {
        return Ok(());
    }
    let why = "A private root can only be made, or entered, by a process with one thread";
    Err(Error::new(ErrorKind::Invalid, why).advise("start 'memdev' as a process"))
}

/// Catches what is sent on, and that a window has changed.
///
/// # Errors
/// What the system says.
pub(super) fn catch() -> Result<Signals> {
    let mut caught = SENT_ON.to_vec();
    // Who started this with a signal ignored wants it to be survived (nohup).
    caught.retain(|&signal| !crate::sys::process::is_ignored(signal));
    caught.push(SIGWINCH);
    Signals::catch(&caught).map_err(|error| Error::io("Cannot watch for signals", error))
}

/// A process, and how to talk to it.
struct Party {
    pid: Pid,
    watch: OwnedFd,
    /// Without it, it has been told that there is nothing more for it.
    channel: Option<OwnedFd>,
}

impl Party {
    fn new(pid: Pid, channel: OwnedFd) -> Result<Self> {
        let watch = rustix::process::pidfd_open(pid, PidfdFlags::empty())
            .map_err(|error| Error::io("Cannot watch a process of the private root", error))?;
        Ok(Self { pid, watch, channel: Some(channel) })
    }

    fn channel(&self) -> Result<BorrowedFd<'_>> {
        self.channel.as_ref().map(AsFd::as_fd).ok_or_else(out_of_order)
    }

    fn ends_within(&self, time: Duration) -> bool {
        let timeout = Timespec::try_from(time).unwrap_or_default();
        let start = Instant::now();
        loop {
            match poll(&mut [PollFd::new(&self.watch, PollFlags::IN)], Some(&timeout)) {
                Ok(count) => return count > 0,
                Err(rustix::io::Errno::INTR) if start.elapsed() < time => {}
                Err(_) => return false,
            }
        }
    }
}

struct Launcher<'a> {
    run: &'a Run,
    plan: &'a Plan,
    terminals: [bool; 3],
    signals: &'a Signals,
    relay: Option<Relay>,
    mounter: Option<Party>,
    init: Option<Party>,
    /// The process that made process 1, until it has been waited for.
    helper: Option<Pid>,
    ids: Option<OwnedFd>,
    disk: Option<Disk>,
    written: Option<Written>,
}

impl Launcher<'_> {
    fn go(&mut self) -> Result<Ended> {
        // Both ends of what process 1 will be heard by: it is made by the mounter.
        let (ours, theirs) = control::pair().map_err(|error| Error::io("Cannot make a channel", error))?;
        let (mut ours, mut theirs) = (Some(ours), Some(theirs));
        let mut last = (Value::Null, Vec::new());
        for (n, &step) in self.plan.steps().iter().enumerate() {
            if let Some(signal) = self.signals.take().into_iter().find(|signal| *signal != SIGWINCH) {
                let status = u8::try_from(128 + signal).unwrap_or(u8::MAX);
                return Ok(Ended { status, trouble: None });
            }
            tracing::debug!(?step, "A step of the plan");
            match step.actor() {
                Actor::Launcher => self.perform(step, &mut theirs)?,
                Actor::Mounter => {
                    let mounter = self.mounter.as_ref().ok_or_else(out_of_order)?;
                    let (told, _) = talk::ask(mounter.channel()?, n, &Value::Null)?;
                    if step == Step::StartInit {
                        self.meet_init(&told, ours.take().ok_or_else(out_of_order)?)?;
                    }
                }
                Actor::Init => {
                    let init = self.init.as_ref().ok_or_else(out_of_order)?;
                    let size = terminal::size(self.terminals).to_json();
                    last = talk::ask(init.channel()?, n, &size)?;
                }
            }
        }
        let (told, mut descriptors) = last;
        if let Some(why) = told["trouble"].as_str() {
            let status = told["status"].as_u64().and_then(|n| u8::try_from(n).ok()).unwrap_or(126);
            return Ok(Ended { status, trouble: Some(why.to_owned()) });
        }
        if let Some(inner) = descriptors.pop() {
            self.relay = Some(Relay::start(self.terminals, inner)?);
        }
        self.attend()
    }

    fn perform(&mut self, step: Step, theirs: &mut Option<OwnedFd>) -> Result<()> {
        match step {
            Step::WriteDown => self.written = Some(Written::new(self.run)?),
            Step::Attach => self.disk = Some(Disk::attach(self.run)?),
            Step::MakeIds => {
                let first = self.written.as_ref().ok_or_else(out_of_order)?.session.first_id;
                let range = ids::Range { inside: 0, outside: first, count: ids::COUNT };
                self.ids = Some(ids::user_namespace(range, range)?);
            }
            Step::StartMounter => {
                let theirs = theirs.take().ok_or_else(out_of_order)?;
                self.start_mounter(theirs)?;
            }
            Step::LetGo => {
                self.end_mounter();
                self.ids = None;
                self.disk.as_mut().ok_or_else(out_of_order)?.let_go();
            }
            _ => return Err(out_of_order()),
        }
        Ok(())
    }

    fn start_mounter(&mut self, for_init: OwnedFd) -> Result<()> {
        let failed = |error| Error::io("Cannot start the mounter", error);
        let (ours, theirs) = control::pair().map_err(failed)?;
        let world = World {
            run: self.run,
            plan: self.plan,
            session: &self.written.as_ref().ok_or_else(out_of_order)?.session,
            disk: self.disk.as_ref().ok_or_else(out_of_order)?,
            ids: self.ids.as_ref(),
            terminals: self.terminals,
            signals: self.signals,
        };
        let pid = child::start(|| {
            self.signals.forget();
            // What it does not need; above all the launcher's ends of the channels, by whose end it knows of the
            // launcher's.
            let mut keep = vec![theirs.as_fd(), for_init.as_fd()];
            keep.extend(world.ids.map(AsFd::as_fd));
            sys::process::keep_only(3, &keep).map_err(failed)?;
            let for_init = rustix::io::fcntl_dupfd_cloexec(&for_init, 3).map_err(|e| failed(e.into()))?;
            mounter::serve(&world, &theirs, for_init)
        })
        .map_err(failed)?;
        self.mounter = Some(Party::new(pid, ours)?);
        Ok(())
    }

    fn meet_init(&mut self, told: &Value, channel: OwnedFd) -> Result<()> {
        let number =
            |key: &str| told[key].as_i64().and_then(|n| i32::try_from(n).ok()).and_then(Pid::from_raw);
        let (init, helper) = number("init").zip(number("helper")).ok_or_else(out_of_order)?;
        self.helper = Some(helper);
        self.init = Some(Party::new(init, channel)?);
        let pid = u32::try_from(init.as_raw_nonzero().get()).unwrap_or(0);
        self.written.as_mut().ok_or_else(out_of_order)?.set_init(pid)?;
        self.reap_helper();
        Ok(())
    }

    /// Until process 1 has ended: sends signals on, moves what is typed and shown.
    fn attend(&mut self) -> Result<Ended> {
        let failed = |error: rustix::io::Errno| Error::io("Cannot wait for the command", error);
        // When patience with it is at an end, and whether that is the device's fault.
        let mut deadline: Option<(Instant, bool)> = None;
        let (mut daemon_over, mut server_died, mut ending) = (false, false, false);
        loop {
            let (Some(init), Some(disk)) = (&self.init, &mut self.disk) else { return Err(out_of_order()) };
            // The daemon comes before the channel, see below. What has ended would be found so again and again: then
            // nothing is waited for there.
            let unless = |over| if over { PollFlags::empty() } else { PollFlags::IN };
            let channel = init.channel()?;
            let mut fds = vec![
                PollFd::new(self.signals, PollFlags::IN),
                PollFd::new(&init.watch, PollFlags::IN),
                PollFd::new(if daemon_over { &init.watch } else { disk.watch() }, unless(daemon_over)),
                PollFd::from_borrowed_fd(if ending { init.watch.as_fd() } else { channel }, unless(ending)),
            ];
            fds.extend(self.relay.iter().flat_map(Relay::wanted));
            let left = deadline.map(|(at, _)| at.saturating_duration_since(Instant::now()));
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed(error)),
            }
            let ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            let (daemon_ended, init_leaves) = (ready[2] && !daemon_over, ready[3] && !ending);

            if let Some(relay) = &mut self.relay {
                let may_read = relay.reads_outside() && ready.last() == Some(&true);
                if relay.turn(may_read) {
                    hang_up(init, SIGHUP, &mut deadline);
                }
            }
            if ready[0] {
                for signal in self.signals.take() {
                    match (signal, &self.relay) {
                        (SIGWINCH, Some(relay)) => relay.resize(),
                        (SIGWINCH, None) => {}
                        (SIGHUP, _) => hang_up(init, signal, &mut deadline),
                        _ => send_on(init, signal),
                    }
                }
            }
            if ready[1] {
                break;
            }
            if daemon_ended {
                daemon_over = true;
                // In good order it ends because its device has, which has because all inside have ended: and they close
                // what they have before.
                if !ending && !init_leaves {
                    server_died = true;
                    kill(init);
                }
            }
            if init_leaves {
                // It has closed what it had: it is about to end, and waits for all others inside.
                ending = true;
                deadline = Some((Instant::now() + AFTER_KILL.max(disk.patience()), true));
            }
            if let Some((at, of_device)) = deadline
                && Instant::now() >= at
            {
                kill(init);
                if of_device {
                    disk.kill_daemon();
                }
                deadline = (!of_device).then(|| (Instant::now() + AFTER_KILL, true));
            }
        }
        let Some(init) = self.init.take() else { return Err(out_of_order()) };
        let status = rustix::process::waitpid(Some(init.pid), WaitOptions::empty()).map_err(failed)?;
        // What is left to be shown is shown now.
        self.relay = None;
        if server_died {
            let why = "The daemon of the session's device has died, and the session with it";
            return Err(Error::new(ErrorKind::Io, why));
        }
        let status = status.map_or(1, |(_, status)| init::status_of(status));
        Ok(Ended { status, trouble: None })
    }

    /// Everything that is left, in the order in which it can go.
    fn end(&mut self) {
        self.relay = None;
        if let Some(init) = self.init.take() {
            kill(&init);
            self.wait_for(&init);
        }
        self.end_mounter();
        self.reap_helper();
        self.ids = None;
        self.disk = None;
        self.written = None;
    }

    fn end_mounter(&mut self) {
        if let Some(mut mounter) = self.mounter.take() {
            mounter.channel = None;
            if !mounter.ends_within(AFTER_KILL) {
                kill(&mounter);
            }
            self.wait_for(&mounter);
        }
    }

    fn reap_helper(&mut self) {
        if let Some(helper) = self.helper.take() {
            let _ = rustix::process::waitpid(Some(helper), WaitOptions::empty());
        }
    }

    /// Waits for a process that was killed. If it waits for the device, the daemon goes first.
    fn wait_for(&mut self, party: &Party) {
        if !party.ends_within(AFTER_KILL)
            && let Some(disk) = &mut self.disk
        {
            disk.kill_daemon();
        }
        let _ = rustix::process::waitpid(Some(party.pid), WaitOptions::empty());
    }
}

fn kill(party: &Party) {
    let _ = rustix::process::pidfd_send_signal(&party.watch, Signal::KILL);
}

fn send_on(init: &Party, signal: i32) {
    let message = json!({ "signal": signal, "group": OF_TERMINALS.contains(&signal) });
    // It may just have ended.
    let _ = init.channel().map(|channel| control::send(channel, &message, &[]));
}

/// The terminal, or whoever was behind it, has gone: the command is told, and does not have for ever.
fn hang_up(init: &Party, signal: i32, deadline: &mut Option<(Instant, bool)>) {
    send_on(init, signal);
    deadline.get_or_insert((Instant::now() + AFTER_HANG_UP, false));
}

fn out_of_order() -> Error {
    Error::new(ErrorKind::Invalid, "A step of the plan is out of order")
}
