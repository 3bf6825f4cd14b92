//! The private root: a command, or a login, whose `/` is a block device of its own and no directory of the host's tree.
//!
//! ```text
//!  launcher   attaches the image's copy, makes the ids; then relays signals and terminal, and sees to the end
//!  mounter    has a copy of the host's mount table, puts the device in its place as the root, and ends
//!  init       is process 1 inside: copies the mounter's table into ids of its own, which locks every flag in it
//!  command    is init's child
//! ```
//!
//! Each is a copy of the process that calls [`Run::run`], and does those steps of one plan that are its own (`plan`: the
//! same list that `--dry-run` prints). The launcher goes through the plan and tells the others when it is their turn, so
//! that there is one order, and one place where a failure is told. None of them executes a program of the host, whose
//! file would then be within reach as `/proc/1/exe`.
//!
//! The file system is never in the host's mount table, nor in anybody else's; the host's is not in that of the private
//! root. docs/private-root.md has the reasons for the order.
//!
//! [`partition`] finds the file system in the image of a whole disk; [`ns`] is the other half alone, a copy of the caller's
//! mount table without a device.

mod account;
mod bind;
mod carrying;
mod cgroup;
pub(crate) mod child;
mod command;
mod contents;
mod copies;
mod cores;
mod device;
pub(crate) mod door;
mod enter;
mod filesystem;
mod freeze;
mod ids;
mod init;
pub(crate) mod launcher;
mod limits;
mod look;
mod mounter;
pub(crate) mod mounts;
pub mod ns;
pub mod partition;
mod places;
mod plan;
mod privileges;
pub(crate) mod reach;
mod record;
pub(crate) mod signals;
mod subordinate;
mod talk;
mod terminal;
mod tree;

use std::ffi::OsString;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use crate::attach::{Backend, Source, THIS_PROGRAM};
use crate::error::{Error, ErrorKind, Result};

pub use account::Stranger;
pub use bind::Bind;
pub use enter::Enter;
pub use limits::{Limits, MEMORY_MIN, PIDS_MIN, Swap};
pub use look::write_back;
pub use plan::Plan;
pub use record::{DIRECTORY, Session, sessions};

/// Which network a private root has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// The host's, its abstract sockets with it.
    #[default]
    Host,
    /// None but a loopback interface of its own.
    None,
}

/// What is to be run in a private root, and how.
#[derive(Clone, Debug)]
pub struct Run {
    /// What the root is a copy of, or the named session that it is.
    pub source: Source,
    /// Which partition of it, by its number; without one it is a file system as a whole.
    pub partition: Option<u32>,
    /// The program and its arguments; without any, the user's shell.
    pub command: Vec<OsString>,
    /// What the user's shell is to do, if there is no command: as behind its `-c`.
    pub line: Option<OsString>,
    /// Whether a shell is started as one that has just been logged in to, in the user's home directory.
    pub login: bool,
    /// Variables for the command, beside the few that everybody has. Nothing of this process's environment but `TERM`.
    pub env: Vec<(OsString, OsString)>,
    /// The directory that the command begins in [`/`, or the home directory of a login].
    pub workdir: Option<PathBuf>,
    /// `USER[:GROUP]`, names of the image's, or numbers; without it root.
    pub user: Option<String>,
    /// Who it is if the image does not know that user.
    pub stranger: Option<Stranger>,
    /// The private root's host name; without it the session's name.
    pub hostname: Option<String>,
    /// What is seen of the host.
    pub binds: Vec<Bind>,
    /// Whether their sources are reached by nobody's symbolic links but root's: somebody else may have made some on the way.
    pub binds_by_roots_links: bool,
    /// Which network there is.
    pub network: Network,
    /// Bytes for what is written to an image's copy; without it half of the machine's memory.
    pub memory: Option<u64>,
    /// What the processes inside may use.
    pub limits: Limits,
    /// Whether root inside is the host's user 0, with what capabilities cannot hurt the host, instead of nobody outside.
    pub privileged: bool,
    /// Whether this process has not the rights of root, and does without; [`Run::new`] looks.
    pub ordinary: bool,
    /// The control socket of the server whose session is forked, if it is one of a server's; see [`Run::fork`].
    pub control: Option<PathBuf>,
    /// What this is a fork of.
    of: Option<Session>,
    /// Whether there is no command; see [`Run::hold`].
    holds: bool,
    /// Is told, in a line for people, what such a session cannot do, before it begins.
    pub notice: fn(&str),
    /// Is told, in a line for people, if its disk is a session that somebody else on this machine may write to as well.
    pub warn: fn(&str),
    /// What [`Enter`] knows it by; without it one that is made up.
    pub name: Option<String>,
    /// How the kernel gets to the data.
    pub backend: Backend,
    /// Where attachments are written down.
    pub attachments: PathBuf,
    /// Where running sessions are written down: [`DIRECTORY`] unless there is a reason.
    pub sessions: PathBuf,
    /// What is carried out of it, while it runs and when it ends.
    pub carrying: crate::carry::Options,
    /// A file for the log of the device's daemon.
    pub log: Option<PathBuf>,
    /// memdev's own program, for the device's daemon.
    pub program: PathBuf,
}

