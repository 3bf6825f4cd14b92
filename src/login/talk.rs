//! What a login and the daemon say to each other.
//!
//! ```text
//!   client (the user's)                       worker (root's)
//!     ── request, standard descriptors ─────────>   who it is the kernel says, not the client
//!     ── signal n ──────────────────────────────>
//!     <──────────────── status of the command ──
//!
//!   PAM module (root's)                       worker
//!     ── request for a user ────────────────────>
//!     <── the way in: process 1, by descriptor ──   until the socket is closed
//!
//!   either
//!     <───────────────────────────── refused ──
//! ```
//!
//! If the client's end is closed, whatever the reason, the login is over.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};

use crate::attach::control;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::peer;

/// Where the daemon listens. A directory of its own, which is root's: `/run/memdev` may be that of a server's user.
pub const SOCKET: &str = "/run/memdev-login/socket";

/// How long one end may leave the other waiting in the middle of what is one step, above all with a message that the other
/// end does not take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The longest line for a shell, in bytes: with its envelope it fits into a message.
pub(super) const LINE_MAX: usize = 12 << 10;

/// The longest value of a variable that is taken over, in bytes.
const VALUE_MAX: usize = 512;

/// Which variables come along: what a program needs to know of the terminal, the language and where the user comes from.
/// Not where the agent's socket is, which is on the host.
const VARIABLES: [&str; 7] = ["COLORTERM", "LANG", "LANGUAGE", "SSH_CLIENT", "SSH_CONNECTION", "TERM", "TZ"];

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// A shell for whoever asks, or a line for it.
    Login { line: Option<OsString>, env: Vec<(OsString, OsString)> },
    /// A way in for a user; by root, who may say who it is.
    Open { user: String, service: String },
}

impl Request {
    pub(super) fn to_json(&self) -> Value {
        match self {
            Self::Login { line, env } => json!({
                "line": line.as_ref().map(|line| line.as_bytes()),
                "env": env.iter().map(|(key, value)| [key.as_bytes(), value.as_bytes()]).collect::<Vec<_>>(),
            }),
            Self::Open { user, service } => json!({ "open": user, "service": service }),
        }
    }

    /// What somebody asks for whom nothing is to be believed.
    pub(super) fn from_json(value: &Value) -> Option<Self> {
        if let Some(user) = value["open"].as_str() {
            let service = value["service"].as_str()?.to_owned();
            return Some(Self::Open { user: user.to_owned(), service });
        }
        let bytes = |value: &Value| {
            let bytes: Vec<u8> = serde_json::from_value(value.clone()).ok()?;
            (!bytes.contains(&0)).then(|| OsString::from_vec(bytes))
        };
        let line = match &value["line"] {
            Value::Null => None,
            line => Some(bytes(line).filter(|line| line.len() <= LINE_MAX)?),
        };
        let pair = |value: &Value| Some((bytes(&value[0])?, bytes(&value[1])?));
        let env: Vec<_> = value["env"].as_array()?.iter().map(pair).collect::<Option<_>>()?;
        Some(Self::Login { line, env: env.into_iter().filter(comes_along).collect() })
    }
}

/// Whether a variable is one that comes along.
pub(super) fn comes_along((key, value): &(OsString, OsString)) -> bool {
    let known = |key: &OsStr| {
        VARIABLES.iter().any(|name| key == *name) || key.as_bytes().starts_with(b"LC_") && key.len() <= 20
    };
    known(key) && !key.as_bytes().contains(&b'=') && value.len() <= VALUE_MAX
}

/// What the worker says in the end, or at the beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The command has ended; perhaps it could not be executed.
    Ended { status: u8, trouble: Option<String> },
    /// The way in, whose descriptor comes along, and the number outside of who is root inside.
    Open { own_network: bool, root: u32 },
    /// There is no login. What the user is told tells nothing that is the administrator's.
    Refused(String),
}

impl Answer {
    pub(super) fn to_json(&self) -> Value {
        match self {
            Self::Ended { status, trouble } => json!({ "status": status, "trouble": trouble }),
            Self::Open { own_network, root } => json!({ "own_network": own_network, "root": root }),
            Self::Refused(why) => json!({ "refused": why }),
        }
    }

    pub(super) fn from_json(value: &Value) -> Option<Self> {
        if let Some(why) = value["refused"].as_str() {
            return Some(Self::Refused(why.to_owned()));
        }
        if let Some(own_network) = value["own_network"].as_bool() {
            let root = u32::try_from(value["root"].as_u64()?).ok()?;
            return Some(Self::Open { own_network, root });
        }
        let status = u8::try_from(value["status"].as_u64()?).ok()?;
        Some(Self::Ended { status, trouble: value["trouble"].as_str().map(str::to_owned) })
    }
}

