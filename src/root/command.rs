//! The command itself: whose, where, with which environment and terminal.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::pty::OpenptFlags;
use rustix::termios::{OptionalActions, Winsize};
use serde_json::{Value, json};

use super::account::{self, Account, Stranger};
use super::{child, ids};
use crate::error::{Error, ErrorKind, Result, plain};

/// What is to be run inside.
#[derive(Clone, Debug)]
pub(super) struct Order<'a> {
    pub(super) command: &'a [OsString],
    /// What the user's shell is to do, if there is no command.
    pub(super) line: Option<&'a OsStr>,
    pub(super) login: bool,
    pub(super) env: &'a [(OsString, OsString)],
    pub(super) workdir: Option<&'a Path>,
    pub(super) user: Option<&'a str>,
    /// Who it is if the image does not know that user.
    pub(super) stranger: Option<&'a Stranger>,
    /// The session's name.
    pub(super) session: &'a str,
    /// Which of standard input, output and error are terminals of the host, and so are replaced by one of the session's.
    pub(super) terminals: [bool; 3],
    /// Whether it is killed when the process that started it ends.
    pub(super) ends_with_parent: bool,
}

/// A command with everything that it needs.
pub(super) struct Ready<'a> {
    order: &'a Order<'a>,
    account: Account,
}

/// Where programs are; for root, also those of administrators.
const PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games";
const PATH_OF_ROOT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

impl<'a> Ready<'a> {
    /// Finds out who it is to be. To be called where the image's `/etc` is to be seen.
    ///
    /// # Errors
    /// The image has no such user.
    pub(super) fn new(order: &'a Order<'a>) -> Result<Self> {
        let account = account::look_up(order.user, order.stranger)?;
        if !ids::are_here(account.user, account.group) {
            let why = format!("The session has no id for the user {}", account.name);
            return Err(Error::new(ErrorKind::Unsupported, why)
                .advise("run it as root inside, or outside with more subordinate ids"));
        }
        Ok(Self { order, account })
    }

    /// A terminal of the session's for it, if it is to have one: what is for the launcher, and what is for the command.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn terminal(&self, size: &Size) -> Result<Option<(OwnedFd, OwnedFd)>> {
        if self.order.terminals == [false; 3] {
            return Ok(None);
        }
        let failed = |error: rustix::io::Errno| Error::io("Cannot make a terminal", error);
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let master = rustix::fs::open("/dev/pts/ptmx", flags, Mode::empty()).map_err(failed)?;
        rustix::pty::unlockpt(&master).map_err(failed)?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).map_err(failed)?;
        rustix::termios::tcsetwinsize(&slave, size.window()).map_err(failed)?;
        if !size.whole {
            // The terminal outside still edits lines, echoes and ends them: once is enough.
            let mut modes = rustix::termios::tcgetattr(&slave).map_err(failed)?;
            modes.local_modes -= rustix::termios::LocalModes::ECHO;
            modes.output_modes -= rustix::termios::OutputModes::OPOST;
            rustix::termios::tcsetattr(&slave, OptionalActions::Now, &modes).map_err(failed)?;
        }
        rustix::fs::fchown(&slave, Some(self.account.user), None).map_err(failed)?;
        Ok(Some((master, slave)))
    }

    /// Becomes the command. Returns only if that fails: what people are told, and the exit status.
    pub(super) fn execute(&self, terminal: Option<BorrowedFd<'_>>) -> Value {
        let error = match self.become_user(terminal) {
            Ok(()) => match self.go_to_directory() {
                Ok(()) => self.command().exec(),
                Err(error) => return json!({ "trouble": error.to_string(), "status": 1 }),
            },
            Err(error) => error,
        };
        let what = self.order.command.first().map_or_else(|| "the shell".into(), PathBuf::from);
        let why = format!("Cannot run {}: {}", what.display(), plain(&error));
        json!({ "trouble": why, "status": status_of(&error) })
    }

    fn become_user(&self, terminal: Option<BorrowedFd<'_>>) -> io::Result<()> {
        // It leads a session already where it was started as one.
        let _ = rustix::process::setsid();
        if let Some(terminal) = terminal {
            rustix::process::ioctl_tiocsctty(terminal)?;
        }
        self.set_descriptors(terminal)?;
        rustix::process::umask(Mode::WGRP | Mode::WOTH);
        ids::become_user(self.account.user, self.account.group, &self.account.groups)?;
        if self.order.ends_with_parent {
            // To change users has undone it.
            child::end_with_parent()?;
        }
        Ok(())
    }

    fn command(&self) -> Command {
        let (program, arguments) = match self.order.command.split_first() {
            Some((program, arguments)) => (program.as_os_str(), arguments),
            None => (self.account.shell.as_os_str(), &[][..]),
        };
        let mut command = Command::new(program);
        command.args(arguments).env_clear().envs(self.environment());
        let line = self.order.line.filter(|_| self.order.command.is_empty());
        if let Some(line) = line {
            command.arg("-c").arg(line);
        }
        if self.order.login && self.order.command.is_empty() && line.is_none() {
            // By this a shell knows that it is to read the user's profile.
            let mut name = OsString::from("-");
            name.push(Path::new(program).file_name().unwrap_or(program));
            command.arg0(name);
        }
        command
    }

    fn set_descriptors(&self, terminal: Option<BorrowedFd<'_>>) -> io::Result<()> {
        for (number, is_terminal) in self.order.terminals.into_iter().enumerate() {
            let opened;
            let replacement = match terminal {
                Some(terminal) if is_terminal => terminal,
                _ if is_null(number)? => {
                    // The same device, but by way of a mount that nobody can change it through.
                    let flags = OFlags::RDWR | OFlags::CLOEXEC;
                    opened = rustix::fs::open("/dev/null", flags, Mode::empty())?;
                    opened.as_fd()
                }
                _ => continue,
            };
            match number {
                0 => rustix::stdio::dup2_stdin(replacement)?,
                1 => rustix::stdio::dup2_stdout(replacement)?,
                _ => rustix::stdio::dup2_stderr(replacement)?,
            }
        }
        Ok(())
    }

    fn go_to_directory(&self) -> Result<()> {
        let home = Path::new(&self.account.home);
        // A user without a home directory may still log in.
        if self.order.workdir.is_none() && self.order.login && rustix::process::chdir(home).is_ok() {
            return Ok(());
        }
        let directory = self.order.workdir.unwrap_or(Path::new("/"));
        rustix::process::chdir(directory).map_err(|error| {
            Error::io("Cannot begin in", error).on_path(directory).advise(match error {
                Errno::NOENT => "make it, or give another --workdir",
                _ => "give another --workdir",
            })
        })
    }

    fn environment(&self) -> Vec<(OsString, OsString)> {
        let account = &self.account;
        let path = if account.user.is_root() { PATH_OF_ROOT } else { PATH };
        let mut all: Vec<(OsString, OsString)> = [
            ("PATH", OsStr::new(path)),
            ("HOME", account.home.as_os_str()),
            ("USER", account.name.as_ref()),
            ("LOGNAME", account.name.as_ref()),
            ("SHELL", account.shell.as_os_str()),
            // As every container tells what it is in.
            ("container", "memdev".as_ref()),
            ("MEMDEV_SESSION", self.order.session.as_ref()),
        ]
        .into_iter()
        .map(|(key, value)| (key.into(), value.to_owned()))
        .collect();
        if self.order.terminals != [false; 3]
            && let Some(kind) = std::env::var_os("TERM")
        {
            all.push(("TERM".into(), kind));
        }
        all.extend(self.order.env.iter().cloned());
        all
    }
}

