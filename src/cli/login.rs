//! `memdev login`: a login whose root directory is a private copy of an image.

use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use memdev::Error;
use memdev::login::{self, Person, Settings};

use super::Failure;

/// What the program is called where it is a login shell.
const SHELL: &[u8] = b"memdev-login";

/// What sshd has in the environment of a ForceCommand.
const ORIGINAL_COMMAND: &str = "SSH_ORIGINAL_COMMAND";

/// The exit status of a login that is refused: no shell has it for anything of its own.
const REFUSED: u8 = 125;

/// Log in to a private root, or see what a login would get
#[derive(Args, Debug)]
#[command(
    long_about = "Log the user whose process this is in to a private root, as /etc/memdev/login.toml says: a shell, by the \
        user's name in the image. 'memdev logind' makes it, and ends it when this process ends, whichever way. As sshd's \
        ForceCommand it does what the client asked for; under the name memdev-login it is a login shell for /etc/passwd.\n\n\
        The exit status is the shell's, or 125 if the login is refused. Why is told in the daemon's log.",
    after_help = "Examples:\n  \
        memdev login --check          who gets anything\n  \
        memdev login --check joe      what joe would get\n  \
        memdev login -c 'uname -n'    one command\n  \
        ForceCommand /usr/bin/memdev login\n                                \
        in sshd_config, below 'Match Group'"
)]
pub(crate) struct Login {
    /// The user that --check is about [default: show who gets anything]
    #[arg(value_name = "USER", requires = "check")]
    user: Option<String>,

    /// What the shell is to do [default: what sshd's client asked for, or else be interactive]
    #[arg(short, value_name = "COMMAND", conflicts_with = "check")]
    command: Option<OsString>,

    /// Log nobody in: look through the settings, and show what the user would get
    #[arg(long)]
    check: bool,

    /// The settings that --check looks through
    #[arg(long, value_name = "FILE", default_value = login::FILE, requires = "check")]
    config: PathBuf,

    /// Where 'memdev logind' listens
    #[arg(long, value_name = "SOCKET", default_value = login::SOCKET, conflicts_with = "check")]
    socket: PathBuf,
}

pub(crate) fn run(args: Login) -> Result<ExitCode, Failure> {
    if args.check {
        check(&args)?;
        return Ok(ExitCode::SUCCESS);
    }
    let asked = || std::env::var_os(ORIGINAL_COMMAND).filter(|line| !line.is_empty());
    log_in(login::Login { line: args.command.or_else(asked), socket: args.socket })
}

/// Whether the program was started as a login shell: as `memdev-login`, or `-memdev-login`.
pub(super) fn is_shell(name: &OsStr) -> bool {
    let name = Path::new(name).file_name().unwrap_or_default().as_bytes();
    name.strip_prefix(b"-").unwrap_or(name) == SHELL
}

/// Does what a login shell is asked for. Nothing but `-c` is known: these arguments are the user's (`su joe -- ...`), and what
/// else memdev can do would be done on the host.
pub(super) fn as_shell(mut args: impl Iterator<Item = OsString>) -> Result<ExitCode, Failure> {
    let line = match (args.next(), args.next(), args.next()) {
        (None, ..) => None,
        (Some(option), Some(line), None) if option == "-c" => Some(line),
        _ => return Err(Failure::Usage("A login shell takes nothing but -c COMMAND".to_owned())),
    };
    log_in(login::Login { line, socket: login::SOCKET.into() })
}

fn log_in(login: login::Login) -> Result<ExitCode, Failure> {
    let ended = login.run().map_err(|error| Failure::NotRun(error, REFUSED))?;
    if let Some(trouble) = ended.trouble {
        let _ = writeln!(std::io::stderr(), "memdev: {}", trouble.replace(char::is_control, " "));
    }
    Ok(ExitCode::from(ended.status))
}

fn check(args: &Login) -> Result<(), Error> {
    let settings = Settings::read(&args.config)?;
    let Some(user) = &args.user else {
        return super::print(&settings.summary());
    };
    let grant = settings.grant(&Person::by_name(user)?)?;
    super::print(&grant.to_string())?;
    grant.verify()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_shell_is_known_by_its_name() {
        for name in ["memdev-login", "-memdev-login", "/usr/bin/memdev-login"] {
            assert!(is_shell(OsStr::new(name)), "{name}");
        }
        for name in ["memdev", "-memdev", "login", "memdev-login.bak", ""] {
            assert!(!is_shell(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn a_login_shell_does_nothing_else() {
        for args in [&["ns"][..], &["-c"], &["-c", "a", "b"], &["--socket", "/x"], &["-l"], &["--check"]] {
            let result = as_shell(args.iter().map(|&arg| OsString::from(arg)));
            assert!(matches!(result, Err(Failure::Usage(_))), "{args:?}");
        }
    }
}
