//! The login by way of a login program (sshd, su), which puts itself inside: what the PAM module does.
//!
//! The program is root's, on the host. It asks the daemon for a private root of the user's, and goes into its namespaces
//! before it starts anything for the user. From then on it is root *there*: nobody outside, without any right over the
//! host, as every process that it starts. What it had open it has open still, but none of that goes to another program.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Gid, Uid};

use super::person::Person;
use super::talk::{self, Answer, Request};
use crate::attach::control;
use crate::error::{Error, ErrorKind, Result};
use crate::root::door::Door;

/// Login programs that make the terminal that they were started on the user's, once the session is open: `login(1)`, as getty
/// starts it. For others it is somebody's who goes on using it.
const TAKE_THEIR_TERMINAL: [&str; 2] = ["login", "remote"];

/// Makes the terminal theirs who is root inside, and `root` outside, so that it can be made the user's from there: nobody inside
/// can change the owner of what belongs to somebody who has no number there. For the next login, getty makes it root's again.
fn hand_over_terminal(root: u32) -> Result<()> {
    let terminal = rustix::stdio::stdin();
    if !rustix::termios::isatty(terminal) {
        return Ok(());
    }
    let (user, group) = (Uid::from_raw(root), Gid::from_raw(root));
    rustix::fs::fchown(terminal, Some(user), Some(group))
        .map_err(|error| Error::io("Cannot give the terminal to the private root", error))
}

/// A private root that this process is in. It ends at the latest when this is dropped in all processes that have it.
#[derive(Debug)]
pub struct Inside {
    socket: OwnedFd,
}

impl Inside {
    /// Has it ended, with all that this process has started there. What this process is in goes with this process.
    pub fn end(&self) {
        // Whatever is said is the end; if it cannot be said, it has come already.
        let _ = control::send(self.socket.as_fd(), &serde_json::json!({}), &[]);
    }
}

/// Puts this process, which is root's, into a private root of the user's. `service` is what the login program is called, for
/// the log.
///
/// # Errors
/// The login is refused, or cannot be; the process may be halfway inside then, and must end without having started
/// anything for the user.
pub fn open(socket: &Path, user: &str, service: &str) -> Result<Inside> {
    let person = Person::by_name(user)?;
    let failed = |error: std::io::Error| Error::io("Cannot ask for a private root", error);
    let socket = talk::connect(socket)?;
    let request = Request::Open { user: person.name.clone(), service: service.to_owned() };
    control::send(socket.as_fd(), &request.to_json(), &[]).map_err(failed)?;
    let died = || Error::new(ErrorKind::Io, "'memdev logind' has broken the login off");
    let (value, descriptors) = talk::hear(socket.as_fd(), talk::ROUNDS)?.ok_or_else(died)?;
    let (own_network, root) = match Answer::from_json(&value) {
        Some(Answer::Open { own_network, root }) => (own_network, root),
        Some(Answer::Refused(why)) => {
            return Err(Error::new(ErrorKind::Denied, format!("Login refused: {why}")));
        }
        _ => return Err(died()),
    };
    if TAKE_THEIR_TERMINAL.contains(&service) {
        hand_over_terminal(root)?;
    }
    let process = descriptors.into_iter().next().ok_or_else(died)?;
    Door::behind(process, own_network).step_in(&person.as_stranger())?;
    Ok(Inside { socket })
}