/// The exit status of shells for a program that could not be executed.
fn status_of(error: &io::Error) -> u8 {
    if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 }
}

/// Whether a standard descriptor is `/dev/null`.
fn is_null(number: usize) -> io::Result<bool> {
    let stat = match number {
        0 => rustix::fs::fstat(rustix::stdio::stdin()),
        1 => rustix::fs::fstat(rustix::stdio::stdout()),
        _ => rustix::fs::fstat(rustix::stdio::stderr()),
    };
    let stat = match stat {
        Ok(stat) => stat,
        // It is closed, and is to be; no: a file that is opened later would take its place.
        Err(rustix::io::Errno::BADF) => return Ok(true),
        Err(error) => return Err(error.into()),
    };
    let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
    Ok(is_device && (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)) == (1, 3))
}

/// What a new terminal is to be like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) rows: u16,
    pub(super) columns: u16,
    /// Whether everything goes through it, as keys are pressed; else the terminal outside keeps its own ways.
    pub(super) whole: bool,
}

impl Size {
    pub(super) fn to_json(self) -> Value {
        json!({ "rows": self.rows, "columns": self.columns, "whole": self.whole })
    }

    pub(super) fn from_json(value: &Value) -> Self {
        let number = |key: &str| value[key].as_u64().and_then(|n| u16::try_from(n).ok()).unwrap_or(0);
        Self {
            rows: number("rows"),
            columns: number("columns"),
            whole: value["whole"].as_bool().unwrap_or(false),
        }
    }

    pub(super) fn window(self) -> Winsize {
        Winsize { ws_row: self.rows, ws_col: self.columns, ws_xpixel: 0, ws_ypixel: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_survives_the_way() {
        let size = Size { rows: 24, columns: 80, whole: true };
        assert_eq!(Size::from_json(&size.to_json()), size);
        assert_eq!(Size::from_json(&Value::Null), Size::default());
    }

    #[test]
    fn statuses_are_those_of_shells() {
        assert_eq!(status_of(&io::Error::from_raw_os_error(libc::ENOENT)), 127);
        assert_eq!(status_of(&io::Error::from_raw_os_error(libc::EACCES)), 126);
    }
}