/// Connects to the daemon, which is root's.
///
/// # Errors
/// It does not run, or somebody else is there.
pub(super) fn connect(path: &Path) -> Result<OwnedFd> {
    let failed = |error: rustix::io::Errno| {
        Error::io("Cannot reach 'memdev logind' at", error).on_path(path).advise("have it started")
    };
    let kind = (AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    let socket = rustix::net::socket_with(kind.0, kind.1, kind.2, None).map_err(failed)?;
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    be_patient(socket.as_fd()).map_err(failed)?;
    rustix::net::connect(&socket, &address).map_err(failed)?;
    let who =
        peer::credentials(socket.as_fd()).map_err(|error| Error::io("Cannot see who listens", error))?;
    if who.uid != 0 {
        return Err(Error::new(ErrorKind::Denied, "It is not root who listens at").on(path.display()));
    }
    Ok(socket)
}

/// Neither sending nor receiving takes for ever.
pub(super) fn be_patient(socket: BorrowedFd<'_>) -> rustix::io::Result<()> {
    sockopt::set_socket_timeout(socket, Timeout::Send, Some(PATIENCE))?;
    sockopt::set_socket_timeout(socket, Timeout::Recv, Some(PATIENCE))
}

/// How often a login program waits for [`PATIENCE`] until it has its way in: it can do nothing else meanwhile.
pub(super) const ROUNDS: u32 = 6;

/// Receives what is there, or comes while this waits so many times; `None` at the other end's end.
///
/// # Errors
/// What the system says; that nothing has come.
pub(super) fn hear(socket: BorrowedFd<'_>, rounds: u32) -> Result<Option<(Value, Vec<OwnedFd>)>> {
    let failed = |error: std::io::Error| Error::io("Cannot hear the other end", error);
    for _ in 0..rounds {
        match control::receive(socket) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            result => return result.map_err(failed),
        }
    }
    Err(Error::new(ErrorKind::Io, "The other end does not answer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_the_way_but_for_what_does_not_come_along() {
        let pair = |key: &str, value: &str| (OsString::from(key), OsString::from(value));
        let line = Some(OsString::from_vec(b"echo \xff".to_vec()));
        let request = Request::Login {
            line: line.clone(),
            env: vec![
                pair("TERM", "xterm"),
                pair("LD_PRELOAD", "/x"),
                pair("LC_ALL", "C"),
                pair("SSH_AUTH_SOCK", "/x"),
                pair("LANG", &"x".repeat(1000)),
                pair("LC_=", "x"),
            ],
        };
        let expected = Request::Login { line, env: vec![pair("TERM", "xterm"), pair("LC_ALL", "C")] };
        assert_eq!(Request::from_json(&request.to_json()), Some(expected));
        let open = Request::Open { user: "joe".into(), service: "su".into() };
        assert_eq!(Request::from_json(&open.to_json()), Some(open));
    }

    #[test]
    fn what_is_no_request_is_none() {
        for bad in [
            json!({}),
            json!(1),
            json!({ "line": "text", "env": [] }),
            json!({ "line": [1, 0], "env": [] }),
            json!({ "line": [1], "env": [[[65]]] }),
            json!({ "line": vec![65; LINE_MAX + 1], "env": [] }),
            json!({ "open": "joe" }),
        ] {
            assert_eq!(Request::from_json(&bad), None, "{bad}");
        }
    }

    #[test]
    fn answers_survive_the_way() {
        for answer in [
            Answer::Ended { status: 7, trouble: None },
            Answer::Ended { status: 127, trouble: Some("Cannot run x".into()) },
            Answer::Open { own_network: true, root: 0x7000_0000 },
            Answer::Refused("no".into()),
        ] {
            assert_eq!(Answer::from_json(&answer.to_json()), Some(answer));
        }
        assert_eq!(Answer::from_json(&json!({ "status": 256 })), None);
    }

    #[test]
    fn the_longest_line_fits_into_a_message() {
        let line = Some(OsString::from_vec(vec![0xff; LINE_MAX]));
        let env = (0..4).map(|_| ("LC_TIME".into(), OsString::from_vec(vec![0xff; VALUE_MAX]))).collect();
        let text = Request::Login { line, env }.to_json().to_string();
        let (one, other) = control::pair().unwrap();
        control::send(one.as_fd(), &serde_json::from_str(&text).unwrap(), &[]).unwrap();
        assert!(control::receive(other.as_fd()).unwrap().is_some());
    }
}