/// Where this user's is kept that is root's in `path`: in the user's directory for such things, if there is one, else in
/// `/tmp`, under the user's number.
#[must_use]
pub fn directory(path: &str) -> PathBuf {
    let user = rustix::process::geteuid();
    let name = std::path::Path::new(path).file_name().unwrap_or_default();
    if user.is_root() {
        return path.into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute()) {
        Some(directory) => directory.join(name),
        None => PathBuf::from("/tmp").join(format!("{}-{}", name.display(), user.as_raw())),
    }
}

impl Run {
    /// A private root on `source`, everything else as it is by default.
    #[must_use]
    pub fn new(source: Source) -> Self {
        Self {
            source,
            partition: None,
            command: Vec::new(),
            line: None,
            login: false,
            env: Vec::new(),
            workdir: None,
            user: None,
            stranger: None,
            hostname: None,
            binds: Vec::new(),
            binds_by_roots_links: false,
            network: Network::Host,
            memory: None,
            limits: Limits::default(),
            privileged: false,
            ordinary: !rustix::process::geteuid().is_root(),
            control: None,
            of: None,
            holds: false,
            notice: |_| {},
            warn: |_| {},
            name: None,
            backend: Backend::Auto,
            attachments: directory(crate::attach::DIRECTORY),
            sessions: directory(DIRECTORY),
            carrying: crate::carry::Options::default(),
            log: None,
            program: THIS_PROGRAM.into(),
        }
    }

    /// A private root on the present state of another, one that was made with the rights of root: its file system as of an
    /// instant in which that stands still, what is mounted in it made anew, with copies of what is in memory there. `session`
    /// is its name, or the beginning of its id. What it was given of the host, its network, its rights and limits are the same;
    /// everything else is as it is by default. Neither sees the other from then on.
    ///
    /// A disk that is a session of a server is forked by that server, by way of [`Run::control`].
    ///
    /// # Errors
    /// `NotFound` if there is no such session, `Unsupported` if it cannot be forked.
    pub fn fork(session: &str, sessions: PathBuf) -> Result<Self> {
        let of = enter::find(record::sessions(&sessions)?, session)?;
        if of.porter.is_some() {
            let why = "A private root that was made without the rights of root cannot be forked: fuse2fs cannot hold still";
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
        let source = match crate::net::Uri::looks_like(&of.source) {
            true => Source::Export(of.source.parse()?),
            false => Source::Image { name: of.stem.clone(), path: of.source.clone().into() },
        };
        Ok(Self {
            partition: of.partition,
            binds: of.binds.clone(),
            network: if of.own_network { Network::None } else { Network::Host },
            privileged: of.privileged,
            limits: of.limits,
            sessions,
            of: Some(of),
            ..Self::new(source)
        })
    }

    /// What [`Run::run`] would do, step by step. Nothing is done or looked at.
    #[must_use]
    pub fn plan(&self) -> Plan {
        Plan::of(self)
    }

    /// Runs the command in its private root, and returns when it has ended and all of it is gone: processes, mounts, device.
    ///
    /// Standard input, output and error of this process are the command's; of those that are terminals it gets one of its
    /// own, which is relayed. Signals that this process gets in the meantime are sent on.
    ///
    /// This process must have one thread, since it makes copies of itself. They end with the calling thread, whichever way
    /// that ends. From then on it leaves no core file.
    ///
    /// # Errors
    /// What stands in the way of the private root or of starting the command; then nothing is left of it. That the command
    /// fails is no error.
    pub fn run(self) -> Result<Ended> {
        launcher::run(&self, None)
    }

    /// Makes the private root without a command in it, says that it is `ready`, and keeps it for those who [`Enter`] it until
    /// the other end of `until` (a pipe or a socket, of which nothing is read) is closed, or this process gets a signal. Then
    /// ends all that is in it, and returns when it is gone.
    ///
    /// What [`Run::run`] says of threads and processes goes for this as well.
    ///
    /// # Errors
    /// What stands in the way of the private root, what `ready` says, and that the device's daemon has died.
    pub fn hold(mut self, until: BorrowedFd<'_>, ready: impl FnMut(&Session) -> Result<()>) -> Result<()> {
        self.holds = true;
        launcher::run(&self, Some(launcher::Hold { until, ready: Box::new(ready) })).map(drop)
    }
}

/// How the command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    status: u8,
    trouble: Option<String>,
    undelivered: Vec<crate::carry::Undelivered>,
}

impl Ended {
    /// That a command has ended, and perhaps why it could not be executed.
    fn of_command(status: u8, trouble: Option<String>) -> Self {
        Self { status, trouble, undelivered: Vec::new() }
    }

    /// Its exit status; 128 + n if signal n ended it, 127 if there is no such command, 126 if it cannot be executed.
    #[must_use]
    pub fn status(&self) -> u8 {
        self.status
    }

    /// Why it could not be executed, if it could not: one line for people.
    #[must_use]
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// What was not delivered of the directories that were carried.
    #[must_use]
    pub fn undelivered(&self) -> &[crate::carry::Undelivered] {
        &self.undelivered
    }
}
