//! Into a private root that runs: one more command there, with the same rights and the same view.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGWINCH};

use super::account::Stranger;
use super::command::{Order, Ready};
use super::launcher::{AFTER_HANG_UP, OF_TERMINALS, catch, may_begin};
use super::limits::Swap;
use super::record::{Session, sessions, started};
use super::signals::Signals;
use super::terminal::{self, Relay};
use super::{Ended, Network, cgroup, child, cores, door, ids, init, privileges};
use crate::attach::control;
use crate::error::{Error, ErrorKind, Result};
use crate::sys;

/// What is to be run in a private root that runs already.
#[derive(Clone, Debug)]
pub struct Enter {
    /// The session's name, or the beginning of its id.
    pub session: String,
    /// The program and its arguments; without any, the user's shell.
    pub command: Vec<OsString>,
    /// What the user's shell is to do, if there is no command.
    pub line: Option<OsString>,
    /// Whether a shell is started as one that has just been logged in to.
    pub login: bool,
    /// Variables for the command.
    pub env: Vec<(OsString, OsString)>,
    /// The directory that the command begins in.
    pub workdir: Option<PathBuf>,
    /// `USER[:GROUP]`, names of the image's, or numbers; without it root.
    pub user: Option<String>,
    /// Who it is if the image does not know that user.
    pub stranger: Option<Stranger>,
    /// Where running sessions are written down.
    pub sessions: PathBuf,
}

impl Enter {
    /// Runs the command, and returns when it has ended; or when the session has, which ends all that is in it.
    ///
    /// What [`Run::run`](super::Run::run) says of standard input and output, signals and threads goes for this as well.
    ///
    /// # Errors
    /// `NotFound` if there is no such session; what else stands in the way of starting the command.
    pub fn run(self) -> Result<Ended> {
        let terminals = terminal::standard()?;
        may_begin()?;
        let signals = catch()?;
        let session = find(sessions(&self.sessions)?, &self.session)?;
        let gone = || Error::new(ErrorKind::NotFound, "The session has just ended").on(&session.name);
        let doors = Doors::of(&session)?.ok_or_else(gone)?;
        let order = Order {
            command: &self.command,
            line: self.line.as_deref(),
            login: self.login,
            env: &self.env,
            workdir: self.workdir.as_deref(),
            user: self.user.as_deref(),
            stranger: self.stranger.as_ref(),
            session: &session.name,
            terminals,
            ends_with_parent: true,
        };
        let failed = |error| Error::io("Cannot enter the session", error);
        let (ours, theirs) = control::pair().map_err(failed)?;
        let inside = Inside { order: &order, session: &session, signals: &signals };
        let command = inside.start(&doors, theirs)?;
        let watch = rustix::process::pidfd_open(command, PidfdFlags::empty());
        let started = watch.map_err(|error| failed(error.into())).and_then(|watch| {
            let (told, mut descriptors) = hear(&ours)?.ok_or_else(gone)?;
            if let Some(error) = control::error_from_json(&told) {
                return Err(error);
            }
            // Nothing more is said if it has become the command.
            let trouble = hear(&ours)?.map(|(told, _)| told);
            let relay = descriptors.pop().map(|inner| Relay::start(terminals, inner)).transpose()?;
            Ok((watch, trouble, relay))
        });
        let waited = || rustix::process::waitpid(Some(command), WaitOptions::empty());
        let (watch, trouble, relay) = match started {
            Ok(started) => started,
            Err(error) => {
                let _ = rustix::process::kill_process(command, Signal::KILL);
                let _ = waited();
                return Err(error);
            }
        };
        if trouble.is_none() {
            attend(command, &watch, relay, &signals)?;
        }
        let status = waited().map_err(|error| failed(error.into()))?;
        if let Some(told) = trouble {
            let why = told["trouble"].as_str().unwrap_or_default().to_owned();
            let status = told["status"].as_u64().and_then(|n| u8::try_from(n).ok()).unwrap_or(126);
            return Ok(Ended::of_command(status, Some(why)));
        }
        Ok(Ended::of_command(status.map_or(1, |(_, status)| init::status_of(status)), None))
    }
}

fn hear(channel: &OwnedFd) -> Result<Option<(Value, Vec<OwnedFd>)>> {
    control::receive(channel.as_fd()).map_err(|error| Error::io("Cannot hear what goes on inside", error))
}

