//! A command in a private root, as `memdev run` and `memdev enter` are both told of it.

use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
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

    /// Where sessions and attachments are written down [default: /run]
    #[arg(long, value_name = "DIR", hide = true)]
    state: Option<PathBuf>,
}

impl CommandArgs {
    /// The variables of `--env`.
    pub(crate) fn env(&self) -> Vec<(OsString, OsString)> {
        self.env.iter().filter_map(|text| variable(text)).collect()
    }

    /// Where attachments and sessions are written down.
    pub(crate) fn directories(&self) -> (PathBuf, PathBuf) {
        match &self.state {
            Some(state) => (state.join("attach"), state.join("root")),
            None => (attach::DIRECTORY.into(), root::DIRECTORY.into()),
        }
    }
}

/// The command's exit status as this process's; that it could not be executed is said.
pub(crate) fn finish(ended: &root::Ended) -> Result<ExitCode, Failure> {
    if let Some(trouble) = ended.trouble() {
        let _ = writeln!(std::io::stderr(), "memdev: {}", trouble.replace(char::is_control, " "));
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
