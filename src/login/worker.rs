//! One login: a process of root's that looks who it is, makes the private root, and stays until it is gone.
//!
//! It is not the daemon's child in anything but name: the daemon may end and be started anew. When it dies, the launcher dies
//! with it, and with that everything inside.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};

use super::Daemon;
use super::person::Person;
use super::policy::{Held, Places};
use super::quiet;
use super::settings::{Grant, Second, Settings};
use super::talk::{self, Answer, Request};
use crate::attach::{Source, control, random_name};
use crate::carry::{CONFLICT, Undelivered};
use crate::error::{Error, ErrorKind, Result};
use crate::root::door::{Door, introduce};
use crate::root::{Ended, Enter, Session, child, sessions};
use crate::size;
use crate::sys;

/// The signals that a client may send on.
const SIGNALS: [i32; 7] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH];

/// How long a launcher whose client has gone may take, before it is killed: with it everything inside ends.
const AFTER_HANG_UP: Duration = Duration::from_millis(800);

/// The same if what was changed is a server's to keep, and has to be written to it.
const AFTER_HANG_UP_OF_SESSION: Duration = Duration::from_secs(40);

/// How long deliveries may take at the end before something is shown of them.
const BEFORE_PROGRESS: Duration = Duration::from_secs(1);

/// The kernel's number of the file system that pipes without a name are in (`PIPEFS_MAGIC`).
const PIPEFS: u64 = 0x5049_5045;

/// What everybody is told whose login is refused for a reason that is the administrator's.
const SEE_LOG: &str = "the log of 'memdev logind' says why";

/// Why there is no login.
struct Refusal {
    why: Error,
    /// What the user is told.
    told: &'static str,
}

impl From<Error> for Refusal {
    fn from(why: Error) -> Self {
        Self { why, told: SEE_LOG }
    }
}

/// Serves the login that `socket` asks for, of the user that the kernel says is behind it.
pub(super) fn serve(daemon: &Daemon, socket: &OwnedFd, uid: u32) {
    let mut worker = Worker { daemon, socket, uid, who: format!("user {uid}") };
    if let Err(refusal) = worker.serve() {
        tracing::warn!(user = worker.who, uid, error = %refusal.why, "Login refused");
        worker.answer(&Answer::Refused(refusal.told.to_owned()), &[]);
    }
}

/// What a login has of its user's: to be kept for as long as it lasts.
struct ByPolicy {
    /// The locks by which it counts.
    _counted: Vec<OwnedFd>,
    /// The name of the root that is shared, if one is, with what keeps it.
    shared: Option<(String, OwnedFd)>,
}

struct Worker<'a> {
    daemon: &'a Daemon,
    socket: &'a OwnedFd,
    uid: u32,
    /// Who logs in, for the log.
    who: String,
}

