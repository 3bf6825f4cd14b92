//! `memdev logind`: the daemon that makes private roots for those who log in.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use memdev::login::{self, Daemon};
use memdev::{Error, attach, root};

use super::{Failure, carry};

/// Serve logins: make private roots for those who log in
#[derive(Args, Debug)]
#[command(
    long_about = "Serve logins: a login shell runs with the user's rights, and only root can make a private root. So \
        'memdev login' asks this daemon, which is root's, by a socket, and is told by the kernel which user it is. For every \
        login there is a process beside it, which stays when this one ends. The settings are read anew for each.\n\n\
        A login that is refused is a line in the log, with the reason; with -v, logins that are not are lines, too.",
    after_help = "Examples:\n  \
        memdev -v logind\n  \
        memdev login --check joe    see what joe would get"
)]
pub(crate) struct Logind {
    /// The settings
    #[arg(long, value_name = "FILE", default_value = login::FILE)]
    config: PathBuf,

    /// Where to listen, in a directory of its own that is root's
    #[arg(long, value_name = "SOCKET", default_value = login::SOCKET)]
    socket: PathBuf,

    /// Where sessions and attachments are written down [default: /run]
    #[arg(long, value_name = "DIR", hide = true)]
    state: Option<PathBuf>,
}

pub(crate) fn run(args: Logind) -> Result<ExitCode, Failure> {
    // What it was started with is none of a daemon's, nor of the logins' that outlive it: nothing has been opened yet.
    memdev::sys::process::close_inherited(3)
        .map_err(|error| Error::io("Cannot close inherited descriptors", error))?;
    let (attachments, sessions) = match &args.state {
        Some(state) => (state.join("attach"), state.join("root")),
        None => (root::directory(attach::DIRECTORY), root::directory(root::DIRECTORY)),
    };
    let (spool, carriers) = carry::directories(args.state.as_deref());
    Daemon { config: args.config, socket: args.socket, attachments, sessions, spool, carriers }.run()?;
    Ok(ExitCode::SUCCESS)
}
