//! The processes that carry files out of a private root: started when its file system is there and nobody is inside, and
//! seen to the end when nobody is inside any more.
//!
//! Each carried directory has a carrier, and a guard that starts another one if that is killed. Neither ends with the
//! launcher: they end when process 1 has, and everything is delivered or in the spool. Until then they hold the file system, and the
//! channel by which the device's daemon knows that it is wanted still.
//!
//! They see the file system in a mount of their own, which is in no tree, has nothing mounted in it, and no shifted owners:
//! so there are the numbers that are on the disk, which are those inside.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, WaitOptions};
use serde_json::{Value, json};
use signal_hook::consts::SIGWINCH;

use super::device::{Disk, Medium};
use super::mounts::{self, NOEXEC, NOSUID};
use super::record::Session;
use super::signals::Signals;
use super::{Ended, Run, account, child};
use crate::attach::{Source, control};
use crate::carry::{self, Job, KnownPaths, NOT_DELIVERED, Options, Report, Undelivered};
use crate::error::{Error, ErrorKind, Result};
use crate::sys;

/// How often a guard starts another carrier, and how long it waits before.
const TAKEOVERS: u32 = 50;
const BEFORE_TAKEOVER: Duration = Duration::from_millis(200);

/// All carriers of a private root.
pub(super) struct Carriers<'a> {
    options: &'a Options,
    all: Vec<Carrier>,
}

/// One carried directory.
struct Carrier {
    place: PathBuf,
    destination: String,
    session: (String, String),
    /// User and group of whom everything is, if it is one's.
    person: Option<(u32, u32)>,
    /// Process 1.
    inside: OwnedFd,
    root: OwnedFd,
    journal: OwnedFd,
    /// By what the device's daemon knows that it is wanted.
    wanted: Option<OwnedFd>,
    guard: Option<Pid>,
    channel: OwnedFd,
}

impl<'a> Carriers<'a> {
    /// Fills the directories, and starts to watch them.
    ///
    /// # Errors
    /// A destination cannot be used, or a directory not be filled.
    pub(super) fn start(
        run: &'a Run,
        session: &Session,
        disk: &Disk,
        inside: BorrowedFd<'_>,
        signals: &Signals,
    ) -> Result<Self> {
        let options = &run.carrying;
        let person = options.of_user.then(|| person(run, session)).transpose()?;
        if !options.carries.is_empty() {
            options.check_encryption()?;
        }
        let mut this = Self { options, all: Vec::new() };
        for carry in &options.carries {
            let failed = |error| Error::io("Cannot start to carry", error).on_path(&carry.path);
            if disk.read_only {
                let why = "A session that cannot be written to has no files to be carried:";
                return Err(Error::new(ErrorKind::Unsupported, why).on(&session.name));
            }
            let root = root_of(run, disk)?;
            let place = carry::place(&root, &carry.path, person)?;
            let journal = KnownPaths::journal().map_err(failed)?.into();
            let copy = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(failed);
            let mut carrier = Carrier {
                place,
                destination: carry.destination.clone(),
                session: (session.id.clone(), session.name.clone()),
                person,
                inside: copy(inside)?,
                root,
                journal,
                wanted: disk.watch().map(copy).transpose()?,
                guard: None,
                // Replaced at once.
                channel: copy(inside)?,
            };
            carrier.begin(options, signals)?;
            carrier.wait_until_filled(options, signals)?;
            this.all.push(carrier);
        }
        Ok(this)
    }

    /// When nobody is inside any more: waits until everything is delivered or in the spool, and tells what is
    /// there, or lost.
    pub(super) fn finish(self, signals: &Signals) -> Vec<Undelivered> {
        let options = self.options;
        let undelivered =
            self.all.into_iter().filter_map(|carrier| carrier.finish(options, signals)).collect();
        (options.progress)(None);
        undelivered
    }
}

/// What the command's end is together with that of its files.
pub(super) fn outcome(ended: Result<Ended>, undelivered: Vec<Undelivered>) -> Result<Ended> {
    if undelivered.is_empty() {
        return ended;
    }
    match ended {
        Ok(Ended { status, trouble, .. }) => {
            Ok(Ended { status: if status == 0 { NOT_DELIVERED } else { status }, trouble, undelivered })
        }
        Err(error) => {
            let lines: Vec<_> = undelivered.iter().map(ToString::to_string).collect();
            Err(Error::new(error.kind(), format!("{error}; {}", lines.join("; "))))
        }
    }
}

/// User and group of whom the command will be: as process 1 will look them up, in what is mounted there by now.
fn person(run: &Run, session: &Session) -> Result<(u32, u32)> {
    let failed = |error: rustix::io::Errno| Error::io("Cannot look who the user is inside", error);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(format!("/proc/{}/root", session.init), flags, Mode::empty());
    let root = root.map_err(failed)?;
    let account = account::look_up_below(root.as_fd(), run.user.as_deref(), run.stranger.as_ref())?;
    Ok((account.user.as_raw(), account.group.as_raw()))
}

/// The root directory of the private root's file system, in a mount of its own.
fn root_of(run: &Run, disk: &Disk) -> Result<OwnedFd> {
    let Some(Medium::Device { path, kind }) = &disk.medium else {
        return Err(Error::new(ErrorKind::Unsupported, "There is no device whose files could be carried"));
    };
    let is_copy = matches!(run.source, Source::Image { .. });
    let mount = mounts::image(path, *kind, (false, is_copy), None)?;
    let none = rustix::mount::MountAttrFlags::empty();
    sys::mount::set_attributes(mount.as_fd(), false, NOSUID | NOEXEC | mounts::NODEV, none, None)
        .map_err(|error| Error::io("Cannot set the attributes of the mount to carry from", error))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(&mount, ".", flags, Mode::empty())
        .map_err(|error| Error::io("Cannot open the root to carry from", error))
}

