//! A login: the user's process, which hands its terminal over and waits.
//!
//! It runs on the host with the user's rights, and does nothing there: whatever comes in its way, it ends.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::{OptionalActions, Termios};
use serde_json::json;

use super::talk::{self, Answer, LINE_MAX, Request};
use crate::attach::control;
use crate::error::{Error, ErrorKind, Result};
use crate::root::launcher;

/// What a login is to do.
#[derive(Clone, Debug)]
pub struct Login {
    /// What the user's shell is to do; without it, it is interactive.
    pub line: Option<OsString>,
    /// Where the daemon listens: [`SOCKET`](super::SOCKET) unless there is a reason.
    pub socket: PathBuf,
}

/// How a login ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedOut {
    /// The exit status of the shell.
    pub status: u8,
    /// Why it could not be executed, if so; for people.
    pub trouble: Option<String>,
}

impl Login {
    /// Logs this process's user in, and returns when the login is over. Standard input, output and error are the shell's, as
    /// [`Run::run`](crate::root::Run::run) has it, and not this process's any more; signals are sent on.
    ///
    /// # Errors
    /// `Denied` if the login is refused, and what else stands in its way.
    pub fn run(self) -> Result<LoggedOut> {
        let signals = launcher::catch()?;
        if self.line.as_ref().is_some_and(|line| line.len() > LINE_MAX) {
            let why = format!("The command is longer than {LINE_MAX} bytes");
            return Err(Error::new(ErrorKind::Invalid, why).advise("give it to a shell's standard input"));
        }
        let failed = |error: io::Error| Error::io("Cannot ask for a login", error);
        let socket = talk::connect(&self.socket)?;
        let env = std::env::vars_os().filter(talk::comes_along).collect();
        let request = Request::Login { line: self.line, env };
        let null = File::options().read(true).write(true).open("/dev/null").map_err(failed)?;
        let standard = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
        let given = standard.map(|fd| if rustix::io::fcntl_getfd(fd).is_ok() { fd } else { null.as_fd() });
        let _terminal = Restored::of(standard[0]);
        control::send(socket.as_fd(), &request.to_json(), &given).map_err(failed)?;
        // They are the shell's now: whoever is behind them sees when that closes them. Error is for what there is to say.
        rustix::stdio::dup2_stdin(&null).map_err(|error| failed(error.into()))?;
        rustix::stdio::dup2_stdout(&null).map_err(|error| failed(error.into()))?;
        loop {
            let mut fds = [PollFd::new(&socket, PollFlags::IN), PollFd::new(&signals, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed(error.into())),
            }
            let answered = !fds[0].revents().is_empty();
            for signal in signals.take() {
                // If it cannot be sent, the end of the login is there to be heard.
                let _ = control::send(socket.as_fd(), &json!({ "signal": signal }), &[]);
            }
            if answered {
                return understand(socket.as_fd());
            }
        }
    }
}

fn understand(socket: BorrowedFd<'_>) -> Result<LoggedOut> {
    let broken = |why: &str| Error::new(ErrorKind::Io, format!("The login has been broken off: {why}"));
    let (value, _) = talk::hear(socket, 1)?.ok_or_else(|| broken("its worker has died"))?;
    match Answer::from_json(&value) {
        Some(Answer::Ended { status, trouble }) => Ok(LoggedOut { status, trouble }),
        Some(Answer::Refused(why)) => Err(Error::new(ErrorKind::Denied, format!("Login refused: {why}"))),
        _ => Err(broken("'memdev logind' is of another version")),
    }
}

/// Leaves the terminal as it was, should whoever had it die before it could.
struct Restored(Option<(OwnedFd, Termios)>);

impl Restored {
    fn of(terminal: BorrowedFd<'_>) -> Self {
        let modes = rustix::termios::tcgetattr(terminal).ok();
        Self(modes.and_then(|modes| Some((rustix::io::fcntl_dupfd_cloexec(terminal, 3).ok()?, modes))))
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        if let Some((terminal, modes)) = &self.0 {
            let _ = rustix::termios::tcsetattr(terminal, OptionalActions::Drain, modes);
        }
    }
}