impl Worker<'_> {
    fn serve(&mut self) -> Result<(), Refusal> {
        let bad = || Error::new(ErrorKind::Protocol, "What came is no request");
        let failed = |error: io::Error| Error::io("Cannot hear what is asked for", error);
        talk::be_patient(self.socket.as_fd()).map_err(|error| failed(error.into()))?;
        let received = control::receive(self.socket.as_fd()).map_err(failed)?;
        let (value, descriptors) = received.ok_or_else(bad)?;
        match Request::from_json(&value).ok_or_else(bad)? {
            Request::Login { line, env } => {
                let standard = <[OwnedFd; 3]>::try_from(descriptors).map_err(|_| bad())?;
                let (person, mut grant) = self.look_up(Person::by_uid(self.uid))?;
                look_at(&standard, grant.run.privileged)?;
                grant.run.line = line;
                // What the administrator says comes last, and so is what is so.
                grant.run.env.splice(0..0, env);
                self.log_in(&person, grant, standard)
            }
            Request::Open { user, service } => {
                if self.uid != 0 {
                    let why = "Who is not root asks for a login of somebody else";
                    return Err(Error::new(ErrorKind::Denied, why).into());
                }
                let (person, grant) = self.look_up(Person::by_name(&user))?;
                self.open(&person, grant, &service)
            }
        }
    }

    /// What the settings say.
    fn look_up(&mut self, person: Result<Person>) -> Result<(Person, Grant)> {
        let person = person?;
        self.who.clone_from(&person.name);
        let mut grant = Settings::read(&self.daemon.config)?.grant(&person)?;
        grant.verify()?;
        grant.run.attachments.clone_from(&self.daemon.attachments);
        grant.run.sessions.clone_from(&self.daemon.sessions);
        grant.run.carrying.spool.clone_from(&self.daemon.spool);
        grant.run.carrying.state.clone_from(&self.daemon.carriers);
        grant.run.name = Some(format!("login-{}-{}", person.uid, &random_name()?[..6]));
        Ok((person, grant))
    }

    fn log_in(&self, person: &Person, grant: Grant, standard: [OwnedFd; 3]) -> Result<(), Refusal> {
        let ByPolicy { _counted, shared } = self.by_policy(person, &grant)?;
        let has_to_be_written = shared.is_none() && matches!(grant.run.source, Source::Export(_));
        let failed = |error: io::Error| Error::io("Cannot start a launcher", error);
        let (ours, theirs) = control::pair().map_err(failed)?;
        let entered = shared.as_ref().map(|(name, _)| name.clone());
        let name = entered.clone().or_else(|| grant.run.name.clone());
        let mut run = grant.run;
        let carried = run.carrying.carries.clone();
        run.carrying.notice = note;
        run.carrying.progress = progress;
        let launcher = child::start(|| -> Result<()> {
            sys::process::keep_only(3, &keep(&standard, &theirs)).map_err(failed)?;
            take_standard(&standard).map_err(failed)?;
            drop(standard);
            let ended = quiet(|| match entered {
                Some(session) => Enter {
                    session,
                    command: Vec::new(),
                    line: run.line,
                    login: true,
                    env: run.env,
                    workdir: None,
                    user: run.user,
                    stranger: run.stranger,
                    sessions: run.sessions,
                }
                .run(),
                None => run.run(),
            });
            control::send(theirs.as_fd(), &told(ended), &[]).map_err(failed)
        });
        let launcher = launcher.map_err(failed)?;
        drop(theirs);
        tracing::info!(user = self.who, session = name, "A login begins");
        let is_run_by = |session: &Session| name.as_ref() == Some(&session.name);
        let carries = !carried.is_empty();
        let delivers = || {
            let all = sessions(&self.daemon.sessions).unwrap_or_default();
            carries
                && all.iter().any(|session| is_run_by(session) && session.init != 0 && session.has_ended())
        };
        let patience = || {
            // There is nothing to be written before there is anybody inside.
            let begun = || {
                let all = sessions(&self.daemon.sessions).unwrap_or_default();
                all.iter().any(|session| is_run_by(session) && session.init != 0)
            };
            if has_to_be_written && begun() { AFTER_HANG_UP_OF_SESSION } else { AFTER_HANG_UP }
        };
        let ended = self.attend(launcher, &ours, patience, delivers);
        tracing::info!(user = self.who, session = name, "A login has ended");
        drop(shared);
        let answer = ended?;
        self.answer(&answer, &[]);
        Ok(())
    }

    /// What the user's other logins mean for this one: what is to be kept meanwhile, and what is to be entered.
    fn by_policy(&self, person: &Person, grant: &Grant) -> Result<ByPolicy, Refusal> {
        let places = Places::open(self.daemon.users())?;
        let too_many = || Refusal {
            why: Error::new(ErrorKind::InUse, "The user has as many logins as there may be at once:")
                .on(grant.logins),
            told: "you have too many logins",
        };
        let mut counted = vec![places.one_of(person.uid, grant.logins)?.ok_or_else(too_many)?];
        let shared = match grant.second {
            Second::Own => None,
            Second::Refuse => {
                counted.push(places.only(person.uid)?.ok_or_else(|| Refusal {
                    why: Error::new(ErrorKind::InUse, "The user is logged in already"),
                    told: "you are logged in already",
                })?);
                None
            }
            Second::Join => Some(places.shared(person.uid, grant.run.clone())?),
        };
        Ok(ByPolicy { _counted: counted, shared })
    }

    /// Until the launcher has ended; sees to it that it does when the client has gone.
    ///
    /// While it `delivers` it is left alone: nobody is inside any more, and it gives up by itself.
    fn attend(
        &self,
        launcher: Pid,
        result: &OwnedFd,
        patience: impl Fn() -> Duration,
        delivers: impl Fn() -> bool,
    ) -> Result<Answer> {
        let failed = |error: rustix::io::Errno| Error::io("Cannot wait for the launcher", error);
        let watch = rustix::process::pidfd_open(launcher, PidfdFlags::empty()).map_err(failed)?;
        let send = |signal: Signal| {
            let _ = rustix::process::pidfd_send_signal(&watch, signal);
        };
        let mut deadline: Option<Instant> = None;
        loop {
            let client = if deadline.is_some() { PollFlags::empty() } else { PollFlags::IN };
            let other = if deadline.is_some() { watch.as_fd() } else { self.socket.as_fd() };
            let mut fds = [PollFd::new(&watch, PollFlags::IN), PollFd::from_borrowed_fd(other, client)];
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed(error)),
            }
            let (ended, heard) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
            if ended {
                break;
            }
            if heard && deadline.is_none() {
                match self.hear_signal() {
                    Some(signal) => send(signal),
                    None => {
                        send(Signal::HUP);
                        deadline = Some(Instant::now() + patience());
                    }
                }
            }
            if deadline.is_some_and(|at| Instant::now() >= at) {
                deadline = Some(if delivers() {
                    Instant::now() + Duration::from_secs(1)
                } else {
                    send(Signal::KILL);
                    Instant::now() + Duration::from_secs(60)
                });
            }
        }
        let _ = rustix::process::waitpid(Some(launcher), WaitOptions::empty());
        let died = || Error::new(ErrorKind::Io, "The launcher of the private root has died");
        let (value, _) = talk::hear(result.as_fd(), 1)?.ok_or_else(died)?;
        if let Some(error) = control::error_from_json(&value) {
            return Err(error);
        }
        self.log_carried(&value);
        Answer::from_json(&value).ok_or_else(died)
    }

    /// What became of files, for the log.
    fn log_carried(&self, told: &Value) {
        let list = |key: &str| told[key].as_array().into_iter().flatten();
        for note in list("notes").filter_map(Value::as_str) {
            tracing::info!(user = self.who, note, "Of the files of a login");
        }
        for rest in list("undelivered").filter_map(Undelivered::from_json) {
            tracing::warn!(user = self.who, %rest, "Files of a login were not delivered");
        }
    }

    /// A signal that the client sends on; `None` if it has gone, or is none.
    fn hear_signal(&self) -> Option<Signal> {
        let (value, _) = control::receive(self.socket.as_fd()).ok()??;
        let signal = value["signal"].as_i64().and_then(|n| i32::try_from(n).ok())?;
        SIGNALS.contains(&signal).then(|| Signal::from_named_raw(signal))?
    }

    /// A way in for a login program, until that has closed it.
    fn open(&self, person: &Person, grant: Grant, service: &str) -> Result<(), Refusal> {
        grant.by_pam()?;
        let ByPolicy { _counted, shared } = self.by_policy(person, &grant)?;
        let (held, session) = match &shared {
            Some((name, _)) => {
                let gone = || Error::new(ErrorKind::NotFound, "The private root has just ended:").on(name);
                let all = sessions(&self.daemon.sessions)?;
                (None, all.into_iter().find(|session| session.name == *name).ok_or_else(gone)?)
            }
            None => {
                let (held, session) = Held::start(grant.run)?;
                (Some(held), session)
            }
        };
        let door = Door::of(&session)?;
        // Somebody else goes first: a program that finds out halfway that it cannot be there can tell nobody.
        let user = person.as_stranger();
        child::call(|| {
            door.step_in(&user)?;
            introduce(&user)?;
            Ok(Vec::new())
        })?;
        let open = Answer::Open { own_network: door.has_own_network(), root: session.first_id };
        self.answer(&open, &[door.process()]);
        drop(door);
        tracing::info!(user = self.who, session = session.name, service, "A login begins");
        self.wait_for_close(held.as_ref());
        tracing::info!(user = self.who, session = session.name, service, "A login has ended");
        drop(held);
        Ok(())
    }

    fn wait_for_close(&self, held: Option<&Held>) {
        loop {
            let root = held.map_or(self.socket.as_fd(), |held| held.watch.as_fd());
            let mut fds =
                [PollFd::new(self.socket, PollFlags::IN), PollFd::from_borrowed_fd(root, PollFlags::IN)];
            match poll(&mut fds, None) {
                // Nothing is said any more: it is the end, of either.
                Ok(1..) => return,
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    fn answer(&self, answer: &Answer, descriptors: &[BorrowedFd<'_>]) {
        // Who has gone needs none.
        if let Err(error) = control::send(self.socket.as_fd(), &answer.to_json(), descriptors) {
            tracing::debug!(%error, "Cannot answer a login");
        }
    }
}

fn keep<'a>(standard: &'a [OwnedFd; 3], channel: &'a OwnedFd) -> Vec<BorrowedFd<'a>> {
    standard.iter().map(AsFd::as_fd).chain([channel.as_fd()]).collect()
}

fn take_standard(standard: &[OwnedFd; 3]) -> io::Result<()> {
    rustix::stdio::dup2_stdin(&standard[0])?;
    rustix::stdio::dup2_stdout(&standard[1])?;
    rustix::stdio::dup2_stderr(&standard[2])?;
    Ok(())
}

fn told(ended: Result<Ended>) -> Value {
    match ended {
        Ok(ended) => {
            let undelivered = ended.undelivered();
            let lines = undelivered.iter().map(Undelivered::for_user);
            let lines: Vec<_> = ended.trouble().map(str::to_owned).into_iter().chain(lines).collect();
            let trouble = (!lines.is_empty()).then(|| lines.join("; "));
            let mut told = Answer::Ended { status: ended.status(), trouble }.to_json();
            // This much is the log's.
            told["undelivered"] = undelivered.iter().map(Undelivered::to_json).collect();
            told["notes"] = NOTES.lock().map(|notes| json!(*notes)).unwrap_or_default();
            told
        }
        Err(error) => control::error_to_json(&error),
    }
}

/// What there is to be noted of a launcher's files: it has no log, and this process is its own.
static NOTES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// How many notes there are in the log of one login, and how long each is: they come in one message.
const NOTES_MAX: usize = 16;
const NOTE_MAX: usize = 200;

/// Notes something for the log. That there are two versions of a file now the user is told, too.
fn note(text: &str) {
    if text.contains(CONFLICT) {
        tell(&format!("memdev: {}\n", text.replace(char::is_control, " ")));
    }
    if let Ok(mut notes) = NOTES.lock()
        && notes.len() < NOTES_MAX
    {
        notes.push(text.chars().take(NOTE_MAX).collect());
    }
}

/// Shows on a terminal how far the deliveries are, if they take time.
fn progress(far: Option<(u64, u64)>) {
    static SINCE: Mutex<Option<Instant>> = Mutex::new(None);
    let stderr = rustix::stdio::stderr();
    let Ok(mut since) = SINCE.lock() else { return };
    if !rustix::termios::isatty(stderr) {
        return;
    }
    match far {
        Some((done, all)) if since.get_or_insert_with(Instant::now).elapsed() > BEFORE_PROGRESS => {
            let (done, all) = (size::human(done), size::human(all));
            tell(&format!(
                "\r\x1b[Kmemdev: your files are delivered: {done} of {all}; Ctrl-C keeps the rest"
            ));
        }
        None if since.take().is_some_and(|since| since.elapsed() > BEFORE_PROGRESS) => tell("\r\x1b[K"),
        Some(_) | None => {}
    }
}

fn tell(text: &str) {
    // A user who does not read it, or does not hear it any more, does not hold anything up.
    let mut fds = [PollFd::from_borrowed_fd(rustix::stdio::stderr(), PollFlags::OUT)];
    if matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1..)) {
        let _ = io::Write::write_all(&mut io::stderr(), text.as_bytes());
    }
}

/// Which descriptors are taken from a user: those that lead nowhere but to what is in them.
///
/// Whoever has any rights on the host can open a file there just by name (`O_PATH`), or to be read only; root inside, if it
/// is the host's user 0, could open it anew by way of `/proc/self/fd` as it likes. So a privileged root gets pipes, sockets
/// and terminals, which have no name.
fn look_at(standard: &[OwnedFd; 3], privileged: bool) -> Result<()> {
    for (number, fd) in standard.iter().enumerate() {
        let failed = |error: rustix::io::Errno| Error::io("Cannot look at a descriptor of the user's", error);
        let stat = rustix::fs::fstat(fd).map_err(failed)?;
        let by_name = rustix::fs::fcntl_getfl(fd).map_err(failed)?.contains(OFlags::PATH);
        let is_null = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)) == (1, 3);
        let nameless = || {
            let pipes = rustix::fs::fstatfs(fd).is_ok_and(|fs| u64::try_from(fs.f_type) == Ok(PIPEFS));
            pipes || FileType::from_raw_mode(stat.st_mode) == FileType::Socket
        };
        let fine = match FileType::from_raw_mode(stat.st_mode) {
            FileType::CharacterDevice => is_null || rustix::termios::isatty(fd),
            FileType::RegularFile | FileType::Fifo | FileType::Socket => !privileged || nameless(),
            _ => false,
        };
        if by_name || !fine {
            let why =
                format!("Descriptor {number} is none that a login takes: a pipe, a socket or a terminal");
            return Err(Error::new(ErrorKind::Invalid, why));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn what_leads_to_the_host_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "x").unwrap();
        let null = || OwnedFd::from(File::options().read(true).write(true).open("/dev/null").unwrap());
        let look = |fd: OwnedFd, privileged| look_at(&[null(), fd, null()], privileged).is_ok();
        let file = || OwnedFd::from(File::open(&path).unwrap());
        assert!(look(null(), true));
        assert!(look(io::pipe().unwrap().0.into(), true));
        assert!(look(control::pair().unwrap().0, true));
        assert!(look(file(), false));
        assert!(!look(file(), true));
        let by_name = |path: &std::path::Path| {
            rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, rustix::fs::Mode::empty()).unwrap()
        };
        assert!(!look(by_name(&path), false));
        assert!(!look(by_name(dir.path()), false));
        assert!(!look(File::open(dir.path()).unwrap().into(), false));
        assert!(!look(File::open("/dev/zero").unwrap().into(), false));
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        let open = || OwnedFd::from(File::options().read(true).write(true).open(&fifo).unwrap());
        assert!(look(open(), false));
        assert!(!look(open(), true));
    }
}