impl Carrier {
    /// Starts the guard, which starts the carrier.
    fn begin(&mut self, options: &Options, signals: &Signals) -> Result<()> {
        let failed = |error| Error::io("Cannot start who carries", error);
        let (ours, theirs) = control::pair().map_err(failed)?;
        let this = &*self;
        let guard = child::start_alone(|| {
            signals.forget();
            let mut keep = vec![theirs.as_fd(), this.inside.as_fd(), this.root.as_fd(), this.journal.as_fd()];
            keep.extend(this.wanted.as_ref().map(AsFd::as_fd));
            sys::process::keep_only(3, &keep)?;
            // What a terminal sends to all in the foreground is not for it; what it needs is its own to end.
            let _ = rustix::process::setsid();
            sys::process::block_signals()?;
            child::let_go_of_standard()?;
            let _ = rustix::process::chdir("/");
            this.guard(options, &theirs)
        });
        self.guard = Some(guard.map_err(failed)?);
        self.channel = ours;
        Ok(())
    }

    fn guard(&self, options: &Options, channel: &OwnedFd) -> std::io::Result<()> {
        let _ = rustix::thread::set_name(c"memdev-guard");
        for _ in 0..TAKEOVERS {
            let carrier = child::start_alone(|| {
                let _ = rustix::thread::set_name(c"memdev-carry");
                self.carry(options, channel).inspect_err(|error| {
                    let _ = control::send(channel.as_fd(), &control::error_to_json(error), &[]);
                })
            })?;
            let status = loop {
                match rustix::process::waitpid(Some(carrier), WaitOptions::empty()) {
                    Err(rustix::io::Errno::INTR) => {}
                    status => break status?,
                }
            };
            let has_finished = status.is_some_and(|(_, status)| status.exit_status() == Some(0));
            // One that had not filled yet has no successor: nobody is let in.
            if has_finished || !KnownPaths::was_filled(self.journal.try_clone()?)? {
                break;
            }
            std::thread::sleep(BEFORE_TAKEOVER);
        }
        Ok(())
    }

    fn carry(&self, options: &Options, channel: &OwnedFd) -> Result<()> {
        let failed = |error| Error::io("Cannot begin to carry", error);
        let job = Job {
            options,
            destination: &self.destination,
            root: self.root.try_clone().map_err(failed)?,
            place: self.place.clone(),
            session_id: &self.session.0,
            session_name: &self.session.1,
            person: self.person,
            inside: self.inside.as_fd(),
            journal: self.journal.try_clone().map_err(failed)?,
        };
        carry::serve(job, channel.as_fd())
    }

    fn wait_until_filled(&mut self, options: &Options, signals: &Signals) -> Result<()> {
        loop {
            if self.hear(signals) {
                let Some(word) = self.receive() else { return Err(carry::died()) };
                if let Some(error) = control::error_from_json(&word) {
                    return Err(error);
                }
                if word["filled"] == true {
                    for note in word["notes"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                        (options.notice)(note);
                    }
                    return Ok(());
                }
            }
            if signals.take().iter().any(|signal| *signal != SIGWINCH) {
                if let Some(guard) = self.guard.take() {
                    // The carrier sees that nobody hears it any more.
                    let _ = rustix::process::kill_process(guard, rustix::process::Signal::KILL);
                    let _ = rustix::process::waitpid(Some(guard), WaitOptions::empty());
                }
                return Err(Error::new(ErrorKind::Io, "Interrupted while files were filled in"));
            }
        }
    }

    /// Waits for a word or a signal; whether it is a word, or the end.
    fn hear(&self, signals: &Signals) -> bool {
        let mut fds = [PollFd::new(&self.channel, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        poll(&mut fds, None).is_ok() && !fds[0].revents().is_empty()
    }

    fn receive(&self) -> Option<Value> {
        control::receive(self.channel.as_fd()).ok().flatten().map(|(word, _)| word)
    }

    fn finish(mut self, options: &Options, signals: &Signals) -> Option<Undelivered> {
        let shown = |signal: &i32| *signal != SIGWINCH;
        // Those that came before were the command's.
        let _ = signals.take();
        let mut attempts = 0;
        let mut trouble = None;
        let report = loop {
            if self.hear(signals) {
                match self.receive() {
                    Some(word) if !word["report"].is_null() => {
                        break Report::from_json(&word["report"]);
                    }
                    Some(word) => {
                        trouble = control::error_from_json(&word).map(|error| error.to_string()).or(trouble);
                        if let Some(far) = word["done"].as_u64().zip(word["all"].as_u64()) {
                            (options.progress)(Some(far));
                        }
                    }
                    // Carrier and guard were killed: another one knows what they had delivered.
                    None => {
                        self.reap();
                        attempts += 1;
                        if attempts > 3 || self.begin(options, signals).is_err() {
                            break None;
                        }
                    }
                }
            }
            if signals.take().iter().any(shown) {
                let _ = control::send(self.channel.as_fd(), &json!({ "stop": true }), &[]);
            }
        };
        self.reap();
        for note in report.iter().flat_map(|report| &report.notes) {
            (options.notice)(note);
        }
        Undelivered::of(report, format!("/{}", self.place.display()), self.destination.clone(), trouble)
    }

    fn reap(&mut self) {
        if let Some(guard) = self.guard.take() {
            let _ = rustix::process::waitpid(Some(guard), WaitOptions::empty());
        }
    }
}
