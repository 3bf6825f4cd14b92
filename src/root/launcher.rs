//! The launcher: goes through the plan, stays beside the command, and sees to the end of everything.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};

use super::carrying::{self, Carriers};
use super::cgroup::{Cgroup, Places};
use super::command::Order;
use super::copies::Copies;
use super::device::Disk;
use super::ids::Ids;
use super::plan::{Actor, Plan, Step};
use super::record::{Session, Written};
use super::signals::Signals;
use super::terminal::{self, Relay};
use super::{Ended, Run, child, cores, freeze, init, mounter, subordinate, talk};
use crate::attach::{Backend, control};
use crate::carry::Undelivered;
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

/// How long they may take after somebody has been started who thaws their file system.
const AFTER_THAW: Duration = Duration::from_millis(300);

/// What the processes of one private root have in common.
pub(super) struct World<'a> {
    pub(super) run: &'a Run,
    pub(super) plan: &'a Plan,
    pub(super) session: &'a Session,
    pub(super) disk: &'a Disk,
    pub(super) ids: Option<&'a Ids>,
    pub(super) cgroup: Option<&'a Cgroup>,
    pub(super) terminals: [bool; 3],
    pub(super) signals: &'a Signals,
}

impl<'a> World<'a> {
    /// What is to be run.
    pub(super) fn order(&self) -> Order<'a> {
        Order {
            command: &self.run.command,
            line: self.run.line.as_deref(),
            login: self.run.login,
            env: &self.run.env,
            workdir: self.run.workdir.as_deref(),
            user: self.run.user.as_deref(),
            stranger: self.run.stranger.as_ref(),
            session: &self.session.name,
            terminals: self.terminals,
            // Process 1 is its parent, whose end is everybody's.
            ends_with_parent: false,
        }
    }
}

/// What an ordinary user should know before it is found out.
const WITHOUT_ROOT: &str = "without root: the disk is slow; files that are removed while they are open stay, as .fuse_hidden*; \
    no overlay with its upper directory on the root, and no 'memdev fork'";

/// What is missing besides where there are no subordinate ids.
const ALONE: &str = "; root is the only user, so no chown, su or useradd";

/// Is told of the session once it is there.
type Ready<'a> = dyn FnMut(&Session) -> Result<()> + 'a;

/// A private root without a command: for how long, and who is told that it is there.
pub(super) struct Hold<'a> {
    /// What has a hang-up when it is to end.
    pub(super) until: BorrowedFd<'a>,
    pub(super) ready: Box<Ready<'a>>,
}

/// Does what [`Run::run`] says, or [`Run::hold`].
pub(super) fn run(run: &Run, hold: Option<Hold<'_>>) -> Result<Ended> {
    let terminals = terminal::standard()?;
    if run.ordinary {
        let asked = [
            ("--carry", !run.carrying.carries.is_empty()),
            ("--privileged", run.privileged),
            ("--backend nbd", run.backend == Backend::Nbd),
        ];
        if let Some((what, _)) = asked.into_iter().find(|(_, asked)| *asked) {
            let why = format!("{what} is not possible without the rights of root");
            return Err(Error::new(ErrorKind::Denied, why).advise("leave it out, or run it as root"));
        }
    }
    run.limits.check()?;
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
        porter: None,
        space: None,
        thawer: None,
        spaces: Vec::new(),
        helper: None,
        ids: None,
        disk: None,
        cgroup: None,
        written: None,
        carriers: None,
        undelivered: Vec::new(),
        hold,
    };
    let ended = launcher.go();
    launcher.end();
    carrying::outcome(ended, launcher.undelivered)
}

