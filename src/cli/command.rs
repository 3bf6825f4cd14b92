//! A command in a private root, as `memdev run` and `memdev enter` are both told of it.

use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use memdev::{attach, root};

use super::Failure;

/// What runs, as whom and where.
#[derive(Args, Debug)]
pub(crate) struct CommandArgs {
    /// The command and its arguments [default: the user's shell]
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<OsString>,

    /// Set an environment variable; without a value, take it over from here
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    env: Vec<OsString>,

    /// The directory that the command begins in [default: /]
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<PathBuf>,

    /// The user, and perhaps the group, of the image: names or numbers [default: root]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,

    /// Start the shell as one that was just logged in to
    #[arg(long)]
    pub(crate) login: bool,

    /// Where sessions and attachments are written down [default: /run, or what an ordinary user has for that]
    #[arg(long, value_name = "DIR", hide = true)]
    pub(crate) state: Option<PathBuf>,
}

impl CommandArgs {
    /// The variables of `--env`.
    pub(crate) fn env(&self) -> Vec<(OsString, OsString)> {
        self.env.iter().filter_map(|text| variable(text)).collect()
    }

    /// One of these options that was given, if one was.
    pub(crate) fn given(&self) -> Option<&'static str> {
        let all = [
            ("a command", !self.command.is_empty()),
            ("--env", !self.env.is_empty()),
            ("--workdir", self.workdir.is_some()),
            ("--user", self.user.is_some()),
            ("--login", self.login),
        ];
        all.into_iter().find(|(_, given)| *given).map(|(option, _)| option)
    }

    /// Where everything is written down, if not where it usually is.
    pub(crate) fn state(&self) -> Option<&Path> {
        self.state.as_deref()
    }

    /// Where attachments and sessions are written down.
    pub(crate) fn directories(&self) -> (PathBuf, PathBuf) {
        match &self.state {
            Some(state) => (state.join("attach"), state.join("root")),
            None => (root::directory(attach::DIRECTORY), root::directory(root::DIRECTORY)),
        }
    }
}

/// Tells what an ordinary user should know.
pub(crate) fn notice(text: &str) {
    // With stderr closed there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "memdev: {}", text.replace(char::is_control, " "));
}

/// The command's exit status as this process's; that it could not be executed is said, and what was not
/// delivered.
pub(crate) fn finish(ended: &root::Ended) -> Result<ExitCode, Failure> {
    let undelivered = ended.undelivered().iter().map(ToString::to_string);
    let lines: Vec<_> = ended.trouble().map(str::to_owned).into_iter().chain(undelivered).collect();
    if !lines.is_empty() {
        notice(&lines.join("; "));
    }
    Ok(ExitCode::from(ended.status()))
}

/// `KEY=VALUE`, or `KEY`, whose value is this process's, if it has one.
fn variable(text: &OsStr) -> Option<(OsString, OsString)> {
    let bytes = text.as_bytes();
    match bytes.iter().position(|&byte| byte == b'=') {
        Some(at) => {
            let owned = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
            Some((owned(&bytes[..at]), owned(&bytes[at + 1..])))
        }
        None => std::env::var_os(text).map(|value| (text.to_owned(), value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_given_or_taken_over() {
        let get = |text: &str| variable(OsStr::new(text));
        assert_eq!(get("A=b=c"), Some(("A".into(), "b=c".into())));
        assert_eq!(get("A="), Some(("A".into(), "".into())));
        assert_eq!(get("PATH"), std::env::var_os("PATH").map(|path| ("PATH".into(), path)));
        assert_eq!(get("NO_SUCH_VARIABLE"), None);
    }
}
