//! The way into a private root for a process that stays what it is: one that a login program has, and from which it goes on
//! to start the user's shell.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::thread::ThreadNameSpaceType;

use super::account::{self, Stranger};
use super::record::Session;
use super::{cores, ids, terminal};
use crate::error::{Error, ErrorKind, Result};
use crate::sys;

/// The namespaces of a session that the host's root enters by way of process 1.
pub(super) fn spaces(session_has_ids: bool, own_network: bool) -> ThreadNameSpaceType {
    let mut spaces = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::PROCESS_ID
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::CONTROL_GROUP;
    spaces.set(ThreadNameSpaceType::USER, session_has_ids);
    spaces.set(ThreadNameSpaceType::NETWORK, own_network);
    spaces
}

/// The way into one private root.
#[derive(Debug)]
pub(crate) struct Door {
    process: OwnedFd,
    own_network: bool,
}

impl Door {
    /// The one of `session`.
    ///
    /// # Errors
    /// `Unsupported` if its root is the host's user 0, `NotFound` if it has just ended.
    pub(crate) fn of(session: &Session) -> Result<Self> {
        if session.privileged {
            // Who entered it would be user 0 of the host still, and has open what it had open.
            let why = "A login program cannot be put into a private root that is privileged";
            return Err(
                Error::new(ErrorKind::Unsupported, why).advise("use the login shell, or not privileged")
            );
        }
        let gone = || Error::new(ErrorKind::NotFound, "The private root has just ended:").on(&session.name);
        Ok(Self { process: session.process().ok_or_else(gone)?, own_network: session.own_network })
    }

    /// The one behind this descriptor of a process 1, which [`Door::process`] has given.
    pub(crate) fn behind(process: OwnedFd, own_network: bool) -> Self {
        Self { process, own_network }
    }

    /// A descriptor of process 1.
    pub(crate) fn process(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }

    /// Whether the private root has a network of its own.
    pub(crate) fn has_own_network(&self) -> bool {
        self.own_network
    }

    /// Puts this process inside, for good: into all namespaces, those of users and mounts above all, as root of the session,
    /// which is nobody outside. What it starts from now on is process and child inside. It gives up its keys, its working
    /// directory, core files and every right over the host; it keeps what it has open, but no program that it becomes, or starts, gets
    /// any of that beside standard input, output and error.
    ///
    /// It is to become `user`, of the number that it has on the host: the groups are those of the image, of which nobody
    /// could take any afterwards.
    ///
    /// # Errors
    /// `Invalid` with several threads, or a directory as standard input, output or error; `Unsupported` if the image has
    /// the user under another number, or no such number can be. The process may be halfway inside then, and must end.
    pub(crate) fn step_in(&self, user: &Stranger) -> Result<()> {
        let failed = |error: std::io::Error| Error::io("Cannot enter the private root", error);
        if sys::process::threads() != 1 {
            let why = "A process with several threads cannot enter a private root";
            return Err(Error::new(ErrorKind::Invalid, why));
        }
        terminal::standard()?;
        sys::process::close_on_exec(3).map_err(failed)?;
        // Of what is the host's to be written, while it is there.
        cores::none()?;
        sys::process::leave_keyring();
        rustix::thread::move_into_thread_name_spaces(self.process.as_fd(), spaces(true, self.own_network))
            .map_err(|error| failed(error.into()))?;
        rustix::process::chdir("/").map_err(|error| failed(error.into()))?;
        // Before anything else can fail: a program that is refused has to be somebody, to tell the user and to end.
        ids::become_root().map_err(failed)?;
        let account = account::look_up(Some(&user.name), Some(user))?;
        if account.user.as_raw() != user.user {
            let (inside, outside) = (account.user.as_raw(), user.user);
            let why = format!("The image has the user {} as {inside}, the host as {outside}", user.name);
            return Err(Error::new(ErrorKind::Unsupported, why)
                .advise("give the user one number in both, or use the login shell"));
        }
        if !ids::are_here(account.user, account.group) {
            let why = format!("The private root has no id for the user {}", user.name);
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
        let mut groups = account.groups;
        groups.push(account.group);
        rustix::thread::set_thread_groups(&groups).map_err(|error| failed(error.into()))?;
        is_inside()
    }
}

/// Has the private root that this process is in know `user`.
///
/// # Errors
/// What its file system says.
pub(crate) fn introduce(user: &Stranger) -> Result<()> {
    account::introduce(user)
}

/// Looks whether what is to be seen from here is a private root: the last thing before somebody is let in.
fn is_inside() -> Result<()> {
    let name = std::fs::read_to_string("/proc/1/comm").unwrap_or_default();
    let why = "This is not the private root that was to be entered";
    if name.trim_end() == "memdev-init" { Ok(()) } else { Err(Error::new(ErrorKind::Io, why)) }
}
