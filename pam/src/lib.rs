//! `pam_memdev.so`: puts a login program (sshd, su) into the private root of the user who logs in, so that the shell that it
//! starts is inside.
//!
//! ```text
//!   session  required  pam_memdev.so  [socket=PATH]
//! ```
//!
//! All of it is in `memdev::login::pam`, but for the talk with libpam (`sys`). Whatever fails is `PAM_SESSION_ERR`, by which
//! login programs refuse the login; the reason is in the system's log, and the user is told that there is one.

mod sys;

use std::path::PathBuf;

use memdev::login::{self, pam::Inside};

/// What is told to the user whose login is refused.
const TOLD: &str = "memdev: Login refused; the system's log says why";

/// What comes behind the module's name in its line.
fn socket(args: &[String]) -> Result<PathBuf, String> {
    let mut socket = PathBuf::from(login::SOCKET);
    for arg in args {
        match arg.split_once('=') {
            Some(("socket", path)) if path.starts_with('/') => socket = path.into(),
            _ => return Err(format!("'{arg}' is no option of pam_memdev.so; socket=PATH is")),
        }
    }
    Ok(socket)
}

/// Puts this process inside.
fn open(user: &str, service: &str, args: &[String]) -> Result<Inside, String> {
    login::pam::open(&socket(args)?, user, service).map_err(|error| error.to_string())
}
