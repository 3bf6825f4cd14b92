//! `memdev enter`: one more command in a private root that runs.

use std::fmt::Write as _;
use std::process::ExitCode;

use clap::Args;
use memdev::root::{self, Session};
use serde_json::{Value, json};

use super::Failure;
use super::carriers::{self, Carriers};
use super::command::{CommandArgs, finish};

/// Run one more command in a private root that runs
#[derive(Args, Debug)]
#[command(
    long_about = "Run one more command, by default a shell, in a private root that 'memdev run' has made and that still \
        runs: with the same root directory, the same processes and the same rights. It ends with the session at the latest. \
        Who is not root gets into the sessions that are its own.",
    after_help = "Examples:\n  \
        memdev enter --list             what runs\n  \
        memdev enter debian-3f2a9c      a shell there\n  \
        memdev enter kiosk -- ls /tmp   in what 'run --name kiosk ...' began"
)]
pub(crate) struct Enter {
    /// The session's name, or the beginning of its id
    #[arg(value_name = "SESSION", required_unless_present = "list")]
    session: Option<String>,

    #[command(flatten)]
    command: CommandArgs,

    /// Show which private roots run
    #[arg(long, conflicts_with = "session")]
    list: bool,

    /// Print JSON
    #[arg(long, requires = "list")]
    json: bool,
}

pub(crate) fn run(args: Enter) -> Result<ExitCode, Failure> {
    let (_, sessions) = args.command.directories();
    let Some(session) = args.session else {
        let all = root::sessions(&sessions)?;
        let carriers = Carriers::running(args.command.state());
        super::print(&if args.json { as_json(&all, &carriers) } else { as_text(&all, &carriers) })?;
        return Ok(ExitCode::SUCCESS);
    };
    let enter = root::Enter {
        session,
        env: args.command.env(),
        command: args.command.command,
        line: None,
        login: args.command.login,
        workdir: args.command.workdir,
        user: args.command.user,
        stranger: None,
        sessions,
    };
    finish(&enter.run()?)
}

fn as_json(all: &[Session], carriers: &Carriers) -> String {
    let one = |session: &Session| {
        let mut value = session.to_json();
        value["carry"] = json!(carriers.of_root(&session.name));
        value
    };
    format!("{:#}\n", Value::from(all.iter().map(one).collect::<Vec<_>>()))
}

fn as_text(all: &[Session], carriers: &Carriers) -> String {
    let mut text = String::new();
    for session in all {
        let source = session.source.replace(char::is_control, "\u{fffd}");
        let mode = if session.privileged { ", privileged" } else { "" };
        let _ = writeln!(text, "{}: {source}, process 1 is {}{mode}", session.name, session.init);
        for told in carriers.of_root(&session.name) {
            carriers::append(&mut text, told, "    carries ");
        }
    }
    text
}
