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
mod child;
mod command;
mod device;
mod enter;
mod filesystem;
mod ids;
mod init;
mod launcher;
mod mounter;
mod mounts;
pub mod ns;
pub mod partition;
mod places;
mod plan;
mod privileges;
mod record;
mod signals;
mod talk;
mod terminal;

use std::ffi::OsString;
use std::path::PathBuf;

use crate::attach::{Backend, Source, THIS_PROGRAM};
use crate::error::Result;

pub use enter::Enter;
pub use plan::Plan;
pub use record::{DIRECTORY, Session, sessions};

/// A directory or file of the host that is seen in a private root as well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// Where it is on the host.
    pub source: PathBuf,
    /// Where it is to be seen: a path from the private root's `/`. Made if it is not there.
    pub target: PathBuf,
    /// Whether it can only be read there.
    pub read_only: bool,
}

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
    /// Whether a shell is started as one that has just been logged in to, in the user's home directory.
    pub login: bool,
    /// Variables for the command, beside the few that everybody has. Nothing of this process's environment but `TERM`.
    pub env: Vec<(OsString, OsString)>,
    /// The directory that the command begins in [`/`, or the home directory of a login].
    pub workdir: Option<PathBuf>,
    /// `USER[:GROUP]`, names of the image's, or numbers; without it root.
    pub user: Option<String>,
    /// The private root's host name; without it the session's name.
    pub hostname: Option<String>,
    /// What is seen of the host.
    pub binds: Vec<Bind>,
    /// Which network there is.
    pub network: Network,
    /// Bytes for what is written to an image's copy; without it half of the machine's memory.
    pub memory: Option<u64>,
    /// Whether root inside is the host's user 0, with what capabilities cannot hurt the host, instead of nobody outside.
    pub privileged: bool,
    /// What [`Enter`] knows it by; without it one that is made up.
    pub name: Option<String>,
    /// How the kernel gets to the data.
    pub backend: Backend,
    /// Where attachments are written down.
    pub attachments: PathBuf,
    /// Where running sessions are written down: [`DIRECTORY`] unless there is a reason.
    pub sessions: PathBuf,
    /// A file for the log of the device's daemon.
    pub log: Option<PathBuf>,
    /// memdev's own program, for the device's daemon.
    pub program: PathBuf,
}

impl Run {
    /// A private root on `source`, everything else as it is by default.
    #[must_use]
    pub fn new(source: Source) -> Self {
        Self {
            source,
            partition: None,
            command: Vec::new(),
            login: false,
            env: Vec::new(),
            workdir: None,
            user: None,
            hostname: None,
            binds: Vec::new(),
            network: Network::Host,
            memory: None,
            privileged: false,
            name: None,
            backend: Backend::Auto,
            attachments: crate::attach::DIRECTORY.into(),
            sessions: DIRECTORY.into(),
            log: None,
            program: THIS_PROGRAM.into(),
        }
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
    /// that ends.
    ///
    /// # Errors
    /// What stands in the way of the private root or of starting the command; then nothing is left of it. That the command
    /// fails is no error.
    pub fn run(self) -> Result<Ended> {
        launcher::run(&self)
    }
}

/// How the command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    status: u8,
    trouble: Option<String>,
}

impl Ended {
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
}