/// Looks whether this process may be copied.
///
/// # Errors
/// `Invalid` if it has several threads.
pub(crate) fn may_begin() -> Result<()> {
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
pub(crate) fn catch() -> Result<Signals> {
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

    /// Whether it has begun to end, by itself or killed.
    fn is_ending(&self) -> bool {
        // The kernel's PF_EXITING, in field 9, the 7th after the name.
        const EXITING: u32 = 4;
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid.as_raw_nonzero()));
        let flags =
            stat.ok().and_then(|text| text.rsplit_once(") ")?.1.split(' ').nth(6)?.parse::<u32>().ok());
        flags.is_some_and(|flags| flags & EXITING != 0)
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
    porter: Option<Party>,
    /// The session's namespace of processes, as the kernel shows it to root.
    space: Option<PathBuf>,
    /// Who thaws its file system.
    thawer: Option<Pid>,
    /// The session's namespaces, until the porter has them.
    spaces: Vec<OwnedFd>,
    /// The process that made process 1, until it has been waited for.
    helper: Option<Pid>,
    ids: Option<Ids>,
    disk: Option<Disk>,
    cgroup: Option<Cgroup>,
    written: Option<Written>,
    carriers: Option<Carriers<'a>>,
    undelivered: Vec<Undelivered>,
    hold: Option<Hold<'a>>,
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
                return Ok(Ended::of_command(status, None));
            }
            tracing::debug!(?step, "A step of the plan");
            match step.actor() {
                Actor::Launcher => self.perform(step, &mut theirs)?,
                Actor::Mounter => {
                    let mounter = self.mounter.as_ref().ok_or_else(out_of_order)?;
                    let (told, _) = talk::ask(mounter.channel()?, n, &Value::Null, &[])?;
                    if step == Step::StartInit {
                        self.meet_init(&told, ours.take().ok_or_else(out_of_order)?)?;
                    }
                }
                Actor::Init if step == Step::CopyMounts => self.copy_mounts(n)?,
                Actor::Init => {
                    let init = self.init.as_ref().ok_or_else(out_of_order)?;
                    let size = terminal::size(self.terminals).to_json();
                    last = talk::ask(init.channel()?, n, &size, &[])?;
                    if step == Step::LockMounts {
                        self.spaces = std::mem::take(&mut last.1);
                    }
                }
            }
        }
        let (told, mut descriptors) = last;
        if let Some(why) = told["trouble"].as_str() {
            let status = told["status"].as_u64().and_then(|n| u8::try_from(n).ok()).unwrap_or(126);
            return Ok(Ended::of_command(status, Some(why.to_owned())));
        }
        if let Some(hold) = &mut self.hold {
            (hold.ready)(&self.written.as_ref().ok_or_else(out_of_order)?.session)?;
        }
        if let Some(inner) = descriptors.pop() {
            self.relay = Some(Relay::start(self.terminals, inner)?);
        }
        self.attend()
    }

    fn perform(&mut self, step: Step, theirs: &mut Option<OwnedFd>) -> Result<()> {
        match step {
            Step::WriteDown => self.written = Some(Written::new(self.run)?),
            Step::MakeCgroup => self.make_cgroup()?,
            Step::Attach if self.run.ordinary => {
                let ids = self.ids.as_ref().ok_or_else(out_of_order)?;
                let name = &self.written.as_ref().ok_or_else(out_of_order)?.session.name;
                self.disk = Some(Disk::serve(self.run, name, ids)?);
            }
            Step::Attach => {
                let name = &self.written.as_ref().ok_or_else(out_of_order)?.session.name;
                let disk = Disk::attach(self.run, name, self.signals)?;
                let source = disk.original.as_ref().and_then(|original| original.source.as_ref());
                let source = source.map(ToString::to_string);
                let written = self.written.as_mut().ok_or_else(out_of_order)?;
                written.set_attachment(&disk.id, source)?;
                self.disk = Some(disk);
            }
            Step::MakeIds if self.run.ordinary => {
                let ids = subordinate::ids()?;
                let alone = ids.alone.as_ref().map(|why| format!("{ALONE} ({why})"));
                let apart = self.cgroup.as_ref().and_then(Cgroup::shortfall).map(|what| format!("; {what}"));
                let (alone, apart) = (alone.unwrap_or_default(), apart.unwrap_or_default());
                (self.run.notice)(&format!("{WITHOUT_ROOT}{alone}{apart}"));
                self.ids = Some(ids);
            }
            Step::MakeIds => {
                let first = self.written.as_ref().ok_or_else(out_of_order)?.session.first_id;
                self.ids = Some(Ids::of_session(first)?);
            }
            Step::StartMounter => {
                let theirs = theirs.take().ok_or_else(out_of_order)?;
                self.start_mounter(theirs)?;
            }
            Step::StartPorter => self.start_porter()?,
            Step::StartCarriers => {
                let session = &self.written.as_ref().ok_or_else(out_of_order)?.session;
                let disk = self.disk.as_ref().ok_or_else(out_of_order)?;
                let inside = self.init.as_ref().ok_or_else(out_of_order)?.watch.as_fd();
                self.carriers = Some(Carriers::start(self.run, session, disk, inside, self.signals)?);
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

    fn make_cgroup(&mut self) -> Result<()> {
        cores::none()?;
        let written = self.written.as_mut().ok_or_else(out_of_order)?;
        let places = Places::find(&written.session.id);
        written.set_cgroups(places.paths())?;
        let cgroup = Cgroup::make(places, &self.run.limits)?;
        // An ordinary user hears of it in one line with all else.
        if let Some(what) = cgroup.shortfall().filter(|_| !self.run.ordinary) {
            (self.run.notice)(&what);
        }
        self.cgroup = Some(cgroup);
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
            cgroup: self.cgroup.as_ref(),
            terminals: self.terminals,
            signals: self.signals,
        };
        let pid = child::start(|| {
            self.signals.forget();
            // What it does not need; above all the launcher's ends of the channels, by whose end it knows of the
            // launcher's.
            let mut keep = vec![theirs.as_fd(), for_init.as_fd()];
            keep.extend(world.ids.map(|ids| ids.namespace.as_fd()));
            keep.extend(world.disk.tree());
            keep.extend(world.cgroup.iter().flat_map(|cgroup| cgroup.doors()));
            sys::process::keep_only(3, &keep).map_err(failed)?;
            let for_init = rustix::io::fcntl_dupfd_cloexec(&for_init, 3).map_err(|e| failed(e.into()))?;
            mounter::serve(&world, &theirs, for_init)
        })
        .map_err(failed)?;
        self.mounter = Some(Party::new(pid, ours)?);
        Ok(())
    }

    /// What is mounted in the session that this is a fork of, and what is in memory there.
    fn copy_mounts(&mut self, n: usize) -> Result<()> {
        let of = self.run.of.as_ref().ok_or_else(out_of_order)?;
        let disk = self.disk.as_mut().ok_or_else(out_of_order)?;
        let original = disk.original.take().ok_or_else(out_of_order)?;
        let copies = Copies::of_table(&original.table, &self.run.binds);
        let (sender, contents) = copies.send(of, &original.init, self.signals)?;
        let init = self.init.as_ref().ok_or_else(out_of_order)?;
        let made = talk::ask(init.channel()?, n, &copies.to_json(), &[contents.as_fd()]);
        drop(contents);
        let status = rustix::process::waitpid(Some(sender), WaitOptions::empty());
        let sent = matches!(status, Ok(Some((_, status))) if status.exit_status() == Some(0));
        let (told, _) = made.map_err(|error| {
            if sent { error } else { error.advise("see whether the session that is forked goes on") }
        })?;
        let left = told["left"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let left: Vec<_> = copies.left.iter().map(String::as_str).chain(left).collect();
        if !left.is_empty() {
            (self.run.notice)(&format!("not mounted in the fork: {}", left.join(", ")));
        }
        Ok(())
    }

    fn start_porter(&mut self) -> Result<()> {
        let failed = |error| Error::io("Cannot start who holds the namespaces", error);
        let spaces = std::mem::take(&mut self.spaces);
        let (ours, theirs) = control::pair().map_err(failed)?;
        let pid = child::start(|| -> Result<()> {
            self.signals.forget();
            let mut keep = vec![theirs.as_fd()];
            keep.extend(spaces.iter().map(AsFd::as_fd));
            sys::process::keep_only(3, &keep).map_err(failed)?;
            let _ = rustix::process::setsid();
            let _ = rustix::thread::set_name(c"memdev-porter");
            child::let_go_of_standard().map_err(failed)?;
            // Nothing is said: until the launcher lets it go.
            control::receive(theirs.as_fd()).map(drop).map_err(failed)
        })
        .map_err(failed)?;
        self.porter = Some(Party::new(pid, ours)?);
        let number = |fd: &OwnedFd| u32::try_from(fd.as_raw_fd()).ok();
        let numbers = spaces.iter().filter_map(number).collect();
        let pid = u32::try_from(pid.as_raw_nonzero().get()).unwrap_or(0);
        self.written.as_mut().ok_or_else(out_of_order)?.set_porter(pid, numbers)
    }

    fn meet_init(&mut self, told: &Value, channel: OwnedFd) -> Result<()> {
        let number =
            |key: &str| told[key].as_i64().and_then(|n| i32::try_from(n).ok()).and_then(Pid::from_raw);
        let (init, helper) = number("init").zip(number("helper")).ok_or_else(out_of_order)?;
        self.helper = Some(helper);
        self.init = Some(Party::new(init, channel)?);
        self.space = std::fs::read_link(format!("/proc/{}/ns/pid", init.as_raw_nonzero())).ok();
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
        let until = self.hold.as_ref().map(|hold| hold.until);
        let mut released = until.is_none();
        loop {
            let (Some(init), Some(disk)) = (&self.init, &mut self.disk) else { return Err(out_of_order()) };
            // What has ended would be found so again and again, a hang-up even by who asks for nothing: instead of that, it is
            // process 1, whose end is the end of this, that nothing is waited for at.
            let unless = |over| if over { PollFlags::empty() } else { PollFlags::IN };
            let channel = init.channel()?;
            let mut fds = vec![
                PollFd::new(self.signals, PollFlags::IN),
                PollFd::new(&init.watch, PollFlags::IN),
                PollFd::from_borrowed_fd(
                    disk.watch().filter(|_| !daemon_over).unwrap_or(init.watch.as_fd()),
                    unless(daemon_over),
                ),
                PollFd::from_borrowed_fd(if ending { init.watch.as_fd() } else { channel }, unless(ending)),
                PollFd::from_borrowed_fd(
                    until.filter(|_| !released).unwrap_or(init.watch.as_fd()),
                    unless(released),
                ),
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
            let mut release = ready[4] && !released;

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
                        // There is no command that it could be for.
                        _ if until.is_some() => release = true,
                        (SIGHUP, _) => hang_up(init, signal, &mut deadline),
                        _ => send_on(init, signal),
                    }
                }
            }
            if release {
                released = true;
                kill(init);
            }
            if ready[1] {
                break;
            }
            if daemon_ended {
                daemon_over = true;
                // In good order it ends because its device has, which has because process 1 is about to end, and with it
                // the last mount. Whether that is so is asked for, since the kernel unmounts before it closes what an
                // ending process has open: the channel may still be there.
                if !ending && !init_leaves && !init.is_ending() {
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
                let next = if !of_device {
                    Some(AFTER_KILL)
                } else if thaw(&mut self.space, &mut self.thawer, self.signals) {
                    Some(AFTER_THAW)
                } else {
                    disk.give_up()
                };
                deadline = next.map(|time| (Instant::now() + time, true));
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
        Ok(Ended::of_command(status, None))
    }

    /// Everything that is left, in the order in which it can go.
    fn end(&mut self) {
        self.relay = None;
        if let Some(init) = self.init.take() {
            kill(&init);
            self.wait_for(&init);
        }
        if let Some(porter) = self.porter.take() {
            kill(&porter);
            self.wait_for(&porter);
        }
        self.end_mounter();
        self.reap_helper();
        self.ids = None;
        if let Some(carriers) = self.carriers.take() {
            self.undelivered = carriers.finish(self.signals);
        }
        self.disk = None;
        // It waited for the disk at most.
        if let Some(thawer) = self.thawer.take() {
            let _ = rustix::process::waitpid(Some(thawer), WaitOptions::empty());
        }
        self.cgroup = None;
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
        let mut patience = Some(AFTER_KILL);
        while let Some(time) = patience {
            if party.ends_within(time) {
                break;
            }
            patience = if thaw(&mut self.space, &mut self.thawer, self.signals) {
                Some(AFTER_THAW)
            } else {
                self.disk.as_mut().and_then(Disk::give_up)
            };
        }
        let _ = rustix::process::waitpid(Some(party.pid), WaitOptions::empty());
    }
}

/// Where who has frozen the file system has been killed, and who watched over that as well, nobody inside can die. Whether
/// there is somebody now who thaws it, once.
fn thaw(space: &mut Option<PathBuf>, thawer: &mut Option<Pid>, signals: &Signals) -> bool {
    let started = space.take().and_then(|space| freeze::thaw_roots(&space, signals).ok());
    *thawer = thawer.or(started);
    started.is_some()
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