/// The session that is meant.
pub(super) fn find(all: Vec<Session>, wanted: &str) -> Result<Session> {
    let names: Vec<_> = all.iter().map(|session| session.name.clone()).collect();
    let is_it = |session: &Session| session.name == wanted;
    let begins = |session: &Session| wanted.len() >= 4 && session.id.starts_with(wanted);
    let at = all.iter().position(is_it).or_else(|| all.iter().position(begins));
    at.and_then(|at| all.into_iter().nth(at)).filter(|session| session.init != 0).ok_or_else(|| {
        let there = match &names[..] {
            [] => "there is none".to_owned(),
            names => format!("there is {}", names.join(", ")),
        };
        Error::new(ErrorKind::NotFound, format!("No private root is called '{wanted}': {there}"))
    })
}

/// The ways into a session's namespaces.
enum Doors {
    /// Process 1, for root.
    Init(OwnedFd),
    /// Each by itself, in their order.
    Spaces(Vec<OwnedFd>),
}

impl Doors {
    /// Those of `session`; `None` if it has just ended.
    fn of(session: &Session) -> Result<Option<Self>> {
        let (pid, since) = session
            .porter
            .as_ref()
            .map_or((session.init, session.init_started), |porter| (porter.pid, porter.started));
        let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let Ok(process) = rustix::process::pidfd_open(number, PidfdFlags::empty()) else { return Ok(None) };
        let open = |space: &u32| File::open(format!("/proc/{pid}/fd/{space}")).map(OwnedFd::from);
        let spaces = session.porter.as_ref().map(|porter| porter.spaces.iter().map(open).collect());
        // Only now: while the process was there its number was nobody else's.
        if started(pid) != Some(since) {
            return Ok(None);
        }
        spaces.map_or(Ok(Some(Self::Init(process))), |spaces: io::Result<_>| {
            let failed = |error| Error::io("Cannot enter the session", error);
            Ok(Some(Self::Spaces(spaces.map_err(failed)?)))
        })
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Init(process) => vec![process.as_fd()],
            Self::Spaces(spaces) => spaces.iter().map(AsFd::as_fd).collect(),
        }
    }

    fn go_in(&self, session: &Session) -> rustix::io::Result<()> {
        match self {
            Self::Spaces(spaces) => spaces
                .iter()
                .try_for_each(|space| rustix::thread::move_into_link_name_space(space.as_fd(), None)),
            Self::Init(process) => {
                let spaces = door::spaces(!session.privileged, session.own_network);
                rustix::thread::move_into_thread_name_spaces(process.as_fd(), spaces)
            }
        }
    }
}

struct Inside<'a> {
    order: &'a Order<'a>,
    session: &'a Session,
    signals: &'a Signals,
}

