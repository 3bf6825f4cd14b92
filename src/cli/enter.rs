//! `memdev enter`: one more command in a private root that runs.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use memdev::root::{self, Session};
use serde_json::Value;

use super::Failure;
use super::run::{directories, finish, variable};

/// Run one more command in a private root that runs
#[derive(Args, Debug)]
#[command(
    long_about = "Run one more command, by default a shell, in a private root that 'memdev run' has made and that still \
        runs: with the same root directory, the same processes and the same rights. It ends with the session at the latest. \
        Needs root.",
    after_help = "Examples:\n  \
        memdev enter --list            what runs\n  \
        memdev enter debian-3f2a9c     a shell there\n  \
        memdev enter kiosk -- ps aux   in what was started by 'memdev run --name kiosk ...'"
)]
pub(crate) struct Enter {
    /// The session's name, or the beginning of its id
    #[arg(value_name = "SESSION", required_unless_present = "list")]
    session: Option<String>,

    /// The command and its arguments [default: the user's shell]
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,

    /// Set an environment variable; without a value, take it over from here
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    env: Vec<OsString>,

    /// The directory that the command begins in [default: /]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<PathBuf>,

    /// The user, and perhaps the group, of the image: names or numbers [default: root]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,

    /// Start the shell as one that was just logged in to
    #[arg(long)]
    login: bool,

    /// Show which private roots run
    #[arg(long, conflicts_with = "session")]
    list: bool,

    /// Print JSON
    #[arg(long, requires = "list")]
    json: bool,

    /// Where sessions are written down [default: /run]
    #[arg(long, value_name = "DIR", hide = true)]
    state: Option<PathBuf>,
}

pub(crate) fn run(args: Enter) -> Result<ExitCode, Failure> {
    let (_, sessions) = directories(args.state.as_deref());
    let Some(session) = args.session else {
        let all = root::sessions(&sessions)?;
        super::print(&if args.json { as_json(&all) } else { as_text(&all) })?;
        return Ok(ExitCode::SUCCESS);
    };
    let enter = root::Enter {
        session,
        command: args.command,
        login: args.login,
        env: args.env.iter().filter_map(|text| variable(text)).collect(),
        workdir: args.workdir,
        user: args.user,
        sessions,
    };
    finish(&enter.run()?)
}

fn as_json(all: &[Session]) -> String {
    format!("{:#}\n", Value::from(all.iter().map(Session::to_json).collect::<Vec<_>>()))
}

fn as_text(all: &[Session]) -> String {
    let mut text = String::new();
    for session in all {
        let source = session.source.replace(char::is_control, "\u{fffd}");
        let mode = if session.privileged { ", privileged" } else { "" };
        let _ = writeln!(text, "{}: {source}, process 1 is {}{mode}", session.name, session.init);
    }
    text
}