impl Inside<'_> {
    /// Starts what becomes the command, by way of a process that goes inside first: its children are there.
    fn start(&self, doors: &Doors, channel: OwnedFd) -> Result<Pid> {
        let failed = |error| Error::io("Cannot enter the session", error);
        let (mut told, tell) = io::pipe().map_err(failed)?;
        let helper = child::start(|| {
            self.signals.forget();
            match self.go_inside(doors, &channel, tell.as_fd()) {
                Ok(command) => write!(&tell, "{}", command.as_raw_nonzero()),
                Err(error) => write!(&tell, "{error}"),
            }
        })
        .map_err(failed)?;
        drop((tell, channel));
        let mut text = String::new();
        let heard = told.read_to_string(&mut text);
        let _ = rustix::process::waitpid(Some(helper), WaitOptions::empty());
        heard.map_err(failed)?;
        let command = text.parse::<i32>().ok().and_then(Pid::from_raw);
        command.ok_or_else(|| Error::new(ErrorKind::Io, text))
    }

    fn go_inside(&self, doors: &Doors, channel: &OwnedFd, tell: BorrowedFd<'_>) -> Result<Pid> {
        let failed = |error: io::Error| Error::io("Cannot enter the session", error);
        self.join_cgroup()?;
        // Before anybody inside could look: of the host's there remains what is needed to get there.
        privileges::be_opaque().map_err(failed)?;
        let mut keep = vec![channel.as_fd(), tell];
        keep.extend(doors.descriptors());
        sys::process::keep_only(3, &keep).map_err(failed)?;
        doors.go_in(self.session).map_err(|error| failed(error.into()))?;
        // Its root and directory are those of the session by now.
        rustix::process::chdir("/").map_err(|error| failed(error.into()))?;
        if !self.session.privileged {
            ids::become_root().map_err(failed)?;
        }
        child::start_sibling(|| self.become_command(channel)).map_err(failed)
    }

    /// What is in its control group is the session, as far as limits are concerned.
    fn join_cgroup(&self) -> Result<()> {
        cores::none()?;
        let limits = &self.session.limits;
        match cgroup::enter(&self.session.cgroups) {
            Err(error) if limits.pids.or(limits.memory).is_some() || limits.swap == Swap::Never => {
                Err(error.advise("enter it from where it was started"))
            }
            // An ordinary user may do so only where the session was started from.
            Err(error) => {
                tracing::warn!(%error, "This command is not in the session's control group");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Tells what came of it until it has become the command, by which the channel is closed.
    fn become_command(&self, channel: &OwnedFd) -> Result<()> {
        let failed = |error| Error::io("Cannot tell what goes on inside", error);
        let say =
            |value: &Value, terminal: &[BorrowedFd<'_>]| control::send(channel.as_fd(), value, terminal);
        let prepared = (|| {
            privileges::be_opaque().map_err(|error| Error::io("Cannot hide from the session", error))?;
            // The host's user 0 has all of its rights still.
            sys::process::keep_only(3, &[channel.as_fd()]).map_err(failed)?;
            sys::process::leave_keyring();
            if self.session.privileged {
                let network = if self.session.own_network { Network::None } else { Network::Host };
                privileges::give_up(network == Network::None)?;
            }
            let ready = Ready::new(self.order)?;
            let terminal = ready.terminal(&terminal::size(self.order.terminals))?;
            Ok((ready, terminal))
        })();
        let (ready, terminal) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return say(&control::error_to_json(&error), &[]).map_err(failed),
        };
        let (outer, inner) = terminal.unzip();
        say(&json!({}), &outer.iter().map(AsFd::as_fd).collect::<Vec<_>>()).map_err(failed)?;
        drop(outer);
        let told = ready.execute(inner.as_ref().map(AsFd::as_fd));
        say(&told, &[]).map_err(failed)
    }
}

/// Until the command has ended: sends signals on, moves what is typed and shown.
fn attend(command: Pid, watch: &OwnedFd, mut relay: Option<Relay>, signals: &Signals) -> Result<()> {
    let mut deadline: Option<Instant> = None;
    let send = |signal: i32| {
        let Some(named) = Signal::from_named_raw(signal) else { return };
        let _ = if OF_TERMINALS.contains(&signal) {
            rustix::process::kill_process_group(command, named)
        } else {
            rustix::process::pidfd_send_signal(watch, named)
        };
    };
    loop {
        let mut fds = vec![PollFd::new(signals, PollFlags::IN), PollFd::new(watch, PollFlags::IN)];
        let fixed = fds.len();
        fds.extend(relay.iter().flat_map(Relay::wanted));
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::io("Cannot wait for the command", error)),
        }
        let ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let mut hung_up = false;
        if let Some(relay) = &mut relay {
            let may_read = relay.reads_outside() && ready.len() > fixed && ready.last() == Some(&true);
            hung_up = relay.turn(may_read);
        }
        for signal in signals.take() {
            match (signal, &relay) {
                (SIGWINCH, Some(relay)) => relay.resize(),
                (SIGWINCH, None) => {}
                (SIGHUP, _) => hung_up = true,
                _ => send(signal),
            }
        }
        if ready[1] {
            return Ok(());
        }
        if hung_up {
            send(SIGHUP);
            deadline.get_or_insert(Instant::now() + AFTER_HANG_UP);
        }
        if deadline.is_some_and(|at| Instant::now() >= at) {
            let _ = rustix::process::pidfd_send_signal(watch, Signal::KILL);
            deadline = Some(Instant::now() + Duration::from_secs(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(name: &str, id: &str) -> Session {
        Session {
            id: id.to_owned(),
            name: name.to_owned(),
            source: String::new(),
            privileged: false,
            init: 1,
            init_started: 0,
            launcher: 0,
            first_id: 0,
            own_network: false,
            stem: String::new(),
            attachment: String::new(),
            partition: None,
            binds: Vec::new(),
            porter: None,
            cgroups: Vec::new(),
            limits: crate::root::Limits::default(),
        }
    }

    #[test]
    fn sessions_are_found_by_name_or_by_the_beginning_of_their_id() {
        let all = || vec![session("one", "aaaa1111"), session("aaaa", "bbbb2222")];
        assert_eq!(find(all(), "one").unwrap().name, "one");
        assert_eq!(find(all(), "aaaa").unwrap().name, "aaaa");
        assert_eq!(find(all(), "aaaa1").unwrap().name, "one");
        let error = find(all(), "bbb").unwrap_err().to_string();
        assert_eq!(error, "No private root is called 'bbb': there is one, aaaa");
        assert!(find(Vec::new(), "x").unwrap_err().to_string().ends_with("there is none"));
    }
}
